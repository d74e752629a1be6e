"""Reconcile a purchase with the order lists, when the response had no order id or was lost."""

from __future__ import annotations

import math
import time
from typing import Protocol

from clore_client.api.call import Envelope
from clore_client.api.request import limited
from clore_client.errors import CloreAPIError, CloreError, OrderOutcomeUnknownError
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.orders.account import SHORTEST_LIMIT, AccountOrders
from clore_client.orders.claims import Claims
from clore_client.validation import shortened

# A new order shows up after 2 to 20 seconds (seen on the live API). All in seconds.
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 2.0


class SentPurchase(Protocol):
    """The parts of a purchase by which its order is found."""

    server_id: int
    credentials: dict[str, str]
    baseline_read: bool
    response: dict[str, object]

    @property
    def sent_at(self) -> float: ...

    def matches(self, order: Order) -> bool: ...


def find_order(
    orders: AccountOrders, purchase: SentPurchase, timeout: float, send_error: CloreError | None
) -> Order:
    """Read the active orders until the order of a purchase shows up, and claim it.

    Parameters:
        orders: the orders of the account.
        purchase: the purchase that was sent.
        timeout: seconds.
        send_error: the error of the purchase, after which the order may or may not exist; or None.

    Raises:
        OrderOutcomeUnknownError: no order showed up in time, or several match. Its cause is the
            error of the last read, if that failed, else ``send_error``.
        CloreAPIError: ``send_error`` itself, if the API refused and complete lists do not have the
            order.
    """
    try:
        order = _search(orders, purchase, timeout, send_error)
    except (KeyboardInterrupt, SystemExit):
        logger.warning(
            "interrupted before the order of server %d was found; it may exist: look at "
            "get_orders()",
            purchase.server_id,
        )
        raise
    orders.claims.unresolved.pop(purchase.server_id, None)
    return order


def _search(
    orders: AccountOrders, purchase: SentPurchase, timeout: float, send_error: CloreError | None
) -> Order:
    claims, pause = orders.claims, FIRST_PAUSE
    deadline = time.monotonic() + timeout
    while True:
        cause: CloreError | None = None
        possible: list[Order] = []
        created_after = None
        try:
            listed, created_after = _read_active(orders, purchase, timeout, deadline)
            possible = claims.free([o for o in listed if purchase.matches(o)], purchase)
        except CloreError as error:
            cause = error
        found = [o for o in possible if _is_new(o, created_after, claims.clock_offset)]
        remaining = deadline - time.monotonic()
        if remaining <= 0 and not found and purchase.baseline_read:
            # The clocks may differ, but an order that is not in the baseline must be the new one.
            found = [order for order in possible if not order.has_ended]
        if len(found) == 1 and claims.take(found[0].id or 0, purchase):
            _learn_offset(claims, found[0], created_after)
            return found[0]
        if len(found) > 1 or remaining <= 0:
            if isinstance(send_error, CloreAPIError) and not possible and cause is None:
                raise send_error  # complete lists without the order confirm the refusal
            raise _not_found(purchase, found or possible, timeout, send_error) from (
                cause or send_error
            )
        time.sleep(min(pause, remaining))
        pause = min(pause * 1.5, LONGEST_PAUSE)


def _read_active(
    orders: AccountOrders, purchase: SentPurchase, timeout: float, deadline: float
) -> tuple[list[Order], float | None]:
    """Read the active orders, and compute the send time by the server's clock."""
    client = orders.client
    # One slow response must not use all the time.
    patience = shortened(client.timeout, max(timeout / 2, SHORTEST_LIMIT))
    until = client.rate_limit + max(deadline, time.monotonic() + SHORTEST_LIMIT)
    listed, listing = limited(
        lambda: orders.read(completed=False, timeout=patience), deadline=until
    )
    # The Date of each response gives a lower bound, and the largest one is the closest.
    clocks = [
        clock
        for response in (purchase.response, listing)
        if isinstance(response, Envelope)
        and (clock := response.server_time_at(purchase.sent_at)) is not None
    ]
    return listed, max(clocks, default=None)


def _is_new(order: Order, created_after: float | None, offset: float) -> bool:
    """Return whether an order was made after ``created_after``, if that is known."""
    if created_after is None:
        return not order.has_ended
    return order.started_at is not None and order.started_at >= created_after + offset


def _learn_offset(claims: Claims, order: Order, created_after: float | None) -> None:
    """Record how far the creation time of an order is behind the server's clock."""
    if created_after is not None and order.started_at is not None:
        behind = math.floor(order.started_at - created_after)
        claims.clock_offset = min(claims.clock_offset, behind)


def _not_found(
    purchase: SentPurchase, orders: list[Order], timeout: float, send_error: CloreError | None
) -> OrderOutcomeUnknownError:
    server_id = purchase.server_id
    ids = tuple(order.id for order in orders if order.id is not None)
    made = "was made" if send_error is None else "may have been made"
    return OrderOutcomeUnknownError(
        f"an order for server {server_id} {made}, but it is not clear if it is one of "
        f"{', '.join(map(str, ids))}: look at get_orders() before you order again"
        if ids
        else f"an order for server {server_id} {made}, but did not show up in the order lists "
        f"within {timeout:g}s. It was not sent again: look at get_orders() now and again in a "
        "minute, before you order again",
        server_id=server_id,
        order_ids=ids,
        credentials=purchase.credentials,
    )
