"""Test jobs: they outlive connections, sessions and processes, and no output is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, JobError, JobTimeoutError, OrderEndedError, SSHError
from clore_client.ssh.jobs import Job, JobState
from tests.conftest import FORMS, MakeSim, client_for, until
from tests.hostile import HostileServer
from tests.relay import Relay
from tests.ssh.test_command import sleeping, unique
from tests.ssh.test_hostile_transfer import says
from tests.ssh.test_hosts import SHELLS, busybox, host
from tests.ssh.test_transfer import Far
from tests.sshd import Dropbear, Sshd, running_sshd
from tests.test_client import plain_server

pytestmark = pytest.mark.internal

# Kills the processes of a session that ends, as systemd does with KillMode=control-group.
KILLING = """#!/bin/sh
sh -c "$SSH_ORIGINAL_COMMAND"
code=$?
for pid in $(pgrep -s 0); do [ $pid = $$ ] || kill -KILL $pid; done
exit $code
"""


TOOLS = ["cat", "chmod", "date", "dd", "head", "mkdir", "rm", "sh", "sleep", "stat", "tail", "tr",
         "wc"]  # fmt: skip


class JobHost:
    """A host with its login."""

    def __init__(self, client: CloreClient, order: Any, home: Path, **login: Any) -> None:
        self.client, self.order, self.home, self.login = client, order, home, login

    def start(self, command: Any, **options: Any) -> Any:
        return self.client.start(self.order, command, **options, **self.login)

    def job(self, name: str) -> Any:
        return self.client.job(self.order, name, **self.login)

    def jobs(self) -> Any:
        return self.client.jobs(self.order, **self.login)

    def through(self, relay: Relay) -> JobHost:
        user = self.order["connection"]["ssh"].split()[1].partition("@")[0]
        order = dict(self.order, connection={"ssh": f"ssh {user}@127.0.0.1 -p {relay.port}"})
        return JobHost(self.client, order, self.home, **self.login)


@pytest.fixture
def client() -> CloreClient:
    return CloreClient(state_dir=None)


@pytest.fixture
def job_host(client: CloreClient, tmp_path: Path) -> Iterator[JobHost]:
    """A host with a real sshd and its own home directory."""
    with running_sshd(tmp_path / "sshd") as server:
        yield JobHost(client, server.order(), server.folder / "home", key_path=server.key)


@contextlib.contextmanager
def killing_host(folder: Path) -> Iterator[Sshd]:
    """Run a host whose sshd kills the processes of a session that ends."""
    folder.mkdir()
    script = folder / "kill-rest"
    script.write_text(KILLING)
    script.chmod(0o755)
    options = f"PasswordAuthentication no\nForceCommand {script}"
    with running_sshd(folder / "sshd", options) as server:
        yield server


def collected(job: Any) -> tuple[int | None, list[str]]:
    lines: list[str] = []
    return job.follow(lines.append), lines


# --- starting ---


def test_output_and_exit_code(job_host: JobHost) -> None:
    job = job_host.start("echo out; echo err >&2; printf last; exit 7", name="seven")
    assert collected(job) == (7, ["out", "err", "last"])
    assert (job.status, job.exit_code, job.tail(1), job.tail(2)) == (
        "exited",
        7,
        "last",
        "err\nlast",
    )
    assert job.tail(0) == ""
    assert repr(job) == "<Job 'seven': exited, exit code 7>"
    assert abs(job.started - time.time()) < 60
    again = job_host.job("seven")
    assert (again.status, again.exit_code, again.wait()) == ("exited", 7, 7)
    assert collected(again) == (7, ["out", "err", "last"])
    assert again.command == "echo out; echo err >&2; printf last; exit 7"


def test_env_cwd_and_input(job_host: JobHost) -> None:
    (job_host.home / "it's here").mkdir()
    env = {"WORD": "a 'b' \"c\" \\d\n$HOME", "EMPTY": "", "PATH": "/usr/bin:/bin:/nowhere"}
    command = 'printf "%s|" "$WORD" "$EMPTY" "$PATH" "$PWD"; cat; umask'
    job = job_host.start(command, env=env, cwd="~/it's here")
    assert job.wait() == 0
    here = f"{job_host.home}/it's here"
    assert job.tail() == f"{env['WORD']}||{env['PATH']}|{here}|0022\n"
    assert job.name.startswith("job-")
    job = job_host.start(["printf", "%s", "a b\\c'd$x"])
    assert (job.wait(), job.tail()) == (0, "a b\\c'd$x")
    job = job_host.start("pwd; echo $LC_ALL.")
    assert (job.wait(), job.tail()) == (0, f"{job_host.home}\n.\n")


def test_a_variable_is_in_no_list_of_processes(job_host: JobHost) -> None:
    number = unique()
    job = job_host.start(f"sleep {number}", env={"TOKEN": "s3cret-token"})
    until(lambda: sleeping(number))
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert number in shown.stdout
    assert "s3cret-token" not in shown.stdout
    for path in job_host.home.rglob("*"):
        assert path.is_dir() or b"s3cret-token" not in path.read_bytes()
    job.stop()


def test_files_are_private(job_host: JobHost) -> None:
    job = job_host.start("true", name="x")
    job.wait()
    for path in [job_host.home / ".clore", *(job_host.home / ".clore").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_name_is_taken_once(job_host: JobHost) -> None:
    number = unique()
    job = job_host.start(f"sleep {number}", name="train")
    with pytest.raises(JobError, match="already a job train"):
        job_host.start("echo no", name="train")
    assert len(until(lambda: sleeping(number))) >= 1
    with pytest.raises(JobError, match="still runs: stop"):
        job.remove()
    assert [j.name for j in job_host.jobs()] == ["train"]
    assert job_host.jobs()[0].status == "running"
    job.stop()
    with pytest.raises(JobError, match="already a job train"):
        job_host.start("echo no", name="train")
    job.remove()
    assert job_host.jobs() == []
    assert job_host.start("echo yes", name="train").wait() == 0


def test_many_start_the_same_name_at_once(job_host: JobHost) -> None:
    results: list[Any] = []

    def start() -> None:
        try:
            results.append(job_host.start("echo x >>count; sleep 1", name="one"))
        except JobError as error:
            results.append(error)

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([r for r in results if not isinstance(r, JobError)]) == 1
    job_host.job("one").wait()
    assert (job_host.home / "count").read_text() == "x\n"


def test_what_is_not_there(job_host: JobHost) -> None:
    with pytest.raises(JobError, match="no job 'none'"):
        job_host.job("none")
    with pytest.raises(JobError, match="no directory"):
        job_host.start("true", cwd="~/missing", name="x")
    assert job_host.jobs() == []
    job = job_host.start("true", name="x")
    job.wait()
    job.remove()
    for call in (job.tail, job.follow, job.wait, job.stop, job.remove):
        with pytest.raises(JobError, match="no job x"):
            call()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "a/b"}, "name must consist"),
        ({"name": ".."}, "name must consist"),
        ({"name": "-rf"}, "name must consist"),
        ({"name": ""}, "name must consist"),
        ({"name": "x" * 65}, "name must consist"),
        ({"name": 5}, "name must be a string"),
        ({"cwd": 5}, "cwd must be a path"),
        ({"cwd": ""}, "cwd must not be empty"),
        ({"cwd": "~other/x"}, "~/"),
        ({"env": {"a b": "x"}}, "not a valid name"),
        ({"wait": "x"}, "wait must be a number"),
        ({"nothing": 5}, "no argument 'nothing'"),
    ],
)
def test_arguments_that_can_not_be_right(
    client: CloreClient, arguments: dict[str, Any], said: str
) -> None:
    order = {"connection": {"ssh": "ssh root@127.0.0.1 -p 9"}}
    with pytest.raises((TypeError, ValueError), match=said):
        client.start(order, "true", **arguments)
    with pytest.raises(ValueError, match="command must not be empty"):
        client.start(order, " ")


@pytest.mark.parametrize("text", ["", "running", "exited 3", "sleeping - 5", "exited 9999 5"])
def test_a_state_that_can_not_be_read(text: str) -> None:
    assert JobState.parse("exited 3 5").exit_code == 3
    with pytest.raises(SSHError, match="can't be read"):
        JobState.parse(text)


# --- what a job outlives ---


def test_it_outlives_this_process(job_host: JobHost) -> None:
    code = (
        "import sys; from clore_client import CloreClient\n"
        f"CloreClient(state_dir=None).start({job_host.order!r}, 'sleep 1; echo done', name='x',"
        f" key_path={str(job_host.login['key_path'])!r})\n"
        "import os; os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    job = job_host.job("x")
    assert job.status == "running"
    assert collected(job) == (0, ["done"])


def test_a_host_that_kills_what_a_session_leaves(client: CloreClient, tmp_path: Path) -> None:
    with killing_host(tmp_path / "host") as server:
        job_host = JobHost(client, server.order(), server.folder / "home", key_path=server.key)
        number = unique()
        client.run(job_host.order, f"sleep {number} >/dev/null 2>&1 &", **job_host.login)
        until(lambda: not sleeping(number))  # the host does kill
        job = job_host.start("sleep 1; echo done", name="x")
        assert job.status == "running"
        assert collected(job) == (0, ["done"])


@pytest.mark.parametrize("kind", [*SHELLS, "dropbear"])
def test_hosts(client: CloreClient, tmp_path: Path, kind: str) -> None:
    with host(client, tmp_path / "host", kind) as far:
        check_host(far)


def test_a_userland_of_busybox(client: CloreClient) -> None:
    with busybox(client) as far:
        check_host(far)


def check_host(far: Far) -> None:
    job_host = JobHost(far.client, far.order, far.home, **far.login)
    number = unique()
    line = "printf '%s\\n' 'a\\b'; sleep 0.5; echo $X; exit 3"
    job = job_host.start(["sh", "-c", line], env={"X": "y z"})
    assert collected(job) == (3, ["a\\b", "y z"])
    job = job_host.start(["sh", "-c", f"sleep {number} & sleep {number}"], name="long")
    assert job.status == job_host.job("long").status == "running"
    until(lambda: len(sleeping(number)) >= 2)
    with pytest.raises(JobTimeoutError, match="did not end in time"):
        job.wait(timeout=0.5)
    job.stop()
    assert sleeping(number) == []
    assert (job.status, job.exit_code) == ("killed", 143)
    assert sorted(j.status for j in job_host.jobs()) == ["exited", "killed"]


def test_a_host_without_setsid(client: CloreClient, tmp_path: Path) -> None:
    """The job has no session of its own, and can be stopped."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(os.path.realpath(shutil.which(tool) or ""))
    home = f"{tmp_path}/sshd/home PATH={folder}"
    with running_sshd(tmp_path / "sshd", home=home) as server:
        far = Far(client, server.order(), tmp_path, key_path=server.key)
        check_host(far)


