"""Measure how well processes and machines with one key share the rate limit."""

from __future__ import annotations

import contextlib
import http.client
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from clore_client import CloreAPIError, CloreClient
from tests.api.redis_server import RedisProcess, redis_process

from .children import Child, child
from .rows import Row

LIMIT, API_LIMIT = 0.11, 0.1  # seconds: ten times as fast as the API
TOTAL = 80  # calls of all processes together


@dataclass(frozen=True)
class Outcome:
    """The requests that the simulator received, and the results of the processes."""

    time: float  # whole time / ideal
    closest: float  # closest arrivals / limit
    refused: int
    share: float  # smallest share of a process, when the first one was done / its fair share
    errors: list[str]

    def __str__(self) -> str:
        return (
            f"time {self.time:6.3f}  closest {self.closest:6.3f}  refused {self.refused:4d}  "
            f"share {self.share:5.2f}  errors {len(self.errors)}"
        )


def together(
    folders: Sequence[str | None],
    *,
    threads: int = 1,
    calls: int,
    meanwhile: Callable[[], None] = lambda: None,
    **options: Any,
) -> Outcome:
    """Let one process for each state folder make calls as fast as it may.

    Parameters:
        folders: the state folder of each process.
        threads, calls: threads of each process, and calls of each thread.
        meanwhile: run in this process when all have started.
        **options: further arguments of the client.
    """
    with contextlib.ExitStack() as stack:
        simulator = stack.enter_context(child("arrivals", str(API_LIMIT)))
        url, key = simulator.read()
        callers: list[Child] = []
        for folder in folders:
            settings = json.dumps({"rate_limit": LIMIT, "state_dir": folder, **options})
            arguments = (url, key, str(threads), str(calls), settings)
            callers.append(stack.enter_context(child("caller", *arguments)))
        for caller in callers:
            caller.read()
        for caller in callers:
            caller.finish()
        meanwhile()
        results = [caller.read() for caller in callers]
        simulator.finish()
        seen = simulator.read()
    ended = [times for times, _ in results if times]
    arrived = [at for at, _ in seen]
    first_done = min(times[-1] for times in ended)
    counts = [sum(at <= first_done for at in times) for times in ended]
    return Outcome(
        time=(max(arrived) - min(arrived)) / ((len(folders) * threads * calls - 1) * LIMIT),
        closest=min(b - a for a, b in pairwise(sorted(arrived))) / LIMIT,
        refused=sum(status == 429 for _, status in seen),
        share=min(counts) / statistics.mean(counts),
        errors=[error for _, errors in results for error in errors],
    )


def rows() -> Iterator[Row]:
    """Print a table over the number of processes, then return the lines with limits."""
    with contextlib.ExitStack() as stack:

        def folder() -> str:
            return stack.enter_context(tempfile.TemporaryDirectory())

        yield from _one_machine(folder)
        yield from _redis(folder)
        yield from _machines(folder)


