"""Guard the package scp against hostile hosts, and against calls that never return."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import IO, Any

from clore_client.errors import SSHError, TransferError, printable
from clore_client.ssh.transport import LimitedChannel, Watchdog, connection_errors, reason
from clore_client.validation import check_number, short_repr

SCP_BUFFER = 131072  # bytes of one read or write
MAX_SCP_LINE = 8192  # bytes; the longest valid line is an error with a path in it
MAX_FOLDER_DEPTH = 64
SCP_BASE: Any = object  # guarded_scp() adds scp.SCPClient, which is imported late
UNNAMED = (b"", b".", b"..")  # how scp names the folders /, . and ..
NOT_IN_A_NAME = r"[\0-\x1f\x7f-\x9f/" + (r'\\:*?"<>|]' if os.name == "nt" else "]")


def guarded_scp(
    ssh: Any, *, socket_timeout: float = 30.0, max_bytes: int | None = None,
    progress: Callable[..., object] | None = None,
) -> Any:  # fmt: skip
    """Return a ``scp.SCPClient`` that is safe to use with a hostile host, and owns ``ssh``.

    It checks each record of the host before scp acts on it, limits each wait, and raises
    :class:`TransferError`. A transfer that fails may leave a partial file inside the target, even
    in place of an earlier one; nothing outside the target is touched.

    Parameters:
        socket_timeout: seconds of silence.
        max_bytes: the most bytes that one ``get()`` may receive; None for no limit.
        progress: called with (name, size, done), as by ``scp.SCPClient``.
    """
    try:
        scp = importlib.import_module("scp")
    except ImportError as error:
        raise ImportError("scp() needs scp: pip install paramiko scp") from error
    limit = math.inf if max_bytes is None else check_number("max_bytes", max_bytes, unit="bytes")
    check_number("socket_timeout", socket_timeout, above=True, maximum=1e6, unit="seconds")
    transport = ssh.get_transport()
    if transport is None or not transport.is_active():
        raise SSHError("scp() needs an open connection, and this one is closed: connect again")
    client_class: Any = type("GuardedSCPClient", (ScpGuard, scp.SCPClient), {})
    try:
        return client_class(ssh, transport, socket_timeout, progress, limit)
    except OSError as error:
        raise SSHError(f"the connection broke: {reason(error)}") from error


class CallbackError(Exception):
    """Carry an error of the caller's progress function through scp, as its cause."""


class ScpChannel(LimitedChannel):
    """Return one line, one status byte or bytes of one file with each ``recv``.

    scp treats the bytes of one ``recv`` as one record, but the host decides where packets end.
    """

    closed = False  # with True, scp stops before it has read all data
    content_left = 0  # bytes that are left of the current file

    def recv(self, size: int) -> bytes:
        if self.content_left:
            data = super().recv(min(size, self.content_left))
            self.content_left -= len(data)
            return data or self._fail()
        line = super().recv(1)
        if line not in b"\0\1\2CDTE":
            line += super().recv(200) if self.recv_ready() else b""
            raise SSHError(f"the host sent {line!r}: check what its start-up files print")
        while line not in (b"", b"\0") and not line.endswith(b"\n"):
            if len(line) > MAX_SCP_LINE:
                raise SSHError("the host sent a line without an end")
            line += super().recv(1) or self._fail()
        return b"\0\n" if line == b"\0" else line  # scp rejects this where it expects a line

    def finish(self) -> None:
        """Check that scp on the host succeeds."""
        self.shutdown_write()
        if self.recv_exit_status() > 0:
            self._fail()

    def _fail(self) -> bytes:
        """Raise an error that says how scp on the host ended."""
        status = self.recv_exit_status()
        said = self.recv_stderr(MAX_SCP_LINE) if self.recv_stderr_ready() else b""
        how = "scp on the host ended" if self._transport.is_active() else "the connection broke"
        raise SSHError(f"{how} (exit code {status}) {said.decode('utf-8', 'replace')}")


