"""Keep the state of the market: accounts, orders, and charges. Not thread-safe."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from .catalog import RATES, Server, in_currency, make_servers
from .clock import Clock
from .settings import CURRENCIES, Balance, Settings, draw
from .state import DAY, ORDER_QUIRKS, Account, Order

# Relative error allowed for prices converted between currencies and units.
TOLERANCE = 1e-6


class RefusedError(Exception):
    """Refuse a request with a code other than 0."""

    def __init__(self, code: int, error: str | None = None, status: int = 200, **more: Any) -> None:
        super().__init__(code, error)
        self.envelope: dict[str, Any] = {"code": code} | ({"error": error} if error else {}) | more
        self.status = status


class Market:
    """Hold servers, accounts and orders. Callbacks report new and ended orders."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self.rng = Random(f"market {settings.seed}")
        self._quirks_rng = Random(f"quirks {settings.seed}")
        self._next_id = 1_958_000 + self.rng.randint(0, 9)
        self.servers = {s.id: s for s in make_servers(settings.servers, settings.seed)}
        if settings.form == "documented":  # it can't express that a host takes no bids
            for server in self.servers.values():
                server.usd_spot = server.usd_spot or dict(server.usd_on_demand)
        self.accounts: dict[str, Account] = {}
        self.orders: dict[int, Order] = {}
        self._active_orders: dict[int, Order] = {}  # server id -> its active order
        self.on_created: Callable[[Order], None] = lambda order: None
        self.on_ended: Callable[[Order], None] = lambda order: None
        self.on_server_changed: Callable[[Server], None] = lambda server: None

    def now(self) -> float:
        """Return monotonic seconds."""
        return self._clock.now()

    # Accounts

    def add_account(self, balance: Balance | None) -> str:
        """Add an account, and return its key; `balance` is as in `Simulator`."""
        if balance is None:
            balance = self._settings.balance
        balances: dict[str, float | None] = {}
        for name in CURRENCIES:
            if isinstance(balance, Mapping):
                balances[name] = balance.get(name, 0.0)
            else:
                balances[name] = in_currency(balance, name)
        key = f"simulated-{secrets.token_urlsafe(24)}"
        deposits = {
            "bitcoin": f"bc1q{secrets.token_hex(19)}",
            "CLORE-Blockchain": f"A{secrets.token_hex(16)}",
            "USD-Blockchain": f"0x{secrets.token_hex(20)}",
        }
        now = self._clock.now()
        account = Account(key, balances, deposits, dict.fromkeys(CURRENCIES, now))
        self.accounts[key] = account
        return key

    # Money

    def settle(self) -> None:
        """Charge every wallet up to now, and end orders that are not paid for any more."""
        now = self.now()
        for account in self.accounts.values():
            if account.active:
                self.settle_account(account, now)

    def settle_account(self, account: Account, now: float) -> None:
        """Charge the wallets of one account up to `now`."""
        for currency in CURRENCIES:
            self._settle_wallet(account, currency, now)

    def _settle_wallet(self, account: Account, currency: str, now: float) -> None:
        since = account.settled[currency]
        while since < now:
            orders = [o for o in account.active.values() if o.currency == currency]
            if not orders:
                break
            # Go from event to event, so that the result does not depend on how often this runs.
            balance = account.balances[currency] or 0.0
            per_second = sum(o.price * (1 + o.fee_rate) for o in orders) / DAY
            broke = since + balance / per_second
            events = [o.created + o.mrl * 3600 for o in orders]
            events += [self._fee_due(o) for o in orders if not o.creation_fee]
            until = max(since, min(now, broke, *(e for e in events if e > since)))
            for o in orders:
                rent = o.price / DAY * (until - since)
                o.rent += rent
                o.fee += rent * o.fee_rate
            balance = max(0.0, balance - per_second * (until - since))
            for o in orders:
                if not o.creation_fee and self._fee_due(o) <= until:
                    o.creation_fee = min(balance, in_currency(o.creation_fee_usd, currency))
                    balance -= o.creation_fee
            if until >= broke:
                balance = 0.0
            account.balances[currency] = balance
            for o in orders:
                if balance <= 0.0:
                    self._end(o, "wallet", until)
                elif o.created + o.mrl * 3600 <= until:
                    self._end(o, "mrl", until)
            since = until
        account.settled[currency] = now

    def _fee_due(self, order: Order) -> float:
        return order.created + self._settings.creation_fee_after

    # Orders

    def create(
        self, account: Account, server_id: int, spot: bool, currency: str, bid: float | None,
        body: dict[str, Any],
    ) -> Order:  # fmt: skip
        """Create an order, or raise `RefusedError`; `bid` is per day in `currency`."""
        server = self.servers.get(server_id)
        if server is None:
            raise RefusedError(2)
        if currency not in server.allowed_coins:
            raise RefusedError(6, "currency-not-allowed")
        if not server.online:
            raise RefusedError(6, "server-offline")
        self.settle()
        now = self.now()
        self.settle_account(account, now)
        if server.rented or server.id in self._active_orders:
            raise RefusedError(6, "server-already-rented")
        price = server.on_demand(currency)
        if spot:
            price = bid or 0.0
            self._check_bid(server, currency, price)
        fee = in_currency(self._settings.creation_fee, currency)
        balance = account.balances[currency] or 0.0
        if balance <= 0 or balance < fee:
            raise RefusedError(6, "not_enough_balance")
        settings, rng = self._settings, self.rng
        deploy_after = draw(rng, settings.deploy_after)
        http_ports = [port for port, kind in body["ports"].items() if kind == "http"]
        order = Order(
            id=self._next_id,
            server_id=server.id,
            key=account.key,
            spot=spot,
            image=body["image"],
            currency=currency,
            price=price,
            mrl=server.mrl,
            creation_fee_usd=settings.creation_fee,
            created=now,
            created_at=int(self._clock.wall(now)),
            visible_at=now + draw(rng, settings.visible_after),
            deploy_after=deploy_after if server.deploy_after is None else server.deploy_after,
            linger_seconds=draw(rng, settings.cancel_lingers),
            body=body,
            quirks=frozenset(q for q, p in ORDER_QUIRKS.items() if self._quirks_rng.random() < p),
        )
        if http_ports:
            # The name does not resolve, because there is no host.
            order.http_port = http_ports[0]
            order.http_pub = f"{rng.getrandbits(40):010x}.clorecloud.invalid"
            order.login_token = secrets.token_hex(16)
        self._next_id += rng.randint(1, 9)  # other users create orders, too
        account.orders.append(order)
        account.active[order.id] = order
        self.orders[order.id] = order
        self._active_orders[server.id] = order
        self.set_rented(server, True)
        self.on_created(order)
        return order

    def _check_bid(self, server: Server, currency: str, bid: float) -> None:
        # A host without a minimum bid takes no bids at all.
        minimum = server.min_bid(currency)
        if minimum is None or bid < minimum * (1 - TOLERANCE):
            raise RefusedError(6, "too_low_price")

    def rebid(self, order: Order, bid: float) -> None:
        """Change the bid (per day) of a spot order. Raise `RefusedError` if it is refused."""
        settings, now = self._settings, self.now()
        self._check_bid(self.servers[order.server_id], order.currency, bid)
        if bid < order.price:
            if order.lowered_at is not None:
                wait = order.lowered_at + settings.lowering_interval - now
                if wait > 0:
                    seconds = max(1, round(wait))
                    raise RefusedError(6, "can_lower_every_600_seconds", time_to_lowering=seconds)
            step = settings.max_step / RATES[order.currency]
            if order.price - bid > step * (1 + TOLERANCE):
                raise RefusedError(6, "exceeded_max_step", max_step=step)
            order.lowered_at = now
        order.price = bid

    def end(self, order: Order, by: str) -> bool:
        """End an order now. Return False if it had already ended."""
        now = self.now()
        self.settle_account(self.accounts[order.key], now)
        if not order.active:
            return False
        self._end(order, by, now)
        return True

    def _end(self, order: Order, by: str, when: float) -> None:
        if not order.active:
            return
        order.ended, order.ended_by = when, by
        del self.accounts[order.key].active[order.id]
        if self._active_orders.get(order.server_id) is order:
            del self._active_orders[order.server_id]
            self.set_rented(self.servers[order.server_id], False)
        self.on_ended(order)

    # Servers

    def active_order_on(self, server_id: int) -> Order | None:
        """Return the active order on a server, if any."""
        return self._active_orders.get(server_id)

    def set_rented(self, server: Server, rented: bool) -> None:
        """Mark a server as rented or free."""
        server.rented = rented
        self.on_server_changed(server)

    def set_price(self, server: Server, usd: float, spot: float | None) -> None:
        """Change the listed prices; existing orders keep theirs."""
        server.usd_on_demand = dict.fromkeys(CURRENCIES, usd)
        if spot is not None:
            server.usd_spot = dict.fromkeys(CURRENCIES, spot) if spot else {}
        self.on_server_changed(server)
