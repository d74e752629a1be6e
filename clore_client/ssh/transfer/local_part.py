"""Keep the temporary files of a download, and move them to the target when it is complete."""

from __future__ import annotations

import os
import re
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clore_client.config import lock_file
from clore_client.errors import SSHError, printable
from clore_client.log import logger
from clore_client.ssh.transfer.entry import (
    BLOCK,
    MAX_FILES,
    TRANSFER_PIECE,
    FileEntry,
    RemoteTree,
    about,
    checked_name,
    entry_of,
    link_target,
    part_token,
    record_key,
    same_files,
)
from clore_client.ssh.transfer.transfer import Transfer

PART = ".clore-part-"
ZEROS = bytes(TRANSFER_PIECE)
Spans = list[tuple[int, int]]  # start and length
# Returns those of the files whose content differs from that of their targets.
Different = Callable[[list[FileEntry]], list[FileEntry]]


class LocalPart:
    """Keep the temporary file or directory of a download, and a record of the received data.

    Attributes:
        target: the final path.
        done: the ranges that an earlier download received, by record key.
    """

    def __init__(self, target: str, remote: bytes, options: Any) -> None:
        self.target = target
        self._options = options
        whole = os.path.abspath(target)
        token = part_token(options.resume, remote, whole)
        self._part = Path(os.path.dirname(whole)) / f"{PART}{token}"
        self._record: Any = None
        self._record_path = Path(f"{self._part}.done")
        self._lock = threading.Lock()
        self._size = 0
        self.done: dict[str, Spans] = {}

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
                self._record_path.unlink(missing_ok=True)  # nothing is left to resume
            self._record.close()

    # --- the record ---

    def _open_record(self) -> None:
        os.makedirs(self._part.parent, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(self._record_path, flags, 0o600)
        self._record = os.fdopen(handle, "r+", encoding="latin-1")
        # A file without a name was removed by another process that has just finished.
        if not lock_file(handle) or not os.fstat(handle).st_nlink:
            self._record.close()
            self._record = None
            raise SSHError("another process runs the same transfer: wait for its end")

    def _read_record(self) -> dict[str, Spans]:
        done: dict[str, Spans] = {}
        if os.path.lexists(self._part):
            lines = re.findall(
                r"^([0-9a-f]{32}) (\d{1,18}) (\d{1,18})\n", self._record.read(), re.M
            )
            for key, start, length in lines:
                done.setdefault(key, []).append((int(start), int(length)))
        return done

    def note(self, entry: FileEntry, start: int, end: int) -> int:
        """Record a range, in whole blocks or up to the end of the file; return where it ends."""
        if self._record is None:
            return end
        if end != entry.size:
            end -= end % BLOCK
        if end > start or not entry.size:
            with self._lock:
                self._record.write(f"{record_key(entry.version)} {start} {end - start}\n")
                self._record.flush()
        return end

    def clear(self) -> None:
        """Remove the received data, and its record."""
        self._remove()
        self.done = {}
        if self._record is not None:
            self._record.seek(0)
            self._record.truncate()

    def earlier(self, entry: FileEntry) -> Spans:
        """Return the ranges of a file that an earlier download received, merged."""
        merged: Spans = []
        for start, length in sorted(self.done.get(record_key(entry.version), ())):
            if merged and start <= sum(merged[-1]):
                first = merged[-1][0]
                merged[-1] = (first, max(sum(merged[-1]), start + length) - first)
            else:
                merged.append((start, length))
        return merged

    def missing(self, entry: FileEntry) -> Spans:
        """Return the ranges of a file that are missing."""
        left, at = [], 0
        for start, length in [*self.earlier(entry), (entry.size, 0)]:
            if start > at:
                left.append((at, start - at))
            at = max(at, start + length)
        return left

    def is_done(self, entry: FileEntry) -> bool:
        return record_key(entry.version) in self.done and not self.missing(entry)

    # --- files ---

    def accept(self, files: list[FileEntry], folder: bool) -> None:
        """Check the sizes and the target, before anything is created."""
        self._size = 0
        self.grow(sum(entry.size for entry in files))
        if folder:
            self.target = self._options.folder_target
        target = self.target
        above = os.path.dirname(os.path.abspath(target))
        if os.path.lexists(above) and not os.path.isdir(above):
            raise NotADirectoryError(f"local is not a directory: {above!r}")
        if folder:
            if os.path.lexists(target) and not os.path.isdir(target):
                raise NotADirectoryError(f"local is not a directory: {target!r}")
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
        """Add to the expected size, which ``max_bytes`` limits."""
        self._size += size
        most = self._options.max_bytes
        if most is not None and self._size > most:
            raise SSHError(f"it has {self._size} bytes, and max_bytes is {most}")

    def begin(self, entries: list[FileEntry]) -> None:
        """Create the temporary file or directories; start over if the source has changed."""
        os.makedirs(self._part.parent, exist_ok=True)
        single = entries[0] if len(entries) == 1 and not entries[0].name else None
        if not set(self.done) <= {record_key(entry.version) for entry in entries}:
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

    def target_of(self, entry: FileEntry) -> str:
        """Return the final path of an entry."""
        return os.path.join(self.target, checked_name(entry.name)) if entry.name else self.target

    def installed(self, entry: FileEntry) -> FileEntry | None:
        """Return the entry that already exists at the final path of a file, or None."""
        try:
            found = os.lstat(self.target_of(entry))
        except OSError:
            return None
        return entry_of(entry.name, found.st_mode, found.st_size, int(found.st_mtime))

    def place(self, entry: FileEntry) -> Path:
        """Return the temporary path of an entry."""
        return self._part / checked_name(entry.name) if entry.name else self._part

    def open(self, entry: FileEntry) -> Any:
        """Open a temporary file, which no other user may read."""
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
        # When merging, directories stay writable, so that files can be moved out of them.
        for entry in entries[::-1]:
            if entry.kind == "f" or (entry.kind == "d" and not merging):
                place = os.path.join(self.target, checked_name(entry.name))
                self._finish(entry, place if merging else "")
        if merging:
            merge_into(self._part, self.target, entries, self._options.preserve)
        else:
            self._finish(root, "")
            os.makedirs(os.path.dirname(os.path.abspath(self.target)), exist_ok=True)
            os.rename(self._part, self.target)

    def _finish(self, entry: FileEntry, instead: str) -> None:
        """Set permissions (of the source, or of the file it replaces) and, with preserve, times."""
        place, mode = self.place(entry), entry.mode
        if not self._options.preserve:
            mode &= ~local_umask()
            if instead and entry.kind == "f" and os.path.isfile(instead):
                mode = stat.S_IMODE(os.stat(instead).st_mode)
        os.chmod(place, mode)
        if self._options.preserve:
            os.utime(place, ns=(entry.mtime, entry.mtime))


def local_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def merge_into(part: Path, target: str, entries: list[FileEntry], preserve: bool) -> None:
    """Move a tree into an existing one; never write through a symlink there."""
    for entry in entries:  # check all before moving the first
        place = os.path.join(target, checked_name(entry.name))
        shown = printable(os.fsdecode(entry.name), 300)
        if os.path.islink(place) and entry.kind == "d":
            raise SSHError(f"local has a symlink in the place of {shown}")
        if os.path.lexists(place) and os.path.isdir(place) != (entry.kind == "d"):
            raise SSHError(f"local has something else in the place of {shown}")
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
    """Write a piece, but skip zeros where the file has only zeros: sparse files stay sparse."""
    if piece[0] == 0 == piece[-1] and piece == ZEROS[: len(piece)]:
        start = file.tell()
        there = file.read(len(piece))  # shorter at the end of the file
        hole = there == ZEROS[: len(there)]
        file.seek(start + len(piece) if hole else start)
        if hole:
            return
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def begin_file(
    transfer: Transfer, part: LocalPart, entry: FileEntry, different: Different
) -> list[FileEntry]:
    """Check and begin the download of a file; return what to receive, unless it is unchanged."""
    transfer.total = entry.size
    part.accept([entry], folder=False)
    if same_files([entry], transfer.options, part.installed, different):
        transfer.unchanged = 1
        return []
    part.begin([entry])
    return [entry]


def begin_tree(
    transfer: Transfer, part: LocalPart, tree: RemoteTree, different: Different
) -> list[FileEntry]:
    """Check and begin the download of a directory; return its symlinks."""
    options = transfer.options
    for entry in tree.special:
        transfer.leave_out(entry.name, "it is not a file")
    kept = []
    for entry in tree.entries:
        if entry.kind == "l" and options.symlinks == "skip":
            transfer.leave_out(entry.name, "a symlink")
        elif entry.kind == "l" and b"\\" in entry.name:  # an escape for GNU tar
            transfer.leave_out(entry.name, "a symlink whose name has a backslash")
        else:
            kept.append(entry)
    tree.entries = kept
    links = [entry for entry in kept if entry.kind == "l"]
    transfer.total = tree.size
    part.accept(tree.files, folder=True)
    if not links or options.symlinks != "follow":  # a followed symlink may need unchanged files
        same = same_files(tree.files, options, part.installed, different)
        tree.drop_files(same)
        transfer.unchanged = len(same)
        part.accept(tree.files, folder=True)
    transfer.total = tree.size
    part.begin(tree.entries)
    return links


def make_links(
    transfer: Transfer, part: LocalPart, tree: RemoteTree, links: list[FileEntry]
) -> None:
    """Create the symlinks that lead to something in the tree, or copies of it."""
    entries = {entry.name: entry for entry in tree.entries}
    folders = {entry.name for entry in tree.entries if entry.kind == "d"}
    for link in links:
        target, hops = link, 0
        while target.kind == "l" and hops < 40:
            within, hops = link_target(target.name, target.link, folders), hops + 1
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
        else:
            with about(link):
                _copy(part, tree, link, target)


def _copy(part: LocalPart, tree: RemoteTree, link: FileEntry, target: FileEntry) -> None:
    """Copy what a symlink leads to, within ``max_bytes``."""
    link.kind, link.mode, link.mtime, link.size = (
        target.kind, target.mode, target.mtime, target.size,
    )  # fmt: skip
    if target.kind == "f":
        part.grow(target.size)
        shutil.copyfile(part.place(target), part.place(link))
        return
    below = target.name + b"/"
    copies = [
        FileEntry(link.name + b"/" + e.name[len(below) :], e.size, e.mtime, e.mode, e.kind)
        for e in tree.entries
        if e.kind != "l" and e.name.startswith(below)
    ]
    part.grow(sum(entry.size for entry in copies))
    if len(tree.entries) + len(copies) > MAX_FILES:
        raise SSHError(f"its copies are more than {MAX_FILES} files")
    tree.entries += copies
    shutil.copytree(part.place(target), part.place(link))
