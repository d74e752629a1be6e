"""A GPU marketplace on this machine, to try and test a client against."""

from .server import Simulator

__all__ = ["Simulator"]
