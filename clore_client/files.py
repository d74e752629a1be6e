"""Lock files, to exclude other processes."""

from __future__ import annotations

import os
import time

LOCK_AT = 1 << 30  # the locked byte on Windows, far from the content, which stays readable


def lock_file(handle: int, patience: float = 0.0) -> bool:
    """Lock an open file until it is closed, and return whether that worked.

    Parameters:
        handle: a file that is open for writing, as some systems require.
        patience: seconds to wait for another process that has locked it.

    Raises:
        OSError: the file system does not support locks.
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
