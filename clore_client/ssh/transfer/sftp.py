"""Transfer files over SFTP if a host has no usual shell: slower, with the same checks."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError
from clore_client.ssh.transfer.entry import (
    BLOCK,
    Excludes,
    FileEntry,
    LocalTree,
    RemoteTree,
    about,
    check_unchanged,
    file_digest,
    part_token,
    record_key,
    remote_entry,
)
from clore_client.ssh.transfer.local_part import PART, LocalPart, write_piece
from clore_client.ssh.transfer.scripts import DIFFERS
from clore_client.ssh.transfer.transfer import Transfer
from clore_client.ssh.transport import (
    PARAMIKO_LOGGER,
    LimitedChannel,
    connection_errors,
    reason,
    with_patience,
)

SFTP_REQUEST = 255 * 1024  # bytes to read or write with one request; the most that OpenSSH accepts
MAX_SFTP_PACKET = 2**20  # bytes of one answer
SFTP_PATIENCE = 10.0  # seconds for a host to free the channel of an earlier script
MAX_LISTED = 500_000  # files in a directory


class SftpChannel(LimitedChannel):
    """Limit the waits and the memory of paramiko's SFTP client."""

    def recv(self, size: int) -> bytes:
        if size > MAX_SFTP_PACKET:
            self.close()  # else paramiko would read on, to close its file
            raise SSHError(f"the host sends a packet of {size} bytes")
        return super().recv(size)


@contextlib.contextmanager
def sftp_session(transfer: Transfer) -> Iterator[RemoteFiles]:
    """Open an SFTP session for a block."""
    import paramiko

    def once() -> SftpChannel:
        transport = transfer.pool.ssh.get_transport()
        channel = SftpChannel(transport, transfer.timeout, transfer.watchdog)
        channel.invoke_subsystem("sftp")
        return channel

    unreadable = (paramiko.SFTPError, UnicodeError, ValueError, TypeError)
    failures: tuple[type[Exception], ...] = (*unreadable, *connection_errors())
    with contextlib.closing(with_patience(min(SFTP_PATIENCE, transfer.timeout), once)) as channel:
        try:
            sftp = paramiko.SFTPClient(channel)
        except failures as error:
            text = f"the host has neither a usual shell nor SFTP: {reason(error)}"
            raise SSHError(text) from error
        sftp.logger = logging.getLogger(PARAMIKO_LOGGER)  # it logs names without escaping them
        try:
            yield RemoteFiles(sftp)
        except unreadable as error:
            text = f"the host sent an answer that can't be read: {reason(error)}"
            raise SSHError(text) from error


