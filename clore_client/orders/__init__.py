"""Create, find, await and cancel orders."""
