"""Test commands over SSH: with sshd, the simulator's hosts, and servers that hang."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import pickle
import random
import secrets
import shutil
import signal
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
from hypothesis import given
from hypothesis import strategies as st

from clore_client import CloreClient, SSHError
from clore_client.errors import CommandError, CommandTimeoutError
from clore_client.models.result import CommandResult, OutputLine
from clore_client.ssh import command as remote
from clore_client.ssh.command import Command
from clore_client.ssh.command_text import (
    LONGEST_PIECE,
    MAX_STDERR_BEFORE_PID,
    LineSplitter,
    PidLine,
    command_line,
)
from tests import hostile
from tests.conftest import until
from tests.hostile import HostileServer, RawServer, Run, hang, silence
from tests.sshd import Dropbear, Sshd, running_sshd

MB10 = 10_000_000


def run_command(ssh: paramiko.SSHClient, command: Any, **options: Any) -> CommandResult:
    """Run a command on a connection."""
    return Command(command, **options).run(ssh)


def unique() -> str:
    """Return a number of seconds for which no other process sleeps."""
    return f"{random.SystemRandom().randint(10**6, 10**7)}.25"


def enough(ssh: paramiko.SSHClient) -> float:
    """Return enough seconds for a command to write its output, even on a slow machine."""
    return max(0.4, 6 * run_command(ssh, "echo x").duration)


def sleeping(number: str) -> list[str]:
    """Return the ids of the processes that sleep for that time."""
    found = subprocess.run(["pgrep", "-f", f"sleep {number}"], capture_output=True, text=True)
    return found.stdout.split()


# --- results ---


def test_result(ssh: paramiko.SSHClient) -> None:
    result = run_command(ssh, "echo out; echo err >&2; exit 7", check=False)
    assert (result.exit_code, result.stdout, result.stderr) == (7, "out\n", "err\n")
    assert result.command == "echo out; echo err >&2; exit 7"
    assert not result.ok
    assert 0 < result.duration < 60
    assert run_command(ssh, "true").ok
    assert run_command(ssh, "kill -KILL $$", check=False).exit_code == -1
    assert run_command(ssh, "echo a\necho b\n").stdout == "a\nb\n"
    with pytest.raises(CommandError, match="ended with a signal"):
        run_command(ssh, "kill -KILL $$")


def test_repr_of_a_result() -> None:
    result = CommandResult("echo \x1b[2J\n" + "x" * 200, 3, "secret\n", "no", 1.25)
    assert "secret" not in repr(result)
    assert repr(result).isprintable()
    assert "exit_code=3, 7 characters of stdout, 2 of stderr, 1.2s" in repr(result)
    assert pickle.loads(pickle.dumps(result)).stdout == copy.copy(result).stdout == "secret\n"


def test_a_printed_result_shows_the_last_lines_of_its_output() -> None:
    result = CommandResult("seq 30", 0, "".join(f"{n}\n" for n in range(30)), "warning\n", 1.25)
    assert str(result).split("\n") == [
        repr(result), "... 10 more lines", *map(str, range(10, 30)), "warning",
    ]  # fmt: skip
    assert str(CommandResult("true", 0, "", "", 0.1)).count("\n") == 0
    assert str(CommandResult("x", 0, "a\n\nb\n", "", 0.1)).endswith(">\na\n\nb")
    assert f"{result}" == str(result)


def test_ipython_shows_a_result_as_print_does() -> None:
    pretty = pytest.importorskip("IPython.lib.pretty")
    result = CommandResult("echo hi", 0, "hi\n", "", 0.1)
    assert pretty.pretty(result) == str(result)


def test_a_printed_result_escapes_what_a_terminal_obeys() -> None:
    hostile = "\x1b[31mred\x1b[0m\tx\r\n10%\r50%\r99%\n\x1b]0;owned\x07\x9b2J\n" + "x" * 10_000_000
    lines = str(CommandResult("x", 0, hostile, "", 0.1)).split("\n")
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) < 400
    lines = str(CommandResult("x", 0, hostile[:60], "", 0.1)).split("\n")
    assert lines[1:4] == ["red     x", "99%", "\\x1b]0;owned\\x07\\x9b2J"]


def test_check_shows_the_tail_of_stderr_escaped(ssh: paramiko.SSHClient) -> None:
    evil = "\x1b]0;owned\x07"
    line = "seq 1 9999 >&2; printf '\\033]0;owned\\007' >&2; printf '\\033[2J'; exit 3"
    with pytest.raises(CommandError) as caught:
        run_command(ssh, line)
    error = caught.value
    assert "exit code 3" in str(error)
    assert "9999" in str(error)
    assert len(str(error)) < 3000
    assert all(part.isprintable() for part in str(error).split("\n"))
    # The caller gets the data unchanged.
    assert error.result.stderr.endswith(evil)
    assert error.result.stdout == "\x1b[2J"
    assert pickle.loads(pickle.dumps(error)).result.exit_code == 3


def test_much_on_all_streams_at_once(ssh: paramiko.SSHClient) -> None:
    line = "head -c 10000000 /dev/zero & head -c 10000000 /dev/zero >&2 & cat; wait"
    result = run_command(ssh, line, input=b"x" * MB10)
    assert len(result.stdout) == 2 * MB10
    assert result.stdout.count("x") == MB10
    assert result.stderr == "\0" * MB10


def test_input(ssh: paramiko.SSHClient) -> None:
    data = os.urandom(300_000)
    assert run_command(ssh, "od -An -v -tx1 | tr -d ' \\n'", input=data).stdout == data.hex()
    assert run_command(ssh, "cat", input="grün\n").stdout == "grün\n"
    # Without input, stdin is empty and at its end.
    for nothing in (None, "", b""):
        assert run_command(ssh, "cat; echo done", input=nothing).stdout == "done\n"


def test_input_that_nobody_reads(ssh: paramiko.SSHClient) -> None:
    assert run_command(ssh, "echo hi", input=b"x" * MB10).stdout == "hi\n"
    assert run_command(ssh, "head -c 3", input=b"y" * MB10).stdout == "yyy"
    until(lambda: not [t for t in threading.enumerate() if t.name == "clore-stdin"])


def test_input_that_is_read_late(
    openssh: paramiko.SSHClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit for the start of a command does not apply to its input."""
    monkeypatch.setattr(remote, "START_TIMEOUT", 2.0)
    result = run_command(openssh, "sleep 3; wc -c", input=b"x" * MB10, timeout=30)
    assert result.stdout.strip() == str(MB10)


