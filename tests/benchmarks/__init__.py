"""What the client costs, against requests on its own."""
