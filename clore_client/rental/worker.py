"""Order, watch and end the orders of one rental, in a thread of its own."""

from __future__ import annotations

import _thread
import atexit
import contextvars
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from clore_client.errors import (
    ERROR_CODES,
    BudgetExceededError,
    CloreAPIError,
    CloreConnectionError,
    DatabaseError,
    OutcomeUnknownError,
    RateUnknownError,
    RentalError,
    SpendingLimitError,
)
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.models.result import CommandResult, TransferResult
from clore_client.models.server import Server
from clore_client.orders.account import AccountOrders
from clore_client.process import this_process
from clore_client.rental.orders import Budget, RentalOrder, RentalOrders
from clore_client.rental.selection import RentalSettings
from clore_client.rental.signals import (
    Gate,
    SignalExit,
    SignalHandling,
    ThreadCall,
    in_main_thread,
    next_item,
)

if TYPE_CHECKING:
    import paramiko

    from clore_client.ssh.tunnel import Forward

Result = TypeVar("Result")

GIVE_UP_WITHIN = 2.0  # three interrupts within these seconds stop the cancelling

# After these errors, no order exists.
NO_ORDER_ERRORS = (
    CloreAPIError,
    CloreConnectionError,
    RateUnknownError,
    SpendingLimitError,
    ValueError,  # a ConfigurationError is one
    TypeError,
)


class RentalClient(Protocol):
    """List the methods of ``CloreClient`` that a rental uses."""

    def get_orders(self, include_completed: bool = False) -> list[Order]: ...

    def get_order(self, order_id: Any) -> Order | None: ...

    def cancel_order(self, order_id: Any, *, confirm: bool) -> bool: ...

    def ssh_command(self, *args: Any, **kwargs: Any) -> str: ...

    def get_spot_market(self, server_id: int) -> dict[str, Any]: ...

    def wait_for_order(
        self, order_id: int, timeout: float, poll_interval: float, *, on_progress: Any = None
    ) -> Order: ...

    def create_order(self, *args: Any, **kwargs: Any) -> Order: ...

    def connect_ssh(self, *args: Any, **kwargs: Any) -> paramiko.SSHClient: ...

    def forward(self, *args: Any, **kwargs: Any) -> Forward: ...

    def shell(self, *args: Any, **kwargs: Any) -> int: ...

    def run(self, *args: Any, **kwargs: Any) -> CommandResult: ...

    def upload(self, *args: Any, **kwargs: Any) -> TransferResult: ...

    def download(self, *args: Any, **kwargs: Any) -> TransferResult: ...


