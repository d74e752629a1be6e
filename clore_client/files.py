"""Lock files, and read and write small files that only this user may see."""

from __future__ import annotations

import contextlib
import json
import os
import random
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK_AT = 1 << 30  # the locked byte on Windows, far from the content, which stays readable
# With O_NONBLOCK, a pipe in the place of the file is an error, and not a wait without an end.
SAFE_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
SAFE_FLAGS |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
FIRST_LOCK_PAUSE, LONGEST_LOCK_PAUSE = 0.0002, 0.01  # seconds between two tries to lock a file
LONGEST_STATE_FILE = 1_000_000  # bytes; a longer file is not ours


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
            os.lseek(handle, 0, os.SEEK_SET)
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
        return os.open(path, SAFE_FLAGS | os.O_RDWR), False
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, SAFE_FLAGS | os.O_RDWR | os.O_CREAT, 0o600), True


@contextlib.contextmanager
def locked_path(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock file beside ``path``, so that no other process changes it.

    Raises:
        OSError: another process holds it, or it can't be created.
    """
    handle, _ = open_private(Path(f"{path}.lock"))
    try:
        if not lock_file(handle, patience):
            raise OSError(f"{path}.lock is held by another process")
        yield
    finally:
        os.close(handle)


def replace_file(path: Path, text: str) -> None:
    """Replace a file in one step by one with this text, which only this user may read."""
    new = path.with_name(f"{path.name}.{random.SystemRandom().getrandbits(48):012x}")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(new, flags, 0o600)
    try:
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def make_private_folder(folder: Path) -> None:
    """Create a folder that only this user may enter, or close an existing one to the others.

    Raises:
        OSError: it can't be created, is no folder, or belongs to somebody else.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = os.lstat(folder)
    if not stat.S_ISDIR(about.st_mode):
        raise OSError("it is no folder")
    if os.name == "nt":
        return
    if about.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if about.st_mode & 0o077:
        folder.chmod(0o700)


def read_state_file(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file of this user.

    Raises:
        OSError, ValueError, RecursionError: the file can't be read, or is not one of ours.
    """
    handle = os.open(path, SAFE_FLAGS | os.O_RDONLY)
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LONGEST_STATE_FILE:
            raise ValueError("it is not a small regular file")
        if os.name != "nt" and about.st_uid != os.geteuid():
            raise ValueError("it belongs to another user")
        data = json.loads(os.read(handle, LONGEST_STATE_FILE + 1))
    finally:
        os.close(handle)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data
