"""Count the cost of a rental, and check its limits."""

from __future__ import annotations

import time

from clore_client.pricing import (
    CREATION_FEE,
    CREATION_FEE_AFTER,
    creation_fee_after,
    with_fee,
)
from clore_client.rental.selection import RentalSettings

CHECK_INTERVAL = 1.0  # seconds between two checks of the limits
FEE_LEAD = 5.0  # the budget counts the creation fee this many seconds early


class Meter:
    """The cost of one order. A new bid changes its price.

    Attributes:
        counts: whether there is an order to pay for.
    """

    def __init__(self, usd_per_hour: float | None, fee: float, age: float = 0.0) -> None:
        self._started = time.monotonic() - age, time.time() - age
        self.counts = True
        self._fee = fee
        self._prices: list[tuple[float, float]] = [(0.0, usd_per_hour or 0.0)]  # (since, price)
        self._stopped_at: float | None = None  # the age of the order then

    def age(self) -> float:
        """Return the age of the order in seconds, by the larger of two clocks.

        The monotonic clock can stop while a laptop sleeps, but the order still costs money.
        """
        monotonic, wall = self._started
        return max(0.0, time.monotonic() - monotonic, time.time() - wall)

    @property
    def is_running(self) -> bool:
        """True if the cost still grows."""
        return self.counts and self._stopped_at is None

    def correct(self, usd_per_hour: float) -> None:
        """Correct the price from the start, unless a bid has changed it."""
        if len(self._prices) == 1:
            self._prices = [(0.0, usd_per_hour)]

    def change(self, usd_per_hour: float) -> None:
        """Set the price from now on."""
        self._prices.append((self.age(), usd_per_hour))

    def stop(self) -> None:
        """Stop the cost, because the cancel was accepted. Safe to repeat."""
        if self._stopped_at is None:
            self._stopped_at = self.age()

    def usd(self) -> float:
        """Return the cost so far in USD, with all fees."""
        if not self.counts:
            return 0.0
        end = self.age() if self._stopped_at is None else self._stopped_at
        prices, rent = self._prices, 0.0
        for index, (since, price) in enumerate(prices):
            until = prices[index + 1][0] if index + 1 < len(prices) else end
            rent += price * max(0.0, min(until, end) - since) / 3600.0
        return with_fee(rent, self._fee) + creation_fee_after(end)


class Budget:
    """The limits of a rental, and the meters of its orders."""

    def __init__(self, settings: RentalSettings) -> None:
        self._max_hours, self._max_cost = settings.max_hours, settings.max_cost_usd
        self._fee = settings.fee
        self._meters: list[Meter] = []

    @property
    def hours(self) -> float:
        """The hours since the first order was sent."""
        return max((m.age() for m in list(self._meters) if m.counts), default=0.0) / 3600.0

    @property
    def cost_usd(self) -> float:
        """The cost of all orders so far, in USD."""
        return sum(meter.usd() for meter in list(self._meters))

    def start(self, usd_per_hour: float | None, age: float = 0.0) -> Meter:
        """Start to count another order, which has an age in seconds."""
        meter = Meter(usd_per_hour, self._fee, age)
        self._meters.append(meter)
        return meter

    def exceeded_by(self) -> str | None:
        """Return a text that names the limit that is reached, or None."""
        if self._max_hours is not None and self.hours >= self._max_hours:
            return f"max_hours={self._max_hours:g} is reached"
        if self._max_cost is not None and self.cost_usd + self._fee_due() >= self._max_cost:
            return f"max_cost_usd={self._max_cost:g} is reached"
        return None

    def _fee_due(self) -> float:
        ages = [meter.age() for meter in list(self._meters) if meter.is_running]
        soon = [age for age in ages if CREATION_FEE_AFTER - FEE_LEAD <= age < CREATION_FEE_AFTER]
        return CREATION_FEE * len(soon)

    @property
    def seconds_between_checks(self) -> float | None:
        """The seconds between two checks; None without a limit."""
        return None if self._max_hours is None and self._max_cost is None else CHECK_INTERVAL
