"""Find the private key of a public key, in ``~/.ssh`` and in the SSH agent."""

from __future__ import annotations

import base64
import os
import struct
from pathlib import Path
from typing import Any

from clore_client.log import logger
from clore_client.orders.credentials import public_key_fingerprint
from clore_client.ssh.connect import import_paramiko
from clore_client.ssh.host_keys import fingerprint_of, pin_fingerprint

LONGEST_KEY_FILE = 65536  # bytes
_OPENSSH_MAGIC = b"openssh-key-v1\0"


def private_key_of(fingerprint: str) -> tuple[Path | None, Any]:
    """Return the private key with a fingerprint.

    Returns:
        A file of ``~/.ssh`` and None, or None and a key of the agent; None twice if there is none.
        The agent comes first, because it needs no passphrase.
    """
    for key in _agent_keys():
        if fingerprint_of(key) == fingerprint:
            return None, key
    folder = Path(os.path.expanduser("~/.ssh"))
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None, None
    for name in names:
        path = folder / name
        if _file_fingerprint(path) == fingerprint:
            return path, None
    return None, None


def _agent_keys() -> tuple[Any, ...]:
    if not os.environ.get("SSH_AUTH_SOCK") and os.name != "nt":
        return ()
    try:
        return tuple(import_paramiko().Agent().get_keys())
    except Exception as error:
        logger.debug("the SSH agent can't be asked: %s", error)
        return ()


def _file_fingerprint(path: Path) -> str | None:
    """Return the fingerprint of a private key file; None if the file has no private key."""
    text = _text_of(path)
    if "PRIVATE KEY-----" not in text[:200]:
        return None
    if (blob := _public_part(text)) is not None:  # readable without the passphrase
        return pin_fingerprint(("", base64.b64encode(blob).decode()))
    public = _text_of(path.with_name(f"{path.name}.pub"))
    if public:
        return public_key_fingerprint(public)
    try:
        return fingerprint_of(import_paramiko().PKey.from_path(path))
    except Exception as error:
        logger.debug("%s is not a key that can be read: %s", path, error)
        return None


def _text_of(path: Path) -> str:
    try:
        if not path.is_file():
            return ""
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(LONGEST_KEY_FILE)
    except OSError:
        return ""


def _public_part(text: str) -> bytes | None:
    """Return the public key of a private key in OpenSSH's own format."""
    lines = [line for line in text.splitlines() if line and "-----" not in line]
    try:
        data = base64.b64decode("".join(lines))
        if not data.startswith(_OPENSSH_MAGIC):
            return None
        rest = data[len(_OPENSSH_MAGIC) :]
        for _ in range(3):  # the cipher, and how its key is made from the passphrase
            rest = _field(rest)[1]
        return _field(rest[4:])[0]  # after the number of keys
    except (ValueError, struct.error):
        return None


def _field(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack_from(">I", data)
    return data[4 : 4 + length], data[4 + length :]
