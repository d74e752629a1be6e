"""Make API calls: key, pace, retries, and an envelope or an error at the end."""

from __future__ import annotations

import contextvars
import logging
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import requests
import urllib3

from clore_client.api.call import LOGGED_POSTS, SPACED_POSTS, Call, Envelope, prepare_call
from clore_client.api.connection import Sessions, UnusableAnswerError, exchange, read_body
from clore_client.api.limiters import limiter_for
from clore_client.api.rate_limit import (
    DeadlinePassedError,
    PauseTooLongError,
    ScheduledRateLimiter,
    Turn,
)
from clore_client.api.retries import Retries
from clore_client.api.retry import Failure, classify, classify_error, classify_unusable
from clore_client.config import (
    URL_VARIABLE,
    check_base_url,
    check_state_dir,
    clean_key,
    find_key,
    state_folder,
)
from clore_client.errors import (
    ConfigurationError,
    Secret,
)
from clore_client.log import logger
from clore_client.validation import (
    Timeout,
    check_count,
    check_headers,
    check_interval,
    check_number,
    check_text,
    check_timeout,
    longest_part,
    shortened,
)
from clore_client.version import __version__

# How long a call may take, however slowly its answer drips.
ANSWER_TIMEOUTS = 3.0  # times ``timeout``, for one exchange
LONGEST_CANCEL_PAUSE = 30.0  # seconds between two cancels that are refused for their pace

_UNKNOWN: Any = object()  # a folder that was not looked up yet

H = TypeVar("H", bound="HTTPClient")
Returned = TypeVar("Returned")


class Limits:
    """The limits that a caller sets for its API calls.

    Attributes:
        deadline: monotonic time; no request starts after it, and none takes longer.
        urgent: requests leave whatever pause the server has asked for.
    """

    def __init__(self, deadline: float = math.inf, urgent: bool = False) -> None:
        self.deadline = deadline
        self.urgent = urgent


_limits: contextvars.ContextVar[Limits] = contextvars.ContextVar("limits", default=Limits())  # noqa: B039


def limited(
    call: Callable[[], Returned], *, deadline: float = math.inf, urgent: bool = False
) -> Returned:
    """Make a call whose requests have a deadline, or ignore the server's pauses.

    Parameters:
        call: what makes the requests.
        deadline: monotonic time; an earlier one of the caller stays.
        urgent: whether the requests end, or help to end, what costs money.
    """
    outer = _limits.get()
    limits = Limits(min(deadline, outer.deadline), urgent or outer.urgent)

    def run() -> Returned:
        _limits.set(limits)
        return call()

    # A context of its own, which is dropped with the call: an interrupt leaves nothing behind.
    return contextvars.copy_context().run(run)


def backoff_delay(sends: int, first: float, longest: float) -> float:
    """Return the seconds to wait after some sends: exponential backoff with full jitter, capped."""
    return random.uniform(0.0, min(longest, first * 2.0 ** min(sends - 1, 32)))


def cancel_delay(sends: int, first: float) -> float:
    """Return the seconds to wait after a cancel was refused for its pace: 1, 2, 4 ... 30."""
    return float(min(LONGEST_CANCEL_PAUSE, first * 2.0 ** min(sends, 32)))


