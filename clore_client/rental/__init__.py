"""Renting a server for the length of a block."""
