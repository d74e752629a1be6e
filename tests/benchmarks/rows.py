"""Define a line of the table, and compare two sides."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Clock = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One measurement and its limit."""

    what: str
    value: float
    limit: float
    at_least: bool = False
    detail: str = ""

    @property
    def kept(self) -> bool:
        """Return whether the value is within the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        mark = "ok" if self.kept else "MISSED"
        return f"{self.what:<58} {self.value:9.3f} {sign} {self.limit:<7g} {mark:<7} {self.detail}"


def timed(call: Callable[[], Any], clock: Clock) -> float:
    """Return the seconds that ``call`` takes, with the time to free its result.

    One side returns all objects; the other has freed most of them before it returns.
    """
    start = clock()
    call()
    return clock() - start


def compare(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    clock: Clock,
    rounds: int,
    calls: int,
) -> tuple[float, str]:
    """Return the median over rounds of ours / peer's, and both medians in milliseconds.

    In each round both run in turns, so that other load on this machine affects both.
    """
    ratios, times = [], []
    for call in (ours, peer):  # the first connection is not measured
        call()
    for _ in range(rounds):
        gc.collect()
        pairs = []
        for i in range(calls):
            if i % 2:
                first, second = timed(peer, clock), timed(ours, clock)
                pairs.append((second, first))
            else:
                pairs.append((timed(ours, clock), timed(peer, clock)))
        mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios.append(mine / other)
        times.append((mine, other))
    mine, other = (statistics.median(side) * 1000 for side in zip(*times, strict=True))
    spread = f"rounds {min(ratios):.2f} to {max(ratios):.2f}"
    return statistics.median(ratios), f"{mine:.2f} against {other:.2f} ms; {spread}"
