"""Test logins, host keys, and the lines for OpenSSH, with the system's own sshd."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pkgutil
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import paramiko
import pytest
from asyncssh.packet import UInt32

from clore_client import CloreClient, HostKeyChangedError, SSHError
from tests.conftest import MakeSim, client_for, until
from tests.hostile import (
    HostileServer,
    RawServer,
    endless_banner,
    endless_version,
    escaping_version,
    silence,
)
from tests.relay import Relay
from tests.sshd import Sshd, generate, running_sshd
from tests.variant import inside

server_side: Any = paramiko  # its types describe only the client
HOST_KEY: Any = server_side.ECDSAKey.generate()
FINGERPRINT = r"SHA256:[A-Za-z0-9+/]{43}"


@pytest.fixture(autouse=True)
def _no_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no request for the state of an order leave this machine."""
    monkeypatch.setenv("CLORE_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Sshd]:
    """Run an sshd for one test, which may get new keys."""
    with running_sshd(tmp_path / "host") as server:
        yield server


@pytest.fixture
def client(tmp_path: Path) -> CloreClient:
    return CloreClient("key", state_dir=tmp_path / "state folder 100%", rate_limit=0, backoff=0.01)


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
    client: CloreClient, host: Sshd, tmp_path: Path, kind: str, passphrase: str
) -> None:
    key = tmp_path / "my key"
    generate(key, kind, passphrase)
    (host.folder / "id_ed25519.pub").write_text((tmp_path / "my key.pub").read_text())
    assert works(client, host, key_path=key, passphrase=passphrase or None)
    order = host.order()
    if passphrase:
        with pytest.raises(ValueError, match="passphrase"):
            client.connect_ssh(order, key_path=key)
        with pytest.raises(ValueError, match="passphrase"):
            client.connect_ssh(order, key_path=key, passphrase="wrong")
    else:
        with pytest.raises(ValueError, match="passphrase"):
            client.connect_ssh(order, key_path=key, passphrase="superfluous")


@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
@pytest.mark.parametrize("passphrase", ["", "pass phrase"])
def test_keys_in_the_older_format(
    client: CloreClient, host: Sshd, kind: str, passphrase: str
) -> None:
    key = host.folder / "older"
    generate(key, kind, passphrase)
    command = ["ssh-keygen", "-q", "-p", "-m", "PEM", "-P", passphrase, "-N", passphrase]
    subprocess.run([*command, "-f", str(key)], check=True, stdout=subprocess.DEVNULL)
    assert "OPENSSH" not in key.read_text()
    (host.folder / "id_ed25519.pub").write_text((host.folder / "older.pub").read_text())
    assert works(client, host, key_path=str(key), passphrase=passphrase or None)


