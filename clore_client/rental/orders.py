"""The orders of one rental: what is noted of them, and what became of those in doubt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clore_client.config import account_digest
from clore_client.models.order import Order
from clore_client.orders.account import AccountOrders
from clore_client.orders.cancel import Cancellation
from clore_client.orders.claims import same_purchase
from clore_client.rental.budget import Budget, Meter
from clore_client.rental.journal import JournalEntry, read_entries, write_entry
from clore_client.rental.selection import RentalSettings

LOOKS = 6  # how many lists must lack an order at least, before there is none


class RentalOrder:
    """One order of a rental, from the intent to its confirmed end.

    Attributes:
        server_id: the server that it is for.
        entry: its note in the state folder.
        meter: what it costs.
        order_id: None as long as it is not known whether there is an order.
        answered: the API has answered that there is none, which is not always true.
    """

    def __init__(self, server_id: int, entry: JournalEntry | None, meter: Meter) -> None:
        self.server_id = server_id
        self.entry = entry
        self.meter = meter
        self.sent_at = time.monotonic()
        self.order_id: int | None = None
        self.answered = False
        self._cancellation: Cancellation | None = None
        self.absent: list[float] = []  # when it was asked for, and was in no list

    @property
    def accepted(self) -> bool:
        """Whether its cancel was accepted."""
        return self._cancellation is not None and self._cancellation.accepted

    def cancellation(self, orders: AccountOrders) -> Cancellation:
        """Return the one end of this order."""
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
    """All purchases of a rental that cost money, or may.

    Attributes:
        before: ids of the orders that are not its own.
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
        self._taken = taken  # gives the orders of all open rentals of this account
        self._all: list[RentalOrder] = []
        self.before: set[int] = set()

    def __iter__(self) -> Iterator[RentalOrder]:
        return iter(list(self._all))

    def note_intent(self, server_id: int, price: float | None) -> RentalOrder:
        """Note a purchase in the state folder and here, before it is sent."""
        settings = self._settings
        entry = write_entry(
            self._folder,
            {
                "server_id": server_id,
                "started": time.time(),
                "server_clock": self._orders.client.server_clock,
                "image": settings.image,
                "currency": settings.currency,
                "spot": settings.spot,
                "base_url": self._orders.client.base_url,
                "account": self._account(),
                "before": sorted(self.before),
            },
        )
        purchase = RentalOrder(server_id, entry, self._budget.start(price))
        self._all.append(purchase)
        return purchase

    def became(self, purchase: RentalOrder, order_id: int) -> None:
        """Note which order a purchase became."""
        purchase.order_id = order_id
        self._budget.resume(purchase.meter)
        if purchase.entry is not None:
            purchase.entry.note_order(order_id)

        def new_bid(usd_per_hour: float) -> None:
            purchase.meter.change(usd_per_hour)
            self._wake()

        self._orders.bid_listeners[order_id] = new_bid

    def refused(self, purchase: RentalOrder) -> None:
        """Note that the API has answered that there is no order, which is not always true."""
        purchase.answered = True
        purchase.sent_at = time.monotonic()  # it was carried out by now, if it was
        self._budget.drop(purchase.meter)

    def forget(self, purchase: RentalOrder) -> None:
        """Drop a purchase of which nothing is left."""
        if purchase.entry is not None:
            purchase.entry.remove()
        self._remove(purchase)
        self._budget.drop(purchase.meter)

    def give_up(self, purchase: RentalOrder) -> None:
        """Leave a purchase to ``leftovers()``."""
        if purchase.entry is not None:
            purchase.entry.abandoned = True
        self._remove(purchase)
        if purchase.order_id is None:
            self._budget.drop(purchase.meter)

    def keep(self, purchase: RentalOrder) -> None:
        """Leave an order running on purpose."""
        if purchase.entry is not None:
            purchase.entry.remove()
        self._remove(purchase)

    def _remove(self, purchase: RentalOrder) -> None:
        if purchase in self._all:
            self._all.remove(purchase)
        self._orders.bid_listeners.pop(purchase.order_id or 0, None)

    def look_for(self, purchase: RentalOrder, orders: list[Order], asked_at: float) -> bool:
        """Look for the order of a purchase; True when time has shown that there is none.

        A new order can take ``order_lag`` seconds to be listed. As a list can be empty for a
        moment, several must lack it, over as long again.

        Parameters:
            purchase: whose outcome is in doubt.
            orders: the active ones.
            asked_at: monotonic time at which they were asked for.
        """
        fitting = [order for order in orders if self._fits(order, purchase)]
        if len(fitting) == 1 and not self._is_held(purchase):
            self.became(purchase, fitting[0].id or 0)
        lag = self._orders.client.order_lag
        if fitting:
            purchase.absent.clear()
        elif asked_at >= purchase.sent_at + lag and self._lists_ours(orders):
            purchase.absent.append(asked_at)
        absent = purchase.absent
        return len(absent) >= LOOKS and absent[-1] - absent[0] >= lag

    def _lists_ours(self, orders: list[Order]) -> bool:
        """Whether a list has all orders that surely run: one without them proves nothing."""
        running = {p.order_id for p in self._all if p.order_id is not None and not p.accepted}
        return running <= {order.id for order in orders}

    def _fits(self, order: Order, purchase: RentalOrder) -> bool:
        settings = self._settings
        return (
            order.server_id == purchase.server_id
            and order.id not in self.before
            and order.id not in self._taken()
            and fits_intent(order, settings.image, settings.currency, settings.spot)
        )

    def _is_held(self, purchase: RentalOrder) -> bool:
        """Whether another rental could be for the same server: hands off, then."""
        held = False
        for entry in self._notes_for(purchase.server_id):
            mine = purchase.entry is not None and entry.path == purchase.entry.path
            held = held or not (mine or entry.abandoned)
            entry.close()
        return held

    def drop_dead_notes(self, server_id: int) -> None:
        """Drop notes of dead processes that could be taken for an order that is ours."""
        if self._settings.spot:
            return  # several bids may stand on one server
        for entry in self._notes_for(server_id):
            if entry.abandoned and entry.of_this_machine and entry.order_id is None:
                entry.remove()
            entry.close()

    def _account(self) -> str:
        return account_digest(self._orders.client.base_url, self._orders.client.api_key)

    def _notes_for(self, server_id: int) -> list[JournalEntry]:
        """Return what is noted of this server for this account; each is to be closed."""
        account, notes = self._account(), []
        for entry in read_entries(self._folder):
            data = entry.data
            if data.get("server_id") == server_id and data.get("account") == account:
                notes.append(entry)
            else:
                entry.close()
        return notes


def fits_intent(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Whether an order that still runs can come of an intent."""
    return not order.has_ended and same_purchase(order, image, currency, spot)
