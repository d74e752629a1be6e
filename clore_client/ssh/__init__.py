"""Work on rented hosts over SSH."""
