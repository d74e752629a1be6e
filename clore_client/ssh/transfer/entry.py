"""Describe the files, directories and symlinks of a transfer, on both sides."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
import stat
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.validation import check_list, check_string

BLOCK = 65536  # bytes; chunks begin at multiples of it
TRANSFER_PIECE = 256 * 1024  # bytes to read or write at a time
LAST_TIME = 253_402_300_799  # the end of the year 9999, in seconds; later times fail on some disks
MAX_LEVELS = 256  # nested directories; Python can't remove a tree that is much deeper
MAX_FILES = 2_000_000  # of a directory on a host
Excludes = Callable[[bytes, bool], bool]  # of a name, and whether it is a directory
CHANGED = "it changed during the transfer"
TAR_BLOCK = 512  # bytes
CHUNK = 64 * BLOCK  # bytes; of an upload that may be resumed, chunks are smaller at the start
BUNDLE_FILES = 1000
SMALL_FILE = CHUNK  # bytes; smaller files of a directory are sent as tar archives


# Not a dataclass: that module is slow to import.
class FileEntry:
    """A file, directory or symlink of a transfer.

    Attributes:
        name: relative to the directory that is transferred; empty for a single file.
        kind: ``"f"``, ``"d"`` or ``"l"``; ``"other"`` on a host, of what can't be transferred.
        size: in bytes; 0 unless it is a file.
        mtime: in nanoseconds.
        mode: permissions.
        link: the target of a symlink.
    """

    __slots__ = ("kind", "link", "mode", "mtime", "name", "size")

    def __init__(self, name: bytes, size: int, mtime: int, mode: int, kind: str) -> None:
        self.name = name
        self.size = size if kind == "f" else 0
        self.mtime = mtime
        self.mode = mode
        self.kind = kind
        self.link = b""

    @property
    def version(self) -> tuple[bytes, int, int]:
        """Values that differ when the source has changed."""
        return (self.name, self.size, self.mtime)


def record_key(version: object) -> str:
    """Return the key under which a resumable transfer records a version of a source."""
    return hashlib.sha256(repr(version).encode()).hexdigest()[:32]


def part_token(resume: bool, *transfer: object) -> str:
    """Return a name for the temporary file of a transfer: with ``resume``, always the same."""
    return record_key(transfer)[:20] if resume else os.urandom(10).hex()


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
        raise SSHError(f"the host sent an invalid file name: {printable(repr(name), 120)}")
    if len(parts) > MAX_LEVELS:
        raise SSHError(f"the host sent the name of a file below {len(parts)} directories")
    text = os.fsdecode(name)
    if os.name == "nt" and any(sign in text for sign in '\\:*?"<>|'):
        raise SSHError(f"Windows can't name a file {printable(repr(text), 120)}")
    return text


def kind_of(mode: int) -> str:
    """Return "f", "d" or "l" for the mode of a file; "other" for anything else."""
    kinds = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l"}
    return kinds.get(stat.S_IFMT(mode), "other")


def whole_seconds(mtime: int) -> int:
    """Convert a time in nanoseconds to the seconds that a transfer keeps."""
    return min(max(mtime // 10**9, 0), LAST_TIME)


def remote_entry(name: bytes, mode: int, size: int, seconds: int) -> FileEntry:
    """Make an entry from the numbers of a host; limit the time to what file systems know."""
    mtime = min(max(seconds, 0), LAST_TIME) * 10**9
    return FileEntry(name, size, mtime, mode & 0o777, kind_of(mode))


def local_entry(name: bytes, status: os.stat_result) -> FileEntry:
    """Make an entry from the status of a local file."""
    kind, mode = kind_of(status.st_mode), status.st_mode & 0o777
    return FileEntry(name, status.st_size, status.st_mtime_ns, mode, kind)


def parse_stat(line: bytes) -> FileEntry:
    """Read size, seconds and permissions of a file."""
    found = re.fullmatch(rb"([0-9]{1,18}) (-?[0-9]{1,18}) ([0-7]{1,4})", line)
    if found is None:
        raise SSHError("the host sent a file status that can't be read")
    size, seconds, mode = found.groups()
    return remote_entry(b"", stat.S_IFREG | int(mode, 8), int(size), int(seconds))


def check_unchanged(entry: FileEntry, now: FileEntry | None) -> None:
    """Check that a file is the same as before, or has only grown; its start is then valid."""
    if now is not None and now.size > entry.size:  # only a file has a size
        return
    if now is None or (now.kind, now.size, now.mtime) != ("f", entry.size, entry.mtime):
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
    """Add the file to an error that a block raises."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "entry"):
            error.entry = entry  # type: ignore[attr-defined]
        raise


