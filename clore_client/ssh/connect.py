"""Log in to a rented machine. paramiko is imported when it is used, not with the package."""

from __future__ import annotations

import functools
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clore_client.errors import Secret, SSHError, printable
from clore_client.log import logger
from clore_client.progress import ProgressEvent, Report, readable_seconds
from clore_client.ssh.address import DEFAULT_PORT, parse_address, plain_address
from clore_client.ssh.transport import Watchdog, close_after, keep_alive, prepared_transport
from clore_client.validation import (
    check_bool,
    check_local_path,
    check_number,
    check_text,
    short_repr,
)

if TYPE_CHECKING:
    import paramiko

    from clore_client.ssh.keys import KeyCheck

# What may be given for a login to methods that do more than log in.
LOGIN_DEFAULTS: dict[str, Any] = {
    "password": None,
    "key_path": None,
    "passphrase": None,
    "wait": 120.0,  # seconds for an sshd to respond
    "host_key": "pin",
    "use_ssh_config": False,
}
LOGIN_OPTIONS = frozenset(LOGIN_DEFAULTS)
PARAMIKO_LOGGER = "clore_client.paramiko"
TOO_SLOW = "it did not finish the SSH handshake in time"
SSH_PAUSE = 2.0  # seconds between two tries to reach an sshd that is not up yet
FIRST_CONNECT = 5.0  # seconds for the first TCP connection
LOOK_EVERY = 15.0  # seconds between two looks if the order of that machine has ended


def import_paramiko() -> Any:
    """Import paramiko, or raise an ImportError that says what to install."""
    try:
        import paramiko
    except ImportError as error:
        raise ImportError("SSH needs paramiko: pip install paramiko scp") from error
    # It logs each failure with a traceback and the host's own words, which would be printed.
    # A handler of one's own still gets them.
    quiet = logging.getLogger(PARAMIKO_LOGGER)
    if not quiet.handlers:
        quiet.addHandler(logging.NullHandler())
        quiet.propagate = False
    return paramiko


