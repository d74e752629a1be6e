"""Handle SIGTERM, SIGHUP and Ctrl-C, so that a rental ends after each of them."""

from __future__ import annotations

import functools
import os
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from clore_client.log import warn_once
from clore_client.process import this_process

WAKE_EVERY = 0.5  # seconds; a waiting thread checks again, even if no other thread wakes it
SIGNALS = tuple(s for n in ("SIGTERM", "SIGHUP") if (s := getattr(signal, n, None)) is not None)


class SignalExit(SystemExit):
    """End the ``with`` blocks of the main thread, because a signal ends the process.

    It is a ``SystemExit`` and not an ``Exception``. The exit status of the process is 128 plus the
    number of the signal.

    Attributes:
        signum: the number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def in_main_thread() -> bool:
    """Return whether this is the main thread, the only one that signals interrupt."""
    return threading.get_ident() == threading.main_thread().ident


def _on_signal(signum: int, frame: FrameType | None) -> None:
    # The handler must not take a lock or use the network.
    if not this_process.signal_users:  # do what the default handler does
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    this_process.stopping_signal = signum
    for rental in list(this_process.rentals):
        rental.on_signal(signum)
    raise SignalExit(signum)


class SignalHandling:
    """Use the signal handler. The last ``close()`` restores the former handlers.

    The first user in the main thread installs it, but only for signals with the default handler.
    """

    def __init__(self) -> None:
        this_process.signal_users.add(self)
        if in_main_thread():
            this_process.stopping_signal = None
            for signum in SIGNALS:
                _install(signum)
        elif not this_process.handled_signals:
            warn_once(
                "SIGTERM and SIGHUP will not end this rental, as it began outside the main thread: "
                "call handle_signals() in the main thread first"
            )

    def close(self) -> None:
        """Stop using the signal handler. Safe to repeat."""
        this_process.signal_users.discard(self)
        # Another thread can't restore handlers. Without users, ours acts as the default handler.
        if not this_process.signal_users and in_main_thread():
            _restore_handlers()

    def __enter__(self) -> SignalHandling:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _install(signum: int) -> None:
    current = signal.getsignal(signum)
    if current is _on_signal:
        this_process.handled_signals.add(signum)
    elif current == signal.SIG_DFL:
        signal.signal(signum, _on_signal)
        this_process.handled_signals.add(signum)
    else:
        name = signal.Signals(signum).name
        what = "is ignored" if current == signal.SIG_IGN else "already has a handler"
        warn_once(f"{name} {what}, so it will not end rentals")


def _restore_handlers() -> None:
    for signum in list(this_process.handled_signals):
        if signal.getsignal(signum) is _on_signal:
            signal.signal(signum, signal.SIG_DFL)
        this_process.handled_signals.discard(signum)


def _leave_signals_to_parent() -> None:
    this_process.signal_users.clear()
    this_process.stopping_signal = None
    _restore_handlers()  # a child that waits for a lock could miss the signal


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_signals_to_parent)


# --- interrupts ---


class BlockExit:
    """Make a new ``__exit__`` for each ``with`` statement.

    The ``with`` statement keeps that object until the block has ended in any way. The worker has a
    weak reference to it, and so sees the end even if an interrupt stops ``__exit__`` at its first
    line.
    """

    def __get__(self, rental: Any, owner: Any) -> Callable[..., None]:
        end: Callable[..., None] = owner._end
        if rental is None:
            return end
        leave = functools.partial(end, rental)
        rental.end_with(leave)
        return leave


class Gate:
    """Let threads wait for an event that happens once.

    A ``threading.Event`` is not used, because an interrupt can leave its lock locked.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._closed = threading.Lock()
        self._closed.acquire()

    def open(self) -> None:
        """Wake all threads that wait."""
        self.is_open = True
        self._closed.release()

    def wait(self) -> bool:
        """Wait up to ``WAKE_EVERY``, and return whether it is open."""
        if not self.is_open and self._closed.acquire(timeout=WAKE_EVERY):
            self._closed.release()  # wake the next thread
        return self.is_open


class ThreadCall:
    """Call a function in another thread."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self.done = Gate()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run the call, and store its result or its error."""
        try:
            self.result = self._action()
        except BaseException as error:
            self.error = error
        self.done.open()


def next_item(inbox: queue.SimpleQueue[Any], timeout: float | None) -> Any:
    """Return the next item of a queue that only this thread reads; None after the timeout.

    ``SimpleQueue.get(timeout=...)`` can wait forever if it is called with a free lock and an empty
    queue, and the timeout passes. So call ``get_nowait()`` first, which takes the lock.
    """
    try:
        return inbox.get_nowait()
    except queue.Empty:
        pass
    try:
        return inbox.get(timeout=timeout)
    except queue.Empty:
        return None
