"""Pin the host key of each order; find the private key of a public key."""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import re
from pathlib import Path
from typing import Any

from clore_client.config import locked_path, replace_file
from clore_client.errors import HostKeyChangedError
from clore_client.log import logger
from clore_client.orders.credentials import public_key_fingerprint
from clore_client.ssh.transport import import_paramiko
from clore_client.validation import short_repr

PINS_FILE = "known_hosts"  # in the state folder, in OpenSSH's format
MAX_PINS_SIZE = 1_000_000  # bytes of the file that are read
MAX_PINS = 1000
LONGEST_KEY_FILE = 65536  # bytes
LOCK_PATIENCE = 2.0  # seconds
# A host key is negotiated by its signature algorithm: RSA keys have several.
_ALGORITHMS = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa")}


def check_host_key(value: Any) -> str:
    """Check that a value is ``"pin"``, ``"accept"``, or a fingerprint."""
    text = isinstance(value, str)
    if text and re.fullmatch(r"pin|accept|SHA256:[A-Za-z0-9+/]{43}=?", value):
        return str(value).rstrip("=")
    raise (ValueError if text else TypeError)(
        "host_key must be 'pin', 'accept' or a fingerprint like 'SHA256:...', as "
        f"`ssh-keygen -l` prints it, not {short_repr(value)}"
    )


class HostKeys:
    """Keep the pinned host keys of an account, in memory and in the state folder.

    Parameters:
        folder: the state folder, or None if none is used.
        account: a digest of the account, for the names of its hosts.
    """

    def __init__(self, folder: Path | None, account: str) -> None:
        self.path = None if folder is None else folder / PINS_FILE
        self._account = account[:12]
        self._seen: dict[str, list[str]] = {}

    def alias(self, order_id: int | None, address: dict[str, Any]) -> str:
        """Return the name for the key of an order; the address if the order has no id."""
        if order_id:
            return f"clore-order-{order_id}-{self._account}"
        return "{host}:{port}".format(**address)

    def of(self, alias: str) -> list[str]:
        """Return the pinned keys of a host: their type and base64, as in ``known_hosts``."""
        if alias in self._seen:
            return self._seen[alias]
        with contextlib.suppress(OSError):
            return [pin for line in self._lines() if (pin := _pin_in(line, alias))]
        return []

    def keep(self, alias: str, pin: str) -> None:
        """Pin a key instead of all others of the host."""
        if self.of(alias) != [pin]:
            self._rewrite(alias, pin)
        self._seen[alias] = [pin]

    def forget(self, alias: str) -> bool:
        """Forget the keys of a host; return True if there were any."""
        known = bool(self.of(alias))
        self._seen.pop(alias, None)
        if known:
            self._rewrite(alias, None)
        return known

    def _lines(self) -> list[str]:
        if self.path is None:
            return []
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                return file.read(MAX_PINS_SIZE).splitlines()
        except FileNotFoundError:
            return []

    def _rewrite(self, alias: str, pin: str | None) -> None:
        """Replace the lines of a host in the file; only warn if that fails."""
        if self.path is None or not alias.startswith("clore-order-"):
            return
        try:
            with locked_path(self.path, LOCK_PATIENCE):
                lines = [line for line in self._lines() if not _has_alias(line, alias)]
                if pin is not None:
                    lines.append(f"{alias} {pin}")
                replace_file(self.path, "".join(f"{line}\n" for line in lines[-MAX_PINS:]))
        except OSError as error:
            logger.warning("host keys can't be kept for the next process: %s", error)


def _pin_in(line: str, alias: str) -> str | None:
    """Return the key in a line if the line is for a host."""
    pin = " ".join(line.split()[1:3])
    return pin if _has_alias(line, alias) and public_key_fingerprint(pin) else None


