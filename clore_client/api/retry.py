"""Classify responses and failures by the retry policy, and decide when a call gives up.

The README has the policy under "Retries".
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import re
import time
from typing import Any
from urllib.parse import urlsplit

import requests

from clore_client.api.call import Call, Envelope, unix_time
from clore_client.api.connection import never_sent, reason_of
from clore_client.errors import (
    CREATE_ORDER_CODE_1,
    CloreAPIError,
    CloreConnectionError,
    CloreError,
    InvalidResponseError,
    RateLimitError,
    api_error,
    error_text,
    printable,
    redact,
)
from clore_client.models.record import RawRecords

MAX_DIGITS = 4000  # json refuses a response with an integer of 4,300 digits

# What to do after a failed request.
RETRY = "retry"
RAISE = "raise"
UNKNOWN = "unknown"  # raise an OutcomeUnknownError; create_order looks for its order

# Why it failed.
NOT_SENT = "not sent"
RATE_LIMITED = "rate limited"
NO_RESPONSE = "no response"
UNCLEAR = "unclear"
DATABASE_ERROR = "database error"
REFUSED = "refused"

# The first action is for reads and for repeatable POSTs, the second one for any other POST.
POLICY = {
    NOT_SENT: (RETRY, RETRY),  # connection refused, name not resolved, TLS
    RATE_LIMITED: (RETRY, RETRY),  # HTTP 429 or code 5
    # Timeout, connection lost, HTTP 2xx with a body that is not JSON, HTTP 500 ... without a code.
    NO_RESPONSE: (RETRY, UNKNOWN),
    # Other HTTP 5xx, HTTP 2xx without a code, a body that is too large or in a wrong encoding.
    UNCLEAR: (RAISE, UNKNOWN),
    DATABASE_ERROR: (RETRY, RAISE),  # code 1
    REFUSED: (RAISE, RAISE),  # any other error of the API, a redirect, 4xx
}
UNAVAILABLE_STATUSES = frozenset({500, 502, 503, 504, 520, 522})
REFUSAL_CODES = frozenset({3, 4})  # with these, the API did nothing, even with HTTP 5xx
LONGEST_CANCEL_PAUSE = 30.0  # seconds between two cancels that hit the rate limit


def action_for(call: Call, problem: str) -> str:
    """Return what to do about a problem."""
    return POLICY[problem][0 if call.rules.repeatable else 1]


def problem_of(status: int, decoded: Any, code: int | None) -> str:
    """Return why a request with a response failed.

    Parameters:
        status: the HTTP status.
        decoded: the body; None if it is not JSON.
        code: the code in the body, or None.
    """
    if code == 5 or (code is None and status == 429):
        return RATE_LIMITED
    if code == 1:
        return DATABASE_ERROR
    if code in REFUSAL_CODES or (code == 6 and error_text(decoded)):
        return REFUSED
    if code is None and (status in UNAVAILABLE_STATUSES or (decoded is None and status < 300)):
        return NO_RESPONSE
    return UNCLEAR if status >= 500 or (code is None and status < 300) else REFUSED


def backoff_delay(failures: int, first: float, longest: float) -> float:
    """Return the seconds before the next retry: exponential backoff with full jitter, capped."""
    return random.uniform(0.0, min(longest, first * 2.0 ** min(failures - 1, 32)))


def cancel_delay(refusals: int, first: float) -> float:
    """Return the seconds to wait after a cancel hit the rate limit: 1, 2, 4 ... 30."""
    return float(min(LONGEST_CANCEL_PAUSE, first * 2.0 ** min(refusals, 32)))


class Failure:
    """One request that failed.

    Attributes:
        error: what to raise if it is not retried.
        again: whether to retry.
        rate_limited: whether the API refused it because of the rate limit.
    """

    def __init__(self, error: CloreError, problem: str, again: bool = False) -> None:
        self.error, self.again = error, again
        self.rate_limited = problem == RATE_LIMITED


def excerpt(body: bytes, secrets: tuple[str, ...] = (), limit: int = 160) -> str:
    """Return the start of an HTML or text body on one line, without tags and secrets."""
    import html  # slow to import, and only errors need it

    text = redact(body[:100_000].decode("utf-8", "replace"), secrets)[:4000]
    text = re.sub(r"(?is)<(script|style|head)\b.*?</\1\s*>", " ", text)
    text = html.unescape(re.sub(r"<[^<>]*>?", " ", text))
    return printable(" ".join(text.split()), limit)


def _retry_after(headers: Any) -> float | None:
    """Return the seconds of a Retry-After header; a date counts from the Date of the response."""
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", value):
        return float(value)
    until, now = unix_time(value), unix_time(headers.get("Date"))
    return None if until is None or now is None else max(0.0, until - now)


def classify_error(call: Call, error: Exception, sent_at: float | None) -> Failure:
    """Classify a request that got no response.

    Parameters:
        call: the call.
        error: the exception of requests or urllib3.
        sent_at: monotonic time at which the request was sent; None if it was not.
    """
    reason = re.sub(r"^<?_?\w*(Connection|Pool)\(.*?\)[^:]*: ", "", str(reason_of(error)))
    cause = printable(redact(f"{type(error).__name__}: {reason}", call.secrets), 300)
    unsent = never_sent(error, sent_at is not None)
    failed = CloreConnectionError(cause) if unsent else call.lost(cause)
    failed.sent_at = None if unsent else sent_at
    # A new exception, because the original one holds the request with its secrets.
    kind = type(error) if isinstance(error, requests.RequestException) else requests.ConnectionError
    failed.__cause__ = kind(cause)
    problem = NOT_SENT if unsent else NO_RESPONSE
    return Failure(failed, problem, action_for(call, problem) == RETRY)


def classify_unusable(call: Call, response: requests.Response | None, reason: str) -> Failure:
    """Classify a response that can't be read to its end. A retry would fail in the same way."""
    status = 0 if response is None else response.status_code
    about = _about(call, status)
    error = InvalidResponseError(-1, f"HTTP {status}: {reason}", retryable=False, **about)
    return _failure(call, UNCLEAR, error, reason)


