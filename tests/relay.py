"""A proxy on this machine between a client and a server: slow, broken, or only counting."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType


class Relay:
    """Forwards connections to a port of this machine.

    Attributes:
        port: where it listens.
        carried: bytes that went through, both ways.
        most: how many connections it takes at once.
    """

    def __init__(self, target: int, delay: float = 0.0) -> None:
        self.port = 0
        self.carried = 0
        self.most = 1000
        self._target = target
        self._delay = delay  # seconds, each way
        self._broken = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        self._loop.call_soon_threadsafe(self._cut)

    def mend(self) -> None:
        """Take connections again; what was to be cut is cut before."""
        asyncio.run_coroutine_threadsafe(self._mend(), self._loop).result(10)

    async def _mend(self) -> None:
        self._broken = False

    def _cut(self) -> None:
        self._broken = True
        for writer in list(self._writers):
            writer.transport.abort()

    async def _listen(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = server
        self.port = server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        self._cut()
        # Cut off, they end by themselves.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._broken or self._open >= self.most:
            writer.transport.abort()
            return
        self._open += 1
        far = None
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers |= {writer, far}
            await asyncio.gather(self._pump(reader, far), self._pump(far_reader, writer))
        except OSError:
            pass
        finally:
            self._open -= 1
            for end in (writer, far):
                if end is not None:
                    self._writers.discard(end)
                    end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry what comes, later; what is on its way is no limit, as on a long line."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.ensure_future(self._send(waiting, writer))
        try:
            while data := await reader.read(262144):
                self.carried += len(data)
                waiting.put_nowait((self._loop.time() + self._delay, data))
        except OSError:
            pass
        waiting.put_nowait((self._loop.time() + self._delay, b""))
        await sender

    async def _send(
        self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = await waiting.get()
                if (late := due - self._loop.time()) > 0:
                    await asyncio.sleep(late)
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
