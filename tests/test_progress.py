"""Progress: the events of long calls, and where they are shown."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import threading

import pytest

from clore_client import CloreClient, ProgressEvent
from clore_client.progress import ProgressOptions, readable_seconds, readable_size
from tests.conftest import MakeSim, client_for
from tests.sshd import Sshd, free_port

SHOWS = """
import sys
if sys.argv[1] == "plain":
    sys.modules["tqdm"] = sys.modules["tqdm.auto"] = None
from clore_client import CloreClient
client = CloreClient(state_dir=None)
client.wait_for_ssh(eval(sys.argv[2]), key_path=sys.argv[3], progress=True)
"""


def test_from_the_order_to_its_status(make_sim: MakeSim) -> None:
    events: list[ProgressEvent] = []
    with client_for(make_sim(deploy_after=0.5)) as client:
        with client.rent(
            "RTX 4090", poll_interval=0.05, on_progress=events.append, max_hours=1
        ) as rental:
            order_id, server_id = rental.order.id, rental.server.id
        names = list(dict.fromkeys(event.name for event in events))
        assert names == ["rent", "order", "deploy", "running"]
        assert events[0].text.startswith(f"renting server {server_id} (RTX 4090, 0.")
        assert events[1].text == f"order {order_id} of server {server_id}"
        assert events[2].text == f"order {order_id}: deploying, 0 s"
        assert events[-1].text == f"order {order_id}: running"
        assert repr(events[-1]).startswith("<ProgressEvent running ")
        assert events[-1].number >= events[2].number >= 0


def test_an_error_of_the_callback_ends_the_rental(make_sim: MakeSim) -> None:
    def fail(event: ProgressEvent) -> None:
        if event.name == "order":
            raise RuntimeError("mine")

    sim = make_sim()
    with client_for(sim) as client:
        with pytest.raises(RuntimeError, match="mine"):
            with client.rent("RTX 4090", on_progress=fail):
                pass
        assert client.get_orders() == []


def test_waiting_for_an_sshd(sshd: Sshd) -> None:
    port = free_port()
    order = sshd.order()
    order["connection"]["ssh"] = f"ssh {sshd.user}@127.0.0.1 -p {port}"
    events: list[ProgressEvent] = []
    with pytest.raises(Exception, match=r"within 0\.1s"):
        CloreClient(state_dir=None).wait_for_ssh(
            order, key_path=sshd.key, wait=0.1, on_progress=events.append
        )
    assert events[0].name == "ssh"
    assert events[0].text.startswith("no sshd yet, 0 s: ")


@pytest.mark.parametrize("how", ["plain", "tqdm"])
def test_it_is_shown_in_a_terminal(sshd: Sshd, how: str) -> None:
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", SHOWS, how, repr(sshd.order()), str(sshd.key)]
    text = b""

    def read() -> None:
        nonlocal text
        try:
            while piece := os.read(near, 4096):
                text += piece
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=far, check=True)
    os.close(far)
    reader.join(10)
    os.close(near)
    assert done.stdout == b""
    assert b"sshd up" in text
    assert (b"it/s" in text or b"\r" in text.replace(b"\r\n", b"")) == (how == "tqdm")


def test_it_is_silent_in_a_pipe(sshd: Sshd) -> None:
    command = [sys.executable, "-c", SHOWS, "plain", repr(sshd.order()), str(sshd.key)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_plain_lines_are_few_and_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with ProgressOptions(progress=True).reporting() as report:
        assert report is not None
        for number in range(101):
            report(ProgressEvent("upload", number, f"{number} \x1b[2J", 100))
        report(ProgressEvent("running", 1, "running"))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("0 ")
    assert lines[1].startswith("100 ")
    assert lines[2] == "running"
    assert "\x1b" not in stream.getvalue()


def test_nobody_wants_any() -> None:
    with ProgressOptions().reporting() as report:
        assert report is None
    times = [readable_seconds(s) for s in (0, 59.9, 125, 10920)]
    assert times == ["0 s", "59 s", "2 min 5 s", "3 h 2 min"]
    assert [readable_size(s) for s in (0, 999, 1200, 4_976_698_672)] == [
        "0 bytes", "999 bytes", "1.2 kB", "5.0 GB",
    ]  # fmt: skip
