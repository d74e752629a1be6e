"""Prepare paramiko's connections and channels: limits of memory and time, and fast ciphers.

paramiko has no settings for most of this, so attributes of its objects are replaced. Two of them
are private: ``Packetizer._read_timeout`` and ``Transport._send_user_message``. A test names the
versions of paramiko that have them.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.log import logger

PARAMIKO_LOGGER = "clore_client.paramiko"
REKEY_BYTES = 2**36
MAX_GREETING = 2**18  # bytes before the key exchange; OpenSSH sends a few hundred at most
MAX_PACKET = 2**22  # bytes; far more than a host is asked to send
CHANNEL_PACKET = 131072  # bytes; needs a fourth of the packets that 32 KB would need
COMMAND_WINDOW = 2**21  # bytes
CHANNEL_PAUSE = 0.05  # seconds between two attempts to open a channel
SPARE_PATIENCE = 1.0  # seconds for another thread to take a channel that the host has opened
KEEPALIVE = 15.0  # seconds of silence after which a keepalive request is sent
DEAD_AFTER = 38.0  # seconds of silence after which a connection counts as dead
SILENCE_CHECK = 5.0  # seconds between two checks for silence
WATCH_INTERVAL = 0.1  # seconds between two checks of the watchdog's limits
# Messages with a count of items: paramiko does not check it against the length of the message.
_EXT_INFO, _INFO_REQUEST, _SERVICE_ACCEPT = 7, 60, 6
_WINDOW_ADJUST, _CHANNEL_CLOSE = b"\x5d", b"\x61"
# Both ciphers include authentication, and are nearly twice as fast as CTR with a MAC.
FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")


def import_paramiko() -> Any:
    """Import paramiko, or raise an ImportError that says what to install."""
    try:
        import paramiko
    except ImportError as error:
        raise ImportError("SSH needs paramiko: pip install paramiko scp") from error
    # It logs each failure with a traceback and the host's own text, which Python would print. A
    # handler of the user still gets them.
    quiet = logging.getLogger(PARAMIKO_LOGGER)
    if not quiet.handlers:
        quiet.addHandler(logging.NullHandler())
        quiet.propagate = False
    return paramiko


class NoChannelError(SSHError):
    """A host opens no further channel on a connection; sshd's MaxSessions is ten by default."""


def takes_turns(transport: Any) -> bool:
    """Return True if no command may start while another one of the connection ends.

    When one ends, dropbear (2022.83) closes every channel whose command has not started yet.
    """
    return "dropbear" in str(getattr(transport, "remote_version", ""))


def prepared_transport(
    sock: Any, options: dict[str, Any], timeout: float, key_types: Iterable[str]
) -> Any:
    """Make a transport for ``SSHClient.connect``.

    Parameters:
        options: the arguments of paramiko for the transport.
        timeout: seconds for the handshake.
        key_types: of the host's keys, the preferred ones first.
    """
    import paramiko

    transport: Any = paramiko.Transport(sock, **options)
    transport.spare = SpareSession(transport)
    # In a new key exchange while several threads send, paramiko deadlocks for 30 s and then closes
    # the connection. So there is none before 64 GB, which is also OpenSSH's limit.
    transport.packetizer.REKEY_BYTES = REKEY_BYTES
    transport.handshake_timeout = timeout
    _limit_packets(transport.packetizer, paramiko.SSHException)
    _name_errors(transport, paramiko.SSHException)
    with contextlib.suppress(OSError, AttributeError):
        # Otherwise a small packet waits up to 40 ms for the TCP ACK of the previous one.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    security = transport.get_security_options()
    security.ciphers = _preferred(security.ciphers, FAST_CIPHERS)
    security.key_types = _preferred(security.key_types, key_types)
    return transport


def _preferred(names: Any, first: Any) -> list[str]:
    """Return ``names``, with those that are also in ``first`` at the front."""
    return [n for n in first if n in names] + [n for n in names if n not in first]


def _limit_packets(packetizer: Any, error: type[Exception]) -> None:
    """Limit what a host may send: paramiko accepts lines, packets and counts of any size."""
    read_timeout, read_all = packetizer._read_timeout, packetizer.read_all
    read_message = packetizer.read_message
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
        if kind == _SERVICE_ACCEPT:  # it was requested right after the previous message
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
    """Convert any exception of paramiko's thread to an SSHException."""
    get_exception = transport.get_exception

    def named() -> Any:
        failure = get_exception()
        if failure is None or isinstance(failure, (error, OSError, EOFError)):
            return failure
        return error(f"the connection failed ({type(failure).__name__})")

    transport.get_exception = named


def guard_close(transport: Any, clients: list[Any]) -> None:
    """Let a transport close without an error, and then the jump hosts that it goes through."""
    close = transport.close

    def close_all() -> None:
        try:
            close()
        except AttributeError:  # another thread is just opening a channel: a race in paramiko
            transport.sock.close()
        for client in clients[::-1]:
            client.close()

    transport.close = close_all


