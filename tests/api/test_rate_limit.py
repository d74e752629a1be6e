"""The rate limit of a key: intervals, order, cancels first, and pauses for all."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from clore_client import CloreClient, RateLimitError
from clore_client.api.limiters import FileStore, dump, limiter_for, load
from clore_client.api.rate_limit import (
    LONGEST_SLEEP,
    NotSentError,
    PollResult,
    ProcessStore,
    RateLimiter,
    Schedule,
    Turn,
)
from clore_client.api.redis_limit import (
    REDIS_RULES,
    REDIS_SCRIPT,
    RedisStore,
    _numbers,
    redis_server,
)
from clore_client.api.retry import backoff_delay
from clore_client.rental.signals import next_item
from tests.api.redis_server import redis_process
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


Limiter = Callable[[], RateLimiter]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_process(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(params=["memory", "file", "redis"])
def limiter(request: pytest.FixtureRequest, tmp_path: Path) -> Limiter:
    """Make a limiter. All limiters of a test share one schedule."""
    if request.param == "memory":
        one = RateLimiter(ProcessStore())
        return lambda: one
    if request.param == "file":
        return lambda: RateLimiter(FileStore(tmp_path / "limit"))
    server = redis_server(request.getfixturevalue("redis_url"), "url")
    return lambda: RateLimiter(RedisStore(server, str(tmp_path)))


@contextmanager
def granted(
    limit: RateLimiter,
    interval: float,
    *,
    deadline: float = math.inf,
    not_before: float = -math.inf,
    **options: Any,
) -> Iterator[Turn]:
    """Wait for a send time; the block is the request, which is sent at its beginning."""
    turn = Turn(interval, **options)
    turn.not_before = not_before
    limit.wait(turn, deadline)
    limit.sent(turn)
    yield turn


def paused(limit: RateLimiter, seconds: float) -> None:
    limit.refused(Turn(0), seconds)


def gaps(times: list[float]) -> list[float]:
    ordered = sorted(times)
    return [b - a for a, b in itertools.pairwise(ordered)]


def test_two_clients_and_eight_threads_keep_the_rate_limit(make_sim: MakeSim) -> None:
    sim = make_sim(rate_limit=0.025)  # half: a busy machine may count a request late
    clients = [client_for(sim, rate_limit=0.05), client_for(sim, rate_limit=0.05)]
    together(*[lambda n=n: [clients[n % 2].get_wallets() for _ in range(3)] for n in range(8)])
    assert len(sim.requests) == 24
    assert {call.status for call in sim.requests} == {200}
    assert min(gaps([call.arrived for call in sim.requests])) >= 0.025


def test_keys_and_base_urls_have_a_pace_of_their_own(sim: Simulator, make_sim: MakeSim) -> None:
    assert limiter_for("http://u", "a", None) is limiter_for("http://u", "a", None)
    assert len({id(limiter_for(f"http://{u}", k, None)) for u in "uv" for k in "ab"}) == 4
    other_key = client_for(sim, api_key=sim.add_key(), rate_limit=30)
    other_url = client_for(make_sim(), rate_limit=30)
    for client in (client_for(sim, rate_limit=30), other_key, other_url):
        started = time.monotonic()
        client.get_wallets()
        assert time.monotonic() - started < 15


def test_create_orders_are_spaced(make_sim: MakeSim) -> None:
    sim = make_sim(create_order_interval=0.1)
    client = client_for(sim, create_order_interval=0.2)
    ids = [server["id"] for server in client.find_servers("RTX 4090")[:3]]
    for server_id in ids:
        client.create_order(server_id)
    calls = sent_to(sim, "create_order")
    assert [call.code for call in calls] == [0, 0, 0]
    assert min(gaps([call.arrived for call in calls])) >= 0.1


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.002, 0.004]), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_no_two_requests_are_closer_than_their_intervals(
    wanted: list[tuple[float, bool, bool]],
) -> None:
    """Invariant: two sends are apart by the larger of their intervals, and no request is lost."""
    limit = RateLimiter(ProcessStore())
    left: list[tuple[float, float, bool]] = []
    lock = threading.Lock()

    def send(interval: float, urgent: bool, spaced: bool) -> None:
        spacing = ("create_order", 0.006) if spaced else None
        turn = Turn(interval, urgent=urgent, spacing=spacing)
        limit.wait(turn)
        with lock:
            left.append((turn.sent_at, interval, spaced))

    together(*[lambda w=w: send(*w) for w in wanted])
    assert len(left) == len(wanted)
    left.sort()
    for (a, x, _), (b, y, _) in itertools.pairwise(left):
        assert b - a >= max(x, y) - 1e-9
    spaced = [at for at, _, s in left if s]
    assert all(gap >= 0.006 - 1e-9 for gap in gaps(spaced))


class Game:
    """Requests of several processes with one schedule, and a clock that the test moves."""

    def __init__(self, client: Any) -> None:
        self.now = 1000.0
        self.schedule = Schedule()
        self.client = client
        if client is not None:
            client.flushdb()
        self.turns: dict[int, Turn] = {}
        self.wakes: dict[int, float] = {}  # of those that wait and live
        self.send_times: list[tuple[float, int]] = []

    def start(self, number: int, urgent: bool) -> None:
        turn = self.turns[number] = Turn(1.0, urgent=urgent)
        turn.arrived = self.now
        self.wakes[number] = self.now
        self.run_until(self.now)

    def poll(self, turn: Turn) -> PollResult:
        if self.client is None:
            result = self.schedule.poll(turn, self.now)
            self.schedule = load(dump(self.schedule), self.now)  # as another process finds it
            return result
        script = REDIS_SCRIPT.replace("redis.call('TIME')", "{ARGV[4], 0}")
        numbers = _numbers(turn, self.now)
        reply = self.client.eval(script, 1, "game", "poll", numbers, REDIS_RULES, self.now)
        granted, seconds, *_ = map(float, reply)
        return PollResult(bool(granted), self.now + seconds, 0.0)

    def run_until(self, end: float) -> None:
        """Let each request poll again at its time."""
        while self.wakes and min(self.wakes.values()) <= end:
            number = min(self.wakes, key=lambda n: self.wakes[n])
            self.now = max(self.now, self.wakes[number])
            result = self.poll(self.turns[number])
            if result.granted:
                self.send_times.append((result.at, number))
                del self.wakes[number]
            else:
                self.wakes[number] = min(result.at, self.now + LONGEST_SLEEP)
        self.now = max(self.now, end)


@pytest.mark.parametrize("kept", ["file", "redis"])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["read", "cancel", "kill", "tick"]), st.integers(0, 9)),
        max_size=60,
    )
)
@settings(max_examples=200, deadline=None)
def test_interleavings_with_kills(redis_url: str, kept: str, steps: list[tuple[str, int]]) -> None:
    """Invariants: no two send times within an interval, no stall for more than two, and nobody who
    lives is lost; where nobody dies, in order of arrival, cancels first."""
    game = Game(redis.Redis.from_url(redis_url) if kept == "redis" else None)
    if kept == "redis":
        game.now += 1  # a new schedule in Redis lets the first request wait
    for number, (step, which) in enumerate(steps):
        if step in ("read", "cancel"):
            game.run_until(game.now + 0.001)
            game.start(number, step == "cancel")
        elif step == "kill" and game.wakes:
            del game.wakes[sorted(game.wakes)[which % len(game.wakes)]]
        else:
            game.run_until(game.now + 0.1 * which)
    waiting = sorted(game.wakes, key=lambda n: (not game.turns[n].urgent, n))
    granted = len(game.send_times)
    end = game.now
    game.run_until(end + 3.0 * (len(waiting) + 2))
    assert not game.wakes
    served = [number for _, number in game.send_times[granted:]]
    died = any(step == "kill" for step, _ in steps)
    assert (sorted(served) == sorted(waiting)) if died else (served == waiting)
    times = [at for at, _ in game.send_times]
    assert all(gap >= 1.0 - 1e-5 for gap in gaps(times))
    assert all(gap <= 2.1 for gap in gaps([end, *times[granted:]]))


def in_line(limit: RateLimiter, name: str, order: list[str], **options: Any) -> threading.Thread:
    """A thread that waits for a send time, and records when it gets it."""

    def wait() -> None:
        with granted(limit, 0.05, **options):
            order.append(name)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.02)
    return thread


def test_a_waiting_cancel_overtakes_waiting_reads(make_sim: MakeSim) -> None:
    sim = make_sim(rate_limit=0)
    client = client_for(sim, rate_limit=0.2)
    order = client.create_order(client.find_servers("RTX 4090")[0]["id"])
    seen = len(sim.requests)
    reads = [threading.Thread(target=client.get_wallets) for _ in range(8)]
    for thread in reads:
        thread.start()
    time.sleep(0.05)
    client.cancel_order(order["order_id"])
    for thread in reads:
        thread.join()
    # Without priority it is the last. Its exact place depends on how busy the machine is.
    assert sim.requests[-1].endpoint != "cancel_order"
    assert len(sim.requests) == seen + 9


def test_one_that_is_spaced_lets_others_pass(limiter: Limiter) -> None:
    order = list[str]()
    with granted(limiter(), 0.0, spacing=("create_order", 1.5)):
        pass
    threads = [in_line(limiter(), "create", order, spacing=("create_order", 1.5))]
    threads.append(in_line(limiter(), "read", order))
    for thread in threads:
        thread.join(10)
    assert order == ["read", "create"]


def test_waiters_poll_again_after_a_pause(limiter: Limiter) -> None:
    order = list[str]()
    with granted(limiter(), 0.1):
        pass
    started = time.monotonic()
    thread = in_line(limiter(), "a", order)
    paused(limiter(), 0.4)
    thread.join(10)
    assert time.monotonic() - started >= 0.4


def test_a_pause_over_the_patience_is_an_error_for_everybody(limiter: Limiter) -> None:
    caught = list[float]()
    with granted(limiter(), 0.5):
        pass

    def wait() -> None:
        with pytest.raises(NotSentError) as error, granted(limiter(), 0.5, patience=60):
            pass
        caught.append(error.value.pause or 0.0)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    paused(limiter(), 3000)
    thread.join(5)
    assert 60 < caught[0] <= 3600
    with pytest.raises(NotSentError), granted(limiter(), 0, patience=60):
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


def test_a_deadline_ends_the_waiting(limiter: Limiter) -> None:
    with granted(limiter(), 2):  # with Redis, the first one waits, too
        pass
    with pytest.raises(NotSentError), granted(limiter(), 2, deadline=time.monotonic() + 0.2):
        pass


def test_urgent_requests_leave_whatever_the_server_asks_for(limiter: Limiter) -> None:
    paused(limiter(), 3600)
    with granted(limiter(), 0.02, urgent=True):
        pass
    with pytest.raises(NotSentError), granted(limiter(), 0.02, patience=60):
        pass


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
    limit = RateLimiter(ProcessStore())
    for _ in range(3000):
        with granted(limit, 3e-6):
            pass


def poll_new_queues() -> None:
    for _ in range(20_000):
        assert next_item(queue.SimpleQueue(), 3e-6) is None


@pytest.mark.parametrize("work", [take_short_turns, poll_new_queues])
def test_short_waits_come_to_an_end(work: Callable[[], None]) -> None:
    """On a busy machine the time of a wait can be over before the wait begins."""
    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
