"""Hosts that failed are tried last for a day; with prefer_known, hosts that worked are first."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, RentalError, SSHError
from tests.conftest import MakeSim, client_for
from tests.orders.test_credentials import in_a_second_process
from tests.rental.test_rental import QUICK, active, cheapest
from tests.variant import Simulator


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def outcomes(client: CloreClient) -> dict[int, str]:
    return {host["server_id"]: host["outcome"] for host in client.host_history()}


def first_tried(client: CloreClient, **options: Any) -> int:
    with client.rent(**{**QUICK, **options}) as rental:
        return rental.server.id or 0


def test_a_host_that_does_not_deploy_is_tried_last(
    any_sim: Simulator, any_client: CloreClient, state: Path
) -> None:
    client = client_for(any_sim, state_dir=state)
    first, second = cheapest(client, 2)
    any_sim.set_deploy_after(first, float("inf"))
    assert first_tried(client, deploy_timeout=0.5) == second
    assert outcomes(client) == {first: "not deployed", second: "worked"}
    assert [host["server_id"] for host in client.host_history()] == [second, first]
    any_sim.set_deploy_after(first, 0.0)
    assert first_tried(client) == second
    told = in_a_second_process(any_sim, state, "print(client.host_history())")
    assert f"'server_id': {first}, 'outcome': 'not deployed'" in told
    # It is still there when there is no other.
    assert first_tried(client, server_id=first) == first
    assert outcomes(client)[first] == "worked"
    assert first_tried(client) == first


def test_known_hosts_first(any_sim: Simulator, state: Path) -> None:
    client = client_for(any_sim, state_dir=state)
    first, second, third = cheapest(client, 3)
    assert first_tried(client, server_id=third) == third
    assert first_tried(client) == first
    any_sim.set_rented(first)
    assert first_tried(client_for(any_sim, state_dir=state), prefer_known=True) == third
    assert first_tried(client) == second


def test_a_host_without_sshd_and_one_that_refuses(make_sim: MakeSim, state: Path) -> None:
    sim = make_sim(ssh=True, sshd_after=60.0)
    client = client_for(sim, state_dir=state)
    with client.rent(**QUICK) as rental:
        with pytest.raises(SSHError, match="no SSH at"):
            rental.run("true", wait=0.1)
        server_id = rental.server.id or 0
    assert outcomes(client) == {server_id: "no sshd"}
    other = client_for(sim, state_dir=state.with_name("other"))
    with other.rent(**QUICK) as rental:  # the client's own methods record it, too
        with pytest.raises(SSHError, match="no SSH at"):
            other.wait_for_ssh(rental.order["order_id"], wait=0.1)
        assert outcomes(other) == {rental.server.id or 0: "no sshd"}
    sim = make_sim(ssh=True)
    client = client_for(sim, state_dir=state)
    with client.rent(**QUICK) as rental:
        with pytest.raises(SSHError) as caught:
            rental.run("true", password="of the user's own")
        assert caught.value.reason == "refused"
        assert outcomes(client)[rental.server.id or 0] == "worked"
        rental.order["ssh_password"] = "not this one"
        with pytest.raises(SSHError):
            rental.run("true")
        assert outcomes(client) == {rental.server.id or 0: "login refused"}


def test_it_lasts_a_day(sim: Simulator, state: Path) -> None:
    client = client_for(sim, state_dir=state)
    first, _ = cheapest(client, 2)
    first_tried(client)
    path = state / "host_history"
    assert path.stat().st_mode & 0o77 == 0
    content = json.loads(path.read_text())
    ((name, seen),) = content["hosts"].items()
    seen.update(time=time.time() - 86_500, outcome="not deployed")
    path.write_text(json.dumps(content))
    other = client_for(sim, state_dir=state)
    assert other.host_history() == []
    assert first_tried(other) == first
    assert name.startswith(sim.url.replace("127.0.0.1", "localhost"))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"hosts": 5}', '{"hosts": {"x": 5, "http://localhost:1 x": {}}}', "[" * 60_000,
     '{"hosts": {"http://localhost:1 5": {"outcome": 5, "time": 1e400}}}'],
)  # fmt: skip
def test_a_broken_file(sim: Simulator, state: Path, content: str) -> None:
    state.mkdir()
    (state / "host_history").write_text(content)
    client = client_for(sim, state_dir=state)
    assert client.host_history() == []
    server_id = first_tried(client)
    assert outcomes(client_for(sim, state_dir=state)) == {server_id: "worked"}


def test_without_a_folder(sim: Simulator, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file"):
        client = client_for(sim, state_dir=folder)
        server_id = first_tried(client)
        assert outcomes(client) == {server_id: "worked"}


def test_the_limit_and_not_the_host_is_to_blame(sim: Simulator, state: Path) -> None:
    client = client_for(sim, state_dir=state)
    with pytest.raises(RentalError):
        with client.rent(max_price_usd=0.0001, **QUICK):
            pytest.fail("entered")
    assert client.host_history() == []


def test_many_processes_write_it_at_once(sim: Simulator, state: Path) -> None:
    clients = [client_for(sim, state_dir=state) for _ in range(2)]
    pids = []
    for number in range(4):
        if not (pid := os.fork()):
            for server_id in range(10):
                clients[0]._host_history.record(number * 10 + server_id + 1, "worked")
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert len(clients[1].host_history()) == 40
    assert active(sim) == []
