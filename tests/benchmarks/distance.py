"""Run a proxy that adds a latency to a port of this machine."""

from __future__ import annotations

import json
import sys

from tests.relay import Relay


def main() -> None:
    """Print its port. Arguments: the target port, and the seconds of latency in each direction."""
    with Relay(int(sys.argv[1]), float(sys.argv[2])) as relay:
        print(json.dumps(relay.port), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
