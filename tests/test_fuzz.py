"""Call every public method with odd arguments.

It may only raise a CloreError, ValueError or TypeError, or an OSError about a local file. After a
ValueError or TypeError nothing was sent, and the error names an argument of the method.
"""

from __future__ import annotations

import inspect
import math
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, CloreError
from clore_client.market.filters import SearchFilters
from tests.conftest import FAST, FORMS
from tests.variant import Simulator

pytestmark = pytest.mark.internal  # it takes long

CALLS = 100  # for each of the seeds below, in each form
SEEDS = range(10)
HUGE = 10**5000


class Broken:
    """A value whose repr() fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def nested(depth: int) -> list[Any]:
    """Return lists within lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 1.5, -0.0, math.nan, math.inf, -math.inf, 1e-320, 10**18,
    10**400, HUGE, -HUGE, "", " ", "x", "5", "\0", "\ud800", "a\nb", "../..", "~", "\u20ac",
    "x" * 5000, b"", b"x", b"\xff", [], [1], [None], [HUGE], (), (1, 2), {}, {"a": 1}, {5: 5},
    {"22": "tcp"}, {HUGE: HUGE}, {"order_id": HUGE}, {"connection": {"ssh": 5}}, {1, 2}, object(),
    Broken(), object, lambda *a: None, lambda: None, lambda a: None, iter([1]), nested(10),
    nested(5000), Path("x"), Path("x" * 5000), Path(), range(3), bytearray(b"x"), complex(1, 1),
)  # fmt: skip
# A large value of these is valid, and waits for a long time.
DURATIONS = {
    "cancel_timeout", "confirm_timeout", "deploy_timeout", "find_timeout", "poll_interval",
    "settle_timeout", "timeout", "wait",
}  # fmt: skip
SSH_METHODS = {
    "connect_ssh", "wait_for_ssh", "forget_host_key", "ssh_command", "ssh_config", "run",
    "forward", "upload", "download", "scp", "start", "jobs", "job", "shell", "wait_for_http",
    "rsync_command",
}  # fmt: skip
LOGIN = {"password", "key_path", "passphrase", "wait", "host_key", "timeout"}
LOCAL_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


FILTERS = {*SearchFilters.__annotations__} - {"sort"}  # a key function can return anything
SEARCHES = {"find_servers", "find_cheapest", "rent"}
# The allowed values depend on what the API says.
READS_FIRST = {"set_spot_price", "lower_spot_price", "get_balance"}


