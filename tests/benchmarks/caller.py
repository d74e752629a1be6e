"""Call as fast as the rate limit allows, and print when each call ended."""

from __future__ import annotations

import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clore_client import CloreClient, CloreError


def main() -> None:
    """Print ``"ready"``; after a line of input, when calls ended, and the errors of others."""
    url, key, threads, calls, options = sys.argv[1:6]
    settings: dict[str, Any] = json.loads(options)
    logging.getLogger("clore_client").setLevel(logging.ERROR)
    ended: list[float] = []
    errors: list[str] = []
    with CloreClient(key, base_url=url, **settings) as client:

        def work() -> None:
            for _ in range(int(calls)):
                try:
                    client.get_wallets()
                    ended.append(time.monotonic())
                except CloreError as error:
                    errors.append(str(error))

        print(json.dumps("ready"), flush=True)
        sys.stdin.readline()
        with ThreadPoolExecutor(int(threads)) as pool:
            for _ in range(int(threads)):
                pool.submit(work)
        print(json.dumps([sorted(ended), errors]), flush=True)


if __name__ == "__main__":
    main()
