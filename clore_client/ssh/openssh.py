"""Read addresses and OpenSSH's configuration; write command lines and entries for OpenSSH."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clore_client.errors import SSHError
from clore_client.models.order import Order, plain_host, plain_user
from clore_client.ssh.transfer.scripts import remote_path
from clore_client.ssh.transport import PARAMIKO_LOGGER, import_paramiko, reason
from clore_client.validation import check_local_path, check_string, check_text, short_repr

if TYPE_CHECKING:
    from clore_client.ssh.keys import HostKeys

DEFAULT_USER = "root"
DEFAULT_PORT = 22
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"
_OPTION = r"(?<!\S)-([pl]) ?(\S+)"


def parse_ssh_command(order: Any) -> dict[str, Any]:
    """Read host, port and user; see ``CloreClient.parse_ssh_connection``."""
    connection = order.get("connection") if isinstance(order, Mapping) else None
    raw = connection.get("ssh") if isinstance(connection, Mapping) else None
    raw = raw if isinstance(raw, str) else ""
    host, port, user = parse_address(raw)
    return {"host": host, "port": port, "user": user if plain_user(user) else DEFAULT_USER,
            "raw": raw}  # fmt: skip


def plain_address(order: Order) -> dict[str, Any]:
    """Return the address of an order; raise unless host and user are plain names or addresses."""
    address = parse_ssh_command(order)
    user = parse_address(address["raw"])[2]
    if address["host"] and (not user or plain_user(user)):
        return address
    raise SSHError(
        f"the order has no address for SSH, or no plain one: connection.ssh is "
        f"{short_repr(address['raw'])}, status {short_repr(order.status)}; "
        "wait_for_order() returns an order that has one"
    )


def parse_address(raw: str) -> tuple[str, int, str]:
    """Return the host, or "" if it is not a plain one, the port, and the unchecked user."""
    words = raw.split()
    line = " ".join(words[1:] if words[:1] == ["ssh"] else words)
    # No other options, which could run a program here, and no command.
    found = re.fullmatch(rf"({_OPTION} )*(?P<target>[^- ]\S*)( {_OPTION})*( -p)?", line)
    if found is None:
        return "", DEFAULT_PORT, ""
    options = dict(re.findall(_OPTION, line))
    port = _port_number(options.get("p", ""))
    named, at, host = found["target"].rpartition("@")
    user = named if at else options.get("l", "")
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


class HostConfig:
    """Read the private keys and the jump hosts of a host from ``~/.ssh/config``.

    Parameters:
        address: of the host, as :func:`plain_address` returns it.
        use: whether to read the file; without it, there are no keys and no jump hosts.

    Attributes:
        identities: the files of the private keys.
    """

    def __init__(self, address: dict[str, Any], use: bool) -> None:
        self.identities: list[str] = []
        self._address = address
        self._hops: list[dict[str, Any]] = []
        path = os.path.expanduser("~/.ssh/config")
        if use and os.path.isfile(path):
            try:
                self._read(path)
            except Exception as error:
                raise ValueError(f"use_ssh_config: {path} can't be used: {error}") from error

    def _read(self, path: str) -> None:
        import getpass  # imported here, because it is slow

        config = import_paramiko().SSHConfig.from_path(path)
        entry = config.lookup(self._address["host"])
        jumps = entry.get("proxyjump", "none")
        if "proxycommand" in entry and jumps == "none":
            raise ValueError("it has a ProxyCommand, and only ProxyJump is supported")
        self.identities = _identity_files(entry)
        for jump in jumps.split(",") if jumps != "none" else ():
            name, port, user = parse_address(jump.strip().removeprefix("ssh://"))
            hop = config.lookup(name)
            self._hops.append(
                {"host": hop.get("hostname", name), "identities": _identity_files(hop),
                 "port": int(hop.get("port", port)) if port == DEFAULT_PORT else port,
                 "user": user or hop.get("user", getpass.getuser())}
            )  # fmt: skip

    def connect_jump_hosts(self, opened: list[Any], timeout: float) -> Any:
        """Log in to each jump host, and return a channel to the host, or None without jump hosts.

        Parameters:
            opened: gets the connections, so that they can be closed if something fails.
            timeout: seconds for each step.
        """
        sock = None
        for hop, target in zip(self._hops, [*self._hops[1:], self._address], strict=False):
            ssh = import_paramiko().SSHClient()
            ssh.set_log_channel(PARAMIKO_LOGGER)
            ssh.load_system_host_keys()  # the user must have accepted the jump host before
            opened.append(ssh)
            try:
                ssh.connect(
                    hop["host"], hop["port"], hop["user"], key_filename=hop["identities"] or None,
                    timeout=timeout, sock=sock,
                )  # fmt: skip
                sock = ssh.get_transport().open_channel(
                    "direct-tcpip", (target["host"], target["port"]), ("127.0.0.1", 0),
                    timeout=timeout,
                )  # fmt: skip
            except Exception as error:
                where = f"jump host {hop['host']}:{hop['port']}"
                raise SSHError(f"{where}: {reason(error)}") from error
        return sock


def _identity_files(entry: Any) -> list[str]:
    paths = map(os.path.expanduser, entry.get("identityfile", ()))
    return [path for path in paths if os.path.isfile(path)]


class OpenSSH:
    """Write command lines and configuration entries for a host.

    Parameters:
        pins: the pinned host keys.
        key_path: the file of a private key, or None.
    """

    def __init__(self, order: Order, pins: HostKeys, key_path: Any) -> None:
        self._address = plain_address(order)
        self._order_id = order.id
        self._pins = pins
        self._alias = pins.alias(order.id, self._address)
        self._key = None if key_path is None else whole_key_path(key_path)
        self._file = pins.path if order.id else None

    def terminal_line(self) -> str:
        """Return a command line; see ``CloreClient.ssh_command``."""
        return shlex.join([*self._words(), "{user}@{host}".format(**self._address)])

    def rsync_line(self, local: bytes, remote: bytes) -> str:
        """Return a command line for rsync; see ``CloreClient.rsync_command``."""
        ssh = " ".join(map(_rsync_word, self._words()))
        source = os.path.expanduser(os.fsdecode(local))
        if source.startswith("-") or ":" in source.partition("/")[0]:
            source = f"./{source}"  # or rsync takes it for an option, or for a host
        # With -s, no shell of the host expands the path, so "~" is not sent.
        target = os.fsdecode(remote_path(remote)).removeprefix("./")
        user, host = self._address["user"], self._address["host"]
        host = f"[{host}]" if ":" in host else host
        return shlex.join(["rsync", "-az", "-s", "-e", ssh, source, f"{user}@{host}:{target}"])

    def config_entry(self, name: str | None) -> str:
        """Return an entry for ``~/.ssh/config``; see ``CloreClient.ssh_config``."""
        name = name or (f"clore-{self._order_id}" if self._order_id else "clore")
        address = self._address
        lines = [("HostName", address["host"]), ("Port", str(address["port"]))]
        lines += [("User", address["user"])]
        if self._key is not None:
            lines += [("IdentityFile", _config_path(self._key)), ("IdentitiesOnly", "yes")]
        lines += self._host_key()
        lines += [("ServerAliveInterval", "15"), ("ForwardAgent", "no"), ("ForwardX11", "no")]
        return f"Host {name}\n" + "".join(f"    {key} {value}\n" for key, value in lines)

    def _words(self) -> list[str]:
        words = ["ssh", "-p", str(self._address["port"])]
        if self._key is not None:
            # With -i, OpenSSH looks for the file both with and without expanding % signs.
            plain = not re.search(r"%|\n|\$\{", self._key)
            words += ["-i", self._key] if plain else [
                "-o", f"IdentityFile={_config_path(self._key)}"
            ]  # fmt: skip
        if self._file is not None and self._pins.of(self._alias):
            for name, value in self._host_key():
                words += ["-o", f"{name}={value}"]
        return words

    def _host_key(self) -> list[tuple[str, str]]:
        """Return options to accept only the pinned key, or else to pin the first one seen."""
        known = self._pins.of(self._alias)
        strict = ("StrictHostKeyChecking", "yes" if known else "accept-new")
        if self._file is not None:
            with contextlib.suppress(OSError):  # OpenSSH will say that it can't pin a key there
                self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = _config_path(str(self._file))
            return [("HostKeyAlias", self._alias), ("UserKnownHostsFile", file),
                    ("GlobalKnownHostsFile", "none"), ("UpdateHostKeys", "no"), strict]  # fmt: skip
        if not known:  # without a state folder, nothing is kept between two logins
            return [("UserKnownHostsFile", os.devnull), strict]
        # Without a file for the key, OpenSSH 8.5 and newer can take it from a command.
        return [("HostKeyAlias", "clore"), ("UserKnownHostsFile", os.devnull),
                ("KnownHostsCommand", f"/bin/echo clore {known[0]}"), strict]  # fmt: skip


def check_plain_name(value: Any) -> str:
    """Check the name of a job, or of an entry of ``~/.ssh/config``."""
    if not re.fullmatch(PLAIN_NAME, check_string("name", value)):
        raise ValueError(
            "name must consist of at most 64 letters, digits, '_', '.' and '-', and not begin with "
            f"'.' or '-', unlike {short_repr(value)}"
        )
    return str(value)


def _rsync_word(word: str) -> str:
    """Quote a word for the option -e of rsync, which knows quotes, but no backslashes."""
    if re.fullmatch(r"[\w@%+=:,./~-]+", word):
        return word
    return '"' + word.replace('"', '""') + '"'


def whole_key_path(path: Any) -> str:
    """Check the path of a private key, and return it as an absolute path."""
    if not isinstance(path, os.PathLike):
        check_text("key_path", path)
    check_local_path("key_path", path)
    return str(os.path.abspath(os.path.expanduser(path)))


def _config_path(path: str) -> str:
    """Escape and quote a path for a configuration file."""
    if re.search(r"[\"\n]|\$\{", path):
        raise ValueError(
            "key_path or state_dir: OpenSSH can't use a path with a newline, '\"' or '${': "
            f"{short_repr(path)}"
        )
    escaped = path.replace("%", "%%").replace("\\\\", "\\\\\\\\")
    return f'"{escaped}"' if re.search(r"[\s'#]", escaped) else escaped
