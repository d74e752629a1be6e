"""Upload files and directories under a temporary name, which is renamed at the end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

from clore_client.errors import SSHError
from clore_client.log import logger
from clore_client.models.result import TransferResult
from clore_client.ssh.connect import ConnectionPool
from clore_client.ssh.transfer.entry import (
    BLOCK,
    TAR_BLOCK,
    TRANSFER_PIECE,
    FileEntry,
    LocalTree,
    Portion,
    about,
    kind_of,
    plan_portions,
    record_key,
    tar_header,
    whole_seconds,
)
from clore_client.ssh.transfer.remote_script import (
    LAST_PATIENCE,
    MAX_LINE,
    NoShellError,
    RemoteScript,
)
from clore_client.ssh.transfer.remote_tree import Comparison, ShellTarget
from clore_client.ssh.transfer.scripts import (
    CHUNK_DIGESTS,
    CONTROL,
    DIFFERS,
    FILE_DIGESTS,
    MAX_ANSWER,
    PUT,
    TARGET,
    different_chunks,
    different_files,
    encoded_name,
    parse_listing,
    script_text,
    sh_quoted,
)
from clore_client.ssh.transfer.sftp import SftpUpload
from clore_client.ssh.transfer.transfer import (
    Transfer,
    UploadOptions,
    is_content,
    upload_connections,
)
from clore_client.ssh.transport import NoChannelError, connection_errors

# sshd has a window of 2 MB for each channel, and allows ten channels on a connection: far from the
# host, more channels make an upload faster.
UPLOAD_CHANNELS = 8
RESUMABLE_CHANNELS = 2
META_LINES = 500


def upload_path(pool: ConnectionPool, checked: tuple[UploadOptions, LocalTree]) -> TransferResult:
    """Upload; see ``CloreClient.upload``."""
    options, tree = checked
    name = os.path.basename(os.path.abspath(tree.path))
    transfer = Transfer(pool, options, os.fsdecode(name) or "/", "upload")
    transfer.total = sum(entry.size for entry in tree.files)
    for left_out, why in tree.left_out:
        transfer.leave_out(left_out, why)
    with transfer.watched():
        path = _upload(transfer, tree)
    return transfer.result(path, tree.files)


def _upload(transfer: Transfer, tree: LocalTree) -> bytes:
    """Upload with the host's shell, or else over SFTP; return the path on the host."""
    careful = False
    while True:
        try:
            return Upload(transfer, tree, careful).run()
        except (NoShellError, NoChannelError) as error:
            transfer.restart()
            if careful or isinstance(error, NoShellError):
                logger.warning("files go over SFTP, which is slower: %s", error)
                return SftpUpload(transfer, tree).run()
            careful = True


