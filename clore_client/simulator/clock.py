"""Provide two clocks: a monotonic one, and the server's wall clock."""

from __future__ import annotations

from email.utils import formatdate

# Imported by name, so that a test that patches the time module does not move this clock.
from time import monotonic, time


class Clock:
    """Derive the server's wall clock from the monotonic clock, `offset` seconds ahead."""

    def __init__(self, offset: float) -> None:
        self._ahead = 0.0
        self._base = time() + offset - monotonic()

    def advance(self, seconds: float) -> None:
        """Jump ahead."""
        self._ahead += seconds

    def now(self) -> float:
        """Return monotonic seconds, including all jumps."""
        return monotonic() + self._ahead

    def wall(self, now: float) -> float:
        """Return the server's Unix time at monotonic time `now`."""
        return self._base + now

    def date(self) -> str:
        """Return the current time as a `Date` header."""
        return formatdate(self.wall(self.now()), usegmt=True)
