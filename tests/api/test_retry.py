"""Secrets that a response repeats, in any encoding, are not in errors or their pickles."""

from __future__ import annotations

import json
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreAPIError, CloreClient, CloreError, Wallet
from clore_client.api import retry
from clore_client.api.retry import excerpt
from tests.conftest import client_for
from tests.variant import Simulator

PASSWORD = "pass\\w'o\"rd\tx"


@pytest.mark.parametrize(
    "echo",
    [
        {"error": "bad " + PASSWORD},
        {"error": "bad " + json.dumps(PASSWORD)},
        {"error": repr(PASSWORD)},
        {"received": {"other": [PASSWORD]}},
    ],
)
def test_an_echoed_password(sim: Simulator, client: CloreClient, echo: dict[str, Any]) -> None:
    sim.faults.add("create_order", "envelope", envelope={"code": 2, **echo})
    with pytest.raises(CloreAPIError) as caught:
        client.create_order(5, ssh_password=PASSWORD)
    stored = pickle.dumps(caught.value).decode("latin-1")
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.response)
    for spelling in (PASSWORD, repr(PASSWORD)[1:-1], json.dumps(PASSWORD)[1:-1]):
        assert spelling not in shown
        assert spelling not in stored
    assert "***" in shown


@pytest.mark.parametrize("start", range(130, 165, 5))
def test_a_key_at_the_edge_of_an_excerpt(sim: Simulator, start: int) -> None:
    key = "SECRETKEY0123456789SECRETKEY"
    client = client_for(sim, api_key=key)
    sim.faults.add("*", "status", status=404, body="x" * start + key)
    with pytest.raises(CloreError) as caught:
        client._request("GET", "/v1/wallets")
    assert "SECRET" not in str(caught.value)
    assert excerpt(("<b>" * 50_000).encode()) == ""


def test_headers_merge_whatever_their_case(sim: Simulator, client: CloreClient) -> None:
    key = sim.add_key()
    client._request("GET", "/v1/wallets", headers={"AUTH": key})
    sent = [v for k, v in sim.requests[-1].headers.items() if k.lower() == "auth"]
    assert sent == [key]


def test_no_secret_in_the_locals_of_a_traceback(sim: Simulator) -> None:
    sim.faults.add("create_order", "hang_after_commit", seconds=0.05)
    sim.faults.add("my_orders", "envelope", envelope={"code": 0, "orders": []}, times=99)
    client = client_for(sim)
    server_id = client.find_servers("RTX 4090", min_reliability=96)[0]["id"]
    with pytest.raises(CloreError) as caught:
        client.create_order(server_id, find_timeout=0.1)
    stack = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    own = [line for frame in stack.stack for line in (frame.locals or {}).items()]
    password = sim.orders[0].body["ssh_password"]
    shown = [name for name, value in own if password in value or sim.api_key in value]
    assert not {"call", "draft", "self", "client"} & set(shown)


@pytest.mark.parametrize("depth", [50, 900])
def test_deep_nesting_is_no_recursion_error(
    sim: Simulator, client: CloreClient, depth: int
) -> None:
    nested: Any = "x"
    for _ in range(depth):
        nested = [nested]
    sim.faults.add("wallets", "envelope", envelope={"code": 2, "more": nested})
    with pytest.raises(CloreAPIError):
        client.get_wallets()
    wallets = {"code": 0, "wallets": [{"name": "a", "nested": nested, "two\nlines": 1}]}
    sim.faults.add("wallets", "envelope", envelope=wallets)
    (wallet,) = client.get_wallets()
    assert isinstance(wallet, Wallet)
    assert "\n" not in repr(wallet)


README_ROWS = [
    retry.NOT_SENT,
    retry.RATE_LIMITED,
    retry.NO_RESPONSE,
    retry.NO_RESPONSE,
    retry.NO_RESPONSE,
    retry.UNCLEAR,
    retry.NO_RESPONSE,
    retry.UNCLEAR,
    retry.DATABASE_ERROR,
    retry.REFUSED,
]


def test_the_readme_has_the_same_policy() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.split("\n## Retries\n")[1].split("| --- | --- | --- |\n")[1].split("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    assert set(README_ROWS) == set(retry.POLICY)
    for (_, *actions), problem in zip(rows, README_ROWS, strict=True):
        for text, action in zip(actions, retry.POLICY[problem], strict=True):
            expected = {"sent again": retry.RETRY, "raised": retry.RAISE}.get(text)
            unknown = "OutcomeUnknownError" in text
            assert action == (expected or (retry.UNKNOWN if unknown else retry.RAISE))
    statuses = next(event for event, *_ in rows if "no usable envelope" in event)
    for status in retry.UNAVAILABLE_STATUSES:
        assert str(status) in statuses
