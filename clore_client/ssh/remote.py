"""Run small scripts on a host for a transfer, by a POSIX shell that is started explicitly.

The login shell sees one constant line without a backslash, which starts ``sh``; that reads its
script from standard input, between two lines with a random mark. So neither the kind of the login
shell matters, nor what its start-up files print, read or change. Nothing in the output is trusted:
lengths are limited, numbers are parsed, names are checked.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.ssh.transport import (
    COMMAND_WINDOW,
    NoChannelError,
    connection_errors,
    open_session,
    request_exec,
)
from clore_client.ssh.watchdog import Watchdog
from clore_client.validation import short_repr

BLOCK = 65536  # bytes; chunks begin at multiples of it
DATA_WINDOW = 32 * 1024 * 1024  # bytes on their way to us on one channel: 320 MB/s at 100 ms
MAX_NOISE = 65536  # bytes before the mark
MAX_LINE = 65536
MAX_LEVELS = 256  # directories in each other; Python removes no tree that is much deeper
CHANNEL_PAUSE = 0.05  # seconds; a channel that was closed is freed a little later
LAST_PATIENCE = 3.0  # seconds for each step of tidying up, after an error or Ctrl-C
PADDING = b"\n" * 64  # lines for start-up files that read some

# In single quotes, and without what csh or fish would change there: a backslash, a quote, "!".
BOOTSTRAP = (
    "/bin/sh -c 'export LC_ALL=C; n=$(echo; echo x); n=${{n%x}}; l=; "
    'until [ "$l" = {mark} ]; do IFS= read -r l || exit 9; done; s=; l=; '
    'until [ "$l" = {mark} ]; do s=$s$l$n; IFS= read -r l || exit 9; done; '
    'echo {mark}; eval "$s"\''
)
# For a script that reads nothing: it is an argument, a round trip earlier, with "@" for line ends.
INLINE = (
    "/bin/sh -c 'export LC_ALL=C; n=$(echo; echo x); n=${{n%x}}; s=; IFS=@; set -f; "
    "for l in $1; do s=$s$l$n; done; unset IFS; set +f; echo {mark}; eval \"$s\"' sh '{script}'"
)
MAX_INLINE = 4096  # bytes; dropbear takes 9,000
# What each script begins with. Relative paths count from the home directory, whatever directory
# the start-up files changed to; `n` is a line end.
PRELUDE = r"""
unset CDPATH
no() { printf "no %s%s" "$*" "$n"; exit 1; }
cd "${HOME:-/}" || no "there is no home directory ${HOME}"
if command -v sha256sum >/dev/null; then sha=sha256sum; else sha="openssl dgst -sha256 -r"; fi
# openssl is up to six times as fast.
if command -v openssl >/dev/null; then sha="openssl dgst -sha256 -r"; fi
block=65536
part() { # prints $3 bytes of the file $1 from its block $2 on
  if [ $(($3 % block)) = 0 ]; then blocks "$1" "$2" $(($3 / block))
  else blocks "$1" "$2" $(($3 / block + 1)) | head -c "$3"; fi
}
blocks() { dd if="$1" bs=$block skip="$2" count="$3" iflag=fullblock 2>/dev/null; }
list() { find . -exec stat -c "%f %s %Y %n" {} +; }
"""
# Prints what is missing for a transfer by the shell.
CHECK_TOOLS = r"""
for t in chmod dd find head mkdir mv rm stat tar touch xargs; do
  command -v $t >/dev/null || no "lacks $t"
done
command -v ${sha%% *} >/dev/null || no "lacks sha256sum"
[ "$(echo abcdef | dd ibs=3 count=1 obs=4 iflag=fullblock 2>/dev/null)" = abc ] ||
  no "lacks a dd with iflag=fullblock"
