"""Describe the files, directories and symlinks of a transfer, and pack them in tar streams."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, printable

BLOCK = 65536  # bytes; chunks begin at multiples of it
TRANSFER_PIECE = 256 * 1024  # bytes to read or write at a time
LAST_TIME = 253_402_300_799  # the end of the year 9999, in seconds; later times fail on some disks
MAX_LEVELS = 256  # nested directories; Python can't remove a tree that is much deeper
Excludes = Callable[[bytes, bool], bool]  # of a name, and whether it is a directory
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


def link_target(name: bytes, link: bytes, folders: Container[bytes] | None = None) -> bytes | None:
    """Return the name in the same tree that a symlink leads to, or None outside the tree.

    With ``folders``, the names of all directories, ``..`` after anything else counts as outside:
    after another symlink it leads elsewhere than the text says.
    """
    if link.startswith(b"/") or not link:
        return None
    parts = name.split(b"/")[:-1]
    for part in link.split(b"/"):
        if part == b"..":
            if not parts or (folders is not None and b"/".join(parts) not in folders):
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


TAR_BLOCK = 512  # bytes
MAX_TAR_EXTRA = 65536  # bytes of a name


def tar_header(entry: FileEntry) -> bytes:
    """Return the header of an entry in a tar stream, without a user's name or number."""
    import tarfile  # imported here, because it is slow

    info = tarfile.TarInfo("./" + os.fsdecode(entry.name))
    # A directory must be writable until its files have arrived.
    info.mode = entry.mode | 0o700 if entry.kind == "d" else entry.mode
    info.size, info.mtime = entry.size, entry.mtime // 10**9
    kinds = {"d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "f": tarfile.REGTYPE}
    info.type, info.linkname = kinds[entry.kind], os.fsdecode(entry.link)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


class TarReader:
    """Read the members of consecutive tar archives, up to a block with a mark.

    Parameters:
        running: the :class:`RemoteScript` that sends them.
    """

    def __init__(self, running: Any, mark: bytes) -> None:
        self._running = running
        self._mark = mark
        self._padding = 0

    def next(self) -> Any:
        """Return the next member, or None at the mark."""
        import tarfile

        self._exactly(self._padding)
        self._padding = 0
        name = link = ""
        while True:
            header = self._exactly(TAR_BLOCK)
            if header.rstrip(b" \n") == self._mark:
                return None
            if not header.strip(b"\0"):
                continue
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                raise SSHError("the machine sends no valid tar archive") from error
            if info.size < 0:
                raise SSHError("the machine sends a negative size")
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE):
                if info.size > MAX_TAR_EXTRA:
                    raise SSHError("the machine sends a name that is too long")
                extra = self._exactly(info.size + -info.size % TAR_BLOCK)[: info.size]
                name, link = _extended(info.type, extra, name, link)
                continue
            info.name, info.linkname = name or info.name, link or info.linkname
            if not info.isreg():
                info.size = 0
            self._padding = -info.size % TAR_BLOCK
            return info

    def content(self, size: int) -> Iterator[bytes]:
        """Yield the bytes of a member."""
        while size:
            piece = self._running.read(min(TRANSFER_PIECE, size))
            if not piece:
                raise SSHError(f"{size} bytes are missing: {self._running.refused()}")
            size -= len(piece)
            yield piece

    def _exactly(self, size: int) -> bytes:
        piece = self._running.read(size) if size else b""
        return piece if len(piece) == size else piece + b"".join(self.content(size - len(piece)))


def _extended(kind: bytes, extra: bytes, name: str, link: str) -> tuple[str, str]:
    """Read a name or a link target that does not fit in a header."""
    if kind == b"x":  # POSIX: records of a length, a keyword and a value
        found = dict(re.findall(rb"\d+ (path|linkpath)=(.*)\n", extra))
        return os.fsdecode(found.get(b"path", b"")) or name, os.fsdecode(
            found.get(b"linkpath", b"")
        ) or link
    text = os.fsdecode(extra.rstrip(b"\0"))
    return (text, link) if kind == b"L" else (name, text)


CHUNK = 64 * BLOCK  # bytes; of an upload that may be resumed, chunks are smaller at the start
BUNDLE_BYTES = 8 * 1024 * 1024
BUNDLE_FILES = 1000
SMALL_FILE = 4 * 1024 * 1024  # bytes; smaller files of a directory are sent as tar archives


