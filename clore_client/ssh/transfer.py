"""What uploads and downloads have in common: jobs, the lanes that do them, and progress."""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, TransferError, printable
from clore_client.log import logger
from clore_client.models.result import Transferred
from clore_client.ssh.remote import BLOCK, CHANNEL_PAUSE, Exec, Watch
from clore_client.ssh.transport import NoChannelError
from clore_client.validation import check_bool, check_number

SMALL_FILE = 4 * 1024 * 1024  # bytes; smaller ones of a directory travel together
BUNDLE_BYTES = 8 * 1024 * 1024
BUNDLE_FILES = 1000
SHORTEST_RANGE = 4 * 1024 * 1024
LONGEST_RANGE = 64 * 1024 * 1024
MOST_RANGES = 16384  # of all files; a machine may say that one has 10**18 bytes
MOST_STREAMS = 16
LONGEST_ANSWER = 256 * 1024 * 1024  # bytes of a listing
CHUNK = 256 * 1024  # bytes between two looks at whether to go on
PART = ".clore-part-"

Another = Callable[[], Any] | None


class Options:
    """The arguments of a transfer, checked."""

    def __init__(
        self,
        local: Any,
        remote: Any,
        preserve: Any,
        verify: Any,
        resume: Any,
        streams: Any,
        progress: Any,
        timeout: Any,
    ) -> None:
        self.local = check_path("local", local)
        self.remote = check_path("remote", remote)
        self.preserve = check_bool("preserve", preserve)
        self.verify = check_bool("verify", verify)
        self.resume = check_bool("resume", resume)
        if streams is not None:
            if type(streams) is not int:
                raise TypeError(f"streams must be a whole number, not {streams!r}")
            check_number("streams", streams, minimum=1, maximum=MOST_STREAMS)
        self.streams: int | None = streams
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, not {progress!r}")
        self.progress: Callable[[str, int, int], object] | None = progress
        self.timeout = check_number("timeout", timeout, above=True, unit="seconds")


