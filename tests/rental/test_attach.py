"""attach(), start() and keep() with a deadline, also from other processes."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import logging
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
    CloreClient,
    CloreConnectionError,
    Order,
    OrderEndedError,
    OrderNotFoundError,
    Rental,
    RentalError,
)
from tests.conftest import FORMS, MakeSim, client_for, until
from tests.orders.test_credentials import in_a_second_process, started
from tests.rental.test_rental import QUICK, active
from tests.variant import Simulator


@pytest.fixture(params=FORMS)
def hosts(request: pytest.FixtureRequest, make_sim: MakeSim) -> Simulator:
    return make_sim(form=request.param, ssh=True)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


# --- attach ---


def test_attach_has_all_that_a_rental_has(hosts: Simulator, state: Path, tmp_path: Path) -> None:
    order = started(client_for(hosts, state_dir=state))
    client = client_for(hosts, state_dir=state)
    with client.attach(order["order_id"]) as rental:
        assert isinstance(rental, Rental)
        assert rental.run("echo hi").stdout == "hi\n"
        assert rental.order.id == order.id
        assert rental.order["ssh_password"]
        assert rental.server.id == order.server_id
        assert rental.status == "running"
        assert rental.ssh_command().startswith("ssh -p ")
        assert 0 < rental.hours < 1
        assert rental.cost_usd > 0
        (tmp_path / "x").write_text("text")
        rental.upload(tmp_path / "x", "x")
        rental.download("x", tmp_path / "y")
        with rental.forward(22) as port:
            assert port
    assert active(hosts) == [order.id]
    assert rental.run("echo again").stdout == "again\n"
    rental.close()
    rental.close()
    assert client.attach(order).run("echo hi").stdout == "hi\n"
    assert client.leftovers(wait=0).abandoned == []
    assert active(hosts) == [order.id]
    rental.cancel()
    assert active(hosts) == []
    with pytest.raises(OrderEndedError):
        rental.run("true")
    for argument in (order, order["order_id"]):
        with pytest.raises(OrderEndedError):
            client_for(hosts).attach(argument)
    with pytest.raises(OrderNotFoundError):
        client.attach(5)


def test_attach_from_a_second_process(hosts: Simulator, state: Path) -> None:
    with client_for(hosts, state_dir=state).rent(**QUICK) as rental:
        code = (
            "rental = client.attach(argument[0])\nprint(rental.run('echo hi').stdout, end='')\n"
            "with client.attach(rental.order): pass\n"
        )
        assert in_a_second_process(hosts, state, code, rental.order.id) == "hi\n"
        assert rental.run("echo still").stdout == "still\n"
    assert active(hosts) == []


def test_attach_that_ends_the_order(any_sim: Simulator, state: Path) -> None:
    order = started(client_for(any_sim, state_dir=state))
    client = client_for(any_sim, state_dir=state)
    rental = client.attach(order, end=True)
    with pytest.raises(RentalError, match="nothing is rented"):
        rental.run("true")
    with rental:
        assert len(list(state.glob("*.json"))) == 1
        assert active(any_sim) == [order.id]
    assert active(any_sim) == []
    assert list(state.glob("*.json")) == []
    with pytest.raises(ValueError, match="max_hours and max_cost_usd need end=True"):
        client.attach(order, max_hours=1)


def test_the_budget_of_an_attached_order_counts_from_its_start(any_sim: Simulator) -> None:
    client = client_for(any_sim)
    order = started(client)
    time.sleep(1.2)
    with pytest.raises(BudgetExceededError):
        with client.attach(order, end=True, max_hours=1 / 3600):
            until(lambda: not active(any_sim))


# --- what a rental shows ---


def test_a_rental_shows_its_state(any_sim: Simulator) -> None:
    client = client_for(any_sim)
    rental = client.rent(**QUICK)
    assert repr(rental) == "<Rental of order None, not open>"
    with rental:
        shown = f"<Rental of order {rental.order.id}, "
        assert repr(rental) == f"{shown}open>"
    assert repr(rental) == f"{shown}ended>"
    with client.rent(**QUICK) as kept:
        kept.keep()
    assert repr(kept).endswith(", kept>")
    attached = client.attach(kept.order)
    assert repr(attached).endswith(", attached>")
    attached.keep()
    assert repr(attached).endswith(", kept>")
    client.cancel_order(kept.order)
    assert repr(kept).endswith(", ended>")
    assert repr(attached).endswith(", ended>")


def test_a_rental_shows_that_its_client_or_a_budget_ended_it(any_sim: Simulator) -> None:
    client = client_for(any_sim)
    with client.rent(**QUICK) as rental:
        client.cancel_order(rental.order)
        assert repr(rental).endswith(", ended>")
    with pytest.raises(BudgetExceededError):  # noqa: PT012
        with client.rent(max_hours=0.8 / 3600, **QUICK) as limited:
            until(lambda: not active(any_sim))
            until(lambda: repr(limited).endswith(", ended>"))


# --- start() and close() ---


def test_a_rental_without_a_block(any_sim: Simulator, any_client: CloreClient) -> None:
    rental = any_client.rent(**QUICK).start()
    assert active(any_sim) == [rental.order.id]
    rental.close()
    rental.close()
    assert active(any_sim) == []
    with pytest.raises(RentalError, match="only once"):
        rental.start()
    again = any_client.rent(**QUICK).start()
    again.cancel()
    again.cancel()
    assert active(any_sim) == []
    with pytest.raises(OrderEndedError):
        again.run("true")


def test_a_rental_that_nobody_holds_ends(sim: Simulator, client: CloreClient) -> None:
    rental: Any = client.rent(**QUICK).start()
    assert active(sim)
    del rental
    gc.collect()
    until(lambda: not active(sim))


@pytest.mark.internal
@pytest.mark.parametrize("end", ["exit", "SIGTERM", "SIGTERM caught", "exception"])
def test_the_exit_ends_a_rental_without_a_block(
    any_sim: Simulator, state: Path, end: str, tmp_path: Path
) -> None:
    code = """
