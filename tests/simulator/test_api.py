"""The simulator's API: its marketplace, orders, money, limits and both forms."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
import requests

from clore_client.simulator import Simulator
from tests.conftest import until

CLORE, BTC, USD = "CLORE-Blockchain", "bitcoin", "USD-Blockchain"
RATES = {BTC: 68022.87, CLORE: 0.002705, USD: 1}
QUICK: dict[str, Any] = {
    "servers": 40,
    "rate_limit": 0,
    "create_order_interval": 0,
    "visible_after": 0,
    "deploy_after": 0,
    "cancel_lingers": 0,
    "ssh": False,
}


class Renter:
    """A bare HTTP client with a key."""

    def __init__(self, sim: Simulator, key: str | None = None) -> None:
        self.sim = sim
        self.session = requests.Session()
        self.session.headers["auth"] = sim.api_key if key is None else key
        self.last: requests.Response

    def get(self, endpoint: str, **query: str) -> dict[str, Any]:
        url = f"{self.sim.url}/v1/{endpoint}"
        self.last = self.session.get(url, params=query, timeout=10, allow_redirects=False)
        answer: dict[str, Any] = self.last.json()
        return answer

    def post(self, endpoint: str, body: Any) -> dict[str, Any]:
        self.last = self.session.post(f"{self.sim.url}/v1/{endpoint}", json=body, timeout=10)
        answer: dict[str, Any] = self.last.json()
        return answer

    def create(self, server_id: int, **more: Any) -> dict[str, Any]:
        body = {
            "renting_server": server_id,
            "type": "on-demand",
            "currency": CLORE,
            "image": "some/image:1",
            "ports": {"22": "tcp", "8888": "http"},
            "env": {"A": "b"},
            "ssh_password": "secret-password",
        }
        return self.post("create_order", {k: v for k, v in (body | more).items() if v is not ...})

    def orders(self, completed: bool = False) -> list[dict[str, Any]]:
        query = {"return_completed": "true"} if completed else {}
        found: list[dict[str, Any]] = self.get("my_orders", **query)["orders"]
        return found


def free(sim: Simulator, n: int = 0, **wanted: Any) -> int:
    """A server that can be rented in every currency."""
    found = [
        s.id
        for s in sim.servers
        if not s.rented and s.online and len(s.allowed_coins) == 3 and s.usd_spot
    ]
    return found[n]


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(**QUICK) as simulator:
        yield simulator


@pytest.fixture
def renter(sim: Simulator) -> Renter:
    return Renter(sim)


# The marketplace


def test_marketplace_needs_no_key_and_looks_live(sim: Simulator) -> None:
    answer = Renter(sim, "").get("marketplace")
    assert answer["code"] == 0
    assert answer["my_servers"] == []
    servers = answer["servers"]
    assert len({s["id"] for s in servers}) == 40
    plain = next(s for s in servers if s["id"] == free(sim))
    assert 0 <= plain["reliability"] <= 1
    listed = plain["price"]
    usd = listed["original_usd"][CLORE]["on_demand"]
    assert listed["on_demand"][CLORE] * RATES[CLORE] == pytest.approx(usd, rel=1e-4)
    assert listed["on_demand"][BTC] * RATES[BTC] == pytest.approx(usd, rel=0.1)
    assert listed["on_demand"][USD] == usd


def test_default_market_has_everything_that_a_real_one_has() -> None:
    with Simulator(ssh=False) as sim:
        servers = Renter(sim, "").get("marketplace")["servers"]
        facts = {s.id: s for s in sim.servers}
    assert len(servers) == 200
    good = [
        s
        for s in servers
        if s.get("gpu_array") == ["RTX 4090"]
        and not s["rented"]
        and (s["reliability"] or 0) > 0.95
        and facts[s["id"]].online
        and len(facts[s["id"]].allowed_coins) == 3
    ]
    assert len(good) >= 4
    text = json.dumps(servers)
    assert len(text) / len(servers) < 1600
    rented = [s for s in servers if s["rented"]]
    assert 20 < len(rented) < 120
    assert any(not s.online for s in facts.values())
    assert any("gpu_array" not in s for s in servers)
    arrays = [s["gpu_array"] for s in servers if s.get("gpu_array")]
    assert any(isinstance(a[0], list) for a in arrays)
    assert any(isinstance(a[0], list) and a[0][0].startswith(" ") for a in arrays)
    assert any(len(a) > 1 for a in arrays)
    assert any(s["price"].get("usd") is None for s in servers)
    assert any((s["price"].get("usd") or {}).get("spot") == 0 for s in servers)
    assert any(s["allowed_coins"] != [BTC, CLORE, USD] for s in servers)
    # The cheapest 4090 is a good one, so that the simplest demo works with any seed.
    cheapest = min(
        (s for s in facts.values() if s.gpus[0] == "RTX 4090" and not s.rented),
        key=lambda s: s.usd_on_demand[CLORE],
    )
    assert cheapest.id in {s["id"] for s in good}


def test_the_cheapest_4090_is_a_good_one_with_any_seed() -> None:
    for seed in range(200):
        found = [
            s
            for s in Simulator(servers=200, seed=seed).servers
            if "RTX 4090" in s.gpus and not s.rented
        ]
        for prices in ("usd_on_demand", "usd_spot"):
            priced = [s for s in found if getattr(s, prices)]
            cheapest = min(priced, key=lambda s: getattr(s, prices)[CLORE])
            assert cheapest.online
            assert cheapest.allowed_coins == (BTC, CLORE, USD)
            assert cheapest.reliability > 0.95


def test_markets_of_a_seed_are_the_same() -> None:
    def market(seed: int) -> Any:
        with Simulator(servers=30, seed=seed, ssh=False) as sim:
            return Renter(sim, "").get("marketplace")

    assert market(3) == market(3)
    assert market(3) != market(4)


def test_odd_names_are_in_a_big_market() -> None:
    with Simulator(servers=2000, ssh=False) as sim:
        response = requests.get(f"{sim.url}/v1/marketplace", timeout=10)
    servers = response.json()["servers"]
    assert 1100 < len(response.content) / len(servers) < 1400
    names = [str(s.get("specs")) + str(s.get("name")) for s in servers]
    for odd in ("<script>", "\\x1b", "华硕", "\\u202e"):
        assert any(odd in name for name in names), odd
    assert any(s["specs"] is None for s in servers)
    assert any(s["reliability"] is None for s in servers)


def test_cached_marketplace_follows_changes(sim: Simulator, renter: Renter) -> None:
    server_id = free(sim)

    def listed() -> dict[str, Any]:
        return next(s for s in renter.get("marketplace")["servers"] if s["id"] == server_id)

    assert listed()["rented"] is False
    sim.set_rented(server_id)
    assert listed()["rented"] is True
    sim.set_rented(server_id, False)
    sim.set_price(server_id, 7.5, 5.0)
    assert listed()["rented"] is False
    assert listed()["price"]["on_demand"][USD] == 7.5
    assert listed()["price"]["spot"][USD] == 5.0


# The life of an order


def test_life_of_an_order() -> None:
    delays = {"visible_after": 0.15, "deploy_after": 0.4, "cancel_lingers": 0.2}
    with Simulator(**QUICK | delays) as sim:
        renter, server_id = Renter(sim), free(sim)
        before = int(time.time())
        assert renter.create(server_id) == {"code": 0}
        (booked,) = sim.orders
        assert booked.id >= 1_958_000
        assert booked.status == "creating"
        assert sim.server(server_id).rented
        (order,) = until(renter.orders)
        assert (order["id"], order["si"]) == (booked.id, server_id)
        assert before <= order["ct"] <= time.time() + 1
        assert order["price"] == sim.server(server_id).on_demand(CLORE)
        assert order["expired"] is False
        assert order.get("mon_container") != 2 or order["pub_cluster"]
        assert "order_id" not in order
        assert "status" not in order
        order = until(lambda: next((o for o in renter.orders() if o["mon_container"] == 2), None))
        assert order["pub_cluster"] == ["127.0.0.1"]
        assert order["tcp_ports"] == [f"22:{sim.order(booked.id).ssh_port}"]
        assert order["http_port"] == "8888"
        assert order["http_pub"].endswith(".invalid")
        assert order["online"] is True
        assert order["spend"] > 0

        assert renter.post("cancel_order", {"id": order["id"], "issue": "slow"}) == {"code": 0}
        ended = sim.order(order["id"])
        assert (ended.ended_by, ended.issue, ended.status) == ("cancel", "slow", "cancelled")
        assert not sim.server(server_id).rented
        lingering = renter.orders()
        assert lingering == [] or lingering[0]["expired"] is False
        until(lambda: renter.orders() == [])
        (done,) = renter.orders(completed=True)
        assert done["expired"] is True
        assert "pub_cluster" not in done
        assert done["tcp_ports"] == []


def test_delays_may_be_ranges() -> None:
    with Simulator(**QUICK | {"visible_after": (50, 60), "cancel_lingers": (7.0, 9.0)}) as sim:
        renter = Renter(sim)
        for n in range(3):
            renter.create(free(sim, n))
        assert renter.orders(completed=True) == []
        for order in sim.orders:
            assert 50 <= order.visible_at - order.created <= 60
            assert 7 <= order.linger_seconds <= 9


def test_an_order_that_never_deploys(sim: Simulator, renter: Renter) -> None:
    sim.set_deploy_after(free(sim), math.inf)
    renter.create(free(sim))
    renter.create(free(sim))
    until(lambda: sim.orders[1].status == "running")
    assert sim.orders[0].status == "creating"
    # Both ways in which the live API shows it.
    shown = renter.orders()[0]
    assert shown["mon_container"] != 2
    assert not shown.get("pub_cluster")
    assert not shown.get("tcp_ports")


@pytest.mark.parametrize(
    ("kind", "path"), [("order_id", ["order_id"]), ("id", ["id"]), ("order", ["order", "id"])]
)
def test_old_answers_of_create_order(kind: str, path: list[str]) -> None:
    with Simulator(**QUICK, create_answer=kind) as sim:
        answer: Any = Renter(sim).create(free(sim))
        assert answer.pop("code") == 0
        for name in path:
            answer = answer[name]
        assert answer == sim.orders[0].id


def test_accounts_do_not_see_each_other(sim: Simulator, renter: Renter) -> None:
    other = Renter(sim, sim.add_key(balance=1.0))
    renter.create(free(sim))
    assert other.orders() == []
    assert other.post("cancel_order", {"id": sim.orders[0].id})["code"] == 6
    assert sim.orders[0].active
    assert len(sim.orders_of(sim.api_key)) == 1
    assert other.get("wallets")["wallets"][2]["balance"] == 1.0


def test_cancel_orders_names_what_failed(sim: Simulator, renter: Renter) -> None:
    renter.create(free(sim))
    renter.create(free(sim))
    ids = [order.id for order in sim.orders]
    answer = renter.post("cancel_orders", {"order_ids": [*ids, 77]})
    assert answer == {"code": 0, "failed_to_cancel": ["77"]}
    assert not any(order.active for order in sim.orders)


@pytest.mark.parametrize(("mode", "code"), [("refuse", 6), ("accept", 0)])
def test_cancelling_twice(mode: str, code: int) -> None:
    with Simulator(**QUICK, cancel_ended=mode) as sim:
        renter = Renter(sim)
        renter.create(free(sim))
        order_id = sim.orders[0].id
        assert renter.post("cancel_order", {"id": order_id})["code"] == 0
        assert renter.post("cancel_order", {"id": order_id})["code"] == code
        assert renter.post("cancel_order", {"id": 5})["code"] == 6


def test_ended_by_the_host_and_offline(sim: Simulator, renter: Renter) -> None:
    renter.create(free(sim))
    server_id = sim.orders[0].server_id
    until(lambda: sim.orders[0].status == "running")
    sim.set_offline(server_id)
    assert renter.orders()[0]["online"] is False
    sim.set_offline(server_id, False)
    assert renter.orders()[0]["online"] is True
    assert sim.end_order(sim.orders[0].id) is True
    assert sim.end_order(sim.orders[0].id) is False
    assert sim.orders[0].status == "expired"
    assert renter.orders() == []
    assert not sim.server(server_id).rented


# Money


def test_wallets(sim: Simulator, renter: Renter) -> None:
    wallets = renter.get("wallets")["wallets"]
    assert [w["name"] for w in wallets] == [BTC, CLORE, USD]
    for wallet in wallets:
        assert wallet["balance"] * RATES[wallet["name"]] == pytest.approx(100, rel=1e-4)
        assert wallet["deposit"]
        assert "withdrawal_fee" in wallet
    poor = Renter(sim, sim.add_key({CLORE: None, USD: 3}))
    assert [w["balance"] for w in poor.get("wallets")["wallets"]] == [0.0, None, 3]


@pytest.mark.parametrize(("kind", "fee"), [("on-demand", 0.05), ("spot", 0.0125)])
def test_charges_by_the_second_with_fees(kind: str, fee: float) -> None:
    with Simulator(**QUICK) as sim:
        renter, server_id = Renter(sim), free(sim)
        bid = sim.server(server_id).min_bid(USD)
        renter.create(server_id, type=kind, currency=USD, spotprice=bid)
        time.sleep(0.2)
        renter.post("cancel_order", {"id": sim.orders[0].id})
        (order,) = sim.orders
        assert order.ended is not None
        seconds = order.ended - order.created
        assert seconds >= 0.2
        assert order.rent == pytest.approx(order.price / 86400 * seconds, rel=1e-6)
        assert order.charged == pytest.approx(order.rent * (1 + fee), rel=1e-6)
        assert order.charged_usd == order.charged
        assert order.creation_fee == 0
        left = sim.balance(USD)
        assert 100 - left == pytest.approx(order.charged, rel=1e-6)


def test_creation_fee_comes_later() -> None:
    with Simulator(**QUICK, creation_fee_after=0.1) as sim:
        renter = Renter(sim)
        renter.create(free(sim))
        until(lambda: sim.orders[0].creation_fee)
        assert sim.orders[0].creation_fee * RATES[CLORE] == pytest.approx(0.1, rel=1e-3)
        assert sim.orders[0].charged_usd > 0.1


def test_empty_wallet_ends_orders() -> None:
    with Simulator(**QUICK | {"balance": 1e-5}, creation_fee=0) as sim:
        renter = Renter(sim)
        assert renter.create(free(sim), currency=USD) == {"code": 0}
        order = until(lambda: next((o for o in sim.orders if not o.active), None))
        assert order.ended_by == "wallet"
        assert order.charged == pytest.approx(1e-5, rel=1e-6)
        assert sim.balance(USD) == 0
        assert renter.create(free(sim), currency=USD)["error"] == "not_enough_balance"
        sim.set_balance(USD, 50)
        assert renter.create(free(sim), currency=USD) == {"code": 0}


def test_orders_stay_readable_after_the_end() -> None:
    with Simulator(**QUICK) as sim:
        Renter(sim).create(free(sim))
    (order,) = sim.orders
    assert order.active
    charged = order.charged_usd
    assert charged > 0
    assert sim.orders[0].charged_usd == charged
    assert len(sim.requests) == 1


# Refusals


def test_key_endpoint_and_method(sim: Simulator) -> None:
    for key in ("", "wrong"):
        for endpoint in ("wallets", "my_orders", "spot_marketplace"):
            assert Renter(sim, key).get(endpoint) == {"code": 3}
        assert Renter(sim, key).create(free(sim)) == {"code": 3}
    renter = Renter(sim)
    assert renter.get("nothing") == {"code": 4}
    assert renter.get("create_order") == {"code": 4}
    assert renter.post("wallets", {}) == {"code": 4}
    assert sim.orders == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"renting_server": ...},
        {"renting_server": "x"},
        {"renting_server": True},
        {"renting_server": 1},
        {"type": "forever"},
        {"currency": "DOGE"},
        {"image": 5},
        {"image": ""},
        {"ssh_password": "x" * 33},
        {"ssh_key": "x" * 3073},
        {"jupyter_token": "x" * 33},
        {"ports": [22]},
        {"ports": {"22": "udp"}},
        {"ports": {"99999": "tcp"}},
        {"env": {"A": 5}},
        {"env": {"not a name": "x"}},
        {"env": {"A": "x" * 1537}},
        {"type": "spot"},
        {"type": "spot", "spotprice": "5"},
        {"required_price": "x"},
        {"autossh_entrypoint": "yes"},
    ],
    ids=str,
)
def test_bad_orders(market: Simulator, wrong: dict[str, Any]) -> None:
    order = {"server_id": free(market)} | wrong_as_call(wrong)
    assert Renter(market).create(**order) == {"code": 2}
    assert market.orders == []


def wrong_as_call(wrong: dict[str, Any]) -> dict[str, Any]:
    """`renting_server` under the name that `create` gives it."""
    return {"server_id" if k == "renting_server" else k: v for k, v in wrong.items()}


@pytest.fixture(scope="module")
def market() -> Iterator[Simulator]:
    with Simulator(**QUICK) as simulator:
        yield simulator


@pytest.mark.parametrize("body", [None, [], "x", 5, {}])
def test_bodies_that_are_no_objects(market: Simulator, body: Any) -> None:
    renter = Renter(market)
    for endpoint in ("create_order", "cancel_order", "cancel_orders", "set_spot_price"):
        assert renter.post(endpoint, body) == {"code": 2}
    url = f"{market.url}/v1/cancel_order"
    assert renter.session.post(url, data=b"{broken", timeout=5).json() == {"code": 2}


def test_neither_password_nor_key_is_fine(sim: Simulator, renter: Renter) -> None:
    assert renter.create(free(sim), ssh_password=...) == {"code": 0}


def test_codes_1_and_6(sim: Simulator, renter: Renter) -> None:
    server_id = free(sim)
    for value in ("a&b", "\u201cquoted\u201d", "\U0001f680"):
        assert renter.create(server_id, env={"A": value}) == {"code": 1}
        assert renter.last.status_code == 500
    price = sim.server(server_id).on_demand(CLORE)
    assert renter.create(server_id, required_price=price * 1.01) == {"code": 1}
    sim.set_offline(server_id)
    assert renter.create(server_id) == {"code": 6, "error": "server-offline"}
    sim.set_offline(server_id, False)
    sim.set_rented(server_id)
    assert renter.create(server_id) == {"code": 6, "error": "server-already-rented"}
    sim.set_rented(server_id, False)
    picky = next(s for s in sim.servers if CLORE not in s.allowed_coins)
    assert renter.create(picky.id) == {"code": 6, "error": "currency-not-allowed"}
    sim.set_balance(CLORE, 0.0)
    assert renter.create(server_id) == {"code": 6, "error": "not_enough_balance"}
    assert sim.orders == []
    sim.set_balance(CLORE, 1e6)
    assert renter.create(server_id, required_price=price) == {"code": 0}
    assert renter.create(server_id) == {"code": 6, "error": "server-already-rented"}


def test_limits() -> None:
    limits = {"rate_limit": 0.4, "create_order_interval": 1.3}
    with Simulator(**QUICK | limits, retry_after=True) as sim:
        renter, other = Renter(sim), Renter(sim, sim.add_key())
        assert renter.get("wallets")["code"] == 0
        assert other.get("wallets")["code"] == 0
        refused = renter.get("wallets")
        assert (refused, renter.last.status_code) == ({"code": 5}, 429)
        assert renter.last.headers["Retry-After"] == "1"
        time.sleep(0.4)
        assert renter.create(free(sim)) == {"code": 0}
        time.sleep(0.4)
        assert renter.create(free(sim)) == {"code": 5}
        assert renter.get("my_orders")["code"] == 0
        time.sleep(0.9)
        assert renter.create(free(sim)) == {"code": 0}
        assert len(sim.orders) == 2
        assert not any(call.processed for call in sim.requests if call.status == 429)


# Spot


def test_spot_market_and_bids(sim: Simulator, renter: Renter) -> None:
    server_id = free(sim)
    answer = renter.get("spot_marketplace", market=str(server_id))
    assert answer["exists"] is True
    market = answer["market"]
    assert market["currency_rates_in_usd"] == RATES
    minimum = market["server"]["min_pricing"][CLORE]
    assert minimum == sim.server(server_id).min_bid(CLORE)
    low = renter.create(server_id, type="spot", spotprice=minimum * 0.9)
    assert low == {"code": 6, "error": "too_low_price"}
    assert renter.create(server_id, type="spot", spotprice=minimum * 1.5) == {"code": 0}
    (order,) = renter.orders()
    assert order["spot"] is True
    assert order["price"] == minimum * 1.5
    offers = renter.get("spot_marketplace", market=str(server_id))["market"]["offers"]
    (mine,) = [offer for offer in offers if offer["my"]]
    assert (mine["bid"], mine["active"], mine["currency"]) == (minimum * 1.5, True, CLORE)
    other = Renter(sim, sim.add_key())
    offers = other.get("spot_marketplace", market=str(server_id))["market"]["offers"]
    assert not any(offer["my"] for offer in offers)
    assert any(offer["active"] for offer in offers)
    assert renter.get("spot_marketplace", market="1")["exists"] is False
    assert renter.get("spot_marketplace") == {"code": 2}


def test_changing_a_bid() -> None:
    with Simulator(**QUICK, max_step=0.5, lowering_interval=0.8) as sim:
        renter, server_id = Renter(sim), free(sim)
        sim.set_price(server_id, 5.0, 2.0)
        renter.create(server_id, type="spot", currency=USD, spotprice=4.0)
        order_id = sim.orders[0].id

        def bid(price: float) -> dict[str, Any]:
            return renter.post("set_spot_price", {"order_id": order_id, "desired_price": price})

        assert bid(4.2) == {"code": 0}
        assert bid(1.0) == {"code": 6, "error": "too_low_price"}
        assert bid(3.0) == {"code": 6, "error": "exceeded_max_step", "max_step": 0.5}
        assert bid(3.8) == {"code": 0}
        refused = bid(3.6)
        assert refused["error"] == "can_lower_every_600_seconds"
        assert refused["time_to_lowering"] == 1
        assert bid(4.0) == {"code": 0}
        time.sleep(0.8)
        assert bid(3.6) == {"code": 0}
        assert sim.orders[0].price == 3.6
        renter.create(free(sim))
        plain = sim.orders[1].id
        wrong = {"order_id": plain, "desired_price": 3.0}
        assert renter.post("set_spot_price", wrong) == {"code": 2}


# The documented form


def test_documented_form() -> None:
    with Simulator(**QUICK, form="documented") as sim:
        renter, server_id = Renter(sim), free(sim)
        fact = sim.server(server_id)
        server = next(s for s in renter.get("marketplace")["servers"] if s["id"] == server_id)
        assert server["gpu_array"] == fact.gpus
        assert set(server["price"]) == {"usd"}
        hourly = fact.usd_on_demand[CLORE] / 24
        assert server["price"]["usd"]["on_demand_clore"] == pytest.approx(hourly, rel=1e-4)
        assert fact.reliability is not None
        assert server["reliability"] == pytest.approx(fact.reliability * 100)
        assert renter.get("wallets")["wallets"][0].keys() == {"name", "deposit_address", "balance"}

        spot = fact.usd_spot[CLORE] / 24
        created = renter.create(server_id, type="spot", spotprice=spot * 1.2)
        assert created == {"code": 0, "order_id": sim.orders[0].id, "status": "creating"}
        assert sim.orders[0].usd_per_hour == pytest.approx(spot * 1.2, rel=1e-4)
        until(lambda: sim.orders[0].status == "running")
        (order,) = renter.orders()
        assert (order["order_id"], order["renting_server"]) == (created["order_id"], server_id)
        assert order["status"] == "running"
        port = sim.orders[0].ssh_port
        assert order["connection"]["ssh"] == f"ssh root@127.0.0.1 -p {port}"
        assert order["connection"]["http_ports"]["8888"].startswith("https://")
        assert order["price"] == pytest.approx(sim.orders[0].price / 24)
        for marker in ("si", "ct", "mon_container", "pub_cluster"):
            assert marker not in order

        market = renter.get("spot_marketplace", market=str(server_id))
        assert "exists" not in market
        assert not {"currency_rates_in_usd", "server"} & market["market"].keys()
        assert not any("bid" in offer for offer in market["market"]["offers"])
        bid = {"order_id": order["order_id"], "desired_price": spot * 1.3}
        assert renter.post("set_spot_price", bid) == {"code": 0}
        refused = renter.post("set_spot_price", bid | {"desired_price": spot / 2})
        assert refused == {"code": 0, "error": "too_low_price"}
        assert renter.post("cancel_order", {"id": order["order_id"]}) == {"code": 0}
        assert renter.orders() == []
        assert renter.orders(completed=True)[0]["status"] == "cancelled"
        renter.create(free(sim))
        sim.end_order(sim.orders[1].id)
        assert renter.orders(completed=True)[1]["status"] == "expired"


# Clocks, TLS, records, arguments


@pytest.mark.parametrize("offset", [-7200.0, 0.0, 86400.0])
def test_clock_offset(offset: float) -> None:
    with Simulator(**QUICK, clock_offset=offset) as sim:
        renter = Renter(sim)
        renter.create(free(sim))
        date = parsedate_to_datetime(renter.last.headers["Date"]).timestamp()
        assert abs(date - time.time() - offset) < 3
        assert abs(renter.orders()[0]["ct"] - date) < 3
        renter.get("nothing")
        assert "Date" in renter.last.headers


def test_tls() -> None:
    with Simulator(**QUICK, tls=True) as sim:
        assert sim.url.startswith("https://")
        assert sim.ca_file
        answer = requests.get(f"{sim.url}/v1/marketplace", verify=sim.ca_file, timeout=5)
        assert answer.json()["code"] == 0
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(f"{sim.url}/v1/marketplace", timeout=5)


def test_requests_are_written_down(sim: Simulator, renter: Renter) -> None:
    renter.get("my_orders", return_completed="true")
    renter.create(free(sim), env={"TOKEN": "hidden-value"})
    first, second = sim.requests
    assert (first.method, first.path, first.endpoint) == ("GET", "/v1/my_orders", "my_orders")
    assert first.query == {"return_completed": "true"}
    assert first.headers["auth"] == first.key == sim.api_key
    assert (first.status, first.code, first.body) == (200, 0, None)
    assert second.body["renting_server"] == sim.orders[0].server_id
    assert second.arrived > first.arrived
    shown = repr(sim.requests) + repr(sim.orders) + repr(sim)
    for secret in (sim.api_key, "secret-password", "hidden-value"):
        assert secret not in shown
    sim.clear_requests()
    assert sim.requests == []


def test_answers_are_one_write_each(renter: Renter) -> None:
    renter.get("wallets")
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        renter.get("wallets")
        seconds.append(time.perf_counter() - start)
    # With a delayed acknowledgement in between it would be 40 ms, each time.
    assert sorted(seconds)[10] < 0.035


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("servers", -1),
        ("servers", 2.5),
        ("servers", True),
        ("seed", "x"),
        ("form", "other"),
        ("rate_limit", -1),
        ("rate_limit", math.nan),
        ("create_order_interval", "5"),
        ("visible_after", (5, 2)),
        ("visible_after", (1, 2, 3)),
        ("deploy_after", -1),
        ("cancel_lingers", None),
        ("balance", -5),
        ("balance", {"DOGE": 5}),
        ("host", "0.0.0.0"),
        ("host", "example.com"),
        ("port", 70000),
        ("create_answer", "all"),
        ("clock_offset", math.inf),
        ("chaos", 1.5),
        ("ssh", 1),
    ],
)
def test_arguments_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Simulator(**{name: value})


def test_many_at_once_and_only_started_once() -> None:
    sims = [Simulator(**QUICK).start() for _ in range(5)]
    try:
        assert len({sim.url for sim in sims}) == 5
        for sim in sims:
            assert Renter(sim).create(free(sim)) == {"code": 0}
            assert len(sim.orders) == 1
        with pytest.raises(RuntimeError):
            sims[0].start()
        port = int(sims[0].url.rsplit(":", 1)[1])
        with pytest.raises(OSError, match="address"):
            Simulator(port=port).start()
    finally:
        for sim in sims:
            sim.stop()
            sim.stop()
    with pytest.raises(requests.ConnectionError):
        requests.get(sims[0].url, timeout=2)
