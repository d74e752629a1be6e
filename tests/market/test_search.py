"""find_servers(), find_cheapest() and rent(): filters, sorting, explanations."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from clore_client import CloreClient, RentalError, Server
from tests.conftest import MakeSim, client_for, sent_to
from tests.variant import Simulator

QUICK: dict[str, Any] = {"poll_interval": 0.02, "deploy_timeout": 20, "cancel_timeout": 10}


def listing(*servers: dict[str, Any]) -> dict[str, Any]:
    return {"code": 0, "servers": list(servers), "my_servers": []}


def server(number: int, gpus: Any = ("RTX 4090",), usd: float = 2.4, **fields: Any) -> Any:
    """Return a server in the live form; ``usd`` is per day."""
    specs = {
        "cpus": "16/32", "ram": 64.0, "disk": "SSD 500.5GB", "disk_speed": 1000.0, "gpuram": 23,
        "gpu": f"{len(gpus)}x NVIDIA GeForce {gpus[0]}" if len(set(gpus)) == 1 else "Mixed GPUs",
        "net": {"cc": "DE", "down": 500.0, "up": 400.0}, "pcie_width": 16,
        **fields.pop("specs", {}),
    }  # fmt: skip
    price = {
        "on_demand": {
            "bitcoin": usd / 68000,
            "CLORE-Blockchain": usd / 0.0027,
            "USD-Blockchain": usd,
        },
        "usd": {
            "on_demand_btc": usd,
            "on_demand_clore": usd,
            "on_demand_usd": usd,
            "spot": usd / 2,
        },
    }
    return {
        "id": number, "owner": 7, "mrl": 720, "rented": False, "reliability": 0.99,
        "cuda_version": "12.4", "allowed_coins": ["bitcoin", "CLORE-Blockchain", "USD-Blockchain"],
        "rating": {"avg": 4.5, "cnt": 10}, "gpu_array": list(gpus), "price": price, "specs": specs,
        **fields,
    }  # fmt: skip


@pytest.fixture
def find(sim: Simulator, client: CloreClient) -> Callable[..., list[int | None]]:
    """Return a function that searches a given list of servers, and returns ids."""

    def search(servers: list[Any], *args: Any, **filters: Any) -> list[int | None]:
        sim.faults.add("marketplace", "envelope", envelope=listing(*servers), after_commit=False)
        return [found.id for found in client.find_servers(*args, **filters)]

    return search


# --- each filter ---

# filter, value, a change that passes, changes that do not pass
CASES: list[tuple[str, Any, dict[str, Any], list[dict[str, Any]]]] = [
    ("gpu_count", 2, {"gpus": ["RTX 4090"] * 2}, [{}, {"gpus": ["RTX 4090"] * 3}]),
    ("min_gpu_count", 2, {"gpus": ["RTX 4090"] * 3}, [{}]),
    ("min_vram_gb", 24, {}, [{"specs": {"gpuram": 22}}, {"specs": {"gpuram": None}}]),
    ("min_vram_gb", 12, {"specs": {"gpuram": 11}},
     [{"specs": {"gpuram": 11, "gpu": None}, "gpus": ["GTX 1080 Ti"]}, {"specs": {"gpuram": 10}}]),
    ("min_total_vram_gb", 48, {"gpus": ["RTX 4090"] * 2}, [{}, {"specs": {"gpuram": "48"}}]),
    ("min_ram_gb", 64, {}, [{"specs": {"ram": 63.9}}, {"specs": {"ram": None}}]),
    ("min_cpu_cores", 16, {}, [{"specs": {"cpus": "8/16"}}, {"specs": {"cpus": 16}}]),
    ("min_disk_gb", 500, {}, [{"specs": {"disk": "SSD 2TB"}}, {"specs": {"disk": "X 499GB"}}]),
    ("min_disk_mbps", 1000, {}, [{"specs": {"disk_speed": 999}}, {"specs": {"disk_speed": None}}]),
    ("min_download_mbps", 500, {}, [{"specs": {"net": {"down": 499}}}, {"specs": {"net": None}}]),
    ("min_upload_mbps", 400, {}, [{"specs": {"net": {"up": 1}}}, {"specs": {"net": "DE"}}]),
    ("min_cuda", 12.4, {}, [{"cuda_version": "12.3"}, {"cuda_version": None}]),
    ("min_cuda", "12.10", {"cuda_version": "12.10"}, [{"cuda_version": "12.9"}]),
    ("min_cuda", "12", {"cuda_version": "12.0"}, [{"cuda_version": "11.8"}]),
    ("min_pcie_width", 16, {}, [{"specs": {"pcie_width": 8}}, {"specs": {"pcie_width": "16"}}]),
    ("countries", ["de"], {}, [{"specs": {"net": {"cc": "US"}}}, {"specs": {"net": {}}}]),
    ("countries", ["EU"], {}, [{"specs": {"net": {"cc": "NO"}}}]),
    ("countries", ["EEA"], {"specs": {"net": {"cc": "NO"}}}, [{"specs": {"net": {"cc": "CH"}}}]),
    ("countries", ["Europe"], {"specs": {"net": {"cc": "CH"}}}, [{"specs": {"net": {"cc": "KR"}}}]),
    ("countries", ["north america", "JP"], {"specs": {"net": {"cc": "CA"}}},
     [{"specs": {"net": {"cc": "BR"}}}]),
    ("countries", ["UK"], {"specs": {"net": {"cc": "GB"}}}, [{}]),
    ("exclude_countries", ["Asia"], {}, [{"specs": {"net": {"cc": "KR"}}}, {"specs": {"net": {}}}]),
    ("currency", "BTC", {}, [{"allowed_coins": ["USD-Blockchain"]}]),
    ("min_rating", 4.5, {}, [{"rating": {"avg": 4.4, "cnt": 10}}, {"rating": None}]),
    ("min_ratings", 10, {}, [{"rating": {"avg": 5, "cnt": 9}}, {"rating": {"avg": 5}}]),
    ("min_rental_hours", 720, {}, [{"mrl": 719}, {"mrl": None}]),
    ("exclude_servers", [2, 3], {}, []),
    ("exclude_owners", [8], {}, [{"owner": 8}, {"owner": None}]),
    ("max_price_per_gpu_usd", 0.1, {"gpus": ["RTX 4090"] * 2, "usd": 4.8},
     [{"usd": 2.5}, {"price": None}]),
    ("where", lambda found: found.cpu_cores == 16, {}, [{"specs": {"cpus": "8/16"}}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "good", "bad"), CASES)
def test_each_filter(find: Any, name: str, value: Any, good: Any, bad: Any) -> None:
    servers = [server(1, **good), *(server(n + 2, **fields) for n, fields in enumerate(bad))]
    assert find(servers, **{name: value}) == [1]
    assert 1 in find(servers)  # None is no filter
    assert len(find(servers, **{name: None})) == len(servers)


@pytest.mark.parametrize(
    "name", [c[0] for c in CASES if c[0].startswith("min_") and isinstance(c[1], (int, float))]
)
def test_zero_is_no_limit(find: Any, name: str) -> None:
    assert find([{"id": 1, "price": {"on_demand": {}}}], **{name: 0}) == [1]


def test_the_servers_of_the_market_pass_their_filters(any_client: CloreClient) -> None:
    everything = any_client.find_servers()
    checks: dict[str, tuple[Any, Callable[[Server], Any]]] = {
        "min_ram_gb": (60, lambda s: s.ram_gb),
        "min_cpu_cores": (16, lambda s: s.cpu_cores),
        "min_disk_gb": (500, lambda s: s.disk_gb),
        "min_disk_mbps": (2000, lambda s: s.disk_mbps),
        "min_download_mbps": (800, lambda s: s.download_mbps),
        "min_upload_mbps": (800, lambda s: s.upload_mbps),
        "min_pcie_width": (8, lambda s: s.pcie_width),
        "min_rating": (4, lambda s: s.rating),
        "min_ratings": (20, lambda s: s.rating_count),
        "min_rental_hours": (100, lambda s: s.max_rental_hours),
        "min_gpu_count": (2, lambda s: s.gpu_count),
    }
    for name, (least, field) in checks.items():
        expected = [s for s in everything if (field(s) or 0) >= least]
        assert any_client.find_servers(**{name: least}) == expected
    allowed = {"SE", "NO", "IS"}
    found = any_client.find_servers(countries=allowed)
    assert found == [s for s in everything if s.country in allowed]
    joined = any_client.find_servers(min_ram_gb=30, min_cpu_cores=16, countries=["Europe"], limit=3)
    fitting = [s for s in everything if (s.ram_gb or 0) >= 30 and (s.cpu_cores or 0) >= 16]
    names = {"NO", "SE", "DE", "FR", "PL", "CZ", "BG", "UA", "IS"}
    assert joined == [s for s in fitting if s.country in names][:3]
    cheapest = any_client.find_cheapest(min_ram_gb=30, min_cpu_cores=16, countries=["Europe"])
    assert cheapest == joined[0]


# --- names of GPUs ---


@pytest.mark.parametrize(
    "query", ["RTX4090", "NVIDIA GeForce RTX 4090", "2x RTX 4090", "rtx-4090", "4090"]
)
def test_spellings_of_a_gpu_find_the_same(any_client: CloreClient, query: str) -> None:
    plain = any_client.find_servers("RTX 4090")
    assert plain
    assert any_client.find_servers(query) == plain


def test_whole_words_of_rented_models_count_too(find: Any) -> None:
    assert find([server(1, ["A100"]), server(2, ["A10"])], "A10") == [2]
    assert find([server(1, ["A100"]), server(2, ["A10"], rented=True)], "A10") == []
    assert find([server(1, ["A100"])], "A10") == [1]  # a part of a word, with a warning


def test_related_models_and_the_exact_one(find: Any) -> None:
    servers = [server(n, [f"RTX 4070{end}"]) for n, end in enumerate(("", " Ti", " SUPER"), 1)]
    assert find(servers, "RTX 4070") == [1, 2, 3]
    assert find(servers, "RTX4070", exact_gpu=True) == [1]
    assert find(servers, "RTX 4070 Ti", exact_gpu=True) == [2]


def test_a_mixed_rig_counts_the_gpus_that_match(find: Any) -> None:
    rig = server(1, ["GTX 1080", "RTX 3060", "RTX 3060"], usd=4.8)
    assert find([rig], "RTX 3060") == find([rig], "RTX 3060", gpu_count=2) == [1]
    assert find([rig], "RTX 3060", gpu_count=3) == find([rig], "GTX 1080", gpu_count=2) == []
    assert find([rig], gpu_count=3) == [1]
    assert find([rig], "RTX 3060", max_price_per_gpu_usd=0.1) == [1]
    assert find([rig], "GTX 1080", max_price_per_gpu_usd=0.1) == []
    assert find([rig], "RTX 3060", min_total_vram_gb=48) == [1]
    assert find([rig], "RTX 3060", min_total_vram_gb=49) == []


def test_an_unknown_gpu_warns_with_the_nearest_names(
    client: CloreClient, caplog: pytest.LogCaptureFixture
) -> None:
    assert client.find_servers("RTX 4900") == []
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "no GPU on the market is named 'RTX 4900'; the nearest are" in warning
    assert "'RTX 4090'" in warning
    assert client.find_cheapest("RTX 4900") is None


@pytest.mark.parametrize("form", ["live", "documented"])
def test_a_mixed_rig_names_all_its_gpus(make_sim: MakeSim, form: str) -> None:
    any_client = client_for(make_sim(form=form, servers=400))
    rigs = [s for s in any_client.get_marketplace(True) if len(set(s["gpu_array"])) > 1]
    assert rigs
    for rig in rigs:
        first = rig["gpu_array"][0]
        assert rig.gpu is not None
        assert rig.gpu.startswith(f"{rig['gpu_array'].count(first)}x {first} + ")
        assert all(name in rig.gpu for name in rig["gpu_array"])
        assert rig.total_vram_gb is None


def test_the_cheapest_without_the_price_limit_passes_the_predicate(any_client: CloreClient) -> None:
    def odd(server: Server) -> bool:
        return (server.id or 0) % 2 == 1

    fitting = any_client.find_cheapest("RTX 4090", where=odd)
    assert fitting is not None
    nothing = any_client.find_servers("RTX 4090", 0.0001, where=odd)
    price = fitting.usd_per_hour or 0.0
    assert nothing == []
    assert nothing.explain().endswith(f"the cheapest costs {price:.4g} USD per hour")
    assert (
        "cheapest" not in any_client.find_servers("4090", 0.0001, where=lambda s: False).explain()
    )


def test_gpu_models(any_client: CloreClient) -> None:
    models = any_client.gpu_models()
    assert "RTX 4090" in models
    assert models == sorted(models, key=str.lower)
    servers = any_client.get_marketplace(include_rented=True)

    def folded(name: Any) -> Any:
        return re.sub("nvidia|geforce| ", "", name.lower())

    assert {folded(m) for m in models} == {folded(n) for s in servers for n in s["gpu_array"]}


# --- prices, currencies, sorting ---


def test_a_currency_brings_its_own_price(find: Any, client: CloreClient) -> None:
    cheap_in_btc = server(1, usd=4.8)
    cheap_in_btc["price"]["usd"]["on_demand_btc"] = 1.2
    servers = [cheap_in_btc, server(2, usd=2.4)]
    assert find(servers) == find(servers, currency="USD") == [2, 1]
    assert find(servers, currency="btc") == [1, 2]
    assert find(servers, None, 0.06, currency="bitcoin") == [1]
    assert find(servers, None, 0.06) == []
    spot = server(3)
    spot["price"]["original_usd"] = {"bitcoin": {"spot": 0.24}}
    assert find([spot], None, 0.02, use_spot=True, currency="BTC") == [3]
    assert find([spot], None, 0.02, use_spot=True, currency="CLORE") == []


def test_a_server_that_does_not_list_its_currencies(find: Any, make_sim: MakeSim) -> None:
    unknown = server(1, allowed_coins=None)
    del unknown["price"]["on_demand"]["bitcoin"]
    assert find([unknown], currency="CLORE") == [1]  # it has a price in CLORE
    assert find([unknown], currency="BTC") == []
    documented = make_sim(form="documented")
    plain = {"id": 1, "gpu_array": ["RTX 4090"], "price": {"usd": {"on_demand_clore": 0.2}},
             "reliability": 99.0, "rented": False, "specs": {}}  # fmt: skip
    documented.faults.add("marketplace", "envelope", envelope=listing(plain), after_commit=False)
    assert len(client_for(documented).find_servers(currency="BTC", max_price_usd=0.2)) == 1


def test_fees_in_the_price_limits(find: Any) -> None:
    servers = [server(1, usd=24.0)]  # 1 USD per hour, 1.05 with fees; spot 0.5 and 0.50625
    assert find(servers, None, 1.0) == find(servers, None, 1.05, include_fees=True) == [1]
    assert find(servers, None, 1.049, include_fees=True) == []
    assert find(servers, max_price_per_gpu_usd=1.049, include_fees=True) == []
    assert find(servers, None, 0.50625, use_spot=True, include_fees=True) == [1]
    assert find(servers, None, 0.506, use_spot=True, include_fees=True) == []


def test_sorting(find: Any) -> None:
    servers = [
        server(1, usd=3, reliability=0.9, specs={"gpuram": 16, "net": {"down": 10}}, rating=None),
        server(2, ["RTX 4090"] * 4, usd=8, reliability=0.99, specs={"gpuram": 79, "net": {}}),
        server(3, usd=2.5, specs={"gpuram": None, "net": {"down": 90}}, rating={"avg": 5}),
        server(4, usd=2.5, specs={"gpuram": None, "net": {"down": 90}}, rating={"avg": 5}),
        server(5, price={"on_demand": {}}, reliability=None, specs={"gpuram": 24}),
    ]
    orders = {
        "price": [3, 4, 1, 2, 5], "price_per_gpu": [2, 3, 4, 1, 5],
        "reliability": [3, 4, 2, 1, 5], "vram": [2, 5, 1, 3, 4], "download": [5, 3, 4, 1, 2],
        "rating": [3, 4, 2, 5, 1],
    }  # fmt: skip
    for sort, order in orders.items():
        assert find(servers, sort=sort) == order, sort
    assert find(servers, sort=lambda found: -(found.id or 0)) == [5, 4, 3, 2, 1]
    assert find(servers, sort="vram", limit=2) == [2, 5]


# --- rent() ---


def test_rent_takes_the_first_server_of_the_same_search(sim: Simulator) -> None:
    searches: list[dict[str, Any]] = [
        {"min_gpu_count": 2}, {"sort": "download"}, {"sort": "price_per_gpu", "min_ram_gb": 30},
        {"countries": ["Europe"], "exclude_countries": ["EU"]}, {"max_price_per_gpu_usd": 0.1},
        {"use_spot": True, "sort": "rating"}, {"where": lambda found: (found.id or 0) % 2},
        {"max_price_usd": 0.3, "include_fees": True, "sort": "vram"},
    ]  # fmt: skip
    for filters in searches:
        with client_for(sim) as client:
            sim.clear_requests()
            first = client.find_cheapest(currency="CLORE", **filters)
            assert first is not None
            with pytest.raises(RentalError), client.rent(attempts=1, image="x", **filters, **QUICK):
                raise RentalError("enough")
            assert sent_to(sim, "create_order")[0].body["renting_server"] == first.id


def test_a_filter_does_not_cost_the_fallback(sim: Simulator, client: CloreClient) -> None:
    first, second = client.find_servers("RTX 4090", gpu_count=1, currency="CLORE")[:2]
    sim.set_offline(first["id"])
    with client.rent("RTX 4090", gpu_count=1, **QUICK) as rental:
        assert [server_id for server_id, _ in rental.tried] == [first.id]
        assert rental.server.id == second.id


def test_fees_are_part_of_the_limit_of_a_rental(sim: Simulator, client: CloreClient) -> None:
    cheapest = client.find_cheapest("RTX 4090", currency="CLORE")
    assert cheapest is not None
    limit = (cheapest.usd_per_hour or 0) * 1.04
    with pytest.raises(RentalError, match=r"max_price_usd=.* left out the last"):
        client.rent("RTX 4090", limit, include_fees=True, **QUICK).__enter__()
    with client.rent("RTX 4090", limit, **QUICK) as rental:
        assert rental.server.id == cheapest.id


def test_the_error_of_a_rental_explains_the_search(client: CloreClient) -> None:
    cheapest = client.find_cheapest("RTX 4090", currency="CLORE")
    assert cheapest is not None
    costs = f"{cheapest.usd_per_hour:.4g}"
    expected = (
        rf"max_price_usd=0.001 left out the last \d+, of which the cheapest costs {costs} USD"
    )
    with pytest.raises(RentalError, match=expected):
        client.rent("RTX 4090", 0.001, **QUICK).__enter__()
    with pytest.raises(RentalError, match=r"min_ram_gb=100000 left out the last"):
        client.rent("RTX 4090", min_ram_gb=100_000, **QUICK).__enter__()
    with pytest.raises(RentalError, match="does not fit min_ram_gb=100000; it costs"):
        client.rent(server_id=cheapest.id, min_ram_gb=100_000, **QUICK).__enter__()


# --- a kept listing ---


def test_a_kept_listing_sends_nothing(sim: Simulator, client: CloreClient) -> None:
    def reads() -> int:
        return len(sent_to(sim, "marketplace"))

    first = client.find_servers("RTX 4090", cache_seconds=60)
    assert client.find_servers("RTX 4090", cache_seconds=60) == first
    assert client.find_cheapest("RTX 4090", min_ram_gb=1, cache_seconds=60) is not None
    assert client.gpu_models(cache_seconds=60)
    assert client.market_summary(cache_seconds=60)
    assert reads() == 1
    client.find_servers()  # off by default
    assert reads() == 2
    client.find_servers(cache_seconds=1e-9)
    assert reads() == 3


# --- _request of a subclass or a fake ---


def check_request_override(client: CloreClient) -> None:
    """Check a client whose ``_request`` renames the GPUs."""
    assert client.find_servers("My GPU") == client.find_servers()
    assert client.gpu_models() == ["My GPU"]
    assert {server.gpu_name for server in client.get_marketplace()} == {"My GPU"}
    found = client.find_cheapest("My GPU", cache_seconds=60)
    assert found is not None
    assert client.find_cheapest(cache_seconds=60) == found


def renamed(response: dict[str, Any]) -> dict[str, Any]:
    for record in response["servers"]:
        record["gpu_array"] = ["My GPU"]
    return json.loads(json.dumps(response))  # type: ignore[no-any-return]


def test_a_subclass_may_change_the_servers(sim: Simulator) -> None:
    class Renaming(CloreClient):
        def _request(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return renamed(super()._request(*args, **kwargs))

    check_request_override(Renaming(base_url=sim.url, rate_limit=0, state_dir=None))


def test_an_attribute_may_change_the_servers(sim: Simulator, client: CloreClient) -> None:
    usual = client._request
    client._request = lambda *args, **kwargs: renamed(usual(*args, **kwargs))  # type: ignore[method-assign]
    check_request_override(client)


def test_request_returns_plain_records(client: CloreClient) -> None:
    servers = client._request("GET", "/v1/marketplace")["servers"]
    assert json.loads(json.dumps(servers)) == servers
    assert {server.id for server in client.get_marketplace(True)} == {s["id"] for s in servers}


# --- bad input ---

NAN = math.nan
NO_COUNTS: list[Any] = ["2", True, 1j]
BAD: list[tuple[str, dict[str, Any], type[Exception]]] = [
    *[(name, {name: bad}, ValueError)
      for name in ("min_vram_gb", "min_total_vram_gb", "min_ram_gb", "min_disk_gb", "min_disk_mbps",
                   "min_download_mbps", "min_upload_mbps", "min_rating", "min_rental_hours",
                   "max_price_per_gpu_usd", "min_reliability", "max_price_usd")
      for bad in (-1, NAN)],
    *[(name, {name: bad}, TypeError)
      for name in ("gpu_count", "min_gpu_count", "min_cpu_cores", "min_pcie_width", "min_ratings",
                   "limit", "min_ram_gb", "max_price_per_gpu_usd")
      for bad in NO_COUNTS],
    *[(name, {name: -1}, ValueError)
      for name in ("min_gpu_count", "min_cpu_cores", "min_pcie_width", "min_ratings")],
    ("gpu_count", {"gpu_count": 0}, ValueError),
    ("gpu_count", {"gpu_count": 1, "min_gpu_count": 2}, ValueError),
    ("limit", {"limit": 0}, ValueError),
    ("min_reliability", {"min_reliability": 100.5}, ValueError),
    ("min_reliability", {"min_reliability": None}, TypeError),
    ("min_rating", {"min_rating": 5.1}, ValueError),
    ("sort", {"sort": "cheap"}, ValueError),
    ("sort", {"sort": 5}, TypeError),
    ("sort", {"sort": lambda: 1}, TypeError),
    ("where", {"where": "x"}, TypeError),
    ("where", {"where": lambda a, b: True}, TypeError),
    ("currency", {"currency": "EUR"}, ValueError),
    ("currency", {"currency": 5}, TypeError),
    ("countries", {"countries": "DE"}, TypeError),
    ("countries", {"countries": ["Germany"]}, ValueError),
    ("countries", {"countries": ["XX"]}, ValueError),
    ("countries", {"countries": []}, ValueError),
    ("countries", {"countries": [5]}, TypeError),
    ("countries", {"countries": ["DE"], "exclude_countries": ["EU"]}, ValueError),
    ("exclude_countries", {"exclude_countries": "EU"}, TypeError),
    ("exclude_servers", {"exclude_servers": "5"}, TypeError),
    ("exclude_servers", {"exclude_servers": 5}, TypeError),
    ("exclude_owners", {"exclude_owners": ["x"]}, ValueError),
    ("min_cuda", {"min_cuda": "new"}, ValueError),
    ("min_cuda", {"min_cuda": -1}, ValueError),
    ("min_cuda", {"min_cuda": [12]}, TypeError),
    ("exact_gpu", {"exact_gpu": 1}, TypeError),
    ("include_fees", {"include_fees": "yes"}, TypeError),
    ("did you mean gpu_count", {"gpu_cnt": 2}, TypeError),
]  # fmt: skip


@pytest.mark.parametrize(("text", "filters", "error"), BAD)
def test_bad_filters(
    sim: Simulator, client: CloreClient, text: str, filters: Any, error: type[Exception]
) -> None:
    for call in (client.find_servers, client.find_cheapest, client.rent):
        with pytest.raises(error, match=text):
            call(**filters)
    assert sim.requests == []


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("max_price", "max_price_usd"),
        ("max_price_us", "max_price_usd"),
        ("max_price_per_hour", "max_price_usd"),
        ("max_price_per_gpu", "max_price_per_gpu_usd"),
        ("gpu_typ", "gpu_type"),
        ("min_reliabilty", "min_reliability"),
        ("use_spott", "use_spot"),
    ],
)
def test_a_misspelled_parameter_suggests_the_right_one(
    sim: Simulator, client: CloreClient, wrong: str, meant: str
) -> None:
    filters: Any = {wrong: 0.5}
    for call in (client.find_servers, client.find_cheapest, client.rent):
        with pytest.raises(TypeError, match=rf"'{wrong}': did you mean {meant}\?"):
            call(**filters)
    assert sim.requests == []


def test_an_unknown_parameter_names_those_of_the_method(client: CloreClient) -> None:
    with pytest.raises(TypeError, match=r"mean max_hours\?"):
        client.rent("RTX 4090", max_hour=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"mean max_cost_usd\?"):
        client.rent("RTX 4090", max_cost=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"gpu_type, max_price_usd, .*cache_seconds.*, min_vram_gb"):
        client.find_servers(xyzzy=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"gpu_type, max_price_usd, .*max_hours.*, min_vram_gb"):
        client.rent(xyzzy=2)  # type: ignore[call-arg]


def test_cache_seconds_is_checked(sim: Simulator, client: CloreClient) -> None:
    calls: list[Any] = [client.find_servers, client.find_cheapest, client.gpu_models]
    bad_values: list[Any] = [-1, NAN, "60"]
    for call in [*calls, client.market_summary]:
        for bad in bad_values:
            with pytest.raises((ValueError, TypeError), match="cache_seconds"):
                call(cache_seconds=bad)
    assert sim.requests == []


@pytest.mark.parametrize("name", ["where", "sort"])
def test_an_exception_of_a_predicate_names_the_server(client: CloreClient, name: str) -> None:
    class MineError(Exception):
        pass

    def broken(found: Server) -> bool:
        raise MineError("mine")

    with pytest.raises(MineError, match="mine") as caught:
        client.find_servers(**{name: broken})  # type: ignore[arg-type]
    notes: list[str] = getattr(caught.value, "__notes__", [])
    assert notes[0].startswith(f"{name}= was called with server ")


def test_ids_of_excluded_servers_may_be_servers(client: CloreClient) -> None:
    first, second = client.find_servers()[:2]
    assert client.find_servers(exclude_servers=[first])[0] == second
    assert client.find_servers(exclude_servers=iter([first["id"]]))[0] == second
