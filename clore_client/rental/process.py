"""Keep the state that all rentals of this process share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clore_client.rental.journal import JournalEntry
    from clore_client.rental.signals import SignalHandling
    from clore_client.rental.worker import RentalWorker


class ProcessState:
    """The state that all rentals of this process share.

    Each change is one atomic step, because a signal handler must not wait for a lock.

    Attributes:
        rentals: the workers of the open rentals.
        exiting: whether the interpreter is exiting.
        entries: the journal entries that this process wrote and has locked, by path.
        signal_users: the open users of the signal handler.
        handled_signals: the signals for which the handler is installed.
        stopping_signal: the signal that ends this process, or None.
    """

    def __init__(self) -> None:
        self.rentals: set[RentalWorker] = set()
        self.exiting = False
        self.entries: dict[str, JournalEntry] = {}
        self.signal_users: set[SignalHandling] = set()
        self.handled_signals: set[int] = set()
        self.stopping_signal: int | None = None


this_process = ProcessState()


def _leave_rentals_to_parent() -> None:
    this_process.rentals.clear()
    # The files that a child inherits would keep the parent's locks after the parent's death.
    for entry in this_process.entries.values():
        entry.unlock()
    this_process.entries.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_rentals_to_parent)
