"""Call functions in another thread, and wait for it in a way that interrupts can't break."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

WAKE_EVERY = 0.5  # seconds; a waiting thread checks again, even if no other thread wakes it


class Gate:
    """An event that happens once, and for which threads can wait.

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
    """A function call for another thread to run."""

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

    ``SimpleQueue.get(timeout=...)`` can wait forever if its lock is free, the queue is empty and
    the timeout has passed. A ``get_nowait()`` that finds no item takes that lock first.
    """
    try:
        return inbox.get_nowait()
    except queue.Empty:
        pass
    try:
        return inbox.get(timeout=timeout)
    except queue.Empty:
        return None
