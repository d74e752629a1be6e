"""Rent servers for the length of a block."""
