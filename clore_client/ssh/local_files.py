"""Files that a download makes here: beside their place until they are complete."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.files import lock_file
from clore_client.log import logger
from clore_client.ssh.remote import checked_name
from clore_client.ssh.transfer import Item


class DoneRecord:
    """What a download that may be resumed has done so far; held under a lock."""

    def __init__(self, part: Path) -> None:
        self._part = part
        self._path = Path(f"{part}.done")
        self.done: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> DoneRecord:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self._file = os.fdopen(os.open(self._path, flags, 0o600), "r+", encoding="latin-1")
        if not (lock_file(self._file.fileno()) and self._is_there()):
            self._file.close()
            raise SSHError("another process is at the same transfer")
        self.done = set(self._file.read().split())
        return self

    def __exit__(self, *_: object) -> None:
        if not os.path.lexists(self._part):
            self._path.unlink(missing_ok=True)  # there is nothing to go on from
        self._file.close()

    def _is_there(self) -> bool:
        """Whether the file is still the one of that name: another process removes it in the end."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def add(self, key: str) -> None:
        with self._lock:
            self._file.write(f"{key}\n")
            self._file.flush()

    def clear(self) -> None:
        self.done = set()
        self._file.seek(0)
        self._file.truncate()


def merge_into(part: Path, target: str, items: list[Item], preserve: bool) -> None:
    """Move a tree over one that exists; a symlink in there is never written through."""
    for item in items:  # all is looked at before the first is moved
        place = os.path.join(target, checked_name(item.name))
        if os.path.islink(place) and item.folder:
            raise SSHError(f"local holds a symlink in the place of {printable(item.shown, 300)}")
        if os.path.lexists(place) and os.path.isdir(place) != item.folder:
            raise SSHError(
                f"local holds something else in the place of {printable(item.shown, 300)}"
            )
    for item in items:
        name = checked_name(item.name)
        place = os.path.join(target, name)
        if item.folder:
            if not os.path.isdir(place):
                os.mkdir(place)
        else:
            os.replace(part / name, place)
    for item in [i for i in items[::-1] if i.folder and preserve]:
        place = os.path.join(target, checked_name(item.name))
        os.chmod(place, item.mode)
        os.utime(place, ns=(item.mtime, item.mtime))
    shutil.rmtree(part)


def new_file(path: Path, mode: int, again: bool = False) -> Any:
    """A file of our own; with ``again`` it may be there already."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    flags |= 0 if again else os.O_EXCL
    permissions = 0o777 if mode & 0o111 else 0o666  # less the umask
    return os.fdopen(os.open(path, flags, permissions), "r+b", buffering=0)


def write_all(file: Any, piece: bytes) -> None:
    """All of it: the last that fits on a full disk is written in part, and no error."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def remove_part(part: Path) -> None:
    try:
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("a temporary file stays: %s", error)
