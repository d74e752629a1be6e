"""Copy files and directories over SFTP, where a host has no usual shell: slower, same checks."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import posixpath
import stat
from collections.abc import Iterator
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.ssh.connect import PARAMIKO_LOGGER
from clore_client.ssh.local_files import (
    LocalPart,
    RemoteTree,
    check_same,
    nanoseconds,
    settle_links,
    write_piece,
)
from clore_client.ssh.remote import BLOCK, MAX_LEVELS, remote_path
from clore_client.ssh.transfer import PART, TRANSFER_PIECE, FileEntry, Transfer, about, facts_key
from clore_client.ssh.transport import (
    NoChannelError,
    connection_errors,
    open_session,
    reason,
    request_subsystem,
)

SFTP_PACKET = 32768  # bytes of one request
SFTP_AHEAD = 64  # requests that wait for their answers
MAX_SFTP_PACKET = 2**20  # bytes of one answer
MAX_LISTED = 500_000
SFTP_PATIENCE = 100  # tries to get a channel, where one has just been closed


class SftpChannel:
    """A channel for paramiko's SFTP client, on which nothing waits for ever or is endless."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._transport = transfer.pool.ssh.get_transport()
        with self._limited():
            self._channel = self._open()
            request_subsystem(self._channel, "sftp")

    def _open(self) -> Any:
        for _ in range(min(SFTP_PATIENCE, int(10 * self._transfer.timeout))):
            with contextlib.suppress(NoChannelError):
                return open_session(self._transport, self._transfer.timeout)
            self._transfer.stopped.wait(0.1)
        return open_session(self._transport, self._transfer.timeout)

    def _limited(self) -> contextlib.AbstractContextManager[Any]:
        seconds = 1.25 * self._transfer.timeout + 0.25
        return self._transfer.watchdog.limit(seconds, self._transport.close)

    def send(self, data: Any) -> int:
        with self._limited():
            return int(self._channel.send(data))

    def recv(self, size: int) -> bytes:
        if size > MAX_SFTP_PACKET:
            raise SSHError(f"the machine sends a packet of {size} bytes")
        with self._limited():
            return bytes(self._channel.recv(size))

    def recv_ready(self) -> bool:
        return bool(self._channel.recv_ready())

    def get_name(self) -> str:
        return "sftp"  # for paramiko's log

    def close(self) -> None:
        with contextlib.suppress(*connection_errors()), self._limited():
            self._channel.close()


@contextlib.contextmanager
def sftp_session(transfer: Transfer) -> Iterator[Any]:
    """Open an SFTP client for the length of a block."""
    import paramiko

    channel: Any = SftpChannel(transfer)
    failures: tuple[type[Exception], ...] = (ValueError, *connection_errors())
    try:
        try:
            sftp = paramiko.SFTPClient(channel)
        except failures as error:
            raise SSHError(
                f"the machine has neither a usual shell nor SFTP: {reason(error)}"
            ) from error
        sftp.logger = logging.getLogger(PARAMIKO_LOGGER)  # it logs names as they are
        try:
            yield sftp
        except (UnicodeError, ValueError, TypeError) as error:  # of paramiko, for odd answers
            raise SSHError(f"the machine answers what can't be read: {reason(error)}") from error
    finally:
        channel.close()


