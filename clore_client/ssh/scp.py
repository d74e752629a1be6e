"""A ``scp.SCPClient`` for machines that nobody vouches for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import IO, TYPE_CHECKING, Any

from clore_client.errors import SSHError, TransferError, printable
from clore_client.ssh.connect import import_paramiko
from clore_client.ssh.scp_receive import AskedNames, LocalFolder, ScpProgress, ScpReceiver
from clore_client.ssh.scp_send import ASKED_MODE, ScpSender
from clore_client.ssh.scp_wire import ScpError, ScpWire, local_faults
from clore_client.validation import check_number

if TYPE_CHECKING:
    import paramiko

SCP_TIMEOUT = 30.0  # seconds of silence


def import_scp() -> Any:
    """The scp package, or an ImportError that says what to install."""
    import_paramiko()
    try:
        scp_module = importlib.import_module("scp")
    except ImportError as error:
        raise ImportError(
            "scp() needs scp: pip install 'clore-client[ssh]' (or: pip install paramiko scp)"
        ) from error
    return scp_module


def hardened_scp(
    ssh: paramiko.SSHClient,
    *,
    socket_timeout: float = SCP_TIMEOUT,
    max_bytes: int | None = None,
    progress: ScpProgress | None = None,
    owns_ssh: bool = False,
) -> Any:
    """A ``scp.SCPClient`` on a connection, with its own methods, whose host may be hostile.

    It differs in this: what the host sends is checked before anything is made or changed here;
    a file is written under a temporary name and renamed when it is whole; every wait has an end;
    what goes wrong is a :class:`TransferError`. Without ``preserve_times``, the umask holds for
    what is received, and folders that exist keep their permissions. With ``client.sanitize``
    replaced, a path may hold ``*``, ``?`` and ``[...]``.

    Args:
        socket_timeout: seconds in which the host must do something. A connection that does not
            even take bytes is closed.
        max_bytes: of all files of one ``get()`` together; None for no limit.
        progress: called with (name, size, done), as ``scp.SCPClient`` does.
        owns_ssh: whether ``close()`` also closes ``ssh``.
    """
    made = _client_class()
    check_number("socket_timeout", socket_timeout, above=True, maximum=1e6, unit="seconds")
    if max_bytes is not None:
        check_number("max_bytes", max_bytes, unit="bytes")
    transport = ssh.get_transport()
    if transport is None or not transport.is_active():
        raise SSHError("scp() needs a connection, and this one is closed")
    try:
        client = made(transport, socket_timeout=socket_timeout, progress=progress)
    except OSError as error:
        raise SSHError(f"the connection broke: {printable(str(error))}") from error
    client.harden(max_bytes=max_bytes, report=progress, owned=ssh if owns_ssh else None)
    return client


@functools.cache
def _client_class() -> Any:
    return type("HardenedSCPClient", (HardenedTransfers, import_scp().SCPClient), {})


class HardenedTransfers:
    """The public methods of ``scp.SCPClient``, on a protocol of our own."""

    transport: Any
    channel: Any
    scp_command: bytes
    socket_timeout: float
    sanitize: Callable[[bytes], bytes]
    _quote: Callable[[bytes], bytes]
    _max_bytes: int | None
    _report: ScpProgress | None
    _owned: Any

    def harden(self, *, max_bytes: int | None, report: ScpProgress | None, owned: Any) -> None:
        """What ``scp.SCPClient`` has no place for."""
        self._quote = self.sanitize
        self._max_bytes = max_bytes
        self._report = report
        self._owned = owned

    def __enter__(self) -> HardenedTransfers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel, and the connection where that is ours."""
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.close()
        if self._owned is not None:
            self._owned.close()

    def get(
        self,
        remote_path: Any,
        local_path: Any = "",
        recursive: bool = False,
        preserve_times: bool = False,
    ) -> None:
        """Receive files, and with ``recursive`` folders, as ``scp.SCPClient.get`` does.

        Raises:
            TransferError: the host sent something else, or not all; or this machine refused.
        """
        paths = [_remote(path) for path in _several(remote_path)]
        asked = AskedNames(paths, quoted=self.sanitize is self._quote)
        target = os.path.realpath(os.fsdecode(local_path) or os.curdir)
        into = os.path.isdir(target)
        if len(paths) > 1 and not into:
            raise ValueError(
                f"local_path: {printable(repr(target), 200)} is no folder for several files"
            )
        shown = printable(os.fsdecode(paths[0]), 200)
        with contextlib.ExitStack() as stack:
            doing = stack.enter_context(_as_transfer_error("received", shown))
            with local_faults():
                folder = LocalFolder(target if into else os.path.dirname(target))
            stack.callback(folder.close)
            flags = (b" -r" if recursive else b"") + (b" -p" if preserve_times else b"")
            words = b" ".join(self.sanitize(path) for path in paths)
            wire = stack.enter_context(self._wire(flags + b" -f " + words))
            receiver = ScpReceiver(
                wire,
                asked,
                folder,
                as_name="" if into else os.path.basename(target),
                recursive=recursive,
                keep=preserve_times,
                most=self._max_bytes,
                progress=self._report,
            )
            doing.append(receiver)
            receiver.run()

    def put(
        self,
        files: Any,
        remote_path: Any = b".",
        recursive: bool = False,
        preserve_times: bool = False,
    ) -> None:
        """Send files, and with ``recursive`` folders, as ``scp.SCPClient.put`` does.

        Symlinks within a folder are sent as the file that they lead to; those that lead to a
        folder or out of it are left out with a warning.

        Raises:
            TransferError: the host refused, or a file can't be read or changed meanwhile.
        """
        paths = [os.fsdecode(path) for path in _several(files)]
        flags = (b" -r" if recursive else b"") + (b" -p" if preserve_times else b"")
        flags += b" -d" if len(paths) > 1 else b""
        with contextlib.ExitStack() as stack:
            doing = stack.enter_context(_as_transfer_error("sent", printable(paths[0], 200)))
            for path in paths:
                with local_faults():
                    os.stat(path)
            command = flags + b" -t " + self.sanitize(_remote(remote_path))
            wire = stack.enter_context(self._wire(command))
            sender = ScpSender(
                wire, recursive=recursive, keep=preserve_times, progress=self._report
            )
            doing.append(sender)
            sender.run(paths)

    def putfo(
        self, fl: IO[Any], remote_path: Any, mode: Any = "0644", size: int | None = None
    ) -> None:
        """Send what a file-like object holds, as ``scp.SCPClient.putfo`` does."""
        mode = os.fsdecode(mode)
        if not ASKED_MODE.fullmatch(mode):
            raise ValueError(f"mode must be octal digits, as '0644', not {printable(mode, 80)!r}")
        remote = _remote(remote_path)
        if size is None:
            here = fl.tell()
            fl.seek(0, os.SEEK_END)
            size = fl.tell() - here
            fl.seek(here)
        check_number("size", size, unit="bytes")
        name = os.fsdecode(remote.rpartition(b"/")[2])
        if not name:
            raise ValueError(f"remote_path names no file: {printable(repr(remote_path), 200)}")
        with contextlib.ExitStack() as stack:
            doing = stack.enter_context(_as_transfer_error("sent", printable(name, 200)))
            wire = stack.enter_context(self._wire(b" -t " + self.sanitize(remote)))
            sender = ScpSender(wire, progress=self._report)
            doing.append(sender)
            sender.run_object(fl, name, mode, size)

    @contextlib.contextmanager
    def _wire(self, words: bytes) -> Iterator[ScpWire]:
        wire = ScpWire(self.transport, self.scp_command + words, self.socket_timeout)
        self.channel = wire.channel  # where scp.SCPClient has it, for close()
        try:
            yield wire
        finally:
            self.channel = None
            wire.close()


