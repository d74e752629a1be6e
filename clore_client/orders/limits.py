"""Check the user's limits: the price per hour, and the number of active orders."""

from __future__ import annotations

from collections.abc import Collection

from clore_client.errors import SpendingLimitError


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
