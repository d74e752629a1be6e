"""Forward a port of this machine's loopback to a port of a host, for the length of a block."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from clore_client.errors import SSHError
from clore_client.log import logger
from clore_client.ssh.transport import connection_errors, reason
from clore_client.ssh.watchdog import Watchdog
from clore_client.validation import short_repr

if TYPE_CHECKING:
    import paramiko

LOOPBACK = "127.0.0.1"
FAR_SIDE = "localhost"  # as the server resolves it: what listens on IPv4 or IPv6 there
FORWARD_CHUNK = 32768
FORWARD_BACKLOG = 128
FORWARD_OPENING = 10.0  # seconds for a server to connect to its own port
FORWARD_PAUSE = 0.1  # seconds, where this machine can't take a connection
FORWARD_PATIENCE = 2.0  # seconds to close all channels
FORWARD_LEAVING = 5.0  # seconds for all threads to end
RESET = struct.pack("ii", 1, 0)  # close without a handshake: the other side gets an error


def check_forward_arguments(remote_port: Any, local_port: Any = 0) -> None:
    """Check what :class:`Forward` is given, before anything is sent."""
    for name, port, lowest in (("remote_port", remote_port, 1), ("local_port", local_port, 0)):
        allowed = f"{name} must be a port from {lowest} to 65535"
        if isinstance(port, bool) or not isinstance(port, int):
            raise TypeError(f"{allowed}, not {short_repr(port)}")
        if not lowest <= port <= 65535:
            raise ValueError(f"{allowed}, not {short_repr(port)}")


class Forward:
    """Forwards connections to a local port on to a port of a server; a ``with`` block.

    Entering it gives the local port, which listens on 127.0.0.1 only. What connects there gets to
    what listens on the server's own localhost; where nothing does, that one connection is reset.
    Leaving the block ends the connections that are still open.

    Parameters:
        ssh: a connection to the server.
        remote_port: of the server, 1 to 65535.
        local_port: of this machine; 0 takes a free one.
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
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._acceptor: threading.Thread | None = None
        self._lock = threading.Lock()
        self._links: set[_Link] = set()

    def __repr__(self) -> str:
        state = "closed" if self._listener is None else "open"
        return f"<Forward of {LOOPBACK}:{self._local_port} to port {self._remote_port}, {state}>"

    def __enter__(self) -> int:
        try:
            return self._open()
        except BaseException:
            self._close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _open(self) -> int:
        if self._acceptor is not None:
            raise SSHError("a forward is entered only once: make another one")
        self._transport = self._ssh.get_transport()
        if self._transport is None or not self._transport.is_active():
            raise SSHError("the connection to the machine is closed")
        try:
            self._listener = socket.create_server(
                (LOOPBACK, self._local_port), backlog=FORWARD_BACKLOG
            )
        except OSError as error:
            raise OSError(
                error.errno, f"local_port {self._local_port} can't be used: {error.strerror}"
            ) from error
        self._listener.setblocking(False)
        self._local_port = self._listener.getsockname()[1]
        self._ends = socket.socketpair()
        self._acceptor = threading.Thread(
            target=self._accept_all,
            args=(self._listener, self._ends[0]),
            name=f"clore-forward-{self._local_port}",
            daemon=True,
        )
        self._acceptor.start()
        logger.debug("port %d leads to port %d", self._local_port, self._remote_port)
        return self._local_port

    def _close(self) -> None:
        if self._acceptor is not None and self._ends is not None:
            self._ends[1].close()  # which wakes the acceptor
            self._acceptor.join()
        for sock in (self._listener, *(self._ends or ())):
            if sock is not None:
                sock.close()
        self._listener = self._ends = None
        with self._lock:
            links = list(self._links)
        self._end_links(links)
        if self._owns:
            self._ssh.close()
        deadline = time.monotonic() + FORWARD_LEAVING
        for link in links:
            link.join(max(0.0, deadline - time.monotonic()))

    def _end_links(self, links: list[_Link]) -> None:
        for link in links:
            link.stop()

        if links:
            # Where nothing is taken any more, no channel can be closed, and no thread would end.
            with Watchdog() as watchdog, watchdog.limit(FORWARD_PATIENCE, self._transport.close):
                for link in links:
                    link.hang_up()

    def _accept_all(self, listener: socket.socket, wake: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if wake in ready:
                    return
                try:
                    sock, peer = listener.accept()
                except BlockingIOError:
                    continue  # whoever it was has gone
                except OSError as error:
                    # Out of file descriptors, most likely: it stays in the queue.
                    logger.warning("port %d takes no connection: %s", self._local_port, error)
                    time.sleep(FORWARD_PAUSE)
                    continue
                self._link(sock, peer)

    def _link(self, sock: socket.socket, peer: tuple[str, int]) -> None:
        link = _Link(self._transport, self._remote_port, sock, peer, self._forget)
        with self._lock:
            self._links.add(link)
        try:
            link.start()
        except RuntimeError as error:  # no more threads
            logger.warning("port %d dropped a connection: %s", self._local_port, error)
            self._forget(link)
            sock.close()

    def _forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)


