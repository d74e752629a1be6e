"""The order of a rental: how it ends, what it costs, and its budget."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

from clore_client.candidates import CREATION_FEE, CREATION_FEE_AFTER, Wish
from clore_client.errors import (
    BudgetExceededError,
    CloreError,
    FateUnknownError,
    RentalError,
)
from clore_client.giving_back import (
    confirm_gone,
    confirm_until,
    keep_cancelling,
    not_cancelled,
)
from clore_client.log import logger
from clore_client.orders import Order, same_purchase
from clore_client.servers import Server
from clore_client.signals import (
    Shield,
    SignalExit,
    SignalHandling,
    in_main_thread,
    listen,
    stopping_signal,
)
from clore_client.state import Entry, Found, account_digest, read_entries

LONGEST_WATCH = 30.0  # seconds between two looks at the budget: the wall clock may have jumped
FEE_LEAD = 5.0  # seconds before the creation fee is due, when it counts for the budget
LATE_LOOK = 0.5  # seconds between two looks for an order whose making was interrupted

_open_rentals: dict[int, Tenancy] = {}
_open_lock = threading.Lock()
_exiting = [False, False]  # whether it is registered with atexit; whether that has come


class Age:
    """How long something costs money: the larger of two clocks, for a laptop asleep still pays."""

    def __init__(self) -> None:
        self.monotonic = time.monotonic()
        self.wall = time.time()

    def seconds(self) -> float:
        return max(0.0, time.monotonic() - self.monotonic, time.time() - self.wall)


class Tenancy:
    """What a rental holds while it is open. Ends it, whoever asks: block, thread, or exit."""

    def __init__(self, client: Any, wish: Wish, folder: Path | None) -> None:
        self._client = client
        self._wish = wish
        self._folder = folder
        self._pid = os.getpid()
        self._main = False
        self._order: Order | None = None
        self._server: Server | None = None
        self._entry: Entry | None = None
        self._handling: SignalHandling | None = None
        self._sending: int | None = None  # the server whose order is being made
        self._order_id: int | None = None  # what is to be ended
        self._before: set[int] = set()  # active orders that are not ours
        self._age: Age | None = None  # of the order
        self._since: Age | None = None  # of the first order
        self._price: float | None = None  # USD per hour, without fees
        self._accepted = False  # the cancel was
        self._spent = 0.0  # USD, by orders that have ended
        self._kept = False
        self._exceeded: tuple[str, float, float, int | None] | None = None  # why, h, USD, id
        self._signalled: int | None = None
        self._noted: list[BaseException] = []
        self._wake: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._connections: list[Any] = []
        self._shell: Any = None

    @property
    def hours(self) -> float:
        """Hours since the first order of this rental; the larger of both clocks."""
        return self._since.seconds() / 3600.0 if self._since else 0.0

    @property
    def cost_usd(self) -> float:
        """USD that it has cost so far, with all fees and the hosts that did not work.

        By the price of the order, the rate that the listing implied, 5 % (spot: 1.25 %) on top,
        and 0.10 USD from the tenth minute on. It counts from when the order was handed over to be
        sent, and stops when the cancel was accepted.
        """
        return self._spent + self._cost_of(self._age)

    # --- open to others ---

    def _open(self) -> None:
        """Let signals and the interpreter's exit end it, too."""
        self._pid, self._main = os.getpid(), in_main_thread()
        with _open_lock:
            _open_rentals[id(self)] = self
            if not _exiting[0]:
                _exiting[0] = True
                atexit.register(_end_all)
        listen(self, self._on_signal)
        self._handling = SignalHandling()

    def _forget(self) -> None:
        """Nothing is left to be ended by others."""
        with _open_lock:
            _open_rentals.pop(id(self), None)
        listen(self, None)
        if self._handling is not None:
            self._handling.close()

    def _account(self) -> str:
        return account_digest(self._client.BASE_URL, self._client.api_key)

    def _notes_for(self, server_id: int) -> list[Found]:
        """What is noted of this server for this account; each is to be closed."""
        account, notes = self._account(), []
        for entry in read_entries(self._folder):
            facts = entry.facts
            if facts.get("server_id") == server_id and facts.get("account") == account:
                notes.append(entry)
            else:
                entry.close()
        return notes

    # --- the end ---

    def _end(self, confirm: bool = True) -> BaseException | None:
        """End what is open; None when it is gone, else what to tell the user.

        An interrupt never ends the cancel, only the confirmation.
        """
        wish, started = self._wish, time.monotonic()
        with Shield() as shield:
            failure: BaseException | None = None
            try:
                if self._order_id is None and self._sending is not None:
                    failure = self._find_interrupted(shield)
                if self._order_id is not None:
                    failure = self._cancel_and_confirm(
                        shield, started + wish.cancel_timeout, confirm
                    )
            finally:
                self._noted += shield.noted
        return failure

    def _cancel_and_confirm(
        self, shield: Shield, deadline: float, confirm: bool
    ) -> BaseException | None:
        order_id, self._sending = self._order_id or 0, None
        started = time.monotonic()
        if not self._accepted:
            failure = keep_cancelling(
                self._client, order_id, deadline, self._noted.append, lambda: self._accepted
            )
            if failure is not None:
                self._give_up()
                logger.error("order %d could not be cancelled: it may still be running", order_id)
                return not_cancelled(order_id, failure, self._wish.cancel_timeout)
            self._ended()
        self._wake.put("ended")
        if not confirm:
            return None
        unconfirmed: CloreError | None = None
        interrupt: BaseException | None = None
        try:
            shield.let_through()
            if not (shield.noted or self._noted):
                unconfirmed = confirm_gone(
                    self._client, order_id, confirm_until(started, self._wish.cancel_timeout)
                )
            else:
                interrupt = KeyboardInterrupt()
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
            self._noted.append(error)
        finally:
            shield.hold()
        if interrupt is not None:
            logger.warning("order %d was cancelled, which is not confirmed: interrupted", order_id)
            self._give_up()
            self._order_id = None
            return not_confirmed(order_id)
        if unconfirmed is not None:
            logger.error("order %d was cancelled, but may still be running", order_id)
            self._give_up()
            return unconfirmed
        if self._entry is not None:
            self._entry.remove()
            self._entry = None
        self._before.add(order_id)
        self._order_id = None
        return None

    def _ended(self) -> None:
        """The cancel was accepted: from here on it costs nothing."""
        age, self._age, self._accepted = self._age, None, True
        self._spent += self._cost_of(age)

    def _give_up(self) -> None:
        """The order is left to ``leftovers()``."""
        self._order_id = None
        if self._entry is not None:
            self._entry.given_up = True
            self._entry = None

    def _find_interrupted(self, shield: Shield) -> BaseException | None:
        """Look for the order whose making was interrupted; it is then the one to end."""
        server_id, wish = self._sending or 0, self._wish
        logger.warning("broken off while server %d was ordered: looking for the order", server_id)
        deadline = time.monotonic() + wish.find_timeout
        cause: BaseException | None = None
        try:
            shield.let_through()
            while not shield.noted and self._order_id is None:
                try:
                    found = self._ours(self._client.get_orders(), server_id)
                    if found:
                        self._order, self._order_id = found, found.id
                        break
                except CloreError as error:
                    cause = error
                if time.monotonic() >= deadline:
                    break
                time.sleep(min(LATE_LOOK, max(0.0, deadline - time.monotonic())))
        except (KeyboardInterrupt, SystemExit) as error:
            self._noted.append(error)
        finally:
            shield.hold()
        self._sending = None
        if self._order_id is not None:
            if self._entry is not None:
                self._entry.note_order(self._order_id)
            return None
        self._give_up()
        logger.warning("no order of server %d showed up: look at leftovers() later", server_id)
        unknown = FateUnknownError(
            f"an order of server {server_id} may have been made before this was broken off: look "
            "at leftovers() and get_orders() in a minute",
            endpoint="/v1/create_order",
        )
        unknown.__cause__ = cause
        return unknown

    def _ours(self, orders: list[Order], server_id: int) -> Order | None:
        with _open_lock:
            others = {r._order_id for r in _open_rentals.values() if r is not self}
        fitting = [
            order
            for order in orders
            if order.server_id == server_id
            and order.id not in self._before
            and order.id not in others
            and fits_intent(order, self._wish.image, self._wish.currency, self._wish.spot)
        ]
        if len(fitting) != 1:
            return None
        # A rental of another process could be for the same server: hands off.
        held = []
        for entry in self._notes_for(server_id):
            mine = self._entry is not None and entry.path == self._entry.path
            if not mine and not entry.free:
                held.append(entry)
            entry.close()
        return None if held else fitting[0]

    # --- the budget, and signals that come to other threads ---

    def _check(self) -> None:
        """Raise when the rental was ended from elsewhere."""
        if self._pid != os.getpid():
            return
        rented = self._order_id is not None and self._exceeded is None and not self._kept
        if rented and self._exceed():
            self._wake.put("over")  # the watching thread ends it: no network work here
        if self._exceeded is not None:
            raise self._budget_error()
        if self._signalled is None:
            self._signalled = stopping_signal()
        if self._signalled is not None:
            raise SignalExit(self._signalled)
        if _exiting[1]:
            raise RentalError("the interpreter is about to exit: nothing is rented any more")

    def _told_of_budget(self, error: BaseException | None) -> bool:
        return (
            isinstance(error, BudgetExceededError)
            and self._exceeded is not None
            and error.order_id == self._exceeded[3]
        )

    def _cost_of(self, age: Age | None) -> float:
        if age is None:
            return 0.0
        seconds = age.seconds()
        rent = (self._price or 0.0) * (1 + self._wish.fee) * seconds / 3600.0
        return rent + (CREATION_FEE if seconds >= CREATION_FEE_AFTER else 0.0)

    def _exceed(self) -> bool:
        """Whether it is over its budget; from the first time on, that stays so."""
        if self._exceeded is not None:
            return True
        wish, cost, hours = self._wish, self.cost_usd, self.hours
        age = self._age.seconds() if self._age is not None else 0.0
        due = CREATION_FEE if CREATION_FEE_AFTER - FEE_LEAD <= age < CREATION_FEE_AFTER else 0.0
        if wish.max_hours is not None and hours >= wish.max_hours:
            text = f"max_hours={wish.max_hours:g} is over"
        elif wish.max_cost_usd is not None and cost + due >= wish.max_cost_usd:
            text = f"max_cost_usd={wish.max_cost_usd:g} is spent"
        else:
            return False
        self._exceeded = text, hours, cost, self._order_id
        logger.warning("%s", self._budget_error())
        return True

    def _budget_error(self) -> BudgetExceededError:
        text, hours, cost, order_id = self._exceeded or ("", 0.0, 0.0, None)
        # No more than is known: the cancel may take its time, or come too late to be seen here.
        state = "was ended" if self._accepted else "is being ended"
        return BudgetExceededError(
            f"{text}: order {order_id} {state}, after {hours:.4g} h and {cost:.4g} USD",
            order_id=order_id,
            hours=hours,
            cost_usd=cost,
        )

    def _seconds_left(self) -> float | None:
        wish, left = self._wish, [LONGEST_WATCH]
        if wish.max_hours is not None:
            left.append((wish.max_hours - self.hours) * 3600.0)
        if wish.max_cost_usd is not None:
            per_second = (self._price or 0.0) * (1 + wish.fee) / 3600.0
            if per_second:
                left.append((wish.max_cost_usd - self.cost_usd) / per_second)
            if self._age is not None:
                to_fee = CREATION_FEE_AFTER - FEE_LEAD - self._age.seconds()
                if to_fee > 0:
                    left.append(to_fee)
        elif wish.max_hours is None:
            return None
        return max(0.002, min(left))

    def _watch(self, order_id: int, wake: queue.SimpleQueue[str]) -> None:
        """In a thread of its own: end the order when its time has come."""
        while self._pid == os.getpid():
            with contextlib.suppress(queue.Empty):
                wake.get(timeout=self._seconds_left())
            if self._order_id != order_id or self._kept or self._accepted:
                return
            if self._signalled is not None or self._exceed():
                self._end_from_elsewhere(order_id)
                return

    def _end_from_elsewhere(self, order_id: int) -> None:
        """Cancel for as long as it takes, or until the block is left."""
        # Beside the cancel, which may have to wait for an API that is down.
        threading.Thread(target=self._close_ssh, name="clore-rental-close", daemon=True).start()
        failure = keep_cancelling(
            self._client,
            order_id,
            math.inf,
            stop=lambda: self._order_id != order_id or self._accepted,
        )
        if failure is not None:
            logger.error("order %d could not be cancelled: %s", order_id, failure)
        elif self._order_id == order_id and not self._accepted:
            self._ended()
        self._close_ssh()  # one may have been opened meanwhile

    def _on_signal(self, signum: int) -> None:
        # Within a signal handler: nothing here takes a lock.
        if not self._main:
            self._signalled = signum
            self._wake.put("signal")

    def _close_ssh(self) -> None:
        self._shell = None
        while True:
            try:
                connection = self._connections.pop()
            except IndexError:  # another thread may do the same
                return
            try:
                connection.close()
            except Exception as error:
                logger.debug("an SSH connection could not be closed: %s", error)


def not_confirmed(order_id: int) -> CloreError:
    """What to note when the confirmation was interrupted."""
    return CloreError(f"order {order_id} was cancelled; that it has ended was not confirmed")


def fits_intent(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Whether an order that still runs can come of an intent."""
    return not order.has_ended and same_purchase(order, image, currency, spot)


def _end_all() -> None:
    """At the interpreter's exit: what daemon threads, or nobody, would end."""
    _exiting[1] = True
    with _open_lock:
        rentals = [r for r in _open_rentals.values() if r._pid == os.getpid() and not r._kept]
    for confirm in (False, True):  # the cancels first
        for rental in rentals:
            try:
                failure = rental._end(confirm)
            except BaseException as error:
                failure = error
            if failure is not None:
                logger.error("at exit: %s", failure)


def _forget_rentals() -> None:
    # Another thread may have held the lock at the fork. The rentals are the parent's.
    global _open_lock
    _open_lock = threading.Lock()
    _open_rentals.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_rentals)
