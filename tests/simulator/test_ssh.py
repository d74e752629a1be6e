"""The simulator's SSH hosts, over real connections."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
from scp import SCPClient

from clore_client.simulator import Simulator
from tests.conftest import until

from .test_api import QUICK, Renter, free

PASSWORD = "secret-password"
SSH: dict[str, Any] = QUICK | {"ssh": True}


@pytest.fixture(scope="module")
def sim() -> Iterator[Simulator]:
    with Simulator(**SSH) as simulator:
        yield simulator


def rent(sim: Simulator, **more: Any) -> Any:
    """Return a deployed order, as the simulator knows it."""
    server_id = more.pop("server_id", None) or free(sim)
    assert Renter(sim).create(server_id, **more) == {"code": 0}
    order_id = sim.orders[-1].id
    until(lambda: sim.order(order_id).status == "running")
    return sim.order(order_id)


def login(order: Any, **how: Any) -> paramiko.SSHClient:
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    options: dict[str, Any] = {
        "username": "root",
        "allow_agent": False,
        "look_for_keys": False,
        "timeout": 10,
    }
    try:
        client.connect("127.0.0.1", order.ssh_port, **(options | how))
    except BaseException:
        client.close()
        raise
    return client


@pytest.fixture(scope="module")
def order(sim: Simulator) -> Any:
    return rent(sim, env={"GREETING": "hello you", "PATH": "/usr/bin:/bin"})


@pytest.fixture
def ssh(order: Any) -> Iterator[paramiko.SSHClient]:
    with login(order, password=PASSWORD) as client:
        yield client


def run(ssh: paramiko.SSHClient, command: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """Exit status, output, errors."""
    to, out, err = ssh.exec_command(command, timeout=10)
    if stdin:
        to.write(stdin)
    to.channel.shutdown_write()
    output, errors = out.read().decode(), err.read().decode()
    return out.channel.recv_exit_status(), output, errors


# Logging in


def test_only_root_with_the_password(order: Any) -> None:
    for how in (
        {"password": "wrong"},
        {"password": ""},
        {"password": PASSWORD, "username": "admin"},
        {"pkey": paramiko.Ed25519Key.from_private_key(io.StringIO(new_key()[0]))},
    ):
        with pytest.raises(paramiko.SSHException):
            login(order, **how)
    login(order, password=PASSWORD).close()


def new_key() -> tuple[str, str]:
    """A private key and its public line."""
    import asyncssh

    key = asyncssh.generate_private_key("ssh-ed25519", comment="somebody@somewhere")
    return key.export_private_key().decode(), key.export_public_key().decode()


@pytest.mark.parametrize(
    ("password", "more", "accepted"),
    [(..., {}, False), (PASSWORD, {}, True), (PASSWORD, {"autossh_entrypoint": True}, False)],
)
def test_key_orders(sim: Simulator, password: Any, more: dict[str, Any], accepted: bool) -> None:
    private, public = new_key()
    order = rent(sim, ssh_password=password, ssh_key=public, **more)
    login(order, pkey=paramiko.Ed25519Key.from_private_key(io.StringIO(private))).close()
    with pytest.raises(paramiko.SSHException):
        login(order, pkey=paramiko.Ed25519Key.from_private_key(io.StringIO(new_key()[0])))
    if accepted:
        login(order, password=PASSWORD).close()
    else:
        with pytest.raises(paramiko.SSHException):
            login(order, password=PASSWORD)


def test_an_order_without_password_and_key_lets_nobody_in(sim: Simulator) -> None:
    order = rent(sim, ssh_password=...)
    for password in ("", "x"):
        with pytest.raises(paramiko.SSHException):
            login(order, password=password)


# Commands


def test_commands(ssh: paramiko.SSHClient) -> None:
    assert run(ssh, "echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")
    assert run(ssh, "tr a-z A-Z | rev", b"abc\n") == (0, "CBA\n", "")
    assert run(ssh, "nonsense-command")[0] == 127
    code, output, _ = run(ssh, "head -c 3000000 /dev/zero | tr '\\0' x")
    assert (code, len(output)) == (0, 3_000_000)
    assert run(ssh, "echo $((1+1)) | cat; (exit 3)") == (3, "2\n", "")
    _, out, _ = ssh.exec_command("kill -TERM $$")
    assert out.channel.recv_exit_status() == -1  # ended by a signal


def test_environment(
    ssh: paramiko.SSHClient, sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLORE_API_KEY", "leaked")
    monkeypatch.setenv("SECRET_THING", "leaked")
    order = rent(sim, env={"GREETING": "hello you"})
    with login(order, password=PASSWORD) as fresh:
        for client in (ssh, fresh):
            _, output, _ = run(client, "env")
            assert "leaked" not in output
            assert "GREETING=hello you" in output
        code, output, _ = run(fresh, 'test "$HOME" = "$(pwd)" && whoami >/dev/null && echo $USER')
    assert (code, output) == (0, "root\n")


def test_background_jobs_do_not_hold_the_session(ssh: paramiko.SSHClient) -> None:
    start = time.monotonic()
    assert run(ssh, "sleep 30 & echo started") == (0, "started\n", "")
    assert time.monotonic() - start < 10


def test_interactive_shell(ssh: paramiko.SSHClient) -> None:
    channel = ssh.invoke_shell(width=101, height=33)
    channel.settimeout(10)
    channel.send(b"stty size; tty >/dev/null && echo on-a-terminal; exit 4\n")
    received = b""
    while True:
        data = channel.recv(4096)
        if not data:
            break
        received += data
    assert b"simulated host" in received
    assert b"33 101" in received
    assert b"\non-a-terminal" in received
    assert channel.recv_exit_status() == 4


def test_a_terminal_for_one_command(ssh: paramiko.SSHClient) -> None:
    _, out, _ = ssh.exec_command("test -t 0 && test -t 1 && echo yes", get_pty=True, timeout=10)
    assert out.read().strip() == b"yes"
    assert out.channel.recv_exit_status() == 0


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def started(ssh: paramiko.SSHClient, command: str) -> tuple[Any, list[int]]:
    """A running command, and the process ids that it printed on one line."""
    _, out, _ = ssh.exec_command(command, timeout=10)
    return out.channel, [int(word) for word in out.readline().split()]


LONG = "sleep 300 & one=$!; sleep 301 & echo $$ $one $!; wait"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["channel", "connection", "abrupt"])
def test_a_client_that_goes_ends_the_whole_command(order: Any, end: str) -> None:
    with login(order, password=PASSWORD) as ssh:
        channel, pids = started(ssh, LONG)
        assert len(pids) == 3
        assert all(alive(pid) for pid in pids)
        transport = ssh.get_transport()
        assert transport is not None
        if end == "channel":
            channel.close()
        elif end == "connection":
            ssh.close()
        else:
            transport.sock.close()
        until(lambda: not any(alive(pid) for pid in pids))


# nvidia-smi


def test_nvidia_smi(ssh: paramiko.SSHClient, sim: Simulator, order: Any) -> None:
    models = sim.server(order.server_id).models
    code, output, errors = run(ssh, "nvidia-smi --query-gpu=name,memory.total --format=csv")
    lines = output.splitlines()
    assert (code, lines[0]) == (0, "name, memory.total [MiB]")
    assert lines[1:] == [f"{model.smi_name}, {model.mib} MiB" for model in models]
    assert "simulated" in errors
    bare = "nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits"
    assert run(ssh, bare)[1].splitlines() == [f"{m.smi_name}, {m.mib}" for m in models]
    spaced = "nvidia-smi --query-gpu name --format csv,noheader -i 0"
    assert run(ssh, spaced)[1] == f"{models[0].smi_name}\n"
    code, output, _ = run(ssh, "nvidia-smi")
    assert code == 0
    assert "SIMULATED" in output
    assert models[0].smi_name[:31] in output
    assert len(run(ssh, "nvidia-smi -L")[1].splitlines()) == len(models)
    assert run(ssh, "nvidia-smi --query-gpu=nonsense --format=csv")[0] == 2
    assert run(ssh, "nvidia-smi --query-gpu=name")[0] == 1
    assert run(ssh, "nvidia-smi --nonsense")[0] == 1
    every = "index,uuid,driver_version,utilization.gpu,temperature.gpu,power.draw,pci.bus_id"
    assert run(ssh, f"nvidia-smi --query-gpu={every} --format=csv")[0] == 0


def test_nvidia_smi_with_many_gpus(sim: Simulator) -> None:
    server = next(s for s in sim.servers if len(s.models) > 2)
    sim.set_rented(server.id, False)
    sim.set_offline(server.id, False)
    order = rent(sim, server_id=server.id, currency=server.allowed_coins[0])
    with login(order, password=PASSWORD) as ssh:
        query = "nvidia-smi --query-gpu=index,count --format=csv,noheader"
        count = len(server.models)
        assert run(ssh, query)[1].splitlines() == [f"{n}, {count}" for n in range(count)]
        chosen = f"NVIDIA_VISIBLE_DEVICES=0,2 {query}"
        assert [line[0] for line in run(ssh, chosen)[1].splitlines()] == ["0", "2"]


# Files


def test_sftp(ssh: paramiko.SSHClient, order: Any, tmp_path: Path) -> None:
    with ssh.open_sftp() as sftp:
        with sftp.open("note.txt", "w") as file:
            file.write("written over SFTP\n")
        assert run(ssh, "cat note.txt")[1] == "written over SFTP\n"
        home = run(ssh, "pwd")[1].strip()
        # However the same file may be called.
        for name in ("note.txt", "./note.txt", "/note.txt", "/root/note.txt", f"{home}/note.txt"):
            assert sftp.stat(name).st_size == 18, name
        assert sftp.normalize(".") == "/"
        assert "note.txt" in sftp.listdir()
        sftp.get("note.txt", str(tmp_path / "note"))
        with pytest.raises(FileNotFoundError):
            sftp.stat("../../../../etc/passwd")
        sftp.mkdir("folder")
        sftp.rename("note.txt", "folder/moved.txt")
        sftp.remove("folder/moved.txt")
        sftp.rmdir("folder")
    assert (tmp_path / "note").read_text() == "written over SFTP\n"


def test_scp(ssh: paramiko.SSHClient, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    data = os.urandom(300_000)
    (folder / "inner" / "data").write_bytes(data)
    transport = ssh.get_transport()
    assert transport is not None
    with SCPClient(transport) as scp:
        scp.put(str(folder), recursive=True, remote_path="sent")
        scp.putfo(io.BytesIO(b"text"), "~/text")
        scp.get("sent/inner/data", str(tmp_path / "back"))
        scp.get("/root/text", str(tmp_path / "text"))
    assert (tmp_path / "back").read_bytes() == data
    assert (tmp_path / "text").read_bytes() == b"text"
    assert run(ssh, "wc -c < sent/inner/data")[1].strip() == "300000"


def test_openssh_client(order: Any, sim: Simulator, tmp_path: Path) -> None:
    private, public = new_key()
    keyed = rent(sim, ssh_password=..., ssh_key=public)
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text(private)
    command = [
        "ssh",
        "-F",
        "none",
        "-i",
        str(file),
        "-p",
        str(keyed.ssh_port),
        "-o",
        "BatchMode=yes",
    ]
    command += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/known"]
    try:
        ended = subprocess.run(
            [*command, "root@127.0.0.1", "cat; exit 5"],
            input=b"in",
            capture_output=True,
            timeout=20,
        )
    except FileNotFoundError:
        pytest.skip("no ssh here")
    assert (ended.returncode, ended.stdout) == (5, b"in"), ended.stderr


# Forwarding


def test_forwards_to_itself_only(ssh: paramiko.SSHClient) -> None:
    transport = ssh.get_transport()
    assert transport is not None
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        for name in ("localhost", "127.0.0.1"):
            with transport.open_channel("direct-tcpip", (name, port), ("127.0.0.1", 1)) as channel:
                peer, _ = server.accept()
                with peer:
                    channel.sendall(b"to it")
                    channel.shutdown_write()
                    assert peer.makefile("rb").read() == b"to it"
                    peer.sendall(b"and back")
                assert channel.makefile("rb").read() == b"and back"
        # Another name for this machine, and one that isn't: neither is connected to.
        for name in ("127.0.0.2", "192.0.2.1", "example.org"):
            with pytest.raises(paramiko.ChannelException):
                transport.open_channel("direct-tcpip", (name, port), ("127.0.0.1", 1))
    with pytest.raises(paramiko.ChannelException):
        transport.open_channel("direct-tcpip", ("localhost", port), ("127.0.0.1", 1))
    assert run(ssh, "echo still there")[1] == "still there\n"


# The life of a host


def test_a_host_ends_with_its_order(sim: Simulator) -> None:
    order = rent(sim)
    with login(order, password=PASSWORD) as ssh:
        home = Path(run(ssh, "pwd")[1].strip())
        (home / "file").write_text("x")
        _, pids = started(ssh, LONG)
        run(ssh, "nohup setsid sleep 302 >/dev/null 2>&1 & echo $! > stray")
        pids.append(int((home / "stray").read_text()))
        transport = ssh.get_transport()
        assert transport is not None
        Renter(sim).post("cancel_order", {"id": order.id})
        until(lambda: not transport.is_active())
        until(lambda: not home.exists())
        if Path("/proc/self/stat").exists():
            until(lambda: not any(alive(pid) for pid in pids))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", order.ssh_port), 2)


def test_everything_ends_with_the_simulator() -> None:
    with Simulator(**SSH) as sim:
        order = rent(sim)
        ssh = login(order, password=PASSWORD)
        home = Path(run(ssh, "pwd")[1].strip())
        _, pids = started(ssh, LONG)
    assert not home.exists()
    assert not home.parent.parent.exists()
    if Path("/proc/self/stat").exists():
        until(lambda: not any(alive(pid) for pid in pids))
    ssh.close()


def test_offline_cuts_off_the_host(sim: Simulator) -> None:
    order = rent(sim)
    with login(order, password=PASSWORD) as ssh:
        transport = ssh.get_transport()
        assert transport is not None
        sim.set_offline(order.server_id)
        until(lambda: not transport.is_active())
    with pytest.raises(OSError, match=r"refused|connect"):
        login(order, password=PASSWORD)
    sim.set_offline(order.server_id, False)
    login(order, password=PASSWORD).close()


def test_many_hosts_at_once(sim: Simulator) -> None:
    renter = Renter(sim, sim.add_key())
    for _ in range(6):
        assert renter.create(free(sim)) == {"code": 0}
    orders = sim.orders[-6:]
    until(lambda: all(sim.order(order.id).deployed for order in orders))
    orders = [sim.order(order.id) for order in orders]
    assert len({order.ssh_port for order in orders}) == 6

    def name_of(order: Any) -> tuple[str, str]:
        with login(order, password=PASSWORD) as ssh:
            transport = ssh.get_transport()
            assert transport is not None
            key = transport.get_remote_server_key().get_base64()
            return run(ssh, "sleep 0.3; pwd")[1], key

    with ThreadPoolExecutor(6) as pool:
        seen = list(pool.map(name_of, orders))
    assert len({home for home, _ in seen}) == 6
    assert len({key for _, key in seen}) == 6


def test_sshd_comes_later_and_ports_come_again() -> None:
    with Simulator(**SSH, sshd_after=0.3, reuse_ports=True) as sim:
        order = rent(sim)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", order.ssh_port), 2)

        def key_of(order: Any) -> str | None:
            try:
                with login(order, password=PASSWORD) as ssh:
                    transport = ssh.get_transport()
                    assert transport is not None
                    return transport.get_remote_server_key().get_base64()
            except OSError:
                return None

        first = until(lambda: key_of(order))
        sim.end_order(order.id)
        again = rent(sim)
        assert again.ssh_port == order.ssh_port
        assert until(lambda: key_of(again)) != first


def test_without_ssh_the_port_refuses() -> None:
    with Simulator(**QUICK) as sim:
        order = rent(sim)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", order.ssh_port), 2)
