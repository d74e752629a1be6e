"""Start, follow and stop jobs: commands that run on a host without a connection."""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from clore_client.errors import (
    HostKeyChangedError,
    JobError,
    JobTimeoutError,
    OrderEndedError,
    SSHError,
    printable,
)
from clore_client.log import logger
from clore_client.models.result import STDOUT, OutputLine
from clore_client.progress import ProgressEvent, ProgressOptions, Report, readable_size
from clore_client.ssh.command_text import LineSplitter, SecretBytes, command_line, encoded, exports
from clore_client.ssh.connect import ConnectionPool
from clore_client.ssh.job_scripts import JOB_RUNNER, job_script
from clore_client.ssh.openssh import PLAIN_NAME, check_plain_name
from clore_client.ssh.transfer.remote_script import NoShellError, RemoteScript
from clore_client.ssh.transfer.scripts import remote_path, script_text
from clore_client.ssh.transfer.transfer import check_path
from clore_client.ssh.transport import Watchdog, connection_errors, reason, takes_turns
from clore_client.validation import check_callback, check_count, check_number, check_optional_number

JOB_TIMEOUT = 30.0  # seconds without any output of a script
LEAST_PATIENCE = 5.0  # seconds for a login or an answer, even if less time is left
MAX_TAIL = 8 * 1024 * 1024  # bytes
MAX_PORTION = 1048576  # bytes of output after one size
MAX_JOBS = 10_000
MOST_USELESS_TRIES = 3  # consecutive connections without output that end at once
LEAST_USEFUL = 0.5  # seconds from the first message to the end of a useful connection
RECONNECT_PAUSE = 1.0  # the fewest seconds between two connections
# A name, its state, its exit code or "-", and the time of its start.
_JOB_STATE = r"(running|exited|killed|lost) (-|[0-9]{1,3}) ([0-9]{1,12})"
_SIGNAL_CODES = range(129, 193)

Connect = Callable[[float], ConnectionPool]


def job_variables(command: Any, name: Any, env: Any, cwd: Any) -> dict[str, Any]:
    """Check the arguments of ``start``, and return the variables of the script."""
    return {
        "name": f"job-{os.urandom(4).hex()}" if name is None else check_plain_name(name),
        "command": encoded("command", command_line(command)),
        "exports": SecretBytes(encoded("env", exports(env))),
        "cwd": remote_path(check_path("cwd", "~" if cwd is None else cwd)),
    }


class JobState(NamedTuple):
    """The state of a job, as the host reports it.

    Attributes:
        status: ``"running"``, ``"exited"``, ``"killed"`` or ``"lost"``.
        exit_code: of the command, or None.
        started: Unix time on the host's clock.
    """

    status: str
    exit_code: int | None = None
    started: float = 0.0

    @classmethod
    def parse(cls, text: str) -> JobState:
        """Read what the scripts print about a job."""
        found = re.fullmatch(_JOB_STATE, text)
        if found is None:
            raise SSHError(f"the host sent a job state that can't be read: {text!r}")
        status, digits, started = found.groups()
        code = int(digits) if status == "exited" and digits != "-" else None
        return cls("killed" if code in _SIGNAL_CODES else status, code, float(started))


class HostJobs:
    """Start and find the jobs of one host.

    Parameters:
        connect: returns connections to the host; the argument limits the seconds of the login.
        reconnects: it can be called again; False if the caller gave the connection.
    """

    def __init__(self, connect: Connect, reconnects: bool) -> None:
        self._connect = connect
        self.reconnects = reconnects

    @contextlib.contextmanager
    def script(
        self, verb: str, deadline: float = math.inf, /, **values: bytes | str | int
    ) -> Iterator[RemoteScript]:
        """Run a script on a connection of its own, for the length of a block."""
        left = deadline - time.monotonic()
        limit = min(JOB_TIMEOUT, max(left, LEAST_PATIENCE))
        text = SecretBytes(script_text(verb, job_script(verb), **values))
        with self._connect(max(0.0, left)) as pool, Watchdog() as watchdog:
            transport = pool.ssh.get_transport()
            turn = threading.Lock() if takes_turns(transport) else None
            try:
                with RemoteScript(transport, text, watchdog, limit, turn=turn) as script:
                    yield script
            except NoShellError as error:
                raise JobError(f"a job needs a POSIX shell: {error}") from error

    def call(
        self, verb: str, word: bytes, most: int = 0, /, *, name: str, **values: bytes | str | int
    ) -> bytes:
        """Run a script for one job; return what follows ``word`` in its answer.

        Parameters:
            most: the maximum number of bytes after that line, which are returned too.

        Raises:
            JobError: the script failed.
        """
        with self.script(verb, name=name, **values) as script:
            try:
                return script.answer(word) + (script.rest(most) if most else b"")
            except SSHError as error:
                raise JobError(f"job {name!r}: {error}", name=name) from error

    def start(self, variables: dict[str, Any]) -> Job:
        """Start a job with :func:`job_variables`, and return it once it runs."""
        started = self.call("job", b"started", runner=JOB_RUNNER, **variables)
        name, line = variables["name"], variables["command"].decode("utf-8", "surrogateescape")
        logger.debug("job %s runs: %s", name, printable(line, 200))
        state = JobState.parse(f"running - {started.decode('ascii', 'replace')}")
        return Job(self, name, line, state)

    def find(self, name: str = "") -> list[Job]:
        """Return the jobs of the host, or the one with this name."""
        jobs: list[Job] = []
        with self.script("jobs", name=name) as script:
            while (line := script.line()) != b"end":
                found = re.fullmatch(rf"job ({PLAIN_NAME}) ({_JOB_STATE})", line.decode("latin-1"))
                if found is None or len(jobs) == MAX_JOBS:
                    raise script.refused(line)
                command = script.line().decode("utf-8", "replace")
                jobs.append(Job(self, found[1], command, JobState.parse(found[2])))
        return jobs

    def get(self, name: str) -> Job:
        """Return the job with a name."""
        for job in self.find(name):
            if job.name == name:
                return job
        raise JobError(f"the host has no job {name!r}: jobs() lists those it has", name=name)