def test_bytes_that_are_no_utf8(ssh: paramiko.SSHClient) -> None:
    result = run_command(ssh, "printf 'a\\377b\\303'; printf '\\200' >&2")
    assert (result.stdout, result.stderr) == ("a\ufffdb\ufffd", "\ufffd")


def test_a_list_is_quoted(ssh: paramiko.SSHClient) -> None:
    names = ["a b", "it's", '"$HOME"', "*", "~", "new\nline", "", "-n", "\\", "grün", "$(id)", ";"]
    assert run_command(ssh, ["printf", "<%s>", *names]).stdout == "".join(f"<{n}>" for n in names)
    assert run_command(ssh, ("echo", "a  b")).command == "echo 'a  b'"


def test_a_name_that_is_no_utf8_gets_there_as_it_is(openssh: paramiko.SSHClient) -> None:
    raw = os.fsdecode(b"\xff\xfe")
    assert run_command(openssh, ["printf", "%s", raw, "x"]).stdout == "\ufffd\ufffdx"
    assert run_command(openssh, f"printf %s {raw} | od -An -tx1").stdout.split() == ["ff", "fe"]


def test_env(ssh: paramiko.SSHClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    values = {"ONE": 'it\'s "quoted" $HOME `id` \\', "TWO": "two\nlines\n", "THREE": "", "_4": "&"}
    result = run_command(ssh, 'printf "<%s>" "$ONE" "$TWO" "$THREE" "$_4"', env=values)
    assert result.stdout == "".join(f"<{value}>" for value in values.values())
    assert result.command == 'printf "<%s>" "$ONE" "$TWO" "$THREE" "$_4"'
    # Errors show no secrets, even if the shell can't parse the command.
    for line in ("exit 3", "echo (", "echo '"):
        with pytest.raises(CommandError) as caught:
            run_command(ssh, line, env={"TOKEN": "hunter2"}, input="hunter2")
        shown = (str(caught.value), repr(caught.value.result), caught.value.result.stderr)
        assert "hunter2" not in " ".join(shown), line
    # asyncssh logs the command on the simulated host; the client logs no secrets.
    ours = [r for r in caplog.records if not r.name.startswith("asyncssh")]
    assert ours
    assert "hunter2" not in "".join(record.getMessage() for record in ours)


def test_stderr_is_the_commands_alone(ssh: paramiko.SSHClient) -> None:
    assert run_command(ssh, "true").stderr == ""
    assert run_command(ssh, "printf mine >&2").stderr == "mine"
    assert run_command(ssh, "printf clore- >&2", env={"A": "b"}).stderr == "clore-"


# --- output as it comes ---


def test_lines_as_they_come(ssh: paramiko.SSHClient) -> None:
    seen: list[OutputLine] = []
    line = "printf 'a\\r\\nb\\n\\n'; printf 'e1\\ne2' >&2; printf '10%%\\r20%%\\r\\nrest\\r'"
    result = run_command(ssh, line, on_output=seen.append)
    assert [x for x in seen if x.stream == "stdout"] == ["a", "b", "", "10%\r20%", "rest\r"]
    assert [x for x in seen if x.stream == "stderr"] == ["e1", "e2"]
    assert result.stdout == "a\r\nb\n\n10%\r20%\r\nrest\r"
    assert result.stderr == "e1\ne2"


def test_a_line_comes_before_the_command_ends(ssh: paramiko.SSHClient, tmp_path: Path) -> None:
    """The command ends only after on_output was called."""
    go = tmp_path / "go"
    line = f"echo first; while [ ! -e {go} ]; do sleep 0.02; done; echo second"
    seen: list[str] = []

    def on_output(text: OutputLine) -> None:
        seen.append(text)
        go.touch()

    assert run_command(ssh, line, on_output=on_output, timeout=30).ok
    assert seen == ["first", "second"]


def test_an_exception_of_on_output_ends_the_command(ssh: paramiko.SSHClient) -> None:
    number = unique()
    seen = []

    def on_output(text: OutputLine) -> None:
        seen.append(text)
        raise OSError("of my own")

    with pytest.raises(OSError, match=r"^of my own$"):
        run_command(ssh, f"echo x; echo y; sleep {number}", on_output=on_output)
    assert seen == ["x"]
    until(lambda: not sleeping(number))
    assert run_command(ssh, "echo still there").stdout == "still there\n"


@given(
    st.text(alphabet=st.sampled_from("aé€😀\r\n"), max_size=40),
    st.integers(min_value=1, max_value=5),
)
def test_lines_do_not_depend_on_the_pieces(text: str, size: int) -> None:
    seen: list[OutputLine] = []
    lines = LineSplitter("stderr", seen.append)
    data = text.encode()
    for start in range(0, len(data), size):
        lines.feed(data[start : start + size])
    lines.finish()
    *whole, rest = text.split("\n")
    assert seen == [line.removesuffix("\r") for line in whole] + [rest] * bool(rest)
    assert {line.stream for line in seen} <= {"stderr"}


@pytest.mark.parametrize("more", [-1, 0, 1, 2, LONGEST_PIECE, LONGEST_PIECE + 1, 300_000])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_line_without_end_comes_in_pieces(more: int, end: str) -> None:
    seen: list[OutputLine] = []
    lines = LineSplitter("stdout", seen.append)
    text = "x" * (LONGEST_PIECE + more)
    for character in (text, end):
        lines.feed(character.encode())
        assert len(lines._rest) <= LONGEST_PIECE + 1
    lines.finish()
    assert "".join(seen) == text
    assert all(0 < len(piece) <= LONGEST_PIECE + 2 for piece in seen)


def test_an_output_line_is_a_string() -> None:
    line = OutputLine("text", "stderr")
    assert line == "text"
    assert line.stream == "stderr"
    assert pickle.loads(pickle.dumps(line)).stream == copy.deepcopy(line).stream == "stderr"


# --- the end of a command ---


def test_a_timeout_ends_the_process_and_its_children(ssh: paramiko.SSHClient) -> None:
    number = unique()
    line = f"echo out; echo err >&2; printf part; sh -c 'sleep {number} & sleep {number}'"
    seen: list[str] = []
    timeout = enough(ssh)
    with pytest.raises(CommandTimeoutError) as caught:
        run_command(ssh, line, timeout=timeout, on_output=seen.append)
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert (error.command, error.timeout) == (line, timeout)
    assert (error.stdout, error.stderr) == ("out\npart", "err\n")
    assert sorted(seen) == ["err", "out", "part"]
    until(lambda: not sleeping(number))
    assert run_command(ssh, "echo still there").stdout == "still there\n"


def test_a_timeout_ends_a_process_that_ignores_sigterm(ssh: paramiko.SSHClient) -> None:
    number = unique()
    line = f"trap '' TERM; sleep {number} & while :; do sleep {number}; done"
    with pytest.raises(CommandTimeoutError):
        run_command(ssh, line, timeout=0.3)
    until(lambda: not sleeping(number))


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_a_timeout_on_dropbear(tmp_path: Path, trap: str) -> None:
    """There, a command has no process group of its own."""
    number = unique()
    with Dropbear(tmp_path / "dropbear") as server:
        login: dict[str, Any] = {"key_path": server.key, "wait": 10}
        with CloreClient(state_dir=None).connect_ssh(server.order(), **login) as ssh:
            with pytest.raises(CommandTimeoutError):
                run_command(ssh, f"{trap}sh -c 'sleep {number} & sleep {number}'", timeout=0.5)
            until(lambda: not sleeping(number))
            assert run_command(ssh, "echo still there").stdout == "still there\n"


def test_what_is_written_after_sigterm_is_not_lost(openssh: paramiko.SSHClient) -> None:
    line = "trap 'echo bye; exit 5' TERM; echo hi; while :; do sleep 0.05; done"
    with pytest.raises(CommandTimeoutError) as caught:
        run_command(openssh, line, timeout=enough(openssh))
    assert caught.value.stdout == "hi\nbye\n"


def test_no_timeout_where_it_ends_in_time(openssh: paramiko.SSHClient) -> None:
    for timeout in (None, 30, 1e12, float("inf")):
        assert run_command(openssh, "echo hi", timeout=timeout).stdout == "hi\n"
    # A slow on_output is no timeout of a command that has ended.
    timeout = enough(openssh)
    slow = run_command(
        openssh, "echo hi; echo ho", timeout=timeout, on_output=lambda _: time.sleep(timeout)
    )
    assert slow.stdout == "hi\nho\n"


@pytest.mark.parametrize("ends", [True, False])
def test_a_function_that_takes_longer_than_the_timeout(
    openssh: paramiko.SSHClient, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """A command that has ended keeps its result; one that still runs is ended at the timeout."""
    monkeypatch.setattr(remote, "GRACE", 0.1)
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    number = unique()
    timeout = enough(openssh)
    still: list[list[str]] = []

    def slow(_: OutputLine) -> None:
        time.sleep(timeout + 0.3)
        until(lambda: not sleeping(number))
        still.append(sleeping(number))

    line = "echo hi" if ends else f"echo hi; sleep {number}"
    if ends:
        assert run_command(openssh, line, timeout=timeout, on_output=slow).stdout == "hi\n"
    else:
        with pytest.raises(CommandTimeoutError):
            run_command(openssh, line, timeout=timeout, on_output=slow)
    assert still == [[]]


CTRL_C = """
import sys
from clore_client import CloreClient
from clore_client.ssh.command import Command
order = {"connection": {"ssh": sys.argv[1]}, "order_id": 7}
with CloreClient().connect_ssh(order, key_path=sys.argv[2], wait=20) as ssh:
    try:
        Command(sys.argv[3], on_output=lambda line: print(line, flush=True)).run(ssh)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("line", ["", "trap '' TERM; "])
def test_ctrl_c_ends_the_process(sshd: Sshd, line: str) -> None:
    number = unique()
    command = f"{line}echo started; sleep {number} & sleep {number}; sleep {number}"
    address = sshd.order()["connection"]["ssh"]
    child = subprocess.Popen(
        [sys.executable, "-c", CTRL_C, address, str(sshd.key), command],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "started\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.read() == "interrupted\n"
    assert child.returncode == 0
    until(lambda: not sleeping(number))


def test_background_processes_are_not_waited_for(ssh: paramiko.SSHClient) -> None:
    number = unique()
    try:
        started = time.monotonic()
        assert run_command(ssh, f"nohup sleep {number} >/dev/null 2>&1 & echo on").stdout == "on\n"
        result = run_command(ssh, f"sleep {number} & echo on; echo err >&2; exit 4", check=False)
        assert (result.stdout, result.stderr, result.exit_code) == ("on\n", "err\n", 4)
        result = run_command(ssh, f"sleep {number} & echo on; kill -KILL $$", check=False)
        assert (result.stdout, result.exit_code) == ("on\n", -1)
        assert time.monotonic() - started < 60
        assert sleeping(number)
    finally:
        for pid in sleeping(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def test_nothing_is_lost_where_the_background_holds_the_output(
    openssh: paramiko.SSHClient,
) -> None:
    number = unique()
    try:
        line = f"sleep {number} & head -c 5000000 /dev/zero; printf end"
        seen = []
        result = run_command(openssh, line, on_output=lambda text: seen.append(len(text)))
        assert len(result.stdout) == sum(seen) == 5_000_003
        assert result.stdout.endswith("end")
    finally:
        for pid in sleeping(number):
            os.kill(int(pid), signal.SIGKILL)


def test_a_background_process_that_writes_without_end(openssh: paramiko.SSHClient) -> None:
    word = secrets.token_hex(8)
    assert run_command(openssh, f"yes {word} & echo on", timeout=60).ok
    until(lambda: not subprocess.run(["pgrep", "-f", f"yes {word}"], capture_output=True).stdout)


def test_many_commands_at_once(openssh: paramiko.SSHClient) -> None:
    results: list[str] = []

    def one(number: int) -> None:
        results.append(run_command(openssh, f"sleep 0.1; echo {number}").stdout)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [f"{number}\n" for number in range(8)]


def test_a_broken_connection(sshd: Sshd) -> None:
    ssh = CloreClient().connect_ssh(sshd.order(), key_path=str(sshd.key), wait=20)
    transport = ssh.get_transport()
    assert transport is not None

    def cut(_: OutputLine) -> None:
        transport.sock.shutdown(socket.SHUT_RDWR)

    number = unique()
    with pytest.raises(SSHError, match="broke before the command had ended"):
        run_command(ssh, f"echo x; sleep {number}", on_output=cut)
    with pytest.raises(SSHError, match=r"closed|broke"):
        run_command(ssh, "echo x")
    ssh.close()
    with pytest.raises(SSHError, match="closed"):
        run_command(ssh, "echo x")
    for pid in sleeping(number):
        os.kill(int(pid), signal.SIGKILL)


def test_no_thread_or_file_descriptor_leaks(openssh: paramiko.SSHClient) -> None:
    def fds() -> int:
        return len(os.listdir("/dev/fd"))

    run_command(openssh, "true")
    threads, files = threading.active_count(), fds()
    for number in range(12):
        run_command(openssh, "cat", input=b"x" * 100_000, timeout=30)
        if number % 4 == 0:
            with pytest.raises(CommandTimeoutError):
                run_command(openssh, "sleep 100", timeout=0.05)
    until(lambda: threading.active_count() <= threads)
    assert fds() <= files
    transport: Any = openssh.get_transport()
    until(lambda: not len(transport._channels))


# --- how much is kept ---


def test_a_flood_is_not_kept(openssh: paramiko.SSHClient) -> None:
    seen = [0]

    def on_output(line: OutputLine) -> None:
        seen[0] += len(line)

    line = f"head -c {MB10} /dev/zero; echo error >&2; exit 3"
    result = run_command(openssh, line, max_output=1_000_000, on_output=on_output, check=False)
    assert len(result.stdout) + len(result.stderr) == 1_000_000
    assert result.dropped == MB10 + len("error\n") - 1_000_000
    assert seen == [MB10 + len("error")]
    assert f"{result.dropped} bytes of output dropped" in repr(result)
    assert run_command(openssh, "echo x").dropped == 0
    assert run_command(openssh, "echo x", max_output=0).stdout == ""


# --- hosts that run something else, and deadlines ---


@pytest.mark.parametrize(
    "options", ["ForceCommand echo not yours", "ForceCommand internal-sftp", "ForceCommand false"]
)
def test_a_host_that_runs_a_command_of_its_own(tmp_path: Path, options: str) -> None:
    """The result is an error, and not exit code 0 with the host's text."""
    with running_sshd(tmp_path / "sshd", options) as server:
        client = CloreClient(state_dir=None)
        login: dict[str, Any] = {"key_path": server.key, "wait": 10}
        with pytest.raises(SSHError, match="did not run the command"):
            client.run(server.order(), "echo mine", check=False, **login)


def test_a_login_shell_that_exits(tmp_path: Path) -> None:
    with running_sshd(tmp_path / "sshd") as server:
        (server.folder / "home" / ".bashrc").write_text("echo maintenance; exit 0\n")
        with pytest.raises(SSHError, match=r"did not run the command.*maintenance"):
            CloreClient(state_dir=None).run(server.order(), "ls", key_path=server.key, wait=10)


def test_a_start_up_file_that_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing of the command's input; if it never ends, the command does not run."""
    with running_sshd(tmp_path / "sshd") as server:
        client = CloreClient(state_dir=None)
        login: dict[str, Any] = {"key_path": server.key, "wait": 10}
        start_up = server.folder / "home" / ".bashrc"
        start_up.write_text("read -t 0.5 line\n")
        given = "first\nsecond\n"
        assert client.run(server.order(), "cat", input=given, **login).stdout == given
        start_up.write_text("cat >/dev/null\n")
        assert client.run(server.order(), "echo in", **login).stdout == "in\n"
        monkeypatch.setattr(remote, "START_TIMEOUT", 1.0)
        ran = tmp_path / "ran"
        with pytest.raises(SSHError, match=r"a start-up file there, such as ~/\.bashrc"):
            client.run(server.order(), f"touch {ran}", input=given, **login)
        with pytest.raises(CommandTimeoutError):
            client.run(server.order(), f"touch {ran}", input=given, timeout=0.5, **login)
        assert client.run(server.order(), "echo in", **login).stdout == "in\n"
        assert not ran.exists()


@pytest.mark.parametrize("kind", ["bash", "dash", "zsh", "fish", "tcsh"])
def test_login_shells(tmp_path: Path, kind: str) -> None:
    program = shutil.which(kind)
    options = f'ForceCommand {program} -c "$SSH_ORIGINAL_COMMAND"'
    words = ["a b", "it's", "back\\slash", "\\'", "$HOME", "*", "bang!", "two\nlines", "é",
             "=ls", "%self", "%1", "==", "=a!b", "a=%b"]  # fmt: skip
    with running_sshd(tmp_path / "sshd", options) as server:
        client = CloreClient(state_dir=None)
        login: dict[str, Any] = {"key_path": server.key, "wait": 10}

        def run(command: Any, **more: Any) -> CommandResult:
            return client.run(server.order(), command, check=False, **login, **more)

        assert run("echo in").stdout == "in\n"
        assert run(["printf", "<%s>", *words]).stdout == "".join(f"<{word}>" for word in words)
        for value in (
            "va'lue",
            '\\ ! \\! "$HOME" `x` é\nnew\tline%s\n',
            "",
            "!",
            "=ls",
            "%self",
            "%1",
        ):
            env = {"NAME": value, "OTHER": "other"}
            result = run("printenv NAME; printenv OTHER", env=env)
            assert (result.stdout, result.stderr) == (f"{value}\nother\n", "")
            assert run(["printenv", "NAME"], env=env).stdout == f"{value}\n"
            assert run("cat; exit 3", env=env, input="in").exit_code == 3
        assert run("setenv X 1 && printenv X", env={"Y": "2"}).stdout == "1\n" * (kind == "tcsh")
        with pytest.raises(CommandTimeoutError):
            run("sleep 60", timeout=1)


def trickle(peer: socket.socket) -> None:
    """Send a handshake that never ends, one byte at a time."""
    peer.sendall(b"SSH-2.0-x\r\n\0\0\x0f\xfc")
    while True:
        peer.sendall(b"\0")
        time.sleep(0.05)


@pytest.mark.parametrize("talk", [trickle, silence])
def test_a_handshake_that_stalls(talk: Any) -> None:
    """The command's timeout limits the login, too."""
    with RawServer(talk) as server:
        started = time.monotonic()
        with pytest.raises(SSHError, match="no SSH at"):
            CloreClient(state_dir=None).run(
                server.order(), "ls", password="x", timeout=0.7, wait=0.3
            )
        assert time.monotonic() - started < 10


# --- the line with the process id ---


@given(st.integers(min_value=1, max_value=40), st.binary(max_size=30), st.binary(max_size=30))
def test_the_line_of_the_process_id(size: int, before: bytes, after: bytes) -> None:
    line = PidLine()
    told = line.prefix.split("'")[1].removeprefix("echo ").removesuffix("$PPID >&2").encode()
    data = before + told + b"4711\n" + after
    got = b"".join(line.remove_from(data[at : at + size]) for at in range(0, len(data), size))
    assert got + line.rest() == before + after
    assert line.pid == 4711


@pytest.mark.parametrize("number", [b"1\n", b"0\n", b"-5\n", b"x\n", b"\n", b"9" * 40, b""])
def test_a_process_id_that_cannot_be(number: bytes) -> None:
    line = PidLine()
    told = line.prefix.split("'")[1].removeprefix("echo ").removesuffix("$PPID >&2").encode()
    data = told + number
    assert line.remove_from(data) + line.rest() == data
    assert line.pid is None


def test_stderr_before_the_process_id_is_limited() -> None:
    line = PidLine()
    noise = b"x" * (3 * MAX_STDERR_BEFORE_PID)
    passed = line.remove_from(noise)
    assert len(noise) - len(passed) <= MAX_STDERR_BEFORE_PID
    told = line.prefix.split("'")[1].removeprefix("echo ").removesuffix("$PPID >&2").encode()
    for piece in (told[:7], told[7:] + b"47", b"11\n", b"more"):
        passed += line.remove_from(piece)
    assert passed + line.rest() == noise + b"more"
    assert line.pid == 4711


def test_start_up_files_that_print_much_on_stderr(tmp_path: Path) -> None:
    with running_sshd(tmp_path / "sshd") as server:
        noise = "head -c 300000 /dev/zero | tr '\\0' x >&2\n"
        (server.folder / "home" / ".bashrc").write_text(noise)
        result = CloreClient(state_dir=None).run(
            server.order(), "cat; echo err >&2", input="in\n", key_path=server.key, wait=10
        )
        assert (result.stdout, result.stderr) == ("in\n", "x" * 300000 + "err\n")


# --- arguments ---


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("", ValueError),
        (" \n", ValueError),
        ([], ValueError),
        ("a\0b", ValueError),
        (["a\0b"], ValueError),
        ("\ud800", ValueError),
        (b"ls", TypeError),
        (5, TypeError),
        (None, TypeError),
        (["nice", 5], TypeError),
        ([b"ls"], TypeError),
        ({"ls": 1}, TypeError),
    ],
)
def test_bad_commands(command: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="command"):
        command_line(command)


