"""Read the spot market of a server: its offers, and a bid that would win."""

from __future__ import annotations

from typing import Any

from clore_client.models.record import Record, dicts, is_live, part_of, text_of, whole_id
from clore_client.models.server import Server
from clore_client.pricing import HOURS_PER_DAY, ExchangeRates, finite, positive


class SpotOffer(Record):
    """One bid for a server: a dict with the fields of the API and ``usd_per_hour``."""

    @property
    def id(self) -> int | None:
        """The number of the offer."""
        return whole_id(self.get("offer_id"))

    @property
    def usd_per_hour(self) -> float | None:
        """The bid in USD per hour; None if there is no exchange rate."""
        return finite(self.get("usd_per_hour"))

    @property
    def currency(self) -> str | None:
        """The currency of the bid."""
        return text_of(self, "currency")

    @property
    def is_mine(self) -> bool:
        """True if the bid is of this account."""
        return self.get("my") is True

    @property
    def is_active(self) -> bool:
        """True if the bid rents the server now."""
        return self.get("active") is True


class SpotMarket(Record):
    """The response to ``spot_marketplace``: a dict with ``market``, and typed properties."""

    SHOWN = ("minimum_usd", "lowest_winning_usd")

    @property
    def offers(self) -> list[SpotOffer]:
        """The bids for the server, in the API's order."""
        return [SpotOffer(offer) for offer in dicts(part_of(self, "market", "offers"))]

    @property
    def minimum_usd(self) -> float | None:
        """The lowest bid that the host accepts in any currency, in USD per hour, or None."""
        pricing = part_of(self, "market", "server", "min_pricing")
        if not isinstance(pricing, dict):
            return None
        rates = market_rates(self)
        bids = [rates.usd(positive(amount), currency) for currency, amount in pricing.items()]
        return min((bid / HOURS_PER_DAY for bid in bids if bid), default=None)

    @property
    def lowest_winning_usd(self) -> float | None:
        """The bid, in USD per hour, that a new bid must exceed to rent the server, or None.

        It is the highest bid of other accounts; without one, the lowest that the host accepts.
        """
        bids = [offer.usd_per_hour for offer in self.offers if not offer.is_mine]
        return max((bid for bid in [*bids, self.minimum_usd] if bid), default=None)

    def _summary(self) -> dict[str, Any]:
        return {"offers": len(self.offers), **super()._summary()}


def market_rates(response: dict[str, Any]) -> ExchangeRates:
    """Return the exchange rates in a response to ``spot_marketplace``."""
    rates = ExchangeRates()
    rates.update(part_of(response, "market", "currency_rates_in_usd"))
    return rates


def to_spot_market(response: dict[str, Any]) -> SpotMarket:
    """Convert a response to ``spot_marketplace``, and add ``usd_per_hour`` to its offers.

    A ``bid`` is per day in the offer's currency. The exchange rates are in the same response.
    """
    spot_market = SpotMarket(response)
    spot_market._wire = response
    market = response.get("market")
    if not isinstance(market, dict) or not isinstance(market.get("offers"), list):
        return spot_market
    live, rates = is_live(response), market_rates(response)

    def hourly(offer: dict[str, Any]) -> float | None:
        if live:
            per_day = rates.usd(positive(offer.get("bid")), offer.get("currency"))
            return None if per_day is None else per_day / HOURS_PER_DAY
        stated = (positive(offer.get(k)) for k in ("usd_per_hour", "spot_price", "price"))
        return next((price for price in stated if price is not None), None)

    spot_market["market"] = {
        **market,
        "offers": [{**offer, "usd_per_hour": hourly(offer)} for offer in dicts(market["offers"])],
    }
    return spot_market


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
