"""Read the orders of an account, and remember which belong to which purchase."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

from clore_client.api.call import Envelope
from clore_client.api.request import limited
from clore_client.config import account_digest
from clore_client.errors import (
    CloreError,
    InvalidResponseError,
    OrderEndedError,
    OrderNotFoundError,
    SpendingLimitError,
)
from clore_client.log import logger
from clore_client.market.market import Market, Requester
from clore_client.models.order import Order, to_orders
from clore_client.models.record import is_live
from clore_client.orders.credentials import ORDER_OVER, Credentials
from clore_client.process import this_process
from clore_client.validation import Timeout

SHORTEST_LIMIT = 1.0  # seconds; no request has a shorter time limit
OrderState = Literal["active", "ended", "absent"]  # of an order in the two order lists
LONGEST_CHECK = 3.0  # seconds to check if an order has ended, after a failed login


class OrdersClient(Requester, Protocol):
    """List the parts of ``CloreClient`` that the orders use."""

    timeout: Timeout
    rate_limit: float
    backoff: float
    order_lag: float
    server_clock: float | None
    max_usd_per_hour: float | None
    max_active_orders: int | None

    @property
    def api_key(self) -> str | None: ...


class Claims:
    """Record which purchase of this process made each order of an account.

    Purchases of the same server are made one after the other, so that one can't claim the order of
    another. Each change is one atomic step, because an interrupt can come at any time.

    Attributes:
        unresolved: server id -> a purchase whose outcome is not known.
        rented: ids of the orders that belong to rentals.
        clock_offset: the creation time of a new order minus the server's clock, in seconds; the
            lowest value so far, 0 or negative.
    """

    def __init__(self) -> None:
        self._taken: dict[int, object] = {}  # order id -> its purchase
        self._locks: dict[int, threading.Lock] = {}
        self.unresolved: dict[int, Any] = {}
        self.rented: set[int] = set()
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


class AccountOrders:
    """Read the orders of an account, and remember those that this client knows.

    Attributes:
        client: makes the requests.
        market: has the exchange rates for prices in USD.
        made: order id -> the order, as this client made it.
        credentials: the passwords, keys and tokens that were sent with orders.
        cancelled: ids of the orders that this client cancelled.
        ended: ids of the orders that have ended.
        bid_listeners: order id -> a function to call with a new bid, in USD per hour.
    """

    def __init__(self, client: OrdersClient, market: Market, credentials: Credentials) -> None:
        self.client = client
        self.market = market
        self.credentials = credentials
        self.made: dict[int, Order] = {}
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
    def account(self) -> str:
        """A digest that identifies the account in the state folder."""
        return account_digest(self.client.base_url, self.client.api_key)

    @property
    def claims(self) -> Claims:
        """The claims of the account, shared by its clients; without a key, this client's own."""
        if not self.client.api_key:
            return self._own_claims
        return this_process.of_account(Claims, "claims", self.account)

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
        data.observe(is_live(response))
        orders = to_orders(response, self.cancelled, data.rates)
        self._seen.update(o.id for o in orders if o.id is not None and not o.has_ended)
        self._record_ended({o.id for o in orders if o.id is not None and o.has_ended})
        return orders, response

    def _record_ended(self, order_ids: set[int]) -> None:
        """Record that orders have ended, and forget their credentials."""
        if order_ids:
            self.ended.update(order_ids)
            self.credentials.forget(self.account, order_ids)

    def record_cancelled(self, order_ids: list[int]) -> None:
        """Record that the API accepted the cancels of orders, and forget their credentials."""
        self.cancelled.update(order_ids)
        self.credentials.forget(self.account, order_ids)

    def active(self) -> list[Order]:
        """Read the orders that have not ended."""
        return [order for order in self.read(completed=False)[0] if not order.has_ended]

    def find(self, order_id: int) -> Order | None:
        """Return an order, or None. The ended orders are read only if it is not active."""
        for completed in (False, True):
            for order in self.read(completed)[0]:
                if order.id == order_id:
                    return order
        return None

    # --- logins ---

    def login_of(self, order: Order) -> dict[str, str]:
        """Return the known login data of an order."""
        if self.has_ended(order.id):  # a list can still show it as active
            return {}
        return self.credentials.of(self.account, order.id, order)

    def with_login(self, order: Order) -> Order:
        """Return an order with its password and token, if they are known."""
        if not order.has_ended:
            for name, text in self.login_of(order).items():
                if name != "key_fingerprint":
                    order[name] = str(text)
        return order

    def has_ended(self, order_id: int | None) -> bool:
        """Return whether this client knows that an order has ended. Nothing is sent."""
        return order_id in self.ended or order_id in self.cancelled

    def check_not_ended(self, order_id: int) -> None:
        """Raise an error if this client knows that an order has ended. Nothing is sent."""
        if self.has_ended(order_id):
            raise ended_error(order_id, "cancelled" if order_id in self.cancelled else "expired")

    def running(self, order_id: int) -> Order:
        """Read an order that has not ended. If it is known to have ended, send no request."""
        self.check_not_ended(order_id)
        return self.find_active(order_id)

    def find_active(self, order_id: int) -> Order:
        """Read an order that is not listed as ended.

        Raises:
            OrderEndedError, OrderNotFoundError: the order has ended, or does not exist.
        """
        order = self.find(order_id) or self.made.get(order_id)  # a new one may not be listed yet
        if order is None:
            raise OrderNotFoundError(
                f"there is no order {order_id} in this account, so nothing was done: check "
                "get_orders()",
                order_id=order_id,
            )
        if order.has_ended:
            raise ended_error(order_id, order.status or "", order)
        return order

    def raise_if_ended(self, order_id: int, cause: BaseException) -> None:
        """Check with one request if an order has ended, and raise an error if so.

        Parameters:
            order_id: the order.
            cause: the error after which this is checked.
        """
        self.check_not_ended(order_id)
        if self.client.api_key is None:
            return
        deadline = time.monotonic() + LONGEST_CHECK
        try:
            orders, _ = limited(lambda: self.read(completed=True), deadline=deadline, once=True)
        except CloreError as error:
            logger.debug("the state of order %d is not known: %s", order_id, error)
            return
        for order in orders:
            if order.id == order_id and order.has_ended:
                raise ended_error(order_id, order.status or "", order) from cause

    def tidy_credentials(self, active: set[int]) -> None:
        """Forget the saved credentials of orders that have ended elsewhere.

        Parameters:
            active: ids of the active orders, just read.
        """
        ages = self.credentials.stale(self.account, active)
        if not ages:
            return
        listed = {order.id for order in self.read(completed=True)[0]}  # forgets the ended ones
        over = [i for i, age in ages.items() if i not in listed and age > ORDER_OVER]
        self.credentials.forget(self.account, over)

    # --- the states of orders ---

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
                    return "ended" if order.has_ended else "active"
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
        return "absent"

    def active_ids(self) -> list[int]:
        """Return the ids of active orders, and of known orders that are missing from the list."""
        orders, _ = self.read(completed=False)
        active = [order.id for order in orders if order.id is not None and not order.has_ended]
        missing = self.known - set(active) - self.ended
        if missing - self.cancelled:
            self.read(completed=True)  # records the ended ones
        return active + sorted(missing - self.cancelled - self.ended)

    # --- the limits of the user ---

    def check_price(self, usd_per_hour: float | None, what: str) -> None:
        """Refuse a price that is above ``max_usd_per_hour`` or not known."""
        limit = self.client.max_usd_per_hour
        if limit is None or (usd_per_hour is not None and usd_per_hour <= limit * (1 + 1e-9)):
            return
        found = f"the price of {what} is not known"
        if usd_per_hour is not None:
            found = f"{what} costs {usd_per_hour:g} USD per hour"
        raise SpendingLimitError(
            f"{found}, and max_usd_per_hour is {limit:g}, so nothing was ordered or bid: choose "
            "another server or price, or raise the limit"
        )

    def check_count(self) -> None:
        """Refuse a new order if ``max_active_orders`` are active."""
        limit = self.client.max_active_orders
        if limit is None or len(active := self.active_ids()) < limit:
            return
        raise SpendingLimitError(
            f"{len(active)} orders are active ({', '.join(map(str, sorted(active)))}), and "
            f"max_active_orders is {limit}, so nothing was ordered: cancel one, or raise the limit"
        )

    def notify_bid(self, order_id: int, usd_per_hour: float) -> None:
        """Report the new price of an order to its budget."""
        if (listener := self.bid_listeners.get(order_id)) is not None:
            listener(usd_per_hour)


def ended_error(order_id: int, status: str, order: Order | None = None) -> OrderEndedError:
    """Make the error for a call that needs a running order."""
    return OrderEndedError(
        f"Order {order_id} has ended, with status {status}: its container and its files are gone, "
        "so rent another server",
        order_id=order_id,
        status=status,
        order=order,
    )
