"""Decide when the next request with a key may be sent."""

from __future__ import annotations

import collections
import math
import os
import random
import threading
import time
from typing import Any, Protocol

LONGEST_SLEEP = 0.5  # seconds after which a waiting request polls the schedule again
RECENT = 20  # how many of the last responses are counted for the error message
YIELD_CHANCE = 0.3  # the fraction of requests that leave the surplus after them
# Fractions of the interval, unless a comment gives another unit. The Redis script uses them too.
PACE = {
    "lead": 0.05,  # how long before its send time a request gets it: a slow store costs no time
    "late": 0.005,  # a request that is sent up to this much late needs no report
    "grace": 0.125,  # how long a request waits for each one ahead of it in the queue
    "longest_grace": 1.0,
    # A refusal means that other programs use the key too. Some requests then leave a longer gap
    # after them, so that the programs take turns of several requests, which wastes less time than
    # a change after every request.
    "jitter": 0.3,  # a retry comes up to this much later than the interval
    "slow_down": 0.2,  # each refusal adds this to the gap after a request
    "widest": 4.0,
    "speed_up": 0.1,  # a call without a refusal reduces that gap by this fraction
    "longest_pause": 3600.0,  # seconds; a broken proxy may ask for a pause of any length
}


class NotSentError(Exception):
    """The request can't be sent in time.

    Attributes:
        pause: seconds that are left of a pause that the API asked for, if it is longer than the
            caller's patience; None if the deadline is too early.
    """

    def __init__(self, pause: float | None) -> None:
        super().__init__(pause)
        self.pause = pause


class Turn:
    """Hold the place of one call in the queue, also for its retries.

    All times are monotonic, in seconds.

    Attributes:
        interval: seconds to the previous request, and to the next one.
        urgent: whether it is sent before others, and ignores the pause that the API asks for.
        spacing: an endpoint with a longer interval, and that interval in seconds.
        patience: the longest pause that it waits for, in seconds.
        deadline, not_before: when it must, and when it may be sent.
        sent_at: when it was sent, or else its send time.
        grant_ends: when its send time expires; another request may get the next send time then.
        refusals: how many times the API refused it because of the rate limit.
        retry_after: seconds that the last refusal asked it to wait.
        slowed: whether earlier refusals still widen the gaps between requests.
    """

    def __init__(
        self,
        interval: float,
        *,
        urgent: bool = False,
        spacing: tuple[str, float] | None = None,
        patience: float = math.inf,
    ) -> None:
        self.id = os.urandom(8).hex()
        self.arrived = time.monotonic()
        self.interval = interval
        self.urgent = urgent
        self.spacing = spacing
        self.patience = patience
        self.deadline = math.inf
        self.not_before = -math.inf
        self.sent_at = self.grant_ends = -math.inf
        self.refusals = 0
        self.retry_after = 0.0
        self.slowed = False

    @property
    def rank(self) -> int:
        """0 for urgent requests, which are sent first, else 1."""
        return 0 if self.urgent else 1


def entry_lifetime(turn: Turn) -> float:
    """Return the seconds after which a request that has stopped polling counts as dead."""
    return 2 * (LONGEST_SLEEP + turn.interval)


def random_gap() -> float:
    """Return the fraction of the surplus that a request leaves after it: 0.0 or 1.0."""
    return 1.0 if random.random() < YIELD_CHANCE else 0.0


# Not a named tuple: creating one makes the import slower.
class PollResult:
    """The result when a waiting request polls the schedule.

    Attributes:
        granted: whether it got a send time.
        at: its send time if it got one, else the time of its next poll (monotonic).
        paused: seconds that are left of the pause that the API asked for.
        slowed: whether refusals widen the gaps between requests.
        too_late: whether it can't be sent before its deadline.
    """

    def __init__(
        self, granted: bool, at: float, paused: float, slowed: bool = False, too_late: bool = False
    ) -> None:
        self.granted, self.at, self.paused = granted, at, paused
        self.slowed, self.too_late = slowed, too_late


