"""Keep a rate limit in a file, for all processes of this user on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from clore_client.api.rate_limit import Schedule, StoreUnavailableError, Turn
from clore_client.config import read_line
from clore_client.files import lock_file, open_private, unlock_file

LIMIT_PREFIX = "rate-limit-"
USUAL_LENGTH, LONGEST_SCHEDULE = 8192, 1_000_000  # bytes
LIMIT_LOCK_PATIENCE = 0.5  # seconds; others lock the file for microseconds
UNUSED_AFTER = 86_400.0  # seconds after which the file of a key is removed
SCHEDULE_VERSION = "clore-1"  # of the content
NUMBERS = ("last", "interval", "surplus", "gap", "paused_until")


class FileStore:
    """A schedule in a file, which is locked for one step, never while waiting or sending.

    Parameters:
        path: the file. Its name must not contain the key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # so that threads do not wait for the lock of the file

    @property
    def level(self) -> str:
        """Who shares the schedule."""
        return f"among all processes on this machine, by {self._path}"

    def apply(self, step: str, turn: Turn) -> Any:
        """Make one step."""
        try:
            with self._lock:
                return self._apply(step, turn)
        except OSError as error:
            raise StoreUnavailableError(f"{self._path} can't be used: {error}") from error

    def _apply(self, step: str, turn: Turn) -> Any:
        handle, created = open_private(self._path)
        try:
            if not lock_file(handle, LIMIT_LOCK_PATIENCE):
                raise OSError("another process keeps it locked")
            try:
                now = time.monotonic()
                text = os.read(handle, USUAL_LENGTH)
                if len(text) == USUAL_LENGTH:
                    text += os.read(handle, LONGEST_SCHEDULE)
                schedule = load(text, now)
                result = getattr(schedule, step)(turn, now)
                text = dump(schedule)
                os.lseek(handle, 0, os.SEEK_SET)
                if os.write(handle, text) != len(text):
                    raise OSError("the disk is full")
            finally:
                unlock_file(handle)  # a forked child may still have it open
        finally:
            os.close(handle)
        if created:
            remove_unused(self._path.parent)
        return result


def limit_name(account: str) -> str:
    """Return the name of the file for an account.

    Each machine and boot has a file of its own, because they have different clocks, and machines
    may share the state folder.
    """
    machine = read_line("/proc/sys/kernel/random/boot_id") or socket.gethostname()
    return LIMIT_PREFIX + hashlib.sha256(f"{account}\n{machine}".encode()).hexdigest()[:32]


def dump(schedule: Schedule) -> bytes:
    """Return a schedule as three lines: numbers, endpoints with an interval, and the queue.

    The rest of a longer, earlier text may follow them. JSON would take twice as long.
    """
    numbers = [getattr(schedule, name) for name in NUMBERS]
    lines = [[SCHEDULE_VERSION, *numbers]]
    for table in (schedule.spaced, schedule.waiting):
        lines.append([item for name, row in table.items() for item in (name, *row)])
    return "".join(" ".join(map(str, line)) + "\n" for line in lines).encode()


def load(text: bytes, now: float) -> Schedule:
    """Return the schedule in a text.

    If the text is damaged or foreign, the schedule is a new one, in which the first request waits
    for an interval, because another one may just have been sent.
    """
    schedule = Schedule()
    if not text:
        return schedule
    try:
        head, spaced, waiting, _ = text.decode().split("\n", 3)
        version, *items = head.split()
        numbers = list(map(float, items))
        if version != SCHEDULE_VERSION or not math.isfinite(sum(numbers)):
            raise ValueError
        for name, number in zip(NUMBERS, numbers, strict=True):
            setattr(schedule, name, number)
        schedule.spaced = _table(spaced.split(), 2)
        schedule.waiting = _table(waiting.split(), 4)
    except ValueError:
        schedule = Schedule()
        schedule.last = now
    return schedule


def _table(items: list[str], columns: int) -> dict[str, list[float]]:
    if len(items) % (columns + 1):
        raise ValueError
    starts = range(0, len(items), columns + 1)
    return {items[i]: list(map(float, items[i + 1 : i + 1 + columns])) for i in starts}


def remove_unused(folder: Path) -> None:
    """Remove the files of keys that nobody has used for a day."""
    before = time.time() - UNUSED_AFTER
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{LIMIT_PREFIX}*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < before:
                    path.unlink()
