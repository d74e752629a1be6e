"""Decide when the next request with a key may leave, for all who share the key."""

from __future__ import annotations

import collections
import math
import random
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

# However long a pause a broken proxy may ask for, it is not remembered for longer than this.
LONGEST_PAUSE_KEPT = 3600.0
LONGEST_POLL = 0.25  # seconds between two looks of a request that waits
SHORTEST_ENTRY = 0.1  # seconds for which a request counts as waiting after its last look
# After a refusal a request is sent again after a random part of its interval between these two.
# A longer pause would leave the way to whoever refuses to slow down, and starve this one.
RETRY_SOONEST, RETRY_LATEST = 0.2, 0.6
LEAVING = 0.01  # the part of its interval that a request may take to leave
LEARNING = 0.3  # how much the last request counts for the extra space between two requests
YIELD = 0.8  # how much of the extra space is left to the other programs at most
OUTCOMES = 20  # how many of the last answers are counted for the error message

Stepped = TypeVar("Stepped")


class PauseTooLongError(Exception):
    """The API asked for a longer pause than the caller has patience; carries the seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class DeadlinePassedError(Exception):
    """There is no slot before the caller's deadline."""


class Turn:
    """One request that waits for its slot, and keeps its place when it is sent again.

    Attributes:
        ticket: its place in the queue; None until it first waits.
        granted_at: monotonic time of its slot; None while it waits.
    """

    def __init__(
        self,
        interval: float,
        *,
        urgent: bool = False,
        spacing: tuple[str, float] | None = None,
        patience: float = math.inf,
    ) -> None:
        self.interval = interval  # seconds to keep from the request before and the one after
        self.urgent = urgent  # before all that are not, and whatever pause the API asked for
        self.spacing = spacing  # a name, and the seconds to keep from the last of that name
        self.patience = patience  # seconds of a pause that it may wait
        self.not_before = -math.inf
        self.ticket: int | None = None
        self.granted_at: float | None = None
        self.first_sent_at: float | None = None
        self.paused = -math.inf  # seconds of the API's pause that were left at the last look

    @property
    def holds_slot(self) -> bool:
        """Whether its slot has not passed."""
        return self.granted_at is not None and (
            time.monotonic() < self.granted_at + self.interval or not self.interval
        )

    @property
    def poll(self) -> float:
        """Seconds between two looks: several in each interval."""
        return min(LONGEST_POLL, max(0.001, self.interval / 4))


class Schedule:
    """The state of one rate limit: who waits, and when the last requests left.

    Every change is one step on plain numbers, so that it can be kept in memory or in a file. A
    request that waits renews its entry in ``waiting``; one that was interrupted or killed does not,
    and is skipped when its entry expires.
    """

    def __init__(self) -> None:
        self.last = -math.inf  # when the last request left, or got its slot
        self.interval = 0.0  # seconds that it keeps after itself
        self.extra = 0.0  # mean of what other programs take: seconds on top of the interval
        self.gap = 0.0  # the part of that which is kept after the last request
        self.paused_until = -math.inf
        self.spaced: dict[str, tuple[float, float]] = {}  # name -> (when the last left, seconds)
        self.next_ticket = 0
        # Ticket -> [0 if urgent else 1, when it is ready, its interval, when the entry expires].
        self.waiting: dict[int, list[float]] = {}

    def look(self, turn: Turn, now: float) -> float:
        """Grant the slot and return 0, or return the seconds until another look."""
        self.waiting = {t: entry for t, entry in self.waiting.items() if entry[3] > now}
        if turn.ticket is None:
            turn.ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        own = self._own_ready(turn)
        ready = self._ready(own, turn.interval)
        mine = (0 if turn.urgent else 1, turn.ticket)
        first = all(
            (entry[0], ticket) >= mine or self._ready(entry[1], entry[2]) > now
            for ticket, entry in self.waiting.items()
        )
        if ready <= now and first:
            self.waiting.pop(turn.ticket, None)
            # A little ahead: who leaves until then need not say so.
            self._left(turn, now + LEAVING * turn.interval)
            turn.granted_at = now
            return 0.0
        expires = now + max(SHORTEST_ENTRY, 4 * turn.poll)
        self.waiting[turn.ticket] = [mine[0], own, turn.interval, expires]
        return min(turn.poll, ready - now) if ready > now else turn.poll / 4

    def ready_at(self, turn: Turn) -> float:
        """Return when a turn may leave, should nobody be before it."""
        return self._ready(self._own_ready(turn), turn.interval)

    def leave(self, turn: Turn, left_at: float) -> None:
        """Note when the request really left: its space counts from then."""
        self._left(turn, max(left_at, self.last))

    def pause(self, until: float) -> None:
        """Let no request leave until then, but for urgent ones."""
        self.paused_until = max(self.paused_until, until)

    def learn(self, refused_for: float) -> None:
        """Adapt the space between requests to what other programs with the same key take.

        Parameters:
            refused_for: seconds from the first refusal of a request until it was accepted.
        """
        self.extra = (1 - LEARNING) * self.extra + LEARNING * (self.gap + refused_for)
        if self.extra < 0.01 * self.interval:
            self.extra = 0.0

    def _own_ready(self, turn: Turn) -> float:
        ready = turn.not_before
        if turn.spacing is not None:
            name, seconds = turn.spacing
            last, its_seconds = self.spaced.get(name, (-math.inf, 0.0))
            ready = max(ready, last + max(seconds, its_seconds))
        return ready if turn.urgent else max(ready, self.paused_until)

    def _ready(self, own: float, interval: float) -> float:
        return max(own, self.last + max(self.interval, interval) + self.gap)

    def _left(self, turn: Turn, at: float) -> None:
        self.last, self.interval = at, turn.interval
        self.gap = random.uniform(0.0, YIELD * self.extra) if self.extra else 0.0
        if turn.spacing is not None:
            self.spaced[turn.spacing[0]] = (at, turn.spacing[1])