class Login:
    """How to get into the machine of an order: everything that ``connect_ssh`` was given."""

    def __init__(
        self,
        order: Any,
        keys: KeyCheck,
        timeout: float,
        agent_key: Any,
        on_failure: Callable[[BaseException], None] | None,
        record: Callable[[str], None],
        *,
        password: str | None,
        key_path: str | os.PathLike[str] | None,
        passphrase: str | None,
        wait: float,
        use_ssh_config: bool,
    ) -> None:
        self.address = plain_address(order)
        if passphrase is not None and key_path is None and agent_key is None:
            raise ValueError("passphrase is for the key of key_path, and there is none")
        self.password = password
        self.key_path = None if key_path is None or password else os.path.expanduser(key_path)
        self.timeout = timeout
        self.wait = wait
        self.keys = keys
        self._paramiko = import_paramiko()
        # Read here: a key that can't be used is the caller's mistake, and no reason to wait.
        self.key = agent_key
        if self.key_path is not None:
            self.key = self._read_key(self.key_path, passphrase)
        self._next_look = -math.inf
        self._tried = False
        self._on_failure = on_failure or (lambda error: None)
        self._record = record
        self._hops: list[dict[str, Any]] = []
        self._identities: list[str] = []
        if use_ssh_config:
            self._read_ssh_config()

    @property
    def where(self) -> str:
        """The address, for an error."""
        return "{user}@{host}:{port}".format(**self.address)

    def _read_key(self, path: str, passphrase: str | None) -> Any:
        shown = printable(repr(path), 200)
        if not os.path.isfile(path):
            raise ValueError(f"key_path: there is no file {shown}")
        try:
            return self._paramiko.PKey.from_path(
                path, None if passphrase is None else passphrase.encode()
            )
        except TypeError as error:  # it is encrypted and there is none, or the other way round
            if passphrase is None:
                raise ValueError(f"key_path: {shown} is encrypted: give passphrase=") from error
            raise ValueError(f"passphrase: {shown} is not encrypted") from error
        except Exception as error:
            text = f"key_path: {shown} is no private key that can be used: {_short_text(error)}"
            if passphrase is not None:
                text = f"passphrase is not the one of {shown}, or {text}"
            raise ValueError(text) from error

    def _read_ssh_config(self) -> None:
        """Take ProxyJump and IdentityFile from the user's configuration of OpenSSH."""
        path = os.path.expanduser("~/.ssh/config")
        if not os.path.isfile(path):
            return
        import getpass  # imported here, because it is slow

        try:
            config = self._paramiko.SSHConfig.from_path(path)
            found = config.lookup(self.address["host"])
            jumps = found.get("proxyjump", "none")
            if "proxycommand" in found and jumps == "none":
                raise ValueError("it has a ProxyCommand, and only ProxyJump is supported")
            self._identities = identity_files(found)
            for jump in jumps.split(",") if jumps != "none" else ():
                name, port, user = parse_address(jump.strip().removeprefix("ssh://"))
                hop = config.lookup(name)
                self._hops.append(
                    {"host": hop.get("hostname", name), "identities": identity_files(hop),
                     "port": int(hop.get("port", port)) if port == DEFAULT_PORT else port,
                     "user": user or hop.get("user", getpass.getuser())}
                )  # fmt: skip
        except Exception as error:
            raise ValueError(f"use_ssh_config: {path} can't be used: {error}") from error

    def _jump(self, hops: list[Any]) -> Any:
        """Log in to each jump host; a channel to the machine through the last one."""
        sock = None
        for hop in self._hops:
            ssh = self._paramiko.SSHClient()
            ssh.set_log_channel(PARAMIKO_LOGGER)
            ssh.load_system_host_keys()  # a jump host is the user's own, and known
            hops.append(ssh)
            try:
                ssh.connect(
                    hop["host"], hop["port"], hop["user"], key_filename=hop["identities"] or None,
                    timeout=self.timeout, sock=sock,
                )  # fmt: skip
                follower = self._hops[len(hops)] if len(hops) < len(self._hops) else self.address
                sock = ssh.get_transport().open_channel(
                    "direct-tcpip", (follower["host"], follower["port"]), ("127.0.0.1", 0),
                    timeout=self.timeout,
                )  # fmt: skip
            except Exception as error:
                where = f"jump host {hop['host']}:{hop['port']}"
                raise SSHError(f"{where}: {_short_text(error)}") from error
        return sock

    def open(
        self, report: Report | None = None, first: Callable[[], Any] | None = None
    ) -> paramiko.SSHClient:
        """Log in, and try again while the sshd is not up yet, until ``wait`` is over.

        Parameters:
            report: gets the progress.
            first: the first try, in place of :meth:`once`.
        """
        started = time.monotonic()
        deadline = started + self.wait
        while True:
            try:
                attempt, first = first or self.once, None
                ssh = attempt()
                if report is not None:
                    report(ProgressEvent("ssh", time.monotonic() - started, "sshd up"))
                return ssh
            except NotUpYetError as error:
                self.explain(error)
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    late = SSHError(f"no SSH at {self.where} within {self.wait:g}s: {error}")
                    late.reason = "unreachable"
                    self._record(late.reason)
                    raise late from error.__cause__
                logger.debug("no SSH at %s yet: %s", self.where, error)
                if report is not None:
                    seconds = time.monotonic() - started
                    text = f"no sshd yet, {readable_seconds(seconds)}: {error}"
                    report(ProgressEvent("ssh", seconds, text))
                time.sleep(min(SSH_PAUSE, remaining))
            except SSHError as error:
                self.explain(error)
                raise

    def explain(self, error: BaseException) -> None:
        """Raise a better error if the login failed because the order has ended; record others."""
        now = time.monotonic()
        if isinstance(error, NotUpYetError) and now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY
        self._on_failure(error)
        self._record(getattr(error, "reason", ""))

    def once(self) -> paramiko.SSHClient:
        """Try once to log in, within ``timeout`` seconds in all."""
        limit = None
        ssh = self._paramiko.SSHClient()
        ssh.set_log_channel(PARAMIKO_LOGGER)
        ssh.set_missing_host_key_policy(self.keys)
        try:
            with (
                Watchdog() as watchdog,
                watchdog.limit(self.timeout, lambda: _break_off(ssh)) as limit,
            ):
                self._connect(ssh)
            if not ssh.get_transport().is_authenticated():  # paramiko returns for half a login
                raise self._paramiko.ssh_exception.PartialAuthentication([])
        except BaseException as error:
            failure = self._failure(ssh, error, limit is not None and limit.expired)
            _give_up(ssh)
            if failure is error:
                raise
            raise failure from error
        keep_alive(ssh.get_transport())
        try:
            self.keys.remember()
        except BaseException:
            ssh.close()
            raise
        return ssh  # type: ignore[no-any-return]

    def _connect(self, ssh: Any) -> None:
        plain = self.password is None and self.key is None
        hops: list[Any] = []
        try:
            ssh.connect(
                self.address["host"],
                port=self.address["port"],
                username=self.address["user"],
                password=self.password,
                pkey=self.key,
                timeout=self._connect_timeout(),
                banner_timeout=self.timeout,
                auth_timeout=self.timeout,
                channel_timeout=self.timeout,
                key_filename=self._identities or None if plain else None,
                allow_agent=plain,
                look_for_keys=plain,
                sock=self._jump(hops),
                transport_factory=functools.partial(self._transport, hops),
            )
        except BaseException:
            for hop in hops:
                hop.close()
            raise

    def _connect_timeout(self) -> float:
        """Return the TCP timeout; shorter for the first of several tries.

        The first failure is the moment to look if the order has ended.
        """
        first, self._tried = not self._tried, True
        return min(self.timeout, FIRST_CONNECT) if first and self.wait > 0 else self.timeout

    def _transport(self, hops: list[Any], sock: Any, **options: Any) -> Any:
        transport = prepared_transport(sock, options, self.timeout, self.keys.wanted_types)
        transport.auth_interactive_dumb = self._no_questions
        if hops:
            close_after(transport, hops)
        return transport

    def _failure(self, ssh: Any, error: BaseException, expired: bool) -> BaseException:
        """Return the error for a failed login: ``NotUpYetError`` where a later try may work."""
        transport = ssh.get_transport()
        keys_exchanged = transport is not None and bool(transport.initial_kex_done)
        refused = isinstance(error, self._paramiko.AuthenticationException)
        # With more keys than the machine has patience for, paramiko misses the connection.
        refused = refused or (keys_exchanged and "existing session" in str(error).lower())
        late = expired and isinstance(error, Exception)
        if late and not keys_exchanged:
            return NotUpYetError(TOO_SLOW)
        if late or (refused and "timeout" in str(error).lower()):
            failure = SSHError(f"{self.where} did not answer to the login within {self.timeout:g}s")
        elif refused:
            failure = self._refused(ssh, error)
        else:
            return _login_error(error, self._paramiko, self.where)
        if not late:
            failure.reason = "refused"
        return failure

    def _refused(self, ssh: Any, error: BaseException) -> SSHError:
        """Describe what was refused, and what the host accepts."""
        from clore_client.ssh.keys import fingerprint_of

        if self.password is not None:
            what = "password"
        elif self.key is not None:
            where = printable(repr(self.key_path), 200) if self.key_path else "of the SSH agent"
            what = f"key {where} ({fingerprint_of(self.key)})"
        else:
            what = "keys of the SSH agent and of ~/.ssh"
        accepted = getattr(error, "allowed_types", None)
        if not accepted and not ssh.get_transport().is_active():
            return SSHError(
                f"{self.where} closed the connection during the login with the {what}: "
                "refused, after too many tries perhaps"
            )
        accepted = accepted or self._accepted(ssh)
        takes = ", ".join(printable(str(name), 40) for name in accepted[:8])
        if isinstance(error, self._paramiko.ssh_exception.PartialAuthentication):
            return SSHError(f"{self.where} took the {what}, but wants more than that: {takes}")
        accepts = f"; it accepts: {takes}" if takes else ""
        return SSHError(
            f"{self.where} refused the login with the {what}{accepts}. "
            "Was the order made with another password or key?"
        )

    def _no_questions(self, *_: Any) -> None:
        # paramiko would print what the host says, and ask whoever sits at the terminal.
        raise self._paramiko.ssh_exception.PartialAuthentication(
            ["keyboard-interactive or password"]
        )

    def _accepted(self, ssh: Any) -> list[str]:
        # The answer to a login without anything lists the ways that there are.
        try:
            ssh.get_transport().auth_none(self.address["user"])
        except self._paramiko.BadAuthenticationType as error:
            return list(error.allowed_types)
        except Exception as error:
            logger.debug("%s does not say what it accepts: %s", self.where, error)
        return []


