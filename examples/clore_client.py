"""clore-client 0.1.0 in one file: a client for the Clore.ai GPU marketplace.

    from clore_client import CloreClient

It needs requests; connect_ssh and other SSH methods also need paramiko.

This file is generated from the package clore-client 0.1.0. Do not edit it. To update it,
in a checkout:
    pip install .
    python -I -m clore_client.single_file > clore_client.py
To check if it is current, run
    python -I -m clore_client.single_file --check clore_client.py
Without -I, Python would import the clore_client.py of the current folder, not the package.

MIT License, Copyright (c) 2026 The clore-client authors; the full text is at the end.

Contents:
    log                         Log for the package. The application adds the handlers.
    errors                      Define every error of the package, and map API responses to errors.
    pricing                     Convert prices between units and currencies.
    validation                  Check arguments. Each error names the argument, its value and the
                                allowed values.
    progress                    Report the progress of long calls, and show it in a terminal or a
                                notebook.
    config                      Find the API key, the base URL and the state folder, and keep files
                                in that folder.
    process                     Keep the state that all clients and rentals of this process share.
    models.record               Define records and wallets, and read the fields of API responses.
    models.server               Define servers, and convert them from the live form to the
                                documented form.
    models.order                Define orders, and convert them from the live form to the documented
                                form.
    models.listing              Show servers, orders and wallets: as tables, in files, and prices as
                                a plot.
    models.result               Define the results of commands and transfers over SSH.
    api.call                    Prepare an API call: check its arguments, and find the rules of its
                                endpoint.
    api.connection              Open HTTP connections that record when a request is sent, and limit
                                its response time.
    api.rate_limit              Decide when the next request with a key may be sent.
    api.limiters                Share a rate limit: by a file on this machine, or through Redis
                                among many machines.
    api.redis_limit             Keep a rate limit in Redis, so that many machines share it.
    api.retry                   Classify responses and failures by the retry policy, and decide when
                                a call gives up.
    api.request                 Make API calls: respect the rate limit, send the request, retry,
                                return a response or raise.
    market.filters              Check the filters of a search; know the groups of countries and the
                                names of GPUs.
    market.market               Read the marketplace: prices, exchange rates, fees, and which hosts
                                worked.
    market.search               Search a listing: apply all filters in one pass, sort, and explain
                                what was left out.
    market.spot                 Read the spot market of a server: its offers, and a bid that would
                                win.
    market.summary              Summarize the marketplace by GPU model, and estimate what a rental
                                costs.
    orders.credentials          Save how to log in to orders, and find the order of a saved
                                purchase.
    orders.account              Read the orders of an account, and remember which belong to which
                                purchase.
    orders.bid                  Change the bid of a spot order.
    orders.cancel               Cancel orders until the API accepts it, and confirm that they have
                                ended.
    orders.funds                Compare the wallets of an account with what its orders cost.
    orders.create               Create an order: check the arguments, send them once, and find the
                                new order.
    orders.wait                 Wait until an order has a status.
    rental.selection            Select the servers that ``rent()`` tries, with their prices.
    rental.signals              Handle SIGTERM, SIGHUP and Ctrl-C, so that a rental ends after each
                                of them.
    rental.journal              Keep the journal: one small file for each order, which survives the
                                process.
    rental.orders               Keep the orders of one rental and their cost, in memory and in the
                                journal, and end them.
    rental.worker               Order, watch and end the orders of one rental, in a thread of its
                                own.
    rental.rental               Rent a server for the length of a block: find, order, wait, and
                                cancel at the end.
    rental.group                Rent several servers at once, and end them together.
    rental.recovery             Find and cancel the orders that rentals of dead processes left
                                running.
    ssh.transport               Prepare paramiko's connections and channels: limits of memory and
                                time, and fast ciphers.
    ssh.keys                    Pin the host key of each order; find the private key of a public
                                key.
    ssh.transfer.scripts        Define the shell scripts of a transfer, for POSIX tools and those of
                                GNU and busybox.
    ssh.openssh                 Read addresses and OpenSSH's configuration; write command lines and
                                entries for OpenSSH.
    ssh.connect                 Log in to hosts, and keep the connections of one call.
    ssh.command_text            Build the line that a host's shell runs, and read what the command
                                prints.
    ssh.job_scripts             Start, watch and stop a job on a host: shell scripts with POSIX
                                tools and /proc.
    ssh.transfer.entry          Describe the files, directories and symlinks of a transfer, on both
                                sides.
    ssh.transfer.remote_script  Run a script on a host with ``sh``, whatever the login shell is.
    ssh.transfer.transfer       Run one transfer: its arguments, worker threads, scripts, deadline,
                                progress and errors.
    ssh.jobs                    Start, follow and stop jobs: commands that run on a host without a
                                connection.
    ssh.access                  Log in to the hosts of an account, and keep their host keys.
    ssh.command                 Run a command over SSH until its deadline, and end it on the host if
                                it must stop.
    ssh.scp                     Guard the package scp against hostile hosts, and against calls that
                                never return.
    ssh.shell                   Connect this terminal to a shell on a host.
    ssh.transfer.local_part     Keep the temporary files of a download, and move them to the target
                                when it is complete.
    ssh.transfer.sftp           Transfer files over SFTP if a host has no usual shell: slower, with
                                the same checks.
    ssh.transfer.download       Download files and directories; the host is not trusted.
    ssh.transfer.upload         Upload files and directories under a temporary name, which is
                                renamed at the end.
    ssh.tunnel                  Reach a service on a host: forward a local port to it, or wait until
                                it responds over HTTP.
    client                      CloreClient, with one method for each task.
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
import copyreg
import email.utils
import fnmatch
import functools
import hashlib
import hmac
import http.client
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import posixpath
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import string
import struct
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import (
    Callable,
    Collection,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from ssl import SSLCertVerificationError
from types import FrameType, SimpleNamespace, TracebackType
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    SupportsIndex,
    TypedDict,
    TypeVar,
    overload,
)
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
    from typing_extensions import Unpack

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
    "CostEstimate",
    "CurrencyNotAllowedError",
    "DatabaseError",
    "HostKeyChangedError",
    "InsufficientBalanceError",
    "InvalidEndpointError",
    "InvalidInputError",
    "InvalidResponseError",
    "Job",
    "JobError",
    "JobTimeoutError",
    "Leftover",
    "Leftovers",
    "ModelSummary",
    "Order",
    "OrderEndedError",
    "OrderList",
    "OrderNotFoundError",
    "OrderOutcomeUnknownError",
    "OutcomeUnknownError",
    "OutputLine",
    "ProgressEvent",
    "RateLimitError",
    "RateUnknownError",
    "Rental",
    "RentalError",
    "RentalGroup",
    "SSHError",
    "SearchReport",
    "Server",
    "ServerAlreadyRentedError",
    "ServerList",
    "ServerOfflineError",
    "SignalExit",
    "SpendingLimitError",
    "SpotMarket",
    "SpotOffer",
    "SpotPriceStepError",
    "SpotPriceTooSoonError",
    "TransferError",
    "TransferResult",
    "UnknownOrderError",
    "WaitTimeoutError",
    "Wallet",
    "WalletList",
    "__version__",
]


# ==================================================================================================
# log
#
# Log for the package. The application adds the handlers.
# ==================================================================================================


logger = logging.getLogger("clore_client")


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, but only the first time in this process."""
    logger.warning("%s", text)


# ==================================================================================================
# errors
#
# Define every error of the package, and map API responses to errors.
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

# Fields whose values are never shown. Compared in lower case.
SECRET_FIELDS = frozenset(
    ("api_key", "auth", "auto_login", "dockerhub_auth", "env", "init_token", "jupyter_token",
     "password", "ssh_key", "ssh_password", "token")
)  # fmt: skip

CREATE_ORDER_CODE_1 = (
    "on create_order, code 1 has been seen for an empty wallet, for a server that was just rented, "
    "for a required_price that differs from the listing, for env values with '&', typographic "
    "quotes or emoji, and also when the order was made: check get_orders() before you order again"
)


class Secret(str):
    """A string with a masked repr, because error reporters print local variables."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    @classmethod
    def of(cls, value: Any) -> Any:
        """Return a string as a secret, and any other value unchanged."""
        return cls(value) if isinstance(value, str) else value


def secret_values(env: Any) -> Any:
    """Return a dict with its strings as secrets, and any other value unchanged."""
    return {k: Secret.of(v) for k, v in env.items()} if isinstance(env, dict) else env


def printable(text: str, limit: int = 2000) -> str:
    """Return ``text`` on one line, cut at ``limit`` characters, without control characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def masked(value: Any, depth: int = 20) -> Any:
    """Return a copy of ``value`` with ``'***'`` in place of all ``SECRET_FIELDS``.

    Values that are nested deeper than ``depth`` are left out.
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


def redact(text: str, secrets: tuple[str, ...]) -> str:
    """Return ``text`` without the ``secrets``, because a response may repeat the request."""
    for secret in secrets:
        # The secret can also be escaped, in JSON or in the repr of a string.
        for spelling in (secret, json.dumps(secret)[1:-1], repr(str(secret))[1:-1]):
            text = text.replace(spelling, "***")
    return text


def _redacted(value: Any, secrets: tuple[str, ...], depth: int = 20) -> Any:
    """Return ``value`` with the ``secrets`` replaced in all its strings."""
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, dict) and depth:
        return {k: _redacted(v, secrets, depth - 1) for k, v in value.items()}
    if isinstance(value, list) and depth:
        return [_redacted(v, secrets, depth - 1) for v in value]
    return value


class CloreError(Exception):
    """The base class of all errors of this package.

    Parameters:
        message: the text.
        **details: attributes of the subclass.

    Attributes:
        retryable: True if the same call may succeed later, and can be repeated safely.
        retry_after: seconds to wait before that, or None if not known.
        sends: how many times the request was sent before this error.
    """

    retryable: bool = False
    retry_after: float | None = None
    sends: int = 1
    # time.monotonic() of the last send; None if nothing was sent.
    sent_at: float | None = None

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.__dict__.update(details)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the arguments of the class, which differ by subclass.
        state = {**self.__dict__, "args": self.args}
        return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception, which its traceback shows."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined,unused-ignore]


class ConfigurationError(CloreError, ValueError):
    """A base URL, a key or a settings file that can't be used; nothing was sent."""


class CloreConnectionError(CloreError):
    """No response arrived: the connection failed, timed out or broke."""

    retryable = True


class OutcomeUnknownError(CloreError):
    """A request that changes something may or may not have taken effect.

    It was not sent again, because a second effect would do harm. Check the account before you
    repeat the call.

    Attributes:
        endpoint: the path that was called.
    """

    endpoint: str = ""


class OrderOutcomeUnknownError(OutcomeUnknownError):
    """An order may or may not exist, or several orders match.

    Attributes:
        server_id: the server of the order.
        order_ids: the orders that match; empty if none was seen.
        credentials: the login that was sent with the order: ``ssh_password``, ``ssh_key``,
            ``jupyter_token``. It is in no text and no pickle of this error.
    """

    endpoint = "/v1/create_order"
    server_id: int | None = None
    order_ids: tuple[int, ...] = ()
    credentials: dict[str, str]

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **{"credentials": {}, **details})

    def __reduce__(self) -> tuple[Any, ...]:
        make, arguments, state = super().__reduce__()
        return make, arguments, {**state, "credentials": {}}


class OrderNotFoundError(CloreError):
    """No order of the account has this id.

    Attributes:
        order_id: the id.
    """

    order_id: int | None = None


class CancelUnconfirmedError(CloreError):
    """An order may still be running, after a cancel that failed or is not confirmed.

    Cancel it again.

    Attributes:
        order_id: the order, or the first of several.
        order_ids: all orders that may still be running.
    """

    retryable = True
    order_ids: tuple[int, ...]

    @property
    def order_id(self) -> int:
        return self.order_ids[0]


class SpendingLimitError(CloreError):
    """A limit, ``max_usd_per_hour`` or ``max_active_orders``, refused an order or bid.

    Nothing was ordered.
    """


class OrderEndedError(CloreError):
    """An order ended before it had the awaited status, or before a call that needs its host.

    Attributes:
        order_id, status: the order, and its final status.
        order: the order as it was last seen.
    """

    order_id: int
    status: str
    order: Any = None


class WaitTimeoutError(CloreError, TimeoutError):
    """An order did not reach a status in time. It may still be running, and cost money.

    Attributes:
        order_id: the order.
        order: the order as it was last seen, or None if it never showed up.
        reason: ``"never showed up"`` or ``"still creating"`` (or another status).
    """

    order_id: int
    order: Any = None
    reason: str = "never showed up"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        if self.order is not None:
            self.reason = f"still {self.order.get('status')}"


class UnknownOrderError(OrderNotFoundError, WaitTimeoutError):
    """``wait_for_order`` did not wait, because the account has no such order."""

    order_id: int


class RateUnknownError(CloreError):
    """A bid could not be converted, because the exchange rate is not known; nothing was bid."""

    retryable = True


class SSHError(CloreError):
    """An SSH login, command or transfer failed.

    Attributes:
        reason: ``"unreachable"`` if no sshd responded in time, ``"refused"`` if it refused the
            login, else ``""``.
    """

    reason: str = ""


class RentalError(CloreError):
    """``rent()`` found no server that works, or a rental was used in the wrong state.

    Attributes:
        tried: (server id, reason) for each server that was tried.
    """

    tried: tuple[tuple[int, str], ...] = ()


class BudgetExceededError(CloreError):
    """A rental ended because it reached its ``max_hours`` or ``max_cost_usd``.

    Attributes:
        order_id: the order of the rental.
        hours, cost_usd: the time and the cost of the rental until then.
    """

    order_id: int | None
    hours: float
    cost_usd: float


class CloreAPIError(CloreError):
    """The API responded with an error.

    Attributes:
        code: the ``code`` of the response; -1 if there is none.
        error: its ``error`` field as text, or None.
        response: the decoded response, or ``{}``.
        http_status: the HTTP status of the response; None if nothing was sent.
        endpoint: the path that was called.
        hint: the usual cause of this error, or None.
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
        self.error = None if error is None else redact(error, secrets)
        self.response: dict[str, Any] = _redacted(response or {}, secrets)
        self.http_status = http_status
        self.endpoint = endpoint
        self.hint = hint
        if retryable is not None:
            self.retryable = retryable
        text = printable(self.error or ERROR_CODES.get(code) or f"Unknown error (code {code})")
        envelope = printable(redact(repr(masked(self.response)), secrets))
        super().__init__(f"Clore API Error {code}: {text} | response={envelope}")
        if hint:
            self.add_hint(hint)

    def add_hint(self, hint: str) -> None:
        """Add the usual cause, or what to do next, on a new line of the text."""
        self.hint = hint
        self.args = (f"{self.args[0]}\nhint: {hint}",)


class DatabaseError(CloreAPIError):
    """Code 1. On ``create_order`` it is ambiguous: the order may exist (seen on the live API)."""

    retryable = True


class InvalidInputError(CloreAPIError):
    """Code 2: the API found the request invalid."""


class AuthenticationError(CloreAPIError):
    """Code 3: the API key is missing or invalid."""


class InvalidEndpointError(CloreAPIError):
    """Code 4: the endpoint does not exist."""


class RateLimitError(CloreAPIError):
    """Code 5, or HTTP 429: too many requests with this key."""

    retryable = True


class ApplicationError(CloreAPIError):
    """Code 6: the API refused the request; ``error`` has the reason."""


class InsufficientBalanceError(ApplicationError):
    """The balance of the wallet is too low.

    Attributes:
        wallet: the name of the wallet, or None.
        balance: its balance, in its currency; None if it is not known.
        usd_per_hour: the price of the order in USD per hour, without fees, or None.
    """

    wallet: str | None = None
    balance: float | None = None
    usd_per_hour: float | None = None


class ServerAlreadyRentedError(ApplicationError):
    """The server is already rented."""


class ServerOfflineError(ApplicationError):
    """The server is offline."""


class BidTooLowError(ApplicationError):
    """The bid is lower than the host accepts."""


class CurrencyNotAllowedError(ApplicationError):
    """The host does not accept this currency."""


class SpotPriceStepError(ApplicationError):
    """The change of the bid is larger than one step allows.

    Attributes:
        max_step: the largest step, in the order's currency per day, or None.
    """

    max_step: float | None = None


class SpotPriceTooSoonError(ApplicationError):
    """The bid was lowered less than 600 seconds ago; ``retry_after`` has the seconds to wait."""

    retryable = True


class InvalidResponseError(CloreAPIError):
    """The response is not from the API, or broken: HTML, invalid JSON, no ``code``, no list."""


ERROR_CLASSES: dict[int, type[CloreAPIError]] = {
    1: DatabaseError,
    2: InvalidInputError,
    3: AuthenticationError,
    4: InvalidEndpointError,
    5: RateLimitError,
    6: ApplicationError,
}

# The ``error`` texts of code 6 (seen on the live API), with "-" replaced by "_".
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
    """Return the ``error`` field of a response as text, or None."""
    raw = envelope.get("error")
    return raw if isinstance(raw, str) or raw is None else repr(raw)


def api_error(envelope: dict[str, Any], **about: Any) -> CloreAPIError:
    """Make the error for a response with a ``code`` other than 0.

    Parameters:
        envelope: the decoded response.
        **about: the keyword arguments of :class:`CloreAPIError`.
    """
    code = envelope["code"]
    text = error_text(envelope)
    cls = ERROR_CLASSES.get(code, CloreAPIError)
    if cls is ApplicationError and text:
        cls = ERROR_TEXTS.get(text.strip().lower().replace("-", "_"), ApplicationError)
    error = cls(code, text, envelope, **about)
    if isinstance(error, SpotPriceStepError):
        error.max_step = _response_number(envelope.get("max_step"))
    elif isinstance(error, SpotPriceTooSoonError):
        error.retry_after = _response_number(envelope.get("time_to_lowering"))
    return error


def _response_number(value: Any) -> float | None:
    # Python's JSON parser accepts NaN; the comparison excludes it.
    return float(value) if type(value) in (int, float) and abs(value) < 1e12 else None


STDERR_TAIL = 500  # an error shows the last characters


class HostKeyChangedError(SSHError):
    """The host key has changed since the first login to this order.

    Its container was created again, or another host has its address. No password or key was sent.

    Attributes:
        order_id: the order, or None if the record has no id.
        expected, found: fingerprints such as ``"SHA256:..."``.
    """

    order_id: int | None = None
    expected: str = ""
    found: str = ""


class CommandError(SSHError):
    """A command ended with an exit code other than 0, and ``check`` was on.

    Attributes:
        result: the :class:`CommandResult`.
    """

    def __init__(self, result: CommandResult) -> None:
        how = f"exit code {result.exit_code}" if result.exit_code >= 0 else "a signal"
        super().__init__(f"{printable(result.command, 200)} ended with {how}{_tail(result.stderr)}")
        self.result = result


class CommandTimeoutError(SSHError, TimeoutError):
    """A command did not end in time, and was stopped.

    Attributes:
        command: the command.
        timeout: seconds.
        stdout, stderr: its output until then.
    """

    def __init__(self, command: str, timeout: float, stdout: str = "", stderr: str = "") -> None:
        text = f"{printable(command, 200)} did not end within {timeout:g}s, and was stopped"
        super().__init__(text + _tail(stderr))
        self.command = command
        self.timeout = timeout
        self.stdout = stdout
        self.stderr = stderr


class JobError(SSHError):
    """A job can't be started, found or removed.

    Attributes:
        name: the name of the job.
    """

    name: str = ""


class JobTimeoutError(JobError, TimeoutError):
    """A job did not end in time. It still runs."""


class TransferError(SSHError):
    """A file was not transferred completely. An existing file in its place is unchanged.

    Attributes:
        name: the file, as the caller named it or relative to the named folder.
        done, total: bytes; ``total`` is None if not known.
    """

    name: str = ""
    done: int = 0
    total: int | None = None


def _tail(text: str) -> str:
    lines = text.strip()[-STDERR_TAIL:].splitlines()
    return "".join(f"\n  {printable(line, STDERR_TAIL)}" for line in lines)


# ==================================================================================================
# pricing
#
# Convert prices between units and currencies.
# ==================================================================================================


HOURS_PER_DAY = 24.0
# The API adds these fees to the price (seen on the live API).
FEE_ON_DEMAND = 0.05
FEE_SPOT = 0.0125
CREATION_FEE = 0.10  # USD, once for each order
CREATION_FEE_AFTER = 600.0  # seconds; a shorter order does not pay it
RATE_MAX_AGE = 300.0  # seconds; an older exchange rate does not convert a bid

# Common names, and the names of the API.
CURRENCIES: dict[str, str] = {
    "bitcoin": "bitcoin",
    "btc": "bitcoin",
    "clore-blockchain": "CLORE-Blockchain",
    "clore": "CLORE-Blockchain",
    "usd-blockchain": "USD-Blockchain",
    "usd": "USD-Blockchain",
}


def finite(value: Any) -> float | None:
    """Return ``value`` as a float if it is a finite number and not a bool, else None."""
    if type(value) is float:  # the usual case, kept fast
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def positive(value: Any) -> float | None:
    """Return ``value`` as a float if it is a finite number above 0, else None."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def per_hour(per_day: Any) -> Any:
    """Convert a price per day to a price per hour, and return any other value unchanged."""
    number = finite(per_day)
    return per_day if number is None else number / HOURS_PER_DAY


def wire_currency(name: str) -> str | None:
    """Return the API's name of a currency such as ``"BTC"`` or ``"clore"``, or None."""
    return CURRENCIES.get(name.strip().lower())


def bid_per_day(usd_per_hour: float, usd_rate: float) -> float:
    """Convert a price from USD per hour to currency per day, the unit of the API.

    Parameters:
        usd_per_hour: the price or bid.
        usd_rate: USD for one unit of the currency.
    """
    return usd_per_hour * HOURS_PER_DAY / usd_rate


def bid_per_hour(per_day: float, usd_rate: float) -> float:
    """Convert a price from currency per day to USD per hour.

    Parameters:
        per_day: the price or bid.
        usd_rate: USD for one unit of the currency.
    """
    return per_day * usd_rate / HOURS_PER_DAY


def per_gpu(price: float | None, gpus: int | None) -> float | None:
    """Return the price for one of several GPUs; None if one of the numbers is not known."""
    return price / gpus if price is not None and gpus else None


def published_fee(spot: bool) -> float:
    """Return the fee that the renter pays on top of a price, as a fraction of it."""
    return FEE_SPOT if spot else FEE_ON_DEMAND


def with_fee(price: float, fee: float) -> float:
    """Add the renter's fee to a price."""
    return price * (1 + fee)


def creation_fee_after(seconds: float, fee: float = CREATION_FEE) -> float:
    """Return the creation fee of an order that has run for ``seconds``: 0 before ten minutes."""
    return fee if seconds >= CREATION_FEE_AFTER else 0.0


class ExchangeRates:
    """Keep the latest exchange rates of one API: USD for one unit of a currency."""

    def __init__(self) -> None:
        # (rates, time), replaced in one step, so that readers need no lock.
        self._latest: tuple[dict[str, float], float] = ({}, -math.inf)

    def update(self, rates: Any, *, display_only: bool = False) -> None:
        """Store exchange rates, and skip values that are not prices.

        Parameters:
            rates: a dict from the API, with USD for each currency.
            display_only: whether they must not convert bids.
        """
        if not isinstance(rates, dict):
            return
        good = {name: rate for name, value in rates.items() if (rate := positive(value))}
        known, stored_at = self._latest
        if good and not display_only:
            self._latest = (good, time.monotonic())
        elif good and not self.fresh():
            self._latest = ({**known, **good}, stored_at)

    def fresh(self) -> dict[str, float]:
        """Return the rates that may convert bids; an empty dict if they are too old."""
        rates, stored_at = self._latest
        return rates if time.monotonic() - stored_at <= RATE_MAX_AGE else {}

    def rate(self, currency: Any) -> float | None:
        """Return USD for one unit of ``currency``, for display; None if it is not known."""
        if not isinstance(currency, str):
            return None
        name = wire_currency(currency) or currency
        return 1.0 if name == "USD-Blockchain" else self._latest[0].get(name)

    def usd(self, amount: Any, currency: Any) -> float | None:
        """Convert ``amount`` of ``currency`` to USD for display, or return None."""
        number, rate = finite(amount), self.rate(currency)
        return None if number is None or rate is None else number * rate


# ==================================================================================================
# validation
#
# Check arguments. Each error names the argument, its value and the allowed values.
# ==================================================================================================


Timeout = float | tuple[float | None, float | None] | None

# With these characters in an env value, create_order returns code 1 (seen on the live API).
_REFUSED_CHARACTERS = "[&\u2018-\u201f\u2039\u203a\u00ab\u00bb\U0001f000-\U0001faff\u2600-\u27bf]"
_HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEADER_VALUE = r"(?!\s)[\t\x20-\x7e\x80-\xff]*"
LONGEST_INTERVAL = 86_400.0  # seconds
LONGEST_TIMEOUT = 1e9
MAX_PATH = 4095  # bytes of a local path
MAX_PATH_PART = 255  # bytes of one name in it
MAX_PASSWORD = 32
MAX_TOKEN = 32
MAX_SSH_KEY = 3072
MAX_ENV_NAME = 128
_ENV_NAME = rf"[A-Za-z_][A-Za-z0-9_]{{0,{MAX_ENV_NAME - 1}}}"
MAX_ENV_VALUE = 1536


def short_repr(value: Any) -> str:
    """Return a value on one short line, for an error."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or a class with a broken __repr__
        text = f"<{type(value).__name__} that can't be shown>"
    return printable(text, 80)


def check_type(name: str, value: Any, allowed: str, *kinds: type) -> Any:
    """Check the type of a value, and return it; a bool does not count as an int."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{name} must be {allowed}, not {short_repr(value)}")
    return value


def check_list(name: str, values: Any, allowed: str) -> None:
    """Check that a value is an iterable, and not a string or a dict."""
    if isinstance(values, (str, bytes, Mapping)):
        raise TypeError(f"{name} must be {allowed}, not {short_repr(values)}")
    check_type(name, values, allowed, Iterable)


def check_id(name: str, value: Any) -> int:
    """Check an id: a positive integer, or a string of digits."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value.strip()):
        value = int(value)
    if isinstance(value, Mapping):
        raise TypeError(f"{name} must be a positive integer, not the whole record: pass its .id")
    check_type(name, value, "a positive integer", int, str)
    if isinstance(value, str) or not 1 <= value < 10**18:
        raise ValueError(f"{name} must be a positive integer below 10**18, not {short_repr(value)}")
    return int(value)


def check_order_id(name: str, value: Any) -> int:
    """Return the id of an order, given as the id or as a record of the order."""
    if not isinstance(value, Mapping):
        return check_id(name, value)
    if value.get("order_id") is None:
        raise TypeError(
            f"{name} must be an order or its number, and this one has no order_id: "
            f"{short_repr(value)}"
        )
    return check_id(f"{name}['order_id']", value["order_id"])


def check_order_ids(name: str, values: Any) -> list[int]:
    """Check a list of orders or their ids; a single one or a string is an error."""
    check_list(name, values, "a list of order ids")
    return [check_order_id(f"{name}[{i}]", value) for i, value in enumerate(values)]


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
    """Check a number from ``minimum`` (or above it, with ``above``) to ``maximum``; never NaN."""
    number: float = check_type(name, value, f"a number{unit and ' of ' + unit}", int, float)
    low = number <= minimum if above else number < minimum
    huge = isinstance(number, int) and abs(number) > 10**300  # too large for a float
    if huge or number != number or low or number > maximum or (number == math.inf and not infinite):
        allowed = f"{'above' if above else 'at least'} {minimum:g}"
        allowed += "" if maximum == math.inf else f" and at most {maximum:g}"
        allowed += "" if infinite or maximum != math.inf else " and finite"
        raise ValueError(
            f"{name} must be {allowed}{unit and ' (' + unit + ')'}, not {short_repr(value)}"
        )
    return number


def check_optional_number(name: str, value: Any, **limits: Any) -> float | None:
    """Check a number with the limits of :func:`check_number`; None is allowed."""
    return None if value is None else check_number(name, value, **limits)


def check_count(name: str, value: Any, *, minimum: int = 0, maximum: float = math.inf) -> int:
    """Check a whole number, at least ``minimum``."""
    check_type(name, value, "a whole number", int)
    return int(check_number(name, value, minimum=minimum, maximum=maximum))


def check_interval(name: str, value: Any) -> float:
    """Check a number of seconds, at most a day, as ``time.sleep()`` has a limit."""
    return check_number(name, value, maximum=LONGEST_INTERVAL, unit="seconds")


def check_bool(name: str, value: Any) -> bool:
    """Check that a value is True or False; a string such as ``"false"`` would count as true."""
    checked: bool = check_type(name, value, "True or False", bool)
    return checked


def check_local_path(name: str, path: str | bytes | os.PathLike[Any]) -> None:
    """Check the characters and the length of a local path."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a character that is not allowed in a path") from None
    if b"\0" in encoded:
        raise ValueError(f"{name} must not contain a NUL character")
    longest_part = max(map(len, encoded.split(b"/")))
    if len(encoded) > MAX_PATH or longest_part > MAX_PATH_PART:
        raise ValueError(
            f"{name} is too long: it has {len(encoded)} bytes, {longest_part} of them in one name; "
            f"{MAX_PATH} and {MAX_PATH_PART} are allowed"
        )


def check_callback(name: str, value: Any, arguments: int = 1) -> Any:
    """Check a callback that will get this number of arguments; None is allowed."""
    if value is None:
        return value
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {short_repr(value)}")
    import inspect  # imported here, because it is slow and rarely needed

    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):  # a builtin function without a signature
        return value
    try:
        signature.bind(*[None] * arguments)
    except TypeError:
        one = "one argument" if arguments == 1 else f"{arguments} arguments"
        raise TypeError(f"{name} must be callable with {one}, not {short_repr(value)}") from None
    return value


def check_string(name: str, value: Any) -> str:
    """Check a string, which may be empty."""
    text: str = check_type(name, value, "a string", str)
    return text


def check_text(name: str, value: Any, *, secret: bool = False) -> str:
    """Check a string that must not be empty. The error does not show it if it is ``secret``."""
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
            raise ValueError(f"{name}: {short_repr(header)} is not a valid header name")
        if text is None or header.lower() == "auth":  # the key is checked where it is used
            continue
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"{name}[{header!r}] must be a string, not {type(text).__name__}")
        shape = text if isinstance(text, str) else text.decode("latin-1")
        if not re.fullmatch(_HEADER_VALUE, shape):
            raise ValueError(f"{name}[{header!r}] has a character that is not allowed in a header")
    return dict(value)


def check_timeout(name: str, value: Any) -> Timeout:
    """Check a timeout: seconds, a ``(connect, read)`` pair, or None to wait forever."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(
                f"{name} must be seconds or a (connect, read) pair, not {short_repr(value)}"
            )
        connect, read = (_check_seconds(f"{name}[{i}]", part) for i, part in enumerate(value))
        return connect, read
    return _check_seconds(name, value)


def shortened(timeout: Timeout, longest: float) -> Timeout:
    """Return a timeout with all parts cut to ``longest`` seconds."""
    if isinstance(timeout, tuple):
        connect, read = (longest if part is None else min(part, longest) for part in timeout)
        return connect, read
    return longest if timeout is None else min(timeout, longest)


def longest_part(timeout: Timeout) -> float | None:
    """Return the longer of the connect and the read timeout; None if one waits forever."""
    parts = timeout if isinstance(timeout, tuple) else (timeout, timeout)
    return None if None in parts else max(part for part in parts if part is not None)


def _check_seconds(name: str, value: Any) -> float | None:
    # A socket refuses a longer timeout.
    return check_optional_number(name, value, above=True, maximum=LONGEST_TIMEOUT, unit="seconds")


def check_currency(name: str, value: Any) -> str:
    """Return the API's name of a currency, given that name or ``BTC``, ``CLORE``, ``USD``."""
    found = wire_currency(check_text(name, value))
    if found is None:
        allowed = ", ".join(sorted({*CURRENCIES.values()})) + ", BTC, CLORE or USD"
        raise ValueError(f"{name} must be one of {allowed}, not {short_repr(value)}")
    return found


def check_order_type(name: str, value: Any) -> str:
    """Check an order type: ``"on-demand"`` or ``"spot"``."""
    if value not in ("on-demand", "spot"):
        raise ValueError(f"{name} must be 'on-demand' or 'spot', not {short_repr(value)}")
    return str(value)


def check_ports(name: str, value: Any) -> dict[str, str]:
    """Check a dict of container ports with ``"tcp"`` or ``"http"``; return it with string keys."""
    check_type(name, value, "a dict like {'22': 'tcp'}", Mapping)
    ports: dict[str, str] = {}
    for port, protocol in value.items():
        digits = port if isinstance(port, str) else ""
        if isinstance(port, int) and not isinstance(port, bool) and 1 <= port <= 65535:
            digits = str(port)
        if not re.fullmatch(r"[0-9]{1,5}", digits) or not 1 <= int(digits) <= 65535:
            raise ValueError(f"{name}: a port must be 1 to 65535, not {short_repr(port)}")
        if protocol not in ("tcp", "http"):
            raise ValueError(f"{name}[{port!r}] must be tcp or http, not {short_repr(protocol)}")
        ports[str(int(digits))] = protocol
    return ports


def check_env(name: str, value: Any) -> dict[str, str]:
    """Check environment variables. Errors never show the values, which may be secrets."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of strings, not {type(value).__name__}")
    for variable, text in value.items():
        if not isinstance(variable, str) or not re.fullmatch(_ENV_NAME, variable):
            raise ValueError(
                f"{name}: a variable name must have at most {MAX_ENV_NAME} characters, only "
                f"letters, digits and _, and not begin with a digit, unlike {short_repr(variable)}"
            )
        if not isinstance(text, str):
            raise TypeError(f"{name}[{variable!r}] must be a string, not {type(text).__name__}")
        if len(text) > MAX_ENV_VALUE:
            size = f"{len(text)} characters, and {MAX_ENV_VALUE} are allowed"
            raise ValueError(f"{name}[{variable!r}] has {size}")
        if re.search(_REFUSED_CHARACTERS, text):
            logger.warning(
                "%s[%r] contains '&', a typographic quote or an emoji, which the live API can "
                "refuse with code 1", name, variable,
            )  # fmt: skip
    return {variable: Secret(text) for variable, text in value.items()}


def check_secret(name: str, value: Any, longest: int) -> str:
    """Check a password or token of at most ``longest`` characters."""
    text = check_text(name, value, secret=True)
    if len(text) > longest:
        raise ValueError(f"{name} must have at most {longest} characters, not {len(text)}")
    return Secret(text)


def check_public_key(name: str, value: Any) -> str:
    """Check an SSH public key: one line of text, not a private key and not a path."""
    text = check_text(name, value, secret=True).strip()
    if "PRIVATE KEY" in text:
        raise ValueError(
            f"{name} is a private key, which must never leave your machine: "
            "pass the public key, which is the content of the .pub file"
        )
    if not re.fullmatch(r"(ssh|ecdsa|sk)-\S+ +\S.*", text):
        raise ValueError(
            f"{name} must be one line such as 'ssh-ed25519 AAAA... me@home', the content of a .pub "
            "file and not its path: read it with pathlib.Path(...).read_text()"
        )
    return check_secret(name, text, MAX_SSH_KEY)


# ==================================================================================================
# progress
#
# Report the progress of long calls, and show it in a terminal or a notebook.
# ==================================================================================================


LINE_INTERVAL = 5.0  # seconds between two lines about the same step
SIZE_UNITS = ("bytes", "kB", "MB", "GB", "TB")


class ProgressEvent:
    """A step of a long call.

    Attributes:
        name: the step: ``"rent"``, ``"order"``, ``"deploy"``, ``"running"``, ``"ssh"``,
            ``"upload"``, ``"download"``, ``"http"`` or ``"job"``.
        number: bytes so far for ``"upload"``, ``"download"`` and ``"job"``; else seconds so far.
        total: bytes in all, or None if unknown.
        text: a line for people, with control characters escaped.
    """

    def __init__(self, name: str, number: float, text: str, total: float | None = None) -> None:
        self.name = name
        self.number = number
        self.text = printable(text, 300)
        self.total = total

    def __repr__(self) -> str:
        return f"<ProgressEvent {self.name} {self.number:g}: {self.text}>"


Report = Callable[[ProgressEvent], object]


class ProgressOptions:
    """Check the arguments ``on_progress`` and ``progress``, and report to them.

    Threads that share this object report one at a time.
    """

    def __init__(self, on_progress: Any = None, progress: Any = False) -> None:
        check_callback("on_progress", on_progress, 1)
        self.on_progress: Report | None = on_progress
        self.shown = check_bool("progress", progress)
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[Report | None]:
        """Yield a function that reports an event, or None if nothing receives events."""
        display = open_display() if self.shown else None
        reports = [] if self.on_progress is None else [self.on_progress]
        if display is not None:
            reports.append(display.show)

        def report_to_all(event: ProgressEvent) -> None:
            with self._turn:
                for report in reports:
                    report(event)

        try:
            yield report_to_all if reports else None
        finally:
            if display is not None:
                display.close()


def open_display() -> PlainDisplay | BarDisplay | None:
    """Return a display for this terminal or notebook; None if there is neither."""
    notebook = "ipykernel" in sys.modules
    if not notebook and not (sys.stderr is not None and sys.stderr.isatty()):
        return None
    try:
        tqdm = importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return PlainDisplay(sys.stderr)
    return BarDisplay(tqdm)


class PlainDisplay:
    """Write a line for each step, and one every few seconds while a step lasts."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._name = ""
        self._next = 0.0  # by time.monotonic()

    def show(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        if event.name == self._name and now < self._next and event.number != event.total:
            return
        self._name, self._next = event.name, now + LINE_INTERVAL
        self._stream.write(f"{event.text}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the display; the lines stay."""


class BarDisplay:
    """Show each step with tqdm: a bar where the total is known, else a line that changes."""

    def __init__(self, tqdm: Any) -> None:
        self._tqdm = tqdm
        self._bar: Any = None
        self._name = ""

    def show(self, event: ProgressEvent) -> None:
        if self._bar is None or event.name != self._name:
            self.close()
            self._name = event.name
            form = {} if event.total is not None else {"bar_format": "{desc}"}
            self._bar = self._tqdm(total=event.total, unit="B", unit_scale=True, **form)
        if event.total is None:
            self._bar.set_description_str(event.text)
        else:
            self._bar.set_description_str(event.name, refresh=False)
            self._bar.total = event.total
            self._bar.update(event.number - self._bar.n)

    def close(self) -> None:
        """End the display; its last state stays."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def readable_size(size: float) -> str:
    """Return a number of bytes for people: ``"1.2 GB"``."""
    power = 0
    while size >= 1000 and power < len(SIZE_UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.0f} {SIZE_UNITS[power]}" if power == 0 else f"{size:.1f} {SIZE_UNITS[power]}"


def readable_seconds(seconds: float) -> str:
    """Return a duration for people: ``"34 s"``, ``"2 min 5 s"``, ``"3 h 2 min"``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# ==================================================================================================
# config
#
# Find the API key, the base URL and the state folder, and keep files in that folder.
# ==================================================================================================


__version__ = "0.1.0"

KEY_VARIABLE = "CLORE_API_KEY"
URL_VARIABLE = "CLORE_BASE_URL"
CONFIG_FILE = "~/.clore/config.json"  # the file of the official tools; never written

# Without the variable, it is ``~/.local/state/clore-client``.
DEFAULT_STATE_DIR = "$XDG_STATE_HOME/clore-client"
LOCK_AT = 1 << 30  # the locked byte on Windows; the content before it stays readable
# With O_NONBLOCK, a pipe in place of the file is an error, and does not block forever.
SAFE_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
SAFE_FLAGS |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
FIRST_LOCK_PAUSE, LONGEST_LOCK_PAUSE = 0.0002, 0.01  # seconds between two tries to lock a file
LONGEST_STATE_FILE = 1_000_000  # bytes; this package never writes a longer file


def clean_key(key: object, source: str) -> str:
    """Check an API key, and return it without a trailing newline.

    No error shows the key.
    """
    if not isinstance(key, str):
        raise ConfigurationError(
            f"the API key from {source} must be a string, not {type(key).__name__}"
        )
    key = key.rstrip("\r\n")
    problem = None
    if key.lower().startswith(("bearer ", "auth:", "auth ")):
        problem = f"starts with {key.split()[0]!r}"
    elif not re.fullmatch("[!-~]*", key):
        problem = "has a blank, or a character that is not allowed in a key"
    if problem:
        raise ConfigurationError(f"the API key from {source} {problem}: give only the key")
    return Secret(key)


def find_key(argument: str | None) -> tuple[str | None, str]:
    """Return the key and its source: the argument, the environment, or the official tools' file."""
    if argument:
        return clean_key(argument, "the argument api_key"), "argument"
    if from_environment := os.environ.get(KEY_VARIABLE):
        source = f"environment variable {KEY_VARIABLE}"
        return clean_key(from_environment, f"the {source}"), source
    from_file = _key_in_file()
    return (from_file, f"file {CONFIG_FILE}") if from_file else (None, "nowhere")


def require_key() -> None:
    """Raise an error if neither the environment nor the official tools' file has a key."""
    if find_key(None)[0] is None:
        raise ConfigurationError(
            f"there is no API key: the environment variable {KEY_VARIABLE} is not set or empty, "
            f"and the file {CONFIG_FILE} does not exist or has none; set {KEY_VARIABLE}"
        )


def key_ending(key: object) -> str:
    """Return the end of a key, for display: four characters, or a quarter of a short key."""
    text = str(key)
    return printable(text[len(text) - min(4, len(text) // 4) :])


def _key_in_file() -> str | None:
    try:
        path = Path(CONFIG_FILE).expanduser()
        text, mode = path.read_bytes(), path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: no home directory
        return None
    except OSError as error:
        raise ConfigurationError(f"{CONFIG_FILE} can't be read: {error.strerror}") from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        # The error of the parser contains the text, and so the key.
        raise ConfigurationError(f"{CONFIG_FILE} is not valid JSON: correct or remove it") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{CONFIG_FILE} must contain a JSON object with an 'api_key'")
    if not config.get("api_key"):
        return None
    key = clean_key(config["api_key"], CONFIG_FILE)
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        warn_once(f"{path} has your API key, and other users can read it: run chmod 600 {path}")
    return key or None


def check_base_url(url: object, name: str) -> str:
    """Check an http(s) URL, and return it without a trailing slash.

    Parameters:
        url: the URL.
        name: the argument or variable that has it, for the error.
    """
    if not isinstance(url, str):
        raise TypeError(f"{name} must be a string, not {type(url).__name__}")
    if problem := _url_problem(url):
        # The URL is not shown, as it may contain a key.
        raise ConfigurationError(f"{name} must be a URL like https://api.clore.ai: it {problem}")
    return url.rstrip("/")


@functools.lru_cache(maxsize=64)
def _url_problem(url: str) -> str | None:
    if not re.fullmatch("[!-~]*", url) or "\\" in url:
        return "has a blank or a character that is not allowed in a URL"
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
    """Return whether the host of a URL is this machine."""
    host = urlsplit(base_url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key_header(headers: Any, base_url: str, endpoint: str, needed: bool) -> str:
    """Return the key of a request, after a check that it is set and the URL is safe for it."""
    key: str = headers.get("auth") or ""
    if key:
        key = headers["auth"] = clean_key(key, "the headers")
        if not base_url.lower().startswith("https://") and not is_loopback(base_url):
            host = printable(urlsplit(base_url).hostname or "", 100)
            raise ConfigurationError(
                f"base_url is not https (its host is {host}), so others could read the API key, "
                "and nothing was sent: use an https URL"
            )
    elif needed:
        raise AuthenticationError(
            3,
            endpoint=endpoint,
            hint=f"there is no API key, so nothing was sent: pass api_key=..., set {KEY_VARIABLE}, "
            f"or put the key into {CONFIG_FILE}",
        )
    return key


@functools.lru_cache(maxsize=64)
def canonical_url(base_url: str) -> str:
    """Return one spelling for all URLs of an API: ``HTTP://127.0.0.1`` is ``http://localhost``."""
    parts = urlsplit(base_url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    host = "localhost" if is_loopback(base_url) else host
    port = parts.port or (443 if scheme == "https" else 80)
    return f"{scheme}://{host}:{port}{parts.path.rstrip('/')}"


def read_line(path: str) -> str:
    """Return the first line of a file, or an empty string."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readline(200).strip()
    except OSError:
        return ""


def state_folder(state_dir: Any) -> Path | None:
    """Check the argument ``state_dir``, and return its absolute path; None if it is turned off."""
    if state_dir is None:
        return None
    check_type("state_dir", state_dir, "a folder or None", str, os.PathLike)
    if isinstance(state_dir, str) and not state_dir.strip():
        raise ValueError("state_dir must not be empty: None turns the journal off")
    check_local_path("state_dir", state_dir)
    if state_dir == DEFAULT_STATE_DIR:
        base = os.environ.get("XDG_STATE_HOME") or ""
        if not os.path.isabs(base):  # the XDG specification ignores relative paths
            base = os.path.join("~", ".local", "state")
        folder = os.path.expanduser(os.path.join(base, "clore-client"))
    else:
        folder = os.path.expanduser(os.fspath(state_dir))
    if folder.startswith("~"):  # "~" would become the name of a folder
        warn_about_state(f"{folder} can't be used", "this user has no home directory")
        return None
    return Path(os.path.abspath(folder))


@functools.lru_cache(maxsize=16)
def account_digest(base_url: str, api_key: str | None) -> str:
    """Return a digest that identifies an account in the journal without its key."""
    account = f"clore-client\n{canonical_url(base_url)}\n{api_key or ''}"
    return hashlib.sha256(account.encode()).hexdigest()[:32]


def warn_about_state(what: str, error: object) -> None:
    """Warn once about a problem of the state folder, which must not stop a rental."""
    reason = getattr(error, "strerror", None) or error
    warn_once(f"{what}: {reason}; if this process is killed, leftovers() can't find its rentals")


# --- files that only this user may see ---


def lock_file(handle: int, patience: float = 0.0) -> bool:
    """Lock an open file until it is unlocked or closed, and return whether that worked.

    Parameters:
        handle: a file that is open for writing, as some systems require.
        patience: seconds to wait for another process that has locked it.

    Raises:
        OSError: the file system does not support locks.
    """
    deadline = time.monotonic() + patience
    pause = FIRST_LOCK_PAUSE
    while True:
        try:
            set_lock(handle, locked=True)
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_LOCK_PAUSE)


def set_lock(handle: int, locked: bool) -> None:
    """Lock an open file at once, or unlock it."""
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, LOCK_AT, os.SEEK_SET)
        mode = msvcrt.LK_NBLCK if locked else msvcrt.LK_UNLCK  # type: ignore[attr-defined,unused-ignore]
        msvcrt.locking(handle, mode, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if locked else fcntl.LOCK_UN)


def open_private(path: Path) -> int:
    """Open a file for reading and writing, and return its descriptor.

    The file and its folder are created if they are missing, for this user only.

    Raises:
        OSError: that is not possible, or it is a symlink.
    """
    flags = SAFE_FLAGS | os.O_RDWR | os.O_CREAT
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)


@contextlib.contextmanager
def locked_path(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock file beside ``path``, so that no other process changes it.

    Raises:
        OSError: another process holds it, or it can't be created.
    """
    handle = open_private(Path(f"{path}.lock"))
    try:
        if not lock_file(handle, patience):
            raise OSError(f"{path}.lock is held by another process")
        yield
    finally:
        os.close(handle)


def replace_file(path: Path, text: str) -> None:
    """Replace a file in one step by one with this text, which only this user may read."""
    new = path.with_name(f"{path.name}.{random.SystemRandom().getrandbits(48):012x}")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(new, flags, 0o600)
    try:
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def make_private_folder(folder: Path) -> None:
    """Create a folder that only this user may enter, or remove the access of other users to it.

    Raises:
        OSError: it can't be created, is not a folder, or belongs to another user.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = os.lstat(folder)
    if not stat.S_ISDIR(about.st_mode):
        raise OSError("it is not a folder")
    if os.name == "nt":
        return
    if about.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if about.st_mode & 0o077:
        folder.chmod(0o700)


def read_state_file(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file of this user.

    Raises:
        OSError, ValueError, RecursionError: the file can't be read, or is not valid.
    """
    handle = os.open(path, SAFE_FLAGS | os.O_RDONLY)
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LONGEST_STATE_FILE:
            raise ValueError("it is not a small regular file")
        if os.name != "nt" and about.st_uid != os.geteuid():
            raise ValueError("it belongs to another user")
        data = json.loads(os.read(handle, LONGEST_STATE_FILE + 1))
    finally:
        os.close(handle)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data


# ==================================================================================================
# process
#
# Keep the state that all clients and rentals of this process share.
# ==================================================================================================


Shared = TypeVar("Shared")


class ProcessState:
    """Hold the state that all clients and rentals of this process share.

    Each change is one atomic step, because a signal handler must not wait for a lock.

    Attributes:
        rentals: the workers of the open rentals.
        exiting: whether the interpreter is exiting.
        entries: the journal entries that this process wrote and has locked, by path.
        signal_users: the open users of the signal handler.
        handled_signals: the signals for which the handler is installed.
        stopping_signal: the signal that ends this process, or None.
    """

    def __init__(self) -> None:
        self._of_accounts: dict[tuple[object, ...], Any] = {}
        self.rentals: set[RentalWorker] = set()
        self.exiting = False
        self.entries: dict[str, JournalEntry] = {}
        self.signal_users: set[SignalHandling] = set()
        self.handled_signals: set[int] = set()
        self.stopping_signal: int | None = None

    def of_account(self, make: Callable[[], Shared], *key: object) -> Shared:
        """Return the object that the clients of an account share, made on first use.

        Parameters:
            make: the class of the object, or a function that makes it.
            *key: identifies the object; one part is the digest of the account.
        """
        if key not in self._of_accounts:
            # setdefault() is atomic: if two threads make one, both get the first.
            self._of_accounts.setdefault(key, make())
        shared: Shared = self._of_accounts[key]
        return shared

    def forget_parent(self) -> None:
        """Leave the rentals to the parent, after a fork."""
        self.rentals.clear()
        # An inherited open file would keep the parent's lock after the parent has died.
        for entry in self.entries.values():
            entry.unlock()
        self.entries.clear()
        self._of_accounts.clear()  # at the fork, another thread may have held one of their locks


this_process = ProcessState()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=this_process.forget_parent)


# ==================================================================================================
# models.record
#
# Define records and wallets, and read the fields of API responses.
# ==================================================================================================


R = TypeVar("R", bound="Record")

# One record with one of these fields means that the whole response is in the live form.
LIVE_ORDER_MARKERS = ("si", "ct", "mon_container", "pub_cluster")
LIVE_MARKET_MARKERS = ("currency_rates_in_usd", "server")


class RawRecords:
    """Keep records as JSON, and decode each one whenever it is read."""

    def __init__(self, raw: list[Any], decode: Callable[[Any], Any]) -> None:
        self._raw = raw
        self._decode = decode

    def __getitem__(self, index: int) -> Any:
        return self._decode(self._raw[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self._decode, self._raw)


def dicts(value: Any) -> list[dict[str, Any]]:
    """Return the dicts in a list, without anything that is not a record."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def part_of(record: Any, *path: str) -> Any:
    """Return the value at ``path`` in nested dicts, or None."""
    for key in path:
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def text_of(record: Any, *path: str) -> str | None:
    """Return the text at ``path`` in nested dicts; None if there is none, or it is empty."""
    text = part_of(record, *path)
    return text if isinstance(text, str) and text else None


def is_live(response: Mapping[str, Any]) -> bool:
    """Return whether a response with orders or a spot market is in the live form."""
    orders, market = dicts(response.get("orders")), response.get("market")
    if "exists" in response or any(m in order for order in orders for m in LIVE_ORDER_MARKERS):
        return True
    if not isinstance(market, dict):
        return False
    offers = dicts(market.get("offers"))
    return any(m in market for m in LIVE_MARKET_MARKERS) or any("bid" in offer for offer in offers)


def whole_id(value: Any) -> int | None:
    """Return an id, given as an integer or as a string of digits, or None."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if abs(value) < 10**18 else None


class Record(dict[str, Any]):
    """A dict in the documented form, with the original from the API in ``.wire``.

    A record that did not come from the API counts as documented, and is its own ``.wire``.
    """

    _wire: dict[str, Any] | None = None
    _rates = ExchangeRates()  # empty; that of the client replaces it
    # The properties in a card and in a row of to_dicts(): numbers, text and bools.
    FIELDS: ClassVar[tuple[str, ...]] = ()
    SHOWN: ClassVar[tuple[str, ...]] = ()  # the properties in the repr; if empty, the FIELDS

    @property
    def wire(self) -> dict[str, Any]:
        """A copy of the record as the API sent it."""
        return dict(self) if self._wire is None else copy.deepcopy(self._wire)

    def _like(self: R, items: Mapping[str, Any]) -> R:
        twin = type(self)(items)
        twin.__dict__.update(self.__dict__)
        return twin

    def copy(self: R) -> R:
        """Return a shallow copy of the same type, with the same ``.wire``."""
        return self._like(self)

    __copy__ = copy

    def __or__(self: R, other: Any) -> R:  # type: ignore[override]
        return self._like({**self, **other}) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self: R, other: Any) -> R:  # type: ignore[override]
        return self._like({**other, **self}) if isinstance(other, Mapping) else NotImplemented

    def _summary(self) -> dict[str, Any]:
        """Return what the repr shows: names of properties, and their values."""
        shown = {name: getattr(self, name) for name in self.SHOWN or self.FIELDS}
        usd = {k: round(v, 6) for k, v in shown.items() if "usd" in k and isinstance(v, float)}
        return {**shown, **usd} or self

    def _card(self) -> dict[str, Any]:
        """Return what a notebook shows: properties by name; the first one is in the heading."""
        return {name: getattr(self, name) for name in self.FIELDS} or masked(self)

    def _repr_html_(self) -> str:
        values = list(self._card().items())
        number = f" {values.pop(0)[1]}" if self.FIELDS and values[0][1] is not None else ""
        return html_card(f"{type(self).__name__}{number}", values)

    def __dir__(self) -> list[str]:
        """Return the properties, and the methods that read a dict."""
        names = super().__dir__()
        properties = [n for n in names if isinstance(getattr(type(self), n, None), property)]
        return sorted({*properties, "copy", "get", "items", "keys", "values"})

    def __repr__(self) -> str:
        # Text in a record comes from strangers: repr() of the parts escapes control characters.
        shown = masked({k: v for k, v in self._summary().items() if v is not None})
        fields = ", ".join(f"{printable(str(k))}={v!r}" for k, v in shown.items())
        return f"<{type(self).__name__} {fields}>"

    __str__ = __repr__


class Wallet(Record):
    """One wallet: a dict with ``name``, ``balance`` and ``deposit_address``.

    The live API calls the address ``deposit``; that field is kept too.
    """

    FIELDS = ("name", "balance", "balance_usd", "deposit_address")

    @property
    def name(self) -> str | None:
        """The currency, for example ``"CLORE-Blockchain"``."""
        return text_of(self, "name")

    @property
    def balance(self) -> float | None:
        """The balance, in its currency."""
        return finite(self.get("balance"))

    @property
    def balance_usd(self) -> float | None:
        """The balance in USD; None if the balance or the exchange rate is not known."""
        return self._rates.usd(self.balance, self.name)

    @property
    def deposit_address(self) -> str | None:
        """The address for deposits."""
        return text_of(self, "deposit_address")


def to_wallets(response: dict[str, Any], rates: ExchangeRates | None = None) -> list[Wallet]:
    """Convert the wallets of a response to the documented form.

    Parameters:
        response: the response with the list of wallets.
        rates: the exchange rates for ``balance_usd``.
    """
    wallets = []
    for record in dicts(response.get("wallets")):
        wallet = Wallet(record)
        wallet._wire = record
        if rates is not None:
            wallet._rates = rates
        if "deposit" in record:
            wallet.setdefault("deposit_address", record["deposit"])
        wallets.append(wallet)
    return wallets


# ==================================================================================================
# models.server
#
# Define servers, and convert them from the live form to the documented form.
# ==================================================================================================


# The text comes from strangers, so no pattern can backtrack for long. Compiled on first use, which
# makes the import faster.
LONGEST_TEXT = 200  # characters of a description that count
_COUNTED_GPU = r"(?s)([0-9]{1,3})x\s+(.+)"
_VENDOR = r"(?i)(?:NVIDIA\s+)?(?:GeForce\s+)?"
_DISK_SIZE = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s?GB"
# The field of the live form's ``price.usd`` with the on-demand price, for each currency.
_USD_FIELDS = {
    "CLORE-Blockchain": "on_demand_clore",
    "bitcoin": "on_demand_btc",
    "USD-Blockchain": "on_demand_usd",
}


def _counted(specs: Any) -> tuple[int, str] | None:
    """Return the count and name in ``specs.gpu`` (``"2x NVIDIA GeForce RTX 4070 Ti"``), or None."""
    text = specs.get("gpu") if isinstance(specs, dict) else None
    return _parse_counted(text[:LONGEST_TEXT]) if isinstance(text, str) else None


@functools.lru_cache(maxsize=1024)  # there are few different texts on thousands of servers
def _parse_counted(text: str) -> tuple[int, str] | None:
    match = re.fullmatch(_COUNTED_GPU, text.strip())
    if not match:
        return None
    return int(match[1]), match[2][re.match(_VENDOR, match[2]).end() :]  # type: ignore[union-attr]


def gpu_names(record: dict[str, Any]) -> list[str]:
    """Return the GPU names of a server in either form, as a flat list."""
    array = record.get("gpu_array")
    if isinstance(array, list):
        names: list[str] = []
        for entry in array:
            if isinstance(entry, str):  # the usual case, kept fast
                if name := entry.strip():
                    names.append(name)
            elif isinstance(entry, list):
                names += [n for item in entry if isinstance(item, str) and (n := item.strip())]
        if names:
            return names
    counted = _counted(record.get("specs"))
    return [counted[1]] * counted[0] if counted else []


def count_gpus(record: dict[str, Any]) -> int | None:
    """Return the number of GPUs of a server in either form, or None."""
    counted = _counted(record.get("specs"))
    return counted[0] if counted else len(gpu_names(record)) or None


def is_mixed(record: dict[str, Any]) -> bool:
    """Return whether a server has GPUs of several models."""
    return len(set(gpu_names(record))) > 1


def _exchange_rate(price: Any, currency: str) -> float | None:
    """Return USD for one unit of ``currency``, by an on-demand price in both; None if unknown."""
    amount = positive(part_of(price, "on_demand", currency))
    in_usd = positive(part_of(price, "usd", _USD_FIELDS.get(currency, "")))
    return in_usd / amount if amount and in_usd else None


def _live_spot_per_day(price: dict[str, Any]) -> float | None:
    """Return the lowest spot bid in USD per day, or None.

    ``price.usd.spot`` is often 0, which means that it is in another field (seen on the live API).
    """
    if stated := positive(part_of(price, "usd", "spot")):
        return stated
    original = price.get("original_usd")
    if isinstance(original, dict):
        clore = positive(part_of(original, "CLORE-Blockchain", "spot"))
        others = [p for c in original if (p := positive(part_of(original, c, "spot")))]
        if clore or others:
            return clore or min(others)
    if stated := positive(part_of(price, "spot", "USD-Blockchain")):
        return stated
    for currency in _USD_FIELDS:
        amount, rate = positive(part_of(price, "spot", currency)), _exchange_rate(price, currency)
        if amount and rate:
            return amount * rate
    return None


def price_in(server: Server, spot: bool, currency: str | None) -> float | None:
    """Return the price in USD per hour when paid in ``currency``, or None if there is none.

    Parameters:
        server: the server.
        spot: return the lowest spot bid that the host accepts.
        currency: the API's name; None takes the price of the documented form.
    """
    # The documented form has one price for all currencies.
    if spot:
        # Always per day: only the live form has this field.
        per_day = positive(part_of(server, "price", "original_usd", currency or "", "spot"))
        return per_day / HOURS_PER_DAY if per_day else server.spot_usd_per_hour
    usd_field = _USD_FIELDS.get(currency or "", "on_demand_clore")
    return positive(part_of(server, "price", "usd", usd_field)) or server.usd_per_hour


def on_demand_usd(server: Server, currency: str) -> float | None:
    """Return the on-demand price in USD per hour when paid in ``currency`` (the API's name)."""
    return price_in(server, spot=False, currency=currency)


def amount_per_hour(server: Server, currency: str) -> float | None:
    """Return the on-demand price per hour in ``currency`` itself, or None if it is not listed."""
    listed = positive(part_of(server, "price", "on_demand", currency))
    return None if listed is None else listed / HOURS_PER_DAY


def listed_rate(server: Server, currency: str) -> float | None:
    """Return USD for one unit of ``currency``, by the prices of one server; None if unknown."""
    if currency == "USD-Blockchain":
        return 1.0
    rate = _exchange_rate(server.price, currency)
    return rate and rate * HOURS_PER_DAY  # the price in USD is per hour, the other one per day


def accepts(record: dict[str, Any], live: bool, currency: str) -> bool:
    """Return whether the host accepts a currency.

    A server that does not list its currencies accepts those in which it has a price; in the
    documented form, which has one price for all, it accepts each.
    """
    coins = record.get("allowed_coins")
    if isinstance(coins, list) and coins:
        return currency in coins
    return not live or positive(part_of(record, "price", "on_demand", currency)) is not None


def version_parts(version: Any) -> tuple[int, int] | None:
    """Return a version such as ``"12.4"`` or 12.4 as two integers, or None."""
    text = version[:40].strip() if isinstance(version, str) else str(finite(version))
    match = re.fullmatch(r"([0-9]{1,4})(?:\.([0-9]{1,4}))?(?:\.[0-9.]*)?", text)
    return (int(match[1]), int(match[2] or 0)) if match else None


def nominal_vram(record: dict[str, Any]) -> float | None:
    """Return the memory of one GPU in GB, as the maker states it, or None.

    The live API rounds down, so that a card with 24 GB shows 23. Of the recent cards, only the
    1080 Ti and the 2080 Ti have an odd size, 11 GB.
    """
    size = positive(part_of(record, "specs", "gpuram"))
    if size is None or size < 6 or size % 2 != 1:
        return size
    eleven = size == 11 and any("80 ti" in name.lower() for name in gpu_names(record))
    return size if eleven else size + 1


class GPURecord(Record):
    """A record that names the GPUs of a server."""

    @property
    def gpu(self) -> str | None:
        """The count and name of its GPUs, such as ``"2x RTX 4090"``; of several models, all."""
        names = gpu_names(self)
        if is_mixed(self):
            return " + ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))
        return f"{count_gpus(self)}x {names[0]}" if names else None

    @property
    def gpu_name(self) -> str | None:
        """The name of its (first) GPU, for example ``"RTX 4090"``."""
        return next(iter(gpu_names(self)), None)

    @property
    def gpu_count(self) -> int | None:
        """The number of GPUs."""
        return count_gpus(self)


class Server(GPURecord):
    """One server of the marketplace, in the documented form.

    A dict with ``id``, ``gpu_array`` (a flat list of names), ``price`` (under ``usd`` in USD per
    hour), ``reliability`` (0 to 100), ``rented``, ``specs``, and all other fields that the API
    sent. A property is None if its field is missing or has an unexpected type.
    """

    SHOWN = ("id", "gpu", "usd_per_hour", "spot_usd_per_hour", "reliability", "country", "rented")
    FIELDS = ("id", "gpu_name", "gpu_count", "vram_gb", "total_vram_gb", "usd_per_hour",
              "usd_per_gpu_hour", "spot_usd_per_hour", "spot_usd_per_gpu_hour", "reliability",
              "rating", "rating_count", "country", "rented", "cpu_cores", "ram_gb", "disk_gb",
              "disk_mbps", "download_mbps", "upload_mbps", "pcie_width", "cuda_version",
              "max_rental_hours", "owner_id")  # fmt: skip

    @property
    def id(self) -> int | None:
        """The number of the server, for :meth:`CloreClient.create_order`."""
        return whole_id(self.get("id"))

    @property
    def price(self) -> dict[str, Any]:
        """The prices in all currencies; the numbers under ``"usd"`` are USD per hour."""
        prices = self.get("price")
        return prices if isinstance(prices, dict) else {}

    @property
    def vram_gb(self) -> float | None:
        """The memory of one GPU in GB, which the live API rounds down."""
        return positive(part_of(self, "specs", "gpuram"))

    @property
    def total_vram_gb(self) -> float | None:
        """The memory of all GPUs in GB, ``vram_gb`` times ``gpu_count``; None if they differ."""
        if self.vram_gb is None or is_mixed(self):  # the API lists the memory of one model
            return None
        return self.vram_gb * (self.gpu_count or 1)

    @property
    def usd_per_hour(self) -> float | None:
        """The on-demand price in USD per hour, without fees."""
        return positive(part_of(self, "price", "usd", "on_demand_clore"))

    @property
    def spot_usd_per_hour(self) -> float | None:
        """The lowest spot bid that the host accepts, in USD per hour, without fees."""
        return positive(part_of(self, "price", "usd", "spot"))

    @property
    def usd_per_gpu_hour(self) -> float | None:
        """The on-demand price in USD per hour for one of its GPUs, without fees."""
        return per_gpu(self.usd_per_hour, self.gpu_count)

    @property
    def spot_usd_per_gpu_hour(self) -> float | None:
        """The lowest spot bid in USD per hour for one of its GPUs, without fees."""
        return per_gpu(self.spot_usd_per_hour, self.gpu_count)

    @property
    def reliability(self) -> float | None:
        """The reliability, 0 to 100."""
        return finite(self.get("reliability"))

    @property
    def rented(self) -> bool:
        """True if the server is rented now."""
        return bool(self.get("rented"))

    @property
    def country(self) -> str | None:
        """The two-letter country code of its network."""
        return text_of(self, "specs", "net", "cc")

    @property
    def ram_gb(self) -> float | None:
        """The main memory in GB."""
        return positive(part_of(self, "specs", "ram"))

    @property
    def disk_gb(self) -> float | None:
        """The size of the disk in GB, from the last number of its description."""
        sizes = re.findall(_DISK_SIZE, text_of(self, "specs", "disk") or "")
        return positive(float(sizes[-1])) if sizes else None

    @property
    def disk_mbps(self) -> float | None:
        """The speed of the disk in MB per second."""
        return positive(part_of(self, "specs", "disk_speed"))

    @property
    def download_mbps(self) -> float | None:
        """The download speed in Mbit per second."""
        return positive(part_of(self, "specs", "net", "down"))

    @property
    def upload_mbps(self) -> float | None:
        """The upload speed in Mbit per second."""
        return positive(part_of(self, "specs", "net", "up"))

    @property
    def cpu_cores(self) -> int | None:
        """The number of CPU cores; the number of threads is usually twice as high."""
        match = re.match(r"\s*([0-9]{1,6})(?![0-9])", text_of(self, "specs", "cpus") or "")
        return int(match[1]) or None if match else None

    @property
    def pcie_width(self) -> float | None:
        """The number of PCI Express lanes of a GPU."""
        return positive(part_of(self, "specs", "pcie_width"))

    @property
    def rating(self) -> float | None:
        """The average rating by renters, up to 5."""
        return positive(part_of(self, "rating", "avg"))

    @property
    def rating_count(self) -> int | None:
        """The number of ratings."""
        return whole_id(part_of(self, "rating", "cnt"))

    @property
    def max_rental_hours(self) -> float | None:
        """The longest rental in hours."""
        return positive(self.get("mrl"))

    @property
    def owner_id(self) -> int | None:
        """The number of the owner."""
        return whole_id(self.get("owner"))

    @property
    def cuda_version(self) -> str | None:
        """The highest CUDA version that its driver supports, for example ``"13.0"``."""
        return text_of(self, "cuda_version")


def to_server(record: dict[str, Any], live: bool) -> Server:
    """Convert a server from the API to a :class:`Server`.

    Parameters:
        record: the server, as the API sent it.
        live: whether the response is in the live form.
    """
    server = Server(record)
    server._wire = record
    server["gpu_array"] = gpu_names(record)
    if not live:
        return server
    if (fraction := finite(record.get("reliability"))) is not None:
        server["reliability"] = round(fraction * 100.0, 9)  # 0.9731 * 100 is not 97.31
    price = record.get("price")
    if isinstance(price, dict):
        usd = price.get("usd")
        hourly = {k: per_hour(v) for k, v in usd.items()} if isinstance(usd, dict) else {}
        hourly["spot"] = positive(per_hour(_live_spot_per_day(price)))
        server["price"] = {**price, "usd": hourly}
    return server


class Marketplace:
    """Read the list of servers in one response.

    With the extra ``fast``, a server is decoded each time it is read. This is faster than to keep
    thousands of decoded servers.

    Attributes:
        live: whether the response is in the live form.
        ids: the id of each server, or None.
        gpus: the GPU names of each server.
        rented: whether each server is rented.
        prices: the on-demand price in USD per hour by server id.
        rates: USD for one unit of each currency, as the prices of a server imply.
    """

    def __init__(self, response: Mapping[str, Any]) -> None:
        servers = response.get("servers")
        self._servers = servers if isinstance(servers, (list, RawRecords)) else []
        self.live = any(_is_live_server(record) for record in self._servers)
        self._places: list[int] = []  # the indexes of the servers; other items are skipped
        self.ids: list[int | None] = []
        self.gpus: list[tuple[str, ...]] = []
        self.rented: list[bool] = []
        self.prices: dict[int, float] = {}
        self.rates: dict[str, float] = {}
        same: dict[tuple[str, ...], tuple[str, ...]] = {}  # so that equal names are kept once
        for place, record in enumerate(self._servers):
            if isinstance(record, dict):
                self._places.append(place)
                self.ids.append(whole_id(record.get("id")))
                names = tuple(gpu_names(record))
                self.gpus.append(same.setdefault(names, names))
                self.rented.append(bool(record.get("rented")))
                self._add_price(record)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Server:
        return to_server(self._servers[self._places[index]], self.live)

    def __iter__(self) -> Iterator[Server]:
        return map(self.__getitem__, range(len(self)))

    def _add_price(self, record: dict[str, Any]) -> None:
        given, server_id = part_of(record, "price", "usd", "on_demand_clore"), self.ids[-1]
        usd = positive(per_hour(given) if self.live else given)
        if usd is None or server_id is None:
            return
        self.prices[server_id] = usd
        if self.live and len(self.rates) < len(_USD_FIELDS):
            for currency in _USD_FIELDS:
                if rate := _exchange_rate(record["price"], currency):
                    self.rates[currency] = rate

    def servers(self, *, include_rented: bool = False) -> list[Server]:
        """Return the servers in the documented form, in the API's order."""
        return [self[n] for n, rented in enumerate(self.rented) if include_rented or not rented]


def _is_live_server(record: Any) -> bool:
    price = record.get("price") if isinstance(record, dict) else None
    return isinstance(price, dict) and ("on_demand" in price or "original_usd" in price)


# ==================================================================================================
# models.order
#
# Define orders, and convert them from the live form to the documented form.
# ==================================================================================================


# The live form has only the first two; the others are known from other sources.
ENDED_STATUSES = frozenset(
    {"cancelled", "expired", "completed", "error", "failed", "finished", "stopped", "terminated"}
)

# Compiled on first use, which makes the import faster.
_HOST_NAME = r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?"
_USER_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"


def plain_host(text: str) -> bool:
    """Return whether ``text`` is a host name or address that is safe for a shell and ssh."""
    if re.fullmatch(_HOST_NAME, text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # an IPv6 zone can hold any character


def plain_user(text: str) -> bool:
    """Return whether ``text`` is a user name that is safe for a shell and ssh."""
    return bool(re.fullmatch(_USER_NAME, text))


def _port(text: Any) -> int | None:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,5}", text):
        return None
    return int(text) if 1 <= int(text) <= 65535 else None


class Order(GPURecord):
    """One order, in the documented form.

    A dict with ``order_id``, ``renting_server``, ``status``, ``connection`` (``ssh`` and
    ``http_ports``), ``price`` (per hour, in the order's currency), ``started`` (Unix time), and
    all other fields that the API sent. A property is None if its field is missing or has an
    unexpected type.
    """

    _live: bool | None = None
    FIELDS = ("id", "server_id", "status", "gpu_name", "gpu_count", "price", "currency",
              "usd_per_hour", "cost_usd", "is_spot", "started_at", "image",
              "ssh_command")  # fmt: skip
    SHOWN = ("id", "server_id", "status", "gpu", "price", "currency", "usd_per_hour", "image",
             "started_at", "ssh_command", "ssh_password")  # fmt: skip

    @property
    def id(self) -> int | None:
        """The number of the order."""
        return whole_id(self.get("order_id"))

    @property
    def server_id(self) -> int | None:
        """The number of the rented server."""
        return whole_id(self.get("renting_server"))

    @property
    def status(self) -> str | None:
        """``"creating"``, ``"running"``, ``"cancelled"`` or ``"expired"``."""
        return text_of(self, "status")

    @property
    def price(self) -> float | None:
        """The price per hour, in its currency."""
        return finite(self.get("price"))

    @property
    def currency(self) -> str | None:
        """The currency that it is paid in, as the API names it."""
        return text_of(self, "currency")

    @property
    def image(self) -> str | None:
        """The Docker image."""
        return text_of(self, "image")

    @property
    def is_running(self) -> bool:
        """True if the order is deployed and has an address."""
        return self.status == "running"

    @property
    def is_spot(self) -> bool | None:
        """True if it is a spot order; None if the record does not say."""
        spot = self.get("spot")
        if isinstance(spot, bool):
            return spot
        return False if self.is_live else None  # the live form leaves out a false value

    @property
    def has_ended(self) -> bool:
        """True if the order has ended, and costs nothing any more."""
        return self.status in ENDED_STATUSES

    @property
    def ssh_command(self) -> str | None:
        """``"ssh root@<host> -p <port>"``, or None before the order runs."""
        return text_of(self, "connection", "ssh")

    @property
    def ssh_password(self) -> str | None:
        """The password that this client sent with the order, or None if it does not have it."""
        return text_of(self, "ssh_password")

    @property
    def http_urls(self) -> dict[str, str]:
        """A dict with the URL of each container port."""
        urls = part_of(self, "connection", "http_ports")
        if not isinstance(urls, dict):
            return {}
        return {str(k): v for k, v in urls.items() if isinstance(v, str)}

    @property
    def started_at(self) -> float | None:
        """The Unix time of its start; on the live API, of its creation."""
        return finite(self.get("started"))

    @property
    def usd_per_hour(self) -> float | None:
        """The price in USD per hour, without fees; None if no exchange rate is known.

        It uses the latest exchange rate that the client has read.
        """
        if "body" in self:  # a preview
            return finite(self.get("usd_per_hour"))
        return self._rates.usd(self.get("price"), self.get("currency"))

    @property
    def cost_usd(self) -> float | None:
        """The cost in USD until the order was read, with fees; None if it is not known.

        The live API says what was spent. Without that, it is the price for the time since the
        start, and only known while the order is active.
        """
        hourly, rate = finite(self.get("price")), self._rates.rate(self.get("currency"))
        spent = finite(self.get("spend"))
        if rate is None or hourly is None or hourly <= 0:
            return None
        hourly = with_fee(hourly, self.fee_rate)
        if spent is None:
            if self.started_at is None or self.has_ended:
                return None
            spent = hourly * max(0.0, time.time() - self.started_at) / 3600.0
        creation = finite(self.get("creation_fee"))
        creation_usd = CREATION_FEE if creation is None else creation * rate
        return spent * rate + creation_fee_after(spent / hourly * 3600.0, creation_usd)

    @property
    def fee_rate(self) -> float:
        """The renter's fee as a fraction of the price; the published one if it is not stated."""
        stated = finite(self.get("fee"))
        if stated is not None and 0 <= stated <= 1:
            return stated
        return published_fee(self.is_spot is True)

    @property
    def body(self) -> dict[str, Any] | None:
        """What a preview would send; None for an order."""
        body = self.get("body")
        return body if isinstance(body, dict) else None

    @property
    def is_live(self) -> bool | None:
        """True if it came in the live form; None if it did not come from the API."""
        return self._live

    def _summary(self) -> dict[str, Any]:
        if self.body is None:
            return super()._summary()
        return {"usd_per_hour": self.usd_per_hour, "body": self.body}

    def _card(self) -> dict[str, Any]:
        started = utc_time(self.started_at)
        own = {"started_at": started and f"{started} UTC", "body": masked(self.body)}
        return {**super()._card(), **own}


def _live_host(record: dict[str, Any]) -> str:
    cluster = record.get("pub_cluster")
    host = cluster[0] if isinstance(cluster, list) and cluster else cluster
    return host if isinstance(host, str) and plain_host(host) else ""


def _live_ports(record: dict[str, Any]) -> dict[int, int]:
    """Return the public port of each container port."""
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
    """Return the documented field, or the live one if that is missing."""
    value = record.get(name)
    return record.get(other) if value is None else value


def _live_fields(record: dict[str, Any], cancelled: Collection[int]) -> dict[str, Any]:
    """Return the documented fields of an order in the live form."""
    order_id = _either(record, "order_id", "id")
    by_this_client = whole_id(order_id) in cancelled
    host, ports = _live_host(record), _live_ports(record)
    status = _live_status(record, by_this_client, host, bool(ports))
    # The API can send host and ports before the container runs (seen on the live API).
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


def set_listed_price(order: Order, usd_per_hour: float) -> None:
    """Set the exchange rate of an order from the listed on-demand price of its server."""
    if (price := positive(order.get("price"))) is not None:
        rates = ExchangeRates()
        rates.update({wire_currency(order["currency"]): usd_per_hour / price}, display_only=True)
        order._rates = rates


def to_orders(
    response: dict[str, Any], cancelled: Collection[int], rates: ExchangeRates
) -> list[Order]:
    """Convert the orders of a response to the documented form.

    Parameters:
        response: the response with the list of orders.
        cancelled: ids of the orders that this client cancelled.
        rates: the exchange rates for ``usd_per_hour``.
    """
    live, orders = is_live(response), []
    for record in dicts(response.get("orders")):
        order = Order({**record, **_live_fields(record, cancelled)} if live else record)
        order._wire, order._live, order._rates = record, live, rates
        orders.append(order)
    return orders


def in_documented_form(order: Order) -> bool:
    """Return whether an order has a field that only the documented form has."""
    names = {"status", "connection", "renting_server"}
    return order.is_live is False and not names.isdisjoint(order.wire)


def created_id(response: dict[str, Any]) -> int | None:
    """Return the order id in a response to ``create_order``.

    The live API sends none any more; older responses and the documented form have one.
    """
    nested = response.get("order")
    for holder in (response, nested if isinstance(nested, dict) else {}):
        for name in ("order_id", "id"):
            if (order_id := whole_id(holder.get(name))) is not None and order_id > 0:
                return order_id
    return None


# ==================================================================================================
# models.listing
#
# Show servers, orders and wallets: as tables, in files, and prices as a plot.
# ==================================================================================================


Item = TypeVar("Item", bound=Record)
AnyListing = TypeVar("AnyListing", bound="Listing[Any]")

DEFAULT_WIDTH = 100  # columns, where there is no terminal
# The columns of to_dicts() whose unit is not in the name of the property.
UNIT_NAMES = {
    "price": "price_per_hour",
    "reliability": "reliability_percent",
    "started_at": "started_unix_seconds",
}
# A spreadsheet takes a text that starts with one of these as a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}",
                  "\N{FULLWIDTH HYPHEN-MINUS}", "\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip
MAX_ROWS = 20
MAX_WIDTH = 28  # characters of a cell, if its column does not say otherwise
GAP = "  "
NUMBER_STYLE = "text-align:right;padding:0.2em 0.6em;font-variant-numeric:tabular-nums"
TEXT_STYLE = "text-align:left;padding:0.2em 0.6em"
DIMMED_STYLE = "opacity:0.5"


# --- tables ---


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        heading: its heading, with the unit.
        value: returns the value of a record, or None.
        right: whether to align the column on the right, as numbers are.
        widest: the most characters of a cell; the rest is cut.
    """

    heading: str
    value: Callable[[Any], Any]
    right: bool = False
    widest: int = MAX_WIDTH


def decimal(number: float | None, digits: int) -> str | None:
    """Return a number with a fixed number of digits, so that the numbers of a column align.

    A number that is too small or too large for that has an exponent.
    """
    if number is None:
        return None
    if number and not 0.5 * 10**-digits <= abs(number) < 1e9:
        return f"{number:.2g}"
    return f"{number:.{digits}f}"


def utc_time(seconds: float | None) -> str | None:
    """Return a Unix time as ``"2026-07-16 12:00"``, in UTC, or None."""
    import time

    if seconds is None:
        return None
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):  # not a time at all
        return None


def cell_text(value: Any, widest: int = MAX_WIDTH) -> str:
    """Return a value on one line, in printable ASCII; the rest is escaped."""
    text = "" if value is None else str(value)
    plain = printable(text[:widest].encode("ascii", "backslashreplace").decode())
    cut = len(plain) > widest or len(text) > widest
    return re.sub(r"\\([xuU][0-9a-f]{0,7})?$", "", plain[: widest - 3]) + "..." if cut else plain


def cells_of(records: Sequence[Any], columns: Sequence[Column]) -> list[tuple[Column, list[str]]]:
    """Return each column with its cells, without the columns that are empty."""
    filled = [(c, [cell_text(c.value(record), c.widest) for record in records]) for c in columns]
    return [(column, cells) for column, cells in filled if any(cells)]


def text_table(records: Sequence[Any], columns: Sequence[Column], width: int) -> str:
    """Return a table as lines of text.

    The last columns are left out where the table would be wider than ``width``.

    Parameters:
        records: the rows; after ``MAX_ROWS`` of them, a last line says how many more there are.
        columns: the columns, the most important first.
        width: columns of the terminal.
    """
    lines: list[str] = []
    for column, cells in cells_of(records[:MAX_ROWS], columns):
        texts = [column.heading, *cells]
        widest = max(map(len, texts))
        if lines and len(lines[0]) + len(GAP) + widest > width:
            break
        padded = [text.rjust(widest) if column.right else text.ljust(widest) for text in texts]
        lines = [f"{a}{GAP}{b}" for a, b in zip(lines, padded, strict=True)] if lines else padded
    return "\n".join([line.rstrip()[: max(width, 1)] for line in lines] + _rest(records))


def _rest(records: Sequence[Any]) -> list[str]:
    more = len(records) - MAX_ROWS
    return [f"... and {more} more"] if more > 0 else []


def html_table(records: Sequence[Any], columns: Sequence[Column], dimmed: str) -> str:
    """Return a table as HTML.

    Parameters:
        records, columns: as for :func:`text_table`.
        dimmed: the property that shows a record in a paler color; empty for none.
    """
    from html import escape  # slow to import, and only notebooks need it

    shown = cells_of(records[:MAX_ROWS], columns)
    styles = [NUMBER_STYLE if column.right else TEXT_STYLE for column, _ in shown]

    def row(tag: str, texts: Iterable[str], style: str = "") -> str:
        cells = "".join(
            f'<{tag} style="{cell_style}">{escape(text)}</{tag}>'
            for cell_style, text in zip(styles, texts, strict=True)
        )
        return f'<tr style="{style}">{cells}</tr>'

    head = row("th", (column.heading for column, _ in shown))
    body = "".join(
        row("td", texts, DIMMED_STYLE if getattr(record, dimmed, False) else "")
        for record, *texts in zip(records[:MAX_ROWS], *(cells for _, cells in shown), strict=True)
    )
    rest = "".join(f"<p>{line}</p>" for line in _rest(records))
    table = f"<thead>{head}</thead><tbody>{body}</tbody>"
    return f'<table style="white-space:nowrap">{table}</table>{rest}'


def html_card(title: str, values: Iterable[tuple[str, Any]]) -> str:
    """Return a table with one row for each value that is not None, as HTML."""
    from html import escape

    def shown(value: Any) -> str:
        return escape(cell_text(f"{value:.6g}" if isinstance(value, float) else value, 120))

    rows = "".join(
        f'<tr><th style="{TEXT_STYLE}">{shown(name)}</th>'
        f'<td style="{TEXT_STYLE}">{shown(value)}</td></tr>'
        for name, value in values
        if value is not None
    )
    head = f'<th colspan="2" style="{TEXT_STYLE}">{shown(title)}</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


# --- lists ---


class Listing(list[Item]):
    """A list of records that shows as a table, in a terminal and in a notebook.

    It is a list in every other way. Slices, copies and sums are of the same type.

    Attributes:
        report: what a search left out and why, or None.
    """

    report: Any = None
    _things: ClassVar[str] = "records"
    _columns: ClassVar[tuple[Column, ...]] = ()
    _record: ClassVar[type[Record]] = Record
    _dimmed: ClassVar[str] = ""  # the property that shows a record in a paler color

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Item: ...

    @overload
    def __getitem__(self: AnyListing, index: slice, /) -> AnyListing: ...

    def __getitem__(self, index: Any, /) -> Any:
        found = super().__getitem__(index)
        return self._like(found) if isinstance(index, slice) else found

    def __add__(self: AnyListing, other: Any) -> AnyListing:  # type: ignore[override]
        return type(self)(super().__add__(other)) if isinstance(other, list) else NotImplemented

    def __radd__(self: AnyListing, other: Any) -> AnyListing:
        return type(self)([*other, *self]) if isinstance(other, list) else NotImplemented

    def copy(self: AnyListing) -> AnyListing:
        """Return a list of the same type with the same records."""
        return self._like(self)

    def _like(self: AnyListing, records: Iterable[Any]) -> AnyListing:
        twin = type(self)(records)
        twin.report = self.report
        return twin

    def __repr__(self) -> str:
        if not self:
            hint = "" if self.report is None else "; .explain() says why"
            return f"<{type(self).__name__}: no {self._things}{hint}>"
        import shutil

        width = shutil.get_terminal_size((DEFAULT_WIDTH, 0)).columns
        return text_table(self, self._columns, width)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        if not self:
            from html import escape

            return f"<p>{escape(repr(self))}</p>"
        return html_table(self, self._columns, self._dimmed)

    def explain(self) -> str:
        """Return a text that says what a search left out, and why.

        Example:
            >>> print(client.get_marketplace().explain())
            nothing was excluded
        """
        return "nothing was excluded" if self.report is None else str(self.report)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one flat dict for each record, with units in the names, for a table or a file.

        Credentials are not in it. Text of strangers is in it as the API sent it.

        Example:
            >>> client.get_wallets().to_dicts()[0]
            {'name': 'bitcoin', 'balance': 0.0419, 'deposit_address': 'bc1...'}
        """
        headings = list(zip(self._headings(), self._record.FIELDS, strict=True))
        return [{heading: getattr(record, name) for heading, name in headings} for record in self]

    def _headings(self) -> list[str]:
        return [UNIT_NAMES.get(name, name) for name in self._record.FIELDS]

    def to_pandas(self) -> Any:
        """Return the rows of :meth:`to_dicts` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.to_dicts(), columns=self._headings())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows of :meth:`to_dicts` to a CSV file in UTF-8, and replace an old one.

        Control characters are escaped. A text that a spreadsheet would take for a formula gets a
        ``'`` in front.

        Parameters:
            path: the file.
        """
        import csv

        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._headings())
            writer.writeheader()
            for row in self.to_dicts():
                writer.writerow({name: _csv_cell(value) for name, value in row.items()})


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA_STARTS) else text


def _number(heading: str, name: str, digits: int) -> Column:
    return Column(heading, lambda record: decimal(getattr(record, name), digits), right=True)


def _text(heading: str, name: str, **options: Any) -> Column:
    return Column(heading, attrgetter(name), **options)


class ServerList(Listing[Server]):
    """A list of servers."""

    _things = "servers"
    _record = Server
    _columns = (
        _text("id", "id", right=True),
        _text("gpu", "gpu"),
        _number("USD/h", "usd_per_hour", 4),
        _number("spot USD/h", "spot_usd_per_hour", 4),
        _number("reliable %", "reliability", 2),
        _text("country", "country"),
        Column("rented", lambda server: "rented" if server.rented else None),
        _number("VRAM GB", "vram_gb", 0),
        _number("RAM GB", "ram_gb", 0),
        _number("USD/GPU h", "usd_per_gpu_hour", 4),
        _number("disk GB", "disk_gb", 0),
        _text("cores", "cpu_cores", right=True),
        _number("down Mbps", "download_mbps", 0),
        _text("CUDA", "cuda_version", right=True),
    )
    _dimmed = "rented"


class OrderList(Listing[Order]):
    """A list of orders."""

    _things = "orders"
    _record = Order
    _columns = (
        _text("id", "id", right=True),
        _text("status", "status"),
        _text("gpu", "gpu"),
        _number("USD/h", "usd_per_hour", 4),
        _number("cost USD", "cost_usd", 4),
        _text("currency", "currency"),
        _number("price/h", "price", 4),
        _text("server", "server_id", right=True),
        Column("started UTC", lambda order: utc_time(order.started_at)),
        _text("ssh", "ssh_command", widest=60),
        _text("image", "image", widest=60),
    )
    _dimmed = "has_ended"


class WalletList(Listing[Wallet]):
    """A list of wallets."""

    _things = "wallets"
    _record = Wallet
    _columns = (
        _text("name", "name"),
        _number("balance", "balance", 8),
        _number("USD", "balance_usd", 2),
        _text("deposit address", "deposit_address", widest=60),
    )


# --- the plot of prices ---

# One color for each of the most frequent models.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#9467bd",
          "#a0a000", "#17becf")  # fmt: skip
OTHER_COLOR = "#c0c0c0"
PICTURES = (".png", ".svg", ".pdf")
NAME_LENGTH = 24  # characters
Points = list[tuple[float, float]]  # (reliability, USD per GPU hour)


def prices_by_model(servers: Iterable[Server]) -> dict[str, Points]:
    """Return the points of the plot by model, the most frequent model first.

    Servers without a name, a price or a reliability are left out, and those with several models.
    """
    models: dict[str, Points] = {}
    for server in servers:
        price, reliability = server.usd_per_gpu_hour, server.reliability
        if server.gpu_name and price and reliability is not None and not is_mixed(server):
            models.setdefault(server.gpu_name, []).append((reliability, price))
    return dict(sorted(models.items(), key=lambda item: -len(item[1])))


def check_plot(servers: Any, path: Any) -> None:
    """Check the arguments of ``plot_prices``."""
    given = () if servers is None else servers
    if not isinstance(given, (list, tuple)) or not all(isinstance(s, Server) for s in given):
        shown = short_repr(servers)
        raise TypeError(f"servers must be a list of servers, as of find_servers(), not {shown}")
    if path is None:
        return
    check_type("path", path, "a path", str, os.PathLike)
    check_local_path("path", path)
    if os.path.splitext(os.fsdecode(path))[1] not in PICTURES:
        raise ValueError(f"path must end with one of {PICTURES}, not {short_repr(path)}")


def plot_server_prices(servers: Iterable[Server], path: str | os.PathLike[str] | None) -> Any:
    """Plot the price per GPU hour against the reliability, with a color for each model.

    Parameters:
        servers: the servers.
        path: a picture file to write; with None, pyplot shows the plot.

    Returns:
        The ``matplotlib.axes.Axes``, and not the figure, which a notebook would show twice.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no server has a price and a reliability.
    """
    models = prices_by_model(servers)
    try:
        # pyplot shows a figure by itself, in a notebook or a window; a file needs no window.
        if path is None:
            new_figure = importlib.import_module("matplotlib.pyplot").figure
        else:
            new_figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError("plot_prices() needs matplotlib: pip install matplotlib") from error
    if not models:
        raise ValueError("servers must have a price and a reliability, but none of them has both")
    import statistics  # imported here, because it is slow

    figure = new_figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(models, COLORS, strict=False))
    medians = {name: statistics.median(price for _, price in models[name]) for name in colors}
    others = [point for name, points in models.items() if name not in colors for point in points]
    style = {"s": 16, "alpha": 0.7, "linewidths": 0}
    if others:
        label = f"{len(models) - len(colors)} other models"
        axes.scatter(*zip(*others, strict=True), color=OTHER_COLOR, label=label, **style)
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        label = f"{printable(name, NAME_LENGTH)}  {median:.3g}"
        # matplotlib hides a label that starts with _, and takes a $ for a formula.
        label = label.lstrip("_").replace("$", r"\$")
        axes.scatter(*zip(*models[name], strict=True), color=colors[name], label=label, **style)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1, 1), frameon=False, handletextpad=0, reverse=True
    )
    _set_up_axes(axes, [point for points in models.values() for point in points])
    if path is not None:
        figure.savefig(path, dpi=150)
    return axes


def _set_up_axes(axes: Any, points: Points) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("reliability in %")
    # A few unreliable servers would push all others into a corner.
    least = math.floor(sorted(reliability for reliability, _ in points)[len(points) // 20])
    hidden = sum(reliability < least for reliability, _ in points)
    if hidden and least < 100:
        axes.set_xlim(least, 100 + 0.02 * (100 - least))
        axes.set_xlabel(f"reliability in % (not shown: {hidden} below {least})")
    axes.set_ylabel("USD per GPU hour, on demand, without fees")
    axes.set_title(f"Prices of {len(points)} servers by GPU model, with the median of each model")
    axes.grid(True, which="major", alpha=0.3)
    axes.set_axisbelow(True)


# ==================================================================================================
# models.result
#
# Define the results of commands and transfers over SSH.
# ==================================================================================================


STDOUT, STDERR = "stdout", "stderr"
LAST_LINES = 20  # of each stream, where a result is printed
LONGEST_LINE = 300  # characters
# A color or another control sequence of a terminal; it is removed, not escaped.
_CONTROL_SEQUENCE = r"\x1b\[[0-9;?]{0,40}[@-~]"


def last_lines(text: str) -> list[str]:
    """Return the last lines of an output, with control characters escaped."""
    lines = text[-LAST_LINES * 1000 :].rstrip("\n").split("\n")
    shown = []
    for line in lines[-LAST_LINES:]:
        # Progress bars overwrite their line, so the text after the last \r is what is visible.
        visible = re.sub(_CONTROL_SEQUENCE, "", line.rstrip("\r").rsplit("\r", 1)[-1])
        shown.append(printable(visible.expandtabs(), LONGEST_LINE))
    more = text.rstrip("\n").count("\n") + 1 - len(shown)
    return [f"... {more} more lines", *shown] if more else shown


class CommandResult:
    """The result of a command. ``print()`` shows the last lines of its output.

    Attributes:
        command: the command for the server's shell, without the variables of ``env``.
        exit_code: 0 to 255; -1 if a signal ended the command.
        stdout, stderr: the output as text; bytes that are not UTF-8 are replaced.
        duration: seconds from the start to the end.
        dropped: the bytes of output beyond ``max_output``, which are not kept.
    """

    def __init__(
        self,
        command: str,
        exit_code: int,
        stdout: str,
        stderr: str,
        duration: float,
        dropped: int = 0,
    ) -> None:
        self.command = command
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr
        self.duration = duration
        self.dropped = dropped

    @property
    def ok(self) -> bool:
        """True if the exit code is 0."""
        return self.exit_code == 0

    def __repr__(self) -> str:
        left_out = f", {self.dropped} bytes of output dropped" if self.dropped else ""
        return (
            f"<CommandResult {printable(repr(self.command), 60)}: exit_code={self.exit_code}, "
            f"{len(self.stdout)} characters of stdout, {len(self.stderr)} of stderr, "
            f"{self.duration:.1f}s{left_out}>"
        )

    def __str__(self) -> str:
        outputs = [text for text in (self.stdout, self.stderr) if text.strip()]
        return "\n".join([repr(self), *(line for text in outputs for line in last_lines(text))])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the output in IPython and in notebooks."""
        printer.text(str(self))


class OutputLine(str):
    """A line of a command's output, without its line end.

    It can contain terminal escapes: do not print it unchecked.

    Attributes:
        stream: ``"stdout"`` or ``"stderr"``.
    """

    __slots__ = ("stream",)

    stream: str

    def __new__(cls, text: str, stream: str = STDOUT) -> OutputLine:
        line = super().__new__(cls, text)
        line.stream = stream
        return line


class TransferResult:
    """The result of a transfer.

    Attributes:
        path: the path of the copy, with control characters escaped.
        files: the number of files.
        size: the bytes of all files.
        duration: seconds.
        skipped: (name, reason) for symlinks and special files, which are not copied; also escaped.
        unchanged: the number of files that ``skip_unchanged`` left out.
        sent: with ``preview``, the names of the files that would be sent; also escaped.
        deleted: the names that ``delete`` removed, or would remove with ``preview``; also escaped.
        deletes: the unescaped names in ``deleted``; None without ``delete``.
    """

    def __init__(
        self,
        path: str,
        files: int,
        size: int,
        duration: float,
        skipped: list[tuple[str, str]],
        *,
        unchanged: int = 0,
        sent: Sequence[str] | None = None,
        deletes: Sequence[bytes] | None = None,
    ) -> None:
        self.path = path
        self.files = files
        self.size = size
        self.duration = duration
        self.skipped = skipped
        self.unchanged = unchanged
        self._is_preview = sent is not None
        self.sent = list(sent or ())
        self.deleted = [printable(os.fsdecode(name)) for name in deletes or ()]
        self.deletes = deletes

    def __repr__(self) -> str:
        preview, count = self._is_preview, len(self.deleted)
        deleted = f", would delete {count}" if preview else f", {count} deleted"
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        skipped += f", {self.unchanged} unchanged" if self.unchanged else ""
        skipped += deleted if count else ""
        return (
            f"<TransferResult {printable(self.path, 200)!r}: {'would send ' if preview else ''}"
            f"{self.files} files, "
            f"{self.size} bytes, {self.duration:.2f} s{skipped}>"
        )


# ==================================================================================================
# api.call
#
# Prepare an API call: check its arguments, and find the rules of its endpoint.
# ==================================================================================================


class Envelope(dict[str, Any]):
    """A decoded response, with the times of the request and the server's clock.

    Attributes:
        date: its header ``Date``.
        sent_at, received_at: monotonic times.
        sends: how many times the request was sent.
    """

    date: str | None
    sent_at: float
    received_at: float
    sends: int

    def server_time_at(self, moment: float) -> float | None:
        """Return the server's Unix time at a monotonic ``moment``, rounded down.

        Returns None if the response had no Date.
        """
        stamp = unix_time(self.date)
        return None if stamp is None else math.floor(stamp - (self.received_at - moment))


def unix_time(date: str | None) -> float | None:
    """Return the Unix time in an HTTP header, or None."""
    if not date:
        return None
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


class Rules:
    """The rules for requests to one endpoint.

    Attributes:
        needs_key: whether it needs an API key.
        repeatable: whether sending it twice does no harm.
        urgent: whether it is sent before other requests, because waiting costs money.
        spaced: whether it has a longer interval, ``create_order_interval``.
        logged: whether it starts or stops costs.
    """

    needs_key = True
    repeatable = urgent = spaced = logged = False

    def __init__(self, **changes: bool) -> None:
        self.__dict__.update(changes)


# By HTTP method and the last part of the endpoint.
RULES = {
    ("POST", "create_order"): Rules(spaced=True, logged=True),
    ("POST", "cancel_order"): Rules(repeatable=True, urgent=True, logged=True),
    ("POST", "cancel_orders"): Rules(repeatable=True, urgent=True, logged=True),
    ("POST", "set_spot_price"): Rules(repeatable=True, logged=True),
    ("GET", "marketplace"): Rules(needs_key=False, repeatable=True),
}
OTHER_READ, OTHER_CHANGE = Rules(repeatable=True), Rules()


class Call:
    """Prepare an API call: check its arguments, build its request, find the rules for its retries.

    Parameters:
        session: prepares the request.
        method, endpoint, params, json: as for ``_request``.
        options: other arguments for requests.
        base_url, headers, timeout: the settings of the client.
        urgent: whether the request goes first, and ignores the pause that the server asks for.

    Attributes:
        name: the last part of the endpoint, such as ``"create_order"``.
        reads: whether the request only reads.
        settings: the arguments of ``Session.send``.
        key: the API key, or an empty string.
        secrets: the strings that no error may show.
        lists_servers: whether to keep the servers in the response as JSON text, if possible.

    Raises:
        AuthenticationError: the endpoint needs a key, and there is none.
        ConfigurationError, TypeError, ValueError: an argument is not valid.
    """

    lists_servers = False

    def __init__(
        self,
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
    ) -> None:
        method = _check_method(method, options)
        self.endpoint, self.base_url = check_endpoint(endpoint), base_url
        self.label = f"{method} {endpoint}"
        path = unquote(urlsplit(endpoint).path)
        self.name = path.rstrip("/").rsplit("/", 1)[-1].lower()
        self.reads = method in ("GET", "HEAD")
        self.rules = RULES.get((method, self.name), OTHER_READ if self.reads else OTHER_CHANGE)
        self.urgent = self.rules.urgent or urgent
        all_headers = CaseInsensitiveDict(check_headers("headers", headers))
        if given_headers := options.pop("headers", None):
            all_headers.update(check_headers("headers", given_headers))
        self.key = check_key_header(all_headers, base_url, endpoint, self.rules.needs_key)
        timeout = check_timeout("timeout", options.pop("timeout", timeout))
        verify, cert = options.pop("verify", None), options.pop("cert", None)
        options.pop("stream", None)
        proxies = dict(options.pop("proxies", None) or {})
        if is_loopback(base_url):
            # A proxy from the environment could read the key over plain http.
            proxies = {"http": None, "https": None, "all": None, **proxies}
        self.request, secrets = _prepare_request(
            session, method=method, url=base_url + endpoint, headers=all_headers, params=params,
            json=json, **options,
        )  # fmt: skip
        self.secrets = (self.key, *secrets) if self.key else secrets
        # read_body() limits the size of a stream.
        merged = session.merge_environment_settings(self.request.url, proxies, True, verify, cert)
        self.settings: dict[str, Any] = {**merged, "allow_redirects": False, "timeout": timeout}

    def lost(self, cause: str) -> CloreError:
        """Make the error for a request that was sent and got no usable response."""
        if self.rules.repeatable:
            return CloreConnectionError(cause)
        if self.name == "create_order":
            return OrderOutcomeUnknownError(
                f"create_order was sent but got no clear response ({cause}): the order may or may "
                "not exist. It was not sent again. Check get_orders() now and again in a minute, "
                "before you order again",
                endpoint=self.endpoint,
            )
        return OutcomeUnknownError(
            f"{self.label} was sent but got no clear response ({cause}): it may or may not have "
            "taken effect. It was not sent again. Check the state of your account before you "
            "repeat it",
            endpoint=self.endpoint,
        )


def secrets_in(value: Any, inside: bool = False) -> Iterator[str]:
    """Yield every string in a body that must not be shown: the values of secret fields."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from secrets_in(item, inside or str(name).lower() in SECRET_FIELDS)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from secrets_in(item, inside)
    elif inside and isinstance(value, str) and len(value) > 3:
        yield value


def check_endpoint(endpoint: Any) -> str:
    """Check a path such as ``"/v1/wallets"``, so that the key can't go to another host."""
    check_text("endpoint", endpoint)
    fine = endpoint.startswith("/") and not endpoint.startswith("//") and endpoint.isprintable()
    if not fine or "\\" in endpoint or " " in endpoint or "/.." in endpoint:
        raise ValueError(f"endpoint must be a path like '/v1/wallets', not {short_repr(endpoint)}")
    return str(endpoint)


def _check_method(method: str, options: dict[str, Any]) -> str:
    """Return the method in upper case."""
    if "allow_redirects" in options:
        raise ValueError(
            "allow_redirects is not supported, as a redirect could send the key to another host: "
            "leave it out"
        )
    method = check_text("method", method).upper()
    if not (method.isascii() and method.isalpha()):
        raise ValueError(f"method must be one like 'GET', not {short_repr(method)}")
    return method


def _prepare_request(
    session: requests.Session, **arguments: Any
) -> tuple[requests.PreparedRequest, tuple[str, ...]]:
    """Return the request, and the secrets in its body."""
    # Without this, requests would send a password from ~/.netrc.
    arguments.setdefault("auth", lambda request: request)
    try:
        request = session.prepare_request(requests.Request(**arguments))
        return request, tuple(dict.fromkeys(secrets_in(arguments["json"])))
    except requests.exceptions.InvalidJSONError as error:
        raise ValueError(f"json can't be encoded as JSON: {error}") from None
    except RecursionError:
        raise ValueError("json can't be encoded as JSON: it is nested too deeply") from None
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"json, params or another argument can't be sent: {error}") from None


# ==================================================================================================
# api.connection
#
# Open HTTP connections that record when a request is sent, and limit its response time.
# ==================================================================================================


ENCODINGS = frozenset({"", "identity", "gzip", "deflate"})
PIECE = 16 * 1024  # bytes per read; decompressed, they can become a thousand times as many


class Exchange(threading.local):
    """Track the current request of each thread.

    Attributes:
        sent_at: monotonic time at which the first byte was sent, or None.
        connecting: whether a connection of this module is used, so that ``sent_at`` is reliable.
        deadline: monotonic time by which the whole response must have arrived.
    """

    def __init__(self) -> None:
        self.begin(lambda: None, lambda: None, math.inf)

    def begin(
        self, before: Callable[[], None], on_sent: Callable[[], None], deadline: float
    ) -> None:
        """Start another request.

        Parameters:
            before: called when it is connected and about to be sent; it may wait.
            on_sent: called when the request is sent.
            deadline: see the attribute.
        """
        self._before, self._on_sent, self.deadline = before, on_sent, deadline
        self.sent_at: float | None = None
        self.connecting = False

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Record that the block sends the first byte."""
        self._before()
        self.sent_at = time.monotonic()
        try:
            yield
        finally:
            # Called after the write: if the thread was paused before it, the request was sent late,
            # and the next one must wait longer.
            self._on_sent()


exchange = Exchange()


class _BoundedReader(io.RawIOBase):
    """Read a socket, with one deadline for all reads."""

    def __init__(self, raw: Any, sock: Any, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the whole response took too long: a longer timeout= allows more")
        timeout = self._sock.gettimeout()
        if timeout is None or left < timeout:
            self._sock.settimeout(left)  # the next request sets it again
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """Read a response before its deadline, and skip interim responses such as 103."""

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
        # Do not reuse a connection that may send another interim response later, or the connection
        # of a request that changes something.
        changes = self._method not in ("GET", "HEAD")  # type: ignore[attr-defined]
        self.will_close = self.will_close or interim or changes


# Raised before anything is sent, by any kind of connection.
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
        with exchange.sending():
            super().endheaders(*args, **kwargs)


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    """Use connections that record when a request is sent."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> ProxyManager:
        manager: ProxyManager = super().proxy_manager_for(*args, **kwargs)
        if type(manager) is ProxyManager:  # SOCKS has other connection classes
            self._watch(manager)
        return manager

    @staticmethod
    def _watch(manager: PoolManager) -> None:
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}


class Session(requests.Session):
    """Send requests, record when they are sent, and follow no redirect."""

    def __init__(self, user_agent: str) -> None:
        super().__init__()
        self.headers["User-Agent"] = user_agent
        self.headers["Accept-Encoding"] = "gzip, deflate"
        for prefix in ("https://", "http://"):
            self.mount(prefix, _Adapter(pool_maxsize=1))

    def resolve_redirects(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return iter(())


class Sessions:
    """Keep the sessions of a client. Each request uses a session of its own.

    A session whose request is interrupted is not used again, as its state and its locks are not
    known.
    """

    def __init__(self, user_agent: str) -> None:
        self._user_agent = user_agent
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._for_reads: collections.deque[Session] = collections.deque()  # kept alive

    def take(self, reads: bool) -> Session:
        """Return a session for one request.

        Parameters:
            reads: whether the request only reads. Any other gets a new connection, because an old
                one may be closed by the server, or contain the rest of another response.
        """
        if self._pid != os.getpid():
            self._forget()  # after a fork, two processes must not use one connection
        try:
            return self._for_reads.pop() if reads else Session(self._user_agent)
        except IndexError:
            return Session(self._user_agent)

    def put_back(self, session: Session) -> None:
        """Keep a session of a request that only reads for another one."""
        self._for_reads.append(session)

    def close(self) -> None:
        """Close the connections that are not in use."""
        if self._pid != os.getpid():
            return
        with contextlib.suppress(IndexError):  # empty
            while True:
                self._for_reads.pop().close()


class UnusableResponseError(Exception):
    """A response that can't be read to its end."""


def read_body(response: requests.Response, longest: float) -> bytes:
    """Read and decompress the body of a response, up to a limit.

    Parameters:
        response: a response with an unread body.
        longest: the most bytes, decompressed.

    Raises:
        UnusableResponseError: the body is larger, or has an unexpected encoding.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ENCODINGS:
        raise UnusableResponseError("the response has an encoding that was not requested")
    pieces, size = [], 0
    for piece in response.iter_content(PIECE):
        size += len(piece)
        if size > longest:
            raise UnusableResponseError(
                f"the response is larger than {longest / 1e6:g} MB: set a larger max_response_mb"
            )
        pieces.append(piece)
    return b"".join(pieces)


def never_sent(error: Exception, recorded: bool) -> bool:
    """Return whether it is certain that a failed request was not sent.

    Parameters:
        error: the failure.
        recorded: whether a connection of this module recorded a send.
    """
    if recorded:
        return False
    if exchange.connecting or isinstance(error, _UNSENT):
        return True
    return isinstance(reason_of(error), _UNSENT)


def reason_of(error: BaseException) -> Any:
    """Return the cause inside an error of requests: the ``reason`` of urllib3, if there is one."""
    inner = error.args[0] if error.args else error
    return getattr(inner, "reason", inner)


# ==================================================================================================
# api.rate_limit
#
# Decide when the next request with a key may be sent.
# ==================================================================================================


LONGEST_SLEEP = 0.5  # seconds after which a waiting request polls the schedule again
RECENT = 20  # how many of the last responses are counted for the error message
YIELD_CHANCE = 0.3  # the fraction of requests that leave the surplus after them
# Fractions of the interval, unless a comment gives another unit. The Redis script uses them too.
PACE = {
    "lead": 0.05,  # how long before its send time a request gets it: a slow store costs no time
    "late": 0.005,  # a request that is sent up to this much late needs no report
    "grace": 0.125,  # how long a request waits for each one ahead of it in the queue
    "longest_grace": 1.0,
    # A refusal means that other programs use the key too. Some requests then leave a longer gap
    # after them, so that the programs take turns of several requests, which wastes less time than
    # a change after every request.
    "jitter": 0.3,  # a retry comes up to this much later than the interval
    "slow_down": 0.2,  # each refusal adds this to the gap after a request
    "widest": 4.0,
    "speed_up": 0.1,  # a call without a refusal reduces that gap by this fraction
    "longest_pause": 3600.0,  # seconds; a broken proxy may ask for a pause of any length
}


class NotSentError(Exception):
    """The request can't be sent in time.

    Attributes:
        pause: seconds that are left of a pause that the API asked for, if it is longer than the
            caller's patience; None if the deadline is too early.
    """

    def __init__(self, pause: float | None) -> None:
        super().__init__(pause)
        self.pause = pause


class Turn:
    """Hold the place of one call in the queue, also for its retries.

    All times are monotonic, in seconds.

    Attributes:
        interval: seconds to the previous request, and to the next one.
        urgent: whether it is sent before others, and ignores the pause that the API asks for.
        spacing: an endpoint with a longer interval, and that interval in seconds.
        patience: the longest pause that it waits for, in seconds.
        deadline, not_before: when it must, and when it may be sent.
        sent_at: when it was sent, or else its send time.
        grant_ends: when its send time expires; another request may get the next send time then.
        refusals: how many times the API refused it because of the rate limit.
        retry_after: seconds that the last refusal asked it to wait.
        slowed: whether earlier refusals still widen the gaps between requests.
    """

    def __init__(
        self,
        interval: float,
        *,
        urgent: bool = False,
        spacing: tuple[str, float] | None = None,
        patience: float = math.inf,
    ) -> None:
        self.id = os.urandom(8).hex()
        self.arrived = time.monotonic()
        self.interval = interval
        self.urgent = urgent
        self.spacing = spacing
        self.patience = patience
        self.deadline = math.inf
        self.not_before = -math.inf
        self.sent_at = self.grant_ends = -math.inf
        self.refusals = 0
        self.retry_after = 0.0
        self.slowed = False

    @property
    def rank(self) -> int:
        """0 for urgent requests, which are sent first, else 1."""
        return 0 if self.urgent else 1


def entry_lifetime(turn: Turn) -> float:
    """Return the seconds after which a request that has stopped polling counts as dead."""
    return 2 * (LONGEST_SLEEP + turn.interval)


def random_gap() -> float:
    """Return the fraction of the surplus that a request leaves after it: 0.0 or 1.0."""
    return 1.0 if random.random() < YIELD_CHANCE else 0.0


# Not a named tuple: creating one makes the import slower.
class PollResult:
    """The result when a waiting request polls the schedule.

    Attributes:
        granted: whether it got a send time.
        at: its send time if it got one, else the time of its next poll (monotonic).
        paused: seconds that are left of the pause that the API asked for.
        slowed: whether refusals widen the gaps between requests.
        too_late: whether it can't be sent before its deadline.
    """

    def __init__(
        self, granted: bool, at: float, paused: float, slowed: bool = False, too_late: bool = False
    ) -> None:
        self.granted, self.at, self.paused = granted, at, paused
        self.slowed, self.too_late = slowed, too_late


class Schedule:
    """Keep the state of one rate limit: the queue, and when the last requests were sent.

    Each method is one step on plain numbers, which can be kept in memory, in a file, or in Redis
    (``redis_limit.py`` has the same steps in Lua).

    The first request in the queue polls when the next request may be sent, the second one a little
    later, and so on. The first of them that polls gets the send time. So a dead process delays the
    others by one interval at most, and each request polls about once per interval.
    """

    def __init__(self) -> None:
        self.last = 0.0  # when the last request was sent, or may be sent
        self.interval = 0.0  # seconds to keep after it
        self.surplus = 0.0  # seconds by which refusals widen the gap after some requests
        self.gap = 0.0  # seconds by which they widen it after the last request
        self.paused_until = 0.0
        self.spaced: dict[str, list[float]] = {}  # name -> [when the last was sent, seconds]
        # id of a turn -> [rank, arrival, when it may be sent at the earliest, when it expires]
        self.waiting: dict[str, list[float]] = {}

    def poll(self, turn: Turn, now: float) -> PollResult:
        """Grant a send time, or return when to poll again."""
        self._correct(now)
        own = turn.not_before
        if turn.spacing is not None:
            name, seconds = turn.spacing
            last, its_seconds = self.spaced.get(name, (-math.inf, 0.0))
            own = max(own, last + max(seconds, its_seconds))
        if not turn.urgent:
            own = max(own, self.paused_until)
        ready = max(own, self.last + max(self.interval, turn.interval) + turn.rank * self.gap)
        paused = 0.0 if turn.urgent else self.paused_until - now
        if self.waiting:
            self.waiting = {i: entry for i, entry in self.waiting.items() if entry[3] > now}
            self.waiting.pop(turn.id, None)
        if paused > turn.patience or max(ready, now) > turn.deadline:
            return PollResult(False, now, paused, too_late=True)
        mine = [turn.rank, turn.arrived]
        ahead = [i for i, entry in self.waiting.items() if entry[:2] < mine and entry[2] <= ready]
        grace = min(PACE["grace"] * len(ahead), PACE["longest_grace"]) * turn.interval
        at = ready - PACE["lead"] * turn.interval + grace
        if at > now:
            self.waiting[turn.id] = [*mine, own, now + entry_lifetime(turn)]
            return PollResult(False, at, paused, self.surplus > 0)
        for late in ahead:  # a dead request, or a slow one, which will poll again
            del self.waiting[late]
        send_time = max(ready, now)
        self._record(turn, send_time + PACE["late"] * turn.interval)
        self.gap = self.surplus * random_gap()
        return PollResult(True, send_time, paused, self.surplus > 0)

    def sent(self, turn: Turn, now: float) -> None:
        """Record that a request is sent later than its send time."""
        self._record(turn, max(self.last, min(turn.sent_at, now)))

    def refused(self, turn: Turn, now: float) -> None:
        """Slow down after the API refused a request for its rate limit."""
        wider = self.surplus + PACE["slow_down"] * turn.interval
        self.surplus = min(wider, PACE["widest"] * turn.interval)
        self.gap = PACE["jitter"] * turn.interval * random.random()
        if turn.retry_after:
            until = now + min(turn.retry_after + self.gap, PACE["longest_pause"])
            self.paused_until = max(self.paused_until, until)

    def accepted(self, turn: Turn, now: float) -> None:
        """Speed up after a call that was not refused."""
        self.surplus *= 1 - PACE["speed_up"]
        if self.surplus < 0.01 * turn.interval:
            self.surplus = 0.0

    def _correct(self, now: float) -> None:
        """Correct times that are far in the future because the clock was set back."""
        self.last = min(self.last, now + self.interval)
        self.paused_until = min(self.paused_until, now + PACE["longest_pause"])
        for entry in self.spaced.values():
            entry[0] = min(entry[0], now + entry[1])

    def _record(self, turn: Turn, at: float) -> None:
        self.last, self.interval = at, turn.interval
        if turn.spacing is not None:
            self.spaced[turn.spacing[0]] = [at, turn.spacing[1]]


class StoreUnavailableError(Exception):
    """A schedule could not be read or written."""


class Store(Protocol):
    """Keep a schedule."""

    @property
    def level(self) -> str:
        """Describe who shares the schedule, for ``client.describe()``."""

    def apply(self, step: str, turn: Turn) -> Any:
        """Run one step of :class:`Schedule`, given by its name, and return its result.

        Raises:
            StoreUnavailableError: that is not possible now.
        """


class ProcessStore:
    """Keep a schedule in memory, for the threads of this process."""

    level = "within this process"

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for one step, never while waiting
        self._schedule = Schedule()

    def apply(self, step: str, turn: Turn) -> Any:
        """Run one step of the schedule."""
        with self._lock:
            return getattr(self._schedule, step)(turn, time.monotonic())


def _sleep(seconds: float) -> None:
    """Sleep, unless there is no time left: even ``sleep(0)`` lets other processes run first."""
    if seconds > 0:
        time.sleep(seconds)


class RateLimiter:
    """Apply the rate limit of one key.

    An interrupt may end any method at any line. It leaves one entry in the queue, which others
    skip.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._refusals: collections.deque[bool] = collections.deque(maxlen=RECENT)

    @property
    def level(self) -> str:
        """Describe who shares the rate limit."""
        return self._store.level

    @property
    def recently_refused(self) -> tuple[int, int]:
        """(refused, total): how many of the last requests hit the API's rate limit."""
        return sum(self._refusals), len(self._refusals)

    def wait(self, turn: Turn, deadline: float = math.inf) -> None:
        """Wait until the request may be sent.

        Raises:
            NotSentError: the API asked for a pause that is longer than the turn's patience, or the
                request can't be sent before ``deadline`` (monotonic time).
        """
        turn.deadline = deadline
        while True:
            result: PollResult = self._store.apply("poll", turn)
            turn.slowed = result.slowed
            if result.too_late:
                raise NotSentError(result.paused if result.paused > turn.patience else None)
            now = time.monotonic()
            if result.granted:
                turn.sent_at = result.at
                turn.grant_ends = result.at + (1 - PACE["lead"]) * turn.interval
                _sleep(result.at - now)
                return
            _sleep(min(result.at - now, LONGEST_SLEEP, deadline - now))

    def before_send(self, turn: Turn, deadline: float = math.inf) -> None:
        """Record that the request is about to be sent. Wait again if its send time is void."""
        if turn.interval and time.monotonic() > turn.grant_ends:
            self.wait(turn, deadline)
        self.sent(turn)

    def sent(self, turn: Turn) -> None:
        """Record that the request was sent."""
        now = time.monotonic()
        if turn.interval and now > turn.sent_at + PACE["late"] * turn.interval:
            turn.sent_at = now
            self._store.apply("sent", turn)

    def refused(self, turn: Turn, retry_after: float | None) -> None:
        """Slow down after the API refused the request for its rate limit."""
        self._refusals.append(True)
        turn.refusals += 1
        turn.retry_after = retry_after or 0.0
        self._store.apply("refused", turn)

    def accepted(self, turn: Turn) -> None:
        """Speed up again, step by step."""
        self._refusals.append(False)
        if turn.slowed and not turn.refusals:
            self._store.apply("accepted", turn)


# ==================================================================================================
# api.limiters
#
# Share a rate limit: by a file on this machine, or through Redis among many machines.
# ==================================================================================================


DECODER = json.JSONDecoder()
LIMIT_PREFIX = "rate-limit-"
SCHEDULE_FORMAT = "json-1"
LONGEST_SCHEDULE = 100_000  # bytes
LIMIT_LOCK_PATIENCE = 0.5  # seconds; other processes lock the file for microseconds
NUMBERS = ("last", "interval", "surplus", "gap", "paused_until")
LIMITER_VARIABLE = "CLORE_RATE_LIMITER"
TRY_AGAIN = 5.0  # seconds after which a store that failed is tried again


class FileStore:
    """Keep a schedule in a file, which is locked for one step, never while waiting or sending.

    Parameters:
        path: the file. Its name must not contain the key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # so that threads do not wait for the lock of the file

    @property
    def level(self) -> str:
        """Describe who shares the schedule."""
        return f"among all processes on this machine, by {self._path}"

    def apply(self, step: str, turn: Turn) -> Any:
        """Run one step of the schedule."""
        try:
            with self._lock:
                handle = open_private(self._path)
                try:
                    return self._apply(handle, step, turn)
                finally:
                    os.close(handle)
        except OSError as error:
            raise StoreUnavailableError(f"{self._path} can't be used: {error}") from error

    def _apply(self, handle: int, step: str, turn: Turn) -> Any:
        if not lock_file(handle, LIMIT_LOCK_PATIENCE):
            raise OSError("another process keeps it locked")
        try:
            now = time.monotonic()
            schedule = load(os.read(handle, LONGEST_SCHEDULE), now)
            result = getattr(schedule, step)(turn, now)
            text = dump(schedule)
            os.lseek(handle, 0, os.SEEK_SET)
            if os.write(handle, text) != len(text):
                raise OSError("the disk is full")
            return result
        finally:
            set_lock(handle, locked=False)  # a forked child may still have it open


def limit_name(account: str) -> str:
    """Return the name of the file for an account.

    It differs by machine and boot, because the clocks differ and machines may share the folder. It
    also differs by format, because a version of this client treats another format as damaged.
    """
    boot = read_line("/proc/sys/kernel/random/boot_id") or socket.gethostname()
    digest = hashlib.sha256(f"{account}\n{boot}\n{SCHEDULE_FORMAT}".encode())
    return LIMIT_PREFIX + digest.hexdigest()[:32]


def dump(schedule: Schedule) -> bytes:
    """Return a schedule as a line of JSON. The rest of a longer, earlier text may follow it."""
    return json.dumps(vars(schedule)).encode() + b"\n"


def load(text: bytes, now: float) -> Schedule:
    """Parse a schedule.

    If the text is damaged, return a new schedule, in which the first request waits for one
    interval, because another request may just have been sent.
    """
    schedule = Schedule()
    if not text:
        return schedule
    try:
        fields, _ = DECODER.raw_decode(text.decode())
        numbers = [float(fields[name]) for name in NUMBERS]
        if not math.isfinite(sum(numbers)):
            raise ValueError
        vars(schedule).update(zip(NUMBERS, numbers, strict=True))
        schedule.spaced = _table(fields["spaced"], 2)
        schedule.waiting = _table(fields["waiting"], 4)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        schedule = Schedule()
        schedule.last = now
    return schedule


def _table(rows: dict[str, list[float]], columns: int) -> dict[str, list[float]]:
    if any(len(row) != columns for row in rows.values()):
        raise ValueError
    return {name: list(map(float, row)) for name, row in rows.items()}


class FallbackStore:
    """Use another store while the first one is not available.

    Parameters:
        first: the store to use.
        second: the store to use while the first one fails.
    """

    def __init__(self, first: Store, second: Store) -> None:
        self._first = first
        self._second = second
        self._failure = ""
        self._failed_at: float | None = None
        self._next_try = 0.0

    @property
    def level(self) -> str:
        """Describe who shares the schedule now, and for how long the first store has failed."""
        failed_at = self._failed_at
        if failed_at is None:
            return self._first.level
        seconds = time.monotonic() - failed_at
        return f"{self._second.level} (for {seconds:.0f} s, because {self._failure})"

    def apply(self, step: str, turn: Turn) -> Any:
        """Run one step of the schedule."""
        if self._failed_at is not None and time.monotonic() < self._next_try:
            return self._second.apply(step, turn)
        # Set before the try, which can be slow: other threads then use the second store.
        self._next_try = time.monotonic() + TRY_AGAIN
        try:
            result = self._first.apply(step, turn)
        except StoreUnavailableError as error:
            now = time.monotonic()
            self._next_try = now + TRY_AGAIN  # after a try that was slow
            if self._failed_at is None:
                self._failed_at, self._failure = now, str(error)
                text = "the rate limit is only shared %s, because %s"
                logger.warning(text, self._second.level, self._failure)
            return self._second.apply(step, turn)
        if self._failed_at is not None:
            self._failed_at = None
            logger.info("the rate limit is shared again %s", self._first.level)
        return result


def redis_server_for(rate_limiter: Any) -> RedisServer | None:
    """Return the Redis server for the argument ``rate_limiter``; None if there is none.

    Parameters:
        rate_limiter: a URL, a client like ``redis.Redis``, or None for the environment variable.
    """
    source = "rate_limiter"
    if rate_limiter is None:
        source, rate_limiter = LIMITER_VARIABLE, Secret.of(os.environ.get(LIMITER_VARIABLE))
        if not rate_limiter:
            return None
    return redis_server(rate_limiter, source)


def limiter_for(
    base_url: str, api_key: str, folder: Path | None, server: RedisServer | None = None
) -> RateLimiter:
    """Return the rate limiter that all requests with a key to an API share.

    Parameters:
        base_url, api_key: what the limit belongs to.
        folder: the state folder; None to share the limit within this process only.
        server: the Redis server; None to share the limit on this machine only.
    """
    account = account_digest(base_url, api_key)  # in place of the key

    def make() -> RateLimiter:
        store: Store = ProcessStore()
        if folder is not None:
            store = FallbackStore(FileStore(folder / limit_name(account)), store)
        if server is not None:
            store = FallbackStore(RedisStore(server, account), store)
        return RateLimiter(store)

    name = server.name if server else ""
    return this_process.of_account(make, account, str(folder or ""), name)


# ==================================================================================================
# api.redis_limit
#
# Keep a rate limit in Redis, so that many machines share it.
# ==================================================================================================


REDIS_TIMEOUT = 0.5  # seconds to connect, and for one reply
REDIS_EXPIRY = 86_400  # seconds after which Redis forgets a key that nobody uses
FOREVER = 1e9  # seconds; JSON has no infinity

# The steps of the class Schedule, by the clock of the Redis server. Times in ``turn`` are relative
# to now. A missing schedule may just have been lost, so the first request waits for one interval.
REDIS_SCRIPT = """
local step, turn, rules = ARGV[1], cjson.decode(ARGV[2]), cjson.decode(ARGV[3])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local text = redis.call('GET', KEYS[1])
local s = {last = now, interval = turn.interval, surplus = 0, gap = 0, paused_until = 0,
           spaced = {}, waiting = {}}
if text then s = cjson.decode(text) end
s.last = math.min(s.last, now + s.interval)
s.paused_until = math.min(s.paused_until, now + rules.longest_pause)
for _, entry in pairs(s.spaced) do entry[1] = math.min(entry[1], now + entry[2]) end
local granted, at, paused, too_late = 0, now, 0, 0

local function record(moment)
  s.last, s.interval = moment, turn.interval
  if turn.name then s.spaced[turn.name] = {moment, turn.spacing} end
end

local function poll()
  local own = now + turn.not_before
  local before = turn.name and s.spaced[turn.name]
  if before then
    own = math.max(own, before[1] + math.max(turn.spacing, before[2]))
  end
  if turn.rank > 0 then
    own = math.max(own, s.paused_until)
    paused = s.paused_until - now
  end
  local ready = s.last + math.max(s.interval, turn.interval) + turn.rank * s.gap
  ready = math.max(own, ready)
  s.waiting[turn.id] = nil
  if paused > turn.patience or math.max(ready - now, 0) > turn.deadline then
    too_late = 1
    return
  end
  local arrived, ahead = now - turn.age, {}
  for id, entry in pairs(s.waiting) do
    if entry[4] <= now then
      s.waiting[id] = nil
    elseif (entry[1] < turn.rank or (entry[1] == turn.rank and entry[2] < arrived))
        and entry[3] <= ready then
      table.insert(ahead, id)
    end
  end
  local grace = math.min(rules.grace * #ahead, rules.longest_grace) * turn.interval
  at = ready - rules.lead * turn.interval + grace
  if at > now then
    s.waiting[turn.id] = {turn.rank, arrived, own, now + turn.expiry}
    return
  end
  for _, id in ipairs(ahead) do s.waiting[id] = nil end
  granted, at = 1, math.max(ready, now)
  record(at + rules.late * turn.interval)
  s.gap = s.surplus * turn.gap
end

if step == 'poll' then
  poll()
elseif step == 'sent' then
  record(math.max(s.last, now - turn.sent))
elseif step == 'refused' then
  local wider = s.surplus + rules.slow_down * turn.interval
  s.surplus = math.min(wider, rules.widest * turn.interval)
  s.gap = rules.jitter * turn.interval * turn.random
  if turn.retry_after > 0 then
    local pause = math.min(turn.retry_after + s.gap, rules.longest_pause)
    s.paused_until = math.max(s.paused_until, now + pause)
  end
elseif step == 'accepted' then
  s.surplus = s.surplus * (1 - rules.speed_up)
  if s.surplus < 0.01 * turn.interval then s.surplus = 0 end
end
redis.call('SET', KEYS[1], cjson.encode(s), 'EX', rules.expiry)
return {granted, tostring(at - now), tostring(paused), s.surplus > 0 and 1 or 0, too_late}
"""

REDIS_RULES = json.dumps({**PACE, "expiry": REDIS_EXPIRY})


class RedisClient(Protocol):
    """List the methods of a client such as ``redis.Redis`` that are used."""

    def eval(self, script: str, numkeys: int, /, *keys_and_args: Any) -> Any:
        """Run a Lua script on the server."""


class RedisServer(NamedTuple):
    """A Redis client, the name of its server for messages, and the secrets to mask in them."""

    client: RedisClient
    name: str
    secrets: tuple[str, ...] = ()


def redis_server(rate_limiter: Any, source: str) -> RedisServer:
    """Return the Redis server for the argument ``rate_limiter``.

    Parameters:
        rate_limiter: a URL, or a client like ``redis.Redis``.
        source: the argument or variable that has it, for the error.
    """
    if not isinstance(rate_limiter, str):
        if not callable(getattr(rate_limiter, "eval", None)):
            raise TypeError(
                "rate_limiter must be a URL like 'redis://host:6379/0' or a redis.Redis client, "
                f"not {type(rate_limiter).__name__}"
            )
        return RedisServer(rate_limiter, f"{type(rate_limiter).__name__} {id(rate_limiter):x}")
    try:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        raise ConfigurationError(f"{source} needs redis-py: pip install redis") from None
    client: Any = None  # it connects on first use
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        client = Redis.from_url(
            Secret(rate_limiter), socket_timeout=REDIS_TIMEOUT,
            socket_connect_timeout=REDIS_TIMEOUT, retry=Retry(NoBackoff(), 0),
        )  # fmt: skip
    if client is None:
        # The URL is not shown, as it may contain a password.
        raise ConfigurationError(
            f"{source} is not a usable URL: it must be like 'redis://host:6379/0', "
            "'rediss://:password@host:6379/0' or 'unix:///path'"
        )
    options = client.connection_pool.connection_kwargs
    place = options.get("path") or f"{options.get('host')}:{options.get('port', 6379)}"
    password = options.get("password")
    secrets = (Secret(password),) if password else ()
    return RedisServer(client, printable(f"{place}/{options.get('db') or 0}", 200), secrets)


class RedisStore:
    """Keep a schedule in Redis.

    Parameters:
        server: the Redis server.
        account: a digest of the key.
    """

    def __init__(self, server: RedisServer, account: str) -> None:
        self._server = server
        self._key = f"clore-client:rate-limit:{account}"

    @property
    def level(self) -> str:
        """Describe who shares the schedule."""
        return f"among all machines, by Redis at {self._server.name}"

    def apply(self, step: str, turn: Turn) -> PollResult:
        """Run one step in Redis. Only the result of ``poll`` is used."""
        numbers = _numbers(turn, time.monotonic())
        try:
            reply = self._server.client.eval(REDIS_SCRIPT, 1, self._key, step, numbers, REDIS_RULES)
            granted, seconds, paused, slowed, too_late = map(float, reply)
            if not math.isfinite(seconds) or (granted and seconds > turn.interval):
                raise ValueError("the reply is not valid")
        except Exception as error:  # a client that the user passed may raise any class
            text = redact(f"{type(error).__name__}: {error}", self._server.secrets)
            raise StoreUnavailableError(
                f"Redis at {self._server.name} can't be used: {printable(text, 200)}"
            ) from None
        at = time.monotonic() + seconds
        return PollResult(bool(granted), at, paused, bool(slowed), bool(too_late))


def _numbers(turn: Turn, now: float) -> str:
    """Return the fields of a turn that the script needs, as JSON."""
    numbers: dict[str, Any] = {
        "id": turn.id,
        "rank": turn.rank,
        "age": now - turn.arrived,
        "interval": turn.interval,
        "not_before": max(turn.not_before - now, -FOREVER),
        "deadline": min(turn.deadline - now, FOREVER),
        "patience": min(turn.patience, FOREVER),
        "expiry": entry_lifetime(turn),
        "sent": min(now - turn.sent_at, FOREVER),
        "retry_after": turn.retry_after,
        "random": random.random(),
        "gap": random_gap(),
    }
    if turn.spacing is not None:
        numbers["name"], numbers["spacing"] = turn.spacing
    return json.dumps(numbers)


# ==================================================================================================
# api.retry
#
# Classify responses and failures by the retry policy, and decide when a call gives up.
#
# The README has the policy under "Retries".
# ==================================================================================================


MAX_DIGITS = 4000  # json refuses a response with an integer of 4,300 digits

# What to do after a failed request.
RETRY = "retry"
RAISE = "raise"
UNKNOWN = "unknown"  # raise an OutcomeUnknownError; create_order looks for its order

# Why it failed.
NOT_SENT = "not sent"
RATE_LIMITED = "rate limited"
NO_RESPONSE = "no response"
UNCLEAR = "unclear"
DATABASE_ERROR = "database error"
REFUSED = "refused"

# The first action is for reads and for repeatable POSTs, the second one for any other POST.
POLICY = {
    NOT_SENT: (RETRY, RETRY),  # connection refused, name not resolved, TLS
    RATE_LIMITED: (RETRY, RETRY),  # HTTP 429 or code 5
    # Timeout, connection lost, HTTP 2xx with a body that is not JSON, HTTP 500 ... without a code.
    NO_RESPONSE: (RETRY, UNKNOWN),
    # Other HTTP 5xx, HTTP 2xx without a code, a body that is too large or in a wrong encoding.
    UNCLEAR: (RAISE, UNKNOWN),
    DATABASE_ERROR: (RETRY, RAISE),  # code 1
    REFUSED: (RAISE, RAISE),  # any other error of the API, a redirect, 4xx
}
UNAVAILABLE_STATUSES = frozenset({500, 502, 503, 504, 520, 522})
REFUSAL_CODES = frozenset({3, 4})  # with these, the API did nothing, even with HTTP 5xx
LONGEST_CANCEL_PAUSE = 30.0  # seconds between two cancels that hit the rate limit


def action_for(call: Call, problem: str) -> str:
    """Return what to do about a problem."""
    return POLICY[problem][0 if call.rules.repeatable else 1]


def problem_of(status: int, decoded: Any, code: int | None) -> str:
    """Return why a request with a response failed.

    Parameters:
        status: the HTTP status.
        decoded: the body; None if it is not JSON.
        code: the code in the body, or None.
    """
    if code == 5 or (code is None and status == 429):
        return RATE_LIMITED
    if code == 1:
        return DATABASE_ERROR
    if code in REFUSAL_CODES or (code == 6 and error_text(decoded)):
        return REFUSED
    if code is None and (status in UNAVAILABLE_STATUSES or (decoded is None and status < 300)):
        return NO_RESPONSE
    return UNCLEAR if status >= 500 or (code is None and status < 300) else REFUSED


def backoff_delay(failures: int, first: float, longest: float) -> float:
    """Return the seconds before the next retry: exponential backoff with full jitter, capped."""
    return random.uniform(0.0, min(longest, first * 2.0 ** min(failures - 1, 32)))


def cancel_delay(refusals: int, first: float) -> float:
    """Return the seconds to wait after a cancel hit the rate limit: 1, 2, 4 ... 30."""
    return float(min(LONGEST_CANCEL_PAUSE, first * 2.0 ** min(refusals, 32)))


class Failure:
    """One request that failed.

    Attributes:
        error: what to raise if it is not retried.
        again: whether to retry.
        rate_limited: whether the API refused it because of the rate limit.
    """

    def __init__(self, error: CloreError, problem: str, again: bool = False) -> None:
        self.error, self.again = error, again
        self.rate_limited = problem == RATE_LIMITED


def excerpt(body: bytes, secrets: tuple[str, ...] = (), limit: int = 160) -> str:
    """Return the start of an HTML or text body on one line, without tags and secrets."""
    import html  # slow to import, and only errors need it

    text = redact(body[:100_000].decode("utf-8", "replace"), secrets)[:4000]
    text = re.sub(r"(?is)<(script|style|head)\b.*?</\1\s*>", " ", text)
    text = html.unescape(re.sub(r"<[^<>]*>?", " ", text))
    return printable(" ".join(text.split()), limit)


def _retry_after(headers: Any) -> float | None:
    """Return the seconds of a Retry-After header; a date counts from the Date of the response."""
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", value):
        return float(value)
    until, now = unix_time(value), unix_time(headers.get("Date"))
    return None if until is None or now is None else max(0.0, until - now)


def classify_error(call: Call, error: Exception, sent_at: float | None) -> Failure:
    """Classify a request that got no response.

    Parameters:
        call: the call.
        error: the exception of requests or urllib3.
        sent_at: monotonic time at which the request was sent; None if it was not.
    """
    reason = re.sub(r"^<?_?\w*(Connection|Pool)\(.*?\)[^:]*: ", "", str(reason_of(error)))
    cause = printable(redact(f"{type(error).__name__}: {reason}", call.secrets), 300)
    unsent = never_sent(error, sent_at is not None)
    failed = CloreConnectionError(cause) if unsent else call.lost(cause)
    failed.sent_at = None if unsent else sent_at
    # A new exception, because the original one holds the request with its secrets.
    kind = type(error) if isinstance(error, requests.RequestException) else requests.ConnectionError
    failed.__cause__ = kind(cause)
    problem = NOT_SENT if unsent else NO_RESPONSE
    return Failure(failed, problem, action_for(call, problem) == RETRY)


def classify_unusable(call: Call, response: requests.Response | None, reason: str) -> Failure:
    """Classify a response that can't be read to its end. A retry would fail in the same way."""
    status = 0 if response is None else response.status_code
    about = _about(call, status)
    error = InvalidResponseError(-1, f"HTTP {status}: {reason}", retryable=False, **about)
    return _failure(call, UNCLEAR, error, reason)


def classify(call: Call, response: requests.Response, body: bytes) -> Envelope | Failure:
    """Classify a response: success, retry, or error."""
    decoded = decode_servers(body) if call.lists_servers else decode_json(body)
    envelope = decoded if isinstance(decoded, dict) else {}
    code = envelope["code"] if type(envelope.get("code")) is int else None
    if code == 0:
        return Envelope(envelope)
    status = response.status_code
    about = _about(call, status)
    problem = problem_of(status, decoded, code)
    if problem == RATE_LIMITED:
        refused = RateLimitError(5, error_text(envelope), envelope, **about)
        refused.retry_after = _retry_after(response.headers)
        return _failure(call, problem, refused, "")
    if code is None:
        text, hint = _describe(call, response, body, decoded)
        retryable = action_for(call, problem) == RETRY
        broken = InvalidResponseError(-1, text, envelope, hint=hint, retryable=retryable, **about)
        cause = (broken.error or "JSON without a code").removeprefix(f"HTTP {status}: ")
        return _failure(call, problem, broken, cause)
    if problem == DATABASE_ERROR and not call.rules.repeatable:  # ambiguous
        about["retryable"] = False
        about["hint"] = CREATE_ORDER_CODE_1 if call.name == "create_order" else None
    error = api_error(envelope, **about)
    return _failure(call, problem, error, error.args[0])


def _about(call: Call, status: int) -> dict[str, Any]:
    return {"http_status": status, "endpoint": call.endpoint, "secrets": call.secrets}


def _failure(call: Call, problem: str, error: CloreAPIError, cause: str) -> Failure:
    action = action_for(call, problem)
    if action != UNKNOWN:
        return Failure(error, problem, action == RETRY)
    lost = call.lost(f"HTTP {error.http_status}: {cause}")
    lost.__cause__ = error
    return Failure(lost, problem, again=False)


def _describe(
    call: Call, response: requests.Response, body: bytes, decoded: Any
) -> tuple[str | None, str | None]:
    """Return the error text of a response without a code, and a hint."""
    status, hint = f"HTTP {response.status_code}", None
    if 300 <= response.status_code < 400:
        target = _redirect_target(response)
        return f"{status}: a redirect to {target}, which the client does not follow", None
    if isinstance(decoded, dict):
        return error_text(decoded), None
    if b"error code: 1010" in body[:4000]:
        hint = "the proxy in front of the API refused the User-Agent: set another user_agent"
    return f"{status}: {excerpt(body, call.secrets) or 'an empty response'}", hint


def _redirect_target(response: requests.Response) -> str:
    # Show only the host, because the rest of the URL may contain a token.
    try:
        host = urlsplit(response.headers.get("Location", "")).hostname
    except ValueError:
        host = None
    return f"host {printable(host, 100)}" if host else "an unknown host"


@functools.cache
def fast_json() -> Any:
    """Return the module ``msgspec``, or None if it is not installed."""
    try:
        return importlib.import_module("msgspec")
    except ImportError:
        return None


def decode_json(text: Any) -> Any:
    """Return the decoded JSON of ``bytes`` or of a ``msgspec.Raw``, or None."""
    if msgspec := fast_json():
        try:
            return msgspec.json.decode(text)
        except (ValueError, RecursionError, msgspec.MsgspecError):
            pass  # it refuses some numbers and lone surrogates that json accepts
    try:
        return json.loads(bytes(text))
    except (ValueError, RecursionError):
        return None


def decode_servers(body: bytes) -> Any:
    """Decode a response as :func:`decode_json` does, but leave its servers in JSON if possible."""
    if msgspec := fast_json():
        raw: Any = msgspec.Raw
        try:
            fields = msgspec.json.decode(body, type=dict[str, raw])
            servers = msgspec.json.decode(fields.pop("servers"), type=list[raw])
            decoded = {name: msgspec.json.decode(value) for name, value in fields.items()}
            for server in servers:  # msgspec has checked them, except for UTF-8 and long numbers
                if len(str(server, "utf-8")) > MAX_DIGITS:
                    msgspec.json.decode(server)
            if bytes(fields["code"]) == b"0":
                return {**decoded, "servers": RawRecords(servers, decode_json)}
        except (ValueError, RecursionError, KeyError, msgspec.MsgspecError):
            pass
    return decode_json(body)


class Retries:
    """Count the failed requests of one call.

    Failures count against ``max_retries``. Refusals because of the rate limit have a time limit.

    Attributes:
        sends: how many times the request was sent and failed.
        failures: how many of these failed for a reason other than the rate limit.
        refusals: how many of these the API refused because of the rate limit.
    """

    def __init__(self, call: Call, max_retries: int, patience: float) -> None:
        self._call = call
        self._max_retries = max(1, max_retries)
        self._patience = patience
        self._refused_at: float | None = None
        self._last: Failure | None = None
        self.sends = self.failures = self.refusals = 0

    @property
    def patience_left(self) -> float:
        """The seconds for which refusals because of the rate limit are still retried."""
        if self._refused_at is None:
            return self._patience
        return max(0.0, self._refused_at + self._patience - time.monotonic())

    def add(self, failure: Failure) -> None:
        """Add a failed request."""
        self.sends += 1
        if failure.rate_limited:
            self.refusals += 1
            self._refused_at = self._refused_at or time.monotonic()
        else:
            self.failures += 1
        failure.error.sends = self.sends
        if self._last is not None and failure.error.sent_at is None:
            failure.error.sent_at = self._last.error.sent_at  # an earlier request was sent
        self._last = failure

    def check(self, failure: Failure, recently_refused: tuple[int, int]) -> None:
        """Raise the error of the call, unless its request may be sent again.

        Parameters:
            failure: the last failure.
            recently_refused: (refused, total): how many of the last requests with this key the API
                refused because of the rate limit.
        """
        if not failure.again:
            raise failure.error
        if not failure.rate_limited:
            if self.failures >= self._max_retries:
                raise self._gave_up(failure.error)
            return
        pause = 0.0 if self._call.urgent else failure.error.retry_after or 0.0
        if self.patience_left <= pause:
            error = self._gave_up(failure.error)
            refused, total = recently_refused
            if refused > 1:
                error.args = (
                    f"{error}\n{refused} of the last {total} requests hit the API's rate limit: "
                    "other programs use this key. Stop them, share the rate limit with them "
                    "(rate_limiter='redis://...'), or allow more time with rate_limit_wait=",
                )
            raise error

    def not_sent(self, pause: float | None) -> CloreError:
        """Return the error for a request that could not be sent, or could not be retried.

        Parameters:
            pause: the seconds of a pause that is too long; None if the deadline is too early.
        """
        if self._last is not None:
            error = self._last.error
            error.retry_after = error.retry_after if pause is None else pause
            return self._gave_up(error)
        if pause is None:
            return CloreConnectionError(
                f"{self._call.label} was not sent, as the rate limit left no time for it before "
                "the deadline: allow more time, or make fewer requests"
            )
        hint = f"the API asked for a pause, so nothing was sent: try again in {pause:.0f} s"
        paused = RateLimitError(5, endpoint=self._call.endpoint, hint=hint)
        paused.retry_after, paused.sends = pause, 0
        return paused

    def _gave_up(self, error: CloreError) -> CloreError:
        """Add to the text of ``error`` that retries did not help."""
        error.args = (f"Clore API request failed after {self.sends} retries: {error}",)
        return error


# ==================================================================================================
# api.request
#
# Make API calls: respect the rate limit, send the request, retry, return a response or raise.
# ==================================================================================================


RESPONSE_TIMEOUTS = 3.0  # the longest time for one request, as a multiple of ``timeout``

H = TypeVar("H", bound="HTTPClient")
Returned = TypeVar("Returned")


class Limits:
    """The limits that a caller sets for its requests.

    Attributes:
        deadline: monotonic time by which every request must have ended.
        urgent: whether requests are sent before others, and ignore the server's pauses.
        once: whether a request that fails is not sent again.
    """

    def __init__(
        self, deadline: float = math.inf, urgent: bool = False, once: bool = False
    ) -> None:
        self.deadline, self.urgent, self.once = deadline, urgent, once


_limits: contextvars.ContextVar[Limits] = contextvars.ContextVar("limits", default=Limits())  # noqa: B039


def limited(
    call: Callable[[], Returned],
    *,
    deadline: float = math.inf,
    urgent: bool = False,
    once: bool = False,
) -> Returned:
    """Run a function whose requests have other limits than the client's.

    Parameters:
        call: the function that makes the requests.
        deadline: monotonic time; an earlier deadline of an outer call stays.
        urgent: whether requests ignore the server's pauses, because they stop costs.
        once: whether a request that fails is not sent again.
    """
    outer = _limits.get()
    limits = Limits(min(deadline, outer.deadline), urgent or outer.urgent, once or outer.once)
    context = contextvars.copy_context()  # so that an interrupt can't leave the limits set
    context.run(_limits.set, limits)
    return context.run(call)


def _user_agent(addition: str | None) -> str:
    """Return the User-Agent, with the text that the user adds."""
    own = f"clore-client/{__version__} {requests.utils.default_user_agent()}"
    if addition is None:
        return own
    if not (check_text("user_agent", addition).isascii() and addition.isprintable()):
        raise ValueError(f"user_agent must be printable ASCII, not {addition!r}")
    return f"{own} {addition}"


class HTTPClient:
    """Make every API call of a client, with its settings and connections.

    Attributes:
        server_clock: seconds by which the server's clock is ahead of this one; None if not known.
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
        rate_limiter: Any,
    ) -> None:
        key, _ = self._key_source = find_key(api_key)
        self._headers: dict[str, str] = {"auth": key} if key else {}
        self._url_source: tuple[str | None, str] = (None, "nowhere")
        self._find_base_url(base_url)
        self.timeout = check_timeout("timeout", timeout)
        self.rate_limit = check_interval("rate_limit", rate_limit)
        self.max_retries = check_count("max_retries", max_retries, minimum=1)
        self.create_order_interval = check_number(
            "create_order_interval", create_order_interval, unit="seconds"
        )
        self.rate_limit_wait = check_interval("rate_limit_wait", rate_limit_wait)
        self._state_folder = state_folder(state_dir)
        self._redis = redis_server_for(rate_limiter)
        self.backoff = check_interval("backoff", backoff)
        self.max_backoff = check_interval("max_backoff", max_backoff)
        self.max_response_mb = check_number(
            "max_response_mb", max_response_mb, above=True, infinite=True, unit="megabytes"
        )
        self._user_agent = _user_agent(user_agent)
        self._sessions = Sessions(self._user_agent)
        self.server_clock: float | None = None

    def __copy__(self: H) -> H:
        """Return another client with the same settings and key."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._sessions = Sessions(self._user_agent)
        twin._headers = dict(self.headers)
        return twin

    def __deepcopy__(self: H, memo: dict[int, Any]) -> H:
        return self.__copy__()

    def __getstate__(self) -> Any:
        # Without the key, the pickle could load as a client of another account.
        raise TypeError(
            f"a {type(self).__name__} can't be pickled, because its key would be in the pickle: "
            f"create it in the other process, with {type(self).__name__}.from_env()"
        )

    def close(self) -> None:
        """Close the connections. The client can be used again; it then opens new ones."""
        self._sessions.close()

    # --- settings that can change later ---

    def _find_base_url(self, base_url: str | None) -> None:
        name, source = "base_url", "argument"
        if base_url is not None:
            check_text("base_url", base_url)
        elif base_url := os.environ.get(URL_VARIABLE):
            name, source = URL_VARIABLE, f"environment variable {URL_VARIABLE}"
        if not base_url:
            return
        self._url_source = (check_base_url(base_url, name), source)
        try:
            self.BASE_URL = self._url_source[0]
        except AttributeError:  # a subclass defines it as a property
            logger.debug("BASE_URL of %s can't be set", type(self).__name__)

    @property
    def base_url(self) -> str:
        """The current ``BASE_URL``, checked, without a trailing slash."""
        return check_base_url(self.BASE_URL, "BASE_URL")

    @property
    def api_key(self) -> str | None:
        """The API key, or None. Setting it changes ``headers``."""
        named = ((k, v) for k, v in self.headers.items() if isinstance(k, str))
        return next((v for k, v in named if k.lower() == "auth"), None)

    @api_key.setter
    def api_key(self, key: str | None) -> None:
        rest = {k: v for k, v in self.headers.items() if k.lower() != "auth"}
        if key:
            rest["auth"] = clean_key(key, "the attribute api_key")
        self._headers = rest

    def _described_key(self, key: str) -> str:
        """Return a text that names the end of a key, and where it comes from."""
        found, source = self._key_source
        if key != found:
            source = "attribute" if key == self.api_key else "the headers of the call"
        return f"a key that ends in {key_ending(key)!r}, from {source}"

    @property
    def headers(self) -> dict[str, str]:
        """The headers of each request: ``{"auth": api_key}``, or ``{}`` without a key."""
        return self._headers

    @headers.setter
    def headers(self, headers: dict[str, str]) -> None:
        checked = check_headers("headers", headers)
        self._headers = {k: Secret.of(v) if k.lower() == "auth" else v for k, v in checked.items()}

    # --- requests ---

    def _request(
        self,
        method: str,
        endpoint: str,
        params: dict[str, Any] | None = None,
        json: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Make one API call, with rate limit and retries. Use it for endpoints without a method.

        Parameters:
            method: ``"GET"`` or ``"POST"``.
            endpoint: the path, for example ``"/v1/wallets"``.
            params: the query.
            json: the body.
            **kwargs: arguments for requests; ``headers`` are merged with the client's, ``timeout``
                overrides its timeout (seconds, or a ``(connect, read)`` pair).

        Returns:
            The API's response as a dict; its ``code`` is 0.

        Raises:
            CloreAPIError: the API responded with an error; see the subclasses.
            CloreConnectionError: no response arrived, and retries did not help.
            OutcomeUnknownError: a POST that changes something may or may not have taken effect.
            ValueError, TypeError: an argument is not valid; nothing was sent.

        Example:
            >>> client._request("GET", "/v1/wallets")["wallets"]
        """
        return self._make(self._prepare(method, endpoint, params, json, kwargs))

    def _read_marketplace(self) -> dict[str, Any]:
        """Make the call for the list of servers, for :class:`Marketplace`."""
        if is_request_replaced(self):
            return self._request("GET", "/v1/marketplace")  # a subclass or a fake expects dicts
        call = self._prepare("GET", "/v1/marketplace", None, None, {})
        call.lists_servers = True
        return self._make(call)

    def _make(self, call: Call) -> Envelope:
        """Make an API call, with rate limit and retries."""
        limiter = self._limiter(call.base_url, call.key)
        spacing = (call.name, self.create_order_interval) if call.rules.spaced else None
        turn = Turn(self.rate_limit, urgent=call.urgent, spacing=spacing)
        once = _limits.get().once
        sends, patience = (1, 0.0) if once else (self.max_retries, self.rate_limit_wait)
        retries = Retries(call, sends, patience)
        while True:
            turn.patience = retries.patience_left
            try:
                outcome = self._send(call, limiter, turn)
            except NotSentError as reason:
                raise retries.not_sent(reason.pause) from None
            if isinstance(outcome, Envelope):
                limiter.accepted(turn)
                outcome.sends = retries.sends + 1
                return outcome
            retries.add(outcome)
            turn.not_before = time.monotonic() + self._delay(outcome, retries, limiter, turn)
            retries.check(outcome, limiter.recently_refused)
            logger.log(
                logging.DEBUG if outcome.rate_limited and retries.refusals > 1 else logging.WARNING,
                "%s: attempt %d failed, retrying: %s",
                call.label, retries.sends, outcome.error,
            )  # fmt: skip

    def _limiter(self, base_url: str, key: str) -> RateLimiter:
        return limiter_for(base_url, key, self._state_folder, self._redis)

    def _prepare(
        self, method: str, endpoint: str, params: Any, json: Any, options: dict[str, Any]
    ) -> Call:
        session = self._sessions.take(reads=True)
        call = Call(
            session, method, endpoint, params, json, options, base_url=self.base_url,
            headers=self.headers, timeout=self.timeout, urgent=_limits.get().urgent,
        )  # fmt: skip
        self._sessions.put_back(session)
        return call

    def _delay(self, failure: Failure, retries: Retries, limiter: RateLimiter, turn: Turn) -> float:
        """Return the seconds before the next retry, except for the rate limit."""
        if not failure.rate_limited:
            return backoff_delay(retries.failures, self.backoff, self.max_backoff)
        limiter.refused(turn, failure.error.retry_after)
        return cancel_delay(retries.refusals, self.backoff) if turn.urgent else 0.0

    def _send(self, call: Call, limiter: RateLimiter, turn: Turn) -> Envelope | Failure:
        """Wait until the rate limit allows it, and send the request once."""
        deadline = _limits.get().deadline
        limiter.wait(turn, deadline)
        started_at = time.monotonic()
        settings = dict(call.settings)
        if (read_timeout := longest_part(settings["timeout"])) is not None:
            deadline = min(deadline, started_at + RESPONSE_TIMEOUTS * read_timeout)
        if deadline < math.inf:
            left = max(deadline - started_at, 0.001)
            settings["timeout"] = shortened(settings["timeout"], left)

        exchange.begin(
            lambda: limiter.before_send(turn, deadline), lambda: limiter.sent(turn), deadline
        )
        return self._exchange(call, settings, started_at)

    def _exchange(
        self, call: Call, settings: dict[str, Any], started_at: float
    ) -> Envelope | Failure:
        """Send a request, and read and classify its response."""
        session = self._sessions.take(call.reads)
        response = None
        outcome: Envelope | Failure
        try:
            response = session.send(call.request, **settings)
            body = read_body(response, self.max_response_mb * 1e6)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            outcome = classify_error(call, error, exchange.sent_at)
        except UnusableResponseError as error:
            outcome = classify_unusable(call, response, str(error))
        except OSError as error:  # a CA bundle or a certificate is missing
            raise ConfigurationError(f"{call.label} was not sent: {error}") from error
        else:
            outcome = self._classify(call, response, body, started_at)
        if isinstance(outcome, Failure) and response is not None:
            response.close()
        if call.reads:
            self._sessions.put_back(session)
        return outcome

    def _classify(
        self, call: Call, response: requests.Response, body: bytes, started_at: float
    ) -> Envelope | Failure:
        received_at = time.monotonic()
        # Connections of a SOCKS proxy don't record when a request is sent.
        sent_at = started_at if exchange.sent_at is None else exchange.sent_at
        logger.log(
            logging.INFO if call.rules.logged else logging.DEBUG,
            "%s: HTTP %d, %d bytes in %.3f s",
            call.label, response.status_code, len(body), received_at - sent_at,
        )  # fmt: skip
        outcome = classify(call, response, body)
        if isinstance(outcome, Envelope):
            outcome.date = response.headers.get("Date")
            outcome.sent_at, outcome.received_at = sent_at, received_at
            server_time = outcome.server_time_at(received_at)
            if server_time is not None:
                self.server_clock = server_time + 0.5 - time.time()
        else:
            outcome.error.sent_at = sent_at
            if isinstance(outcome.error, AuthenticationError) and call.key:
                outcome.error.add_hint(
                    f"the API refused {self._described_key(call.key)}: correct the key there, or "
                    "make a new one"
                )
        return outcome


ORIGINAL_REQUEST = HTTPClient._request


def is_request_replaced(client: Any) -> bool:
    """Return whether a subclass or a test has replaced ``_request``."""
    return getattr(client._request, "__func__", None) is not ORIGINAL_REQUEST


# ==================================================================================================
# market.filters
#
# Check the filters of a search; know the groups of countries and the names of GPUs.
# ==================================================================================================


SORTS = ("price", "price_per_gpu", "reliability", "vram", "download", "rating")
HIGHEST_RATING = 5.0
MAX_CUDA = "a version such as 12.4 or '12.4'"


# The filters of ``rent``; None is no filter. ``help(CloreClient.find_servers)`` has more.
# As a class, its annotations would be compiled, which makes the import slower.
ServerFilters = TypedDict(  # noqa: UP013
    "ServerFilters",
    {
        "gpu_count": int | None,
        "min_gpu_count": int | None,
        "exact_gpu": bool,
        "min_vram_gb": float | None,
        "min_total_vram_gb": float | None,
        "min_ram_gb": float | None,
        "min_cpu_cores": int | None,
        "min_disk_gb": float | None,
        "min_disk_mbps": float | None,
        "min_download_mbps": float | None,
        "min_upload_mbps": float | None,
        "min_cuda": float | str | None,
        "min_pcie_width": int | None,
        "countries": Iterable[str] | None,
        "exclude_countries": Iterable[str] | None,
        "min_rating": float | None,
        "min_ratings": int | None,
        "min_rental_hours": float | None,
        "exclude_servers": Iterable[int | Server] | None,
        "exclude_owners": Iterable[int] | None,
        "max_price_per_gpu_usd": float | None,
        "include_fees": bool,
        "sort": str | Callable[[Server], Any],
        "limit": int | None,
        "where": Callable[[Server], object] | None,
    },
    total=False,
)


class SearchFilters(ServerFilters, total=False):
    """The filters of ``find_servers`` and ``find_cheapest``."""

    currency: str | None


# The filters that compare a property of a server with a minimum.
MINIMUMS = {
    "min_reliability": "reliability",
    "min_ram_gb": "ram_gb",
    "min_cpu_cores": "cpu_cores",
    "min_disk_gb": "disk_gb",
    "min_disk_mbps": "disk_mbps",
    "min_download_mbps": "download_mbps",
    "min_upload_mbps": "upload_mbps",
    "min_pcie_width": "pcie_width",
    "min_rating": "rating",
    "min_ratings": "rating_count",
    "min_rental_hours": "max_rental_hours",
}


def check_filters(
    given: Mapping[str, Any], method: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Check the filters, and return those that are set, in the form that a search uses.

    Parameters:
        given: the filters by name.
        method: the method that got them; an error about an unknown name suggests its parameters.

    Raises:
        TypeError, ValueError: a filter is unknown, has an invalid value, or contradicts another.
    """
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _CHECKS:
            raise TypeError(f"there is no parameter {short_repr(name)}{_suggestion(name, method)}")
        if value is None:
            continue
        checked[name] = _CHECKS[name](name, value)
        if name.startswith("min_") and checked[name] in (0, (0, 0)):
            del checked[name]  # no limit
    exactly, least = checked.get("gpu_count"), checked.get("min_gpu_count")
    if exactly is not None and least is not None and exactly < least:
        raise ValueError(f"gpu_count={exactly} contradicts min_gpu_count={least}: leave one out")
    allowed = checked.get("countries")
    if allowed is not None and not allowed - checked.get("exclude_countries", frozenset()):
        raise ValueError("countries must have a country that exclude_countries does not name")
    return checked


def _suggestion(name: str, method: Callable[..., Any] | None) -> str:
    import difflib  # imported here, because both are slow and rarely needed
    import inspect

    own = {} if method is None else inspect.signature(method).parameters
    names = [known for known in {**own, **_CHECKS} if known != "filters"]
    close = difflib.get_close_matches(name, names, 1)
    # Do not suggest max_price_per_gpu_usd for max_price: it would allow higher prices.
    if name.startswith("max_price") and "gpu" not in name and "max_price_usd" in names:
        close = ["max_price_usd"]
    return f": did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


def _cuda(name: str, value: Any) -> tuple[int, int]:
    check_type(name, value, MAX_CUDA, str, int, float)
    version = version_parts(value)
    if version is None:
        raise ValueError(f"{name} must be {MAX_CUDA}, not {short_repr(value)}")
    return version


def _ids(name: str, values: Any) -> frozenset[int]:
    check_list(name, values, "a list of ids")
    return frozenset(
        check_id(f"{name}[{number}]", value.id if isinstance(value, Server) else value)
        for number, value in enumerate(values)
    )


def _sort(name: str, value: Any) -> Any:
    if callable(value):
        return check_callback(name, value)
    if value not in SORTS:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} must be one of {', '.join(SORTS)} or callable, not {short_repr(value)}")
    return value


# --- countries ---

_EU = "AT BE BG HR CY CZ DK EE FI FR DE GR HU IE IT LV LT LU MT NL PL PT RO SK SI ES SE"
# ISO 3166-1 codes by continent, and XK, which is in use for Kosovo.
_CONTINENTS = {
    "AFRICA": "AO BF BI BJ BW CD CF CG CI CM CV DJ DZ EG EH ER ET GA GH GM GN GQ GW IO KE KM LR LS "
    "LY MA MG ML MR MU MW MZ NA NE NG RE RW SC SD SH SL SN SO SS ST SZ TD TG TN TZ UG YT ZA ZM ZW",
    "ANTARCTICA": "AQ BV GS HM TF",
    "ASIA": "AE AF AM AZ BD BH BN BT CC CN CX GE HK ID IL IN IQ IR JO JP KG KH KP KR KW KZ LA LB "
    "LK MM MN MO MV MY NP OM PH PK PS QA SA SG SY TH TJ TL TM TR TW UZ VN YE",
    "EUROPE": f"{_EU} AD AL AX BA BY CH FO GB GG GI IM IS JE LI MC MD ME MK NO RS RU SJ SM UA VA "
    "XK",
    "NORTH AMERICA": "AG AI AW BB BL BM BQ BS BZ CA CR CU CW DM DO GD GL GP GT HN HT JM KN KY LC "
    "MF MQ MS MX NI PA PM PR SV SX TC TT US VC VG VI",
    "OCEANIA": "AS AU CK FJ FM GU KI MH MP NC NF NR NU NZ PF PG PN PW SB TK TO TV UM VU WF WS",
    "SOUTH AMERICA": "AR BO BR CL CO EC FK GF GY PE PY SR UY VE",
}
COUNTRY_GROUPS = {
    **{name: frozenset(codes.split()) for name, codes in _CONTINENTS.items()},
    "EU": frozenset(_EU.split()),
    "EEA": frozenset(_EU.split()) | {"IS", "LI", "NO"},
    "UK": frozenset({"GB"}),
}
COUNTRY_CODES = frozenset().union(*COUNTRY_GROUPS.values())


def check_countries(name: str, values: Any) -> frozenset[str]:
    """Return the two-letter codes in a list of codes and groups such as ``"EU"`` or ``"Asia"``."""
    check_list(name, values, "a list of country codes such as ['DE', 'EU']")
    codes: set[str] = set()
    for number, value in enumerate(values):
        code = " ".join(check_string(f"{name}[{number}]", value).upper().split())
        if code not in COUNTRY_GROUPS and code not in COUNTRY_CODES:
            groups = ", ".join(sorted(COUNTRY_GROUPS))
            raise ValueError(
                f"{name}[{number}] must be a two-letter country code or one of {groups} (in any "
                f"case), not {short_repr(value)}"
            )
        codes |= COUNTRY_GROUPS.get(code, {code})
    return frozenset(codes)


_PRICE_LIMIT = partial(check_number, infinite=True, unit="USD per hour")
_COUNTS = ("min_gpu_count", "min_cpu_cores", "min_pcie_width", "min_ratings")
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("gpu_count", "limit"), partial(check_count, minimum=1)),
    **dict.fromkeys(("min_vram_gb", "min_total_vram_gb", *MINIMUMS), check_number),
    **dict.fromkeys(_COUNTS, check_count),
    **dict.fromkeys(("exact_gpu", "include_fees"), check_bool),
    **dict.fromkeys(("countries", "exclude_countries"), check_countries),
    **dict.fromkeys(("exclude_servers", "exclude_owners"), _ids),
    "min_cuda": _cuda,
    "currency": check_currency,
    "min_rating": partial(check_number, maximum=HIGHEST_RATING),
    "min_reliability": partial(check_number, maximum=100.0),
    **dict.fromkeys(("max_price_usd", "max_price_per_gpu_usd"), _PRICE_LIMIT),
    "gpu_type": check_string,
    "sort": _sort,
    "where": check_callback,
}


# --- names of GPUs ---

LONGEST_NAME = 100  # characters that count; the names come from strangers
NAMED_MODELS = 20  # how many models a warning names at most
NEAREST_MODELS = 5  # how many similar models a warning names
SIMILAR = 0.5  # the lowest ``difflib`` ratio of a similar model

# The rules of folding, applied in this order. Compiled on first use, which makes the import faster.
_FOLDING = (
    (r"^\s*[0-9]{1,3}\s*x(?:\s+(?=\S)|(?=[a-z]))", ""),  # a leading count: "2x RTX 4090"
    (r"(nvidia|geforce|tesla)", r" \1 "),
    (r"[^0-9a-z]+", " "),
    (r"\b(rtx|gtx|gts|gt|titan|quadro)(?=[0-9a-z]?[0-9])", r"\1 "),
    (r"(?<=[0-9])(?=(?:sxm|pcie|nvl)[0-9]?)", " "),  # "V100SXM2"
    (r"\b(sxm[0-9]|pcie)(?=[0-9]+gb)", r"\1 "),  # "SXM232GB" is SXM2 with 32 GB
    (r"(?<=[0-9])(?=(?:ti|super|tisuper|laptop)\b)", " "),
    (r"\btisuper\b", "ti super"),
    (r"([0-9]) gb\b", r"\1gb"),
)
# Words that some names have and others do not, for the same model.
_VENDOR_WORDS = frozenset({"nvidia", "geforce", "tesla", "amd", "radeon"})


@lru_cache(maxsize=4096)
def fold_name(name: str) -> str:
    """Return a GPU name in lower case, split into words in one way.

    ``"NVIDIA GeForce RTX4090"`` and ``"2x RTX 4090"`` become ``"rtx 4090"``.
    """
    text = name[:LONGEST_NAME].lower()
    for pattern, replacement in _FOLDING:
        text = re.sub(pattern, replacement, text)
    words = text.split()
    return " ".join([word for word in words if word not in _VENDOR_WORDS] or words)


def matching_names(query: str, names: Collection[str], *, exact: bool = False) -> frozenset[str]:
    """Return the names that a query means, and warn if it is not clear or not found.

    Names that contain the query as whole words win. Without one, a part of a word is enough.

    Parameters:
        query: a GPU name or a part of it, in any spelling.
        names: all names of the listing.
        exact: accept only the same name.
    """
    wanted = fold_name(query)
    if exact:
        same = frozenset(name for name in names if fold_name(name) == wanted)
        return same or _no_match(query, names)
    words = f" {wanted} "
    if wanted and (whole := frozenset(n for n in names if words in f" {fold_name(n)} ")):
        return whole
    plain, joined = query.strip().lower(), wanted.replace(" ", "")
    parts = frozenset(
        name
        for name in names
        if plain in name.lower() or (joined and joined in fold_name(name).replace(" ", ""))
    )
    if not parts:
        return _no_match(query, names)
    models = model_names(Counter(parts))
    more = f" and {len(models) - NAMED_MODELS} more" if len(models) > NAMED_MODELS else ""
    shown = ", ".join(map(_shown, models[:NAMED_MODELS])) + more
    logger.warning("no GPU is named %s as a whole word; it is a part of %s", _shown(query), shown)
    return parts


def _no_match(query: str, names: Collection[str]) -> frozenset[str]:
    nearest = nearest_models(query, names)
    similar = f"; the nearest are {', '.join(map(_shown, nearest))}" if nearest else ""
    logger.warning("no GPU on the market is named %s%s", _shown(query), similar)
    return frozenset()


def nearest_models(query: str, names: Iterable[str]) -> list[str]:
    """Return the models whose names are most similar to a query, the most similar first."""
    import difflib  # imported here, because it is slow and rarely needed

    models = {fold_name(model): model for model in model_names(Counter(names))}
    close = difflib.get_close_matches(fold_name(query), models, NEAREST_MODELS, SIMILAR)
    return [models[folded] for folded in close]


def model_names(counts: Mapping[str, int]) -> list[str]:
    """Return the models among GPU names, each in its most common spelling, sorted.

    Parameters:
        counts: how often each name is listed.
    """
    return sorted(common_spellings(counts).values(), key=str.lower)


def common_spellings(counts: Mapping[str, int]) -> dict[str, str]:
    """Return the most common spelling of each folded name; of equally common ones the shortest."""
    spellings: dict[str, list[str]] = {}
    for name in counts:
        spellings.setdefault(fold_name(name), []).append(name)
    return {
        folded: min(same, key=lambda name: (-counts[name], len(name), name))
        for folded, same in spellings.items()
    }


def _shown(name: str) -> str:
    return repr(printable(name, LONGEST_NAME))


# ==================================================================================================
# market.market
#
# Read the marketplace: prices, exchange rates, fees, and which hosts worked.
# ==================================================================================================


# A bid above this is probably a price per day, which is 24 times too high.
MAX_TIMES_ON_DEMAND = 10.0
ROUNDING = 1e-9  # the rounding error between prices per day and per hour
RATES_PATIENCE = 10.0  # seconds to try to read exchange rates that are only for display
HOST_HISTORY_FILE = "host_history"  # in the state folder
HISTORY_LASTS = 86_400.0  # seconds
HISTORY_PATIENCE = 1.0  # seconds to wait for another process that writes the file

WORKED = "worked"
NOT_DEPLOYED = "not deployed"
# ``SSHError.reason`` -> the outcome
LOGIN_OUTCOMES = {"unreachable": "no sshd", "refused": "login refused"}


class Requester(Protocol):
    """List the parts of ``CloreClient`` that the marketplace uses."""

    @property
    def base_url(self) -> str: ...

    @property
    def api_key(self) -> str | None: ...

    def _read_marketplace(self) -> dict[str, Any]: ...

    def _request(self, method: str, endpoint: str, **options: Any) -> dict[str, Any]: ...


class MarketData:
    """Remember the form, the exchange rates and the listed prices of one API.

    Attributes:
        kept: the last list of servers, and the monotonic time at which it was read, if a search
            may use it again.
    """

    def __init__(self) -> None:
        self.kept: tuple[Marketplace, float] | None = None
        self.rates = ExchangeRates()
        self.listed: dict[int, float] = {}  # server id -> on-demand USD per hour
        self.live = False  # whether a response was certainly in the live form
        self.rates_tried_at = -math.inf  # monotonic time of the last try to read them for display
        self._documented_at = -math.inf

    @property
    def documented(self) -> bool:
        """True if a response of the last minutes was certainly in the documented form."""
        return time.monotonic() - self._documented_at <= RATE_MAX_AGE

    def observe(self, live: bool) -> None:
        """Record that the API uses the live form, if a response shows it."""
        if live:
            self.live = True
            self._documented_at = -math.inf

    def observe_spot(self, response: dict[str, Any]) -> None:
        """Record the form and the exchange rates of a response to ``spot_marketplace``."""
        live = is_live(response)
        self.observe(live)
        if live:
            self.rates.update(part_of(response, "market", "currency_rates_in_usd"))
        elif isinstance(response.get("market"), dict) and response["market"]:
            # An empty market shows nothing about the form.
            self.rates = ExchangeRates()
            self._documented_at = time.monotonic()

    def check_bid_price(
        self, name: str, usd_per_hour: float, server_id: int | None, allow_any: bool
    ) -> None:
        """Warn about a bid above the server's on-demand price, and refuse one far above it.

        Does nothing if that price is not known.

        Parameters:
            name: the name of the argument, for the error.
            usd_per_hour: the bid.
            server_id: the server.
            allow_any: whether to allow any bid.

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
                f"the on-demand price of server {server_id} ({listed:g}), not {usd_per_hour!r}: "
                "give the price per hour and not per day, or pass allow_above_on_demand=True"
            )
        logger.warning(
            "%s=%r USD per hour is above the on-demand price of server %s, %g USD per hour",
            name, usd_per_hour, server_id, listed,
        )  # fmt: skip


class Market:
    """Read the marketplace of a client's API, and convert bids."""

    def __init__(self, client: Requester) -> None:
        self._client = client
        self._by_url: dict[str, MarketData] = {}  # by base URL, which can change
        self._fees: dict[tuple[str, str], dict[str, Any]] = {}  # by base URL and key

    @property
    def data(self) -> MarketData:
        """The market data of the current base URL."""
        return self._by_url.setdefault(self._client.base_url, MarketData())

    def read(self) -> Marketplace:
        """Read the list of servers."""
        marketplace = Marketplace(self._client._read_marketplace())
        data = self.data
        data.observe(marketplace.live)
        data.listed = marketplace.prices
        data.rates.update(marketplace.rates, display_only=True)
        return marketplace

    def listing(self, max_age: float) -> Marketplace:
        """Return the list of servers, which may have been read up to ``max_age`` seconds ago."""
        data = self.data
        if data.kept is not None and time.monotonic() - data.kept[1] <= max_age:
            return data.kept[0]
        marketplace = self.read()
        if max_age > 0:
            data.kept = (marketplace, time.monotonic())
        return marketplace

    def read_spot(self, server_id: int) -> dict[str, Any]:
        """Read the spot market of a server."""
        query = {"market": server_id}
        response = self._client._request("GET", "/v1/spot_marketplace", params=query)
        self.data.observe_spot(response)
        return response

    def find_server(self, server_id: int) -> Server | None:
        """Return a server, rented or not, or None if it is not listed."""
        marketplace = self.read()
        places = (n for n, number in enumerate(marketplace.ids) if number == server_id)
        return next(map(marketplace.__getitem__, places), None)

    def get_server(self, server_id: int) -> Server:
        """Return a server, rented or not.

        Raises:
            CloreError: the marketplace does not list it.
        """
        server = self.find_server(server_id)
        if server is None:
            raise CloreError(f"server {server_id} is not on the marketplace: choose another")
        return server

    def learn_rates(self, server_id: int | None) -> None:
        """Try to read the exchange rates for display, at most once in five minutes.

        Parameters:
            server_id: a server whose spot market has them; None reads the list of servers.
        """
        data = self.data
        if time.monotonic() - data.rates_tried_at <= RATE_MAX_AGE:
            return
        now = data.rates_tried_at = time.monotonic()
        try:
            limited(
                lambda: self.read() if server_id is None else self.read_spot(server_id),
                deadline=now + RATES_PATIENCE,
            )
        except Exception as error:  # prices in USD are extra: they must not break another call
            logger.debug("the exchange rates can't be read: %s", error)

    def fees(self) -> dict[str, Any]:
        """Return the response with the account's fees, which is read once; empty without a key."""
        key = self._client.api_key
        if not key:
            return {}
        account = (self._client.base_url, key)
        if account not in self._fees:
            try:
                self._fees[account] = self._client._request("GET", "/v1/renter_fees")
            except CloreError as error:
                logger.debug("the account's fees can't be read: %s", error)
                if error.retryable:
                    return {}
                self._fees[account] = {}
        return self._fees[account]

    def ensure_rates(self, server_id: int, currency: str) -> None:
        """Read the exchange rate for a bid, if it is not known or too old."""
        data = self.data
        if not data.documented and currency not in data.rates.fresh():
            self.read_spot(server_id)

    def wire_bid(
        self, name: str, usd_per_hour: float, server_id: int, currency: str, allow_above: bool
    ) -> float:
        """Check a bid, and return it in the unit of the API.

        That is ``currency`` per day in the live form, and USD per hour in the documented form.

        Parameters:
            name: the name of the argument, for the error.
            usd_per_hour: the bid.
            server_id: the server.
            currency: the currency to pay with.
            allow_above: whether to allow a bid far above the on-demand price.

        Raises:
            ValueError: the bid is more than ten times the on-demand price.
            RateUnknownError: the exchange rate is not known.
        """
        data = self.data
        data.check_bid_price(name, usd_per_hour, server_id, allow_above)
        self.ensure_rates(server_id, currency)
        if data.documented:
            logger.info("bid for server %d: %g USD per hour", server_id, usd_per_hour)
            return usd_per_hour
        rate = positive(data.rates.fresh().get(currency))
        if rate is None:
            raise RateUnknownError(
                f"the spot market of server {server_id} has no exchange rate for {currency}, so "
                "nothing was bid: try again later, or use another currency"
            )
        bid = bid_per_day(usd_per_hour, rate)
        logger.info(
            "bid for server %d: %g USD per hour = %.8g %s per day (1 %s = %g USD)",
            server_id, usd_per_hour, bid, currency, currency, rate,
        )  # fmt: skip
        return bid


# --- which hosts worked ---


class HostHistory:
    """Remember which servers worked, in memory and in the state folder.

    Parameters:
        folder: the state folder, or None if none is used.
        base_url: returns the base URL, because each API has its own servers.
    """

    def __init__(self, folder: Path | None, base_url: Callable[[], str]) -> None:
        self._path = folder and folder / HOST_HISTORY_FILE
        self._base_url = base_url
        self._here: dict[str, dict[str, Any]] = {}  # what this process has seen

    def record(self, server_id: int | None, outcome: str | None) -> None:
        """Record what happened on a host; nothing if one of the two is not known."""
        if not server_id or outcome is None:
            return
        name = f"{canonical_url(self._base_url())} {server_id}"
        self._here[name] = {"outcome": outcome, "time": time.time()}
        if self._path is None:
            return
        try:
            with locked_path(self._path, HISTORY_PATIENCE):
                hosts = {**self._read(), name: self._here[name]}
                replace_file(self._path, json.dumps({"hosts": hosts}))
        except OSError as error:
            logger.debug("%s can't be written: %s", self._path, error)

    def outcomes(self) -> dict[int, dict[str, Any]]:
        """Return ``outcome`` and ``time`` of each host of the last day, by server id."""
        hosts = [*self._here.items(), *self._read().items()]
        found: dict[int, dict[str, Any]] = {}
        for name, seen in sorted(hosts, key=lambda host: host[1]["time"]):  # the newest counts
            url, _, server_id = name.rpartition(" ")
            if url == canonical_url(self._base_url()) and server_id.isdecimal() and _is_fresh(seen):
                found[int(server_id)] = dict(seen)
        return found

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the valid entries of the file of the last day."""
        if self._path is None:
            return {}
        try:
            hosts = read_state_file(self._path).get("hosts")
        except (OSError, ValueError, RecursionError) as error:
            logger.debug("%s can't be read: %s", self._path, error)
            return {}
        return {n: s for n, s in hosts.items() if _is_fresh(s)} if isinstance(hosts, dict) else {}


def _is_fresh(seen: Any) -> bool:
    if not isinstance(seen, dict) or not isinstance(seen.get("outcome"), str):
        return False
    at = finite(seen.get("time"))
    return at is not None and abs(time.time() - at) < HISTORY_LASTS


# ==================================================================================================
# market.search
#
# Search a listing: apply all filters in one pass, sort, and explain what was left out.
# ==================================================================================================


Check = Callable[[Server], object]  # true if a server passes

RENTED = "being rented"  # the name of a filter that is always on
ROUNDING_UP = 1 + 1e-12  # 8.4 / 24 is slightly above 0.35


class SearchReport:
    """What a search left out, and why.

    Attributes:
        listed: the number of servers on the marketplace, rented ones included.
        found: the number of servers that fit, before ``limit``.
        left_out: (filter, number of servers) in the order in which the filters are applied; each
            server counts for the first filter that it does not pass.
        cheapest_usd_per_hour: if nothing was found, the lowest price among the servers that the
            last of these filters left out; None if it is not known.
        nearest_models: if no GPU has the name, the most similar names on the market.
    """

    def __init__(self, listed: int) -> None:
        self.listed = listed
        self.found = 0
        self.left_out: list[tuple[str, int]] = []
        self.cheapest_usd_per_hour: float | None = None
        self.nearest_models: list[str] = []

    def __repr__(self) -> str:
        return f"<SearchReport {self.explain()!r}>"

    def add(self, label: str, count: int) -> None:
        """Add the number of servers that a filter left out."""
        if count:
            self.left_out.append((label, count))

    def explain(self) -> str:
        """Return a text that names the filters, and the cheapest of the servers left out last."""
        if not self.listed:
            return "the marketplace lists no server"
        if self.found:
            return f"{self.found} of {self.listed} servers fit" + "".join(
                f"; {label} left out {count}" for label, count in self.left_out
            )
        *earlier, (label, count) = self.left_out
        text = "".join(f"{other} left out {number}, " for other, number in earlier)
        text = f"none of {self.listed} servers fits: {text}{label} left out the last {count}"
        if self.nearest_models:
            shown = ", ".join(repr(printable(name, 100)) for name in self.nearest_models)
            return f"{text}; the nearest GPU names are {shown}"
        if self.cheapest_usd_per_hour is None:
            return text
        return f"{text}, of which the cheapest costs {self.cheapest_usd_per_hour:.4g} USD per hour"

    __str__ = explain


class Search:
    """Search the servers of a listing.

    The arguments are checked when the search is created.

    Parameters:
        gpu_type, max_price_usd, min_reliability, use_spot: as for ``CloreClient.find_servers``.
        filters: the other filters of that method.
        currency: the filter of that name, if it is not among them.
        method: the method of the client that searches.

    Attributes:
        fee: the published fee as a fraction of the price.
        currency: the API's name of the currency whose price counts; None for the price of the
            documented form.
        server_id: if set, no other server fits.
        models: after :meth:`run`, the GPU names that count; None for all.
    """

    def __init__(
        self,
        gpu_type: Any = None,
        max_price_usd: Any = None,
        min_reliability: Any = 0.0,
        use_spot: Any = False,
        filters: Mapping[str, Any] | None = None,
        currency: Any = None,
        method: Callable[..., Any] | None = None,
    ) -> None:
        check_number("min_reliability", min_reliability, maximum=100.0)
        given = {
            "gpu_type": gpu_type, "max_price_usd": max_price_usd, "currency": currency,
            "min_reliability": min_reliability, **(filters or {}),
        }  # fmt: skip
        self._given = {name: value for name, value in given.items() if value is not None}
        self._filters = check_filters(self._given, method)
        self.gpu_type: str | None = self._filters.get("gpu_type")
        self.max_price_usd: float | None = self._filters.get("max_price_usd")
        if self._filters.get("min_reliability", 100.0) <= 1:
            logger.warning("min_reliability=%g is almost no limit: it goes to 100", min_reliability)
        self.spot = check_bool("use_spot", use_spot)
        self.fee = published_fee(self.spot)
        # What the price limits are compared with, as a multiple of the price.
        self._with_fees = 1 + self.fee if self._filters.get("include_fees") else 1.0
        self.currency: str | None = self._filters.get("currency")
        self.server_id: int | None = None
        self.models: frozenset[str] | None = None

    # --- prices ---

    def price(self, server: Server) -> float | None:
        """Return the price of a server in USD per hour, without fees; None if it has none."""
        return price_in(server, self.spot, self.currency)

    def price_limit(self, server: Server) -> float | None:
        """Return the highest price of a server in USD per hour, without fees; None for no limit."""
        limit, each = self.max_price_usd, self._filters.get("max_price_per_gpu_usd")
        if each is not None:
            limit = min(math.inf if limit is None else limit, each * self.gpu_count(server))
        return None if limit is None else limit / self._with_fees

    def gpu_count(self, server: Server) -> int:
        """Return the number of GPUs that match; of several models, only those count."""
        if self.models is None:
            return count_gpus(server) or 0
        names = gpu_names(server)
        matching = sum(name in self.models for name in names)
        return matching if matching < len(names) else count_gpus(server) or 0

    # --- the search ---

    def run(self, marketplace: Marketplace) -> tuple[list[Server], SearchReport]:
        """Return the servers that fit, sorted, and a report on the others."""
        report = SearchReport(len(marketplace))
        places = self._with_gpu(self._with_id(marketplace, report), marketplace, report)
        free = [place for place in places if not marketplace.rented[place]]
        report.add(RENTED, len(places) - len(free))
        checks = self._checks(marketplace.live)
        by_check: list[list[int]] = [[] for _ in range(len(checks) + 1)]  # the places it left out
        fitting = []
        for place in free:
            server = marketplace[place]
            failed = _first_failed(checks, server)
            by_check[failed].append(place)
            if failed == len(checks):
                fitting.append(server)
        for (label, _), left_out in zip(checks, by_check, strict=False):
            report.add(label, len(left_out))
        found = self._where(fitting)
        report.add("where", len(fitting) - len(found))
        report.found = len(found)
        if not found and places:
            last = next((group for group in reversed(by_check) if group), places)
            dropped = [marketplace[place] for place in last]
            if last is not by_check[-1]:
                dropped = self._where(dropped)
            report.cheapest_usd_per_hour = self._lowest(dropped)
        return self._sorted(found)[: self._filters.get("limit")], report

    def _with_id(self, marketplace: Marketplace, report: SearchReport) -> Sequence[int]:
        """Return the places of the servers with the wanted id."""
        if self.server_id is None:
            return range(len(marketplace))
        places = [n for n, number in enumerate(marketplace.ids) if number == self.server_id]
        report.add(f"server_id={self.server_id}", len(marketplace) - len(places))
        return places

    def _with_gpu(
        self, places: Sequence[int], marketplace: Marketplace, report: SearchReport
    ) -> Sequence[int]:
        """Return the places of the servers with a matching GPU."""
        if not self.gpu_type or not self.gpu_type.strip():
            return places
        names = set().union(*set(marketplace.gpus))
        exact = bool(self._filters.get("exact_gpu"))
        models = self.models = matching_names(self.gpu_type, names, exact=exact)
        if not models:
            report.nearest_models = nearest_models(self.gpu_type, names)
        fitting = [place for place in places if not models.isdisjoint(marketplace.gpus[place])]
        report.add(f"gpu_type={short_repr(self.gpu_type)}", len(places) - len(fitting))
        return fitting

    def _checks(self, live: bool) -> list[tuple[str, Check]]:
        """Return the filters that are set, cheap ones first and the price limits last."""
        tests: dict[str, Callable[[Any, Server], object]] = {
            "exclude_servers": lambda ids, s: s.id is not None and s.id not in ids,
            "exclude_owners": lambda ids, s: s.owner_id is not None and s.owner_id not in ids,
            "currency": lambda coin, s: accepts(s, live, coin),
            "countries": lambda codes, s: s.country and s.country.upper() in codes,
            "exclude_countries": lambda codes, s: s.country and s.country.upper() not in codes,
            "gpu_count": lambda count, s: self.gpu_count(s) == count,
            **{name: partial(_at_least, number) for name, number in self._numbers().items()},
            "max_price_per_gpu_usd": lambda usd, s: self._costs_at_most(usd * self.gpu_count(s), s),
            "max_price_usd": self._costs_at_most,
        }
        return [
            (f"{name}={short_repr(self._given[name])}", partial(test, self._filters[name]))
            for name, test in tests.items()
            if name in self._filters
        ]

    def _numbers(self) -> dict[str, Callable[[Server], Any]]:
        """Return what each filter for a minimum compares; None is less than any minimum."""
        return {
            **{name: attrgetter(field) for name, field in MINIMUMS.items()},
            "min_gpu_count": self.gpu_count,
            "min_vram_gb": nominal_vram,
            "min_total_vram_gb": lambda s: (nominal_vram(s) or 0.0) * self.gpu_count(s),
            "min_cuda": lambda s: version_parts(s.get("cuda_version")),
        }

    def _costs_at_most(self, limit: float, server: Server) -> bool:
        price = self.price(server)
        return price is not None and price * self._with_fees <= limit * ROUNDING_UP

    def _where(self, servers: list[Server]) -> list[Server]:
        where = self._filters.get("where")
        return servers if where is None else [s for s in servers if _call("where", where, s)]

    def _lowest(self, servers: Iterable[Server]) -> float | None:
        prices = [price for s in servers if (price := self.price(s)) is not None]
        return min(prices) * self._with_fees if prices else None

    def _sorted(self, servers: list[Server]) -> list[Server]:
        """Sort servers; equal ones by price, then in the API's order."""
        by_price = sorted(servers, key=lambda s: _last_if_none(self.price(s)))
        sort = self._filters.get("sort", "price")
        keys: dict[str, Callable[[Server], float]] = {
            "price": lambda s: 0.0,
            "price_per_gpu": lambda s: _last_if_none(per_gpu(self.price(s), self.gpu_count(s))),
            "reliability": lambda s: -(s.reliability or 0.0),
            "vram": lambda s: -(nominal_vram(s) or 0.0),
            "download": lambda s: -(s.download_mbps or 0.0),
            "rating": lambda s: -(s.rating or 0.0),
        }
        key = partial(_call, "sort", sort) if callable(sort) else keys[sort]
        return sorted(by_price, key=key)


def _at_least(number: Callable[[Server], Any], least: Any, server: Server) -> bool:
    value = number(server)
    return value is not None and bool(value >= least)


def _first_failed(checks: list[tuple[str, Check]], server: Server) -> int:
    """Return the index of the first check that a server does not pass, or their number."""
    for index, (_, check) in enumerate(checks):
        if not check(server):
            return index
    return len(checks)


def _call(name: str, function: Callable[[Server], Any], server: Server) -> Any:
    """Call a function of the user. Its exception names the server in a note."""
    try:
        return function(server)
    except Exception as error:
        add_note(error, f"{name}= was called with server {server.id}")
        raise


def _last_if_none(number: float | None) -> float:
    return math.inf if number is None else number


# ==================================================================================================
# market.spot
#
# Read the spot market of a server: its offers, and a bid that would win.
# ==================================================================================================


class SpotOffer(Record):
    """One bid for a server: a dict with the fields of the API and ``usd_per_hour``."""

    @property
    def id(self) -> int | None:
        """The number of the offer."""
        return whole_id(self.get("offer_id"))

    @property
    def usd_per_hour(self) -> float | None:
        """The bid in USD per hour; None if there is no exchange rate."""
        return finite(self.get("usd_per_hour"))

    @property
    def currency(self) -> str | None:
        """The currency of the bid."""
        return text_of(self, "currency")

    @property
    def is_mine(self) -> bool:
        """True if the bid is of this account."""
        return self.get("my") is True

    @property
    def is_active(self) -> bool:
        """True if the bid rents the server now."""
        return self.get("active") is True


class SpotMarket(Record):
    """The response to ``spot_marketplace``: a dict with ``market``, and typed properties."""

    SHOWN = ("minimum_usd", "lowest_winning_usd")

    @property
    def offers(self) -> list[SpotOffer]:
        """The bids for the server, in the API's order."""
        return [SpotOffer(offer) for offer in dicts(part_of(self, "market", "offers"))]

    @property
    def minimum_usd(self) -> float | None:
        """The lowest bid that the host accepts in any currency, in USD per hour, or None."""
        pricing = part_of(self, "market", "server", "min_pricing")
        if not isinstance(pricing, dict):
            return None
        rates = market_rates(self)
        bids = [rates.usd(positive(amount), currency) for currency, amount in pricing.items()]
        return min((bid / HOURS_PER_DAY for bid in bids if bid), default=None)

    @property
    def lowest_winning_usd(self) -> float | None:
        """The bid, in USD per hour, that a new bid must exceed to rent the server, or None.

        It is the highest bid of other accounts; without one, the lowest that the host accepts.
        """
        bids = [offer.usd_per_hour for offer in self.offers if not offer.is_mine]
        return max((bid for bid in [*bids, self.minimum_usd] if bid), default=None)

    def _summary(self) -> dict[str, Any]:
        return {"offers": len(self.offers), **super()._summary()}


def market_rates(response: dict[str, Any]) -> ExchangeRates:
    """Return the exchange rates in a response to ``spot_marketplace``."""
    rates = ExchangeRates()
    rates.update(part_of(response, "market", "currency_rates_in_usd"))
    return rates


def to_spot_market(response: dict[str, Any]) -> SpotMarket:
    """Convert a response to ``spot_marketplace``, and add ``usd_per_hour`` to its offers.

    A ``bid`` is per day in the offer's currency. The exchange rates are in the same response.
    """
    spot_market = SpotMarket(response)
    spot_market._wire = response
    market = response.get("market")
    if not isinstance(market, dict) or not isinstance(market.get("offers"), list):
        return spot_market
    live, rates = is_live(response), market_rates(response)

    def hourly(offer: dict[str, Any]) -> float | None:
        if live:
            per_day = rates.usd(positive(offer.get("bid")), offer.get("currency"))
            return None if per_day is None else per_day / HOURS_PER_DAY
        stated = (positive(offer.get(k)) for k in ("usd_per_hour", "spot_price", "price"))
        return next((price for price in stated if price is not None), None)

    spot_market["market"] = {
        **market,
        "offers": [{**offer, "usd_per_hour": hourly(offer)} for offer in dicts(market["offers"])],
    }
    return spot_market


def suggested_bid(market: SpotMarket, server: Any, margin: float) -> float | None:
    """Return a bid in USD per hour that would rent a server now, or None if no bid is known.

    Parameters:
        market: the spot market of the server.
        server: the server; an id has no prices.
        margin: what to add, as a fraction of the bid.
    """
    listed = server if isinstance(server, Server) else Server()
    lowest = market.lowest_winning_usd
    if market.minimum_usd is None:
        lowest = max((bid for bid in (lowest, listed.spot_usd_per_hour) if bid), default=None)
    if lowest is None:
        return None
    on_demand, bid = listed.usd_per_hour, lowest * (1 + margin)
    return min(bid, on_demand) if on_demand is not None and on_demand > lowest else bid


# ==================================================================================================
# market.summary
#
# Summarize the marketplace by GPU model, and estimate what a rental costs.
# ==================================================================================================


Prices = tuple[float | None, float | None]  # USD per hour for one GPU: on demand, spot
Listed = tuple[int, bool, Prices]  # a server: its GPUs of a model, whether it is free, its prices
NO_PRICES: Prices = (None, None)
HIGHEST_PERCENT = 100.0  # a higher fee is not valid


class ModelSummary(NamedTuple):
    """One GPU model on the marketplace. Prices are in USD per hour for one GPU."""

    gpu: str
    servers: int
    servers_free: int
    gpus: int
    gpus_free: int
    lowest_usd: float | None
    median_usd: float | None
    p90_usd: float | None
    spot_lowest_usd: float | None
    spot_median_usd: float | None
    spot_p90_usd: float | None


def summarize(
    marketplace: Marketplace, *, include_rented: bool = False, include_fees: bool = False
) -> list[ModelSummary]:
    """Return a summary of each GPU model, the one with the most GPUs first.

    Parameters:
        marketplace: the list of servers.
        include_rented: include the prices of rented servers; the counts always have them.
        include_fees: add the published fees to the prices.
    """
    models, spellings = dict[str, list[Listed]](), Counter[str]()
    for names, server in zip(marketplace.gpus, marketplace, strict=True):
        spellings.update(set(names))
        free = not server.rented
        folded = [fold_name(name) for name in names]
        for name in set(folded):
            count, prices = folded.count(name), NO_PRICES
            if count == len(folded):  # all GPUs are of this model
                count = server.gpu_count or count
                if free or include_rented:
                    usd = (server.usd_per_hour, server.spot_usd_per_hour)
                    prices = (per_gpu(usd[0], count), per_gpu(usd[1], count))
            models.setdefault(name, []).append((count, free, prices))
    shown = common_spellings(spellings)
    rows = [_row(shown[model], listed, include_fees) for model, listed in models.items()]
    return sorted(rows, key=lambda row: (-row.gpus, row.gpu))


def _row(gpu: str, listed: list[Listed], include_fees: bool) -> ModelSummary:
    numbers: list[float | None] = []
    for spot in (False, True):
        fee = published_fee(spot) if include_fees else 0.0
        found = [price for _, _, prices in listed if (price := prices[spot]) is not None]
        prices = sorted(with_fee(price, fee) for price in found)
        numbers += [quantile(prices, share) for share in (0.0, 0.5, 0.9)]
    gpus, free = [n for n, _, _ in listed], [n for n, is_free, _ in listed if is_free]
    return ModelSummary(gpu, len(gpus), len(free), sum(gpus), sum(free), *numbers)


def quantile(ordered: list[float], share: float) -> float | None:
    """Return a quantile of sorted numbers, with linear interpolation; None if there are none."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place % 1)


class CostEstimate(NamedTuple):
    """The cost of a rental. An amount is None if a price or an exchange rate is not known.

    Attributes:
        server_id, hours, currency: as for ``CloreClient.estimate_cost``.
        usd_per_hour: the price or bid in USD per hour, without fees.
        base_usd, renter_fee_usd, creation_fee_usd, total_usd: the amounts in USD.
        base, renter_fee, creation_fee, total: the same amounts in ``currency``.
    """

    server_id: int | None
    hours: float
    currency: str
    usd_per_hour: float | None
    base_usd: float | None
    renter_fee_usd: float | None
    creation_fee_usd: float
    total_usd: float | None
    base: float | None
    renter_fee: float | None
    creation_fee: float | None
    total: float | None


def estimate(
    market: Market,
    server: Server,
    hours: float,
    *,
    currency: str,
    spot: bool,
    spot_price: float | None,
) -> CostEstimate:
    """Estimate the cost of a rental; see ``CloreClient.estimate_cost``."""
    rate = listed_rate(server, currency) or market.data.rates.rate(currency)
    price = spot_price if spot_price is not None else price_in(server, spot, currency)
    fraction, creation_usd = account_fees(market.fees(), spot, currency, rate)
    base = None if price is None else price * hours
    fee = None if base is None else base * fraction
    creation = creation_fee_after(hours * 3600.0, creation_usd)
    total = None if base is None or fee is None else base + fee + creation

    def in_currency(usd: float | None) -> float | None:
        return usd / rate if usd is not None and rate else None

    return CostEstimate(
        server.id, hours, currency, price, base, fee, creation, total,
        in_currency(base), in_currency(fee), in_currency(creation), in_currency(total),
    )  # fmt: skip


def account_fees(
    response: dict[str, Any], spot: bool, currency: str, rate: float | None
) -> tuple[float, float]:
    """Return the renter's fee as a fraction of the price, and the creation fee in USD.

    Parameters:
        response: the response to ``renter_fees``; published fees replace missing ones.
        spot, currency: the kind of the order.
        rate: USD for one unit of the currency.
    """
    kind = "spot" if spot else "on_demand"
    percent = finite(part_of(response, "renter_fees", kind, "base", currency))
    fraction = published_fee(spot)
    if percent is not None and 0 <= percent <= HIGHEST_PERCENT:
        fraction = percent / 100
    amount = finite(part_of(response, "creation_fees", kind, currency))
    if amount is None or amount < 0 or rate is None:
        return fraction, CREATION_FEE
    return fraction, amount * rate


# ==================================================================================================
# orders.credentials
#
# Save how to log in to orders, and find the order of a saved purchase.
# ==================================================================================================


CREDENTIALS_FOLDER = "credentials"  # in the state folder
CREDENTIALS_SCHEMA = 1  # a later version adds fields, and keeps these
_SAVED_FIELDS = ("ssh_password", "jupyter_token", "key_fingerprint")
PURCHASE_OVER = 3600.0  # seconds; a purchase without an order after this time has failed
ORDER_OVER = 86_400.0  # seconds; an order that is missing from the lists for so long has ended
# The allowed difference between the creation time of an order, by the server's clock, and the time
# of its entry, by this machine's clock. All in seconds.
CLOCKS_APART = 300.0
CLOCKS_COMPARED = 5.0  # if the entry has the difference between the clocks
LATEST_ORDER = 180.0  # a proxy can delay a request


def public_key_fingerprint(public_key: str) -> str | None:
    """Return the fingerprint of a line of a ``.pub`` file, as ``ssh-keygen -l`` prints it."""
    try:
        blob = base64.b64decode(public_key.split()[1], validate=True)
    except (ValueError, IndexError):
        return None
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def login_fields(sent: dict[str, str]) -> dict[str, str]:
    """Return what to remember of the password, key and token that were sent with an order."""
    names = ("ssh_password", "jupyter_token")
    fields: dict[str, str] = {name: Secret(sent[name]) for name in names if name in sent}
    if found := public_key_fingerprint(sent.get("ssh_key", "")):
        fields["key_fingerprint"] = found
    return fields


def same_purchase(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Return whether an order can be the result of a purchase. Missing fields are ignored."""
    fields = (
        (order.get("image"), str, image),
        (order.get("currency"), str, currency),
        (order.get("spot"), bool, spot),
    )
    return all(not isinstance(value, kind) or value == wanted for value, kind, wanted in fields)


def can_be_order_of(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Return whether an order still runs and can be the result of a purchase."""
    return not order.has_ended and same_purchase(order, image, currency, spot)


def purchase_fields(
    server_id: int, wanted: Any, before: Collection[int], server_clock: float | None
) -> dict[str, Any]:
    """Return the fields by which :func:`matches_entry` finds the order of a purchase.

    Parameters:
        server_id: the server.
        wanted: has the ``image``, the ``currency``, and whether the order is ``spot``.
        before: ids of older orders.
        server_clock: seconds by which the server's clock is ahead, or None.
    """
    return {
        "server_id": server_id,
        "started": time.time(),
        "server_clock": server_clock,
        "image": wanted.image,
        "currency": wanted.currency,
        "spot": wanted.spot,
        "before": sorted(before),
    }


def matches_entry(data: dict[str, Any], order: Order) -> bool:
    """Return whether an order can be the result of an entry without an order id."""
    before = data.get("before")
    if order.server_id != whole_id(data.get("server_id")):
        return False
    if isinstance(before, list) and order.id in before:
        return False
    if not can_be_order_of(order, data.get("image"), data.get("currency"), data.get("spot")):
        return False
    started, made = finite(data.get("started")), order.started_at
    if started is None or made is None:
        return False
    ahead = finite(data.get("server_clock"))
    apart = CLOCKS_APART if ahead is None else CLOCKS_COMPARED
    return -apart <= made - started - (ahead or 0.0) <= LATEST_ORDER + apart


class SavedLogin:
    """Keep the credentials of one purchase until its order has an id."""

    def __init__(self, fields: dict[str, str]) -> None:
        self.fields = fields
        self.path: Path | None = None

    def drop(self) -> None:
        """Forget the purchase, which has no order. Safe to repeat."""
        if self.path is not None:
            remove_file(self.path)
            self.path = None


class Credentials:
    """Keep the credentials of orders, in one file for each order.

    The name of a file has the account and the id of the order. Before the id is known, it has the
    server instead, and the content has the fields by which the order can be found. So the
    credentials survive a process that is killed at any time.

    Parameters:
        folder: returns the state folder, or None to keep the credentials in memory only.
    """

    def __init__(self, folder: Callable[[], Path | None]) -> None:
        self._state_folder = folder
        self._known: dict[tuple[str, int], dict[str, str]] = {}

    @property
    def _folder(self) -> Path | None:
        folder = self._state_folder()
        return None if folder is None else folder / CREDENTIALS_FOLDER

    def save(self, account: str, sent: dict[str, str], fields: dict[str, Any]) -> SavedLogin:
        """Save the credentials of a purchase before it is sent.

        Parameters:
            account: the digest of the account.
            sent: the password, key and token of the order.
            fields: those by which :func:`matches_entry` finds the order.
        """
        saved = SavedLogin(login_fields(sent))
        if (folder := self._folder) is None or not saved.fields:
            return saved
        name = f"{random.SystemRandom().getrandbits(64):016x}"
        path = folder / f"{account[:12]}-server-{fields['server_id']}-{name}.json"
        data = {"schema": CREDENTIALS_SCHEMA, "account": account, **fields, **saved.fields}
        try:
            make_private_folder(folder)
            replace_file(path, json.dumps(data))
            saved.path = path
        except OSError as error:
            _warn(f"the login of an order can't be saved in {folder}", error)
        return saved

    def assign(self, account: str, order_id: int, saved: SavedLogin) -> None:
        """Record which order a purchase has made."""
        self._known[account, order_id] = saved.fields
        path, saved.path = saved.path, None
        if path is None:
            return
        try:
            path.replace(self._path(path.parent, account, order_id))
        except FileNotFoundError:  # another process has found the order, or ended it
            pass
        except OSError as error:
            _warn(f"{path} can't be renamed", error)

    def of(self, account: str, order_id: int | None, order: Order | None = None) -> dict[str, str]:
        """Return the known login data of an order; an empty dict if none is known.

        Parameters:
            account: the digest of the account.
            order_id: the order.
            order: its record, which can identify the purchase of a killed process.
        """
        if order_id is None:
            return {}
        if (known := self._known.get((account, order_id))) is not None:
            return known
        if (folder := self._folder) is None:
            return {}
        found = self._read(self._path(folder, account, order_id), account)
        if found is None and order is not None:
            found = self._of_lost_purchase(folder, account, order_id, order)
        if found is None:
            return {}
        return self._known.setdefault((account, order_id), _fields_of(found))

    def has_other_login(self, account: str, order_id: int, sent: dict[str, str]) -> bool:
        """Return whether an order is known to have a different login from the one in ``sent``."""
        known = self.of(account, order_id)
        return bool(known) and known != login_fields(sent)

    def forget(self, account: str, order_ids: Iterable[int]) -> None:
        """Forget orders that have ended."""
        ended = set(order_ids)
        for order_id in ended:
            self._known.pop((account, order_id), None)
        if (folder := self._folder) is not None:
            for order_id in ended & self._saved_orders(folder, account):
                remove_file(self._path(folder, account, order_id))

    def stale(self, account: str, active: Collection[int]) -> dict[int, float]:
        """Return the age in seconds of each saved order that is old and not active.

        Also remove the purchases that never had an order.
        """
        if (folder := self._folder) is None:
            return {}
        for path in self._files(folder, f"{account[:12]}-server-"):
            if _age(path) > PURCHASE_OVER:
                remove_file(path)
        saved = self._saved_orders(folder, account) - set(active)
        ages = {order_id: _age(self._path(folder, account, order_id)) for order_id in saved}
        return {order_id: age for order_id, age in ages.items() if age > PURCHASE_OVER}

    # --- the files ---

    @staticmethod
    def _path(folder: Path, account: str, order_id: int) -> Path:
        return folder / f"{account[:12]}-{order_id}.json"

    @staticmethod
    def _files(folder: Path, start: str) -> list[Path]:
        try:
            return [folder / name for name in os.listdir(folder) if name.startswith(start)]
        except FileNotFoundError:
            return []
        except OSError as error:
            _warn(f"{folder} can't be read", error)
            return []

    def _saved_orders(self, folder: Path, account: str) -> set[int]:
        shape = rf"{account[:12]}-([0-9]{{1,18}})\.json"
        names = (re.fullmatch(shape, p.name) for p in self._files(folder, account[:12]))
        return {int(name[1]) for name in names if name is not None}

    @staticmethod
    def _read(path: Path, account: str) -> dict[str, Any] | None:
        try:
            data = read_state_file(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            # The text of a JSON error contains no part of the file.
            _warn(f"{path} can't be read", error)
            return None
        return data if data.get("account") == account else None

    def _of_lost_purchase(
        self, folder: Path, account: str, order_id: int, order: Order
    ) -> dict[str, Any] | None:
        """Return the newest saved purchase that can have made this order, and assign it."""
        fitting = [
            (path, data)
            for path in self._files(folder, f"{account[:12]}-server-{order.server_id}-")
            if (data := self._read(path, account)) is not None and matches_entry(data, order)
        ]
        if not fitting:
            return None
        path, found = max(fitting, key=lambda purchase: finite(purchase[1].get("started")) or 0.0)
        try:
            path.replace(self._path(folder, account, order_id))
        except OSError as error:
            _warn(f"{path} can't be renamed", error)
        return found


def _fields_of(data: dict[str, Any]) -> dict[str, str]:
    return {n: Secret(data[n]) for n in _SAVED_FIELDS if isinstance(data.get(n), str)}


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def remove_file(path: Path) -> None:
    """Remove a file of the state folder; only warn if that fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        warn_once(f"{path} can't be removed: {reason}; it holds the login of an order: remove it")


def _warn(what: str, error: object) -> None:
    reason = getattr(error, "strerror", None) or error
    warn_once(f"{what}: {reason}; another process can't log in without the password or the key")


# ==================================================================================================
# orders.account
#
# Read the orders of an account, and remember which belong to which purchase.
# ==================================================================================================


SHORTEST_LIMIT = 1.0  # seconds; no request has a shorter time limit
OrderState = Literal["active", "ended", "absent"]  # of an order in the two order lists
LONGEST_CHECK = 3.0  # seconds to check if an order has ended, after a failed login


class OrdersClient(Requester, Protocol):
    """List the parts of ``CloreClient`` that the orders use."""

    timeout: Timeout
    rate_limit: float
    backoff: float
    order_lag: float
    server_clock: float | None
    max_usd_per_hour: float | None
    max_active_orders: int | None

    @property
    def api_key(self) -> str | None: ...


class Claims:
    """Record which purchase of this process made each order of an account.

    Purchases of the same server are made one after the other, so that one can't claim the order of
    another. Each change is one atomic step, because an interrupt can come at any time.

    Attributes:
        unresolved: server id -> a purchase whose outcome is not known.
        rented: ids of the orders that belong to rentals.
        clock_offset: the creation time of a new order minus the server's clock, in seconds; the
            lowest value so far, 0 or negative.
    """

    def __init__(self) -> None:
        self._taken: dict[int, object] = {}  # order id -> its purchase
        self._locks: dict[int, threading.Lock] = {}
        self.unresolved: dict[int, Any] = {}
        self.rented: set[int] = set()
        self.clock_offset = 0.0

    def lock(self, server_id: int) -> threading.Lock:
        """Return the lock to hold while a server is ordered."""
        return self._locks.setdefault(server_id, threading.Lock())

    def take(self, order_id: int, purchase: object) -> bool:
        """Claim an order. Return False if another purchase has it."""
        return self._taken.setdefault(order_id, purchase) is purchase

    def free(self, orders: list[Order], purchase: object) -> list[Order]:
        """Return the ``orders`` that no other purchase has claimed, the newest last."""
        found = {o.id: o for o in orders if self._taken.get(o.id or 0, purchase) is purchase}
        return [found[order_id] for order_id in sorted(i for i in found if i is not None)]


class AccountOrders:
    """Read the orders of an account, and remember those that this client knows.

    Attributes:
        client: makes the requests.
        market: has the exchange rates for prices in USD.
        made: order id -> the order, as this client made it.
        credentials: the passwords, keys and tokens that were sent with orders.
        cancelled: ids of the orders that this client cancelled.
        ended: ids of the orders that have ended.
        bid_listeners: order id -> a function to call with a new bid, in USD per hour.
    """

    def __init__(self, client: OrdersClient, market: Market, credentials: Credentials) -> None:
        self.client = client
        self.market = market
        self.credentials = credentials
        self.made: dict[int, Order] = {}
        self.cancelled: set[int] = set()
        self.ended: set[int] = set()
        self.bid_listeners: dict[int, Callable[[float], None]] = {}
        self._seen: set[int] = set()  # ids of the orders that this client has seen active
        self._own_claims = Claims()

    def shared_with(self, client: OrdersClient, market: Market) -> AccountOrders:
        """Return these orders for a copy of the client."""
        twin = copy.copy(self)
        twin.client, twin.market = client, market
        return twin

    @property
    def account(self) -> str:
        """A digest that identifies the account in the state folder."""
        return account_digest(self.client.base_url, self.client.api_key)

    @property
    def claims(self) -> Claims:
        """The claims of the account, shared by its clients; without a key, this client's own."""
        if not self.client.api_key:
            return self._own_claims
        return this_process.of_account(Claims, "claims", self.account)

    @property
    def known(self) -> set[int]:
        """The ids of all orders that this client has made, seen active, or cancelled."""
        return {*self.made, *self._seen, *self.cancelled}

    def read(self, completed: bool, **options: Any) -> tuple[list[Order], dict[str, Any]]:
        """Read one of the two order lists, and return its orders and the whole response.

        Parameters:
            completed: read the list that includes the orders that have ended.
            **options: arguments of ``_request``.
        """
        params = {"return_completed": "true"} if completed else None
        response = self.client._request("GET", "/v1/my_orders", params=params, **options)
        if isinstance(response, Envelope) and not isinstance(response.get("orders"), list):
            # A response without a list does not mean that there are no orders.
            raise InvalidResponseError(
                -1, "the response has no list of orders", response, endpoint="/v1/my_orders"
            )
        data = self.market.data
        data.observe(is_live(response))
        orders = to_orders(response, self.cancelled, data.rates)
        self._seen.update(o.id for o in orders if o.id is not None and not o.has_ended)
        self._record_ended({o.id for o in orders if o.id is not None and o.has_ended})
        return orders, response

    def _record_ended(self, order_ids: set[int]) -> None:
        """Record that orders have ended, and forget their credentials."""
        if order_ids:
            self.ended.update(order_ids)
            self.credentials.forget(self.account, order_ids)

    def record_cancelled(self, order_ids: list[int]) -> None:
        """Record that the API accepted the cancels of orders, and forget their credentials."""
        self.cancelled.update(order_ids)
        self.credentials.forget(self.account, order_ids)

    def active(self) -> list[Order]:
        """Read the orders that have not ended."""
        return [order for order in self.read(completed=False)[0] if not order.has_ended]

    def find(self, order_id: int) -> Order | None:
        """Return an order, or None. The ended orders are read only if it is not active."""
        for completed in (False, True):
            for order in self.read(completed)[0]:
                if order.id == order_id:
                    return order
        return None

    # --- logins ---

    def login_of(self, order: Order) -> dict[str, str]:
        """Return the known login data of an order."""
        if self.has_ended(order.id):  # a list can still show it as active
            return {}
        return self.credentials.of(self.account, order.id, order)

    def with_login(self, order: Order) -> Order:
        """Return an order with its password and token, if they are known."""
        if not order.has_ended:
            for name, text in self.login_of(order).items():
                if name != "key_fingerprint":
                    order[name] = str(text)
        return order

    def has_ended(self, order_id: int | None) -> bool:
        """Return whether this client knows that an order has ended. Nothing is sent."""
        return order_id in self.ended or order_id in self.cancelled

    def check_not_ended(self, order_id: int) -> None:
        """Raise an error if this client knows that an order has ended. Nothing is sent."""
        if self.has_ended(order_id):
            raise ended_error(order_id, "cancelled" if order_id in self.cancelled else "expired")

    def running(self, order_id: int) -> Order:
        """Read an order that has not ended. If it is known to have ended, send no request."""
        self.check_not_ended(order_id)
        return self.find_active(order_id)

    def find_active(self, order_id: int) -> Order:
        """Read an order that is not listed as ended.

        Raises:
            OrderEndedError, OrderNotFoundError: the order has ended, or does not exist.
        """
        order = self.find(order_id) or self.made.get(order_id)  # a new one may not be listed yet
        if order is None:
            raise OrderNotFoundError(
                f"there is no order {order_id} in this account, so nothing was done: check "
                "get_orders()",
                order_id=order_id,
            )
        if order.has_ended:
            raise ended_error(order_id, order.status or "", order)
        return order

    def raise_if_ended(self, order_id: int, cause: BaseException) -> None:
        """Check with one request if an order has ended, and raise an error if so.

        Parameters:
            order_id: the order.
            cause: the error after which this is checked.
        """
        self.check_not_ended(order_id)
        if self.client.api_key is None:
            return
        deadline = time.monotonic() + LONGEST_CHECK
        try:
            orders, _ = limited(lambda: self.read(completed=True), deadline=deadline, once=True)
        except CloreError as error:
            logger.debug("the state of order %d is not known: %s", order_id, error)
            return
        for order in orders:
            if order.id == order_id and order.has_ended:
                raise ended_error(order_id, order.status or "", order) from cause

    def tidy_credentials(self, active: set[int]) -> None:
        """Forget the saved credentials of orders that have ended elsewhere.

        Parameters:
            active: ids of the active orders, just read.
        """
        ages = self.credentials.stale(self.account, active)
        if not ages:
            return
        listed = {order.id for order in self.read(completed=True)[0]}  # forgets the ended ones
        over = [i for i, age in ages.items() if i not in listed and age > ORDER_OVER]
        self.credentials.forget(self.account, over)

    # --- the states of orders ---

    def state(self, order_id: int) -> OrderState:
        """Return the state of an order in the two lists.

        Raises:
            OrderNotFoundError: ``order_id`` is the number of a server.
            CloreError: the lists can't be read, or are not complete.
        """
        for completed in (False, True):
            orders, response = self.read(completed)
            for order in orders:
                if order.id == order_id:
                    return "ended" if order.has_ended else "active"
                if order.server_id == order_id and not order.has_ended:
                    raise OrderNotFoundError(
                        f"there is no order {order_id}, which is the server of order {order.id}: "
                        "pass the number of the order",
                        order_id=order_id,
                    )
            listed = response.get("orders")
            ids = [order.id for order in orders if order.id is not None]
            if not isinstance(listed, list) or len(ids) != len(listed):
                incomplete = CloreError(
                    f"the list of orders is incomplete, so the state of order {order_id} is not "
                    "known: try again"
                )
                incomplete.retryable = True
                raise incomplete
        return "absent"

    def active_ids(self) -> list[int]:
        """Return the ids of active orders, and of known orders that are missing from the list."""
        orders, _ = self.read(completed=False)
        active = [order.id for order in orders if order.id is not None and not order.has_ended]
        missing = self.known - set(active) - self.ended
        if missing - self.cancelled:
            self.read(completed=True)  # records the ended ones
        return active + sorted(missing - self.cancelled - self.ended)

    # --- the limits of the user ---

    def check_price(self, usd_per_hour: float | None, what: str) -> None:
        """Refuse a price that is above ``max_usd_per_hour`` or not known."""
        limit = self.client.max_usd_per_hour
        if limit is None or (usd_per_hour is not None and usd_per_hour <= limit * (1 + 1e-9)):
            return
        found = f"the price of {what} is not known"
        if usd_per_hour is not None:
            found = f"{what} costs {usd_per_hour:g} USD per hour"
        raise SpendingLimitError(
            f"{found}, and max_usd_per_hour is {limit:g}, so nothing was ordered or bid: choose "
            "another server or price, or raise the limit"
        )

    def check_count(self) -> None:
        """Refuse a new order if ``max_active_orders`` are active."""
        limit = self.client.max_active_orders
        if limit is None or len(active := self.active_ids()) < limit:
            return
        raise SpendingLimitError(
            f"{len(active)} orders are active ({', '.join(map(str, sorted(active)))}), and "
            f"max_active_orders is {limit}, so nothing was ordered: cancel one, or raise the limit"
        )

    def notify_bid(self, order_id: int, usd_per_hour: float) -> None:
        """Report the new price of an order to its budget."""
        if (listener := self.bid_listeners.get(order_id)) is not None:
            listener(usd_per_hour)


def ended_error(order_id: int, status: str, order: Order | None = None) -> OrderEndedError:
    """Make the error for a call that needs a running order."""
    return OrderEndedError(
        f"Order {order_id} has ended, with status {status}: its container and its files are gone, "
        "so rent another server",
        order_id=order_id,
        status=status,
        order=order,
    )


# ==================================================================================================
# orders.bid
#
# Change the bid of a spot order.
# ==================================================================================================


LOWERING_INTERVAL = 600.0  # seconds between two lower bids, if the API does not say
STEP_SHARE = 1 - 1e-6  # the fraction of the largest step to use, because of rounding errors


def set_spot_price(
    orders: AccountOrders, order_id: int, usd_per_hour: float, allow_above: bool
) -> bool:
    """Change the bid of an order; see ``CloreClient.set_spot_price``."""
    return _accepted(_send_bid(orders, orders.find_active(order_id), usd_per_hour, allow_above))


def lower_spot_price(orders: AccountOrders, order_id: int, target: float, wait: bool) -> float:
    """Lower the bid of an order step by step; see ``CloreClient.lower_spot_price``."""
    bid = target
    while True:
        order = orders.find_active(order_id)
        current = _current_bid(orders, order)
        if current is not None and bid >= current:
            return current
        if current is None and in_documented_form(order) and not order.has_ended:
            raise _unknown_bid(order)  # the target could be above it
        try:
            response = _send_bid(orders, order, bid, allow_above=False)
            if not _accepted(response):  # the documented form refuses with code 0
                refusal = {**response, "code": 6}
                raise api_error(refusal, http_status=200, endpoint="/v1/set_spot_price")
        except SpotPriceStepError as error:
            step = _step_below(orders, order, current, error)
            if bid != target or step is None or step <= target:
                raise
            bid = step
            continue
        except SpotPriceTooSoonError as error:
            if not wait:
                raise
            time.sleep(error.retry_after or LOWERING_INTERVAL)
        else:
            if bid == target or not wait:
                return bid
        bid = target  # the exchange rate can have changed, so compute the next step again


def _current_bid(orders: AccountOrders, order: Order) -> float | None:
    """Return the bid of an order in USD per hour, by a fresh exchange rate."""
    currency = wire_currency(str(order.get("currency")))
    if order.server_id is not None and currency is not None and not in_documented_form(order):
        orders.market.ensure_rates(order.server_id, currency)
    return order.usd_per_hour


def _unknown_bid(order: Order) -> RateUnknownError:
    error = RateUnknownError(
        f"the bid of order {order.id} in USD is not known, because the API shows it in "
        f"{order.currency} and lists no exchange rate, so nothing was bid: call set_spot_price() "
        "with a price below your bid, which needs no exchange rate, or pay spot orders in USD"
    )
    error.retryable = False
    return error


def _step_below(
    orders: AccountOrders, order: Order, current: float | None, error: SpotPriceStepError
) -> float | None:
    """Return the lowest bid in USD per hour that the step of a refusal allows, or None."""
    if current is None or error.max_step is None:
        return None
    step = error.max_step
    if not in_documented_form(order):
        rate = orders.market.data.rates.rate(order.get("currency"))
        step = bid_per_hour(step, rate or 0.0)
    return current - step * STEP_SHARE if step > 0 else None


def _accepted(response: dict[str, Any]) -> bool:
    return response.get("error") in (None, "")


def _send_bid(
    orders: AccountOrders, order: Order, usd_per_hour: float, allow_above: bool
) -> dict[str, Any]:
    """Check a bid, send it, and report it to the order's budget. Return the response."""
    order_id = order.id or 0
    bid = _wire_bid(orders, order, usd_per_hour, allow_above)
    response: dict[str, Any] = {}
    try:
        body = {"order_id": order_id, "desired_price": bid}
        response = orders.client._request("POST", "/v1/set_spot_price", json=body)
    except SpotPriceTooSoonError as error:
        # After a lost response, the API refuses the retry because the first request took effect.
        if error.sends <= 1 or not _shows_bid(orders, order, bid):
            raise
    except (CloreConnectionError, DatabaseError, InvalidResponseError):
        # The bid may have taken effect, so a budget counts the higher price.
        orders.notify_bid(order_id, max(usd_per_hour, order.usd_per_hour or 0.0))
        raise
    if _accepted(response):
        orders.notify_bid(order_id, usd_per_hour)
    return response


def _wire_bid(orders: AccountOrders, order: Order, usd_per_hour: float, allow_above: bool) -> float:
    """Check a bid, and return it in the unit of the API."""
    if order.is_spot is False:
        raise ValueError(
            f"order_id {order.id} is not a spot order, so nothing was bid: only spot orders have a "
            "bid"
        )
    orders.check_price(usd_per_hour, f"the bid for order {order.id}")
    if in_documented_form(order):
        orders.market.data.check_bid_price("new_price", usd_per_hour, order.server_id, allow_above)
        return usd_per_hour
    currency, server_id = order.get("currency"), order.server_id
    if server_id is None or not isinstance(currency, str):
        raise OrderNotFoundError(
            f"order {order.id} shows no server or currency, so nothing was bid: try again later",
            order_id=order.id,
        )
    currency = check_currency("the order's currency", currency)
    return orders.market.wire_bid("new_price", usd_per_hour, server_id, currency, allow_above)


def _shows_bid(orders: AccountOrders, before: Order, bid: float) -> bool:
    """Return whether an order now has the bid that was sent."""
    after = orders.find(before.id or 0)
    shown = finite(after.wire.get("price")) if after is not None else None
    if shown is None:
        return False
    if in_documented_form(before):
        # The price is in the order's currency and the bid in USD: only a change can be seen.
        return shown != finite(before.wire.get("price"))
    return abs(shown - bid) <= max(1e-6 * bid, 1e-8)  # bitcoin has eight decimals


# ==================================================================================================
# orders.cancel
#
# Cancel orders until the API accepts it, and confirm that they have ended.
#
# An order has ended when the list of completed orders says so, or when its cancel was accepted and
# it
# is missing from both lists for longer than ``order_lag``. One read is not enough, because a list
# can
# be empty for a moment.
# ==================================================================================================


MAX_ISSUE = 2048  # characters of ``issue`` that the API accepts
# A cancelled order can stay in the active list for 2 to 20 seconds (seen on the live API).
SETTLE_TIMEOUT = 30.0
MAX_CANCELS = 64  # ids that the API accepts in one ``cancel_orders``
FIRST_READ_PAUSE = 0.02  # seconds between the first two reads of the lists; it doubles
LONGEST_READ_PAUSE = 1.0
CANCEL_AGAIN_AFTER = 30.0  # seconds; an order that still looks active is cancelled again
CONFIRM_AT_LEAST = 30.0


class Cancellation:
    """Cancel one order, and follow its state in the order lists.

    Attributes:
        order_id: the order.
        failure: the error of the last cancel, or None.
    """

    def __init__(self, orders: AccountOrders, order_id: int, issue: str | None = None) -> None:
        self.order_id = order_id
        self.failure: Exception | None = None
        self._orders = orders
        self._issue = issue
        self._may_be_accepted = False  # after a lost response
        self._state: OrderState | None = None  # None if the last read of the lists failed
        self._absent_since: float | None = None
        self._read_error: Exception | None = None
        self._sent_at = -math.inf
        self._pause = max(0.001, 2 * orders.client.backoff)  # before the next cancel

    @property
    def accepted(self) -> bool:
        """True if the API accepted a cancel; the order costs nothing from then on."""
        return self.order_id in self._orders.cancelled

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
                self._may_be_accepted = True
            raise
        self._accept()
        logger.info("order %d was cancelled", self.order_id)

    def run(
        self,
        deadline: Callable[[], float],
        *,
        confirm: bool,
        retry_refused: bool = True,
        stop: Callable[[], bool] = lambda: False,
    ) -> CloreError | None:
        """Send the cancel until it is accepted, and read the lists until the order has ended.

        Parameters:
            deadline: returns the monotonic time at which to give up.
            confirm: wait until the order has ended; else an accepted cancel is enough.
            retry_refused: continue if the API refuses to cancel an active order.
            stop: returns whether to give up at once.

        Returns:
            None on success, else the error for the user.
        """
        read_pause = FIRST_READ_PAUSE
        while True:
            self._send_if_due(deadline())
            if self._done and not confirm:
                return None
            if isinstance(self.failure, ConfigurationError):
                return self._unconfirmed()
            try:
                if self._check_lists(deadline()):
                    return None
            except OrderNotFoundError as error:
                return error
            remaining = deadline() - time.monotonic()
            if remaining <= 0 or stop() or (self._refused and not retry_refused):
                return self._unconfirmed()
            waits_for_cancel = retry_refused and not self._done
            pause = max(self._next_send() - time.monotonic(), 0) if waits_for_cancel else read_pause
            until = time.monotonic() + min(pause, remaining)
            _sleep_until(until, lambda: stop() or time.monotonic() >= deadline())
            read_pause = min(read_pause * 2, LONGEST_READ_PAUSE)

    def _unconfirmed(self) -> CancelUnconfirmedError:
        """Make the error for an order that may still be running."""
        if self._done:
            what = "was cancelled, but it is not confirmed that it has ended"
            why, cause = "", self._read_error
        else:
            what, why, cause = "could not be cancelled", f" ({self.failure})", self.failure
        error = CancelUnconfirmedError(
            f"order {self.order_id} {what}: it may still be running, and cost money, so call "
            f"cancel_order({self.order_id}) again, which is safe to repeat{why}",
            order_ids=(self.order_id,),
        )
        error.__cause__ = cause
        return error

    # --- the cancel ---

    @property
    def _done(self) -> bool:
        """True if the last cancel was accepted."""
        return self.accepted and self.failure is None

    @property
    def _refused(self) -> bool:
        """True if the API clearly refused to cancel an order that is active."""
        return self._state == "active" and not (self.accepted or self._may_be_accepted)

    def _accept(self) -> None:
        self.failure = None
        self._orders.record_cancelled([self.order_id])

    def _next_send(self) -> float:
        """Return the monotonic time at which to send the cancel."""
        if not self._done:
            return self._sent_at + self._pause if self.failure else -math.inf
        # The cancel was accepted, but the order still looks active.
        return self._sent_at + CANCEL_AGAIN_AFTER if self._state == "active" else math.inf

    def _send_if_due(self, deadline: float) -> None:
        if time.monotonic() < self._next_send():
            return
        was_done, tried_before = self._done, self.failure is not None
        if tried_before:
            self._pause = min(self._pause * 2, LONGEST_CANCEL_PAUSE)
        try:
            limited(self.send, deadline=self._request_deadline(deadline), urgent=True)
        except Exception as error:
            if was_done:  # an earlier cancel was accepted
                self.failure = None
            elif not tried_before:
                logger.warning(
                    "order %d could not be cancelled, retrying: %s", self.order_id, error
                )

    def _request_deadline(self, deadline: float, at_least: float = SHORTEST_LIMIT) -> float:
        """Return the deadline of one request. A request that hangs is sent again after it."""
        now = time.monotonic()
        return now + max(at_least, (deadline - now) / 3)

    # --- the lists ---

    def _check_lists(self, deadline: float) -> bool:
        """Read the lists once, and return whether the order has ended.

        Raises:
            OrderNotFoundError: the account has no such order.
        """
        orders = self._orders
        asked_at = time.monotonic()
        at_least = SHORTEST_LIMIT + 2 * orders.client.rate_limit  # two lists
        self._state = self._read_error = None
        try:
            self._state = limited(
                lambda: orders.state(self.order_id),
                deadline=self._request_deadline(deadline, at_least),
                urgent=True,
            )
        except OrderNotFoundError:
            raise
        except CloreError as error:
            self._read_error = error
            return False
        if self._state == "ended":
            self._accept()
            return True
        if self._state == "active":
            self._absent_since = None
            return False
        self._absent_since = self._absent_since or asked_at
        if time.monotonic() - self._absent_since < orders.client.order_lag:
            return False
        if not self.accepted and self.order_id not in orders.known:
            raise OrderNotFoundError(
                f"there is no order {self.order_id} in this account: check get_orders()",
                order_id=self.order_id,
            ) from self.failure
        return self.accepted


def cancel_order(
    orders: AccountOrders, order_id: int, issue: str | None, settle_timeout: float | None
) -> Cancellation:
    """Cancel an order; see ``CloreClient.cancel_order``.

    Raises:
        OrderNotFoundError, CancelUnconfirmedError, CloreError: as in that method.
    """
    cancellation = Cancellation(orders, order_id, issue)
    try:
        cancellation.send()
    except ConfigurationError:
        raise
    except CloreError as error:
        unsent = isinstance(error, CloreConnectionError) and error.sent_at is None
        if unsent or isinstance(error, (AuthenticationError, RateLimitError)):
            # The order lists can't be read either, or can't have changed.
            error.args = (
                f"{error}\norder {order_id} may still be running, and cost money: cancel it again",
            )
            raise
        until = time.monotonic() + (SETTLE_TIMEOUT if settle_timeout is None else settle_timeout)
        failure = cancellation.run(lambda: until, confirm=False, retry_refused=False)
        if failure is not None:
            raise failure from error
    return cancellation


def cancel_orders(orders: AccountOrders, ids: list[int]) -> dict[str, Any]:
    """Cancel several orders; see ``CloreClient.cancel_orders``."""
    response, sends = _send_cancels(orders, ids)
    if sends > 1 and (failed := _failed(ids, response)):
        # After a lost response, the retry fails for the orders that the first request ended.
        left = {str(i) for i in _still_running(orders, failed, time.monotonic() + SETTLE_TIMEOUT)}
        response["failed_to_cancel"] = [i for i in response["failed_to_cancel"] if str(i) in left]
    return response


def cancel_all(orders: AccountOrders, confirm: bool, timeout: float) -> list[int]:
    """Cancel all active orders of the account; see ``CloreClient.cancel_all``."""
    ids = orders.active_ids()
    failed = _failed(ids, _send_cancels(orders, ids)[0])
    until = time.monotonic() + min(timeout, SETTLE_TIMEOUT)
    if left := _still_running(orders, failed, until):
        raise CancelUnconfirmedError(
            f"orders not cancelled: {', '.join(map(str, left))}; they may still be running, and "
            "cost money, so cancel them again",
            order_ids=left,
        )
    if confirm:
        confirm_ended([Cancellation(orders, order_id) for order_id in ids], timeout)
    return ids


def confirm_ended(cancellations: list[Cancellation], timeout: float) -> None:
    """Wait until the lists show that cancelled orders have ended.

    Raises:
        CancelUnconfirmedError: some orders have not ended in time.
    """
    until = time.monotonic() + timeout
    for number, cancellation in enumerate(cancellations):
        failure = cancellation.run(lambda: until, confirm=True)
        if failure is not None:
            left = tuple(c.order_id for c in cancellations[number:])
            raise CancelUnconfirmedError(
                f"orders cancelled, but still active after {timeout:g}s: "
                f"{', '.join(map(str, left))}; check get_orders(), and cancel them again",
                order_ids=left,
            ) from failure


def _send_cancels(orders: AccountOrders, ids: list[int]) -> tuple[dict[str, Any], int]:
    """Send ``cancel_orders`` in batches; return the last response, and the most sends of a batch.

    The response has the failed ids of all batches. A batch that failed does not stop the others,
    because an order that still runs costs money.
    """
    failure: CloreError | None = None
    listed: list[Any] = []
    unsent: list[int] = []
    response: dict[str, Any] = {"code": 0}
    sends = 1
    for start in range(0, len(ids), MAX_CANCELS):
        batch = ids[start : start + MAX_CANCELS]
        try:
            response = orders.client._request(
                "POST", "/v1/cancel_orders", json={"order_ids": batch}
            )
        except CloreError as error:
            failure = failure or error
            unsent += batch
            continue
        sends = max(sends, getattr(response, "sends", 1))
        failed = _failed(batch, response)
        names = response.get("failed_to_cancel")
        listed += names if isinstance(names, list) else []
        done = [order_id for order_id in batch if order_id not in failed]
        orders.record_cancelled(done)
        logger.info("cancelled orders: %s; not cancelled: %s", done, failed)
    response["failed_to_cancel"] = listed
    if failure is not None:
        if len(ids) > MAX_CANCELS:
            left = ", ".join(map(str, [*unsent, *_failed(ids, response)]))
            failure.args = (
                f"{failure}\norders {left} may still be running, and cost money: cancel them again",
            )
        raise failure
    return response, sends


def _failed(ids: list[int], response: dict[str, Any]) -> list[int]:
    """Return the ids that a response to ``cancel_orders`` names as failed."""
    names = response.get("failed_to_cancel")
    failed = {str(name) for name in names} if isinstance(names, list) else set()
    return [order_id for order_id in ids if str(order_id) in failed]


def _still_running(orders: AccountOrders, ids: Iterable[int], until: float) -> tuple[int, ...]:
    """Cancel orders one by one, and return those that may still be running."""
    return tuple(
        order_id
        for order_id in ids
        if Cancellation(orders, order_id).run(lambda: until, confirm=False)
    )


def confirm_until(started: float, timeout: float) -> float:
    """Return the deadline for confirming cancels that began at ``started`` (monotonic time)."""
    return max(started + timeout, time.monotonic() + min(CONFIRM_AT_LEAST, timeout))


def _sleep_until(moment: float, stop: Callable[[], bool]) -> None:
    while (left := moment - time.monotonic()) > 0 and not stop():
        time.sleep(min(left, 0.1))


# ==================================================================================================
# orders.funds
#
# Compare the wallets of an account with what its orders cost.
# ==================================================================================================


def read_balances(orders: AccountOrders) -> list[Wallet]:
    """Read the wallets, and the exchange rates that their balances in USD need."""
    rates = orders.market.data.rates
    wallets = to_wallets(orders.client._request("GET", "/v1/wallets"), rates)
    if any(wallet.balance and wallet.balance_usd is None for wallet in wallets):
        orders.market.learn_rates(None)
    return wallets


def wallet_of(wallets: list[Wallet], currency: str) -> Wallet | None:
    """Return the first wallet whose name is, or contains, a currency; None if there is none."""
    wanted = {currency.strip().lower(), (wire_currency(currency) or currency).strip().lower()}
    for wallet in wallets:
        if any(part in (wallet.name or "").lower() for part in wanted):
            return wallet
    return None


def balance_of(wallets: list[Wallet], currency: str) -> float:
    """Return the balance of a wallet; see ``CloreClient.get_balance``."""
    wallet = wallet_of(wallets, currency)
    if wallet is None and wire_currency(currency) is None:
        names = ", ".join(short_repr(wallet.name) for wallet in wallets if wallet.name)
        raise ValueError(
            f"currency {short_repr(currency)} is neither a currency nor part of a wallet's name: "
            f"choose one of {names or 'BTC, CLORE and USD'}"
        )
    return _balance(wallet)


def _balance(wallet: Wallet | None) -> float:
    return (wallet.balance if wallet is not None else None) or 0.0


def hours_left(orders: AccountOrders, rented: Any, currency: str) -> float | None:
    """Return how long a wallet lasts; see ``CloreClient.hours_left``."""
    order_id = None if isinstance(rented, Server) else check_order_id("server_or_order", rented)
    active = orders.active()
    hourly: float | None = 0.0
    if isinstance(rented, Server):
        hourly = _hourly_cost(orders, rented, currency)
    else:
        currency = _paid_with(active, order_id)
    if hourly is None:
        return None
    for order in active:
        price = positive(order.get("price"))
        if price is not None and order.get("currency") == currency:
            hourly += with_fee(price, order.fee_rate)
    wallets = to_wallets(orders.client._request("GET", "/v1/wallets"))
    return _balance(wallet_of(wallets, currency)) / hourly if hourly else math.inf


def _paid_with(active: list[Order], order_id: int | None) -> str:
    """Return the currency of an active order."""
    for order in active:
        if order.id == order_id and isinstance(order.get("currency"), str):
            return str(order["currency"])
    raise OrderNotFoundError(
        f"there is no active order {order_id} with a currency in this account: check get_orders()",
        order_id=order_id,
    )


def _hourly_cost(orders: AccountOrders, server: Server, currency: str) -> float | None:
    """Return the on-demand price with the account's fees, in ``currency`` per hour."""
    amount = amount_per_hour(server, currency)
    if amount is None:
        usd = on_demand_usd(server, currency)
        rate = orders.market.data.rates.rate(currency)
        if usd is not None and rate is None:
            orders.market.learn_rates(None)
            rate = orders.market.data.rates.rate(currency)
        amount = usd / rate if usd is not None and rate else None
    fraction, _ = account_fees(orders.market.fees(), False, currency, None)
    return None if amount is None else with_fee(amount, fraction)


def explain_balance(
    orders: AccountOrders,
    error: InsufficientBalanceError,
    currency: str,
    usd_per_hour: float | None,
    spot: bool,
) -> None:
    """Add the wallet, its balance and the cost of one hour to an error.

    Parameters:
        orders: the orders of the account.
        error: the refusal of the API.
        currency: the API's name of the currency of the order.
        usd_per_hour: the price of the order, without fees; None if it is not known.
        spot: whether it is a spot order.
    """
    wallets = read_balances(orders)
    wallet = wallet_of(wallets, currency)
    error.wallet, error.usd_per_hour = currency, usd_per_hour
    error.balance = finite(wallet.balance) if wallet is not None else None
    has = f"wallet {currency} has {error.balance or 0.0:.8g}"
    if wallet is not None and wallet.balance_usd is not None and currency != "USD-Blockchain":
        has += f" ({wallet.balance_usd:.4g} USD)"
    if usd_per_hour is not None:
        hourly = with_fee(usd_per_hour, published_fee(spot))
        has += f", and an hour of this order costs {hourly:.4g} USD with fees"
    others = [
        f"{other.name} has {other.balance:.8g}"
        for other in wallets
        if other.balance and other.name != currency and wire_currency(other.name or "")
    ]
    pay = f"pay with another currency= ({', '.join(others)})" if others else "use another currency="
    error.add_hint(f"{has}: add money, or {pay}")


def learn_order_rates(orders: AccountOrders, read: list[Order]) -> None:
    """Read the exchange rates if an order of the live form can't be priced without them.

    The documented form has no rates: the listed price of the server gives the rate of its order.
    """
    for order in read:
        known = wire_currency(str(order.get("currency"))) and finite(order.get("price")) is not None
        if order.usd_per_hour is not None or not known or order.server_id is None:
            continue
        if order.is_live:
            orders.market.learn_rates(order.server_id)
            return
        listed = orders.market.data.listed.get(order.server_id)
        if listed is not None and not order.is_spot:
            set_listed_price(order, listed)


# ==================================================================================================
# orders.create
#
# Create an order: check the arguments, send them once, and find the new order.
# ==================================================================================================


DEFAULT_PORTS = {"22": "tcp"}
DEFAULT_ENV = {"NVIDIA_VISIBLE_DEVICES": "all"}
PASSWORD_LENGTH = 24
LOGIN = ("ssh_password", "ssh_key", "jupyter_token")
ALL_SERVERS = 0  # no server has this id
# A new order shows up after 2 to 20 seconds (seen on the live API). All in seconds.
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 2.0


def make_password() -> str:
    """Make a random password of letters and digits, which need no quoting."""
    alphabet = string.ascii_letters + string.digits
    source = random.SystemRandom()  # as safe as the module secrets, and imported already
    return Secret("".join(source.choice(alphabet) for _ in range(PASSWORD_LENGTH)))


def _none_if_empty(value: Any) -> Any:
    """Return None for an empty argument. 0 and False stay, so that the checks refuse them."""
    return None if isinstance(value, Sized) and len(value) == 0 else value


def _login(ssh_password: Any, ssh_key: Any, jupyter_token: Any) -> dict[str, str]:
    """Check the password, key and token of an order. An empty password or key counts as None."""
    ssh_password, ssh_key = _none_if_empty(ssh_password), _none_if_empty(ssh_key)
    if ssh_password is not None and ssh_key is not None:
        raise ValueError("ssh_password and ssh_key can't be used together: pass one of them")
    credentials: dict[str, str] = {}
    if ssh_key is not None:
        credentials["ssh_key"] = check_public_key("ssh_key", ssh_key)
    if ssh_password is not None:
        credentials["ssh_password"] = check_secret("ssh_password", ssh_password, MAX_PASSWORD)
    if jupyter_token is not None:
        credentials["jupyter_token"] = check_secret("jupyter_token", jupyter_token, MAX_TOKEN)
    return credentials


def order_body(order: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of an order, and return the body of its request, without a server.

    Parameters:
        order: the arguments of ``CloreClient.create_order`` that ``rent()`` takes, too, and the
            ``order_type``. Empty ``ports``, ``env``, password and key mean the default.
    """
    ports, env = _none_if_empty(order.get("ports")), _none_if_empty(order.get("env"))
    return {
        "type": check_order_type("order_type", order["order_type"]),
        "currency": check_currency("currency", order["currency"]),
        "image": check_text("image", order["image"]),
        "ports": dict(DEFAULT_PORTS) if ports is None else check_ports("ports", ports),
        "env": dict(DEFAULT_ENV) if env is None else check_env("env", env),
        **_login(*(order.get(name) for name in LOGIN)),
    }


class Purchase:
    """Make one purchase, from its arguments to the new order.

    Parameters:
        orders: the orders of the account.
        server_id: the server.
        order: what :func:`order_body` takes.

    Attributes:
        server_id, spot, currency, image: the fields by which the new order is found.
        body: the body of the request.
        credentials: the password, key and token in it.
        generated_password: the password, if the client generated it, or None.
        before: ids of older orders, which can't be the new one.
        baseline_read: whether ``before`` comes from a list that was read for this purchase.
        response: the response to ``create_order``; empty if none arrived.
    """

    def __init__(self, orders: AccountOrders, server_id: Any, order: dict[str, Any]) -> None:
        self._orders = orders
        self.server_id = check_id("server_id", server_id)
        self.body = {"renting_server": self.server_id, **order_body(order)}
        self.spot = self.body["type"] == "spot"
        self.currency: str = self.body["currency"]
        self.image: str = self.body["image"]
        self.generated_password: str | None = None
        if not self.body.keys() & {"ssh_key", "ssh_password"}:
            self.body["ssh_password"] = self.generated_password = make_password()
        self.credentials = {name: self.body[name] for name in LOGIN if name in self.body}
        self.before: frozenset[int] = frozenset()
        self.baseline_read = False
        self.response: dict[str, Any] = {}
        self._bid: float | None = None  # USD per hour
        self._saved: SavedLogin | None = None
        self._sent_at = time.monotonic()

    @property
    def sent_at(self) -> float:
        """The monotonic time at which the request was sent; after an error, of its first send."""
        return getattr(self.response, "sent_at", self._sent_at)

    def matches(self, order: Order) -> bool:
        """Return whether an order can be the result of this purchase. Missing fields are ignored.

        The live API has no idempotency key and returns no order id, so the fields must decide.
        """
        return (
            order.id is not None
            and order.id not in self.before
            and order.server_id == self.server_id
            and same_purchase(order, self.image, self.currency, self.spot)
            # Another process may just have ordered the same server.
            and not self._orders.credentials.has_other_login(
                self._orders.account, order.id, self.credentials
            )
        )

    # --- price and limits ---

    def set_bid(self, spot_price: float | None, allow_above: bool) -> None:
        """Add the bid of a spot order.

        Parameters:
            spot_price: the bid, in USD per hour.
            allow_above: whether to allow a bid far above the on-demand price.
        """
        if not self.spot:
            if spot_price is not None:
                logger.warning("spot_price is not sent: it needs order_type='spot'")
            return
        if spot_price is None:
            raise ValueError("spot_price is required for order_type='spot', in USD per hour")
        self._bid = check_number("spot_price", spot_price, above=True, unit="USD per hour")
        self.body["spotprice"] = self._orders.market.wire_bid(
            "spot_price", spot_price, self.server_id, self.currency, allow_above
        )

    def usd_per_hour(self) -> float | None:
        """Return the listed price or the bid in USD per hour, without fees; None if not known."""
        if self.spot:
            return self._bid
        server = self._orders.market.find_server(self.server_id)
        return None if server is None else on_demand_usd(server, self.currency)

    def learn_rate(self) -> None:
        """Try to read the exchange rate for the price of the order in USD, if it is not known.

        This is called before the purchase: an interrupt after the purchase would lose the order.
        """
        data = self._orders.market.data
        if data.rates.rate(self.currency) is None and not data.documented:
            self._orders.market.learn_rates(self.server_id)

    def preview(self) -> Order:
        """Return the body that would be sent, and its price."""
        return Order(body=self.body, usd_per_hour=self.usd_per_hour())

    def _check_limits(self) -> None:
        if self._orders.client.max_usd_per_hour is not None:
            self._orders.check_price(self.usd_per_hour(), f"an order of server {self.server_id}")
        self._orders.check_count()

    # --- send and reconcile ---

    def place(self, find_timeout: float) -> Order:
        """Send the purchase once, and return its order.

        Parameters:
            find_timeout: seconds to wait for the order to show up.

        Raises:
            OrderOutcomeUnknownError: the order may or may not exist.
            CloreError: the API refused, or nothing was sent.
        """
        claims = self._orders.claims
        # With a limit on active orders, two purchases at once could exceed it together.
        no_limit = self._orders.client.max_active_orders is None
        one = contextlib.nullcontext() if no_limit else claims.lock(ALL_SERVERS)
        try:
            with one, claims.lock(self.server_id):
                self._check_limits()
                self._read_baseline(find_timeout)
                order, purchase = self._submit_and_save(find_timeout)
        except CurrencyNotAllowedError as error:
            error.add_hint(
                f"the host does not accept {self.currency}: choose a server found with "
                f"currency={self.currency!r}, or pay with another currency="
            )
            raise
        except InsufficientBalanceError as error:
            with contextlib.suppress(Exception):  # the refusal matters more than its explanation
                price = self.usd_per_hour()
                explain_balance(self._orders, error, self.currency, price, self.spot)
            raise
        if order.id is not None:
            self._orders.made[order.id] = order.copy()
        logger.info("order %s of server %d was made", order.id, self.server_id)
        with contextlib.suppress(CloreError):
            self._orders.tidy_credentials({*self.before, order.id or 0})
        order["code"] = 0
        if purchase.generated_password:
            order["ssh_password"] = str(purchase.generated_password)
        return order

    def _read_baseline(self, find_timeout: float) -> None:
        """Record the existing orders before the purchase is sent."""
        orders, data = self._orders, self._orders.market.data
        self.before = frozenset(orders.known)
        if not data.live and (is_request_replaced(orders.client) or data.documented):
            return  # the response will have the order id
        # The live API returns no order id, so record which orders can't be the new one.
        patience = orders.client.rate_limit + max(find_timeout / 2, SHORTEST_LIMIT)
        with contextlib.suppress(CloreError):
            listed, response = limited(
                lambda: orders.read(completed=False), deadline=time.monotonic() + patience
            )
            if isinstance(response, Envelope):  # a fake client in a test may have a fixed list
                self.before |= {order.id for order in listed if order.id is not None}
                self.baseline_read = True

    def _submit_and_save(self, find_timeout: float) -> tuple[Order, Purchase]:
        """Save the credentials, and send the purchase."""
        orders = self._orders
        fields = purchase_fields(self.server_id, self, self.before, orders.client.server_clock)
        saved = self._saved = orders.credentials.save(orders.account, self.credentials, fields)
        try:
            order, purchase = self._submit(find_timeout)
        except (OrderOutcomeUnknownError, DatabaseError):  # the order may exist
            raise
        except Exception as error:
            saved.drop()
            if isinstance(error, InvalidInputError):
                self._explain(error)
            raise
        except BaseException:
            logger.warning(
                "interrupted while server %d was ordered: an order may exist, so check "
                "get_orders()",
                self.server_id,
            )
            raise
        if purchase is not self:
            saved.drop()
        if order.id is not None and purchase._saved is not None:
            orders.credentials.assign(orders.account, order.id, purchase._saved)
        return order, purchase

    def _explain(self, error: InvalidInputError) -> None:
        """Add a hint if the API refused an order because it has no such server."""
        with contextlib.suppress(CloreError):
            if self._orders.market.find_server(self.server_id) is None:
                error.add_hint(
                    f"there is no server {self.server_id} on the marketplace, so nothing was "
                    "ordered: choose one of find_servers()"
                )

    def _submit(self, find_timeout: float) -> tuple[Order, Purchase]:
        """Send the purchase, and return the order and its purchase, which can be an earlier one."""
        claims, server_id = self._orders.claims, self.server_id
        earlier = claims.unresolved.get(server_id)
        claims.unresolved[server_id] = self  # set before the request, which can be interrupted
        self._sent_at = time.monotonic()
        send_error: CloreError | None = None
        try:
            self.response = self._orders.client._request("POST", "/v1/create_order", json=self.body)
        except (OrderOutcomeUnknownError, DatabaseError) as error:
            send_error, self._sent_at = error, error.sent_at or self._sent_at
        except Exception as error:  # the API refused, or the request was not sent
            if earlier is None:
                claims.unresolved.pop(server_id, None)
                raise
            claims.unresolved[server_id] = earlier
            if not isinstance(error, ServerAlreadyRentedError):
                raise
            # An earlier purchase, whose response was lost, may have rented the server.
            return earlier._find(find_timeout, error), earlier
        if (order_id := created_id(self.response)) is None:
            return self._find(find_timeout, send_error), self
        claims.take(order_id, self)
        claims.unresolved.pop(server_id, None)
        return self._named_order(order_id), self

    def _named_order(self, order_id: int) -> Order:
        """Return the order of a response that has an order id."""
        response = {**self.response, "order_id": order_id}
        made = to_orders({"orders": [response]}, (), self._orders.market.data.rates)[0]
        if made.server_id is None:
            made["renting_server"] = self.server_id
        made.setdefault("currency", self.currency)
        made.setdefault("status", "creating")
        made.setdefault("connection", {"ssh": "", "http_ports": {}})
        return made

    # --- find the order, when the response had no order id or was lost ---

    def _find(self, timeout: float, send_error: CloreError | None) -> Order:
        """Read the active orders until the order of this purchase shows up, and claim it.

        Parameters:
            timeout: seconds.
            send_error: the error of the request, after which the order may exist; or None.

        Raises:
            OrderOutcomeUnknownError: no order showed up in time, or several match. Its cause is the
                error of the last read, if that failed, else ``send_error``.
            CloreAPIError: ``send_error`` itself, if the API refused and complete lists do not have
                the order.
        """
        claims, pause = self._orders.claims, FIRST_PAUSE
        deadline = time.monotonic() + timeout
        while True:
            cause: CloreError | None = None
            possible: list[Order] = []
            created_after = None
            try:
                listed, created_after = self._read_active(timeout, deadline)
                possible = claims.free([o for o in listed if self.matches(o)], self)
            except CloreError as error:
                cause = error
            found = [o for o in possible if _is_new(o, created_after, claims.clock_offset)]
            remaining = deadline - time.monotonic()
            if remaining <= 0 and not found and self.baseline_read:
                # The clocks may differ, but an order that is not in the baseline must be new.
                found = [order for order in possible if not order.has_ended]
            if len(found) == 1 and claims.take(found[0].id or 0, self):
                _learn_offset(claims, found[0], created_after)
                claims.unresolved.pop(self.server_id, None)
                return found[0]
            if len(found) > 1 or remaining <= 0:
                if isinstance(send_error, CloreAPIError) and not possible and cause is None:
                    raise send_error  # complete lists without the order confirm the refusal
                raise self._not_found(found or possible, timeout, send_error) from (
                    cause or send_error
                )
            time.sleep(min(pause, remaining))
            pause = min(pause * 1.5, LONGEST_PAUSE)

    def _read_active(self, timeout: float, deadline: float) -> tuple[list[Order], float | None]:
        """Read the active orders, and compute the send time by the server's clock."""
        client = self._orders.client
        # One slow response must not use all the time.
        patience = shortened(client.timeout, max(timeout / 2, SHORTEST_LIMIT))
        until = client.rate_limit + max(deadline, time.monotonic() + SHORTEST_LIMIT)
        listed, listing = limited(
            lambda: self._orders.read(completed=False, timeout=patience), deadline=until
        )
        # The Date of each response gives a lower bound, and the largest one is the closest.
        clocks = [
            clock
            for response in (self.response, listing)
            if isinstance(response, Envelope)
            and (clock := response.server_time_at(self.sent_at)) is not None
        ]
        return listed, max(clocks, default=None)

    def _not_found(
        self, orders: list[Order], timeout: float, send_error: CloreError | None
    ) -> OrderOutcomeUnknownError:
        ids = tuple(order.id for order in orders if order.id is not None)
        made = "was made" if send_error is None else "may have been made"
        which = f"it is not clear if it is one of {', '.join(map(str, ids))}: check get_orders()"
        if not ids:
            which = (
                f"it did not show up in the order lists within {timeout:g}s. It was not sent "
                "again: check get_orders() now and again in a minute,"
            )
        return OrderOutcomeUnknownError(
            f"an order for server {self.server_id} {made}, but {which} before you order again",
            server_id=self.server_id,
            order_ids=ids,
            credentials=self.credentials,
        )


def _is_new(order: Order, created_after: float | None, offset: float) -> bool:
    """Return whether an order was made after ``created_after``, if that is known."""
    if created_after is None:
        return not order.has_ended
    return order.started_at is not None and order.started_at >= created_after + offset


def _learn_offset(claims: Claims, order: Order, created_after: float | None) -> None:
    """Record how far the creation time of an order is behind the server's clock."""
    if created_after is not None and order.started_at is not None:
        behind = math.floor(order.started_at - created_after)
        claims.clock_offset = min(claims.clock_offset, behind)


# ==================================================================================================
# orders.wait
#
# Wait until an order has a status.
# ==================================================================================================


_SAME_STATUS = frozenset({"cancelled", "expired"})  # these two count as the same


def wait_for_status(
    orders: AccountOrders,
    order_id: int,
    timeout: float,
    poll_interval: float,
    target_status: str,
    on_update: Callable[[Order | None], object] | None,
    report: Report | None = None,
) -> Order:
    """Poll until the order has the status; see ``CloreClient.wait_for_order``.

    Parameters:
        orders: the orders of the account.
        order_id, timeout, poll_interval, target_status, on_update: as in that method.
        report: called with each step.
    """
    if target_status not in {"running", "creating"} | ENDED_STATUSES:
        logger.warning("target_status=%r is not a known status: check its spelling", target_status)
    targets = _SAME_STATUS if target_status in _SAME_STATUS else {target_status}
    late = f"Order {order_id} did not reach status '{target_status}' within {timeout}s"
    started = time.monotonic()
    deadline = started + timeout
    seen: Order | None = None
    while True:
        order, failure = _poll(orders, order_id, deadline)
        seen = order or seen
        if on_update is not None and failure is None:
            on_update(order)
        if report is not None:
            report(_event(order_id, seen, time.monotonic() - started))
        if seen is None and failure is None:
            _check_may_exist(orders, order_id, late)
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
            raise WaitTimeoutError(late, order_id=order_id, order=seen) from failure
        # Respect the pause that the API asked for.
        pause = max(poll_interval, (failure.retry_after or 0.0) if failure else 0.0)
        time.sleep(min(pause, remaining))


def _event(order_id: int, order: Order | None, seconds: float) -> ProgressEvent:
    status = "not listed yet" if order is None else str(order.status)
    if status == "running":
        return ProgressEvent("running", seconds, f"order {order_id}: running")
    shown = "deploying" if status == "creating" else status
    text = f"order {order_id}: {shown}, {readable_seconds(seconds)}"
    return ProgressEvent("deploy", seconds, text)


def _check_may_exist(orders: AccountOrders, order_id: int, late: str) -> None:
    """Raise an error for an order that no list has, unless this client knows it."""
    if order_id not in orders.known and not orders.credentials.of(orders.account, order_id):
        raise UnknownOrderError(
            f"{late}: there is no order {order_id} in this account, so the client did not wait; "
            "check get_orders()",
            order_id=order_id,
        )


def _poll(
    orders: AccountOrders, order_id: int, deadline: float
) -> tuple[Order | None, CloreError | None]:
    """Read the order once. Return it, or the error after which another poll makes sense."""
    # The last poll starts at the deadline, and needs time for two reads.
    last = time.monotonic() + 2 * orders.client.rate_limit + SHORTEST_LIMIT
    try:
        return limited(lambda: orders.find(order_id), deadline=max(deadline, last)), None
    except CloreError as error:
        if not (error.retryable or isinstance(error, InvalidResponseError)):
            raise
        logger.debug("a poll of order %d failed: %s", order_id, error)
        return None, error


# ==================================================================================================
# rental.selection
#
# Select the servers that ``rent()`` tries, with their prices.
# ==================================================================================================


BID_MARGIN = 1e-4  # added to the lowest bid, which the conversion can make too low
PRICE_SLACK = 1e-4  # the rounding error of an exchange rate


class RentalSettings:
    """Check and keep the arguments of ``rent()``.

    Parameters:
        search: the filters; its ``server_id`` is set here.
        order: the arguments that ``create_order`` takes too, except the bid and ``find_timeout``.

    Attributes:
        order_arguments: the arguments for ``create_order``.
    """

    def __init__(
        self,
        *,
        search: Search,
        order: dict[str, Any],
        cancel_timeout: Any,
        max_hours: Any,
        max_cost_usd: Any,
        server_id: Any = None,
        spot_price: Any = None,
        attempts: Any = 1,
        deploy_timeout: Any = 0.0,
        poll_interval: Any = 1.0,
        find_timeout: Any = 0.0,
        prefer_known: Any = False,
    ) -> None:
        self.prefer_known = check_bool("prefer_known", prefer_known)
        self.search = search
        self.spot = search.spot
        if search.gpu_type is not None:
            check_text("gpu_type", search.gpu_type)
        search.server_id = None if server_id is None else check_id("server_id", server_id)
        arguments = {**order, "order_type": "spot" if self.spot else "on-demand"}
        body = order_body(arguments)
        self.currency, self.image = body["currency"], body["image"]
        arguments["find_timeout"] = check_number("find_timeout", find_timeout, unit="seconds")
        self.order_arguments = {**arguments, "currency": self.currency}
        self.spot_price = self._checked_bid(spot_price)
        self.attempts = check_count("attempts", attempts, minimum=1)
        self.deploy_timeout = check_number(
            "deploy_timeout", deploy_timeout, infinite=True, unit="seconds"
        )
        self.poll_interval = check_interval("poll_interval", poll_interval)
        self.cancel_timeout = check_number(
            "cancel_timeout", cancel_timeout, infinite=True, unit="seconds"
        )
        self.max_hours = check_optional_number("max_hours", max_hours, above=True, infinite=True)
        self.max_cost_usd = check_optional_number(
            "max_cost_usd", max_cost_usd, above=True, infinite=True
        )

    @classmethod
    def of_order(
        cls, order: Order, *, max_hours: Any, max_cost_usd: Any, cancel_timeout: Any
    ) -> RentalSettings:
        """Return the settings for an order that exists."""
        currency = wire_currency(str(order.get("currency"))) or "CLORE-Blockchain"
        return cls(
            search=Search(use_spot=order.is_spot is True, currency=currency),
            order={"image": order.get("image") or "unknown", "currency": currency},
            cancel_timeout=cancel_timeout,
            max_hours=max_hours,
            max_cost_usd=max_cost_usd,
        )

    def _checked_bid(self, spot_price: Any) -> float | None:
        if spot_price is None:
            return None
        check_number("spot_price", spot_price, above=True, unit="USD per hour")
        if not self.spot:
            raise ValueError(
                f"spot_price={spot_price!r} needs use_spot=True: add that, or leave it out"
            )
        highest = self.search.max_price_usd
        if highest is not None and spot_price > highest:
            raise ValueError(
                f"spot_price must be at most max_price_usd ({highest!r}), not {spot_price!r}"
            )
        return float(spot_price)

    def exceeds_price_limit(self, server: Server, usd_per_hour: float | None) -> bool:
        """Return whether the price of an order is above the limit for its server."""
        limit = self.search.price_limit(server)
        if limit is None or usd_per_hour is None:
            return False
        return usd_per_hour > limit * (1 + PRICE_SLACK)

    def price_of(self, server: Server) -> float | None:
        """Return the price of a server in USD per hour, without fees; None if not known.

        For a spot order this is the bid: None if the host does not accept it.
        """
        listed = self.search.price(server)
        if not self.spot or listed is None:
            return listed
        if self.spot_price is not None:
            return self.spot_price if self.spot_price >= listed else None
        limit = self.search.price_limit(server)
        bid = listed * (1 + BID_MARGIN)
        return bid if limit is None else min(bid, limit)

    def reason_against(self, server: Server) -> str | None:
        """Return the reason why a server of the search can't be rented, or None."""
        if server.id is None:
            return "has no id"
        price, limit = self.price_of(server), self.search.price_limit(server)
        if price is None:
            if self.spot:
                return "does not accept this bid"
            return None if self.max_cost_usd is None else "has no price"
        if limit is not None and price > limit * ROUNDING_UP:
            return f"costs {price:.4g} USD per hour, more than the limit of {limit:.4g}"
        on_demand = server.usd_per_hour
        if self.spot and on_demand is not None and price > on_demand:
            return "accepts no bid below its on-demand price"
        return None


def order_usd_per_hour(order: Any, server: Server, currency: str) -> float | None:
    """Return the price of an order in USD per hour; None if not known.

    Uses the exchange rate of the server's listing if there is one, as the price limit does.
    """
    amount, rate = positive(order.get("price")), listed_rate(server, currency)
    if amount is None or rate is None:
        return None if amount is None else finite(order.usd_per_hour)
    return amount * rate


def candidates(
    market: Market, settings: RentalSettings, history: HostHistory
) -> tuple[list[Server], str]:
    """Return the servers to try, and an error text if there are none.

    The best come first, and hosts that failed in the last day come last.
    """
    found, report = settings.search.run(market.read())
    if not found:
        server_id = settings.search.server_id
        why = report.explain() if server_id is None else _missing(server_id, report)
        return [], f"{why}: change the filters, or try again later"
    reasons = [settings.reason_against(server) for server in found]
    fitting = [s for s, reason in zip(found, reasons, strict=True) if reason is None]
    outcomes = {server_id: seen["outcome"] for server_id, seen in history.outcomes().items()}
    fitting.sort(key=lambda s: _rank(outcomes.get(s.id or 0), settings.prefer_known))
    return fitting, (
        f"none of {len(found)} servers that fit can be rented: server {found[0].id} {reasons[0]}; "
        "change the filters or the limits"
    )


def _missing(server_id: int, report: SearchReport) -> str:
    label = report.left_out[-1][0] if report.left_out else "server_id"
    if label.startswith("server_id"):
        return f"server {server_id} is not on the marketplace"
    if label == RENTED:
        return f"server {server_id} is rented"
    cost = report.cheapest_usd_per_hour
    costs = "" if cost is None else f"; it costs {cost:.4g} USD per hour"
    return f"server {server_id} does not fit {label}{costs}"


def _rank(outcome: str | None, prefer_known: bool) -> int:
    """Return 0 for the hosts to try first, 2 for those to try last, else 1."""
    if outcome is None:
        return 1
    return (0 if prefer_known else 1) if outcome == WORKED else 2


class SharedServers:
    """Offer each server to one rental only. The servers are listed on first use."""

    def __init__(self, market: Market, settings: RentalSettings, history: HostHistory) -> None:
        self.no_server = ""  # why there is none, for an error
        self._arguments = market, settings, history
        self._left: list[Server] | None = None

    def count(self) -> int:
        """List the servers, the first time, and return how many are left."""
        if self._left is None:
            self._left, self.no_server = candidates(*self._arguments)
        return len(self._left)

    def take(self) -> Server | None:
        """Return the next server, or None."""
        self.count()
        try:
            return (self._left or []).pop(0)  # one atomic step
        except IndexError:
            return None


def summary(tried: list[tuple[int, str]]) -> str:
    """Return the reason for each server; servers with the same reason share one."""
    servers: dict[str, list[str]] = {}
    for server_id, why in tried:
        # An error names its order; without the number, equal reasons are equal texts.
        alike = re.sub(r"\b([Oo])rder \d+\b", r"\1rder", why)
        servers.setdefault(alike, []).append(str(server_id))
    if len(servers) == len(tried):
        return "; ".join(f"server {server_id}: {why}" for server_id, why in tried)
    return "; ".join(
        f"server{'s' if len(ids) > 1 else ''} {', '.join(ids)}: {why}"
        for why, ids in servers.items()
    )


# ==================================================================================================
# rental.signals
#
# Handle SIGTERM, SIGHUP and Ctrl-C, so that a rental ends after each of them.
# ==================================================================================================


WAKE_EVERY = 0.5  # seconds; a waiting thread checks again, even if no other thread wakes it
SIGNALS = tuple(s for n in ("SIGTERM", "SIGHUP") if (s := getattr(signal, n, None)) is not None)


class SignalExit(SystemExit):
    """End the ``with`` blocks of the main thread, because a signal ends the process.

    It is a ``SystemExit`` and not an ``Exception``. The exit status of the process is 128 plus the
    number of the signal.

    Attributes:
        signum: the number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def in_main_thread() -> bool:
    """Return whether this is the main thread, the only one that signals interrupt."""
    return threading.get_ident() == threading.main_thread().ident


def _on_signal(signum: int, frame: FrameType | None) -> None:
    # The handler must not take a lock or use the network.
    if not this_process.signal_users:  # do what the default handler does
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    this_process.stopping_signal = signum
    for rental in list(this_process.rentals):
        rental.on_signal(signum)
    raise SignalExit(signum)


class SignalHandling:
    """Use the signal handler. The last ``close()`` restores the former handlers.

    The first user in the main thread installs it, but only for signals with the default handler.
    """

    def __init__(self) -> None:
        this_process.signal_users.add(self)
        if in_main_thread():
            this_process.stopping_signal = None
            for signum in SIGNALS:
                _install(signum)
        elif not this_process.handled_signals:
            warn_once(
                "SIGTERM and SIGHUP will not end this rental, as it began outside the main thread: "
                "call handle_signals() in the main thread first"
            )

    def close(self) -> None:
        """Stop using the signal handler. Safe to repeat."""
        this_process.signal_users.discard(self)
        # Another thread can't restore handlers. Without users, ours acts as the default handler.
        if not this_process.signal_users and in_main_thread():
            _restore_handlers()

    def __enter__(self) -> SignalHandling:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _install(signum: int) -> None:
    current = signal.getsignal(signum)
    if current is _on_signal:
        this_process.handled_signals.add(signum)
    elif current == signal.SIG_DFL:
        signal.signal(signum, _on_signal)
        this_process.handled_signals.add(signum)
    else:
        name = signal.Signals(signum).name
        what = "is ignored" if current == signal.SIG_IGN else "already has a handler"
        warn_once(f"{name} {what}, so it will not end rentals")


def _restore_handlers() -> None:
    for signum in list(this_process.handled_signals):
        if signal.getsignal(signum) is _on_signal:
            signal.signal(signum, signal.SIG_DFL)
        this_process.handled_signals.discard(signum)


def _leave_signals_to_parent() -> None:
    this_process.signal_users.clear()
    this_process.stopping_signal = None
    _restore_handlers()  # a child that waits for a lock could miss the signal


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_signals_to_parent)


# --- interrupts ---


class BlockExit:
    """Make a new ``__exit__`` for each ``with`` statement.

    The ``with`` statement keeps that object until the block has ended in any way. The worker has a
    weak reference to it, and so sees the end even if an interrupt stops ``__exit__`` at its first
    line.
    """

    def __get__(self, rental: Any, owner: Any) -> Callable[..., None]:
        end: Callable[..., None] = owner._end
        if rental is None:
            return end
        leave = functools.partial(end, rental)
        rental.end_with(leave)
        return leave


class Gate:
    """Let threads wait for an event that happens once.

    A ``threading.Event`` is not used, because an interrupt can leave its lock locked.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._closed = threading.Lock()
        self._closed.acquire()

    def open(self) -> None:
        """Wake all threads that wait."""
        self.is_open = True
        self._closed.release()

    def wait(self) -> bool:
        """Wait up to ``WAKE_EVERY``, and return whether it is open."""
        if not self.is_open and self._closed.acquire(timeout=WAKE_EVERY):
            self._closed.release()  # wake the next thread
        return self.is_open


class ThreadCall:
    """Call a function in another thread."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self.done = Gate()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run the call, and store its result or its error."""
        try:
            self.result = self._action()
        except BaseException as error:
            self.error = error
        self.done.open()


def next_item(inbox: queue.SimpleQueue[Any], timeout: float | None) -> Any:
    """Return the next item of a queue that only this thread reads; None after the timeout.

    ``SimpleQueue.get(timeout=...)`` can wait forever if it is called with a free lock and an empty
    queue, and the timeout passes. So call ``get_nowait()`` first, which takes the lock.
    """
    try:
        return inbox.get_nowait()
    except queue.Empty:
        pass
    try:
        return inbox.get(timeout=timeout)
    except queue.Empty:
        return None


# ==================================================================================================
# rental.journal
#
# Keep the journal: one small file for each order, which survives the process.
# ==================================================================================================


STATE_SUFFIX = ".json"
JOURNAL_SCHEMA = 1  # a later version adds fields, and keeps these
LONGEST_ENTRY = 65536  # bytes; a longer file is not an entry
KEPT_FOLDER = "kept"  # in the state folder; only cancel_overdue() ends the orders of its entries
_ID_LENGTH = 20  # characters for the order id, which is written later
_FIRST = '{"order_id": '


def this_machine() -> dict[str, str]:
    """Return the identity of this machine."""
    machine = read_line("/etc/machine-id") or read_line("/var/lib/dbus/machine-id")
    # machine-id(5) says to keep the id itself private.
    digest = hashlib.sha256(f"clore-client {machine}".encode()).hexdigest()[:16] if machine else ""
    return {"host": socket.gethostname(), "machine": digest}


class JournalEntry:
    """Keep one order in a small file.

    A living process keeps its entries locked. If a file is not locked, its process is dead; the
    process that finds it locks it until ``close()``.

    Attributes:
        data: the content of the file.
        of_this_machine: whether this machine wrote it.
        abandoned: whether no process will end its order, because its process, on this machine, is
            dead, or its rental gave up.
    """

    def __init__(
        self,
        path: Path,
        data: dict[str, Any],
        *,
        of_this_machine: bool = True,
        lock: int | None = None,
    ) -> None:
        self.path = path
        self.data = data
        self.of_this_machine = of_this_machine
        self.abandoned = lock is not None
        self._handle = lock
        self._written_here = False

    @property
    def order_id(self) -> int | None:
        """The id of the order; None if it is missing or not valid."""
        order_id = whole_id(self.data.get("order_id"))
        return order_id if order_id is not None and order_id > 0 else None

    def write(self) -> None:
        """Create the file, lock it, and sync it to the disk."""
        self._written_here = True
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
        handle = os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o600)
        self._handle = handle
        if not lock_file(handle, patience=1.0):  # another process may try the lock for a moment
            raise OSError("the file can't be locked")
        rest = json.dumps(self.data)[1:]
        text = f"{_FIRST}{'null':<{_ID_LENGTH}}, {rest}\n".encode()
        if os.write(handle, text) != len(text):
            raise OSError("the disk is full")
        os.fsync(handle)
        _sync_folder(self.path.parent)
        this_process.entries[str(self.path)] = self

    def write_order_id(self, order_id: int) -> None:
        """Write the order id into the file, in place, so that a crash can't damage the rest."""
        if self._handle is None:
            return
        self.data["order_id"] = order_id
        try:
            os.lseek(self._handle, len(_FIRST), os.SEEK_SET)
            os.write(self._handle, f"{order_id:<{_ID_LENGTH}}".encode())
            os.fsync(self._handle)
        except OSError as error:
            warn_about_state(f"{self.path.name} could not be updated", error)

    def remove(self) -> None:
        """Remove the file. Safe to repeat."""
        this_process.entries.pop(str(self.path), None)
        if self._handle is None and self._written_here:
            return
        if os.name == "nt":  # Windows can't remove an open file
            self.unlock()
        _remove_file(self.path)
        self.unlock()  # after the removal, so that no other process finds the file unlocked

    def close(self) -> None:
        """Release the lock, unless this process wrote the file."""
        if not self._written_here:
            self.unlock()

    def unlock(self) -> None:
        """Close the file, which releases its lock."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):
                os.close(handle)


def _remove_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warn_about_state(f"{path} can't be removed", error)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_entry(folder: Path | None, data: dict[str, Any]) -> JournalEntry | None:
    """Write an entry. If that fails, warn once and return None."""
    if folder is None:
        return None
    name = f"{random.SystemRandom().getrandbits(96):024x}{STATE_SUFFIX}"
    data = {"schema": JOURNAL_SCHEMA, **data, **this_machine(), "pid": os.getpid()}
    entry = JournalEntry(folder / name, data)
    try:
        entry.write()
    except OSError as error:
        entry.remove()
        warn_about_state(f"the journal in {folder} can't be written", error)
        return None
    return entry


def read_entries(folder: Path | None) -> list[JournalEntry]:
    """Return all entries of the folder. Skip a file that can't be read, and warn once."""
    if folder is None:
        return []
    try:
        names = sorted(n for n in os.listdir(folder) if n.endswith(STATE_SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        warn_about_state(f"{folder} could not be read", error)
        return []
    machine = this_machine()
    found = []
    for name in names:
        try:
            entry = _read_entry(folder / name, machine)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            warn_about_state(f"{folder / name} is not a readable journal entry", error)
            continue
        if entry is not None:
            found.append(entry)
    return found


def _read_entry(path: Path, machine: dict[str, str]) -> JournalEntry | None:
    if (written := this_process.entries.get(str(path))) is not None:
        return written
    # Some systems can lock only files that are open for writing.
    handle = os.open(path, SAFE_FLAGS | os.O_RDWR)
    keep = False
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LONGEST_ENTRY:
            raise ValueError("it is not a small regular file")
        try:
            free = lock_file(handle)
        except OSError as error:  # without locks, the process may still be alive
            warn_about_state(f"files in {path.parent} can't be locked", error)
            free = False
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, LONGEST_ENTRY)
        if not text:  # just created, or its process died before it sent anything
            return None
        if free and not path.exists():  # its owner has just removed it
            return None
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("it is not a JSON object")
        here = all(data.get(name) == value for name, value in machine.items())
        keep = free and here
        return JournalEntry(path, data, of_this_machine=here, lock=handle if keep else None)
    finally:
        if not keep:
            os.close(handle)


# --- orders that stay after their rental ---


def record_kept(folder: Path | None, data: dict[str, Any], until: float | None) -> bool:
    """Record an order that stays, in place of an earlier record. Return whether that worked.

    Parameters:
        folder: the state folder.
        data: the fields of its journal entry, with the order id.
        until: Unix time of its deadline, or None.
    """
    if folder is None:
        return False
    path = _kept_path(folder, data["account"], data["order_id"])
    try:
        make_private_folder(path.parent)
        record = {"schema": JOURNAL_SCHEMA, **data, **this_machine(), "kept_until": until}
        replace_file(path, json.dumps(record))
    except OSError as error:
        warn_about_state(f"{path} can't be written", error)
        return False
    return True


def forget_kept(folder: Path | None, account: str, order_id: int) -> None:
    """Forget that an order is kept, because a rental ends it again."""
    if folder is None:
        return
    _remove_file(_kept_path(folder, account, order_id))


def _kept_path(folder: Path, account: str, order_id: int) -> Path:
    return folder / KEPT_FOLDER / f"{account[:12]}-{order_id}.json"


def kept_entries(folder: Path | None, account: str) -> list[JournalEntry]:
    """Return the records of kept orders, locked where no other process holds them."""
    found = []
    for entry in read_entries(None if folder is None else folder / KEPT_FOLDER):
        if entry.data.get("account") == account and entry.order_id is not None:
            found.append(entry)
        else:
            entry.close()
    return found


# ==================================================================================================
# rental.orders
#
# Keep the orders of one rental and their cost, in memory and in the journal, and end them.
# ==================================================================================================


MIN_ABSENT_LISTS = 6  # an order counts as absent if at least this many lists do not have it
LIST_PATIENCE = 10.0  # seconds for a list of orders while another order runs
SEARCH_INTERVAL = 2.0  # seconds between two searches for an order that may exist
CHECK_INTERVAL = 1.0  # seconds between two checks of the limits
FEE_LEAD = 5.0  # the budget counts the creation fee this many seconds early


class Meter:
    """Count the cost of one order. A new bid changes its price.

    Attributes:
        counts: whether there is an order to pay for.
    """

    def __init__(self, usd_per_hour: float | None, fee: float, age: float = 0.0) -> None:
        self._started = time.monotonic() - age, time.time() - age
        self.counts = True
        self._fee = fee
        self._prices: list[tuple[float, float]] = [(0.0, usd_per_hour or 0.0)]  # (since, price)
        self._stopped_at: float | None = None  # the age of the order then

    def age(self) -> float:
        """Return the age of the order in seconds, by the larger of two clocks.

        The monotonic clock can stop while a laptop sleeps, but the order still costs money.
        """
        monotonic, wall = self._started
        return max(0.0, time.monotonic() - monotonic, time.time() - wall)

    def correct(self, usd_per_hour: float) -> None:
        """Correct the price from the start, unless a bid has changed it."""
        if len(self._prices) == 1:
            self._prices = [(0.0, usd_per_hour)]

    def change(self, usd_per_hour: float) -> None:
        """Set the price from now on."""
        self._prices.append((self.age(), usd_per_hour))

    def stop(self) -> None:
        """Stop the cost, because the cancel was accepted. Safe to repeat."""
        if self._stopped_at is None:
            self._stopped_at = self.age()

    def usd(self, fee_lead: float = 0.0) -> float:
        """Return the cost so far in USD, with all fees.

        Parameters:
            fee_lead: count the creation fee so many seconds early, while the order runs.
        """
        if not self.counts:
            return 0.0
        end, lead = self._stopped_at, 0.0
        if end is None:
            end, lead = self.age(), fee_lead
        prices = list(self._prices)
        changes = [*(since for since, _ in prices[1:]), end]
        rent = sum(
            price * max(0.0, min(until, end) - since) / 3600.0
            for (since, price), until in zip(prices, changes, strict=True)
        )
        return with_fee(rent, self._fee) + creation_fee_after(end + lead)


class Budget:
    """Check the limits of a rental against the cost of its orders."""

    def __init__(self, settings: RentalSettings) -> None:
        self._max_hours, self._max_cost = settings.max_hours, settings.max_cost_usd
        self._fee = settings.search.fee
        self._meters: list[Meter] = []

    @property
    def hours(self) -> float:
        """The hours since the first order was sent."""
        return max((m.age() for m in list(self._meters) if m.counts), default=0.0) / 3600.0

    @property
    def cost_usd(self) -> float:
        """The cost of all orders so far, in USD."""
        return sum(meter.usd() for meter in list(self._meters))

    def start(self, usd_per_hour: float | None, age: float = 0.0) -> Meter:
        """Start to count another order, which has an age in seconds."""
        meter = Meter(usd_per_hour, self._fee, age)
        self._meters.append(meter)
        return meter

    def exceeded_by(self) -> str | None:
        """Return a text about the limit that is reached, or None."""
        if self._max_hours is not None and self.hours >= self._max_hours:
            return f"max_hours={self._max_hours:g} is reached"
        soon = sum(meter.usd(FEE_LEAD) for meter in list(self._meters))
        if self._max_cost is not None and soon >= self._max_cost:
            return f"max_cost_usd={self._max_cost:g} is reached"
        return None

    @property
    def seconds_between_checks(self) -> float | None:
        """The seconds between two checks; None without a limit."""
        return None if self._max_hours is None and self._max_cost is None else CHECK_INTERVAL


class RentalOrder:
    """Keep one order of a rental, from the purchase to its confirmed end.

    Attributes:
        server_id: the server.
        entry: its journal entry.
        meter: its cost.
        order_id: the order id; None while the outcome of the purchase is not known.
        refused: whether the API refused the order with code 1, after which it may still exist.
        lost: the purchase of ``create_order``, if its outcome is not known.
        absent: monotonic times of the lists in a row that did not have the order.
        cancellation: its cancel, as soon as the order id is known.
    """

    def __init__(self, server_id: int, entry: JournalEntry | None, meter: Meter) -> None:
        self.server_id = server_id
        self.entry = entry
        self.meter = meter
        self.sent_at = time.monotonic()
        self.order_id: int | None = None
        self.refused = False
        self.lost: Any = None
        self.absent: list[float] = []
        self.cancellation: Cancellation | None = None

    @property
    def accepted(self) -> bool:
        """True if its cancel was accepted."""
        return self.cancellation is not None and self.cancellation.accepted

    def __str__(self) -> str:
        if self.order_id is None:
            return f"an order of server {self.server_id} may have been made"
        return f"order {self.order_id} may still be running"


class RentalOrders:
    """Keep and end the orders of a rental that cost money, or may cost money.

    Attributes:
        before: ids of orders that existed before the rental.
        block_ended_at: monotonic time at which the block ended; None before that.
        skip_confirmation: skip the confirmation, after an interrupt during the cleanup.
        abandoned: stop the cleanup, after three interrupts; ``leftovers()`` finds the orders.
    """

    def __init__(
        self,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        budget: Budget,
    ) -> None:
        self._orders = orders
        self._settings = settings
        self._folder = folder
        self._budget = budget
        self._all: list[RentalOrder] = []
        self.before: set[int] = set()
        self.block_ended_at: float | None = None
        self.skip_confirmation = False
        self.abandoned = False

    # --- purchases ---

    def record_intent(self, server_id: int, price: float | None) -> RentalOrder:
        """Record a purchase in the journal and in memory, before it is sent."""
        entry = write_entry(self._folder, self._entry_fields(server_id))
        purchase = RentalOrder(server_id, entry, self._budget.start(price))
        self._all.append(purchase)
        return purchase

    def _entry_fields(self, server_id: int) -> dict[str, Any]:
        client = self._orders.client
        fields = purchase_fields(server_id, self._settings, self.before, client.server_clock)
        return {**fields, "base_url": client.base_url, "account": self._orders.account}

    def adopt(self, order: Order, ends: bool) -> RentalOrder:
        """Take over an order that exists.

        Parameters:
            order: the order.
            ends: whether the rental ends it, which the journal must then know.
        """
        server_id, order_id = order.server_id or 0, order.id or 0
        clock = time.time() + (self._orders.client.server_clock or 0.0)
        age = 0.0 if order.started_at is None else max(0.0, clock - order.started_at)
        entry = write_entry(self._folder, self._entry_fields(server_id)) if ends else None
        purchase = RentalOrder(server_id, entry, self._budget.start(order.usd_per_hour, age))
        if ends:
            self._all.append(purchase)
        self.set_order_id(purchase, order_id)
        if ends:
            forget_kept(self._folder, self._orders.account, order_id)
        return purchase

    def keep(self, purchase: RentalOrder, until: float | None) -> None:
        """Leave an order to the user, and record that.

        Parameters:
            purchase: the order.
            until: Unix time at which ``cancel_overdue()`` ends it, or None.

        Raises:
            RentalError: the deadline can't be recorded.
        """
        data = {**self._entry_fields(purchase.server_id), "order_id": purchase.order_id}
        if not record_kept(self._folder, data, until) and until is not None:
            raise RentalError(
                f"order {purchase.order_id} is not kept, because its deadline can't be recorded: "
                "set state_dir to a folder that can be written, or keep it without max_hours"
            )
        self.forget(purchase)

    def set_order_id(self, purchase: RentalOrder, order_id: int) -> None:
        """Record the order id of a purchase."""
        self._orders.claims.take(order_id, purchase)  # unless create_order() has claimed it
        if purchase in self._all:  # the rental ends it
            self._orders.claims.rented.add(order_id)
        purchase.order_id = order_id
        purchase.cancellation = Cancellation(self._orders, order_id)
        purchase.meter.counts = True
        if purchase.entry is not None:
            purchase.entry.write_order_id(order_id)
        self._orders.bid_listeners[order_id] = purchase.meter.change

    def mark_refused(self, purchase: RentalOrder) -> None:
        """Record that the API refused a purchase with code 1; its order may still exist."""
        purchase.refused = True
        purchase.sent_at = time.monotonic()  # if there is an order, it was made before now
        purchase.meter.counts = False

    def forget(self, purchase: RentalOrder) -> None:
        """Remove a purchase whose order does not exist, has ended, or is kept."""
        if purchase.entry is not None:
            purchase.entry.remove()
        self._remove(purchase)

    def _give_up(self, purchase: RentalOrder, failure: CloreError) -> CloreError:
        """Leave a purchase to ``leftovers()``. Return ``failure``, the error for the user."""
        if purchase.entry is not None:
            purchase.entry.abandoned = True
        self._remove(purchase)
        logger.error("%s", failure)
        return failure

    def _remove(self, purchase: RentalOrder) -> None:
        if purchase in self._all:
            self._all.remove(purchase)
        purchase.meter.counts = purchase.order_id is not None
        self._orders.bid_listeners.pop(purchase.order_id or 0, None)

    # --- the end ---

    def record_block_end(self) -> None:
        """Record that the block has ended, which sets the deadline for cancels."""
        self.block_ended_at = self.block_ended_at or time.monotonic()

    def deadline(self) -> float:
        """Return the deadline for cancels; there is none before the block has ended."""
        if self.block_ended_at is None:
            return math.inf
        return self.block_ended_at + self._settings.cancel_timeout

    def end_all(self) -> CloreError | None:
        """End all orders, the cancels first. Return None, or the first failure."""
        started = time.monotonic()
        known = [purchase for purchase in self._all if purchase.order_id is not None]
        unknown = [purchase for purchase in self._all if purchase.order_id is None]
        failures: list[CloreError | None] = [self._cancel(p, self.deadline) for p in known]
        failures += [self._reconcile(purchase) for purchase in unknown]
        failures += [self._confirm(purchase, started) for purchase in list(self._all)]
        return next((failure for failure in failures if failure is not None), None)

    def end(self, purchase: RentalOrder) -> CloreError | None:
        """End one order. Return None if that is confirmed, else the error."""
        started = time.monotonic()
        until = started + self._settings.cancel_timeout
        failure = self._cancel(purchase, lambda: min(until, self.deadline()))
        return self._confirm(purchase, started) if failure is None else failure

    def abandon(self) -> CloreError | None:
        """Stop the cleanup, and leave the orders to ``leftovers()``. Return an error if any."""
        self.abandoned = True
        left = list(self._all)
        for purchase in left:
            if purchase.entry is not None:
                purchase.entry.abandoned = True
        if not left:
            return None
        ids = tuple(p.order_id for p in left if p.order_id is not None)
        text = f"interrupted three times, and {'; '.join(map(str, left))}: call leftovers() later"
        return CancelUnconfirmedError(text, order_ids=ids) if ids else OutcomeUnknownError(text)

    def try_to_cancel(
        self,
        purchase: RentalOrder,
        deadline: Callable[[], float],
        stop: Callable[[], bool] = lambda: False,
    ) -> CloreError | None:
        """Cancel an order until that is accepted. Return None, or the error."""
        failure: CloreError | None = None
        if purchase.cancellation is not None and not purchase.accepted:
            failure = purchase.cancellation.run(
                deadline, confirm=False, stop=lambda: self.abandoned or stop()
            )
        if failure is None:  # the order costs nothing from now on
            purchase.meter.stop()
        return failure

    def _cancel(self, purchase: RentalOrder, deadline: Callable[[], float]) -> CloreError | None:
        """Cancel an order until that is accepted, or leave it to ``leftovers()``."""
        failure = self.try_to_cancel(purchase, deadline)
        return None if failure is None else self._give_up(purchase, failure)

    def _confirm(self, purchase: RentalOrder, started: float) -> CloreError | None:
        """Wait until a cancelled order is listed as ended."""
        order_id = purchase.order_id or 0
        deadline = confirm_until(started, self._settings.cancel_timeout)
        failure: CloreError | None = None
        if purchase.cancellation is not None and not self.skip_confirmation:
            failure = purchase.cancellation.run(
                lambda: deadline, confirm=True, stop=lambda: self.skip_confirmation
            )
            if failure is None:
                self.forget(purchase)
                self.before.add(order_id)
                return None
        if failure is None or self.skip_confirmation:
            failure = CloreError(
                f"order {order_id} was cancelled, but an interrupt skipped the confirmation that "
                "it has ended: call leftovers() later"
            )
        return self._give_up(purchase, failure)

    # --- purchases with unknown outcome ---

    def unresolved(self) -> list[RentalOrder]:
        """Return the purchases refused with code 1 whose order may exist, and is not cancelled."""
        return [p for p in self._all if p.refused and not p.accepted]

    def search_unresolved(self, stop: Callable[[], bool]) -> None:
        """Search once for the orders of unresolved purchases, and cancel those that exist.

        Parameters:
            stop: returns whether something else is more urgent; a cancel then continues later.
        """
        until = time.monotonic() + self._settings.cancel_timeout
        for purchase in self.unresolved():
            server_id = purchase.server_id
            if purchase.order_id is None:
                try:
                    if self._search(purchase):
                        self.forget(purchase)
                except CloreError as error:
                    logger.debug("an order of server %d can't be searched: %s", server_id, error)
                if purchase.order_id is None:
                    continue
                logger.warning(
                    "order %d of server %d exists although the API refused it: cancelling it",
                    purchase.order_id,
                    server_id,
                )
            self.try_to_cancel(purchase, lambda: until, stop)

    @property
    def search_interval(self) -> float:
        """The seconds between two searches."""
        return min(SEARCH_INTERVAL, max(0.001, self._orders.client.order_lag / MIN_ABSENT_LISTS))

    def _reconcile(self, purchase: RentalOrder) -> CloreError | None:
        """Search for the order of a purchase until it is cancelled, or time has run out."""
        logger.warning("an order of server %d may exist: searching for it", purchase.server_id)
        cause: BaseException | None = None
        absent = False
        while not self.abandoned:
            try:
                absent, cause = self._search(purchase), None
            except CloreError as error:
                cause = error
            if purchase.order_id is not None:
                return self._cancel(purchase, self.deadline)
            left = self.deadline() - time.monotonic()
            if absent or left <= 0:
                break
            time.sleep(min(left, self.search_interval))
        if absent and purchase.refused:
            self.forget(purchase)
            return None
        unknown = OutcomeUnknownError(
            f"{purchase}, but it did not show up: call leftovers() or get_orders() in a minute",
            endpoint="/v1/create_order",
        )
        unknown.__cause__ = cause
        return self._give_up(purchase, unknown)

    def _search(self, purchase: RentalOrder) -> bool:
        """Search once for the order of a purchase. Return True if it is confirmed absent.

        A new order can take ``order_lag`` seconds to be listed, and a list can be empty for a
        moment. So several lists over ``order_lag`` seconds must not have it.
        """
        asked_at = time.monotonic()
        deadline = max(asked_at + SHORTEST_LIMIT, self.deadline())
        if self.block_ended_at is None:  # the limits of the rental must still be checked
            deadline = asked_at + LIST_PATIENCE
        absent = purchase.absent
        try:
            orders = limited(self._orders.active, deadline=deadline, urgent=True)
        except CloreError:
            absent.clear()  # a read that failed breaks the series
            raise
        fitting = self._fitting(orders, purchase)
        if len(fitting) == 1 and not self._is_held(purchase):
            self.set_order_id(purchase, fitting[0].id or 0)
        lag = self._orders.client.order_lag
        if fitting:
            absent.clear()
        elif asked_at >= purchase.sent_at + lag and self._is_complete(orders):
            absent.append(asked_at)
        return len(absent) >= MIN_ABSENT_LISTS and absent[-1] - absent[0] >= lag

    def _is_complete(self, orders: list[Order]) -> bool:
        """Return whether a list has all orders of this rental that must be active."""
        running = {p.order_id for p in self._all if p.order_id is not None and not p.accepted}
        return running <= {order.id for order in orders}

    def _fitting(self, orders: list[Order], purchase: RentalOrder) -> list[Order]:
        """Return the orders that can be the result of a purchase, and of no other one."""
        settings, claims = self._settings, self._orders.claims
        if purchase.lost is None:
            purchase.lost = claims.unresolved.get(purchase.server_id)
        fitting = [
            order
            for order in orders
            if order.server_id == purchase.server_id
            and order.id not in self.before
            and order.id not in claims.rented
            and can_be_order_of(order, settings.image, settings.currency, settings.spot)
        ]
        if (lost := purchase.lost) is None:  # create_order() has claimed its own order
            return fitting
        return claims.free([order for order in fitting if lost.matches(order)], lost)

    def _is_held(self, purchase: RentalOrder) -> bool:
        """Return whether a living rental of another process may own the order of a purchase."""
        wanted = {"server_id": purchase.server_id, "account": self._orders.account}
        held = False
        for entry in read_entries(self._folder):
            mine = purchase.entry is not None and entry.path == purchase.entry.path
            if not (mine or entry.abandoned) and wanted.items() <= entry.data.items():
                held = True
            entry.close()
        return held


# ==================================================================================================
# rental.worker
#
# Order, watch and end the orders of one rental, in a thread of its own.
# ==================================================================================================


Result = TypeVar("Result")

GIVE_UP_WITHIN = 2.0  # three interrupts within these seconds stop the cancelling

# After these errors, no order exists.
NO_ORDER_ERRORS = (
    CloreAPIError,
    CloreConnectionError,
    RateUnknownError,
    SpendingLimitError,
    ValueError,  # a ConfigurationError is one
    TypeError,
)


class RentalClient(Protocol):
    """List the methods of ``CloreClient`` that a rental uses."""

    def get_orders(self, include_completed: bool = False) -> list[Order]: ...

    def get_order(self, order_id: Any) -> Order | None: ...

    def cancel_order(self, order_id: Any, *, confirm: bool) -> bool: ...

    def ssh_command(self, *args: Any, **kwargs: Any) -> str: ...

    def get_spot_market(self, server_id: int) -> dict[str, Any]: ...

    def wait_for_order(
        self, order_id: int, timeout: float, poll_interval: float, *, on_progress: Any = None
    ) -> Order: ...

    def create_order(self, *args: Any, **kwargs: Any) -> Order: ...

    def connect_ssh(self, *args: Any, **kwargs: Any) -> paramiko.SSHClient: ...

    def forward(self, *args: Any, **kwargs: Any) -> Forward: ...

    def shell(self, *args: Any, **kwargs: Any) -> int: ...

    def run(self, *args: Any, **kwargs: Any) -> CommandResult: ...

    def upload(self, *args: Any, **kwargs: Any) -> TransferResult: ...

    def download(self, *args: Any, **kwargs: Any) -> TransferResult: ...


class RentalWorker:
    """Run the thread that orders the servers of one rental, and ends their orders.

    The thread ends the orders when the block ends. An interrupt can stop ``__exit__`` at its first
    line, so the thread also ends them when the ``with`` statement or the rental no longer exists.
    Other reasons are a limit, a signal in another thread, and the exit of the interpreter.

    Attributes:
        budget: the limits and the cost.
        finished: open when the thread is done.
        failure: the error that the user must know; None if all orders have ended.
        connections: SSH connections to close at the end of the rental.
        closed: whether ``close()`` is done.
        kept: whether the order stays after the rental.
        signalled: the signal that ends the rental, or None.
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
        self._inbox = inbox
        self._holders = holders  # weak references to the rental, and to its with statement if any
        self.pid = os.getpid()
        self.budget = Budget(settings)
        self.finished = Gate()
        self.failure: BaseException | None = None
        self.connections: list[Any] = []
        self.closed = False
        self.kept = False
        self.signalled: int | None = None
        self._exceeded: BudgetExceededError | None = None  # made when a limit was reached
        # A signal ends a ``with`` block of the main thread, and so its rental.
        self._main = len(holders) > 1 and in_main_thread()
        self._signals: SignalHandling | None = None
        self._rental_orders = RentalOrders(orders, settings, folder, self.budget)
        self._current: RentalOrder | None = None  # the order of the block
        self._started = False
        self._interrupted_at: list[float] = []

    @property
    def gave_up(self) -> bool:
        """True if the rental stopped the cancelling, after three interrupts."""
        return self._rental_orders.abandoned

    # --- called by the rental, in its own thread ---

    def start(self) -> None:
        """Start the thread, and let signals and the exit of the interpreter end the rental."""
        self._signals = SignalHandling()
        context = contextvars.copy_context()
        this_process.rentals.add(self)
        try:
            # An interrupt can break threading.Thread.start(), so that the thread never runs.
            _thread.start_new_thread(context.run, (self._work,))
        except RuntimeError as error:
            this_process.rentals.discard(self)
            self.close()
            raise RentalError(
                f"nothing was rented, because the worker thread could not start: {error}"
            ) from error
        self._started = True

    def call_in_thread(self, action: Callable[[], Result]) -> Result:
        """Run a function in the worker thread, and return its result or raise its error.

        Before the thread has started, the function runs in this thread.
        """
        if not self._started:
            return action()
        request = ThreadCall(action)
        self._inbox.put(request)
        while not request.done.wait():
            if self.finished.is_open:
                raise RentalError("the rental has ended: call rent() again")
        if request.error is not None:
            raise request.error
        return request.result  # type: ignore[no-any-return]

    def record_existing_orders(self, orders: list[Order]) -> None:
        """Record the orders that exist before the first purchase."""
        self._rental_orders.before = {order.id for order in orders if order.id is not None}

    def buy(self, server: Server, price: float | None, arguments: dict[str, Any]) -> Order:
        """Order a server.

        Parameters:
            server: the server.
            price: its price in USD per hour, without fees.
            arguments: the arguments of ``create_order``.
        """
        return self.call_in_thread(lambda: self._buy(server, price, arguments))

    def end_order(self) -> None:
        """End the current order. Raise an error if that is not confirmed."""
        self.call_in_thread(self._end_current)

    def adopt(self, order: Order, ends: bool) -> None:
        """Take over an order that exists. Without ``ends``, the rental does not end it."""
        self.kept = not ends
        self._current = self.call_in_thread(lambda: self._rental_orders.adopt(order, ends))

    def keep(self, until: float | None) -> None:
        """Keep the current order running after the rental, until a Unix time or for good."""
        self.call_in_thread(lambda: self._keep(until))

    def correct_price(self, usd_per_hour: float) -> None:
        """Set the price of the current order to the one that the API shows."""
        if self._current is not None:
            self._current.meter.correct(usd_per_hour)

    def check(self) -> None:
        """Raise an error if a limit, a signal or the exit of the interpreter ends the rental."""
        if self.pid != os.getpid():
            return
        if not self.kept and self._current is not None and self._exceeds_limit():
            self._inbox.put(None)  # wake the worker, which ends the order
        if (exceeded := self.budget_error()) is not None:
            raise exceeded
        if self.signalled is None:
            self.signalled = None if in_main_thread() else this_process.stopping_signal
        if self.signalled is not None:
            raise SignalExit(self.signalled)
        if this_process.exiting:
            raise RentalError("the interpreter is exiting, so the rental has ended")

    def end(self, interrupted: bool) -> list[BaseException]:
        """End the rental, and wait until that is done. Safe to repeat.

        An interrupt during the wait skips the confirmation. The third interrupt within two seconds
        stops the cancelling too; an interrupt that ended the block counts.

        Parameters:
            interrupted: whether an interrupt ended the block.

        Returns:
            The interrupts during the wait.
        """
        self.request_end()
        if not self._started:  # nothing was bought; a thread that starts now ends at once
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
                self._rental_orders.skip_confirmation = True
                caught.append(interrupt)
                times.append(time.monotonic())
                if len(times) >= 3 and times[-1] - times[-3] <= GIVE_UP_WITHIN:
                    self.failure = self._rental_orders.abandon() or self.failure
                    break
        return caught

    def budget_error(self) -> BudgetExceededError | None:
        """Return the error for a limit that was reached, or None.

        Its text says whether the cancel was accepted.
        """
        if (first := self._exceeded) is None:
            return None
        ended = self._current is None or self._current.accepted
        state = "was ended" if ended else "is being ended"
        order_id, hours, cost = first.order_id, first.hours, first.cost_usd
        text = f"{first}: order {order_id} {state}, after {hours:.4g} h and {cost:.4g} USD"
        return BudgetExceededError(text, order_id=order_id, hours=hours, cost_usd=cost)

    def close_ssh(self) -> None:
        """Close the SSH connections of the rental."""
        while True:
            try:
                connection = self.connections.pop()
            except IndexError:  # empty
                return
            try:
                connection.close()
            except Exception as error:
                logger.debug("an SSH connection could not be closed: %s", error)

    def close(self) -> None:
        """Close the connections, and stop handling signals."""
        self.close_ssh()
        if self._signals is not None:
            self._signals.close()
        self.closed = True

    def request_end(self) -> None:
        """Let the worker thread end the rental, without waiting for it."""
        self._rental_orders.record_block_end()
        self._inbox.put(None)

    def on_signal(self, signum: int) -> None:
        """End the rental. This runs in a signal handler, so it must not take a lock."""
        if not self._main:
            self.signalled = signum
            self._inbox.put(None)

    # --- the thread ---

    def _work(self) -> None:
        try:
            while not (self._has_ended_block() or self.kept):
                self._next_request()
                if self._must_end_order():
                    self._end_early()
                self._rental_orders.search_unresolved(self._has_urgent_work)
        except BaseException as error:
            self.failure = error
        self._rental_orders.record_block_end()
        try:
            failure: BaseException | None = self._rental_orders.end_all()
        except BaseException as error:
            failure = error
        if not self._rental_orders.abandoned:
            self.failure = failure or self.failure
        this_process.rentals.discard(self)
        if self._block_is_gone():  # __exit__ did not run
            self.close()
            if self.failure is not None:
                logger.error("the end of an interrupted rental failed: %s", self.failure)
        self.finished.open()

    def _next_request(self) -> None:
        """Wait for a request of the rental, but not longer than until the next check."""
        timeouts = [] if self._exceeded else [self.budget.seconds_between_checks]
        if self._rental_orders.unresolved():
            timeouts.append(self._rental_orders.search_interval)
        timeout = min((t for t in timeouts if t is not None), default=None)
        request = next_item(self._inbox, timeout)
        if isinstance(request, ThreadCall):
            request.run()

    def _has_ended_block(self) -> bool:
        return self._rental_orders.block_ended_at is not None or self._block_is_gone()

    def _block_is_gone(self) -> bool:
        """Return whether the ``with`` statement or the rental no longer exists."""
        return any(holder() is None for holder in self._holders)

    def _has_urgent_work(self) -> bool:
        return not self._inbox.empty() or self._has_ended_block() or self._must_end_order()

    def _must_end_order(self) -> bool:
        current = self._current
        if current is None or current.accepted or current.order_id is None or self.kept:
            return False
        return self.signalled is not None or self._exceeds_limit()

    def _exceeds_limit(self) -> bool:
        """Check the limits, and return whether one was reached, now or before."""
        if self._exceeded is None and (limit := self.budget.exceeded_by()) is not None:
            order_id = None if self._current is None else self._current.order_id
            self._exceeded = BudgetExceededError(
                limit, order_id=order_id, hours=self.budget.hours, cost_usd=self.budget.cost_usd
            )
            logger.warning("%s", self.budget_error())
        return self._exceeded is not None

    # --- buying ---

    def _buy(self, server: Server, price: float | None, arguments: dict[str, Any]) -> Order:
        self.check()
        purchase = self._current = self._rental_orders.record_intent(server.id or 0, price)
        try:
            order: Order = self._client.create_order(purchase.server_id, **arguments)
            if order.id is None:
                raise OutcomeUnknownError(
                    "the response to create_order has no order id, so the order may exist: check "
                    "get_orders()"
                )
        except DatabaseError:
            self._rental_orders.mark_refused(purchase)
            self._current = None
            raise
        except NO_ORDER_ERRORS as error:
            # After an unknown code, or a response without one, the order may exist.
            if not isinstance(error, CloreAPIError) or error.code in ERROR_CODES:
                self._rental_orders.forget(purchase)
                self._current = None
            raise
        self._rental_orders.set_order_id(purchase, order.id)
        return order

    def _keep(self, until: float | None) -> None:
        current = self._current
        if current is None or current.order_id is None or current.accepted:
            raise RentalError("the order has ended already, so it can't be kept: rent again")
        self._rental_orders.keep(current, until)
        self.kept = True
        end = "it is cancelled"
        if until is not None:
            end = f"cancel_overdue() is called after {time.ctime(until)}"
        logger.info(
            "order %d is kept: it runs and costs money until %s; max_hours and max_cost_usd of the "
            "rental don't end it any more",
            current.order_id,
            end,
        )

    # --- the end ---

    def _end_early(self) -> None:
        """End the current order before the end of the block."""
        current = self._current
        if current is None or current.order_id is None:
            return
        # Close SSH in its own thread: neither it nor the cancel must wait for the other.
        threading.Thread(target=self.close_ssh, name="clore-rental-close", daemon=True).start()
        orders = self._rental_orders
        failure = orders.try_to_cancel(current, orders.deadline)
        if failure is not None:
            logger.error("order %d could not be cancelled: %s", current.order_id, failure)
        self.close_ssh()  # the block may have opened another connection

    def _end_current(self) -> None:
        current, self._current = self._current, None
        if current is not None and (failure := self._rental_orders.end(current)) is not None:
            raise failure


def _end_all() -> None:
    """End the rentals that are still open when the interpreter exits."""
    this_process.exiting = True
    # After three interrupts, the user does not want to wait.
    workers = [w for w in list(this_process.rentals) if not w.gave_up]
    for worker in workers:
        worker.request_end()
    for worker in workers:
        worker.end(interrupted=False)
        if worker.failure is not None:
            logger.error("the end of a rental at exit failed: %s", worker.failure)


atexit.register(_end_all)


# ==================================================================================================
# rental.rental
#
# Rent a server for the length of a block: find, order, wait, and cancel at the end.
# ==================================================================================================


Part = TypeVar("Part")
Rented = TypeVar("Rented", bound="Rental")
Attached = TypeVar("Attached", bound="AttachedRental")

LONGEST_KEEP = 87_600.0  # hours

# After these errors, rent() tries the next server.
TRY_NEXT_ERRORS = (
    ServerAlreadyRentedError,
    ServerOfflineError,
    CurrencyNotAllowedError,
    BidTooLowError,
    DatabaseError,
)


class Rental:
    """Rent a server for the length of a ``with`` block; see ``CloreClient.rent``.

    A worker thread, :class:`RentalWorker`, orders and cancels. The thread that runs the block
    searches for servers, and waits.

    Attributes:
        order: the order as it was when it started to run, with its ``ssh_password`` if the client
            generated one.
        server: the server as it was listed.
        tried: (server id, reason) for each server that did not work.
        servers: the servers to try; rentals that share them try no server twice.
    """

    def __init__(
        self,
        client: RentalClient,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        history: HostHistory,
        progress: ProgressOptions | None = None,
    ) -> None:
        self._client = client
        self._orders = orders
        self._settings = settings
        self._folder = folder
        self._history = history
        self._progress = progress or ProgressOptions()
        self._report: Report | None = None  # while servers are tried
        self.servers = SharedServers(orders.market, settings, history)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # requests to the worker
        self._block: weakref.ref[Any] | None = None
        self._worker: RentalWorker | None = None
        self._order: Order | None = None
        self._server: Server | None = None
        self._connection: Any = None  # shared by run(), upload() and the other methods
        self._kept_as = "kept"  # for the repr of a rental that does not end its order
        self._over = False  # set by request_end(), which can come before the block begins
        self.tried: list[tuple[int, str]] = []

    def __repr__(self) -> str:
        return f"<Rental of order {self._order.id if self._order else None}, {self._state()}>"

    def _state(self) -> str:
        worker = self._worker
        if self._order is not None and self._orders.has_ended(self._order.id):
            return "ended"
        if worker is not None and worker.kept:
            return self._kept_as
        return "not open" if worker is None or worker.finished.is_open else "open"

    # --- for users ---

    @property
    def order(self) -> Order:
        """The order as it was when it started to run."""
        return _check_open(self._order)

    @property
    def server(self) -> Server:
        """The server as it was listed."""
        return _check_open(self._server)

    @property
    def hours(self) -> float:
        """The hours since the first order of this rental."""
        return self._worker.budget.hours if self._worker else 0.0

    @property
    def cost_usd(self) -> float:
        """The cost so far in USD, with fees, including servers that did not work.

        It is an estimate from the price of the order, the exchange rate of the listing, a fee of
        5 % (spot: 1.25 %), and 0.10 USD after ten minutes (fees as seen on the live API). It counts
        from the send of the order until its cancel is accepted. A new bid of this client counts
        from its time on.
        """
        return self._worker.budget.cost_usd if self._worker else 0.0

    @property
    def status(self) -> str:
        """The status of the order now, from one read of the lists."""
        found = self._client.get_order(self.order)
        return (self.order if found is None else found).status or ""

    def ssh(self, **options: Any) -> paramiko.SSHClient:
        """Open an SSH connection, which the end of the block closes. Needs paramiko.

        Parameters:
            **options: arguments of :meth:`CloreClient.connect_ssh`, for example ``key_path=``.

        Returns:
            A connected ``paramiko.SSHClient``.
        """
        worker = self._open_worker()
        try:
            connection = self._client.connect_ssh(self.order, **options)
        except Exception:
            worker.check()  # the rental may have ended
            raise
        worker.connections.append(connection)
        try:
            worker.check()
        except BaseException:
            connection.close()
            raise
        return connection

    def run(self, command: str | Sequence[str], **options: Any) -> CommandResult:
        """Run a command on the server, as :meth:`CloreClient.run` does. Needs paramiko.

        Parameters:
            command: a command for the server's shell; a list of arguments is quoted.
            **options: arguments of :meth:`CloreClient.run`. All calls share one connection, so
                login arguments only have an effect in the first call.

        Raises:
            CommandError: the exit code was not 0.
            BudgetExceededError: the rental has reached a limit, and has ended.
        """
        return self._call_with_ssh(self._client.run, command, **options)

    def upload(self, local: Any, remote: Any, **options: Any) -> TransferResult:
        """Copy a file or directory to the server, as :meth:`CloreClient.upload` does."""
        return self._call_with_ssh(self._client.upload, local, remote, **options)

    def download(self, remote: Any, local: Any, **options: Any) -> TransferResult:
        """Copy a file or directory from the server, as :meth:`CloreClient.download` does."""
        return self._call_with_ssh(self._client.download, remote, local, **options)

    def forward(self, remote_port: int, local_port: int = 0) -> Forward:
        """Forward a local port to the server, as :meth:`CloreClient.forward` does."""
        return self._call_with_ssh(self._client.forward, remote_port, local_port)

    def shell(self) -> int:
        """Open the server's shell in this terminal, as :meth:`CloreClient.shell` does."""
        return self._call_with_ssh(self._client.shell)

    def ssh_command(self, **options: Any) -> str:
        """Return the command that logs in from a terminal; see :meth:`CloreClient.ssh_command`."""
        return self._client.ssh_command(self.order, **options)

    def _call_with_ssh(self, method: Callable[..., Part], /, *args: Any, **options: Any) -> Part:
        """Call a method of the client with the rental's own connection."""
        worker = self._open_worker()
        login = {name: options.pop(name) for name in LOGIN_DEFAULTS.keys() & options.keys()}
        if self._connection is None or not is_connected(self._connection):
            self._connection = self.ssh(**login)
        try:
            return method(self.order, *args, ssh=self._connection, **options)
        finally:
            worker.check()

    def keep(self, *, max_hours: float | None = None) -> Order:
        """Keep the order running after the end of the block, until you cancel it.

        The budget ends here: ``max_hours`` and ``max_cost_usd`` of the rental, signals and the exit
        of the interpreter don't end the order any more. :meth:`CloreClient.leftovers` lists it
        under ``kept``, and :meth:`CloreClient.attach` returns a rental for it.

        On a rental from :meth:`CloreClient.attach`, this has no effect on the process that rented
        the order: that process still ends it at the end of its own block, or at its limits.

        Parameters:
            max_hours: hours from now after which :meth:`CloreClient.cancel_overdue` ends the order.
                Nothing calls that method for you: call it from cron.

        Returns:
            The :class:`Order`.

        Raises:
            RentalError: the order has ended, or its deadline can't be recorded; it is not kept.
        """
        check_optional_number("max_hours", max_hours, above=True, maximum=LONGEST_KEEP)
        worker, order = self._open_worker(), self.order
        if worker.finished.is_open:
            raise RentalError(
                f"order {order.id} has ended already, so it can't be kept: rent again"
            )
        worker.keep(None if max_hours is None else time.time() + max_hours * 3600.0)
        self._kept_as = "kept"
        return order

    def cancel(self) -> None:
        """End the order now, and wait until that is confirmed. Safe to repeat.

        Raises:
            CancelUnconfirmedError: the order may still be running.
        """
        worker = _check_open(self._worker)
        if worker.kept:
            worker.close_ssh()
            self._client.cancel_order(self.order, confirm=True)
        else:
            self.close()

    # --- without a block ---

    def start(self: Rented) -> Rented:
        """Begin the rental without a ``with`` block, for a notebook; :meth:`close` ends it.

        It also ends when this object is no longer used, by SIGTERM and SIGHUP, and at the exit of
        the interpreter, as the rental of a block does.

        Returns:
            The rental itself.

        Example:
            >>> rental = client.rent("RTX 4090", max_hours=8).start()
            >>> rental.run("nvidia-smi -L")
            >>> rental.close()
        """
        return self.__enter__()

    def close(self) -> None:
        """End the rental as the end of its block does. Safe to repeat."""
        worker = self._worker
        if worker is not None and worker.closed:
            worker.close_ssh()
        else:
            self._end()

    def _open_worker(self) -> RentalWorker:
        """Return the worker, or raise an error if the rental has ended."""
        worker = _check_open(self._worker)
        worker.check()
        return worker

    def close_ssh(self) -> None:
        """Close the SSH connections of the rental; the next call opens a new one."""
        if self._worker is not None:
            self._worker.close_ssh()

    def request_end(self) -> None:
        """Ask the worker to end the rental, and do not wait for that.

        A rental that has not begun can't begin any more.
        """
        self._over = True
        if self._worker is not None:
            self._worker.request_end()

    # --- the block ---

    def end_with(self, leave: Callable[..., None]) -> None:
        """End this rental when ``leave``, the end of a ``with`` statement, no longer exists."""
        if self._worker is None:
            self._block = weakref.ref(leave, self._inbox.put)

    def _make_worker(self) -> RentalWorker:
        holders: list[weakref.ref[Any]] = [weakref.ref(self, self._inbox.put)]
        if self._block is not None and self._block() is not None:
            holders.append(self._block)
        return RentalWorker(
            self._client, self._orders, self._settings, self._folder, self._inbox, holders
        )

    def share_with(self, other: Rental) -> None:
        """Share the found servers with another rental, so that both try different ones."""
        self.servers, self._settings = other.servers, other._settings
        self._progress = other._progress

    def __enter__(self: Rented) -> Rented:
        if self._worker is not None:
            raise RentalError("a rental can be entered only once: call rent() again")
        self._worker = self._make_worker()
        if self._over:
            raise RentalError("the rental has ended before it began: call rent() again")
        try:
            self._worker.start()
            with self._progress.reporting() as self._report:
                self._acquire(self._worker)
            self._report = None
        except BaseException as error:
            self._end(type(error), error)
            raise
        return self

    __exit__ = BlockExit()

    def _end(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """End the rental; raise an error if that failed, or a limit or signal ended it."""
        worker = self._worker
        if worker is None or worker.pid != os.getpid():
            return  # in a forked child, the order belongs to the parent
        interrupts: list[BaseException] = []
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        while not worker.closed:
            try:
                interrupts += worker.end(interrupted)
                worker.close()
            except (KeyboardInterrupt, SystemExit) as late:  # outside the waits of end()
                interrupts.append(late)
                interrupted = True
        self._connection = None
        _raise_failure(error, worker, interrupts)

    # --- servers ---

    def _acquire(self, worker: RentalWorker) -> None:
        """Try one server after the other until one runs."""
        worker.record_existing_orders(self._client.get_orders())
        for _ in range(self._settings.attempts):
            worker.check()
            if (server := self.servers.take()) is None:
                break
            reason = self._try(worker, server)
            if reason is None:
                return
            logger.info("server %s: %s", server.id, reason)
            self.tried.append((server.id or 0, reason))
        raise RentalError(
            f"none of {len(self.tried)} servers worked: {summary(self.tried)}"
            if self.tried
            else self.servers.no_server,
            tried=tuple(self.tried),
        )

    def _try(self, worker: RentalWorker, server: Server) -> str | None:
        """Rent a server. Return None if it runs, else the reason why it does not work."""
        price = self._settings.price_of(server)
        shown = "price unknown" if price is None else f"{price:.3g} USD/h"
        gpu = server.gpu if is_mixed(server) else server.gpu_name
        self._report_step("rent", f"renting server {server.id} ({gpu}, {shown})")
        arguments = dict(self._settings.order_arguments)
        try:
            if self._settings.spot:
                arguments["spot_price"] = price
                # Read the exchange rate now, because the cost counts from the purchase on.
                self._client.get_spot_market(server.id or 0)
            order = worker.buy(server, price, arguments)
        except TRY_NEXT_ERRORS as error:
            return str(error)
        self._report_step("order", f"order {order.id} of server {server.id}")
        self._order, self._server = order, server
        reason = self._over_limit(worker, order, server) or self._deploy(worker, order, server)
        if reason is None:
            return None
        worker.check()
        self._order = self._server = None
        worker.end_order()
        return reason

    def _report_step(self, name: str, text: str) -> None:
        if self._report is not None:
            self._report(ProgressEvent(name, 3600 * self.hours, text))

    def _deploy(self, worker: RentalWorker, order: Order, server: Server) -> str | None:
        """Wait until an order runs. Return None, or the reason why it does not."""
        timeout, interval = self._settings.deploy_timeout, self._settings.poll_interval
        # A subclass of the client may have the documented parameters only.
        more: dict[str, Any] = {} if self._report is None else {"on_progress": self._report}
        try:
            running = self._client.wait_for_order(
                order.id or 0, timeout=timeout, poll_interval=interval, **more
            )
        except (WaitTimeoutError, OrderEndedError) as error:
            worker.check()
            self._history.record(server.id, NOT_DEPLOYED)
            return str(error)
        self._history.record(server.id, WORKED)
        if "ssh_password" in order:
            running["ssh_password"] = order["ssh_password"]
        self._order = running
        reason = self._over_limit(worker, running, server)
        if reason is None:
            worker.check()
        return reason

    def _over_limit(self, worker: RentalWorker, order: Order, server: Server) -> str | None:
        price = order_usd_per_hour(order, server, self._settings.currency)
        if price is not None:
            worker.correct_price(price)
        if not self._settings.exceeds_price_limit(server, price):
            return None
        return f"order {order.id} costs {price:.4g} USD per hour, more than max_price_usd"


class AttachedRental(Rental):
    """Use an order that exists like a rental; see ``CloreClient.attach``.

    Parameters:
        order: the order.
        ends: whether the end of the block ends the order. Without it, the rental can be used at
            once, with and without a block.
    """

    def __init__(
        self,
        client: RentalClient,
        orders: AccountOrders,
        settings: RentalSettings,
        folder: Path | None,
        history: HostHistory,
        order: Order,
        ends: bool,
    ) -> None:
        super().__init__(client, orders, settings, folder, history)
        self._order = order
        self._ends = ends
        self._priced = order.usd_per_hour is not None
        if not ends:
            self._kept_as = "attached"
            self._worker = self._make_worker()
            self._worker.adopt(order, ends=False)

    @property
    def server(self) -> Server:
        """The server as it is listed now, from one read of the marketplace."""
        if self._server is None:
            found = self._orders.market.find_server(self.order.server_id or 0)
            if found is None:
                raise RentalError(
                    f"server {self.order.server_id} is not on the marketplace any more: its order "
                    "has the price"
                )
            self._server = found
        return self._server

    @property
    def cost_usd(self) -> float:
        """The cost so far in USD, with fees; see :attr:`Rental.cost_usd`.

        If the price in USD is not known, the first use reads the marketplace.
        """
        self._find_price()
        return super().cost_usd

    def _find_price(self) -> None:
        order, worker = self.order, self._worker
        if self._priced or worker is None:
            return
        self._priced = True
        currency = self._settings.currency
        price = order_usd_per_hour(order, self.server, currency)
        # The marketplace was just read, and may have the exchange rate.
        price = price or self._orders.market.data.rates.usd(order.get("price"), currency)
        if not self._settings.spot:
            price = price or on_demand_usd(self.server, currency)
        if price is not None:
            worker.correct_price(price)

    def __enter__(self: Attached) -> Attached:
        return super().__enter__() if self._ends else self

    def _acquire(self, worker: RentalWorker) -> None:
        worker.adopt(self.order, ends=True)
        if self._settings.max_cost_usd is not None:
            self._find_price()


def _raise_failure(
    error: BaseException | None, worker: RentalWorker, interrupts: list[BaseException]
) -> None:
    """Raise an error, or add a note to ``error``, if a rental failed or was ended early.

    Parameters:
        error: the exception of the block, or None.
        worker: the worker, which has ended the rental or was interrupted.
        interrupts: the interrupts during the end of the rental.
    """
    raised: BaseException | None = None
    if error is None or isinstance(error, Exception):
        exceeded = worker.budget_error()
        if exceeded is not None and not _is_of(error, exceeded.order_id):
            raised = exceeded
        elif interrupts:
            raised = interrupts[-1]
        elif worker.signalled is not None and not worker.kept:
            raised = SignalExit(worker.signalled)
    if (failure := worker.failure) is not None:
        if (shown := raised or error) is None:
            raise failure
        if str(shown) != str(failure):  # the block may raise the error of close() itself
            add_note(shown, str(failure))
    if raised is not None:
        raise raised from error


def _check_open(part: Part | None) -> Part:
    """Return a part of a rental, or raise an error before the block begins."""
    if part is None:
        raise RentalError("nothing is rented: use it as `with client.rent(...) as rental:`")
    return part


def _is_of(error: BaseException | None, order_id: int | None) -> bool:
    return isinstance(error, BudgetExceededError) and error.order_id == order_id


# ==================================================================================================
# rental.group
#
# Rent several servers at once, and end them together.
# ==================================================================================================


GroupResult = TypeVar("GroupResult")


class RentalGroup:
    """Begin and end several rentals together; see ``CloreClient.rent_many``.

    It is a sequence of the rentals that run: ``len(rentals)``, ``rentals[0]``, ``for rental in
    rentals``.

    Parameters:
        rentals: the rentals, which have not begun.
        min_count: how many must run.
    """

    def __init__(self, rentals: list[Rental], min_count: int) -> None:
        self._all = rentals
        for rental in rentals[1:]:
            rental.share_with(rentals[0])
        self._min_count = min_count
        self._running: list[Rental] = []
        self._signals: SignalHandling | None = None
        self._started = False

    def __len__(self) -> int:
        return len(self._running)

    def __getitem__(self, number: int) -> Rental:
        return self._running[number]

    def __iter__(self) -> Iterator[Rental]:
        return iter(list(self._running))

    def __repr__(self) -> str:
        return f"<RentalGroup of {len(self._all)}: {self._running}>"

    # --- for users ---

    @property
    def cost_usd(self) -> float:
        """The cost so far of all rentals, in USD; see :attr:`Rental.cost_usd`."""
        return sum(rental.cost_usd for rental in self._all)

    def run(self, command: str | Sequence[str], **options: Any) -> list[CommandResult]:
        """Run a command on all servers at once; see :meth:`Rental.run`.

        Returns:
            A list with the result of each rental, in their order.

        Raises:
            CommandError: the command failed on one server; on the others, it has ended too.
        """
        return self.map(lambda rental: rental.run(command, **options))

    def map(self, function: Callable[[Rental], GroupResult]) -> list[GroupResult]:
        """Call a function with each rental, each in a thread of its own.

        After Ctrl-C, the SSH connections of the rentals are closed.

        Returns:
            A list with the result for each rental, in their order.

        Example:
            >>> rentals.map(lambda rental: rental.upload("train.py", "work/"))
        """
        from concurrent.futures import ThreadPoolExecutor, wait  # slow to import

        with ThreadPoolExecutor(max(1, len(self._running))) as pool:
            calls = [pool.submit(function, rental) for rental in self._running]
            try:
                wait(calls)
            except BaseException:
                for rental in self._running:
                    rental.close_ssh()
                raise
        return [call.result() for call in calls]

    # --- the block ---

    def end_with(self, leave: Callable[..., None]) -> None:
        """End all rentals when ``leave``, the end of a ``with`` statement, no longer exists."""
        for rental in self._all:
            rental.end_with(leave)

    def __enter__(self) -> RentalGroup:
        # The rentals begin in other threads, for which only the main thread can handle signals.
        if self._started:
            raise RentalError("a group of rentals can be entered only once: call rent_many() again")
        self._started = True
        self._signals = SignalHandling() if in_main_thread() else None
        try:
            self._begin()
        except BaseException as error:
            self._end(type(error), error)
            raise
        return self

    __exit__ = BlockExit()

    def _begin(self) -> None:
        """Begin all rentals at once, and wait until enough of them run."""
        from concurrent.futures import ThreadPoolExecutor, as_completed

        servers = self._all[0].servers
        if (found := servers.count()) < self._min_count:
            raise RentalError(
                f"at least {self._min_count} servers must run, and {found} fit the filters: ask "
                "for fewer, or change the filters"
                if found
                else servers.no_server
            )
        pool = ThreadPoolExecutor(len(self._all), "clore-rent-many")
        calls = [pool.submit(rental.start) for rental in self._all]
        pool.shutdown(wait=False)
        failed: list[BaseException] = []
        for call in as_completed(calls):
            if (error := call.exception()) is None:
                continue
            if not isinstance(error, CloreError):
                raise error  # for example one that on_progress raised
            failed.append(error)
            if len(self._all) - len(failed) < self._min_count:
                raise self._too_few(failed)
        self._running = [r for r, c in zip(self._all, calls, strict=True) if not c.exception()]
        for error in failed:
            logger.warning("%d of %d rentals run: %s", len(self._running), len(calls), error)

    def _too_few(self, errors: list[BaseException]) -> BaseException:
        """Return the error for a group in which too few rentals run."""
        serious = [error for error in errors if type(error) is not RentalError]
        if serious:
            return serious[0]
        tried = [pair for rental in self._all for pair in rental.tried]
        reasons = summary(tried) if tried else str(errors[0])
        return RentalError(
            f"{len(self._all)} servers were wanted, at least {self._min_count} must run, and "
            f"{len(errors)} rentals failed, so none is rented: {reasons}",
            tried=tuple(tried),
        )

    def _end(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """End all rentals at once, and raise one error for those that failed."""
        self._running = []
        for rental in self._all:
            rental.request_end()
        failures: list[BaseException] = []
        for rental in self._all:
            try:
                rental.__exit__(kind, error, trace)
            except BaseException as failure:
                failures.append(failure)
        if self._signals is not None:
            self._signals.close()
        if failures:
            _raise_first(error, failures)


def _raise_first(error: BaseException | None, failures: list[BaseException]) -> None:
    """Raise the most serious failure, with the others as notes."""
    unconfirmed = [f for f in failures if isinstance(f, CancelUnconfirmedError)]
    # An interrupt comes first. The sort keeps the order of the others.
    first, *others = sorted(failures, key=lambda failure: isinstance(failure, Exception))
    if len(unconfirmed) > 1 and isinstance(first, Exception):
        ids = tuple(order_id for failure in unconfirmed for order_id in failure.order_ids)
        first = CancelUnconfirmedError("; ".join(map(str, unconfirmed)), order_ids=ids)
        others = [f for f in failures if not isinstance(f, CancelUnconfirmedError)]
    for other in others:
        add_note(first, str(other))
    raise first from error


# ==================================================================================================
# rental.recovery
#
# Find and cancel the orders that rentals of dead processes left running.
# ==================================================================================================


LEFTOVER_READ_INTERVAL = 1.0  # between two reads, while an order may not be listed yet


class Leftover:
    """An order that a rental left running, with the data of its journal entry.

    Attributes:
        order: the order as it is listed now. None if it is in no list, which does not mean that it
            has ended.
        order_id, server_id: the ids; ``order_id`` can be None if ``order`` is None.
        started: Unix time of the purchase.
        host, pid: the machine and the process that ordered it.
        kept_until: Unix time of the deadline of a kept order, or None.
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
        self.kept_until = finite(data.get("kept_until"))

    def __repr__(self) -> str:
        until = ""
        if self.kept_until is not None:
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.kept_until))
            until = f", kept until {moment}"
        by = "" if self.pid is None else f", by process {self.pid} on {self.host!r}"
        return f"<Leftover order {self.order_id} of server {self.server_id}{by}{until}>"


class Leftovers:
    """Hold the result of ``CloreClient.leftovers``. It is false if all lists are empty.

    Attributes:
        abandoned: orders that may still run, of dead processes of this machine.
        elsewhere: journal entries of other machines; their processes may be alive.
        unrecorded: active orders of the account without a journal entry.
        kept: orders that rentals of this machine kept with ``keep()``.
    """

    def __init__(
        self,
        abandoned: list[Leftover],
        elsewhere: list[Leftover],
        unrecorded: list[Order],
        kept: list[Leftover],
    ) -> None:
        self.abandoned, self.elsewhere = abandoned, elsewhere
        self.unrecorded, self.kept = unrecorded, kept

    def __bool__(self) -> bool:
        """Return whether any of the lists has an item."""
        return bool(self.abandoned or self.elsewhere or self.unrecorded or self.kept)

    def __repr__(self) -> str:
        return (
            f"<Leftovers: {self.abandoned}, {len(self.elsewhere)} of other machines, "
            f"{len(self.unrecorded)} orders without an entry, kept: {self.kept}>"
        )


class _Survey:
    """Read the journal entries and the active orders once, and match them.

    Attributes:
        entries: the journal entries of the account.
        listed: order id -> the active order.
        unrecorded: the active orders without an entry.
        missing: entries with an order id that no list has.
    """

    def __init__(self, orders: AccountOrders, folder: Path | None) -> None:
        self._orders = orders
        account = orders.account
        self.entries: list[JournalEntry] = []
        self.missing: list[JournalEntry] = []
        self._kept: list[JournalEntry] = []
        self._matched: dict[Path, Order] = {}  # path of an entry -> its order
        self._read(folder, account)
        try:
            self.listed = {o.id: o for o in orders.active() if o.id is not None}
            # Read the entries again, because another process may have ordered between the reads.
            self._read(folder, account)
            # After the journal, because keep() records an order before it removes the entry.
            self._kept = kept_entries(folder, account)
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
        """Release the locks of the entries."""
        for entry in [*self.entries, *self._kept]:
            entry.close()

    def _match(self) -> None:
        kept = {entry.order_id or 0 for entry in self._kept}
        for entry in list(self.entries):
            if entry.order_id in kept and entry.abandoned:  # its process died within keep()
                entry.remove()
                self.entries.remove(entry)
        named = kept | {entry.order_id for entry in self.entries}
        living: set[int] = set()  # orders that may belong to living processes
        for entry in self.entries:
            fitting = self._fitting(entry, named)
            if entry.of_this_machine and not entry.abandoned:
                living.update(order.id or 0 for order in fitting)
            elif len(fitting) > 1:
                logger.warning(
                    "several orders match %s, so none is assigned to it: check get_orders()",
                    entry.path,
                )
            elif fitting:
                self._matched[entry.path] = fitting[0]
        recorded = kept | living | {order.id for order in self._matched.values()}
        self.unrecorded = [
            o for i, o in self.listed.items() if i not in recorded and not o.has_ended
        ]
        self._settle_conflicts(living)

    def _fitting(self, entry: JournalEntry, named: Collection[int | None]) -> list[Order]:
        """Return the active orders that can belong to an entry."""
        if entry.order_id is not None:
            return [self.listed[entry.order_id]] if entry.order_id in self.listed else []
        unnamed = (order for number, order in self.listed.items() if number not in named)
        return [order for order in unnamed if matches_entry(entry.data, order)]

    def _settle_conflicts(self, living: set[int]) -> None:
        """Assign at most one entry to each order."""
        entries_of: dict[int, list[JournalEntry]] = {}
        for entry in self.entries:
            if (order := self._matched.get(entry.path)) is not None:
                entries_of.setdefault(order.id or 0, []).append(entry)
        for order_id, entries in entries_of.items():
            all_dead = all(entry.abandoned for entry in entries)
            if order_id in living or (len(entries) > 1 and not all_dead):
                logger.warning(
                    "order %d may belong to another process, so it is not touched", order_id
                )
                losers = entries
            else:
                # All processes are dead, and the last one most likely made the order.
                entries.sort(key=lambda entry: finite(entry.data.get("started")) or 0.0)
                losers = entries[:-1]
            for entry in losers:
                del self._matched[entry.path]

    def order_of(self, entry: JournalEntry) -> Order | None:
        """Return the active order of an entry, or None."""
        order = self._matched.get(entry.path)
        return None if order is None or order.has_ended else order

    def undecided(self, wait: float) -> bool:
        """Return whether the order of a dead process could still be missing from the lists."""
        return any(
            entry.abandoned and self.order_of(entry) is None and _is_recent(entry.data, wait)
            for entry in self.entries
        )

    def tidy(self, wait: float) -> None:
        """Remove the entries of orders that have ended or do not exist."""
        intents: list[JournalEntry] = []
        for entry in self.entries:
            if not entry.abandoned or self.order_of(entry) is not None:
                continue
            if entry.order_id is None:
                if not _is_recent(entry.data, LATEST_ORDER + CLOCKS_APART):
                    intents.append(entry)
            elif not _is_recent(entry.data, wait):
                if _has_ended(self._orders, entry.order_id):
                    logger.info("the order of %s has ended: the entry is removed", entry.path)
                    entry.remove()
                else:
                    self.missing.append(entry)
        if intents:
            self._tidy_intents(intents)
        for entry in list(self._kept):
            order_id = entry.order_id or 0
            if order_id not in self.listed and _has_ended(self._orders, order_id):
                entry.remove()
                self._kept.remove(entry)
        with contextlib.suppress(CloreError):
            self._orders.tidy_credentials(set(self.listed))

    def _tidy_intents(self, entries: list[JournalEntry]) -> None:
        # One list is not enough, because it can be empty for a moment.
        time.sleep(self._orders.client.order_lag)
        orders = self._orders.active()
        for entry in entries:
            if not any(matches_entry(entry.data, order) for order in orders):
                logger.info("%s has no order: the entry is removed", entry.path)
                entry.remove()

    def abandoned(self) -> list[tuple[JournalEntry, Order | None]]:
        """Return the entries of dead processes of this machine with orders that may run."""
        return [
            (entry, order)
            for entry in self.entries
            if entry.abandoned
            and ((order := self.order_of(entry)) is not None or entry in self.missing)
        ]

    def result(self) -> Leftovers:
        """Return the leftovers for the user."""
        abandoned = [Leftover(entry, order) for entry, order in self.abandoned()]
        found = [(e, self.order_of(e)) for e in self.entries if not e.of_this_machine]
        kept = [(e, self.listed.get(e.order_id or 0)) for e in self._kept]
        found += [(e, order) for e, order in kept if not e.of_this_machine]
        elsewhere = [Leftover(entry, order) for entry, order in found]
        here = [Leftover(e, order) for e, order in kept if e.of_this_machine]
        return Leftovers(abandoned, elsewhere, self.unrecorded, here)


def _is_recent(data: dict[str, Any], seconds: float) -> bool:
    started = finite(data.get("started"))
    # A time in the future is recent too, as the clock may have been set back.
    return started is not None and time.time() - started < seconds


def _take_survey(orders: AccountOrders, folder: Path | None, wait: float) -> _Survey:
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
        time.sleep(min(LEFTOVER_READ_INTERVAL, max(0.01, wait / 10), remaining))


def find_leftovers(orders: AccountOrders, folder: Path | None, wait: float) -> Leftovers:
    """Find the orders that rentals left running; see ``CloreClient.leftovers``."""
    with contextlib.closing(_take_survey(orders, folder, wait)) as survey:
        return survey.result()


def end_leftovers(
    orders: AccountOrders, folder: Path | None, wait: float, timeout: float
) -> list[int]:
    """Cancel the orders that dead processes left; see ``CloreClient.cancel_leftovers``."""
    with contextlib.closing(_take_survey(orders, folder, wait)) as survey:
        # The entries are locked, so no other process cancels the same orders.
        return _end_entries(orders, survey.abandoned(), timeout, "cancel_leftovers()")


def end_overdue(orders: AccountOrders, folder: Path | None, timeout: float) -> list[int]:
    """Cancel the kept orders that are past their deadline; see ``CloreClient.cancel_overdue``."""
    overdue: list[JournalEntry] = []
    for entry in kept_entries(folder, orders.account):
        until = finite(entry.data.get("kept_until"))
        if entry.abandoned and until is not None and until <= time.time():
            overdue.append(entry)
        else:
            entry.close()
    try:
        listed = {order.id: order for order in orders.active()} if overdue else {}
        pairs = []
        for entry in overdue:
            if entry.order_id not in listed and _has_ended(orders, entry.order_id or 0):
                entry.remove()
            else:
                pairs.append((entry, listed.get(entry.order_id)))
        return _end_entries(orders, pairs, timeout, "cancel_overdue()")
    finally:
        for entry in overdue:
            entry.close()


def _has_ended(orders: AccountOrders, order_id: int) -> bool:
    """Return whether an order is known to have ended."""
    try:
        return orders.state(order_id) == "ended"
    except CloreError as error:  # it must not stop the cancels of the other orders
        logger.debug("the state of order %d can't be read: %s", order_id, error)
        return False


def _end_entries(
    orders: AccountOrders,
    entries: list[tuple[JournalEntry, Order | None]],
    timeout: float,
    again: str,
) -> list[int]:
    """Cancel the orders of journal entries, and remove the entries.

    Parameters:
        orders: the orders of the account.
        entries: locked entries, with their order if a list has it.
        timeout: seconds to keep sending each cancel.
        again: the method to call again, for the error text.
    """
    ended: list[int] = []
    failed: dict[int, BaseException] = {}
    for entry, order in entries:
        order_id = entry.order_id if order is None else order.id
        if order_id is None:
            continue
        failure = _end_order(orders, order_id, timeout, listed=order is not None)
        if failure is None:
            logger.info("order %d has ended", order_id)
            entry.remove()
            ended.append(order_id)
        else:
            failed[order_id] = failure
    if failed:
        ids = ", ".join(map(str, failed))
        raise CancelUnconfirmedError(
            f"orders not confirmed to have ended: {ids} (ended: {ended}); they may still be "
            f"running, and cost money, so call {again} again",
            order_ids=tuple(failed),
        ) from next(iter(failed.values()))
    return ended


def _end_order(
    orders: AccountOrders, order_id: int, timeout: float, listed: bool
) -> CloreError | None:
    """Cancel an order, and confirm that it has ended. Return None, or the error."""
    started = time.monotonic()
    # An order that no list has may have ended, and the API may refuse its cancel forever.
    until = started + (timeout if listed else min(timeout, orders.client.order_lag))
    cancellation = Cancellation(orders, order_id)
    failure = cancellation.run(lambda: until, confirm=False)
    if failure is None:
        confirmed_by = confirm_until(started, timeout)
        failure = cancellation.run(lambda: confirmed_by, confirm=True)
    return failure


# ==================================================================================================
# ssh.transport
#
# Prepare paramiko's connections and channels: limits of memory and time, and fast ciphers.
#
# paramiko has no settings for most of this, so attributes of its objects are replaced. Two of them
# are private: ``Packetizer._read_timeout`` and ``Transport._send_user_message``. A test names the
# versions of paramiko that have them.
# ==================================================================================================


PARAMIKO_LOGGER = "clore_client.paramiko"
REKEY_BYTES = 2**36
MAX_GREETING = 2**18  # bytes before the key exchange; OpenSSH sends a few hundred at most
MAX_PACKET = 2**22  # bytes; far more than a host is asked to send
CHANNEL_PACKET = 131072  # bytes; needs a fourth of the packets that 32 KB would need
COMMAND_WINDOW = 2**21  # bytes
CHANNEL_PAUSE = 0.05  # seconds between two attempts to open a channel
SPARE_PATIENCE = 1.0  # seconds for another thread to take a channel that the host has opened
KEEPALIVE = 15.0  # seconds of silence after which a keepalive request is sent
DEAD_AFTER = 38.0  # seconds of silence after which a connection counts as dead
SILENCE_CHECK = 5.0  # seconds between two checks for silence
WATCH_INTERVAL = 0.1  # seconds between two checks of the watchdog's limits
# Messages with a count of items: paramiko does not check it against the length of the message.
_EXT_INFO, _INFO_REQUEST, _SERVICE_ACCEPT = 7, 60, 6
_WINDOW_ADJUST, _CHANNEL_CLOSE = b"\x5d", b"\x61"
# Both ciphers include authentication, and are nearly twice as fast as CTR with a MAC.
FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")


def import_paramiko() -> Any:
    """Import paramiko, or raise an ImportError that says what to install."""
    try:
        import paramiko
    except ImportError as error:
        raise ImportError("SSH needs paramiko: pip install paramiko scp") from error
    # It logs each failure with a traceback and the host's own text, which Python would print. A
    # handler of the user still gets them.
    quiet = logging.getLogger(PARAMIKO_LOGGER)
    if not quiet.handlers:
        quiet.addHandler(logging.NullHandler())
        quiet.propagate = False
    return paramiko


class NoChannelError(SSHError):
    """A host opens no further channel on a connection; sshd's MaxSessions is ten by default."""


def takes_turns(transport: Any) -> bool:
    """Return True if no command may start while another one of the connection ends.

    When one ends, dropbear (2022.83) closes every channel whose command has not started yet.
    """
    return "dropbear" in str(getattr(transport, "remote_version", ""))


def prepared_transport(
    sock: Any, options: dict[str, Any], timeout: float, key_types: Iterable[str]
) -> Any:
    """Make a transport for ``SSHClient.connect``.

    Parameters:
        options: the arguments of paramiko for the transport.
        timeout: seconds for the handshake.
        key_types: of the host's keys, the preferred ones first.
    """
    import paramiko

    transport: Any = paramiko.Transport(sock, **options)
    transport.spare = SpareSession(transport)
    # In a new key exchange while several threads send, paramiko deadlocks for 30 s and then closes
    # the connection. So there is none before 64 GB, which is also OpenSSH's limit.
    transport.packetizer.REKEY_BYTES = REKEY_BYTES
    transport.handshake_timeout = timeout
    _limit_packets(transport.packetizer, paramiko.SSHException)
    _name_errors(transport, paramiko.SSHException)
    with contextlib.suppress(OSError, AttributeError):
        # Otherwise a small packet waits up to 40 ms for the TCP ACK of the previous one.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    security = transport.get_security_options()
    security.ciphers = _preferred(security.ciphers, FAST_CIPHERS)
    security.key_types = _preferred(security.key_types, key_types)
    return transport


def _preferred(names: Any, first: Any) -> list[str]:
    """Return ``names``, with those that are also in ``first`` at the front."""
    return [n for n in first if n in names] + [n for n in names if n not in first]


def _limit_packets(packetizer: Any, error: type[Exception]) -> None:
    """Limit what a host may send: paramiko accepts lines, packets and counts of any size."""
    read_timeout, read_all = packetizer._read_timeout, packetizer.read_all
    read_message = packetizer.read_message
    greeting = 0
    packetizer.last_received = time.monotonic()

    def limited_greeting(timeout: float) -> Any:
        nonlocal greeting
        piece = read_timeout(timeout)
        greeting += len(piece)
        if greeting > MAX_GREETING:
            raise error(": it has no end")
        return piece

    def limited_packet(size: int, check_rekey: bool = False) -> Any:
        if size > MAX_PACKET:
            raise error(f"it sends a packet of {size} bytes")
        return read_all(size, check_rekey)

    def limited_message() -> Any:
        kind, message = read_message()
        then, packetizer.last_received = packetizer.last_received, time.monotonic()
        if kind == _SERVICE_ACCEPT:  # it was requested right after the previous message
            packetizer.round_trip = packetizer.last_received - then
        if kind in (_EXT_INFO, _INFO_REQUEST):
            if kind == _INFO_REQUEST:
                for _ in range(3):
                    message.get_binary()
            if message.get_int() > len(message.asbytes()):
                raise error("it sends a list longer than its message")
            message.rewind()
        return kind, message

    packetizer._read_timeout = limited_greeting
    packetizer.read_all = limited_packet
    packetizer.read_message = limited_message


def _name_errors(transport: Any, error: type[Exception]) -> None:
    """Convert any exception of paramiko's thread to an SSHException."""
    get_exception = transport.get_exception

    def named() -> Any:
        failure = get_exception()
        if failure is None or isinstance(failure, (error, OSError, EOFError)):
            return failure
        return error(f"the connection failed ({type(failure).__name__})")

    transport.get_exception = named


def guard_close(transport: Any, clients: list[Any]) -> None:
    """Let a transport close without an error, and then the jump hosts that it goes through."""
    close = transport.close

    def close_all() -> None:
        try:
            close()
        except AttributeError:  # another thread is just opening a channel: a race in paramiko
            transport.sock.close()
        for client in clients[::-1]:
            client.close()

    transport.close = close_all


def keep_alive(transport: Any) -> None:
    """Send keepalive requests to a silent host; close the connection if it does not reply.

    paramiko's own keepalives request no reply, so they do not detect a dead connection.
    """
    packetizer = transport.packetizer

    def ask() -> None:
        with contextlib.suppress(*connection_errors()):
            transport.global_request("keepalive@openssh.com", wait=True)

    def check() -> None:
        silent = time.monotonic() - packetizer.last_received
        if silent > DEAD_AFTER:
            raise EOFError  # in paramiko's own thread, which then closes everything
        if silent > KEEPALIVE - SILENCE_CHECK:
            start_thread("keepalive", ask)  # a send may hang

    packetizer.set_keepalive(SILENCE_CHECK, check)


def open_session(transport: Any, timeout: float, window: int = COMMAND_WINDOW) -> Any:
    """Open a channel that keeps no more than its window in memory.

    Raises:
        NoChannelError: the host refuses the channel.
        SSHError: the host does not answer, or the connection is closed.
    """
    if transport is None or not transport.is_active():
        raise SSHError("the connection to the host is closed")
    try:
        channel = transport.open_session(
            window_size=window, max_packet_size=CHANNEL_PACKET, timeout=timeout
        )
    except connection_errors() as error:
        if not transport.is_active():
            raise SSHError("the connection broke") from error
        kind = NoChannelError if _is_refusal(error) else SSHError
        raise kind(f"the host opened no channel: {reason(error)}") from error
    channel.settimeout(timeout)
    _guard_channel(channel)
    return channel


def with_patience(seconds: float, open_channel: Callable[[], Any]) -> Any:
    """Open a channel; retry while the host opens no further one."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return open_channel()
        except NoChannelError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(CHANNEL_PAUSE)


def open_next_session(transport: Any) -> None:
    """Open a session for the next command, without waiting for it."""
    spare = getattr(transport, "spare", None)
    if spare is not None:  # the user's own connection has none
        spare.ask()


class SpareSession:
    """Open a session of a transport in advance, to save a round trip later.

    The next caller gets this session, so that it never exceeds the host's limit.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._open_channel = transport.open_channel
        self._lock = threading.Lock()
        self._opener: threading.Thread | None = None
        self._channel: Any = None
        transport.open_channel = self._take_or_open

    def ask(self) -> None:
        """Open the session in a new thread, unless there is one."""
        with self._lock:
            opening = self._opener is not None and self._opener.is_alive()
            if not opening and not _usable(self._channel) and not takes_turns(self._transport):
                self._opener = start_thread("spare-session", self._open)

    def _open(self) -> None:
        with contextlib.suppress(*connection_errors()):
            channel = self._open_channel(
                "session", window_size=COMMAND_WINDOW, max_packet_size=CHANNEL_PACKET
            )
            _guard_channel(channel)
            with self._lock:
                self._channel = channel

    def _take(self) -> Any:
        with self._lock:
            channel, self._channel = self._channel, None
        return channel if _usable(channel) else None

    def _take_or_open(self, kind: str, *arguments: Any, **options: Any) -> Any:
        """Replace ``Transport.open_channel``."""
        if kind != "session":
            return self._open_channel(kind, *arguments, **options)
        wide = (options.get("window_size") or 0) > COMMAND_WINDOW
        if not wide and (spare := self._take()):
            return spare
        try:
            return self._open_channel(kind, *arguments, **options)
        except connection_errors() as error:
            if self._opener is not None and _is_refusal(error):
                self._opener.join(SPARE_PATIENCE)  # the host has replied to that request first
            if spare := self._take():
                return spare
            raise


def _is_refusal(error: Exception) -> bool:
    import paramiko

    # If another thread took paramiko's error first, this one has a different type.
    return isinstance(error, paramiko.SSHException) and "Timeout" not in str(error)


def _usable(channel: Any) -> bool:
    return channel is not None and not channel.closed and not channel.eof_received


def _guard_channel(channel: Any) -> None:
    """Limit the memory of a channel, and send nothing after its close message."""
    if isinstance(channel.transport, ChannelOrder):
        return
    channel.transport = ChannelOrder(channel.transport)
    for pipe in (channel.in_buffer, channel.in_stderr_buffer):
        _limit_buffer(pipe, channel.in_window_size + CHANNEL_PACKET)


class ChannelOrder:
    """Pass messages from a channel to its transport, but none after the channel's close.

    paramiko's own thread may answer the host's close while another thread sends, and a server
    closes the whole connection if a message follows. Also, if a request for more data fails,
    paramiko would lose the data that it was about to return.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._close_sent = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _send_user_message(self, message: Any) -> None:
        with self._lock:
            if not self._close_sent:
                kind = message.asbytes()[:1]
                self._close_sent = kind == _CHANNEL_CLOSE
                try:
                    self._transport._send_user_message(message)
                except connection_errors():
                    if kind != _WINDOW_ADJUST:
                        raise


def _limit_buffer(pipe: Any, most: int) -> None:
    """Close the connection if a host sends more than the window allows; paramiko would keep it."""
    feed = pipe.feed

    def limited(data: Any) -> None:
        if len(pipe) + len(data) > most:
            raise EOFError  # in paramiko's own thread, which then closes everything
        feed(data)

    pipe.feed = limited


def channel_request(channel: Any, kind: str, value: bytes | str, answered: bool = True) -> None:
    """Request an exec or a subsystem, or send a signal, without waiting for the answer.

    A refusal closes the channel. paramiko's own methods wait for the answer, without a time limit.
    """
    import paramiko
    from paramiko.common import cMSG_CHANNEL_REQUEST

    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string(kind)
    message.add_boolean(answered)
    message.add_string(value)
    try:
        channel.transport._send_user_message(message)
    except connection_errors() as error:
        raise SSHError("the connection broke") from error


def connection_errors() -> tuple[type[Exception], ...]:
    """Return the errors that paramiko raises when a connection or a channel ends."""
    import paramiko

    return (paramiko.SSHException, OSError, EOFError)


def reason(error: BaseException) -> str:
    """Describe an error; its text may come from the host."""
    text = str(getattr(error, "text", "")) or str(error)
    return printable(text.replace("[Errno None] ", "").rstrip(".") or type(error).__name__, 200)


def is_connected(ssh: Any) -> bool:
    """Check that a connection is open."""
    transport = ssh.get_transport()
    return transport is not None and bool(transport.is_active())


def start_thread(name: str, target: Callable[..., object], *args: Any) -> threading.Thread:
    """Start a daemon thread."""
    thread = threading.Thread(target=target, args=args, name=f"clore-{name}", daemon=True)
    thread.start()
    return thread


class Limit:
    """The time limit of a block.

    Attributes:
        expired: True if the block took longer.
    """

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self.deadline = time.monotonic() + seconds
        self.action = action
        self.expired = False


class Watchdog:
    """Run an action when a block takes too long; a context manager with one thread.

    paramiko writes to a socket without a timeout: only closing the connection ends that.
    """

    def __init__(self) -> None:
        self._limits: dict[int, Limit] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._thread = start_thread("watchdog", self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    @contextlib.contextmanager
    def limit(self, seconds: float, action: Callable[[], object]) -> Iterator[Limit]:
        """Run ``action`` in a new thread if the block takes longer than ``seconds``."""
        limit = Limit(seconds, action)
        self._limits[id(limit)] = limit
        try:
            yield limit
        finally:
            self._limits.pop(id(limit), None)

    def _watch(self) -> None:
        while not self._done.wait(WATCH_INTERVAL):
            now = time.monotonic()
            for key, limit in list(self._limits.items()):
                if now >= limit.deadline and self._limits.pop(key, None) is not None:
                    limit.expired = True
                    logger.debug("the watchdog stops a call that takes too long")
                    start_thread("watchdog-action", limit.action)


class LimitedChannel:
    """Limit each call of a channel to about ``timeout`` seconds.

    paramiko writes to a socket without a time limit; here the watchdog then closes the connection.
    Methods that do not wait are called on paramiko's channel directly.

    Raises:
        SSHError: a call takes too long. Other errors come from paramiko unchanged.
    """

    def __init__(
        self, transport: Any, timeout: float, watchdog: Watchdog, window: int = COMMAND_WINDOW
    ) -> None:
        self._transport = transport
        self.timeout = timeout
        self._watchdog = watchdog
        self._channel = self.limited("opened no channel", open_session, transport, timeout, window)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def exec_command(self, command: bytes | str) -> None:
        self.limited("accepted no command", channel_request, self._channel, "exec", command)

    def invoke_subsystem(self, name: str) -> None:
        self.limited("accepted no command", channel_request, self._channel, "subsystem", name)

    def send(self, data: Any) -> int:
        return int(self.limited("accepted no data", self._channel.send, data))

    def sendall(self, data: Any) -> None:
        view = memoryview(data.encode() if isinstance(data, str) else data)
        while view:
            view = view[self.send(view) :]

    def recv(self, size: int) -> bytes:
        return bytes(self.limited("sent no data", self._channel.recv, size))

    def recv_stderr(self, size: int) -> bytes:
        return bytes(self.limited("sent no data", self._channel.recv_stderr, size))

    def recv_exit_status(self) -> int:
        """Return the exit status; -1 if the channel ended without one."""
        if not self._channel.status_event.wait(self.timeout):
            raise SSHError(f"the host did not end the command within {self.timeout:g}s")
        return int(self._channel.exit_status)

    def shutdown_write(self) -> None:
        self.limited("accepted no data", self._channel.shutdown_write)

    def close(self) -> None:
        with contextlib.suppress(SSHError, *connection_errors()):
            self.limited("accepted no data", self._channel.close)

    def limited(self, failing: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; raise an SSHError that says what is ``failing`` if it takes too long."""
        # By itself the call ends within the timeout, unless it hangs while it writes.
        seconds = 1.25 * self.timeout + 0.25
        with self._watchdog.limit(seconds, lambda: self._transport.close()) as limit:
            try:
                return call(*arguments)
            except Exception as error:
                if isinstance(error, TimeoutError) or limit.expired:
                    late = f"the host {failing} for {self.timeout:g}s"
                    raise SSHError(late) from error
                raise


# ==================================================================================================
# ssh.keys
#
# Pin the host key of each order; find the private key of a public key.
# ==================================================================================================


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


# ==================================================================================================
# ssh.transfer.scripts
#
# Define the shell scripts of a transfer, for POSIX tools and those of GNU and busybox.
# ==================================================================================================


DIFFERS = "SHA-256 differs: the received data was removed"
MAX_ANSWER = 256 * 1024 * 1024  # bytes of a listing, or of digests

# Precedes each script. Relative paths count from the home directory, even if a start-up file
# changes the directory. $n is a line end, set before. openssl is up to six times as fast as
# sha256sum.
PRELUDE = r"""
unset CDPATH
g=; last=
no() { printf "no %s%s" "$*" "$n"; exit 1; }
cd "${HOME:-/}" || no "there is no home directory ${HOME}"
if command -v openssl >/dev/null; then sha="openssl dgst -sha256 -r"; else sha=sha256sum; fi
block=65536
part() { # prints $3 bytes of the file $1 from its block $2 on
  if [ $(($3 % block)) = 0 ]; then blocks "$1" "$2" $(($3 / block))
  else blocks "$1" "$2" $(($3 / block + 1)) | head -c "$3"; fi
}
blocks() { dd if="$1" bs=$block skip="$2" count="$3" iflag=fullblock 2>/dev/null; }
inner() { # sets $g to the name that $q encodes, see encoded_name()
  [ "$q" = "$last" ] || { g=$(printf %bx "$q"); g=${g%x}; last=$q; }
}
list() { find . -exec stat -c "%f %s %Y %n" {} +; }
"""
# Ends with the name of a tool that is missing.
CHECK_TOOLS = r"""
for t in chmod dd find head mkdir mv rm ${sha%% *} sort stat tar touch xargs; do
  command -v $t >/dev/null || no "lacks $t"
done
[ "$(echo abcdef | dd ibs=3 count=1 obs=4 iflag=fullblock 2>/dev/null)" = abc ] ||
  no "lacks a dd with iflag=fullblock"
stat -c "%f %s %Y %a" . >/dev/null 2>&1 || no "lacks a stat with -c"
"""
# Sets $f to the target and $p to the temporary name beside it; $r records the received data.
TARGET = r"""
case $f in /*) ;; *) f=$PWD/${f#./};; esac
if [ "$kind" = d ]; then
  [ "$content" = 1 ] || f=${f%/}/$name
elif [ -d "$f" ]; then f=${f%/}/$name
else case $f in */) f=$f$name;; esac; fi
f=${f%/}; f=${f:-/}
if [ -h "$f" ] && [ ! -d "$f" ]; then
  [ "$follow" = 1 ] || no "$f is a symlink: remove it, or pass symlinks='follow'"
  f=$(readlink -f "$f") || no "$f is a broken symlink"
fi
d=${f%/*}; d=${d:-/}
if [ "$kind" = f ]; then
  [ ! -d "$f" ] || no "$f is a directory"
  [ ! -e "$f" ] || [ -f "$f" ] || no "$f is neither a file nor a directory"
else [ ! -e "$f" ] || [ -d "$f" ] || no "$f is not a directory"; fi
p=${d%/}/.clore-part-$token
r=$p.done
"""
# Runs during the whole upload: creates the temporary name, and renames it at the end. If it stops
# before that, it removes the temporary name, unless the upload may be resumed. With resume, two
# uploads may share the temporary name: only the last one that began may continue.
CONTROL = r"""
[ -d "$d" ] || e=$(mkdir -p "$d" 2>&1) || no "there is no directory $d: ${e%%$n*}"
u=$(umask); umask 077
make() {
  if [ "$kind" = f ]; then : >>"$p"; else mkdir -p "$p"; fi || return 1
  [ "$keep" = 0 ] || echo "$owner" >"$o"
}
o=$p.owner
wipe() { rm -rf "$p" "$r" "$o" || { sleep 1; rm -rf "$p" "$r" "$o"; }; }
# Again a little later: a dd that was just starting may have created the file anew.
wipe_all() { wipe; sleep 0.2 2>/dev/null || sleep 1; wipe; }
gone() { [ "$keep" = 1 ] || wipe_all; exit 1; }
trap gone HUP TERM
[ "$keep" = 1 ] && [ -s "$r" ] && [ -e "$p" ] || wipe
make || no "nothing can be created in $d"
no() { [ "$keep" = 1 ] || wipe; printf "no %s%s" "$*" "$n"; exit 1; }
printf "ready %s\n" "$u"
[ ! -s "$r" ] || { cat "$r"; echo; }
echo "$token"
set_mode() {
  m=$(printf %o $((0$mode & ~0$u)))
  [ ! -e "$f" ] || m=$(stat -c %a "$f")
  [ "$preserve" = 0 ] || m=$mode
  chmod "$m" "$p" || gone
  [ "$preserve" = 0 ] || TZ=UTC0 touch -t "$time" "$p" || gone
}
finish_file() {
  s=$(stat -c %s "$p"); [ "$s" = "$size" ] || no "$s of $size bytes arrived"
  set_mode
  mv -f "$p" "$f" || gone
}
finish_tree() {
  if [ ! -e "$f" ]; then set_mode; mv "$p" "$f" || gone; return; fi
  cd "$p" || gone
  export preserve follow
  wrong=$(find . ! -name . -exec sh -c 'for g; do
    t=$0/${g#./} folder=0
    [ -L "$g" ] || [ ! -d "$g" ] || folder=1
    if [ "$follow" = 0 ] && [ -L "$t" ] && [ ! -L "$g" ]; then echo "$t is a symlink"
    elif [ $folder = 0 ] && [ -d "$t" ] && [ ! -L "$t" ]; then echo "$t is a directory"
    elif [ $folder = 1 ] && [ -e "$t" ] && [ ! -d "$t" ]; then echo "$t is not a directory"
    fi; done' "$f" {} +)
  [ -z "$wrong" ] || no "${wrong%%$n*}"
  # A directory that is new there is moved as a whole, with its modes and times.
  find . -type d -exec sh -c '[ ! -e "$0/$1" ] && mv "$1" "$0/$1"' "$f" {} \; -prune
  find . ! -type d -exec sh -c 'for g; do
    [ "$preserve" = 1 ] || [ ! -f "$0/$g" ] || [ ! -f "$g" ] || chmod "$(stat -c %a "$0/$g")" "$g"
    [ ! -L "$0/$g" ] || rm -f "$0/$g"  # mv would move into the directory that it leads to
    mv -f "$g" "$0/$g" || exit 1; done' "$f" {} + || gone
  cd / && rm -rf "$p"
}
while read -r word m t q || gone; do case $word in
restart) wipe; make;;
wipe) wipe; exit 1;;
mode) inner; chmod "$m" "$p$g" || no "$g: its mode was not set"
  [ "$preserve" = 0 ] || TZ=UTC0 touch -t "$t" "$p$g" || no "$g: its time was not set";;
sync) echo "$token";;
list) (cd "$p" && list);;
go) [ "$keep" = 0 ] || [ "$(cat "$o" 2>/dev/null)" = "$owner" ] || {
  printf "no another upload of the same has begun%s" "$n"; exit 1; }
  if [ "$kind" = f ]; then finish_file; else finish_tree; fi
  rm -f "$r" "$o"; printf "ok %s\n" "$f"; exit 0;;
*) gone;;
esac; done
"""
# Prints the target and a listing of it, which is empty if there is none.
LIST_TARGET = r"""
printf "target %s\n" "$f"
if [ "$kind" = d ]; then [ ! -d "$f" ] || (cd "$f" && list)
else [ ! -f "$f" ] || stat -L -c "%f %s %Y ." "$f"; fi
echo "$token"
"""
# Removes the files or the empty directories below the target whose names it reads.
REMOVE = r"""
cd "$f" || exit 1
if [ "$what" = d ]; then xargs -0 rmdir 2>/dev/null; else xargs -0 rm -f || exit 1; fi
echo removed
"""
# Writes portions: before each comes a line (block, size, key, name), after it a dot. A portion is
# a chunk of a file, or a tar archive where the block is "tar".
# It starts at the same time as CONTROL, and waits for the temporary name.
PUT = r"""
w=0; until [ -e "$p" ]; do
  w=$((w+1)); [ $w -lt 500 ] || no "the upload did not start"
  sleep 0.02 2>/dev/null || sleep 1
done
umask 077
c=$conv
put() { dd of="$p$g" ibs="$s" count=1 obs=$block seek="$k" iflag=fullblock conv=$c 2>&1; }
archive() { dd ibs="$s" count=1 obs=$block iflag=fullblock 2>/dev/null; }
untar() { cd "$p" && archive | tar -x"$how"f - 2>&1; }
while read -r k s key q && [ -e "$p" ]; do
  if [ "$k" = tar ]; then e=$(untar) || no "${e%%$n*}"
  else
    [ "$q" = "$last" ] || { inner; mkdir -p "$p${g%/*}" && : >>"$p$g" || exit 1; }
    # A dd without conv=sparse fails before it reads anything.
    e=$(put) || { case $e in *sparse*) c=notrunc; e=$(put);; *) false;; esac; } || no "${e%%$n*}"
  fi
  read -r t && [ "$t" = . ] || exit 1
  h=-; [ "$k" = tar ] || [ "$hash" = 0 ] || h=$(part "$p$g" "$k" "$s" | $sha)
  [ "$keep" = 0 ] || echo "$key" >>"$r"
  echo "done ${h%% *}"
done
echo end
"""
# Print SHA-256: of each chunk for which a line (block, size, name) comes, and of each file that is
# named, in the order of the names. ``sort`` reads all names before the first output, which would
# block if the client still sent names instead of reading it.
CHUNK_DIGESTS = r"""while read -r k s q; do inner; part "$path$g" "$k" "$s" | $sha; done"""
FILE_DIGESTS = r"""cd "$path" && sort -z | xargs -0 $sha"""
# Prints the type of the source, then a listing, or the content of a file that is not too large.
LOOK = r"""
if [ -d "$f" ]; then
  cd "$f" || no "$f: it cannot be entered"
  echo d; list; echo "$token"
elif [ -f "$f" ]; then
  s=$(stat -L -c "%s %Y %a" "$f") || exit 1
  size=${s%% *}
  [ "$size" -gt 0 ] || size=$(($(wc -c <"$f"))) # files in /proc have size 0
  echo "f $size ${s#* }"
  [ "$size" -le "$most" ] || exit 0
  part "$f" 0 "$size"
  [ "${s%% *}" -gt 0 ] || { echo "$size ${s#* }"; exit 0; }
  stat -L -c "%s %Y %a" "$f"
elif [ -e "$f" ]; then no "it is neither a file nor a directory"
else no "there is no such file"; fi
"""
# Prints a tar archive of the files whose names it reads, a block with a mark, and a new listing.
GET_TREE = r"""
cd "$f" || exit 1
sort -z | xargs -0 tar -cf -
printf "%-511s\n" "$token"; list; echo "$token"
"""
# Prints a range of a file, its SHA-256, and the state of the file after that.
GET = r"""
part "$f" "$k" "$s"; part "$f" "$k" "$s" | $sha
stat -L -c "%s %Y %a" "$f"
"""


def script_text(verb: str, *parts: str, **values: bytes | str | int) -> bytes:
    """Return a script of these parts with ``values`` as shell variables; ``verb`` names it."""
    lines = [b": " + verb.encode()]
    lines += [name.encode() + b"=" + sh_quoted(value) for name, value in values.items()]
    return b"\n".join([*lines, *(part.encode() for part in (PRELUDE, *parts))])


def sh_quoted(value: bytes | str | int) -> bytes:
    """Quote a value for ``sh``."""
    raw = value if isinstance(value, bytes) else str(value).encode()
    return b"'" + raw.replace(b"'", b"'\"'\"'") + b"'"


def encoded_name(name: bytes) -> bytes:
    """Return a slash and the name of a file, as ``printf %b`` reads them; nothing for no name."""
    plain = re.sub(rb"[^\w./-]", lambda sign: b"\\0%03o" % ord(sign[0]), name)
    return b"/" + plain if name else b""


def remote_path(path: bytes) -> bytes:
    """Return a remote path for a script; one that is relative or begins with ~/ is below home."""
    if path == b"~" or path.startswith(b"~/"):
        path = path[1:].lstrip(b"/") or b"."
    elif path.startswith(b"~"):
        raise ValueError(f"remote: use ~/ or an absolute path, not {short_repr(path)}")
    return path if path.startswith(b"/") else b"./" + path


def parse_digests(text: bytes, count: int) -> list[str]:
    """Read the SHA-256 of each file from the output of sha256sum or openssl."""
    # Other lines are parts of names: not every sha256sum escapes line ends.
    digests = [s.decode() for s in re.findall(rb"^\\?([0-9a-f]{64}) [ *]", text, re.M)]
    if len(digests) != count:
        raise SSHError(f"the host sent {len(digests)} SHA-256 instead of {count}")
    return digests


# ==================================================================================================
# ssh.openssh
#
# Read addresses and OpenSSH's configuration; write command lines and entries for OpenSSH.
# ==================================================================================================


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


# ==================================================================================================
# ssh.connect
#
# Log in to hosts, and keep the connections of one call.
# ==================================================================================================


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


# ==================================================================================================
# ssh.command_text
#
# Build the line that a host's shell runs, and read what the command prints.
# ==================================================================================================


MAX_CSH_LINE = 50_000  # bytes; a host takes lines of up to 131,072
LONGEST_PIECE = 65536  # characters of one call of on_output
MAX_STDERR_BEFORE_PID = 65536  # bytes of the output of start-up files to hold back


class SecretBytes(bytes):
    """Bytes with a masked repr, because error reporters print local variables."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "b'***'"


def command_line(command: str | Sequence[str]) -> str:
    """Return a command as a line for a shell: a string unchanged, a list of arguments quoted."""
    if isinstance(command, str):
        line = command
    elif isinstance(command, (list, tuple)):
        for number, word in enumerate(command):
            if not isinstance(word, str):
                raise TypeError(f"command[{number}] must be a string, not {short_repr(word)}")
        line = " ".join(map(quoted_word, command))
    else:
        raise TypeError(f"command must be a string or a list of strings, not {short_repr(command)}")
    if not line.strip():
        raise ValueError("command must not be empty")
    encoded("command", line)
    return line


def command_lines(command: str | Sequence[str], env: Any) -> tuple[str, bytes]:
    """Return a command as a line for a shell, and encoded, after lines that set variables."""
    line, variables = command_line(command), exports(env)
    lines = csh_line(variables, command, line) + variables + line
    return line, SecretBytes(encoded("command", lines))


def quoted_word(word: str) -> str:
    """Quote a word for any login shell."""
    # A backslash is special in fish even in single quotes, and "!" in csh.
    parts = re.split(r"([\\!])", word)
    quoted = [f"\\{part}" if part in ("\\", "!") else shlex.quote(part) for part in parts if part]
    text = "".join(quoted) or "''"
    # At the start of a word, zsh expands "=", and fish "%".
    return f"'{text[0]}'{text[1:]}" if text[0] in "=%" else text


def input_bytes(value: Any) -> bytes:
    """Check the input of a command, and return it as bytes."""
    if value is None:
        return b""
    if isinstance(value, str):
        return encoded("input", value, nul=True)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"input must be a string or bytes, not {type(value).__name__}")
    return bytes(value)


def exports(env: Any) -> str:
    """Return lines that set variables: by default, sshd accepts none from a client."""
    if env is None:
        return ""
    if not isinstance(env, Mapping):
        raise TypeError(f"env must be a dict of strings, not {type(env).__name__}")
    lines = []
    for name, value in env.items():
        if not isinstance(name, str) or not name.isascii() or not name.isidentifier():
            raise ValueError(f"env: {short_repr(name)} is not a valid name of a variable")
        if not isinstance(value, str):
            raise TypeError(f"env[{short_repr(name)}] must be a string, not {type(value).__name__}")
        encoded(f"env[{name!r}]", value)
        lines.append(Secret(f"export {name}={quoted_word(value)} || exit 121\n"))
    return Secret("".join(lines))


def csh_line(exports: str, command: str | Sequence[str], line: str) -> str:
    """Return a line that runs a command with variables in csh, which has no ``export``.

    Other shells continue with the next line. In csh, sh replaces the shell, sets the variables, and
    runs csh again, without its start-up files, which could set other values.
    """
    if not exports and (isinstance(command, str) or "\n" not in line):
        return ""
    run = f'exec "$0" -f -c {shlex.quote(line)}' if isinstance(command, str) else f"exec {line}"
    script = (exports + run).encode("utf-8", "surrogateescape")
    # csh can't quote a line end, nor "!".
    plain = re.sub(rb"[^ -~]|[\\!']", lambda sign: b"\\0%03o" % ord(sign[0]), script).decode()
    if len(plain) > MAX_CSH_LINE:
        return ""
    decode = 'sh -c \'eval "$(printf %b "$1")"\''
    return Secret(f"expr \"$shell\" : '.*csh$' >/dev/null && exec {decode} \"$shell\" '{plain}'\n")


def encoded(name: str, text: str, *, nul: bool = False) -> bytes:
    """Encode text as UTF-8; file names that are not UTF-8 become their original bytes."""
    if not nul and "\0" in text:
        raise ValueError(f"{name} must not contain a NUL character")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"{name} contains a character that UTF-8 cannot encode") from None


class CommandOutput:
    """Collect the output of a command, and call ``on_output`` with each of its lines.

    Parameters:
        max_output: the bytes of both streams to keep.
        on_output: called by :meth:`report`, or None.

    Attributes:
        dropped: the bytes that were not kept.
    """

    def __init__(self, max_output: int, on_output: Callable[[OutputLine], object] | None) -> None:
        self.dropped = 0
        self._room = max_output
        self._kept = {STDOUT: bytearray(), STDERR: bytearray()}
        self._splitters: dict[str, LineSplitter] = {}
        if on_output is not None:
            self._splitters = {name: LineSplitter(name, on_output) for name in self._kept}
        self._unreported: list[tuple[LineSplitter, bytes]] = []

    def add(self, stream: str, data: bytes) -> None:
        """Keep data up to ``max_output`` bytes, and queue all of it for ``on_output``."""
        kept = data[: self._room]
        self._room -= len(kept)
        self.dropped += len(data) - len(kept)
        self._kept[stream] += kept
        if stream in self._splitters:
            self._unreported.append((self._splitters[stream], data))

    def report(self) -> None:
        """Call ``on_output`` with the lines that are complete."""
        pieces, self._unreported = self._unreported, []
        for splitter, data in pieces:
            splitter.feed(data)

    def finish(self) -> None:
        """Call ``on_output`` with all that is left."""
        self.report()
        for splitter in self._splitters.values():
            splitter.finish()

    def text(self, stream: str) -> str:
        """Return the kept output of a stream."""
        return self._kept[stream].decode("utf-8", "replace")


class LineSplitter:
    """Split a stream into lines, and pass each of them to ``on_output``."""

    def __init__(self, stream: str, on_output: Callable[[OutputLine], object]) -> None:
        self._stream = stream
        self._on_output = on_output
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> None:
        """Pass on each line that is complete now."""
        *lines, self._rest = (self._rest + self._decoder.decode(data)).split("\n")
        for line in lines:
            self._pass_on(self._last_piece(line).removesuffix("\r"))
        self._rest = self._last_piece(self._rest)

    def finish(self) -> None:
        """Pass on a last line that has no line end."""
        rest = self._last_piece(self._rest + self._decoder.decode(b"", True))
        self._rest = ""
        if rest:
            self._pass_on(rest)

    def _last_piece(self, text: str) -> str:
        """Pass on a long line in pieces, and return the last one."""
        # One more character may stay, so that a "\r" before the line end is never a piece.
        while len(text) > LONGEST_PIECE + 1:
            self._pass_on(text[:LONGEST_PIECE])
            text = text[LONGEST_PIECE:]
        return text

    def _pass_on(self, text: str) -> None:
        self._on_output(OutputLine(text, self._stream))


class PidLine:
    """Read the first line on stderr, which has a random mark and the pid of the command's shell.

    It proves that the host runs the command, and names the process group to end. Until it arrives,
    the last 64 KB of stderr are held back.

    Parameters:
        waits: let the command wait for a line of input, so that start-up files can't read the rest.

    Attributes:
        pid: the process id of the shell, once it is known.
        prefix: the line to put before the command. It is a separate line, so that a shell that
            reports a syntax error in the command quotes neither it nor the variables.
    """

    def __init__(self, waits: bool = False) -> None:
        mark = f"clore-{os.urandom(8).hex()} "
        self.pid: int | None = None
        self.prefix = f"sh -c 'echo {mark}$PPID >&2'\n"
        if waits:
            self.prefix = f"sh -c 'echo {mark}$PPID >&2; read -r line' || exit 121\n"
        self._line = re.compile(mark.encode() + rb"([2-9]|[1-9][0-9]{1,9})\n")
        self._held = b""

    def before(self, lines: bytes) -> SecretBytes:
        """Return the lines of a command after the prefix."""
        return SecretBytes(self.prefix.encode() + lines)

    def remove_from(self, data: bytes) -> bytes:
        """Return the next part of stderr without the line."""
        if self.pid is not None:
            return data
        self._held += data
        found = self._line.search(self._held)
        if found is None:  # the part that is kept may contain its beginning
            surplus = self._held[:-MAX_STDERR_BEFORE_PID]
            self._held = self._held[-MAX_STDERR_BEFORE_PID:]
            return surplus
        self.pid = int(found[1])
        self._held = self._held[: found.start()] + self._held[found.end() :]
        return self.rest()

    def rest(self) -> bytes:
        """Return the data that was held back, at the end of stderr."""
        rest, self._held = self._held, b""
        return rest


# ==================================================================================================
# ssh.job_scripts
#
# Start, watch and stop a job on a host: shell scripts with POSIX tools and /proc.
# ==================================================================================================


# Prints the start time of the process $1 in clock ticks; nothing for an ended process or a zombie.
_TICKS = r"""
ticks() {
  [ -e /proc/self ] || { kill -s 0 "$1" 2>/dev/null && echo 0; return; }
  { read -r s <"/proc/$1/stat"; } 2>/dev/null || return 1
  s=${s##*) }; set -- $s; [ "$1" != Z ] && echo "${20}"
}
"""
# Runs in a session of its own. $1 is the folder of the job, $2 a shell, $3 the command, $4 the
# umask, and $5 the boot and the time. SIGTERM goes to the whole group: this shell ignores it, so
# that it can record the exit code. It needs no other program and no free space on the disk.
JOB_RUNNER = (
    _TICKS
    + r"""
trap "" HUP; trap : TERM INT QUIT
echo "$$ $(ticks $$ || echo -) $5" >"$1/pid"
umask "$4"
# Start-up files may change the directory.
CLORE_JOB_CWD=$PWD "$2" -c 'cd "$CLORE_JOB_CWD"; '"$3"
printf "%-4s\n" $? 1<>"$1/exit"
"""
)
# Precedes each of the scripts that follow.
_JOBS = (
    _TICKS
    + r"""
jobs=$PWD/.clore/jobs
nap() { sleep "$1" 2>/dev/null || sleep 1; }
boot() { # prints an id that changes when the host or its container restarts
  r=; { read -r r </proc/sys/kernel/random/boot_id; } 2>/dev/null
  echo "$r/$(ticks 1)"
}
about() { # reads the state of the job $1 into $st, $code, $pid and $began
  st=gone code=- pid=- began=0
  j=$jobs/$1
  [ -d "$j" ] || return 1
  w=0; until { read -r pid ticks boot began <"$j/pid"; } 2>/dev/null; do
    pid=- ticks= boot= began=0 # it is starting, or its start was interrupted
    w=$((w+1)); [ $w -lt 20 ] || break
    nap 0.1
  done
  b=$(ticks "$pid")
  st=killed; [ "$boot" = "$(boot)" ] || st=lost
  if [ -n "$ticks" ] && [ "$b" = "$ticks" ] && [ $st != lost ]; then st=running; fi
  # Read last, because a job may end in between.
  { read -r code <"$j/exit"; } 2>/dev/null || code=-
  [ "$code" = - ] || st=exited
}
"""
)
_JOB_SCRIPTS = {
    # This script is read from standard input, so that no list of processes shows ``env``.
    "job": r"""
detach=$(command -v setsid) # without it, the job stays in this session
shell=${SHELL:-/bin/sh}; [ -x "$shell" ] || shell=/bin/sh
u=$(umask); umask 077
[ -d "$cwd" ] || no "there is no directory $cwd"
mkdir -p "$jobs" && chmod 700 .clore "$jobs" || exit 1
d=$jobs/$name
if ! e=$(mkdir "$d" 2>&1); then
  [ ! -d "$d" ] || no "there is already a job $name: wait for it, remove() it, or pass another name"
  no "$e"
fi
echo - >"$d/exit" && printf "%s\n" "$command" >"$d/command" && : >"$d/output" ||
  no "nothing can be written to $d"
now=$(date +%s) boot=$(boot)
(
  if [ -n "$a" ]; then LC_ALL=$a; else unset LC_ALL; fi
  cd "$cwd" || exit 1
  set -- $detach /bin/sh -c "$runner" "job-$name" "$d" "$shell" "$command" "$u" "$boot $now"
  eval "$exports"
  exec "$@"
) </dev/null >>"$d/output" 2>&1 &
about "$name"
[ "$began" != 0 ] || no "the job did not start: $(head -c 300 "$d/output")"
echo "started $began"
""",
    # Prints a line for each job, or for the job $name: its state, and the start of its command.
    "jobs": r"""
for j in "$jobs"/${name:-*}; do
  k=${j##*/}
  about "$k" || continue
  echo "job $k $st $code $began"
  head -n 1 "$j/command" 2>/dev/null | head -c 1000 | tr -d "$n"; echo
done
echo end
""",
    # Prints the last $lines lines of the output.
    "tail": r"""
about "$name" || no "there is no job $name"
echo tail
tail -n "$lines" "$j/output" | tail -c "$most"
""",
    # Prints the output from byte $at on, in portions that a line with their size precedes, until
    # the job has ended. If $at is -1, it prints no output. The size is 0 if there is nothing new.
    "follow": r"""
about "$name" || no "there is no job $name"
o=$j/output
span() { # prints $2 bytes from byte $1 on
  dd if="$o" bs=65536 skip=$(($1/65536)) 2>/dev/null | tail -c +$(($1%65536+1)) | head -c "$2"
}
while :; do
  about "$name"
  s=$(stat -c %s "$o" 2>/dev/null || wc -c <"$o"); s=$((s))
  if [ "$at" -ge 0 ] && [ "$s" -gt "$at" ]; then
    k=$((s-at)); [ $k -le 1048576 ] || k=1048576
    echo "$k" && span "$at" $k || exit 1
    at=$((at+k))
  elif [ "$st" = running ]; then
    echo 0 || exit 1
    nap 0.3
  else
    echo "end $st $code $began"; exit 0
  fi
done
""",
    # Ends all processes of the job: those of its session and group, and descendants elsewhere.
    "stop": r"""
about "$name" || no "there is no job $name"
sig() { # with a group's number, dash needs "--", and busybox accepts none
  for p in $2; do kill -s "$1" -- "$p" 2>/dev/null || kill -s "$1" "$p" 2>/dev/null; done
}
tree() {
  for c in $(cat /proc/"$1"/task/*/children 2>/dev/null); do tree "$c"; done; echo "$1"
}
members() { # prints the processes that have not ended
  [ -e /proc/self ] || { sig 0 "-$pid" && echo "-$pid"; return; }
  for f in /proc/[0-9]*/stat; do
    { read -r s <"$f"; } 2>/dev/null || continue
    f=${f%/stat}; s=${s##*) }; set -- $s
    [ "$1" != Z ] || continue
    if [ "$3" = "$pid" ] || [ "$4" = "$pid" ]; then echo "${f#/proc/}"; continue; fi
    for p in $known; do [ "${f#/proc/}" != "$p" ] || echo "$p"; done
  done
}
# The number may belong to another process by now.
if [ "$st" = lost ] || [ "$pid" = - ] || { [ -n "$b" ] && [ "$b" != "$ticks" ]; }; then
  echo "stopped"; exit 0
fi
known=; [ -z "$b" ] || known=$(tree "$pid")
sig TERM "$(members)"
gone() { # waits up to $1 tenths of a second for the end of all members
  w=0; while m=$(members); [ -n "$m" ]; do
    [ $w -lt "$1" ] || return 1
    w=$((w+1)); sleep 0.1 2>/dev/null || { sleep 1; w=$((w+9)); }
  done
}
if ! gone "$grace"; then
  # The shell that records the exit code goes last.
  for q in $m; do [ "$q" = "$pid" ] || sig KILL "$q"; done
  gone 10 || sig KILL "$m"
fi
echo stopped
""",
    # Removes a job that has ended, with its output.
    "remove": r"""
about "$name" || no "there is no job $name"
[ "$st" != running ] || no "the job $name still runs: stop() it first"
rm -rf "$j" || exit 1
echo removed
""",
}


def job_script(verb: str) -> str:
    """Return the script for a verb."""
    return _JOBS + _JOB_SCRIPTS[verb]


# ==================================================================================================
# ssh.transfer.entry
#
# Describe the files, directories and symlinks of a transfer, on both sides.
# ==================================================================================================


BLOCK = 65536  # bytes; chunks begin at multiples of it
TRANSFER_PIECE = 256 * 1024  # bytes to read or write at a time
LAST_TIME = 253_402_300_799  # the end of the year 9999, in seconds; later times fail on some disks
MAX_LEVELS = 256  # nested directories; Python can't remove a tree that is much deeper
MAX_FILES = 2_000_000  # of a directory on a host
Excludes = Callable[[bytes, bool], bool]  # of a name, and whether it is a directory
CHANGED = "it changed during the transfer"
TAR_BLOCK = 512  # bytes
CHUNK = 64 * BLOCK  # bytes; of an upload that may be resumed, chunks are smaller at the start
BUNDLE_FILES = 1000
SMALL_FILE = CHUNK  # bytes; smaller files of a directory are sent as tar archives


# Not a dataclass: that module is slow to import.
class FileEntry:
    """A file, directory or symlink of a transfer.

    Attributes:
        name: relative to the directory that is transferred; empty for a single file.
        kind: ``"f"``, ``"d"`` or ``"l"``; ``"other"`` on a host, of what can't be transferred.
        size: in bytes; 0 unless it is a file.
        mtime: in nanoseconds.
        mode: permissions.
        link: the target of a symlink.
    """

    __slots__ = ("kind", "link", "mode", "mtime", "name", "size")

    def __init__(self, name: bytes, size: int, mtime: int, mode: int, kind: str) -> None:
        self.name = name
        self.size = size if kind == "f" else 0
        self.mtime = mtime
        self.mode = mode
        self.kind = kind
        self.link = b""

    @property
    def version(self) -> tuple[bytes, int, int]:
        """Values that differ when the source has changed."""
        return (self.name, self.size, self.mtime)


def record_key(version: object) -> str:
    """Return the key under which a resumable transfer records a version of a source."""
    return hashlib.sha256(repr(version).encode()).hexdigest()[:32]


def part_token(resume: bool, *transfer: object) -> str:
    """Return a name for the temporary file of a transfer: with ``resume``, always the same."""
    return record_key(transfer)[:20] if resume else os.urandom(10).hex()


def link_target(name: bytes, link: bytes, folders: Container[bytes] | None = None) -> bytes | None:
    """Return the name in the same tree that a symlink leads to, or None outside the tree.

    With ``folders``, the names of all directories, ``..`` after anything else counts as outside:
    after another symlink it leads elsewhere than the text says.
    """
    if link.startswith(b"/") or not link:
        return None
    parts = name.split(b"/")[:-1]
    for part in link.split(b"/"):
        if part == b"..":
            if not parts or (folders is not None and b"/".join(parts) not in folders):
                return None
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def checked_name(name: bytes) -> str:
    """Check a name that a host sent, and return it as a path on this system."""
    parts = name.split(b"/")
    if b"\0" in name or not {b"", b".", b".."}.isdisjoint(parts):
        raise SSHError(f"the host sent an invalid file name: {printable(repr(name), 120)}")
    if len(parts) > MAX_LEVELS:
        raise SSHError(f"the host sent the name of a file below {len(parts)} directories")
    text = os.fsdecode(name)
    if os.name == "nt" and any(sign in text for sign in '\\:*?"<>|'):
        raise SSHError(f"Windows can't name a file {printable(repr(text), 120)}")
    return text


def kind_of(mode: int) -> str:
    """Return "f", "d" or "l" for the mode of a file; "other" for anything else."""
    kinds = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l"}
    return kinds.get(stat.S_IFMT(mode), "other")


def whole_seconds(mtime: int) -> int:
    """Convert a time in nanoseconds to the seconds that a transfer keeps."""
    return min(max(mtime // 10**9, 0), LAST_TIME)


def remote_entry(name: bytes, mode: int, size: int, seconds: int) -> FileEntry:
    """Make an entry from the numbers of a host; limit the time to what file systems know."""
    mtime = min(max(seconds, 0), LAST_TIME) * 10**9
    return FileEntry(name, size, mtime, mode & 0o777, kind_of(mode))


def local_entry(name: bytes, status: os.stat_result) -> FileEntry:
    """Make an entry from the status of a local file."""
    kind, mode = kind_of(status.st_mode), status.st_mode & 0o777
    return FileEntry(name, status.st_size, status.st_mtime_ns, mode, kind)


def parse_stat(line: bytes) -> FileEntry:
    """Read size, seconds and permissions of a file."""
    found = re.fullmatch(rb"([0-9]{1,18}) (-?[0-9]{1,18}) ([0-7]{1,4})", line)
    if found is None:
        raise SSHError("the host sent a file status that can't be read")
    size, seconds, mode = found.groups()
    return remote_entry(b"", stat.S_IFREG | int(mode, 8), int(size), int(seconds))


def check_unchanged(entry: FileEntry, now: FileEntry | None) -> None:
    """Check that a file is the same as before, or has only grown; its start is then valid."""
    if now is not None and now.size > entry.size:  # only a file has a size
        return
    if now is None or (now.kind, now.size, now.mtime) != ("f", entry.size, entry.mtime):
        raise SSHError(CHANGED)


def file_digest(path: str | Path, start: int, length: int) -> str:
    """Return the SHA-256 of a part of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(TRANSFER_PIECE, length))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def about(entry: FileEntry) -> Iterator[None]:
    """Add the file to an error that a block raises."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "entry"):
            error.entry = entry  # type: ignore[attr-defined]
        raise


class Tree:
    """The files, directories and symlinks of a transfer; each directory precedes its content.

    Attributes:
        root: the directory or the single file itself.
        entries: what is in the directory; or only the file.
    """

    def __init__(self) -> None:
        self.root = FileEntry(b"", 0, 0, 0o755, "d")
        self.entries: list[FileEntry] = []

    @property
    def is_folder(self) -> bool:
        return self.root.kind == "d"

    @property
    def by_name(self) -> dict[bytes, FileEntry]:
        """All entries, after the root under the empty name."""
        return {entry.name: entry for entry in [self.root, *self.entries]}

    @property
    def files(self) -> list[FileEntry]:
        return [entry for entry in self.entries if entry.kind == "f"]

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(entry.size for entry in self.files)


def excludes_nothing(name: bytes, folder: bool) -> bool:
    return False


class RemoteTree(Tree):
    """Check and hold a file on a host, or the entries of a directory.

    Attributes:
        excluded: the names that are left out, and those below them.
    """

    def __init__(self, excludes: Excludes = excludes_nothing) -> None:
        super().__init__()
        self.excluded: set[bytes] = set()
        self._excludes = excludes
        self._kinds: dict[bytes, str] = {}

    def add(self, entry: FileEntry) -> None:
        """Check an entry of a listing, and add it unless it or its directory is excluded."""
        name, kind = entry.name, entry.kind
        folder = name.rpartition(b"/")[0]
        if name:
            checked_name(name)
        if name in self._kinds or (name and self._kinds.get(folder) != "d"):
            raise SSHError(f"the host lists {printable(repr(name), 120)} in a wrong place")
        self._kinds[name] = kind
        if not name:
            self.root = entry
        if folder in self.excluded or (name and self._excludes(name, kind == "d")):
            self.excluded.add(name)
        elif name or kind == "f":
            self.entries.append(entry)


def parse_listing(text: bytes, most: int, excludes: Excludes = excludes_nothing) -> RemoteTree:
    """Read the output of the shell function ``list``, of at most so many entries."""
    # A name may contain a line end, so an entry begins only at a mode, a size, a time and "./".
    pattern = rb"([0-9a-f]{1,8}) ([0-9]{1,18}) (-?[0-9]{1,19}) (\.(?:/.*?)?)\n"
    line = re.compile(pattern + rb"(?=[0-9a-f]{1,8} [0-9]{1,18} -?[0-9]{1,19} \./|\Z)", re.S)
    tree = RemoteTree(excludes)
    at = count = 0
    while at < len(text):
        found = line.match(text, at)
        if found is None:
            shown = printable(repr(text[at : at + 80]), 120)
            raise SSHError(f"the host sent a listing that can't be read: {shown}")
        count += 1
        if count > most:
            raise SSHError(f"the host lists more than {most} files")
        mode, size, seconds, name = found.groups()
        tree.add(remote_entry(name[2:], int(mode, 16), int(size), int(seconds)))
        at = found.end()
    return tree


def excluder(patterns: Any) -> Excludes:
    """Return a function that checks a name and its kind against patterns as in .gitignore."""
    check_list("exclude", patterns, "a list of patterns")
    lines = [check_string(f"exclude[{n}]", line) for n, line in enumerate(patterns)]
    if not lines:
        return excludes_nothing
    try:
        pathspec: Any = importlib.import_module("pathspec")
    except ImportError as error:
        raise ImportError("exclude needs pathspec: pip install pathspec") from error
    try:
        spec = pathspec.GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise ValueError(f"exclude: {printable(str(error), 200)}") from error

    def excludes(name: bytes, folder: bool) -> bool:
        return bool(spec.match_file(os.fsdecode(name) + "/" * folder))

    return excludes


class LocalTree(Tree):
    """Find the files, directories and symlinks to upload, and those that are left out.

    Attributes:
        whole: the absolute path.
        left_out: (name, reason) for each of those that are left out.
    """

    def __init__(self, path: bytes, symlinks: str, excludes: Excludes) -> None:
        super().__init__()
        self.path = path
        self.whole = os.path.abspath(path)
        self._symlinks = symlinks
        self._excludes = excludes
        self.left_out: list[tuple[bytes, str]] = []
        try:
            status = os.stat(path)  # the path itself may be a symlink
        except FileNotFoundError:
            shown = printable(repr(os.fsdecode(path)), 300)
            raise FileNotFoundError(f"local: there is nothing at {shown}") from None
        self.root = local_entry(b"", status)
        if self.is_folder:
            self._scan(b"", (os.path.realpath(path),))
        elif self.root.kind == "f":
            self.entries.append(self.root)
        else:
            raise ValueError(f"local is neither a file nor a directory: {os.fsdecode(path)!r}")

    def place(self, entry: FileEntry) -> str:
        """Return the local path of an entry."""
        return os.fsdecode(os.path.join(self.path, entry.name) if entry.name else self.path)

    def pieces(self, entry: FileEntry, start: int, length: int) -> Iterator[memoryview]:
        """Yield a part of a file, which must not have changed since the scan.

        Each piece is overwritten by the next one.
        """
        buffer = memoryview(bytearray(min(TRANSFER_PIECE, max(length, 1))))
        with open(self.place(entry), "rb", buffering=0) as file:
            file.seek(start)
            while length and (size := file.readinto(buffer[:length])):
                length -= size
                yield buffer[:size]
            status = os.fstat(file.fileno())
            if length or (status.st_size, status.st_mtime_ns) != (entry.size, entry.mtime):
                raise SSHError(CHANGED)

    def _scan(self, folder: bytes, above: tuple[bytes, ...]) -> None:
        with os.scandir(os.path.join(self.path, folder)) as listed:
            entries = sorted(listed, key=lambda e: e.name)
        for entry in entries:
            name = folder + b"/" + entry.name if folder else entry.name
            found = local_entry(name, entry.stat(follow_symlinks=False))
            if self._excludes(name, found.kind == "d"):
                continue
            if found.kind == "l":
                self._add_link(found, entry.path, above)
            elif found.kind == "other":
                self.left_out.append((name, "it is not a file"))
            else:
                self.entries.append(found)
                if found.kind == "d":
                    self._scan(name, (*above, os.path.realpath(entry.path)))

    def _add_link(self, found: FileEntry, path: bytes, above: tuple[bytes, ...]) -> None:
        name, link, real = found.name, os.readlink(path), os.path.realpath(path)
        within = real.startswith(above[0].rstrip(b"/") + b"/") and os.path.exists(real)
        follow = within and self._symlinks == "follow"
        if within and self._symlinks == "copy" and link_target(name, link) is not None:
            found.link = link
            self.entries.append(found)
        elif follow and os.path.isfile(real):
            self.entries.append(local_entry(name, os.stat(real)))
        elif follow and os.path.isdir(real) and real not in above:
            self.entries.append(local_entry(name, os.stat(real)))
            self._scan(name, (*above, real))
        else:
            self.left_out.append((name, f"a symlink to {os.fsdecode(link)}"))


def tar_header(entry: FileEntry) -> bytes:
    """Return the header of an entry in a tar stream, without a user's name or number."""
    import tarfile  # imported here, because it is slow

    info = tarfile.TarInfo("./" + os.fsdecode(entry.name))
    # A directory must be writable until its files have arrived.
    info.mode = entry.mode | 0o700 if entry.kind == "d" else entry.mode
    info.size, info.mtime = entry.size, entry.mtime // 10**9
    kinds = {"d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "f": tarfile.REGTYPE}
    info.type, info.linkname = kinds[entry.kind], os.fsdecode(entry.link)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


class Portion:
    """A part of an upload that the host confirms: a chunk of a file, or a tar archive.

    Attributes:
        entries: the file, or the small files, directories and symlinks of the archive.
        start: of the chunk, in bytes; None for an archive.
        size: bytes to send.
    """

    def __init__(self, entries: list[FileEntry], start: int | None = None, size: int = 0) -> None:
        self.entries = entries
        self.start = start
        self.size = size

    @property
    def key(self) -> str:
        """The key under which the host records it."""
        # The time of a directory changes with every file that is created in it.
        versions = [e.version if e.kind == "f" else (e.name, e.link) for e in self.entries]
        return record_key((versions, self.start, self.size))


def plan_portions(tree: LocalTree, resume: bool) -> list[Portion]:
    """Divide an upload into portions; if it may be resumed, the first ones are small."""
    portions: list[Portion] = []
    bundle: Portion | None = None
    before = 0
    # Files come last; with resume, the small ones of them first.
    for entry in sorted(tree.entries, key=lambda e: (e.kind == "f", e.size if resume else 0)):
        most = _portion_size(before) if resume else CHUNK
        if tree.is_folder and entry.size < most:
            if bundle is None or bundle.size >= most or len(bundle.entries) >= BUNDLE_FILES:
                bundle = Portion([])
                portions.append(bundle)
            size = TAR_BLOCK + entry.size + -entry.size % TAR_BLOCK
            bundle.entries.append(entry)
            bundle.size += size
            before += size
            continue
        start = 0
        while start < entry.size:
            size = min(_portion_size(before) if resume else CHUNK, entry.size - start)
            portions.append(Portion([entry], start, size))
            start += size
            before += size
    return portions


def _portion_size(before: int) -> int:
    """Return the bytes of the next portion of a resumable upload: 1 % of those before it."""
    return min(max(before // (100 * BLOCK), 2) * BLOCK, CHUNK)


# ==================================================================================================
# ssh.transfer.remote_script
#
# Run a script on a host with ``sh``, whatever the login shell is.
#
# The login shell runs one fixed line without special characters. That line starts ``sh``, which
# reads
# the script from standard input, between two lines with a random mark. So the kind of the login
# shell
# does not matter, nor what its start-up files print or change. The output is not trusted: lengths
# are
# limited, numbers are parsed, and names are checked.
# ==================================================================================================


DATA_WINDOW = 32 * 1024 * 1024  # bytes in flight on one channel: 320 MB/s at 100 ms
MAX_NOISE = 65536  # bytes that start-up files may print
MAX_LINE = 65536  # bytes
SHELL_PATIENCE = 20.0  # seconds for a login shell to start a script
LAST_PATIENCE = 3.0  # seconds for each step of cleaning up, after an error or Ctrl-C
PADDING = b"\n" * 64  # a start-up file may read some lines: these, and not those of the script

# Has no character that csh or fish changes within single quotes: no backslash, quote or "!".
# $a keeps the locale of the user, for scripts that start a command of the user.
BOOTSTRAP = (
    "/bin/sh -c 'a=$LC_ALL; export LC_ALL=C; n=$(echo; echo x); n=${{n%x}}; l=; "
    'until [ "$l" = {mark} ]; do IFS= read -r l || exit 119; done; s=; l=; '
    'until [ "$l" = {mark} ]; do s=$s$l$n; IFS= read -r l || exit 119; done; '
    'echo {mark}; eval "$s"\''
)
# For a script that reads nothing: sent as an argument, which saves a round trip; "@" ends a line.
INLINE = (
    "/bin/sh -c 'export LC_ALL=C; n=$(echo; echo x); n=${{n%x}}; s=; IFS=@; set -f; "
    "for l in $1; do s=$s$l$n; done; unset IFS; set +f; echo {mark}; eval \"$s\"' sh '{script}'"
)
NO_INPUT = 119  # the exit code if the input ends before the script
READS_ALL = "a start-up file of the host, such as ~/.bashrc, reads the input of all commands"
MAX_INLINE = 4096  # bytes; dropbear accepts 9,000


class NoShellError(SSHError):
    """Report a host without a POSIX shell or one of the usual tools; SFTP may work."""


class RemoteScript:
    """Run a script on a host; a context manager that closes its channel.

    Parameters:
        timeout: seconds without anything sent or received.
        patience: seconds to retry while the host opens no further channel.
        reads: whether the script reads its input.
        turn: a lock to hold while a script starts, and while it ends; for a host on which none may
            start while another one ends.
    """

    def __init__(
        self, transport: Any, script: bytes, watchdog: Watchdog, timeout: float, *,
        patience: float = 1.0, window: int = COMMAND_WINDOW, reads: bool = True,
        turn: threading.Lock | None = None,
    ) -> None:  # fmt: skip
        self._transport = transport
        self._turn = turn
        self._ending = False
        self._mark = os.urandom(8).hex()
        self._buffer = memoryview(b"")  # received, and not read yet
        self._begun = False
        inline = None if reads else inlined(script)
        line = BOOTSTRAP if inline is None else INLINE
        command = line.format(mark=self._mark, script=inline)

        def open_channel() -> LimitedChannel:
            with turn or contextlib.nullcontext():
                channel = LimitedChannel(transport, timeout, watchdog, window)
                channel.exec_command(command)
            return channel

        self.channel: LimitedChannel = with_patience(patience, open_channel)
        mark = self._mark.encode() + b"\n"
        # An inline script also gets lines, for start-up files that read some, and because dropbear
        # loses the output of a short script that has no input.
        self.send(PADDING + (mark + script + b"\n" + mark if inline is None else b""))
        self._arrived = threading.Event()  # set while there is output, and at its end
        self.channel.in_buffer.set_event(self._arrived)
        if inline is not None and turn is None:
            self.end()  # a start-up file that reads all input ends then

    def __enter__(self) -> RemoteScript:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def finish(self) -> None:
        """Close the channel; if scripts take turns, wait for the end of the script first."""
        if self._turn is not None and not self.channel.closed:
            self.end()
            self.channel.status_event.wait(LAST_PATIENCE)
        self.close()

    def close(self) -> None:
        """Close the channel, which ends a script that still runs."""
        self.channel.close()
        if self._turn is not None and self._ending:
            self._ending = False
            self._turn.release()

    # --- sending ---

    def send(self, data: bytes | memoryview) -> bool:
        """Send all of ``data``; return False if the script reads no more: its answer says why."""
        view = memoryview(data)
        try:
            while view:
                view = view[self.channel.send(view[:BLOCK]) :]
        except connection_errors():
            return False
        return True

    def send_names(self, names: Iterable[bytes]) -> None:
        """Send names of files for ``xargs -0``, and end the input."""
        self.send(b"".join(b"./" + name + b"\0" for name in names))
        self.end()

    def end(self) -> None:
        """End the input of the script."""
        if self._turn is not None and not self._ending:
            self._turn.acquire()
            self._ending = True
        with contextlib.suppress(SSHError, *connection_errors()):
            self.channel.shutdown_write()

    # --- receiving ---

    def read(self, most: int) -> bytes:
        """Return up to ``most`` bytes of output; none at its end."""
        if not self._begun:
            self._skip_noise()
        return self._receive(most)

    def piece(self, left: int) -> bytes:
        """Return some of the ``left`` bytes of output that must still follow."""
        piece = self.read(min(TRANSFER_PIECE, left))
        if not piece:
            raise SSHError(f"{left} bytes are missing: {self.refused()}")
        return piece

    def exactly(self, size: int) -> bytes:
        """Return the next ``size`` bytes of output."""
        data = b""
        while len(data) < size:
            data += self.piece(size - len(data))
        return data

    def line(self) -> bytes:
        """Return the next line without its end, or the rest of the output."""
        line = b""
        deadline = time.monotonic() + self.channel.timeout
        while not (end := line.find(b"\n") + 1):
            piece = self.read(MAX_LINE)
            if not piece:
                return line
            line += piece
            if len(line) > 4 * MAX_LINE:
                raise SSHError("the host sends an endless line")
            if time.monotonic() > deadline and b"\n" not in line:
                raise SSHError(f"the host sent no whole line within {self.channel.timeout:g}s")
        self._push_back(line[end:])
        return line[: end - 1]

    def until(self, mark: bytes, most: int) -> bytes:
        """Return the output before a line with only the mark, up to ``most`` bytes."""
        text, ending, start = bytearray(b"\n"), b"\n" + mark + b"\n", 0
        while (end := text.find(ending, start)) < 0:
            start = max(0, len(text) - len(ending))
            piece = self.read(MAX_LINE)
            if not piece:
                raise self.refused(bytes(text[1 : 1 + MAX_LINE]))
            text += piece
            if len(text) > most:
                raise SSHError(f"the host answers with more than {most} bytes")
        self._push_back(bytes(text[end + len(ending) :]))
        return bytes(text[1 : end + 1])

    def rest(self, most: int) -> bytes:
        """Return the rest of the output, up to ``most`` bytes."""
        text = bytearray()
        while piece := self.read(BLOCK):
            text += piece
            if len(text) > most:
                raise SSHError(f"the host answers with more than {most} bytes")
        return bytes(text)

    def answer(self, word: bytes) -> bytes:
        """Read a line that must begin with ``word``, and return what follows it."""
        line = self.line()
        if line == word or line.startswith(word + b" "):
            return line[len(word) + 1 :]
        raise self.refused(line)

    def expect_end(self) -> None:
        """Check that there is no more output, and that the script succeeded."""
        if self.read(1):
            raise SSHError("the host sends more than it announced")
        if self.channel.recv_exit_status() != 0:
            raise self.refused()

    def refused(self, line: bytes = b"") -> SSHError:
        """Return an error with the reason that the host gives."""
        if line.startswith(b"no lacks "):
            return NoShellError(f"the host {printable(os.fsdecode(line[3:]), 80)}")
        said = line[3:] if line.startswith(b"no ") else b""
        said = said or self._errors() or line
        if not said.strip() and not self._transport.is_active():
            return SSHError("the connection broke")
        text = said.decode("utf-8", "replace").strip() or "it gives no reason"
        return SSHError(f"the host refuses: {printable(text, 500)}")

    def _errors(self) -> bytes:
        text = b""
        while self.channel.recv_stderr_ready() and len(text) < MAX_LINE:
            text += self.channel.recv_stderr(MAX_LINE)
        return text

    def _receive(self, most: int) -> bytes:
        if not self._buffer:
            try:
                # Read everything at once: paramiko copies the rest of its buffer with every read.
                self._buffer = memoryview(self.channel.recv(DATA_WINDOW))
            except connection_errors():
                raise SSHError("the connection broke") from None
        piece, self._buffer = self._buffer[:most], self._buffer[most:]
        return bytes(piece)

    def _push_back(self, data: bytes) -> None:
        if data:
            self._buffer = memoryview(data + bytes(self._buffer))

    def _skip_noise(self) -> None:
        """Skip what start-up files print before the mark."""
        self._begun = True
        mark, seen = self._mark.encode() + b"\n", b""
        deadline = time.monotonic() + min(self.channel.timeout, SHELL_PATIENCE)
        while mark not in seen:
            if not self._buffer and not self._arrived.wait(max(0.0, deadline - time.monotonic())):
                raise NoShellError(f"{READS_ALL}, or the shell takes too long to start")
            piece = self._receive(BLOCK)
            if not piece:
                raise self._no_shell(seen)
            seen += piece
            late = len(seen) > MAX_NOISE + BLOCK or time.monotonic() > deadline
            if late and mark not in seen:
                raise SSHError("the host prints without end before it starts a script")
        self._push_back(seen.partition(mark)[2])

    def _no_shell(self, seen: bytes) -> SSHError:
        if not self._transport.is_active():
            return SSHError("the connection broke")
        self.channel.status_event.wait(LAST_PATIENCE)
        if self.channel.exit_status == NO_INPUT:
            return NoShellError(READS_ALL)
        said = (self._errors().strip() or seen.strip()).decode("utf-8", "replace")
        text = printable(said, 300) or f"nothing (exit code {self.channel.exit_status})"
        return NoShellError(f"the host runs no shell, and says: {text}")


def inlined(script: bytes) -> str | None:
    """Return a script as an argument that every login shell passes on unchanged, or None."""
    if len(script) > MAX_INLINE or re.search(rb"[^\n -~]|[\\!@]", script):
        return None
    return script.decode("ascii").replace("'", "'\"'\"'").replace("\n", "@")


# ==================================================================================================
# ssh.transfer.transfer
#
# Run one transfer: its arguments, worker threads, scripts, deadline, progress and errors.
# ==================================================================================================


MAX_STREAMS = 16
# (size in bytes, connections): from this size on, more connections save more time than their logins
# cost.
UPLOAD_CONNECTIONS = ((256 * 1024 * 1024, 4), (32 * 1024 * 1024, 2))
CHANNEL_PATIENCE = 0.5  # seconds until a worker without a channel leaves its work to the others
LEAST_AHEAD = 256 * 1024  # bytes that a resumable upload sends before the host confirms any
NEAR = 0.02  # seconds of a round trip; below it, one channel is as fast as several
RANGE = 64 * 1024 * 1024  # bytes that are requested or hashed at a time, within the timeout
FileRange = tuple[FileEntry, int, int]  # with the start and the size


class TransferOptions:
    """Check the arguments of a transfer."""

    def __init__(
        self, local: Any, remote: Any, *, preserve: Any, verify: Any, resume: Any, symlinks: Any,
        exclude: Any, skip_unchanged: Any, streams: Any, progress: Any, on_progress: Any,
        timeout: Any, deadline: Any,
    ) -> None:  # fmt: skip
        self.local = check_path("local", local)
        self.remote = check_path("remote", remote)
        self.source = remote_path(self.remote)
        if not isinstance(skip_unchanged, bool) and skip_unchanged != "checksum":
            shown = short_repr(skip_unchanged)
            raise ValueError(f"skip_unchanged must be True, False or 'checksum', not {shown}")
        self.skip_unchanged: bool | str = skip_unchanged
        self.excludes = excluder(exclude)
        # Times can only be compared later if they are kept now.
        self.preserve = check_bool("preserve", preserve) or skip_unchanged is True
        self.verify = check_bool("verify", verify)
        self.resume = check_bool("resume", resume)
        if symlinks not in ("skip", "copy", "follow"):
            shown = short_repr(symlinks)
            raise ValueError(f"symlinks must be 'skip', 'copy' or 'follow', not {shown}")
        self.symlinks: str = symlinks
        self.streams = None
        if streams is not None:
            self.streams = check_count("streams", streams, minimum=1, maximum=MAX_STREAMS)
        self.events = ProgressOptions(on_progress, progress is True)
        self.progress = None if isinstance(progress, bool) else progress
        check_callback("progress", self.progress, 3)
        self.timeout = check_number("timeout", timeout, above=True, unit="seconds")
        self.deadline = check_optional_number("deadline", deadline, above=True, unit="seconds")


class DownloadOptions(TransferOptions):
    """Check the arguments of a download, and find its target.

    Attributes:
        target: the path to write a file to: inside ``local`` if that is a directory or is named as
            one, else ``local``.
        folder_target: the path to write a directory to: inside ``local``, or ``local`` itself for
            the content of a directory.
    """

    def __init__(self, remote: Any, local: Any, *, max_bytes: Any, **given: Any) -> None:
        super().__init__(local, remote, **given)
        self.max_bytes = None if max_bytes is None else check_count("max_bytes", max_bytes)
        here = os.fsdecode(os.path.expanduser(self.local))
        name = os.fsdecode(self.remote.rstrip(b"/").rpartition(b"/")[2])
        content = is_content(self.remote) or self.remote == b"~"
        inside = os.path.isdir(here) or here.endswith(("/", os.sep))
        self.target = os.path.join(here, name) if inside and not content else here
        self.folder_target = here if content else os.path.join(here, name)


def is_content(path: bytes) -> bool:
    """Return whether a source path means the content of a directory, as it does for rsync."""
    last = path.replace(os.fsencode(os.sep), b"/").rpartition(b"/")[2]
    return last in (b"", b".", b"..")


def check_path(name: str, value: Any) -> bytes:
    """Check a path, and return it as bytes."""
    check_type(name, value, "a path", str, bytes, os.PathLike)
    check_local_path(name, value)  # no host allows longer ones
    path = os.fsencode(value)
    if not path:
        raise ValueError(f"{name} must not be empty")
    return path


class UploadOptions(TransferOptions):
    """Check the arguments of an upload."""

    def __init__(self, local: Any, remote: Any, *, preview: Any, delete: Any, **given: Any) -> None:
        super().__init__(local, remote, **given)
        self.content = is_content(self.local)
        self.source = re.sub(rb"(/+\.?)+\Z", b"/", self.source)
        self.preview = check_bool("preview", preview)
        self.delete: bool | frozenset[bytes] = False
        if isinstance(delete, TransferResult) and delete.deletes is not None and not preview:
            self.delete = frozenset(delete.deletes)
        elif delete is True and preview:
            self.delete = True
        elif delete is not False:
            raise ValueError(
                "delete must be the result of a call with preview=True and delete=True, so that "
                f"nothing is removed unseen, not {short_repr(delete)}"
            )
        self.compares = bool(preview or self.delete is not False or self.skip_unchanged)


def check_upload(local: Any, remote: Any, **given: Any) -> tuple[UploadOptions, LocalTree]:
    """Check the arguments of an upload, and find the files to send."""
    options = UploadOptions(local, remote, **given)
    tree = LocalTree(os.path.expanduser(options.local), options.symlinks, options.excludes)
    if options.delete is not False and not tree.is_folder:
        raise ValueError("delete is for the upload of a directory, and local is a file")
    return options, tree


def upload_connections(options: UploadOptions, tree: LocalTree) -> int:
    """Return how many connections an upload uses."""
    if options.streams is not None:
        return options.streams
    size = tree.size
    return next((count for least, count in UPLOAD_CONNECTIONS if size >= least), 1)


class StoppedError(SSHError):
    """Stop a worker after another one has failed; used only within a transfer."""


class Transfer:
    """Run the worker threads and scripts of one transfer, and report its progress and errors.

    Attributes:
        name: of the whole source, for errors.
        verb: ``"upload"`` or ``"download"``.
        total: bytes to transfer, once they are known.
        unchanged: the number of files that are left out, as they are the same.
        deletes: the names that only the target has, or None.
        skipped: (name, reason) for each entry that is left out.
        timeout: seconds without anything sent or received.
        near: whether one channel is as fast as several.
        takes_turns: whether no script may start while another one of the connection ends.
    """

    def __init__(
        self, pool: ConnectionPool, options: TransferOptions, name: str, verb: str
    ) -> None:
        self.name = name
        self.verb = verb
        self.total = 0
        self.unchanged = 0
        self.deletes: list[bytes] | None = None
        self.options: Any = options
        self.pool = pool
        self.near = pool.round_trip < NEAR
        self.takes_turns = takes_turns(pool.ssh.get_transport())
        self.watchdog = Watchdog()
        self.skipped: list[tuple[str, str]] = []
        self._expired = False
        self._report: Report | None = None
        self._owner = threading.get_ident()
        self._workers: list[threading.Thread] = []
        self._started = time.monotonic()
        self._running: weakref.WeakSet[RemoteScript] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._turns: defaultdict[Any, threading.Lock] = defaultdict(threading.Lock)
        self.restart()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Enforce the deadline, report the progress, and raise a TransferError for what fails."""
        failures: tuple[type[Exception], ...] = (SSHError, *connection_errors())
        deadline = self.options.deadline
        left = float("inf") if deadline is None else deadline - self.pool.age
        try:
            with (
                self.watchdog,
                self.watchdog.limit(left, self._expire),
                self.options.events.reporting() as self._report,
            ):
                yield
        except TransferError:  # of another transfer, in a callback
            raise
        except failures as error:
            # The text of a plain SSHError is the whole reason: its traceback would only be noise.
            raise self._failure(error) from (None if type(error) is SSHError else error)

    def _expire(self) -> None:
        self._expired = True
        self.stop()
        self.pool.break_off()

    def restart(self) -> None:
        """Prepare the first attempt, or another one after one that failed."""
        self.stopped = threading.Event()
        self.timeout: float = self.options.timeout
        self._done: dict[bytes, int] = {}
        self._all_done = 0
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ahead(self, confirmed: int) -> float:
        """Return how many bytes an upload may send beyond those that the host has confirmed.

        A broken connection can lose these bytes.
        """
        if not self.options.resume:
            return float("inf")
        return max(LEAST_AHEAD, confirmed // 25)

    def script(
        self, ssh: Any, text: bytes, window: int = COMMAND_WINDOW, *,
        patient: bool = True, reads: bool = True,
    ) -> RemoteScript:  # fmt: skip
        """Start a script, which ends when the transfer stops."""
        by_owner = threading.get_ident() == self._owner
        running = RemoteScript(
            ssh.get_transport(), text, self.watchdog, self.timeout,
            patience=self.timeout if patient and by_owner else CHANNEL_PATIENCE,
            window=window, reads=reads, turn=self._turns[ssh] if self.takes_turns else None,
        )  # fmt: skip
        with self._lock:
            self._running.add(running)
        if self.stopped.is_set() and not by_owner:
            running.close()
            raise StoppedError
        return running

    def stop(self, but: RemoteScript | None = None) -> None:
        """End all scripts except ``but``, and shorten the timeouts for the cleanup."""
        self.stopped.set()
        self.timeout = min(self.timeout, LAST_PATIENCE)
        with self._lock:
            running = list(self._running)
        for script in running:
            script.channel.timeout = min(script.channel.timeout, LAST_PATIENCE)
            if script is not but:
                script.close()

    def give_up(self, control: RemoteScript | None = None) -> None:
        """Stop all workers, and wait until ``control`` has removed the data on the host."""
        self.stop(but=control)
        self.join_workers()
        if control is None:
            return
        control.end()
        failures: tuple[type[Exception], ...] = (SSHError, *connection_errors())
        try:
            with self.watchdog.limit(LAST_PATIENCE, control.close):
                control.rest(MAX_LINE)
        except failures as error:
            if not self.options.resume:
                logger.warning("a temporary file may stay on the host: %s", error)
        finally:
            control.close()

    def leave_unchanged(
        self, tree: Tree, find: Callable[[bytes], FileEntry | None],
        different: Callable[[list[FileEntry]], list[FileEntry]],
    ) -> None:  # fmt: skip
        """Remove the files that the target already has, if ``skip_unchanged`` asks for that.

        Parameters:
            find: returns the entry of the target with a name, if there is one.
            different: returns those of the files whose content differs.
        """
        how = self.options.skip_unchanged
        same = []
        for entry in tree.files if how else ():
            found = find(entry.name)
            if found is not None and (found.kind, found.size) == ("f", entry.size):
                same_time = whole_seconds(found.mtime) == whole_seconds(entry.mtime)
                if same_time or how == "checksum":
                    same.append(entry)
        names = {entry.name for entry in same}
        if how == "checksum" and same:
            names -= {entry.name for entry in different(same)}
        tree.entries = [entry for entry in tree.entries if entry.name not in names]
        self.unchanged = len(names)

    def different(
        self, ranges: Iterable[FileRange], place: Callable[[FileEntry], str | Path],
        setup: str = "", **values: Any,
    ) -> Iterator[FileEntry]:  # fmt: skip
        """Yield the file of each range whose SHA-256 on the host differs.

        Parameters:
            place: returns the local path of a file.
            setup: shell commands that set ``path``, if it is not in ``values``.
        """
        small: list[FileRange] = []
        chunks: list[FileRange] = []
        for entry, start, size in ranges:
            if entry.name and size == entry.size < SMALL_FILE:
                small.append((entry, start, size))
            else:
                end = start + size
                chunks += [(entry, at, min(RANGE, end - at)) for at in range(start, end, RANGE)]
        small.sort(key=lambda found: found[0].name)
        names = [b"./" + entry.name + b"\0" for entry, _, _ in small]
        lines = [b"%d %d %s\n" % (at // BLOCK, n, encoded_name(e.name)) for e, at, n in chunks]
        for body, asked, found in ((FILE_DIGESTS, names, small), (CHUNK_DIGESTS, lines, chunks)):
            if not found:
                continue
            text = script_text("digests", setup + body, **values)
            with self.script(self.pool.ssh, text) as script:
                script.send(b"".join(asked))
                script.end()
                digests = parse_digests(script.rest(MAX_ANSWER), len(found))
            for (entry, start, size), digest in zip(found, digests, strict=True):
                if digest != file_digest(place(entry), start, size):
                    yield entry

    # --- workers ---

    def start_workers(self, connections: int, workers: int, work: Callable[[Any], None]) -> None:
        """Start threads that each call ``work`` with a connection."""
        connections = min(connections, self.pool.size)
        for number in range(workers):
            worker = start_thread("transfer", self._work, number % connections, work)
            self._workers.append(worker)

    def _work(self, number: int, work: Callable[[Any], None]) -> None:
        failure: BaseException | None = None
        try:
            ssh = self.pool.get(number)
            if ssh is not None:
                work(ssh)
        except BaseException as error:
            failure = error
        self._events.put((None, failure))

    def finish_workers(self) -> None:
        """Report progress until all workers have ended, and raise the first error.

        A worker that gets no channel leaves its work to the others.
        """
        left, failure = len(self._workers), None
        while left:
            entry, more = self._events.get()
            if entry is not None:
                if failure is None:
                    self.count(entry, more)
                continue
            left -= 1
            if isinstance(more, NoChannelError):
                logger.debug("a worker ends: %s", more)
            elif more is not None and failure is None:
                failure = more
                self.stop()
        self.join_workers()
        if failure is not None:
            raise failure

    def join_workers(self) -> None:
        for worker in self._workers:
            worker.join()
        self._workers = []

    # --- progress ---

    def moved(self, entry: FileEntry, size: int) -> None:
        """Count bytes of a file that were transferred, in any thread."""
        if threading.get_ident() == self._owner:
            self.count(entry, size)
            return
        self._events.put((entry, size))
        if self.stopped.is_set():
            raise StoppedError

    def count(self, entry: FileEntry, size: int) -> None:
        """Count the bytes and call ``progress``, in the caller's thread."""
        if self._expired:
            raise SSHError("the deadline has passed")
        done = self._done[entry.name] = self._done.get(entry.name, 0) + size
        if self.options.progress is not None:
            self.options.progress(self._shown(entry), done, entry.size)
        self._all_done += size
        if self._report is not None:
            self._report(self._event(self._shown(entry)))

    def _event(self, name: str) -> ProgressEvent:
        done, total = self._all_done, max(self.total, self._all_done)
        text = f"{self.verb} of {name}: {readable_size(done)} of {readable_size(total)}"
        seconds = time.monotonic() - self._started
        if done and total > done:
            text += f", {readable_seconds(seconds * (total - done) / done)} left"
        return ProgressEvent(self.verb, done, text, total)

    def _shown(self, entry: FileEntry) -> str:
        return printable(os.fsdecode(entry.name) if entry.name else self.name)

    def leave_out(self, name: bytes, why: str) -> None:
        """Record and log an entry that is not transferred."""
        self.skipped.append((printable(os.fsdecode(name)), printable(why)))
        logger.warning("left out: %s, %s", *self.skipped[-1])

    # --- the end ---

    def _failure(self, error: Exception) -> TransferError:
        """Describe an error of the host or the connection: the file, how far, and why."""
        entry = getattr(error, "entry", None)
        if entry is None:
            name, done, total = printable(self.name), self._all_done, self.total
        else:
            name, done, total = self._shown(entry), self._done.get(entry.name, 0), entry.size
        why = printable(str(error) or type(error).__name__, 500)
        if self._expired:
            why = f"it took longer than deadline={self.options.deadline:g} seconds"
        if self.options.resume and done:
            why += "; the received data is kept for resume=True"
        text = f"{printable(name, 300)} was not transferred, after {done} of {total} bytes: {why}"
        return TransferError(text, name=name, done=done, total=total)

    def result(self, path: bytes | str, files: list[FileEntry]) -> TransferResult:
        size, duration = sum(file.size for file in files), time.monotonic() - self._started
        logger.debug("%d files, %d bytes in %.2f s: %s", len(files), size, duration, self.name)
        shown = printable(os.fsdecode(path))
        preview = getattr(self.options, "preview", False)
        return TransferResult(
            shown, len(files), size, duration, self.skipped, unchanged=self.unchanged,
            sent=[self._shown(entry) for entry in files] if preview else None, deletes=self.deletes,
        )  # fmt: skip


# ==================================================================================================
# ssh.jobs
#
# Start, follow and stop jobs: commands that run on a host without a connection.
# ==================================================================================================


JOB_TIMEOUT = 30.0  # seconds without any output of a script
LEAST_PATIENCE = 5.0  # seconds for a login or an answer, even if less time is left
MAX_TAIL = 8 * 1024 * 1024  # bytes
MAX_PORTION = 1048576  # bytes of output after one size
MAX_JOBS = 10_000
MOST_USELESS_TRIES = 3  # consecutive connections without output that end at once
LEAST_USEFUL = 0.5  # seconds from the first message to the end of a useful connection
RECONNECT_PAUSE = 1.0  # the fewest seconds between two connections
# A name, its state, its exit code or "-", and the time of its start.
_JOB_STATE = r"(running|exited|killed|lost) (-|[0-9]{1,3}) ([0-9]{1,12})"
_SIGNAL_CODES = range(129, 193)

Connect = Callable[[float], ConnectionPool]


def job_variables(command: Any, name: Any, env: Any, cwd: Any) -> dict[str, Any]:
    """Check the arguments of ``start``, and return the variables of the script."""
    return {
        "name": f"job-{os.urandom(4).hex()}" if name is None else check_plain_name(name),
        "command": encoded("command", command_line(command)),
        "exports": SecretBytes(encoded("env", exports(env))),
        "cwd": remote_path(check_path("cwd", "~" if cwd is None else cwd)),
    }


class JobState(NamedTuple):
    """The state of a job, as the host reports it.

    Attributes:
        status: ``"running"``, ``"exited"``, ``"killed"`` or ``"lost"``.
        exit_code: of the command, or None.
        started: Unix time on the host's clock.
    """

    status: str
    exit_code: int | None = None
    started: float = 0.0

    @classmethod
    def parse(cls, text: str) -> JobState:
        """Read what the scripts print about a job."""
        found = re.fullmatch(_JOB_STATE, text)
        if found is None:
            raise SSHError(f"the host sent a job state that can't be read: {text!r}")
        status, digits, started = found.groups()
        code = int(digits) if status == "exited" and digits != "-" else None
        return cls("killed" if code in _SIGNAL_CODES else status, code, float(started))


class HostJobs:
    """Start and find the jobs of one host.

    Parameters:
        connect: returns connections to the host; the argument limits the seconds of the login.
        reconnects: it can be called again; False if the caller gave the connection.
    """

    def __init__(self, connect: Connect, reconnects: bool) -> None:
        self._connect = connect
        self.reconnects = reconnects

    @contextlib.contextmanager
    def script(
        self, verb: str, deadline: float = math.inf, /, **values: bytes | str | int
    ) -> Iterator[RemoteScript]:
        """Run a script on a connection of its own, for the length of a block."""
        left = deadline - time.monotonic()
        limit = min(JOB_TIMEOUT, max(left, LEAST_PATIENCE))
        text = SecretBytes(script_text(verb, job_script(verb), **values))
        with self._connect(max(0.0, left)) as pool, Watchdog() as watchdog:
            transport = pool.ssh.get_transport()
            turn = threading.Lock() if takes_turns(transport) else None
            try:
                with RemoteScript(transport, text, watchdog, limit, turn=turn) as script:
                    yield script
            except NoShellError as error:
                raise JobError(f"a job needs a POSIX shell: {error}") from error

    def call(
        self, verb: str, word: bytes, most: int = 0, /, *, name: str, **values: bytes | str | int
    ) -> bytes:
        """Run a script for one job; return what follows ``word`` in its answer.

        Parameters:
            most: the maximum number of bytes after that line, which are returned too.

        Raises:
            JobError: the script failed.
        """
        with self.script(verb, name=name, **values) as script:
            try:
                return script.answer(word) + (script.rest(most) if most else b"")
            except SSHError as error:
                raise JobError(f"job {name!r}: {error}", name=name) from error

    def start(self, variables: dict[str, Any]) -> Job:
        """Start a job with :func:`job_variables`, and return it once it runs."""
        started = self.call("job", b"started", runner=JOB_RUNNER, **variables)
        name, line = variables["name"], variables["command"].decode("utf-8", "surrogateescape")
        logger.debug("job %s runs: %s", name, printable(line, 200))
        state = JobState.parse(f"running - {started.decode('ascii', 'replace')}")
        return Job(self, name, line, state)

    def find(self, name: str = "") -> list[Job]:
        """Return the jobs of the host, or the one with this name."""
        jobs: list[Job] = []
        with self.script("jobs", name=name) as script:
            while (line := script.line()) != b"end":
                found = re.fullmatch(rf"job ({PLAIN_NAME}) ({_JOB_STATE})", line.decode("latin-1"))
                if found is None or len(jobs) == MAX_JOBS:
                    raise script.refused(line)
                command = script.line().decode("utf-8", "replace")
                jobs.append(Job(self, found[1], command, JobState.parse(found[2])))
        return jobs

    def get(self, name: str) -> Job:
        """Return the job with a name."""
        for job in self.find(name):
            if job.name == name:
                return job
        raise JobError(f"the host has no job {name!r}: jobs() lists those it has", name=name)


class Job:
    """A command that runs on a host without a connection; see ``CloreClient.start``.

    Each method and property opens a connection, unless the job is known to have ended. Its files
    are in ``~/.clore/jobs/<name>`` on the host.

    Attributes:
        name: the name of the job.
        command: the command; only its first line if another process started the job.
    """

    def __init__(self, host: HostJobs, name: str, command: str, state: JobState) -> None:
        self._host = host
        self._state = state
        self.name = name
        self.command = command

    def __repr__(self) -> str:
        code = self._state.exit_code
        ended = "" if code is None else f", exit code {code}"
        return f"<Job {self.name!r}: {self._state.status}{ended}>"

    @property
    def status(self) -> str:
        """Return the status of the job now.

        Returns:
            ``"running"``; ``"exited"``; ``"killed"``, by a signal, the host's memory limit, or
            :meth:`stop`; ``"lost"``, if the host or its container was restarted, or the order has
            ended.
        """
        return self._refresh().status

    @property
    def exit_code(self) -> int | None:
        """Return the exit code; None while the job runs, or if none was recorded.

        It is 128 plus the number of the signal if one ended the command.
        """
        return self._refresh().exit_code

    @property
    def started(self) -> float:
        """Return the Unix time of the start, by the host's clock."""
        return self._state.started

    def tail(self, lines: int = 50) -> str:
        """Return the last lines of the output, stdout and stderr together.

        Parameters:
            lines: the number of lines; the text has 8 MB at most.

        Raises:
            JobError: the host no longer has the job.

        Example:
            >>> print(job.tail(2))
            step 99: loss 1.25
            step 100: loss 1.24
        """
        check_count("lines", lines)
        text = self._host.call(
            "tail", b"tail", MAX_TAIL + 1024, name=self.name, lines=lines, most=MAX_TAIL
        )
        return text.decode("utf-8", "replace")

    def follow(
        self,
        on_output: Callable[[OutputLine], object] | None = print,
        *,
        timeout: float | None = None,
        on_progress: Report | None = None,
        progress: bool = False,
    ) -> int | None:
        """Pass on the output from its start, and wait for the end of the job.

        If the connection breaks, it connects again and continues where the output stopped: no line
        is lost, and none comes twice. Ctrl-C does not end the job.

        Parameters:
            on_output: called with each line of stdout and stderr, without its line end.
            timeout: seconds to follow; None follows to the end.
            on_progress, progress: as for :meth:`CloreClient.wait_for_order`.

        Returns:
            The exit code, as :attr:`exit_code` has it.

        Raises:
            JobTimeoutError: the job did not end in time. It still runs.
            SSHError: the host can't be reached any more, or refused the login.

        Example:
            >>> job.follow(on_output=print)
            step 1: loss 4.17
            0
        """
        check_callback("on_output", on_output, 1)
        splitter = None if on_output is None else LineSplitter(STDOUT, on_output)
        limit = check_optional_number("timeout", timeout, infinite=True, unit="seconds")
        deadline = math.inf if limit is None else time.monotonic() + limit
        output = JobOutput(self._host, self.name, deadline, skip=splitter is None)
        try:
            with (
                ProgressOptions(on_progress, progress).reporting() as report,
                contextlib.closing(output.pieces()) as pieces,
            ):
                for piece in pieces:
                    if splitter is not None:
                        splitter.feed(piece)
                    if report is not None and not piece:
                        text = f"job {self.name}: {readable_size(output.size)} of output"
                        report(ProgressEvent("job", output.size, text))
            self._state = output.state or self._state
        except OrderEndedError:
            self._state = JobState("lost")
        if splitter is not None:
            splitter.finish()
        return self._state.exit_code

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end of the job; takes the same ``timeout`` as :meth:`follow`.

        Returns:
            The exit code, as :attr:`exit_code` has it.

        Example:
            >>> job.wait(timeout=3600)
            0
        """
        return self.follow(None, timeout=timeout)

    def stop(self, grace: float = 10.0) -> None:
        """Stop the job with all its processes: with SIGTERM, and later with SIGKILL.

        Parameters:
            grace: seconds between the two, at most 20.

        Example:
            >>> job.stop()
        """
        check_number("grace", grace, maximum=20.0, unit="seconds")
        self._host.call("stop", b"stopped", name=self.name, grace=math.ceil(10 * grace))

    def remove(self) -> None:
        """Remove a job that has ended, with its output, so that its name is free again.

        Raises:
            JobError: the job still runs, or the host has no such job.

        Example:
            >>> job.remove()
        """
        self._host.call("remove", b"removed", name=self.name)
        if self._state.status == "running":
            self._state = JobState("lost")

    def _refresh(self) -> JobState:
        if self._state.status == "running":
            try:
                found = self._host.find(self.name)
                self._state = found[0]._state if found else JobState("lost")
            except OrderEndedError:
                self._state = JobState("lost")
        return self._state


class JobOutput:
    """Receive the output of a job until its end, over as many connections as necessary.

    Parameters:
        skip: receive no output, and only wait for the end.

    Attributes:
        size: the bytes that were received.
        state: the state of the job, after its end.
    """

    def __init__(self, host: HostJobs, name: str, deadline: float, skip: bool) -> None:
        self._host = host
        self._name = name
        self._deadline = deadline
        self._skip = skip
        self._heard_at = math.inf  # when the current connection got its first message
        self.size = 0
        self.state: JobState | None = None

    def pieces(self) -> Generator[bytes, None, None]:
        """Yield the output, with an empty piece after each message of the host.

        Raises:
            JobTimeoutError: the job did not end before the deadline.
            SSHError: the host can't be reached any more.
        """
        useless = 0
        failures: tuple[type[Exception], ...] = (SSHError, *connection_errors())
        while self.state is None:
            began, size, self._heard_at = time.monotonic(), self.size, math.inf
            try:
                yield from self._received()
            except (JobError, HostKeyChangedError):
                raise
            except failures as error:
                no_login = getattr(error, "reason", "")  # "refused" or "unreachable"
                if no_login == "refused":
                    raise
                if self._time_left() <= 0:
                    raise self._too_late(f"it may still run ({reason(error)})") from error
                now = time.monotonic()
                # Otherwise, a host that ends each script at once would cause an endless loop.
                useful = self.size > size or now - self._heard_at > LEAST_USEFUL
                useless = 0 if useful else useless + 1
                if no_login or not self._host.reconnects or useless >= MOST_USELESS_TRIES:
                    raise
                logger.warning("job %s: %s; connecting again", self._name, error)
                time.sleep(max(0.0, began + RECONNECT_PAUSE - now))

    def _time_left(self) -> float:
        return self._deadline - time.monotonic()

    def _too_late(self, state: str = "it still runs") -> JobTimeoutError:
        return JobTimeoutError(f"job {self._name!r} did not end in time; {state}", name=self._name)

    def _received(self) -> Iterator[bytes]:
        """Yield the output that one connection receives."""
        at = -1 if self._skip else self.size
        with self._host.script("follow", self._deadline, name=self._name, at=at) as script:
            while True:
                limit = min(JOB_TIMEOUT, max(self._time_left(), LEAST_PATIENCE))
                script.channel.timeout = limit
                script.channel.settimeout(limit)
                line = script.line()
                if line.startswith(b"end "):
                    self.state = JobState.parse(line[4:].decode("ascii", "replace"))
                    return
                if not re.fullmatch(rb"[0-9]{1,7}", line) or int(line) > MAX_PORTION:
                    error = script.refused(line)
                    raise JobError(str(error), name=self._name) if line[:3] == b"no " else error
                self._heard_at = min(self._heard_at, time.monotonic())
                left = int(line)
                while left:
                    piece = script.read(left)
                    if not piece:
                        raise SSHError("the connection broke")
                    left -= len(piece)
                    if not self._skip:
                        self.size += len(piece)
                        yield piece
                yield b""
                if self._time_left() <= 0:
                    raise self._too_late()


# ==================================================================================================
# ssh.access
#
# Log in to the hosts of an account, and keep their host keys.
# ==================================================================================================


# The arguments of a login, for methods that do more than log in.
LOGIN_DEFAULTS: dict[str, Any] = {
    "password": None,
    "key_path": None,
    "passphrase": None,
    "wait": 120.0,  # seconds for an sshd to respond
    "host_key": "pin",
    "use_ssh_config": False,
}


def check_login_options(given: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of a login, and return all of them."""
    for name in given:
        if name not in LOGIN_DEFAULTS:
            raise TypeError(
                f"there is no argument {name!r}; the arguments for the login are "
                f"{', '.join(sorted(LOGIN_DEFAULTS))}"
            )
    options = {**LOGIN_DEFAULTS, **given}
    check_number("wait", options["wait"], infinite=True, unit="seconds")
    for name in ("password", "passphrase"):
        if options[name] is not None:
            check_text(name, options[name], secret=True)
    if options["key_path"] is not None:
        options["key_path"] = whole_key_path(options["key_path"])
    check_bool("use_ssh_config", options["use_ssh_config"])
    options["host_key"] = check_host_key(options["host_key"])
    return options


def check_connection(ssh: Any) -> Any:
    """Check a connection that the caller gave."""
    if not callable(getattr(ssh, "get_transport", None)):
        raise TypeError(f"ssh must be a paramiko.SSHClient, not {short_repr(ssh)}")
    return ssh


def _id_of(order: Any) -> int | None:
    """Return the id of an order; None if it is a record without one."""
    return Order(order).id if isinstance(order, Mapping) else check_order_id("order", order)


class SSHAccess:
    """Log in to the hosts of an account.

    Parameters:
        orders: the orders, for the passwords that were sent with them.
        folder: the state folder, or None if none is used.
        history: records hosts without sshd, and those that refuse the saved login.
    """

    def __init__(self, orders: AccountOrders, folder: Path | None, history: HostHistory) -> None:
        self._orders = orders
        self._folder = folder
        self._history = history
        self._by_account: dict[str, HostKeys] = {}

    @property
    def _host_keys(self) -> HostKeys:
        """Return the host keys of the account; the client's API key may change."""
        account = self._orders.account
        return self._by_account.setdefault(account, HostKeys(self._folder, account))

    def _with_address(self, order: Any) -> Order:
        """Return an order with its address. If the argument has no address, read the order.

        Raises:
            OrderEndedError, OrderNotFoundError: the order has ended, or does not exist.
        """
        if not isinstance(order, Mapping):
            return self._orders.running(check_order_id("order", order))
        record = order if isinstance(order, Order) else Order(order)
        if record.id is None:
            return record
        if record.has_ended:
            raise ended_error(record.id, record.status or "", record)
        self._orders.check_not_ended(record.id)
        if record.ssh_command:
            return record
        try:
            return self._orders.running(record.id)
        except OrderEndedError:
            raise
        except CloreError as error:
            logger.debug("order %d can't be read: %s", record.id, error)
            return record

    def forget_host_key(self, order: Any) -> bool:
        """Forget the host key of an order; see ``CloreClient.forget_host_key``."""
        alias = self._host_keys.alias(_id_of(order), parse_ssh_command(order))
        return self._host_keys.forget(alias)

    def openssh(self, order: Any, key_path: Any) -> OpenSSH:
        """Return a writer of command lines and configuration entries for OpenSSH."""
        order = self._with_address(order)
        return OpenSSH(order, self._host_keys, key_path or self._key_of(order)[0])

    def _key_of(self, order: Order) -> tuple[str | None, Any]:
        """Return the private key of the public key that was sent with an order.

        Returns:
            Its file, or a key of the SSH agent; None for both if there is none.
        """
        fingerprint = self._orders.login_of(order).get("key_fingerprint")
        return (None, None) if fingerprint is None else private_key_of(fingerprint)

    def login(self, order: Any, given: dict[str, Any], timeout: float = 30.0) -> Login:
        """Check the arguments of a login, and return it.

        Parameters:
            given: the arguments, without those that have their defaults.
            timeout: seconds for each attempt.
        """
        check_number("timeout", timeout, above=True, unit="seconds")
        options = check_login_options(given)
        order = self._with_address(order)
        agent_key, own = None, bool(options["password"] or options["key_path"])
        if not own:
            options["password"] = Secret.of(
                order.get("ssh_password") or self._orders.login_of(order).get("ssh_password")
            )
            if not options["password"]:
                options["key_path"], agent_key = self._key_of(order)
        address = plain_address(order)
        keys = KeyCheck(self._host_keys, order.id, address, options["host_key"])

        def on_failure(error: BaseException) -> None:
            self._raise_if_ended(order.id, error)
            if not own:  # else it may be the user's mistake
                outcome = LOGIN_OUTCOMES.get(getattr(error, "reason", ""))
                self._history.record(order.server_id, outcome)

        return Login(address, keys, {**options, "timeout": timeout}, agent_key, on_failure)

    def _raise_if_ended(self, order_id: int | None, error: BaseException) -> None:
        """Raise a better error if a connection failed because the order has ended."""
        if order_id is not None:
            self._orders.raise_if_ended(order_id, error)

    def connected(
        self, order: Any, ssh: paramiko.SSHClient | None, login: dict[str, Any],
        timeout: float = 30.0, size: int = 1, eager: bool = True, deadline: float | None = None,
    ) -> ConnectionPool:  # fmt: skip
        """Return the caller's connection, or logins to make when the pool is entered.

        Parameters:
            deadline: seconds that limit the login too.
        """
        options = check_login_options(login)
        if ssh is not None:
            on_failure = functools.partial(self._raise_if_ended, _id_of(order))
            return ConnectionPool(None, on_failure, check_connection(ssh))
        if deadline is not None:
            timeout, options["wait"] = min(timeout, deadline), min(options["wait"], deadline)
        checked = self.login(order, options, timeout)
        return ConnectionPool(checked, checked.on_failure, None, size, eager)

    def jobs(self, order: Any, ssh: paramiko.SSHClient | None, login: dict[str, Any]) -> HostJobs:
        """Return the jobs of the host of an order."""
        options = check_login_options(login)
        if ssh is None:
            order = self._with_address(order)  # once, and not for each connection
            self.login(order, login)  # check the arguments now

        def connect(seconds: float) -> ConnectionPool:
            limited = {**options, "wait": min(seconds, options["wait"])}
            return self.connected(order, ssh, limited, deadline=max(seconds, LEAST_PATIENCE))

        return HostJobs(connect, reconnects=ssh is None)


# ==================================================================================================
# ssh.command
#
# Run a command over SSH until its deadline, and end it on the host if it must stop.
# ==================================================================================================


MAX_OUTPUT = 64 * 1024 * 1024  # bytes
READ_CHUNK = 4 << 20  # bytes; more than a window, so that one read empties a buffer
START_TIMEOUT = 30.0  # seconds for a host to start a command
SESSION_PATIENCE = 1.0  # seconds for a host with few sessions to end the previous one
POLL = 0.25  # seconds between two checks for changes that set no event
QUIET = 0.5  # seconds without output before an ended command's output may be complete
OVERTIME = 5.0  # seconds after the deadline for the output of a command that ended in time
LATE_OUTPUT = 4 << 20  # bytes beyond a window that an ended command may have left in pipes
GRACE = 1.0  # seconds between SIGTERM and SIGKILL
PATIENCE = 2.0  # seconds for a call that should be short
KILL_POLL = 0.1  # seconds between two checks of whether a process has ended
BROKEN = "the connection broke before the command had ended: it may still run on the host"

# Run on a second channel: sshd before 9.8 rejects the protocol's own signals for root.
# dropbear gives a command no process group of its own: there, its descendants are killed.
# Before a group's number, dash needs "--", and busybox accepts none.
_KILL_GROUP = (
    "s() {{ kill -s $1 -- $2 2>/dev/null || kill -s $1 $2 2>/dev/null; }}; "
    "d() {{ for c in $(cat /proc/$1/task/*/children 2>/dev/null); do d $c; done; echo $1; }}; "
    "t=-{pid}; s 0 $t || t=$(d {pid}); "
    "k() {{ r=1; for p in $t; do s $1 $p && r=0; done; return $r; }}; "
    "k TERM; n=0; while [ $n -lt {polls} ] && k 0; do sleep {pause}; n=$((n+1)); done; k KILL"
)


class Command:
    """Check the arguments of a command, and run it.

    Parameters:
        command: a line for the host's shell, or a list of arguments, which is quoted.
        check: raise CommandError unless the exit code is 0.
        timeout: seconds that the command may take; None for no limit.
        input: the standard input; text is sent as UTF-8.
        env: environment variables. They are visible in the host's process list. Where the login
            shell is csh, the command then runs without the aliases of its start-up files.
        on_output: called with each :class:`OutputLine` when it arrives. The order of lines is kept
            within a stream, not between the two. A very long line comes in pieces.
        max_output: bytes of both streams to keep; the rest goes to ``on_output`` only, and is
            counted in the result's ``dropped``.
    """

    def __init__(
        self, command: str | Sequence[str], *, check: bool = True, timeout: float | None = None,
        input: str | bytes | None = None, env: Mapping[str, str] | None = None,
        on_output: Callable[[OutputLine], object] | None = None, max_output: int = MAX_OUTPUT,
    ) -> None:  # fmt: skip
        self.line, self.encoded_lines = command_lines(command, env)
        self.input = input_bytes(input)
        limit = math.inf if timeout is None else timeout
        self.timeout = check_number("timeout", limit, above=True, infinite=True, unit="seconds")
        check_callback("on_output", on_output, 1)
        self.on_output = on_output
        self.max_output = check_count("max_output", max_output)
        self.check = check_bool("check", check)

    def run(self, ssh: paramiko.SSHClient) -> CommandResult:
        """Run the command and wait for its end.

        It does not wait for a process that the command leaves in the background, unless that keeps
        writing to the command's output. A timeout, Ctrl-C and any other exception end the command's
        process group on the host: with SIGTERM, and a little later with SIGKILL.

        Raises:
            CommandError: the exit code was not 0, or a signal ended the command; with ``check``.
            CommandTimeoutError: the command did not end in time.
            SSHError: the host did not run the command; or the connection broke, and the command
                may still run.
        """
        begin = time.monotonic()
        output = CommandOutput(self.max_output, self.on_output)
        with Watchdog() as watchdog:
            code = RunningCommand(ssh.get_transport(), watchdog, self, output).run()
        duration = time.monotonic() - begin
        stdout, stderr = output.text(STDOUT), output.text(STDERR)
        if code is None:
            raise CommandTimeoutError(self.line, self.timeout, stdout, stderr)
        result = CommandResult(self.line, code, stdout, stderr, duration, output.dropped)
        logger.debug("%r", result)
        if self.check and code != 0:
            raise CommandError(result)
        return result


class RunningCommand:
    """Run a command on a channel."""

    def __init__(
        self, transport: Any, watchdog: Watchdog, command: Command, output: CommandOutput
    ) -> None:
        self._transport = transport
        self._watchdog = watchdog
        self._command = command
        self._output = output
        self._deadline = time.monotonic() + command.timeout
        self._pid_line = PidLine(waits=bool(command.input))
        self._channel: Any = None
        self._feeder: threading.Thread | None = None
        self._wake = threading.Event()  # set when one of the streams has data or has ended
        self._exit_signal = False
        self._stopped_early = False

    def run(self) -> int | None:
        """Return the exit code, -1 after a signal, or None if the command did not end in time."""
        try:
            in_time = self._in_time()
        finally:
            self._end()
        self._output.add(STDERR, self._pid_line.rest())
        self._output.finish()
        return self._exit_code() if in_time else None

    def _in_time(self) -> bool:
        """Start the command and read its output; return False if time ran out."""
        given = self._command.input
        try:
            self._start()
            if given:
                self._wait_for_shell()
                given = b"\n" + given  # the first line starts the command
        except SSHError:
            if self._time_left():
                raise
            return False
        self._feeder = start_thread("stdin", _feed, self._channel, given)
        # on_output may take longer than the timeout; the command must stop anyway.
        with self._watchdog.limit(self._time_left() + GRACE + PATIENCE, self._stop_early):
            return self._wait() and not self._stopped_early

    def _time_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _limited(self, seconds: float = PATIENCE) -> contextlib.AbstractContextManager[Any]:
        """Close the connection if a block takes too long: sending itself has no timeout."""
        return self._watchdog.limit(seconds, lambda: self._transport.close())

    # --- the start ---

    def _start(self) -> None:
        """Open a channel, and wait until the host confirms that it has started the command."""
        seconds = min(START_TIMEOUT, self._time_left())
        start_by = time.monotonic() + seconds
        with self._limited(seconds + PATIENCE):
            self._channel = with_patience(
                min(seconds, SESSION_PATIENCE), lambda: open_session(self._transport, seconds)
            )
            self._channel.settimeout(None)  # a command may read its input late
            # paramiko clears an event when one stream is empty, though the other may have data.
            event = SimpleNamespace(set=self._wake.set, clear=lambda: None)
            self._channel.in_buffer.set_event(event)
            self._channel.in_stderr_buffer.set_event(event)
            self._watch_for_exit_signal()
            lines = self._pid_line.before(self._command.encoded_lines)
            channel_request(self._channel, "exec", lines)
            open_next_session(self._transport)
            if not self._channel.event.wait(max(0.0, start_by - time.monotonic())):
                raise SSHError(f"the host did not start the command within {START_TIMEOUT:g}s")

    def _wait_for_shell(self) -> None:
        """Wait until the shell has run its start-up files, which could read the input."""

        def ready() -> bool:
            return self._pid_line.pid is not None or self._complete()

        self._read_until(ready, min(START_TIMEOUT, self._time_left()))
        if not ready():
            raise SSHError(
                f"the host did not start the command within {START_TIMEOUT:g}s: a start-up "
                "file there, such as ~/.bashrc, may wait, or read the command's input"
            )

    def _watch_for_exit_signal(self) -> None:
        """Notice that a signal ended the command, which paramiko only writes to its log."""
        log = self._channel.logger.log

        def watched(level: int, message: str, *args: object) -> None:
            if 'request "exit-signal"' in message:
                self._exit_signal = True
                self._wake.set()
            log(level, message, *args)

        self._channel.logger = SimpleNamespace(log=watched)

    # --- output ---

    def _wait(self) -> bool:
        """Read output until the command has ended; return False if time ran out first."""
        while not self._ended():
            if not self._time_left():
                return False
            self._read_or_wait(self._time_left())
            self._output.report()
        self._read_late_output()
        return True

    def _read_late_output(self) -> None:
        """Read the output that has not arrived when the command ends.

        The stream may stay open, because a process in the background can hold it.
        """
        give_up_at = time.monotonic() + self._time_left() + OVERTIME
        silent_since = time.monotonic()
        expected = self._channel.in_window_size + LATE_OUTPUT
        while not self._complete() and expected > 0 and time.monotonic() < give_up_at:
            size = self._read_or_wait(POLL)
            self._output.report()
            expected -= size
            if size:
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since >= QUIET:
                if self._all_arrived():
                    return
                silent_since = time.monotonic()
        self._read()

    def _ended(self) -> bool:
        return self._exit_signal or bool(self._channel.exit_status_ready())

    def _complete(self) -> bool:
        return self._channel.closed or (self._channel.eof_received and self._ended())

    def _read_or_wait(self, seconds: float) -> int:
        """Read what has arrived and return its size; if that is 0, wait for more."""
        size = self._read()
        if not size:
            self._wake.wait(min(seconds, POLL))
            self._wake.clear()
        return size

    def _read(self) -> int:
        """Read what has arrived, and return its size."""
        channel, size = self._channel, 0
        for stream, ready, receive in (
            (STDOUT, channel.recv_ready, channel.recv),
            (STDERR, channel.recv_stderr_ready, channel.recv_stderr),
        ):
            if not ready():
                continue
            try:
                # This may hang, because paramiko also sends: it asks the host for more data.
                with self._limited(self._time_left() + GRACE + PATIENCE):
                    data = receive(READ_CHUNK)
            except connection_errors() as error:
                raise SSHError(f"{BROKEN} ({reason(error)})") from error
            size += len(data)
            self._output.add(stream, self._pid_line.remove_from(data) if stream == STDERR else data)
        return size

    def _all_arrived(self) -> bool:
        """Check that all output has arrived, and is not only delayed by a slow network.

        The host sends in order: output that was ready before its first reply arrives before its
        second reply.
        """
        channel = self._channel
        for _ in range(3):  # the first session may be one that was opened in advance
            try:
                with self._limited(2 * PATIENCE):
                    open_session(self._transport, PATIENCE).close()
            except NoChannelError:
                pass  # a refusal is a reply too
            except (SSHError, OSError, EOFError):
                return False
            if channel.recv_ready() or channel.recv_stderr_ready() or channel.closed:
                return False
        return True

    # --- the end ---

    def _end(self) -> None:
        """End the command's process group if it still runs, and close the channel."""
        if self._channel is None:
            return
        self._deadline = min(self._deadline, time.monotonic())
        try:
            if not self._ended():
                self._read_until(lambda: self._pid_line.pid is not None, GRACE)
                self._kill_group()
                self._read_until(self._complete, POLL)
        except SSHError as error:
            logger.debug("a command may still run: %s", error)
        finally:
            self._close()
            if self._feeder is not None:
                self._feeder.join(PATIENCE)

    def _stop_early(self) -> None:
        """End a command whose time has run out while ``on_output`` runs in another thread."""
        if not self._ended():
            self._stopped_early = True
            self._kill_group()
            self._close()

    def _read_until(self, happened: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened() and not self._channel.closed and time.monotonic() < deadline:
            self._read_or_wait(deadline - time.monotonic())
        self._read()

    def _kill_group(self) -> None:
        """Kill the command's process group with a script on a second channel."""
        pid = self._pid_line.pid
        if pid is None:
            return
        script = _KILL_GROUP.format(pid=pid, polls=math.ceil(GRACE / KILL_POLL), pause=KILL_POLL)
        try:
            with self._limited(GRACE + 3 * PATIENCE):
                channel = open_session(self._transport, PATIENCE)
                channel_request(channel, "exec", f"sh -c {shlex.quote(script)}")
                channel.status_event.wait(GRACE + PATIENCE)
                channel.close()
        except (SSHError, OSError, EOFError) as error:
            logger.debug("process group %d may still run: %s", pid, error)

    def _close(self) -> None:
        if self._channel.closed:
            return
        with self._limited(), contextlib.suppress(SSHError, *connection_errors()):
            if not self._ended():  # the host refused a second channel, or has sent no pid
                channel_request(self._channel, "signal", "KILL", answered=False)
            self._channel.close()

    def _exit_code(self) -> int:
        code: int = self._channel.exit_status
        known = code >= 0 or self._exit_signal
        if not self._transport.is_active() and not (known and self._channel.eof_received):
            raise SSHError(BROKEN)
        if not known:
            raise SSHError(
                "the host did not start the command, or closed the channel without an exit code"
            )
        if self._pid_line.pid is None:
            said = self._output.text(STDERR).strip() or self._output.text(STDOUT).strip()
            raise SSHError(
                "the host did not run the command: it runs another one instead, or its shell "
                f"ended first (exit code {code}); it says: {printable(said, 300) or 'nothing'}"
            )
        return code if code >= 0 else -1


def _feed(channel: Any, data: bytes) -> None:
    """Send the input of a command until the command takes no more."""
    try:
        channel.sendall(memoryview(data))  # with bytes, paramiko would copy the rest each time
        channel.shutdown_write()
    except Exception as error:
        # The command may end without reading all of its input; that is not an error.
        logger.debug("the input of a command was not sent completely: %s", reason(error))


# ==================================================================================================
# ssh.scp
#
# Guard the package scp against hostile hosts, and against calls that never return.
# ==================================================================================================


SCP_BUFFER = 131072  # bytes of one read or write
MAX_SCP_LINE = 8192  # bytes; the longest valid line is an error with a path in it
MAX_FOLDER_DEPTH = 64
SCP_BASE: Any = object  # guarded_scp() adds scp.SCPClient, which is imported late
UNNAMED = (b"", b".", b"..")  # how scp names the folders /, . and ..
NOT_IN_A_NAME = r"[\0-\x1f\x7f-\x9f/" + (r'\\:*?"<>|]' if os.name == "nt" else "]")


def guarded_scp(
    ssh: Any, *, socket_timeout: float = 30.0, max_bytes: int | None = None,
    progress: Callable[..., object] | None = None,
) -> Any:  # fmt: skip
    """Return a ``scp.SCPClient`` that is safe to use with a hostile host, and owns ``ssh``.

    It checks each record of the host before scp acts on it, limits each wait, and raises
    :class:`TransferError`. A transfer that fails may leave a partial file inside the target, even
    in place of an earlier one; nothing outside the target is touched.

    Parameters:
        socket_timeout: seconds of silence.
        max_bytes: the most bytes that one ``get()`` may receive; None for no limit.
        progress: called with (name, size, done), as by ``scp.SCPClient``.
    """
    try:
        scp = importlib.import_module("scp")
    except ImportError as error:
        raise ImportError("scp() needs scp: pip install paramiko scp") from error
    limit = math.inf if max_bytes is None else check_number("max_bytes", max_bytes, unit="bytes")
    check_number("socket_timeout", socket_timeout, above=True, maximum=1e6, unit="seconds")
    transport = ssh.get_transport()
    if transport is None or not transport.is_active():
        raise SSHError("scp() needs an open connection, and this one is closed: connect again")
    client_class: Any = type("GuardedSCPClient", (ScpGuard, scp.SCPClient), {})
    try:
        return client_class(ssh, transport, socket_timeout, progress, limit)
    except OSError as error:
        raise SSHError(f"the connection broke: {reason(error)}") from error


class CallbackError(Exception):
    """Carry an error of the caller's progress function through scp, as its cause."""


class ScpChannel(LimitedChannel):
    """Return one line, one status byte or bytes of one file with each ``recv``.

    scp treats the bytes of one ``recv`` as one record, but the host decides where packets end.
    """

    closed = False  # with True, scp stops before it has read all data
    content_left = 0  # bytes that are left of the current file

    def recv(self, size: int) -> bytes:
        if self.content_left:
            data = super().recv(min(size, self.content_left))
            self.content_left -= len(data)
            return data or self._fail()
        line = super().recv(1)
        if line not in b"\0\1\2CDTE":
            line += super().recv(200) if self.recv_ready() else b""
            raise SSHError(f"the host sent {line!r}: check what its start-up files print")
        while line not in (b"", b"\0") and not line.endswith(b"\n"):
            if len(line) > MAX_SCP_LINE:
                raise SSHError("the host sent a line without an end")
            line += super().recv(1) or self._fail()
        return b"\0\n" if line == b"\0" else line  # scp rejects this where it expects a line

    def finish(self) -> None:
        """Check that scp on the host succeeds."""
        self.shutdown_write()
        if self.recv_exit_status() > 0:
            self._fail()

    def _fail(self) -> bytes:
        """Raise an error that says how scp on the host ended."""
        status = self.recv_exit_status()
        said = self.recv_stderr(MAX_SCP_LINE) if self.recv_stderr_ready() else b""
        how = "scp on the host ended" if self._transport.is_active() else "the connection broke"
        raise SSHError(f"{how} (exit code {status}) {said.decode('utf-8', 'replace')}")


class ScpGuard(SCP_BASE):  # type: ignore[misc]
    """Check what a host asks ``scp.SCPClient`` to do before it does it."""

    channel: Any
    _recv_dir: bytes
    _rename: bool
    _current: tuple[str, int, int | None]  # name, bytes done, bytes in total

    def __init__(self, ssh: Any, transport: Any, timeout: float, progress: Any, limit: float):
        super().__init__(transport, SCP_BUFFER, timeout, self._report)
        self._ssh = ssh
        self._max_bytes = limit
        self._user_progress = progress or (lambda *_: None)

    def _report(self, name: bytes, size: int, done: int) -> None:
        self._current = (self._current[0], done, size)
        try:
            self._user_progress(name, size, done)
        except Exception as error:
            raise CallbackError from error

    def __enter__(self) -> Any:
        return self

    def close(self) -> None:
        """Close the connection."""
        if self.channel is not None:  # scp calls this at the end of each transfer
            self.channel.finish()
        else:
            self._ssh.close()

    def _open(self) -> ScpChannel:
        return ScpChannel(self.transport, self.socket_timeout, self._watchdog)

    @contextlib.contextmanager
    def _transfer(self, verb: str, name: bytes) -> Iterator[None]:
        """Run one transfer with time limits, and raise a TransferError for what fails."""
        scp_error: type[Exception] = importlib.import_module("scp").SCPException
        failures: tuple[type[Exception], ...] = (SSHError, scp_error, *connection_errors())
        self._current = (os.fsdecode(name), 0, None)
        self.scp_command = b"scp"
        try:
            with Watchdog() as self._watchdog:
                try:
                    yield
                finally:
                    channel, self.channel = self.channel, None
                    if channel is not None:
                        channel.close()
        except CallbackError as error:
            own = error.__cause__ or error
            raise own from own.__cause__
        except failures as error:
            current, done, total = self._current
            shown = printable(current, 300)
            bytes_done = "" if total is None else f" ({done} of {total} bytes)"
            says = "the host says: " if isinstance(error, scp_error) else ""
            text = f"{shown} was not {verb}{bytes_done}: {says}{printable(str(error).strip(), 500)}"
            raise TransferError(text, name=shown, done=done, total=total) from error

    # --- receiving ---

    def get(self, remote_path: Any, local_path: Any = "", recursive: bool = False,
            preserve_times: bool = False) -> None:  # fmt: skip
        """Receive files, and with ``recursive`` folders, as ``scp.SCPClient.get`` does."""
        paths = [_remote_path(path) for path in _path_list(remote_path)]
        target = os.path.realpath(os.fsencode(local_path))
        is_folder = os.path.isdir(target)
        if len(paths) > 1 and not is_folder:
            raise ValueError(f"local_path must be a folder for several: {short_repr(local_path)}")
        self._wildcards = self.sanitize(b"*") == b"*"
        self._asked = [_asked_name(path, self._wildcards) for path in paths]
        self._missing = list(self._asked)
        self._root = target if is_folder else os.path.dirname(target)
        self._recursive, self._keeps_modes = recursive, preserve_times
        self._bytes_left = self._max_bytes
        self._folders: list[bytes] = []  # those around the current one
        self._utime = None  # an earlier transfer may have left these
        self._dirtimes: dict[bytes, Any] = {}
        with self._transfer("received", paths[0]):
            super().get(paths, target, recursive, preserve_times)
            if self._folders:
                raise SSHError("the host did not end a folder")
            if self._missing:
                raise SSHError(f"the host did not send {self._missing[0]!r}")

    def _recv_file(self, record: bytes) -> None:
        folder = self._recv_dir
        mode, here, size = self._enter(record, stat.S_ISREG)
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise SSHError(f"the host sends more than max_bytes={self._max_bytes}")
        if not self._keeps_modes:
            umask = os.umask(0o077)
            os.umask(umask)
            mode = mode & ~umask if here is None else here & 0o777
        self.channel.content_left = size
        super()._recv_file(b"%04o %d -" % (mode, size))
        self._recv_dir = folder

    def _recv_pushd(self, record: bytes) -> None:
        if not self._recursive:
            raise SSHError("the host sent a folder, and recursive is not set")
        if len(self._folders) >= MAX_FOLDER_DEPTH:
            raise SSHError(f"the host sent more than {MAX_FOLDER_DEPTH} nested folders")
        folder = self._recv_dir
        mode, here, _ = self._enter(record, stat.S_ISDIR)
        self._folders.append(folder)
        super()._recv_pushd(b"%04o 0 -" % (mode | 0o700 if here is None else here & 0o777))

    def _recv_popd(self, *_: bytes) -> None:
        if not self._folders or self._utime is not None:
            raise SSHError("the host ended a folder that it did not begin")
        self._recv_dir = self._folders.pop()

    def _set_time(self, record: bytes) -> None:
        # os.utime takes no time that has many more digits.
        valid = re.fullmatch(rb"\d{1,11} \d{1,9} \d{1,11} \d{1,9}", record)
        if not valid or self._utime is not None:
            raise SSHError("the host sent a time that is not valid")
        super()._set_time(record)

    def _enter(self, record: bytes, is_kind: Callable[[int], bool]) -> tuple[int, int | None, int]:
        """Check the record of a file or folder, and make its path the one that scp writes to.

        scp itself would strip the name and check it with ``assert``.

        Returns:
            The permissions, the mode of what exists at the path, and the size.
        """
        found = re.fullmatch(rb"([0-7]{3,7}) (\d{1,18}) (.*)", record)
        if found is None:
            raise SSHError(f"the host sent {record[:200]!r}, which is not an scp record")
        name = found[3] if self._folders else self._check_asked(found[3])
        unnamed = self._folders and name in UNNAMED
        if unnamed or re.search(NOT_IN_A_NAME, os.fsdecode(name)):
            raise SSHError(f"the host sent {name[:200]!r}, which is not a plain file name")
        if not self._rename:
            self._recv_dir, self._rename = os.path.join(self._recv_dir, name), True
        shown = os.fsdecode(os.path.relpath(self._recv_dir, self._root))
        self._current = (shown, 0, int(found[2]))
        here = None
        with contextlib.suppress(FileNotFoundError):
            here = os.lstat(self._recv_dir).st_mode
        if here is not None and not is_kind(here):
            raise SSHError(f"{shown!r} is a symlink or something else here: use another local_path")
        return int(found[1], 8) & 0o777, here, int(found[2])

    def _check_asked(self, name: bytes) -> bytes:
        """Check a name at the top level; return it, or "." for a folder without a name."""
        name = b"." if name in UNNAMED else name
        for asked in self._asked if self._wildcards else self._missing:
            hidden = name.startswith(b".") and not asked.startswith(b".")
            if not hidden and fnmatch.fnmatchcase(os.fsdecode(name), os.fsdecode(asked)):
                if asked in self._missing:
                    self._missing.remove(asked)
                return name
        raise SSHError(f"the host sent {name[:200]!r}, which was not asked for")

    # --- sending ---

    def put(self, files: Any, remote_path: Any = b".", recursive: bool = False,
            preserve_times: bool = False) -> None:  # fmt: skip
        """Send files, and with ``recursive`` folders, as ``scp.SCPClient.put`` does."""
        paths = [os.fsencode(path) for path in _path_list(files)]
        with self._transfer("sent", paths[0]):
            self.scp_command = b"scp -p" if preserve_times else b"scp"
            super().put(paths, _remote_path(remote_path), recursive, preserve_times)

    def putfo(
        self, fl: IO[Any], remote_path: Any, mode: Any = "0644", size: int | None = None
    ) -> None:
        """Send what a file-like object holds, as ``scp.SCPClient.putfo`` does."""
        remote = _remote_path(remote_path)
        with self._transfer("sent", os.path.basename(remote)):
            super().putfo(fl, remote, os.fsdecode(mode), size)

    def _send_files(self, files: list[bytes]) -> None:
        for path in files:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
                raise SSHError(f"{os.fsdecode(path)} is not a file; a folder needs recursive=True")
        super()._send_files(files)

    def _send_file(self, fl: Any, name: bytes, mode: str, size: int) -> None:
        self._current = (os.fsdecode(name), 0, size)
        super()._send_file(ExactFile(fl, size), name, mode, size)


class ExactFile:
    """Read exactly the bytes that scp announced, though the file may grow or shrink."""

    def __init__(self, file: Any, size: int) -> None:
        self._file = file
        self._size = size
        self._done = 0

    def tell(self) -> int:
        return self._done

    def read(self, most: int) -> bytes:
        data = bytes(self._file.read(min(most, self._size - self._done)))
        if not data:
            raise SSHError(f"the file ended before {self._size} bytes: it has changed")
        self._done += len(data)
        return data


def _path_list(paths: Any) -> list[Any]:
    found = [paths] if isinstance(paths, (str, bytes, os.PathLike)) else list(paths)
    if not found:
        raise ValueError("no path was given")
    return found


def _remote_path(path: Any) -> bytes:
    """Return a path as bytes that the host's scp does not take for an option."""
    raw = os.fsencode(path) or b"."
    if b"\0" in raw or b"\n" in raw:
        raise ValueError(f"remote_path must hold no NUL or line end: {short_repr(path)}")
    return b"./" + raw if raw.startswith(b"-") else raw


def _asked_name(path: bytes, wildcards: bool) -> bytes:
    """Return a pattern for the name by which the host sends a path."""
    path = path.rstrip(b"/")
    name = path.rpartition(b"/")[2]
    if name in UNNAMED:
        return b"."
    if path.startswith(b"~") and name == path:
        return b"*"  # a home directory, whose name only the host knows
    import glob

    return name if wildcards else glob.escape(name)


# ==================================================================================================
# ssh.shell
#
# Connect this terminal to a shell on a host.
# ==================================================================================================


SHELL_TIMEOUT = 30.0  # seconds for a host to open a terminal
CLOSE_TIMEOUT = 2.0  # seconds for the host to send the exit code, and to close the terminal
SIZE_CHECK = 0.25  # seconds between two checks of the size of the window
SHELL_PIECE = 65536  # bytes


def check_terminal() -> tuple[int, int]:
    """Check that this process has a terminal, and return its input and output."""
    try:
        import termios  # noqa: F401
    except ImportError:
        raise SSHError(
            "shell() needs a POSIX terminal: ssh_command() returns a line to log in with"
        ) from None
    try:
        ends = sys.stdin.fileno(), sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # None, closed, or replaced by a notebook
        ends = -1, -1
    if not all(end >= 0 and os.isatty(end) for end in ends):
        raise SSHError(
            "stdin or stdout is not a terminal: use run() or start() for commands, or the line of "
            "ssh_command() in a terminal"
        )
    return ends


def run_shell(ssh: paramiko.SSHClient) -> int:
    """Run the login shell of a host in this terminal; see ``CloreClient.shell``."""
    source, target = check_terminal()
    with Watchdog() as watchdog:
        channel = LimitedChannel(ssh.get_transport(), SHELL_TIMEOUT, watchdog)
        with _raw_mode(source):
            return _Terminal(source, target).run(channel)


class _Terminal:
    """Pass bytes between this terminal and a shell on a host."""

    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._target = target
        self._size = os.get_terminal_size(target)
        self._reads = True  # until the end of the input

    def run(self, channel: LimitedChannel) -> int:
        """Run a shell on a channel, and return its exit code."""
        try:
            self._start(channel)
            while not (channel.closed or (channel.eof_received and not channel.recv_ready())):
                self._follow_size(channel)
                self._pass_on(channel)
            return self._exit_code(channel)
        except connection_errors() as error:
            raise SSHError(f"the connection broke, and the shell ended ({reason(error)})") from (
                error
            )
        finally:
            channel.timeout = CLOSE_TIMEOUT
            channel.close()

    def _start(self, channel: LimitedChannel) -> None:
        kind = os.environ.get("TERM", "xterm-256color")
        try:
            channel.limited("opened no terminal", channel.get_pty, kind, *self._size)
            channel.limited("opened no terminal", channel.invoke_shell)
        except connection_errors() as error:
            if not channel.get_transport().is_active():
                raise
            raise SSHError(f"the host did not open a terminal ({reason(error)}): use run()") from (
                error
            )

    def _follow_size(self, channel: LimitedChannel) -> None:
        # A comparison is simpler than SIGWINCH, which only the main thread could receive.
        size = os.get_terminal_size(self._target)
        if size != self._size:
            self._size = size
            channel.limited("accepted no data", channel.resize_pty, *size)

    def _pass_on(self, channel: LimitedChannel) -> None:
        """Pass on the data of both directions; return soon if there is none."""
        # Input is read only when it can be sent: a send that waits would hold up the output.
        watched: list[Any] = [channel]
        if self._reads and channel.send_ready():
            watched.append(self._source)
        ready, _, _ = select.select(watched, [], [], SIZE_CHECK)
        if channel.recv_ready():
            _write_all(self._target, channel.recv(SHELL_PIECE))
        if self._source in ready:
            if data := os.read(self._source, 1024):
                channel.sendall(data)
            else:
                self._reads = False
                channel.shutdown_write()

    def _exit_code(self, channel: LimitedChannel) -> int:
        if channel.status_event.wait(CLOSE_TIMEOUT) and channel.exit_status >= 0:
            return int(channel.exit_status)
        if not channel.get_transport().is_active():
            raise SSHError("the connection broke, and the shell ended")
        return -1


def _write_all(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:  # another program left the terminal in that mode
            select.select([], [target], [])


@contextlib.contextmanager
def _raw_mode(source: int) -> Iterator[None]:
    """Send every key to the host during a block, and restore the terminal however it ends."""
    import termios
    import tty

    before = termios.tcgetattr(source)
    former: dict[int, Any] = {}

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # so that ``finally`` runs

    if threading.current_thread() is threading.main_thread():
        for fatal in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(fatal) is signal.SIG_DFL:
                former[fatal] = signal.signal(fatal, leave)
    try:
        tty.setraw(source, termios.TCSADRAIN)  # keeps what was typed ahead
        yield
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
        for number, handler in former.items():
            signal.signal(number, handler)


# ==================================================================================================
# ssh.transfer.local_part
#
# Keep the temporary files of a download, and move them to the target when it is complete.
# ==================================================================================================


PART = ".clore-part-"
MAX_HOPS = 40  # symlinks that lead to each other
ZEROS = bytes(TRANSFER_PIECE)
Spans = list[tuple[int, int]]  # start and length
# Returns those of the files whose content differs from that of their targets.
Different = Callable[[list[FileEntry]], list[FileEntry]]


class LocalPart:
    """Keep the temporary file or directory of a download, and a record of the received data.

    Attributes:
        target: the final path.
        done: the ranges that an earlier download received, by record key.
    """

    def __init__(self, target: str, remote: bytes, options: Any) -> None:
        self.target = target
        self._options = options
        whole = os.path.abspath(target)
        token = part_token(options.resume, remote, whole)
        self._part = Path(os.path.dirname(whole)) / f"{PART}{token}"
        self._record: Any = None
        self._record_path = Path(f"{self._part}.done")
        self._lock = threading.Lock()
        self._size = 0
        self.done: dict[str, Spans] = {}

    def __enter__(self) -> LocalPart:
        if self._options.resume:
            self._open_record()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None and not self._options.resume:
            self._remove()
        if self._record is not None:
            if not os.path.lexists(self._part):
                self._record_path.unlink(missing_ok=True)  # nothing is left to resume
            self._record.close()

    # --- the record ---

    def _open_record(self) -> None:
        os.makedirs(self._part.parent, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(self._record_path, flags, 0o600)
        self._record = os.fdopen(handle, "r+", encoding="latin-1")
        # A file without a name was removed by another process that has just finished.
        if not lock_file(handle) or not os.fstat(handle).st_nlink:
            self._record.close()
            self._record = None
            raise SSHError("another process runs the same transfer: wait for its end")
        line = r"^([0-9a-f]{32}) (\d{1,18}) (\d{1,18})\n"
        for key, start, length in re.findall(line, self._record.read(), re.M):
            self.done.setdefault(key, []).append((int(start), int(length)))
        if not os.path.lexists(self._part):
            self.clear()

    def note(self, entry: FileEntry, start: int, end: int) -> int:
        """Record a range, in whole blocks or up to the end of the file; return where it ends."""
        if self._record is None:
            return end
        if end != entry.size:
            end -= end % BLOCK
        if end > start or not entry.size:
            with self._lock:
                self._record.write(f"{record_key(entry.version)} {start} {end - start}\n")
                self._record.flush()
        return end

    def clear(self) -> None:
        """Remove the received data, and its record."""
        self._remove()
        self.done = {}
        if self._record is not None:
            self._record.seek(0)
            self._record.truncate()

    def earlier(self, entry: FileEntry) -> Spans:
        """Return the ranges of a file that an earlier download received, merged."""
        merged: Spans = []
        for start, length in sorted(self.done.get(record_key(entry.version), ())):
            if merged and start <= sum(merged[-1]):
                first = merged[-1][0]
                merged[-1] = (first, max(sum(merged[-1]), start + length) - first)
            else:
                merged.append((start, length))
        return merged

    def missing(self, entry: FileEntry) -> Spans:
        """Return the ranges of a file that are missing; of an empty file, one without bytes."""
        earlier = self.earlier(entry)
        left, at = [], 0
        for start, length in [*earlier, (entry.size, 0)]:
            if start > at:
                left.append((at, start - at))
            at = start + length
        return left if earlier or entry.size else [(0, 0)]

    # --- files ---

    def check_target(self, is_folder: bool) -> None:
        """Find the final path, and check what is there, before anything is created."""
        self._size = 0
        if is_folder:
            self.target = self._options.folder_target
        target = self.target
        above = os.path.dirname(os.path.abspath(target))
        for folder in [above, target] if is_folder else [above]:
            if os.path.lexists(folder) and not os.path.isdir(folder):
                raise NotADirectoryError(f"local is not a directory: {folder!r}")
        if is_folder:
            return
        if os.path.isdir(target):
            raise IsADirectoryError(f"local is a directory: {target!r}")
        if os.path.islink(target):
            if self._options.symlinks != "follow":
                raise FileExistsError(
                    f"local is a symlink: {target!r}; remove it, or pass symlinks='follow'"
                )
            self.target = target = os.path.realpath(target)
        if os.path.lexists(target) and not os.path.isfile(target):
            raise FileExistsError(f"local is neither a file nor a directory: {target!r}")

    def grow(self, size: int) -> None:
        """Add to the expected size, which ``max_bytes`` limits."""
        self._size += size
        most = self._options.max_bytes
        if most is not None and self._size > most:
            raise SSHError(f"it has {self._size} bytes, and max_bytes is {most}")

    def begin(self, tree: RemoteTree) -> None:
        """Create the temporary file or directories; start over if the source has changed."""
        os.makedirs(self._part.parent, exist_ok=True)
        if not set(self.done) <= {record_key(entry.version) for entry in tree.entries}:
            self.clear()
        if not self.done:
            self._remove()
        if not tree.is_folder:
            self.open(tree.root).close()
            return
        for entry in tree.by_name.values():
            if entry.kind == "d":
                self.place(entry).mkdir(mode=0o700, exist_ok=bool(self.done))

    def target_of(self, name: bytes) -> str:
        """Return the final path of an entry."""
        return os.path.join(self.target, checked_name(name)) if name else self.target

    def installed(self, name: bytes) -> FileEntry | None:
        """Return the entry that already exists at the final path of a file, or None."""
        try:
            return local_entry(name, os.lstat(self.target_of(name)))
        except OSError:
            return None

    def place(self, entry: FileEntry) -> Path:
        """Return the temporary path of an entry."""
        return self._part / checked_name(entry.name) if entry.name else self._part

    def open(self, entry: FileEntry) -> Any:
        """Open a temporary file, which no other user may read."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        return os.fdopen(os.open(self.place(entry), flags, 0o600), "r+b", buffering=0)

    def _remove(self) -> None:
        part = self._part
        try:
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a temporary file stays: %s", error)

    # --- the end ---

    def install(self, tree: RemoteTree) -> None:
        """Move everything to the target, with the right modes and times."""
        if not tree.is_folder:
            size = os.stat(self._part).st_size
            if size != tree.root.size:
                raise SSHError(f"{size} bytes have arrived")
        merges = tree.is_folder and os.path.lexists(self.target)
        # When merging, directories stay writable, so that files can be moved out of them.
        for entry in reversed(tree.by_name.values()):
            if entry.kind == "f" or (entry.kind == "d" and not merges):
                self._set_mode(entry)
        if merges:
            self._merge(tree.entries)
        else:
            os.makedirs(os.path.dirname(os.path.abspath(self.target)), exist_ok=True)
            os.replace(self._part, self.target)

    def _set_mode(self, entry: FileEntry) -> None:
        """Set permissions (of the source, or of the file it replaces) and, with preserve, times."""
        place, mode, replaced = self.place(entry), entry.mode, self.target_of(entry.name)
        if self._options.preserve:
            os.utime(place, ns=(entry.mtime, entry.mtime))
        elif os.path.isfile(replaced):
            mode = stat.S_IMODE(os.stat(replaced).st_mode)
        else:
            mode &= ~local_umask()
        os.chmod(place, mode)

    def _merge(self, entries: list[FileEntry]) -> None:
        """Move a tree into an existing one; never write through a symlink there."""
        for entry in entries:  # check all before moving the first
            target, is_folder = self.target_of(entry.name), entry.kind == "d"
            shown = printable(os.fsdecode(entry.name), 300)
            if os.path.islink(target) and is_folder:
                raise SSHError(f"local has a symlink in the place of {shown}")
            if os.path.lexists(target) and os.path.isdir(target) != is_folder:
                raise SSHError(f"local has something else in the place of {shown}")
        for entry in entries:
            target = self.target_of(entry.name)
            if entry.kind != "d":
                os.replace(self.place(entry), target)
            elif not os.path.isdir(target):
                os.mkdir(target, entry.mode | 0o700)  # without what the umask forbids
        for entry in entries[::-1]:
            if entry.kind == "d" and self._options.preserve:
                target = self.target_of(entry.name)
                os.chmod(target, entry.mode)
                os.utime(target, ns=(entry.mtime, entry.mtime))
        shutil.rmtree(self._part)


def local_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def write_piece(file: Any, piece: bytes) -> None:
    """Write a piece, but skip zeros where the file has only zeros: sparse files stay sparse."""
    if piece[0] == 0 == piece[-1] and piece == ZEROS[: len(piece)]:
        start = file.tell()
        there = file.read(len(piece))  # shorter at the end of the file
        hole = there == ZEROS[: len(there)]
        file.seek(start + len(piece) if hole else start)
        if hole:
            return
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def begin_download(
    transfer: Transfer, part: LocalPart, tree: RemoteTree, different: Different
) -> list[FileEntry]:
    """Check and begin a download, unless nothing has changed; return the symlinks."""
    kept = []
    for entry in tree.entries:
        why = ""
        if entry.kind == "other":
            why = "it is not a file"
        elif entry.kind == "l" and transfer.options.symlinks == "skip":
            why = "a symlink"
        elif entry.kind == "l" and b"\\" in entry.name:  # an escape for GNU tar
            why = "a symlink whose name has a backslash"
        if why:
            transfer.leave_out(entry.name, why)
        else:
            kept.append(entry)
    tree.entries = kept
    links = [entry for entry in kept if entry.kind == "l"]
    transfer.total = tree.size
    part.check_target(tree.is_folder)
    if not links or transfer.options.symlinks != "follow":  # a copy may need unchanged files
        transfer.leave_unchanged(tree, part.installed, different)
    transfer.total = tree.size
    part.grow(tree.size)
    if tree.is_folder or tree.files:
        part.begin(tree)
    return links


def make_links(
    transfer: Transfer, part: LocalPart, tree: RemoteTree, links: list[FileEntry]
) -> None:
    """Create the symlinks that lead to something in the tree, or copies of it."""
    entries = {entry.name: entry for entry in tree.entries}
    folders = {entry.name for entry in tree.entries if entry.kind == "d"}
    follow = transfer.options.symlinks == "follow"
    for link in links:
        target: FileEntry | None = link
        for _ in range(MAX_HOPS):
            if target is None or target.kind != "l":
                break
            target = entries.get(link_target(target.name, target.link, folders) or b"")
        else:
            target = None
        inside = target is not None and (link.name + b"/").startswith(target.name + b"/")
        if target is None or (inside and follow):
            transfer.leave_out(link.name, f"a symlink to {os.fsdecode(link.link)}")
            tree.entries.remove(link)
        elif not follow:
            os.symlink(os.fsdecode(link.link), part.place(link))
        else:
            with about(link):
                _copy(part, tree, link, target)


def _copy(part: LocalPart, tree: RemoteTree, link: FileEntry, target: FileEntry) -> None:
    """Copy what a symlink leads to, within ``max_bytes``."""
    link.kind, link.mode, link.mtime, link.size = (
        target.kind, target.mode, target.mtime, target.size,
    )  # fmt: skip
    if target.kind == "f":
        part.grow(target.size)
        shutil.copyfile(part.place(target), part.place(link))
        return
    below = target.name + b"/"
    copies = [
        FileEntry(link.name + b"/" + e.name[len(below) :], e.size, e.mtime, e.mode, e.kind)
        for e in tree.entries
        if e.kind != "l" and e.name.startswith(below)
    ]
    part.grow(sum(entry.size for entry in copies))
    if len(tree.entries) + len(copies) > MAX_FILES:
        raise SSHError(f"its copies are more than {MAX_FILES} files")
    tree.entries += copies
    shutil.copytree(part.place(target), part.place(link))


# ==================================================================================================
# ssh.transfer.sftp
#
# Transfer files over SFTP if a host has no usual shell: slower, with the same checks.
# ==================================================================================================


SFTP_REQUEST = 255 * 1024  # bytes to read or write with one request; the most that OpenSSH accepts
MAX_SFTP_PACKET = 2**20  # bytes of one answer
SFTP_PATIENCE = 10.0  # seconds for a host to free the channel of an earlier script
MAX_LISTED = 500_000  # files in a directory


class SftpChannel(LimitedChannel):
    """Limit the waits and the memory of paramiko's SFTP client."""

    def recv(self, size: int) -> bytes:
        if size > MAX_SFTP_PACKET:
            self.close()  # else paramiko would read on, to close its file
            raise SSHError(f"the host sends a packet of {size} bytes")
        return super().recv(size)


@contextlib.contextmanager
def sftp_session(transfer: Transfer) -> Iterator[RemoteFiles]:
    """Open an SFTP session for a block."""
    import paramiko

    def once() -> SftpChannel:
        transport = transfer.pool.ssh.get_transport()
        channel = SftpChannel(transport, transfer.timeout, transfer.watchdog)
        channel.invoke_subsystem("sftp")
        return channel

    unreadable = (paramiko.SFTPError, UnicodeError, ValueError, TypeError)
    failures: tuple[type[Exception], ...] = (*unreadable, *connection_errors())
    with contextlib.closing(with_patience(min(SFTP_PATIENCE, transfer.timeout), once)) as channel:
        try:
            sftp = paramiko.SFTPClient(channel)
        except failures as error:
            text = f"the host has neither a usual shell nor SFTP: {reason(error)}"
            raise SSHError(text) from error
        sftp.logger = logging.getLogger(PARAMIKO_LOGGER)  # it logs names without escaping them
        try:
            yield RemoteFiles(sftp)
        except unreadable as error:
            text = f"the host sent an answer that can't be read: {reason(error)}"
            raise SSHError(text) from error


class RemoteFiles:
    """Read and change the files of a host over SFTP."""

    def __init__(self, sftp: Any) -> None:
        self.sftp = sftp

    def absolute(self, path: bytes) -> bytes:
        """Convert a path, which may be below the home directory, to an absolute one."""
        home: bytes = os.fsencode(self.sftp.normalize("."))
        return posixpath.normpath(posixpath.join(home, path)) + b"/" * path.endswith(b"/")

    def look(self, path: bytes, follow: bool = True) -> FileEntry | None:
        """Return the entry at a path, or None if it does not exist."""
        try:
            return _entry(b"", self.sftp.stat(path) if follow else self.sftp.lstat(path))
        except FileNotFoundError:
            return None

    def kind(self, path: bytes, follow: bool = True) -> str:
        """Return "f", "d", "l", "other", or "" if the path does not exist."""
        found = self.look(path, follow)
        return "" if found is None else found.kind

    def tree(self, path: bytes, excludes: Excludes) -> RemoteTree:
        """Return the entry at a path, and all entries below it."""
        tree, found = RemoteTree(excludes), self.look(path)
        if found is None:
            return tree
        tree.add(found)
        folders = [b""] if found.kind == "d" else []
        while folders:
            folder = folders.pop()
            for entry in self._listed(_join(path, folder)):
                entry.name = folder + b"/" + entry.name if folder else entry.name
                tree.add(entry)  # which limits the levels
                if entry.kind == "d":
                    folders.append(entry.name)
        return tree

    def _listed(self, folder: bytes) -> list[FileEntry]:
        """Return the entries of a directory."""
        # Read the whole listing before the next request: paramiko requests some of it ahead.
        listed = list(itertools.islice(self.sftp.listdir_iter(folder), MAX_LISTED + 1))
        if len(listed) > MAX_LISTED:
            raise SSHError(f"the host lists more than {MAX_LISTED} files in a directory")
        return [_entry(os.fsencode(found.filename), found) for found in listed]

    def open(self, path: bytes, mode: str) -> Any:
        """Open a file for large requests."""
        file = self.sftp.open(path, mode)
        file.MAX_REQUEST_SIZE = SFTP_REQUEST
        return file

    def pieces(self, file: Any, start: int, end: int) -> Iterator[bytes]:
        """Yield a range of an open file."""
        file.seek(start)
        for at in range(start, end, SFTP_REQUEST):
            size = min(SFTP_REQUEST, end - at)
            piece = file.read(size)
            if len(piece) != size:
                raise SSHError(f"{size - len(piece)} bytes are missing")
            yield piece

    def differs(self, entry: FileEntry, path: bytes, here: str | Path) -> bool:
        """Return whether the SHA-256 of a file differs from that of a local file."""
        digest = hashlib.sha256()
        with self.open(path, "rb") as file:
            for piece in self.pieces(file, 0, entry.size):
                digest.update(piece)
        return digest.hexdigest() != file_digest(here, 0, entry.size)

    def make_folders(self, folder: bytes) -> None:
        """Create a directory with its parents, if it is missing."""
        kind = self.kind(folder)
        if not kind:
            self.make_folders(posixpath.dirname(folder))
            self.sftp.mkdir(folder)
        elif kind != "d":
            raise SSHError(f"{os.fsdecode(folder)} is not a directory")

    def replace(self, source: bytes, target: bytes) -> None:
        """Rename a file over another one."""
        try:
            self.sftp.posix_rename(source, target)
        except OSError as error:
            if error.errno is not None:  # else the server may lack this extension
                raise
            if self.kind(target, follow=False):
                self.sftp.remove(target)
            self.sftp.rename(source, target)

    def remove(self, path: bytes) -> None:
        """Remove a file or a directory, if it exists."""
        kind = self.kind(path, follow=False)
        if kind == "d":
            for entry in self._listed(path):
                self.remove(_join(path, entry.name))
            self.sftp.rmdir(path)
        elif kind:
            self.sftp.remove(path)


def _entry(name: bytes, found: Any) -> FileEntry:
    """Check the attributes of a file that a host sent."""
    if None in (found.st_mode, found.st_size, found.st_mtime):
        raise SSHError("the host sends no size, time or mode of a file")
    return remote_entry(name, found.st_mode, int(found.st_size), int(found.st_mtime))


def _join(path: bytes, name: bytes) -> bytes:
    return path.rstrip(b"/") + b"/" + name if name else path


class SftpDownload:
    """Download over SFTP."""

    def __init__(self, transfer: Transfer, part: LocalPart, remote: RemoteFiles) -> None:
        self._transfer = transfer
        self._part = part
        self._remote = remote
        self._source = remote.absolute(transfer.options.source).rstrip(b"/") or b"/"

    def look(self) -> RemoteTree:
        kind = self._remote.kind(self._source)
        if not kind:
            raise SSHError("there is no such file")
        if kind == "other":
            raise SSHError("it is neither a file nor a directory")
        return self._remote.tree(self._source, self._transfer.options.excludes)

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        differs, target = self._remote.differs, self._part.target_of
        return [e for e in files if differs(e, _join(self._source, e.name), target(e.name))]

    def receive(self, files: list[FileEntry], links: list[FileEntry]) -> None:
        for link in links:
            found = self._remote.sftp.readlink(_join(self._source, link.name))
            link.link = os.fsencode(found or "")
        for entry in files:
            with about(entry):
                self._receive(entry)

    def _receive(self, entry: FileEntry) -> None:
        part, source = self._part, _join(self._source, entry.name)
        earlier = part.earlier(entry)
        with self._remote.open(source, "rb") as file, part.open(entry) as out:
            for start, length in part.missing(entry):
                out.seek(start)
                at = start
                try:
                    for piece in self._remote.pieces(file, start, start + length):
                        write_piece(out, piece)
                        at += len(piece)
                        self._transfer.moved(entry, len(piece))
                finally:
                    part.note(entry, start, at)
            out.truncate(entry.size)
        if not entry.size:
            self._transfer.moved(entry, 0)
        check_unchanged(entry, self._remote.look(source))
        # Not after every resumed download: hashing costs as much as receiving the file again.
        if self._transfer.options.verify and self._remote.differs(entry, source, part.place(entry)):
            part.clear()
            raise SSHError(DIFFERS)
        for _, length in earlier:
            self._transfer.count(entry, length)


class SftpUpload:
    """Upload over SFTP."""

    def __init__(self, transfer: Transfer, tree: LocalTree, remote: RemoteFiles) -> None:
        self._transfer = transfer
        self._options: Any = transfer.options
        self._tree = tree
        self._remote = remote
        self._target = self._find_target()
        token = part_token(self._options.resume, "sftp", self._target, tree.whole)
        self._part = _join(posixpath.dirname(self._target), PART.encode() + token.encode())
        self._confirmed = self._unconfirmed = 0  # bytes

    def _find_target(self) -> bytes:
        """Check the target, and return its path."""
        remote, is_folder = self._remote, self._tree.is_folder
        path = remote.absolute(self._options.source)
        if is_folder:
            inside = not self._options.content
        else:
            inside = path.endswith(b"/") or remote.kind(path) == "d"
        path = path.rstrip(b"/") or b"/"
        if inside:
            path = _join(path, os.path.basename(self._tree.whole))
        kind = remote.kind(path)
        shown = os.fsdecode(path)
        if kind != "d" and remote.kind(path, follow=False) == "l":
            if self._options.symlinks != "follow" or not kind:
                raise SSHError(f"{shown} is a symlink: remove it, or pass symlinks='follow'")
            path = os.fsencode(remote.sftp.normalize(path))
        if kind and (kind == "d") != is_folder:
            raise SSHError(f"{shown} is {'not ' if is_folder else ''}a directory")
        if kind == "other":
            raise SSHError(f"{shown} is neither a file nor a directory")
        return path

    def listing(self) -> tuple[bytes, RemoteTree]:
        return self._target, self._remote.tree(self._target, self._options.excludes)

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        differs, place = self._remote.differs, self._tree.place
        return [e for e in files if differs(e, _join(self._target, e.name), place(e))]

    def remove(self, files: list[bytes], folders: list[bytes]) -> None:
        for name in files:
            self._remote.sftp.remove(_join(self._target, name))
        for name in folders:
            with contextlib.suppress(OSError):  # it is not empty
                self._remote.sftp.rmdir(_join(self._target, name))

    def send(self) -> bytes:
        remote, part, record = self._remote, self._part, self._part + b".done"
        remote.make_folders(posixpath.dirname(part))
        try:
            if self._options.resume:
                self._check_record(record)
            if not self._options.preserve:
                self._apply_umask()
            self._send_all()
            self._install()
            if self._options.resume:
                remote.remove(record)
        except BaseException:
            if not self._options.resume:
                with contextlib.suppress(SSHError, *connection_errors()):
                    remote.remove(part)
            raise
        return self._target

    def _check_record(self, record: bytes) -> None:
        """Remove what an earlier upload has sent, unless the source is still the same."""
        key = record_key([entry.version for entry in self._tree.files]).encode()
        with contextlib.suppress(FileNotFoundError), self._remote.open(record, "rb") as file:
            if file.read(len(key)) == key:
                return
        self._remote.remove(self._part)
        with self._remote.open(record, "wb") as file:
            file.write(key)

    def _apply_umask(self) -> None:
        """Apply the host's umask to all modes; it shows in the mode of a new directory."""
        probe = self._part + b"." + os.urandom(4).hex().encode()
        self._remote.sftp.mkdir(probe)
        mask = self._remote.sftp.stat(probe).st_mode
        self._remote.sftp.rmdir(probe)
        for entry in [self._tree.root, *self._tree.entries]:
            entry.mode &= mask

    def _send_all(self) -> None:
        for entry in self._tree.by_name.values():
            place = _join(self._part, entry.name)
            if entry.kind == "d" and not self._remote.kind(place):
                self._remote.sftp.mkdir(place, 0o700)
            elif entry.kind == "l":
                self._remote.remove(place)
                self._remote.sftp.symlink(entry.link, place)
        for entry in self._tree.files:
            with about(entry):
                self._send_file(entry, _join(self._part, entry.name))

    def _send_file(self, entry: FileEntry, place: bytes) -> None:
        start = 0
        found = self._remote.look(place) if self._options.resume else None
        if found is not None and found.size <= entry.size:
            start = entry.size if found.size == entry.size else found.size - found.size % BLOCK
        with self._remote.open(place, "r+b" if start else "wb") as file:
            file.chmod(0o600)
            file.seek(start)
            for piece in self._tree.pieces(entry, start, entry.size - start):
                self._write(file, bytes(piece))
                self._transfer.moved(entry, len(piece))
        if start or not entry.size:
            self._transfer.moved(entry, start)
        found = self._remote.look(place)
        size = 0 if found is None else found.size
        if size != entry.size:
            raise SSHError(f"{size} of {entry.size} bytes arrived")
        if self._options.verify and self._remote.differs(entry, place, self._tree.place(entry)):
            self._remote.remove(place)
            raise SSHError(DIFFERS)

    def _write(self, file: Any, piece: bytes) -> None:
        """Write, and let the host confirm all earlier writes where too much is unconfirmed."""
        self._unconfirmed += len(piece)
        waits = self._unconfirmed >= self._transfer.ahead(self._confirmed)
        file.set_pipelined(not waits)
        file.write(piece)
        if waits:
            self._confirmed += self._unconfirmed
            self._unconfirmed = 0

    def _install(self) -> None:
        """Move everything to the target, with the right modes and times."""
        remote, tree, part, target = self._remote, self._tree, self._part, self._target
        exists = bool(remote.kind(target))
        merges = exists and tree.is_folder
        if merges:
            for entry in tree.entries:
                self._check_place(entry, _join(target, entry.name))
        for entry in reversed(tree.by_name.values()):
            if entry.kind == "f" or (entry.kind == "d" and not merges):
                self._set_mode(entry, exists)
        if not merges:
            remote.replace(part, target)
            return
        for entry in tree.entries:
            place = _join(target, entry.name)
            if entry.kind != "d":
                remote.replace(_join(part, entry.name), place)
            elif not remote.kind(place):
                remote.sftp.mkdir(place, 0o700)
                remote.sftp.chmod(place, entry.mode | 0o700)
        remote.remove(part)

    def _check_place(self, entry: FileEntry, place: bytes) -> None:
        """Check what exists in the place of an entry, before any file is moved there."""
        kind = self._remote.kind(place, follow=False)
        if kind == "l" and entry.kind != "l":
            if self._options.symlinks != "follow":
                raise SSHError(f"{os.fsdecode(place)} is a symlink")
            kind = self._remote.kind(place)
        if kind and (kind == "d") != (entry.kind == "d"):
            raise SSHError(f"{os.fsdecode(place)} is {'' if kind == 'd' else 'not '}a directory")

    def _set_mode(self, entry: FileEntry, exists: bool) -> None:
        """Set permissions (of the source, or of the file it replaces) and, with preserve, times."""
        sftp, place = self._remote.sftp, _join(self._part, entry.name)
        if self._options.preserve:
            sftp.chmod(place, entry.mode)
            sftp.utime(place, (entry.mtime // 10**9, entry.mtime // 10**9))
            return
        found = self._remote.look(_join(self._target, entry.name)) if exists else None
        sftp.chmod(place, entry.mode if found is None else found.mode)


# ==================================================================================================
# ssh.transfer.download
#
# Download files and directories; the host is not trusted.
# ==================================================================================================


DOWNLOAD_CONNECTIONS = 4
DOWNLOAD_MANY = 256 * 1024 * 1024  # bytes; from here on, more connections are worth their logins
ANY_SIZE = 2**62
MAX_TAR_EXTRA = 65536  # bytes of a name


def download_path(pool: ConnectionPool, options: DownloadOptions) -> TransferResult:
    """Download; see ``CloreClient.download``."""
    transfer = Transfer(pool, options, os.fsdecode(options.remote), "download")
    part = LocalPart(options.target, options.remote, options)
    with transfer.watched(), part:
        files = _download(transfer, part)
    return transfer.result(part.target, files)


def _download(transfer: Transfer, part: LocalPart) -> list[FileEntry]:
    """Download with the host's shell, or else over SFTP; return the files that were received."""
    try:
        return _receive_all(transfer, part, Download(transfer, part))
    except BaseException as error:
        transfer.give_up()
        if not isinstance(error, NoShellError):
            raise
        logger.warning("the download uses SFTP, which is slower: %s", error)
    transfer.restart()
    with sftp_session(transfer) as remote:
        return _receive_all(transfer, part, SftpDownload(transfer, part, remote))


def _receive_all(
    transfer: Transfer, part: LocalPart, receiver: Download | SftpDownload
) -> list[FileEntry]:
    tree = receiver.look()
    links = begin_download(transfer, part, tree, receiver.different)
    files = tree.files
    if tree.is_folder or files:
        receiver.receive(files, links)
        make_links(transfer, part, tree, links)
        part.install(tree)
    return files


class Download:
    """Download with the host's shell.

    The script LOOK lists a directory, or sends a single file that is not large. Workers receive
    large files in ranges; small ones are received in a tar stream.
    """

    def __init__(self, transfer: Transfer, part: LocalPart) -> None:
        self._transfer = transfer
        self._options: Any = transfer.options
        self._part = part
        self._ranges: deque[FileRange] = deque()
        self._most_at_once = RANGE
        self._lock = threading.Lock()
        self._token = os.urandom(10).hex()
        self._look: Any = None

    def look(self) -> RemoteTree:
        """Return the source: a file or a directory."""
        ssh, script = self._transfer.pool.ssh, self._look_script()
        look = self._look = self._transfer.script(ssh, script, DATA_WINDOW, reads=False)
        first = look.line()
        if first.startswith(b"f "):
            tree = RemoteTree()
            tree.add(parse_stat(first[2:]))
            if tree.size > self._most:  # the script does not send it
                look.finish()
            return tree
        if first != b"d":
            raise look.refused(first)
        text = look.until(self._token.encode(), MAX_ANSWER)
        look.finish()
        return parse_listing(text, MAX_FILES, self._options.excludes)

    def _look_script(self) -> bytes:
        options = self._options
        most = ANY_SIZE if self._transfer.near else DOWNLOAD_MANY - 1
        if options.max_bytes is not None:
            most = min(most, options.max_bytes)
        in_ranges = self._part.done or options.verify or (options.streams or 1) > 1
        self._most = -1 if in_ranges or options.skip_unchanged else most
        return script_text(
            "look", CHECK_TOOLS, LOOK, f=options.source, token=self._token, most=self._most
        )

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        """Return those of the files whose content differs from that of their targets."""
        ranges = [(entry, 0, entry.size) for entry in files]
        return list(self._different(ranges, lambda entry: self._part.target_of(entry.name)))

    def _different(
        self, ranges: list[FileRange], place: Callable[[FileEntry], Any]
    ) -> Iterator[FileEntry]:
        return self._transfer.different(ranges, place, path=self._options.source)

    def receive(self, files: list[FileEntry], links: list[FileEntry]) -> None:
        """Receive and check files, and read what symlinks lead to."""
        compared: list[FileEntry] = []
        if files and not files[0].name:
            self._receive_one(files[0])
        else:
            compared = self._receive_many(files, links)
        ranges = [(entry, *found) for entry in files for found in self._part.earlier(entry)]
        for entry, _, size in ranges:
            self._transfer.count(entry, size)
        ranges += [(entry, 0, entry.size) for entry in compared]
        for entry in self._different(ranges, self._part.place):
            with about(entry):
                self._part.clear()
                raise SSHError(DIFFERS)

    def _receive_one(self, entry: FileEntry) -> None:
        look = self._look
        if entry.size > self._most:
            self._get_ranges([(entry, *found) for found in self._part.missing(entry)])
            return
        self._write(look, entry, 0, entry.size)
        check_unchanged(entry, parse_stat(look.line()))
        look.expect_end()
        look.finish()

    def _receive_many(self, files: list[FileEntry], links: list[FileEntry]) -> list[FileEntry]:
        """Receive the files of a directory; return those that ``verify`` has to compare."""
        small: list[FileEntry] = []
        ranges: list[FileRange] = []
        for entry in files:
            # GNU tar reads a backslash in a name as an escape.
            if entry.size >= SMALL_FILE or b"\\" in entry.name or self._part.earlier(entry):
                ranges += [(entry, *found) for found in self._part.missing(entry)]
            else:
                small.append(entry)
        self._get_ranges(ranges, lambda: self._get_small(small + links))
        return small if self._options.verify else []

    def _write(
        self, running: RemoteScript, entry: FileEntry, start: int, length: int, digest: Any = None
    ) -> None:
        """Write and record exactly ``length`` bytes of output."""
        at = noted = start
        with self._part.open(entry) as file:
            file.seek(start)
            try:
                while at < start + length:
                    piece = running.piece(start + length - at)
                    write_piece(file, piece)
                    if digest is not None:
                        digest.update(piece)
                    at += len(piece)
                    self._transfer.moved(entry, len(piece))
                    if at - noted >= TRANSFER_PIECE:
                        noted = self._part.note(entry, noted, at)
            finally:
                self._part.note(entry, noted, at)
            if at == entry.size:
                file.truncate(entry.size)  # zeros at the end were not written
        if not length:
            self._transfer.moved(entry, 0)

    # --- ranges ---

    def _get_ranges(
        self, ranges: list[FileRange], meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Let workers receive the ranges; call ``meanwhile`` in this thread."""
        transfer, size = self._transfer, sum(length for _, _, length in ranges)
        connections = 1 if transfer.near or size < DOWNLOAD_MANY else DOWNLOAD_CONNECTIONS
        if self._options.streams is not None:
            connections = self._options.streams
            self._most_at_once = min(RANGE, max(size // connections // BLOCK, 16) * BLOCK)
        self._ranges.extend(ranges)
        if transfer.takes_turns:  # these scripts end by themselves, so each needs a connection
            connections = min(connections, transfer.pool.size)
            meanwhile()
        workers = min(max(len(ranges), size // BLOCK), connections) if ranges else 0
        transfer.start_workers(connections, workers, self._work)
        if not transfer.takes_turns:
            meanwhile()
        transfer.finish_workers()
        self._work(transfer.pool.ssh)  # ranges for which no worker got a channel

    def _take_range(self) -> FileRange | None:
        """Return the next range for a worker, or None."""
        with self._lock:
            if not self._ranges:
                return None
            entry, start, length = self._ranges.popleft()
            most = self._most_at_once
            if length > most:
                self._ranges.appendleft((entry, start + most, length - most))
            return entry, start, min(length, most)

    def _work(self, ssh: Any) -> None:
        while (taken := self._take_range()) is not None:
            entry, start, length = taken
            try:
                with about(entry):
                    self._get_range(ssh, entry, start, length)
            except NoChannelError:
                self._ranges.append((entry, start, length))
                raise

    def _get_range(self, ssh: Any, entry: FileEntry, start: int, length: int) -> None:
        digest = hashlib.sha256()
        source = self._options.source
        place = source.rstrip(b"/") + b"/" + entry.name if entry.name else source
        script = script_text("get", GET, f=place, k=start // BLOCK, s=length)
        with self._transfer.script(ssh, script, DATA_WINDOW, reads=False) as get:
            self._write(get, entry, start, length, digest)
            sent = get.line()[:64]
            if sent != digest.hexdigest().encode():
                missing = len(sent) < 64
                raise SSHError("the host sent no SHA-256" if missing else "SHA-256 differs")
            check_unchanged(entry, parse_stat(get.line()))
            get.expect_end()

    # --- small files ---

    def _get_small(self, entries: list[FileEntry]) -> None:
        """Receive small files and symlinks in one tar stream."""
        if not entries:
            return
        script = script_text("tree", GET_TREE, f=self._options.source, token=self._token)
        with self._transfer.script(self._transfer.pool.ssh, script, DATA_WINDOW) as get:
            get.send_names(entry.name for entry in entries)
            self._receive_tar(get, {entry.name: entry for entry in entries})
            text = get.until(self._token.encode(), MAX_ANSWER)
        now = parse_listing(text, MAX_FILES).by_name
        for entry in entries:
            if entry.kind == "f":
                with about(entry):
                    check_unchanged(entry, now.get(entry.name))

    def _receive_tar(self, get: RemoteScript, wanted: dict[bytes, FileEntry]) -> None:
        received: dict[bytes, FileEntry] = {}
        for info in tar_members(get, self._token.encode()):
            name = os.fsencode(info.name).removeprefix(b"./")
            entry = wanted.pop(name, None)
            if entry is None:
                raise SSHError(f"the host sends {printable(repr(name), 120)}: not requested")
            with about(entry):
                self._take_member(get, entry, info, received)
            received[name] = entry
        for entry in wanted.values():
            with about(entry):
                raise SSHError(f"it was not received: {get.refused()}")

    def _take_member(
        self, get: RemoteScript, entry: FileEntry, info: Any, received: dict[bytes, FileEntry]
    ) -> None:
        if info.issym() and entry.kind == "l":
            entry.link = os.fsencode(info.linkname)
        elif info.islnk() and entry.kind == "f":
            original = received.get(os.fsencode(info.linkname).removeprefix(b"./"))
            if original is None:
                raise SSHError("it is a hard link to a file that was not requested")
            shutil.copyfile(self._part.place(original), self._part.place(entry))
            self._part.note(entry, 0, entry.size)
            self._transfer.moved(entry, entry.size)
        elif info.isreg() and entry.kind == "f":
            if info.size < entry.size:
                raise SSHError(CHANGED)
            self._part.grow(info.size - entry.size)
            entry.size = info.size  # it has grown since it was listed
            self._write(get, entry, 0, entry.size)
        else:
            raise SSHError(CHANGED)


def tar_members(running: RemoteScript, mark: bytes) -> Iterator[Any]:
    """Yield the members of consecutive tar archives, up to a block with a mark.

    The content of a member must be read before the next one is requested.
    """
    import tarfile

    long: dict[bytes, bytes] = {}  # a name or a symlink's target that does not fit in a header
    while (header := running.exactly(TAR_BLOCK)).rstrip(b" \n") != mark:
        if not header.strip(b"\0"):
            continue
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise SSHError("the host sends no valid tar archive") from error
        if info.size < 0:
            raise SSHError("the host sends a negative size")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE):
            if info.size > MAX_TAR_EXTRA:
                raise SSHError("the host sends a name that is too long")
            extra = running.exactly(info.size + -info.size % TAR_BLOCK)[: info.size]
            if info.type == tarfile.XHDTYPE:  # records of a length, a keyword and a value
                long.update(re.findall(rb"\d+ (path|linkpath)=(.*)\n", extra))
            else:
                is_name = info.type == tarfile.GNUTYPE_LONGNAME
                long[b"path" if is_name else b"linkpath"] = extra.rstrip(b"\0")
            continue
        info.name = os.fsdecode(long.pop(b"path", b"")) or info.name
        info.linkname = os.fsdecode(long.pop(b"linkpath", b"")) or info.linkname
        if not info.isreg():
            info.size = 0
        yield info
        running.exactly(-info.size % TAR_BLOCK)


# ==================================================================================================
# ssh.transfer.upload
#
# Upload files and directories under a temporary name, which is renamed at the end.
# ==================================================================================================


# sshd has a window of 2 MB for each channel, and allows ten channels on a connection. If the round
# trip is long, more channels make an upload faster.
UPLOAD_CHANNELS = 8
RESUMABLE_CHANNELS = 2
MAX_UNCONFIRMED = 1000  # portions; the answers to all of them fit in the window of a channel
MODE_LINES = 500  # files whose modes the host sets within the timeout


def upload_path(pool: ConnectionPool, checked: tuple[UploadOptions, LocalTree]) -> TransferResult:
    """Upload; see ``CloreClient.upload``."""
    options, tree = checked
    name = os.fsdecode(os.path.basename(tree.whole)) or "/"
    transfer = Transfer(pool, options, name, "upload")
    transfer.total = tree.size
    for left_out, why in tree.left_out:
        transfer.leave_out(left_out, why)
    with transfer.watched():
        path = _upload(transfer, tree)
    return transfer.result(path, tree.files)


def _upload(transfer: Transfer, tree: LocalTree, careful: bool = False) -> bytes:
    """Upload with the host's shell, or else over SFTP; return the path on the host."""
    try:
        return _compare_and_send(transfer, tree, Upload(transfer, tree, careful))
    except (NoShellError, NoChannelError) as error:
        transfer.restart()
        if not careful and isinstance(error, NoChannelError):
            return _upload(transfer, tree, careful=True)
        logger.warning("the upload uses SFTP, which is slower: %s", error)
        with sftp_session(transfer) as remote:
            return _compare_and_send(transfer, tree, SftpUpload(transfer, tree, remote))


def _compare_and_send(transfer: Transfer, tree: LocalTree, sender: Upload | SftpUpload) -> bytes:
    """Upload, with ``skip_unchanged``, ``preview`` and ``delete``; return the path on the host."""
    options = transfer.options
    if not options.compares:
        return sender.send()
    path, there = sender.listing()
    by_name = there.by_name
    deletes: list[bytes] = []
    if options.delete is not False:
        transfer.deletes = deletes = _extra_names(tree, there, options.delete)
    transfer.leave_unchanged(tree, by_name.get, sender.different)
    transfer.total = tree.size
    if options.preview or not (tree.is_folder or tree.files):
        return path
    path = sender.send()
    folders = [name for name in deletes if by_name[name].kind == "d"]
    sender.remove([name for name in deletes if by_name[name].kind != "d"], folders)
    return path


def _extra_names(
    tree: LocalTree, there: RemoteTree, delete: Literal[True] | frozenset[bytes]
) -> list[bytes]:
    """Return the names that only the target has, deepest first: those in ``delete``, or all.

    Names that match ``exclude``, or that the upload left out, are not returned.
    """
    left_out = {name for name, _ in tree.left_out}
    stay = {b"", *there.excluded, *left_out, *(entry.name for entry in tree.entries)}
    kept: set[bytes] = set()
    for name in [*there.by_name, *there.excluded]:
        parts = name.split(b"/")
        above = [b"/".join(parts[:n]) for n in range(1, len(parts))]
        if name in stay or not left_out.isdisjoint(above):
            kept.update(above, [name])
    names = [n for n in there.by_name if n not in kept and (delete is True or n in delete)]
    return sorted(names, reverse=True)


class Upload:
    """Upload with the host's shell.

    The script CONTROL runs from start to end. Workers send large files in chunks, and small ones in
    tar archives.

    Parameters:
        careful: start the workers after CONTROL, which needs a channel first.
    """

    def __init__(self, transfer: Transfer, tree: LocalTree, careful: bool) -> None:
        options = self._options = transfer.options
        self._transfer = transfer
        self._careful = careful or tree.is_folder or options.resume or transfer.takes_turns
        self._tree = tree
        kind, content = tree.root.kind, options.content
        token = part_token(options.resume, kind, content, tree.whole, options.remote)
        self._token = token.encode()
        self._values: dict[str, Any] = {
            "f": options.source,
            "content": int(content),
            "name": os.path.basename(tree.whole) or b".",
            "kind": kind,
            "token": token,
            "keep": int(options.resume),
            "follow": int(options.symlinks == "follow"),
        }
        self._control: RemoteScript | None = None
        self._lock = threading.Lock()

    def _script(self, verb: str, *parts: str, **values: Any) -> RemoteScript:
        text = script_text(verb, *parts, **self._values, **values)
        return self._transfer.script(self._transfer.pool.ssh, text)

    def listing(self) -> tuple[bytes, RemoteTree]:
        """Return the path of the target, and its entries."""
        with self._script("look", CHECK_TOOLS, TARGET, LIST_TARGET) as script:
            path = script.answer(b"target")
            listed = script.until(self._token, MAX_ANSWER)
            return path, parse_listing(listed, MAX_FILES, self._options.excludes)

    def different(self, files: list[FileEntry]) -> list[FileEntry]:
        """Return those of the files whose content differs on the host."""
        ranges = [(entry, 0, entry.size) for entry in files]
        return list(self._different(ranges, "path=$f\n"))

    def _different(self, ranges: Iterable[FileRange], setup: str) -> Iterator[FileEntry]:
        return self._transfer.different(ranges, self._tree.place, TARGET + setup, **self._values)

    def remove(self, files: list[bytes], folders: list[bytes]) -> None:
        """Remove files, and directories if they are empty, in this order."""
        for what, names in (("f", files), ("d", folders)):
            if names:
                with self._script("remove", TARGET, REMOVE, what=what) as script:
                    script.send_names(names)
                    script.answer(b"removed")

    def send(self) -> bytes:
        """Send the files, and return the path of the target."""
        transfer = self._transfer
        try:
            # Workers start without the answer of CONTROL, which saves a round trip.
            if not self._careful:
                self._plan(set())
                self._start()
            script, patient = self._control_script(), self._careful
            control = self._control = transfer.script(transfer.pool.ssh, script, patient=patient)
            self._begin(control)
            transfer.finish_workers()
            self._check_sent(control)
            if self._tree.is_folder:
                self._check_tree(control)
                self._set_modes(control)
            control.send(b"go\n")
            path = control.answer(b"ok")
            control.finish()
            return path
        except BaseException:
            transfer.give_up(self._control)
            raise

    def _control_script(self) -> bytes:
        root = self._tree.root
        return script_text(
            "upload", CHECK_TOOLS, TARGET, CONTROL, **self._values,
            preserve=int(self._options.preserve), size=root.size, mode=f"{root.mode:o}",
            time=touch_time(root.mtime), owner=os.urandom(8).hex(),
        )  # fmt: skip

    def _begin(self, control: RemoteScript) -> None:
        """Wait for the host; plan what an earlier upload has left, and start the workers."""
        umask = control.answer(b"ready")
        if not re.fullmatch(rb"[0-7]{1,5}", umask):
            raise control.refused(b"ready " + umask)
        done = set(control.until(self._token, MAX_ANSWER).decode("ascii", "replace").split())
        if not self._careful:
            return
        if not self._options.preserve:
            for entry in self._tree.entries:
                entry.mode &= ~int(umask, 8)
        self._plan(done)
        if len(self._earlier) < len(done):  # the source has changed
            control.send(b"restart\nsync\n")
            control.answer(self._token)
            self._plan(set())
        self._start()

    def _plan(self, done: set[str]) -> None:
        self._portions = plan_portions(self._tree, self._options.resume)
        self._earlier = [portion for portion in self._portions if portion.key in done]
        self._left = [portion for portion in self._portions if portion.key not in done][::-1]
        self._confirmed = sum(portion.size for portion in self._earlier)

    def _start(self) -> None:
        transfer, options = self._transfer, self._options
        channels = RESUMABLE_CHANNELS if options.resume else UPLOAD_CHANNELS
        if transfer.near:
            channels = 1
        connections = transfer.pool.size
        if (transfer.near and options.streams is None) or options.resume:
            connections = 1
        self._workers = min(len(self._left), connections * channels)
        # If several workers write a file, the host reads it again, and digests are compared.
        self._hashes = options.verify or options.resume or self._workers > 1
        transfer.start_workers(connections, self._workers, self._work)

    def _work(self, ssh: Any) -> None:
        """Send portions until none is left."""
        how, hashes = "op" if self._options.preserve else "opm", int(self._hashes)
        # Two dd that write holes into one file can shorten it.
        conv = "notrunc,sparse" if self._workers == 1 else "notrunc"
        script = script_text("put", TARGET, PUT, **self._values, how=how, hash=hashes, conv=conv)
        with self._transfer.script(ssh, script) as put:
            sent: list[tuple[Portion, bytes]] = []  # with digests, not confirmed yet
            while (portion := self._take()) is not None:
                ahead = self._transfer.ahead(self._confirmed) / self._workers
                while sent and (
                    len(sent) >= MAX_UNCONFIRMED
                    or portion.size + sum(earlier.size for earlier, _ in sent) > ahead
                ):
                    self._confirm(put, *sent.pop(0))
                sent.append((portion, self._send(put, portion)))
                if not put.send(b".\n"):
                    break  # the answer says why it takes no more
            put.end()
            for portion, digest in sent:
                self._confirm(put, portion, digest)
            put.answer(b"end")

    def _take(self) -> Portion | None:
        with self._lock:
            return self._left.pop() if self._left else None

    def _confirm(self, put: RemoteScript, portion: Portion, digest: bytes) -> None:
        with about(portion.entries[0]) if portion.start is not None else contextlib.nullcontext():
            if put.answer(b"done") != digest:
                raise SSHError("SHA-256 differs")
        with self._lock:
            self._confirmed += portion.size

    def _send(self, put: RemoteScript, portion: Portion) -> bytes:
        """Send a portion, and return how the host has to confirm it."""
        if portion.start is None:
            self._send_archive(put, portion)
            return b"-"
        (entry,) = portion.entries
        digest = hashlib.sha256()
        with about(entry):
            first = (portion.start // BLOCK, portion.size, portion.key.encode())
            put.send(b"%d %d %s " % first + encoded_name(entry.name) + b"\n")
            for piece in self._tree.pieces(entry, portion.start, portion.size):
                if self._hashes:
                    digest.update(piece)
                if not put.send(piece):
                    break
                self._transfer.moved(entry, len(piece))
        return digest.hexdigest().encode() if self._hashes else b"-"

    def _send_archive(self, put: RemoteScript, portion: Portion) -> None:
        headers = [tar_header(entry) for entry in portion.entries]
        padded = sum(e.size + -e.size % TAR_BLOCK for e in portion.entries)
        size = sum(map(len, headers)) + padded + 2 * TAR_BLOCK
        put.send(b"tar %d %s\n" % (size, portion.key.encode()))
        made = bytearray()  # sent in large pieces
        for header, entry in zip(headers, portion.entries, strict=True):
            with about(entry):
                made += header
                for piece in self._tree.pieces(entry, 0, entry.size) if entry.kind == "f" else ():
                    made += piece
                    if len(made) >= TRANSFER_PIECE:
                        if not put.send(bytes(made)):
                            return
                        made.clear()
                made += bytes(-entry.size % TAR_BLOCK)
                if entry.kind == "f":
                    self._transfer.moved(entry, entry.size)
        put.send(bytes(made + bytes(2 * TAR_BLOCK)))

    # --- checks ---

    def _check_sent(self, control: RemoteScript) -> None:
        """Compare what an earlier upload sent, and with ``verify`` all small files."""
        if self._left:
            raise NoChannelError("the host opened no further channel")
        if not self._tree.is_folder and not self._tree.root.size:
            self._transfer.count(self._tree.root, 0)
        compared = self._earlier
        if self._options.verify:
            compared = [portion for portion in compared if portion.start is not None]
            compared += [portion for portion in self._portions if portion.start is None]
        for entry in self._different(_ranges(compared), "path=$p\n"):
            with about(entry):
                control.send(b"wipe\n")
                raise SSHError(DIFFERS)
        for entry, _, size in _ranges(self._earlier):
            self._transfer.count(entry, size)

    def _check_tree(self, control: RemoteScript) -> None:
        """Compare the names and sizes of the received files."""
        control.send(b"list\nsync\n")
        text = control.until(self._token, MAX_ANSWER)
        there = parse_listing(text, len(self._tree.entries) * 2 + 100).by_name
        for entry in self._tree.entries:
            found = there.get(entry.name)
            with about(entry):
                if found is None:
                    raise SSHError("it is missing on the host")
                if (found.kind, found.size) != (entry.kind, entry.size):
                    raise SSHError(f"it has {found.size} bytes on the host")

    def _set_modes(self, control: RemoteScript) -> None:
        """Set modes and times of large files and directories, the deepest first."""
        preserve = self._options.preserve
        folders = [entry for entry in self._tree.entries if entry.kind == "d"]
        changed = [entry for entry in folders if preserve or entry.mode & 0o700 != 0o700]
        large = {p.entries[0].name: p.entries[0] for p in self._portions if p.start is not None}
        for number, entry in enumerate([*large.values(), *changed[::-1]], 1):
            name = encoded_name(entry.name)
            control.send(b"mode %o %s %s\n" % (entry.mode, touch_time(entry.mtime).encode(), name))
            if number % MODE_LINES == 0:
                control.send(b"sync\n")
                control.answer(self._token)


def _ranges(portions: list[Portion]) -> Iterator[FileRange]:
    """Yield the ranges of portions."""
    for portion in portions:
        for entry in portion.entries:
            if portion.start is not None:
                yield entry, portion.start, portion.size
            elif entry.kind == "f":
                yield entry, 0, entry.size


def touch_time(mtime: int) -> str:
    """Convert a time in nanoseconds to UTC for ``touch -t``."""
    return time.strftime("%Y%m%d%H%M.%S", time.gmtime(whole_seconds(mtime)))


# ==================================================================================================
# ssh.tunnel
#
# Reach a service on a host: forward a local port to it, or wait until it responds over HTTP.
# ==================================================================================================


LOOPBACK = "127.0.0.1"
REMOTE_HOST = "localhost"  # resolved by the host, so that IPv4 and IPv6 services are reached
FORWARD_CHUNK = 32768  # bytes
FORWARD_BACKLOG = 128  # connections that wait to be accepted
FORWARD_POLL = 0.1  # seconds between two checks of whether the block has ended
FORWARD_OPENING = 10.0  # seconds for a host to connect to its own port
FORWARD_PATIENCE = 2.0  # seconds to close all channels
FORWARD_LEAVING = 5.0  # seconds for all threads to end
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection
SERVICE_PAUSE = 2.0  # seconds between two requests
SERVICE_LIMIT = 10.0  # seconds for one request
# Statuses of a proxy, or of a service that is still loading.
NOT_YET_STATUSES = frozenset({502, 503, 504, *range(520, 528), 530})


def check_forward_arguments(remote_port: Any, local_port: Any = 0) -> None:
    """Check the ports of :class:`Forward`, before anything is sent."""
    check_count("remote_port", remote_port, minimum=1, maximum=65535)
    check_count("local_port", local_port, maximum=65535)


class Forward:
    """Forward a local port to a port of a host, for the length of a ``with`` block.

    Entering it returns the local port, which listens on 127.0.0.1 only. Each connection to it is
    forwarded to the port on the host's localhost; it is reset if nothing listens there. Leaving the
    block ends the connections that are still open.

    Parameters:
        ssh: a connection to the host.
        remote_port: the port on the host, 1 to 65535.
        local_port: the port on this machine; 0 takes a free one.
        owns: close ``ssh`` at the end of the block.
        log_level: the level at which to log a connection that the host does not accept.
    """

    def __init__(
        self, ssh: paramiko.SSHClient, remote_port: int, local_port: int = 0, owns: bool = False,
        log_level: int = logging.WARNING,
    ) -> None:  # fmt: skip
        self._ssh = ssh
        self._remote_port = remote_port
        self._local_port = local_port
        self._owns = owns
        self._log_level = log_level
        self._transport: Any = ssh.get_transport()
        self._acceptor: threading.Thread | None = None
        self._closing = threading.Event()
        self._links: list[_Link] = []

    def __repr__(self) -> str:
        state = "open" if self._acceptor and not self._closing.is_set() else "closed"
        return f"<Forward of {LOOPBACK}:{self._local_port} to port {self._remote_port}, {state}>"

    def __enter__(self) -> int:
        try:
            return self._open()
        except BaseException:
            self.__exit__()
            raise

    def _open(self) -> int:
        if self._acceptor is not None:
            raise SSHError("a Forward can be entered only once: make another one")
        if not is_connected(self._ssh):
            raise SSHError("the connection to the host is closed: open another one")
        address = (LOOPBACK, self._local_port)
        try:
            listener = socket.create_server(address, backlog=FORWARD_BACKLOG)
        except OSError as error:
            raise OSError(
                error.errno, f"local_port {self._local_port} can't be used: {error.strerror}"
            ) from error
        try:
            listener.settimeout(FORWARD_POLL)
            self._local_port = listener.getsockname()[1]
            self._acceptor = start_thread(f"forward-{self._local_port}", self._accept_all, listener)
        except BaseException:
            listener.close()
            raise
        logger.debug("forwarding port %d to port %d", self._local_port, self._remote_port)
        return self._local_port

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._acceptor is not None:
            self._acceptor.join()
        for link in self._links:
            link.close_socket()
        if self._links:
            # Closing a channel hangs if the host accepts no data; no thread would end.
            with Watchdog() as watchdog, watchdog.limit(FORWARD_PATIENCE, self._transport.close):
                for link in self._links:
                    link.close_channel()
        if self._owns:
            self._ssh.close()
        deadline = time.monotonic() + FORWARD_LEAVING
        for link in self._links:
            link.thread.join(max(0.0, deadline - time.monotonic()))

    def _accept_all(self, listener: socket.socket) -> None:
        with listener:
            while not self._closing.is_set():
                try:
                    sock, peer = listener.accept()
                except TimeoutError:
                    continue
                except OSError as error:  # too many open files, most likely
                    logger.warning("port %d can't accept a connection: %s", self._local_port, error)
                    self._closing.wait(FORWARD_POLL)
                    continue
                self._links = [link for link in self._links if link.thread.is_alive()]
                try:
                    self._links.append(_Link(self._open_channel, sock, peer))
                except RuntimeError as error:  # too many threads
                    logger.warning("port %d dropped a connection: %s", self._local_port, error)
                    sock.close()

    def _open_channel(self, peer: tuple[str, int]) -> Any:
        """Connect to the port on the host; return None if that fails."""
        try:
            return self._transport.open_channel(
                "direct-tcpip", (REMOTE_HOST, self._remote_port), peer, timeout=FORWARD_OPENING
            )
        except connection_errors() as error:
            if not self._closing.is_set():
                text = "port %d of the host accepted no connection: %s"
                logger.log(self._log_level, text, self._remote_port, reason(error))
            return None


class _Link:
    """Forward one connection: a local socket, a channel, and a thread for each direction.

    Parameters:
        open_channel: returns the channel, or None.
        sock: the local socket.
        peer: its other end.

    Attributes:
        thread: the thread that ends when both directions have ended.
    """

    def __init__(self, open_channel: Callable[..., Any], sock: socket.socket, peer: Any) -> None:
        self._open_channel = open_channel
        self._sock = sock
        self._peer = peer
        self._channel: Any = None
        self._closing = False
        self._complete = False  # all data from the host was passed on
        self.thread = start_thread("forwarded", self._run)

    def close_socket(self) -> None:
        """End the local side, which ends the thread that reads from it."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close_channel(self) -> None:
        """End the host's side, which ends the thread that reads from it."""
        if self._channel is not None:
            with contextlib.suppress(*connection_errors()):
                self._channel.close()

    def _run(self) -> None:
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._channel = self._open_channel(self._peer)
            if self._channel is not None and not self._closing:
                sender = start_thread("forwarded-out", self._send)
                self._receive()
                sender.join()
        except (OSError, RuntimeError) as error:
            logger.debug("a forwarded connection ended: %s", error)
        finally:
            if not self._complete:  # reset it, so that the data does not look complete
                with contextlib.suppress(OSError):
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._sock.close()
            self.close_channel()

    def _receive(self) -> None:
        """Copy from the host to the local socket."""
        try:
            while data := self._channel.recv(FORWARD_CHUNK):
                self._sock.sendall(data)
            if self._channel.eof_received:
                self._complete = True
                self._sock.shutdown(socket.SHUT_WR)
                return
        except connection_errors() as error:
            logger.debug("a forwarded connection ended: %s", error)
        # Nothing more can be delivered: end the other direction as well.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        self.close_channel()

    def _send(self) -> None:
        """Copy from the local socket to the host."""
        try:
            while data := self._sock.recv(FORWARD_CHUNK):
                self._channel.sendall(data)
            self._channel.shutdown_write()
        except connection_errors() as error:
            logger.debug("a forwarded connection ended: %s", error)
            self.close_channel()


class HTTPWait:
    """Check the arguments of ``wait_for_http``, and wait.

    Parameters:
        read: returns the order with an id.

    Attributes:
        url: the public address to request; None to request ``port`` on the host.
        port: the port of the service.
    """

    def __init__(
        self, order: Mapping[str, Any] | int, read: Callable[[int], Order], path: str,
        port: int | None, timeout: float, progress: ProgressOptions,
    ) -> None:  # fmt: skip
        if not re.fullmatch(r"/[!-~]*", check_string("path", path)):
            raise ValueError(f"path must begin with '/' and be encoded, not {short_repr(path)}")
        self.timeout = check_number("timeout", timeout, infinite=True, unit="seconds")
        if port is not None:
            check_count("port", port, minimum=1, maximum=65535)
        if not isinstance(order, Mapping):
            order = read(check_order_id("order", order))
        self.order = Order(order)
        urls = self.order.http_urls
        if port is None and not urls:
            raise ValueError(
                "the order has no HTTP port: pass port= for a port of the host, or order with "
                "ports={'8888': 'http'}"
            )
        self.port = port
        self.path = path
        base = next(iter(urls.values())) if port is None else urls.get(str(port))
        self.url = None if base is None else base.rstrip("/") + path
        self.where = self.url or f"port {port} of the host"
        self.progress = progress

    def at_public_address(self, user_agent: str) -> int:
        """Wait for a response from the public address, and return its status."""
        with Session(user_agent) as session:
            return self._wait(session, self.url or "")

    def on_host(self, ssh: paramiko.SSHClient, user_agent: str) -> int:
        """Wait for a response from the port of the host, over SSH, and return its status."""
        level = logging.DEBUG  # one failed connection after the other is normal here
        forward = Forward(ssh, self.port or 0, log_level=level)
        with forward as local_port, Session(user_agent) as session:
            session.trust_env = False  # no proxy
            session.headers["Host"] = f"{REMOTE_HOST}:{self.port}"
            session.headers["Connection"] = "close"
            return self._wait(session, f"http://{LOOPBACK}:{local_port}{self.path}", ssh)

    def _wait(self, session: Session, url: str, ssh: Any = None) -> int:
        started = time.monotonic()
        with self.progress.reporting() as report:
            while True:
                if ssh is not None and not is_connected(ssh):
                    raise SSHError("the connection to the host broke")
                answer = self._get(session, url)
                passed = time.monotonic() - started
                if isinstance(answer, int) and answer not in NOT_YET_STATUSES:
                    return answer
                why = f"HTTP {answer}" if isinstance(answer, int) else answer
                logger.debug("no service at %s yet: %s", self.where, why)
                if report is not None:
                    text = f"no service at {self.where} yet: {why}, {readable_seconds(passed)}"
                    report(ProgressEvent("http", passed, text))
                if passed >= self.timeout:
                    break
                time.sleep(min(SERVICE_PAUSE, self.timeout - passed))
        error = WaitTimeoutError(
            f"no service at {self.where} within {self.timeout:g}s, the last result: {why}. Does it "
            "listen on 0.0.0.0 and on the right port?",
            order_id=self.order.id or 0, order=self.order,
        )  # fmt: skip
        error.reason = why
        raise error

    def _get(self, session: Session, url: str) -> int | str:
        """Return the status of a response, or why there is none."""
        exchange.begin(lambda: None, lambda: None, time.monotonic() + SERVICE_LIMIT)
        try:
            response = session.get(
                url, timeout=SERVICE_LIMIT, allow_redirects=False, stream=True,
                auth=lambda request: request,  # else requests would send a password of ~/.netrc
            )  # fmt: skip
            response.close()
            return response.status_code
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise CloreConnectionError(
                    f"the certificate of {self.where} is not valid: {printable(str(error), 300)}"
                ) from error
            if isinstance(error, requests.Timeout):
                return f"no response within {SERVICE_LIMIT:g}s"
            cause = reason_of(error)
            if getattr(cause, "args", ()) and isinstance(cause.args[-1], Exception):
                cause = cause.args[-1]  # inside of a ProtocolError
            if self.url is None and isinstance(cause, ConnectionError):  # of the forwarded port
                return "the connection was refused, or closed without a response"
            return printable(str(cause) or type(error).__name__, 200)
        finally:
            exchange.begin(lambda: None, lambda: None, math.inf)


# ==================================================================================================
# client
#
# CloreClient, with one method for each task.
# ==================================================================================================


C = TypeVar("C", bound="CloreClient")
PathArgument = str | os.PathLike[str]
Progress = Callable[[str, int, int], object]
OrderArgument = Mapping[str, Any] | int  # a record of an order, or its number


class CloreClient(HTTPClient):
    """A client for the Clore.ai GPU marketplace.

    Records always have the documented form, for each form of the API: prices in USD per hour,
    reliability from 0 to 100, an ``order_id`` and a ``status`` for each order.

    Requests with the same key are at least ``rate_limit`` seconds apart, across all processes of
    this user on this machine, and orders at least ``create_order_interval`` seconds. With
    ``rate_limiter`` that holds across many machines. One request takes at most three times
    ``timeout``, even when its response arrives slowly.

    One call sends its request at most ``max_retries`` times. After a lost or broken response, only
    reads, ``cancel_order``, ``cancel_orders`` and ``set_spot_price`` are retried. Any other POST is
    retried only when it never left this machine, or when it hit the API's rate limit. The client
    waits between retries: an exponential backoff with full jitter. A request that hit the API's
    rate limit is retried for ``rate_limit_wait`` seconds instead, and slows the later ones down. If
    the API asks for a longer pause in ``Retry-After``, :class:`RateLimitError` is raised at once.
    Cancels, and the reads that confirm them, ignore that pause and wait 1, 2, 4 ... 30 seconds.

    Parameters:
        api_key: sent as the header ``auth``. With None or ``""``, the client takes the environment
            variable ``CLORE_API_KEY``, then ``~/.clore/config.json``. Without a key, only the
            marketplace can be read.
        timeout: seconds for one request, as a number or a ``(connect, read)`` pair.
        rate_limit: the smallest number of seconds between two requests with the same key. The API
            allows one request per second (seen on the live API).
        max_retries: how many times one request is sent at most, including the first; at least 1.
            Requests that hit the API's rate limit do not count.
        base_url: with None, the client takes the environment variable ``CLORE_BASE_URL``, then the
            class attribute ``BASE_URL``. A key is sent over https only, or to a loopback address.
        create_order_interval: seconds between two orders. The API allows one in five seconds (seen
            on the live API).
        backoff: the longest first backoff, in seconds; it doubles with each retry.
        max_backoff: the longest backoff, in seconds.
        user_agent: added to the User-Agent, for example ``"my-tool/1.0"``.
        max_usd_per_hour: refuse every order and bid above this price, before it is sent.
        max_active_orders: refuse a new order when this many are active.
        state_dir: the folder for the journal of :meth:`rent`, logins, host keys, the history of
            hosts, and the shared rate limit; None saves nothing.
        max_response_mb: the largest response in megabytes, decompressed; a larger one is an error.
        order_lag: seconds by which the order lists may lag behind a change (up to 20, seen on the
            live API). An order that is in no list counts as ended only after that time.
        rate_limit_wait: seconds for which a request that hit the API's rate limit is retried.
        rate_limiter: shares the rate limit with other machines: a URL such as
            ``"redis://host:6379/0"``, or a client such as ``redis.Redis``. With None, the client
            takes the environment variable ``CLORE_RATE_LIMITER``. While Redis fails, the rate limit
            is shared on this machine only.
        remember_credentials: save the password, the Jupyter token and the fingerprint of the key
            that were sent with an order in ``state_dir``, in a file for this user only, until the
            order has ended. Each process can then log in with the order's id. False keeps them
            in memory.

    Raises:
        ConfigurationError: a key, a base URL or a settings file can't be used.

    Example:
        >>> with CloreClient() as client:
        ...     server = client.find_cheapest("RTX 4090", 0.5, currency="CLORE")
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
        rate_limiter: str | RedisClient | None = None,
        remember_credentials: bool = True,
    ) -> None:
        # Error reporters show local variables.
        api_key, rate_limiter = Secret.of(api_key), Secret.of(rate_limiter)
        super().__init__(
            api_key, timeout, rate_limit, max_retries, base_url=base_url,
            create_order_interval=create_order_interval, backoff=backoff, max_backoff=max_backoff,
            user_agent=user_agent, max_response_mb=max_response_mb,
            rate_limit_wait=rate_limit_wait, state_dir=state_dir, rate_limiter=rate_limiter,
        )  # fmt: skip
        self.max_usd_per_hour = check_optional_number(
            "max_usd_per_hour", max_usd_per_hour, unit="USD per hour"
        )
        if max_active_orders is not None:
            check_count("max_active_orders", max_active_orders)
        self.max_active_orders = max_active_orders
        self.order_lag = check_interval("order_lag", order_lag)
        self._market = Market(self)
        remembered = check_bool("remember_credentials", remember_credentials)
        credentials = Credentials(lambda: self._state_folder if remembered else None)
        self._orders = AccountOrders(self, self._market, credentials)
        self._host_history = HostHistory(self._state_folder, lambda: self.base_url)
        self._ssh_access: SSHAccess | None = None  # made on first use, as it imports paramiko

    def __copy__(self: C) -> C:
        """Return another client with the same settings and key, and the same known orders."""
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
        """Return a client with the key from the environment or the official tools' file.

        Parameters:
            **options: arguments of the client, except ``api_key``.

        Raises:
            ConfigurationError: no key was found, or it can't be used. The error names the places.

        Example:
            >>> client = CloreClient.from_env(timeout=10)
        """
        if "api_key" in options:
            raise TypeError("from_env() takes no api_key: pass it to the class itself")
        require_key()
        return cls(**options)

    def describe(self) -> str:
        """Return a text about the key, the base URL and the rate limit.

        It shows at most the last four characters of the key.

        Returns:
            Three lines: where the key and the base URL come from, and who shares the rate limit. If
            that is not what the settings ask for, it says for how long, and why.

        Example:
            >>> print(client.describe())
            a key that ends in '3f9a', from environment variable CLORE_API_KEY
            base URL https://api.clore.ai, from class attribute CloreClient.BASE_URL
            rate limit 1.1 s, shared among all processes on this machine, by /home/me/.local/...
        """
        key, url = self.api_key, self.BASE_URL
        if key:
            key_line = self._described_key(key)
        else:
            found = self._key_source[0]
            where = f"in {KEY_VARIABLE} or {CONFIG_FILE}" if key == found else "any more"
            key_line = f"no key {where}"
        url_found, url_source = self._url_source
        if url != url_found:
            own = "BASE_URL" in self.__dict__
            url_source = "attribute" if own else f"class attribute {type(self).__name__}.BASE_URL"
        try:
            level = self._limiter(self.base_url, key or "").level
        except ConfigurationError:
            level = "with nobody, as the base URL can't be used"
        return (
            f"{key_line}\nbase URL {printable(str(url), 200)}, from {url_source}\n"
            f"rate limit {self.rate_limit:g} s, shared {printable(level, 500)}"
        )

    # --- wallets ---

    def get_wallets(self) -> WalletList:
        """Return the wallets of the account.

        Returns:
            A :class:`WalletList` of :class:`Wallet`: ``name``, ``balance`` (in its currency, may be
            None), ``deposit_address``.

        Raises:
            CloreAPIError, CloreConnectionError: the request failed; see the README, "Errors".

        Example:
            >>> [wallet["name"] for wallet in client.get_wallets()]
            ['bitcoin', 'CLORE-Blockchain', 'USD-Blockchain']
        """
        return WalletList(to_wallets(self._request("GET", "/v1/wallets")))

    def get_balance(self, currency: str = "CLORE-Blockchain") -> float:
        """Return the balance of one wallet, in its currency.

        Parameters:
            currency: part of the wallet's name, in any case, or ``BTC``, ``CLORE``, ``USD``.

        Returns:
            The balance of the first wallet that matches; 0.0 if it has no balance, or the account
            has no wallet for this currency.

        Raises:
            ValueError: it is neither a currency nor part of a wallet's name; the error has names.

        Example:
            >>> client.get_balance("USD")
            12.5
        """
        check_text("currency", currency)
        return balance_of(self.get_wallets(), currency)

    def get_balances(self) -> WalletList:
        """Return the wallets of the account, with their balances in USD.

        The exchange rates come from the marketplace, which is read if they are not known yet.

        Returns:
            A :class:`WalletList`, as from :meth:`get_wallets`; ``balance_usd`` is None if the API
            has no exchange rate.

        Example:
            >>> [(wallet.name, wallet.balance_usd) for wallet in client.get_balances()]
            [('bitcoin', 0.0), ('CLORE-Blockchain', 3.25), ('USD-Blockchain', 12.5)]
        """
        return WalletList(read_balances(self._orders))

    def hours_left(
        self,
        server_or_order: Server | Order | int,
        *,
        currency: str = "CLORE-Blockchain",
    ) -> float | None:
        """Return for how many hours a wallet pays its orders, with the renter's fees.

        All active orders of the account that are paid from the same wallet count.

        Parameters:
            server_or_order: an active order or its id; or a :class:`Server` that would be rented
                on demand in addition.
            currency: the currency to pay a server with. An order has its own.

        Returns:
            Hours; ``inf`` if nothing is paid from the wallet; None if the price is not known.

        Raises:
            OrderNotFoundError: the account has no such active order.

        Example:
            >>> client.hours_left(order)
            41.7
        """
        return hours_left(self._orders, server_or_order, check_currency("currency", currency))

    # --- the marketplace ---

    def get_marketplace(self, include_rented: bool = False) -> ServerList:
        """Return the servers of the marketplace, in the API's order. Needs no key.

        Parameters:
            include_rented: include the servers that are rented now.

        Returns:
            A :class:`ServerList` of :class:`Server`: ``id``, ``gpu_array``, ``price`` (``usd`` in
            it is in USD per hour), ``reliability`` (0 to 100), ``rented``, ``specs``, ...

        Example:
            >>> len(client.get_marketplace())
            1873
        """
        check_bool("include_rented", include_rented)
        return ServerList(self._market.read().servers(include_rented=include_rented))

    def find_servers(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
        *,
        cache_seconds: float = 0.0,
        **filters: Unpack[SearchFilters],
    ) -> ServerList:
        """Return the servers that can be rented now and fit all filters, the cheapest first.

        A server without the field that a filter needs is left out. Servers with the same price
        keep the API's order. A server without a price, or with one that is not above 0, comes last
        and never passes a price limit. The API adds fees to the prices: 5 % on demand, 1.25 % spot
        (seen on the live API).

        Parameters:
            gpu_type: a GPU's name or a part of it, in any spelling: ``"4090"``, ``"RTX4090"``,
                ``"NVIDIA GeForce RTX 4090"``. Whole words win: ``"A10"`` is not A100.
            max_price_usd: the highest price, in USD per hour.
            min_reliability: the lowest reliability, 0 to 100.
            use_spot: filter and sort by the lowest spot bid that the host accepts.
            cache_seconds: use a list of servers that was read at most so many seconds ago with
                this argument; 0 always reads it.
            gpu_count, min_gpu_count: the number of GPUs. In a mixed rig, only those that match
                ``gpu_type`` count.
            exact_gpu: accept only GPUs with the same name: not the Ti or SUPER.
            min_vram_gb, min_total_vram_gb: the memory in GB of one GPU, and of all that match, by
                the nominal size: an RTX 4090 has 24 GB, although the API says 23.
            min_ram_gb, min_cpu_cores, min_disk_gb: the memory in GB, the CPU cores, the disk in GB.
            min_disk_mbps: the speed of the disk, in MB per second.
            min_download_mbps, min_upload_mbps: the speed of the network, in Mbit per second.
            min_cuda: the lowest CUDA version, such as 12.4 or ``"12.4"``.
            min_pcie_width: the lowest number of PCI Express lanes.
            countries, exclude_countries: lists of two-letter codes, continents (``"Asia"``),
                ``"EU"`` and ``"EEA"``.
            currency: a currency that the host accepts, and whose price counts.
            min_rating, min_ratings: the average rating, 0 to 5, and the number of ratings.
            min_rental_hours: how long the server can be rented, in hours.
            exclude_servers, exclude_owners: lists of ids.
            max_price_per_gpu_usd: the highest price for one matching GPU, in USD per hour.
            include_fees: compare the price limits with prices that include the published fee.
            sort: ``"price"``, ``"price_per_gpu"``, ``"reliability"``, ``"vram"``, ``"download"``,
                ``"rating"``, or a function of a :class:`Server`, as for ``sorted()``.
            limit: return at most so many servers.
            where: a function that gets a :class:`Server`, and returns whether it fits.

        Returns:
            A :class:`ServerList`, which may be empty; its ``explain()`` says what was left out. If
            no GPU has the name, a warning in the log has the nearest names.

        Raises:
            ValueError, TypeError: an argument is not valid; nothing was sent.

        Example:
            >>> found = client.find_servers("RTX 4090", max_price_usd=0.5, min_gpu_count=2,
            ...                             countries=["EU"], min_ram_gb=60)
            >>> found[0].gpu_name, found[0].usd_per_gpu_hour
            ('RTX 4090', 0.125)
        """
        search = Search(
            gpu_type, max_price_usd, min_reliability, use_spot, filters, method=self.find_servers
        )
        check_number("cache_seconds", cache_seconds, unit="seconds")
        found, report = search.run(self._market.listing(cache_seconds))
        servers = ServerList(found)
        servers.report = report
        return servers

    def find_cheapest(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
        *,
        cache_seconds: float = 0.0,
        **filters: Unpack[SearchFilters],
    ) -> Server | None:
        """Return the first server of :meth:`find_servers`, which takes the same parameters.

        Returns:
            A :class:`Server`, or None if no server fits.

        Example:
            >>> client.find_cheapest("RTX 4090").usd_per_hour
            0.125
        """
        servers = self.find_servers(
            gpu_type, max_price_usd, min_reliability, use_spot, cache_seconds=cache_seconds,
            **filters,
        )  # fmt: skip
        return servers[0] if servers else None

    def plot_prices(
        self, servers: Sequence[Server] | None = None, path: PathArgument | None = None
    ) -> Any:
        """Plot prices per GPU hour by model against the reliability. Needs matplotlib.

        The ten most frequent models have a color each. The prices have a log scale.

        Parameters:
            servers: the servers, for example from :meth:`find_servers`; None takes all that can be
                rented now.
            path: a picture to write, a ``.png``, ``.svg`` or ``.pdf``; with None, a notebook shows
                the plot, and a script needs ``matplotlib.pyplot.show()``.

        Returns:
            The ``matplotlib.axes.Axes``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError, TypeError: an argument is not valid, or no server has a price and a
                reliability.

        Example:
            >>> client.plot_prices(client.find_servers("RTX"), "prices.png")
        """
        check_plot(servers, path)
        return plot_server_prices(self.get_marketplace() if servers is None else servers, path)

    def gpu_models(self, *, cache_seconds: float = 0.0) -> list[str]:
        """Return the names of all GPU models on the marketplace, rented ones too. Needs no key.

        Parameters:
            cache_seconds: as for :meth:`find_servers`.

        Returns:
            A sorted list; a model that hosts spell in several ways is in it once.

        Example:
            >>> client.gpu_models()[:3]
            ['A100', 'GTX 1080', 'GTX 1080 Ti']
        """
        check_number("cache_seconds", cache_seconds, unit="seconds")
        summaries = summarize(self._market.listing(cache_seconds))
        return sorted((summary.gpu for summary in summaries), key=str.lower)

    def market_summary(
        self,
        *,
        include_rented: bool = False,
        include_fees: bool = False,
        cache_seconds: float = 0.0,
    ) -> list[ModelSummary]:
        """Return counts and prices for each GPU model on the marketplace. Needs no key.

        A mixed rig counts for each of its models, but not for the prices.

        Parameters:
            include_rented: take the prices of rented servers too, and not only of free ones.
            include_fees: add the published fees to the prices.
            cache_seconds: as for :meth:`find_servers`.

        Returns:
            A list of :class:`ModelSummary`, the model with the most GPUs first: ``gpu``,
            ``servers``, ``servers_free``, ``gpus``, ``gpus_free``; and in USD per hour for one GPU
            ``lowest_usd``, ``median_usd``, ``p90_usd`` (on demand), ``spot_lowest_usd``,
            ``spot_median_usd``, ``spot_p90_usd`` (None without a price). ``pandas.DataFrame()``
            takes the list.

        Example:
            >>> summary = client.market_summary()[0]
            >>> summary.gpu, summary.gpus_free, summary.median_usd
            ('RTX 4090', 412, 0.219)
        """
        check_bool("include_rented", include_rented)
        check_bool("include_fees", include_fees)
        check_number("cache_seconds", cache_seconds, unit="seconds")
        listing = self._market.listing(cache_seconds)
        return summarize(listing, include_rented=include_rented, include_fees=include_fees)

    def estimate_cost(
        self,
        server: Server | int,
        hours: float,
        *,
        currency: str = "CLORE-Blockchain",
        use_spot: bool = False,
        spot_price: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of a rental, with all fees.

        The fees of the account are read once. Without a key, the published fees are used: 5 % on
        demand, 1.25 % spot, and 0.10 USD after ten minutes.

        Parameters:
            server: a server or its id; with an id, the marketplace is read.
            hours: the length of the rental.
            currency: the currency to pay with.
            use_spot: estimate a spot order, at the lowest bid that the host accepts.
            spot_price: the bid for ``use_spot``, in USD per hour.

        Returns:
            A :class:`CostEstimate`: ``usd_per_hour``, ``base_usd``, ``renter_fee_usd``,
            ``creation_fee_usd``, ``total_usd``, and the same in ``currency`` as ``base``,
            ``renter_fee``, ``creation_fee``, ``total``. An amount is None if the API has no
            price or exchange rate.

        Raises:
            CloreError: the marketplace has no server with this id.

        Example:
            >>> client.estimate_cost(server, 24).total_usd
            3.25
        """
        number = None if isinstance(server, Server) else check_id("server", server)
        check_number("hours", hours, unit="hours")
        wanted = check_currency("currency", currency)
        check_bool("use_spot", use_spot)
        if spot_price is not None:
            check_number("spot_price", spot_price, above=True, unit="USD per hour")
            if not use_spot:
                raise ValueError(f"spot_price={spot_price!r} needs use_spot=True: add that")
        listed = server if isinstance(server, Server) else self._market.get_server(number or 0)
        return estimate(
            self._market, listed, hours, currency=wanted, spot=use_spot, spot_price=spot_price
        )

    # --- orders ---

    def get_orders(self, include_completed: bool = False) -> OrderList:
        """Return the orders of the account.

        Parameters:
            include_completed: include the orders that have ended.

        Returns:
            An :class:`OrderList` of :class:`Order`: ``order_id``, ``renting_server``, ``status``,
            ``connection``, ``price`` (per hour, in the order's currency), ``started``, ...; also
            ``ssh_password`` and ``jupyter_token``, where this client knows them.

        Example:
            >>> [(order.id, order.status) for order in client.get_orders()]
            [(1958009, 'running')]
        """
        orders, _ = self._orders.read(check_bool("include_completed", include_completed))
        learn_order_rates(self._orders, orders)
        listed = (o for o in orders if include_completed or not o.has_ended)
        return OrderList(self._orders.with_login(order) for order in listed)

    def get_order(self, order_id: OrderArgument) -> Order | None:
        """Return one order, active or ended.

        The list of ended orders can be long, so it is read only if the order is not active.

        Parameters:
            order_id: the order or its number.

        Returns:
            An :class:`Order`, or None if the lists do not have it. A new order can take up to 20
            seconds to show up (seen on the live API).

        Example:
            >>> client.get_order(1958009).ssh_command
            'ssh root@n1.us.clorecloud.net -p 2060'
        """
        order = self._orders.find(check_order_id("order_id", order_id))
        if order is None:
            return None
        learn_order_rates(self._orders, [order])
        return self._orders.with_login(order)

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
        """Rent a server. It costs money from now on, until :meth:`cancel_order`.

        The request is sent once, and again only if it cannot have had an effect. The live API
        returns no order id, and a response can be lost; the client then finds the order in the
        list of orders.

        Parameters:
            server_id: the ``id`` of a server.
            image: a Docker image.
            order_type: ``"on-demand"`` or ``"spot"``.
            currency: the currency to pay with: the API's name, or ``BTC``, ``CLORE``, ``USD``.
            ports: container port -> ``"tcp"`` or ``"http"``; default ``{"22": "tcp"}``.
            env: environment variables; default ``{"NVIDIA_VISIBLE_DEVICES": "all"}``.
            ssh_password: at most 32 characters. Without it and without ``ssh_key``, the client
                generates a password and returns it as ``ssh_password`` of the order.
            ssh_key: a public key, the content of a ``.pub`` file; at most 3072 characters.
            spot_price: the bid for ``order_type="spot"``, in **USD per hour**.
            jupyter_token: at most 32 characters.
            find_timeout: seconds to wait for the order to show up.
            allow_above_on_demand: send a bid of more than ten times the server's on-demand price.
            preview: send no order, and return what would be sent: an :class:`Order` with only
                ``body`` and ``usd_per_hour`` (the listed price or the bid; None if unknown).

        Returns:
            An :class:`Order` that also has ``code`` (0).

        Raises:
            OrderOutcomeUnknownError: the order may or may not exist, or several orders match.
                Check :meth:`get_orders` before you order again. ``credentials`` has the
                password, key and token that were sent.
            ServerAlreadyRentedError, ServerOfflineError, InsufficientBalanceError,
            BidTooLowError, CurrencyNotAllowedError, DatabaseError: the API refused the order.
            InvalidInputError: there is no such server, or the API found an argument invalid.
            SpendingLimitError: a limit of the client does not allow it; no order was sent.
            RateUnknownError: the bid could not be converted; no order was sent.
            ValueError, TypeError: an argument is not valid; no order was sent.

        Example:
            >>> order = client.create_order(99173, currency="USD")
            >>> order["order_id"], order["ssh_password"]
            (1958009, 'q1nE0rNN7mBdmKyUHyKzXgLa')
        """
        ssh_password, jupyter_token = Secret.of(ssh_password), Secret.of(jupyter_token)
        env = secret_values(env)
        order = {
            "image": image, "order_type": order_type, "currency": currency, "ports": ports,
            "env": env, "ssh_password": ssh_password, "ssh_key": ssh_key,
            "jupyter_token": jupyter_token,
        }  # fmt: skip
        purchase = Purchase(self._orders, server_id, order)
        check_number("find_timeout", find_timeout, unit="seconds")
        check_bool("allow_above_on_demand", allow_above_on_demand)
        check_bool("preview", preview)
        purchase.set_bid(spot_price, allow_above_on_demand)
        if preview:
            return purchase.preview()
        purchase.learn_rate()
        return purchase.place(find_timeout)

    def cancel_order(
        self,
        order_id: OrderArgument,
        issue: str | None = None,
        *,
        confirm: bool = False,
        confirm_timeout: float = 60.0,
        settle_timeout: float | None = None,
    ) -> bool:
        """Cancel an order, so that it costs nothing from now on. Safe to repeat.

        If the API refuses, or the response is lost, the client checks the order lists and sends the
        cancel again. An order that is missing from the lists only for a moment has not ended.

        Parameters:
            order_id: the order or its number.
            issue: a report of what was wrong with the server; cut at 2048 characters.
            confirm: wait until the order is listed as ended, or missing from all lists for
                ``order_lag`` seconds.
            confirm_timeout: seconds to wait for that.
            settle_timeout: seconds to keep trying after a refusal or a lost response (default 30);
                0 checks the lists once.

        Returns:
            True, also if the order had already ended.

        Raises:
            OrderNotFoundError: the account has no such order.
            CancelUnconfirmedError: the order may still be running; ``order_ids`` has its number.
            CloreError: the request was not sent, or the API refused the key or the rate. The order
                may still be running.

        Example:
            >>> client.cancel_order(1958009)
            True
        """
        wanted = check_order_id("order_id", order_id)
        check_bool("confirm", confirm)
        check_number("confirm_timeout", confirm_timeout, infinite=True, unit="seconds")
        check_optional_number("settle_timeout", settle_timeout, unit="seconds")
        if issue is not None:
            check_string("issue", issue)
        cancellation = limited(
            lambda: cancel_order(self._orders, wanted, issue, settle_timeout), urgent=True
        )
        if confirm:
            confirm_ended([cancellation], confirm_timeout)
        return True

    def cancel_all(self, *, confirm: bool = True, confirm_timeout: float = 60.0) -> list[int]:
        """Cancel every active order of the account, also those of other programs.

        Parameters:
            confirm: wait until the orders have ended, as in :meth:`cancel_order`.
            confirm_timeout: seconds to wait for that.

        Returns:
            The ids of the orders that were active.

        Raises:
            CancelUnconfirmedError: some orders may still be running; ``order_ids`` has them.

        Example:
            >>> client.cancel_all()
            [1958009, 1958010]
        """
        check_bool("confirm", confirm)
        check_number("confirm_timeout", confirm_timeout, infinite=True, unit="seconds")
        return limited(lambda: cancel_all(self._orders, confirm, confirm_timeout), urgent=True)

    def cancel_orders(self, order_ids: Iterable[OrderArgument]) -> dict[str, Any]:
        """Cancel several orders, with one API call for each 64 orders.

        Parameters:
            order_ids: the orders or their numbers; if empty, nothing is sent.

        Returns:
            The API's response as a dict, with the ids that failed in ``failed_to_cancel``.

        Example:
            >>> client.cancel_orders([1958009, 1958010])["failed_to_cancel"]
            []
        """
        return cancel_orders(self._orders, check_order_ids("order_ids", order_ids))

    def wait_for_order(
        self,
        order_id: OrderArgument,
        timeout: float = 300,
        poll_interval: float = 5.0,
        target_status: str = "running",
        *,
        on_update: Callable[[Order | None], object] | None = None,
        on_progress: Report | None = None,
        progress: bool = False,
    ) -> Order:
        """Wait until an order has a status.

        A new order shows up after 2 to 20 seconds and usually runs after 30 to 120 (seen on the
        live API). A poll that fails is repeated. The order is not cancelled after a timeout: it may
        still be running, and cost money.

        Parameters:
            order_id: the order or its number.
            timeout: seconds to wait; ``float("inf")`` waits forever.
            poll_interval: seconds between two polls.
            target_status: ``"running"``, ``"creating"``, ``"cancelled"`` or ``"expired"``; the
                last two count as the same.
            on_update: called after each poll with the :class:`Order`, or None while it is in no
                list. An exception that it raises ends the wait.
            on_progress: called with a :class:`ProgressEvent` at each step: it has a ``name``, a
                ``number``, and a ``text`` for people.
            progress: show these events in a terminal or notebook: with tqdm if it is installed,
                else as lines on stderr. In a pipe, nothing is shown.

        Returns:
            The :class:`Order` with that status.

        Raises:
            OrderEndedError: the order ended before it had the status.
            UnknownOrderError: the account has no such order, so the client does not wait; also an
                ``OrderNotFoundError`` and a ``WaitTimeoutError``. An order that was made elsewhere
                seconds ago may not be listed yet.
            WaitTimeoutError: it did not have the status in time; also a ``TimeoutError``.
                ``reason`` says if it never showed up or is still creating.

        Example:
            >>> client.wait_for_order(1958009, timeout=120).ssh_command
            'ssh root@n1.us.clorecloud.net -p 2060'
        """
        wanted = check_order_id("order_id", order_id)
        check_number("timeout", timeout, infinite=True, unit="seconds")
        check_interval("poll_interval", poll_interval)
        check_text("target_status", target_status)
        check_callback("on_update", on_update, 1)
        with ProgressOptions(on_progress, progress).reporting() as report:
            order = wait_for_status(
                self._orders, wanted, timeout, poll_interval, target_status, on_update, report
            )
        learn_order_rates(self._orders, [order])
        return self._orders.with_login(order)

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
        prefer_known: bool = False,
        on_progress: Report | None = None,
        progress: bool = False,
        **filters: Unpack[ServerFilters],
    ) -> Rental:
        """Rent a server for the length of a ``with`` block, and cancel the order at its end.

        The client orders the cheapest server that fits, and waits until it runs. It tries the next
        server if one has just been rented, is offline, does not accept the currency, or is refused
        with code 1. It also tries the next one if an order costs more than the limit or does not
        run in time; it first confirms that this order has ended.

        The order is cancelled, and its end confirmed, when the block ends in any way: also by
        Ctrl-C, SIGTERM, SIGHUP or the exit of the interpreter. A second Ctrl-C skips the
        confirmation. Three within two seconds stop the cancelling too. After a killed process,
        :meth:`leftovers` finds the orders that still run.

        A worker thread orders, cancels and confirms, because signals do not interrupt it. After
        code 1, an order may still exist: the worker looks for it, and cancels it.

        The worker also checks ``max_hours`` and ``max_cost_usd``: it cancels the order and closes
        the rental's SSH connections. It does not interrupt other code in the block, and it can do
        nothing while the process is dead or this machine is asleep.

        Parameters:
            gpu_type, min_reliability, use_spot: as for :meth:`find_servers`.
            max_price_usd: the highest price in USD per hour when paid in ``currency``; without
                fees, unless ``include_fees=True``.
            **filters: all other filters of :meth:`find_servers`: ``gpu_count``, ``countries``,
                ``where``, ... With ``sort``, the servers are tried in that order.
            server_id: try only this server.
            image, currency, ports, env, ssh_password, ssh_key, jupyter_token, find_timeout: as for
                :meth:`create_order`.
            spot_price: the bid for ``use_spot``, in USD per hour; default the lowest that the host
                accepts.
            attempts: how many servers to try at most.
            deploy_timeout: seconds to wait until an order runs.
            poll_interval: seconds between two polls.
            cancel_timeout: seconds to keep sending the cancel, independent of ``max_retries``, and
                at most as many seconds to confirm the end.
            max_hours: hours after which the rental ends.
            max_cost_usd: cost in USD, with fees, at which the rental ends.
            prefer_known: try the hosts first that worked in the last day. Those that did not
                deploy, had no sshd, or refused the login always come last; see
                :meth:`host_history`.
            on_progress, progress: as for :meth:`wait_for_order`.

        Returns:
            A :class:`Rental`, which orders when its block begins: ``order``, ``server``,
            ``status``, ``cost_usd``, ``ssh()``, ``run()``, ``forward()``, ``keep()``, ``cancel()``.
            Without a block, in a notebook, ``start()`` begins it and ``close()`` ends it.

        Raises:
            RentalError: no server worked; ``tried`` has the reason for each. If no server fits the
                filters, the text has the filter that left out the last ones, and their lowest
                price.
            CancelUnconfirmedError: an order may still be running.
            OrderOutcomeUnknownError: an order may or may not exist.
            BudgetExceededError: a limit is reached; raised by calls of the rental and at the end
                of the block.

        Example:
            >>> with client.rent("RTX 4090", max_price_usd=0.40, max_hours=2) as rental:
            ...     print(rental.run("nvidia-smi -L").stdout)
        """
        ssh_password, jupyter_token = Secret.of(ssh_password), Secret.of(jupyter_token)
        env = secret_values(env)
        order = {
            "image": image, "currency": currency, "ports": ports, "env": env,
            "ssh_password": ssh_password, "ssh_key": ssh_key, "jupyter_token": jupyter_token,
        }  # fmt: skip
        settings = RentalSettings(
            search=Search(
                gpu_type, max_price_usd, min_reliability, use_spot, filters, currency, self.rent
            ),
            server_id=server_id, order=order, spot_price=spot_price, attempts=attempts,
            deploy_timeout=deploy_timeout, poll_interval=poll_interval, find_timeout=find_timeout,
            cancel_timeout=cancel_timeout, max_hours=max_hours, max_cost_usd=max_cost_usd,
            prefer_known=prefer_known,
        )  # fmt: skip
        shown = ProgressOptions(on_progress, progress)
        return Rental(self, self._orders, settings, self._state_folder, self._host_history, shown)

    def rent_many(
        self, count: int, *filters: Any, min_count: int | None = None, **options: Any
    ) -> RentalGroup:
        """Rent several servers for the length of a ``with`` block, and cancel all at its end.

        They deploy at the same time, each on a server of its own; the API allows one order in five
        seconds. If fewer than ``min_count`` run, all are cancelled. All rentals end together, each
        one in the same way as that of :meth:`rent`.

        Parameters:
            count: the number of servers.
            *filters, **options: as for :meth:`rent`; ``attempts``, ``max_hours`` and
                ``max_cost_usd`` count for each rental. ``on_progress`` is called in the threads of
                the rentals, one call at a time; the text of each event names the server or the
                order. An exception that it raises ends all rentals, and is raised.
            min_count: how many must run; default all.

        Returns:
            A :class:`RentalGroup`, a sequence of :class:`Rental` with ``run()``, ``map()`` and
            ``cost_usd``.

        Raises:
            RentalError: too few servers worked; none is rented.

        Example:
            >>> with client.rent_many(3, "RTX 4090", max_price_usd=0.40) as rentals:
            ...     for result in rentals.run("nvidia-smi -L"):
            ...         print(result.stdout)
        """
        check_count("count", count, minimum=1, maximum=64)
        least = count if min_count is None else min_count
        check_count("min_count", least, minimum=1, maximum=count)
        if options.get("server_id") is not None:
            raise TypeError("rent_many() takes no server_id, because it rents several servers")
        options = {k: secret_values(Secret.of(v)) if k in SECRET_FIELDS else v
                   for k, v in options.items()}  # fmt: skip
        # All rentals share the rate limit, and the orders should not wait for the polls.
        options.setdefault("poll_interval", max(5.0, 2.0 * count))
        rentals = [self.rent(*filters, **options) for _ in range(count)]
        return RentalGroup(rentals, least)

    def attach(
        self,
        order: OrderArgument,
        *,
        end: bool = False,
        max_hours: float | None = None,
        max_cost_usd: float | None = None,
        cancel_timeout: float = 300.0,
    ) -> Rental:
        """Return a rental for an order that already exists; any process may have made it.

        Without ``end``, it can be used with and without a block, and never ends the order. With
        ``end``, it begins with its block or ``start()``, and ends the order as :meth:`rent` does.

        Parameters:
            order: the order or its number.
            end: whether the end of the block ends the order.
            max_hours, max_cost_usd, cancel_timeout: as for :meth:`rent`, with ``end`` only. They
                count from the start of the order.

        Returns:
            A :class:`Rental`.

        Raises:
            OrderEndedError, OrderNotFoundError: the order has ended, or does not exist.

        Example:
            1958009).run("nvidia-smi -L").stdout
            'GPU 0: NVIDIA GeForce RTX 4090'
        """
        wanted = check_order_id("order", order)
        if not check_bool("end", end) and (max_hours is not None or max_cost_usd is not None):
            raise ValueError(
                "max_hours and max_cost_usd need end=True: add that, or leave them out"
            )
        running = self._orders.with_login(self._orders.running(wanted))
        settings = RentalSettings.of_order(
            running, max_hours=max_hours, max_cost_usd=max_cost_usd, cancel_timeout=cancel_timeout
        )
        return AttachedRental(
            self, self._orders, settings, self._state_folder, self._host_history, running, end
        )

    def host_history(self) -> list[dict[str, Any]]:
        """Return what happened on the hosts that :meth:`rent` tried in the last day.

        Returns:
            A list of dicts, the newest first: ``server_id``, ``outcome`` (``"worked"``, ``"not
            deployed"``, ``"no sshd"`` or ``"login refused"``) and ``time`` (Unix time).

        Example:
            >>> client.host_history()
            [{'server_id': 99173, 'outcome': 'worked', 'time': 1784203200.5}]
        """
        seen = self._host_history.outcomes()
        hosts = [{"server_id": server_id, **host} for server_id, host in seen.items()]
        return sorted(hosts, key=lambda host: -host["time"])

    def leftovers(self, *, wait: float = 30.0) -> Leftovers:
        """Find the orders that rentals of dead processes left running on this account.

        Parameters:
            wait: seconds to wait for an order that was just sent and may not be listed yet.

        Returns:
            :class:`Leftovers`: ``abandoned`` (orders of this machine), ``elsewhere`` (orders of
            other machines), ``kept`` (orders of this machine that stayed with ``keep()``) and
            ``unrecorded`` (active orders that are not in the journal).

        Example:
            >>> client.leftovers().abandoned
            [<Leftover order 1958009 of server 99173, by process 4711 on 'desk'>]
        """
        check_number("wait", wait, unit="seconds")
        folder = self._state_folder
        return limited(lambda: find_leftovers(self._orders, folder, wait), urgent=True)

    def cancel_leftovers(self, *, wait: float = 30.0, cancel_timeout: float = 300.0) -> list[int]:
        """Cancel the orders that :meth:`leftovers` lists as ``abandoned``, and no others.

        Parameters:
            wait: as for :meth:`leftovers`.
            cancel_timeout: seconds to keep sending each cancel.

        Returns:
            The ids of the orders, which are confirmed to have ended.

        Raises:
            CancelUnconfirmedError: some orders may still be running; ``order_ids`` has them.

        Example:
            >>> client.cancel_leftovers()
            [1958009]
        """
        check_number("wait", wait, unit="seconds")
        check_number("cancel_timeout", cancel_timeout, infinite=True, unit="seconds")
        folder = self._state_folder
        return limited(
            lambda: end_leftovers(self._orders, folder, wait, cancel_timeout), urgent=True
        )

    def cancel_overdue(self, *, cancel_timeout: float = 300.0) -> list[int]:
        """Cancel the orders of this machine that were kept, and are past their deadline.

        Call it from cron, for orders that ``rental.keep(max_hours=...)`` left running.

        Parameters:
            cancel_timeout: seconds to keep sending each cancel.

        Returns:
            The ids of the orders, which are confirmed to have ended.

        Raises:
            CancelUnconfirmedError: some orders may still be running; ``order_ids`` has them.

        Example:
            >>> client.cancel_overdue()
            [1958009]
        """
        check_number("cancel_timeout", cancel_timeout, infinite=True, unit="seconds")
        folder = self._state_folder
        return limited(lambda: end_overdue(self._orders, folder, cancel_timeout), urgent=True)

    @staticmethod
    def handle_signals() -> SignalHandling:
        """Let SIGTERM and SIGHUP end the rentals of all threads. Call it in the main thread.

        The signals then raise :class:`SignalExit`, a ``SystemExit``, in the main thread. The first
        rental that begins in the main thread does the same, without this call. A signal that
        already has a handler, or is ignored, stays as it is.

        Returns:
            A context manager; its end, or ``close()``, restores the former handlers.

        Example:
            >>> with client.handle_signals():
            ...     work_with_threads()
        """
        return SignalHandling()

    # --- the spot market ---

    def get_spot_market(self, server_id: int) -> SpotMarket:
        """Return the offers for a server on the spot market.

        Parameters:
            server_id: the ``id`` of a server.

        Returns:
            The API's response as a :class:`SpotMarket`, a dict with ``market``. Each of its
            ``offers`` also has ``usd_per_hour`` (None if there is no exchange rate). Its ``bid`` is
            per day, in its ``currency`` (seen on the live API). Properties: ``offers``,
            ``lowest_winning_usd`` and ``minimum_usd``, both in USD per hour.

        Example:
            >>> market = client.get_spot_market(99173)
            >>> market.offers[0].usd_per_hour, market.lowest_winning_usd
            (0.09016, 0.09016)
        """
        return to_spot_market(self._market.read_spot(check_id("server_id", server_id)))

    def suggest_spot_price(self, server: Server | int, margin: float = 0.05) -> float | None:
        """Return a bid that would rent a server now, in USD per hour.

        It is above the highest bid of others, or else above the lowest bid that the host accepts.
        It is at most the on-demand price, if the other bids are below that and ``server`` has it.

        Parameters:
            server: a server or its id.
            margin: how much to add, as a fraction of the bid; 0.05 is 5 %.

        Returns:
            The bid for ``spot_price`` of :meth:`create_order`; None if the API lists no bid.

        Example:
            >>> bid = client.suggest_spot_price(server)
            >>> order = client.create_order(server.id, order_type="spot", spot_price=bid)
        """
        number = check_id("server", server.id if isinstance(server, Server) else server)
        check_number("margin", margin)
        market = self.get_spot_market(number)
        if market.minimum_usd is None and not isinstance(server, Server):
            server = self._market.find_server(number) or server
        return suggested_bid(market, server, margin)

    def set_spot_price(
        self, order_id: OrderArgument, new_price: float, *, allow_above_on_demand: bool = False
    ) -> bool:
        """Change the bid of a spot order.

        The live API lets you lower a bid once in 600 seconds, by a limited step.

        Parameters:
            order_id: the order or its number.
            new_price: the new bid, in **USD per hour**.
            allow_above_on_demand: send a bid of more than ten times the server's on-demand price.

        Returns:
            True if the response has no ``error``.

        Raises:
            OrderNotFoundError: the account has no such order; no bid was sent.
            SpotPriceTooSoonError: the bid was lowered too soon; ``retry_after`` has the seconds to
                wait.
            SpotPriceStepError: the bid was lowered by too much; ``max_step`` has the largest step,
                in the order's currency per day.
            BidTooLowError: the bid is lower than the host accepts.
            RateUnknownError: the bid could not be converted; no bid was sent.

        Example:
            >>> client.set_spot_price(1958009, 0.08)
            True
        """
        wanted = check_order_id("order_id", order_id)
        check_number("new_price", new_price, above=True, unit="USD per hour")
        check_bool("allow_above_on_demand", allow_above_on_demand)
        return set_spot_price(self._orders, wanted, new_price, allow_above_on_demand)

    def lower_spot_price(self, order: OrderArgument, target: float, wait: bool = True) -> float:
        """Lower the bid of a spot order to a target, in as many steps as the API asks for.

        The live API lets you lower a bid once in 600 seconds, by a limited step.

        Parameters:
            order: the order or its id.
            target: the bid to reach, in **USD per hour**. A bid that is lower already stays.
            wait: wait between the steps; if False, take one step.

        Returns:
            The bid that was reached, in USD per hour.

        Raises:
            SpotPriceTooSoonError: with ``wait=False``, the bid was lowered too soon before.
            BidTooLowError: the target is lower than the host accepts.
            RateUnknownError: the current bid is not known in USD; no bid was sent.
            OrderEndedError, OrderNotFoundError: there is no such active order.

        Example:
            >>> client.lower_spot_price(1958009, 0.05)
            0.05
        """
        wanted = check_order_id("order", order)
        check_number("target", target, above=True, unit="USD per hour")
        check_bool("wait", wait)
        return lower_spot_price(self._orders, wanted, target, wait)

    # --- SSH ---

    @property
    def _ssh(self) -> SSHAccess:
        if self._ssh_access is None:
            self._ssh_access = SSHAccess(self._orders, self._state_folder, self._host_history)
        return self._ssh_access

    @staticmethod
    def parse_ssh_connection(order: Any) -> dict[str, Any]:
        """Parse the host, port and user from an order's ``connection.ssh``. Never raises.

        Parameters:
            order: an order in the documented form.

        Returns:
            ``{"host", "port", "user", "raw"}``; ``raw`` is the unchanged string. Missing parts are
            ``""``, 22 and ``"root"``. A host or user that is not a plain name or address counts as
            missing.

        Example:
            >>> CloreClient.parse_ssh_connection({"connection": {"ssh": "ssh root@h.net -p 2060"}})
            {'host': 'h.net', 'port': 2060, 'user': 'root', 'raw': 'ssh root@h.net -p 2060'}
        """
        return parse_ssh_command(order)

    def connect_ssh(
        self,
        order: OrderArgument,
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 120.0,
        timeout: float = 30.0,
        host_key: str = "pin",
        use_ssh_config: bool = False,
    ) -> paramiko.SSHClient:
        """Log in to the host of a running order. Needs paramiko.

        A password takes precedence over ``key_path``. Without both, the client uses the password
        in the order, or what was sent with the order, in this process or another one: the
        password, or the private key of the public key, from the SSH agent or ``~/.ssh``. Else it
        tries the agent and the user's default keys. It never forwards the agent or X11.

        Parameters:
            order: a running order or its number.
            password: the password of the user in ``connection.ssh``.
            key_path: the file of a private key: Ed25519, ECDSA or RSA.
            passphrase: the passphrase of that key, if it is encrypted.
            wait: seconds to wait until the host's sshd responds.
            timeout: seconds for each login attempt.
            host_key: ``"pin"`` accepts any host key at the first login to this order, and only the
                same key later; ``state_dir`` keeps it for other processes. A fingerprint
                (``"SHA256:..."``) accepts and pins only that key. ``"accept"`` accepts any key.
            use_ssh_config: use ``ProxyJump`` and ``IdentityFile`` for the host from
                ``~/.ssh/config``. A jump host must be in ``~/.ssh/known_hosts``.

        Returns:
            A connected ``paramiko.SSHClient``, which the caller closes.

        Raises:
            SSHError: the order has no address yet, no host responded in time, or the host refused
                the login.
            HostKeyChangedError: the host key has changed; no login was sent.
            OrderEndedError: the order has ended. The client checks this when a login fails.
            OrderNotFoundError: the account has no order with this number.
            ValueError: an argument is not valid, such as a ``key_path`` that can't be read.
            ImportError: paramiko is not installed.

        Example:
            >>> with client.connect_ssh(order) as ssh:
            ...     print(ssh.exec_command("nvidia-smi -L")[1].read().decode())
        """
        password, passphrase = Secret.of(password), Secret.of(passphrase)
        login = {
            "password": password, "key_path": key_path, "passphrase": passphrase, "wait": wait,
            "host_key": host_key, "use_ssh_config": use_ssh_config,
        }  # fmt: skip
        return self._ssh.login(order, login, timeout).open()

    def wait_for_ssh(
        self,
        order: OrderArgument,
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 300.0,
        timeout: float = 30.0,
        host_key: str = "pin",
        use_ssh_config: bool = False,
        on_progress: Report | None = None,
        progress: bool = False,
    ) -> None:
        """Wait until a login works.

        Parameters:
            order, password, key_path, passphrase, wait, timeout, host_key, use_ssh_config: as for
                :meth:`connect_ssh`.
            on_progress, progress: as for :meth:`wait_for_order`.

        Raises:
            SSHError, HostKeyChangedError, ValueError, ImportError: as for :meth:`connect_ssh`.

        Example:
            >>> client.wait_for_ssh(order, wait=600)
        """
        password, passphrase = Secret.of(password), Secret.of(passphrase)
        login = {
            "password": password, "key_path": key_path, "passphrase": passphrase, "wait": wait,
            "host_key": host_key, "use_ssh_config": use_ssh_config,
        }  # fmt: skip
        with ProgressOptions(on_progress, progress).reporting() as report:
            self._ssh.login(order, login, timeout).open(report).close()

    def forget_host_key(self, order: OrderArgument) -> bool:
        """Forget the pinned host key of an order, so that the next login accepts a new one.

        Parameters:
            order: the order or its number, for example after its container was restarted.

        Returns:
            True if a key was pinned.

        Example:
            >>> client.forget_host_key(order)
            True
        """
        return self._ssh.forget_host_key(order)

    def ssh_command(self, order: OrderArgument, *, key_path: PathArgument | None = None) -> str:
        """Return the command that logs in from a terminal, quoted for a shell.

        If the host key is pinned in ``state_dir``, OpenSSH accepts only that key.

        Parameters:
            order: a running order or its number.
            key_path: the file of a private key, which the command names.

        Returns:
            The command, on one line.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_command(order))
            ssh -p 2060 root@n1.us.clorecloud.net
        """
        return self._ssh.openssh(order, key_path).terminal_line()

    def ssh_config(
        self,
        order: OrderArgument,
        *,
        name: str | None = None,
        key_path: PathArgument | None = None,
    ) -> str:
        """Return an entry for ``~/.ssh/config``, for rsync, VS Code and others.

        With this entry, OpenSSH accepts only the pinned host key. If there is none yet, OpenSSH
        pins the first one, in the same file.

        Parameters:
            order: a running order or its number.
            name: the name of the entry, as in ``ssh <name>``; ``clore-<order id>`` by default.
            key_path: the file of a private key.

        Returns:
            The lines of the entry.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_config(order), file=open("gpu.conf", "w"))
        """
        if name is not None:
            check_plain_name(name)
        return self._ssh.openssh(order, key_path).config_entry(name)

    def run(
        self,
        order: OrderArgument,
        command: str | Sequence[str],
        *,
        check: bool = True,
        timeout: float | None = None,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        on_output: Callable[[OutputLine], object] | None = None,
        max_output: int = 64 * 1024 * 1024,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> CommandResult:
        """Run a command on the host of an order, and wait for its end. Needs paramiko.

        Parameters:
            order: a running order or its number.
            command: a command for the host's shell; a list of arguments is quoted.
            check: raise an error if the exit code is not 0.
            timeout: seconds after the login; the command is then stopped. None waits forever. It
                also limits each login attempt. Ctrl-C stops the command too.
            input: the standard input of the command.
            env: environment variables.
            on_output: called with each line when it arrives, without its line end; the line's
                ``stream`` is ``"stdout"`` or ``"stderr"``.
            max_output: bytes of output to keep. Any more output only goes to ``on_output``, and is
                counted in the result's ``dropped``.
            ssh: a connection to use, as :meth:`connect_ssh` returns it; it stays open.
            **login: ``password``, ``key_path``, ``passphrase``, ``wait``, ``host_key``,
                ``use_ssh_config``, as for :meth:`connect_ssh`.

        Returns:
            A :class:`CommandResult`: ``command``, ``exit_code``, ``stdout``, ``stderr`` (text, in
            which bytes that are not UTF-8 are replaced), ``duration`` in seconds, and ``dropped``.

        Raises:
            CommandError: the exit code was not 0; ``result`` has the output.
            CommandTimeoutError: the command did not end in time, and was stopped.
            SSHError: the login failed; the host did not run the command, because its sshd has a
                ForceCommand; or the connection broke, and the command may still run.

        Example:
            >>> print(client.run(order, "nvidia-smi -L").stdout)
            GPU 0: NVIDIA GeForce RTX 4090
        """
        env, login = secret_values(env), secret_values(login)
        wanted = Command(
            command, check=check, timeout=timeout, input=input, env=env, on_output=on_output,
            max_output=max_output,
        )  # fmt: skip
        login_timeout = min(30.0, timeout or 30.0)
        with self._ssh.connected(order, ssh, login, login_timeout) as pool:
            return wanted.run(pool.ssh)

    def start(
        self,
        order: OrderArgument,
        command: str | Sequence[str],
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PathArgument | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Job:
        """Start a job: a command that keeps running without a connection. Needs paramiko.

        It runs in a session of its own, with an empty standard input. Its output and its exit code
        are files on the host, in ``~/.clore/jobs/<name>``. So it continues after the end of this
        process, and :meth:`job` finds it from any other process. It ends with the order.

        Parameters:
            order: a running order or its number.
            command: a command for the host's shell; a list of arguments is quoted.
            name: letters, digits, ``_``, ``.`` and ``-``; by default a random one.
            env: environment variables, which no list of processes on the host shows.
            cwd: the directory to run in; a relative path and ``~`` start at the home directory.
            ssh, **login: as for :meth:`run`. With ``ssh``, the job's methods can't reconnect.

        Returns:
            A :class:`Job`: ``status``, ``exit_code``, ``tail()``, ``follow()``, ``wait()``,
            ``stop()``, ``remove()``.

        Raises:
            JobError: there is already a job with this name, or ``cwd`` does not exist. After a
                broken connection, :meth:`job` shows if it was started.
            SSHError: the login failed.

        Example:
            >>> job = client.start(order, "python train.py", name="train", cwd="~/work")
            >>> job.follow(on_output=print)
        """
        env, login = secret_values(env), secret_values(login)
        variables = job_variables(command, name, env, cwd)
        return self._ssh.jobs(order, ssh, login).start(variables)

    def jobs(
        self, order: OrderArgument, *, ssh: paramiko.SSHClient | None = None, **login: Any
    ) -> list[Job]:
        """Return the jobs on the host of an order, those that have ended too, by name.

        Parameters:
            order: a running order or its number.
            ssh, **login: as for :meth:`start`.

        Returns:
            A list of :class:`Job`.

        Raises:
            SSHError: the login failed.

        Example:
            >>> client.jobs(order)
            [<Job 'train': running>]
        """
        login = secret_values(login)
        return self._ssh.jobs(order, ssh, login).find()

    def job(
        self,
        order: OrderArgument,
        name: str,
        *,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Job:
        """Return the job with a name; any process may have started it.

        Parameters:
            order: a running order or its number.
            name: the ``name`` of :meth:`start`.
            ssh, **login: as for :meth:`start`.

        Returns:
            The :class:`Job`.

        Raises:
            JobError: the host has no job of that name.
            SSHError: the login failed.

        Example:
            >>> client.job(order, "train").tail(1)
            'step 100: loss 1.24\\n'
        """
        login = secret_values(login)
        wanted = check_plain_name(name)
        return self._ssh.jobs(order, ssh, login).get(wanted)

    def shell(
        self, order: OrderArgument, *, ssh: paramiko.SSHClient | None = None, **login: Any
    ) -> int:
        """Open the host's shell in this terminal, until it ends. Needs paramiko.

        Every key is sent to the host, Ctrl-C too. The terminal is restored, however the shell
        ends.

        Parameters:
            order: a running order or its number.
            ssh, **login: as for :meth:`run`.

        Returns:
            The exit code of the shell; -1 if a signal ended it.

        Raises:
            SSHError: this process has no terminal, the login failed, or the connection broke.

        Example:
            >>> client.shell(order)
            root@gpu:~# exit
            0
        """
        login = secret_values(login)
        check_terminal()
        with self._ssh.connected(order, ssh, login) as pool:
            return run_shell(pool.ssh)

    def wait_for_http(
        self,
        order: OrderArgument,
        path: str = "/",
        port: int | None = None,
        timeout: float = 600.0,
        *,
        on_progress: Report | None = None,
        progress: bool = False,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> int:
        """Wait until a web service in the container of an order responds.

        The public address of an order responds with 502 until something in the container listens
        (seconds to minutes after ``running``, seen on the live API). The client waits while the
        status is 502, 503, 504 or 520 to 530; any other status ends the wait. Certificates are
        verified. Neither the API key nor any other credentials are sent.

        Parameters:
            order: a running order or its number.
            path: the path to request.
            port: the port in the container. If the order has no public address for it, the request
                goes over SSH, which needs paramiko. None: the order's public address.
            timeout: seconds to wait; ``float("inf")`` waits forever.
            on_progress, progress: as for :meth:`wait_for_order`.
            ssh, **login: as for :meth:`run`, where the request goes over SSH.

        Returns:
            The status of the response, for example 200, 302 or 401.

        Raises:
            WaitTimeoutError: the service did not respond in time; ``reason`` says why.
            CloreConnectionError: the certificate is not valid.
            SSHError: the login failed, or the connection broke.

        Example:
            >>> client.wait_for_http(order, "/api/status")
            200
        """
        login = secret_values(login)
        options = ProgressOptions(on_progress, progress)
        wait = HTTPWait(order, self._orders.running, path, port, timeout, options)
        if wait.url is not None:
            return wait.at_public_address(self._user_agent)
        with self._ssh.connected(order, ssh, login) as pool:
            return wait.on_host(pool.ssh, self._user_agent)

    def forward(
        self,
        order: OrderArgument,
        remote_port: int,
        local_port: int = 0,
        *,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Forward:
        """Forward a local port, on loopback only, to a port of the host of an order.

        Parameters:
            order: a running order or its number.
            remote_port: the port on the host.
            local_port: the port on this machine; 0 chooses a free one.
            ssh, **login: as for :meth:`run`.

        Returns:
            A context manager that returns the local port, and forwards it until the block ends.

        Example:
            >>> with client.forward(order, 8888) as port:
            ...     print(requests.get(f"http://127.0.0.1:{port}").status_code)
        """
        login = secret_values(login)
        check_forward_arguments(remote_port, local_port)
        if ssh is not None:
            return Forward(check_connection(ssh), remote_port, local_port)
        return Forward(self._ssh.login(order, login).open(), remote_port, local_port, owns=True)

    def upload(
        self,
        order: OrderArgument,
        local: PathArgument,
        remote: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        symlinks: str = "skip",
        exclude: Sequence[str] = (),
        skip_unchanged: bool | str = False,
        preview: bool = False,
        delete: bool | TransferResult = False,
        streams: int | None = None,
        progress: Progress | bool | None = None,
        on_progress: Report | None = None,
        timeout: float = 30.0,
        deadline: float | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> TransferResult:
        """Copy a file or a directory to the host of an order. Needs paramiko.

        As with rsync, a directory goes into ``remote``: ``"data"`` becomes ``remote/data``. With a
        slash at its end, its content does: ``"data/"`` becomes ``remote``. It makes no difference
        if ``remote`` exists. A file goes into ``remote`` if that is a directory or ends with a
        slash, and else gets that name. Missing parents of the target are created.

        Each file gets a temporary name, and is renamed when it is complete. The client always
        compares sizes. It also compares SHA-256 with ``verify``, after a resumed transfer, and for
        a file that was sent in several pieces. On a host without a POSIX shell, it uses SFTP, which
        is slower, and compares SHA-256 only with ``verify``, as it has to read the file again.

        ==================  ========================================================================
        in the source       in the copy
        ==================  ========================================================================
        file                a file; one that is replaced stays whole until then
        permissions         those of the source minus the umask of the other side; a replaced file
                            keeps its own; with ``preserve`` those of the source; never setuid
        owner, attributes   those of the user who logs in; not copied
        times               the time of the copy; with ``preserve`` that of the source, in seconds
        symlink             left out; ``symlinks="copy"``: the same symlink, ``"follow"``: what it
                            leads to; left out if that is outside of the directory
        ``local`` itself    a symlink in its place is followed
        hard link           a file of its own
        sparse file         a sparse file
        device, FIFO,       left out, and named in ``skipped``
        socket
        ==================  ========================================================================

        A symlink in the place of a file's target is an error, unless ``symlinks="follow"``.

        Parameters:
            order: a running order or its number.
            local: a file or directory on this machine.
            remote: a path on the host; a relative path and ``~`` start at the home
                directory.
            preserve: keep permissions and times.
            verify: compare the SHA-256 of every file.
            resume: continue an earlier transfer that failed. At most 5 % of the received data
                is sent again (or 256 KB). If the size or time of the source has changed, the
                transfer starts over.
            symlinks: ``"skip"``, ``"copy"`` or ``"follow"``, as in the table.
            exclude: patterns as in ``.gitignore``, of what to leave out. Needs pathspec.
            skip_unchanged: True leaves out the files whose size and time, in whole seconds, are the
                same there, and preserves times, so that the next call can compare them.
                ``"checksum"`` compares sizes and SHA-256; it also finds a change that keeps the
                size within the same second.
            preview: send nothing. The result has what would be sent in ``sent``.
            delete: remove what only the target has. First pass True with ``preview=True``; the
                result lists it in ``deleted``. Then pass that result: nothing else is removed.
                What ``exclude`` matches, or what was left out here, stays.
            streams: the number of connections, 1 to 16; None chooses it by the size.
            progress: True shows the progress, as for :meth:`wait_for_order`. A function is called
                for each file, as ``progress(name, done, total)``, in bytes, in this thread; control
                characters in the name are escaped.
            on_progress: called with a :class:`ProgressEvent`, in bytes of all files.
            timeout: seconds for each login attempt, and the longest time without any progress.
            deadline: seconds for the whole call with its login; None for no limit.
            ssh, **login: as for :meth:`run`.

        Returns:
            A :class:`TransferResult`: ``path``, ``files``, ``size`` in bytes, ``duration`` in
            seconds, ``skipped``, ``unchanged``, ``sent``, ``deleted``.

        Raises:
            TransferError: a file was not copied completely, because of a full disk or a lost
                connection; it has ``name``, ``done`` and ``total``.
            SSHError: the login failed.
            FileNotFoundError: ``local`` does not exist.
            ImportError: ``exclude`` needs pathspec.

        Example:
            >>> client.upload(order, "data/", "~/work", exclude=["*.pyc"], skip_unchanged=True)
            >>> would = client.upload(order, "data/", "~/work", preview=True, delete=True)
            >>> would.deleted
            ['old.bin']
            >>> client.upload(order, "data/", "~/work", delete=would)
        """
        login = secret_values(login)
        checked = check_upload(
            local, remote, preserve=preserve, verify=verify, resume=resume, symlinks=symlinks,
            exclude=exclude, skip_unchanged=skip_unchanged, preview=preview, delete=delete,
            streams=streams, progress=progress, on_progress=on_progress, timeout=timeout,
            deadline=deadline,
        )  # fmt: skip
        size = upload_connections(*checked)
        with self._ssh.connected(order, ssh, login, timeout, size, deadline=deadline) as pool:
            return upload_path(pool, checked)

    def download(
        self,
        order: OrderArgument,
        remote: PathArgument,
        local: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        symlinks: str = "skip",
        exclude: Sequence[str] = (),
        skip_unchanged: bool | str = False,
        streams: int | None = None,
        max_bytes: int | None = None,
        progress: Progress | bool | None = None,
        on_progress: Report | None = None,
        timeout: float = 30.0,
        deadline: float | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> TransferResult:
        """Copy a file or a directory from the host of an order. Needs paramiko.

        It works like :meth:`upload` in the other direction, with the same table and the same
        meaning of a slash at the end of ``remote``. A hostile host can't make it write outside
        of ``local``. If a file grows during the copy, as a log does, the copy has its content from
        the start; any other change is an error.

        Parameters:
            order: a running order or its number.
            remote: a path on the host; a relative path and ``~`` start at the home
                directory.
            local: a path on this machine.
            max_bytes: refuse to copy more bytes than this.
            preserve, verify, resume, symlinks, exclude, skip_unchanged, streams, progress,
                on_progress, timeout, deadline, ssh, **login: as for :meth:`upload`.

        Returns:
            A :class:`TransferResult`.

        Raises:
            TransferError: a file was not copied completely, is larger than ``max_bytes``, or the
                host sent invalid data.
            SSHError: the login failed.
            ImportError: ``exclude`` needs pathspec.

        Example:
            >>> client.download(order, "~/work/model.safetensors", ".", resume=True).size
            4976698672
        """
        login = secret_values(login)
        options = DownloadOptions(
            remote, local, preserve=preserve, verify=verify, resume=resume, symlinks=symlinks,
            exclude=exclude, skip_unchanged=skip_unchanged, streams=streams, max_bytes=max_bytes,
            progress=progress, on_progress=on_progress, timeout=timeout, deadline=deadline,
        )  # fmt: skip
        size = streams or DOWNLOAD_CONNECTIONS
        with self._ssh.connected(
            order, ssh, login, timeout, size, streams is not None, deadline
        ) as pool:
            return download_path(pool, options)

    def rsync_command(
        self,
        order: OrderArgument,
        local: PathArgument,
        remote: PathArgument,
        *,
        key_path: PathArgument | None = None,
    ) -> str:
        """Return the command that copies to the host with rsync, quoted for a shell.

        It logs in as the command of :meth:`ssh_command` does, with the pinned host key.

        Parameters:
            order: a running order or its number.
            local: a file or directory on this machine; a slash at its end means its content.
            remote: a path on the host; a relative path and ``~`` start at the home
                directory.
            key_path: the file of a private key, which the command names.

        Returns:
            The command, on one line.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.rsync_command(order, "data/", "~/work"))
            rsync -az -s -e 'ssh -p 2060' data/ root@n1.us.clorecloud.net:work
        """
        source, target = check_path("local", local), check_path("remote", remote)
        return self._ssh.openssh(order, key_path).rsync_line(source, target)

    def scp(
        self,
        order: OrderArgument,
        *,
        max_bytes: int | None = None,
        progress: Callable[..., object] | None = None,
        timeout: float = 30.0,
        **login: Any,
    ) -> Any:
        """Return an ``scp.SCPClient`` that is protected against hostile hosts.

        Parameters:
            order: a running order or its number.
            max_bytes: the largest number of bytes that one ``get()`` may receive.
            progress: as for ``scp.SCPClient``.
            timeout: seconds for each step of the login, and the longest time without progress.
            **login: as for :meth:`run`.

        Returns:
            An ``scp.SCPClient`` with its own connection; ``close()``, or the end of its block,
            closes it.

        Raises:
            ImportError: paramiko or scp is not installed.

        Example:
            >>> with client.scp(order) as copy:
            ...     copy.put("train.py", "/root/train.py")
        """
        login = secret_values(login)
        connection = self._ssh.login(order, login, timeout).open()
        try:
            return guarded_scp(
                connection,
                socket_timeout=timeout,
                max_bytes=max_bytes,
                progress=progress,
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
