"""A marketplace with faults, on raw sockets, that records what really happened.

It is written from the wire format, and shares no code with the client or the simulator.
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

from tests.attack.faults import KINDS, Exchange, Gone, Wire, delivers
from tests.attack.ledger import Answer, Flap, Ledger, LedgerOrder

CARRIED_OUT: Answer = (200, {"code": 0})


@dataclass
class Request:
    """A request that arrived.

    Attributes:
        endpoint: the last part of the path, such as ``"wallets"``.
        body: the decoded body, or None.
        at: monotonic time of its arrival.
        connection: the number of the connection.
        key: the header ``auth``.
        raw_body: the body as it arrived.
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
    """A fault of one response, and whether the request is still carried out."""

    kind: str
    commit: bool
    options: dict[str, Any]


class FaultServer:
    """A marketplace with faults on a port of this machine; a context manager.

    Attributes:
        url, key: its URL, and a key; it accepts any key.
        ledger: the true state, and settings that can be changed.
        send_date: whether responses have a ``Date``.
        requests: the requests that arrived, in order.

    Parameters:
        send_date: the attribute.
        **settings: arguments of :class:`Ledger`.

    Example:
        >>> with FaultServer(visible_after=0.1) as server:
        ...     server.fault("create_order", "page", commit=True)
    """

    def __init__(self, *, send_date: bool = True, **settings: Any) -> None:
        self.ledger = Ledger(**settings)
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

    # --- state for tests ---

    @property
    def orders(self) -> list[LedgerOrder]:
        """Return all orders that were ever made."""
        return self.ledger.orders

    @property
    def running(self) -> list[int]:
        """Return the ids of the orders that cost money now."""
        return self.ledger.running

    @property
    def stopped(self) -> bool:
        """Return whether it has stopped."""
        return self._stopping.is_set()

    def sent_to(self, endpoint: str) -> list[Request]:
        """Return the requests that arrived at an endpoint."""
        return [request for request in self.requests if request.endpoint == endpoint]

    # --- faults for tests ---

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
        """Add a fault of an endpoint, after the faults that were added before.

        Parameters:
            endpoint: for example ``"cancel_order"``.
            kind: a name in ``KINDS``.
            times: how many responses have the fault.
            skip: how many correct responses come first.
            commit: whether the request is carried out. Reads always are, and requests whose
                correct response arrives.
            **options: arguments of the function for that kind.
        """
        if kind not in KINDS:
            raise ValueError(f"there is no fault {kind!r}")
        fault = Fault(kind, commit or delivers(kind, options), options)
        with self._lock:
            waiting = self._faults.setdefault(endpoint, collections.deque())
            waiting.extend([*[None] * skip, *[fault] * times])

    def flap(self, lists: int, *, skip: int = 0, seconds: float = math.inf) -> None:
        """Make order lists empty for a moment, although orders run; see :class:`Flap`."""
        self.ledger.flap = Flap(skip, lists, seconds)

    def calm(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults.clear()
        self.ledger.flap = None

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
        """Close all connections, and accept no more. Any thread may call it."""
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
        # A read changes nothing, so its fault sends a part of the correct response.
        if fault is None or fault.commit or request.body is None:
            status, envelope = self.ledger.answer(
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
    """Read one request; return None if the connection ended before it."""
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
