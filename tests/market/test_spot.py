"""Bids: their conversion from USD per hour, and refused bids."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from clore_client import (
    BidTooLowError,
    CloreClient,
    CloreError,
    OrderNotFoundError,
    RateUnknownError,
    SpotPriceStepError,
    SpotPriceTooSoonError,
)
from tests.conftest import MakeSim, client_for, sent_to
from tests.variant import Simulator

RATES = {"bitcoin": 68022.87, "CLORE-Blockchain": 0.002705, "USD-Blockchain": 1}


def spot_server(client: CloreClient) -> tuple[int, float]:
    server = client.find_servers("RTX 4090", min_reliability=96, use_spot=True)[0]
    assert server.spot_usd_per_hour is not None
    return server["id"], server.spot_usd_per_hour


@pytest.mark.parametrize("currency", ["bitcoin", "CLORE-Blockchain", "USD-Blockchain"])
def test_a_bid_is_sent_per_day_in_the_currency(
    sim: Simulator, client: CloreClient, currency: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server_id, minimum = spot_server(client)
    usd = minimum * 1.2
    order = client.create_order(server_id, order_type="spot", currency=currency, spot_price=usd)
    sent = sent_to(sim, "create_order")[0].body["spotprice"]
    assert sent == pytest.approx(usd * 24 / RATES[currency])
    assert order["price"] == pytest.approx(usd / RATES[currency])
    assert order.usd_per_hour == pytest.approx(usd)
    assert f"{usd:g} USD per hour" in caplog.text
    assert f"{sent:.8g} {currency} per day" in caplog.text
    assert client.set_spot_price(order["order_id"], usd * 1.1) is True
    changed = sent_to(sim, "set_spot_price")[0].body
    assert changed["order_id"] == order["order_id"]
    assert changed["desired_price"] == pytest.approx(usd * 1.1 * 24 / RATES[currency])
    assert len(sent_to(sim, "spot_marketplace")) == 1
    offers = client.get_spot_market(server_id)["market"]["offers"]
    mine = next(offer for offer in offers if offer["my"])
    assert mine["usd_per_hour"] == pytest.approx(usd * 1.1)


def test_the_documented_form_takes_usd_per_hour(make_sim: MakeSim) -> None:
    sim = make_sim(form="documented")
    client = client_for(sim)
    server_id, minimum = spot_server(client)
    order = client.create_order(server_id, order_type="spot", spot_price=minimum * 1.1)
    assert sent_to(sim, "create_order")[0].body["spotprice"] == minimum * 1.1
    assert client.set_spot_price(order["order_id"], minimum * 1.2) is True
    assert sent_to(sim, "set_spot_price")[0].body["desired_price"] == minimum * 1.2
    assert sim.orders[0].usd_per_hour == pytest.approx(minimum * 1.2)
    assert client.set_spot_price(order["order_id"], minimum * 0.1) is False
    offers = client.get_spot_market(server_id)["market"]["offers"]
    assert all(offer["usd_per_hour"] > 0 for offer in offers)


@pytest.mark.parametrize(
    "answer",
    [
        {"market": None, "exists": False},
        {"market": {}},
        {"market": {"currency_rates_in_usd": None, "offers": []}},
        {"market": {"currency_rates_in_usd": {"bitcoin": 60000}}, "exists": True},
        {"market": {"currency_rates_in_usd": {"CLORE-Blockchain": 0}}},
        {"market": {"currency_rates_in_usd": {"CLORE-Blockchain": float("nan")}}},
        {"market": {"server": {}, "offers": []}},
        {},
    ],
)
def test_without_a_usable_rate_no_bid_is_sent(
    sim: Simulator, client: CloreClient, answer: Any
) -> None:
    server_id, minimum = spot_server(client)
    sim.faults.add("spot_marketplace", "envelope", envelope={"code": 0, **answer}, times=9)
    with pytest.raises(RateUnknownError, match="nothing was bid"):
        client.create_order(server_id, order_type="spot", spot_price=minimum)
    assert not sent_to(sim, "create_order")


def test_without_a_response_no_bid_is_sent(sim: Simulator, client: CloreClient) -> None:
    server_id, minimum = spot_server(client)
    sim.faults.add("spot_marketplace", "lose_request", times=9)
    with pytest.raises(CloreError):
        client.create_order(server_id, order_type="spot", spot_price=minimum)
    assert not sent_to(sim, "create_order")


def test_rates_and_the_form_are_read_again_after_five_minutes(
    sim: Simulator, client: CloreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_id, _ = spot_server(client)
    client.get_spot_market(server_id)
    client._market.ensure_rates(server_id, "bitcoin")
    assert len(sent_to(sim, "spot_marketplace")) == 1
    real = time.monotonic
    monkeypatch.setattr("time.monotonic", lambda: real() + 301)
    assert client._market.data.rates.fresh() == {}
    monkeypatch.undo()


def test_a_live_response_replaces_the_documented_form(sim: Simulator, client: CloreClient) -> None:
    server_id, minimum = spot_server(client)
    sim.faults.add("spot_marketplace", "envelope",
                   envelope={"code": 0, "market": {"offers": [{"price": 1}]}})  # fmt: skip
    client.get_spot_market(server_id)
    assert client._market.data.documented
    client.get_marketplace()
    assert not client._market.data.documented
    client.create_order(server_id, order_type="spot", spot_price=minimum * 1.1)
    sent = sent_to(sim, "create_order")[0].body["spotprice"]
    assert sent == pytest.approx(minimum * 1.1 * 24 / RATES["CLORE-Blockchain"])


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings logged since the last call."""
    shown = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    caplog.clear()
    return [text for text in shown if "retrying" not in text]  # of a busy machine


