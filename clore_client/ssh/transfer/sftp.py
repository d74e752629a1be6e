"""Use SFTP where a host has no usual shell, and download: slower, with the same checks."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import posixpath
import stat
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.ssh.transfer.entry import (
    MAX_LEVELS,
    FileEntry,
    about,
    check_unchanged,
    file_digest,
    kind_of,
    nanoseconds,
)
from clore_client.ssh.transfer.local_part import LocalPart, write_piece
from clore_client.ssh.transfer.remote_tree import RemoteTree, begin_file, make_links
from clore_client.ssh.transfer.scripts import DIFFERS
from clore_client.ssh.transfer.transfer import Transfer
from clore_client.ssh.transport import (
    PARAMIKO_LOGGER,
    LimitedChannel,
    NoChannelError,
    connection_errors,
    reason,
)

SFTP_PACKET = 32768  # bytes of one request
SFTP_AHEAD = 64  # requests that wait for their answers
MAX_SFTP_PACKET = 2**20  # bytes of one answer
SFTP_PATIENCE = 10.0  # seconds for a host to free the channel of an earlier script


class SftpChannel(LimitedChannel):
    """A channel for paramiko's SFTP client."""

    def recv(self, size: int) -> bytes:
        if size > MAX_SFTP_PACKET:
            raise SSHError(f"the machine sends a packet of {size} bytes")
        return super().recv(size)

    def get_name(self) -> str:
        """Return a name for paramiko's log."""
        return "sftp"


def open_channel(transfer: Transfer) -> SftpChannel:
    """Open a channel for SFTP."""
    transport = transfer.pool.ssh.get_transport()
    deadline = time.monotonic() + min(SFTP_PATIENCE, transfer.timeout)
    while True:
        try:
            channel = SftpChannel(transport, transfer.timeout, transfer.watchdog)
            channel.invoke_subsystem("sftp")
            return channel
        except NoChannelError:
            if time.monotonic() >= deadline or transfer.stopped.wait(0.1):
                raise


@contextlib.contextmanager
def sftp_session(transfer: Transfer) -> Iterator[RemoteFiles]:
    """Open an SFTP session for a block."""
    import paramiko

    channel: Any = open_channel(transfer)
    failures: tuple[type[Exception], ...] = (ValueError, *connection_errors())
    try:
        try:
            sftp = paramiko.SFTPClient(channel)
        except failures as error:
            raise SSHError(
                f"the machine has neither a usual shell nor SFTP: {reason(error)}"
            ) from error
        sftp.logger = logging.getLogger(PARAMIKO_LOGGER)  # it logs names without escaping them
        try:
            yield RemoteFiles(sftp)
        except (UnicodeError, ValueError, TypeError) as error:  # from paramiko, for odd answers
            raise SSHError(f"the machine sent an answer that can't be read: {reason(error)}") from (
                error
            )
    finally:
        channel.close()


class ReadAnswers(dict[int, bytes]):
    """The answers to requests for data, by the numbers of the requests."""

    def _async_response(self, kind: int, message: Any, number: int) -> None:  # paramiko's name
        from paramiko.sftp import CMD_DATA

        self[number] = message.get_string() if kind == CMD_DATA else b""


