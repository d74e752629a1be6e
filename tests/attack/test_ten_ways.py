"""Known ways to leave a server running without an error that says so.

The fault server has the true state.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import (
    BudgetExceededError,
    CancelUnconfirmedError,
    CloreClient,
    CloreError,
    ConfigurationError,
    Order,
    OrderOutcomeUnknownError,
    RentalError,
    WaitTimeoutError,
)
from tests.attack.clients import LAG, Watchdog, client_for, unaccounted
from tests.attack.fault_server import FaultServer

pytestmark = pytest.mark.internal  # it takes long

RENT: dict[str, Any] = {
    "poll_interval": 0.03,
    "find_timeout": 1.0,
    "cancel_timeout": 5.0,
    "deploy_timeout": 5.0,
}
FOR_EVER = 10000  # responses


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as made:
        yield made


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Return the folder of the journal."""
    return tmp_path / "notes"


@pytest.fixture
def hasty(server: FaultServer, notes: Path) -> Iterator[CloreClient]:
    """Return a client that waits at most 0.6 seconds for a response."""
    with client_for(server, notes, timeout=0.2) as made:
        yield made


@pytest.fixture
def client(server: FaultServer, notes: Path) -> Iterator[CloreClient]:
    with client_for(server, notes) as made:
        yield made


def running_order(client: CloreClient) -> int:
    """Make an order, and let the client see it running."""
    order = client.create_order(101)
    assert order.id is not None
    client.wait_for_order(order.id, timeout=10, poll_interval=0.02)
    return order.id


