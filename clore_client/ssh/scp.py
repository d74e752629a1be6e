"""Guard the package scp against hosts that cheat, and against calls that never return."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import IO, Any

from clore_client.errors import SSHError, TransferError, printable
from clore_client.log import logger
from clore_client.ssh.connect import import_paramiko
from clore_client.ssh.transport import connection_errors, open_session, reason, request_exec
from clore_client.ssh.watchdog import Watchdog
from clore_client.validation import check_number, short_repr

SCP_TIMEOUT = 30.0  # seconds of silence
MAX_RECORD = 16384  # bytes; the longest honest one is an error with a path in it
MAX_FOLDER_DEPTH = 64
MAX_SCP_TIME = 253_402_300_799  # the end of the year 9999
UNNAMED = (b"", b".", b"..")  # how scp calls /, . and .. when they are asked for
ScpProgress = Callable[[bytes, int, int], Any]


class ScpError(Exception):
    """A transfer that the guard, or the host, refused."""


def guarded_scp(
    ssh: Any,
    *,
    socket_timeout: float = SCP_TIMEOUT,
    max_bytes: int | None = None,
    progress: ScpProgress | None = None,
    owns_ssh: bool = False,
) -> Any:
    """Return a ``scp.SCPClient`` whose host may be hostile.

    Each record of the host is checked before scp acts on it, every wait has an end, and what goes
    wrong is a :class:`TransferError`. A transfer that fails may leave a partial file inside the
    target; nothing outside of the target is touched. With ``client.sanitize`` replaced, a remote
    path may hold ``*``, ``?`` and ``[...]`` in its last part.

    Parameters:
        socket_timeout: seconds of silence.
        max_bytes: of all files of one ``get()`` together; None for no limit.
        progress: called with (name, size, done), as ``scp.SCPClient`` does.
        owns_ssh: whether ``close()`` also closes ``ssh``.
    """
    client_class = _guarded_class()
    check_number("socket_timeout", socket_timeout, above=True, maximum=1e6, unit="seconds")
    if max_bytes is not None:
        check_number("max_bytes", max_bytes, unit="bytes")
    transport = ssh.get_transport()
    if transport is None or not transport.is_active():
        raise SSHError("scp() needs a connection, and this one is closed")
    try:
        client = client_class(transport, socket_timeout=socket_timeout, progress=progress)
    except OSError as error:
        raise SSHError(f"the connection broke: {reason(error)}") from error
    client.guard(max_bytes, ssh if owns_ssh else None)
    return client


@functools.cache
def _guarded_class() -> Any:
    import_paramiko()
    try:
        scp_module = importlib.import_module("scp")
    except ImportError as error:
        raise ImportError(
            "scp() needs scp: pip install 'clore-client[ssh]' (or: pip install paramiko scp)"
        ) from error
    return type("GuardedSCPClient", (ScpGuard, scp_module.SCPClient), {})


class ScpChannel:
    """A channel that hands out one record, one status or the bytes of one file at a time.

    scp takes whatever one ``recv`` brings for one record; packets are cut elsewhere.
    """

    def __init__(self, transport: Any, timeout: float, watchdog: Watchdog) -> None:
        self._timeout = timeout
        self._watchdog = watchdog
        self._transport = transport
        self._buffer = b""
        self.content_left = 0  # bytes of a file that come next
        self.reads_records = False  # or else statuses
        self._status_next = False
        with self._limited("opened no channel"):
            self._channel = open_session(transport, timeout)

    closed = False  # for scp, which would otherwise stop reading what came before the end

    def settimeout(self, seconds: float) -> None:
        """Ignore what scp sets: the guard's own timeout holds."""

    def exec_command(self, command: bytes) -> None:
        with self._limited("did not start scp"):
            request_exec(self._channel, command)

    def send(self, data: Any) -> int:
        with self._limited("took nothing"):
            return int(self._channel.send(data)) or self._fail()

    def sendall(self, data: Any) -> None:
        view = memoryview(data.encode() if isinstance(data, str) else data)
        while view:
            view = view[self.send(view[:131072]) :]

    def recv_stderr_ready(self) -> bool:
        return bool(self._channel.recv_stderr_ready())

    def recv_stderr(self, size: int) -> bytes:
        return bytes(self._channel.recv_stderr(size))

    def recv(self, size: int) -> bytes:
        if self.content_left:
            data = self._take(min(size, self.content_left)) or self._fail_read()
            self.content_left -= len(data)
            self._status_next = not self.content_left
            return data
        status_next, self._status_next = self._status_next, False
        if self.reads_records and not status_next:
            return self._line()
        status = self._take(1)
        return status + self._line() if status in (b"\1", b"\2") else status

    def expect_content(self, size: int) -> None:
        self.content_left = size
        self._status_next = not size

    def finish(self) -> None:
        """Check that scp ended well, and has no more to say."""
        with self._limited("did not take the end"):
            self._channel.shutdown_write()
        if self._take(1):
            raise ScpError("the host sent more than it announced")
        if not self._channel.status_event.wait(self._timeout) or self._channel.exit_status > 0:
            self._fail()

    def close(self) -> None:
        with contextlib.suppress(ScpError), self._limited("closed nothing"):
            self._channel.close()

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            if len(line) > MAX_RECORD:
                raise ScpError("the host sent a line without an end")
            piece = self._take(MAX_RECORD, b"\n")
            if not piece:
                return line and self._fail_read()
            line += piece
        return line

    def _take(self, most: int, until: bytes = b"") -> bytes:
        if not self._buffer:
            with self._limited("sent nothing"):
                self._buffer = self._channel.recv(131072)
        end = self._buffer.find(until) + 1 if until else most
        data, self._buffer = self._buffer[: end or most], self._buffer[end or most :]
        return data

    def _fail_read(self) -> bytes:
        self._fail()
        return b""

    def _fail(self) -> int:
        """Say how the host ended this."""
        if not self._channel.status_event.wait(self._timeout):
            raise ScpError(f"the host did not end scp within {self._timeout:g}s")
        how = f"scp on the host ended with exit code {self._channel.exit_status}"
        if self._channel.exit_status < 0:
            gone = not self._transport.is_active()
            how = "the connection broke" if gone else "the host has closed the channel"
        said = self._channel.recv_stderr(MAX_RECORD) if self.recv_stderr_ready() else b""
        said = said.strip() or self._buffer.strip(b"\0\1\2\n ")
        raise ScpError(f"{how}: {said.decode('utf-8', 'replace')}" if said else how)

    @contextlib.contextmanager
    def _limited(self, failing: str) -> Iterator[None]:
        """Run a call of paramiko, which ends in time and raises nothing but ScpError."""
        limit = None
        failures: tuple[type[Exception], ...] = (SSHError, *connection_errors())
        try:
            with self._watchdog.limit(self._timeout + 1.0, self._transport.close) as limit:
                yield
        except failures as error:
            late = isinstance(error, TimeoutError) or "imeout" in str(error)
            if late or (limit is not None and limit.expired):
                raise ScpError(f"the host {failing} within {self._timeout:g}s") from error
            raise ScpError(f"the host {failing}: {reason(error)}") from error