import os, signal, sys, time
from clore_client import CloreClient
client = CloreClient(rate_limit=0.02, backoff=0.01, timeout=5, order_lag=0.3,
                     create_order_interval=0.05, state_dir=sys.argv[1])
rental = client.rent(poll_interval=0.02, find_timeout=5, cancel_timeout=20).start()
print(rental.order.id, flush=True)
if sys.argv[2] == "SIGTERM":
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
if sys.argv[2] == "SIGTERM caught":
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except SystemExit:
        time.sleep(3)  # as a notebook does
        print(client.get_orders(), flush=True)
if sys.argv[2] == "exception":
    raise ValueError("of the program")
"""
    environment = {**os.environ, "CLORE_API_KEY": any_sim.api_key, "CLORE_BASE_URL": any_sim.url,
                   "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(state), end],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert int(lines[0]) == any_sim.orders[0].id, done.stderr
    assert active(any_sim) == []
    if end == "SIGTERM caught":
        assert lines[1] == "<OrderList: no orders>"
    assert done.returncode == {"exit": 0, "SIGTERM": 143, "exception": 1}.get(end, 0)


# --- keep() and cancel_overdue() ---


def kept_order(client: CloreClient, **options: Any) -> Order:
    with client.rent(**QUICK) as rental:
        return rental.keep(**options)


def test_a_kept_order_has_a_name_of_its_own(
    any_sim: Simulator, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "clore_client")
    client = client_for(any_sim, state_dir=state)
    order = kept_order(client)
    assert "max_hours and max_cost_usd of the rental don't end it any more" in caplog.text
    other = client_for(any_sim, state_dir=state)
    found = other.leftovers(wait=0)
    assert found
    assert [kept.order_id for kept in found.kept] == [order.id]
    assert found.kept[0].kept_until is None
    assert (found.abandoned, found.elsewhere, found.unrecorded) == ([], [], [])
    assert str(order.id) in repr(found)
    assert other.cancel_leftovers(wait=0) == []
    assert other.cancel_overdue() == []
    assert active(any_sim) == [order.id]
    other.cancel_order(order, confirm=True)
    assert not other.leftovers(wait=0)
    assert list((state / "kept").iterdir()) == []


def test_cancel_overdue_ends_what_is_past_its_deadline(any_sim: Simulator, state: Path) -> None:
    client = client_for(any_sim, state_dir=state)
    first, second = kept_order(client, max_hours=0.5 / 3600), kept_order(client, max_hours=1)
    kept = {k.order_id: k.kept_until for k in client.leftovers(wait=0).kept}
    assert kept[second.id] == pytest.approx(time.time() + 3600, abs=60)
    assert sorted(active(any_sim)) == [first.id, second.id]
    time.sleep(0.6)
    told = in_a_second_process(any_sim, state, "print(client.cancel_overdue())")
    assert told == f"[{first.id}]\n"
    assert active(any_sim) == [second.id]
    assert client_for(any_sim, state_dir=state).cancel_overdue() == []
    # The deadline can be moved from a later process.
    client_for(any_sim, state_dir=state).attach(second).keep(max_hours=0.1 / 3600)
    time.sleep(0.2)
    assert client.cancel_overdue() == [second.id]
    assert active(any_sim) == []


def test_an_overdue_order_that_has_ended(sim: Simulator, state: Path) -> None:
    client = client_for(sim, state_dir=state)
    order = kept_order(client, max_hours=0.01 / 3600)
    sim.end_order(order.id or 0)
    time.sleep(0.2)
    assert client_for(sim, state_dir=state).cancel_overdue() == []
    assert list((state / "kept").iterdir()) == []


@pytest.mark.parametrize("failing", range(3))
def test_cancel_overdue_again_after_it_failed(
    sim: Simulator, state: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """An error leaves no record locked, and does not stop the cancels of other orders."""
    orders = [kept_order(client_for(sim, state_dir=state), max_hours=0.01 / 3600) for _ in "12"]
    sim.end_order(orders[0].id or 0)
    time.sleep(0.2)
    client = client_for(sim, state_dir=state)
    real, reads = client._request, itertools.count()

    def request(method: str, endpoint: str, *args: Any, **kwargs: Any) -> Any:
        if endpoint == "/v1/my_orders" and next(reads) == failing:
            raise CloreConnectionError("broken")
        return real(method, endpoint, *args, **kwargs)

    monkeypatch.setattr(client, "_request", request)
    if failing == 0:  # the list of active orders
        with pytest.raises(CloreConnectionError, match="broken"):
            client.cancel_overdue()
        assert client.cancel_overdue() == [orders[1].id]
    else:  # the state of one order; the other is cancelled all the same
        assert orders[1].id in client.cancel_overdue()
        assert client.cancel_overdue() == []
    assert active(sim) == []


def test_a_deadline_that_cannot_be_recorded(
    sim: Simulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file"):
        client = client_for(sim, state_dir=folder)
        with client.rent(**QUICK) as rental:
            with pytest.raises(RentalError, match="its deadline can't be recorded"):
                rental.keep(max_hours=1)
        assert active(sim) == []
        order = kept_order(client)
        assert active(sim) == [order.id]
        client.cancel_order(order, confirm=True)
    wrong: Any
    for wrong in (0, -1, float("nan"), float("inf"), "1", True):
        with client.rent(**QUICK) as rental:
            with pytest.raises((ValueError, TypeError), match="max_hours"):
                rental.keep(max_hours=wrong)
    assert active(sim) == []


def test_a_kept_order_that_a_rental_ends_again(sim: Simulator, state: Path) -> None:
    client = client_for(sim, state_dir=state)
    order = kept_order(client, max_hours=1)
    with client.attach(order, end=True):
        assert not client.leftovers(wait=0)
    assert active(sim) == []
    assert list((state / "kept").iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", "", '{"order_id": "x"}', "[" * 60_000])
def test_broken_records_of_kept_orders(sim: Simulator, state: Path, content: str) -> None:
    client = client_for(sim, state_dir=state)
    order = kept_order(client, max_hours=0.01 / 3600)
    (path,) = (state / "kept").iterdir()
    path.write_text(content)
    other = client_for(sim, state_dir=state)
    assert other.cancel_overdue() == []
    assert [o.id for o in other.leftovers(wait=0).unrecorded] == [order.id]
    assert other.cancel_leftovers(wait=0) == []


@pytest.mark.internal
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("step", ["before", "between", "after"])
def test_a_process_that_is_killed_while_it_keeps(sim: Simulator, state: Path, step: str) -> None:
    """Record an order in the journal or as kept: never both, and never neither."""
    orders_module: Any = importlib.import_module("clore_client.rental.orders")

    pid = os.fork()
    if not pid:
        real = orders_module.record_kept

        def record(*arguments: Any) -> bool:
            if step != "before":
                real(*arguments)
            if step != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return True

        orders_module.record_kept = record
        with client_for(sim, state_dir=state).rent(**QUICK) as rental:
            rental.keep(max_hours=1)
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (order_id,) = active(sim)
    client = client_for(sim, state_dir=state)
    found = client.leftovers(wait=0)
    where = found.abandoned if step == "before" else found.kept
    assert [left.order_id for left in where] == [order_id]
    assert len(found.abandoned) + len(found.kept) + len(found.unrecorded) == 1
    assert client.cancel_leftovers(wait=0) == ([order_id] if step == "before" else [])


def test_an_older_version_does_not_cancel_a_kept_order(sim: Simulator, state: Path) -> None:
    """Keep kept orders out of the journal, whose unlocked entries older versions cancel."""
    kept_order(client_for(sim, state_dir=state), max_hours=1)
    assert list(state.glob("*.json")) == []
    (path,) = (state / "kept").glob("*.json")
    assert path.stat().st_mode & 0o77 == 0
    assert json.loads(path.read_text())["schema"] == 1


# --- several at once ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", [False, True])
def test_two_processes_that_attach_stop_and_cancel_at_once(
    make_sim: MakeSim, state: Path, form: str, end: bool
) -> None:
    # Two processes with one key have no rate limit in common.
    sim = make_sim(form=form, ssh=True, rate_limit=0, cancel_ended="refuse")
    order = started(client_for(sim, state_dir=state))
    job = client_for(sim, state_dir=state).start(order, "sleep 60", name="x")
    assert job.status == "running"
    code = """
