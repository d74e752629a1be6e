"""Download files and directories; the host is not trusted."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.log import logger
from clore_client.models.result import TransferResult
from clore_client.ssh.connect import ConnectionPool
from clore_client.ssh.transfer.entry import (
    BLOCK,
    CHANGED,
    MAX_FILES,
    SMALL_FILE,
    TAR_BLOCK,
    TRANSFER_PIECE,
    FileEntry,
    RemoteTree,
    about,
    check_unchanged,
    parse_listing,
    parse_stat,
)
from clore_client.ssh.transfer.local_part import (
    LocalPart,
    begin_download,
    make_links,
    write_piece,
)
from clore_client.ssh.transfer.remote_script import DATA_WINDOW, NoShellError, RemoteScript
from clore_client.ssh.transfer.scripts import (
    CHECK_TOOLS,
    DIFFERS,
    GET,
    GET_TREE,
    LOOK,
    MAX_ANSWER,
    script_text,
)
from clore_client.ssh.transfer.sftp import SftpDownload, sftp_session
from clore_client.ssh.transfer.transfer import RANGE, DownloadOptions, FileRange, Transfer
from clore_client.ssh.transport import NoChannelError

DOWNLOAD_CONNECTIONS = 4
DOWNLOAD_MANY = 256 * 1024 * 1024  # bytes; from here on, more connections are worth their logins
ANY_SIZE = 2**62
MAX_TAR_EXTRA = 65536  # bytes of a name


def download_path(pool: ConnectionPool, options: DownloadOptions) -> TransferResult:
    """Download; see ``CloreClient.download``."""
    transfer = Transfer(pool, options, os.fsdecode(options.remote), "download")
    part = LocalPart(options.target, options.remote, options)
    with transfer.watched(), part:
        files = _download(transfer, part)
    return transfer.result(part.target, files)


def _download(transfer: Transfer, part: LocalPart) -> list[FileEntry]:
    """Download with the host's shell, or else over SFTP; return the files that were received."""
    try:
        return _receive_all(transfer, part, Download(transfer, part))
    except BaseException as error:
        transfer.give_up()
        if not isinstance(error, NoShellError):
            raise
        logger.warning("the download uses SFTP, which is slower: %s", error)
    transfer.restart()
    with sftp_session(transfer) as remote:
        return _receive_all(transfer, part, SftpDownload(transfer, part, remote))


def _receive_all(
    transfer: Transfer, part: LocalPart, receiver: Download | SftpDownload
) -> list[FileEntry]:
    tree = receiver.look()
    links = begin_download(transfer, part, tree, receiver.different)
    files = tree.files
    if tree.is_folder or files:
        receiver.receive(files, links)
        make_links(transfer, part, tree, links)
        part.install(tree)
    return files


