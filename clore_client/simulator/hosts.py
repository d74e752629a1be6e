"""Run an SSH host for each deployed order."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import posixpath
import shlex
import shutil
import socket
import sys
import uuid
from pathlib import Path
from random import Random

import asyncssh

from . import nvidia_smi
from .catalog import Server
from .market import Market
from .settings import Settings, draw
from .shell import Commands, kill_background_commands
from .state import Order
from .wire import PUBLIC_HOST

_INHERITED = ("LANG", "LC_ALL", "TZ")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Hosts:
    """Deploy orders, and remove their hosts when they end."""

    def __init__(self, settings: Settings, market: Market, folder: Path) -> None:
        self._settings = settings
        self._market = market
        self._folder = folder
        self._rng = Random(f"hosts {settings.seed}")
        self._hosts: dict[int, Host] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._cleaning: set[asyncio.Task[None]] = set()
        self._reserved: dict[int, dict[int, socket.socket]] = {}  # order id -> by port
        self._free_ports: list[int] = []
        self._loop = asyncio.get_running_loop()
        market.on_created = self._on_created
        market.on_ended = self._on_ended

    async def stop(self) -> None:
        """Remove all hosts."""
        for order in list(self._market.orders.values()):
            if order.id in self._tasks or order.id in self._reserved:
                self._on_ended(order)
        if self._cleaning:
            await asyncio.wait(set(self._cleaning))

    def set_reachable(self, order: Order, reachable: bool) -> None:
        """Disconnect a host from the network, or reconnect it on the same port."""
        host = self._hosts.get(order.id)
        if host is None:
            return
        if reachable:
            sock = _bind(order.ssh_port or 0)
            sock.listen()  # at once, so that no connection is refused
            self._track(self._loop.create_task(host.listen(sock)))
        else:
            host.close()

    def _on_created(self, order: Order) -> None:
        socks = {
            int(port): self._reserve()
            for port, kind in (order.body["ports"] or {"22": "tcp"}).items()
            if kind == "tcp"
        }
        self._reserved[order.id] = socks
        order.tcp_ports = {inner: sock.getsockname()[1] for inner, sock in socks.items()}
        task = self._loop.create_task(self._deploy(order))
        self._tasks[order.id] = task

    def _on_ended(self, order: Order) -> None:
        task = self._tasks.pop(order.id, None)
        if task is not None:
            task.cancel()
        host = self._hosts.pop(order.id, None)
        if host is not None:
            host.close()
            self._track(self._loop.create_task(host.remove()))
        for sock in self._reserved.pop(order.id, {}).values():
            sock.close()
        if self._settings.reuse_ports:
            self._free_ports.extend(reversed(order.tcp_ports.values()))

    def _track(self, task: asyncio.Task[None]) -> None:
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)

    async def _deploy(self, order: Order) -> None:
        if order.deploy_after == float("inf"):
            return
        await asyncio.sleep(order.created + order.deploy_after - self._market.now())
        socks = self._reserved[order.id]
        sshd_after = draw(self._rng, self._settings.sshd_after)
        if self._settings.ssh and 22 in socks:
            host = Host(order, self._market.servers[order.server_id], self._folder)
            self._hosts[order.id] = host
            if not sshd_after:
                await host.listen(socks[22])
        order.deployed = self._market.now()
        if sshd_after and order.id in self._hosts:
            await asyncio.sleep(sshd_after)
            await self._hosts[order.id].listen(socks[22])

    def _reserve(self) -> socket.socket:
        # Bound but not listening: connections are refused until the SSH daemon listens.
        while self._free_ports:
            with contextlib.suppress(OSError):
                return _bind(self._free_ports.pop())
        return _bind(0)


class Host:
    """Run a rented server: a folder, an SSH daemon, and commands."""

    def __init__(self, order: Order, server: Server, folder: Path) -> None:
        self._order = order
        self._folder = folder / f"order-{order.id}"
        self.home = self._folder / "home"
        self.home.mkdir(parents=True, mode=0o700)
        programs = self._folder / "bin"
        programs.mkdir()
        _write_nvidia_smi(programs, server)
        self._commands = Commands(self.home, _environment(order, self.home, programs))
        self._key = asyncssh.generate_private_key("ssh-ed25519")
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._connections: set[asyncssh.SSHServerConnection] = set()
        body = order.body
        self.password: str = body.get("ssh_password") or ""
        self.keys = _keys(body.get("ssh_key") or "")
        if self.keys and body.get("autossh_entrypoint"):
            self.password = ""

    async def listen(self, sock: socket.socket) -> None:
        """Start to accept connections."""
        if self._acceptor is not None:
            return
        # Else old connections would block the port for a later listener.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._acceptor = await asyncssh.listen(
            sock=sock,
            server_factory=lambda: _SSHServer(self),
            server_host_keys=[self._key],
            process_factory=self._commands.serve,
            sftp_factory=lambda channel: _SFTPServer(channel, self.home),
            allow_scp=True,
            encoding=None,
            line_editor=False,
            gss_host=None,
            server_version="SimulatedHost",
        )

    def close(self) -> None:
        """Stop listening, abort all connections, and kill all commands."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        for connection in list(self._connections):
            connection.abort()
        self._commands.kill()

    async def remove(self) -> None:
        """Kill background processes, and delete the folder."""

        def clean() -> None:
            if self._commands.used:
                kill_background_commands(self.home, self._commands.kill)
            shutil.rmtree(self._folder, ignore_errors=True)

        await asyncio.get_running_loop().run_in_executor(None, clean)

    def add_connection(self, connection: asyncssh.SSHServerConnection) -> None:
        """Record a client that has connected."""
        self._connections.add(connection)

    def remove_connection(self, connection: asyncssh.SSHServerConnection) -> None:
        """Remove a client that has disconnected."""
        self._connections.discard(connection)


