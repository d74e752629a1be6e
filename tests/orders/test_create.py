"""Purchases: a lost response never causes a second order."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clore_client import (
    AuthenticationError,
    CloreClient,
    CurrencyNotAllowedError,
    DatabaseError,
    OrderOutcomeUnknownError,
    ServerAlreadyRentedError,
    SpendingLimitError,
)
from tests.conftest import FORMS, MakeSim, client_for, sent_to, until
from tests.orders.test_credentials import in_a_second_process
from tests.test_client import plain_server
from tests.variant import Simulator

COMMITTED = [
    ("lose_response", {}),
    ("hang_after_commit", {}),
    ("reset_mid_body", {}),
    ("http_500_after_commit", {}),
    ("code_1", {"after_commit": True}),
    ("truncated_json", {}),
    ("not_json", {}),
    ("no_code", {}),
    ("commit_late", {"seconds": 0.3}),
    *[("html_502", {"status": s, "after_commit": True}) for s in (500, 502, 504, 524)],
]
NOT_COMMITTED = ["lose_request", "html_502", "hang"]


@pytest.mark.parametrize("form", ["live", "documented"])
@pytest.mark.parametrize(("kind", "options"), COMMITTED)
def test_after_a_lost_response_the_order_is_found(
    make_sim: MakeSim, kind: str, options: dict[str, Any], form: str
) -> None:
    sim = make_sim(form=form)
    client = client_for(sim, timeout=0.5)
    sim.faults.add("create_order", kind, **options)
    order = client.create_order(plain_server(client), find_timeout=20)
    (made,) = sim.orders
    assert order["order_id"] == made.id
    assert order["code"] == 0
    assert order["ssh_password"] == made.body["ssh_password"]
    assert len(sent_to(sim, "create_order")) == 1


@pytest.mark.parametrize("timeout", [60, (60, 60), None])
def test_a_list_that_hangs_does_not_use_all_the_time(make_sim: MakeSim, timeout: Any) -> None:
    """Use the ratio of the defaults: 30 s for a response, and 30 s for the search."""
    sim = make_sim()
    client = client_for(sim, timeout=timeout, max_retries=1)
    server_id = plain_server(client)
    sim.faults.add("my_orders", "hang")
    order = client.create_order(server_id, find_timeout=6)
    assert order["order_id"] == sim.orders[0].id


@pytest.mark.parametrize("kind", NOT_COMMITTED)
def test_an_order_that_was_not_made_has_an_unknown_outcome(make_sim: MakeSim, kind: str) -> None:
    sim = make_sim()
    client = client_for(sim, timeout=0.3)
    server_id = plain_server(client)
    sim.faults.add("create_order", kind)
    with pytest.raises(OrderOutcomeUnknownError, match="may have been made") as caught:
        client.create_order(server_id, find_timeout=0.3)
    assert caught.value.server_id == server_id
    assert caught.value.credentials["ssh_password"]
    assert isinstance(caught.value.__cause__, OrderOutcomeUnknownError)
    assert len(sent_to(sim, "create_order")) == 1
    assert not sim.orders


@pytest.mark.parametrize("kind", ["http_500_before_commit", "code_1"])
def test_after_code_1_and_complete_lists_the_refusal_is_raised(
    make_sim: MakeSim, kind: str
) -> None:
    sim = make_sim()
    client = client_for(sim)
    sim.faults.add("create_order", kind)
    with pytest.raises(DatabaseError, match="empty wallet"):
        client.create_order(plain_server(client), find_timeout=0.3)
    assert len(sent_to(sim, "create_order")) == 1


@pytest.mark.parametrize(
    "body", ['{"code": 2}', '{"code": 6}', '{"code": 99, "error": "eh"}'], ids=["2", "6", "99"]
)
@pytest.mark.parametrize("after_commit", [True, False])
def test_after_http_5xx_the_outcome_is_unknown(
    sim: Simulator, client: CloreClient, body: str, after_commit: bool
) -> None:
    server_id = plain_server(client)
    sim.faults.add("create_order", "status", status=503, body=body, after_commit=after_commit,
                   content_type="application/json")  # fmt: skip
    if after_commit:
        assert client.create_order(server_id)["order_id"] == sim.orders[0].id
    else:
        with pytest.raises(OrderOutcomeUnknownError, match="may have been made"):
            client.create_order(server_id, find_timeout=0.2)
    assert len(sent_to(sim, "create_order")) == 1


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ('{"code": 6, "error": "server-already-rented"}', ServerAlreadyRentedError),
        ('{"code": 3}', AuthenticationError),
    ],
)
def test_http_500_with_a_reason_is_a_refusal(
    sim: Simulator, client: CloreClient, body: str, error: type[Exception]
) -> None:
    server_id = plain_server(client)
    sim.faults.add("create_order", "status", body=body, content_type="application/json")
    with pytest.raises(error):
        client.create_order(server_id)
    assert len(sent_to(sim, "my_orders")) == 1  # before it was sent, and no search after it


def test_the_limit_of_orders_holds_for_threads_that_order_at_once(make_sim: MakeSim) -> None:
    sim = make_sim(visible_after=0.2)
    servers = [s["id"] for s in client_for(sim).find_servers(min_reliability=90)[:4]]
    clients = [client_for(sim, max_active_orders=1) for _ in servers]

    def order(pair: tuple[CloreClient, int]) -> bool:
        try:
            pair[0].create_order(pair[1], currency="USD")
        except SpendingLimitError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(order, zip(clients, servers, strict=True))) == 1
    assert len(sim.orders) == 1


def test_after_code_1_without_lists_the_outcome_is_unknown(make_sim: MakeSim) -> None:
    sim = make_sim()
    client = client_for(sim)
    server_id = plain_server(client)
    sim.faults.add("create_order", "http_500_after_commit")
    sim.faults.add("my_orders", "html_502", times=999)
    with pytest.raises(OrderOutcomeUnknownError):
        client.create_order(server_id, find_timeout=0.2)


def test_an_unresolved_order_is_searched_again_before_a_refusal_is_raised(
    make_sim: MakeSim,
) -> None:
    sim = make_sim(visible_after=0.5)
    client = client_for(sim)
    server_id = plain_server(client)
    sim.faults.add("create_order", "lose_response")
    with pytest.raises(OrderOutcomeUnknownError):
        client.create_order(server_id, find_timeout=0.05)
    order = client_for(sim).create_order(server_id, find_timeout=20)
    (made,) = sim.orders
    assert order["order_id"] == made.id
    assert order["ssh_password"] == made.body["ssh_password"]
    with pytest.raises(ServerAlreadyRentedError):
        client.create_order(server_id)


def test_a_server_rented_by_somebody_else_is_not_searched_for(make_sim: MakeSim) -> None:
    sim = make_sim()
    client = client_for(sim)
    server_id = plain_server(client)
    sim.set_rented(server_id)
    with pytest.raises(ServerAlreadyRentedError):
        client.create_order(server_id)
    assert len(sent_to(sim, "my_orders")) == 1  # before it was sent


def test_an_interrupted_purchase_is_remembered(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim = make_sim(visible_after=0.3)
    client = client_for(sim)
    server_id = plain_server(client)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.create_order(server_id)
    monkeypatch.undo()
    time.sleep(0.3)
    assert client.create_order(server_id)["order_id"] == sim.orders[0].id
    assert len(sim.orders) == 1


# --- limits and previews ---


@pytest.mark.parametrize("form", ["live", "documented"])
def test_a_limit_of_the_price(make_sim: MakeSim, form: str) -> None:
    sim = make_sim(form=form)
    rich = client_for(sim)
    server = rich.find_servers("RTX 4090", min_reliability=96)[0]
    usd = server.usd_per_hour or 0.0
    client = client_for(sim, max_usd_per_hour=usd * 0.99)
    bid: dict[str, Any] = {"order_type": "spot", "spot_price": usd * 0.995}
    attempts: list[Callable[[], Any]] = [
        lambda: client.create_order(server["id"]),
        lambda: client.create_order(server["id"], currency="BTC"),
        lambda: client.create_order(7),
        lambda: client.create_order(server["id"], **bid),
    ]
    for attempt in attempts:
        with pytest.raises(SpendingLimitError, match="max_usd_per_hour"):
            attempt()
    assert not sent_to(sim, "create_order")
    low = (server.spot_usd_per_hour or 0.0) * 1.05
    order = client.create_order(server["id"], order_type="spot", spot_price=low)
    with pytest.raises(SpendingLimitError, match="bid for order"):
        client.set_spot_price(order["order_id"], usd)
    assert not sent_to(sim, "set_spot_price")


def test_a_limit_uses_the_current_price(make_sim: MakeSim) -> None:
    sim = make_sim()
    client = client_for(sim, max_usd_per_hour=0.5)
    server_id = plain_server(client)
    sim.set_price(server_id, 24.0)
    with pytest.raises(SpendingLimitError, match="costs 1 USD per hour"):
        client.create_order(server_id)
    sim.set_price(server_id, 2.4)
    assert client.create_order(server_id).id


def test_a_limit_of_the_number_of_orders(make_sim: MakeSim) -> None:
    sim = make_sim(create_answer="order_id", visible_after=5.0)
    client = client_for(sim, max_active_orders=1)
    order = client.create_order(plain_server(client))
    with pytest.raises(SpendingLimitError, match=str(order["order_id"])):
        client.create_order(plain_server(client))
    client.cancel_order(order["order_id"])
    assert client.create_order(plain_server(client)).id
    with pytest.raises(SpendingLimitError):
        client_for(sim, max_active_orders=0).create_order(plain_server(client))


@pytest.mark.parametrize("form", FORMS)
def test_after_code_1_the_order_of_another_process_is_not_taken(
    make_sim: MakeSim, tmp_path: Path, form: str
) -> None:
    """The other order is not listed yet when this one is sent, and the API returns code 1."""
    sim = make_sim(form=form, visible_after=5.0)
    client = client_for(sim, state_dir=tmp_path)
    client.get_orders()
    server_id = plain_server(client)
    code = "print(client.create_order(int(argument[0]))['order_id'])"
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(in_a_second_process, sim, tmp_path, code, server_id)
        until(lambda: sim.orders)
        time.sleep(2.5)  # the Date of a response has no fractions of a second
        sim.faults.add("create_order", "code_1")
        with pytest.raises(DatabaseError):
            client.create_order(server_id, find_timeout=5.0)
        assert int(other.result()) == sim.orders[0].id
    assert len(sim.orders) == 1


def test_invalid_limits() -> None:
    bad: list[dict[str, Any]] = [
        {"max_usd_per_hour": -1},
        {"max_usd_per_hour": float("nan")},
        {"max_active_orders": 1.5},
        {"max_active_orders": -1},
    ]
    for options in bad:
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            CloreClient("k", **options)


@pytest.mark.parametrize("form", ["live", "documented"])
def test_a_preview_sends_nothing(make_sim: MakeSim, form: str) -> None:
    sim = make_sim(form=form)
    client = client_for(sim)
    server = client.find_servers("RTX 4090", min_reliability=96)[0]
    shown = client.create_order(server["id"], "img", ssh_password="x", preview=True)
    assert shown["usd_per_hour"] == shown.usd_per_hour == pytest.approx(server.usd_per_hour)
    assert "x" not in repr(shown).replace("usd_per_hour", "")
    bid = (server.spot_usd_per_hour or 0) * 1.1
    spot = client.create_order(server["id"], order_type="spot", spot_price=bid, preview=True)
    assert spot.usd_per_hour == pytest.approx(bid)
    assert not sent_to(sim, "create_order")
    client.create_order(server["id"], "img", ssh_password="x")
    assert sent_to(sim, "create_order")[0].body == shown["body"]


def test_a_refused_currency_says_how_to_find_a_server(sim: Simulator, client: CloreClient) -> None:
    sim.faults.add(
        "create_order", "envelope", envelope={"code": 6, "error": "currency-not-allowed"}
    )
    text = (
        "does not accept CLORE-Blockchain: choose a server found with currency='CLORE-Blockchain'"
    )
    with pytest.raises(CurrencyNotAllowedError, match=text):
        client.create_order(plain_server(client))
    assert sim.orders == []
