"""Handle SIGTERM and SIGHUP, so that they end rentals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from clore_client.log import logger

SIGNALS = tuple(s for n in ("SIGTERM", "SIGHUP") if (s := getattr(signal, n, None)) is not None)


class SignalExit(SystemExit):
    """A signal that ends the process, raised in the main thread to end its ``with`` blocks.

    It is a ``SystemExit`` and not an ``Exception``. The exit status of the process is 128 plus the
    number of the signal.

    Attributes:
        signum: the number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class _Handling:
    """The state of the signal handler, which must not take a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.pid = 0
        self.installed: set[int] = set()
        self.warned: set[int] = set()
        self.stopping: int | None = None
        # Called from the signal handler, so they must not use locks or the network.
        self.listeners: dict[int, Callable[[int], None]] = {}


_handling = _Handling()


def in_main_thread() -> bool:
    """Return whether this is the main thread, the only one that signals interrupt."""
    return threading.get_ident() == threading.main_thread().ident


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _handling.pid != os.getpid() or not _handling.users:
        # In a forked child, or without users, do what the default handler does.
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    _handling.stopping = signum
    for listener in list(_handling.listeners.values()):
        listener(signum)
    raise SignalExit(signum)


def listen(owner: Any, listener: Callable[[int], None] | None) -> None:
    """Call ``listener`` from the signal handler at each signal; None stops that."""
    if listener is None:
        _handling.listeners.pop(id(owner), None)
    else:
        _handling.listeners[id(owner)] = listener


def stopping_signal() -> int | None:
    """Return the signal that ends this process, for threads other than the main thread."""
    return None if in_main_thread() else _handling.stopping


class SignalHandling:
    """One user of the signal handler. The last ``close()`` restores the former handlers.

    The first user in the main thread installs it, but only for signals with the default handler.
    """

    def __init__(self) -> None:
        self._open = True
        self._pid = os.getpid()
        main = in_main_thread()
        with _handling.lock:
            if _handling.pid != self._pid:
                _handling.users, _handling.pid, _handling.installed = 0, self._pid, set()
            _handling.users += 1
            if main:
                _handling.stopping = None
        if main:
            for signum in SIGNALS:
                _install(signum)
        elif not _handling.installed:
            _warn_once(
                0,
                "SIGTERM and SIGHUP will not end this rental, as it began outside the main thread: "
                "call handle_signals() in the main thread first",
            )

    def close(self) -> None:
        """Stop using the signal handler. Safe to repeat."""
        if self._pid != os.getpid():
            return
        with _handling.lock:
            if self._open:
                self._open = False
                _handling.users -= 1
            last = not _handling.users
        if last and in_main_thread():  # otherwise it stays, and does what the default does
            for signum in list(_handling.installed):
                if signal.getsignal(signum) is _on_signal:
                    signal.signal(signum, signal.SIG_DFL)
                _handling.installed.discard(signum)

    def __enter__(self) -> SignalHandling:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _install(signum: int) -> None:
    current = signal.getsignal(signum)
    if current is _on_signal:
        _handling.installed.add(signum)
    elif current == signal.SIG_DFL:
        signal.signal(signum, _on_signal)
        _handling.installed.add(signum)
    else:
        name = signal.Signals(signum).name
        what = "is ignored" if current == signal.SIG_IGN else "already has a handler"
        _warn_once(signum, f"{name} {what}, so it will not end rentals")


def _warn_once(signum: int, text: str) -> None:
    if signum not in _handling.warned:
        _handling.warned.add(signum)
        logger.warning("%s", text)


def _forget_signals() -> None:
    # Another thread may have held the lock at the fork.
    _handling.lock = threading.Lock()
    _handling.users, _handling.stopping = 0, None
    _handling.listeners.clear()
    for signum in list(_handling.installed):
        # A child that waits for a lock could miss the signal, and has no rental to end.
        if signal.getsignal(signum) is _on_signal:
            signal.signal(signum, signal.SIG_DFL)
    _handling.installed.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_signals)
