"""Define accounts and orders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .catalog import RATES

DAY = 86_400.0
# Differences between live orders, with the fraction of orders that has each.
ORDER_QUIRKS = {
    "filled_early": 0.4,  # host and ports are set before `mon_container` is 2
    "no_lists_early": 0.4,  # before that, `pub_cluster` and `tcp_ports` are missing, not empty
    "mon_container_1": 0.5,  # before that, `mon_container` is 1, not 0
    "host_as_text": 0.2,  # `pub_cluster` is a string, not a list
    "defaults_missing": 0.3,  # `fee`, and `spot` and `expired` if false, are missing
    "newer_fields": 0.3,  # `original_price_usd`, `my_past_rating`, and `limit` in the envelope
}
FEE_RATES = {"on-demand": 0.05, "spot": 0.0125}


@dataclass
class Account:
    """Hold an API key with its wallets and orders; balances are in each wallet's currency."""

    key: str = field(repr=False)
    balances: dict[str, float | None]
    deposits: dict[str, str]
    settled: dict[str, float]
    orders: list[Order] = field(default_factory=list, repr=False)
    active: dict[int, Order] = field(default_factory=dict, repr=False)


@dataclass
class Order:
    """Hold an order. Times are monotonic; amounts are in `currency` unless they say USD."""

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
    created_at: int  # Unix time of the server's clock
    visible_at: float
    deploy_after: float
    linger_seconds: float
    body: dict[str, Any] = field(repr=False)  # what create_order sent
    quirks: frozenset[str] = frozenset()  # names from ORDER_QUIRKS
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
    creation_fee: float = 0.0  # 0 until charged

    @property
    def active(self) -> bool:
        """Return whether the order has not ended."""
        return self.ended is None

    @property
    def status(self) -> str:
        """Return creating, running, cancelled or expired, without the lag of my_orders."""
        if self.ended is not None:
            return "cancelled" if self.ended_by == "cancel" else "expired"
        return "creating" if self.deployed is None or not self.online else "running"

    @property
    def fee_rate(self) -> float:
        """Return the renter's fee as a fraction of the price."""
        return FEE_RATES["spot" if self.spot else "on-demand"]

    @property
    def charged(self) -> float:
        """Return the total charged so far: rent and fees."""
        return self.rent + self.fee + self.creation_fee

    @property
    def charged_usd(self) -> float:
        """Return the total charged so far in USD."""
        return self.charged * RATES[self.currency]

    @property
    def usd_per_hour(self) -> float:
        """Return the price in USD per hour, without fees."""
        return self.price * RATES[self.currency] / 24

    @property
    def ssh_port(self) -> int | None:
        """Return the public port for SSH, if port 22 was ordered."""
        return self.tcp_ports.get(22)

    def is_visible(self, now: float) -> bool:
        """Return whether my_orders shows the order yet."""
        return now >= self.visible_at

    def is_gone(self, now: float) -> bool:
        """Return whether the order ended, and my_orders shows that."""
        return self.ended is not None and now >= self.ended + self.linger_seconds
