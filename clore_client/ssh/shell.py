"""Connect this terminal to a shell on a host."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from clore_client.errors import SSHError
from clore_client.ssh.transport import LimitedChannel, Watchdog, connection_errors, reason

if TYPE_CHECKING:
    import paramiko

SHELL_TIMEOUT = 30.0  # seconds for a host to open a terminal
CLOSE_TIMEOUT = 2.0  # seconds for the host to send the exit code, and to close the terminal
SIZE_CHECK = 0.25  # seconds between two checks of the size of the window
SHELL_PIECE = 65536  # bytes


def check_terminal() -> tuple[int, int]:
    """Check that this process has a terminal, and return its input and output."""
    try:
        import termios  # noqa: F401
    except ImportError:
        raise SSHError(
            "shell() needs a POSIX terminal: ssh_command() returns a line to log in with"
        ) from None
    try:
        ends = sys.stdin.fileno(), sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # None, closed, or replaced by a notebook
        ends = -1, -1
    if not all(end >= 0 and os.isatty(end) for end in ends):
        raise SSHError(
            "stdin or stdout is not a terminal: use run() or start() for commands, or the line of "
            "ssh_command() in a terminal"
        )
    return ends


def run_shell(ssh: paramiko.SSHClient) -> int:
    """Run the login shell of a host in this terminal; see ``CloreClient.shell``."""
    source, target = check_terminal()
    with Watchdog() as watchdog:
        channel = LimitedChannel(ssh.get_transport(), SHELL_TIMEOUT, watchdog)
        with _raw_mode(source):
            return _Terminal(source, target).run(channel)


class _Terminal:
    """Pass bytes between this terminal and a shell on a host."""

    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._target = target
        self._size = os.get_terminal_size(target)
        self._reads = True  # until the end of the input

    def run(self, channel: LimitedChannel) -> int:
        """Run a shell on a channel, and return its exit code."""
        try:
            self._start(channel)
            while not (channel.closed or (channel.eof_received and not channel.recv_ready())):
                self._follow_size(channel)
                self._pass_on(channel)
            return self._exit_code(channel)
        except connection_errors() as error:
            raise SSHError(f"the connection broke, and the shell ended ({reason(error)})") from (
                error
            )
        finally:
            channel.timeout = CLOSE_TIMEOUT
            channel.close()

    def _start(self, channel: LimitedChannel) -> None:
        kind = os.environ.get("TERM", "xterm-256color")
        try:
            channel.limited("opened no terminal", channel.get_pty, kind, *self._size)
            channel.limited("opened no terminal", channel.invoke_shell)
        except connection_errors() as error:
            if not channel.get_transport().is_active():
                raise
            raise SSHError(f"the host did not open a terminal ({reason(error)}): use run()") from (
                error
            )

    def _follow_size(self, channel: LimitedChannel) -> None:
        # A comparison is simpler than SIGWINCH, which only the main thread could receive.
        size = os.get_terminal_size(self._target)
        if size != self._size:
            self._size = size
            channel.limited("accepted no data", channel.resize_pty, *size)

    def _pass_on(self, channel: LimitedChannel) -> None:
        """Pass on the data of both directions; return soon if there is none."""
        # Input is read only when it can be sent: a send that waits would hold up the output.
        watched: list[Any] = [channel]
        if self._reads and channel.send_ready():
            watched.append(self._source)
        ready, _, _ = select.select(watched, [], [], SIZE_CHECK)
        if channel.recv_ready():
            _write_all(self._target, channel.recv(SHELL_PIECE))
        if self._source in ready:
            if data := os.read(self._source, 1024):
                channel.sendall(data)
            else:
                self._reads = False
                channel.shutdown_write()

    def _exit_code(self, channel: LimitedChannel) -> int:
        if channel.status_event.wait(CLOSE_TIMEOUT) and channel.exit_status >= 0:
            return int(channel.exit_status)
        if not channel.get_transport().is_active():
            raise SSHError("the connection broke, and the shell ended")
        return -1


def _write_all(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:  # another program left the terminal in that mode
            select.select([], [target], [])


@contextlib.contextmanager
def _raw_mode(source: int) -> Iterator[None]:
    """Send every key to the host during a block, and restore the terminal however it ends."""
    import termios
    import tty

    before = termios.tcgetattr(source)
    former: dict[int, Any] = {}

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # so that ``finally`` runs

    if threading.current_thread() is threading.main_thread():
        for fatal in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(fatal) is signal.SIG_DFL:
                former[fatal] = signal.signal(fatal, leave)
    try:
        tty.setraw(source, termios.TCSADRAIN)  # keeps what was typed ahead
        yield
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
        for number, handler in former.items():
            signal.signal(number, handler)
