"""Run a command over SSH until its deadline, and end it on the host if it must stop."""

from __future__ import annotations

import contextlib
import math
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from clore_client.errors import CommandError, CommandTimeoutError, SSHError, printable
from clore_client.log import logger
from clore_client.models.result import STDERR, STDOUT, CommandResult, OutputLine
from clore_client.ssh.command_text import CommandOutput, PidLine, command_lines, input_bytes
from clore_client.ssh.transport import (
    NoChannelError,
    Watchdog,
    channel_request,
    connection_errors,
    open_next_session,
    open_session,
    reason,
    start_thread,
    with_patience,
)
from clore_client.validation import check_bool, check_callback, check_count, check_number

if TYPE_CHECKING:
    import paramiko

MAX_OUTPUT = 64 * 1024 * 1024  # bytes
READ_CHUNK = 4 << 20  # bytes; more than a window, so that one read empties a buffer
START_TIMEOUT = 30.0  # seconds for a host to start a command
SESSION_PATIENCE = 1.0  # seconds for a host with few sessions to end the previous one
POLL = 0.25  # seconds between two checks for changes that set no event
QUIET = 0.5  # seconds without output before an ended command's output may be complete
OVERTIME = 5.0  # seconds after the deadline for the output of a command that ended in time
LATE_OUTPUT = 4 << 20  # bytes beyond a window that an ended command may have left in pipes
GRACE = 1.0  # seconds between SIGTERM and SIGKILL
PATIENCE = 2.0  # seconds for a call that should be short
KILL_POLL = 0.1  # seconds between two checks of whether a process has ended
BROKEN = "the connection broke before the command had ended: it may still run on the host"

# Run on a second channel: sshd before 9.8 rejects the protocol's own signals for root.
# dropbear gives a command no process group of its own: there, its descendants are killed.
# Before a group's number, dash needs "--", and busybox accepts none.
_KILL_GROUP = (
    "s() {{ kill -s $1 -- $2 2>/dev/null || kill -s $1 $2 2>/dev/null; }}; "
    "d() {{ for c in $(cat /proc/$1/task/*/children 2>/dev/null); do d $c; done; echo $1; }}; "
    "t=-{pid}; s 0 $t || t=$(d {pid}); "
    "k() {{ r=1; for p in $t; do s $1 $p && r=0; done; return $r; }}; "
    "k TERM; n=0; while [ $n -lt {polls} ] && k 0; do sleep {pause}; n=$((n+1)); done; k KILL"
)


class Command:
    """Check the arguments of a command, and run it.

    Parameters:
        command: a line for the host's shell, or a list of arguments, which is quoted.
        check: raise CommandError unless the exit code is 0.
        timeout: seconds that the command may take; None for no limit.
        input: the standard input; text is sent as UTF-8.
        env: environment variables. They are visible in the host's process list. Where the login
            shell is csh, the command then runs without the aliases of its start-up files.
        on_output: called with each :class:`OutputLine` when it arrives. The order of lines is kept
            within a stream, not between the two. A very long line comes in pieces.
        max_output: bytes of both streams to keep; the rest goes to ``on_output`` only, and is
            counted in the result's ``dropped``.
    """

    def __init__(
        self, command: str | Sequence[str], *, check: bool = True, timeout: float | None = None,
        input: str | bytes | None = None, env: Mapping[str, str] | None = None,
        on_output: Callable[[OutputLine], object] | None = None, max_output: int = MAX_OUTPUT,
    ) -> None:  # fmt: skip
        self.line, self.encoded_lines = command_lines(command, env)
        self.input = input_bytes(input)
        limit = math.inf if timeout is None else timeout
        self.timeout = check_number("timeout", limit, above=True, infinite=True, unit="seconds")
        check_callback("on_output", on_output, 1)
        self.on_output = on_output
        self.max_output = check_count("max_output", max_output)
        self.check = check_bool("check", check)

    def run(self, ssh: paramiko.SSHClient) -> CommandResult:
        """Run the command and wait for its end.

        It does not wait for a process that the command leaves in the background, unless that keeps
        writing to the command's output. A timeout, Ctrl-C and any other exception end the command's
        process group on the host: with SIGTERM, and a little later with SIGKILL.

        Raises:
            CommandError: the exit code was not 0, or a signal ended the command; with ``check``.
            CommandTimeoutError: the command did not end in time.
            SSHError: the host did not run the command; or the connection broke, and the command
                may still run.
        """
        begin = time.monotonic()
        output = CommandOutput(self.max_output, self.on_output)
        with Watchdog() as watchdog:
            code = RunningCommand(ssh.get_transport(), watchdog, self, output).run()
        duration = time.monotonic() - begin
        stdout, stderr = output.text(STDOUT), output.text(STDERR)
        if code is None:
            raise CommandTimeoutError(self.line, self.timeout, stdout, stderr)
        result = CommandResult(self.line, code, stdout, stderr, duration, output.dropped)
        logger.debug("%r", result)
        if self.check and code != 0:
            raise CommandError(result)
        return result