class RemoteFiles:
    """The files of a host, over SFTP."""

    def __init__(self, sftp: Any) -> None:
        self.sftp = sftp

    def absolute(self, path: bytes) -> bytes:
        """Return the absolute path of one that may be below the home directory."""
        home: bytes = os.fsencode(self.sftp.normalize("."))
        return posixpath.normpath(posixpath.join(home, path)) + b"/" * path.endswith(b"/")

    def look(self, path: bytes, follow: bool = True) -> Any:
        """Return the attributes of a path, or None if it does not exist."""
        try:
            found = self.sftp.stat(path) if follow else self.sftp.lstat(path)
        except FileNotFoundError:
            return None
        if found.st_mode is None or found.st_size is None or found.st_mtime is None:
            raise SSHError("the machine sends no size, time or mode of a file")
        return found

    def kind(self, path: bytes, follow: bool = True) -> str:
        """Return "f", "d", "l", "other", or "" if the path does not exist."""
        found = self.look(path, follow)
        return "" if found is None else kind_of(found.st_mode) or "other"

    def tree(self, path: bytes, is_folder: bool = True) -> RemoteTree:
        """Return what a path is, and with ``is_folder`` what is below it."""
        tree, found = RemoteTree(), self.look(path)
        if found is not None:
            tree.take(found.st_mode, found.st_size, int(found.st_mtime), b"")
            if is_folder and stat.S_ISDIR(found.st_mode):
                self._walk(path, b"", tree, 0)
        return tree

    def _walk(self, top: bytes, folder: bytes, tree: RemoteTree, level: int) -> None:
        if level > MAX_LEVELS:
            raise SSHError(f"the machine names more than {MAX_LEVELS} nested directories")
        place = top + b"/" + folder if folder else top
        # Read the whole listing before the next request: paramiko requests some of it ahead.
        listed = list(itertools.islice(self.sftp.listdir_iter(place), MAX_LISTED + 1))
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
                self._walk(top, inner, tree, level + 1)

    def pieces(self, file: Any, start: int, end: int) -> Iterator[bytes]:
        """Yield a range of a file, with several requests at a time.

        paramiko's ``readv`` may request data twice, and its thread prints what it dies of.
        """
        from paramiko.sftp import CMD_READ, int64

        answers = ReadAnswers()
        waiting: deque[tuple[int, int]] = deque()
        while start < end or waiting:
            while start < end and len(waiting) < SFTP_AHEAD:
                size = min(SFTP_PACKET, end - start)
                request = (CMD_READ, file.handle, int64(start), size)
                try:
                    waiting.append((self.sftp._async_request(answers, *request), size))
                except connection_errors():
                    if not waiting:
                        raise
                    break  # first read what has arrived
                start += size
            number, size = waiting.popleft()
            while number not in answers:
                self.sftp._read_response()
            piece = answers.pop(number)
            if len(piece) != size:
                raise SSHError(f"a part of {size} bytes is missing")
            yield piece

    def digest(self, path: bytes, size: int) -> str:
        """Return the SHA-256 of a file."""
        digest = hashlib.sha256()
        with self.sftp.open(path, "rb") as file:
            for piece in self.pieces(file, 0, size):
                digest.update(piece)
        return digest.hexdigest()

    def remove(self, path: bytes) -> None:
        """Remove a file or a directory, if it exists."""
        kind = self.kind(path, follow=False)
        if kind != "d":
            if kind:
                self.sftp.remove(path)
            return
        for entry in self.sftp.listdir_attr(path):
            self.remove(path + b"/" + os.fsencode(entry.filename))
        self.sftp.rmdir(path)

    def replace(self, source: bytes, target: bytes) -> None:
        """Rename a file over another one."""
        try:
            self.sftp.posix_rename(source, target)
        except OSError:  # not every server can
            if self.kind(target, follow=False):
                self.sftp.remove(target)
            self.sftp.rename(source, target)


MAX_LISTED = 500_000  # files in a directory


class SftpDownload:
    """One download over SFTP."""

    def __init__(self, transfer: Transfer, part: LocalPart) -> None:
        self._transfer = transfer
        self._options: Any = transfer.options
        self._part = part

    def run(self, files: list[FileEntry]) -> None:
        """Download, and add to ``files`` what there is."""
        with sftp_session(self._transfer) as self._remote:
            source = self._remote.absolute(self._options.source).rstrip(b"/") or b"/"
            self._source = source
            found = self._remote.look(source)
            if found is None:
                raise SSHError("there is no such file")
            if stat.S_ISDIR(found.st_mode):
                self._get_tree(source, files)
            elif stat.S_ISREG(found.st_mode):
                entry = _entry_of(b"", found)
                if begin_file(self._transfer, self._part, entry, files, self._different):
                    self._get_file(entry, source)
                    self._part.install_file(entry)
            else:
                raise SSHError("it is neither a file nor a directory")

    def _get_tree(self, source: bytes, files: list[FileEntry]) -> None:
        tree = self._remote.tree(source)
        links = tree.begin(self._transfer, self._part, files, self._different)
        for link in links:
            link.link = os.fsencode(self._remote.sftp.readlink(source + b"/" + link.name) or "")
        for entry in files:
            with about(entry):
                self._get_file(entry, source + b"/" + entry.name)
        make_links(self._part, self._transfer, links, tree)
        self._part.install_tree(tree.root, tree.entries)

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
