"""What all clients of a process share for one key and base URL."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class PerAccount(Generic[V]):
    """One ``V`` for each base URL and key, made when it is first asked for.

    A forked child starts with none: another thread may have held a lock of theirs at the fork.
    """

    def __init__(self, make: Callable[[], V]) -> None:
        self._make = make
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[tuple[str, bytes], V] = {}

    def of(self, base_url: str, api_key: str) -> V:
        """The one of this account."""
        # A digest, so that no key stands in a table of the process.
        account = (base_url, hashlib.sha256(api_key.encode()).digest())
        with self._lock:
            if account not in self._of:
                self._of[account] = self._make()
            return self._of[account]
