"""Run commands on a simulated host, in a real shell with its own folder."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import asyncssh

_CHUNK = 65536
_SETTLE = 0.2
MOTD = b"This is a simulated host: a shell on your own machine, without any GPU.\r\n"

Process = asyncssh.SSHServerProcess[bytes]


class Commands:
    """Run the commands of one host."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self._home = home
        self._environment = environment
        self._running: set[subprocess.Popen[bytes]] = set()
        self.used = False  # whether a process was ever started

    async def serve(self, process: Process) -> None:
        """Run the command of an SSH channel, until it ends or the client disconnects."""
        try:
            await self._serve(process)
        except (OSError, asyncssh.Error):
            pass  # the client has disconnected
        finally:
            process.close()

    def kill(self) -> None:
        """Kill all running commands with their process groups."""
        for child in list(self._running):
            _kill(child, signal.SIGKILL)

    async def _serve(self, process: Process) -> None:
        self.used = True
        gone: asyncio.Future[Any] = asyncio.ensure_future(process.wait_closed())
        terminal = process.get_terminal_type()
        try:
            if terminal is None:
                child, ends = self._start(process.command)
            else:
                child, ends = self._start_on_terminal(process, terminal)
                if process.command is None:
                    process.stdout.write(MOTD)
        except OSError as error:
            process.stderr.write(f"simulated host: {error.strerror}\n".encode())
            process.exit(126)
            return
        self._running.add(child)
        pumps: list[asyncio.Task[None]] = []
        tasks: list[asyncio.Future[Any]] = [gone]
        state = _OutputState()
        exited: asyncio.Future[Any] = _exit_of(child)
        try:
            source, *sinks = ends
            writers = (process.stdout, process.stderr)
            pumps = [
                asyncio.ensure_future(_pump_out(await _reader(file), sink, state))
                for file, sink in zip(sinks, writers, strict=False)
            ]
            writer = await _writer(source)
            tasks.append(asyncio.ensure_future(_pump_in(process, writer, child, source)))
            await asyncio.wait({gone, exited}, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                _kill(child, signal.SIGKILL)
                return
            # A background process may keep the output open. Like sshd, send the exit status
            # anyway, once all output so far has been sent.
            while not gone.done() and not all(pump.done() for pump in pumps):
                before = state.count
                await asyncio.wait({gone, *pumps}, timeout=_SETTLE)
                if state.count == before and state.reading >= sum(not p.done() for p in pumps):
                    break
            code = exited.result()
            if code < 0:
                process.exit_with_signal(signal.Signals(-code).name[3:])
            else:
                process.exit(code)
        finally:
            if not exited.done():
                _kill(child, signal.SIGKILL)
            for task in (*pumps, *tasks):
                task.cancel()
            self._running.discard(child)

    def _start(self, command: str | None) -> tuple[subprocess.Popen[bytes], list[BinaryIO]]:
        child = self._popen(_shell(command), subprocess.PIPE, subprocess.PIPE, subprocess.PIPE)
        ends = [child.stdin, child.stdout, child.stderr]
        return child, ends  # type: ignore[return-value]

    def _start_on_terminal(
        self, process: Process, terminal: str
    ) -> tuple[subprocess.Popen[bytes], list[BinaryIO]]:
        master, slave = os.openpty()
        try:
            _resize(master, process.get_terminal_size())
            # The first terminal that a new session opens becomes its controlling terminal.
            opened = ["/bin/sh", "-c", 'exec <"$0" >"$0" 2>&1; exec "$@"', os.ttyname(slave)]
            argv = opened + _shell(process.command, interactive=True)
            child = self._popen(argv, slave, slave, slave, {"TERM": terminal})
            ends = [os.fdopen(os.dup(master), "wb", 0), os.fdopen(os.dup(master), "rb", 0)]
        finally:
            os.close(slave)
            os.close(master)
        return child, ends  # type: ignore[return-value]

    def _popen(
        self, argv: list[str], stdin: int, stdout: int, stderr: int,
        more: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        return subprocess.Popen(
            argv,
            bufsize=0,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=self._home,
            env=self._environment | (more or {}),
            start_new_session=True,
        )


class _OutputState:
    """Count the pumps that wait for output, and the chunks that were sent."""

    def __init__(self) -> None:
        self.reading = 0
        self.count = 0


def _shell(command: str | None, interactive: bool = False) -> list[str]:
    if command is not None:
        return ["/bin/sh", "-c", command]
    return ["/bin/sh", "-i"] if interactive else ["/bin/sh"]


def _kill(child: subprocess.Popen[bytes], number: int) -> None:
    # Until it has been waited for, its process id is not reused.
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)


def _exit_of(child: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """Return a future with the exit status. It waits in a thread, without signal handlers."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()

    def tell(code: int) -> None:
        if not future.done():
            future.set_result(code)

    def wait() -> None:
        code = child.wait()
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(tell, code)

    threading.Thread(target=wait, name="clore-simulator-wait", daemon=True).start()
    return future


async def _reader(file: BinaryIO) -> asyncio.StreamReader:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    return reader


async def _writer(file: BinaryIO) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, file)
    return asyncio.StreamWriter(transport, protocol, None, loop)


async def _pump_out(
    reader: asyncio.StreamReader, writer: asyncssh.SSHWriter[bytes], state: _OutputState
) -> None:
    transport: Any = getattr(reader, "_transport", None)
    try:
        while True:
            state.reading += 1
            try:
                data = await reader.read(_CHUNK)
            except OSError:
                return  # end of output of a terminal
            finally:
                state.reading -= 1
            if not data:
                return
            state.count += 1
            writer.write(data)
            await writer.drain()
    except (OSError, asyncssh.Error):
        pass  # the client has disconnected
    finally:
        if transport is not None:
            transport.close()


async def _pump_in(
    process: Process, writer: asyncio.StreamWriter, child: subprocess.Popen[bytes], end: BinaryIO
) -> None:
    try:
        while True:
            try:
                data = await process.stdin.read(_CHUNK)
            except asyncssh.TerminalSizeChanged as change:
                _resize(end.fileno(), change.term_size)
                continue
            except asyncssh.SignalReceived as received:
                _kill(child, getattr(signal, f"SIG{received.signal}", signal.SIGTERM))
                continue
            except asyncssh.BreakReceived:
                _kill(child, signal.SIGINT)
                continue
            if not data:
                break
            writer.write(data)
            await writer.drain()
    except (OSError, asyncssh.Error):
        pass
    finally:
        writer.close()


def _resize(terminal: int, size: tuple[int, int, int, int]) -> None:
    columns, rows, wide, high = size
    with contextlib.suppress(OSError):
        packed = struct.pack("HHHH", rows or 24, columns or 80, wide, high)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, packed)


def kill_background_commands(home: Path, running: Callable[[], None]) -> None:
    """Kill background processes of a host, which have its HOME in their environment."""
    running()
    mark = b"HOME=" + os.fsencode(home)
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if entry.stat().st_uid == os.getuid() and mark in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)
