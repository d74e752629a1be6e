"""The wire of one scp transfer: nothing on it waits for ever, and nothing is endless."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

from clore_client.errors import printable
from clore_client.ssh.connect import import_paramiko

SCP_CHUNK = 131072  # bytes that are read or sent at once
LONGEST_LINE = 16384  # bytes; the longest honest one is an error with a path in it
SHOWN_OF_HOST = 300  # characters of what a host says that an error shows
WATCH_LOOK = 0.25  # seconds between two looks at the clock
WATCH_SLACK = 1.0  # seconds after paramiko's own timeout, where it has one
MOST_UNREAD = 32 * 1024 * 1024  # bytes; far more than the window that the host was given
FLOODED = "the host sent more than it was allowed to"
CLOSE_GRACE = 5.0  # seconds in which closing a channel must end what waits for it


class ScpError(Exception):
    """What went wrong with a transfer, for the error that is made of it."""


@contextlib.contextmanager
def local_faults() -> Iterator[None]:
    """What this machine refuses, a full disk for one, becomes a fault of the transfer."""
    try:
        yield
    except OSError as error:
        what = f": {error.filename!r}" if error.filename else ""
        text = printable(f"{error.strerror or error}{what}", 500)
        raise ScpError(f"on this machine: {text}") from error


def words_of_host(raw: bytes) -> str:
    """What a host says, as it may stand in an error."""
    return printable(raw.decode("utf-8", "replace").strip(), SHOWN_OF_HOST)


class ScpWire:
    """A channel on which the host runs scp. Every method raises :class:`ScpError`.

    paramiko waits without a limit for the answer to an exec request, and for a socket that takes
    no more bytes; and it keeps whatever comes, also beyond the window. So a thread watches, and
    closes the channel under a call that takes too long, or where that can't help, the connection.

    Attributes:
        channel: of paramiko.
    """

    def __init__(self, transport: Any, command: bytes, timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout
        self._broken: Any = (OSError, EOFError, import_paramiko().SSHException)
        self._buffer = bytearray()
        self._call_until = math.inf
        self._flooded = False
        self._done = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, daemon=True, name="scp watchdog")
        self.channel: Any = None
        self._watchdog.start()
        try:
            with self._bounded("opened no channel"):
                self.channel = transport.open_session(timeout=timeout)
            with self._bounded("did not start scp"):
                self.channel.exec_command(command)
        except BaseException:
            self.close()
            raise

    def line(self) -> bytes | None:
        """The next line without its end, or None at the end of everything."""
        until = time.monotonic() + self._timeout
        while (end := self._buffer.find(b"\n", 0, LONGEST_LINE)) < 0:
            if len(self._buffer) >= LONGEST_LINE:
                raise ScpError("the host sent a line without an end")
            if not self._more(until):
                if self._buffer:
                    raise ScpError("the host broke off in the middle of a line")
                return None
        return self._take(end + 1)[:-1]

    def some(self, most: int) -> bytes:
        """At most so many bytes, as soon as there are some; none at the end of everything."""
        if not self._buffer:
            self._more(time.monotonic() + self._timeout)
        return self._take(most)

    def confirm(self) -> None:
        """Read the host's answer to what was sent; raises unless it is a yes."""
        answer = self.some(1)
        if answer == b"\0":
            return
        if not answer:
            raise ScpError(self.how_it_ended())
        if answer in b"\1\2":
            raise ScpError(f"the host says: {self._rest_of_line()}")
        text = words_of_host(answer + self._take(LONGEST_LINE))
        raise ScpError(f"this is no answer of scp: {text!r}")

    def send(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        try:
            while data:
                with self._bounded("took nothing"):
                    self.channel.settimeout(self._timeout)
                    sent = self.channel.send(data[:SCP_CHUNK])
                if not sent:
                    raise ScpError("the host has closed the channel")
                data = data[sent:]
        except ScpError as fault:
            # Most often the host has said why before it left.
            said = self._said()
            raise ScpError(f"{fault}; the host says: {said}" if said else str(fault)) from fault

    def finish(self) -> None:
        """Say that this was all, and wait for scp's end; raises when that was a bad one."""
        with self._bounded("did not take the end"):
            self.channel.shutdown_write()
        if self._status() > 0:
            raise ScpError(self.how_it_ended())

    def how_it_ended(self) -> str:
        """Why there is nothing more to read."""
        status = self._status()
        said = self._said()
        how = "the host has closed the channel"
        if self._flooded:
            return FLOODED
        if status > 0:
            how = f"scp on the host ended with exit code {status}"
        elif not self._transport.is_active():
            how = "the connection broke"
        return f"{how}: {said}" if said else how

    def close(self) -> None:
        """Close the channel, whatever the host does."""
        if self.channel is not None:
            with contextlib.suppress(ScpError), self._bounded("closed nothing"):
                self.channel.close()
        self._done.set()
        self._watchdog.join(CLOSE_GRACE)

    def _take(self, most: int) -> bytes:
        taken = bytes(self._buffer[:most])
        del self._buffer[:most]
        return taken

    def _more(self, until: float) -> bool:
        """Wait for more bytes; False when there will be none."""
        left = until - time.monotonic()
        with self._bounded("sent nothing that is whole"):
            if left <= 0:
                raise TimeoutError
            self.channel.settimeout(left)
            chunk = self.channel.recv(SCP_CHUNK)
        self._buffer += chunk
        return bool(chunk)

    def _rest_of_line(self) -> str:
        try:
            line = self.line() or b""
        except ScpError:
            line = bytes(self._buffer)
        return words_of_host(line)

    def _said(self) -> str:
        """An error's text, when it is there already."""
        if self.channel is None:
            return ""
        raw = bytes(self._buffer[:LONGEST_LINE])
        errors = b""
        with contextlib.suppress(*self._broken):
            if not raw and self.channel.recv_ready():
                raw = self.channel.recv(LONGEST_LINE)
            if self.channel.recv_stderr_ready():
                errors = self.channel.recv_stderr(LONGEST_LINE)
        raw = raw.lstrip(b"\0")
        return words_of_host(raw[1:] if raw[:1] in (b"\1", b"\2") else errors)

    def _status(self) -> int:
        """The exit code; -1 where the host names none in time."""
        ended = self.channel.status_event.wait(self._timeout)
        return int(self.channel.exit_status) if ended else -1

    @contextlib.contextmanager
    def _bounded(self, failing: str) -> Iterator[None]:
        """A call of paramiko, which ends in time and raises nothing else than a fault."""
        self._call_until = time.monotonic() + self._timeout + WATCH_SLACK
        try:
            yield
        except self._broken as error:
            late = time.monotonic() >= self._call_until - WATCH_SLACK
            if self._flooded:
                text = FLOODED
            elif isinstance(error, TimeoutError) or late:
                text = f"the host {failing} within {self._timeout:g}s"
            else:
                text = f"the host {failing}: {printable(str(error), SHOWN_OF_HOST)}"
            raise ScpError(text) from error
        finally:
            self._call_until = math.inf

    def _watch(self) -> None:
        while not self._done.wait(WATCH_LOOK):
            if self.channel is not None:
                unread = len(self.channel.in_buffer) + len(self.channel.in_stderr_buffer)
                self._flooded = unread > MOST_UNREAD
            if self._flooded or time.monotonic() > self._call_until:
                break
        else:
            return
        if self.channel is not None and not self._flooded:
            # In a thread of its own, as its farewell may meet the same full socket.
            threading.Thread(target=self._close_quietly, daemon=True).start()
            if self._done.wait(CLOSE_GRACE):
                return
        self._transport.close()

    def _close_quietly(self) -> None:
        with contextlib.suppress(*self._broken):
            self.channel.close()
