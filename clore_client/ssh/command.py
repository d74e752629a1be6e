"""A command over SSH: both of its streams as they come, how it ended, and its end when told so."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clore_client.errors import CommandError, CommandTimeoutError, SSHError, printable
from clore_client.log import logger
from clore_client.models.result import STDERR, STDOUT, CommandResult, OutputLine
from clore_client.ssh.command_line import command_line, encoded, exports, input_bytes, lines_to
from clore_client.ssh.transport import connection_errors, reason
from clore_client.ssh.watchdog import (
    PATIENCE,
    Guard,
    PidLine,
    cut,
    end_group,
    round_trip,
    send_signal,
    soon_done,
)
from clore_client.validation import check_bool, check_number

if TYPE_CHECKING:
    import paramiko

READ_CHUNK = 4 << 20  # more than a window holds: one read empties a buffer
INPUT_CHUNK = 32768
GLANCE = 0.25  # seconds between two looks at what rings no bell
QUIET = 0.5  # seconds of silence after which an ended command may have said everything
OVERTIME = 5.0  # seconds for the output of a command that ended in time
LATE_OUTPUT = 4 << 20  # bytes beyond a window that an ended command may have left on the way
GRACE = 1.0  # seconds to obey SIGTERM
GRACE_OF_INTERRUPT = 0.5
BROKEN = "the connection broke before the command had ended"


def check_run_arguments(
    command: str | Sequence[str],
    *,
    check: bool = True,
    timeout: float | None = None,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    on_output: Callable[[OutputLine], object] | None = None,
) -> str:
    """Check what :func:`run_command` is given, before anything is sent; the line to run."""
    line = command_line(command)
    check_bool("check", check)
    if timeout is not None:
        check_number("timeout", timeout, above=True, infinite=True, unit="seconds")
    input_bytes(input)
    exports(env)
    if on_output is not None and not callable(on_output):
        raise TypeError(f"on_output must be callable, not {printable(repr(on_output), 80)}")
    return line


def run_command(
    ssh: paramiko.SSHClient,
    command: str | Sequence[str],
    *,
    check: bool = True,
    timeout: float | None = None,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    on_output: Callable[[OutputLine], object] | None = None,
    login_timeout: float = 30.0,
) -> CommandResult:
    """Run a command and wait for its end, reading both streams at once.

    What the command leaves in the background is not waited for, unless it goes on writing to the
    command's own output. A timeout, Ctrl-C and any other exception end the remote process with
    its process group: SIGTERM, a little later SIGKILL, and its channel is closed.

    Parameters:
        ssh: a connection.
        command: a line for the machine's shell, or a list of arguments, which is quoted for it.
        check: raise CommandError for another exit code than 0.
        timeout: seconds that it may take; None waits for ever.
        input: for its stdin, text as UTF-8; None: an empty one.
        env: variables for the command. They stand in the process list of the machine.
        on_output: called with each :class:`OutputLine` as it comes. The order within a stream is
            kept, not the one between the two; of a line without end it gets pieces.
        login_timeout: seconds that the machine may take to start the command.

    Returns:
        A :class:`CommandResult`, whose output is whole with ``on_output`` too.

    Raises:
        CommandError: it ended with another exit code than 0, or by a signal, and ``check`` is on.
        CommandTimeoutError: it did not end in time.
        SSHError: the machine did not start it, or the connection broke.
    """
    line = check_run_arguments(
        command, check=check, timeout=timeout, input=input, env=env, on_output=on_output
    )
    check_number("login_timeout", login_timeout, above=True, unit="seconds")
    data = input_bytes(input)
    limit = math.inf if timeout is None else timeout
    begin = time.monotonic()
    try:
        channel = _session(ssh, min(limit, login_timeout))
        running = _Running(channel, on_output)
        code = running.run(
            encoded("command", exports(env) + line), data, begin + limit, begin + login_timeout
        )
    except _OutOfTimeError as out:
        if out.text and login_timeout <= limit:
            raise SSHError(f"the machine did not {out.text} within {login_timeout:g}s") from None
        raise CommandTimeoutError(line, limit, out.stdout, out.stderr) from None
    result = CommandResult(
        line, code, running.text(STDOUT), running.text(STDERR), time.monotonic() - begin
    )
    logger.debug("%r", result)
    if check and code != 0:
        raise CommandError(result)
    return result


class _OutOfTimeError(Exception):
    """The time is out; ``text`` names the step that took too long, ``""`` the command itself."""

    def __init__(self, text: str, stdout: str = "", stderr: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.stdout = stdout
        self.stderr = stderr


class _Running:
    """One command on a channel of its own."""

    def __init__(self, channel: Any, on_output: Callable[[OutputLine], object] | None) -> None:
        self._channel = channel
        self._bell = _Bell()
        self._ear = _SignalEar(channel.logger, self._bell)
        # paramiko offers fileno() for this, but with two streams it may miss that one of them
        # has something, and it tells nowhere else that a signal ended the command.
        channel.in_buffer.set_event(self._bell)
        channel.in_stderr_buffer.set_event(self._bell)
        channel.logger = self._ear
        self._pid_line = PidLine()
        self._given_up = False
        self._output: dict[str, list[bytes]] = {STDOUT: [], STDERR: []}
        self._lines = None if on_output is None else lines_to(on_output)

    def run(self, line: bytes, data: bytes, deadline: float, start_by: float) -> int:
        """Start it, and wait; its exit code. However that is left, nothing of it goes on."""
        feeder: threading.Thread | None = None
        try:
            try:
                # A little longer: what has started meanwhile can be ended, once it is known.
                self._start(line, min(deadline + PATIENCE, start_by))
                if not data:
                    self._channel.shutdown_write()
                else:
                    feeder = threading.Thread(
                        target=_feed, args=(self._channel, data), name="clore-stdin", daemon=True
                    )
                    feeder.start()
                if not self._in_time(deadline):
                    self._tell(self._end(GRACE))
                    self._tell_rest()
                    raise _OutOfTimeError("", self.text(STDOUT), self.text(STDERR))
                self._tell_rest()
                return self._exit_code()
            except BaseException:
                self._end(GRACE_OF_INTERRUPT)
                raise
        finally:
            if not self._channel.closed:
                soon_done(self._channel.close)
            if feeder is not None:
                feeder.join(PATIENCE)

    def text(self, stream: str) -> str:
        """What a stream held."""
        return b"".join(self._output[stream]).decode("utf-8", "replace")

    def _start(self, line: bytes, deadline: float) -> None:
        guard = Guard(deadline - time.monotonic(), lambda: cut(self._channel))
        try:
            with guard:
                self._channel.exec_command(self._pid_line.prefix.encode() + line)
        except connection_errors() as error:
            if guard.fired:
                raise _OutOfTimeError("start the command") from None
            raise SSHError(f"the machine did not start the command: {reason(error)}") from error

    def _in_time(self, deadline: float) -> bool:
        # The caller's function may be slow. And sends have no timeout: where nothing is taken any
        # more, even a read may hang.
        with Guard(deadline - time.monotonic() + GRACE + PATIENCE, self._give_up):
            try:
                return self._wait(deadline) and not self._given_up
            except SSHError:
                if self._given_up:
                    return False
                raise

    def _give_up(self) -> None:
        """End the process from another thread than the one that waits for it."""
        transport, pid = self._channel.transport, self._pid_line.pid
        if self._ended() and soon_done(transport.send_ignore):
            return
        self._given_up = True
        if pid is not None:
            soon_done(lambda: end_group(transport, pid, GRACE_OF_INTERRUPT))
        cut(self._channel)

    def _wait(self, deadline: float) -> bool:
        """Read until the command has ended; False when the time is out before."""
        silent_since: float | None = None
        over_since: float | None = None
        late = 0
        while True:
            # Asked before the read: what was sent before its end is there by now.
            complete, ended = self._complete(), self._ended()
            pieces = self._read()
            self._tell(pieces)
            if complete:
                return True
            now = time.monotonic()
            if pieces:
                silent_since = None
            if ended:
                # Something in the background holds its output open.
                silent_since = now if silent_since is None else silent_since
                late += sum(len(data) for _, data in pieces)
                if late > self._channel.in_window_size + LATE_OUTPUT:
                    return True
                if now - silent_since >= QUIET:
                    if self._nothing_more():
                        return True
                    silent_since = None
            if now >= deadline:
                if not self._ended():
                    return False
                over_since = now if over_since is None else over_since
                if now - over_since >= OVERTIME:
                    return True
            if not pieces:
                self._bell.wait(GLANCE if now >= deadline else min(GLANCE, deadline - now))

    def _nothing_more(self) -> bool:
        """Whether the server has sent all that the command wrote.

        Silence alone may be that of a slow network. It answers in the order in which it reads:
        what it had when it answered the first time is here before it answers once more.
        """
        channel = self._channel
        for _ in range(2):
            if not round_trip(channel.transport):
                return False
            if channel.recv_ready() or channel.recv_stderr_ready() or channel.closed:
                return False
        return True

    def _ended(self) -> bool:
        return self._ear.heard or bool(self._channel.exit_status_ready())

    def _complete(self) -> bool:
        return self._channel.closed or (self._channel.eof_received and self._ended())

    def _read(self) -> list[tuple[str, bytes]]:
        """What has come since the last time; waits for nothing."""
        pieces = []
        channel = self._channel
        for stream, ready, receive in (
            (STDOUT, channel.recv_ready, channel.recv),
            (STDERR, channel.recv_stderr_ready, channel.recv_stderr),
        ):
            if ready():
                try:
                    data = receive(READ_CHUNK)
                except connection_errors() as error:  # it may send that the window is open again
                    raise SSHError(f"{BROKEN}: {reason(error)}") from error
                if stream == STDERR:
                    data = self._pid_line.taken_out(data)
                self._output[stream].append(data)
                pieces.append((stream, data))
        return pieces

    def _tell(self, pieces: list[tuple[str, bytes]]) -> None:
        if self._lines is not None:
            for stream, data in pieces:
                self._lines[stream].feed(data)

    def _tell_rest(self) -> None:
        rest = self._pid_line.rest()
        self._output[STDERR].append(rest)
        self._tell([(STDERR, rest)])
        if self._lines is not None:
            for lines in self._lines.values():
                lines.finish()

    def _end(self, grace: float) -> list[tuple[str, bytes]]:
        """End the process and its group, first politely; what it still wrote meanwhile."""
        late: list[tuple[str, bytes]] = []
        try:
            if not self._ended():
                # Its number may be on the way still.
                late += self._read_until(lambda: self._pid_line.pid is not None, GRACE_OF_INTERRUPT)
                late += self._end_politely(grace)
        finally:
            cut(self._channel)
        return late

    def _end_politely(self, grace: float) -> list[tuple[str, bytes]]:
        pid, late = self._pid_line.pid, []
        done: list[bool] = []
        if pid is not None:
            transport = self._channel.transport
            threading.Thread(
                target=lambda: done.append(end_group(transport, pid, grace)),
                name="clore-end",
                daemon=True,
            ).start()
            late += self._read_until(lambda: bool(done), grace + 2 * PATIENCE)
        if done != [True]:
            if soon_done(lambda: send_signal(self._channel, "TERM")):
                late += self._read_until(self._complete, grace)
            else:
                self._channel.transport.close()
        return late + self._read_until(self._complete, GLANCE)

    def _read_until(self, happened: Callable[[], bool], seconds: float) -> list[tuple[str, bytes]]:
        pieces: list[tuple[str, bytes]] = []
        deadline = time.monotonic() + seconds
        while not happened() and not self._channel.closed and time.monotonic() < deadline:
            self._bell.wait(GLANCE / 5)
            pieces += self._read()
        return pieces + self._read()

    def _exit_code(self) -> int:
        channel = self._channel
        broken = channel.closed and not channel.transport.is_active()
        code: int = channel.exit_status
        if broken and (code < 0 or not channel.eof_received):
            raise SSHError(BROKEN)
        if code >= 0:
            return code
        if self._ear.heard:
            return -1
        raise SSHError("the machine closed the command's channel without telling how it ended")


class _Bell:
    """An event for both buffers of a channel: rings when one gets data, or its end."""

    def __init__(self) -> None:
        self._rung = threading.Event()

    def set(self) -> None:
        """Called by paramiko."""
        self._rung.set()

    def clear(self) -> None:
        """Called by paramiko for one buffer, where the other may have data: does nothing."""

    def wait(self, seconds: float) -> None:
        """Until it rings. Read after this, not before."""
        self._rung.wait(seconds)
        self._rung.clear()


class _SignalEar:
    """Stands in for a channel's logger: only there paramiko tells that a signal ended a command."""

    def __init__(self, behind: Any, bell: _Bell) -> None:
        self._behind = behind
        self._bell = bell
        self.heard = False

    def log(self, level: int, message: str, *args: object) -> None:
        """Called by paramiko."""
        if 'request "exit-signal"' in message:
            self.heard = True
            self._bell.set()
        self._behind.log(level, message, *args)


def _session(ssh: paramiko.SSHClient, seconds: float) -> Any:
    """A channel for one command."""
    transport = ssh.get_transport()
    if transport is None or not transport.is_active():
        raise SSHError("the connection to the machine is closed")
    begin = time.monotonic()
    try:
        return transport.open_session(timeout=seconds)
    except connection_errors() as error:
        if not transport.is_active():
            raise SSHError("the connection broke before the command was started") from error
        if time.monotonic() - begin >= seconds:
            raise _OutOfTimeError("open a channel for the command") from None
        why = reason(error)
        raise SSHError(f"the machine opened no channel for the command: {why}") from error


def _feed(channel: Any, data: bytes) -> None:
    """Send a command's input, as much of it as it takes."""
    view = memoryview(data)
    try:
        while view:
            sent = channel.send(bytes(view[:INPUT_CHUNK]))
            if not sent:
                return
            view = view[sent:]
        channel.shutdown_write()
    except Exception as error:
        # It ended without reading all of it, which is no error, or the reading side will tell.
        logger.debug("a command's input was not sent whole: %s", reason(error))
