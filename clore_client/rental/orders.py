"""Keep track of the orders of one rental, in memory and in the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clore_client.errors import RentalError
from clore_client.models.order import Order
from clore_client.orders.account import AccountOrders
from clore_client.orders.cancel import Cancellation
from clore_client.orders.claims import can_be_order_of, purchase_facts
from clore_client.rental.budget import Budget, Meter
from clore_client.rental.journal import JournalEntry, read_entries, write_entry
from clore_client.rental.kept import forget_kept, record_kept
from clore_client.rental.selection import RentalSettings

MIN_ABSENT_LISTS = 6  # an order counts as absent if at least this many lists do not have it


class RentalOrder:
    """One order of a rental, from the purchase to its confirmed end.

    Attributes:
        server_id: the server.
        entry: its journal entry.
        meter: its cost.
        order_id: the order id; None while the outcome of the purchase is not known.
        refused: whether the API refused the order with code 1, after which it may still exist.
        absent: monotonic times of the lists in a row that did not have the order.
    """

    def __init__(self, server_id: int, entry: JournalEntry | None, meter: Meter) -> None:
        self.server_id = server_id
        self.entry = entry
        self.meter = meter
        self.sent_at = time.monotonic()
        self.order_id: int | None = None
        self.refused = False
        self._cancellation: Cancellation | None = None
        self.absent: list[float] = []

    @property
    def accepted(self) -> bool:
        """True if its cancel was accepted."""
        return self._cancellation is not None and self._cancellation.accepted

    def cancellation(self, orders: AccountOrders) -> Cancellation:
        """Return the cancellation of this order, always the same one."""
        if self._cancellation is None:
            self._cancellation = Cancellation(orders, self.order_id or 0)
        return self._cancellation

    def __str__(self) -> str:
        return (
            f"order {self.order_id} may still be running"
            if self.order_id is not None
            else f"an order of server {self.server_id} may have been made"
        )


class RentalOrders:
    """All purchases of a rental that cost money or may cost money.

    Attributes:
        before: ids of orders that existed before the rental.
    """

    def __init__(
        self,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        budget: Budget,
        wake: Callable[[], object],
        taken: Callable[[], set[int | None]],
    ) -> None:
        self._orders = orders
        self._settings = settings
        self._folder = folder
        self._budget = budget
        self._wake = wake  # called when the price of an order changes
        self._taken = taken  # returns the order ids of all open rentals of this account
        self._all: list[RentalOrder] = []
        self.before: set[int] = set()

    def __iter__(self) -> Iterator[RentalOrder]:
        return iter(list(self._all))

    def record_intent(self, server_id: int, price: float | None) -> RentalOrder:
        """Record a purchase in the journal and in memory, before it is sent."""
        entry = write_entry(self._folder, self._facts(server_id))
        purchase = RentalOrder(server_id, entry, self._budget.start(price))
        self._all.append(purchase)
        return purchase

    def _facts(self, server_id: int) -> dict[str, Any]:
        client = self._orders.client
        facts = purchase_facts(server_id, self._settings, self.before, client.server_clock)
        return {**facts, "base_url": client.base_url, "account": self._orders.account}

    def adopt(self, order: Order, age: float, ends: bool) -> RentalOrder:
        """Take over an order that exists.

        Parameters:
            order: the order.
            age: its age in seconds.
            ends: whether the rental ends it, which the journal must then know.
        """
        server_id, order_id = order.server_id or 0, order.id or 0
        entry = write_entry(self._folder, self._facts(server_id)) if ends else None
        purchase = RentalOrder(server_id, entry, self._budget.start(order.usd_per_hour, age))
        if ends:
            self._all.append(purchase)
        self.set_order_id(purchase, order_id)
        if ends:
            forget_kept(self._folder, self._orders.account, order_id)
        return purchase

    def keep(self, purchase: RentalOrder, until: float | None) -> None:
        """Hand an order over to the user.

        Parameters:
            purchase: the order.
            until: Unix time at which ``cancel_overdue()`` ends it, or None.

        Raises:
            RentalError: the deadline can't be recorded.
        """
        data = {**self._facts(purchase.server_id), "order_id": purchase.order_id}
        if not record_kept(self._folder, data, until) and until is not None:
            raise RentalError(
                f"order {purchase.order_id} is not kept, because its deadline can't be recorded: "
                "set state_dir to a folder that can be written, or keep it without max_hours"
            )
        self.forget(purchase)

    def set_order_id(self, purchase: RentalOrder, order_id: int) -> None:
        """Record the order id of a purchase."""
        purchase.order_id = order_id
        purchase.meter.counts = True
        if purchase.entry is not None:
            purchase.entry.write_order_id(order_id)

        def new_bid(usd_per_hour: float) -> None:
            purchase.meter.change(usd_per_hour)
            self._wake()

        self._orders.bid_listeners[order_id] = new_bid

    def mark_refused(self, purchase: RentalOrder) -> None:
        """Record that the API refused a purchase with code 1; its order may still exist."""
        purchase.refused = True
        purchase.sent_at = time.monotonic()  # if there is an order, it was made before now
        purchase.meter.counts = False

    def forget(self, purchase: RentalOrder) -> None:
        """Remove a purchase whose order does not exist, has ended, or stays on purpose."""
        if purchase.entry is not None:
            purchase.entry.remove()
        self._remove(purchase)

    def give_up(self, purchase: RentalOrder) -> None:
        """Leave a purchase to ``leftovers()``."""
        if purchase.entry is not None:
            purchase.entry.abandoned = True
        self._remove(purchase)

    def unresolved(self) -> list[RentalOrder]:
        """Return the purchases that the API refused with code 1, but that may have an order."""
        return [p for p in self._all if p.order_id is None and p.refused]

    def _remove(self, purchase: RentalOrder) -> None:
        if purchase in self._all:
            self._all.remove(purchase)
        purchase.meter.counts = purchase.order_id is not None
        self._orders.bid_listeners.pop(purchase.order_id or 0, None)

    def search_in(self, purchase: RentalOrder, orders: list[Order], asked_at: float) -> bool:
        """Look for the order of a purchase in a list. Return True if it is confirmed absent.

        A new order can take ``order_lag`` seconds to be listed, and a list can be empty for a
        moment. So several lists over ``order_lag`` seconds must not have it.

        Parameters:
            purchase: a purchase with unknown outcome.
            orders: the active orders.
            asked_at: monotonic time at which the list was requested.
        """
        fitting = [order for order in orders if self._fits(order, purchase)]
        if len(fitting) == 1 and not self._is_held(purchase):
            self.set_order_id(purchase, fitting[0].id or 0)
        lag = self._orders.client.order_lag
        if fitting:
            purchase.absent.clear()
        elif asked_at >= purchase.sent_at + lag and self._is_complete(orders):
            purchase.absent.append(asked_at)
        absent = purchase.absent
        return len(absent) >= MIN_ABSENT_LISTS and absent[-1] - absent[0] >= lag

    def search_interval(self, longest: float) -> float:
        """Return the seconds between two searches, at most ``longest``."""
        return min(longest, max(0.001, self._orders.client.order_lag / MIN_ABSENT_LISTS))

    def _is_complete(self, orders: list[Order]) -> bool:
        """Return whether a list has all orders of this rental that must be active."""
        running = {p.order_id for p in self._all if p.order_id is not None and not p.accepted}
        return running <= {order.id for order in orders}

    def _fits(self, order: Order, purchase: RentalOrder) -> bool:
        settings = self._settings
        return (
            order.server_id == purchase.server_id
            and order.id not in self.before
            and order.id not in self._taken()
            and can_be_order_of(order, settings.image, settings.currency, settings.spot)
        )

    def _is_held(self, purchase: RentalOrder) -> bool:
        """Return whether a living rental of another process could own the order."""
        held = False
        for entry in self._entries_for(purchase.server_id):
            mine = purchase.entry is not None and entry.path == purchase.entry.path
            held = held or not (mine or entry.abandoned)
            entry.close()
        return held

    def remove_dead_entries(self, server_id: int) -> None:
        """Remove entries of dead processes that would match an order of this rental."""
        if self._settings.spot:
            return  # one server can have several spot orders
        for entry in self._entries_for(server_id):
            if entry.abandoned and entry.of_this_machine and entry.order_id is None:
                entry.remove()
            entry.close()

    def _entries_for(self, server_id: int) -> list[JournalEntry]:
        """Return the entries for this server and account. The caller closes each."""
        account, found = self._orders.account, []
        for entry in read_entries(self._folder):
            data = entry.data
            if data.get("server_id") == server_id and data.get("account") == account:
                found.append(entry)
            else:
                entry.close()
        return found
