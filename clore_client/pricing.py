"""Convert prices between units and currencies."""

from __future__ import annotations

import math
import time
from typing import Any

HOURS_PER_DAY = 24.0
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
    """Convert a bid from USD per hour to currency per day.

    Parameters:
        usd_per_hour: the bid.
        usd_rate: USD for one unit of the currency.
    """
    return usd_per_hour * HOURS_PER_DAY / usd_rate


class ExchangeRates:
    """The latest exchange rates of one API: USD for one unit of a currency."""

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

    def usd(self, amount: Any, currency: Any) -> float | None:
        """Convert ``amount`` of ``currency`` to USD for display, or return None."""
        number = finite(amount)
        if number is None or not isinstance(currency, str):
            return None
        name = wire_currency(currency) or currency
        rate = 1.0 if name == "USD-Blockchain" else self._latest[0].get(name)
        return None if rate is None else number * rate
