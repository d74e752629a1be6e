"""Simulate the GPU marketplace on this machine, to try out and test clients."""

from .simulator import Simulator

__all__ = ["Simulator"]