class RunningCommand:
    """Run a command on a channel."""

    def __init__(
        self, transport: Any, watchdog: Watchdog, command: Command, output: CommandOutput
    ) -> None:
        self._transport = transport
        self._watchdog = watchdog
        self._command = command
        self._output = output
        self._deadline = time.monotonic() + command.timeout
        self._pid_line = PidLine(waits=bool(command.input))
        self._channel: Any = None
        self._feeder: threading.Thread | None = None
        self._wake = threading.Event()  # set when one of the streams has data or has ended
        self._exit_signal = False
        self._stopped_early = False

    def run(self) -> int | None:
        """Return the exit code, -1 after a signal, or None if the command did not end in time."""
        try:
            in_time = self._in_time()
        finally:
            self._end()
        self._output.add(STDERR, self._pid_line.rest())
        self._output.finish()
        return self._exit_code() if in_time else None

    def _in_time(self) -> bool:
        """Start the command and read its output; return False if time ran out."""
        given = self._command.input
        try:
            self._start()
            if given:
                self._wait_for_shell()
                given = b"\n" + given  # the first line starts the command
        except SSHError:
            if self._time_left():
                raise
            return False
        self._feeder = start_thread("stdin", _feed, self._channel, given)
        # on_output may take longer than the timeout; the command must stop anyway.
        with self._watchdog.limit(self._time_left() + GRACE + PATIENCE, self._stop_early):
            return self._wait() and not self._stopped_early

    def _time_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _limited(self, seconds: float = PATIENCE) -> contextlib.AbstractContextManager[Any]:
        """Close the connection if a block takes too long: sending itself has no timeout."""
        return self._watchdog.limit(seconds, lambda: self._transport.close())

    # --- the start ---

    def _start(self) -> None:
        """Open a channel, and wait until the host confirms that it has started the command."""
        seconds = min(START_TIMEOUT, self._time_left())
        start_by = time.monotonic() + seconds
        with self._limited(seconds + PATIENCE):
            self._channel = with_patience(
                min(seconds, SESSION_PATIENCE), lambda: open_session(self._transport, seconds)
            )
            self._channel.settimeout(None)  # a command may read its input late
            # paramiko clears an event when one stream is empty, though the other may have data.
            event = SimpleNamespace(set=self._wake.set, clear=lambda: None)
            self._channel.in_buffer.set_event(event)
            self._channel.in_stderr_buffer.set_event(event)
            self._watch_for_exit_signal()
            lines = self._pid_line.before(self._command.encoded_lines)
            channel_request(self._channel, "exec", lines)
            open_next_session(self._transport)
            if not self._channel.event.wait(max(0.0, start_by - time.monotonic())):
                raise SSHError(f"the host did not start the command within {START_TIMEOUT:g}s")

    def _wait_for_shell(self) -> None:
        """Wait until the shell has run its start-up files, which could read the input."""

        def ready() -> bool:
            return self._pid_line.pid is not None or self._complete()

        self._read_until(ready, min(START_TIMEOUT, self._time_left()))
        if not ready():
            raise SSHError(
                f"the host did not start the command within {START_TIMEOUT:g}s: a start-up "
                "file there, such as ~/.bashrc, may wait, or read the command's input"
            )

    def _watch_for_exit_signal(self) -> None:
        """Notice that a signal ended the command, which paramiko only writes to its log."""
        log = self._channel.logger.log

        def watched(level: int, message: str, *args: object) -> None:
            if 'request "exit-signal"' in message:
                self._exit_signal = True
                self._wake.set()
            log(level, message, *args)

        self._channel.logger = SimpleNamespace(log=watched)

    # --- output ---

    def _wait(self) -> bool:
        """Read output until the command has ended; return False if time ran out first."""
        while not self._ended():
            if not self._time_left():
                return False
            self._read_or_wait(self._time_left())
            self._output.report()
        self._read_late_output()
        return True

    def _read_late_output(self) -> None:
        """Read the output that has not arrived when the command ends.

        The stream may stay open, because a process in the background can hold it.
        """
        give_up_at = time.monotonic() + self._time_left() + OVERTIME
        silent_since = time.monotonic()
        expected = self._channel.in_window_size + LATE_OUTPUT
        while not self._complete() and expected > 0 and time.monotonic() < give_up_at:
            size = self._read_or_wait(POLL)
            self._output.report()
            expected -= size
            if size:
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since >= QUIET:
                if self._all_arrived():
                    return
                silent_since = time.monotonic()
        self._read()

    def _ended(self) -> bool:
        return self._exit_signal or bool(self._channel.exit_status_ready())

    def _complete(self) -> bool:
        return self._channel.closed or (self._channel.eof_received and self._ended())

    def _read_or_wait(self, seconds: float) -> int:
        """Read what has arrived and return its size; if that is 0, wait for more."""
        size = self._read()
        if not size:
            self._wake.wait(min(seconds, POLL))
            self._wake.clear()
        return size

    def _read(self) -> int:
        """Read what has arrived, and return its size."""
        channel, size = self._channel, 0
        for stream, ready, receive in (
            (STDOUT, channel.recv_ready, channel.recv),
            (STDERR, channel.recv_stderr_ready, channel.recv_stderr),
        ):
            if not ready():
                continue
            try:
                # This may hang, because paramiko also sends: it asks the host for more data.
                with self._limited(self._time_left() + GRACE + PATIENCE):
                    data = receive(READ_CHUNK)
            except connection_errors() as error:
                raise SSHError(f"{BROKEN} ({reason(error)})") from error
            size += len(data)
            self._output.add(stream, self._pid_line.remove_from(data) if stream == STDERR else data)
        return size

    def _all_arrived(self) -> bool:
        """Check that all output has arrived, and is not only delayed by a slow network.

        The host sends in order: output that was ready before its first reply arrives before its
        second reply.
        """
        channel = self._channel
        for _ in range(3):  # the first session may be one that was opened in advance
            try:
                with self._limited(2 * PATIENCE):
                    open_session(self._transport, PATIENCE).close()
            except NoChannelError:
                pass  # a refusal is a reply too
            except (SSHError, OSError, EOFError):
                return False
            if channel.recv_ready() or channel.recv_stderr_ready() or channel.closed:
                return False
        return True

    # --- the end ---

    def _end(self) -> None:
        """End the command's process group if it still runs, and close the channel."""
        if self._channel is None:
            return
        self._deadline = min(self._deadline, time.monotonic())
        try:
            if not self._ended():
                self._read_until(lambda: self._pid_line.pid is not None, GRACE)
                self._kill_group()
                self._read_until(self._complete, POLL)
        except SSHError as error:
            logger.debug("a command may still run: %s", error)
        finally:
            self._close()
            if self._feeder is not None:
                self._feeder.join(PATIENCE)

    def _stop_early(self) -> None:
        """End a command whose time has run out while ``on_output`` runs in another thread."""
        if not self._ended():
            self._stopped_early = True
            self._kill_group()
            self._close()

    def _read_until(self, happened: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened() and not self._channel.closed and time.monotonic() < deadline:
            self._read_or_wait(deadline - time.monotonic())
        self._read()

    def _kill_group(self) -> None:
        """Kill the command's process group with a script on a second channel."""
        pid = self._pid_line.pid
        if pid is None:
            return
        script = _KILL_GROUP.format(pid=pid, polls=math.ceil(GRACE / KILL_POLL), pause=KILL_POLL)
        try:
            with self._limited(GRACE + 3 * PATIENCE):
                channel = open_session(self._transport, PATIENCE)
                channel_request(channel, "exec", f"sh -c {shlex.quote(script)}")
                channel.status_event.wait(GRACE + PATIENCE)
                channel.close()
        except (SSHError, OSError, EOFError) as error:
            logger.debug("process group %d may still run: %s", pid, error)

    def _close(self) -> None:
        if self._channel.closed:
            return
        with self._limited(), contextlib.suppress(SSHError, *connection_errors()):
            if not self._ended():  # the host refused a second channel, or has sent no pid
                channel_request(self._channel, "signal", "KILL", answered=False)
            self._channel.close()

    def _exit_code(self) -> int:
        code: int = self._channel.exit_status
        known = code >= 0 or self._exit_signal
        if not self._transport.is_active() and not (known and self._channel.eof_received):
            raise SSHError(BROKEN)
        if not known:
            raise SSHError(
                "the host did not start the command, or closed the channel without an exit code"
            )
        if self._pid_line.pid is None:
            said = self._output.text(STDERR).strip() or self._output.text(STDOUT).strip()
            raise SSHError(
                "the host did not run the command: it runs another one instead, or its shell "
                f"ended first (exit code {code}); it says: {printable(said, 300) or 'nothing'}"
            )
        return code if code >= 0 else -1


def _feed(channel: Any, data: bytes) -> None:
    """Send the input of a command until the command takes no more."""
    try:
        channel.sendall(memoryview(data))  # with bytes, paramiko would copy the rest each time
        channel.shutdown_write()
    except Exception as error:
        # The command may end without reading all of its input; that is not an error.
        logger.debug("the input of a command was not sent completely: %s", reason(error))
