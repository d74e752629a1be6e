"""Run a command over SSH: read both streams as they come, and end it when told so."""

from __future__ import annotations

import contextlib
import math
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clore_client.errors import CommandError, CommandTimeoutError, SSHError, printable
from clore_client.log import logger
from clore_client.models.result import STDERR, STDOUT, CommandResult, OutputLine
from clore_client.ssh.command_line import command_line, encoded, exports, input_bytes, lines_to
from clore_client.ssh.transport import (
    connection_errors,
    open_session,
    reason,
    request_exec,
    request_signal,
)
from clore_client.ssh.watchdog import Watchdog, start_thread
from clore_client.validation import check_bool, check_number, short_repr

if TYPE_CHECKING:
    import paramiko

MAX_OUTPUT = 64 * 1024 * 1024  # bytes
READ_CHUNK = 4 << 20  # more than a window holds: one read empties a buffer
INPUT_CHUNK = 32768
POLL = 0.25  # seconds between two looks at what sets no event
QUIET = 0.5  # seconds of silence after which an ended command may have said everything
OVERTIME = 5.0  # seconds for the output of a command that ended in time
LATE_OUTPUT = 4 << 20  # bytes beyond a window that an ended command may have left on the way
GRACE = 1.0  # seconds to obey SIGTERM
GRACE_OF_INTERRUPT = 0.5
PATIENCE = 2.0  # seconds after which a send counts as stuck
KILL_POLL = 0.1  # seconds between two looks at a process that was told to end
BROKEN = "the connection broke before the command had ended: it may still run on the machine"

# OpenSSH's sshd refuses the protocol's own signals to root before 9.8, and always to a command
# that it is configured to run. So the shell tells its process id first, and what has to end is
# killed over a second channel, with its process group. It also proves that the command is run.
_TELL_PID = "sh -c 'echo {mark}$PPID >&2'\n"
_KILL = (
    "k() {{ kill -s $1 -- -{pid} 2>/dev/null || kill -s $1 {pid} 2>/dev/null; }}; "
    "k TERM; n=0; while [ $n -lt {polls} ] && k 0; do sleep {pause}; n=$((n+1)); done; k KILL"
)


