"""Download files and directories; the host is not trusted."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.log import logger
from clore_client.models.result import TransferResult
from clore_client.ssh.connect import ConnectionPool
from clore_client.ssh.transfer.entry import (
    BLOCK,
    CHANGED,
    SMALL_FILE,
    TRANSFER_PIECE,
    FileEntry,
    TarReader,
    about,
    check_unchanged,
    parse_stat,
)
from clore_client.ssh.transfer.local_part import LocalPart, write_piece
from clore_client.ssh.transfer.remote_script import DATA_WINDOW, NoShellError, RemoteScript
from clore_client.ssh.transfer.remote_tree import RemoteTree, begin_file, make_links
from clore_client.ssh.transfer.scripts import (
    CHUNK_DIGESTS,
    DIFFERS,
    FILE_DIGESTS,
    GET,
    GET_TREE,
    LOOK,
    MAX_ANSWER,
    different_chunks,
    different_files,
    parse_listing,
    script_text,
)
from clore_client.ssh.transfer.sftp import SftpDownload
from clore_client.ssh.transfer.transfer import DownloadOptions, Transfer
from clore_client.ssh.transport import NoChannelError

DOWNLOAD_CONNECTIONS = 4
DOWNLOAD_MANY = 256 * 1024 * 1024  # bytes; from here on, more connections are worth their logins
HASHED_AT_ONCE = 1024 * 1024 * 1024  # bytes that a host can hash within the timeout
RANGE = 64 * 1024 * 1024  # bytes that a worker asks for at a time
MAX_FILES = 2_000_000
ANY_SIZE = 2**62


def download_path(pool: ConnectionPool, options: DownloadOptions) -> TransferResult:
    """Download; see ``CloreClient.download``."""
    transfer = Transfer(pool, options, os.fsdecode(options.remote), "download")
    part = LocalPart(options.target, options.remote, options)
    files: list[FileEntry] = []
    with transfer.watched(), part:
        _download(transfer, part, files)
    return transfer.result(part.target, files)


def _download(transfer: Transfer, part: LocalPart, files: list[FileEntry]) -> None:
    """Download with the host's shell, or else over SFTP."""
    try:
        Download(transfer, part).run(files)
    except NoShellError as error:
        logger.warning("files come over SFTP, which is slower: %s", error)
        transfer.restart()
        SftpDownload(transfer, part).run(files)


