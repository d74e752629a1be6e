"""Reach a service on a host: forward a local port to it, or wait until it responds over HTTP."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import requests
import urllib3

from clore_client.api.connection import Session, exchange, reason_of
from clore_client.errors import CloreConnectionError, SSHError, WaitTimeoutError, printable
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.progress import ProgressEvent, ProgressOptions, readable_seconds
from clore_client.ssh.transport import (
    Watchdog,
    connection_errors,
    is_connected,
    reason,
    start_thread,
)
from clore_client.validation import (
    check_count,
    check_number,
    check_order_id,
    check_string,
    short_repr,
)

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
SERVICE_PAUSE = 2.0  # seconds between two requests
SERVICE_LIMIT = 10.0  # seconds for one request
# Statuses of a proxy, or of a service that is still loading.
NOT_YET_STATUSES = frozenset({502, 503, 504, *range(520, 528), 530})


def check_forward_arguments(remote_port: Any, local_port: Any = 0) -> None:
    """Check the ports of :class:`Forward`, before anything is sent."""
    check_count("remote_port", remote_port, minimum=1, maximum=65535)
    check_count("local_port", local_port, maximum=65535)


class Forward:
    """Forward a local port to a port of a host, for the length of a ``with`` block.

    Entering it returns the local port, which listens on 127.0.0.1 only. Each connection to it is
    forwarded to the port on the host's localhost; it is reset if nothing listens there. Leaving the
    block ends the connections that are still open.

    Parameters:
        ssh: a connection to the host.
        remote_port: the port on the host, 1 to 65535.
        local_port: the port on this machine; 0 takes a free one.
        owns: close ``ssh`` at the end of the block.
        log_level: the level at which to log a connection that the host does not accept.
    """

    def __init__(
        self, ssh: paramiko.SSHClient, remote_port: int, local_port: int = 0, owns: bool = False,
        log_level: int = logging.WARNING,
    ) -> None:  # fmt: skip
        self._ssh = ssh
        self._remote_port = remote_port
        self._local_port = local_port
        self._owns = owns
        self._log_level = log_level
        self._transport: Any = ssh.get_transport()
        self._acceptor: threading.Thread | None = None
        self._closing = threading.Event()
        self._links: list[_Link] = []

    def __repr__(self) -> str:
        state = "open" if self._acceptor and not self._closing.is_set() else "closed"
        return f"<Forward of {LOOPBACK}:{self._local_port} to port {self._remote_port}, {state}>"

    def __enter__(self) -> int:
        try:
            return self._open()
        except BaseException:
            self.__exit__()
            raise

    def _open(self) -> int:
        if self._acceptor is not None:
            raise SSHError("a Forward can be entered only once: make another one")
        if not is_connected(self._ssh):
            raise SSHError("the connection to the host is closed: open another one")
        address = (LOOPBACK, self._local_port)
        try:
            listener = socket.create_server(address, backlog=FORWARD_BACKLOG)
        except OSError as error:
            raise OSError(
                error.errno, f"local_port {self._local_port} can't be used: {error.strerror}"
            ) from error
        try:
            listener.settimeout(FORWARD_POLL)
            self._local_port = listener.getsockname()[1]
            self._acceptor = start_thread(f"forward-{self._local_port}", self._accept_all, listener)
        except BaseException:
            listener.close()
            raise
        logger.debug("forwarding port %d to port %d", self._local_port, self._remote_port)
        return self._local_port

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._acceptor is not None:
            self._acceptor.join()
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
            link.thread.join(max(0.0, deadline - time.monotonic()))

    def _accept_all(self, listener: socket.socket) -> None:
        with listener:
            while not self._closing.is_set():
                try:
                    sock, peer = listener.accept()
                except TimeoutError:
                    continue
                except OSError as error:  # too many open files, most likely
                    logger.warning("port %d can't accept a connection: %s", self._local_port, error)
                    self._closing.wait(FORWARD_POLL)
                    continue
                self._links = [link for link in self._links if link.thread.is_alive()]
                try:
                    self._links.append(_Link(self._open_channel, sock, peer))
                except RuntimeError as error:  # too many threads
                    logger.warning("port %d dropped a connection: %s", self._local_port, error)
                    sock.close()

    def _open_channel(self, peer: tuple[str, int]) -> Any:
        """Connect to the port on the host; return None if that fails."""
        try:
            return self._transport.open_channel(
                "direct-tcpip", (REMOTE_HOST, self._remote_port), peer, timeout=FORWARD_OPENING
            )
        except connection_errors() as error:
            if not self._closing.is_set():
                text = "port %d of the host accepted no connection: %s"
                logger.log(self._log_level, text, self._remote_port, reason(error))
            return None


class _Link:
    """Forward one connection: a local socket, a channel, and a thread for each direction.

    Parameters:
        open_channel: returns the channel, or None.
        sock: the local socket.
        peer: its other end.

    Attributes:
        thread: the thread that ends when both directions have ended.
    """

    def __init__(self, open_channel: Callable[..., Any], sock: socket.socket, peer: Any) -> None:
        self._open_channel = open_channel
        self._sock = sock
        self._peer = peer
        self._channel: Any = None
        self._closing = False
        self._complete = False  # all data from the host was passed on
        self.thread = start_thread("forwarded", self._run)

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
            self._channel = self._open_channel(self._peer)
            if self._channel is not None and not self._closing:
                sender = start_thread("forwarded-out", self._send)
                self._receive()
                sender.join()
        except (OSError, RuntimeError) as error:
            logger.debug("a forwarded connection ended: %s", error)
        finally:
            if not self._complete:  # reset it, so that the data does not look complete
                with contextlib.suppress(OSError):
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._sock.close()
            self.close_channel()

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


class HTTPWait:
    """Check the arguments of ``wait_for_http``, and wait.

    Parameters:
        read: returns the order with an id.

    Attributes:
        url: the public address to request; None to request ``port`` on the host.
        port: the port of the service.
    """

    def __init__(
        self, order: Mapping[str, Any] | int, read: Callable[[int], Order], path: str,
        port: int | None, timeout: float, progress: ProgressOptions,
    ) -> None:  # fmt: skip
        if not re.fullmatch(r"/[!-~]*", check_string("path", path)):
            raise ValueError(f"path must begin with '/' and be encoded, not {short_repr(path)}")
        self.timeout = check_number("timeout", timeout, infinite=True, unit="seconds")
        if port is not None:
            check_count("port", port, minimum=1, maximum=65535)
        if not isinstance(order, Mapping):
            order = read(check_order_id("order", order))
        self.order = Order(order)
        urls = self.order.http_urls
        if port is None and not urls:
            raise ValueError(
                "the order has no HTTP port: pass port= for a port of the host, or order with "
                "ports={'8888': 'http'}"
            )
        self.port = port
        self.path = path
        base = next(iter(urls.values())) if port is None else urls.get(str(port))
        self.url = None if base is None else base.rstrip("/") + path
        self.where = self.url or f"port {port} of the host"
        self.progress = progress

    def at_public_address(self, user_agent: str) -> int:
        """Wait for a response from the public address, and return its status."""
        with Session(user_agent) as session:
            return self._wait(session, self.url or "")

    def on_host(self, ssh: paramiko.SSHClient, user_agent: str) -> int:
        """Wait for a response from the port of the host, over SSH, and return its status."""
        level = logging.DEBUG  # one failed connection after the other is normal here
        forward = Forward(ssh, self.port or 0, log_level=level)
        with forward as local_port, Session(user_agent) as session:
            session.trust_env = False  # no proxy
            session.headers["Host"] = f"{REMOTE_HOST}:{self.port}"
            session.headers["Connection"] = "close"
            return self._wait(session, f"http://{LOOPBACK}:{local_port}{self.path}", ssh)

    def _wait(self, session: Session, url: str, ssh: Any = None) -> int:
        started = time.monotonic()
        with self.progress.reporting() as report:
            while True:
                if ssh is not None and not is_connected(ssh):
                    raise SSHError("the connection to the host broke")
                answer = self._get(session, url)
                passed = time.monotonic() - started
                if isinstance(answer, int) and answer not in NOT_YET_STATUSES:
                    return answer
                why = f"HTTP {answer}" if isinstance(answer, int) else answer
                logger.debug("no service at %s yet: %s", self.where, why)
                if report is not None:
                    text = f"no service at {self.where} yet: {why}, {readable_seconds(passed)}"
                    report(ProgressEvent("http", passed, text))
                if passed >= self.timeout:
                    break
                time.sleep(min(SERVICE_PAUSE, self.timeout - passed))
        error = WaitTimeoutError(
            f"no service at {self.where} within {self.timeout:g}s, the last result: {why}. Does it "
            "listen on 0.0.0.0 and on the right port?",
            order_id=self.order.id or 0, order=self.order,
        )  # fmt: skip
        error.reason = why
        raise error

    def _get(self, session: Session, url: str) -> int | str:
        """Return the status of a response, or why there is none."""
        exchange.begin(lambda: None, lambda: None, time.monotonic() + SERVICE_LIMIT)
        try:
            response = session.get(
                url, timeout=SERVICE_LIMIT, allow_redirects=False, stream=True,
                auth=lambda request: request,  # else requests would send a password of ~/.netrc
            )  # fmt: skip
            response.close()
            return response.status_code
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise CloreConnectionError(
                    f"the certificate of {self.where} is not valid: {printable(str(error), 300)}"
                ) from error
            if isinstance(error, requests.Timeout):
                return f"no response within {SERVICE_LIMIT:g}s"
            cause = reason_of(error)
            if getattr(cause, "args", ()) and isinstance(cause.args[-1], Exception):
                cause = cause.args[-1]  # inside of a ProtocolError
            if self.url is None and isinstance(cause, ConnectionError):  # of the forwarded port
                return "the connection was refused, or closed without a response"
            return printable(str(cause) or type(error).__name__, 200)
        finally:
            exchange.begin(lambda: None, lambda: None, math.inf)
