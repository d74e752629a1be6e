"""When the next request may leave: one pace for each key and base URL in the process."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clore_client.shared import PerAccount

# A server that asks for more patience than this gets an error to the user, not a sleep.
LONGEST_PUSH_BACK = 60.0
# However long a pause a broken proxy may ask for, it is not remembered for longer than this.
LONGEST_MEMORY = 3600.0
# Seconds that a request may take from its slot to its first byte before others stop waiting.
CONNECT_PATIENCE = 10.0


class PushedBackError(Exception):
    """The next slot is further away than anybody should sleep; carries the seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class DeadlinePassedError(Exception):
    """There is no slot before the caller's deadline."""


class _Waiter:
    def __init__(
        self,
        rank: tuple[int, int],
        interval: float,
        not_before: float,
        spacing: tuple[str, float] | None,
    ) -> None:
        self.rank = rank  # urgent ones first, then in order of arrival
        self.interval = interval
        self.not_before = not_before
        self.spacing = spacing  # an endpoint with a limit of its own
        self.granted_at: float | None = None


class Pacer:
    """Hands out slots in order. Between two departures lies the larger of their intervals.

    The next slot counts from a departure and not from a plan: a slow connect must not bring two
    requests closer together. Until a request has left, nobody gets the slot after it - but for
    one that takes longer than ``CONNECT_PATIENCE`` to leave: a waiting cancel costs money.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._arrivals = itertools.count()
        self._waiting: list[_Waiter] = []
        self._connecting: _Waiter | None = None
        self._last = -math.inf
        self._last_interval = 0.0
        self._pushed_to = -math.inf
        self._last_of: dict[str, tuple[float, float]] = {}

    @contextmanager
    def slot(
        self,
        interval: float,
        *,
        urgent: bool = False,
        not_before: float = -math.inf,
        spacing: tuple[str, float] | None = None,
        deadline: float = math.inf,
    ) -> Iterator[Callable[[], None]]:
        """Wait for a slot; the block sends the request, and calls what it got as it leaves.

        Parameters:
            interval: seconds to keep from the request before and the one after.
            urgent: before all waiting ones that are not.
            not_before: monotonic time, for a caller that backs off.
            spacing: a name, and the seconds to keep from the last request of that name.
            deadline: monotonic time up to which a slot is of use.

        Raises:
            PushedBackError: the server asked for a longer pause than anybody should sleep.
            DeadlinePassedError: no slot is free before ``deadline``.
        """
        rank = (0 if urgent else 1, next(self._arrivals))
        waiter = _Waiter(rank, interval, not_before, spacing)
        try:
            self._wait(waiter, deadline)
            yield lambda: self._departed(waiter)
        finally:
            # A request that failed to leave has had its slot all the same.
            self._departed(waiter)

    def push_back(self, seconds: float) -> None:
        """Let nobody's request leave for ``seconds``: the server has said so."""
        with self._changed:
            to = time.monotonic() + min(seconds, LONGEST_MEMORY)
            self._pushed_to = max(self._pushed_to, to)
            self._changed.notify_all()

    def _wait(self, waiter: _Waiter, deadline: float) -> None:
        with self._changed:
            self._waiting.append(waiter)
            try:
                while True:
                    now = time.monotonic()
                    if self._pushed_to - now > LONGEST_PUSH_BACK:
                        raise PushedBackError(self._pushed_to - now)
                    at = self._ready_at(waiter)
                    if max(at, now) > deadline:
                        raise DeadlinePassedError
                    at = max(at, self._free_at())
                    if at <= now and self._is_first(waiter, now):
                        waiter.granted_at, self._connecting = now, waiter
                        return
                    # Ready but not first: who is first wakes us by leaving. Condition.wait lets
                    # go of the lock for as long as it sleeps.
                    until = min(at if at > now else now + CONNECT_PATIENCE, deadline + 0.001)
                    self._changed.wait(until - now)
            finally:
                self._waiting.remove(waiter)
                self._changed.notify_all()

    def _ready_at(self, waiter: _Waiter) -> float:
        at = self._last + max(self._last_interval, waiter.interval)
        if waiter.spacing is not None:
            name, seconds = waiter.spacing
            last, its_seconds = self._last_of.get(name, (-math.inf, 0.0))
            at = max(at, last + max(seconds, its_seconds))
        return max(at, self._pushed_to, waiter.not_before)

    def _free_at(self) -> float:
        # When to stop waiting for a request that has its slot and has not left.
        ahead = self._connecting
        return -math.inf if ahead is None else (ahead.granted_at or 0.0) + CONNECT_PATIENCE

    def _is_first(self, waiter: _Waiter, now: float) -> bool:
        return all(w.rank >= waiter.rank for w in self._waiting if self._ready_at(w) <= now)

    def _departed(self, waiter: _Waiter) -> None:
        with self._changed:
            if waiter.granted_at is None:
                return
            waiter.granted_at = None
            self._last, self._last_interval = time.monotonic(), waiter.interval
            if waiter.spacing is not None:
                self._last_of[waiter.spacing[0]] = (self._last, waiter.spacing[1])
            if self._connecting is waiter:
                self._connecting = None
            self._changed.notify_all()


_pacers = PerAccount(Pacer)


def pacer_for(base_url: str, api_key: str) -> Pacer:
    """The pacer that all requests of this process with this key to this API share."""
    return _pacers.of(base_url, api_key)
