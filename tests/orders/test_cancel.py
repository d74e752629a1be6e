"""Cancels: an order has ended only if complete lists show it."""

from __future__ import annotations

import pickle

import pytest

from clore_client import (
    CancelUnconfirmedError,
    CloreError,
    OrderNotFoundError,
    WaitTimeoutError,
)
from tests.conftest import MakeSim, client_for
from tests.test_client import plain_server
from tests.variant import inside


@pytest.mark.parametrize("orders", [None, {}, "x", 5, [{"si": 5, "id": None}], [7]])
def test_an_incomplete_list_is_ignored(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch, orders: object
) -> None:
    monkeypatch.setattr(inside("orders.cancel.SETTLE_TIMEOUT"), 0.3)
    sim = make_sim()
    client = client_for(sim, max_retries=1)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_order", "html_502", times=999)
    sim.faults.add("my_orders", "envelope", envelope={"code": 0, "orders": orders}, times=999)
    with pytest.raises(CancelUnconfirmedError, match="502"):
        client.cancel_order(order["order_id"])
    assert sim.orders[0].active


@pytest.mark.parametrize("code", [3, 5])
def test_a_refusal_says_that_the_order_may_still_run(make_sim: MakeSim, code: int) -> None:
    sim = make_sim()
    client = client_for(sim, max_retries=2)
    order_id = client.create_order(plain_server(client))["order_id"]
    sim.faults.add("cancel_order", "envelope", envelope={"code": code}, times=999)
    with pytest.raises(CloreError, match=f"order {order_id} may still be running"):
        client.cancel_order(order_id)
    assert sim.orders[0].active


def test_an_order_that_is_not_listed_yet_is_not_missing(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside("orders.cancel.SETTLE_TIMEOUT"), 0.3)
    sim = make_sim(create_answer="order_id", visible_after=60.0)
    client = client_for(sim, max_retries=1)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_order", "html_502", times=999)
    with pytest.raises(CancelUnconfirmedError, match="502") as caught:
        client.cancel_order(order["order_id"])
    assert caught.value.retryable
    sim.faults.clear()
    assert client.cancel_order(order["order_id"]) is True
    assert not sim.orders[0].active


def test_without_lists_the_first_error_is_raised(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside("orders.cancel.SETTLE_TIMEOUT"), 0.2)
    sim = make_sim()
    client = client_for(sim, max_retries=1)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_order", "lose_request", times=999)
    sim.faults.add("my_orders", "html_502", times=999)
    with pytest.raises(CancelUnconfirmedError, match="after 1 retries"):
        client.cancel_order(order["order_id"])
    assert sim.orders[0].active


def test_an_unknown_order_after_a_lost_response(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside("orders.cancel.SETTLE_TIMEOUT"), 0.2)
    sim = make_sim()
    sim.faults.add("cancel_order", "lose_request")
    with pytest.raises(OrderNotFoundError, match="no order 5 ") as caught:
        client_for(sim, max_retries=1, order_lag=0.1).cancel_order(5)
    assert isinstance(caught.value.__cause__, CloreError)


def test_cancel_orders_after_a_lost_response_names_only_active_orders(make_sim: MakeSim) -> None:
    sim = make_sim(cancel_ended="refuse", cancel_lingers=0.3)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_orders", "lose_response")
    assert client.cancel_orders([order["order_id"]])["failed_to_cancel"] == []
    assert not sim.orders[0].active


@pytest.mark.parametrize("form", ["live", "documented"])
def test_a_confirmed_cancel_waits_until_the_order_is_not_listed(
    make_sim: MakeSim, form: str
) -> None:
    sim = make_sim(form=form, cancel_lingers=0.4)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    client.wait_for_order(order["order_id"], timeout=20, poll_interval=0.02)
    assert client.cancel_order(order["order_id"], confirm=True) is True
    assert client.get_orders() == []
    again = client.create_order(plain_server(client))
    assert client.cancel_order(again["order_id"], confirm=True) is True
    assert client.get_orders() == []


def test_a_cancel_that_is_not_confirmed_in_time(make_sim: MakeSim) -> None:
    sim = make_sim(cancel_lingers=60.0)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    with pytest.raises(CancelUnconfirmedError, match=r"still active after 0\.3s") as caught:
        client.cancel_order(order["order_id"], confirm=True, confirm_timeout=0.3)
    assert caught.value.order_id == order["order_id"]
    assert caught.value.retryable
    assert pickle.loads(pickle.dumps(caught.value)).order_ids == caught.value.order_ids


@pytest.mark.parametrize("form", ["live", "documented"])
def test_cancel_all(make_sim: MakeSim, form: str) -> None:
    sim = make_sim(form=form)
    client = client_for(sim)
    assert client.cancel_all() == []
    ids = [client_for(sim).create_order(plain_server(client))["order_id"] for _ in range(3)]
    client.wait_for_order(ids[-1], timeout=20, poll_interval=0.02)
    ids.append(client.create_order(plain_server(client))["order_id"])
    sim.faults.add("cancel_orders", "lose_response")
    assert set(client.cancel_all()) == set(ids)
    assert not any(order.active for order in sim.orders)


def test_cancel_all_names_the_orders_that_still_run(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside("orders.cancel.SETTLE_TIMEOUT"), 0.2)
    sim = make_sim()
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    client.wait_for_order(order["order_id"], timeout=20, poll_interval=0.02)
    answer = {"code": 0, "failed_to_cancel": [str(order["order_id"])]}
    sim.faults.add("cancel_orders", "envelope", envelope=answer)
    sim.faults.add("cancel_order", "html_502", times=999)
    with pytest.raises(CancelUnconfirmedError) as caught:
        client.cancel_all()
    assert caught.value.order_ids == (order["order_id"],)


def test_waiting_calls_on_update(make_sim: MakeSim) -> None:
    sim = make_sim(create_answer="order_id", visible_after=0.2, deploy_after=0.6)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    seen: list[str | None] = []
    client.wait_for_order(order["order_id"], 20, 0.02,
                          on_update=lambda o: seen.append(o.status if o else None))  # fmt: skip
    assert list(dict.fromkeys(seen)) == [None, "creating", "running"]
    with pytest.raises(TypeError, match="on_update"):
        client.wait_for_order(5, on_update=5)  # type: ignore[arg-type]


def test_a_wait_timeout_names_the_last_status(make_sim: MakeSim) -> None:
    sim = make_sim(create_answer="order_id", visible_after=0.3, deploy_after=60.0)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    with pytest.raises(WaitTimeoutError) as caught:
        client.wait_for_order(order["order_id"], 0.05, 0.02)
    assert caught.value.reason == "never showed up"
    with pytest.raises(WaitTimeoutError) as caught:
        client.wait_for_order(order["order_id"], 0.6, 0.02)
    assert caught.value.reason == "still creating"
