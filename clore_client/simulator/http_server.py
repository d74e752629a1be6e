"""Serve the API over HTTP, and apply faults."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import ssl
import struct
from http import HTTPStatus
from typing import Any

from aiohttp import web

from .api import Answer, Api, Call, envelope
from .clock import Clock
from .faults import Fault, Faults
from .limits import Limits, too_fast

_SERVER = "clore-simulator"
# SO_LINGER with this value: closing the socket sends a reset.
_RESET = struct.pack("ii", 1, 0)


class HTTPServer:
    """Serve an `Api` over HTTP, and record every request."""

    def __init__(self, api: Api, limits: Limits, faults: Faults, clock: Clock) -> None:
        self._api = api
        self._limits = limits
        self._faults = faults
        self._clock = clock
        self._late_timers: set[asyncio.TimerHandle] = set()
        self.calls: list[Call] = []

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> int:
        """Start to listen, and return the port."""
        # A hanging fault has to end when its client disconnects.
        self._handlers = web.Server(self._handle, handler_cancellation=True, access_log=None)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._handlers, host, port, ssl=tls, family=_family(host), backlog=512
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Stop listening, and abort requests in progress."""
        for timer in self._late_timers:
            timer.cancel()
        self._server.close()
        self._handlers.pre_shutdown()
        transports = [handler.transport for handler in self._handlers.connections]
        await self._handlers.shutdown(0.05)
        # With TLS, closing would wait for the peer.
        for transport in transports:
            if transport is not None:
                transport.abort()
        await asyncio.sleep(0)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        arrived = self._clock.now()
        call = Call(
            method=request.method,
            path=request.path,
            endpoint=request.path.rsplit("/", 1)[-1],
            query=dict(request.query),
            body=None,
            headers=dict(request.headers),
            arrived=arrived,
            key=request.headers.get("auth", ""),
        )
        self.calls.append(call)
        call.body = _parse(await request.read())
        answer = self._limits.refuse(call)
        if answer is None:
            fault = self._faults.next_for(call.endpoint, call.key)
            if fault is None:
                answer = self._api.process(call)
            else:
                call.fault = fault.kind
                answer = await self._apply_fault(fault, call, request)
        if answer is None or request.transport is None:
            return _disconnect(request)
        call.status, call.code = answer.status, answer.code
        return web.Response(body=answer.body, status=answer.status, headers=self._headers(answer))

    def _headers(self, answer: Answer) -> dict[str, str]:
        return {
            "Content-Type": answer.content_type,
            "Date": self._clock.date(),
            "Server": _SERVER,
            **answer.headers,
        }

    async def _apply_fault(
        self, fault: Fault, call: Call, request: web.BaseRequest
    ) -> Answer | None:
        """Return the answer to a request with a fault; None closes the connection instead."""
        kind, options = fault.kind, fault.options
        if kind == "lose_request":
            return None
        if kind == "commit_late":
            self._process_late(call, options["seconds"])
            return None
        if kind in ("hang", "hang_after_commit"):
            if kind == "hang_after_commit":
                self._api.process(call)
            await _sleep(options["seconds"])
            return None
        made = _fixed_answer(kind, options)
        if made is not None and not _is_processed(kind, options):
            return made
        answer = self._api.process(call)
        if kind == "lose_response":
            return None
        if kind == "slow":
            await _sleep(options["seconds"])
            return answer
        if kind == "truncated_json":
            return Answer(answer.body[: len(answer.body) // 2], answer.status)
        if kind == "reset_mid_body":
            call.status = answer.status
            await self._send_half(answer, request, options["reset"])
            return None
        assert made is not None
        return made

    def _process_late(self, call: Call, seconds: float) -> None:
        def process() -> None:
            self._late_timers.discard(timer)
            self._api.process(call)

        timer = asyncio.get_running_loop().call_later(seconds, process)
        self._late_timers.add(timer)

    async def _send_half(self, answer: Answer, request: web.BaseRequest, reset: bool) -> None:
        transport = request.transport
        if transport is None:
            return
        status = HTTPStatus(answer.status)
        headers = {**self._headers(answer), "Content-Length": str(len(answer.body))}
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        half = answer.body[: len(answer.body) // 2]
        transport.write(head.encode() + b"\r\n" + half)
        # A reset drops unsent data, so wait until it is sent.
        for _ in range(200):
            if transport.is_closing() or not transport.get_write_buffer_size():
                break
            await asyncio.sleep(0.005)
        if reset:
            sock: socket.socket | None = transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()


def _fixed_answer(kind: str, options: Any) -> Answer | None:
    """Return the answer of a fault that does not depend on the market's answer."""
    if kind in ("http_500_after_commit", "http_500_before_commit"):
        return envelope({"code": 1}, 500)
    if kind == "code_1":
        return envelope({"code": 1}, options["status"])
    if kind == "envelope":
        return envelope(options["envelope"], options["status"])
    if kind == "html_502":
        return _page(options["status"])
    if kind == "html_403":
        return Answer(b"error code: 1010", 403, "text/plain; charset=UTF-8")
    if kind == "rate_limit":
        if not options["html"]:
            return too_fast(options["retry_after"])
        page = _page(429)
        if options["retry_after"] is not None:
            page.headers["Retry-After"] = str(options["retry_after"])
        return page
    if kind == "not_json":
        return Answer(str(options["body"]).encode(), 200, "text/plain; charset=utf-8")
    if kind == "no_code":
        return envelope(options["body"])
    if kind == "redirect":
        return Answer(b"", options["status"], "text/html", {"Location": options["location"]})
    if kind == "status":
        body = options["body"]
        data = body if isinstance(body, bytes) else str(body).encode()
        return Answer(data, options["status"], options["content_type"])
    return None


def _is_processed(kind: str, options: Any) -> bool:
    if kind in ("http_500_after_commit", "not_json", "no_code"):
        return True
    return bool(options.get("after_commit", False))


def _page(status: int) -> Answer:
    title = {
        429: "Too Many Requests",
        500: "Internal Server Error",
        502: "Bad gateway",
        503: "Service Temporarily Unavailable",
        504: "Gateway time-out",
        520: "HTTPServer server is returning an unknown error",
        522: "Connection timed out",
    }.get(status, "Error")
    html = (
        f"<!DOCTYPE html>\n<html>\n<head><title>api.clore.ai | {status}: {title}</title></head>\n"
        f"<body><center><h1>{status} {title}</h1></center><hr><center>simulated</center></body>\n"
        "</html>\n"
    )
    return Answer(html.encode(), status, "text/html; charset=UTF-8")


def _disconnect(request: web.BaseRequest) -> web.Response:
    if request.transport is not None:
        request.transport.close()
    return web.Response()  # not sent: the connection is closing


def _parse(data: bytes) -> Any:
    """Return the JSON of a body, or None if it is invalid or can't be encoded again."""
    try:
        value = json.loads(data) if data else None
        if b"\\u" in data:  # lone surrogates can't be encoded again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        return None
    return value


async def _sleep(seconds: float) -> None:
    if math.isinf(seconds):
        await asyncio.Event().wait()
    await asyncio.sleep(seconds)


def _family(host: str) -> int:
    # "localhost" would otherwise open two sockets with different ports.
    return socket.AF_INET6 if ":" in host else socket.AF_INET
