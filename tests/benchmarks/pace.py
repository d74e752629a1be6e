"""Measure how well many threads with one key keep the rate limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

from clore_client import CloreClient

from . import pace_kills, pace_processes
from .children import child
from .pace_processes import departures
from .rows import Row

THREADS, CALLS, LIMIT, ROUNDS = 8, 5, 0.05, 5


def rows() -> Iterator[Row]:
    """Yield the three lines: the shortest interval of all rounds, and the median time."""
    measured = [_round() for _ in range(ROUNDS)]
    leave, arrive, refused, whole = zip(*measured, strict=True)
    ideal = (THREADS * CALLS - 1) * LIMIT
    of = f"of {ROUNDS} rounds of {THREADS} threads with {CALLS} calls"
    yield Row("closest departures / limit", min(leave) / LIMIT, 1.0, at_least=True, detail=of)
    detail = f"{of}; {sum(refused)} answers were a 429"
    yield Row("closest arrivals / limit", min(arrive) / LIMIT, 0.9, at_least=True, detail=detail)
    detail = f"worst {max(whole) / ideal:.3f}"
    yield Row("whole time / ideal", statistics.median(whole) / ideal, 1.05, detail=detail)
    yield from pace_processes.rows()
    yield from pace_kills.rows()


def _round() -> tuple[float, float, int, float]:
    """Return the shortest intervals at the send and the arrival, the refusals and the time."""
    with child("arrivals", str(0.9 * LIMIT)) as simulator:
        url, key = simulator.read()
        start = Barrier(THREADS + 1)
        with (
            CloreClient(key, base_url=url, rate_limit=LIMIT, state_dir=None) as client,
            departures() as left,
        ):

            def work() -> None:
                start.wait()
                for _ in range(CALLS):
                    client.get_wallets()

            with ThreadPoolExecutor(THREADS) as pool:
                jobs = [pool.submit(work) for _ in range(THREADS)]
                start.wait()
                began = time.monotonic()
                for job in jobs:
                    job.result()
                whole = time.monotonic() - began
        simulator.finish()
        calls = simulator.read()
    refused = sum(status == 429 for _, status in calls)
    return _closest(left), _closest(arrived for arrived, _ in calls), refused, whole


def _closest(moments: Iterable[float]) -> float:
    return min(later - earlier for earlier, later in pairwise(sorted(moments)))
