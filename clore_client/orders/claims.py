"""Assign orders to purchases, so that no two purchases get the same order."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from typing import Any

from clore_client.models.order import Order
from clore_client.models.record import whole_id
from clore_client.pricing import finite

# The allowed difference between the creation time of an order, by the server's clock, and the time
# of its entry, by this machine's clock. All in seconds.
CLOCKS_APART = 300.0
CLOCKS_COMPARED = 5.0  # if the entry has the difference of the clocks
LATEST_ORDER = 180.0  # a proxy can delay a request


def same_purchase(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Return whether an order can be the result of a purchase. Missing fields are ignored."""
    fields = (
        (order.get("image"), str, image),
        (order.get("currency"), str, currency),
        (order.get("spot"), bool, spot),
    )
    return all(not isinstance(value, kind) or value == wanted for value, kind, wanted in fields)


def can_be_order_of(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Return whether an order still runs and can be the result of a purchase."""
    return not order.has_ended and same_purchase(order, image, currency, spot)


def purchase_facts(
    server_id: int, wanted: Any, before: Collection[int], server_clock: float | None
) -> dict[str, Any]:
    """Return the facts by which :func:`matches_entry` finds the order of a purchase.

    Parameters:
        server_id: the server.
        wanted: has the ``image``, the ``currency``, and whether the order is ``spot``.
        before: ids of older orders.
        server_clock: seconds by which the server's clock is ahead, or None.
    """
    return {
        "server_id": server_id,
        "started": time.time(),
        "server_clock": server_clock,
        "image": wanted.image,
        "currency": wanted.currency,
        "spot": wanted.spot,
        "before": sorted(before),
    }


def matches_entry(data: dict[str, Any], order: Order) -> bool:
    """Return whether an order can be the result of an entry without an order id."""
    before = data.get("before")
    if order.server_id != whole_id(data.get("server_id")):
        return False
    if isinstance(before, list) and order.id in before:
        return False
    if not can_be_order_of(order, data.get("image"), data.get("currency"), data.get("spot")):
        return False
    started, made = finite(data.get("started")), order.started_at
    if started is None or made is None:
        return False
    ahead = finite(data.get("server_clock"))
    apart = CLOCKS_APART if ahead is None else CLOCKS_COMPARED
    return -apart <= made - started - (ahead or 0.0) <= LATEST_ORDER + apart


class Claims:
    """The orders of one account that the purchases of this process have claimed.

    Purchases of the same server are made one after the other, so that they can't claim each other's
    order. Each change is one atomic step, because an interrupt can come at any time.
    """

    def __init__(self) -> None:
        self._taken: dict[int, object] = {}  # order id -> its purchase
        self.unresolved: dict[int, Any] = {}  # server id -> a purchase with an unknown outcome
        self._locks: dict[int, threading.Lock] = {}
        # Seconds from the server's clock to the creation time of orders; 0 or negative.
        self.clock_offset = 0.0

    def lock(self, server_id: int) -> threading.Lock:
        """Return the lock to hold while a server is ordered."""
        return self._locks.setdefault(server_id, threading.Lock())

    def take(self, order_id: int, purchase: object) -> bool:
        """Claim an order. Return False if another purchase has it."""
        return self._taken.setdefault(order_id, purchase) is purchase

    def free(self, orders: list[Order], purchase: object) -> list[Order]:
        """Return the ``orders`` that no other purchase has claimed, the newest last."""
        found = {o.id: o for o in orders if self._taken.get(o.id or 0, purchase) is purchase}
        return [found[order_id] for order_id in sorted(i for i in found if i is not None)]
