"""A child that calls as fast as it may, and tells when each of its calls ended."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clore_client import CloreClient


def main() -> None:
    """Print ``ready``; after a line of input, when the calls of each thread ended."""
    url, key, threads, calls, options = sys.argv[1:6]
    settings: dict[str, Any] = json.loads(options)
    with CloreClient(key, base_url=url, **settings) as client:

        def work(_: int) -> list[float]:
            ended = []
            for _ in range(int(calls)):
                client.get_wallets()
                ended.append(time.monotonic())
            return ended

        print("ready", flush=True)
        sys.stdin.readline()
        with ThreadPoolExecutor(int(threads)) as pool:
            print(json.dumps(list(pool.map(work, range(int(threads))))), flush=True)


if __name__ == "__main__":
    main()
