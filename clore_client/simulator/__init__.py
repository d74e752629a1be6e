"""A GPU marketplace on this machine, to try and test a client against."""

from .simulator import Simulator

__all__ = ["Simulator"]
