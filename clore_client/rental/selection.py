"""Select the servers that ``rent()`` tries, with their prices."""

from __future__ import annotations

import re
from typing import Any

from clore_client.market.market import WORKED, HostHistory, Market
from clore_client.market.search import RENTED, ROUNDING_UP, Search, SearchReport
from clore_client.models.order import Order
from clore_client.models.server import Server, listed_rate
from clore_client.orders.create import order_body
from clore_client.pricing import finite, positive, wire_currency
from clore_client.validation import (
    check_bool,
    check_count,
    check_id,
    check_interval,
    check_number,
    check_optional_number,
    check_text,
)

BID_MARGIN = 1e-4  # added to the lowest bid, which the conversion can make too low
PRICE_SLACK = 1e-4  # the rounding error of an exchange rate


class RentalSettings:
    """Check and keep the arguments of ``rent()``.

    Parameters:
        search: the filters; its ``server_id`` is set here.
        order: the arguments that ``create_order`` takes too, except the bid and ``find_timeout``.

    Attributes:
        order_arguments: the arguments for ``create_order``.
    """

    def __init__(
        self,
        *,
        search: Search,
        order: dict[str, Any],
        cancel_timeout: Any,
        max_hours: Any,
        max_cost_usd: Any,
        server_id: Any = None,
        spot_price: Any = None,
        attempts: Any = 1,
        deploy_timeout: Any = 0.0,
        poll_interval: Any = 1.0,
        find_timeout: Any = 0.0,
        prefer_known: Any = False,
    ) -> None:
        self.prefer_known = check_bool("prefer_known", prefer_known)
        self.search = search
        self.spot = search.spot
        if search.gpu_type is not None:
            check_text("gpu_type", search.gpu_type)
        search.server_id = None if server_id is None else check_id("server_id", server_id)
        arguments = {**order, "order_type": "spot" if self.spot else "on-demand"}
        body = order_body(arguments)
        self.currency, self.image = body["currency"], body["image"]
        arguments["find_timeout"] = check_number("find_timeout", find_timeout, unit="seconds")
        self.order_arguments = {**arguments, "currency": self.currency}
        self.spot_price = self._checked_bid(spot_price)
        self.attempts = check_count("attempts", attempts, minimum=1)
        self.deploy_timeout = check_number(
            "deploy_timeout", deploy_timeout, infinite=True, unit="seconds"
        )
        self.poll_interval = check_interval("poll_interval", poll_interval)
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
        currency = wire_currency(str(order.get("currency"))) or "CLORE-Blockchain"
        return cls(
            search=Search(use_spot=order.is_spot is True, currency=currency),
            order={"image": order.get("image") or "unknown", "currency": currency},
            cancel_timeout=cancel_timeout,
            max_hours=max_hours,
            max_cost_usd=max_cost_usd,
        )

    def _checked_bid(self, spot_price: Any) -> float | None:
        if spot_price is None:
            return None
        check_number("spot_price", spot_price, above=True, unit="USD per hour")
        if not self.spot:
            raise ValueError(
                f"spot_price={spot_price!r} needs use_spot=True: add that, or leave it out"
            )
        highest = self.search.max_price_usd
        if highest is not None and spot_price > highest:
            raise ValueError(
                f"spot_price must be at most max_price_usd ({highest!r}), not {spot_price!r}"
            )
        return float(spot_price)

    def exceeds_price_limit(self, server: Server, usd_per_hour: float | None) -> bool:
        """Return whether the price of an order is above the limit for its server."""
        limit = self.search.price_limit(server)
        if limit is None or usd_per_hour is None:
            return False
        return usd_per_hour > limit * (1 + PRICE_SLACK)

    def price_of(self, server: Server) -> float | None:
        """Return the price of a server in USD per hour, without fees; None if not known.

        For a spot order this is the bid: None if the host does not accept it.
        """
        listed = self.search.price(server)
        if not self.spot or listed is None:
            return listed
        if self.spot_price is not None:
            return self.spot_price if self.spot_price >= listed else None
        limit = self.search.price_limit(server)
        bid = listed * (1 + BID_MARGIN)
        return bid if limit is None else min(bid, limit)

    def reason_against(self, server: Server) -> str | None:
        """Return the reason why a server of the search can't be rented, or None."""
        if server.id is None:
            return "has no id"
        price, limit = self.price_of(server), self.search.price_limit(server)
        if price is None:
            if self.spot:
                return "does not accept this bid"
            return None if self.max_cost_usd is None else "has no price"
        if limit is not None and price > limit * ROUNDING_UP:
            return f"costs {price:.4g} USD per hour, more than the limit of {limit:.4g}"
        on_demand = server.usd_per_hour
        if self.spot and on_demand is not None and price > on_demand:
            return "accepts no bid below its on-demand price"
        return None


