"""Test parsing of addresses, and logins to the simulator and to sshd."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import paramiko
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clore_client import CloreClient, SSHError
from tests.conftest import MakeSim, client_for
from tests.sshd import Sshd
from tests.variant import Simulator

parse = CloreClient.parse_ssh_connection


@pytest.mark.parametrize(
    ("raw", "host", "port", "user"),
    [
        ("ssh root@n1.us.clorecloud.net -p 2060", "n1.us.clorecloud.net", 2060, "root"),
        ("ssh -p 2060 me@1.2.3.4", "1.2.3.4", 2060, "me"),
        ("ssh -p2060 -l me h", "h", 2060, "me"),
        ("root@h:99", "h", 99, "root"),
        ("h", "h", 22, "root"),
        ("ssh root@::1 -p 5", "::1", 5, "root"),
        ("ssh root@[::1]:5", "::1", 5, "root"),
        ("ssh root@h -p 99999", "h", 22, "root"),
        ("ssh root@h -p x", "h", 22, "root"),
        ("ssh root@h -p ", "h", 22, "root"),
        ("ssh root@-oProxyCommand=x", "", 22, "root"),
        ("ssh -oProxyCommand=x root@h", "", 22, "root"),
        ("ssh root@h -p 5 rm -rf /", "", 22, "root"),
        ("ssh $(x)@h -p 5", "h", 5, "root"),
        ("ssh root@h;x -p 5", "", 5, "root"),
        ("ssh", "", 22, "root"),
        ("", "", 22, "root"),
    ],
)
def test_parsing(raw: str, host: str, port: int, user: str) -> None:
    parsed = parse({"connection": {"ssh": raw}})
    assert parsed == {"host": host, "port": port, "user": user, "raw": raw}


def test_parsing_of_any_mapping() -> None:
    order = MappingProxyType({"connection": MappingProxyType({"ssh": "ssh root@h -p 5"})})
    assert parse(order)["host"] == "h"


anything = st.recursive(
    st.none() | st.text() | st.integers() | st.floats(),
    lambda v: st.lists(v) | st.dictionaries(st.sampled_from(["connection", "ssh", "x"]), v),
)


@given(anything | st.text().map(lambda s: {"connection": {"ssh": s}}))
def test_parsing_never_raises(order: Any) -> None:
    parsed = parse(order)
    assert set(parsed) == {"host", "port", "user", "raw"}
    assert not set(parsed["host"] + parsed["user"]) & set(" ;$()`'\"\\\n\t|&<>")
    assert not parsed["host"].startswith("-")
    assert 1 <= parsed["port"] <= 65535


@pytest.fixture
def ssh_sim(make_sim: MakeSim) -> Simulator:
    return make_sim(ssh=True)


def output_of(ssh: paramiko.SSHClient, command: str) -> str:
    return ssh.exec_command(command, timeout=30)[1].read().decode()


def rent(client: CloreClient, **options: Any) -> Any:
    server = client.find_servers("RTX 4090", min_reliability=96)[0]
    order = client.create_order(server["id"], **options)
    return client.wait_for_order(order["order_id"], timeout=20, poll_interval=0.02)


@pytest.mark.parametrize("form", ["live", "documented"])
def test_what_the_client_sent_is_remembered(make_sim: MakeSim, form: str) -> None:
    sim = make_sim(ssh=True, form=form)
    for options in ({}, {"ssh_password": "of my own"}):
        client = client_for(sim)
        order = rent(client, **options)
        assert order.pop("ssh_password") == sim.orders[-1].body["ssh_password"]
        with client.connect_ssh(order) as ssh:
            text = output_of(ssh, "nvidia-smi --query-gpu=name --format=csv,noheader")
            assert text.strip() == "NVIDIA GeForce RTX 4090"
        client.cancel_order(order["order_id"])


def test_a_password_that_is_given_or_stands_in_the_order(ssh_sim: Simulator) -> None:
    order = rent(client_for(ssh_sim), ssh_password="right")
    other = client_for(ssh_sim)
    with other.connect_ssh(order, password="right", key_path="/ignored") as ssh:
        assert output_of(ssh, "echo hi") == "hi\n"
    with other.connect_ssh(dict(order, ssh_password="right")) as ssh:
        assert output_of(ssh, "echo hi") == "hi\n"
    with pytest.raises(SSHError, match="refused the login"):
        other.connect_ssh(order, password="wrong", wait=60)


def test_a_key(ssh_sim: Simulator, tmp_path: Path) -> None:
    rsa: Any = paramiko.RSAKey
    ecdsa: Any = paramiko.ECDSAKey
    for key in (rsa.generate(2048), ecdsa.generate()):
        path = tmp_path / key.get_name()
        key.write_private_key_file(str(path))
        client = client_for(ssh_sim)
        order = rent(client, ssh_key=f"{key.get_name()} {key.get_base64()}")
        with client.connect_ssh(order, key_path=str(path)) as ssh:
            assert output_of(ssh, "echo hi") == "hi\n"
        with pytest.raises(SSHError, match="log in"):
            client.connect_ssh(order, wait=0)
        client.cancel_order(order["order_id"])


def test_an_sshd_that_comes_up_late(make_sim: MakeSim) -> None:
    sim = make_sim(ssh=True, sshd_after=0.5)
    client = client_for(sim)
    order = rent(client)
    with pytest.raises(SSHError, match="within 0s"):
        client.connect_ssh(order, wait=0)
    with client.connect_ssh(order, wait=30) as ssh:
        assert output_of(ssh, "echo hi") == "hi\n"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n", None])
def test_a_port_that_speaks_no_ssh(answer: bytes | None) -> None:
    """A server that closes at once, speaks another protocol, or is silent: each wait ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                held.append(peer)
                if answer is not None:
                    peer.sendall(answer)
                    peer.close()

        threading.Thread(target=serve, daemon=True).start()
        order = {"connection": {"ssh": f"ssh root@127.0.0.1 -p {server.getsockname()[1]}"}}
        started = time.monotonic()
        with pytest.raises(SSHError):
            CloreClient().connect_ssh(order, password="x", timeout=0.5, wait=0.5)
        assert time.monotonic() - started < 30
        for peer in held:
            peer.close()


