"""Files that a download makes here: beside their place until they are complete."""

from __future__ import annotations

import os
import re
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.files import lock_file
from clore_client.log import logger
from clore_client.ssh.remote import BLOCK, checked_name
from clore_client.ssh.transfer import (
    LAST_TIME,
    PART,
    TRANSFER_PIECE,
    FileEntry,
    Transfer,
    facts_key,
    links_within,
)

ZEROS = bytes(TRANSFER_PIECE)
CHANGED = "it was changed meanwhile"
Ranges = list[tuple[int, int]]  # start and length


class RemoteTree:
    """What the host says there is in a directory; read with care."""

    def __init__(self) -> None:
        self.entries: list[FileEntry] = []
        self.odd: list[bytes] = []  # neither file, directory nor symlink
        self.root = FileEntry(b"", 0, 0, 0o755, "d")
        self._folders = {b""}
        self._names: set[bytes] = set()

    @property
    def files(self) -> list[FileEntry]:
        return [entry for entry in self.entries if entry.kind == "f"]

    def links(self, transfer: Transfer) -> list[FileEntry]:
        """Return the symlinks to transfer; what is left out is told."""
        for name in self.odd:
            transfer.leave_out(name, "it is no file")
        links = [entry for entry in self.entries if entry.kind == "l"]
        if transfer.options.symlinks != "skip":
            return links
        for entry in links:
            transfer.leave_out(entry.name, "a symlink")
        self.entries = [entry for entry in self.entries if entry.kind != "l"]
        return []

    def take(self, mode: int, size: int, seconds: int, name: bytes) -> None:
        """Take one entry of the listing."""
        kind = {stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFREG: "f"}.get(stat.S_IFMT(mode))
        entry = FileEntry(name, size, nanoseconds(seconds), mode & 0o777, kind or "f")
        if not name and kind == "d":
            self.root = entry
            return
        checked_name(name)
        if name in self._names or name.rpartition(b"/")[0] not in self._folders:
            raise SSHError(f"the machine lists {printable(repr(name), 120)} where it can't be")
        self._names.add(name)
        if kind == "d":
            self._folders.add(name)
        if kind is None:
            self.odd.append(name)
        else:
            self.entries.append(entry)


