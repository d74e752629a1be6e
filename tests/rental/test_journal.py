"""The journal entries of purchases: their content, their locks, and leftovers()."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, Order
from clore_client.config import DEFAULT_STATE_DIR, account_digest, state_folder
from clore_client.orders.credentials import matches_entry
from clore_client.rental.journal import read_entries, this_machine, write_entry
from tests.conftest import client_for
from tests.rental.test_rental import QUICK, active
from tests.variant import Simulator

pytestmark = pytest.mark.internal

FIELDS: dict[str, Any] = {"server_id": 7, "started": 1000.0, "image": "i", "spot": False}


@pytest.fixture
def folder() -> Path:
    return Path.home() / ".local" / "state" / "clore-client"


def left(client: CloreClient, folder: Path, order: Order | None, **fields: Any) -> Path:
    """Write an entry like that of a dead process."""
    base_url = str(client.BASE_URL).rstrip("/")
    path = folder / f"{os.urandom(8).hex()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "order_id": order.id if order else None,
        "server_id": order.server_id if order else 7,
        "started": time.time() - 60,
        "image": order.get("image") if order else "i",
        "currency": order.get("currency") if order else "bitcoin",
        "spot": False,
        "base_url": base_url,
        "account": account_digest(base_url, client.api_key),
        "before": [],
        "pid": 1,
        **this_machine(),
        **fields,
    }
    path.write_text(json.dumps(content))
    return path


def order_of(client: CloreClient, sim: Simulator, number: int = 0) -> Order:
    made = client.create_order(client.find_servers()[number].id or 0)
    order = client.get_order(made.id or 0)
    assert order is not None
    return order


def test_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = os.path.expanduser("~")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    default = Path(home) / ".local" / "state" / "clore-client"
    assert state_folder(DEFAULT_STATE_DIR) == default
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_folder(DEFAULT_STATE_DIR) == default
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder(DEFAULT_STATE_DIR) == tmp_path / "clore-client"
    assert state_folder(None) is None
    assert state_folder("~/x") == Path(home) / "x"
    assert state_folder(tmp_path) == tmp_path


def test_the_content_of_an_entry(folder: Path) -> None:
    entry = write_entry(folder, FIELDS)
    assert entry is not None
    assert stat.S_IMODE(entry.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    content = json.loads(entry.path.read_text())
    assert content["order_id"] is None
    assert content["pid"] == os.getpid()
    assert set(this_machine()) <= set(content)
    entry.write_order_id(1958009)
    assert json.loads(entry.path.read_text()) == {**content, "order_id": 1958009}
    entry.remove()
    entry.remove()
    assert os.listdir(folder) == []


def test_an_entry_has_no_secret(sim: Simulator, client: CloreClient, folder: Path) -> None:
    secrets: dict[str, Any] = {"ssh_password": "hush-hush-pw", "jupyter_token": "hush-token"}
    with client.rent(env={"SECRET": "hush-env"}, **secrets, **QUICK) as rental:
        (path,) = folder.glob("*.json")
        text = path.read_text()
        fields = json.loads(text)
    assert "hush" not in text
    assert sim.api_key not in text
    assert fields["order_id"] == rental.order.id
    assert fields["server_id"] == rental.order.server_id
    assert fields["image"] == rental.order["image"]
    assert fields["currency"] == "CLORE-Blockchain"
    assert fields["base_url"] == sim.url
    assert abs(fields["started"] - time.time()) < 60


def test_an_entry_is_written_before_the_request_is_sent(
    sim: Simulator, client: CloreClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = client._request

    def request(method: str, endpoint: str, *args: Any, **kwargs: Any) -> Any:
        if endpoint == "/v1/create_order":
            seen.extend(json.loads(path.read_text()) for path in folder.glob("*.json"))
        return real(method, endpoint, *args, **kwargs)

    monkeypatch.setattr(client, "_request", request)
    with client.rent(**QUICK) as rental:
        pass
    assert [e["server_id"] for e in seen] == [rental.order.server_id]
    assert seen[0]["order_id"] is None


def test_a_lock_shows_that_the_process_is_alive(folder: Path) -> None:
    entry = write_entry(folder, FIELDS)
    assert entry is not None
    (found,) = read_entries(folder)
    assert (found.abandoned, found.of_this_machine) == (False, True)
    look = (
        "import sys; from pathlib import Path;"
        "from clore_client.rental.journal import read_entries;"
        "print([(e.abandoned, e.of_this_machine) for e in read_entries(Path(sys.argv[1]))])"
    )
    command = [sys.executable, "-c", look, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    seen = subprocess.check_output(command, env=environment, text=True)
    assert seen == "[(False, True)]\n"
    # An entry that a living rental gave up is abandoned for this process only.
    entry.abandoned = True
    (found,) = read_entries(folder)
    assert (found.abandoned, found.of_this_machine) == (True, True)
    assert subprocess.check_output(command, env=environment, text=True) == "[(False, True)]\n"
    # A forked child does not keep the lock.
    if hasattr(os, "fork"):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        handle, entry._handle = entry._handle, None
        assert handle is not None
        os.close(handle)  # like the death of this process
        seen = subprocess.check_output(command, env=environment, text=True)
        os.close(writer)
        os.waitpid(pid, 0)
        assert seen == "[(True, True)]\n"


def test_unreadable_files_are_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(parents=True)
    (folder / "broken.json").write_bytes(b'{"order_id": 12\xff')
    (folder / "list.json").write_text("[1]")
    (folder / "deep.json").write_text("[" * 50_000)
    (folder / "big.json").write_text("x" * 100_000)
    (folder / "empty.json").write_text("")
    (folder / "other.txt").write_text("x")
    (folder / "folder.json").mkdir()
    (folder / "loop.json").symlink_to(folder / "loop.json")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.json")
    for _ in range(2):
        assert read_entries(folder) == []
    for name in ("broken", "list", "big", "deep", "folder", "loop"):
        assert caplog.text.count(f"{name}.json is not a readable journal entry") == 1
    assert "other" not in caplog.text
    assert len(os.listdir(folder)) >= 8  # not removed


def test_a_full_disk(
    sim: Simulator,
    client: CloreClient,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        with client.rent(**QUICK):
            assert list(folder.rglob("*.json")) == []
    assert caplog.text.count("No space left on device") == 2  # the journal, and the login
    assert active(sim) == []


def test_leftovers(sim: Simulator, client: CloreClient, folder: Path) -> None:
    abandoned, unrecorded, foreign = (order_of(client, sim, n) for n in range(3))
    path = left(client, folder, abandoned)
    left(client, folder, foreign, host="elsewhere", pid=7)
    left(client, folder, unrecorded, account="of another key")
    with client.rent(**QUICK) as rental:
        found = client.leftovers(wait=0)
        assert [e.order_id for e in found.abandoned] == [abandoned.id]
        assert [e.path for e in found.abandoned] == [path]
        assert found.abandoned[0].order is not None
        assert found.abandoned[0].server_id == abandoned.server_id
        assert [(e.order_id, e.host, e.pid) for e in found.elsewhere] == [
            (foreign.id, "elsewhere", 7)
        ]
        assert [o.id for o in found.unrecorded] == [unrecorded.id]
        assert str(abandoned.id) in repr(found)
        assert client.cancel_leftovers(wait=0) == [abandoned.id]
        assert set(active(sim)) == {unrecorded.id, foreign.id, rental.order.id}
        assert not path.exists()
        assert client.cancel_leftovers(wait=0) == []
        assert client.leftovers(wait=0).abandoned == []
    assert set(active(sim)) == {unrecorded.id, foreign.id}


def test_an_entry_of_the_next_version_is_read(
    sim: Simulator, client: CloreClient, folder: Path
) -> None:
    order = order_of(client, sim)
    left(client, folder, order, schema=2, more={"of": ["the next", None]})
    assert client.cancel_leftovers(wait=0) == [order.id]


def test_an_entry_whose_order_has_ended_is_removed(
    sim: Simulator, client: CloreClient, folder: Path
) -> None:
    order = order_of(client, sim)
    path = left(client, folder, order)
    sim.end_order(order.id or 0)
    time.sleep(0.1)
    found = client.leftovers(wait=0)
    assert (found.abandoned, found.elsewhere, found.unrecorded) == ([], [], [])
    assert not path.exists()


def test_an_order_that_is_not_listed_yet(make_sim: Any, folder: Path) -> None:
    sim = make_sim(visible_after=0.8)
    client = client_for(sim)
    server = client.find_servers()[0]
    body = {"renting_server": server.id, "type": "on-demand", "currency": "bitcoin",
            "image": "i", "ports": {"22": "tcp"}, "env": {}, "ssh_password": "x"}  # fmt: skip
    client._request("POST", "/v1/create_order", json=body)
    left(client, folder, None, server_id=server.id, started=time.time())
    found = client.leftovers(wait=5)
    assert [e.order_id for e in found.abandoned] == active(sim)


def test_an_entry_without_an_order_is_removed_after_a_while(
    client: CloreClient, folder: Path
) -> None:
    late = left(client, folder, None, started=time.time() - 300)
    over = left(client, folder, None, started=time.time() - 3600)
    odd = left(client, folder, None, started="?")
    assert client.leftovers(wait=0).abandoned == []
    assert late.exists()
    assert not over.exists()
    assert not odd.exists()


def test_two_dead_entries_for_one_order(sim: Simulator, client: CloreClient, folder: Path) -> None:
    """Assign the order to the last of two dead processes."""
    order = order_of(client, sim)
    left(client, folder, order, order_id=None, started=time.time() - 1)
    last = left(client, folder, order, order_id=None, started=time.time())
    (found,) = client.leftovers(wait=0).abandoned
    assert (found.order_id, found.path) == (order.id, last)
    assert client.cancel_leftovers(wait=0) == [order.id]
    assert active(sim) == []


@pytest.mark.parametrize("other", ["living", "elsewhere"])
def test_an_order_that_may_belong_to_another_process_is_not_touched(
    sim: Simulator, client: CloreClient, folder: Path, other: str
) -> None:
    order = order_of(client, sim)
    dead = left(client, folder, order, order_id=None, started=time.time())
    entry = None
    if other == "living":
        fields = {k: v for k, v in json.loads(dead.read_text()).items() if k != "pid"}
        entry = write_entry(folder, fields)
    else:
        left(client, folder, order, order_id=None, started=time.time(), boot="another",
             machine="another", host="another")  # fmt: skip
    assert client.leftovers(wait=0).abandoned == []
    assert client.cancel_leftovers(wait=0) == []
    assert active(sim) == [order.id]
    if entry is not None:
        entry.remove()


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({}, True),
        ({"server_id": 8}, False),
        ({"image": "other"}, False),
        ({"currency": "USD-Blockchain"}, False),
        ({"spot": True}, False),
        ({"before": [5]}, False),
        ({"before": [4]}, True),
        ({"started": 1_000_000.0 + 299}, True),
        ({"started": 1_000_000.0 + 301}, False),
        ({"started": 1_000_000.0 - 479}, True),
        ({"started": 1_000_000.0 - 481}, False),
        ({"started": 1_000_000.0 + 4, "server_clock": 0.0}, True),
        ({"started": 1_000_000.0 + 6, "server_clock": 0.0}, False),
        ({"started": 1_000_000.0 + 3604, "server_clock": -3600.0}, True),
        ({"started": 1_000_000.0 + 3606, "server_clock": -3600.0}, False),
        ({"started": 1_000_000.0 - 184, "server_clock": 0.0}, True),
        ({"started": 1_000_000.0 - 186, "server_clock": 0.0}, False),
        ({"started": None}, False),
    ],
)
def test_the_order_that_matches_an_entry(fields: dict[str, Any], fits: bool) -> None:
    entry = {"server_id": 7, "image": "i", "currency": "bitcoin", "spot": False,
             "started": 1_000_000.0, "before": []}  # fmt: skip
    order = Order(order_id=5, renting_server=7, image="i", currency="bitcoin", spot=False,
                  started=1_000_000, status="running")  # fmt: skip
    assert matches_entry({**entry, **fields}, order) is fits
    assert not matches_entry(entry, Order(order, status="expired"))


def test_a_dead_entry_does_not_match_a_kept_order(
    sim: Simulator, client: CloreClient, folder: Path
) -> None:
    server_id = client.find_servers("RTX 4090", min_reliability=96)[0]["id"]
    order = {"image": "nvidia/cuda:12.1.0-base-ubuntu22.04", "currency": "CLORE-Blockchain"}
    left(client, folder, None, server_id=server_id, started=time.time(), **order)
    with client.rent(server_id=server_id, poll_interval=0.02) as rental:
        assert client.cancel_leftovers(wait=0) == []
        kept = rental.keep()
    assert client.cancel_leftovers(wait=0) == []
    assert active(sim) == [kept.id]


def test_an_entry_written_while_the_orders_are_read_is_respected(
    sim: Simulator, client: CloreClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_of(client, sim)
    dead = left(client, folder, order, order_id=None, started=time.time())
    living: list[Any] = []
    real = client._request

    def request(method: str, endpoint: str, *args: Any, **kwargs: Any) -> Any:
        if endpoint == "/v1/my_orders" and not living:
            fields = {k: v for k, v in json.loads(dead.read_text()).items() if k != "pid"}
            living.append(write_entry(folder, {**fields, "order_id": order.id}))
        return real(method, endpoint, *args, **kwargs)

    monkeypatch.setattr(client, "_request", request)
    assert client.cancel_leftovers(wait=0) == []
    assert active(sim) == [order.id]
    living[0].remove()
