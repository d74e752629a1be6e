"""Keep a rate limit in a file, for all processes of this user on this machine."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
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
SCHEDULE_VERSION = 1  # of the content

_encode = json.JSONEncoder(check_circular=False).encode


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
                os.lseek(handle, 0, os.SEEK_SET)
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


@functools.cache
def boot_id() -> str:
    """Return the id of this machine's current boot, or an empty string if it is not known."""
    return read_line("/proc/sys/kernel/random/boot_id")


def dump(schedule: Schedule) -> bytes:
    """Return a schedule as a line of text. The rest of a longer, earlier line may follow it."""
    return _encode([SCHEDULE_VERSION, boot_id(), vars(schedule)]).encode() + b"\n"


def load(text: bytes, now: float) -> Schedule:
    """Return the schedule in a text.

    If the text is damaged, foreign, or of an earlier boot, the schedule is a new one, in which the
    first request waits for an interval, because another one may just have been sent.
    """
    schedule = Schedule()
    if not text:
        return schedule
    try:
        version, boot, state = json.loads(text[: text.index(b"\n")].decode())
        if (version, boot) != (SCHEDULE_VERSION, boot_id()):
            raise ValueError
        for name in ("last", "interval", "surplus", "gap", "paused_until"):
            setattr(schedule, name, _number(state[name]))
        schedule.spaced = _table(state["spaced"], 2)
        schedule.waiting = _table(state["waiting"], 4)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        schedule = Schedule()
        schedule.last = now
    return schedule


def _number(value: Any) -> float:
    if math.isnan(number := float(value)):
        raise ValueError
    return number


def _table(value: Any, columns: int) -> dict[str, list[float]]:
    table = {str(name): [_number(item) for item in row] for name, row in value.items()}
    if any(len(row) != columns for row in table.values()):
        raise ValueError
    return table


def remove_unused(folder: Path) -> None:
    """Remove the files of keys that nobody has used for a day."""
    before = time.time() - UNUSED_AFTER
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{LIMIT_PREFIX}*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < before:
                    path.unlink()