class RemoteFiles:
    """A few questions about the files of a host."""

    def __init__(self, sftp: Any, transfer: Transfer) -> None:
        self.sftp = sftp
        self.transfer = transfer

    def absolute(self, path: bytes) -> bytes:
        home: bytes = os.fsencode(self.sftp.normalize("."))
        return posixpath.normpath(posixpath.join(home, path)) + b"/" * path.endswith(b"/")

    def look(self, path: bytes, follow: bool = True) -> Any:
        """Return the attributes of a path; None where nothing is."""
        try:
            found = self.sftp.stat(path) if follow else self.sftp.lstat(path)
        except FileNotFoundError:
            return None
        if found.st_mode is None or found.st_size is None or found.st_mtime is None:
            raise SSHError("the machine does not tell size, time and mode of a file")
        return found

    def pieces(self, file: Any, start: int, end: int) -> Iterator[bytes]:
        """Read a range, some requests ahead."""
        while start < end:
            wanted = [
                (at, min(SFTP_PACKET, end - at))
                for at in range(start, min(end, start + SFTP_AHEAD * SFTP_PACKET), SFTP_PACKET)
            ]
            for (at, size), piece in zip(wanted, file.readv(wanted), strict=True):
                if len(piece) != size:
                    raise SSHError(f"{end - at} bytes are missing")
                yield piece
            start = sum(wanted[-1])

    def digest(self, path: bytes, size: int) -> str:
        digest = hashlib.sha256()
        with self.sftp.open(path, "rb") as file:
            for piece in self.pieces(file, 0, size):
                digest.update(piece)
        return digest.hexdigest()

    def remove(self, path: bytes) -> None:
        found = self.look(path, follow=False)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            self.sftp.remove(path)
            return
        for entry in self.sftp.listdir_attr(path):
            self.remove(path + b"/" + os.fsencode(entry.filename))
        self.sftp.rmdir(path)

    def replace(self, source: bytes, target: bytes) -> None:
        try:
            self.sftp.posix_rename(source, target)
        except OSError:  # it may not know that
            if self.look(target, follow=False) is not None:
                self.sftp.remove(target)
            self.sftp.rename(source, target)


