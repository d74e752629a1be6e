"""Check the user's limits: the price per hour, and the number of active orders."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from clore_client.errors import SpendingLimitError
from clore_client.market.market import Market
from clore_client.models.record import whole_id
from clore_client.models.server import on_demand_usd
from clore_client.pricing import HOURS_PER_DAY, positive


def usd_per_hour_of(body: dict[str, Any], market: Market) -> float | None:
    """Return the price of an order in USD per hour, without fees; None if not known.

    Parameters:
        body: the body of ``create_order``.
        market: has the listed prices, and the exchange rates for bids.
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
    """Refuse a price that is above ``max_usd_per_hour`` or not known."""
    if limit is None:
        return
    if usd_per_hour is None:
        raise SpendingLimitError(
            f"the price of {what} is not known, and max_usd_per_hour is {limit:g}, so nothing was "
            "ordered or bid: choose another server, or set no limit"
        )
    if usd_per_hour > limit * (1 + 1e-9):
        raise SpendingLimitError(
            f"{what} costs {usd_per_hour:g} USD per hour, and max_usd_per_hour is {limit:g}, so "
            "nothing was ordered or bid: choose a lower price, or raise the limit"
        )


def check_order_limit(active: Collection[int], limit: int | None) -> None:
    """Refuse a new order if ``max_active_orders`` are active."""
    if limit is not None and len(active) >= limit:
        raise SpendingLimitError(
            f"{len(active)} orders are active ({', '.join(map(str, sorted(active)))}), and "
            f"max_active_orders is {limit}, so nothing was ordered: cancel one, or raise the limit"
        )
