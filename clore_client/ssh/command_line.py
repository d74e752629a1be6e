"""Build the line that a host's shell runs: the command, its arguments, and its variables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from clore_client.validation import short_repr

MAX_CSH_LINE = 50_000  # bytes; a host takes lines of up to 131,072


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
    # Even in single quotes, a backslash is special in fish, and "!" in csh.
    parts = re.split(r"([\\!])", word)
    quoted = [f"\\{part}" if part in ("\\", "!") else shlex.quote(part) for part in parts if part]
    return "".join(quoted) or "''"


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
        lines.append(f"export {name}={quoted_word(value)} || exit 121\n")
    return "".join(lines)


def csh_line(exports: str, command: str | Sequence[str], line: str) -> str:
    """Return a line that runs a command with variables in csh, which has no ``export``.

    Other shells go on with the next line. csh does not: sh takes its place, sets the variables, and
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
    return f"expr \"$shell\" : '.*csh$' >/dev/null && exec {decode} \"$shell\" '{plain}'\n"


def encoded(name: str, text: str, *, nul: bool = False) -> bytes:
    """Encode text as UTF-8; file names that are not UTF-8 become their original bytes."""
    if not nul and "\0" in text:
        raise ValueError(f"{name} must not contain a NUL character")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"{name} contains a character that UTF-8 cannot encode") from None
