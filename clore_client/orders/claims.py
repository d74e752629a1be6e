"""Assign orders to purchases, so that no two purchases get the same order."""

from __future__ import annotations

import threading
from typing import Any

from clore_client.config import PerAccount
from clore_client.models.order import Order


def same_purchase(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Return whether an order can be the result of a purchase. Missing fields are ignored."""
    fields = (
        (order.get("image"), str, image),
        (order.get("currency"), str, currency),
        (order.get("spot"), bool, spot),
    )
    return all(not isinstance(value, kind) or value == wanted for value, kind, wanted in fields)


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


_claims = PerAccount(Claims)


def claims_for(base_url: str, api_key: str) -> Claims:
    """Return the claims of an account, which all clients of this process share."""
    return _claims.of(base_url, api_key)
