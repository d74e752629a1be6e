"""Measure ``import clore_client``, and check what it must not import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clore_client import single_file

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
names = ("paramiko", "scp", "pandas", "matplotlib", "msgspec", "html.entities")
print(sum(name in sys.modules for name in names))
"""


class _Meter:
    """A clock that advances by the time that the last child reported."""

    def __init__(self, bytecode: str, first: Path = _ROOT) -> None:
        path = os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))
        # Both sides are compiled once, as installed packages are, even where a checkout or its
        # user's settings keep Python from writing bytecode beside the source.
        unwanted = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONPATH")
        self._environment = {k: v for k, v in os.environ.items() if k not in unwanted}
        self._environment |= {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONPATH": path}
        self._told = 0.0

    def run(self, code: str) -> float:
        # -P would be new in 3.11: the current folder must not come before ``first``.
        command = [sys.executable, "-c", f"import sys; sys.path.remove(''){code}"]
        done = subprocess.run(command, env=self._environment, stdout=subprocess.PIPE, check=True)
        return float(done.stdout)

    def add(self, module: str) -> None:
        self._told += self.run(_TIMED.format(module))

    def now(self) -> float:
        return self._told


def _against_requests(meter: _Meter, what: str, limit: float) -> Row:
    ratio, detail = compare(
        lambda: meter.add("clore_client"),
        lambda: meter.add("requests"),
        clock=meter.now,
        rounds=7,
        calls=8,
    )
    return Row(f"import {what} / import requests", ratio, limit, detail=detail)


def rows() -> Iterator[Row]:
    """Yield the lines about the import of the package and of the one file."""
    with tempfile.TemporaryDirectory() as bytecode, tempfile.TemporaryDirectory() as folder:
        meter = _Meter(bytecode)
        yield _against_requests(meter, "clore_client", 1.10)
        heavy = meter.run(_HEAVY)
        yield Row("of paramiko, pandas, ..., imported by import clore_client", heavy, 0)
        (Path(folder) / "clore_client.py").write_text(single_file.write(), "utf-8")
        one_file = _Meter(bytecode, Path(folder))
        yield _against_requests(one_file, "clore_client.py, the one file,", 1.15)
