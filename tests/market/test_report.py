"""Inside a search: its report, hostile listings, and the summary of a market."""

from __future__ import annotations

import json
import logging
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clore_client.api import retry
from clore_client.market.search import Search
from clore_client.market.summary import quantile, summarize
from clore_client.models.record import RawRecords, dicts
from clore_client.models.server import Marketplace
from tests.market.test_search import listing, server
from tests.models.test_records import LIVE_SERVER, damaged, properties_of, values

ALL: dict[str, Any] = {
    "gpu_count": 1, "min_gpu_count": 1, "min_vram_gb": 1, "min_total_vram_gb": 1, "min_ram_gb": 1,
    "min_cpu_cores": 1, "min_disk_gb": 1, "min_disk_mbps": 1, "min_download_mbps": 1,
    "min_upload_mbps": 1, "min_cuda": 1, "min_pcie_width": 1, "countries": ["Europe"],
    "exclude_countries": ["Asia"], "currency": "BTC", "min_rating": 1, "min_ratings": 1,
    "min_rental_hours": 1, "exclude_servers": [5], "exclude_owners": [5],
    "max_price_per_gpu_usd": 5, "include_fees": True, "where": lambda found: True,
}  # fmt: skip


def report(servers: list[Any], *args: Any, **filters: Any) -> Any:
    price = args[1] if len(args) > 1 else None
    return Search(args[0] if args else None, price, filters=filters).run(
        Marketplace(listing(*servers))
    )[1]


def test_the_last_filter_and_the_cheapest_of_its_servers() -> None:
    servers = [
        server(1, ["RTX 3090"]), server(2, rented=True), server(3, usd=6), server(4, usd=9),
    ]  # fmt: skip
    got = report(servers, "RTX 4090", 0.1)
    assert (got.listed, got.found) == (4, 0)
    assert got.left_out == [("gpu_type='RTX 4090'", 1), ("being rented", 1),
                            ("max_price_usd=0.1", 2)]  # fmt: skip
    assert got.cheapest_usd_per_hour == 0.25
    assert got.explain() == (
        "none of 4 servers fits: gpu_type='RTX 4090' left out 1, being rented left out 1, "
        "max_price_usd=0.1 left out the last 2, of which the cheapest costs 0.25 USD per hour"
    )
    got = report(servers, "RTX 4090", 0.1, include_fees=True)
    assert got.cheapest_usd_per_hour == pytest.approx(0.2625)
    got = report([server(1, ["RTX 3090"], usd=2.4), server(2, rented=True, usd=6)], "RTX 4090")
    assert got.left_out == [("gpu_type='RTX 4090'", 1), ("being rented", 1)]
    assert got.cheapest_usd_per_hour == 0.25
    assert report([server(1, ["RTX 3090"])], "RTX 4090").cheapest_usd_per_hour is None
    got = report([server(1, usd=3), server(2, usd=2.4)], where=lambda found: False)
    assert (got.left_out, got.cheapest_usd_per_hour) == ([("where", 2)], pytest.approx(0.1))


def test_the_report_of_a_result() -> None:
    servers = [server(1), server(2, rented=True), server(3)]
    assert report(servers).explain() == "2 of 3 servers fit; being rented left out 1"
    assert report(servers, limit=1).found == 2
    assert report([]).explain() == "the marketplace lists no server"
    assert "fits" in repr(report([server(1, rented=True)]))


def test_a_report_has_the_nearest_names() -> None:
    got = report([server(1), server(2, ["RTX 4080"])], "RTX 4091")
    assert got.nearest_models == ["RTX 4090", "RTX 4080"]
    assert got.explain() == (
        "none of 2 servers fits: gpu_type='RTX 4091' left out the last 2; the nearest GPU names "
        "are 'RTX 4090', 'RTX 4080'"
    )


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __call__(self, found: Any) -> bool:
        return False


def test_a_predicate_without_a_repr() -> None:
    assert report([server(1)], where=Broken()).left_out == [("where", 1)]


