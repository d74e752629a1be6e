"""Records that the client returns: servers, orders, wallets, results."""
