"""Run a script on a host with ``sh``, whatever the login shell is.

The login shell runs one fixed line without special characters. That line starts ``sh``, which reads
the script from standard input, between two lines with a random mark. So the kind of the login shell
does not matter, nor what its start-up files print or change. The output is not trusted: lengths are
limited, numbers are parsed, and names are checked.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

from clore_client.errors import SSHError, printable
from clore_client.ssh.transfer.entry import BLOCK, TRANSFER_PIECE
from clore_client.ssh.transport import (
    COMMAND_WINDOW,
    LimitedChannel,
    Watchdog,
    connection_errors,
    with_patience,
)

DATA_WINDOW = 32 * 1024 * 1024  # bytes in flight on one channel: 320 MB/s at 100 ms
MAX_NOISE = 65536  # bytes that start-up files may print
MAX_LINE = 65536  # bytes
SHELL_PATIENCE = 20.0  # seconds for a login shell to start a script
LAST_PATIENCE = 3.0  # seconds for each step of cleaning up, after an error or Ctrl-C
PADDING = b"\n" * 64  # a start-up file may read some lines: these, and not those of the script

# Has no character that csh or fish changes within single quotes: no backslash, quote or "!".
# $a keeps the locale of the user, for scripts that start a command of the user.
BOOTSTRAP = (
    "/bin/sh -c 'a=$LC_ALL; export LC_ALL=C; n=$(echo; echo x); n=${{n%x}}; l=; "
    'until [ "$l" = {mark} ]; do IFS= read -r l || exit 119; done; s=; l=; '
    'until [ "$l" = {mark} ]; do s=$s$l$n; IFS= read -r l || exit 119; done; '
    'echo {mark}; eval "$s"\''
)
# For a script that reads nothing: sent as an argument, which saves a round trip; "@" ends a line.
INLINE = (
    "/bin/sh -c 'export LC_ALL=C; n=$(echo; echo x); n=${{n%x}}; s=; IFS=@; set -f; "
    "for l in $1; do s=$s$l$n; done; unset IFS; set +f; echo {mark}; eval \"$s\"' sh '{script}'"
)
NO_INPUT = 119  # the exit code if the input ends before the script
READS_ALL = "a start-up file of the host, such as ~/.bashrc, reads the input of all commands"
MAX_INLINE = 4096  # bytes; dropbear accepts 9,000


class NoShellError(SSHError):
    """Report a host without a POSIX shell or one of the usual tools; SFTP may work."""


class RemoteScript:
    """Run a script on a host; a context manager that closes its channel.

    Parameters:
        timeout: seconds without anything sent or received.
        patience: seconds to retry while the host opens no further channel.
        reads: whether the script reads its input.
        turn: a lock to hold while a script starts, and while it ends; for a host on which none may
            start while another one ends.
    """

    def __init__(
        self, transport: Any, script: bytes, watchdog: Watchdog, timeout: float, *,
        patience: float = 1.0, window: int = COMMAND_WINDOW, reads: bool = True,
        turn: threading.Lock | None = None,
    ) -> None:  # fmt: skip
        self._transport = transport
        self._turn = turn
        self._ending = False
        self._mark = os.urandom(8).hex()
        self._buffer = memoryview(b"")  # received, and not read yet
        self._begun = False
        inline = None if reads else inlined(script)
        line = BOOTSTRAP if inline is None else INLINE
        command = line.format(mark=self._mark, script=inline)

        def open_channel() -> LimitedChannel:
            with turn or contextlib.nullcontext():
                channel = LimitedChannel(transport, timeout, watchdog, window)
                channel.exec_command(command)
            return channel

        self.channel: LimitedChannel = with_patience(patience, open_channel)
        mark = self._mark.encode() + b"\n"
        # An inline script also gets lines, for start-up files that read some, and because dropbear
        # loses the output of a short script that has no input.
        self.send(PADDING + (mark + script + b"\n" + mark if inline is None else b""))
        self._arrived = threading.Event()  # set while there is output, and at its end
        self.channel.in_buffer.set_event(self._arrived)
        if inline is not None and turn is None:
            self.end()  # a start-up file that reads all input ends then

    def __enter__(self) -> RemoteScript:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def finish(self) -> None:
        """Close the channel; if scripts take turns, wait for the end of the script first."""
        if self._turn is not None and not self.channel.closed:
            self.end()
            self.channel.status_event.wait(LAST_PATIENCE)
        self.close()

    def close(self) -> None:
        """Close the channel, which ends a script that still runs."""
        self.channel.close()
        if self._turn is not None and self._ending:
            self._ending = False
            self._turn.release()

    # --- sending ---

    def send(self, data: bytes | memoryview) -> bool:
        """Send all of ``data``; return False if the script reads no more: its answer says why."""
        view = memoryview(data)
        try:
            while view:
                view = view[self.channel.send(view[:BLOCK]) :]
        except connection_errors():
            return False
        return True

    def send_names(self, names: Iterable[bytes]) -> None:
        """Send names of files for ``xargs -0``, and end the input."""
        self.send(b"".join(b"./" + name + b"\0" for name in names))
        self.end()

    def end(self) -> None:
        """End the input of the script."""
        if self._turn is not None and not self._ending:
            self._turn.acquire()
            self._ending = True
        with contextlib.suppress(SSHError, *connection_errors()):
            self.channel.shutdown_write()

    # --- receiving ---

    def read(self, most: int) -> bytes:
        """Return up to ``most`` bytes of output; none at its end."""
        if not self._begun:
            self._skip_noise()
        return self._receive(most)

    def piece(self, left: int) -> bytes:
        """Return some of the ``left`` bytes of output that must still follow."""
        piece = self.read(min(TRANSFER_PIECE, left))
        if not piece:
            raise SSHError(f"{left} bytes are missing: {self.refused()}")
        return piece

    def exactly(self, size: int) -> bytes:
        """Return the next ``size`` bytes of output."""
        data = b""
        while len(data) < size:
            data += self.piece(size - len(data))
        return data

    def line(self) -> bytes:
        """Return the next line without its end, or the rest of the output."""
        line = b""
        deadline = time.monotonic() + self.channel.timeout
        while not (end := line.find(b"\n") + 1):
            piece = self.read(MAX_LINE)
            if not piece:
                return line
            line += piece
            if len(line) > 4 * MAX_LINE:
                raise SSHError("the host sends an endless line")
            if time.monotonic() > deadline and b"\n" not in line:
                raise SSHError(f"the host sent no whole line within {self.channel.timeout:g}s")
        self._push_back(line[end:])
        return line[: end - 1]

    def until(self, mark: bytes, most: int) -> bytes:
        """Return the output before a line with only the mark, up to ``most`` bytes."""
        text, ending, start = bytearray(b"\n"), b"\n" + mark + b"\n", 0
        while (end := text.find(ending, start)) < 0:
            start = max(0, len(text) - len(ending))
            piece = self.read(MAX_LINE)
            if not piece:
                raise self.refused(bytes(text[1 : 1 + MAX_LINE]))
            text += piece
            if len(text) > most:
                raise SSHError(f"the host answers with more than {most} bytes")
        self._push_back(bytes(text[end + len(ending) :]))
        return bytes(text[1 : end + 1])

    def rest(self, most: int) -> bytes:
        """Return the rest of the output, up to ``most`` bytes."""
        text = bytearray()
        while piece := self.read(BLOCK):
            text += piece
            if len(text) > most:
                raise SSHError(f"the host answers with more than {most} bytes")
        return bytes(text)

    def answer(self, word: bytes) -> bytes:
        """Read a line that must begin with ``word``, and return what follows it."""
        line = self.line()
        if line == word or line.startswith(word + b" "):
            return line[len(word) + 1 :]
        raise self.refused(line)

    def expect_end(self) -> None:
        """Check that there is no more output, and that the script succeeded."""
        if self.read(1):
            raise SSHError("the host sends more than it announced")
        if self.channel.recv_exit_status() != 0:
            raise self.refused()

    def refused(self, line: bytes = b"") -> SSHError:
        """Return an error with the reason that the host gives."""
        if line.startswith(b"no lacks "):
            return NoShellError(f"the host {printable(os.fsdecode(line[3:]), 80)}")
        said = line[3:] if line.startswith(b"no ") else b""
        said = said or self._errors() or line
        if not said.strip() and not self._transport.is_active():
            return SSHError("the connection broke")
        text = said.decode("utf-8", "replace").strip() or "it gives no reason"
        return SSHError(f"the host refuses: {printable(text, 500)}")

    def _errors(self) -> bytes:
        text = b""
        while self.channel.recv_stderr_ready() and len(text) < MAX_LINE:
            text += self.channel.recv_stderr(MAX_LINE)
        return text

    def _receive(self, most: int) -> bytes:
        if not self._buffer:
            try:
                # Read everything at once: paramiko copies the rest of its buffer with every read.
                self._buffer = memoryview(self.channel.recv(DATA_WINDOW))
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
        deadline = time.monotonic() + min(self.channel.timeout, SHELL_PATIENCE)
        while mark not in seen:
            if not self._buffer and not self._arrived.wait(max(0.0, deadline - time.monotonic())):
                raise NoShellError(f"{READS_ALL}, or the shell takes too long to start")
            piece = self._receive(BLOCK)
            if not piece:
                raise self._no_shell(seen)
            seen += piece
            late = len(seen) > MAX_NOISE + BLOCK or time.monotonic() > deadline
            if late and mark not in seen:
                raise SSHError("the host prints without end before it starts a script")
        self._push_back(seen.partition(mark)[2])

    def _no_shell(self, seen: bytes) -> SSHError:
        if not self._transport.is_active():
            return SSHError("the connection broke")
        self.channel.status_event.wait(LAST_PATIENCE)
        if self.channel.exit_status == NO_INPUT:
            return NoShellError(READS_ALL)
        said = (self._errors().strip() or seen.strip()).decode("utf-8", "replace")
        text = printable(said, 300) or f"nothing (exit code {self.channel.exit_status})"
        return NoShellError(f"the host runs no shell, and says: {text}")


def inlined(script: bytes) -> str | None:
    """Return a script as an argument that every login shell passes on unchanged, or None."""
    if len(script) > MAX_INLINE or re.search(rb"[^\n -~]|[\\!@]", script):
        return None
    return script.decode("ascii").replace("'", "'\"'\"'").replace("\n", "@")