def test_what_is_wrong_with_a_passphrase(client: CloreClient, tmp_path: Path) -> None:
    """Before anything is sent: port 1 refuses."""
    order = {"connection": {"ssh": "ssh root@127.0.0.1 -p 1"}}
    plain, encrypted = tmp_path / "plain", tmp_path / "encrypted"
    generate(plain)
    generate(encrypted, passphrase="right")
    for key, given, said in (
        (encrypted, None, "is encrypted: give passphrase="),
        (encrypted, "guessed", "passphrase is not the right one for .*encrypted"),
        (plain, "superfluous", "passphrase: .*plain' is not encrypted"),
        (None, "of no key", "passphrase is for the key of key_path"),
        (encrypted, "", "passphrase must not be empty"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            client.connect_ssh(order, key_path=key, passphrase=given)
        assert not given or given not in str(caught.value)


def test_files_that_are_no_keys(client: CloreClient, tmp_path: Path) -> None:
    """Before anything is sent: port 1 refuses."""
    order = {"connection": {"ssh": "ssh root@127.0.0.1 -p 1"}}
    (tmp_path / "text").write_text("no key")
    for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="key_path"):
            client.connect_ssh(order, key_path=path)


@pytest.fixture
def user() -> Iterator[tuple[str, str]]:
    """Make a user of this system, with a password; needs root."""
    if os.geteuid() != 0:
        pytest.fail("the test of a password login makes a user, and that needs root")
    name, password = f"clore{os.getpid()}", "correct horse"
    subprocess.run(["useradd", "-m", "-s", "/bin/sh", name], check=True)
    try:
        subprocess.run(["chpasswd"], input=f"{name}:{password}\n", text=True, check=True)
        yield name, password
    finally:
        # This fails until the session of the last login has ended.
        deadline = time.monotonic() + 30
        command = ["userdel", "-r", name]
        while subprocess.run(command, stderr=subprocess.DEVNULL).returncode not in (0, 6, 12):
            assert time.monotonic() < deadline, f"the user {name} of this test can't be removed"
            time.sleep(0.1)


def test_a_password(client: CloreClient, tmp_path: Path, user: tuple[str, str]) -> None:
    name, password = user
    only = "PasswordAuthentication yes\nPubkeyAuthentication no"
    with running_sshd(tmp_path / "host", only) as server:
        server.user = name
        ssh = client.connect_ssh(server.order(), password, "/ignored", wait=10)
        with ssh:
            assert ssh.exec_command("id -un")[1].read().decode().strip() == name
        assert works(client, server, {**server.order(), "ssh_password": password}, key_path=None)
        start = time.monotonic()
        with pytest.raises(SSHError, match=r"refused the login with the password"):
            client.connect_ssh(server.order(), "wrong", wait=300)
        with pytest.raises(SSHError, match=rf"with the key .*id_ed25519.*{FINGERPRINT}"):
            client.connect_ssh(server.order(), key_path=server.key, wait=300)
        assert time.monotonic() - start < 60


def test_default_keys_and_the_agent(
    client: CloreClient, host: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with pytest.raises(
        SSHError, match=r"no password or key to log in to .* was found: pass password= or key_path="
    ):
        client.connect_ssh(host.order(), wait=300)
    default = tmp_path / "home" / ".ssh" / "id_ed25519"
    default.parent.mkdir()
    generate(default)
    with pytest.raises(SSHError, match=r"refused the login with the keys of the SSH agent"):
        client.connect_ssh(host.order(), wait=300)
    # The key in ~/.ssh is still refused.
    place = str(tmp_path / "agent")
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", place], stdout=subprocess.DEVNULL)
    try:
        while not os.path.exists(place):
            time.sleep(0.01)
        monkeypatch.setenv("SSH_AUTH_SOCK", place)
        subprocess.run(["ssh-add", "-q", host.key], check=True)
        assert works(client, host, key_path=None)
    finally:
        agent.terminate()
        agent.wait(10)
    monkeypatch.delenv("SSH_AUTH_SOCK")
    host.key.rename(default)
    assert works(client, host, key_path=None)


def test_what_was_refused_and_what_is_accepted(client: CloreClient, host: Sshd) -> None:
    with pytest.raises(SSHError, match="with the password; it accepts: publickey"):
        client.connect_ssh(host.order(), "wrong", wait=300)


ASK_MORE = "PasswordAuthentication yes\nKbdInteractiveAuthentication yes\nAuthenticationMethods "


def test_half_a_login_is_none(tmp_path: Path) -> None:
    client = CloreClient("key", state_dir=tmp_path / "state")
    with running_sshd(tmp_path / "m", f"{ASK_MORE} publickey,keyboard-interactive") as server:
        with pytest.raises(SSHError, match=r"accepted the key .*, but also requires: keyb"):
            client.connect_ssh(server.order(), key_path=server.key, wait=300)
    assert not (tmp_path / "state" / "known_hosts").exists()


def test_half_a_login_with_a_password(tmp_path: Path, user: tuple[str, str]) -> None:
    """After a partial login, paramiko returns as after a complete one."""
    client = CloreClient("key", state_dir=tmp_path / "state")
    with running_sshd(tmp_path / "m", f"{ASK_MORE} password,publickey") as server:
        server.user = user[0]
        with pytest.raises(SSHError, match="accepted the password, but also requires: another"):
            client.connect_ssh(server.order(), user[1], wait=300)
    assert not (tmp_path / "state" / "known_hosts").exists()


def test_a_host_that_hangs_up_on_a_refused_login(client: CloreClient, tmp_path: Path) -> None:
    with running_sshd(tmp_path / "m", "PasswordAuthentication yes\nMaxAuthTries 1") as server:
        with pytest.raises(SSHError, match="closed the connection during the login with the pass"):
            client.connect_ssh(server.order(), "wrong", wait=300)


class Asking(paramiko.ServerInterface):
    """A server that accepts a key or a password, and then asks questions."""

    def __init__(self, prompts: int = 1, correct: str = "secret") -> None:
        self.prompts = prompts
        self.correct = correct
        self.answers: list[str] = []
        self.transport: Any = None

    def get_allowed_auths(self, username: str) -> str:
        return "keyboard-interactive"

    def check_auth_publickey(self, username: str, key: Any) -> Any:
        return server_side.AUTH_PARTIALLY_SUCCESSFUL

    def check_auth_interactive(self, username: str, submethods: str) -> Any:
        if self.prompts > 1:
            many = paramiko.Message()
            many.add_byte(b"\x3c")  # SSH_MSG_USERAUTH_INFO_REQUEST
            for _ in range(3):
                many.add_string("")
            many.add_int(self.prompts)
            self.transport._send_message(many)
        return server_side.InteractiveQuery("\x1b[2Jowned", "\x1b[2Jtype", ("Password:", False))

    def check_auth_interactive_response(self, responses: Any) -> Any:
        self.answers += responses
        return (
            server_side.AUTH_SUCCESSFUL if responses == [self.correct] else server_side.AUTH_FAILED
        )

    def check_channel_request(self, kind: str, chanid: int) -> Any:
        return server_side.OPEN_SUCCEEDED

    def made(self, peer: socket.socket) -> paramiko.Transport:
        return paramiko.Transport(peer)

    def talk(self, peer: socket.socket) -> None:
        self.transport = self.made(peer)
        self.transport.add_server_key(HOST_KEY)
        self.transport.start_server(threading.Event(), self)
        self.transport.join(20)


class Odd(Asking):
    """A server that sends invalid messages, in place of the reply to a login or later."""

    def __init__(self, kind: int, in_login: bool) -> None:
        super().__init__(correct="secret" if not in_login else "another")
        self.in_login = in_login
        self.message = paramiko.Message()
        self.message.add_byte(bytes([kind]))
        self.message.add_string(b"\xff\xfe\xfd")
        self.message.add_boolean(False)

    def check_auth_password(self, username: str, password: str) -> Any:
        if not self.in_login:
            return server_side.AUTH_SUCCESSFUL
        self.transport._send_message(self.message)
        return server_side.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> Any:
        self.transport._send_message(self.message)
        return server_side.OPEN_SUCCEEDED


@pytest.mark.parametrize("kind", [1, 6, 7, 20, 31, 51, 53, 60, 80, 91, 94, 98, 192])
def test_a_host_that_talks_nonsense(kind: int, tmp_path: Path) -> None:
    """Every exception within paramiko becomes an SSHError."""
    client = CloreClient("key", state_dir=None)
    login: dict[str, Any] = {"password": "secret", "wait": 0, "timeout": 1, "host_key": "accept"}
    with RawServer(Odd(kind, True).talk) as server:
        with pytest.raises(SSHError, match=r"127\.0\.0\.1") as caught:
            client.connect_ssh(server.order(), **login)
    assert str(caught.value).isprintable()
    for use in (
        lambda order: client.run(order, "true", **login),
        lambda order: client.download(order, "x", tmp_path, **login),
    ):
        with RawServer(Odd(kind, False).talk) as server, pytest.raises(SSHError) as caught:
            use(server.order())
        assert str(caught.value).isprintable()


class AtRequest(Asking):
    """A server that does not accept the request for the login service."""

    def __init__(self, instead: Callable[[paramiko.Transport, Any], object], answer: Any) -> None:
        super().__init__()
        self.instead = instead
        self.answer = answer

    def get_allowed_auths(self, username: str) -> str:
        return "hostbased"

    def check_auth_publickey(self, username: str, key: Any) -> Any:
        return self.answer

    def check_auth_password(self, username: str, password: str) -> Any:
        return self.answer

    def made(self, peer: socket.socket) -> paramiko.Transport:
        held = []
        instead = self.instead

        class Transport(paramiko.Transport):
            def _send_message(self, data: Any) -> None:
                if data.asbytes()[:1] == b"\x06":  # SSH_MSG_SERVICE_ACCEPT
                    if instead(self, data) is None:
                        held.append(data)
                    return
                while held:
                    super()._send_message(held.pop())  # type: ignore[misc]
                super()._send_message(data)  # type: ignore[misc]

        return Transport(peer)


def refuse(transport: Any, _: Any) -> bool:
    message = paramiko.Message()
    message.add_byte(b"\x33")  # SSH_MSG_USERAUTH_FAILURE
    message.add_string("hostbased")
    message.add_boolean(False)
    transport._send_message(message)
    return True


def leave(transport: Any, _: Any) -> bool:
    transport.sock.shutdown(socket.SHUT_RDWR)
    return True


@pytest.mark.parametrize(
    ("instead", "said"),
    [(refuse, "refused the login with .*; it accepts: hostbased"), (leave, "closed the connect")],
)
def test_a_refusal_before_the_login_has_arrived(host: Sshd, instead: Any, said: str) -> None:
    """The refusal arrives while the login is sent: it is a refusal, and not retried."""
    client = CloreClient("key", state_dir=None, rate_limit=0, backoff=0.01)
    with RawServer(AtRequest(instead, server_side.AUTH_FAILED).talk) as server:
        for login in ({"key_path": host.key}, {"password": "secret"}) * 20:
            with pytest.raises(SSHError, match=said):
                client.connect_ssh(server.order(), host_key="accept", wait=300, **login)


def test_more_keys_than_the_host_bears(client: CloreClient, tmp_path: Path) -> None:
    """paramiko tries the next key after the host has closed the connection."""
    folder = Path.home() / ".ssh"
    folder.mkdir()
    for kind in ("ed25519", "ecdsa"):
        generate(folder / f"id_{kind}", kind)
    with running_sshd(tmp_path / "m", "MaxAuthTries 1") as server:
        with pytest.raises(SSHError, match=r"closed the connection during the login with the keys"):
            client.connect_ssh(server.order(), wait=300)


def test_an_agent_that_does_not_answer(
    client: CloreClient, host: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent may wait until somebody touches a token."""
    blob = paramiko.PKey.from_path(host.key).asbytes()
    listed = b"\x0c" + struct.pack(">II", 1, len(blob)) + blob + struct.pack(">I", 0)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))

    def serve(listener: socket.socket) -> None:
        with listener, listener.accept()[0] as peer:
            peer.recv(5)
            peer.sendall(struct.pack(">I", len(listed)) + listed)
            peer.recv(4096)  # what is to be signed
            time.sleep(4)

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "agent"))
    listener.listen()
    thread = threading.Thread(target=serve, args=(listener,))
    thread.start()
    with pytest.raises(SSHError, match=r"did not answer the login within 0\.5s"):
        client.connect_ssh(host.order(), wait=0, timeout=0.5)
    thread.join()


def test_a_host_that_only_asks_questions() -> None:
    client = CloreClient("key", state_dir=None)
    asking = Asking()
    with RawServer(asking.talk) as server:
        with client.connect_ssh(server.order(), "secret", wait=10, host_key="accept") as ssh:
            transport = ssh.get_transport()
            assert transport is not None
            assert transport.is_authenticated()
        with pytest.raises(SSHError, match="with the password; it accepts: keyboard-interactive"):
            client.connect_ssh(server.order(), "wrong", wait=300, host_key="accept")
    assert asking.answers == ["secret", "wrong"]


def test_nobody_at_the_terminal_is_asked(host: Sshd, capfd: pytest.CaptureFixture[str]) -> None:
    client = CloreClient("key", state_dir=None)
    asking = Asking()
    with RawServer(asking.talk) as server:
        with pytest.raises(SSHError, match=r"accepted the key .*, but also requires: keyboard"):
            client.connect_ssh(server.order(), key_path=host.key, wait=300)
    assert capfd.readouterr().out == ""
    assert not asking.answers


def test_more_questions_than_are_sent() -> None:
    """paramiko would make a list as long as the host announces."""
    client = CloreClient("key", state_dir=None)
    with RawServer(Asking(prompts=2**21).talk) as server:
        tracemalloc.start()
        try:
            with pytest.raises(SSHError):
                client.connect_ssh(server.order(), "secret", wait=0, timeout=20)
            assert tracemalloc.get_traced_memory()[1] < 50_000_000
        finally:
            tracemalloc.stop()


def test_wait_for_ssh(client: CloreClient, host: Sshd) -> None:
    host.stop()
    timer = threading.Timer(0.5, host.start)
    timer.start()
    assert client.wait_for_ssh(host.order(), key_path=host.key, wait=30) is None  # type: ignore[func-returns-value]
    timer.join()
    assert works(client, host)


def test_a_host_that_is_not_up_yet(client: CloreClient, host: Sshd) -> None:
    """After a reset, a close, another protocol or silence, it retries until the time is over."""
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


def test_a_host_that_comes_up_with_troubles(client: CloreClient, host: Sshd) -> None:
    """It works after a reset and a late banner."""
    with Relay(host.port, delay=0.05) as relay:
        order = host.order()
        order["connection"]["ssh"] = f"ssh {host.user}@127.0.0.1 -p {relay.port}"
        relay.most = 0
        timer = threading.Timer(0.5, lambda: setattr(relay, "most", 9))
        timer.start()
        assert works(client, host, order, wait=60)
        timer.join()


def packet_of_two_gigabytes(peer: socket.socket) -> None:
    peer.sendall(b"SSH-2.0-x\r\n" + struct.pack(">I", 0x7FFFFFFC) + b"\4\x14" + bytes(10))
    silence(peer)


def fast_version(peer: socket.socket) -> None:
    peer.sendall(b"SSH-2.0-")
    while True:
        peer.sendall(b"A" * 65536)


@pytest.mark.parametrize(
    ("talk", "said"),
    [(fast_version, "it has no end"), (packet_of_two_gigabytes, "a packet of 21474836")],
)
def test_it_takes_no_more_than_there_can_be(client: CloreClient, talk: Any, said: str) -> None:
    """It ends by size, long before the time is over."""
    with RawServer(talk) as server:
        with pytest.raises(SSHError, match=said):
            client.connect_ssh(server.order(), "x", wait=0, timeout=300)


def test_a_list_longer_than_its_message() -> None:
    class Lists(asyncssh.SSHServer):
        def connection_made(self, conn: Any) -> None:
            self.connection = conn

        def begin_auth(self, username: str) -> bool:
            self.connection.send_packet(7, UInt32(2**31))  # SSH_MSG_EXT_INFO
            return True

    class Counting(HostileServer):
        async def _listen(self) -> None:
            await super()._listen()
            self._acceptor.update(server_factory=Lists)

    client = CloreClient("key", state_dir=None)
    with Counting() as server:
        with pytest.raises(SSHError, match="a list longer than its message"):
            client.connect_ssh(server.order(), "x", wait=0, timeout=60)


@pytest.mark.parametrize("talk", [endless_banner, endless_version, escaping_version])
def test_a_banner_without_end(client: CloreClient, talk: Any) -> None:
    with RawServer(talk) as server:
        with pytest.raises(SSHError, match="SSH") as caught:
            client.connect_ssh(server.order(), "x", wait=0, timeout=1)
    assert not set(str(caught.value)) & set("\x1b\x07\x9b")


def hang_up(peer: socket.socket) -> None:
    peer.close()


def garbage(peer: socket.socket) -> None:
    peer.sendall(b"SSH-2.0-x\r\n" + bytes(range(256)) * 20)
    silence(peer)


def no_handshake(peer: socket.socket) -> None:
    peer.sendall(b"SSH-2.0-x\r\n")
    peer.recv(100)
    peer.close()


TROUBLES = (hang_up, garbage, no_handshake, silence, endless_banner, escaping_version)


def test_failed_logins_print_nothing() -> None:
    script = (
        "import sys; from clore_client import *\n"
        "for port in sys.argv[1:]:\n"
        "    try: CloreClient(state_dir=None).connect_ssh(\n"
        "        {'connection': {'ssh': f'ssh a@127.0.0.1 -p {port}'}}, 'x', wait=0, timeout=0.3)\n"
        "    except SSHError: pass\n"
    )
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(RawServer(talk)).port for talk in TROUBLES]
        ports.append(stack.enter_context(HostileServer(password="another")).port)
        command = [sys.executable, "-c", script, *map(str, ports)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_users_configuration_of_openssh(
    client: CloreClient, host: Sshd, tmp_path: Path
) -> None:
    """A login uses the jump host and the key of the configuration, only if asked to."""
    folder = Path.home() / ".ssh"
    folder.mkdir()
    with running_sshd(tmp_path / "jump") as jump:
        (folder / "config").write_text(
            f"Host 127.0.0.*\n  ProxyJump gate\n  IdentityFile {host.key}\n"
            f"Host gate\n  HostName 127.0.0.1\n  Port {jump.port}\n  User {jump.user}\n"
            f"  IdentityFile {jump.key}\n"
        )
        config: dict[str, Any] = {"key_path": None, "use_ssh_config": True, "wait": 0}
        with pytest.raises(SSHError, match=r"jump host .*not found in known_hosts"):
            works(client, host, **config)
        key = (jump.folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{jump.port} {key}")
        threads = threading.active_count()
        assert works(client, host, **config)
        until(lambda: threading.active_count() <= threads)
        with pytest.raises(SSHError, match=r"no password or key to log in|refused the login"):
            works(client, host, key_path=None)
    with pytest.raises(SSHError, match="jump host"):
        works(client, host, **config)
    (folder / "config").write_text("Host *\n  ProxyCommand nc %h %p\n")
    with pytest.raises(ValueError, match=r"use_ssh_config: .*only ProxyJump"):
        works(client, host, **config)
    with pytest.raises(TypeError, match="use_ssh_config"):
        works(client, host, use_ssh_config="yes")


def test_nothing_is_forwarded(client: CloreClient, host: Sshd) -> None:
    with client.connect_ssh(host.order(), key_path=host.key) as ssh:
        _, output, _ = ssh.exec_command("echo $SSH_AUTH_SOCK-$DISPLAY")
        assert output.read() == b"-\n"


def test_a_dead_link_is_noticed(
    client: CloreClient, host: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection on which nothing arrives ends; an idle one that is alive stays."""
    for name, seconds in (("SILENCE_CHECK", 0.1), ("KEEPALIVE", 0.3), ("DEAD_AFTER", 1.5)):
        monkeypatch.setattr(inside(f"ssh.transport.{name}"), seconds)
    with Relay(host.port) as relay:
        order = host.order()
        order["connection"]["ssh"] = f"ssh {host.user}@127.0.0.1 -p {relay.port}"
        assert works(client, host, order)
        login: dict[str, Any] = {"key_path": host.key, "wait": 10}
        assert client.run(order, "sleep 2.5; echo in", **login).stdout == "in\n"

        def freeze(_: str) -> None:
            relay.frozen = True

        with pytest.raises(SSHError, match="broke before the command had ended"):
            client.run(order, "echo in; sleep 60", on_output=freeze, **login)


def test_dead_links_are_noticed_within_45_seconds() -> None:
    longest = [pkgutil.resolve_name(inside(f"ssh.transport.{name}")) for name in (
        "DEAD_AFTER", "SILENCE_CHECK")]  # fmt: skip
    assert sum(longest) < 45


def test_the_private_parts_of_paramiko() -> None:
    """Two are used, and exist in paramiko 3.4 to 5.x. Check them again in a new version."""
    assert 3 <= int(paramiko.__version__.split(".")[0]) <= 5
    assert callable(paramiko.packet.Packetizer._read_timeout)  # type: ignore[attr-defined]
    assert callable(paramiko.Transport._send_user_message)  # type: ignore[attr-defined]


def test_channels_that_a_host_opens_are_refused() -> None:
    """A host may request the agent and the display, and gets none."""
    client = CloreClient("key", state_dir=None)
    with HostileServer() as server:
        with client.connect_ssh(server.order(), "x", wait=10):
            (connection,) = server._open
            conn: Any = connection

            async def ask(open_channel: Any) -> str:
                try:
                    await open_channel()
                except asyncssh.ChannelOpenError as error:
                    return str(error.code)
                return "opened"

            async def ask_all() -> list[str]:
                session = asyncssh.SSHUNIXSession
                agent, display = conn.create_agent_channel(), conn.create_x11_channel()
                return [
                    await ask(lambda: agent.open(session)),
                    await ask(lambda: display.open(asyncssh.SSHTCPSession, "127.0.0.1", 6000)),
                    await ask(lambda: conn.create_connection(
                        asyncssh.SSHTCPSession, "127.0.0.1", 80, "127.0.0.1", 1)),
                ]  # fmt: skip

            answers: list[str] = []

            async def run() -> None:
                answers.extend(await ask_all())

            server._await(run())
            refused = str(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED)
            assert answers == [refused] * 3


# --- host keys ---


def test_a_key_is_pinned_for_each_order(client: CloreClient, host: Sshd, tmp_path: Path) -> None:
    assert works(client, host)
    before = fingerprint(host)
    started_anew(host)
    with pytest.raises(HostKeyChangedError) as caught:
        works(client, host)
    assert caught.value.order_id == 7
    assert (caught.value.expected, caught.value.found) == (before, fingerprint(host))
    assert before in str(caught.value)
    assert fingerprint(host) in str(caught.value)
    assert works(client, host, host.order(8))  # another order on the same host and port
    with pytest.raises(HostKeyChangedError):
        works(client, host)
    assert client.forget_host_key(host.order()) is True
    assert client.forget_host_key(host.order()) is False
    assert works(client, host)
    (pins,) = (tmp_path / "state folder 100%").glob("known_hosts")
    assert pins.stat().st_mode & 0o777 == 0o600
    assert len(pins.read_text().splitlines()) == 2


@pytest.mark.parametrize("change", ["indented", "with a tab"])
def test_a_pin_in_a_file_that_was_edited(
    client: CloreClient, host: Sshd, tmp_path: Path, change: str
) -> None:
    assert works(client, host)
    (pins,) = (tmp_path / "state folder 100%").glob("known_hosts")
    line = pins.read_text()
    pins.write_text(f"  {line}" if change == "indented" else line.replace(" ", "\t"))
    started_anew(host)
    with pytest.raises(HostKeyChangedError):
        works(CloreClient(client.api_key, state_dir=pins.parent, base_url=client.BASE_URL), host)


def test_a_fingerprint_of_ones_own(client: CloreClient, host: Sshd) -> None:
    assert works(client, host)
    before = fingerprint(host)
    started_anew(host)
    with pytest.raises(HostKeyChangedError):
        works(client, host, host_key=before)
    assert works(client, host, host_key=fingerprint(host))
    assert works(client, host)  # it is pinned now
    started_anew(host)
    assert works(client, host, host_key="accept")
    with pytest.raises(HostKeyChangedError):
        works(client, host)
    for bad in ("", "sha256:x", "SHA256:short", "MD5:aa:bb", "no"):
        with pytest.raises(ValueError, match="host_key"):
            works(client, host, host_key=bad)
    with pytest.raises(TypeError, match="host_key"):
        works(client, host, host_key=None)


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_a_host_that_has_further_keys(client: CloreClient, host: Sshd, kind: str) -> None:
    """The client requests the pinned kind of key, even if the host has others."""
    host.stop()
    host.make_keys(kind)
    host.start()
    assert works(client, host)
    host.stop()
    generate(host.folder / "further")
    host.options += f"\nHostKey {host.folder}/further"
    host.start()
    assert works(client, host)
    client.forget_host_key(host.order())
    host.stop()
    host.make_keys("rsa")
    host.start()
    assert works(client, host)  # with the new key, which the host prefers


def test_the_next_process_knows_the_pin(client: CloreClient, host: Sshd, tmp_path: Path) -> None:
    assert works(client, host)
    script = (
        "import sys; from clore_client import *\n"
        "client = CloreClient(sys.argv[2], state_dir=sys.argv[1])\n"
        "order = {'order_id': 7, 'connection': {'ssh': sys.argv[3]}}\n"
        "try: print(client.run(order, 'echo in', key_path=sys.argv[4], wait=5).stdout)\n"
        "except HostKeyChangedError as error: print(error.found)\n"
    )

    def next_process(key: str) -> str:
        line = host.order()["connection"]["ssh"]
        arguments = [str(tmp_path / "state folder 100%"), key, line, str(host.key)]
        # With -O, too, which removes each assert.
        command = [sys.executable, "-O", "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert next_process("key") == "in"
    started_anew(host)
    assert next_process("key") == fingerprint(host)
    assert next_process("another") == "in"


def test_without_a_state_folder_it_is_known_to_the_client(host: Sshd) -> None:
    client = CloreClient("key", state_dir=None)
    assert works(client, host)
    started_anew(host)
    with pytest.raises(HostKeyChangedError):
        works(client, host)
    assert works(CloreClient("key", state_dir=None), host)


def test_nothing_is_sent_to_another_host() -> None:
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
def test_a_folder_in_a_bad_state(
    host: Sshd, tmp_path: Path, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "bad"
    if trouble == "a file":
        state.write_text("no folder")
    else:
        state.mkdir()
        lines = b"\xff\xfe\0 x y\n|1|?|? ssh-rsa ?\n" * (1 if trouble == "binary" else 100_000)
        (state / "known_hosts").write_bytes(lines)
    client = CloreClient("key", state_dir=state)
    assert works(client, host)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (1 if trouble == "a file" else 0)
    if trouble == "huge":
        assert (state / "known_hosts").stat().st_size < 100_000
    started_anew(host)
    with pytest.raises(HostKeyChangedError):
        works(client, host)


def test_pins_that_cannot_be_read_are_not_replaced(host: Sshd, tmp_path: Path) -> None:
    pins = tmp_path / "state" / "known_hosts"
    pins.parent.mkdir()
    pins.symlink_to(pins)
    assert works(CloreClient("key", state_dir=pins.parent), host)
    assert pins.is_symlink()


def test_a_full_disk(host: Sshd, tmp_path: Path) -> None:
    """Simulate a full disk: no file may be longer than ten bytes."""
    script = (
        "import resource, sys; from clore_client import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "order = {'order_id': 7, 'connection': {'ssh': sys.argv[2]}}\n"
        "client = CloreClient('key', state_dir=sys.argv[1])\n"
        "client.wait_for_ssh(order, key_path=sys.argv[3], wait=20)\n"
    )
    line = host.order()["connection"]["ssh"]
    command = [sys.executable, "-B", "-c", script, tmp_path / "state", line, host.key]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "host keys can't be kept" in done.stderr
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["known_hosts.lock"]


def test_forgetting_nothing_makes_nothing(client: CloreClient, tmp_path: Path) -> None:
    order = {"order_id": 7, "connection": {"ssh": ""}}
    assert client.forget_host_key(order) is False
    assert not (tmp_path / "state folder 100%").exists()


def test_many_processes_at_once(host: Sshd, tmp_path: Path) -> None:
    script = (
        "import sys; from clore_client import *\n"
        "client = CloreClient('key', state_dir=sys.argv[1])\n"
        "for n in range(int(sys.argv[4]), int(sys.argv[4]) + 4):\n"
        "    order = {'order_id': n, 'connection': {'ssh': sys.argv[2]}}\n"
        "    client.wait_for_ssh(order, key_path=sys.argv[3], wait=20)\n"
    )
    line = host.order()["connection"]["ssh"]
    shared = [str(tmp_path / "many"), line, str(host.key)]
    started = [
        subprocess.Popen([sys.executable, "-c", script, *shared, str(first)], stderr=-1)
        for first in (10, 20, 30)
    ]
    for process in started:
        assert process.communicate(timeout=60)[1] == b""
    lines = (tmp_path / "many" / "known_hosts").read_text().splitlines()
    key = (host.folder / "host_key.pub").read_text().split()[:2]
    assert [line.split()[1:] for line in lines] == [key] * 12
    assert len({line.split()[0] for line in lines}) == 12


def test_many_pins_at_once(host: Sshd, tmp_path: Path) -> None:
    clients = [CloreClient(f"key{n % 4}", state_dir=tmp_path / "many") for n in range(8)]
    threads = [
        threading.Thread(target=works, args=(client, host, host.order(number)))
        for number, client in enumerate(clients, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "many" / "known_hosts").read_text().splitlines()
    assert len(lines) == 8
    assert all(len(line.split()) == 3 for line in lines)


# --- lines and entries for OpenSSH ---


def openssh(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["ssh", "-o", "BatchMode=yes", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_an_entry_for_openssh(client: CloreClient, host: Sshd, tmp_path: Path) -> None:
    assert works(client, host)
    config = tmp_path / "config"
    entry = client.ssh_config(host.order(), key_path=host.key)
    config.write_text(entry)
    assert entry.startswith("Host clore-7\n")
    assert openssh("-F", str(config), "clore-7", "echo in").stdout == "in\n"
    (tmp_path / "sent").write_text("as it was")
    for program in ("scp", "sftp"):
        words = [program, "-q", "-oBatchMode=yes", "-F", config]
        there = tmp_path / f"by {program}"
        if program == "scp":
            subprocess.run([*words, tmp_path / "sent", f"clore-7:{there}"], check=True, timeout=30)
        else:
            batch = f'put "{tmp_path}/sent" "{there}"\n'
            subprocess.run(
                [*words, "-b", "-", "clore-7"], input=batch, text=True, check=True, timeout=30,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
        assert there.read_text() == "as it was"
    started_anew(host)
    refused = openssh("-F", str(config), "clore-7", "echo in")
    assert refused.returncode == 255
    assert "verification failed" in refused.stderr.lower()


@pytest.mark.parametrize("hashed", ["no", "yes"])
def test_openssh_pins_in_the_same_place(
    client: CloreClient, host: Sshd, tmp_path: Path, hashed: str
) -> None:
    config = tmp_path / "config"
    config.write_text(client.ssh_config(host.order(), name="gpu", key_path=host.key))
    done = openssh("-F", str(config), "-o", f"HashKnownHosts={hashed}", "gpu", "echo in")
    assert done.stdout == "in\n", done.stderr
    assert works(client, host)
    started_anew(host)
    fresh = CloreClient("key", state_dir=tmp_path / "state folder 100%")
    with pytest.raises(HostKeyChangedError):
        works(fresh, host)


def test_an_entry_without_a_state_folder(host: Sshd, tmp_path: Path) -> None:
    client = CloreClient("key", state_dir=None)
    config = tmp_path / "config"
    config.write_text(client.ssh_config(host.order(), key_path=host.key))
    assert openssh("-F", str(config), "clore-7", "echo in").stdout == "in\n"
    assert works(client, host)
    config.write_text(client.ssh_config(host.order(), key_path=host.key))
    assert openssh("-F", str(config), "clore-7", "echo in").stdout == "in\n"
    started_anew(host)
    assert openssh("-F", str(config), "clore-7", "echo in").returncode == 255


def test_the_line_for_a_terminal(client: CloreClient, host: Sshd) -> None:
    order = host.order()
    plain = f"ssh -p {host.port} {host.user}@127.0.0.1"
    assert client.ssh_command(order) == plain
    assert works(client, host)
    words = shlex.split(client.ssh_command(order, key_path=host.key))
    assert words[0] == "ssh"
    assert openssh(*words[1:], "echo in").stdout == "in\n"
    started_anew(host)
    assert openssh(*words[1:], "echo in").returncode == 255


@pytest.mark.parametrize("name", ["o'neil", "b\\s", "two\\\\bs", "a #c", "%h", "$HOME", "tab\ta"])
def test_paths_that_openssh_would_read_otherwise(host: Sshd, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    key = folder / "key"
    host.key.rename(key)
    client = CloreClient("key", state_dir=folder / "state")
    config = tmp_path / "config"
    config.write_text(client.ssh_config(host.order(), key_path=key))
    done = openssh("-F", str(config), "clore-7", "echo in")
    assert (done.stdout, "Failed" in done.stderr) == ("in\n", False), done.stderr
    assert (folder / "state" / "known_hosts").stat().st_size > 0
    words = shlex.split(client.ssh_command(host.order(), key_path=key))
    assert openssh("-F", "none", *words[1:], "echo in").stdout == "in\n"


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a${HOME}b"])
def test_paths_that_openssh_cannot_be_told(host: Sshd, tmp_path: Path, name: str) -> None:
    client = CloreClient("key", state_dir=None)
    with pytest.raises(ValueError, match="OpenSSH can't use a path"):
        client.ssh_config(host.order(), key_path=tmp_path / name)
    if name == 'a"b':
        words = shlex.split(client.ssh_command(host.order(), key_path=tmp_path / name))
        assert str(tmp_path / name) in words
    kept = CloreClient("key", state_dir=tmp_path / name)
    with pytest.raises(ValueError, match="OpenSSH can't use a path"):
        kept.ssh_config(host.order())


@pytest.mark.parametrize("raw", ["ssh me@::1 -p 2060", "ssh me@[2001:db8::5]:2060"])
def test_ipv6(client: CloreClient, tmp_path: Path, raw: str) -> None:
    order = {"order_id": 7, "connection": {"ssh": raw}}
    (tmp_path / "config").write_text(client.ssh_config(order))
    for words in (
        ["-F", "none", *shlex.split(client.ssh_command(order))[1:]],
        ["-F", str(tmp_path / "config"), "clore-7"],
    ):
        understood = dict(line.split(" ", 1) for line in openssh("-G", *words).stdout.splitlines())
        assert (understood["user"], understood["port"]) == ("me", "2060")
        address = ipaddress.ip_address(understood["hostname"])
        assert str(address) == client.parse_ssh_connection(order)["host"]


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


def test_names_that_are_refused(client: CloreClient, host: Sshd) -> None:
    for name in ("a b", "-x", "", "a\nHost *"):
        with pytest.raises(ValueError, match="name"):
            client.ssh_config(host.order(), name=name)


# --- the rest ---


@pytest.mark.internal
def test_nothing_leaks(client: CloreClient, host: Sshd) -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    assert works(client, host)
    before = count()
    for _ in range(50):
        assert works(client, host)
    deadline = time.monotonic() + 10
    while any(now > then for now, then in zip(count(), before, strict=True)) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)  # the last close may take a moment
    threads, files = count()
    assert threads <= before[0]
    assert files <= before[1]


def test_failed_logins_leak_nothing(client: CloreClient, host: Sshd) -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    def fail(order: Any) -> None:
        with pytest.raises(SSHError):
            client.connect_ssh(order, "wrong", wait=0, timeout=60)

    with RawServer(hang_up) as closed, RawServer(garbage) as mad:
        orders = [host.order(), closed.order(8), mad.order(9)]
        for order in orders:
            fail(order)
        before = count()
        for order in orders * 5:
            fail(order)
    # By now the servers have freed their part; a leak of the client would remain.
    deadline = time.monotonic() + 10
    while any(now > then for now, then in zip(count(), before, strict=True)) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    threads, files = count()
    assert threads <= before[0]
    assert files <= before[1]


def test_optimized(host: Sshd, tmp_path: Path) -> None:
    """No protection depends on an assert, which -O removes."""
    script = (
        "import sys; from clore_client import *\n"
        "client = CloreClient('key', state_dir=None)\n"
        "order = {'order_id': 7, 'connection': {'ssh': sys.argv[1]}}\n"
        "login = dict(key_path=sys.argv[2], wait=20)\n"
        "print(__debug__, client.run(order, 'echo in', **login).stdout.strip(), flush=True)\n"
        "input()\n"
        "try: client.run(order, 'true', **login)\n"
        "except HostKeyChangedError: print('changed')\n"
        "order['connection']['ssh'] = 'ssh root@-oProxyCommand=x'\n"
        "for call in client.connect_ssh, client.ssh_command, client.ssh_config:\n"
        "    try: call(order)\n"
        "    except SSHError as error: print('no address' in str(error))\n"
    )
    line = host.order()["connection"]["ssh"]
    command = [sys.executable, "-O", "-c", script, line, str(host.key)]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "False in\n"
    started_anew(host)
    assert process.communicate("\n", timeout=60)[0].split() == ["changed"] + ["True"] * 3


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
        print(name, "pip install paramiko scp" in str(error))
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
        for wrong in (None, 1.5, [1958009], True, "x", -1, 0):
            with pytest.raises((TypeError, ValueError), match="order"):
                call(wrong)
