"""Define every error of the package, and map API responses to errors."""

from __future__ import annotations

import copyreg
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clore_client.models.result import CommandResult

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
