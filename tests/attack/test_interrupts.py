"""Interrupts at every line, and real signals: no order is left running, and nothing hangs.

``CLORE_TEST_INJECTIONS``: the number of injections (600), ``all``, or places such as
``api/rate_limit.py:120,rental/rental.py:``. ``CLORE_TEST_SIGINTS``: the number of real signals at
the end of a block.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest

from clore_client import CloreClient, CloreError, Rental
from tests.attack.injector import Outcome, Place, inject, places, sample, visited
from tests.conftest import MakeSim, client_for, sent_to, until
from tests.variant import Simulator

pytestmark = [
    pytest.mark.internal,
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="these signals are POSIX"),
]

INJECTIONS = os.environ.get("CLORE_TEST_INJECTIONS", "600")
SIGINTS = int(os.environ.get("CLORE_TEST_SIGINTS", "150"))
CALL_LIMIT = 10.0  # seconds after which a call counts as hanging
SCENE_LIMIT = 20.0
SETTLED = 10.0  # seconds after which an interrupted order must have ended
LEAD = 0.001  # seconds from the message to the presser to the end of the block
WINDOW = 200e-6  # seconds around it
INSTANT: dict[str, Any] = {
    "servers": 40,
    "rate_limit": 0,
    "create_order_interval": 0,
    "visible_after": 0,
    "deploy_after": 0,
    "cancel_lingers": 0,
}
BRISK: dict[str, Any] = {"poll_interval": 0.005, "find_timeout": 1.0, "cancel_timeout": 5.0}


@pytest.fixture(autouse=True)
def _ctrl_c_is_as_it_was() -> Iterator[None]:
    """Restore the handler of SIGINT, so that a failed test does not end the test run."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# --- helpers ---


class Hangs(BaseException):
    """A call took too long, and counts as hanging."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise ``Hangs`` in the main thread if the block takes too long."""

    def ring(signum: int, frame: FrameType | None) -> None:
        where = f" in line {frame.f_lineno} of {frame.f_code.co_filename}" if frame else ""
        raise Hangs(f"still there after {seconds:g} s{where}")

    started = time.monotonic()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # an outer block may have a limit
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, outer or seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - started), 1e-3))


class Stage:
    """A client with its own account, so that runs are independent."""

    def __init__(self, sim: Simulator, folder: Path, **options: Any) -> None:
        self.sim = sim
        self.key = sim.add_key()
        settings = {"rate_limit": 0.001, "create_order_interval": 0.001, **options}
        self.client = client_for(
            sim, api_key=self.key, state_dir=folder / self.key[:24], **settings
        )

    def rent(self, **options: Any) -> Rental:
        return self.client.rent(**{**BRISK, **options})

    def running(self) -> set[int]:
        return {order.id for order in self.sim.orders_of(self.key) if order.active}

    def sent(self, endpoint: str) -> int:
        return sum(call.key == self.key for call in sent_to(self.sim, endpoint))

    def close(self) -> None:
        """Cancel the orders that a failure left, so that the next run finds free servers."""
        for order_id in self.running():
            self.sim.end_order(order_id)
        self.client.close()


def words_of(error: BaseException | None) -> str:
    """Return the text and the notes of an exception."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def told(stage: Stage, caught: BaseException | None) -> bool:
    """Return whether an exception names the orders that still run."""
    words = words_of(caught)
    return all(str(order_id) in words for order_id in stage.running())


def soon(condition: Callable[[], bool], seconds: float = SETTLED) -> bool:
    """Return whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.005)
    return True


def complaints_of_rental(stage: Stage, caught: BaseException | None) -> Iterator[str]:
    """Check that no order runs, or that the exception names it and ``leftovers()`` finds it."""
    if soon(lambda: told(stage, caught)) and not stage.running():
        return
    for order_id in stage.running():
        if str(order_id) not in words_of(caught):
            yield f"order {order_id} runs on, and {caught!r} does not say so"
    found = {left.order_id for left in stage.client.leftovers(wait=0).abandoned}
    for order_id in stage.running() - found:
        yield f"order {order_id} runs on, and leftovers() does not find it"


