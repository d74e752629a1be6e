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
    BLOCK,
    MAX_LEVELS,
    FileEntry,
    LocalTree,
    about,
    check_unchanged,
    file_digest,
    kind_of,
    nanoseconds,
    record_key,
)
from clore_client.ssh.transfer.local_part import PART, LocalPart, write_piece
from clore_client.ssh.transfer.remote_tree import (
    Comparison,
    RemoteTree,
    SftpTarget,
    begin_file,
    make_links,
)
from clore_client.ssh.transfer.scripts import DIFFERS, MAX_ANSWER
from clore_client.ssh.transfer.transfer import Transfer, is_content
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


class SftpUpload:
    """One upload over SFTP."""

    def __init__(self, transfer: Transfer, tree: LocalTree) -> None:
        self._transfer = transfer
        self._options: Any = transfer.options
        self._tree = tree
        self._confirmed = self._unconfirmed = 0  # bytes

    def run(self) -> bytes:
        """Upload, and return the path on the host."""
        with sftp_session(self._transfer) as self._remote:
            target = self._target()
            comparison = None
            if self._options.compares:
                place = SftpTarget(self._remote, self._tree, target)
                comparison = Comparison(self._transfer, self._tree, place)
                if self._options.preview or not (self._tree.is_folder or self._tree.files):
                    return target
            self._make_parents(target)
            whole = os.path.abspath(self._tree.path)
            same = record_key(("sftp", target, whole, self._options.remote))[:20]
            token = same if self._options.resume else os.urandom(10).hex()
            part = posixpath.dirname(target).rstrip(b"/") + b"/" + PART.encode() + token.encode()
            try:
                with self._recording(part):
                    self._send_all(part)
                self._install(part, target)
                if self._options.resume:
                    self._remote.remove(part + b".done")
            except BaseException:
                if not self._options.resume:
                    with contextlib.suppress(SSHError, *connection_errors()):
                        self._remote.remove(part)
                raise
            if comparison is not None:
                comparison.finish()
            return target

    def _target(self) -> bytes:
        """Check the target, and return its path."""
        remote, is_folder = self._remote, self._tree.is_folder
        path = remote.absolute(self._options.source)
        name = os.path.basename(os.path.abspath(self._tree.path))
        if is_folder:
            inside = not is_content(self._options.local)
        else:
            inside = path.endswith(b"/") or remote.kind(path) == "d"
        path = path.rstrip(b"/") or b"/"
        if inside:
            path = path.rstrip(b"/") + b"/" + name
        kind = remote.kind(path)
        if kind != "d" and remote.kind(path, follow=False) == "l":
            if self._options.symlinks != "follow" or not kind:
                raise SSHError(
                    f"{os.fsdecode(path)} is a symlink: remove it, or pass symlinks='follow'"
                )
            path = os.fsencode(remote.sftp.normalize(path))
        if kind and (kind == "d") != is_folder:
            raise SSHError(f"{os.fsdecode(path)} is {'not ' if is_folder else ''}a directory")
        if kind == "other":
            raise SSHError(f"{os.fsdecode(path)} is neither a file nor a directory")
        return path

    def _make_parents(self, target: bytes) -> None:
        missing = []
        folder = posixpath.dirname(target)
        while (kind := self._remote.kind(folder)) != "d":
            if kind:
                raise SSHError(f"{os.fsdecode(folder)} is not a directory")
            missing.append(folder)
            folder = posixpath.dirname(folder)
        for folder in missing[::-1]:
            self._remote.sftp.mkdir(folder)

    @contextlib.contextmanager
    def _recording(self, part: bytes) -> Iterator[None]:
        """With ``resume``, keep a record of which files were begun; start over if others were."""
        self._begun: set[bytes] = set()
        self._record: Any = None
        if not self._options.resume:
            yield
            return
        record, sftp = part + b".done", self._remote.sftp
        if self._remote.look(record) is not None:
            with sftp.open(record, "rb") as file:
                self._begun = set(file.read(MAX_ANSWER).split())
        if not self._begun <= {record_key(e.version).encode() for e in self._tree.files}:
            self._begun.clear()
        if not self._begun:
            self._remote.remove(part)
        with sftp.open(record, "ab" if self._begun else "wb") as self._record:
            yield

    def _send_all(self, part: bytes) -> None:
        sftp = self._remote.sftp
        if self._tree.is_folder:
            if not self._options.preserve:
                self._apply_umask(part)
            if not self._remote.kind(part):
                sftp.mkdir(part, 0o700)
            for entry in self._tree.entries:
                place = part + b"/" + entry.name
                if entry.kind == "d" and not self._remote.kind(place):
                    sftp.mkdir(place, 0o700)
                elif entry.kind == "l":
                    self._remote.remove(place)
                    sftp.symlink(entry.link, place)
        for entry in self._tree.files:
            with about(entry):
                self._send_file(entry, part + b"/" + entry.name if entry.name else part)

    def _apply_umask(self, part: bytes) -> None:
        """Apply the host's umask to the modes of directories; it shows in that of a new one."""
        probe = part + b"." + os.urandom(4).hex().encode()
        self._remote.sftp.mkdir(probe)
        mask = stat.S_IMODE(self._remote.look(probe).st_mode)
        self._remote.sftp.rmdir(probe)
        self._tree.mode &= mask
        for entry in self._tree.entries:
            if entry.kind == "d":
                entry.mode &= mask

    def _send_file(self, entry: FileEntry, place: bytes) -> None:
        remote, start = self._remote, 0
        key = record_key(entry.version).encode()
        if key in self._begun and (found := remote.look(place, follow=False)) is not None:
            size = int(found.st_size)
            if size <= entry.size:  # else it is not what an earlier upload has sent
                start = size if size == entry.size else size - size % BLOCK
        elif self._record is not None:
            self._record.write(key + b"\n")
        with remote.sftp.open(place, "r+b" if start else "wb") as file:
            created = stat.S_IMODE((self._record or file).stat().st_mode or 0)
            file.chmod(0o600)
            file.seek(start)
            for piece in self._tree.pieces(entry, start, entry.size - start):
                for at in range(0, len(piece), SFTP_PACKET):
                    self._write(file, bytes(piece[at : at + SFTP_PACKET]))
                self._transfer.moved(entry, len(piece))
        if start or not entry.size:
            self._transfer.moved(entry, start)
        self._confirmed += start
        self._check(entry, place)
        if not self._options.preserve:  # apply the host's umask
            entry.mode &= created | (created & 0o444) >> 2

    def _write(self, file: Any, packet: bytes) -> None:
        """Write; wait for the answers to all earlier writes where too much is unconfirmed."""
        self._unconfirmed += len(packet)
        waits = self._unconfirmed >= self._transfer.ahead(self._confirmed)
        file.set_pipelined(not waits)
        file.write(packet)
        if waits:
            self._confirmed += self._unconfirmed
            self._unconfirmed = 0

    def _check(self, entry: FileEntry, place: bytes) -> None:
        size = self._remote.look(place).st_size
        if size != entry.size:
            raise SSHError(f"{size} of {entry.size} bytes arrived")
        if self._options.verify:
            here = file_digest(self._tree.place(entry), 0, entry.size)
            if self._remote.digest(place, entry.size) != here:
                self._remote.remove(place)
                raise SSHError(DIFFERS)

    def _install(self, part: bytes, target: bytes) -> None:
        remote, tree = self._remote, self._tree
        exists = bool(remote.kind(target))
        if exists and tree.is_folder:
            for entry in tree.entries:
                self._check_place(entry, target + b"/" + entry.name)
        for entry in tree.entries[::-1]:
            place = part + b"/" + entry.name if entry.name else part
            instead = target + b"/" + entry.name if entry.name else target
            if entry.kind != "l" and not (entry.kind == "d" and exists):
                self._finish(entry, place, instead if exists else b"")
        if tree.is_folder and not exists:
            self._finish(FileEntry(b"", 0, tree.mtime, tree.mode, "d"), part, b"")
        if not tree.is_folder or not exists:
            remote.replace(part, target)
            return
        for entry in tree.entries:
            place, instead = part + b"/" + entry.name, target + b"/" + entry.name
            if entry.kind == "d":
                if not remote.kind(instead):
                    remote.sftp.mkdir(instead, 0o700)
                    remote.sftp.chmod(instead, entry.mode | 0o700)
            else:
                remote.replace(place, instead)
        remote.remove(part)

    def _check_place(self, entry: FileEntry, place: bytes) -> None:
        """Check what stands in the place of an entry before anything is installed."""
        kind = self._remote.kind(place, follow=False)
        if kind == "l" and entry.kind != "l":
            if self._options.symlinks != "follow":
                raise SSHError(f"{os.fsdecode(place)} is a symlink")
            kind = self._remote.kind(place)
        if kind and (kind == "d") != (entry.kind == "d"):
            raise SSHError(f"{os.fsdecode(place)} is {'' if kind == 'd' else 'not '}a directory")

    def _finish(self, entry: FileEntry, place: bytes, instead: bytes) -> None:
        mode, found = entry.mode, self._remote.look(instead) if instead else None
        if not self._options.preserve and found is not None:
            mode = stat.S_IMODE(found.st_mode)
        self._remote.sftp.chmod(place, mode)
        if self._options.preserve:
            self._remote.sftp.utime(place, (entry.mtime // 10**9, entry.mtime // 10**9))
