"""Measure what the client costs, compared with plain requests."""
