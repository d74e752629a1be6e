"""The marketplace: servers, prices, spot bids."""
