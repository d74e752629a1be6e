"""Test the session that is opened in advance: it saves a round trip, within the host's limit."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import paramiko
import pytest

from clore_client import CloreClient, CommandTimeoutError, SSHError
from clore_client.ssh.transport import SpareSession
from tests import hostile
from tests.conftest import until
from tests.hostile import HostileServer
from tests.ssh.test_command import sleeping, unique
from tests.sshd import Dropbear, running_sshd

pytestmark = pytest.mark.internal


async def succeed(command: str, process: Any) -> None:
    """Answer as a shell does that runs a command without output."""
    found = re.search("clore-[0-9a-f]+ ", command)
    process.stderr.write(b"%s4711\n" % (found[0] if found else "").encode())
    process.exit(0)


@pytest.fixture
def client() -> CloreClient:
    return CloreClient(state_dir=None)


def spare_of(ssh: paramiko.SSHClient) -> Any:
    """Return the spare session of a connection."""
    transport: Any = ssh.get_transport()
    spare: SpareSession = transport.spare
    return spare._channel


def session_of(ssh: paramiko.SSHClient) -> Any:
    """Open a session as a user does, or return None if the host refuses it."""
    with contextlib.suppress(paramiko.SSHException):
        return ssh.get_transport().open_session()  # type: ignore[union-attr]
    return None


def run_twice(client: CloreClient, order: Any, ssh: paramiko.SSHClient) -> None:
    for word in ("a", "b"):
        assert client.run(order, f"echo {word}", ssh=ssh).stdout == f"{word}\n"


def test_the_second_command_opens_no_channel(client: CloreClient) -> None:
    """It works even if the host opens no further channel."""
    with HostileServer(succeed) as server:
        order = server.order()
        with client.connect_ssh(order, "x", wait=10) as ssh:
            assert spare_of(ssh) is None
            client.run(order, "true", ssh=ssh)
            until(lambda: spare_of(ssh))
            server.hang_at = "open"
            client.run(order, "true", ssh=ssh)
            with pytest.raises(CommandTimeoutError):
                client.run(order, "true", ssh=ssh, timeout=0.2)


def test_a_spare_that_the_host_closes_is_replaced(client: CloreClient) -> None:
    with HostileServer(succeed) as server:
        order = server.order()
        with client.connect_ssh(order, "x", wait=10) as ssh:
            client.run(order, "true", ssh=ssh)
            spare = until(lambda: spare_of(ssh))
            (connection,) = server._open
            hosts: Any = connection
            channels = list(hosts._channels.values())
            hosts._loop.call_soon_threadsafe(lambda: [channel.close() for channel in channels])
            until(lambda: spare.closed)
            client.run(order, "true", ssh=ssh)
            assert until(lambda: spare_of(ssh)) is not spare


def test_commands_in_a_row_on_a_host_with_one_session(client: CloreClient, tmp_path: Path) -> None:
    """The host ends a session only after its command, and refuses the next one until then."""
    with running_sshd(tmp_path / "sshd", "MaxSessions 1") as server:
        with client.connect_ssh(server.order(), key_path=server.key, wait=20) as ssh:
            for _ in range(30):
                run_twice(client, server.order(), ssh)


@pytest.mark.parametrize("most", [1, 2])
def test_a_host_with_few_sessions(client: CloreClient, tmp_path: Path, most: int) -> None:
    with running_sshd(tmp_path / "sshd", f"MaxSessions {most}") as server:
        order = server.order()
        with client.connect_ssh(order, key_path=server.key, wait=20) as ssh:
            run_twice(client, order, ssh)
            held = [until(lambda: session_of(ssh)) for _ in range(most)]  # the user's own
            for channel in held:
                channel.exec_command("echo mine")
                assert channel.makefile().read() == b"mine\n"
                channel.close()
            number = unique()
            with pytest.raises(CommandTimeoutError):
                client.run(order, f"sleep {number}", ssh=ssh, timeout=1)
            if most == 2:  # there is room for the script that ends it
                until(lambda: not sleeping(number))
                run_twice(client, order, ssh)


def test_transfers_use_all_sessions_of_a_host(client: CloreClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):
        (source / str(number)).write_bytes(bytes(300_000))
    with running_sshd(tmp_path / "sshd", "MaxSessions 2") as server:
        order = server.order()
        with client.connect_ssh(order, key_path=server.key, wait=20) as ssh:
            for target in ("a", "b"):
                until(lambda: client.run(order, "true", ssh=ssh) and spare_of(ssh))
                assert client.upload(order, f"{source}/", tmp_path / target, ssh=ssh).files == 40
                until(lambda: client.run(order, "true", ssh=ssh) and spare_of(ssh))
                back = tmp_path / f"back {target}"
                assert client.download(order, tmp_path / target, back, ssh=ssh).files == 40


def test_dropbear_gets_none(client: CloreClient, tmp_path: Path) -> None:
    with Dropbear(tmp_path / "dropbear") as server:
        order = server.order()
        with client.connect_ssh(order, key_path=server.key, wait=20) as ssh:
            run_twice(client, order, ssh)
            transport: Any = ssh.get_transport()
            assert transport.spare._opener is None
            assert spare_of(ssh) is None


def test_a_spare_that_gets_no_answer_lets_a_program_end(monkeypatch: pytest.MonkeyPatch) -> None:
    start = hostile._Process.exec_requested

    def start_and_hang(process: Any, command: str) -> bool:
        server.hang_at = "open"
        return start(process, command)

    monkeypatch.setattr(hostile._Process, "exec_requested", start_and_hang)
    with HostileServer(succeed) as server:
        script = (
            "from clore_client import CloreClient\n"
            f"client, order = CloreClient(state_dir=None), {server.order()!r}\n"
            "ssh = client.connect_ssh(order, 'x', wait=10)\n"
            "client.run(order, 'true', ssh=ssh)\n"
            "print(ssh.get_transport().spare._opener.is_alive())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout == "True\n"


def test_a_closed_connection_has_no_spare(client: CloreClient) -> None:
    with HostileServer(succeed) as server:
        order = server.order()
        ssh = client.connect_ssh(order, "x", wait=10)
        client.run(order, "true", ssh=ssh)
        spare = until(lambda: spare_of(ssh))
        ssh.close()
        until(lambda: spare.closed)
        with pytest.raises(SSHError, match="closed"):
            client.run(order, "true", ssh=ssh)


def test_a_close_while_another_thread_opens_a_channel(
    client: CloreClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paramiko lists the channel before it has a transport, which close() needs."""
    opening, listed, closed = threading.Event(), threading.Event(), threading.Event()
    with running_sshd(tmp_path / "sshd") as server:
        ssh = client.connect_ssh(server.order(), key_path=server.key)
        transport: Any = ssh.get_transport()
        channel_class: Any = paramiko.Channel
        put, stop = transport._channels.put, transport.stop_thread
        assign = channel_class._set_transport

        def put_late(*arguments: Any) -> None:
            opening.set()
            transport.join(60)  # paramiko's own thread
            put(*arguments)
            listed.set()

        def stop_first() -> None:
            stop()
            listed.wait(60)

        def assign_late(*arguments: Any) -> None:
            closed.wait(60)
            assign(*arguments)

        def open_one() -> None:
            with contextlib.suppress(EOFError, paramiko.SSHException):
                transport.open_session()

        monkeypatch.setattr(transport._channels, "put", put_late)
        monkeypatch.setattr(transport, "stop_thread", stop_first)
        monkeypatch.setattr(channel_class, "_set_transport", assign_late)
        opener = threading.Thread(target=open_one)
        opener.start()
        opening.wait(60)
        ssh.close()
        closed.set()
        opener.join(60)
        assert transport.sock.fileno() == -1
