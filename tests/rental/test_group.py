"""rent_many(): several servers at once, a minimum count, and one end for all."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clore_client import (
    BudgetExceededError,
    CancelUnconfirmedError,
    CloreClient,
    CommandError,
    InsufficientBalanceError,
    ProgressEvent,
    RentalError,
)
from tests.conftest import FORMS, MakeSim, client_for, until
from tests.rental.test_rental import QUICK, active, cheapest
from tests.variant import Simulator


def test_three_machines_side_by_side(any_sim: Simulator, any_client: CloreClient) -> None:
    wanted = cheapest(any_client, 3)
    with any_client.rent_many(3, **QUICK) as rentals:
        assert len(rentals) == 3
        assert sorted(r.server.id or 0 for r in rentals) == sorted(wanted)
        assert sorted(active(any_sim)) == sorted(r.order.id or 0 for r in rentals)
        assert rentals[0].order.status == "running"
        assert rentals.cost_usd > 0
        assert rentals.map(lambda rental: rental.order.id) == [r.order.id for r in rentals]
        assert "RentalGroup of 3" in repr(rentals)
    assert active(any_sim) == []
    assert len(any_sim.orders) == 3  # no server was tried twice
    with pytest.raises(RentalError, match="only once"):
        rentals.__enter__()


@pytest.mark.parametrize("form", FORMS)
def test_commands_in_parallel(make_sim: MakeSim, form: str) -> None:
    sim = make_sim(ssh=True, form=form)
    with client_for(sim).rent_many(3, **QUICK) as rentals:
        everybody = threading.Barrier(3, timeout=60)
        rentals.map(lambda rental: everybody.wait())
        results = rentals.run("pwd")
        assert len({result.stdout for result in results}) == 3
        with pytest.raises(CommandError):
            rentals.run("exit 3")
        assert [r.exit_code for r in rentals.run("exit 3", check=False)] == [3, 3, 3]
    assert active(sim) == []


def test_the_deployments_overlap(make_sim: MakeSim) -> None:
    sim = make_sim(deploy_after=2.0)
    with client_for(sim).rent_many(4, **QUICK) as rentals:
        assert len(rentals) == 4
    first_deployed = min(order.deployed or math.inf for order in sim.orders)
    assert sum(order.created < first_deployed for order in sim.orders) >= 2


def test_all_or_none(any_sim: Simulator, any_client: CloreClient) -> None:
    broken = cheapest(any_client, 4)
    for server_id in broken[1:]:
        any_sim.set_deploy_after(server_id, float("inf"))
    with pytest.raises(RentalError, match="at least 3 must run") as caught:
        with any_client.rent_many(3, attempts=1, deploy_timeout=0.6, **QUICK):
            pytest.fail("entered")
    assert {server_id for server_id, _ in caught.value.tried} <= set(broken[1:])
    assert active(any_sim) == []


def test_at_least_some(any_sim: Simulator, any_client: CloreClient, caplog: Any) -> None:
    first, second, third = cheapest(any_client, 3)
    any_sim.set_deploy_after(second, float("inf"))
    with any_client.rent_many(3, attempts=1, deploy_timeout=1.5, min_count=2, **QUICK) as rentals:
        assert {r.server.id for r in rentals} == {first, third}
        assert len(active(any_sim)) == 2
    assert "2 of 3 rentals run" in caplog.text
    assert active(any_sim) == []


def test_too_few_servers_are_told_before_anything_is_ordered(
    any_sim: Simulator, any_client: CloreClient
) -> None:
    found = len(any_client.find_servers("RTX 4090"))
    with pytest.raises(RentalError, match=r"at least \d+ servers must run, and \d+ fit"):
        with any_client.rent_many(found + 1, "RTX 4090", **QUICK):
            pytest.fail("entered")
    with pytest.raises(RentalError, match=r"none of \d+ servers fits"):
        with any_client.rent_many(2, "no such card", **QUICK):
            pytest.fail("entered")
    assert any_sim.orders == []


@pytest.mark.parametrize(
    ("count", "options"),
    [(0, {}), (65, {}), ("2", {}), (2, {"min_count": 3}), (2, {"min_count": 0}),
     (2, {"server_id": 5}), (2, {"nonsense": 1})],
)  # fmt: skip
def test_wrong_arguments(client: CloreClient, count: Any, options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        client.rent_many(count, **options)


def test_an_empty_wallet(make_sim: MakeSim) -> None:
    sim = make_sim(balance=0.0)
    with pytest.raises(InsufficientBalanceError):
        with client_for(sim).rent_many(3, **QUICK):
            pytest.fail("entered")
    assert active(sim) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block(sim: Simulator, client: CloreClient, error: Any) -> None:
    with pytest.raises(error, match="of the block"):
        with client.rent_many(3, **QUICK):
            raise error("of the block")
    assert active(sim) == []


def test_the_budget_of_each(sim: Simulator, client: CloreClient) -> None:
    with pytest.raises(BudgetExceededError):
        with client.rent_many(2, max_hours=1.0 / 3600, **QUICK):
            until(lambda: not active(sim))
    assert active(sim) == []


def test_orders_that_cannot_be_cancelled_are_all_named(sim: Simulator) -> None:
    client = client_for(sim, max_retries=1)
    with pytest.raises(CancelUnconfirmedError) as caught:  # noqa: PT012
        with client.rent_many(2, **{**QUICK, "cancel_timeout": 0.3}) as rentals:
            ids = {rental.order.id for rental in rentals}
            sim.faults.add("cancel_order", "html_502", times=99)
    assert set(caught.value.order_ids) == ids
    assert all(str(order_id) in str(caught.value) for order_id in ids)
    sim.faults.clear()


def test_progress_is_reported_one_event_at_a_time(
    any_sim: Simulator, any_client: CloreClient
) -> None:
    events: list[ProgressEvent] = []
    threads: set[int] = set()
    inside = threading.Lock()

    def report(event: ProgressEvent) -> None:
        assert inside.acquire(blocking=False), "two calls at a time"
        threads.add(threading.get_ident())
        time.sleep(0.03)  # long enough for another thread to come
        events.append(event)
        inside.release()

    with any_client.rent_many(3, on_progress=report, **QUICK) as rentals:
        servers = {rental.order.id: rental.server.id for rental in rentals}
    assert len(threads) == 3
    for order_id, server_id in servers.items():
        texts = [event.text for event in events]
        assert any(text.startswith(f"renting server {server_id} (") for text in texts)
        assert f"order {order_id} of server {server_id}" in texts
        assert f"order {order_id}: running" in texts
    assert all("order" in event.text or "server" in event.text for event in events)


@pytest.mark.parametrize("name", ["rent", "order", "deploy", "running"])
@pytest.mark.parametrize("min_count", [1, 3])
def test_an_error_of_on_progress_gives_everything_back(
    make_sim: MakeSim, name: str, min_count: int
) -> None:
    sim = make_sim(deploy_after=1.0)
    seen: list[str] = []

    def report(event: ProgressEvent) -> None:
        seen.append(event.name)
        if event.name == name and seen.count(name) == 2:
            raise ZeroDivisionError("of the callback")

    with pytest.raises(ZeroDivisionError, match="of the callback"):
        with client_for(sim).rent_many(3, min_count=min_count, on_progress=report, **QUICK):
            pytest.fail("entered")
    assert active(sim) == []
    time.sleep(0.5)
    assert active(sim) == []


@pytest.mark.parametrize("pause", [0.05, 0.3, 0.6, 1.0])
def test_ctrl_c_while_they_begin(make_sim: MakeSim, pause: float) -> None:
    sim = make_sim(deploy_after=3.0)
    client = client_for(sim)
    main = threading.main_thread().ident or 0
    timer = threading.Timer(pause, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        with client.rent_many(3, **QUICK):
            pytest.fail("entered")
    timer.join()
    assert active(sim) == []
    time.sleep(0.5)
    assert active(sim) == []
    assert len(sim.orders) <= 3  # a request that hit the rate limit is sent again


def test_ctrl_c_during_a_command(make_sim: MakeSim) -> None:
    sim = make_sim(ssh=True)
    main = threading.main_thread().ident or 0
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with client_for(sim).rent_many(2, **QUICK) as rentals:
            rentals.run("true")
            threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
            started = time.monotonic()
            try:
                rentals.run("sleep 60")
            finally:
                assert time.monotonic() - started < 20
    assert active(sim) == []


@pytest.mark.internal
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_ends(sim: Simulator, tmp_path: Path, signum: signal.Signals) -> None:
    code = """
import sys, time
from clore_client import CloreClient
client = CloreClient(rate_limit=0.02, backoff=0.01, timeout=5, order_lag=0.3,
                     create_order_interval=0.05, state_dir=sys.argv[1])
with client.rent_many(3, poll_interval=0.02, find_timeout=5, cancel_timeout=20) as rentals:
    print("rented", flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "CLORE_API_KEY": sim.api_key, "CLORE_BASE_URL": sim.url,
                   "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "state"],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "rented\n"
    ids = active(sim)
    assert len(ids) == 3
    child.send_signal(signum)
    child.communicate(timeout=60)
    if signum == signal.SIGTERM:
        assert child.returncode == 143
    else:
        client = client_for(sim, state_dir=tmp_path / "state")
        assert sorted(client.cancel_leftovers(wait=0)) == sorted(ids)
    assert active(sim) == []
