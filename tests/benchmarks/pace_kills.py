"""Kill processes that hold a send time, and measure the request rate of the others."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from clore_client.api.limiters import FileStore
from clore_client.api.rate_limit import RateLimiter, Turn

from .rows import Row

INTERVAL = 0.05
KILLS, VICTIMS, SURVIVORS = 200, 6, 2


def rows() -> Iterator[Row]:
    """Return the lines about killed processes."""
    closest, longest = kill_processes()
    yield Row(f"{KILLS} killed: closest departures / limit", closest, 0.99, at_least=True)
    yield Row(f"{KILLS} killed: longest time between two, intervals", longest, 3.0)


def kill_processes() -> tuple[float, float]:
    """Return the shortest and the longest time between two requests, in intervals."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        # In a process of its own, as this one may have threads.
        command = [sys.executable, "-m", "tests.benchmarks.pace_kills", f"{folder}/limit", str(log)]
        subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=120)
        sent = sorted(map(float, log.read_text().split()))
    gaps = [(b - a) / INTERVAL for a, b in itertools.pairwise(sent)]
    assert len(gaps) > KILLS / 3
    return min(gaps), max(gaps)


def _work(path: str, log: str) -> None:
    limiter = RateLimiter(FileStore(Path(path)))
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    while True:
        turn = Turn(INTERVAL)
        limiter.wait(turn)
        limiter.before_send(turn)
        os.write(handle, f"{turn.sent_at}\n".encode())


def main() -> None:
    """Write when requests were sent; a process may be killed before it has written that."""
    path, log = sys.argv[1:]

    def forked() -> int:
        if not (pid := os.fork()):
            random.seed()
            _work(path, log)
        return pid

    survivors = [forked() for _ in range(SURVIVORS)]
    victims = [forked() for _ in range(VICTIMS)]
    for _ in range(KILLS):
        time.sleep(random.uniform(0.2, 1) * INTERVAL)
        victim = victims.pop(random.randrange(len(victims)))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        victims.append(forked())
    for pid in survivors + victims:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
