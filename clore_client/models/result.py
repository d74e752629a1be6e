"""What came of a command or a transfer over SSH."""

from __future__ import annotations

from clore_client.errors import printable

STDOUT, STDERR = "stdout", "stderr"


class CommandResult:
    """How a command ended.

    Attributes:
        command: the line that the machine's shell was given, without what ``env`` adds to it.
        exit_code: 0 to 255; -1 where a signal ended it.
        stdout, stderr: its output as text; what is no UTF-8 is replaced.
        duration: seconds from the request until the end.
        dropped: bytes of output beyond ``max_output``, which are not in it.
    """

    __slots__ = ("command", "dropped", "duration", "exit_code", "stderr", "stdout")

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
        """Whether it ended with 0."""
        return self.exit_code == 0

    def __repr__(self) -> str:
        left_out = f", {self.dropped} bytes of output dropped" if self.dropped else ""
        return (
            f"<CommandResult {printable(repr(self.command), 60)}: exit_code={self.exit_code}, "
            f"{len(self.stdout)} characters of stdout, {len(self.stderr)} of stderr, "
            f"{self.duration:.1f}s{left_out}>"
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


class TransferResult:
    """What was transferred.

    Attributes:
        path: where it is now; control characters are escaped.
        files: how many files.
        size: bytes of all of them.
        duration: seconds.
        skipped: (name, why) of what was left out: symlinks, and what is no file; escaped, too.
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
            f"<TransferResult {printable(self.path, 200)!r}: {self.files} files, "
            f"{self.size} bytes, {self.duration:.2f} s{left_out}>"
        )
