"""Limit the rate of requests per key."""

from __future__ import annotations

import math

from .api import Answer, Call, envelope
from .market import Market
from .settings import Settings


class Limits:
    """Refuse requests that come too fast. A refused request does not start a new interval."""

    def __init__(self, settings: Settings, market: Market) -> None:
        self._settings = settings
        self._market = market
        self._last: dict[tuple[str, str], float] = {}

    def refuse(self, call: Call) -> Answer | None:
        """Return a 429 answer for a request that comes too fast, else None."""
        # An unknown key gets code 3 without a limit; requests without a key share one limit.
        if call.key and call.key not in self._market.accounts:
            return None
        intervals = {"": self._settings.rate_limit}
        if call.endpoint == "create_order":
            intervals["create_order"] = self._settings.create_order_interval
        wait = 0.0
        for name, seconds in intervals.items():
            last = self._last.get((call.key, name), -math.inf)
            wait = max(wait, last + seconds - call.arrived)
        if wait > 0:
            return too_fast(math.ceil(wait) if self._settings.retry_after else None)
        for name in intervals:
            self._last[call.key, name] = call.arrived
        return None


def too_fast(retry_after: float | str | None) -> Answer:
    """Return the answer to a request that comes too fast."""
    answer = envelope({"code": 5}, 429)
    if retry_after is not None:
        answer.headers["Retry-After"] = str(retry_after)
    return answer