def run_child(server: FaultServer, notes: Path, code: str, *arguments: str) -> str:
    """Run code in another process, and return its output."""
    environment = {
        **os.environ,
        "CLORE_API_KEY": server.key,
        "CLORE_BASE_URL": server.url,
        "XDG_STATE_HOME": str(notes.parent),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    head = "import os, sys\nfrom clore_client import CloreClient, CloreError\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def die_while_renting(server: FaultServer, notes: Path, server_id: int) -> int:
    """Leave an order running, like a killed process."""
    code = """
    client = CloreClient(rate_limit=0.01, create_order_interval=0.01, state_dir=sys.argv[1])
    with client.rent(server_id=int(sys.argv[2]), poll_interval=0.03) as rental:
        print(rental.order.id, flush=True)
        os._exit(0)
    """
    return int(run_child(server, notes, code, str(notes), str(server_id)))


# --- 1: a response that never ends ---

NEVER_ENDING = ("drip", "drip_headers", "endless_continue")


@pytest.mark.parametrize("kind", NEVER_ENDING)
def test_a_response_that_never_ends_is_an_error(server: FaultServer, kind: str) -> None:
    with client_for(server, max_retries=1, timeout=0.2) as client:
        server.fault("wallets", kind)
        with Watchdog(server, 6), pytest.raises(CloreError):
            client.get_wallets()
        client.timeout = 20
        assert len(client.get_wallets()) == 3


def test_a_slow_response_is_accepted(server: FaultServer) -> None:
    with client_for(server, timeout=2) as client:
        server.fault("wallets", "drip", interval=0.001, endless=False)
        assert len(client.get_wallets()) == 3
    assert len(server.requests) == 1


@pytest.mark.parametrize("kind", ["drip", "endless_continue"])
def test_a_wait_ends_at_its_timeout(server: FaultServer, kind: str) -> None:
    with client_for(server, timeout=20) as client:
        order_id = running_order(client)
        server.fault("my_orders", kind, FOR_EVER)
        started = time.monotonic()
        with Watchdog(server, 7), pytest.raises(WaitTimeoutError):
            client.wait_for_order(order_id, timeout=0.2, target_status="cancelled")
        assert time.monotonic() - started < 5


def test_deploy_timeout_is_kept(server: FaultServer, notes: Path) -> None:
    server.ledger.deploy_after = 1000
    with client_for(server, notes, timeout=20) as client:
        server.fault("my_orders", "drip", skip=5)
        rental = client.rent(server_id=101, **{**RENT, "deploy_timeout": 0.2})
        with Watchdog(server, 12), pytest.raises(RentalError):
            rental.__enter__()
    assert len(server.orders) == 1
    assert server.running == []


def test_cancel_timeout_is_kept(server: FaultServer, hasty: CloreClient) -> None:
    rental = hasty.rent("4090", **{**RENT, "cancel_timeout": 0.5})
    with Watchdog(server, 12), pytest.raises(CancelUnconfirmedError) as caught, rental:
        server.fault("cancel_order", "drip", FOR_EVER)
    assert list(caught.value.order_ids) == server.running
    assert len(server.sent_to("cancel_order")) > 1
    assert unaccounted(server, hasty, caught.value, recorded=True) == []


def test_cancel_timeout_is_kept_with_a_long_timeout(server: FaultServer, notes: Path) -> None:
    with client_for(server, notes, timeout=30) as client:
        rental = client.rent("4090", **{**RENT, "cancel_timeout": 0.5})
        with Watchdog(server, 12), pytest.raises(CancelUnconfirmedError), rental:
            server.fault("cancel_order", "endless_continue", FOR_EVER)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_slow_cancel_is_raised(
    server: FaultServer, hasty: CloreClient, signum: int
) -> None:
    raised = KeyboardInterrupt if signum == signal.SIGINT else SystemExit
    rental = hasty.rent("4090", **{**RENT, "cancel_timeout": 1.5})
    press = threading.Timer(0.4, os.kill, (os.getpid(), signum))
    with Watchdog(server, 12), pytest.raises(raised) as caught, rental:  # noqa: PT012
        server.fault("cancel_order", "drip", FOR_EVER)
        press.start()
    assert any(str(server.running[0]) in note for note in getattr(caught.value, "__notes__", []))
    assert unaccounted(server, hasty, caught.value, recorded=True) == []


@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_a_cancel_that_hangs_is_sent_again_on_another_connection(
    server: FaultServer, hasty: CloreClient, kind: str
) -> None:
    with Watchdog(server, 15):
        with hasty.rent("4090", **{**RENT, "cancel_timeout": 12}):
            server.fault("cancel_order", kind)
    assert server.running == []
    first, second = server.sent_to("cancel_order")[:2]
    assert first.connection != second.connection


@pytest.mark.parametrize("kind", NEVER_ENDING)
def test_an_order_whose_response_never_ends_is_found(
    server: FaultServer, hasty: CloreClient, kind: str
) -> None:
    server.fault("create_order", kind, commit=True)
    with Watchdog(server, 12):
        order = hasty.create_order(101, find_timeout=1)
    assert server.running == [order.id]
    assert len(server.sent_to("create_order")) == 1


def test_a_purchase_whose_response_never_ends_has_an_unknown_outcome(
    server: FaultServer, hasty: CloreClient
) -> None:
    server.fault("create_order", "drip")
    with Watchdog(server, 12), pytest.raises(OrderOutcomeUnknownError):
        hasty.create_order(101, find_timeout=0.3)
    assert len(server.sent_to("create_order")) == 1


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="these signals are POSIX")
@pytest.mark.parametrize("kind", ["hang", *NEVER_ENDING])
def test_an_interrupt_is_raised_at_once(server: FaultServer, kind: str) -> None:
    with client_for(server, timeout=20) as client:
        main = threading.main_thread().ident or 0
        timer = threading.Timer(0.15, lambda: signal.pthread_kill(main, signal.SIGINT))
        server.fault("wallets", kind)
        started = time.monotonic()
        timer.start()
        with Watchdog(server, 10), pytest.raises(KeyboardInterrupt):
            client.get_wallets()
        assert time.monotonic() - started < 5
        assert len(client.get_wallets()) == 3


# --- 2: a very large response ---

