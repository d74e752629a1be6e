"""Rent the cheapest RTX 4090, run nvidia-smi on it, and give it back, whatever happens.

export CLORE_API_KEY=...
python rent_cheapest.py ["RTX 4090" [most USD per hour]]
"""

import sys

from clore_client import CloreClient


def main(gpu: str = "RTX 4090", max_usd: str = "1.0") -> None:
    with CloreClient() as client:
        server = client.find_cheapest(gpu, max_price_usd=float(max_usd), min_reliability=90)
        if server is None:
            sys.exit(f"no {gpu} under {max_usd} USD per hour")
        price = f"{server.usd_per_hour:.3f} USD per hour"
        print(f"server {server.id}: {server.gpu_count}x {server.gpu_name}, {price}", flush=True)
        order = client.create_order(server["id"])
        print(f"order {order.id} is made; waiting until it runs", flush=True)
        try:
            order = client.wait_for_order(order["order_id"], timeout=300)
            print(f"running: {order.ssh_command}", flush=True)
            with client.connect_ssh(order) as ssh:
                _, output, _ = ssh.exec_command("nvidia-smi", timeout=60)
                print(output.read().decode())
        finally:
            client.cancel_order(order["order_id"])
            print(f"order {order['order_id']} is given back")


if __name__ == "__main__":
    main(*sys.argv[1:])