stat -c "%f %s %Y %a" . >/dev/null 2>&1 || no "lacks a stat with -c"
"""


class NoShellError(SSHError):
    """A host runs no POSIX shell with the usual tools: only SFTP is left."""


def remote_script(verb: str, body: str, **values: bytes | str | int) -> bytes:
    """Return a script whose ``values`` are shell variables, quoted; ``verb`` names it."""
    lines = [b": " + verb.encode()]
    lines += [name.encode() + b"=" + sh_quoted(value) for name, value in values.items()]
    return b"\n".join([*lines, (PRELUDE + body).encode()])


def sh_quoted(value: bytes | str | int) -> bytes:
    raw = value if isinstance(value, bytes) else str(value).encode()
    return b"'" + raw.replace(b"'", b"'\"'\"'") + b"'"


def inlined(script: bytes) -> str | None:
    """Return a script as an argument that every login shell passes on as it is, or None."""
    odd = set(script) & set(b"\\!@") or any(
        (byte < 32 and byte != 10) or byte > 126 for byte in script
    )
    if odd or len(script) > MAX_INLINE:
        return None
    return script.decode("ascii").replace("'", "'\"'\"'").replace("\n", "@")


def remote_path(path: bytes) -> bytes:
    """Return a remote path as the scripts want it: ``~`` and relative ones from the home."""
    if path == b"~" or path.startswith(b"~/"):
        path = path[1:].lstrip(b"/") or b"."
    elif path.startswith(b"~"):
        raise ValueError(
            "remote: a path may begin with ~/, one's own home, and not with another user's: "
            f"{short_repr(path)}"
        )
    return path if path.startswith(b"/") else b"./" + path


class RemoteScript:
    """A script that runs on a host: what is sent to it, and what it answers.

    Parameters:
        timeout: seconds without anything sent or received.
        patience: seconds for which a host without a free channel is asked again.
        reads: whether the script reads anything.
        turn: held while a script starts, and while it ends; for hosts where nothing may start
            while something ends.
    """

    def __init__(
        self,
        transport: Any,
        script: bytes,
        watchdog: Watchdog,
        timeout: float,
        *,
        patience: float = 1.0,
        window: int = COMMAND_WINDOW,
        reads: bool = True,
        turn: threading.Lock | None = None,
    ) -> None:
        self.timeout = timeout
        self._turn = turn
        self._ending = False
        self._transport = transport
        self._watchdog = watchdog
        self._stuck = False
        self._mark = secrets.token_hex(8)
        self._buffer = memoryview(b"")  # received, and not read yet
        self._begun = False
        inline = None if reads else inlined(script)
        line = BOOTSTRAP if inline is None else INLINE
        command = line.format(mark=self._mark, script=inline)
        deadline = time.monotonic() + patience
        while True:
            try:
                with turn or contextlib.nullcontext(), self._limited():
                    self.channel = open_session(transport, timeout, window)
                    request_exec(self.channel, command)
                break
            except NoChannelError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(CHANNEL_PAUSE)
        mark = self._mark.encode() + b"\n"
        # Even for a script that reads nothing, lines for start-up files that do. (An end of input
        # at once makes dropbear lose what a short script prints.)
        self.send(PADDING + (mark + script + b"\n" + mark if inline is None else b""))

    def __enter__(self) -> RemoteScript:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def finish(self) -> None:
        """Close the channel; first wait for the script's end where nothing starts before that."""
        if self._turn is not None:
            self.end()
            self.channel.status_event.wait(LAST_PATIENCE)
        self.close()

    def close(self) -> None:
        """Close the channel, which ends a script that still runs."""
        with contextlib.suppress(*connection_errors()), self._limited():
            self.channel.close()
        if self._turn is not None and self._ending:
            self._ending = False
            self._turn.release()

    def _limited(self) -> contextlib.AbstractContextManager[Any]:
        """Limit a call that may hang while it writes; by itself it ends within the timeout."""
        return self._watchdog.limit(1.25 * self.timeout + 0.25, self._give_up)

    def _give_up(self) -> None:
        self._stuck = True
        self._transport.close()

    # --- sending ---

    def send(self, data: bytes | memoryview) -> bool:
        """Send all of it; False when the host takes no more: its answer says why."""
        view = memoryview(data)
        try:
            while view:
                with self._limited():
                    view = view[self.channel.send(view[:BLOCK]) :]
        except connection_errors() as error:
            if self._stuck or isinstance(error, TimeoutError):
                raise SSHError(f"the machine took nothing for {self.timeout:g}s") from None
            return False
        return True

    def end(self) -> None:
        """Say that there is no more to be sent."""
        if self._turn is not None and not self._ending:
            self._turn.acquire()
            self._ending = True
        with contextlib.suppress(*connection_errors()), self._limited():
            self.channel.shutdown_write()

    # --- receiving ---

    def read(self, most: int) -> bytes:
        """Return some of what the script printed; empty at its end."""
        if not self._begun:
            self._skip_noise()
        return self._more(most)

    def line(self) -> bytes:
        """Return the next line without its end; the rest where there is none."""
        line = b""
        deadline = time.monotonic() + self.timeout
        while not (end := line.find(b"\n") + 1):
            piece = self.read(MAX_LINE)
            if not piece:
                return line
            line += piece
            if len(line) > 4 * MAX_LINE:
                raise SSHError("the machine answers with an endless line")
            if time.monotonic() > deadline and b"\n" not in line:
                raise SSHError(f"the machine sent no whole line within {self.timeout:g}s")
        self._push_back(line[end:])
        return line[: end - 1]

    def until(self, mark: bytes, most: int) -> bytes:
        """Return what comes before a line with only the mark; at most so many bytes."""
        text, ending, start = bytearray(b"\n"), b"\n" + mark + b"\n", 0
        while (end := text.find(ending, start)) < 0:
            start = max(0, len(text) - len(ending))
            piece = self.read(MAX_LINE)
            if not piece:
                raise self.refused(bytes(text[1 : 1 + MAX_LINE]))
            text += piece
            if len(text) > most:
                raise SSHError(f"the machine answers with more than {most} bytes")
        self._push_back(bytes(text[end + len(ending) :]))
        return bytes(text[1 : end + 1])

    def rest(self, most: int) -> bytes:
        """Return all that is left; an error for more than ``most`` bytes."""
        pieces, size = [], 0
        while piece := self.read(BLOCK):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise SSHError(f"the machine answers with more than {most} bytes")
        return b"".join(pieces)

    def answer(self, word: bytes) -> bytes:
        """Return what follows a word at the start of the next line, which must begin with it."""
        line = self.line()
        if line == word or line.startswith(word + b" "):
            return line[len(word) + 1 :]
        raise self.refused(line)

    def refused(self, line: bytes = b"") -> SSHError:
        """Return an error with what the host says."""
        if line.startswith(b"no lacks "):
            return NoShellError(f"the machine {printable(os.fsdecode(line[3:]), 80)}")
        said = line[3:] if line.startswith(b"no ") else b""
        if not said:
            said = self.errors() or line
        if not said.strip() and not self._transport.is_active():
            return SSHError("the connection broke")
        text = said.decode("utf-8", "replace").strip() or "it does not say why"
        return SSHError(f"the machine refuses: {printable(text, 500)}")

    def status(self) -> int:
        """Wait for the exit status; -1 where none came."""
        if not self.channel.status_event.wait(self.timeout):
            raise SSHError(f"the machine sent nothing for {self.timeout:g}s")
        return int(self.channel.exit_status)

    def errors(self) -> bytes:
        """Return what has come on the other stream."""
        text = b""
        deadline = time.monotonic() + 1.0
        while self.channel.recv_stderr_ready() and len(text) < MAX_LINE:
            with self._limited():
                text += self.channel.recv_stderr(MAX_LINE)
            if time.monotonic() > deadline:
                break
        return text

    def _more(self, most: int) -> bytes:
        if not self._buffer:
            try:
                with self._limited():  # it may widen the window
                    # All that there is: paramiko moves what it keeps with every read.
                    self._buffer = memoryview(self.channel.recv(DATA_WINDOW))
            except TimeoutError:
                raise SSHError(f"the machine sent nothing for {self.timeout:g}s") from None
            except connection_errors():
                raise SSHError("the connection broke") from None
        piece, self._buffer = self._buffer[:most], self._buffer[most:]
        return bytes(piece)

    def _push_back(self, data: bytes) -> None:
        if data:
            self._buffer = memoryview(data + bytes(self._buffer))

    def _skip_noise(self) -> None:
        """Skip what start-up files print before the mark."""
        self._begun = True
        mark, seen = self._mark.encode() + b"\n", b""
        deadline = time.monotonic() + self.timeout
        while mark not in seen:
            piece = self._more(BLOCK)
            if not piece:
                raise self._no_shell(seen)
            seen += piece
            late = len(seen) > MAX_NOISE + BLOCK or time.monotonic() > deadline
            if late and mark not in seen:
                raise SSHError("the machine prints without an end before it starts a shell")
        self._push_back(seen.partition(mark)[2])

    def _no_shell(self, seen: bytes) -> SSHError:
        if not self._transport.is_active():
            return SSHError("the connection broke")
        said = (self.errors().strip() or seen.strip()).decode("utf-8", "replace")
        text = printable(said, 300) or f"nothing (exit code {self.channel.exit_status})"
        return NoShellError(f"the machine runs no shell, and says: {text}")


