"""Keep the connections of one call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from clore_client.errors import SSHError
from clore_client.log import logger
from clore_client.ssh.connect import Login, NotUpYetError
from clore_client.ssh.transport import is_connected, start_thread


class ConnectionPool:
    """The connections of one call: the caller's own, or up to ``size`` new ones.

    Parameters:
        login: for new connections; None if ``ssh`` is used.
        ssh: the caller's connection.
        size: the highest number of connections.
        eager: open all of them now, at the same time; else each one when it is needed.
        on_failure: raises a better error where ``ssh`` broke because the order has ended.
    """

    def __init__(
        self,
        login: Login | None,
        ssh: Any = None,
        size: int = 1,
        eager: bool = True,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.size = size if login is not None else 1
        self._eager = eager
        self._login = login
        self._on_failure = login.explain if login is not None else on_failure
        self._ssh = ssh
        self._opened: list[Any] = [None] * self.size
        self._threads: dict[int, threading.Thread] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def __enter__(self) -> ConnectionPool:
        if self._login is None:
            self._opened[0] = self._ssh
        else:
            for number in range(1, self.size if self._eager else 1):
                self._begin(self._login, number)
            try:
                self._opened[0] = self._first(self._login)
            except BaseException:
                self._close()
                raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        lost = isinstance(error, SSHError) and not is_connected(self.ssh)
        self._close()
        if lost and error is not None and self._on_failure is not None:
            self._on_failure(error)

    @property
    def ssh(self) -> Any:
        """The first connection."""
        return self._opened[0]

    @property
    def age(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self._started

    @property
    def round_trip(self) -> float:
        """Seconds, measured during the login; 1.0 if they are not known."""
        transport = self.ssh.get_transport()
        return float(getattr(getattr(transport, "packetizer", None), "round_trip", 1.0))

    def get(self, number: int) -> Any:
        """Wait for a connection and return it, or None if the host refuses so many."""
        if number and self._login is not None:
            with self._lock:
                if number not in self._threads:
                    self._begin(self._login, number)
            self._threads[number].join()
        return self._opened[number]

    def break_off(self) -> None:
        """Close every connection, which also ends calls that hang."""
        for ssh in self._opened:
            if ssh is not None:
                ssh.close()

    def _first(self, login: Login) -> Any:
        def once() -> Any:
            try:
                return login.once()
            except NotUpYetError:
                # If the host allows only one connection, another thread may have opened it.
                for number, thread in self._threads.items():
                    thread.join()
                    if (ssh := self._opened[number]) is not None:
                        self._opened[number] = None
                        return ssh
                raise

        return login.open(first=once)

    def _begin(self, login: Login, number: int) -> None:
        self._threads[number] = start_thread("login", self._open, login, number)

    def _open(self, login: Login, number: int) -> None:
        try:
            self._opened[number] = login.once()
        except Exception as error:
            logger.debug("a further connection was refused: %s", error)

    def _close(self) -> None:
        for thread in self._threads.values():
            thread.join()
        if self._login is not None:
            self.break_off()
