"""Fixtures: fast simulators, clients for them, and an environment without settings."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
from hypothesis import HealthCheck, settings

from clore_client import CloreClient
from tests.sshd import Sshd, running_sshd
from tests.variant import ONE_FILE, Simulator

# No test depends on the speed of the machine.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

# These tests use modules of the package; all others also run against the one file.
INTERNAL = [
    "api/test_connection.py",
    "api/test_json.py",
    "api/test_limiters.py",
    "api/test_rate_limit.py",
    "api/test_retry.py",
    "market/test_gpu_names.py",
    "market/test_report.py",
    "models/test_records.py",
    "rental/test_journal.py",
    "rental/test_signals.py",
    "simulator/test_api.py",
    "simulator/test_cli.py",
    "simulator/test_documented.py",
    "simulator/test_faults.py",
    "simulator/test_ssh.py",
    "ssh/test_command.py",
    "ssh/test_downloads.py",
    "ssh/test_hostile_transfer.py",
    "ssh/test_files.py",
    "ssh/test_hosts.py",
    "ssh/test_jobs.py",
    "ssh/test_spare_session.py",
    "ssh/test_transfer.py",
    "ssh/test_tunnel.py",
    "test_fuzz.py",
    "test_pricing.py",
    "test_progress.py",
    "test_single_file.py",
    "test_validation.py",
]
TESTS = Path(__file__).parent

FORMS = ("live", "documented")
# The simulator's limits are below the client's, as 1.0 s is below 1.1 s. The difference is larger
# here, because a busy machine is not precise.
RATE_LIMIT = 0.02
FAST: dict[str, Any] = {
    "servers": 60,
    "rate_limit": 0.25 * RATE_LIMIT,
    "create_order_interval": 0.02,
    "visible_after": 0.05,
    "deploy_after": 0.1,
    "cancel_lingers": 0.05,
    "ssh": False,
}

MakeSim = Callable[..., Simulator]


def pytest_configure(config: pytest.Config) -> None:
    # The parent process, such as nohup, may ignore these signals, and children inherit that.
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    # Fixtures of a module run before a test gets its own home directory.
    folder = tempfile.mkdtemp(prefix="clore-tests-")
    os.environ["XDG_STATE_HOME"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.addinivalue_line(
        "markers", "internal: needs the package, or takes long; not run against the one file"
    )


class _Empty(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        return []


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    # collect_ignore does not apply to a file that is named on the command line.
    if ONE_FILE and module_path.relative_to(TESTS).as_posix() in INTERNAL:
        empty: pytest.Module = _Empty.from_parent(parent, path=module_path)
        return empty
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    internal = [item for item in items if ONE_FILE and item.get_closest_marker("internal")]
    if internal:
        config.hook.pytest_deselected(items=internal)
        items[:] = [item for item in items if item not in internal]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the key, URL, proxy and settings file of the user who runs the tests."""
    for name in ("CLORE_API_KEY", "CLORE_BASE_URL", "CLORE_RATE_LIMITER"):
        monkeypatch.delenv(name, raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def make_sim() -> Iterator[MakeSim]:
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Simulator:
            return stack.enter_context(Simulator(**{**FAST, **options}))

        yield make


@pytest.fixture
def sim(make_sim: MakeSim) -> Simulator:
    return make_sim()


@pytest.fixture(params=FORMS)
def any_sim(request: pytest.FixtureRequest, make_sim: MakeSim) -> Simulator:
    """Return a simulator in each of the two forms."""
    return make_sim(form=request.param)


def client_for(sim: Simulator, **options: Any) -> CloreClient:
    """Return a client with limits for a fast simulator."""
    defaults: dict[str, Any] = {
        "api_key": sim.api_key,
        "base_url": sim.url,
        "rate_limit": RATE_LIMIT,
        "create_order_interval": 0.05,
        "backoff": 0.01,
        "rate_limit_wait": 1.0,
        "timeout": 5,
        "order_lag": 0.3,
    }
    return CloreClient(**{**defaults, **options})


@pytest.fixture
def client(sim: Simulator) -> Iterator[CloreClient]:
    with client_for(sim) as made:
        yield made


@pytest.fixture
def any_client(any_sim: Simulator) -> Iterator[CloreClient]:
    with client_for(any_sim) as made:
        yield made


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait until a condition is true, and return its value."""
    deadline = time.monotonic() + seconds
    while not (got := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return got


def sent_to(sim: Simulator, endpoint: str) -> list[Any]:
    """Return the requests that arrived at an endpoint."""
    return [call for call in sim.requests if call.endpoint == endpoint]


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """Return a real OpenSSH server, one for all tests."""
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="module")
def openssh(sshd: Sshd) -> Iterator[paramiko.SSHClient]:
    # connect_ssh() would pin keys in the home directory, which a test gets after this fixture.
    with paramiko.SSHClient() as ssh:
        ssh.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        ssh.connect("127.0.0.1", sshd.port, sshd.user, key_filename=str(sshd.key))
        yield ssh


@pytest.fixture
def simulated(make_sim: MakeSim) -> Iterator[paramiko.SSHClient]:
    with client_for(make_sim(ssh=True)) as client:
        server = client.find_servers("RTX 4090", min_reliability=96)[0]
        order = client.create_order(server["id"])
        order = client.wait_for_order(order["order_id"], timeout=20, poll_interval=0.02)
        with client.connect_ssh(order) as ssh:
            yield ssh


@pytest.fixture(params=["openssh", "simulated"])
def ssh(request: pytest.FixtureRequest) -> paramiko.SSHClient:
    """Return a connection to each kind of host."""
    connection: paramiko.SSHClient = request.getfixturevalue(request.param)
    return connection
