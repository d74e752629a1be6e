"""A marketplace on this machine that speaks like the live API, with real SSH hosts."""

from .server import Simulator

__all__ = ["Simulator"]
