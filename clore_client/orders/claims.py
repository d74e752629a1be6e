"""Which order belongs to which purchase: no order is handed out twice."""

from __future__ import annotations

import threading
from typing import Any

from clore_client.config import PerAccount
from clore_client.models.order import Order


def same_purchase(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Whether an order can come of a purchase; a missing field contradicts nothing."""
    told = (order.get("image"), order.get("currency"), order.get("spot"))
    return all(
        not isinstance(value, kind) or value == wanted
        for value, kind, wanted in zip(told, (str, str, bool), (image, currency, spot), strict=True)
    )


class Claims:
    """Which orders of one account the purchases of this process have taken for theirs.

    Two purchases of the same server must not take each other's order, so they are made in turns.
    Everything here changes in one step, so that an interrupt leaves nothing half done.
    """

    def __init__(self) -> None:
        self._taken: dict[int, object] = {}  # order id -> the purchase that it came of
        # Server id -> the purchase whose outcome is not known.
        self.unresolved: dict[int, Any] = {}
        self._locks: dict[int, threading.Lock] = {}
        # Seconds that the orders' time of creation lies behind the server's clock, as a negative
        # number; learned from orders that were found.
        self.clock_offset = 0.0

    def lock(self, server_id: int) -> threading.Lock:
        """Return what to hold so that no other call of the process orders this server."""
        return self._locks.setdefault(server_id, threading.Lock())

    def take(self, order_id: int, purchase: object) -> bool:
        """Claim an order; False when another purchase has it already."""
        return self._taken.setdefault(order_id, purchase) is purchase

    def free(self, orders: list[Order], purchase: object) -> list[Order]:
        """Return those of ``orders`` that no other purchase has, the newest last."""
        found = {o.id: o for o in orders if self._taken.get(o.id or 0, purchase) is purchase}
        return [found[order_id] for order_id in sorted(i for i in found if i is not None)]


_claims = PerAccount(Claims)


def claims_for(base_url: str, api_key: str) -> Claims:
    """The claims of an account, which all clients of this process share."""
    return _claims.of(base_url, api_key)
