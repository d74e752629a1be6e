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
    link_target,
    local_entry,
    part_token,
    record_key,
)
from clore_client.ssh.transfer.transfer import Transfer

PART = ".clore-part-"
MAX_HOPS = 40  # symlinks that lead to each other
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
        line = r"^([0-9a-f]{32}) (\d{1,18}) (\d{1,18})\n"
        for key, start, length in re.findall(line, self._record.read(), re.M):
            self.done.setdefault(key, []).append((int(start), int(length)))
        if not os.path.lexists(self._part):
            self.clear()

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
        """Return the ranges of a file that are missing; of an empty file, one without bytes."""
        earlier = self.earlier(entry)
        left, at = [], 0
        for start, length in [*earlier, (entry.size, 0)]:
            if start > at:
                left.append((at, start - at))
            at = start + length
        return left if earlier or entry.size else [(0, 0)]

    # --- files ---

    def check_target(self, is_folder: bool) -> None:
        """Find the final path, and check what is there, before anything is created."""
        self._size = 0
        if is_folder:
            self.target = self._options.folder_target
        target = self.target
        above = os.path.dirname(os.path.abspath(target))
        for folder in [above, target] if is_folder else [above]:
            if os.path.lexists(folder) and not os.path.isdir(folder):
                raise NotADirectoryError(f"local is not a directory: {folder!r}")
        if is_folder:
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

    def begin(self, tree: RemoteTree) -> None:
        """Create the temporary file or directories; start over if the source has changed."""
        os.makedirs(self._part.parent, exist_ok=True)
        if not set(self.done) <= {record_key(entry.version) for entry in tree.entries}:
            self.clear()
        if not self.done:
            self._remove()
        if not tree.is_folder:
            self.open(tree.root).close()
            return
        for entry in tree.by_name.values():
            if entry.kind == "d":
                self.place(entry).mkdir(mode=0o700, exist_ok=bool(self.done))

    def target_of(self, name: bytes) -> str:
        """Return the final path of an entry."""
        return os.path.join(self.target, checked_name(name)) if name else self.target

    def installed(self, name: bytes) -> FileEntry | None:
        """Return the entry that already exists at the final path of a file, or None."""
        try:
            return local_entry(name, os.lstat(self.target_of(name)))
        except OSError:
            return None

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

    def install(self, tree: RemoteTree) -> None:
        """Move everything to the target, with the right modes and times."""
        if not tree.is_folder:
            size = os.stat(self._part).st_size
            if size != tree.root.size:
                raise SSHError(f"{size} bytes have arrived")
        merges = tree.is_folder and os.path.lexists(self.target)
        # When merging, directories stay writable, so that files can be moved out of them.
        for entry in reversed(tree.by_name.values()):
            if entry.kind == "f" or (entry.kind == "d" and not merges):
                self._set_mode(entry)
        if merges:
            self._merge(tree.entries)
        else:
            os.makedirs(os.path.dirname(os.path.abspath(self.target)), exist_ok=True)
            os.replace(self._part, self.target)

    def _set_mode(self, entry: FileEntry) -> None:
        """Set permissions (of the source, or of the file it replaces) and, with preserve, times."""
        place, mode, replaced = self.place(entry), entry.mode, self.target_of(entry.name)
        if self._options.preserve:
            os.utime(place, ns=(entry.mtime, entry.mtime))
        elif os.path.isfile(replaced):
            mode = stat.S_IMODE(os.stat(replaced).st_mode)
        else:
            mode &= ~local_umask()
        os.chmod(place, mode)

    def _merge(self, entries: list[FileEntry]) -> None:
        """Move a tree into an existing one; never write through a symlink there."""
        for entry in entries:  # check all before moving the first
            target, is_folder = self.target_of(entry.name), entry.kind == "d"
            shown = printable(os.fsdecode(entry.name), 300)
            if os.path.islink(target) and is_folder:
                raise SSHError(f"local has a symlink in the place of {shown}")
            if os.path.lexists(target) and os.path.isdir(target) != is_folder:
                raise SSHError(f"local has something else in the place of {shown}")
        for entry in entries:
            target = self.target_of(entry.name)
            if entry.kind != "d":
                os.replace(self.place(entry), target)
            elif not os.path.isdir(target):
                os.mkdir(target, entry.mode | 0o700)  # without what the umask forbids
        for entry in entries[::-1]:
            if entry.kind == "d" and self._options.preserve:
                target = self.target_of(entry.name)
                os.chmod(target, entry.mode)
                os.utime(target, ns=(entry.mtime, entry.mtime))
        shutil.rmtree(self._part)


def local_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


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


def begin_download(
    transfer: Transfer, part: LocalPart, tree: RemoteTree, different: Different
) -> list[FileEntry]:
    """Check and begin a download, unless nothing has changed; return the symlinks."""
    kept = []
    for entry in tree.entries:
        why = ""
        if entry.kind == "other":
            why = "it is not a file"
        elif entry.kind == "l" and transfer.options.symlinks == "skip":
            why = "a symlink"
        elif entry.kind == "l" and b"\\" in entry.name:  # an escape for GNU tar
            why = "a symlink whose name has a backslash"
        if why:
            transfer.leave_out(entry.name, why)
        else:
            kept.append(entry)
    tree.entries = kept
    links = [entry for entry in kept if entry.kind == "l"]
    transfer.total = tree.size
    part.check_target(tree.is_folder)
    if not links or transfer.options.symlinks != "follow":  # a copy may need unchanged files
        transfer.leave_unchanged(tree, part.installed, different)
    transfer.total = tree.size
    part.grow(tree.size)
    if tree.is_folder or tree.files:
        part.begin(tree)
    return links


def make_links(
    transfer: Transfer, part: LocalPart, tree: RemoteTree, links: list[FileEntry]
) -> None:
    """Create the symlinks that lead to something in the tree, or copies of it."""
    entries = {entry.name: entry for entry in tree.entries}
    folders = {entry.name for entry in tree.entries if entry.kind == "d"}
    follow = transfer.options.symlinks == "follow"
    for link in links:
        target: FileEntry | None = link
        for _ in range(MAX_HOPS):
            if target is None or target.kind != "l":
                break
            target = entries.get(link_target(target.name, target.link, folders) or b"")
        else:
            target = None
        inside = target is not None and (link.name + b"/").startswith(target.name + b"/")
        if target is None or (inside and follow):
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
