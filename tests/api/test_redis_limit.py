"""One rate limit for many machines through a real Redis, and what happens without it."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from clore_client import CloreClient, ConfigurationError
from tests.api.redis_server import RedisProcess, redis_process
from tests.conftest import MakeSim, client_for
from tests.variant import Simulator

RATE = 0.05


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_process(folder) as running:
        yield running


def machine(sim: Simulator, tmp_path: Path, name: str, limiter: Any) -> CloreClient:
    """A client as on a machine of its own."""
    return client_for(
        sim, rate_limit=RATE, state_dir=tmp_path / name, rate_limiter=limiter, rate_limit_wait=30
    )


def call_together(clients: list[CloreClient], calls: int) -> None:
    errors: list[BaseException] = []

    def work(client: CloreClient) -> None:
        try:
            for _ in range(calls):
                client.get_wallets()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []


def closest(sim: Simulator) -> float:
    arrived = sorted(call.arrived for call in sim.requests)
    return min(b - a for a, b in itertools.pairwise(arrived))


def test_machines_share_one_rate_limit(
    make_sim: MakeSim, tmp_path: Path, server: RedisProcess
) -> None:
    sim = make_sim(rate_limit=RATE / 2)
    clients = [machine(sim, tmp_path, name, server.url) for name in "abcd"]
    call_together(clients, 8)
    assert [call.status for call in sim.requests] == [200] * 32
    assert closest(sim) >= RATE / 2
    assert f"among all machines, by Redis at 127.0.0.1:{server.port}/0" in clients[0].describe()
    (key,) = redis.Redis.from_url(server.url).scan_iter()
    assert sim.api_key.encode() not in key
    assert 0 < redis.Redis.from_url(server.url).ttl(key) <= 86_400


def test_a_client_or_the_environment_may_name_it(
    sim: Simulator, tmp_path: Path, server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = redis.Redis(port=server.port, decode_responses=True)
    monkeypatch.setenv("CLORE_RATE_LIMITER", server.url)
    for limiter in (own, None):
        own.flushall()
        client = machine(sim, tmp_path, "a", limiter)
        client.get_wallets()
        assert len(own.keys()) == 1
        assert "by Redis at" in client.describe()


def test_cancels_of_another_machine_go_first(
    make_sim: MakeSim, tmp_path: Path, server: RedisProcess
) -> None:
    sim = make_sim(rate_limit=0)
    reader, other = (
        client_for(sim, rate_limit=0.3, state_dir=tmp_path / name, rate_limiter=server.url)
        for name in "ab"
    )
    order = other.create_order(other.find_servers("RTX 4090")[0]["id"])
    seen = len(sim.requests)
    threads = [threading.Thread(target=reader.get_wallets) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    other.cancel_order(order["order_id"])
    for thread in threads:
        thread.join()
    assert "cancel_order" in [call.endpoint for call in sim.requests[seen:]][:2]


def test_killed_restarted_and_stopped(
    make_sim: MakeSim, tmp_path: Path, server: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    sim = make_sim(rate_limit=RATE / 2)
    clients = [machine(sim, tmp_path, name, server.url) for name in "ab"]
    call_together(clients, 2)
    server.kill()
    call_together(clients, 5)
    shown = clients[0].describe()
    assert "among all processes on this machine" in shown
    assert "because Redis at" in shown
    server.start()
    time.sleep(5.1)
    call_together(clients, 5)
    assert "among all machines" in clients[0].describe()
    server.pause()
    started = time.monotonic()
    call_together(clients, 5)
    assert time.monotonic() - started < 30
    assert "among all processes on this machine" in clients[0].describe()
    server.resume()
    time.sleep(5.1)
    call_together(clients, 2)
    assert "among all machines" in clients[0].describe()
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert sum("the rate limit is only shared" in r.getMessage() for r in warnings) == 4


@pytest.mark.parametrize("trouble", ["read-only", "full", "password", "nothing there"])
def test_a_redis_that_refuses(
    sim: Simulator, tmp_path: Path, server: RedisProcess, trouble: str
) -> None:
    control = redis.Redis(port=server.port)
    url = server.url
    if trouble == "read-only":
        control.replicaof("127.0.0.1", "1")
    elif trouble == "full":
        control.config_set("maxmemory", 1)
    elif trouble == "password":
        control.config_set("requirepass", "right")
        url = f"redis://:wrong-password@127.0.0.1:{server.port}/0"
    else:
        server.kill()
    client = machine(sim, tmp_path, "a", url)
    assert len(client.get_wallets()) == 3
    shown = client.describe()
    assert "among all processes on this machine" in shown
    assert "wrong-password" not in shown + repr(client) + repr(vars(client))


@contextmanager
def answering(reply: bytes) -> Iterator[int]:
    """A server that sends the same reply to every command; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        def talk(connection: socket.socket) -> None:
            with connection:
                try:
                    while connection.recv(65536):
                        connection.sendall(reply)
                except OSError:
                    pass

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"+OK\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n<html>",
        b"$-1\r\n",
        b"*5\r\n:1\r\n$3\r\nnan\r\n$1\r\n0\r\n:0\r\n:0\r\n",
        b"*5\r\n:1\r\n$3\r\n1e9\r\n$1\r\n0\r\n:0\r\n:0\r\n",
        b"*2\r\n:1\r\n:2\r\n",
    ],
)
def test_nonsense(sim: Simulator, tmp_path: Path, reply: bytes) -> None:
    with answering(reply) as port:
        client = machine(sim, tmp_path, "a", f"redis://127.0.0.1:{port}/0")
        started = time.monotonic()
        for _ in range(3):
            client.get_wallets()
        assert time.monotonic() - started < 30
        assert "among all processes on this machine" in client.describe()


@pytest.mark.parametrize("url", ["http://:pass-word@h:1/", "redis://:pass-word@h:x", "/a", " "])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigurationError, match="rate_limiter is not a usable URL") as caught:
        CloreClient("k", rate_limiter=url)
    stack = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    ours = [frame for frame in stack.stack if "clore_client" in frame.filename]
    assert ours
    assert "pass-word" not in str([frame.locals for frame in ours])


def test_what_is_no_limiter() -> None:
    for odd in (5, object(), ["redis://h"]):
        with pytest.raises(TypeError, match="rate_limiter must be a URL"):
            CloreClient("k", rate_limiter=odd)  # type: ignore[arg-type]


def test_redis_is_imported_when_it_is_used() -> None:
    code = "import sys, clore_client as c; c.CloreClient('k'); sys.exit('redis' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "CLORE_RATE_LIMITER"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert run.returncode == 0
