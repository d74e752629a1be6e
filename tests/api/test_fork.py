"""Fork while a client is in use: each process then has its own connections and rate limit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.variant import Simulator

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

# In its own process, without the threads of the test run.
BUSY = """
import os, signal, sys, threading, warnings
from clore_client import CloreClient

warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: that is the test
client = CloreClient(rate_limit=0.001, timeout=5, max_retries=9, backoff=0.001)
done, failures = threading.Event(), []

def work():
    try:
        while not done.is_set():
            client.get_wallets()
            client.describe()
            with CloreClient(rate_limit=0.001, timeout=5) as other:
                other.get_marketplace()
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
client.get_wallets()
statuses = []
for n in range(12):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a lock that nobody will let go of
        try:
            if n % 3 == 0:
                client.close()
            if n % 3 == 1:
                assert CloreClient(rate_limit=0).get_marketplace()
            assert len(client.get_wallets()) == 3
            client.close()
            assert len(client.get_wallets()) == 3
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
done.set()
for thread in threads:
    thread.join()
assert len(client.get_wallets()) == 3
print(statuses, failures)
"""


def test_a_fork_while_threads_are_busy() -> None:
    with Simulator(servers=20, rate_limit=0, ssh=False) as sim:
        environment = {**os.environ, "CLORE_BASE_URL": sim.url, "CLORE_API_KEY": sim.api_key}
        run = subprocess.run(
            [sys.executable, "-c", BUSY], env=environment,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"{[0] * 12} []", run.stderr
