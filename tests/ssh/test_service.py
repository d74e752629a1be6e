"""Waiting for a web service: at a public address, and on a port over SSH."""

from __future__ import annotations

import contextlib
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, CloreConnectionError, SSHError, WaitTimeoutError
from clore_client.simulator.tls import make_context
from tests.sshd import Sshd, free_port

pytestmark = pytest.mark.internal


class Service:
    """A web service: a list of statuses, of which the last one stays; and what it was sent."""

    def __init__(self, context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.statuses = [200]
        self.seen: list[tuple[str, dict[str, str]]] = []
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service.seen.append((self.path, dict(self.headers)))
                status = service.statuses[0]
                if len(service.statuses) > 1:
                    service.statuses.pop(0)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> Service:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def order(self) -> dict[str, Any]:
        urls = {"8888": f"https://localhost:{self.port}"}
        return {"order_id": 7, "status": "running", "connection": {"http_ports": urls}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clore_client.ssh.service.SERVICE_PAUSE", 0.05)


@pytest.fixture
def client() -> CloreClient:
    return CloreClient("a-secret-key", state_dir=None)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service with TLS, whose certificate this process trusts."""
    context, authority = make_context(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority))
    with Service(context) as running:
        yield running


@pytest.mark.parametrize("last", [200, 204, 302, 401, 403, 404, 500])
def test_until_it_answers_by_itself(service: Service, client: CloreClient, last: int) -> None:
    service.statuses = [502, 502, 503, 521, last]
    assert client.wait_for_http(service.order(), "/api?x=1") == last
    assert [path for path, _ in service.seen] == ["/api?x=1"] * 5


def test_no_credentials_are_sent(service: Service, client: CloreClient, tmp_path: Path) -> None:
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine localhost login me password s3cret\n")
    netrc.chmod(0o600)
    service.statuses = [502, 302]
    client.wait_for_http(service.order())
    for _, headers in service.seen:
        assert {name.lower() for name in headers}.isdisjoint({"auth", "authorization", "cookie"})
        assert "a-secret-key" not in str(headers)
    assert len(service.seen) == 2  # the redirect was not followed


def test_it_never_answers(service: Service, client: CloreClient) -> None:
    service.statuses = [502]
    started = time.monotonic()
    with pytest.raises(WaitTimeoutError, match=r"no service at https://localhost:\d+/ within 0.5s"):
        client.wait_for_http(service.order(), timeout=0.5)
    assert 0.5 <= time.monotonic() - started < 10
    with pytest.raises(TimeoutError) as caught:
        client.wait_for_http(service.order(), timeout=0)
    assert getattr(caught.value, "reason", "") == "HTTP 502"


def test_nobody_listens_yet(service: Service, client: CloreClient, tmp_path: Path) -> None:
    order = service.order()
    port = free_port()
    order["connection"]["http_ports"] = {"80": f"http://127.0.0.1:{port}/"}
    with pytest.raises(WaitTimeoutError, match="efused"):
        client.wait_for_http(order, timeout=0.2)
    with contextlib.ExitStack() as stack:
        threading.Timer(0.5, lambda: stack.enter_context(Service(port=port))).start()
        assert client.wait_for_http(order, timeout=20) == 200


def test_a_certificate_that_is_not_valid(
    service: Service, client: CloreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    started = time.monotonic()
    with pytest.raises(CloreConnectionError, match="certificate of https://localhost"):
        client.wait_for_http(service.order(), timeout=60)
    assert time.monotonic() - started < 20
    assert service.seen == []


def test_a_server_that_sends_slowly_without_end(
    client: CloreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clore_client.ssh.service.SERVICE_LIMIT", 0.5)
    done = threading.Event()

    def trickle(listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            near, _ = listener.accept()
            while not done.wait(0.05):
                near.sendall(b"H")

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=trickle, args=(listener,), daemon=True).start()
    urls = {"80": f"http://127.0.0.1:{listener.getsockname()[1]}"}
    started = time.monotonic()
    with pytest.raises(WaitTimeoutError):
        client.wait_for_http({"order_id": 7, "connection": {"http_ports": urls}}, timeout=0.3)
    assert time.monotonic() - started < 10
    done.set()


def test_a_port_over_ssh(client: CloreClient, sshd: Sshd) -> None:
    port = free_port()
    with pytest.raises(WaitTimeoutError, match=f"port {port} of the machine within 0.3s"):
        client.wait_for_http(sshd.order(), port=port, timeout=0.3, key_path=sshd.key)
    with Service() as service:
        service.statuses = [502, 404]
        order = sshd.order()
        assert client.wait_for_http(order, "/x", port=service.port, key_path=sshd.key) == 404
        assert service.seen[0][0] == "/x"
        assert service.seen[0][1]["Host"] == f"localhost:{service.port}"
        with client.connect_ssh(order, key_path=sshd.key) as ssh:
            assert client.wait_for_http(order, port=service.port, ssh=ssh) == 404
        with pytest.raises(SSHError, match="broke"):
            client.wait_for_http(order, port=service.port, ssh=ssh)


def test_a_port_that_speaks_something_else(client: CloreClient, sshd: Sshd) -> None:
    with pytest.raises(WaitTimeoutError, match="it does not answer with HTTP"):
        client.wait_for_http(sshd.order(), port=sshd.port, timeout=0.2, key_path=sshd.key)


def test_progress(service: Service, client: CloreClient) -> None:
    service.statuses = [502, 502, 200]
    events: list[Any] = []
    client.wait_for_http(service.order(), on_progress=events.append)
    assert [event.name for event in events] == ["http", "http"]
    assert "no service at https://localhost" in events[0].text
    assert events[0].text.endswith("yet: HTTP 502, 0 s")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": "x"}, "path must begin"),
        ({"path": "/a b"}, "path must begin"),
        ({"path": "/\r\nHost: x"}, "path must begin"),
        ({"path": 5}, "path must be a string"),
        ({"port": 0}, "port must be"),
        ({"port": "80"}, "port must be"),
        ({"timeout": -1}, "timeout must be"),
        ({"progress": "yes"}, "progress must be True or False"),
        ({"on_progress": 5}, "on_progress must be callable"),
        ({}, "no HTTP port"),
    ],
)
def test_arguments_that_can_not_be_right(
    client: CloreClient, arguments: dict[str, Any], said: str
) -> None:
    order = {"order_id": 7, "connection": {"ssh": "ssh root@127.0.0.1 -p 9"}}
    with pytest.raises((TypeError, ValueError), match=said):
        client.wait_for_http(order, **arguments)
