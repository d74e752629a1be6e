"""Credentials that a later process finds again, and that are gone when the order has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clore_client import (
    CloreClient,
    Order,
    OrderEndedError,
    OrderNotFoundError,
    OrderOutcomeUnknownError,
    SSHError,
    WaitTimeoutError,
)
from tests.conftest import FORMS, MakeSim, client_for, sent_to, until
from tests.sshd import generate
from tests.test_client import plain_server
from tests.variant import Simulator

PASSWORD, TOKEN = "pass-4f9d-word", "token-77aa"


@pytest.fixture(params=FORMS)
def hosts(request: pytest.FixtureRequest, make_sim: MakeSim) -> Simulator:
    return make_sim(form=request.param, ssh=True)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def started(client: CloreClient, **options: Any) -> Order:
    """Return a running order."""
    order = client.create_order(plain_server(client), **options)
    return client.wait_for_order(order, timeout=20, poll_interval=0.02)


def saved(state: Path) -> list[Path]:
    return sorted((state / "credentials").glob("*"))


def in_a_second_process(sim: Simulator, state: Path, code: str, *words: object) -> str:
    """Run a program with another client of the same account and state folder."""
    head = (
        "import sys\nfrom clore_client import CloreClient\n"
        "client = CloreClient(rate_limit=0.02, backoff=0.01, timeout=5, order_lag=0.3,"
        " create_order_interval=0.05, state_dir=sys.argv[1])\nargument = sys.argv[2:]\n"
    )
    environment = {
        **os.environ,
        "CLORE_API_KEY": sim.api_key,
        "CLORE_BASE_URL": sim.url,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", head + code, str(state), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_process_logs_in_with_the_id_alone(hosts: Simulator, state: Path) -> None:
    order = started(client_for(hosts, state_dir=state))
    code = (
        "number = int(argument[0])\n"
        "print(client.run(number, 'echo by id').stdout, end='')\n"
        "print(client.run(argument[0], 'echo by text').stdout, end='')\n"
        "print(client.run(client.get_orders()[0], 'echo by record').stdout, end='')\n"
        "order = client.get_order(number)\n"
        "print(order['ssh_password'], 'ssh_password' in repr(order) and '***' in repr(order))\n"
        "print(client.ssh_command(number).split()[-1], client.cancel_order(order))\n"
    )
    told = in_a_second_process(hosts, state, code, order.id).split("\n")
    assert told[:3] == ["by id", "by text", "by record"]
    assert told[3] == f"{hosts.orders[0].body['ssh_password']} True"
    assert told[4] == "root@127.0.0.1 True"
    assert saved(state) == []
    assert not hosts.orders[0].active


def test_jobs_and_services_with_the_id_alone(hosts: Simulator, state: Path, tmp_path: Path) -> None:
    order = started(client_for(hosts, state_dir=state))
    client, number = client_for(hosts, state_dir=state), order.id or 0
    before = len(sent_to(hosts, "my_orders"))
    job = client.start(number, "echo done", name="train")
    assert len(sent_to(hosts, "my_orders")) - before <= 2  # the address is read once
    assert job.wait(timeout=20) == 0
    assert client.job(number, "train").tail() == "done\n"
    assert [found.name for found in client.jobs(number)] == ["train"]
    assert " root@127.0.0.1:" in client.rsync_command(number, tmp_path, "~/work")
    with pytest.raises(WaitTimeoutError):
        client.wait_for_http(number, port=1, timeout=0)
    for call in (client.jobs, client.wait_for_http):
        with pytest.raises(OrderNotFoundError):
            call(number + 1)


def test_a_record_without_an_address_is_enough(hosts: Simulator, state: Path) -> None:
    client = client_for(hosts, state_dir=state)
    made = client.create_order(plain_server(client))
    until(lambda: hosts.orders[0].status == "running")
    assert client.run(made, "echo hi").stdout == "hi\n"
    assert client.run({"order_id": made.id}, "echo hi").stdout == "hi\n"


def test_the_files(sim: Simulator, state: Path) -> None:
    client = client_for(sim, state_dir=state)
    options: dict[str, Any] = {"ssh_password": PASSWORD, "jupyter_token": TOKEN}
    options["env"] = {"HF": "hush-env"}
    first, second = (client.create_order(plain_server(client, n), **options) for n in range(2))
    assert first.id != second.id
    assert len(saved(state)) == 2
    assert stat.S_IMODE((state / "credentials").stat().st_mode) == 0o700
    for path in saved(state):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        content = json.loads(path.read_text())
        assert (content["schema"], content["ssh_password"]) == (1, PASSWORD)
        assert "hush-env" not in path.read_text()
        assert sim.api_key not in path.read_text()
    other = client_for(sim, state_dir=state)
    assert other.wait_for_order(first, 20, 0.02)["jupyter_token"] == TOKEN
    other.cancel_orders([first, second])
    assert saved(state) == []


@pytest.mark.parametrize("options", [{"state_dir": None}, {"remember_credentials": False}])
def test_in_memory_only(hosts: Simulator, state: Path, options: dict[str, Any]) -> None:
    client = client_for(hosts, **{"state_dir": state, **options})
    order = started(client)
    assert not (state / "credentials").exists()
    assert client.run(order["order_id"], "echo hi").stdout == "hi\n"
    assert "ssh_password" not in client_for(hosts, state_dir=state).get_orders()[0]


@pytest.mark.parametrize("where", ["file", "encrypted file", "agent"])
def test_a_private_key_is_found_by_its_fingerprint(
    hosts: Simulator, state: Path, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = Path.home() / ".ssh"
    keys.mkdir(mode=0o700)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    secret = "open sesame" if where == "encrypted file" else ""
    generate(keys / "of another machine")
    generate(keys / "of_this one", "rsa", secret)
    public = (keys / "of_this one.pub").read_text()
    (keys / "notes.txt").write_text("no key")
    (keys / "folder").mkdir()
    (keys / "broken").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n")
    order = started(client_for(hosts, state_dir=state), ssh_key=public)
    assert "ssh_password" not in order
    (path,) = saved(state)
    assert public.split()[1] not in path.read_text()
    agent = None
    try:
        if where == "agent":
            sock = str(tmp_path / "agent")
            agent = subprocess.Popen(["ssh-agent", "-D", "-a", sock], stdout=subprocess.DEVNULL)
            until(lambda: os.path.exists(sock))
            monkeypatch.setenv("SSH_AUTH_SOCK", sock)
            subprocess.run(["ssh-add", "-q", keys / "of_this one"], check=True)
            (keys / "of_this one").unlink()
        again = client_for(hosts, state_dir=state)
        if secret:
            with pytest.raises(ValueError, match="of_this one' is encrypted: give passphrase="):
                again.run(order["order_id"], "true")
            assert again.run(order["order_id"], "echo hi", passphrase=secret).stdout == "hi\n"
        else:
            assert again.run(order["order_id"], "echo hi").stdout == "hi\n"
        if where != "agent":
            assert "'" + str(keys / "of_this one") + "'" in again.ssh_command(order)
    finally:
        if agent is not None:
            agent.terminate()
            agent.wait(10)


@pytest.mark.internal
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("form", FORMS)
def test_a_process_that_is_killed_while_it_orders(
    make_sim: MakeSim, state: Path, form: str
) -> None:
    """Kill after the request was sent, before the order is found or returned."""
    sim = make_sim(form=form, ssh=True, visible_after=0.5)
    client = client_for(sim, state_dir=state)
    server_id = plain_server(client)
    pid = os.fork()
    if not pid:
        dying = client_for(sim, state_dir=state)
        place = dying._orders.credentials.assign
        dying._orders.credentials.assign = (  # type: ignore[method-assign]
            lambda *a: os.kill(os.getpid(), signal.SIGKILL) or place(*a)  # type: ignore[func-returns-value]
        )
        dying.create_order(server_id, ssh_password=PASSWORD)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (order,) = until(client.get_orders)
    assert order["ssh_password"] == PASSWORD
    client.wait_for_order(order, 20, 0.02)
    assert client_for(sim, state_dir=state).run(order["order_id"], "echo hi").stdout == "hi\n"
    client.cancel_order(order)
    assert saved(state) == []


def test_an_order_that_lingers_after_its_cancel_is_not_saved_again(
    make_sim: MakeSim, state: Path
) -> None:
    sim = make_sim(cancel_lingers=60.0, visible_after=0.5)
    client = client_for(sim, state_dir=state)
    sim.faults.add("create_order", "lose_response")
    with pytest.raises(OrderOutcomeUnknownError):
        client.create_order(plain_server(client), find_timeout=0.05)
    (path,) = saved(state)  # without an id, as the outcome is not known
    (order,) = until(client._orders.active)
    client.cancel_order(order)
    assert "ssh_password" not in client.get_orders()[0]
    assert saved(state) == [path]


def test_a_refused_order_leaves_nothing(sim: Simulator, state: Path) -> None:
    client = client_for(sim, state_dir=state)
    sim.faults.add("create_order", "envelope", envelope={"code": 6, "error": "server_offline"})
    with pytest.raises(Exception, match="server_offline"):
        client.create_order(plain_server(client))
    assert saved(state) == []


def test_an_order_that_ended_elsewhere(sim: Simulator, state: Path) -> None:
    client = client_for(sim, state_dir=state)
    first, second, third = (client.create_order(plain_server(client, n)) for n in range(3))
    for order in (first, second):
        sim.end_order(order["order_id"])
    time.sleep(0.2)
    other = client_for(sim, state_dir=state)
    other.get_orders(include_completed=True)
    assert [p.name.split("-")[1] for p in saved(state)] == [f"{third.id}.json"]
    assert "ssh_password" not in next(o for o in client.get_orders(True) if o.id == first.id)
    # Nobody has looked at the third one since it ended.
    sim.end_order(third.id or 0)
    time.sleep(0.2)
    for path in saved(state):
        os.utime(path, (1, 1))
    client_for(sim, state_dir=state).create_order(plain_server(client, 4))
    assert len(saved(state)) == 1


BROKEN = {
    "not JSON": b"{",
    "deep": b"[" * 50_000,
    "a list": b"[1]",
    "no text": b'{"schema": 1, "account": "%s", "ssh_password": 5}',
    "large": b" " * 2_000_000,
    "empty": b"",
}


@pytest.mark.parametrize("kind", [*BROKEN, "symlink", "pipe", "folder", "newer"])
def test_files_that_are_broken_or_of_another_version(
    sim: Simulator, state: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    order = client_for(sim, state_dir=state).create_order(plain_server(client_for(sim)))
    (path,) = saved(state)
    content = json.loads(path.read_text())
    path.unlink()
    if kind == "symlink":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "newer":
        path.write_text(json.dumps({**content, "schema": 2, "totp": [1], "jupyter_token": None}))
    else:
        path.write_bytes(BROKEN[kind].replace(b"%s", content["account"].encode()))
    client = client_for(sim, state_dir=state)
    until(client.get_orders)
    for _ in range(2):
        (found,) = client.get_orders()
        assert ("ssh_password" in found) is (kind == "newer")
    assert client.cancel_order(order)
    assert (content["ssh_password"] not in caplog.text) or kind == "newer"
    assert caplog.text.count("can't be read") <= 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs root")
def test_a_folder_of_somebody_else(sim: Simulator, state: Path) -> None:
    (state / "credentials").mkdir(parents=True)
    os.chown(state / "credentials", 12345, 12345)
    client = client_for(sim, state_dir=state)
    order = client.create_order(plain_server(client))
    assert saved(state) == []
    assert client.wait_for_order(order, 20, 0.02)["ssh_password"] == order["ssh_password"]


def test_a_folder_that_others_may_read(sim: Simulator, state: Path) -> None:
    (state / "credentials").mkdir(parents=True, mode=0o777)
    (state / "credentials").chmod(0o777)
    client = client_for(sim, state_dir=state)
    client.create_order(plain_server(client))
    assert stat.S_IMODE((state / "credentials").stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["a file", "under a file", "/proc/none", "/dev/full"])
def test_a_state_folder_that_is_none(sim: Simulator, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("mine")
    folder = {"a file": tmp_path / "file", "under a file": tmp_path / "file" / "x"}.get(kind, kind)
    client = client_for(sim, state_dir=folder)
    order = client.create_order(plain_server(client))
    assert client.wait_for_order(order, 20, 0.02)["ssh_password"] == order["ssh_password"]
    assert client.cancel_order(order)
    assert (tmp_path / "file").read_text() == "mine"


def test_another_key_sees_nothing(sim: Simulator, state: Path) -> None:
    client_for(sim, state_dir=state).create_order(plain_server(client_for(sim)))
    (path,) = saved(state)
    stranger = client_for(sim, state_dir=state, api_key=sim.add_key(100))
    assert stranger.get_orders() == []
    stranger.cancel_all(confirm=False)
    assert path.exists()


# --- orders that have ended ---


@pytest.mark.parametrize("how", ["cancelled here", "cancelled elsewhere", "ended by the host"])
def test_a_call_on_an_ended_order_says_so_at_once(
    hosts: Simulator, state: Path, how: str, tmp_path: Path
) -> None:
    client = client_for(hosts, state_dir=state)
    order = started(client)
    assert client.run(order, "echo hi").ok
    if how == "ended by the host":
        hosts.end_order(order["order_id"])
    else:
        (client if how == "cancelled here" else client_for(hosts)).cancel_order(order, confirm=True)
    time.sleep(0.2)
    (tmp_path / "x").write_text("x")
    calls: list[Any] = [
        lambda: client.run(order, "true"),
        lambda: client.upload(order, tmp_path / "x", "x"),
        lambda: client.connect_ssh(order),
        lambda: client.run(order["order_id"], "true"),
    ]
    hosts.clear_requests()
    for number, call in enumerate(calls):
        started_at = time.monotonic()
        with pytest.raises(OrderEndedError, match=f"Order {order.id} has ended") as caught:
            call()
        assert time.monotonic() - started_at < 5
        assert caught.value.order_id == order.id
        assert len(sent_to(hosts, "my_orders")) <= (number == 0 or 1)


def test_an_ended_order_whose_host_drops_everything(sim: Simulator, state: Path) -> None:
    client = client_for(sim, state_dir=state)
    order = started(client)
    sim.end_order(order["order_id"])
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(8):  # the queue of connections is full, and drops the next one
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(hole.getsockname())
        time.sleep(0.2)
        order["connection"]["ssh"] = f"ssh root@127.0.0.1 -p {hole.getsockname()[1]}"
        started_at = time.monotonic()
        with pytest.raises(OrderEndedError):
            client_for(sim, state_dir=state).run(order, "true")
        assert 4 < time.monotonic() - started_at < 15


@pytest.mark.parametrize("fault", ["lose_request", "http_500_before_commit", "rate_limit"])
def test_a_failed_login_asks_the_api_once(hosts: Simulator, state: Path, fault: str) -> None:
    client = client_for(hosts, state_dir=state, timeout=30, backoff=5, rate_limit_wait=60)
    order = started(client)
    hosts.clear_requests()
    hosts.faults.add("my_orders", fault, times=100)
    with pytest.raises(SSHError, match="refused the login"):
        client.connect_ssh(order, password="wrong", wait=60)
    assert len(sent_to(hosts, "my_orders")) == 1


def test_an_ended_order_is_told_to_a_new_client(hosts: Simulator, state: Path) -> None:
    order = started(client_for(hosts, state_dir=state))
    hosts.end_order(order["order_id"])
    time.sleep(0.2)
    for argument in (order, order["order_id"], str(order.id)):
        with pytest.raises(OrderEndedError):
            client_for(hosts, state_dir=state).run(argument, "true")  # type: ignore[arg-type]
    with pytest.raises(OrderNotFoundError, match="no order 5 "):
        client_for(hosts, state_dir=state).run(5, "true")


def test_a_machine_that_is_down_is_not_an_ended_order(hosts: Simulator, state: Path) -> None:
    client = client_for(hosts, state_dir=state)
    order = started(client)
    hosts.set_offline(order["renting_server"])
    with pytest.raises(SSHError, match="no SSH at"):
        client.run(order, "true", wait=0.5)


def test_orders_and_ids_are_taken_alike(any_sim: Simulator, any_client: CloreClient) -> None:
    order = any_client.create_order(plain_server(any_client), order_type="spot", spot_price=0.5)
    record = {"order_id": order.id}
    assert any_client.wait_for_order(record, 20, 0.02).id == order.id
    found = any_client.get_order(order)
    assert found is not None
    assert found.id == order.id
    assert any_client.set_spot_price(order, 0.6) is True
    assert any_client.cancel_orders([record])["failed_to_cancel"] == []
    assert any_client.cancel_order(str(order.id)) is True  # type: ignore[arg-type]
    server = any_client.find_servers()[0]
    for call in (any_client.get_order, any_client.cancel_order, any_client.wait_for_order):
        with pytest.raises(TypeError, match="no order_id"):
            call(server)
