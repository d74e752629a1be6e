"""What the market writes down: accounts and orders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .catalog import RATES

DAY = 86_400.0
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
    mrl: float  # hours
    creation_fee_usd: float
    created: float
    created_at: int  # Unix time by the server's clock
    visible_at: float
    deploy_after: float
    lingers: float
    body: dict[str, Any] = field(repr=False)  # what create_order sent
    http_port: str = ""
    http_pub: str = ""
    login_token: str = field(default="", repr=False)
    tcp_ports: dict[int, int] = field(default_factory=dict)  # container port -> public port
    deployed: float | None = None
    online: bool = True
    ended: float | None = None
    ended_by: str | None = None  # "cancel", "wallet", "mrl" or "host"
    issue: str | None = None
    lowered: float | None = None
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
        """The public port of the SSH host, once deployed."""
        return self.tcp_ports.get(22)

    def is_visible(self, now: float) -> bool:
        """Whether my_orders shows it at all."""
        return now >= self.visible_at

    def is_gone(self, now: float) -> bool:
        """Whether it ended, and my_orders has noticed."""
        return self.ended is not None and now >= self.ended + self.lingers
