"""rent(): a server found, ordered, awaited, and given back whatever happens."""

from __future__ import annotations

import functools
import os
import queue
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

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
)
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.models.result import CommandResult, TransferResult
from clore_client.models.server import Server
from clore_client.orders.cancel import add_note_to
from clore_client.rental.selection import Wish, candidates, shown_usd
from clore_client.rental.signals import SignalExit
from clore_client.rental.worker import RentalWorker

if TYPE_CHECKING:
    import paramiko

# After these the next candidate may be had.
NEXT_CANDIDATE = (
    ServerAlreadyRentedError,
    ServerOfflineError,
    CurrencyNotAllowedError,
    BidTooLowError,
    DatabaseError,
)


class _BlockExit:
    """``Rental.__exit__``, as an object of its own for each ``with`` statement.

    A ``with`` statement looks ``__exit__`` up before it enters, holds it, and lets go of it when
    it is left, however that happens. So the worker sees by a weak reference when the block is
    gone, also where an interrupt cuts ``__exit__`` short at its first line.
    """

    def __get__(self, rental: Rental | None, owner: type[Rental]) -> Callable[..., None]:
        if rental is None:
            return owner._leave
        leave = functools.partial(owner._leave, rental)
        if rental._worker is None:
            rental._block = weakref.ref(leave, rental._inbox.put)
        return leave


