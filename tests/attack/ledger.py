"""The true state of a fault server: the orders that were really made and ended."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RATES = {"bitcoin": 60000.0, "CLORE-Blockchain": 0.0025, "USD-Blockchain": 1.0}
FIRST_SERVER = 101
FIRST_PRICE = 3.0  # USD per day; each further server costs STEP more
STEP = 0.3
WEEK = 604800  # seconds

Answer = tuple[int, dict[str, Any]]  # HTTP status, envelope


@dataclass
class LedgerOrder:
    """The true state of one order. Times are monotonic, except ``created``."""

    id: int
    server_id: int
    currency: str
    image: str
    spot: bool
    price: float  # per day, in ``currency``
    made_at: float = field(default_factory=time.monotonic)
    created: float = field(default_factory=time.time)
    cancelled_at: float | None = None

    @property
    def active(self) -> bool:
        """Return whether it runs, and costs money."""
        return self.cancelled_at is None


@dataclass
class Flap:
    """Order lists that are empty for a moment.

    Attributes:
        skip: how many lists before them have all orders.
        lists: how many lists are empty at most.
        seconds: how long lists are empty at most, from the first one on.
    """

    skip: int
    lists: int
    seconds: float
    began: float | None = None

    def takes(self) -> bool:
        """Return whether the next list is empty."""
        if self.skip > 0:
            self.skip -= 1
            return False
        now = time.monotonic()
        self.began = now if self.began is None else self.began
        self.lists -= 1
        return self.lists >= 0 and now - self.began <= self.seconds


def refused(code: int, error: str | None = None) -> Answer:
    """Return an error of the API, with HTTP status 200."""
    return 200, {"code": code, **({"error": error} if error else {})}


@dataclass
class Ledger:
    """A marketplace in the live form, whose misbehavior is set here.

    Attributes:
        servers: how many servers there are; their ids start at ``FIRST_SERVER``.
        visible_after: seconds until a new order is listed.
        cancel_lingers: seconds for which a cancelled order is still listed as active.
        deploy_after: seconds until an order runs.
        clock_offset: seconds by which the ``ct`` of orders is ahead of the ``Date`` header.
        balance: the balance of each wallet, in its currency; with 0, orders are refused.
        show_ended: whether the list with ``return_completed=true`` has ended orders.
        unknown_code: the code for a cancel of an unknown or ended order, 6 or 2.
        hidden_for: server id -> seconds until a new order of that server is listed.
        flap: which of the next order lists are empty, although orders run.
        orders: all orders that were ever made.
    """

    servers: int = 6
    visible_after: float = 0.02
    cancel_lingers: float = 0.02
    deploy_after: float = 0.05
    clock_offset: float = 0.0
    balance: float = 10000.0
    show_ended: bool = True
    unknown_code: int = 6
    hidden_for: dict[int, float] = field(default_factory=dict)
    flap: Flap | None = None
    orders: list[LedgerOrder] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self._ids = itertools.count(7001)
        self._actions: dict[str, Callable[[dict[str, str], dict[str, Any]], Answer]] = {
            "wallets": self._wallets,
            "marketplace": self._marketplace,
            "my_orders": self._my_orders,
            "create_order": self._create_order,
            "cancel_order": self._cancel_order,
            "cancel_orders": self._cancel_orders,
            "set_spot_price": self._set_spot_price,
            "spot_marketplace": self._spot_marketplace,
        }

    # --- for tests ---

    @property
    def running(self) -> list[int]:
        """Return the ids of the orders that cost money now."""
        with self.lock:
            return [order.id for order in self.orders if order.active]

    def place(self, server_id: int, **more: Any) -> LedgerOrder:
        """Make an order, like another program of the same account."""
        details = {"currency": "CLORE-Blockchain", "image": "other/image", "spot": False, **more}
        with self.lock:
            price = self._price(server_id, details["currency"], details["spot"])
            order = LedgerOrder(next(self._ids), server_id, price=price, **details)
            self.orders.append(order)
        return order

    def visible_at(self, order: LedgerOrder) -> float:
        """Return the monotonic time from which an order is listed."""
        return order.made_at + self.hidden_for.get(order.server_id, self.visible_after)

    def end(self, order_id: int) -> bool:
        """End an order; return False if no such order runs."""
        with self.lock:
            for order in self.orders:
                if order.id == order_id and order.active:
                    order.cancelled_at = time.monotonic()
                    return True
        return False

    # --- the API ---

    def answer(self, endpoint: str, query: dict[str, str], body: Any, key: str) -> Answer:
        """Carry out a request, and return the correct response."""
        action = self._actions.get(endpoint)
        if action is None:
            return refused(4)
        if not key and endpoint != "marketplace":
            return refused(3)
        with self.lock:
            return action(query, body if isinstance(body, dict) else {})

    def _usd_per_day(self, server_id: int) -> float:
        return FIRST_PRICE + STEP * (server_id - FIRST_SERVER)

    def _price(self, server_id: int, currency: str, spot: bool) -> float:
        return self._usd_per_day(server_id) / RATES[currency] * (0.5 if spot else 1.0)

    def _wallets(self, query: dict[str, str], body: dict[str, Any]) -> Answer:
        wallets = [
            {"name": name, "deposit": "none", "balance": self.balance, "withdrawal_fee": 0.1}
            for name in RATES
        ]
        return 200, {"wallets": wallets, "code": 0}

    def _rented(self, server_id: int) -> bool:
        return any(order.active and order.server_id == server_id for order in self.orders)

    def _server(self, server_id: int) -> dict[str, Any]:
        usd = self._usd_per_day(server_id)
        return {
            "id": server_id,
            "owner": 1,
            "mrl": 720,
            "rented": self._rented(server_id),
            "reliability": 0.99,
            "allowed_coins": list(RATES),
            "gpu_array": ["RTX 4090"],
            "price": {
                "on_demand": {name: self._price(server_id, name, False) for name in RATES},
                "spot": {name: self._price(server_id, name, True) for name in RATES},
                "usd": {f"on_demand_{name}": usd for name in ("btc", "clore", "usd")} | {"spot": 0},
                "original_usd": {name: {"on_demand": usd, "spot": usd / 2} for name in RATES},
            },
            "specs": {"gpu": "1x NVIDIA GeForce RTX 4090", "gpuram": 23, "ram": 64.0},
        }

    def _marketplace(self, query: dict[str, str], body: dict[str, Any]) -> Answer:
        ids = range(FIRST_SERVER, FIRST_SERVER + self.servers)
        return 200, {"servers": [self._server(i) for i in ids], "my_servers": [], "code": 0}

    def _listed(self, order: LedgerOrder) -> dict[str, Any]:
        now = time.monotonic()
        lingers = order.active or now - (order.cancelled_at or now) < self.cancel_lingers
        deployed = lingers and now - order.made_at >= self.deploy_after
        return {
            "id": order.id,
            "si": order.server_id,
            "image": order.image,
            "currency": order.currency,
            "price": order.price,
            "fee": 0.05,
            "creation_fee": 0.1,
            "ct": int(order.created + self.clock_offset),
            "mrl": WEEK,
            "spot": order.spot,
            "expired": not lingers,
            "online": True,
            "mon_container": 2 if deployed else 0,
            "pub_cluster": ["127.0.0.1"] if deployed else [],
            "tcp_ports": ["22:9"] if deployed else [],
        }

    def _my_orders(self, query: dict[str, str], body: dict[str, Any]) -> Answer:
        if self.flap is not None and self.flap.takes():
            return 200, {"orders": [], "code": 0}
        now = time.monotonic()
        visible = [o for o in self.orders if now >= self.visible_at(o)]
        completed = query.get("return_completed") == "true" and self.show_ended
        listed = [self._listed(order) for order in visible]
        return 200, {"orders": [o for o in listed if completed or not o["expired"]], "code": 0}

    def _create_order(self, query: dict[str, str], body: dict[str, Any]) -> Answer:
        server_id: int | None = body.get("renting_server")
        currency = body.get("currency")
        known = range(FIRST_SERVER, FIRST_SERVER + self.servers)
        if server_id is None or server_id not in known or currency not in RATES:
            return refused(2)
        if self._rented(server_id):
            return refused(6, "server-already-rented")
        if self.balance <= 0:
            return refused(6, "not_enough_balance")
        spot = body.get("type") == "spot"
        order = self.place(server_id, currency=currency, image=body.get("image"), spot=spot)
        if spot:
            order.price = float(body["spotprice"])
        return 200, {"code": 0}

    def _cancel_order(self, query: dict[str, str], body: dict[str, Any]) -> Answer:
        if not self.end(body.get("id", 0)):
            return refused(self.unknown_code, "no-such-order" if self.unknown_code == 6 else None)
        return 200, {"code": 0}

    def _cancel_orders(self, query: dict[str, str], body: dict[str, Any]) -> Answer:
        failed = [str(i) for i in body.get("order_ids", []) if not self.end(i)]
        return 200, {"code": 0, "failed_to_cancel": failed}

    def _set_spot_price(self, query: dict[str, str], body: dict[str, Any]) -> Answer:
        for order in self.orders:
            if order.id == body.get("order_id") and order.active and order.spot:
                order.price = float(body["desired_price"])
                return 200, {"code": 0}
        return refused(2)

    def _spot_marketplace(self, query: dict[str, str], body: dict[str, Any]) -> Answer:
        server_id = int(query.get("market", "0"))
        offers = [
            {"offer_id": o.id, "bid": o.price, "active": True, "my": True, "currency": o.currency}
            for o in self.orders
            if o.active and o.spot and o.server_id == server_id
        ]
        lowest = {name: self._price(server_id, name, True) for name in RATES}
        server = {"min_pricing": lowest, "mrl": WEEK, "visibility": "public", "online": True}
        market = {"currency_rates_in_usd": RATES, "offers": offers, "server": server}
        return 200, {"market": market, "exists": True, "code": 0}
