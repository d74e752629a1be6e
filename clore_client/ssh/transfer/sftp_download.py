"""Download over SFTP."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.ssh.transfer.digests import DIFFERS
from clore_client.ssh.transfer.entry import (
    MAX_LEVELS,
    FileEntry,
    about,
    check_unchanged,
    file_digest,
    nanoseconds,
)
from clore_client.ssh.transfer.local_part import LocalPart, write_piece
from clore_client.ssh.transfer.remote_tree import RemoteTree, make_links
from clore_client.ssh.transfer.sftp import sftp_session
from clore_client.ssh.transfer.transfer import Transfer

MAX_LISTED = 500_000  # files in a directory


class SftpDownload:
    """One download over SFTP."""

    def __init__(self, transfer: Transfer, part: LocalPart) -> None:
        self._transfer = transfer
        self._options: Any = transfer.options
        self._part = part

    def run(self, files: list[FileEntry]) -> None:
        """Download, and add to ``files`` what there is."""
        files.clear()
        with sftp_session(self._transfer) as self._remote:
            source = self._remote.absolute(self._options.source).rstrip(b"/") or b"/"
            self._source = source
            found = self._remote.look(source)
            if found is None:
                raise SSHError("there is no such file")
            if stat.S_ISDIR(found.st_mode):
                self._get_tree(source, found, files)
            elif stat.S_ISREG(found.st_mode):
                entry = _entry_of(b"", found)
                files.append(entry)
                self._part.accept(files, folder=False)
                self._transfer.total = entry.size
                if self._is_unchanged(entry):
                    files.clear()
                    self._transfer.unchanged = 1
                    return
                self._part.begin([entry])
                self._get_file(entry, source)
                self._part.install_file(entry)
            else:
                raise SSHError("it is neither a file nor a directory")

    def _get_tree(self, source: bytes, found: Any, files: list[FileEntry]) -> None:
        tree = RemoteTree()
        tree.take(found.st_mode, 0, int(found.st_mtime), b"")
        self._walk(source, b"", tree, 0)
        tree.exclude(self._options.excluded)
        files += tree.files
        links = tree.links(self._transfer)
        for link in links:
            link.link = os.fsencode(self._remote.sftp.readlink(source + b"/" + link.name) or "")
        self._part.accept(files, folder=True)
        tree.drop_unchanged(self._transfer, self._part, self._different)
        files[:] = tree.files
        self._transfer.total = sum(entry.size for entry in files)
        self._part.begin(tree.entries)
        for entry in files:
            with about(entry):
                self._get_file(entry, source + b"/" + entry.name)
        make_links(self._part, self._transfer, links, tree)
        self._part.install_tree(tree.root, tree.entries)

    def _walk(self, source: bytes, folder: bytes, tree: RemoteTree, level: int) -> None:
        if level > MAX_LEVELS:
            raise SSHError(f"the machine names more than {MAX_LEVELS} nested directories")
        place = source + b"/" + folder if folder else source
        # Read the whole listing before the next request: paramiko requests some of it ahead.
        listed = list(itertools.islice(self._remote.sftp.listdir_iter(place), MAX_LISTED + 1))
        if len(listed) > MAX_LISTED:
            raise SSHError(f"the machine lists more than {MAX_LISTED} files in a directory")
        for found in listed:
            name = os.fsencode(found.filename)
            if b"/" in name:
                raise SSHError(f"the machine names a file {printable(repr(name), 120)}")
            inner = folder + b"/" + name if folder else name
            if None in (found.st_mode, found.st_size, found.st_mtime):
                raise SSHError("the machine sends no size, time or mode of a file")
            tree.take(found.st_mode, found.st_size, int(found.st_mtime), inner)
            if stat.S_ISDIR(found.st_mode):
                self._walk(source, inner, tree, level + 1)

    def _is_unchanged(self, entry: FileEntry) -> bool:
        """Compare a single file with its target, if that was asked for."""
        how = self._options.skip_unchanged
        if not how or not self._part.has_same(entry, how is True):
            return False
        return how is True or not self._different([entry])

    def _different(self, files: list[FileEntry]) -> list[FileEntry]:
        """Return those of the files whose content differs from that of their targets."""
        return [
            entry
            for entry in files
            if self._content_differs(self._part.target_of(entry), entry, self._place(entry))
        ]

    def _content_differs(self, here: str | Path, entry: FileEntry, there: bytes) -> bool:
        return self._remote.digest(there, entry.size) != file_digest(here, 0, entry.size)

    def _place(self, entry: FileEntry) -> bytes:
        return self._source + b"/" + entry.name if entry.name else self._source

    def _get_file(self, entry: FileEntry, source: bytes) -> None:
        part, remote = self._part, self._remote
        earlier = part.earlier(entry)
        with remote.sftp.open(source, "rb") as file, part.open(entry) as out:
            for start, length in part.missing(entry):
                out.seek(start)
                at = start
                try:
                    for piece in remote.pieces(file, start, start + length):
                        write_piece(out, piece)
                        at += len(piece)
                        self._transfer.moved(entry, len(piece))
                finally:
                    part.note(entry, start, at)
            out.truncate(entry.size)
        if not entry.size:
            self._transfer.moved(entry, 0)
        found = remote.look(source)
        check_unchanged(entry, None if found is None else _entry_of(b"", found))
        # After a resumed download too only with verify: it costs as much as to receive it again.
        if self._options.verify and self._content_differs(part.place(entry), entry, source):
            part.clear()
            raise SSHError(DIFFERS)
        for _, length in earlier:
            self._transfer.count(entry, length)


def _entry_of(name: bytes, found: Any) -> FileEntry:
    mtime = nanoseconds(int(found.st_mtime))
    kind = "f" if stat.S_ISREG(found.st_mode) else "d"
    return FileEntry(name, int(found.st_size), mtime, found.st_mode & 0o777, kind)
