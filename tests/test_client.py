"""Every method of the contract, in both wire forms."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

import clore_client
from clore_client import (
    AuthenticationError,
    CloreClient,
    CloreConnectionError,
    CloreError,
    InsufficientBalanceError,
    InvalidInputError,
    Order,
    OrderEndedError,
    OrderNotFoundError,
    OrderOutcomeUnknownError,
    Server,
    ServerAlreadyRentedError,
    ServerOfflineError,
    WaitTimeoutError,
)
from tests.conftest import MakeSim, client_for, sent_to
from tests.variant import Simulator


def plain_server(client: CloreClient, n: int = 0) -> int:
    """Return the id of a server that accepts all currencies and is online."""
    return int(client.find_servers("RTX 4090", min_reliability=96)[n]["id"])


def test_wallets(any_sim: Simulator, any_client: CloreClient) -> None:
    wallets = any_client.get_wallets()
    assert [w["name"] for w in wallets] == ["bitcoin", "CLORE-Blockchain", "USD-Blockchain"]
    assert all(w["deposit_address"] and w["balance"] > 0 for w in wallets)
    assert any_client.get_balance() == any_client.get_balance("clore") == wallets[1]["balance"]
    assert any_client.get_balance("BTC") == any_client.get_balance("itco") == wallets[0]["balance"]
    assert any_client.get_balance("usd") == 100.0
    with pytest.raises(ValueError, match=r"'doge' is neither a currency .* 'CLORE-Blockchain'"):
        any_client.get_balance("doge")


def test_a_null_balance_is_zero(make_sim: MakeSim) -> None:
    sim = make_sim(balance={"bitcoin": None})
    assert client_for(sim).get_balance("BTC") == 0.0


def test_marketplace(any_sim: Simulator, any_client: CloreClient) -> None:
    everything = any_client.get_marketplace(include_rented=True)
    free = any_client.get_marketplace()
    assert len(everything) == 60
    assert free == [s for s in everything if not s["rented"]]
    assert 0 < len(free) < 60
    truth = {server.id: server for server in any_sim.servers}
    for server in everything:
        assert isinstance(server, Server)
        assert all(isinstance(name, str) and name == name.strip() for name in server["gpu_array"])
        if server.usd_per_hour is not None:
            listed = truth[server["id"]].usd_on_demand["CLORE-Blockchain"]
            assert server.usd_per_hour == pytest.approx(listed / 24, abs=1e-6)
        if server.reliability is not None:
            known = truth[server["id"]].reliability
            assert known is not None
            assert server.reliability == pytest.approx(known * 100)


def test_find_servers(any_client: CloreClient) -> None:
    found = any_client.find_servers("rtx 4090", max_price_usd=0.3, min_reliability=90)
    assert found
    prices = [s["price"]["usd"]["on_demand_clore"] for s in found]
    assert prices == sorted(prices)
    assert max(prices) <= 0.3
    assert min(s["reliability"] for s in found) >= 90
    assert all("4090" in name for s in found for name in s["gpu_array"])
    assert not any(s["rented"] for s in found)
    assert any_client.find_cheapest("RTX 4090", 0.3, 90) == found[0]
    assert any_client.find_cheapest("no such card") is None
    spot = any_client.find_servers("RTX 4090", use_spot=True)
    bids = [s.spot_usd_per_hour for s in spot]
    priced = [b for b in bids if b is not None]
    assert priced == sorted(priced)
    assert bids[len(priced) :] == [None] * (len(bids) - len(priced))
    assert len(any_client.find_servers()) == len(any_client.get_marketplace())


def test_a_server_without_a_price_comes_last_and_passes_no_limit(
    sim: Simulator, client: CloreClient
) -> None:
    prices = [None, 0, -1, "x", 48, 24, 24.0]
    servers = [{"id": n, "price": {"on_demand": {}, "usd": {"on_demand_clore": p}}}
               for n, p in enumerate(prices)]  # fmt: skip
    for _ in range(2):
        sim.faults.add("marketplace", "envelope", envelope={"code": 0, "servers": servers})
    assert [s["id"] for s in client.find_servers()] == [5, 6, 4, 0, 1, 2, 3]
    assert [s["id"] for s in client.find_servers(max_price_usd=float("inf"))] == [5, 6, 4]


def test_the_life_of_an_order(any_sim: Simulator, any_client: CloreClient) -> None:
    server_id = plain_server(any_client)
    order = any_client.create_order(server_id)
    assert isinstance(order, Order)
    assert order["code"] == 0
    assert order["renting_server"] == server_id
    made = any_sim.orders[0]
    assert order["order_id"] == made.id
    assert order["ssh_password"] == made.body["ssh_password"]
    assert made.body == made.body | {
        "renting_server": server_id,
        "type": "on-demand",
        "currency": "CLORE-Blockchain",
        "image": "nvidia/cuda:12.1.0-base-ubuntu22.04",
        "ports": {"22": "tcp"},
        "env": {"NVIDIA_VISIBLE_DEVICES": "all"},
    }
    assert "ssh_key" not in made.body
    assert "spotprice" not in made.body
    assert "jupyter_token" not in made.body
    running = any_client.wait_for_order(order["order_id"], timeout=20, poll_interval=0.02)
    assert running["status"] == "running"
    assert running["connection"]["ssh"].startswith("ssh root@127.0.0.1 -p ")
    assert running["price"] == pytest.approx(made.price / 24)
    assert running["started"] == made.created_at
    again = any_client.get_order(order["order_id"])
    assert again is not None
    assert again | {"spend": 0} == running | {"spend": 0}
    assert [o["order_id"] for o in any_client.get_orders()] == [made.id]
    assert any_client.cancel_order(order["order_id"]) is True
    gone = any_client.wait_for_order(made.id, timeout=20, poll_interval=0.02,
                                     target_status="expired")  # fmt: skip
    assert gone["status"] == "cancelled"
    assert any_client.get_orders() == []
    assert any_client.get_orders(include_completed=True)[0]["order_id"] == made.id
    assert any_client.get_order(made.id) == gone
    assert any_client.get_order(1) is None
    assert any_client.cancel_order(made.id) is True


@pytest.mark.parametrize("answer", ["none", "order_id", "id", "order"])
def test_every_form_of_the_response_to_create_order_gives_an_id(
    make_sim: MakeSim, answer: str
) -> None:
    sim = make_sim(create_answer=answer)
    client = client_for(sim)
    order = client.create_order(plain_server(client), ssh_password="mine")
    assert order["order_id"] == sim.orders[0].id
    assert order["code"] == 0
    assert order.status in {"creating", "running"}
    assert "ssh_password" not in order


def test_the_arguments_of_create_order_are_sent(
    any_sim: Simulator, any_client: CloreClient
) -> None:
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl me"
    any_client.create_order(
        plain_server(any_client), "img:1", "on-demand", "usd", {"22": "tcp", "8888": "http"},
        {"A": "b"}, None, key, None, "tok",
    )  # fmt: skip
    body = any_sim.orders[0].body
    assert body["image"] == "img:1"
    assert body["currency"] == "USD-Blockchain"
    assert body["ports"] == {"22": "tcp", "8888": "http"}
    assert body["env"] == {"A": "b"}
    assert body["ssh_key"] == key
    assert body["jupyter_token"] == "tok"
    assert "ssh_password" not in body


def test_empty_arguments_mean_the_default(sim: Simulator, client: CloreClient) -> None:
    order = client.create_order(plain_server(client), ports={}, env={}, ssh_password="", ssh_key="")
    body = sim.orders[0].body
    assert body["ports"] == {"22": "tcp"}
    assert body["env"] == {"NVIDIA_VISIBLE_DEVICES": "all"}
    assert body["ssh_password"] == order["ssh_password"]
    assert len(order["ssh_password"]) <= 32


BAD_ORDERS: list[tuple[dict[str, Any], str]] = [
    *[({"server_id": bad}, "server_id") for bad in (0, -1, True, 1.0, "x", "", None)],
    *[({"order_type": bad}, "order_type") for bad in ("ondemand", "", None, "SPOT")],
    *[({"currency": bad}, "currency") for bad in ("doge", "", None, 3)],
    *[({"image": bad}, "image") for bad in ("", " ", None, 3)],
    *[({"ports": bad}, "ports") for bad in ({0: "tcp"}, {"65536": "tcp"}, {"x": "tcp"},
                                            {"22": "udp"}, {True: "tcp"}, ["22"], {22.0: "tcp"},
                                            False, 0)],
    *[({"env": bad}, "env") for bad in ({"1A": "x"}, {"A B": "x"}, {"A": 1}, {"A": "x" * 1537},
                                        {"A" * 129: "x"}, ["A"], {3: "x"}, 0, False)],
    *[({"ssh_password": bad}, "ssh_password") for bad in ("x" * 33, 5, " ", 0, False)],
    *[({"ssh_key": bad}, "ssh_key") for bad in (
        "-----BEGIN OPENSSH PRIVATE KEY-----\nx", "~/.ssh/id_ed25519.pub", "/home/me/key",
        "id_rsa.pub", "C:\\Users\\me\\.ssh\\id_rsa", "ssh-rsa " + "A" * 3072, 5, 0, False)],
    ({"ssh_password": "a", "ssh_key": "ssh-rsa A"}, "ssh_password and ssh_key"),
    *[({"jupyter_token": bad}, "jupyter_token") for bad in ("x" * 33, "", 5)],
    *[({"order_type": "spot", "spot_price": bad}, "spot_price")
      for bad in (None, 0, -1, float("nan"), float("inf"), "1", True)],
    *[({"find_timeout": bad}, "find_timeout") for bad in (-1, float("nan"), "1")],
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "name"), BAD_ORDERS)
def test_bad_arguments_of_create_order(
    sim: Simulator, client: CloreClient, arguments: dict[str, Any], name: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=name) as caught:
        client.create_order(**{"server_id": 5, **arguments})
    assert not isinstance(caught.value, CloreError)
    assert not sim.requests
    for secret in ("x" * 33, "PRIVATE KEY-----\nx"):
        assert secret not in str(caught.value)


BAD_CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("get_balance", ("",), {}, "currency"),
    ("get_marketplace", ("yes",), {}, "include_rented"),
    ("find_servers", (4090,), {}, "gpu_type"),
    ("find_servers", (), {"max_price_usd": -1}, "max_price_usd"),
    ("find_servers", (), {"max_price_usd": float("nan")}, "max_price_usd"),
    ("find_servers", (), {"min_reliability": 101}, "min_reliability"),
    ("find_cheapest", (), {"use_spot": "no"}, "use_spot"),
    ("get_orders", ("no",), {}, "include_completed"),
    ("get_order", (1.5,), {}, "order_id"),
    ("cancel_order", (0,), {}, "order_id"),
    ("cancel_order", (5, 7), {}, "issue"),
    ("cancel_orders", (5,), {}, "order_ids"),
    ("cancel_orders", ("56",), {}, "order_ids"),
    ("cancel_orders", ([5, "x"],), {}, "order_ids"),
    ("wait_for_order", (5, -1), {}, "timeout"),
    ("wait_for_order", (5, float("nan")), {}, "timeout"),
    ("wait_for_order", (5, 1, float("inf")), {}, "poll_interval"),
    ("wait_for_order", (5, float("inf"), 1e300), {}, "poll_interval"),
    ("wait_for_order", (5, 1, 1, ""), {}, "target_status"),
    ("get_spot_market", ("x",), {}, "server_id"),
    ("set_spot_price", (5, 0), {}, "new_price"),
    ("set_spot_price", (-5, 1), {}, "order_id"),
]


@pytest.mark.parametrize(("method", "args", "kwargs", "name"), BAD_CALLS)
def test_errors_name_the_bad_argument_and_nothing_is_sent(
    sim: Simulator, client: CloreClient, method: str, args: Any, kwargs: Any, name: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        getattr(client, method)(*args, **kwargs)
    assert not sim.requests


@pytest.mark.parametrize(
    "options",
    [{"rate_limit": -1}, {"rate_limit": float("nan")}, {"max_retries": 0}, {"max_retries": 1.5},
     {"timeout": 0}, {"timeout": (1, 2, 3)}, {"timeout": (0, 1)}, {"create_order_interval": -1},
     {"timeout": 1e300}, {"rate_limit": 1e300}, {"backoff": "x"}, {"user_agent": "a\nb"},
     {"base_url": "api.clore.ai"}, {"base_url": "https://me:pw@h"}, {"base_url": "ftp://h"},
     {"base_url": 5}],
)  # fmt: skip
def test_bad_arguments_of_the_client(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        CloreClient("k", **options)


def test_ids_may_be_digits(sim: Simulator, client: CloreClient) -> None:
    order = client.create_order(str(plain_server(client)))  # type: ignore[arg-type]
    assert client.cancel_order(str(order["order_id"])) is True  # type: ignore[arg-type]
    assert not sim.orders[0].active


def test_an_env_value_that_the_api_can_refuse_gives_a_warning(
    client: CloreClient, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CloreError, match="code 1 has been seen"):
        client.create_order(plain_server(client), env={"A": "b&c"}, find_timeout=0.2)
    assert "can refuse with code 1" in caplog.text.replace("\n", " ")
    assert "b&c" not in caplog.text


def test_each_refusal_has_its_class(sim: Simulator, client: CloreClient) -> None:
    one, two = plain_server(client), plain_server(client, 1)
    third = plain_server(client, 2)
    sim.set_rented(one)
    sim.set_offline(two)
    poor = client_for(sim, api_key=sim.add_key(0))
    for user, server_id, cls in [
        (client, one, ServerAlreadyRentedError),
        (client, two, ServerOfflineError),
        (client, 7, InvalidInputError),
        (poor, third, InsufficientBalanceError),
    ]:
        with pytest.raises(cls):
            user.create_order(server_id)
    assert not sim.orders


def test_cancel_orders(any_sim: Simulator, any_client: CloreClient) -> None:
    ids = [any_client.create_order(plain_server(any_client))["order_id"] for _ in range(2)]
    answer = any_client.cancel_orders([*ids, 5])
    assert answer["code"] == 0
    assert answer["failed_to_cancel"] == ["5"]
    assert not any(order.active for order in any_sim.orders)
    assert len(sent_to(any_sim, "cancel_orders")) == 1
    assert any_client.cancel_orders([])["failed_to_cancel"] == []
    assert len(sent_to(any_sim, "cancel_orders")) == 1


def test_issue_is_cut(any_sim: Simulator, any_client: CloreClient) -> None:
    order = any_client.create_order(plain_server(any_client))
    any_client.cancel_order(order["order_id"], issue="é" * 3000)
    assert sent_to(any_sim, "cancel_order")[0].body["issue"] == "é" * 2048


@pytest.mark.parametrize("ended", ["accept", "refuse"])
@pytest.mark.parametrize(
    "fault", ["lose_response", "html_502", "http_500_after_commit", "truncated_json"]
)
def test_cancelling_is_safe_to_repeat(make_sim: MakeSim, ended: str, fault: str) -> None:
    sim = make_sim(cancel_ended=ended, cancel_lingers=0.4)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_order", fault, times=2)
    assert client.cancel_order(order["order_id"]) is True
    assert client.cancel_order(order["order_id"]) is True
    assert not sim.orders[0].active


def test_after_a_lost_response_the_lists_show_if_the_cancel_worked(sim: Simulator) -> None:
    client = client_for(sim, max_retries=2)
    order = client.create_order(plain_server(client))
    sim.faults.add("cancel_order", "lose_response", times=2)
    assert client.cancel_order(order["order_id"]) is True


def test_an_unknown_order_and_the_id_of_a_server(make_sim: MakeSim) -> None:
    sim = make_sim(cancel_ended="refuse")
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    client.wait_for_order(order["order_id"], timeout=10, poll_interval=0.02)
    with pytest.raises(OrderNotFoundError, match="no order 5 "):
        client.cancel_order(5)
    server_id = order["renting_server"]
    with pytest.raises(OrderNotFoundError, match=f"server of order {order['order_id']}"):
        client.cancel_order(server_id)
    assert sim.orders[0].active


def test_waiting_reports_an_end(any_sim: Simulator, any_client: CloreClient) -> None:
    order = any_client.create_order(plain_server(any_client))
    any_sim.end_order(order["order_id"])
    with pytest.raises(
        OrderEndedError, match=rf"^Order {order.id} ended unexpectedly with status: expired$"
    ) as caught:
        any_client.wait_for_order(order["order_id"], timeout=10, poll_interval=0.02,
                                  target_status="never")  # fmt: skip
    assert caught.value.order["order_id"] == order.id


def test_waiting_runs_out(make_sim: MakeSim) -> None:
    sim = make_sim(deploy_after=60.0)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    started = time.monotonic()
    with pytest.raises(
        TimeoutError, match=rf"^Order {order.id} did not reach status 'running' within 0.2s$"
    ) as caught:
        client.wait_for_order(order["order_id"], timeout=0.2, poll_interval=60)
    assert time.monotonic() - started < 10
    assert isinstance(caught.value, WaitTimeoutError)
    assert caught.value.order["status"] == "creating"
    assert sim.orders[0].active
    created = client.wait_for_order(order["order_id"], timeout=5, target_status="creating")
    assert created["status"] == "creating"


def test_waiting_continues_after_failed_polls_and_for_late_orders(make_sim: MakeSim) -> None:
    sim = make_sim(visible_after=0.4, create_answer="order_id")
    client = client_for(sim, max_retries=1, timeout=0.5)
    order = client.create_order(plain_server(client))
    for kind in ("lose_response", "html_502", "html_403", "hang", "truncated_json", "no_code"):
        sim.faults.add("my_orders", kind)
    assert client.wait_for_order(order["order_id"], timeout=20, poll_interval=0.02).is_running


def test_waiting_stops_at_a_wrong_key(sim: Simulator) -> None:
    with pytest.raises(AuthenticationError):
        client_for(sim, api_key="wrong").wait_for_order(5, timeout=60)
    assert len(sim.requests) == 1


def test_a_wait_timeout_has_the_failure_of_its_last_poll_as_cause(sim: Simulator) -> None:
    sim.faults.add("my_orders", "lose_request", times=999)
    with pytest.raises(WaitTimeoutError) as caught:
        client_for(sim).wait_for_order(5, timeout=0.2, poll_interval=0.01)
    assert isinstance(caught.value.__cause__, CloreConnectionError)


def test_polls_do_not_read_the_ended_orders(sim: Simulator, client: CloreClient) -> None:
    order = client.create_order(plain_server(client))
    before = len(sim.requests)
    client.wait_for_order(order["order_id"], timeout=10, poll_interval=0.02)
    assert all(not call.query for call in sim.requests[before:])


# --- how create_order finds the new order ---


def listing(server_id: int, **fields: Any) -> dict[str, Any]:
    return {"id": 1, "si": server_id, "ct": int(time.time()), "spot": False, "mon_container": 1,
            "image": "nvidia/cuda:12.1.0-base-ubuntu22.04", "currency": "CLORE-Blockchain",
            "expired": False, **fields}  # fmt: skip


@pytest.mark.parametrize(
    "decoy",
    [{"si": 5}, {"spot": True}, {"currency": "bitcoin"}, {"image": "other"},
     {"ct": int(time.time()) - 60}, {"ct": None}, {"si": None}, {"id": None}],
)  # fmt: skip
@pytest.mark.parametrize("clock", [0.0, 86400.0, -86400.0])
def test_an_order_of_another_program_is_not_claimed(
    make_sim: MakeSim, decoy: dict[str, Any], clock: float
) -> None:
    sim = make_sim(clock_offset=clock)
    client = client_for(sim)
    server_id = plain_server(client)
    record = listing(server_id)
    record["ct"] += int(clock)
    record |= decoy
    if isinstance(decoy.get("ct"), int):
        record["ct"] = decoy["ct"] + int(clock)
    sim.faults.add("my_orders", "envelope", envelope={"code": 0, "orders": [record]}, times=2)
    order = client.create_order(server_id)
    assert order.id == sim.orders[0].id != 1


def test_two_matching_orders_have_an_unknown_outcome(sim: Simulator, client: CloreClient) -> None:
    server_id = plain_server(client)
    two = [listing(server_id, id=n) for n in (900001, 900002)]
    sim.faults.add("my_orders", "envelope", envelope={"code": 0, "orders": []})  # before it is sent
    sim.faults.add("my_orders", "envelope", envelope={"code": 0, "orders": two}, times=9)
    with pytest.raises(OrderOutcomeUnknownError, match="900001, 900002") as caught:
        client.create_order(server_id)
    assert caught.value.order_ids == (900001, 900002)
    assert caught.value.server_id == server_id
    assert caught.value.credentials["ssh_password"] == sim.orders[0].body["ssh_password"]


def test_no_matching_order_in_time(make_sim: MakeSim) -> None:
    sim = make_sim(visible_after=60.0)
    client = client_for(sim)
    with pytest.raises(OrderOutcomeUnknownError, match="did not show up") as caught:
        client.create_order(plain_server(client), find_timeout=0.2)
    assert caught.value.order_ids == ()
    assert not caught.value.retryable
    assert len(sent_to(sim, "create_order")) == 1


def test_the_search_continues_after_failed_reads(sim: Simulator, client: CloreClient) -> None:
    server_id = plain_server(client)
    sim.faults.add("my_orders", "html_502", times=4)
    sim.faults.add("my_orders", "html_403")
    assert client.create_order(server_id).id == sim.orders[0].id


def test_the_same_server_rented_twice_gives_two_orders(sim: Simulator, client: CloreClient) -> None:
    server_id = plain_server(client)
    first = client.create_order(server_id)
    client.cancel_order(first["order_id"])
    second = client.create_order(server_id)
    assert [first.id, second.id] == [order.id for order in sim.orders]


def test_threads_do_not_claim_orders_of_other_threads(make_sim: MakeSim) -> None:
    sim = make_sim(visible_after=(0.0, 0.3))
    clients = [client_for(sim), client_for(sim)]
    ids = [s["id"] for s in clients[0].find_servers("RTX 4090", min_reliability=96)[:4]]
    made: dict[int, Order] = {}

    def rent(n: int, server_id: int) -> None:
        made[server_id] = clients[n % 2].create_order(server_id)

    threads = [threading.Thread(target=rent, args=(n, i)) for n, i in enumerate(ids)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    truth = {o.server_id: o for o in sim.orders}
    assert {i: o.id for i, o in made.items()} == {i: truth[i].id for i in ids}
    for server_id, order in made.items():
        assert order["ssh_password"] == truth[server_id].body["ssh_password"]


# --- subclasses and fakes ---


class Fake(CloreClient):
    """A client with fixed responses."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__()
        self.answers = answers
        self.calls: list[tuple[Any, ...]] = []

    def _request(
        self, method: str, endpoint: str, params: Any = None, json: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        self.calls.append((method, endpoint, params, json))
        return dict(self.answers[endpoint])


def test_a_fake_overrides_request_and_every_method_goes_through_it() -> None:
    order = {"order_id": 8, "renting_server": 5, "status": "running", "price": 0.1,
             "connection": {"ssh": "ssh root@h -p 9", "http_ports": {}}}  # fmt: skip
    server = {"id": 5, "gpu_array": ["RTX 4090"], "price": {"usd": {"on_demand_clore": 0.2}},
              "reliability": 99.0, "rented": False}  # fmt: skip
    fake = Fake(
        {
            "/v1/wallets": {"code": 0, "wallets": [{"name": "CLORE-Blockchain", "balance": 3.0}]},
            "/v1/marketplace": {"code": 0, "servers": [server]},
            "/v1/my_orders": {"code": 0, "orders": [order]},
            "/v1/create_order": {"code": 0, "order_id": 8, "status": "creating"},
            "/v1/cancel_order": {"code": 0},
            "/v1/cancel_orders": {"code": 0},
            "/v1/set_spot_price": {"code": 0, "error": "no"},
            "/v1/spot_marketplace": {"code": 0, "market": {"offers": [{"price": 0.1}]}},
        }
    )
    assert fake.get_balance() == 3.0
    assert fake.find_cheapest("4090", max_price_usd=0.2, min_reliability=99) == server
    made = fake.create_order(5)
    assert made["order_id"] == 8
    known = {"ssh_password": made["ssh_password"]}
    assert fake.wait_for_order(8, timeout=1) == order | known
    assert fake.cancel_order(8) is True
    assert fake.cancel_orders([8])["code"] == 0
    assert fake.set_spot_price(8, 0.15) is False
    assert fake.get_spot_market(5)["market"]["offers"][0]["usd_per_hour"] == 0.1
    assert fake.create_order(5, order_type="spot", spot_price=0.15)["order_id"] == 8
    methods = {call[1].rsplit("/", 1)[1]: call for call in fake.calls}
    assert methods["set_spot_price"][3] == {"order_id": 8, "desired_price": 0.15}
    assert methods["create_order"][3]["spotprice"] == 0.15
    assert methods["spot_marketplace"][2] == {"market": 5}
    assert "no key" in repr(fake)


def test_a_fake_in_the_live_form_finds_its_order() -> None:
    order = {"id": 8, "si": 5, "ct": 5, "mon_container": 1}
    fake = Fake({"/v1/create_order": {"code": 0}, "/v1/my_orders": {"code": 0, "orders": [order]}})
    assert fake.create_order(5)["order_id"] == 8


def test_every_exported_name_exists() -> None:
    assert all(hasattr(clore_client, name) for name in clore_client.__all__)
    assert sorted(clore_client.__all__) == sorted(set(clore_client.__all__))
