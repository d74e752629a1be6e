"""Hand rented servers to Dask, each through a forwarded port.

pip install dask distributed; export CLORE_API_KEY=...
python dask_rentals.py "RTX 4090" 3
"""

import contextlib
import sys

from clore_client import CloreClient, Rental

START = """
pip install -q dask distributed || exit
nohup dask scheduler --host 127.0.0.1 --port 8786 </dev/null >scheduler.log 2>&1 &
nohup dask worker tcp://127.0.0.1:8786 </dev/null >worker.log 2>&1 &
python3 -c 'from distributed import Client; Client("127.0.0.1:8786").wait_for_workers(1, 60)'
"""


def main(gpu_type: str, count: int) -> None:
    from distributed import Client

    with CloreClient() as client, contextlib.ExitStack() as stack:
        rentals = stack.enter_context(client.rent_many(count, gpu_type, max_hours=1))
        rentals.run(START)

        def cluster(rental: Rental) -> Client:
            port = stack.enter_context(rental.forward(8786))
            return stack.enter_context(Client(f"tcp://127.0.0.1:{port}"))

        clusters = [cluster(rental) for rental in rentals]
        futures = [clusters[n % len(clusters)].submit(pow, n, 2) for n in range(100)]
        print(sum(future.result() for future in futures))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