def keep_alive(transport: Any) -> None:
    """Send keepalive requests to a silent host; close the connection if it does not reply.

    paramiko's own keepalives request no reply, so they do not detect a dead connection.
    """
    packetizer = transport.packetizer

    def ask() -> None:
        with contextlib.suppress(*connection_errors()):
            transport.global_request("keepalive@openssh.com", wait=True)

    def check() -> None:
        silent = time.monotonic() - packetizer.last_received
        if silent > DEAD_AFTER:
            raise EOFError  # in paramiko's own thread, which then closes everything
        if silent > KEEPALIVE - SILENCE_CHECK:
            start_thread("keepalive", ask)  # a send may hang

    packetizer.set_keepalive(SILENCE_CHECK, check)


def open_session(transport: Any, timeout: float, window: int = COMMAND_WINDOW) -> Any:
    """Open a channel that keeps no more than its window in memory.

    Raises:
        NoChannelError: the host refuses the channel.
        SSHError: the host does not answer, or the connection is closed.
    """
    if transport is None or not transport.is_active():
        raise SSHError("the connection to the host is closed")
    try:
        channel = transport.open_session(
            window_size=window, max_packet_size=CHANNEL_PACKET, timeout=timeout
        )
    except connection_errors() as error:
        if not transport.is_active():
            raise SSHError("the connection broke") from error
        kind = NoChannelError if _is_refusal(error) else SSHError
        raise kind(f"the host opened no channel: {reason(error)}") from error
    channel.settimeout(timeout)
    _guard_channel(channel)
    return channel


def with_patience(seconds: float, open_channel: Callable[[], Any]) -> Any:
    """Open a channel; retry while the host opens no further one."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return open_channel()
        except NoChannelError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(CHANNEL_PAUSE)


def open_next_session(transport: Any) -> None:
    """Open a session for the next command, without waiting for it."""
    spare = getattr(transport, "spare", None)
    if spare is not None:  # the user's own connection has none
        spare.ask()


class SpareSession:
    """Open a session of a transport in advance, to save a round trip later.

    The next caller gets this session, so that it never exceeds the host's limit.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._open_channel = transport.open_channel
        self._lock = threading.Lock()
        self._opener: threading.Thread | None = None
        self._channel: Any = None
        transport.open_channel = self._take_or_open

    def ask(self) -> None:
        """Open the session in a new thread, unless there is one."""
        with self._lock:
            opening = self._opener is not None and self._opener.is_alive()
            if not opening and not _usable(self._channel) and not takes_turns(self._transport):
                self._opener = start_thread("spare-session", self._open)

    def _open(self) -> None:
        with contextlib.suppress(*connection_errors()):
            channel = self._open_channel(
                "session", window_size=COMMAND_WINDOW, max_packet_size=CHANNEL_PACKET
            )
            _guard_channel(channel)
            with self._lock:
                self._channel = channel

    def _take(self) -> Any:
        with self._lock:
            channel, self._channel = self._channel, None
        return channel if _usable(channel) else None

    def _take_or_open(self, kind: str, *arguments: Any, **options: Any) -> Any:
        """Replace ``Transport.open_channel``."""
        if kind != "session":
            return self._open_channel(kind, *arguments, **options)
        wide = (options.get("window_size") or 0) > COMMAND_WINDOW
        if not wide and (spare := self._take()):
            return spare
        try:
            return self._open_channel(kind, *arguments, **options)
        except connection_errors() as error:
            if self._opener is not None and _is_refusal(error):
                self._opener.join(SPARE_PATIENCE)  # the host has replied to that request first
            if spare := self._take():
                return spare
            raise


def _is_refusal(error: Exception) -> bool:
    import paramiko

    # If another thread took paramiko's error first, this one has a different type.
    return isinstance(error, paramiko.SSHException) and "Timeout" not in str(error)


def _usable(channel: Any) -> bool:
    return channel is not None and not channel.closed and not channel.eof_received


def _guard_channel(channel: Any) -> None:
    """Limit the memory of a channel, and send nothing after its close message."""
    if isinstance(channel.transport, ChannelOrder):
        return
    channel.transport = ChannelOrder(channel.transport)
    for pipe in (channel.in_buffer, channel.in_stderr_buffer):
        _limit_buffer(pipe, channel.in_window_size + CHANNEL_PACKET)


