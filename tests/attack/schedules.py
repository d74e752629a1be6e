"""Random schedules of purchases, cancels and faults, checked against the fault server."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clore_client import CloreClient, CloreError, Order
from tests.attack.clients import LAG, Watchdog, client_for, unaccounted
from tests.attack.fault_server import FaultServer
from tests.attack.ledger import FIRST_SERVER, RATES, LedgerOrder

SERVERS = 3
TIMEOUT = 0.2  # seconds for a request; one that never ends takes three times as long
CLIENT: dict[str, Any] = {
    "timeout": TIMEOUT,
    "rate_limit": 0.002,
    "create_order_interval": 0.002,
    "backoff": 0.005,
    "max_backoff": 0.1,
    "rate_limit_wait": 2.0,
    "max_response_mb": 1,
    "order_lag": LAG,
}
RENT: dict[str, Any] = {
    "attempts": 2,
    "poll_interval": 0.02,
    "find_timeout": 0.3,
    "deploy_timeout": 0.5,
    "cancel_timeout": 1.2,
}
# Seconds after which a call counts as hanging: three times the longest allowed time.
LONGEST = {"read": 15.0, "watch": 8.0, "create": 20.0, "cancel": 25.0, "cancel_all": 30.0}
LONGEST |= {"bid": 25.0, "rent": 60.0, "wait": 8.0}

# The weight of each kind.
ENDPOINTS = {
    "my_orders": 5,
    "create_order": 4,
    "cancel_order": 4,
    "cancel_orders": 1,
    "marketplace": 1,
    "wallets": 1,
    "spot_marketplace": 1,
    "set_spot_price": 1,
}
STEPS = {
    "create": 2,
    "rent": 3,
    "cancel": 3,
    "cancel_all": 1,
    "bid": 1,
    "watch": 1,
    "read": 1,
    "wait": 1,
}


class Boom(Exception):  # noqa: N818 - that is what it does
    """An exception of the block of a rental."""


@dataclass
class Verdict:
    """The result of one schedule.

    Attributes:
        seed: the seed, to run it again.
        steps: the calls and their results, in order.
        wrong: the violations.
    """

    seed: int
    steps: list[str]
    wrong: list[str]


def drawn(dice: random.Random, weights: dict[str, int], count: int) -> list[str]:
    """Draw some names at random, by weight."""
    return dice.choices(list(weights), list(weights.values()), k=count)


def random_fault(dice: random.Random, endpoint: str) -> tuple[str, dict[str, Any]]:
    """Choose a fault of an endpoint."""
    pauses = (None, None, 0.05, 0.3, 3600) if dice.random() < 0.2 else (None, 0.05)
    choices: list[tuple[str, dict[str, Any]]] = [
        ("slow", {"delay": dice.uniform(0.01, TIMEOUT * 1.3)}),
        (dice.choice(("drip", "drip_headers", "endless_continue")), {}),
        ("early_hints", {"delay": dice.choice((0.0, 0.1)), "status": dice.choice((200, 502))}),
        ("late_early_hints", {"delay": dice.uniform(0.0, 0.03)}),
        ("extra_answer", {"delay": dice.choice((0.0, 0.0, 0.02))}),
        ("huge", {"mb": 1.2}),
        (dice.choice(("bad_status_line", "bad_chunk_size")), {}),
        ("wrong_length", {"by": dice.choice((-3, 40))}),
        ("reset", {}),
        ("half", {}),
        ("page", {"status": dice.choice((502, 503, 520))}),
        ("too_fast", {"retry_after": dice.choice(pauses)}),
        ("refuse", {"code": 1, "status": dice.choice((200, 500))}),
        ("hang", {}),
    ]
    if endpoint == "cancel_order":
        choices.append(("refuse", {"code": 6}))
    if endpoint == "create_order":
        choices.append(("refuse", {"code": 1, "status": dice.choice((200, 500))}))
    return dice.choice(choices)


class Schedule:
    """One account, one client, and some steps, which the seed determines."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.verdict = Verdict(seed, [], [])
        self.returned: set[int] = set()  # ids that create_order or rent() returned
        self.doubtful: set[int] = set()  # ids of orders that were made, but not returned
        self.server: FaultServer
        self.client: CloreClient

    def run(self) -> Verdict:
        """Run all steps."""
        dice = self.dice
        settings: dict[str, Any] = {
            "servers": SERVERS,
            "visible_after": dice.choice((0.0, 0.02, 0.1)),
            "cancel_lingers": dice.choice((0.0, 0.02, 0.1)),
            "deploy_after": dice.choice((0.0, 0.05, 0.05, 10.0)),
            "clock_offset": dice.choice((0.0, 0.0, -30.0, 30.0)),
            "show_ended": dice.random() < 0.9,
            "unknown_code": dice.choice((6, 2)),
            "send_date": dice.random() < 0.9,
        }
        self.verdict.steps.append(f"  settings: {settings}")
        names = [dice.choice(("create", "rent")), *drawn(dice, STEPS, dice.randint(2, 4))]
        with tempfile.TemporaryDirectory() as folder, FaultServer(**settings) as self.server:
            with client_for(self.server, Path(folder), **CLIENT) as self.client:
                for name in names:
                    self.step(name)
                    if self.server.stopped:
                        return self.verdict
                self.server.calm()
                self.client.close()  # an extra response may be on its way
                self.step("clean")
        return self.verdict

    def actions(self) -> dict[str, Callable[[], str]]:
        """Return the possible steps, with their weights."""
        return {
            "create": self.create,
            "rent": self.rent,
            "cancel": self.cancel,
            "cancel_all": self.cancel_all,
            "bid": self.bid,
            "watch": self.watch,
            "read": self.read,
            "wait": self.wait,
        }

    def step(self, name: str) -> None:
        """Run one step, with a time limit."""
        if name != "clean":
            self.arrange_faults()
        action = self.clean if name == "clean" else self.actions()[name]
        started = time.monotonic()
        try:
            with Watchdog(self.server, LONGEST.get(name, 60.0)):
                outcome = action()
        except AssertionError as error:
            self.wrong(f"{name}: {error}")
            outcome = "hung"
        except Exception as error:
            self.wrong(f"{name} raised {error!r}")
            outcome = type(error).__name__
        seconds = time.monotonic() - started
        self.verdict.steps.append(f"{name}: {outcome} ({seconds:.2f} s)")

    def wrong(self, text: str) -> None:
        self.verdict.wrong.append(text)

    def arrange_faults(self) -> None:
        dice = self.dice
        if dice.random() < 0.5:
            self.server.calm()
        for _ in range(dice.choice((0, 1, 2, 3, 4))):
            (endpoint,) = drawn(dice, ENDPOINTS, 1)
            kind, options = random_fault(dice, endpoint)
            times, skip = dice.choice((1, 1, 1, 2, 3, 30)), dice.choice((0, 0, 1, 2))
            commit = dice.random() < 0.5 and kind != "too_fast"  # a 429 is a real refusal
            self.server.fault(endpoint, kind, times, skip=skip, commit=commit, **options)
            told = f"{endpoint} {kind} x{times} after {skip}, commit={commit} {options}"
            self.verdict.steps.append(f"  fault: {told}")
        if dice.random() < 0.3:
            # Shorter than the lag of the lists, as a client takes a longer absence for the end.
            skip, lists = dice.randint(0, 6), dice.randint(1, 6)
            self.server.flap(lists, skip=skip, seconds=LAG / 2)
            self.verdict.steps.append(f"  flap: {lists} lists after {skip}")

    def called(self, call: Callable[[], Any]) -> tuple[Any, CloreError | None]:
        """Call a function; return its result, or the error of the package that it raised."""
        try:
            return call(), None
        except CloreError as error:
            return None, error

    # --- the steps ---

    def judge_purchases(self, made: list[LedgerOrder], given: Order | None, at_most: int) -> None:
        """Check the orders that were made against those that were returned."""
        servers = [order.server_id for order in made]
        if len(made) > at_most or len(set(servers)) != len(servers):
            self.wrong(f"{len(made)} orders were made, on servers {servers}")
        self.doubtful |= {order.id for order in made}
        if given is None:
            return
        number = given.id or 0
        if number not in self.doubtful:
            self.wrong(f"order {number} was given for one that was not made for it")
        if all((o.id, o.server_id) != (number, given.server_id) for o in self.server.orders):
            self.wrong(f"there is no order {number} of server {given.server_id}")
        self.doubtful.discard(number)
        self.returned.add(number)

    def create(self) -> str:
        """Order a server."""
        before, dice = len(self.server.orders), self.dice
        server_id = FIRST_SERVER + dice.randrange(SERVERS)
        bid: dict[str, Any] = (
            {"order_type": "spot", "spot_price": 0.08} if dice.random() < 0.3 else {}
        )
        order, error = self.called(
            lambda: self.client.create_order(server_id, find_timeout=0.3, **bid)
        )
        made = self.server.orders[before:]
        self.judge_purchases(made, order, 1)
        if made and error is not None and error.retryable:
            self.wrong(f"an order was made, and the purchase may be repeated, says {error!r}")
        return f"server {server_id}: {outcome_of(order and order.id, error)}"

    def rent(self) -> str:
        """Rent a server for a block, which may fail."""
        before, dice, started = len(self.server.orders), self.dice, time.monotonic()
        pause, boom, spot = dice.uniform(0, 0.1), dice.random() < 0.2, dice.random() < 0.2
        given: list[Order] = []

        def block() -> None:
            with self.client.rent("4090", use_spot=spot, **RENT) as rental:
                given.append(rental.order)
                time.sleep(pause)
                if boom:
                    raise Boom("the block failed")

        error: BaseException | None = None
        try:
            block()
        except (CloreError, Boom) as raised:
            error = raised
        made = self.server.orders[before:]
        self.judge_purchases(made, given[0] if given else None, RENT["attempts"])
        for text in unaccounted(self.server, self.client, error, since=started):
            self.wrong(text)
        return outcome_of([order.id for order in given], error)

    def cancel(self) -> str:
        """Cancel an order, which may have ended."""
        dice = self.dice
        ids = self.server.running or [order.id for order in self.server.orders]
        if not ids:
            return "none"
        order_id, confirm = dice.choice(ids), dice.random() < 0.5
        done, error = self.called(
            lambda: self.client.cancel_order(
                order_id, confirm=confirm, confirm_timeout=1, settle_timeout=0.3
            )
        )
        if done and order_id in self.server.running:
            self.wrong(f"cancel_order({order_id}) returned True, and it runs")
        return f"order {order_id}, confirm={confirm}: {outcome_of(done, error)}"

    def cancel_all(self) -> str:
        """Cancel all orders of the account."""
        confirm = self.dice.random() < 0.5
        ids, error = self.called(lambda: self.client.cancel_all(confirm=confirm, confirm_timeout=1))
        left = sorted(set(ids or ()) & set(self.server.running))
        if left:
            self.wrong(f"cancel_all() returned {ids}, of which {left} run")
        return outcome_of(ids, error)

    def bid(self) -> str:
        """Change a bid."""
        orders = [order for order in self.server.orders if order.active and order.spot]
        if not orders:
            return "none"
        order, price = self.dice.choice(orders), self.dice.uniform(0.07, 0.12)
        done, error = self.called(lambda: self.client.set_spot_price(order.id, price))
        per_day = price * 24 / RATES[order.currency]
        if done and abs(order.price - per_day) > 1e-3 * per_day:
            self.wrong(f"set_spot_price({order.id}) returned True, and was not carried out")
        return f"order {order.id}: {outcome_of(done, error)}"

    def watch(self) -> str:
        """Wait for an order for a moment."""
        ids = [order.id for order in self.server.orders] or [1]
        order_id = self.dice.choice(ids)
        order, error = self.called(
            lambda: self.client.wait_for_order(order_id, timeout=0.3, poll_interval=0.02)
        )
        return f"order {order_id}: {outcome_of(order and order.status, error)}"

    def read(self) -> str:
        """Read the orders."""
        completed = self.dice.random() < 0.5
        orders, error = self.called(lambda: self.client.get_orders(completed))
        known = {(order.id, order.server_id) for order in self.server.orders}
        strangers = {(order.id, order.server_id) for order in orders or ()} - known
        if strangers:
            self.wrong(f"get_orders() lists {strangers}, which nobody made")
        return outcome_of(None if orders is None else len(orders), error)

    def wait(self) -> str:
        """Let time pass."""
        time.sleep(self.dice.uniform(0, 0.15))
        return "done"

    def clean(self) -> str:
        """Cancel all orders, which must work without faults."""
        ledger = self.server.ledger
        ledger.show_ended = True  # otherwise a cancel without a response has an unknown outcome
        time.sleep(ledger.visible_after + ledger.cancel_lingers)
        self.client.cancel_all(confirm_timeout=10)
        if self.server.running:
            self.wrong(f"cancel_all() has left {self.server.running}")
        return "done"


def outcome_of(value: Any, error: BaseException | None) -> str:
    """Return the outcome of a call as one line."""
    if error is None:
        return repr(value)
    return f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"


def run_many(count: int, first_seed: int, threads: int = 24) -> Iterator[Verdict]:
    """Run the schedules of ``count`` seeds from ``first_seed`` on, several at once."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(
            lambda seed: Schedule(seed).run(), range(first_seed, first_seed + count)
        )


def report(verdict: Verdict) -> str:
    """Return a text with the violations of a schedule, and how to run it again."""
    lines = [f"seed {verdict.seed} (python -m tests.attack --seed {verdict.seed})"]
    lines += [f"  wrong: {text}" for text in verdict.wrong]
    lines += [f"    {step}" for step in verdict.steps]
    return "\n".join(lines)
