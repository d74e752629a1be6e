"""clore-client 0.1.0 in one file: a client for the Clore.ai GPU marketplace.

    from clore_client import CloreClient

It needs requests; connect_ssh also needs paramiko.

Made from the package clore-client 0.1.0 by
    python -I -m clore_client.single_file > clore_client.py
which, after `pip install -U clore-client`, also brings a copy up to date;
    python -I -m clore_client.single_file --check clore_client.py
tells whether that is due. Without -I, a clore_client.py in the current folder would be taken for
the package. Change the package, and not this file.

MIT License, Copyright (c) 2026 The clore-client authors; the whole text stands at the end.

Contents:
    version             The version of the package, in one place.
    log                 The one logger of the package; it has no handlers, as is due for a library.
    errors              Every error that the package raises, and the tables that choose one for an
                        answer of the API.
    files               Lock files between processes, and keep private ones in the state folder.
    pricing             The units: USD per hour and currency per day, exchange rates, and numbers
                        from strangers.
    validation          Checks of arguments: each error names the argument, its value and what is
                        allowed.
    config              Where the key and the base URL come from, and what makes them usable.
    models.record       What servers, orders and wallets have in common, and which form an answer is
                        in.
    models.order        Order: its documented form, made from the live one; telling which order is
                        the one just made.
    models.result       What came of a command or a transfer over SSH.
    models.server       Server: its documented form, made from the live one; matching and sorting by
                        price.
    models.wallet       Wallet: a currency of the account and what is in it.
    api.call            Prepare an API call: what is sent, and what may be done with it.
    api.connection      Connections that tell when a request leaves, and end an answer that takes
                        too long.
    api.rate_limit      Decide when the next request with a key may leave, for all who share the
                        key.
    api.shared_limit    Keep a rate limit in a file, for all processes of this user on this machine.
    api.limiters        Choose who keeps the rate limit: this process, this machine, or Redis.
    api.retry           What an answer, or the lack of one, means: an envelope, an error, and
                        whether to ask again.
    api.retries         Count the sends of one call, and decide when to give up.
    api.request         Make API calls: key, pace, retries, and an envelope or an error at the end.
    market.spot         Bids: from USD per hour to what the API takes, and never a number of which
                        that is not sure.
    market.market       Read the marketplace, and remember the prices and exchange rates that it
                        tells.
    orders.claims       Which order belongs to which purchase: no order is handed out twice.
    orders.account      Read the orders of an account, and remember those that this client has made
                        or seen.
    orders.limits       Check the limits that the user has set: a price per hour, and a number of
                        orders.
    orders.bid          Change the bid of a spot order.
    orders.cancel       Cancel orders until that is accepted, and confirm that they have ended.
    orders.reconcile    Find the order of a purchase whose answer named none, or never came.
    orders.create       Make an order: check it, send it once, and find the order that the API made
                        of it.
    orders.wait         Waiting until an order has a status.
    rental.client       What a rental needs of a client.
    rental.selection    Which servers rent() tries, in which order, and what each costs.
    rental.budget       What a rental costs, and when it has cost enough.
    rental.journal      Keep the journal: a small file for each intent to buy, which outlives the
                        process.
    rental.orders       The orders of one rental: what is noted of them, and what became of those in
                        doubt.
    rental.cleanup      End the orders of a rental: cancel, confirm, and settle what is in doubt.
    rental.handoff      Wait for another thread, in ways that an interrupt leaves whole.
    rental.recovery     What rentals of processes that are dead have left running.
    rental.signals      SIGTERM and SIGHUP end rentals: one handler for the process.
    rental.worker       The orders of one rental: bought, watched and ended in a thread that no
                        signal interrupts.
    rental.rental       rent(): a server found, ordered, awaited, and given back whatever happens.
    ssh.transport       paramiko's transports, made to bear what a stranger's machine may send, and
                        fast far away.
    ssh.connect         Getting into a rented machine. paramiko is imported when it is used, not
                        with the package.
    ssh.host_keys       Host keys: pinned for each order, since a host and port go to later orders
                        with another key.
    ssh.openssh         How OpenSSH is told to log in: a line for a terminal, and an entry for its
                        configuration.
    ssh.sessions        Connections for the length of one call: as many as are wanted, opened at the
                        same time.
    ssh.access          Log in to the machines of an account, each with the host key of its order.
    ssh.command_line    Build the line of a command, and cut its output into lines.
    ssh.watchdog        The end of a process on a server that may not take it well, and of a channel
                        that hangs.
    ssh.command         A command over SSH: both of its streams as they come, how it ended, and its
                        end when told so.
    ssh.remote          What runs on the machine for a transfer: one script for any POSIX shell, and
                        its answers.
    ssh.transfer        What uploads and downloads have in common: jobs, the lanes that do them, and
                        progress.
    ssh.local_files     Files that a download makes here: beside their place until they are
                        complete.
    ssh.upload          Copying files and directories to a machine: under a temporary name, renamed
                        when complete.
    ssh.download        Copying files and directories from a machine, of which nothing is believed.
    ssh.scp_wire        The wire of one scp transfer: nothing on it waits for ever, and nothing is
                        endless.
    ssh.scp_receive     The receiving end of scp, which believes nothing that the host says.
    ssh.scp_send        The sending end of scp, which leaves out what does not belong to the folder
                        that was named.
    ssh.scp             A ``scp.SCPClient`` for machines that nobody vouches for.
    ssh.tunnel          A port of this machine's loopback that leads to a port of a server, for as
                        long as a block.
    client              CloreClient: a thin method for each thing that a renter does.
"""

from __future__ import annotations

import _thread
import atexit
import base64
import codecs
import collections
import contextlib
import contextvars
import copy
import email.utils
import enum
import fnmatch
import functools
import hashlib
import hmac
import http.client
import importlib
import io
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import stat
import string
import struct
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path, PurePath
from ssl import SSLCertVerificationError
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import LocationParseError, NewConnectionError
from urllib3.poolmanager import PoolManager, ProxyManager

if TYPE_CHECKING:
    import paramiko

__all__ = [
    "ApplicationError",
    "AuthenticationError",
    "BidTooLowError",
    "BudgetExceededError",
    "CancelUnconfirmedError",
    "CloreAPIError",
    "CloreClient",
    "CloreConnectionError",
    "CloreError",
    "CommandError",
    "CommandResult",
    "CommandTimeoutError",
    "ConfigurationError",
    "CurrencyNotAllowedError",
    "DatabaseError",
    "HostKeyChangedError",
    "InsufficientBalanceError",
    "InvalidEndpointError",
    "InvalidInputError",
    "InvalidResponseError",
    "Leftover",
    "Leftovers",
    "Order",
    "OrderEndedError",
    "OrderNotFoundError",
    "OrderOutcomeUnknownError",
    "OutcomeUnknownError",
    "OutputLine",
    "RateLimitError",
    "RateUnknownError",
    "Rental",
    "RentalError",
    "SSHError",
    "Server",
    "ServerAlreadyRentedError",
    "ServerOfflineError",
    "SignalExit",
    "SpendingLimitError",
    "SpotPriceStepError",
    "SpotPriceTooSoonError",
    "TransferError",
    "Transferred",
    "WaitTimeoutError",
    "Wallet",
    "__version__",
]


# ==================================================================================================
# version
#
# The version of the package, in one place.
# ==================================================================================================


__version__ = "0.1.0"


# ==================================================================================================
# log
#
# The one logger of the package; it has no handlers, as is due for a library.
# ==================================================================================================


logger = logging.getLogger("clore_client")


# ==================================================================================================
# errors
#
# Every error that the package raises, and the tables that choose one for an answer of the API.
# ==================================================================================================


# The code table of the API reference.
ERROR_CODES: dict[int, str] = {
    1: "Database error",
    2: "Invalid input",
    3: "Invalid or missing API key",
    4: "Invalid endpoint",
    5: "Rate limit exceeded",
    6: "See error field in response",
}

# Whose values are never shown, wherever they stand. Compared in lower case.
SECRET_FIELDS = frozenset(
    {
        "api_key",
        "auth",
        "auto_login",
        "dockerhub_auth",
        "env",
        "init_token",
        "jupyter_token",
        "password",
        "ssh_key",
        "ssh_password",
        "token",
    }
)

CREATE_ORDER_CODE_1 = (
    "on create_order, code 1 has been seen for an empty wallet, for a server that was rented a "
    "moment ago, for a required_price other than the listing's, and for env values with '&', "
    "typographic quotes or emoji - and also when the order had been made: look at get_orders() "
    "before you order again"
)


class Secret(str):
    """A string whose repr does not show it: error reporters print the variables of each frame."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    @classmethod
    def of(cls, value: Any) -> Any:
        """Return a string as a secret, and anything else as it is."""
        return cls(value) if isinstance(value, str) else value


def hidden_values(env: Any) -> Any:
    """Return a dict whose strings are secrets, and anything else as it is."""
    return {k: Secret.of(v) for k, v in env.items()} if isinstance(env, dict) else env


def printable(text: str, limit: int = 2000) -> str:
    """``text`` on one line, cut at ``limit`` characters, with nothing a terminal would obey."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    if cut.isprintable():
        return cut
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut
    )


def masked(value: Any, depth: int = 20) -> Any:
    """A copy of ``value`` in which everything under a name of ``SECRET_FIELDS`` reads ``'***'``.

    What is nested deeper than ``depth`` is left out: no honest answer is.
    """
    if not isinstance(value, (dict, list, tuple)):
        return value
    if not depth:
        return "..."
    if isinstance(value, dict):
        return {
            k: "***" if str(k).lower() in SECRET_FIELDS and v else masked(v, depth - 1)
            for k, v in value.items()
        }
    return [masked(v, depth - 1) for v in value]


def without(text: str, secrets: tuple[str, ...]) -> str:
    """``text`` with each of the ``secrets`` replaced: an answer may repeat what it was sent."""
    for secret in secrets:
        # As it is, and as it reads within JSON or within the repr of a string.
        for spelling in (secret, json.dumps(secret)[1:-1], repr(str(secret))[1:-1]):
            text = text.replace(spelling, "***")
    return text


def _scrubbed(value: Any, secrets: tuple[str, ...], depth: int = 20) -> Any:
    """``value`` with the ``secrets`` replaced in all its strings."""
    if isinstance(value, str):
        return without(value, secrets)
    if isinstance(value, dict) and depth:
        return {k: _scrubbed(v, secrets, depth - 1) for k, v in value.items()}
    if isinstance(value, list) and depth:
        return [_scrubbed(v, secrets, depth - 1) for v in value]
    return value


class CloreError(Exception):
    """The parent of every error of this package.

    Attributes:
        retryable: whether the same call may succeed later, and may be made again without harm.
        retry_after: seconds after which that makes sense, or None where nobody said.
        sends: how many times the request was sent before this error.
    """

    retryable: bool = False
    retry_after: float | None = None
    sends: int = 1
    # When the last of them left, by time.monotonic(); None when nothing left.
    sent_at: float | None = None
    # Kept out of pickles and copies, as they hold what was sent.
    _private: tuple[str, ...] = ()

    def __init__(self, message: str = "") -> None:
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k not in self._private}
        return (_restored, (type(self), self.args, state))


def _restored(cls: type[CloreError], args: tuple[Any, ...], state: dict[str, Any]) -> CloreError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class ConfigurationError(CloreError, ValueError):
    """A base URL, a key or a settings file that can't be used; nothing was sent."""


class CloreConnectionError(CloreError):
    """No answer came: no connection, a timeout, a connection that broke."""

    retryable = True


class OutcomeUnknownError(CloreError):
    """A request that changes something may or may not have been carried out.

    It is not sent again, since twice would do harm. Look at the state of the account first.

    Attributes:
        endpoint: the path that was called.
    """

    def __init__(self, message: str, *, endpoint: str = "") -> None:
        super().__init__(message)
        self.endpoint = endpoint


class OrderOutcomeUnknownError(OutcomeUnknownError):
    """An order may or may not have been made, or it can't be told which one is ours.

    Attributes:
        server_id: the server that was to be rented.
        order_ids: the orders that it could be; empty where none was seen.
        credentials: what was sent to get into the machine: ``ssh_password``, ``ssh_key``,
            ``jupyter_token``. In no text, and not in a pickle of this error.
    """

    _private = ("credentials",)

    def __init__(
        self,
        message: str,
        *,
        endpoint: str = "/v1/create_order",
        server_id: int | None = None,
        order_ids: tuple[int, ...] = (),
        credentials: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, endpoint=endpoint)
        self.server_id = server_id
        self.order_ids = order_ids
        self.credentials = credentials or {}

    def __getattr__(self, name: str) -> Any:
        if name == "credentials":  # an error that was pickled or copied
            return {}
        raise AttributeError(name)


class OrderNotFoundError(CloreError):
    """No order of the account has this id.

    Attributes:
        order_id: the id that was asked for.
    """

    def __init__(self, message: str, *, order_id: int | None = None) -> None:
        super().__init__(message)
        self.order_id = order_id


class CancelUnconfirmedError(CloreError):
    """An order could not be cancelled, or is not confirmed to have ended: cancel it again.

    Attributes:
        order_id: the order, or the first of several.
        order_ids: all of them.
    """

    retryable = True

    def __init__(self, message: str, *, order_ids: tuple[int, ...]) -> None:
        super().__init__(message)
        self.order_ids = order_ids
        self.order_id = order_ids[0]


class SpendingLimitError(CloreError):
    """A purchase that ``max_usd_per_hour`` or ``max_active_orders`` does not allow; not sent."""


class OrderEndedError(CloreError):
    """An order ended while it was awaited.

    Attributes:
        order_id, status: which order, and how it ended.
        order: the order as it was last seen.
    """

    def __init__(self, message: str, *, order_id: int, status: str, order: Any = None) -> None:
        super().__init__(message)
        self.order_id = order_id
        self.status = status
        self.order = order


class WaitTimeoutError(CloreError, TimeoutError):
    """An order did not reach the awaited status in time. It may still be running, and cost money.

    Attributes:
        order_id: which order.
        order: the order as it was last seen, or None when it never showed up.
        reason: ``"never showed up"`` or ``"still creating"`` (or another status).
    """

    def __init__(self, message: str, *, order_id: int, order: Any = None) -> None:
        super().__init__(message)
        self.order_id = order_id
        self.order = order
        self.reason = "never showed up" if order is None else f"still {order.get('status')}"


class RateUnknownError(CloreError):
    """No exchange rate is at hand, or the API's form is not known, so nothing was bid."""

    retryable = True


class SSHError(CloreError):
    """A login over SSH was not possible."""


class RentalError(CloreError):
    """``rent()`` found no host that worked, or a rental was used in a way that can't be.

    Attributes:
        tried: (server id, why not) for each host that was tried.
    """

    def __init__(self, message: str, *, tried: tuple[tuple[int, str], ...] = ()) -> None:
        super().__init__(message)
        self.tried = tried


class BudgetExceededError(CloreError):
    """A rental was ended because its ``max_hours`` or ``max_cost_usd`` was reached.

    Attributes:
        order_id: the order that was ended.
        hours, cost_usd: how long it ran, and what it cost.
    """

    def __init__(
        self, message: str, *, order_id: int | None, hours: float, cost_usd: float
    ) -> None:
        super().__init__(message)
        self.order_id = order_id
        self.hours = hours
        self.cost_usd = cost_usd


class CloreAPIError(CloreError):
    """The API answered, and the answer is an error.

    Attributes:
        code: the ``code`` of the envelope; -1 where there is none.
        error: its ``error`` field as text, or None.
        response: the decoded envelope, or ``{}``.
        http_status: the status of the answer; None when nothing was sent.
        endpoint: the path that was called.
        hint: what usually causes this, or None.
    """

    def __init__(
        self,
        code: int = -1,
        error: str | None = None,
        response: dict[str, Any] | None = None,
        *,
        http_status: int | None = None,
        endpoint: str = "",
        hint: str | None = None,
        retryable: bool | None = None,
        secrets: tuple[str, ...] = (),
    ) -> None:
        self.code = code
        self.error = None if error is None else without(error, secrets)
        self.response: dict[str, Any] = _scrubbed(response or {}, secrets)
        self.http_status = http_status
        self.endpoint = endpoint
        self.hint = hint
        if retryable is not None:
            self.retryable = retryable
        text = self.error or ERROR_CODES.get(code) or f"Unknown error (code {code})"
        envelope = without(repr(masked(self.response)), secrets)
        message = f"Clore API Error {code}: {printable(text)} | response={printable(envelope)}"
        super().__init__(f"{message}\nhint: {hint}" if hint else message)


class DatabaseError(CloreAPIError):
    """Code 1. Ambiguous where something was to be bought: the order may have been made."""

    retryable = True


class InvalidInputError(CloreAPIError):
    """Code 2: the API did not understand the request."""


class AuthenticationError(CloreAPIError):
    """Code 3: the API key is missing or not accepted."""


class InvalidEndpointError(CloreAPIError):
    """Code 4: there is no such endpoint."""


class RateLimitError(CloreAPIError):
    """Code 5, or HTTP 429: too many requests with this key."""

    retryable = True


class ApplicationError(CloreAPIError):
    """Code 6: the request was understood and refused; ``error`` says why."""


class InsufficientBalanceError(ApplicationError):
    """The wallet does not hold enough of the currency."""


class ServerAlreadyRentedError(ApplicationError):
    """Somebody has rented the server."""


class ServerOfflineError(ApplicationError):
    """The server is not connected."""


class BidTooLowError(ApplicationError):
    """The bid is under what the host takes."""


class CurrencyNotAllowedError(ApplicationError):
    """The host does not take this currency."""


class SpotPriceStepError(ApplicationError):
    """The bid was to change by more than one step allows.

    Attributes:
        max_step: the largest step, in the order's currency per day, or None.
    """

    max_step: float | None = None


class SpotPriceTooSoonError(ApplicationError):
    """A bid may be lowered once in 600 seconds; ``retry_after`` says when again."""

    retryable = True


class InvalidResponseError(CloreAPIError):
    """What came back is no answer of the API: HTML, broken JSON, no ``code``, no list."""


ERROR_CLASSES: dict[int, type[CloreAPIError]] = {
    1: DatabaseError,
    2: InvalidInputError,
    3: AuthenticationError,
    4: InvalidEndpointError,
    5: RateLimitError,
    6: ApplicationError,
}

# The ``error`` texts seen on the live API with code 6, with "-" and "_" taken for the same.
ERROR_TEXTS: dict[str, type[ApplicationError]] = {
    "not_enough_balance": InsufficientBalanceError,
    "server_already_rented": ServerAlreadyRentedError,
    "server_offline": ServerOfflineError,
    "too_low_price": BidTooLowError,
    "currency_not_allowed": CurrencyNotAllowedError,
    "exceeded_max_step": SpotPriceStepError,
    "can_lower_every_600_seconds": SpotPriceTooSoonError,
}


def error_text(envelope: dict[str, Any]) -> str | None:
    """The ``error`` field of an envelope as text, or None."""
    raw = envelope.get("error")
    return raw if isinstance(raw, str) or raw is None else repr(raw)


def api_error(
    envelope: dict[str, Any],
    *,
    http_status: int,
    endpoint: str,
    hint: str | None = None,
    retryable: bool | None = None,
    secrets: tuple[str, ...] = (),
) -> CloreAPIError:
    """The error for an envelope whose ``code`` is an integer other than 0.

    Parameters:
        envelope: the decoded answer.
        http_status: its HTTP status.
        endpoint: the path that was called.
        hint: added to the text on a line of its own.
        retryable: overrides the class's own word.
        secrets: strings that must not appear in the text.
    """
    code = envelope["code"]
    text = error_text(envelope)
    cls = ERROR_CLASSES.get(code, CloreAPIError)
    if cls is ApplicationError and text:
        cls = ERROR_TEXTS.get(text.strip().lower().replace("-", "_"), ApplicationError)
    error = cls(
        code,
        text,
        envelope,
        http_status=http_status,
        endpoint=endpoint,
        hint=hint,
        retryable=retryable,
        secrets=secrets,
    )
    if isinstance(error, SpotPriceStepError):
        error.max_step = _figure(envelope.get("max_step"))
    elif isinstance(error, SpotPriceTooSoonError):
        error.retry_after = _figure(envelope.get("time_to_lowering"))
    return error


def _figure(value: Any) -> float | None:
    # The comparison is False for NaN, which JSON as Python reads it may hold.
    return float(value) if type(value) in (int, float) and abs(value) < 1e12 else None


SHOWN_OF_STDERR = 500  # characters of its end that an error shows


class HostKeyChangedError(SSHError):
    """A machine shows another host key than it did before for the same order.

    Either its container was started anew, or something else answers in its place. Nothing was
    sent to it.

    Attributes:
        order_id: of the order, or None where the record names none.
        expected, found: fingerprints, as ``"SHA256:..."``.
    """

    def __init__(
        self, message: str, *, order_id: int | None = None, expected: str = "", found: str = ""
    ) -> None:
        super().__init__(message)
        self.order_id = order_id
        self.expected = expected
        self.found = found


class CommandError(SSHError):
    """A command ended with another exit code than 0, and ``check`` was on.

    Attributes:
        result: the :class:`CommandResult`.
    """

    def __init__(self, result: CommandResult) -> None:
        how = f"exit code {result.exit_code}" if result.exit_code >= 0 else "a signal"
        super().__init__(f"{printable(result.command, 200)} ended with {how}{_tail(result.stderr)}")
        self.result = result

    def __reduce__(self) -> tuple[type[CommandError], tuple[CommandResult]]:
        return (type(self), (self.result,))


class CommandTimeoutError(SSHError, TimeoutError):
    """A command did not end in time, and was ended.

    Attributes:
        command: the line that ran.
        timeout: seconds.
        stdout, stderr: what it had written until then.
    """

    def __init__(self, command: str, timeout: float, stdout: str = "", stderr: str = "") -> None:
        super().__init__(
            f"{printable(command, 200)} did not end within {timeout:g}s, and was ended"
            f"{_tail(stderr)}"
        )
        self.command = command
        self.timeout = timeout
        self.stdout = stdout
        self.stderr = stderr

    def __reduce__(self) -> tuple[type[CommandTimeoutError], tuple[str, float, str, str]]:
        return (type(self), (self.command, self.timeout, self.stdout, self.stderr))


class TransferError(SSHError):
    """A file was not transferred, or not whole; what stood in its place is as it was.

    Attributes:
        name: of the file, as the caller named it or relative to the folder that was named.
        done, total: bytes; ``total`` is None where it is not known.
    """

    def __init__(
        self, message: str, *, name: str = "", done: int = 0, total: int | None = None
    ) -> None:
        super().__init__(message)
        self.name = name
        self.done = done
        self.total = total


def _tail(text: str) -> str:
    lines = text.strip()[-SHOWN_OF_STDERR:].splitlines()
    return "".join(f"\n  {printable(line, SHOWN_OF_STDERR)}" for line in lines)


# ==================================================================================================
# files
#
# Lock files between processes, and keep private ones in the state folder.
# ==================================================================================================


LOCK_AT = 1 << 30  # where Windows locks: what is locked there can't be read


def lock_file(handle: int, patience: float = 0.0) -> bool:
    """Lock an open file until it is closed or unlocked; return whether that worked.

    Parameters:
        handle: of a file that is open for writing: some systems lock no other.
        patience: seconds to wait for another process that holds it.

    Raises:
        OSError: files can't be locked here.
    """
    deadline = time.monotonic() + patience
    while not _try_to_lock(handle):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def _try_to_lock(handle: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, LOCK_AT, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock_file(handle: int) -> None:
    """Unlock a file that :func:`lock_file` has locked."""
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, LOCK_AT, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)


def open_private(path: Path) -> int:
    """Open a small file of this user's for reading and writing, and make it where it is missing.

    Raises:
        OSError: that is not possible, or it is no regular file of this user.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags, 0o600)
    about = os.fstat(handle)
    foreign = hasattr(os, "geteuid") and about.st_uid != os.geteuid()
    if foreign or not stat.S_ISREG(about.st_mode):
        os.close(handle)
        raise PermissionError(f"{path} is not a file of this user")
    return handle


# ==================================================================================================
# pricing
#
# The units: USD per hour and currency per day, exchange rates, and numbers from strangers.
# ==================================================================================================


HOURS_PER_DAY = 24.0
RATE_MAX_AGE = 300.0  # seconds that a rate may be old when a bid is converted with it

# The wire's names, and what people call them.
CURRENCIES: dict[str, str] = {
    "bitcoin": "bitcoin",
    "btc": "bitcoin",
    "clore-blockchain": "CLORE-Blockchain",
    "clore": "CLORE-Blockchain",
    "usd-blockchain": "USD-Blockchain",
    "usd": "USD-Blockchain",
}


def finite(value: Any) -> float | None:
    """``value`` as a float when it is a finite number and no bool; else None."""
    if type(value) is float:  # mostly, and this runs for thousands of servers
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def positive(value: Any) -> float | None:
    """``value`` as a float when it is a finite number above 0: what counts as a price."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def per_hour(per_day: Any) -> Any:
    """A price per day as one per hour; what is no number comes back as it is."""
    number = finite(per_day)
    return per_day if number is None else number / HOURS_PER_DAY


def wire_currency(name: str) -> str | None:
    """The wire's name for ``name`` (``"BTC"``, ``"clore"``, ``"USD-Blockchain"``), or None."""
    return CURRENCIES.get(name.strip().lower())


def bid_per_day(usd_per_hour: float, usd_rate: float) -> float:
    """A bid in USD per hour as currency per day.

    Parameters:
        usd_per_hour: the bid.
        usd_rate: USD for one unit of the currency.
    """
    return usd_per_hour * HOURS_PER_DAY / usd_rate


class RateBook:
    """The exchange rates of one API, as it last told them: USD for one unit of a currency."""

    def __init__(self) -> None:
        # One tuple, replaced as a whole: threads that read it need no lock.
        self._told: tuple[dict[str, float], float] = ({}, -math.inf)

    def tell(self, rates: Any, *, firm: bool = True) -> None:
        """Remember ``rates``, a mapping of wire names to USD; whatever is no price is dropped.

        Parameters:
            rates: what the API sent.
            firm: whether bids may be converted with them; if not, they serve for display.
        """
        if not isinstance(rates, dict):
            return
        good = {name: rate for name, value in rates.items() if (rate := positive(value))}
        known, told_at = self._told
        if firm and good:
            self._told = (good, time.monotonic())
        elif good and not self.fresh():
            self._told = ({**known, **good}, told_at)

    def fresh(self) -> dict[str, float]:
        """The rates that a bid may be converted with: at most five minutes old, else none."""
        rates, told_at = self._told
        return rates if time.monotonic() - told_at <= RATE_MAX_AGE else {}

    def usd(self, amount: Any, currency: Any) -> float | None:
        """``amount`` of ``currency`` in USD at the rate last told, or None. For display."""
        number = finite(amount)
        if number is None or not isinstance(currency, str):
            return None
        name = wire_currency(currency) or currency
        rate = 1.0 if name == "USD-Blockchain" else self._told[0].get(name)
        return None if rate is None else number * rate


# ==================================================================================================
# validation
#
# Checks of arguments: each error names the argument, its value and what is allowed.
# ==================================================================================================


Timeout = float | tuple[float | None, float | None] | None

_ENV_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
# Seen on the live API: with these in an env value, create_order answers code 1.
_CHOKED_ON = "[&\u2018-\u201f\u2039\u203a\u00ab\u00bb\U0001f000-\U0001faff\u2600-\u27bf]"
_HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEADER_VALUE = r"(?!\s)[\t\x20-\x7e\x80-\xff]*"
LONGEST_INTERVAL = 86_400.0  # seconds
LONGEST_TIMEOUT = 1e9
MAX_ID_DIGITS = 18
MAX_PATH = 4095  # bytes of a local path
MAX_PATH_PART = 255  # bytes of one name in it
MAX_PASSWORD = 32
MAX_TOKEN = 32
MAX_SSH_KEY = 3072
MAX_ENV_NAME = 128
MAX_ENV_VALUE = 1536


def short_repr(value: Any) -> str:
    """Return a value on one short line, for an error."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or a class with a broken __repr__
        text = f"<{type(value).__name__} without a text>"
    return printable(text, 80)


def check_id(name: str, value: Any) -> int:
    """A positive integer, or its digits."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value.strip()):
        value = int(value)
    if isinstance(value, Mapping):
        raise TypeError(f"{name} must be a positive integer, not the whole record: pass its .id")
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{name} must be a positive integer, not {short_repr(value)}")
    if isinstance(value, str) or not 1 <= value < 10**MAX_ID_DIGITS:
        raise ValueError(
            f"{name} must be a positive integer of at most {MAX_ID_DIGITS} digits, "
            f"not {short_repr(value)}"
        )
    return value


def check_ids(name: str, values: Any) -> list[int]:
    """Several ids; a single one or a string is most likely a slip."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of order ids, not {short_repr(values)}")
    return [check_id(f"{name}[{i}]", value) for i, value in enumerate(values)]


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = 0.0,
    above: bool = False,
    maximum: float = math.inf,
    infinite: bool = False,
    unit: str = "",
) -> float:
    """A number from ``minimum`` (``above`` it where told) to ``maximum``; never NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number{unit and ' of ' + unit}, not {short_repr(value)}")
    low = value <= minimum if above else value < minimum
    huge = isinstance(value, int) and abs(value) > 10**300  # beyond a float
    if huge or value != value or low or value > maximum or (value == math.inf and not infinite):
        allowed = f"{'above' if above else 'at least'} {minimum:g}"
        allowed += "" if maximum == math.inf else f" and at most {maximum:g}"
        allowed += "" if infinite or maximum != math.inf else " and finite"
        raise ValueError(
            f"{name} must be {allowed}{unit and ' (' + unit + ')'}, not {short_repr(value)}"
        )
    return value


def check_count(name: str, value: Any, *, minimum: int = 0) -> int:
    """Check a whole number, at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {short_repr(value)}")
    return int(check_number(name, value, minimum=minimum))


def check_interval(name: str, value: Any) -> float:
    """Seconds between two things, at most a day: time.sleep() has a limit."""
    return check_number(name, value, maximum=LONGEST_INTERVAL, unit="seconds")


def check_bool(name: str, value: Any) -> bool:
    """True or False; a string like ``"false"`` would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {short_repr(value)}")
    return value


def check_local_path(name: str, path: str | bytes | os.PathLike[Any]) -> None:
    """Refuse a path that no file system takes."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a character that no path may have") from None
    if b"\0" in encoded:
        raise ValueError(f"{name} must not hold a NUL")
    longest_part = max(map(len, encoded.split(b"/")))
    if len(encoded) > MAX_PATH or longest_part > MAX_PATH_PART:
        raise ValueError(
            f"{name} is too long: it has {len(encoded)} bytes, {longest_part} of them in one name; "
            f"{MAX_PATH} and {MAX_PATH_PART} are allowed"
        )


def check_callback(name: str, value: Any, arguments: int) -> None:
    """Check a function that is called with so many arguments; None is none."""
    if value is None:
        return
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {short_repr(value)}")
    import inspect  # for callers that give one, and not cheap

    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):  # a builtin that does not tell
        return
    try:
        signature.bind(*[None] * arguments)
    except TypeError:
        one = "one argument" if arguments == 1 else f"{arguments} arguments"
        raise TypeError(f"{name} must be callable with {one}, not {short_repr(value)}") from None


def check_string(name: str, value: Any) -> str:
    """Check a string, which may be empty."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {short_repr(value)}")
    return value


def check_text(name: str, value: Any, *, secret: bool = False) -> str:
    """A string that is not empty; a ``secret`` one is not shown."""
    if not isinstance(value, str):
        shown = type(value).__name__ if secret else short_repr(value)
        raise TypeError(f"{name} must be a string, not {shown}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty")
    return value


def check_headers(name: str, value: Any) -> dict[str, Any]:
    """Check HTTP headers; None as a value leaves a header out. Values are never shown."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of strings, not {type(value).__name__}")
    for header, text in value.items():
        if not isinstance(header, str):
            raise TypeError(f"{name}: a header's name must be a string, not {short_repr(header)}")
        if not re.fullmatch(_HEADER_NAME, header):
            raise ValueError(f"{name}: not the name of a header: {short_repr(header)}")
        if text is None or header.lower() == "auth":  # the key is checked where it is used
            continue
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"{name}[{header!r}] must be a string, not {type(text).__name__}")
        shape = text if isinstance(text, str) else text.decode("latin-1")
        if not re.fullmatch(_HEADER_VALUE, shape):
            raise ValueError(f"{name}[{header!r}] has a character that no header may have")
    return dict(value)


def check_timeout(name: str, value: Any) -> Timeout:
    """Seconds, or requests' ``(connect, read)`` pair; None waits for ever, as in requests."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(
                f"{name} must be seconds or a (connect, read) pair, not {short_repr(value)}"
            )
        parts = [
            None if v is None else _check_socket_timeout(f"{name}[{i}]", v)
            for i, v in enumerate(value)
        ]
        return (parts[0], parts[1])
    return None if value is None else _check_socket_timeout(name, value)


def shortened(timeout: Timeout, longest: float) -> Timeout:
    """A timeout that waits for nothing longer than ``longest`` seconds."""
    if isinstance(timeout, tuple):
        connect, read = (longest if part is None else min(part, longest) for part in timeout)
        return connect, read
    return longest if timeout is None else min(timeout, longest)


def longest_part(timeout: Timeout) -> float | None:
    """Return the longer of the connect and the read timeout; None where one waits for ever."""
    parts = timeout if isinstance(timeout, tuple) else (timeout, timeout)
    return None if None in parts else max(part for part in parts if part is not None)


def _check_socket_timeout(name: str, value: Any) -> float:
    # Sockets take no more than what the system's clock can count.
    return check_number(name, value, above=True, maximum=LONGEST_TIMEOUT, unit="seconds")


def check_currency(name: str, value: Any) -> str:
    """The wire's name for a currency, from that name or ``BTC``, ``CLORE``, ``USD``, any case."""
    found = wire_currency(check_text(name, value))
    if found is None:
        allowed = ", ".join(sorted({*CURRENCIES.values()})) + ", BTC, CLORE or USD"
        raise ValueError(f"{name} must be one of {allowed}, not {short_repr(value)}")
    return found


def check_order_type(name: str, value: Any) -> str:
    """``"on-demand"`` or ``"spot"``."""
    if value not in ("on-demand", "spot"):
        raise ValueError(f"{name} must be 'on-demand' or 'spot', not {short_repr(value)}")
    return str(value)


def check_ports(name: str, value: Any) -> dict[str, str]:
    """Container port -> ``"tcp"`` or ``"http"``, as the API wants it."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict like {{'22': 'tcp'}}, not {short_repr(value)}")
    ports: dict[str, str] = {}
    for port, protocol in value.items():
        digits = port if isinstance(port, str) else ""
        if isinstance(port, int) and not isinstance(port, bool) and 1 <= port <= 65535:
            digits = str(port)
        if not re.fullmatch(r"[0-9]{1,5}", digits) or not 1 <= int(digits) <= 65535:
            raise ValueError(f"{name}: a port must be 1 to 65535, not {short_repr(port)}")
        if protocol not in ("tcp", "http"):
            raise ValueError(
                f"{name}[{port!r}] must be 'tcp' or 'http', not {short_repr(protocol)}"
            )
        ports[str(int(digits))] = protocol
    return ports


def check_env(name: str, value: Any) -> dict[str, str]:
    """Environment variables of the container. Values are never shown: they may be secrets."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of strings, not {type(value).__name__}")
    for variable, text in value.items():
        if not isinstance(variable, str) or not re.fullmatch(_ENV_NAME, variable):
            raise ValueError(f"{name}: not the name of a variable: {short_repr(variable)}")
        if len(variable) > MAX_ENV_NAME:
            raise ValueError(f"{name}: a name has at most {MAX_ENV_NAME} characters: {variable}")
        if not isinstance(text, str):
            raise TypeError(f"{name}[{variable!r}] must be a string, not {type(text).__name__}")
        if len(text) > MAX_ENV_VALUE:
            raise ValueError(
                f"{name}[{variable!r}] has {len(text)} characters; {MAX_ENV_VALUE} are allowed"
            )
        if re.search(_CHOKED_ON, text):
            logger.warning(
                "%s[%r] holds '&', a typographic quote or an emoji, with which the API is known "
                "to answer code 1",
                name,
                variable,
            )
    return {variable: Secret(text) for variable, text in value.items()}


def check_secret(name: str, value: Any, longest: int) -> str:
    """A password or token of at most ``longest`` characters."""
    text = check_text(name, value, secret=True)
    if len(text) > longest:
        raise ValueError(f"{name} has {len(text)} characters; the API takes at most {longest}")
    return Secret(text)


def check_public_key(name: str, value: Any) -> str:
    """An SSH public key as a line of text; not a private one, and not the path of a file."""
    text = check_text(name, value, secret=True).strip()
    if "PRIVATE KEY" in text:
        raise ValueError(
            f"{name} is a private key, which must never leave your machine: "
            "give the public one, the content of the .pub file beside it"
        )
    is_key = re.fullmatch(r"(ssh|ecdsa|sk)-\S+ +\S.*", text)
    if not is_key and (
        text[0] in "/~.\\" or text.endswith(".pub") or ".ssh" in text or text.startswith("id_")
    ):
        raise ValueError(
            f"{name} looks like a path: give the content of the file, "
            f"as pathlib.Path({short_repr(text)}).expanduser().read_text()"
        )
    if not is_key:
        raise ValueError(
            f"{name} must be one line like 'ssh-ed25519 AAAA... me@home', as the .pub file holds it"
        )
    return check_secret(name, text, MAX_SSH_KEY)


# ==================================================================================================
# config
#
# Where the key and the base URL come from, and what makes them usable.
# ==================================================================================================


KEY_VARIABLE = "CLORE_API_KEY"
URL_VARIABLE = "CLORE_BASE_URL"
CONFIG_FILE = "~/.clore/config.json"  # the file of the official tools; read, never written

# Where the user has not said; without that variable ``~/.local/state/clore-client``.
DEFAULT_STATE_DIR = "$XDG_STATE_HOME/clore-client"

_told: set[str] = set()  # what has been warned of


def clean_key(key: object, source: str) -> str:
    """A key that can stand in a header; its trailing newline, as files have it, is cut.

    The key itself is in none of the errors.
    """
    if not isinstance(key, str):
        raise ConfigurationError(
            f"the API key from {source} must be a string, not {type(key).__name__}"
        )
    key = key.rstrip("\r\n")
    if key.lower().startswith(("bearer ", "auth:", "auth ")):
        raise ConfigurationError(
            f"the API key from {source} starts with {key.split()[0]!r}: give the bare key"
        )
    if any(c.isspace() for c in key):
        raise ConfigurationError(
            f"the API key from {source} has a blank or a newline in it: give the bare key"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(
            f"the API key from {source} has a character that no key has: was it copied whole?"
        )
    return Secret(key)


def find_key(argument: str | None) -> tuple[str | None, str]:
    """The key and where it comes from: argument, environment, the official tools' file."""
    if argument:
        return clean_key(argument, "the argument api_key"), "argument"
    if from_environment := os.environ.get(KEY_VARIABLE):
        source = f"environment variable {KEY_VARIABLE}"
        return clean_key(from_environment, f"the {source}"), source
    from_file = _key_in_file()
    return (from_file, f"file {CONFIG_FILE}") if from_file else (None, "nowhere")


def need_key() -> None:
    """Raise an error that says where it looked, when neither environment nor file has a key."""
    if find_key(None)[0] is None:
        variable = "is empty" if KEY_VARIABLE in os.environ else "is not set"
        there = os.path.isfile(os.path.expanduser(CONFIG_FILE))
        raise ConfigurationError(
            f"there is no API key: the environment variable {KEY_VARIABLE} {variable}, "
            f"and the file {CONFIG_FILE} {'has none in it' if there else 'is not there'}"
        )


def ending_of(key: object) -> str:
    """What may be shown of a key: its last four characters, and of a short one a quarter."""
    text = str(key)
    return printable(text[len(text) - min(4, len(text) // 4) :])


def _key_in_file() -> str | None:
    try:
        path = Path(CONFIG_FILE).expanduser()
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: there is no home
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{CONFIG_FILE} can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
        ) from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        # The parser's error holds the text, and so the key.
        raise ConfigurationError(f"{CONFIG_FILE} is not JSON") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{CONFIG_FILE} must hold a JSON object with an 'api_key'")
    if not config.get("api_key"):
        return None
    key = clean_key(config["api_key"], CONFIG_FILE)
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        _warn_readable(str(path))
    return key or None


@functools.cache
def _warn_readable(path: str) -> None:
    logger.warning("%s holds your API key and others may read it: chmod 600 %s", path, path)


def check_base_url(url: object, name: str) -> str:
    """Return an http(s) URL without its trailing slash.

    Parameters:
        url: as it was given.
        name: where it comes from, for the error.
    """
    if not isinstance(url, str):
        raise TypeError(
            f"{name} must be a string like 'https://api.clore.ai', not {type(url).__name__}"
        )
    return _usable_url(url, name)


@functools.lru_cache(maxsize=64)
def _usable_url(url: str, name: str) -> str:
    if problem := _url_problem(url):
        # The URL itself is not shown: a key may stand in it.
        raise ConfigurationError(
            f"{name} must be a URL like https://api.clore.ai: this one {problem}"
        )
    return url.rstrip("/")


def _url_problem(url: str) -> str | None:
    if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
        return "has a blank or a character that no URL has"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "can't be parsed"
    if parts.scheme not in ("http", "https"):
        return "does not start with http:// or https://"
    if not host:
        return "has no host"
    if "@" in parts.netloc or parts.query or parts.fragment:
        return "has a user, a query or a fragment in it"
    return None


@functools.lru_cache(maxsize=64)
def is_loopback(base_url: str) -> bool:
    """Whether the URL's host is this machine."""
    return is_loopback_host(urlsplit(base_url).hostname or "")


def check_key_may_go_to(base_url: str) -> None:
    """A key goes out over https only, or to this machine."""
    if not base_url.lower().startswith("https://") and not is_loopback(base_url):
        host = printable(urlsplit(base_url).hostname or "", 100)
        raise ConfigurationError(
            f"base_url is not https (its host is {host}), and the API key would be readable on the "
            "way; nothing was sent"
        )


V = TypeVar("V")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_loopback_host(host: str) -> bool:
    """Whether a host, as a URL names it, is this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@functools.lru_cache(maxsize=64)
def canonical_url(base_url: str) -> str:
    """Return one spelling for all URLs of an API: ``HTTP://127.0.0.1`` is ``http://localhost``."""
    parts = urlsplit(base_url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    host = "localhost" if is_loopback_host(host) else host
    port = parts.port or _DEFAULT_PORTS.get(scheme)
    return f"{scheme}://{host}:{port}{parts.path.rstrip('/')}"


def read_line(path: str) -> str:
    """Return the first line of a file, or an empty string."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readline(200).strip()
    except OSError:
        return ""


@functools.cache
def boot_id() -> str:
    """Return what tells the boots of this machine apart; an empty string where it is not known."""
    return read_line("/proc/sys/kernel/random/boot_id")


class PerAccount(Generic[V]):
    """One ``V`` for each base URL and key, made when it is first asked for.

    A forked child starts with none: another thread may have held a lock of theirs at the fork.
    """

    def __init__(self, make: Callable[[], V]) -> None:
        self._make = make
        self._of: dict[tuple[str, bytes], V] = {}
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._of.clear)

    def of(self, base_url: str, api_key: str) -> V:
        """Return the one of this account."""
        # A digest, so that no key stands in a table of the process.
        account = (canonical_url(base_url), hashlib.sha256(api_key.encode()).digest())
        found = self._of.get(account)
        # One step, and so without a lock: of two that are made at once, both callers get the first.
        return self._of.setdefault(account, self._make()) if found is None else found


def check_state_dir(name: str, value: Any) -> str | os.PathLike[str] | None:
    """A folder, or None for no notes at all."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a folder or None, not {type(value).__name__}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name} must not be empty: None turns the notes off")
    if value is not None:
        check_local_path(name, value)
    return value


def state_folder(state_dir: str | os.PathLike[str] | None) -> Path | None:
    """The folder of the entries, from what the user gave; None where they are turned off."""
    if state_dir is None:
        return None
    if state_dir == DEFAULT_STATE_DIR:
        base = os.environ.get("XDG_STATE_HOME") or ""
        if not os.path.isabs(base):  # the specification says to ignore such a one
            base = os.path.join("~", ".local", "state")
        folder = os.path.expanduser(os.path.join(base, "clore-client"))
    else:
        folder = os.path.expanduser(os.fspath(state_dir))
    if folder.startswith("~"):  # there is no home: the name would be taken for a folder's
        warn_of_state(f"{folder} has no place", "this user has no home directory")
        return None
    return Path(os.path.abspath(folder))


def account_digest(base_url: str, api_key: str | None) -> str:
    """What stands for an account in an entry, from which nobody can tell the key."""
    account = f"clore-client\n{canonical_url(base_url)}\n{api_key or ''}"
    return hashlib.sha256(account.encode()).hexdigest()[:32]


def warn_of_state(what: str, error: object) -> None:
    """One warning for each trouble: it must not stop a rental."""
    if what not in _told:
        _told.add(what)
        logger.warning(
            "%s: %s; should this process be killed, leftovers() can't know of its rentals",
            what,
            error,
        )


# ==================================================================================================
# models.record
#
# What servers, orders and wallets have in common, and which form an answer is in.
# ==================================================================================================


R = TypeVar("R", bound="Record")

# A record with one of these fields makes the whole answer one of the live form.
LIVE_PRICE_MARKERS = ("on_demand", "original_usd")
LIVE_ORDER_MARKERS = ("si", "ct", "mon_container", "pub_cluster")
LIVE_MARKET_MARKERS = ("currency_rates_in_usd", "server")


def dicts(value: Any) -> list[dict[str, Any]]:
    """The dicts of a list, or nothing: what an answer has in place of records is no record."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def part_of(record: Any, *path: str) -> Any:
    """What stands at ``path`` in nested dicts, or None."""
    for key in path:
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def is_live(answer: Mapping[str, Any]) -> bool:
    """Whether an answer of the API is in the live form; decided once for the whole answer."""
    servers = answer.get("servers")
    for server in servers if isinstance(servers, list) else ():  # without a copy of thousands
        price = server.get("price") if isinstance(server, dict) else None
        if isinstance(price, dict) and any(marker in price for marker in LIVE_PRICE_MARKERS):
            return True
    for order in dicts(answer.get("orders")):
        if any(marker in order for marker in LIVE_ORDER_MARKERS):
            return True
    if "exists" in answer:
        return True
    market = answer.get("market")
    if not isinstance(market, dict):
        return False
    if any(marker in market for marker in LIVE_MARKET_MARKERS):
        return True
    return any("bid" in offer for offer in dicts(market.get("offers")))


def whole_id(value: Any) -> int | None:
    """Return an id that came as an integer, or as a string of digits; else None."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if abs(value) < 10**18 else None


class Record(dict[str, Any]):
    """A dict in the documented form that remembers what the API sent.

    ``.wire`` gives the record as it came. Records built by hand are taken to be in the
    documented form already, and are their own ``.wire``.
    """

    __slots__ = ("_wire",)
    _wire: dict[str, Any]

    @property
    def wire(self) -> dict[str, Any]:
        """A copy of the whole record as the API sent it."""
        try:
            return copy.deepcopy(self._wire)
        except AttributeError:
            return dict(self)

    def _like(self: R, items: Mapping[str, Any]) -> R:
        twin = type(self)(items)
        for cls in type(self).__mro__:
            for slot in getattr(cls, "__slots__", ()):
                if hasattr(self, slot):
                    setattr(twin, slot, getattr(self, slot))
        return twin

    def copy(self: R) -> R:
        """A shallow copy of the same type, with the same ``.wire``."""
        return self._like(self)

    __copy__ = copy

    def __or__(self: R, other: Any) -> R:  # type: ignore[override]
        return self._like({**self, **other}) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self: R, other: Any) -> R:  # type: ignore[override]
        return self._like({**other, **self}) if isinstance(other, Mapping) else NotImplemented

    def _summary(self) -> dict[str, Any]:
        """What the repr shows."""
        return self

    def __repr__(self) -> str:
        # repr() of the parts escapes control characters: text in a record comes from strangers.
        shown = masked({k: v for k, v in self._summary().items() if v is not None})
        fields = ", ".join(f"{printable(str(k))}={v!r}" for k, v in shown.items())
        return f"<{type(self).__name__} {fields}>"

    __str__ = __repr__


# ==================================================================================================
# models.order
#
# Order: its documented form, made from the live one; telling which order is the one just made.
# ==================================================================================================


# How an order may end. The live form knows the first two; the others are known from elsewhere.
ENDED_STATUSES = frozenset(
    {"cancelled", "expired", "completed", "error", "failed", "finished", "stopped", "terminated"}
)

# Compiled when they are used: that takes longer than importing the module.
_HOST_NAME = r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?"
_USER_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"


def plain_host(text: str) -> bool:
    """Whether ``text`` is a host name or an address, and nothing that a shell or ssh would obey."""
    if re.fullmatch(_HOST_NAME, text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # no IPv6 zone: it may hold anything


def plain_user(text: str) -> bool:
    """Whether ``text`` is a plain name of a user."""
    return bool(re.fullmatch(_USER_NAME, text))


def _port(text: Any) -> int | None:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,5}", text):
        return None
    return int(text) if 1 <= int(text) <= 65535 else None


class Order(Record):
    """One order, in the documented form.

    A dict with ``order_id``, ``renting_server``, ``status``, ``connection`` (``ssh`` and
    ``http_ports``), ``price`` (per hour, in the order's currency), ``started`` (Unix time), and
    whatever else the API sent. The properties give None for what is missing or of an unexpected
    type.
    """

    __slots__ = ("_live", "_usd_per_hour")
    _live: bool
    _usd_per_hour: float | None

    @property
    def id(self) -> int | None:
        """The order's number."""
        return whole_id(self.get("order_id"))

    @property
    def server_id(self) -> int | None:
        """The number of the rented server."""
        return whole_id(self.get("renting_server"))

    @property
    def status(self) -> str | None:
        """``"creating"``, ``"running"``, ``"cancelled"`` or ``"expired"``."""
        status = self.get("status")
        return status if isinstance(status, str) else None

    @property
    def is_running(self) -> bool:
        """Whether it is deployed and reachable."""
        return self.status == "running"

    @property
    def is_spot(self) -> bool | None:
        """Whether it is a spot order; None where the record does not tell."""
        spot = self.get("spot")
        if isinstance(spot, bool):
            return spot
        return False if self.is_live else None  # the live form leaves out a false one

    @property
    def has_ended(self) -> bool:
        """Whether it is over, and costs nothing any more."""
        return self.status in ENDED_STATUSES

    @property
    def ssh_command(self) -> str | None:
        """``"ssh root@<host> -p <port>"`` once there is one."""
        command = part_of(self, "connection", "ssh")
        return command if isinstance(command, str) and command else None

    @property
    def http_urls(self) -> dict[str, str]:
        """Container port -> URL."""
        urls = part_of(self, "connection", "http_ports")
        if not isinstance(urls, dict):
            return {}
        return {str(k): v for k, v in urls.items() if isinstance(v, str)}

    @property
    def started_at(self) -> float | None:
        """Unix time; on the live API that of its creation."""
        return finite(self.get("started"))

    @property
    def usd_per_hour(self) -> float | None:
        """The price in USD per hour, by the rate known when the order was read; else None."""
        try:
            return self._usd_per_hour
        except AttributeError:
            return RateBook().usd(self.get("price"), self.get("currency"))

    @property
    def is_live(self) -> bool | None:
        """Whether it came in the live form; None when it was built by hand."""
        return getattr(self, "_live", None)

    def _summary(self) -> dict[str, Any]:
        if "body" in self:  # a preview
            return {"usd_per_hour": self.usd_per_hour, "body": self["body"]}
        first = ("order_id", "renting_server", "status", "price", "currency", "image", "started")
        return {
            **{name: self.get(name) for name in first},
            "usd_per_hour": None if self.usd_per_hour is None else round(self.usd_per_hour, 6),
            "ssh": self.ssh_command,
            **({"ssh_password": "***"} if self.get("ssh_password") else {}),
        }


def _live_host(record: dict[str, Any]) -> str:
    cluster = record.get("pub_cluster")
    host = cluster[0] if isinstance(cluster, list) and cluster else cluster
    return host if isinstance(host, str) and plain_host(host) else ""


def _live_ports(record: dict[str, Any]) -> dict[int, int]:
    """Container port -> public port."""
    mapped: dict[int, int] = {}
    entries = record.get("tcp_ports")
    for entry in entries if isinstance(entries, list) else ():
        inner, _, outer = entry.partition(":") if isinstance(entry, str) else ("", "", "")
        container, public = _port(inner), _port(outer)
        if container and public:
            mapped.setdefault(container, public)
    return mapped


def _live_status(record: dict[str, Any], cancelled: bool, host: str, ports: bool) -> str:
    if record.get("expired") is True:
        return "cancelled" if cancelled else "expired"
    deployed = record.get("mon_container") in (2, None)
    if deployed and host and ports and record.get("online") is not False:
        return "running"
    return "creating"


def _either(record: dict[str, Any], name: str, other: str) -> Any:
    """The documented field where it is told, else the live one."""
    value = record.get(name)
    return record.get(other) if value is None else value


def _live_fields(record: dict[str, Any], cancelled: Collection[int]) -> dict[str, Any]:
    """The documented fields of an order in the live form."""
    order_id = _either(record, "order_id", "id")
    ours = whole_id(order_id) in cancelled
    host, ports = _live_host(record), _live_ports(record)
    status = _live_status(record, ours, host, bool(ports))
    # Host and ports may be filled in long before anything answers there.
    reachable = status == "running" and 22 in ports
    pub, http_port = record.get("http_pub"), record.get("http_port")
    urls = {}
    if isinstance(pub, str) and plain_host(pub) and (port := _port(str(http_port))):
        urls[str(port)] = f"https://{pub}"
    return {
        "order_id": order_id,
        "renting_server": _either(record, "renting_server", "si"),
        "status": status,
        "connection": {
            "ssh": f"ssh root@{host} -p {ports[22]}" if reachable else "",
            "http_ports": urls,
        },
        "price": per_hour(record.get("price")),
        "started": _either(record, "started", "ct"),
    }


def to_order(
    record: dict[str, Any], live: bool, cancelled: Collection[int], rates: RateBook
) -> Order:
    """An order as it came, as an :class:`Order` in the documented form.

    Parameters:
        record: what the API sent.
        live: its answer's form.
        cancelled: ids of orders that this client cancelled.
        rates: for ``usd_per_hour``.
    """
    order = Order({**record, **_live_fields(record, cancelled)} if live else record)
    order._wire, order._live = record, live
    order._usd_per_hour = rates.usd(order.get("price"), order.get("currency"))
    return order


def to_orders(answer: dict[str, Any], cancelled: Collection[int], rates: RateBook) -> list[Order]:
    """The orders of an answer, in the documented form."""
    live = is_live(answer)
    return [to_order(r, live, cancelled, rates) for r in dicts(answer.get("orders"))]


def created_id(answer: dict[str, Any]) -> int | None:
    """The order id in an answer to ``create_order``, which only old and documented ones carry."""
    nested = answer.get("order")
    for holder in (answer, nested if isinstance(nested, dict) else {}):
        for name in ("order_id", "id"):
            if (order_id := whole_id(holder.get(name))) is not None and order_id > 0:
                return order_id
    return None


# ==================================================================================================
# models.result
#
# What came of a command or a transfer over SSH.
# ==================================================================================================


STDOUT, STDERR = "stdout", "stderr"


class CommandResult:
    """How a command ended.

    Attributes:
        command: the line that the machine's shell was given, without what ``env`` adds to it.
        exit_code: 0 to 255; -1 where a signal ended it.
        stdout, stderr: its output as text; what is no UTF-8 is replaced.
        duration: seconds from the request until the end.
    """

    __slots__ = ("command", "duration", "exit_code", "stderr", "stdout")

    def __init__(
        self, command: str, exit_code: int, stdout: str, stderr: str, duration: float
    ) -> None:
        self.command = command
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr
        self.duration = duration

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.exit_code == 0

    def __repr__(self) -> str:
        return (
            f"<CommandResult {printable(repr(self.command), 60)}: exit_code={self.exit_code}, "
            f"{len(self.stdout)} characters of stdout, {len(self.stderr)} of stderr, "
            f"{self.duration:.1f}s>"
        )


class OutputLine(str):
    """A line of a command's output without its end, as it came: it may hold terminal escapes.

    Attributes:
        stream: ``"stdout"`` or ``"stderr"``.
    """

    __slots__ = ("stream",)

    stream: str

    def __new__(cls, text: str, stream: str = STDOUT) -> OutputLine:
        line = super().__new__(cls, text)
        line.stream = stream
        return line


class Transferred:
    """What was transferred.

    Attributes:
        path: where it is now, as text.
        files: how many files.
        size: bytes of all of them.
        duration: seconds.
        skipped: (name, why) of what was left out: symlinks, and what is no file.
    """

    __slots__ = ("duration", "files", "path", "size", "skipped")

    def __init__(
        self, path: str, files: int, size: int, duration: float, skipped: list[tuple[str, str]]
    ) -> None:
        self.path = path
        self.files = files
        self.size = size
        self.duration = duration
        self.skipped = skipped

    def __repr__(self) -> str:
        left_out = f", {len(self.skipped)} left out" if self.skipped else ""
        return (
            f"<Transferred {printable(self.path, 200)!r}: {self.files} files, {self.size} bytes, "
            f"{self.duration:.2f} s{left_out}>"
        )


# ==================================================================================================
# models.server
#
# Server: its documented form, made from the live one; matching and sorting by price.
# ==================================================================================================


# Bounded, and without two ways to match one blank: the text comes from strangers. Compiled when
# they are used: that takes longer than importing the module.
_COUNTED_GPU = r"(?s)([0-9]{1,3})x\s+(.+)"
_VENDOR = r"(?i)(?:NVIDIA\s+)?(?:GeForce\s+)?"
_DISK_SIZE = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s?GB"
# Under ``price.usd`` of the live form, the on-demand price for each currency that pays it.
_USD_FIELDS = {
    "CLORE-Blockchain": "on_demand_clore",
    "bitcoin": "on_demand_btc",
    "USD-Blockchain": "on_demand_usd",
}


def _counted(specs: Any) -> tuple[int, str] | None:
    """Count and name from ``specs.gpu`` (``"2x NVIDIA GeForce RTX 4070 Ti"``), or None."""
    text = specs.get("gpu") if isinstance(specs, dict) else None
    match = re.fullmatch(_COUNTED_GPU, text.strip()) if isinstance(text, str) else None
    if not match:
        return None
    return int(match[1]), match[2][re.match(_VENDOR, match[2]).end() :]  # type: ignore[union-attr]


def gpu_names(record: dict[str, Any]) -> list[str]:
    """The flat list of GPU names of a server as it came, in either form."""
    array = record.get("gpu_array")
    if isinstance(array, list):
        names: list[str] = []
        for entry in array:
            if isinstance(entry, str):  # the rule, without a list around it for each of thousands
                if name := entry.strip():
                    names.append(name)
            elif isinstance(entry, list):
                names += [n for item in entry if isinstance(item, str) and (n := item.strip())]
        if names:
            return names
    counted = _counted(record.get("specs"))
    return [counted[1]] * counted[0] if counted else []


def _live_spot_per_day(price: dict[str, Any]) -> float | None:
    """The lowest spot bid in USD per day. ``price.usd.spot`` is mostly 0, which means not given."""
    usd = price.get("usd")
    if stated := positive(part_of(usd, "spot")):
        return stated
    original = price.get("original_usd")
    if isinstance(original, dict):
        clore = positive(part_of(original, "CLORE-Blockchain", "spot"))
        others = [p for c in original if (p := positive(part_of(original, c, "spot")))]
        if clore or others:
            return clore or min(others)
    spot, on_demand = price.get("spot"), price.get("on_demand")
    if stated := positive(part_of(spot, "USD-Blockchain")):
        return stated
    for currency, usd_field in _USD_FIELDS.items():
        # The same server quotes its on-demand price in both units: that is the rate.
        amount = positive(part_of(spot, currency))
        same, in_usd = positive(part_of(on_demand, currency)), positive(part_of(usd, usd_field))
        if amount and same and in_usd:
            return amount * in_usd / same
    return None


def server_price(record: dict[str, Any], live: bool, spot: bool) -> float | None:
    """USD per hour of a server as it came; None when it has no price above 0."""
    price = record.get("price")
    if not isinstance(price, dict):
        return None
    if spot:
        given = _live_spot_per_day(price) if live else part_of(price, "usd", "spot")
    else:
        usd = price.get("usd")
        given = usd.get("on_demand_clore") if isinstance(usd, dict) else None
    amount = positive(given)
    # The smallest of numbers becomes 0, which is no price.
    return amount / HOURS_PER_DAY or None if live and amount else amount


def on_demand_usd(server: Server, currency: Any) -> float | None:
    """USD per hour of a translated server when it is paid in ``currency``, the wire's name.

    The documented form tells one price for all currencies.
    """
    usd = part_of(server, "price", "usd")
    own = (
        positive(part_of(usd, _USD_FIELDS.get(currency, ""))) if isinstance(currency, str) else None
    )
    return own or positive(part_of(usd, "on_demand_clore"))


def server_reliability(record: dict[str, Any], live: bool) -> float | None:
    """Reliability of a server as it came, 0 to 100; the live form counts from 0 to 1."""
    number = finite(record.get("reliability"))
    if number is None:
        return None
    # 0.9731 * 100 is a hair beside 97.31.
    return round(number * 100.0, 9) if live else number


class Server(Record):
    """One server of the marketplace, in the documented form.

    A dict with ``id``, ``gpu_array`` (a flat list of names), ``price`` (under ``usd`` in USD per
    hour), ``reliability`` (0 to 100), ``rented``, ``specs``, and whatever else the API sent. The
    properties give None for what is missing or of an unexpected type.
    """

    __slots__ = ()

    @property
    def id(self) -> int | None:
        """The number to rent it by."""
        return whole_id(self.get("id"))

    @property
    def gpu_name(self) -> str | None:
        """The name of its (first) GPU, as ``"RTX 4090"``."""
        names = gpu_names(self)
        return names[0] if names else None

    @property
    def gpu_count(self) -> int | None:
        """How many GPUs it has."""
        counted = _counted(self.get("specs"))
        return counted[0] if counted else len(gpu_names(self)) or None

    @property
    def vram_gb(self) -> float | None:
        """Memory of one GPU in GB, which the API rounds down."""
        return positive(part_of(self, "specs", "gpuram"))

    @property
    def usd_per_hour(self) -> float | None:
        """On-demand price in USD per hour, without fees."""
        return server_price(self, live=False, spot=False)

    @property
    def spot_usd_per_hour(self) -> float | None:
        """The lowest spot bid that the host takes, in USD per hour, without fees."""
        return server_price(self, live=False, spot=True)

    @property
    def reliability(self) -> float | None:
        """0 to 100."""
        return finite(self.get("reliability"))

    @property
    def rented(self) -> bool:
        """Whether somebody rents it now."""
        return bool(self.get("rented"))

    @property
    def country(self) -> str | None:
        """The two-letter country code of its network."""
        code = part_of(self, "specs", "net", "cc")
        return code if isinstance(code, str) and code else None

    @property
    def ram_gb(self) -> float | None:
        """Main memory in GB."""
        return positive(part_of(self, "specs", "ram"))

    @property
    def disk_gb(self) -> float | None:
        """Size of the disk in GB: the last one that its description names."""
        text = part_of(self, "specs", "disk")
        sizes = re.findall(_DISK_SIZE, text) if isinstance(text, str) else []
        return positive(float(sizes[-1])) if sizes else None

    @property
    def cuda_version(self) -> str | None:
        """The highest CUDA version of its driver, as ``"13.0"``."""
        version = self.get("cuda_version")
        return version if isinstance(version, str) and version else None

    def _summary(self) -> dict[str, Any]:
        count, name = self.gpu_count, self.gpu_name
        return {
            "id": self.get("id"),
            "gpu": f"{count}x {name}" if name else None,
            "usd_per_hour": _rounded(self.usd_per_hour),
            "spot_usd_per_hour": _rounded(self.spot_usd_per_hour),
            "reliability": self.get("reliability"),
            "country": self.country,
            "rented": self.get("rented"),
        }


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 6)


def to_server(record: dict[str, Any], live: bool) -> Server:
    """Return a server as it came as a :class:`Server` in the documented form."""
    server = Server(record)
    server._wire = record
    server["gpu_array"] = gpu_names(record)
    if not live:
        return server
    if (reliability := server_reliability(record, live)) is not None:
        server["reliability"] = reliability
    price = record.get("price")
    if isinstance(price, dict):
        usd = price.get("usd")
        hourly = {k: per_hour(v) for k, v in usd.items()} if isinstance(usd, dict) else {}
        hourly["spot"] = server_price(record, live, spot=True)
        server["price"] = {**price, "usd": hourly}
    return server


def to_servers(
    answer: dict[str, Any],
    *,
    include_rented: bool = False,
    gpu_type: str | None = None,
    max_usd_per_hour: float | None = None,
    min_reliability: float = 0.0,
    spot: bool = False,
    server_id: int | None = None,
) -> list[Server]:
    """The servers of a marketplace answer that fit, in the order in which they came.

    They are chosen before they are translated: that a few of thousands are wanted is the rule.
    """
    live = is_live(answer)
    wanted = gpu_type.strip().lower() if gpu_type else ""

    def fits(record: dict[str, Any]) -> bool:
        # What costs least comes first: this runs for thousands of records.
        if server_id is not None and whole_id(record.get("id")) != server_id:
            return False
        if not include_rented and record.get("rented"):
            return False
        if min_reliability > 0 and (server_reliability(record, live) or 0.0) < min_reliability:
            return False
        if wanted and not any(wanted in name.lower() for name in gpu_names(record)):
            return False
        if max_usd_per_hour is None:
            return True
        price = server_price(record, live, spot)
        # 8.4 a day over 24 is a hair above 0.35.
        return price is not None and price <= max_usd_per_hour * (1 + 1e-12)

    return [to_server(r, live) for r in dicts(answer.get("servers")) if fits(r)]


def cheapest_first(servers: Iterable[Server], *, spot: bool = False) -> list[Server]:
    """Sorted by price; equal ones as they came, those without a price last."""

    def price(server: Server) -> float:
        usd = server.spot_usd_per_hour if spot else server.usd_per_hour
        return math.inf if usd is None else usd

    return sorted(servers, key=price)


def listed_prices(answer: dict[str, Any], rates: RateBook) -> dict[int, float]:
    """Server id -> on-demand USD per hour, for every server of an answer that tells both.

    The exchange rates that the prices imply go to ``rates``, for display.
    """
    live = is_live(answer)
    told: dict[int, float] = {}
    implied: dict[str, float] = {}
    for record in dicts(answer.get("servers")):
        usd, server_id = server_price(record, live, spot=False), record.get("id")
        if type(server_id) is not int:  # the rule; thousands come at once
            server_id = whole_id(server_id)
        if usd is None or server_id is None:
            continue
        told[server_id] = usd
        if live and len(implied) < len(_USD_FIELDS):
            for currency, usd_field in _USD_FIELDS.items():
                amount = positive(part_of(record, "price", "on_demand", currency))
                in_usd = positive(part_of(record, "price", "usd", usd_field))
                if amount and in_usd:
                    implied[currency] = in_usd / amount
    rates.tell(implied, firm=False)
    return told


# ==================================================================================================
# models.wallet
#
# Wallet: a currency of the account and what is in it.
# ==================================================================================================


class Wallet(Record):
    """One wallet: a dict with ``name``, ``balance`` and ``deposit_address``.

    The live API calls the address ``deposit``, which is kept beside it.
    """

    __slots__ = ()

    @property
    def name(self) -> str | None:
        """The currency, as ``"CLORE-Blockchain"``."""
        name = self.get("name")
        return name if isinstance(name, str) else None

    @property
    def balance(self) -> float | None:
        """What it holds, in its currency."""
        return finite(self.get("balance"))

    @property
    def deposit_address(self) -> str | None:
        """Where to send coins to."""
        address = self.get("deposit_address")
        return address if isinstance(address, str) else None


def to_wallets(answer: dict[str, Any]) -> list[Wallet]:
    """The wallets of an answer, in the documented form."""
    wallets = []
    for record in dicts(answer.get("wallets")):
        wallet = Wallet(record)
        wallet._wire = record
        if "deposit" in record:
            wallet.setdefault("deposit_address", record["deposit"])
        wallets.append(wallet)
    return wallets


# ==================================================================================================
# api.call
#
# Prepare an API call: what is sent, and what may be done with it.
# ==================================================================================================


URGENT_POSTS = frozenset({"cancel_order", "cancel_orders"})  # a waiting cancel costs money
SPACED_POSTS = frozenset({"create_order"})  # the API spaces these
KEYLESS_GETS = frozenset({"marketplace"})
REPEATABLE_POSTS = frozenset({"cancel_order", "cancel_orders", "set_spot_price"})
# Every other POST changes something, and is sent again only when it can't have had an effect.
LOGGED_POSTS = REPEATABLE_POSTS | SPACED_POSTS  # what costs or frees money


class Envelope(dict[str, Any]):
    """A decoded answer that remembers when it was asked for, and the server's clock."""

    __slots__ = ("date", "received_at", "sends", "sent_at")
    date: str | None
    received_at: float
    sent_at: float
    sends: int

    def server_time_at(self, moment: float) -> float | None:
        """The server's Unix time at a monotonic ``moment``, rounded down; None without a Date."""
        stamp = unix_time(self.date)
        return None if stamp is None else math.floor(stamp - (self.received_at - moment))


def unix_time(date: str | None) -> float | None:
    if not date:
        return None
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


# These are no dataclasses, here and elsewhere: that module costs a fifth of the import.
class Call:
    """A request that is ready to be sent, and what may be done with it."""

    def __init__(
        self,
        *,
        name: str,
        endpoint: str,
        request: requests.PreparedRequest,
        settings: dict[str, Any],
        base_url: str,
        key: str,
        repeatable: bool,
        urgent: bool,
        secrets: tuple[str, ...],
    ) -> None:
        self.name = name  # the endpoint's last part, as "create_order"
        self.endpoint = endpoint
        self.request = request
        self.settings = settings
        self.base_url = base_url
        self.key = key
        self.repeatable = repeatable
        self.urgent = urgent  # leaves whatever pause the server has asked for
        self.secrets = secrets

    def __repr__(self) -> str:
        return f"<Call {self.label}>"

    @property
    def label(self) -> str:
        return f"{self.request.method} {self.endpoint}"

    def lost(self, cause: str) -> CloreError:
        """The error for a request of which it is not known what became of it."""
        if self.repeatable:
            return CloreConnectionError(cause)
        if self.name == "create_order":
            return OrderOutcomeUnknownError(
                f"create_order was sent and got no clear answer ({cause}): the order may or may "
                "not have been made. It was not sent again. Look at get_orders() for it, also a "
                "minute from now, before you order again",
                endpoint=self.endpoint,
            )
        return OutcomeUnknownError(
            f"{self.label} was sent and got no clear answer ({cause}): it may or may not have been "
            "carried out. It was not sent again. Look at the state of your account first",
            endpoint=self.endpoint,
        )


def secrets_in(value: Any, inside: bool = False) -> Iterator[str]:
    """Every string of a body that must not be shown: all that stands under a secret's name."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from secrets_in(item, inside or str(name).lower() in SECRET_FIELDS)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from secrets_in(item, inside)
    elif inside and isinstance(value, str) and len(value) > 3:
        yield value


def check_endpoint(endpoint: Any) -> str:
    """Check a path such as ``"/v1/wallets"``: the key must not be led to another host."""
    check_text("endpoint", endpoint)
    fine = endpoint.startswith("/") and not endpoint.startswith("//") and endpoint.isprintable()
    if not fine or "\\" in endpoint or " " in endpoint or "/.." in endpoint:
        raise ValueError(
            f"endpoint must be a path like '/v1/wallets', not {printable(repr(endpoint), 80)}"
        )
    return str(endpoint)


def endpoint_name(endpoint: str) -> str:
    """Return the last part of a path, as ``"create_order"``."""
    path = unquote(urlsplit(endpoint).path)
    return path.rstrip("/").rsplit("/", 1)[-1].lower()


def prepare_call(
    session: requests.Session,
    method: str,
    endpoint: str,
    params: Any,
    json: Any,
    options: dict[str, Any],
    *,
    base_url: str,
    headers: dict[str, str],
    timeout: Timeout,
    urgent: bool,
) -> Call:
    """Check the arguments of ``_request``, and prepare what is sent.

    Parameters:
        session: by which the request is prepared.
        method, endpoint, params, json: as for ``_request``.
        options: further arguments for requests.
        base_url, headers, timeout: of the client.
        urgent: whether the request leaves whatever pause the server has asked for.
    """
    if "allow_redirects" in options:
        raise ValueError("allow_redirects is refused: a redirect could lead the key elsewhere")
    method = check_text("method", method).upper()
    if not (method.isascii() and method.isalpha()):
        raise ValueError(f"method must be one like 'GET', not {short_repr(method)}")
    name = endpoint_name(check_endpoint(endpoint))
    all_headers = CaseInsensitiveDict(check_headers("headers", headers))
    all_headers.update(check_headers("headers", options.pop("headers", None) or {}))
    key = _check_key(all_headers, base_url, endpoint, name)
    timeout = check_timeout("timeout", options.pop("timeout", timeout))
    verify, cert, stream = (options.pop(k, None) for k in ("verify", "cert", "stream"))
    proxies = _proxies(base_url, options.pop("proxies", None))
    # Without an auth of its own, requests would send what it finds in ~/.netrc.
    options.setdefault("auth", _no_auth)
    try:
        request = session.prepare_request(
            requests.Request(
                method, base_url + endpoint, headers=all_headers, params=params, json=json,
                **options,
            )
        )  # fmt: skip
        secrets = tuple(dict.fromkeys([*([key] if key else []), *secrets_in(json)]))
    except requests.exceptions.InvalidJSONError as error:
        raise ValueError(f"json can't be sent as JSON: {error}") from None
    except RecursionError:
        raise ValueError("json can't be sent as JSON: it is nested too deeply") from None
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"json, params or another argument can't be sent: {error}") from None
    return Call(
        name=name,
        endpoint=endpoint,
        request=request,
        settings={
            "timeout": timeout,
            "allow_redirects": False,
            **session.merge_environment_settings(request.url, proxies, stream, verify, cert),
            "stream": True,  # the body is read piece by piece, up to a limit
        },
        base_url=base_url,
        key=key,
        repeatable=method in ("GET", "HEAD") or (method == "POST" and name in REPEATABLE_POSTS),
        urgent=name in URGENT_POSTS or urgent,
        secrets=secrets,
    )


def _proxies(base_url: str, given: Any) -> dict[str, Any]:
    proxies = dict(given or {})
    if is_loopback(base_url):
        # Over plain http a proxy from the environment would read the key.
        proxies = {"http": None, "https": None, "all": None, **proxies}
    return proxies


def _check_key(headers: Any, base_url: str, endpoint: str, name: str) -> str:
    """Return the key that goes out, which needs a safe way; few endpoints need none."""
    key: str = headers.get("auth") or ""
    if key:
        key = headers["auth"] = clean_key(key, "the headers")
        check_key_may_go_to(base_url)
    elif name not in KEYLESS_GETS:
        raise AuthenticationError(
            3,
            endpoint=endpoint,
            hint=f"there is no API key: pass api_key=..., set {KEY_VARIABLE}, "
            f"or put it into {CONFIG_FILE}; nothing was sent",
        )
    return key


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


# ==================================================================================================
# api.connection
#
# Connections that tell when a request leaves, and end an answer that takes too long.
# ==================================================================================================


ENCODINGS = frozenset({"", "identity", "gzip", "deflate"})  # what is asked for, one at a time
PIECE = 16 * 1024  # bytes that are read at once: deflated ones grow a thousandfold at most


class Exchange(threading.local):
    """This thread's request: whom to tell that it leaves, and until when its answer may take."""

    def __init__(self) -> None:
        self.before: Callable[[], None] | None = None
        self.tell: Callable[[], None] | None = None
        self.left_at: float | None = None  # when the first byte left, by time.monotonic()
        self.connecting = False  # a watched connection was opened: ``left_at`` can be trusted
        self.deadline = math.inf

    def begin(self, before: Callable[[], None], tell: Callable[[], None], deadline: float) -> None:
        """Start over for another request.

        Parameters:
            before: called before it leaves, and may wait.
            tell: called when it has left.
            deadline: monotonic time at which its answer must have come.
        """
        self.before, self.tell, self.deadline = before, tell, deadline
        self.left_at, self.connecting = None, False

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Note that the block writes the first byte."""
        if self.before is not None:
            self.before()
        self.left_at = time.monotonic()
        try:
            yield
        finally:
            # Told afterwards: a thread that loses its turn between telling and writing would
            # leave late, and so too close to the next one.
            if self.tell is not None:
                self.tell()


exchange = Exchange()


class _BoundedReader(io.RawIOBase):
    """Reads from a socket until a deadline, however few bytes come at a time."""

    def __init__(self, raw: Any, sock: Any, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the whole answer took too long")
        timeout = self._sock.gettimeout()
        if timeout is None or left < timeout:
            self._sock.settimeout(left)  # until the next request sets its own
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that has a deadline, and is never taken from an interim one such as 103."""

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        if exchange.deadline < math.inf:
            raw = self.fp.detach()
            self.fp = io.BufferedReader(_BoundedReader(raw, sock, exchange.deadline))

    def begin(self) -> None:
        super().begin()
        interim = False
        while 100 <= self.status < 200:
            interim = True
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()
        # A connection that sends what nobody asked for may do so again, and at another time; and
        # what changes something gets a connection of its own.
        changes = self._method not in ("GET", "HEAD")  # type: ignore[attr-defined]
        self.will_close = self.will_close or interim or changes


# Raised before anything is sent, also by connections that tell nothing.
_UNSENT = (
    requests.ConnectTimeout,
    requests.exceptions.InvalidURL,
    requests.exceptions.ProxyError,
    LocationParseError,
    NewConnectionError,
    SSLCertVerificationError,
)


class _Connection(HTTPConnection):
    response_class = _Response

    def connect(self) -> None:
        exchange.connecting = True
        super().connect()

    def endheaders(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is None:
            self.connect()
        with exchange.leaving():
            super().endheaders(*args, **kwargs)


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    """requests' adapter over connections that tell when the first byte is about to leave."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> ProxyManager:
        manager: ProxyManager = super().proxy_manager_for(*args, **kwargs)
        if type(manager) is ProxyManager:  # the one for SOCKS has connections of its own
            self._watch(manager)
        return manager

    @staticmethod
    def _watch(manager: PoolManager) -> None:
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}


class Session(requests.Session):
    """A session over watched connections that looks at no redirect, let alone follows one."""

    def __init__(self, user_agent: str) -> None:
        super().__init__()
        self.headers["User-Agent"] = user_agent
        self.headers["Accept-Encoding"] = "gzip, deflate"
        for prefix in ("https://", "http://"):
            self.mount(prefix, _Adapter(pool_maxsize=1))

    def resolve_redirects(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return iter(())


class Sessions:
    """The sessions of a client. One thread uses one at a time.

    So a session that an interrupt has left in any state is never used again, and no lock of its
    pool can hold up another thread.
    """

    def __init__(self, user_agent: str) -> None:
        self._user_agent = user_agent
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._for_reads: collections.deque[Session] = collections.deque()  # kept alive
        self._for_changes: collections.deque[Session] = collections.deque()  # not connected

    def take(self, reads: bool) -> Session:
        """Return a session for one request.

        Parameters:
            reads: whether the request changes nothing. One that does gets a new connection: it
                must not meet one that the server has closed, nor the rest of an earlier answer.
        """
        if self._pid != os.getpid():
            self._forget()  # a connection that a fork has shared must not be used by both sides
        try:
            return (self._for_reads if reads else self._for_changes).pop()
        except IndexError:
            return Session(self._user_agent)

    def put_back(self, session: Session, reads: bool) -> None:
        """Keep a session for another request."""
        (self._for_reads if reads else self._for_changes).append(session)

    def close(self) -> None:
        """Close the connections that are not in use."""
        if self._pid != os.getpid():
            return
        for sessions in (self._for_reads, self._for_changes):
            with contextlib.suppress(IndexError):  # another thread may have taken the last
                while True:
                    sessions.pop().close()


class UnusableAnswerError(Exception):
    """An answer that is not read to its end."""


def read_body(response: requests.Response, longest: float) -> bytes:
    """Read and decode the body of an answer, and no more than that.

    Parameters:
        response: whose body has not been read.
        longest: how many bytes, decoded, it may have.

    Raises:
        UnusableAnswerError: it has more, or an encoding that was not asked for.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ENCODINGS:
        raise UnusableAnswerError("the answer has an encoding that was not asked for")
    pieces, size = [], 0
    for piece in response.iter_content(PIECE):
        size += len(piece)
        if size > longest:
            raise UnusableAnswerError(
                f"the answer is larger than {longest / 1e6:g} MB; max_response_mb= allows more"
            )
        pieces.append(piece)
    return b"".join(pieces)


def never_left(error: Exception, left: bool) -> bool:
    """Whether a request that failed is sure not to have reached anybody."""
    if left:
        return False
    if exchange.connecting or isinstance(error, _UNSENT):
        return True
    return isinstance(reason_of(error), _UNSENT)


def reason_of(error: BaseException) -> Any:
    """Return what is behind an error of requests: urllib3's ``reason``, or its cause."""
    inner = error.args[0] if error.args else error
    return getattr(inner, "reason", inner)


# ==================================================================================================
# api.rate_limit
#
# Decide when the next request with a key may leave, for all who share the key.
# ==================================================================================================


# However long a pause a broken proxy may ask for, it is not remembered for longer than this.
LONGEST_PAUSE_KEPT = 3600.0
LONGEST_POLL = 0.25  # seconds between two looks of a request that waits
SHORTEST_ENTRY = 0.1  # seconds for which a request counts as waiting after its last look
# After a refusal a request is sent again after a random part of its interval between these two.
# A longer pause would leave the way to whoever refuses to slow down, and starve this one.
RETRY_SOONEST, RETRY_LATEST = 0.2, 0.6
LEARNING = 0.3  # how much the last request counts for the extra space between two requests
YIELD = 0.8  # how much of the extra space is left to the other programs at most
OUTCOMES = 20  # how many of the last answers are counted for the error message

Stepped = TypeVar("Stepped")


class PauseTooLongError(Exception):
    """The API asked for a longer pause than the caller has patience; carries the seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class DeadlinePassedError(Exception):
    """There is no slot before the caller's deadline."""


class Turn:
    """One request that waits for its slot, and keeps its place when it is sent again.

    Attributes:
        ticket: its place in the queue; None until it first waits.
        granted_at: monotonic time of its slot; None while it waits.
    """

    def __init__(
        self,
        interval: float,
        *,
        urgent: bool = False,
        spacing: tuple[str, float] | None = None,
        patience: float = math.inf,
    ) -> None:
        self.interval = interval  # seconds to keep from the request before and the one after
        self.urgent = urgent  # before all that are not, and whatever pause the API asked for
        self.spacing = spacing  # a name, and the seconds to keep from the last of that name
        self.patience = patience  # seconds of a pause that it may wait
        self.not_before = -math.inf
        self.ticket: int | None = None
        self.granted_at: float | None = None
        self.first_sent_at: float | None = None
        self.paused = -math.inf  # seconds of the API's pause that were left at the last look

    @property
    def holds_slot(self) -> bool:
        """Whether its slot has not passed."""
        return self.granted_at is not None and (
            time.monotonic() < self.granted_at + self.interval or not self.interval
        )

    @property
    def poll(self) -> float:
        """Seconds between two looks: several in each interval."""
        return min(LONGEST_POLL, max(0.001, self.interval / 4))


class Schedule:
    """The state of one rate limit: who waits, and when the last requests left.

    Every change is one step on plain numbers, so that it can be kept in memory or in a file. A
    request that waits renews its entry in ``waiting``; one that was interrupted or killed does not,
    and is skipped when its entry expires.
    """

    def __init__(self) -> None:
        self.last = -math.inf  # when the last request left, or got its slot
        self.interval = 0.0  # seconds that it keeps after itself
        self.extra = 0.0  # mean of what other programs take: seconds on top of the interval
        self.gap = 0.0  # the part of that which is kept after the last request
        self.paused_until = -math.inf
        self.spaced: dict[str, tuple[float, float]] = {}  # name -> (when the last left, seconds)
        self.next_ticket = 0
        # Ticket -> [0 if urgent else 1, when it is ready, its interval, when the entry expires].
        self.waiting: dict[int, list[float]] = {}

    def look(self, turn: Turn, now: float) -> float:
        """Grant the slot and return 0, or return the seconds until another look."""
        self.waiting = {t: entry for t, entry in self.waiting.items() if entry[3] > now}
        if turn.ticket is None:
            turn.ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        own = self._own_ready(turn)
        ready = self._ready(own, turn.interval)
        mine = (0 if turn.urgent else 1, turn.ticket)
        first = all(
            (entry[0], ticket) >= mine or self._ready(entry[1], entry[2]) > now
            for ticket, entry in self.waiting.items()
        )
        if ready <= now and first:
            self.waiting.pop(turn.ticket, None)
            self._left(turn, now)
            turn.granted_at = now
            return 0.0
        expires = now + max(SHORTEST_ENTRY, 4 * turn.poll)
        self.waiting[turn.ticket] = [mine[0], own, turn.interval, expires]
        return min(turn.poll, ready - now) if ready > now else turn.poll / 4

    def ready_at(self, turn: Turn) -> float:
        """Return when a turn may leave, should nobody be before it."""
        return self._ready(self._own_ready(turn), turn.interval)

    def leave(self, turn: Turn, left_at: float) -> None:
        """Note when the request really left: its space counts from then."""
        if left_at > (turn.granted_at or 0.0):
            self._left(turn, max(left_at, self.last))

    def pause(self, until: float) -> None:
        """Let no request leave until then, but for urgent ones."""
        self.paused_until = max(self.paused_until, until)

    def learn(self, refused_for: float) -> None:
        """Adapt the space between requests to what other programs with the same key take.

        Parameters:
            refused_for: seconds from the first refusal of a request until it was accepted.
        """
        self.extra = (1 - LEARNING) * self.extra + LEARNING * (self.gap + refused_for)
        if self.extra < 0.01 * self.interval:
            self.extra = 0.0

    def _own_ready(self, turn: Turn) -> float:
        ready = turn.not_before
        if turn.spacing is not None:
            name, seconds = turn.spacing
            last, its_seconds = self.spaced.get(name, (-math.inf, 0.0))
            ready = max(ready, last + max(seconds, its_seconds))
        return ready if turn.urgent else max(ready, self.paused_until)

    def _ready(self, own: float, interval: float) -> float:
        return max(own, self.last + max(self.interval, interval) + self.gap)

    def _left(self, turn: Turn, at: float) -> None:
        self.last, self.interval = at, turn.interval
        self.gap = random.uniform(0.0, YIELD * self.extra) if self.extra else 0.0
        if turn.spacing is not None:
            self.spaced[turn.spacing[0]] = (at, turn.spacing[1])


class RateLimiter(Protocol):
    """What a client needs of a rate limiter, in memory, in a file or on another machine."""

    level: str  # as describe() tells it

    def wait(self, turn: Turn, deadline: float = math.inf) -> None: ...

    def leave(self, turn: Turn) -> None: ...

    def refused(self, turn: Turn, retry_after: float | None) -> None: ...

    def accepted(self, turn: Turn) -> None: ...


class ProcessStore:
    """Keeps a schedule in memory, for the threads of this process."""

    level = "this process"

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for a step, never while waiting
        self._schedule = Schedule()

    def update(self, step: Callable[[Schedule], Stepped]) -> Stepped:
        """Make one step."""
        with self._lock:
            return step(self._schedule)


class Store(Protocol):
    """Where a schedule is kept."""

    @property
    def level(self) -> str: ...

    def update(self, step: Callable[[Schedule], Stepped]) -> Stepped: ...


class ScheduledRateLimiter:
    """A rate limiter whose schedule is kept in memory or in a file.

    Interrupts can end a wait at any line: what is left behind is an entry that expires.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._outcomes: collections.deque[bool] = collections.deque(maxlen=OUTCOMES)
        self._adapted = False  # whether the schedule keeps extra space

    @property
    def level(self) -> str:
        """Who keeps the limit together."""
        return self._store.level

    @property
    def recently_refused(self) -> tuple[int, int]:
        """How many of the last requests were refused for their pace, and of how many."""
        return sum(self._outcomes), len(self._outcomes)

    def wait(self, turn: Turn, deadline: float = math.inf) -> None:
        """Wait until a request may leave.

        Raises:
            PauseTooLongError: the API asked for a longer pause than the turn has patience.
            DeadlinePassedError: no slot is free before ``deadline`` (monotonic time).
        """
        turn.granted_at = None
        while seconds := self._store.update(lambda schedule: _look_once(schedule, turn, deadline)):
            time.sleep(min(seconds, turn.poll))
        if turn.paused > turn.patience and not turn.urgent:
            raise PauseTooLongError(turn.paused)
        if turn.granted_at is None:
            raise DeadlinePassedError

    def leave(self, turn: Turn) -> None:
        """Note that the request leaves, or has failed to: then it has had its slot all the same."""
        left_at = time.monotonic()
        if turn.first_sent_at is None:
            turn.first_sent_at = left_at
        self._store.update(lambda schedule: schedule.leave(turn, left_at))

    def refused(self, turn: Turn, retry_after: float | None) -> None:
        """Slow down after a refusal for the pace."""
        self._outcomes.append(True)
        self._adapted = True
        pause = turn.interval * random.uniform(RETRY_SOONEST, RETRY_LATEST)
        if retry_after is not None:
            pause += min(retry_after, LONGEST_PAUSE_KEPT)
        until = time.monotonic() + pause
        self._store.update(lambda schedule: schedule.pause(until))

    def accepted(self, turn: Turn) -> None:
        """Speed up again, step by step."""
        was_refused = bool(self._outcomes) and self._outcomes[-1]
        self._outcomes.append(False)
        if self._adapted:
            first = turn.first_sent_at
            refused_for = time.monotonic() - first if was_refused and first is not None else 0.0
            self._adapted = self._store.update(lambda schedule: _learn_from(schedule, refused_for))


def _look_once(schedule: Schedule, turn: Turn, deadline: float) -> float:
    """Look once; return 0 also for a request that can't leave in time, and takes no place then."""
    now = time.monotonic()
    turn.paused = schedule.paused_until - now
    too_long = turn.paused > turn.patience and not turn.urgent
    if too_long or max(now, schedule.ready_at(turn)) > deadline:
        schedule.waiting.pop(turn.ticket if turn.ticket is not None else -1, None)
        return 0.0
    return schedule.look(turn, now)


def _learn_from(schedule: Schedule, refused_for: float) -> bool:
    schedule.learn(refused_for)
    return schedule.extra > 0


# ==================================================================================================
# api.shared_limit
#
# Keep a rate limit in a file, for all processes of this user on this machine.
# ==================================================================================================


LIMIT_PREFIX = "rate-limit-"
LONGEST_SCHEDULE = 65536  # bytes; a longer file is none of ours
UNUSED_AFTER = 86_400.0  # seconds after which the file of a key is removed
LOCK_PATIENCE_LIMIT = 1.0  # seconds; the lock is held for microseconds
TRY_FILE_AGAIN = 30.0  # seconds after which a file that could not be used is tried again
VERSION = 1

Step = TypeVar("Step")


class FileStore:
    """Keeps a schedule in a file. Locked for a step, never while somebody waits or sends.

    Where the file can't be used, the schedule is kept in memory, after one warning.

    Parameters:
        path: of the file; its name does not give the key away.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # of the threads: they share the handle, and so its lock
        self._handle: int | None = None
        self._pid = os.getpid()
        self._memory = ProcessStore()
        self._failed_at: float | None = None
        self._warned = False

    @property
    def level(self) -> str:
        """Who keeps the limit together."""
        if self._failed_at is None:
            return f"all processes on this machine, by {self._path}"
        seconds = time.monotonic() - self._failed_at
        return f"this process, since {self._path} could not be used {seconds:.0f} s ago"

    def update(self, step: Callable[[Schedule], Step]) -> Step:
        """Make one step."""
        failed_at = self._failed_at
        if failed_at is not None and time.monotonic() - failed_at < TRY_FILE_AGAIN:
            return self._memory.update(step)
        try:
            with self._lock:
                result = self._step(step)
            self._failed_at = None
            return result
        except OSError as error:
            self._failed_at = time.monotonic()
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the rate limit is kept for this process alone, since %s can't be used: %s",
                    self._path,
                    error,
                )
            return self._memory.update(step)

    def _step(self, step: Callable[[Schedule], Step]) -> Step:
        handle = self._open()
        if not lock_file(handle, LOCK_PATIENCE_LIMIT):
            raise OSError("another process does not let go of it")
        try:
            schedule = load(os.pread(handle, LONGEST_SCHEDULE, 0), time.monotonic())
            result = step(schedule)
            text = dump(schedule)
            if os.pwrite(handle, text, 0) != len(text):
                raise OSError("the disk is full")
            return result
        finally:
            unlock_file(handle)

    def _open(self) -> int:
        """Return the open file: not the one of a parent process, and none that was removed."""
        handle = self._handle
        if handle is not None and self._pid == os.getpid() and os.fstat(handle).st_nlink:
            return handle
        if handle is not None:
            self._handle = None
            with contextlib.suppress(OSError):
                os.close(handle)
        self._pid = os.getpid()
        new = not self._path.exists()
        self._handle = handle = open_private(self._path)
        if new:
            remove_unused(self._path.parent)
        return handle

    def __del__(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.close(self._handle)


def dump(schedule: Schedule) -> bytes:
    """Return a schedule as a line of text; what follows in the file is of an earlier one."""
    content = [
        VERSION,
        boot_id(),
        schedule.last,
        schedule.interval,
        schedule.extra,
        schedule.gap,
        schedule.paused_until,
        schedule.spaced,
        schedule.next_ticket,
        list(schedule.waiting.items()),
    ]
    return json.dumps(content).encode() + b"\n"


def load(text: bytes, now: float) -> Schedule:
    """Return the schedule of a file; a torn or foreign one, or one of an earlier boot, starts anew.

    A new one lets the first request wait for an interval: somebody may just have sent one.
    """
    schedule = Schedule()
    if not text:
        return schedule
    try:
        version, boot, *numbers, spaced, next_ticket, waiting = json.loads(
            text[: text.index(b"\n")]
        )
        last, interval, extra, gap, paused_until = map(float, numbers)
        known = version == VERSION and boot == boot_id()
        schedule.spaced = {str(n): (float(at), float(s)) for n, (at, s) in spaced.items()}
        schedule.next_ticket = int(next_ticket)
        schedule.waiting = {int(t): [float(x) for x in entry] for t, entry in waiting}
        fine = all(len(entry) == 4 for entry in schedule.waiting.values())
        if not (known and fine) or any(map(math.isnan, (last, interval, extra, gap, paused_until))):
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        schedule = Schedule()
        schedule.last = now
        return schedule
    # The clock may have started anew without telling: nothing lies further ahead than it can.
    schedule.interval = max(0.0, interval)
    schedule.last = min(last, now)
    schedule.extra, schedule.gap = max(0.0, extra), min(max(0.0, gap), LONGEST_PAUSE_KEPT)
    schedule.paused_until = min(paused_until, now + LONGEST_PAUSE_KEPT)
    schedule.spaced = {n: (min(at, now), s) for n, (at, s) in schedule.spaced.items()}
    return schedule


def remove_unused(folder: Path) -> None:
    """Remove the files of keys that nobody has used for a day."""
    before = time.time() - UNUSED_AFTER
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(LIMIT_PREFIX):
                with contextlib.suppress(OSError):
                    path = folder / name
                    if path.stat().st_mtime < before:
                        path.unlink()


# ==================================================================================================
# api.limiters
#
# Choose who keeps the rate limit: this process, this machine, or Redis.
# ==================================================================================================


_limiters: dict[tuple[str, str], ScheduledRateLimiter] = {}

if hasattr(os, "register_at_fork"):
    # Another thread may have held a lock of theirs at the fork.
    os.register_at_fork(after_in_child=_limiters.clear)


def limiter_for(base_url: str, api_key: str, folder: Path | None) -> ScheduledRateLimiter:
    """Return the rate limiter that all requests with this key to this API share.

    Parameters:
        base_url, api_key: what the limit belongs to.
        folder: the state folder; None for a limit of this process alone.
    """
    # A digest, so that no key stands in a table of the process, nor in the name of a file.
    account = f"{canonical_url(base_url)}\n{api_key}"
    digest = hashlib.sha256(f"rate limit\n{account}".encode()).hexdigest()[:32]
    place = (digest, str(folder or ""))
    found = _limiters.get(place)
    if found is None:
        store = ProcessStore() if folder is None else FileStore(folder / f"{LIMIT_PREFIX}{digest}")
        # One step, and so without a lock: of two made at once, both callers get the first.
        found = _limiters.setdefault(place, ScheduledRateLimiter(store))
    return found


# ==================================================================================================
# api.retry
#
# What an answer, or the lack of one, means: an envelope, an error, and whether to ask again.
# ==================================================================================================


# The retry policy. What it means to a user stands in the README under "Retries".
RETRY_STATUSES = frozenset({500, 502, 503, 504, 520, 522})  # without a usable envelope
# Codes with which nothing was done, also where they come with HTTP 5xx; code 6 that says why, too.
NOTHING_DONE = frozenset({3, 4, 5})


class Failure:
    """One send that did not end well."""

    def __init__(self, error: CloreError, again: bool, rate_limited: bool = False) -> None:
        self.error = error
        self.again = again  # whether it may be sent again
        self.rate_limited = rate_limited


def excerpt(body: bytes, secrets: tuple[str, ...] = (), limit: int = 160) -> str:
    """The start of an HTML or text answer, without its tags and secrets, on one line."""
    import html  # for errors only, and not cheap

    text = without(body[:100_000].decode("utf-8", "replace"), secrets)[:4000]
    text = re.sub(r"(?is)<(script|style|head)\b.*?</\1\s*>", " ", text)
    text = html.unescape(re.sub(r"<[^<>]*>?", " ", text))
    return printable(" ".join(text.split()), limit)


def _retry_after(headers: Any) -> float | None:
    """Seconds from a Retry-After header; a date counts from the answer's own Date."""
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", value):
        return float(value)
    until, now = unix_time(value), unix_time(headers.get("Date"))
    return None if until is None or now is None else max(0.0, until - now)


def classify_error(call: Call, error: Exception, left_at: float | None) -> Failure:
    """What to make of a send that failed; ``left_at`` tells whether anything left."""
    reason = re.sub(r"^<?_?\w*(Connection|Pool)\(.*?\)[^:]*: ", "", str(reason_of(error)))
    cause = printable(without(f"{type(error).__name__}: {reason}", call.secrets), 300)
    unsent = never_left(error, left_at is not None)
    failed = CloreConnectionError(cause) if unsent else call.lost(cause)
    failed.sent_at = None if unsent else left_at
    # A new one: the error itself holds the request, and what the server sent, which may repeat it.
    kind = type(error) if isinstance(error, requests.RequestException) else requests.ConnectionError
    failed.__cause__ = kind(cause)
    return Failure(failed, again=unsent or call.repeatable)


def classify_unusable(call: Call, response: requests.Response | None, problem: str) -> Failure:
    """What to make of an answer that was not read to its end; asking again would bring another."""
    status = 0 if response is None else response.status_code
    if not call.repeatable:
        return Failure(call.lost(f"HTTP {status}: {problem}"), again=False)
    error = InvalidResponseError(
        -1,
        f"HTTP {status}: {problem}",
        {},
        http_status=status,
        endpoint=call.endpoint,
        retryable=False,
        secrets=call.secrets,
    )
    return Failure(error, again=False)


def classify(call: Call, response: requests.Response, body: bytes) -> Envelope | Failure:
    """What to make of an answer."""
    decoded = _decode(body)
    status = response.status_code
    if isinstance(decoded, dict) and type(decoded.get("code")) is int:
        if decoded["code"] == 0:
            return Envelope(decoded)
        return _error_envelope(call, response, decoded)
    if status == 429:
        return _too_fast(call, response, {})
    broken = status < 300 and decoded is None
    again = call.repeatable and (status in RETRY_STATUSES or broken)
    error = _no_envelope(call, response, body, decoded, again)
    if not call.repeatable and (status >= 500 or status < 300):
        lost = call.lost(f"HTTP {status}: {error.error or 'JSON without a code'}")
        lost.__cause__ = error
        return Failure(lost, again=False)
    return Failure(error, again)


def _error_envelope(call: Call, response: requests.Response, envelope: dict[str, Any]) -> Failure:
    code = envelope["code"]
    if code == 5:
        return _too_fast(call, response, envelope)
    status, ambiguous = response.status_code, code == 1 and not call.repeatable
    error = api_error(
        envelope,
        http_status=status,
        endpoint=call.endpoint,
        hint=CREATE_ORDER_CODE_1 if ambiguous and call.name == "create_order" else None,
        retryable=False if ambiguous else None,
        secrets=call.secrets,
    )
    refused = code in NOTHING_DONE or (code == 6 and error.error)
    if status >= 500 and not (call.repeatable or ambiguous or refused):
        lost = call.lost(f"HTTP {status}: {error.args[0]}")
        lost.__cause__ = error
        return Failure(lost, again=False)
    return Failure(error, again=code == 1 and not ambiguous)


def _too_fast(call: Call, response: requests.Response, envelope: dict[str, Any]) -> Failure:
    error = RateLimitError(
        5,
        error_text(envelope),
        envelope,
        http_status=response.status_code,
        endpoint=call.endpoint,
        secrets=call.secrets,
    )
    error.retry_after = _retry_after(response.headers)
    return Failure(error, again=True, rate_limited=True)


def _no_envelope(
    call: Call, response: requests.Response, body: bytes, decoded: Any, again: bool
) -> CloreAPIError:
    status, hint = response.status_code, None
    text: str | None = f"HTTP {status}: {excerpt(body, call.secrets) or 'an empty answer'}"
    if 300 <= status < 400:
        text = f"HTTP {status}: a redirect to {_target(response)}, which is not followed"
    elif isinstance(decoded, dict):
        text = error_text(decoded)
    elif b"error code: 1010" in body[:4000]:
        hint = "the proxy in front of the API refused the User-Agent"
    return InvalidResponseError(
        -1,
        text,
        decoded if isinstance(decoded, dict) else {},
        http_status=status,
        endpoint=call.endpoint,
        hint=hint,
        retryable=again,
        secrets=call.secrets,
    )


def _target(response: requests.Response) -> str:
    try:
        host = urlsplit(response.headers.get("Location", "")).hostname
    except ValueError:
        host = None
    return f"host {printable(host, 100)}" if host else "nowhere"


def _decode(body: bytes) -> Any:
    """The JSON of an answer, or None; decoded once."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


# ==================================================================================================
# api.retries
#
# Count the sends of one call, and decide when to give up.
# ==================================================================================================


class Retries:
    """What became of the sends of one call.

    Failures count against ``max_retries``. Refusals for the pace do not: they have a patience.

    Attributes:
        sends: how many times it was sent.
        failures: how many of them failed for another reason than the pace.
        refusals: how many were refused for their pace.
    """

    def __init__(self, max_retries: int, patience: float) -> None:
        self._max_retries = max(1, max_retries)
        self._patience = patience  # seconds from the first refusal on
        self._refused_at: float | None = None
        self._last: Failure | None = None
        self.sends = self.failures = self.refusals = 0

    def note(self, failure: Failure) -> None:
        """Take a send that failed."""
        self.sends += 1
        if failure.rate_limited:
            self.refusals += 1
            self._refused_at = self._refused_at or time.monotonic()
        else:
            self.failures += 1
        failure.error.sends = self.sends
        if self._last is not None and failure.error.sent_at is None:
            failure.error.sent_at = self._last.error.sent_at  # an earlier send did leave
        self._last = failure

    def patience_left(self) -> float:
        """Return the seconds that it may still wait after refusals for the pace."""
        if self._refused_at is None:
            return self._patience
        return max(0.0, self._refused_at + self._patience - time.monotonic())

    def raise_if_over(self, failure: Failure, recently_refused: tuple[int, int]) -> None:
        """Raise the error of a call that is not sent again."""
        if not failure.again:
            raise failure.error
        if not failure.rate_limited:
            if self.failures >= self._max_retries:
                raise self._gave_up(failure.error)
            return
        told = failure.error.retry_after or 0.0
        if self.patience_left() <= told:
            error = self._gave_up(failure.error)
            refused, of = recently_refused
            if refused > 1:
                error.args = (
                    f"{error}\n{refused} of the last {of} requests were refused for their pace: "
                    "other programs use this key. Let them share a rate limit with "
                    "rate_limiter='redis://...', or raise rate_limit=",
                )
            raise error

    def not_sent(self, call: Call, reason: DeadlinePassedError | PauseTooLongError) -> CloreError:
        """Make the error for a request that was not sent, or not again."""
        last = self._last
        if isinstance(reason, PauseTooLongError) and last is None:
            error = RateLimitError(
                5,
                endpoint=call.endpoint,
                hint=f"the API asked for a pause, of which {reason.seconds:.0f} s are left; "
                "nothing was sent",
            )
            error.retry_after, error.sends = reason.seconds, 0
            return error
        if last is None:
            return CloreConnectionError(
                f"{call.label} was not sent: its time was over before its turn came"
            )
        if isinstance(reason, PauseTooLongError) and reason.seconds < math.inf:
            last.error.retry_after = reason.seconds
        return self._gave_up(last.error)

    def _gave_up(self, error: CloreError) -> CloreError:
        """Return ``error``, saying that asking again did not help."""
        error.args = (f"Clore API request failed after {self.sends} retries: {error}",)
        return error


# ==================================================================================================
# api.request
#
# Make API calls: key, pace, retries, and an envelope or an error at the end.
# ==================================================================================================


# How long a call may take, however slowly its answer drips.
ANSWER_TIMEOUTS = 3.0  # times ``timeout``, for one exchange
LONGEST_CANCEL_PAUSE = 30.0  # seconds between two cancels that are refused for their pace

_UNKNOWN: Any = object()  # a folder that was not looked up yet

H = TypeVar("H", bound="HTTPClient")
Returned = TypeVar("Returned")


class Limits:
    """The limits that a caller sets for its API calls.

    Attributes:
        deadline: monotonic time; no request starts after it, and none takes longer.
        urgent: requests leave whatever pause the server has asked for.
    """

    def __init__(self, deadline: float = math.inf, urgent: bool = False) -> None:
        self.deadline = deadline
        self.urgent = urgent


_limits: contextvars.ContextVar[Limits] = contextvars.ContextVar("limits", default=Limits())  # noqa: B039


def limited(
    call: Callable[[], Returned], *, deadline: float = math.inf, urgent: bool = False
) -> Returned:
    """Make a call whose requests have a deadline, or ignore the server's pauses.

    Parameters:
        call: what makes the requests.
        deadline: monotonic time; an earlier one of the caller stays.
        urgent: whether the requests end, or help to end, what costs money.
    """
    outer = _limits.get()
    limits = Limits(min(deadline, outer.deadline), urgent or outer.urgent)

    def run() -> Returned:
        _limits.set(limits)
        return call()

    # A context of its own, which is dropped with the call: an interrupt leaves nothing behind.
    return contextvars.copy_context().run(run)


def backoff_delay(sends: int, first: float, longest: float) -> float:
    """Return the seconds to wait after some sends: exponential backoff with full jitter, capped."""
    return random.uniform(0.0, min(longest, first * 2.0 ** min(sends - 1, 32)))


def cancel_delay(sends: int, first: float) -> float:
    """Return the seconds to wait after a cancel was refused for its pace: 1, 2, 4 ... 30."""
    return float(min(LONGEST_CANCEL_PAUSE, first * 2.0 ** min(sends, 32)))


class HTTPClient:
    """Owns the settings, the connections and ``_request``, the one way to the API.

    Attributes:
        server_clock: seconds that the server's clock is ahead of this one; None if not known.
    """

    BASE_URL = "https://api.clore.ai"

    def __init__(
        self,
        api_key: str | None,
        timeout: Timeout,
        rate_limit: float,
        max_retries: int,
        *,
        base_url: str | None,
        create_order_interval: float,
        backoff: float,
        max_backoff: float,
        user_agent: str | None,
        max_response_mb: float,
        rate_limit_wait: float,
        state_dir: str | os.PathLike[str] | None,
    ) -> None:
        key, _ = self._key_source = find_key(api_key)
        self._headers: dict[str, str] = {"auth": key} if key else {}
        self._url_source: tuple[str | None, str] = (None, "nowhere")
        if base_url is not None:
            self._set_base_url(check_text("base_url", base_url), "base_url", "argument")
        elif from_environment := os.environ.get(URL_VARIABLE):
            source = f"environment variable {URL_VARIABLE}"
            self._set_base_url(from_environment, URL_VARIABLE, source)
        self.timeout = check_timeout("timeout", timeout)
        self.rate_limit = check_interval("rate_limit", rate_limit)
        self.max_retries = check_count("max_retries", max_retries, minimum=1)
        self.create_order_interval = check_number(
            "create_order_interval", create_order_interval, unit="seconds"
        )
        self.rate_limit_wait = check_number(
            "rate_limit_wait", rate_limit_wait, infinite=True, unit="seconds"
        )
        self._state_dir = check_state_dir("state_dir", state_dir)
        self._folder: Path | None = _UNKNOWN
        self.backoff = check_interval("backoff", backoff)
        self.max_backoff = check_interval("max_backoff", max_backoff)
        self.max_response_mb = check_number(
            "max_response_mb", max_response_mb, above=True, infinite=True, unit="megabytes"
        )
        self._user_agent = f"clore-client/{__version__} {requests.utils.default_user_agent()}"
        if user_agent is not None:
            if not (check_text("user_agent", user_agent).isascii() and user_agent.isprintable()):
                raise ValueError(f"user_agent must be printable ASCII, not {user_agent!r}")
            self._user_agent += f" {user_agent}"
        self._sessions = Sessions(self._user_agent)
        self.server_clock: float | None = None

    def __copy__(self: H) -> H:
        """Return a client of its own with the same settings and key."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._sessions = Sessions(self._user_agent)
        twin._headers = dict(self.headers)
        return twin

    def __deepcopy__(self: H, memo: dict[int, Any]) -> H:
        return self.__copy__()

    def __getstate__(self) -> Any:
        # A pickle without the key would load as a client of whatever account is at hand there.
        raise TypeError(
            f"a {type(self).__name__} can't be pickled, for its key would be in the pickle: make "
            f"one where it is needed, with {type(self).__name__}.from_env()"
        )

    def close(self) -> None:
        """Close the connections. The client can be used again; it then opens new ones."""
        self._sessions.close()

    # --- settings that may be set later ---

    def _set_base_url(self, url: str, name: str, source: str) -> None:
        url = check_base_url(url, name)
        self._url_source = (url, source)
        try:
            self.BASE_URL = url
        except AttributeError:  # a subclass has made it a property: that one decides
            logger.debug("BASE_URL of %s can't be set", type(self).__name__)

    @property
    def base_url(self) -> str:
        """Return ``BASE_URL`` as it is now, checked, without a trailing slash."""
        return check_base_url(self.BASE_URL, "BASE_URL")

    @property
    def api_key(self) -> str | None:
        """The key, or None. Setting it changes ``headers``."""
        named = ((k, v) for k, v in self.headers.items() if isinstance(k, str))
        return next((v for k, v in named if k.lower() == "auth"), None)

    @api_key.setter
    def api_key(self, key: str | None) -> None:
        rest = {k: v for k, v in self.headers.items() if k.lower() != "auth"}
        if key:
            rest["auth"] = clean_key(key, "the attribute api_key")
        self._headers = rest

    @property
    def headers(self) -> dict[str, str]:
        """The headers of each request: ``{"auth": api_key}``, or ``{}`` without a key."""
        return self._headers

    @headers.setter
    def headers(self, headers: dict[str, str]) -> None:
        checked = check_headers("headers", headers)
        self._headers = {k: Secret.of(v) if k.lower() == "auth" else v for k, v in checked.items()}

    # --- one call ---

    def _request(
        self,
        method: str,
        endpoint: str,
        params: dict[str, Any] | None = None,
        json: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Make one paced, retried API call; the way to endpoints that have no method of their own.

        Parameters:
            method: ``"GET"`` or ``"POST"``.
            endpoint: the path, as ``"/v1/wallets"``.
            params: the query.
            json: the body.
            **kwargs: for requests; ``headers`` are merged with the client's, ``timeout``
                overrides its timeout (seconds, or a ``(connect, read)`` pair).

        Returns:
            The decoded envelope, whose ``code`` is 0.

        Raises:
            CloreAPIError: the API answered with an error; see the subclasses.
            CloreConnectionError: no answer came, and asking again did not help.
            OutcomeUnknownError: a POST that changes something may or may not have been carried out.
            ValueError, TypeError: an argument can't be right; nothing was sent.

        Example:
            >>> client._request("GET", "/v1/wallets")["wallets"]
        """
        call = self._prepare(method, endpoint, params, json, kwargs)
        limiter = limiter_for(call.base_url, call.key, self._state_folder())
        turn = self._turn(call)
        retries = Retries(self.max_retries, self.rate_limit_wait)
        while True:
            turn.patience = retries.patience_left()
            try:
                outcome = self._send(call, limiter, turn)
            except (DeadlinePassedError, PauseTooLongError) as reason:
                raise retries.not_sent(call, reason) from None
            if isinstance(outcome, Envelope):
                limiter.accepted(turn)
                outcome.sends = retries.sends + 1
                return outcome
            retries.note(outcome)
            turn.not_before = time.monotonic() + self._delay(call, outcome, retries, limiter, turn)
            retries.raise_if_over(outcome, limiter.recently_refused)
            logger.warning(
                "%s: send %d failed, is sent again: %s", call.label, retries.sends, outcome.error
            )

    def _turn(self, call: Call) -> Turn:
        spaced = call.name in SPACED_POSTS and not call.repeatable
        return Turn(
            self.rate_limit,
            urgent=call.urgent,
            spacing=(call.name, self.create_order_interval) if spaced else None,
        )

    def _state_folder(self) -> Path | None:
        if self._folder is _UNKNOWN:
            self._folder = state_folder(self._state_dir)
        return self._folder

    def _prepare(
        self, method: str, endpoint: str, params: Any, json: Any, options: dict[str, Any]
    ) -> Call:
        session = self._sessions.take(reads=True)
        call = prepare_call(
            session,
            method,
            endpoint,
            params,
            json,
            options,
            base_url=self.base_url,
            headers=self.headers,
            timeout=self.timeout,
            urgent=_limits.get().urgent,
        )
        self._sessions.put_back(session, reads=True)
        return call

    def _delay(
        self,
        call: Call,
        failure: Failure,
        retries: Retries,
        limiter: ScheduledRateLimiter,
        turn: Turn,
    ) -> float:
        """Return the seconds to wait after a failure."""
        if not failure.rate_limited:
            return backoff_delay(retries.failures, self.backoff, self.max_backoff)
        limiter.refused(turn, failure.error.retry_after)
        # Other requests wait as the limiter was told; a cancel does not wait for that.
        return cancel_delay(retries.refusals, self.backoff) if call.urgent else 0.0

    def _send(self, call: Call, limiter: ScheduledRateLimiter, turn: Turn) -> Envelope | Failure:
        """Send once, when it is this request's turn."""
        caller_deadline = _limits.get().deadline
        limiter.wait(turn, caller_deadline)
        started_at = time.monotonic()
        settings, deadline = dict(call.settings), caller_deadline
        if (read_timeout := longest_part(settings["timeout"])) is not None:
            deadline = min(deadline, started_at + ANSWER_TIMEOUTS * read_timeout)
        if deadline < math.inf:
            left = max(deadline - started_at, 0.001)
            settings["timeout"] = shortened(settings["timeout"], left)

        def keep_turn() -> None:
            if not turn.holds_slot:  # connecting took longer than the slot
                limiter.wait(turn, deadline)

        exchange.begin(keep_turn, lambda: limiter.leave(turn), deadline)
        answer = self._exchange(call, settings)
        if isinstance(answer, Failure):
            return answer
        response, body = answer
        # Connections of a proxy for SOCKS do not tell when a request left.
        sent_at = started_at if exchange.left_at is None else exchange.left_at
        return self._classify(call, response, body, sent_at)

    def _classify(
        self, call: Call, response: requests.Response, body: bytes, sent_at: float
    ) -> Envelope | Failure:
        received_at = time.monotonic()
        logger.log(
            logging.INFO if call.name in LOGGED_POSTS else logging.DEBUG,
            "%s: HTTP %d, %d bytes in %.3f s",
            call.label,
            response.status_code,
            len(body),
            received_at - sent_at,
        )
        outcome = classify(call, response, body)
        if isinstance(outcome, Envelope):
            outcome.date = response.headers.get("Date")
            outcome.sent_at, outcome.received_at = sent_at, received_at
            server_time = outcome.server_time_at(received_at)
            if server_time is not None:
                self.server_clock = server_time + 0.5 - time.time()
        else:
            outcome.error.sent_at = sent_at
        return outcome

    def _exchange(
        self, call: Call, settings: dict[str, Any]
    ) -> tuple[requests.Response, bytes] | Failure:
        """Send a request, and read its answer."""
        reads = call.request.method in ("GET", "HEAD")
        session = self._sessions.take(reads)
        response = None
        answer: tuple[requests.Response, bytes] | Failure
        try:
            response = session.send(call.request, **settings)
            answer = response, read_body(response, self.max_response_mb * 1e6)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            answer = classify_error(call, error, exchange.left_at)
        except UnusableAnswerError as error:
            answer = classify_unusable(call, response, str(error))
        except OSError as error:  # a CA bundle or a certificate that is not there
            raise ConfigurationError(f"{call.label} was not sent: {error}") from error
        if isinstance(answer, Failure) and response is not None:
            response.close()
        self._sessions.put_back(session, reads)
        return answer


# ==================================================================================================
# market.spot
#
# Bids: from USD per hour to what the API takes, and never a number of which that is not sure.
# ==================================================================================================


# A price per day taken for one per hour is 24 times too high; an honest bid is far below this.
MAX_TIMES_ON_DEMAND = 10.0
ROUNDING = 1e-9  # what a price may lose on its way between per day and per hour


class MarketData:
    """What one client knows of one API: its form, its exchange rates, the prices it listed."""

    def __init__(self) -> None:
        self.rates = RateBook()
        self.listed: dict[int, float] = {}  # server id -> on-demand USD per hour
        self.live = False  # whether an answer was positively in the live form
        self._documented_at = -math.inf

    @property
    def documented(self) -> bool:
        """Whether an answer of the last minutes was positively in the documented form."""
        return time.monotonic() - self._documented_at <= RATE_MAX_AGE

    def observe(self, answer: dict[str, Any]) -> None:
        """Take from an answer of any kind that it is in the live form."""
        if is_live(answer):
            self.live = True
            self._documented_at = -math.inf

    def observe_spot(self, answer: dict[str, Any]) -> None:
        """Take the form and the rates from an answer of ``spot_marketplace``."""
        market = answer.get("market")
        if is_live(answer):
            self.live = True
            self._documented_at = -math.inf
            if isinstance(market, dict):
                self.rates.tell(market.get("currency_rates_in_usd"))
        elif isinstance(market, dict) and market:
            # An empty one would show no marker either: it is no evidence.
            self.rates = RateBook()
            self._documented_at = time.monotonic()

    def check_bid_price(
        self, name: str, usd_per_hour: float, server_id: int | None, allow_any: bool
    ) -> None:
        """Warn about a bid above the server's on-demand price; refuse one far above it.

        Checks nothing where that price is not known.

        Parameters:
            name: the argument that the bid came in, for the error.
            usd_per_hour: the bid.
            server_id: the server that the bid is for.
            allow_any: whether to send a bid however far above it is.

        Raises:
            ValueError: the bid is more than ten times the on-demand price.
        """
        listed = None if server_id is None else self.listed.get(server_id)
        if listed is None or usd_per_hour <= listed * (1 + ROUNDING):
            return
        highest = MAX_TIMES_ON_DEMAND * listed
        if usd_per_hour > highest * (1 + ROUNDING) and not allow_any:
            raise ValueError(
                f"{name} must be at most {highest:g} USD per hour, {MAX_TIMES_ON_DEMAND:g} times "
                f"the on-demand price of server {server_id} ({listed:g}), not {usd_per_hour!r}: is "
                "it a price per day? Pass allow_above_on_demand=True to bid it anyway"
            )
        logger.warning(
            "%s=%r USD per hour is above the on-demand price of server %s, %g USD per hour",
            name,
            usd_per_hour,
            server_id,
            listed,
        )

    def wire_bid(self, usd_per_hour: float, currency: str, server_id: int) -> float:
        """A bid as the API takes it: per day in ``currency``, or as it is in the documented form.

        Raises:
            RateUnknownError: neither the form nor a rate is known for sure.
        """
        if self.documented:
            logger.info("bid for server %d: %g USD per hour", server_id, usd_per_hour)
            return usd_per_hour
        rate = positive(self.rates.fresh().get(currency))
        if rate is None:
            raise RateUnknownError(
                f"no exchange rate for {currency} came with the spot market of server {server_id}: "
                "nothing was bid"
            )
        bid = bid_per_day(usd_per_hour, rate)
        logger.info(
            "bid for server %d: %g USD per hour = %.8g %s per day (1 %s = %g USD)",
            server_id,
            usd_per_hour,
            bid,
            currency,
            currency,
            rate,
        )
        return bid


def surely_documented(order: Order) -> bool:
    """Whether an order came in the documented form, with a field that only that one has."""
    return order.is_live is False and any(
        name in order.wire for name in ("status", "connection", "renting_server")
    )


def with_hourly_offers(answer: dict[str, Any]) -> dict[str, Any]:
    """A ``spot_marketplace`` answer whose offers carry ``usd_per_hour`` as well.

    A ``bid`` is per day in the offer's currency, and is turned by the rates of the same answer.
    """
    market = answer.get("market")
    if not isinstance(market, dict) or not isinstance(market.get("offers"), list):
        return answer
    live, rates = is_live(answer), RateBook()
    rates.tell(market.get("currency_rates_in_usd"))

    def hourly(offer: dict[str, Any]) -> float | None:
        if live:
            usd_per_day = rates.usd(positive(offer.get("bid")), offer.get("currency"))
            return None if usd_per_day is None else per_hour(usd_per_day)
        stated = (positive(offer.get(k)) for k in ("usd_per_hour", "spot_price", "price"))
        return next((price for price in stated if price is not None), None)

    answer["market"] = {
        **market,
        "offers": [{**offer, "usd_per_hour": hourly(offer)} for offer in dicts(market["offers"])],
    }
    return answer


# ==================================================================================================
# market.market
#
# Read the marketplace, and remember the prices and exchange rates that it tells.
# ==================================================================================================


class Requester(Protocol):
    """What reading the marketplace needs of a client."""

    @property
    def base_url(self) -> str: ...

    def _request(
        self,
        method: str,
        endpoint: str,
        params: dict[str, Any] | None = None,
        json: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]: ...


class Market:
    """The marketplace of the API that a client uses."""

    def __init__(self, client: Requester) -> None:
        self._client = client
        self._by_url: dict[str, MarketData] = {}  # base URL -> what its answers told

    @property
    def data(self) -> MarketData:
        """What is known of the API behind the base URL of this moment."""
        return self._by_url.setdefault(self._client.base_url, MarketData())

    def read(self) -> dict[str, Any]:
        """Read the listing."""
        answer = self._client._request("GET", "/v1/marketplace")
        data = self.data
        data.observe(answer)
        data.listed = listed_prices(answer, data.rates)
        return answer

    def read_spot(self, server_id: int) -> dict[str, Any]:
        """Read the spot market of a server."""
        answer = self._client._request("GET", "/v1/spot_marketplace", params={"market": server_id})
        self.data.observe_spot(answer)
        return answer

    def find_server(self, server_id: int) -> Server | None:
        """Return a server as it is listed now, rented or not."""
        listed = to_servers(self.read(), include_rented=True, server_id=server_id)
        return listed[0] if listed else None

    def ensure_rates(self, server_id: int, currency: str) -> None:
        """Read the rate by which a bid is converted, where it is not known or too old."""
        data = self.data
        if not data.documented and currency not in data.rates.fresh():
            self.read_spot(server_id)

    def wire_bid(
        self, name: str, usd_per_hour: float, server_id: int, currency: str, allow_above: bool
    ) -> float:
        """Return a bid as the API takes it.

        Parameters:
            name: of the argument, for the error.
            usd_per_hour: the bid.
            server_id, currency: what is bid for, and what is paid with.
            allow_above: whether it may be above the on-demand price.

        Raises:
            ValueError: it is above the on-demand price.
            RateUnknownError: neither the form nor a rate is known for sure.
        """
        self.data.check_bid_price(name, usd_per_hour, server_id, allow_above)
        self.ensure_rates(server_id, currency)
        return self.data.wire_bid(usd_per_hour, currency, server_id)


# ==================================================================================================
# orders.claims
#
# Which order belongs to which purchase: no order is handed out twice.
# ==================================================================================================


def same_purchase(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Whether an order can come of a purchase; a missing field contradicts nothing."""
    told = (order.get("image"), order.get("currency"), order.get("spot"))
    return all(
        not isinstance(value, kind) or value == wanted
        for value, kind, wanted in zip(told, (str, str, bool), (image, currency, spot), strict=True)
    )


class Claims:
    """Which orders of one account the purchases of this process have taken for theirs.

    Two purchases of the same server must not take each other's order, so they are made in turns.
    Everything here changes in one step, so that an interrupt leaves nothing half done.
    """

    def __init__(self) -> None:
        self._taken: dict[int, object] = {}  # order id -> the purchase that it came of
        # Server id -> the purchase whose outcome is not known.
        self.unresolved: dict[int, Any] = {}
        self._locks: dict[int, threading.Lock] = {}
        # Seconds that the orders' time of creation lies behind the server's clock, as a negative
        # number; learned from orders that were found.
        self.clock_offset = 0.0

    def lock(self, server_id: int) -> threading.Lock:
        """Return what to hold so that no other call of the process orders this server."""
        return self._locks.setdefault(server_id, threading.Lock())

    def take(self, order_id: int, purchase: object) -> bool:
        """Claim an order; False when another purchase has it already."""
        return self._taken.setdefault(order_id, purchase) is purchase

    def free(self, orders: list[Order], purchase: object) -> list[Order]:
        """Return those of ``orders`` that no other purchase has, the newest last."""
        found = {o.id: o for o in orders if self._taken.get(o.id or 0, purchase) is purchase}
        return [found[order_id] for order_id in sorted(i for i in found if i is not None)]


_claims = PerAccount(Claims)


def claims_for(base_url: str, api_key: str) -> Claims:
    """The claims of an account, which all clients of this process share."""
    return _claims.of(base_url, api_key)


# ==================================================================================================
# orders.account
#
# Read the orders of an account, and remember those that this client has made or seen.
# ==================================================================================================


class OrdersClient(Requester, Protocol):
    """What orders need of a client."""

    timeout: Timeout
    rate_limit: float
    backoff: float
    order_lag: float
    server_clock: float | None
    max_usd_per_hour: float | None
    max_active_orders: int | None

    @property
    def api_key(self) -> str | None: ...


class OrderState(enum.Enum):
    """What the two order lists say of an order."""

    ACTIVE = "active"
    ENDED = "ended"
    ABSENT = "absent"


class AccountOrders:
    """The orders of the account of a client.

    Attributes:
        client: by which they are read.
        market: whose rates give their prices in USD.
        made: order id -> the order as it was when this client made it.
        credentials: order id -> what was sent with it to get in.
        cancelled: ids of the orders that this client has cancelled.
        ended: ids of the orders that are known to have ended.
        bid_listeners: order id -> whom to tell of a new bid, in USD per hour.
    """

    def __init__(self, client: OrdersClient, market: Market) -> None:
        self.client = client
        self.market = market
        self.made: dict[int, Order] = {}
        self.credentials: dict[int, dict[str, str]] = {}
        self.cancelled: set[int] = set()
        self.ended: set[int] = set()
        self.bid_listeners: dict[int, Callable[[float], None]] = {}
        self._seen: set[int] = set()  # active, by this client
        self._own_claims = Claims()

    def shared_with(self, client: OrdersClient, market: Market) -> AccountOrders:
        """Return the same orders for a copy of the client."""
        twin = copy.copy(self)
        twin.client, twin.market = client, market
        return twin

    @property
    def claims(self) -> Claims:
        """Which orders of the account are taken; without a key this client has its own."""
        key = self.client.api_key
        return claims_for(self.client.base_url, key) if key else self._own_claims

    @property
    def known(self) -> set[int]:
        """Ids of all orders that this client has made, seen active, or cancelled."""
        return {*self.made, *self._seen, *self.cancelled}

    def read(self, completed: bool, **options: Any) -> tuple[list[Order], dict[str, Any]]:
        """Read one of the two lists; returns its orders and the whole answer.

        Parameters:
            completed: the list that has the orders that have ended, too.
            **options: for ``_request``.
        """
        params = {"return_completed": "true"} if completed else None
        answer = self.client._request("GET", "/v1/my_orders", params=params, **options)
        if isinstance(answer, Envelope) and not isinstance(answer.get("orders"), list):
            # An answer to something else, perhaps: it does not say that there is no order.
            raise InvalidResponseError(-1, "no list of orders", answer, endpoint="/v1/my_orders")
        data = self.market.data
        data.observe(answer)
        orders = to_orders(answer, self.cancelled, data.rates)
        self._seen.update(o.id for o in orders if o.id is not None and not o.has_ended)
        return orders, answer

    def active(self) -> list[Order]:
        """Read the orders that have not ended."""
        return [order for order in self.read(completed=False)[0] if not order.has_ended]

    def find(self, order_id: int) -> Order | None:
        """Return an order; the ended ones are read only when it is not active."""
        for completed in (False, True):
            for order in self.read(completed)[0]:
                if order.id == order_id:
                    return order
        return None

    def state(self, order_id: int) -> OrderState:
        """Return what the two lists say of an order.

        Raises:
            OrderNotFoundError: it is the number of a server.
            CloreError: the lists can't be read, or are not whole.
        """
        for completed in (False, True):
            orders, answer = self.read(completed)
            for order in orders:
                if order.id == order_id:
                    return OrderState.ENDED if order.has_ended else OrderState.ACTIVE
                if order.server_id == order_id and not order.has_ended:
                    raise OrderNotFoundError(
                        f"there is no order {order_id}: that is the server of order {order.id}",
                        order_id=order_id,
                    )
            listed = answer.get("orders")
            ids = [order.id for order in orders if order.id is not None]
            if not isinstance(listed, list) or len(ids) != len(listed):
                raise CloreError("the orders are not listed whole: that decides nothing")
        return OrderState.ABSENT

    def active_ids(self) -> list[int]:
        """Return the orders that cost money, and those that may, though no list has them now."""
        orders, _ = self.read(completed=False)
        active = [order.id for order in orders if order.id is not None and not order.has_ended]
        missing = self.known - set(active) - self.ended
        if missing - self.cancelled:
            completed, _ = self.read(completed=True)
            self.ended.update(o.id for o in completed if o.id is not None and o.has_ended)
        return active + sorted(missing - self.cancelled - self.ended)

    def tell_bid(self, order_id: int, usd_per_hour: float) -> None:
        """Tell whoever counts the cost of an order of its new price."""
        if (tell := self.bid_listeners.get(order_id)) is not None:
            tell(usd_per_hour)


# ==================================================================================================
# orders.limits
#
# Check the limits that the user has set: a price per hour, and a number of orders.
# ==================================================================================================


def usd_per_hour_of(body: dict[str, Any], market: Market) -> float | None:
    """Return what an order costs, in USD per hour without fees; None if not known.

    Parameters:
        body: of ``create_order``, as it goes out.
        market: whose listing has the price, or the rate by which a bid is read.
    """
    server_id, currency = whole_id(body.get("renting_server")), body.get("currency")
    if server_id is None or not isinstance(currency, str):
        return None
    if body.get("type") != "spot":
        server = market.find_server(server_id)
        return None if server is None else on_demand_usd(server, currency)
    market.ensure_rates(server_id, currency)
    bid = positive(body.get("spotprice"))
    if bid is None or market.data.documented:
        return bid
    rate = positive(market.data.rates.fresh().get(currency))
    return None if rate is None else bid * rate / HOURS_PER_DAY


def check_price_limit(usd_per_hour: float | None, limit: float | None, what: str) -> None:
    """Refuse a price over ``max_usd_per_hour``, and one that is not known."""
    if limit is None:
        return
    if usd_per_hour is None:
        raise SpendingLimitError(
            f"the price of {what} is not known, and max_usd_per_hour is {limit:g}: nothing was sent"
        )
    if usd_per_hour > limit * (1 + 1e-9):
        raise SpendingLimitError(
            f"{what} costs {usd_per_hour:g} USD per hour, and max_usd_per_hour is {limit:g}: "
            "nothing was sent"
        )


def check_order_limit(active: Collection[int], limit: int | None) -> None:
    """Refuse one more order than ``max_active_orders``."""
    if limit is not None and len(active) >= limit:
        raise SpendingLimitError(
            f"{len(active)} orders are active ({', '.join(map(str, sorted(active)))}), and "
            f"max_active_orders is {limit}: nothing was sent"
        )


# ==================================================================================================
# orders.bid
#
# Change the bid of a spot order.
# ==================================================================================================


def set_spot_price(
    orders: AccountOrders, order_id: int, usd_per_hour: float, allow_above: bool
) -> bool:
    """Change the bid of an order; see ``CloreClient.set_spot_price``."""
    # One that was just made may not be listed yet.
    order = orders.find(order_id) or orders.made.get(order_id)
    if order is None:
        raise OrderNotFoundError(
            f"there is no order {order_id}: nothing was bid", order_id=order_id
        )
    bid = _wire_bid(orders, order, usd_per_hour, allow_above)
    body = {"order_id": order_id, "desired_price": bid}
    accepted = True
    try:
        answer = orders.client._request("POST", "/v1/set_spot_price", json=body)
        accepted = answer.get("error") in (None, "")
    except SpotPriceTooSoonError as error:
        # Sent again after a lost answer, it is refused because the first one was carried out.
        if error.sends <= 1 or not _shows_bid(orders, order, bid):
            raise
    except (CloreConnectionError, DatabaseError, InvalidResponseError):
        # It may have been carried out: a budget counts the higher price.
        orders.tell_bid(order_id, max(usd_per_hour, order.usd_per_hour or 0.0))
        raise
    if accepted:
        orders.tell_bid(order_id, usd_per_hour)
    return accepted


def _wire_bid(orders: AccountOrders, order: Order, usd_per_hour: float, allow_above: bool) -> float:
    """Check a bid, and return it as the API takes it."""
    if order.has_ended:
        raise OrderEndedError(
            f"Order {order.id} has ended, with status {order.status}: nothing was bid",
            order_id=order.id or 0,
            status=order.status or "",
            order=order,
        )
    if order.is_spot is False:
        raise ValueError(f"order_id: order {order.id} is no spot order; nothing was bid")
    limit = orders.client.max_usd_per_hour
    check_price_limit(usd_per_hour, limit, f"the bid for order {order.id}")
    data = orders.market.data
    data.check_bid_price("new_price", usd_per_hour, order.server_id, allow_above)
    if surely_documented(order):
        return usd_per_hour
    currency, server_id = order.get("currency"), order.server_id
    if server_id is None or not isinstance(currency, str):
        raise OrderNotFoundError(
            f"order {order.id} does not tell its server and currency: nothing was bid",
            order_id=order.id,
        )
    currency = check_currency("the order's currency", currency)
    orders.market.ensure_rates(server_id, currency)
    return data.wire_bid(usd_per_hour, currency, server_id)


def _shows_bid(orders: AccountOrders, before: Order, bid: float) -> bool:
    """Return whether an order now shows a bid that was sent."""
    after = orders.find(before.id or 0)
    shown = finite(after.wire.get("price")) if after is not None else None
    if shown is None:
        return False
    if surely_documented(before):
        # Its price is in the order's currency, the bid in USD: what tells is that it changed.
        return shown != finite(before.wire.get("price"))
    return abs(shown - bid) <= max(1e-6 * bid, 1e-8)  # bitcoin has eight digits


# ==================================================================================================
# orders.cancel
#
# Cancel orders until that is accepted, and confirm that they have ended.
#
# An order has ended when the list of completed orders says so, or when its cancel was accepted and
# it
# is gone from both lists for longer than they lag behind. Nothing else is taken for an end: a list
# can be empty for a moment.
# ==================================================================================================


MAX_ISSUE = 2048  # characters of ``issue`` that the API takes
# A cancelled order can stand among the active ones for 2 to 20 seconds (seen on the live API).
LINGER = 30.0
MAX_CANCELS = 64  # ids that the API takes in one ``cancel_orders``
FIRST_PAUSE = 0.02  # seconds between the first two looks at the lists; it doubles
LONGEST_LOOK_PAUSE = 1.0
CANCEL_AGAIN_AFTER = 30.0  # seconds after which one that still looks active is cancelled again
CONFIRM_AT_LEAST = 30.0
SHORTEST_TRY = 1.0  # seconds that one try to cancel has at least


class Cancellation:
    """The end of one order: its cancel, and what the lists show since.

    Attributes:
        order_id: which order.
        accepted: whether a cancel of it was accepted; it costs nothing from then on.
        failure: why the last try to cancel failed.
    """

    def __init__(self, orders: AccountOrders, order_id: int, issue: str | None = None) -> None:
        self.order_id = order_id
        self.accepted = order_id in orders.cancelled
        self.failure: Exception | None = None
        self._orders = orders
        self._issue = issue
        self._doubtful = False  # whether a cancel may have been carried out
        self._state: OrderState | None = None  # None where the last look failed
        self._absent_since: float | None = None
        self._look_failure: CloreError | None = None
        self._sent_at = -math.inf
        self._pause = max(0.001, 2 * orders.client.backoff)  # before the next cancel

    def send(self) -> None:
        """Send the cancel once."""
        self._sent_at = time.monotonic()
        body: dict[str, Any] = {"id": self.order_id}
        if self._issue:
            body["issue"] = self._issue[:MAX_ISSUE]
        try:
            self._orders.client._request("POST", "/v1/cancel_order", json=body)
        except Exception as error:
            self.failure = error
            if not isinstance(error, CloreAPIError) or error.sends > 1:
                self._doubtful = True
            raise
        self._accept()
        logger.info("order %d was cancelled", self.order_id)

    def keep_on(
        self,
        deadline: Callable[[], float],
        *,
        confirm: bool,
        persist: bool = True,
        stop: Callable[[], bool] = lambda: False,
    ) -> CloreError | None:
        """Cancel until that is accepted, and look until the order has ended.

        Parameters:
            deadline: gives the monotonic time at which to give up.
            confirm: whether to look until the order has ended; else an accepted cancel is enough.
            persist: whether to go on when the API refuses to cancel an order that is active.
            stop: whether to give up at once.

        Returns:
            None when that is reached, else what to tell the user.
        """
        look_pause = FIRST_PAUSE
        while True:
            self._send_if_due(deadline())
            if self._done and not confirm:
                return None
            if isinstance(self.failure, ConfigurationError):
                return self.unconfirmed()
            try:
                if self._look(deadline()):
                    return None
            except OrderNotFoundError as error:
                return error
            remaining = deadline() - time.monotonic()
            if remaining <= 0 or stop() or (self._refused and not persist):
                return self.unconfirmed()
            waits_for_cancel = persist and not self._done
            pause = max(self._next_send() - time.monotonic(), 0) if waits_for_cancel else look_pause
            until = time.monotonic() + min(pause, remaining)
            _sleep_until(until, lambda: stop() or time.monotonic() >= deadline())
            look_pause = min(look_pause * 2, LONGEST_LOOK_PAUSE)

    def unconfirmed(self, seconds: float | None = None) -> CancelUnconfirmedError:
        """Make the error for an order that may still be running.

        Parameters:
            seconds: for which it was tried, to be told.
        """
        order_id = self.order_id
        what = "was cancelled, but it is not confirmed that it has ended"
        if not self._done:
            within = "" if seconds is None else f" within {seconds:g}s"
            what = f"could not be cancelled{within}"
        why = "" if self._done else f" ({self.failure})"
        error = CancelUnconfirmedError(
            f"order {order_id} {what}: it may still be running, and cost money; "
            f"cancel_order({order_id}) is safe to repeat{why}",
            order_ids=(order_id,),
        )
        error.__cause__ = self._look_failure if self._done else self.failure
        return error

    # --- the cancel ---

    @property
    def _done(self) -> bool:
        """Whether the last cancel was accepted."""
        return self.accepted and self.failure is None

    @property
    def _refused(self) -> bool:
        """Whether the API has refused to cancel an order that is active, and never left a doubt."""
        return self._state is OrderState.ACTIVE and not (self.accepted or self._doubtful)

    def _accept(self) -> None:
        self.accepted, self.failure = True, None
        self._orders.cancelled.add(self.order_id)

    def _next_send(self) -> float:
        """Return the monotonic time at which to send the cancel."""
        if not self._done:
            return self._sent_at + self._pause if self.failure else -math.inf
        # Accepted, and yet it goes on looking active.
        return self._sent_at + CANCEL_AGAIN_AFTER if self._state is OrderState.ACTIVE else math.inf

    def _send_if_due(self, deadline: float) -> None:
        if time.monotonic() < self._next_send():
            return
        was_done, tried_before = self._done, self.failure is not None
        if tried_before:
            self._pause = min(self._pause * 2, LONGEST_CANCEL_PAUSE)
        try:
            limited(self.send, deadline=self._end_of_try(deadline), urgent=True)
        except Exception as error:
            if was_done:  # it was accepted all the same
                self.failure = None
            elif not tried_before:
                left = deadline - time.monotonic()
                how_long = "until it is" if left == math.inf else f"for another {left:.0f} s"
                logger.warning(
                    "order %d could not be cancelled yet, which is tried %s: %s",
                    self.order_id,
                    how_long,
                    error,
                )

    def _end_of_try(self, deadline: float, at_least: float = SHORTEST_TRY) -> float:
        """Return until when one request may take: one that hangs is given up, and sent again."""
        now = time.monotonic()
        left = deadline - now
        return deadline if left == math.inf else now + max(at_least, left / 3)

    # --- the lists ---

    def _look(self, deadline: float) -> bool:
        """Look once at the lists; return whether the order has ended.

        Raises:
            OrderNotFoundError: the account has no such order.
        """
        orders = self._orders
        asked_at = time.monotonic()
        at_least = SHORTEST_TRY + 2 * orders.client.rate_limit  # two lists
        self._state = self._look_failure = None
        try:
            self._state = limited(
                lambda: orders.state(self.order_id),
                deadline=self._end_of_try(deadline, at_least),
                urgent=True,
            )
        except OrderNotFoundError:
            raise
        except CloreError as error:
            self._look_failure = error
            return False
        if self._state is OrderState.ENDED:
            self._accept()
            orders.ended.add(self.order_id)
            return True
        if self._state is OrderState.ACTIVE:
            self._absent_since = None
            return False
        self._absent_since = self._absent_since or asked_at
        if time.monotonic() - self._absent_since < orders.client.order_lag:
            return False
        if not self.accepted and self.order_id not in orders.known:
            raise OrderNotFoundError(
                f"there is no order {self.order_id} in this account", order_id=self.order_id
            ) from self.failure
        return self.accepted


def cancel_order(
    orders: AccountOrders, order_id: int, issue: str | None, settle_timeout: float | None
) -> Cancellation:
    """Cancel an order; see ``CloreClient.cancel_order``.

    Raises:
        OrderNotFoundError, CancelUnconfirmedError, CloreError: as there.
    """
    cancellation = Cancellation(orders, order_id, issue)
    try:
        cancellation.send()
    except ConfigurationError:
        raise
    except CloreError as error:
        unsent = isinstance(error, CloreConnectionError) and error.sent_at is None
        if unsent or isinstance(error, (AuthenticationError, RateLimitError)):
            # The lists would say nothing new.
            error.args = (f"{error}\norder {order_id} may still be running, and cost money",)
            raise
        until = time.monotonic() + (LINGER if settle_timeout is None else settle_timeout)
        failure = cancellation.keep_on(lambda: until, confirm=False, persist=False)
        if failure is not None:
            raise failure from error
    return cancellation


def cancel_orders(orders: AccountOrders, ids: list[int]) -> dict[str, Any]:
    """Cancel several orders with one request; see ``CloreClient.cancel_orders``."""
    if not ids:
        return {"code": 0, "failed_to_cancel": []}
    answer, failed = _send_cancels(orders, ids)
    if failed and getattr(answer, "sends", 1) > 1:
        # Sent again after a lost answer, it fails for those that the first one ended.
        until = time.monotonic() + LINGER
        left = _still_running(orders, failed, until)
        answer["failed_to_cancel"] = [
            i for i in answer["failed_to_cancel"] if str(i) in map(str, left)
        ]
    return answer


def cancel_all(orders: AccountOrders, confirm: bool, timeout: float) -> list[int]:
    """Cancel all active orders of the account; see ``CloreClient.cancel_all``."""
    ids = orders.active_ids()
    failed = _send_cancels(orders, ids)[1] if ids else []
    until = time.monotonic() + min(timeout, LINGER)
    if left := _still_running(orders, failed, until):
        raise CancelUnconfirmedError(f"not cancelled: {', '.join(map(str, left))}", order_ids=left)
    if confirm:
        confirm_ended([Cancellation(orders, order_id) for order_id in ids], timeout)
    return ids


def confirm_ended(cancellations: list[Cancellation], timeout: float) -> None:
    """Wait until orders that were cancelled have ended in the lists as well.

    Raises:
        CancelUnconfirmedError: some have not.
    """
    until = time.monotonic() + timeout
    for number, cancellation in enumerate(cancellations):
        failure = cancellation.keep_on(lambda: until, confirm=True)
        if failure is not None:
            left = tuple(c.order_id for c in cancellations[number:])
            raise CancelUnconfirmedError(
                f"cancelled, but still active after {timeout:g}s: {', '.join(map(str, left))}",
                order_ids=left,
            ) from failure


def _send_cancels(orders: AccountOrders, ids: list[int]) -> tuple[dict[str, Any], list[int]]:
    """Send as many ``cancel_orders`` as the ids need; return the answer, and those that failed.

    Goes on after a batch that failed, because every order left running costs money.
    """
    failure: CloreError | None = None
    listed: list[Any] = []
    unsent: list[int] = []
    answer: dict[str, Any] = {}
    sends = 1
    for start in range(0, len(ids), MAX_CANCELS):
        batch = ids[start : start + MAX_CANCELS]
        try:
            answer = _send_batch(orders, batch)
        except CloreError as error:
            failure = failure or error
            unsent += batch
            continue
        names = answer.get("failed_to_cancel")
        listed += names if isinstance(names, list) else []
        sends = max(sends, getattr(answer, "sends", 1))
    failed = [i for i in ids if str(i) in {str(name) for name in listed}]
    if failure is not None:
        if len(ids) > MAX_CANCELS:
            left = ", ".join(map(str, [*unsent, *failed]))
            failure.args = (f"{failure}\norders {left} may still be running, and cost money",)
        raise failure
    answer["failed_to_cancel"] = listed
    if isinstance(answer, Envelope):
        answer.sends = sends
    return answer, failed


def _send_batch(orders: AccountOrders, batch: list[int]) -> dict[str, Any]:
    answer = orders.client._request("POST", "/v1/cancel_orders", json={"order_ids": batch})
    names = answer.get("failed_to_cancel")
    failed = {str(name) for name in names} if isinstance(names, list) else set()
    done = [i for i in batch if str(i) not in failed]
    orders.cancelled.update(done)
    logger.info("orders %s were cancelled, %s were not", done, sorted(failed))
    return answer


def _still_running(orders: AccountOrders, ids: Iterable[int], until: float) -> tuple[int, ...]:
    """Cancel one by one; return those that may still be running."""
    return tuple(
        order_id
        for order_id in ids
        if Cancellation(orders, order_id).keep_on(lambda: until, confirm=False)
    )


def confirm_until(started: float, timeout: float) -> float:
    """Return when to stop confirming what was begun at ``started`` (monotonic time)."""
    return max(started + timeout, time.monotonic() + min(CONFIRM_AT_LEAST, timeout))


def _sleep_until(moment: float, stop: Callable[[], bool]) -> None:
    while (left := moment - time.monotonic()) > 0 and not stop():
        time.sleep(min(left, 0.1))


def add_note_to(error: BaseException, note: str) -> None:
    """Call ``error.add_note(note)``, which Python has from 3.11 on."""
    notes = getattr(error, "__notes__", None)
    try:
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:
            error.__notes__ = [*notes, note] if isinstance(notes, list) else [note]  # type: ignore[attr-defined,unused-ignore]
    except (TypeError, AttributeError):  # an exception that takes none
        logger.error("%s", note)


# ==================================================================================================
# orders.reconcile
#
# Find the order of a purchase whose answer named none, or never came.
# ==================================================================================================


# A new order shows up 2 to 20 seconds after it was made (seen on the live API).
FIRST_LOOK = 0.2
LONGEST_PAUSE = 2.0
SHORTEST_LOOK = 1.0  # seconds that an answer may take at least


class SentPurchase(Protocol):
    """What finding its order needs of a purchase."""

    server_id: int
    credentials: dict[str, str]
    baseline_read: bool
    answer: dict[str, object]

    @property
    def sent_at(self) -> float: ...

    def matches(self, order: Order) -> bool: ...


def find_order(
    orders: AccountOrders, purchase: SentPurchase, timeout: float, doubt: CloreError | None
) -> Order:
    """Look in ``my_orders`` until the order of a purchase shows up, and claim it.

    Parameters:
        orders: of the account.
        purchase: what was sent.
        timeout: seconds.
        doubt: why it is not sure that an order was made, where that is so.

    Raises:
        OrderOutcomeUnknownError: none showed up in time, or two fit. Its cause is the failure of
            the last look, where that failed; else the doubt.
        CloreAPIError: the doubt was a refusal, and whole lists without the order confirm it.
    """
    try:
        order = _search(orders, purchase, timeout, doubt)
    except (KeyboardInterrupt, SystemExit):
        logger.warning(
            "interrupted while an order of server %d was looked up, which may have been made: "
            "see get_orders()",
            purchase.server_id,
        )
        raise
    orders.claims.unresolved.pop(purchase.server_id, None)
    return order


def _search(
    orders: AccountOrders, purchase: SentPurchase, timeout: float, doubt: CloreError | None
) -> Order:
    claims, pause = orders.claims, FIRST_LOOK
    deadline = time.monotonic() + timeout
    while True:
        cause: CloreError | None = None
        possible: list[Order] = []
        created_after = None
        try:
            listed, created_after = _look(orders, purchase, timeout, deadline)
            possible = claims.free([o for o in listed if purchase.matches(o)], purchase)
        except CloreError as error:
            cause = error
        found = [o for o in possible if _is_new(o, created_after, claims.clock_offset)]
        remaining = deadline - time.monotonic()
        if remaining <= 0 and not found and purchase.baseline_read:
            # The clocks may be apart: nothing else can be the one order that was not there before.
            found = [order for order in possible if not order.has_ended]
        if len(found) == 1 and claims.take(found[0].id or 0, purchase):
            _learn_offset(claims, found[0], created_after)
            return found[0]
        if len(found) > 1 or remaining <= 0:
            if isinstance(doubt, CloreAPIError) and not possible and cause is None:
                raise doubt  # whole lists without the order: the refusal is true
            raise _not_found(purchase, found or possible, timeout, doubt) from (cause or doubt)
        time.sleep(min(pause, remaining))
        pause = min(pause * 1.5, LONGEST_PAUSE)


def _look(
    orders: AccountOrders, purchase: SentPurchase, timeout: float, deadline: float
) -> tuple[list[Order], float | None]:
    """Read the active orders, and the moment of sending by the server's clock."""
    client = orders.client
    # One answer that does not come must not take all the time that there is.
    patience = shortened(client.timeout, max(timeout / 2, SHORTEST_LOOK))
    until = client.rate_limit + max(deadline, time.monotonic() + SHORTEST_LOOK)
    listed, listing = limited(
        lambda: orders.read(completed=False, timeout=patience), deadline=until
    )
    # Each answer's Date bounds it from below, the quickest answer most closely.
    clocks = [
        clock
        for answer in (purchase.answer, listing)
        if isinstance(answer, Envelope)
        and (clock := answer.server_time_at(purchase.sent_at)) is not None
    ]
    return listed, max(clocks, default=None)


def _is_new(order: Order, created_after: float | None, offset: float) -> bool:
    """Return whether an order was made after ``created_after``, as far as that is known."""
    if created_after is None:
        return not order.has_ended
    return order.started_at is not None and order.started_at >= created_after + offset


def _learn_offset(claims: Claims, order: Order, created_after: float | None) -> None:
    """Remember by how much the orders' clock lies behind the server's, from an order of ours."""
    if created_after is not None and order.started_at is not None:
        behind = math.floor(order.started_at - created_after)
        claims.clock_offset = min(claims.clock_offset, behind)


def _not_found(
    purchase: SentPurchase, orders: list[Order], timeout: float, doubt: CloreError | None
) -> OrderOutcomeUnknownError:
    server_id = purchase.server_id
    ids = tuple(order.id for order in orders if order.id is not None)
    made = "was made" if doubt is None else "may have been made"
    return OrderOutcomeUnknownError(
        f"an order for server {server_id} {made}, and it can't be told which of "
        f"{', '.join(map(str, ids))} it is, if any: look at get_orders()"
        if ids
        else f"an order for server {server_id} {made}, but did not show up in my_orders within "
        f"{timeout:g}s. It was not sent again: look at get_orders(), also a minute from now, "
        "before you order again",
        server_id=server_id,
        order_ids=ids,
        credentials=purchase.credentials,
    )


# ==================================================================================================
# orders.create
#
# Make an order: check it, send it once, and find the order that the API made of it.
# ==================================================================================================


DEFAULT_PORTS = {"22": "tcp"}
DEFAULT_ENV = {"NVIDIA_VISIBLE_DEVICES": "all"}
PASSWORD_LENGTH = 24
ALL_SERVERS = 0  # no server has that id


def make_password() -> str:
    """A password that nobody guesses, of characters that need no quoting anywhere."""
    alphabet = string.ascii_letters + string.digits
    source = random.SystemRandom()  # the system's source, as the module secrets uses it
    return Secret("".join(source.choice(alphabet) for _ in range(PASSWORD_LENGTH)))


def _given(value: Any) -> Any:
    """An argument, or None for what is empty; 0 and False are no empty ones, but slips."""
    return None if isinstance(value, Sized) and len(value) == 0 else value


def check_login(ssh_password: Any, ssh_key: Any, jupyter_token: Any) -> dict[str, str]:
    """What was given to get into the machine, checked; an empty password or key is none."""
    ssh_password, ssh_key = _given(ssh_password), _given(ssh_key)
    if ssh_password is not None and ssh_key is not None:
        raise ValueError("ssh_password and ssh_key exclude each other: give one of them")
    credentials: dict[str, str] = {}
    if ssh_key is not None:
        credentials["ssh_key"] = check_public_key("ssh_key", ssh_key)
    if ssh_password is not None:
        credentials["ssh_password"] = check_secret("ssh_password", ssh_password, MAX_PASSWORD)
    if jupyter_token is not None:
        credentials["jupyter_token"] = check_secret("jupyter_token", jupyter_token, MAX_TOKEN)
    return credentials


def order_ports(ports: Any) -> dict[str, str]:
    """The ports that are sent; empty ones mean the default."""
    return dict(DEFAULT_PORTS) if _given(ports) is None else check_ports("ports", ports)


def order_env(env: Any) -> dict[str, str]:
    """The environment that is sent; an empty one means the default."""
    return dict(DEFAULT_ENV) if _given(env) is None else check_env("env", env)


class Purchase:
    """One purchase, from its arguments to the order that the API made of it.

    Parameters:
        orders: of the account that buys.
        server_id, image, order_type, ...: the arguments of ``CloreClient.create_order``.

    Attributes:
        server_id, spot, currency, image: what the order must show.
        body: what is sent.
        credentials: what is sent to get in.
        generated_password: the password that was made up, or None.
        before: ids of orders that were there before it was sent, and so are not its own.
        baseline_read: whether ``before`` comes from a list that was read for this purchase.
        answer: of ``create_order``; empty where none came.
    """

    def __init__(
        self,
        orders: AccountOrders,
        *,
        server_id: Any,
        image: Any,
        order_type: Any,
        currency: Any,
        ports: Any,
        env: Any,
        ssh_password: Any,
        ssh_key: Any,
        jupyter_token: Any,
    ) -> None:
        self._orders = orders
        self.server_id = check_id("server_id", server_id)
        self.spot = check_order_type("order_type", order_type) == "spot"
        self.currency = check_currency("currency", currency)
        self.image = check_text("image", image)
        self.credentials = check_login(ssh_password, ssh_key, jupyter_token)
        self.generated_password: str | None = None
        if not self.credentials.keys() & {"ssh_key", "ssh_password"}:
            self.credentials["ssh_password"] = self.generated_password = make_password()
        self.body: dict[str, Any] = {
            "renting_server": self.server_id,
            "type": order_type,
            "currency": self.currency,
            "image": self.image,
            "ports": order_ports(ports),
            "env": order_env(env),
            **self.credentials,
        }
        self.before: frozenset[int] = frozenset()
        self.baseline_read = False
        self.answer: dict[str, Any] = {}
        self._sent_at = time.monotonic()

    @property
    def sent_at(self) -> float:
        """When it left, by ``time.monotonic()``; before its answer came, at the earliest."""
        return getattr(self.answer, "sent_at", self._sent_at)

    def matches(self, order: Order) -> bool:
        """Return whether an order can come of this purchase. A missing field contradicts nothing.

        The live API has no idempotency key and answers without an order id.
        """
        return (
            order.id is not None
            and order.id not in self.before
            and order.server_id == self.server_id
            and same_purchase(order, self.image, self.currency, self.spot)
        )

    # --- price and limits ---

    def set_bid(self, spot_price: float | None, allow_above: bool) -> None:
        """Add the bid of a spot order.

        Parameters:
            spot_price: in USD per hour.
            allow_above: whether it may be above the on-demand price.
        """
        if not self.spot:
            if spot_price is not None:
                logger.warning("spot_price is only used with order_type='spot': it is not sent")
            return
        if spot_price is None:
            raise ValueError("spot_price is required for order_type='spot', in USD per hour")
        check_number("spot_price", spot_price, above=True, unit="USD per hour")
        self.body["spotprice"] = self._orders.market.wire_bid(
            "spot_price", spot_price, self.server_id, self.currency, allow_above
        )

    def usd_per_hour(self) -> float | None:
        """Return the price by today's listing, or of the bid, without fees; None if not known."""
        return usd_per_hour_of(self.body, self._orders.market)

    def preview(self) -> Order:
        """Return what would be sent, and what it would cost."""
        usd_per_hour = self.usd_per_hour()
        shown = Order(body=self.body, usd_per_hour=usd_per_hour)
        shown._usd_per_hour = usd_per_hour
        return shown

    def _check_limits(self) -> None:
        client = self._orders.client
        if client.max_usd_per_hour is not None:
            check_price_limit(
                self.usd_per_hour(), client.max_usd_per_hour, f"an order of server {self.server_id}"
            )
        if client.max_active_orders is not None:
            check_order_limit(self._orders.active_ids(), client.max_active_orders)

    # --- the order ---

    def place(self, find_timeout: float) -> Order:
        """Send the purchase once, and return its order.

        Parameters:
            find_timeout: seconds that the order may take to show up.

        Raises:
            OrderOutcomeUnknownError: an order may or may not have been made.
            CloreError: the API refused, or nothing was sent.
        """
        claims = self._orders.claims
        # One purchase at a time under a limit, else two could each be the last that is allowed.
        no_limit = self._orders.client.max_active_orders is None
        one = contextlib.nullcontext() if no_limit else claims.lock(ALL_SERVERS)
        with one, claims.lock(self.server_id):
            self._check_limits()
            self._read_baseline(find_timeout)
            order, purchase = self._submit(find_timeout)
        if order.id is not None:
            self._orders.credentials[order.id] = purchase.credentials
            self._orders.made[order.id] = order.copy()
        logger.info("order %s of server %d was made", order.id, self.server_id)
        order["code"] = 0
        if purchase.generated_password:
            order["ssh_password"] = str(purchase.generated_password)
        return order

    def _read_baseline(self, find_timeout: float) -> None:
        """Note which orders are there before the purchase is sent."""
        orders, data = self._orders, self._orders.market.data
        self.before = frozenset(orders.known)
        replaced = getattr(orders.client._request, "__func__", None) is not HTTPClient._request
        if not data.live and (replaced or data.documented):
            return  # the answer will name the order
        # The live API names no order in its answer: what is there now can't be the new one.
        patience = orders.client.rate_limit + max(find_timeout / 2, SHORTEST_LOOK)
        with contextlib.suppress(CloreError):
            listed, answer = limited(
                lambda: orders.read(completed=False), deadline=time.monotonic() + patience
            )
            if isinstance(answer, Envelope):  # a fake's list is the same before and after
                self.before |= {order.id for order in listed if order.id is not None}
                self.baseline_read = True

    def _submit(self, find_timeout: float) -> tuple[Order, Purchase]:
        """Send the purchase; return the order and the purchase that it came of."""
        claims, server_id = self._orders.claims, self.server_id
        earlier = claims.unresolved.get(server_id)
        claims.unresolved[server_id] = self  # before it is sent: an interrupt can come then
        self._sent_at = time.monotonic()
        doubt: CloreError | None = None
        try:
            self.answer = self._orders.client._request("POST", "/v1/create_order", json=self.body)
        except (OrderOutcomeUnknownError, DatabaseError) as error:
            doubt, self._sent_at = error, error.sent_at or self._sent_at
        except Exception as error:  # a refusal, or it was not sent
            if earlier is None:
                claims.unresolved.pop(server_id, None)
                raise
            claims.unresolved[server_id] = earlier
            if not isinstance(error, ServerAlreadyRentedError):
                raise
            # Maybe it is us who rent it, by an order whose answer was lost.
            return find_order(self._orders, earlier, find_timeout, error), earlier
        if (order_id := created_id(self.answer)) is None:
            return find_order(self._orders, self, find_timeout, doubt), self
        claims.take(order_id, self)
        claims.unresolved.pop(server_id, None)
        return self._named_order(order_id), self

    def _named_order(self, order_id: int) -> Order:
        """Return the order of an answer that names it."""
        answer = {**self.answer, "order_id": order_id}
        made = to_orders({"orders": [answer]}, (), self._orders.market.data.rates)[0]
        if made.server_id is None:
            made["renting_server"] = self.server_id
        made.setdefault("currency", self.currency)
        made.setdefault("status", "creating")
        made.setdefault("connection", {"ssh": "", "http_ports": {}})
        return made


# ==================================================================================================
# orders.wait
#
# Waiting until an order has a status.
# ==================================================================================================


_MEET = frozenset({"cancelled", "expired"})  # these two stand for each other


def wait_for_status(
    orders: AccountOrders,
    order_id: int,
    timeout: float,
    poll_interval: float,
    target_status: str,
    on_update: Callable[[Order | None], object] | None,
) -> Order:
    """Look until the order has the status; see ``CloreClient.wait_for_order``.

    Parameters:
        orders: of the account.
        order_id, timeout, poll_interval, target_status, on_update: as there.
    """
    if target_status not in {"running", "creating"} | ENDED_STATUSES:
        logger.warning("no order is known to have the status %r: a slip?", target_status)
    targets = _MEET if target_status in _MEET else {target_status}
    deadline = time.monotonic() + timeout
    seen: Order | None = None
    failure: CloreError | None = None
    while True:
        try:
            # The last look starts at the deadline, and gets its turn: two reads at most.
            last = time.monotonic() + 2 * orders.client.rate_limit + SHORTEST_LOOK
            order = limited(lambda: orders.find(order_id), deadline=max(deadline, last))
            failure = None
        except CloreError as error:
            if not (error.retryable or isinstance(error, InvalidResponseError)):
                raise
            logger.debug("a look at order %d failed: %s", order_id, error)
            order, failure = None, error
        seen = order or seen
        if on_update is not None and failure is None:
            on_update(order)
        if order is not None and order.status in targets:
            return order
        if order is not None and order.has_ended:
            raise OrderEndedError(
                f"Order {order_id} ended unexpectedly with status: {order.status}",
                order_id=order_id,
                status=order.status or "",
                order=order,
            )
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise WaitTimeoutError(
                f"Order {order_id} did not reach status '{target_status}' within {timeout}s",
                order_id=order_id,
                order=seen,
            ) from failure
        # No sooner than the API asked for, where it did.
        pause = max(poll_interval, (failure.retry_after or 0.0) if failure else 0.0)
        time.sleep(min(pause, remaining))


# ==================================================================================================
# rental.client
#
# What a rental needs of a client.
# ==================================================================================================


class RentalClient(Protocol):
    """The methods of ``CloreClient`` that a rental uses."""

    def find_servers(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
    ) -> list[Server]: ...

    def get_marketplace(self, include_rented: bool = False) -> list[Server]: ...

    def get_orders(self, include_completed: bool = False) -> list[Order]: ...

    def get_spot_market(self, server_id: int) -> dict[str, Any]: ...

    def wait_for_order(self, order_id: int, timeout: float, poll_interval: float) -> Order: ...

    @property
    def create_order(self) -> Callable[..., Order]: ...

    @property
    def connect_ssh(self) -> Callable[..., paramiko.SSHClient]: ...

    @property
    def run(self) -> Callable[..., CommandResult]: ...

    @property
    def upload(self) -> Callable[..., Transferred]: ...

    @property
    def download(self) -> Callable[..., Transferred]: ...


# ==================================================================================================
# rental.selection
#
# Which servers rent() tries, in which order, and what each costs.
# ==================================================================================================


# On top of the price, for the renter (seen on the live API).
FEE_ON_DEMAND = 0.05
FEE_SPOT = 0.0125
CREATION_FEE = 0.10  # USD, once
CREATION_FEE_AFTER = 600.0  # seconds; an order that ends before does not pay it
# A bid of exactly the lowest can be a hair under it, once it has been converted and back.
BID_MARGIN = 1e-4
PRICE_SLACK = 1e-4  # of a price that went through an exchange rate


class RentalSettings:
    """What ``rent()`` was asked for, checked."""

    def __init__(
        self,
        *,
        gpu_type: Any,
        max_price_usd: Any,
        min_reliability: Any,
        use_spot: Any,
        server_id: Any,
        image: Any,
        currency: Any,
        ports: Any,
        env: Any,
        ssh_password: Any,
        ssh_key: Any,
        spot_price: Any,
        jupyter_token: Any,
        attempts: Any,
        deploy_timeout: Any,
        poll_interval: Any,
        find_timeout: Any,
        cancel_timeout: Any,
        max_hours: Any,
        max_cost_usd: Any,
    ) -> None:
        self._set_search(gpu_type, max_price_usd, min_reliability, use_spot, server_id)
        self.currency = check_currency("currency", currency)
        self.image = check_text("image", image)
        check_login(ssh_password, ssh_key, jupyter_token)
        order_ports(ports)
        order_env(env)
        self.spot_price = self._checked_bid(spot_price)
        self.order_arguments: dict[str, Any] = {
            "image": self.image,
            "order_type": "spot" if self.spot else "on-demand",
            "currency": self.currency,
            "ports": ports,
            "env": env,
            "ssh_password": ssh_password,
            "ssh_key": ssh_key,
            "jupyter_token": jupyter_token,
        }
        self.attempts = check_count("attempts", attempts, minimum=1)
        self.deploy_timeout = check_number(
            "deploy_timeout", deploy_timeout, infinite=True, unit="seconds"
        )
        self.poll_interval = check_interval("poll_interval", poll_interval)
        self.find_timeout = check_number("find_timeout", find_timeout, unit="seconds")
        self.cancel_timeout = check_number(
            "cancel_timeout", cancel_timeout, infinite=True, unit="seconds"
        )
        self.max_hours = _check_budget("max_hours", max_hours)
        self.max_cost_usd = _check_budget("max_cost_usd", max_cost_usd)

    def _set_search(
        self, gpu_type: Any, max_price_usd: Any, min_reliability: Any, use_spot: Any, server_id: Any
    ) -> None:
        if gpu_type is not None:
            check_text("gpu_type", gpu_type)
        if max_price_usd is not None:
            check_number("max_price_usd", max_price_usd, infinite=True, unit="USD per hour")
        check_number("min_reliability", min_reliability, maximum=100.0)
        self.gpu_type: str | None = gpu_type
        self.max_price_usd: float | None = max_price_usd
        self.min_reliability: float = min_reliability
        self.spot = check_bool("use_spot", use_spot)
        self.server_id = None if server_id is None else check_id("server_id", server_id)

    def _checked_bid(self, spot_price: Any) -> float | None:
        if spot_price is None:
            return None
        check_number("spot_price", spot_price, above=True, unit="USD per hour")
        if not self.spot:
            raise ValueError("spot_price is only used with use_spot=True")
        if self.max_price_usd is not None and spot_price > self.max_price_usd:
            raise ValueError(
                f"spot_price must not be over max_price_usd: {spot_price!r}, {self.max_price_usd!r}"
            )
        return float(spot_price)

    @property
    def fee(self) -> float:
        """The renter's fee as a share of the price."""
        return FEE_SPOT if self.spot else FEE_ON_DEMAND

    def over(self, usd_per_hour: float | None) -> bool:
        """Whether a price is over the limit."""
        limit = self.max_price_usd
        return limit is not None and usd_per_hour is not None and (
            usd_per_hour > limit * (1 + PRICE_SLACK)
        )  # fmt: skip

    def price_of(self, server: Server) -> float | None:
        """What a server would cost, in USD per hour without fees; None where that is not told."""
        listed = on_demand_usd(server, self.currency)
        if not self.spot:
            return listed
        lowest = _lowest_bid(server, self.currency)
        if lowest is None:
            return None
        if self.spot_price is not None:
            return self.spot_price if self.spot_price >= lowest else None
        limit = self.max_price_usd
        bid = lowest * (1 + BID_MARGIN)
        return bid if limit is None or lowest > limit else min(bid, limit)

    def why_not(self, server: Server) -> str | None:
        """Why a server is no candidate, or None where it is one."""
        coins = server.get("allowed_coins")
        if isinstance(coins, list) and coins and self.currency not in coins:
            return f"does not take {self.currency}"
        price = self.price_of(server)
        if price is None:
            if self.spot:
                return "takes no such bid"
            if self.max_price_usd is not None or self.max_cost_usd is not None:
                return "tells no price"
            return None
        if self.max_price_usd is not None and price > self.max_price_usd * (1 + 1e-12):
            return f"costs {price:.4g} USD per hour"
        on_demand = server.usd_per_hour
        if self.spot and on_demand is not None and price > on_demand:
            return "takes no bid under its on-demand price"
        return None


def _check_budget(name: str, value: Any) -> float | None:
    return None if value is None else check_number(name, value, above=True, infinite=True)


def _lowest_bid(server: Server, currency: str) -> float | None:
    stated = positive(part_of(server, "price", "original_usd", currency, "spot"))
    return server.spot_usd_per_hour if stated is None else stated / HOURS_PER_DAY


def shown_usd(order: Any, server: Server, currency: str) -> float | None:
    """The price that an order shows, in USD per hour; None where it shows none.

    By the rate that the server's listing implies, where it has one: the limit was applied to that.
    """
    amount = positive(order.get("price"))
    if amount is None:
        return None
    if currency == "USD-Blockchain":
        return amount
    per_day = positive(part_of(server, "price", "on_demand", currency))
    in_usd = on_demand_usd(server, currency)
    if per_day and in_usd:
        return amount * in_usd / (per_day / HOURS_PER_DAY)
    return finite(order.usd_per_hour)


def candidates(client: RentalClient, settings: RentalSettings) -> tuple[list[Server], str]:
    """Servers to try, the cheapest first in the wished currency; and what to say if none worked."""
    if settings.server_id is not None:
        listed = client.get_marketplace(include_rented=True)
        pinned = [s for s in listed if s.id == settings.server_id]
        if not pinned:
            return [], f"server {settings.server_id} is not on the marketplace"
        server = pinned[0]
        why = "is rented" if server.rented else settings.why_not(server)
        if (server.reliability or 0.0) < settings.min_reliability:
            why = f"has a reliability of {server.reliability}"
        wanted = (settings.gpu_type or "").strip().lower()
        if not any(wanted in str(name).lower() for name in server.get("gpu_array") or [""]):
            why = f"has no {settings.gpu_type}"
        return ([], f"server {settings.server_id} {why}") if why else ([server], "")
    found = client.find_servers(
        settings.gpu_type, min_reliability=settings.min_reliability, use_spot=settings.spot
    )
    if not found:
        named = f" whose GPU has {settings.gpu_type!r} in its name" if settings.gpu_type else ""
        least = settings.min_reliability
        trusted = f", with a reliability from {least:g}" if least else ""
        return [], f"there is no free server{named}{trusted}"
    fitting = [s for s in found if s.id is not None and settings.why_not(s) is None]
    fitting.sort(key=lambda s: p if (p := settings.price_of(s)) is not None else float("inf"))
    return fitting, f"none of {len(found)} free servers of that kind fits price and currency"


# ==================================================================================================
# rental.budget
#
# What a rental costs, and when it has cost enough.
# ==================================================================================================


LONGEST_WATCH = 30.0  # seconds between two looks at the budget: the wall clock may have jumped
FEE_LEAD = 5.0  # seconds before the creation fee is due, when it counts for the budget


class Age:
    """How long something costs money: the larger of two clocks, for a laptop asleep still pays."""

    def __init__(self) -> None:
        self.monotonic = time.monotonic()
        self.wall = time.time()

    def seconds(self) -> float:
        """Return the seconds since it was made."""
        return max(0.0, time.monotonic() - self.monotonic, time.time() - self.wall)


class Meter:
    """What one order costs, by its price in USD per hour, which a new bid changes."""

    def __init__(self, usd_per_hour: float | None, fee: float) -> None:
        self.age = Age()
        self._fee = fee
        self._prices: list[tuple[float, float]] = [(0.0, usd_per_hour or 0.0)]  # from which second

    @property
    def usd_per_hour(self) -> float:
        """The price of this moment, without fees."""
        return self._prices[-1][1]

    def correct(self, usd_per_hour: float) -> None:
        """Set the price that has held from the start, before any bid has changed it."""
        if len(self._prices) == 1:
            self._prices = [(0.0, usd_per_hour)]

    def change(self, usd_per_hour: float) -> None:
        """Set the price that holds from now on."""
        self._prices.append((self.age.seconds(), usd_per_hour))

    def usd(self) -> float:
        """Return the cost so far in USD, with all fees."""
        prices, now, rent = self._prices, self.age.seconds(), 0.0
        for index, (since, price) in enumerate(prices):
            until = prices[index + 1][0] if index + 1 < len(prices) else now
            rent += price * max(0.0, min(until, now) - since) / 3600.0
        return rent * (1 + self._fee) + (CREATION_FEE if now >= CREATION_FEE_AFTER else 0.0)


class Budget:
    """The limits of a rental, and the meters of its orders."""

    def __init__(self, settings: RentalSettings) -> None:
        self._max_hours, self._max_cost = settings.max_hours, settings.max_cost_usd
        self._fee = settings.fee
        self._since: Age | None = None  # of the first order
        self._spent = 0.0  # USD, by orders that have ended
        self._meters: list[Meter] = []

    @property
    def hours(self) -> float:
        """Hours since the first order was sent."""
        return self._since.seconds() / 3600.0 if self._since else 0.0

    @property
    def cost_usd(self) -> float:
        """USD that all orders have cost so far."""
        return self._spent + sum(meter.usd() for meter in list(self._meters))

    def start(self, usd_per_hour: float | None) -> Meter:
        """Count another order from now on."""
        meter = Meter(usd_per_hour, self._fee)
        self._since = self._since or meter.age
        self._meters.append(meter)
        return meter

    def stop(self, meter: Meter) -> None:
        """Add up an order that costs nothing any more. Safe to repeat."""
        if meter in self._meters:
            spent = meter.usd()
            self._meters.remove(meter)
            self._spent += spent

    def drop(self, meter: Meter) -> None:
        """Forget an order that was not made."""
        if meter in self._meters:
            self._meters.remove(meter)
            if not self._meters and not self._spent:
                self._since = None

    def resume(self, meter: Meter) -> None:
        """Count an order again that was made after all, from when it was sent."""
        if meter not in self._meters:
            self._meters.append(meter)
            self._since = self._since or meter.age

    def exceeded_by(self) -> str | None:
        """Say which limit is reached; None where none is."""
        if self._max_hours is not None and self.hours >= self._max_hours:
            return f"max_hours={self._max_hours:g} is over"
        if self._max_cost is not None and self.cost_usd + self._fee_due() >= self._max_cost:
            return f"max_cost_usd={self._max_cost:g} is spent"
        return None

    def _fee_due(self) -> float:
        ages = [meter.age.seconds() for meter in self._meters]
        soon = [age for age in ages if CREATION_FEE_AFTER - FEE_LEAD <= age < CREATION_FEE_AFTER]
        return CREATION_FEE * len(soon)

    def seconds_left(self) -> float | None:
        """Return the seconds after which to look again; None without a limit."""
        if self._max_hours is None and self._max_cost is None:
            return None
        left = [LONGEST_WATCH]
        if self._max_hours is not None:
            left.append((self._max_hours - self.hours) * 3600.0)
        if self._max_cost is not None:
            per_second = sum(m.usd_per_hour for m in self._meters) * (1 + self._fee) / 3600.0
            if per_second:
                left.append((self._max_cost - self.cost_usd) / per_second)
            to_fee = [CREATION_FEE_AFTER - FEE_LEAD - m.age.seconds() for m in self._meters]
            left += [seconds for seconds in to_fee if seconds > 0]
        return max(0.002, min(left))


# ==================================================================================================
# rental.journal
#
# Keep the journal: a small file for each intent to buy, which outlives the process.
# ==================================================================================================


STATE_SUFFIX = ".json"
LONGEST_ENTRY = 65536  # bytes; a longer file is none of ours
_ID_ROOM = 20  # characters kept free for the order's number
_FIRST = '{"order_id": '

_state_lock = threading.Lock()
_written: dict[str, JournalEntry] = {}  # path -> what this process has written and holds


def this_machine() -> dict[str, str]:
    """Which machine this is, and which of its boots."""
    machine = read_line("/etc/machine-id") or read_line("/var/lib/dbus/machine-id")
    # The id itself is not to be handed around: machine-id(5).
    digest = hashlib.sha256(f"clore-client {machine}".encode()).hexdigest()[:16] if machine else ""
    return {
        "host": socket.gethostname(),
        "machine": digest,
        "boot": boot_id(),
    }


class JournalEntry:
    """A note of one intent to buy, as one small file.

    A living process holds the lock of what it has written. Whoever finds a file that nobody holds
    knows that its process is dead, and holds it until ``close()``.

    Attributes:
        data: what stands in the file.
        of_this_machine: whether this machine wrote it.
        abandoned: whether its order may run on without anybody to end it: the process is dead, or
            the rental gave it up.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data
        self.of_this_machine = True
        self.abandoned = False
        self._handle: int | None = None
        self._written_here = False

    @property
    def order_id(self) -> int | None:
        """The order that it became; None where that is not noted, or can't be right."""
        order_id = whole_id(self.data.get("order_id"))
        return order_id if order_id is not None and order_id > 0 else None

    def write(self) -> None:
        """Make the file, lock it, and have it on the disk."""
        self._written_here = True
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
        handle = os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o600)
        self._handle = handle
        if not lock_file(handle, patience=1.0):  # somebody may look whether it is locked
            raise OSError("the file can't be locked")
        rest = json.dumps(self.data)[1:]
        text = f"{_FIRST}{'null':<{_ID_ROOM}}, {rest}\n".encode()
        if os.name == "nt":
            os.lseek(handle, 0, os.SEEK_SET)
        if os.write(handle, text) != len(text):
            raise OSError("the disk is full")
        os.fsync(handle)
        _sync_folder(self.path.parent)
        with _state_lock:
            _written[str(self.path)] = self

    def note_order(self, order_id: int) -> None:
        """Write down which order it became, in place: a crash leaves the file whole."""
        if self._handle is None:
            return
        self.data["order_id"] = order_id
        try:
            os.lseek(self._handle, len(_FIRST), os.SEEK_SET)
            os.write(self._handle, f"{order_id:<{_ID_ROOM}}".encode())
            os.fsync(self._handle)
        except OSError as error:
            warn_of_state(f"{self.path.name} could not be updated", error)

    def hold(self, handle: int) -> None:
        """Keep the lock of a file that was found, until ``close()``."""
        self._handle = handle

    def remove(self) -> None:
        """Remove the file. Safe to repeat."""
        with _state_lock:
            _written.pop(str(self.path), None)
        handle, self._handle = self._handle, None
        if handle is None and self._written_here:
            return
        try:
            if os.name == "nt" and handle is not None:
                os.close(handle)
            self.path.unlink(missing_ok=True)  # elsewhere while it is still locked
            if os.name != "nt" and handle is not None:
                os.close(handle)
        except OSError as error:
            warn_of_state(f"{self.path} could not be removed", error)

    def close(self) -> None:
        """Let go of a file that was found; one that was written here stays held."""
        if not self._written_here:
            self.forget()

    def forget(self) -> None:
        """Close the file."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):
                os.close(handle)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_entry(folder: Path | None, data: dict[str, Any]) -> JournalEntry | None:
    """Write an entry; None, and one warning, where that is not possible."""
    if folder is None:
        return None
    name = f"{random.SystemRandom().getrandbits(96):024x}{STATE_SUFFIX}"
    machine = this_machine()
    entry = JournalEntry(folder / name, {**data, **machine, "pid": os.getpid()})
    try:
        entry.write()
    except OSError as error:
        entry.remove()
        warn_of_state(f"no note of this rental could be written to {folder}", error)
        return None
    return entry


def read_entries(folder: Path | None) -> list[JournalEntry]:
    """All entries of the folder. What can't be read is warned of once, and left alone."""
    if folder is None:
        return []
    try:
        names = sorted(n for n in os.listdir(folder) if n.endswith(STATE_SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        warn_of_state(f"{folder} could not be read", error)
        return []
    machine = this_machine()
    found = []
    for name in names:
        try:
            entry = _read_entry(folder / name, machine)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            warn_of_state(f"{folder / name} is no readable entry", error)
            continue
        if entry is not None:
            found.append(entry)
    return found


def _read_entry(path: Path, machine: dict[str, str]) -> JournalEntry | None:
    with _state_lock:
        written = _written.get(str(path))
    if written is not None:
        return written
    flags = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    # Some systems lock only what is open for writing.
    handle = os.open(path, flags | os.O_RDWR)
    keep = False
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LONGEST_ENTRY:
            raise ValueError("not a small file")
        try:
            free = lock_file(handle)
        except OSError as error:  # nobody can be told from anybody: hands off
            warn_of_state(f"files in {path.parent} can't be locked", error)
            free = False
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, LONGEST_ENTRY)
        if not text:  # made this moment, or by a process that died before it sent anything
            return None
        if free and not path.exists():  # removed by its owner meanwhile
            return None
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("not an object")
        found = JournalEntry(path, data)
        found.of_this_machine = all(data.get(k) == machine[k] for k in ("host", "machine"))
        found.abandoned = free and found.of_this_machine
        if found.abandoned:
            found.hold(handle)
            keep = True
        return found
    finally:
        if not keep:
            os.close(handle)


def _forget_entries() -> None:
    # A lock lives as long as any copy of its file is open: a child must not hold the parent's.
    global _state_lock
    _state_lock = threading.Lock()
    for entry in _written.values():
        entry.forget()
    _written.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_entries)


# ==================================================================================================
# rental.orders
#
# The orders of one rental: what is noted of them, and what became of those in doubt.
# ==================================================================================================


LOOKS = 6  # how many lists must lack an order at least, before there is none


class RentalOrder:
    """One order of a rental, from the intent to its confirmed end.

    Attributes:
        server_id: the server that it is for.
        entry: its note in the state folder.
        meter: what it costs.
        order_id: None as long as it is not known whether there is an order.
        answered: the API has answered that there is none, which is not always true.
    """

    def __init__(self, server_id: int, entry: JournalEntry | None, meter: Meter) -> None:
        self.server_id = server_id
        self.entry = entry
        self.meter = meter
        self.sent_at = time.monotonic()
        self.order_id: int | None = None
        self.answered = False
        self._cancellation: Cancellation | None = None
        self.absent: list[float] = []  # when it was asked for, and was in no list

    @property
    def accepted(self) -> bool:
        """Whether its cancel was accepted."""
        return self._cancellation is not None and self._cancellation.accepted

    def cancellation(self, orders: AccountOrders) -> Cancellation:
        """Return the one end of this order."""
        if self._cancellation is None:
            self._cancellation = Cancellation(orders, self.order_id or 0)
        return self._cancellation

    def __str__(self) -> str:
        return (
            f"order {self.order_id} may still be running"
            if self.order_id is not None
            else f"an order of server {self.server_id} may have been made"
        )


class RentalOrders:
    """All purchases of a rental that cost money, or may.

    Attributes:
        before: ids of the orders that are not its own.
    """

    def __init__(
        self,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        budget: Budget,
        wake: Callable[[], object],
        taken: Callable[[], set[int | None]],
    ) -> None:
        self._orders = orders
        self._settings = settings
        self._folder = folder
        self._budget = budget
        self._wake = wake  # called when the price of an order changes
        self._taken = taken  # gives the orders of all open rentals of this account
        self._all: list[RentalOrder] = []
        self.before: set[int] = set()

    def __iter__(self) -> Iterator[RentalOrder]:
        return iter(list(self._all))

    def note_intent(self, server_id: int, price: float | None) -> RentalOrder:
        """Note a purchase in the state folder and here, before it is sent."""
        settings = self._settings
        entry = write_entry(
            self._folder,
            {
                "server_id": server_id,
                "started": time.time(),
                "server_clock": self._orders.client.server_clock,
                "image": settings.image,
                "currency": settings.currency,
                "spot": settings.spot,
                "base_url": self._orders.client.base_url,
                "account": self._account(),
                "before": sorted(self.before),
            },
        )
        purchase = RentalOrder(server_id, entry, self._budget.start(price))
        self._all.append(purchase)
        return purchase

    def became(self, purchase: RentalOrder, order_id: int) -> None:
        """Note which order a purchase became."""
        purchase.order_id = order_id
        self._budget.resume(purchase.meter)
        if purchase.entry is not None:
            purchase.entry.note_order(order_id)

        def new_bid(usd_per_hour: float) -> None:
            purchase.meter.change(usd_per_hour)
            self._wake()

        self._orders.bid_listeners[order_id] = new_bid

    def refused(self, purchase: RentalOrder) -> None:
        """Note that the API has answered that there is no order, which is not always true."""
        purchase.answered = True
        purchase.sent_at = time.monotonic()  # it was carried out by now, if it was
        self._budget.drop(purchase.meter)

    def forget(self, purchase: RentalOrder) -> None:
        """Drop a purchase of which nothing is left."""
        if purchase.entry is not None:
            purchase.entry.remove()
        self._remove(purchase)
        self._budget.drop(purchase.meter)

    def give_up(self, purchase: RentalOrder) -> None:
        """Leave a purchase to ``leftovers()``."""
        if purchase.entry is not None:
            purchase.entry.abandoned = True
        self._remove(purchase)
        if purchase.order_id is None:
            self._budget.drop(purchase.meter)

    def keep(self, purchase: RentalOrder) -> None:
        """Leave an order running on purpose."""
        if purchase.entry is not None:
            purchase.entry.remove()
        self._remove(purchase)

    def _remove(self, purchase: RentalOrder) -> None:
        if purchase in self._all:
            self._all.remove(purchase)
        self._orders.bid_listeners.pop(purchase.order_id or 0, None)

    def look_for(self, purchase: RentalOrder, orders: list[Order], asked_at: float) -> bool:
        """Look for the order of a purchase; True when time has shown that there is none.

        A new order can take ``order_lag`` seconds to be listed. As a list can be empty for a
        moment, several must lack it, over as long again.

        Parameters:
            purchase: whose outcome is in doubt.
            orders: the active ones.
            asked_at: monotonic time at which they were asked for.
        """
        fitting = [order for order in orders if self._fits(order, purchase)]
        if len(fitting) == 1 and not self._is_held(purchase):
            self.became(purchase, fitting[0].id or 0)
        lag = self._orders.client.order_lag
        if fitting:
            purchase.absent.clear()
        elif asked_at >= purchase.sent_at + lag and self._lists_ours(orders):
            purchase.absent.append(asked_at)
        absent = purchase.absent
        return len(absent) >= LOOKS and absent[-1] - absent[0] >= lag

    def _lists_ours(self, orders: list[Order]) -> bool:
        """Whether a list has all orders that surely run: one without them proves nothing."""
        running = {p.order_id for p in self._all if p.order_id is not None and not p.accepted}
        return running <= {order.id for order in orders}

    def _fits(self, order: Order, purchase: RentalOrder) -> bool:
        settings = self._settings
        return (
            order.server_id == purchase.server_id
            and order.id not in self.before
            and order.id not in self._taken()
            and fits_intent(order, settings.image, settings.currency, settings.spot)
        )

    def _is_held(self, purchase: RentalOrder) -> bool:
        """Whether another rental could be for the same server: hands off, then."""
        held = False
        for entry in self._notes_for(purchase.server_id):
            mine = purchase.entry is not None and entry.path == purchase.entry.path
            held = held or not (mine or entry.abandoned)
            entry.close()
        return held

    def drop_dead_notes(self, server_id: int) -> None:
        """Drop notes of dead processes that could be taken for an order that is ours."""
        if self._settings.spot:
            return  # several bids may stand on one server
        for entry in self._notes_for(server_id):
            if entry.abandoned and entry.of_this_machine and entry.order_id is None:
                entry.remove()
            entry.close()

    def _account(self) -> str:
        return account_digest(self._orders.client.base_url, self._orders.client.api_key)

    def _notes_for(self, server_id: int) -> list[JournalEntry]:
        """Return what is noted of this server for this account; each is to be closed."""
        account, notes = self._account(), []
        for entry in read_entries(self._folder):
            data = entry.data
            if data.get("server_id") == server_id and data.get("account") == account:
                notes.append(entry)
            else:
                entry.close()
        return notes


def fits_intent(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Whether an order that still runs can come of an intent."""
    return not order.has_ended and same_purchase(order, image, currency, spot)


# ==================================================================================================
# rental.cleanup
#
# End the orders of a rental: cancel, confirm, and settle what is in doubt.
# ==================================================================================================


LOOK_EVERY = 0.5  # seconds between two looks for an order whose making is in doubt


class Cleanup:
    """Ends the orders of one rental.

    Attributes:
        left_at: monotonic time at which the block was left; None while it goes on.
        hurried: interrupted while it is left: the confirmation is skipped.
        abandoned: interrupted three times: what may run is left to ``leftovers()``.
    """

    def __init__(
        self,
        orders: AccountOrders,
        rental_orders: RentalOrders,
        settings: RentalSettings,
        budget: Budget,
    ) -> None:
        self._orders = orders
        self._rental_orders = rental_orders
        self._settings = settings
        self._budget = budget
        self.left_at: float | None = None
        self.hurried = False
        self.abandoned = False

    def leave(self) -> None:
        """Note that the block is left: cancels have a deadline from here on."""
        self.left_at = self.left_at or time.monotonic()

    def deadline(self) -> float:
        """Return until when cancels are kept up: without end while the block goes on."""
        if self.left_at is None:
            return math.inf
        return self.left_at + self._settings.cancel_timeout

    def in_doubt(self, being_made: RentalOrder | None) -> list[RentalOrder]:
        """Return the purchases that may have become orders, but for the one being made."""
        return [p for p in self._rental_orders if p.order_id is None and p is not being_made]

    def end_all(self) -> BaseException | None:
        """End all that costs money, the cancels first; None when it is gone."""
        started = time.monotonic()
        failures: list[BaseException | None] = [
            self.cancel(purchase, self.deadline)
            for purchase in self._rental_orders
            if purchase.order_id is not None
        ]
        for purchase in self._rental_orders:
            if purchase.order_id is None:
                failures.append(self._settle_doubt(purchase))
        for purchase in self._rental_orders:
            failures.append(self.confirm(purchase, started))
        return next((failure for failure in failures if failure is not None), None)

    def cancel(
        self, purchase: RentalOrder, deadline: Callable[[], float]
    ) -> CancelUnconfirmedError | None:
        """Cancel until that is accepted, or leave the order to ``leftovers()``."""
        failure = self.try_to_cancel(purchase, deadline)
        if failure is None:
            return None
        order_id = purchase.order_id or 0
        self._rental_orders.give_up(purchase)
        logger.error("order %d could not be cancelled: it may still be running", order_id)
        return purchase.cancellation(self._orders).unconfirmed(self._settings.cancel_timeout)

    def try_to_cancel(
        self, purchase: RentalOrder, deadline: Callable[[], float]
    ) -> CloreError | None:
        if purchase.accepted:
            return None
        failure = purchase.cancellation(self._orders).keep_on(
            deadline, confirm=False, stop=lambda: self.abandoned
        )
        if failure is None:  # from here on it costs nothing
            self._budget.stop(purchase.meter)
        return failure

    def confirm(self, purchase: RentalOrder, started: float) -> CloreError | None:
        """Wait until an order that was cancelled is listed as ended."""
        order_id = purchase.order_id or 0
        deadline = confirm_until(started, self._settings.cancel_timeout)
        failure = (
            None
            if self.hurried
            else purchase.cancellation(self._orders).keep_on(
                lambda: deadline, confirm=True, stop=lambda: self.hurried
            )
        )
        if self.hurried:
            logger.warning("order %d was cancelled, which is not confirmed: interrupted", order_id)
            self._rental_orders.give_up(purchase)
            return CloreError(
                f"order {order_id} was cancelled; that it has ended was not confirmed"
            )
        if failure is not None:
            logger.error("order %d was cancelled, but may still be running", order_id)
            self._rental_orders.give_up(purchase)
            return failure
        self._rental_orders.forget(purchase)
        self._rental_orders.before.add(order_id)
        return None

    # --- purchases in doubt ---

    def look_at_doubts(self, being_made: RentalOrder | None) -> None:
        """Look once for the orders of purchases that the API has refused with code 1."""
        for purchase in self.in_doubt(being_made):
            try:
                there_is_none = self._look_for(purchase)
            except CloreError as error:
                logger.debug("looking for an order of server %d: %s", purchase.server_id, error)
                continue
            if purchase.order_id is not None:
                logger.warning(
                    "order %d of server %d was made after all: it is ended",
                    purchase.order_id,
                    purchase.server_id,
                )
                until = time.monotonic() + self._settings.cancel_timeout
                self.try_to_cancel(purchase, lambda: until)  # noqa: B023
            elif there_is_none:
                self._rental_orders.forget(purchase)

    def _look_for(self, purchase: RentalOrder) -> bool:
        """Look once for the order of a purchase; True when time has shown that there is none."""
        asked_at = time.monotonic()
        deadline = max(asked_at + SHORTEST_TRY, self.deadline())
        try:
            orders = limited(self._orders.active, deadline=deadline, urgent=True)
        except CloreError:
            purchase.absent.clear()  # nobody knows what that list would have said
            raise
        return self._rental_orders.look_for(purchase, orders, asked_at)

    def _settle_doubt(self, purchase: RentalOrder) -> BaseException | None:
        """Look for an order until it is found, which is then ended, or time has shown that there
        is none."""
        logger.warning("looking for an order of server %d", purchase.server_id)
        cause: BaseException | None = None
        shown = False
        while not (shown or self.abandoned):
            try:
                shown = self._look_for(purchase)
                cause = None
            except CloreError as error:
                cause = error
            if purchase.order_id is not None:
                return self.cancel(purchase, self.deadline)
            if time.monotonic() >= self.deadline():
                break
            if not shown:
                time.sleep(min(LOOK_EVERY, max(0.001, self._orders.client.order_lag / LOOKS)))
        if shown and purchase.answered:
            self._rental_orders.forget(purchase)
            return None
        self._rental_orders.give_up(purchase)
        logger.warning(
            "no order of server %d showed up: look at leftovers() later", purchase.server_id
        )
        unknown = OutcomeUnknownError(
            f"{purchase}, and did not show up: look at leftovers() and get_orders() in a minute",
            endpoint="/v1/create_order",
        )
        unknown.__cause__ = cause
        return unknown


# ==================================================================================================
# rental.handoff
#
# Wait for another thread, in ways that an interrupt leaves whole.
# ==================================================================================================


WAKE_EVERY = 0.5  # seconds after which a thread that waits looks again, should nobody wake it


class Gate:
    """Lets threads wait for something that happens once.

    Not a ``threading.Event``, whose lock an interrupt can leave locked.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()

    def open(self) -> None:
        """Let all threads through."""
        self.is_open = True
        self._queue.put(None)

    def wait(self) -> bool:
        """Wait for a moment, and return whether it is open."""
        if not self.is_open:
            try:
                self._queue.get(timeout=WAKE_EVERY)
            except queue.Empty:
                return self.is_open
            self._queue.put(None)  # for whoever waits as well
        return self.is_open


class ThreadCall:
    """A call that another thread makes."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self.done = Gate()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do it, and keep what comes of it."""
        try:
            self.result = self._action()
        except BaseException as error:
            self.error = error
        self.done.open()


# ==================================================================================================
# rental.recovery
#
# What rentals of processes that are dead have left running.
# ==================================================================================================


# How far an order's time of creation, by the server's clock, may lie before and after the time of
# the intent, by this machine's. A proxy may hold a request for a while.
CLOCKS_APART = 300.0
CLOCKS_COMPARED = 5.0  # where the entry tells how far they were apart
LATEST_ORDER = 180.0
LEFTOVER_LOOK = 1.0  # seconds between two looks for orders that may not be listed yet


class Leftover:
    """An order that a rental left behind, and what its entry tells.

    Attributes:
        order: as it is listed now; None where it is in no list, which does not mean that it has
            ended, and for an entry of another machine without one.
        order_id, server_id: its numbers; ``order_id`` may be None where ``order`` is.
        started: Unix time at which it was to be ordered.
        host, pid: where.
    """

    def __init__(self, entry: JournalEntry, order: Order | None) -> None:
        data = entry.data
        self.order = order
        self.order_id = order.id if order is not None else entry.order_id
        self.server_id = whole_id(data.get("server_id"))
        self.started = finite(data.get("started"))
        host, pid = data.get("host"), data.get("pid")
        self.host = host if isinstance(host, str) else None
        self.pid = pid if isinstance(pid, int) else None
        self.path = entry.path

    def __repr__(self) -> str:
        return (
            f"<Leftover order {self.order_id} of server {self.server_id}, by process {self.pid} "
            f"on {self.host!r}>"
        )


class Leftovers:
    """What ``CloreClient.leftovers`` has found.

    Attributes:
        abandoned: orders that still run, of rentals of this machine whose process is dead.
        elsewhere: entries of other machines, whose processes can't be seen from here.
        unnoted: active orders of the account that no entry tells of.
    """

    def __init__(
        self, abandoned: list[Leftover], elsewhere: list[Leftover], unnoted: list[Order]
    ) -> None:
        self.abandoned = abandoned
        self.elsewhere = elsewhere
        self.unnoted = unnoted

    def __bool__(self) -> bool:
        """Whether there is anything of the three."""
        return bool(self.abandoned or self.elsewhere or self.unnoted)

    def __repr__(self) -> str:
        return (
            f"<Leftovers: {self.abandoned}, {len(self.elsewhere)} of other machines, "
            f"{len(self.unnoted)} orders without an entry>"
        )


class _Survey:
    """One look at the entries and at the orders."""

    def __init__(self, orders: AccountOrders, folder: Path | None) -> None:
        self._orders = orders
        account = account_digest(orders.client.base_url, orders.client.api_key)
        self.entries: list[JournalEntry] = []
        self._read(folder, account)
        try:
            self.listed = {o.id: o for o in orders.active() if o.id is not None}
            # Again: a living process may have noted and ordered one between the two.
            self._read(folder, account)
            self._match()
        except BaseException:
            self.close()
            raise

    def _read(self, folder: Path | None, account: str) -> None:
        known = {entry.path for entry in self.entries}
        for entry in read_entries(folder):
            if entry.path in known or entry.data.get("account") != account:
                entry.close()
            else:
                self.entries.append(entry)

    def close(self) -> None:
        for entry in self.entries:
            entry.close()

    def _match(self) -> None:
        named = {entry.order_id for entry in self.entries}
        self.of: dict[str, Order] = {}  # path of an entry -> its order
        held: set[int] = set()
        living: set[int] = set()  # orders that may be those of living processes
        for entry in self.entries:
            order_id = entry.order_id
            if order_id is not None:
                fitting = [self.listed[order_id]] if order_id in self.listed else []
            else:
                fitting = [
                    order
                    for number, order in self.listed.items()
                    if number not in named and intended(entry.data, order)
                ]
            if entry.abandoned or not entry.of_this_machine:
                if len(fitting) > 1:
                    logger.warning("several orders fit %s: none is taken for it", entry.path)
                elif fitting:
                    self.of[str(entry.path)] = fitting[0]
                    held.add(fitting[0].id or 0)
            else:
                living.update(order.id or 0 for order in fitting)
        held |= living
        self._settle_claims(living)
        self.unnoted = [o for i, o in self.listed.items() if i not in held and not o.has_ended]

    def _settle_claims(self, living: set[int]) -> None:
        """Leave each order at most one entry."""
        claims: dict[int, list[JournalEntry]] = {}
        for entry in self.entries:
            if (order := self.of.get(str(entry.path))) is not None:
                claims.setdefault(order.id or 0, []).append(entry)
        for order_id, entries in claims.items():
            if order_id in living or (
                len(entries) > 1
                and not all(entry.abandoned and entry.of_this_machine for entry in entries)
            ):
                logger.warning("order %d may be another process's: it is left alone", order_id)
                losers = entries
            else:
                # Dead ones of this machine, whichever it was: the last is the likeliest.
                entries.sort(key=lambda entry: finite(entry.data.get("started")) or 0.0)
                losers = entries[:-1]
            for entry in losers:
                self.of.pop(str(entry.path))

    def order_of(self, entry: JournalEntry) -> Order | None:
        order = self.of.get(str(entry.path))
        return None if order is None or order.has_ended else order

    def undecided(self, wait: float) -> bool:
        """Whether an order of a dead process may not be listed yet."""
        return any(
            entry.abandoned and self.order_of(entry) is None and _young(entry.data, wait)
            for entry in self.entries
        )

    def tidy(self, wait: float) -> None:
        """Remove the entries whose orders have ended, or were never made."""
        self.missing: list[JournalEntry] = []  # noted orders that no list has
        intents: list[JournalEntry] = []
        for entry in self.entries:
            if not entry.abandoned or self.order_of(entry) is not None:
                continue
            if entry.order_id is None:
                if not _young(entry.data, LATEST_ORDER + CLOCKS_APART):
                    intents.append(entry)
            elif not _young(entry.data, wait):
                self._tidy_order(entry, entry.order_id)
        if intents:
            self._tidy_intents(intents)

    def _tidy_order(self, entry: JournalEntry, order_id: int) -> None:
        try:
            state = self._orders.state(order_id)
        except CloreError:
            state = OrderState.ABSENT
        if state is OrderState.ENDED:
            logger.info("the order of %s has ended: the entry is removed", entry.path)
            entry.remove()
        else:
            self.missing.append(entry)

    def _tidy_intents(self, entries: list[JournalEntry]) -> None:
        # One look is not enough: a list can be empty for a moment.
        time.sleep(self._orders.client.order_lag)
        orders = self._orders.active()
        for entry in entries:
            if not any(intended(entry.data, order) for order in orders):
                logger.info("no order came of %s: the entry is removed", entry.path)
                entry.remove()

    def abandoned(self) -> list[tuple[JournalEntry, Order | None]]:
        """Return the entries of dead processes of this machine whose orders may run."""
        ours = [entry for entry in self.entries if entry.abandoned and entry.of_this_machine]
        return [
            (entry, order)
            for entry in ours
            if (order := self.order_of(entry)) is not None or entry in self.missing
        ]

    def result(self) -> Leftovers:
        elsewhere = [Leftover(e, self.order_of(e)) for e in self.entries if not e.of_this_machine]
        abandoned = [Leftover(entry, order) for entry, order in self.abandoned()]
        return Leftovers(abandoned, elsewhere, self.unnoted)


def intended(data: dict[str, Any], order: Order) -> bool:
    """Whether an order can come of the intent that an entry without an order's number tells."""
    before = data.get("before")
    if order.server_id != whole_id(data.get("server_id")):
        return False
    if isinstance(before, list) and order.id in before:
        return False
    if not fits_intent(order, data.get("image"), data.get("currency"), data.get("spot")):
        return False
    started, made = finite(data.get("started")), order.started_at
    if started is None or made is None:
        return False
    ahead = finite(data.get("server_clock"))
    apart = CLOCKS_APART if ahead is None else CLOCKS_COMPARED
    return -apart <= made - started - (ahead or 0.0) <= LATEST_ORDER + apart


def _young(data: dict[str, Any], seconds: float) -> bool:
    started = finite(data.get("started"))
    # One in the future is young: the clock has been set back since.
    return started is not None and time.time() - started < seconds


def _settled(orders: AccountOrders, folder: Path | None, wait: float) -> _Survey:
    deadline = time.monotonic() + wait
    while True:
        survey = _Survey(orders, folder)
        try:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not survey.undecided(wait):
                survey.tidy(wait)
                return survey
        except BaseException:
            survey.close()
            raise
        survey.close()
        time.sleep(min(LEFTOVER_LOOK, max(0.01, wait / 10), remaining))


def find_leftovers(orders: AccountOrders, folder: Path | None, wait: float) -> Leftovers:
    """What is left behind; see ``CloreClient.leftovers``."""
    survey = _settled(orders, folder, wait)
    survey.close()
    return survey.result()


def end_leftovers(
    orders: AccountOrders, folder: Path | None, wait: float, timeout: float
) -> list[int]:
    """End what dead processes of this machine left; see ``CloreClient.cancel_leftovers``."""
    survey = _settled(orders, folder, wait)
    ended: list[int] = []
    failed: dict[int, BaseException] = {}
    try:
        # Their locks are held: no other process does the same meanwhile.
        for entry, order in survey.abandoned():
            order_id = entry.order_id if order is None else order.id
            if order_id is None:
                continue
            started = time.monotonic()
            # What no list has may be long gone, and its cancel be refused for ever.
            until = started + (
                timeout if order is not None else min(timeout, orders.client.order_lag)
            )
            cancellation = Cancellation(orders, order_id)
            failure = cancellation.keep_on(lambda: until, confirm=False)  # noqa: B023
            if failure is None:
                confirmed_by = confirm_until(started, timeout)
                failure = cancellation.keep_on(lambda: confirmed_by, confirm=True)  # noqa: B023
            if failure is None:
                logger.info("order %d, which a dead process left, was ended", order_id)
                entry.remove()
                ended.append(order_id)
            else:
                failed[order_id] = failure
    finally:
        survey.close()
    if failed:
        ids = ", ".join(map(str, failed))
        raise CancelUnconfirmedError(
            f"not confirmed to have ended: {ids} (ended: {ended})", order_ids=tuple(failed)
        ) from next(iter(failed.values()))
    return ended


# ==================================================================================================
# rental.signals
#
# SIGTERM and SIGHUP end rentals: one handler for the process.
# ==================================================================================================


SIGNALS = tuple(s for n in ("SIGTERM", "SIGHUP") if (s := getattr(signal, n, None)) is not None)


class SignalExit(SystemExit):
    """A signal that ends the process, raised in the main thread so that ``with`` blocks are left.

    No ``Exception``, just as ``SystemExit``; left alone, the process ends with 128 + the signal.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class _Handling:
    """The state of the one handler. A handler can't take a lock: what it reads are attributes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.pid = 0
        self.installed: set[int] = set()
        self.warned: set[int] = set()
        self.stopping: int | None = None
        # Told of a signal, each must be fit for a handler: no locks, no network.
        self.listeners: dict[int, Callable[[int], None]] = {}


_handling = _Handling()


def in_main_thread() -> bool:
    """Whether this is the main thread, the only one that signals interrupt."""
    return threading.get_ident() == threading.main_thread().ident


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _handling.pid != os.getpid() or not _handling.users:
        # A forked child, or nobody is left who wants to know: as if there were no handler.
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    _handling.stopping = signum
    for tell in list(_handling.listeners.values()):
        tell(signum)
    raise SignalExit(signum)


def listen(owner: Any, tell: Callable[[int], None] | None) -> None:
    """Call ``tell`` from the handler when a signal comes; None ends that."""
    if tell is None:
        _handling.listeners.pop(id(owner), None)
    else:
        _handling.listeners[id(owner)] = tell


def stopping_signal() -> int | None:
    """The signal that this process is ending for, seen from a thread other than the main one."""
    return None if in_main_thread() else _handling.stopping


class SignalHandling:
    """One user of the handler; the last ``close()`` restores what was there before.

    The first one in the main thread installs it, only where a signal has its default action.
    """

    def __init__(self) -> None:
        self._open = True
        self._pid = os.getpid()
        main = in_main_thread()
        with _handling.lock:
            if _handling.pid != self._pid:
                _handling.users, _handling.pid, _handling.installed = 0, self._pid, set()
            _handling.users += 1
            if main:
                _handling.stopping = None
        if main:
            for signum in SIGNALS:
                _install(signum)
        elif not _handling.installed:
            _warn_once(
                0,
                "signals can only be handled from the main thread: SIGTERM and SIGHUP will not "
                "end this rental; call handle_signals() there first",
            )

    def close(self) -> None:
        """Stop using it. Safe to repeat."""
        if self._pid != os.getpid():
            return
        with _handling.lock:
            if self._open:
                self._open = False
                _handling.users -= 1
            last = not _handling.users
        if last and in_main_thread():  # else it stays, and does what the default does
            for signum in list(_handling.installed):
                if signal.getsignal(signum) is _on_signal:
                    signal.signal(signum, signal.SIG_DFL)
                _handling.installed.discard(signum)

    def __enter__(self) -> SignalHandling:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _install(signum: int) -> None:
    current = signal.getsignal(signum)
    if current is _on_signal:
        _handling.installed.add(signum)
    elif current == signal.SIG_DFL:
        signal.signal(signum, _on_signal)
        _handling.installed.add(signum)
    else:
        name = signal.Signals(signum).name
        what = "is ignored" if current == signal.SIG_IGN else "has a handler already"
        _warn_once(signum, f"{name} {what}, which stays: it will not end rentals")


def _warn_once(signum: int, text: str) -> None:
    if signum not in _handling.warned:
        _handling.warned.add(signum)
        logger.warning("%s", text)


def _forget_signals() -> None:
    # Another thread may have held the lock at the fork. The handler sees by the pid whose it is.
    _handling.lock = threading.Lock()
    _handling.users, _handling.stopping = 0, None
    _handling.listeners.clear()
    for signum in list(_handling.installed):
        # With a handler of Python a child that waits for a lock can miss the signal; and it has no
        # rental to end.
        if signal.getsignal(signum) is _on_signal:
            signal.signal(signum, signal.SIG_DFL)
    _handling.installed.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_signals)


# ==================================================================================================
# rental.worker
#
# The orders of one rental: bought, watched and ended in a thread that no signal interrupts.
# ==================================================================================================


Result = TypeVar("Result")

LOOK_BESIDE = 2.0  # the same, while the block goes on
GIVE_UP_WITHIN = 2.0  # seconds for three interrupts that end even the cancelling

# After these no order was made.
SURELY_NO_ORDER = (
    AuthenticationError,
    CloreAPIError,
    CloreConnectionError,
    ConfigurationError,
    RateUnknownError,
    SpendingLimitError,
    ValueError,
    TypeError,
    ImportError,
)

_open_rentals: dict[int, RentalWorker] = {}
_exiting = False


class RentalWorker:
    """Owns the orders of one rental, from the first request to the confirmed end.

    The thread ends them when the block is left, when the ``with`` statement or the rental is gone
    without having said so (an interrupt can cut ``__exit__`` short at its first line), when the
    budget is spent, at a signal that another thread got, and at the interpreter's exit.

    Attributes:
        finished: opened when nothing is left to do.
        failure: what the user must know of the end; None when all is gone.
        connections: SSH connections to close with the rental.
        closed: whether they are closed, and signals not handled any more.
    """

    def __init__(
        self,
        client: RentalClient,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        inbox: queue.SimpleQueue[Any],
        holders: list[weakref.ref[Any]],
    ) -> None:
        self._client = client
        self._orders = orders
        self._settings = settings
        self._inbox = inbox
        self._holders = holders  # the rental, and what its with statement holds
        self.pid = os.getpid()
        self.budget = Budget(settings)
        self.finished = Gate()
        self.failure: BaseException | None = None
        self.connections: list[Any] = []
        self.closed = False
        self.kept = False
        self.signalled: int | None = None
        self.exceeded: tuple[str, float, float, int | None] | None = None  # why, h, USD, id
        self._main = in_main_thread()
        self._handling: SignalHandling | None = None
        self._rental_orders = RentalOrders(
            orders, settings, folder, self.budget, wake=lambda: inbox.put(None), taken=self._taken
        )
        self._cleanup = Cleanup(orders, self._rental_orders, settings, self.budget)
        self._current: RentalOrder | None = None  # the one that the user has
        self._started = False
        self._interrupted_at: list[float] = []

    # --- what the rental asks for, in its own thread ---

    def start(self) -> None:
        """Start the thread, and let signals and the interpreter's exit end the rental, too."""
        self._handling = SignalHandling()
        listen(self, self._on_signal)
        context = contextvars.copy_context()
        _open_rentals[id(self)] = self
        try:
            # Not threading.Thread, whose start() waits with a lock that an interrupt can leave
            # locked: then the thread would never run.
            _thread.start_new_thread(context.run, (self._work,))
        except RuntimeError as error:
            _open_rentals.pop(id(self), None)
            self.close()
            raise RentalError(f"nothing was rented: {error}") from error
        self._started = True

    @property
    def abandoned(self) -> bool:
        """Whether it was interrupted three times: what may run is left to ``leftovers()``."""
        return self._cleanup.abandoned

    def ask(self, action: Callable[[], Result]) -> Result:
        """Have the worker do something, and return what comes of it, or raise that."""
        request = ThreadCall(action)
        self._inbox.put(request)
        while not request.done.wait():
            if self.finished.is_open:
                raise RentalError("the rental is over: nothing is rented any more")
        if request.error is not None:
            raise request.error
        return request.result  # type: ignore[no-any-return]

    def note_orders(self, orders: list[Order]) -> None:
        """Note which orders are there before the first purchase."""
        self._rental_orders.before = {order.id for order in orders if order.id is not None}

    def buy(self, server: Server, price: float | None, arguments: dict[str, Any]) -> Order:
        """Order a server.

        Parameters:
            server: as it is listed.
            price: in USD per hour, without fees.
            arguments: of ``create_order``.
        """
        return self.ask(lambda: self._buy(server, price, arguments))

    def end_order(self) -> BaseException | None:
        """End the current order; None when that is confirmed, else what to tell the user."""
        return self.ask(self._end_current)

    def keep(self) -> None:
        """Leave the current order running."""
        self.ask(self._keep)

    def told_price(self, usd_per_hour: float) -> None:
        """Take the price that the current order shows."""
        if self._current is not None:
            self._current.meter.correct(usd_per_hour)

    def check(self) -> None:
        """Raise when the rental was ended from elsewhere."""
        if self.pid != os.getpid():
            return
        if not self.kept and self._current is not None and self._exceed():
            self._inbox.put(None)  # the worker ends it: no network work here
        if self.exceeded is not None:
            raise self.budget_error()
        if self.signalled is None:
            self.signalled = stopping_signal()
        if self.signalled is not None:
            raise SignalExit(self.signalled)
        if _exiting:
            raise RentalError("the interpreter is about to exit: nothing is rented any more")

    def leave(self, interrupted: bool) -> list[BaseException]:
        """End the rental, and wait for that. Safe to repeat.

        The first interrupt meanwhile ends only the confirmation. The third within two seconds,
        the one that the block was left by included, ends even the cancelling.

        Parameters:
            interrupted: whether the block was left by an interrupt.

        Returns:
            The interrupts that came meanwhile.
        """
        self._begin_to_leave()
        if not self._started:  # or this moment, and has bought nothing: it sees that it is left
            return []
        caught: list[BaseException] = []
        times = self._interrupted_at
        if interrupted:
            times.append(time.monotonic())
        while True:
            try:
                if self.finished.wait():
                    break
            except (KeyboardInterrupt, SystemExit) as interrupt:
                self._cleanup.hurried = True
                caught.append(interrupt)
                times.append(time.monotonic())
                if len(times) >= 3 and times[-1] - times[-3] <= GIVE_UP_WITHIN:
                    self._abandon()
                    break
        return caught

    def budget_error(self) -> BudgetExceededError:
        """Make the error for a budget that is spent."""
        text, hours, cost, order_id = self.exceeded or ("", 0.0, 0.0, None)
        # No more than is known: the cancel may take its time, or come too late to be seen here.
        ended = self._current is None or self._current.accepted
        state = "was ended" if ended else "is being ended"
        return BudgetExceededError(
            f"{text}: order {order_id} {state}, after {hours:.4g} h and {cost:.4g} USD",
            order_id=order_id,
            hours=hours,
            cost_usd=cost,
        )

    def close_ssh(self) -> None:
        """Close the SSH connections of the rental."""
        while True:
            try:
                connection = self.connections.pop()
            except IndexError:  # another thread may do the same
                return
            try:
                connection.close()
            except Exception as error:
                logger.debug("an SSH connection could not be closed: %s", error)

    def close(self) -> None:
        """Close the connections, and handle signals no more."""
        self.close_ssh()
        listen(self, None)
        if self._handling is not None:
            self._handling.close()
        self.closed = True

    def _begin_to_leave(self) -> None:
        self._cleanup.leave()
        self._inbox.put(None)

    def _abandon(self) -> None:
        """Stop ending the rental: what may run is left to ``leftovers()``."""
        self._cleanup.abandoned = True
        left = list(self._rental_orders)
        for purchase in left:
            if purchase.entry is not None:
                purchase.entry.abandoned = True
        ids = tuple(p.order_id for p in left if p.order_id is not None)
        text = f"interrupted three times: {'; '.join(map(str, left))}: see leftovers()"
        if left:
            self.failure = (
                CancelUnconfirmedError(text, order_ids=ids) if ids else OutcomeUnknownError(text)
            )

    def _on_signal(self, signum: int) -> None:
        # Within a signal handler: nothing here takes a lock.
        if not self._main:
            self.signalled = signum
            self._inbox.put(None)

    # --- the thread ---

    def _work(self) -> None:
        try:
            while not (self._is_left() or self.kept):
                self._next_request()
                if self._must_end():
                    self._end_early()
                self._cleanup.look_at_doubts(self._current)
        except BaseException as error:
            self.failure = error
        self._cleanup.leave()
        try:
            failure = self._cleanup.end_all()
        except BaseException as error:
            failure = error
        if not self._cleanup.abandoned:
            self.failure = failure or self.failure
        _open_rentals.pop(id(self), None)
        if self._is_forgotten():  # then nobody else does this
            self.close()
            if self.failure is not None:
                logger.error("a rental whose block is gone: %s", self.failure)
        self.finished.open()

    def _next_request(self) -> None:
        timeout = None if self.exceeded else self.budget.seconds_left()
        if self._cleanup.in_doubt(self._current):
            look = min(LOOK_BESIDE, max(0.001, self._orders.client.order_lag / LOOKS))
            timeout = min(look, math.inf if timeout is None else timeout)
        try:
            request = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return
        if isinstance(request, ThreadCall):
            request.run()

    def _taken(self) -> set[int | None]:
        """Return the orders of all open rentals of this account in this process."""
        account = self._orders.claims
        workers = [w for w in list(_open_rentals.values()) if w._orders.claims is account]
        return {purchase.order_id for worker in workers for purchase in worker._rental_orders}

    def _is_left(self) -> bool:
        return self._cleanup.left_at is not None or self._is_forgotten()

    def _is_forgotten(self) -> bool:
        """Whether the ``with`` statement, or the rental itself, is gone."""
        return any(holder() is None for holder in self._holders)

    def _must_end(self) -> bool:
        current = self._current
        if current is None or current.accepted or current.order_id is None or self.kept:
            return False
        return self.signalled is not None or self._exceed()

    def _exceed(self) -> bool:
        """Whether it is over its budget; from the first time on, that stays so."""
        if self.exceeded is None and (text := self.budget.exceeded_by()) is not None:
            order_id = None if self._current is None else self._current.order_id
            self.exceeded = text, self.budget.hours, self.budget.cost_usd, order_id
            logger.warning("%s", self.budget_error())
        return self.exceeded is not None

    # --- buying ---

    def _buy(self, server: Server, price: float | None, arguments: dict[str, Any]) -> Order:
        self.check()
        purchase = self._current = self._rental_orders.note_intent(server.id or 0, price)
        try:
            order: Order = self._client.create_order(purchase.server_id, **arguments)
            if order.id is None:
                raise OutcomeUnknownError("the answer to create_order names no order")
        except DatabaseError:
            self._rental_orders.refused(purchase)
            self._current = None
            raise
        except SURELY_NO_ORDER as error:
            # Of an unknown code, or an answer that is no envelope, nobody knows what it means.
            if not isinstance(error, CloreAPIError) or error.code in ERROR_CODES:
                self._rental_orders.forget(purchase)
                self._current = None
            raise
        self._rental_orders.became(purchase, order.id)
        self._rental_orders.drop_dead_notes(purchase.server_id)
        return order

    def _keep(self) -> None:
        current = self._current
        if current is None or current.order_id is None or current.accepted:
            raise RentalError("the order was ended already: it can't be kept")
        self.kept = True
        logger.info("order %d stays, on purpose", current.order_id)
        self._rental_orders.keep(current)

    # --- the end ---

    def _end_early(self) -> None:
        """End the current order while the block goes on."""
        current = self._current
        if current is None or current.order_id is None:
            return
        # Beside the cancel, which may have to wait for an API that is down.
        threading.Thread(target=self.close_ssh, name="clore-rental-close", daemon=True).start()
        failure = self._cleanup.try_to_cancel(current, self._cleanup.deadline)
        if failure is not None:
            logger.error("order %d could not be cancelled: %s", current.order_id, failure)
        self.close_ssh()  # one may have been opened meanwhile

    def _end_current(self) -> BaseException | None:
        current, started = self._current, time.monotonic()
        if current is None:
            return None
        until = started + self._settings.cancel_timeout
        failure: BaseException | None = self._cleanup.cancel(
            current, lambda: min(until, self._cleanup.deadline())
        )
        if failure is None:
            failure = self._cleanup.confirm(current, started)
        self._current = None
        return failure


def _end_all() -> None:
    """At the interpreter's exit: end the rentals of daemon threads, and of blocks never left."""
    global _exiting
    _exiting = True
    # One that was interrupted three times is not waited for a second time.
    workers = [w for w in list(_open_rentals.values()) if w.pid == os.getpid() and not w.abandoned]
    for worker in workers:
        worker._begin_to_leave()
    for worker in workers:
        worker.leave(interrupted=False)
        if worker.failure is not None:
            logger.error("at exit: %s", worker.failure)


atexit.register(_end_all)

if hasattr(os, "register_at_fork"):
    # The rentals are the parent's.
    os.register_at_fork(after_in_child=_open_rentals.clear)


# ==================================================================================================
# rental.rental
#
# rent(): a server found, ordered, awaited, and given back whatever happens.
# ==================================================================================================


# After these the next candidate may be had.
NEXT_CANDIDATE = (
    ServerAlreadyRentedError,
    ServerOfflineError,
    CurrencyNotAllowedError,
    BidTooLowError,
    DatabaseError,
)


class _BlockExit:
    """``Rental.__exit__``, as an object of its own for each ``with`` statement.

    A ``with`` statement looks ``__exit__`` up before it enters, holds it, and lets go of it when
    it is left, however that happens. So the worker sees by a weak reference when the block is
    gone, also where an interrupt cuts ``__exit__`` short at its first line.
    """

    def __get__(self, rental: Rental | None, owner: type[Rental]) -> Callable[..., None]:
        if rental is None:
            return owner._leave
        leave = functools.partial(owner._leave, rental)
        if rental._worker is None:
            rental._block = weakref.ref(leave, rental._inbox.put)
        return leave


class Rental:
    """A server rented for the length of a ``with`` block; made by ``CloreClient.rent``.

    What costs money is done by a :class:`RentalWorker`, in a thread of its own. The thread that
    enters the block looks for servers, and waits.

    Attributes:
        order: the order as it was when it started to run, with what was sent to get in.
        server: the server as it was listed.
        tried: (server id, why not) for each host that did not work.
    """

    def __init__(
        self,
        client: RentalClient,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
    ) -> None:
        self._client = client
        self._orders = orders
        self._settings = settings
        self._folder = folder
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of the worker
        self._block: weakref.ref[Any] | None = None
        self._worker: RentalWorker | None = None
        self._order: Order | None = None
        self._server: Server | None = None
        self._shell: Any = None
        self.tried: list[tuple[int, str]] = []

    def __repr__(self) -> str:
        worker = self._worker
        state = "not open" if worker is None or worker.finished.is_open else "open"
        if worker is not None and worker.kept:
            state = "kept"
        return f"<Rental of order {self._order.id if self._order else None}, {state}>"

    # --- what a user asks it ---

    @property
    def order(self) -> Order:
        """The order as it was when it started to run."""
        if self._order is None:
            raise RentalError("nothing is rented: use it as `with client.rent(...) as rental:`")
        return self._order

    @property
    def server(self) -> Server:
        """The server as it was listed."""
        if self._server is None:
            raise RentalError("nothing is rented: use it as `with client.rent(...) as rental:`")
        return self._server

    @property
    def hours(self) -> float:
        """Hours since the first order of this rental; the larger of both clocks."""
        return self._worker.budget.hours if self._worker else 0.0

    @property
    def cost_usd(self) -> float:
        """USD that it has cost so far, with all fees and the hosts that did not work.

        By the price of the order, the rate that the listing implied, 5 % (spot: 1.25 %) on top,
        and 0.10 USD from the tenth minute on. A bid that this client has changed counts from then
        on. It counts from when the order was handed over to be sent, and stops when the cancel was
        accepted.
        """
        return self._worker.budget.cost_usd if self._worker else 0.0

    def ssh(self, **options: Any) -> paramiko.SSHClient:
        """A connection to the machine, closed at the end of the block. Needs paramiko.

        Parameters:
            **options: for :meth:`CloreClient.connect_ssh`, as ``key_path=``.
        """
        worker = self._open_worker()
        try:
            connection = self._client.connect_ssh(self.order, **options)
        except Exception:
            worker.check()  # it may have been ended meanwhile
            raise
        worker.connections.append(connection)
        try:
            worker.check()
        except BaseException:
            connection.close()
            raise
        return connection

    def run(self, command: str | Sequence[str], **options: Any) -> CommandResult:
        """Run a command on the machine, as :meth:`CloreClient.run` does. Needs paramiko.

        Parameters:
            command: for the shell of the machine; a list of arguments is quoted.
            **options: for :meth:`CloreClient.run`; those of a login count when it logs in for the
                first time. That connection is kept until the end of the block.

        Raises:
            CommandError: the exit code was not 0.
            BudgetExceededError: the rental was ended meanwhile.
        """
        return self._over_ssh(self._client.run, (command,), options)  # type: ignore[no-any-return]

    def upload(self, local: Any, remote: Any, **options: Any) -> Transferred:
        """Copy a file or directory to the machine, as :meth:`CloreClient.upload` does."""
        return self._over_ssh(self._client.upload, (local, remote), options)  # type: ignore[no-any-return]

    def download(self, remote: Any, local: Any, **options: Any) -> Transferred:
        """Copy a file or directory from the machine, as :meth:`CloreClient.download` does."""
        return self._over_ssh(self._client.download, (remote, local), options)  # type: ignore[no-any-return]

    def _over_ssh(
        self, method: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Call a method of the client with the rental's own connection."""
        worker = self._open_worker()
        login = {name: options.pop(name) for name in LOGIN_OPTIONS & options.keys()}
        if self._shell is None or not _is_open(self._shell):
            self._shell = self.ssh(**login)
        try:
            return method(self.order, *arguments, ssh=self._shell, **options)
        finally:
            worker.check()

    def keep(self) -> Order:
        """Leave the order running, on purpose: the end of the block does nothing any more.

        Neither budget nor signals end it from here on.
        """
        worker, order = self._open_worker(), self.order
        if worker.finished.is_open:
            raise RentalError(f"order {order.id} was ended already: it can't be kept")
        worker.keep()
        return order

    def _open_worker(self) -> RentalWorker:
        """The worker, where the rental was not ended from elsewhere."""
        if self._worker is None:
            raise RentalError("nothing is rented: use it as `with client.rent(...) as rental:`")
        self._worker.check()
        return self._worker

    # --- the block ---

    def __enter__(self) -> Rental:
        if self._worker is not None:
            raise RentalError("a rental can be entered only once: call rent() again")
        holders: list[weakref.ref[Any]] = [weakref.ref(self, self._inbox.put)]
        if self._block is not None and self._block() is not None:
            holders.append(self._block)
        self._worker = RentalWorker(
            self._client, self._orders, self._settings, self._folder, self._inbox, holders
        )
        try:
            self._worker.start()
            self._walk(self._worker)
        except BaseException as error:
            self._leave(type(error), error)
            raise
        return self

    __exit__ = _BlockExit()

    def _leave(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Give the server back, and raise what the user must know beyond ``error``."""
        worker = self._worker
        if worker is None or worker.pid != os.getpid():
            return  # a forked child: the order is its parent's
        interrupts: list[BaseException] = []
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        while not worker.closed:
            try:
                interrupts += worker.leave(interrupted)
                worker.close()
            except (KeyboardInterrupt, SystemExit) as late:  # between two lines of these
                interrupts.append(late)
                interrupted = True
        self._shell = None
        _raise_beyond(error, worker, interrupts)

    # --- the walk ---

    def _walk(self, worker: RentalWorker) -> None:
        settings, client = self._settings, self._client
        worker.note_orders(client.get_orders())
        servers, nothing = candidates(client, settings)
        for server in servers[: settings.attempts]:
            worker.check()
            reason = self._try(worker, server)
            if reason is None:
                return
            logger.info("server %s: %s", server.id, reason)
            self.tried.append((server.id or 0, reason))
        tried = "; ".join(f"server {server_id}: {why}" for server_id, why in self.tried)
        raise RentalError(
            f"none of {len(self.tried)} servers worked: {tried}" if tried else nothing,
            tried=tuple(self.tried),
        )

    def _try(self, worker: RentalWorker, server: Server) -> str | None:
        """Rent a server; None when it runs, else why it did not work."""
        try:
            order = self._buy(worker, server)
        except NEXT_CANDIDATE as error:
            return str(error)
        self._order, self._server = order, server
        reason = self._too_dear(worker, order, server) or self._deploy(worker, order, server)
        if reason is None:
            return None
        worker.check()
        failure = worker.end_order()
        self._order = self._server = None
        if failure is not None:
            raise failure
        return reason

    def _buy(self, worker: RentalWorker, server: Server) -> Order:
        settings = self._settings
        price = settings.price_of(server)
        arguments = {**settings.order_arguments, "find_timeout": settings.find_timeout}
        if settings.spot:
            arguments["spot_price"] = price
            # The rate for the bid, now: what is asked for later would count as time that costs.
            self._client.get_spot_market(server.id or 0)
        return worker.buy(server, price, arguments)

    def _deploy(self, worker: RentalWorker, order: Order, server: Server) -> str | None:
        """Wait until an order runs; None then, else why it does not."""
        settings = self._settings
        try:
            running: Order = self._client.wait_for_order(
                order.id or 0, timeout=settings.deploy_timeout, poll_interval=settings.poll_interval
            )
        except (WaitTimeoutError, OrderEndedError) as error:
            return str(error)
        if "ssh_password" in order:
            running["ssh_password"] = order["ssh_password"]
        self._order = running
        reason = self._too_dear(worker, running, server)
        if reason is None:
            worker.check()
        return reason

    def _too_dear(self, worker: RentalWorker, order: Order, server: Server) -> str | None:
        price = shown_usd(order, server, self._settings.currency)
        if price is not None:
            worker.told_price(price)
        if not self._settings.over(price):
            return None
        return f"order {order.id} costs {price:.4g} USD per hour, over the limit"


def _raise_beyond(
    error: BaseException | None, worker: RentalWorker, interrupts: list[BaseException]
) -> None:
    """Raise what the user must know beyond the exception that a block was left by.

    Parameters:
        error: that exception.
        worker: which has ended the rental, or was interrupted.
        interrupts: what came while it was ended.
    """
    failure = worker.failure
    note = None if failure is None else str(failure)
    plain = error is None or isinstance(error, Exception)
    exceeded = worker.exceeded
    if exceeded is not None and plain and not _is_of(error, exceeded[3]):
        raised: BaseException = worker.budget_error()
        if note:
            add_note_to(raised, note)
        raise raised from error
    if plain and not interrupts and worker.signalled is not None and not worker.kept:
        interrupts = [SignalExit(worker.signalled)]
    if interrupts and plain:
        if note:
            add_note_to(interrupts[-1], note)
        raise interrupts[-1]
    if error is None and failure is not None:
        raise failure
    if error is not None and note and error is not failure:
        add_note_to(error, note)


def _is_of(error: BaseException | None, order_id: int | None) -> bool:
    return isinstance(error, BudgetExceededError) and error.order_id == order_id


def _is_open(ssh: Any) -> bool:
    transport = ssh.get_transport()
    return transport is not None and transport.is_active()


# ==================================================================================================
# ssh.transport
#
# paramiko's transports, made to bear what a stranger's machine may send, and fast far away.
#
# paramiko has no settings for most of this: what is set here are attributes of its objects.
# ==================================================================================================


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


# ==================================================================================================
# ssh.connect
#
# Getting into a rented machine. paramiko is imported when it is used, not with the package.
# ==================================================================================================


# What may be given for a login to methods that do more than log in.
LOGIN_OPTIONS = frozenset({"password", "key_path", "passphrase", "wait", "host_key"})
DEFAULT_USER = "root"
DEFAULT_PORT = 22
PARAMIKO_LOGGER = "clore_client.paramiko"
KEEPALIVE = 15  # seconds
SSH_PAUSE = 2.0  # seconds between two tries to reach an sshd that is not up yet


def parse_ssh_command(order: Any) -> dict[str, Any]:
    """Host, port and user of ``connection.ssh``; see ``CloreClient.parse_ssh_connection``."""
    raw = _ssh_line(order)
    host, port, user = _parsed(raw)
    return {"host": host, "port": port, "user": user if plain_user(user) else DEFAULT_USER,
            "raw": raw}  # fmt: skip


def plain_address(order: Any) -> dict[str, Any]:
    """The same of an order whose host and user are a plain name or address; else an error."""
    if not isinstance(order, Mapping):
        raise TypeError(
            f"order must be one as wait_for_order() returns it, not {short_repr(order)}"
        )
    address = parse_ssh_command(order)
    user = _parsed(address["raw"])[2]
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


def _parsed(raw: str) -> tuple[str, int, str]:
    """The host, if it is a plain one; the port; and the user as it stands there, or ``""``."""
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


def import_paramiko() -> Any:
    """paramiko, or an ImportError that says what to install."""
    try:
        import paramiko
    except ImportError as error:
        raise ImportError(
            "SSH needs paramiko: pip install 'clore-client[ssh]' (or: pip install paramiko scp)"
        ) from error
    # It tells of each try that fails with a traceback and the host's own words, which Python, or
    # whoever has set up logging, would print. A handler of its own still gets them.
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
        *,
        password: str | None,
        key_path: str | os.PathLike[str] | None,
        passphrase: str | None,
        timeout: float,
        wait: float,
        keys: KeyCheck,
    ) -> None:
        self.address = plain_address(order)
        if passphrase is not None and key_path is None:
            raise ValueError("passphrase is for the key of key_path, and there is none")
        if key_path is not None:
            check_local_path("key_path", key_path)
        self.password = password
        self.key_path = None if key_path is None or password else os.path.expanduser(key_path)
        self.timeout = timeout
        self.wait = wait
        self.keys = keys
        self._paramiko = import_paramiko()
        # Read here: a key that can't be used is the caller's mistake, and no reason to wait.
        self.key = None if self.key_path is None else self._read_key(self.key_path, passphrase)

    @property
    def where(self) -> str:
        """The address, for an error."""
        return "{user}@{host}:{port}".format(**self.address)

    def _read_key(self, path: str, passphrase: str | None) -> Any:
        shown = printable(repr(path), 200)
        if not os.path.isfile(path):
            raise ValueError(f"key_path: there is no file {shown}")
        secret = None if passphrase is None else passphrase.encode()
        try:
            return self._paramiko.PKey.from_path(path, secret)
        except TypeError as error:  # it is encrypted and there is none, or the other way round
            if passphrase is None:
                raise ValueError(f"key_path: {shown} is encrypted: give passphrase=") from error
            raise ValueError(f"passphrase: {shown} is not encrypted") from error
        except Exception as error:
            if isinstance(error, ValueError) and passphrase and self._is_encrypted(path):
                raise ValueError(f"passphrase is not the one of {shown}") from error
            raise ValueError(
                f"key_path: {shown} is no private key that can be used: "
                f"{printable(str(error) or type(error).__name__, 200)}"
            ) from error

    def _is_encrypted(self, path: str) -> bool:
        try:
            self._paramiko.PKey.from_path(path)
        except TypeError:
            return True
        except Exception:
            return False
        return False

    def open(self) -> paramiko.SSHClient:
        """Log in, and bear an sshd that is not up yet until ``wait`` is over."""
        deadline = time.monotonic() + self.wait
        while True:
            try:
                return self.once()
            except NotUpYetError as error:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise SSHError(f"no SSH at {self.where} within {self.wait:g}s: {error}") from (
                        error.__cause__
                    )
                logger.debug("no SSH at %s yet: %s", self.where, error)
                time.sleep(min(SSH_PAUSE, remaining))

    def once(self) -> paramiko.SSHClient:
        """Try to log in."""
        ssh = self._paramiko.SSHClient()
        ssh.set_log_channel(PARAMIKO_LOGGER)
        ssh.set_missing_host_key_policy(self.keys)
        plain = self.password is None and self.key is None
        try:
            ssh.connect(
                self.address["host"],
                port=self.address["port"],
                username=self.address["user"],
                password=self.password,
                pkey=self.key,
                timeout=self.timeout,
                banner_timeout=self.timeout,
                auth_timeout=self.timeout,
                channel_timeout=self.timeout,
                allow_agent=plain,
                look_for_keys=plain,
                transport_factory=self._transport,
            )
            if not ssh.get_transport().is_authenticated():  # paramiko returns for half a login
                raise self._paramiko.ssh_exception.PartialAuthentication([])
        except BaseException as error:
            if self._is_refusal(ssh, error):
                judged: BaseException = self._refused(ssh, error)
            else:
                judged = _judged(error, self._paramiko, self.where)
            _give_up(ssh)
            if judged is error:
                raise
            raise judged from error
        transport = ssh.get_transport()
        if transport is not None:
            transport.set_keepalive(KEEPALIVE)
        try:
            self.keys.remember()
        except BaseException:
            ssh.close()
            raise
        return ssh  # type: ignore[no-any-return]

    def _transport(self, sock: Any, **options: Any) -> Any:
        transport = prepared_transport(sock, options, self.timeout, self.keys.wanted_types)
        transport.auth_interactive_dumb = self._no_questions
        return transport

    def _is_refusal(self, ssh: Any, error: BaseException) -> bool:
        if isinstance(error, self._paramiko.AuthenticationException):
            return True
        # With more keys than the machine has patience for, paramiko misses the connection.
        missed = "existing session" in str(error).lower()
        transport = ssh.get_transport() if missed else None
        return transport is not None and bool(transport.initial_kex_done)

    def _refused(self, ssh: Any, error: BaseException) -> SSHError:
        """Says what was refused, and what the host accepts."""
        if self.password is not None:
            what = "password"
        elif self.key is not None:
            what = f"key {printable(repr(self.key_path), 200)} ({fingerprint_of(self.key)})"
        else:
            what = "keys of the SSH agent and of ~/.ssh"
        if "timeout" in str(error).lower():
            return SSHError(f"{self.where} did not answer to the login within {self.timeout:g}s")
        accepted = getattr(error, "allowed_types", None)
        if not accepted and not ssh.get_transport().is_active():
            return SSHError(
                f"{self.where} closed the connection during the login with the {what}: "
                "refused, after too many tries perhaps"
            )
        accepted = accepted or self._accepted(ssh)
        if isinstance(error, self._paramiko.ssh_exception.PartialAuthentication):
            more = ", ".join(printable(str(name), 40) for name in accepted[:8])
            return SSHError(f"{self.where} took the {what}, but wants more than that: {more}")
        takes = ", ".join(printable(str(name), 40) for name in accepted[:8])
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
    """An sshd that may answer later; within this room only."""


def _give_up(ssh: Any) -> None:
    transport = ssh.get_transport()
    ssh.close()
    if transport is not None:  # or paramiko's timer would live on with it
        transport.packetizer.complete_handshake()


def _judged(error: BaseException, paramiko_module: Any, where: str) -> BaseException:
    """What to raise for a login that failed: ``NotUpYetError`` where time may heal it."""
    text = printable(str(error).replace("[Errno None] ", "") or type(error).__name__, 200)
    if isinstance(error, EOFError):
        text = "it closed the connection"
    elif "existing session" in text.lower():  # paramiko's word for a handshake that took too long
        text = "it did not finish the SSH handshake in time"
    judged: BaseException = error
    if isinstance(error, SSHError):
        judged = error
    elif isinstance(error, socket.gaierror):
        judged = NotUpYetError(f"the host name is not known ({text})")
    elif isinstance(error, (OSError, EOFError)):
        judged = NotUpYetError(text)
    elif isinstance(error, paramiko_module.SSHException):
        if "no authentication methods" in text.lower():
            judged = SSHError(
                f"there is nothing to log in to {where} with: pass password= or key_path="
            )
        elif any(part in text.lower() for part in ("banner", "reset", "eof", "handshake in time")):
            judged = NotUpYetError(text)
        else:
            judged = SSHError(f"SSH to {where} failed: {text}")
    elif isinstance(error, Exception):  # of paramiko, which takes every answer for a sensible one
        judged = SSHError(f"SSH to {where} failed: {type(error).__name__}: {text}")
    return judged


# ==================================================================================================
# ssh.host_keys
#
# Host keys: pinned for each order, since a host and port go to later orders with another key.
# ==================================================================================================


PINS_FILE = "known_hosts"  # in the state folder, and in the form of OpenSSH
LONGEST_PINS = 1_000_000  # bytes; a longer file is none of ours
MOST_PINS = 1000
LOCK_PATIENCE = 2.0  # seconds
# One key, several signatures: OpenSSH and paramiko negotiate these by name.
_NEGOTIATED = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa")}

Pin = tuple[str, str]  # the key's type and its base64, as in known_hosts


def pin_of(key: Any) -> Pin:
    """A paramiko key as it stands in ``known_hosts``."""
    return key.get_name(), key.get_base64()


def fingerprint_of(key: Any) -> str:
    """``SHA256:...`` of a paramiko key, as ``ssh-keygen -l`` prints it."""
    return pin_fingerprint(pin_of(key))


def pin_fingerprint(pin: Pin) -> str:
    """``SHA256:...`` of a pin."""
    digest = hashlib.sha256(base64.b64decode(pin[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def check_host_key(name: str, value: Any) -> str:
    """``"pin"``, ``"accept"``, or a fingerprint."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be 'pin', 'accept' or a fingerprint, not {short_repr(value)}")
    if value in ("pin", "accept") or re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}=?", value):
        return value.rstrip("=")
    raise ValueError(
        f"{name} must be 'pin', 'accept' or a fingerprint like 'SHA256:...', as "
        f"`ssh-keygen -l` prints it, not {short_repr(value)}"
    )


class Pins:
    """The keys that the machines of an account have shown: of this client, and of the folder.

    Parameters:
        folder: the state folder, or None where none is in use.
        account: what stands for the account in a name.
    """

    def __init__(self, folder: Path | None, account: str) -> None:
        self.path = None if folder is None else folder / PINS_FILE
        self._account = account[:12]
        self._seen: dict[str, list[Pin]] = {}

    def alias(self, order_id: int | None, address: str) -> str:
        """The name under which an order's key is kept; without a number it is the address."""
        return f"clore-order-{order_id}-{self._account}" if order_id else address

    def of(self, alias: str) -> list[Pin]:
        """The keys that are known of a machine."""
        if alias in self._seen:
            return self._seen[alias]
        return [pin for names, pin in self._lines() if _names(names, alias)]

    def keep(self, alias: str, pin: Pin) -> None:
        """Pin a key, instead of those that were."""
        if self.of(alias) != [pin]:
            self._rewrite(alias, pin)
        self._seen[alias] = [pin]

    def forget(self, alias: str) -> bool:
        """Forget a machine's keys; whether there were any."""
        known = bool(self.of(alias))
        self._seen.pop(alias, None)
        if known:
            self._rewrite(alias, None)
        return known

    def make_folder(self) -> None:
        """Make the folder, where OpenSSH is to pin a key before this client does."""
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
        """Replace a machine's lines; a folder that can't be written costs a warning only."""
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
    """Whether the first word of a line names a machine; OpenSSH may have written its hash."""
    if not names.startswith("|1|"):
        return alias in names.split(",")
    try:
        salt, digest = (base64.b64decode(part) for part in names[3:].split("|"))
    except ValueError:
        return False
    return hmac.compare_digest(hmac.new(salt, alias.encode(), hashlib.sha1).digest(), digest)


class KeyCheck:
    """What is asked of a host key, for one order; also paramiko's policy for unknown hosts.

    Parameters:
        pins: where keys are kept.
        order_id: of the order, or None.
        address: its host and port.
        mode: ``"pin"``, ``"accept"`` or a fingerprint.
    """

    def __init__(self, pins: Pins, order_id: int | None, address: str, mode: str) -> None:
        self._pins = pins
        self._order_id = order_id
        self._alias = pins.alias(order_id, address)
        self._mode = mode
        self._shown = threading.local()  # several threads may log in at once

    @property
    def wanted_types(self) -> list[str]:
        """The kinds of the keys that are known, as they are negotiated."""
        if self._mode == "accept":
            return []
        kinds = [kind for kind, _ in self._pins.of(self._alias)]
        return [name for kind in kinds for name in _NEGOTIATED.get(kind, (kind,))]

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        """Called by paramiko before anything secret is sent."""
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
        """The login worked: pin the key that was shown."""
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


# ==================================================================================================
# ssh.openssh
#
# How OpenSSH is told to log in: a line for a terminal, and an entry for its configuration.
# ==================================================================================================


def terminal_line(address: dict[str, Any], pins: Pins, alias: str, key_path: Any) -> str:
    """See ``CloreClient.ssh_command``."""
    words = ["ssh", "-p", str(address["port"])]
    if key_path is not None:
        path = _whole_path(key_path)
        # -i wants the file to be there both as it is written and with its %-signs expanded.
        plain = _unexpanded(path) == path
        words += ["-i", path] if plain else ["-o", f"IdentityFile={_config_path(path)}"]
    if pins.path is not None and pins.of(alias) and alias.startswith("clore-order-"):
        for name, value in _pinned(pins, alias):
            words += ["-o", f"{name}={value}"]
    words.append(f"{address['user']}@{address['host']}")
    return shlex.join(words)


def config_entry(name: str, address: dict[str, Any], pins: Pins, alias: str, key_path: Any) -> str:
    """See ``CloreClient.ssh_config``."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name must be a plain name for `ssh <name>`, not {short_repr(name)}")
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


def _pinned(pins: Pins, alias: str) -> list[tuple[str, str]]:
    """What makes OpenSSH insist on the pinned key, or pin the first one in the same place."""
    known = pins.of(alias)
    strict = ("StrictHostKeyChecking", "yes" if known else "accept-new")
    if pins.path is not None and alias.startswith("clore-order-"):
        if not known:
            pins.make_folder()
        return [("HostKeyAlias", alias), ("UserKnownHostsFile", _config_path(str(pins.path))),
                ("GlobalKnownHostsFile", "none"), ("UpdateHostKeys", "no"), strict]  # fmt: skip
    if not known:  # nothing is kept between two logins
        return [("UserKnownHostsFile", os.devnull), ("StrictHostKeyChecking", "accept-new")]
    kind, key = known[0]
    # No file to put it in: OpenSSH 8.5 and newer take it from a command.
    return [("HostKeyAlias", "clore"), ("UserKnownHostsFile", os.devnull),
            ("KnownHostsCommand", f"/bin/echo clore {kind} {key}"), strict]  # fmt: skip


def _whole_path(path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"key_path must be a path, not {short_repr(path)}")
    check_local_path("key_path", path)
    return str(os.path.abspath(os.path.expanduser(os.fspath(path))))


def _unexpanded(path: str) -> str:
    """A path with what OpenSSH would expand taken as it is."""
    if "\n" in path or "${" in path:
        raise ValueError(
            "key_path or state_dir: OpenSSH can't be told of a newline or '${': "
            f"{short_repr(path)}"
        )
    return path.replace("%", "%%")


def _config_path(path: str) -> str:
    """The same as a word of a configuration."""
    if '"' in path:
        raise ValueError(
            f"key_path or state_dir: OpenSSH can't be told of a double quote: {short_repr(path)}"
        )
    escaped = _unexpanded(path).replace("\\\\", "\\\\\\\\")
    return f'"{escaped}"' if re.search(r"[\s'#]", escaped) else escaped


# ==================================================================================================
# ssh.sessions
#
# Connections for the length of one call: as many as are wanted, opened at the same time.
# ==================================================================================================


def login_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a login, by their names."""
    for name in given:
        if name not in LOGIN_OPTIONS:
            raise TypeError(
                f"there is no argument {name!r}, neither here nor among those of a login: "
                f"{', '.join(sorted(LOGIN_OPTIONS))}"
            )
    return given


class Connected:
    """Connections for the length of a block: the caller's one, or as many as are wanted.

    Parameters:
        login: to be used, or None for the caller's connection.
        ssh: that one.
        ahead: further connections that are opened at the same time as the first.
    """

    def __init__(self, login: Login | None, ssh: paramiko.SSHClient | None, ahead: int = 0) -> None:
        self._login = login
        self.ssh: Any = ssh
        self._ahead = ahead if login is not None else 0
        self._opening: list[threading.Thread] = []
        self._opened: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __enter__(self) -> Connected:
        if self._login is not None:
            for _ in range(self._ahead):
                thread = threading.Thread(
                    target=self._open_ahead, args=(self._login,), name="clore-login", daemon=True
                )
                thread.start()
                self._opening.append(thread)
            try:
                self.ssh = self._first(self._login)
            except BaseException:
                self._close_ahead()
                raise
        return self

    def _first(self, login: Login) -> Any:
        try:
            return login.once()
        except NotUpYetError:
            # Where one connection is all that there is, another may have it.
            for _ in range(self._ahead):
                self._ahead -= 1
                if (ssh := self._opened.get()) is not None:
                    return ssh
        return login.open()

    def __exit__(self, *_: object) -> None:
        self._close_ahead()
        if self._login is not None:
            self.ssh.close()

    def _open_ahead(self, login: Login) -> None:
        try:
            self._opened.put(login.once())
        except Exception as error:
            logger.debug("a further connection was refused: %s", error)
            self._opened.put(None)

    def _close_ahead(self) -> None:
        for thread in self._opening:
            thread.join()
        while not self._opened.empty():
            unused = self._opened.get()
            if unused is not None:
                unused.close()

    @property
    def another(self) -> Callable[[], Any] | None:
        """Gives one more connection to the same machine; None where there is but the caller's."""
        return None if self._login is None else self._next

    def _next(self) -> Any:
        if self._ahead > 0:
            self._ahead -= 1
            return self._opened.get()
        return self._login.once() if self._login is not None else None


# ==================================================================================================
# ssh.access
#
# Log in to the machines of an account, each with the host key of its order.
# ==================================================================================================


class SSHAccess:
    """The way to the machines of an account.

    Parameters:
        client: whose key and base URL stand for the account.
        orders: which know what was sent to get in.
        folder: the state folder, or None where none is in use.
    """

    def __init__(self, client: OrdersClient, orders: AccountOrders, folder: Path | None) -> None:
        self._client = client
        self._orders = orders
        self._folder = folder
        self._by_account: dict[str, Pins] = {}

    @property
    def _host_keys(self) -> Pins:
        """The host keys of the account of this moment."""
        account = account_digest(self._client.base_url, self._client.api_key)
        return self._by_account.setdefault(account, Pins(self._folder, account))

    def forget_host_key(self, order: Mapping[str, Any]) -> bool:
        """Forget the host key of an order; see ``CloreClient.forget_host_key``."""
        return self._host_keys.forget(self._alias(order))

    def terminal_line(self, order: Mapping[str, Any], key_path: Any) -> str:
        """Return the line for a terminal; see ``CloreClient.ssh_command``."""
        return terminal_line(plain_address(order), self._host_keys, self._alias(order), key_path)

    def config_entry(self, order: Mapping[str, Any], name: str | None, key_path: Any) -> str:
        """Return the entry for a configuration; see ``CloreClient.ssh_config``."""
        address = plain_address(order)
        number = self._order_number(order)
        entry = name if name is not None else f"clore-{number}" if number else "clore"
        return config_entry(
            check_text("name", entry), address, self._host_keys, self._alias(order), key_path
        )

    def login(
        self,
        order: Mapping[str, Any],
        *,
        password: str | None = None,
        key_path: str | os.PathLike[str] | None = None,
        passphrase: str | None = None,
        wait: float = 120.0,
        timeout: float = 30.0,
        host_key: str = "pin",
    ) -> Login:
        """Everything that is needed to log in, checked; nothing is sent."""
        address = plain_address(order)
        check_number("timeout", timeout, above=True, unit="seconds")
        check_number("wait", wait, infinite=True, unit="seconds")
        mode = check_host_key("host_key", host_key)
        for name, value in (
            ("password", password), ("key_path", key_path), ("passphrase", passphrase),
        ):  # fmt: skip
            if value is not None and not (name == "key_path" and hasattr(value, "__fspath__")):
                check_text(name, value, secret=name != "key_path")
        if not password and not key_path:
            sent = self._orders.credentials.get(self._order_number(order) or 0, {})
            password = order.get("ssh_password") or sent.get("ssh_password")
        keys = KeyCheck(
            self._host_keys, self._order_number(order), "{host}:{port}".format(**address), mode
        )
        return Login(
            order,
            password=password,
            key_path=key_path,
            passphrase=passphrase,
            timeout=timeout,
            wait=wait,
            keys=keys,
        )

    def connected(
        self,
        order: Mapping[str, Any],
        ssh: paramiko.SSHClient | None,
        login: dict[str, Any],
        timeout: float = 30.0,
        ahead: int = 0,
    ) -> Connected:
        options = login_options(login)
        if ssh is not None:
            return Connected(None, ssh)
        return Connected(self.login(order, timeout=timeout, **options), None, ahead)

    @staticmethod
    def _order_number(order: Mapping[str, Any]) -> int | None:
        return Order(order).id

    def _alias(self, order: Mapping[str, Any]) -> str:
        if not isinstance(order, Mapping):
            raise TypeError(
                f"order must be one as wait_for_order() returns it, not {short_repr(order)}"
            )
        address = parse_ssh_command(order)
        return self._host_keys.alias(self._order_number(order), "{host}:{port}".format(**address))


# ==================================================================================================
# ssh.command_line
#
# Build the line of a command, and cut its output into lines.
# ==================================================================================================


LONGEST_PIECE = 65536  # characters of one call of on_output


def command_line(command: str | Sequence[str]) -> str:
    """The line for the machine's shell: a string as it is, a list or tuple of arguments quoted."""
    import shlex  # not for whoever only imports the package

    if isinstance(command, str):
        line = command
    elif isinstance(command, (list, tuple)):
        for number, word in enumerate(command):
            if not isinstance(word, str):
                raise TypeError(f"command[{number}] must be a string, not {short_repr(word)}")
        line = shlex.join(command)
    else:
        raise TypeError(
            f"command must be a string, or a list of strings, not {short_repr(command)}"
        )
    if not line.strip():
        raise ValueError("command must not be empty")
    encoded("command", line)
    return line


class Lines:
    """Cuts a stream into lines."""

    def __init__(self, stream: str, on_output: Callable[[OutputLine], object]) -> None:
        self._stream = stream
        self._on_output = on_output
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> None:
        """Hand over each line that is complete now."""
        *lines, self._rest = (self._rest + self._decoder.decode(data)).split("\n")
        for line in lines:
            self._hand_over(self._in_pieces(line).removesuffix("\r"))
        self._rest = self._in_pieces(self._rest)

    def finish(self) -> None:
        """Hand over what has no line end."""
        rest = self._in_pieces(self._rest + self._decoder.decode(b"", True))
        self._rest = ""
        if rest:
            self._hand_over(rest)

    def _in_pieces(self, text: str) -> str:
        """Hand over the beginning of what is too long; the rest."""
        at = 0
        # One character more stays, so that a "\r" is never alone and a last piece never empty.
        while len(text) - at > LONGEST_PIECE + 1:
            self._hand_over(text[at : at + LONGEST_PIECE])
            at += LONGEST_PIECE
        return text[at:]

    def _hand_over(self, text: str) -> None:
        self._on_output(OutputLine(text, self._stream))


def lines_to(on_output: Callable[[OutputLine], object]) -> dict[str, Lines]:
    return {stream: Lines(stream, on_output) for stream in (STDOUT, STDERR)}


def input_bytes(value: Any) -> bytes:
    if value is None:
        return b""
    if isinstance(value, str):
        return encoded("input", value, nul=True)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"input must be a string or bytes, not {type(value).__name__}")
    return bytes(value)


def exports(env: Any) -> str:
    """What sets variables for the rest of a line; sshd by itself takes none from a client."""
    import shlex

    if env is None:
        return ""
    if not isinstance(env, Mapping):
        raise TypeError(f"env must be a dict of strings, not {type(env).__name__}")
    for name, value in env.items():
        if not isinstance(name, str) or not name.isascii() or not name.isidentifier():
            raise ValueError(f"env: not the name of a variable: {short_repr(name)}")
        if not isinstance(value, str):
            raise TypeError(f"env[{name!r}] must be a string, not {type(value).__name__}")
        encoded(f"env[{name!r}]", value)
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


def encoded(name: str, text: str, *, nul: bool = False) -> bytes:
    """``text`` as bytes; names of files that are no UTF-8 come out as they were."""
    if not nul and "\0" in text:
        raise ValueError(f"{name} must not hold a NUL character")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds a character that can't be encoded as UTF-8") from None


# ==================================================================================================
# ssh.watchdog
#
# The end of a process on a server that may not take it well, and of a channel that hangs.
# ==================================================================================================


PATIENCE = 2.0  # seconds after which a send counts as stuck
KILL_LOOK = 0.1  # seconds between two looks at a process that was told to end

# OpenSSH's sshd refuses the protocol's own signals to root before 9.8, and always to a command
# that it is configured to run. So the shell tells its process id first, and what has to end is
# killed over a second channel, with its process group.
_TELL_PID = "sh -c 'echo {mark}$PPID >&2'\n"
_KILL = (
    "k() {{ kill -s $1 -- -{pid} 2>/dev/null || kill -s $1 {pid} 2>/dev/null; }}; "
    "k TERM; n=0; while [ $n -lt {looks} ] && k 0; do sleep {pause}; n=$((n+1)); done; k KILL"
)


class PidLine:
    """The line of stderr by which a shell tells its process id; taken out of what follows.

    Attributes:
        pid: of the shell, which leads the process group of its command; None until it is known.
        prefix: what has to stand before the command. Its end of line keeps a shell from quoting
            it, and the variables that follow, in a complaint about the command's syntax.
    """

    def __init__(self) -> None:
        mark = f"clore-{secrets.token_hex(8)} "
        self.pid: int | None = None
        self.prefix = _TELL_PID.format(mark=mark)
        self._mark = mark.encode()
        self._held = b""
        self._seen = False

    def taken_out(self, data: bytes) -> bytes:
        """What of stderr so far, and not given before, is the command's own."""
        if self._seen:
            return data
        data, self._held = self._held + data, b""
        at = data.find(self._mark)
        if at < 0:
            at = len(data) - self._beginning(data)
            self._held = data[at:]
            return data[:at]
        number, line_end, rest = data[at + len(self._mark) :].partition(b"\n")
        if not line_end and len(number) < 20:
            self._held = data[at:]
            return data[:at]
        self._seen = True
        if not line_end or not number.isdigit() or int(number) < 2:  # -1 means every process
            return data
        self.pid = int(number)
        return data[:at] + rest

    def rest(self) -> bytes:
        """What was held back, at the end of the stream."""
        data, self._held = self._held, b""
        return data

    def _beginning(self, data: bytes) -> int:
        """How many bytes at the end of ``data`` may be the beginning of the mark."""
        sizes = range(min(len(data), len(self._mark)), 0, -1)
        return next((size for size in sizes if data.endswith(self._mark[:size])), 0)


def end_group(transport: Any, pid: int, grace: float) -> bool:
    """End a process group of the server, after ``grace`` seconds with SIGKILL; whether it was."""
    looks = math.ceil(grace / KILL_LOOK)
    script = _KILL.format(pid=pid, looks=looks, pause=KILL_LOOK)
    try:
        channel = transport.open_session(timeout=PATIENCE)
        try:
            with Guard(grace + PATIENCE, lambda: cut(channel)) as guard:
                channel.exec_command(f"sh -c {shlex.quote(script)}")
                channel.recv_exit_status()
            return not guard.fired
        finally:
            channel.close()
    except connection_errors() as error:
        logger.debug("process group %d was not ended: %s", pid, reason(error))
        return False


def send_signal(channel: Any, name: str) -> None:
    """Have the server signal a channel's process group, unless the channel is closed."""
    import paramiko  # which has no call for this
    from paramiko.common import cMSG_CHANNEL_REQUEST

    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("signal")
    message.add_boolean(False)
    message.add_string(name)
    # A server ends the whole connection where this comes after the answer to its own close; with
    # the lock held, paramiko can't give that answer meanwhile.
    with channel.lock:
        if not channel.closed:
            channel.transport._send_user_message(message)


def cut(channel: Any) -> None:
    """End a channel at once, and the whole connection where that takes nothing any more."""

    def hang_up() -> None:
        if not channel.exit_status_ready():
            send_signal(channel, "KILL")
        channel.close()

    if not soon_done(hang_up):
        logger.debug("the connection takes nothing any more: closed")
        channel.transport.close()


def soon_done(action: Callable[[], object]) -> bool:
    """Whether something that sends was done within ``PATIENCE``; a send itself has no timeout."""

    def quietly() -> None:
        try:
            action()
        except Exception as error:
            logger.debug("a channel that is given up: %s", reason(error))

    thread = threading.Thread(target=quietly, name="clore-hang-up", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return not thread.is_alive()


class Guard:
    """Does something where a call that has no timeout takes too long; a ``with`` block.

    Attributes:
        fired: whether it did.
    """

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self.fired = False
        self._action = action
        self._timer: threading.Timer | None = None
        if seconds < threading.TIMEOUT_MAX:
            self._timer = threading.Timer(max(seconds, 0.0), self._fire)
            self._timer.name = "clore-guard"
            self._timer.daemon = True

    def _fire(self) -> None:
        self.fired = True
        self._action()

    def __enter__(self) -> Guard:
        if self._timer is not None:
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()


def round_trip(transport: Any) -> bool:
    """Whether the server answered to the opening of a channel, which is not used."""
    import paramiko

    try:
        transport.open_session(timeout=PATIENCE).close()
    except paramiko.ChannelException:
        return True  # a refusal is an answer
    except connection_errors():
        return False
    return True


def connection_errors() -> tuple[type[Exception], ...]:
    """What paramiko raises where a connection or a channel ends."""
    import paramiko

    return (paramiko.SSHException, OSError, EOFError)


def reason(error: BaseException) -> str:
    """What to say of an error whose text may be the server's."""
    text = str(getattr(error, "text", "")) or str(error)
    return printable(text.rstrip(".") or type(error).__name__, 200)


# ==================================================================================================
# ssh.command
#
# A command over SSH: both of its streams as they come, how it ended, and its end when told so.
# ==================================================================================================


READ_CHUNK = 4 << 20  # more than a window holds: one read empties a buffer
INPUT_CHUNK = 32768
GLANCE = 0.25  # seconds between two looks at what rings no bell
QUIET = 0.5  # seconds of silence after which an ended command may have said everything
OVERTIME = 5.0  # seconds for the output of a command that ended in time
LATE_OUTPUT = 4 << 20  # bytes beyond a window that an ended command may have left on the way
GRACE = 1.0  # seconds to obey SIGTERM
GRACE_OF_INTERRUPT = 0.5
BROKEN = "the connection broke before the command had ended"


def check_run_arguments(
    command: str | Sequence[str],
    *,
    check: bool = True,
    timeout: float | None = None,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    on_output: Callable[[OutputLine], object] | None = None,
) -> str:
    """Check what :func:`run_command` is given, before anything is sent; the line to run."""
    line = command_line(command)
    check_bool("check", check)
    if timeout is not None:
        check_number("timeout", timeout, above=True, infinite=True, unit="seconds")
    input_bytes(input)
    exports(env)
    if on_output is not None and not callable(on_output):
        raise TypeError(f"on_output must be callable, not {short_repr(on_output)}")
    return line


def run_command(
    ssh: paramiko.SSHClient,
    command: str | Sequence[str],
    *,
    check: bool = True,
    timeout: float | None = None,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    on_output: Callable[[OutputLine], object] | None = None,
    login_timeout: float = 30.0,
) -> CommandResult:
    """Run a command and wait for its end, reading both streams at once.

    What the command leaves in the background is not waited for, unless it goes on writing to the
    command's own output. A timeout, Ctrl-C and any other exception end the remote process with
    its process group: SIGTERM, a little later SIGKILL, and its channel is closed.

    Parameters:
        ssh: a connection.
        command: a line for the machine's shell, or a list of arguments, which is quoted for it.
        check: raise CommandError for another exit code than 0.
        timeout: seconds that it may take; None waits for ever.
        input: for its stdin, text as UTF-8; None: an empty one.
        env: variables for the command. They stand in the process list of the machine.
        on_output: called with each :class:`OutputLine` as it comes. The order within a stream is
            kept, not the one between the two; of a line without end it gets pieces.
        login_timeout: seconds that the machine may take to start the command.

    Returns:
        A :class:`CommandResult`, whose output is whole with ``on_output`` too.

    Raises:
        CommandError: it ended with another exit code than 0, or by a signal, and ``check`` is on.
        CommandTimeoutError: it did not end in time.
        SSHError: the machine did not start it, or the connection broke.
    """
    line = check_run_arguments(
        command, check=check, timeout=timeout, input=input, env=env, on_output=on_output
    )
    check_number("login_timeout", login_timeout, above=True, unit="seconds")
    data = input_bytes(input)
    limit = math.inf if timeout is None else timeout
    begin = time.monotonic()
    try:
        channel = _session(ssh, min(limit, login_timeout))
        running = _Running(channel, on_output)
        code = running.run(
            encoded("command", exports(env) + line), data, begin + limit, begin + login_timeout
        )
    except _OutOfTimeError as out:
        if out.text and login_timeout <= limit:
            raise SSHError(f"the machine did not {out.text} within {login_timeout:g}s") from None
        raise CommandTimeoutError(line, limit, out.stdout, out.stderr) from None
    result = CommandResult(
        line, code, running.text(STDOUT), running.text(STDERR), time.monotonic() - begin
    )
    logger.debug("%r", result)
    if check and code != 0:
        raise CommandError(result)
    return result


class _OutOfTimeError(Exception):
    """The time is out; ``text`` names the step that took too long, ``""`` the command itself."""

    def __init__(self, text: str, stdout: str = "", stderr: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.stdout = stdout
        self.stderr = stderr


class _Running:
    """One command on a channel of its own."""

    def __init__(self, channel: Any, on_output: Callable[[OutputLine], object] | None) -> None:
        self._channel = channel
        self._bell = _Bell()
        self._ear = _SignalEar(channel.logger, self._bell)
        # paramiko offers fileno() for this, but with two streams it may miss that one of them
        # has something, and it tells nowhere else that a signal ended the command.
        channel.in_buffer.set_event(self._bell)
        channel.in_stderr_buffer.set_event(self._bell)
        channel.logger = self._ear
        self._pid_line = PidLine()
        self._given_up = False
        self._output: dict[str, list[bytes]] = {STDOUT: [], STDERR: []}
        self._lines = None if on_output is None else lines_to(on_output)

    def run(self, line: bytes, data: bytes, deadline: float, start_by: float) -> int:
        """Start it, and wait; its exit code. However that is left, nothing of it goes on."""
        feeder: threading.Thread | None = None
        try:
            try:
                # A little longer: what has started meanwhile can be ended, once it is known.
                self._start(line, min(deadline + PATIENCE, start_by))
                if not data:
                    self._channel.shutdown_write()
                else:
                    feeder = threading.Thread(
                        target=_feed, args=(self._channel, data), name="clore-stdin", daemon=True
                    )
                    feeder.start()
                if not self._in_time(deadline):
                    self._tell(self._end(GRACE))
                    self._tell_rest()
                    raise _OutOfTimeError("", self.text(STDOUT), self.text(STDERR))
                self._tell_rest()
                return self._exit_code()
            except BaseException:
                self._end(GRACE_OF_INTERRUPT)
                raise
        finally:
            if not self._channel.closed:
                soon_done(self._channel.close)
            if feeder is not None:
                feeder.join(PATIENCE)

    def text(self, stream: str) -> str:
        """What a stream held."""
        return b"".join(self._output[stream]).decode("utf-8", "replace")

    def _start(self, line: bytes, deadline: float) -> None:
        guard = Guard(deadline - time.monotonic(), lambda: cut(self._channel))
        try:
            with guard:
                self._channel.exec_command(self._pid_line.prefix.encode() + line)
        except connection_errors() as error:
            if guard.fired:
                raise _OutOfTimeError("start the command") from None
            raise SSHError(f"the machine did not start the command: {reason(error)}") from error

    def _in_time(self, deadline: float) -> bool:
        # The caller's function may be slow. And sends have no timeout: where nothing is taken any
        # more, even a read may hang.
        with Guard(deadline - time.monotonic() + GRACE + PATIENCE, self._give_up):
            try:
                return self._wait(deadline) and not self._given_up
            except SSHError:
                if self._given_up:
                    return False
                raise

    def _give_up(self) -> None:
        """End the process from another thread than the one that waits for it."""
        transport, pid = self._channel.transport, self._pid_line.pid
        if self._ended() and soon_done(transport.send_ignore):
            return
        self._given_up = True
        if pid is not None:
            soon_done(lambda: end_group(transport, pid, GRACE_OF_INTERRUPT))
        cut(self._channel)

    def _wait(self, deadline: float) -> bool:
        """Read until the command has ended; False when the time is out before."""
        silent_since: float | None = None
        over_since: float | None = None
        late = 0
        while True:
            # Asked before the read: what was sent before its end is there by now.
            complete, ended = self._complete(), self._ended()
            pieces = self._read()
            self._tell(pieces)
            if complete:
                return True
            now = time.monotonic()
            if pieces:
                silent_since = None
            if ended:
                # Something in the background holds its output open.
                silent_since = now if silent_since is None else silent_since
                late += sum(len(data) for _, data in pieces)
                if late > self._channel.in_window_size + LATE_OUTPUT:
                    return True
                if now - silent_since >= QUIET:
                    if self._nothing_more():
                        return True
                    silent_since = None
            if now >= deadline:
                if not self._ended():
                    return False
                over_since = now if over_since is None else over_since
                if now - over_since >= OVERTIME:
                    return True
            if not pieces:
                self._bell.wait(GLANCE if now >= deadline else min(GLANCE, deadline - now))

    def _nothing_more(self) -> bool:
        """Whether the server has sent all that the command wrote.

        Silence alone may be that of a slow network. It answers in the order in which it reads:
        what it had when it answered the first time is here before it answers once more.
        """
        channel = self._channel
        for _ in range(2):
            if not round_trip(channel.transport):
                return False
            if channel.recv_ready() or channel.recv_stderr_ready() or channel.closed:
                return False
        return True

    def _ended(self) -> bool:
        return self._ear.heard or bool(self._channel.exit_status_ready())

    def _complete(self) -> bool:
        return self._channel.closed or (self._channel.eof_received and self._ended())

    def _read(self) -> list[tuple[str, bytes]]:
        """What has come since the last time; waits for nothing."""
        pieces = []
        channel = self._channel
        for stream, ready, receive in (
            (STDOUT, channel.recv_ready, channel.recv),
            (STDERR, channel.recv_stderr_ready, channel.recv_stderr),
        ):
            if ready():
                try:
                    data = receive(READ_CHUNK)
                except connection_errors() as error:  # it may send that the window is open again
                    raise SSHError(f"{BROKEN}: {reason(error)}") from error
                if stream == STDERR:
                    data = self._pid_line.taken_out(data)
                self._output[stream].append(data)
                pieces.append((stream, data))
        return pieces

    def _tell(self, pieces: list[tuple[str, bytes]]) -> None:
        if self._lines is not None:
            for stream, data in pieces:
                self._lines[stream].feed(data)

    def _tell_rest(self) -> None:
        rest = self._pid_line.rest()
        self._output[STDERR].append(rest)
        self._tell([(STDERR, rest)])
        if self._lines is not None:
            for lines in self._lines.values():
                lines.finish()

    def _end(self, grace: float) -> list[tuple[str, bytes]]:
        """End the process and its group, first politely; what it still wrote meanwhile."""
        late: list[tuple[str, bytes]] = []
        try:
            if not self._ended():
                # Its number may be on the way still.
                late += self._read_until(lambda: self._pid_line.pid is not None, GRACE_OF_INTERRUPT)
                late += self._end_politely(grace)
        finally:
            cut(self._channel)
        return late

    def _end_politely(self, grace: float) -> list[tuple[str, bytes]]:
        pid, late = self._pid_line.pid, []
        done: list[bool] = []
        if pid is not None:
            transport = self._channel.transport
            threading.Thread(
                target=lambda: done.append(end_group(transport, pid, grace)),
                name="clore-end",
                daemon=True,
            ).start()
            late += self._read_until(lambda: bool(done), grace + 2 * PATIENCE)
        if done != [True]:
            if soon_done(lambda: send_signal(self._channel, "TERM")):
                late += self._read_until(self._complete, grace)
            else:
                self._channel.transport.close()
        return late + self._read_until(self._complete, GLANCE)

    def _read_until(self, happened: Callable[[], bool], seconds: float) -> list[tuple[str, bytes]]:
        pieces: list[tuple[str, bytes]] = []
        deadline = time.monotonic() + seconds
        while not happened() and not self._channel.closed and time.monotonic() < deadline:
            self._bell.wait(GLANCE / 5)
            pieces += self._read()
        return pieces + self._read()

    def _exit_code(self) -> int:
        channel = self._channel
        broken = channel.closed and not channel.transport.is_active()
        code: int = channel.exit_status
        if broken and (code < 0 or not channel.eof_received):
            raise SSHError(BROKEN)
        if code >= 0:
            return code
        if self._ear.heard:
            return -1
        raise SSHError("the machine closed the command's channel without telling how it ended")


class _Bell:
    """An event for both buffers of a channel: rings when one gets data, or its end."""

    def __init__(self) -> None:
        self._rung = threading.Event()

    def set(self) -> None:
        """Called by paramiko."""
        self._rung.set()

    def clear(self) -> None:
        """Called by paramiko for one buffer, where the other may have data: does nothing."""

    def wait(self, seconds: float) -> None:
        """Until it rings. Read after this, not before."""
        self._rung.wait(seconds)
        self._rung.clear()


class _SignalEar:
    """Stands in for a channel's logger: only there paramiko tells that a signal ended a command."""

    def __init__(self, behind: Any, bell: _Bell) -> None:
        self._behind = behind
        self._bell = bell
        self.heard = False

    def log(self, level: int, message: str, *args: object) -> None:
        """Called by paramiko."""
        if 'request "exit-signal"' in message:
            self.heard = True
            self._bell.set()
        self._behind.log(level, message, *args)


def _session(ssh: paramiko.SSHClient, seconds: float) -> Any:
    """A channel for one command."""
    transport = ssh.get_transport()
    if transport is None or not transport.is_active():
        raise SSHError("the connection to the machine is closed")
    begin = time.monotonic()
    try:
        return transport.open_session(timeout=seconds)
    except connection_errors() as error:
        if not transport.is_active():
            raise SSHError("the connection broke before the command was started") from error
        if time.monotonic() - begin >= seconds:
            raise _OutOfTimeError("open a channel for the command") from None
        why = reason(error)
        raise SSHError(f"the machine opened no channel for the command: {why}") from error


def _feed(channel: Any, data: bytes) -> None:
    """Send a command's input, as much of it as it takes."""
    view = memoryview(data)
    try:
        while view:
            sent = channel.send(bytes(view[:INPUT_CHUNK]))
            if not sent:
                return
            view = view[sent:]
        channel.shutdown_write()
    except Exception as error:
        # It ended without reading all of it, which is no error, or the reading side will tell.
        logger.debug("a command's input was not sent whole: %s", reason(error))


# ==================================================================================================
# ssh.remote
#
# What runs on the machine for a transfer: one script for any POSIX shell, and its answers.
#
# A path goes as an argument in plain ASCII, whatever its bytes; lists of names go over standard
# input. The first line that the script prints tells its output from what a shell's start-up files
# may have printed before. Nothing in the output is trusted: lengths are bounded, numbers parsed.
# ==================================================================================================


MARK = "clore-transfer-1"
BLOCK = 65536  # bytes; ranges begin at multiples of it
MOST_NOISE = 65536  # bytes before the mark
MOST_LINE = 65536
WINDOW = 32 * 1024 * 1024  # bytes under way to us on one channel: 320 MB/s at 100 ms
LAST_PATIENCE = 3.0  # seconds for each step of tidying up, after an error or Ctrl-C
CHANNEL_PAUSE = 0.05  # seconds; a channel that was closed is freed a little later
MOST_LEVELS = 256  # directories within one another; Python removes no tree that is much deeper
PACKET = 131072  # bytes; a fourth of the packets that 32 KB would make

SCRIPT = r"""
export LC_ALL=C
unset CDPATH
u() { t=$1; case $t in *\\*) t=$(printf %b "${t}x"); t=${t%x};; esac; }
fail() { printf "no %s\n" "$*"; exit 1; }
# What is not to be resumed goes with whoever fails last: also after the connection broke.
drop() { [ "$keep" = 1 ] || rm -rf "$j" "$j.done"; fail "$*"; }
need() { command -v "$1" >/dev/null 2>&1 || fail "the machine has no $1"; }
# openssl is up to six times as fast as sha256sum.
hash() {
  if command -v openssl >/dev/null 2>&1; then openssl dgst -sha256 -r
  else need sha256sum; sha256sum; fi
}
sum() { dd if="$1" bs=65536 skip="$2" count="$3" 2>/dev/null | head -c "$4" | hash; }
ours() { dd if="$1" bs=65536 skip="$2" count="$3" 2>/dev/null | hash; }
# $1: where to, $2: the name of what is sent, $3: f or d, $4: of the temporary. -> f, p
target() {
  u "$2"; n=$t; u "$1"; f=$t
  if [ -d "$f" ]; then f=${f%/}/$n
  else case $f in */) fail "there is no directory $f";; esac; fi
  case $f in */*) d=${f%/*};; *) d=.;; esac
  [ -d "${d:-/}" ] || fail "there is no directory ${d:-/}"
  if [ "$3" = f ]; then [ ! -d "$f" ] || fail "$f is a directory"
  else [ ! -e "$f" ] || [ -d "$f" ] || fail "$f is no directory"; fi
  p=$d/.clore-part-$4
}
verb=$1; shift
printf "%s\n" clore-transfer-1
case $verb in
look)
  u "$1"
  if [ -d "$t" ]; then
    printf "d\n"; cd "$t" || exit 1
    exec find . -exec stat -c "%f %s %Y %n" {} +
  elif [ -f "$t" ]; then
    s=$(stat -L -c "%s %Y %a" "$t") || exit 1
    printf "f %s\n" "$s"
    n=${s%% *}
    [ "$n" -gt "$2" ] || head -c "$n" "$t" || exit 1
    if [ "$n" -le "$2" ]; then
      if [ "$3" = 1 ]; then head -c "$n" "$t" | hash; fi
      stat -L -c "%s %Y %a" "$t"
    fi
  elif [ -e "$t" ]; then printf "o\n"
  else printf "n\n"; fi;;
get)
  u "$1"; dd if="$t" bs=65536 skip="$2" count="$3" 2>/dev/null | head -c "$4"
  sum "$t" "$2" "$3" "$4";;
rangesum) u "$1"; sum "$t" "$2" "$3" "$4";;
many) u "$1"; cd "$t" && exec xargs -0 cat --;;
sums) need sha256sum; u "$1"; cd "$t" && exec xargs -0 sha256sum --;;
sizes) target "$1" "$2" "$3" "$4"; cd "$p" && exec xargs -0 stat -c %s --;;
putsums) need sha256sum; target "$1" "$2" "$3" "$4"; cd "$p" && exec xargs -0 sha256sum --;;
begin) target "$1" "$2" "$3" "$4"; printf "ok\n"
  if [ -s "$p.done" ]; then cat "$p.done"; else rm -rf "$p"; fi;;
wipe) fail() { printf "ok\n"; exit 0; } # then there is nothing to be wiped
  target "$1" "$2" "$3" "$4"; rm -rf "$p" "$p.done" && printf "ok\n";;
put) # ... $5: name within, $6: block, $7: blocks, $8: bytes, $9: of the job, ${10}: whether to
  # hash, ${11}: whether to keep what has arrived
  target "$1" "$2" "$3" "$4"; u "$5"; j=$p; keep=${11}
  if [ "$3" = d ]; then p=$p/$t; mkdir -p "${p%/*}" || exit 1; fi
  e=$(dd of="$p" bs=65536 seek="$6" conv=notrunc 2>&1) || drop "$e"
  e=${e##*
}
  [ "${e%% *}" = "$8" ] || drop "only ${e%% *} of $8 bytes arrived"
  h=-
  if [ "${10}" = 1 ]; then h=$(ours "$p" "$6" "$7"); fi
  printf "%s\n" "$9" >>"$j.done" && printf "ok %s\n" "${h%% *}";;
putsum) target "$1" "$2" "$3" "$4"; u "$5"; [ "$3" = f ] || p=$p/$t
  ours "$p" "$6" "$7";;
untar) # ... $5: m for times of now, p for modes as sent, $6: of the job, $7: whether to keep
  # what has arrived
  target "$1" "$2" "$3" "$4"; need tar; j=$p; keep=$7
  mkdir -p "$p" || exit 1
  e=$(cd "$p" && tar "-xo${5}f" - 2>&1) || drop "$e"
  printf "%s\n" "$6" >>"$p.done" && printf "ok\n";;
meta) # ... $5: name within, $6: mode, $7: time or -
  target "$1" "$2" "$3" "$4"; u "$5"; [ "$3" = f ] || p=$p/$t
  chmod "$6" "$p" || exit 1
  if [ "$7" != - ]; then touch -d "@$7" "$p" || exit 1; fi
  printf "ok\n";;
finish) # ... $5: bytes, $6: mode, $7: time or -; begins when it is told to
  read -r x; [ "$x" = go ] || exit 1
  target "$1" "$2" "$3" "$4"
  if [ "$3" = f ]; then
    s=$(stat -c %s "$p") || exit 1
    [ "$s" = "$5" ] || fail "$s of $5 bytes arrived"
    chmod "$6" "$p" || exit 1
    if [ "$7" != - ]; then touch -d "@$7" "$p" || exit 1; fi
    mv -f "$p" "$f" || exit 1
  elif [ ! -e "$f" ]; then mv "$p" "$f" || exit 1
  else
    cd "$p" || exit 1
    case $f in /*) o=$f;; *) o=$OLDPWD/$f;; esac
    # What is new there goes as a whole, with its modes and times.
    find . -type d -exec sh -c "[ ! -e \"\$0/\$1\" ] && mv \"\$1\" \"\$0/\$1\"" "$o" {} \; -prune
    find . -type d -exec sh -c "for d; do mkdir -p \"\$0/\$d\" || exit 1; done" "$o" {} + || exit 1
    find . -type f -exec sh -c "for g; do mv -f \"\$g\" \"\$0/\$g\" || exit 1; done" "$o" {} + \
      || exit 1
    cd "$OLDPWD" && rm -rf "$p"
  fi
  rm -f "$p.done"
  printf "ok %s\n" "$f";;
esac
"""


def far_path(path: bytes) -> bytes:
    """A remote path as the script wants it: relative ones and ``~`` count from the home."""
    if path == b"~" or path.startswith(b"~/"):
        path = path[1:].lstrip(b"/") or b"."
    elif path.startswith(b"~"):
        raise ValueError(
            f"remote: of homes, only one's own is known (~/), not {printable(repr(path), 80)}"
        )
    return path if path.startswith(b"/") else b"./" + path


def far_command(verb: str, *arguments: bytes | str | int) -> str:
    """The line that runs a verb of the script."""
    words = " ".join(f"'{_escaped(a)}'" for a in arguments)
    return f"exec sh -c '{SCRIPT}' clore {verb} {words}"


def _escaped(argument: bytes | str | int) -> str:
    raw = argument if isinstance(argument, bytes) else str(argument).encode("ascii")
    if isinstance(argument, (str, int)):
        return raw.decode("ascii")
    return "".join(
        chr(b) if chr(b).isascii() and (chr(b).isalnum() or b in b"/._-") else f"\\0{b:03o}"
        for b in raw
    )


class NoChannelError(SSHError):
    """A machine opens no further channel on a connection; sshd's MaxSessions is ten, else."""


class Watch:
    """Ends a connection that takes nothing any more, for as long as a block lasts.

    paramiko writes to a socket with no limit of time, whatever the channel's timeout is.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.bitten: set[Any] = set()
        self._busy: dict[int, tuple[float, Any]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="clore-transfer", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextlib.contextmanager
    def over(self, transport: Any) -> Iterator[None]:
        """Something that writes to the machine, and by itself ends within the timeout."""
        lane = threading.get_ident()
        self._busy[lane] = (time.monotonic(), transport)
        try:
            yield
        finally:
            self._busy.pop(lane, None)

    def hurry(self) -> None:
        """It has failed: what is still to be done is not waited for as long."""
        self.timeout = min(self.timeout, LAST_PATIENCE)

    def _look(self) -> None:
        while not self._over.wait(min(self.timeout, LAST_PATIENCE) / 4):
            late = time.monotonic() - 1.25 * self.timeout - 0.25
            for since, transport in list(self._busy.values()):
                if since < late:
                    self.bitten.add(transport)
                    transport.close()


class Exec:
    """One verb that runs on the machine: what is sent to it, and what it answers."""

    def __init__(self, ssh: Any, command: str, watch: Watch, patience: float = 0.0) -> None:
        """``patience``: seconds for which a machine without a free channel is asked again."""
        self._timeout = timeout = watch.timeout
        self._watch = watch
        transport = ssh.get_transport()
        if transport is None:
            raise SSHError("the connection is closed")
        deadline = time.monotonic() + patience
        while True:
            try:
                with watch.over(transport):
                    self.channel = open_exec(transport, command, timeout, WINDOW, PACKET)
                break
            except NoChannelError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(CHANNEL_PAUSE)
        self._buffer = b""
        self._begun = False

    def close(self) -> None:
        with contextlib.suppress(OSError, EOFError), self._writing():
            self.channel.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return self._watch.over(self.channel.get_transport())

    def __enter__(self) -> Exec:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- there ---

    def send(self, data: bytes | memoryview) -> bool:
        """Send all of it; False when the other side takes no more: its answer says why."""
        view = memoryview(data)
        try:
            while view:
                with self._writing():
                    view = view[self.channel.send(view[:BLOCK]) :]
        except (OSError, EOFError) as error:
            bitten = self.channel.get_transport() in self._watch.bitten
            if bitten or isinstance(error, TimeoutError):
                raise SSHError(f"the machine took nothing for {self._timeout:g}s") from None
            return False
        return True

    def end(self) -> None:
        """There is no more to be sent."""
        with contextlib.suppress(OSError, EOFError), self._writing():
            self.channel.shutdown_write()

    # --- and back ---

    def receive(self, most: int) -> bytes:
        """Some of what the verb printed, at most ``most`` bytes; empty at its end."""
        if not self._begun:
            self._begin()
        return self._more(most)

    def line(self) -> bytes:
        """The next line, without its end; the rest where there is none."""
        kept = b""
        while b"\n" not in kept:
            piece = self.receive(MOST_LINE)
            kept += piece
            if not piece:
                break
            if len(kept) > MOST_LINE:
                raise SSHError("the machine answers with an endless line")
        line, _, self._buffer = kept.partition(b"\n")
        return line

    def rest(self, most: int) -> bytes:
        """All that is left; an error for more than ``most`` bytes."""
        pieces, size = [], 0
        while piece := self.receive(BLOCK):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise SSHError(f"the machine answers with more than {most} bytes")
        return b"".join(pieces)

    def status(self) -> int:
        """The exit status; -1 where none came."""
        if not self.channel.status_event.wait(self._timeout):
            raise SSHError(f"the machine said nothing for {self._timeout:g}s")
        return int(self.channel.exit_status)

    def answer(self) -> str:
        """What follows ``ok``; an error for anything else."""
        text = self.rest(MOST_LINE).decode("utf-8", "surrogateescape")
        word, _, more = text.partition("\n")[0].partition(" ")
        if word == "ok" and text.endswith("\n"):
            return text[3:-1]
        raise self.refused(more if word == "no" else text, text[3:] if word == "no" else "")

    def refused(self, *said: str) -> SSHError:
        """An error with what the machine says of it."""
        said = (*said, self.errors())
        transport = self.channel.get_transport()
        if not any(s.strip() for s in said) and not transport.is_active():
            return SSHError("the connection broke")
        text = next((s.strip() for s in said if s.strip()), "it does not say why")
        return SSHError(f"the machine refuses: {printable(text, 500)}")

    def errors(self) -> str:
        """What has come on the other stream."""
        text = b""
        deadline = time.monotonic() + 1.0
        while self.channel.recv_stderr_ready() and len(text) < MOST_LINE:
            with self._writing():
                text += self.channel.recv_stderr(MOST_LINE)
            if time.monotonic() > deadline:
                break
        return text.decode("utf-8", "replace")

    def _more(self, most: int) -> bytes:
        if self._buffer:
            piece, self._buffer = self._buffer[:most], self._buffer[most:]
            return piece
        try:
            with self._writing():  # the window is widened
                return self.channel.recv(most)  # type: ignore[no-any-return]
        except TimeoutError:
            raise SSHError(f"the machine sent nothing for {self._timeout:g}s") from None

    def _begin(self) -> None:
        """Skip what comes before the mark."""
        self._begun = True
        wanted, seen = MARK.encode() + b"\n", b""
        deadline = time.monotonic() + self._timeout
        while wanted not in seen:
            piece = self._more(BLOCK)
            seen += piece
            if not piece or len(seen) > MOST_NOISE or time.monotonic() > deadline:
                errors = self.errors()
                if not seen and not errors and not self.channel.get_transport().is_active():
                    raise SSHError("the connection broke")
                said = errors.strip() or seen.decode("utf-8", "replace").strip() or "nothing"
                raise SSHError(
                    f"the machine runs no shell as it should, and says: {printable(said, 300)}"
                )
        self._buffer = seen.partition(wanted)[2] + self._buffer


def open_exec(transport: Any, command: str, timeout: float, window: int, packet: int) -> Any:
    """A channel on which a command runs, without a wait for the answer to the request.

    paramiko's own ``exec_command`` waits for that, with no limit of time: a round trip, or for
    ever with a machine that hangs. A refusal closes the channel.
    """
    import paramiko
    from paramiko.common import cMSG_CHANNEL_REQUEST

    try:
        channel = transport.open_session(
            window_size=window, max_packet_size=packet, timeout=timeout
        )
    except (paramiko.SSHException, EOFError, OSError) as error:
        text = printable(str(error) or type(error).__name__, 200)
        # A refusal comes as another error where another thread has taken paramiko's own.
        refused = isinstance(error, paramiko.SSHException) and "Timeout" not in text
        kind = NoChannelError if refused and transport.is_active() else SSHError
        raise kind(f"the machine opens no channel: {text}") from error
    channel.settimeout(timeout)
    for pipe in (channel.in_buffer, channel.in_stderr_buffer):
        _bound(pipe, window + packet)
    request = paramiko.Message()
    request.add_byte(cMSG_CHANNEL_REQUEST)
    request.add_int(channel.remote_chanid)
    request.add_string("exec")
    request.add_boolean(True)
    request.add_string(command)
    try:
        transport._send_user_message(request)
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise SSHError("the connection broke") from error
    return channel


def _bound(pipe: Any, most: int) -> None:
    """End the connection of a machine that sends more than the window allows: paramiko keeps it."""
    feed = pipe.feed

    def bounded(data: Any) -> None:
        if len(pipe) + len(data) > most:
            raise EOFError  # in paramiko's own thread, which then closes all
        feed(data)

    pipe.feed = bounded


def parse_listing(text: bytes, most: int, take: Callable[[int, int, int, bytes], None]) -> None:
    """Read what ``find -exec stat`` printed: mode, size, time and name of each entry."""
    # A name may hold a newline: an entry begins where mode, size, time and "./" stand.
    pattern = rb"([0-9a-f]{1,8}) ([0-9]{1,18}) (-?[0-9]{1,19}) (\.(?:/.*?)?)\n"
    entry = re.compile(pattern + rb"(?=[0-9a-f]{1,8} [0-9]{1,18} -?[0-9]{1,19} \./|\Z)", re.S)
    at = count = 0
    while at < len(text):
        found = entry.match(text, at)
        count += 1
        if found is None or count > most:
            raise SSHError(
                f"the machine lists what can't be read: {printable(repr(text[at : at + 80]), 120)}"
                if found is None
                else f"the machine lists more than {most} files"
            )
        mode, size, mtime, name = found.groups()
        take(int(mode, 16), int(size), int(mtime), name[2:])
        at = found.end()


def checked_name(name: bytes) -> str:
    """A name below a directory, from the machine, as it may be used here."""
    parts = name.split(b"/")
    if not name or b"\0" in name or any(part in (b"", b".", b"..") for part in parts):
        raise SSHError(f"the machine names a file that can't be one: {printable(repr(name), 120)}")
    if len(parts) > MOST_LEVELS:
        raise SSHError(f"the machine names a file below {len(parts)} directories")
    text = os.fsdecode(name)
    if os.name == "nt" and re.search(r'[\\:*?"<>|]', text):
        raise SSHError(f"a name that this system does not know: {printable(repr(name), 120)}")
    return text


# ==================================================================================================
# ssh.transfer
#
# What uploads and downloads have in common: jobs, the lanes that do them, and progress.
# ==================================================================================================


SMALL_FILE = 4 * 1024 * 1024  # bytes; smaller ones of a directory travel together
BUNDLE_BYTES = 8 * 1024 * 1024
BUNDLE_FILES = 1000
SHORTEST_RANGE = 4 * 1024 * 1024
LONGEST_RANGE = 64 * 1024 * 1024
MOST_RANGES = 16384  # of all files; a machine may say that one has 10**18 bytes
MOST_STREAMS = 16
LONGEST_ANSWER = 256 * 1024 * 1024  # bytes of a listing
CHUNK = 256 * 1024  # bytes between two looks at whether to go on
PART = ".clore-part-"

Another = Callable[[], Any] | None


class Options:
    """The arguments of a transfer, checked."""

    def __init__(
        self,
        local: Any,
        remote: Any,
        preserve: Any,
        verify: Any,
        resume: Any,
        streams: Any,
        progress: Any,
        timeout: Any,
    ) -> None:
        self.local = check_path("local", local)
        self.remote = check_path("remote", remote)
        self.preserve = check_bool("preserve", preserve)
        self.verify = check_bool("verify", verify)
        self.resume = check_bool("resume", resume)
        if streams is not None:
            if type(streams) is not int:
                raise TypeError(f"streams must be a whole number, not {short_repr(streams)}")
            check_number("streams", streams, minimum=1, maximum=MOST_STREAMS)
        self.streams: int | None = streams
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, not {short_repr(progress)}")
        self.progress: Callable[[str, int, int], object] | None = progress
        self.timeout = check_number("timeout", timeout, above=True, unit="seconds")


def check_path(name: str, value: Any) -> bytes:
    """A path as bytes."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {short_repr(value)}")
    try:
        path = os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a character that no path may have") from None
    if not path or b"\0" in path:
        raise ValueError(f"{name} must not be empty or hold a NUL: {short_repr(path)}")
    if name == "local":
        check_local_path(name, path)
    return path


class Item:
    """A file or directory of a transfer.

    Attributes:
        name: below the directory that is transferred; empty for a single file.
        size: bytes; 0 for a directory.
        mtime: nanoseconds.
        mode: permissions.
        folder: whether it is a directory.
    """

    __slots__ = ("folder", "mode", "mtime", "name", "size")

    def __init__(self, name: bytes, size: int, mtime: int, mode: int, folder: bool = False) -> None:
        self.name = name
        self.size = 0 if folder else size
        self.mtime = mtime
        self.mode = mode
        self.folder = folder

    @property
    def shown(self) -> str:
        return os.fsdecode(self.name)


class Job:
    """What one command on the machine does: a range of a file, or a bundle of small files."""

    __slots__ = ("items", "key", "length", "start")

    def __init__(self, items: list[Item], start: int = 0, length: int | None = None) -> None:
        self.items = items
        self.start = start
        self.length = length  # None: a bundle
        # The time of a directory changes with every file that is made in it.
        facts = [(i.name, i.size, 0 if i.folder else i.mtime) for i in items]
        # Says that it is done in the record, so that a source that has changed is another job.
        self.key = hashlib.sha256(repr((facts, start, length)).encode()).hexdigest()[:32]

    @property
    def files(self) -> list[Item]:
        return [item for item in self.items if not item.folder]

    @property
    def size(self) -> int:
        return sum(i.size for i in self.items) if self.length is None else self.length

    @property
    def blocks(self) -> tuple[int, int]:
        """The first block of a range, and how many there are."""
        return self.start // BLOCK, -(-(self.length or 0) // BLOCK)


def plan(items: Iterable[Item], bundled: bool, resumable: bool) -> list[Job]:
    """The jobs for the files, the same for the same files; ``resumable`` ones are smaller."""
    parts, least = (64, SHORTEST_RANGE // 4) if resumable else (16, SHORTEST_RANGE)
    jobs: list[Job] = []
    bundle: list[Item] = []
    size = 0
    items = list(items)
    longest = max(LONGEST_RANGE, sum(i.size for i in items) // MOST_RANGES // BLOCK * BLOCK)
    for item in items:
        if bundled and item.size < SMALL_FILE:
            bundle.append(item)
            size += item.size
            if size >= BUNDLE_BYTES or len(bundle) >= BUNDLE_FILES:
                jobs.append(Job(bundle))
                bundle, size = [], 0
            continue
        step = min(max(-(-item.size // (parts * BLOCK)) * BLOCK, least), longest)
        for start in range(0, max(item.size, 1), step):
            jobs.append(Job([item], start, min(step, item.size - start)))
    if bundle:
        jobs.append(Job(bundle))
    return jobs


def leave_out(skipped: list[tuple[str, str]], name: str, link: str | None) -> None:
    """Tell of what is not transferred: a symlink, with where it leads, or what is no file."""
    why = "it is no file" if link is None else f"a symlink to {link}" if link else "a symlink"
    skipped.append((name, why))
    logger.warning("left out: %s, %s", printable(name, 300), printable(why, 300))


class StoppedError(Exception):
    """Another lane has failed; within a transfer only."""


class Reporter:
    """Gathers what the lanes have done, for the user's callback and for errors."""

    def __init__(self, name: str, options: Options) -> None:
        self.name = name  # of the whole
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.done: dict[bytes, int] = {}
        self._options = options
        self._owner = threading.get_ident()
        self._alive = time.monotonic()
        self.on_crowd: Callable[[], object] = lambda: None
        self._running: weakref.WeakSet[Exec] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.watch = Watch(options.timeout)

    def exec(self, ssh: Any, command: str) -> Exec:
        """Run a verb in a lane; it is cut off when the transfer stops."""
        # A lane gives way to others; nobody else asks for a channel when there are none.
        patience = self._options.timeout if threading.get_ident() == self._owner else 0.0
        running = Exec(ssh, command, self.watch, patience)
        self._alive = time.monotonic()
        with self._lock:
            self._running.add(running)
        if self.stopped.is_set():
            running.close()
            raise StoppedError
        return running

    def crowded(self, error: NoChannelError) -> None:
        """A lane got no channel: it may get one when another lane has done its job."""
        if time.monotonic() - self._alive > self._options.timeout:
            raise error
        self.on_crowd()
        self.stopped.wait(CHANNEL_PAUSE)

    def cut(self) -> None:
        """End what runs in the lanes."""
        with self._lock:
            all_of_them = list(self._running)
        for running in all_of_them:
            running.close()

    def called(self, item: Item) -> str:
        return item.shown if item.name else self.name

    def moved(self, item: Item, size: int) -> None:
        """Some bytes of a file were moved; stops the lane where it is to stop."""
        self._alive = time.monotonic()
        if threading.get_ident() == self._owner:
            self.count(item, size)
            return
        self.events.put((item, size))
        if self.stopped.is_set():
            raise StoppedError

    def count(self, item: Item, size: int) -> None:
        """In the caller's thread: tell the user."""
        done = self.done[item.name] = self.done.get(item.name, 0) + size
        if self._options.progress is not None:
            self._options.progress(self.called(item), done, item.size)

    def failed(self, error: BaseException, item: Item | None) -> BaseException:
        """The error to raise for what went wrong with a file."""
        if item is None or not isinstance(error, (SSHError, OSError, EOFError)):
            return error
        name, done = self.called(item), self.done.get(item.name, 0)
        kept = "; what has arrived is kept for resume=True" if self._options.resume and done else ""
        reason = printable(str(error) or type(error).__name__, 500)
        failure = TransferError(
            f"{printable(name, 300)} was not transferred, after {done} of {item.size} bytes: "
            f"{reason}{kept}",
            name=name,
            done=done,
            total=item.size,
        )
        failure.__cause__ = error
        return failure

    def judged(self, error: BaseException, files: list[Item]) -> BaseException:
        """The same for what went wrong with the whole."""
        if isinstance(error, TransferError) or not isinstance(error, (SSHError, OSError, EOFError)):
            return error
        whole = Item(b"", sum(item.size for item in files), 0, 0)
        self.done[b""] = sum(self.done.values())
        return self.failed(error, whole)

    def result(
        self, path: str, files: list[Item], started: float, skipped: list[tuple[str, str]]
    ) -> Transferred:
        """What is told in the end."""
        size, duration = sum(item.size for item in files), time.monotonic() - started
        logger.debug("%d files, %d bytes in %.2f s: %s", len(files), size, duration, self.name)
        return Transferred(path, len(files), size, duration, skipped)


Work = Callable[[Any, Job], None]


class Lanes:
    """Threads that do jobs, each over a channel of its own, on one or more connections."""

    def __init__(self, ssh: Any, another: Another, connections: int, channels: int) -> None:
        self._opened: dict[int, Any] = {0: ssh}
        self._another = another
        self._connections = 1 if another is None else connections
        self._channels = channels
        self._locks = [threading.Lock() for _ in range(self._connections)]

    def run(
        self, jobs: list[Job], work: Work, report: Reporter,
        meanwhile: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        """Do all jobs, and something else meanwhile. The first error stops all, and is raised."""
        todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            todo.put(job)
        count = min(len(jobs), self._connections * self._channels)
        lanes = [
            threading.Thread(
                target=self._lane,
                args=(number % self._connections, todo, work, report),
                name="clore-transfer",
                daemon=True,
            )
            for number in range(count)
        ]
        try:
            for lane in lanes:
                lane.start()
            if meanwhile is not None:
                meanwhile()
            self._oversee(len(lanes), report)
        except BaseException:
            report.stopped.set()
            report.watch.hurry()
            raise
        finally:
            # What is left of the others' work would hold the end up for as long as timeout.
            if report.stopped.is_set():
                report.cut()
            for lane in lanes:
                if lane.ident is not None:  # it was started
                    lane.join()
            self._close()

    def _oversee(self, running: int, report: Reporter) -> None:
        failure: BaseException | None = None
        while running:
            what, more, *job = report.events.get()
            if what is None:
                running -= 1
                if more is not None and failure is None:
                    failure = report.failed(more, job[0].items[0] if job[0] is not None else None)
                    report.stopped.set()
                    report.cut()
            elif failure is None:
                report.count(what, more)
        if failure is not None:
            raise failure

    def _lane(
        self, number: int, todo: queue.SimpleQueue[Job], work: Work, report: Reporter
    ) -> None:
        failure: BaseException | None = None
        job: Job | None = None
        try:
            ssh = self._connection(number)
            while ssh is not None and not report.stopped.is_set():
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    break
                try:
                    work(ssh, job)
                except NoChannelError as error:
                    todo.put(job)
                    report.crowded(error)
        except StoppedError:
            pass
        except BaseException as error:
            failure = error
        report.events.put((None, failure, job))

    def _connection(self, number: int) -> Any:
        """The connection of that number; None where the machine does not take so many."""
        with self._locks[number]:
            if number not in self._opened:
                self._opened[number] = self._open()
            return self._opened[number]

    def _open(self) -> Any:
        try:
            return self._another() if self._another is not None else None
        except (SSHError, OSError) as error:
            logger.debug("a further connection is refused, it goes on without: %s", error)
            return None

    def _close(self) -> None:
        for number, ssh in list(self._opened.items()):
            if number and ssh is not None:
                ssh.close()


def file_digest(path: str | Path, start: int, length: int) -> str:
    """SHA-256 of a part of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(CHUNK, length))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()


def parse_sums(text: bytes, count: int) -> list[str]:
    """The digests that sha256sum printed, in the order of the names."""
    # What else stands on a line is a piece of a name: not every sha256sum escapes newlines.
    sums = [s.decode() for s in re.findall(rb"^\\?([0-9a-f]{64}) [ *]", text, re.M)]
    if len(sums) != count:
        raise SSHError(f"the machine hashed {len(sums)} files instead of {count}")
    return sums


# ==================================================================================================
# ssh.local_files
#
# Files that a download makes here: beside their place until they are complete.
# ==================================================================================================


class DoneRecord:
    """What a download that may be resumed has done so far; held under a lock."""

    def __init__(self, part: Path) -> None:
        self._part = part
        self._path = Path(f"{part}.done")
        self.done: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> DoneRecord:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self._file = os.fdopen(os.open(self._path, flags, 0o600), "r+", encoding="latin-1")
        if not (lock_file(self._file.fileno()) and self._is_there()):
            self._file.close()
            raise SSHError("another process is at the same transfer")
        self.done = set(self._file.read().split())
        return self

    def __exit__(self, *_: object) -> None:
        if not os.path.lexists(self._part):
            self._path.unlink(missing_ok=True)  # there is nothing to go on from
        self._file.close()

    def _is_there(self) -> bool:
        """Whether the file is still the one of that name: another process removes it in the end."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def add(self, key: str) -> None:
        with self._lock:
            self._file.write(f"{key}\n")
            self._file.flush()

    def clear(self) -> None:
        self.done = set()
        self._file.seek(0)
        self._file.truncate()


def merge_into(part: Path, target: str, items: list[Item], preserve: bool) -> None:
    """Move a tree over one that exists; a symlink in there is never written through."""
    for item in items:  # all is looked at before the first is moved
        place = os.path.join(target, checked_name(item.name))
        if os.path.islink(place) and item.folder:
            raise SSHError(f"local holds a symlink in the place of {printable(item.shown, 300)}")
        if os.path.lexists(place) and os.path.isdir(place) != item.folder:
            raise SSHError(
                f"local holds something else in the place of {printable(item.shown, 300)}"
            )
    for item in items:
        name = checked_name(item.name)
        place = os.path.join(target, name)
        if item.folder:
            if not os.path.isdir(place):
                os.mkdir(place)
        else:
            os.replace(part / name, place)
    for item in [i for i in items[::-1] if i.folder and preserve]:
        place = os.path.join(target, checked_name(item.name))
        os.chmod(place, item.mode)
        os.utime(place, ns=(item.mtime, item.mtime))
    shutil.rmtree(part)


def new_file(path: Path, mode: int, again: bool = False) -> Any:
    """A file of our own; with ``again`` it may be there already."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    flags |= 0 if again else os.O_EXCL
    permissions = 0o777 if mode & 0o111 else 0o666  # less the umask
    return os.fdopen(os.open(path, flags, permissions), "r+b", buffering=0)


def write_all(file: Any, piece: bytes) -> None:
    """All of it: the last that fits on a full disk is written in part, and no error."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def remove_part(part: Path) -> None:
    try:
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("a temporary file stays: %s", error)


# ==================================================================================================
# ssh.upload
#
# Copying files and directories to a machine: under a temporary name, renamed when complete.
# ==================================================================================================


# sshd takes 2 MB on a channel before it wants to be asked again, and ten channels on a connection:
# over a distance it is the number of channels that makes an upload fast.
UPLOAD_CHANNELS = 8
# From how many bytes on how many connections pay for their logins, which go on at the same time.
UPLOAD_CONNECTIONS = ((256 * 1024 * 1024, 4), (32 * 1024 * 1024, 2))
TAR_BLOCK = 512  # bytes


class LocalTree:
    """What is to be sent: files, directories, and what is left out."""

    def __init__(self, path: bytes, preserve: bool) -> None:
        self.path = path
        self.items: list[Item] = []
        self.skipped: list[tuple[str, str]] = []
        try:
            facts = os.stat(path)  # the one that is named may be a symlink
        except FileNotFoundError:
            shown = printable(repr(os.fsdecode(path)), 300)
            raise FileNotFoundError(f"local: there is nothing at {shown}") from None
        self.is_folder = stat.S_ISDIR(facts.st_mode)
        self._preserve = preserve
        if self.is_folder:
            self._scan(b"")
        elif stat.S_ISREG(facts.st_mode):
            self.items.append(self._item(b"", facts))
        else:
            raise ValueError(f"local is neither a file nor a directory: {os.fsdecode(path)!r}")

    @property
    def files(self) -> list[Item]:
        return [item for item in self.items if not item.folder]

    def place(self, item: Item) -> str:
        """Where an item is here."""
        return os.fsdecode(os.path.join(self.path, item.name) if item.name else self.path)

    def pieces(self, item: Item, start: int, length: int) -> Iterator[memoryview]:
        """A part of a file, which must stay as it was when it was looked at; one piece at a time.

        What was yielded is overwritten by the next.
        """
        buffer = memoryview(bytearray(min(CHUNK, length)))
        with open(self.place(item), "rb", buffering=0) as file:
            file.seek(start)
            while length and (size := file.readinto(buffer[:length])):
                length -= size
                yield buffer[:size]
            facts = os.fstat(file.fileno())
            if length or (facts.st_size, facts.st_mtime_ns) != (item.size, item.mtime):
                raise SSHError("it was changed meanwhile")

    def _scan(self, folder: bytes) -> None:
        with os.scandir(os.path.join(self.path, folder) if folder else self.path) as entries:
            found = sorted(entries, key=lambda e: e.name)
        for entry in found:
            name = os.path.join(folder, entry.name) if folder else entry.name
            facts = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(facts.st_mode):
                self.items.append(self._item(name, facts))
                self._scan(name)
            elif stat.S_ISREG(facts.st_mode):
                self.items.append(self._item(name, facts))
            else:
                link = stat.S_ISLNK(facts.st_mode)
                target = os.fsdecode(os.readlink(entry.path)) if link else ""
                leave_out(self.skipped, os.fsdecode(name), target if link else None)

    def _item(self, name: bytes, facts: os.stat_result) -> Item:
        folder, mode = stat.S_ISDIR(facts.st_mode), facts.st_mode & 0o777
        if not self._preserve:
            mode = 0o755 if folder or mode & 0o111 else 0o644
        if os.sep != "/":
            name = name.replace(os.fsencode(os.sep), b"/")
        return Item(name, facts.st_size, facts.st_mtime_ns, mode, folder)


def check_upload(local: Any, remote: Any, *rest: Any) -> tuple[Options, LocalTree]:
    """The arguments of an upload, checked, and what is to be sent; nothing is sent yet."""
    options = Options(local, remote, *rest)
    far_path(options.remote)
    return options, LocalTree(os.path.expanduser(options.local), options.preserve)


def upload_connections(options: Options, tree: LocalTree) -> int:
    """How many connections an upload uses."""
    if options.streams is not None:
        return options.streams
    size = sum(item.size for item in tree.items)
    return next((count for least, count in UPLOAD_CONNECTIONS if size >= least), 1)


def upload_path(ssh: Any, another: Another, checked: tuple[Options, LocalTree]) -> Transferred:
    """See ``CloreClient.upload``."""
    return Upload(ssh, another, *checked).run()


class Upload:
    """One upload, from the first question to the rename."""

    def __init__(self, ssh: Any, another: Another, options: Options, tree: LocalTree) -> None:
        self._ssh = ssh
        self._another = another
        self._options = options
        self._tree = tree
        whole = os.path.abspath(tree.path)
        name = os.path.basename(whole)
        self._report = Reporter(os.fsdecode(name) or "/", options)
        kind = "d" if tree.is_folder else "f"
        # A name that the next try finds again, or one of nobody else's.
        same = hashlib.sha256(repr((kind, whole, options.remote)).encode()).hexdigest()
        token = same[:20] if options.resume else os.urandom(10).hex()
        self._target = (far_path(options.remote), name or b".", kind, token)
        self._jobs = plan(tree.items, tree.is_folder, options.resume)
        # Whether what has arrived is read back and compared.
        self._last: Exec | None = None
        self._report.on_crowd = self._give_way
        self._hashes = options.verify or options.resume or len(self._jobs) > 1

    def run(self) -> Transferred:
        with self._report.watch:
            return self._run()

    def _run(self) -> Transferred:
        started = time.monotonic()
        try:
            earlier = self._earlier() if self._options.resume else set()
            self._send([job for job in self._jobs if job.key not in earlier])
            self._check_earlier([job for job in self._jobs if job.key in earlier])
            path = self._finish()
        except BaseException as error:
            self._report.watch.hurry()
            self._give_way()
            if not self._options.resume:
                self._wipe()
            judged = self._report.judged(error, self._tree.files)
            if judged is error:
                raise
            raise judged from error
        return self._report.result(path, self._tree.files, started, self._tree.skipped)

    def _verb(self, verb: str, *arguments: bytes | str | int) -> str:
        return far_command(verb, *self._target, *arguments)

    def _exec(self, verb: str, *arguments: bytes | str | int) -> Exec:
        timeout = self._options.timeout
        return Exec(self._ssh, self._verb(verb, *arguments), self._report.watch, timeout)

    def _ask(self, verb: str, *arguments: bytes | str | int) -> str:
        with self._exec(verb, *arguments) as running:
            running.end()
            return running.answer()

    def _wipe(self) -> None:
        try:
            self._ask("wipe")
        except (SSHError, OSError, EOFError) as error:
            logger.warning("a temporary file may stay on the machine: %s", error)

    # --- what an earlier try has left ---

    def _earlier(self) -> set[str]:
        """The jobs that are done already; with another source, none are."""
        with self._exec("begin") as running:
            running.end()
            first, *lines = running.rest(LONGEST_ANSWER).decode("ascii", "replace").split("\n")
            if first != "ok":
                raise running.refused(first.partition(" ")[2])
        done = {line for line in lines if line}
        if done <= {job.key for job in self._jobs}:
            return done
        self._ask("wipe")
        return set()

    def _check_earlier(self, jobs: list[Job]) -> None:
        """What was there before is compared, too."""
        for job in jobs:
            if job.length is None:
                there = self._sums(job.files)
                here = [file_digest(self._tree.place(f), 0, f.size) for f in job.files]
            else:
                with self._exec("putsum", job.items[0].name, *job.blocks, job.length) as running:
                    running.end()
                    there = parse_sums(running.rest(LONGEST_ANSWER), 1)
                here = [file_digest(self._tree.place(job.items[0]), job.start, job.length)]
            if there != here:
                self._wipe()
                raise SSHError("what an earlier try had left there is not what is here: removed")
            for item in job.files:
                self._report.count(item, item.size if job.length is None else job.length)

    def _sums(self, files: list[Item]) -> list[str]:
        return parse_sums(self._of_each("putsums", files), len(files))

    def _of_each(self, verb: str, files: list[Item]) -> bytes:
        if not files:
            return b""
        with self._exec(verb) as running:
            send_names(running, files)
            text = running.rest(LONGEST_ANSWER)
            if running.status() != 0:
                raise running.refused()
            return text

    # --- sending ---

    def _send(self, jobs: list[Job]) -> None:
        if jobs:
            streams = upload_connections(self._options, self._tree)
            Lanes(self._ssh, self._another, streams, UPLOAD_CHANNELS).run(
                jobs, self._do, self._report, self._prepare_finish
            )

    def _do(self, ssh: Any, job: Job) -> None:
        if job.length is None:
            self._send_bundle(ssh, job.items, job.key)
        else:
            self._send_range(ssh, job, job.length)

    def _send_range(self, ssh: Any, job: Job, length: int) -> None:
        item, hashed, digest = job.items[0], int(self._hashes), hashlib.sha256()
        command = self._verb(
            "put", item.name, *job.blocks, length, job.key, hashed, int(self._options.resume)
        )
        with self._report.exec(ssh, command) as running:
            for piece in self._tree.pieces(item, job.start, length):
                if hashed:
                    digest.update(piece)
                if not running.send(piece):
                    break  # the answer says why it takes no more
                self._report.moved(item, len(piece))
            running.end()
            if running.answer() != (digest.hexdigest() if hashed else "-"):
                raise SSHError("SHA-256 differs")

    def _send_bundle(self, ssh: Any, items: list[Item], key: str) -> None:
        last = key == "-"  # modes and times of directories
        times, keep = "p" if self._options.preserve else "m", int(self._options.resume)
        with self._report.exec(ssh, self._verb("untar", times, key, keep)) as running:
            for item in items:
                # Files are to come into a directory, whatever its mode will be.
                mode = item.mode | 0o700 if item.folder and not last else item.mode
                if not running.send(tar_header(item, mode)) or not self._send_small(running, item):
                    break
            running.send(bytes(2 * TAR_BLOCK))
            running.end()
            running.answer()

    def _send_small(self, running: Exec, item: Item) -> bool:
        if item.folder:
            return True
        for piece in self._tree.pieces(item, 0, item.size):
            if not running.send(piece):
                return False
            self._report.moved(item, len(piece))
        if not item.size:
            self._report.moved(item, 0)
        return running.send(bytes(-item.size % TAR_BLOCK))

    # --- the end ---

    def _finish_verb(self) -> str:
        if self._tree.is_folder:
            return self._verb("finish")
        (item,) = self._tree.files
        times = seconds_of(item, self._options.preserve)
        return self._verb("finish", item.size, f"{item.mode:o}", times)

    def _prepare_finish(self) -> None:
        """Start what comes last: it waits for its word, which saves a round trip in the end."""
        if not self._tree.is_folder:
            with contextlib.suppress(NoChannelError):
                self._last = Exec(self._ssh, self._finish_verb(), self._report.watch)

    def _give_way(self) -> None:
        """What comes last must not take the one channel that there is."""
        if self._last is not None:
            self._last.close()
            self._last = None

    def _finish(self) -> str:
        if self._tree.is_folder:
            self._settle_tree()
        watch, timeout = self._report.watch, self._options.timeout
        with self._last or Exec(self._ssh, self._finish_verb(), watch, timeout) as running:
            running.send(b"go\n")
            running.end()
            return running.answer().removeprefix("./")

    def _settle_tree(self) -> None:
        """Compare what has arrived; give modes and times to what has none yet."""
        tree, preserve = self._tree, self._options.preserve
        if not tree.items:
            self._send_bundle(self._ssh, [], "-")
        sizes = self._of_each("sizes", tree.files).split()
        if len(sizes) != len(tree.files):
            raise SSHError(f"{len(sizes)} of {len(tree.files)} files arrived")
        for item, size in zip(tree.files, sizes, strict=True):
            if size != str(item.size).encode():
                raise SSHError(f"{item.shown} has {printable(repr(size), 40)} bytes there")
        if self._options.verify:
            here = [file_digest(tree.place(f), 0, f.size) for f in tree.files]
            for item, one, other in zip(tree.files, here, self._sums(tree.files), strict=True):
                if one != other:
                    raise SSHError(f"SHA-256 of {item.shown} differs")
        for job in self._jobs:
            item = job.items[0]
            if job.length is not None and not job.start and (preserve or item.mode & 0o111):
                self._ask("meta", item.name, f"{item.mode:o}", seconds_of(item, preserve))
        folders = [item for item in tree.items if item.folder]
        if preserve and folders:
            # The deepest first: what is made in a directory changes its time.
            self._send_bundle(self._ssh, folders[::-1], "-")


def seconds_of(item: Item, preserve: bool) -> str:
    """The time for ``touch``, or ``-``."""
    return f"{item.mtime // 10**9}.{item.mtime % 10**9:09d}" if preserve else "-"


def send_names(running: Exec, files: list[Item]) -> None:
    """A list for ``xargs -0``."""
    running.send(b"".join(b"./" + item.name + b"\0" for item in files))
    running.end()


def tar_header(item: Item, mode: int) -> bytes:
    """What stands before an item in a tar stream; no user's name or number goes out."""
    import tarfile  # not cheap

    info = tarfile.TarInfo("./" + os.fsdecode(item.name))
    info.size, info.mode, info.mtime = item.size, mode, item.mtime // 10**9
    info.type = tarfile.DIRTYPE if item.folder else tarfile.REGTYPE
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


# ==================================================================================================
# ssh.download
#
# Copying files and directories from a machine, of which nothing is believed.
# ==================================================================================================


# What comes to us is held down by our own window only, which is large.
DOWNLOAD_CHANNELS = 2
DOWNLOAD_CONNECTIONS = 4
DOWNLOAD_MANY = 256 * 1024 * 1024  # bytes from which on further connections pay for their login
AT_ONCE = 128 * 1024 * 1024  # bytes of a file that comes with the first answer
MOST_FILES = 2_000_000
LAST_SECOND = 253_402_300_799  # of the year 9999; filesystems know no times far beyond


class RemoteTree:
    """What the machine says there is; read with care."""

    def __init__(self, tell: bool = True) -> None:
        """``tell``: of what is left out."""
        self._tell = tell
        self.items: list[Item] = []
        self.skipped: list[tuple[str, str]] = []
        self.root = Item(b"", 0, 0, 0o755, folder=True)
        self._folders = {b""}
        self._names: set[bytes] = set()

    @property
    def files(self) -> list[Item]:
        return [item for item in self.items if not item.folder]

    def take(self, mode: int, size: int, seconds: int, name: bytes) -> None:
        """One entry of the listing."""
        folder = stat.S_ISDIR(mode)
        item = Item(name, size, _nanoseconds(seconds), mode & 0o777, folder)
        if not name and folder:
            self.root = item
            return
        shown = checked_name(name)
        parent = name.rpartition(b"/")[0]
        if name in self._names or parent not in self._folders:
            raise SSHError(f"the machine lists {printable(repr(name), 120)} where it can't be")
        self._names.add(name)
        if folder:
            self._folders.add(name)
        if folder or stat.S_ISREG(mode):
            self.items.append(item)
        elif self._tell:
            leave_out(self.skipped, shown, "" if stat.S_ISLNK(mode) else None)


class DownloadOptions(Options):
    """The arguments of a download, checked; and where it is to go."""

    def __init__(
        self, remote: Any, local: Any, preserve: Any, verify: Any, resume: Any, streams: Any,
        max_bytes: Any, progress: Any, timeout: Any,
    ) -> None:  # fmt: skip
        super().__init__(local, remote, preserve, verify, resume, streams, progress, timeout)
        if max_bytes is not None:
            if type(max_bytes) is not int:
                raise TypeError(f"max_bytes must be a whole number, not {short_repr(max_bytes)}")
            check_number("max_bytes", max_bytes, unit="bytes")
        self.max_bytes: int | None = max_bytes
        self.far = far_path(self.remote)
        self.target = _target_of(os.fsdecode(os.path.expanduser(self.local)), self.remote)


def _target_of(local: str, remote: bytes) -> str:
    """Where it goes: into a directory that exists, else to that very name."""
    name = os.fsdecode(remote.rstrip(b"/").rpartition(b"/")[2])
    if os.path.isdir(local):
        whole = name in ("", ".", "..") or remote.rstrip(b"/") == b"~"
        return local if whole else os.path.join(local, name)
    parent = os.path.dirname(os.path.abspath(local))
    if local.endswith(("/", os.sep)) or not os.path.isdir(parent):
        missing = local if local.endswith(("/", os.sep)) else parent
        raise FileNotFoundError(f"local: there is no directory {printable(repr(missing), 300)}")
    return local


def check_download(*arguments: Any) -> DownloadOptions:
    """The arguments of a download, checked; nothing is sent yet."""
    return DownloadOptions(*arguments)


def download_path(ssh: Any, another: Another, options: DownloadOptions) -> Transferred:
    """See ``CloreClient.download``."""
    return Download(ssh, another, options).run()


class Download:
    """One download, from the first question to the rename."""

    def __init__(self, ssh: Any, another: Another, options: DownloadOptions) -> None:
        self._ssh = ssh
        self._another = another
        self._options = options
        self._report = Reporter(os.fsdecode(options.remote), options)
        self._files: list[Item] = []
        whole = os.path.abspath(options.target)
        same = hashlib.sha256(repr((options.remote, whole)).encode()).hexdigest()
        token = same[:20] if options.resume else os.urandom(10).hex()
        # A name that the next try finds again, or one of nobody else's.
        self._part = Path(os.path.dirname(whole)) / f"{PART}{token}"
        self._record = DoneRecord(self._part) if options.resume else None

    def run(self) -> Transferred:
        with self._report.watch:
            return self._run()

    def _run(self) -> Transferred:
        started = time.monotonic()
        tree = RemoteTree()
        try:
            with contextlib.ExitStack() as stack:
                if self._record is not None:
                    stack.enter_context(self._record)
                folder = self._look(tree)
                self._install(tree, folder)
        except BaseException as error:
            if not self._options.resume:
                remove_part(self._part)
            judged = self._report.judged(error, self._files)
            if judged is error:
                raise
            raise judged from error
        return self._report.result(self._options.target, self._files, started, tree.skipped)

    def _exec(self, verb: str, *arguments: bytes | str | int) -> Exec:
        timeout = self._options.timeout
        return Exec(self._ssh, far_command(verb, *arguments), self._report.watch, timeout)

    # --- what there is ---

    def _look(self, tree: RemoteTree) -> bool:
        """Ask what there is, and get it; whether it is a directory."""
        options = self._options
        ranges = options.resume or (options.streams or 1) > 1
        with self._exec("look", options.far, -1 if ranges else AT_ONCE, int(options.verify)) as (
            running
        ):
            kind, _, facts = running.line().partition(b" ")
            if kind == b"f":
                item = _file_facts(facts)
                self._accept([item], folder=False)
                if not ranges and item.size <= AT_ONCE:
                    self._receive_at_once(running, item)
                    return False
            elif kind == b"d":
                parse_listing(running.rest(LONGEST_ANSWER), MOST_FILES, tree.take)
                if running.status() != 0:
                    raise running.refused()
                self._accept(tree.files, folder=True)
            else:
                text = {b"n": "there is no such file", b"o": "it is no file"}
                raise SSHError(text.get(kind) or "the machine says what can't be understood")
        items = tree.items if kind == b"d" else self._files
        self._get(items, kind == b"d")
        return kind == b"d"

    def _accept(self, files: list[Item], folder: bool) -> None:
        """Refuse what is too large, and what has no place; before anything is made."""
        self._files = files
        size, most = sum(item.size for item in files), self._options.max_bytes
        if most is not None and size > most:
            raise SSHError(f"it has {size} bytes, and max_bytes is {most}")
        target = self._options.target
        if not folder and os.path.isdir(target):
            raise IsADirectoryError(f"local is a directory: {target!r}")
        if folder and os.path.lexists(target) and not os.path.isdir(target):
            raise NotADirectoryError(f"local is no directory: {target!r}")

    def _receive_at_once(self, running: Exec, item: Item) -> None:
        digest = hashlib.sha256()
        with new_file(self._part, item.mode) as file:
            self._receive(running, item, item.size, file, digest)
        if self._options.verify:
            _compare(running.line(), digest.hexdigest())
        _check_same(item, _file_facts(running.line()), self._report.called(item))
        _no_more(running)

    def _receive(self, running: Exec, item: Item, left: int, file: Any, digest: Any = None) -> None:
        """Exactly the bytes that were announced."""
        if not left:
            self._report.moved(item, 0)
        while left:
            piece = running.receive(min(CHUNK, left))
            if not piece:
                raise running.refused("", f"{left} bytes are missing {running.errors()}")
            write_all(file, piece)
            if digest is not None:
                digest.update(piece)
            left -= len(piece)
            self._report.moved(item, len(piece))

    # --- in pieces ---

    def _get(self, items: list[Item], folder: bool) -> None:
        jobs = plan(items, folder, self._options.resume)
        done = self._earlier(jobs)
        if folder:
            self._part.mkdir(exist_ok=bool(done))
            for item in items:
                if item.folder:
                    self._place(item).mkdir(exist_ok=bool(done))
        else:
            new_file(self._part, items[0].mode, again=bool(done)).close()
        todo = [job for job in jobs if job.key not in done]
        many = sum(job.size for job in todo) >= DOWNLOAD_MANY
        streams = self._options.streams or (DOWNLOAD_CONNECTIONS if many else 1)
        if todo:
            lanes = Lanes(self._ssh, self._another, streams, DOWNLOAD_CHANNELS)
            lanes.run(todo, self._do, self._report)
        self._check_earlier([job for job in jobs if job.key in done])
        self._check_unchanged(todo)

    def _earlier(self, jobs: list[Job]) -> set[str]:
        """The jobs that are done already; with another source, none are."""
        if self._record is None:
            return set()
        done = self._record.done
        if done and os.path.lexists(self._part) and done <= {job.key for job in jobs}:
            return set(done)
        remove_part(self._part)
        self._record.clear()
        return set()

    def _place(self, item: Item) -> Path:
        return self._part / checked_name(item.name) if item.name else self._part

    def _do(self, ssh: Any, job: Job) -> None:
        if job.length is None:
            self._get_bundle(ssh, job)
        else:
            self._get_range(ssh, job, job.length)
        if self._record is not None:
            self._record.add(job.key)

    def _far(self, item: Item) -> bytes:
        return self._options.far.rstrip(b"/") + b"/" + item.name if item.name else self._options.far

    def _get_range(self, ssh: Any, job: Job, length: int) -> None:
        (item,), digest = job.items, hashlib.sha256()
        command = far_command("get", self._far(item), *job.blocks, length)
        with self._report.exec(ssh, command) as running:
            with new_file(self._place(item), item.mode, again=True) as file:
                file.seek(job.start)
                self._receive(running, item, length, file, digest)
            _compare(running.line(), digest.hexdigest())
            _no_more(running)

    def _get_bundle(self, ssh: Any, job: Job) -> None:
        files = job.files
        if not files:
            return
        with self._report.exec(ssh, far_command("many", self._options.far)) as running:
            send_names(running, files)
            for item in files:
                with new_file(self._place(item), item.mode, again=True) as file:
                    file.truncate(0)
                    self._receive(running, item, item.size, file)
            _no_more(running)

    def _check_earlier(self, jobs: list[Job]) -> None:
        """What was here before is compared, too."""
        for job in jobs:
            if job.length is None:
                self._compare_all(job.files)
            else:
                (item,) = job.items
                with self._exec("rangesum", self._far(item), *job.blocks, job.length) as running:
                    there = parse_sums(running.rest(LONGEST_ANSWER), 1)
                if there != [file_digest(self._place(item), job.start, job.length)]:
                    self._differs(item)
            for item in job.files:
                self._report.count(item, item.size if job.length is None else job.length)

    def _check_unchanged(self, todo: list[Job]) -> None:
        """What came in pieces, or one after the other, must not have changed meanwhile."""
        bundled = [item for job in todo if job.length is None for item in job.files]
        ranged = [item for job in todo if job.length is not None for item in job.files]
        if self._options.verify:
            self._compare_all(bundled)
            bundled = []
        if not bundled and not ranged:
            return
        again = RemoteTree(tell=False)
        with self._exec("look", self._options.far, -1, 0) as running:
            kind, _, facts = running.line().partition(b" ")
            if kind == b"f":
                again.items.append(_file_facts(facts))
            elif kind == b"d":
                parse_listing(running.rest(LONGEST_ANSWER), MOST_FILES, again.take)
        now = {item.name: item for item in again.items}
        for item in bundled + ranged:
            _check_same(item, now.get(item.name), self._report.called(item))

    def _compare_all(self, files: list[Item]) -> None:
        if not files:
            return
        with self._exec("sums", self._options.far) as running:
            send_names(running, files)
            there = parse_sums(running.rest(LONGEST_ANSWER), len(files))
        for item, digest in zip(files, there, strict=True):
            if digest != file_digest(self._place(item), 0, item.size):
                self._differs(item)

    def _differs(self, item: Item) -> None:
        if self._record is not None:
            remove_part(self._part)
            self._record.clear()
        raise SSHError(f"SHA-256 of {printable(self._report.called(item), 300)} differs")

    # --- the end ---

    def _install(self, tree: RemoteTree, folder: bool) -> None:
        options, target = self._options, self._options.target
        merging = folder and os.path.lexists(target)
        if options.preserve:
            # From a directory that may not be written to, nothing could be moved.
            whole = tree.files if merging else [*tree.items[::-1], tree.root]
            for item in whole if folder else self._files:
                place = self._place(item)
                os.chmod(place, item.mode)
                os.utime(place, ns=(item.mtime, item.mtime))
        if not folder:
            if self._part.stat().st_size != self._files[0].size:
                raise SSHError(f"{self._part.stat().st_size} bytes have arrived")
            os.replace(self._part, target)
        elif not merging:
            os.rename(self._part, target)
        else:
            merge_into(self._part, target, tree.items, options.preserve)


def _file_facts(facts: bytes) -> Item:
    found = re.fullmatch(rb"([0-9]{1,18}) (-?[0-9]{1,18}) ([0-7]{1,5})", facts)
    if found is None:
        raise SSHError("the machine says what can't be understood")
    size, seconds, mode = found.groups()
    return Item(b"", int(size), _nanoseconds(int(seconds)), int(mode, 8) & 0o777)


def _check_same(item: Item, now: Item | None, name: str) -> None:
    if now is None or (now.size, now.mtime) != (item.size, item.mtime):
        raise SSHError(
            f"{printable(name, 300)} was changed meanwhile; of what is still being written, "
            "make a copy there, and download that"
        )


def _nanoseconds(seconds: int) -> int:
    return min(max(seconds, 0), LAST_SECOND) * 10**9


def _compare(line: bytes, digest: str) -> None:
    if line[:64] != digest.encode():
        raise SSHError("SHA-256 differs" if len(line) >= 64 else "the machine has no sha256sum")


def _no_more(running: Exec) -> None:
    """The end of the output, and an exit status of 0."""
    if running.receive(1):
        raise SSHError("the machine sends more than it announced")
    if running.status() != 0:
        raise running.refused()


# ==================================================================================================
# ssh.scp_wire
#
# The wire of one scp transfer: nothing on it waits for ever, and nothing is endless.
# ==================================================================================================


SCP_CHUNK = 131072  # bytes that are read or sent at once
LONGEST_LINE = 16384  # bytes; the longest honest one is an error with a path in it
SHOWN_OF_HOST = 300  # characters of what a host says that an error shows
WATCH_LOOK = 0.25  # seconds between two looks at the clock
WATCH_SLACK = 1.0  # seconds after paramiko's own timeout, where it has one
MOST_UNREAD = 32 * 1024 * 1024  # bytes; far more than the window that the host was given
FLOODED = "the host sent more than it was allowed to"
CLOSE_GRACE = 5.0  # seconds in which closing a channel must end what waits for it


class ScpError(Exception):
    """What went wrong with a transfer, for the error that is made of it."""


@contextlib.contextmanager
def local_faults() -> Iterator[None]:
    """What this machine refuses, a full disk for one, becomes a fault of the transfer."""
    try:
        yield
    except OSError as error:
        what = f": {error.filename!r}" if error.filename else ""
        text = printable(f"{error.strerror or error}{what}", 500)
        raise ScpError(f"on this machine: {text}") from error


def words_of_host(raw: bytes) -> str:
    """What a host says, as it may stand in an error."""
    return printable(raw.decode("utf-8", "replace").strip(), SHOWN_OF_HOST)


class ScpWire:
    """A channel on which the host runs scp. Every method raises :class:`ScpError`.

    paramiko waits without a limit for the answer to an exec request, and for a socket that takes
    no more bytes; and it keeps whatever comes, also beyond the window. So a thread watches, and
    closes the channel under a call that takes too long, or where that can't help, the connection.

    Attributes:
        channel: of paramiko.
    """

    def __init__(self, transport: Any, command: bytes, timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout
        self._broken: Any = (OSError, EOFError, import_paramiko().SSHException)
        self._buffer = bytearray()
        self._call_until = math.inf
        self._flooded = False
        self._done = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, daemon=True, name="scp watchdog")
        self.channel: Any = None
        self._watchdog.start()
        try:
            with self._bounded("opened no channel"):
                self.channel = transport.open_session(timeout=timeout)
            with self._bounded("did not start scp"):
                self.channel.exec_command(command)
        except BaseException:
            self.close()
            raise

    def line(self) -> bytes | None:
        """The next line without its end, or None at the end of everything."""
        until = time.monotonic() + self._timeout
        while (end := self._buffer.find(b"\n", 0, LONGEST_LINE)) < 0:
            if len(self._buffer) >= LONGEST_LINE:
                raise ScpError("the host sent a line without an end")
            if not self._more(until):
                if self._buffer:
                    raise ScpError("the host broke off in the middle of a line")
                return None
        return self._take(end + 1)[:-1]

    def some(self, most: int) -> bytes:
        """At most so many bytes, as soon as there are some; none at the end of everything."""
        if not self._buffer:
            self._more(time.monotonic() + self._timeout)
        return self._take(most)

    def confirm(self) -> None:
        """Read the host's answer to what was sent; raises unless it is a yes."""
        answer = self.some(1)
        if answer == b"\0":
            return
        if not answer:
            raise ScpError(self.how_it_ended())
        if answer in b"\1\2":
            raise ScpError(f"the host says: {self._rest_of_line()}")
        text = words_of_host(answer + self._take(LONGEST_LINE))
        raise ScpError(f"this is no answer of scp: {text!r}")

    def send(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        try:
            while data:
                with self._bounded("took nothing"):
                    self.channel.settimeout(self._timeout)
                    sent = self.channel.send(data[:SCP_CHUNK])
                if not sent:
                    raise ScpError("the host has closed the channel")
                data = data[sent:]
        except ScpError as fault:
            # Most often the host has said why before it left.
            said = self._said()
            raise ScpError(f"{fault}; the host says: {said}" if said else str(fault)) from fault

    def finish(self) -> None:
        """Say that this was all, and wait for scp's end; raises when that was a bad one."""
        with self._bounded("did not take the end"):
            self.channel.shutdown_write()
        if self._status() > 0:
            raise ScpError(self.how_it_ended())

    def how_it_ended(self) -> str:
        """Why there is nothing more to read."""
        status = self._status()
        said = self._said()
        how = "the host has closed the channel"
        if self._flooded:
            return FLOODED
        if status > 0:
            how = f"scp on the host ended with exit code {status}"
        elif not self._transport.is_active():
            how = "the connection broke"
        return f"{how}: {said}" if said else how

    def close(self) -> None:
        """Close the channel, whatever the host does."""
        if self.channel is not None:
            with contextlib.suppress(ScpError), self._bounded("closed nothing"):
                self.channel.close()
        self._done.set()
        self._watchdog.join(CLOSE_GRACE)

    def _take(self, most: int) -> bytes:
        taken = bytes(self._buffer[:most])
        del self._buffer[:most]
        return taken

    def _more(self, until: float) -> bool:
        """Wait for more bytes; False when there will be none."""
        left = until - time.monotonic()
        with self._bounded("sent nothing that is whole"):
            if left <= 0:
                raise TimeoutError
            self.channel.settimeout(left)
            chunk = self.channel.recv(SCP_CHUNK)
        self._buffer += chunk
        return bool(chunk)

    def _rest_of_line(self) -> str:
        try:
            line = self.line() or b""
        except ScpError:
            line = bytes(self._buffer)
        return words_of_host(line)

    def _said(self) -> str:
        """An error's text, when it is there already."""
        if self.channel is None:
            return ""
        raw = bytes(self._buffer[:LONGEST_LINE])
        errors = b""
        with contextlib.suppress(*self._broken):
            if not raw and self.channel.recv_ready():
                raw = self.channel.recv(LONGEST_LINE)
            if self.channel.recv_stderr_ready():
                errors = self.channel.recv_stderr(LONGEST_LINE)
        raw = raw.lstrip(b"\0")
        return words_of_host(raw[1:] if raw[:1] in (b"\1", b"\2") else errors)

    def _status(self) -> int:
        """The exit code; -1 where the host names none in time."""
        ended = self.channel.status_event.wait(self._timeout)
        return int(self.channel.exit_status) if ended else -1

    @contextlib.contextmanager
    def _bounded(self, failing: str) -> Iterator[None]:
        """A call of paramiko, which ends in time and raises nothing else than a fault."""
        self._call_until = time.monotonic() + self._timeout + WATCH_SLACK
        try:
            yield
        except self._broken as error:
            late = time.monotonic() >= self._call_until - WATCH_SLACK
            if self._flooded:
                text = FLOODED
            elif isinstance(error, TimeoutError) or late:
                text = f"the host {failing} within {self._timeout:g}s"
            else:
                text = f"the host {failing}: {printable(str(error), SHOWN_OF_HOST)}"
            raise ScpError(text) from error
        finally:
            self._call_until = math.inf

    def _watch(self) -> None:
        while not self._done.wait(WATCH_LOOK):
            if self.channel is not None:
                unread = len(self.channel.in_buffer) + len(self.channel.in_stderr_buffer)
                self._flooded = unread > MOST_UNREAD
            if self._flooded or time.monotonic() > self._call_until:
                break
        else:
            return
        if self.channel is not None and not self._flooded:
            # In a thread of its own, as its farewell may meet the same full socket.
            threading.Thread(target=self._close_quietly, daemon=True).start()
            if self._done.wait(CLOSE_GRACE):
                return
        self._transport.close()

    def _close_quietly(self) -> None:
        with contextlib.suppress(*self._broken):
            self.channel.close()


# ==================================================================================================
# ssh.scp_receive
#
# The receiving end of scp, which believes nothing that the host says.
# ==================================================================================================


MOST_RECORDS = 1_000_000  # files and folders of one transfer
DEEPEST_FOLDER = 64
LATEST_TIME = 253_402_300_799  # the end of the year 9999
NAMELESS = (b"", b".", b"..")  # how scp calls /, . and .. when they are asked for
# Without them no shell makes another name of a name than it is, whatever it is quoted with.
PLAIN_ASKED = re.compile(rb"[\w@%+=:,./~\-\x80-\xff]+")
GLOB_ASKED = re.compile(rb"[\w@%+=:,./~\-\x80-\xff*?\[\]!^]+")
FILE_RECORD = re.compile(rb"([0-7]{3,7}) (\d{1,18}) (.*)", re.DOTALL)
TIME_RECORD = re.compile(rb"(\d{1,12}) \d{1,9} (\d{1,12}) \d{1,9}")
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
FOLDER_FDS = os.name != "nt" and os.open in os.supports_dir_fd

ScpProgress = Callable[[bytes, int, int], Any]


class AskedNames:
    """The names that may come: those of the paths that were asked for, each once.

    Raises:
        ValueError: what a path stands for is up to the host's shell.
    """

    def __init__(self, paths: list[bytes], *, quoted: bool) -> None:
        self._exact: list[set[bytes]] = []
        self._patterns: dict[str, bool] = {}  # whether something came for it
        for path in paths:
            trimmed = path.rstrip(b"/")
            base = trimmed.rpartition(b"/")[2]
            if trimmed.startswith(b"~") and base == trimmed:
                self._patterns["*"] = False  # a home, whose name the host alone knows
            elif quoted or PLAIN_ASKED.fullmatch(base) or base in NAMELESS:
                self._exact.append(_as_sent(base))
            elif GLOB_ASKED.fullmatch(base):
                self._patterns[os.fsdecode(base.replace(b"[^", b"[!"))] = False
            else:
                raise ValueError(
                    f"remote_path: which names {printable(repr(path), 200)} stands for can't be "
                    "told here: of a shell's signs only * ? [ ] are known, in the last part"
                )

    def take(self, raw: bytes) -> bool:
        """Note that this name has come; returns whether it was asked for letter by letter."""
        for spellings in self._exact:
            if raw in spellings:
                self._exact.remove(spellings)
                return True
        name = os.fsdecode(raw)
        for pattern in self._patterns:
            hidden = name.startswith(".") and not pattern.startswith(".")
            if not hidden and fnmatch.fnmatchcase(name, pattern):
                self._patterns[pattern] = True
                return False
        raise ScpError(f"the host sent {_quoted(raw)}, which was not asked for")

    def missing(self) -> str | None:
        """Something that was asked for and has not come."""
        for spellings in self._exact:
            return _quoted(min(spellings))
        return next(
            (_quoted(os.fsencode(p)) for p, came in self._patterns.items() if not came), None
        )


def _as_sent(base: bytes) -> set[bytes]:
    """How scp may spell a name: a line break has no place in its records."""
    if b"\n" not in base:
        return {base}
    return {base.replace(b"\n", b"\\^J"), base.replace(b"\\", b"\\\\").replace(b"\n", b"\\^J")}


def _quoted(raw: bytes) -> str:
    return printable(repr(os.fsdecode(raw)), 200)


def plain_name(raw: bytes, *, controls: bool = False) -> str:
    """A name from the host, when it is a single part of a path, and fit to be shown."""
    refused = raw in NAMELESS or b"/" in raw or b"\0" in raw or b"\n" in raw or len(raw) > 255
    try:
        name = os.fsdecode(raw)
    except UnicodeDecodeError:
        name, refused = "", True
    # A listing of such a name would talk to the terminal.
    if not controls:
        refused = refused or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
    if os.name == "nt":
        refused = refused or any(c in name for c in '\\:*?"<>|') or name.endswith((".", " "))
        refused = refused or WINDOWS_DEVICE.fullmatch(name) is not None
    if refused:
        raise ScpError(f"the host sent {_quoted(raw)}, which is no plain name")
    return name


class LocalFolder:
    """A folder here, held open where the system can, so that it stays the one that was checked."""

    def __init__(self, path: str, parent: LocalFolder | None = None) -> None:
        self.path = path
        self.fd: int | None = None
        if FOLDER_FDS:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            if parent is None:
                self.fd = os.open(path, flags)
            else:
                name = os.path.basename(path)
                self.fd = os.open(name, flags | os.O_NOFOLLOW, dir_fd=parent.fd)

    def at(self, name: str) -> str:
        """What to call an entry in a call that also gets ``dir_fd=self.fd``."""
        return os.path.join(self.path, name) if self.fd is None else name

    def look(self, name: str) -> os.stat_result | None:
        """What stands there, a symlink as itself."""
        try:
            return os.stat(self.at(name), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def create(self, name: str, mode: int) -> int:
        """A new file to write; the umask holds."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for more in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, more, 0)
        return os.open(self.at(name), flags, mode, dir_fd=self.fd)

    def enter(self, name: str, mode: int) -> tuple[LocalFolder, bool]:
        """A folder in it, and whether it was made now."""
        found = self.look(name)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise ScpError(f"a {_kind(found)} stands here already, not a folder")
        if found is None:
            os.mkdir(self.at(name), mode | 0o700, dir_fd=self.fd)
        return LocalFolder(os.path.join(self.path, name), self), found is None

    def replace(self, name: str, by: str) -> None:
        os.replace(self.at(by), self.at(name), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.at(name), dir_fd=self.fd)

    def remove_empty(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(self.at(name), dir_fd=self.fd)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _kind(found: os.stat_result) -> str:
    kinds = {stat.S_IFLNK: "symlink", stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
    return kinds.get(stat.S_IFMT(found.st_mode), "special file")


class _Level:
    """A folder that the host has entered and not left yet."""

    def __init__(self, folder: LocalFolder, name: str, *, shown: str, made: bool = False) -> None:
        self.folder = folder
        self.name = name  # "" for the target, which is the caller's: its permissions stay
        self.shown = shown
        self.made = made
        self.mode = 0o700
        self.times: tuple[int, int] | None = None


class ScpReceiver:
    """Takes files and folders from a host.

    Args:
        target: the folder that all goes into; or, with ``as_name``, that holds what comes.
        as_name: what the one file or folder that comes is called here.
        most: bytes of all files together.

    Attributes:
        name, done, total: of the file that is or was in work.
    """

    def __init__(
        self,
        wire: ScpWire,
        asked: AskedNames,
        target: LocalFolder,
        *,
        as_name: str = "",
        recursive: bool = False,
        keep: bool = False,
        most: int | None = None,
        progress: ScpProgress | None = None,
    ) -> None:
        self.name = ""
        self.done = 0
        self.total: int | None = None
        self._wire = wire
        self._asked = asked
        self._as_name = as_name
        self._recursive = recursive
        self._keep = keep
        self._left = most
        self._most = most
        self._progress = progress
        self._times: tuple[int, int] | None = None
        self._records = 0
        self._tops = 0
        self._levels = [_Level(target, "", shown="")]

    def run(self) -> None:
        """Receive until the host has no more; raises :class:`ScpError`."""
        try:
            self._wire.send(b"\0")
            while (line := self._wire.line()) is not None:
                self._record(line)
                self._wire.send(b"\0")
            if len(self._levels) > 1:
                raise ScpError(f"a folder has no end; {self._wire.how_it_ended()}")
            self._wire.finish()
            if missing := self._asked.missing():
                raise ScpError(f"{missing} has not come")
        finally:
            self._leave_all()

    def _record(self, line: bytes) -> None:
        kind, rest = line[:1], line[1:]
        if self._times is not None and kind not in (b"C", b"D", b"\1", b"\2"):
            raise ScpError("the host sent a time for nothing")
        if kind == b"C":
            self._file(rest)
        elif kind == b"D":
            self._enter(rest)
        elif kind == b"E" and not rest:
            self._leave()
        elif kind == b"T":
            self._time(rest)
        elif kind in (b"\1", b"\2"):
            raise ScpError(f"the host says: {words_of_host(rest)}")
        else:
            raise ScpError(f"this is no record of scp: {words_of_host(line)!r}")

    def _time(self, rest: bytes) -> None:
        match = TIME_RECORD.fullmatch(rest)
        if match is None or max(int(match[1]), int(match[2])) > LATEST_TIME:
            raise ScpError(f"the host sent a time that is none: {words_of_host(rest)!r}")
        self._times = (int(match[2]), int(match[1]))

    def _announced(self, rest: bytes) -> tuple[int, int, bytes]:
        """Permissions, size and name of a record, each within its limits."""
        match = FILE_RECORD.fullmatch(rest)
        if match is None:
            raise ScpError(f"this is no record of scp: {words_of_host(rest)!r}")
        self._records += 1
        if self._records > MOST_RECORDS:
            raise ScpError(f"the host sent more than {MOST_RECORDS} files and folders")
        # The bits above say as whom it runs, which is not for the host to say.
        return int(match[1], 8) & 0o777, int(match[2]), match[3]

    def _local_name(self, raw: bytes) -> str:
        """What to call it here; "" for the target itself."""
        level = self._levels[-1]
        if len(self._levels) > 1:
            name = plain_name(raw)
            self.name = f"{level.shown}/{printable(name, 200)}".lstrip("/")
            return name
        exact = self._asked.take(raw)
        name = "" if exact and raw in NAMELESS else plain_name(raw, controls=exact)
        self.name = printable(name, 200)
        self._tops += 1
        if self._as_name and self._tops > 1:
            raise ScpError("the host sent several files, and the target is no folder")
        return self._as_name or name

    def _file(self, rest: bytes) -> None:
        mode, size, raw = self._announced(rest)
        self.done, self.total = 0, size
        name = self._local_name(raw)
        folder = self._levels[-1].folder
        if not name:
            raise ScpError("the host sent a file, where a folder was asked for")
        if self._left is not None and size > self._left:
            raise ScpError(f"{size} bytes are announced, and max_bytes is {self._most} for all")
        with local_faults():
            found = folder.look(name)
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise ScpError(f"a {_kind(found)} stands here already, and nothing is written to it")
        temporary = f".scp-{secrets.token_hex(8)}.part"
        with local_faults():
            file = os.fdopen(folder.create(temporary, mode), "wb", buffering=0)
        try:
            self._wire.send(b"\0")
            self._fill(file, os.fsencode(os.path.join(folder.path, name)), size)
            self._wire.confirm()
            with local_faults():
                self._dress(file.fileno(), folder, temporary, mode, self._times)
                file.close()
                folder.replace(name, temporary)
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            folder.remove(temporary)
            raise
        self._times = None
        if self._left is not None:
            self._left -= size

    def _fill(self, file: Any, path: bytes, size: int) -> None:
        if self._progress is not None:
            self._progress(path, size or 1, 0 if size else 1)  # who divides must not fall
        while self.done < size:
            data = self._wire.some(min(SCP_CHUNK, size - self.done))
            if not data:
                raise ScpError(self._wire.how_it_ended())
            with local_faults():
                rest = memoryview(data)
                while rest:  # without a buffer, a write may take a part
                    rest = rest[file.write(rest) :]
            self.done += len(data)
            if self._progress is not None:
                self._progress(path, size, self.done)

    def _enter(self, rest: bytes) -> None:
        mode, _, raw = self._announced(rest)
        if not self._recursive:
            raise ScpError(f"the host sent a folder, {_quoted(raw)}, where a file was asked for")
        if len(self._levels) > DEEPEST_FOLDER:
            raise ScpError(f"the host sent folders more than {DEEPEST_FOLDER} deep")
        self.done, self.total = 0, None
        name = self._local_name(raw)
        parent = self._levels[-1].folder
        with local_faults():
            folder, made = parent.enter(name, mode) if name else (LocalFolder(parent.path), False)
        level = _Level(folder, name, shown=self.name, made=made)
        level.mode, level.times, self._times = mode, self._times, None
        self._levels.append(level)

    def _leave(self) -> None:
        if len(self._levels) == 1:
            raise ScpError("the host left a folder that it had not entered")
        level = self._levels.pop()
        try:
            if level.name:
                parent = self._levels[-1].folder
                fd = level.folder.fd
                with local_faults():
                    self._dress(fd, parent, level.name, level.mode | 0o700, level.times)
        finally:
            level.folder.close()

    def _dress(self, fd: int | None, inside: LocalFolder, name: str, mode: int, times: Any) -> None:
        """Give a file or folder its permissions and times, where the caller wants that."""
        if not self._keep:
            return
        if FOLDER_FDS and fd is not None:
            os.fchmod(fd, mode)
        if times is not None:
            os.utime(fd if FOLDER_FDS and fd is not None else inside.at(name), times)

    def _leave_all(self) -> None:
        """Close what is open, and take away the folders that were made for nothing."""
        while self._levels:
            level = self._levels.pop()
            level.folder.close()
            if level.made and self._levels:
                self._levels[-1].folder.remove_empty(level.name)


# ==================================================================================================
# ssh.scp_send
#
# The sending end of scp, which leaves out what does not belong to the folder that was named.
# ==================================================================================================


ASKED_MODE = re.compile(r"[0-7]{3,4}")


class ScpSender:
    """Gives files and folders to a host.

    Attributes:
        name, done, total: of the file that is or was in work.
    """

    def __init__(
        self,
        wire: ScpWire,
        *,
        recursive: bool = False,
        keep: bool = False,
        progress: Callable[[bytes, int, int], Any] | None = None,
    ) -> None:
        self.name = ""
        self.done = 0
        self.total: int | None = None
        self._wire = wire
        self._recursive = recursive
        self._keep = keep
        self._progress = progress

    def run(self, paths: list[str]) -> None:
        """Send them all; raises :class:`ScpError`."""
        self._wire.confirm()
        for path in paths:
            self.name = printable(path, 200)
            with local_faults():
                info = os.stat(path)
            if not stat.S_ISDIR(info.st_mode):
                self._file(path, os.path.basename(path))
                continue
            if not self._recursive:
                raise ScpError("this is a folder, and recursive is not set")
            # As scp.py has it: with a slash at the end, what is in the folder, without itself.
            name = os.path.basename(path)
            self._folder(path, "" if name in (".", "..") else name, os.path.realpath(path))
        self._wire.finish()

    def run_object(self, source: IO[Any], name: str, mode: str, size: int) -> None:
        """Send what a file-like object gives."""
        self.name = printable(name, 200)
        self._wire.confirm()
        self._content(source.read, os.fsencode(name), int(mode, 8), size)
        self._end_of_content()
        self._wire.finish()

    def _folder(self, path: str, name: str, root: str) -> None:
        if name:
            with local_faults():
                info = os.stat(path)
            self._tell_times(info)
            self._say(f"D{stat.S_IMODE(info.st_mode):04o} 0 ".encode(), os.fsencode(name))
        with local_faults(), os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            self.name = printable(entry.path, 200)
            with local_faults():
                if entry.is_dir(follow_symlinks=False):
                    kind = "folder"
                elif entry.is_symlink():
                    kind = _behind(entry.path, root)
                else:
                    kind = "file" if entry.is_file() else "it is a special file"
            if kind == "folder":
                self._folder(entry.path, entry.name, root)
            elif kind == "file":
                self._file(entry.path, entry.name)
            else:
                logger.warning("%s is not sent: %s", self.name, kind)
        if name:
            self._wire.send(b"E\n")
            self._wire.confirm()

    def _file(self, path: str, name: str) -> None:
        self.name, self.done, self.total = printable(path, 200), 0, None
        with local_faults():
            # A pipe in the place of a file must not hold us up.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            file = os.fdopen(os.open(path, flags), "rb", buffering=0)
        with file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise ScpError("this is neither a file nor a folder")
            self._tell_times(info)
            mode = stat.S_IMODE(info.st_mode)
            self._content(file.read, os.fsencode(name), mode, info.st_size)
            with local_faults():
                if file.read(1):
                    raise ScpError(f"it grew beyond its {info.st_size} bytes while it was sent")
        self._end_of_content()

    def _content(self, read: Callable[[int], Any], name: bytes, mode: int, size: int) -> None:
        """Send a file's record and exactly ``size`` bytes."""
        self.done, self.total = 0, size
        self._say(f"C{mode:04o} {size} ".encode(), name)
        if self._progress is not None:
            self._progress(name, size or 1, 0 if size else 1)  # who divides must not fall
        while self.done < size:
            with local_faults():
                data = read(min(SCP_CHUNK, size - self.done))
            data = data.encode() if isinstance(data, str) else data
            if not data:
                raise ScpError(f"it ended before its {size} bytes")
            if len(data) > size - self.done:
                raise ScpError(f"it gave more than its {size} bytes")
            self._wire.send(memoryview(data))
            self.done += len(data)
            if self._progress is not None:
                self._progress(name, size, self.done)

    def _end_of_content(self) -> None:
        self._wire.send(b"\0")
        self._wire.confirm()

    def _tell_times(self, info: os.stat_result) -> None:
        if self._keep:
            times = max(0, int(info.st_mtime)), max(0, int(info.st_atime))
            self._wire.send(b"T%d 0 %d 0\n" % times)
            self._wire.confirm()

    def _say(self, record: bytes, name: bytes) -> None:
        # A line break has no place in a record; OpenSSH writes it so.
        self._wire.send(record + name.replace(b"\n", b"\\^J") + b"\n")
        self._wire.confirm()


def _behind(path: str, root: str) -> str:
    """``"file"`` for a symlink to one within ``root``, or why it is left out."""
    target = os.path.realpath(path)
    if not os.path.lexists(target):
        return "it is a symlink to nothing"
    if os.path.commonpath([target, root]) != root:
        return "it is a symlink that leads out of the folder"
    return "file" if os.path.isfile(target) else "it is a symlink to a folder"


# ==================================================================================================
# ssh.scp
#
# A ``scp.SCPClient`` for machines that nobody vouches for.
# ==================================================================================================


SCP_TIMEOUT = 30.0  # seconds of silence


def import_scp() -> Any:
    """The scp package, or an ImportError that says what to install."""
    import_paramiko()
    try:
        scp_module = importlib.import_module("scp")
    except ImportError as error:
        raise ImportError(
            "scp() needs scp: pip install 'clore-client[ssh]' (or: pip install paramiko scp)"
        ) from error
    return scp_module


def hardened_scp(
    ssh: paramiko.SSHClient,
    *,
    socket_timeout: float = SCP_TIMEOUT,
    max_bytes: int | None = None,
    progress: ScpProgress | None = None,
    owns_ssh: bool = False,
) -> Any:
    """A ``scp.SCPClient`` on a connection, with its own methods, whose host may be hostile.

    It differs in this: what the host sends is checked before anything is made or changed here;
    a file is written under a temporary name and renamed when it is whole; every wait has an end;
    what goes wrong is a :class:`TransferError`. Without ``preserve_times``, the umask holds for
    what is received, and folders that exist keep their permissions. With ``client.sanitize``
    replaced, a path may hold ``*``, ``?`` and ``[...]``.

    Args:
        socket_timeout: seconds in which the host must do something. A connection that does not
            even take bytes is closed.
        max_bytes: of all files of one ``get()`` together; None for no limit.
        progress: called with (name, size, done), as ``scp.SCPClient`` does.
        owns_ssh: whether ``close()`` also closes ``ssh``.
    """
    made = _client_class()
    check_number("socket_timeout", socket_timeout, above=True, maximum=1e6, unit="seconds")
    if max_bytes is not None:
        check_number("max_bytes", max_bytes, unit="bytes")
    transport = ssh.get_transport()
    if transport is None or not transport.is_active():
        raise SSHError("scp() needs a connection, and this one is closed")
    try:
        client = made(transport, socket_timeout=socket_timeout, progress=progress)
    except OSError as error:
        raise SSHError(f"the connection broke: {printable(str(error))}") from error
    client.harden(max_bytes=max_bytes, report=progress, owned=ssh if owns_ssh else None)
    return client


@functools.cache
def _client_class() -> Any:
    return type("HardenedSCPClient", (HardenedTransfers, import_scp().SCPClient), {})


class HardenedTransfers:
    """The public methods of ``scp.SCPClient``, on a protocol of our own."""

    transport: Any
    channel: Any
    scp_command: bytes
    socket_timeout: float
    sanitize: Callable[[bytes], bytes]
    _quote: Callable[[bytes], bytes]
    _max_bytes: int | None
    _report: ScpProgress | None
    _owned: Any

    def harden(self, *, max_bytes: int | None, report: ScpProgress | None, owned: Any) -> None:
        """What ``scp.SCPClient`` has no place for."""
        self._quote = self.sanitize
        self._max_bytes = max_bytes
        self._report = report
        self._owned = owned

    def __enter__(self) -> HardenedTransfers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel, and the connection where that is ours."""
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.close()
        if self._owned is not None:
            self._owned.close()

    def get(
        self,
        remote_path: Any,
        local_path: Any = "",
        recursive: bool = False,
        preserve_times: bool = False,
    ) -> None:
        """Receive files, and with ``recursive`` folders, as ``scp.SCPClient.get`` does.

        Raises:
            TransferError: the host sent something else, or not all; or this machine refused.
        """
        paths = [_remote(path) for path in _several(remote_path)]
        asked = AskedNames(paths, quoted=self.sanitize is self._quote)
        target = os.path.realpath(os.fsdecode(local_path) or os.curdir)
        into = os.path.isdir(target)
        if len(paths) > 1 and not into:
            raise ValueError(
                f"local_path: {printable(repr(target), 200)} is no folder for several files"
            )
        shown = printable(os.fsdecode(paths[0]), 200)
        with contextlib.ExitStack() as stack:
            doing = stack.enter_context(_as_transfer_error("received", shown))
            with local_faults():
                folder = LocalFolder(target if into else os.path.dirname(target))
            stack.callback(folder.close)
            flags = (b" -r" if recursive else b"") + (b" -p" if preserve_times else b"")
            words = b" ".join(self.sanitize(path) for path in paths)
            wire = stack.enter_context(self._wire(flags + b" -f " + words))
            receiver = ScpReceiver(
                wire,
                asked,
                folder,
                as_name="" if into else os.path.basename(target),
                recursive=recursive,
                keep=preserve_times,
                most=self._max_bytes,
                progress=self._report,
            )
            doing.append(receiver)
            receiver.run()

    def put(
        self,
        files: Any,
        remote_path: Any = b".",
        recursive: bool = False,
        preserve_times: bool = False,
    ) -> None:
        """Send files, and with ``recursive`` folders, as ``scp.SCPClient.put`` does.

        Symlinks within a folder are sent as the file that they lead to; those that lead to a
        folder or out of it are left out with a warning.

        Raises:
            TransferError: the host refused, or a file can't be read or changed meanwhile.
        """
        paths = [os.fsdecode(path) for path in _several(files)]
        flags = (b" -r" if recursive else b"") + (b" -p" if preserve_times else b"")
        flags += b" -d" if len(paths) > 1 else b""
        with contextlib.ExitStack() as stack:
            doing = stack.enter_context(_as_transfer_error("sent", printable(paths[0], 200)))
            for path in paths:
                with local_faults():
                    os.stat(path)
            command = flags + b" -t " + self.sanitize(_remote(remote_path))
            wire = stack.enter_context(self._wire(command))
            sender = ScpSender(
                wire, recursive=recursive, keep=preserve_times, progress=self._report
            )
            doing.append(sender)
            sender.run(paths)

    def putfo(
        self, fl: IO[Any], remote_path: Any, mode: Any = "0644", size: int | None = None
    ) -> None:
        """Send what a file-like object holds, as ``scp.SCPClient.putfo`` does."""
        mode = os.fsdecode(mode)
        if not ASKED_MODE.fullmatch(mode):
            raise ValueError(f"mode must be octal digits, as '0644', not {printable(mode, 80)!r}")
        remote = _remote(remote_path)
        if size is None:
            here = fl.tell()
            fl.seek(0, os.SEEK_END)
            size = fl.tell() - here
            fl.seek(here)
        check_number("size", size, unit="bytes")
        name = os.fsdecode(remote.rpartition(b"/")[2])
        if not name:
            raise ValueError(f"remote_path names no file: {printable(repr(remote_path), 200)}")
        with contextlib.ExitStack() as stack:
            doing = stack.enter_context(_as_transfer_error("sent", printable(name, 200)))
            wire = stack.enter_context(self._wire(b" -t " + self.sanitize(remote)))
            sender = ScpSender(wire, progress=self._report)
            doing.append(sender)
            sender.run_object(fl, name, mode, size)

    @contextlib.contextmanager
    def _wire(self, words: bytes) -> Iterator[ScpWire]:
        wire = ScpWire(self.transport, self.scp_command + words, self.socket_timeout)
        self.channel = wire.channel  # where scp.SCPClient has it, for close()
        try:
            yield wire
        finally:
            self.channel = None
            wire.close()


@contextlib.contextmanager
def _as_transfer_error(verb: str, named: str) -> Iterator[list[Any]]:
    """Make a TransferError of a fault; the list holds who can tell which file was in work."""
    doing: list[Any] = []
    try:
        yield doing
    except ScpError as fault:
        name, done, total = named, 0, None
        for one in doing:
            name, done, total = one.name or named, one.done, one.total
        so_far = "" if total is None else f" ({done} of {total} bytes)"
        raise TransferError(
            f"{name} was not {verb}{so_far}: {fault}", name=name, done=done, total=total
        ) from fault


def _several(paths: Any) -> list[Any]:
    found = [paths] if isinstance(paths, (str, bytes, PurePath)) else list(paths)
    if not found:
        raise ValueError("no path was given")
    return found


def _remote(path: Any) -> bytes:
    """A path on the host, as bytes that its scp takes for no option."""
    if not isinstance(path, (str, bytes, PurePath)):
        raise TypeError(f"a path must be str, bytes or a Path, not {printable(repr(path), 80)}")
    raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else bytes(path)
    if b"\0" in raw:
        raise ValueError(f"remote_path must hold no NUL: {printable(repr(path), 200)}")
    raw = raw or b"."
    return b"./" + raw if raw.startswith(b"-") else raw


# ==================================================================================================
# ssh.tunnel
#
# A port of this machine's loopback that leads to a port of a server, for as long as a block.
# ==================================================================================================


LOOPBACK = "127.0.0.1"
FAR_SIDE = "localhost"  # as the server resolves it: what listens on IPv4 or IPv6 there
FORWARD_CHUNK = 32768
FORWARD_BACKLOG = 128
FORWARD_OPENING = 10.0  # seconds for a server to connect to its own port
FORWARD_PAUSE = 0.1  # seconds, where this machine can't take a connection
FORWARD_LEAVING = 5.0  # seconds for all threads to end
RESET = struct.pack("ii", 1, 0)  # close without a handshake: the other side gets an error


def check_forward_arguments(remote_port: Any, local_port: Any = 0) -> None:
    """Check what :class:`Forward` is given, before anything is sent."""
    for name, port, lowest in (("remote_port", remote_port, 1), ("local_port", local_port, 0)):
        allowed = f"{name} must be a port from {lowest} to 65535"
        if isinstance(port, bool) or not isinstance(port, int):
            raise TypeError(f"{allowed}, not {short_repr(port)}")
        if not lowest <= port <= 65535:
            raise ValueError(f"{allowed}, not {short_repr(port)}")


class Forward:
    """Forwards connections to a local port on to a port of a server; a ``with`` block.

    Entering it gives the local port, which listens on 127.0.0.1 only. What connects there gets to
    what listens on the server's own localhost; where nothing does, that one connection is reset.
    Leaving the block ends the connections that are still open.

    Parameters:
        ssh: a connection to the server.
        remote_port: of the server, 1 to 65535.
        local_port: of this machine; 0 takes a free one.
        owns: close ``ssh`` at the end of the block.
    """

    def __init__(
        self,
        ssh: paramiko.SSHClient,
        remote_port: int,
        local_port: int = 0,
        owns: bool = False,
    ) -> None:
        check_forward_arguments(remote_port, local_port)
        self._ssh = ssh
        self._remote_port = remote_port
        self._local_port = local_port
        self._owns = owns
        self._transport: Any = None
        self._listener: socket.socket | None = None
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._acceptor: threading.Thread | None = None
        self._lock = threading.Lock()
        self._links: set[_Link] = set()

    def __repr__(self) -> str:
        state = "closed" if self._listener is None else "open"
        return f"<Forward of {LOOPBACK}:{self._local_port} to port {self._remote_port}, {state}>"

    def __enter__(self) -> int:
        try:
            return self._open()
        except BaseException:
            self._close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _open(self) -> int:
        if self._acceptor is not None:
            raise SSHError("a forward is entered only once: make another one")
        self._transport = self._ssh.get_transport()
        if self._transport is None or not self._transport.is_active():
            raise SSHError("the connection to the machine is closed")
        try:
            self._listener = socket.create_server(
                (LOOPBACK, self._local_port), backlog=FORWARD_BACKLOG
            )
        except OSError as error:
            raise OSError(
                error.errno, f"local_port {self._local_port} can't be used: {error.strerror}"
            ) from error
        self._listener.setblocking(False)
        self._local_port = self._listener.getsockname()[1]
        self._ends = socket.socketpair()
        self._acceptor = threading.Thread(
            target=self._accept_all,
            args=(self._listener, self._ends[0]),
            name=f"clore-forward-{self._local_port}",
            daemon=True,
        )
        self._acceptor.start()
        logger.debug("port %d leads to port %d", self._local_port, self._remote_port)
        return self._local_port

    def _close(self) -> None:
        if self._acceptor is not None and self._ends is not None:
            self._ends[1].close()  # which wakes the acceptor
            self._acceptor.join()
        for sock in (self._listener, *(self._ends or ())):
            if sock is not None:
                sock.close()
        self._listener = self._ends = None
        with self._lock:
            links = list(self._links)
        self._end_links(links)
        if self._owns:
            self._ssh.close()
        deadline = time.monotonic() + FORWARD_LEAVING
        for link in links:
            link.join(max(0.0, deadline - time.monotonic()))

    def _end_links(self, links: list[_Link]) -> None:
        for link in links:
            link.stop()

        def hang_up() -> None:
            for link in links:
                link.hang_up()

        if links and not soon_done(hang_up):
            # Where nothing is taken any more, no channel can be closed, and no thread would end.
            self._transport.close()

    def _accept_all(self, listener: socket.socket, wake: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if wake in ready:
                    return
                try:
                    sock, peer = listener.accept()
                except BlockingIOError:
                    continue  # whoever it was has gone
                except OSError as error:
                    # Out of file descriptors, most likely: it stays in the queue.
                    logger.warning("port %d takes no connection: %s", self._local_port, error)
                    time.sleep(FORWARD_PAUSE)
                    continue
                self._link(sock, peer)

    def _link(self, sock: socket.socket, peer: tuple[str, int]) -> None:
        link = _Link(self._transport, self._remote_port, sock, peer, self._forget)
        with self._lock:
            self._links.add(link)
        try:
            link.start()
        except RuntimeError as error:  # no more threads
            logger.warning("port %d dropped a connection: %s", self._local_port, error)
            self._forget(link)
            sock.close()

    def _forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)


class _Link:
    """One connection, and the channel that carries it on; a thread for each direction."""

    def __init__(
        self,
        transport: Any,
        remote_port: int,
        sock: socket.socket,
        peer: tuple[str, int],
        forget: Callable[[_Link], None],
    ) -> None:
        self._transport = transport
        self._remote_port = remote_port
        self._sock = sock
        self._peer = peer
        self._forget = forget
        self._channel: Any = None
        self._stopped = False
        self._whole = False  # whether all that the server sent was passed on
        self._thread = threading.Thread(target=self._run, name="clore-forwarded", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def stop(self) -> None:
        """Wake what waits for the local side."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Wake what waits for the server."""
        channel = self._channel
        if channel is not None:
            channel.close()

    def _run(self) -> None:
        try:
            self._sock.setblocking(True)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._connect():
                outward = threading.Thread(
                    target=self._outward, name="clore-forwarded-out", daemon=True
                )
                outward.start()
                self._inward()
                outward.join()
        except (OSError, RuntimeError) as error:
            logger.debug("a forwarded connection ended: %s", error)
        finally:
            self._finish()
            self._forget(self)

    def _connect(self) -> bool:
        try:
            self._channel = self._transport.open_channel(
                "direct-tcpip", (FAR_SIDE, self._remote_port), self._peer, timeout=FORWARD_OPENING
            )
        except connection_errors() as error:
            if not self._stopped:
                logger.warning(
                    "port %d of the machine took no connection: %s",
                    self._remote_port,
                    reason(error),
                )
            return False
        return not self._stopped

    def _inward(self) -> None:
        """From the server to this machine."""
        channel, sock = self._channel, self._sock
        try:
            while data := channel.recv(FORWARD_CHUNK):
                sock.sendall(data)
            if channel.eof_received:
                self._whole = True
                sock.shutdown(socket.SHUT_WR)
                return
        except connection_errors() as error:
            logger.debug("a forwarded connection ended: %s", error)
        # Nobody is there to listen: the other direction ends as well.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)
        with contextlib.suppress(*connection_errors()):
            channel.close()

    def _outward(self) -> None:
        """From this machine to the server."""
        channel = self._channel
        try:
            while data := self._sock.recv(FORWARD_CHUNK):
                channel.sendall(data)
            channel.shutdown_write()
        except connection_errors() as error:
            logger.debug("a forwarded connection ended: %s", error)
            with contextlib.suppress(*connection_errors()):
                channel.close()

    def _finish(self) -> None:
        if not self._whole:
            # What was cut off must not look like something that is complete.
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._sock.close()
        if self._channel is not None:
            with contextlib.suppress(*connection_errors()):
                self._channel.close()


# ==================================================================================================
# client
#
# CloreClient: a thin method for each thing that a renter does.
# ==================================================================================================


C = TypeVar("C", bound="CloreClient")
PathArgument = str | os.PathLike[str]
Progress = Callable[[str, int, int], object]


class CloreClient(HTTPClient):
    """A client for the Clore.ai GPU marketplace.

    Every answer comes in the documented form, whatever the API sends: prices in USD per hour,
    reliability from 0 to 100, an ``order_id`` and a ``status`` for each order.

    Requests with the same key keep ``rate_limit`` seconds between them, in all threads and clients
    of the process, and ``create_order`` keeps ``create_order_interval`` besides. One exchange takes
    three times ``timeout`` at most, however slowly its answer drips. One call is sent
    ``max_retries`` times at most. Sent again after a lost or broken answer are reads,
    ``cancel_order``, ``cancel_orders`` and ``set_spot_price``; every other POST only when it never
    left this machine, or was refused for its pace. Between two sends lies an exponential backoff
    with full jitter, or what the API asks for in ``Retry-After``; over 60 seconds of that are a
    :class:`RateLimitError` and not a sleep. Cancels, and the reads that belong to them, leave
    whatever the API asks for, at pauses of 1, 2, 4 ... 30 seconds.

    Parameters:
        api_key: sent as the header ``auth``. None or ``""``: the environment variable
            ``CLORE_API_KEY``, then ``~/.clore/config.json``, else no key, with which only the
            marketplace can be read.
        timeout: seconds for one HTTP exchange, a number or a ``(connect, read)`` pair.
        rate_limit: smallest number of seconds between two requests with the same key in this
            process. The API allows one a second.
        max_retries: how many times one call is sent at most, the first included; at least 1.
        base_url: None: the environment variable ``CLORE_BASE_URL``, else the class attribute
            ``BASE_URL``. A key goes out over https only, or to a loopback address.
        create_order_interval: seconds between two ``create_order``; the API allows one in five.
        backoff: seconds that the first backoff has at most; it doubles with each send.
        max_backoff: seconds that any backoff has at most.
        user_agent: added to the User-Agent, as ``"my-tool/1.0"``.
        max_usd_per_hour: refuse every order and bid over this, before anything is sent.
        max_active_orders: refuse an order when so many are active.
        state_dir: where :meth:`rent` notes what it rents, for :meth:`leftovers`; None: nowhere.
        max_response_mb: megabytes, decoded, that an answer may have; a larger one is an error.
        order_lag: seconds for which the order lists may lag behind a change (up to 20, seen on the
            live API). Only after that long does an order count as gone because no list has it.

    Raises:
        ConfigurationError: a key, a base URL or a settings file that can't be used.

    Example:
        >>> with CloreClient() as client:
        ...     server = client.find_cheapest("RTX 4090", max_price_usd=0.5)
        ...     order = client.create_order(server["id"])
        ...     order = client.wait_for_order(order["order_id"])
    """

    ERROR_CODES = ERROR_CODES

    def __init__(
        self,
        api_key: str | None = None,
        timeout: Timeout = 30,
        rate_limit: float = 1.1,
        max_retries: int = 3,
        *,
        base_url: str | None = None,
        create_order_interval: float = 5.0,
        backoff: float = 0.5,
        max_backoff: float = 30.0,
        user_agent: str | None = None,
        max_usd_per_hour: float | None = None,
        max_active_orders: int | None = None,
        state_dir: str | os.PathLike[str] | None = DEFAULT_STATE_DIR,
        max_response_mb: float = 64.0,
        order_lag: float = 20.0,
        rate_limit_wait: float = 60.0,
    ) -> None:
        api_key = Secret.of(api_key)  # what fails below shows its variables to error reporters
        super().__init__(
            api_key,
            timeout,
            rate_limit,
            max_retries,
            base_url=base_url,
            create_order_interval=create_order_interval,
            backoff=backoff,
            max_backoff=max_backoff,
            user_agent=user_agent,
            max_response_mb=max_response_mb,
            rate_limit_wait=rate_limit_wait,
            state_dir=state_dir,
        )
        if max_usd_per_hour is not None:
            check_number("max_usd_per_hour", max_usd_per_hour, unit="USD per hour")
        if max_active_orders is not None:
            check_count("max_active_orders", max_active_orders)
        self.max_usd_per_hour = max_usd_per_hour
        self.max_active_orders = max_active_orders
        self.order_lag = check_interval("order_lag", order_lag)
        self._market = Market(self)
        self._orders = AccountOrders(self, self._market)
        self._ssh_access: SSHAccess | None = None  # made when it is used, with paramiko

    def __copy__(self: C) -> C:
        """Return a client of its own with the same settings and key, that knows the same orders."""
        twin = super().__copy__()
        twin._market = Market(twin)
        twin._orders = self._orders.shared_with(twin, twin._market)
        twin._ssh_access = None
        return twin

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        key = "a key" if self.api_key else "no key"
        return f"<{type(self).__name__} of {self.BASE_URL} with {key}>"

    @classmethod
    def from_env(cls: type[C], **options: Any) -> C:
        """A client whose key must come from the environment or the official tools' file.

        Parameters:
            **options: for the client, all but ``api_key``.

        Raises:
            ConfigurationError: there is no key, or one that can't be used; says where it looked.

        Example:
            >>> client = CloreClient.from_env(timeout=10)
        """
        if "api_key" in options:
            raise TypeError("from_env() takes no api_key: pass it to the class itself")
        need_key()
        return cls(**options)

    def describe(self) -> str:
        """Where the key and the base URL come from, of the key its last four characters at most.

        Example:
            >>> print(client.describe())
            a key that ends in '3f9a', from environment variable CLORE_API_KEY
            base URL https://api.clore.ai, from class attribute CloreClient.BASE_URL
        """
        key, url = self.api_key, self.BASE_URL
        found, source = self._key_source
        if not key:
            where = f"in {KEY_VARIABLE} or {CONFIG_FILE}" if key == found else "any more"
            key_line = f"no key {where}"
        else:
            source = source if key == found else "attribute"
            key_line = f"a key that ends in {ending_of(key)!r}, from {source}"
        url_found, url_source = self._url_source
        if url != url_found:
            own = "BASE_URL" in self.__dict__
            url_source = "attribute" if own else f"class attribute {type(self).__name__}.BASE_URL"
        return f"{key_line}\nbase URL {printable(str(url), 200)}, from {url_source}"

    # --- wallets ---

    def get_wallets(self) -> list[Wallet]:
        """The wallets of the account.

        Returns:
            A list of :class:`Wallet`: ``name``, ``balance`` (in its currency, may be None),
            ``deposit_address``.

        Raises:
            CloreAPIError, CloreConnectionError: see the README, "Errors".

        Example:
            >>> [wallet["name"] for wallet in client.get_wallets()]
            ['bitcoin', 'CLORE-Blockchain', 'USD-Blockchain']
        """
        return to_wallets(self._request("GET", "/v1/wallets"))

    def get_balance(self, currency: str = "CLORE-Blockchain") -> float:
        """The balance of one wallet, in its currency.

        Parameters:
            currency: part of the wallet's name, in any case, or ``BTC``, ``CLORE``, ``USD``.

        Returns:
            The balance of the first wallet that fits; 0.0 where there is none or it is null.

        Example:
            >>> client.get_balance("USD")
            12.5
        """
        text = check_text("currency", currency)
        wanted = {text.strip().lower(), (wire_currency(text) or text).strip().lower()}
        for wallet in self.get_wallets():
            if any(part in (wallet.name or "").lower() for part in wanted):
                return wallet.balance or 0.0
        return 0.0

    # --- the marketplace ---

    def get_marketplace(self, include_rented: bool = False) -> list[Server]:
        """The servers of the marketplace, as the API lists them. Needs no key.

        Parameters:
            include_rented: also those that somebody rents now.

        Returns:
            A list of :class:`Server`: ``id``, ``gpu_array``, ``price`` (under ``usd`` in USD per
            hour), ``reliability`` (0 to 100), ``rented``, ``specs``, ...

        Example:
            >>> len(client.get_marketplace())
            1873
        """
        check_bool("include_rented", include_rented)
        return to_servers(self._market.read(), include_rented=include_rented)

    def find_servers(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
    ) -> list[Server]:
        """Servers that can be rented now, the cheapest first, equal ones as the API lists them.

        A price that is missing, null or not above 0 is no price: such a server comes last, and
        never passes a price limit. Fees come on top of the prices: 5 % on demand, 1.25 % spot
        (seen on the live API).

        Parameters:
            gpu_type: part of a GPU's name, in any case: ``"4090"``, ``"rtx 3080"``.
            max_price_usd: USD per hour.
            min_reliability: 0 to 100.
            use_spot: filter and sort by the lowest spot bid that the host takes.

        Returns:
            A list of :class:`Server`, maybe empty.

        Raises:
            ValueError, TypeError: an argument can't be right; nothing was sent.

        Example:
            >>> client.find_servers("RTX 4090", max_price_usd=0.5, min_reliability=95)[0].gpu_name
            'RTX 4090'
        """
        if gpu_type is not None:
            check_string("gpu_type", gpu_type)
        if max_price_usd is not None:
            check_number("max_price_usd", max_price_usd, infinite=True, unit="USD per hour")
        check_number("min_reliability", min_reliability, maximum=100.0)
        if 0 < min_reliability <= 1:
            logger.warning(
                "min_reliability counts from 0 to 100: %g is next to none", min_reliability
            )
        check_bool("use_spot", use_spot)
        fitting = to_servers(
            self._market.read(),
            gpu_type=gpu_type,
            max_usd_per_hour=max_price_usd,
            min_reliability=min_reliability,
            spot=use_spot,
        )
        return cheapest_first(fitting, spot=use_spot)

    def find_cheapest(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
    ) -> Server | None:
        """The first of :meth:`find_servers`, or None where none fits. Same parameters.

        Example:
            >>> client.find_cheapest("RTX 4090").usd_per_hour
            0.125
        """
        servers = self.find_servers(gpu_type, max_price_usd, min_reliability, use_spot)
        return servers[0] if servers else None

    # --- orders ---

    def get_orders(self, include_completed: bool = False) -> list[Order]:
        """The orders of the account.

        Parameters:
            include_completed: also those that have ended.

        Returns:
            A list of :class:`Order`: ``order_id``, ``renting_server``, ``status``,
            ``connection``, ``price`` (per hour, in the order's currency), ``started``, ...

        Example:
            >>> [(order.id, order.status) for order in client.get_orders()]
            [(1958009, 'running')]
        """
        orders, _ = self._orders.read(check_bool("include_completed", include_completed))
        return orders if include_completed else [o for o in orders if not o.has_ended]

    def get_order(self, order_id: int) -> Order | None:
        """One order, active or ended.

        The list of ended orders, which grows with the account's history, is read only when the
        order is not among the active ones.

        Parameters:
            order_id: its number.

        Returns:
            An :class:`Order`, or None where the account has none of that number (or the API does
            not show it yet: that takes up to 20 seconds after ``create_order``).

        Example:
            >>> client.get_order(1958009).ssh_command
            'ssh root@n1.us.clorecloud.net -p 2060'
        """
        return self._orders.find(check_id("order_id", order_id))

    def create_order(
        self,
        server_id: int,
        image: str = "nvidia/cuda:12.1.0-base-ubuntu22.04",
        order_type: str = "on-demand",
        currency: str = "CLORE-Blockchain",
        ports: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        ssh_password: str | None = None,
        ssh_key: str | None = None,
        spot_price: float | None = None,
        jupyter_token: str | None = None,
        *,
        find_timeout: float = 30.0,
        allow_above_on_demand: bool = False,
        preview: bool = False,
    ) -> Order:
        """Rent a server. It costs money from here on, until :meth:`cancel_order`.

        Sent at most once, unless it surely had no effect. The live API answers without an order
        id, and sometimes an answer is lost: the order is then looked up in ``my_orders``.

        Parameters:
            server_id: the ``id`` of a server.
            image: a Docker image.
            order_type: ``"on-demand"`` or ``"spot"``.
            currency: what to pay with: the API's name, or ``BTC``, ``CLORE``, ``USD``.
            ports: container port -> ``"tcp"`` or ``"http"``; default ``{"22": "tcp"}``.
            env: environment variables; default ``{"NVIDIA_VISIBLE_DEVICES": "all"}``.
            ssh_password: at most 32 characters. With neither this nor ``ssh_key``, one is made up
                and stands in the result as ``ssh_password``.
            ssh_key: a public key, as the ``.pub`` file holds it; at most 3072 characters.
            spot_price: the bid for ``order_type="spot"``, in **USD per hour**.
            jupyter_token: at most 32 characters.
            find_timeout: seconds that the order may take to show up.
            allow_above_on_demand: send a bid of more than ten times the server's on-demand price.
            preview: send nothing, and return what would be sent: an :class:`Order` with only
                ``body`` and ``usd_per_hour`` (by today's listing, or of the bid; None if unknown).

        Returns:
            An :class:`Order` that also carries ``code`` (0).

        Raises:
            OrderOutcomeUnknownError: an order may or may not have been made, or it can't be told
                which one it is: look at :meth:`get_orders` before ordering again. What was sent
                to get in stands in its ``credentials``.
            ServerAlreadyRentedError, ServerOfflineError, InsufficientBalanceError,
            BidTooLowError, CurrencyNotAllowedError, DatabaseError: the API refused.
            SpendingLimitError: a ceiling of the client does not allow it; nothing was sent.
            RateUnknownError: a bid could not be converted; nothing was sent.
            ValueError, TypeError: an argument can't be right; nothing was sent.

        Example:
            >>> order = client.create_order(99173, currency="USD")
            >>> order["order_id"], order["ssh_password"]
            (1958009, 'q1nE0rNN7mBdmKyUHyKzXgLa')
        """
        ssh_password, jupyter_token = Secret.of(ssh_password), Secret.of(jupyter_token)
        env = hidden_values(env)
        purchase = Purchase(
            self._orders,
            server_id=server_id,
            image=image,
            order_type=order_type,
            currency=currency,
            ports=ports,
            env=env,
            ssh_password=ssh_password,
            ssh_key=ssh_key,
            jupyter_token=jupyter_token,
        )
        check_number("find_timeout", find_timeout, unit="seconds")
        check_bool("allow_above_on_demand", allow_above_on_demand)
        check_bool("preview", preview)
        purchase.set_bid(spot_price, allow_above_on_demand)
        return purchase.preview() if preview else purchase.place(find_timeout)

    def cancel_order(
        self,
        order_id: int,
        issue: str | None = None,
        *,
        confirm: bool = False,
        confirm_timeout: float = 60.0,
        settle_timeout: float | None = None,
    ) -> bool:
        """End an order: it costs nothing from here on. Safe to repeat.

        What the API answers for an order that has ended is not known: after a refusal or a doubt
        the order lists decide, and the cancel is sent again. That an order is in no list for a
        moment does not mean that it has ended.

        Parameters:
            order_id: its number.
            issue: what was wrong with the server; cut at 2048 characters.
            confirm: wait until it is listed as ended, or in no list for ``order_lag`` seconds.
            confirm_timeout: seconds for that.
            settle_timeout: seconds for which that is tried after a refusal or a doubt (30 by
                default); 0 looks once, for those who rather cancel again.

        Returns:
            True, also when it had ended before.

        Raises:
            OrderNotFoundError: the account has no such order.
            CancelUnconfirmedError: the order may still be running; ``order_ids`` has it.
            CloreError: so it may, too; nothing was sent, or the API refused key or pace.

        Example:
            >>> client.cancel_order(1958009)
            True
        """
        wanted = check_id("order_id", order_id)
        check_bool("confirm", confirm)
        check_number("confirm_timeout", confirm_timeout, infinite=True, unit="seconds")
        if settle_timeout is not None:
            check_number("settle_timeout", settle_timeout, unit="seconds")
        if issue is not None:
            check_string("issue", issue)
        cancellation = limited(
            lambda: cancel_order(self._orders, wanted, issue, settle_timeout), urgent=True
        )
        if confirm:
            confirm_ended([cancellation], confirm_timeout)
        return True

    def cancel_all(self, *, confirm: bool = True, confirm_timeout: float = 60.0) -> list[int]:
        """End every active order of the account, whoever made it.

        Parameters:
            confirm: wait until they have left the active ones, or are expired.
            confirm_timeout: seconds for that.

        Returns:
            The ids of the orders that were active.

        Raises:
            CancelUnconfirmedError: some may still be running; ``order_ids`` names them.

        Example:
            >>> client.cancel_all()
            [1958009, 1958010]
        """
        check_bool("confirm", confirm)
        check_number("confirm_timeout", confirm_timeout, infinite=True, unit="seconds")
        return limited(lambda: cancel_all(self._orders, confirm, confirm_timeout), urgent=True)

    def cancel_orders(self, order_ids: Iterable[int]) -> dict[str, Any]:
        """End several orders, with one API call for each 64 of them.

        Parameters:
            order_ids: their numbers; with none, nothing is sent.

        Returns:
            The envelope; the ids that failed stand under ``failed_to_cancel``.

        Example:
            >>> client.cancel_orders([1958009, 1958010])["failed_to_cancel"]
            []
        """
        return cancel_orders(self._orders, check_ids("order_ids", order_ids))

    def wait_for_order(
        self,
        order_id: int,
        timeout: float = 300,
        poll_interval: float = 5.0,
        target_status: str = "running",
        *,
        on_update: Callable[[Order | None], object] | None = None,
    ) -> Order:
        """Wait until an order has a status.

        A new order shows up 2 to 20 seconds after it was made and mostly runs after 30 to 120
        (seen on the live API). A poll that fails is borne. When the time is out the order is not
        cancelled: it may still be running, and cost money.

        Parameters:
            order_id: its number.
            timeout: seconds; ``float("inf")`` waits for ever.
            poll_interval: seconds between two looks.
            target_status: ``"running"``, ``"creating"``, ``"cancelled"`` or ``"expired"``; the
                last two meet each other.
            on_update: called after each look with the :class:`Order`, or None while it does not
                show; what it raises ends the wait.

        Returns:
            The :class:`Order`, with that status.

        Raises:
            OrderEndedError: it ended meanwhile.
            WaitTimeoutError: it did not get there in time; a ``TimeoutError``. ``reason`` tells
                whether it never showed up, or is still creating.

        Example:
            >>> client.wait_for_order(1958009, timeout=120).ssh_command
            'ssh root@n1.us.clorecloud.net -p 2060'
        """
        wanted = check_id("order_id", order_id)
        check_number("timeout", timeout, infinite=True, unit="seconds")
        check_interval("poll_interval", poll_interval)
        check_text("target_status", target_status)
        check_callback("on_update", on_update, 1)

        return wait_for_status(
            self._orders, wanted, timeout, poll_interval, target_status, on_update
        )

    # --- rentals ---

    def rent(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
        *,
        server_id: int | None = None,
        image: str = "nvidia/cuda:12.1.0-base-ubuntu22.04",
        currency: str = "CLORE-Blockchain",
        ports: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        ssh_password: str | None = None,
        ssh_key: str | None = None,
        spot_price: float | None = None,
        jupyter_token: str | None = None,
        attempts: int = 5,
        deploy_timeout: float = 300.0,
        poll_interval: float = 5.0,
        find_timeout: float = 30.0,
        cancel_timeout: float = 300.0,
        max_hours: float | None = None,
        max_cost_usd: float | None = None,
    ) -> Rental:
        """A server for the length of a ``with`` block: found, ordered, awaited, and given back.

        The cheapest server that fits is ordered. One that is rented away, offline, refuses the
        currency or is refused with code 1 gives way to the next, and so does an order that shows a
        price over the limit or does not run in time, once it is confirmed to have ended. However
        the block is left - also by Ctrl-C, by SIGTERM, SIGHUP or the interpreter's exit - the order
        is cancelled, and that it has ended is confirmed. A second Ctrl-C ends only the
        confirmation, three within two seconds end even the cancelling. What a killed process
        leaves, :meth:`leftovers` finds.

        A thread of the rental orders, cancels and confirms, as no signal interrupts it. After code
        1 it goes on looking for an order that was made all the same, and ends that one.

        ``max_hours`` and ``max_cost_usd`` are kept by a thread of this process: it cancels the
        order and closes the rental's SSH connections. Code of the block that is busy elsewhere is
        not interrupted, and nothing keeps them while the process is dead or the machine asleep.

        Parameters:
            gpu_type, min_reliability, use_spot: as for :meth:`find_servers`.
            max_price_usd: USD per hour when paid in ``currency``, without fees.
            server_id: only this server.
            image, currency, ports, env, ssh_password, ssh_key, jupyter_token, find_timeout: as for
                :meth:`create_order`.
            spot_price: the bid in USD per hour for ``use_spot``; default the lowest that the host
                takes.
            attempts: how many servers are tried at most.
            deploy_timeout: seconds that each may take to run.
            poll_interval: seconds between two looks.
            cancel_timeout: seconds for which the cancel is kept up, whatever ``max_retries`` is,
                and then again at most for its confirmation.
            max_hours: hours after which the rental is ended.
            max_cost_usd: USD of cost, fees included, at which it is ended.

        Returns:
            A :class:`Rental`, which orders when it is entered: ``order``, ``server``,
            ``cost_usd``, ``ssh()``, ``run()``, ``keep()``.

        Raises:
            RentalError: no server worked; ``tried`` tells why for each.
            CancelUnconfirmedError: an order may still be running.
            OrderOutcomeUnknownError: an order may have been made.
            BudgetExceededError: by calls of the rental, and when the block is left.

        Example:
            >>> with client.rent("RTX 4090", max_price_usd=0.40, max_hours=2) as rental:
            ...     print(rental.run("nvidia-smi -L").stdout)
        """
        ssh_password, jupyter_token = Secret.of(ssh_password), Secret.of(jupyter_token)
        env = hidden_values(env)
        settings = RentalSettings(
            gpu_type=gpu_type,
            max_price_usd=max_price_usd,
            min_reliability=min_reliability,
            use_spot=use_spot,
            server_id=server_id,
            image=image,
            currency=currency,
            ports=ports,
            env=env,
            ssh_password=ssh_password,
            ssh_key=ssh_key,
            spot_price=spot_price,
            jupyter_token=jupyter_token,
            attempts=attempts,
            deploy_timeout=deploy_timeout,
            poll_interval=poll_interval,
            find_timeout=find_timeout,
            cancel_timeout=cancel_timeout,
            max_hours=max_hours,
            max_cost_usd=max_cost_usd,
        )
        return Rental(self, self._orders, settings, self._state_folder())

    def leftovers(self, *, wait: float = 30.0) -> Leftovers:
        """What rentals of dead processes have left running on this account.

        Parameters:
            wait: seconds for which an order that was sent a moment ago may not be listed yet.

        Returns:
            :class:`Leftovers`: ``abandoned`` (of this machine), and apart from them ``elsewhere``
            (entries of other machines) and ``unnoted`` (active orders without an entry).

        Example:
            >>> client.leftovers().abandoned
            [<Leftover order 1958009 of server 99173, by process 4711 on 'desk'>]
        """
        check_number("wait", wait, unit="seconds")
        folder = self._state_folder()
        return limited(lambda: find_leftovers(self._orders, folder, wait), urgent=True)

    def cancel_leftovers(self, *, wait: float = 30.0, cancel_timeout: float = 300.0) -> list[int]:
        """End what :meth:`leftovers` lists as ``abandoned``, and nothing else.

        Parameters:
            wait: as for :meth:`leftovers`.
            cancel_timeout: seconds for which each cancel is kept up.

        Returns:
            The ids of the orders, which are confirmed to have ended.

        Raises:
            CancelUnconfirmedError: some may still be running; ``order_ids`` names them.

        Example:
            >>> client.cancel_leftovers()
            [1958009]
        """
        check_number("wait", wait, unit="seconds")
        check_number("cancel_timeout", cancel_timeout, infinite=True, unit="seconds")
        folder = self._state_folder()
        return limited(
            lambda: end_leftovers(self._orders, folder, wait, cancel_timeout), urgent=True
        )

    @staticmethod
    def handle_signals() -> SignalHandling:
        """Let SIGTERM and SIGHUP end the rentals of all threads; to be called in the main thread.

        They then raise :class:`SignalExit`, a ``SystemExit``, in the main thread. The first rental
        does the same by itself, where it is entered in the main thread. A signal that has a handler
        or is ignored stays as it is.

        Returns:
            A context manager whose end, or ``close()``, restores what was before.

        Example:
            >>> with client.handle_signals():
            ...     work_with_threads()
        """
        return SignalHandling()

    # --- the spot market ---

    def get_spot_market(self, server_id: int) -> dict[str, Any]:
        """The offers for a server on the spot market.

        Parameters:
            server_id: the ``id`` of a server.

        Returns:
            The envelope, with ``market``. Each of its ``offers`` also carries ``usd_per_hour``
            (None where the rate is missing); its ``bid`` is per day in its ``currency``.

        Example:
            >>> client.get_spot_market(99173)["market"]["offers"][0]["usd_per_hour"]
            0.09016
        """
        return with_hourly_offers(self._market.read_spot(check_id("server_id", server_id)))

    def set_spot_price(
        self, order_id: int, new_price: float, *, allow_above_on_demand: bool = False
    ) -> bool:
        """Change the bid of a spot order.

        The API lets a bid be lowered once in 600 seconds, and by one step.

        Parameters:
            order_id: its number.
            new_price: **USD per hour**.
            allow_above_on_demand: send a bid of more than ten times the server's on-demand price.

        Returns:
            True when the answer carries no ``error``.

        Raises:
            OrderNotFoundError: the account has no such order; nothing was sent.
            SpotPriceTooSoonError: lowered too soon; ``retry_after`` says when again.
            SpotPriceStepError: lowered by too much; ``max_step`` says by how much at most, in the
                order's currency per day.
            BidTooLowError: under what the host takes.
            RateUnknownError: the bid could not be converted; nothing was sent.

        Example:
            >>> client.set_spot_price(1958009, 0.08)
            True
        """
        wanted = check_id("order_id", order_id)
        check_number("new_price", new_price, above=True, unit="USD per hour")
        check_bool("allow_above_on_demand", allow_above_on_demand)
        return set_spot_price(self._orders, wanted, new_price, allow_above_on_demand)

    # --- SSH ---

    @property
    def _ssh(self) -> SSHAccess:
        if self._ssh_access is None:
            self._ssh_access = SSHAccess(self, self._orders, self._state_folder())
        return self._ssh_access

    # --- getting in ---

    @staticmethod
    def parse_ssh_connection(order: Any) -> dict[str, Any]:
        """Where to log in, from an order's ``connection.ssh``. Never raises.

        Parameters:
            order: an order in the documented form.

        Returns:
            ``{"host", "port", "user", "raw"}``: ``""``, 22 and ``"root"`` where it does not say,
            and the string as it came. A host or user that is not a plain name or address counts
            as none.

        Example:
            >>> CloreClient.parse_ssh_connection({"connection": {"ssh": "ssh root@h.net -p 2060"}})
            {'host': 'h.net', 'port': 2060, 'user': 'root', 'raw': 'ssh root@h.net -p 2060'}
        """
        return parse_ssh_command(order)

    def connect_ssh(
        self,
        order: Mapping[str, Any],
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 120.0,
        timeout: float = 30.0,
        host_key: str = "pin",
    ) -> paramiko.SSHClient:
        """Log in to the machine of a running order. Needs paramiko.

        A password wins over ``key_path``. With neither: the password that stands in the order, or
        that this client sent with it; else the SSH agent and the user's default keys. The agent
        is never forwarded, nor is X11.

        Parameters:
            order: a running order, as :meth:`wait_for_order` returns it.
            password: of the user in ``connection.ssh``.
            key_path: file of a private key: Ed25519, ECDSA or RSA.
            passphrase: of that key, where it is encrypted.
            wait: seconds that the machine's sshd may take to come up.
            timeout: seconds for each step of the login.
            host_key: ``"pin"`` keeps the key that the machine shows at the first login to this
                order, in the state folder too where that is in use, and insists on it from then
                on; a fingerprint (``"SHA256:..."``) insists on that one, and pins it;
                ``"accept"`` takes whatever is shown.

        Returns:
            A connected ``paramiko.SSHClient``, which the caller closes.

        Raises:
            SSHError: there is no address yet, nothing answered in time, or the login was refused.
            HostKeyChangedError: another key than before for this order; nothing was sent.
            ValueError: ``key_path`` or ``passphrase`` can't be used, among others.
            ImportError: paramiko is not installed.

        Example:
            >>> with client.connect_ssh(order) as ssh:
            ...     print(ssh.exec_command("nvidia-smi -L")[1].read().decode())
        """
        password, passphrase = Secret.of(password), Secret.of(passphrase)
        return self._ssh.login(
            order,
            password=password,
            key_path=key_path,
            passphrase=passphrase,
            wait=wait,
            timeout=timeout,
            host_key=host_key,
        ).open()

    def wait_for_ssh(
        self,
        order: Mapping[str, Any],
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 300.0,
        timeout: float = 30.0,
        host_key: str = "pin",
    ) -> None:
        """Return when a login works; parameters and errors are those of :meth:`connect_ssh`.

        Example:
            >>> client.wait_for_ssh(order, wait=600)
        """
        password, passphrase = Secret.of(password), Secret.of(passphrase)
        self.connect_ssh(
            order,
            password,
            key_path,
            passphrase=passphrase,
            wait=wait,
            timeout=timeout,
            host_key=host_key,
        ).close()

    def forget_host_key(self, order: Mapping[str, Any]) -> bool:
        """Forget the host key that is pinned for an order: the next login takes a new one.

        Parameters:
            order: whose container was started anew, which may make new keys.

        Returns:
            Whether there was one.

        Example:
            >>> client.forget_host_key(order)
            True
        """
        return self._ssh.forget_host_key(order)

    def ssh_command(self, order: Mapping[str, Any], *, key_path: PathArgument | None = None) -> str:
        """The line that logs in from a terminal, quoted for a shell.

        Where the host key is pinned in the state folder, OpenSSH is told to insist on it.

        Parameters:
            order: a running order.
            key_path: file of a private key, to be named in the line.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_command(order))
            ssh -p 2060 root@n1.us.clorecloud.net
        """
        return self._ssh.terminal_line(order, key_path)

    def ssh_config(
        self,
        order: Mapping[str, Any],
        *,
        name: str | None = None,
        key_path: PathArgument | None = None,
    ) -> str:
        """An entry for ``~/.ssh/config``, for rsync, VS Code and tmux.

        It insists on the pinned host key; without one yet, OpenSSH pins the first that it sees, in
        the same place.

        Parameters:
            order: a running order.
            name: of the entry, as in ``ssh <name>``; ``clore-<order id>`` by default.
            key_path: file of a private key.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_config(order), file=open("gpu.conf", "w"))
        """
        return self._ssh.config_entry(order, name, key_path)

    # --- running work ---

    def run(
        self,
        order: Mapping[str, Any],
        command: str | Sequence[str],
        *,
        check: bool = True,
        timeout: float | None = None,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        on_output: Callable[[OutputLine], object] | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> CommandResult:
        """Run a command on the machine of an order, and wait for its end. Needs paramiko.

        Parameters:
            order: a running order.
            command: for the shell of the machine; a list of arguments is quoted.
            check: raise for another exit code than 0.
            timeout: seconds, after which the command is ended; None waits for ever. Ctrl-C ends
                it, too.
            input: what it reads from its standard input.
            env: environment variables.
            on_output: called with each line as it comes, without its line end; the line's
                ``stream`` is ``"stdout"`` or ``"stderr"``.
            ssh: a connection to use, as :meth:`connect_ssh` returns it; it stays open.
            **login: ``password``, ``key_path``, ``passphrase``, ``wait``, ``host_key``, as for
                :meth:`connect_ssh`.

        Returns:
            A :class:`CommandResult`: ``command``, ``exit_code``, ``stdout``, ``stderr`` (text;
            bytes that are no UTF-8 are replaced) and ``duration`` in seconds.

        Raises:
            CommandError: the exit code was not 0; ``result`` has it all.
            CommandTimeoutError: it did not end in time, and was ended.
            SSHError: the login failed, or the connection broke.

        Example:
            >>> print(client.run(order, "nvidia-smi -L").stdout)
            GPU 0: NVIDIA GeForce RTX 4090
        """
        options: dict[str, Any] = {
            "check": check, "timeout": timeout, "input": input, "env": env, "on_output": on_output,
        }  # fmt: skip
        check_run_arguments(command, **options)
        with self._ssh.connected(order, ssh, login) as connected:
            return run_command(connected.ssh, command, **options)

    def forward(
        self,
        order: Mapping[str, Any],
        remote_port: int,
        local_port: int = 0,
        *,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Forward:
        """Forward a port of this machine, on loopback only, to one of an order's machine.

        Parameters:
            order: a running order.
            remote_port: on the machine, where something listens.
            local_port: here; 0 takes a free one.
            ssh, **login: as for :meth:`run`.

        Returns:
            A context manager that yields the local port, forwarded until the block is left.

        Example:
            >>> with client.forward(order, 8888) as port:
            ...     print(requests.get(f"http://127.0.0.1:{port}").status_code)
        """
        check_forward_arguments(remote_port, local_port)
        connection = (
            ssh if ssh is not None else self._ssh.login(order, **login_options(login)).open()
        )
        return Forward(connection, remote_port, local_port, owns=ssh is None)

    # --- moving data ---

    def upload(
        self,
        order: Mapping[str, Any],
        local: PathArgument,
        remote: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        streams: int | None = None,
        progress: Progress | None = None,
        timeout: float = 30.0,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Transferred:
        """Copy a file or a whole directory to the machine of an order. Needs paramiko.

        As with ``cp -r``, what is copied to a directory that exists is put into it. It is sent
        under a temporary name, and renamed when it is complete. Sizes are compared always, and
        SHA-256 where ``verify`` says so, the transfer was resumed, or a file went in several
        pieces. Symlinks within a directory are left out, and told of; so is what is neither file
        nor directory.

        Parameters:
            order: a running order.
            local: a file or directory here.
            remote: a path there; a relative one and ``~`` count from the home directory.
            preserve: keep permissions and times; else the usual permissions for new files, with
                the right to execute kept.
            verify: compare SHA-256 of every file.
            resume: keep what was transferred before an error, and go on from there. A source whose
                size or time has changed starts over.
            streams: connections at once, 1 to 16; None chooses by the size.
            progress: called as ``progress(name, done, total)``, in bytes, in this thread.
            timeout: seconds for each step of the login, and without any progress.
            ssh, **login: as for :meth:`run`.

        Returns:
            A :class:`Transferred`: ``path``, ``files``, ``size`` in bytes, ``duration`` in
            seconds, and ``skipped``.

        Raises:
            TransferError: it did not arrive whole: a full disk, a lost connection; ``name``,
                ``done`` and ``total`` tell how far it came.
            SSHError: the login failed.
            FileNotFoundError: there is nothing at ``local``.

        Example:
            >>> client.upload(order, "train.py", "~/work/")
        """
        options = check_upload(local, remote, preserve, verify, resume, streams, progress, timeout)
        ahead = upload_connections(*options) - 1
        with self._ssh.connected(order, ssh, login, timeout, ahead) as connected:
            return upload_path(connected.ssh, connected.another, options)

    def download(
        self,
        order: Mapping[str, Any],
        remote: PathArgument,
        local: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        streams: int | None = None,
        max_bytes: int | None = None,
        progress: Progress | None = None,
        timeout: float = 30.0,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Transferred:
        """Copy a file or a whole directory from the machine of an order. Needs paramiko.

        The other way round as :meth:`upload`, and on the same terms. Nothing that the machine
        says makes this write outside of ``local``. Of a file that is still being written, as a log,
        make a copy there, and download that: what changes on the way is an error.

        Parameters:
            order: a running order.
            remote: a path there; a relative one and ``~`` count from the home directory.
            local: a path here.
            max_bytes: refuse what is larger.
            preserve, verify, resume, streams, progress, timeout, ssh, **login: as for
                :meth:`upload`.

        Returns:
            A :class:`Transferred`.

        Raises:
            TransferError: it did not arrive whole, is larger than ``max_bytes``, or the machine
                sent what can't be right.
            SSHError: the login failed.

        Example:
            >>> client.download(order, "~/work/model.safetensors", ".", resume=True).size
            4976698672
        """
        options = check_download(
            remote, local, preserve, verify, resume, streams, max_bytes, progress, timeout
        )
        ahead = (options.streams or 1) - 1
        with self._ssh.connected(order, ssh, login, timeout, ahead) as connected:
            return download_path(connected.ssh, connected.another, options)

    def scp(
        self,
        order: Mapping[str, Any],
        *,
        max_bytes: int | None = None,
        progress: Callable[..., object] | None = None,
        timeout: float = 30.0,
        **login: Any,
    ) -> Any:
        """A client of the package scp that a hostile host can't abuse, for those who know it.

        Parameters:
            order: a running order.
            max_bytes: refuse to receive more in one ``get()``.
            progress: as for ``scp.SCPClient``.
            timeout: seconds for each step of the login, and without any progress.
            **login: as for :meth:`run`.

        Returns:
            An ``scp.SCPClient`` with a connection of its own, which ``close()``, or the end of
            its block, closes.

        Raises:
            ImportError: paramiko or scp is not installed.

        Example:
            >>> with client.scp(order) as copy:
            ...     copy.put("train.py", "/root/train.py")
        """
        connection = self._ssh.login(order, timeout=timeout, **login_options(login)).open()
        try:
            return hardened_scp(
                connection,
                socket_timeout=timeout,
                max_bytes=max_bytes,
                progress=progress,
                owns_ssh=True,
            )
        except BaseException:
            connection.close()
            raise


# ==================================================================================================
# license
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
# OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
# ==================================================================================================
