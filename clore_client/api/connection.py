"""Open HTTP connections that record when a request is sent, and limit its response time."""

from __future__ import annotations

import collections
import contextlib
import http.client
import io
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from ssl import SSLCertVerificationError
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import LocationParseError, NewConnectionError
from urllib3.poolmanager import PoolManager, ProxyManager

ENCODINGS = frozenset({"", "identity", "gzip", "deflate"})
PIECE = 16 * 1024  # bytes per read; decompressed, they can become a thousand times as many


class Exchange(threading.local):
    """Track the current request of each thread.

    Attributes:
        sent_at: monotonic time at which the first byte was sent, or None.
        connecting: whether a connection of this module is used, so that ``sent_at`` is reliable.
        deadline: monotonic time by which the whole response must have arrived.
    """

    def __init__(self) -> None:
        self.begin(lambda: None, lambda: None, math.inf)

    def begin(
        self, before: Callable[[], None], on_sent: Callable[[], None], deadline: float
    ) -> None:
        """Start another request.

        Parameters:
            before: called when it is connected and about to be sent; it may wait.
            on_sent: called when the request is sent.
            deadline: see the attribute.
        """
        self._before, self._on_sent, self.deadline = before, on_sent, deadline
        self.sent_at: float | None = None
        self.connecting = False

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Record that the block sends the first byte."""
        self._before()
        self.sent_at = time.monotonic()
        try:
            yield
        finally:
            # Called after the write: if the thread was paused before it, the request was sent late,
            # and the next one must wait longer.
            self._on_sent()


exchange = Exchange()


class _BoundedReader(io.RawIOBase):
    """Read a socket, with one deadline for all reads."""

    def __init__(self, raw: Any, sock: Any, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the whole response took too long: a longer timeout= allows more")
        timeout = self._sock.gettimeout()
        if timeout is None or left < timeout:
            self._sock.settimeout(left)  # the next request sets it again
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """Read a response before its deadline, and skip interim responses such as 103."""

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        if exchange.deadline < math.inf:
            raw = self.fp.detach()
            self.fp = io.BufferedReader(_BoundedReader(raw, sock, exchange.deadline))

    def begin(self) -> None:
        super().begin()
        interim = False
        while 100 <= self.status < 200:
            interim = True
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()
        # Do not reuse a connection that may send another interim response later, or the connection
        # of a request that changes something.
        changes = self._method not in ("GET", "HEAD")  # type: ignore[attr-defined]
        self.will_close = self.will_close or interim or changes


# Raised before anything is sent, by any kind of connection.
_UNSENT = (
    requests.ConnectTimeout,
    requests.exceptions.InvalidURL,
    requests.exceptions.ProxyError,
    LocationParseError,
    NewConnectionError,
    SSLCertVerificationError,
)


class _Connection(HTTPConnection):
    response_class = _Response

    def connect(self) -> None:
        exchange.connecting = True
        super().connect()

    def endheaders(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is None:
            self.connect()
        with exchange.sending():
            super().endheaders(*args, **kwargs)


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    """Use connections that record when a request is sent."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> ProxyManager:
        manager: ProxyManager = super().proxy_manager_for(*args, **kwargs)
        if type(manager) is ProxyManager:  # SOCKS has other connection classes
            self._watch(manager)
        return manager

    @staticmethod
    def _watch(manager: PoolManager) -> None:
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}


class Session(requests.Session):
    """Send requests, record when they are sent, and follow no redirect."""

    def __init__(self, user_agent: str) -> None:
        super().__init__()
        self.headers["User-Agent"] = user_agent
        self.headers["Accept-Encoding"] = "gzip, deflate"
        for prefix in ("https://", "http://"):
            self.mount(prefix, _Adapter(pool_maxsize=1))

    def resolve_redirects(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return iter(())


class Sessions:
    """Keep the sessions of a client. Each request uses a session of its own.

    A session whose request is interrupted is not used again, as its state and its locks are not
    known.
    """

    def __init__(self, user_agent: str) -> None:
        self._user_agent = user_agent
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._for_reads: collections.deque[Session] = collections.deque()  # kept alive

    def take(self, reads: bool) -> Session:
        """Return a session for one request.

        Parameters:
            reads: whether the request only reads. Any other gets a new connection, because an old
                one may be closed by the server, or contain the rest of another response.
        """
        if self._pid != os.getpid():
            self._forget()  # after a fork, two processes must not use one connection
        try:
            return self._for_reads.pop() if reads else Session(self._user_agent)
        except IndexError:
            return Session(self._user_agent)

    def put_back(self, session: Session) -> None:
        """Keep a session of a request that only reads for another one."""
        self._for_reads.append(session)

    def close(self) -> None:
        """Close the connections that are not in use."""
        if self._pid != os.getpid():
            return
        with contextlib.suppress(IndexError):  # empty
            while True:
                self._for_reads.pop().close()


class UnusableResponseError(Exception):
    """A response that can't be read to its end."""


def read_body(response: requests.Response, longest: float) -> bytes:
    """Read and decompress the body of a response, up to a limit.

    Parameters:
        response: a response with an unread body.
        longest: the most bytes, decompressed.

    Raises:
        UnusableResponseError: the body is larger, or has an unexpected encoding.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ENCODINGS:
        raise UnusableResponseError("the response has an encoding that was not requested")
    pieces, size = [], 0
    for piece in response.iter_content(PIECE):
        size += len(piece)
        if size > longest:
            raise UnusableResponseError(
                f"the response is larger than {longest / 1e6:g} MB: set a larger max_response_mb"
            )
        pieces.append(piece)
    return b"".join(pieces)


def never_sent(error: Exception, recorded: bool) -> bool:
    """Return whether it is certain that a failed request was not sent.

    Parameters:
        error: the failure.
        recorded: whether a connection of this module recorded a send.
    """
    if recorded:
        return False
    if exchange.connecting or isinstance(error, _UNSENT):
        return True
    return isinstance(reason_of(error), _UNSENT)


def reason_of(error: BaseException) -> Any:
    """Return the cause inside an error of requests: the ``reason`` of urllib3, if there is one."""
    inner = error.args[0] if error.args else error
    return getattr(inner, "reason", inner)
