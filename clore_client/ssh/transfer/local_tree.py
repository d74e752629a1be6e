"""Find the files to upload, and divide them into portions."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from clore_client.errors import SSHError, printable
from clore_client.ssh.transfer.entry import (
    BLOCK,
    CHANGED,
    TAR_BLOCK,
    TRANSFER_PIECE,
    Excludes,
    FileEntry,
    link_target,
    record_key,
)

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
