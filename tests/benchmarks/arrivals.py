"""Run a simulator, and print the arrival times of its requests when the input ends."""

from __future__ import annotations

import json
import sys

from clore_client.simulator import Simulator


def main() -> None:
    """Print the address; at the end, the arrival times and the statuses of the responses."""
    with Simulator(servers=1, rate_limit=float(sys.argv[1]), ssh=False) as sim:
        print(json.dumps([sim.url, sim.api_key]), flush=True)
        sys.stdin.read()
        print(json.dumps([(call.arrived, call.status) for call in sim.requests]), flush=True)


if __name__ == "__main__":
    main()
