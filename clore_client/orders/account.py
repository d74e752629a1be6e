"""Read the orders of an account, and remember the orders of this client."""

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

SHORTEST_LIMIT = 1.0  # seconds; no request has a shorter time limit


class OrdersClient(Requester, Protocol):
    """The parts of ``CloreClient`` that the orders use."""

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
    """The state of an order in the two order lists."""

    ACTIVE = "active"
    ENDED = "ended"
    ABSENT = "absent"


class AccountOrders:
    """The orders of a client's account.

    Attributes:
        client: makes the requests.
        market: has the exchange rates for prices in USD.
        made: order id -> the order, as this client made it.
        credentials: order id -> the password, key and token that were sent with it.
        cancelled: ids of the orders that this client cancelled.
        ended: ids of the orders that have ended.
        bid_listeners: order id -> a function to call with a new bid, in USD per hour.
    """

    def __init__(self, client: OrdersClient, market: Market) -> None:
        self.client = client
        self.market = market
        self.made: dict[int, Order] = {}
        self.credentials: dict[int, dict[str, str]] = {}
        self.cancelled: set[int] = set()
        self.ended: set[int] = set()
        self.bid_listeners: dict[int, Callable[[float], None]] = {}
        self._seen: set[int] = set()  # ids of the orders that this client has seen active
        self._own_claims = Claims()

    def shared_with(self, client: OrdersClient, market: Market) -> AccountOrders:
        """Return these orders for a copy of the client."""
        twin = copy.copy(self)
        twin.client, twin.market = client, market
        return twin

    @property
    def claims(self) -> Claims:
        """The claims of the account, shared by its clients; without a key, this client's own."""
        key = self.client.api_key
        return claims_for(self.client.base_url, key) if key else self._own_claims

    @property
    def known(self) -> set[int]:
        """The ids of all orders that this client has made, seen active, or cancelled."""
        return {*self.made, *self._seen, *self.cancelled}

    def read(self, completed: bool, **options: Any) -> tuple[list[Order], dict[str, Any]]:
        """Read one of the two order lists, and return its orders and the whole response.

        Parameters:
            completed: read the list that includes the orders that have ended.
            **options: arguments of ``_request``.
        """
        params = {"return_completed": "true"} if completed else None
        response = self.client._request("GET", "/v1/my_orders", params=params, **options)
        if isinstance(response, Envelope) and not isinstance(response.get("orders"), list):
            # A response without a list does not mean that there are no orders.
            raise InvalidResponseError(
                -1, "the response has no list of orders", response, endpoint="/v1/my_orders"
            )
        data = self.market.data
        data.observe(response)
        orders = to_orders(response, self.cancelled, data.rates)
        self._seen.update(o.id for o in orders if o.id is not None and not o.has_ended)
        return orders, response

    def active(self) -> list[Order]:
        """Read the orders that have not ended."""
        return [order for order in self.read(completed=False)[0] if not order.has_ended]

    def find(self, order_id: int) -> Order | None:
        """Return an order, or None. Reads the ended orders only if it is not active."""
        for completed in (False, True):
            for order in self.read(completed)[0]:
                if order.id == order_id:
                    return order
        return None

    def state(self, order_id: int) -> OrderState:
        """Return the state of an order in the two lists.

        Raises:
            OrderNotFoundError: ``order_id`` is the number of a server.
            CloreError: the lists can't be read, or are not complete.
        """
        for completed in (False, True):
            orders, response = self.read(completed)
            for order in orders:
                if order.id == order_id:
                    return OrderState.ENDED if order.has_ended else OrderState.ACTIVE
                if order.server_id == order_id and not order.has_ended:
                    raise OrderNotFoundError(
                        f"there is no order {order_id}, which is the server of order {order.id}: "
                        "pass the number of the order",
                        order_id=order_id,
                    )
            listed = response.get("orders")
            ids = [order.id for order in orders if order.id is not None]
            if not isinstance(listed, list) or len(ids) != len(listed):
                incomplete = CloreError(
                    f"the list of orders is incomplete, so the state of order {order_id} is not "
                    "known: try again"
                )
                incomplete.retryable = True
                raise incomplete
        return OrderState.ABSENT

    def active_ids(self) -> list[int]:
        """Return the ids of active orders, and of known orders that the list does not have now."""
        orders, _ = self.read(completed=False)
        active = [order.id for order in orders if order.id is not None and not order.has_ended]
        missing = self.known - set(active) - self.ended
        if missing - self.cancelled:
            completed, _ = self.read(completed=True)
            self.ended.update(o.id for o in completed if o.id is not None and o.has_ended)
        return active + sorted(missing - self.cancelled - self.ended)

    def notify_bid(self, order_id: int, usd_per_hour: float) -> None:
        """Report the new price of an order to its budget."""
        if (listener := self.bid_listeners.get(order_id)) is not None:
            listener(usd_per_hour)
