"""Test forwarded ports and the wait for a web service."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.server
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest

from clore_client import CloreClient, CloreConnectionError, SSHError, WaitTimeoutError
from clore_client.simulator.tls import make_context
from clore_client.ssh.tunnel import Forward, check_forward_arguments
from tests.conftest import until
from tests.hostile import HostileServer
from tests.sshd import Sshd, free_port
from tests.variant import inside

MB = 1_000_000


@contextlib.contextmanager
def tcp_service(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """Run a TCP service with a thread for each connection; yield its port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    threads = []

    def serve(peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            peer.settimeout(20)
            talk(peer)

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(peer,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (acceptor, *threads):
            thread.join()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def is_reset(port: int) -> bool:
    """Check that a connection is reset, when it is made or when it is read."""
    try:
        with connect(port) as sock:
            return sock.recv(1) is None
    except ConnectionResetError:
        return True


def all_of(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def echo(peer: socket.socket) -> None:
    while data := peer.recv(65536):
        peer.sendall(data)


def answer(port: int, data: bytes) -> bytes:
    """Send data and the end of the stream; return the reply."""
    with connect(port) as sock:

        def send() -> None:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        got = all_of(sock)
        sender.join()
        return got


# --- data ---


def test_both_ways(ssh: paramiko.SSHClient) -> None:
    data = os.urandom(3 * MB)
    with tcp_service(echo) as port:
        forward = Forward(ssh, port)
        with forward as local:
            assert isinstance(local, int)
            assert answer(local, data) == data
            assert answer(local, b"") == b""
            until(lambda: not any(link.thread.is_alive() for link in forward._links))


def test_fifty_at_once(ssh: paramiko.SSHClient) -> None:
    together = threading.Barrier(50)

    def talk(peer: socket.socket) -> None:
        data = peer.recv(100)
        together.wait(20)  # until all connections are open
        peer.sendall(data * 1000)

    def one(number: int) -> bool:
        with connect(local) as sock:
            sock.sendall(b"%2d" % number)
            return all_of(sock) == b"%2d" % number * 1000

    with tcp_service(talk) as port, Forward(ssh, port) as local, ThreadPoolExecutor(50) as pool:
        assert all(pool.map(one, range(50)))


def test_half_close_of_this_side(ssh: paramiko.SSHClient) -> None:
    """The service responds only after the end of its input."""
    with tcp_service(lambda peer: peer.sendall(b"%d" % len(all_of(peer)))) as port:
        with Forward(ssh, port) as local:
            assert answer(local, b"x" * MB) == b"%d" % MB


def test_half_close_of_the_service(ssh: paramiko.SSHClient) -> None:
    """The service ends its output, and still reads."""
    heard: list[bytes] = []

    def talk(peer: socket.socket) -> None:
        peer.sendall(b"greeting")
        peer.shutdown(socket.SHUT_WR)
        heard.append(all_of(peer))

    with tcp_service(talk) as port, Forward(ssh, port) as local, connect(local) as sock:
        assert all_of(sock) == b"greeting"
        sock.sendall(b"after its end")
        sock.shutdown(socket.SHUT_WR)
        until(lambda: heard == [b"after its end"])


def test_a_client_that_goes_away_ends_the_service(ssh: paramiko.SSHClient) -> None:
    gone = threading.Event()

    def talk(peer: socket.socket) -> None:
        try:
            while True:
                peer.sendall(b"x" * 65536)
        finally:
            gone.set()

    with tcp_service(talk) as port, Forward(ssh, port) as local:
        with connect(local) as sock:
            assert sock.recv(10)
        assert gone.wait(20)


# --- the local port ---


def test_loopback_only(openssh: paramiko.SSHClient) -> None:
    with Forward(openssh, 9) as local:
        with socket.socket() as sock:
            with pytest.raises(OSError, match="refused"):
                sock.connect(("127.0.0.2", local))
    with pytest.raises(OSError, match="refused"):
        connect(local)


def test_a_chosen_port_and_a_busy_one(openssh: paramiko.SSHClient) -> None:
    wanted = free_port()
    with tcp_service(echo) as port:
        for _ in range(2):  # the port is free again at once
            with Forward(openssh, port, wanted) as local:
                assert local == wanted
                assert answer(local, b"x") == b"x"
                with pytest.raises(OSError, match=rf"local_port {wanted} ") as caught:
                    Forward(openssh, port, wanted).__enter__()
                assert caught.value.errno == errno.EADDRINUSE
                assert answer(local, b"x") == b"x"


def test_a_busy_port_closes_a_connection_that_is_its_own(sshd: Sshd) -> None:
    ssh = CloreClient().connect_ssh(sshd.order(), key_path=str(sshd.key), wait=20)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="local_port"):
            Forward(ssh, 9, taken.getsockname()[1], owns=True).__enter__()
    assert ssh.get_transport() is None


@pytest.mark.parametrize(
    ("ports", "name"),
    [
        ((0,), "remote_port"),
        ((65536,), "remote_port"),
        ((-1,), "remote_port"),
        ((True,), "remote_port"),
        (("80",), "remote_port"),
        ((80.0,), "remote_port"),
        ((None,), "remote_port"),
        ((80, -1), "local_port"),
        ((80, 65536), "local_port"),
        ((80, False), "local_port"),
        ((80, None), "local_port"),
    ],
)
def test_bad_ports(ports: tuple[Any, ...], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        check_forward_arguments(*ports)


# --- what goes wrong ---


def test_nothing_listens_there(ssh: paramiko.SSHClient, caplog: pytest.LogCaptureFixture) -> None:
    dead = free_port()
    with Forward(ssh, dead) as local:
        for _ in range(2):
            assert is_reset(local)
    warnings = [r for r in caplog.records if r.name == "clore_client"]
    assert [r.levelno for r in warnings] == [logging.WARNING] * 2
    assert f"port {dead} " in warnings[0].getMessage()
    transport = ssh.get_transport()
    assert transport is not None
    assert transport.is_active()


def test_what_was_cut_off_does_not_look_complete(sshd: Sshd) -> None:
    """A broken connection is reset, and new ones too."""

    def talk(peer: socket.socket) -> None:
        peer.sendall(b"the first half")
        peer.recv(1)

    ssh = CloreClient().connect_ssh(sshd.order(), key_path=str(sshd.key), wait=20)
    transport = ssh.get_transport()
    assert transport is not None
    with ssh, tcp_service(talk) as port, Forward(ssh, port) as local:
        with connect(local) as sock:
            assert sock.recv(100) == b"the first half"
            transport.sock.shutdown(socket.SHUT_RDWR)
            with pytest.raises(ConnectionResetError):
                sock.recv(100)
        assert is_reset(local)
    with pytest.raises(SSHError, match="closed"):
        Forward(ssh, port).__enter__()


# --- the end of the block ---


@pytest.mark.parametrize("owns", [False, True])
def test_the_end_of_the_block_ends_everything(sshd: Sshd, owns: bool) -> None:
    ended, released = threading.Event(), threading.Event()

    def talk(peer: socket.socket) -> None:
        peer.sendall(b"hello")
        with contextlib.suppress(OSError):
            all_of(peer)
        ended.set()
        released.wait(20)  # and keeps its side open

    ssh = CloreClient().connect_ssh(sshd.order(), key_path=str(sshd.key), wait=20)
    transport = ssh.get_transport()
    assert transport is not None
    with ssh, tcp_service(talk) as port:
        with contextlib.suppress(KeyError), Forward(ssh, port, owns=owns) as local:
            sock = connect(local)
            assert sock.recv(5) == b"hello"
            raise KeyError("of the block")
        with sock, contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        assert ended.wait(20)
        with pytest.raises(OSError, match="refused"):
            connect(local)
        assert transport.is_active() is not owns
        assert not forward_threads()
        released.set()


def forward_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(("clore-forward", "clore-hang"))]


def test_data_that_nobody_takes_does_not_hold_up_the_end(ssh: paramiko.SSHClient) -> None:
    def talk(peer: socket.socket) -> None:
        started.set()
        with contextlib.suppress(OSError):
            while True:
                peer.sendall(b"x" * 65536)

    started = threading.Event()
    with tcp_service(talk) as port:
        with Forward(ssh, port) as local:
            reader = connect(local)  # never reads
            assert started.wait(20)
            time.sleep(0.2)
        reader.close()
        assert not forward_threads()


def test_entered_once(openssh: paramiko.SSHClient) -> None:
    forward = Forward(openssh, 9)
    with forward as local:
        assert repr(forward) == f"<Forward of 127.0.0.1:{local} to port 9, open>"
    assert "closed" in repr(forward)
    with pytest.raises(SSHError, match="only once"):
        forward.__enter__()


@pytest.mark.internal
def test_no_thread_can_be_started(
    openssh: paramiko.SSHClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    start = inside("ssh.tunnel.start_thread")
    port = free_port()
    forward = Forward(openssh, 9, port)
    with monkeypatch.context() as patch:
        patch.setattr(start, fail)
        with pytest.raises(RuntimeError) as caught:
            forward.__enter__()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30)
    assert caught.value  # which would keep a listening socket open
    with Forward(openssh, 9) as port, monkeypatch.context() as patch:
        patch.setattr(start, fail)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            assert sock.recv(1) == b""
    assert "dropped a connection" in caplog.text


def test_nothing_leaks(ssh: paramiko.SSHClient) -> None:
    def fds() -> int:
        return len(os.listdir("/dev/fd"))

    transport: Any = ssh.get_transport()
    with tcp_service(echo) as port:

        def cycle() -> None:
            with Forward(ssh, port) as local:
                assert answer(local, b"x" * 1000) == b"x" * 1000
                left_open.append(connect(local))
                left_open[-1].sendall(b"x")
                left_open[-1].recv(1)
            left_open.pop().close()

        left_open: list[socket.socket] = []
        cycle()
        until(lambda: not len(transport._channels))
        threads, files = threading.active_count(), fds()
        for _ in range(20):
            cycle()
        assert not forward_threads()
        until(lambda: threading.active_count() <= threads and fds() <= files)
        until(lambda: not len(transport._channels))


def test_a_server_that_hangs_when_a_channel_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the block does not wait for the server."""
    monkeypatch.setattr("clore_client.ssh.tunnel.FORWARD_LEAVING", 0.2)
    monkeypatch.setattr("clore_client.ssh.tunnel.FORWARD_OPENING", 1.0)

    async def never() -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(
        "tests.hostile._Login.connection_requested", lambda *_: never(), raising=False
    )
    with HostileServer() as server:
        for owns in (False, True):
            client = paramiko.SSHClient()
            client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
            client.connect("127.0.0.1", server.port, "root", "x", allow_agent=False)
            with client:
                started = time.monotonic()
                with Forward(client, 9, owns=owns) as local, connect(local):
                    time.sleep(0.1)
                assert time.monotonic() - started < 20
                until(lambda: not forward_threads())


pytestmark = pytest.mark.internal


class Service:
    """A web service that responds with each status of a list, and repeats the last one."""

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
    monkeypatch.setattr("clore_client.ssh.tunnel.SERVICE_PAUSE", 0.05)


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
    monkeypatch.setattr("clore_client.ssh.tunnel.SERVICE_LIMIT", 0.5)
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


def test_a_port_over_ssh(client: CloreClient, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not for a forwarded port
    port = free_port()
    said = f"port {port} of the host within 0.3s, the last result: the connection was refused"
    with pytest.raises(WaitTimeoutError, match=said):
        client.wait_for_http(sshd.order(), port=port, timeout=0.3, key_path=sshd.key)
    with Service() as service:
        service.statuses = [502, 404]
        order = sshd.order()
        assert client.wait_for_http(order, "/x", port=service.port, key_path=sshd.key) == 404
        assert service.seen[0][0] == "/x"
        assert service.seen[0][1]["Host"] == f"localhost:{service.port}"
        with client.connect_ssh(order, key_path=sshd.key) as ssh:
            assert client.wait_for_http(order, port=service.port, ssh=ssh) == 404
        with pytest.raises(SSHError, match="closed"):
            client.wait_for_http(order, port=service.port, ssh=ssh)


def test_a_port_that_speaks_something_else(client: CloreClient, sshd: Sshd) -> None:
    with pytest.raises(WaitTimeoutError, match=r"the last result: .*SSH-2"):
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