def check_path(name: str, value: Any) -> bytes:
    """A path as bytes."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {value!r}")
    path = os.fsencode(value)
    if not path or b"\0" in path:
        raise ValueError(f"{name} must not be empty or hold a NUL: {path!r}")
    return path


class Item:
    """A file or directory of a transfer.

    Attributes:
        name: below the directory that is transferred; empty for a single file.
        size: bytes; 0 for a directory.
        mtime: nanoseconds.
        mode: permissions.
        folder: whether it is a directory.
    """

    __slots__ = ("folder", "mode", "mtime", "name", "size")

    def __init__(self, name: bytes, size: int, mtime: int, mode: int, folder: bool = False) -> None:
        self.name = name
        self.size = 0 if folder else size
        self.mtime = mtime
        self.mode = mode
        self.folder = folder

    @property
    def shown(self) -> str:
        return os.fsdecode(self.name)


class Job:
    """What one command on the machine does: a range of a file, or a bundle of small files."""

    __slots__ = ("items", "key", "length", "start")

    def __init__(self, items: list[Item], start: int = 0, length: int | None = None) -> None:
        self.items = items
        self.start = start
        self.length = length  # None: a bundle
        # The time of a directory changes with every file that is made in it.
        facts = [(i.name, i.size, 0 if i.folder else i.mtime) for i in items]
        # Says that it is done in the record, so that a source that has changed is another job.
        self.key = hashlib.sha256(repr((facts, start, length)).encode()).hexdigest()[:32]

    @property
    def files(self) -> list[Item]:
        return [item for item in self.items if not item.folder]

    @property
    def size(self) -> int:
        return sum(i.size for i in self.items) if self.length is None else self.length

    @property
    def blocks(self) -> tuple[int, int]:
        """The first block of a range, and how many there are."""
        return self.start // BLOCK, -(-(self.length or 0) // BLOCK)


def plan(items: Iterable[Item], bundled: bool, resumable: bool) -> list[Job]:
    """The jobs for the files, the same for the same files; ``resumable`` ones are smaller."""
    parts, least = (64, SHORTEST_RANGE // 4) if resumable else (16, SHORTEST_RANGE)
    jobs: list[Job] = []
    bundle: list[Item] = []
    size = 0
    items = list(items)
    longest = max(LONGEST_RANGE, sum(i.size for i in items) // MOST_RANGES // BLOCK * BLOCK)
    for item in items:
        if bundled and item.size < SMALL_FILE:
            bundle.append(item)
            size += item.size
            if size >= BUNDLE_BYTES or len(bundle) >= BUNDLE_FILES:
                jobs.append(Job(bundle))
                bundle, size = [], 0
            continue
        step = min(max(-(-item.size // (parts * BLOCK)) * BLOCK, least), longest)
        for start in range(0, max(item.size, 1), step):
            jobs.append(Job([item], start, min(step, item.size - start)))
    if bundle:
        jobs.append(Job(bundle))
    return jobs


def leave_out(skipped: list[tuple[str, str]], name: str, link: str | None) -> None:
    """Tell of what is not transferred: a symlink, with where it leads, or what is no file."""
    why = "it is no file" if link is None else f"a symlink to {link}" if link else "a symlink"
    skipped.append((name, why))
    logger.warning("left out: %s, %s", printable(name, 300), printable(why, 300))


class StoppedError(Exception):
    """Another lane has failed; within a transfer only."""


class Reporter:
    """Gathers what the lanes have done, for the user's callback and for errors."""

    def __init__(self, name: str, options: Options) -> None:
        self.name = name  # of the whole
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.done: dict[bytes, int] = {}
        self._options = options
        self._owner = threading.get_ident()
        self._alive = time.monotonic()
        self.on_crowd: Callable[[], object] = lambda: None
        self._running: weakref.WeakSet[Exec] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.watch = Watch(options.timeout)

    def exec(self, ssh: Any, command: str) -> Exec:
        """Run a verb in a lane; it is cut off when the transfer stops."""
        # A lane gives way to others; nobody else asks for a channel when there are none.
        patience = self._options.timeout if threading.get_ident() == self._owner else 0.0
        running = Exec(ssh, command, self.watch, patience)
        self._alive = time.monotonic()
        with self._lock:
            self._running.add(running)
        if self.stopped.is_set():
            running.close()
            raise StoppedError
        return running

    def crowded(self, error: NoChannelError) -> None:
        """A lane got no channel: it may get one when another lane has done its job."""
        if time.monotonic() - self._alive > self._options.timeout:
            raise error
        self.on_crowd()
        self.stopped.wait(CHANNEL_PAUSE)

    def cut(self) -> None:
        """End what runs in the lanes."""
        with self._lock:
            all_of_them = list(self._running)
        for running in all_of_them:
            running.close()

    def called(self, item: Item) -> str:
        return item.shown if item.name else self.name

    def moved(self, item: Item, size: int) -> None:
        """Some bytes of a file were moved; stops the lane where it is to stop."""
        self._alive = time.monotonic()
        if threading.get_ident() == self._owner:
            self.count(item, size)
            return
        self.events.put((item, size))
        if self.stopped.is_set():
            raise StoppedError

    def count(self, item: Item, size: int) -> None:
        """In the caller's thread: tell the user."""
        done = self.done[item.name] = self.done.get(item.name, 0) + size
        if self._options.progress is not None:
            self._options.progress(self.called(item), done, item.size)

    def failed(self, error: BaseException, item: Item | None) -> BaseException:
        """The error to raise for what went wrong with a file."""
        if item is None or not isinstance(error, (SSHError, OSError, EOFError)):
            return error
        name, done = self.called(item), self.done.get(item.name, 0)
        kept = "; what has arrived is kept for resume=True" if self._options.resume and done else ""
        reason = printable(str(error) or type(error).__name__, 500)
        failure = TransferError(
            f"{printable(name, 300)} was not transferred, after {done} of {item.size} bytes: "
            f"{reason}{kept}",
            name=name,
            done=done,
            total=item.size,
        )
        failure.__cause__ = error
        return failure

    def judged(self, error: BaseException, files: list[Item]) -> BaseException:
        """The same for what went wrong with the whole."""
        if isinstance(error, TransferError) or not isinstance(error, (SSHError, OSError, EOFError)):
            return error
        whole = Item(b"", sum(item.size for item in files), 0, 0)
        self.done[b""] = sum(self.done.values())
        return self.failed(error, whole)

    def result(
        self, path: str, files: list[Item], started: float, skipped: list[tuple[str, str]]
    ) -> Transferred:
        """What is told in the end."""
        size, duration = sum(item.size for item in files), time.monotonic() - started
        logger.debug("%d files, %d bytes in %.2f s: %s", len(files), size, duration, self.name)
        return Transferred(path, len(files), size, duration, skipped)