class RentalWorker:
    """Run the thread that orders the servers of one rental, and ends their orders.

    The thread ends the orders when the block ends. An interrupt can stop ``__exit__`` at its first
    line, so the thread also ends them when the ``with`` statement or the rental no longer exists.
    Other reasons are a limit, a signal in another thread, and the exit of the interpreter.

    Attributes:
        budget: the limits and the cost.
        finished: open when the thread is done.
        failure: the error that the user must know; None if all orders have ended.
        connections: SSH connections to close at the end of the rental.
        closed: whether ``close()`` is done.
        kept: whether the order stays after the rental.
        signalled: the signal that ends the rental, or None.
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
        self._inbox = inbox
        self._holders = holders  # weak references to the rental, and to its with statement if any
        self.pid = os.getpid()
        self.budget = Budget(settings)
        self.finished = Gate()
        self.failure: BaseException | None = None
        self.connections: list[Any] = []
        self.closed = False
        self.kept = False
        self.signalled: int | None = None
        self._exceeded: BudgetExceededError | None = None  # made when a limit was reached
        # A signal ends a ``with`` block of the main thread, and so its rental.
        self._main = len(holders) > 1 and in_main_thread()
        self._signals: SignalHandling | None = None
        self._rental_orders = RentalOrders(orders, settings, folder, self.budget)
        self._current: RentalOrder | None = None  # the order of the block
        self._started = False
        self._interrupted_at: list[float] = []

    @property
    def gave_up(self) -> bool:
        """True if the rental stopped the cancelling, after three interrupts."""
        return self._rental_orders.abandoned

    # --- called by the rental, in its own thread ---

    def start(self) -> None:
        """Start the thread, and let signals and the exit of the interpreter end the rental."""
        self._signals = SignalHandling()
        context = contextvars.copy_context()
        this_process.rentals.add(self)
        try:
            # An interrupt can break threading.Thread.start(), so that the thread never runs.
            _thread.start_new_thread(context.run, (self._work,))
        except RuntimeError as error:
            this_process.rentals.discard(self)
            self.close()
            raise RentalError(
                f"nothing was rented, because the worker thread could not start: {error}"
            ) from error
        self._started = True

    def call_in_thread(self, action: Callable[[], Result]) -> Result:
        """Run a function in the worker thread, and return its result or raise its error.

        Before the thread has started, the function runs in this thread.
        """
        if not self._started:
            return action()
        request = ThreadCall(action)
        self._inbox.put(request)
        while not request.done.wait():
            if self.finished.is_open:
                raise RentalError("the rental has ended: call rent() again")
        if request.error is not None:
            raise request.error
        return request.result  # type: ignore[no-any-return]

    def record_existing_orders(self, orders: list[Order]) -> None:
        """Record the orders that exist before the first purchase."""
        self._rental_orders.before = {order.id for order in orders if order.id is not None}

    def buy(self, server: Server, price: float | None, arguments: dict[str, Any]) -> Order:
        """Order a server.

        Parameters:
            server: the server.
            price: its price in USD per hour, without fees.
            arguments: the arguments of ``create_order``.
        """
        return self.call_in_thread(lambda: self._buy(server, price, arguments))

    def end_order(self) -> None:
        """End the current order. Raise an error if that is not confirmed."""
        self.call_in_thread(self._end_current)

    def adopt(self, order: Order, ends: bool) -> None:
        """Take over an order that exists. Without ``ends``, the rental does not end it."""
        self.kept = not ends
        self._current = self.call_in_thread(lambda: self._rental_orders.adopt(order, ends))

    def keep(self, until: float | None) -> None:
        """Keep the current order running after the rental, until a Unix time or for good."""
        self.call_in_thread(lambda: self._keep(until))

    def correct_price(self, usd_per_hour: float) -> None:
        """Set the price of the current order to the one that the API shows."""
        if self._current is not None:
            self._current.meter.correct(usd_per_hour)

    def check(self) -> None:
        """Raise an error if a limit, a signal or the exit of the interpreter ends the rental."""
        if self.pid != os.getpid():
            return
        if not self.kept and self._current is not None and self._exceeds_limit():
            self._inbox.put(None)  # wake the worker, which ends the order
        if (exceeded := self.budget_error()) is not None:
            raise exceeded
        if self.signalled is None:
            self.signalled = None if in_main_thread() else this_process.stopping_signal
        if self.signalled is not None:
            raise SignalExit(self.signalled)
        if this_process.exiting:
            raise RentalError("the interpreter is exiting, so the rental has ended")

    def end(self, interrupted: bool) -> list[BaseException]:
        """End the rental, and wait until that is done. Safe to repeat.

        An interrupt during the wait skips the confirmation. The third interrupt within two seconds
        stops the cancelling too; an interrupt that ended the block counts.

        Parameters:
            interrupted: whether an interrupt ended the block.

        Returns:
            The interrupts during the wait.
        """
        self.request_end()
        if not self._started:  # nothing was bought; a thread that starts now ends at once
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
                self._rental_orders.skip_confirmation = True
                caught.append(interrupt)
                times.append(time.monotonic())
                if len(times) >= 3 and times[-1] - times[-3] <= GIVE_UP_WITHIN:
                    self.failure = self._rental_orders.abandon() or self.failure
                    break
        return caught

    def budget_error(self) -> BudgetExceededError | None:
        """Return the error for a limit that was reached, or None.

        Its text says whether the cancel was accepted.
        """
        if (first := self._exceeded) is None:
            return None
        ended = self._current is None or self._current.accepted
        state = "was ended" if ended else "is being ended"
        order_id, hours, cost = first.order_id, first.hours, first.cost_usd
        text = f"{first}: order {order_id} {state}, after {hours:.4g} h and {cost:.4g} USD"
        return BudgetExceededError(text, order_id=order_id, hours=hours, cost_usd=cost)

    def close_ssh(self) -> None:
        """Close the SSH connections of the rental."""
        while True:
            try:
                connection = self.connections.pop()
            except IndexError:  # empty
                return
            try:
                connection.close()
            except Exception as error:
                logger.debug("an SSH connection could not be closed: %s", error)

    def close(self) -> None:
        """Close the connections, and stop handling signals."""
        self.close_ssh()
        if self._signals is not None:
            self._signals.close()
        self.closed = True

    def request_end(self) -> None:
        """Let the worker thread end the rental, without waiting for it."""
        self._rental_orders.record_block_end()
        self._inbox.put(None)

    def on_signal(self, signum: int) -> None:
        """End the rental. This runs in a signal handler, so it must not take a lock."""
        if not self._main:
            self.signalled = signum
            self._inbox.put(None)

    # --- the thread ---

    def _work(self) -> None:
        try:
            while not (self._has_ended_block() or self.kept):
                self._next_request()
                if self._must_end_order():
                    self._end_early()
                self._rental_orders.search_unresolved(self._has_urgent_work)
        except BaseException as error:
            self.failure = error
        self._rental_orders.record_block_end()
        try:
            failure: BaseException | None = self._rental_orders.end_all()
        except BaseException as error:
            failure = error
        if not self._rental_orders.abandoned:
            self.failure = failure or self.failure
        this_process.rentals.discard(self)
        if self._block_is_gone():  # __exit__ did not run
            self.close()
            if self.failure is not None:
                logger.error("the end of an interrupted rental failed: %s", self.failure)
        self.finished.open()

    def _next_request(self) -> None:
        """Wait for a request of the rental, but not longer than until the next check."""
        timeouts = [] if self._exceeded else [self.budget.seconds_between_checks]
        if self._rental_orders.unresolved():
            timeouts.append(self._rental_orders.search_interval)
        timeout = min((t for t in timeouts if t is not None), default=None)
        request = next_item(self._inbox, timeout)
        if isinstance(request, ThreadCall):
            request.run()

    def _has_ended_block(self) -> bool:
        return self._rental_orders.block_ended_at is not None or self._block_is_gone()

    def _block_is_gone(self) -> bool:
        """Return whether the ``with`` statement or the rental no longer exists."""
        return any(holder() is None for holder in self._holders)

    def _has_urgent_work(self) -> bool:
        return not self._inbox.empty() or self._has_ended_block() or self._must_end_order()

    def _must_end_order(self) -> bool:
        current = self._current
        if current is None or current.accepted or current.order_id is None or self.kept:
            return False
        return self.signalled is not None or self._exceeds_limit()

    def _exceeds_limit(self) -> bool:
        """Check the limits, and return whether one was reached, now or before."""
        if self._exceeded is None and (limit := self.budget.exceeded_by()) is not None:
            order_id = None if self._current is None else self._current.order_id
            self._exceeded = BudgetExceededError(
                limit, order_id=order_id, hours=self.budget.hours, cost_usd=self.budget.cost_usd
            )
            logger.warning("%s", self.budget_error())
        return self._exceeded is not None

    # --- buying ---

    def _buy(self, server: Server, price: float | None, arguments: dict[str, Any]) -> Order:
        self.check()
        purchase = self._current = self._rental_orders.record_intent(server.id or 0, price)
        try:
            order: Order = self._client.create_order(purchase.server_id, **arguments)
            if order.id is None:
                raise OutcomeUnknownError(
                    "the response to create_order has no order id, so the order may exist: check "
                    "get_orders()"
                )
        except DatabaseError:
            self._rental_orders.mark_refused(purchase)
            self._current = None
            raise
        except NO_ORDER_ERRORS as error:
            # After an unknown code, or a response without one, the order may exist.
            if not isinstance(error, CloreAPIError) or error.code in ERROR_CODES:
                self._rental_orders.forget(purchase)
                self._current = None
            raise
        self._rental_orders.set_order_id(purchase, order.id)
        return order

    def _keep(self, until: float | None) -> None:
        current = self._current
        if current is None or current.order_id is None or current.accepted:
            raise RentalError("the order has ended already, so it can't be kept: rent again")
        self._rental_orders.keep(current, until)
        self.kept = True
        end = "it is cancelled"
        if until is not None:
            end = f"cancel_overdue() is called after {time.ctime(until)}"
        logger.info(
            "order %d is kept: it runs and costs money until %s; max_hours and max_cost_usd of the "
            "rental don't end it any more",
            current.order_id,
            end,
        )

    # --- the end ---

    def _end_early(self) -> None:
        """End the current order before the end of the block."""
        current = self._current
        if current is None or current.order_id is None:
            return
        # Close SSH in its own thread: neither it nor the cancel must wait for the other.
        threading.Thread(target=self.close_ssh, name="clore-rental-close", daemon=True).start()
        orders = self._rental_orders
        failure = orders.try_to_cancel(current, orders.deadline)
        if failure is not None:
            logger.error("order %d could not be cancelled: %s", current.order_id, failure)
        self.close_ssh()  # the block may have opened another connection

    def _end_current(self) -> None:
        current, self._current = self._current, None
        if current is not None and (failure := self._rental_orders.end(current)) is not None:
            raise failure


def _end_all() -> None:
    """End the rentals that are still open when the interpreter exits."""
    this_process.exiting = True
    # After three interrupts, the user does not want to wait.
    workers = [w for w in list(this_process.rentals) if not w.gave_up]
    for worker in workers:
        worker.request_end()
    for worker in workers:
        worker.end(interrupted=False)
        if worker.failure is not None:
            logger.error("the end of a rental at exit failed: %s", worker.failure)


atexit.register(_end_all)