class HTTPClient:
    """Owns the settings, the connections and ``_request``, the one way to the API.

    Attributes:
        server_clock: seconds that the server's clock is ahead of this one; None if not known.
    """

    BASE_URL = "https://api.clore.ai"

    def __init__(
        self,
        api_key: str | None,
        timeout: Timeout,
        rate_limit: float,
        max_retries: int,
        *,
        base_url: str | None,
        create_order_interval: float,
        backoff: float,
        max_backoff: float,
        user_agent: str | None,
        max_response_mb: float,
        rate_limit_wait: float,
        state_dir: str | os.PathLike[str] | None,
    ) -> None:
        key, _ = self._key_source = find_key(api_key)
        self._headers: dict[str, str] = {"auth": key} if key else {}
        self._url_source: tuple[str | None, str] = (None, "nowhere")
        if base_url is not None:
            self._set_base_url(check_text("base_url", base_url), "base_url", "argument")
        elif from_environment := os.environ.get(URL_VARIABLE):
            source = f"environment variable {URL_VARIABLE}"
            self._set_base_url(from_environment, URL_VARIABLE, source)
        self.timeout = check_timeout("timeout", timeout)
        self.rate_limit = check_interval("rate_limit", rate_limit)
        self.max_retries = check_count("max_retries", max_retries, minimum=1)
        self.create_order_interval = check_number(
            "create_order_interval", create_order_interval, unit="seconds"
        )
        self.rate_limit_wait = check_number(
            "rate_limit_wait", rate_limit_wait, infinite=True, unit="seconds"
        )
        self._state_dir = check_state_dir("state_dir", state_dir)
        self._folder: Path | None = _UNKNOWN
        self.backoff = check_interval("backoff", backoff)
        self.max_backoff = check_interval("max_backoff", max_backoff)
        self.max_response_mb = check_number(
            "max_response_mb", max_response_mb, above=True, infinite=True, unit="megabytes"
        )
        self._user_agent = f"clore-client/{__version__} {requests.utils.default_user_agent()}"
        if user_agent is not None:
            if not (check_text("user_agent", user_agent).isascii() and user_agent.isprintable()):
                raise ValueError(f"user_agent must be printable ASCII, not {user_agent!r}")
            self._user_agent += f" {user_agent}"
        self._sessions = Sessions(self._user_agent)
        self.server_clock: float | None = None

    def __copy__(self: H) -> H:
        """Return a client of its own with the same settings and key."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._sessions = Sessions(self._user_agent)
        twin._headers = dict(self.headers)
        return twin

    def __deepcopy__(self: H, memo: dict[int, Any]) -> H:
        return self.__copy__()

    def __getstate__(self) -> Any:
        # A pickle without the key would load as a client of whatever account is at hand there.
        raise TypeError(
            f"a {type(self).__name__} can't be pickled, for its key would be in the pickle: make "
            f"one where it is needed, with {type(self).__name__}.from_env()"
        )

    def close(self) -> None:
        """Close the connections. The client can be used again; it then opens new ones."""
        self._sessions.close()

    # --- settings that may be set later ---

    def _set_base_url(self, url: str, name: str, source: str) -> None:
        url = check_base_url(url, name)
        self._url_source = (url, source)
        try:
            self.BASE_URL = url
        except AttributeError:  # a subclass has made it a property: that one decides
            logger.debug("BASE_URL of %s can't be set", type(self).__name__)

    @property
    def base_url(self) -> str:
        """Return ``BASE_URL`` as it is now, checked, without a trailing slash."""
        return check_base_url(self.BASE_URL, "BASE_URL")

    @property
    def api_key(self) -> str | None:
        """The key, or None. Setting it changes ``headers``."""
        named = ((k, v) for k, v in self.headers.items() if isinstance(k, str))
        return next((v for k, v in named if k.lower() == "auth"), None)

    @api_key.setter
    def api_key(self, key: str | None) -> None:
        rest = {k: v for k, v in self.headers.items() if k.lower() != "auth"}
        if key:
            rest["auth"] = clean_key(key, "the attribute api_key")
        self._headers = rest

    @property
    def headers(self) -> dict[str, str]:
        """The headers of each request: ``{"auth": api_key}``, or ``{}`` without a key."""
        return self._headers

    @headers.setter
    def headers(self, headers: dict[str, str]) -> None:
        checked = check_headers("headers", headers)
        self._headers = {k: Secret.of(v) if k.lower() == "auth" else v for k, v in checked.items()}

    # --- one call ---

    def _request(
        self,
        method: str,
        endpoint: str,
        params: dict[str, Any] | None = None,
        json: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Make one paced, retried API call; the way to endpoints that have no method of their own.

        Parameters:
            method: ``"GET"`` or ``"POST"``.
            endpoint: the path, as ``"/v1/wallets"``.
            params: the query.
            json: the body.
            **kwargs: for requests; ``headers`` are merged with the client's, ``timeout``
                overrides its timeout (seconds, or a ``(connect, read)`` pair).

        Returns:
            The decoded envelope, whose ``code`` is 0.

        Raises:
            CloreAPIError: the API answered with an error; see the subclasses.
            CloreConnectionError: no answer came, and asking again did not help.
            OutcomeUnknownError: a POST that changes something may or may not have been carried out.
            ValueError, TypeError: an argument can't be right; nothing was sent.

        Example:
            >>> client._request("GET", "/v1/wallets")["wallets"]
        """
        call = self._prepare(method, endpoint, params, json, kwargs)
        limiter = limiter_for(call.base_url, call.key, self._state_folder())
        turn = self._turn(call)
        retries = Retries(self.max_retries, self.rate_limit_wait)
        while True:
            turn.patience = retries.patience_left()
            try:
                outcome = self._send(call, limiter, turn)
            except (DeadlinePassedError, PauseTooLongError) as reason:
                raise retries.not_sent(call, reason) from None
            if isinstance(outcome, Envelope):
                limiter.accepted(turn)
                outcome.sends = retries.sends + 1
                return outcome
            retries.note(outcome)
            turn.not_before = time.monotonic() + self._delay(call, outcome, retries, limiter, turn)
            retries.raise_if_over(outcome, limiter.recently_refused)
            logger.warning(
                "%s: send %d failed, is sent again: %s", call.label, retries.sends, outcome.error
            )

    def _turn(self, call: Call) -> Turn:
        spaced = call.name in SPACED_POSTS and not call.repeatable
        return Turn(
            self.rate_limit,
            urgent=call.urgent,
            spacing=(call.name, self.create_order_interval) if spaced else None,
        )

    def _state_folder(self) -> Path | None:
        if self._folder is _UNKNOWN:
            self._folder = state_folder(self._state_dir)
        return self._folder

    def _prepare(
        self, method: str, endpoint: str, params: Any, json: Any, options: dict[str, Any]
    ) -> Call:
        session = self._sessions.take(reads=True)
        call = prepare_call(
            session,
            method,
            endpoint,
            params,
            json,
            options,
            base_url=self.base_url,
            headers=self.headers,
            timeout=self.timeout,
            urgent=_limits.get().urgent,
        )
        self._sessions.put_back(session, reads=True)
        return call

    def _delay(
        self,
        call: Call,
        failure: Failure,
        retries: Retries,
        limiter: ScheduledRateLimiter,
        turn: Turn,
    ) -> float:
        """Return the seconds to wait after a failure."""
        if not failure.rate_limited:
            return backoff_delay(retries.failures, self.backoff, self.max_backoff)
        limiter.refused(turn, failure.error.retry_after)
        # Other requests wait as the limiter was told; a cancel does not wait for that.
        return cancel_delay(retries.refusals, self.backoff) if call.urgent else 0.0

    def _send(self, call: Call, limiter: ScheduledRateLimiter, turn: Turn) -> Envelope | Failure:
        """Send once, when it is this request's turn."""
        caller_deadline = _limits.get().deadline
        limiter.wait(turn, caller_deadline)
        started_at = time.monotonic()
        settings, deadline = dict(call.settings), caller_deadline
        if (read_timeout := longest_part(settings["timeout"])) is not None:
            deadline = min(deadline, started_at + ANSWER_TIMEOUTS * read_timeout)
        if deadline < math.inf:
            left = max(deadline - started_at, 0.001)
            settings["timeout"] = shortened(settings["timeout"], left)

        def keep_turn() -> None:
            if not turn.holds_slot:  # connecting took longer than the slot
                limiter.wait(turn, deadline)

        exchange.begin(keep_turn, lambda: limiter.leave(turn), deadline)
        answer = self._exchange(call, settings)
        if isinstance(answer, Failure):
            return answer
        response, body = answer
        # Connections of a proxy for SOCKS do not tell when a request left.
        sent_at = started_at if exchange.left_at is None else exchange.left_at
        return self._classify(call, response, body, sent_at)

    def _classify(
        self, call: Call, response: requests.Response, body: bytes, sent_at: float
    ) -> Envelope | Failure:
        received_at = time.monotonic()
        logger.log(
            logging.INFO if call.name in LOGGED_POSTS else logging.DEBUG,
            "%s: HTTP %d, %d bytes in %.3f s",
            call.label,
            response.status_code,
            len(body),
            received_at - sent_at,
        )
        outcome = classify(call, response, body)
        if isinstance(outcome, Envelope):
            outcome.date = response.headers.get("Date")
            outcome.sent_at, outcome.received_at = sent_at, received_at
            server_time = outcome.server_time_at(received_at)
            if server_time is not None:
                self.server_clock = server_time + 0.5 - time.time()
        else:
            outcome.error.sent_at = sent_at
        return outcome

    def _exchange(
        self, call: Call, settings: dict[str, Any]
    ) -> tuple[requests.Response, bytes] | Failure:
        """Send a request, and read its answer."""
        reads = call.request.method in ("GET", "HEAD")
        session = self._sessions.take(reads)
        response = None
        answer: tuple[requests.Response, bytes] | Failure
        try:
            response = session.send(call.request, **settings)
            answer = response, read_body(response, self.max_response_mb * 1e6)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            answer = classify_error(call, error, exchange.left_at)
        except UnusableAnswerError as error:
            answer = classify_unusable(call, response, str(error))
        except OSError as error:  # a CA bundle or a certificate that is not there
            raise ConfigurationError(f"{call.label} was not sent: {error}") from error
        if isinstance(answer, Failure) and response is not None:
            response.close()
        self._sessions.put_back(session, reads)
        return answer