@pytest.mark.parametrize(
    "raw", ["", "ssh root@-oProxyCommand=x", "ssh root@h;x", "ssh -i x root@h"]
)
def test_an_order_without_a_plain_address_is_refused(raw: str) -> None:
    with pytest.raises(SSHError, match="no address"):
        CloreClient().connect_ssh({"connection": {"ssh": raw}, "status": "creating"})


def test_bad_arguments_of_connect_ssh() -> None:
    order = {"connection": {"ssh": "ssh root@127.0.0.1 -p 1"}}
    client = CloreClient()
    for arguments in ({"timeout": 0}, {"wait": -1}, {"password": 5}, {"key_path": "/no/such"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
            client.connect_ssh(order, **arguments)


def test_without_paramiko_the_rest_works() -> None:
    script = (
        "import sys; sys.modules['paramiko'] = None\n"
        "from clore_client import CloreClient\n"
        "try: CloreClient().connect_ssh({'connection': {'ssh': 'ssh root@127.0.0.1 -p 1'}})\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "pip install paramiko scp" in done.stdout


def test_importing_the_package_imports_no_ssh() -> None:
    script = "import clore_client, sys; print({'paramiko', 'scp', 'aiohttp'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


# --- the system's own sshd ---


def test_logging_in_to_openssh(sshd: Sshd) -> None:
    client = CloreClient()
    with client.connect_ssh(sshd.order(), key_path=str(sshd.key), wait=20) as ssh:
        assert output_of(ssh, "echo over openssh") == "over openssh\n"
        transport = ssh.get_transport()
        assert transport is not None
        assert transport.is_active()
    with pytest.raises(SSHError, match="refused the login"):
        client.connect_ssh(sshd.order(), password="wrong", wait=20)


@pytest.mark.parametrize("verb", ["upload", "download"])
def test_the_deadline_of_a_transfer_limits_its_login(verb: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it never accepts or answers
        port = listener.getsockname()[1]
        order = {"connection": {"ssh": f"ssh root@127.0.0.1 -p {port}"}}
        copy = getattr(CloreClient(state_dir=None), verb)
        paths = (__file__, "copy") if verb == "upload" else ("copy", tmp_path)
        started = time.monotonic()
        with pytest.raises(SSHError, match="within 1s"):
            copy(order, *paths, deadline=1, timeout=30, wait=30, password="x")
        assert time.monotonic() - started < 10
