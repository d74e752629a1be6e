"""Limit calls that have no timeout of their own, and start threads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from clore_client.log import logger

WATCH_INTERVAL = 0.1  # seconds between two checks of the limits


def start_thread(name: str, target: Callable[..., object], *args: Any) -> threading.Thread:
    """Start a daemon thread."""
    thread = threading.Thread(target=target, args=args, name=f"clore-{name}", daemon=True)
    thread.start()
    return thread


class Limit:
    """The time limit of a block.

    Attributes:
        expired: True if the block took longer.
    """

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self.deadline = time.monotonic() + seconds
        self.action = action
        self.expired = False


class Watchdog:
    """Runs an action when a block takes too long; a context manager with one thread.

    paramiko writes to a socket without a timeout: only closing the connection ends that.
    """

    def __init__(self) -> None:
        self._limits: dict[int, Limit] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._thread = start_thread("watchdog", self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    @contextlib.contextmanager
    def limit(self, seconds: float, action: Callable[[], object]) -> Iterator[Limit]:
        """Run ``action`` in a new thread if the block takes longer than ``seconds``."""
        limit = Limit(seconds, action)
        self._limits[id(limit)] = limit
        try:
            yield limit
        finally:
            self._limits.pop(id(limit), None)

    def _watch(self) -> None:
        while not self._done.wait(WATCH_INTERVAL):
            now = time.monotonic()
            for key, limit in list(self._limits.items()):
                if now >= limit.deadline and self._limits.pop(key, None) is not None:
                    limit.expired = True
                    logger.debug("the watchdog stops a call that takes too long")
                    start_thread("watchdog-action", limit.action)