@pytest.mark.parametrize(
    "wrong",
    [
        {"check": 1},
        {"check": "no"},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": "5"},
        {"timeout": True},
        {"input": 5},
        {"input": ["x"]},
        {"input": "\ud800"},
        {"env": ["A=b"]},
        {"env": {"A": 5}},
        {"env": {"A B": "x"}},
        {"env": {"A;id": "x"}},
        {"env": {"": "x"}},
        {"env": {5: "x"}},
        {"env": {"A": "x\0"}},
        {"on_output": 5},
        {"max_output": -1},
        {"max_output": 1.5},
    ],
)
def test_bad_arguments(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises((TypeError, ValueError), match=name):
        Command("ls", **wrong)
    with pytest.raises((TypeError, ValueError), match=name):
        run_command(None, "ls", **wrong)  # type: ignore[arg-type]


def test_a_connection_that_is_none() -> None:
    client, order = CloreClient(state_dir=None), {"connection": {"ssh": "ssh a@127.0.0.1 -p 1"}}
    wrong: Any = "no connection"
    for call in (lambda: client.run(order, "ls", ssh=wrong),
                 lambda: client.forward(order, 80, ssh=wrong)):  # fmt: skip
        with pytest.raises(TypeError, match="ssh must be"):
            call()


def test_a_bad_value_of_env_is_not_shown() -> None:
    with pytest.raises(ValueError, match=r"env\['A'\]") as caught:
        Command("ls", env={"A": "hunter2\0"})
    assert "hunter2" not in str(caught.value)


# --- servers that hang, send invalid data or close the connection ---


@contextlib.contextmanager
def connected(server: HostileServer) -> Iterator[paramiko.SSHClient]:
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    with server:
        client.connect("127.0.0.1", server.port, "root", "x", allow_agent=False)
        with client:
            yield client


@pytest.mark.parametrize(
    ("place", "text"),
    [("open", "opened no channel: Timeout"), ("exec", r"did not start the command within 0\.3s")],
)
def test_a_server_that_hangs_before_a_command_runs(
    place: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "START_TIMEOUT", 0.3)
    with connected(HostileServer(hang_at=place)) as ssh:
        started = time.monotonic()
        with pytest.raises(SSHError, match=text):
            run_command(ssh, "ls")
        with pytest.raises(CommandTimeoutError, match=r"within 0\.2s"):
            run_command(ssh, "ls", timeout=0.2)
        assert time.monotonic() - started < 20


def test_a_server_that_says_nothing_of_a_command() -> None:
    with connected(HostileServer()) as ssh, pytest.raises(CommandTimeoutError):
        run_command(ssh, "ls", timeout=0.2)


def test_a_server_that_refuses_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile._Process, "exec_requested", lambda self, command: False)
    with connected(HostileServer()) as ssh:
        with pytest.raises(SSHError, match="did not start the command"):
            run_command(ssh, "ls")


