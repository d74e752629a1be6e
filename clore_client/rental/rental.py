"""Rent a server for the length of a block: find, order, wait, and cancel at the end."""

from __future__ import annotations

import os
import queue
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from clore_client.errors import (
    BidTooLowError,
    BudgetExceededError,
    CurrencyNotAllowedError,
    DatabaseError,
    OrderEndedError,
    RentalError,
    ServerAlreadyRentedError,
    ServerOfflineError,
    WaitTimeoutError,
    add_note,
)
from clore_client.log import logger
from clore_client.market.market import (
    NOT_DEPLOYED,
    WORKED,
    HostHistory,
)
from clore_client.models.order import Order
from clore_client.models.result import CommandResult, TransferResult
from clore_client.models.server import Server, is_mixed, on_demand_usd
from clore_client.orders.account import AccountOrders
from clore_client.progress import ProgressEvent, ProgressOptions, Report
from clore_client.rental.selection import (
    RentalSettings,
    SharedServers,
    order_usd_per_hour,
    summary,
)
from clore_client.rental.signals import BlockExit, SignalExit
from clore_client.rental.worker import RentalClient, RentalWorker
from clore_client.validation import check_optional_number

if TYPE_CHECKING:
    import paramiko

    from clore_client.ssh.tunnel import Forward

Part = TypeVar("Part")
Rented = TypeVar("Rented", bound="Rental")
Attached = TypeVar("Attached", bound="AttachedRental")

LONGEST_KEEP = 87_600.0  # hours

# After these errors, rent() tries the next server.
TRY_NEXT_ERRORS = (
    ServerAlreadyRentedError,
    ServerOfflineError,
    CurrencyNotAllowedError,
    BidTooLowError,
    DatabaseError,
)


