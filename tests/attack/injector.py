"""Raises an exception at a chosen line of the package, as a signal that comes there would.

A scenario is a callable. ``visited`` runs it and counts which lines of the package the calling
thread executes; ``inject`` runs it again and raises at one of them. Other threads are not touched,
just as signals don't touch them. The simulator's lines don't count: it stands for the API.

Left out is where no signal can come: between the last line under ``with lock:`` and the unlocking,
as the interpreter looks for signals only after calls, at the end of loops, and at the beginning of
Python functions; and where a generator goes on, as that may be its end as garbage.
"""

from __future__ import annotations

import gc
import inspect
import linecache
import os
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import clore_client

PACKAGE = os.path.dirname(os.path.abspath(clore_client.__file__)) + os.sep
SIMULATOR = os.path.join(PACKAGE, "simulator") + os.sep
VISITS = 2
LOCKS = (type(threading.Lock()), type(threading.RLock()))
WITH_NAME = re.compile(r"\s*with ([\w.]+):")

Scenario = Callable[[], object]
Spot = tuple[str, int, str]  # file within the package, line, event: "line" or "call"


@dataclass(frozen=True, order=True)
class Place:
    """A moment in the run of a scenario: a line, or the entry of a function, for the n-th time."""

    file: str
    line: int
    event: str
    visit: int

    def __str__(self) -> str:
        entry = "" if self.event == "line" else " (entry)"
        return f"{self.file}:{self.line}{entry}, visit {self.visit}"


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        injected: what was raised at the place; None when the run did not come by.
        caught: what left the scenario.
        function: where the place is.
    """

    injected: BaseException | None = None
    caught: BaseException | None = None
    function: str = ""


def visited(scenario: Scenario) -> Counter[Spot]:
    """Run a scenario, and count how often each spot of the package was executed."""
    seen = _Visits()
    with _tracing(lambda frame, event: seen.note(frame, event)):
        scenario()
    return seen.counts


def places(seen: Counter[Spot], visits: int = VISITS) -> list[Place]:
    """List each spot with its first visits, in a fixed order."""
    return sorted(
        Place(*spot, visit)
        for spot, count in seen.items()
        for visit in range(1, min(count, visits) + 1)
    )


def sample(every: Sequence[Place], count: int, seed: int) -> list[Place]:
    """Choose some places, the same ones for the same seed, in a fixed order."""
    return sorted(random.Random(seed).sample(every, min(count, len(every))))


def inject(scenario: Scenario, place: Place, kind: type[BaseException]) -> Outcome:
    """Run a scenario, raise at a place, and tell what left the scenario."""
    outcome, seen = Outcome(), _Visits()

    def look(frame: FrameType, event: str) -> None:
        if outcome.injected is None and seen.note(frame, event) == place:
            outcome.function = frame.f_code.co_name
            outcome.injected = kind(f"injected at {place}")
            raise outcome.injected

    try:
        with _tracing(look):
            scenario()
    except BaseException as error:
        outcome.caught = error
    return outcome


class _Visits:
    """Counts visits to spots."""

    def __init__(self) -> None:
        self.counts: Counter[Spot] = Counter()
        self._first: dict[Spot, int] = {}  # the instruction at which a line was entered first

    def note(self, frame: FrameType, event: str) -> Place | None:
        """Count a visit; None where no signal can come."""
        code = frame.f_code
        line = code.co_firstlineno if event == "call" else frame.f_lineno
        spot = code.co_filename.removeprefix(PACKAGE), line, event
        if event == "call" and code.co_flags & inspect.CO_GENERATOR:
            return None
        first = self._first.setdefault(spot, frame.f_lasti)
        if event == "line" and frame.f_lasti > first and _holds_lock(frame):
            return None
        self.counts[spot] += 1
        return Place(*spot, self.counts[spot])


def _holds_lock(frame: FrameType) -> bool:
    """Whether the line of a frame is ``with lock:``, for a lock of the interpreter's own."""
    source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    match = WITH_NAME.match(source)
    if match is None:
        return False
    first, *rest = match[1].split(".")
    value = frame.f_locals.get(first, frame.f_globals.get(first))
    for name in rest:
        value = getattr(value, name, None)
    return isinstance(value, LOCKS)


def _counts(frame: FrameType) -> bool:
    """Whether a frame runs code of the package's functions."""
    code = frame.f_code
    if not code.co_filename.startswith(PACKAGE) or code.co_filename.startswith(SIMULATOR):
        return False
    return code.co_name != "<module>"


@contextmanager
def _tracing(look: Callable[[FrameType, str], object]) -> Iterator[None]:
    """Call ``look`` for each event of the package in this thread; other tracing comes back.

    No garbage is collected meanwhile: it would be of earlier runs.
    """

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            look(frame, event)
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        if not _counts(frame):
            return None
        if event == "call":
            look(frame, event)
        return on_line

    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
