"""Build the line of a command, and cut its output into lines."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clore_client.models.result import STDERR, STDOUT, OutputLine
from clore_client.validation import short_repr

LONGEST_PIECE = 65536  # characters of one call of on_output


def command_line(command: str | Sequence[str]) -> str:
    """The line for the machine's shell: a string as it is, a list or tuple of arguments quoted."""
    if isinstance(command, str):
        line = command
    elif isinstance(command, (list, tuple)):
        for number, word in enumerate(command):
            if not isinstance(word, str):
                raise TypeError(f"command[{number}] must be a string, not {short_repr(word)}")
        line = " ".join(map(quoted_word, command))
    else:
        raise TypeError(
            f"command must be a string, or a list of strings, not {short_repr(command)}"
        )
    if not line.strip():
        raise ValueError("command must not be empty")
    encoded("command", line)
    return line


def quoted_word(word: str) -> str:
    """Quote a word for any login shell: fish, too, takes a backslash in quotes for an escape."""
    import shlex  # not for whoever only imports the package

    if "\\" not in word:
        return shlex.quote(word)
    return "\\\\".join(shlex.quote(part) if part else "" for part in word.split("\\"))


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
    """Set variables for the rest of a line, or end: sshd by itself takes none from a client."""
    if env is None:
        return ""
    if not isinstance(env, Mapping):
        raise TypeError(f"env must be a dict of strings, not {type(env).__name__}")
    for name, value in env.items():
        if not isinstance(name, str) or not name.isascii() or not name.isidentifier():
            raise ValueError(f"env: not the name of a variable: {short_repr(name)}")
        if not isinstance(value, str):
            raise TypeError(f"env[{short_repr(name)}] must be a string, not {type(value).__name__}")
        encoded(f"env[{name!r}]", value)
    return "".join(
        f"export {name}={quoted_word(value)} || exit 121\n" for name, value in env.items()
    )


def encoded(name: str, text: str, *, nul: bool = False) -> bytes:
    """``text`` as bytes; names of files that are no UTF-8 come out as they were."""
    if not nul and "\0" in text:
        raise ValueError(f"{name} must not hold a NUL character")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds a character that can't be encoded as UTF-8") from None
