"""Special cases of the wire: the simulator has each of them, and the client handles them."""

from __future__ import annotations

import collections
import time
from typing import Any

import pytest
import requests

from clore_client import (
    CloreClient,
    CloreConnectionError,
    CloreError,
    InsufficientBalanceError,
    ServerAlreadyRentedError,
    ServerOfflineError,
    SSHError,
)
from tests.conftest import MakeSim, client_for, sent_to, until
from tests.variant import Simulator

pytestmark = pytest.mark.internal  # it takes long

# An order that is not deployed, but has host, ports and http_pub.
FILLED_EARLY: dict[str, Any] = {
    "id": 1958009,
    "si": 105169,
    "image": "cloreai/jupyter:ubuntu24.04-v2",
    "currency": "USD-Blockchain",
    "price": 5.59,
    "fee": 0.05,
    "creation_fee": 0.1,
    "spend": 0.0075,
    "ct": 1784203200,
    "mrl": 604800,
    "spot": False,
    "expired": False,
    "online": True,
    "mon_container": 0,
    "pub_cluster": ["n1.us.clorecloud.net"],
    "tcp_ports": ["22:2060"],
    "http_port": "8888",
    "http_pub": "x1y2z3.clorecloud.net",
    "specs": {
        "mb": "2129",
        "cpus": "44/88",
        "ram": 128.81,
        "gpu": "1x NVIDIA GeForce RTX 4090",
        "gpuram": 23,
        "disk": "2320 102.4688GB",
        "net": {"up": 29.35, "down": 106.23, "cc": "US", "test_history": ["S|1760|52.7|26.2"]},
        "backend_version": 21,
        "xfs": 1,
    },
    "rating": {"avg": 4.64, "cnt": 44},
    "cuda_version": "13.0",
    "reliability": 0.99,
    "owner": 24169,
    "gpu_array": [" RTX 4090"],
}


class Raw:
    """Requests to the simulator without the client."""

    def __init__(self, sim: Simulator) -> None:
        self.sim = sim
        self.session = requests.Session()
        self.session.headers["auth"] = sim.api_key

    def get(self, endpoint: str, **query: str) -> dict[str, Any]:
        answer = self.session.get(f"{self.sim.url}/v1/{endpoint}", params=query, timeout=10)
        decoded: dict[str, Any] = answer.json()
        return decoded

    def post(self, endpoint: str, body: Any) -> requests.Response:
        return self.session.post(f"{self.sim.url}/v1/{endpoint}", json=body, timeout=10)

    def order(self, server_id: int, **more: Any) -> requests.Response:
        body = {
            "renting_server": server_id,
            "type": "on-demand",
            "currency": "CLORE-Blockchain",
            "image": "x",
            "ports": {"22": "tcp", "8888": "http"},
            "ssh_password": "secret",
        }
        return self.post("create_order", {**body, **more})


def free_servers(sim: Simulator) -> list[int]:
    return [s.id for s in sim.servers if not s.rented and s.online and len(s.allowed_coins) == 3]


@pytest.fixture
def many(make_sim: MakeSim) -> tuple[Simulator, Raw]:
    """Return a simulator with 40 orders, none of them deployed."""
    sim = make_sim(servers=200, rate_limit=0, create_order_interval=0, visible_after=0,
                   deploy_after=3600, balance=1e6)  # fmt: skip
    raw = Raw(sim)
    for server_id in free_servers(sim)[:40]:
        assert raw.order(server_id).json()["code"] == 0
    return sim, raw


# Orders before they are deployed


