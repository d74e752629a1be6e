"""One API call: pace, retries, connections."""