def test_a_server_that_opens_no_channel(tmp_path: Path) -> None:
    with running_sshd(tmp_path / "sshd", "MaxSessions 0") as server:
        with CloreClient().connect_ssh(server.order(), key_path=str(server.key), wait=20) as ssh:
            with pytest.raises(SSHError, match="opened no channel"):
                run_command(ssh, "ls")


async def closes_without_status(command: str, process: Any) -> None:
    process.stdout.write(b"so far\n")


async def breaks_off(command: str, process: Any) -> None:
    process.stdout.write(b"so far\n")
    process.channel.get_connection().abort()


async def tells_a_status_and_breaks_off(command: str, process: Any) -> None:
    process.channel._send_request(b"exit-status", b"\0\0\0\0")
    await asyncio.sleep(0.1)
    process.channel.get_connection().abort()


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (closes_without_status, "without an exit code"),
        (breaks_off, "broke before"),
        (tells_a_status_and_breaks_off, "broke before"),
    ],
)
def test_no_end_is_no_success(run: Run, text: str) -> None:
    with connected(HostileServer(run)) as ssh:
        with pytest.raises(SSHError, match=text) as caught:
            run_command(ssh, "ls", check=False, timeout=20)
        assert not isinstance(caught.value, CommandTimeoutError)


async def stalls(command: str, process: Any) -> None:
    """Stall between the exit status and the rest of the output."""
    process.stderr.write(command.split("echo ")[1].split("$")[0].encode() + b"4711\n")
    process.channel._send_request(b"exit-status", b"\0\0\0\0")
    await asyncio.sleep(0.05)
    time.sleep(1.2)  # the whole server stalls
    process.stdout.write(b"the end\n")


def test_a_slow_network_loses_no_output() -> None:
    with connected(HostileServer(stalls)) as ssh:
        assert run_command(ssh, "ls").stdout == "the end\n"


async def deaf(command: str, process: Any) -> None:
    """Start the command, and stop reading from the connection."""
    process.stderr.write(command.split("echo ")[1].split("$")[0].encode() + b"4711\n")
    await process.stderr.drain()
    connection = process.channel.get_connection()
    sock = connection.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection._transport.pause_reading()
    await hang()


def test_a_server_that_takes_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending hangs then, even of a signal or a close."""
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    with connected(HostileServer(deaf)) as ssh:
        transport: Any = ssh.get_transport()
        transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        started = time.monotonic()
        with pytest.raises(CommandTimeoutError):
            run_command(ssh, "cat", input=b"x" * MB10, timeout=0.5)
        assert time.monotonic() - started < 30
        assert not transport.is_active()
        until(lambda: not [t for t in threading.enumerate() if t.name.startswith("clore-")])
