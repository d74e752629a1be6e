"""Compare a tree here with its target on a machine: what is unchanged, what only the target has."""

from __future__ import annotations

from typing import Any, Protocol

from clore_client.ssh.transfer.entry import (
    FileEntry,
    file_digest,
    whole_seconds,
)
from clore_client.ssh.transfer.local_tree import LocalTree
from clore_client.ssh.transfer.remote_tree import RemoteTree
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
