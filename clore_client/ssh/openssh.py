"""Write what OpenSSH needs to log in: a command line, or an entry for ``~/.ssh/config``."""

from __future__ import annotations

import os
import re
import shlex
from typing import Any

from clore_client.ssh.host_keys import HostKeys
from clore_client.ssh.transfer.scripts import remote_path
from clore_client.validation import check_local_path, short_repr


def terminal_line(address: dict[str, Any], pins: HostKeys, alias: str, key_path: Any) -> str:
    """Return a command line; see ``CloreClient.ssh_command``."""
    words = _ssh_words(address, pins, alias, key_path)
    return shlex.join([*words, f"{address['user']}@{address['host']}"])


def rsync_line(
    address: dict[str, Any], pins: HostKeys, alias: str, key_path: Any, local: bytes, remote: bytes
) -> str:
    """Return a command line for rsync; see ``CloreClient.rsync_command``."""
    ssh = " ".join(map(_rsync_word, _ssh_words(address, pins, alias, key_path)))
    source = os.path.expanduser(os.fsdecode(local))
    if source.startswith("-") or ":" in source.partition("/")[0]:
        source = f"./{source}"  # or rsync takes it for an option, or for a host
    # No shell of the machine expands a path that rsync keeps from it, so "~" is not sent.
    target = os.fsdecode(remote_path(remote)).removeprefix("./")
    host = f"[{address['host']}]" if ":" in address["host"] else address["host"]
    words = ["rsync", "-az", "-s", "-e", ssh, source]
    return shlex.join([*words, f"{address['user']}@{host}:{target}"])


def _rsync_word(word: str) -> str:
    """Quote a word for the option -e of rsync, which knows quotes, but no backslashes."""
    if re.fullmatch(r"[\w@%+=:,./~-]+", word):
        return word
    return '"' + word.replace('"', '""') + '"'


def _ssh_words(address: dict[str, Any], pins: HostKeys, alias: str, key_path: Any) -> list[str]:
    words = ["ssh", "-p", str(address["port"])]
    if key_path is not None:
        path = _whole_path(key_path)
        # With -i, OpenSSH looks for the file both with and without expanding % signs.
        plain = _unexpanded(path) == path
        words += ["-i", path] if plain else ["-o", f"IdentityFile={_config_path(path)}"]
    if pins.path is not None and pins.of(alias) and alias.startswith("clore-order-"):
        for name, value in _pinned(pins, alias):
            words += ["-o", f"{name}={value}"]
    return words


def config_entry(
    name: str, address: dict[str, Any], pins: HostKeys, alias: str, key_path: Any
) -> str:
    """Return an entry for ``~/.ssh/config``; see ``CloreClient.ssh_config``."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(
            "name must consist of letters, digits, '_', '.' and '-', and begin with none of the "
            f"last two, not {short_repr(name)}"
        )
    lines = [
        ("HostName", address["host"]),
        ("Port", str(address["port"])),
        ("User", address["user"]),
    ]
    if key_path is not None:
        lines += [("IdentityFile", _config_path(_whole_path(key_path))), ("IdentitiesOnly", "yes")]
    lines += _pinned(pins, alias)
    lines += [("ServerAliveInterval", "15"), ("ForwardAgent", "no"), ("ForwardX11", "no")]
    return f"Host {name}\n" + "".join(f"    {key} {value}\n" for key, value in lines)


def _pinned(pins: HostKeys, alias: str) -> list[tuple[str, str]]:
    """Return options to accept only the pinned key, or else to pin the first one seen."""
    known = pins.of(alias)
    strict = ("StrictHostKeyChecking", "yes" if known else "accept-new")
    if pins.path is not None and alias.startswith("clore-order-"):
        if not known:
            pins.make_folder()
        return [("HostKeyAlias", alias), ("UserKnownHostsFile", _config_path(str(pins.path))),
                ("GlobalKnownHostsFile", "none"), ("UpdateHostKeys", "no"), strict]  # fmt: skip
    if not known:  # without a state folder, nothing is kept between two logins
        return [("UserKnownHostsFile", os.devnull), ("StrictHostKeyChecking", "accept-new")]
    kind, key = known[0]
    # Without a file for the key, OpenSSH 8.5 and newer can take it from a command.
    return [("HostKeyAlias", "clore"), ("UserKnownHostsFile", os.devnull),
            ("KnownHostsCommand", f"/bin/echo clore {kind} {key}"), strict]  # fmt: skip


def _whole_path(path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"key_path must be a path, not {short_repr(path)}")
    check_local_path("key_path", path)
    return str(os.path.abspath(os.path.expanduser(os.fspath(path))))


def _unexpanded(path: str) -> str:
    """Escape % signs, which OpenSSH would expand in a path."""
    if "\n" in path or "${" in path:
        raise ValueError(
            "key_path or state_dir: OpenSSH can't be told a path with a newline or '${': "
            f"{short_repr(path)}"
        )
    return path.replace("%", "%%")


def _config_path(path: str) -> str:
    """Escape and quote a path for a configuration file."""
    if '"' in path:
        raise ValueError(
            f"key_path or state_dir: OpenSSH can't be told a path with '\"': {short_repr(path)}"
        )
    escaped = _unexpanded(path).replace("\\\\", "\\\\\\\\")
    return f'"{escaped}"' if re.search(r"[\s'#]", escaped) else escaped
