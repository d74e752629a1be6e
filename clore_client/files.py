"""Lock files between processes, and keep private ones in the state folder."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

LOCK_AT = 1 << 30  # where Windows locks: what is locked there can't be read


def lock_file(handle: int, patience: float = 0.0) -> bool:
    """Lock an open file until it is closed or unlocked; return whether that worked.

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


def unlock_file(handle: int) -> None:
    """Unlock a file that :func:`lock_file` has locked."""
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, LOCK_AT, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)


def open_private(path: Path) -> int:
    """Open a small file of this user's for reading and writing, and make it where it is missing.

    Raises:
        OSError: that is not possible, or it is no regular file of this user.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags, 0o600)
    about = os.fstat(handle)
    foreign = hasattr(os, "geteuid") and about.st_uid != os.geteuid()
    if foreign or not stat.S_ISREG(about.st_mode):
        os.close(handle)
        raise PermissionError(f"{path} is not a file of this user")
    return handle
