"""Getting in: logins, host keys, and what OpenSSH is told; against the system's own sshd."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

from clore_client import CloreClient, HostKeyChangedError, SSHError
from tests.conftest import MakeSim, client_for
from tests.hostile import (
    HostileServer,
    RawServer,
    endless_banner,
    endless_version,
    escaping_version,
)
from tests.sshd import Sshd, generate, running_sshd

FINGERPRINT = r"SHA256:[A-Za-z0-9+/]{43}"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Sshd]:
    """An sshd of the test's own, which may get new keys."""
    with running_sshd(tmp_path / "machine") as server:
        yield server


@pytest.fixture
def client(tmp_path: Path) -> CloreClient:
    return CloreClient("key", state_dir=tmp_path / "state folder 100%")


def started_anew(server: Sshd) -> None:
    server.stop()
    server.make_keys()
    server.start()


def fingerprint(server: Sshd) -> str:
    command = ["ssh-keygen", "-l", "-f", str(server.folder / "host_key.pub")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


def works(client: CloreClient, server: Sshd, order: Any = None, **options: Any) -> bool:
    login = {"key_path": server.key, "wait": 10, **options}
    return client.run(order or server.order(), "echo in", **login).stdout == "in\n"


# --- keys and passwords ---


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
@pytest.mark.parametrize("passphrase", ["", "pass phrase"])
def test_kinds_of_keys(
    client: CloreClient, machine: Sshd, tmp_path: Path, kind: str, passphrase: str
) -> None:
    key = tmp_path / "my key"
    generate(key, kind, passphrase)
    (machine.folder / "id_ed25519.pub").write_text((tmp_path / "my key.pub").read_text())
    assert works(client, machine, key_path=key, passphrase=passphrase or None)
    order = machine.order()
    if passphrase:
        with pytest.raises(ValueError, match="passphrase"):
            client.connect_ssh(order, key_path=key)
        with pytest.raises(ValueError, match="passphrase"):
            client.connect_ssh(order, key_path=key, passphrase="wrong")
    else:
        with pytest.raises(ValueError, match="passphrase"):
            client.connect_ssh(order, key_path=key, passphrase="superfluous")


def test_files_that_are_no_keys(client: CloreClient, tmp_path: Path) -> None:
    """Before anything is sent: port 1 refuses."""
    order = {"connection": {"ssh": "ssh root@127.0.0.1 -p 1"}}
    (tmp_path / "text").write_text("no key")
    for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="key_path"):
            client.connect_ssh(order, key_path=path)


@pytest.fixture
def user() -> Iterator[tuple[str, str]]:
    """A user of this system, with a password; needs root, which CI has."""
    if os.geteuid() != 0:
        pytest.fail("the test of a password login makes a user, and that needs root")
    name, password = f"clore{os.getpid()}", "correct horse"
    subprocess.run(["useradd", "-m", "-s", "/bin/sh", name], check=True)
    try:
        subprocess.run(["chpasswd"], input=f"{name}:{password}\n", text=True, check=True)
        yield name, password
    finally:
        subprocess.run(["userdel", "-r", name], check=False, stderr=subprocess.DEVNULL)


def test_a_password(client: CloreClient, tmp_path: Path, user: tuple[str, str]) -> None:
    name, password = user
    only = "PasswordAuthentication yes\nPubkeyAuthentication no"
    with running_sshd(tmp_path / "machine", only) as server:
        server.user = name
        ssh = client.connect_ssh(server.order(), password, "/ignored", wait=10)
        with ssh:
            assert ssh.exec_command("id -un")[1].read().decode().strip() == name
        assert works(client, server, {**server.order(), "ssh_password": password}, key_path=None)
        start = time.monotonic()
        with pytest.raises(SSHError, match=r"with the password; it accepts: password"):
            client.connect_ssh(server.order(), "wrong", wait=300)
        with pytest.raises(SSHError, match=rf"with the key .*id_ed25519.*{FINGERPRINT}"):
            client.connect_ssh(server.order(), key_path=server.key, wait=300)
        assert time.monotonic() - start < 60


def test_what_was_refused_and_what_is_accepted(client: CloreClient, machine: Sshd) -> None:
    with pytest.raises(SSHError, match="with the password; it accepts: publickey"):
        client.connect_ssh(machine.order(), "wrong", wait=300)