class RemoteFiles:
    """Read and change the files of a host over SFTP."""

    def __init__(self, sftp: Any) -> None:
        self.sftp = sftp

    def absolute(self, path: bytes) -> bytes:
        """Convert a path, which may be below the home directory, to an absolute one."""
        home: bytes = os.fsencode(self.sftp.normalize("."))
        return posixpath.normpath(posixpath.join(home, path)) + b"/" * path.endswith(b"/")

    def look(self, path: bytes, follow: bool = True) -> FileEntry | None:
        """Return the entry at a path, or None if it does not exist."""
        try:
            return _entry(b"", self.sftp.stat(path) if follow else self.sftp.lstat(path))
        except FileNotFoundError:
            return None

    def kind(self, path: bytes, follow: bool = True) -> str:
        """Return "f", "d", "l", "other", or "" if the path does not exist."""
        found = self.look(path, follow)
        return "" if found is None else found.kind

    def tree(self, path: bytes, excludes: Excludes) -> RemoteTree:
        """Return the entry at a path, and all entries below it."""
        tree, found = RemoteTree(excludes), self.look(path)
        if found is None:
            return tree
        tree.add(found)
        folders = [b""] if found.kind == "d" else []
        while folders:
            folder = folders.pop()
            for entry in self._listed(_join(path, folder)):
                entry.name = folder + b"/" + entry.name if folder else entry.name
                tree.add(entry)  # which limits the levels
                if entry.kind == "d":
                    folders.append(entry.name)
        return tree

    def _listed(self, folder: bytes) -> list[FileEntry]:
        """Return the entries of a directory."""
        # Read the whole listing before the next request: paramiko requests some of it ahead.
        listed = list(itertools.islice(self.sftp.listdir_iter(folder), MAX_LISTED + 1))
        if len(listed) > MAX_LISTED:
            raise SSHError(f"the host lists more than {MAX_LISTED} files in a directory")
        return [_entry(os.fsencode(found.filename), found) for found in listed]

    def open(self, path: bytes, mode: str) -> Any:
        """Open a file for large requests."""
        file = self.sftp.open(path, mode)
        file.MAX_REQUEST_SIZE = SFTP_REQUEST
        return file

    def pieces(self, file: Any, start: int, end: int) -> Iterator[bytes]:
        """Yield a range of an open file."""
        file.seek(start)
        for at in range(start, end, SFTP_REQUEST):
            size = min(SFTP_REQUEST, end - at)
            piece = file.read(size)
            if len(piece) != size:
                raise SSHError(f"{size - len(piece)} bytes are missing")
            yield piece

    def differs(self, entry: FileEntry, path: bytes, here: str | Path) -> bool:
        """Return whether the SHA-256 of a file differs from that of a local file."""
        digest = hashlib.sha256()
        with self.open(path, "rb") as file:
            for piece in self.pieces(file, 0, entry.size):
                digest.update(piece)
        return digest.hexdigest() != file_digest(here, 0, entry.size)

    def make_folders(self, folder: bytes) -> None:
        """Create a directory with its parents, if it is missing."""
        kind = self.kind(folder)
        if not kind:
            self.make_folders(posixpath.dirname(folder))
            self.sftp.mkdir(folder)
        elif kind != "d":
            raise SSHError(f"{os.fsdecode(folder)} is not a directory")

    def replace(self, source: bytes, target: bytes) -> None:
        """Rename a file over another one."""
        try:
            self.sftp.posix_rename(source, target)
        except OSError as error:
            if error.errno is not None:  # else the server may lack this extension
                raise
            if self.kind(target, follow=False):
                self.sftp.remove(target)
            self.sftp.rename(source, target)

    def remove(self, path: bytes) -> None:
        """Remove a file or a directory, if it exists."""
        kind = self.kind(path, follow=False)
        if kind == "d":
            for entry in self._listed(path):
                self.remove(_join(path, entry.name))
            self.sftp.rmdir(path)
        elif kind:
            self.sftp.remove(path)


def _entry(name: bytes, found: Any) -> FileEntry:
    """Check the attributes of a file that a host sent."""
    if None in (found.st_mode, found.st_size, found.st_mtime):
        raise SSHError("the host sends no size, time or mode of a file")
    return remote_entry(name, found.st_mode, int(found.st_size), int(found.st_mtime))


def _join(path: bytes, name: bytes) -> bytes:
    return path.rstrip(b"/") + b"/" + name if name else path


class SftpDownload:
    """Download over SFTP."""

    def __init__(self, transfer: Transfer, part: LocalPart, remote: RemoteFiles) -> None:
        self._transfer = transfer
        self._part = part
        self._remote = remote
        self._source = remote.absolute(transfer.options.source).rstrip(b"/") or b"/"

    def look(self) -> RemoteTree:
        kind = self._remote.kind(self._source)
        if not kind:
            raise SSHError("there is no such file")
        if kind == "other":
            raise SSHError("it is neither a file nor a directory")
        return self._remote.tree(self._source, self._transfer.options.excludes)

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        differs, target = self._remote.differs, self._part.target_of
        return [e for e in files if differs(e, _join(self._source, e.name), target(e.name))]

    def receive(self, files: list[FileEntry], links: list[FileEntry]) -> None:
        for link in links:
            found = self._remote.sftp.readlink(_join(self._source, link.name))
            link.link = os.fsencode(found or "")
        for entry in files:
            with about(entry):
                self._receive(entry)

    def _receive(self, entry: FileEntry) -> None:
        part, source = self._part, _join(self._source, entry.name)
        earlier = part.earlier(entry)
        with self._remote.open(source, "rb") as file, part.open(entry) as out:
            for start, length in part.missing(entry):
                out.seek(start)
                at = start
                try:
                    for piece in self._remote.pieces(file, start, start + length):
                        write_piece(out, piece)
                        at += len(piece)
                        self._transfer.moved(entry, len(piece))
                finally:
                    part.note(entry, start, at)
            out.truncate(entry.size)
        if not entry.size:
            self._transfer.moved(entry, 0)
        check_unchanged(entry, self._remote.look(source))
        # Not after every resumed download: hashing costs as much as receiving the file again.
        if self._transfer.options.verify and self._remote.differs(entry, source, part.place(entry)):
            part.clear()
            raise SSHError(DIFFERS)
        for _, length in earlier:
            self._transfer.count(entry, length)


