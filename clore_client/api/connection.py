"""Connections that tell when a request leaves, and end an answer that takes too long."""

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

ENCODINGS = frozenset({"", "identity", "gzip", "deflate"})  # what is asked for, one at a time
PIECE = 16 * 1024  # bytes that are read at once: deflated ones grow a thousandfold at most


class Exchange(threading.local):
    """This thread's request: whom to tell that it leaves, and until when its answer may take."""

    def __init__(self) -> None:
        self.before: Callable[[], None] | None = None
        self.tell: Callable[[], None] | None = None
        self.left_at: float | None = None  # when the first byte left, by time.monotonic()
        self.connecting = False  # a watched connection was opened: ``left_at`` can be trusted
        self.deadline = math.inf

    def begin(self, before: Callable[[], None], tell: Callable[[], None], deadline: float) -> None:
        """Start over for another request.

        Parameters:
            before: called before it leaves, and may wait.
            tell: called when it has left.
            deadline: monotonic time at which its answer must have come.
        """
        self.before, self.tell, self.deadline = before, tell, deadline
        self.left_at, self.connecting = None, False

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Note that the block writes the first byte."""
        if self.before is not None:
            self.before()
        self.left_at = time.monotonic()
        try:
            yield
        finally:
            # Told afterwards: a thread that loses its turn between telling and writing would
            # leave late, and so too close to the next one.
            if self.tell is not None:
                self.tell()


exchange = Exchange()


class _BoundedReader(io.RawIOBase):
    """Reads from a socket until a deadline, however few bytes come at a time."""

    def __init__(self, raw: Any, sock: Any, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the whole answer took too long")
        timeout = self._sock.gettimeout()
        if timeout is None or left < timeout:
            self._sock.settimeout(left)  # until the next request sets its own
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that has a deadline, and is never taken from an interim one such as 103."""

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
        # A connection that sends what nobody asked for may do so again, and at another time; and
        # what changes something gets a connection of its own.
        changes = self._method not in ("GET", "HEAD")  # type: ignore[attr-defined]
        self.will_close = self.will_close or interim or changes


# Raised before anything is sent, also by connections that tell nothing.
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
        with exchange.leaving():
            super().endheaders(*args, **kwargs)


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    """requests' adapter over connections that tell when the first byte is about to leave."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> ProxyManager:
        manager: ProxyManager = super().proxy_manager_for(*args, **kwargs)
        if type(manager) is ProxyManager:  # the one for SOCKS has connections of its own
            self._watch(manager)
        return manager

    @staticmethod
    def _watch(manager: PoolManager) -> None:
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}


class Session(requests.Session):
    """A session over watched connections that looks at no redirect, let alone follows one."""

    def __init__(self, user_agent: str) -> None:
        super().__init__()
        self.headers["User-Agent"] = user_agent
        self.headers["Accept-Encoding"] = "gzip, deflate"
        for prefix in ("https://", "http://"):
            self.mount(prefix, _Adapter(pool_maxsize=1))

    def resolve_redirects(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return iter(())


class Sessions:
    """The sessions of a client. One thread uses one at a time.

    So a session that an interrupt has left in any state is never used again, and no lock of its
    pool can hold up another thread.
    """

    def __init__(self, user_agent: str) -> None:
        self._user_agent = user_agent
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._for_reads: collections.deque[Session] = collections.deque()  # kept alive
        self._for_changes: collections.deque[Session] = collections.deque()  # not connected

    def take(self, reads: bool) -> Session:
        """Return a session for one request.

        Parameters:
            reads: whether the request changes nothing. One that does gets a new connection: it
                must not meet one that the server has closed, nor the rest of an earlier answer.
        """
        if self._pid != os.getpid():
            self._forget()  # a connection that a fork has shared must not be used by both sides
        try:
            return (self._for_reads if reads else self._for_changes).pop()
        except IndexError:
            return Session(self._user_agent)

    def put_back(self, session: Session, reads: bool) -> None:
        """Keep a session for another request."""
        (self._for_reads if reads else self._for_changes).append(session)

    def close(self) -> None:
        """Close the connections that are not in use."""
        if self._pid != os.getpid():
            return
        for sessions in (self._for_reads, self._for_changes):
            with contextlib.suppress(IndexError):  # another thread may have taken the last
                while True:
                    sessions.pop().close()


class UnusableAnswerError(Exception):
    """An answer that is not read to its end."""


def read_body(response: requests.Response, longest: float) -> bytes:
    """Read and decode the body of an answer, and no more than that.

    Parameters:
        response: whose body has not been read.
        longest: how many bytes, decoded, it may have.

    Raises:
        UnusableAnswerError: it has more, or an encoding that was not asked for.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ENCODINGS:
        raise UnusableAnswerError("the answer has an encoding that was not asked for")
    pieces, size = [], 0
    for piece in response.iter_content(PIECE):
        size += len(piece)
        if size > longest:
            raise UnusableAnswerError(
                f"the answer is larger than {longest / 1e6:g} MB; max_response_mb= allows more"
            )
        pieces.append(piece)
    return b"".join(pieces)


def never_left(error: Exception, left: bool) -> bool:
    """Whether a request that failed is sure not to have reached anybody."""
    if left:
        return False
    if exchange.connecting or isinstance(error, _UNSENT):
        return True
    return isinstance(reason_of(error), _UNSENT)


def reason_of(error: BaseException) -> Any:
    """Return what is behind an error of requests: urllib3's ``reason``, or its cause."""
    inner = error.args[0] if error.args else error
    return getattr(inner, "reason", inner)
