"""Whether an order has ended: only whole lists decide, and a late order is no missing one."""

from __future__ import annotations

import pytest

from clore_client import CloreConnectionError, CloreError, InvalidResponseError, OrderNotFoundError
from tests.conftest import MakeSim, client_for
from tests.test_client import plain_server


@pytest.mark.parametrize("orders", [None, {}, "x", 5, [{"si": 5, "id": None}], [7]])
def test_a_list_that_is_not_whole_decides_nothing(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch, orders: object
) -> None:
    monkeypatch.setattr("clore_client.client.LINGER", 0.3)
    sim = make_sim()
    client = client_for(sim, max_retries=1)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_order", "html_502")
    sim.faults.add("my_orders", "envelope", envelope={"code": 0, "orders": orders}, times=999)
    with pytest.raises(InvalidResponseError, match="502"):
        client.cancel_order(order["order_id"])
    assert sim.orders[0].active


def test_an_order_that_is_not_listed_yet_is_not_taken_for_a_missing_one(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clore_client.client.LINGER", 0.3)
    sim = make_sim(create_answer="order_id", visible_after=60.0)
    client = client_for(sim, max_retries=1)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_order", "html_502")
    with pytest.raises(InvalidResponseError, match="502") as caught:
        client.cancel_order(order["order_id"])
    assert caught.value.retryable
    assert client.cancel_order(order["order_id"]) is True
    assert not sim.orders[0].active


def test_lists_that_can_not_be_read_leave_the_first_error(
    make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clore_client.client.LINGER", 0.2)
    sim = make_sim()
    client = client_for(sim, max_retries=1)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_order", "lose_request")
    sim.faults.add("my_orders", "html_502", times=999)
    with pytest.raises(CloreConnectionError, match="after 1 retries"):
        client.cancel_order(order["order_id"])
    assert sim.orders[0].active


def test_an_unknown_order_after_a_doubt(make_sim: MakeSim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clore_client.client.LINGER", 0.2)
    sim = make_sim()
    sim.faults.add("cancel_order", "lose_request")
    with pytest.raises(OrderNotFoundError, match="no order 5 ") as caught:
        client_for(sim, max_retries=1).cancel_order(5)
    assert isinstance(caught.value.__cause__, CloreError)


def test_cancel_orders_after_a_lost_answer_names_only_what_is_left(make_sim: MakeSim) -> None:
    sim = make_sim(cancel_ended="refuse", cancel_lingers=0.3)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_orders", "lose_answer")
    assert client.cancel_orders([order["order_id"]])["failed_to_cancel"] == []
    assert not sim.orders[0].active
