"""What the market writes down: accounts and orders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .catalog import RATES

DAY = 86_400.0
# Ways in which live orders differ, with the share of orders that have each.
ORDER_QUIRKS = {
    "filled_early": 0.4,  # host and ports stand in the record before `mon_container` is 2
    "no_lists_early": 0.4,  # no `pub_cluster` and `tcp_ports` before that, instead of empty ones
    "mon_container_1": 0.5,  # `mon_container` is 1 before that, instead of 0
    "host_as_text": 0.2,  # `pub_cluster` is a string
    "defaults_missing": 0.3,  # `fee`, and a false `spot` or `expired`, are left out
    "newer_fields": 0.3,  # `original_price_usd` and `my_past_rating`, `limit` in the envelope
}
FEE_RATES = {"on-demand": 0.05, "spot": 0.0125}


@dataclass
class Account:
    """A key with its wallets; balances are in the currency itself."""

    key: str = field(repr=False)
    balances: dict[str, float | None]
    deposits: dict[str, str]
    settled: dict[str, float]
    orders: list[Order] = field(default_factory=list, repr=False)
    active: dict[int, Order] = field(default_factory=dict, repr=False)


@dataclass
class Order:
    """An order; moments are monotonic seconds, amounts are in `currency` unless they say USD."""

    id: int
    server_id: int
    key: str = field(repr=False)
    spot: bool
    image: str
    currency: str
    price: float  # per day
    mrl: float  # hours; seconds on the wire
    creation_fee_usd: float
    created: float
    created_at: int  # Unix time by the server's clock
    visible_at: float
    deploy_after: float
    linger_seconds: float
    body: dict[str, Any] = field(repr=False)  # what create_order sent
    quirks: frozenset[str] = frozenset()  # how the live form shows it, see `ORDER_QUIRKS`
    http_port: str = ""
    http_pub: str = ""
    login_token: str = field(default="", repr=False)
    tcp_ports: dict[int, int] = field(default_factory=dict)  # container port -> public port
    deployed: float | None = None
    online: bool = True
    ended: float | None = None
    ended_by: str | None = None  # "cancel", "wallet", "mrl" or "host"
    issue: str | None = None
    lowered_at: float | None = None
    rent: float = 0.0
    fee: float = 0.0
    creation_fee: float = 0.0  # 0 until it is charged

    @property
    def active(self) -> bool:
        """Whether it still runs up costs."""
        return self.ended is None

    @property
    def status(self) -> str:
        """creating, running, cancelled or expired: the truth, without any delay."""
        if self.ended is not None:
            return "cancelled" if self.ended_by == "cancel" else "expired"
        return "creating" if self.deployed is None or not self.online else "running"

    @property
    def fee_rate(self) -> float:
        """The renter's fee as a share of the price."""
        return FEE_RATES["spot" if self.spot else "on-demand"]

    @property
    def charged(self) -> float:
        """All that the wallet paid so far."""
        return self.rent + self.fee + self.creation_fee

    @property
    def charged_usd(self) -> float:
        """All that the wallet paid so far, in USD."""
        return self.charged * RATES[self.currency]

    @property
    def usd_per_hour(self) -> float:
        """The price in USD per hour, without fees."""
        return self.price * RATES[self.currency] / 24

    @property
    def ssh_port(self) -> int | None:
        """The public port of the SSH host."""
        return self.tcp_ports.get(22)

    def is_visible(self, now: float) -> bool:
        """Whether my_orders shows it at all."""
        return now >= self.visible_at

    def is_gone(self, now: float) -> bool:
        """Whether it ended, and my_orders has noticed."""
        return self.ended is not None and now >= self.ended + self.linger_seconds
