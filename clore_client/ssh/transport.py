"""Prepare paramiko's transports and channels: bounded memory, fast ciphers, dead links noticed.

paramiko has no settings for most of this: these are attributes of its objects. Two of them are
private, ``Packetizer._read_timeout`` and ``Transport._send_user_message``; a test names the
versions of paramiko with which that was checked.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.ssh.watchdog import Watchdog, start_thread

REKEY_BYTES = 2**36
MAX_GREETING = 2**18  # bytes before the key exchange; OpenSSH sends a few hundred at most
MAX_PACKET = 2**22  # bytes, far more than anybody asks for
CHANNEL_PACKET = 131072  # bytes; a fourth of the packets that 32 KB would make
COMMAND_WINDOW = 2**21  # bytes
KEEPALIVE = 15.0  # seconds of silence after which a host is asked whether it is there
DEAD_AFTER = 38.0  # seconds of silence after which a connection counts as dead
KEEPALIVE_LOOK = 5.0  # seconds between two looks at that
# Messages that begin with a count, for as many things as paramiko would then read from nothing.
_EXT_INFO, _INFO_REQUEST, _SERVICE_ACCEPT = 7, 60, 6
_WINDOW_ADJUST, _CHANNEL_CLOSE = b"\x5d", b"\x61"
# Both ciphers authenticate as they go, which is nearly twice as fast here as CTR with a MAC.
FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")


class NoChannelError(SSHError):
    """A host opens no further channel on a connection; sshd's MaxSessions is ten by default."""


def takes_turns(transport: Any) -> bool:
    """Return whether a command may not start while another one of the connection ends.

    When one ends, dropbear (2022.83) closes every channel whose command has not started yet.
    """
    return "dropbear" in str(getattr(transport, "remote_version", ""))


def prepared_transport(
    sock: Any, options: dict[str, Any], timeout: float, key_types: Iterable[str]
) -> Any:
    """Make a transport for ``SSHClient.connect``.

    Parameters:
        options: what paramiko gives to the transport that it would make.
        timeout: seconds for the handshake.
        key_types: of the host's keys, the preferred ones first.
    """
    import paramiko

    transport: Any = paramiko.Transport(sock, **options)
    # paramiko deadlocks in a new key exchange while several threads send, and the connection dies
    # of it after 30 s: so none before 64 GB, which is OpenSSH's own limit.
    transport.packetizer.REKEY_BYTES = REKEY_BYTES
    transport.handshake_timeout = timeout
    _limit_packets(transport.packetizer, paramiko.SSHException)
    _name_errors(transport, paramiko.SSHException)
    with contextlib.suppress(OSError, AttributeError):
        # Or each small packet waits up to 40 ms for the answer to the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    security = transport.get_security_options()
    security.ciphers = _preferred(security.ciphers, FAST_CIPHERS)
    security.key_types = _preferred(security.key_types, key_types)
    return transport


def _preferred(names: Any, first: Any) -> list[str]:
    """Return ``names`` with those of ``first`` that are among them in front."""
    return [n for n in first if n in names] + [n for n in names if n not in first]


def _limit_packets(packetizer: Any, error: type[Exception]) -> None:
    """Limit what a host may send: paramiko takes lines, packets and counts of any size."""
    read_timeout: Any = getattr(packetizer, "_read_timeout", None)
    read_all, read_message = packetizer.read_all, packetizer.read_message
    greeting = 0
    packetizer.last_received = time.monotonic()

    def limited_greeting(timeout: float) -> Any:
        nonlocal greeting
        piece = read_timeout(timeout)
        greeting += len(piece)
        if greeting > MAX_GREETING:
            raise error(": it has no end")
        return piece

    def limited_packet(size: int, check_rekey: bool = False) -> Any:
        if size > MAX_PACKET:
            raise error(f"it sends a packet of {size} bytes")
        return read_all(size, check_rekey)

    def limited_message() -> Any:
        kind, message = read_message()
        then, packetizer.last_received = packetizer.last_received, time.monotonic()
        if kind == _SERVICE_ACCEPT:  # its request followed the message before
            packetizer.round_trip = packetizer.last_received - then
        if kind in (_EXT_INFO, _INFO_REQUEST):
            if kind == _INFO_REQUEST:
                for _ in range(3):
                    message.get_binary()
            if message.get_int() > len(message.asbytes()):
                raise error("it sends a list longer than its message")
            message.rewind()
        return kind, message

    packetizer._read_timeout = limited_greeting
    packetizer.read_all = limited_packet
    packetizer.read_message = limited_message


