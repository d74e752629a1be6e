"""Check the listing of a directory on a host, and its symlinks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from clore_client.errors import SSHError, printable
from clore_client.ssh.transfer.entry import (
    Excludes,
    FileEntry,
    checked_name,
    kind_of,
    link_target,
    nanoseconds,
)
from clore_client.ssh.transfer.local_part import LocalPart
from clore_client.ssh.transfer.transfer import Transfer

# Returns those of the files whose content differs from that of their targets.
Different = Callable[[list[FileEntry]], list[FileEntry]]


class RemoteTree:
    """The entries of a directory on a host, checked."""

    def __init__(self) -> None:
        self.entries: list[FileEntry] = []
        self.odd: list[bytes] = []  # neither file, directory nor symlink
        self.root = FileEntry(b"", 0, 0, 0o755, "d")
        self._folders = {b""}
        self._names: set[bytes] = set()

    @property
    def files(self) -> list[FileEntry]:
        return [entry for entry in self.entries if entry.kind == "f"]

    @property
    def by_name(self) -> dict[bytes, FileEntry]:
        """All that is there, and the root as the empty name."""
        odd = [FileEntry(name, 0, 0, 0, "l") for name in self.odd]
        return {entry.name: entry for entry in [self.root, *self.entries, *odd]}

    def exclude(self, excludes: Excludes | None) -> None:
        """Drop what patterns exclude, and all that is below an excluded directory."""
        if excludes is None:
            return
        kept, gone = [], {b"/"}
        for entry in self.entries:  # a directory comes before what is in it
            if entry.name.rpartition(b"/")[0] in gone or excludes(entry.name, entry.kind == "d"):
                gone.add(entry.name)
            else:
                kept.append(entry)
        self.entries = kept
        self.odd = [
            n for n in self.odd if n.rpartition(b"/")[0] not in gone and not excludes(n, False)
        ]

    def begin(
        self, transfer: Transfer, part: LocalPart, files: list[FileEntry], different: Different
    ) -> list[FileEntry]:
        """Check and begin the download of a directory; return its symlinks.

        ``files`` becomes the list of those to receive.
        """
        self.exclude(transfer.options.excluded)
        files[:] = self.files
        transfer.total = sum(entry.size for entry in files)
        links = self.links(transfer)
        part.accept(files, folder=True)
        self._drop_unchanged(transfer, part, different)
        files[:] = self.files
        transfer.total = sum(entry.size for entry in files)
        part.begin(self.entries)
        return links

    def _drop_unchanged(self, transfer: Transfer, part: LocalPart, different: Different) -> None:
        """Drop the files that the target has already, if ``skip_unchanged`` asks for that."""
        how = transfer.options.skip_unchanged
        has_links = any(entry.kind == "l" for entry in self.entries)
        if not how or (transfer.options.symlinks == "follow" and has_links):
            return  # what a link leads to has to come
        same = [entry for entry in self.files if part.has_same(entry, how is True)]
        if how is not True and same:
            others = {entry.name for entry in different(same)}
            same = [entry for entry in same if entry.name not in others]
        names = {entry.name for entry in same}
        self.entries = [e for e in self.entries if e.kind != "f" or e.name not in names]
        transfer.unchanged = len(names)
        part.accept(self.files, folder=True)

    def links(self, transfer: Transfer) -> list[FileEntry]:
        """Return the symlinks to transfer, and report what is left out."""
        for name in self.odd:
            transfer.leave_out(name, "it is not a file")
        links = [entry for entry in self.entries if entry.kind == "l"]
        if transfer.options.symlinks != "skip":
            return links
        for entry in links:
            transfer.leave_out(entry.name, "a symlink")
        self.entries = [entry for entry in self.entries if entry.kind != "l"]
        return []

    def take(self, mode: int, size: int, seconds: int, name: bytes) -> None:
        """Add an entry of the listing."""
        kind = kind_of(mode)
        entry = FileEntry(name, size, nanoseconds(seconds), mode & 0o777, kind or "f")
        if not name:
            self.root = entry
            return
        checked_name(name)
        if name in self._names or name.rpartition(b"/")[0] not in self._folders:
            raise SSHError(f"the machine lists {printable(repr(name), 120)} in a wrong place")
        self._names.add(name)
        if kind == "d":
            self._folders.add(name)
        if not kind:
            self.odd.append(name)
        else:
            self.entries.append(entry)


def begin_file(
    transfer: Transfer, part: LocalPart, entry: FileEntry, files: list[FileEntry],
    different: Different,
) -> bool:  # fmt: skip
    """Check and begin the download of a single file; return False if the target is the same."""
    files[:] = [entry]
    transfer.total = entry.size
    part.accept(files, folder=False)
    how = transfer.options.skip_unchanged
    if how and part.has_same(entry, how is True) and (how is True or not different(files)):
        files.clear()
        transfer.unchanged = 1
        return False
    part.begin([entry])
    return True


def make_links(
    part: LocalPart, transfer: Transfer, links: list[FileEntry], tree: RemoteTree
) -> None:
    """Create the symlinks that lead to something in the tree, or copies of it."""
    entries = {entry.name: entry for entry in tree.entries}
    for link in links:
        target, hops = link, 0
        while target.kind == "l" and hops < 40:
            within, hops = link_target(target.name, target.link), hops + 1
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
