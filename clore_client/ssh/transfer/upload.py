"""Upload files and directories under a temporary name, which is renamed at the end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from clore_client.errors import SSHError
from clore_client.log import logger
from clore_client.models.result import TransferResult
from clore_client.ssh.connect import ConnectionPool
from clore_client.ssh.transfer.entry import (
    BLOCK,
    MAX_FILES,
    TAR_BLOCK,
    TRANSFER_PIECE,
    FileEntry,
    LocalTree,
    Portion,
    RemoteTree,
    about,
    parse_listing,
    part_token,
    plan_portions,
    tar_header,
    whole_seconds,
)
from clore_client.ssh.transfer.remote_script import NoShellError, RemoteScript
from clore_client.ssh.transfer.scripts import (
    CHECK_TOOLS,
    CONTROL,
    DIFFERS,
    LIST_TARGET,
    MAX_ANSWER,
    PUT,
    REMOVE,
    TARGET,
    encoded_name,
    script_text,
)
from clore_client.ssh.transfer.sftp import SftpUpload, sftp_session
from clore_client.ssh.transfer.transfer import FileRange, Transfer, UploadOptions
from clore_client.ssh.transport import NoChannelError

# sshd has a window of 2 MB for each channel, and allows ten channels on a connection. If the round
# trip is long, more channels make an upload faster.
UPLOAD_CHANNELS = 8
RESUMABLE_CHANNELS = 2
MAX_UNCONFIRMED = 1000  # portions; the answers to all of them fit in the window of a channel
MODE_LINES = 500  # files whose modes the host sets within the timeout


def upload_path(pool: ConnectionPool, checked: tuple[UploadOptions, LocalTree]) -> TransferResult:
    """Upload; see ``CloreClient.upload``."""
    options, tree = checked
    name = os.fsdecode(os.path.basename(tree.whole)) or "/"
    transfer = Transfer(pool, options, name, "upload")
    transfer.total = tree.size
    for left_out, why in tree.left_out:
        transfer.leave_out(left_out, why)
    with transfer.watched():
        path = _upload(transfer, tree)
    return transfer.result(path, tree.files)


def _upload(transfer: Transfer, tree: LocalTree, careful: bool = False) -> bytes:
    """Upload with the host's shell, or else over SFTP; return the path on the host."""
    try:
        return _compare_and_send(transfer, tree, Upload(transfer, tree, careful))
    except (NoShellError, NoChannelError) as error:
        transfer.restart()
        if not careful and isinstance(error, NoChannelError):
            return _upload(transfer, tree, careful=True)
        logger.warning("the upload uses SFTP, which is slower: %s", error)
        with sftp_session(transfer) as remote:
            return _compare_and_send(transfer, tree, SftpUpload(transfer, tree, remote))


def _compare_and_send(transfer: Transfer, tree: LocalTree, sender: Upload | SftpUpload) -> bytes:
    """Upload, with ``skip_unchanged``, ``preview`` and ``delete``; return the path on the host."""
    options = transfer.options
    if not options.compares:
        return sender.send()
    path, there = sender.listing()
    by_name = there.by_name
    deletes: list[bytes] = []
    if options.delete is not False:
        transfer.deletes = deletes = _extra_names(tree, there, options.delete)
    transfer.leave_unchanged(tree, by_name.get, sender.different)
    transfer.total = tree.size
    if options.preview or not (tree.is_folder or tree.files):
        return path
    path = sender.send()
    folders = [name for name in deletes if by_name[name].kind == "d"]
    sender.remove([name for name in deletes if by_name[name].kind != "d"], folders)
    return path


def _extra_names(
    tree: LocalTree, there: RemoteTree, delete: Literal[True] | frozenset[bytes]
) -> list[bytes]:
    """Return the names that only the target has, deepest first: those in ``delete``, or all.

    Names that match ``exclude``, or that the upload left out, are not returned.
    """
    left_out = {name for name, _ in tree.left_out}
    stay = {b"", *there.excluded, *left_out, *(entry.name for entry in tree.entries)}
    kept: set[bytes] = set()
    for name in [*there.by_name, *there.excluded]:
        parts = name.split(b"/")
        above = [b"/".join(parts[:n]) for n in range(1, len(parts))]
        if name in stay or not left_out.isdisjoint(above):
            kept.update(above, [name])
    names = [n for n in there.by_name if n not in kept and (delete is True or n in delete)]
    return sorted(names, reverse=True)


