"""The retry policy. The README has the same table under "Retries"."""

from __future__ import annotations

import enum
import random
from typing import NamedTuple


class Rules(NamedTuple):
    """How requests to one endpoint are handled."""

    needs_key: bool = True
    repeatable: bool = False  # sending it twice does no harm
    urgent: bool = False  # goes first, as it costs money while it waits
    spaced: bool = False  # has a longer interval, ``create_order_interval``
    logged: bool = False  # starts or stops costs


ENDPOINTS = {
    "marketplace": Rules(needs_key=False),
    "create_order": Rules(spaced=True, logged=True),
    "cancel_order": Rules(repeatable=True, urgent=True, logged=True),
    "cancel_orders": Rules(repeatable=True, urgent=True, logged=True),
    "set_spot_price": Rules(repeatable=True, logged=True),
}


class Action(enum.Enum):
    """What to do after a request failed."""

    RETRY = enum.auto()
    RAISE = enum.auto()
    UNKNOWN = enum.auto()  # raise an OutcomeUnknownError; create_order looks for its order


class Problem(enum.Enum):
    """Why a request failed."""

    NOT_SENT = enum.auto()
    RATE_LIMITED = enum.auto()
    NO_RESPONSE = enum.auto()
    BROKEN_BODY = enum.auto()
    UNREADABLE_BODY = enum.auto()
    UNAVAILABLE = enum.auto()
    UNCLEAR = enum.auto()
    DATABASE_ERROR = enum.auto()
    REFUSED = enum.auto()


RETRY, RAISE, UNKNOWN = Action.RETRY, Action.RAISE, Action.UNKNOWN

# The first action is for reads and for repeatable POSTs, the second one for any other POST.
POLICY = {
    Problem.NOT_SENT: (RETRY, RETRY),  # connection refused, name not resolved, TLS
    Problem.RATE_LIMITED: (RETRY, RETRY),  # HTTP 429 or code 5
    Problem.NO_RESPONSE: (RETRY, UNKNOWN),  # timeout, connection lost
    Problem.BROKEN_BODY: (RETRY, UNKNOWN),  # HTTP 2xx with a body that is not JSON
    Problem.UNREADABLE_BODY: (RAISE, UNKNOWN),  # too large, or in an unexpected encoding
    Problem.UNAVAILABLE: (RETRY, UNKNOWN),  # HTTP 500, 502 ... without a code
    Problem.UNCLEAR: (RAISE, UNKNOWN),  # other HTTP 5xx, and HTTP 2xx without a code
    Problem.DATABASE_ERROR: (RETRY, RAISE),  # code 1
    Problem.REFUSED: (RAISE, RAISE),  # any other error of the API, a redirect, 4xx
}
UNAVAILABLE_STATUSES = frozenset({500, 502, 503, 504, 520, 522})
REFUSAL_CODES = frozenset({3, 4})  # with these, the API did nothing, even with HTTP 5xx
LONGEST_CANCEL_PAUSE = 30.0  # seconds between two cancels that hit the rate limit


def rules_for(method: str, name: str) -> Rules:
    """Return the rules for a request.

    Parameters:
        method: the HTTP method.
        name: the last part of the endpoint.
    """
    rules, reads = ENDPOINTS.get(name, Rules()), method in ("GET", "HEAD")
    return rules._replace(
        repeatable=reads or (method == "POST" and rules.repeatable),
        spaced=rules.spaced and not reads,
    )


def action_for(problem: Problem, repeatable: bool) -> Action:
    """Return what to do about a problem."""
    return POLICY[problem][0 if repeatable else 1]


def problem_with_code(status: int, code: int, has_reason: bool) -> Problem:
    """Return the problem of a response with an error code.

    Parameters:
        status: the HTTP status.
        code: the code in the body.
        has_reason: whether the body has an error text.
    """
    if code == 5:
        return Problem.RATE_LIMITED
    if code == 1:
        return Problem.DATABASE_ERROR
    if code in REFUSAL_CODES or (code == 6 and has_reason):
        return Problem.REFUSED
    return Problem.UNCLEAR if status >= 500 else Problem.REFUSED


def problem_without_code(status: int, is_json: bool) -> Problem:
    """Return the problem of a response without a code.

    Parameters:
        status: the HTTP status.
        is_json: whether the body is JSON.
    """
    if status == 429:
        return Problem.RATE_LIMITED
    if status in UNAVAILABLE_STATUSES:
        return Problem.UNAVAILABLE
    if status < 300 and not is_json:
        return Problem.BROKEN_BODY
    return Problem.UNCLEAR if status >= 500 or status < 300 else Problem.REFUSED


def backoff_delay(failures: int, first: float, longest: float) -> float:
    """Return the seconds before the next retry: exponential backoff with full jitter, capped."""
    return random.uniform(0.0, min(longest, first * 2.0 ** min(failures - 1, 32)))


def cancel_delay(refusals: int, first: float) -> float:
    """Return the seconds to wait after a cancel hit the rate limit: 1, 2, 4 ... 30."""
    return float(min(LONGEST_CANCEL_PAUSE, first * 2.0 ** min(refusals, 32)))
