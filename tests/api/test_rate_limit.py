"""The pace: between all departures of a key, in order, cancels first, and pushed back together."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clore_client import CloreClient, RateLimitError
from clore_client.api.rate_limit import (
    DeadlinePassedError,
    PushedBackError,
    RateLimit,
    Turn,
    rate_limit_for,
)
from clore_client.api.request import backoff_delay
from clore_client.rental.handoff import next_item
from tests.conftest import MakeSim, client_for, sent_to
from tests.variant import Simulator


def together(*calls: Callable[[], Any]) -> None:
    """Run the calls in threads, and raise what they raise."""
    errors: list[BaseException] = []

    def run(call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


@contextmanager
def slot(
    rate_limit: RateLimit, interval: float, *, deadline: float = math.inf, **options: Any
) -> Iterator[Turn]:
    """Wait for a slot; the block is the request, which leaves at its end at the latest."""
    turn = rate_limit.turn(interval, **options)
    with turn.held:
        rate_limit.wait(turn, deadline)
        yield turn
        rate_limit.left(turn)


def gaps(times: list[float]) -> list[float]:
    ordered = sorted(times)
    return [b - a for a, b in itertools.pairwise(ordered)]


def test_two_clients_and_eight_threads_keep_the_pace(make_sim: MakeSim) -> None:
    sim = make_sim(rate_limit=0.045)
    clients = [client_for(sim, rate_limit=0.05), client_for(sim, rate_limit=0.05)]
    together(*[lambda n=n: [clients[n % 2].get_wallets() for _ in range(3)] for n in range(8)])
    assert len(sim.requests) == 24
    assert {call.status for call in sim.requests} == {200}
    assert min(gaps([call.arrived for call in sim.requests])) >= 0.045


def test_keys_and_base_urls_have_a_pace_of_their_own(sim: Simulator, make_sim: MakeSim) -> None:
    assert rate_limit_for("http://u", "a") is rate_limit_for("http://u", "a")
    assert len({id(rate_limit_for(f"http://{u}", k)) for u in "uv" for k in "ab"}) == 4
    other_key = client_for(sim, api_key=sim.add_key(), rate_limit=30)
    other_url = client_for(make_sim(), rate_limit=30)
    for client in (client_for(sim, rate_limit=30), other_key, other_url):
        started = time.monotonic()
        client.get_wallets()
        assert time.monotonic() - started < 15


def test_create_orders_are_spaced(make_sim: MakeSim) -> None:
    sim = make_sim(create_order_interval=0.18)
    client = client_for(sim, create_order_interval=0.2)
    ids = [server["id"] for server in client.find_servers("RTX 4090")[:3]]
    for server_id in ids:
        client.create_order(server_id)
    calls = sent_to(sim, "create_order")
    assert [call.code for call in calls] == [0, 0, 0]
    assert min(gaps([call.arrived for call in calls])) >= 0.18


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.002, 0.004]), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_no_two_departures_are_closer_than_their_intervals(
    wanted: list[tuple[float, bool, bool]],
) -> None:
    """Invariant: between neighbours lies the larger of their two intervals, and nobody is lost."""
    limit = RateLimit()
    left: list[tuple[float, float, bool]] = []
    lock = threading.Lock()

    def send(interval: float, urgent: bool, spaced: bool) -> None:
        spacing = ("create_order", 0.006) if spaced else None
        with slot(limit, interval, urgent=urgent, spacing=spacing) as turn:
            with lock:
                left.append((time.monotonic(), interval, spaced))
            limit.left(turn)

    together(*[lambda w=w: send(*w) for w in wanted])
    assert len(left) == len(wanted)
    left.sort()
    for (a, x, _), (b, y, _) in itertools.pairwise(left):
        assert b - a >= max(x, y) - 1e-4
    spaced = [at for at, _, s in left if s]
    assert all(gap >= 0.006 - 1e-4 for gap in gaps(spaced))


def waiting(limit: RateLimit) -> list[Turn]:
    return [turn for turn in limit._waiting if turn.held.locked()]


def in_line(limit: RateLimit, name: str, order: list[str], **options: Any) -> threading.Thread:
    """A thread that waits for a slot, and says so when it has it."""

    def wait() -> None:
        with slot(limit, 0.05, **options):
            order.append(name)

    before = len(waiting(limit))
    thread = threading.Thread(target=wait)
    thread.start()
    while len(waiting(limit)) == before and thread.is_alive():
        time.sleep(0.001)
    return thread


def test_slots_go_in_order_and_cancels_first() -> None:
    limit, order = RateLimit(), list[str]()
    with slot(limit, 0.3):
        pass
    threads = [in_line(limit, name, order) for name in ("a", "b", "c")]
    threads.append(in_line(limit, "cancel", order, urgent=True))
    for thread in threads:
        thread.join(10)
    assert order == ["cancel", "a", "b", "c"]


def test_a_waiting_cancel_overtakes_waiting_reads(make_sim: MakeSim) -> None:
    sim = make_sim(rate_limit=0)
    client = client_for(sim, rate_limit=0.2)
    order = client.create_order(client.find_servers("RTX 4090")[0]["id"])
    seen = len(sim.requests)
    reads = [threading.Thread(target=client.get_wallets) for _ in range(4)]
    for thread in reads:
        thread.start()
    time.sleep(0.05)
    client.cancel_order(order["order_id"])
    for thread in reads:
        thread.join()
    assert "cancel_order" in [call.endpoint for call in sim.requests[seen:]][:2]


def test_one_that_is_spaced_lets_others_pass() -> None:
    limit, order = RateLimit(), list[str]()
    with slot(limit, 0.0, spacing=("create_order", 0.5)):
        pass
    threads = [in_line(limit, "create", order, spacing=("create_order", 0.5))]
    threads.append(in_line(limit, "read", order))
    for thread in threads:
        thread.join(10)
    assert order == ["read", "create"]


def test_waiters_look_again_after_a_push_back() -> None:
    limit, order = RateLimit(), list[str]()
    with slot(limit, 0.1):
        pass
    started = time.monotonic()
    thread = in_line(limit, "a", order)
    limit.push_back(0.4)
    thread.join(10)
    assert time.monotonic() - started >= 0.4


def test_a_long_push_back_is_an_error_for_everybody() -> None:
    limit, caught = RateLimit(), list[float]()
    with slot(limit, 0.5):
        pass

    def wait() -> None:
        with pytest.raises(PushedBackError) as error, slot(limit, 0.5):
            pass
        caught.append(error.value.seconds)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    limit.push_back(1e9)
    thread.join(5)
    assert 60 < caught[0] <= 3600
    with pytest.raises(PushedBackError), slot(limit, 0):
        pass


def test_retry_after_holds_for_all_and_over_60_s_is_an_error(
    sim: Simulator, client: CloreClient
) -> None:
    sim.faults.add("wallets", "rate_limit", retry_after=0.3)
    started = time.monotonic()
    together(client.get_wallets, client.get_orders)
    assert time.monotonic() - started >= 0.3
    sim.faults.add("wallets", "rate_limit", retry_after=3600)
    seen = len(sim.requests)
    for _ in range(2):
        with pytest.raises(RateLimitError) as caught:
            client.get_wallets()
        assert 3000 < (caught.value.retry_after or 0) <= 3600
        assert caught.value.retryable
    assert len(sim.requests) == seen + 1
    client_for(sim, api_key=sim.add_key()).get_wallets()


def test_retry_after_as_a_date_counts_from_the_answers_date(make_sim: MakeSim) -> None:
    from email.utils import formatdate

    sim = make_sim(clock_offset=-5e6)
    client = client_for(sim)
    when = formatdate(time.time() - 5e6 + 1000, usegmt=True)
    sim.faults.add("wallets", "rate_limit", retry_after=when)
    with pytest.raises(RateLimitError) as caught:
        client.get_wallets()
    assert caught.value.retry_after == pytest.approx(1000, abs=30)


def test_a_deadline_ends_the_waiting() -> None:
    limit = RateLimit()
    with slot(limit, 30):
        pass
    with pytest.raises(DeadlinePassedError), slot(limit, 30, deadline=time.monotonic() + 5):
        pass
    assert not waiting(limit)


@pytest.mark.parametrize("granted", [False, True])
def test_a_turn_that_nobody_holds_is_skipped(granted: bool) -> None:
    """As an interrupt leaves it, at any line between waiting and leaving."""
    limit = RateLimit()
    with slot(limit, 0.02):
        pass
    turn = limit.turn(0.02, urgent=True)
    with turn.held:
        if granted:
            limit.wait(turn)
        else:
            limit._waiting.append(turn)
    started = time.monotonic()
    with slot(limit, 0.02):
        pass
    assert time.monotonic() - started < 5
    assert not waiting(limit)


def test_urgent_requests_leave_whatever_the_server_asks_for() -> None:
    limit = RateLimit()
    limit.push_back(3600)
    with slot(limit, 0.02, urgent=True):
        pass
    with pytest.raises(PushedBackError), slot(limit, 0.02):
        pass


def test_a_request_that_does_not_leave_holds_nobody_up_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clore_client.api.rate_limit.CONNECT_PATIENCE", 0.2)
    limit, order = RateLimit(), list[str]()
    with slot(limit, 0.01):
        thread = in_line(limit, "cancel", order, urgent=True)
        thread.join(10)
        assert order == ["cancel"]


@given(
    st.integers(1, 10_000),
    st.floats(min_value=0, max_value=100),
    st.floats(min_value=0, max_value=1000),
)
def test_backoff_is_capped_and_jittered_from_zero(sends: int, first: float, longest: float) -> None:
    """Invariant: between 0 and the smaller of the cap and first * 2 ** (sends - 1)."""
    bound = min(longest, first * 2.0 ** min(sends - 1, 32))
    assert all(0 <= backoff_delay(sends, first, longest) <= bound for _ in range(5))


def test_backoff_spreads_over_the_whole_range() -> None:
    delays = [backoff_delay(3, 1.0, 30.0) for _ in range(2000)]
    assert min(delays) < 0.2
    assert max(delays) > 3.8


def take_short_turns() -> None:
    limit = RateLimit()
    for _ in range(3000):
        with slot(limit, 3e-6):
            pass


def look_into_new_queues() -> None:
    for _ in range(20_000):
        assert next_item(queue.SimpleQueue(), 3e-6) is None


@pytest.mark.parametrize("work", [take_short_turns, look_into_new_queues])
def test_short_waits_come_to_an_end(work: Callable[[], None]) -> None:
    """On a busy machine the time of a wait can be over before the wait begins."""
    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