class Schedule:
    """Keep the state of one rate limit: the queue, and when the last requests were sent.

    Each method is one step on plain numbers, which can be kept in memory, in a file, or in Redis
    (``redis_limit.py`` has the same steps in Lua).

    The first request in the queue polls when the next request may be sent, the second one a little
    later, and so on. The first of them that polls gets the send time. So a dead process delays the
    others by one interval at most, and each request polls about once per interval.
    """

    def __init__(self) -> None:
        self.last = 0.0  # when the last request was sent, or may be sent
        self.interval = 0.0  # seconds to keep after it
        self.surplus = 0.0  # seconds by which refusals widen the gap after some requests
        self.gap = 0.0  # seconds by which they widen it after the last request
        self.paused_until = 0.0
        self.spaced: dict[str, list[float]] = {}  # name -> [when the last was sent, seconds]
        # id of a turn -> [rank, arrival, when it may be sent at the earliest, when it expires]
        self.waiting: dict[str, list[float]] = {}

    def poll(self, turn: Turn, now: float) -> PollResult:
        """Grant a send time, or return when to poll again."""
        self._correct(now)
        own = turn.not_before
        if turn.spacing is not None:
            name, seconds = turn.spacing
            last, its_seconds = self.spaced.get(name, (-math.inf, 0.0))
            own = max(own, last + max(seconds, its_seconds))
        if not turn.urgent:
            own = max(own, self.paused_until)
        ready = max(own, self.last + max(self.interval, turn.interval) + turn.rank * self.gap)
        paused = 0.0 if turn.urgent else self.paused_until - now
        if self.waiting:
            self.waiting = {i: entry for i, entry in self.waiting.items() if entry[3] > now}
            self.waiting.pop(turn.id, None)
        if paused > turn.patience or max(ready, now) > turn.deadline:
            return PollResult(False, now, paused, too_late=True)
        mine = [turn.rank, turn.arrived]
        ahead = [i for i, entry in self.waiting.items() if entry[:2] < mine and entry[2] <= ready]
        grace = min(PACE["grace"] * len(ahead), PACE["longest_grace"]) * turn.interval
        at = ready - PACE["lead"] * turn.interval + grace
        if at > now:
            self.waiting[turn.id] = [*mine, own, now + entry_lifetime(turn)]
            return PollResult(False, at, paused, self.surplus > 0)
        for late in ahead:  # a dead request, or a slow one, which will poll again
            del self.waiting[late]
        send_time = max(ready, now)
        self._record(turn, send_time + PACE["late"] * turn.interval)
        self.gap = self.surplus * random_gap()
        return PollResult(True, send_time, paused, self.surplus > 0)

    def sent(self, turn: Turn, now: float) -> None:
        """Record that a request is sent later than its send time."""
        self._record(turn, max(self.last, min(turn.sent_at, now)))

    def refused(self, turn: Turn, now: float) -> None:
        """Slow down after the API refused a request for its rate limit."""
        wider = self.surplus + PACE["slow_down"] * turn.interval
        self.surplus = min(wider, PACE["widest"] * turn.interval)
        self.gap = PACE["jitter"] * turn.interval * random.random()
        if turn.retry_after:
            until = now + min(turn.retry_after + self.gap, PACE["longest_pause"])
            self.paused_until = max(self.paused_until, until)

    def accepted(self, turn: Turn, now: float) -> None:
        """Speed up after a call that was not refused."""
        self.surplus *= 1 - PACE["speed_up"]
        if self.surplus < 0.01 * turn.interval:
            self.surplus = 0.0

    def _correct(self, now: float) -> None:
        """Correct times that are far in the future because the clock was set back."""
        self.last = min(self.last, now + self.interval)
        self.paused_until = min(self.paused_until, now + PACE["longest_pause"])
        for entry in self.spaced.values():
            entry[0] = min(entry[0], now + entry[1])

    def _record(self, turn: Turn, at: float) -> None:
        self.last, self.interval = at, turn.interval
        if turn.spacing is not None:
            self.spaced[turn.spacing[0]] = [at, turn.spacing[1]]


class StoreUnavailableError(Exception):
    """A schedule could not be read or written."""


class Store(Protocol):
    """Keep a schedule."""

    @property
    def level(self) -> str:
        """Describe who shares the schedule, for ``client.describe()``."""

    def apply(self, step: str, turn: Turn) -> Any:
        """Run one step of :class:`Schedule`, given by its name, and return its result.

        Raises:
            StoreUnavailableError: that is not possible now.
        """


class ProcessStore:
    """Keep a schedule in memory, for the threads of this process."""

    level = "within this process"

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for one step, never while waiting
        self._schedule = Schedule()

    def apply(self, step: str, turn: Turn) -> Any:
        """Run one step of the schedule."""
        with self._lock:
            return getattr(self._schedule, step)(turn, time.monotonic())


def _sleep(seconds: float) -> None:
    """Sleep, unless there is no time left: even ``sleep(0)`` lets other processes run first."""
    if seconds > 0:
        time.sleep(seconds)


class RateLimiter:
    """Apply the rate limit of one key.

    An interrupt may end any method at any line. It leaves one entry in the queue, which others
    skip.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._refusals: collections.deque[bool] = collections.deque(maxlen=RECENT)

    @property
    def level(self) -> str:
        """Describe who shares the rate limit."""
        return self._store.level

    @property
    def recently_refused(self) -> tuple[int, int]:
        """(refused, total): how many of the last requests hit the API's rate limit."""
        return sum(self._refusals), len(self._refusals)

    def wait(self, turn: Turn, deadline: float = math.inf) -> None:
        """Wait until the request may be sent.

        Raises:
            NotSentError: the API asked for a pause that is longer than the turn's patience, or the
                request can't be sent before ``deadline`` (monotonic time).
        """
        turn.deadline = deadline
        while True:
            result: PollResult = self._store.apply("poll", turn)
            turn.slowed = result.slowed
            if result.too_late:
                raise NotSentError(result.paused if result.paused > turn.patience else None)
            now = time.monotonic()
            if result.granted:
                turn.sent_at = result.at
                turn.grant_ends = result.at + (1 - PACE["lead"]) * turn.interval
                _sleep(result.at - now)
                return
            _sleep(min(result.at - now, LONGEST_SLEEP, deadline - now))

    def before_send(self, turn: Turn, deadline: float = math.inf) -> None:
        """Record that the request is about to be sent. Wait again if its send time is void."""
        if turn.interval and time.monotonic() > turn.grant_ends:
            self.wait(turn, deadline)
        self.sent(turn)

    def sent(self, turn: Turn) -> None:
        """Record that the request was sent."""
        now = time.monotonic()
        if turn.interval and now > turn.sent_at + PACE["late"] * turn.interval:
            turn.sent_at = now
            self._store.apply("sent", turn)

    def refused(self, turn: Turn, retry_after: float | None) -> None:
        """Slow down after the API refused the request for its rate limit."""
        self._refusals.append(True)
        turn.refusals += 1
        turn.retry_after = retry_after or 0.0
        self._store.apply("refused", turn)

    def accepted(self, turn: Turn) -> None:
        """Speed up again, step by step."""
        self._refusals.append(False)
        if turn.slowed and not turn.refusals:
            self._store.apply("accepted", turn)
