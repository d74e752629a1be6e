"""Make API calls: respect the rate limit, send the request, retry, return a response or raise."""

from __future__ import annotations

import contextvars
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import requests
import urllib3

from clore_client.api.call import Call, Envelope
from clore_client.api.connection import Sessions, UnusableResponseError, exchange, read_body
from clore_client.api.limiters import limiter_for, redis_server_for
from clore_client.api.rate_limit import NotSentError, RateLimiter, Turn
from clore_client.api.retry import (
    Failure,
    Retries,
    backoff_delay,
    cancel_delay,
    classify,
    classify_error,
    classify_unusable,
)
from clore_client.config import (
    URL_VARIABLE,
    __version__,
    check_base_url,
    clean_key,
    find_key,
    key_ending,
    state_folder,
)
from clore_client.errors import AuthenticationError, ConfigurationError, Secret
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

RESPONSE_TIMEOUTS = 3.0  # the longest time for one request, as a multiple of ``timeout``

H = TypeVar("H", bound="HTTPClient")
Returned = TypeVar("Returned")


class Limits:
    """The limits that a caller sets for its requests.

    Attributes:
        deadline: monotonic time by which every request must have ended.
        urgent: whether requests are sent before others, and ignore the server's pauses.
        once: whether a request that fails is not sent again.
    """

    def __init__(
        self, deadline: float = math.inf, urgent: bool = False, once: bool = False
    ) -> None:
        self.deadline, self.urgent, self.once = deadline, urgent, once


_limits: contextvars.ContextVar[Limits] = contextvars.ContextVar("limits", default=Limits())  # noqa: B039


def limited(
    call: Callable[[], Returned],
    *,
    deadline: float = math.inf,
    urgent: bool = False,
    once: bool = False,
) -> Returned:
    """Run a function whose requests have other limits than the client's.

    Parameters:
        call: the function that makes the requests.
        deadline: monotonic time; an earlier deadline of an outer call stays.
        urgent: whether requests ignore the server's pauses, because they stop costs.
        once: whether a request that fails is not sent again.
    """
    outer = _limits.get()
    limits = Limits(min(deadline, outer.deadline), urgent or outer.urgent, once or outer.once)
    context = contextvars.copy_context()  # so that an interrupt can't leave the limits set
    context.run(_limits.set, limits)
    return context.run(call)


def _user_agent(addition: str | None) -> str:
    """Return the User-Agent, with the text that the user adds."""
    own = f"clore-client/{__version__} {requests.utils.default_user_agent()}"
    if addition is None:
        return own
    if not (check_text("user_agent", addition).isascii() and addition.isprintable()):
        raise ValueError(f"user_agent must be printable ASCII, not {addition!r}")
    return f"{own} {addition}"