class Rental:
    """A server rented for the length of a ``with`` block; made by ``CloreClient.rent``.

    What costs money is done by a :class:`RentalWorker`, in a thread of its own. The thread that
    enters the block looks for servers, and waits.

    Attributes:
        order: the order as it was when it started to run, with what was sent to get in.
        server: the server as it was listed.
        tried: (server id, why not) for each host that did not work.
    """

    def __init__(self, client: Any, wish: Wish, folder: Path | None) -> None:
        self._client = client
        self._wish = wish
        self._folder = folder
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of the worker
        self._block: weakref.ref[Any] | None = None
        self._worker: RentalWorker | None = None
        self._order: Order | None = None
        self._server: Server | None = None
        self._shell: Any = None
        self.tried: list[tuple[int, str]] = []

    def __repr__(self) -> str:
        worker = self._worker
        state = "not open" if worker is None or worker.finished.is_open else "open"
        if worker is not None and worker.kept:
            state = "kept"
        return f"<Rental of order {self._order.id if self._order else None}, {state}>"

    # --- what a user asks it ---

    @property
    def order(self) -> Order:
        """The order as it was when it started to run."""
        if self._order is None:
            raise RentalError("nothing is rented: use it as `with client.rent(...) as rental:`")
        return self._order

    @property
    def server(self) -> Server:
        """The server as it was listed."""
        if self._server is None:
            raise RentalError("nothing is rented: use it as `with client.rent(...) as rental:`")
        return self._server

    @property
    def hours(self) -> float:
        """Hours since the first order of this rental; the larger of both clocks."""
        return self._worker.budget.hours if self._worker else 0.0

    @property
    def cost_usd(self) -> float:
        """USD that it has cost so far, with all fees and the hosts that did not work.

        By the price of the order, the rate that the listing implied, 5 % (spot: 1.25 %) on top,
        and 0.10 USD from the tenth minute on. A bid that this client has changed counts from then
        on. It counts from when the order was handed over to be sent, and stops when the cancel was
        accepted.
        """
        return self._worker.budget.cost_usd if self._worker else 0.0

    def ssh(self, **options: Any) -> paramiko.SSHClient:
        """A connection to the machine, closed at the end of the block. Needs paramiko.

        Parameters:
            **options: for :meth:`CloreClient.connect_ssh`, as ``key_path=``.
        """
        worker = self._open_worker()
        try:
            connection = self._client.connect_ssh(self.order, **options)
        except Exception:
            worker.check()  # it may have been ended meanwhile
            raise
        worker.connections.append(connection)
        try:
            worker.check()
        except BaseException:
            connection.close()
            raise
        return connection  # type: ignore[no-any-return]

    def run(self, command: str | Sequence[str], **options: Any) -> CommandResult:
        """Run a command on the machine, as :meth:`CloreClient.run` does. Needs paramiko.

        Parameters:
            command: for the shell of the machine; a list of arguments is quoted.
            **options: for :meth:`CloreClient.run`; those of a login count when it logs in for the
                first time. That connection is kept until the end of the block.

        Raises:
            CommandError: the exit code was not 0.
            BudgetExceededError: the rental was ended meanwhile.
        """
        return self._over_ssh(self._client.run, (command,), options)  # type: ignore[no-any-return]

    def upload(self, local: Any, remote: Any, **options: Any) -> TransferResult:
        """Copy a file or directory to the machine, as :meth:`CloreClient.upload` does."""
        return self._over_ssh(self._client.upload, (local, remote), options)  # type: ignore[no-any-return]

    def download(self, remote: Any, local: Any, **options: Any) -> TransferResult:
        """Copy a file or directory from the machine, as :meth:`CloreClient.download` does."""
        return self._over_ssh(self._client.download, (remote, local), options)  # type: ignore[no-any-return]

    def _over_ssh(
        self, method: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Call a method of the client with the rental's own connection."""
        from clore_client.ssh.connect import LOGIN_OPTIONS

        worker = self._open_worker()
        login = {name: options.pop(name) for name in LOGIN_OPTIONS & options.keys()}
        if self._shell is None or not _is_open(self._shell):
            self._shell = self.ssh(**login)
        try:
            return method(self.order, *arguments, ssh=self._shell, **options)
        finally:
            worker.check()

    def keep(self) -> Order:
        """Leave the order running, on purpose: the end of the block does nothing any more.

        Neither budget nor signals end it from here on.
        """
        worker, order = self._open_worker(), self.order
        if worker.finished.is_open:
            raise RentalError(f"order {order.id} was ended already: it can't be kept")
        worker.keep()
        return order

    def _open_worker(self) -> RentalWorker:
        """The worker, where the rental was not ended from elsewhere."""
        if self._worker is None:
            raise RentalError("nothing is rented: use it as `with client.rent(...) as rental:`")
        self._worker.check()
        return self._worker

    # --- the block ---

    def __enter__(self) -> Rental:
        if self._worker is not None:
            raise RentalError("a rental can be entered only once: call rent() again")
        holders: list[weakref.ref[Any]] = [weakref.ref(self, self._inbox.put)]
        if self._block is not None and self._block() is not None:
            holders.append(self._block)
        self._worker = RentalWorker(self._client, self._wish, self._folder, self._inbox, holders)
        try:
            self._worker.start()
            self._walk(self._worker)
        except BaseException as error:
            self._leave(type(error), error)
            raise
        return self

    __exit__ = _BlockExit()

    def _leave(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Give the server back, and raise what the user must know beyond ``error``."""
        worker = self._worker
        if worker is None or worker.pid != os.getpid():
            return  # a forked child: the order is its parent's
        interrupts: list[BaseException] = []
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        while not worker.closed:
            try:
                interrupts += worker.leave(interrupted)
                worker.close()
            except (KeyboardInterrupt, SystemExit) as late:  # between two lines of these
                interrupts.append(late)
                interrupted = True
        self._shell = None
        _raise_beyond(error, worker, interrupts)

    # --- the walk ---

    def _walk(self, worker: RentalWorker) -> None:
        wish, client = self._wish, self._client
        worker.note_orders(client.get_orders())
        servers, nothing = candidates(client, wish)
        for server in servers[: wish.attempts]:
            worker.check()
            reason = self._try(worker, server)
            if reason is None:
                return
            logger.info("server %s: %s", server.id, reason)
            self.tried.append((server.id or 0, reason))
        tried = "; ".join(f"server {server_id}: {why}" for server_id, why in self.tried)
        raise RentalError(
            f"none of {len(self.tried)} servers worked: {tried}" if tried else nothing,
            tried=tuple(self.tried),
        )

    def _try(self, worker: RentalWorker, server: Server) -> str | None:
        """Rent a server; None when it runs, else why it did not work."""
        try:
            order = self._buy(worker, server)
        except NEXT_CANDIDATE as error:
            return str(error)
        self._order, self._server = order, server
        reason = self._too_dear(worker, order, server) or self._deploy(worker, order, server)
        if reason is None:
            return None
        worker.check()
        failure = worker.end_order()
        self._order = self._server = None
        if failure is not None:
            raise failure
        return reason

    def _buy(self, worker: RentalWorker, server: Server) -> Order:
        wish = self._wish
        price = wish.price_of(server)
        settings = {**wish.settings, "find_timeout": wish.find_timeout}
        if wish.spot:
            settings["spot_price"] = price
            # The rate for the bid, now: what is asked for later would count as time that costs.
            self._client.get_spot_market(server.id)
        return worker.buy(server, price, settings)

    def _deploy(self, worker: RentalWorker, order: Order, server: Server) -> str | None:
        """Wait until an order runs; None then, else why it does not."""
        wish = self._wish
        try:
            running: Order = self._client.wait_for_order(
                order.id, timeout=wish.deploy_timeout, poll_interval=wish.poll_interval
            )
        except (WaitTimeoutError, OrderEndedError) as error:
            return str(error)
        if "ssh_password" in order:
            running["ssh_password"] = order["ssh_password"]
        self._order = running
        reason = self._too_dear(worker, running, server)
        if reason is None:
            worker.check()
        return reason

    def _too_dear(self, worker: RentalWorker, order: Order, server: Server) -> str | None:
        price = shown_usd(order, server, self._wish.currency)
        if price is not None:
            worker.told_price(price)
        if not self._wish.over(price):
            return None
        return f"order {order.id} costs {price:.4g} USD per hour, over the limit"


def _raise_beyond(
    error: BaseException | None, worker: RentalWorker, interrupts: list[BaseException]
) -> None:
    """Raise what the user must know beyond the exception that a block was left by.

    Parameters:
        error: that exception.
        worker: which has ended the rental, or was interrupted.
        interrupts: what came while it was ended.
    """
    failure = worker.failure
    note = None if failure is None else str(failure)
    plain = error is None or isinstance(error, Exception)
    exceeded = worker.exceeded
    if exceeded is not None and plain and not _is_of(error, exceeded[3]):
        raised: BaseException = worker.budget_error()
        if note:
            add_note_to(raised, note)
        raise raised from error
    if plain and not interrupts and worker.signalled is not None and not worker.kept:
        interrupts = [SignalExit(worker.signalled)]
    if interrupts and plain:
        if note:
            add_note_to(interrupts[-1], note)
        raise interrupts[-1]
    if error is None and failure is not None:
        raise failure
    if error is not None and note and error is not failure:
        add_note_to(error, note)


def _is_of(error: BaseException | None, order_id: int | None) -> bool:
    return isinstance(error, BudgetExceededError) and error.order_id == order_id


def _is_open(ssh: Any) -> bool:
    transport = ssh.get_transport()
    return transport is not None and transport.is_active()
