"""Work on rented machines, over SSH."""
