"""Run a simulated marketplace in a thread."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from .api import Api, Call
from .catalog import Server
from .clock import Clock
from .faults import Faults
from .hosts import Hosts
from .http_server import HTTPServer
from .limits import Limits
from .market import Market
from .settings import CURRENCIES, Balance, Seconds, Settings, check_balance, check_seconds
from .state import Order
from .tls import make_context

T = TypeVar("T")
_TICK = 0.1  # seconds between two charges without requests


class Simulator:
    """Simulate the marketplace on loopback, in the live API's form, with real SSH hosts.

    Use it as a context manager, or call `start()` and `stop()`. Arguments (times in seconds):

    - `servers`, `seed`: the number of servers; the same seed makes the same ones.
    - `form`: "live" (what the API sends) or "documented" (what its reference page says).
    - `rate_limit`, `create_order_interval`: minimum time between two requests, and between two
      `create_order`, of one key. The defaults are those of the live API; 0 means no limit.
    - `visible_after`, `deploy_after`, `cancel_lingers`: time until a new order is listed, until
      it is deployed, and for which an ended order is still listed as active. Each is a number
      or a (low, high) pair to draw from; `deploy_after=math.inf` never deploys.
    - `balance`: USD in each wallet, or a dict of amounts by currency (None: a null balance).
    - `ssh`: run a real SSH host for each deployed order; if False, its ports refuse connections.
    - `tls`: serve https with a self-signed certificate, which is in `ca_file`.
    - `host`, `port`: the address to listen on; only loopback addresses are allowed.
    - `create_answer`: how `create_order` names the new order in the live form: "none", or as
      in older answers "order_id", "id" or "order" (`{"order": {"id": ...}}`).
    - `cancel_ended`: "accept" or "refuse" a cancel of an order that has already ended.
    - `clock_offset`: how far the server's clock is ahead of this machine's.
    - `retry_after`: send `Retry-After` with HTTP 429.
    - `creation_fee`: USD, charged when an order is `creation_fee_after` seconds old.
    - `max_step`, `lowering_interval`: by how much (USD per day) and how often a bid may be
      lowered.
    - `sshd_after`: time from the deployment until the SSH host accepts connections.
    - `reuse_ports`: give the ports of an ended order to the next one, with another host key,
      as the live API does.
    - `chaos`, `chaos_seed`, `chaos_kinds`: the fraction of requests that fail at random, and
      how. `faults`: a list like ["create_order:lose_response:2"], for `Simulator.faults`.

    In the live form, records differ by seeded chance as those of the live API do: see
    `ORDER_QUIRKS`, and `Server.quirks`. Rent is charged per second from the creation of an
    order, plus a fee of 5 % on demand and 1.25 % for spot orders. The rate limit of
    `create_order` applies before any other check.
    """

    def __init__(
        self,
        servers: int = 200,
        seed: int = 1,
        form: str = "live",
        rate_limit: float = 1.0,
        create_order_interval: float = 5.0,
        visible_after: Seconds = 2.0,
        deploy_after: Seconds = 5.0,
        cancel_lingers: Seconds = 2.0,
        balance: Balance = 100.0,
        *,
        ssh: bool = True,
        tls: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
        create_answer: str = "none",
        cancel_ended: str = "accept",
        clock_offset: float = 0.0,
        retry_after: bool = False,
        creation_fee: float = 0.10,
        creation_fee_after: float = 600.0,
        max_step: float = 1.0,
        lowering_interval: float = 600.0,
        sshd_after: Seconds = 0.0,
        reuse_ports: bool = False,
        chaos: float = 0.0,
        chaos_seed: int | None = None,
        chaos_kinds: Sequence[str] | None = None,
        faults: Sequence[str] = (),
    ) -> None:
        arguments = locals()
        names = [field.name for field in dataclasses.fields(Settings)]
        self._settings = Settings(**{name: arguments[name] for name in names})
        self._clock = Clock(clock_offset)
        self._market = Market(self._settings, self._clock)
        self._api = Api(self._settings, self._market)
        self._market.on_server_changed = self._api.invalidate
        #: Faults to inject, see `Faults`.
        self.faults = Faults(chaos, seed if chaos_seed is None else chaos_seed, chaos_kinds)
        for text in faults:
            self.faults.add_text(text)
        limits = Limits(self._settings, self._market)
        self._http = HTTPServer(self._api, limits, self.faults, self._clock)
        self._hosts: Hosts | None = None
        #: The key of the first account.
        self.api_key = self._market.add_account(None)
        #: The base URL, once started.
        self.url = ""
        #: The CA file for clients, with `tls=True`.
        self.ca_file = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    def __repr__(self) -> str:
        return f"<Simulator {self.url or 'not started'}>"

    # Lifecycle

    def start(self) -> Simulator:
        """Start, and return once it listens."""
        if self._thread is not None:
            raise RuntimeError("a simulator can be started only once")
        ready: Future[None] = Future()
        self._pid = os.getpid()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(ready)), name="clore-simulator", daemon=True
        )
        self._thread.start()
        ready.result()
        atexit.register(self.stop)
        return self

    def stop(self) -> None:
        """Stop everything, including the SSH hosts. Orders and requests stay readable."""
        if self._pid != os.getpid() or self._thread is None:
            return  # a forked child must not stop its parent's simulator
        atexit.unregister(self.stop)
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has stopped
                loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def __enter__(self) -> Simulator:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    async def _serve(self, ready: Future[None]) -> None:
        settings = self._settings
        folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="clore-simulator-")))
        try:
            self._stopping = asyncio.Event()
            self._hosts = Hosts(settings, self._market, folder)
            tls = None
            if settings.tls:
                tls, ca_file = make_context(folder)
                self.ca_file = str(ca_file)
            port = await self._http.start(settings.host, settings.port, tls)
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            self.url = f"{'https' if tls else 'http'}://{host}:{port}"
            self._loop = asyncio.get_running_loop()
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            ready.set_exception(error)
            return
        ready.set_result(None)
        while not self._stopping.is_set():
            self._market.settle()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _TICK)
        await self._http.stop()
        await self._hosts.stop()
        self._market.settle()
        shutil.rmtree(folder, ignore_errors=True)
        self._loop = None

    def _call(self, function: Callable[[], T]) -> T:
        """Call a function in the event loop's thread, or here if that has stopped."""
        thread, loop = self._thread, self._loop
        if thread is None or loop is None or thread is threading.current_thread():
            return function()
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

        try:
            loop.call_soon_threadsafe(run)
        except RuntimeError:  # it has just stopped
            thread.join()
            return function()
        while True:
            # The loop may stop before it calls the function.
            with contextlib.suppress(concurrent.futures.TimeoutError):
                return result.result(0.5)
            if not thread.is_alive() and not result.done():
                return function()

    # State

    @property
    def orders(self) -> list[Order]:
        """Return copies of all orders, oldest first, charged up to now."""
        return self._call(lambda: self._copies(list(self._market.orders.values())))

    def orders_of(self, key: str) -> list[Order]:
        """Return copies of the orders of one account."""
        return self._call(lambda: self._copies(self._market.accounts[key].orders))

    def order(self, order_id: int) -> Order:
        """Return a copy of an order. Raise KeyError if there is none."""
        return self._call(lambda: self._copies([self._market.orders[order_id]])[0])

    def _copies(self, orders: list[Order]) -> list[Order]:
        if self._loop is not None:
            self._market.settle()
        return [dataclasses.replace(o, tcp_ports=dict(o.tcp_ports)) for o in orders]

    @property
    def servers(self) -> list[Server]:
        """Return copies of all servers, in the order of the marketplace."""
        return self._call(
            lambda: [dataclasses.replace(server) for server in self._market.servers.values()]
        )

    def server(self, server_id: int) -> Server:
        """Return a copy of a server. Raise KeyError if there is none."""
        return self._call(lambda: dataclasses.replace(self._market.servers[server_id]))

    @property
    def requests(self) -> list[Call]:
        """Return copies of all recorded requests, oldest first."""
        return self._call(lambda: [dataclasses.replace(call) for call in self._http.calls])

    def clear_requests(self) -> None:
        """Clear the recorded requests."""
        self._call(self._http.calls.clear)

    def balance(self, currency: str = "CLORE-Blockchain", key: str | None = None) -> float:
        """Return the balance of a wallet, in its currency."""

        def read() -> float:
            if self._loop is not None:
                self._market.settle()
            return self._market.accounts[key or self.api_key].balances[currency] or 0.0

        return self._call(read)

    # Changes from outside

    def add_key(self, balance: Balance | None = None) -> str:
        """Add another account, and return its key."""
        if balance is not None:
            check_balance(balance)
        return self._call(lambda: self._market.add_account(balance))

    def set_balance(self, currency: str, amount: float | None, key: str | None = None) -> None:
        """Set the balance of a wallet, in its currency."""
        if currency not in CURRENCIES:
            raise ValueError(f"currency must be one of {', '.join(CURRENCIES)}, not {currency!r}")
        check_balance({currency: amount})

        def change() -> None:
            self._market.settle()
            self._market.accounts[key or self.api_key].balances[currency] = amount

        self._call(change)

    def end_order(self, order_id: int) -> bool:
        """End an order as a host does, or a higher bid. Return False if it had already ended."""
        return self._call(lambda: self._market.end(self._market.orders[order_id], "host"))

    def set_rented(self, server_id: int, rented: bool = True) -> None:
        """Mark a server as rented by another user, or as free."""
        self._call(lambda: self._market.set_rented(self._market.servers[server_id], rented))

    def advance(self, seconds: float) -> None:
        """Jump ahead in time: charge orders and fees, and end orders that can't be paid.

        Deployments and other work in progress still take their real time.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be at least 0 and finite, not {seconds!r}")
        self._call(lambda: self._clock.advance(seconds))

    def set_offline(self, server_id: int, offline: bool = True) -> None:
        """Take a server and its active order offline, or bring them back."""

        def change() -> None:
            self._market.servers[server_id].online = not offline
            order = self._market.active_order_on(server_id)
            if order is not None:
                order.online = not offline
                if self._hosts is not None:
                    self._hosts.set_reachable(order, not offline)

        self._call(change)

    def set_price(
        self, server_id: int, usd_per_day: float, spot_usd_per_day: float | None = None
    ) -> None:
        """Change the prices of a server; with a spot price of 0 it takes no bids."""
        if not usd_per_day > 0:
            raise ValueError(f"usd_per_day must be above 0, not {usd_per_day!r}")
        self._call(
            lambda: self._market.set_price(
                self._market.servers[server_id], usd_per_day, spot_usd_per_day
            )
        )

    def set_deploy_after(self, server_id: int, seconds: float | None) -> None:
        """Set how long new orders on a server take to deploy.

        `math.inf` never deploys; None uses the setting `deploy_after`.
        """
        if seconds is not None:
            check_seconds("seconds", seconds)

        def change() -> None:
            self._market.servers[server_id].deploy_after = seconds

        self._call(change)