class Job:
    """A command that runs on a host without a connection; see ``CloreClient.start``.

    Each method and property opens a connection, unless the job is known to have ended. Its files
    are in ``~/.clore/jobs/<name>`` on the host.

    Attributes:
        name: the name of the job.
        command: the command; only its first line if another process started the job.
    """

    def __init__(self, host: HostJobs, name: str, command: str, state: JobState) -> None:
        self._host = host
        self._state = state
        self.name = name
        self.command = command

    def __repr__(self) -> str:
        code = self._state.exit_code
        ended = "" if code is None else f", exit code {code}"
        return f"<Job {self.name!r}: {self._state.status}{ended}>"

    @property
    def status(self) -> str:
        """Return the status of the job now.

        Returns:
            ``"running"``; ``"exited"``; ``"killed"``, by a signal, the host's memory limit, or
            :meth:`stop`; ``"lost"``, if the host or its container was restarted, or the order has
            ended.
        """
        return self._refresh().status

    @property
    def exit_code(self) -> int | None:
        """Return the exit code; None while the job runs, or if none was recorded.

        It is 128 plus the number of the signal if one ended the command.
        """
        return self._refresh().exit_code

    @property
    def started(self) -> float:
        """Return the Unix time of the start, by the host's clock."""
        return self._state.started

    def tail(self, lines: int = 50) -> str:
        """Return the last lines of the output, stdout and stderr together.

        Parameters:
            lines: the number of lines; the text has 8 MB at most.

        Raises:
            JobError: the host no longer has the job.

        Example:
            >>> print(job.tail(2))
            step 99: loss 1.25
            step 100: loss 1.24
        """
        check_count("lines", lines)
        text = self._host.call(
            "tail", b"tail", MAX_TAIL + 1024, name=self.name, lines=lines, most=MAX_TAIL
        )
        return text.decode("utf-8", "replace")

    def follow(
        self,
        on_output: Callable[[OutputLine], object] | None = print,
        *,
        timeout: float | None = None,
        on_progress: Report | None = None,
        progress: bool = False,
    ) -> int | None:
        """Pass on the output from its start, and wait for the end of the job.

        If the connection breaks, it connects again and continues where the output stopped: no line
        is lost, and none comes twice. Ctrl-C does not end the job.

        Parameters:
            on_output: called with each line of stdout and stderr, without its line end.
            timeout: seconds to follow; None follows to the end.
            on_progress, progress: as for :meth:`CloreClient.wait_for_order`.

        Returns:
            The exit code, as :attr:`exit_code` has it.

        Raises:
            JobTimeoutError: the job did not end in time. It still runs.
            SSHError: the host can't be reached any more, or refused the login.

        Example:
            >>> job.follow(on_output=print)
            step 1: loss 4.17
            0
        """
        check_callback("on_output", on_output, 1)
        splitter = None if on_output is None else LineSplitter(STDOUT, on_output)
        limit = check_optional_number("timeout", timeout, infinite=True, unit="seconds")
        deadline = math.inf if limit is None else time.monotonic() + limit
        output = JobOutput(self._host, self.name, deadline, skip=splitter is None)
        try:
            with (
                ProgressOptions(on_progress, progress).reporting() as report,
                contextlib.closing(output.pieces()) as pieces,
            ):
                for piece in pieces:
                    if splitter is not None:
                        splitter.feed(piece)
                    if report is not None and not piece:
                        text = f"job {self.name}: {readable_size(output.size)} of output"
                        report(ProgressEvent("job", output.size, text))
            self._state = output.state or self._state
        except OrderEndedError:
            self._state = JobState("lost")
        if splitter is not None:
            splitter.finish()
        return self._state.exit_code

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end of the job; takes the same ``timeout`` as :meth:`follow`.

        Returns:
            The exit code, as :attr:`exit_code` has it.

        Example:
            >>> job.wait(timeout=3600)
            0
        """
        return self.follow(None, timeout=timeout)

    def stop(self, grace: float = 10.0) -> None:
        """Stop the job with all its processes: with SIGTERM, and later with SIGKILL.

        Parameters:
            grace: seconds between the two, at most 20.

        Example:
            >>> job.stop()
        """
        check_number("grace", grace, maximum=20.0, unit="seconds")
        self._host.call("stop", b"stopped", name=self.name, grace=math.ceil(10 * grace))

    def remove(self) -> None:
        """Remove a job that has ended, with its output, so that its name is free again.

        Raises:
            JobError: the job still runs, or the host has no such job.

        Example:
            >>> job.remove()
        """
        self._host.call("remove", b"removed", name=self.name)
        if self._state.status == "running":
            self._state = JobState("lost")

    def _refresh(self) -> JobState:
        if self._state.status == "running":
            try:
                found = self._host.find(self.name)
                self._state = found[0]._state if found else JobState("lost")
            except OrderEndedError:
                self._state = JobState("lost")
        return self._state


class JobOutput:
    """Receive the output of a job until its end, over as many connections as necessary.

    Parameters:
        skip: receive no output, and only wait for the end.

    Attributes:
        size: the bytes that were received.
        state: the state of the job, after its end.
    """

    def __init__(self, host: HostJobs, name: str, deadline: float, skip: bool) -> None:
        self._host = host
        self._name = name
        self._deadline = deadline
        self._skip = skip
        self._heard_at = math.inf  # when the current connection got its first message
        self.size = 0
        self.state: JobState | None = None

    def pieces(self) -> Generator[bytes, None, None]:
        """Yield the output, with an empty piece after each message of the host.

        Raises:
            JobTimeoutError: the job did not end before the deadline.
            SSHError: the host can't be reached any more.
        """
        useless = 0
        failures: tuple[type[Exception], ...] = (SSHError, *connection_errors())
        while self.state is None:
            began, size, self._heard_at = time.monotonic(), self.size, math.inf
            try:
                yield from self._received()
            except (JobError, HostKeyChangedError):
                raise
            except failures as error:
                no_login = getattr(error, "reason", "")  # "refused" or "unreachable"
                if no_login == "refused":
                    raise
                if self._time_left() <= 0:
                    raise self._too_late(f"it may still run ({reason(error)})") from error
                now = time.monotonic()
                # Otherwise, a host that ends each script at once would cause an endless loop.
                useful = self.size > size or now - self._heard_at > LEAST_USEFUL
                useless = 0 if useful else useless + 1
                if no_login or not self._host.reconnects or useless >= MOST_USELESS_TRIES:
                    raise
                logger.warning("job %s: %s; connecting again", self._name, error)
                time.sleep(max(0.0, began + RECONNECT_PAUSE - now))

    def _time_left(self) -> float:
        return self._deadline - time.monotonic()

    def _too_late(self, state: str = "it still runs") -> JobTimeoutError:
        return JobTimeoutError(f"job {self._name!r} did not end in time; {state}", name=self._name)

    def _received(self) -> Iterator[bytes]:
        """Yield the output that one connection receives."""
        at = -1 if self._skip else self.size
        with self._host.script("follow", self._deadline, name=self._name, at=at) as script:
            while True:
                limit = min(JOB_TIMEOUT, max(self._time_left(), LEAST_PATIENCE))
                script.channel.timeout = limit
                script.channel.settimeout(limit)
                line = script.line()
                if line.startswith(b"end "):
                    self.state = JobState.parse(line[4:].decode("ascii", "replace"))
                    return
                if not re.fullmatch(rb"[0-9]{1,7}", line) or int(line) > MAX_PORTION:
                    error = script.refused(line)
                    raise JobError(str(error), name=self._name) if line[:3] == b"no " else error
                self._heard_at = min(self._heard_at, time.monotonic())
                left = int(line)
                while left:
                    piece = script.read(left)
                    if not piece:
                        raise SSHError("the connection broke")
                    left -= len(piece)
                    if not self._skip:
                        self.size += len(piece)
                        yield piece
                yield b""
                if self._time_left() <= 0:
                    raise self._too_late()