class Upload:
    """One upload with the host's shell.

    The script CONTROL runs from start to end. Workers send large files in chunks, and small ones in
    tar archives.

    Parameters:
        careful: start the workers after CONTROL, which needs a channel first.
    """

    def __init__(self, transfer: Transfer, tree: LocalTree, careful: bool = False) -> None:
        self._transfer = transfer
        self._careful = careful or tree.is_folder or transfer.options.resume or transfer.takes_turns
        self._options: Any = transfer.options
        options = self._options
        self._tree = tree
        whole = os.path.abspath(tree.path)
        kind = "d" if tree.is_folder else "f"
        content = is_content(options.local)
        # With resume, the same name each time; else a random one.
        same = record_key((kind, content, whole, options.remote))[:20]
        self._values: dict[str, Any] = {
            "f": options.source,
            "content": int(content),
            "look": 0,
            "name": os.path.basename(whole) or b".",
            "kind": kind,
            "token": same if options.resume else os.urandom(10).hex(),
            "keep": int(options.resume),
            "follow": int(options.symlinks == "follow"),
        }
        self._control: RemoteScript | None = None
        self._lock = threading.Lock()

    def run(self) -> bytes:
        """Compare if that was asked for, upload, and return the path on the host."""
        if not self._options.compares:
            return self._run()
        target = ShellTarget(self._transfer, self._tree, self._values)
        comparison = Comparison(self._transfer, self._tree, target)
        if self._options.preview or not (self._tree.is_folder or self._tree.files):
            return comparison.path
        path = self._run()
        comparison.finish()
        return path

    def _run(self) -> bytes:
        transfer = self._transfer
        try:
            # Workers start without the answer of CONTROL, which saves a round trip.
            if not self._careful:
                self._plan(set())
                self._start()
            self._control = transfer.script(
                transfer.pool.ssh, self._control_script(), patient=self._careful
            )
            umask, done = self._ready(self._control)
            if self._careful:
                self._prepare(umask, done)
                self._start()
            transfer.finish_workers()
            self._check_sent()
            if self._tree.is_folder:
                self._check_tree(self._control)
                self._set_modes()
            self._control.send(b"go\n")
            path = self._control.answer(b"ok")
            self._control.finish()
            return path
        except BaseException:
            transfer.stop(but=self._control)
            transfer.join_workers()
            self._tidy()
            raise
        finally:
            transfer.join_workers()
            if self._control is not None:
                self._control.close()

    def _control_script(self) -> bytes:
        tree = self._tree
        size = 0 if tree.is_folder else tree.files[0].size
        return script_text(
            "upload", CONTROL, **self._values, preserve=int(self._options.preserve), size=size,
            mode=f"{tree.mode:o}", time=touch_time(tree.mtime), owner=os.urandom(8).hex(),
        )  # fmt: skip

    def _tidy(self) -> None:
        """Let the host remove what has arrived, and wait until it has done so."""
        if self._control is None:
            return
        self._control.end()
        failures: tuple[type[Exception], ...] = (SSHError, *connection_errors())
        try:
            with self._transfer.watchdog.limit(LAST_PATIENCE, self._control.close):
                self._control.rest(MAX_LINE)
        except failures as error:
            if not self._options.resume:
                logger.warning("a temporary file may stay on the machine: %s", error)

    def _ready(self, control: RemoteScript) -> tuple[int, set[str]]:
        """Wait for the host; return its umask, and the keys of what an earlier upload sent."""
        umask = control.answer(b"ready")
        if not re.fullmatch(rb"[0-7]{1,5}", umask):
            raise control.refused(b"ready " + umask)
        lines = control.until(self._values["token"].encode(), MAX_ANSWER)
        return int(umask, 8), set(lines.decode("ascii", "replace").split())

    def _prepare(self, umask: int, done: set[str]) -> None:
        if not self._options.preserve and self._tree.is_folder:
            for entry in self._tree.entries:
                entry.mode &= ~umask
        self._plan(done)
        if len(self._earlier) < len(done) and self._control is not None:  # the source has changed
            self._control.send(b"restart\n")
            self._control.until(self._values["token"].encode(), MAX_LINE)
            self._plan(set())

    def _plan(self, done: set[str]) -> None:
        self._portions = plan_portions(self._tree, self._options.resume)
        self._earlier = [portion for portion in self._portions if portion.key in done]
        self._left = [portion for portion in self._portions if portion.key not in done][::-1]
        self._confirmed = sum(portion.size for portion in self._earlier)

    def _start(self) -> None:
        transfer, options = self._transfer, self._options
        channels = RESUMABLE_CHANNELS if options.resume else UPLOAD_CHANNELS
        if transfer.near:
            channels = 1
        connections = upload_connections(options, self._tree)
        if (transfer.near and options.streams is None) or options.resume:
            connections = 1
        self._workers = min(len(self._left), connections * channels)
        # What several workers write is read back there, and compared.
        self._hashes = options.verify or options.resume or self._workers > 1
        transfer.start_workers(connections, self._workers, self._work)

    def _work(self, ssh: Any) -> None:
        """Send portions until none is left."""
        how = "op" if self._options.preserve else "opm"
        script = script_text("put", PUT, **self._values, how=how, hash=int(self._hashes))
        with self._transfer.script(ssh, script) as put:
            sent: list[tuple[Portion, bytes]] = []  # with digests, not confirmed yet
            while (portion := self._take()) is not None:
                while sent and (
                    portion.size + sum(earlier.size for earlier, _ in sent)
                    > self._transfer.ahead(self._confirmed) / self._workers
                ):
                    self._confirm(put, *sent.pop(0))
                sent.append((portion, self._send(put, portion)))
                if not put.send(b".\n"):
                    break  # the answer says why it takes no more
            put.end()
            for portion, digest in sent:
                self._confirm(put, portion, digest)
            put.answer(b"end")

    def _take(self) -> Portion | None:
        with self._lock:
            return self._left.pop() if self._left else None

    def _confirm(self, put: RemoteScript, portion: Portion, digest: bytes) -> None:
        with about(portion.entries[0]) if portion.start is not None else contextlib.nullcontext():
            if put.answer(b"done") != digest:
                raise SSHError("SHA-256 differs")
        with self._lock:
            self._confirmed += portion.size

    def _send(self, put: RemoteScript, portion: Portion) -> bytes:
        """Send a portion, and return how the host has to confirm it."""
        if portion.start is None:
            self._send_archive(put, portion)
            return b"-"
        (entry,) = portion.entries
        digest = hashlib.sha256()
        with about(entry):
            first = (portion.start // BLOCK, portion.size, portion.key.encode())
            put.send(b"%d %d %s " % first + encoded_name(entry.name) + b"\n")
            for piece in self._tree.pieces(entry, portion.start, portion.size):
                if self._hashes:
                    digest.update(piece)
                if not put.send(piece):
                    break
                self._transfer.moved(entry, len(piece))
        return digest.hexdigest().encode() if self._hashes else b"-"

    def _send_archive(self, put: RemoteScript, portion: Portion) -> None:
        headers = [tar_header(entry) for entry in portion.entries]
        padded = sum(e.size + -e.size % TAR_BLOCK for e in portion.entries)
        size = sum(map(len, headers)) + padded + 2 * TAR_BLOCK
        put.send(b"tar %d %s\n" % (size, portion.key.encode()))
        for piece in self._tar_pieces(headers, portion.entries):
            if not put.send(piece):
                break

    def _tar_pieces(self, headers: list[bytes], entries: list[FileEntry]) -> Iterator[bytes]:
        """Yield a tar archive in large pieces."""
        made = bytearray()
        for header, entry in zip(headers, entries, strict=True):
            with about(entry):
                made += header
                for piece in self._tree.pieces(entry, 0, entry.size) if entry.kind == "f" else ():
                    made += piece
                    if len(made) >= TRANSFER_PIECE:
                        yield bytes(made)
                        made.clear()
                made += bytes(-entry.size % TAR_BLOCK)
                if entry.kind == "f":
                    self._transfer.moved(entry, entry.size)
        yield bytes(made + bytes(2 * TAR_BLOCK))

    # --- checks ---

    def _check_sent(self) -> None:
        """Compare what an earlier upload sent, and with ``verify`` all small files."""
        if self._left:
            raise NoChannelError("the machine opened no further channel")
        if not self._tree.is_folder and self._tree.files and not self._tree.files[0].size:
            self._transfer.count(self._tree.files[0], 0)
        self._check_chunks([portion for portion in self._earlier if portion.start is not None])
        earlier = _archived(self._earlier)
        files = _archived(self._portions) if self._options.verify else earlier
        if files:
            self._check_files(files)
        for entry in earlier:
            self._transfer.count(entry, entry.size)

    def _check_chunks(self, chunks: list[Portion]) -> None:
        if not chunks:
            return
        with self._digests(CHUNK_DIGESTS) as script:
            asked = [(p.entries[0], p.start or 0, p.size) for p in chunks]
            for entry in different_chunks(script, asked, self._tree.place):
                with about(entry):
                    self._refuse()
        for entry, _, size in asked:
            self._transfer.count(entry, size)

    def _check_files(self, files: list[FileEntry]) -> None:
        with self._digests(FILE_DIGESTS) as script:
            for entry in different_files(script, files, self._tree.place):
                with about(entry):
                    self._refuse()

    def _digests(self, body: str) -> RemoteScript:
        text = script_text("digests", TARGET + "path=$p\n" + body, **self._values)
        return self._transfer.script(self._transfer.pool.ssh, text)

    def _refuse(self) -> None:
        if self._control is not None:
            self._control.send(b"wipe\n")
        raise SSHError(DIFFERS)

    def _check_tree(self, control: RemoteScript) -> None:
        """Compare the names and sizes of what has arrived."""
        control.send(b"list\n")
        there: dict[bytes, tuple[str, int]] = {}

        def take(mode: int, size: int, mtime: int, name: bytes) -> None:
            kind = kind_of(mode) or "l"
            there[name] = (kind, size if kind == "f" else 0)

        text = control.until(self._values["token"].encode(), MAX_ANSWER)
        parse_listing(text, len(self._tree.entries) * 2 + 100, take)
        for entry in self._tree.entries:
            if there.get(entry.name) != (entry.kind, entry.size):
                with about(entry):
                    found = there.get(entry.name)
                    raise SSHError(f"it has {found[1]} bytes there" if found else "it is not there")

    def _set_modes(self) -> None:
        """Set modes and times of large files and directories, the deepest first."""
        preserve = self._options.preserve
        folders = [entry for entry in self._tree.entries if entry.kind == "d"]
        odd = [entry for entry in folders if preserve or entry.mode & 0o700 != 0o700]
        large = {p.entries[0].name: p.entries[0] for p in self._portions if p.start is not None}
        entries = [*large.values(), *odd[::-1]]
        for first in range(0, len(entries), META_LINES):
            script = self._mode_script(entries[first : first + META_LINES])
            with self._transfer.script(self._transfer.pool.ssh, script) as running:
                running.end()
                running.answer(b"ok")

    def _mode_script(self, entries: list[FileEntry]) -> bytes:
        lines = [script_text("modes", TARGET + 'cd "$p" || exit 1\n', **self._values)]
        for entry in entries:
            lines.append(b"g=" + sh_quoted(b"./" + entry.name))
            lines.append(b'chmod %o "$g" || no "$g"' % entry.mode)
            if self._options.preserve:
                lines.append(b'TZ=UTC0 touch -t %s "$g"' % touch_time(entry.mtime).encode())
        return b"\n".join([*lines, b"echo ok"])


def _archived(portions: list[Portion]) -> list[FileEntry]:
    """Return the files that go in archives."""
    archives = [portion.entries for portion in portions if portion.start is None]
    return [entry for entries in archives for entry in entries if entry.kind == "f"]


def touch_time(mtime: int) -> str:
    """Convert a time in nanoseconds to UTC for ``touch -t``."""
    return time.strftime("%Y%m%d%H%M.%S", time.gmtime(whole_seconds(mtime)))
