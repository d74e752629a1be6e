"""Report the progress of long calls, and show it in a terminal or a notebook."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from clore_client.errors import printable
from clore_client.validation import check_bool, check_callback

LINE_INTERVAL = 5.0  # seconds between two lines about the same step
SIZE_UNITS = ("bytes", "kB", "MB", "GB", "TB")


class ProgressEvent:
    """A step of a long call.

    Attributes:
        name: the step: ``"rent"``, ``"order"``, ``"deploy"``, ``"running"``, ``"ssh"``,
            ``"upload"``, ``"download"``, ``"http"`` or ``"job"``.
        number: bytes so far for ``"upload"``, ``"download"`` and ``"job"``; else seconds so far.
        total: bytes in all, or None if unknown.
        text: a line for people, with control characters escaped.
    """

    def __init__(self, name: str, number: float, text: str, total: float | None = None) -> None:
        self.name = name
        self.number = number
        self.text = printable(text, 300)
        self.total = total

    def __repr__(self) -> str:
        return f"<ProgressEvent {self.name} {self.number:g}: {self.text}>"


Report = Callable[[ProgressEvent], object]


class ProgressOptions:
    """Check the arguments ``on_progress`` and ``progress``, and report to them.

    Threads that share this object report one at a time.
    """

    def __init__(self, on_progress: Any = None, progress: Any = False) -> None:
        check_callback("on_progress", on_progress, 1)
        self.on_progress: Report | None = on_progress
        self.shown = check_bool("progress", progress)
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[Report | None]:
        """Yield a function that reports an event, or None if nothing receives events."""
        display = open_display() if self.shown else None
        reports = [] if self.on_progress is None else [self.on_progress]
        if display is not None:
            reports.append(display.show)

        def report_to_all(event: ProgressEvent) -> None:
            with self._turn:
                for report in reports:
                    report(event)

        try:
            yield report_to_all if reports else None
        finally:
            if display is not None:
                display.close()


def open_display() -> PlainDisplay | BarDisplay | None:
    """Return a display for this terminal or notebook; None if there is neither."""
    notebook = "ipykernel" in sys.modules
    if not notebook and not (sys.stderr is not None and sys.stderr.isatty()):
        return None
    try:
        tqdm = importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return PlainDisplay(sys.stderr)
    return BarDisplay(tqdm)


class PlainDisplay:
    """Write a line for each step, and one every few seconds while a step lasts."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._name = ""
        self._next = 0.0  # by time.monotonic()

    def show(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        if event.name == self._name and now < self._next and event.number != event.total:
            return
        self._name, self._next = event.name, now + LINE_INTERVAL
        self._stream.write(f"{event.text}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the display; the lines stay."""


class BarDisplay:
    """Show each step with tqdm: a bar where the total is known, else a line that changes."""

    def __init__(self, tqdm: Any) -> None:
        self._tqdm = tqdm
        self._bar: Any = None
        self._name = ""

    def show(self, event: ProgressEvent) -> None:
        if self._bar is None or event.name != self._name:
            self.close()
            self._name = event.name
            form = {} if event.total is not None else {"bar_format": "{desc}"}
            self._bar = self._tqdm(total=event.total, unit="B", unit_scale=True, **form)
        if event.total is None:
            self._bar.set_description_str(event.text)
        else:
            self._bar.set_description_str(event.name, refresh=False)
            self._bar.total = event.total
            self._bar.update(event.number - self._bar.n)

    def close(self) -> None:
        """End the display; its last state stays."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def readable_size(size: float) -> str:
    """Return a number of bytes for people: ``"1.2 GB"``."""
    power = 0
    while size >= 1000 and power < len(SIZE_UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.0f} {SIZE_UNITS[power]}" if power == 0 else f"{size:.1f} {SIZE_UNITS[power]}"


def readable_seconds(seconds: float) -> str:
    """Return a duration for people: ``"34 s"``, ``"2 min 5 s"``, ``"3 h 2 min"``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
