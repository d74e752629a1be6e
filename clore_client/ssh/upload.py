"""Copying files and directories to a machine: under a temporary name, renamed when complete."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.log import logger
from clore_client.models.result import Transferred
from clore_client.ssh.remote import Exec, far_command, far_path
from clore_client.ssh.transfer import (
    CHUNK,
    LONGEST_ANSWER,
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
from clore_client.ssh.transport import NoChannelError

# sshd takes 2 MB on a channel before it wants to be asked again, and ten channels on a connection:
# over a distance it is the number of channels that makes an upload fast.
UPLOAD_CHANNELS = 8
# From how many bytes on how many connections pay for their logins, which go on at the same time.
UPLOAD_CONNECTIONS = ((256 * 1024 * 1024, 4), (32 * 1024 * 1024, 2))
TAR_BLOCK = 512  # bytes


class LocalTree:
    """What is to be sent: files, directories, and what is left out."""

    def __init__(self, path: bytes, preserve: bool) -> None:
        self.path = path
        self.items: list[Item] = []
        self.skipped: list[tuple[str, str]] = []
        try:
            facts = os.stat(path)  # the one that is named may be a symlink
        except FileNotFoundError:
            shown = printable(repr(os.fsdecode(path)), 300)
            raise FileNotFoundError(f"local: there is nothing at {shown}") from None
        self.is_folder = stat.S_ISDIR(facts.st_mode)
        self._preserve = preserve
        if self.is_folder:
            self._scan(b"")
        elif stat.S_ISREG(facts.st_mode):
            self.items.append(self._item(b"", facts))
        else:
            raise ValueError(f"local is neither a file nor a directory: {os.fsdecode(path)!r}")

    @property
    def files(self) -> list[Item]:
        return [item for item in self.items if not item.folder]

    def place(self, item: Item) -> str:
        """Where an item is here."""
        return os.fsdecode(os.path.join(self.path, item.name) if item.name else self.path)

    def pieces(self, item: Item, start: int, length: int) -> Iterator[memoryview]:
        """A part of a file, which must stay as it was when it was looked at; one piece at a time.

        What was yielded is overwritten by the next.
        """
        buffer = memoryview(bytearray(min(CHUNK, length)))
        with open(self.place(item), "rb", buffering=0) as file:
            file.seek(start)
            while length and (size := file.readinto(buffer[:length])):
                length -= size
                yield buffer[:size]
            facts = os.fstat(file.fileno())
            if length or (facts.st_size, facts.st_mtime_ns) != (item.size, item.mtime):
                raise SSHError("it was changed meanwhile")

    def _scan(self, folder: bytes) -> None:
        with os.scandir(os.path.join(self.path, folder) if folder else self.path) as entries:
            found = sorted(entries, key=lambda e: e.name)
        for entry in found:
            name = os.path.join(folder, entry.name) if folder else entry.name
            facts = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(facts.st_mode):
                self.items.append(self._item(name, facts))
                self._scan(name)
            elif stat.S_ISREG(facts.st_mode):
                self.items.append(self._item(name, facts))
            else:
                link = stat.S_ISLNK(facts.st_mode)
                target = os.fsdecode(os.readlink(entry.path)) if link else ""
                leave_out(self.skipped, os.fsdecode(name), target if link else None)

    def _item(self, name: bytes, facts: os.stat_result) -> Item:
        folder, mode = stat.S_ISDIR(facts.st_mode), facts.st_mode & 0o777
        if not self._preserve:
            mode = 0o755 if folder or mode & 0o111 else 0o644
        if os.sep != "/":
            name = name.replace(os.fsencode(os.sep), b"/")
        return Item(name, facts.st_size, facts.st_mtime_ns, mode, folder)


def check_upload(local: Any, remote: Any, *rest: Any) -> tuple[Options, LocalTree]:
    """The arguments of an upload, checked, and what is to be sent; nothing is sent yet."""
    options = Options(local, remote, *rest)
    far_path(options.remote)
    return options, LocalTree(os.path.expanduser(options.local), options.preserve)


def upload_connections(options: Options, tree: LocalTree) -> int:
    """How many connections an upload uses."""
    if options.streams is not None:
        return options.streams
    size = sum(item.size for item in tree.items)
    return next((count for least, count in UPLOAD_CONNECTIONS if size >= least), 1)


def upload_path(ssh: Any, another: Another, checked: tuple[Options, LocalTree]) -> Transferred:
    """See ``CloreClient.upload``."""
    return Upload(ssh, another, *checked).run()


class Upload:
    """One upload, from the first question to the rename."""

    def __init__(self, ssh: Any, another: Another, options: Options, tree: LocalTree) -> None:
        self._ssh = ssh
        self._another = another
        self._options = options
        self._tree = tree
        whole = os.path.abspath(tree.path)
        name = os.path.basename(whole)
        self._report = Reporter(os.fsdecode(name) or "/", options)
        kind = "d" if tree.is_folder else "f"
        # A name that the next try finds again, or one of nobody else's.
        same = hashlib.sha256(repr((kind, whole, options.remote)).encode()).hexdigest()
        token = same[:20] if options.resume else os.urandom(10).hex()
        self._target = (far_path(options.remote), name or b".", kind, token)
        self._jobs = plan(tree.items, tree.is_folder, options.resume)
        # Whether what has arrived is read back and compared.
        self._last: Exec | None = None
        self._report.on_crowd = self._give_way
        self._hashes = options.verify or options.resume or len(self._jobs) > 1

    def run(self) -> Transferred:
        with self._report.watch:
            return self._run()

    def _run(self) -> Transferred:
        started = time.monotonic()
        try:
            earlier = self._earlier() if self._options.resume else set()
            self._send([job for job in self._jobs if job.key not in earlier])
            self._check_earlier([job for job in self._jobs if job.key in earlier])
            path = self._finish()
        except BaseException as error:
            self._report.watch.hurry()
            self._give_way()
            if not self._options.resume:
                self._wipe()
            judged = self._report.judged(error, self._tree.files)
            if judged is error:
                raise
            raise judged from error
        return self._report.result(path, self._tree.files, started, self._tree.skipped)

    def _verb(self, verb: str, *arguments: bytes | str | int) -> str:
        return far_command(verb, *self._target, *arguments)

    def _exec(self, verb: str, *arguments: bytes | str | int) -> Exec:
        timeout = self._options.timeout
        return Exec(self._ssh, self._verb(verb, *arguments), self._report.watch, timeout)

    def _ask(self, verb: str, *arguments: bytes | str | int) -> str:
        with self._exec(verb, *arguments) as running:
            running.end()
            return running.answer()

    def _wipe(self) -> None:
        try:
            self._ask("wipe")
        except (SSHError, OSError, EOFError) as error:
            logger.warning("a temporary file may stay on the machine: %s", error)

    # --- what an earlier try has left ---

    def _earlier(self) -> set[str]:
        """The jobs that are done already; with another source, none are."""
        with self._exec("begin") as running:
            running.end()
            first, *lines = running.rest(LONGEST_ANSWER).decode("ascii", "replace").split("\n")
            if first != "ok":
                raise running.refused(first.partition(" ")[2])
        done = {line for line in lines if line}
        if done <= {job.key for job in self._jobs}:
            return done
        self._ask("wipe")
        return set()

    def _check_earlier(self, jobs: list[Job]) -> None:
        """What was there before is compared, too."""
        for job in jobs:
            if job.length is None:
                there = self._sums(job.files)
                here = [file_digest(self._tree.place(f), 0, f.size) for f in job.files]
            else:
                with self._exec("putsum", job.items[0].name, *job.blocks, job.length) as running:
                    running.end()
                    there = parse_sums(running.rest(LONGEST_ANSWER), 1)
                here = [file_digest(self._tree.place(job.items[0]), job.start, job.length)]
            if there != here:
                self._wipe()
                raise SSHError("what an earlier try had left there is not what is here: removed")
            for item in job.files:
                self._report.count(item, item.size if job.length is None else job.length)

    def _sums(self, files: list[Item]) -> list[str]:
        return parse_sums(self._of_each("putsums", files), len(files))

    def _of_each(self, verb: str, files: list[Item]) -> bytes:
        if not files:
            return b""
        with self._exec(verb) as running:
            send_names(running, files)
            text = running.rest(LONGEST_ANSWER)
            if running.status() != 0:
                raise running.refused()
            return text

    # --- sending ---

    def _send(self, jobs: list[Job]) -> None:
        if jobs:
            streams = upload_connections(self._options, self._tree)
            Lanes(self._ssh, self._another, streams, UPLOAD_CHANNELS).run(
                jobs, self._do, self._report, self._prepare_finish
            )

    def _do(self, ssh: Any, job: Job) -> None:
        if job.length is None:
            self._send_bundle(ssh, job.items, job.key)
        else:
            self._send_range(ssh, job, job.length)

    def _send_range(self, ssh: Any, job: Job, length: int) -> None:
        item, hashed, digest = job.items[0], int(self._hashes), hashlib.sha256()
        command = self._verb(
            "put", item.name, *job.blocks, length, job.key, hashed, int(self._options.resume)
        )
        with self._report.exec(ssh, command) as running:
            for piece in self._tree.pieces(item, job.start, length):
                if hashed:
                    digest.update(piece)
                if not running.send(piece):
                    break  # the answer says why it takes no more
                self._report.moved(item, len(piece))
            running.end()
            if running.answer() != (digest.hexdigest() if hashed else "-"):
                raise SSHError("SHA-256 differs")

    def _send_bundle(self, ssh: Any, items: list[Item], key: str) -> None:
        last = key == "-"  # modes and times of directories
        times, keep = "p" if self._options.preserve else "m", int(self._options.resume)
        with self._report.exec(ssh, self._verb("untar", times, key, keep)) as running:
            for item in items:
                # Files are to come into a directory, whatever its mode will be.
                mode = item.mode | 0o700 if item.folder and not last else item.mode
                if not running.send(tar_header(item, mode)) or not self._send_small(running, item):
                    break
            running.send(bytes(2 * TAR_BLOCK))
            running.end()
            running.answer()

    def _send_small(self, running: Exec, item: Item) -> bool:
        if item.folder:
            return True
        for piece in self._tree.pieces(item, 0, item.size):
            if not running.send(piece):
                return False
            self._report.moved(item, len(piece))
        if not item.size:
            self._report.moved(item, 0)
        return running.send(bytes(-item.size % TAR_BLOCK))

    # --- the end ---

    def _finish_verb(self) -> str:
        if self._tree.is_folder:
            return self._verb("finish")
        (item,) = self._tree.files
        times = seconds_of(item, self._options.preserve)
        return self._verb("finish", item.size, f"{item.mode:o}", times)

    def _prepare_finish(self) -> None:
        """Start what comes last: it waits for its word, which saves a round trip in the end."""
        if not self._tree.is_folder:
            with contextlib.suppress(NoChannelError):
                self._last = Exec(self._ssh, self._finish_verb(), self._report.watch)

    def _give_way(self) -> None:
        """What comes last must not take the one channel that there is."""
        if self._last is not None:
            self._last.close()
            self._last = None

    def _finish(self) -> str:
        if self._tree.is_folder:
            self._settle_tree()
        watch, timeout = self._report.watch, self._options.timeout
        with self._last or Exec(self._ssh, self._finish_verb(), watch, timeout) as running:
            running.send(b"go\n")
            running.end()
            return running.answer().removeprefix("./")

    def _settle_tree(self) -> None:
        """Compare what has arrived; give modes and times to what has none yet."""
        tree, preserve = self._tree, self._options.preserve
        if not tree.items:
            self._send_bundle(self._ssh, [], "-")
        sizes = self._of_each("sizes", tree.files).split()
        if len(sizes) != len(tree.files):
            raise SSHError(f"{len(sizes)} of {len(tree.files)} files arrived")
        for item, size in zip(tree.files, sizes, strict=True):
            if size != str(item.size).encode():
                raise SSHError(f"{item.shown} has {printable(repr(size), 40)} bytes there")
        if self._options.verify:
            here = [file_digest(tree.place(f), 0, f.size) for f in tree.files]
            for item, one, other in zip(tree.files, here, self._sums(tree.files), strict=True):
                if one != other:
                    raise SSHError(f"SHA-256 of {item.shown} differs")
        for job in self._jobs:
            item = job.items[0]
            if job.length is not None and not job.start and (preserve or item.mode & 0o111):
                self._ask("meta", item.name, f"{item.mode:o}", seconds_of(item, preserve))
        folders = [item for item in tree.items if item.folder]
        if preserve and folders:
            # The deepest first: what is made in a directory changes its time.
            self._send_bundle(self._ssh, folders[::-1], "-")


def seconds_of(item: Item, preserve: bool) -> str:
    """The time for ``touch``, or ``-``."""
    return f"{item.mtime // 10**9}.{item.mtime % 10**9:09d}" if preserve else "-"


def send_names(running: Exec, files: list[Item]) -> None:
    """A list for ``xargs -0``."""
    running.send(b"".join(b"./" + item.name + b"\0" for item in files))
    running.end()


def tar_header(item: Item, mode: int) -> bytes:
    """What stands before an item in a tar stream; no user's name or number goes out."""
    import tarfile  # not cheap

    info = tarfile.TarInfo("./" + os.fsdecode(item.name))
    info.size, info.mode, info.mtime = item.size, mode, item.mtime // 10**9
    info.type = tarfile.DIRTYPE if item.folder else tarfile.REGTYPE
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
