"""What 5,000 servers cost, in CPU time and in memory."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import requests

from clore_client import CloreClient

from .rows import Row, compare

SERVERS = 5000


def rows(url: str, key: str) -> Iterator[Row]:
    """The three lines about the marketplace."""
    with requests.Session() as session, CloreClient(key, base_url=url, rate_limit=0) as client:

        def find() -> Any:
            return client.find_servers(gpu_type="RTX 4090", max_price_usd=0.8, min_reliability=85)

        def peer() -> Any:
            return session.get(url + "/v1/marketplace", timeout=30).json()

        found, listed = len(find()), len(client.get_marketplace())
        ratio, detail = compare(find, peer, clock=time.process_time, rounds=7, calls=4)
        yield Row(f"find_servers(), {found} of {SERVERS}, CPU", ratio, 1.3, detail=detail)
        mine, other = _peak(find), _peak(peer)
        detail = f"{mine / 1e6:.1f} against {other / 1e6:.1f} MB"
        yield Row("find_servers(), peak memory", mine / other, 1.2, detail=detail)
        ratio, detail = compare(
            client.get_marketplace, peer, clock=time.process_time, rounds=7, calls=4
        )
        yield Row(f"get_marketplace(), {listed} of {SERVERS}, CPU", ratio, 2.0, detail=detail)


def _peak(call: Callable[[], Any]) -> int:
    """The most bytes that Python held during a call, above what it held before."""
    # Not the process's ru_maxrss: a child starts with that of its parent, and the interpreter
    # and its modules, the same on both sides, would hide a part of the difference.
    gc.collect()
    tracemalloc.start()
    try:
        result = call()
        _, peak = tracemalloc.get_traced_memory()
        del result
    finally:
        tracemalloc.stop()
    return peak
