"""Finding a machine."""
