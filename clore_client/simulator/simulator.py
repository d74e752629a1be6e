"""`Simulator`: a marketplace that runs in a thread of its own."""

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
_TICK = 0.1  # how often wallets are charged when nobody asks


class Simulator:
    """A marketplace on loopback that speaks the live API's form, with real SSH hosts.

    A context manager, or `start()` and `stop()`. Arguments (times in seconds):

    - `servers`, `seed`: how many servers the marketplace has; the same seed makes the same ones.
    - `form`: "live" (what the API sends) or "documented" (what its reference page says).
    - `rate_limit`, `create_order_interval`: one request, and one `create_order`, of a key in
      that time; the live API's are the defaults, 0 means no limit.
    - `visible_after`, `deploy_after`, `cancel_lingers`: when a new order shows up, when it is
      deployed, and how long an ended one stays in the list of active ones. A number or a
      (low, high) pair to draw from; `deploy_after=math.inf` never deploys.
    - `balance`: USD in each wallet, or a dict of amounts by currency (None: a null balance).
    - `ssh`: give each deployed order a real SSH host; without, its ports refuse connections.
    - `tls`: serve https with a certificate of its own; `ca_file` is what to trust.
    - `host`, `port`: where to listen; only loopback addresses.
    - `create_answer`: what `create_order` tells of the new order in the live form: "none", or
      as old answers did "order_id", "id" or "order" (`{"order": {"id": ...}}`).
    - `cancel_ended`: "accept" or "refuse" the cancelling of an order that ended already.
    - `clock_offset`: how far the server's clock is ahead of this machine's.
    - `retry_after`: send `Retry-After` with a 429.
    - `creation_fee`: USD, charged when an order is `creation_fee_after` old.
    - `max_step`, `lowering_interval`: how far (USD per day) and how often a bid may be lowered.
    - `sshd_after`: how long after the deployment the SSH host starts to listen.
    - `reuse_ports`: give the port of an ended order to the next one, with another host key,
      as the live API does.
    - `chaos`, `chaos_seed`, `chaos_kinds`: the share of requests that go wrong at random, and
      how; `faults`: texts like "create_order:lose_answer:2" for `Simulator.faults`.

    A `create_order` that comes too soon is refused before anything is looked at. Rent runs from
    the moment of creation, per second, with a fee of 5 % on demand and 1.25 % for spot orders.
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
        #: What is to go wrong, see `Faults`.
        self.faults = Faults(chaos, seed if chaos_seed is None else chaos_seed, chaos_kinds)
        for text in faults:
            self.faults.add_text(text)
        limits = Limits(self._settings, self._market)
        self._http = HTTPServer(self._api, limits, self.faults, self._clock)
        self._hosts: Hosts | None = None
        #: The key of the first account.
        self.api_key = self._market.add_account(None)
        #: Where it listens, once started.
        self.url = ""
        #: The certificate to trust, with `tls=True`.
        self.ca_file = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    def __repr__(self) -> str:
        return f"<Simulator {self.url or 'not started'}>"

    # Lifecycle

    def start(self) -> Simulator:
        """Listen; returns when requests can come."""
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
        """Stop everything, the SSH hosts too. The books stay readable."""
        if self._pid != os.getpid() or self._thread is None:
            return  # a forked child must not end what its parent runs
        atexit.unregister(self.stop)
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has stopped meanwhile
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
        """Run a function where the state lives: in the loop's thread, while there is one."""
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
            # It may stop before it gets to that.
            with contextlib.suppress(concurrent.futures.TimeoutError):
                return result.result(0.5)
            if not thread.is_alive() and not result.done():
                return function()

    # The books

    @property
    def orders(self) -> list[Order]:
        """Every order ever made, oldest first, with what it was charged: copies as of now."""
        return self._call(lambda: self._copies(list(self._market.orders.values())))

    def orders_of(self, key: str) -> list[Order]:
        """The orders of one account."""
        return self._call(lambda: self._copies(self._market.accounts[key].orders))

    def order(self, order_id: int) -> Order:
        """One order; KeyError where there is none."""
        return self._call(lambda: self._copies([self._market.orders[order_id]])[0])

    def _copies(self, orders: list[Order]) -> list[Order]:
        if self._loop is not None:
            self._market.settle()
        return [dataclasses.replace(o, tcp_ports=dict(o.tcp_ports)) for o in orders]

    @property
    def servers(self) -> list[Server]:
        """The servers, as the marketplace lists them: copies as of now."""
        return self._call(
            lambda: [dataclasses.replace(server) for server in self._market.servers.values()]
        )

    def server(self, server_id: int) -> Server:
        """One server; KeyError where there is none."""
        return self._call(lambda: dataclasses.replace(self._market.servers[server_id]))

    @property
    def requests(self) -> list[Call]:
        """Every request that arrived, oldest first."""
        return self._call(lambda: [dataclasses.replace(call) for call in self._http.calls])

    def clear_requests(self) -> None:
        """Forget the requests so far."""
        self._call(self._http.calls.clear)

    def balance(self, currency: str = "CLORE-Blockchain", key: str | None = None) -> float:
        """What is left in a wallet, in the currency itself."""

        def read() -> float:
            if self._loop is not None:
                self._market.settle()
            return self._market.accounts[key or self.api_key].balances[currency] or 0.0

        return self._call(read)

    # What others do

    def add_key(self, balance: Balance | None = None) -> str:
        """Open a further account, and return its key."""
        if balance is not None:
            check_balance(balance)
        return self._call(lambda: self._market.add_account(balance))

    def set_balance(self, currency: str, amount: float | None, key: str | None = None) -> None:
        """Set a wallet, in the currency itself."""
        if currency not in CURRENCIES:
            raise ValueError(f"currency must be one of {', '.join(CURRENCIES)}, not {currency!r}")
        check_balance({currency: amount})

        def change() -> None:
            self._market.settle()
            self._market.accounts[key or self.api_key].balances[currency] = amount

        self._call(change)

    def end_order(self, order_id: int) -> bool:
        """End an order from the host's side, as being outbid does; False if it had ended."""
        return self._call(lambda: self._market.end(self._market.orders[order_id], "host"))

    def set_rented(self, server_id: int, rented: bool = True) -> None:
        """Let somebody else rent a server, or free it."""
        self._call(lambda: self._market.set_rented(self._market.servers[server_id], rented))

    def advance(self, seconds: float) -> None:
        """Let hours pass at once for the books: orders are charged, fees fall due, wallets empty.

        What is under way meanwhile, as a deployment, still takes its time.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be at least 0 and finite, not {seconds!r}")
        self._call(lambda: self._clock.advance(seconds))

    def set_offline(self, server_id: int, offline: bool = True) -> None:
        """Take a server off the network, with the order on it, or bring it back."""

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
        """Change what a server costs; with a spot price of 0 it takes no bids."""
        if not usd_per_day > 0:
            raise ValueError(f"usd_per_day must be above 0, not {usd_per_day!r}")
        self._call(
            lambda: self._market.set_price(
                self._market.servers[server_id], usd_per_day, spot_usd_per_day
            )
        )

    def set_deploy_after(self, server_id: int, seconds: float | None) -> None:
        """How long new orders on a server take to deploy; `math.inf`: forever, None: as others."""
        if seconds is not None:
            check_seconds("seconds", seconds)

        def change() -> None:
            self._market.servers[server_id].deploy_after = seconds

        self._call(change)
