"""Run a command on each order that is running.

export CLORE_API_KEY=...
python run_over_ssh.py PASSWORD COMMAND...
"""

import sys

from clore_client import CloreClient, SSHError


def main(password: str, *command: str) -> None:
    with CloreClient() as client:
        for order in client.get_orders():
            if not order.is_running:
                continue
            print(f"== {order.id}: {order.ssh_command}")
            try:
                client.run(order, list(command), password=password, timeout=60, on_output=print)
            except SSHError as error:
                print(f"   {error}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
