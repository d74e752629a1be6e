"""Read and search the marketplace: servers, prices, spot bids."""