def test_a_bid_above_the_on_demand_price_is_sent_with_one_warning(
    any_sim: Simulator, any_client: CloreClient, caplog: pytest.LogCaptureFixture
) -> None:
    server = any_client.find_cheapest("RTX 4090", min_reliability=96)
    assert server is not None
    assert server.usd_per_hour is not None
    bid = server.usd_per_hour * 2
    order = any_client.create_order(server["id"], order_type="spot", spot_price=bid)
    assert any_sim.orders[0].usd_per_hour == pytest.approx(bid, rel=1e-4)
    (warning,) = warnings_of(caplog)
    assert f"spot_price={bid!r}" in warning
    assert f"{server.usd_per_hour:g}" in warning
    assert any_client.set_spot_price(order["order_id"], bid * 1.5) is True
    assert any_sim.orders[0].usd_per_hour == pytest.approx(bid * 1.5, rel=1e-4)
    (warning,) = warnings_of(caplog)
    assert f"new_price={bid * 1.5!r}" in warning


def test_a_bid_up_to_the_on_demand_price_gives_no_warning(
    any_client: CloreClient, caplog: pytest.LogCaptureFixture
) -> None:
    server = any_client.find_cheapest("RTX 4090", min_reliability=96)
    assert server is not None
    price = server.usd_per_hour
    assert price is not None
    order = any_client.create_order(server["id"], order_type="spot", spot_price=price)
    assert any_client.set_spot_price(order["order_id"], price) is True
    assert warnings_of(caplog) == []


def test_ten_times_the_on_demand_price_is_the_highest_bid(
    any_sim: Simulator, any_client: CloreClient, caplog: pytest.LogCaptureFixture
) -> None:
    server = any_client.find_cheapest("RTX 4090", min_reliability=96)
    assert server is not None
    price = server.usd_per_hour
    assert price is not None
    server_id = server["id"]
    for bid in (price * 24, price * 10.001):  # the first is a price per day
        for preview in (True, False):
            with pytest.raises(ValueError, match=r"spot_price must be at most") as refused:
                any_client.create_order(
                    server_id, order_type="spot", spot_price=bid, preview=preview
                )
            for told in (repr(bid), f"{price * 10:g}", "allow_above_on_demand=True"):
                assert told in str(refused.value)
    assert not sent_to(any_sim, "create_order")
    order = any_client.create_order(server_id, order_type="spot", spot_price=price * 10)
    with pytest.raises(ValueError, match=r"new_price must be at most"):
        any_client.set_spot_price(order["order_id"], price * 24)
    assert not sent_to(any_sim, "set_spot_price")
    assert any_client.set_spot_price(order["order_id"], price * 24, allow_above_on_demand=True)
    assert any_sim.orders[0].usd_per_hour == pytest.approx(price * 24, rel=1e-4)
    other = any_client.find_servers("RTX 4090", min_reliability=96)[0]
    caplog.clear()
    any_client.create_order(
        other["id"], order_type="spot", spot_price=price * 24, allow_above_on_demand=True
    )
    assert len(warnings_of(caplog)) == 1


