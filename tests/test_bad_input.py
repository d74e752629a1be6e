"""Invalid arguments: an error names them before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, CloreError
from tests.conftest import FAST, FORMS
from tests.variant import Simulator

HUGE = 10**5000  # str() of it raises a ValueError
TOO_LONG = "x" * 5000  # longer than a path and a name in it may be
ORDER = {"order_id": 5, "connection": {"ssh": "ssh root@127.0.0.1 -p 9", "http_ports": {}}}


def by_type(value: object) -> str:
    """Return the name of a parameter, even if its str() fails."""
    return type(value).__name__


@pytest.fixture(scope="module", params=FORMS)
def bad_sim(request: pytest.FixtureRequest) -> Iterator[Simulator]:
    """Return one simulator in each form, for all tests of this file."""
    with Simulator(**FAST, form=request.param) as simulator:
        yield simulator


@pytest.fixture
def any_sim(bad_sim: Simulator) -> Simulator:
    bad_sim.clear_requests()
    return bad_sim


CALLS: dict[str, Callable[[CloreClient], object]] = {
    "get_marketplace": lambda c: c.get_marketplace(),
    "get_wallets": lambda c: c.get_wallets(),
    "get_orders": lambda c: c.get_orders(),
    "create_order": lambda c: c.create_order(5),
    "cancel_order": lambda c: c.cancel_order(5),
    "cancel_orders": lambda c: c.cancel_orders([5]),
    "set_spot_price": lambda c: c.set_spot_price(5, 0.1),
    "get_spot_market": lambda c: c.get_spot_market(5),
    "_request": lambda c: c._request("GET", "/v1/wallets"),
}


def refused(sim: Simulator, call: Callable[[], object], name: str) -> str:
    """Return the text of the error, and check that nothing was sent."""
    with pytest.raises((TypeError, ValueError), match=name) as caught:
        call()
    assert sim.requests == []
    return str(caught.value)


# Settings that are changed on the client


@pytest.mark.parametrize("url", [5, None, b"http://x", ["http://x"], HUGE, {}], ids=by_type)
def test_a_base_url_that_is_not_a_string(
    any_sim: Simulator, any_client: CloreClient, url: Any
) -> None:
    any_client.BASE_URL = url
    for call in CALLS.values():
        text = refused(any_sim, lambda call=call: call(any_client), "BASE_URL must be a string")  # type: ignore[misc]
        assert type(url).__name__ in text


def test_a_base_url_of_a_subclass_that_is_not_a_string(sim: Simulator) -> None:
    class Mine(CloreClient):
        BASE_URL = 5  # type: ignore[assignment]

    refused(sim, Mine("key").get_wallets, "BASE_URL must be a string")


@pytest.mark.parametrize("url", ["", " ", "ftp://x", "127.0.0.1", "http://"])
def test_a_base_url_that_can_not_be_used(sim: Simulator, client: CloreClient, url: str) -> None:
    client.BASE_URL = url
    refused(sim, client.get_wallets, "BASE_URL must be")


@pytest.mark.parametrize(
    "headers", [{5: "x"}, {None: "x"}, {b"auth": "x"}, {"X-A": 5}, {"X-A": HUGE}, {"": "x"},
                {"X-A": "a\nb"}, {"X A": "b"}, {"X-A": "\u20ac"}],
    ids=by_type,
)  # fmt: skip
def test_headers_that_can_not_be_sent(
    any_sim: Simulator, any_client: CloreClient, headers: Any
) -> None:
    client = any_client
    refused(any_sim, lambda: setattr(client, "headers", headers), "headers")
    assert client.headers == {"auth": any_sim.api_key}
    client.headers.update(headers)  # the setter is not called
    for call in CALLS.values():
        refused(any_sim, lambda call=call: call(client), "headers")  # type: ignore[misc]
    assert "a key" in repr(client)
    assert client.api_key == any_sim.api_key


@pytest.mark.parametrize("headers", [5, "auth", [("auth", "x")], [5], None, HUGE], ids=by_type)
def test_headers_that_are_not_a_dict(sim: Simulator, client: CloreClient, headers: Any) -> None:
    refused(sim, lambda: setattr(client, "headers", headers), "headers must be a dict")
    if headers is not None:
        call = lambda: client._request("GET", "/v1/wallets", headers=headers)  # noqa: E731
        refused(sim, call, "headers must be a dict")


def test_valid_headers_are_sent(sim: Simulator, client: CloreClient) -> None:
    client.headers = {**client.headers, "X-A": "b", "X-B": b"c"}  # type: ignore[dict-item]
    client._request("GET", "/v1/wallets", headers={"X-C": "d", "X-A": None})
    sent = sim.requests[0].headers
    assert (sent.get("X-A"), sent.get("X-B"), sent.get("X-C")) == (None, "c", "d")


# Integers of thousands of digits

HUGE_CALLS: list[tuple[str, Callable[[CloreClient], object]]] = [
    ("server_id", lambda c: c.create_order(HUGE)),
    ("server_id", lambda c: c.create_order(-HUGE)),
    ("image", lambda c: c.create_order(5, HUGE)),  # type: ignore[arg-type]
    ("order_type", lambda c: c.create_order(5, order_type=HUGE)),  # type: ignore[arg-type]
    ("currency", lambda c: c.create_order(5, currency=HUGE)),  # type: ignore[arg-type]
    ("ports", lambda c: c.create_order(5, ports={HUGE: "tcp"})),  # type: ignore[dict-item]
    ("ports", lambda c: c.create_order(5, ports={"22": HUGE})),  # type: ignore[dict-item]
    ("ports", lambda c: c.create_order(5, ports=[HUGE])),  # type: ignore[arg-type]
    ("env", lambda c: c.create_order(5, env={HUGE: "x"})),  # type: ignore[dict-item]
    ("env", lambda c: c.create_order(5, env={"A": HUGE})),  # type: ignore[dict-item]
    ("ssh_password", lambda c: c.create_order(5, ssh_password=HUGE)),  # type: ignore[arg-type]
    ("spot_price", lambda c: c.create_order(5, order_type="spot", spot_price=HUGE)),
    ("find_timeout", lambda c: c.create_order(5, find_timeout=HUGE)),
    ("preview", lambda c: c.create_order(5, preview=HUGE)),  # type: ignore[arg-type]
    ("order_id", lambda c: c.get_order(HUGE)),
    ("order_id", lambda c: c.cancel_order(HUGE)),
    ("issue", lambda c: c.cancel_order(5, HUGE)),  # type: ignore[arg-type]
    ("confirm_timeout", lambda c: c.cancel_order(5, confirm_timeout=-HUGE)),
    ("order_ids", lambda c: c.cancel_orders([5, HUGE])),
    ("order_ids", lambda c: c.cancel_orders(HUGE)),  # type: ignore[arg-type]
    ("order_id", lambda c: c.wait_for_order(HUGE)),
    ("timeout", lambda c: c.wait_for_order(5, HUGE)),
    ("poll_interval", lambda c: c.wait_for_order(5, 1, HUGE)),
    ("target_status", lambda c: c.wait_for_order(5, 1, 1, HUGE)),  # type: ignore[arg-type]
    ("order_id", lambda c: c.set_spot_price(HUGE, 0.1)),
    ("new_price", lambda c: c.set_spot_price(5, HUGE)),
    ("server_id", lambda c: c.get_spot_market(HUGE)),
    ("gpu_type", lambda c: c.find_servers(HUGE)),  # type: ignore[arg-type]
    ("max_price_usd", lambda c: c.find_servers(None, HUGE)),
    ("min_reliability", lambda c: c.find_cheapest(None, None, HUGE)),
    ("currency", lambda c: c.get_balance(HUGE)),  # type: ignore[arg-type]
    ("server_id", lambda c: c.rent(server_id=HUGE)),
    ("attempts", lambda c: c.rent(attempts=HUGE)),
    ("max_hours", lambda c: c.rent(max_hours=HUGE)),
    ("wait", lambda c: c.leftovers(wait=HUGE)),
    ("json", lambda c: c._request("POST", "/v1/x", json={"a": HUGE})),
    ("params", lambda c: c._request("GET", "/v1/x", params={"a": HUGE})),
    ("timeout", lambda c: c._request("GET", "/v1/x", timeout=HUGE)),
    ("endpoint", lambda c: c._request("GET", HUGE)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("name", "call"), HUGE_CALLS)
def test_an_integer_of_thousands_of_digits(
    any_sim: Simulator, any_client: CloreClient, name: str, call: Callable[[CloreClient], object]
) -> None:
    text = refused(any_sim, lambda: call(any_client), name)
    assert len(text) < 500


@pytest.mark.parametrize("value", [10**18, 2**63, 10**400])
def test_an_id_has_at_most_18_digits(sim: Simulator, client: CloreClient, value: int) -> None:
    refused(sim, lambda: client.get_order(value), "order_id")
    refused(sim, lambda: client.create_order(value), "server_id")
    assert client.get_order(10**18 - 1) is None


@pytest.mark.parametrize(
    "option", ["timeout", "rate_limit", "max_retries", "create_order_interval", "backoff",
               "max_usd_per_hour", "max_active_orders", "max_response_mb", "order_lag",
               "user_agent", "base_url", "state_dir"],
)  # fmt: skip
def test_an_integer_of_thousands_of_digits_as_a_setting(option: str) -> None:
    with pytest.raises((TypeError, ValueError), match=option):
        CloreClient("key", **{option: HUGE})  # type: ignore[arg-type]


def test_values_that_can_not_be_sent_as_json(sim: Simulator, client: CloreClient) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for body in (nested, {"a": object()}, {"a": float("nan")}, {(1, 2): 3}):
        call = lambda body=body: client._request("POST", "/v1/x", json=body)  # noqa: E731
        refused(sim, call, "json")


# Callbacks


@pytest.mark.parametrize(
    "callback", [5, "print", lambda: None, lambda order, more: None, lambda *, order: None, HUGE],
    ids=by_type,
)  # fmt: skip
def test_an_on_update_that_can_not_take_an_order(
    any_sim: Simulator, any_client: CloreClient, callback: Any
) -> None:
    refused(any_sim, lambda: any_client.wait_for_order(5, 1, on_update=callback), "on_update")


@pytest.mark.parametrize(
    "callback", [print, [].append, lambda order: None, lambda *orders: None,
                 lambda order, more=None: None, type("C", (), {"__call__": lambda s, o: None})()],
    ids=by_type,
)  # fmt: skip
def test_an_on_update_that_takes_an_order(
    sim: Simulator, client: CloreClient, callback: Any
) -> None:
    with pytest.raises(CloreError, match="no order 5 "):
        client.wait_for_order(5, 0.01, 0.01, on_update=callback)


# Local paths


@pytest.mark.parametrize("path", [TOO_LONG, "a/" + "x" * 256, "a/" * 3000, Path(TOO_LONG)])
def test_a_local_path_that_is_too_long(
    any_sim: Simulator, any_client: CloreClient, path: Any
) -> None:
    refused(any_sim, lambda: any_client.upload(ORDER, path, "x"), "local is too long")
    refused(any_sim, lambda: any_client.download(ORDER, "x", path), "local is too long")
    text = refused(
        any_sim, lambda: any_client.connect_ssh(ORDER, key_path=path), "key_path is too long"
    )
    assert len(text) < 500
    refused(any_sim, lambda: CloreClient("key", state_dir=path), "state_dir is too long")


def test_the_longest_local_path(sim: Simulator, client: CloreClient) -> None:
    with pytest.raises(FileNotFoundError, match="local"):
        client.upload(ORDER, "x" * 255, "x")
