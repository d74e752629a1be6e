"""Find the files to upload, and divide them into portions."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.ssh.transfer.entry import (
    CHANGED,
    TRANSFER_PIECE,
    FileEntry,
    chunk_size,
    link_target,
    record_key,
)
from clore_client.ssh.transfer.options import Excludes

BUNDLE_BYTES = 8 * 1024 * 1024
BUNDLE_FILES = 1000


class LocalTree:
    """The files, directories and symlinks to upload, and what is left out."""

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


class Source:
    """Portions to send, each with its record key, for several workers.

    Attributes:
        keys: of all portions.
        earlier: portions that an earlier upload sent.
        left: portions that no worker has taken, in reverse order.
    """

    def __init__(self, portions: list[tuple[str, Any]], done: set[str]) -> None:
        self.keys = {key for key, _ in portions}
        self.earlier = [portion for key, portion in portions if key in done]
        self.left = [portion for portion in portions if portion[0] not in done][::-1]

    def take(self) -> tuple[str, Any] | None:
        try:
            return self.left.pop()
        except IndexError:
            return None

    def rest(self, first: tuple[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield ``first``, and then what is left."""
        portion: tuple[str, Any] | None = first
        while portion is not None:
            yield portion
            portion = self.take()


class Chunks(Source):
    """The chunks of one file: (start, size).

    Attributes:
        unconfirmed: how many chunks a worker sends ahead; few if the upload may be resumed.
    """

    def __init__(self, entry: FileEntry, resume: bool, done: set[str]) -> None:
        self.entry = entry
        step = chunk_size(entry.size, resume)
        self.unconfirmed = max(2, entry.size // (200 * step)) if resume else entry.size
        chunks = [(start, min(step, entry.size - start)) for start in range(0, entry.size, step)]
        super().__init__([(record_key((*entry.version, step, c)), c) for c in chunks], done)


class Bundles(Source):
    """Lists of small files, directories and symlinks; each list is sent as one tar archive."""

    def __init__(self, entries: list[FileEntry], resume: bool, done: set[str]) -> None:
        most = chunk_size(sum(e.size for e in entries), True) if resume else BUNDLE_BYTES
        self.every: list[list[FileEntry]] = []
        size = most
        for entry in entries:
            if size >= most or len(self.every[-1]) >= BUNDLE_FILES:
                self.every.append([])
                size = 0
            self.every[-1].append(entry)
            size += entry.size
        # The time of a directory changes with every file that is created in it.
        facts = [[e.version if e.kind == "f" else (e.name, e.link) for e in b] for b in self.every]
        keys = [record_key(what) for what in facts]
        super().__init__(list(zip(keys, self.every, strict=True)), done)
