"""Pin host keys for each order: a host and port go to later orders, with another key."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clore_client.errors import HostKeyChangedError
from clore_client.files import lock_file
from clore_client.log import logger
from clore_client.validation import short_repr

PINS_FILE = "known_hosts"  # in the state folder, and in the form of OpenSSH
LONGEST_PINS = 1_000_000  # bytes; a longer file is none of ours
MOST_PINS = 1000
LOCK_PATIENCE = 2.0  # seconds
# One key, several signatures: OpenSSH and paramiko negotiate these by name.
_NEGOTIATED = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa")}

Pin = tuple[str, str]  # the key's type and its base64, as in known_hosts


def pin_of(key: Any) -> Pin:
    """Return a paramiko key as it stands in ``known_hosts``."""
    return key.get_name(), key.get_base64()


def fingerprint_of(key: Any) -> str:
    """Return ``SHA256:...`` of a paramiko key, as ``ssh-keygen -l`` prints it."""
    return pin_fingerprint(pin_of(key))


def pin_fingerprint(pin: Pin) -> str:
    """Return ``SHA256:...`` of a pinned key."""
    digest = hashlib.sha256(base64.b64decode(pin[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def check_host_key(name: str, value: Any) -> str:
    """Check for ``"pin"``, ``"accept"``, or a fingerprint."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be 'pin', 'accept' or a fingerprint, not {short_repr(value)}")
    if value in ("pin", "accept") or re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}=?", value):
        return value.rstrip("=")
    raise ValueError(
        f"{name} must be 'pin', 'accept' or a fingerprint like 'SHA256:...', as "
        f"`ssh-keygen -l` prints it, not {short_repr(value)}"
    )


class HostKeys:
    """The pinned host keys of an account: those of this client, and of the state folder.

    Parameters:
        folder: the state folder, or None where none is in use.
        account: a digest that stands for the account in a name.
    """

    def __init__(self, folder: Path | None, account: str) -> None:
        self.path = None if folder is None else folder / PINS_FILE
        self._account = account[:12]
        self._seen: dict[str, list[Pin]] = {}

    def alias(self, order_id: int | None, address: str) -> str:
        """Return the name under which an order's key is kept; without an id it is the address."""
        return f"clore-order-{order_id}-{self._account}" if order_id else address

    def of(self, alias: str) -> list[Pin]:
        """Return the keys that are pinned for a host."""
        if alias in self._seen:
            return self._seen[alias]
        return [pin for names, pin in self._lines() if _names(names, alias)]

    def keep(self, alias: str, pin: Pin) -> None:
        """Pin a key, in place of those before."""
        if self.of(alias) != [pin]:
            self._rewrite(alias, pin)
        self._seen[alias] = [pin]

    def forget(self, alias: str) -> bool:
        """Forget a host's keys; return whether there were any."""
        known = bool(self.of(alias))
        self._seen.pop(alias, None)
        if known:
            self._rewrite(alias, None)
        return known

    def make_folder(self) -> None:
        """Make the folder, so that OpenSSH can pin a key there first."""
        if self.path is not None:
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                logger.warning("host keys can't be kept for the next process: %s", error)

    def _lines(self) -> Iterator[tuple[str, Pin]]:
        try:
            text = self._text()
        except OSError:
            return
        for line in text.splitlines():
            words = line.split()
            if len(words) >= 3 and not words[0].startswith(("#", "@")):
                with contextlib.suppress(ValueError):
                    base64.b64decode(words[2], validate=True)
                    yield words[0], (words[1], words[2])

    def _text(self) -> str:
        if self.path is None:
            return ""
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                return file.read(LONGEST_PINS)
        except FileNotFoundError:
            return ""

    def _rewrite(self, alias: str, pin: Pin | None) -> None:
        """Replace the lines of a host; a folder that can't be written costs only a warning."""
        if self.path is None or not alias.startswith("clore-order-"):
            return
        try:
            with _locked(self.path):
                lines = [
                    line
                    for line in self._text().splitlines()
                    if line.strip() and not _names(line.split()[0], alias)
                ]
                if pin is not None:
                    lines.append(f"{alias} {pin[0]} {pin[1]}")
                new = self.path.with_name(f"{PINS_FILE}.{os.getpid()}")
                try:
                    handle = os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
                    with open(handle, "w", encoding="utf-8", errors="replace") as file:
                        file.write("".join(f"{line}\n" for line in lines[-MOST_PINS:]))
                    os.replace(new, self.path)
                except OSError:
                    with contextlib.suppress(OSError):
                        new.unlink()
                    raise
        except OSError as error:
            logger.warning("host keys can't be kept for the next process: %s", error)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        if not lock_file(handle, LOCK_PATIENCE):
            raise OSError(f"{path}.lock is held by another process")
        yield
    finally:
        os.close(handle)


def _names(names: str, alias: str) -> bool:
    """Return whether the first word of a line names a host; OpenSSH may have hashed it."""
    if not names.startswith("|1|"):
        return alias in names.split(",")
    try:
        salt, digest = (base64.b64decode(part) for part in names[3:].split("|"))
    except ValueError:
        return False
    return hmac.compare_digest(hmac.new(salt, alias.encode(), hashlib.sha1).digest(), digest)


class KeyCheck:
    """Checks the host key of one order; also paramiko's policy for unknown hosts.

    Parameters:
        pins: where keys are kept.
        order_id: of the order, or None.
        address: its host and port.
        mode: ``"pin"``, ``"accept"`` or a fingerprint.
    """

    def __init__(self, pins: HostKeys, order_id: int | None, address: str, mode: str) -> None:
        self._pins = pins
        self._order_id = order_id
        self._alias = pins.alias(order_id, address)
        self._mode = mode
        self._shown = threading.local()  # several threads may log in at once

    @property
    def wanted_types(self) -> list[str]:
        """The types of the pinned keys, as they are negotiated."""
        if self._mode == "accept":
            return []
        kinds = [kind for kind, _ in self._pins.of(self._alias)]
        return [name for kind in kinds for name in _NEGOTIATED.get(kind, (kind,))]

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        """Check the key that a host shows; paramiko calls this before anything secret is sent."""
        shown = pin_of(key)
        if self._mode == "pin":
            known = self._pins.of(self._alias)
            expected = [pin_fingerprint(pin) for pin in known]
            fits = not known or shown in known
        else:
            expected = [self._mode]
            fits = self._mode in ("accept", pin_fingerprint(shown))
        if not fits:
            raise self._changed(" or ".join(expected), pin_fingerprint(shown))
        self._shown.pin = shown

    def remember(self) -> None:
        """Pin the key that was shown, after a login that worked."""
        shown: Pin | None = getattr(self._shown, "pin", None)
        if self._mode == "accept" or shown is None:
            return
        known = self._pins.of(self._alias)
        if self._mode == "pin" and known and shown not in known:  # pinned a moment ago
            expected = " or ".join(map(pin_fingerprint, known))
            raise self._changed(expected, pin_fingerprint(shown))
        if shown not in known or self._mode != "pin":
            self._pins.keep(self._alias, shown)

    def _changed(self, expected: str, found: str) -> HostKeyChangedError:
        what = f"order {self._order_id}" if self._order_id else self._alias
        return HostKeyChangedError(
            f"the machine of {what} shows the host key {found}, and not {expected}: its container "
            "was started anew, or something else answers in its place. Nothing was sent. "
            f"forget_host_key(order) or host_key={found!r} takes the new one",
            order_id=self._order_id,
            expected=expected,
            found=found,
        )
