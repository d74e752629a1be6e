"""Real processes that are killed, terminated and forked while they rent.

``CLORE_TEST_KILLS=200 pytest tests/rental/test_kill.py`` kills 200 times instead of 20.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clore_client import CloreClient
from tests.conftest import MakeSim, client_for, until
from tests.variant import Simulator

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="these signals are POSIX"),
    pytest.mark.internal,
]

KILLS = int(os.environ.get("CLORE_TEST_KILLS", "20"))
HEAD = r"""
import os, signal, sys, threading, time
from clore_client import CloreClient, SignalExit

client = CloreClient(rate_limit=0.002, create_order_interval=0.002, backoff=0.01, timeout=5)
options = dict(poll_interval=0.02, find_timeout=10, cancel_timeout=20, attempts=9)

def say(*words):
    # In one write: text streams of Python mix up what several threads say at once.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())

say("ready")
sys.stdin.readline()
"""


class Child:
    """A process that rents, and prints each step."""

    def __init__(self, sim: Simulator, code: str, folder: Path) -> None:
        self.sim = sim
        environment = {
            **os.environ,
            "CLORE_API_KEY": sim.api_key,
            "CLORE_BASE_URL": sim.url,
            "XDG_STATE_HOME": str(folder),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD + textwrap.dedent(code)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def heard(self, word: str) -> str:
        """Wait for a line that starts with ``word``, and return the rest."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        assert self.process.stderr is not None
        raise AssertionError(f"it never said {word}: {self.process.stderr.read()}")

    def go(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def end(self, signum: int = signal.SIGKILL) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        self.process.communicate(timeout=60)
        return self.process.returncode

    def end_after(self, rng: random.Random, most: int) -> None:
        """Kill the process at a random moment, after up to ``most`` further requests.

        After a random time, it would not have begun on a busy machine.
        """
        last = len(self.sim.requests) + rng.randint(0, most)
        until(lambda: len(self.sim.requests) >= last, 60)
        time.sleep(rng.uniform(0.0, 0.03))
        self.end()


Start = Callable[[str], Child]


@pytest.fixture(params=["live", "documented"])
def busy(request: pytest.FixtureRequest, make_sim: MakeSim) -> Simulator:
    # Several processes share a key here, without a common rate limit.
    limits = {"rate_limit": 0, "create_order_interval": 0}
    return make_sim(form=request.param, deploy_after=0.15, visible_after=0.08, **limits)


@pytest.fixture
def start(busy: Simulator, tmp_path: Path) -> Iterator[Start]:
    children: list[Child] = []

    def begin(code: str) -> Child:
        children.append(Child(busy, code, tmp_path))
        return children[-1]

    yield begin
    for child in children:
        if child.process.poll() is None:
            child.end()


@pytest.fixture
def observer(busy: Simulator, tmp_path: Path) -> CloreClient:
    """Return a client like that of the next process."""
    return client_for(
        busy, state_dir=tmp_path / "clore-client", rate_limit=0.002, create_order_interval=0.002
    )


def active(sim: Simulator) -> set[int]:
    return {order.id for order in sim.orders if order.active}


KEEPS = """
with client.rent(**options) as rental:
    say("rents", rental.order.id)
    sys.stdin.readline()
say("gone")
"""
AGAIN_AND_AGAIN = """
say("off")
while True:
    with client.rent(**options) as rental:
        time.sleep(0.1)
"""


def test_sigkill_at_random_moments(
    busy: Simulator, start: Start, observer: CloreClient, tmp_path: Path
) -> None:
    rng = random.Random(7)
    living = start(KEEPS)
    living.go()
    kept = int(living.heard("rents"))
    following = start(AGAIN_AND_AGAIN)
    left = 0
    for _ in range(KILLS):
        child, following = following, start(AGAIN_AND_AGAIN)
        child.heard("ready")
        child.go()
        child.heard("off")
        child.end_after(rng, 25)
        # Wait for requests that were on their way, and until ended orders are not listed.
        time.sleep(0.15)
        found = observer.leftovers(wait=0.3)
        running = active(busy) - {kept}
        assert {e.order_id for e in found.abandoned} == running
        assert found.unrecorded == []
        assert kept in active(busy)
        left += len(running)
        assert set(observer.cancel_leftovers(wait=0)) == running
        assert active(busy) == {kept}
    assert left > KILLS / 4  # otherwise the test tested nothing
    living.go()
    living.heard("gone")
    assert active(busy) == set()


KEEPS_AND_ATTACHES = """
import random
say("off")
while True:
    with client.rent(**options) as rental:
        if random.random() < 0.3:
            continue
        rental.keep(max_hours=1e-9)
    if random.random() < 0.5:
        client.attach(rental.order).keep(max_hours=random.choice([1e-9, None]))
    if random.random() < 0.5:
        with client.attach(rental.order, end=True, cancel_timeout=20):
            pass
"""


def test_sigkill_between_any_two_steps(
    busy: Simulator, start: Start, observer: CloreClient, tmp_path: Path
) -> None:
    """Find each order once, and its login, whenever the process was killed."""
    rng = random.Random(8)
    kept = left = 0
    for _ in range(KILLS):
        child = start(KEEPS_AND_ATTACHES)
        child.heard("ready")
        child.go()
        child.heard("off")
        child.end_after(rng, 60)
        time.sleep(0.2)
        running = active(busy)
        assert {o["order_id"] for o in observer.get_orders() if o.get("ssh_password")} == running
        found = observer.leftovers(wait=0.3)
        # Orders that were neither kept nor ended yet are of a dead process; attach() without
        # end=True has none of its own.
        seen = [left.order_id for left in [*found.abandoned, *found.kept]]
        seen += [order.id for order in found.unrecorded]
        assert sorted(seen, key=str) == sorted(running)
        kept, left = kept + len(found.kept), left + len(running)
        ended = {*observer.cancel_leftovers(wait=0), *observer.cancel_overdue()}
        assert ended <= running
        observer.cancel_all()
        assert active(busy) == set()
        assert not observer.leftovers(wait=0)
        files = (tmp_path / "clore-client" / "credentials").glob("*")
        assert [path for path in files if "-server-" not in path.name] == []
    assert kept  # otherwise the test tested nothing
    assert left > KILLS / 4


def test_sigkill_of_a_rental_that_runs(
    busy: Simulator, start: Start, observer: CloreClient
) -> None:
    child = start(KEEPS)
    child.go()
    order_id = int(child.heard("rents"))
    assert observer.leftovers(wait=0).abandoned == []
    assert not observer.leftovers(wait=0)
    assert observer.cancel_leftovers(wait=0) == []
    child.end()
    found = observer.leftovers(wait=0)
    assert found
    assert [e.order_id for e in found.abandoned] == [order_id]
    assert found.abandoned[0].pid == child.process.pid


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_rental(
    busy: Simulator, start: Start, observer: CloreClient, signum: signal.Signals
) -> None:
    child = start(KEEPS)
    child.go()
    child.heard("rents")
    code = child.end(signum)
    assert active(busy) == set()
    assert code == (-signal.SIGINT if signum == signal.SIGINT else 128 + signum)
    assert observer.leftovers(wait=0).abandoned == []


def test_a_signal_while_the_order_is_made(busy: Simulator, start: Start) -> None:
    for pause in (0.05, 0.2):
        child = start(KEEPS)
        child.heard("ready")
        child.go()
        time.sleep(pause)
        assert child.end(signal.SIGTERM) in (143, -signal.SIGTERM)
        assert active(busy) == set()


def test_a_signal_ends_the_rentals_of_all_threads(busy: Simulator, start: Start) -> None:
    child = start(
        """
        def work():
            try:
                with client.rent(**options) as rental:
                    say("rents", rental.order.id)
                    if threading.current_thread().daemon:
                        time.sleep(3600)
                    while not client.get_order(rental.order.id).has_ended:
                        time.sleep(0.05)
                    rental.run("true")
            except BaseException as error:
                say("raised", type(error).__name__)
                raise

        client.handle_signals()
        threads = [threading.Thread(target=work, daemon=d) for d in (False, True, False)]
        for thread in threads:
            thread.start()
        # No join(): up to Python 3.12 a thread whose join a signal interrupts counts as ended, and
        # the interpreter's exit does not wait for it.
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
        """
    )
    child.go()
    for _ in range(3):
        child.heard("rents")
    assert len(active(busy)) == 3
    child.process.send_signal(signal.SIGTERM)
    until(lambda: not active(busy))
    assert child.heard("raised") == "SignalExit"
    assert child.heard("raised") == "SignalExit"
    assert child.process.wait(timeout=30) == 143


def test_the_exit_ends_the_rentals_of_daemon_threads(busy: Simulator, start: Start) -> None:
    child = start(
        """
        def work():
            with client.rent(**options) as rental:
                say("rents", rental.order.id)
                time.sleep(3600)

        threading.Thread(target=work, daemon=True).start()
        sys.stdin.readline()
        """
    )
    child.go()
    child.heard("rents")
    child.go()
    assert child.process.wait(timeout=30) == 0
    assert active(busy) == set()


@pytest.mark.parametrize("way", ["SIGTERM", "exception", "exit", "pool"])
def test_a_forked_workers_death_does_not_end_the_rental(
    busy: Simulator, start: Start, observer: CloreClient, way: str
) -> None:
    child = start(
        f"""
        import warnings
        warnings.simplefilter("ignore")
        way = {way!r}
        with client.rent(**options) as rental:
            if way == "pool":
                import multiprocessing
                with multiprocessing.get_context("fork").Pool(2) as pool:
                    pool.map(abs, range(4))
                say("worker died", 0)
            else:
                pid = os.fork()
                if not pid:
                    if way == "SIGTERM":
                        say("worker", os.getpid())
                        time.sleep(60)
                    elif way == "exception":
                        sys.stderr = open(os.devnull, "w")
                        raise ValueError("of the worker")
                    sys.exit(3)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                say("worker died", status)
            sys.stdin.readline()
        """
    )
    child.go()
    if way == "SIGTERM":
        os.kill(int(child.heard("worker")), signal.SIGTERM)
    status = int(child.heard("worker died"))
    assert status == {"SIGTERM": -signal.SIGTERM, "exception": 1, "exit": 3, "pool": 0}[way]
    assert len(active(busy)) == 1
    assert observer.leftovers(wait=0).abandoned == []
    child.go()
    assert child.process.wait(timeout=30) == 0
    assert active(busy) == set()
