"""Answer requests: one method for each endpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from . import wire
from .catalog import RATES, Server, in_currency
from .checks import amount_of, breaks_database, id_of, object_of, order_body, require
from .faults import ENDPOINTS
from .market import TOLERANCE, Market, RefusedError
from .settings import Settings
from .state import Account, Order

MAX_CANCELS = 64  # ids that one cancel_orders takes
JSON = "application/json; charset=utf-8"
KEYLESS = ("marketplace",)
READS = ("wallets", "marketplace", "my_orders", "spot_marketplace", "renter_fees")
LIVE_ONLY = ("renter_fees",)


@dataclass
class Call:
    """Record a request, and how it was answered."""

    method: str
    path: str
    endpoint: str  # last part of the path
    query: dict[str, str]
    body: Any = field(repr=False)  # parsed JSON, or None
    headers: dict[str, str] = field(repr=False)
    arrived: float  # time.monotonic()
    key: str = field(repr=False)
    fault: str | None = None
    processed: bool = False  # whether the market acted on it
    status: int | None = None  # None if there was no answer
    code: int | None = None


@dataclass
class Answer:
    """Hold the answer to a request."""

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    code: int | None = None


def envelope(content: dict[str, Any], status: int = 200) -> Answer:
    """Return an answer with the given envelope."""
    return Answer(wire.encode(content), status, code=content.get("code"))


class Api:
    """Process requests to the endpoints for renters."""

    def __init__(self, settings: Settings, market: Market) -> None:
        self._settings = settings
        self._form = settings.form
        self._status_rng = Random(f"statuses {settings.seed}")
        self._market = market
        self._handlers: dict[str, Callable[[Account, Call], dict[str, Any]]] = {
            "wallets": self._wallets,
            "my_orders": self._my_orders,
            "create_order": self._create_order,
            "cancel_order": self._cancel_order,
            "cancel_orders": self._cancel_orders,
            "set_spot_price": self._set_spot_price,
            "spot_marketplace": self._spot_marketplace,
            "renter_fees": self._renter_fees,
        }
        self._encoded: dict[int, bytes] = {}
        self._marketplace: bytes | None = None

    def invalidate(self, server: Server) -> None:
        """Drop the cached listing of a server that has changed."""
        self._encoded.pop(server.id, None)
        self._marketplace = None

    def process(self, call: Call) -> Answer:
        """Process a request, and return the answer."""
        call.processed = True
        try:
            return self._process(call)
        except RefusedError as refused:
            return envelope(refused.envelope, self._status_of(refused))

    def _status_of(self, refused: RefusedError) -> int:
        """Return the HTTP status of a refusal: code 6 comes with 200 or 500."""
        if refused.envelope["code"] != 6:
            return refused.status
        return self._status_rng.choice((200, 500))

    def _process(self, call: Call) -> Answer:
        endpoint = call.endpoint
        known = endpoint in ENDPOINTS and call.path == f"/v1/{endpoint}"
        known = known and (self._form == "live" or endpoint not in LIVE_ONLY)
        if not known or call.method != ("GET" if endpoint in READS else "POST"):
            raise RefusedError(4, status=404)
        if endpoint in KEYLESS:
            return Answer(self._marketplace_body(), code=0)
        account = self._market.accounts.get(call.key)
        if account is None:
            raise RefusedError(3)
        self._market.settle_account(account, self._market.now())
        return envelope(self._handlers[endpoint](account, call))

    # Reads

    def _marketplace_body(self) -> bytes:
        self._market.settle()
        if self._marketplace is None:
            parts = []
            for server in self._market.servers.values():
                part = self._encoded.get(server.id)
                if part is None:
                    part = wire.encode(wire.server(server, self._form))
                    self._encoded[server.id] = part
                parts.append(part)
            mine = b',"my_servers":[]' if self._form == "live" else b""
            self._marketplace = b'{"servers":[' + b",".join(parts) + b"]" + mine + b',"code":0}'
        return self._marketplace

    def _wallets(self, account: Account, call: Call) -> dict[str, Any]:
        return {"wallets": wire.wallets(account, self._form), "code": 0}

    def _renter_fees(self, account: Account, call: Call) -> dict[str, Any]:
        return wire.renter_fees(self._settings.creation_fee)

    def _my_orders(self, account: Account, call: Call) -> dict[str, Any]:
        completed = call.query.get("return_completed", "").lower() in ("true", "1")
        now, servers = self._market.now(), self._market.servers
        shown = [
            order
            for order in account.orders
            if order.is_visible(now) and (completed or not order.is_gone(now))
        ]
        records = [wire.order(o, servers[o.server_id], self._form, now) for o in shown]
        newer = self._form == "live" and any("newer_fields" in o.quirks for o in shown)
        return {"orders": records, **({"limit": 64} if newer else {}), "code": 0}

    def _spot_marketplace(self, account: Account, call: Call) -> dict[str, Any]:
        server = self._market.servers.get(id_of(call.query.get("market")))
        if server is None:
            if self._form == "live":
                return {"market": None, "exists": False, "code": 0}
            return {"code": 0, "market": {"offers": []}}
        offers = _other_bids(server)
        active = self._market.active_order_on(server.id)
        for order in account.orders:
            if order.spot and order.server_id == server.id:
                offers.append(wire.offer(order))
        if active is not None and active.spot and active.key != account.key:
            offers.append(wire.offer(active) | {"my": False})
        return wire.spot_market(server, offers, self._form)

    # Orders

    def _create_order(self, account: Account, call: Call) -> dict[str, Any]:
        body = order_body(call.body)
        server_id, currency = body["renting_server"], body["currency"]
        spot = body["type"] == "spot"
        server = self._market.servers.get(server_id)
        if breaks_database(body["env"]):
            raise RefusedError(1, status=500)
        required = body.get("required_price")
        if required is not None and server is not None and not spot:
            listed = server.on_demand(currency)
            if abs(required - listed) > listed * TOLERANCE:
                raise RefusedError(1, status=500)
        bid = self._per_day(float(body["spotprice"]), currency) if spot else None
        order = self._market.create(account, server_id, spot, currency, bid, body)
        if self._form == "documented":
            return {"code": 0, "order_id": order.id, "status": "creating"}
        answer = self._settings.create_answer
        if answer == "order":
            return {"order": {"id": order.id}, "code": 0}
        return {"code": 0} if answer == "none" else {answer: order.id, "code": 0}

    def _per_day(self, price: float, currency: str) -> float:
        """Convert a bid as it was sent to one per day in `currency`."""
        if self._form == "live":
            return price
        return in_currency(price * 24, currency)

    def _cancel_order(self, account: Account, call: Call) -> dict[str, Any]:
        body = object_of(call.body)
        order_id = id_of(body.get("id"))
        issue = body.get("issue")
        require(issue is None or (isinstance(issue, str) and len(issue) <= 2048))
        if not self._cancel(account, order_id, issue):
            raise RefusedError(6, "order-not-found")
        return {"code": 0}

    def _cancel_orders(self, account: Account, call: Call) -> dict[str, Any]:
        ids = object_of(call.body).get("order_ids")
        require(isinstance(ids, list) and len(ids) <= MAX_CANCELS)
        wanted = [id_of(value) for value in ids]  # type: ignore[union-attr]
        failed = [str(id) for id in wanted if not self._cancel(account, id, None)]
        return {"code": 0, "failed_to_cancel": failed}

    def _cancel(self, account: Account, order_id: int, issue: str | None) -> bool:
        order = self._own(account, order_id)
        if order is None:
            return False
        ended_now = self._market.end(order, "cancel")
        if ended_now:
            order.issue = issue
        return ended_now or self._settings.cancel_ended == "accept"

    def _set_spot_price(self, account: Account, call: Call) -> dict[str, Any]:
        body = object_of(call.body)
        order = self._own(account, id_of(body.get("order_id")))
        price = amount_of(body.get("desired_price"))
        require(order is not None and order.spot and order.active)
        assert order is not None
        try:
            self._market.rebid(order, self._per_day(price, order.currency))
        except RefusedError as refused:
            if self._form == "live":
                raise
            refusal = refused.envelope | {"code": 0}
            if "max_step" in refusal:  # prices in this form are USD per hour
                refusal["max_step"] *= RATES[order.currency] / 24
            return refusal
        return {"code": 0}

    def _own(self, account: Account, order_id: int) -> Order | None:
        order = self._market.orders.get(order_id)
        return order if order is not None and order.key == account.key else None


def _other_bids(server: Server) -> list[dict[str, Any]]:
    """Return bids of other users that are not active, the same ones each time."""
    rng = Random(f"bids {server.id}")
    bids = []
    for n in range(rng.randint(0, 3)):
        currency = rng.choice(server.allowed_coins)
        minimum = server.min_bid(currency)
        if minimum:
            bids.append(
                {
                    "offer_id": server.id * 10 + n,
                    "bid": minimum * rng.choice((1, 1.02, 1.1)),
                    "active": False,
                    "my": False,
                    "currency": currency,
                }
            )
    return bids
