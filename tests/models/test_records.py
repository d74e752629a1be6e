"""Records: the documented form from both forms of the API, with any field values."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clore_client import Order, Server, Wallet
from clore_client.market.search import Search
from clore_client.models.order import ENDED_STATUSES, plain_host, to_orders
from clore_client.models.record import is_live, to_wallets
from clore_client.models.server import Marketplace
from clore_client.pricing import ExchangeRates, bid_per_day, wire_currency

LIVE_SERVER: dict[str, Any] = {
    "id": 99173,
    "owner": 24169,
    "mrl": 720,
    "rented": False,
    "reliability": 0.9731,
    "cuda_version": "13.0",
    "gpu_array": ["RTX 4090"],
    "price": {
        "on_demand": {"bitcoin": 0.0000441, "CLORE-Blockchain": 1108.85, "USD-Blockchain": 3},
        "spot": {"bitcoin": 0.0000294, "CLORE-Blockchain": 739.2, "USD-Blockchain": 2},
        "usd": {"on_demand_btc": 3.0, "on_demand_clore": 3.0, "on_demand_usd": 3, "spot": 0},
        "original_usd": {
            "CLORE-Blockchain": {"on_demand": 3, "spot": 2},
            "bitcoin": {"on_demand": 3, "spot": 2},
        },
    },
    "specs": {
        "cpus": "16/32",
        "ram": 31.81,
        "disk": "KINGSTON SNV2S500G 394.1GB",
        "gpu": "1x NVIDIA GeForce RTX 4090",
        "gpuram": 23,
        "net": {"cc": "NO", "down": 875.6, "up": 866.4},
    },
}
LIVE_ORDER: dict[str, Any] = {
    "id": 1958009,
    "si": 105169,
    "image": "cloreai/jupyter:ubuntu24.04-v2",
    "currency": "USD-Blockchain",
    "price": 5.59,
    "fee": 0.05,
    "spend": 0.0075,
    "ct": 1784203200,
    "spot": False,
    "expired": False,
    "online": True,
    "mon_container": 2,
    "pub_cluster": ["n1.us.clorecloud.net"],
    "tcp_ports": ["22:2060"],
    "http_port": "8888",
    "http_pub": "x1y2z3.clorecloud.net",
}


def servers_of(*records: Any) -> list[Server]:
    return Marketplace({"servers": list(records), "code": 0}).servers(include_rented=True)


def orders_of(*records: Any, cancelled: tuple[int, ...] = ()) -> list[Order]:
    return to_orders({"orders": list(records), "code": 0}, cancelled, ExchangeRates())


def changed(record: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(record), **fields}


def test_a_live_server_in_the_documented_form() -> None:
    wire = copy.deepcopy(LIVE_SERVER)
    (server,) = servers_of(wire)
    assert server["gpu_array"] == ["RTX 4090"]
    assert server["price"]["usd"] == {
        "on_demand_btc": 0.125,
        "on_demand_clore": 0.125,
        "on_demand_usd": 0.125,
        "spot": 2 / 24,
    }
    assert server["reliability"] == 97.31
    for kept in ("on_demand", "spot", "original_usd"):
        assert server["price"][kept] == LIVE_SERVER["price"][kept]
    assert server["owner"] == 24169
    assert (server.gpu_name, server.gpu_count, server.vram_gb) == ("RTX 4090", 1, 23)
    assert (server.usd_per_hour, server.spot_usd_per_hour) == (0.125, 2 / 24)
    assert (server.country, server.ram_gb, server.disk_gb) == ("NO", 31.81, 394.1)
    assert (server.cuda_version, server.reliability, server.rented) == ("13.0", 97.31, False)
    server.wire["specs"]["net"]["cc"] = "XX"
    server["price"]["usd"]["spot"] = 5
    server["gpu_array"].append("more")
    assert server.wire == LIVE_SERVER


def test_a_documented_server_stays_as_it_is() -> None:
    record = {
        "id": 5,
        "gpu_array": ["RTX 3090", "RTX 3090"],
        "price": {"usd": {"on_demand_clore": 0.2, "spot": 0.1}},
        "reliability": 0.97,  # a number alone does not decide the form
        "rented": False,
    }
    (server,) = servers_of(copy.deepcopy(record))
    assert server == record
    assert (server.usd_per_hour, server.spot_usd_per_hour, server.gpu_count) == (0.2, 0.1, 2)


def test_one_marker_decides_for_the_whole_response() -> None:
    bare = {"id": 1, "reliability": 0.5, "price": {"usd": {"on_demand_clore": 24}}}
    assert servers_of(bare)[0].usd_per_hour == 24
    mixed = servers_of(bare, changed(LIVE_SERVER))
    assert (mixed[0].usd_per_hour, mixed[0].reliability) == (1.0, 50.0)


@pytest.mark.parametrize(
    ("answer", "live"),
    [
        ({}, False),
        *[({"orders": [{"order_id": 1, m: None}]}, True)
          for m in ("si", "ct", "mon_container", "pub_cluster")],
        ({"orders": [{"order_id": 1, "status": "running"}]}, False),
        ({"exists": False, "market": None}, True),
        ({"market": {"currency_rates_in_usd": None}}, True),
        ({"market": {"server": {}}}, True),
        ({"market": {"offers": [{"bid": 1}]}}, True),
        ({"market": {"offers": [{"price": 1}]}}, False),
    ],
)  # fmt: skip
def test_the_markers_of_the_live_form(answer: dict[str, Any], live: bool) -> None:
    assert is_live(answer) is live


@pytest.mark.parametrize(
    ("price", "live"),
    [({"on_demand": None}, True), ({"original_usd": {}}, True), ({"usd": {}}, False), (5, False)],
)
def test_the_markers_of_a_live_marketplace(price: Any, live: bool) -> None:
    assert Marketplace({"servers": [None, {}, {"price": price}]}).live is live


@pytest.mark.parametrize(
    ("array", "gpu", "names", "count"),
    [
        ([[" GTX 745"]], None, ["GTX 745"], 1),
        (["RTX 4090 ", "", None, 7], None, ["RTX 4090"], 1),
        (None, "2x NVIDIA GeForce RTX 4070 Ti", ["RTX 4070 Ti"] * 2, 2),
        ([], "8x Tesla V100SXM232GB", ["Tesla V100SXM232GB"] * 8, 8),
        (None, "Mixed GPUs", [], None),
        (["RTX 3080"], "6x NVIDIA GeForce RTX 3080", ["RTX 3080"], 6),
        (None, None, [], None),
    ],
)
def test_gpu_names(array: Any, gpu: Any, names: list[str], count: int | None) -> None:
    (server,) = servers_of(changed(LIVE_SERVER, gpu_array=array, specs={"gpu": gpu}))
    assert server["gpu_array"] == names
    assert server.gpu_count == count


@pytest.mark.parametrize(
    ("price", "usd_per_hour"),
    [
        ({"usd": {"spot": 4.8}}, 0.2),
        ({"usd": {"spot": 0}, "original_usd": {"bitcoin": {"spot": 2.4}}}, 0.1),
        ({"spot": {"USD-Blockchain": 2.4}}, 0.1),
        ({"spot": {"CLORE-Blockchain": 500}, "on_demand": {"CLORE-Blockchain": 1000},
          "usd": {"on_demand_clore": 4.8}}, 0.1),
        ({"spot": {"CLORE-Blockchain": 500}}, None),
        ({"usd": {"spot": 0}, "original_usd": None, "spot": None}, None),
        ({"usd": {"spot": -1}}, None),
    ],
)  # fmt: skip
def test_the_fields_with_the_spot_price(price: dict[str, Any], usd_per_hour: float | None) -> None:
    record = changed(LIVE_SERVER, price={"on_demand": None, **price})
    (server,) = servers_of(record)
    if usd_per_hour is None:
        assert server.spot_usd_per_hour is None
    else:
        assert server.spot_usd_per_hour == pytest.approx(usd_per_hour)


def test_hostile_text_is_parsed_quickly() -> None:
    specs = {"gpu": "1x" + " " * 200_000 + "\x00", "disk": "1" * 200_000 + " " * 200_000}
    (server,) = servers_of(changed(LIVE_SERVER, gpu_array=None, specs=specs))
    assert server.disk_gb is None
    assert "\x00" not in repr(server)


def test_a_live_order_in_the_documented_form() -> None:
    (order,) = orders_of(LIVE_ORDER)
    assert order["order_id"] == 1958009
    assert order["renting_server"] == 105169
    assert order["status"] == "running"
    assert order["connection"] == {
        "ssh": "ssh root@n1.us.clorecloud.net -p 2060",
        "http_ports": {"8888": "https://x1y2z3.clorecloud.net"},
    }
    assert order["price"] == 5.59 / 24
    assert order["started"] == 1784203200
    assert order["spend"] == 0.0075
    assert (order.id, order.server_id, order.is_running) == (1958009, 105169, True)
    assert order.usd_per_hour == 5.59 / 24
    assert order.started_at == 1784203200
    assert order.http_urls == {"8888": "https://x1y2z3.clorecloud.net"}
    assert order.wire == LIVE_ORDER


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, "running"),
        ({"pub_cluster": "n1.us.clorecloud.net"}, "running"),
        ({"mon_container": None}, "running"),
        ({"online": None}, "running"),
        ({"tcp_ports": ["8080:1"]}, "running"),
        ({"mon_container": 1}, "creating"),
        ({"online": False}, "creating"),
        ({"pub_cluster": []}, "creating"),
        ({"pub_cluster": ["-oProxyCommand=x"]}, "creating"),
        ({"pub_cluster": ["a b"]}, "creating"),
        ({"tcp_ports": []}, "creating"),
        ({"tcp_ports": ["22:99999", "x", 5]}, "creating"),
        ({"tcp_ports": None}, "creating"),
        ({"expired": True}, "expired"),
    ],
)
def test_the_status_of_a_live_order(fields: dict[str, Any], status: str) -> None:
    assert orders_of(changed(LIVE_ORDER, **fields))[0].status == status


def test_an_order_that_this_client_cancelled() -> None:
    record = changed(LIVE_ORDER, expired=True, tcp_ports=[])
    (order,) = orders_of(record, cancelled=(1958009,))
    assert order.status == "cancelled"
    assert order.has_ended
    (order,) = orders_of(LIVE_ORDER, cancelled=(1958009,))
    assert order.status == "running"


def test_a_documented_order_stays_as_it_is() -> None:
    record = {"order_id": 3, "renting_server": 4, "status": "running", "price": 0.3,
              "connection": {"ssh": "ssh root@h -p 1", "http_ports": {}}}  # fmt: skip
    (order,) = orders_of(record)
    assert order == record
    assert order.ssh_command == "ssh root@h -p 1"
    assert order.usd_per_hour is None  # it has no currency


def test_order_markers_together_with_an_order_id() -> None:
    (order,) = orders_of({"order_id": 9, "mon_container": 1, "price": 24.0})
    assert (order.id, order["price"], order.status) == (9, 1.0, "creating")


def test_wallets_in_both_forms() -> None:
    live, documented = to_wallets(
        {"wallets": [{"name": "bitcoin", "deposit": "bc1", "balance": None},
                     {"name": "USD-Blockchain", "deposit_address": "0x", "balance": 2}]}
    )  # fmt: skip
    assert live["deposit_address"] == live["deposit"] == live.deposit_address == "bc1"
    assert (live.balance, documented.balance, documented.deposit_address) == (None, 2, "0x")


@pytest.mark.parametrize("record", [servers_of(LIVE_SERVER)[0], orders_of(LIVE_ORDER)[0],
                                    to_wallets({"wallets": [{"deposit": "x"}]})[0]])  # fmt: skip
def test_records_behave_like_dicts(record: Any) -> None:
    twins = [record.copy(), copy.copy(record), copy.deepcopy(record), record | {}, {} | record,
             pickle.loads(pickle.dumps(record))]  # fmt: skip
    for twin in twins:
        assert type(twin) is type(record)
        assert twin == record == dict(record)
        assert twin.wire == record.wire
    assert json.loads(json.dumps(record)) == record
    more = record | {"extra": 1}
    assert more["extra"] == 1
    assert "extra" not in more.wire
    assert "extra" not in record
    by_hand = type(record)(json.loads(json.dumps(record)))
    assert by_hand.wire == record
    assert "\n" not in repr(record)


def test_usd_per_hour_of_an_order_survives_copies() -> None:
    rates = ExchangeRates()
    rates.update({"CLORE-Blockchain": 0.002})
    (order,) = to_orders({"orders": [{**LIVE_ORDER, "currency": "CLORE-Blockchain"}]}, (), rates)
    assert order.usd_per_hour == pytest.approx(5.59 / 24 * 0.002)
    assert pickle.loads(pickle.dumps(order)).usd_per_hour == order.usd_per_hour
    assert (order | {"x": 1}).usd_per_hour == order.usd_per_hour


def test_a_repr_masks_credentials_and_escapes_controls() -> None:
    order = Order(LIVE_ORDER, order_id=1, ssh_password="geheim1", status="\x1b[2J\u202e")
    for text in (repr(order), str(order), f"{order}", repr([order])):
        assert "geheim1" not in text
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert order["ssh_password"] == "geheim1"
    wallet = Wallet(name="a", token="geheim2", nested={"auto_login": "geheim3"})
    assert "geheim" not in repr(wallet)


# Invariant: for any record, the conversion and every property return a value or None.
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["22:2060", "1x A", "5GB", 10**400, "bitcoin", 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["usd", "spot", "on_demand", "on_demand_clore", "CLORE-Blockchain",
                         "gpu", "disk", "net", "cc", "ssh", "http_ports", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, record: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(record)
    for name in draw(st.lists(st.sampled_from(sorted(record)), max_size=6)):
        if draw(st.booleans()):
            result.pop(name, None)
        else:
            result[name] = draw(values)
    return result


def properties_of(record: Any) -> None:
    for name in dir(type(record)):
        if isinstance(getattr(type(record), name), property):
            getattr(record, name)
    repr(record)
    record.copy()


def test_a_price_that_is_too_small_is_no_price() -> None:
    tiny = changed(LIVE_SERVER, price={"usd": {"on_demand_clore": 5e-324}, "on_demand": {},
                                       "original_usd": {"bitcoin": {"spot": 5e-324}}})  # fmt: skip
    marketplace = Marketplace({"servers": [tiny]})
    assert marketplace.prices == {}
    assert marketplace[0]["price"]["usd"]["spot"] is None
    assert marketplace[0].usd_per_hour is None


@given(st.lists(damaged(LIVE_SERVER) | values, max_size=4), st.booleans())
def test_no_marketplace_raises(records: list[Any], spot: bool) -> None:
    before = repr(records)
    marketplace = Marketplace({"servers": records})
    for server in marketplace.servers(include_rented=True):
        properties_of(server)
        assert server.usd_per_hour is None or 0 < server.usd_per_hour < math.inf
    Search(use_spot=spot).run(marketplace)
    Search("rtx", 1.0, 50, spot).run(marketplace)
    assert repr(records) == before


@given(st.lists(damaged(LIVE_ORDER) | values, max_size=4))
def test_no_order_list_raises(records: list[Any]) -> None:
    for order in to_orders({"orders": records}, {1958009}, ExchangeRates()):
        properties_of(order)
        if is_live({"orders": records}):
            assert order["status"] in {"running", "creating", "expired", "cancelled"}
            assert order.status != "running" or order["connection"] is not None


@given(values, values)
def test_no_envelope_raises(servers: Any, orders: Any) -> None:
    assert Marketplace({"servers": servers}).servers() is not None
    assert to_orders({"orders": orders}, (), ExchangeRates()) is not None
    assert to_wallets({"wallets": servers}) is not None
    is_live({"market": orders})


@given(st.lists(st.floats(min_value=0.01, max_value=50) | st.sampled_from([0, None, "x", -1])))
def test_sorting_is_stable_and_puts_servers_without_a_price_last(prices: list[Any]) -> None:
    records = [
        {"id": n, "price": {"on_demand": {}, "usd": {"on_demand_clore": p}}}
        for n, p in enumerate(prices)
    ]
    found, _ = Search().run(Marketplace({"servers": records, "code": 0}))
    keys = [(s.usd_per_hour is None, s.usd_per_hour or 0, s["id"]) for s in found]
    assert keys == sorted(keys)


@given(st.floats(min_value=1e-4, max_value=1e3), st.floats(min_value=1e-6, max_value=1e5))
def test_a_converted_bid_converts_back(usd_per_hour: float, rate: float) -> None:
    rates = ExchangeRates()
    rates.update({"bitcoin": rate})
    back = rates.usd(bid_per_day(usd_per_hour, rate), "BTC")
    assert back is not None
    assert back / 24 == pytest.approx(usd_per_hour, rel=1e-12)


def test_invalid_rates_are_dropped() -> None:
    rates = ExchangeRates()
    rates.update({"a": 0, "b": -1, "c": None, "d": float("nan"), "e": True, "f": 2})
    assert rates.fresh() == {"f": 2.0}
    rates.update(None)
    assert rates.usd(1, "USD-Blockchain") == 1.0
    assert ExchangeRates().fresh() == {}


def test_names_of_currencies() -> None:
    for name in ("btc", "BTC", "Bitcoin", " bitcoin "):
        assert wire_currency(name) == "bitcoin"
    assert wire_currency("clore") == wire_currency("CLORE-blockchain") == "CLORE-Blockchain"
    assert wire_currency("usd") == "USD-Blockchain"
    assert wire_currency("doge") is None


def test_plain_hosts() -> None:
    for good in ("n1.us.clorecloud.net", "127.0.0.1", "::1", "host_1", "A.b."):
        assert plain_host(good)
    for bad in ("", "-x", "a b", "a;b", "a\n", "a..b", "$(x)", "fe80::1%$(x)", "é.fr", "a" * 300):
        assert not plain_host(bad)
    assert "expired" in ENDED_STATUSES
