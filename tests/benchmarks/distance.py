"""A child that puts a distance between a client and a port of this machine."""

from __future__ import annotations

import json
import sys

from tests.relay import Relay


def main() -> None:
    """Print where it listens; arguments are the port, and the seconds that each way takes."""
    with Relay(int(sys.argv[1]), float(sys.argv[2])) as relay:
        print(json.dumps(relay.port), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