class SftpUpload:
    """Upload over SFTP."""

    def __init__(self, transfer: Transfer, tree: LocalTree, remote: RemoteFiles) -> None:
        self._transfer = transfer
        self._options: Any = transfer.options
        self._tree = tree
        self._remote = remote
        self._target = self._find_target()
        token = part_token(self._options.resume, "sftp", self._target, tree.whole)
        self._part = _join(posixpath.dirname(self._target), PART.encode() + token.encode())
        self._confirmed = self._unconfirmed = 0  # bytes

    def _find_target(self) -> bytes:
        """Check the target, and return its path."""
        remote, is_folder = self._remote, self._tree.is_folder
        path = remote.absolute(self._options.source)
        if is_folder:
            inside = not self._options.content
        else:
            inside = path.endswith(b"/") or remote.kind(path) == "d"
        path = path.rstrip(b"/") or b"/"
        if inside:
            path = _join(path, os.path.basename(self._tree.whole))
        kind = remote.kind(path)
        shown = os.fsdecode(path)
        if kind != "d" and remote.kind(path, follow=False) == "l":
            if self._options.symlinks != "follow" or not kind:
                raise SSHError(f"{shown} is a symlink: remove it, or pass symlinks='follow'")
            path = os.fsencode(remote.sftp.normalize(path))
        if kind and (kind == "d") != is_folder:
            raise SSHError(f"{shown} is {'not ' if is_folder else ''}a directory")
        if kind == "other":
            raise SSHError(f"{shown} is neither a file nor a directory")
        return path

    def listing(self) -> tuple[bytes, RemoteTree]:
        return self._target, self._remote.tree(self._target, self._options.excludes)

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        differs, place = self._remote.differs, self._tree.place
        return [e for e in files if differs(e, _join(self._target, e.name), place(e))]

    def remove(self, files: list[bytes], folders: list[bytes]) -> None:
        for name in files:
            self._remote.sftp.remove(_join(self._target, name))
        for name in folders:
            with contextlib.suppress(OSError):  # it is not empty
                self._remote.sftp.rmdir(_join(self._target, name))

    def send(self) -> bytes:
        remote, part, record = self._remote, self._part, self._part + b".done"
        remote.make_folders(posixpath.dirname(part))
        try:
            if self._options.resume:
                self._check_record(record)
            if not self._options.preserve:
                self._apply_umask()
            self._send_all()
            self._install()
            if self._options.resume:
                remote.remove(record)
        except BaseException:
            if not self._options.resume:
                with contextlib.suppress(SSHError, *connection_errors()):
                    remote.remove(part)
            raise
        return self._target

    def _check_record(self, record: bytes) -> None:
        """Remove what an earlier upload has sent, unless the source is still the same."""
        key = record_key([entry.version for entry in self._tree.files]).encode()
        with contextlib.suppress(FileNotFoundError), self._remote.open(record, "rb") as file:
            if file.read(len(key)) == key:
                return
        self._remote.remove(self._part)
        with self._remote.open(record, "wb") as file:
            file.write(key)

    def _apply_umask(self) -> None:
        """Apply the host's umask to all modes; it shows in the mode of a new directory."""
        probe = self._part + b"." + os.urandom(4).hex().encode()
        self._remote.sftp.mkdir(probe)
        mask = self._remote.sftp.stat(probe).st_mode
        self._remote.sftp.rmdir(probe)
        for entry in [self._tree.root, *self._tree.entries]:
            entry.mode &= mask

    def _send_all(self) -> None:
        for entry in self._tree.by_name.values():
            place = _join(self._part, entry.name)
            if entry.kind == "d" and not self._remote.kind(place):
                self._remote.sftp.mkdir(place, 0o700)
            elif entry.kind == "l":
                self._remote.remove(place)
                self._remote.sftp.symlink(entry.link, place)
        for entry in self._tree.files:
            with about(entry):
                self._send_file(entry, _join(self._part, entry.name))

    def _send_file(self, entry: FileEntry, place: bytes) -> None:
        start = 0
        found = self._remote.look(place) if self._options.resume else None
        if found is not None and found.size <= entry.size:
            start = entry.size if found.size == entry.size else found.size - found.size % BLOCK
        with self._remote.open(place, "r+b" if start else "wb") as file:
            file.chmod(0o600)
            file.seek(start)
            for piece in self._tree.pieces(entry, start, entry.size - start):
                self._write(file, bytes(piece))
                self._transfer.moved(entry, len(piece))
        if start or not entry.size:
            self._transfer.moved(entry, start)
        found = self._remote.look(place)
        size = 0 if found is None else found.size
        if size != entry.size:
            raise SSHError(f"{size} of {entry.size} bytes arrived")
        if self._options.verify and self._remote.differs(entry, place, self._tree.place(entry)):
            self._remote.remove(place)
            raise SSHError(DIFFERS)

    def _write(self, file: Any, piece: bytes) -> None:
        """Write, and let the host confirm all earlier writes where too much is unconfirmed."""
        self._unconfirmed += len(piece)
        waits = self._unconfirmed >= self._transfer.ahead(self._confirmed)
        file.set_pipelined(not waits)
        file.write(piece)
        if waits:
            self._confirmed += self._unconfirmed
            self._unconfirmed = 0

    def _install(self) -> None:
        """Move everything to the target, with the right modes and times."""
        remote, tree, part, target = self._remote, self._tree, self._part, self._target
        exists = bool(remote.kind(target))
        merges = exists and tree.is_folder
        if merges:
            for entry in tree.entries:
                self._check_place(entry, _join(target, entry.name))
        for entry in reversed(tree.by_name.values()):
            if entry.kind == "f" or (entry.kind == "d" and not merges):
                self._set_mode(entry, exists)
        if not merges:
            remote.replace(part, target)
            return
        for entry in tree.entries:
            place = _join(target, entry.name)
            if entry.kind != "d":
                remote.replace(_join(part, entry.name), place)
            elif not remote.kind(place):
                remote.sftp.mkdir(place, 0o700)
                remote.sftp.chmod(place, entry.mode | 0o700)
        remote.remove(part)

    def _check_place(self, entry: FileEntry, place: bytes) -> None:
        """Check what exists in the place of an entry, before any file is moved there."""
        kind = self._remote.kind(place, follow=False)
        if kind == "l" and entry.kind != "l":
            if self._options.symlinks != "follow":
                raise SSHError(f"{os.fsdecode(place)} is a symlink")
            kind = self._remote.kind(place)
        if kind and (kind == "d") != (entry.kind == "d"):
            raise SSHError(f"{os.fsdecode(place)} is {'' if kind == 'd' else 'not '}a directory")

    def _set_mode(self, entry: FileEntry, exists: bool) -> None:
        """Set permissions (of the source, or of the file it replaces) and, with preserve, times."""
        sftp, place = self._remote.sftp, _join(self._part, entry.name)
        if self._options.preserve:
            sftp.chmod(place, entry.mode)
            sftp.utime(place, (entry.mtime // 10**9, entry.mtime // 10**9))
            return
        found = self._remote.look(_join(self._target, entry.name)) if exists else None
        sftp.chmod(place, entry.mode if found is None else found.mode)
