"""End the orders of a rental: cancel, confirm, and reconcile purchases with unknown outcome."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from clore_client.api.request import limited
from clore_client.errors import CancelUnconfirmedError, CloreError, OutcomeUnknownError
from clore_client.log import logger
from clore_client.orders.account import SHORTEST_LIMIT, AccountOrders
from clore_client.orders.cancel import confirm_until
from clore_client.rental.orders import RentalOrder, RentalOrders
from clore_client.rental.selection import RentalSettings

SEARCH_INTERVAL = 0.5  # seconds between two searches for an order that may exist


class Cleanup:
    """The cleanup of one rental, which ends its orders.

    Attributes:
        block_ended_at: monotonic time at which the block ended; None before that.
        skip_confirmation: skip the confirmation, after an interrupt during the cleanup.
        abandoned: stop the cleanup, after three interrupts; ``leftovers()`` finds the orders.
    """

    def __init__(
        self,
        orders: AccountOrders,
        rental_orders: RentalOrders,
        settings: RentalSettings,
    ) -> None:
        self._orders = orders
        self._rental_orders = rental_orders
        self._settings = settings
        self.block_ended_at: float | None = None
        self.skip_confirmation = False
        self.abandoned = False

    def record_block_end(self) -> None:
        """Record that the block has ended, which sets the deadline for cancels."""
        self.block_ended_at = self.block_ended_at or time.monotonic()

    def deadline(self) -> float:
        """Return the deadline for cancels; there is none before the block has ended."""
        if self.block_ended_at is None:
            return math.inf
        return self.block_ended_at + self._settings.cancel_timeout

    def end_all(self) -> BaseException | None:
        """End all orders, the cancels first. Return None, or the first failure."""
        started = time.monotonic()
        failures: list[BaseException | None] = [
            self.cancel(purchase, self.deadline)
            for purchase in self._rental_orders
            if purchase.order_id is not None
        ]
        for purchase in self._rental_orders:
            if purchase.order_id is None:
                failures.append(self._reconcile(purchase))
        for purchase in self._rental_orders:
            failures.append(self.confirm(purchase, started))
        return next((failure for failure in failures if failure is not None), None)

    def cancel(
        self, purchase: RentalOrder, deadline: Callable[[], float]
    ) -> CancelUnconfirmedError | None:
        """Cancel an order until that is accepted, or leave it to ``leftovers()``."""
        failure = self.try_to_cancel(purchase, deadline)
        if failure is None:
            return None
        order_id = purchase.order_id or 0
        self._rental_orders.give_up(purchase)
        logger.error(
            "order %d could not be cancelled and may still be running: call leftovers() later",
            order_id,
        )
        return purchase.cancellation(self._orders).unconfirmed(self._settings.cancel_timeout)

    def try_to_cancel(
        self, purchase: RentalOrder, deadline: Callable[[], float]
    ) -> CloreError | None:
        """Cancel an order until that is accepted. Return None, or the error."""
        if purchase.accepted:
            return None
        failure = purchase.cancellation(self._orders).run(
            deadline, confirm=False, stop=lambda: self.abandoned
        )
        if failure is None:  # the order costs nothing from now on
            purchase.meter.stop()
        return failure

    def confirm(self, purchase: RentalOrder, started: float) -> CloreError | None:
        """Wait until a cancelled order is listed as ended."""
        order_id = purchase.order_id or 0
        deadline = confirm_until(started, self._settings.cancel_timeout)
        failure: CloreError | None = None
        if not self.skip_confirmation:
            failure = purchase.cancellation(self._orders).run(
                lambda: deadline, confirm=True, stop=lambda: self.skip_confirmation
            )
            if failure is None:
                self._rental_orders.forget(purchase)
                self._rental_orders.before.add(order_id)
                return None
        self._rental_orders.give_up(purchase)
        if self.skip_confirmation:
            logger.warning(
                "order %d was cancelled, but an interrupt skipped the confirmation", order_id
            )
            return CloreError(
                f"order {order_id} was cancelled, but it is not confirmed that it has ended: call "
                "leftovers() later"
            )
        logger.error(
            "order %d was cancelled, but may still be running: call leftovers() later", order_id
        )
        return failure

    # --- purchases with unknown outcome ---

    def search_unresolved(self) -> None:
        """Look once for the orders of unresolved purchases, and cancel those that exist."""
        for purchase in self._rental_orders.unresolved():
            try:
                confirmed_absent = self._search(purchase)
            except CloreError as error:
                logger.debug("looking for an order of server %d: %s", purchase.server_id, error)
                continue
            if purchase.order_id is not None:
                logger.warning(
                    "order %d of server %d exists although the API refused it: cancelling it",
                    purchase.order_id,
                    purchase.server_id,
                )
                until = time.monotonic() + self._settings.cancel_timeout
                self.try_to_cancel(purchase, lambda: until)  # noqa: B023
            elif confirmed_absent:
                self._rental_orders.forget(purchase)

    def _search(self, purchase: RentalOrder) -> bool:
        """Look once for the order of a purchase. Return True if it is confirmed absent."""
        asked_at = time.monotonic()
        deadline = max(asked_at + SHORTEST_LIMIT, self.deadline())
        try:
            orders = limited(self._orders.active, deadline=deadline, urgent=True)
        except CloreError:
            purchase.absent.clear()  # a read that failed breaks the series
            raise
        return self._rental_orders.search_in(purchase, orders, asked_at)

    def _reconcile(self, purchase: RentalOrder) -> BaseException | None:
        """Look for the order of a purchase until it is found and cancelled, or time is out."""
        logger.warning("an order of server %d may exist: looking for it", purchase.server_id)
        cause: BaseException | None = None
        confirmed_absent = False
        while not (confirmed_absent or self.abandoned):
            try:
                confirmed_absent = self._search(purchase)
                cause = None
            except CloreError as error:
                cause = error
            if purchase.order_id is not None:
                return self.cancel(purchase, self.deadline)
            if time.monotonic() >= self.deadline():
                break
            if not confirmed_absent:
                time.sleep(self._rental_orders.search_interval(SEARCH_INTERVAL))
        if confirmed_absent and purchase.refused:
            self._rental_orders.forget(purchase)
            return None
        self._rental_orders.give_up(purchase)
        logger.warning(
            "no order of server %d has shown up so far: call leftovers() later",
            purchase.server_id,
        )
        unknown = OutcomeUnknownError(
            f"{purchase}, but it did not show up: call leftovers() or get_orders() in a minute",
            endpoint="/v1/create_order",
        )
        unknown.__cause__ = cause
        return unknown