# --- following ---


def test_a_connection_that_breaks_in_the_middle_of_a_line(job_host: JobHost) -> None:
    count = 300
    command = (
        f"i=0; while [ $i -lt {count} ]; do i=$((i+1)); printf 'li'; sleep 0.01; echo ne $i; done"
    )
    lines: list[str] = []
    cuts = 0
    with Relay(int(job_host.order["connection"]["ssh"].split()[-1])) as relay:

        def take(line: str) -> None:
            nonlocal cuts
            lines.append(line)
            if len(lines) % 60 == 0:
                cuts += 1
                relay.cut()
                threading.Timer(0.1, relay.mend).start()

        job = job_host.through(relay).start(command, name="lines")
        assert job.follow(take) == 0
    assert cuts == 5
    assert lines == [f"line {number}" for number in range(1, count + 1)]


def test_a_link_that_goes_dead(job_host: JobHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clore_client.ssh.jobs.JOB_TIMEOUT", 1.0)
    lines: list[str] = []
    with Relay(int(job_host.order["connection"]["ssh"].split()[-1])) as relay:

        def take(line: str) -> None:
            lines.append(line)
            if len(lines) == 3:
                relay.frozen = True
                threading.Timer(1.5, setattr, (relay, "frozen", False)).start()

        step = "i=$((i+1)); echo $i; sleep 0.2"
        job = job_host.through(relay).start(f"i=0; while [ $i -lt 20 ]; do {step}; done")
        assert job.follow(take) == 0
    assert lines == [str(number) for number in range(1, 21)]


@pytest.mark.parametrize("broken", ["frozen", "cut", "own"])
def test_the_timeout_on_a_dead_link(job_host: JobHost, broken: str) -> None:
    with Relay(int(job_host.order["connection"]["ssh"].split()[-1])) as relay:
        far = job_host.through(relay)
        job = far.start("echo x; sleep 60", name="x")
        if broken == "own":
            far.login = {"ssh": job_host.client.connect_ssh(far.order, **far.login)}
        followed = far.job("x")

        def stop(_: str) -> None:
            if broken == "cut":
                relay.cut()
            relay.frozen = True

        started = time.monotonic()
        with pytest.raises(JobTimeoutError, match="may still run"):
            followed.follow(stop, timeout=3)
        assert 2 < time.monotonic() - started < 25
        if broken == "own":
            far.login["ssh"].close()
        relay.frozen = False
        relay.mend()
        job_host.job(job.name).stop()


def test_no_time_is_enough_for_a_job_that_has_ended(job_host: JobHost) -> None:
    job = job_host.start("exit 3", name="x")
    job.wait(timeout=60)
    fresh = job_host.job("x")
    fresh._state = JobState("running")  # as if it had ended since then
    assert fresh.wait(timeout=0) == 3


def test_much_output(job_host: JobHost) -> None:
    job = job_host.start("seq 1 400000", name="much")
    code, lines = collected(job)
    assert (code, lines) == (0, [str(n) for n in range(1, 400001)])


def test_bytes_that_are_no_utf8(job_host: JobHost) -> None:
    job = job_host.start("printf 'a\\377b\\nc'")
    assert collected(job) == (0, ["a\ufffdb", "c"])
    assert job.tail() == "a\ufffdb\nc"


def test_the_host_goes_away_while_it_is_followed(job_host: JobHost) -> None:
    with Relay(int(job_host.order["connection"]["ssh"].split()[-1])) as relay:
        far = job_host.through(relay)
        far.login["wait"] = 1
        job = far.start("sleep 5")
        threading.Timer(0.5, relay.cut).start()
        with pytest.raises(SSHError, match="within 1s"):
            job.follow(print)
        relay.mend()
        job.stop()


def test_an_error_of_the_callback_comes_through(job_host: JobHost) -> None:
    job = job_host.start("echo x; sleep 60", name="x")

    def fail(line: str) -> None:
        raise OSError(f"mine: {line}")

    with pytest.raises(OSError, match="mine: x"):
        job.follow(fail)
    assert job.status == "running"
    job.stop()


def test_progress(job_host: JobHost) -> None:
    events: list[Any] = []
    job_host.start("echo 12345; sleep 1").follow(None, on_progress=events.append)
    assert {event.name for event in events} == {"job"}
    job = job_host.start("echo 12345; sleep 1", name="x")
    job.follow(lambda line: None, on_progress=events.append)
    assert events[-1].number == 6
    assert events[-1].text == "job x: 6 bytes of output"

    def fail(event: Any) -> None:
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        job.follow(lambda line: None, on_progress=fail)


def test_ones_own_connection(job_host: JobHost) -> None:
    with job_host.client.connect_ssh(job_host.order, **job_host.login) as ssh:
        client, order = job_host.client, job_host.order
        job = client.start(order, "echo a; sleep 0.5; echo b", name="x", ssh=ssh)
        assert collected(job) == (0, ["a", "b"])
        assert client.job(order, "x", ssh=ssh).exit_code == 0
        assert len(client.jobs(order, ssh=ssh)) == 1
        job = client.start(order, "sleep 60", ssh=ssh)
    with pytest.raises(SSHError, match="closed"):
        job.follow(print)
    job_host.job(job.name).stop()


# --- the end of a job ---


def test_stop_what_ignores_a_signal(job_host: JobHost) -> None:
    number = unique()
    job = job_host.start(f"trap '' TERM; while :; do sleep {number}; done", name="x")
    until(lambda: sleeping(number))
    started = time.monotonic()
    job.stop(grace=1)
    assert 1 <= time.monotonic() - started < 15
    assert sleeping(number) == []
    assert (job.status, job.exit_code) == ("killed", 137)
    job.stop()  # stopping it twice does no harm


def test_two_stop_at_once(job_host: JobHost) -> None:
    number = unique()
    job = job_host.start(f"sleep {number} & sleep {number}", name="x")
    failures: list[BaseException] = []

    def stop() -> None:
        try:
            job_host.job("x").stop()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=stop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sleeping(number) == []
    assert (job.status, job.exit_code) == ("killed", 143)


def test_stop_what_left_the_session(job_host: JobHost) -> None:
    number = unique()
    job = job_host.start(f"setsid sleep {number} & sleep {number}", name="x")
    until(lambda: len(sleeping(number)) >= 2)
    job.stop()
    assert sleeping(number) == []


def test_a_job_that_cleans_up(job_host: JobHost) -> None:
    job = job_host.start("trap 'echo bye; exit 0' TERM; echo on; while :; do sleep 0.1; done")
    until(lambda: job.tail() == "on\n")
    job.stop()
    assert (job.status, job.exit_code) == ("exited", 0)
    assert job.tail().endswith("\nbye\n")


def test_a_job_that_is_killed_with_its_shell(job_host: JobHost) -> None:
    number = unique()
    job = job_host.start(f"sleep {number}", name="x")
    until(lambda: sleeping(number))
    pid = int((job_host.home / ".clore/jobs/x/pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    until(lambda: job_host.job("x").status == "killed")
    assert (job.exit_code, job.wait()) == (None, None)
    job.stop()  # with the processes that it left
    assert sleeping(number) == []


def test_a_host_that_was_started_anew(job_host: JobHost) -> None:
    number = unique()
    job = job_host.start(f"sleep {number}", name="x")
    until(lambda: sleeping(number))
    note = job_host.home / ".clore/jobs/x/pid"
    pid, ticks, boot, began = note.read_text().split()
    note.write_text(f"{pid} {ticks} other/1 {began}\n")
    assert job_host.job("x").status == "lost"
    job_host.job("x").stop()  # the pid belongs to another process: nothing is killed
    assert sleeping(number)
    note.write_text(f"{pid} {ticks} {boot} {began}\n")
    job.stop()


def test_a_job_that_is_gone_with_its_host(job_host: JobHost) -> None:
    job = job_host.start("sleep 3", name="x")
    shutil.rmtree(job_host.home / ".clore")
    assert (job.status, job.exit_code) == ("lost", None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["cancelled here", "cancelled elsewhere", "ended by the host"])
@pytest.mark.parametrize("own", [False, True])
def test_jobs_of_an_order_that_has_ended_are_lost(
    make_sim: MakeSim, form: str, how: str, own: bool
) -> None:
    """With connections of the client, and with one of the user."""
    sim = make_sim(form=form, ssh=True, rate_limit=0)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    order = client.wait_for_order(order, timeout=20, poll_interval=0.02)
    login: dict[str, Any] = {"ssh": client.connect_ssh(order)} if own else {}
    followed, waited, asked, other = [
        client.start(order, "echo in; sleep 60", **login) for _ in range(4)
    ]

    def end() -> None:
        if how == "ended by the host":
            sim.end_order(order["order_id"])
        else:
            (client if how == "cancelled here" else client_for(sim)).cancel_order(order)

    def end_soon(line: str) -> None:
        threading.Thread(target=end).start()

    with contextlib.suppress(SSHError) if own else contextlib.nullcontext():
        # The user's own connection may break before the API lists the end.
        assert followed.follow(end_soon) is None
    until(lambda: order.id not in [active.id for active in client_for(sim).get_orders()])
    assert followed.status == "lost"
    assert (waited.wait(), waited.status) == (None, "lost")
    assert (asked.status, asked.exit_code) == ("lost", None)
    assert (other.follow(), other.status) == (None, "lost")
    for call in (followed.tail, lambda: client.job(order, "x", **login),
                 lambda: client.jobs(order["order_id"], **login)):  # fmt: skip
        with pytest.raises(OrderEndedError):
            call()


def test_a_start_that_was_cut_off(job_host: JobHost) -> None:
    (job_host.home / ".clore/jobs/x").mkdir(parents=True)
    job = job_host.job("x")
    assert job.status == "lost"
    job.stop()
    job.remove()
    assert job_host.jobs() == []


def test_the_number_of_another_process(job_host: JobHost) -> None:
    """Another process can get the pid of a job that has ended."""
    job = job_host.start("true", name="x")
    job.wait()
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        folder = job_host.home / ".clore/jobs/x"
        _, ticks, boot, began = (folder / "pid").read_text().split()
        (folder / "pid").write_text(f"{other.pid} {int(ticks) - 1} {boot} {began}\n")
        (folder / "exit").write_text("-\n")
        assert job_host.job("x").status == "killed"
        job_host.job("x").stop()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


EVIL = b"\x1b[2J\x1b]0;owned\x07"


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\n" * 9, EVIL + b"\n", b"no " + EVIL + b"\n", b"job ../x running - 5\nx\nend\n",
        b"job x sleeping - 5\n\nend\n", b"job x running - 5\n", b"0\n", b"99999999\nx",
        b"-5\nx", b"end " + EVIL + b"\n", b"end running 3 \n", b"started " + EVIL + b"\n", b"tail",
        b"x" * 10_000_000,
    ],
    ids=range(15),
)  # fmt: skip
def test_a_hostile_host(
    client: CloreClient, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each invalid reply is an error of the job, and its text is escaped for a terminal."""
    monkeypatch.setattr("clore_client.ssh.jobs.JOB_TIMEOUT", 1.0)
    monkeypatch.setattr("clore_client.ssh.jobs.RECONNECT_PAUSE", 0.01)
    verbs = ("job", "jobs", "tail", "follow", "stop", "remove")
    with HostileServer(says(dict.fromkeys(verbs, answer))) as server:
        order = server.order()
        login: dict[str, Any] = {"password": "x", "wait": 5}
        host = client._ssh.jobs(order, None, login)
        job = Job(host, "x", "true", JobState("running"))
        calls: list[Any] = [lambda: client.start(order, "true", **login), job.stop, job.remove,
                            lambda: client.jobs(order, **login),
                            lambda: job.status, lambda: job.follow(lambda line: None)]  # fmt: skip
        for call in calls:
            with pytest.raises(SSHError) as caught:
                call()
            assert not set(str(caught.value)) & set("\x1b\x07")


def test_a_host_that_tells_too_much(client: CloreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clore_client.ssh.jobs.MAX_TAIL", 1000)
    with HostileServer(says({"tail": b"tail\n" + b"x" * 100_000})) as server:
        host = client._ssh.jobs(server.order(), None, {"password": "x", "wait": 5})
        with pytest.raises(JobError, match="more than"):
            Job(host, "x", "true", JobState("running")).tail()


def test_dropbear_that_is_cut(client: CloreClient, tmp_path: Path) -> None:
    with Dropbear(tmp_path / "dropbear") as dropbear, Relay(dropbear.port) as relay:
        plain = JobHost(client, dropbear.order(), tmp_path, key_path=dropbear.key)
        job = plain.through(relay).start("for i in 1 2 3; do echo $i; sleep 0.5; done", name="x")
        threading.Timer(0.7, relay.cut).start()
        threading.Timer(0.9, relay.mend).start()
        assert collected(job) == (0, ["1", "2", "3"])


def test_a_host_without_a_shell(client: CloreClient, tmp_path: Path) -> None:
    with host(client, tmp_path, "sftp") as far:
        login: dict[str, Any] = {"key_path": far.login["key_path"]}
        calls: list[Any] = [lambda: client.start(far.order, "true", **login),
                            lambda: client.jobs(far.order, **login),
                            lambda: client.job(far.order, "x", **login)]  # fmt: skip
        for call in calls:
            with pytest.raises(JobError, match="the host runs no shell"):
                call()


def test_a_quiet_job_behind_a_link_that_often_breaks(
    client: CloreClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clore_client.ssh.jobs.RECONNECT_PAUSE", 0.05)
    with running_sshd(tmp_path / "sshd") as sshd, Relay(sshd.port) as relay:
        plain = JobHost(client, sshd.order(), tmp_path, key_path=sshd.key)
        command = f"cd {tmp_path}; until [ -e end ]; do sleep 0.1; done"
        job = plain.through(relay).start(command, name="x")

        def cut_often() -> None:
            for _ in range(4):
                time.sleep(1.2)
                relay.cut()
                relay.mend()
            (tmp_path / "end").touch()

        cutting = threading.Thread(target=cut_often)
        cutting.start()
        assert collected(job) == (0, [])
        cutting.join()
