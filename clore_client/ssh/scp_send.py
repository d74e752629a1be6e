"""The sending end of scp, which leaves out what does not belong to the folder that was named."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from typing import IO, Any

from clore_client.errors import printable
from clore_client.log import logger
from clore_client.ssh.scp_wire import SCP_CHUNK, ScpError, ScpWire, local_faults

ASKED_MODE = re.compile(r"[0-7]{3,4}")


class ScpSender:
    """Gives files and folders to a host.

    Attributes:
        name, done, total: of the file that is or was in work.
    """

    def __init__(
        self,
        wire: ScpWire,
        *,
        recursive: bool = False,
        keep: bool = False,
        progress: Callable[[bytes, int, int], Any] | None = None,
    ) -> None:
        self.name = ""
        self.done = 0
        self.total: int | None = None
        self._wire = wire
        self._recursive = recursive
        self._keep = keep
        self._progress = progress

    def run(self, paths: list[str]) -> None:
        """Send them all; raises :class:`ScpError`."""
        self._wire.confirm()
        for path in paths:
            self.name = printable(path, 200)
            with local_faults():
                info = os.stat(path)
            if not stat.S_ISDIR(info.st_mode):
                self._file(path, os.path.basename(path))
                continue
            if not self._recursive:
                raise ScpError("this is a folder, and recursive is not set")
            # As scp.py has it: with a slash at the end, what is in the folder, without itself.
            name = os.path.basename(path)
            self._folder(path, "" if name in (".", "..") else name, os.path.realpath(path))
        self._wire.finish()

    def run_object(self, source: IO[Any], name: str, mode: str, size: int) -> None:
        """Send what a file-like object gives."""
        self.name = printable(name, 200)
        self._wire.confirm()
        self._content(source.read, os.fsencode(name), int(mode, 8), size)
        self._end_of_content()
        self._wire.finish()

    def _folder(self, path: str, name: str, root: str) -> None:
        if name:
            with local_faults():
                info = os.stat(path)
            self._tell_times(info)
            self._say(f"D{stat.S_IMODE(info.st_mode):04o} 0 ".encode(), os.fsencode(name))
        with local_faults(), os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            self.name = printable(entry.path, 200)
            with local_faults():
                if entry.is_dir(follow_symlinks=False):
                    kind = "folder"
                elif entry.is_symlink():
                    kind = _behind(entry.path, root)
                else:
                    kind = "file" if entry.is_file() else "it is a special file"
            if kind == "folder":
                self._folder(entry.path, entry.name, root)
            elif kind == "file":
                self._file(entry.path, entry.name)
            else:
                logger.warning("%s is not sent: %s", self.name, kind)
        if name:
            self._wire.send(b"E\n")
            self._wire.confirm()

    def _file(self, path: str, name: str) -> None:
        self.name, self.done, self.total = printable(path, 200), 0, None
        with local_faults():
            # A pipe in the place of a file must not hold us up.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            file = os.fdopen(os.open(path, flags), "rb", buffering=0)
        with file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise ScpError("this is neither a file nor a folder")
            self._tell_times(info)
            mode = stat.S_IMODE(info.st_mode)
            self._content(file.read, os.fsencode(name), mode, info.st_size)
            with local_faults():
                if file.read(1):
                    raise ScpError(f"it grew beyond its {info.st_size} bytes while it was sent")
        self._end_of_content()

    def _content(self, read: Callable[[int], Any], name: bytes, mode: int, size: int) -> None:
        """Send a file's record and exactly ``size`` bytes."""
        self.done, self.total = 0, size
        self._say(f"C{mode:04o} {size} ".encode(), name)
        if self._progress is not None:
            self._progress(name, size or 1, 0 if size else 1)  # who divides must not fall
        while self.done < size:
            with local_faults():
                data = read(min(SCP_CHUNK, size - self.done))
            data = data.encode() if isinstance(data, str) else data
            if not data:
                raise ScpError(f"it ended before its {size} bytes")
            if len(data) > size - self.done:
                raise ScpError(f"it gave more than its {size} bytes")
            self._wire.send(memoryview(data))
            self.done += len(data)
            if self._progress is not None:
                self._progress(name, size, self.done)

    def _end_of_content(self) -> None:
        self._wire.send(b"\0")
        self._wire.confirm()

    def _tell_times(self, info: os.stat_result) -> None:
        if self._keep:
            times = max(0, int(info.st_mtime)), max(0, int(info.st_atime))
            self._wire.send(b"T%d 0 %d 0\n" % times)
            self._wire.confirm()

    def _say(self, record: bytes, name: bytes) -> None:
        # A line break has no place in a record; OpenSSH writes it so.
        self._wire.send(record + name.replace(b"\n", b"\\^J") + b"\n")
        self._wire.confirm()


def _behind(path: str, root: str) -> str:
    """``"file"`` for a symlink to one within ``root``, or why it is left out."""
    target = os.path.realpath(path)
    if not os.path.lexists(target):
        return "it is a symlink to nothing"
    if os.path.commonpath([target, root]) != root:
        return "it is a symlink that leads out of the folder"
    return "file" if os.path.isfile(target) else "it is a symlink to a folder"