def test_wait_for_ssh(client: CloreClient, machine: Sshd) -> None:
    machine.stop()
    timer = threading.Timer(0.5, machine.start)
    timer.start()
    assert client.wait_for_ssh(machine.order(), key_path=machine.key, wait=30) is None  # type: ignore[func-returns-value]
    timer.join()
    assert works(client, machine)


def test_a_machine_that_is_not_up_yet(client: CloreClient, machine: Sshd) -> None:
    """Reset, closed without a word, another protocol, silence: borne until the time is out."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        answers = iter([b"", b"no ssh\r\n", None, b""] * 100)
        held = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    answer = next(answers)
                    if answer is None:
                        held.append(connection)
                    else:
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        order = {"connection": {"ssh": f"ssh me@127.0.0.1 -p {server.getsockname()[1]}"}}
        with pytest.raises(SSHError, match=r"no SSH at me@127.0.0.1:[0-9]+ within 3s"):
            client.connect_ssh(order, "x", wait=3, timeout=0.5)
        with pytest.raises(SSHError, match="within 0s"):
            client.connect_ssh(order, "x", wait=0, timeout=0.5)
        for connection in held:
            connection.close()


@pytest.mark.parametrize("talk", [endless_banner, endless_version, escaping_version])
def test_a_banner_without_end(client: CloreClient, talk: Any) -> None:
    with RawServer(talk) as server:
        with pytest.raises(SSHError, match="SSH") as caught:
            client.connect_ssh(server.order(), "x", wait=0, timeout=1)
    assert not set(str(caught.value)) & set("\x1b\x07\x9b")


def test_failed_logins_print_nothing() -> None:
    script = (
        "from clore_client import *\n"
        "try: CloreClient(state_dir=None).connect_ssh(\n"
        "    {'connection': {'ssh': 'ssh a@127.0.0.1 -p %d'}}, 'x', wait=0)\n"
        "except SSHError: pass\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                server.accept()[0].close()

        threading.Thread(target=serve, daemon=True).start()
        code = script % server.getsockname()[1]
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_keepalives_and_nothing_forwarded(client: CloreClient, machine: Sshd) -> None:
    with client.connect_ssh(machine.order(), key_path=machine.key) as ssh:
        transport = ssh.get_transport()
        assert transport is not None
        assert transport.packetizer._Packetizer__keepalive_interval == 15  # type: ignore[attr-defined]
        _, output, _ = ssh.exec_command("echo $SSH_AUTH_SOCK-$DISPLAY")
        assert output.read() == b"-\n"


# --- host keys ---


def test_a_key_is_pinned_for_each_order(client: CloreClient, machine: Sshd, tmp_path: Path) -> None:
    assert works(client, machine)
    before = fingerprint(machine)
    started_anew(machine)
    with pytest.raises(HostKeyChangedError) as caught:
        works(client, machine)
    assert caught.value.order_id == 7
    assert (caught.value.expected, caught.value.found) == (before, fingerprint(machine))
    assert before in str(caught.value)
    assert fingerprint(machine) in str(caught.value)
    assert works(client, machine, machine.order(8))  # another order on the same host and port
    with pytest.raises(HostKeyChangedError):
        works(client, machine)
    assert client.forget_host_key(machine.order()) is True
    assert client.forget_host_key(machine.order()) is False
    assert works(client, machine)
    (pins,) = (tmp_path / "state folder 100%").glob("known_hosts")
    assert pins.stat().st_mode & 0o777 == 0o600
    assert len(pins.read_text().splitlines()) == 2


def test_a_fingerprint_of_ones_own(client: CloreClient, machine: Sshd) -> None:
    assert works(client, machine)
    before = fingerprint(machine)
    started_anew(machine)
    with pytest.raises(HostKeyChangedError):
        works(client, machine, host_key=before)
    assert works(client, machine, host_key=fingerprint(machine))
    assert works(client, machine)  # it is pinned now
    started_anew(machine)
    assert works(client, machine, host_key="accept")
    with pytest.raises(HostKeyChangedError):
        works(client, machine)
    for bad in ("", "sha256:x", "SHA256:short", "MD5:aa:bb", "no"):
        with pytest.raises(ValueError, match="host_key"):
            works(client, machine, host_key=bad)
    with pytest.raises(TypeError, match="host_key"):
        works(client, machine, host_key=None)


def test_the_next_process_knows_the_pin(client: CloreClient, machine: Sshd, tmp_path: Path) -> None:
    assert works(client, machine)
    script = (
        "import sys; from clore_client import *\n"
        "client = CloreClient(sys.argv[2], state_dir=sys.argv[1])\n"
        "order = {'order_id': 7, 'connection': {'ssh': sys.argv[3]}}\n"
        "try: print(client.run(order, 'echo in', key_path=sys.argv[4], wait=5).stdout)\n"
        "except HostKeyChangedError as error: print(error.found)\n"
    )

    def next_process(key: str) -> str:
        line = machine.order()["connection"]["ssh"]
        arguments = [str(tmp_path / "state folder 100%"), key, line, str(machine.key)]
        # With -O, too: none of it may hang on an assert.
        command = [sys.executable, "-O", "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert next_process("key") == "in"
    started_anew(machine)
    assert next_process("key") == fingerprint(machine)
    assert next_process("another") == "in"


def test_without_a_state_folder_it_is_known_to_the_client(machine: Sshd) -> None:
    client = CloreClient("key", state_dir=None)
    assert works(client, machine)
    started_anew(machine)
    with pytest.raises(HostKeyChangedError):
        works(client, machine)
    assert works(CloreClient("key", state_dir=None), machine)


def test_nothing_is_sent_to_another_machine() -> None:
    client = CloreClient("key", state_dir=None)
    with HostileServer(password="secret") as server:
        client.connect_ssh(server.order(), "secret", wait=10).close()
        before = len(server.passwords)
        assert before
        server.restart()
        with pytest.raises(HostKeyChangedError):
            client.connect_ssh(server.order(), "secret", wait=10)
        assert len(server.passwords) == before


def test_a_refused_login_pins_nothing() -> None:
    client = CloreClient("key", state_dir=None)
    with HostileServer(password="secret") as server:
        with pytest.raises(SSHError, match="refused"):
            client.connect_ssh(server.order(), "wrong", wait=10)
        server.restart()
        client.connect_ssh(server.order(), "secret", wait=10).close()


@pytest.mark.parametrize("trouble", ["a file", "binary", "huge"])
def test_a_folder_in_a_bad_state(machine: Sshd, tmp_path: Path, trouble: str) -> None:
    state = tmp_path / "bad"
    if trouble == "a file":
        state.write_text("no folder")
    else:
        state.mkdir()
        lines = b"\xff\xfe\0 x y\n|1|?|? ssh-rsa ?\n" * (1 if trouble == "binary" else 100_000)
        (state / "known_hosts").write_bytes(lines)
    client = CloreClient("key", state_dir=state)
    assert works(client, machine)
    started_anew(machine)
    with pytest.raises(HostKeyChangedError):
        works(client, machine)


def test_many_pins_at_once(machine: Sshd, tmp_path: Path) -> None:
    clients = [CloreClient(f"key{n % 4}", state_dir=tmp_path / "many") for n in range(8)]
    threads = [
        threading.Thread(target=works, args=(client, machine, machine.order(number)))
        for number, client in enumerate(clients, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "many" / "known_hosts").read_text().splitlines()
    assert len(lines) == 8
    assert all(len(line.split()) == 3 for line in lines)


# --- what OpenSSH is told ---


def openssh(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["ssh", "-o", "BatchMode=yes", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_an_entry_for_openssh(client: CloreClient, machine: Sshd, tmp_path: Path) -> None:
    assert works(client, machine)
    config = tmp_path / "config"
    entry = client.ssh_config(machine.order(), key_path=machine.key)
    config.write_text(entry)
    assert entry.startswith("Host clore-7\n")
    assert openssh("-F", str(config), "clore-7", "echo in").stdout == "in\n"
    started_anew(machine)
    refused = openssh("-F", str(config), "clore-7", "echo in")
    assert refused.returncode == 255
    assert "verification failed" in refused.stderr.lower()


@pytest.mark.parametrize("hashed", ["no", "yes"])
def test_openssh_pins_in_the_same_place(
    client: CloreClient, machine: Sshd, tmp_path: Path, hashed: str
) -> None:
    (tmp_path / "state folder 100%").mkdir()
    config = tmp_path / "config"
    config.write_text(client.ssh_config(machine.order(), name="gpu", key_path=machine.key))
    done = openssh("-F", str(config), "-o", f"HashKnownHosts={hashed}", "gpu", "echo in")
    assert done.stdout == "in\n", done.stderr
    assert works(client, machine)
    started_anew(machine)
    fresh = CloreClient("key", state_dir=tmp_path / "state folder 100%")
    with pytest.raises(HostKeyChangedError):
        works(fresh, machine)


def test_an_entry_without_a_state_folder(machine: Sshd, tmp_path: Path) -> None:
    client = CloreClient("key", state_dir=None)
    config = tmp_path / "config"
    config.write_text(client.ssh_config(machine.order(), key_path=machine.key))
    assert openssh("-F", str(config), "clore-7", "echo in").stdout == "in\n"
    assert works(client, machine)
    config.write_text(client.ssh_config(machine.order(), key_path=machine.key))
    assert openssh("-F", str(config), "clore-7", "echo in").stdout == "in\n"
    started_anew(machine)
    assert openssh("-F", str(config), "clore-7", "echo in").returncode == 255


def test_the_line_for_a_terminal(client: CloreClient, machine: Sshd) -> None:
    order = machine.order()
    plain = f"ssh -p {machine.port} {machine.user}@127.0.0.1"
    assert client.ssh_command(order) == plain
    assert works(client, machine)
    words = shlex.split(client.ssh_command(order, key_path=machine.key))
    assert words[0] == "ssh"
    assert openssh(*words[1:], "echo in").stdout == "in\n"
    started_anew(machine)
    assert openssh(*words[1:], "echo in").returncode == 255


@pytest.mark.parametrize(
    "raw", ["ssh root@-oProxyCommand=x", "ssh -l '$(x)' h", "ssh $(x)@h", "ssh root@h;x", "", "x y"]
)
def test_addresses_that_are_refused(client: CloreClient, raw: str) -> None:
    order = {"order_id": 7, "connection": {"ssh": raw}}
    for call in (client.connect_ssh, client.ssh_command, client.ssh_config, client.wait_for_ssh,
                 client.scp):  # fmt: skip
        with pytest.raises(SSHError, match="no address"):
            call(order)
    with pytest.raises(SSHError, match="no address"):
        client.run(order, "true")


def test_names_that_are_refused(client: CloreClient, machine: Sshd) -> None:
    for name in ("a b", "-x", "", "a\nHost *"):
        with pytest.raises(ValueError, match="name"):
            client.ssh_config(machine.order(), name=name)


# --- the rest ---


@pytest.mark.internal
def test_nothing_leaks(client: CloreClient, machine: Sshd) -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    assert works(client, machine)
    before = count()
    for _ in range(50):
        assert works(client, machine)
    deadline = time.monotonic() + 10
    while any(now > then for now, then in zip(count(), before, strict=True)) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)  # what was closed last may take a moment
    threads, files = count()
    assert threads <= before[0]
    assert files <= before[1]


@pytest.mark.parametrize("missing", ["paramiko", "scp"])
def test_without_paramiko_or_scp(make_sim: MakeSim, tmp_path: Path, missing: str) -> None:
    sim = make_sim(ssh=True)
    order = client_for(sim).create_order(client_for(sim).find_servers("RTX 4090")[0]["id"])
    script = f"""
