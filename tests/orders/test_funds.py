"""Money: what orders cost, what is in the wallets, and for how long that lasts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from clore_client import (
    CloreClient,
    CloreError,
    InsufficientBalanceError,
    OrderNotFoundError,
)
from tests.conftest import MakeSim, client_for, sent_to
from tests.variant import Simulator

RATES = {"bitcoin": 68022.87, "CLORE-Blockchain": 0.002705, "USD-Blockchain": 1}


def cheapest(client: CloreClient, currency: str = "CLORE") -> Any:
    server = client.find_cheapest("RTX 4090", min_reliability=96, currency=currency)
    assert server is not None
    return server


# --- orders ---


@pytest.mark.parametrize("currency", list(RATES))
@pytest.mark.parametrize("read", ["get_order", "get_orders", "wait_for_order"])
def test_an_order_has_its_price_without_an_earlier_search(
    make_sim: MakeSim, currency: str, read: str
) -> None:
    sim = make_sim(visible_after=0)
    with client_for(sim) as client:
        made = client.create_order(cheapest(client, currency)["id"], currency=currency)
    with client_for(sim) as fresh:  # it has read nothing yet
        sim.clear_requests()
        for _ in range(2):
            if read == "get_orders":
                (order,) = fresh.get_orders()
            else:
                order = getattr(fresh, read)(made["order_id"])
            assert order.usd_per_hour == pytest.approx(sim.orders[0].usd_per_hour, rel=1e-4)
            assert order.cost_usd is not None
        asked = sent_to(sim, "spot_marketplace")
        assert len(asked) == (currency != "USD-Blockchain")  # once, and only if it is needed


@pytest.mark.parametrize("currency", list(RATES))
def test_a_documented_order_has_the_price_of_the_listing(make_sim: MakeSim, currency: str) -> None:
    sim = make_sim(visible_after=0, form="documented")
    with client_for(sim) as client:
        made = client.create_order(cheapest(client)["id"], currency=currency)
        for order in (client.get_order(made["order_id"]), *client.get_orders()):
            assert order is not None
            assert order.usd_per_hour == pytest.approx(sim.orders[0].usd_per_hour, rel=1e-4)
            assert order.cost_usd is not None
        with client_for(sim) as fresh:  # no rate and no listing, and none is read for it
            sim.clear_requests()
            fresh.get_orders()
            assert len(sim.requests) == 1


@pytest.mark.parametrize("currency", list(RATES))
def test_a_new_order_has_its_price_without_an_earlier_search(
    sim: Simulator, client: CloreClient, currency: str
) -> None:
    server_id = cheapest(client, currency)["id"]
    with client_for(sim) as fresh:
        sim.clear_requests()
        order = fresh.create_order(server_id, currency=currency)
        assert order.usd_per_hour == pytest.approx(sim.orders[0].usd_per_hour, rel=1e-4)
        asked = [call.endpoint for call in sim.requests]
        # The rate is asked for before the purchase: an interrupt after it would lose the order.
        first = "my_orders" if currency == "USD-Blockchain" else "spot_marketplace"
        assert asked[0] == first
        assert "create_order" in asked[1:]


def test_the_price_stays_unknown_where_nobody_knows_it(sim: Simulator) -> None:
    with client_for(sim) as client:
        order_id = client.create_order(cheapest(client)["id"])["order_id"]
    market = {"code": 0, "exists": True, "market": {"offers": [], "server": {}}}
    sim.faults.add("spot_marketplace", "envelope", envelope=market, after_commit=False)
    with client_for(sim) as client:
        sim.clear_requests()
        for _ in range(3):
            order = client.get_order(order_id)
            assert order is not None
            assert (order.usd_per_hour, order.cost_usd) == (None, None)
        assert len(sent_to(sim, "spot_marketplace")) == 1


def test_failed_rates_do_not_break_a_read(sim: Simulator) -> None:
    with client_for(sim) as client:
        client.create_order(cheapest(client)["id"])
    sim.faults.add("spot_marketplace", "code_1")
    with client_for(sim, max_retries=1) as client:
        (order,) = client.get_orders()
        assert order.usd_per_hour is None


@pytest.mark.parametrize("currency", ["CLORE", "BTC", "USD"])
@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("hours", [0.1, 5.0])
def test_the_cost_so_far_has_all_fees(
    make_sim: MakeSim, currency: str, spot: bool, hours: float
) -> None:
    sim = make_sim(balance=1000.0)
    with client_for(sim) as client:
        server = client.find_cheapest(
            "RTX 4090", use_spot=spot, currency=currency, min_reliability=96
        )
        assert server is not None
        bid: dict[str, Any] = {"order_type": "spot", "spot_price": 0.1} if spot else {}
        order_id = client.create_order(server["id"], currency=currency, **bid)["order_id"]
        sim.advance(hours * 3600)
        order = client.get_order(order_id)
        assert order is not None
        assert order.cost_usd == pytest.approx(sim.order(order_id).charged_usd, rel=1e-3)
        client.cancel_order(order_id)
        ended = client.get_order(order_id)
        assert ended is not None
        assert ended.cost_usd == pytest.approx(order.cost_usd, rel=1e-3)


def test_the_cost_without_a_sum_of_the_api(make_sim: MakeSim) -> None:
    sim = make_sim(form="documented", balance=1000.0, visible_after=0)
    with client_for(sim) as client:
        order_id = client.create_order(cheapest(client)["id"], currency="USD")["order_id"]
        order = client.get_order(order_id)
        assert order is not None
        order["started"] -= 2 * 3600
        assert order.cost_usd == pytest.approx(order["price"] * 1.05 * 2 + 0.1, rel=1e-3)
        order["started"] += 2 * 3600 - 300
        assert order.cost_usd == pytest.approx(order["price"] * 1.05 / 12, rel=0.05)
        order["status"] = "expired"
        assert order.cost_usd is None


# --- wallets ---


def test_balances_in_usd(sim: Simulator, client: CloreClient) -> None:
    wallets = client.get_balances()
    assert [w.balance_usd for w in wallets] == pytest.approx([100.0] * 3, rel=1e-3)
    assert len(sent_to(sim, "marketplace")) == 1
    client.get_balances()
    assert len(sent_to(sim, "marketplace")) == 1
    assert [dict(w) for w in wallets] == [dict(w) for w in client.get_wallets()]


def test_balances_without_rates(make_sim: MakeSim) -> None:
    with client_for(make_sim(form="documented")) as client:
        assert [w.balance_usd for w in client.get_balances()] == [None, None, 100.0]


def test_get_balance_of_no_currency_names_the_wallets(client: CloreClient) -> None:
    with pytest.raises(ValueError, match="'EUR' is neither a currency") as caught:
        client.get_balance("EUR")
    for name in RATES:
        assert name in str(caught.value)


def test_a_known_currency_without_a_wallet_is_zero(sim: Simulator, client: CloreClient) -> None:
    only = {"code": 0, "wallets": [{"name": "bitcoin", "deposit": "x", "balance": 1.0}]}
    for currency, balance in (("USD", 0.0), ("clore", 0.0), ("bit", 1.0), ("BTC", 1.0)):
        sim.faults.add("wallets", "envelope", envelope=only, after_commit=False)
        assert client.get_balance(currency) == balance


@pytest.mark.parametrize("currency", ["CLORE", "USD"])
def test_hours_left(make_sim: MakeSim, currency: str) -> None:
    sim = make_sim(balance=10.0)
    with client_for(sim) as client:
        server = cheapest(client, currency)
        hourly = server.usd_per_hour * 1.05
        before = client.hours_left(server, currency=currency)
        assert before == pytest.approx(10 / hourly, rel=1e-3)
        order = client.create_order(server["id"], currency=currency)
        order = client.wait_for_order(order["order_id"], poll_interval=0.02)
        assert client.hours_left(order) == pytest.approx(10 / hourly, rel=0.01)
        assert client.hours_left(order["order_id"]) == pytest.approx(10 / hourly, rel=0.01)
        both = client.hours_left(server, currency=currency)
        assert both == pytest.approx(5 / hourly, rel=0.01)  # the active order counts too
        assert client.hours_left(server, currency="BTC") is not None
        client.cancel_order(order["order_id"], confirm=True)
        with pytest.raises(OrderNotFoundError, match="no active order"):
            client.hours_left(order)


def test_hours_left_of_nothing(client: CloreClient) -> None:
    server = cheapest(client)
    server["price"] = None
    assert client.hours_left(server) is None
    free = client.create_order(cheapest(client)["id"], currency="USD", preview=True)
    with pytest.raises((ValueError, TypeError), match="server_or_order"):
        client.hours_left(free)


# --- estimates ---


def test_an_estimate(sim: Simulator, client: CloreClient) -> None:
    server = cheapest(client)
    price = server.usd_per_hour
    got = client.estimate_cost(server, 10)
    assert (got.server_id, got.hours, got.currency) == (server.id, 10, "CLORE-Blockchain")
    assert (got.usd_per_hour, got.base_usd) == (price, price * 10)
    assert got.renter_fee_usd == pytest.approx(price * 0.5, rel=1e-12)
    assert got.creation_fee_usd == pytest.approx(0.1, rel=1e-3)
    assert got.total_usd == pytest.approx(price * 10.5 + 0.1, rel=1e-3)
    rate = RATES["CLORE-Blockchain"]
    in_clore = (got.base, got.renter_fee, got.creation_fee, got.total)
    in_usd = (got.base_usd, got.renter_fee_usd, got.creation_fee_usd, got.total_usd)
    for amount, usd in zip(in_clore, in_usd, strict=True):
        assert amount == pytest.approx((usd or 0) / rate, rel=1e-3)
    assert client.estimate_cost(server, 0.16).creation_fee_usd == 0
    spot = client.estimate_cost(server, 10, use_spot=True, currency="USD")
    assert spot.renter_fee_usd == pytest.approx((spot.base_usd or 0) * 0.0125)
    bid = client.estimate_cost(server["id"], 10, use_spot=True, spot_price=0.5)
    assert bid.base_usd == 5.0
    assert len(sent_to(sim, "renter_fees")) == 1  # asked once


def test_an_estimate_is_what_an_order_costs(make_sim: MakeSim) -> None:
    sim = make_sim(balance=1000.0)
    with client_for(sim) as client:
        server = cheapest(client)
        estimated = client.estimate_cost(server, 7)
        order = client.create_order(server["id"])
        sim.advance(7 * 3600)
        charged = sim.order(order["order_id"]).charged_usd
        assert charged == pytest.approx(estimated.total_usd, rel=1e-3)


def test_the_fees_of_the_account_count(sim: Simulator, client: CloreClient) -> None:
    coins = list(RATES)
    fees = {
        "code": 0,
        "renter_fees": {"on_demand": {"base": dict.fromkeys(coins, 3)}, "spot": {"base": {}}},
        "creation_fees": {"on_demand": {"USD-Blockchain": 0.25}},
    }
    sim.faults.add("renter_fees", "envelope", envelope=fees, after_commit=False)
    server = cheapest(client)
    got = client.estimate_cost(server, 1, currency="USD")
    assert got.renter_fee_usd == pytest.approx((got.base_usd or 0) * 0.03)
    assert got.creation_fee_usd == 0.25
    spot = client.estimate_cost(server, 1, currency="USD", use_spot=True)
    assert spot.renter_fee_usd == pytest.approx((spot.base_usd or 0) * 0.0125)


def test_published_fees_without_a_key_or_an_answer(any_sim: Simulator) -> None:
    any_sim.faults.add("renter_fees", "code_1")
    for options in ({"api_key": None}, {"max_retries": 1}):
        with client_for(any_sim, **options) as client:
            server = client.find_cheapest("RTX 4090", currency="USD")
            assert server is not None
            got = client.estimate_cost(server, 1, currency="USD")
            assert got.renter_fee_usd == pytest.approx((got.base_usd or 0) * 0.05)
            assert got.creation_fee_usd == 0.1


def test_an_estimate_without_a_price_or_a_rate(make_sim: MakeSim) -> None:
    with client_for(make_sim(form="documented")) as client:
        server = cheapest(client)
        got = client.estimate_cost(server, 1)
        assert got.total_usd is not None
        assert got.total is None  # no exchange rate is known
        server["price"] = None
        got = client.estimate_cost(server, 1)
        assert (got.usd_per_hour, got.total_usd, got.total) == (None, None, None)
        with pytest.raises(CloreError, match="server 5 is not on the marketplace"):
            client.estimate_cost(5, 1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"hours": -1}, "hours"), ({"hours": math.nan}, "hours"), ({"hours": "1"}, "hours"),
        ({"server": "x"}, "server"), ({"currency": "EUR"}, "currency"),
        ({"use_spot": 1}, "use_spot"), ({"spot_price": 0.1}, "spot_price"),
        ({"use_spot": True, "spot_price": 0}, "spot_price"),
    ],
)  # fmt: skip
def test_bad_arguments_of_an_estimate(
    sim: Simulator, client: CloreClient, arguments: dict[str, Any], name: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        client.estimate_cost(**{"server": 5, "hours": 1, **arguments})
    assert sim.requests == []


# --- an empty wallet ---


@pytest.mark.parametrize("form", ["live", "documented"])
def test_an_empty_wallet_is_explained(make_sim: MakeSim, form: str) -> None:
    sim = make_sim(balance={"USD-Blockchain": 5.0, "CLORE-Blockchain": 1.5}, form=form)
    with client_for(sim) as client:
        server = cheapest(client)
        with pytest.raises(InsufficientBalanceError) as caught:
            client.create_order(server["id"])
        error, text = caught.value, str(caught.value)
        assert text.startswith("Clore API Error 6: not_enough_balance | response=")
        assert (error.wallet, error.balance) == ("CLORE-Blockchain", 1.5)
        assert error.usd_per_hour == server.usd_per_hour
        assert "wallet CLORE-Blockchain has 1.5" in text
        assert f"an hour of this order costs {server.usd_per_hour * 1.05:.4g} USD with" in text
        assert "pay with another currency= (USD-Blockchain has 5)" in text
        rental = client.rent("RTX 4090", currency="BTC", image="x")
        with pytest.raises(InsufficientBalanceError, match="wallet bitcoin has 0"):
            rental.__enter__()


def test_an_explanation_that_fails_leaves_the_error(make_sim: MakeSim) -> None:
    sim = make_sim(balance=0.0)
    with client_for(sim, max_retries=1) as client:
        server_id = cheapest(client)["id"]
        sim.faults.add("wallets", "code_1")
        sim.faults.add("marketplace", "code_1")
        with pytest.raises(InsufficientBalanceError, match="not_enough_balance"):
            client.create_order(server_id)


def test_properties_of_a_server(client: CloreClient) -> None:
    rig = client.find_servers(min_gpu_count=4)[0]
    assert rig.usd_per_gpu_hour == (rig.usd_per_hour or 0) / (rig.gpu_count or 1)
    assert rig.total_vram_gb == (rig.vram_gb or 0) * (rig.gpu_count or 1)
