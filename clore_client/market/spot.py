"""Bids: from USD per hour to what the API takes, and never a number of which that is not sure."""

from __future__ import annotations

import math
import time
from typing import Any

from clore_client.errors import RateUnknownError
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.models.record import dicts, is_live
from clore_client.pricing import RATE_MAX_AGE, RateBook, bid_per_day, per_hour, positive

# A price per day taken for one per hour is 24 times too high; an honest bid is far below this.
MAX_TIMES_ON_DEMAND = 10.0
ROUNDING = 1e-9  # what a price may lose on its way between per day and per hour


class MarketData:
    """What one client knows of one API: its form, its exchange rates, the prices it listed."""

    def __init__(self) -> None:
        self.rates = RateBook()
        self.listed: dict[int, float] = {}  # server id -> on-demand USD per hour
        self.live = False  # whether an answer was positively in the live form
        self._documented_at = -math.inf

    @property
    def documented(self) -> bool:
        """Whether an answer of the last minutes was positively in the documented form."""
        return time.monotonic() - self._documented_at <= RATE_MAX_AGE

    def observe(self, answer: dict[str, Any]) -> None:
        """Take from an answer of any kind that it is in the live form."""
        if is_live(answer):
            self.live = True
            self._documented_at = -math.inf

    def observe_spot(self, answer: dict[str, Any]) -> None:
        """Take the form and the rates from an answer of ``spot_marketplace``."""
        market = answer.get("market")
        if is_live(answer):
            self.live = True
            self._documented_at = -math.inf
            if isinstance(market, dict):
                self.rates.tell(market.get("currency_rates_in_usd"))
        elif isinstance(market, dict) and market:
            # An empty one would show no marker either: it is no evidence.
            self.rates = RateBook()
            self._documented_at = time.monotonic()

    def check_bid_price(
        self, name: str, usd_per_hour: float, server_id: int | None, allow_any: bool
    ) -> None:
        """Warn about a bid above the server's on-demand price; refuse one far above it.

        Checks nothing where that price is not known.

        Parameters:
            name: the argument that the bid came in, for the error.
            usd_per_hour: the bid.
            server_id: the server that the bid is for.
            allow_any: whether to send a bid however far above it is.

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
                f"the on-demand price of server {server_id} ({listed:g}), not {usd_per_hour!r}: is "
                "it a price per day? Pass allow_above_on_demand=True to bid it anyway"
            )
        logger.warning(
            "%s=%r USD per hour is above the on-demand price of server %s, %g USD per hour",
            name,
            usd_per_hour,
            server_id,
            listed,
        )

    def wire_bid(self, usd_per_hour: float, currency: str, server_id: int) -> float:
        """A bid as the API takes it: per day in ``currency``, or as it is in the documented form.

        Raises:
            RateUnknownError: neither the form nor a rate is known for sure.
        """
        if self.documented:
            logger.info("bid for server %d: %g USD per hour", server_id, usd_per_hour)
            return usd_per_hour
        rate = positive(self.rates.fresh().get(currency))
        if rate is None:
            raise RateUnknownError(
                f"no exchange rate for {currency} came with the spot market of server {server_id}: "
                "nothing was bid"
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


def surely_documented(order: Order) -> bool:
    """Whether an order came in the documented form, with a field that only that one has."""
    return order.is_live is False and any(
        name in order.wire for name in ("status", "connection", "renting_server")
    )


def with_hourly_offers(answer: dict[str, Any]) -> dict[str, Any]:
    """A ``spot_marketplace`` answer whose offers carry ``usd_per_hour`` as well.

    A ``bid`` is per day in the offer's currency, and is turned by the rates of the same answer.
    """
    market = answer.get("market")
    if not isinstance(market, dict) or not isinstance(market.get("offers"), list):
        return answer
    live, rates = is_live(answer), RateBook()
    rates.tell(market.get("currency_rates_in_usd"))

    def hourly(offer: dict[str, Any]) -> float | None:
        if live:
            usd_per_day = rates.usd(positive(offer.get("bid")), offer.get("currency"))
            return None if usd_per_day is None else per_hour(usd_per_day)
        stated = (positive(offer.get(k)) for k in ("usd_per_hour", "spot_price", "price"))
        return next((price for price in stated if price is not None), None)

    answer["market"] = {
        **market,
        "offers": [{**offer, "usd_per_hour": hourly(offer)} for offer in dicts(market["offers"])],
    }
    return answer
