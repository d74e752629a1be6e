"""Wait until an order has a status."""

from __future__ import annotations

import time
from collections.abc import Callable

from clore_client.api.request import limited
from clore_client.errors import (
    CloreError,
    InvalidResponseError,
    OrderEndedError,
    UnknownOrderError,
    WaitTimeoutError,
)
from clore_client.log import logger
from clore_client.models.order import ENDED_STATUSES, Order
from clore_client.orders.account import SHORTEST_LIMIT, AccountOrders
from clore_client.progress import ProgressEvent, Report, readable_seconds

_SAME_STATUS = frozenset({"cancelled", "expired"})  # these two count as the same


def wait_for_status(
    orders: AccountOrders,
    order_id: int,
    timeout: float,
    poll_interval: float,
    target_status: str,
    on_update: Callable[[Order | None], object] | None,
    report: Report | None = None,
) -> Order:
    """Poll until the order has the status; see ``CloreClient.wait_for_order``.

    Parameters:
        orders: the orders of the account.
        order_id, timeout, poll_interval, target_status, on_update: as in that method.
        report: called with each step.
    """
    if target_status not in {"running", "creating"} | ENDED_STATUSES:
        logger.warning("target_status=%r is not a known status: check its spelling", target_status)
    targets = _SAME_STATUS if target_status in _SAME_STATUS else {target_status}
    late = f"Order {order_id} did not reach status '{target_status}' within {timeout}s"
    started = time.monotonic()
    deadline = started + timeout
    seen: Order | None = None
    while True:
        order, failure = _poll(orders, order_id, deadline)
        seen = order or seen
        if on_update is not None and failure is None:
            on_update(order)
        if report is not None:
            report(_event(order_id, seen, time.monotonic() - started))
        if seen is None and failure is None:
            _check_may_exist(orders, order_id, late)
        if order is not None and order.status in targets:
            return order
        if order is not None and order.has_ended:
            raise OrderEndedError(
                f"Order {order_id} ended unexpectedly with status: {order.status}",
                order_id=order_id,
                status=order.status or "",
                order=order,
            )
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise WaitTimeoutError(late, order_id=order_id, order=seen) from failure
        # Respect the pause that the API asked for.
        pause = max(poll_interval, (failure.retry_after or 0.0) if failure else 0.0)
        time.sleep(min(pause, remaining))


def _event(order_id: int, order: Order | None, seconds: float) -> ProgressEvent:
    status = "not listed yet" if order is None else str(order.status)
    if status == "running":
        return ProgressEvent("running", seconds, f"order {order_id}: running")
    shown = "deploying" if status == "creating" else status
    text = f"order {order_id}: {shown}, {readable_seconds(seconds)}"
    return ProgressEvent("deploy", seconds, text)


def _check_may_exist(orders: AccountOrders, order_id: int, late: str) -> None:
    """Raise an error for an order that no list has, unless this client knows it."""
    if order_id not in orders.known and not orders.credentials.of(orders.account, order_id):
        raise UnknownOrderError(
            f"{late}: there is no order {order_id} in this account, so the client did not wait; "
            "check get_orders()",
            order_id=order_id,
        )


def _poll(
    orders: AccountOrders, order_id: int, deadline: float
) -> tuple[Order | None, CloreError | None]:
    """Read the order once. Return it, or the error after which another poll makes sense."""
    # The last poll starts at the deadline, and needs time for two reads.
    last = time.monotonic() + 2 * orders.client.rate_limit + SHORTEST_LIMIT
    try:
        return limited(lambda: orders.find(order_id), deadline=max(deadline, last)), None
    except CloreError as error:
        if not (error.retryable or isinstance(error, InvalidResponseError)):
            raise
        logger.debug("a poll of order %d failed: %s", order_id, error)
        return None, error
