"""What a rental costs, and when it has cost enough."""

from __future__ import annotations

import time

from clore_client.rental.selection import CREATION_FEE, CREATION_FEE_AFTER, RentalSettings

LONGEST_WATCH = 30.0  # seconds between two looks at the budget: the wall clock may have jumped
FEE_LEAD = 5.0  # seconds before the creation fee is due, when it counts for the budget


class Age:
    """How long something costs money: the larger of two clocks, for a laptop asleep still pays."""

    def __init__(self) -> None:
        self.monotonic = time.monotonic()
        self.wall = time.time()

    def seconds(self) -> float:
        """Return the seconds since it was made."""
        return max(0.0, time.monotonic() - self.monotonic, time.time() - self.wall)


class Meter:
    """What one order costs, by its price in USD per hour, which a new bid changes."""

    def __init__(self, usd_per_hour: float | None, fee: float) -> None:
        self.age = Age()
        self._fee = fee
        self._prices: list[tuple[float, float]] = [(0.0, usd_per_hour or 0.0)]  # from which second

    @property
    def usd_per_hour(self) -> float:
        """The price of this moment, without fees."""
        return self._prices[-1][1]

    def correct(self, usd_per_hour: float) -> None:
        """Set the price that has held from the start, before any bid has changed it."""
        if len(self._prices) == 1:
            self._prices = [(0.0, usd_per_hour)]

    def change(self, usd_per_hour: float) -> None:
        """Set the price that holds from now on."""
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
        self._spent = 0.0  # USD, by orders that have ended
        self._meters: list[Meter] = []

    @property
    def hours(self) -> float:
        """Hours since the first order was sent."""
        return self._since.seconds() / 3600.0 if self._since else 0.0

    @property
    def cost_usd(self) -> float:
        """USD that all orders have cost so far."""
        return self._spent + sum(meter.usd() for meter in list(self._meters))

    def start(self, usd_per_hour: float | None) -> Meter:
        """Count another order from now on."""
        meter = Meter(usd_per_hour, self._fee)
        self._since = self._since or meter.age
        self._meters.append(meter)
        return meter

    def stop(self, meter: Meter) -> None:
        """Add up an order that costs nothing any more. Safe to repeat."""
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
        """Count an order again that was made after all, from when it was sent."""
        if meter not in self._meters:
            self._meters.append(meter)
            self._since = self._since or meter.age

    def exceeded_by(self) -> str | None:
        """Say which limit is reached; None where none is."""
        if self._max_hours is not None and self.hours >= self._max_hours:
            return f"max_hours={self._max_hours:g} is over"
        if self._max_cost is not None and self.cost_usd + self._fee_due() >= self._max_cost:
            return f"max_cost_usd={self._max_cost:g} is spent"
        return None

    def _fee_due(self) -> float:
        ages = [meter.age.seconds() for meter in self._meters]
        soon = [age for age in ages if CREATION_FEE_AFTER - FEE_LEAD <= age < CREATION_FEE_AFTER]
        return CREATION_FEE * len(soon)

    def seconds_left(self) -> float | None:
        """Return the seconds after which to look again; None without a limit."""
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
