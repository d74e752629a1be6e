"""Prepare an API call: check its arguments, and find the rules of its endpoint."""

from __future__ import annotations

import email.utils
import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from requests.structures import CaseInsensitiveDict

from clore_client.config import check_key_header, is_loopback
from clore_client.errors import (
    SECRET_FIELDS,
    CloreConnectionError,
    CloreError,
    OrderOutcomeUnknownError,
    OutcomeUnknownError,
)
from clore_client.validation import Timeout, check_headers, check_text, check_timeout, short_repr


class Envelope(dict[str, Any]):
    """A decoded response, with the times of the request and the server's clock.

    Attributes:
        date: its header ``Date``.
        sent_at, received_at: monotonic times.
        sends: how many times the request was sent.
    """

    date: str | None
    sent_at: float
    received_at: float
    sends: int

    def server_time_at(self, moment: float) -> float | None:
        """Return the server's Unix time at a monotonic ``moment``, rounded down.

        Returns None if the response had no Date.
        """
        stamp = unix_time(self.date)
        return None if stamp is None else math.floor(stamp - (self.received_at - moment))


def unix_time(date: str | None) -> float | None:
    """Return the Unix time in an HTTP header, or None."""
    if not date:
        return None
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


class Rules:
    """The rules for requests to one endpoint.

    Attributes:
        needs_key: whether it needs an API key.
        repeatable: whether sending it twice does no harm.
        urgent: whether it is sent before other requests, because waiting costs money.
        spaced: whether it has a longer interval, ``create_order_interval``.
        logged: whether it starts or stops costs.
    """

    needs_key = True
    repeatable = urgent = spaced = logged = False

    def __init__(self, **changes: bool) -> None:
        self.__dict__.update(changes)


# By HTTP method and the last part of the endpoint.
RULES = {
    ("POST", "create_order"): Rules(spaced=True, logged=True),
    ("POST", "cancel_order"): Rules(repeatable=True, urgent=True, logged=True),
    ("POST", "cancel_orders"): Rules(repeatable=True, urgent=True, logged=True),
    ("POST", "set_spot_price"): Rules(repeatable=True, logged=True),
    ("GET", "marketplace"): Rules(needs_key=False, repeatable=True),
}
OTHER_READ, OTHER_CHANGE = Rules(repeatable=True), Rules()


class Call:
    """Prepare an API call: check its arguments, build its request, find the rules for its retries.

    Parameters:
        session: prepares the request.
        method, endpoint, params, json: as for ``_request``.
        options: other arguments for requests.
        base_url, headers, timeout: the settings of the client.
        urgent: whether the request goes first, and ignores the pause that the server asks for.

    Attributes:
        name: the last part of the endpoint, such as ``"create_order"``.
        reads: whether the request only reads.
        settings: the arguments of ``Session.send``.
        key: the API key, or an empty string.
        secrets: the strings that no error may show.
        lists_servers: whether to keep the servers in the response as JSON text, if possible.

    Raises:
        AuthenticationError: the endpoint needs a key, and there is none.
        ConfigurationError, TypeError, ValueError: an argument is not valid.
    """

    lists_servers = False

    def __init__(
        self,
        session: requests.Session,
        method: str,
        endpoint: str,
        params: Any,
        json: Any,
        options: dict[str, Any],
        *,
        base_url: str,
        headers: dict[str, str],
        timeout: Timeout,
        urgent: bool,
    ) -> None:
        method = _check_method(method, options)
        self.endpoint, self.base_url = check_endpoint(endpoint), base_url
        self.label = f"{method} {endpoint}"
        path = unquote(urlsplit(endpoint).path)
        self.name = path.rstrip("/").rsplit("/", 1)[-1].lower()
        self.reads = method in ("GET", "HEAD")
        self.rules = RULES.get((method, self.name), OTHER_READ if self.reads else OTHER_CHANGE)
        self.urgent = self.rules.urgent or urgent
        all_headers = CaseInsensitiveDict(check_headers("headers", headers))
        if given_headers := options.pop("headers", None):
            all_headers.update(check_headers("headers", given_headers))
        self.key = check_key_header(all_headers, base_url, endpoint, self.rules.needs_key)
        timeout = check_timeout("timeout", options.pop("timeout", timeout))
        verify, cert = options.pop("verify", None), options.pop("cert", None)
        options.pop("stream", None)
        proxies = dict(options.pop("proxies", None) or {})
        if is_loopback(base_url):
            # A proxy from the environment could read the key over plain http.
            proxies = {"http": None, "https": None, "all": None, **proxies}
        self.request, secrets = _prepare_request(
            session, method=method, url=base_url + endpoint, headers=all_headers, params=params,
            json=json, **options,
        )  # fmt: skip
        self.secrets = (self.key, *secrets) if self.key else secrets
        # read_body() limits the size of a stream.
        merged = session.merge_environment_settings(self.request.url, proxies, True, verify, cert)
        self.settings: dict[str, Any] = {**merged, "allow_redirects": False, "timeout": timeout}

    def lost(self, cause: str) -> CloreError:
        """Make the error for a request that was sent and got no usable response."""
        if self.rules.repeatable:
            return CloreConnectionError(cause)
        if self.name == "create_order":
            return OrderOutcomeUnknownError(
                f"create_order was sent but got no clear response ({cause}): the order may or may "
                "not exist. It was not sent again. Check get_orders() now and again in a minute, "
                "before you order again",
                endpoint=self.endpoint,
            )
        return OutcomeUnknownError(
            f"{self.label} was sent but got no clear response ({cause}): it may or may not have "
            "taken effect. It was not sent again. Check the state of your account before you "
            "repeat it",
            endpoint=self.endpoint,
        )


def secrets_in(value: Any, inside: bool = False) -> Iterator[str]:
    """Yield every string in a body that must not be shown: the values of secret fields."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from secrets_in(item, inside or str(name).lower() in SECRET_FIELDS)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from secrets_in(item, inside)
    elif inside and isinstance(value, str) and len(value) > 3:
        yield value


def check_endpoint(endpoint: Any) -> str:
    """Check a path such as ``"/v1/wallets"``, so that the key can't go to another host."""
    check_text("endpoint", endpoint)
    fine = endpoint.startswith("/") and not endpoint.startswith("//") and endpoint.isprintable()
    if not fine or "\\" in endpoint or " " in endpoint or "/.." in endpoint:
        raise ValueError(f"endpoint must be a path like '/v1/wallets', not {short_repr(endpoint)}")
    return str(endpoint)


def _check_method(method: str, options: dict[str, Any]) -> str:
    """Return the method in upper case."""
    if "allow_redirects" in options:
        raise ValueError(
            "allow_redirects is not supported, as a redirect could send the key to another host: "
            "leave it out"
        )
    method = check_text("method", method).upper()
    if not (method.isascii() and method.isalpha()):
        raise ValueError(f"method must be one like 'GET', not {short_repr(method)}")
    return method


def _prepare_request(
    session: requests.Session, **arguments: Any
) -> tuple[requests.PreparedRequest, tuple[str, ...]]:
    """Return the request, and the secrets in its body."""
    # Without this, requests would send a password from ~/.netrc.
    arguments.setdefault("auth", lambda request: request)
    try:
        request = session.prepare_request(requests.Request(**arguments))
        return request, tuple(dict.fromkeys(secrets_in(arguments["json"])))
    except requests.exceptions.InvalidJSONError as error:
        raise ValueError(f"json can't be encoded as JSON: {error}") from None
    except RecursionError:
        raise ValueError("json can't be encoded as JSON: it is nested too deeply") from None
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"json, params or another argument can't be sent: {error}") from None
