"""What uploads and downloads share: their arguments, the workers, progress and results."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, TransferError, printable
from clore_client.log import logger
from clore_client.models.result import TransferResult
from clore_client.ssh.connect import ConnectionPool
from clore_client.ssh.remote import BLOCK, LAST_PATIENCE, RemoteScript, parse_digests
from clore_client.ssh.transport import (
    COMMAND_WINDOW,
    NoChannelError,
    connection_errors,
    takes_turns,
)
from clore_client.ssh.watchdog import Watchdog, start_thread
from clore_client.validation import check_bool, check_local_path, check_number, short_repr

TRANSFER_PIECE = 256 * 1024  # bytes between two looks at whether to go on
MAX_STREAMS = 16
MAX_ANSWER = 256 * 1024 * 1024  # bytes of a listing
SYMLINK_WAYS = ("skip", "copy", "follow")
PART = ".clore-part-"
LAST_TIME = 253_402_300_799  # of the year 9999; filesystems know no times far beyond
CHANNEL_PATIENCE = 0.5  # seconds until a worker leaves its work to the others
NEAR = 0.02  # seconds of a round trip, below which one channel fills the line


class TransferOptions:
    """The arguments of a transfer, checked."""

    def __init__(
        self, local: Any, remote: Any, *, preserve: Any = False, verify: Any = False,
        resume: Any = False, symlinks: Any = "skip", streams: Any = None, max_bytes: Any = None,
        progress: Any = None, timeout: Any = 30.0, deadline: Any = None,
    ) -> None:  # fmt: skip
        self.local = check_path("local", local)
        self.remote = check_path("remote", remote)
        self.preserve = check_bool("preserve", preserve)
        self.verify = check_bool("verify", verify)
        self.resume = check_bool("resume", resume)
        if symlinks not in SYMLINK_WAYS:
            raise ValueError(
                f"symlinks must be 'skip', 'copy' or 'follow', not {short_repr(symlinks)}"
            )
        self.symlinks: str = symlinks
        for name, value, low, high in (
            ("streams", streams, 1, MAX_STREAMS), ("max_bytes", max_bytes, 0, float("inf")),
        ):  # fmt: skip
            if value is not None:
                if type(value) is not int:
                    raise TypeError(f"{name} must be a whole number, not {short_repr(value)}")
                check_number(name, value, minimum=low, maximum=high)
        self.streams: int | None = streams
        self.max_bytes: int | None = max_bytes
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, not {short_repr(progress)}")
        self.progress: Callable[[str, int, int], object] | None = progress
        self.timeout = check_number("timeout", timeout, above=True, unit="seconds")
        if deadline is not None:
            check_number("deadline", deadline, above=True, unit="seconds")
        self.deadline: float | None = deadline


def check_path(name: str, value: Any) -> bytes:
    """Check a path; as bytes."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {short_repr(value)}")
    try:
        path = os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a character that no path may have") from None
    if not path or b"\0" in path:
        raise ValueError(f"{name} must not be empty or hold a NUL: {short_repr(path)}")
    check_local_path(name, path)  # no host has longer ones either
    return path


class FileEntry:
    """A file, directory or symlink of a transfer.

    Attributes:
        name: below the directory that is transferred; empty for a single file.
        kind: ``"f"``, ``"d"`` or ``"l"``.
        size: bytes; 0 unless it is a file.
        mtime: nanoseconds.
        mode: permissions.
        link: where a symlink leads.
    """

    __slots__ = ("kind", "link", "mode", "mtime", "name", "size")

    def __init__(
        self, name: bytes, size: int, mtime: int, mode: int, kind: str = "f", link: bytes = b""
    ) -> None:
        self.name = name
        self.kind = kind
        self.size = size if kind == "f" else 0
        self.mtime = mtime
        self.mode = mode
        self.link = link

    @property
    def facts(self) -> tuple[bytes, int, int]:
        """What tells that a source has changed."""
        return (self.name, self.size, self.mtime)