def complaints_of_calls(stage: Stage) -> Iterator[str]:
    """Check that the next call of any thread works, and the next Ctrl-C too."""
    failed: list[BaseException] = []

    def call() -> None:
        try:
            stage.client.get_wallets()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(CALL_LIMIT)
    if thread.is_alive():
        yield "the next call of another thread hangs"
    try:
        with limit(CALL_LIMIT):
            stage.client.get_wallets()
    except (Hangs, CloreError) as error:
        failed.append(error)
    yield from (f"a call afterwards: {error!r}" for error in failed)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        yield "Ctrl-C has no effect any more"
    except KeyboardInterrupt:
        pass


# --- exceptions at every line ---


class Scene:
    """A scenario that is interrupted: its setup, its run, and its checks."""

    options: ClassVar[dict[str, Any]] = {}  # of the simulator

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def run(self) -> None:
        raise NotImplementedError

    def complaints(self, caught: BaseException | None) -> Iterator[str]:
        raise NotImplementedError

    def close(self) -> None:
        self.stage.close()


class RentalScene(Scene):
    """A rental. The scene keeps a reference to it, as a notebook does."""

    rental: Rental | None = None

    def run(self) -> None:
        with self.stage.rent() as self.rental:
            _ = self.rental.order

    def complaints(self, caught: BaseException | None) -> Iterator[str]:
        yield from complaints_of_rental(self.stage, caught)


class StackScene(RentalScene):
    """A rental in an ExitStack, which an interrupt can stop before it calls ``__exit__``.

    The rental then ends with the last reference to it. The frames drop theirs, as at the end of an
    except clause.
    """

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            _ = stack.enter_context(self.stage.rent()).order

    def complaints(self, caught: BaseException | None) -> Iterator[str]:
        if caught is not None:
            traceback.clear_frames(caught.__traceback__)
        yield from super().complaints(caught)


class SearchScene(RentalScene):
    """A rental whose order has no id in the response."""

    options: ClassVar[dict[str, Any]] = {"visible_after": 0.03}

    def run(self) -> None:
        self.stage.sim.faults.add("create_order", "lose_response", key=self.stage.key)
        super().run()


class PurchaseScene(Scene):
    """A plain purchase; after an interrupt, only the user can find its order."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.server_id = stage.client.find_servers()[0]["id"]

    def run(self) -> None:
        self.order()

    def order(self) -> int:
        return int(self.stage.client.create_order(self.server_id, find_timeout=1.0)["order_id"])

    def complaints(self, caught: BaseException | None) -> Iterator[str]:
        stage, again = self.stage, None
        try:
            with limit(CALL_LIMIT):
                again = self.order()
        except CloreError:
            pass
        except Hangs:
            yield "ordering again hangs"
        running = stage.running()
        if len(running) != 1:
            yield f"ordered again, and {sorted(running)} run"
        if again is not None and again not in running:
            yield f"ordering again gave {again}, while {sorted(running)} run"
        left = stage.client.leftovers(wait=0)
        found = {order.id for order in left.unrecorded} | {e.order_id for e in left.abandoned}
        if not running <= found:
            yield f"leftovers() does not tell of {sorted(running - found)}"


class CancelScene(Scene):
    """A plain cancel, which is safe to repeat."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        server_id = stage.client.find_servers()[0]["id"]
        self.order_id = stage.client.create_order(server_id)["order_id"]

    def run(self) -> None:
        self.stage.client.cancel_order(self.order_id)

    def complaints(self, caught: BaseException | None) -> Iterator[str]:
        try:
            with limit(CALL_LIMIT):
                self.stage.client.cancel_order(self.order_id)
        except (CloreError, Hangs) as error:
            yield f"cancelled again: {error!r}"
        if self.stage.running():
            yield f"cancelled again, and order {self.order_id} runs on"


