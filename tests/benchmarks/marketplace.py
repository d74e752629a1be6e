"""Measure the time and the memory for 5,000 servers."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests

from clore_client import CloreClient
from clore_client.api import retry
from clore_client.market.filters import SearchFilters

from .rows import Row, compare, timed

SERVERS = 5000
SDK = "clore_ai"  # pip install '.[benchmark]'
FOR_SDK = "marketplace_for_sdk"
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
    """Yield the lines about the marketplace."""
    with requests.Session() as session, CloreClient(key, base_url=url, rate_limit=0) as client:

        def find() -> Any:
            return client.find_servers(gpu_type="RTX 4090", max_price_usd=0.8, min_reliability=85)

        def find_all() -> Any:
            return client.find_servers("RTX 4090", 5.0, 50, False, **ALL_FILTERS)

        def peer() -> Any:
            return session.get(url + "/v1/marketplace", timeout=30).json()

        with _without_msgspec():
            found, listed = len(find()), len(client.get_marketplace())
            yield _cpu(f"find_servers(), {found} of {SERVERS}", find, peer, 1.25)
            mine, other = _peak(find), _peak(peer)
            detail = f"{mine / 1e6:.1f} against {other / 1e6:.1f} MB"
            yield Row("find_servers(), peak memory", mine / other, 1.1, detail=detail)
            yield _cpu(f"the same with all filters, {len(find_all())}", find_all, peer, 1.25)
            mine, other = _peak(find_all), _peak(peer)
            detail = f"{mine / 1e6:.1f} against {other / 1e6:.1f} MB"
            yield Row("the same with all filters, peak memory", mine / other, 1.1, detail=detail)
            models = f"market_summary(), {len(client.market_summary())} models"
            yield _cpu(models, client.market_summary, peer, 1.6)
            all_of = f"get_marketplace(), {listed} of {SERVERS}"
            yield _cpu(all_of, client.get_marketplace, peer, 2.0)
            yield from _against_sdk(url, find)
        yield _cpu("find_servers() with the extra fast", find, peer, 0.6)
        yield _cpu("the same with all filters", find_all, peer, 0.6)
        yield _table(client.get_marketplace(include_rented=True))


def _cpu(what: str, call: Callable[[], Any], peer: Callable[[], Any], limit: float) -> Row:
    ratio, detail = compare(call, peer, clock=time.process_time, rounds=7, calls=4)
    return Row(f"{what}, CPU", ratio, limit, detail=detail)


def _against_sdk(url: str, find: Callable[[], Any]) -> Iterator[Row]:
    """Yield the line about the official SDK with the same search."""
    try:
        sdk = importlib.import_module(SDK)
    except ImportError:
        print(f"left out: {SDK} is not installed; pip install '.[benchmark]'")
        return
    with sdk.CloreAI(base_url=f"{url}/v1") as peer:
        peer.rate_limiter = importlib.import_module(f"{SDK}.client").RateLimiter(1e9)
        request = peer._request
        peer._request = lambda method, endpoint, **more: request(method, FOR_SDK, **more)

        def search() -> Any:  # its prices are per day, its reliability is 0 to 1
            fitting = peer.marketplace(gpu="RTX 4090", max_price_usd=0.8 * 24)
            fitting = [server for server in fitting if (server.reliability or 0) >= 0.85]
            return sorted(fitting, key=lambda server: server.price_usd)

        found = f"{len(search())} and {len(find())} found"
        ratio, detail = compare(search, find, clock=time.process_time, rounds=5, calls=2)
    yield Row("the official SDK / find_servers(), CPU", ratio, 2.0, True, f"{detail}; {found}")


def _table(listed: Any) -> Row:
    def show() -> None:
        repr(listed)
        listed._repr_html_()

    milliseconds = statistics.median(timed(show, time.perf_counter) for _ in range(9)) * 1000
    return Row(f"ms to show {len(listed)} servers as text and as HTML", milliseconds, 50)


@contextmanager
def _without_msgspec() -> Iterator[None]:
    """Make the client decode JSON as it does without the extra fast."""
    usual = retry.fast_json
    retry.fast_json = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        retry.fast_json = usual


def _peak(call: Callable[[], Any]) -> int:
    """Return the peak of Python's memory during a call, in bytes above the start."""
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
