"""Tests of the fault server, over a raw socket."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any

import pytest

from tests.attack.fault_server import FaultServer
from tests.attack.faults import KINDS

pytestmark = pytest.mark.internal


class Caller:
    """A connection that sends requests."""

    def __init__(self, server: FaultServer) -> None:
        self.key = server.key
        self.sock = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        self.stream = self.sock.makefile("rb")

    def send(self, path: str, body: Any = None) -> None:
        """Send one request."""
        raw = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{'GET' if body is None else 'POST'} /v1/{path} HTTP/1.1\r\nHost: here\r\n"
            f"auth: {self.key}\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        self.sock.sendall(head.encode() + raw)

    def answer(self) -> tuple[int, dict[str, str], Any]:
        """Read one response."""
        status = int(self.stream.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self.stream.readline().decode().strip():
            name, _, value = line.partition(": ")
            headers[name] = value
        raw = self.stream.read(int(headers.get("Content-Length", "0")))
        return status, headers, json.loads(raw) if raw[:1] == b"{" else raw

    def ask(self, path: str, body: Any = None) -> Any:
        """Send a request, and return the decoded response."""
        self.send(path, body)
        return self.answer()[2]


def order(server_id: int = 101) -> dict[str, Any]:
    return {"renting_server": server_id, "type": "on-demand", "currency": "bitcoin", "image": "i"}


def test_it_makes_lists_and_ends_orders() -> None:
    with FaultServer(visible_after=0, cancel_lingers=0, deploy_after=0) as server:
        caller = Caller(server)
        assert caller.ask("create_order", order()) == {"code": 0}
        assert caller.ask("create_order", order())["error"] == "server-already-rented"
        (listed,) = caller.ask("my_orders")["orders"]
        assert (listed["si"], listed["expired"], listed["mon_container"]) == (101, False, 2)
        assert server.running == [listed["id"]]
        assert [s["rented"] for s in caller.ask("marketplace")["servers"]][:2] == [True, False]
        assert caller.ask("cancel_order", {"id": listed["id"]}) == {"code": 0}
        assert caller.ask("cancel_order", {"id": listed["id"]})["code"] == 6
        assert server.running == []
        assert caller.ask("my_orders")["orders"] == []
        (ended,) = caller.ask("my_orders?return_completed=true")["orders"]
        assert ended["expired"] is True
        assert {request.connection for request in server.requests} == {1}


def test_lists_lag_behind_and_flap() -> None:
    with FaultServer(visible_after=0.1, cancel_lingers=0.1) as server:
        caller = Caller(server)
        made = server.ledger.place(101)
        assert caller.ask("my_orders")["orders"] == []
        time.sleep(0.12)
        server.flap(1)
        assert caller.ask("my_orders")["orders"] == []
        assert len(caller.ask("my_orders")["orders"]) == 1
        server.ledger.end(made.id)
        assert len(caller.ask("my_orders")["orders"]) == 1
        time.sleep(0.12)
        assert caller.ask("my_orders")["orders"] == []


def test_clocks_can_differ_or_be_missing() -> None:
    with FaultServer(visible_after=0, clock_offset=-60) as server:
        caller = Caller(server)
        server.ledger.place(101)
        caller.send("my_orders")
        _, headers, listing = caller.answer()
        assert "Date" in headers
        assert 55 < time.time() - listing["orders"][0]["ct"] < 65
        server.send_date = False
        caller.send("my_orders")
        assert "Date" not in caller.answer()[1]


@pytest.mark.parametrize("commit", [True, False])
def test_faults_happen_once_and_in_order(commit: bool) -> None:
    with FaultServer() as server:
        server.fault("create_order", "page", skip=1, commit=commit)
        caller = Caller(server)
        assert caller.ask("create_order", order(101)) == {"code": 0}
        caller.send("create_order", order(102))
        assert caller.answer()[0] == 502
        assert caller.ask("create_order", order(103)) == {"code": 0}
        assert [made.server_id for made in server.orders] == (
            [101, 102, 103] if commit else [101, 103]
        )


def test_it_stops_at_once_during_any_fault() -> None:
    started = time.monotonic()
    for kind in KINDS:
        with FaultServer() as server:
            server.fault("wallets", kind, **({"endless": True} if kind == "huge" else {}))
            caller = Caller(server)
            caller.send("wallets")
            caller.sock.settimeout(0.2)
            with contextlib.suppress(OSError):
                caller.sock.recv(1)
    assert time.monotonic() - started < 20
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("fault-server")]