class SftpUpload:
    """One upload over SFTP."""

    def __init__(self, transfer: Transfer, tree: Any) -> None:
        self._transfer = transfer
        self._options = transfer.options
        self._tree = tree

    def run(self) -> bytes:
        """Upload; the path of what has been made."""
        with sftp_session(self._transfer) as sftp:
            self._far = RemoteFiles(sftp, self._transfer)
            target = self._target()
            whole = os.path.abspath(self._tree.path)
            same = facts_key(("sftp", whole, self._options.remote))[:20]
            token = same if self._options.resume else os.urandom(10).hex()
            part = posixpath.dirname(target).rstrip(b"/") + b"/" + PART.encode() + token.encode()
            try:
                self._send_all(part)
                self._install(part, target)
            except BaseException:
                if not self._options.resume:
                    with contextlib.suppress(SSHError, *connection_errors()):
                        self._far.remove(part)
                raise
            return target

    def _target(self) -> bytes:
        far, folder = self._far, self._tree.is_folder
        path = far.absolute(remote_path(self._options.remote))
        found = far.look(path)
        if found is not None and stat.S_ISDIR(found.st_mode):
            name = os.path.basename(os.path.abspath(self._tree.path))
            path = path.rstrip(b"/") + b"/" + name
        elif path.endswith(b"/"):
            raise SSHError(f"there is no directory {os.fsdecode(path)}")
        link = far.look(path, follow=False)
        found = far.look(path)
        if link is not None and stat.S_ISLNK(link.st_mode) and not (
            found is not None and stat.S_ISDIR(found.st_mode)
        ):  # fmt: skip
            if self._options.symlinks != "follow" or found is None:
                raise SSHError(
                    f"{os.fsdecode(path)} is a symlink: remove it, or pass symlinks='follow'"
                )
            path = os.fsencode(far.sftp.normalize(path))
        parent = far.look(posixpath.dirname(path))
        if parent is None or not stat.S_ISDIR(parent.st_mode):
            raise SSHError(f"there is no directory {os.fsdecode(posixpath.dirname(path))}")
        if found is not None and stat.S_ISDIR(found.st_mode) != folder:
            raise SSHError(f"{os.fsdecode(path)} is {'no' if folder else 'a'} directory")
        if found is not None and not folder and not stat.S_ISREG(found.st_mode):
            raise SSHError(f"{os.fsdecode(path)} is neither a file nor a directory")
        return path

    def _send_all(self, part: bytes) -> None:
        sftp = self._far.sftp
        if self._tree.is_folder:
            if self._far.look(part) is None:
                sftp.mkdir(part, 0o700)
            for entry in self._tree.entries:
                place = part + b"/" + entry.name
                if entry.kind == "d" and self._far.look(place) is None:
                    sftp.mkdir(place, 0o700)
                elif entry.kind == "l":
                    self._far.remove(place)
                    sftp.symlink(entry.link, place)
        for entry in self._tree.files:
            with about(entry):
                self._send_file(entry, part + b"/" + entry.name if entry.name else part)

    def _send_file(self, entry: FileEntry, place: bytes) -> None:
        far, start = self._far, 0
        record, key = place + b".clore-done", facts_key(entry.facts).encode()
        if self._options.resume:
            start = self._earlier(place, record, key)
        with far.sftp.open(place, "r+b" if start else "wb") as file:
            created = stat.S_IMODE(file.stat().st_mode or 0)
            file.chmod(0o600)
            if self._options.resume and not start:
                with far.sftp.open(record, "wb") as note:
                    note.write(key)
            file.set_pipelined(True)
            file.seek(start)
            for piece in self._tree.pieces(entry, start, entry.size - start):
                for at in range(0, len(piece), SFTP_PACKET):
                    file.write(bytes(piece[at : at + SFTP_PACKET]))
                self._transfer.moved(entry, len(piece))
        if not entry.size:
            self._transfer.moved(entry, 0)
        self._check(entry, place, start)
        if not self._options.preserve:  # what the host's umask takes away is taken away here, too
            entry.mode &= created | (created & 0o444) >> 2 if not start else 0o700
        if self._options.resume:
            far.remove(record)

    def _earlier(self, place: bytes, record: bytes, key: bytes) -> int:
        """Return how many bytes an earlier upload has sent."""
        found = self._far.look(place, follow=False)
        if found is None or self._far.look(record) is None:
            return 0
        with self._far.sftp.open(record, "rb") as note:
            if note.read(100) != key:
                return 0
        return int(found.st_size) - int(found.st_size) % BLOCK

    def _check(self, entry: FileEntry, place: bytes, start: int) -> None:
        size = self._far.look(place).st_size
        if size != entry.size:
            raise SSHError(f"{size} of {entry.size} bytes arrived")
        if self._options.verify or start:
            here = hashlib.sha256()
            for piece in self._tree.pieces(entry, 0, entry.size):
                here.update(piece)
            if self._far.digest(place, entry.size) != here.hexdigest():
                self._far.remove(place)
                raise SSHError("SHA-256 differs: what had arrived is removed")
        if start:
            self._transfer.count(entry, start)

    def _install(self, part: bytes, target: bytes) -> None:
        far, tree = self._far, self._tree
        exists = far.look(target) is not None
        for entry in tree.entries[::-1]:
            place = part + b"/" + entry.name if entry.name else part
            instead = target + b"/" + entry.name if entry.name else target
            if entry.kind != "l" and not (entry.kind == "d" and exists):
                self._finish(entry, place, instead if exists else b"")
        if not tree.is_folder or not exists:
            far.replace(part, target)
            return
        for entry in tree.entries:
            place, instead = part + b"/" + entry.name, target + b"/" + entry.name
            if entry.kind == "d":
                if far.look(instead) is None:
                    far.sftp.mkdir(instead, 0o700)
                    far.sftp.chmod(instead, entry.mode | 0o700)
            else:
                far.replace(place, instead)
        far.remove(part)

    def _finish(self, entry: FileEntry, place: bytes, instead: bytes) -> None:
        mode, found = entry.mode, self._far.look(instead) if instead else None
        if not self._options.preserve and found is not None:
            mode = stat.S_IMODE(found.st_mode)
        self._far.sftp.chmod(place, mode)
        if self._options.preserve:
            self._far.sftp.utime(place, (entry.mtime // 10**9, entry.mtime // 10**9))


class SftpDownload:
    """One download over SFTP."""

    def __init__(self, transfer: Transfer, part: LocalPart) -> None:
        self._transfer = transfer
        self._options: Any = transfer.options
        self._part = part

    def run(self, files: list[FileEntry]) -> None:
        """Download; ``files`` is filled with what there is, as soon as that is known."""
        files.clear()
        with sftp_session(self._transfer) as sftp:
            self._far = RemoteFiles(sftp, self._transfer)
            source = self._far.absolute(self._options.source).rstrip(b"/") or b"/"
            found = self._far.look(source)
            if found is None:
                raise SSHError("there is no such file")
            if stat.S_ISDIR(found.st_mode):
                self._get_tree(source, found, files)
            elif stat.S_ISREG(found.st_mode):
                entry = _entry_of(b"", found)
                files.append(entry)
                self._part.accept(files, folder=False)
                self._part.begin([entry])
                self._get_file(entry, source)
                self._part.install_file(entry)
            else:
                raise SSHError("it is no file")

    def _get_tree(self, source: bytes, found: Any, files: list[FileEntry]) -> None:
        tree = RemoteTree()
        tree.take(found.st_mode, 0, int(found.st_mtime), b"")
        self._walk(source, b"", tree, 0)
        files += tree.files
        links = tree.links(self._transfer)
        for link in links:
            link.link = os.fsencode(self._far.sftp.readlink(source + b"/" + link.name) or "")
        self._part.accept(files, folder=True)
        self._part.begin(tree.entries)
        for entry in files:
            with about(entry):
                self._get_file(entry, source + b"/" + entry.name)
        settle_links(self._part, self._transfer, links, tree)
        self._part.install_tree(tree.root, tree.entries)

    def _walk(self, source: bytes, folder: bytes, tree: RemoteTree, level: int) -> None:
        if level > MAX_LEVELS:
            raise SSHError(f"the machine names more than {MAX_LEVELS} directories in each other")
        place = source + b"/" + folder if folder else source
        # All of them, before the next question: paramiko asks for some ahead.
        listed = list(itertools.islice(self._far.sftp.listdir_iter(place), MAX_LISTED + 1))
        if len(listed) > MAX_LISTED:
            raise SSHError(f"the machine lists more than {MAX_LISTED} files in a directory")
        for found in listed:
            name = os.fsencode(found.filename)
            if b"/" in name:
                raise SSHError(f"the machine names a file {printable(repr(name), 120)}")
            inner = folder + b"/" + name if folder else name
            if None in (found.st_mode, found.st_size, found.st_mtime):
                raise SSHError("the machine does not tell size, time and mode of a file")
            tree.take(found.st_mode, found.st_size, int(found.st_mtime), inner)
            if stat.S_ISDIR(found.st_mode):
                self._walk(source, inner, tree, level + 1)

    def _get_file(self, entry: FileEntry, source: bytes) -> None:
        part, far = self._part, self._far
        here, earlier = hashlib.sha256(), part.earlier(entry)
        with far.sftp.open(source, "rb") as file, part.open(entry) as out:
            for start, length in part.missing(entry):
                out.seek(start)
                at = start
                try:
                    for piece in far.pieces(file, start, start + length):
                        write_piece(out, piece)
                        at += len(piece)
                        self._transfer.moved(entry, len(piece))
                finally:
                    part.note(entry, start, at)
            out.truncate(entry.size)
        if not entry.size:
            self._transfer.moved(entry, 0)
        found = far.look(source)
        check_same(entry, None if found is None else _entry_of(b"", found))
        if self._options.verify or earlier:
            with open(part.place(entry), "rb") as file:
                while piece := file.read(TRANSFER_PIECE):
                    here.update(piece)
            if here.hexdigest() != far.digest(source, entry.size):
                part.clear()
                raise SSHError("SHA-256 differs: what had arrived is removed")
        for _, length in earlier:
            self._transfer.count(entry, length)


def _entry_of(name: bytes, found: Any) -> FileEntry:
    mtime = nanoseconds(int(found.st_mtime))
    kind = "f" if stat.S_ISREG(found.st_mode) else "d"
    return FileEntry(name, int(found.st_size), mtime, found.st_mode & 0o777, kind)
