"""Check spot bids, and convert them from USD per hour to the unit of the API."""

from __future__ import annotations

import math
import time
from typing import Any

from clore_client.errors import RateUnknownError
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.models.record import is_live
from clore_client.models.server import Marketplace, Server
from clore_client.models.spot_market import SpotMarket
from clore_client.pricing import RATE_MAX_AGE, ExchangeRates, bid_per_day, positive

# A bid above this is probably a price per day, which is 24 times too high.
MAX_TIMES_ON_DEMAND = 10.0
ROUNDING = 1e-9  # the rounding error between prices per day and per hour


class MarketData:
    """The form, the exchange rates and the listed prices of one API.

    Attributes:
        kept: the last list of servers and the monotonic time of its reading, if a search may use
            it again.
    """

    def __init__(self) -> None:
        self.kept: tuple[Marketplace, float] | None = None
        self.rates = ExchangeRates()
        self.listed: dict[int, float] = {}  # server id -> on-demand USD per hour
        self.live = False  # whether a response was certainly in the live form
        self.rates_tried_at = -math.inf  # monotonic time of the last try to read them for display
        self._documented_at = -math.inf

    @property
    def documented(self) -> bool:
        """True if a response of the last minutes was certainly in the documented form."""
        return time.monotonic() - self._documented_at <= RATE_MAX_AGE

    def observe(self, response: dict[str, Any]) -> None:
        """Record that the API uses the live form, if a response shows it."""
        if is_live(response):
            self.observe_live()

    def observe_live(self) -> None:
        """Record that the API uses the live form."""
        self.live = True
        self._documented_at = -math.inf

    def observe_spot(self, response: dict[str, Any]) -> None:
        """Record the form and the exchange rates of a response to ``spot_marketplace``."""
        market = response.get("market")
        self.observe(response)
        if is_live(response):
            if isinstance(market, dict):
                self.rates.update(market.get("currency_rates_in_usd"))
        elif isinstance(market, dict) and market:
            # An empty market shows nothing about the form.
            self.rates = ExchangeRates()
            self._documented_at = time.monotonic()

    def check_bid_price(
        self, name: str, usd_per_hour: float, server_id: int | None, allow_any: bool
    ) -> None:
        """Warn about a bid above the server's on-demand price, and refuse one far above it.

        Does nothing if that price is not known.

        Parameters:
            name: the name of the argument, for the error.
            usd_per_hour: the bid.
            server_id: the server.
            allow_any: whether to allow any bid.

        Raises:
            ValueError: the bid is more than ten times the on-demand price.
        """
        listed = None if server_id is None else self.listed.get(server_id)
        if listed is None or usd_per_hour <= listed * (1 + ROUNDING):
            return
        highest = MAX_TIMES_ON_DEMAND * listed
        if usd_per_hour > highest * (1 + ROUNDING) and not allow_any:
            raise ValueError(
                f"{name} must be at most {highest:g} USD per hour, {MAX_TIMES_ON_DEMAND:g} times "
                f"the on-demand price of server {server_id} ({listed:g}), not {usd_per_hour!r}: "
                "give the price per hour and not per day, or pass allow_above_on_demand=True"
            )
        logger.warning(
            "%s=%r USD per hour is above the on-demand price of server %s, %g USD per hour",
            name,
            usd_per_hour,
            server_id,
            listed,
        )

    def wire_bid(self, usd_per_hour: float, currency: str, server_id: int) -> float:
        """Convert a bid to the unit of the API.

        That is ``currency`` per day in the live form, and USD per hour in the documented form.

        Raises:
            RateUnknownError: the exchange rate is not known.
        """
        if self.documented:
            logger.info("bid for server %d: %g USD per hour", server_id, usd_per_hour)
            return usd_per_hour
        rate = positive(self.rates.fresh().get(currency))
        if rate is None:
            raise RateUnknownError(
                f"the spot market of server {server_id} has no exchange rate for {currency}, so "
                "nothing was bid: try again later, or use another currency"
            )
        bid = bid_per_day(usd_per_hour, rate)
        logger.info(
            "bid for server %d: %g USD per hour = %.8g %s per day (1 %s = %g USD)",
            server_id,
            usd_per_hour,
            bid,
            currency,
            currency,
            rate,
        )
        return bid


def suggested_bid(market: SpotMarket, server: Any, margin: float) -> float | None:
    """Return a bid in USD per hour that would rent a server now, or None if no bid is known.

    Parameters:
        market: the spot market of the server.
        server: the server; an id has no prices.
        margin: what to add, as a fraction of the bid.
    """
    listed = server if isinstance(server, Server) else Server()
    lowest = market.lowest_winning_usd
    if market.minimum_usd is None:
        lowest = max((bid for bid in (lowest, listed.spot_usd_per_hour) if bid), default=None)
    if lowest is None:
        return None
    on_demand, bid = listed.usd_per_hour, lowest * (1 + margin)
    return min(bid, on_demand) if on_demand is not None and on_demand > lowest else bid


def in_documented_form(order: Order) -> bool:
    """Return whether an order has a field that only the documented form has."""
    return order.is_live is False and any(
        name in order.wire for name in ("status", "connection", "renting_server")
    )
