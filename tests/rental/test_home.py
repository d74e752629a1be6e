"""Random programs, after which the home directory holds no secret that is not needed any more.

``CLORE_PROGRAMS=1000 python -m pytest -n 8 tests/rental/test_home.py`` runs 1,000 programs against
each form of the API. They are split into parts for several processes, as they mostly wait.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, CloreError
from tests.conftest import FORMS
from tests.variant import Simulator

PROGRAMS = int(os.environ.get("CLORE_PROGRAMS", "40"))
PARTS = 4
KINDS = ["lose_response", "lose_request", "http_500_after_commit", "html_502", "code_1", "no_code"]
ENDPOINTS = ["create_order", "my_orders", "cancel_order", "cancel_orders"]


@pytest.fixture(params=FORMS)
def quick_sim(request: pytest.FixtureRequest) -> Iterator[Simulator]:
    with Simulator(
        servers=60, form=request.param, rate_limit=0, create_order_interval=0, ssh=False,
        visible_after=(0.0, 0.02), deploy_after=0.01, cancel_lingers=(0.0, 0.02),
    ) as sim:  # fmt: skip
        yield sim


class Program:
    """A few random steps of one process, with secrets of its own."""

    def __init__(self, sim: Simulator, number: int, key: str) -> None:
        self.dice = random.Random(number)
        self.sim = sim
        self.client = CloreClient(
            key, base_url=sim.url, timeout=2, rate_limit=0.002, create_order_interval=0.002,
            backoff=0.001, order_lag=0.05, remember_credentials=self.dice.random() < 0.8,
        )  # fmt: skip
        self.secrets = [f"{name}-{number:05}-{self.dice.getrandbits(40):x}" for name in "pte"]
        self.generated: list[str] = []
        password, token, value = self.secrets
        self.order: dict[str, Any] = {"jupyter_token": token, "env": {"HF_TOKEN": value}}
        if self.dice.random() < 0.7:
            self.order["ssh_password"] = password

    def run(self, servers: list[int]) -> None:
        for _ in range(self.dice.randint(1, 3)):
            kind = self.dice.choice(KINDS)
            if self.dice.random() < 0.4:
                self.sim.faults.add(self.dice.choice(ENDPOINTS), kind, key=self.client.api_key)
            step = self.dice.choice([self.create, self.rent, self.keep, self.many])
            with contextlib.suppress(CloreError):
                step(servers)

    def create(self, servers: list[int]) -> None:
        order = self.client.create_order(self.dice.choice(servers), find_timeout=0.3, **self.order)
        self.generated.append(order.get("ssh_password", self.secrets[0]))
        self.client.get_orders()
        if self.dice.random() < 0.5:
            self.client.cancel_order(order, settle_timeout=20)

    def rent(self, servers: list[int], keep: bool = False) -> None:
        with self.client.rent(
            attempts=1, poll_interval=0.005, find_timeout=0.3, deploy_timeout=0.3,
            cancel_timeout=20, **self.order,
        ) as rental:  # fmt: skip
            self.generated.append(rental.order["ssh_password"])
            if keep:
                rental.keep(max_hours=1)

    def keep(self, servers: list[int]) -> None:
        self.rent(servers, keep=True)

    def many(self, servers: list[int]) -> None:
        with self.client.rent_many(
            2, attempts=1, poll_interval=0.005, find_timeout=0.3, deploy_timeout=0.3,
            cancel_timeout=20, **self.order,
        ):  # fmt: skip
            pass


def files_with(home: Path, secrets: list[str]) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for path in home.rglob("*"):
        if path.is_file():
            content = path.read_bytes().decode("utf-8", "replace")
            if here := [secret for secret in secrets if secret in content]:
                found[path] = here
    return found


@pytest.mark.internal
@pytest.mark.parametrize("part", range(PARTS))
def test_the_home_holds_no_secret_that_is_not_needed(quick_sim: Simulator, part: int) -> None:
    sim, home = quick_sim, Path.home()
    servers = [s.id for s in sim.servers if s.online and not s.rented and len(s.allowed_coins) == 3]
    of_all: list[str] = []
    for number in range(part, PROGRAMS, PARTS):
        key = sim.add_key(1e6)
        program = Program(sim, number, key)
        program.run(servers)
        sim.faults.clear(key)
        program.client.close()
        time.sleep(0.05)
        # Only files of this order's own login, and only for orders that may still run.
        secrets = [*program.secrets, *program.generated, key]
        of_all += secrets
        found = files_with(home, secrets)
        running = [order for order in sim.orders_of(key) if order.active]
        for path, seen in found.items():
            assert path.parent.name == "credentials", path
            assert path.stat().st_mode & 0o77 == 0
            assert path.parent.stat().st_mode & 0o77 == 0
            assert program.secrets[2] not in seen, "a value of env"
            assert key not in seen, "the API key"
            number_in_name = path.stem.split("-")[-1]
            lost = "-server-" in path.name  # its order has an unknown outcome
            assert lost or int(number_in_name) in {order.id for order in running}, path
        # The next process ends what runs, and cleans up.
        for path in home.rglob("*-server-*.json"):
            os.utime(path, (1, 1))
        after = CloreClient(
            key, base_url=sim.url, rate_limit=0.002, backoff=0.001, order_lag=0.05, timeout=2
        )
        after.cancel_all(confirm_timeout=5)
        after.leftovers(wait=0)
        after.close()
        assert files_with(home, secrets) == {}
    assert files_with(home, of_all) == {}