class ReadScene(Scene):
    """Reads that wait for the rate limit, while another thread waits too."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        stage.client.rate_limit = 0.002
        self.other = Busy(stage)

    def run(self) -> None:
        client = self.stage.client
        client.get_wallets()
        client.get_orders()
        client.get_marketplace()
        client.get_wallets()

    def complaints(self, caught: BaseException | None) -> Iterator[str]:
        yield from self.other.complaints()

    def close(self) -> None:
        self.other.stop()
        super().close()


class Busy:
    """A thread that makes requests all the time."""

    def __init__(self, stage: Stage) -> None:
        self.calls = 0
        self.failed: list[BaseException] = []
        self._stage = stage
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                self._stage.client.get_wallets()
            except BaseException as error:
                self.failed.append(error)
                return
            self.calls += 1

    def complaints(self) -> Iterator[str]:
        """Check that the thread still makes requests."""
        before = self.calls
        if not soon(lambda: self.calls > before + 1 or bool(self.failed)):
            yield f"the other thread hangs after {before} calls"
        for error in self.failed:
            yield f"the other thread: {error!r}"

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(CALL_LIMIT)


SCENES: dict[str, tuple[type[Scene], float]] = {  # with its share of the sample
    "rental": (RentalScene, 0.35),
    "stack": (StackScene, 0.10),
    "search": (SearchScene, 0.15),
    "purchase": (PurchaseScene, 0.15),
    "cancel": (CancelScene, 0.10),
    "reads": (ReadScene, 0.15),
}
KINDS: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit)


def chosen(every: Sequence[Place], share: float, seed: int) -> list[Place]:
    """Return the places that this test run uses."""
    if INJECTIONS == "all":
        return list(every)
    if ":" in INJECTIONS:
        wanted = INJECTIONS.split(",")
        return [p for p in every if any(f"{p.file}:{p.line}".startswith(w) for w in wanted)]
    return sample(every, math.ceil(int(INJECTIONS) * share / len(KINDS)), seed)


def complaints_of_injection(
    scene: Scene, outcome: Outcome, kind: type[BaseException]
) -> Iterator[str]:
    if type(outcome.caught) is not kind:
        yield f"what came through is {outcome.caught!r}"
    yield from scene.complaints(outcome.caught)
    yield from complaints_of_calls(scene.stage)


def injected(
    make: Callable[[], Scene], place: Place, kind: type[BaseException]
) -> list[str] | None:
    """Interrupt a scene at a place; return the violations, or None if it was not reached."""
    wrong: list[str] = []
    at = f"{kind.__name__} at {place}"
    try:
        with limit(SCENE_LIMIT + SETTLED + 3 * CALL_LIMIT), contextlib.closing(make()) as scene:
            with limit(SCENE_LIMIT):
                outcome = inject(scene.run, place, kind)
            if outcome.injected is None:
                return None
            at += f" in {outcome.function}"
            for complaint in complaints_of_injection(scene, outcome, kind):
                wrong.append(f"{at}: {complaint}")
    except Hangs as hangs:
        wrong.append(f"{at}: {hangs}")
    return wrong


def listed(make: Callable[[], Scene]) -> list[Place]:
    """List the places of a scene."""
    with limit(SCENE_LIMIT):
        for _ in range(2):  # the first run has the late imports
            with contextlib.closing(make()) as scene:
                seen = visited(scene.run)
                assert list(scene.complaints(None)) == []
    return places(seen)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", SCENES)
def test_an_exception_at_any_line(
    make_sim: MakeSim, tmp_path: Path, name: str, kind: type[BaseException]
) -> None:
    made, share = SCENES[name]
    sim = make_sim(**{**INSTANT, **made.options})

    def make() -> Scene:
        return made(Stage(sim, tmp_path))

    every = listed(make)
    wrong: list[str] = []
    came_by = bad = 0
    for place in chosen(every, share, KINDS.index(kind)):
        found = injected(make, place, kind)
        came_by += found is not None
        bad += bool(found)
        wrong += found or []
        if bad == (20 if INJECTIONS == "all" else 3):  # a hanging scene may block all later ones
            break
    print(f"{name}, {kind.__name__}: {came_by} injections of {len(every)} places")
    assert not wrong, f"{bad} of {came_by} injections:\n" + "\n".join(wrong)
    assert came_by or ":" in INJECTIONS


def test_the_injector_restores_the_tracing() -> None:
    def theirs(frame: FrameType, event: str, argument: Any) -> None:
        return None

    def scenario() -> None:
        CloreClient.parse_ssh_connection({})

    scenario()  # it imports modules
    before = sys.gettrace()
    sys.settrace(theirs)
    try:
        seen = visited(scenario)
        after_looking = sys.gettrace()
        outcome = inject(scenario, places(seen)[-1], SystemExit)
        after_injecting = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after_looking is after_injecting is theirs
    assert outcome.caught is outcome.injected
    assert isinstance(outcome.caught, SystemExit)


# --- real signals ---

PRESSES = """
import os, signal, sys, time
parent = os.getppid()
for line in sys.stdin:
    for moment in map(float, line.split()):
        while time.monotonic() < moment:
            pass
        if os.getppid() == parent:
            os.kill(parent, signal.SIGINT)
    print(flush=True)
