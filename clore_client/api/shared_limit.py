"""Keep a rate limit in a file, for all processes of this user on this machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from clore_client.api.rate_limit import LONGEST_PAUSE_KEPT, ProcessStore, Schedule
from clore_client.config import boot_id
from clore_client.files import lock_file, open_private, unlock_file
from clore_client.log import logger

LIMIT_PREFIX = "rate-limit-"
LONGEST_SCHEDULE = 65536  # bytes; a longer file is none of ours
UNUSED_AFTER = 86_400.0  # seconds after which the file of a key is removed
LOCK_PATIENCE_LIMIT = 1.0  # seconds; the lock is held for microseconds
TRY_FILE_AGAIN = 30.0  # seconds after which a file that could not be used is tried again
VERSION = 1

Step = TypeVar("Step")


class FileStore:
    """Keeps a schedule in a file. Locked for a step, never while somebody waits or sends.

    Where the file can't be used, the schedule is kept in memory, after one warning.

    Parameters:
        path: of the file; its name does not give the key away.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # of the threads: they share the handle, and so its lock
        self._handle: int | None = None
        self._pid = os.getpid()
        self._memory = ProcessStore()
        self._failed_at: float | None = None
        self._warned = False

    @property
    def level(self) -> str:
        """Who keeps the limit together."""
        if self._failed_at is None:
            return f"all processes on this machine, by {self._path}"
        seconds = time.monotonic() - self._failed_at
        return f"this process, since {self._path} could not be used {seconds:.0f} s ago"

    def update(self, step: Callable[[Schedule], Step]) -> Step:
        """Make one step."""
        failed_at = self._failed_at
        if failed_at is not None and time.monotonic() - failed_at < TRY_FILE_AGAIN:
            return self._memory.update(step)
        try:
            with self._lock:
                result = self._step(step)
            self._failed_at = None
            return result
        except OSError as error:
            self._failed_at = time.monotonic()
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the rate limit is kept for this process alone, since %s can't be used: %s",
                    self._path,
                    error,
                )
            return self._memory.update(step)

    def _step(self, step: Callable[[Schedule], Step]) -> Step:
        handle = self._open()
        if not lock_file(handle, LOCK_PATIENCE_LIMIT):
            raise OSError("another process does not let go of it")
        try:
            schedule = load(os.pread(handle, LONGEST_SCHEDULE, 0), time.monotonic())
            result = step(schedule)
            text = dump(schedule)
            if os.pwrite(handle, text, 0) != len(text):
                raise OSError("the disk is full")
            return result
        finally:
            unlock_file(handle)

    def _open(self) -> int:
        """Return the open file: not the one of a parent process, and none that was removed."""
        handle = self._handle
        if handle is not None and self._pid == os.getpid() and os.fstat(handle).st_nlink:
            return handle
        if handle is not None:
            self._handle = None
            with contextlib.suppress(OSError):
                os.close(handle)
        self._pid = os.getpid()
        new = not self._path.exists()
        self._handle = handle = open_private(self._path)
        if new:
            remove_unused(self._path.parent)
        return handle

    def __del__(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.close(self._handle)


def dump(schedule: Schedule) -> bytes:
    """Return a schedule as a line of text; what follows in the file is of an earlier one."""
    content = [
        VERSION,
        boot_id(),
        schedule.last,
        schedule.interval,
        schedule.extra,
        schedule.gap,
        schedule.paused_until,
        schedule.spaced,
        schedule.next_ticket,
        list(schedule.waiting.items()),
    ]
    return json.dumps(content).encode() + b"\n"


def load(text: bytes, now: float) -> Schedule:
    """Return the schedule of a file; a torn or foreign one, or one of an earlier boot, starts anew.

    A new one lets the first request wait for an interval: somebody may just have sent one.
    """
    schedule = Schedule()
    if not text:
        return schedule
    try:
        version, boot, *numbers, spaced, next_ticket, waiting = json.loads(
            text[: text.index(b"\n")]
        )
        last, interval, extra, gap, paused_until = map(float, numbers)
        known = version == VERSION and boot == boot_id()
        schedule.spaced = {str(n): (float(at), float(s)) for n, (at, s) in spaced.items()}
        schedule.next_ticket = int(next_ticket)
        schedule.waiting = {int(t): [float(x) for x in entry] for t, entry in waiting}
        fine = all(len(entry) == 4 for entry in schedule.waiting.values())
        if not (known and fine) or any(map(math.isnan, (last, interval, extra, gap, paused_until))):
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        schedule = Schedule()
        schedule.last = now
        return schedule
    # The clock may have started anew without telling: nothing lies further ahead than it can.
    schedule.interval = max(0.0, interval)
    schedule.last = min(last, now)
    schedule.extra, schedule.gap = max(0.0, extra), min(max(0.0, gap), LONGEST_PAUSE_KEPT)
    schedule.paused_until = min(paused_until, now + LONGEST_PAUSE_KEPT)
    schedule.spaced = {n: (min(at, now), s) for n, (at, s) in schedule.spaced.items()}
    return schedule


def remove_unused(folder: Path) -> None:
    """Remove the files of keys that nobody has used for a day."""
    before = time.time() - UNUSED_AFTER
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(LIMIT_PREFIX):
                with contextlib.suppress(OSError):
                    path = folder / name
                    if path.stat().st_mtime < before:
                        path.unlink()
