"""Inject faults: choose which requests fail, and how."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

ENDPOINTS = (
    "wallets",
    "marketplace",
    "my_orders",
    "create_order",
    "cancel_order",
    "cancel_orders",
    "set_spot_price",
    "spot_marketplace",
    "renter_fees",
)

# Kinds of faults with their options and defaults. "Processed" means that the market acted.
KINDS: dict[str, dict[str, Any]] = {
    # processed, then the connection is closed without an answer
    "lose_response": {},
    # not processed, the connection is closed
    "lose_request": {},
    # not processed and never answered; the connection is closed after `seconds`
    "hang": {"seconds": math.inf},
    # processed, never answered
    "hang_after_commit": {"seconds": math.inf},
    # the connection is closed at once; processed `seconds` later
    "commit_late": {"seconds": 1.0},
    # processed; half of the answer, then a reset (or a normal close)
    "reset_mid_body": {"reset": True},
    # processed, then HTTP 500 {"code": 1}
    "http_500_after_commit": {},
    # HTTP 500 {"code": 1}, not processed
    "http_500_before_commit": {},
    # {"code": 1} with any HTTP status
    "code_1": {"status": 200, "after_commit": False},
    # an HTML page from the proxy in front of the API
    "html_502": {"status": 502, "after_commit": False},
    # plain text from the proxy, which refuses the User-Agent
    "html_403": {},
    # HTTP 429 {"code": 5} or an HTML page; `retry_after` is seconds or an HTTP date
    "rate_limit": {"retry_after": None, "html": False},
    # processed at once, answered `seconds` later
    "slow": {"seconds": 1.0},
    # processed; half of the JSON, with a Content-Length that fits
    "truncated_json": {},
    # processed; HTTP 200 with text
    "not_json": {"body": "OK"},
    # processed; HTTP 200 with a JSON object without a code
    "no_code": {"body": {"status": "ok"}},
    # a redirect to another host
    "redirect": {"location": "https://elsewhere.invalid/", "status": 302},
    # any status with any body
    "status": {"status": 500, "body": "", "content_type": "text/plain", "after_commit": False},
    # any envelope
    "envelope": {"envelope": {"code": 1}, "status": 200, "after_commit": False},
}

# Kinds that a careful client recovers from by itself.
RECOVERABLE = (
    "lose_response",
    "lose_request",
    "reset_mid_body",
    "http_500_after_commit",
    "http_500_before_commit",
    "html_502",
    "rate_limit",
    "slow",
    "truncated_json",
    "not_json",
)
_CHAOS_OPTIONS = {
    "slow": {"seconds": 0.05},
    "hang": {"seconds": 0.5},
    "commit_late": {"seconds": 0.2},
}


@dataclass
class Fault:
    """Describe a fault that happens `times` times."""

    endpoint: str
    kind: str
    times: float
    key: str | None = field(repr=False)
    options: Mapping[str, Any]

    def applies_to(self, endpoint: str, key: str) -> bool:
        """Return whether the fault applies to a request."""
        return self.endpoint in ("*", endpoint) and self.key in (None, key)


class Faults:
    """Queue faults for later requests, first in, first out. Thread-safe."""

    def __init__(self, chaos: float, seed: int, kinds: Sequence[str] | None) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []
        self.set_chaos(chaos, seed, kinds)

    def add(
        self, endpoint: str, kind: str, times: float = 1, *, key: str | None = None, **options: Any
    ) -> None:
        """Make the next `times` requests to `endpoint` ("*" for any) fail.

        `times=math.inf` lasts until `clear()`; `key` limits the fault to one account. A request
        refused by the rate limit uses up no fault. See `KINDS` for the options of each kind.
        """
        if endpoint != "*" and endpoint not in ENDPOINTS:
            raise ValueError(f"endpoint must be * or one of {', '.join(ENDPOINTS)}: {endpoint!r}")
        known = _options(kind)
        if isinstance(times, bool) or not times >= 1 or (times != math.inf and times % 1):
            raise ValueError(f"times must be a whole number of at least 1: {times!r}")
        for name in options:
            if name not in known:
                allowed = ", ".join(known) or "none"
                raise ValueError(f"{kind} has no option {name!r}; it takes: {allowed}")
        seconds = options.get("seconds", 0.0)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
            raise ValueError(f"seconds must be a number of at least 0: {seconds!r}")
        with self._lock:
            self._waiting.append(Fault(endpoint, kind, times, key, {**known, **options}))

    def add_text(self, text: str) -> None:
        """Add a fault given as `endpoint:kind` or `endpoint:kind:times`."""
        endpoint, _, rest = text.partition(":")
        kind, _, times = rest.partition(":")
        if times and not times.isdigit():
            raise ValueError(f"times must be a whole number of at least 1: {times!r}")
        self.add(endpoint, kind, int(times or 1))

    def clear(self, key: str | None = None) -> None:
        """Remove the queued faults: all, or those for one key."""
        with self._lock:
            self._waiting = [f for f in self._waiting if key is not None and f.key != key]

    @property
    def waiting(self) -> int:
        """Return how many faults are still queued."""
        with self._lock:
            return len(self._waiting)

    def set_chaos(self, share: float, seed: int, kinds: Sequence[str] | None = None) -> None:
        """Make a `share` of all requests fail at random; 0 stops that."""
        if isinstance(share, bool) or not 0 <= share <= 1:
            raise ValueError(f"chaos must be a number from 0 to 1, not {share!r}")
        chosen = tuple(RECOVERABLE if kinds is None else kinds)
        for kind in chosen:
            _options(kind)
        if not chosen:
            raise ValueError("chaos_kinds must name at least one kind of fault")
        with self._lock:
            self._share, self._kinds = share, chosen
            self._rng = Random(f"chaos {seed}")

    def next_for(self, endpoint: str, key: str) -> Fault | None:
        """Return the fault for a request, and count it as used."""
        with self._lock:
            for fault in self._waiting:
                if fault.applies_to(endpoint, key):
                    fault.times -= 1
                    if fault.times < 1:
                        self._waiting.remove(fault)
                    return fault
            if not self._share or self._rng.random() >= self._share:
                return None
            kind = self._rng.choice(self._kinds)
            options = {**KINDS[kind], **_CHAOS_OPTIONS.get(kind, {})}
            if kind == "html_502":
                options["status"] = self._rng.choice((500, 502, 503, 504, 520, 522))
            return Fault(endpoint, kind, 1, None, options)


def _options(kind: str) -> dict[str, Any]:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}: {kind!r}")
    return KINDS[kind]
