"""Rent the cheapest RTX 4090, run nvidia-smi on it, and cancel the order in any case.

export CLORE_API_KEY=...
python rent_cheapest.py ["RTX 4090" [most USD per hour]]
"""

import logging
import sys

from clore_client import CloreClient, RentalError


def main(gpu: str = "RTX 4090", max_usd: str = "1.0") -> None:
    logging.basicConfig(format="   %(message)s")
    logging.getLogger("clore_client").setLevel(logging.INFO)  # says what costs or frees money
    print(f"renting the cheapest {gpu}; it takes a minute or two", flush=True)
    with CloreClient() as client:
        rental = client.rent(gpu, max_price_usd=float(max_usd), min_reliability=90, max_hours=1)
        try:
            with rental:
                server = rental.server
                price = f"{server.usd_per_hour:.3f} USD per hour"
                print(f"server {server.id}: {server.gpu_count}x {server.gpu_name}, {price}")
                print(f"running: {rental.order.ssh_command}", flush=True)
                print(rental.run("nvidia-smi").stdout, flush=True)
        except RentalError as error:
            sys.exit(f"no {gpu} under {max_usd} USD per hour: {error}")
        print(f"order cancelled; it cost about {rental.cost_usd:.4f} USD")


if __name__ == "__main__":
    main(*sys.argv[1:])
