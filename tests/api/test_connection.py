"""Connections that fail before the first byte of the request is sent."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import requests

from clore_client import CloreClient, CloreConnectionError, OrderOutcomeUnknownError
from clore_client.api.connection import never_sent


@contextmanager
def server(serve: Callable[[socket.socket], None]) -> Iterator[tuple[int, list[int]]]:
    """A TCP server; yields its port, and a list that grows with each connection."""
    peers: list[int] = []
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            while True:
                try:
                    peer, _ = listening.accept()
                except OSError:
                    return
                peers.append(1)
                held.append(peer)
                serve(peer)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1], peers
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for peer in held:
                peer.close()


def reset(peer: socket.socket) -> None:
    peer.recv(10)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def silent(peer: socket.socket) -> None:
    """Accept a connection, and send nothing."""


def plain(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    peer.close()


def client_of(url: str) -> CloreClient:
    return CloreClient("k", base_url=url, rate_limit=0, backoff=0, create_order_interval=0,
                       timeout=0.3)  # fmt: skip


@pytest.mark.parametrize("serve", [reset, silent, plain])
def test_a_tls_handshake_that_fails_leaves_nothing_behind(
    serve: Callable[[socket.socket], None],
) -> None:
    with server(serve) as (port, peers):
        with pytest.raises(CloreConnectionError, match="after 3 retries") as caught:
            client_of(f"https://127.0.0.1:{port}")._request("POST", "/v1/create_order")
        assert caught.value.retryable
        assert len(peers) == 3


@pytest.mark.parametrize("serve", [reset, silent])
def test_over_plain_http_the_same_is_a_doubt(serve: Callable[[socket.socket], None]) -> None:
    with server(serve) as (port, peers):
        with pytest.raises(OrderOutcomeUnknownError):
            client_of(f"http://127.0.0.1:{port}")._request("POST", "/v1/create_order")
        assert len(peers) == 1


def test_a_host_that_can_not_be_parsed_leaves_nothing_behind() -> None:
    with pytest.raises((CloreConnectionError, ValueError)):
        client_of(f"https://{'a' * 70}.example").create_order(1)


def test_an_error_of_an_unwatched_connection_is_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced adapter does not record a send, so the type of the error decides."""

    class Adapter(requests.adapters.BaseAdapter):
        calls = 0

        def send(self, *args: object, **kwargs: object) -> requests.Response:
            self.calls += 1
            raise requests.ConnectionError("gone")

        def close(self) -> None:
            pass

    client, adapter = client_of("http://127.0.0.1:1"), Adapter()
    session = client._sessions.take(reads=True)
    session.mount("http://", adapter)
    monkeypatch.setattr(client._sessions, "take", lambda reads: session)
    with pytest.raises(OrderOutcomeUnknownError):
        client._request("POST", "/v1/create_order")
    assert adapter.calls == 1
    assert never_sent(requests.ConnectTimeout(), recorded=False)
    assert not never_sent(requests.ConnectTimeout(), recorded=True)