def classify(call: Call, response: requests.Response, body: bytes) -> Envelope | Failure:
    """Classify a response: success, retry, or error."""
    decoded = decode_servers(body) if call.lists_servers else decode_json(body)
    envelope = decoded if isinstance(decoded, dict) else {}
    code = envelope["code"] if type(envelope.get("code")) is int else None
    if code == 0:
        return Envelope(envelope)
    status = response.status_code
    about = _about(call, status)
    problem = problem_of(status, decoded, code)
    if problem == RATE_LIMITED:
        refused = RateLimitError(5, error_text(envelope), envelope, **about)
        refused.retry_after = _retry_after(response.headers)
        return _failure(call, problem, refused, "")
    if code is None:
        text, hint = _describe(call, response, body, decoded)
        retryable = action_for(call, problem) == RETRY
        broken = InvalidResponseError(-1, text, envelope, hint=hint, retryable=retryable, **about)
        cause = (broken.error or "JSON without a code").removeprefix(f"HTTP {status}: ")
        return _failure(call, problem, broken, cause)
    if problem == DATABASE_ERROR and not call.rules.repeatable:  # ambiguous
        about["retryable"] = False
        about["hint"] = CREATE_ORDER_CODE_1 if call.name == "create_order" else None
    error = api_error(envelope, **about)
    return _failure(call, problem, error, error.args[0])


def _about(call: Call, status: int) -> dict[str, Any]:
    return {"http_status": status, "endpoint": call.endpoint, "secrets": call.secrets}


def _failure(call: Call, problem: str, error: CloreAPIError, cause: str) -> Failure:
    action = action_for(call, problem)
    if action != UNKNOWN:
        return Failure(error, problem, action == RETRY)
    lost = call.lost(f"HTTP {error.http_status}: {cause}")
    lost.__cause__ = error
    return Failure(lost, problem, again=False)


def _describe(
    call: Call, response: requests.Response, body: bytes, decoded: Any
) -> tuple[str | None, str | None]:
    """Return the error text of a response without a code, and a hint."""
    status, hint = f"HTTP {response.status_code}", None
    if 300 <= response.status_code < 400:
        target = _redirect_target(response)
        return f"{status}: a redirect to {target}, which the client does not follow", None
    if isinstance(decoded, dict):
        return error_text(decoded), None
    if b"error code: 1010" in body[:4000]:
        hint = "the proxy in front of the API refused the User-Agent: set another user_agent"
    return f"{status}: {excerpt(body, call.secrets) or 'an empty response'}", hint


def _redirect_target(response: requests.Response) -> str:
    # Show only the host, because the rest of the URL may contain a token.
    try:
        host = urlsplit(response.headers.get("Location", "")).hostname
    except ValueError:
        host = None
    return f"host {printable(host, 100)}" if host else "an unknown host"


@functools.cache
def fast_json() -> Any:
    """Return the module ``msgspec``, or None if it is not installed."""
    try:
        return importlib.import_module("msgspec")
    except ImportError:
        return None


