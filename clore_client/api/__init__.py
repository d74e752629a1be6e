"""Make API calls: requests, rate limit, retries, connections."""
