"""Check the listing of a directory on a host, and compare it with what is here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, Protocol

from clore_client.errors import SSHError, printable
from clore_client.ssh.transfer.entry import (
    Excludes,
    FileEntry,
    LocalTree,
    about,
    checked_name,
    file_digest,
    kind_of,
    link_target,
    nanoseconds,
    whole_seconds,
)
from clore_client.ssh.transfer.local_part import LocalPart
from clore_client.ssh.transfer.scripts import (
    CHUNK_DIGESTS,
    FILE_DIGESTS,
    LIST_TARGET,
    MAX_ANSWER,
    REMOVE,
    TARGET,
    different_chunks,
    different_files,
    parse_listing,
    script_text,
)
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
    if len(tree.entries) + len(copies) > MAX_TARGET_FILES:
        raise SSHError(f"its copies are more than {MAX_TARGET_FILES} files")
    tree.entries += copies
    shutil.copytree(part.place(target), part.place(link))


MAX_TARGET_FILES = 2_000_000


class Target(Protocol):
    """The target of an upload, with the host's shell or over SFTP."""

    def listing(self) -> tuple[bytes, RemoteTree]:
        """Return the path of the target, and what is there."""

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        """Return those of the files whose content differs there."""

    def remove(self, files: list[bytes], folders: list[bytes]) -> None:
        """Remove files, and directories if they are empty, in this order."""


class Comparison:
    """What ``skip_unchanged``, ``preview`` and ``delete`` of one upload need to know.

    Attributes:
        path: of the target.
        deletes: the names that only the target has, deepest first; None unless asked for.
    """

    def __init__(self, transfer: Transfer, tree: LocalTree, target: Target) -> None:
        self._options: Any = transfer.options
        self._target = target
        self.path, found = target.listing()
        self._there = found.by_name
        self.deletes: list[bytes] | None = None
        if self._options.delete is not False:
            self.deletes = self._only_there(tree)
        if self._options.skip_unchanged:
            self._drop_unchanged(transfer, tree)
        transfer.deletes = self.deletes

    def finish(self) -> None:
        """Remove what only the target has, once all has been sent."""
        if self.deletes:
            folders = [name for name in self.deletes if self._there[name].kind == "d"]
            files = [name for name in self.deletes if self._there[name].kind != "d"]
            self._target.remove(files, folders)

    def _drop_unchanged(self, transfer: Transfer, tree: LocalTree) -> None:
        by_time = self._options.skip_unchanged is True
        same = [entry for entry in tree.files if self._looks_same(entry, by_time)]
        if not by_time and same:
            different = {entry.name for entry in self._target.different(same)}
            same = [entry for entry in same if entry.name not in different]
        names = {entry.name for entry in same}
        tree.entries = [e for e in tree.entries if e.kind != "f" or e.name not in names]
        transfer.unchanged = len(names)
        transfer.total = sum(entry.size for entry in tree.files)

    def _looks_same(self, entry: FileEntry, by_time: bool) -> bool:
        found = self._there.get(entry.name)
        if found is None or found.kind != "f" or found.size != entry.size:
            return False
        return not by_time or whole_seconds(found.mtime) == whole_seconds(entry.mtime)

    def _only_there(self, tree: LocalTree) -> list[bytes]:
        """Return what only the target has, without what is excluded or was left out here."""
        here = {entry.name for entry in tree.entries}
        left_out = {name for name, _ in tree.left_out}
        kept: set[bytes] = {b""}
        for name, entry in self._there.items():
            parts = name.split(b"/")
            above = [b"/".join(parts[:n]) for n in range(1, len(parts))]
            if (
                name in here
                or not left_out.isdisjoint([*above, name])
                or self._is_excluded(entry, above)
            ):
                kept.update(above, [name])
        listed = self._options.delete
        wanted = None if listed is True else set(listed)
        names = [n for n in self._there if n not in kept and (wanted is None or n in wanted)]
        return sorted(names, reverse=True)

    def _is_excluded(self, entry: FileEntry, above: list[bytes]) -> bool:
        excluded = self._options.excluded
        if excluded is None:
            return False
        return excluded(entry.name, entry.kind == "d") or any(excluded(n, True) for n in above)


class ShellTarget:
    """The target of an upload on a host with a shell."""

    def __init__(self, transfer: Transfer, tree: LocalTree, values: dict[str, Any]) -> None:
        self._transfer = transfer
        self._tree = tree
        self._values = dict(values, look=1)

    def listing(self) -> tuple[bytes, RemoteTree]:
        tree = RemoteTree()
        with self._script("look", LIST_TARGET) as script:
            path = script.answer(b"target")
            text = script.until(self._values["token"].encode(), MAX_ANSWER)
            parse_listing(text, MAX_TARGET_FILES, tree.take)
        return path, tree

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        body = TARGET + "path=$f\n"
        if not self._tree.is_folder:
            (entry,) = files
            with self._script("digests", body + CHUNK_DIGESTS) as script:
                return list(different_chunks(script, [(entry, 0, entry.size)], self._tree.place))
        with self._script("digests", body + FILE_DIGESTS) as script:
            return list(different_files(script, files, self._tree.place))

    def remove(self, files: list[bytes], folders: list[bytes]) -> None:
        for what, names in (("f", files), ("d", folders)):
            if names:
                with self._script("remove", REMOVE, what=what) as script:
                    script.send(b"".join(b"./" + name + b"\0" for name in names))
                    script.end()
                    script.answer(b"removed")

    def _script(self, verb: str, body: str, **values: Any) -> Any:
        text = script_text(verb, body, **self._values, **values)
        return self._transfer.script(self._transfer.pool.ssh, text)


class SftpTarget:
    """The target of an upload over SFTP.

    Parameters:
        remote: a :class:`RemoteFiles`.
        path: the absolute path of the target.
    """

    def __init__(self, remote: Any, tree: LocalTree, path: bytes) -> None:
        self._remote = remote
        self._tree = tree
        self._path = path

    def listing(self) -> tuple[bytes, RemoteTree]:
        return self._path, self._remote.tree(self._path, self._tree.is_folder)

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        return [
            entry
            for entry in files
            if self._remote.digest(self._place(entry.name), entry.size) != self._digest(entry)
        ]

    def remove(self, files: list[bytes], folders: list[bytes]) -> None:
        for name in files:
            self._remote.sftp.remove(self._place(name))
        for name in folders:
            try:
                self._remote.sftp.rmdir(self._place(name))
            except OSError:  # something is in it by now
                continue

    def _place(self, name: bytes) -> bytes:
        return self._path.rstrip(b"/") + b"/" + name if name else self._path

    def _digest(self, entry: FileEntry) -> str:
        return file_digest(self._tree.place(entry), 0, entry.size)