class NotUpYetError(SSHError):
    """An sshd may answer later; used only within this module."""


def check_connection(ssh: Any) -> Any:
    """Check a connection that the caller gave."""
    if not callable(getattr(ssh, "get_transport", None)):
        raise TypeError(f"ssh must be a paramiko.SSHClient, not {short_repr(ssh)}")
    return ssh


def check_login_options(given: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of a login, and return all of them."""
    from clore_client.ssh.keys import check_host_key

    for name in given:
        if name not in LOGIN_OPTIONS:
            raise TypeError(
                f"there is no argument {name!r}, neither here nor among those of a login: "
                f"{', '.join(sorted(LOGIN_OPTIONS))}"
            )
    options = {**LOGIN_DEFAULTS, **given}
    for name in ("key_path", "host_key"):  # not secret, and errors name them
        if isinstance(options[name], Secret):
            options[name] = str(options[name])
    check_number("wait", options["wait"], infinite=True, unit="seconds")
    for name in ("password", "passphrase"):
        if options[name] is not None:
            check_text(name, options[name], secret=True)
    if options["key_path"] is not None:
        if not isinstance(options["key_path"], os.PathLike):
            check_text("key_path", options["key_path"])
        check_local_path("key_path", options["key_path"])
    check_bool("use_ssh_config", options["use_ssh_config"])
    options["host_key"] = check_host_key(options["host_key"])
    return options


def identity_files(config: Any) -> list[str]:
    """Return the keys of an entry of a configuration that are there."""
    paths = map(os.path.expanduser, config.get("identityfile", ()))
    return [path for path in paths if os.path.isfile(path)]


def _short_text(error: BaseException) -> str:
    return printable(str(error).replace("[Errno None] ", "") or type(error).__name__, 200)


def _break_off(ssh: Any) -> None:
    transport = ssh.get_transport()
    if transport is not None:
        transport.close()


def _give_up(ssh: Any) -> None:
    transport = ssh.get_transport()
    ssh.close()
    if transport is not None:  # or paramiko's timer would live on with it
        transport.packetizer.complete_handshake()


def _login_error(error: BaseException, paramiko_module: Any, where: str) -> BaseException:
    """Return the error for a login that was not refused."""
    text = _short_text(error)
    if isinstance(error, SSHError) or not isinstance(error, Exception):
        return error
    if isinstance(error, socket.gaierror):
        return NotUpYetError(f"the host name is not known ({text})")
    if isinstance(error, (OSError, EOFError)):
        return NotUpYetError("it closed the connection" if isinstance(error, EOFError) else text)
    if not isinstance(error, paramiko_module.SSHException):
        # paramiko takes every answer for a sensible one.
        return SSHError(f"SSH to {where} failed: {type(error).__name__}: {text}")
    if "existing session" in text.lower():  # its word for a handshake that took too long
        return NotUpYetError(TOO_SLOW)
    if any(part in text.lower() for part in ("banner", "reset", "eof")):
        return NotUpYetError(text)
    if "no authentication methods" in text.lower():
        return SSHError(f"there is nothing to log in to {where} with: pass password= or key_path=")
    return SSHError(f"SSH to {where} failed: {text}")
