"""The documented form: every documented field is there, with the type that the page gives it."""

from __future__ import annotations

from typing import Any

import pytest

from clore_client.simulator import Simulator
from tests.conftest import until

from .test_api import BTC, CLORE, QUICK, USD, Renter, free

NUMBER = (int, float)


def is_number(value: Any) -> bool:
    return isinstance(value, NUMBER) and not isinstance(value, bool)


def check_server(server: dict[str, Any]) -> None:
    assert type(server["id"]) is int
    assert server["gpu_array"]
    assert all(type(name) is str for name in server["gpu_array"])
    assert server["price"]["usd"]["on_demand_clore"] > 0
    assert server["price"]["usd"]["spot"] > 0
    assert 0 <= server["reliability"] <= 100
    assert type(server["rented"]) is bool
    assert {"cpu", "cpus", "ram", "disk", "gpu", "gpuram", "net"} <= server["specs"].keys()
    assert None not in server["specs"].values()


def check_order(order: dict[str, Any]) -> None:
    assert type(order["order_id"]) is int
    assert type(order["renting_server"]) is int
    assert order["status"] in ("creating", "running", "cancelled", "expired")
    ssh, urls = order["connection"]["ssh"], order["connection"]["http_ports"]
    assert ssh.startswith("ssh root@") if order["status"] == "running" else ssh == ""
    assert isinstance(urls, dict)
    assert is_number(order["price"])
    assert is_number(order["started"])


@pytest.mark.parametrize("seed", range(20))
def test_servers_have_every_documented_field(seed: int) -> None:
    with Simulator(**QUICK | {"servers": 300, "seed": seed, "form": "documented"}) as sim:
        servers = Renter(sim, "").get("marketplace")["servers"]
    assert len(servers) == 300
    for server in servers:
        check_server(server)


def test_both_forms_list_the_same_servers() -> None:
    found = []
    for form in ("live", "documented"):
        with Simulator(**QUICK | {"servers": 300, "form": form}) as sim:
            found.append({s.id: (s.gpus, s.usd_on_demand, s.specs) for s in sim.servers})
    assert found[0] == found[1]


def test_nulls_belong_to_the_live_form() -> None:
    with Simulator(**QUICK | {"servers": 2000}) as sim:
        servers = Renter(sim, "").get("marketplace")["servers"]
        facts = {s.id: s for s in sim.servers}
    assert any(s["specs"] is None for s in servers)
    assert any(s["reliability"] is None for s in servers)
    assert any(not fact.usd_spot for fact in facts.values())
    for server in servers:
        assert 0 <= facts[server["id"]].reliability <= 1


def test_a_reader_without_checks_gets_along() -> None:
    """Read the answer as the page's own client does: compare and sort, without any check."""
    with Simulator(**QUICK | {"servers": 1000, "form": "documented"}) as sim:
        servers = Renter(sim, "").get("marketplace")["servers"]
    for price in ("on_demand_clore", "spot"):
        fitting = [
            s
            for s in servers
            if not s["rented"]
            and any("4090" in name for name in s["gpu_array"])
            and s["reliability"] >= 90
            and s["price"]["usd"][price] <= 1.0
        ]
        fitting.sort(key=lambda s: s["price"]["usd"][price])
        assert fitting
        assert fitting[0]["price"]["usd"][price] > 0


def test_every_listed_spot_price_is_a_bid_that_is_taken() -> None:
    with Simulator(**QUICK | {"form": "documented"}) as sim:
        renter = Renter(sim)
        facts = {s.id: s for s in sim.servers}
        for server in renter.get("marketplace")["servers"]:
            fact = facts[server["id"]]
            if server["rented"] or not fact.online or CLORE not in fact.allowed_coins:
                continue
            bid = server["price"]["usd"]["spot"] * 1.001
            assert renter.create(server["id"], type="spot", spotprice=bid)["code"] == 0
        assert len(sim.orders) > 10


def test_wallets_have_numbers() -> None:
    with Simulator(**QUICK | {"form": "documented", "balance": {BTC: None, USD: 3}}) as sim:
        wallets = Renter(sim).get("wallets")["wallets"]
    assert [w["balance"] for w in wallets] == [0.0, 0.0, 3]
    assert all(type(w["name"]) is type(w["deposit_address"]) is str for w in wallets)


def test_orders_have_every_documented_field() -> None:
    with Simulator(**QUICK | {"form": "documented", "deploy_after": 0.2}) as sim:
        renter, server_id = Renter(sim), free(sim)
        renter.create(server_id)
        until(lambda: renter.orders())
        check_order(renter.orders()[0])
        until(lambda: renter.orders()[0]["status"] == "running")
        check_order(renter.orders()[0])
        sim.set_offline(server_id)
        (offline,) = renter.orders()
        assert offline["status"] == "creating"
        check_order(offline)
        sim.set_offline(server_id, False)
        renter.post("cancel_order", {"id": sim.orders[0].id})
        until(lambda: renter.orders() == [])
        check_order(renter.orders(completed=True)[0])


def test_the_spot_market_has_numbers() -> None:
    with Simulator(**QUICK | {"form": "documented"}) as sim:
        for server in sim.servers:
            answer = Renter(sim).get("spot_marketplace", market=str(server.id))
            assert answer["market"]["min_price"] > 0
            for offer in answer["market"]["offers"]:
                assert offer["price"] > 0
