"""paramiko's transports, made to bear what a stranger's machine may send, and fast far away.

paramiko has no settings for most of this: what is set here are attributes of its objects.
"""

from __future__ import annotations

import contextlib
import copy
import socket
from collections.abc import Callable, Iterable
from typing import Any

REKEY_BYTES = 2**36
LONGEST_GREETING = 2**18  # bytes before the key exchange; OpenSSH sends a few hundred at most
LONGEST_PACKET = 2**22  # bytes, far more than anybody asks for
# Messages that begin with a count, for as many things as paramiko would then read from nothing.
_EXT_INFO, _INFO_REQUEST = 7, 60
_SERVICE_REQUEST = b"\x05"
# Both ciphers authenticate as they go, which is nearly twice as fast here as CTR with a MAC.
FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")


def prepared_transport(
    sock: Any, options: dict[str, Any], timeout: float, key_types: Iterable[str]
) -> Any:
    """A transport for ``SSHClient.connect``.

    Parameters:
        options: what paramiko gives to the transport that it would make.
        timeout: seconds for the handshake.
        key_types: of the host's keys, those that are wanted first.
    """
    import paramiko

    transport: Any = paramiko.Transport(sock, **options)
    # paramiko would let a new key exchange wait for itself while several threads send, and the
    # connection die of it after 30 s: so none before 64 GB, which is OpenSSH's own limit.
    transport.packetizer.REKEY_BYTES = REKEY_BYTES
    transport.handshake_timeout = timeout
    _bound_host(transport.packetizer, paramiko.SSHException)
    _name_errors(transport, paramiko.SSHException)
    _save_round_trip(transport, paramiko.Message)
    with contextlib.suppress(OSError, AttributeError):
        # Or each small packet waits up to 40 ms for the answer to the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wanted = transport.get_security_options()
    wanted.ciphers = _first(wanted.ciphers, FAST_CIPHERS)
    wanted.key_types = _first(wanted.key_types, key_types)
    return transport


def _first(names: Any, wanted: Any) -> list[str]:
    """``names`` with the ``wanted`` ones that are among them in front."""
    return [n for n in wanted if n in names] + [n for n in names if n not in wanted]


def _bound_host(packetizer: Any, error: type[Exception]) -> None:
    """Bound what a host may send: paramiko takes lines, packets and counts of any size."""
    read_timeout: Any = getattr(packetizer, "_read_timeout", None)
    read_all, read_message = packetizer.read_all, packetizer.read_message
    greeting = 0

    def bounded_greeting(timeout: float) -> Any:
        nonlocal greeting
        piece = read_timeout(timeout)
        greeting += len(piece)
        if greeting > LONGEST_GREETING:
            raise error(": it has no end")
        return piece

    def bounded_packet(size: int, check_rekey: bool = False) -> Any:
        if size > LONGEST_PACKET:
            raise error(f"it sends a packet of {size} bytes")
        return read_all(size, check_rekey)

    def bounded_message() -> Any:
        kind, message = read_message()
        if kind in (_EXT_INFO, _INFO_REQUEST):
            if kind == _INFO_REQUEST:
                for _ in range(3):
                    message.get_binary()
            if message.get_int() > len(message.asbytes()):
                raise error("it sends a list longer than its message")
            message.rewind()
        return kind, message

    packetizer._read_timeout = bounded_greeting
    packetizer.read_all = bounded_packet
    packetizer.read_message = bounded_message


def _name_errors(transport: Any, error: type[Exception]) -> None:
    """Raise as paramiko's own error what its thread has died of: odd bytes can make it anything."""
    get_exception = transport.get_exception

    def named() -> Any:
        failure = get_exception()
        if failure is None or isinstance(failure, (error, OSError, EOFError)):
            return failure
        told = error(f"it broke off ({type(failure).__name__})")
        told.__cause__ = failure
        return told

    transport.get_exception = named


def _save_round_trip(transport: Any, new_message: Callable[[], Any]) -> None:
    """Send a login along with the request for the service that takes it.

    paramiko waits for the answer in between, and so pays for one more trip to a far machine.
    """
    send = transport._send_message

    def prompt(message: Any) -> None:
        handler = transport.auth_handler
        if not _may_be_prompt(handler) or message.asbytes()[:1] != _SERVICE_REQUEST:
            send(message)
            return
        asked = copy.copy(handler)  # which a refusal that comes at once does not empty
        handler._parse_service_accept = lambda _: None  # the answer changes nothing any more
        send(message)
        accepted = new_message()
        accepted.add_string("ssh-userauth")
        accepted.rewind()
        with contextlib.suppress(OSError, EOFError):  # paramiko waits for an answer, and will tell
            asked._parse_service_accept(accepted)

    transport._send_message = prompt


def _may_be_prompt(handler: Any) -> bool:
    if handler is None or handler.authenticated or handler.username is None:
        return False
    # How to sign with an RSA key is told by the machine, just before that answer. An agent may
    # refuse, or ask somebody first: only in paramiko's own thread is that bounded by a timeout.
    key = handler.private_key
    return key is None or not ("rsa" in key.get_name() or hasattr(key, "agent"))
