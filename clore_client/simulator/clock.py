"""The simulator's clocks: one for durations, one that its answers show."""

from __future__ import annotations

from email.utils import formatdate

# Bound here, so that a test that patches the time module moves only its own side.
from time import monotonic, time


class Clock:
    """Wall-clock time that follows the monotonic clock, `offset` seconds off this machine's."""

    def __init__(self, offset: float) -> None:
        self._ahead = 0.0
        self._base = time() + offset - monotonic()

    def advance(self, seconds: float) -> None:
        """Let time pass at once."""
        self._ahead += seconds

    def now(self) -> float:
        """Monotonic seconds."""
        return monotonic() + self._ahead

    def wall(self, now: float) -> float:
        """The server's Unix time at the monotonic moment `now`."""
        return self._base + now

    def date(self) -> str:
        """The `Date` header of this moment."""
        return formatdate(self.wall(self.now()), usegmt=True)
