"""Copying files and directories from a machine, of which nothing is believed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.models.result import Transferred
from clore_client.ssh.local_files import DoneRecord, merge_into, new_file, remove_part, write_all
from clore_client.ssh.remote import Exec, checked_name, far_command, far_path, parse_listing
from clore_client.ssh.transfer import (
    CHUNK,
    LONGEST_ANSWER,
    PART,
    Another,
    Item,
    Job,
    Lanes,
    Options,
    Reporter,
    file_digest,
    leave_out,
    parse_sums,
    plan,
)
from clore_client.ssh.upload import send_names
from clore_client.validation import check_number, short_repr

# What comes to us is held down by our own window only, which is large.
DOWNLOAD_CHANNELS = 2
DOWNLOAD_CONNECTIONS = 4
DOWNLOAD_MANY = 256 * 1024 * 1024  # bytes from which on further connections pay for their login
AT_ONCE = 128 * 1024 * 1024  # bytes of a file that comes with the first answer
MOST_FILES = 2_000_000
LAST_SECOND = 253_402_300_799  # of the year 9999; filesystems know no times far beyond


class RemoteTree:
    """What the machine says there is; read with care."""

    def __init__(self, tell: bool = True) -> None:
        """``tell``: of what is left out."""
        self._tell = tell
        self.items: list[Item] = []
        self.skipped: list[tuple[str, str]] = []
        self.root = Item(b"", 0, 0, 0o755, folder=True)
        self._folders = {b""}
        self._names: set[bytes] = set()

    @property
    def files(self) -> list[Item]:
        return [item for item in self.items if not item.folder]

    def take(self, mode: int, size: int, seconds: int, name: bytes) -> None:
        """One entry of the listing."""
        folder = stat.S_ISDIR(mode)
        item = Item(name, size, _nanoseconds(seconds), mode & 0o777, folder)
        if not name and folder:
            self.root = item
            return
        shown = checked_name(name)
        parent = name.rpartition(b"/")[0]
        if name in self._names or parent not in self._folders:
            raise SSHError(f"the machine lists {printable(repr(name), 120)} where it can't be")
        self._names.add(name)
        if folder:
            self._folders.add(name)
        if folder or stat.S_ISREG(mode):
            self.items.append(item)
        elif self._tell:
            leave_out(self.skipped, shown, "" if stat.S_ISLNK(mode) else None)


class DownloadOptions(Options):
    """The arguments of a download, checked; and where it is to go."""

    def __init__(
        self, remote: Any, local: Any, preserve: Any, verify: Any, resume: Any, streams: Any,
        max_bytes: Any, progress: Any, timeout: Any,
    ) -> None:  # fmt: skip
        super().__init__(local, remote, preserve, verify, resume, streams, progress, timeout)
        if max_bytes is not None:
            if type(max_bytes) is not int:
                raise TypeError(f"max_bytes must be a whole number, not {short_repr(max_bytes)}")
            check_number("max_bytes", max_bytes, unit="bytes")
        self.max_bytes: int | None = max_bytes
        self.far = far_path(self.remote)
        self.target = _target_of(os.fsdecode(os.path.expanduser(self.local)), self.remote)


def _target_of(local: str, remote: bytes) -> str:
    """Where it goes: into a directory that exists, else to that very name."""
    name = os.fsdecode(remote.rstrip(b"/").rpartition(b"/")[2])
    if os.path.isdir(local):
        whole = name in ("", ".", "..") or remote.rstrip(b"/") == b"~"
        return local if whole else os.path.join(local, name)
    parent = os.path.dirname(os.path.abspath(local))
    if local.endswith(("/", os.sep)) or not os.path.isdir(parent):
        missing = local if local.endswith(("/", os.sep)) else parent
        raise FileNotFoundError(f"local: there is no directory {printable(repr(missing), 300)}")
    return local


def check_download(*arguments: Any) -> DownloadOptions:
    """The arguments of a download, checked; nothing is sent yet."""
    return DownloadOptions(*arguments)


def download_path(ssh: Any, another: Another, options: DownloadOptions) -> Transferred:
    """See ``CloreClient.download``."""
    return Download(ssh, another, options).run()


class Download:
    """One download, from the first question to the rename."""

    def __init__(self, ssh: Any, another: Another, options: DownloadOptions) -> None:
        self._ssh = ssh
        self._another = another
        self._options = options
        self._report = Reporter(os.fsdecode(options.remote), options)
        self._files: list[Item] = []
        whole = os.path.abspath(options.target)
        same = hashlib.sha256(repr((options.remote, whole)).encode()).hexdigest()
        token = same[:20] if options.resume else os.urandom(10).hex()
        # A name that the next try finds again, or one of nobody else's.
        self._part = Path(os.path.dirname(whole)) / f"{PART}{token}"
        self._record = DoneRecord(self._part) if options.resume else None

    def run(self) -> Transferred:
        with self._report.watch:
            return self._run()

    def _run(self) -> Transferred:
        started = time.monotonic()
        tree = RemoteTree()
        try:
            with contextlib.ExitStack() as stack:
                if self._record is not None:
                    stack.enter_context(self._record)
                folder = self._look(tree)
                self._install(tree, folder)
        except BaseException as error:
            if not self._options.resume:
                remove_part(self._part)
            judged = self._report.judged(error, self._files)
            if judged is error:
                raise
            raise judged from error
        return self._report.result(self._options.target, self._files, started, tree.skipped)

    def _exec(self, verb: str, *arguments: bytes | str | int) -> Exec:
        timeout = self._options.timeout
        return Exec(self._ssh, far_command(verb, *arguments), self._report.watch, timeout)

    # --- what there is ---

    def _look(self, tree: RemoteTree) -> bool:
        """Ask what there is, and get it; whether it is a directory."""
        options = self._options
        ranges = options.resume or (options.streams or 1) > 1
        with self._exec("look", options.far, -1 if ranges else AT_ONCE, int(options.verify)) as (
            running
        ):
            kind, _, facts = running.line().partition(b" ")
            if kind == b"f":
                item = _file_facts(facts)
                self._accept([item], folder=False)
                if not ranges and item.size <= AT_ONCE:
                    self._receive_at_once(running, item)
                    return False
            elif kind == b"d":
                parse_listing(running.rest(LONGEST_ANSWER), MOST_FILES, tree.take)
                if running.status() != 0:
                    raise running.refused()
                self._accept(tree.files, folder=True)
            else:
                text = {b"n": "there is no such file", b"o": "it is no file"}
                raise SSHError(text.get(kind) or "the machine says what can't be understood")
        items = tree.items if kind == b"d" else self._files
        self._get(items, kind == b"d")
        return kind == b"d"

    def _accept(self, files: list[Item], folder: bool) -> None:
        """Refuse what is too large, and what has no place; before anything is made."""
        self._files = files
        size, most = sum(item.size for item in files), self._options.max_bytes
        if most is not None and size > most:
            raise SSHError(f"it has {size} bytes, and max_bytes is {most}")
        target = self._options.target
        if not folder and os.path.isdir(target):
            raise IsADirectoryError(f"local is a directory: {target!r}")
        if folder and os.path.lexists(target) and not os.path.isdir(target):
            raise NotADirectoryError(f"local is no directory: {target!r}")

    def _receive_at_once(self, running: Exec, item: Item) -> None:
        digest = hashlib.sha256()
        with new_file(self._part, item.mode) as file:
            self._receive(running, item, item.size, file, digest)
        if self._options.verify:
            _compare(running.line(), digest.hexdigest())
        _check_same(item, _file_facts(running.line()), self._report.called(item))
        _no_more(running)

    def _receive(self, running: Exec, item: Item, left: int, file: Any, digest: Any = None) -> None:
        """Exactly the bytes that were announced."""
        if not left:
            self._report.moved(item, 0)
        while left:
            piece = running.receive(min(CHUNK, left))
            if not piece:
                raise running.refused("", f"{left} bytes are missing {running.errors()}")
            write_all(file, piece)
            if digest is not None:
                digest.update(piece)
            left -= len(piece)
            self._report.moved(item, len(piece))

    # --- in pieces ---

    def _get(self, items: list[Item], folder: bool) -> None:
        jobs = plan(items, folder, self._options.resume)
        done = self._earlier(jobs)
        if folder:
            self._part.mkdir(exist_ok=bool(done))
            for item in items:
                if item.folder:
                    self._place(item).mkdir(exist_ok=bool(done))
        else:
            new_file(self._part, items[0].mode, again=bool(done)).close()
        todo = [job for job in jobs if job.key not in done]
        many = sum(job.size for job in todo) >= DOWNLOAD_MANY
        streams = self._options.streams or (DOWNLOAD_CONNECTIONS if many else 1)
        if todo:
            lanes = Lanes(self._ssh, self._another, streams, DOWNLOAD_CHANNELS)
            lanes.run(todo, self._do, self._report)
        self._check_earlier([job for job in jobs if job.key in done])
        self._check_unchanged(todo)

    def _earlier(self, jobs: list[Job]) -> set[str]:
        """The jobs that are done already; with another source, none are."""
        if self._record is None:
            return set()
        done = self._record.done
        if done and os.path.lexists(self._part) and done <= {job.key for job in jobs}:
            return set(done)
        remove_part(self._part)
        self._record.clear()
        return set()

    def _place(self, item: Item) -> Path:
        return self._part / checked_name(item.name) if item.name else self._part

    def _do(self, ssh: Any, job: Job) -> None:
        if job.length is None:
            self._get_bundle(ssh, job)
        else:
            self._get_range(ssh, job, job.length)
        if self._record is not None:
            self._record.add(job.key)

    def _far(self, item: Item) -> bytes:
        return self._options.far.rstrip(b"/") + b"/" + item.name if item.name else self._options.far

    def _get_range(self, ssh: Any, job: Job, length: int) -> None:
        (item,), digest = job.items, hashlib.sha256()
        command = far_command("get", self._far(item), *job.blocks, length)
        with self._report.exec(ssh, command) as running:
            with new_file(self._place(item), item.mode, again=True) as file:
                file.seek(job.start)
                self._receive(running, item, length, file, digest)
            _compare(running.line(), digest.hexdigest())
            _no_more(running)

    def _get_bundle(self, ssh: Any, job: Job) -> None:
        files = job.files
        if not files:
            return
        with self._report.exec(ssh, far_command("many", self._options.far)) as running:
            send_names(running, files)
            for item in files:
                with new_file(self._place(item), item.mode, again=True) as file:
                    file.truncate(0)
                    self._receive(running, item, item.size, file)
            _no_more(running)

    def _check_earlier(self, jobs: list[Job]) -> None:
        """What was here before is compared, too."""
        for job in jobs:
            if job.length is None:
                self._compare_all(job.files)
            else:
                (item,) = job.items
                with self._exec("rangesum", self._far(item), *job.blocks, job.length) as running:
                    there = parse_sums(running.rest(LONGEST_ANSWER), 1)
                if there != [file_digest(self._place(item), job.start, job.length)]:
                    self._differs(item)
            for item in job.files:
                self._report.count(item, item.size if job.length is None else job.length)

    def _check_unchanged(self, todo: list[Job]) -> None:
        """What came in pieces, or one after the other, must not have changed meanwhile."""
        bundled = [item for job in todo if job.length is None for item in job.files]
        ranged = [item for job in todo if job.length is not None for item in job.files]
        if self._options.verify:
            self._compare_all(bundled)
            bundled = []
        if not bundled and not ranged:
            return
        again = RemoteTree(tell=False)
        with self._exec("look", self._options.far, -1, 0) as running:
            kind, _, facts = running.line().partition(b" ")
            if kind == b"f":
                again.items.append(_file_facts(facts))
            elif kind == b"d":
                parse_listing(running.rest(LONGEST_ANSWER), MOST_FILES, again.take)
        now = {item.name: item for item in again.items}
        for item in bundled + ranged:
            _check_same(item, now.get(item.name), self._report.called(item))

    def _compare_all(self, files: list[Item]) -> None:
        if not files:
            return
        with self._exec("sums", self._options.far) as running:
            send_names(running, files)
            there = parse_sums(running.rest(LONGEST_ANSWER), len(files))
        for item, digest in zip(files, there, strict=True):
            if digest != file_digest(self._place(item), 0, item.size):
                self._differs(item)

    def _differs(self, item: Item) -> None:
        if self._record is not None:
            remove_part(self._part)
            self._record.clear()
        raise SSHError(f"SHA-256 of {printable(self._report.called(item), 300)} differs")

    # --- the end ---

    def _install(self, tree: RemoteTree, folder: bool) -> None:
        options, target = self._options, self._options.target
        merging = folder and os.path.lexists(target)
        if options.preserve:
            # From a directory that may not be written to, nothing could be moved.
            whole = tree.files if merging else [*tree.items[::-1], tree.root]
            for item in whole if folder else self._files:
                place = self._place(item)
                os.chmod(place, item.mode)
                os.utime(place, ns=(item.mtime, item.mtime))
        if not folder:
            if self._part.stat().st_size != self._files[0].size:
                raise SSHError(f"{self._part.stat().st_size} bytes have arrived")
            os.replace(self._part, target)
        elif not merging:
            os.rename(self._part, target)
        else:
            merge_into(self._part, target, tree.items, options.preserve)


def _file_facts(facts: bytes) -> Item:
    found = re.fullmatch(rb"([0-9]{1,18}) (-?[0-9]{1,18}) ([0-7]{1,5})", facts)
    if found is None:
        raise SSHError("the machine says what can't be understood")
    size, seconds, mode = found.groups()
    return Item(b"", int(size), _nanoseconds(int(seconds)), int(mode, 8) & 0o777)


def _check_same(item: Item, now: Item | None, name: str) -> None:
    if now is None or (now.size, now.mtime) != (item.size, item.mtime):
        raise SSHError(
            f"{printable(name, 300)} was changed meanwhile; of what is still being written, "
            "make a copy there, and download that"
        )


def _nanoseconds(seconds: int) -> int:
    return min(max(seconds, 0), LAST_SECOND) * 10**9


def _compare(line: bytes, digest: str) -> None:
    if line[:64] != digest.encode():
        raise SSHError("SHA-256 differs" if len(line) >= 64 else "the machine has no sha256sum")


def _no_more(running: Exec) -> None:
    """The end of the output, and an exit status of 0."""
    if running.receive(1):
        raise SSHError("the machine sends more than it announced")
    if running.status() != 0:
        raise running.refused()
