"""What a user holds: servers, orders, wallets."""