class Rental:
    """Rent a server for the length of a ``with`` block; see ``CloreClient.rent``.

    A worker thread, :class:`RentalWorker`, orders and cancels. The thread that runs the block
    searches for servers, and waits.

    Attributes:
        order: the order as it was when it started to run, with its ``ssh_password`` if the client
            generated one.
        server: the server as it was listed.
        tried: (server id, reason) for each server that did not work.
        servers: the servers to try; rentals that share them try no server twice.
    """

    def __init__(
        self,
        client: RentalClient,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        history: HostHistory,
        progress: ProgressOptions | None = None,
    ) -> None:
        self._client = client
        self._orders = orders
        self._settings = settings
        self._folder = folder
        self._history = history
        self._progress = progress or ProgressOptions()
        self._report: Report | None = None  # while servers are tried
        self.servers = SharedServers(orders.market, settings, history)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # requests to the worker
        self._block: weakref.ref[Any] | None = None
        self._worker: RentalWorker | None = None
        self._order: Order | None = None
        self._server: Server | None = None
        self._connection: Any = None  # shared by run(), upload() and the other methods
        self._kept_as = "kept"  # for the repr of a rental that does not end its order
        self._over = False  # set by request_end(), which can come before the block begins
        self.tried: list[tuple[int, str]] = []

    def __repr__(self) -> str:
        return f"<Rental of order {self._order.id if self._order else None}, {self._state()}>"

    def _state(self) -> str:
        worker = self._worker
        if self._order is not None and self._orders.has_ended(self._order.id):
            return "ended"
        if worker is not None and worker.kept:
            return self._kept_as
        return "not open" if worker is None or worker.finished.is_open else "open"

    # --- for users ---

    @property
    def order(self) -> Order:
        """The order as it was when it started to run."""
        return _check_open(self._order)

    @property
    def server(self) -> Server:
        """The server as it was listed."""
        return _check_open(self._server)

    @property
    def hours(self) -> float:
        """The hours since the first order of this rental."""
        return self._worker.budget.hours if self._worker else 0.0

    @property
    def cost_usd(self) -> float:
        """The cost so far in USD, with fees, including servers that did not work.

        It is an estimate from the price of the order, the exchange rate of the listing, a fee of
        5 % (spot: 1.25 %), and 0.10 USD after ten minutes (fees as seen on the live API). It counts
        from the send of the order until its cancel is accepted. A new bid of this client counts
        from its time on.
        """
        return self._worker.budget.cost_usd if self._worker else 0.0

    @property
    def status(self) -> str:
        """The status of the order now, from one read of the lists."""
        found = self._client.get_order(self.order)
        return (self.order if found is None else found).status or ""

    def ssh(self, **options: Any) -> paramiko.SSHClient:
        """Open an SSH connection, which the end of the block closes. Needs paramiko.

        Parameters:
            **options: arguments of :meth:`CloreClient.connect_ssh`, for example ``key_path=``.

        Returns:
            A connected ``paramiko.SSHClient``.
        """
        worker = self._open_worker()
        try:
            connection = self._client.connect_ssh(self.order, **options)
        except Exception:
            worker.check()  # the rental may have ended
            raise
        worker.connections.append(connection)
        try:
            worker.check()
        except BaseException:
            connection.close()
            raise
        return connection

    def run(self, command: str | Sequence[str], **options: Any) -> CommandResult:
        """Run a command on the server, as :meth:`CloreClient.run` does. Needs paramiko.

        Parameters:
            command: a command for the server's shell; a list of arguments is quoted.
            **options: arguments of :meth:`CloreClient.run`. All calls share one connection, so
                login arguments only have an effect in the first call.

        Raises:
            CommandError: the exit code was not 0.
            BudgetExceededError: the rental has reached a limit, and has ended.
        """
        return self._call_with_ssh(self._client.run, command, **options)

    def upload(self, local: Any, remote: Any, **options: Any) -> TransferResult:
        """Copy a file or directory to the server, as :meth:`CloreClient.upload` does."""
        return self._call_with_ssh(self._client.upload, local, remote, **options)

    def download(self, remote: Any, local: Any, **options: Any) -> TransferResult:
        """Copy a file or directory from the server, as :meth:`CloreClient.download` does."""
        return self._call_with_ssh(self._client.download, remote, local, **options)

    def forward(self, remote_port: int, local_port: int = 0) -> Forward:
        """Forward a local port to the server, as :meth:`CloreClient.forward` does."""
        return self._call_with_ssh(self._client.forward, remote_port, local_port)

    def shell(self) -> int:
        """Open the server's shell in this terminal, as :meth:`CloreClient.shell` does."""
        return self._call_with_ssh(self._client.shell)

    def ssh_command(self, **options: Any) -> str:
        """Return the command that logs in from a terminal; see :meth:`CloreClient.ssh_command`."""
        return self._client.ssh_command(self.order, **options)

    def _call_with_ssh(self, method: Callable[..., Part], /, *args: Any, **options: Any) -> Part:
        """Call a method of the client with the rental's own connection."""
        from clore_client.ssh.access import LOGIN_DEFAULTS
        from clore_client.ssh.transport import is_connected

        worker = self._open_worker()
        login = {name: options.pop(name) for name in LOGIN_DEFAULTS.keys() & options.keys()}
        if self._connection is None or not is_connected(self._connection):
            self._connection = self.ssh(**login)
        try:
            return method(self.order, *args, ssh=self._connection, **options)
        finally:
            worker.check()

    def keep(self, *, max_hours: float | None = None) -> Order:
        """Keep the order running after the end of the block, until you cancel it.

        The budget ends here: ``max_hours`` and ``max_cost_usd`` of the rental, signals and the exit
        of the interpreter don't end the order any more. :meth:`CloreClient.leftovers` lists it
        under ``kept``, and :meth:`CloreClient.attach` returns a rental for it.

        On a rental from :meth:`CloreClient.attach`, this has no effect on the process that rented
        the order: that process still ends it at the end of its own block, or at its limits.

        Parameters:
            max_hours: hours from now after which :meth:`CloreClient.cancel_overdue` ends the order.
                Nothing calls that method for you: call it from cron.

        Returns:
            The :class:`Order`.

        Raises:
            RentalError: the order has ended, or its deadline can't be recorded; it is not kept.
        """
        check_optional_number("max_hours", max_hours, above=True, maximum=LONGEST_KEEP)
        worker, order = self._open_worker(), self.order
        if worker.finished.is_open:
            raise RentalError(
                f"order {order.id} has ended already, so it can't be kept: rent again"
            )
        worker.keep(None if max_hours is None else time.time() + max_hours * 3600.0)
        self._kept_as = "kept"
        return order

    def cancel(self) -> None:
        """End the order now, and wait until that is confirmed. Safe to repeat.

        Raises:
            CancelUnconfirmedError: the order may still be running.
        """
        worker = _check_open(self._worker)
        if worker.kept:
            worker.close_ssh()
            self._client.cancel_order(self.order, confirm=True)
        else:
            self.close()

    # --- without a block ---

    def start(self: Rented) -> Rented:
        """Begin the rental without a ``with`` block, for a notebook; :meth:`close` ends it.

        It also ends when this object is no longer used, by SIGTERM and SIGHUP, and at the exit of
        the interpreter, as the rental of a block does.

        Returns:
            The rental itself.

        Example:
            >>> rental = client.rent("RTX 4090", max_hours=8).start()
            >>> rental.run("nvidia-smi -L")
            >>> rental.close()
        """
        return self.__enter__()

    def close(self) -> None:
        """End the rental as the end of its block does. Safe to repeat."""
        worker = self._worker
        if worker is not None and worker.closed:
            worker.close_ssh()
        else:
            self._end()

    def _open_worker(self) -> RentalWorker:
        """Return the worker, or raise an error if the rental has ended."""
        worker = _check_open(self._worker)
        worker.check()
        return worker

    def close_ssh(self) -> None:
        """Close the SSH connections of the rental; the next call opens a new one."""
        if self._worker is not None:
            self._worker.close_ssh()

    def request_end(self) -> None:
        """Ask the worker to end the rental, and do not wait for that.

        A rental that has not begun can't begin any more.
        """
        self._over = True
        if self._worker is not None:
            self._worker.request_end()

    # --- the block ---

    def end_with(self, leave: Callable[..., None]) -> None:
        """End this rental when ``leave``, the end of a ``with`` statement, no longer exists."""
        if self._worker is None:
            self._block = weakref.ref(leave, self._inbox.put)

    def _make_worker(self) -> RentalWorker:
        holders: list[weakref.ref[Any]] = [weakref.ref(self, self._inbox.put)]
        if self._block is not None and self._block() is not None:
            holders.append(self._block)
        return RentalWorker(
            self._client, self._orders, self._settings, self._folder, self._inbox, holders
        )

    def share_with(self, other: Rental) -> None:
        """Share the found servers with another rental, so that both try different ones."""
        self.servers, self._settings = other.servers, other._settings
        self._progress = other._progress

    def __enter__(self: Rented) -> Rented:
        if self._worker is not None:
            raise RentalError("a rental can be entered only once: call rent() again")
        self._worker = self._make_worker()
        if self._over:
            raise RentalError("the rental has ended before it began: call rent() again")
        try:
            self._worker.start()
            with self._progress.reporting() as self._report:
                self._acquire(self._worker)
            self._report = None
        except BaseException as error:
            self._end(type(error), error)
            raise
        return self

    __exit__ = BlockExit()

    def _end(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """End the rental; raise an error if that failed, or a limit or signal ended it."""
        worker = self._worker
        if worker is None or worker.pid != os.getpid():
            return  # in a forked child, the order belongs to the parent
        interrupts: list[BaseException] = []
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        while not worker.closed:
            try:
                interrupts += worker.end(interrupted)
                worker.close()
            except (KeyboardInterrupt, SystemExit) as late:  # outside the waits of end()
                interrupts.append(late)
                interrupted = True
        self._connection = None
        _raise_failure(error, worker, interrupts)

    # --- servers ---

    def _acquire(self, worker: RentalWorker) -> None:
        """Try one server after the other until one runs."""
        worker.record_existing_orders(self._client.get_orders())
        for _ in range(self._settings.attempts):
            worker.check()
            if (server := self.servers.take()) is None:
                break
            reason = self._try(worker, server)
            if reason is None:
                return
            logger.info("server %s: %s", server.id, reason)
            self.tried.append((server.id or 0, reason))
        raise RentalError(
            f"none of {len(self.tried)} servers worked: {summary(self.tried)}"
            if self.tried
            else self.servers.no_server,
            tried=tuple(self.tried),
        )

    def _try(self, worker: RentalWorker, server: Server) -> str | None:
        """Rent a server. Return None if it runs, else the reason why it does not work."""
        price = self._settings.price_of(server)
        shown = "price unknown" if price is None else f"{price:.3g} USD/h"
        gpu = server.gpu if is_mixed(server) else server.gpu_name
        self._report_step("rent", f"renting server {server.id} ({gpu}, {shown})")
        arguments = dict(self._settings.order_arguments)
        try:
            if self._settings.spot:
                arguments["spot_price"] = price
                # Read the exchange rate now, because the cost counts from the purchase on.
                self._client.get_spot_market(server.id or 0)
            order = worker.buy(server, price, arguments)
        except TRY_NEXT_ERRORS as error:
            return str(error)
        self._report_step("order", f"order {order.id} of server {server.id}")
        self._order, self._server = order, server
        reason = self._over_limit(worker, order, server) or self._deploy(worker, order, server)
        if reason is None:
            return None
        worker.check()
        self._order = self._server = None
        worker.end_order()
        return reason

    def _report_step(self, name: str, text: str) -> None:
        if self._report is not None:
            self._report(ProgressEvent(name, 3600 * self.hours, text))

    def _deploy(self, worker: RentalWorker, order: Order, server: Server) -> str | None:
        """Wait until an order runs. Return None, or the reason why it does not."""
        timeout, interval = self._settings.deploy_timeout, self._settings.poll_interval
        # A subclass of the client may have the documented parameters only.
        more: dict[str, Any] = {} if self._report is None else {"on_progress": self._report}
        try:
            running = self._client.wait_for_order(
                order.id or 0, timeout=timeout, poll_interval=interval, **more
            )
        except (WaitTimeoutError, OrderEndedError) as error:
            worker.check()
            self._history.record(server.id, NOT_DEPLOYED)
            return str(error)
        self._history.record(server.id, WORKED)
        if "ssh_password" in order:
            running["ssh_password"] = order["ssh_password"]
        self._order = running
        reason = self._over_limit(worker, running, server)
        if reason is None:
            worker.check()
        return reason

    def _over_limit(self, worker: RentalWorker, order: Order, server: Server) -> str | None:
        price = order_usd_per_hour(order, server, self._settings.currency)
        if price is not None:
            worker.correct_price(price)
        if not self._settings.exceeds_price_limit(server, price):
            return None
        return f"order {order.id} costs {price:.4g} USD per hour, more than max_price_usd"


class AttachedRental(Rental):
    """Use an order that exists like a rental; see ``CloreClient.attach``.

    Parameters:
        order: the order.
        ends: whether the end of the block ends the order. Without it, the rental can be used at
            once, with and without a block.
    """

    def __init__(
        self,
        client: RentalClient,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        history: HostHistory,
        order: Order,
        ends: bool,
    ) -> None:
        super().__init__(client, orders, settings, folder, history)
        self._order = order
        self._ends = ends
        self._priced = order.usd_per_hour is not None
        if not ends:
            self._kept_as = "attached"
            self._worker = self._make_worker()
            self._worker.adopt(order, ends=False)

    @property
    def server(self) -> Server:
        """The server as it is listed now, from one read of the marketplace."""
        if self._server is None:
            found = self._orders.market.find_server(self.order.server_id or 0)
            if found is None:
                raise RentalError(
                    f"server {self.order.server_id} is not on the marketplace any more: its order "
                    "has the price"
                )
            self._server = found
        return self._server

    @property
    def cost_usd(self) -> float:
        """The cost so far in USD, with fees; see :attr:`Rental.cost_usd`.

        If the price in USD is not known, the first use reads the marketplace.
        """
        self._find_price()
        return super().cost_usd

    def _find_price(self) -> None:
        order, worker = self.order, self._worker
        if self._priced or worker is None:
            return
        self._priced = True
        currency = self._settings.currency
        price = order_usd_per_hour(order, self.server, currency)
        # The marketplace was just read, and may have the exchange rate.
        price = price or self._orders.market.data.rates.usd(order.get("price"), currency)
        if not self._settings.spot:
            price = price or on_demand_usd(self.server, currency)
        if price is not None:
            worker.correct_price(price)

    def __enter__(self: Attached) -> Attached:
        return super().__enter__() if self._ends else self

    def _acquire(self, worker: RentalWorker) -> None:
        worker.adopt(self.order, ends=True)
        if self._settings.max_cost_usd is not None:
            self._find_price()


def _raise_failure(
    error: BaseException | None, worker: RentalWorker, interrupts: list[BaseException]
) -> None:
    """Raise an error, or add a note to ``error``, if a rental failed or was ended early.

    Parameters:
        error: the exception of the block, or None.
        worker: the worker, which has ended the rental or was interrupted.
        interrupts: the interrupts during the end of the rental.
    """
    raised: BaseException | None = None
    if error is None or isinstance(error, Exception):
        exceeded = worker.budget_error()
        if exceeded is not None and not _is_of(error, exceeded.order_id):
            raised = exceeded
        elif interrupts:
            raised = interrupts[-1]
        elif worker.signalled is not None and not worker.kept:
            raised = SignalExit(worker.signalled)
    if (failure := worker.failure) is not None:
        if (shown := raised or error) is None:
            raise failure
        if str(shown) != str(failure):  # the block may raise the error of close() itself
            add_note(shown, str(failure))
    if raised is not None:
        raise raised from error


def _check_open(part: Part | None) -> Part:
    """Return a part of a rental, or raise an error before the block begins."""
    if part is None:
        raise RentalError("nothing is rented: use it as `with client.rent(...) as rental:`")
    return part


def _is_of(error: BaseException | None, order_id: int | None) -> bool:
    return isinstance(error, BudgetExceededError) and error.order_id == order_id