def facts_key(facts: object) -> str:
    """Return a key for a record of what is done: another source has another key."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def links_within(name: bytes, link: bytes) -> bytes | None:
    """Return the name, in the same tree, that a symlink leads to; None for outside of it."""
    if link.startswith(b"/") or not link:
        return None
    parts = name.split(b"/")[:-1]
    for part in link.split(b"/"):
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


class StoppedError(Exception):
    """Another worker has failed; within a transfer only."""


class Transfer:
    """One transfer: its workers, progress, deadline, and errors.

    Attributes:
        name: of the whole, for errors.
        skipped: (name, why) of what is left out.
    """

    def __init__(self, pool: ConnectionPool, options: TransferOptions, name: str) -> None:
        self.name = name
        self.options = options
        self.pool = pool
        self.watchdog = Watchdog()
        self.skipped: list[tuple[str, str]] = []
        self.stopped = threading.Event()
        self._expired = False
        self._timeout = options.timeout
        self._done: dict[bytes, int] = {}
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._owner = threading.get_ident()
        self._workers: list[threading.Thread] = []
        self._started = time.monotonic()
        self._running: weakref.WeakSet[RemoteScript] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._turns: defaultdict[Any, threading.Lock] = defaultdict(threading.Lock)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Hold the deadline, for the length of a block."""
        deadline = self.options.deadline
        # The pool counts from its first login on.
        left = float("inf") if deadline is None else deadline - self.pool.age
        with self.watchdog, self.watchdog.limit(left, self._expire):
            yield

    def _expire(self) -> None:
        self._expired = True
        self.stop()
        self.pool.break_off()

    def restart(self) -> None:
        """Begin again in another way."""
        self.stopped.clear()
        self._timeout = self.options.timeout
        self._done.clear()
        self._events = queue.SimpleQueue()

    @property
    def timeout(self) -> float:
        """Seconds without anything sent or received."""
        return self._timeout

    @property
    def takes_turns(self) -> bool:
        """Whether a command on a connection may not start while another one ends."""
        return takes_turns(self.pool.ssh.get_transport())

    @property
    def near(self) -> bool:
        """Whether the host is so near that one channel fills the line."""
        return self.pool.round_trip < NEAR

    def script(
        self,
        ssh: Any,
        script: bytes,
        window: int = COMMAND_WINDOW,
        patient: bool = True,
        reads: bool = True,
    ) -> RemoteScript:
        """Start a script, which ends when the transfer stops."""
        patience = CHANNEL_PATIENCE
        if patient and threading.get_ident() == self._owner:
            patience = self._timeout
        running = RemoteScript(
            ssh.get_transport(), script, self.watchdog, self._timeout, patience=patience,
            window=window, reads=reads, turn=self._turns[ssh] if self.takes_turns else None,
        )  # fmt: skip
        with self._lock:
            self._running.add(running)
        if self.stopped.is_set() and threading.get_ident() != self._owner:
            running.close()
            raise StoppedError
        return running

    def stop(self, but: RemoteScript | None = None) -> None:
        """End what the workers do; what is still to be tidied up is not waited for as long."""
        self.stopped.set()
        self._timeout = min(self._timeout, LAST_PATIENCE)
        with self._lock:
            running = list(self._running)
        for script in running:
            script.timeout = min(script.timeout, LAST_PATIENCE)
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
        """Tell the user what the workers do, until all have ended; raises the first error.

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
        """Count bytes of a file that were moved; ends a worker that is to stop."""
        if threading.get_ident() == self._owner:
            self.count(entry, size)
            return
        self._events.put((entry, size))
        if self.stopped.is_set():
            raise StoppedError

    def count(self, entry: FileEntry, size: int) -> None:
        """Tell the user, in the caller's thread."""
        if self._expired:
            raise SSHError("the deadline has passed")
        done = self._done[entry.name] = self._done.get(entry.name, 0) + size
        if self.options.progress is not None:
            self.options.progress(self.called(entry), done, entry.size)

    def called(self, entry: FileEntry) -> str:
        """Return the name of a file, fit for a terminal."""
        return printable(os.fsdecode(entry.name) if entry.name else self.name)

    def leave_out(self, name: bytes, why: str) -> None:
        """Note what is not transferred."""
        self.skipped.append((printable(os.fsdecode(name)), printable(why)))
        logger.warning("left out: %s, %s", *self.skipped[-1])

    # --- the end ---

    def failed(self, error: BaseException, files: list[FileEntry]) -> BaseException:
        """Return the error to raise."""
        if isinstance(error, TransferError) or not isinstance(
            error, (SSHError, *connection_errors())
        ):
            return error
        entry = getattr(error, "entry", None)
        done = sum(self._done.values()) if entry is None else self._done.get(entry.name, 0)
        total = sum(file.size for file in files) if entry is None else entry.size
        name = printable(self.name) if entry is None else self.called(entry)
        kept = "; what has arrived is kept for resume=True" if self.options.resume and done else ""
        why = printable(str(error) or type(error).__name__, 500)
        if self._expired:
            why = f"it took longer than deadline={self.options.deadline:g} seconds"
        failure = TransferError(
            f"{printable(name, 300)} was not transferred, after {done} of {total} bytes: "
            f"{why}{kept}",
            name=name, done=done, total=total,
        )  # fmt: skip
        failure.__cause__ = error
        return failure

    def result(self, path: bytes | str, files: list[FileEntry]) -> TransferResult:
        """Return what is told in the end."""
        size, duration = sum(file.size for file in files), time.monotonic() - self._started
        logger.debug("%d files, %d bytes in %.2f s: %s", len(files), size, duration, self.name)
        shown = printable(os.fsdecode(path))
        return TransferResult(shown, len(files), size, duration, self.skipped)


@contextlib.contextmanager
def about(entry: FileEntry) -> Iterator[None]:
    """Note in an error which file it is about."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "entry"):
            with contextlib.suppress(AttributeError):
                error.entry = entry  # type: ignore[attr-defined]
        raise


def chunk_size(size: int, resume: bool) -> int:
    """Return how many bytes of a file are recorded at a time; small where it may be resumed."""
    if not resume:
        return 64 * BLOCK
    return min(max(-(-size // (512 * BLOCK)), 1), 16) * BLOCK


def changed_files(
    script: RemoteScript, files: list[FileEntry], place: Callable[[FileEntry], Any]
) -> Iterator[FileEntry]:
    """Yield the files whose SHA-256 there, which a script prints, is not that of the copy here."""
    script.send(b"".join(b"./" + entry.name + b"\0" for entry in files))
    script.end()
    digests = parse_digests(script.rest(MAX_ANSWER), len(files))
    for entry, digest in zip(files, digests, strict=True):
        if digest != file_digest(place(entry), 0, entry.size):
            yield entry


def file_digest(path: str | Path, start: int, length: int) -> str:
    """Return the SHA-256 of a part of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(TRANSFER_PIECE, length))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()
