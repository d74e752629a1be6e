"""Lock files, to exclude other processes, and open private ones."""

from __future__ import annotations

import os
import time
from pathlib import Path

LOCK_AT = 1 << 30  # the locked byte on Windows, far from the content, which stays readable
# With O_NONBLOCK, a pipe in the place of the file is an error, and not a wait without an end.
PRIVATE_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
PRIVATE_FLAGS |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
FIRST_LOCK_PAUSE, LONGEST_LOCK_PAUSE = 0.0002, 0.01  # seconds between two tries to lock a file


def lock_file(handle: int, patience: float = 0.0) -> bool:
    """Lock an open file until it is unlocked or closed, and return whether that worked.

    Parameters:
        handle: a file that is open for writing, as some systems require.
        patience: seconds to wait for another process that has locked it.

    Raises:
        OSError: the file system does not support locks.
    """
    deadline = time.monotonic() + patience
    pause = FIRST_LOCK_PAUSE
    while not _try_to_lock(handle):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_LOCK_PAUSE)
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


def unlock_file(handle: int) -> None:
    """Unlock a file that :func:`lock_file` locked."""
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, LOCK_AT, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)


def open_private(path: Path) -> tuple[int, bool]:
    """Open a file for reading and writing, and return its descriptor and whether it is new.

    The file and its folder are created if they are missing, for this user only.

    Raises:
        OSError: that is not possible, or it is a symlink.
    """
    try:
        return os.open(path, PRIVATE_FLAGS), False
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, PRIVATE_FLAGS | os.O_CREAT, 0o600), True
