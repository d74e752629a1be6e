"""AttachedRental, the rental of an order that exists already."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from clore_client.errors import RentalError
from clore_client.market.market import HostHistory
from clore_client.models.order import Order
from clore_client.models.server import Server, on_demand_usd
from clore_client.orders.account import AccountOrders
from clore_client.rental.rental import Rental
from clore_client.rental.selection import RentalSettings, order_usd_per_hour
from clore_client.rental.worker import RentalClient, RentalWorker

Attached = TypeVar("Attached", bound="AttachedRental")


class AttachedRental(Rental):
    """A rental of an order that exists; see ``CloreClient.attach``.

    Parameters:
        order: the order.
        ends: whether the end of the block ends the order. Without it, the rental can be used at
            once, with and without a block.
    """

    def __init__(
        self,
        client: RentalClient,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        history: HostHistory,
        order: Order,
        ends: bool,
    ) -> None:
        super().__init__(client, orders, settings, folder, history)
        self._order = order
        self._ends = ends
        self._priced = order.usd_per_hour is not None
        if not ends:
            self._kept_as = "attached"
            self._worker = self._make_worker()
            self._worker.adopt(order, ends=False)

    @property
    def server(self) -> Server:
        """The server as it is listed now, from one read of the marketplace."""
        if self._server is None:
            found = self._orders.market.find_server(self.order.server_id or 0)
            if found is None:
                raise RentalError(
                    f"server {self.order.server_id} is not on the marketplace any more: its order "
                    "has the price"
                )
            self._server = found
        return self._server

    @property
    def cost_usd(self) -> float:
        """The cost so far in USD, with fees; see :attr:`Rental.cost_usd`.

        If the price in USD is not known, the first use reads the marketplace.
        """
        self._find_price()
        return super().cost_usd

    def _find_price(self) -> None:
        order, worker = self.order, self._worker
        if self._priced or worker is None:
            return
        self._priced = True
        currency = self._settings.currency
        price = order_usd_per_hour(order, self.server, currency)
        if price is None:  # the marketplace may have brought the exchange rate
            price = self._orders.market.data.rates.usd(order.get("price"), currency)
        if price is None and not self._settings.spot:
            price = on_demand_usd(self.server, currency)
        if price is not None:
            worker.correct_price(price)

    def __enter__(self: Attached) -> Attached:
        return super().__enter__() if self._ends else self

    def _acquire(self, worker: RentalWorker) -> None:
        worker.adopt(self.order, ends=True)
        if self._settings.max_cost_usd is not None:
            self._find_price()