@settings(max_examples=200)
@given(st.lists(damaged(LIVE_SERVER) | values, max_size=5), st.booleans())
def test_no_listing_raises(records: list[Any], spot: bool) -> None:
    before = repr(records)
    for search in (
        Search("rtx", 1.0, 50, spot, ALL),
        Search(None, None, 0, spot, {"sort": "vram"}),
        Search("A10", math.inf, 0, spot, {"exact_gpu": True, "sort": "price_per_gpu"}),
    ):
        found, got = search.run(Marketplace({"servers": records}))
        assert got.explain()
        assert got.found == len(found)
        assert got.listed == len(dicts(records))
        assert got.found + sum(count for _, count in got.left_out) == got.listed
        for one in found:
            properties_of(one)
            assert search.price(one) is None or search.price(one) > 0  # type: ignore[operator]
    summarize(Marketplace({"servers": records}))
    assert repr(records) == before


@settings(max_examples=60)
@given(st.data())
def test_more_filters_never_find_more(data: st.DataObject) -> None:
    """State the invariant: each filter keeps a part of what was found without it."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    servers = [
        server(n, [rng.choice(["RTX 4090", "RTX 3090"])] * rng.randint(1, 4), rng.uniform(1, 9))
        for n in range(1, 12)
    ]
    chosen = data.draw(st.sets(st.sampled_from(sorted(ALL))))
    one = data.draw(st.sampled_from(sorted(ALL)))
    fewer, _ = Search("rtx", filters={k: ALL[k] for k in chosen}).run(
        Marketplace(listing(*servers))
    )
    more, _ = Search("rtx", filters={k: ALL[k] for k in {*chosen, one}}).run(
        Marketplace(listing(*servers))
    )
    assert {found.id for found in more} <= {found.id for found in fewer}


# --- with and without msgspec ---

# JSON values that decoders treat differently.
ODD = [
    b"NaN", b"-Infinity", b"1e400", b"-0", b"1" * 30, b"1" * 4400, b"1" * 5000 + b".5", b"01",
    b'"\\ud800"', b'"\xed\xa0\x80"', b'"\xff"', b'"\x00"', '"é€"'.encode(), b"[[[" * 50, b"{}",
    b'{"on_demand": 1, "usd": {"on_demand_clore": 5}, "usd": null}', b'"' + b"x" * 5000 + b'"',
]  # fmt: skip
DOCUMENTED_SERVER = {
    "id": 7, "gpu_array": ["RTX 4090"], "reliability": 99.0, "rented": False, "specs": {"gpu": ""},
    "price": {"usd": {"on_demand_clore": 0.5, "spot": 0.2}},
}  # fmt: skip


@st.composite
def server_bytes(draw: st.DrawFn) -> bytes:
    """Return one server in JSON, at times with a key twice or an odd value."""
    record = draw(damaged(LIVE_SERVER) | damaged(DOCUMENTED_SERVER) | values)
    text = json.dumps(record, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if not isinstance(record, dict) or not record or draw(st.booleans()):
        return text
    key = draw(
        st.sampled_from([b"id", b"price", b"specs", b"rented", b"x", b"rent\\u0065d", b"\xff"])
    )
    pair = b'"%s": %s' % (key, draw(st.sampled_from(ODD)))
    return (
        b"{" + pair + b", " + text[1:] if draw(st.booleans()) else text[:-1] + b", " + pair + b"}"
    )


def outcomes(body: bytes, decode: Any) -> list[Any]:
    """Return all that a user sees of a marketplace."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("clore_client").addHandler(handler)
    try:
        response = decode(body)
        if not isinstance(response, dict):
            return ["not readable"]
        market = Marketplace(response)
        seen: list[Any] = [market.live, market.prices, market.rates, summarize(market)]
        seen.append([(dict(s), s.wire) for s in market.servers(include_rented=True)])
        for search in (
            Search("rtx", 1.0, 50, False, {"gpu_count": 1, "min_ram_gb": 1}),
            Search("A10", use_spot=True),
            Search(filters={"sort": "vram"}),
            Search("4090", filters=ALL),
        ):
            found, report = search.run(market)
            seen.append(([dict(s) for s in found], report.explain()))
    finally:
        logging.getLogger("clore_client").removeHandler(handler)
    return [*map(repr, seen), *warnings]


