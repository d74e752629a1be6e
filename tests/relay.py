"""Run a proxy between a client and a server that delays, breaks or only counts."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
import termios
import threading
import time
from queue import SimpleQueue
from types import TracebackType

PIECE = 65536  # bytes
RESET = struct.pack("ii", 1, 0)  # for SO_LINGER: closing resets the connection


class Relay:
    """Forward connections to a port of this machine.

    It uses threads and no event loop, which costs less CPU time beside a benchmark.

    Attributes:
        port: the port on which it listens.
        carried: the bytes that arrived, in both directions.
        most: the maximum number of connections at once.
        frozen: whether it drops all data, as a dead link does.
        cut_at: after this number of bytes, it closes every connection.
    """

    def __init__(self, target: int, delay: float = 0.0) -> None:
        self.port = 0
        self.carried = 0
        self.cut_at = 2**62
        self.most = 1000
        self._target = target
        self._delay = delay  # seconds, each way
        self.frozen = False
        self._broken = False
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        self.port = self._listener.getsockname()[1]
        self._threads.append(threading.Thread(target=self._accept, daemon=True))
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def cut(self) -> None:
        """Close all connections, and refuse new ones."""
        with self._lock:
            if self._broken:
                return
            self._broken = True
            for end in (*self._pairs, *self._pairs.values()):
                with contextlib.suppress(OSError, ValueError):  # or it is closed
                    # What is still in the buffer here will not arrive.
                    unsent = fcntl.ioctl(end, termios.TIOCOUTQ, bytes(4))
                    self.carried -= int.from_bytes(unsent, sys.byteorder)
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Accept connections again."""
        with self._lock:
            self._broken = False

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(near,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            if not self._enter(near):
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                return
            try:
                with socket.create_connection(("127.0.0.1", self._target)) as far:
                    with self._lock:
                        self._pairs[near] = far
                    if not self._broken:
                        self._carry(near, far)
            finally:
                with self._lock:
                    del self._pairs[near]

    def _enter(self, near: socket.socket) -> bool:
        with self._lock:
            if self._broken or len(self._pairs) >= self.most:
                return False
            self._pairs[near] = near
            return True

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        threads = []
        for source, target in ((near, far), (far, near)):
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            waiting: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
            for work, end in ((self._receive, source), (self._send, target)):
                threads.append(threading.Thread(target=work, args=(end, waiting), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _receive(self, source: socket.socket, waiting: SimpleQueue[tuple[float, bytes]]) -> None:
        """Read all data at once: the bytes in flight have no limit, as on a long link."""
        data = b" "
        while data:
            try:
                data = source.recv(PIECE)
            except OSError:
                data = b""
            if self.frozen and data:
                continue
            waiting.put((time.monotonic() + self._delay, data))

    def _send(self, target: socket.socket, waiting: SimpleQueue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = waiting.get()
                if (late := due - time.monotonic()) > 0:
                    time.sleep(late)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)
                with self._lock:
                    self.carried += len(data)
                    full = self.carried >= self.cut_at
                if full:
                    self.cut()
