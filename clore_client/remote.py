"""A command over SSH: both its streams, and how it ended."""

from __future__ import annotations

import threading
import time
from typing import Any

from clore_client.checks import check_number, check_text
from clore_client.errors import SSHError

STREAM_CHUNK = 65536
STREAM_LOOK = 0.25  # seconds between two looks at the clock


class RunResult:
    """How a command ended.

    Attributes:
        stdout, stderr: its output as text; what is no UTF-8 is replaced.
        exit_status: 0 to 255; -1 where a signal ended it.
    """

    __slots__ = ("exit_status", "stderr", "stdout")

    def __init__(self, stdout: str, stderr: str, exit_status: int) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.exit_status = exit_status

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.exit_status == 0

    def __repr__(self) -> str:
        return (
            f"<RunResult exit_status={self.exit_status}, {len(self.stdout)} characters of stdout, "
            f"{len(self.stderr)} of stderr>"
        )


def run_over_ssh(ssh: Any, command: str, timeout: float | None) -> RunResult:
    """Run a command and wait for its end, reading both streams at once.

    Raises:
        SSHError: it did not end within ``timeout`` seconds, or the connection broke.
    """
    check_text("command", command)
    if timeout is not None:
        check_number("timeout", timeout, infinite=True, unit="seconds")
    deadline = None if timeout is None else time.monotonic() + timeout
    stdin, stdout, _ = ssh.exec_command(command)
    channel = stdout.channel
    try:
        stdin.close()
        channel.shutdown_write()
        channel.settimeout(STREAM_LOOK)
        errors: list[bytes] = []
        reader = threading.Thread(
            target=_read_all, args=(channel, channel.recv_stderr, errors, deadline), daemon=True
        )
        reader.start()
        output: list[bytes] = []
        done = _read_all(channel, channel.recv, output, deadline)
        reader.join()
        while done and not channel.exit_status_ready() and not channel.status_event.wait(
            STREAM_LOOK
        ):  # fmt: skip
            done = deadline is None or time.monotonic() < deadline
        if not done:
            raise SSHError(f"the command did not end within {timeout:g}s")
        status = channel.recv_exit_status()
        transport = ssh.get_transport()
        if status == -1 and (transport is None or not transport.is_active()):
            raise SSHError("the connection broke before the command had ended")
    finally:
        channel.close()
    return RunResult(
        b"".join(output).decode("utf-8", "replace"),
        b"".join(errors).decode("utf-8", "replace"),
        status,
    )


def _read_all(channel: Any, receive: Any, into: list[bytes], deadline: float | None) -> bool:
    """Read a stream to its end; False when the time is out or the command was given up."""
    while True:
        try:
            chunk = receive(STREAM_CHUNK)
        except TimeoutError:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            continue
        except OSError:
            return True
        if not chunk:
            return True
        into.append(chunk)
