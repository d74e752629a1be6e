"""The end of a process on a server that may not take it well, and of a channel that hangs."""

from __future__ import annotations

import contextlib
import math
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from clore_client.log import logger

PATIENCE = 2.0  # seconds after which a send counts as stuck
WATCH_INTERVAL = 0.1  # seconds between two looks at the limits

KILL_LOOK = 0.1  # seconds between two looks at a process that was told to end

# OpenSSH's sshd refuses the protocol's own signals to root before 9.8, and always to a command
# that it is configured to run. So the shell tells its process id first, and what has to end is
# killed over a second channel, with its process group.
_TELL_PID = "sh -c 'echo {mark}$PPID >&2'\n"
_KILL = (
    "k() {{ kill -s $1 -- -{pid} 2>/dev/null || kill -s $1 {pid} 2>/dev/null; }}; "
    "k TERM; n=0; while [ $n -lt {looks} ] && k 0; do sleep {pause}; n=$((n+1)); done; k KILL"
)


class PidLine:
    """The line of stderr by which a shell tells its process id; taken out of what follows.

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


def end_group(transport: Any, pid: int, grace: float) -> bool:
    """End a process group of the server, after ``grace`` seconds with SIGKILL; whether it was."""
    looks = math.ceil(grace / KILL_LOOK)
    script = _KILL.format(pid=pid, looks=looks, pause=KILL_LOOK)
    try:
        channel = transport.open_session(timeout=PATIENCE)
        try:
            with Guard(grace + PATIENCE, lambda: cut(channel)) as guard:
                channel.exec_command(f"sh -c {shlex.quote(script)}")
                channel.recv_exit_status()
            return not guard.fired
        finally:
            channel.close()
    except Exception as error:
        logger.debug("process group %d was not ended: %s", pid, error)
        return False


def send_signal(channel: Any, name: str) -> None:
    """Have the server signal a channel's process group, unless the channel is closed."""
    import paramiko  # which has no call for this
    from paramiko.common import cMSG_CHANNEL_REQUEST

    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("signal")
    message.add_boolean(False)
    message.add_string(name)
    # A server ends the whole connection where this comes after the answer to its own close; with
    # the lock held, paramiko can't give that answer meanwhile.
    with channel.lock:
        if not channel.closed:
            channel.transport._send_user_message(message)


def cut(channel: Any) -> None:
    """End a channel at once, and the whole connection where that takes nothing any more."""

    def hang_up() -> None:
        if not channel.exit_status_ready():
            send_signal(channel, "KILL")
        channel.close()

    if not soon_done(hang_up):
        logger.debug("the connection takes nothing any more: closed")
        channel.transport.close()


def soon_done(action: Callable[[], object]) -> bool:
    """Whether something that sends was done within ``PATIENCE``; a send itself has no timeout."""

    def quietly() -> None:
        try:
            action()
        except Exception as error:
            logger.debug("a channel that is given up: %s", error)

    thread = threading.Thread(target=quietly, name="clore-hang-up", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return not thread.is_alive()


class Guard:
    """Does something where a call that has no timeout takes too long; a ``with`` block.

    Attributes:
        fired: whether it did.
    """

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self.fired = False
        self._action = action
        self._timer: threading.Timer | None = None
        if seconds < threading.TIMEOUT_MAX:
            self._timer = threading.Timer(max(seconds, 0.0), self._fire)
            self._timer.name = "clore-guard"
            self._timer.daemon = True

    def _fire(self) -> None:
        self.fired = True
        self._action()

    def __enter__(self) -> Guard:
        if self._timer is not None:
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()


def round_trip(transport: Any) -> bool:
    """Whether the server answered to the opening of a channel, which is not used."""
    import paramiko

    try:
        transport.open_session(timeout=PATIENCE).close()
    except paramiko.ChannelException:
        return True  # a refusal is an answer
    except Exception:
        return False
    return True


def start_thread(name: str, target: Callable[..., object], *args: Any) -> threading.Thread:
    """Start a daemon thread."""
    thread = threading.Thread(target=target, args=args, name=f"clore-{name}", daemon=True)
    thread.start()
    return thread


class Limit:
    """A moment by which a block must be left.

    Attributes:
        expired: whether the moment passed while the block ran.
    """

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self.deadline = time.monotonic() + seconds
        self.action = action
        self.expired = False


class Watchdog:
    """Run an action where a block takes too long; a ``with`` block with one thread.

    paramiko writes to a socket without a time limit: only closing the connection ends that.
    """

    def __init__(self) -> None:
        self._limits: dict[int, Limit] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._thread = start_thread("watchdog", self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    @contextlib.contextmanager
    def limit(self, seconds: float, action: Callable[[], object]) -> Iterator[Limit]:
        """Run ``action`` in a thread of its own if the block takes longer than ``seconds``."""
        limit = Limit(seconds, action)
        self._limits[id(limit)] = limit
        try:
            yield limit
        finally:
            self._limits.pop(id(limit), None)

    def _watch(self) -> None:
        while not self._over.wait(WATCH_INTERVAL):
            now = time.monotonic()
            for key, limit in list(self._limits.items()):
                if now >= limit.deadline and self._limits.pop(key, None) is not None:
                    limit.expired = True
                    logger.debug("the watchdog ends a call that takes too long")
                    start_thread("watchdog-action", limit.action)