def order_usd_per_hour(order: Any, server: Server, currency: str) -> float | None:
    """Return the price of an order in USD per hour; None if not known.

    Uses the exchange rate of the server's listing if there is one, as the price limit does.
    """
    amount, rate = positive(order.get("price")), listed_rate(server, currency)
    if amount is None or rate is None:
        return None if amount is None else finite(order.usd_per_hour)
    return amount * rate


def candidates(
    market: Market, settings: RentalSettings, history: HostHistory
) -> tuple[list[Server], str]:
    """Return the servers to try, and an error text if there are none.

    The best come first, and hosts that failed in the last day come last.
    """
    found, report = settings.search.run(market.read())
    if not found:
        server_id = settings.search.server_id
        why = report.explain() if server_id is None else _missing(server_id, report)
        return [], f"{why}: change the filters, or try again later"
    reasons = [settings.reason_against(server) for server in found]
    fitting = [s for s, reason in zip(found, reasons, strict=True) if reason is None]
    outcomes = {server_id: seen["outcome"] for server_id, seen in history.outcomes().items()}
    fitting.sort(key=lambda s: _rank(outcomes.get(s.id or 0), settings.prefer_known))
    return fitting, (
        f"none of {len(found)} servers that fit can be rented: server {found[0].id} {reasons[0]}; "
        "change the filters or the limits"
    )


def _missing(server_id: int, report: SearchReport) -> str:
    label = report.left_out[-1][0] if report.left_out else "server_id"
    if label.startswith("server_id"):
        return f"server {server_id} is not on the marketplace"
    if label == RENTED:
        return f"server {server_id} is rented"
    cost = report.cheapest_usd_per_hour
    costs = "" if cost is None else f"; it costs {cost:.4g} USD per hour"
    return f"server {server_id} does not fit {label}{costs}"


def _rank(outcome: str | None, prefer_known: bool) -> int:
    """Return 0 for the hosts to try first, 2 for those to try last, else 1."""
    if outcome is None:
        return 1
    return (0 if prefer_known else 1) if outcome == WORKED else 2


class SharedServers:
    """Offer each server to one rental only. The servers are listed on first use."""

    def __init__(self, market: Market, settings: RentalSettings, history: HostHistory) -> None:
        self.no_server = ""  # why there is none, for an error
        self._arguments = market, settings, history
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
    """Return the reason for each server; servers with the same reason share one."""
    servers: dict[str, list[str]] = {}
    for server_id, why in tried:
        # An error names its order; without the number, equal reasons are equal texts.
        alike = re.sub(r"\b([Oo])rder \d+\b", r"\1rder", why)
        servers.setdefault(alike, []).append(str(server_id))
    if len(servers) == len(tried):
        return "; ".join(f"server {server_id}: {why}" for server_id, why in tried)
    return "; ".join(
        f"server{'s' if len(ids) > 1 else ''} {', '.join(ids)}: {why}"
        for why, ids in servers.items()
    )