class Upload:
    """Upload with the host's shell.

    The script CONTROL runs from start to end. Workers send large files in chunks, and small ones in
    tar archives.

    Parameters:
        careful: start the workers after CONTROL, which needs a channel first.
    """

    def __init__(self, transfer: Transfer, tree: LocalTree, careful: bool) -> None:
        options = self._options = transfer.options
        self._transfer = transfer
        self._careful = careful or tree.is_folder or options.resume or transfer.takes_turns
        self._tree = tree
        kind, content = tree.root.kind, options.content
        token = part_token(options.resume, kind, content, tree.whole, options.remote)
        self._token = token.encode()
        self._values: dict[str, Any] = {
            "f": options.source,
            "content": int(content),
            "name": os.path.basename(tree.whole) or b".",
            "kind": kind,
            "token": token,
            "keep": int(options.resume),
            "follow": int(options.symlinks == "follow"),
        }
        self._control: RemoteScript | None = None
        self._lock = threading.Lock()

    def _script(self, verb: str, *parts: str, **values: Any) -> RemoteScript:
        text = script_text(verb, *parts, **self._values, **values)
        return self._transfer.script(self._transfer.pool.ssh, text)

    def listing(self) -> tuple[bytes, RemoteTree]:
        """Return the path of the target, and its entries."""
        with self._script("look", CHECK_TOOLS, TARGET, LIST_TARGET) as script:
            path = script.answer(b"target")
            listed = script.until(self._token, MAX_ANSWER)
            return path, parse_listing(listed, MAX_FILES, self._options.excludes)

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        """Return those of the files whose content differs on the host."""
        ranges = [(entry, 0, entry.size) for entry in files]
        return list(self._different(ranges, "path=$f\n"))

    def _different(self, ranges: Iterable[FileRange], setup: str) -> Iterator[FileEntry]:
        return self._transfer.different(ranges, self._tree.place, TARGET + setup, **self._values)

    def remove(self, files: list[bytes], folders: list[bytes]) -> None:
        """Remove files, and directories if they are empty, in this order."""
        for what, names in (("f", files), ("d", folders)):
            if names:
                with self._script("remove", TARGET, REMOVE, what=what) as script:
                    script.send_names(names)
                    script.answer(b"removed")

    def send(self) -> bytes:
        """Send the files, and return the path of the target."""
        transfer = self._transfer
        try:
            # Workers start without the answer of CONTROL, which saves a round trip.
            if not self._careful:
                self._plan(set())
                self._start()
            script, patient = self._control_script(), self._careful
            control = self._control = transfer.script(transfer.pool.ssh, script, patient=patient)
            self._begin(control)
            transfer.finish_workers()
            self._check_sent(control)
            if self._tree.is_folder:
                self._check_tree(control)
                self._set_modes(control)
            control.send(b"go\n")
            path = control.answer(b"ok")
            control.finish()
            return path
        except BaseException:
            transfer.give_up(self._control)
            raise

    def _control_script(self) -> bytes:
        root = self._tree.root
        return script_text(
            "upload", CHECK_TOOLS, TARGET, CONTROL, **self._values,
            preserve=int(self._options.preserve), size=root.size, mode=f"{root.mode:o}",
            time=touch_time(root.mtime), owner=os.urandom(8).hex(),
        )  # fmt: skip

    def _begin(self, control: RemoteScript) -> None:
        """Wait for the host; plan what an earlier upload has left, and start the workers."""
        umask = control.answer(b"ready")
        if not re.fullmatch(rb"[0-7]{1,5}", umask):
            raise control.refused(b"ready " + umask)
        done = set(control.until(self._token, MAX_ANSWER).decode("ascii", "replace").split())
        if not self._careful:
            return
        if not self._options.preserve:
            for entry in self._tree.entries:
                entry.mode &= ~int(umask, 8)
        self._plan(done)
        if len(self._earlier) < len(done):  # the source has changed
            control.send(b"restart\nsync\n")
            control.answer(self._token)
            self._plan(set())
        self._start()

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
        connections = transfer.pool.size
        if (transfer.near and options.streams is None) or options.resume:
            connections = 1
        self._workers = min(len(self._left), connections * channels)
        # If several workers write a file, the host reads it again, and digests are compared.
        self._hashes = options.verify or options.resume or self._workers > 1
        transfer.start_workers(connections, self._workers, self._work)

    def _work(self, ssh: Any) -> None:
        """Send portions until none is left."""
        how, hashes = "op" if self._options.preserve else "opm", int(self._hashes)
        # Two dd that write holes into one file can shorten it.
        conv = "notrunc,sparse" if self._workers == 1 else "notrunc"
        script = script_text("put", TARGET, PUT, **self._values, how=how, hash=hashes, conv=conv)
        with self._transfer.script(ssh, script) as put:
            sent: list[tuple[Portion, bytes]] = []  # with digests, not confirmed yet
            while (portion := self._take()) is not None:
                ahead = self._transfer.ahead(self._confirmed) / self._workers
                while sent and (
                    len(sent) >= MAX_UNCONFIRMED
                    or portion.size + sum(earlier.size for earlier, _ in sent) > ahead
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
        made = bytearray()  # sent in large pieces
        for header, entry in zip(headers, portion.entries, strict=True):
            with about(entry):
                made += header
                for piece in self._tree.pieces(entry, 0, entry.size) if entry.kind == "f" else ():
                    made += piece
                    if len(made) >= TRANSFER_PIECE:
                        if not put.send(bytes(made)):
                            return
                        made.clear()
                made += bytes(-entry.size % TAR_BLOCK)
                if entry.kind == "f":
                    self._transfer.moved(entry, entry.size)
        put.send(bytes(made + bytes(2 * TAR_BLOCK)))

    # --- checks ---

    def _check_sent(self, control: RemoteScript) -> None:
        """Compare what an earlier upload sent, and with ``verify`` all small files."""
        if self._left:
            raise NoChannelError("the host opened no further channel")
        if not self._tree.is_folder and not self._tree.root.size:
            self._transfer.count(self._tree.root, 0)
        compared = self._earlier
        if self._options.verify:
            compared = [portion for portion in compared if portion.start is not None]
            compared += [portion for portion in self._portions if portion.start is None]
        for entry in self._different(_ranges(compared), "path=$p\n"):
            with about(entry):
                control.send(b"wipe\n")
                raise SSHError(DIFFERS)
        for entry, _, size in _ranges(self._earlier):
            self._transfer.count(entry, size)

    def _check_tree(self, control: RemoteScript) -> None:
        """Compare the names and sizes of the received files."""
        control.send(b"list\nsync\n")
        text = control.until(self._token, MAX_ANSWER)
        there = parse_listing(text, len(self._tree.entries) * 2 + 100).by_name
        for entry in self._tree.entries:
            found = there.get(entry.name)
            with about(entry):
                if found is None:
                    raise SSHError("it is missing on the host")
                if (found.kind, found.size) != (entry.kind, entry.size):
                    raise SSHError(f"it has {found.size} bytes on the host")

    def _set_modes(self, control: RemoteScript) -> None:
        """Set modes and times of large files and directories, the deepest first."""
        preserve = self._options.preserve
        folders = [entry for entry in self._tree.entries if entry.kind == "d"]
        changed = [entry for entry in folders if preserve or entry.mode & 0o700 != 0o700]
        large = {p.entries[0].name: p.entries[0] for p in self._portions if p.start is not None}
        for number, entry in enumerate([*large.values(), *changed[::-1]], 1):
            name = encoded_name(entry.name)
            control.send(b"mode %o %s %s\n" % (entry.mode, touch_time(entry.mtime).encode(), name))
            if number % MODE_LINES == 0:
                control.send(b"sync\n")
                control.answer(self._token)


def _ranges(portions: list[Portion]) -> Iterator[FileRange]:
    """Yield the ranges of portions."""
    for portion in portions:
        for entry in portion.entries:
            if portion.start is not None:
                yield entry, portion.start, portion.size
            elif entry.kind == "f":
                yield entry, 0, entry.size


def touch_time(mtime: int) -> str:
    """Convert a time in nanoseconds to UTC for ``touch -t``."""
    return time.strftime("%Y%m%d%H%M.%S", time.gmtime(whole_seconds(mtime)))
