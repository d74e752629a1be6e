"""Locks between processes, by files."""

from __future__ import annotations

import os
import time

LOCK_AT = 1 << 30  # where Windows locks: what is locked there can't be read


def lock_file(handle: int, patience: float = 0.0) -> bool:
    """Lock an open file until it is closed; return whether that worked.

    Parameters:
        handle: of a file that is open for writing: some systems lock no other.
        patience: seconds to wait for another process that holds it.

    Raises:
        OSError: files can't be locked here.
    """
    deadline = time.monotonic() + patience
    while not _try_to_lock(handle):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def _try_to_lock(handle: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, LOCK_AT, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