def test_refused_bids(make_sim: MakeSim) -> None:
    sim = make_sim(max_step=0.2, lowering_interval=600)
    client = client_for(sim)
    server_id, minimum = spot_server(client)
    with pytest.raises(BidTooLowError):
        client.create_order(server_id, order_type="spot", spot_price=minimum * 0.5)
    order = client.create_order(server_id, order_type="spot", spot_price=minimum * 1.3)
    with pytest.raises(SpotPriceStepError) as step:
        client.set_spot_price(order["order_id"], minimum * 1.01)
    assert step.value.max_step == pytest.approx(0.2 / RATES["CLORE-Blockchain"])
    usd = minimum * 1.3 - 0.1 / 24
    assert client.set_spot_price(order["order_id"], usd) is True
    with pytest.raises(SpotPriceTooSoonError) as soon:
        client.set_spot_price(order["order_id"], usd - 0.05 / 24)
    assert 0 < (soon.value.retry_after or 0) <= 600
    assert soon.value.retryable
    with pytest.raises(OrderNotFoundError, match="nothing was done"):
        client.set_spot_price(5, 0.1)


def test_a_bid_that_took_effect_before_a_refusal_is_a_success(
    sim: Simulator, client: CloreClient
) -> None:
    server_id, minimum = spot_server(client)
    order = client.create_order(server_id, order_type="spot", spot_price=minimum * 1.3)
    sim.faults.add("set_spot_price", "lose_response")
    assert client.set_spot_price(order["order_id"], minimum * 1.28) is True
    assert len(sent_to(sim, "set_spot_price")) == 2
    sim.faults.add("set_spot_price", "lose_request")
    with pytest.raises(SpotPriceTooSoonError):
        client.set_spot_price(order["order_id"], minimum * 1.26)


def test_a_spot_price_for_on_demand_is_not_sent(
    sim: Simulator, client: CloreClient, caplog: pytest.LogCaptureFixture
) -> None:
    server_id, minimum = spot_server(client)
    client.create_order(server_id, spot_price=minimum)
    assert "spotprice" not in sent_to(sim, "create_order")[0].body
    assert "not sent" in caplog.text


# --- typed access, suggestions, and lowering step by step ---


def market_of(*offers: dict[str, Any], **server: Any) -> dict[str, Any]:
    rates = {"bitcoin": 64000, "CLORE-Blockchain": 0.25, "USD-Blockchain": 1}
    market = {"currency_rates_in_usd": rates, "offers": list(offers), "server": server}
    return {"market": market, "exists": True, "code": 0}


def test_typed_access_to_the_spot_market(sim: Simulator, client: CloreClient) -> None:
    answer = market_of(
        {"offer_id": 9, "bid": 9.6, "active": True, "my": False, "currency": "CLORE-Blockchain"},
        {"offer_id": 10, "bid": 4.8, "active": False, "my": True, "currency": "USD-Blockchain"},
        {"offer_id": 11, "bid": 1, "currency": "doge"}, {"offer_id": None, "bid": "x"},
        min_pricing={"CLORE-Blockchain": 4.8, "USD-Blockchain": 6, "bitcoin": None, "doge": 1},
    )  # fmt: skip
    sim.faults.add("spot_marketplace", "envelope", envelope=answer, after_commit=False)
    market = client.get_spot_market(5)
    assert market.minimum_usd == pytest.approx(0.05)
    assert market.lowest_winning_usd == pytest.approx(0.1)  # of others, not of this account
    first, second, *rest = market.offers
    assert (first.id, first.currency, first.is_active, first.is_mine) == (
        9, "CLORE-Blockchain", True, False,
    )  # fmt: skip
    assert first.usd_per_hour == pytest.approx(0.1)
    assert second.usd_per_hour == pytest.approx(0.2)
    assert second.is_mine
    assert [offer.usd_per_hour for offer in rest] == [None, None]
    assert market["code"] == 0  # the envelope is still there
    assert market["market"]["offers"][0]["usd_per_hour"] == first.usd_per_hour
    assert market.wire == answer
    assert "lowest_winning_usd=0.1" in repr(market)


@pytest.mark.parametrize("market", [None, {}, [], {"offers": None}, {"server": {"min_pricing": 5}}])
def test_a_spot_market_without_bids(sim: Simulator, client: CloreClient, market: Any) -> None:
    answer = {"code": 0, "exists": True, "market": market}
    for _ in range(2):
        sim.faults.add("spot_marketplace", "envelope", envelope=answer, after_commit=False)
    got = client.get_spot_market(5)
    assert (got.offers, got.minimum_usd, got.lowest_winning_usd) == ([], None, None)
    assert client.suggest_spot_price(5) is None


def test_a_suggested_bid_wins(any_sim: Simulator, any_client: CloreClient) -> None:
    server = any_client.find_cheapest("RTX 4090", min_reliability=96, use_spot=True)
    assert server is not None
    bid = any_client.suggest_spot_price(server)
    assert any_client.suggest_spot_price(server["id"]) == bid
    assert bid is not None
    assert (server.spot_usd_per_hour or 0) < bid <= (server.usd_per_hour or 0)
    order = any_client.create_order(server["id"], order_type="spot", spot_price=bid)
    assert any_sim.orders[0].id == order["order_id"]


