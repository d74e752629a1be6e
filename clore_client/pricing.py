"""Convert prices between units and currencies."""

from __future__ import annotations

import math
import time
from typing import Any

HOURS_PER_DAY = 24.0
# The API adds these fees to the price (seen on the live API).
FEE_ON_DEMAND = 0.05
FEE_SPOT = 0.0125
CREATION_FEE = 0.10  # USD, once for each order
CREATION_FEE_AFTER = 600.0  # seconds; a shorter order does not pay it
RATE_MAX_AGE = 300.0  # seconds; an older exchange rate does not convert a bid

# Common names, and the names of the API.
CURRENCIES: dict[str, str] = {
    "bitcoin": "bitcoin",
    "btc": "bitcoin",
    "clore-blockchain": "CLORE-Blockchain",
    "clore": "CLORE-Blockchain",
    "usd-blockchain": "USD-Blockchain",
    "usd": "USD-Blockchain",
}


def finite(value: Any) -> float | None:
    """Return ``value`` as a float if it is a finite number and not a bool, else None."""
    if type(value) is float:  # the usual case, kept fast
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def positive(value: Any) -> float | None:
    """Return ``value`` as a float if it is a finite number above 0, else None."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def per_hour(per_day: Any) -> Any:
    """Convert a price per day to a price per hour, and return any other value unchanged."""
    number = finite(per_day)
    return per_day if number is None else number / HOURS_PER_DAY


def wire_currency(name: str) -> str | None:
    """Return the API's name of a currency such as ``"BTC"`` or ``"clore"``, or None."""
    return CURRENCIES.get(name.strip().lower())


def bid_per_day(usd_per_hour: float, usd_rate: float) -> float:
    """Convert a price from USD per hour to currency per day, the unit of the API.

    Parameters:
        usd_per_hour: the price or bid.
        usd_rate: USD for one unit of the currency.
    """
    return usd_per_hour * HOURS_PER_DAY / usd_rate


def bid_per_hour(per_day: float, usd_rate: float) -> float:
    """Convert a price from currency per day to USD per hour.

    Parameters:
        per_day: the price or bid.
        usd_rate: USD for one unit of the currency.
    """
    return per_day * usd_rate / HOURS_PER_DAY


def per_gpu(price: float | None, gpus: int | None) -> float | None:
    """Return the price for one of several GPUs; None if one of the numbers is not known."""
    return price / gpus if price is not None and gpus else None


def published_fee(spot: bool) -> float:
    """Return the fee that the renter pays on top of a price, as a fraction of it."""
    return FEE_SPOT if spot else FEE_ON_DEMAND


def with_fee(price: float, fee: float) -> float:
    """Add the renter's fee to a price."""
    return price * (1 + fee)


def creation_fee_after(seconds: float, fee: float = CREATION_FEE) -> float:
    """Return the creation fee of an order that has run for ``seconds``: 0 before ten minutes."""
    return fee if seconds >= CREATION_FEE_AFTER else 0.0


class ExchangeRates:
    """Keep the latest exchange rates of one API: USD for one unit of a currency."""

    def __init__(self) -> None:
        # (rates, time), replaced in one step, so that readers need no lock.
        self._latest: tuple[dict[str, float], float] = ({}, -math.inf)

    def update(self, rates: Any, *, display_only: bool = False) -> None:
        """Store exchange rates, and skip values that are not prices.

        Parameters:
            rates: a dict from the API, with USD for each currency.
            display_only: whether they must not convert bids.
        """
        if not isinstance(rates, dict):
            return
        good = {name: rate for name, value in rates.items() if (rate := positive(value))}
        known, stored_at = self._latest
        if good and not display_only:
            self._latest = (good, time.monotonic())
        elif good and not self.fresh():
            self._latest = ({**known, **good}, stored_at)

    def fresh(self) -> dict[str, float]:
        """Return the rates that may convert bids; an empty dict if they are too old."""
        rates, stored_at = self._latest
        return rates if time.monotonic() - stored_at <= RATE_MAX_AGE else {}

    def rate(self, currency: Any) -> float | None:
        """Return USD for one unit of ``currency``, for display; None if it is not known."""
        if not isinstance(currency, str):
            return None
        name = wire_currency(currency) or currency
        return 1.0 if name == "USD-Blockchain" else self._latest[0].get(name)

    def usd(self, amount: Any, currency: Any) -> float | None:
        """Convert ``amount`` of ``currency`` to USD for display, or return None."""
        number, rate = finite(amount), self.rate(currency)
        return None if number is None or rate is None else number * rate