def _one_machine(folder: Callable[[], str]) -> Iterator[Row]:
    shared = folder()
    for processes in (1, 2, 4, 8, 16):
        outcome = together([shared] * processes, calls=TOTAL // processes)
        print(f"{processes:2d} processes: {outcome}", flush=True)
    outcome = together([shared] * 4, threads=2, calls=15)
    of = "4 processes x 2 threads"
    yield Row(f"{of}: whole time / ideal", outcome.time, 1.05, detail=str(outcome))
    yield Row(f"{of}: refusals", outcome.refused, 0)
    yield Row(f"{of}: smallest share", outcome.share, 0.9, at_least=True)
    delays = _cancels(shared)
    detail = "intervals: " + " ".join(f"{delay:.2f}" for delay in delays)
    yield Row("a cancel while 16 reads wait: intervals", max(delays), 1.2, detail=detail)
    yield Row("a call with the file - without, us", _cost(shared), 60)


def _redis(folder: Callable[[], str]) -> Iterator[Row]:
    with redis_process(Path(folder())) as server:
        options: dict[str, Any] = {"threads": 2, "rate_limiter": server.url}
        outcome = together([folder() for _ in range(4)], calls=15, **options)
        of = "Redis, 4 processes x 2 threads"
        yield Row(f"{of}: whole time / ideal", outcome.time, 1.05, detail=str(outcome))
        yield Row(f"{of}: refusals", outcome.refused, 0)
        yield Row(f"{of}: smallest share", outcome.share, 0.9, at_least=True)
        folders = [folder() for _ in range(4)]
        outcome = together(folders, calls=30, meanwhile=lambda: _disturb(server), **options)
        yield Row("Redis killed and stopped: errors", len(outcome.errors), 0, detail=str(outcome))


def _machines(folder: Callable[[], str]) -> Iterator[Row]:
    outcome = together([folder() for _ in range(4)], calls=100)
    yield Row("4 machines: errors", len(outcome.errors), 0, detail=str(outcome))
    yield Row("4 machines: ideal / whole time", 1 / outcome.time, 0.85, at_least=True)
    yield Row("4 machines: smallest share", outcome.share, 0.5, at_least=True)


def _disturb(server: RedisProcess) -> None:
    """Kill and restart the server, then stop it for 10 s."""
    time.sleep(1)
    server.kill()
    time.sleep(1)
    server.start()
    time.sleep(2)
    server.pause()
    time.sleep(10)
    server.resume()


def _cancels(folder: str) -> list[float]:
    """Return after how many intervals each of some cancels was sent, while 16 reads waited."""
    waits: list[float] = []

    def cancel(url: str, key: str) -> None:
        with CloreClient(key, base_url=url, rate_limit=LIMIT, state_dir=folder) as client:
            for _ in range(8):
                time.sleep(0.7 * LIMIT)
                called = time.monotonic()
                with departures() as left, contextlib.suppress(CloreAPIError):
                    client._request("POST", "/v1/cancel_order", json={"id": 1})
                waits.append((left[0] - called) / LIMIT)

    with contextlib.ExitStack() as stack:
        simulator = stack.enter_context(child("arrivals", str(API_LIMIT)))
        url, key = simulator.read()
        settings = json.dumps({"rate_limit": LIMIT, "state_dir": folder})
        arguments = (url, key, "4", "10", settings)
        callers = [stack.enter_context(child("caller", *arguments)) for _ in range(4)]
        for caller in callers:
            caller.read()
        for caller in callers:
            caller.finish()
        time.sleep(4 * LIMIT)
        cancel(url, key)
        for caller in callers:
            caller.read()
    return waits


def _cost(folder: str) -> float:
    """Return the microseconds that the file adds to the median call."""
    with child("arrivals", "0") as simulator:
        url, key = simulator.read()
        options: dict[str, Any] = {"base_url": url, "rate_limit": 0}
        with (
            CloreClient(key, state_dir=folder, **options) as shared,
            CloreClient(key, state_dir=None, **options) as alone,
        ):
            times: dict[CloreClient, list[float]] = {shared: [], alone: []}
            for _ in range(1000):
                for client, taken in times.items():
                    started = time.perf_counter()
                    client.get_wallets()
                    taken.append(time.perf_counter() - started)
    with_file, without = (statistics.median(taken) for taken in times.values())
    return 1e6 * (with_file - without)


@contextlib.contextmanager
def departures() -> Iterator[list[float]]:
    """Yield the times at which a request is written to its socket."""
    moments: list[float] = []
    send = http.client.HTTPConnection.send

    def noted(self: http.client.HTTPConnection, data: Any) -> None:
        moments.append(time.monotonic())
        send(self, data)

    http.client.HTTPConnection.send = noted  # type: ignore[method-assign]
    try:
        yield moments
    finally:
        http.client.HTTPConnection.send = send  # type: ignore[method-assign]
