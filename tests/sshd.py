"""Run the OpenSSH server of this system on a local port, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Sshd:
    """A running sshd that accepts one key.

    Attributes:
        port, key, user: the port, the private key and the user for the login.
        folder: the folder of its files.
    """

    def __init__(self, folder: Path, port: int, options: str, home: str = "") -> None:
        self.folder = folder
        self.home = home or f"{folder}/home"
        self.port = port
        self.user = getpass.getuser()
        self.key = folder / "id_ed25519"
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None

    def order(self, order_id: int = 7, **more: Any) -> dict[str, Any]:
        """An order in the documented form for this server."""
        ssh = f"ssh {self.user}@127.0.0.1 -p {self.port}"
        return {"order_id": order_id, "connection": {"ssh": ssh}, "status": "running", **more}

    def make_keys(self, kind: str = "ed25519") -> None:
        """Generate new host keys, as a container that was created again has."""
        host_key = self.folder / "host_key"
        host_key.unlink(missing_ok=True)
        generate(host_key, kind)

    def start(self) -> None:
        program = shutil.which("sshd") or "/usr/sbin/sshd"
        assert os.path.exists(program), "openssh-server is not installed; tests/run.sh installs it"
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        config = self.folder / "sshd_config"
        (self.folder / "home").mkdir(exist_ok=True)
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host_key\n"
            f"PidFile none\nAuthorizedKeysFile {self.key}.pub\nStrictModes no\nUsePAM no\n"
            f"PermitRootLogin yes\nMaxStartups 100\n"
            # The user's own start-up files do not belong to the test, and can be slow.
            f"SetEnv HOME={self.home}\nSubsystem sftp internal-sftp\n{self.options}\n"
        )
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen([program, "-D", "-e", "-f", config], stderr=log)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None


def generate(path: Path, kind: str = "ed25519", passphrase: str = "") -> None:
    """Generate a key with ssh-keygen."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True)


def free_port() -> int:
    """Return a port that no other program gets by chance: it is below those for port 0."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def running_sshd(
    folder: Path, options: str = "PasswordAuthentication no", home: str = ""
) -> Iterator[Sshd]:
    """A server for the length of the block; ``options`` are further lines of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Sshd(folder, free_port(), options, home)
    generate(server.key)
    server.make_keys()
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Dropbear:
    """A running dropbear that accepts one key, for a user with uid 0; needs root."""

    def __init__(self, folder: Path, command: str = "") -> None:
        self.folder = folder
        self.command = command  # runs in place of each command
        self.port = free_port()
        self.user = f"clore{os.urandom(3).hex()}"
        self.key = folder / "home" / "id_ed25519"
        self._process: subprocess.Popen[bytes] | None = None

    def order(self, order_id: int = 7) -> dict[str, Any]:
        """An order in the documented form for this server."""
        ssh = f"ssh {self.user}@127.0.0.1 -p {self.port}"
        return {"order_id": order_id, "connection": {"ssh": ssh}, "status": "running"}

    def __enter__(self) -> Dropbear:
        home = self.folder / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        generate(self.key)
        shutil.copy(f"{self.key}.pub", home / ".ssh" / "authorized_keys")
        _while_locked(["useradd", "-o", "-u", "0", "-g", "0", "-d", home, "-s", "/bin/sh",
                       self.user])  # fmt: skip
        host_key = self.folder / "host_key"
        command = ["dropbearkey", "-t", "ed25519", "-f", str(host_key)]
        subprocess.run(command, check=True, capture_output=True)
        with open(self.folder / "log", "ab") as log:
            address = f"127.0.0.1:{self.port}"
            self._process = subprocess.Popen(
                ["dropbear", "-F", "-E", "-r", host_key, "-p", address,
                 "-P", self.folder / "pid", *(["-c", self.command] if self.command else [])],
                stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return self
            time.sleep(0.02)
        raise AssertionError((self.folder / "log").read_text())

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
        _while_locked(["userdel", "-f", self.user])


def _while_locked(command: list[Any]) -> None:
    """Change the users of this system; other tests may do that at the same time."""
    deadline = time.monotonic() + 30
    while subprocess.run(command, capture_output=True).returncode in (1, 10):
        assert time.monotonic() < deadline, command
        time.sleep(0.1)