@settings(max_examples=300)
@given(st.lists(server_bytes(), max_size=5), st.sampled_from([b"0", b"0", b"0", b"5", b"0.0"]))
def test_msgspec_changes_no_result(servers: list[bytes], code: bytes) -> None:
    pytest.importorskip("msgspec")
    body = b'{"servers": [' + b",".join(servers) + b'], "my_servers": [1], "code": ' + code + b"}"
    expected = outcomes(body, lambda text: without_msgspec(retry.decode_json, text))
    assert outcomes(body, retry.decode_servers) == expected
    assert outcomes(body, retry.decode_json) == expected


@pytest.mark.parametrize("odd", ODD)
def test_msgspec_changes_no_result_of_an_odd_value(odd: bytes) -> None:
    pytest.importorskip("msgspec")
    good = json.dumps(LIVE_SERVER).encode()
    body = b'{"code": 0, "servers": [' + good + b',{"id": 1, "x": ' + odd + b"}," + good + b"]}"
    expected = outcomes(body, lambda text: without_msgspec(retry.decode_json, text))
    assert outcomes(body, retry.decode_servers) == expected


def without_msgspec(decode: Any, body: bytes) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "fast_json", lambda: None)
        return decode(body)


def test_servers_stay_in_json_only_in_a_listing_that_is_fine() -> None:
    pytest.importorskip("msgspec")
    good = b'{"code": 0, "servers": [{"id": 1}, null], "my_servers": [5]}'
    response = retry.decode_servers(good)
    assert isinstance(response["servers"], RawRecords)
    assert [*response["servers"]] == [{"id": 1}, None]
    assert response["my_servers"] == [5]
    long = good.replace(b"null", b'{"x": "' + b"x" * 9000 + b'"}')
    assert isinstance(retry.decode_servers(long)["servers"], RawRecords)
    others = [good.replace(b"0", code) for code in (b"5", b"0.0", b"false", b"null")]
    others += [good.replace(b"[{", b"{").replace(b"l]", b"l"), good.replace(b"null", b"1" * 5000)]
    for body in (*others, b'{"code": 0}', b"[]"):
        assert retry.decode_servers(body) == retry.decode_json(body)


# --- market_summary() ---


def test_a_summary_of_the_market() -> None:
    servers = [
        server(1, usd=3), server(2, ["RTX4090"] * 2, usd=12), server(3, usd=24, rented=True),
        server(4, ["NVIDIA GeForce RTX 4090", "GTX 1080"], usd=0.24), server(5, [], usd=1),
        server(6, ["GTX 1080"], price=None),
    ]  # fmt: skip
    top, other = summarize(Marketplace(listing(*servers)))
    assert top[:5] == ("RTX 4090", 4, 3, 5, 4)
    assert (top.lowest_usd, top.median_usd) == (0.125, 0.1875)
    assert top.p90_usd == pytest.approx(0.2375)
    assert (top.spot_lowest_usd, top.spot_median_usd) == (0.0625, 0.09375)
    assert other == ("GTX 1080", 2, 2, 2, 2, None, None, None, None, None, None)
    with_fees = summarize(Marketplace(listing(*servers)), include_fees=True)[0]
    assert with_fees.lowest_usd == pytest.approx(0.13125)
    assert with_fees.spot_lowest_usd == pytest.approx(0.0625 * 1.0125)
    rented_too = summarize(Marketplace(listing(*servers)), include_rented=True)[0]
    assert (rented_too.lowest_usd, rented_too.median_usd) == (0.125, 0.25)
    assert rented_too[:5] == top[:5]
    assert summarize(Marketplace(listing())) == []


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_is_between_the_numbers(numbers: list[float], share: float) -> None:
    ordered = sorted(numbers)
    got = quantile(ordered, share)
    assert got is not None
    assert ordered[0] <= got <= ordered[-1] * (1 + 1e-12)
    assert quantile(ordered, 0) == ordered[0]
    assert quantile(ordered, 1) == ordered[-1]
    assert quantile([], share) is None
