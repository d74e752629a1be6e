"""Test the shell in a terminal: keys, sizes, signals, and the restored terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, SSHError
from tests.conftest import until
from tests.relay import Relay
from tests.sshd import Dropbear, Sshd, running_sshd

PROGRAM = """
import sys
from clore_client import CloreClient
order, key = eval(sys.argv[1]), sys.argv[2] or None
try:
    code = CloreClient(state_dir=None).shell(order, key_path=key)
except Exception as error:
    code = f"{type(error).__name__}: {error}"
print(f"<<{code}>>", flush=True)
sys.stdin.readline()
"""


RENTAL_PROGRAM = """
import sys
from clore_client import CloreClient
url, key = eval(sys.argv[1]), sys.argv[2]
client = CloreClient(key, base_url=url, rate_limit=0, create_order_interval=0, state_dir=None)
with client.rent("RTX 4090", poll_interval=0.02) as rental:
    code = rental.shell()
print(f"<<{code}>>", flush=True)
sys.stdin.readline()
"""


class Terminal:
    """A process with a pseudo-terminal."""

    def __init__(self, order: Any, key: Any, program: str = PROGRAM) -> None:
        self.near, self.far = pty.openpty()
        self.resize(80, 24)
        self.before = termios.tcgetattr(self.far)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, repr(order), str(key or "")],
            stdin=self.far, stdout=self.far, stderr=self.far, start_new_session=True,
        )  # fmt: skip
        self.text = b""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.far, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: str) -> None:
        until(lambda: self.is_raw)
        os.write(self.near, keys.encode())

    def expect(self, text: str, seconds: float = 20) -> None:
        """Read until a text has arrived, and drop the output up to its end."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self.text:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come: {self.text!r}"
            if select.select([self.near], [], [], left)[0]:
                self.text += os.read(self.near, 65536)
        self.text = self.text.partition(text.encode())[2]

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.far)[3] & termios.ICANON

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.far) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.near)
        os.close(self.far)


MakeTerminal = Callable[..., Terminal]


@pytest.fixture
def open_terminal() -> Iterator[MakeTerminal]:
    with contextlib.ExitStack() as stack:

        def make(order: Any, key: Any = None, program: str = PROGRAM) -> Terminal:
            terminal = Terminal(order, key, program)
            stack.callback(terminal.close)
            return terminal

        yield make


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    with running_sshd(tmp_path / "sshd") as running:
        yield running


def test_a_session(server: Sshd, open_terminal: MakeTerminal) -> None:
    terminal = open_terminal(server.order(), server.key)
    terminal.type("stty size; echo $((6*7))-$TERM\r")
    terminal.expect("24 80\r\n")
    terminal.expect(f"42-{os.environ.get('TERM', 'xterm-256color')}\r\n")
    assert terminal.is_raw
    terminal.resize(132, 50)
    terminal.type("sleep 1; stty size\r")
    terminal.expect("50 132\r\n")
    terminal.type("echo 'gr\u00fcn' | od -c | head -n 1\r")
    terminal.expect("303 274")
    terminal.type("exit 7\r")
    terminal.expect("<<7>>")
    assert terminal.is_restored


def test_ctrl_c_goes_to_the_host(server: Sshd, open_terminal: MakeTerminal) -> None:
    terminal = open_terminal(server.order(), server.key)
    terminal.type("sleep 100; echo code-$?\r")
    time.sleep(1)
    terminal.type("\x03")
    terminal.type("PS1=pro''mpt; echo go''on\r")
    terminal.expect("goon")
    terminal.expect("prompt")  # before that, the shell may drop what is typed
    terminal.type("\x04")  # Ctrl-D ends the shell
    terminal.expect("<<")
    assert terminal.is_restored


def test_much_output_while_keys_are_pressed(server: Sshd, open_terminal: MakeTerminal) -> None:
    terminal = open_terminal(server.order(), server.key)
    terminal.type("seq 1 200000; echo do''ne\r")
    terminal.expect("\r\n200000\r\n", 60)
    terminal.expect("done")
    terminal.type("exit\r")
    terminal.expect("<<0>>")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_restores_the_terminal(
    server: Sshd, open_terminal: MakeTerminal, number: signal.Signals
) -> None:
    terminal = open_terminal(server.order(), server.key)
    terminal.type("echo re''ady\r")
    terminal.expect("ready")
    assert terminal.is_raw
    terminal.process.send_signal(number)
    assert terminal.process.wait(20) != 0
    assert terminal.is_restored


def test_a_connection_that_breaks(server: Sshd, open_terminal: MakeTerminal) -> None:
    with Relay(server.port) as relay:
        order = server.order()
        order["connection"]["ssh"] = f"ssh {server.user}@127.0.0.1 -p {relay.port}"
        terminal = open_terminal(order, server.key)
        terminal.type("echo re''ady\r")
        terminal.expect("ready")
        relay.cut()
        terminal.expect("<<SSHError: the connection broke, and the shell ended")
        assert terminal.is_restored


def test_a_host_without_terminals(tmp_path: Path, open_terminal: MakeTerminal) -> None:
    with running_sshd(tmp_path / "no", "PasswordAuthentication no\nPermitTTY no") as server:
        terminal = open_terminal(server.order(), server.key)
        terminal.expect("<<SSHError: the host did not open a terminal")
        assert terminal.is_restored


def test_dropbear(tmp_path: Path, open_terminal: MakeTerminal) -> None:
    with Dropbear(tmp_path / "dropbear") as dropbear:
        terminal = open_terminal(dropbear.order(), dropbear.key)
        terminal.type("stty size; exit 3\r")
        terminal.expect("24 80\r\n")
        terminal.expect("<<3>>")
        assert terminal.is_restored


def test_without_a_terminal(server: Sshd) -> None:
    order, client = server.order(), CloreClient(state_dir=None)
    with open(os.devnull) as nothing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", nothing)
        with pytest.raises(SSHError, match="not a terminal: use run"):
            client.shell(order, key_path=server.key)
        patch.setattr(sys, "stdin", None)
        with pytest.raises(SSHError, match="not a terminal: use run"):
            client.shell(order, key_path=server.key)


def test_the_shell_of_a_rental(make_sim: Any, open_terminal: MakeTerminal) -> None:
    sim = make_sim(ssh=True, rate_limit=0)
    terminal = open_terminal(sim.url, sim.api_key, RENTAL_PROGRAM)
    terminal.type("nvidia-smi -L\r")
    terminal.expect("RTX 4090")
    terminal.type("exit 3\r")
    terminal.expect("<<3>>")
    assert terminal.is_restored