class Download:
    """Download with the host's shell.

    The script LOOK lists a directory, or sends a single file that is not large. Workers receive
    large files in ranges; small ones are received in a tar stream.
    """

    def __init__(self, transfer: Transfer, part: LocalPart) -> None:
        self._transfer = transfer
        self._options: Any = transfer.options
        self._part = part
        self._ranges: deque[FileRange] = deque()
        self._most_at_once = RANGE
        self._lock = threading.Lock()
        self._token = os.urandom(10).hex()
        self._look: Any = None

    def look(self) -> RemoteTree:
        """Return the source: a file or a directory."""
        ssh, script = self._transfer.pool.ssh, self._look_script()
        look = self._look = self._transfer.script(ssh, script, DATA_WINDOW, reads=False)
        first = look.line()
        if first.startswith(b"f "):
            tree = RemoteTree()
            tree.add(parse_stat(first[2:]))
            if tree.size > self._most:  # the script does not send it
                look.finish()
            return tree
        if first != b"d":
            raise look.refused(first)
        text = look.until(self._token.encode(), MAX_ANSWER)
        look.finish()
        return parse_listing(text, MAX_FILES, self._options.excludes)

    def _look_script(self) -> bytes:
        options = self._options
        most = ANY_SIZE if self._transfer.near else DOWNLOAD_MANY - 1
        if options.max_bytes is not None:
            most = min(most, options.max_bytes)
        in_ranges = self._part.done or options.verify or (options.streams or 1) > 1
        self._most = -1 if in_ranges or options.skip_unchanged else most
        return script_text(
            "look", CHECK_TOOLS, LOOK, f=options.source, token=self._token, most=self._most
        )

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        """Return those of the files whose content differs from that of their targets."""
        ranges = [(entry, 0, entry.size) for entry in files]
        return list(self._different(ranges, lambda entry: self._part.target_of(entry.name)))

    def _different(
        self, ranges: list[FileRange], place: Callable[[FileEntry], Any]
    ) -> Iterator[FileEntry]:
        return self._transfer.different(ranges, place, path=self._options.source)

    def receive(self, files: list[FileEntry], links: list[FileEntry]) -> None:
        """Receive and check files, and read what symlinks lead to."""
        compared: list[FileEntry] = []
        if files and not files[0].name:
            self._receive_one(files[0])
        else:
            compared = self._receive_many(files, links)
        ranges = [(entry, *found) for entry in files for found in self._part.earlier(entry)]
        for entry, _, size in ranges:
            self._transfer.count(entry, size)
        ranges += [(entry, 0, entry.size) for entry in compared]
        for entry in self._different(ranges, self._part.place):
            with about(entry):
                self._part.clear()
                raise SSHError(DIFFERS)

    def _receive_one(self, entry: FileEntry) -> None:
        look = self._look
        if entry.size > self._most:
            self._get_ranges([(entry, *found) for found in self._part.missing(entry)])
            return
        self._write(look, entry, 0, entry.size)
        check_unchanged(entry, parse_stat(look.line()))
        look.expect_end()
        look.finish()

    def _receive_many(self, files: list[FileEntry], links: list[FileEntry]) -> list[FileEntry]:
        """Receive the files of a directory; return those that ``verify`` has to compare."""
        small: list[FileEntry] = []
        ranges: list[FileRange] = []
        for entry in files:
            # GNU tar reads a backslash in a name as an escape.
            if entry.size >= SMALL_FILE or b"\\" in entry.name or self._part.earlier(entry):
                ranges += [(entry, *found) for found in self._part.missing(entry)]
            else:
                small.append(entry)
        self._get_ranges(ranges, lambda: self._get_small(small + links))
        return small if self._options.verify else []

    def _write(
        self, running: RemoteScript, entry: FileEntry, start: int, length: int, digest: Any = None
    ) -> None:
        """Write and record exactly ``length`` bytes of output."""
        at = noted = start
        with self._part.open(entry) as file:
            file.seek(start)
            try:
                while at < start + length:
                    piece = running.piece(start + length - at)
                    write_piece(file, piece)
                    if digest is not None:
                        digest.update(piece)
                    at += len(piece)
                    self._transfer.moved(entry, len(piece))
                    if at - noted >= TRANSFER_PIECE:
                        noted = self._part.note(entry, noted, at)
            finally:
                self._part.note(entry, noted, at)
            if at == entry.size:
                file.truncate(entry.size)  # zeros at the end were not written
        if not length:
            self._transfer.moved(entry, 0)

    # --- ranges ---

    def _get_ranges(
        self, ranges: list[FileRange], meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Let workers receive the ranges; call ``meanwhile`` in this thread."""
        transfer, size = self._transfer, sum(length for _, _, length in ranges)
        connections = 1 if transfer.near or size < DOWNLOAD_MANY else DOWNLOAD_CONNECTIONS
        if self._options.streams is not None:
            connections = self._options.streams
            self._most_at_once = min(RANGE, max(size // connections // BLOCK, 16) * BLOCK)
        self._ranges.extend(ranges)
        if transfer.takes_turns:  # these scripts end by themselves, so each needs a connection
            connections = min(connections, transfer.pool.size)
            meanwhile()
        workers = min(max(len(ranges), size // BLOCK), connections) if ranges else 0
        transfer.start_workers(connections, workers, self._work)
        if not transfer.takes_turns:
            meanwhile()
        transfer.finish_workers()
        self._work(transfer.pool.ssh)  # ranges for which no worker got a channel

    def _take_range(self) -> FileRange | None:
        """Return the next range for a worker, or None."""
        with self._lock:
            if not self._ranges:
                return None
            entry, start, length = self._ranges.popleft()
            most = self._most_at_once
            if length > most:
                self._ranges.appendleft((entry, start + most, length - most))
            return entry, start, min(length, most)

    def _work(self, ssh: Any) -> None:
        while (taken := self._take_range()) is not None:
            entry, start, length = taken
            try:
                with about(entry):
                    self._get_range(ssh, entry, start, length)
            except NoChannelError:
                self._ranges.append((entry, start, length))
                raise

    def _get_range(self, ssh: Any, entry: FileEntry, start: int, length: int) -> None:
        digest = hashlib.sha256()
        source = self._options.source
        place = source.rstrip(b"/") + b"/" + entry.name if entry.name else source
        script = script_text("get", GET, f=place, k=start // BLOCK, s=length)
        with self._transfer.script(ssh, script, DATA_WINDOW, reads=False) as get:
            self._write(get, entry, start, length, digest)
            sent = get.line()[:64]
            if sent != digest.hexdigest().encode():
                missing = len(sent) < 64
                raise SSHError("the host sent no SHA-256" if missing else "SHA-256 differs")
            check_unchanged(entry, parse_stat(get.line()))
            get.expect_end()

    # --- small files ---

    def _get_small(self, entries: list[FileEntry]) -> None:
        """Receive small files and symlinks in one tar stream."""
        if not entries:
            return
        script = script_text("tree", GET_TREE, f=self._options.source, token=self._token)
        with self._transfer.script(self._transfer.pool.ssh, script, DATA_WINDOW) as get:
            get.send_names(entry.name for entry in entries)
            self._receive_tar(get, {entry.name: entry for entry in entries})
            text = get.until(self._token.encode(), MAX_ANSWER)
        now = parse_listing(text, MAX_FILES).by_name
        for entry in entries:
            if entry.kind == "f":
                with about(entry):
                    check_unchanged(entry, now.get(entry.name))

    def _receive_tar(self, get: RemoteScript, wanted: dict[bytes, FileEntry]) -> None:
        received: dict[bytes, FileEntry] = {}
        for info in tar_members(get, self._token.encode()):
            name = os.fsencode(info.name).removeprefix(b"./")
            entry = wanted.pop(name, None)
            if entry is None:
                raise SSHError(f"the host sends {printable(repr(name), 120)}: not requested")
            with about(entry):
                self._take_member(get, entry, info, received)
            received[name] = entry
        for entry in wanted.values():
            with about(entry):
                raise SSHError(f"it was not received: {get.refused()}")

    def _take_member(
        self, get: RemoteScript, entry: FileEntry, info: Any, received: dict[bytes, FileEntry]
    ) -> None:
        if info.issym() and entry.kind == "l":
            entry.link = os.fsencode(info.linkname)
        elif info.islnk() and entry.kind == "f":
            original = received.get(os.fsencode(info.linkname).removeprefix(b"./"))
            if original is None:
                raise SSHError("it is a hard link to a file that was not requested")
            shutil.copyfile(self._part.place(original), self._part.place(entry))
            self._part.note(entry, 0, entry.size)
            self._transfer.moved(entry, entry.size)
        elif info.isreg() and entry.kind == "f":
            if info.size < entry.size:
                raise SSHError(CHANGED)
            self._part.grow(info.size - entry.size)
            entry.size = info.size  # it has grown since it was listed
            self._write(get, entry, 0, entry.size)
        else:
            raise SSHError(CHANGED)


def tar_members(running: RemoteScript, mark: bytes) -> Iterator[Any]:
    """Yield the members of consecutive tar archives, up to a block with a mark.

    The content of a member must be read before the next one is requested.
    """
    import tarfile

    long: dict[bytes, bytes] = {}  # a name or a symlink's target that does not fit in a header
    while (header := running.exactly(TAR_BLOCK)).rstrip(b" \n") != mark:
        if not header.strip(b"\0"):
            continue
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise SSHError("the host sends no valid tar archive") from error
        if info.size < 0:
            raise SSHError("the host sends a negative size")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE):
            if info.size > MAX_TAR_EXTRA:
                raise SSHError("the host sends a name that is too long")
            extra = running.exactly(info.size + -info.size % TAR_BLOCK)[: info.size]
            if info.type == tarfile.XHDTYPE:  # records of a length, a keyword and a value
                long.update(re.findall(rb"\d+ (path|linkpath)=(.*)\n", extra))
            else:
                is_name = info.type == tarfile.GNUTYPE_LONGNAME
                long[b"path" if is_name else b"linkpath"] = extra.rstrip(b"\0")
            continue
        info.name = os.fsdecode(long.pop(b"path", b"")) or info.name
        info.linkname = os.fsdecode(long.pop(b"linkpath", b"")) or info.linkname
        if not info.isreg():
            info.size = 0
        yield info
        running.exactly(-info.size % TAR_BLOCK)
