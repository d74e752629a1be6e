"""Build the line that a host's shell runs: the command, its arguments, and its variables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from clore_client.validation import short_repr


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


def quoted_word(word: str) -> str:
    """Quote a word for any login shell."""
    # In fish, a backslash is special even in single quotes.
    return "\\\\".join(shlex.quote(part) if part else "" for part in word.split("\\")) or "''"


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
        # csh has no export: the command must not run there without its variables.
        lines.append(f"export {name}={quoted_word(value)} || exit 121\n")
    return "".join(lines)


def encoded(name: str, text: str, *, nul: bool = False) -> bytes:
    """Encode text as UTF-8; file names that are not UTF-8 become their original bytes."""
    if not nul and "\0" in text:
        raise ValueError(f"{name} must not contain a NUL character")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"{name} contains a character that UTF-8 cannot encode") from None
