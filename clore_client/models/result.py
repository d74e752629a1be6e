"""Results of commands and transfers over SSH."""

from __future__ import annotations

from clore_client.errors import printable

STDOUT, STDERR = "stdout", "stderr"


class CommandResult:
    """The result of a command.

    Attributes:
        command: the command for the machine's shell, without the variables of ``env``.
        exit_code: 0 to 255; -1 if a signal ended the command.
        stdout, stderr: the output as text; bytes that are not UTF-8 are replaced.
        duration: seconds from the start to the end.
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
        """True if the exit code is 0."""
        return self.exit_code == 0

    def __repr__(self) -> str:
        return (
            f"<CommandResult {printable(repr(self.command), 60)}: exit_code={self.exit_code}, "
            f"{len(self.stdout)} characters of stdout, {len(self.stderr)} of stderr, "
            f"{self.duration:.1f}s>"
        )


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


class Transferred:
    """The result of a transfer.

    Attributes:
        path: the path of the copy, as text.
        files: the number of files.
        size: the bytes of all files.
        duration: seconds.
        skipped: (name, reason) for symlinks and special files, which are not copied.
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
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return (
            f"<Transferred {printable(self.path, 200)!r}: {self.files} files, {self.size} bytes, "
            f"{self.duration:.2f} s{skipped}>"
        )