def test_the_simulator_shows_every_kind_of_new_order(many: tuple[Simulator, Raw]) -> None:
    sim, raw = many
    kinds = collections.Counter()  # type: collections.Counter[str]
    for order in raw.get("my_orders")["orders"]:
        assert order["mon_container"] in (0, 1)
        kinds[f"mon_container {order['mon_container']}"] += 1
        if "pub_cluster" not in order:
            assert "tcp_ports" not in order
            kinds["missing"] += 1
        elif not order["pub_cluster"]:
            assert order["tcp_ports"] == []
            kinds["empty"] += 1
        else:
            assert order["tcp_ports"] == [f"22:{sim.order(order['id']).ssh_port}"]
            assert order["http_port"] == "8888"
            assert order["http_pub"]
            kinds[f"filled, host as {type(order['pub_cluster']).__name__}"] += 1
        kinds["with fee" if "fee" in order else "without fee"] += 1
        if "expired" not in order:
            assert "spot" not in order
            kinds["without flags"] += 1
        kinds["newer" if "original_price_usd" in order else "older"] += 1
    assert kinds.keys() == {
        "mon_container 0",
        "mon_container 1",
        "missing",
        "empty",
        "filled, host as list",
        "filled, host as str",
        "with fee",
        "without fee",
        "without flags",
        "newer",
        "older",
    }


def test_the_client_shows_every_kind_as_creating(many: tuple[Simulator, Raw]) -> None:
    sim, _ = many
    client = client_for(sim)
    orders = client.get_orders()
    assert {order.id for order in orders} == {order.id for order in sim.orders}
    for order in orders:
        assert order.status == "creating"
        assert order["connection"]["ssh"] == ""
        assert order.ssh_command is None
        with pytest.raises(SSHError, match="no address"):
            client.ssh_command(order)
    assert all(order["price"] > 0 for order in orders)


def test_an_order_with_host_and_ports_runs_only_after_it_is_deployed(
    sim: Simulator, client: CloreClient
) -> None:
    early = {"code": 0, "orders": [FILLED_EARLY]}
    sim.faults.add("my_orders", "envelope", envelope=early)
    (order,) = client.get_orders()
    assert (order.status, order["connection"]["ssh"]) == ("creating", "")
    assert order.wire == FILLED_EARLY
    deployed = {"code": 0, "orders": [{**FILLED_EARLY, "mon_container": 2}]}
    sim.faults.add("my_orders", "envelope", envelope=early, times=2)
    sim.faults.add("my_orders", "envelope", envelope=deployed)
    statuses = []
    order = client.wait_for_order(
        1958009, timeout=20, poll_interval=0.01, on_update=lambda o: statuses.append(o and o.status)
    )
    assert statuses == ["creating", "creating", "running"]
    assert order["connection"]["ssh"] == "ssh root@n1.us.clorecloud.net -p 2060"


@pytest.mark.parametrize("seed", range(6))
def test_waiting_ends_only_when_the_order_runs(make_sim: MakeSim, seed: int) -> None:
    sim = make_sim(seed=seed, deploy_after=0.4)
    client = client_for(sim)
    made = client.create_order(free_servers(sim)[0], ports={"22": "tcp", "8888": "http"})
    client.wait_for_order(made["order_id"], timeout=20, poll_interval=0.02)
    order = sim.orders[0]
    assert order.deployed is not None
    assert order.deployed - order.created >= 0.4
    assert order.deployed <= time.monotonic()


def test_an_order_that_does_not_say_spot_is_on_demand(many: tuple[Simulator, Raw]) -> None:
    sim, raw = many
    client = client_for(sim)
    kinds = set()
    for order in raw.get("my_orders")["orders"]:
        kinds.add(order.get("spot"))
        with pytest.raises(ValueError, match=r"order_id \d+ is not a spot order"):
            client.set_spot_price(order["id"], 0.1)
    assert kinds == {False, None}
    assert not sent_to(sim, "set_spot_price")


def test_a_spot_order_says_so(any_sim: Simulator, any_client: CloreClient) -> None:
    server = any_client.find_cheapest("RTX 4090")
    assert server is not None
    made = any_client.create_order(server["id"], order_type="spot", spot_price=0.2)
    order = until(lambda: any_client.get_order(made["order_id"]))
    assert order.is_spot in ((True,) if order.is_live else (None,))


# Other fields of an order


