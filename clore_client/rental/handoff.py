"""Wait for another thread, in ways that an interrupt leaves whole."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

WAKE_EVERY = 0.5  # seconds after which a thread that waits looks again, should nobody wake it


class Gate:
    """Lets threads wait for something that happens once.

    Not a ``threading.Event``, whose lock an interrupt can leave locked.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()

    def open(self) -> None:
        """Let all threads through."""
        self.is_open = True
        self._queue.put(None)

    def wait(self) -> bool:
        """Wait for a moment, and return whether it is open."""
        if not self.is_open:
            try:
                self._queue.get(timeout=WAKE_EVERY)
            except queue.Empty:
                return self.is_open
            self._queue.put(None)  # for whoever waits as well
        return self.is_open


class ThreadCall:
    """A call that another thread makes."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self.done = Gate()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do it, and keep what comes of it."""
        try:
            self.result = self._action()
        except BaseException as error:
            self.error = error
        self.done.open()