class Tree:
    """The files, directories and symlinks of a transfer; each directory precedes its content.

    Attributes:
        root: the directory or the single file itself.
        entries: what is in the directory; or only the file.
    """

    def __init__(self) -> None:
        self.root = FileEntry(b"", 0, 0, 0o755, "d")
        self.entries: list[FileEntry] = []

    @property
    def is_folder(self) -> bool:
        return self.root.kind == "d"

    @property
    def by_name(self) -> dict[bytes, FileEntry]:
        """All entries, after the root under the empty name."""
        return {entry.name: entry for entry in [self.root, *self.entries]}

    @property
    def files(self) -> list[FileEntry]:
        return [entry for entry in self.entries if entry.kind == "f"]

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(entry.size for entry in self.files)


def excludes_nothing(name: bytes, folder: bool) -> bool:
    return False


class RemoteTree(Tree):
    """Check and hold a file on a host, or the entries of a directory.

    Attributes:
        excluded: the names that are left out, and those below them.
    """

    def __init__(self, excludes: Excludes = excludes_nothing) -> None:
        super().__init__()
        self.excluded: set[bytes] = set()
        self._excludes = excludes
        self._kinds: dict[bytes, str] = {}

    def add(self, entry: FileEntry) -> None:
        """Check an entry of a listing, and add it unless it or its directory is excluded."""
        name, kind = entry.name, entry.kind
        folder = name.rpartition(b"/")[0]
        if name:
            checked_name(name)
        if name in self._kinds or (name and self._kinds.get(folder) != "d"):
            raise SSHError(f"the host lists {printable(repr(name), 120)} in a wrong place")
        self._kinds[name] = kind
        if not name:
            self.root = entry
        if folder in self.excluded or (name and self._excludes(name, kind == "d")):
            self.excluded.add(name)
        elif name or kind == "f":
            self.entries.append(entry)


def parse_listing(text: bytes, most: int, excludes: Excludes = excludes_nothing) -> RemoteTree:
    """Read the output of the shell function ``list``, of at most so many entries."""
    # A name may contain a line end, so an entry begins only at a mode, a size, a time and "./".
    pattern = rb"([0-9a-f]{1,8}) ([0-9]{1,18}) (-?[0-9]{1,19}) (\.(?:/.*?)?)\n"
    line = re.compile(pattern + rb"(?=[0-9a-f]{1,8} [0-9]{1,18} -?[0-9]{1,19} \./|\Z)", re.S)
    tree = RemoteTree(excludes)
    at = count = 0
    while at < len(text):
        found = line.match(text, at)
        if found is None:
            shown = printable(repr(text[at : at + 80]), 120)
            raise SSHError(f"the host sent a listing that can't be read: {shown}")
        count += 1
        if count > most:
            raise SSHError(f"the host lists more than {most} files")
        mode, size, seconds, name = found.groups()
        tree.add(remote_entry(name[2:], int(mode, 16), int(size), int(seconds)))
        at = found.end()
    return tree


def excluder(patterns: Any) -> Excludes:
    """Return a function that checks a name and its kind against patterns as in .gitignore."""
    check_list("exclude", patterns, "a list of patterns")
    lines = [check_string(f"exclude[{n}]", line) for n, line in enumerate(patterns)]
    if not lines:
        return excludes_nothing
    try:
        pathspec: Any = importlib.import_module("pathspec")
    except ImportError as error:
        raise ImportError("exclude needs pathspec: pip install pathspec") from error
    try:
        spec = pathspec.GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise ValueError(f"exclude: {printable(str(error), 200)}") from error

    def excludes(name: bytes, folder: bool) -> bool:
        return bool(spec.match_file(os.fsdecode(name) + "/" * folder))

    return excludes