"""


class Presser:
    """A process that sends SIGINT to this one at given moments.

    A thread of this process would send it late, while the main thread is busy.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PRESSES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._told = self._done = 0
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    def _count(self) -> None:
        assert self._process.stdout is not None
        while self._process.stdout.read(1):
            self._done += 1

    def press(self, moment: float) -> None:
        """Send a signal at a monotonic time."""
        assert self._process.stdin is not None
        self._told += 1
        self._process.stdin.write(f"{moment!r}\n".encode())

    def wait(self) -> None:
        """Wait until all signals have been sent."""
        until(lambda: self._done >= self._told)

    def settle(self) -> bool:
        """Wait until no signal can arrive any more; return whether one did."""
        try:
            self.wait()
            time.sleep(0.05)
        except KeyboardInterrupt:
            return True
        return False

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._thread.join()


@pytest.fixture
def presser() -> Iterator[Presser]:
    made = Presser()
    yield made
    made.close()


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the interrupts that were lost, because a finalizer can't raise exceptions.

    The simulator's objects are finalized in its own thread, while the garbage collector is off.
    """
    found: list[str] = []

    def note(what: sys.UnraisableHookArgs) -> None:
        found.append(f"{what.exc_value!r} in {what.object!r}")

    monkeypatch.setattr(sys, "unraisablehook", note)
    gc.disable()
    yield found
    gc.enable()


def pressed(presser: Presser, action: Callable[[], object]) -> list[BaseException]:
    """Run a function that presses Ctrl-C once; return all exceptions, also late ones."""
    came: list[BaseException] = []
    try:
        with limit(SCENE_LIMIT):
            action()
            presser.wait()
            time.sleep(0.05)
    except (Exception, KeyboardInterrupt, Hangs) as error:
        came.append(error)
    if not any(isinstance(error, KeyboardInterrupt) for error in came) and presser.settle():
        came.append(KeyboardInterrupt("late"))
    return came


def complaints_of_press(stage: Stage, came: list[BaseException]) -> Iterator[str]:
    if [type(error) for error in came] != [KeyboardInterrupt]:
        yield f"what came through is {came!r}"
    yield from complaints_of_rental(stage, came[0] if came else None)
    yield from complaints_of_calls(stage)


def at_the_end(stage: Stage, presser: Presser, offset: float) -> None:
    with stage.rent():
        end = time.monotonic() + LEAD
        presser.press(end + offset)
        while time.monotonic() < end:
            pass


def at_any_moment(stage: Stage, presser: Presser, offset: float) -> None:
    presser.press(time.monotonic() + offset)
    with stage.rent():
        pass


@pytest.mark.parametrize(
    ("scene", "count", "offsets"),
    [
        (at_the_end, SIGINTS, (-WINDOW, WINDOW)),
        (at_any_moment, math.ceil(SIGINTS / 3), (0.0, 0.03)),
    ],
    ids=["at the end", "at any moment"],
)
def test_signals(
    make_sim: MakeSim,
    tmp_path: Path,
    presser: Presser,
    lost: list[str],
    scene: Callable[[Stage, Presser, float], None],
    count: int,
    offsets: tuple[float, float],
) -> None:
    sim, rng = make_sim(**INSTANT), random.Random(6)
    wrong: list[str] = []
    for number in range(count):
        stage, offset = Stage(sim, tmp_path), rng.uniform(*offsets)
        came = pressed(presser, lambda: scene(stage, presser, offset))  # noqa: B023
        found = [*complaints_of_press(stage, came), *lost]
        wrong += [f"{number}, {offset * 1e6:.0f} us: {text}" for text in found]
        lost.clear()
        stage.close()
        if number % 100 == 99:
            gc.collect()
    assert not wrong, f"{len(wrong)} in {count} rentals:\n" + "\n".join(wrong[:100])


def test_signals_beside_a_busy_thread(
    make_sim: MakeSim, tmp_path: Path, presser: Presser, lost: list[str]
) -> None:
    sim, rng = make_sim(**INSTANT), random.Random(7)
    stage = Stage(sim, tmp_path)
    busy = Busy(stage)

    def read() -> None:
        at = time.monotonic() + rng.uniform(0.0, 0.004)
        presser.press(at)
        while True:
            stage.client.get_wallets()
            if time.monotonic() > at + 1:
                # The interpreter drops an exception in the finalizer of a response's
                # objects (io.IOBase), so the signal is sent again.
                at += 1
                presser.press(at)

    wrong: list[str] = []
    for number in range(2 * SIGINTS):
        came = pressed(presser, read)
        if [type(error) for error in came] != [KeyboardInterrupt]:
            wrong.append(f"{number}: what came through is {came!r} {lost}")
            break
    wrong += [*busy.complaints(), *complaints_of_calls(stage)]
    busy.stop()
    assert wrong == []
    with limit(SCENE_LIMIT), stage.rent() as rental:
        assert stage.running() == {rental.order.id}
    assert stage.running() == set()


# More than needed, because two signals can reach the interpreter as one.
UNTIL_IT_WORKS = (0.3,) * 6


class Hand(threading.Thread):
    """Press Ctrl-C when a condition is true, and again after each pause, as needed."""

    def __init__(self, reached: Callable[[], bool], *pauses: float) -> None:
        super().__init__(daemon=True)
        self.presses: list[float] = []
        self._reached = reached
        self._pauses = pauses
        self._let_go = threading.Event()

    def run(self) -> None:
        while not self._reached():
            if self._let_go.wait(0.002):
                return
        for pause in (0.0, *self._pauses):
            if self._let_go.wait(pause):
                return
            self.presses.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    def around(self, action: Callable[[], object]) -> BaseException | None:
        """Run a function, and return its exception."""
        came: BaseException | None = None
        try:
            with limit(SCENE_LIMIT):
                self.start()
                action()
        except (Exception, KeyboardInterrupt, Hangs) as error:
            came = error
        try:
            self._let_go.set()
            self.join()
        except KeyboardInterrupt:  # a late signal
            self.join()
        return came


def enter(stage: Stage, **options: Any) -> None:
    with stage.rent(**options):
        time.sleep(SCENE_LIMIT)


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("lose_response", {}),
        ("http_500_after_commit", {}),
        ("hang_after_commit", {"seconds": 0.3}),
        ("slow", {"seconds": 0.3}),
    ],
)
@pytest.mark.parametrize("gap", [0.02, 0.15, 0.3])
def test_a_second_signal_while_the_order_is_searched(
    make_sim: MakeSim, tmp_path: Path, fault: str, options: dict[str, Any], gap: float
) -> None:
    sim = make_sim(**{**INSTANT, "visible_after": 0.6})
    stage = Stage(sim, tmp_path)
    sim.faults.add("create_order", fault, **options)
    hand = Hand(lambda: bool(stage.running()), gap)
    came = hand.around(lambda: enter(stage, find_timeout=10, cancel_timeout=20))
    assert type(came) is KeyboardInterrupt
    assert len(hand.presses) == 2
    assert len(sim.orders) == 1
    assert list(complaints_of_rental(stage, came)) == []
    assert stage.running() == set()
    assert list(complaints_of_calls(stage)) == []


@pytest.mark.parametrize("within_block", [True, False])
def test_a_third_signal_stops_a_cancel_that_fails(
    make_sim: MakeSim, tmp_path: Path, within_block: bool
) -> None:
    sim = make_sim(**INSTANT)
    stage = Stage(sim, tmp_path)
    order_ids: list[int] = []

    def act() -> None:
        with stage.rent(cancel_timeout=60) as rental:
            sim.faults.add("cancel_order", "http_500_before_commit", times=math.inf)
            order_ids.append(rental.order.id or 0)
            if within_block:
                time.sleep(SCENE_LIMIT)

    hand = Hand(
        lambda: bool(order_ids if within_block else stage.sent("cancel_order")), *UNTIL_IT_WORKS
    )
    came = hand.around(act)
    took = time.monotonic() - hand.presses[0]
    assert type(came) is KeyboardInterrupt
    assert len(hand.presses) >= 3
    assert took < SCENE_LIMIT / 2
    assert str(order_ids[0]) in words_of(came)
    assert [left.order_id for left in stage.client.leftovers(wait=0).abandoned] == order_ids
    assert list(complaints_of_calls(stage)) == []
    sim.faults.clear()
    assert stage.client.cancel_leftovers(wait=0) in ([], order_ids)  # one cancel had been sent
    assert stage.running() == set()


def test_two_signals_do_not_stop_a_cancel(make_sim: MakeSim, tmp_path: Path) -> None:
    sim = make_sim(**INSTANT)
    stage = Stage(sim, tmp_path)

    def act() -> None:
        with stage.rent(cancel_timeout=60):
            sim.faults.add("cancel_order", "http_500_before_commit", times=7)

    hand = Hand(lambda: bool(stage.sent("cancel_order")), 0.03)
    came = hand.around(act)
    assert type(came) is KeyboardInterrupt
    assert len(hand.presses) == 2
    assert soon(lambda: not stage.running())


def test_a_third_signal_stops_the_search(make_sim: MakeSim, tmp_path: Path) -> None:
    sim = make_sim(**{**INSTANT, "visible_after": 4.0})
    stage = Stage(sim, tmp_path)
    sim.faults.add("create_order", "lose_response")
    hand = Hand(lambda: bool(stage.running()), *UNTIL_IT_WORKS)
    came = hand.around(lambda: enter(stage, find_timeout=60, cancel_timeout=60))
    assert type(came) is KeyboardInterrupt
    assert len(hand.presses) >= 3
    (order,) = sim.orders
    assert str(order.server_id) in words_of(came)
    assert stage.running() == {order.id}
    until(lambda: stage.client.leftovers(wait=0).abandoned)
    assert stage.client.cancel_leftovers(wait=0) == [order.id]
    assert stage.running() == set()


# --- in the block ---


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def test_a_signal_within_a_function_of_the_block(make_sim: MakeSim, tmp_path: Path) -> None:
    stage = Stage(make_sim(**INSTANT), tmp_path)

    def outer(depth: int) -> None:
        try:
            press() if not depth else outer(depth - 1)
        finally:
            stage.client.get_wallets()

    with pytest.raises(KeyboardInterrupt) as caught:
        with limit(SCENE_LIMIT), stage.rent():
            outer(5)
    assert list(complaints_of_rental(stage, caught.value)) == []
    assert stage.running() == set()
    assert list(complaints_of_calls(stage)) == []


def test_a_signal_that_the_block_catches(make_sim: MakeSim, tmp_path: Path) -> None:
    stage = Stage(make_sim(**INSTANT), tmp_path)
    with limit(SCENE_LIMIT), stage.rent(max_hours=1.0) as rental:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                press()
            order_id = rental.order.id
            assert order_id is not None
            assert stage.running() == {order_id}
            order = stage.client.get_order(order_id)
            assert order is not None
            assert order.status == "running"
            assert rental.cost_usd > 0
        time.sleep(0.5)  # if the rental had ended, its order would have ended by now
        assert stage.running() == {order_id}
    assert stage.running() == set()


def test_a_signal_during_a_call_of_the_rental(make_sim: MakeSim, tmp_path: Path) -> None:
    pytest.importorskip("paramiko")
    stage = Stage(make_sim(**{**INSTANT, "ssh": True}), tmp_path)
    with limit(SCENE_LIMIT), stage.rent() as rental:
        assert rental.run("echo one").stdout == "one\n"
        begun = time.monotonic()
        hand = Hand(lambda: time.monotonic() > begun + 0.5)
        came = hand.around(lambda: rental.run("sleep 30"))
        assert type(came) is KeyboardInterrupt
        assert rental.run("echo two").stdout == "two\n"
    assert stage.running() == set()
