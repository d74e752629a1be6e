"""Read the orders of an account, and remember those that this client has made or seen."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from typing import Any, Protocol

from clore_client.api.call import Envelope
from clore_client.errors import CloreError, InvalidResponseError, OrderNotFoundError
from clore_client.market.market import Market, Requester
from clore_client.models.order import Order, to_orders
from clore_client.orders.claims import Claims, claims_for
from clore_client.validation import Timeout


class OrdersClient(Requester, Protocol):
    """What orders need of a client."""

    timeout: Timeout
    rate_limit: float
    backoff: float
    order_lag: float
    server_clock: float | None
    max_usd_per_hour: float | None
    max_active_orders: int | None

    @property
    def api_key(self) -> str | None: ...


class OrderState(enum.Enum):
    """What the two order lists say of an order."""

    ACTIVE = "active"
    ENDED = "ended"
    ABSENT = "absent"


class AccountOrders:
    """The orders of the account of a client.

    Attributes:
        client: by which they are read.
        market: whose rates give their prices in USD.
        made: order id -> the order as it was when this client made it.
        credentials: order id -> what was sent with it to get in.
        cancelled: ids of the orders that this client has cancelled.
        ended: ids of the orders that are known to have ended.
        bid_listeners: order id -> whom to tell of a new bid, in USD per hour.
    """

    def __init__(self, client: OrdersClient, market: Market) -> None:
        self.client = client
        self.market = market
        self.made: dict[int, Order] = {}
        self.credentials: dict[int, dict[str, str]] = {}
        self.cancelled: set[int] = set()
        self.ended: set[int] = set()
        self.bid_listeners: dict[int, Callable[[float], None]] = {}
        self._seen: set[int] = set()  # active, by this client
        self._own_claims = Claims()

    def shared_with(self, client: OrdersClient, market: Market) -> AccountOrders:
        """Return the same orders for a copy of the client."""
        twin = copy.copy(self)
        twin.client, twin.market = client, market
        return twin

    @property
    def claims(self) -> Claims:
        """Which orders of the account are taken; without a key this client has its own."""
        key = self.client.api_key
        return claims_for(self.client.base_url, key) if key else self._own_claims

    @property
    def known(self) -> set[int]:
        """Ids of all orders that this client has made, seen active, or cancelled."""
        return {*self.made, *self._seen, *self.cancelled}

    def read(self, completed: bool, **options: Any) -> tuple[list[Order], dict[str, Any]]:
        """Read one of the two lists; returns its orders and the whole answer.

        Parameters:
            completed: the list that has the orders that have ended, too.
            **options: for ``_request``.
        """
        params = {"return_completed": "true"} if completed else None
        answer = self.client._request("GET", "/v1/my_orders", params=params, **options)
        if isinstance(answer, Envelope) and not isinstance(answer.get("orders"), list):
            # An answer to something else, perhaps: it does not say that there is no order.
            raise InvalidResponseError(-1, "no list of orders", answer, endpoint="/v1/my_orders")
        data = self.market.data
        data.observe(answer)
        orders = to_orders(answer, self.cancelled, data.rates)
        self._seen.update(o.id for o in orders if o.id is not None and not o.has_ended)
        return orders, answer

    def active(self) -> list[Order]:
        """Read the orders that have not ended."""
        return [order for order in self.read(completed=False)[0] if not order.has_ended]

    def find(self, order_id: int) -> Order | None:
        """Return an order; the ended ones are read only when it is not active."""
        for completed in (False, True):
            for order in self.read(completed)[0]:
                if order.id == order_id:
                    return order
        return None

    def state(self, order_id: int) -> OrderState:
        """Return what the two lists say of an order.

        Raises:
            OrderNotFoundError: it is the number of a server.
            CloreError: the lists can't be read, or are not whole.
        """
        for completed in (False, True):
            orders, answer = self.read(completed)
            for order in orders:
                if order.id == order_id:
                    return OrderState.ENDED if order.has_ended else OrderState.ACTIVE
                if order.server_id == order_id and not order.has_ended:
                    raise OrderNotFoundError(
                        f"there is no order {order_id}: that is the server of order {order.id}",
                        order_id=order_id,
                    )
            listed = answer.get("orders")
            ids = [order.id for order in orders if order.id is not None]
            if not isinstance(listed, list) or len(ids) != len(listed):
                raise CloreError("the orders are not listed whole: that decides nothing")
        return OrderState.ABSENT

    def active_ids(self) -> list[int]:
        """Return the orders that cost money, and those that may, though no list has them now."""
        orders, _ = self.read(completed=False)
        active = [order.id for order in orders if order.id is not None and not order.has_ended]
        missing = self.known - set(active) - self.ended
        if missing - self.cancelled:
            completed, _ = self.read(completed=True)
            self.ended.update(o.id for o in completed if o.id is not None and o.has_ended)
        return active + sorted(missing - self.cancelled - self.ended)

    def tell_bid(self, order_id: int, usd_per_hour: float) -> None:
        """Tell whoever counts the cost of an order of its new price."""
        if (tell := self.bid_listeners.get(order_id)) is not None:
            tell(usd_per_hour)
