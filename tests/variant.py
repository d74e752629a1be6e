"""Find the simulator and the private names of the client, for the package or the one file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import clore_client

# The tests of public behavior run twice: against the package, and against the one file. With the
# one file, clore_client is not a package, and the simulator has another name.
ONE_FILE = not hasattr(clore_client, "__path__")

if TYPE_CHECKING:
    from clore_client.simulator import Simulator
else:
    Simulator = importlib.import_module(
        "clore_simulator" if ONE_FILE else "clore_client.simulator"
    ).Simulator

__all__ = ["ONE_FILE", "Simulator", "inside"]


def inside(path: str) -> str:
    """Return the name of ``"orders.cancel.SETTLE_TIMEOUT"``, without modules in the one file."""
    return f"clore_client.{path.rpartition('.')[2] if ONE_FILE else path}"