def _has_alias(line: str, alias: str) -> bool:
    """Check if the first word of a line names a host; OpenSSH may have hashed it."""
    names = (line.split() or [""])[0]
    if not names.startswith("|1|"):
        return alias in names.split(",")
    try:
        salt, digest = (base64.b64decode(part) for part in names[3:].split("|"))
    except ValueError:
        return False
    return hmac.compare_digest(hmac.new(salt, alias.encode(), "sha1").digest(), digest)


class KeyCheck:
    """Check the host key of one order, as paramiko's policy for unknown hosts.

    Parameters:
        pins: the pinned keys.
        order_id: the id of the order, or None.
        address: its address, as ``plain_address`` returns it.
        mode: ``"pin"``, ``"accept"`` or a fingerprint.
    """

    def __init__(
        self, pins: HostKeys, order_id: int | None, address: dict[str, Any], mode: str
    ) -> None:
        self._pins = pins
        self._order_id = order_id
        self._alias = pins.alias(order_id, address)
        self._mode = mode

    @property
    def wanted_types(self) -> list[str]:
        """Return the algorithms of the pinned keys, to prefer in the key exchange."""
        if self._mode == "accept":
            return []
        kinds = [pin.split()[0] for pin in self._pins.of(self._alias)]
        return [name for kind in kinds for name in _ALGORITHMS.get(kind, (kind,))]

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        """Check a host's key; paramiko calls this before it sends anything secret."""
        self._check(key)

    def remember(self, key: Any) -> None:
        """Pin the host's key, after a successful login."""
        self._check(key)  # again: another thread may have pinned another key
        pin = f"{key.get_name()} {key.get_base64()}"
        replaces = self._mode != "pin" or pin not in self._pins.of(self._alias)
        if replaces and self._mode != "accept":
            self._pins.keep(self._alias, pin)

    def _check(self, key: Any) -> None:
        if self._mode == "accept":
            return
        pinned = [public_key_fingerprint(pin) or "" for pin in self._pins.of(self._alias)]
        allowed = pinned if self._mode == "pin" else [self._mode]
        found: str = key.fingerprint
        if not allowed or found in allowed:
            return
        expected = " or ".join(allowed)
        name = f"order {self._order_id}" if self._order_id else self._alias
        raise HostKeyChangedError(
            f"the host of {name} has the host key {found} instead of {expected}: its container "
            "was created again, or another host has its address. No password or key "
            "was sent. To accept the new host key, call forget_host_key(order) or pass "
            f"host_key={found!r}",
            order_id=self._order_id,
            expected=expected,
            found=found,
        )


def private_key_of(fingerprint: str) -> tuple[str | None, Any]:
    """Return the private key with a fingerprint.

    Returns:
        A file of ``~/.ssh`` and None, or None and a key of the agent; None for both if there is
        none. The agent is preferred, because it needs no passphrase.
    """
    for key in _agent_keys():
        if key.fingerprint == fingerprint:
            return None, key
    try:
        paths = sorted(Path(os.path.expanduser("~/.ssh")).iterdir())
    except OSError:
        return None, None
    for path in paths:
        if _file_fingerprint(path) == fingerprint:
            return str(path), None
    return None, None


def _agent_keys() -> tuple[Any, ...]:
    try:
        return tuple(import_paramiko().Agent().get_keys())
    except Exception as error:
        logger.debug("the keys of the SSH agent can't be listed: %s", error)
        return ()


def _file_fingerprint(path: Path) -> str | None:
    """Return the fingerprint of a private key file; None if the file has no private key."""
    text = _text_of(path)
    if "PRIVATE KEY-----" not in text[:200]:
        return None
    if public := _text_of(path.with_name(f"{path.name}.pub")):  # as the key may be encrypted
        return public_key_fingerprint(public)
    try:
        return str(import_paramiko().PKey.from_path(path).fingerprint)
    except Exception as error:
        logger.debug("%s is not a key that can be read: %s", path, error)
        return None


def _text_of(path: Path) -> str:
    try:
        if not path.is_file():  # opening a pipe would block
            return ""
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(LONGEST_KEY_FILE)
    except OSError:
        return ""
