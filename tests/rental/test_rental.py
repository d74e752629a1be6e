"""rent(): the servers that it tries, its cost, and that no order is left running."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clore_client import (
    BudgetExceededError,
    CancelUnconfirmedError,
    CloreClient,
    CloreError,
    CommandError,
    InsufficientBalanceError,
    Order,
    OrderOutcomeUnknownError,
    Rental,
    RentalError,
    SSHError,
)
from tests.conftest import FORMS, MakeSim, client_for, sent_to, until
from tests.orders.test_credentials import in_a_second_process
from tests.variant import Simulator

QUICK: dict[str, Any] = {"poll_interval": 0.02, "find_timeout": 0.6, "cancel_timeout": 5.0}


@pytest.fixture(autouse=True)
def _state(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def entries(tmp_path: Any) -> list[str]:
    folder = tmp_path / "state" / "clore-client"
    return sorted(path.name for path in folder.glob("*.json"))


def rent(client: CloreClient, **options: Any) -> Rental:
    return client.rent(**{**QUICK, **options})


def active(sim: Simulator) -> list[int]:
    return [order.id for order in sim.orders if order.active]


def cheapest(client: CloreClient, count: int, currency: str = "CLORE") -> list[int]:
    """Return the servers that rent() tries first."""
    servers = client.find_servers()
    coin = {"CLORE": "CLORE-Blockchain", "USD": "USD-Blockchain", "BTC": "bitcoin"}[currency]
    fitting = [s for s in servers if coin in (s.get("allowed_coins") or [coin])]
    field = {"CLORE": "on_demand_clore", "USD": "on_demand_usd", "BTC": "on_demand_btc"}[currency]
    fitting = [s for s in fitting if s["price"]["usd"].get(field)]
    fitting.sort(key=lambda s: s["price"]["usd"][field])
    return [s["id"] for s in fitting[:count]]


class Hooked(CloreClient):
    """A client that calls ``before_create`` and ``after_create`` around each order."""

    before_create: Callable[[int], None] = staticmethod(lambda server_id: None)
    after_create: Callable[[Any], None] = staticmethod(lambda order: None)

    def create_order(self, server_id: Any, *args: Any, **kwargs: Any) -> Any:
        self.before_create(server_id)
        order = super().create_order(server_id, *args, **kwargs)
        self.after_create(order)
        return order


def hooked(sim: Simulator, **options: Any) -> Hooked:
    made = client_for(sim, **options)
    made.__class__ = Hooked
    assert isinstance(made, Hooked)
    return made


# --- the block ---


def test_a_server_for_the_length_of_a_block(
    any_sim: Simulator, any_client: CloreClient, tmp_path: Any
) -> None:
    with rent(any_client, gpu_type="RTX 4090") as rental:
        assert rental.order.status == "running"
        assert rental.order["ssh_password"]
        assert rental.server.id == rental.order.server_id
        assert rental.server.gpu_name == "RTX 4090"
        assert active(any_sim) == [rental.order.id]
        assert len(entries(tmp_path)) == 1
        assert "Rental of order" in repr(rental)
    assert active(any_sim) == []
    assert entries(tmp_path) == []
    assert [o.status for o in any_client.get_orders()] == []


def test_nothing_is_sent_before_the_block(sim: Simulator, client: CloreClient) -> None:
    rental = rent(client)
    assert sim.requests == []
    with pytest.raises(RentalError, match="nothing is rented"):
        _ = rental.order
    with pytest.raises(RentalError, match="nothing is rented"):
        _ = rental.server
    with rental:
        pass
    with pytest.raises(RentalError, match="only once"):
        rental.__enter__()
    assert len(sim.orders) == 1


def test_the_cancel_is_sent_before_any_read(sim: Simulator, client: CloreClient) -> None:
    with rent(client):
        sim.clear_requests()
    first = sim.requests[0]
    assert first.endpoint == "cancel_order"
    assert len(sent_to(sim, "cancel_order")) == 1
    assert {c.endpoint for c in sim.requests[1:]} == {"my_orders"}


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_of_the_block_is_raised(
    sim: Simulator, client: CloreClient, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        with rent(client):
            raise error
    assert caught.value is error
    assert caught.value.__context__ is None
    assert getattr(caught.value, "__notes__", []) == []
    assert active(sim) == []


def test_a_generator_that_is_closed(sim: Simulator, client: CloreClient) -> None:
    def work() -> Iterator[int]:
        with rent(client) as rental:
            yield rental.order.id or 0

    generator = work()
    order_id = next(generator)
    assert active(sim) == [order_id]
    generator.close()  # type: ignore[attr-defined]
    assert active(sim) == []


def test_keep(sim: Simulator, client: CloreClient, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="mine"):  # noqa: PT012
        with rent(client, max_hours=1.0) as rental:
            kept = rental.keep()
            raise ValueError("mine")
    assert active(sim) == [kept.id]
    assert entries(tmp_path) == []
    assert sent_to(sim, "cancel_order") == []


# --- failures at the end of the block ---


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        ("rate_limit", 6),
        ("lose_response", 2),
        ("http_500_after_commit", 2),
        ("html_502", 1),
        ("truncated_json", 2),
    ],
)
def test_the_cancel_is_repeated(make_sim: MakeSim, kind: str, times: int) -> None:
    sim = make_sim()
    client = client_for(sim, max_retries=1 if kind == "rate_limit" else 3)
    with rent(client):
        sim.faults.add("cancel_order", kind, times=times)
    assert active(sim) == []


def test_an_order_that_could_not_be_cancelled_is_reported(
    sim: Simulator, client: CloreClient, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CancelUnconfirmedError, match="could not be cancelled") as caught:
        with rent(client, cancel_timeout=0.2) as rental:
            sim.faults.add("cancel_order", "rate_limit", times=10_000)
    order_id = rental.order.id
    assert caught.value.order_id == order_id
    assert f"cancel_order({order_id})" in str(caught.value)
    assert str(order_id) in caplog.text
    assert len(entries(tmp_path)) == 1  # for leftovers()
    sim.faults.clear()
    assert client.cancel_leftovers(wait=0) == [order_id]
    assert active(sim) == []
    assert entries(tmp_path) == []


def test_a_failed_cancel_is_a_note(sim: Simulator, client: CloreClient) -> None:
    with pytest.raises(ValueError, match="mine") as caught:  # noqa: PT012
        with rent(client, cancel_timeout=0.1) as rental:
            sim.faults.add("cancel_order", "rate_limit", times=10_000)
            raise ValueError("mine")
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == 1
    assert f"order {rental.order.id} could not be cancelled" in notes[0]


def test_an_order_that_stays_listed_too_long(make_sim: MakeSim) -> None:
    sim = make_sim(cancel_lingers=30)
    with pytest.raises(CancelUnconfirmedError, match="not confirmed"):
        with rent(client_for(sim), cancel_timeout=0.2):
            pass
    assert active(sim) == []


def interrupt_when(reached: Callable[[], bool]) -> threading.Thread:
    def press() -> None:
        deadline = time.monotonic() + 20
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_a_second_interrupt_skips_only_the_confirmation(
    make_sim: MakeSim, caplog: pytest.LogCaptureFixture
) -> None:
    sim = make_sim(cancel_lingers=60)
    first = KeyboardInterrupt("first")
    with pytest.raises(KeyboardInterrupt) as caught:  # noqa: PT012
        with rent(client_for(sim), cancel_timeout=300) as rental:
            sim.clear_requests()
            thread = interrupt_when(lambda: len(sent_to(sim, "my_orders")) > 2)
            raise first
    thread.join()
    assert caught.value is first
    assert active(sim) == []
    assert any(str(rental.order.id) in note for note in getattr(first, "__notes__", []))
    assert f"{rental.order.id} was cancelled, but an interrupt skipped the" in caplog.text


def test_an_interrupt_does_not_stop_the_cancel(make_sim: MakeSim) -> None:
    sim = make_sim(cancel_lingers=60)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with rent(client_for(sim), cancel_timeout=300):
            sim.clear_requests()
            sim.faults.add("cancel_order", "rate_limit", times=8)
            thread = interrupt_when(lambda: len(sent_to(sim, "cancel_order")) >= 3)
    thread.join()
    assert active(sim) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- the search for a server ---


def test_a_rented_or_offline_server_is_skipped(sim: Simulator) -> None:
    client = hooked(sim)
    first, second, third = cheapest(client, 3)

    def spoil(server_id: int) -> None:
        if server_id == first:
            sim.set_rented(first)
        if server_id == second:
            sim.set_offline(second)

    client.before_create = spoil
    with rent(client) as rental:
        assert rental.server.id == third
        assert [t[0] for t in rental.tried] == [first, second]
        assert "rented" in rental.tried[0][1]
        assert "offline" in rental.tried[1][1]
    assert len(sim.orders) == 1


def test_after_code_1_the_next_server_is_tried(sim: Simulator, tmp_path: Any) -> None:
    client = client_for(sim)
    first, second = cheapest(client, 2)
    sim.faults.add("create_order", "http_500_before_commit")
    with rent(client, find_timeout=0.2) as rental:
        assert rental.tried[0][0] == first
        assert "Database error" in rental.tried[0][1]
        assert rental.server.id == second
        assert len(entries(tmp_path)) == 2
        # The order may exist after code 1, so its entry stays for a while.
        until(lambda: len(entries(tmp_path)) == 1)
    assert len(sim.orders) == 1
    assert entries(tmp_path) == []


@pytest.mark.parametrize("where", ["thread", "process"])
@pytest.mark.parametrize("form", FORMS)
def test_after_code_1_the_order_of_somebody_else_stays(
    make_sim: MakeSim, tmp_path: Any, where: str, form: str
) -> None:
    """The API responds with code 1 for a server that a plain create_order() has just rented."""
    sim = make_sim(form=form)
    state = tmp_path / "state" / "clore-client"
    client = hooked(sim)
    server_id = cheapest(client, 1)[0]
    theirs: list[int] = []

    def rented_by_somebody_else(_: int) -> None:
        if where == "thread":
            theirs.append(client_for(sim).create_order(server_id)["order_id"])
        else:
            code = "print(client.create_order(int(argument[0]))['order_id'])"
            theirs.append(int(in_a_second_process(sim, state, code, server_id)))
        sim.faults.add("create_order", "code_1")

    client.before_create = rented_by_somebody_else
    with pytest.raises(RentalError, match="Database error"):
        with rent(client, server_id=server_id, attempts=1, find_timeout=0.2):
            pytest.fail("entered")
    assert active(sim) == theirs
    assert entries(tmp_path) == []


def test_after_a_refused_currency_the_next_server_is_tried(sim: Simulator) -> None:
    client = client_for(sim)
    refusal = {"code": 6, "error": "currency-not-allowed"}
    sim.faults.add("create_order", "envelope", envelope=refusal)
    with rent(client) as rental:
        assert len(rental.tried) == 1


@pytest.mark.parametrize("kind", ["lose_response", "http_500_after_commit", "truncated_json"])
def test_a_lost_response_causes_no_second_order(sim: Simulator, kind: str) -> None:
    sim.faults.add("create_order", kind)
    with rent(client_for(sim), find_timeout=5) as rental:
        assert [o.id for o in sim.orders] == [rental.order.id]
    assert active(sim) == []


def test_an_order_that_shows_up_late_is_cancelled(sim: Simulator, tmp_path: Any) -> None:
    client = client_for(sim, order_lag=20.0)
    sim.faults.add("create_order", "commit_late", seconds=0.6)
    with pytest.raises(OrderOutcomeUnknownError):
        with rent(client, find_timeout=0.1, cancel_timeout=60):
            pytest.fail("entered")
    assert len(sim.orders) == 1
    assert active(sim) == []
    assert entries(tmp_path) == []


def test_an_unknown_outcome_stops_the_search_for_a_server(sim: Simulator, tmp_path: Any) -> None:
    client = client_for(sim, order_lag=0.01)
    sim.faults.add("create_order", "commit_late", seconds=3.0)
    with pytest.raises(OrderOutcomeUnknownError):
        with rent(client, find_timeout=0.2):
            pytest.fail("entered")
    assert len(sent_to(sim, "create_order")) == 1
    assert len(entries(tmp_path)) == 1
    # The order exists, and leftovers() finds it by the entry.
    made = until(lambda: active(sim))
    assert len(made) == 1
    assert client.cancel_leftovers(wait=5) == made
    assert entries(tmp_path) == []


def test_any_other_refusal_is_raised(make_sim: MakeSim, tmp_path: Any) -> None:
    sim = make_sim(balance=0.0)
    with pytest.raises(InsufficientBalanceError):
        with rent(client_for(sim)):
            pytest.fail("entered")
    assert len(sent_to(sim, "create_order")) == 1
    assert entries(tmp_path) == []


def test_a_price_over_the_limit(sim: Simulator, tmp_path: Any) -> None:
    client = hooked(sim)
    first, second = cheapest(client, 2)

    def dearer(server_id: int) -> None:
        if server_id == first:
            sim.set_price(first, 24 * 9.0)

    client.before_create = dearer
    with rent(client, max_price_usd=1.0) as rental:
        assert rental.server.id == second
        assert "costs 9 USD per hour" in rental.tried[0][1]
        assert active(sim) == [rental.order.id]
        assert len(sim.orders) == 2
        assert rental.order.id not in (sim.orders[0].id,)
        assert len(entries(tmp_path)) == 1
    assert active(sim) == []


def test_an_order_that_does_not_deploy(sim: Simulator) -> None:
    client = client_for(sim)
    first, second = cheapest(client, 2)
    sim.set_deploy_after(first, float("inf"))
    with rent(client, deploy_timeout=0.5) as rental:
        assert rental.server.id == second
        assert "did not reach status 'running'" in rental.tried[0][1]
        assert active(sim) == [rental.order.id]


def test_an_order_that_ends_while_it_deploys(make_sim: MakeSim) -> None:
    sim = make_sim(cancel_lingers=0)
    client = hooked(sim)
    ended: list[int] = []

    def end(order: Any) -> None:
        if not ended:
            ended.append(order.id)
            sim.end_order(order.id)

    client.after_create = end
    with rent(client) as rental:
        assert "ended unexpectedly" in rental.tried[0][1]


def test_an_unconfirmed_cancel_stops_the_search_for_a_server(make_sim: MakeSim) -> None:
    sim = make_sim(deploy_after=float("inf"), cancel_lingers=60)
    with pytest.raises(CancelUnconfirmedError):
        with rent(client_for(sim), deploy_timeout=0.1, cancel_timeout=0.2):
            pytest.fail("entered")
    assert len(sim.orders) == 1
    assert len(sent_to(sim, "cancel_order")) == 1


def test_attempts_limits_the_servers_that_are_tried(make_sim: MakeSim) -> None:
    sim = make_sim(deploy_after=float("inf"))
    client = client_for(sim)
    first, second, _ = cheapest(client, 3)
    with pytest.raises(RentalError) as caught:
        with rent(client, deploy_timeout=0.05, attempts=2):
            pytest.fail("entered")
    assert [server_id for server_id, _ in caught.value.tried] == [first, second]
    assert f"servers {first}, {second}: Order did not reach" in str(caught.value)
    assert active(sim) == []


def test_a_given_server_id(sim: Simulator, client: CloreClient) -> None:
    third = cheapest(client, 3)[2]
    with rent(client, server_id=third) as rental:
        assert rental.order.server_id == third
        with pytest.raises(RentalError, match=f"server {third} is rented"):
            rent(client, server_id=third).__enter__()
    with pytest.raises(RentalError, match="not on the marketplace"):
        rent(client, server_id=1).__enter__()
    with pytest.raises(RentalError, match="costs"):
        rent(client, server_id=third, max_price_usd=1e-6).__enter__()
    with pytest.raises(RentalError, match=f"server {third} does not fit gpu_type='RTX 9999'"):
        rent(client, server_id=third, gpu_type="RTX 9999").__enter__()
    assert len(sim.orders) == 1


def test_no_server_fits(sim: Simulator, client: CloreClient) -> None:
    with pytest.raises(RentalError, match=r"gpu_type='RTX 9999' left out .*nearest GPU names"):
        rent(client, gpu_type="RTX 9999").__enter__()
    assert sim.orders == []


@pytest.mark.parametrize("currency", ["CLORE", "USD", "BTC"])
def test_candidates_are_priced_in_their_currency(make_sim: MakeSim, currency: str) -> None:
    sim = make_sim(servers=100)
    client = client_for(sim)
    wanted = cheapest(client, 1, currency)[0]
    with rent(client, currency=currency) as rental:
        assert rental.server.id == wanted
        (order,) = sim.orders
        listed = rental.server["price"]["usd"]
        field = {"CLORE": "on_demand_clore", "USD": "on_demand_usd", "BTC": "on_demand_btc"}
        assert order.usd_per_hour == pytest.approx(listed[field[currency]], rel=1e-3)


def test_a_spot_order(any_sim: Simulator, any_client: CloreClient) -> None:
    with rent(any_client, use_spot=True, currency="USD") as rental:
        (order,) = any_sim.orders
        assert order.spot
        lowest = rental.server.spot_usd_per_hour or 0.0
        assert order.usd_per_hour == pytest.approx(lowest, rel=1e-3)
    with rent(any_client, use_spot=True, spot_price=lowest * 1.2) as rental:
        assert any_sim.orders[-1].usd_per_hour == pytest.approx(lowest * 1.2, rel=1e-3)
    assert active(any_sim) == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"attempts": 0}, ValueError),
        ({"attempts": True}, TypeError),
        ({"attempts": 1.5}, TypeError),
        ({"max_price_usd": -1}, ValueError),
        ({"max_price_usd": float("nan")}, ValueError),
        ({"max_hours": 0}, ValueError),
        ({"max_cost_usd": -1}, ValueError),
        ({"cancel_timeout": float("nan")}, ValueError),
        ({"server_id": "x"}, ValueError),
        ({"currency": "EUR"}, ValueError),
        ({"spot_price": 1.0}, ValueError),
        ({"use_spot": True, "spot_price": 2.0, "max_price_usd": 1.0}, ValueError),
        ({"ssh_key": "-----BEGIN PRIVATE KEY-----"}, ValueError),
        ({"ssh_key": "ssh-ed25519 AAAA", "ssh_password": "x"}, ValueError),
        ({"env": {"1x": "y"}}, ValueError),
        ({"ports": {"99999": "tcp"}}, ValueError),
        ({"ports": False}, TypeError),
        ({"env": 0}, TypeError),
        ({"ssh_password": 0}, TypeError),
        ({"poll_interval": 1e300}, ValueError),
        ({"use_spot": "yes"}, TypeError),
        ({"gpu_type": 4090}, TypeError),
    ],
)
def test_invalid_arguments(
    sim: Simulator, client: CloreClient, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(reversed(options)).split("_")[0]):
        client.rent(**options)
    assert sim.requests == []


# --- interrupts while the order is made ---


@pytest.mark.parametrize("moment", ["before", "sent", "after"])
def test_an_interrupt_around_the_order(sim: Simulator, tmp_path: Any, moment: str) -> None:
    client = hooked(sim)

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    if moment == "before":
        client.before_create = press
    elif moment == "after":
        client.after_create = press
    else:
        real = client._request

        def request(method: str, endpoint: str, *args: Any, **kwargs: Any) -> Any:
            answer = real(method, endpoint, *args, **kwargs)
            if endpoint == "/v1/create_order":
                raise KeyboardInterrupt
            return answer

        client._request = request  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt) as caught:
        with rent(client, find_timeout=0.5 if moment == "before" else 5):
            pytest.fail("entered")
    assert active(sim) == []
    assert len(sim.orders) == (0 if moment == "before" else 1)
    assert len(entries(tmp_path)) == (1 if moment == "before" else 0)
    assert len(getattr(caught.value, "__notes__", [])) == (1 if moment == "before" else 0)


def test_an_interrupt_while_it_deploys(make_sim: MakeSim, tmp_path: Any) -> None:
    sim = make_sim(deploy_after=float("inf"))
    thread = interrupt_when(lambda: bool(sim.orders))
    with pytest.raises(KeyboardInterrupt):
        with rent(client_for(sim), find_timeout=10):
            pytest.fail("entered")
    thread.join()
    assert active(sim) == []
    assert entries(tmp_path) == []


@pytest.mark.parametrize("number", range(1, 9))
def test_an_interrupt_when_a_request_has_arrived(
    sim: Simulator, client: CloreClient, tmp_path: Any, number: int
) -> None:
    thread = interrupt_when(lambda: len(sim.requests) >= number)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with rent(client, find_timeout=10):
            while True:
                client.get_wallets()
    thread.join()
    assert active(sim) == []
    assert entries(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- money ---


@pytest.mark.parametrize(
    ("form", "options"),
    [("live", {}), ("documented", {"currency": "USD"}), ("live", {"use_spot": True})],
)
def test_the_cost_is_what_the_simulator_charges(
    make_sim: MakeSim, form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sim, wall, ahead = make_sim(form=form), time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: wall() + ahead)
    with rent(client_for(sim), **options) as rental:
        for minutes in (9.0, 6.0, 180.0):  # the creation fee is due in the tenth
            sim.advance(minutes * 60)
            ahead += minutes * 60
            assert rental.cost_usd == pytest.approx(sim.orders[0].charged_usd, rel=0.01)
    (order,) = sim.orders
    assert order.charged_usd > order.usd_per_hour * 3
    assert rental.cost_usd == pytest.approx(order.charged_usd, rel=0.01)
    frozen = rental.cost_usd
    time.sleep(0.02)
    assert rental.cost_usd == frozen


def test_the_cost_over_hours(
    sim: Simulator, client: CloreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rent(client, currency="USD") as rental:
        price = sim.orders[0].usd_per_hour
        now, wall = time.monotonic(), time.time
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: wall() + 599)  # a laptop that was asleep
            assert rental.cost_usd == pytest.approx(price * 1.05 * 599 / 3600, rel=0.01)
            patch.setattr(time, "time", lambda: wall() + 7200)
            assert rental.cost_usd == pytest.approx(price * 1.05 * 2 + 0.10, rel=0.01)
            assert rental.hours == pytest.approx(2.0, rel=0.01)
            patch.setattr(time, "time", lambda: wall() - 7200)  # a clock that was set back
            assert rental.cost_usd == pytest.approx(0.0, abs=price)
            assert rental.cost_usd >= price * 1.05 * (time.monotonic() - now) / 3600


def test_the_cost_of_servers_that_did_not_work_counts(sim: Simulator) -> None:
    client = client_for(sim)
    sim.set_deploy_after(cheapest(client, 1)[0], float("inf"))
    with rent(client, deploy_timeout=0.5) as rental:
        time.sleep(0.5)
    charged = sum(order.charged_usd for order in sim.orders)
    assert len(sim.orders) == 2
    # The client counts from the send of an order until the answer to its cancel.
    assert rental.cost_usd >= 0.99 * charged


@pytest.mark.parametrize("limit", ["hours", "cost"])
def test_a_budget_that_runs_out(sim: Simulator, client: CloreClient, limit: str) -> None:
    options: dict[str, Any] = {"max_hours": 0.8 / 3600, "currency": "USD"}
    if limit == "cost":
        price = client.find_servers()[0]["price"]["usd"]["on_demand_usd"]
        options = {"max_cost_usd": price * 0.8 / 3600, "currency": "USD"}
    with pytest.raises(BudgetExceededError, match=f"max_{limit}") as caught:  # noqa: PT012
        with rent(client, **options) as rental:
            order_id = rental.order.id
            deadline = time.monotonic() + 20
            while active(sim) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert active(sim) == []
            with pytest.raises(BudgetExceededError):
                rental.run("true")
            with pytest.raises(BudgetExceededError):
                rental.keep()
    assert caught.value.order_id == order_id
    assert caught.value.hours >= 0.5 / 3600
    # It counts from before the order is sent, and the cancel takes time, too.
    five_seconds = 5 * 1.05 * sim.orders[0].usd_per_hour / 3600
    assert abs(caught.value.cost_usd - sim.orders[0].charged_usd) <= five_seconds
    assert caught.value.cost_usd >= options.get("max_cost_usd", 0)
    assert caught.value.__cause__ is None


def test_a_budget_error_is_chained_to_the_error_of_the_block(
    sim: Simulator, client: CloreClient
) -> None:
    mine = ValueError("mine")
    with pytest.raises(BudgetExceededError) as caught:  # noqa: PT012
        with rent(client, max_hours=0.6 / 3600):
            deadline = time.monotonic() + 20
            while active(sim) and time.monotonic() < deadline:
                time.sleep(0.02)
            raise mine
    assert caught.value.__cause__ is mine


def test_a_budget_that_runs_out_while_it_deploys(make_sim: MakeSim) -> None:
    sim = make_sim(deploy_after=float("inf"))
    with pytest.raises(BudgetExceededError):
        with rent(client_for(sim), max_hours=0.5 / 3600, deploy_timeout=30):
            pytest.fail("entered")
    assert active(sim) == []
    assert len(sim.orders) == 1


def test_a_budget_repeats_the_cancel_until_it_is_accepted(
    sim: Simulator, client: CloreClient
) -> None:
    sim.faults.add("cancel_order", "http_500_before_commit", times=10_000)
    with pytest.raises(BudgetExceededError, match="was ended") as caught:  # noqa: PT012
        with rent(client, max_hours=0.8 / 3600, cancel_timeout=0.3) as rental:
            began = time.monotonic()
            while time.monotonic() < began + 2.5:  # long past cancel_timeout
                time.sleep(0.05)
            assert len(active(sim)) == 1
            with pytest.raises(BudgetExceededError, match="is being ended"):
                rental.run("true")
            sim.faults.clear()
            deadline = time.monotonic() + 20
            while active(sim) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert active(sim) == []
    assert getattr(caught.value, "__notes__", []) == []


def test_a_client_may_override_the_wait_with_its_documented_parameters(sim: Simulator) -> None:
    class Client(CloreClient):
        def wait_for_order(  # type: ignore[override]
            self, order_id: int, timeout: float = 300, poll_interval: float = 5.0,
            target_status: str = "running",
        ) -> Order:  # fmt: skip
            return super().wait_for_order(order_id, timeout, poll_interval, target_status)

    with Client(sim.api_key, base_url=sim.url, rate_limit=0).rent(poll_interval=0.05) as rental:
        assert rental.order.status == "running"


@pytest.mark.parametrize("form", FORMS)
def test_a_refused_order_that_stays_does_not_delay_a_budget(make_sim: MakeSim, form: str) -> None:
    sim = make_sim(form=form, visible_after=0.5, rate_limit=0, create_order_interval=0)
    sim.faults.add("create_order", "http_500_after_commit")
    patience = [5.0, 0.1]  # for the first order, it is too short
    refused = True

    class Client(CloreClient):
        def create_order(self, *args: Any, **options: Any) -> Order:
            options["find_timeout"] = patience.pop()
            return super().create_order(*args, **options)

        def _request(self, method: str, endpoint: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            cancels = endpoint.endswith("/cancel_order")
            if refused and cancels and kwargs["json"]["id"] == sim.orders[0].id:
                answer = {"code": 6, "error": "no"}
                sim.faults.add("cancel_order", "envelope", envelope=answer, after_commit=False)
            return super()._request(method, endpoint, *args, **kwargs)

    client = Client(sim.api_key, base_url=sim.url, rate_limit=0, create_order_interval=0)
    with pytest.raises(BudgetExceededError, match="was ended"):  # noqa: PT012
        with client.rent(poll_interval=0.05, max_hours=3 / 3600, cancel_timeout=120) as rental:
            order_id = rental.order.id
            until(lambda: order_id not in active(sim), 60)
            assert len(active(sim)) == 1
            refused = False
    assert active(sim) == []


def test_a_budget_error_says_if_the_order_may_still_run(
    sim: Simulator, client: CloreClient
) -> None:
    sim.faults.add("cancel_order", "http_500_before_commit", times=10_000)
    with pytest.raises(BudgetExceededError, match="is being ended") as caught:
        with rent(client, max_hours=0.8 / 3600, cancel_timeout=0.3):
            time.sleep(1.5)
    (note,) = caught.value.__notes__  # type: ignore[attr-defined,unused-ignore]
    assert "may still be running" in note


# --- SSH ---


def test_ssh_and_run(make_sim: MakeSim) -> None:
    pytest.importorskip("paramiko")
    sim = make_sim(ssh=True)
    client = client_for(sim)
    with rent(client, gpu_type="RTX 4090") as rental:
        result = rental.run("echo out; echo err >&2; exit 3", check=False)
        assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
        with pytest.raises(CommandError):
            rental.run("exit 3")
        big = rental.run("for i in $(seq 3000); do echo $i; echo $i >&2; done", timeout=60)
        assert big.stdout == big.stderr
        assert len(big.stdout.split()) == 3000
        with pytest.raises(SSHError, match="did not end within"):
            rental.run("sleep 30", timeout=0.3)
        connection = rental.ssh()
        assert connection.exec_command("echo hi")[1].read() == b"hi\n"
    transport = connection.get_transport()
    assert transport is None or not transport.is_active()


def test_a_budget_closes_ssh(make_sim: MakeSim) -> None:
    pytest.importorskip("paramiko")
    sim = make_sim(ssh=True)
    with pytest.raises(BudgetExceededError) as caught:
        with rent(client_for(sim), max_hours=2 / 3600) as rental:
            rental.run("sleep 60")
    assert active(sim) == []
    assert isinstance(caught.value, CloreError)


# --- threads ---


def test_rentals_of_several_threads(sim: Simulator, client: CloreClient, tmp_path: Any) -> None:
    failures: list[BaseException] = []
    ids: set[int] = set()

    def work() -> None:
        try:
            with rent(client, attempts=8, find_timeout=20) as rental:
                ids.add(rental.order.id or 0)
                time.sleep(0.1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(ids) == 4
    assert active(sim) == []
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_written(
    sim: Simulator, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    client = client_for(sim, state_dir=blocked / "below")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with rent(client):
                pass
    assert active(sim) == []
    assert caplog.text.count("can't be written") == 1


def test_without_a_journal(sim: Simulator, tmp_path: Any) -> None:
    with rent(client_for(sim, state_dir=None)):
        assert entries(tmp_path) == []
    for wrong, error in ((3, TypeError), ("", ValueError)):
        with pytest.raises(error, match="state_dir"):
            client_for(sim, state_dir=wrong)
    with contextlib.suppress(CloreError):
        assert client_for(sim, state_dir=None).leftovers(wait=0).abandoned == []


def test_a_short_failure_of_the_api_does_not_stop_the_cancel(make_sim: MakeSim) -> None:
    """Send the cancel again soon after the retries of one request are used up."""
    sim = make_sim()
    client = client_for(sim, state_dir=None)
    rental = client.rent("RTX 4090", min_reliability=96, poll_interval=0.02, cancel_timeout=60)
    started = 0.0
    with rental:
        sim.faults.add("cancel_order", "http_500_before_commit", times=4)
        started = time.monotonic()
    assert time.monotonic() - started < 20
    assert not any(order.active for order in sim.orders)


def test_a_cancelled_order_can_not_be_kept(make_sim: MakeSim) -> None:
    client = client_for(make_sim(), state_dir=None)
    with client.rent("RTX 4090", min_reliability=96, poll_interval=0.02) as rental:
        pass
    with pytest.raises(RentalError, match="ended already"):
        rental.keep()