class RateLimiter(Protocol):
    """What a client needs of a rate limiter, in memory, in a file or on another machine."""

    level: str  # as describe() tells it

    def wait(self, turn: Turn, deadline: float = math.inf) -> None: ...

    def leave(self, turn: Turn) -> None: ...

    def refused(self, turn: Turn, retry_after: float | None) -> None: ...

    def accepted(self, turn: Turn) -> None: ...


class ProcessStore:
    """Keeps a schedule in memory, for the threads of this process."""

    level = "this process"

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for a step, never while waiting
        self._schedule = Schedule()

    def update(self, step: Callable[[Schedule], Stepped]) -> Stepped:
        """Make one step."""
        with self._lock:
            return step(self._schedule)


class Store(Protocol):
    """Where a schedule is kept."""

    @property
    def level(self) -> str: ...

    def update(self, step: Callable[[Schedule], Stepped]) -> Stepped: ...


class ScheduledRateLimiter:
    """A rate limiter whose schedule is kept in memory or in a file.

    Interrupts can end a wait at any line: what is left behind is an entry that expires.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._outcomes: collections.deque[bool] = collections.deque(maxlen=OUTCOMES)
        self._adapted = False  # whether the schedule keeps extra space

    @property
    def level(self) -> str:
        """Who keeps the limit together."""
        return self._store.level

    @property
    def recently_refused(self) -> tuple[int, int]:
        """How many of the last requests were refused for their pace, and of how many."""
        return sum(self._outcomes), len(self._outcomes)

    def wait(self, turn: Turn, deadline: float = math.inf) -> None:
        """Wait until a request may leave.

        Raises:
            PauseTooLongError: the API asked for a longer pause than the turn has patience.
            DeadlinePassedError: no slot is free before ``deadline`` (monotonic time).
        """
        turn.granted_at = None
        while seconds := self._store.update(lambda schedule: _look_once(schedule, turn, deadline)):
            time.sleep(min(seconds, turn.poll))
        if turn.paused > turn.patience and not turn.urgent:
            raise PauseTooLongError(turn.paused)
        if turn.granted_at is None:
            raise DeadlinePassedError

    def leave(self, turn: Turn) -> None:
        """Note that the request leaves, or has failed to: then it has had its slot all the same."""
        left_at = time.monotonic()
        if turn.first_sent_at is None:
            turn.first_sent_at = left_at
        if left_at > (turn.granted_at or 0.0) + LEAVING * turn.interval:
            self._store.update(lambda schedule: schedule.leave(turn, left_at))

    def refused(self, turn: Turn, retry_after: float | None) -> None:
        """Slow down after a refusal for the pace."""
        self._outcomes.append(True)
        self._adapted = True
        pause = turn.interval * random.uniform(RETRY_SOONEST, RETRY_LATEST)
        if retry_after is not None:
            pause += min(retry_after, LONGEST_PAUSE_KEPT)
        until = time.monotonic() + pause
        self._store.update(lambda schedule: schedule.pause(until))

    def accepted(self, turn: Turn) -> None:
        """Speed up again, step by step."""
        was_refused = bool(self._outcomes) and self._outcomes[-1]
        self._outcomes.append(False)
        if self._adapted:
            first = turn.first_sent_at
            refused_for = time.monotonic() - first if was_refused and first is not None else 0.0
            self._adapted = self._store.update(lambda schedule: _learn_from(schedule, refused_for))


def _look_once(schedule: Schedule, turn: Turn, deadline: float) -> float:
    """Look once; return 0 also for a request that can't leave in time, and takes no place then."""
    now = time.monotonic()
    turn.paused = schedule.paused_until - now
    too_long = turn.paused > turn.patience and not turn.urgent
    if too_long or max(now, schedule.ready_at(turn)) > deadline:
        schedule.waiting.pop(turn.ticket if turn.ticket is not None else -1, None)
        return 0.0
    return schedule.look(turn, now)


def _learn_from(schedule: Schedule, refused_for: float) -> bool:
    schedule.learn(refused_for)
    return schedule.extra > 0