def parse_listing(text: bytes, most: int, take: Callable[[int, int, int, bytes], None]) -> None:
    """Read what the function ``list`` printed: mode, size, time and name of each entry."""
    # A name may hold a line end: an entry begins where mode, size, time and "./" stand.
    pattern = rb"([0-9a-f]{1,8}) ([0-9]{1,18}) (-?[0-9]{1,19}) (\.(?:/.*?)?)\n"
    entry = re.compile(pattern + rb"(?=[0-9a-f]{1,8} [0-9]{1,18} -?[0-9]{1,19} \./|\Z)", re.S)
    at = count = 0
    while at < len(text):
        found = entry.match(text, at)
        if found is None:
            shown = printable(repr(text[at : at + 80]), 120)
            raise SSHError(f"the machine lists what can't be read: {shown}")
        count += 1
        if count > most:
            raise SSHError(f"the machine lists more than {most} files")
        mode, size, mtime, name = found.groups()
        take(int(mode, 16), int(size), int(mtime), name[2:])
        at = found.end()


def parse_digests(text: bytes, count: int) -> list[str]:
    """Read the SHA-256 that sha256sum or openssl printed, in the order of the names."""
    # What else stands on a line is a piece of a name: not every sha256sum escapes line ends.
    digests = [s.decode() for s in re.findall(rb"^\\?([0-9a-f]{64}) [ *]", text, re.M)]
    if len(digests) != count:
        raise SSHError(f"the machine hashed {len(digests)} files instead of {count}")
    return digests


def checked_name(name: bytes) -> str:
    """Check a name below a directory, as the host sent it; the name to use here."""
    parts = name.split(b"/")
    if not name or b"\0" in name or any(part in (b"", b".", b"..") for part in parts):
        raise SSHError(f"the machine names a file that can't be one: {printable(repr(name), 120)}")
    if len(parts) > MAX_LEVELS:
        raise SSHError(f"the machine names a file below {len(parts)} directories")
    text = os.fsdecode(name)
    if os.name == "nt" and re.search(r'[\\:*?"<>|]', text):
        raise SSHError(f"a name that this system does not know: {printable(repr(name), 120)}")
    return text