def _name_errors(transport: Any, error: type[Exception]) -> None:
    """Raise as paramiko's own error what its thread died of: odd bytes can make it anything."""
    get_exception = transport.get_exception

    def named() -> Any:
        failure = get_exception()
        if failure is None or isinstance(failure, (error, OSError, EOFError)):
            return failure
        told = error(f"it broke off ({type(failure).__name__})")
        told.__cause__ = failure
        return told

    transport.get_exception = named


def close_after(transport: Any, clients: list[Any]) -> None:
    """Close the jump hosts' connections with the transport that goes through them."""
    close = transport.close

    def close_all() -> None:
        close()
        for client in clients[::-1]:
            client.close()

    transport.close = close_all


def keep_alive(transport: Any) -> None:
    """Ask a silent host whether it is still there, and end the connection without an answer.

    paramiko's own keepalives ask for no answer, so they never notice a dead link.
    """
    packetizer = transport.packetizer

    def ask() -> None:
        with contextlib.suppress(*connection_errors()):
            transport.global_request("keepalive@openssh.com", wait=True)

    def check() -> None:
        silent = time.monotonic() - packetizer.last_received
        if silent > DEAD_AFTER:
            raise EOFError  # in paramiko's own thread, which then closes everything
        if silent > KEEPALIVE - KEEPALIVE_LOOK:
            start_thread("keepalive", ask)  # a send may hang

    packetizer.set_keepalive(KEEPALIVE_LOOK, check)


def open_session(transport: Any, timeout: float, window: int = COMMAND_WINDOW) -> Any:
    """Open a channel that keeps no more than its window in memory.

    Raises:
        NoChannelError: the host refuses a further one.
        SSHError: it does not answer, or the connection is closed.
    """
    import paramiko

    if transport is None or not transport.is_active():
        raise SSHError("the connection to the machine is closed")
    try:
        channel = transport.open_session(
            window_size=window, max_packet_size=CHANNEL_PACKET, timeout=timeout
        )
    except connection_errors() as error:
        if not transport.is_active():
            raise SSHError("the connection broke") from error
        # A refusal comes as another error where another thread has taken paramiko's own.
        refused = isinstance(error, paramiko.SSHException) and "Timeout" not in str(error)
        kind = NoChannelError if refused else SSHError
        raise kind(f"the machine opened no channel: {reason(error)}") from error
    channel.settimeout(timeout)
    channel.transport = ChannelOrder(transport)
    for pipe in (channel.in_buffer, channel.in_stderr_buffer):
        _limit_buffer(pipe, window + CHANNEL_PACKET)
    return channel