class LocalTree(Tree):
    """Find the files, directories and symlinks to upload, and those that are left out.

    Attributes:
        whole: the absolute path.
        left_out: (name, reason) for each of those that are left out.
    """

    def __init__(self, path: bytes, symlinks: str, excludes: Excludes) -> None:
        super().__init__()
        self.path = path
        self.whole = os.path.abspath(path)
        self._symlinks = symlinks
        self._excludes = excludes
        self.left_out: list[tuple[bytes, str]] = []
        try:
            status = os.stat(path)  # the path itself may be a symlink
        except FileNotFoundError:
            shown = printable(repr(os.fsdecode(path)), 300)
            raise FileNotFoundError(f"local: there is nothing at {shown}") from None
        self.root = local_entry(b"", status)
        if self.is_folder:
            self._scan(b"", (os.path.realpath(path),))
        elif self.root.kind == "f":
            self.entries.append(self.root)
        else:
            raise ValueError(f"local is neither a file nor a directory: {os.fsdecode(path)!r}")

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
            status = os.fstat(file.fileno())
            if length or (status.st_size, status.st_mtime_ns) != (entry.size, entry.mtime):
                raise SSHError(CHANGED)

    def _scan(self, folder: bytes, above: tuple[bytes, ...]) -> None:
        with os.scandir(os.path.join(self.path, folder)) as listed:
            entries = sorted(listed, key=lambda e: e.name)
        for entry in entries:
            name = folder + b"/" + entry.name if folder else entry.name
            found = local_entry(name, entry.stat(follow_symlinks=False))
            if self._excludes(name, found.kind == "d"):
                continue
            if found.kind == "l":
                self._add_link(found, entry.path, above)
            elif found.kind == "other":
                self.left_out.append((name, "it is not a file"))
            else:
                self.entries.append(found)
                if found.kind == "d":
                    self._scan(name, (*above, os.path.realpath(entry.path)))

    def _add_link(self, found: FileEntry, path: bytes, above: tuple[bytes, ...]) -> None:
        name, link, real = found.name, os.readlink(path), os.path.realpath(path)
        within = real.startswith(above[0].rstrip(b"/") + b"/") and os.path.exists(real)
        follow = within and self._symlinks == "follow"
        if within and self._symlinks == "copy" and link_target(name, link) is not None:
            found.link = link
            self.entries.append(found)
        elif follow and os.path.isfile(real):
            self.entries.append(local_entry(name, os.stat(real)))
        elif follow and os.path.isdir(real) and real not in above:
            self.entries.append(local_entry(name, os.stat(real)))
            self._scan(name, (*above, real))
        else:
            self.left_out.append((name, f"a symlink to {os.fsdecode(link)}"))


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


class Portion:
    """A part of an upload that the host confirms: a chunk of a file, or a tar archive.

    Attributes:
        entries: the file, or the small files, directories and symlinks of the archive.
        start: of the chunk, in bytes; None for an archive.
        size: bytes to send.
    """

    def __init__(self, entries: list[FileEntry], start: int | None = None, size: int = 0) -> None:
        self.entries = entries
        self.start = start
        self.size = size

    @property
    def key(self) -> str:
        """The key under which the host records it."""
        # The time of a directory changes with every file that is created in it.
        versions = [e.version if e.kind == "f" else (e.name, e.link) for e in self.entries]
        return record_key((versions, self.start, self.size))


def plan_portions(tree: LocalTree, resume: bool) -> list[Portion]:
    """Divide an upload into portions; if it may be resumed, the first ones are small."""
    portions: list[Portion] = []
    bundle: Portion | None = None
    before = 0
    # Files come last; with resume, the small ones of them first.
    for entry in sorted(tree.entries, key=lambda e: (e.kind == "f", e.size if resume else 0)):
        most = _portion_size(before) if resume else CHUNK
        if tree.is_folder and entry.size < most:
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
    """Return the bytes of the next portion of a resumable upload: 1 % of those before it."""
    return min(max(before // (100 * BLOCK), 2) * BLOCK, CHUNK)