def test_orders_have_seconds_and_the_details_of_the_machine(
    many: tuple[Simulator, Raw],
) -> None:
    sim, raw = many
    for order in raw.get("my_orders")["orders"]:
        server = sim.server(order["si"])
        assert order["mrl"] == server.mrl * 3600
        assert {"rating", "cuda_version"} <= order.keys()
        if order["specs"] is not None:
            assert order["specs"].keys() >= server.record["specs"].keys()
            assert order["specs"]["backend_version"]
            if server.record["specs"].get("net"):
                assert order["specs"]["net"]["test_history"]
    listed = {s["id"]: s for s in raw.get("marketplace")["servers"]}
    assert all("backend_version" not in (s["specs"] or {}) for s in listed.values())


def test_the_client_keeps_all_fields_of_an_order(many: tuple[Simulator, Raw]) -> None:
    sim, raw = many
    wire = {order["id"]: order for order in raw.get("my_orders")["orders"]}
    for order in client_for(sim).get_orders():
        for name in ("mrl", "specs", "rating", "cuda_version", "owner"):
            assert order[name] == wire[order["order_id"]][name]
        assert order["price"] == wire[order["order_id"]]["price"] / 24


def test_the_envelope_of_newer_responses(many: tuple[Simulator, Raw]) -> None:
    sim, raw = many
    assert "limit" in raw.get("my_orders")
    assert all("my_past_rating" in o for o in raw.get("my_orders")["orders"]
               if "original_price_usd" in o)  # fmt: skip
    assert len(client_for(sim).get_orders(include_completed=True)) == 40


def test_both_kinds_of_partial_rentals(make_sim: MakeSim) -> None:
    sim = make_sim(servers=400)
    kinds = {type(s.get("partial_gpu_rental")) for s in Raw(sim).get("marketplace")["servers"]}
    assert kinds == {type(None), dict, bool}
    servers = client_for(sim).get_marketplace(include_rented=True)
    assert len(servers) == 400
    assert {type(s.get("partial_gpu_rental")) for s in servers} == kinds
    assert any(s.get("partial_gpu_rental") is True for s in servers)


# Refusals


def test_code_6_comes_with_either_status(any_sim: Simulator) -> None:
    raw = Raw(any_sim)
    any_sim.set_balance("CLORE-Blockchain", 0.0)
    server_id, statuses = free_servers(any_sim)[0], set()

    def both() -> bool:
        answer = raw.order(server_id)
        if answer.status_code != 429:
            assert answer.json() == {"code": 6, "error": "not_enough_balance"}
            statuses.add(answer.status_code)
        return statuses == {200, 500}

    until(both)


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("not_enough_balance", InsufficientBalanceError),
        ("server-already-rented", ServerAlreadyRentedError),
        ("server-offline", ServerOfflineError),
    ],
)
def test_code_6_is_a_refusal_with_either_status(
    any_sim: Simulator, any_client: CloreClient, status: int, error: str, kind: type[CloreError]
) -> None:
    envelope = {"code": 6, "error": error}
    any_sim.faults.add("create_order", "envelope", envelope=envelope, status=status)
    with pytest.raises(kind):
        any_client.create_order(free_servers(any_sim)[0])
    assert len(sent_to(any_sim, "create_order")) == 1


# Cancelling many


@pytest.fixture(params=["live", "documented"])
def crowd(request: pytest.FixtureRequest, make_sim: MakeSim) -> Simulator:
    """Return a simulator with 130 running orders."""
    sim = make_sim(form=request.param, servers=400, rate_limit=0, create_order_interval=0,
                   balance=1e6, visible_after=0)  # fmt: skip
    raw = Raw(sim)
    for server_id in free_servers(sim)[:130]:
        assert raw.order(server_id).json()["code"] == 0
    return sim


