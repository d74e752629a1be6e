"""Measure commands on a host at 100 ms: the first one of a process, and a later one of a rental.

The API has the same latency as the host. The comparison for the first one is a request with
requests, a login with paramiko, and ``exec_command``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import paramiko
import requests

from clore_client import CloreClient
from clore_client.rental.rental import Rental
from tests.sshd import Sshd, running_sshd

from .children import child
from .rows import Row

ORDER = 7
DELAY = 0.05  # seconds each way
ROUNDS = 5
RUNS = 15


class Place:
    """The API and the host, with the same latency.

    Parameters:
        url: the URL of the API.
        server: the host; ``port`` is its port with the latency.
    """

    def __init__(self, url: str, server: Sshd, port: int) -> None:
        self._url = url
        self._server = server
        self._port = port

    def attach(self) -> Rental:
        """Return the rental of the order, over which a command has run."""
        client = CloreClient("key", base_url=self._url, rate_limit=0, state_dir=None)
        rental = client.attach(ORDER)
        rental.run("true", key_path=self._server.key)
        return rental

    def by_hand(self) -> paramiko.SSHClient:
        """Return a connection over which a command has run."""
        requests.get(f"{self._url}/v1/my_orders", headers={"auth": "key"}, timeout=30).json()
        ssh = paramiko.SSHClient()
        ssh.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        ssh.connect("127.0.0.1", self._port, self._server.user, allow_agent=False,
                    look_for_keys=False, key_filename=str(self._server.key))  # fmt: skip
        _, output, _ = ssh.exec_command("true")
        output.channel.recv_exit_status()
        return ssh


def rows() -> Iterator[Row]:
    """Yield the first command and the next ones."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(running_sshd(folder / "sshd"))
        near = _place(stack, folder, server, 0.0)
        far = _place(stack, folder, server, DELAY)
        for call in (near.attach, near.by_hand):  # neither pays for the imports
            call().close()
        ours, hand = (statistics.median(_first(call) for _ in range(ROUNDS))
                      for call in (far.attach, far.by_hand))  # fmt: skip
        detail = f"{hand:.2f} s by hand, medians of {ROUNDS}"
        yield Row("attach() and run() at 100 ms, seconds", ours, 1.2, detail=detail)
        here, there = _next(near), _next(far)
        trips = (there - here) / (2 * DELAY)
        detail = f"{there * 1000:.0f} against {here * 1000:.0f} ms, medians of {RUNS}"
        yield Row("the next run() at 100 ms, round trips", trips, 1.15, detail=detail)


def _place(stack: ExitStack, folder: Path, server: Sshd, delay: float) -> Place:
    """Add a latency to the API and the host."""

    def far(port: int) -> int:
        return int(stack.enter_context(child("distance", str(port), str(delay))).read())

    port = far(server.port)
    answers = folder / f"answers {delay}"
    answers.mkdir()
    ssh = f"ssh {server.user}@127.0.0.1 -p {port}"
    orders = [server.order(ORDER, connection={"ssh": ssh})]
    (answers / "my_orders").write_text(json.dumps({"code": 0, "orders": orders}))
    urls = stack.enter_context(child("answerer", str(answers), str(folder))).read()
    api = far(int(urls["http"].rpartition(":")[2]))
    return Place(f"http://127.0.0.1:{api}", server, port)


def _first(call: Callable[[], Rental | paramiko.SSHClient]) -> float:
    start = time.perf_counter()
    opened = call()
    took = time.perf_counter() - start
    opened.close()
    return took


def _next(place: Place) -> float:
    """Return the seconds for a later command of a rental."""
    rental = place.attach()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        rental.run("true")
        times.append(time.perf_counter() - start)
    rental.close()
    return statistics.median(times)
