"""Run hostile SSH servers for tests of commands and transfers.

``HostileServer(run=...)`` is a real SSH server that runs a coroutine of the test for each command.
The coroutine gets the command and the process. It can write to ``process.stdout`` and
``process.stderr``, read ``process.stdin`` (all are bytes), hang, and exit. ``RawServer`` is for
attacks before the SSH handshake: endless banners, silence, another protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import asyncssh
from asyncssh.process import SSHServerProcess

Run = Callable[[str, Any], Coroutine[Any, Any, None]]
ESCAPES = b"\x1b[2J\x1b]0;owned\x07\x9b31m"  # clears the screen, names the window, colours


async def hang(command: str = "", process: Any = None) -> None:
    """Never respond."""
    await asyncio.Event().wait()


class HostileServer:
    """An SSH server for the length of a ``with`` block, in a thread with its own event loop.

    Args:
        run: handles exec requests (and a request for a shell, whose command is ``""``); may be
            replaced at any time.
        sftp: a factory as for ``asyncssh.listen(sftp_factory=)``, called with the channel.
        password: the only password that is accepted, or None for any login.
        hang_at: ``"auth"`` (no reply to the login), ``"open"`` (no reply to the opening of a
            channel), ``"exec"`` (no reply to a command), or ``""``; may be replaced at any time.
        banner: the text that is sent before the login.
        options: other arguments of ``asyncssh.listen``.

    Attributes:
        port: the port on which it listens.
        commands, passwords: the received ones, in order.
        connections: the number of logins, also of those that failed.
    """

    def __init__(
        self,
        run: Run = hang,
        *,
        sftp: Callable[[Any], Any] | None = None,
        password: str | None = None,
        hang_at: str = "",
        banner: str = "",
        key_kind: str = "ssh-ed25519",
        **options: Any,
    ) -> None:
        self.run = run
        self.sftp = sftp
        self.password = password
        self.hang_at = hang_at
        self.banner = banner
        self.port = 0
        self.commands: list[str] = []
        self.passwords: list[str] = []
        self.connections = 0
        self._options = options
        self._key = asyncssh.generate_private_key(key_kind)
        self._open: set[asyncssh.SSHServerConnection] = set()
        self._acceptor: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> HostileServer:
        self._thread.start()
        self._await(self._listen())
        return self

    def __exit__(self, *exception: object) -> None:
        self._await(self._shut())
        self._await(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def order(self, order_id: int = 7, **more: Any) -> dict[str, Any]:
        """An order in the documented form for this server."""
        ssh = f"ssh root@127.0.0.1 -p {self.port}"
        return {"order_id": order_id, "connection": {"ssh": ssh}, "status": "running", **more}

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the host key, as ``SHA256:...``."""
        return self._key.get_fingerprint()

    def restart(self, *, key_kind: str | None = "ssh-ed25519") -> None:
        """Close all connections, and listen again on the same port; None keeps the host key."""
        self._await(self._shut())
        if key_kind is not None:
            self._key = asyncssh.generate_private_key(key_kind)
        self._await(self._listen())

    def _await(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(20)

    async def _listen(self) -> None:
        self._acceptor = await asyncssh.listen(
            "127.0.0.1",
            self.port,
            server_host_keys=[self._key],
            server_factory=lambda: _Login(self),
            encoding=None,
            line_editor=False,
            gss_host=None,
            **self._options,
        )
        self.port = self._acceptor.get_port()

    async def _shut(self) -> None:
        self._acceptor.close()
        for connection in list(self._open):
            connection.abort()
        await self._acceptor.wait_closed()

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Login(asyncssh.SSHServer):
    def __init__(self, server: HostileServer) -> None:
        self._server = server
        self._connection: Any = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._server.connections += 1
        self._server._open.add(conn)
        self._connection = conn

    def connection_lost(self, exc: Exception | None) -> None:
        self._server._open.discard(self._connection)

    async def begin_auth(self, username: str) -> bool:
        if self._server.banner:
            self._connection.send_auth_banner(self._server.banner)
        if self._server.hang_at == "auth":
            await hang()
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        self._server.passwords.append(password)
        return self._server.password in (None, password)

    def public_key_auth_supported(self) -> bool:
        return self._server.password is None

    def validate_public_key(self, username: str, key: Any) -> bool:
        return True

    def session_requested(self) -> Any:
        if self._server.hang_at == "open":
            return hang()
        sftp: Any = self._server.sftp
        process: Any = _Process(self._server, sftp)
        return self._connection.create_server_channel(None, "strict"), process


class _Process(SSHServerProcess[bytes]):
    def __init__(self, server: HostileServer, sftp: Any) -> None:
        super().__init__(self._serve, sftp, 3, False)
        self._hostile = server

    async def _serve(self, process: Any) -> None:
        try:
            await self._hostile.run(process.command or "", process)
        except (OSError, asyncssh.Error, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            process.channel.close()

    def exec_requested(self, command: str) -> bool:
        self._hostile.commands.append(command)
        return self._answer(super().exec_requested(command))

    def subsystem_requested(self, subsystem: str) -> bool:
        return self._answer(super().subsystem_requested(subsystem))

    def _answer(self, answer: bool) -> bool:
        none: Any = None  # with None, asyncssh sends no reply
        return none if self._hostile.hang_at == "exec" else answer


class RawServer:
    """A plain socket server: ``talk`` is called with each connection, in its own thread.

    Exceptions after the client has closed the connection are ignored.
    """

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._peers: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0

    def order(self, order_id: int = 7, **more: Any) -> dict[str, Any]:
        """An order in the documented form for this server."""
        ssh = f"ssh root@127.0.0.1 -p {self.port}"
        return {"order_id": order_id, "connection": {"ssh": ssh}, "status": "running", **more}

    def __enter__(self) -> RawServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        # A thread that waits in accept() is woken by shutdown(), and not by close().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._peers.append(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._talk(peer)


def endless_banner(peer: socket.socket) -> None:
    """Send lines before the version, which SSH allows, without an end."""
    while True:
        peer.sendall(b"welcome to the machine\r\n" * 100)
        time.sleep(0.001)


def endless_version(peer: socket.socket) -> None:
    """Send a version line that never ends."""
    peer.sendall(b"SSH-2.0-")
    while True:
        peer.sendall(b"A" * 4096)
        time.sleep(0.001)


def escaping_version(peer: socket.socket) -> None:
    """Send a version line with terminal escapes, and nothing after it."""
    peer.sendall(b"SSH-1.0-" + ESCAPES + b"\r\n")
    peer.recv(1000)


def silence(peer: socket.socket) -> None:
    """Accept a connection, and send nothing."""
    while peer.recv(1000):
        pass


# --- the remote side of `scp -f` and `scp -t` ---

Step = bytes | Callable[[Any], Awaitable[None]]


def scp_source(*steps: Step) -> Run:
    """Return an scp that sends each of the ``steps`` when the client has acknowledged the last.

    A step is bytes, or a coroutine function that gets the process. The exit code is 0.
    """

    async def run(command: str, process: Any) -> None:
        for step in steps:
            if not await process.stdin.read(1):
                return
            await _take(step, process)
        await process.stdin.read(1)
        process.exit(0)

    return run


def scp_sink(*answers: Step) -> Run:
    """Return an scp that sends the ``answers``, one after the other.

    It sends one at the start, one for each record, and one for the content of each file.
    """

    async def run(command: str, process: Any) -> None:
        content: int | None = None  # bytes of the file that comes next
        for index, answer in enumerate(answers):
            if content is not None:
                await process.stdin.readexactly(content + 1)
                content = None
            elif index:
                line = await process.stdin.readline()
                content = int(line.split()[1]) if line[:1] == b"C" else None
            await _take(answer, process)
        await process.stdin.read()
        process.exit(0)

    return run


async def _take(step: Step, process: Any) -> None:
    if isinstance(step, bytes):
        process.stdout.write(step)
        await process.stdout.drain()
    else:
        await step(process)


async def stay_silent(process: Any) -> None:
    """A step: send nothing more, and keep the channel open."""
    await hang()


async def leave(process: Any) -> None:
    """A step: close the channel without an exit code."""
    process.channel.close()
    await hang()


def then(*steps: Step) -> Step:
    """Join several steps, without a wait for acknowledgements between them."""

    async def run(process: Any) -> None:
        for step in steps:
            await _take(step, process)

    return run


def flood(piece: bytes) -> Step:
    """A step: send the same data repeatedly, until the client stops reading."""

    async def run(process: Any) -> None:
        while not process.channel.is_closing():
            process.stdout.write(piece)
            await process.stdout.drain()
            await asyncio.sleep(0)

    return run


def complaint(text: bytes, exit_code: int) -> Step:
    """A step: write to stderr, and send an exit code."""

    async def run(process: Any) -> None:
        process.stderr.write(text)
        process.exit(exit_code)
        await hang()

    return run


class Attack:
    """One attack of a hostile scp on ``get()``.

    Args:
        steps: the steps of ``scp_source``.
        ask: the path that the client requests; ``more`` are other arguments of ``get()``.
        into: the target: ``"folder"`` (an existing one), ``"new"`` (a name in one), ``"file"``.
        timeout: seconds of silence that the client allows; short if the attack is silence.
        max_bytes: the ``max_bytes`` of the client.
        received: the complete files that may be in the target after the attack.
    """

    def __init__(
        self,
        *steps: Step,
        ask: Any = "x",
        into: str = "folder",
        timeout: float = 20.0,
        max_bytes: int | None = None,
        received: tuple[str, ...] = (),
        **more: Any,
    ) -> None:
        self.steps = steps
        self.ask = ask
        self.into = into
        self.timeout = timeout
        self.max_bytes = max_bytes
        self.received = received
        self.more = more


def _files(*names: bytes) -> Iterator[tuple[str, Attack]]:
    """Send a file with an invalid or unrequested name, to each kind of target."""
    for name in names:
        steps = (b"C0644 5 " + name + b"\n", b"owned\0")
        folder = (b"D0755 0 x\n", *steps)
        for into in ("folder", "new", "file"):
            yield f"a file named {name!r} for a {into}", Attack(*steps, into=into)
        yield f"a file named {name!r}, recursive", Attack(*steps, recursive=True)
        if name not in (b"y", b".bashrc"):
            yield f"a file named {name!r} in a folder", Attack(*folder, recursive=True)
            inner = (b"D0755 0 x\n", b"D0755 0 " + name + b"\n", b"C0644 5 f\n", b"owned\0")
            yield f"a folder named {name!r} in a folder", Attack(*inner, recursive=True)
        top = (b"D0777 0 " + name + b"\n", b"C0644 5 f\n", b"owned\0", b"E\n")
        for into in ("folder", "new"):
            yield f"a folder named {name!r} for a {into}", Attack(*top, into=into, recursive=True)
            yield f"a folder named {name!r} for a {into}, not recursive", Attack(*top, into=into)


_SHORT = 0.15  # seconds
_OWNED: tuple[bytes, bytes] = (b"C0644 5 x\n", b"owned\0")

ATTACKS: dict[str, Attack] = {
    **dict(
        _files(
            b"../x",
            b"/tmp/x",
            b"..",
            b".",
            b"",
            b"a/b",
            b"sub/../../x",
            b"x/",
            b"a\0b",
            b"x\0/../y",
            b"\x1b[2Jx",
            b"x\r",
            b"x\x7f",
            b"\xc2\x9b31m",
            b"x" * 256,
            b"y",
            b".bashrc",
        )
    ),
    "a name with a line break": Attack(b"C0644 5 x\ny\n", b"owned\0"),
    "a folder where a file was asked": Attack(b"D0755 0 x\n", b"C0644 5 f\n", b"owned\0", b"E\n"),
    "a folder where a file was asked, new": Attack(b"D0755 0 x\n", b"E\n", into="new"),
    "a folder over a file": Attack(b"D0755 0 old\n", b"E\n", ask="old", recursive=True),
    "a file over a folder": Attack(b"C0644 5 inner\n", b"owned\0", ask="inner"),
    "a file for the target itself": Attack(b"C0644 5 .\n", b"owned\0", ask=".", recursive=True),
    "a file for the root": Attack(b"C0644 5 \n", b"owned\0", ask="/", recursive=True),
    "a hidden name for a home": Attack(b"D0755 0 .ssh\n", b"E\n", ask="~", recursive=True),
    "another name for the second": Attack(
        *_OWNED, b"C0644 5 y\n", b"owned\0", ask=["x", "z"], received=("x",)
    ),
    "the same name twice": Attack(*_OWNED, b"C0644 5 x\n", b"OWNED\0", received=("x",)),
    "two files for one name": Attack(*_OWNED, *_OWNED, into="new", received=("new",)),
    "the second of two is missing": Attack(*_OWNED, ask=["x", "z"], received=("x",)),
    "nothing": Attack(),
    "two ends of one folder": Attack(
        b"D0755 0 x\n", b"C0644 5 f\n", b"owned\0", b"E\n", b"E\n", recursive=True,
        received=("x", "x/f"),
    ),
    "an end of nothing": Attack(b"E\n", *_OWNED, recursive=True),
    "an end of nothing, then a file": Attack(b"E\n", b"C0644 5 x\n", b"owned\0"),
    "no end of a folder": Attack(b"D0755 0 x\n", recursive=True),
    "a symlink of the target written through": Attack(
        b"C0644 5 link\n", b"owned\0", ask="link"
    ),
    "a dangling symlink written through": Attack(
        b"C0644 5 dangling\n", b"owned\0", ask="dangling"
    ),
    "a symlink entered as a folder": Attack(
        b"D0755 0 way\n", b"C0644 5 f\n", b"owned\0", b"E\n", ask="way", recursive=True
    ),
    "a symlink entered as a folder below": Attack(
        b"D0755 0 inner\n", b"D0755 0 way\n", b"C0644 5 f\n", b"owned\0", ask="inner",
        recursive=True,
    ),
    "permissions of what is behind a symlink": Attack(
        b"D0777 0 way\n", b"E\n", ask="way", recursive=True, preserve_times=True
    ),
    "a pipe written to": Attack(b"C0644 5 pipe\n", b"owned\0", ask="pipe"),
    "a file, then a folder of its name": Attack(
        b"D0755 0 x\n", b"C0644 5 f\n", b"owned\0", b"D0755 0 f\n", b"C0644 5 g\n", b"owned\0",
        recursive=True, received=("x", "x/f"),
    ),
    "a folder, then a file of its name": Attack(
        b"D0755 0 x\n", b"D0755 0 d\n", b"E\n", b"C0644 5 d\n", b"owned\0",
        recursive=True, received=("x", "x/d"),
    ),
    "too deep": Attack(
        b"D0755 0 x\n", *[b"D0755 0 d\n"] * 70, *[b"E\n"] * 71, recursive=True
    ),
    "more bytes than announced": Attack(b"C0644 5 x\n", b"owned and more\0"),
    "many more bytes than announced": Attack(b"C0644 5 x\n", flood(b"z" * 8192)),
    "more bytes after the end": Attack(b"C0644 5 x\n", b"owned\0and more", received=("x",)),
    "fewer bytes than announced": Attack(b"C0644 50 x\n", then(b"owned", leave)),
    "fewer bytes, then the end": Attack(b"C0644 50 x\n", then(b"owned", complaint(b"", 0))),
    "fewer bytes, then silence": Attack(b"C0644 50 x\n", b"owned", timeout=_SHORT),
    "a broken file": Attack(b"C0644 5 x\n", b"owned\1scp: read error" + ESCAPES + b"\n"),
    "an endless file": Attack(
        b"C0644 999999999999999999 x\n", flood(b"z" * 8192), max_bytes=10**6
    ),
    "an endless folder": Attack(
        b"D0755 0 x\n", b"C0644 5 a\n", b"owned\0", b"C0644 5 b\n", b"owned\0",
        max_bytes=9, recursive=True, received=("x", "x/a"),
    ),
    **{
        f"a size of {size!r}": Attack(b"C0644 " + size + b" x\n", b"owned\0", into=into)
        for size in (b"-5", b"+5", b"5.0", b"0x5", b"", b" 5", b"9" * 19, b"9" * 5000, b"5_0",
                     "\u0665".encode())
        for into in ("folder", "new")
    },
    **{
        f"permissions {mode!r}": Attack(b"C" + mode + b" 5 x\n", b"owned\0")
        for mode in (b"9999", b"rwx", b"-644", b"0o644", b"", b"7" * 50, b"644\0")
    },
    **{
        f"a time {time_!r}": Attack(b"T" + time_ + b"\n", *_OWNED, preserve_times=True)
        for time_ in (b"", b"x 0 y 0", b"1 0 1", b"-1 0 -1 0", b"9" * 12 + b" 0 0 0",
                      b"9" * 400 + b" 0 0 0", b"1e9 0 1e9 0")
    },
    "a time for nothing": Attack(b"T1 0 1 0\n", b"T1 0 1 0\n", *_OWNED, preserve_times=True),
    "a time for an end": Attack(
        b"D0755 0 x\n", b"T1 0 1 0\n", b"E\n", recursive=True, preserve_times=True
    ),
    "an error with escapes": Attack(b"\1scp: " + ESCAPES + b": no\n"),
    "a last error with escapes": Attack(b"\2" + ESCAPES + b"\n"),
    "an error in the middle": Attack(b"D0755 0 x\n", b"\1" + ESCAPES + b"\n", recursive=True),
    "stderr with escapes": Attack(complaint(b"scp: " + ESCAPES, 127)),
    "an exit code after all": Attack(*_OWNED, complaint(b"no" + ESCAPES, 1), received=("x",)),
    "garbage": Attack(b"\xff\xfe\x00" + ESCAPES + b"\n"),
    "another protocol": Attack(b"HTTP/1.1 200 OK\n"),
    "an empty line": Attack(b"\n"),
    "a record of no kind": Attack(b"X0644 5 x\n", b"owned\0"),
    "a record without a name": Attack(b"C0644 5\n", b"owned\0"),
    "an endless line": Attack(flood(b"C" * 8192)),
    "a line without an end": Attack(then(b"C0644 5 x", leave)),
    "half a line, then silence": Attack(b"C0644 5 x", timeout=_SHORT),
    "silence at the start": Attack(stay_silent, timeout=_SHORT),
    "silence after a record": Attack(b"C0644 5 x\n", stay_silent, timeout=_SHORT),
    "silence in a folder": Attack(b"D0755 0 x\n", stay_silent, recursive=True, timeout=_SHORT),
    "leaving at the start": Attack(leave),
    "leaving after a record": Attack(b"C0644 5 x\n", leave),
    "leaving in a folder": Attack(b"D0755 0 x\n", leave, recursive=True),
}  # fmt: skip
