"""Rentals: rent a server for the length of a block."""
