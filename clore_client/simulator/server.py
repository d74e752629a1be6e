"""Simulator: a whole marketplace in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from .api import Api, Call
from .books import Order
from .catalogue import Server
from .clock import Clock
from .faults import Faults
from .hosts import Host
from .limits import Limits
from .market import Market
from .settings import Balance, Seconds, Settings, draw
from .tls import make_context
from .web import Web

T = TypeVar("T")


class Simulator:
    """A marketplace on loopback that speaks like the live API, with real SSH hosts.

    Parameters:
        servers: how many servers are listed.
        seed: the same seed gives the same servers.
        form: what it speaks: "live" or "documented".
        rate_limit: seconds between two requests with one key, or HTTP 429.
        create_order_interval: the same for create_order.
        visible_after: seconds until my_orders shows a new order, or a (low, high) pair of them.
        deploy_after: seconds until an order is deployed.
        cancel_lingers: seconds for which my_orders shows an ended order as active.
        balance: of each account, in USD for each of its wallets, or by currency.
        ssh: whether deployed orders have real SSH hosts.
        tls: https with a certificate of its own, see `ca_file`.
        host, port: where it listens; loopback only, port 0 for any.
        create_answer: "none", or where old answers carry the id: "order_id", "id", "order".
        cancel_ended: "accept" or "refuse" the cancelling of an order that has ended.
        clock_offset: seconds that its wall clock is ahead of this machine's.
        retry_after: whether a 429 carries Retry-After.
        creation_fee: USD for each order, charged after `creation_fee_after` seconds.
        max_step: USD per day by which a bid may be lowered at once.
        lowering_interval: seconds between two lowerings.
        sshd_after: seconds from deployment until the host's SSH server answers.
        reuse_ports: give the port of an ended order to the next one, as the live API does.
        chaos: share of requests that go wrong at random, from `chaos_kinds`, by `chaos_seed`.

    Example:
        >>> with Simulator(servers=50, rate_limit=0) as sim:
        ...     client = CloreClient(sim.api_key, base_url=sim.url, rate_limit=0)
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
        creation_fee: float = 0.1,
        creation_fee_after: float = 600.0,
        max_step: float = 1.0,
        lowering_interval: float = 600.0,
        sshd_after: Seconds = 0.0,
        reuse_ports: bool = False,
        chaos: float = 0.0,
        chaos_seed: int | None = None,
        chaos_kinds: Sequence[str] | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self._settings = settings = Settings(**arguments)
        self._clock = Clock(clock_offset)
        self._market = Market(settings, self._clock)
        self.faults = Faults(chaos, seed if chaos_seed is None else chaos_seed, chaos_kinds)
        self._api = Api(settings, self._market)
        limits = Limits(settings, self._market)
        self._web = Web(self._api, limits, self.faults, self._clock)
        self._market.on_created = self._created
        self._market.on_ended = self._ended
        self._market.on_server_changed = self._api.forget
        self._hosts: dict[int, Host] = {}
        self._free_ports: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None
        self._loop = asyncio.new_event_loop()
        self._folder: Path | None = None
        self.api_key = self._market.add_account(None)
        self.url = ""
        self.ca_file = ""

    # Lifecycle

    def start(self) -> Simulator:
        """Listen; `url` tells where."""
        if self._thread is not None:
            raise RuntimeError("this simulator was started before")
        context = None
        if self._settings.tls:
            self._folder = Path(tempfile.mkdtemp(prefix="clore-simulator-"))
            context, ca_file = make_context(self._folder)
            self.ca_file = str(ca_file)
        self._thread = threading.Thread(target=self._serve, name="clore-simulator", daemon=True)
        self._thread.start()
        try:
            start = self._web.start(self._settings.host, self._settings.port, context)
            port = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        except BaseException:
            self._end_loop()
            raise
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        self.url = f"{'https' if context else 'http'}://{host}:{port}"
        return self

    def stop(self) -> None:
        """Stop listening, and every host with it."""
        if self._thread is None or not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._end_loop()

    def __enter__(self) -> Simulator:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _shut_down(self) -> None:
        await self._web.stop()
        for host in self._hosts.values():
            host.stop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not None:
            self._thread.join()
        self._loop.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _do(self, work: Callable[[], T]) -> T:
        """Run `work` where the state lives."""

        async def job() -> T:
            return work()

        if self._thread is None or not self._thread.is_alive():
            return work()
        return asyncio.run_coroutine_threadsafe(job(), self._loop).result()

    # What tests and people look at

    @property
    def orders(self) -> list[Order]:
        """Copies of all orders ever made, charged up to now: the truth, without any delay."""

        def work() -> list[Order]:
            self._market.settle()
            return [copy.copy(order) for order in self._market.orders.values()]

        return self._do(work)

    @property
    def requests(self) -> list[Call]:
        """Every request that arrived, and how it was answered."""
        return list(self._web.calls)

    @property
    def servers(self) -> list[Server]:
        """Copies of the listed servers."""
        return self._do(lambda: [copy.copy(s) for s in self._market.servers.values()])

    def add_key(self, balance: Balance | None = None) -> str:
        """The key of a new account."""
        return self._do(lambda: self._market.add_account(balance))

    def balance(self, currency: str = "CLORE-Blockchain", key: str | None = None) -> float:
        """What a wallet holds now."""

        def work() -> float:
            account = self._market.accounts[key or self.api_key]
            self._market.settle_account(account)
            return account.balances[currency] or 0.0

        return self._do(work)

    # What the outside world may do

    def end_order(self, order_id: int) -> bool:
        """The host ends an order, or it is outbid; False when it had ended before."""
        return self._do(lambda: self._market.end(self._market.orders[order_id], "host"))

    def set_rented(self, server_id: int, rented: bool = True) -> None:
        """Somebody else rents a server, or gives it back."""
        market = self._market
        self._do(lambda: market.set_rented(market.servers[server_id], rented))

    def set_offline(self, server_id: int, offline: bool = True) -> None:
        """A server loses its connection, or comes back."""
        self._do(lambda: setattr(self._market.servers[server_id], "online", not offline))

    def set_price(self, server_id: int, usd: float, spot: float | None = None) -> None:
        """Change the listed price, USD per day; `spot` None leaves the lowest bid."""
        market = self._market
        self._do(lambda: market.set_price(market.servers[server_id], usd, spot))

    def set_deploy_after(self, server_id: int, seconds: float | None) -> None:
        """How long orders of this server take to deploy; `math.inf` is never, None as others."""
        self._do(lambda: setattr(self._market.servers[server_id], "deploy_after", seconds))

    # What happens to orders

    def _created(self, order: Order) -> None:
        if order.deploy_after != math.inf:
            task = asyncio.get_running_loop().create_task(self._deploy(order))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deploy(self, order: Order) -> None:
        await asyncio.sleep(order.deploy_after)
        if not order.active:
            return
        for inner, kind in (order.body["ports"] or {"22": "tcp"}).items():
            if kind == "tcp" and inner != "22":
                order.tcp_ports[int(inner)] = _unused_port(self._settings.host)
        if order.body["ports"].get("22", "tcp") == "tcp":
            sock = self._bind()
            order.tcp_ports[22] = sock.getsockname()[1]
            if self._settings.ssh:
                host = Host(order, self._market.servers[order.server_id])
                self._hosts[order.id] = host
                order.deployed = self._clock.now()
                await asyncio.sleep(draw(self._market.rng, self._settings.sshd_after))
                if not order.active:
                    sock.close()
                    return
                await host.start(sock)
                return
            sock.close()
        order.deployed = self._clock.now()

    def _bind(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in self._settings.host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._settings.reuse_ports:
            while self._free_ports:
                with contextlib.suppress(OSError):
                    sock.bind((self._settings.host, self._free_ports.pop()))
                    return sock
        sock.bind((self._settings.host, 0))
        return sock

    def _ended(self, order: Order) -> None:
        host = self._hosts.pop(order.id, None)
        if host is not None:
            host.stop()
        if order.ssh_port is not None:
            self._free_ports.append(order.ssh_port)


def _unused_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port
