"""Prepare an API call: what is sent, and what may be done with it."""

from __future__ import annotations

import email.utils
import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from requests.structures import CaseInsensitiveDict

from clore_client.config import (
    CONFIG_FILE,
    KEY_VARIABLE,
    check_key_may_go_to,
    clean_key,
    is_loopback,
)
from clore_client.errors import (
    SECRET_FIELDS,
    AuthenticationError,
    CloreConnectionError,
    CloreError,
    OrderOutcomeUnknownError,
    OutcomeUnknownError,
    printable,
)
from clore_client.validation import Timeout, check_headers, check_text, check_timeout, short_repr

URGENT_POSTS = frozenset({"cancel_order", "cancel_orders"})  # a waiting cancel costs money
SPACED_POSTS = frozenset({"create_order"})  # the API spaces these
KEYLESS_GETS = frozenset({"marketplace"})
REPEATABLE_POSTS = frozenset({"cancel_order", "cancel_orders", "set_spot_price"})
# Every other POST changes something, and is sent again only when it can't have had an effect.
LOGGED_POSTS = REPEATABLE_POSTS | SPACED_POSTS  # what costs or frees money


class Envelope(dict[str, Any]):
    """A decoded answer that remembers when it was asked for, and the server's clock."""

    __slots__ = ("date", "received_at", "sends", "sent_at")
    date: str | None
    received_at: float
    sent_at: float
    sends: int

    def server_time_at(self, moment: float) -> float | None:
        """The server's Unix time at a monotonic ``moment``, rounded down; None without a Date."""
        stamp = unix_time(self.date)
        return None if stamp is None else math.floor(stamp - (self.received_at - moment))


def unix_time(date: str | None) -> float | None:
    if not date:
        return None
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


# These are no dataclasses, here and elsewhere: that module costs a fifth of the import.
class Call:
    """A request that is ready to be sent, and what may be done with it."""

    def __init__(
        self,
        *,
        name: str,
        endpoint: str,
        request: requests.PreparedRequest,
        settings: dict[str, Any],
        base_url: str,
        key: str,
        repeatable: bool,
        urgent: bool,
        secrets: tuple[str, ...],
    ) -> None:
        self.name = name  # the endpoint's last part, as "create_order"
        self.endpoint = endpoint
        self.request = request
        self.settings = settings
        self.base_url = base_url
        self.key = key
        self.repeatable = repeatable
        self.urgent = urgent  # leaves whatever pause the server has asked for
        self.secrets = secrets

    def __repr__(self) -> str:
        return f"<Call {self.label}>"

    @property
    def label(self) -> str:
        return f"{self.request.method} {self.endpoint}"

    def lost(self, cause: str) -> CloreError:
        """The error for a request of which it is not known what became of it."""
        if self.repeatable:
            return CloreConnectionError(cause)
        if self.name == "create_order":
            return OrderOutcomeUnknownError(
                f"create_order was sent and got no clear answer ({cause}): the order may or may "
                "not have been made. It was not sent again. Look at get_orders() for it, also a "
                "minute from now, before you order again",
                endpoint=self.endpoint,
            )
        return OutcomeUnknownError(
            f"{self.label} was sent and got no clear answer ({cause}): it may or may not have been "
            "carried out. It was not sent again. Look at the state of your account first",
            endpoint=self.endpoint,
        )


def secrets_in(value: Any, inside: bool = False) -> Iterator[str]:
    """Every string of a body that must not be shown: all that stands under a secret's name."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from secrets_in(item, inside or str(name).lower() in SECRET_FIELDS)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from secrets_in(item, inside)
    elif inside and isinstance(value, str) and len(value) > 3:
        yield value


def check_endpoint(endpoint: Any) -> str:
    """Check a path such as ``"/v1/wallets"``: the key must not be led to another host."""
    check_text("endpoint", endpoint)
    fine = endpoint.startswith("/") and not endpoint.startswith("//") and endpoint.isprintable()
    if not fine or "\\" in endpoint or " " in endpoint or "/.." in endpoint:
        raise ValueError(
            f"endpoint must be a path like '/v1/wallets', not {printable(repr(endpoint), 80)}"
        )
    return str(endpoint)


def endpoint_name(endpoint: str) -> str:
    """Return the last part of a path, as ``"create_order"``."""
    path = unquote(urlsplit(endpoint).path)
    return path.rstrip("/").rsplit("/", 1)[-1].lower()


def prepare_call(
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
) -> Call:
    """Check the arguments of ``_request``, and prepare what is sent.

    Parameters:
        session: by which the request is prepared.
        method, endpoint, params, json: as for ``_request``.
        options: further arguments for requests.
        base_url, headers, timeout: of the client.
        urgent: whether the request leaves whatever pause the server has asked for.
    """
    if "allow_redirects" in options:
        raise ValueError("allow_redirects is refused: a redirect could lead the key elsewhere")
    method = check_text("method", method).upper()
    if not (method.isascii() and method.isalpha()):
        raise ValueError(f"method must be one like 'GET', not {short_repr(method)}")
    name = endpoint_name(check_endpoint(endpoint))
    all_headers = CaseInsensitiveDict(check_headers("headers", headers))
    all_headers.update(check_headers("headers", options.pop("headers", None) or {}))
    key = _check_key(all_headers, base_url, endpoint, name)
    timeout = check_timeout("timeout", options.pop("timeout", timeout))
    verify, cert, stream = (options.pop(k, None) for k in ("verify", "cert", "stream"))
    proxies = _proxies(base_url, options.pop("proxies", None))
    # Without an auth of its own, requests would send what it finds in ~/.netrc.
    options.setdefault("auth", _no_auth)
    try:
        request = session.prepare_request(
            requests.Request(
                method, base_url + endpoint, headers=all_headers, params=params, json=json,
                **options,
            )
        )  # fmt: skip
        secrets = tuple(dict.fromkeys([*([key] if key else []), *secrets_in(json)]))
    except requests.exceptions.InvalidJSONError as error:
        raise ValueError(f"json can't be sent as JSON: {error}") from None
    except RecursionError:
        raise ValueError("json can't be sent as JSON: it is nested too deeply") from None
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"json, params or another argument can't be sent: {error}") from None
    return Call(
        name=name,
        endpoint=endpoint,
        request=request,
        settings={
            "timeout": timeout,
            "allow_redirects": False,
            **session.merge_environment_settings(request.url, proxies, stream, verify, cert),
            "stream": True,  # the body is read piece by piece, up to a limit
        },
        base_url=base_url,
        key=key,
        repeatable=method in ("GET", "HEAD") or (method == "POST" and name in REPEATABLE_POSTS),
        urgent=name in URGENT_POSTS or urgent,
        secrets=secrets,
    )


def _proxies(base_url: str, given: Any) -> dict[str, Any]:
    proxies = dict(given or {})
    if is_loopback(base_url):
        # Over plain http a proxy from the environment would read the key.
        proxies = {"http": None, "https": None, "all": None, **proxies}
    return proxies


def _check_key(headers: Any, base_url: str, endpoint: str, name: str) -> str:
    """Return the key that goes out, which needs a safe way; few endpoints need none."""
    key: str = headers.get("auth") or ""
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
    return key


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
