"""Getting into a rented machine. paramiko is imported when it is used, not with the package."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clore_client.errors import SSHError, printable
from clore_client.log import logger
from clore_client.orders import plain_host, plain_user

if TYPE_CHECKING:
    import paramiko

DEFAULT_USER = "root"
DEFAULT_PORT = 22
KEEPALIVE = 15  # seconds
SSH_PAUSE = 2.0  # seconds between two tries to reach an sshd that is not up yet


def parse_ssh_command(order: Any) -> dict[str, Any]:
    """Host, port and user of ``connection.ssh``; see ``CloreClient.parse_ssh_connection``."""
    connection = order.get("connection") if isinstance(order, Mapping) else None
    raw = connection.get("ssh") if isinstance(connection, Mapping) else None
    raw = raw if isinstance(raw, str) else ""
    host, port, user = _parsed(raw)
    return {"host": host, "port": port, "user": user, "raw": raw}


def _parsed(raw: str) -> tuple[str, int, str]:
    words = raw.split()
    if words[:1] == ["ssh"]:
        words = words[1:]
    target, port, user = "", DEFAULT_PORT, ""
    while words:
        word = words.pop(0)
        if word in ("-p", "-l") and words:
            value = words.pop(0)
            if word == "-l":
                user = value
            else:
                port = _port_number(value)
        elif word.startswith("-p"):
            port = _port_number(word[2:])
        elif word.startswith("-") or target:
            # An option that could run something here, or a command: not an address to trust.
            return "", DEFAULT_PORT, DEFAULT_USER
        else:
            target = word
    named, at, host = target.rpartition("@")
    user = named if at else user
    if host.startswith("[") and "]" in host:
        host, _, rest = host[1:].partition("]")
        port = _port_number(rest[1:]) if rest[:1] == ":" else port
    elif host.count(":") == 1:
        host, _, rest = host.partition(":")
        port = _port_number(rest)
    return (
        host if plain_host(host) else "",
        port,
        user if plain_user(user) else DEFAULT_USER,
    )


def _port_number(text: str) -> int:
    digits = text.isascii() and text.isdigit() and len(text) <= 5
    return int(text) if digits and 1 <= int(text) <= 65535 else DEFAULT_PORT


def import_paramiko() -> Any:
    """paramiko, or an ImportError that says what to install."""
    try:
        import paramiko
    except ImportError as error:
        raise ImportError(
            "SSH needs paramiko: pip install 'clore-client[ssh]' (or: pip install paramiko scp)"
        ) from error
    return paramiko


def open_ssh(
    order: Any, *, password: str | None, key_path: str | None, timeout: float, wait: float
) -> paramiko.SSHClient:
    """Log in to the machine of an order; see ``CloreClient.connect_ssh``."""
    paramiko_module = import_paramiko()
    address = parse_ssh_command(order)
    if not address["host"]:
        status = order.get("status") if isinstance(order, Mapping) else None
        raise SSHError(
            f"the order has no address for SSH: connection.ssh is "
            f"{printable(repr(address['raw']), 80)}, status {status!r}; "
            "wait_for_order() returns an order that has one"
        )
    key_filename = None if key_path is None or password else os.path.expanduser(key_path)
    if key_filename is not None and not os.path.isfile(key_filename):
        raise ValueError(f"key_path: there is no file {printable(repr(key_filename), 200)}")
    where = f"{address['user']}@{address['host']}:{address['port']}"
    deadline = time.monotonic() + wait
    while True:
        client = paramiko_module.SSHClient()
        # The same host and port go to later orders with another key, so that an entry in
        # known_hosts means nothing here, and none is read or written.
        client.set_missing_host_key_policy(_TakeTheKey())
        try:
            client.connect(
                address["host"],
                port=address["port"],
                username=address["user"],
                password=password,
                key_filename=key_filename,
                timeout=timeout,
                banner_timeout=timeout,
                auth_timeout=timeout,
                allow_agent=not password and key_filename is None,
                look_for_keys=not password and key_filename is None,
            )
        except BaseException as error:
            client.close()
            cause = _not_up_yet(error, paramiko_module, where)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise SSHError(f"no SSH at {where} within {wait:g}s: {cause}") from error
            logger.debug("no SSH at %s yet: %s", where, cause)
            time.sleep(min(SSH_PAUSE, remaining))
            continue
        transport = client.get_transport()
        if transport is not None:
            transport.set_keepalive(KEEPALIVE)
        return client  # type: ignore[no-any-return]


class _TakeTheKey:
    """A policy that takes whatever host key it is shown."""

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        """Called by paramiko for a host that it does not know."""


def _not_up_yet(error: BaseException, paramiko_module: Any, where: str) -> str:
    """What to say of an sshd that is not up yet; raises for everything that time does not heal."""
    if isinstance(error, paramiko_module.AuthenticationException):
        raise SSHError(
            f"{where} refused the login: {printable(str(error).rstrip('.'), 200)}. "
            "Was the order made with another password or key?"
        ) from error
    text = printable(str(error).replace("[Errno None] ", "") or type(error).__name__, 200)
    if isinstance(error, socket.gaierror):
        return f"the host name is not known ({text})"
    if isinstance(error, (OSError, EOFError)):
        return text
    if isinstance(error, paramiko_module.SSHException):
        if "no authentication methods" in text.lower():
            raise SSHError(
                f"there is nothing to log in to {where} with: pass password= or key_path="
            ) from error
        banner = "banner" in text.lower() or "reset" in text.lower() or "eof" in text.lower()
        if banner or "existing session" in text.lower():
            return text
        raise SSHError(f"SSH to {where} failed: {text}") from error
    raise error