class ChannelOrder:
    """Pass messages from a channel to its transport, but none after the channel's close.

    paramiko's own thread may answer the host's close while another thread sends, and a server
    closes the whole connection if a message follows. Also, if a request for more data fails,
    paramiko would lose the data that it was about to return.
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
    """Close the connection if a host sends more than the window allows; paramiko would keep it."""
    feed = pipe.feed

    def limited(data: Any) -> None:
        if len(pipe) + len(data) > most:
            raise EOFError  # in paramiko's own thread, which then closes everything
        feed(data)

    pipe.feed = limited


def channel_request(channel: Any, kind: str, value: bytes | str, answered: bool = True) -> None:
    """Request an exec or a subsystem, or send a signal, without waiting for the answer.

    A refusal closes the channel. paramiko's own methods wait for the answer, without a time limit.
    """
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
    """Return the errors that paramiko raises when a connection or a channel ends."""
    import paramiko

    return (paramiko.SSHException, OSError, EOFError)


def reason(error: BaseException) -> str:
    """Describe an error; its text may come from the host."""
    text = str(getattr(error, "text", "")) or str(error)
    return printable(text.replace("[Errno None] ", "").rstrip(".") or type(error).__name__, 200)


def is_connected(ssh: Any) -> bool:
    """Check that a connection is open."""
    transport = ssh.get_transport()
    return transport is not None and bool(transport.is_active())


def start_thread(name: str, target: Callable[..., object], *args: Any) -> threading.Thread:
    """Start a daemon thread."""
    thread = threading.Thread(target=target, args=args, name=f"clore-{name}", daemon=True)
    thread.start()
    return thread


class Limit:
    """The time limit of a block.

    Attributes:
        expired: True if the block took longer.
    """

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self.deadline = time.monotonic() + seconds
        self.action = action
        self.expired = False


class Watchdog:
    """Run an action when a block takes too long; a context manager with one thread.

    paramiko writes to a socket without a timeout: only closing the connection ends that.
    """

    def __init__(self) -> None:
        self._limits: dict[int, Limit] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._thread = start_thread("watchdog", self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    @contextlib.contextmanager
    def limit(self, seconds: float, action: Callable[[], object]) -> Iterator[Limit]:
        """Run ``action`` in a new thread if the block takes longer than ``seconds``."""
        limit = Limit(seconds, action)
        self._limits[id(limit)] = limit
        try:
            yield limit
        finally:
            self._limits.pop(id(limit), None)

    def _watch(self) -> None:
        while not self._done.wait(WATCH_INTERVAL):
            now = time.monotonic()
            for key, limit in list(self._limits.items()):
                if now >= limit.deadline and self._limits.pop(key, None) is not None:
                    limit.expired = True
                    logger.debug("the watchdog stops a call that takes too long")
                    start_thread("watchdog-action", limit.action)


class LimitedChannel:
    """Limit each call of a channel to about ``timeout`` seconds.

    paramiko writes to a socket without a time limit; here the watchdog then closes the connection.
    Methods that do not wait are called on paramiko's channel directly.

    Raises:
        SSHError: a call takes too long. Other errors come from paramiko unchanged.
    """

    def __init__(
        self, transport: Any, timeout: float, watchdog: Watchdog, window: int = COMMAND_WINDOW
    ) -> None:
        self._transport = transport
        self.timeout = timeout
        self._watchdog = watchdog
        self._channel = self.limited("opened no channel", open_session, transport, timeout, window)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def exec_command(self, command: bytes | str) -> None:
        self.limited("accepted no command", channel_request, self._channel, "exec", command)

    def invoke_subsystem(self, name: str) -> None:
        self.limited("accepted no command", channel_request, self._channel, "subsystem", name)

    def send(self, data: Any) -> int:
        return int(self.limited("accepted no data", self._channel.send, data))

    def sendall(self, data: Any) -> None:
        view = memoryview(data.encode() if isinstance(data, str) else data)
        while view:
            view = view[self.send(view) :]

    def recv(self, size: int) -> bytes:
        return bytes(self.limited("sent no data", self._channel.recv, size))

    def recv_stderr(self, size: int) -> bytes:
        return bytes(self.limited("sent no data", self._channel.recv_stderr, size))

    def recv_exit_status(self) -> int:
        """Return the exit status; -1 if the channel ended without one."""
        if not self._channel.status_event.wait(self.timeout):
            raise SSHError(f"the host did not end the command within {self.timeout:g}s")
        return int(self._channel.exit_status)

    def shutdown_write(self) -> None:
        self.limited("accepted no data", self._channel.shutdown_write)

    def close(self) -> None:
        with contextlib.suppress(SSHError, *connection_errors()):
            self.limited("accepted no data", self._channel.close)

    def limited(self, failing: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; raise an SSHError that says what is ``failing`` if it takes too long."""
        # By itself the call ends within the timeout, unless it hangs while it writes.
        seconds = 1.25 * self.timeout + 0.25
        with self._watchdog.limit(seconds, lambda: self._transport.close()) as limit:
            try:
                return call(*arguments)
            except Exception as error:
                if isinstance(error, TimeoutError) or limit.expired:
                    late = f"the host {failing} for {self.timeout:g}s"
                    raise SSHError(late) from error
                raise
