"""The simulator's faults, as a bare HTTP client meets them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from clore_client.simulator import Simulator
from tests.conftest import until

from .test_api import QUICK, Renter, free

LOST = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(**QUICK) as simulator:
        yield simulator


@pytest.fixture
def renter(sim: Simulator) -> Renter:
    return Renter(sim)


def create(sim: Simulator, timeout: float = 5) -> requests.Response:
    """One create_order, whatever comes back."""
    body = {
        "renting_server": free(sim),
        "type": "on-demand",
        "currency": "CLORE-Blockchain",
        "image": "x",
    }
    return requests.post(
        f"{sim.url}/v1/create_order",
        json=body,
        headers={"auth": sim.api_key},
        timeout=timeout,
        allow_redirects=False,
    )


@pytest.mark.parametrize(
    ("kind", "made"),
    [("lose_response", 1), ("lose_request", 0), ("reset_mid_body", 1)],
)
def test_lost_connections(sim: Simulator, kind: str, made: int) -> None:
    sim.faults.add("create_order", kind)
    with pytest.raises(LOST):
        create(sim)
    assert len(sim.orders) == made
    (call,) = sim.requests
    assert (call.fault, call.processed, call.code) == (kind, bool(made), None)
    assert sim.faults.waiting == 0
    assert create(sim).json()["code"] == 0


def test_reset_in_the_middle_of_a_long_answer(sim: Simulator) -> None:
    for reset in (True, False):
        sim.faults.add("marketplace", "reset_mid_body", reset=reset)
        received = 0
        with pytest.raises(LOST):  # noqa: PT012
            with requests.get(f"{sim.url}/v1/marketplace", stream=True, timeout=5) as answer:
                promised = int(answer.headers["Content-Length"])
                for piece in answer.iter_content(1000):
                    received += len(piece)
        assert 0 < received < promised


@pytest.mark.parametrize(("kind", "made"), [("hang", 0), ("hang_after_commit", 1)])
def test_hanging(sim: Simulator, kind: str, made: int) -> None:
    sim.faults.add("create_order", kind)
    with pytest.raises(requests.ReadTimeout):
        create(sim, timeout=0.5)
    assert len(sim.orders) == made
    sim.faults.add("create_order", kind, seconds=0.05)
    with pytest.raises(LOST):
        create(sim)
    assert len(sim.orders) == 2 * made


def test_commit_late(sim: Simulator) -> None:
    sim.faults.add("create_order", "commit_late", seconds=0.3)
    with pytest.raises(LOST):
        create(sim)
    assert sim.orders == []
    until(lambda: len(sim.orders) == 1)
    (order,), (call,) = sim.orders, sim.requests
    assert order.created - call.arrived >= 0.3
    assert call.processed


def test_slow(sim: Simulator) -> None:
    sim.faults.add("create_order", "slow", seconds=0.2)
    start = time.monotonic()
    assert create(sim).json() == {"code": 0}
    assert time.monotonic() - start >= 0.2


@pytest.mark.parametrize(
    ("kind", "options", "made", "status", "text"),
    [
        ("http_500_after_commit", {}, 1, 500, '{"code":1}'),
        ("http_500_before_commit", {}, 0, 500, '{"code":1}'),
        ("code_1", {}, 0, 200, '{"code":1}'),
        ("code_1", {"after_commit": True, "status": 500}, 1, 500, '{"code":1}'),
        ("html_502", {}, 0, 502, "Bad gateway"),
        ("html_502", {"status": 522}, 0, 522, "<html>"),
        ("html_502", {"after_commit": True}, 1, 502, "<html>"),
        ("html_403", {}, 0, 403, "error code: 1010"),
        ("rate_limit", {}, 0, 429, '{"code":5}'),
        ("rate_limit", {"html": True}, 0, 429, "Too Many Requests"),
        ("truncated_json", {}, 1, 200, '{"cod'),
        ("not_json", {}, 1, 200, "OK"),
        ("no_code", {}, 1, 200, '{"status":"ok"}'),
        ("no_code", {"body": {"a": 1}}, 1, 200, '{"a":1}'),
        ("redirect", {"location": "https://other.invalid/"}, 0, 302, ""),
        ("status", {"status": 418, "body": "teapot"}, 0, 418, "teapot"),
        ("status", {"body": b"\xff", "content_type": "a/b", "after_commit": True}, 1, 500, ""),
        ("envelope", {"envelope": {"code": 6, "error": "x"}}, 0, 200, '{"code":6,"error":"x"}'),
    ],
)
def test_wrong_answers(
    sim: Simulator, kind: str, options: dict[str, Any], made: int, status: int, text: str
) -> None:
    sim.faults.add("create_order", kind, **options)
    answer = create(sim)
    assert answer.status_code == status
    assert text in answer.text
    assert "Date" in answer.headers
    assert len(sim.orders) == made
    assert (sim.requests[0].status, sim.requests[0].fault) == (status, kind)
    if kind == "redirect":
        assert answer.headers["Location"] == options["location"]
    if "html" in kind or options.get("html"):
        assert answer.headers["Content-Type"].startswith("text/")


@pytest.mark.parametrize("value", [7, 0.5, "Wed, 21 Oct 2026 07:28:00 GMT"])
@pytest.mark.parametrize("html", [True, False])
def test_retry_after(sim: Simulator, value: Any, html: bool) -> None:
    sim.faults.add("create_order", "rate_limit", retry_after=value, html=html)
    assert create(sim).headers["Retry-After"] == str(value)


def test_order_number_and_key(sim: Simulator, renter: Renter) -> None:
    faults = sim.faults
    faults.add("wallets", "code_1", times=2)
    faults.add("*", "html_403")
    faults.add("wallets", "rate_limit")
    codes = [requests_status(renter, "wallets") for _ in range(3)]
    assert codes == [200, 200, 403]
    assert requests_status(renter, "my_orders") == 200
    assert requests_status(renter, "wallets") == 429
    assert faults.waiting == 0
    other = Renter(sim, sim.add_key())
    faults.add("*", "html_502", times=math.inf, key=other.session.headers["auth"])  # type: ignore[arg-type]
    assert requests_status(renter, "wallets") == 200
    assert [requests_status(other, "wallets") for _ in range(3)] == [502] * 3
    faults.clear()
    assert requests_status(other, "wallets") == 200


def requests_status(renter: Renter, endpoint: str) -> int:
    """The HTTP status of a GET, whose body may be anything."""
    return renter.session.get(f"{renter.sim.url}/v1/{endpoint}", timeout=5).status_code


def test_refused_requests_use_up_no_fault() -> None:
    with Simulator(**QUICK | {"rate_limit": 60}) as sim:
        renter = Renter(sim)
        renter.get("wallets")
        sim.faults.add("wallets", "html_403")
        assert requests_status(renter, "wallets") == 429
        assert sim.faults.waiting == 1


@pytest.mark.parametrize(
    ("arguments", "options", "word"),
    [
        (("nowhere", "slow"), {}, "endpoint"),
        (("wallets", "explode"), {}, "kind"),
        (("wallets", "slow", 0), {}, "times"),
        (("wallets", "slow", 1.5), {}, "times"),
        (("wallets", "slow"), {"color": 1}, "color"),
        (("wallets", "slow"), {"seconds": -1}, "seconds"),
    ],
)
def test_wrong_faults(arguments: Any, options: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Simulator(**QUICK).faults.add(*arguments, **options)


def test_faults_by_text() -> None:
    sim = Simulator(**QUICK, faults=["create_order:lose_response", "*:html_502:3"])
    assert sim.faults.waiting == 2
    for wrong in ("create_order", "create_order:x", "x:slow", "wallets:slow:x", "wallets:slow:0"):
        with pytest.raises(ValueError, match="must be"):
            sim.faults.add_text(wrong)


def chaos(seed: int, share: float) -> list[str | None]:
    """Which requests go wrong, and how."""
    options = QUICK | {"chaos": share, "chaos_seed": seed, "servers": 1}
    with Simulator(**options) as sim:
        for _ in range(60):
            try:
                requests_status(Renter(sim), "wallets")
            except LOST:
                continue
        return [call.fault for call in sim.requests]


def test_chaos() -> None:
    first = chaos(7, 0.4)
    assert chaos(7, 0.4) == first
    assert chaos(8, 0.4) != first
    assert 10 <= sum(fault is not None for fault in first) <= 40
    assert len(set(first)) > 4
    assert set(chaos(1, 0.0)) == {None}
    with pytest.raises(ValueError, match="kind"):
        Simulator(chaos=0.5, chaos_kinds=["explode"])
    with Simulator(**QUICK, chaos=1.0, chaos_kinds=["html_403"]) as sim:
        assert requests_status(Renter(sim), "wallets") == 403
        sim.faults.set_chaos(0.0, 1)
        assert requests_status(Renter(sim), "wallets") == 200


def test_stopping_ends_what_hangs() -> None:
    with Simulator(**QUICK) as sim:
        sim.faults.add("wallets", "hang")
        sim.faults.add("create_order", "commit_late", seconds=60)
        with pytest.raises(requests.ReadTimeout):
            requests.get(f"{sim.url}/v1/wallets", timeout=0.1)
        with pytest.raises(LOST):
            create(sim)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert sim.orders == []