import os, threading, clore_client
end = argument[1] == "True"
def work():
    try:
        rental = client.attach(argument[0], end=end)
        if end:
            rental.start()
        rental.run("true")
        job = client.job(rental.order, "x")
        job.stop()
        os.write(1, f"{job.status}-{job.exit_code}\\n".encode())
        rental.cancel()
        os.write(1, b"cancelled\\n")
    except clore_client.OrderEndedError:
        os.write(1, b"ended\\n")
    except clore_client.SSHError:  # the machine was gone before the lists showed it
        os.write(1, b"broken\\n")
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    told: list[list[str]] = []

    def process() -> None:
        told.append(in_a_second_process(sim, state, code, order.id, end).split())

    threads = [threading.Thread(target=process) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    words = [word for lines in told for word in lines]
    results = [word for word in words if "-" not in word]
    assert len(results) == 4, words
    assert set(words) <= {"killed-143", "lost-None", "cancelled", "ended", "broken"}
    assert "killed-143" in words
    assert "cancelled" in words
    assert active(sim) == []
    assert list(state.glob("*.json")) == []


def test_two_processes_that_end_overdue_orders_at_once(make_sim: MakeSim, state: Path) -> None:
    sim = make_sim(rate_limit=0)
    client = client_for(sim, state_dir=state)
    orders = [kept_order(client, max_hours=0.01 / 3600) for _ in range(2)]
    told: list[list[int]] = []

    def process() -> None:
        text = in_a_second_process(sim, state, "print(client.cancel_overdue())")
        told.append(json.loads(text))

    threads = [threading.Thread(target=process) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for ids in told for number in ids) == sorted(o.id or 0 for o in orders)
    assert active(sim) == []
