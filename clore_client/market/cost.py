"""Estimate what a rental costs, with the fees of the account."""

from __future__ import annotations

from typing import Any, NamedTuple

from clore_client.models.record import part_of
from clore_client.models.server import Server, listed_rate, price_in
from clore_client.pricing import (
    CREATION_FEE,
    ExchangeRates,
    creation_fee_after,
    finite,
    published_fee,
)

HIGHEST_PERCENT = 100.0  # a fee above that is not believed


class CostEstimate(NamedTuple):
    """The cost of a rental. An amount is None if a price or an exchange rate is not known.

    Attributes:
        server_id, hours, currency: as for ``CloreClient.estimate_cost``.
        usd_per_hour: the price or bid in USD per hour, without fees.
        base_usd, renter_fee_usd, creation_fee_usd, total_usd: the amounts in USD.
        base, renter_fee, creation_fee, total: the same amounts in ``currency``.
    """

    server_id: int | None
    hours: float
    currency: str
    usd_per_hour: float | None
    base_usd: float | None
    renter_fee_usd: float | None
    creation_fee_usd: float
    total_usd: float | None
    base: float | None
    renter_fee: float | None
    creation_fee: float | None
    total: float | None


class Fees:
    """The fees of an account, or the published ones.

    Parameters:
        response: the response to ``renter_fees``; empty for the published fees.
    """

    def __init__(self, response: dict[str, Any]) -> None:
        self._response = response

    def fraction(self, spot: bool, currency: str) -> float:
        """Return the renter's fee as a fraction of the price."""
        kind = "spot" if spot else "on_demand"
        percent = finite(part_of(self._response, "renter_fees", kind, "base", currency))
        if percent is None or not 0 <= percent <= HIGHEST_PERCENT:
            return published_fee(spot)
        return percent / 100

    def creation_usd(self, spot: bool, currency: str, rate: float | None) -> float:
        """Return the creation fee in USD; ``rate`` is USD for one unit of the currency."""
        kind = "spot" if spot else "on_demand"
        amount = finite(part_of(self._response, "creation_fees", kind, currency))
        if amount is None or amount < 0 or rate is None:
            return CREATION_FEE
        return amount * rate


def estimate(
    server: Server,
    hours: float,
    *,
    currency: str,
    spot: bool,
    spot_price: float | None,
    fees: Fees,
    rates: ExchangeRates,
) -> CostEstimate:
    """Estimate the cost of a rental; see ``CloreClient.estimate_cost``."""
    rate = listed_rate(server, currency) or rates.rate(currency)
    price = spot_price if spot_price is not None else price_in(server, False, spot, currency)
    fraction = fees.fraction(spot, currency)
    base = None if price is None else price * hours
    fee = None if base is None else base * fraction
    creation = creation_fee_after(hours * 3600.0, fees.creation_usd(spot, currency, rate))
    total = None if base is None or fee is None else base + fee + creation

    def in_currency(usd: float | None) -> float | None:
        return usd / rate if usd is not None and rate else None

    return CostEstimate(
        server.id, hours, currency, price, base, fee, creation, total,
        in_currency(base), in_currency(fee), in_currency(creation), in_currency(total),
    )  # fmt: skip
