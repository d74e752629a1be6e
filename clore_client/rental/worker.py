"""The orders of one rental: bought, watched and ended in a thread that no signal interrupts."""

from __future__ import annotations

import _thread
import atexit
import contextvars
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from clore_client.errors import (
    ERROR_CODES,
    AuthenticationError,
    BudgetExceededError,
    CancelUnconfirmedError,
    CloreAPIError,
    CloreConnectionError,
    ConfigurationError,
    DatabaseError,
    OutcomeUnknownError,
    RateUnknownError,
    RentalError,
    SpendingLimitError,
)
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.models.server import Server
from clore_client.orders.account import AccountOrders
from clore_client.rental.budget import Budget
from clore_client.rental.cleanup import Cleanup
from clore_client.rental.client import RentalClient
from clore_client.rental.handoff import Gate, ThreadCall
from clore_client.rental.orders import LOOKS, RentalOrder, RentalOrders
from clore_client.rental.selection import RentalSettings
from clore_client.rental.signals import (
    SignalExit,
    SignalHandling,
    in_main_thread,
    listen,
    stopping_signal,
)

Result = TypeVar("Result")

LOOK_BESIDE = 2.0  # the same, while the block goes on
GIVE_UP_WITHIN = 2.0  # seconds for three interrupts that end even the cancelling

# After these no order was made.
SURELY_NO_ORDER = (
    AuthenticationError,
    CloreAPIError,
    CloreConnectionError,
    ConfigurationError,
    RateUnknownError,
    SpendingLimitError,
    ValueError,
    TypeError,
    ImportError,
)

_open_rentals: dict[int, RentalWorker] = {}
_exiting = False


