"""What a purchase would cost, and whether the user's ceilings allow it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from clore_client.errors import SpendingLimitError
from clore_client.market.spot import MarketMemory
from clore_client.models.record import whole_id
from clore_client.models.server import Server, on_demand_usd
from clore_client.pricing import HOURS_PER_DAY, positive


def purchase_usd_per_hour(
    body: dict[str, Any], find_server: Callable[[int], Server | None], market: MarketMemory
) -> float | None:
    """What an order with this body costs, in USD per hour without fees; None if not known.

    Parameters:
        body: of ``create_order``, as it goes out.
        find_server: gives a server as it is listed now.
        market: the form and the rates by which a bid is read.
    """
    currency = body.get("currency")
    if body.get("type") == "spot":
        bid = positive(body.get("spotprice"))
        if bid is None or market.documented:
            return bid
        rate = positive(market.rates.fresh().get(currency)) if isinstance(currency, str) else None
        return None if rate is None else bid * rate / HOURS_PER_DAY
    server_id = whole_id(body.get("renting_server"))
    server = None if server_id is None else find_server(server_id)
    return None if server is None else on_demand_usd(server, currency)


def check_price_ceiling(usd_per_hour: float | None, ceiling: float | None, what: str) -> None:
    """Refuse a price over ``max_usd_per_hour``, and one that is not known."""
    if ceiling is None:
        return
    if usd_per_hour is None:
        raise SpendingLimitError(
            f"the price of {what} is not known, and max_usd_per_hour is {ceiling:g}: "
            "nothing was sent"
        )
    if usd_per_hour > ceiling * (1 + 1e-9):
        raise SpendingLimitError(
            f"{what} costs {usd_per_hour:g} USD per hour, and max_usd_per_hour is {ceiling:g}: "
            "nothing was sent"
        )


def check_order_ceiling(active: Collection[int], ceiling: int | None) -> None:
    """Refuse one more order than ``max_active_orders``."""
    if ceiling is not None and len(active) >= ceiling:
        raise SpendingLimitError(
            f"{len(active)} orders are active ({', '.join(map(str, sorted(active)))}), and "
            f"max_active_orders is {ceiling}: nothing was sent"
        )