class ChannelOrder:
    """Stands between a channel and its transport: nothing follows the channel's close.

    paramiko's own thread may answer the host's close while another one sends, and a server ends
    the whole connection for what comes after that. Where a broken connection takes no request for
    more data, paramiko would lose what it was about to return.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._close_sent = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _send_user_message(self, message: Any) -> None:
        with self._lock:
            if not self._close_sent:
                kind = message.asbytes()[:1]
                self._close_sent = kind == _CHANNEL_CLOSE
                try:
                    self._transport._send_user_message(message)
                except connection_errors():
                    if kind != _WINDOW_ADJUST:
                        raise


def _limit_buffer(pipe: Any, most: int) -> None:
    """End the connection of a host that sends more than the window allows: paramiko keeps it."""
    feed = pipe.feed

    def limited(data: Any) -> None:
        if len(pipe) + len(data) > most:
            raise EOFError  # in paramiko's own thread, which then closes everything
        feed(data)

    pipe.feed = limited


def request_exec(channel: Any, command: bytes | str) -> None:
    """Ask for a command without waiting for the answer; a refusal closes the channel.

    paramiko's own ``exec_command`` waits for it, without a time limit.
    """
    _request(channel, "exec", True, command)


def request_subsystem(channel: Any, name: str) -> None:
    """Ask for a subsystem, in the same way."""
    _request(channel, "subsystem", True, name)


def request_signal(channel: Any, name: str) -> None:
    """Ask the host to signal the process group of a channel, unless the channel is closed."""
    if not channel.closed:
        _request(channel, "signal", False, name)


def _request(channel: Any, kind: str, answered: bool, value: bytes | str) -> None:
    import paramiko
    from paramiko.common import cMSG_CHANNEL_REQUEST

    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string(kind)
    message.add_boolean(answered)
    message.add_string(value)
    try:
        channel.transport._send_user_message(message)
    except connection_errors() as error:
        raise SSHError("the connection broke") from error


def connection_errors() -> tuple[type[Exception], ...]:
    """Return what paramiko raises where a connection or a channel ends."""
    import paramiko

    return (paramiko.SSHException, OSError, EOFError)


def reason(error: BaseException) -> str:
    """Describe an error whose text may be the host's."""
    text = str(getattr(error, "text", "")) or str(error)
    return printable(text.rstrip(".") or type(error).__name__, 200)


class LimitedChannel:
    """A channel on which no call takes much longer than ``timeout`` seconds.

    paramiko writes to a socket without a time limit; here the watchdog then closes the connection.
    Calls that wait for nothing go to paramiko's channel as they are.

    Raises:
        SSHError: a call takes too long. Other errors are paramiko's own.
    """

    def __init__(
        self, transport: Any, timeout: float, watchdog: Watchdog, window: int = COMMAND_WINDOW
    ) -> None:
        self._transport = transport
        self.timeout = timeout
        self._watchdog = watchdog
        self._channel = self._limited("opened no channel", open_session, transport, timeout, window)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def exec_command(self, command: bytes | str) -> None:
        self._limited("took no command", request_exec, self._channel, command)

    def invoke_subsystem(self, name: str) -> None:
        self._limited("took no command", request_subsystem, self._channel, name)

    def send(self, data: Any) -> int:
        return int(self._limited("took nothing", self._channel.send, data))

    def sendall(self, data: Any) -> None:
        view = memoryview(data.encode() if isinstance(data, str) else data)
        while view:
            view = view[self.send(view) :]

    def recv(self, size: int) -> bytes:
        return bytes(self._limited("sent nothing", self._channel.recv, size))

    def recv_stderr(self, size: int) -> bytes:
        return bytes(self._limited("sent nothing", self._channel.recv_stderr, size))

    def recv_exit_status(self) -> int:
        """Return the exit status; -1 where the channel ended without one."""
        if not self._channel.status_event.wait(self.timeout):
            raise SSHError(f"the machine did not end the command within {self.timeout:g}s")
        return int(self._channel.exit_status)

    def shutdown_write(self) -> None:
        self._limited("took nothing", self._channel.shutdown_write)

    def close(self) -> None:
        with contextlib.suppress(SSHError, *connection_errors()):
            self._limited("took nothing", self._channel.close)

    def _limited(self, failing: str, call: Callable[..., Any], *arguments: Any) -> Any:
        # By itself the call ends within the timeout, unless it hangs while it writes.
        with self._watchdog.limit(1.25 * self.timeout + 0.25, self._break_off) as limit:
            try:
                return call(*arguments)
            except Exception as error:
                if isinstance(error, TimeoutError) or limit.expired:
                    late = f"the machine {failing} for {self.timeout:g}s"
                    raise SSHError(late) from error
                raise

    def _break_off(self) -> None:
        self._transport.close()
