"""What is in the wallets, and what is running.

export CLORE_API_KEY=...
python check_balance.py
"""

from clore_client import CloreClient


def main() -> None:
    with CloreClient() as client:
        for wallet in client.get_wallets():
            print(f"{wallet['name']:20} {wallet['balance'] or 0:16.8f}")
        orders = client.get_orders()
        print(f"{len(orders)} active order(s)")
        for order in orders:
            price = f"{order['price']:.6f} {order.get('currency')} per hour"
            print(
                f"  {order['order_id']}  server {order['renting_server']}  {order.status}  {price}"
            )


if __name__ == "__main__":
    main()
