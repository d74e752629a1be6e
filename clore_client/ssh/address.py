"""Read the address of a machine from its order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clore_client.errors import SSHError
from clore_client.models.order import plain_host, plain_user
from clore_client.validation import short_repr

DEFAULT_USER = "root"
DEFAULT_PORT = 22


def parse_ssh_command(order: Any) -> dict[str, Any]:
    """Read host, port and user; see ``CloreClient.parse_ssh_connection``."""
    raw = _ssh_line(order)
    host, port, user = parse_address(raw)
    return {"host": host, "port": port, "user": user if plain_user(user) else DEFAULT_USER,
            "raw": raw}  # fmt: skip


def check_order(order: Any) -> Mapping[str, Any]:
    """Check that an argument is an order, and return it."""
    if not isinstance(order, Mapping):
        raise TypeError(
            f"order must be one as wait_for_order() returns it, not {short_repr(order)}"
        )
    return order


def plain_address(order: Any) -> dict[str, Any]:
    """Read the same from an order; raise unless host and user are plain names or addresses."""
    address = parse_ssh_command(check_order(order))
    user = parse_address(address["raw"])[2]
    if address["host"] and (not user or plain_user(user)):
        return address
    status = order.get("status")
    raise SSHError(
        f"the order has no address for SSH, or no plain one: connection.ssh is "
        f"{short_repr(address['raw'])}, status {short_repr(status)}; "
        "wait_for_order() returns an order that has one"
    )


def _ssh_line(order: Any) -> str:
    connection = order.get("connection") if isinstance(order, Mapping) else None
    raw = connection.get("ssh") if isinstance(connection, Mapping) else None
    return raw if isinstance(raw, str) else ""


def parse_address(raw: str) -> tuple[str, int, str]:
    """Return the host, if it is a plain one, the port, and the user as it stands there."""
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
            return "", DEFAULT_PORT, ""
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
    return host if plain_host(host) else "", port, user


def _port_number(text: str) -> int:
    digits = text.isascii() and text.isdigit() and len(text) <= 5
    return int(text) if digits and 1 <= int(text) <= 65535 else DEFAULT_PORT
