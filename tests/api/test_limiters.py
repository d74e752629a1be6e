"""One rate limit for all processes of a machine, in a file that may be damaged or unusable."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clore_client.api import limiters
from clore_client.api.limiters import (
    LIMIT_PREFIX,
    FallbackStore,
    FileStore,
    dump,
    limit_name,
    limiter_for,
    load,
)
from clore_client.api.rate_limit import (
    ProcessStore,
    RateLimiter,
    Schedule,
    StoreUnavailableError,
    Turn,
)
from tests.benchmarks.pace_kills import kill_processes
from tests.conftest import MakeSim, client_for
from tests.variant import Simulator


def limit_file(folder: Path) -> Path:
    (path,) = folder.glob(f"{LIMIT_PREFIX}*")
    return path


CALLER = """
import sys
from clore_client import CloreClient
url, key, folder, calls = sys.argv[1:]
with CloreClient(key, base_url=url, rate_limit=0.1, state_dir=folder, rate_limit_wait=0) as client:
    for _ in range(int(calls)):
        client.get_wallets()
"""


def test_processes_share_one_pace(make_sim: MakeSim, tmp_path: Path) -> None:
    sim = make_sim(rate_limit=0.08)
    command = [sys.executable, "-c", CALLER, sim.url, sim.api_key, str(tmp_path), "8"]
    callers = [subprocess.Popen(command) for _ in range(4)]
    assert [caller.wait(60) for caller in callers] == [0] * 4
    assert [call.status for call in sim.requests] == [200] * 32
    name = limit_file(tmp_path).name
    assert sim.api_key not in name
    assert limit_file(tmp_path).stat().st_mode & 0o777 == 0o600


def test_processes_killed_at_random_moments() -> None:
    closest, longest = kill_processes()
    assert closest > 0.9
    assert longest < 5  # two intervals may be lost, and this machine may be busy


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 300,
        b"{}",
        b"\n\n\n",
        b"hello\n",
        b"\xff\xfe\n\n\n",
        dump(Schedule())[:-2],
        dump(Schedule()).replace(b"0.0", b"NaN"),
        dump(Schedule()).replace(b"0.0", b"Infinity"),
        dump(Schedule()).replace(b"0.0", b"null"),
        dump(Schedule()).replace(b"last", b"first"),
        dump(Schedule()).replace(b"{}", b'{"create_order": [1.0]}', 1),
        dump(Schedule()).replace(b"{}", b'{"a": ["b", "c", "d", "e"]}'),
        dump(Schedule()).replace(b"{}", b"[]"),
        dump(Schedule()).replace(b"0.0", b"1" + b"0" * 400),
        dump(Schedule()).replace(b"{}", b"[" * 5000),
    ],
)
def test_damaged_content_starts_anew_and_waits_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "limit"
    path.write_bytes(content)
    limiter = RateLimiter(FileStore(path))
    started = time.monotonic()
    for _ in range(2):
        turn = Turn(0.1)
        limiter.wait(turn)
        limiter.sent(turn)
    assert 0.19 < time.monotonic() - started < 60


def changed(**values: Any) -> bytes:
    schedule = Schedule()
    for name, value in values.items():
        setattr(schedule, name, value)
    return dump(schedule)


def test_clocks_that_start_anew(tmp_path: Path) -> None:
    now = time.monotonic()
    entry = {"gone": [0, 0.0, 0.0, now + 1e6]}  # urgent, long before
    for content in (
        changed(last=now + 1e6, interval=0.1, paused_until=-1.0),
        changed(last=now, interval=0.1, waiting=entry),
        changed(spaced={"create_order": [now + 1e6, 0.1]}),
    ):
        path = tmp_path / "limit"
        path.write_bytes(content)
        turn = Turn(0.1, spacing=("create_order", 0.1))
        RateLimiter(FileStore(path)).wait(turn, deadline=time.monotonic() + 60)
    paused = load(changed(paused_until=now + 1e6), now)
    result = paused.poll(Turn(0.1, patience=60), now)
    assert 0 < result.paused <= 3601


def test_a_file_that_can_not_be_used(
    sim: Simulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("file", "loop"):
        caplog.clear()
        client = client_for(sim, state_dir=tmp_path / place)
        for _ in range(3):
            client.get_wallets()
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        fell_back = [text for text in warnings if "only shared within this process" in text]
        assert len(fell_back) == 1
        assert "within this process (for 0 s" in client.describe()


@pytest.mark.parametrize("kind", ["fifo", "folder", "symlink"])
def test_what_stands_in_place_of_the_file(sim: Simulator, tmp_path: Path, kind: str) -> None:
    client = client_for(sim, state_dir=tmp_path)
    client.get_wallets()
    path = limit_file(tmp_path)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "target").write_text("precious")
        path.symlink_to(tmp_path / "target")
    client.get_wallets()
    assert "within this process" in client.describe()
    if kind == "symlink":
        assert (tmp_path / "target").read_text() == "precious"


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk; only the error number differs."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        limiter = limiter_for("http://u", "k", tmp_path)
        limiter.wait(Turn(0.01))
        os._exit(0 if f"[Errno {errno.EFBIG}]" in limiter.level else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class SlowStore:
    """A store that fails, after a time longer than the pause before the next try."""

    level = "nowhere"
    tries = 0

    def apply(self, step: str, turn: Turn) -> Any:
        self.tries += 1
        time.sleep(0.2)
        raise StoreUnavailableError("it failed")


def test_a_store_that_fails_slowly_is_not_tried_for_each_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limiters, "TRY_AGAIN", 0.1)
    slow = SlowStore()
    store = FallbackStore(slow, ProcessStore())
    store.apply("poll", Turn(0))
    store.apply("poll", Turn(0))
    assert slow.tries == 1
    time.sleep(0.1)
    store.apply("poll", Turn(0))
    assert slow.tries == 2


def test_a_holder_that_is_stopped(sim: Simulator, tmp_path: Path) -> None:
    client = client_for(sim, state_dir=tmp_path)
    client.get_wallets()
    with limit_file(tmp_path).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for _ in range(3):
            client.get_wallets()
        assert "another process keeps it locked" in client.describe()


def test_a_fork_while_the_file_is_locked(tmp_path: Path) -> None:
    """The child has a copy of the descriptor, which must not keep the file locked."""
    path = tmp_path / "limit"
    store = FileStore(path)
    pids: list[int] = []

    class Forking(Turn):
        @property
        def rank(self) -> int:
            if len(pids) < 1:
                pids.append(os.fork())
                if not pids[0]:
                    signal.pause()
                    os._exit(0)
            return 1

    store.apply("poll", Forking(0.01))
    try:
        FileStore(path).apply("poll", Turn(0.01))
    finally:
        os.kill(pids[0], signal.SIGKILL)
        os.waitpid(pids[0], 0)


def test_accounts_have_files_of_their_own() -> None:
    assert limit_name("a") == limit_name("a")
    assert limit_name("a") != limit_name("b")


def test_a_folder_that_is_removed_meanwhile(sim: Simulator, tmp_path: Path) -> None:
    client = client_for(sim, state_dir=tmp_path / "state")
    for _ in range(2):
        client.get_wallets()
        limit_file(tmp_path / "state").unlink()
        (tmp_path / "state").rmdir()
    client.get_wallets()
    assert "among all processes" in client.describe()


class Machine:
    """One machine that calls in a loop, with its own schedule and a simulated clock."""

    def __init__(self, start: float, calls: int) -> None:
        self.schedule = Schedule()
        self.at = start
        self.left = calls
        self.turn = Turn(1.1)

    def send(self, accepted: bool, now: float) -> None:
        self.schedule.poll(self.turn, now)
        if accepted:
            self.left -= 1
            if not self.turn.refusals:
                self.schedule.accepted(self.turn, now)
            self.turn = Turn(1.1)
        else:
            self.turn.refusals += 1
            self.schedule.refused(self.turn, now)
        ready = self.schedule.last + self.turn.interval + self.schedule.gap
        self.at = max(now, ready) + random.uniform(0, 0.03)


@pytest.mark.parametrize("number", [2, 4, 8])
def test_machines_without_redis_share_the_api(number: int) -> None:
    """Together they get 85 % of the ideal rate, and each at least half of its share."""
    random.seed(7)
    times, shares = [], []
    for _ in range(10):
        machines = [Machine(random.uniform(0, 1), 100) for _ in range(number)]
        last, now, share = -9.0, 0.0, 0.0
        while busy := [machine for machine in machines if machine.left]:
            machine = min(busy, key=lambda m: m.at)
            now = machine.at
            accepted = now - last >= 1.0
            last = now if accepted else last
            machine.send(accepted, now)
            if not machine.left and not share:
                done = [100 - m.left for m in machines]
                share = min(done) * number / sum(done)
        times.append(number * 100 * 1.1 / now)
        shares.append(share)
    assert sum(times) / 10 > (0.75 if number == 2 else 0.85)
    assert min(shares) > (0.4 if number == 2 else 0.5)


RENTER = """
import sys, time
from clore_client import CloreClient, RentalError
url, key, folder, server = sys.argv[1:]
options = {"rate_limit": 0.05, "create_order_interval": 0.1, "order_lag": 0.3}
with CloreClient(key, base_url=url, state_dir=folder, **options) as client:
    try:
        with client.rent(server_id=int(server), poll_interval=0.05, find_timeout=2):
            print("rented", flush=True)
            time.sleep(3)
    except RentalError as error:
        print("refused", flush=True)
"""


def test_two_processes_rent_the_only_server(make_sim: MakeSim, tmp_path: Path) -> None:
    sim = make_sim()
    server = client_for(sim).find_servers("RTX 4090", min_reliability=96)[0]
    command = [sys.executable, "-c", RENTER, sim.url, sim.api_key, str(tmp_path), str(server.id)]
    renters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(renter.communicate(timeout=60)[0].strip() for renter in renters) == [
        "refused",
        "rented",
    ]
    assert len(sim.orders) == 1
    assert not sim.orders[0].active