import sys
sys.modules[{missing!r}] = None
from clore_client import CloreClient
client = CloreClient({sim.api_key!r}, base_url={sim.url!r}, rate_limit=0.01, state_dir=None)
order = client.wait_for_order({order.id}, timeout=20, poll_interval=0.02)
login = dict(password={order["ssh_password"]!r}, wait=10)
calls = dict(
    connect_ssh=lambda: client.connect_ssh(order, **login),
    run=lambda: client.run(order, "true", **login),
    upload=lambda: client.upload(order, {str(tmp_path)!r}, "x", **login),
    download=lambda: client.download(order, "x", {str(tmp_path)!r}, **login),
    forward=lambda: client.forward(order, 80, **login),
    scp=lambda: client.scp(order, **login),
)
for name, call in calls.items():
    try:
        call()
        print(name, "works")
    except ImportError as error:
        print(name, "pip install 'clore-client[ssh]'" in str(error))
    except Exception as error:
        print(name, type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = dict(line.split() for line in done.stdout.splitlines())
    if missing == "paramiko":
        assert set(said.values()) == {"True"}, done.stderr
    else:
        assert said.pop("scp") == "True"
        assert "True" not in said.values()
    assert len(said) >= 5, done.stderr


def test_an_order_is_needed() -> None:
    client: Any = CloreClient(state_dir=None)
    for call in (client.connect_ssh, client.ssh_command, client.ssh_config, client.forget_host_key):
        with pytest.raises(TypeError, match="order"):
            call(1958009)
    assert paramiko is not None
