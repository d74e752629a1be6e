"""Select the servers that ``rent()`` tries, with their prices."""

from __future__ import annotations

import re
from typing import Any

from clore_client.errors import printable
from clore_client.market.host_history import WORKED, HostHistory
from clore_client.models.order import Order
from clore_client.models.record import part_of
from clore_client.models.server import Server, on_demand_usd
from clore_client.orders.create import check_login, order_env, order_ports
from clore_client.pricing import HOURS_PER_DAY, finite, positive, wire_currency
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
        prefer_known: Any = False,
    ) -> None:
        self.prefer_known = check_bool("prefer_known", prefer_known)
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

    @classmethod
    def of_order(
        cls, order: Order, *, max_hours: Any, max_cost_usd: Any, cancel_timeout: Any
    ) -> RentalSettings:
        """Return the settings for an order that exists."""
        names = ("ports", "env", "ssh_password", "ssh_key", "jupyter_token")
        known = {
            "image": order.get("image") or "unknown",
            "currency": wire_currency(str(order.get("currency"))) or "CLORE-Blockchain",
        }
        return cls(
            gpu_type=None, max_price_usd=None, min_reliability=0.0, server_id=None, spot_price=None,
            use_spot=order.is_spot is True, order={**dict.fromkeys(names), **known},
            attempts=1, deploy_timeout=0.0, poll_interval=1.0, find_timeout=0.0,
            cancel_timeout=cancel_timeout, max_hours=max_hours, max_cost_usd=max_cost_usd,
        )  # fmt: skip

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

    def reason_against(self, server: Server, limited: bool = True) -> str | None:
        """Return the reason why a server does not fit, or None if it fits.

        Parameters:
            server: the server.
            limited: whether ``max_price_usd`` counts.
        """
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
        limit = self.max_price_usd if limited else None
        if limit is not None and price > limit * (1 + 1e-12):
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


def candidates(
    client: RentalClient, settings: RentalSettings, history: HostHistory
) -> tuple[list[Server], str]:
    """Return the servers to try, and an error text if there are none.

    The cheapest come first, and hosts that have just disappointed last.
    """
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
    outcomes = {server_id: seen["outcome"] for server_id, seen in history.outcomes().items()}
    fitting.sort(key=lambda s: _rank(outcomes.get(s.id or 0), settings.prefer_known))
    return fitting, (
        f"none of {len(found)} free servers of that kind fits the price and the currency"
        f"{_cheapest_beyond(found, settings)}: raise max_price_usd, or use another currency"
    )


def _rank(outcome: str | None, prefer_known: bool) -> int:
    """Return 0 for the hosts to try first, 2 for those to try last, else 1."""
    if outcome is None:
        return 1
    return (0 if prefer_known else 1) if outcome == WORKED else 2


def _cheapest_beyond(servers: list[Server], settings: RentalSettings) -> str:
    """Return the part of an error that names the cheapest server without the price limit."""
    prices = [
        (price, server.id, server.gpu_name)
        for server in servers
        if settings.reason_against(server, limited=False) is None
        and (price := settings.price_of(server)) is not None
    ]
    if settings.max_price_usd is None or not prices:
        return ""
    price, server_id, gpu = min(prices, key=lambda found: found[0])
    return (
        f"; the cheapest without max_price_usd={settings.max_price_usd:g} is server {server_id} "
        f"({printable(str(gpu), 60)}) for {price:.4g} USD per hour"
    )


class SharedServers:
    """The servers to try, each taken by one rental only. They are listed on first use."""

    def __init__(
        self, client: RentalClient, settings: RentalSettings, history: HostHistory
    ) -> None:
        self.no_server = ""  # why there is none, for an error
        self._arguments = client, settings, history
        self._left: list[Server] | None = None

    def count(self) -> int:
        """List the servers, the first time, and return how many are left."""
        if self._left is None:
            self._left, self.no_server = candidates(*self._arguments)
        return len(self._left)

    def take(self) -> Server | None:
        """Return the next server, or None."""
        self.count()
        try:
            return (self._left or []).pop(0)  # one atomic step
        except IndexError:
            return None


def summary(tried: list[tuple[int, str]]) -> str:
    """Return the reason for each server, but a common reason only once."""
    servers: dict[str, list[str]] = {}
    for server_id, why in tried:
        # The text of an error names the order, which differs.
        alike = re.sub(r"\b([Oo])rder \d+\b", r"\1rder", why)
        servers.setdefault(alike, []).append(str(server_id))
    if len(servers) == len(tried):
        return "; ".join(f"server {server_id}: {why}" for server_id, why in tried)
    return "; ".join(
        f"server{'s' if len(ids) > 1 else ''} {', '.join(ids)}: {why}"
        for why, ids in servers.items()
    )