class ScpGuard(SCP_BASE):  # type: ignore[misc]
    """Check what a host asks ``scp.SCPClient`` to do before it does it."""

    channel: Any
    _recv_dir: bytes
    _rename: bool
    _current: tuple[str, int, int | None]  # name, bytes done, bytes in total

    def __init__(self, ssh: Any, transport: Any, timeout: float, progress: Any, limit: float):
        super().__init__(transport, SCP_BUFFER, timeout, self._report)
        self._ssh = ssh
        self._max_bytes = limit
        self._user_progress = progress or (lambda *_: None)

    def _report(self, name: bytes, size: int, done: int) -> None:
        self._current = (self._current[0], done, size)
        try:
            self._user_progress(name, size, done)
        except Exception as error:
            raise CallbackError from error

    def __enter__(self) -> Any:
        return self

    def close(self) -> None:
        """Close the connection."""
        if self.channel is not None:  # scp calls this at the end of each transfer
            self.channel.finish()
        else:
            self._ssh.close()

    def _open(self) -> ScpChannel:
        return ScpChannel(self.transport, self.socket_timeout, self._watchdog)

    @contextlib.contextmanager
    def _transfer(self, verb: str, name: bytes) -> Iterator[None]:
        """Run one transfer with time limits, and raise a TransferError for what fails."""
        scp_error: type[Exception] = importlib.import_module("scp").SCPException
        failures: tuple[type[Exception], ...] = (SSHError, scp_error, *connection_errors())
        self._current = (os.fsdecode(name), 0, None)
        self.scp_command = b"scp"
        try:
            with Watchdog() as self._watchdog:
                try:
                    yield
                finally:
                    channel, self.channel = self.channel, None
                    if channel is not None:
                        channel.close()
        except CallbackError as error:
            own = error.__cause__ or error
            raise own from own.__cause__
        except failures as error:
            current, done, total = self._current
            shown = printable(current, 300)
            bytes_done = "" if total is None else f" ({done} of {total} bytes)"
            says = "the host says: " if isinstance(error, scp_error) else ""
            text = f"{shown} was not {verb}{bytes_done}: {says}{printable(str(error).strip(), 500)}"
            raise TransferError(text, name=shown, done=done, total=total) from error

    # --- receiving ---

    def get(self, remote_path: Any, local_path: Any = "", recursive: bool = False,
            preserve_times: bool = False) -> None:  # fmt: skip
        """Receive files, and with ``recursive`` folders, as ``scp.SCPClient.get`` does."""
        paths = [_remote_path(path) for path in _path_list(remote_path)]
        target = os.path.realpath(os.fsencode(local_path))
        is_folder = os.path.isdir(target)
        if len(paths) > 1 and not is_folder:
            raise ValueError(f"local_path must be a folder for several: {short_repr(local_path)}")
        self._wildcards = self.sanitize(b"*") == b"*"
        self._asked = [_asked_name(path, self._wildcards) for path in paths]
        self._missing = list(self._asked)
        self._root = target if is_folder else os.path.dirname(target)
        self._recursive, self._keeps_modes = recursive, preserve_times
        self._bytes_left = self._max_bytes
        self._folders: list[bytes] = []  # those around the current one
        self._utime = None  # an earlier transfer may have left these
        self._dirtimes: dict[bytes, Any] = {}
        with self._transfer("received", paths[0]):
            super().get(paths, target, recursive, preserve_times)
            if self._folders:
                raise SSHError("the host did not end a folder")
            if self._missing:
                raise SSHError(f"the host did not send {self._missing[0]!r}")

    def _recv_file(self, record: bytes) -> None:
        folder = self._recv_dir
        mode, here, size = self._enter(record, stat.S_ISREG)
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise SSHError(f"the host sends more than max_bytes={self._max_bytes}")
        if not self._keeps_modes:
            umask = os.umask(0o077)
            os.umask(umask)
            mode = mode & ~umask if here is None else here & 0o777
        self.channel.content_left = size
        super()._recv_file(b"%04o %d -" % (mode, size))
        self._recv_dir = folder

    def _recv_pushd(self, record: bytes) -> None:
        if not self._recursive:
            raise SSHError("the host sent a folder, and recursive is not set")
        if len(self._folders) >= MAX_FOLDER_DEPTH:
            raise SSHError(f"the host sent more than {MAX_FOLDER_DEPTH} nested folders")
        folder = self._recv_dir
        mode, here, _ = self._enter(record, stat.S_ISDIR)
        self._folders.append(folder)
        super()._recv_pushd(b"%04o 0 -" % (mode | 0o700 if here is None else here & 0o777))

    def _recv_popd(self, *_: bytes) -> None:
        if not self._folders or self._utime is not None:
            raise SSHError("the host ended a folder that it did not begin")
        self._recv_dir = self._folders.pop()

    def _set_time(self, record: bytes) -> None:
        # os.utime takes no time that has many more digits.
        valid = re.fullmatch(rb"\d{1,11} \d{1,9} \d{1,11} \d{1,9}", record)
        if not valid or self._utime is not None:
            raise SSHError("the host sent a time that is not valid")
        super()._set_time(record)

    def _enter(self, record: bytes, is_kind: Callable[[int], bool]) -> tuple[int, int | None, int]:
        """Check the record of a file or folder, and make its path the one that scp writes to.

        scp itself would strip the name and check it with ``assert``.

        Returns:
            The permissions, the mode of what exists at the path, and the size.
        """
        found = re.fullmatch(rb"([0-7]{3,7}) (\d{1,18}) (.*)", record)
        if found is None:
            raise SSHError(f"the host sent {record[:200]!r}, which is not an scp record")
        name = found[3] if self._folders else self._check_asked(found[3])
        unnamed = self._folders and name in UNNAMED
        if unnamed or re.search(NOT_IN_A_NAME, os.fsdecode(name)):
            raise SSHError(f"the host sent {name[:200]!r}, which is not a plain file name")
        if not self._rename:
            self._recv_dir, self._rename = os.path.join(self._recv_dir, name), True
        shown = os.fsdecode(os.path.relpath(self._recv_dir, self._root))
        self._current = (shown, 0, int(found[2]))
        here = None
        with contextlib.suppress(FileNotFoundError):
            here = os.lstat(self._recv_dir).st_mode
        if here is not None and not is_kind(here):
            raise SSHError(f"{shown!r} is a symlink or something else here: use another local_path")
        return int(found[1], 8) & 0o777, here, int(found[2])

    def _check_asked(self, name: bytes) -> bytes:
        """Check a name at the top level; return it, or "." for a folder without a name."""
        name = b"." if name in UNNAMED else name
        for asked in self._asked if self._wildcards else self._missing:
            hidden = name.startswith(b".") and not asked.startswith(b".")
            if not hidden and fnmatch.fnmatchcase(os.fsdecode(name), os.fsdecode(asked)):
                if asked in self._missing:
                    self._missing.remove(asked)
                return name
        raise SSHError(f"the host sent {name[:200]!r}, which was not asked for")

    # --- sending ---

    def put(self, files: Any, remote_path: Any = b".", recursive: bool = False,
            preserve_times: bool = False) -> None:  # fmt: skip
        """Send files, and with ``recursive`` folders, as ``scp.SCPClient.put`` does."""
        paths = [os.fsencode(path) for path in _path_list(files)]
        with self._transfer("sent", paths[0]):
            self.scp_command = b"scp -p" if preserve_times else b"scp"
            super().put(paths, _remote_path(remote_path), recursive, preserve_times)

    def putfo(
        self, fl: IO[Any], remote_path: Any, mode: Any = "0644", size: int | None = None
    ) -> None:
        """Send what a file-like object holds, as ``scp.SCPClient.putfo`` does."""
        remote = _remote_path(remote_path)
        with self._transfer("sent", os.path.basename(remote)):
            super().putfo(fl, remote, os.fsdecode(mode), size)

    def _send_files(self, files: list[bytes]) -> None:
        for path in files:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
                raise SSHError(f"{os.fsdecode(path)} is not a file; a folder needs recursive=True")
        super()._send_files(files)

    def _send_file(self, fl: Any, name: bytes, mode: str, size: int) -> None:
        self._current = (os.fsdecode(name), 0, size)
        super()._send_file(ExactFile(fl, size), name, mode, size)


