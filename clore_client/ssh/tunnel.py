"""Forward a port of this machine's loopback to a port of a host, for the length of a block."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from clore_client.errors import SSHError
from clore_client.log import logger
from clore_client.ssh.transport import (
    Watchdog,
    connection_errors,
    is_connected,
    reason,
    start_thread,
)
from clore_client.validation import short_repr

if TYPE_CHECKING:
    import paramiko

LOOPBACK = "127.0.0.1"
REMOTE_HOST = "localhost"  # resolved by the host, so that IPv4 and IPv6 services are reached
FORWARD_CHUNK = 32768  # bytes
FORWARD_BACKLOG = 128  # connections that wait to be accepted
FORWARD_POLL = 0.1  # seconds between two checks of whether the block has ended
FORWARD_OPENING = 10.0  # seconds for a host to connect to its own port
FORWARD_PATIENCE = 2.0  # seconds to close all channels
FORWARD_LEAVING = 5.0  # seconds for all threads to end
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection


def check_forward_arguments(remote_port: Any, local_port: Any = 0) -> None:
    """Check the ports of :class:`Forward`, before anything is sent."""
    for name, port, lowest in (("remote_port", remote_port, 1), ("local_port", local_port, 0)):
        allowed = f"{name} must be a port from {lowest} to 65535"
        if isinstance(port, bool) or not isinstance(port, int):
            raise TypeError(f"{allowed}, not {short_repr(port)}")
        if not lowest <= port <= 65535:
            raise ValueError(f"{allowed}, not {short_repr(port)}")


class Forward:
    """Forwards a local port to a port of a host, for the length of a ``with`` block.

    Entering it returns the local port, which listens on 127.0.0.1 only. Each connection to it is
    carried to the port on the host's localhost; it is reset if nothing listens there. Leaving the
    block ends the connections that are still open.

    Parameters:
        ssh: a connection to the host.
        remote_port: the port on the host, 1 to 65535.
        local_port: the port on this machine; 0 takes a free one.
        owns: close ``ssh`` at the end of the block.
    """

    def __init__(
        self,
        ssh: paramiko.SSHClient,
        remote_port: int,
        local_port: int = 0,
        owns: bool = False,
    ) -> None:
        check_forward_arguments(remote_port, local_port)
        self._ssh = ssh
        self._remote_port = remote_port
        self._local_port = local_port
        self._owns = owns
        self._transport: Any = None
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._closing = threading.Event()
        self._links: list[_Link] = []

    def __repr__(self) -> str:
        state = "closed" if self._listener is None else "open"
        return f"<Forward of {LOOPBACK}:{self._local_port} to port {self._remote_port}, {state}>"

    def __enter__(self) -> int:
        try:
            return self._open()
        except BaseException:
            self._close()
            raise

    def __exit__(self, *_: object) -> None:
        self._close()

    def _open(self) -> int:
        if self._acceptor is not None:
            raise SSHError("a Forward can be entered only once: make another one")
        if not is_connected(self._ssh):
            raise SSHError("the connection to the machine is closed: open another one")
        self._transport = self._ssh.get_transport()
        try:
            self._listener = socket.create_server(
                (LOOPBACK, self._local_port), backlog=FORWARD_BACKLOG
            )
        except OSError as error:
            raise OSError(
                error.errno, f"local_port {self._local_port} can't be used: {error.strerror}"
            ) from error
        self._listener.settimeout(FORWARD_POLL)
        self._local_port = self._listener.getsockname()[1]
        self._acceptor = start_thread(
            f"forward-{self._local_port}", self._accept_all, self._listener
        )
        logger.debug("forwarding port %d to port %d", self._local_port, self._remote_port)
        return self._local_port

    def _close(self) -> None:
        self._closing.set()
        if self._acceptor is not None:
            self._acceptor.join()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for link in self._links:
            link.close_socket()
        if self._links:
            # Closing a channel hangs if the host accepts no data; no thread would end.
            with Watchdog() as watchdog, watchdog.limit(FORWARD_PATIENCE, self._transport.close):
                for link in self._links:
                    link.close_channel()
        if self._owns:
            self._ssh.close()
        deadline = time.monotonic() + FORWARD_LEAVING
        for link in self._links:
            link.join(max(0.0, deadline - time.monotonic()))

    def _accept_all(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                sock, peer = listener.accept()
            except TimeoutError:
                continue
            except OSError as error:  # too many open files, most likely
                logger.warning("port %d can't accept a connection: %s", self._local_port, error)
                self._closing.wait(FORWARD_POLL)
                continue
            self._links = [link for link in self._links if link.is_alive]
            try:
                self._links.append(_Link(self._transport, self._remote_port, sock, peer))
            except RuntimeError as error:  # too many threads
                logger.warning("port %d dropped a connection: %s", self._local_port, error)
                sock.close()


class _Link:
    """One forwarded connection: a local socket, a channel, and a thread for each direction."""

    def __init__(
        self, transport: Any, remote_port: int, sock: socket.socket, peer: tuple[str, int]
    ) -> None:
        self._transport = transport
        self._remote_port = remote_port
        self._sock = sock
        self._peer = peer
        self._channel: Any = None
        self._closing = False
        self._complete = False  # all data from the host was passed on
        self._thread = start_thread("forwarded", self._run)

    @property
    def is_alive(self) -> bool:
        """Whether data may still be copied."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait until both threads have ended, at most so many seconds."""
        self._thread.join(seconds)

    def close_socket(self) -> None:
        """End the local side, which ends the thread that reads from it."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close_channel(self) -> None:
        """End the host's side, which ends the thread that reads from it."""
        if self._channel is not None:
            with contextlib.suppress(*connection_errors()):
                self._channel.close()

    def _run(self) -> None:
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._open_channel():
                sender = start_thread("forwarded-out", self._send)
                self._receive()
                sender.join()
        except (OSError, RuntimeError) as error:
            logger.debug("a forwarded connection ended: %s", error)
        finally:
            if not self._complete:  # a reset, so that nobody takes it for whole
                with contextlib.suppress(OSError):
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._sock.close()
            self.close_channel()

    def _open_channel(self) -> bool:
        try:
            self._channel = self._transport.open_channel(
                "direct-tcpip", (REMOTE_HOST, self._remote_port), self._peer,
                timeout=FORWARD_OPENING,
            )  # fmt: skip
        except connection_errors() as error:
            if not self._closing:
                text = "port %d of the machine accepted no connection: %s"
                logger.warning(text, self._remote_port, reason(error))
            return False
        return not self._closing

    def _receive(self) -> None:
        """Copy from the host to the local socket."""
        try:
            while data := self._channel.recv(FORWARD_CHUNK):
                self._sock.sendall(data)
            if self._channel.eof_received:
                self._complete = True
                self._sock.shutdown(socket.SHUT_WR)
                return
        except connection_errors() as error:
            logger.debug("a forwarded connection ended: %s", error)
        # Nothing more can be delivered: end the other direction as well.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        self.close_channel()

    def _send(self) -> None:
        """Copy from the local socket to the host."""
        try:
            while data := self._sock.recv(FORWARD_CHUNK):
                self._channel.sendall(data)
            self._channel.shutdown_write()
        except connection_errors() as error:
            logger.debug("a forwarded connection ended: %s", error)
            self.close_channel()