LITTLE_MEMORY = """
import resource
client = CloreClient(rate_limit=0.01, max_retries=1, timeout=20)
client.get_wallets()
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    client.get_wallets()
    print("it took that")
except CloreError as error:
    print("refused:", error)
except BaseException as error:
    print("broken:", repr(error))
print(len(client.get_wallets()), "wallets")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited so on Linux")
@pytest.mark.parametrize(
    ("kind", "options"),
    [("bomb", {}), ("bomb", {"nested": True}), ("huge", {"endless": True})],
    ids=["bomb", "nested", "endless"],
)
def test_no_response_uses_all_memory(
    server: FaultServer, notes: Path, kind: str, options: dict[str, Any]
) -> None:
    server.fault("wallets", kind, skip=1, **options)
    said = run_child(server, notes, LITTLE_MEMORY)
    assert said.startswith("refused:"), said
    assert "max_response_mb" in said or options.get("nested")  # an encoding that was not requested
    assert "3 wallets" in said


def test_a_huge_response_is_refused(server: FaultServer) -> None:
    with client_for(server, timeout=10, max_retries=1) as client:
        server.fault("wallets", "huge", mb=150)
        with pytest.raises(CloreError, match="max_response_mb"):
            client.get_wallets()
        assert len(client.get_wallets()) == 3


def test_the_limit_can_be_set(server: FaultServer) -> None:
    with client_for(server, timeout=5, max_retries=1, max_response_mb=1) as client:
        server.fault("wallets", "huge", mb=0.8)
        assert len(client.get_wallets()) == 3
        server.fault("wallets", "huge", mb=1.2)
        with pytest.raises(CloreError, match="max_response_mb"):
            client.get_wallets()


def test_a_purchase_with_a_huge_response_has_an_unknown_outcome(server: FaultServer) -> None:
    with client_for(server, timeout=10) as client:
        server.fault("create_order", "huge", mb=100, commit=True)
        order = client.create_order(101)
        assert server.running == [order.id]
        server.fault("create_order", "huge", mb=100)
        with pytest.raises(OrderOutcomeUnknownError):
            client.create_order(102, find_timeout=0.5)
    assert len(server.sent_to("create_order")) == 2


# --- 3: a long Retry-After ---


def push_back(server: FaultServer, client: CloreClient) -> None:
    """Let the API ask for a pause of an hour in the response to a read."""
    server.fault("wallets", "too_fast", FOR_EVER, retry_after=3600)
    with pytest.raises(CloreError):
        client.get_wallets()


def test_a_rental_ends_during_a_pause(server: FaultServer, client: CloreClient) -> None:
    with client.rent("4090", **RENT):
        push_back(server, client)
    assert server.running == []


def test_a_cancel_is_sent_again_during_a_pause(server: FaultServer, client: CloreClient) -> None:
    server.fault("cancel_order", "too_fast", retry_after=3600)
    with client.rent("4090", **{**RENT, "cancel_timeout": 12}):
        pass
    assert server.running == []


def test_single_cancels_are_sent_during_a_pause(server: FaultServer, client: CloreClient) -> None:
    order_id = running_order(client)
    push_back(server, client)
    assert client.cancel_order(order_id, confirm=True, confirm_timeout=5)
    assert server.running == []


def test_cancel_all_is_sent_during_a_pause(server: FaultServer, client: CloreClient) -> None:
    order_id = running_order(client)
    push_back(server, client)
    assert client.cancel_all(confirm_timeout=5) == [order_id]
    assert server.running == []


def test_leftovers_are_cancelled_during_a_pause(
    server: FaultServer, client: CloreClient, notes: Path
) -> None:
    order_id = die_while_renting(server, notes, 101)
    push_back(server, client)
    assert [left.order_id for left in client.leftovers(wait=0).abandoned] == [order_id]
    assert client.cancel_leftovers(wait=0, cancel_timeout=5) == [order_id]
    assert server.running == []


# --- 4: an order that is not listed may still run ---

Break = Callable[[FaultServer, int], None]


def answer_502(server: FaultServer, times: int) -> None:
    server.fault("cancel_order", "page", times)


def answer_code_6(server: FaultServer, times: int) -> None:
    server.fault("cancel_order", "refuse", max(1, times - 2), code=6)


BREAKS = pytest.mark.parametrize("break_it", [answer_502, answer_code_6])


@BREAKS
@pytest.mark.parametrize("confirm", [False, True])
def test_cancel_order_returns_true_only_if_the_order_has_ended(
    server: FaultServer, client: CloreClient, break_it: Break, confirm: bool
) -> None:
    order_id = running_order(client)
    break_it(server, 3)
    server.flap(4)
    with contextlib.suppress(CloreError):
        if client.cancel_order(order_id, confirm=confirm, confirm_timeout=3, settle_timeout=0.3):
            assert server.running == []


@BREAKS
def test_an_order_without_a_cancel_never_counts_as_ended(
    server: FaultServer, client: CloreClient, break_it: Break
) -> None:
    order_id = running_order(client)
    break_it(server, FOR_EVER)
    server.flap(FOR_EVER)
    with Watchdog(server, 15), pytest.raises(CloreError) as caught:
        client.cancel_order(order_id, settle_timeout=0.3, confirm=True, confirm_timeout=0.3)
    assert str(order_id) in str(caught.value)


@BREAKS
def test_a_rental_cancels_an_order_that_is_not_listed(
    server: FaultServer, client: CloreClient, break_it: Break
) -> None:
    with client.rent("4090", **RENT):
        break_it(server, 3)
        server.flap(4)
    assert server.running == []


@BREAKS
def test_a_rental_that_was_not_cancelled_keeps_its_entry(
    server: FaultServer, client: CloreClient, notes: Path, break_it: Break
) -> None:
    def rent() -> None:
        with client.rent("4090", **{**RENT, "cancel_timeout": 0.3}):
            break_it(server, FOR_EVER)
            server.flap(FOR_EVER)

    with Watchdog(server, 12), pytest.raises(CancelUnconfirmedError) as caught:
        rent()
    left = server.running
    assert list(caught.value.order_ids) == left
    assert list(notes.glob("*.json"))
    server.calm()
    assert [leftover.order_id for leftover in client.leftovers(wait=0).abandoned] == left
    assert client.cancel_leftovers(wait=0) == left
    assert server.running == []


def test_an_accepted_cancel_without_effect_is_repeated(
    server: FaultServer, client: CloreClient
) -> None:
    order_id = running_order(client)
    server.fault("cancel_order", "refuse", code=0)
    server.flap(3)
    with contextlib.suppress(CloreError):
        client.cancel_order(order_id, confirm=True, confirm_timeout=0.5)
        assert server.running == []


def test_an_order_that_is_never_listed_as_ended_has_ended_after_the_lag(
    server: FaultServer, client: CloreClient
) -> None:
    server.ledger.show_ended = False
    with client.rent("4090", **RENT):
        pass
    assert server.running == []
    order_id = running_order(client)
    assert client.cancel_order(order_id, confirm=True, confirm_timeout=5)


def test_cancel_all_keeps_its_timeout_without_a_list_of_ended_orders(
    server: FaultServer, client: CloreClient
) -> None:
    server.ledger.show_ended = False
    ids = {running_order(client), client.create_order(102).id}
    server.fault("cancel_orders", "reset", commit=True)
    with Watchdog(server, 12):
        try:
            assert set(client.cancel_all(confirm_timeout=0.5)) == ids
        except CancelUnconfirmedError as error:
            assert set(error.order_ids) <= ids  # noqa: PT017 - either will do
    assert server.running == []


# --- 8: two clocks ---


@pytest.mark.parametrize(("offset", "send_date"), [(-3, True), (40, True), (-3, False)])
def test_an_order_is_found_with_any_clock(
    server: FaultServer, client: CloreClient, offset: float, send_date: bool
) -> None:
    server.ledger.clock_offset, server.send_date = offset, send_date
    client.get_marketplace()
    for server_id in (101, 102):
        order = client.create_order(server_id, find_timeout=0.6)
        assert order.id == server.orders[-1].id
        client.cancel_order(order.id)
    assert len(server.orders) == 2


@pytest.mark.parametrize("offset", [-3, 40])
def test_a_rental_works_with_a_wrong_clock(
    server: FaultServer, client: CloreClient, offset: float
) -> None:
    server.ledger.clock_offset = offset
    with client.rent("4090", **RENT) as rental:
        assert server.running == [rental.order.id]
    assert server.running == []


@pytest.mark.parametrize(("offset", "send_date"), [(-3, True), (40, True), (0, False)])
@pytest.mark.parametrize("looked_at", ["orders", "marketplace", "nothing"])
def test_an_older_order_is_not_the_new_one(
    server: FaultServer, client: CloreClient, offset: float, send_date: bool, looked_at: str
) -> None:
    ledger = server.ledger
    ledger.clock_offset, server.send_date = offset, send_date
    ledger.visible_after, ledger.cancel_lingers = 0.1, 3.0
    details = {"image": "nvidia/cuda:12.1.0-base-ubuntu22.04"}  # as create_order sends by default
    before = ledger.place(101, **details)
    time.sleep(0.12)
    if looked_at == "orders":
        assert [order.id for order in client.get_orders()] == [before.id]
    elif looked_at == "marketplace":
        client.get_marketplace()
    ledger.end(before.id)
    error: CloreError | None = None
    try:
        order = client.create_order(101, find_timeout=0.6)
        assert [order.id] == server.running
    except OrderOutcomeUnknownError as raised:
        error = raised
    # The first call of a client can't know the orders that existed before.
    assert error is None or looked_at == "nothing"
    assert error is None or str(server.running[0]) in str(error)


# --- 9: code 1 within rent() ---


def rented(client: CloreClient, seconds: float) -> CloreError | None:
    """Rent the cheapest server for a while; return the exception."""
    try:
        with client.rent("4090", **{**RENT, "find_timeout": 0.2}):
            time.sleep(seconds)
    except CloreError as error:
        return error
    return None


@pytest.mark.parametrize(("status", "seconds"), [(200, 0), (500, 0.5)])
def test_an_order_after_code_1_is_cancelled(
    server: FaultServer, notes: Path, status: int, seconds: float
) -> None:
    server.ledger.hidden_for[101] = 0.4
    server.fault("create_order", "refuse", commit=True, code=1, status=status)
    with client_for(server, notes, order_lag=1) as client:
        error = rented(client, seconds)
        assert unaccounted(server, client, error, recorded=True) == []
    assert [order.server_id for order in server.orders][:2] in ([101, 102], [101])


def test_an_order_after_code_1_keeps_its_entry(server: FaultServer, notes: Path) -> None:
    server.ledger.hidden_for[101] = 0.4
    server.fault("create_order", "refuse", commit=True, code=1)
    with client_for(server, notes, order_lag=1) as client:
        with client.rent("4090", **{**RENT, "find_timeout": 0.2}):
            recorded = [json.loads(path.read_text())["server_id"] for path in notes.glob("*.json")]
            assert sorted(recorded) == [101, 102]


def test_the_same_order_id_in_another_account_does_not_hide_it(
    server: FaultServer, notes: Path
) -> None:
    with FaultServer() as other, client_for(other, notes) as elsewhere:
        server.ledger.hidden_for[101] = 0.4
        server.fault("create_order", "refuse", commit=True, code=1)
        with (
            elsewhere.rent("4090", **RENT) as rental,
            client_for(server, notes, order_lag=1) as client,
        ):
            error = rented(client, 0)
            assert server.orders[0].id == rental.order.id
            assert unaccounted(server, client, error, recorded=True) == []


def test_orders_that_are_all_listed_late_are_accounted_for(notes: Path) -> None:
    with (
        FaultServer(visible_after=0.4) as server,
        client_for(server, notes, order_lag=1) as client,
    ):
        server.fault("create_order", "refuse", commit=True, code=1)
        error = rented(client, 0)
        assert unaccounted(server, client, error, recorded=True) == []


def test_an_order_after_code_1_of_the_only_server_is_cancelled(
    server: FaultServer, notes: Path
) -> None:
    server.ledger.hidden_for[101] = 0.4
    server.fault("create_order", "refuse", commit=True, code=1)
    with client_for(server, notes, order_lag=1) as client:
        with pytest.raises(CloreError) as caught:
            client.rent(server_id=101, **{**RENT, "find_timeout": 0.2}).__enter__()
        assert unaccounted(server, client, caught.value, recorded=True) == []


def test_one_empty_list_does_not_show_that_there_is_no_order(
    server: FaultServer, client: CloreClient
) -> None:
    server.ledger.hidden_for[101] = LAG
    server.fault("create_order", "refuse", commit=True, code=1)

    def hide_it_for_long() -> None:
        while not server.orders:
            time.sleep(0.001)
        time.sleep(LAG * 0.8)
        server.fault("my_orders", "page", FOR_EVER)
        time.sleep(3 * LAG)
        server.calm()
        server.flap(1)

    thread = threading.Thread(target=hide_it_for_long)
    thread.start()
    with pytest.raises(CloreError) as caught:
        client.rent(server_id=101, **{**RENT, "find_timeout": 0.1}).__enter__()
    thread.join()
    assert unaccounted(server, client, caught.value, recorded=True) == []


def test_after_code_1_without_an_order_the_entry_is_removed(
    server: FaultServer, client: CloreClient
) -> None:
    server.fault("create_order", "refuse", 2, code=1)
    with client.rent("4090", **{**RENT, "find_timeout": 0.1}) as rental:
        assert server.running == [rental.order.id]
    assert server.running == []
    assert client.leftovers(wait=0).abandoned == []


# --- 10: smaller problems ---


def raise_bid(client: CloreClient, order: Order) -> None:
    """Raise a bid to one dollar per second."""
    assert client.set_spot_price(order.id or 0, 3600, allow_above_on_demand=True)


def test_a_raised_bid_counts(server: FaultServer, client: CloreClient) -> None:
    with client.rent("4090", use_spot=True, **RENT) as rental:
        assert rental.cost_usd < 0.01
        raise_bid(client, rental.order)
        time.sleep(0.3)
        assert rental.cost_usd > 0.25
    assert server.running == []


def test_a_raised_bid_reaches_the_budget(server: FaultServer, client: CloreClient) -> None:
    def rent() -> None:
        with client.rent("4090", use_spot=True, max_cost_usd=0.5, **RENT) as rental:
            raise_bid(client, rental.order)
            deadline = time.monotonic() + 8
            while server.running and time.monotonic() < deadline:
                time.sleep(0.05)
            assert server.running == [], "its budget did not end it"

    with Watchdog(server, 15), pytest.raises(BudgetExceededError) as caught:
        rent()
    assert caught.value.cost_usd >= 0.5


def test_a_late_103_does_not_shift_the_responses(server: FaultServer) -> None:
    with client_for(server, timeout=5) as client:
        order_id = running_order(client)
        server.fault("wallets", "early_hints", delay=0.2)
        server.fault("wallets", "slow", delay=0.2)
        answer_502(server, FOR_EVER)
        client.get_wallets()
        with pytest.raises(CloreError):
            client.cancel_order(order_id, settle_timeout=0)
        assert server.running == [order_id]


@pytest.mark.parametrize("kind", ["early_hints", "late_early_hints", "extra_answer"])
@pytest.mark.parametrize("delay", [0, 0.03])
def test_extra_responses_are_ignored(
    server: FaultServer, client: CloreClient, kind: str, delay: float
) -> None:
    order_id = running_order(client)
    answer_502(server, FOR_EVER)
    server.fault("wallets", kind, delay=delay)
    client.get_wallets()
    time.sleep(0.06)
    with pytest.raises(CloreError):
        client.cancel_order(order_id, settle_timeout=0)
    assert server.running == [order_id]
    assert [order.id for order in client.get_orders()] == [order_id]


def test_a_response_without_a_list_is_an_error(server: FaultServer, client: CloreClient) -> None:
    order_id = running_order(client)
    # The next list is requested before the extra response arrives.
    server.fault("my_orders", "extra_answer", 2, delay=0.1)
    for _ in range(2):
        with contextlib.suppress(CloreError):
            assert [order.id for order in client.get_orders()] == [order_id]


@pytest.mark.parametrize("kind", ["bad_status_line", "bad_chunk_size"])
def test_a_response_that_repeats_the_request_shows_no_secret(
    server: FaultServer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(1)
    password = "Xk3-dromedary-77"
    with client_for(server, max_retries=2) as client:
        server.fault("wallets", kind, 2)
        server.fault("create_order", kind)
        errors: list[BaseException] = []
        for call in (
            client.get_wallets,
            lambda: client.create_order(101, ssh_password=password, find_timeout=0.1),
        ):
            with pytest.raises(CloreError) as caught:
                call()
            errors.append(caught.value)
    shown = "".join("".join(traceback.format_exception(error)) for error in errors)
    for text in (shown, repr(errors), caplog.text):
        assert server.key not in text
        assert password not in text


@pytest.mark.parametrize(
    "url",
    [
        "https://{}@api.example.com",
        "https://user:{}@api.example.com",
        "https://api.example.com/?auth={}",
        "https://api.example.com/#{}",
        "https://api.example.com/ {}",
        "http://api.example.com/{}",
        "{}",
    ],
)
@pytest.mark.parametrize("by", ["argument", "environment", "attribute"])
def test_a_key_in_the_base_url_is_not_shown(
    url: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "s3cretc1ient5key"

    def call() -> None:
        client = CloreClient(key, base_url=url.format(key) if by == "argument" else None)
        if by == "attribute":
            client.BASE_URL = url.format(key)
        client.get_wallets()

    if by == "environment":
        monkeypatch.setenv("CLORE_BASE_URL", url.format(key))
    with pytest.raises(ConfigurationError) as caught:
        call()
    assert key not in "".join(traceback.format_exception(caught.value))


def test_an_entry_with_an_impossible_number_hides_no_other(
    server: FaultServer, client: CloreClient, notes: Path
) -> None:
    die_while_renting(server, notes, 101)
    (note,) = notes.glob("*.json")
    facts = json.loads(note.read_text())
    note.write_text(json.dumps({**facts, "order_id": -1}))
    second = die_while_renting(server, notes, 102)
    found = client.leftovers(wait=0)
    assert second in [left.order_id for left in found.abandoned]
    assert second in client.cancel_leftovers(wait=0, cancel_timeout=5)
    assert second not in server.running


def test_without_a_home_no_folder_gets_a_tilde_as_its_name(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwd = pytest.importorskip("pwd")

    def nobody(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with CloreClient(server.key, 5, 0.01, base_url=server.url, order_lag=LAG) as client:
        with client.rent("4090", **RENT):
            assert not list(here.iterdir())
        client.leftovers(wait=0)
    assert not list(here.iterdir())
    assert server.running == []


def test_one_api_has_one_rate_limit_for_all_spellings(server: FaultServer) -> None:
    spellings = [
        f"{scheme}://{host}:{server.port}{slash}"
        for scheme, host, slash in (
            ("http", "127.0.0.1", ""),
            ("http", "localhost", ""),
            ("HTTP", "127.0.0.1", ""),
            ("http", "LOCALHOST", "/"),
        )
    ]
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(client_for(server, base_url=url, rate_limit=0.2))
            for url in spellings
        ]
        for client in clients:
            client.get_wallets()
    arrivals = [request.at for request in server.requests]
    assert len(arrivals) == len(clients)
    assert all(b - a > 0.1 for a, b in itertools.pairwise(arrivals))
