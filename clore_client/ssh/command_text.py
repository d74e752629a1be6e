"""Build the line that a host's shell runs, and read what the command prints."""

from __future__ import annotations

import codecs
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clore_client.errors import Secret
from clore_client.models.result import STDERR, STDOUT, OutputLine
from clore_client.validation import short_repr

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
