"""Every error that the package raises, and the tables that choose one for an answer of the API."""

from __future__ import annotations

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
