"""Run a command on each order that is running.

export CLORE_API_KEY=...
python run_over_ssh.py PASSWORD COMMAND...
"""

import shlex
import sys

from clore_client import CloreClient, SSHError


def main(password: str, *command: str) -> None:
    with CloreClient() as client:
        for order in client.get_orders():
            if not order.is_running:
                continue
            print(f"== {order.id}: {order.ssh_command}")
            try:
                with client.connect_ssh(order, password=password) as ssh:
                    _, output, errors = ssh.exec_command(shlex.join(command), timeout=60)
                    print(output.read().decode(), errors.read().decode(), sep="", end="")
            except SSHError as error:
                print(f"   {error}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
