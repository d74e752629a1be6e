"""Keep the state that all clients and rentals of this process share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from clore_client.rental.journal import JournalEntry
    from clore_client.rental.signals import SignalHandling
    from clore_client.rental.worker import RentalWorker

Shared = TypeVar("Shared")


class ProcessState:
    """Hold the state that all clients and rentals of this process share.

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
        self._of_accounts: dict[tuple[object, ...], Any] = {}
        self.rentals: set[RentalWorker] = set()
        self.exiting = False
        self.entries: dict[str, JournalEntry] = {}
        self.signal_users: set[SignalHandling] = set()
        self.handled_signals: set[int] = set()
        self.stopping_signal: int | None = None

    def of_account(self, make: Callable[[], Shared], *key: object) -> Shared:
        """Return the object that the clients of an account share, made on first use.

        Parameters:
            make: the class of the object, or a function that makes it.
            *key: identifies the object; one part is the digest of the account.
        """
        if key not in self._of_accounts:
            # setdefault() is atomic: if two threads make one, both get the first.
            self._of_accounts.setdefault(key, make())
        shared: Shared = self._of_accounts[key]
        return shared

    def forget_parent(self) -> None:
        """Leave the rentals to the parent, after a fork."""
        self.rentals.clear()
        # An inherited open file would keep the parent's lock after the parent has died.
        for entry in self.entries.values():
            entry.unlock()
        self.entries.clear()
        self._of_accounts.clear()  # at the fork, another thread may have held one of their locks


this_process = ProcessState()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=this_process.forget_parent)
