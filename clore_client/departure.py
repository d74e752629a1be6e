"""Connections that tell when a request leaves, and what never left this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ssl import SSLCertVerificationError
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import LocationParseError, NewConnectionError
from urllib3.poolmanager import PoolManager, ProxyManager


class Departure(threading.local):
    """For this thread: whom to tell that a request leaves, and whether one has left."""

    def __init__(self) -> None:
        self.tell: Callable[[], None] | None = None
        self.at: float | None = None
        self.connecting = False  # a watched connection was opened: then ``at`` is to be trusted

    @contextmanager
    def noted(self) -> Iterator[None]:
        """The block writes the first byte."""
        self.at = time.monotonic()
        try:
            yield
        finally:
            # Told afterwards: a thread that loses its turn between telling and writing would
            # leave late, and so too close to the next one.
            if self.tell is not None:
                self.tell()

    @contextmanager
    def watched(self, tell: Callable[[], None]) -> Iterator[None]:
        """In the block, call ``tell`` when the thread's request leaves."""
        self.tell, self.at, self.connecting = tell, None, False
        try:
            yield
        finally:
            self.tell = None


departure = Departure()


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
    def connect(self) -> None:
        departure.connecting = True
        super().connect()

    def endheaders(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is None:
            self.connect()
        with departure.noted():
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


class WatchedSession(requests.Session):
    """A session over watched connections that looks at no redirect, let alone follows one."""

    def __init__(self, user_agent: str) -> None:
        super().__init__()
        self.headers["User-Agent"] = user_agent
        for prefix in ("https://", "http://"):
            self.mount(prefix, _Adapter(pool_maxsize=64))

    def resolve_redirects(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return iter(())


def never_left(error: Exception, left: bool) -> bool:
    """Whether a request that failed is sure not to have reached anybody."""
    if left:
        return False
    if departure.connecting or isinstance(error, _UNSENT):
        return True
    return isinstance(reason_of(error), _UNSENT)


def reason_of(error: BaseException) -> Any:
    """What is behind an error of requests: the ``reason`` that urllib3 gives, or its cause."""
    inner = error.args[0] if error.args else error
    return getattr(inner, "reason", inner)
