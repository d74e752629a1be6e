"""Errors of everything that is done over SSH."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clore_client.errors import SSHError, printable

if TYPE_CHECKING:
    from clore_client.commands import CommandResult

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
