"""Upload over SFTP."""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections.abc import Iterator
from typing import Any

from clore_client.errors import SSHError
from clore_client.ssh.transfer.entry import (
    BLOCK,
    FileEntry,
    LocalTree,
    about,
    file_digest,
    record_key,
)
from clore_client.ssh.transfer.local_part import PART
from clore_client.ssh.transfer.remote_tree import Comparison, SftpTarget
from clore_client.ssh.transfer.scripts import DIFFERS, MAX_ANSWER
from clore_client.ssh.transfer.sftp import SFTP_PACKET, sftp_session
from clore_client.ssh.transfer.transfer import Transfer, is_content
from clore_client.ssh.transport import connection_errors


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