def check_run_arguments(
    command: str | Sequence[str],
    *,
    check: bool = True,
    timeout: float | None = None,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    on_output: Callable[[OutputLine], object] | None = None,
    max_output: int = MAX_OUTPUT,
) -> str:
    """Check what :func:`run_command` is given, before anything is sent; the line to run."""
    line = command_line(command)
    check_bool("check", check)
    if timeout is not None:
        check_number("timeout", timeout, above=True, infinite=True, unit="seconds")
    input_bytes(input)
    exports(env)
    if on_output is not None and not callable(on_output):
        raise TypeError(f"on_output must be callable, not {short_repr(on_output)}")
    if type(max_output) is not int:
        raise TypeError(f"max_output must be a whole number, not {short_repr(max_output)}")
    check_number("max_output", max_output, unit="bytes")
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
    max_output: int = MAX_OUTPUT,
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
        max_output: bytes of both streams that are kept; what comes after goes to ``on_output``
            only, and is counted in the result's ``dropped``.
        login_timeout: seconds that the machine may take to start the command.

    Returns:
        A :class:`CommandResult`, with the output even where ``on_output`` had it.

    Raises:
        CommandError: it ended with another exit code than 0, or by a signal, and ``check`` is on.
        CommandTimeoutError: it did not end in time.
        SSHError: the machine did not run it, or the connection broke; then it may still run.
    """
    line = check_run_arguments(
        command, check=check, timeout=timeout, input=input, env=env, on_output=on_output,
        max_output=max_output,
    )  # fmt: skip
    check_number("login_timeout", login_timeout, above=True, unit="seconds")
    data = input_bytes(input)
    limit = math.inf if timeout is None else timeout
    begin = time.monotonic()
    with Watchdog() as watchdog:
        running = RunningCommand(ssh.get_transport(), watchdog, on_output, max_output)
        try:
            code = running.run(
                encoded("command", exports(env) + line), data, begin + limit, begin + login_timeout
            )
        except _OutOfTimeError as out:
            if str(out) and login_timeout <= limit:
                raise SSHError(f"the machine did not {out} within {login_timeout:g}s") from None
            stdout, stderr = running.text(STDOUT), running.text(STDERR)
            raise CommandTimeoutError(line, limit, stdout, stderr) from None
    duration = time.monotonic() - begin
    result = CommandResult(
        line, code, running.text(STDOUT), running.text(STDERR), duration, running.dropped
    )
    logger.debug("%r", result)
    if check and code != 0:
        raise CommandError(result)
    return result


class _OutOfTimeError(Exception):
    """The time is out; the text names the step that took too long, "" the command itself."""


class RunningCommand:
    """One command on a channel of its own.

    Attributes:
        dropped: bytes of output that were not kept.
    """

    def __init__(
        self,
        transport: Any,
        watchdog: Watchdog,
        on_output: Callable[[OutputLine], object] | None,
        max_output: int,
    ) -> None:
        self.dropped = 0
        self._transport = transport
        self._watchdog = watchdog
        self._channel: Any = None
        self._event = _DataEvent()
        self._log: Any = None
        self._pid_line = PidLine()
        self._given_up = False
        self._room = max_output
        self._output: dict[str, list[bytes]] = {STDOUT: [], STDERR: []}
        self._lines = None if on_output is None else lines_to(on_output)

    def run(self, line: bytes, data: bytes, deadline: float, start_by: float) -> int:
        """Start it, and wait; its exit code. However that is left, nothing of it goes on."""
        feeder: threading.Thread | None = None
        # A little longer: what has started meanwhile can be ended, once it is known.
        self._open(min(deadline, start_by))
        try:
            try:
                self._start(line, min(deadline + PATIENCE, start_by))
                if data:
                    feeder = start_thread("stdin", _feed, self._channel, data)
                else:
                    with self._limited():
                        self._channel.shutdown_write()
                if not self._in_time(deadline):
                    self._tell(self._end(GRACE))
                    self._tell_rest()
                    raise _OutOfTimeError
                self._tell_rest()
                return self._exit_code()
            except BaseException:
                self._end(GRACE_OF_INTERRUPT)
                raise
        finally:
            self._close()
            if feeder is not None:
                feeder.join(PATIENCE)

    def text(self, stream: str) -> str:
        """Return what is kept of a stream."""
        return b"".join(self._output[stream]).decode("utf-8", "replace")

    def _limited(self, seconds: float = PATIENCE) -> contextlib.AbstractContextManager[Any]:
        """Close the connection where a block takes too long: a send itself has no timeout."""
        return self._watchdog.limit(seconds, self._transport.close)

    # --- the start ---

    def _open(self, deadline: float) -> None:
        if self._transport is None or not self._transport.is_active():
            raise SSHError("the connection to the machine is closed")
        seconds = max(deadline - time.monotonic(), 0.0)
        with self._limited(seconds + PATIENCE):
            try:
                self._channel = open_session(self._transport, min(seconds, 1e6))
            except SSHError as error:
                if self._transport.is_active() and time.monotonic() >= deadline:
                    raise _OutOfTimeError("open a channel for the command") from error
                raise
        self._log = _SignalLog(self._channel.logger, self._event)
        # paramiko offers fileno() for this, but with two streams it may miss that one of them
        # has something, and it tells nowhere else that a signal ended the command.
        self._channel.in_buffer.set_event(self._event)
        self._channel.in_stderr_buffer.set_event(self._event)
        self._channel.logger = self._log

    def _start(self, line: bytes, deadline: float) -> None:
        seconds = max(deadline - time.monotonic(), 0.0)
        with self._limited(seconds + PATIENCE):
            request_exec(self._channel, self._pid_line.prefix.encode() + line)
            if not self._channel.event.wait(min(seconds, threading.TIMEOUT_MAX)):
                raise _OutOfTimeError("start the command")
        wrote = self._channel.recv_ready() or self._channel.recv_stderr_ready()
        told = self._channel.exit_status >= 0 or self._log.exit_signal
        if self._channel.closed and not told and not wrote:
            gone = "the connection broke" if not self._transport.is_active() else "it is refused"
            raise SSHError(f"the machine did not start the command: {gone}")

    # --- reading ---

    def _in_time(self, deadline: float) -> bool:
        # The caller's function may be slow, and a read that widens the window may hang.
        seconds = deadline - time.monotonic() + GRACE + PATIENCE
        with self._watchdog.limit(seconds, self._give_up):
            try:
                return self._wait(deadline) and not self._given_up
            except SSHError:
                if self._given_up:
                    return False
                raise

    def _give_up(self) -> None:
        """End the process from another thread than the one that waits for it."""
        if self._ended():
            with self._limited(), contextlib.suppress(*connection_errors()):
                self._transport.send_ignore()  # or the connection is closed
            return
        self._given_up = True
        if self._pid_line.pid is not None:
            self._end_group(self._pid_line.pid, GRACE_OF_INTERRUPT)
        self._close()

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
                self._event.wait(POLL if now >= deadline else min(POLL, deadline - now))

    def _nothing_more(self) -> bool:
        """Whether the server has sent all that the command wrote.

        Silence alone may be that of a slow network. It answers in the order in which it reads:
        what it had when it answered the first time is here before it answers once more.
        """
        channel = self._channel
        for _ in range(2):
            if not self._round_trip():
                return False
            if channel.recv_ready() or channel.recv_stderr_ready() or channel.closed:
                return False
        return True

    def _round_trip(self) -> bool:
        """Whether the server answered to the opening of a channel, which is not used."""
        import paramiko

        with self._limited(2 * PATIENCE):
            try:
                self._transport.open_session(timeout=PATIENCE).close()
            except paramiko.ChannelException:
                return True  # a refusal is an answer
            except connection_errors():
                return False
            return True

    def _ended(self) -> bool:
        return self._log.exit_signal or bool(self._channel.exit_status_ready())

    def _complete(self) -> bool:
        return self._channel.closed or (self._channel.eof_received and self._ended())

    def _read(self) -> list[tuple[str, bytes]]:
        """Return what has come since the last time; waits for nothing."""
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
                    raise SSHError(f"{BROKEN} ({reason(error)})") from error
                if stream == STDERR:
                    data = self._pid_line.taken_out(data)
                self._keep(stream, data)
                pieces.append((stream, data))
        return pieces

    def _keep(self, stream: str, data: bytes) -> None:
        kept = data[: self._room]
        self._room -= len(kept)
        self.dropped += len(data) - len(kept)
        if kept:
            self._output[stream].append(kept)

    def _tell(self, pieces: list[tuple[str, bytes]]) -> None:
        if self._lines is not None:
            for stream, data in pieces:
                self._lines[stream].feed(data)

    def _tell_rest(self) -> None:
        rest = self._pid_line.rest()
        self._keep(STDERR, rest)
        self._tell([(STDERR, rest)])
        if self._lines is not None:
            for lines in self._lines.values():
                lines.finish()

    # --- the end ---

    def _end(self, grace: float) -> list[tuple[str, bytes]]:
        """End the process and its group, first politely; what it still wrote meanwhile."""
        late: list[tuple[str, bytes]] = []
        try:
            if not self._ended() and self._transport.is_active():
                # Its number may be on the way still.
                late += self._read_until(lambda: self._pid_line.pid is not None, GRACE_OF_INTERRUPT)
                pid = self._pid_line.pid
                if pid is None or not self._end_group(pid, grace):
                    with self._limited():
                        request_signal(self._channel, "TERM")
                    late += self._read_until(self._complete, grace)
                late += self._read_until(self._complete, POLL)
        except SSHError as error:
            logger.debug("a command may not have ended: %s", error)
        finally:
            self._close()
        return late

    def _end_group(self, pid: int, grace: float) -> bool:
        """End a process group of the server, after ``grace`` seconds with SIGKILL."""
        polls = math.ceil(grace / KILL_POLL)
        script = _KILL.format(pid=pid, polls=polls, pause=KILL_POLL)
        try:
            with self._limited(grace + 2 * PATIENCE):
                channel = open_session(self._transport, PATIENCE)
                request_exec(channel, f"sh -c {shlex.quote(script)}")
                ended = bool(channel.status_event.wait(grace + PATIENCE))
                channel.close()
                return ended
        except (SSHError, OSError, EOFError) as error:
            logger.debug("process group %d was not ended: %s", pid, error)
            return False

    def _read_until(self, happened: Callable[[], bool], seconds: float) -> list[tuple[str, bytes]]:
        pieces: list[tuple[str, bytes]] = []
        deadline = time.monotonic() + seconds
        while not happened() and not self._channel.closed and time.monotonic() < deadline:
            self._event.wait(POLL / 5)
            pieces += self._read()
        return pieces + self._read()

    def _close(self) -> None:
        """Close the channel at once, or the whole connection where it takes nothing any more."""
        if self._channel is None or self._channel.closed:
            return
        with self._limited(), contextlib.suppress(SSHError, *connection_errors()):
            if not self._channel.exit_status_ready():
                request_signal(self._channel, "KILL")
            self._channel.close()

    def _exit_code(self) -> int:
        channel = self._channel
        code: int = channel.exit_status
        broken = channel.closed and not self._transport.is_active()
        if broken and (code < 0 or not channel.eof_received):
            raise SSHError(BROKEN)
        if code < 0 and not self._log.exit_signal:
            raise SSHError("the machine closed the command's channel without telling how it ended")
        if self._pid_line.pid is None:
            said = (self.text(STDERR).strip() or self.text(STDOUT).strip())[:300]
            raise SSHError(
                "the machine did not run the command: it runs another one instead, or its shell "
                f"ended first (exit code {code}); it says: {printable(said, 300) or 'nothing'}"
            )
        return code if code >= 0 else -1


class PidLine:
    """Takes the line in which a shell tells its process id out of its stderr.

    Attributes:
        pid: of the shell, which leads the process group of its command; None until it is known.
        prefix: what has to stand before the command. Its end of line keeps a shell from quoting
            it, and the variables that follow, in a complaint about the command's syntax.
    """

    def __init__(self) -> None:
        mark = f"clore-{secrets.token_hex(8)} "
        self.pid: int | None = None
        self.prefix = _TELL_PID.format(mark=mark)
        self._mark = mark.encode()
        self._held = b""
        self._seen = False

    def taken_out(self, data: bytes) -> bytes:
        """What of stderr so far, and not given before, is the command's own."""
        if self._seen:
            return data
        data, self._held = self._held + data, b""
        at = data.find(self._mark)
        if at < 0:
            at = len(data) - self._beginning(data)
            self._held = data[at:]
            return data[:at]
        number, line_end, rest = data[at + len(self._mark) :].partition(b"\n")
        if not line_end and len(number) < 20:
            self._held = data[at:]
            return data[:at]
        self._seen = True
        if not line_end or not number.isdigit() or int(number) < 2:  # -1 means every process
            return data
        self.pid = int(number)
        return data[:at] + rest

    def rest(self) -> bytes:
        """What was held back, at the end of the stream."""
        data, self._held = self._held, b""
        return data

    def _beginning(self, data: bytes) -> int:
        """How many bytes at the end of ``data`` may be the beginning of the mark."""
        sizes = range(min(len(data), len(self._mark)), 0, -1)
        return next((size for size in sizes if data.endswith(self._mark[:size])), 0)


class _DataEvent:
    """An event for both buffers of a channel: set when one gets data, or its end."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Called by paramiko."""
        self._event.set()

    def clear(self) -> None:
        """Called by paramiko for one buffer, where the other may have data: does nothing."""

    def wait(self, seconds: float) -> None:
        """Wait until it is set. Read after this, not before."""
        self._event.wait(seconds)
        self._event.clear()


class _SignalLog:
    """Stands in for a channel's logger: only there paramiko tells that a signal ended a command."""

    def __init__(self, logger_of_paramiko: Any, event: _DataEvent) -> None:
        self._logger = logger_of_paramiko
        self._event = event
        self.exit_signal = False

    def log(self, level: int, message: str, *args: object) -> None:
        """Called by paramiko."""
        if 'request "exit-signal"' in message:
            self.exit_signal = True
            self._event.set()
        self._logger.log(level, message, *args)


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
