"""The units: USD per hour and currency per day, exchange rates, and numbers from strangers."""

from __future__ import annotations

import math
import time
from typing import Any

HOURS_PER_DAY = 24.0
RATE_MAX_AGE = 300.0  # seconds that a rate may be old when a bid is converted with it

# The wire's names, and what people call them.
CURRENCIES: dict[str, str] = {
    "bitcoin": "bitcoin",
    "btc": "bitcoin",
    "clore-blockchain": "CLORE-Blockchain",
    "clore": "CLORE-Blockchain",
    "usd-blockchain": "USD-Blockchain",
    "usd": "USD-Blockchain",
}


def finite(value: Any) -> float | None:
    """``value`` as a float when it is a finite number and no bool; else None."""
    if type(value) is float:  # mostly, and this runs for thousands of servers
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def positive(value: Any) -> float | None:
    """``value`` as a float when it is a finite number above 0: what counts as a price."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def per_hour(per_day: Any) -> Any:
    """A price per day as one per hour; what is no number comes back as it is."""
    number = finite(per_day)
    return per_day if number is None else number / HOURS_PER_DAY


def wire_currency(name: str) -> str | None:
    """The wire's name for ``name`` (``"BTC"``, ``"clore"``, ``"USD-Blockchain"``), or None."""
    return CURRENCIES.get(name.strip().lower())


def bid_per_day(usd_per_hour: float, usd_rate: float) -> float:
    """A bid in USD per hour as currency per day.

    Parameters:
        usd_per_hour: the bid.
        usd_rate: USD for one unit of the currency.
    """
    return usd_per_hour * HOURS_PER_DAY / usd_rate


class RateBook:
    """The exchange rates of one API, as it last told them: USD for one unit of a currency."""

    def __init__(self) -> None:
        # One tuple, replaced as a whole: threads that read it need no lock.
        self._told: tuple[dict[str, float], float] = ({}, -math.inf)

    def tell(self, rates: Any, *, firm: bool = True) -> None:
        """Remember ``rates``, a mapping of wire names to USD; whatever is no price is dropped.

        Parameters:
            rates: what the API sent.
            firm: whether bids may be converted with them; if not, they serve for display.
        """
        if not isinstance(rates, dict):
            return
        good = {name: rate for name, value in rates.items() if (rate := positive(value))}
        known, told_at = self._told
        if firm and good:
            self._told = (good, time.monotonic())
        elif good and not self.fresh():
            self._told = ({**known, **good}, told_at)

    def fresh(self) -> dict[str, float]:
        """The rates that a bid may be converted with: at most five minutes old, else none."""
        rates, told_at = self._told
        return rates if time.monotonic() - told_at <= RATE_MAX_AGE else {}

    def usd(self, amount: Any, currency: Any) -> float | None:
        """``amount`` of ``currency`` in USD at the rate last told, or None. For display."""
        number = finite(amount)
        if number is None or not isinstance(currency, str):
            return None
        name = wire_currency(currency) or currency
        rate = 1.0 if name == "USD-Blockchain" else self._told[0].get(name)
        return None if rate is None else number * rate
