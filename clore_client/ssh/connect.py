"""Log in to hosts, and keep the connections of one call."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clore_client.errors import SSHError, printable
from clore_client.log import logger
from clore_client.progress import ProgressEvent, Report, readable_seconds
from clore_client.ssh.keys import KeyCheck
from clore_client.ssh.openssh import HostConfig
from clore_client.ssh.transport import (
    PARAMIKO_LOGGER,
    Watchdog,
    guard_close,
    import_paramiko,
    is_connected,
    keep_alive,
    prepared_transport,
    reason,
    start_thread,
)

if TYPE_CHECKING:
    import paramiko

TOO_SLOW = "it did not finish the SSH handshake in time"
SSH_PAUSE = 2.0  # seconds between two attempts to reach an sshd that is not up yet
FIRST_CONNECT = 5.0  # seconds for the first TCP connection
ENDED_CHECK = 15.0  # seconds between two checks if the order has ended


class NotUpYetError(SSHError):
    """The sshd may respond later; used only within this module."""


class Login:
    """Check the arguments of a login to the host of an order, and log in.

    Parameters:
        address: of the host, as ``plain_address`` returns it.
        options: those of ``LOGIN_DEFAULTS``, and ``timeout``, in seconds.
        agent_key: a key of the SSH agent, or None.
        on_failure: called with the error of a failed login; may raise a better one.
    """

    def __init__(
        self, address: dict[str, Any], keys: KeyCheck, options: dict[str, Any], agent_key: Any,
        on_failure: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self.address = address
        self.where = "{user}@{host}:{port}".format(**self.address)
        self.password = options["password"]
        self.key_path = None if self.password else options["key_path"]
        passphrase = options["passphrase"]
        if passphrase is not None and options["key_path"] is None and agent_key is None:
            raise ValueError("passphrase is for the key of key_path, and there is none")
        self.timeout: float = options["timeout"]
        self.wait = options["wait"]
        self.keys = keys
        self.on_failure = on_failure
        self._paramiko = import_paramiko()
        # Read here: a key that can't be used is the caller's mistake, and no reason to wait.
        self.key = agent_key
        if self.key_path is not None:
            self.key = self._read_key(self.key_path, passphrase)
        self._config = HostConfig(self.address, options["use_ssh_config"])
        self._tried = False

    def _read_key(self, path: str, passphrase: str | None) -> Any:
        shown = printable(repr(path), 200)
        if not os.path.isfile(path):
            raise ValueError(f"key_path: there is no file {shown}")
        try:
            return self._paramiko.PKey.from_path(
                path, None if passphrase is None else passphrase.encode()
            )
        except TypeError as error:  # an encrypted key and no passphrase, or the reverse
            if passphrase is None:
                raise ValueError(f"key_path: {shown} is encrypted: give passphrase=") from error
            raise ValueError(f"passphrase: {shown} is not encrypted") from error
        except Exception as error:
            text = f"key_path: {shown} is not a private key that can be used: {reason(error)}"
            if passphrase is not None:
                text = f"passphrase is not the right one for {shown}, or {text}"
            raise ValueError(text) from error

    def open(
        self, report: Report | None = None, first: Callable[[], Any] | None = None
    ) -> paramiko.SSHClient:
        """Log in; retry until ``wait`` is over while the sshd is not up yet.

        Parameters:
            report: gets the progress.
            first: the first attempt, in place of :meth:`once`.
        """
        started = next_check = time.monotonic()
        while True:
            try:
                attempt, first = first or self.once, None
                ssh = attempt()
                if report is not None:
                    report(ProgressEvent("ssh", time.monotonic() - started, "sshd up"))
                return ssh
            except NotUpYetError as error:
                now = time.monotonic()
                remaining = started + self.wait - now
                if remaining <= 0:
                    late = SSHError(f"no SSH at {self.where} within {self.wait:g}s: {error}")
                    late.reason = "unreachable"
                    self.on_failure(late)
                    raise late from error.__cause__
                if now >= next_check:
                    next_check = now + ENDED_CHECK
                    self.on_failure(error)
                logger.debug("no SSH at %s yet: %s", self.where, error)
                if report is not None:
                    text = f"no sshd yet, {readable_seconds(now - started)}: {error}"
                    report(ProgressEvent("ssh", now - started, text))
                time.sleep(min(SSH_PAUSE, remaining))
            except SSHError as error:
                self.on_failure(error)
                raise

    def once(self) -> paramiko.SSHClient:
        """Try once to log in, within ``timeout`` seconds for all steps."""
        ssh = self._paramiko.SSHClient()
        ssh.set_log_channel(PARAMIKO_LOGGER)
        ssh.set_missing_host_key_policy(self.keys)
        try:
            self._log_in(ssh)
            keep_alive(ssh.get_transport())
        except BaseException:
            _break_off(ssh)
            ssh.close()
            raise
        return ssh  # type: ignore[no-any-return]

    def _log_in(self, ssh: Any) -> None:
        with Watchdog() as watchdog, watchdog.limit(self.timeout, lambda: _break_off(ssh)) as limit:
            try:
                self._connect(ssh)
                if not ssh.get_transport().is_authenticated():  # paramiko returns if it is partial
                    raise self._paramiko.ssh_exception.PartialAuthentication([])
                self.keys.remember(ssh.get_transport().get_remote_server_key())
            except SSHError:
                raise
            except Exception as error:
                raise self._failure(ssh, error, limit.expired) from error

    def _connect(self, ssh: Any) -> None:
        plain = self.password is None and self.key is None
        hops: list[Any] = []
        try:
            ssh.connect(
                self.address["host"], self.address["port"], self.address["user"],
                password=self.password, pkey=self.key, allow_agent=plain, look_for_keys=plain,
                key_filename=self._config.identities or None if plain else None,
                timeout=self._connect_timeout(), banner_timeout=self.timeout,
                auth_timeout=self.timeout, channel_timeout=self.timeout,
                sock=self._config.connect_jump_hosts(hops, self.timeout),
                transport_factory=functools.partial(self._transport, hops),
            )  # fmt: skip
        except BaseException:
            for hop in hops:
                hop.close()
            raise

    def _connect_timeout(self) -> float:
        """Return the TCP timeout. The first is short, so that the order can be checked early."""
        first, self._tried = not self._tried, True
        return min(self.timeout, FIRST_CONNECT) if first and self.wait else self.timeout

    def _transport(self, hops: list[Any], sock: Any, **options: Any) -> Any:
        transport = prepared_transport(sock, options, self.timeout, self.keys.wanted_types)
        transport.auth_interactive_dumb = self._refuse_questions
        guard_close(transport, hops)
        return transport

    def _refuse_questions(self, *_: Any) -> None:
        # paramiko would print the host's text, and read the answer from the terminal.
        raise self._paramiko.ssh_exception.PartialAuthentication(
            ["keyboard-interactive or password"]
        )

    def _failure(self, ssh: Any, error: Exception, late: bool) -> SSHError:
        """Return the error for a failed login: ``NotUpYetError`` where a retry may work."""
        transport = ssh.get_transport()
        keys_exchanged = transport is not None and bool(transport.initial_kex_done)
        text = reason(error)
        lower = text.lower()
        # paramiko's text for a connection that was closed, or was too slow.
        no_session = "existing session" in lower
        # With too many keys, the host closes the connection.
        refused = isinstance(error, self._paramiko.AuthenticationException) or (
            keys_exchanged and no_session
        )
        if (late or no_session) and not keys_exchanged:
            return NotUpYetError(TOO_SLOW)
        if late or (refused and "timeout" in lower):
            return SSHError(f"{self.where} did not answer the login within {self.timeout:g}s")
        if refused:
            failure = SSHError(self._refusal(ssh, error))
            failure.reason = "refused"
            return failure
        if isinstance(error, socket.gaierror):
            return NotUpYetError(f"the host name is not known ({text})")
        if isinstance(error, EOFError):
            return NotUpYetError("it closed the connection")
        if isinstance(error, OSError) or any(part in lower for part in ("banner", "reset", "eof")):
            return NotUpYetError(text)
        if "no authentication methods" in lower:
            return SSHError(
                f"no password or key to log in to {self.where} was found: "
                "pass password= or key_path="
            )
        # An invalid message from the host can raise any exception in paramiko.
        kind = "" if isinstance(error, self._paramiko.SSHException) else f"{type(error).__name__}: "
        return SSHError(f"SSH to {self.where} failed: {kind}{text}")

    def _refusal(self, ssh: Any, error: BaseException) -> str:
        """Describe what the host refused, and what it accepts."""
        if self.password is not None:
            what = "password"
        elif self.key is not None:
            where = printable(repr(self.key_path), 200) if self.key_path else "of the SSH agent"
            what = f"key {where} ({self.key.fingerprint})"
        else:
            what = "keys of the SSH agent and of ~/.ssh"
        methods = getattr(error, "allowed_types", None)
        if not methods and not is_connected(ssh):
            return (
                f"{self.where} closed the connection during the login with the {what}: it was "
                "refused, perhaps after too many attempts"
            )
        accepted = printable(", ".join(map(str, methods or ())), 200)
        if isinstance(error, self._paramiko.ssh_exception.PartialAuthentication):
            return (
                f"{self.where} accepted the {what}, but also requires: "
                f"{accepted or 'another login method'}"
            )
        accepts = f"; it accepts: {accepted}" if accepted else ""
        return (
            f"{self.where} refused the login with the {what}{accepts}. "
            "Was the order made with another password or key?"
        )


def _break_off(ssh: Any) -> None:
    transport = ssh.get_transport()
    if transport is not None:
        transport.close()
        transport.packetizer.complete_handshake()  # ends paramiko's timer


class ConnectionPool:
    """Keep the connections of one call: the caller's own, or up to ``size`` new ones.

    Parameters:
        login: for new connections; None if ``ssh`` is used.
        on_failure: called with an error if a connection broke; may raise a better one.
        ssh: the caller's connection.
        size: the highest number of connections.
        eager: open all of them now, at the same time; else each one when it is needed.
    """

    def __init__(
        self, login: Login | None, on_failure: Callable[[BaseException], None], ssh: Any = None,
        size: int = 1, eager: bool = True,
    ) -> None:  # fmt: skip
        self.size = size
        self._eager = eager
        self._login: Any = login
        self._on_failure = on_failure
        self._opened: list[Any] = [ssh] + [None] * (self.size - 1)
        self._threads: dict[int, threading.Thread] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def __enter__(self) -> ConnectionPool:
        if self._login is not None:
            for number in range(1, self.size if self._eager else 1):
                self._threads[number] = start_thread("login", self._open, number)
            try:
                self._opened[0] = self._login.open(first=self._first)
            except BaseException:
                self._close()
                raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        lost = not is_connected(self.ssh)
        self._close()
        if lost and isinstance(error, SSHError):
            self._on_failure(error)

    @property
    def ssh(self) -> Any:
        """Return the first connection."""
        return self._opened[0]

    @property
    def age(self) -> float:
        """Return the seconds since the call began."""
        return time.monotonic() - self._started

    @property
    def round_trip(self) -> float:
        """Return the seconds of a round trip, measured during the login; 1.0 if not known."""
        transport = self.ssh.get_transport()
        return float(getattr(getattr(transport, "packetizer", None), "round_trip", 1.0))

    def get(self, number: int) -> Any:
        """Wait for a connection and return it, or None if the host refuses so many."""
        if number:
            with self._lock:
                if number not in self._threads:
                    self._threads[number] = start_thread("login", self._open, number)
            self._threads[number].join()
        return self._opened[number]

    def break_off(self) -> None:
        """Close every connection, which also ends calls that hang."""
        for ssh in self._opened:
            if ssh is not None:
                ssh.close()

    def _first(self) -> Any:
        """Open the first connection, or take another one if the host allows only one."""
        try:
            return self._login.once()
        except NotUpYetError:
            for number, thread in self._threads.items():
                thread.join()
                if (ssh := self._opened[number]) is not None:
                    self._opened[number] = None
                    return ssh
            raise

    def _open(self, number: int) -> None:
        try:
            self._opened[number] = self._login.once()
        except Exception as error:
            logger.debug("a further connection was refused: %s", error)

    def _close(self) -> None:
        for thread in self._threads.values():
            thread.join()
        if self._login is not None:
            self.break_off()