class LocalTree:
    """The files, directories and symlinks to upload, and what is left out.

    Attributes:
        mode, mtime: of ``path`` itself; ``mtime`` in nanoseconds.
    """

    def __init__(self, path: bytes, symlinks: str, excluded: Excludes | None = None) -> None:
        self.path = path
        self.symlinks = symlinks
        self._excluded = excluded
        self.entries: list[FileEntry] = []
        self.left_out: list[tuple[bytes, str]] = []
        try:
            facts = os.stat(path)  # the path itself may be a symlink
        except FileNotFoundError:
            shown = printable(repr(os.fsdecode(path)), 300)
            raise FileNotFoundError(f"local: there is nothing at {shown}") from None
        self.is_folder = stat.S_ISDIR(facts.st_mode)
        self.mode, self.mtime = facts.st_mode & 0o777, facts.st_mtime_ns
        if self.is_folder:
            self._scan(b"", (os.path.realpath(path),))
        elif stat.S_ISREG(facts.st_mode):
            self._add(b"", facts)
        else:
            raise ValueError(f"local is neither a file nor a directory: {os.fsdecode(path)!r}")

    @property
    def files(self) -> list[FileEntry]:
        return [entry for entry in self.entries if entry.kind == "f"]

    def place(self, entry: FileEntry) -> str:
        """Return the local path of an entry."""
        return os.fsdecode(os.path.join(self.path, entry.name) if entry.name else self.path)

    def pieces(self, entry: FileEntry, start: int, length: int) -> Iterator[memoryview]:
        """Yield a part of a file, which must not have changed since the scan.

        Each piece is overwritten by the next one.
        """
        buffer = memoryview(bytearray(min(TRANSFER_PIECE, max(length, 1))))
        with open(self.place(entry), "rb", buffering=0) as file:
            file.seek(start)
            while length and (size := file.readinto(buffer[:length])):
                length -= size
                yield buffer[:size]
            facts = os.fstat(file.fileno())
            if length or (facts.st_size, facts.st_mtime_ns) != (entry.size, entry.mtime):
                raise SSHError(CHANGED)

    def _scan(self, folder: bytes, above: tuple[bytes, ...]) -> None:
        with os.scandir(os.path.join(self.path, folder) if folder else self.path) as found:
            entries = sorted(found, key=lambda e: e.name)
        for entry in entries:
            name = os.path.join(folder, entry.name) if folder else entry.name
            facts = entry.stat(follow_symlinks=False)
            if self._excluded is not None and self._excluded(name, stat.S_ISDIR(facts.st_mode)):
                continue
            if stat.S_ISLNK(facts.st_mode):
                self._take_link(name, entry.path, facts, above)
            elif stat.S_ISDIR(facts.st_mode):
                self._add(name, facts)
                self._scan(name, (*above, os.path.realpath(entry.path)))
            elif stat.S_ISREG(facts.st_mode):
                self._add(name, facts)
            else:
                self.left_out.append((name, "it is not a file"))

    def _take_link(
        self, name: bytes, path: bytes, facts: os.stat_result, above: tuple[bytes, ...]
    ) -> None:
        link, real = os.readlink(path), os.path.realpath(path)
        within = real.startswith(above[0].rstrip(b"/") + b"/") and os.path.exists(real)
        if self.symlinks == "copy" and within and link_target(name, link) is not None:
            self.entries.append(FileEntry(name, 0, facts.st_mtime_ns, 0o777, "l", link))
        elif self.symlinks == "follow" and within and os.path.isfile(real):
            self._add(name, os.stat(real))
        elif self.symlinks == "follow" and within and os.path.isdir(real) and real not in above:
            self._add(name, os.stat(real))
            self._scan(name, (*above, real))
        else:
            self.left_out.append((name, f"a symlink to {os.fsdecode(link)}"))

    def _add(self, name: bytes, facts: os.stat_result) -> None:
        if os.sep != "/":
            name = name.replace(os.fsencode(os.sep), b"/")
        kind = "d" if stat.S_ISDIR(facts.st_mode) else "f"
        mode = facts.st_mode & 0o777
        self.entries.append(FileEntry(name, facts.st_size, facts.st_mtime_ns, mode, kind))


class Portion:
    """A part of an upload that the host confirms: a chunk of a file, or a tar archive.

    Attributes:
        entries: the file, or the small files, directories and symlinks of the archive.
        start: of the chunk, in bytes; None for an archive.
        size: bytes to send.
    """

    __slots__ = ("entries", "size", "start")

    def __init__(self, entries: list[FileEntry], start: int | None = None, size: int = 0) -> None:
        self.entries = entries
        self.start = start
        self.size = size

    @property
    def key(self) -> str:
        """The key under which the host records it."""
        # The time of a directory changes with every file that is created in it.
        facts = [e.version if e.kind == "f" else (e.name, e.link) for e in self.entries]
        return record_key((facts, self.start, self.size))


def plan_portions(tree: LocalTree, resume: bool) -> list[Portion]:
    """Divide an upload into portions; if it may be resumed, they grow with what precedes them."""
    portions: list[Portion] = []
    bundle: Portion | None = None
    others = [entry for entry in tree.entries if entry.kind != "f"]
    files = sorted(tree.files, key=lambda entry: entry.size) if resume else tree.files
    before = 0
    for entry in [*others, *files]:
        if tree.is_folder and entry.size < (_portion_size(before) if resume else SMALL_FILE):
            most = _portion_size(before) if resume else BUNDLE_BYTES
            if bundle is None or bundle.size >= most or len(bundle.entries) >= BUNDLE_FILES:
                bundle = Portion([])
                portions.append(bundle)
            size = TAR_BLOCK + entry.size + -entry.size % TAR_BLOCK
            bundle.entries.append(entry)
            bundle.size += size
            before += size
            continue
        start = 0
        while start < entry.size:
            size = min(_portion_size(before) if resume else CHUNK, entry.size - start)
            portions.append(Portion([entry], start, size))
            start += size
            before += size
    return portions


def _portion_size(before: int) -> int:
    """Return the bytes of a portion of a resumable upload: a hundredth of what precedes it."""
    return min(max(before // (100 * BLOCK), 2) * BLOCK, CHUNK)
