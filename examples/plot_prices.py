"""Draw the prices of the marketplace, for all GPUs or those with a name. Needs no key.

pip install requests matplotlib
python plot_prices.py prices.png "RTX 40"
"""

import sys

from clore_client import CloreClient

path = sys.argv[1] if len(sys.argv) > 1 else "prices.png"
gpu_type = sys.argv[2] if len(sys.argv) > 2 else None

with CloreClient() as client:
    servers = client.find_servers(gpu_type)
    if not servers:
        sys.exit(f"no server with {gpu_type!r}")
    print(servers)
    client.plot_prices(servers, path)
print(f"the picture is in {path}")