class _SSHServer(asyncssh.SSHServer):
    """Accept only root, with the order's password or key."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._connection: asyncssh.SSHServerConnection | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._host.add_connection(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connection is not None:
            self._host.remove_connection(self._connection)

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return bool(self._host.password)

    def validate_password(self, username: str, password: str) -> bool:
        expected = self._host.password
        same = hmac.compare_digest(expected.encode(), password.encode())
        return bool(expected) and same and username == "root"

    def public_key_auth_supported(self) -> bool:
        return bool(self._host.keys)

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return username == "root" and key.public_data in self._host.keys

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> bool:
        # Only to this machine, not to the network that it can reach.
        return dest_host in _LOOPBACK_NAMES


class _SFTPServer(asyncssh.SFTPServer):
    """Serve SFTP and SCP inside the home folder, however its path is written."""

    def __init__(self, channel: asyncssh.SSHServerChannel[bytes], home: Path) -> None:
        super().__init__(channel, chroot=os.fsencode(home))
        self._home = os.fsencode(home)

    def map_path(self, path: bytes) -> bytes:
        # The real path, `~`, and `/root` are all the home folder.
        for prefix in (self._home, b"~", b"/root"):
            if path == prefix or path.startswith(prefix + b"/"):
                path = path[len(prefix) :]
                break
        inside = posixpath.normpath(posixpath.join(b"/", path)).lstrip(b"/")
        return posixpath.join(self._home, inside) if inside else self._home


def _keys(text: str) -> set[bytes]:
    keys = set()
    for line in text.splitlines():
        # A truncated key raises ValueError.
        with contextlib.suppress(asyncssh.KeyImportError, ValueError):
            keys.add(asyncssh.import_public_key(line).public_data)
    return keys


def _environment(order: Order, home: Path, programs: Path) -> dict[str, str]:
    """Return the environment of commands: the order's variables, and no secrets of this process."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    wanted: dict[str, str] = order.body["env"]
    path = wanted.get("PATH") or os.environ.get("PATH") or os.defpath
    fixed = {
        "HOME": str(home),
        "PWD": str(home),
        "USER": "root",
        "LOGNAME": "root",
        "SHELL": "/bin/sh",
        "PATH": f"{programs}{os.pathsep}{path}",
    }
    return {"PS1": "root@simulated:# ", **inherited, **wanted, **fixed}


def _write_nvidia_smi(programs: Path, server: Server) -> None:
    space = uuid.UUID(int=server.id)
    gpus = [
        {
            "name": model.smi_name,
            "mib": model.mib,
            "watts": model.watts,
            "uuid": f"GPU-{uuid.uuid5(space, str(n))}",
        }
        for n, model in enumerate(server.models)
    ]
    facts, script = programs / ".gpus.json", programs / "nvidia-smi"
    facts.write_text(json.dumps(gpus), encoding="utf-8")
    # -I and -S ignore the user's Python settings, and start fast.
    words = [sys.executable, "-I", "-S", os.path.abspath(nvidia_smi.__file__), str(facts)]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    script.chmod(0o755)


def _bind(port: int) -> socket.socket:
    sock = socket.socket()
    try:
        if port:
            # Not for port 0: two sockets with this option can get the same one.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((PUBLIC_HOST, port))
    except OSError:
        sock.close()
        raise
    return sock
