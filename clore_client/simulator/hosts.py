"""The machines behind deployed orders: real SSH servers on loopback, each with its folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import asyncssh

from . import nvidia
from .books import Order
from .catalogue import Server

USER = "root"
NOTICE = "This is a simulation (clore_client.simulator): no GPU is here, and nothing is rented.\n"


class Host:
    """One order's SSH server; it accepts the order's password or key, and nothing else."""

    def __init__(self, order: Order, server: Server) -> None:
        self._order = order
        self._folder = Path(tempfile.mkdtemp(prefix="clore-simulated-"))
        self._home, self._bin = self._folder / "home", self._folder / "bin"
        self._home.mkdir()
        self._bin.mkdir()
        _install_nvidia_smi(self._bin, server)
        self._running: set[asyncio.subprocess.Process] = set()
        self._connections: set[asyncssh.SSHServerConnection] = set()
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._stopped = False

    async def start(self, sock: socket.socket) -> None:
        """Serve on a bound socket."""
        body = self._order.body
        self._acceptor = await asyncssh.listen(
            sock=sock,
            server_factory=lambda: _Login(self, body.get("ssh_password"), body.get("ssh_key")),
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            process_factory=self._run,
            sftp_factory=lambda channel: asyncssh.SFTPServer(
                channel, chroot=os.fsencode(self._home)
            ),
            allow_scp=True,
            encoding=None,
            agent_forwarding=False,
            login_timeout=60,
        )
        if self._stopped:
            self._acceptor.close()

    def stop(self) -> None:
        """End all sessions and their processes, and remove the folder."""
        self._stopped = True
        if self._acceptor is not None:
            self._acceptor.close()
        for process in list(self._running):
            _kill(process)
        for connection in list(self._connections):
            connection.abort()
        shutil.rmtree(self._folder, ignore_errors=True)

    def opened(self, connection: asyncssh.SSHServerConnection) -> None:
        """A connection has come."""
        if self._stopped:
            connection.abort()
        self._connections.add(connection)

    def closed(self, connection: asyncssh.SSHServerConnection | None) -> None:
        """A connection has gone."""
        if connection is not None:
            self._connections.discard(connection)

    def _environment(self, session: dict[str, str]) -> dict[str, str]:
        # Nothing of this process' environment: a key may stand in it.
        return {
            "PATH": f"{self._bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self._home),
            "USER": USER,
            "LOGNAME": USER,
            "SHELL": "/bin/sh",
            "LANG": "C.UTF-8",
            **self._order.body.get("env", {}),
            **session,
        }

    async def _run(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        command, terminal = process.command, process.term_type
        session = {k: v for k, v in process.env.items() if k.startswith(("LC_", "LANG"))}
        if terminal:
            session["TERM"] = terminal
        arguments = ["/bin/sh", "-c", command] if command else ["/bin/sh"]
        if not command and terminal:
            process.stdout.write(NOTICE.replace("\n", "\r\n").encode())
            arguments.append("-i")
        try:
            code = await self._child(process, arguments, self._environment(session))
        except OSError as error:
            process.stderr.write(f"{error.strerror}\n".encode())
            code = 126
        if code < 0:
            process.exit_with_signal(signal.Signals(-code).name.removeprefix("SIG"))
        else:
            process.exit(code)
        with contextlib.suppress(Exception):
            await process.wait_closed()

    async def _child(
        self, process: asyncssh.SSHServerProcess[bytes], arguments: list[str], env: dict[str, str]
    ) -> int:
        options: dict[str, Any] = {"cwd": self._home, "env": env, "start_new_session": True}
        if process.term_type:
            ours, theirs = pty.openpty()
            child = await asyncio.create_subprocess_exec(
                *arguments, stdin=theirs, stdout=theirs, stderr=theirs, **options
            )
            os.close(theirs)
            await process.redirect(stdin=ours, stdout=os.dup(ours), stderr=None)
        else:
            pipe = asyncio.subprocess.PIPE
            child = await asyncio.create_subprocess_exec(
                *arguments, stdin=pipe, stdout=pipe, stderr=pipe, **options
            )
            await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
        self._running.add(child)
        gone = asyncio.ensure_future(process.channel.wait_closed())
        ended = asyncio.ensure_future(child.wait())
        try:
            await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and not process.term_type:
                await _first(gone, _drained(process))  # what it wrote is still on its way
        finally:
            gone.cancel()
            if not ended.done():
                _kill(child)
            self._running.discard(child)
        return await ended


async def _drained(process: asyncssh.SSHServerProcess[bytes]) -> None:
    await process.stdout.drain()
    await process.stderr.drain()


async def _first(gone: asyncio.Future[None], work: Coroutine[Any, Any, None]) -> None:
    """Wait for `work`, or until the channel is gone."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
    task.cancel()


class _Login(asyncssh.SSHServer):
    def __init__(self, host: Host, password: str | None, key: str | None) -> None:
        self._host = host
        self._password, self._keys = password, _public_keys(key)
        self._connection: asyncssh.SSHServerConnection | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._host.opened(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        self._host.closed(self._connection)

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return self._password is not None

    def validate_password(self, username: str, password: str) -> bool:
        return username == USER and password == self._password

    def public_key_auth_supported(self) -> bool:
        return bool(self._keys)

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return username == USER and key in self._keys


def _public_keys(text: str | None) -> list[asyncssh.SSHKey]:
    keys = []
    for line in (text or "").splitlines():
        with contextlib.suppress(asyncssh.KeyImportError):
            keys.append(asyncssh.import_public_key(line))
    return keys


def _install_nvidia_smi(folder: Path, server: Server) -> None:
    gpus = json.dumps([(model.full, model.mib, model.watts) for model in server.models])
    script = folder / "nvidia-smi"
    program = shlex.join([sys.executable, "-I", nvidia.__file__, gpus])
    script.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    script.chmod(0o755)


def _kill(process: asyncio.subprocess.Process) -> None:
    # The whole group: what a shell has started must not outlive the session.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
