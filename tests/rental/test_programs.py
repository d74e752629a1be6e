"""Random programs under random faults, checked against the state of the simulator.

Invariants: orders made <= orders intended; each create_order that returned names an order that
exists, and that of no other call; after rent() its order is not active, or an error says so; no
wait exceeds its deadline by more than one request; requests respect the rate limit.
CLORE_PROGRAMS=10000 runs as many programs.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clore_client import CloreClient, CloreError
from tests.variant import Simulator, inside

PROGRAMS = int(os.environ.get("CLORE_PROGRAMS", "60"))
LIMIT = 0.002
EXCHANGE = 0.1  # seconds that the client waits for a response
WAIT = 0.05
# The delay that a busy machine may add.
SLACK = 20.0

KINDS = [
    "lose_response",
    "lose_request",
    "hang",
    "hang_after_commit",
    "commit_late",
    "reset_mid_body",
    "http_500_after_commit",
    "http_500_before_commit",
    "html_502",
    "html_403",
    "rate_limit",
    "slow",
    "truncated_json",
    "not_json",
    "no_code",
    "code_1",
]
SECONDS = {"hang": 0.3, "hang_after_commit": 0.3, "commit_late": 0.05, "slow": 0.02}

faults = st.lists(
    st.tuples(
        st.sampled_from(["create_order", "my_orders", "cancel_order", "cancel_orders", "*"]),
        st.sampled_from(KINDS),
        st.integers(1, 4),
    ),
    max_size=6,
)
steps = st.lists(
    st.sampled_from(
        ["create", "create", "cancel", "wait", "cancel_unknown", "cancel_all", "rent", "rent_fails"]
    ),
    min_size=1,
    max_size=5,
)
programs = st.lists(st.tuples(st.integers(0, 2), steps), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def sim() -> Iterator[Simulator]:
    with Simulator(
        servers=60,
        rate_limit=0,
        create_order_interval=0,
        visible_after=(0.0, 0.02),
        deploy_after=0.01,
        cancel_lingers=(0.0, 0.02),
        cancel_ended="refuse",
        ssh=False,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def server_ids(sim: Simulator) -> list[int]:
    plain = [s for s in sim.servers if s.online and not s.rented and len(s.allowed_coins) == 3]
    return [server.id for server in plain]


class Run:
    """One program: what it tried to order, and what it got."""

    def __init__(self, client: CloreClient, is_active: Callable[[int], bool]) -> None:
        self.client = client
        self.is_active = is_active
        self.lock = threading.Lock()
        self.intended = 0
        self.returned: list[int] = []
        self.broken: list[BaseException] = []

    def thread(self, server_id: int, steps: list[str]) -> None:
        mine: list[int] = [7]
        try:
            for step in steps:
                getattr(self, step)(server_id, mine)
        except BaseException as error:
            self.broken.append(error)

    def create(self, server_id: int, mine: list[int]) -> None:
        with self.lock:
            self.intended += 1
        try:
            order = self.client.create_order(server_id, find_timeout=0.3)
        except CloreError:
            return
        mine.append(order["order_id"])
        with self.lock:
            self.returned.append(order["order_id"])

    def rent(self, server_id: int, mine: list[int], fails: bool = False) -> None:
        with self.lock:
            self.intended += 1
        rental = self.client.rent(
            server_id=server_id,
            deploy_timeout=0.2,
            poll_interval=0.005,
            find_timeout=0.3,
            cancel_timeout=0.3,
        )
        order_id, told = None, False
        try:
            with rental:
                order_id = rental.order.id
                with self.lock:
                    self.returned.append(order_id or 0)
                if fails:
                    raise KeyError("of the block")
        except CloreError:
            return
        except KeyError as error:
            told = bool(getattr(error, "__notes__", ()))
        if not told:
            assert order_id is not None
            assert not self.is_active(order_id)

    def rent_fails(self, server_id: int, mine: list[int]) -> None:
        self.rent(server_id, mine, fails=True)

    def cancel(self, server_id: int, mine: list[int]) -> None:
        self.tried(lambda: self.client.cancel_order(mine[-1]))

    def cancel_unknown(self, server_id: int, mine: list[int]) -> None:
        self.tried(lambda: self.client.cancel_order(5))

    def cancel_all(self, server_id: int, mine: list[int]) -> None:
        self.tried(lambda: self.client.cancel_all(confirm_timeout=0.2))

    def wait(self, server_id: int, mine: list[int]) -> None:
        started = time.monotonic()
        self.tried(lambda: self.client.wait_for_order(mine[-1], WAIT, 0.005))
        assert time.monotonic() - started <= WAIT + EXCHANGE + SLACK

    @staticmethod
    def tried(call: Callable[[], Any]) -> None:
        with contextlib.suppress(CloreError):
            call()


@pytest.mark.internal
@given(programs, faults)
@settings(
    max_examples=PROGRAMS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_programs(
    sim: Simulator,
    server_ids: list[int],
    program: list[tuple[int, list[str]]],
    faults: list[tuple[str, str, int]],
) -> None:
    key = sim.add_key(1e6)
    client = CloreClient(
        key,
        base_url=sim.url,
        timeout=EXCHANGE,
        rate_limit=LIMIT,
        create_order_interval=LIMIT,
        backoff=0.001,
        state_dir=None,
    )
    for endpoint, kind, times in faults:
        options = {"seconds": SECONDS[kind]} if kind in SECONDS else {}
        sim.faults.add(endpoint, kind, times, key=key, **options)
    run = Run(client, lambda order_id: sim.order(order_id).active)
    # An earlier test may have got a signal, which would end the rentals of these threads.
    with pytest.MonkeyPatch.context() as patch, client.handle_signals():
        patch.setattr(inside("orders.cancel.SETTLE_TIMEOUT"), 0.2)
        threads = [
            threading.Thread(target=run.thread, args=(server_ids[n], steps)) for n, steps in program
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
    client.close()
    sim.faults.clear(key)
    if run.broken:
        raise run.broken[0]
    time.sleep(0.06 if any(kind == "commit_late" for _, kind, _ in faults) else 0)
    made = [order.id for order in sim.orders_of(key)]
    for order_id in made:
        sim.end_order(order_id)
    assert len(made) <= run.intended
    assert len(run.returned) == len(set(run.returned))
    assert set(run.returned) <= set(made)
    arrived = sorted(call.arrived for call in sim.requests if call.key == key)
    sim.clear_requests()
    if arrived:
        assert arrived[-1] - arrived[0] >= (len(arrived) - 1) * LIMIT * 0.9 - 0.1
