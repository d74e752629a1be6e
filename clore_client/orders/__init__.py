"""Making orders, waiting for them, ending them."""
