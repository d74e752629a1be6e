"""Cancel orders until the API accepts it, and confirm that they have ended.

An order has ended when the list of completed orders says so, or when its cancel was accepted and it
is missing from both lists for longer than ``order_lag``. One read is not enough, because a list can
be empty for a moment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from clore_client.api.request import limited
from clore_client.api.retry import LONGEST_CANCEL_PAUSE
from clore_client.errors import (
    AuthenticationError,
    CancelUnconfirmedError,
    CloreAPIError,
    CloreConnectionError,
    CloreError,
    ConfigurationError,
    OrderNotFoundError,
    RateLimitError,
)
from clore_client.log import logger
from clore_client.orders.account import SHORTEST_LIMIT, AccountOrders, OrderState

MAX_ISSUE = 2048  # characters of ``issue`` that the API accepts
# A cancelled order can stay in the active list for 2 to 20 seconds (seen on the live API).
SETTLE_TIMEOUT = 30.0
MAX_CANCELS = 64  # ids that the API accepts in one ``cancel_orders``
FIRST_READ_PAUSE = 0.02  # seconds between the first two reads of the lists; it doubles
LONGEST_READ_PAUSE = 1.0
CANCEL_AGAIN_AFTER = 30.0  # seconds; an order that still looks active is cancelled again
CONFIRM_AT_LEAST = 30.0


class Cancellation:
    """Cancel one order, and follow its state in the order lists.

    Attributes:
        order_id: the order.
        failure: the error of the last cancel, or None.
    """

    def __init__(self, orders: AccountOrders, order_id: int, issue: str | None = None) -> None:
        self.order_id = order_id
        self.failure: Exception | None = None
        self._orders = orders
        self._issue = issue
        self._may_be_accepted = False  # after a lost response
        self._state: OrderState | None = None  # None if the last read of the lists failed
        self._absent_since: float | None = None
        self._read_error: Exception | None = None
        self._sent_at = -math.inf
        self._pause = max(0.001, 2 * orders.client.backoff)  # before the next cancel

    @property
    def accepted(self) -> bool:
        """True if the API accepted a cancel; the order costs nothing from then on."""
        return self.order_id in self._orders.cancelled

    def send(self) -> None:
        """Send the cancel once."""
        self._sent_at = time.monotonic()
        body: dict[str, Any] = {"id": self.order_id}
        if self._issue:
            body["issue"] = self._issue[:MAX_ISSUE]
        try:
            self._orders.client._request("POST", "/v1/cancel_order", json=body)
        except Exception as error:
            self.failure = error
            if not isinstance(error, CloreAPIError) or error.sends > 1:
                self._may_be_accepted = True
            raise
        self._accept()
        logger.info("order %d was cancelled", self.order_id)

    def run(
        self,
        deadline: Callable[[], float],
        *,
        confirm: bool,
        retry_refused: bool = True,
        stop: Callable[[], bool] = lambda: False,
    ) -> CloreError | None:
        """Send the cancel until it is accepted, and read the lists until the order has ended.

        Parameters:
            deadline: returns the monotonic time at which to give up.
            confirm: wait until the order has ended; else an accepted cancel is enough.
            retry_refused: continue if the API refuses to cancel an active order.
            stop: returns whether to give up at once.

        Returns:
            None on success, else the error for the user.
        """
        read_pause = FIRST_READ_PAUSE
        while True:
            self._send_if_due(deadline())
            if self._done and not confirm:
                return None
            if isinstance(self.failure, ConfigurationError):
                return self._unconfirmed()
            try:
                if self._check_lists(deadline()):
                    return None
            except OrderNotFoundError as error:
                return error
            remaining = deadline() - time.monotonic()
            if remaining <= 0 or stop() or (self._refused and not retry_refused):
                return self._unconfirmed()
            waits_for_cancel = retry_refused and not self._done
            pause = max(self._next_send() - time.monotonic(), 0) if waits_for_cancel else read_pause
            until = time.monotonic() + min(pause, remaining)
            _sleep_until(until, lambda: stop() or time.monotonic() >= deadline())
            read_pause = min(read_pause * 2, LONGEST_READ_PAUSE)

    def _unconfirmed(self) -> CancelUnconfirmedError:
        """Make the error for an order that may still be running."""
        if self._done:
            what = "was cancelled, but it is not confirmed that it has ended"
            why, cause = "", self._read_error
        else:
            what, why, cause = "could not be cancelled", f" ({self.failure})", self.failure
        error = CancelUnconfirmedError(
            f"order {self.order_id} {what}: it may still be running, and cost money, so call "
            f"cancel_order({self.order_id}) again, which is safe to repeat{why}",
            order_ids=(self.order_id,),
        )
        error.__cause__ = cause
        return error

    # --- the cancel ---

    @property
    def _done(self) -> bool:
        """True if the last cancel was accepted."""
        return self.accepted and self.failure is None

    @property
    def _refused(self) -> bool:
        """True if the API clearly refused to cancel an order that is active."""
        return self._state == "active" and not (self.accepted or self._may_be_accepted)

    def _accept(self) -> None:
        self.failure = None
        self._orders.record_cancelled([self.order_id])

    def _next_send(self) -> float:
        """Return the monotonic time at which to send the cancel."""
        if not self._done:
            return self._sent_at + self._pause if self.failure else -math.inf
        # The cancel was accepted, but the order still looks active.
        return self._sent_at + CANCEL_AGAIN_AFTER if self._state == "active" else math.inf

    def _send_if_due(self, deadline: float) -> None:
        if time.monotonic() < self._next_send():
            return
        was_done, tried_before = self._done, self.failure is not None
        if tried_before:
            self._pause = min(self._pause * 2, LONGEST_CANCEL_PAUSE)
        try:
            limited(self.send, deadline=self._request_deadline(deadline), urgent=True)
        except Exception as error:
            if was_done:  # an earlier cancel was accepted
                self.failure = None
            elif not tried_before:
                logger.warning(
                    "order %d could not be cancelled, retrying: %s", self.order_id, error
                )

    def _request_deadline(self, deadline: float, at_least: float = SHORTEST_LIMIT) -> float:
        """Return the deadline of one request. A request that hangs is sent again after it."""
        now = time.monotonic()
        return now + max(at_least, (deadline - now) / 3)

    # --- the lists ---

    def _check_lists(self, deadline: float) -> bool:
        """Read the lists once, and return whether the order has ended.

        Raises:
            OrderNotFoundError: the account has no such order.
        """
        orders = self._orders
        asked_at = time.monotonic()
        at_least = SHORTEST_LIMIT + 2 * orders.client.rate_limit  # two lists
        self._state = self._read_error = None
        try:
            self._state = limited(
                lambda: orders.state(self.order_id),
                deadline=self._request_deadline(deadline, at_least),
                urgent=True,
            )
        except OrderNotFoundError:
            raise
        except CloreError as error:
            self._read_error = error
            return False
        if self._state == "ended":
            self._accept()
            return True
        if self._state == "active":
            self._absent_since = None
            return False
        self._absent_since = self._absent_since or asked_at
        if time.monotonic() - self._absent_since < orders.client.order_lag:
            return False
        if not self.accepted and self.order_id not in orders.known:
            raise OrderNotFoundError(
                f"there is no order {self.order_id} in this account: check get_orders()",
                order_id=self.order_id,
            ) from self.failure
        return self.accepted


def cancel_order(
    orders: AccountOrders, order_id: int, issue: str | None, settle_timeout: float | None
) -> Cancellation:
    """Cancel an order; see ``CloreClient.cancel_order``.

    Raises:
        OrderNotFoundError, CancelUnconfirmedError, CloreError: as in that method.
    """
    cancellation = Cancellation(orders, order_id, issue)
    try:
        cancellation.send()
    except ConfigurationError:
        raise
    except CloreError as error:
        unsent = isinstance(error, CloreConnectionError) and error.sent_at is None
        if unsent or isinstance(error, (AuthenticationError, RateLimitError)):
            # The order lists can't be read either, or can't have changed.
            error.args = (
                f"{error}\norder {order_id} may still be running, and cost money: cancel it again",
            )
            raise
        until = time.monotonic() + (SETTLE_TIMEOUT if settle_timeout is None else settle_timeout)
        failure = cancellation.run(lambda: until, confirm=False, retry_refused=False)
        if failure is not None:
            raise failure from error
    return cancellation


def cancel_orders(orders: AccountOrders, ids: list[int]) -> dict[str, Any]:
    """Cancel several orders; see ``CloreClient.cancel_orders``."""
    response, sends = _send_cancels(orders, ids)
    if sends > 1 and (failed := _failed(ids, response)):
        # After a lost response, the retry fails for the orders that the first request ended.
        left = {str(i) for i in _still_running(orders, failed, time.monotonic() + SETTLE_TIMEOUT)}
        response["failed_to_cancel"] = [i for i in response["failed_to_cancel"] if str(i) in left]
    return response


def cancel_all(orders: AccountOrders, confirm: bool, timeout: float) -> list[int]:
    """Cancel all active orders of the account; see ``CloreClient.cancel_all``."""
    ids = orders.active_ids()
    failed = _failed(ids, _send_cancels(orders, ids)[0])
    until = time.monotonic() + min(timeout, SETTLE_TIMEOUT)
    if left := _still_running(orders, failed, until):
        raise CancelUnconfirmedError(
            f"orders not cancelled: {', '.join(map(str, left))}; they may still be running, and "
            "cost money, so cancel them again",
            order_ids=left,
        )
    if confirm:
        confirm_ended([Cancellation(orders, order_id) for order_id in ids], timeout)
    return ids


def confirm_ended(cancellations: list[Cancellation], timeout: float) -> None:
    """Wait until the lists show that cancelled orders have ended.

    Raises:
        CancelUnconfirmedError: some orders have not ended in time.
    """
    until = time.monotonic() + timeout
    for number, cancellation in enumerate(cancellations):
        failure = cancellation.run(lambda: until, confirm=True)
        if failure is not None:
            left = tuple(c.order_id for c in cancellations[number:])
            raise CancelUnconfirmedError(
                f"orders cancelled, but still active after {timeout:g}s: "
                f"{', '.join(map(str, left))}; check get_orders(), and cancel them again",
                order_ids=left,
            ) from failure


def _send_cancels(orders: AccountOrders, ids: list[int]) -> tuple[dict[str, Any], int]:
    """Send ``cancel_orders`` in batches; return the last response, and the most sends of a batch.

    The response has the failed ids of all batches. A batch that failed does not stop the others,
    because an order that still runs costs money.
    """
    failure: CloreError | None = None
    listed: list[Any] = []
    unsent: list[int] = []
    response: dict[str, Any] = {"code": 0}
    sends = 1
    for start in range(0, len(ids), MAX_CANCELS):
        batch = ids[start : start + MAX_CANCELS]
        try:
            response = orders.client._request(
                "POST", "/v1/cancel_orders", json={"order_ids": batch}
            )
        except CloreError as error:
            failure = failure or error
            unsent += batch
            continue
        sends = max(sends, getattr(response, "sends", 1))
        failed = _failed(batch, response)
        names = response.get("failed_to_cancel")
        listed += names if isinstance(names, list) else []
        done = [order_id for order_id in batch if order_id not in failed]
        orders.record_cancelled(done)
        logger.info("cancelled orders: %s; not cancelled: %s", done, failed)
    response["failed_to_cancel"] = listed
    if failure is not None:
        if len(ids) > MAX_CANCELS:
            left = ", ".join(map(str, [*unsent, *_failed(ids, response)]))
            failure.args = (
                f"{failure}\norders {left} may still be running, and cost money: cancel them again",
            )
        raise failure
    return response, sends


def _failed(ids: list[int], response: dict[str, Any]) -> list[int]:
    """Return the ids that a response to ``cancel_orders`` names as failed."""
    names = response.get("failed_to_cancel")
    failed = {str(name) for name in names} if isinstance(names, list) else set()
    return [order_id for order_id in ids if str(order_id) in failed]


def _still_running(orders: AccountOrders, ids: Iterable[int], until: float) -> tuple[int, ...]:
    """Cancel orders one by one, and return those that may still be running."""
    return tuple(
        order_id
        for order_id in ids
        if Cancellation(orders, order_id).run(lambda: until, confirm=False)
    )


def confirm_until(started: float, timeout: float) -> float:
    """Return the deadline for confirming cancels that began at ``started`` (monotonic time)."""
    return max(started + timeout, time.monotonic() + min(CONFIRM_AT_LEAST, timeout))


def _sleep_until(moment: float, stop: Callable[[], bool]) -> None:
    while (left := moment - time.monotonic()) > 0 and not stop():
        time.sleep(min(left, 0.1))
