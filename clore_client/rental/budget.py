"""Count the cost of a rental, and check its limits."""

from __future__ import annotations

import time

from clore_client.rental.selection import CREATION_FEE, CREATION_FEE_AFTER, RentalSettings

LONGEST_WATCH = 30.0  # seconds between two checks, because the wall clock can jump
FEE_LEAD = 5.0  # the budget counts the creation fee this many seconds early


class Age:
    """The age of an order: the larger of two clocks, as a laptop that sleeps still pays."""

    def __init__(self) -> None:
        self.monotonic = time.monotonic()
        self.wall = time.time()

    def seconds(self) -> float:
        """Return the age in seconds."""
        return max(0.0, time.monotonic() - self.monotonic, time.time() - self.wall)


class Meter:
    """The cost of one order. A new bid changes its price."""

    def __init__(self, usd_per_hour: float | None, fee: float) -> None:
        self.age = Age()
        self._fee = fee
        self._prices: list[tuple[float, float]] = [(0.0, usd_per_hour or 0.0)]  # (since, price)

    @property
    def usd_per_hour(self) -> float:
        """The current price in USD per hour, without fees."""
        return self._prices[-1][1]

    def correct(self, usd_per_hour: float) -> None:
        """Correct the price from the start, unless a bid has changed it."""
        if len(self._prices) == 1:
            self._prices = [(0.0, usd_per_hour)]

    def change(self, usd_per_hour: float) -> None:
        """Set the price from now on."""
        self._prices.append((self.age.seconds(), usd_per_hour))

    def usd(self) -> float:
        """Return the cost so far in USD, with all fees."""
        prices, now, rent = self._prices, self.age.seconds(), 0.0
        for index, (since, price) in enumerate(prices):
            until = prices[index + 1][0] if index + 1 < len(prices) else now
            rent += price * max(0.0, min(until, now) - since) / 3600.0
        return rent * (1 + self._fee) + (CREATION_FEE if now >= CREATION_FEE_AFTER else 0.0)


class Budget:
    """The limits of a rental, and the meters of its orders."""

    def __init__(self, settings: RentalSettings) -> None:
        self._max_hours, self._max_cost = settings.max_hours, settings.max_cost_usd
        self._fee = settings.fee
        self._since: Age | None = None  # of the first order
        self._spent = 0.0  # USD, for orders that have ended
        self._meters: list[Meter] = []

    @property
    def hours(self) -> float:
        """The hours since the first order was sent."""
        return self._since.seconds() / 3600.0 if self._since else 0.0

    @property
    def cost_usd(self) -> float:
        """The cost of all orders so far, in USD."""
        return self._spent + sum(meter.usd() for meter in list(self._meters))

    def start(self, usd_per_hour: float | None) -> Meter:
        """Start to count another order."""
        meter = Meter(usd_per_hour, self._fee)
        self._since = self._since or meter.age
        self._meters.append(meter)
        return meter

    def stop(self, meter: Meter) -> None:
        """Stop counting an order that costs nothing any more. Safe to repeat."""
        if meter in self._meters:
            spent = meter.usd()
            self._meters.remove(meter)
            self._spent += spent

    def drop(self, meter: Meter) -> None:
        """Forget an order that was not made."""
        if meter in self._meters:
            self._meters.remove(meter)
            if not self._meters and not self._spent:
                self._since = None

    def resume(self, meter: Meter) -> None:
        """Count a dropped order again, from its start, because it was made after all."""
        if meter not in self._meters:
            self._meters.append(meter)
            self._since = self._since or meter.age

    def exceeded_by(self) -> str | None:
        """Return a text that names the limit that is reached, or None."""
        if self._max_hours is not None and self.hours >= self._max_hours:
            return f"max_hours={self._max_hours:g} is reached"
        if self._max_cost is not None and self.cost_usd + self._fee_due() >= self._max_cost:
            return f"max_cost_usd={self._max_cost:g} is reached"
        return None

    def _fee_due(self) -> float:
        ages = [meter.age.seconds() for meter in self._meters]
        soon = [age for age in ages if CREATION_FEE_AFTER - FEE_LEAD <= age < CREATION_FEE_AFTER]
        return CREATION_FEE * len(soon)

    def seconds_left(self) -> float | None:
        """Return the seconds until the next check; None without a limit."""
        if self._max_hours is None and self._max_cost is None:
            return None
        left = [LONGEST_WATCH]
        if self._max_hours is not None:
            left.append((self._max_hours - self.hours) * 3600.0)
        if self._max_cost is not None:
            per_second = sum(m.usd_per_hour for m in self._meters) * (1 + self._fee) / 3600.0
            if per_second:
                left.append((self._max_cost - self.cost_usd) / per_second)
            to_fee = [CREATION_FEE_AFTER - FEE_LEAD - m.age.seconds() for m in self._meters]
            left += [seconds for seconds in to_fee if seconds > 0]
        return max(0.002, min(left))
