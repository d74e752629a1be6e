"""Handle SIGTERM and SIGHUP, so that they end rentals."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from clore_client.log import warn_once
from clore_client.process import this_process

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
    """One user of the signal handler. The last ``close()`` restores the former handlers.

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
        # Another thread can't restore handlers; without users, ours does what the default does.
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
