"""Details of the checks of arguments."""

from __future__ import annotations

from typing import Any

import pytest

from clore_client import CloreClient
from clore_client.validation import check_number, check_public_key
from tests.conftest import client_for
from tests.models.test_records import LIVE_ORDER, LIVE_SERVER, changed, orders_of
from tests.variant import Simulator


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("-inf")])
def test_numbers_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match="limit must be at least 0"):
        check_number("limit", value)


@pytest.mark.parametrize(
    "key",
    ["id_rsa", "AAAAB3NzaC1yc2E", "ssh-rsa", "ssh-rsa AAAA\nssh-rsa BBBB", "my key", "ssh-rsa\tA"],
)
def test_invalid_public_keys(key: str) -> None:
    with pytest.raises(ValueError, match="ssh_key"):
        check_public_key("ssh_key", key)


@pytest.mark.parametrize(
    "key",
    ["ssh-ed25519 AAAA me@home\n", "ecdsa-sha2-nistp256 AAAA", "sk-ssh-ed25519@openssh.com A"],
)
def test_valid_public_keys(key: str) -> None:
    assert check_public_key("ssh_key", key) == key.strip()


def test_a_price_equal_to_the_limit(sim: Simulator, client: CloreClient) -> None:
    for cents in range(1, 300):
        usd = cents / 100
        price = {"on_demand": {}, "usd": {"on_demand_clore": round(usd * 24, 2)}}
        answer = {"code": 0, "servers": [changed(LIVE_SERVER, price=price)]}
        fake = type("Fake", (CloreClient,), {"_request": lambda *a, answer=answer, **k: answer})()
        assert len(fake.find_servers(max_price_usd=usd)) == 1


def test_get_balance_takes_part_of_a_name_and_short_names() -> None:
    wallets = [{"name": "BTC", "balance": 1.0}, {"name": "CLORE", "balance": 2.0}]
    answer = {"code": 0, "wallets": wallets}
    fake = type("Fake", (CloreClient,), {"_request": lambda *a, **k: answer})()
    assert [fake.get_balance(c) for c in ("btc", "CLORE", "lor")] == [1.0, 2.0, 2.0]


def test_null_fields_in_a_live_record_and_an_unchanged_wire() -> None:
    record = changed(LIVE_ORDER, order_id=None, renting_server=None, started=None,
                     specs={"gpu": "x"})  # fmt: skip
    (order,) = orders_of(record)
    assert (order.id, order.server_id, order.started_at) == (1958009, 105169, 1784203200)
    order.wire["specs"]["gpu"] = "changed"
    order["status"] = "changed"
    assert order.wire["specs"]["gpu"] == "x"
    assert "status" not in order.wire


@pytest.mark.parametrize("answer", [{"order_id": 0}, {"order_id": -1}, {"id": None}])
def test_an_invalid_id_in_the_response_is_searched(sim: Simulator, answer: dict[str, Any]) -> None:
    client = client_for(sim)
    server_id = client.find_servers("RTX 4090", min_reliability=96)[0]["id"]
    sim.faults.add("create_order", "envelope", envelope={"code": 0, **answer}, after_commit=True)
    assert client.create_order(server_id).id == sim.orders[0].id


def test_a_base_url_that_is_a_property(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(CloreClient):
        @property
        def BASE_URL(self) -> str:  # type: ignore[override]  # noqa: N802
            return sim.url

    monkeypatch.setenv("CLORE_BASE_URL", "http://127.0.0.1:1")
    assert len(Own(sim.api_key, rate_limit=0).get_wallets()) == 3