class ScpGuard:
    """Checks around the methods of ``scp.SCPClient``, which does the work."""

    channel: Any
    transport: Any
    scp_command: bytes
    sanitize: Any
    socket_timeout: float
    _progress: Any
    _recv_dir: Any
    _rename: bool

    def guard(self, max_bytes: int | None, owned: Any) -> None:
        """Set what ``scp.SCPClient`` has no place for."""
        self._max_bytes = max_bytes
        self._owned = owned
        self._quote = self.sanitize
        self._watchdog: Watchdog | None = None
        self._own_error: BaseException | None = None
        self._doing: tuple[str, int, int | None] = ("", 0, None)
        self._call_progress, self._progress = self._progress, self._report

    def _report(self, name: Any, size: int, done: int, *more: Any) -> None:
        self._doing = (self._doing[0], done, size)
        try:
            if self._call_progress is not None:
                self._call_progress(name, size, done, *more)
        except BaseException as error:
            self._own_error = error  # the caller's own: it is not made a TransferError
            raise

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel, and the connection where that is ours."""
        if self._watchdog is not None:  # scp itself calls this at the end of a transfer
            self.channel.finish()
        elif self._owned is not None:
            self._owned.close()

    def _open(self) -> Any:
        if self.channel is None:
            watchdog = self._watchdog or Watchdog()
            self.channel = ScpChannel(self.transport, self.socket_timeout, watchdog)
        return self.channel

    @contextlib.contextmanager
    def _transfer(self, verb: str, name: Any) -> Iterator[None]:
        """Watch one transfer, and make a TransferError of what goes wrong."""
        scp_error: type[Exception] = importlib.import_module("scp").SCPException
        failures: tuple[type[Exception], ...] = (
            ScpError,
            SSHError,
            scp_error,
            *connection_errors(),
        )
        self._doing = (os.fsdecode(name), 0, None)
        try:
            with Watchdog() as self._watchdog:
                try:
                    yield
                finally:
                    if self.channel is not None:
                        self.channel.close()
        except failures as error:
            if error is self._own_error:
                raise
            named, done, total = self._doing
            shown, text = printable(named, 300), printable(str(error).strip(), 500)
            far = "" if total is None else f" ({done} of {total} bytes)"
            here = "on this machine: " if isinstance(error, OSError) else ""
            says = "the host says: " if isinstance(error, scp_error) else ""
            raise TransferError(
                f"{shown} was not {verb}{far}: {here}{says}{text}",
                name=shown, done=done, total=total,
            ) from error  # fmt: skip
        finally:
            self._watchdog = self.channel = self._own_error = None

    # --- receiving ---

    def get(
        self, remote_path: Any, local_path: Any = "", recursive: bool = False,
        preserve_times: bool = False,
    ) -> None:  # fmt: skip
        """Receive files, and with ``recursive`` folders, as ``scp.SCPClient.get`` does."""
        paths = [_remote_path(path) for path in _path_list(remote_path)]
        target = os.path.realpath(os.fsdecode(local_path) or os.curdir)
        if len(paths) > 1 and not os.path.isdir(target):
            raise ValueError(f"local_path: {printable(repr(target), 200)} is no folder for several")
        self._target = target
        self._wanted = [_asked_name(path, self.sanitize is self._quote) for path in paths]
        self._missing = list(self._wanted)
        self._recursive, self._keeps_times = recursive, preserve_times
        self._depth_now, self._left = 0, self._max_bytes
        self._time_pending = False
        with self._transfer("received", paths[0]):
            self._open().reads_records = True
            self.scp_command = b"scp"
            parent: Any = super()
            parent.get(paths, os.fsencode(target), recursive, preserve_times)

    def _recv_all(self) -> None:
        parent: Any = super()
        parent._recv_all()
        if self._depth_now:
            raise ScpError("the host did not end a folder")
        if self._missing:
            self.channel.finish()
            raise ScpError(f"{os.fsdecode(self._missing[0])!r} was asked for, and has not come")

    def _recv_file(self, record: bytes) -> None:
        mode, size, name = self._checked(record, rb"([0-7]{3,7}) (\d{1,18}) ([^\n]*)\Z")
        path = self._place(name)
        self._doing = (self._shown(path), 0, size)
        found = _lstat(path)
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise ScpError(f"{os.fsdecode(path)!r} is here already, and is no file")
        if self._left is not None:
            self._left -= size
            if self._left < 0:
                raise ScpError(f"the host sends more than max_bytes={self._max_bytes}")
        if found is not None and not self._keeps_times:
            mode = found.st_mode & 0o777
        self.channel.expect_content(size)
        # scp takes spaces off the end of a name, so it gets the whole path as one to write to.
        folder, self._recv_dir, self._rename = self._recv_dir, path, True
        parent: Any = super()
        parent._recv_file(b"%04o %d -" % (mode, size))
        self._recv_dir = folder

    def _recv_pushd(self, record: bytes) -> None:
        mode, _, name = self._checked(record, rb"([0-7]{3,7}) (0) ([^\n]*)\Z")
        if not self._recursive:
            raise ScpError("the host sent a folder, and recursive is not set")
        if self._depth_now >= MAX_FOLDER_DEPTH:
            raise ScpError(f"the host sent more than {MAX_FOLDER_DEPTH} folders in each other")
        path = self._place(name)
        self._doing = (self._shown(path), 0, None)
        found = _lstat(path)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise ScpError(f"{os.fsdecode(path)!r} is here already, and is no folder")
        here = stat.S_IMODE(found.st_mode) if found is not None else mode | 0o700
        self._depth_now += 1
        parent: Any = super()
        parent._recv_pushd(b"%04o 0 %s" % (here, name))

    def _recv_popd(self, *record: bytes) -> None:
        if not self._depth_now or record != (b"",) or self._time_pending:
            raise ScpError("the host ended a folder that it had not begun")
        self._depth_now -= 1
        parent: Any = super()
        parent._recv_popd(*record)

    def _set_time(self, record: bytes) -> None:
        found = re.fullmatch(rb"(\d{1,12}) \d{1,9} (\d{1,12}) \d{1,9}", record)
        if found is None or self._time_pending or int(max(found.groups(), key=int)) > MAX_SCP_TIME:
            raise ScpError("the host sent a time that can't be")
        self._time_pending = True
        if self._keeps_times:
            mtime, atime = map(int, found.groups())
            self._utime = (atime, mtime)

    def _place(self, name: bytes) -> Any:
        return self._recv_dir if self._rename else os.path.join(self._recv_dir, name)

    def _shown(self, path: Any) -> str:
        """Return a path relative to the target of a ``get``."""
        shown = os.path.relpath(os.fsdecode(path), self._target)
        return os.path.basename(self._target) if shown == "." else shown

    def _checked(self, record: bytes, pattern: bytes) -> tuple[int, int, bytes]:
        """Check a record of the host; its permissions, size and name, fit to be used here."""
        found = re.match(pattern, record)
        if found is None:
            raise ScpError(f"the host sent {record!r}, which is no record of scp")
        mode, size, name = found.groups()
        self._time_pending = False
        unnamed = not self._depth_now and name in UNNAMED and b"." in self._wanted
        if not unnamed and (name in UNNAMED or not _is_plain(name)):
            raise ScpError(f"the host sent {name!r}, which is no plain name")
        if not self._depth_now:
            may_come = self._missing if self.sanitize is self._quote else self._wanted
            fits = [w for w in may_come if _is_wanted(b"." if unnamed else name, w)]
            if not fits:
                raise ScpError(f"the host sent {name!r}, which was not asked for")
            if fits[0] in self._missing:
                self._missing.remove(fits[0])
            if unnamed and not self._recursive:
                raise ScpError("the host sent a folder's own name for a file")
        umask = os.umask(0o077)
        os.umask(umask)
        bits = int(mode, 8) & 0o777 & (0o777 if self._keeps_times else ~umask)
        return bits, int(size), b"." if unnamed else name

    # --- sending ---

    def put(
        self, files: Any, remote_path: Any = b".", recursive: bool = False,
        preserve_times: bool = False,
    ) -> None:  # fmt: skip
        """Send files, and with ``recursive`` folders, as ``scp.SCPClient.put`` does.

        Symlinks within a folder are sent as the file that they lead to; those that lead out of
        it are left out with a warning.
        """
        paths = [os.fsencode(path) for path in _path_list(files)]
        folders = [path for path in paths if os.path.isdir(path)]
        self._sends_files = True
        with self._transfer("sent", paths[0]):
            if folders and not recursive:
                raise ScpError("it is a folder, and recursive is not set")
            for path in paths:
                os.stat(path)
            self.scp_command = b"scp -p" if preserve_times else b"scp"
            parent: Any = super()
            parent.put(paths, _remote_path(remote_path), recursive, preserve_times)

    def putfo(
        self, fl: IO[Any], remote_path: Any, mode: Any = "0644", size: int | None = None
    ) -> None:
        """Send what a file-like object holds, as ``scp.SCPClient.putfo`` does."""
        mode, remote = os.fsdecode(mode), _remote_path(remote_path)
        if not re.fullmatch(r"[0-7]{3,4}", mode):
            raise ValueError(f"mode must be octal digits, as '0644', not {printable(mode, 80)!r}")
        if size is not None:
            check_number("size", size, unit="bytes")
        if not os.path.basename(remote):
            raise ValueError(f"remote_path names no file: {printable(repr(remote_path), 200)}")
        self._sends_files = False
        with self._transfer("sent", os.path.basename(remote)):
            parent: Any = super()
            parent.putfo(fl, remote, mode, size)

    def _send_recursive(self, files: Any) -> None:
        parent: Any = super()
        for base in files:
            self._tree: bytes | None = os.path.realpath(base)
            for folder, inner, _ in os.walk(base):
                for name in inner:
                    if os.path.islink(os.path.join(folder, name)):
                        _may_be_sent(os.path.join(folder, name), b"\0")
            parent._send_recursive([base])
        self._tree = None

    def _send_files(self, files: Any) -> None:
        tree = getattr(self, "_tree", None)
        parent: Any = super()
        parent._send_files([f for f in files if tree is None or _may_be_sent(f, tree)])

    def _send_file(self, fl: Any, name: Any, mode: Any, size: int) -> None:
        self._doing = (os.fsdecode(name), 0, size)
        parent: Any = super()
        parent._send_file(ExactFile(fl, size, whole=self._sends_files), name, mode, size)


class ExactFile:
    """A file of which scp reads exactly the bytes that it announced."""

    def __init__(self, file: Any, size: int, whole: bool) -> None:
        self._file = file
        self._size = size
        self._whole = whole  # whether nothing may follow
        self._done = 0

    def tell(self) -> int:
        return self._done

    def read(self, most: int) -> bytes:
        data = self._file.read(min(most, self._size - self._done))
        if not data:
            raise ScpError(f"it ended before {self._size} bytes: it was changed meanwhile")
        self._done += len(data)
        if self._done == self._size and self._whole and self._file.read(1):
            raise ScpError(f"it grew beyond {self._size} bytes meanwhile")
        return bytes(data)


def _path_list(paths: Any) -> list[Any]:
    found = [paths] if isinstance(paths, (str, bytes, PurePath)) else list(paths)
    if not found:
        raise ValueError("no path was given")
    return found


def _remote_path(path: Any) -> bytes:
    """Return a path on the host as bytes that its scp takes for no option."""
    if not isinstance(path, (str, bytes, PurePath)):
        raise TypeError(f"a path must be str, bytes or a Path, not {short_repr(path)}")
    raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else bytes(path)
    if b"\0" in raw or b"\n" in raw:
        raise ValueError(f"remote_path must hold no NUL or line end: {printable(repr(path), 200)}")
    raw = raw or b"."
    return b"./" + raw if raw.startswith(b"-") else raw


def _asked_name(path: bytes, quoted: bool) -> bytes:
    """Return the name, or pattern, that a path that was asked for may come as."""
    name = path.rstrip(b"/").rpartition(b"/")[2]
    if name in UNNAMED:
        return b"."
    if name == path.rstrip(b"/") and name.startswith(b"~"):
        return b"*"  # a home, whose name only the host knows
    if not quoted and not re.fullmatch(rb"[\w@%+=:,./~*?\[\]!^\x80-\xff-]+", name):
        raise ValueError(
            f"remote_path: which names {printable(repr(path), 200)} stands for can't be told "
            "here: of a shell's signs only * ? [ ] are known, in the last part"
        )
    return re.sub(rb"([*?\[])", rb"[\1]", name) if quoted else name


def _is_wanted(name: bytes, wanted: bytes) -> bool:
    hidden = name.startswith(b".") and not wanted.startswith(b".")
    return not hidden and fnmatch.fnmatchcase(os.fsdecode(name), os.fsdecode(wanted))


def _is_plain(name: bytes) -> bool:
    """Whether a name is one part of a path, and fit to be shown."""
    text = os.fsdecode(name)
    bad = '/\0\\:*?"<>|' if os.name == "nt" else "/\0"
    controls = any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)
    return len(name) <= 255 and not controls and not any(c in bad for c in text)


def _lstat(path: Any) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _may_be_sent(path: bytes, tree: bytes) -> bool:
    """Whether a path within a tree is a file, or leads to one in the same tree."""
    real = os.path.realpath(path)
    if os.path.isfile(real) and real.startswith(tree.rstrip(b"/") + b"/"):
        return True
    logger.warning("%s is not sent: no file within the folder", printable(os.fsdecode(path), 300))
    return False
