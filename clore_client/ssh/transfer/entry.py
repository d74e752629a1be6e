"""Describe the files, directories and symlinks of a transfer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from clore_client.errors import SSHError, printable

BLOCK = 65536  # bytes; chunks begin at multiples of it
TRANSFER_PIECE = 256 * 1024  # bytes to read or write at a time
LAST_TIME = 253_402_300_799  # the end of the year 9999, in seconds; later times fail on some disks
MAX_LEVELS = 256  # nested directories; Python can't remove a tree that is much deeper
CHANGED = "it changed during the transfer"


class FileEntry:
    """A file, directory or symlink of a transfer.

    Attributes:
        name: relative to the directory that is transferred; empty for a single file.
        kind: ``"f"``, ``"d"`` or ``"l"``.
        size: in bytes; 0 unless it is a file.
        mtime: in nanoseconds.
        mode: permissions.
        link: the target of a symlink.
    """

    __slots__ = ("kind", "link", "mode", "mtime", "name", "size")

    def __init__(
        self, name: bytes, size: int, mtime: int, mode: int, kind: str = "f", link: bytes = b""
    ) -> None:
        self.name = name
        self.kind = kind
        self.size = size if kind == "f" else 0
        self.mtime = mtime
        self.mode = mode
        self.link = link

    @property
    def version(self) -> tuple[bytes, int, int]:
        """Values that differ when the source has changed."""
        return (self.name, self.size, self.mtime)


def record_key(version: object) -> str:
    """Return the key under which a resumable transfer records a version of a source."""
    return hashlib.sha256(repr(version).encode()).hexdigest()[:32]


def link_target(name: bytes, link: bytes) -> bytes | None:
    """Return the name in the same tree that a symlink leads to, or None outside the tree."""
    if link.startswith(b"/") or not link:
        return None
    parts = name.split(b"/")[:-1]
    for part in link.split(b"/"):
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def checked_name(name: bytes) -> str:
    """Check a name that a host sent, and return it as a path on this system."""
    parts = name.split(b"/")
    if b"\0" in name or not {b"", b".", b".."}.isdisjoint(parts):
        raise SSHError(f"the machine names a file that can't be one: {printable(repr(name), 120)}")
    if len(parts) > MAX_LEVELS:
        raise SSHError(f"the machine names a file below {len(parts)} directories")
    text = os.fsdecode(name)
    if os.name == "nt" and any(sign in text for sign in '\\:*?"<>|'):
        raise SSHError(f"Windows can't name a file {printable(repr(text), 120)}")
    return text


def kind_of(mode: int) -> str:
    """Return "f", "d" or "l" for the mode of a file; empty for anything else."""
    kinds = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l"}
    return kinds.get(stat.S_IFMT(mode), "")


def whole_seconds(mtime: int) -> int:
    """Return a time in nanoseconds as the seconds that a transfer keeps."""
    return min(max(mtime // 10**9, 0), LAST_TIME)


def nanoseconds(seconds: int) -> int:
    """Convert a time of a host to nanoseconds, limited to what file systems know."""
    return min(max(seconds, 0), LAST_TIME) * 10**9


def parse_stat(line: bytes) -> FileEntry:
    """Read size, seconds and permissions of a file."""
    found = re.fullmatch(rb"([0-9]{1,18}) (-?[0-9]{1,18}) ([0-7]{1,5})", line)
    if found is None:
        raise SSHError("the machine sent a file status that can't be read")
    size, seconds, mode = found.groups()
    return FileEntry(b"", int(size), nanoseconds(int(seconds)), int(mode, 8) & 0o777)


def check_unchanged(entry: FileEntry, now: FileEntry | None) -> None:
    """Check that a file is the same as before, or has grown: its start has arrived then."""
    if now is None or now.kind != "f" or now.size < entry.size:
        raise SSHError(CHANGED)
    if now.size == entry.size and now.mtime != entry.mtime:
        raise SSHError(CHANGED)


def file_digest(path: str | Path, start: int, length: int) -> str:
    """Return the SHA-256 of a part of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(TRANSFER_PIECE, length))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def about(entry: FileEntry) -> Iterator[None]:
    """Note in an error which file it is about."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "entry"):
            with contextlib.suppress(AttributeError):
                error.entry = entry  # type: ignore[attr-defined]
        raise
