"""Select the servers that ``rent()`` tries, with their prices."""

from __future__ import annotations

from typing import Any

from clore_client.models.record import part_of
from clore_client.models.server import Server, on_demand_usd
from clore_client.orders.create import check_login, order_env, order_ports
from clore_client.pricing import HOURS_PER_DAY, finite, positive
from clore_client.rental.client import RentalClient
from clore_client.validation import (
    check_bool,
    check_count,
    check_currency,
    check_id,
    check_interval,
    check_number,
    check_optional_number,
    check_text,
)

# The API adds these fees to the price (seen on the live API).
FEE_ON_DEMAND = 0.05
FEE_SPOT = 0.0125
CREATION_FEE = 0.10  # USD, once for each order
CREATION_FEE_AFTER = 600.0  # seconds; a shorter order does not pay it
BID_MARGIN = 1e-4  # the conversion of the lowest bid can make it too low
PRICE_SLACK = 1e-4  # the rounding error of an exchange rate


class RentalSettings:
    """The arguments of ``rent()``, checked.

    Parameters:
        order: those that ``create_order`` takes too, except the bid and ``find_timeout``.

    Attributes:
        order_arguments: the arguments for ``create_order``.
    """

    def __init__(
        self,
        *,
        gpu_type: Any,
        max_price_usd: Any,
        min_reliability: Any,
        use_spot: Any,
        server_id: Any,
        order: dict[str, Any],
        spot_price: Any,
        attempts: Any,
        deploy_timeout: Any,
        poll_interval: Any,
        find_timeout: Any,
        cancel_timeout: Any,
        max_hours: Any,
        max_cost_usd: Any,
    ) -> None:
        self._set_search(gpu_type, max_price_usd, min_reliability, use_spot, server_id)
        self._set_order(order)
        self.spot_price = self._checked_bid(spot_price)
        self.attempts = check_count("attempts", attempts, minimum=1)
        self.deploy_timeout = check_number(
            "deploy_timeout", deploy_timeout, infinite=True, unit="seconds"
        )
        self.poll_interval = check_interval("poll_interval", poll_interval)
        self.find_timeout = check_number("find_timeout", find_timeout, unit="seconds")
        self.cancel_timeout = check_number(
            "cancel_timeout", cancel_timeout, infinite=True, unit="seconds"
        )
        self.max_hours = check_optional_number("max_hours", max_hours, above=True, infinite=True)
        self.max_cost_usd = check_optional_number(
            "max_cost_usd", max_cost_usd, above=True, infinite=True
        )

    def _set_search(
        self, gpu_type: Any, max_price_usd: Any, min_reliability: Any, use_spot: Any, server_id: Any
    ) -> None:
        self.gpu_type = None if gpu_type is None else check_text("gpu_type", gpu_type)
        self.max_price_usd = check_optional_number(
            "max_price_usd", max_price_usd, infinite=True, unit="USD per hour"
        )
        self.min_reliability = check_number("min_reliability", min_reliability, maximum=100.0)
        self.spot = check_bool("use_spot", use_spot)
        self.server_id = None if server_id is None else check_id("server_id", server_id)

    def _set_order(self, order: dict[str, Any]) -> None:
        self.currency = check_currency("currency", order["currency"])
        self.image = check_text("image", order["image"])
        check_login(order["ssh_password"], order["ssh_key"], order["jupyter_token"])
        order_ports(order["ports"])
        order_env(order["env"])
        kind = "spot" if self.spot else "on-demand"
        self.order_arguments = {**order, "order_type": kind, "currency": self.currency}

    def _checked_bid(self, spot_price: Any) -> float | None:
        if spot_price is None:
            return None
        check_number("spot_price", spot_price, above=True, unit="USD per hour")
        if not self.spot:
            raise ValueError(
                f"spot_price={spot_price!r} needs use_spot=True: add that, or leave it out"
            )
        if self.max_price_usd is not None and spot_price > self.max_price_usd:
            raise ValueError(
                f"spot_price must be at most max_price_usd ({self.max_price_usd!r}), not "
                f"{spot_price!r}"
            )
        return float(spot_price)

    @property
    def fee(self) -> float:
        """The fee as a fraction of the price."""
        return FEE_SPOT if self.spot else FEE_ON_DEMAND

    def exceeds_price_limit(self, usd_per_hour: float | None) -> bool:
        """Return whether a price is above the limit."""
        limit = self.max_price_usd
        return limit is not None and usd_per_hour is not None and (
            usd_per_hour > limit * (1 + PRICE_SLACK)
        )  # fmt: skip

    def price_of(self, server: Server) -> float | None:
        """Return the price of a server in USD per hour, without fees; None if not known."""
        listed = on_demand_usd(server, self.currency)
        if not self.spot:
            return listed
        lowest = _lowest_bid(server, self.currency)
        if lowest is None:
            return None
        if self.spot_price is not None:
            return self.spot_price if self.spot_price >= lowest else None
        limit = self.max_price_usd
        bid = lowest * (1 + BID_MARGIN)
        return bid if limit is None or lowest > limit else min(bid, limit)

    def reason_against(self, server: Server) -> str | None:
        """Return the reason why a server does not fit, or None if it fits."""
        coins = server.get("allowed_coins")
        if isinstance(coins, list) and coins and self.currency not in coins:
            return f"does not accept {self.currency}"
        price = self.price_of(server)
        if price is None:
            if self.spot:
                return "does not accept this bid"
            if self.max_price_usd is not None or self.max_cost_usd is not None:
                return "has no price"
            return None
        if self.max_price_usd is not None and price > self.max_price_usd * (1 + 1e-12):
            return f"costs {price:.4g} USD per hour"
        on_demand = server.usd_per_hour
        if self.spot and on_demand is not None and price > on_demand:
            return "accepts no bid below its on-demand price"
        return None


