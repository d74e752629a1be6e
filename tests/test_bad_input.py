"""Arguments that can't be right: an error that names them, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clore_client import CloreClient
from tests.conftest import FAST, FORMS
from tests.variant import Simulator

HUGE = 10**5000  # str() of it is a ValueError of Python's own


@pytest.fixture(scope="module", params=FORMS)
def bad_sim(request: pytest.FixtureRequest) -> Iterator[Simulator]:
    """One simulator in each form for all tests: hardly anything is sent to it."""
    with Simulator(**FAST, form=request.param) as simulator:
        yield simulator


@pytest.fixture
def any_sim(bad_sim: Simulator) -> Simulator:
    bad_sim.clear_requests()
    return bad_sim


def refused(sim: Simulator, call: Callable[[], object], name: str) -> str:
    """Return the text of the error; nothing may have been sent."""
    with pytest.raises((TypeError, ValueError), match=name) as caught:
        call()
    assert sim.requests == []
    return str(caught.value)


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


def test_what_can_not_be_sent_as_json(sim: Simulator, client: CloreClient) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for body in (nested, {"a": object()}, {"a": float("nan")}, {(1, 2): 3}):
        call = lambda body=body: client._request("POST", "/v1/x", json=body)  # noqa: E731
        refused(sim, call, "json")
