"""The receiving end of scp, which believes nothing that the host says."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import secrets
import stat
from collections.abc import Callable
from typing import Any

from clore_client.errors import printable
from clore_client.ssh.scp_wire import SCP_CHUNK, ScpError, ScpWire, local_faults, words_of_host

MOST_RECORDS = 1_000_000  # files and folders of one transfer
DEEPEST_FOLDER = 64
LATEST_TIME = 253_402_300_799  # the end of the year 9999
NAMELESS = (b"", b".", b"..")  # how scp calls /, . and .. when they are asked for
# Without them no shell makes another name of a name than it is, whatever it is quoted with.
PLAIN_ASKED = re.compile(rb"[\w@%+=:,./~\-\x80-\xff]+")
GLOB_ASKED = re.compile(rb"[\w@%+=:,./~\-\x80-\xff*?\[\]!^]+")
FILE_RECORD = re.compile(rb"([0-7]{3,7}) (\d{1,18}) (.*)", re.DOTALL)
TIME_RECORD = re.compile(rb"(\d{1,12}) \d{1,9} (\d{1,12}) \d{1,9}")
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
FOLDER_FDS = os.name != "nt" and os.open in os.supports_dir_fd

ScpProgress = Callable[[bytes, int, int], Any]


class AskedNames:
    """The names that may come: those of the paths that were asked for, each once.

    Raises:
        ValueError: what a path stands for is up to the host's shell.
    """

    def __init__(self, paths: list[bytes], *, quoted: bool) -> None:
        self._exact: list[set[bytes]] = []
        self._patterns: dict[str, bool] = {}  # whether something came for it
        for path in paths:
            trimmed = path.rstrip(b"/")
            base = trimmed.rpartition(b"/")[2]
            if trimmed.startswith(b"~") and base == trimmed:
                self._patterns["*"] = False  # a home, whose name the host alone knows
            elif quoted or PLAIN_ASKED.fullmatch(base) or base in NAMELESS:
                self._exact.append(_as_sent(base))
            elif GLOB_ASKED.fullmatch(base):
                self._patterns[os.fsdecode(base.replace(b"[^", b"[!"))] = False
            else:
                raise ValueError(
                    f"remote_path: which names {printable(repr(path), 200)} stands for can't be "
                    "told here: of a shell's signs only * ? [ ] are known, in the last part"
                )

    def take(self, raw: bytes) -> bool:
        """Note that this name has come; returns whether it was asked for letter by letter."""
        for spellings in self._exact:
            if raw in spellings:
                self._exact.remove(spellings)
                return True
        name = os.fsdecode(raw)
        for pattern in self._patterns:
            hidden = name.startswith(".") and not pattern.startswith(".")
            if not hidden and fnmatch.fnmatchcase(name, pattern):
                self._patterns[pattern] = True
                return False
        raise ScpError(f"the host sent {_quoted(raw)}, which was not asked for")

    def missing(self) -> str | None:
        """Something that was asked for and has not come."""
        for spellings in self._exact:
            return _quoted(min(spellings))
        return next(
            (_quoted(os.fsencode(p)) for p, came in self._patterns.items() if not came), None
        )


def _as_sent(base: bytes) -> set[bytes]:
    """How scp may spell a name: a line break has no place in its records."""
    if b"\n" not in base:
        return {base}
    return {base.replace(b"\n", b"\\^J"), base.replace(b"\\", b"\\\\").replace(b"\n", b"\\^J")}


def _quoted(raw: bytes) -> str:
    return printable(repr(os.fsdecode(raw)), 200)


def plain_name(raw: bytes, *, controls: bool = False) -> str:
    """A name from the host, when it is a single part of a path, and fit to be shown."""
    refused = raw in NAMELESS or b"/" in raw or b"\0" in raw or b"\n" in raw or len(raw) > 255
    try:
        name = os.fsdecode(raw)
    except UnicodeDecodeError:
        name, refused = "", True
    # A listing of such a name would talk to the terminal.
    if not controls:
        refused = refused or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
    if os.name == "nt":
        refused = refused or any(c in name for c in '\\:*?"<>|') or name.endswith((".", " "))
        refused = refused or WINDOWS_DEVICE.fullmatch(name) is not None
    if refused:
        raise ScpError(f"the host sent {_quoted(raw)}, which is no plain name")
    return name


class LocalFolder:
    """A folder here, held open where the system can, so that it stays the one that was checked."""

    def __init__(self, path: str, parent: LocalFolder | None = None) -> None:
        self.path = path
        self.fd: int | None = None
        if FOLDER_FDS:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            if parent is None:
                self.fd = os.open(path, flags)
            else:
                name = os.path.basename(path)
                self.fd = os.open(name, flags | os.O_NOFOLLOW, dir_fd=parent.fd)

    def at(self, name: str) -> str:
        """What to call an entry in a call that also gets ``dir_fd=self.fd``."""
        return os.path.join(self.path, name) if self.fd is None else name

    def look(self, name: str) -> os.stat_result | None:
        """What stands there, a symlink as itself."""
        try:
            return os.stat(self.at(name), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def create(self, name: str, mode: int) -> int:
        """A new file to write; the umask holds."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for more in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, more, 0)
        return os.open(self.at(name), flags, mode, dir_fd=self.fd)

    def enter(self, name: str, mode: int) -> tuple[LocalFolder, bool]:
        """A folder in it, and whether it was made now."""
        found = self.look(name)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise ScpError(f"a {_kind(found)} stands here already, not a folder")
        if found is None:
            os.mkdir(self.at(name), mode | 0o700, dir_fd=self.fd)
        return LocalFolder(os.path.join(self.path, name), self), found is None

    def replace(self, name: str, by: str) -> None:
        os.replace(self.at(by), self.at(name), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.at(name), dir_fd=self.fd)

    def remove_empty(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(self.at(name), dir_fd=self.fd)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _kind(found: os.stat_result) -> str:
    kinds = {stat.S_IFLNK: "symlink", stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
    return kinds.get(stat.S_IFMT(found.st_mode), "special file")


class _Level:
    """A folder that the host has entered and not left yet."""

    def __init__(self, folder: LocalFolder, name: str, *, shown: str, made: bool = False) -> None:
        self.folder = folder
        self.name = name  # "" for the target, which is the caller's: its permissions stay
        self.shown = shown
        self.made = made
        self.mode = 0o700
        self.times: tuple[int, int] | None = None


class ScpReceiver:
    """Takes files and folders from a host.

    Args:
        target: the folder that all goes into; or, with ``as_name``, that holds what comes.
        as_name: what the one file or folder that comes is called here.
        most: bytes of all files together.

    Attributes:
        name, done, total: of the file that is or was in work.
    """

    def __init__(
        self,
        wire: ScpWire,
        asked: AskedNames,
        target: LocalFolder,
        *,
        as_name: str = "",
        recursive: bool = False,
        keep: bool = False,
        most: int | None = None,
        progress: ScpProgress | None = None,
    ) -> None:
        self.name = ""
        self.done = 0
        self.total: int | None = None
        self._wire = wire
        self._asked = asked
        self._as_name = as_name
        self._recursive = recursive
        self._keep = keep
        self._left = most
        self._most = most
        self._progress = progress
        self._times: tuple[int, int] | None = None
        self._records = 0
        self._tops = 0
        self._levels = [_Level(target, "", shown="")]

    def run(self) -> None:
        """Receive until the host has no more; raises :class:`ScpError`."""
        try:
            self._wire.send(b"\0")
            while (line := self._wire.line()) is not None:
                self._record(line)
                self._wire.send(b"\0")
            if len(self._levels) > 1:
                raise ScpError(f"a folder has no end; {self._wire.how_it_ended()}")
            self._wire.finish()
            if missing := self._asked.missing():
                raise ScpError(f"{missing} has not come")
        finally:
            self._leave_all()

    def _record(self, line: bytes) -> None:
        kind, rest = line[:1], line[1:]
        if self._times is not None and kind not in (b"C", b"D", b"\1", b"\2"):
            raise ScpError("the host sent a time for nothing")
        if kind == b"C":
            self._file(rest)
        elif kind == b"D":
            self._enter(rest)
        elif kind == b"E" and not rest:
            self._leave()
        elif kind == b"T":
            self._time(rest)
        elif kind in (b"\1", b"\2"):
            raise ScpError(f"the host says: {words_of_host(rest)}")
        else:
            raise ScpError(f"this is no record of scp: {words_of_host(line)!r}")

    def _time(self, rest: bytes) -> None:
        match = TIME_RECORD.fullmatch(rest)
        if match is None or max(int(match[1]), int(match[2])) > LATEST_TIME:
            raise ScpError(f"the host sent a time that is none: {words_of_host(rest)!r}")
        self._times = (int(match[2]), int(match[1]))

    def _announced(self, rest: bytes) -> tuple[int, int, bytes]:
        """Permissions, size and name of a record, each within its limits."""
        match = FILE_RECORD.fullmatch(rest)
        if match is None:
            raise ScpError(f"this is no record of scp: {words_of_host(rest)!r}")
        self._records += 1
        if self._records > MOST_RECORDS:
            raise ScpError(f"the host sent more than {MOST_RECORDS} files and folders")
        # The bits above say as whom it runs, which is not for the host to say.
        return int(match[1], 8) & 0o777, int(match[2]), match[3]

    def _local_name(self, raw: bytes) -> str:
        """What to call it here; "" for the target itself."""
        level = self._levels[-1]
        if len(self._levels) > 1:
            name = plain_name(raw)
            self.name = f"{level.shown}/{printable(name, 200)}".lstrip("/")
            return name
        exact = self._asked.take(raw)
        name = "" if exact and raw in NAMELESS else plain_name(raw, controls=exact)
        self.name = printable(name, 200)
        self._tops += 1
        if self._as_name and self._tops > 1:
            raise ScpError("the host sent several files, and the target is no folder")
        return self._as_name or name

    def _file(self, rest: bytes) -> None:
        mode, size, raw = self._announced(rest)
        self.done, self.total = 0, size
        name = self._local_name(raw)
        folder = self._levels[-1].folder
        if not name:
            raise ScpError("the host sent a file, where a folder was asked for")
        if self._left is not None and size > self._left:
            raise ScpError(f"{size} bytes are announced, and max_bytes is {self._most} for all")
        with local_faults():
            found = folder.look(name)
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise ScpError(f"a {_kind(found)} stands here already, and nothing is written to it")
        temporary = f".scp-{secrets.token_hex(8)}.part"
        with local_faults():
            file = os.fdopen(folder.create(temporary, mode), "wb", buffering=0)
        try:
            self._wire.send(b"\0")
            self._fill(file, os.fsencode(os.path.join(folder.path, name)), size)
            self._wire.confirm()
            with local_faults():
                self._dress(file.fileno(), folder, temporary, mode, self._times)
                file.close()
                folder.replace(name, temporary)
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            folder.remove(temporary)
            raise
        self._times = None
        if self._left is not None:
            self._left -= size

    def _fill(self, file: Any, path: bytes, size: int) -> None:
        if self._progress is not None:
            self._progress(path, size or 1, 0 if size else 1)  # who divides must not fall
        while self.done < size:
            data = self._wire.some(min(SCP_CHUNK, size - self.done))
            if not data:
                raise ScpError(self._wire.how_it_ended())
            with local_faults():
                rest = memoryview(data)
                while rest:  # without a buffer, a write may take a part
                    rest = rest[file.write(rest) :]
            self.done += len(data)
            if self._progress is not None:
                self._progress(path, size, self.done)

    def _enter(self, rest: bytes) -> None:
        mode, _, raw = self._announced(rest)
        if not self._recursive:
            raise ScpError(f"the host sent a folder, {_quoted(raw)}, where a file was asked for")
        if len(self._levels) > DEEPEST_FOLDER:
            raise ScpError(f"the host sent folders more than {DEEPEST_FOLDER} deep")
        self.done, self.total = 0, None
        name = self._local_name(raw)
        parent = self._levels[-1].folder
        with local_faults():
            folder, made = parent.enter(name, mode) if name else (LocalFolder(parent.path), False)
        level = _Level(folder, name, shown=self.name, made=made)
        level.mode, level.times, self._times = mode, self._times, None
        self._levels.append(level)

    def _leave(self) -> None:
        if len(self._levels) == 1:
            raise ScpError("the host left a folder that it had not entered")
        level = self._levels.pop()
        try:
            if level.name:
                parent = self._levels[-1].folder
                fd = level.folder.fd
                with local_faults():
                    self._dress(fd, parent, level.name, level.mode | 0o700, level.times)
        finally:
            level.folder.close()

    def _dress(self, fd: int | None, inside: LocalFolder, name: str, mode: int, times: Any) -> None:
        """Give a file or folder its permissions and times, where the caller wants that."""
        if not self._keep:
            return
        if FOLDER_FDS and fd is not None:
            os.fchmod(fd, mode)
        if times is not None:
            os.utime(fd if FOLDER_FDS and fd is not None else inside.at(name), times)

    def _leave_all(self) -> None:
        """Close what is open, and take away the folders that were made for nothing."""
        while self._levels:
            level = self._levels.pop()
            level.folder.close()
            if level.made and self._levels:
                self._levels[-1].folder.remove_empty(level.name)