def _lowest_bid(server: Server, currency: str) -> float | None:
    stated = positive(part_of(server, "price", "original_usd", currency, "spot"))
    return server.spot_usd_per_hour if stated is None else stated / HOURS_PER_DAY


def order_usd_per_hour(order: Any, server: Server, currency: str) -> float | None:
    """Return the price of an order in USD per hour; None if not known.

    Uses the exchange rate of the server's listing if there is one, as the price limit does.
    """
    amount = positive(order.get("price"))
    if amount is None:
        return None
    if currency == "USD-Blockchain":
        return amount
    per_day = positive(part_of(server, "price", "on_demand", currency))
    in_usd = on_demand_usd(server, currency)
    if per_day and in_usd:
        return amount * in_usd / (per_day / HOURS_PER_DAY)
    return finite(order.usd_per_hour)


def candidates(client: RentalClient, settings: RentalSettings) -> tuple[list[Server], str]:
    """Return the servers to try, the cheapest first, and an error text if there are none."""
    if settings.server_id is not None:
        listed = client.get_marketplace(include_rented=True)
        pinned = [s for s in listed if s.id == settings.server_id]
        if not pinned:
            return [], f"server {settings.server_id} is not on the marketplace: choose another"
        server = pinned[0]
        why = "is rented" if server.rented else settings.reason_against(server)
        if (server.reliability or 0.0) < settings.min_reliability:
            why = f"has a reliability of {server.reliability}"
        wanted = (settings.gpu_type or "").strip().lower()
        if not any(wanted in str(name).lower() for name in server.get("gpu_array") or [""]):
            why = f"has no {settings.gpu_type}"
        if why:
            return [], f"server {settings.server_id} {why}: choose another, or change the filters"
        return [server], ""
    found = client.find_servers(
        settings.gpu_type, min_reliability=settings.min_reliability, use_spot=settings.spot
    )
    if not found:
        named = f" whose GPU has {settings.gpu_type!r} in its name" if settings.gpu_type else ""
        least = settings.min_reliability
        reliable = f", with a reliability of at least {least:g}" if least else ""
        return [], f"there is no free server{named}{reliable}: try later, or change the filters"
    fitting = [s for s in found if s.id is not None and settings.reason_against(s) is None]
    fitting.sort(key=lambda s: p if (p := settings.price_of(s)) is not None else float("inf"))
    return fitting, (
        f"none of {len(found)} free servers of that kind fits the price and the currency: raise "
        "max_price_usd, or use another currency"
    )
