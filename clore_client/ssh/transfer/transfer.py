"""Run one transfer: its arguments, worker threads, scripts, deadline, progress and errors."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, TransferError, printable
from clore_client.log import logger
from clore_client.models.result import TransferResult
from clore_client.progress import (
    ProgressEvent,
    ProgressOptions,
    Report,
    readable_seconds,
    readable_size,
)
from clore_client.ssh.connect import ConnectionPool
from clore_client.ssh.transfer.entry import (
    BLOCK,
    SMALL_FILE,
    FileEntry,
    LocalTree,
    Tree,
    excluder,
    file_digest,
    whole_seconds,
)
from clore_client.ssh.transfer.remote_script import LAST_PATIENCE, MAX_LINE, RemoteScript
from clore_client.ssh.transfer.scripts import (
    CHUNK_DIGESTS,
    FILE_DIGESTS,
    MAX_ANSWER,
    encoded_name,
    parse_digests,
    remote_path,
    script_text,
)
from clore_client.ssh.transport import (
    COMMAND_WINDOW,
    NoChannelError,
    Watchdog,
    connection_errors,
    start_thread,
    takes_turns,
)
from clore_client.validation import (
    check_bool,
    check_callback,
    check_count,
    check_local_path,
    check_number,
    check_optional_number,
    check_type,
    short_repr,
)

MAX_STREAMS = 16
# (size in bytes, connections): from this size on, more connections save more time than their logins
# cost.
UPLOAD_CONNECTIONS = ((256 * 1024 * 1024, 4), (32 * 1024 * 1024, 2))
CHANNEL_PATIENCE = 0.5  # seconds until a worker without a channel leaves its work to the others
LEAST_AHEAD = 256 * 1024  # bytes that a resumable upload sends before the host confirms any
NEAR = 0.02  # seconds of a round trip; below it, one channel is as fast as several
RANGE = 64 * 1024 * 1024  # bytes that are requested or hashed at a time, within the timeout
FileRange = tuple[FileEntry, int, int]  # with the start and the size


class TransferOptions:
    """Check the arguments of a transfer."""

    def __init__(
        self, local: Any, remote: Any, *, preserve: Any, verify: Any, resume: Any, symlinks: Any,
        exclude: Any, skip_unchanged: Any, streams: Any, progress: Any, on_progress: Any,
        timeout: Any, deadline: Any,
    ) -> None:  # fmt: skip
        self.local = check_path("local", local)
        self.remote = check_path("remote", remote)
        self.source = remote_path(self.remote)
        if not isinstance(skip_unchanged, bool) and skip_unchanged != "checksum":
            shown = short_repr(skip_unchanged)
            raise ValueError(f"skip_unchanged must be True, False or 'checksum', not {shown}")
        self.skip_unchanged: bool | str = skip_unchanged
        self.excludes = excluder(exclude)
        # Times can only be compared later if they are kept now.
        self.preserve = check_bool("preserve", preserve) or skip_unchanged is True
        self.verify = check_bool("verify", verify)
        self.resume = check_bool("resume", resume)
        if symlinks not in ("skip", "copy", "follow"):
            shown = short_repr(symlinks)
            raise ValueError(f"symlinks must be 'skip', 'copy' or 'follow', not {shown}")
        self.symlinks: str = symlinks
        self.streams = None
        if streams is not None:
            self.streams = check_count("streams", streams, minimum=1, maximum=MAX_STREAMS)
        self.events = ProgressOptions(on_progress, progress is True)
        self.progress = None if isinstance(progress, bool) else progress
        check_callback("progress", self.progress, 3)
        self.timeout = check_number("timeout", timeout, above=True, unit="seconds")
        self.deadline = check_optional_number("deadline", deadline, above=True, unit="seconds")


class DownloadOptions(TransferOptions):
    """Check the arguments of a download, and find its target.

    Attributes:
        target: the path to write a file to: inside ``local`` if that is a directory or is named as
            one, else ``local``.
        folder_target: the path to write a directory to: inside ``local``, or ``local`` itself for
            the content of a directory.
    """

    def __init__(self, remote: Any, local: Any, *, max_bytes: Any, **given: Any) -> None:
        super().__init__(local, remote, **given)
        self.max_bytes = None if max_bytes is None else check_count("max_bytes", max_bytes)
        here = os.fsdecode(os.path.expanduser(self.local))
        name = os.fsdecode(self.remote.rstrip(b"/").rpartition(b"/")[2])
        content = is_content(self.remote) or self.remote == b"~"
        inside = os.path.isdir(here) or here.endswith(("/", os.sep))
        self.target = os.path.join(here, name) if inside and not content else here
        self.folder_target = here if content else os.path.join(here, name)


def is_content(path: bytes) -> bool:
    """Return whether a source path means the content of a directory, as it does for rsync."""
    last = path.replace(os.fsencode(os.sep), b"/").rpartition(b"/")[2]
    return last in (b"", b".", b"..")


def check_path(name: str, value: Any) -> bytes:
    """Check a path, and return it as bytes."""
    check_type(name, value, "a path", str, bytes, os.PathLike)
    check_local_path(name, value)  # no host allows longer ones
    path = os.fsencode(value)
    if not path:
        raise ValueError(f"{name} must not be empty")
    return path


class UploadOptions(TransferOptions):
    """Check the arguments of an upload."""

    def __init__(self, local: Any, remote: Any, *, preview: Any, delete: Any, **given: Any) -> None:
        super().__init__(local, remote, **given)
        self.content = is_content(self.local)
        self.source = re.sub(rb"(/+\.?)+\Z", b"/", self.source)
        self.preview = check_bool("preview", preview)
        self.delete: bool | frozenset[bytes] = False
        if isinstance(delete, TransferResult) and delete.deletes is not None and not preview:
            self.delete = frozenset(delete.deletes)
        elif delete is True and preview:
            self.delete = True
        elif delete is not False:
            raise ValueError(
                "delete must be the result of a call with preview=True and delete=True, so that "
                f"nothing is removed unseen, not {short_repr(delete)}"
            )
        self.compares = bool(preview or self.delete is not False or self.skip_unchanged)


def check_upload(local: Any, remote: Any, **given: Any) -> tuple[UploadOptions, LocalTree]:
    """Check the arguments of an upload, and find the files to send."""
    options = UploadOptions(local, remote, **given)
    tree = LocalTree(os.path.expanduser(options.local), options.symlinks, options.excludes)
    if options.delete is not False and not tree.is_folder:
        raise ValueError("delete is for the upload of a directory, and local is a file")
    return options, tree


def upload_connections(options: UploadOptions, tree: LocalTree) -> int:
    """Return how many connections an upload uses."""
    if options.streams is not None:
        return options.streams
    size = tree.size
    return next((count for least, count in UPLOAD_CONNECTIONS if size >= least), 1)


class StoppedError(SSHError):
    """Stop a worker after another one has failed; used only within a transfer."""


class Transfer:
    """Run the worker threads and scripts of one transfer, and report its progress and errors.

    Attributes:
        name: of the whole source, for errors.
        verb: ``"upload"`` or ``"download"``.
        total: bytes to transfer, once they are known.
        unchanged: the number of files that are left out, as they are the same.
        deletes: the names that only the target has, or None.
        skipped: (name, reason) for each entry that is left out.
        timeout: seconds without anything sent or received.
        near: whether one channel is as fast as several.
        takes_turns: whether no script may start while another one of the connection ends.
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
        self.near = pool.round_trip < NEAR
        self.takes_turns = takes_turns(pool.ssh.get_transport())
        self.watchdog = Watchdog()
        self.skipped: list[tuple[str, str]] = []
        self._expired = False
        self._report: Report | None = None
        self._owner = threading.get_ident()
        self._workers: list[threading.Thread] = []
        self._started = time.monotonic()
        self._running: weakref.WeakSet[RemoteScript] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._turns: defaultdict[Any, threading.Lock] = defaultdict(threading.Lock)
        self.restart()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Enforce the deadline, report the progress, and raise a TransferError for what fails."""
        failures: tuple[type[Exception], ...] = (SSHError, *connection_errors())
        deadline = self.options.deadline
        left = float("inf") if deadline is None else deadline - self.pool.age
        try:
            with (
                self.watchdog,
                self.watchdog.limit(left, self._expire),
                self.options.events.reporting() as self._report,
            ):
                yield
        except TransferError:  # of another transfer, in a callback
            raise
        except failures as error:
            # The text of a plain SSHError is the whole reason: its traceback would only be noise.
            raise self._failure(error) from (None if type(error) is SSHError else error)

    def _expire(self) -> None:
        self._expired = True
        self.stop()
        self.pool.break_off()

    def restart(self) -> None:
        """Prepare the first attempt, or another one after one that failed."""
        self.stopped = threading.Event()
        self.timeout: float = self.options.timeout
        self._done: dict[bytes, int] = {}
        self._all_done = 0
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ahead(self, confirmed: int) -> float:
        """Return how many bytes an upload may send beyond those that the host has confirmed.

        A broken connection can lose these bytes.
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
        """End all scripts except ``but``, and shorten the timeouts for the cleanup."""
        self.stopped.set()
        self.timeout = min(self.timeout, LAST_PATIENCE)
        with self._lock:
            running = list(self._running)
        for script in running:
            script.channel.timeout = min(script.channel.timeout, LAST_PATIENCE)
            if script is not but:
                script.close()

    def give_up(self, control: RemoteScript | None = None) -> None:
        """Stop all workers, and wait until ``control`` has removed the data on the host."""
        self.stop(but=control)
        self.join_workers()
        if control is None:
            return
        control.end()
        failures: tuple[type[Exception], ...] = (SSHError, *connection_errors())
        try:
            with self.watchdog.limit(LAST_PATIENCE, control.close):
                control.rest(MAX_LINE)
        except failures as error:
            if not self.options.resume:
                logger.warning("a temporary file may stay on the host: %s", error)
        finally:
            control.close()

    def leave_unchanged(
        self, tree: Tree, find: Callable[[bytes], FileEntry | None],
        different: Callable[[list[FileEntry]], list[FileEntry]],
    ) -> None:  # fmt: skip
        """Remove the files that the target already has, if ``skip_unchanged`` asks for that.

        Parameters:
            find: returns the entry of the target with a name, if there is one.
            different: returns those of the files whose content differs.
        """
        how = self.options.skip_unchanged
        same = []
        for entry in tree.files if how else ():
            found = find(entry.name)
            if found is not None and (found.kind, found.size) == ("f", entry.size):
                same_time = whole_seconds(found.mtime) == whole_seconds(entry.mtime)
                if same_time or how == "checksum":
                    same.append(entry)
        names = {entry.name for entry in same}
        if how == "checksum" and same:
            names -= {entry.name for entry in different(same)}
        tree.entries = [entry for entry in tree.entries if entry.name not in names]
        self.unchanged = len(names)

    def different(
        self, ranges: Iterable[FileRange], place: Callable[[FileEntry], str | Path],
        setup: str = "", **values: Any,
    ) -> Iterator[FileEntry]:  # fmt: skip
        """Yield the file of each range whose SHA-256 on the host differs.

        Parameters:
            place: returns the local path of a file.
            setup: shell commands that set ``path``, if it is not in ``values``.
        """
        small: list[FileRange] = []
        chunks: list[FileRange] = []
        for entry, start, size in ranges:
            if entry.name and size == entry.size < SMALL_FILE:
                small.append((entry, start, size))
            else:
                end = start + size
                chunks += [(entry, at, min(RANGE, end - at)) for at in range(start, end, RANGE)]
        small.sort(key=lambda found: found[0].name)
        names = [b"./" + entry.name + b"\0" for entry, _, _ in small]
        lines = [b"%d %d %s\n" % (at // BLOCK, n, encoded_name(e.name)) for e, at, n in chunks]
        for body, asked, found in ((FILE_DIGESTS, names, small), (CHUNK_DIGESTS, lines, chunks)):
            if not found:
                continue
            text = script_text("digests", setup + body, **values)
            with self.script(self.pool.ssh, text) as script:
                script.send(b"".join(asked))
                script.end()
                digests = parse_digests(script.rest(MAX_ANSWER), len(found))
            for (entry, start, size), digest in zip(found, digests, strict=True):
                if digest != file_digest(place(entry), start, size):
                    yield entry

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
        self.join_workers()
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
        """Record and log an entry that is not transferred."""
        self.skipped.append((printable(os.fsdecode(name)), printable(why)))
        logger.warning("left out: %s, %s", *self.skipped[-1])

    # --- the end ---

    def _failure(self, error: Exception) -> TransferError:
        """Describe an error of the host or the connection: the file, how far, and why."""
        entry = getattr(error, "entry", None)
        if entry is None:
            name, done, total = printable(self.name), self._all_done, self.total
        else:
            name, done, total = self._shown(entry), self._done.get(entry.name, 0), entry.size
        why = printable(str(error) or type(error).__name__, 500)
        if self._expired:
            why = f"it took longer than deadline={self.options.deadline:g} seconds"
        if self.options.resume and done:
            why += "; the received data is kept for resume=True"
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
