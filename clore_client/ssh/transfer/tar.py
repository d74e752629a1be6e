"""Write and read tar streams."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from clore_client.errors import SSHError
from clore_client.ssh.transfer.entry import TRANSFER_PIECE, FileEntry
from clore_client.ssh.transfer.remote_script import RemoteScript

TAR_BLOCK = 512  # bytes
MAX_TAR_EXTRA = 65536  # bytes of a name


def tar_header(entry: FileEntry) -> bytes:
    """Return the header of an entry in a tar stream, without a user's name or number."""
    import tarfile  # imported here, because it is slow

    info = tarfile.TarInfo("./" + os.fsdecode(entry.name))
    # A directory must be writable until its files have arrived.
    info.mode = entry.mode | 0o700 if entry.kind == "d" else entry.mode
    info.size, info.mtime = entry.size, entry.mtime // 10**9
    kinds = {"d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "f": tarfile.REGTYPE}
    info.type, info.linkname = kinds[entry.kind], os.fsdecode(entry.link)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


class TarReader:
    """Read the members of consecutive tar archives, up to a block with a mark."""

    def __init__(self, running: RemoteScript, mark: bytes) -> None:
        self._running = running
        self._mark = mark
        self._padding = 0

    def next(self) -> Any:
        """Return the next member, or None at the mark."""
        import tarfile

        self._exactly(self._padding)
        self._padding = 0
        name = link = ""
        while True:
            header = self._exactly(TAR_BLOCK)
            if header.rstrip(b" \n") == self._mark:
                return None
            if not header.strip(b"\0"):
                continue
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                raise SSHError("the machine sends no valid tar archive") from error
            if info.size < 0:
                raise SSHError("the machine sends a negative size")
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE):
                if info.size > MAX_TAR_EXTRA:
                    raise SSHError("the machine sends a name that is too long")
                extra = self._exactly(info.size + -info.size % TAR_BLOCK)[: info.size]
                name, link = _extended(info.type, extra, name, link)
                continue
            info.name, info.linkname = name or info.name, link or info.linkname
            if not info.isreg():
                info.size = 0
            self._padding = -info.size % TAR_BLOCK
            return info

    def content(self, size: int) -> Iterator[bytes]:
        """Yield the bytes of a member."""
        while size:
            piece = self._running.read(min(TRANSFER_PIECE, size))
            if not piece:
                raise SSHError(f"{size} bytes are missing: {self._running.refused()}")
            size -= len(piece)
            yield piece

    def _exactly(self, size: int) -> bytes:
        piece = self._running.read(size) if size else b""
        return piece if len(piece) == size else piece + b"".join(self.content(size - len(piece)))


def _extended(kind: bytes, extra: bytes, name: str, link: str) -> tuple[str, str]:
    """Read a name or a link target that does not fit in a header."""
    if kind == b"x":  # POSIX: records of a length, a keyword and a value
        found = dict(re.findall(rb"\d+ (path|linkpath)=(.*)\n", extra))
        return os.fsdecode(found.get(b"path", b"")) or name, os.fsdecode(
            found.get(b"linkpath", b"")
        ) or link
    text = os.fsdecode(extra.rstrip(b"\0"))
    return (text, link) if kind == b"L" else (name, text)
