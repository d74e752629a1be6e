"""Raise an exception at a chosen line of the package, like a signal at this line.

A scenario is a callable. ``visited`` runs it and counts which lines of the package the calling
thread executes; ``inject`` runs it again and raises at one of them. Other threads run normally,
just as signals don't interrupt them. Lines of the simulator don't count.

The interpreter looks for signals only after calls, at the end of loops, and at the beginning of
Python functions. So these are left out: lines that do nothing, such as ``try:``; the step from the
last line under a ``with`` statement to an ``__exit__`` in C, such as that of a lock; and the moment
in which a generator continues, because the garbage collector may be ending it.
"""

from __future__ import annotations

import dis
import gc
import inspect
import linecache
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import clore_client

PACKAGE = os.path.dirname(os.path.abspath(clore_client.__file__)) + os.sep
SIMULATOR = os.path.join(PACKAGE, "simulator") + os.sep
VISITS = 2
NOTHING = dis.opmap["NOP"]
SAID = {"line": "", "call": " (entry)", "leave": " (way out)"}

Scenario = Callable[[], object]
Spot = tuple[str, int, str]  # file within the package, line, event: a key of SAID


@dataclass(frozen=True, order=True)
class Place:
    """The n-th visit to a line in the run of a scenario.

    Attributes:
        event: the beginning of a ``"line"``, the entry of a function (``"call"``), or that of an
            ``__exit__`` in Python by which a ``with`` statement is left (``"leave"``).
    """

    file: str
    line: int
    event: str
    visit: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}{SAID[self.event]}, visit {self.visit}"


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        injected: the exception that was raised; None if the run did not reach the place.
        caught: the exception of the scenario, or None.
        function: the function of the place.
    """

    injected: BaseException | None = None
    caught: BaseException | None = None
    function: str = ""


def visited(scenario: Scenario) -> Counter[Spot]:
    """Run a scenario, and count how often each spot of the package was executed."""
    seen: Counter[Spot] = Counter()

    def look(spot: Spot, frame: FrameType) -> None:
        seen[spot] += 1

    with _tracing(look):
        scenario()
    return seen


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
    """Run a scenario, raise at a place, and return the result."""
    outcome, visits = Outcome(), 0

    def look(spot: Spot, frame: FrameType) -> None:
        nonlocal visits
        if outcome.injected is not None or spot != (place.file, place.line, place.event):
            return
        visits += 1
        if visits == place.visit:
            outcome.function = frame.f_code.co_name
            outcome.injected = kind(f"injected at {place}")
            raise outcome.injected

    try:
        with _tracing(look):
            scenario()
    except BaseException as error:
        outcome.caught = error
    return outcome


class _Tracer:
    """Call ``look`` at each moment in the package at which a signal can interrupt."""

    def __init__(self, look: Callable[[Spot, FrameType], None]) -> None:
        self._look = look
        self._entered: dict[tuple[CodeType, int], int] = {}  # a line's first instruction
        self._leaving: Spot | None = None
        self._bytecode: dict[CodeType, bytes] = {}

    def on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Handle the start of any function; a trace function."""
        code, leaving, self._leaving = frame.f_code, self._leaving, None
        if leaving is not None and code.co_name == "__exit__":
            self._look(leaving, frame)
        if not _counts(code):
            return None
        if not code.co_flags & inspect.CO_GENERATOR:
            self._look((_file(code), code.co_firstlineno, "call"), frame)
        return self.on_line

    def on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Handle events in a function of the package; a local trace function."""
        self._leaving = None
        if event == "line" and not self._does_nothing(frame):
            spot = _file(frame.f_code), frame.f_lineno, "line"
            if self._leaves(frame):
                self._leaving = (*spot[:2], "leave")
            else:
                self._look(spot, frame)
        return self.on_line

    def _does_nothing(self, frame: FrameType) -> bool:
        code = frame.f_code
        if code not in self._bytecode:
            self._bytecode[code] = code.co_code
        return self._bytecode[code][frame.f_lasti] == NOTHING

    def _leaves(self, frame: FrameType) -> bool:
        """Return whether this is the end of a ``with`` statement, after its block."""
        code, line = frame.f_code, frame.f_lineno
        if frame.f_lasti <= self._entered.setdefault((code, line), frame.f_lasti):
            return False
        return linecache.getline(code.co_filename, line).lstrip().startswith("with ")


def _file(code: CodeType) -> str:
    return code.co_filename.removeprefix(PACKAGE)


def _counts(code: CodeType) -> bool:
    """Return whether code is a function of the package."""
    if not code.co_filename.startswith(PACKAGE) or code.co_filename.startswith(SIMULATOR):
        return False
    return code.co_name != "<module>"


@contextmanager
def _tracing(look: Callable[[Spot, FrameType], None]) -> Iterator[None]:
    """Call ``look`` while the block runs, and restore other tracing after it.

    The garbage collector is off meanwhile, because it would find objects of earlier runs.
    """
    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()
    sys.settrace(_Tracer(look).on_call)
    try:
        yield
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