class _Link:
    """One connection, and the channel that carries it on; a thread for each direction."""

    def __init__(
        self,
        transport: Any,
        remote_port: int,
        sock: socket.socket,
        peer: tuple[str, int],
        forget: Callable[[_Link], None],
    ) -> None:
        self._transport = transport
        self._remote_port = remote_port
        self._sock = sock
        self._peer = peer
        self._forget = forget
        self._channel: Any = None
        self._stopped = False
        self._whole = False  # whether all that the server sent was passed on
        self._thread = threading.Thread(target=self._run, name="clore-forwarded", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def stop(self) -> None:
        """Wake the thread that waits for the local side."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Wake the thread that waits for the server."""
        channel = self._channel
        if channel is not None:
            with contextlib.suppress(*connection_errors()):
                channel.close()

    def _run(self) -> None:
        try:
            self._sock.setblocking(True)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._connect():
                outward = threading.Thread(
                    target=self._outward, name="clore-forwarded-out", daemon=True
                )
                outward.start()
                self._inward()
                outward.join()
        except (OSError, RuntimeError) as error:
            logger.debug("a forwarded connection ended: %s", error)
        finally:
            self._finish()
            self._forget(self)

    def _connect(self) -> bool:
        try:
            self._channel = self._transport.open_channel(
                "direct-tcpip", (FAR_SIDE, self._remote_port), self._peer, timeout=FORWARD_OPENING
            )
        except connection_errors() as error:
            if not self._stopped:
                logger.warning(
                    "port %d of the machine took no connection: %s",
                    self._remote_port,
                    reason(error),
                )
            return False
        return not self._stopped

    def _inward(self) -> None:
        """From the server to this machine."""
        channel, sock = self._channel, self._sock
        try:
            while data := channel.recv(FORWARD_CHUNK):
                sock.sendall(data)
            if channel.eof_received:
                self._whole = True
                sock.shutdown(socket.SHUT_WR)
                return
        except connection_errors() as error:
            logger.debug("a forwarded connection ended: %s", error)
        # Nobody is there to listen: the other direction ends as well.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)
        with contextlib.suppress(*connection_errors()):
            channel.close()

    def _outward(self) -> None:
        """From this machine to the server."""
        channel = self._channel
        try:
            while data := self._sock.recv(FORWARD_CHUNK):
                channel.sendall(data)
            channel.shutdown_write()
        except connection_errors() as error:
            logger.debug("a forwarded connection ended: %s", error)
            with contextlib.suppress(*connection_errors()):
                channel.close()

    def _finish(self) -> None:
        if not self._whole:
            # What was cut off must not look like something that is complete.
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._sock.close()
        if self._channel is not None:
            with contextlib.suppress(*connection_errors()):
                self._channel.close()
