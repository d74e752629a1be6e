"""Keep the orders of one rental and their cost, in memory and in the journal, and end them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clore_client.api.request import limited
from clore_client.errors import (
    CancelUnconfirmedError,
    CloreError,
    OutcomeUnknownError,
    RentalError,
)
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.orders.account import SHORTEST_LIMIT, AccountOrders
from clore_client.orders.cancel import Cancellation, confirm_until
from clore_client.orders.credentials import can_be_order_of, purchase_fields
from clore_client.pricing import creation_fee_after, with_fee
from clore_client.rental.journal import (
    JournalEntry,
    forget_kept,
    read_entries,
    record_kept,
    write_entry,
)
from clore_client.rental.selection import RentalSettings

MIN_ABSENT_LISTS = 6  # an order counts as absent if at least this many lists do not have it
LIST_PATIENCE = 10.0  # seconds for a list of orders while another order runs
SEARCH_INTERVAL = 2.0  # seconds between two searches for an order that may exist
CHECK_INTERVAL = 1.0  # seconds between two checks of the limits
FEE_LEAD = 5.0  # the budget counts the creation fee this many seconds early


class Meter:
    """Count the cost of one order. A new bid changes its price.

    Attributes:
        counts: whether there is an order to pay for.
    """

    def __init__(self, usd_per_hour: float | None, fee: float, age: float = 0.0) -> None:
        self._started = time.monotonic() - age, time.time() - age
        self.counts = True
        self._fee = fee
        self._prices: list[tuple[float, float]] = [(0.0, usd_per_hour or 0.0)]  # (since, price)
        self._stopped_at: float | None = None  # the age of the order then

    def age(self) -> float:
        """Return the age of the order in seconds, by the larger of two clocks.

        The monotonic clock can stop while a laptop sleeps, but the order still costs money.
        """
        monotonic, wall = self._started
        return max(0.0, time.monotonic() - monotonic, time.time() - wall)

    def correct(self, usd_per_hour: float) -> None:
        """Correct the price from the start, unless a bid has changed it."""
        if len(self._prices) == 1:
            self._prices = [(0.0, usd_per_hour)]

    def change(self, usd_per_hour: float) -> None:
        """Set the price from now on."""
        self._prices.append((self.age(), usd_per_hour))

    def stop(self) -> None:
        """Stop the cost, because the cancel was accepted. Safe to repeat."""
        if self._stopped_at is None:
            self._stopped_at = self.age()

    def usd(self, fee_lead: float = 0.0) -> float:
        """Return the cost so far in USD, with all fees.

        Parameters:
            fee_lead: count the creation fee so many seconds early, while the order runs.
        """
        if not self.counts:
            return 0.0
        end, lead = self._stopped_at, 0.0
        if end is None:
            end, lead = self.age(), fee_lead
        prices = list(self._prices)
        changes = [*(since for since, _ in prices[1:]), end]
        rent = sum(
            price * max(0.0, min(until, end) - since) / 3600.0
            for (since, price), until in zip(prices, changes, strict=True)
        )
        return with_fee(rent, self._fee) + creation_fee_after(end + lead)


class Budget:
    """Check the limits of a rental against the cost of its orders."""

    def __init__(self, settings: RentalSettings) -> None:
        self._max_hours, self._max_cost = settings.max_hours, settings.max_cost_usd
        self._fee = settings.search.fee
        self._meters: list[Meter] = []

    @property
    def hours(self) -> float:
        """The hours since the first order was sent."""
        return max((m.age() for m in list(self._meters) if m.counts), default=0.0) / 3600.0

    @property
    def cost_usd(self) -> float:
        """The cost of all orders so far, in USD."""
        return sum(meter.usd() for meter in list(self._meters))

    def start(self, usd_per_hour: float | None, age: float = 0.0) -> Meter:
        """Start to count another order, which has an age in seconds."""
        meter = Meter(usd_per_hour, self._fee, age)
        self._meters.append(meter)
        return meter

    def exceeded_by(self) -> str | None:
        """Return a text about the limit that is reached, or None."""
        if self._max_hours is not None and self.hours >= self._max_hours:
            return f"max_hours={self._max_hours:g} is reached"
        soon = sum(meter.usd(FEE_LEAD) for meter in list(self._meters))
        if self._max_cost is not None and soon >= self._max_cost:
            return f"max_cost_usd={self._max_cost:g} is reached"
        return None

    @property
    def seconds_between_checks(self) -> float | None:
        """The seconds between two checks; None without a limit."""
        return None if self._max_hours is None and self._max_cost is None else CHECK_INTERVAL


class RentalOrder:
    """Keep one order of a rental, from the purchase to its confirmed end.

    Attributes:
        server_id: the server.
        entry: its journal entry.
        meter: its cost.
        order_id: the order id; None while the outcome of the purchase is not known.
        refused: whether the API refused the order with code 1, after which it may still exist.
        lost: the purchase of ``create_order``, if its outcome is not known.
        absent: monotonic times of the lists in a row that did not have the order.
        cancellation: its cancel, as soon as the order id is known.
    """

    def __init__(self, server_id: int, entry: JournalEntry | None, meter: Meter) -> None:
        self.server_id = server_id
        self.entry = entry
        self.meter = meter
        self.sent_at = time.monotonic()
        self.order_id: int | None = None
        self.refused = False
        self.lost: Any = None
        self.absent: list[float] = []
        self.cancellation: Cancellation | None = None

    @property
    def accepted(self) -> bool:
        """True if its cancel was accepted."""
        return self.cancellation is not None and self.cancellation.accepted

    def __str__(self) -> str:
        if self.order_id is None:
            return f"an order of server {self.server_id} may have been made"
        return f"order {self.order_id} may still be running"


class RentalOrders:
    """Keep and end the orders of a rental that cost money, or may cost money.

    Attributes:
        before: ids of orders that existed before the rental.
        block_ended_at: monotonic time at which the block ended; None before that.
        skip_confirmation: skip the confirmation, after an interrupt during the cleanup.
        abandoned: stop the cleanup, after three interrupts; ``leftovers()`` finds the orders.
    """

    def __init__(
        self,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        budget: Budget,
    ) -> None:
        self._orders = orders
        self._settings = settings
        self._folder = folder
        self._budget = budget
        self._all: list[RentalOrder] = []
        self.before: set[int] = set()
        self.block_ended_at: float | None = None
        self.skip_confirmation = False
        self.abandoned = False

    # --- purchases ---

    def record_intent(self, server_id: int, price: float | None) -> RentalOrder:
        """Record a purchase in the journal and in memory, before it is sent."""
        entry = write_entry(self._folder, self._entry_fields(server_id))
        purchase = RentalOrder(server_id, entry, self._budget.start(price))
        self._all.append(purchase)
        return purchase

    def _entry_fields(self, server_id: int) -> dict[str, Any]:
        client = self._orders.client
        fields = purchase_fields(server_id, self._settings, self.before, client.server_clock)
        return {**fields, "base_url": client.base_url, "account": self._orders.account}

    def adopt(self, order: Order, ends: bool) -> RentalOrder:
        """Take over an order that exists.

        Parameters:
            order: the order.
            ends: whether the rental ends it, which the journal must then know.
        """
        server_id, order_id = order.server_id or 0, order.id or 0
        clock = time.time() + (self._orders.client.server_clock or 0.0)
        age = 0.0 if order.started_at is None else max(0.0, clock - order.started_at)
        entry = write_entry(self._folder, self._entry_fields(server_id)) if ends else None
        purchase = RentalOrder(server_id, entry, self._budget.start(order.usd_per_hour, age))
        if ends:
            self._all.append(purchase)
        self.set_order_id(purchase, order_id)
        if ends:
            forget_kept(self._folder, self._orders.account, order_id)
        return purchase

    def keep(self, purchase: RentalOrder, until: float | None) -> None:
        """Leave an order to the user, and record that.

        Parameters:
            purchase: the order.
            until: Unix time at which ``cancel_overdue()`` ends it, or None.

        Raises:
            RentalError: the deadline can't be recorded.
        """
        data = {**self._entry_fields(purchase.server_id), "order_id": purchase.order_id}
        if not record_kept(self._folder, data, until) and until is not None:
            raise RentalError(
                f"order {purchase.order_id} is not kept, because its deadline can't be recorded: "
                "set state_dir to a folder that can be written, or keep it without max_hours"
            )
        self.forget(purchase)

    def set_order_id(self, purchase: RentalOrder, order_id: int) -> None:
        """Record the order id of a purchase."""
        self._orders.claims.take(order_id, purchase)  # unless create_order() has claimed it
        if purchase in self._all:  # the rental ends it
            self._orders.claims.rented.add(order_id)
        purchase.order_id = order_id
        purchase.cancellation = Cancellation(self._orders, order_id)
        purchase.meter.counts = True
        if purchase.entry is not None:
            purchase.entry.write_order_id(order_id)
        self._orders.bid_listeners[order_id] = purchase.meter.change

    def mark_refused(self, purchase: RentalOrder) -> None:
        """Record that the API refused a purchase with code 1; its order may still exist."""
        purchase.refused = True
        purchase.sent_at = time.monotonic()  # if there is an order, it was made before now
        purchase.meter.counts = False

    def forget(self, purchase: RentalOrder) -> None:
        """Remove a purchase whose order does not exist, has ended, or is kept."""
        if purchase.entry is not None:
            purchase.entry.remove()
        self._remove(purchase)

    def _give_up(self, purchase: RentalOrder, failure: CloreError) -> CloreError:
        """Leave a purchase to ``leftovers()``. Return ``failure``, the error for the user."""
        if purchase.entry is not None:
            purchase.entry.abandoned = True
        self._remove(purchase)
        logger.error("%s", failure)
        return failure

    def _remove(self, purchase: RentalOrder) -> None:
        if purchase in self._all:
            self._all.remove(purchase)
        purchase.meter.counts = purchase.order_id is not None
        self._orders.bid_listeners.pop(purchase.order_id or 0, None)

    # --- the end ---

    def record_block_end(self) -> None:
        """Record that the block has ended, which sets the deadline for cancels."""
        self.block_ended_at = self.block_ended_at or time.monotonic()

    def deadline(self) -> float:
        """Return the deadline for cancels; there is none before the block has ended."""
        if self.block_ended_at is None:
            return math.inf
        return self.block_ended_at + self._settings.cancel_timeout

    def end_all(self) -> CloreError | None:
        """End all orders, the cancels first. Return None, or the first failure."""
        started = time.monotonic()
        known = [purchase for purchase in self._all if purchase.order_id is not None]
        unknown = [purchase for purchase in self._all if purchase.order_id is None]
        failures: list[CloreError | None] = [self._cancel(p, self.deadline) for p in known]
        failures += [self._reconcile(purchase) for purchase in unknown]
        failures += [self._confirm(purchase, started) for purchase in list(self._all)]
        return next((failure for failure in failures if failure is not None), None)

    def end(self, purchase: RentalOrder) -> CloreError | None:
        """End one order. Return None if that is confirmed, else the error."""
        started = time.monotonic()
        until = started + self._settings.cancel_timeout
        failure = self._cancel(purchase, lambda: min(until, self.deadline()))
        return self._confirm(purchase, started) if failure is None else failure

    def abandon(self) -> CloreError | None:
        """Stop the cleanup, and leave the orders to ``leftovers()``. Return an error if any."""
        self.abandoned = True
        left = list(self._all)
        for purchase in left:
            if purchase.entry is not None:
                purchase.entry.abandoned = True
        if not left:
            return None
        ids = tuple(p.order_id for p in left if p.order_id is not None)
        text = f"interrupted three times, and {'; '.join(map(str, left))}: call leftovers() later"
        return CancelUnconfirmedError(text, order_ids=ids) if ids else OutcomeUnknownError(text)

    def try_to_cancel(
        self,
        purchase: RentalOrder,
        deadline: Callable[[], float],
        stop: Callable[[], bool] = lambda: False,
    ) -> CloreError | None:
        """Cancel an order until that is accepted. Return None, or the error."""
        failure: CloreError | None = None
        if purchase.cancellation is not None and not purchase.accepted:
            failure = purchase.cancellation.run(
                deadline, confirm=False, stop=lambda: self.abandoned or stop()
            )
        if failure is None:  # the order costs nothing from now on
            purchase.meter.stop()
        return failure

    def _cancel(self, purchase: RentalOrder, deadline: Callable[[], float]) -> CloreError | None:
        """Cancel an order until that is accepted, or leave it to ``leftovers()``."""
        failure = self.try_to_cancel(purchase, deadline)
        return None if failure is None else self._give_up(purchase, failure)

    def _confirm(self, purchase: RentalOrder, started: float) -> CloreError | None:
        """Wait until a cancelled order is listed as ended."""
        order_id = purchase.order_id or 0
        deadline = confirm_until(started, self._settings.cancel_timeout)
        failure: CloreError | None = None
        if purchase.cancellation is not None and not self.skip_confirmation:
            failure = purchase.cancellation.run(
                lambda: deadline, confirm=True, stop=lambda: self.skip_confirmation
            )
            if failure is None:
                self.forget(purchase)
                self.before.add(order_id)
                return None
        if failure is None or self.skip_confirmation:
            failure = CloreError(
                f"order {order_id} was cancelled, but an interrupt skipped the confirmation that "
                "it has ended: call leftovers() later"
            )
        return self._give_up(purchase, failure)

    # --- purchases with unknown outcome ---

    def unresolved(self) -> list[RentalOrder]:
        """Return the purchases refused with code 1 whose order may exist, and is not cancelled."""
        return [p for p in self._all if p.refused and not p.accepted]

    def search_unresolved(self, stop: Callable[[], bool]) -> None:
        """Search once for the orders of unresolved purchases, and cancel those that exist.

        Parameters:
            stop: returns whether something else is more urgent; a cancel then continues later.
        """
        until = time.monotonic() + self._settings.cancel_timeout
        for purchase in self.unresolved():
            server_id = purchase.server_id
            if purchase.order_id is None:
                try:
                    if self._search(purchase):
                        self.forget(purchase)
                except CloreError as error:
                    logger.debug("an order of server %d can't be searched: %s", server_id, error)
                if purchase.order_id is None:
                    continue
                logger.warning(
                    "order %d of server %d exists although the API refused it: cancelling it",
                    purchase.order_id,
                    server_id,
                )
            self.try_to_cancel(purchase, lambda: until, stop)

    @property
    def search_interval(self) -> float:
        """The seconds between two searches."""
        return min(SEARCH_INTERVAL, max(0.001, self._orders.client.order_lag / MIN_ABSENT_LISTS))

    def _reconcile(self, purchase: RentalOrder) -> CloreError | None:
        """Search for the order of a purchase until it is cancelled, or time has run out."""
        logger.warning("an order of server %d may exist: searching for it", purchase.server_id)
        cause: BaseException | None = None
        absent = False
        while not self.abandoned:
            try:
                absent, cause = self._search(purchase), None
            except CloreError as error:
                cause = error
            if purchase.order_id is not None:
                return self._cancel(purchase, self.deadline)
            left = self.deadline() - time.monotonic()
            if absent or left <= 0:
                break
            time.sleep(min(left, self.search_interval))
        if absent and purchase.refused:
            self.forget(purchase)
            return None
        unknown = OutcomeUnknownError(
            f"{purchase}, but it did not show up: call leftovers() or get_orders() in a minute",
            endpoint="/v1/create_order",
        )
        unknown.__cause__ = cause
        return self._give_up(purchase, unknown)

    def _search(self, purchase: RentalOrder) -> bool:
        """Search once for the order of a purchase. Return True if it is confirmed absent.

        A new order can take ``order_lag`` seconds to be listed, and a list can be empty for a
        moment. So several lists over ``order_lag`` seconds must not have it.
        """
        asked_at = time.monotonic()
        deadline = max(asked_at + SHORTEST_LIMIT, self.deadline())
        if self.block_ended_at is None:  # the limits of the rental must still be checked
            deadline = asked_at + LIST_PATIENCE
        absent = purchase.absent
        try:
            orders = limited(self._orders.active, deadline=deadline, urgent=True)
        except CloreError:
            absent.clear()  # a read that failed breaks the series
            raise
        fitting = self._fitting(orders, purchase)
        if len(fitting) == 1 and not self._is_held(purchase):
            self.set_order_id(purchase, fitting[0].id or 0)
        lag = self._orders.client.order_lag
        if fitting:
            absent.clear()
        elif asked_at >= purchase.sent_at + lag and self._is_complete(orders):
            absent.append(asked_at)
        return len(absent) >= MIN_ABSENT_LISTS and absent[-1] - absent[0] >= lag

    def _is_complete(self, orders: list[Order]) -> bool:
        """Return whether a list has all orders of this rental that must be active."""
        running = {p.order_id for p in self._all if p.order_id is not None and not p.accepted}
        return running <= {order.id for order in orders}

    def _fitting(self, orders: list[Order], purchase: RentalOrder) -> list[Order]:
        """Return the orders that can be the result of a purchase, and of no other one."""
        settings, claims = self._settings, self._orders.claims
        if purchase.lost is None:
            purchase.lost = claims.unresolved.get(purchase.server_id)
        fitting = [
            order
            for order in orders
            if order.server_id == purchase.server_id
            and order.id not in self.before
            and order.id not in claims.rented
            and can_be_order_of(order, settings.image, settings.currency, settings.spot)
        ]
        if (lost := purchase.lost) is None:  # create_order() has claimed its own order
            return fitting
        return claims.free([order for order in fitting if lost.matches(order)], lost)

    def _is_held(self, purchase: RentalOrder) -> bool:
        """Return whether a living rental of another process may own the order of a purchase."""
        wanted = {"server_id": purchase.server_id, "account": self._orders.account}
        held = False
        for entry in read_entries(self._folder):
            mine = purchase.entry is not None and entry.path == purchase.entry.path
            if not (mine or entry.abandoned) and wanted.items() <= entry.data.items():
                held = True
            entry.close()
        return held
