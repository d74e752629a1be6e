"""Connections for the length of one call: as many as are wanted, opened at the same time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clore_client.log import logger
from clore_client.ssh.connect import LOGIN_OPTIONS, Login, NotUpYetError

if TYPE_CHECKING:
    import paramiko


def login_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a login, by their names."""
    for name in given:
        if name not in LOGIN_OPTIONS:
            raise TypeError(
                f"there is no argument {name!r}, neither here nor among those of a login: "
                f"{', '.join(sorted(LOGIN_OPTIONS))}"
            )
    return given


class Connected:
    """Connections for the length of a block: the caller's one, or as many as are wanted.

    Parameters:
        login: to be used, or None for the caller's connection.
        ssh: that one.
        ahead: further connections that are opened at the same time as the first.
    """

    def __init__(self, login: Login | None, ssh: paramiko.SSHClient | None, ahead: int = 0) -> None:
        self._login = login
        self.ssh: Any = ssh
        self._ahead = ahead if login is not None else 0
        self._opening: list[threading.Thread] = []
        self._opened: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __enter__(self) -> Connected:
        if self._login is not None:
            for _ in range(self._ahead):
                thread = threading.Thread(
                    target=self._open_ahead, args=(self._login,), name="clore-login", daemon=True
                )
                thread.start()
                self._opening.append(thread)
            try:
                self.ssh = self._first(self._login)
            except BaseException:
                self._close_ahead()
                raise
        return self

    def _first(self, login: Login) -> Any:
        try:
            return login.once()
        except NotUpYetError:
            # Where one connection is all that there is, another may have it.
            for _ in range(self._ahead):
                self._ahead -= 1
                if (ssh := self._opened.get()) is not None:
                    return ssh
        return login.open()

    def __exit__(self, *_: object) -> None:
        self._close_ahead()
        if self._login is not None:
            self.ssh.close()

    def _open_ahead(self, login: Login) -> None:
        try:
            self._opened.put(login.once())
        except Exception as error:
            logger.debug("a further connection was refused: %s", error)
            self._opened.put(None)

    def _close_ahead(self) -> None:
        for thread in self._opening:
            thread.join()
        while not self._opened.empty():
            unused = self._opened.get()
            if unused is not None:
                unused.close()

    @property
    def another(self) -> Callable[[], Any] | None:
        """Gives one more connection to the same machine; None where there is but the caller's."""
        return None if self._login is None else self._next

    def _next(self) -> Any:
        if self._ahead > 0:
            self._ahead -= 1
            return self._opened.get()
        return self._login.once() if self._login is not None else None
