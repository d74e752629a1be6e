"""Talk to a host over SFTP, where it has no usual shell: slower, with the same checks."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import posixpath
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from clore_client.errors import SSHError
from clore_client.ssh.connect import PARAMIKO_LOGGER
from clore_client.ssh.transfer.entry import kind_of
from clore_client.ssh.transfer.transfer import Transfer
from clore_client.ssh.transport import (
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
