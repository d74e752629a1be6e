"""Collect the output of a command, and pass it on line by line."""

from __future__ import annotations

import codecs
import re
import secrets
from collections.abc import Callable

from clore_client.models.result import STDERR, STDOUT, OutputLine

LONGEST_PIECE = 65536  # characters of one call of on_output
MAX_STDERR_BEFORE_PID = 65536  # bytes, for what start-up files print


class CommandOutput:
    """Collects the output of a command, and calls ``on_output`` with each of its lines.

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
        """Keep data as far as there is room, and queue it for ``on_output``."""
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
        """Return what was kept of a stream."""
        return self._kept[stream].decode("utf-8", "replace")


class LineSplitter:
    """Splits a stream into lines, and passes each of them to ``on_output``."""

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
    """The first line that a command's shell prints on stderr, with a random mark and its pid.

    It proves that the host runs the command, and gives the process group to end. All of stderr is
    held back until it has come.

    Parameters:
        waits: let the command wait for a line of input, so that it can't start without the rest.

    Attributes:
        pid: the process id of the shell, once it is known.
        prefix: the line to put before the command. It is a line of its own, so that a shell that
            complains about the syntax of the command quotes neither it nor the variables.
    """

    def __init__(self, waits: bool = False) -> None:
        mark = f"clore-{secrets.token_hex(8)} "
        self.pid: int | None = None
        self.prefix = f"sh -c 'echo {mark}$PPID >&2'\n"
        if waits:
            self.prefix = f"sh -c 'echo {mark}$PPID >&2; read -r line' || exit 121\n"
        self._line = re.compile(mark.encode() + rb"([2-9]|[1-9][0-9]{1,9})\n")
        self._held = b""
        self._done = False

    def remove_from(self, data: bytes) -> bytes:
        """Return the next part of stderr without the line."""
        if self._done:
            return data
        self._held += data
        found = self._line.search(self._held)
        if found is None and len(self._held) <= MAX_STDERR_BEFORE_PID:
            return b""
        self._done = True
        if found is not None:
            self.pid = int(found[1])
            self._held = self._held[: found.start()] + self._held[found.end() :]
        return self.rest()

    def rest(self) -> bytes:
        """Return what was held back, at the end of stderr."""
        rest, self._held = self._held, b""
        return rest