class HTTPClient:
    """Make every API call of a client, with its settings and connections.

    Attributes:
        server_clock: seconds by which the server's clock is ahead of this one; None if not known.
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
        rate_limiter: Any,
    ) -> None:
        key, _ = self._key_source = find_key(api_key)
        self._headers: dict[str, str] = {"auth": key} if key else {}
        self._url_source: tuple[str | None, str] = (None, "nowhere")
        self._find_base_url(base_url)
        self.timeout = check_timeout("timeout", timeout)
        self.rate_limit = check_interval("rate_limit", rate_limit)
        self.max_retries = check_count("max_retries", max_retries, minimum=1)
        self.create_order_interval = check_number(
            "create_order_interval", create_order_interval, unit="seconds"
        )
        self.rate_limit_wait = check_interval("rate_limit_wait", rate_limit_wait)
        self._state_folder = state_folder(state_dir)
        self._redis = redis_server_for(rate_limiter)
        self.backoff = check_interval("backoff", backoff)
        self.max_backoff = check_interval("max_backoff", max_backoff)
        self.max_response_mb = check_number(
            "max_response_mb", max_response_mb, above=True, infinite=True, unit="megabytes"
        )
        self._user_agent = _user_agent(user_agent)
        self._sessions = Sessions(self._user_agent)
        self.server_clock: float | None = None

    def __copy__(self: H) -> H:
        """Return another client with the same settings and key."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._sessions = Sessions(self._user_agent)
        twin._headers = dict(self.headers)
        return twin

    def __deepcopy__(self: H, memo: dict[int, Any]) -> H:
        return self.__copy__()

    def __getstate__(self) -> Any:
        # Without the key, the pickle could load as a client of another account.
        raise TypeError(
            f"a {type(self).__name__} can't be pickled, because its key would be in the pickle: "
            f"create it in the other process, with {type(self).__name__}.from_env()"
        )

    def close(self) -> None:
        """Close the connections. The client can be used again; it then opens new ones."""
        self._sessions.close()

    # --- settings that can change later ---

    def _find_base_url(self, base_url: str | None) -> None:
        name, source = "base_url", "argument"
        if base_url is not None:
            check_text("base_url", base_url)
        elif base_url := os.environ.get(URL_VARIABLE):
            name, source = URL_VARIABLE, f"environment variable {URL_VARIABLE}"
        if not base_url:
            return
        self._url_source = (check_base_url(base_url, name), source)
        try:
            self.BASE_URL = self._url_source[0]
        except AttributeError:  # a subclass defines it as a property
            logger.debug("BASE_URL of %s can't be set", type(self).__name__)

    @property
    def base_url(self) -> str:
        """The current ``BASE_URL``, checked, without a trailing slash."""
        return check_base_url(self.BASE_URL, "BASE_URL")

    @property
    def api_key(self) -> str | None:
        """The API key, or None. Setting it changes ``headers``."""
        named = ((k, v) for k, v in self.headers.items() if isinstance(k, str))
        return next((v for k, v in named if k.lower() == "auth"), None)

    @api_key.setter
    def api_key(self, key: str | None) -> None:
        rest = {k: v for k, v in self.headers.items() if k.lower() != "auth"}
        if key:
            rest["auth"] = clean_key(key, "the attribute api_key")
        self._headers = rest

    def _described_key(self, key: str) -> str:
        """Return a text that names the end of a key, and where it comes from."""
        found, source = self._key_source
        if key != found:
            source = "attribute" if key == self.api_key else "the headers of the call"
        return f"a key that ends in {key_ending(key)!r}, from {source}"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of each request: ``{"auth": api_key}``, or ``{}`` without a key."""
        return self._headers

    @headers.setter
    def headers(self, headers: dict[str, str]) -> None:
        checked = check_headers("headers", headers)
        self._headers = {k: Secret.of(v) if k.lower() == "auth" else v for k, v in checked.items()}

    # --- requests ---

    def _request(
        self,
        method: str,
        endpoint: str,
        params: dict[str, Any] | None = None,
        json: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Make one API call, with rate limit and retries. Use it for endpoints without a method.

        Parameters:
            method: ``"GET"`` or ``"POST"``.
            endpoint: the path, for example ``"/v1/wallets"``.
            params: the query.
            json: the body.
            **kwargs: arguments for requests; ``headers`` are merged with the client's, ``timeout``
                overrides its timeout (seconds, or a ``(connect, read)`` pair).

        Returns:
            The API's response as a dict; its ``code`` is 0.

        Raises:
            CloreAPIError: the API responded with an error; see the subclasses.
            CloreConnectionError: no response arrived, and retries did not help.
            OutcomeUnknownError: a POST that changes something may or may not have taken effect.
            ValueError, TypeError: an argument is not valid; nothing was sent.

        Example:
            >>> client._request("GET", "/v1/wallets")["wallets"]
        """
        return self._make(self._prepare(method, endpoint, params, json, kwargs))

    def _read_marketplace(self) -> dict[str, Any]:
        """Make the call for the list of servers, for :class:`Marketplace`."""
        if is_request_replaced(self):
            return self._request("GET", "/v1/marketplace")  # a subclass or a fake expects dicts
        call = self._prepare("GET", "/v1/marketplace", None, None, {})
        call.lists_servers = True
        return self._make(call)

    def _make(self, call: Call) -> Envelope:
        """Make an API call, with rate limit and retries."""
        limiter = self._limiter(call.base_url, call.key)
        spacing = (call.name, self.create_order_interval) if call.rules.spaced else None
        turn = Turn(self.rate_limit, urgent=call.urgent, spacing=spacing)
        once = _limits.get().once
        sends, patience = (1, 0.0) if once else (self.max_retries, self.rate_limit_wait)
        retries = Retries(call, sends, patience)
        while True:
            turn.patience = retries.patience_left
            try:
                outcome = self._send(call, limiter, turn)
            except NotSentError as reason:
                raise retries.not_sent(reason.pause) from None
            if isinstance(outcome, Envelope):
                limiter.accepted(turn)
                outcome.sends = retries.sends + 1
                return outcome
            retries.add(outcome)
            turn.not_before = time.monotonic() + self._delay(outcome, retries, limiter, turn)
            retries.check(outcome, limiter.recently_refused)
            logger.log(
                logging.DEBUG if outcome.rate_limited and retries.refusals > 1 else logging.WARNING,
                "%s: attempt %d failed, retrying: %s",
                call.label, retries.sends, outcome.error,
            )  # fmt: skip

    def _limiter(self, base_url: str, key: str) -> RateLimiter:
        return limiter_for(base_url, key, self._state_folder, self._redis)

    def _prepare(
        self, method: str, endpoint: str, params: Any, json: Any, options: dict[str, Any]
    ) -> Call:
        session = self._sessions.take(reads=True)
        call = Call(
            session, method, endpoint, params, json, options, base_url=self.base_url,
            headers=self.headers, timeout=self.timeout, urgent=_limits.get().urgent,
        )  # fmt: skip
        self._sessions.put_back(session)
        return call

    def _delay(self, failure: Failure, retries: Retries, limiter: RateLimiter, turn: Turn) -> float:
        """Return the seconds before the next retry, except for the rate limit."""
        if not failure.rate_limited:
            return backoff_delay(retries.failures, self.backoff, self.max_backoff)
        limiter.refused(turn, failure.error.retry_after)
        return cancel_delay(retries.refusals, self.backoff) if turn.urgent else 0.0

    def _send(self, call: Call, limiter: RateLimiter, turn: Turn) -> Envelope | Failure:
        """Wait until the rate limit allows it, and send the request once."""
        deadline = _limits.get().deadline
        limiter.wait(turn, deadline)
        started_at = time.monotonic()
        settings = dict(call.settings)
        if (read_timeout := longest_part(settings["timeout"])) is not None:
            deadline = min(deadline, started_at + RESPONSE_TIMEOUTS * read_timeout)
        if deadline < math.inf:
            left = max(deadline - started_at, 0.001)
            settings["timeout"] = shortened(settings["timeout"], left)

        exchange.begin(
            lambda: limiter.before_send(turn, deadline), lambda: limiter.sent(turn), deadline
        )
        return self._exchange(call, settings, started_at)

    def _exchange(
        self, call: Call, settings: dict[str, Any], started_at: float
    ) -> Envelope | Failure:
        """Send a request, and read and classify its response."""
        session = self._sessions.take(call.reads)
        response = None
        outcome: Envelope | Failure
        try:
            response = session.send(call.request, **settings)
            body = read_body(response, self.max_response_mb * 1e6)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            outcome = classify_error(call, error, exchange.sent_at)
        except UnusableResponseError as error:
            outcome = classify_unusable(call, response, str(error))
        except OSError as error:  # a CA bundle or a certificate is missing
            raise ConfigurationError(f"{call.label} was not sent: {error}") from error
        else:
            outcome = self._classify(call, response, body, started_at)
        if isinstance(outcome, Failure) and response is not None:
            response.close()
        if call.reads:
            self._sessions.put_back(session)
        return outcome

    def _classify(
        self, call: Call, response: requests.Response, body: bytes, started_at: float
    ) -> Envelope | Failure:
        received_at = time.monotonic()
        # Connections of a SOCKS proxy don't record when a request is sent.
        sent_at = started_at if exchange.sent_at is None else exchange.sent_at
        logger.log(
            logging.INFO if call.rules.logged else logging.DEBUG,
            "%s: HTTP %d, %d bytes in %.3f s",
            call.label, response.status_code, len(body), received_at - sent_at,
        )  # fmt: skip
        outcome = classify(call, response, body)
        if isinstance(outcome, Envelope):
            outcome.date = response.headers.get("Date")
            outcome.sent_at, outcome.received_at = sent_at, received_at
            server_time = outcome.server_time_at(received_at)
            if server_time is not None:
                self.server_clock = server_time + 0.5 - time.time()
        else:
            outcome.error.sent_at = sent_at
            if isinstance(outcome.error, AuthenticationError) and call.key:
                outcome.error.add_hint(
                    f"the API refused {self._described_key(call.key)}: correct the key there, or "
                    "make a new one"
                )
        return outcome


ORIGINAL_REQUEST = HTTPClient._request


def is_request_replaced(client: Any) -> bool:
    """Return whether a subclass or a test has replaced ``_request``."""
    return getattr(client._request, "__func__", None) is not ORIGINAL_REQUEST