class LocalPart:
    """The temporary file or directory of a download, and the record of what has arrived.

    Attributes:
        target: where it goes in the end.
        done: what an earlier download has left, by file: ranges.
    """

    def __init__(self, target: str, remote: bytes, options: Any) -> None:
        self.target = target
        self._options = options
        whole = os.path.abspath(target)
        # A name that the next try finds again, or one of nobody else's.
        same = facts_key((remote, whole))[:20]
        token = same if options.resume else os.urandom(10).hex()
        self._part = Path(os.path.dirname(whole)) / f"{PART}{token}"
        self._record: Any = None
        self._record_path = Path(f"{self._part}.done")
        self._lock = threading.Lock()
        self._size = 0
        self.done: dict[str, Ranges] = {}

    def __enter__(self) -> LocalPart:
        if self._options.resume:
            self._open_record()
            self.done = self._read_record()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None and not self._options.resume:
            self._remove()
        if self._record is not None:
            if not os.path.lexists(self._part):
                self._record_path.unlink(missing_ok=True)  # there is nothing to go on from
            self._record.close()

    # --- the record ---

    def _open_record(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(self._record_path, flags, 0o600)
        self._record = os.fdopen(handle, "r+", encoding="latin-1")
        if not (lock_file(self._record.fileno()) and self._is_there()):
            self._record.close()
            self._record = None
            raise SSHError("another process is at the same transfer")

    def _is_there(self) -> bool:
        """Whether the file is still the one of that name: another process removes it in the end."""
        try:
            found = os.stat(self._record_path)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(self._record.fileno()), found)

    def _read_record(self) -> dict[str, Ranges]:
        done: dict[str, Ranges] = {}
        if os.path.lexists(self._part):
            lines = re.findall(
                r"^([0-9a-f]{32}) (\d{1,18}) (\d{1,18})\n", self._record.read(), re.M
            )
            for key, start, length in lines:
                done.setdefault(key, []).append((int(start), int(length)))
        return done

    def note(self, entry: FileEntry, start: int, end: int) -> int:
        """Record a range of whole blocks, or up to the end of a file; up to where it is now."""
        if self._record is None:
            return end
        if end != entry.size:
            end -= end % BLOCK
        if end > start or not entry.size:
            with self._lock:
                self._record.write(f"{facts_key(entry.facts)} {start} {end - start}\n")
                self._record.flush()
        return end

    def clear(self) -> None:
        """Forget, and remove, what has arrived."""
        self._remove()
        self.done = {}
        if self._record is not None:
            self._record.seek(0)
            self._record.truncate()

    def earlier(self, entry: FileEntry) -> Ranges:
        """Return the ranges of a file that an earlier download has left, merged."""
        merged: Ranges = []
        for start, length in sorted(self.done.get(facts_key(entry.facts), ())):
            if merged and start <= sum(merged[-1]):
                first = merged[-1][0]
                merged[-1] = (first, max(sum(merged[-1]), start + length) - first)
            else:
                merged.append((start, length))
        return merged

    def missing(self, entry: FileEntry) -> Ranges:
        """Return the ranges of a file that are still to come."""
        left, at = [], 0
        for start, length in [*self.earlier(entry), (entry.size, 0)]:
            if start > at:
                left.append((at, start - at))
            at = max(at, start + length)
        return left

    def is_done(self, entry: FileEntry) -> bool:
        return facts_key(entry.facts) in self.done and not self.missing(entry)

    # --- files ---

    def accept(self, files: list[FileEntry], folder: bool) -> None:
        """Refuse what is too large, and what has no place; before anything is made."""
        self._size = 0
        self.grow(sum(entry.size for entry in files))
        target = self.target
        if folder:
            if os.path.lexists(target) and not os.path.isdir(target):
                raise NotADirectoryError(f"local is no directory: {target!r}")
            return
        if os.path.isdir(target):
            raise IsADirectoryError(f"local is a directory: {target!r}")
        if os.path.islink(target):
            if self._options.symlinks != "follow":
                raise FileExistsError(
                    f"local is a symlink: {target!r}; remove it, or pass symlinks='follow'"
                )
            self.target = target = os.path.realpath(target)
        if os.path.lexists(target) and not os.path.isfile(target):
            raise FileExistsError(f"local is neither a file nor a directory: {target!r}")

    def grow(self, size: int) -> None:
        """Count bytes that are to come."""
        self._size += size
        most = self._options.max_bytes
        if most is not None and self._size > most:
            raise SSHError(f"it has {self._size} bytes, and max_bytes is {most}")

    def begin(self, entries: list[FileEntry]) -> None:
        """Make the temporary file, or the directories; start over after a change of the source."""
        single = entries[0] if len(entries) == 1 and not entries[0].name else None
        if not set(self.done) <= {facts_key(entry.facts) for entry in entries}:
            self.clear()
        if not self.done:
            self._remove()
        if single is None:
            self._part.mkdir(mode=0o700, exist_ok=bool(self.done))
            for entry in entries:
                if entry.kind == "d":
                    self.place(entry).mkdir(mode=0o700, exist_ok=bool(self.done))
        else:
            self.open(single).close()

    def place(self, entry: FileEntry) -> Path:
        return self.place_of(entry.name)

    def place_of(self, name: bytes) -> Path:
        return self._part / checked_name(name) if name else self._part

    def open(self, entry: FileEntry) -> Any:
        """Open a file of our own, which nobody else may read yet."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        return os.fdopen(os.open(self.place(entry), flags, 0o600), "r+b", buffering=0)

    def _remove(self) -> None:
        part = self._part
        try:
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a temporary file stays: %s", error)

    # --- the end ---

    def install_file(self, entry: FileEntry) -> None:
        found = os.stat(self._part)
        if found.st_size != entry.size:
            raise SSHError(f"{found.st_size} bytes have arrived")
        self._finish(entry, self.target)
        os.replace(self._part, self.target)

    def install_tree(self, root: FileEntry, entries: list[FileEntry]) -> None:
        merging = os.path.lexists(self.target)
        # From a directory that may not be written to, nothing could be moved.
        for entry in entries[::-1]:
            if entry.kind == "f" or (entry.kind == "d" and not merging):
                place = os.path.join(self.target, checked_name(entry.name))
                self._finish(entry, place if merging else "")
        if merging:
            merge_into(self._part, self.target, entries, self._options.preserve)
        else:
            self._finish(root, "")
            os.rename(self._part, self.target)

    def _finish(self, entry: FileEntry, instead: str) -> None:
        """Give a file its permissions, those of what it replaces first; and with them its time."""
        place, mode = self.place(entry), entry.mode
        if not self._options.preserve:
            mode &= ~local_umask()
            if instead and entry.kind == "f" and os.path.isfile(instead):
                mode = stat.S_IMODE(os.stat(instead).st_mode)
        os.chmod(place, mode)
        if self._options.preserve:
            os.utime(place, ns=(entry.mtime, entry.mtime))


def nanoseconds(seconds: int) -> int:
    return min(max(seconds, 0), LAST_TIME) * 10**9


def check_same(entry: FileEntry, now: FileEntry | None) -> None:
    """Check that a file is as it was, or has grown: then what it was at the start has arrived."""
    if now is None or now.kind != "f" or now.size < entry.size:
        raise SSHError(CHANGED)
    if now.size == entry.size and now.mtime != entry.mtime:
        raise SSHError(CHANGED)


def settle_links(
    part: LocalPart, transfer: Transfer, links: list[FileEntry], tree: RemoteTree
) -> None:
    """Make the symlinks that lead to something in the tree, or copies of it."""
    entries = {entry.name: entry for entry in tree.entries}
    for link in links:
        target, hops = link, 0
        while target.kind == "l" and hops < 40:
            within, hops = links_within(target.name, target.link), hops + 1
            found = entries.get(within) if within else None
            if found is None:
                break
            target = found
        inside = (link.name + b"/").startswith(target.name + b"/")
        follow = transfer.options.symlinks == "follow"
        if target.kind == "l" or (inside and follow):
            transfer.leave_out(link.name, f"a symlink to {os.fsdecode(link.link)}")
            tree.entries.remove(link)
        elif not follow:
            os.symlink(os.fsdecode(link.link), part.place(link))
        elif target.kind == "f":
            link.kind, link.mode, link.mtime = "f", target.mode, target.mtime
            shutil.copyfile(part.place(target), part.place(link))
        else:
            link.kind, link.mode, link.mtime = "d", target.mode, target.mtime
            shutil.copytree(part.place(target), part.place(link))


def local_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def merge_into(part: Path, target: str, entries: list[FileEntry], preserve: bool) -> None:
    """Move a tree over one that exists; a symlink in there is never written through."""
    for entry in entries:  # all is looked at before the first is moved
        place = os.path.join(target, checked_name(entry.name))
        shown = printable(os.fsdecode(entry.name), 300)
        if os.path.islink(place) and entry.kind == "d":
            raise SSHError(f"local holds a symlink in the place of {shown}")
        if os.path.lexists(place) and os.path.isdir(place) != (entry.kind == "d"):
            raise SSHError(f"local holds something else in the place of {shown}")
    umask = local_umask()
    for entry in entries:
        name = checked_name(entry.name)
        place = os.path.join(target, name)
        if entry.kind != "d":
            os.replace(part / name, place)
        elif not os.path.isdir(place):
            os.mkdir(place, 0o700)
            os.chmod(place, (entry.mode | 0o700) & (0o777 if preserve else ~umask))
    for entry in [e for e in entries[::-1] if e.kind == "d" and preserve]:
        place = os.path.join(target, checked_name(entry.name))
        os.chmod(place, entry.mode)
        os.utime(place, ns=(entry.mtime, entry.mtime))
    shutil.rmtree(part)


def write_piece(file: Any, piece: bytes) -> None:
    """Write all of it; zeros are left as a hole, which makes a sparse file sparse again."""
    if piece[0] == 0 == piece[-1] and piece == ZEROS[: len(piece)]:
        file.seek(len(piece), os.SEEK_CUR)
        return
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]
