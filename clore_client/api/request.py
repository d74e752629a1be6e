"""One API call: key, pace, retries, and an envelope or an error at the end."""

from __future__ import annotations

import contextvars
import logging
import math
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from requests.structures import CaseInsensitiveDict

from clore_client.api.connection import Sessions, UnusableAnswerError, exchange, read_body
from clore_client.api.rate_limit import (
    LONGEST_PUSH_BACK,
    DeadlinePassedError,
    PushedBackError,
    RateLimit,
    rate_limit_for,
)
from clore_client.api.retry import (
    REPEATABLE_POSTS,
    Call,
    Envelope,
    Failure,
    judged,
    no_answer,
    secrets_in,
    unusable,
)
from clore_client.config import (
    CONFIG_FILE,
    DEFAULT_STATE_DIR,
    KEY_VARIABLE,
    KeyAndUrl,
    check_key_may_go_to,
    check_state_dir,
    clean_key,
    is_loopback,
)
from clore_client.errors import (
    AuthenticationError,
    CloreConnectionError,
    CloreError,
    ConfigurationError,
    RateLimitError,
    printable,
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
    short_repr,
    shortened,
)
from clore_client.version import __version__

URGENT_POSTS = frozenset({"cancel_order", "cancel_orders"})  # a waiting cancel costs money
SPACED_POSTS = frozenset({"create_order"})
LOGGED_POSTS = REPEATABLE_POSTS | SPACED_POSTS  # what costs or frees money
KEYLESS_GETS = frozenset({"marketplace"})

ANSWER_TIMEOUTS = 3.0  # how many times ``timeout`` an exchange may take in all
LONGEST_CANCEL_PAUSE = 30.0  # seconds between two cancels that are refused for their pace

T = TypeVar("T", bound="Transport")
Returned = TypeVar("Returned")