Work = Callable[[Any, Job], None]


class Lanes:
    """Threads that do jobs, each over a channel of its own, on one or more connections."""

    def __init__(self, ssh: Any, another: Another, connections: int, channels: int) -> None:
        self._opened: dict[int, Any] = {0: ssh}
        self._another = another
        self._connections = 1 if another is None else connections
        self._channels = channels
        self._locks = [threading.Lock() for _ in range(self._connections)]

    def run(
        self, jobs: list[Job], work: Work, report: Reporter,
        meanwhile: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        """Do all jobs, and something else meanwhile. The first error stops all, and is raised."""
        todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            todo.put(job)
        count = min(len(jobs), self._connections * self._channels)
        lanes = [
            threading.Thread(
                target=self._lane,
                args=(number % self._connections, todo, work, report),
                name="clore-transfer",
                daemon=True,
            )
            for number in range(count)
        ]
        try:
            for lane in lanes:
                lane.start()
            if meanwhile is not None:
                meanwhile()
            self._oversee(len(lanes), report)
        except BaseException:
            report.stopped.set()
            report.watch.hurry()
            raise
        finally:
            # What is left of the others' work would hold the end up for as long as timeout.
            if report.stopped.is_set():
                report.cut()
            for lane in lanes:
                if lane.ident is not None:  # it was started
                    lane.join()
            self._close()

    def _oversee(self, running: int, report: Reporter) -> None:
        failure: BaseException | None = None
        while running:
            what, more, *job = report.events.get()
            if what is None:
                running -= 1
                if more is not None and failure is None:
                    failure = report.failed(more, job[0].items[0] if job[0] is not None else None)
                    report.stopped.set()
                    report.cut()
            elif failure is None:
                report.count(what, more)
        if failure is not None:
            raise failure

    def _lane(
        self, number: int, todo: queue.SimpleQueue[Job], work: Work, report: Reporter
    ) -> None:
        failure: BaseException | None = None
        job: Job | None = None
        try:
            ssh = self._connection(number)
            while ssh is not None and not report.stopped.is_set():
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    break
                try:
                    work(ssh, job)
                except NoChannelError as error:
                    todo.put(job)
                    report.crowded(error)
        except StoppedError:
            pass
        except BaseException as error:
            failure = error
        report.events.put((None, failure, job))

    def _connection(self, number: int) -> Any:
        """The connection of that number; None where the machine does not take so many."""
        with self._locks[number]:
            if number not in self._opened:
                self._opened[number] = self._open()
            return self._opened[number]

    def _open(self) -> Any:
        try:
            return self._another() if self._another is not None else None
        except (SSHError, OSError) as error:
            logger.debug("a further connection is refused, it goes on without: %s", error)
            return None

    def _close(self) -> None:
        for number, ssh in list(self._opened.items()):
            if number and ssh is not None:
                ssh.close()


def file_digest(path: str | Path, start: int, length: int) -> str:
    """SHA-256 of a part of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(CHUNK, length))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()


def parse_sums(text: bytes, count: int) -> list[str]:
    """The digests that sha256sum printed, in the order of the names."""
    # What else stands on a line is a piece of a name: not every sha256sum escapes newlines.
    sums = [s.decode() for s in re.findall(rb"^\\?([0-9a-f]{64}) [ *]", text, re.M)]
    if len(sums) != count:
        raise SSHError(f"the machine hashed {len(sums)} files instead of {count}")
    return sums
