"""Define the results of commands and transfers over SSH."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from clore_client.errors import printable

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