def test_a_suggestion_is_above_others_and_at_most_the_on_demand_price(
    sim: Simulator, client: CloreClient
) -> None:
    server = client.find_servers("RTX 4090", use_spot=True)[0]
    on_demand = server.usd_per_hour or 0.0

    def suggested(usd: float, margin: float, listed: Any = server) -> float | None:
        offer = {"bid": usd * 24, "active": True, "my": False, "currency": "USD-Blockchain"}
        answer = market_of(offer, min_pricing={"USD-Blockchain": 0.24})
        sim.faults.add("spot_marketplace", "envelope", envelope=answer, after_commit=False)
        return client.suggest_spot_price(listed, margin)

    assert suggested(0.05, 0.1) == pytest.approx(0.055)
    assert suggested(on_demand * 0.99, 0.1) == on_demand
    assert suggested(on_demand * 2, 0.1) == pytest.approx(on_demand * 2.2)
    assert suggested(on_demand * 0.99, 0.1, server["id"]) == pytest.approx(on_demand * 1.089)
    sim.clear_requests()
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="margin"):
            client.suggest_spot_price(server, bad)
    with pytest.raises((TypeError, ValueError), match="server"):
        client.suggest_spot_price("x")  # type: ignore[arg-type]
    assert sim.requests == []


@pytest.mark.parametrize(
    ("form", "currency"),
    [("live", "CLORE"), ("live", "USD"), ("documented", "USD")],  # that form has no other rates
)
def test_a_bid_is_lowered_step_by_step(make_sim: MakeSim, form: str, currency: str) -> None:
    sim = make_sim(form=form, max_step=0.2, lowering_interval=1, visible_after=0)
    with client_for(sim) as client:
        server_id, minimum = spot_server(client)
        start, target = minimum + 0.5 / 24, minimum + 0.05 / 24  # 0.45 USD a day: three steps
        order = client.create_order(
            server_id, order_type="spot", spot_price=start, currency=currency
        )
        began = time.monotonic()
        reached = client.lower_spot_price(order, target)
        assert reached == target
        assert sim.orders[0].usd_per_hour == pytest.approx(target, rel=1e-4)
        assert time.monotonic() - began >= 1.5  # two waits of the API's interval
        sim.clear_requests()
        assert client.lower_spot_price(order["order_id"], start) == pytest.approx(target, rel=1e-4)
        assert sent_to(sim, "set_spot_price") == []


def test_one_step_without_waiting(make_sim: MakeSim) -> None:
    sim = make_sim(max_step=0.2, lowering_interval=600, visible_after=0)
    with client_for(sim) as client:
        server_id, minimum = spot_server(client)
        start = minimum + 0.5 / 24
        order = client.create_order(server_id, order_type="spot", spot_price=start)
        reached = client.lower_spot_price(order, minimum * 1.001, wait=False)
        assert reached == pytest.approx(start - 0.2 / 24, rel=1e-4)
        with pytest.raises(SpotPriceTooSoonError):
            client.lower_spot_price(order, minimum * 1.001, wait=False)
        with pytest.raises(BidTooLowError):
            client.lower_spot_price(order, minimum * 0.5, wait=False)
        with pytest.raises(OrderNotFoundError):
            client.lower_spot_price(5, 0.1)


@pytest.mark.parametrize("currency", ["CLORE", "BTC"])
def test_a_bid_that_is_not_known_in_usd_is_not_changed(make_sim: MakeSim, currency: str) -> None:
    sim = make_sim(form="documented", visible_after=0)
    with client_for(sim) as client:
        server_id, minimum = spot_server(client)
        order = client.create_order(
            server_id, order_type="spot", spot_price=minimum * 1.1, currency=currency
        )
        for target in (minimum * 1.05, minimum * 1.2):
            with pytest.raises(RateUnknownError, match=r"nothing was bid.* set_spot_price") as info:
                client.lower_spot_price(order, target)
            assert not info.value.retryable
        assert sent_to(sim, "set_spot_price") == []
        assert client.set_spot_price(order, minimum * 1.05)  # what the error says works


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 0.1), "order"), ((5, 0), "target"), ((5, float("nan")), "target"), ((5, 1, 1), "wait")],
)
def test_bad_arguments_of_lower_spot_price(
    sim: Simulator, client: CloreClient, arguments: Any, name: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        client.lower_spot_price(*arguments)
    assert sim.requests == []
