"""rent(): a server found, ordered, awaited, and given back whatever happens."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from clore_client.candidates import (
    Wish,
    candidates,
    shown_usd,
)
from clore_client.commands import CommandResult
from clore_client.errors import (
    AuthenticationError,
    BidTooLowError,
    CloreAPIError,
    CloreConnectionError,
    ConfigurationError,
    CurrencyNotAllowedError,
    DatabaseError,
    FateUnknownError,
    OrderEndedError,
    RateUnknownError,
    RentalError,
    ServerAlreadyRentedError,
    ServerOfflineError,
    SpendingLimitError,
    WaitTimeoutError,
)
from clore_client.giving_back import add_note_to
from clore_client.log import logger
from clore_client.orders import Order
from clore_client.servers import Server
from clore_client.signals import SignalExit
from clore_client.state import write_entry
from clore_client.tenancy import Age, Tenancy
from clore_client.transferred import Transferred

if TYPE_CHECKING:
    import paramiko

# After these no order was made, and the next candidate may be had.
NEXT_CANDIDATE = (
    ServerAlreadyRentedError,
    ServerOfflineError,
    CurrencyNotAllowedError,
    BidTooLowError,
    DatabaseError,
)
# After these no order was made either, and the next candidate would fare no better.
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


class Rental(Tenancy):
    """A server rented for the length of a ``with`` block; made by ``CloreClient.rent``.

    Attributes:
        order: the order as it was when it started to run, with what was sent to get in.
        server: the server as it was listed.
        tried: (server id, why not) for each host that did not work.
    """

    def __init__(self, client: Any, wish: Wish, folder: Path | None) -> None:
        super().__init__(client, wish, folder)
        self.tried: list[tuple[int, str]] = []
        self._entered = False

    def __repr__(self) -> str:
        state = "kept" if self._kept else "open" if self._order_id is not None else "not open"
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

    def ssh(self, **options: Any) -> paramiko.SSHClient:
        """A connection to the machine, closed at the end of the block. Needs paramiko.

        Parameters:
            **options: for :meth:`CloreClient.connect_ssh`, as ``key_path=``.
        """
        self._check()
        try:
            connection = self._client.connect_ssh(self.order, **options)
        except Exception:
            self._check()  # it may have been ended meanwhile
            raise
        self._connections.append(connection)
        try:
            self._check()
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

    def upload(self, local: Any, remote: Any, **options: Any) -> Transferred:
        """Copy a file or directory to the machine, as :meth:`CloreClient.upload` does."""
        return self._over_ssh(self._client.upload, (local, remote), options)  # type: ignore[no-any-return]

    def download(self, remote: Any, local: Any, **options: Any) -> Transferred:
        """Copy a file or directory from the machine, as :meth:`CloreClient.download` does."""
        return self._over_ssh(self._client.download, (remote, local), options)  # type: ignore[no-any-return]

    def _over_ssh(
        self, method: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Call a method of the client with the rental's own connection."""
        from clore_client.ssh import LOGIN_OPTIONS

        self._check()
        login = {name: options.pop(name) for name in LOGIN_OPTIONS & options.keys()}
        if self._shell is None or not _is_open(self._shell):
            self._shell = self.ssh(**login)
        try:
            return method(self.order, *arguments, ssh=self._shell, **options)
        finally:
            self._check()

    def keep(self) -> Order:
        """Leave the order running, on purpose: the end of the block does nothing any more.

        Neither budget nor signals end it from here on.
        """
        self._check()
        order = self.order
        if self._order_id is None or self._accepted:
            raise RentalError(f"order {order.id} was ended already: it can't be kept")
        self._kept = True
        self._wake.put("kept")
        logger.info("order %s stays, on purpose", order.id)
        if self._entry is not None:
            self._entry.remove()
        self._forget()
        return order

    # --- the block ---

    def __enter__(self) -> Rental:
        if self._entered:
            raise RentalError("a rental can be entered only once: call rent() again")
        try:
            self._entered = True
            self._open()
            self._walk()
        except BaseException as error:
            self._out(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._out(error)

    def _out(self, error: BaseException | None) -> None:
        """Give the server back, and raise what the user must know beyond ``error``."""
        if self._pid != os.getpid():
            return  # a forked child: the order is its parent's
        failure = None if self._kept else self._end()
        if self._entry is not None and self._order_id is None:
            self._entry.remove()  # nothing came of it
        self._forget()
        self._close_ssh()
        note = None if failure is None else str(failure)
        plain = error is None or isinstance(error, Exception)
        if self._exceeded is not None and plain and not self._told_of_budget(error):
            exceeded = self._budget_error()
            if note:
                add_note_to(exceeded, note)
            if error is None:
                raise exceeded
            raise exceeded from error
        if plain and not self._noted and self._signalled is not None and not self._kept:
            self._noted.append(SignalExit(self._signalled))
        if self._noted and plain:
            interrupt = self._noted[-1]
            if note:
                add_note_to(interrupt, note)
            raise interrupt
        if error is None and failure is not None:
            raise failure
        if error is not None and note and error is not failure:
            add_note_to(error, note)

    # --- the walk ---

    def _walk(self) -> None:
        wish, client = self._wish, self._client
        self._before = {order.id for order in client.get_orders() if order.id is not None}
        servers, nothing = candidates(client, wish)
        for server in servers[: wish.attempts]:
            self._check()
            reason = self._try(server)
            if reason is None:
                return
            logger.info("server %s: %s", server.id, reason)
            self.tried.append((server.id or 0, reason))
        tried = "; ".join(f"server {server_id}: {why}" for server_id, why in self.tried)
        raise RentalError(
            f"none of {len(self.tried)} servers worked: {tried}" if tried else nothing,
            tried=tuple(self.tried),
        )

    def _try(self, server: Server) -> str | None:
        """Rent a server; None when it runs, else why it did not work."""
        wish = self._wish
        try:
            order = self._buy(server)
        except NEXT_CANDIDATE as error:
            return str(error)
        order_id = order.id or 0
        reason = self._too_dear(order, server)
        if reason is None:
            try:
                running = self._client.wait_for_order(
                    order_id, timeout=wish.deploy_timeout, poll_interval=wish.poll_interval
                )
            except (WaitTimeoutError, OrderEndedError) as error:
                reason = str(error)
            else:
                if "ssh_password" in order:
                    running["ssh_password"] = order["ssh_password"]
                self._order = running
                reason = self._too_dear(running, server)
                if reason is None:
                    self._check()
                    return None
        self._check()
        failure = self._end()
        self._order = self._server = None
        if failure is not None:
            raise failure
        if self._noted:
            raise self._noted.pop()
        return reason

    def _too_dear(self, order: Order, server: Server) -> str | None:
        price = shown_usd(order, server, self._wish.currency)
        if price is not None:
            self._price = price
        if not self._wish.over(price):
            return None
        return f"order {order.id} costs {price:.4g} USD per hour, over the limit"

    def _buy(self, server: Server) -> Order:
        wish, server_id = self._wish, server.id or 0
        settings = dict(wish.settings)
        if wish.spot:
            settings["spot_price"] = wish.price_of(server)
            # The rate for the bid, now: what is asked for later would count as time that costs.
            self._client.get_spot_market(server_id)
        self._price = wish.price_of(server)
        self._accepted = False
        self._entry = write_entry(
            self._folder,
            {
                "server_id": server_id,
                "started": time.time(),
                "server_clock": self._client._server_clock,
                "image": wish.image,
                "currency": wish.currency,
                "spot": wish.spot,
                "base_url": str(self._client.BASE_URL).rstrip("/"),
                "account": self._account(),
                "before": sorted(self._before),
            },
        )
        age = Age()
        self._age = age
        self._since = self._since or age
        self._sending = server_id
        try:
            order: Order = self._client.create_order(
                server_id, find_timeout=wish.find_timeout, **settings
            )
            if order.id is None:
                raise FateUnknownError("the answer to create_order names no order")
        except FateUnknownError:
            # The search for it has been done already.
            self._sending = self._age = None
            self._give_up()
            raise
        except SURELY_NO_ORDER as error:
            # Of an unknown code, or an answer that is no envelope, nobody knows what it means.
            if not isinstance(error, CloreAPIError) or error.code in self._client.ERROR_CODES:
                self._nothing_bought()
            raise
        self._order_id = order.id
        self._sending = None
        self._order, self._server = order, server
        if self._entry is not None:
            self._entry.note_order(order.id)
        self._settle_dead(server_id)
        self._wake = queue.SimpleQueue()
        budget = wish.max_hours is not None or wish.max_cost_usd is not None
        if budget or not self._main:
            threading.Thread(
                target=self._watch,
                args=(order.id, self._wake),
                name=f"clore-rental-{order.id}",
                daemon=True,
            ).start()
        return order

    def _settle_dead(self, server_id: int) -> None:
        """Drop notes of dead processes that could be taken for this order, which is ours."""
        if self._wish.spot:
            return  # several bids may stand on one server
        for entry in self._notes_for(server_id):
            if entry.free and entry.ours and entry.facts.get("order_id") is None:
                entry.remove()
            entry.close()

    def _nothing_bought(self) -> None:
        self._sending = self._age = None
        if not self._spent:
            self._since = None
        if self._entry is not None:
            self._entry.remove()
            self._entry = None


def _is_open(ssh: Any) -> bool:
    transport = ssh.get_transport()
    return transport is not None and transport.is_active()
