"""The retry policy. The README has the same table under "Retries"."""

from __future__ import annotations

import random


# Not a named tuple, and no enums: to create those takes time at the import.
class Rules:
    """How requests to one endpoint are handled.

    Attributes:
        needs_key: whether it needs an API key.
        repeatable: whether sending it twice does no harm.
        urgent: whether it goes first, as it costs money while it waits.
        spaced: whether it has a longer interval, ``create_order_interval``.
        logged: whether it starts or stops costs.
    """

    def __init__(
        self,
        *,
        needs_key: bool = True,
        repeatable: bool = False,
        urgent: bool = False,
        spaced: bool = False,
        logged: bool = False,
    ) -> None:
        self.needs_key = needs_key
        self.repeatable = repeatable
        self.urgent = urgent
        self.spaced = spaced
        self.logged = logged


POST_RULES = {
    "create_order": Rules(spaced=True, logged=True),
    "cancel_order": Rules(repeatable=True, urgent=True, logged=True),
    "cancel_orders": Rules(repeatable=True, urgent=True, logged=True),
    "set_spot_price": Rules(repeatable=True, logged=True),
}
GET_RULES = {"marketplace": Rules(needs_key=False, repeatable=True)}
OTHER_POST, OTHER_GET = Rules(), Rules(repeatable=True)

# What to do after a failed request.
RETRY = "retry"
RAISE = "raise"
UNKNOWN = "unknown"  # raise an OutcomeUnknownError; create_order looks for its order

# Why it failed.
NOT_SENT = "not sent"
RATE_LIMITED = "rate limited"
NO_RESPONSE = "no response"
BROKEN_BODY = "broken body"
UNREADABLE_BODY = "unreadable body"
UNAVAILABLE = "unavailable"
UNCLEAR = "unclear"
DATABASE_ERROR = "database error"
REFUSED = "refused"

# The first action is for reads and for repeatable POSTs, the second one for any other POST.
POLICY = {
    NOT_SENT: (RETRY, RETRY),  # connection refused, name not resolved, TLS
    RATE_LIMITED: (RETRY, RETRY),  # HTTP 429 or code 5
    NO_RESPONSE: (RETRY, UNKNOWN),  # timeout, connection lost
    BROKEN_BODY: (RETRY, UNKNOWN),  # HTTP 2xx with a body that is not JSON
    UNREADABLE_BODY: (RAISE, UNKNOWN),  # too large, or in an unexpected encoding
    UNAVAILABLE: (RETRY, UNKNOWN),  # HTTP 500, 502 ... without a code
    UNCLEAR: (RAISE, UNKNOWN),  # other HTTP 5xx, and HTTP 2xx without a code
    DATABASE_ERROR: (RETRY, RAISE),  # code 1
    REFUSED: (RAISE, RAISE),  # any other error of the API, a redirect, 4xx
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
    if method in ("GET", "HEAD"):
        return GET_RULES.get(name, OTHER_GET)
    return POST_RULES.get(name, OTHER_POST) if method == "POST" else OTHER_POST


def action_for(problem: str, repeatable: bool) -> str:
    """Return what to do about a problem."""
    return POLICY[problem][0 if repeatable else 1]


def problem_with_code(status: int, code: int, has_reason: bool) -> str:
    """Return the problem of a response with an error code.

    Parameters:
        status: the HTTP status.
        code: the code in the body.
        has_reason: whether the body has an error text.
    """
    if code == 5:
        return RATE_LIMITED
    if code == 1:
        return DATABASE_ERROR
    if code in REFUSAL_CODES or (code == 6 and has_reason):
        return REFUSED
    return UNCLEAR if status >= 500 else REFUSED


def problem_without_code(status: int, is_json: bool) -> str:
    """Return the problem of a response without a code.

    Parameters:
        status: the HTTP status.
        is_json: whether the body is JSON.
    """
    if status == 429:
        return RATE_LIMITED
    if status in UNAVAILABLE_STATUSES:
        return UNAVAILABLE
    if status < 300 and not is_json:
        return BROKEN_BODY
    return UNCLEAR if status >= 500 or status < 300 else REFUSED


def backoff_delay(failures: int, first: float, longest: float) -> float:
    """Return the seconds before the next retry: exponential backoff with full jitter, capped."""
    return random.uniform(0.0, min(longest, first * 2.0 ** min(failures - 1, 32)))


def cancel_delay(refusals: int, first: float) -> float:
    """Return the seconds to wait after a cancel hit the rate limit: 1, 2, 4 ... 30."""
    return float(min(LONGEST_CANCEL_PAUSE, first * 2.0 ** min(refusals, 32)))
