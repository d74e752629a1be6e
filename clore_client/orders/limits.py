"""Check the limits that the user has set: a price per hour, and a number of orders."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from clore_client.errors import SpendingLimitError
from clore_client.market.market import Market
from clore_client.models.record import whole_id
from clore_client.models.server import on_demand_usd
from clore_client.pricing import HOURS_PER_DAY, positive


def usd_per_hour_of(body: dict[str, Any], market: Market) -> float | None:
    """Return what an order costs, in USD per hour without fees; None if not known.

    Parameters:
        body: of ``create_order``, as it goes out.
        market: whose listing has the price, or the rate by which a bid is read.
    """
    server_id, currency = whole_id(body.get("renting_server")), body.get("currency")
    if server_id is None or not isinstance(currency, str):
        return None
    if body.get("type") != "spot":
        server = market.find_server(server_id)
        return None if server is None else on_demand_usd(server, currency)
    market.ensure_rates(server_id, currency)
    bid = positive(body.get("spotprice"))
    if bid is None or market.data.documented:
        return bid
    rate = positive(market.data.rates.fresh().get(currency))
    return None if rate is None else bid * rate / HOURS_PER_DAY


def check_price_limit(usd_per_hour: float | None, limit: float | None, what: str) -> None:
    """Refuse a price over ``max_usd_per_hour``, and one that is not known."""
    if limit is None:
        return
    if usd_per_hour is None:
        raise SpendingLimitError(
            f"the price of {what} is not known, and max_usd_per_hour is {limit:g}: nothing was sent"
        )
    if usd_per_hour > limit * (1 + 1e-9):
        raise SpendingLimitError(
            f"{what} costs {usd_per_hour:g} USD per hour, and max_usd_per_hour is {limit:g}: "
            "nothing was sent"
        )


def check_order_limit(active: Collection[int], limit: int | None) -> None:
    """Refuse one more order than ``max_active_orders``."""
    if limit is not None and len(active) >= limit:
        raise SpendingLimitError(
            f"{len(active)} orders are active ({', '.join(map(str, sorted(active)))}), and "
            f"max_active_orders is {limit}: nothing was sent"
        )
