"""Simulate the GPU marketplace on this machine, to try and test clients against."""

from .simulator import Simulator

__all__ = ["Simulator"]
