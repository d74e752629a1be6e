"""Run one transfer: its worker threads, scripts, deadline, progress and errors."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from clore_client.errors import SSHError, TransferError, printable
from clore_client.log import logger
from clore_client.models.result import TransferResult
from clore_client.progress import ProgressEvent, Report, readable_seconds, readable_size
from clore_client.ssh.connect import ConnectionPool
from clore_client.ssh.transfer.entry import FileEntry
from clore_client.ssh.transfer.options import TransferOptions
from clore_client.ssh.transfer.remote_script import LAST_PATIENCE, RemoteScript
from clore_client.ssh.transport import (
    COMMAND_WINDOW,
    NoChannelError,
    Watchdog,
    connection_errors,
    start_thread,
    takes_turns,
)

CHANNEL_PATIENCE = 0.5  # seconds until a worker without a channel leaves its work to the others
LEAST_AHEAD = 256 * 1024  # bytes that a resumable upload sends before the host confirms any
NEAR = 0.02  # seconds of a round trip; below it, one channel is as fast as several


class StoppedError(Exception):
    """Another worker has failed; used only within a transfer."""


class Transfer:
    """One transfer.

    Attributes:
        name: of the whole source, for errors.
        verb: ``"upload"`` or ``"download"``.
        total: bytes to transfer, once they are known.
        unchanged: the number of files that are left out, as they are the same.
        deletes: the names that only the target has, or None.
        skipped: (name, reason) of what is left out.
        timeout: seconds without anything sent or received.
    """

    def __init__(
        self, pool: ConnectionPool, options: TransferOptions, name: str, verb: str
    ) -> None:
        self.name = name
        self.verb = verb
        self.total = 0
        self.unchanged = 0
        self.deletes: list[bytes] | None = None
        self.options: Any = options
        self.pool = pool
        self.watchdog = Watchdog()
        self.skipped: list[tuple[str, str]] = []
        self.stopped = threading.Event()
        self.timeout = options.timeout
        self._expired = False
        self._report: Report | None = None
        self._done: dict[bytes, int] = {}
        self._all_done = 0
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._owner = threading.get_ident()
        self._workers: list[threading.Thread] = []
        self._started = time.monotonic()
        self._running: weakref.WeakSet[RemoteScript] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._turns: defaultdict[Any, threading.Lock] = defaultdict(threading.Lock)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Enforce the deadline, report the progress, and name the file in an error of a block."""
        deadline = self.options.deadline
        left = float("inf") if deadline is None else deadline - self.pool.age
        with self.watchdog, self.watchdog.limit(left, self._expire):
            with self.options.events.reporting() as self._report:
                try:
                    yield
                except BaseException as error:
                    failure = self._failed(error)
                    if failure is error:
                        raise
                    # The text says what the machine refused, its traceback nothing more.
                    raise failure from (None if type(error) is SSHError else error)

    def _expire(self) -> None:
        self._expired = True
        self.stop()
        self.pool.break_off()

    def restart(self) -> None:
        """Reset what a failed attempt leaves behind, before another one."""
        self.stopped.clear()
        self.timeout = self.options.timeout
        self._done.clear()
        self._all_done = 0
        self._events = queue.SimpleQueue()

    @property
    def takes_turns(self) -> bool:
        """Whether no script may start while another one of the connection ends."""
        return takes_turns(self.pool.ssh.get_transport())

    @property
    def near(self) -> bool:
        """Whether the host is so near that one channel is as fast as several."""
        return self.pool.round_trip < NEAR

    def ahead(self, confirmed: int) -> float:
        """Return how many bytes an upload may send beyond those that the host has confirmed.

        They are what a cut of the connection can lose.
        """
        if not self.options.resume:
            return float("inf")
        return max(LEAST_AHEAD, confirmed // 25)

    def script(
        self, ssh: Any, text: bytes, window: int = COMMAND_WINDOW, *,
        patient: bool = True, reads: bool = True,
    ) -> RemoteScript:  # fmt: skip
        """Start a script, which ends when the transfer stops."""
        by_owner = threading.get_ident() == self._owner
        running = RemoteScript(
            ssh.get_transport(), text, self.watchdog, self.timeout,
            patience=self.timeout if patient and by_owner else CHANNEL_PATIENCE,
            window=window, reads=reads, turn=self._turns[ssh] if self.takes_turns else None,
        )  # fmt: skip
        with self._lock:
            self._running.add(running)
        if self.stopped.is_set() and not by_owner:
            running.close()
            raise StoppedError
        return running

    def stop(self, but: RemoteScript | None = None) -> None:
        """End all scripts ``but`` one; wait less for what is still to be cleaned up."""
        self.stopped.set()
        self.timeout = min(self.timeout, LAST_PATIENCE)
        with self._lock:
            running = list(self._running)
        for script in running:
            script.hurry()
            if script is not but:
                script.close()

    # --- workers ---

    def start_workers(self, connections: int, workers: int, work: Callable[[Any], None]) -> None:
        """Start threads that each call ``work`` with a connection."""
        connections = min(connections, self.pool.size)
        for number in range(workers):
            worker = start_thread("transfer", self._work, number % connections, work)
            self._workers.append(worker)

    def _work(self, number: int, work: Callable[[Any], None]) -> None:
        failure: BaseException | None = None
        try:
            ssh = self.pool.get(number)
            if ssh is not None:
                work(ssh)
        except StoppedError:
            pass
        except BaseException as error:
            failure = error
        self._events.put((None, failure))

    def finish_workers(self) -> None:
        """Report progress until all workers have ended, and raise the first error.

        A worker that gets no channel leaves its work to the others.
        """
        left, failure = len(self._workers), None
        while left:
            entry, more = self._events.get()
            if entry is not None:
                if failure is None:
                    self.count(entry, more)
                continue
            left -= 1
            if isinstance(more, NoChannelError):
                logger.debug("a worker ends: %s", more)
            elif more is not None and failure is None:
                failure = more
                self.stop()
        if failure is not None:
            raise failure

    def join_workers(self) -> None:
        for worker in self._workers:
            worker.join()
        self._workers = []

    # --- progress ---

    def moved(self, entry: FileEntry, size: int) -> None:
        """Count bytes of a file that were transferred, in any thread."""
        if threading.get_ident() == self._owner:
            self.count(entry, size)
            return
        self._events.put((entry, size))
        if self.stopped.is_set():
            raise StoppedError

    def count(self, entry: FileEntry, size: int) -> None:
        """Count the bytes and call ``progress``, in the caller's thread."""
        if self._expired:
            raise SSHError("the deadline has passed")
        done = self._done[entry.name] = self._done.get(entry.name, 0) + size
        if self.options.progress is not None:
            self.options.progress(self._shown(entry), done, entry.size)
        self._all_done += size
        if self._report is not None:
            self._report(self._event(self._shown(entry)))

    def _event(self, name: str) -> ProgressEvent:
        done, total = self._all_done, max(self.total, self._all_done)
        text = f"{self.verb} of {name}: {readable_size(done)} of {readable_size(total)}"
        seconds = time.monotonic() - self._started
        if done and total > done:
            text += f", {readable_seconds(seconds * (total - done) / done)} left"
        return ProgressEvent(self.verb, done, text, total)

    def _shown(self, entry: FileEntry) -> str:
        return printable(os.fsdecode(entry.name) if entry.name else self.name)

    def leave_out(self, name: bytes, why: str) -> None:
        """Note and log what is not transferred."""
        self.skipped.append((printable(os.fsdecode(name)), printable(why)))
        logger.warning("left out: %s, %s", *self.skipped[-1])

    # --- the end ---

    def _failed(self, error: BaseException) -> BaseException:
        """Return a TransferError for an error of the host or the connection; others unchanged."""
        if isinstance(error, TransferError) or not isinstance(
            error, (SSHError, *connection_errors())
        ):
            return error
        entry = getattr(error, "entry", None)
        if entry is None:
            name, done = printable(self.name), sum(self._done.values())
            total = self.total
        else:
            name, done, total = self._shown(entry), self._done.get(entry.name, 0), entry.size
        why = printable(str(error) or type(error).__name__, 500)
        if self._expired:
            why = f"it took longer than deadline={self.options.deadline:g} seconds"
        if self.options.resume and done:
            why += "; what has arrived is kept for resume=True"
        text = f"{printable(name, 300)} was not transferred, after {done} of {total} bytes: {why}"
        return TransferError(text, name=name, done=done, total=total)

    def result(self, path: bytes | str, files: list[FileEntry]) -> TransferResult:
        size, duration = sum(file.size for file in files), time.monotonic() - self._started
        logger.debug("%d files, %d bytes in %.2f s: %s", len(files), size, duration, self.name)
        shown = printable(os.fsdecode(path))
        preview = getattr(self.options, "preview", False)
        return TransferResult(
            shown, len(files), size, duration, self.skipped, unchanged=self.unchanged,
            sent=[self._shown(entry) for entry in files] if preview else None, deletes=self.deletes,
        )  # fmt: skip
