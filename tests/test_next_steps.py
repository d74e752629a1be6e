"""Errors that end in a next step: what they say, and how soon they come."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clore_client import (
    AuthenticationError,
    CloreClient,
    InvalidInputError,
    OrderNotFoundError,
    RentalError,
    SSHError,
    WaitTimeoutError,
)
from tests.conftest import MakeSim, client_for, sent_to
from tests.rental.test_rental import QUICK, active, cheapest
from tests.test_client import plain_server
from tests.variant import Simulator

WRONG = "a-wrong-key-that-ends-in-3f9a"


def key_from_argument(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> CloreClient:
    return client_for(sim, api_key=WRONG)


def key_from_environment(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> CloreClient:
    monkeypatch.setenv("CLORE_API_KEY", WRONG)
    return client_for(sim, api_key=None)


def key_from_file(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> CloreClient:
    path = Path.home() / ".clore" / "config.json"
    path.parent.mkdir()
    path.write_text(f'{{"api_key": "{WRONG}"}}')
    path.chmod(0o600)
    return client_for(sim, api_key=None)


def key_from_attribute(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> CloreClient:
    client = client_for(sim)
    client.api_key = WRONG
    return client


@pytest.mark.parametrize(
    ("make", "source"),
    [
        (key_from_argument, "argument"),
        (key_from_environment, "environment variable CLORE_API_KEY"),
        (key_from_file, "file ~/.clore/config.json"),
        (key_from_attribute, "attribute"),
    ],
    ids=["argument", "environment", "file", "attribute"],
)
def test_a_wrong_key_says_where_it_came_from(
    any_sim: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Simulator, pytest.MonkeyPatch], CloreClient],
    source: str,
) -> None:
    client = make(any_sim, monkeypatch)
    with pytest.raises(AuthenticationError) as caught:
        client.get_wallets()
    text = str(caught.value)
    assert text.startswith("Clore API Error 3: ")
    assert f"hint: the API refused a key that ends in '3f9a', from {source}: correct" in text
    assert caught.value.hint is not None
    assert WRONG[:-4] not in text


def test_a_key_in_the_headers_of_one_call(sim: Simulator, client: CloreClient) -> None:
    with pytest.raises(AuthenticationError, match=r"'3f9a', from the headers of the call"):
        client._request("GET", "/v1/wallets", headers={"auth": WRONG})


def test_an_order_of_a_server_that_does_not_exist(
    any_sim: Simulator, any_client: CloreClient
) -> None:
    with pytest.raises(InvalidInputError, match="there is no server 123456789") as caught:
        any_client.create_order(123456789)
    assert "choose one of find_servers()" in (caught.value.hint or "")
    assert caught.value.code == 2
    assert any_sim.orders == []


def test_another_invalid_input_stays_as_it_is(sim: Simulator, client: CloreClient) -> None:
    sim.faults.add("create_order", "envelope", envelope={"code": 2})
    with pytest.raises(InvalidInputError, match="Invalid input"):
        client.create_order(plain_server(client))


def test_an_unknown_order_is_not_awaited(any_sim: Simulator, any_client: CloreClient) -> None:
    any_client.get_orders()
    any_sim.clear_requests()
    with pytest.raises(OrderNotFoundError, match="no order 5 ") as caught:
        any_client.wait_for_order(5, timeout=60)
    assert caught.value.order_id == 5
    assert len(sent_to(any_sim, "my_orders")) == 2


def test_a_new_order_of_another_process_is_awaited(make_sim: MakeSim, tmp_path: Path) -> None:
    sim = make_sim(create_answer="order_id", visible_after=0.6)
    order = client_for(sim, state_dir=tmp_path).create_order(plain_server(client_for(sim)))
    with pytest.raises(WaitTimeoutError) as caught:
        client_for(sim, state_dir=tmp_path).wait_for_order(order, 0.01, 0.01)
    assert caught.value.reason == "never showed up"


def test_an_unreadable_list_does_not_end_the_wait(sim: Simulator, client: CloreClient) -> None:
    sim.faults.add("my_orders", "html_502", times=9)
    with pytest.raises(WaitTimeoutError):
        client_for(sim, max_retries=1).wait_for_order(5, timeout=0.05, poll_interval=0.01)


def test_a_price_limit_that_no_server_fits(any_sim: Simulator, any_client: CloreClient) -> None:
    (first,) = cheapest(any_client, 1)
    server = next(s for s in any_client.find_servers() if s.id == first)
    with pytest.raises(RentalError) as caught:
        with any_client.rent(max_price_usd=0.0001, **QUICK):
            pytest.fail("entered")
    said = f"of which the cheapest costs {server.usd_per_hour:.4g} USD per hour"
    assert "max_price_usd=0.0001 left out" in str(caught.value)
    assert said in str(caught.value)


def test_hosts_that_fail_alike_give_one_reason(make_sim: MakeSim) -> None:
    sim = make_sim(deploy_after=float("inf"))
    with pytest.raises(RentalError) as caught:
        with client_for(sim).rent(deploy_timeout=0.05, **QUICK):
            pytest.fail("entered")
    text = str(caught.value)
    assert text.count("did not reach status 'running'") == 1
    assert len(caught.value.tried) == 5
    assert all(str(server_id) in text for server_id, _ in caught.value.tried)
    assert len(text.splitlines()) == 1
    assert active(sim) == []


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_rejected_upload_is_told_in_one_line(
    make_sim: MakeSim, tmp_path: Path, what: str
) -> None:
    sim = make_sim(ssh=True)
    client = client_for(sim)
    order = client.create_order(plain_server(client))
    client.wait_for_order(order, 20, 0.02)
    source: Any = tmp_path / "source"
    if what == "directory":
        source.mkdir()
        (source / "x").write_text("x")
    else:
        source.write_text("x")
    with pytest.raises(SSHError) as caught:
        client.upload(order, source, "/proc/no/such/place")
    text = "".join(traceback.format_exception(caught.value))
    assert "direct cause" not in text
    assert "During handling" not in text
    assert len(str(caught.value).splitlines()) == 1
    assert "/proc/no" in str(caught.value)
