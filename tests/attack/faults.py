"""The faults of a response, on a raw socket."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

ENDLESS = 10**12  # bytes that are announced, but never sent
SPACES = b" " * 65536
HTML = b"<html><head><title>Bad gateway</title></head><body>cloudflare</body></html>"
PROXY_STATUSES = (403, 502, 503, 520, 522)  # with HTML, from the proxy in front of the API
REASONS = {100: "Continue", 103: "Early Hints", 200: "OK", 429: "Too Many Requests"}


class Gone(Exception):  # noqa: N818 - nothing is wrong with that
    """The connection has ended."""


class Wire:
    """One connection. All its methods return soon after ``stopping`` is set."""

    def __init__(self, sock: socket.socket, stopping: threading.Event) -> None:
        self.sock = sock
        self._stopping = stopping

    def send(self, data: bytes) -> None:
        """Send all bytes."""
        self.sock.sendall(data)

    def pause(self, seconds: float) -> None:
        """Sleep, unless the server stops."""
        if self._stopping.wait(seconds):
            raise Gone

    def drip(self, data: Iterable[int], interval: float) -> None:
        """Send one byte per interval."""
        for byte in data:
            self.send(bytes([byte]))
            self.pause(interval)

    def repeat(self, data: bytes, interval: float) -> None:
        """Send the same bytes forever."""
        while True:
            self.send(data)
            self.pause(interval)

    def hear_out(self) -> None:
        """Send nothing until the client closes the connection."""
        while self.sock.recv(65536):
            pass
        raise Gone

    def reset(self) -> None:
        """Reset the connection."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Gone


@dataclass
class Exchange:
    """A request, its correct response, and the connection."""

    wire: Wire
    status: int
    body: bytes
    date: str | None
    echo: bytes  # the auth header and the body of the request

    def head(self, status: int, *lines: str) -> bytes:
        """Return the status line and the headers."""
        dated = [f"Date: {self.date}"] if self.date else []
        first = f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}"
        kind = "text/html" if status in PROXY_STATUSES else "application/json"
        told = [first, *dated, f"Content-Type: {kind}", *lines]
        return "\r\n".join(told).encode("latin-1") + b"\r\n\r\n"

    def whole(self, status: int, body: bytes, *lines: str) -> bytes:
        """Return a complete response."""
        return self.head(status, f"Content-Length: {len(body)}", *lines) + body

    def true_answer(self) -> bytes:
        """Return the correct response."""
        return self.whole(self.status, self.body)


def slow(x: Exchange, delay: float = 0.2) -> None:
    """Respond late."""
    x.wire.pause(delay)
    x.wire.send(x.true_answer())


def drip(x: Exchange, interval: float = 0.05, endless: bool = True) -> None:
    """Send one byte of the body per interval, and then blanks forever."""
    length = ENDLESS if endless else len(x.body)
    x.wire.send(x.head(x.status, f"Content-Length: {length}"))
    x.wire.drip(itertools.chain(x.body, itertools.repeat(32) if endless else ()), interval)


def drip_headers(x: Exchange, interval: float = 0.05) -> None:
    """Send a header that never ends."""
    x.wire.send(x.head(x.status)[:-2] + b"X-Drip: ")
    x.wire.drip(itertools.repeat(97), interval)


def endless_continue(x: Exchange, interval: float = 0.05) -> None:
    """Send interim responses forever."""
    x.wire.repeat(b"HTTP/1.1 100 Continue\r\n\r\n", interval)


def early_hints(x: Exchange, delay: float = 0.0, status: int = 200) -> None:
    """Send a 103, and after ``delay`` the response, or a page with another ``status``."""
    x.wire.send(x.head(103))
    x.wire.pause(delay)
    x.wire.send(x.true_answer() if status == 200 else x.whole(status, HTML))


def late_early_hints(x: Exchange, delay: float = 0.02) -> None:
    """Send a 103 long after the response."""
    x.wire.send(x.true_answer())
    x.wire.pause(delay)
    x.wire.send(x.head(103))


