"""Random schedules; ``python -m tests.attack 10000`` runs more of them."""

from __future__ import annotations

import os
import threading

import pytest

from tests.attack.schedules import report, run_many

pytestmark = pytest.mark.internal  # it takes long

COUNT = int(os.environ.get("CLORE_TEST_SCHEDULES", "240"))
FIRST_SEED = 1


def test_random_schedules_lose_no_money() -> None:
    failed = [verdict for verdict in run_many(COUNT, FIRST_SEED) if verdict.wrong]
    assert not failed, "\n".join(map(report, failed))
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("fault-server")]