def decode_json(text: Any) -> Any:
    """Return the decoded JSON of ``bytes`` or of a ``msgspec.Raw``, or None."""
    if msgspec := fast_json():
        try:
            return msgspec.json.decode(text)
        except (ValueError, RecursionError, msgspec.MsgspecError):
            pass  # it refuses some numbers and lone surrogates that json accepts
    try:
        return json.loads(bytes(text))
    except (ValueError, RecursionError):
        return None


def decode_servers(body: bytes) -> Any:
    """Decode a response as :func:`decode_json` does, but leave its servers in JSON if possible."""
    if msgspec := fast_json():
        raw: Any = msgspec.Raw
        try:
            fields = msgspec.json.decode(body, type=dict[str, raw])
            servers = msgspec.json.decode(fields.pop("servers"), type=list[raw])
            decoded = {name: msgspec.json.decode(value) for name, value in fields.items()}
            for server in servers:  # msgspec has checked them, except for UTF-8 and long numbers
                if len(str(server, "utf-8")) > MAX_DIGITS:
                    msgspec.json.decode(server)
            if bytes(fields["code"]) == b"0":
                return {**decoded, "servers": RawRecords(servers, decode_json)}
        except (ValueError, RecursionError, KeyError, msgspec.MsgspecError):
            pass
    return decode_json(body)


class Retries:
    """Count the failed requests of one call.

    Failures count against ``max_retries``. Refusals because of the rate limit have a time limit.

    Attributes:
        sends: how many times the request was sent and failed.
        failures: how many of these failed for a reason other than the rate limit.
        refusals: how many of these the API refused because of the rate limit.
    """

    def __init__(self, call: Call, max_retries: int, patience: float) -> None:
        self._call = call
        self._max_retries = max(1, max_retries)
        self._patience = patience
        self._refused_at: float | None = None
        self._last: Failure | None = None
        self.sends = self.failures = self.refusals = 0

    @property
    def patience_left(self) -> float:
        """The seconds for which refusals because of the rate limit are still retried."""
        if self._refused_at is None:
            return self._patience
        return max(0.0, self._refused_at + self._patience - time.monotonic())

    def add(self, failure: Failure) -> None:
        """Add a failed request."""
        self.sends += 1
        if failure.rate_limited:
            self.refusals += 1
            self._refused_at = self._refused_at or time.monotonic()
        else:
            self.failures += 1
        failure.error.sends = self.sends
        if self._last is not None and failure.error.sent_at is None:
            failure.error.sent_at = self._last.error.sent_at  # an earlier request was sent
        self._last = failure

    def check(self, failure: Failure, recently_refused: tuple[int, int]) -> None:
        """Raise the error of the call, unless its request may be sent again.

        Parameters:
            failure: the last failure.
            recently_refused: (refused, total): how many of the last requests with this key the API
                refused because of the rate limit.
        """
        if not failure.again:
            raise failure.error
        if not failure.rate_limited:
            if self.failures >= self._max_retries:
                raise self._gave_up(failure.error)
            return
        pause = 0.0 if self._call.urgent else failure.error.retry_after or 0.0
        if self.patience_left <= pause:
            error = self._gave_up(failure.error)
            refused, total = recently_refused
            if refused > 1:
                error.args = (
                    f"{error}\n{refused} of the last {total} requests hit the API's rate limit: "
                    "other programs use this key. Stop them, share the rate limit with them "
                    "(rate_limiter='redis://...'), or allow more time with rate_limit_wait=",
                )
            raise error

    def not_sent(self, pause: float | None) -> CloreError:
        """Return the error for a request that could not be sent, or could not be retried.

        Parameters:
            pause: the seconds of a pause that is too long; None if the deadline is too early.
        """
        if self._last is not None:
            error = self._last.error
            error.retry_after = error.retry_after if pause is None else pause
            return self._gave_up(error)
        if pause is None:
            return CloreConnectionError(
                f"{self._call.label} was not sent, as the rate limit left no time for it before "
                "the deadline: allow more time, or make fewer requests"
            )
        hint = f"the API asked for a pause, so nothing was sent: try again in {pause:.0f} s"
        paused = RateLimitError(5, endpoint=self._call.endpoint, hint=hint)
        paused.retry_after, paused.sends = pause, 0
        return paused

    def _gave_up(self, error: CloreError) -> CloreError:
        """Add to the text of ``error`` that retries did not help."""
        error.args = (f"Clore API request failed after {self.sends} retries: {error}",)
        return error