class Download:
    """One download with the host's shell.

    The script LOOK lists what there is, and sends a file that is not large. Workers receive large
    files in ranges; small ones come in a tar stream.
    """

    def __init__(self, transfer: Transfer, part: LocalPart) -> None:
        self._transfer = transfer
        self._options: Any = transfer.options
        self._part = part
        self._ranges: list[tuple[FileEntry, int, int]] = []
        self._share = RANGE  # bytes for each connection
        self._lock = threading.Lock()
        self._token = os.urandom(10).hex()

    def run(self, files: list[FileEntry]) -> None:
        """Download, and add to ``files`` what there is."""
        transfer = self._transfer
        try:
            with transfer.script(
                transfer.pool.ssh, self._look_script(), DATA_WINDOW, reads=False
            ) as look:
                first = look.line()
                if first == b"d":
                    self._get_tree(look, files)
                elif first.startswith(b"f "):
                    self._get_file(look, parse_stat(first[2:]), files)
                else:
                    raise look.refused(first)
        except BaseException:
            transfer.stop()
            raise
        finally:
            transfer.join_workers()

    def _look_script(self) -> bytes:
        options = self._options
        most = HASHED_AT_ONCE if options.verify else ANY_SIZE
        if self._part.done or options.skip_unchanged or (options.streams or 1) > 1:
            most = -1
        elif not self._transfer.near:
            most = min(most, DOWNLOAD_MANY - 1)
        self._most = min(most, ANY_SIZE if options.max_bytes is None else options.max_bytes)
        return script_text(
            "look", LOOK, f=options.source, token=self._token, most=self._most,
            hash=int(options.verify),
        )  # fmt: skip

    # --- one file ---

    def _get_file(self, look: RemoteScript, entry: FileEntry, files: list[FileEntry]) -> None:
        if not begin_file(self._transfer, self._part, entry, files, self._different):
            look.finish()
            return
        if entry.size > self._most:
            look.finish()
            self._add_ranges(entry)
            self._get_ranges()
        else:
            digest = hashlib.sha256() if self._options.verify else None
            self._receive(look, entry, 0, entry.size, digest)
            if digest is not None:
                _compare(look.line(), digest.hexdigest())
            check_unchanged(entry, parse_stat(look.line()))
            look.expect_end()
        self._check_earlier([entry])
        self._part.install_file(entry)

    def _receive(
        self, running: RemoteScript, entry: FileEntry, start: int, length: int, digest: Any = None
    ) -> None:
        """Write and record exactly ``length`` bytes."""
        at = noted = start
        with self._part.open(entry) as file:
            file.seek(start)
            try:
                while at < start + length:
                    piece = running.read(min(TRANSFER_PIECE, start + length - at))
                    if not piece:
                        left = start + length - at
                        raise SSHError(f"{left} bytes are missing: {running.refused()}")
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

    def _receive_nothing(self, entry: FileEntry) -> None:
        self._part.open(entry).close()
        self._took(entry)

    # --- ranges ---

    def _add_ranges(self, entry: FileEntry) -> None:
        """Add the ranges of a file that are missing."""
        self._ranges += [(entry, start, size) for start, size in self._part.missing(entry)]

    def _take_range(self) -> tuple[FileEntry, int, int] | None:
        """Return the next range for a worker, or None."""
        most = RANGE
        if self._options.streams is not None:
            most = min(RANGE, max(self._share // BLOCK * BLOCK, 16 * BLOCK))
        with self._lock:
            if not self._ranges:
                return None
            entry, start, length = self._ranges.pop()
            if length > most:
                self._ranges.append((entry, start + most, length - most))
            return entry, start, min(length, most)

    def _get_ranges(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Let workers receive the ranges; call ``meanwhile`` in this thread."""
        transfer, ranges = self._transfer, self._ranges
        ranges.reverse()
        size = sum(length for _, _, length in ranges)
        connections = self._options.streams
        if connections is None:
            connections = 1 if transfer.near or size < DOWNLOAD_MANY else DOWNLOAD_CONNECTIONS
        self._share = size // connections
        workers = min(max(len(ranges), size // BLOCK), connections) if ranges else 0
        transfer.start_workers(connections, workers, self._work)
        if meanwhile is not None:
            meanwhile()
        transfer.finish_workers()
        self._work(transfer.pool.ssh)  # ranges for which no worker got a channel

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
        script = script_text("get", GET, f=self._place(entry))
        with self._transfer.script(ssh, script, DATA_WINDOW) as get:
            get.send(b"%d %d\n" % (start // BLOCK, length))
            get.end()
            self._receive(get, entry, start, length, digest)
            _compare(get.line(), digest.hexdigest())
            check_unchanged(entry, parse_stat(get.line()))
            get.expect_end()

    def _place(self, entry: FileEntry) -> bytes:
        source: bytes = self._options.source
        return source.rstrip(b"/") + b"/" + entry.name if entry.name else source

    # --- a directory ---

    def _get_tree(self, look: RemoteScript, files: list[FileEntry]) -> None:
        tree = RemoteTree()
        parse_listing(look.until(self._token.encode(), MAX_ANSWER), MAX_FILES, tree.take)
        links = tree.begin(self._transfer, self._part, files, self._different)
        missing = [entry for entry in files if not self._part.is_done(entry)]
        # GNU tar reads a backslash in a name as an escape.
        alone = {
            e.name: e
            for e in missing
            if e.size >= SMALL_FILE or (b"\\" in e.name and e.size) or self._part.earlier(e)
        }
        small = [entry for entry in missing if entry.name not in alone]
        for entry in alone.values():
            self._add_ranges(entry)
        for entry in [e for e in small if b"\\" in e.name]:
            small.remove(entry)
            self._receive_nothing(entry)
        for entry in [e for e in links if b"\\" in e.name]:
            links.remove(entry)
            tree.entries.remove(entry)
            self._transfer.leave_out(entry.name, "a symlink whose name holds a backslash")
        look.finish()
        self._get_ranges(lambda: self._get_small(small + links))
        self._check_earlier(files)
        if self._options.verify:
            self._compare_files([entry for entry in small if entry.kind == "f"])
        make_links(self._part, self._transfer, links, tree)
        self._part.install_tree(tree.root, tree.entries)

    def _get_small(self, entries: list[FileEntry]) -> None:
        """Receive small files and symlinks in one tar stream."""
        if not entries:
            return
        script = script_text("tree", GET_TREE, f=self._options.source, token=self._token)
        with self._transfer.script(self._transfer.pool.ssh, script, DATA_WINDOW) as get:
            get.send(b"".join(b"./" + entry.name + b"\0" for entry in entries))
            get.end()
            self._receive_tar(get, entries)

    def _receive_tar(self, get: RemoteScript, entries: list[FileEntry]) -> None:
        wanted = {entry.name: entry for entry in entries}
        received: set[bytes] = set()
        reader = TarReader(get, self._token.encode())
        while (info := reader.next()) is not None:
            name = os.fsencode(info.name).removeprefix(b"./")
            entry = wanted.pop(name, None)
            if entry is None:
                raise SSHError(f"the machine sends {printable(repr(name), 120)}, not asked for")
            with about(entry):
                self._take_member(get, entry, info, received)
            received.add(name)
        if wanted:
            entry = next(iter(wanted.values()))
            with about(entry):
                raise SSHError(f"it did not come: {get.refused()}")
        self._check_unchanged(get, entries)

    def _take_member(
        self, get: RemoteScript, entry: FileEntry, info: Any, received: set[bytes]
    ) -> None:
        if info.issym() and entry.kind == "l":
            entry.link = os.fsencode(info.linkname)
        elif info.islnk() and entry.kind == "f":
            original = os.fsencode(info.linkname).removeprefix(b"./")
            if original not in received:
                raise SSHError("it is a hard link to what was not asked for")
            shutil.copyfile(self._part.place_of(original), self._part.place(entry))
            self._took(entry)
        elif info.isreg() and entry.kind == "f":
            if info.size < entry.size:
                raise SSHError(CHANGED)
            self._part.grow(info.size - entry.size)
            entry.size = info.size  # it has grown since it was listed
            self._receive(get, entry, 0, entry.size)
        else:
            raise SSHError(CHANGED)

    def _took(self, entry: FileEntry) -> None:
        self._part.note(entry, 0, entry.size)
        self._transfer.moved(entry, entry.size)

    def _check_unchanged(self, get: RemoteScript, entries: list[FileEntry]) -> None:
        again = RemoteTree()
        parse_listing(get.until(self._token.encode(), MAX_ANSWER), MAX_FILES, again.take)
        now = {entry.name: entry for entry in again.entries}
        for entry in entries:
            if entry.kind == "f":
                with about(entry):
                    check_unchanged(entry, now.get(entry.name))

    # --- unchanged files ---

    def _different(self, files: list[FileEntry]) -> list[FileEntry]:
        """Return those of the files whose content differs from that of their targets."""
        small = [entry for entry in files if entry.name and entry.size < SMALL_FILE]
        names = {entry.name for entry in small}
        chunks = [c for e in files if e.name not in names for c in _chunks(e, 0, e.size)]
        found = list(self._different_chunks(chunks, self._part.target_of))
        if not small:
            return found
        text = script_text("digests", FILE_DIGESTS, path=self._options.source)
        with self._transfer.script(self._transfer.pool.ssh, text) as script:
            return found + list(different_files(script, small, self._part.target_of))

    # --- checks ---

    def _check_earlier(self, files: list[FileEntry]) -> None:
        """Compare what an earlier download received."""
        small: list[FileEntry] = []
        chunks: list[tuple[FileEntry, int, int]] = []
        for entry in files:
            earlier = self._part.earlier(entry)
            if earlier and entry.size < SMALL_FILE and entry.name:
                small.append(entry)
            else:
                chunks += [c for start, length in earlier for c in _chunks(entry, start, length)]
            for _, length in earlier:
                self._transfer.count(entry, length)
        for entry in self._different_chunks(chunks, self._part.place):
            with about(entry):
                self._refuse()
        self._compare_files(small)

    def _different_chunks(
        self, chunks: list[tuple[FileEntry, int, int]], place: Callable[[FileEntry], str | Path]
    ) -> Iterator[FileEntry]:
        if chunks:
            text = script_text("digests", CHUNK_DIGESTS, path=self._options.source.rstrip(b"/"))
            with self._transfer.script(self._transfer.pool.ssh, text) as script:
                yield from different_chunks(script, chunks, place)

    def _compare_files(self, files: list[FileEntry]) -> None:
        if not files:
            return
        text = script_text("digests", FILE_DIGESTS, path=self._options.source)
        with self._transfer.script(self._transfer.pool.ssh, text) as script:
            for entry in different_files(script, files, self._part.place):
                with about(entry):
                    self._refuse()

    def _refuse(self) -> None:
        self._part.clear()
        raise SSHError(DIFFERS)


def _chunks(entry: FileEntry, start: int, length: int) -> list[tuple[FileEntry, int, int]]:
    """Divide a range into chunks that a host hashes within the timeout."""
    end = start + length
    return [(entry, at, min(RANGE, end - at)) for at in range(start, end, RANGE)]


def _compare(line: bytes, digest: str) -> None:
    if line[:64] != digest.encode():
        raise SSHError("SHA-256 differs" if len(line) >= 64 else "the machine sent no SHA-256")