@contextlib.contextmanager
def _as_transfer_error(verb: str, named: str) -> Iterator[list[Any]]:
    """Make a TransferError of a fault; the list holds who can tell which file was in work."""
    doing: list[Any] = []
    try:
        yield doing
    except ScpError as fault:
        name, done, total = named, 0, None
        for one in doing:
            name, done, total = one.name or named, one.done, one.total
        so_far = "" if total is None else f" ({done} of {total} bytes)"
        raise TransferError(
            f"{name} was not {verb}{so_far}: {fault}", name=name, done=done, total=total
        ) from fault


def _several(paths: Any) -> list[Any]:
    found = [paths] if isinstance(paths, (str, bytes, PurePath)) else list(paths)
    if not found:
        raise ValueError("no path was given")
    return found


def _remote(path: Any) -> bytes:
    """A path on the host, as bytes that its scp takes for no option."""
    if not isinstance(path, (str, bytes, PurePath)):
        raise TypeError(f"a path must be str, bytes or a Path, not {printable(repr(path), 80)}")
    raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else bytes(path)
    if b"\0" in raw:
        raise ValueError(f"remote_path must hold no NUL: {printable(repr(path), 200)}")
    raw = raw or b"."
    return b"./" + raw if raw.startswith(b"-") else raw
