"""What ``import clore_client`` costs, and what it must not import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .rows import Row, compare

_ROOT = Path(__file__).parents[2]
# The CPU time of the import alone: the interpreter's own start would hide a difference.
_TIMED = """
import time
start = time.process_time()
import {0}
print(time.process_time() - start)
"""
_HEAVY = """
import sys, clore_client
print(sum(name in sys.modules for name in ("paramiko", "scp")))
"""


class _Meter:
    """A clock that goes on by what the last child told."""

    def __init__(self, bytecode: str) -> None:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        # Both sides are compiled once, as installed packages are, even where a checkout or its
        # user's settings keep Python from writing bytecode beside the source.
        unwanted = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONPATH")
        self._environment = {k: v for k, v in os.environ.items() if k not in unwanted}
        self._environment |= {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONPATH": path}
        self._told = 0.0

    def run(self, code: str) -> float:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=self._environment, stdout=subprocess.PIPE, check=True)
        return float(done.stdout)

    def add(self, module: str) -> None:
        self._told += self.run(_TIMED.format(module))

    def now(self) -> float:
        return self._told


def rows() -> Iterator[Row]:
    """The two lines about the import."""
    with tempfile.TemporaryDirectory() as bytecode:
        meter = _Meter(bytecode)
        ratio, detail = compare(
            lambda: meter.add("clore_client"),
            lambda: meter.add("requests"),
            clock=meter.now,
            rounds=7,
            calls=8,
        )
        yield Row("import clore_client / import requests", ratio, 1.10, detail=detail)
        heavy = meter.run(_HEAVY)
        yield Row("of paramiko and scp, imported by import clore_client", heavy, 0)
