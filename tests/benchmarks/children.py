"""Run servers in child processes, so that their CPU time is not measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Child:
    """A child process that reads and writes lines of JSON until its input ends."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            text=True,
        )

    def read(self) -> Any:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def finish(self) -> None:
        """Close its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def stop(self) -> None:
        """Wait until it ends, and kill it if it does not."""
        self.finish()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def child(module: str, *arguments: str) -> Iterator[Child]:
    """Run a module of this package until the block ends."""
    it = Child(module, *arguments)
    try:
        yield it
    finally:
        it.stop()