def test_the_simulator_refuses_more_than_64_ids(crowd: Simulator) -> None:
    raw, ids = Raw(crowd), [order.id for order in crowd.orders]
    assert raw.post("cancel_orders", {"order_ids": ids[:65]}).json() == {"code": 2}
    assert all(order.active for order in crowd.orders)
    answer = raw.post("cancel_orders", {"order_ids": [5, *ids[:63]]}).json()
    assert answer == {"code": 0, "failed_to_cancel": ["5"]}
    assert sum(order.active for order in crowd.orders) == 67


def test_the_client_sends_one_request_for_each_64_ids(crowd: Simulator) -> None:
    client, ids = client_for(crowd), [order.id for order in crowd.orders]
    answer = client.cancel_orders([5, *ids[:100], 6, *ids[100:], 7])
    assert answer["code"] == 0
    assert answer["failed_to_cancel"] == ["5", "6", "7"]
    sizes = [len(call.body["order_ids"]) for call in sent_to(crowd, "cancel_orders")]
    assert sizes == [64, 64, 5]
    assert not any(order.active for order in crowd.orders)


def test_cancel_all_with_many_orders(crowd: Simulator) -> None:
    client = client_for(crowd)
    assert sorted(client.cancel_all(confirm=False)) == [order.id for order in crowd.orders]
    assert not any(order.active for order in crowd.orders)
    assert len(sent_to(crowd, "cancel_orders")) == 3


def test_a_batch_that_fails_does_not_stop_the_others(crowd: Simulator) -> None:
    client, ids = client_for(crowd, max_retries=1), [order.id for order in crowd.orders]
    crowd.faults.add("cancel_orders", "lose_request")
    with pytest.raises(CloreConnectionError) as failed:
        client.cancel_orders(ids)
    running = [order.id for order in crowd.orders if order.active]
    assert running == ids[:64]
    assert f"orders {', '.join(map(str, running))} may still be running" in str(failed.value)


def test_a_lost_response_of_one_batch_is_repaired(make_sim: MakeSim) -> None:
    sim = make_sim(servers=400, rate_limit=0, create_order_interval=0, balance=1e6,
                   visible_after=0, cancel_ended="refuse")  # fmt: skip
    raw = Raw(sim)
    for server_id in free_servers(sim)[:70]:
        raw.order(server_id)
    ids = [order.id for order in sim.orders]
    sim.faults.add("cancel_orders", "lose_response")
    assert client_for(sim).cancel_orders(ids)["failed_to_cancel"] == []
    assert len(sent_to(sim, "cancel_orders")) == 3
    assert not any(order.active for order in sim.orders)


def test_failed_ids_may_come_as_numbers_or_strings(
    any_sim: Simulator, any_client: CloreClient
) -> None:
    order_id = any_client.create_order(free_servers(any_sim)[0])["order_id"]
    for failed in (["77"], [77]):
        envelope = {"code": 0, "failed_to_cancel": failed}
        any_sim.faults.add("cancel_orders", "envelope", envelope=envelope)
        assert any_client.cancel_orders([order_id, 77])["failed_to_cancel"] == failed
    answer = any_client.cancel_orders([77, order_id])
    assert answer["failed_to_cancel"] == ["77"]
    assert not any_sim.orders[0].active


# autossh_entrypoint


@pytest.mark.parametrize("entrypoint", [True, "ssh_autoinstall"])
def test_either_spelling_of_autossh_entrypoint(any_sim: Simulator, entrypoint: object) -> None:
    client = client_for(any_sim)
    body = client.create_order(free_servers(any_sim)[0], preview=True)["body"]
    answer = client._request(
        "POST", "/v1/create_order", json={**body, "autossh_entrypoint": entrypoint}
    )
    assert answer["code"] == 0
    assert any_sim.orders[0].body["autossh_entrypoint"] == entrypoint


@pytest.mark.parametrize("entrypoint", ["yes", 1, None, []])
def test_other_values_of_autossh_entrypoint_are_refused(
    any_sim: Simulator, entrypoint: object
) -> None:
    answer = Raw(any_sim).order(free_servers(any_sim)[0], autossh_entrypoint=entrypoint)
    assert answer.json() == {"code": 2}
