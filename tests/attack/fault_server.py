"""A marketplace that goes wrong, on raw sockets, and keeps books of what really happened.

Written from the wire format alone; it shares nothing with the client and with the simulator.
"""

from __future__ import annotations

import collections
import contextlib
import email.utils
import json
import math
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.attack.books import Answer, Booked, Books, Flap
from tests.attack.faults import KINDS, Exchange, Gone, Wire, delivers

CARRIED_OUT: Answer = (200, {"code": 0})


@dataclass
class Request:
    """What arrived.

    Attributes:
        endpoint: the last part of the path, as ``"wallets"``.
        body: decoded, None where there is none.
        at: when, by ``time.monotonic()``.
        connection: the number of the connection.
        key: what the header ``auth`` said.
        raw_body: as it came.
    """

    endpoint: str
    query: dict[str, str]
    body: Any
    at: float
    connection: int
    key: str
    raw_body: bytes


@dataclass
class Fault:
    """A way for one answer to go wrong, and whether the request is carried out all the same."""

    kind: str
    commit: bool
    options: dict[str, Any]


class FaultServer:
    """A marketplace on a port of this machine; a context manager.

    Attributes:
        url, key: where it is, and a key of its own; it takes any.
        books: what really happened, and settings that may be changed meanwhile.
        send_date: whether answers carry a ``Date``.
        requests: what arrived, in order.

    Parameters:
        send_date: as the attribute.
        **settings: of :class:`Books`.

    Example:
        >>> with FaultServer(visible_after=0.1) as server:
        ...     server.fault("create_order", "page", commit=True)
    """

    def __init__(self, *, send_date: bool = True, **settings: Any) -> None:
        self.books = Books(**settings)
        self.send_date = send_date
        self.key = f"key-{secrets.token_hex(8)}"
        self.requests: list[Request] = []
        self._faults: dict[str, collections.deque[Fault | None]] = {}
        self._stopping = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    # --- what tests ask ---

    @property
    def orders(self) -> list[Booked]:
        """All orders that were ever made."""
        return self.books.orders

    @property
    def running(self) -> list[int]:
        """The ids of the orders that cost money now."""
        return self.books.running

    @property
    def stopped(self) -> bool:
        """Whether it takes nothing any more."""
        return self._stopping.is_set()

    def sent_to(self, endpoint: str) -> list[Request]:
        """The requests that arrived at an endpoint."""
        return [request for request in self.requests if request.endpoint == endpoint]

    # --- what tests tell ---

    def fault(
        self,
        endpoint: str,
        kind: str,
        times: int = 1,
        *,
        skip: int = 0,
        commit: bool = False,
        **options: Any,
    ) -> None:
        """Let answers of an endpoint go wrong, after all that it was told before.

        Parameters:
            endpoint: as ``"cancel_order"``.
            kind: a name in ``KINDS``.
            times: how many answers.
            skip: how many answers before them are right.
            commit: whether the request is carried out. One whose true answer gets through always
                is, and so is every read.
            **options: of the function of that name.
        """
        if kind not in KINDS:
            raise ValueError(f"there is no fault {kind!r}")
        fault = Fault(kind, commit or delivers(kind, options), options)
        with self._lock:
            waiting = self._faults.setdefault(endpoint, collections.deque())
            waiting.extend([*[None] * skip, *[fault] * times])

    def flap(self, lists: int, *, skip: int = 0, seconds: float = math.inf) -> None:
        """Let order lists be empty for a moment, though orders run; see :class:`Flap`."""
        self.books.flap = Flap(skip, lists, seconds)

    def calm(self) -> None:
        """Be honest from here on."""
        with self._lock:
            self._faults.clear()
        self.books.flap = None

    # --- starting and stopping ---

    def __enter__(self) -> FaultServer:
        self._start(self._accept, "fault-server")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        for thread in self._threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self._threads), "a thread is left"

    def stop(self) -> None:
        """Break off all connections, and take no more; may be called from any thread."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _start(self, target: Any, name: str, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        number = 0
        with self._listener:
            while True:
                sock, _ = self._listener.accept()
                with self._lock:
                    if self._stopping.is_set():
                        sock.close()
                        return
                    self._sockets.add(sock)
                number += 1
                self._start(self._serve, f"fault-server-{number}", sock, number)

    # --- a connection ---

    def _serve(self, sock: socket.socket, number: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = Wire(sock, self._stopping)
        try:
            with sock, sock.makefile("rb") as stream:
                while (request := _read(stream, number)) is not None:
                    self._answer(request, wire)
        except (Gone, OSError, ValueError):
            pass
        finally:
            with self._lock:
                self._sockets.discard(sock)
            sock.close()

    def _answer(self, request: Request, wire: Wire) -> None:
        with self._lock:
            self.requests.append(request)
            waiting = self._faults.get(request.endpoint)
            fault = waiting.popleft() if waiting else None
        # A read changes nothing: a fault of it tells the truth as far as it gets.
        if fault is None or fault.commit or request.body is None:
            status, envelope = self.books.answer(
                request.endpoint, request.query, request.body, request.key
            )
        else:
            status, envelope = CARRIED_OUT
        exchange = Exchange(
            wire=wire,
            status=status,
            body=json.dumps(envelope).encode(),
            date=email.utils.formatdate(time.time(), usegmt=True) if self.send_date else None,
            echo=f"auth: {request.key} ".encode("latin-1") + request.raw_body,
        )
        if fault is None:
            wire.send(exchange.true_answer())
        else:
            KINDS[fault.kind](exchange, **fault.options)


def _read(stream: Any, connection: int) -> Request | None:
    """Read one request; None where the connection ended before it."""
    first = stream.readline(65536).decode("latin-1").split()
    if len(first) != 3:
        return None
    headers: dict[str, str] = {}
    while line := stream.readline(65536).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    raw = stream.read(int(headers.get("content-length", "0")))
    parts = urlsplit(first[1])
    return Request(
        endpoint=parts.path.rsplit("/", 1)[-1],
        query=dict(parse_qsl(parts.query)),
        body=json.loads(raw) if raw else None,
        at=time.monotonic(),
        connection=connection,
        key=headers.get("auth", ""),
        raw_body=raw,
    )