def odd_values(name: str) -> list[Any]:
    """Return the odd values for an argument."""
    if name not in DURATIONS:
        return list(ODD)

    def is_quick(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return not number or not 0.05 < value < 1e300 or (value > 1e300 and value is HUGE)

    return [value for value in ODD if is_quick(value) and value != math.inf]


def fitting(client: CloreClient, rng: random.Random, closed_port: int) -> dict[str, dict[str, Any]]:
    """Return valid arguments for each method, with which it is fast."""
    order_id = rng.choice([5, *client._test_orders])  # type: ignore[attr-defined]
    server_id = rng.choice([5, *client._test_servers])  # type: ignore[attr-defined]
    order = {
        "order_id": order_id,
        "renting_server": server_id,
        "status": "running",
        "connection": {"ssh": f"ssh root@127.0.0.1 -p {closed_port}", "http_ports": {}},
    }
    login = {"wait": 0, "timeout": 0.5, "password": "secret"}
    ssh_login = {"order": order, **login}
    search = {"gpu_type": "RTX 4090", "max_price_usd": 1.0, "min_reliability": 90.0}
    rental = {"server_id": server_id, "image": "x", "currency": "CLORE", "ports": {"22": "tcp"}}
    return {
        "_request": {"method": "GET", "endpoint": "/v1/wallets", "params": {"a": 1}, "json": None},
        "attach": {"order": order_id, "end": False, "cancel_timeout": 0.02},
        "cancel_all": {"confirm": True, "confirm_timeout": 0.02},
        "cancel_leftovers": {"wait": 0, "cancel_timeout": 0.02},
        "cancel_order": {"order_id": order_id, "issue": "x", "settle_timeout": 0.02},
        "cancel_overdue": {"cancel_timeout": 0.02},
        "cancel_orders": {"order_ids": [order_id, 7]},
        "close": {},
        "connect_ssh": ssh_login,
        "create_order": {**rental, "order_type": "on-demand", "env": {"A": "b"},
                         "ssh_password": "x", "find_timeout": 0.5},
        "describe": {},
        "download": {**ssh_login, "remote": "x", "local": "here"},
        "estimate_cost": {"server": server_id, "hours": 2.5, "currency": "USD"},
        "find_cheapest": search,
        "find_servers": search,
        "forget_host_key": {"order": order},
        "forward": {**login, "order": order, "remote_port": 80, "local_port": 0},
        "from_env": {"timeout": 5},
        "get_balance": {"currency": "BTC"},
        "get_balances": {},
        "get_marketplace": {"include_rented": True},
        "get_order": {"order_id": order_id},
        "get_orders": {"include_completed": True},
        "get_spot_market": {"server_id": server_id},
        "get_wallets": {},
        "gpu_models": {"cache_seconds": 0},
        "handle_signals": {},
        "host_history": {},
        "job": {**ssh_login, "name": "train"},
        "jobs": ssh_login,
        "hours_left": {"server_or_order": order_id, "currency": "USD"},
        "leftovers": {"wait": 0},
        "lower_spot_price": {"order": order_id, "target": 0.2, "wait": False},
        "market_summary": {"include_fees": True},
        "parse_ssh_connection": {"order": order},
        "plot_prices": {"servers": None, "path": "prices.svg"},
        "rent": {**search, **rental, "attempts": 1, "deploy_timeout": 0.02, "poll_interval": 0.01,
                 "max_hours": 1},
        "rent_many": {**{k: v for k, v in {**search, **rental}.items() if k != "server_id"},
                      "count": 2, "attempts": 1, "deploy_timeout": 0.02, "poll_interval": 0.01},
        "run": {**ssh_login, "command": "true"},
        "rsync_command": {"order": order, "local": __file__, "remote": "x"},
        "scp": {"order": order, **login},
        "set_spot_price": {"order_id": order_id, "new_price": 0.2},
        "shell": ssh_login,
        "ssh_command": {"order": order},
        "ssh_config": {"order": order, "name": "gpu"},
        "start": {**ssh_login, "command": "true", "name": "train", "env": {"A": "b"}, "cwd": "x"},
        "suggest_spot_price": {"server": server_id, "margin": 0.1},
        "upload": {**ssh_login, "local": __file__, "remote": "x"},
        "wait_for_http": {"order": order, "path": "/", "port": 80, **login},
        "wait_for_order": {"order_id": order_id, "timeout": 0.02, "poll_interval": 0.01},
        "wait_for_ssh": ssh_login,
    }  # fmt: skip


def parameters_of(method: str) -> set[str]:
    """Return the names of a method's arguments that get odd values."""
    names = set(inspect.signature(getattr(CloreClient, method)).parameters)
    if "login" in names:
        names |= LOGIN
    if method in SEARCHES:
        names |= FILTERS
    # The tests of SSH pass a connection.
    return names - {"self", "login", "options", "kwargs", "ssh", "filters"}


@pytest.fixture(scope="module", params=FORMS)
def fuzz_sim(request: pytest.FixtureRequest) -> Iterator[Simulator]:
    options = {"rate_limit": 0, "create_order_interval": 0, "visible_after": 0, "deploy_after": 0,
               "cancel_lingers": 0, "balance": 1e6}  # fmt: skip
    with Simulator(**{**FAST, **options}, form=request.param) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def closed_port() -> Iterator[int]:
    """Return a port on which nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_every_public_method_is_tried(fuzz_sim: Simulator, closed_port: int) -> None:
    client = make_client(fuzz_sim)
    public = {n for n in dir(CloreClient) if not n.startswith("_")}
    methods = {n for n in public if callable(getattr(CloreClient, n))}
    assert set(fitting(client, random.Random(1), closed_port)) == methods | {"_request"}


def make_client(sim: Simulator) -> CloreClient:
    client = CloreClient(sim.api_key, base_url=sim.url, rate_limit=0, create_order_interval=0,
                         backoff=0.001, timeout=5, order_lag=0.02, max_retries=1)  # fmt: skip
    client._test_servers = [s.id for s in sim.servers]  # type: ignore[attr-defined]
    client._test_orders = [o.id for o in sim.orders]  # type: ignore[attr-defined]
    return client


@pytest.mark.parametrize("seed", SEEDS)
def test_odd_arguments(
    fuzz_sim: Simulator,
    closed_port: int,
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLORE_API_KEY", fuzz_sim.api_key)
    monkeypatch.setenv("CLORE_BASE_URL", fuzz_sim.url)
    rng = random.Random(seed)
    complaints = set()
    with make_client(fuzz_sim) as client:
        for _ in range(CALLS):
            client._test_orders = [o.id for o in fuzz_sim.orders]  # type: ignore[attr-defined]
            methods = fitting(client, rng, closed_port)
            method = rng.choice(sorted(methods))
            arguments = dict(methods[method])
            names = sorted(parameters_of(method))
            for name in rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2)))):
                arguments[name] = rng.choice(odd_values(name))
            complaint = complaint_about(fuzz_sim, client, method, arguments)
            if complaint is not None:
                complaints.add(f"{method}: {complaint}")
    assert sorted(complaints) == []


def complaint_about(
    sim: Simulator, client: CloreClient, method: str, arguments: dict[str, Any]
) -> str | None:
    """Make a call, and return a text if its result is wrong."""
    sim.clear_requests()
    error: Exception | None = None
    try:
        result = getattr(client, method)(**arguments)
        if method in SSH_METHODS and hasattr(result, "close"):
            result.close()
    except Exception as caught:
        error = caught
    what = f"{type(error).__name__}: {error}"[:300]
    if error is None or (isinstance(error, CloreError) and not isinstance(error, ValueError)):
        return None
    sent = sim.requests
    if method in READS_FIRST:
        sent = [call for call in sent if call.method != "GET"]
    if sent:
        return f"{what}, but {len(sent)} requests were sent"
    if isinstance(error, LOCAL_FILE_ERRORS) and method in SSH_METHODS:
        return None
    if not isinstance(error, (ValueError, TypeError)):
        return what
    if not any(name in str(error) for name in parameters_of(method)):
        return f"{what}, which names no argument"
    return None if len(str(error)) < 2000 else f"{what}: {len(str(error))} characters"
