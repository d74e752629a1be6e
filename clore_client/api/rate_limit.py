"""Keep requests apart: one rate limit for each key and base URL in the process."""

from __future__ import annotations

import itertools
import math
import threading
import time

from clore_client.config import PerAccount

# All in seconds.
LONGEST_PUSH_BACK = 60.0  # a longer pause raises an error instead of sleeping
LONGEST_MEMORY = 3600.0  # a broken proxy may ask for a pause of any length
CONNECT_PATIENCE = 10.0  # other requests wait no longer than this for one that connects
LOOK_AGAIN = 0.05  # a waiting request checks again, even if no other thread wakes it


class PushedBackError(Exception):
    """The server asked for a pause that is too long to sleep.

    Attributes:
        seconds: the rest of the pause.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class DeadlinePassedError(Exception):
    """The request can't be sent before its deadline."""


class Turn:
    """The place of one request in the queue. Use ``with turn.held:`` around waiting and sending.

    An interrupt can end that block at any line and unlocks ``held``. Other requests skip a turn
    that is not locked, so it needs no cleanup.

    Attributes:
        held: locked while the request waits or is sent.
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
        self.rank = rank  # urgent requests first, then in order of arrival
        self.interval = interval
        self.not_before = not_before
        self.spacing = spacing  # an endpoint with a longer interval, and its seconds
        self.urgent = urgent
        self.wake = threading.Lock()  # released to wake it
        self.wake.acquire()
        self.granted_at: float | None = None
        self.left_at: float | None = None


class RateLimit:
    """A queue of requests. Two requests are apart by the larger of their intervals.

    The interval starts when a request is really sent, so that a slow connect can't bring two
    requests too close together. The next request waits until then, but at most
    ``CONNECT_PATIENCE``, because it may be a cancel, which costs money while it waits.

    It uses only plain locks. An interrupt at the wrong moment can leave a ``threading.Condition``
    locked forever, and ``SimpleQueue.get(timeout=...)`` can wait forever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # never held while waiting
        self._arrivals = itertools.count()
        self._waiting: list[Turn] = []
        self._granted: Turn | None = None  # may be sent, but is perhaps still connecting
        self._last = (-math.inf, 0.0)  # when the last request was sent, and its interval
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
        """Make a turn, which the caller locks and passes to :meth:`wait`.

        Parameters:
            interval: seconds from the request before, and to the one after.
            urgent: whether it goes first, and ignores the pause that the server asks for.
            not_before: the earliest monotonic time, for a backoff.
            spacing: a name, and the seconds from the last request of that name.
        """
        rank = (0 if urgent else 1, next(self._arrivals))
        return Turn(rank, interval, not_before, spacing, urgent)

    def wait(self, turn: Turn, deadline: float = math.inf) -> None:
        """Wait until the request may be sent.

        Raises:
            PushedBackError: the server asked for a pause that is too long to sleep.
            DeadlinePassedError: it can't be sent before ``deadline`` (monotonic time).
        """
        with self._lock:
            self._waiting.append(turn)
        while True:
            with self._lock:
                seconds = self._look(turn, deadline)
            if not seconds:
                return
            turn.wake.acquire(timeout=seconds)

    def left(self, turn: Turn) -> None:
        """Record that the request was sent, or has failed."""
        if turn.granted_at is None or turn.left_at is not None:
            return
        turn.left_at = time.monotonic()
        with self._lock:
            self._settle(turn, turn.left_at)
            self._wake()

    def push_back(self, seconds: float) -> None:
        """Send no request for ``seconds``, as the server asked, except urgent ones."""
        to = time.monotonic() + min(seconds, LONGEST_MEMORY)
        with self._lock:
            self._pushed_to = max(self._pushed_to, to)
            self._wake()

    def _look(self, turn: Turn, deadline: float) -> float:
        """Let the request be sent and return 0, or return the seconds until the next check."""
        now = time.monotonic()
        self._drop_interrupted(now)
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

    def _drop_interrupted(self, now: float) -> None:
        self._waiting = [t for t in self._waiting if t.held.locked() and t.granted_at is None]
        if self._granted is not None and not self._granted.held.locked():
            # It was interrupted, so it may have been sent just now.
            self._settle(self._granted, self._granted.left_at or now)

    def _settle(self, turn: Turn, left_at: float) -> None:
        self._last = max(self._last, (left_at, turn.interval))
        if turn.spacing is not None:
            self._last_of[turn.spacing[0]] = (left_at, turn.spacing[1])
        if self._granted is turn:
            self._granted = None

    def _wake(self) -> None:
        for turn in self._waiting:
            if turn.wake.locked():  # under the lock of this queue, so no other thread releases it
                turn.wake.release()

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
    """Return the rate limit for this key and API, which all threads and clients share."""
    return _rate_limits.of(base_url, api_key)