class Limits:
    """What holds for the API calls of a caller.

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
    """Seconds to wait after ``sends`` sends: exponential backoff with full jitter, capped."""
    return random.uniform(0.0, min(longest, first * 2.0 ** min(sends - 1, 32)))


def cancel_delay(sends: int, first: float) -> float:
    """Seconds to wait after a cancel was refused for its pace: 1, 2, 4 ... 30 by default."""
    return float(min(LONGEST_CANCEL_PAUSE, first * 2.0 ** min(sends, 32)))


def _name_of(endpoint: str) -> str:
    path = unquote(urlsplit(endpoint).path)
    return path.rstrip("/").rsplit("/", 1)[-1].lower()


def check_endpoint(endpoint: Any) -> str:
    """A path as ``"/v1/wallets"``: the key must not be led to another host."""
    check_text("endpoint", endpoint)
    fine = endpoint.startswith("/") and not endpoint.startswith("//") and endpoint.isprintable()
    if not fine or "\\" in endpoint or " " in endpoint or "/.." in endpoint:
        raise ValueError(
            f"endpoint must be a path like '/v1/wallets', not {printable(repr(endpoint), 80)}"
        )
    return str(endpoint)


class Transport(KeyAndUrl):
    """The core of the client: settings, one kept-alive session, and ``_request``."""

    # Defaults here as well, for a subclass that does not call __init__.
    timeout: Timeout = 30
    rate_limit: float = 1.1
    max_retries: int = 3
    create_order_interval: float = 5.0
    backoff: float = 0.5
    max_backoff: float = 30.0
    max_usd_per_hour: float | None = None
    max_active_orders: int | None = None
    _server_clock: float | None = None  # seconds that the server's clock is ahead of this one
    _state_dir: str | os.PathLike[str] | None = DEFAULT_STATE_DIR
    _user_agent = f"clore-client/{__version__} {requests.utils.default_user_agent()}"
    max_response_mb: float = 64.0
    order_lag: float = 20.0

    def __init__(
        self,
        api_key: str | None = None,
        timeout: Timeout = 30,
        rate_limit: float = 1.1,
        max_retries: int = 3,
        *,
        base_url: str | None = None,
        create_order_interval: float = 5.0,
        backoff: float = 0.5,
        max_backoff: float = 30.0,
        user_agent: str | None = None,
        max_usd_per_hour: float | None = None,
        max_active_orders: int | None = None,
        state_dir: str | os.PathLike[str] | None = DEFAULT_STATE_DIR,
        max_response_mb: float = 64.0,
        order_lag: float = 20.0,
    ) -> None:
        self._settle(api_key, base_url)
        self.timeout = check_timeout("timeout", timeout)
        self.rate_limit = check_interval("rate_limit", rate_limit)
        self.max_retries = check_count("max_retries", max_retries, minimum=1)
        self.create_order_interval = check_number(
            "create_order_interval", create_order_interval, unit="seconds"
        )
        self.backoff = check_interval("backoff", backoff)
        self.max_backoff = check_interval("max_backoff", max_backoff)
        if max_usd_per_hour is not None:
            check_number("max_usd_per_hour", max_usd_per_hour, unit="USD per hour")
        if max_active_orders is not None:
            check_count("max_active_orders", max_active_orders)
        self.max_usd_per_hour = max_usd_per_hour
        self.max_active_orders = max_active_orders
        self._state_dir = check_state_dir("state_dir", state_dir)
        self.max_response_mb = check_number(
            "max_response_mb", max_response_mb, above=True, infinite=True, unit="megabytes"
        )
        self.order_lag = check_interval("order_lag", order_lag)
        if user_agent is not None:
            if not (check_text("user_agent", user_agent).isascii() and user_agent.isprintable()):
                raise ValueError(f"user_agent must be printable ASCII, not {user_agent!r}")
            self._user_agent += f" {user_agent}"

    # --- copies of a client ---

    def __copy__(self: T) -> T:
        """A client of its own with the same settings and key, that knows of the same orders."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.__dict__.pop("_own_sessions", None)
        twin._headers = dict(self.headers)
        return twin

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        return self.__copy__()

    def __getstate__(self) -> Any:
        # A pickle without the key would load as a client of whatever account is at hand there.
        raise TypeError(
            f"a {type(self).__name__} can't be pickled, for its key would be in the pickle: make "
            f"one where it is needed, with {type(self).__name__}.from_env()"
        )

    # --- connections ---

    @property
    def _sessions(self) -> Sessions:
        sessions: Sessions | None = self.__dict__.get("_own_sessions")
        # One step where two threads make it at once: both get the first.
        return sessions or self.__dict__.setdefault("_own_sessions", Sessions(self._user_agent))

    def close(self) -> None:
        """Free the connections. The client can be used again; it then opens new ones."""
        self._sessions.close()

    # --- a call ---

    def _request(
        self,
        method: str,
        endpoint: str,
        params: dict[str, Any] | None = None,
        json: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One paced, retried API call; the way to endpoints that have no method of their own.

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
            FateUnknownError: a POST that changes something may or may not have been carried out.
            ValueError, TypeError: an argument can't be right; nothing was sent.

        Example:
            >>> client._request("GET", "/v1/wallets")["wallets"]
        """
        call = self._prepare(method, endpoint, params, json, kwargs)
        if call.name in SPACED_POSTS and not call.repeatable:
            self._check_purchase(json)
        rate_limit = rate_limit_for(call.base_url, call.key)
        limit = max(1, self.max_retries)
        not_before = -math.inf
        failure: Failure | None = None
        sends = 0
        while True:
            try:
                outcome = self._send(call, rate_limit, not_before)
            except DeadlinePassedError:
                error = (
                    failure.error
                    if failure
                    else CloreConnectionError(
                        f"{call.label} was not sent: its time was over before its turn came"
                    )
                )
                raise _after(error, sends) from None
            except PushedBackError as push:
                if failure is None:
                    raise _pushed_back(call, push.seconds) from None
                failure.error.retry_after = push.seconds
                raise _after(failure.error, sends) from None
            sends += 1
            if isinstance(outcome, Envelope):
                outcome.sends = sends
                return outcome
            if failure is not None and outcome.error._sent_at is None:
                outcome.error._sent_at = failure.error._sent_at  # an earlier send did leave
            failure = outcome
            failure.error.sends = sends
            delay = backoff_delay(sends, self.backoff, self.max_backoff)
            if failure.rate_limited:
                told = failure.error.retry_after
                rate_limit.push_back(delay if told is None else told)
                if call.urgent:
                    delay = cancel_delay(sends, self.backoff)
                elif told is not None and told > LONGEST_PUSH_BACK:
                    raise failure.error
                else:
                    delay = 0.0  # the push-back holds for this request, too
            if not failure.again:
                raise failure.error
            if sends >= limit:
                raise _after(failure.error, sends)
            logger.warning(
                "%s: send %d of %d failed, is sent again: %s",
                call.label,
                sends,
                limit,
                failure.error,
            )
            not_before = time.monotonic() + delay

    def _check_purchase(self, body: Any) -> None:
        """Raise for a purchase that the user's ceilings do not allow; all of them come by here."""

    def _prepare(
        self, method: str, endpoint: str, params: Any, json: Any, kwargs: dict[str, Any]
    ) -> Call:
        if "allow_redirects" in kwargs:
            raise ValueError("allow_redirects is refused: a redirect could lead the key elsewhere")
        method = check_text("method", method).upper()
        if not (method.isascii() and method.isalpha()):
            raise ValueError(f"method must be one like 'GET', not {short_repr(method)}")
        name = _name_of(check_endpoint(endpoint))
        base_url = self._base_url
        headers = CaseInsensitiveDict(check_headers("headers", self.headers))
        headers.update(check_headers("headers", kwargs.pop("headers", None) or {}))
        key = headers.get("auth") or ""
        if key:
            key = headers["auth"] = clean_key(key, "the headers")
            check_key_may_go_to(base_url)
        elif name not in KEYLESS_GETS:
            raise AuthenticationError(
                3,
                endpoint=endpoint,
                hint=f"there is no API key: pass api_key=..., set {KEY_VARIABLE}, "
                f"or put it into {CONFIG_FILE}; nothing was sent",
            )
        settings: dict[str, Any] = {
            "timeout": check_timeout("timeout", kwargs.pop("timeout", self.timeout)),
            "allow_redirects": False,
        }
        verify, cert, stream = (kwargs.pop(k, None) for k in ("verify", "cert", "stream"))
        proxies = dict(kwargs.pop("proxies", None) or {})
        if is_loopback(base_url):
            # Over plain http a proxy from the environment would read the key.
            proxies = {"http": None, "https": None, "all": None, **proxies}
        # Without an auth of its own, requests would send what it finds in ~/.netrc.
        kwargs.setdefault("auth", _as_it_is)
        repeatable = method in ("GET", "HEAD") or (method == "POST" and name in REPEATABLE_POSTS)
        session = self._sessions.take(reads=True)
        try:
            request = session.prepare_request(
                requests.Request(
                    method, base_url + endpoint, headers=headers, params=params, json=json, **kwargs
                )
            )
            secrets = tuple(dict.fromkeys([*([key] if key else []), *secrets_in(json)]))
        except requests.exceptions.InvalidJSONError as error:
            raise ValueError(f"json can't be sent as JSON: {error}") from None
        except RecursionError:
            raise ValueError("json can't be sent as JSON: it is nested too deeply") from None
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"json, params or another argument can't be sent: {error}") from None
        settings.update(
            session.merge_environment_settings(request.url, proxies, stream, verify, cert)
        )
        self._sessions.put_back(session, reads=True)
        settings["stream"] = True  # the body is read piece by piece, up to a limit
        return Call(
            name=name,
            endpoint=endpoint,
            request=request,
            settings=settings,
            base_url=base_url,
            key=key,
            repeatable=repeatable,
            urgent=name in URGENT_POSTS or _limits.get().urgent,
            secrets=secrets,
        )

    def _send(self, call: Call, rate_limit: RateLimit, not_before: float) -> Envelope | Failure:
        """Send once, when it is this request's turn."""
        spaced = call.name in SPACED_POSTS and not call.repeatable
        turn = rate_limit.turn(
            self.rate_limit,
            urgent=call.urgent,
            not_before=not_before,
            spacing=(call.name, self.create_order_interval) if spaced else None,
        )
        deadline = _limits.get().deadline
        with turn.held:
            rate_limit.wait(turn, deadline)
            started_at = time.monotonic()
            settings = dict(call.settings)
            if (read_timeout := longest_part(settings["timeout"])) is not None:
                deadline = min(deadline, started_at + ANSWER_TIMEOUTS * read_timeout)
            if deadline < math.inf:
                left = max(deadline - started_at, 0.001)
                settings["timeout"] = shortened(settings["timeout"], left)
            exchange.begin(lambda: rate_limit.left(turn), deadline)
            answer = self._exchange(call, settings)
            rate_limit.left(turn)
        if isinstance(answer, Failure):
            return answer
        response, body = answer
        # Connections of a proxy for SOCKS do not tell when a request left.
        sent_at = started_at if exchange.left_at is None else exchange.left_at
        received_at = time.monotonic()
        logger.log(
            logging.INFO if call.name in LOGGED_POSTS else logging.DEBUG,
            "%s: HTTP %d, %d bytes in %.3f s",
            call.label,
            response.status_code,
            len(body),
            received_at - sent_at,
        )
        outcome = judged(call, response, body)
        if isinstance(outcome, Envelope):
            outcome.date = response.headers.get("Date")
            outcome.sent_at, outcome.received_at = sent_at, received_at
            server_time = outcome.server_time_at(received_at)
            if server_time is not None:
                self._server_clock = server_time + 0.5 - time.time()
        else:
            outcome.error._sent_at = sent_at
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
            answer = no_answer(call, error, exchange.left_at)
        except UnusableAnswerError as error:
            answer = unusable(call, response, str(error))
        except OSError as error:  # a CA bundle or a certificate that is not there
            raise ConfigurationError(f"{call.label} was not sent: {error}") from error
        if isinstance(answer, Failure) and response is not None:
            response.close()
        self._sessions.put_back(session, reads)
        return answer


def _pushed_back(call: Call, seconds: float) -> RateLimitError:
    error = RateLimitError(
        5,
        endpoint=call.endpoint,
        hint=f"the API asked for a pause, of which {seconds:.0f} s are left; nothing was sent",
    )
    error.retry_after, error.sends = seconds, 0
    return error


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _after(error: CloreError, sends: int) -> CloreError:
    """``error``, saying that asking again did not help."""
    if sends:
        error.args = (f"Clore API request failed after {sends} retries: {error}",)
    return error