def extra_answer(x: Exchange, delay: float = 0.0) -> None:
    """Send a second response without a request, together with the first or later."""
    extra = x.whole(200, b'{"code": 0}')
    if delay:
        x.wire.send(x.true_answer())
        x.wire.pause(delay)
        x.wire.send(extra)
    else:
        x.wire.send(x.true_answer() + extra)


@functools.cache
def packed_blanks(nested: bool) -> bytes:
    """Return 4 MB of gzip that decode to 4 GB, or a few KB that decode to those 4 MB."""
    member = gzip.compress(b" " * (64 << 20), 6)
    bomb = gzip.compress(b'{"code": 0') + member * 64 + gzip.compress(b"}")
    return gzip.compress(bomb) if nested else bomb


def bomb(x: Exchange, nested: bool = False) -> None:
    """Send a body that decodes to a much larger one."""
    encoding = "Content-Encoding: gzip" + (", gzip" if nested else "")
    x.wire.send(x.whole(200, packed_blanks(nested), encoding))


def huge(x: Exchange, mb: float = 200, endless: bool = False) -> None:
    """Send a correct response with ``mb`` MB of blanks in it, or chunks forever."""
    pieces = max(1, int(mb * 16))
    if endless:
        x.wire.send(x.head(x.status, "Transfer-Encoding: chunked"))
        x.wire.repeat(b"10000\r\n" + SPACES + b"\r\n", 0)
    x.wire.send(x.head(x.status, f"Content-Length: {len(x.body) + pieces * len(SPACES)}"))
    x.wire.send(x.body[:-1])
    for _ in range(pieces):
        x.wire.send(SPACES)
    x.wire.send(x.body[-1:])


def bad_status_line(x: Exchange) -> None:
    """Send the secrets of the request in place of the status."""
    x.wire.send(b"HTTP/1.1 " + x.echo + b"\r\n\r\n")
    raise Gone


def bad_chunk_size(x: Exchange) -> None:
    """Send the secrets of the request in place of the size of a chunk."""
    x.wire.send(x.head(x.status, "Transfer-Encoding: chunked") + x.echo + b"\r\n{}\r\n0\r\n\r\n")
    raise Gone


def wrong_length(x: Exchange, by: int = -3) -> None:
    """Announce ``by`` bytes more, or less, than are sent."""
    x.wire.send(x.head(x.status, f"Content-Length: {max(0, len(x.body) + by)}") + x.body)
    if by > 0:
        raise Gone


def reset(x: Exchange) -> None:
    """Reset the connection without a response."""
    x.wire.reset()


def half(x: Exchange) -> None:
    """Close the connection in the middle of the response."""
    answer = x.true_answer()
    x.wire.send(answer[: len(answer) - max(1, len(x.body) // 2)])
    raise Gone


def page(x: Exchange, status: int = 502) -> None:
    """Respond like the proxy in front of the API."""
    x.wire.send(x.whole(status, HTML))


def too_fast(x: Exchange, retry_after: float | None = None) -> None:
    """Refuse with HTTP 429."""
    told = [] if retry_after is None else [f"Retry-After: {retry_after:g}"]
    x.wire.send(x.whole(429, b'{"code": 5}', *told))


def refuse(x: Exchange, code: int = 1, error: str | None = None, status: int = 200) -> None:
    """Respond with an error of the API."""
    envelope = {"code": code, **({"error": error} if error else {})}
    x.wire.send(x.whole(status, json.dumps(envelope).encode()))


def hang(x: Exchange) -> None:
    """Never respond."""
    x.wire.hear_out()


KINDS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        slow, drip, drip_headers, endless_continue, early_hints, late_early_hints, extra_answer,
        bomb, huge, bad_status_line, bad_chunk_size, wrong_length, reset, half, page, too_fast,
        refuse, hang,
    )
}  # fmt: skip


def delivers(kind: str, options: dict[str, Any]) -> bool:
    """Return whether the correct response arrives, so that the request must be carried out."""
    if kind == "early_hints":
        return bool(options.get("status", 200) == 200)
    if kind == "drip":
        return not options.get("endless", True)
    return kind in ("slow", "late_early_hints", "extra_answer")
