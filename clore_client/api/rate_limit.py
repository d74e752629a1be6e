"""When the next request may leave: one rate limit for each key and base URL in the process."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time

from clore_client.config import PerAccount

# A server that asks for more patience than this gets an error to the user, not a sleep.
LONGEST_PUSH_BACK = 60.0
# However long a pause a broken proxy may ask for, it is not remembered for longer than this.
LONGEST_MEMORY = 3600.0
# Seconds that a request may take from its slot to its first byte before others stop waiting.
CONNECT_PATIENCE = 10.0
# Seconds after which a waiting request looks again, should nobody have woken it.
LOOK_AGAIN = 0.05


class PushedBackError(Exception):
    """The next slot is further away than anybody should sleep; carries the seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class DeadlinePassedError(Exception):
    """There is no slot before the caller's deadline."""


class Turn:
    """One request's place in the line: ``with turn.held:`` around waiting and sending.

    An interrupt can end that block at any line. The interpreter unlocks ``held`` then, and whoever
    looks next skips a turn that nobody holds: nothing has to be cleaned up.

    Attributes:
        held: locked for as long as the request waits or is sent.
    """

    def __init__(
        self,
        rank: tuple[int, int],
        interval: float,
        not_before: float,
        spacing: tuple[str, float] | None,
        urgent: bool,
    ) -> None:
        self.held = threading.Lock()
        self.rank = rank  # urgent ones first, then in order of arrival
        self.interval = interval
        self.not_before = not_before
        self.spacing = spacing  # an endpoint with a limit of its own
        self.urgent = urgent
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.granted_at: float | None = None
        self.left_at: float | None = None


class RateLimit:
    """Hands out slots in order. Between two requests lies the larger of their intervals.

    The next slot counts from when a request left and not from a plan: a slow connect must not
    bring two requests closer together. Until a request has left, nobody gets the slot after it,
    but for one that takes longer than ``CONNECT_PATIENCE`` to leave: a waiting cancel costs money.

    Only plain locks and queues are used here, as ``threading.Condition`` stays locked for ever
    where an interrupt comes between its lock and its ``with`` block.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for a look, never while waiting
        self._arrivals = itertools.count()
        self._waiting: list[Turn] = []
        self._granted: Turn | None = None  # has its slot, and may not have left
        self._last = (-math.inf, 0.0)  # when the last request left, and its interval
        self._last_of: dict[str, tuple[float, float]] = {}  # the same for each spacing
        self._pushed_to = -math.inf

    def turn(
        self,
        interval: float,
        *,
        urgent: bool = False,
        not_before: float = -math.inf,
        spacing: tuple[str, float] | None = None,
    ) -> Turn:
        """Make a turn, to be held and then passed to :meth:`wait`.

        Parameters:
            interval: seconds to keep from the request before and the one after.
            urgent: before all waiting ones that are not, and whatever pause the server asked for.
            not_before: monotonic time, for a caller that backs off.
            spacing: a name, and the seconds to keep from the last request of that name.
        """
        rank = (0 if urgent else 1, next(self._arrivals))
        return Turn(rank, interval, not_before, spacing, urgent)

    def wait(self, turn: Turn, deadline: float = math.inf) -> None:
        """Wait until the request may leave.

        Raises:
            PushedBackError: the server asked for a longer pause than anybody should sleep.
            DeadlinePassedError: no slot is free before ``deadline`` (monotonic time).
        """
        with self._lock:
            self._waiting.append(turn)
        while True:
            with self._lock:
                seconds = self._look(turn, deadline)
            if not seconds:
                return
            try:
                turn.wake.get(timeout=seconds)
            except queue.Empty:
                continue

    def left(self, turn: Turn) -> None:
        """Note that the request has left, or failed to: then it has had its slot all the same."""
        if turn.granted_at is None or turn.left_at is not None:
            return
        turn.left_at = time.monotonic()
        with self._lock:
            self._settle(turn, turn.left_at)
            self._wake()

    def push_back(self, seconds: float) -> None:
        """Let nobody's request leave for ``seconds``, as the server said; cancels still do."""
        to = time.monotonic() + min(seconds, LONGEST_MEMORY)
        with self._lock:
            self._pushed_to = max(self._pushed_to, to)
            self._wake()

    def _look(self, turn: Turn, deadline: float) -> float:
        """Grant the slot and return 0, or return the seconds until another look."""
        now = time.monotonic()
        self._skip_the_gone(now)
        if not turn.urgent and self._pushed_to - now > LONGEST_PUSH_BACK:
            raise PushedBackError(self._pushed_to - now)
        at = self._ready_at(turn)
        if max(at, now) > deadline:
            raise DeadlinePassedError
        if at > now:
            return at - now
        connecting = self._granted is not None and now < self._patience_ends(self._granted)
        if connecting or not self._is_first(turn, now):
            return LOOK_AGAIN
        turn.granted_at = now
        self._granted = turn
        self._waiting.remove(turn)
        return 0.0

    def _skip_the_gone(self, now: float) -> None:
        self._waiting = [t for t in self._waiting if t.held.locked() and t.granted_at is None]
        if self._granted is not None and not self._granted.held.locked():
            # Interrupted on its way: whether and when it left is not known.
            self._settle(self._granted, self._granted.left_at or now)

    def _settle(self, turn: Turn, left_at: float) -> None:
        self._last = max(self._last, (left_at, turn.interval))
        if turn.spacing is not None:
            self._last_of[turn.spacing[0]] = (left_at, turn.spacing[1])
        if self._granted is turn:
            self._granted = None

    def _wake(self) -> None:
        for turn in self._waiting:
            turn.wake.put(None)

    def _ready_at(self, turn: Turn) -> float:
        last, interval = self._last
        at = max(last + max(interval, turn.interval), turn.not_before)
        if turn.spacing is not None:
            name, seconds = turn.spacing
            last, its_seconds = self._last_of.get(name, (-math.inf, 0.0))
            at = max(at, last + max(seconds, its_seconds))
        return at if turn.urgent else max(at, self._pushed_to)

    @staticmethod
    def _patience_ends(turn: Turn) -> float:
        return (turn.granted_at or 0.0) + CONNECT_PATIENCE

    def _is_first(self, turn: Turn, now: float) -> bool:
        return all(t.rank >= turn.rank for t in self._waiting if self._ready_at(t) <= now)


_rate_limits = PerAccount(RateLimit)


def rate_limit_for(base_url: str, api_key: str) -> RateLimit:
    """Return the rate limit that all requests of this process with this key to this API share."""
    return _rate_limits.of(base_url, api_key)
