"""SIGTERM and SIGHUP end rentals: one handler for the process."""

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
    """A signal that ends the process, raised in the main thread so that ``with`` blocks are left.

    No ``Exception``, just as ``SystemExit``; left alone, the process ends with 128 + the signal.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class _Handling:
    """The state of the one handler. A handler can't take a lock: what it reads are attributes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.pid = 0
        self.installed: set[int] = set()
        self.warned: set[int] = set()
        self.stopping: int | None = None
        # Told of a signal, each must be fit for a handler: no locks, no network.
        self.listeners: dict[int, Callable[[int], None]] = {}


_handling = _Handling()


def in_main_thread() -> bool:
    """Whether this is the main thread, the only one that signals interrupt."""
    return threading.get_ident() == threading.main_thread().ident


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _handling.pid != os.getpid() or not _handling.users:
        # A forked child, or nobody is left who wants to know: as if there were no handler.
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    _handling.stopping = signum
    for tell in list(_handling.listeners.values()):
        tell(signum)
    raise SignalExit(signum)


def listen(owner: Any, tell: Callable[[int], None] | None) -> None:
    """Call ``tell`` from the handler when a signal comes; None ends that."""
    if tell is None:
        _handling.listeners.pop(id(owner), None)
    else:
        _handling.listeners[id(owner)] = tell


def stopping_signal() -> int | None:
    """The signal that this process is ending for, seen from a thread other than the main one."""
    return None if in_main_thread() else _handling.stopping


class SignalHandling:
    """One user of the handler; the last ``close()`` restores what was there before.

    The first one in the main thread installs it, only where a signal has its default action.
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
                "signals can only be handled from the main thread: SIGTERM and SIGHUP will not "
                "end this rental; call handle_signals() there first",
            )

    def close(self) -> None:
        """Stop using it. Safe to repeat."""
        if self._pid != os.getpid():
            return
        with _handling.lock:
            if self._open:
                self._open = False
                _handling.users -= 1
            last = not _handling.users
        if last and in_main_thread():  # else it stays, and does what the default does
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
        what = "is ignored" if current == signal.SIG_IGN else "has a handler already"
        _warn_once(signum, f"{name} {what}, which stays: it will not end rentals")


def _warn_once(signum: int, text: str) -> None:
    if signum not in _handling.warned:
        _handling.warned.add(signum)
        logger.warning("%s", text)


def _forget_signals() -> None:
    # Another thread may have held the lock at the fork. The handler sees by the pid whose it is.
    _handling.lock = threading.Lock()
    _handling.users, _handling.stopping = 0, None
    _handling.listeners.clear()
    for signum in list(_handling.installed):
        # With a handler of Python a child that waits for a lock can miss the signal; and it has no
        # rental to end.
        if signal.getsignal(signum) is _on_signal:
            signal.signal(signum, signal.SIG_DFL)
    _handling.installed.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_signals)