class RentalWorker:
    """Owns the orders of one rental, from the first request to the confirmed end.

    The thread ends them when the block is left, when the ``with`` statement or the rental is gone
    without having said so (an interrupt can cut ``__exit__`` short at its first line), when the
    budget is spent, at a signal that another thread got, and at the interpreter's exit.

    Attributes:
        finished: opened when nothing is left to do.
        failure: what the user must know of the end; None when all is gone.
        connections: SSH connections to close with the rental.
        closed: whether they are closed, and signals not handled any more.
    """

    def __init__(
        self,
        client: RentalClient,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        inbox: queue.SimpleQueue[Any],
        holders: list[weakref.ref[Any]],
    ) -> None:
        self._client = client
        self._orders = orders
        self._settings = settings
        self._inbox = inbox
        self._holders = holders  # the rental, and what its with statement holds
        self.pid = os.getpid()
        self.budget = Budget(settings)
        self.finished = Gate()
        self.failure: BaseException | None = None
        self.connections: list[Any] = []
        self.closed = False
        self.kept = False
        self.signalled: int | None = None
        self.exceeded: tuple[str, float, float, int | None] | None = None  # why, h, USD, id
        self._main = in_main_thread()
        self._handling: SignalHandling | None = None
        self._rental_orders = RentalOrders(
            orders, settings, folder, self.budget, wake=lambda: inbox.put(None), taken=self._taken
        )
        self._cleanup = Cleanup(orders, self._rental_orders, settings, self.budget)
        self._current: RentalOrder | None = None  # the one that the user has
        self._started = False
        self._interrupted_at: list[float] = []

    # --- what the rental asks for, in its own thread ---

    def start(self) -> None:
        """Start the thread, and let signals and the interpreter's exit end the rental, too."""
        self._handling = SignalHandling()
        listen(self, self._on_signal)
        context = contextvars.copy_context()
        _open_rentals[id(self)] = self
        try:
            # Not threading.Thread, whose start() waits with a lock that an interrupt can leave
            # locked: then the thread would never run.
            _thread.start_new_thread(context.run, (self._work,))
        except RuntimeError as error:
            _open_rentals.pop(id(self), None)
            self.close()
            raise RentalError(f"nothing was rented: {error}") from error
        self._started = True

    @property
    def abandoned(self) -> bool:
        """Whether it was interrupted three times: what may run is left to ``leftovers()``."""
        return self._cleanup.abandoned

    def ask(self, action: Callable[[], Result]) -> Result:
        """Have the worker do something, and return what comes of it, or raise that."""
        request = ThreadCall(action)
        self._inbox.put(request)
        while not request.done.wait():
            if self.finished.is_open:
                raise RentalError("the rental is over: nothing is rented any more")
        if request.error is not None:
            raise request.error
        return request.result  # type: ignore[no-any-return]

    def note_orders(self, orders: list[Order]) -> None:
        """Note which orders are there before the first purchase."""
        self._rental_orders.before = {order.id for order in orders if order.id is not None}

    def buy(self, server: Server, price: float | None, arguments: dict[str, Any]) -> Order:
        """Order a server.

        Parameters:
            server: as it is listed.
            price: in USD per hour, without fees.
            arguments: of ``create_order``.
        """
        return self.ask(lambda: self._buy(server, price, arguments))

    def end_order(self) -> BaseException | None:
        """End the current order; None when that is confirmed, else what to tell the user."""
        return self.ask(self._end_current)

    def keep(self) -> None:
        """Leave the current order running."""
        self.ask(self._keep)

    def told_price(self, usd_per_hour: float) -> None:
        """Take the price that the current order shows."""
        if self._current is not None:
            self._current.meter.correct(usd_per_hour)

    def check(self) -> None:
        """Raise when the rental was ended from elsewhere."""
        if self.pid != os.getpid():
            return
        if not self.kept and self._current is not None and self._exceed():
            self._inbox.put(None)  # the worker ends it: no network work here
        if self.exceeded is not None:
            raise self.budget_error()
        if self.signalled is None:
            self.signalled = stopping_signal()
        if self.signalled is not None:
            raise SignalExit(self.signalled)
        if _exiting:
            raise RentalError("the interpreter is about to exit: nothing is rented any more")

    def leave(self, interrupted: bool) -> list[BaseException]:
        """End the rental, and wait for that. Safe to repeat.

        The first interrupt meanwhile ends only the confirmation. The third within two seconds,
        the one that the block was left by included, ends even the cancelling.

        Parameters:
            interrupted: whether the block was left by an interrupt.

        Returns:
            The interrupts that came meanwhile.
        """
        self._begin_to_leave()
        if not self._started:  # or this moment, and has bought nothing: it sees that it is left
            return []
        caught: list[BaseException] = []
        times = self._interrupted_at
        if interrupted:
            times.append(time.monotonic())
        while True:
            try:
                if self.finished.wait():
                    break
            except (KeyboardInterrupt, SystemExit) as interrupt:
                self._cleanup.hurried = True
                caught.append(interrupt)
                times.append(time.monotonic())
                if len(times) >= 3 and times[-1] - times[-3] <= GIVE_UP_WITHIN:
                    self._abandon()
                    break
        return caught

    def budget_error(self) -> BudgetExceededError:
        """Make the error for a budget that is spent."""
        text, hours, cost, order_id = self.exceeded or ("", 0.0, 0.0, None)
        # No more than is known: the cancel may take its time, or come too late to be seen here.
        ended = self._current is None or self._current.accepted
        state = "was ended" if ended else "is being ended"
        return BudgetExceededError(
            f"{text}: order {order_id} {state}, after {hours:.4g} h and {cost:.4g} USD",
            order_id=order_id,
            hours=hours,
            cost_usd=cost,
        )

    def close_ssh(self) -> None:
        """Close the SSH connections of the rental."""
        while True:
            try:
                connection = self.connections.pop()
            except IndexError:  # another thread may do the same
                return
            try:
                connection.close()
            except Exception as error:
                logger.debug("an SSH connection could not be closed: %s", error)

    def close(self) -> None:
        """Close the connections, and handle signals no more."""
        self.close_ssh()
        listen(self, None)
        if self._handling is not None:
            self._handling.close()
        self.closed = True

    def _begin_to_leave(self) -> None:
        self._cleanup.leave()
        self._inbox.put(None)

    def _abandon(self) -> None:
        """Stop ending the rental: what may run is left to ``leftovers()``."""
        self._cleanup.abandoned = True
        left = list(self._rental_orders)
        for purchase in left:
            if purchase.entry is not None:
                purchase.entry.abandoned = True
        ids = tuple(p.order_id for p in left if p.order_id is not None)
        text = f"interrupted three times: {'; '.join(map(str, left))}: see leftovers()"
        if left:
            self.failure = (
                CancelUnconfirmedError(text, order_ids=ids) if ids else OutcomeUnknownError(text)
            )

    def _on_signal(self, signum: int) -> None:
        # Within a signal handler: nothing here takes a lock.
        if not self._main:
            self.signalled = signum
            self._inbox.put(None)

    # --- the thread ---

    def _work(self) -> None:
        try:
            while not (self._is_left() or self.kept):
                self._next_request()
                if self._must_end():
                    self._end_early()
                self._cleanup.look_at_doubts(self._current)
        except BaseException as error:
            self.failure = error
        self._cleanup.leave()
        try:
            failure = self._cleanup.end_all()
        except BaseException as error:
            failure = error
        if not self._cleanup.abandoned:
            self.failure = failure or self.failure
        _open_rentals.pop(id(self), None)
        if self._is_forgotten():  # then nobody else does this
            self.close()
            if self.failure is not None:
                logger.error("a rental whose block is gone: %s", self.failure)
        self.finished.open()

    def _next_request(self) -> None:
        timeout = None if self.exceeded else self.budget.seconds_left()
        if self._cleanup.in_doubt(self._current):
            look = min(LOOK_BESIDE, max(0.001, self._orders.client.order_lag / LOOKS))
            timeout = min(look, math.inf if timeout is None else timeout)
        try:
            request = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return
        if isinstance(request, ThreadCall):
            request.run()

    def _taken(self) -> set[int | None]:
        """Return the orders of all open rentals of this account in this process."""
        account = self._orders.claims
        workers = [w for w in list(_open_rentals.values()) if w._orders.claims is account]
        return {purchase.order_id for worker in workers for purchase in worker._rental_orders}

    def _is_left(self) -> bool:
        return self._cleanup.left_at is not None or self._is_forgotten()

    def _is_forgotten(self) -> bool:
        """Whether the ``with`` statement, or the rental itself, is gone."""
        return any(holder() is None for holder in self._holders)

    def _must_end(self) -> bool:
        current = self._current
        if current is None or current.accepted or current.order_id is None or self.kept:
            return False
        return self.signalled is not None or self._exceed()

    def _exceed(self) -> bool:
        """Whether it is over its budget; from the first time on, that stays so."""
        if self.exceeded is None and (text := self.budget.exceeded_by()) is not None:
            order_id = None if self._current is None else self._current.order_id
            self.exceeded = text, self.budget.hours, self.budget.cost_usd, order_id
            logger.warning("%s", self.budget_error())
        return self.exceeded is not None

    # --- buying ---

    def _buy(self, server: Server, price: float | None, arguments: dict[str, Any]) -> Order:
        self.check()
        purchase = self._current = self._rental_orders.note_intent(server.id or 0, price)
        try:
            order: Order = self._client.create_order(purchase.server_id, **arguments)
            if order.id is None:
                raise OutcomeUnknownError("the answer to create_order names no order")
        except DatabaseError:
            self._rental_orders.refused(purchase)
            self._current = None
            raise
        except SURELY_NO_ORDER as error:
            # Of an unknown code, or an answer that is no envelope, nobody knows what it means.
            if not isinstance(error, CloreAPIError) or error.code in ERROR_CODES:
                self._rental_orders.forget(purchase)
                self._current = None
            raise
        self._rental_orders.became(purchase, order.id)
        self._rental_orders.drop_dead_notes(purchase.server_id)
        return order

    def _keep(self) -> None:
        current = self._current
        if current is None or current.order_id is None or current.accepted:
            raise RentalError("the order was ended already: it can't be kept")
        self.kept = True
        logger.info("order %d stays, on purpose", current.order_id)
        self._rental_orders.keep(current)

    # --- the end ---

    def _end_early(self) -> None:
        """End the current order while the block goes on."""
        current = self._current
        if current is None or current.order_id is None:
            return
        # Beside the cancel, which may have to wait for an API that is down.
        threading.Thread(target=self.close_ssh, name="clore-rental-close", daemon=True).start()
        failure = self._cleanup.try_to_cancel(current, self._cleanup.deadline)
        if failure is not None:
            logger.error("order %d could not be cancelled: %s", current.order_id, failure)
        self.close_ssh()  # one may have been opened meanwhile

    def _end_current(self) -> BaseException | None:
        current, started = self._current, time.monotonic()
        if current is None:
            return None
        until = started + self._settings.cancel_timeout
        failure: BaseException | None = self._cleanup.cancel(
            current, lambda: min(until, self._cleanup.deadline())
        )
        if failure is None:
            failure = self._cleanup.confirm(current, started)
        self._current = None
        return failure


def _end_all() -> None:
    """At the interpreter's exit: end the rentals of daemon threads, and of blocks never left."""
    global _exiting
    _exiting = True
    # One that was interrupted three times is not waited for a second time.
    workers = [w for w in list(_open_rentals.values()) if w.pid == os.getpid() and not w.abandoned]
    for worker in workers:
        worker._begin_to_leave()
    for worker in workers:
        worker.leave(interrupted=False)
        if worker.failure is not None:
            logger.error("at exit: %s", worker.failure)


atexit.register(_end_all)

if hasattr(os, "register_at_fork"):
    # The rentals are the parent's.
    os.register_at_fork(after_in_child=_open_rentals.clear)
