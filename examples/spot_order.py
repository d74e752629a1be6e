"""Bid for a GPU on the spot market a little over the minimum, raise the bid, and cancel the order.

export CLORE_API_KEY=...
python spot_order.py ["RTX 3090" [most USD per hour]]
"""

import sys

from clore_client import CloreClient


def main(gpu: str = "RTX 3090", max_usd: str = "0.5") -> None:
    with CloreClient() as client:
        server = client.find_cheapest(gpu, max_price_usd=float(max_usd), use_spot=True)
        if server is None or server.spot_usd_per_hour is None:
            sys.exit(f"no {gpu} for a bid under {max_usd} USD per hour")
        for offer in client.get_spot_market(server["id"])["market"]["offers"]:
            print(f"there is a bid of {offer['usd_per_hour']} USD per hour")
        bid = server.spot_usd_per_hour * 1.02
        order = client.create_order(server["id"], order_type="spot", spot_price=bid)
        print(f"order {order.id}: bid {bid:.4f} USD per hour")
        try:
            order = client.wait_for_order(order["order_id"], timeout=300)
            client.set_spot_price(order["order_id"], bid * 1.02)
            print(f"order {order.id} is {order.status}; bid raised to {bid * 1.02:.4f}")
        finally:
            client.cancel_order(order["order_id"])
            print(f"order {order['order_id']} is cancelled")


if __name__ == "__main__":
    main(*sys.argv[1:])
