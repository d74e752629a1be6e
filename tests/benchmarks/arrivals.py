"""A child with a simulator that tells, when its input ends, what arrived when."""

from __future__ import annotations

import json
import sys

from clore_client.simulator import Simulator


def main() -> None:
    """Print where it listens; at the end, the arrivals and the statuses of the answers."""
    with Simulator(servers=1, rate_limit=float(sys.argv[1]), ssh=False) as sim:
        print(json.dumps([sim.url, sim.api_key]), flush=True)
        sys.stdin.read()
        print(json.dumps([(call.arrived, call.status) for call in sim.requests]), flush=True)


if __name__ == "__main__":
    main()
