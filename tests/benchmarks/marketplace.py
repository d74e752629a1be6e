"""What 5,000 servers cost, in CPU time and in memory."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import requests

from clore_client import CloreClient
from clore_client.market.filters import SearchFilters

from .rows import Row, compare

SERVERS = 5000
# Each filter of find_servers(), and almost all leave out some servers.
ALL_FILTERS: SearchFilters = {
    "gpu_count": 1, "min_gpu_count": 1, "exact_gpu": True, "min_vram_gb": 8,
    "min_total_vram_gb": 8, "min_ram_gb": 4, "min_cpu_cores": 2, "min_disk_gb": 50,
    "min_disk_mbps": 10, "min_download_mbps": 10, "min_upload_mbps": 10, "min_cuda": "11.8",
    "min_pcie_width": 1, "countries": ["EU", "North America", "Asia"],
    "exclude_countries": ["RU"], "currency": "CLORE", "min_rating": 1, "min_ratings": 2,
    "min_rental_hours": 24, "exclude_servers": [1, 2], "exclude_owners": [1],
    "max_price_per_gpu_usd": 5, "include_fees": True, "sort": "price_per_gpu", "limit": 500,
    "where": lambda server: server.id != 5,
}  # fmt: skip


def rows(url: str, key: str) -> Iterator[Row]:
    """The lines about the marketplace."""
    with requests.Session() as session, CloreClient(key, base_url=url, rate_limit=0) as client:

        def find() -> Any:
            return client.find_servers(gpu_type="RTX 4090", max_price_usd=0.8, min_reliability=85)

        def find_all() -> Any:
            return client.find_servers("RTX 4090", 5.0, 50, False, **ALL_FILTERS)

        def peer() -> Any:
            return session.get(url + "/v1/marketplace", timeout=30).json()

        found, listed = len(find()), len(client.get_marketplace())
        ratio, detail = compare(find, peer, clock=time.process_time, rounds=7, calls=4)
        yield Row(f"find_servers(), {found} of {SERVERS}, CPU", ratio, 1.3, detail=detail)
        mine, other = _peak(find), _peak(peer)
        detail = f"{mine / 1e6:.1f} against {other / 1e6:.1f} MB"
        yield Row("find_servers(), peak memory", mine / other, 1.2, detail=detail)
        ratio, detail = compare(find_all, peer, clock=time.process_time, rounds=7, calls=4)
        what = f"find_servers() with all filters, {len(find_all())} of {SERVERS}, CPU"
        yield Row(what, ratio, 1.25, detail=detail)
        mine, other = _peak(find_all), _peak(peer)
        detail = f"{mine / 1e6:.1f} against {other / 1e6:.1f} MB"
        yield Row("find_servers() with all filters, peak memory", mine / other, 1.1, detail=detail)
        summary = client.market_summary
        ratio, detail = compare(summary, peer, clock=time.process_time, rounds=7, calls=4)
        yield Row(f"market_summary(), {len(summary())} models, CPU", ratio, 1.6, detail=detail)
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
