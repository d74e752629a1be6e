"""Define what the client returns: servers, orders, wallets, results."""