class ExactFile:
    """Read exactly the bytes that scp announced, though the file may grow or shrink."""

    def __init__(self, file: Any, size: int) -> None:
        self._file = file
        self._size = size
        self._done = 0

    def tell(self) -> int:
        return self._done

    def read(self, most: int) -> bytes:
        data = bytes(self._file.read(min(most, self._size - self._done)))
        if not data:
            raise SSHError(f"the file ended before {self._size} bytes: it has changed")
        self._done += len(data)
        return data


def _path_list(paths: Any) -> list[Any]:
    found = [paths] if isinstance(paths, (str, bytes, os.PathLike)) else list(paths)
    if not found:
        raise ValueError("no path was given")
    return found


def _remote_path(path: Any) -> bytes:
    """Return a path as bytes that the host's scp does not take for an option."""
    raw = os.fsencode(path) or b"."
    if b"\0" in raw or b"\n" in raw:
        raise ValueError(f"remote_path must hold no NUL or line end: {short_repr(path)}")
    return b"./" + raw if raw.startswith(b"-") else raw


def _asked_name(path: bytes, wildcards: bool) -> bytes:
    """Return a pattern for the name by which the host sends a path."""
    path = path.rstrip(b"/")
    name = path.rpartition(b"/")[2]
    if name in UNNAMED:
        return b"."
    if path.startswith(b"~") and name == path:
        return b"*"  # a home directory, whose name only the host knows
    import glob

    return name if wildcards else glob.escape(name)
