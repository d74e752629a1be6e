"""Check spot bids, and convert them from USD per hour to the unit of the API."""

from __future__ import annotations

import math
import time
from typing import Any

from clore_client.errors import RateUnknownError
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.models.record import dicts, is_live
from clore_client.pricing import RATE_MAX_AGE, ExchangeRates, bid_per_day, per_hour, positive

# A bid above this is probably a price per day, which is 24 times too high.
MAX_TIMES_ON_DEMAND = 10.0
ROUNDING = 1e-9  # the rounding error between prices per day and per hour


class MarketData:
    """The form, the exchange rates and the listed prices of one API."""

    def __init__(self) -> None:
        self.rates = ExchangeRates()
        self.listed: dict[int, float] = {}  # server id -> on-demand USD per hour
        self.live = False  # whether a response was certainly in the live form
        self._documented_at = -math.inf

    @property
    def documented(self) -> bool:
        """True if a response of the last minutes was certainly in the documented form."""
        return time.monotonic() - self._documented_at <= RATE_MAX_AGE

    def observe(self, response: dict[str, Any]) -> None:
        """Record that the API uses the live form, if a response shows it."""
        if is_live(response):
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


def in_documented_form(order: Order) -> bool:
    """Return whether an order has a field that only the documented form has."""
    return order.is_live is False and any(
        name in order.wire for name in ("status", "connection", "renting_server")
    )


def with_hourly_offers(response: dict[str, Any]) -> dict[str, Any]:
    """Add ``usd_per_hour`` to the offers of a ``spot_marketplace`` response.

    A ``bid`` is per day in the offer's currency. The exchange rates are in the same response.
    """
    market = response.get("market")
    if not isinstance(market, dict) or not isinstance(market.get("offers"), list):
        return response
    live, rates = is_live(response), ExchangeRates()
    rates.update(market.get("currency_rates_in_usd"))

    def hourly(offer: dict[str, Any]) -> float | None:
        if live:
            usd_per_day = rates.usd(positive(offer.get("bid")), offer.get("currency"))
            return None if usd_per_day is None else per_hour(usd_per_day)
        stated = (positive(offer.get(k)) for k in ("usd_per_hour", "spot_price", "price"))
        return next((price for price in stated if price is not None), None)

    response["market"] = {
        **market,
        "offers": [{**offer, "usd_per_hour": hourly(offer)} for offer in dicts(market["offers"])],
    }
    return response
