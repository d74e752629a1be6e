"""Generate the servers of a market from a seed, with the quirks of real listings."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from random import Random
from typing import Any

from .settings import CURRENCIES

RATES: dict[str, float] = {"bitcoin": 68022.87, "CLORE-Blockchain": 0.002705, "USD-Blockchain": 1}
_DIGITS = {"bitcoin": 10, "CLORE-Blockchain": 4, "USD-Blockchain": 6}


@dataclass(frozen=True)
class Model:
    """Describe a GPU model; `usd` is its typical price per day."""

    name: str
    smi_name: str  # the name that nvidia-smi shows
    mib: int
    usd: float
    watts: int
    weight: int
    listed_name: str = ""  # the name in `specs.gpu`, if it is another one


def _geforce(name: str, mib: int, usd: float, watts: int, weight: int) -> Model:
    return Model(name, f"NVIDIA GeForce {name}", mib, usd, watts, weight)


RTX_4090 = _geforce("RTX 4090", 24564, 5.0, 450, 16)
MODELS = (
    RTX_4090,
    _geforce("RTX 5090", 32607, 9.5, 575, 8),
    _geforce("RTX 4080", 16376, 2.9, 320, 6),
    _geforce("RTX 4080 SUPER", 16376, 3.0, 320, 3),
    _geforce("RTX 4070 Ti", 12282, 2.2, 285, 6),
    _geforce("RTX 4060 Ti", 16380, 1.4, 165, 3),
    _geforce("RTX 3090", 24576, 2.4, 350, 12),
    _geforce("RTX 3090 Ti", 24564, 2.7, 450, 2),
    _geforce("RTX 3080", 10240, 1.5, 320, 10),
    _geforce("RTX 3080 Ti", 12288, 1.7, 350, 3),
    _geforce("RTX 3070", 8192, 0.9, 220, 8),
    _geforce("RTX 3060", 12288, 0.8, 170, 6),
    _geforce("GTX 1080", 8192, 0.5, 180, 3),
    _geforce("GTX 1080 Ti", 11264, 0.6, 250, 3),
    _geforce("GTX 745", 4096, 0.12, 55, 1),
    Model("RTX A6000", "NVIDIA RTX A6000", 49140, 7.5, 300, 2),
    Model("A100", "NVIDIA A100-SXM4-80GB", 81920, 19.0, 400, 3, "NVIDIA A100SXM480GB"),
    Model("H100", "NVIDIA H100 80GB HBM3", 81559, 44.0, 700, 2),
    Model("Tesla V100SXM232GB", "Tesla V100-SXM2-32GB", 32768, 3.2, 300, 3, "Tesla V100SXM232GB"),
)

_BOARDS = (
    ("AMD Ryzen 9 7950X 16-Core Processor", "16/32", "TUF GAMING B650-PLUS WIFI"),
    ("AMD Ryzen 7 5700X 8-Core Processor", "8/16", "B550M PRO-VDH WIFI (MS-7C95)"),
    ("AMD EPYC 7B13 64-Core Processor", "64/128", "ROMED8-2T"),
    ("AMD EPYC 7402 24-Core Processor", "48/96", "H11DSi"),
    ("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "28/56", "X99-F8D PLUS"),
    ("Intel(R) Core(TM) i9-14900K", "24/32", "ROG STRIX Z790-E GAMING WIFI II"),
    ("13th Gen Intel(R) Core(TM) i5-13400F", "10/16", "PRO B760M-A WIFI (MS-7D99)"),
    ("Intel(R) Celeron(R) CPU G3930 @ 2.90GHz", "2/2", "B250 MINING EXPERT"),
)
_DISKS = (
    "KINGSTON SNV2S500G",
    "Samsung SSD 990 PRO 2TB",
    "CT1000P3PSSD8",
    "WDC WDS100T2B0A-00SM50",
)
_COUNTRIES = ("US", "NO", "SE", "DE", "FR", "PL", "CZ", "BG", "UA", "KR", "CA", "IS", "KZ")
_IMAGES = (
    "cloreai/jupyter:ubuntu24.04-v2",
    "cloreai/ubuntu24.04-desktop:v1.6",
    "nvidia/cuda:12.1.0-base-ubuntu22.04",
    "pytorch/pytorch:2.5.1-cuda12.4-cudnn9-runtime",
)
# Hosts choose these texts, so a client must not trust them.
_ODD_TEXT = (
    "<script>alert('hosted')</script>",
    "<img src=x onerror=alert(1)> & <b>bold</b>",
    "\x1b[2J\x1b[31mFREE GPU\x1b[0m\x07",
    "\x1b]0;your terminal title\x07rig",
    "华硕 主板 Δοκιμή 🚀",
    "right\u202etfel\u202c to \u2066left\u2069",
    "two\r\nlines\tand\x00a zero",
    "'; DROP TABLE servers; --",
    "  ",
    "long " * 60,
)


@dataclass
class Server:
    """Hold a server; its prices are USD per day, by the currency that pays them."""

    id: int
    models: tuple[Model, ...]
    usd_on_demand: dict[str, float]
    usd_spot: dict[str, float]  # empty if the host takes no bids
    allowed_coins: tuple[str, ...]
    mrl: int  # hours
    reliability: float  # 0 to 1
    rented: bool
    online: bool
    specs: dict[str, Any] = field(repr=False)  # complete, also where the live listing is not
    record: dict[str, Any] = field(repr=False)  # live listing without `rented` and `price`
    quirks: frozenset[str] = frozenset()
    deploy_after: float | None = None

    @property
    def gpus(self) -> list[str]:
        """Return the names of the GPUs, one for each."""
        return [model.name for model in self.models]

    def on_demand(self, currency: str) -> float:
        """Return the on-demand price per day in `currency`."""
        return in_currency(self.usd_on_demand[currency], currency)

    def min_bid(self, currency: str) -> float | None:
        """Return the lowest bid per day in `currency`, or None if the host takes no bids."""
        usd = self.usd_spot.get(currency)
        return in_currency(usd, currency) if usd else None


def in_currency(usd: float, currency: str) -> float:
    """Convert USD to `currency`, rounded as in listings."""
    return round(usd / RATES[currency], _DIGITS[currency])


def make_servers(count: int, seed: int) -> list[Server]:
    """Make `count` servers; the same seed makes the same ones."""
    rng = Random(f"servers {seed}")
    ids = rng.sample(range(1_000, 1_000 + max(130_000, 3 * count)), count)
    # Without these, a demo that rents the cheapest RTX 4090 would sometimes fail.
    plain = set(rng.sample(range(count), min(count, max(4, count // 25))))
    return [_plain(rng, id) if n in plain else _random(rng, id) for n, id in enumerate(ids)]


def _plain(rng: Random, id: int) -> Server:
    usd = round(rng.uniform(3.0, 3.6), 2)
    # Cheaper than every other server with an RTX 4090, on demand and spot.
    server = _server(rng, id, (RTX_4090,), usd, round(usd * rng.uniform(0.5, 0.55), 2))
    server.reliability = round(rng.uniform(0.965, 0.9995), 4)
    server.record["reliability"] = server.reliability
    server.mrl = server.record["mrl"] = 720
    return server


def _random(rng: Random, id: int) -> Server:
    model = rng.choices(MODELS, [model.weight for model in MODELS])[0]
    count = rng.choices((1, 2, 4, 6, 8, 12), (60, 14, 10, 5, 9, 2))[0]
    models = (model,) * count
    if count > 1 and rng.random() < 0.08:
        models = tuple(rng.choice(MODELS) for _ in range(count))
    usd = round(max(sum(m.usd * rng.uniform(0.8, 1.6) for m in models), 0.05), 2)
    spot = 0.0 if rng.random() < 0.12 else round(usd * rng.uniform(0.5, 0.9), 2)
    server = _server(rng, id, models, usd, spot)
    server.rented = rng.random() < 0.35
    server.online = rng.random() > 0.04
    _add_quirks(rng, server)
    return server


def _server(rng: Random, id: int, models: tuple[Model, ...], usd: float, spot: float) -> Server:
    cpu, cpus, board = rng.choice(_BOARDS)
    disk, size = rng.choice(_DISKS), round(rng.uniform(40, 3600), 1)
    reliability = round(min(1.0, max(0.0, 1 - rng.expovariate(12))), 4)
    mrl = rng.choice((24, 72, 168, 336, 720, 720, 2160))
    first = models[0]
    mixed = len(set(models)) > 1
    watts = [model.watts for model in models]
    record: dict[str, Any] = {
        "id": id,
        "owner": rng.randint(2, 60_000),
        "mrl": mrl,
        "reliability": reliability,
        "cuda_version": rng.choice(("11.8", "12.2", "12.4", "12.8", "13.0")),
        "allowed_coins": list(CURRENCIES),
        "rating": {"avg": round(rng.uniform(3, 5), 2), "cnt": rng.randint(1, 90)},
        "gpu_array": [model.name for model in models],
        "gigaspot": rng.random() < 0.6,
        "specs": {
            "cpu": cpu,
            "cpus": cpus,
            "ram": round(rng.choice((8, 16, 32, 64, 128, 256, 512)) * 0.994, 2),
            "disk": f"{disk} {size}GB",
            "disk_speed": round(rng.uniform(180, 6800), 2),
            "gpu": "Mixed GPUs"
            if mixed
            else f"{len(models)}x {first.listed_name or first.smi_name}",
            "gpuram": min(model.mib for model in models) // 1024,
            "net": {
                "cc": rng.choice(_COUNTRIES),
                "down": round(rng.uniform(20, 2500), 2),
                "up": round(rng.uniform(10, 2500), 2),
            },
            "mb": board,
            "pcie_rev": rng.choice((2, 3, 4, 5)),
            "pcie_width": rng.choice((1, 4, 8, 16)),
            "pl": [w - rng.choice((0, 0, 20)) for w in watts],
            "stock_pl": watts,
        },
        # An example of the undocumented fields of real listings.
        "host": {
            "kernel": rng.choice(("5.15.0-157-generic", "6.8.0-85-generic", "6.14.0-33-generic")),
            "driver": rng.choice(("535.274.02", "570.195.03", "580.82.07", "580.95.05")),
            "uptime": rng.randint(600, 20_000_000),
            "load": [round(rng.uniform(0, 9), 2) for _ in range(3)],
            "bench": {name: round(rng.uniform(1, 9000), 3) for name in ("fp16", "fp32", "membw")},
            "bus": [f"0000:{rng.randint(1, 200):02x}:00.0" for _ in models],
            "images": rng.sample(_IMAGES, 2),
            "verified": rng.random() < 0.5,
        },
    }
    return Server(
        id=id,
        models=models,
        usd_on_demand=dict.fromkeys(CURRENCIES, usd),
        usd_spot=dict.fromkeys(CURRENCIES, spot) if spot else {},
        allowed_coins=CURRENCIES,
        mrl=mrl,
        reliability=reliability,
        rented=False,
        online=True,
        specs=record["specs"],
        record=record,
        quirks=frozenset({"spot_in_usd"} if rng.random() < 0.08 else ()),
    )


def _add_quirks(rng: Random, server: Server) -> None:
    record, specs = server.record, server.record["specs"]

    def chance(share: float) -> bool:
        return rng.random() < share

    quirks = set(server.quirks)
    if chance(0.12):
        keep = rng.choice((("bitcoin",), ("bitcoin", "CLORE-Blockchain"), ("USD-Blockchain",)))
        server.allowed_coins = keep
        record["allowed_coins"] = list(keep)
        if chance(0.5):
            quirks.add("allowed_prices_only")
    if chance(0.1):
        for prices in (server.usd_on_demand, server.usd_spot):
            if prices:
                prices["bitcoin"] = round(prices["bitcoin"] * 1.06, 2)
    if chance(0.2):
        quirks.add(rng.choice(("no_original", "no_usd", "null_usd", "null_spot", "null_original")))
    if chance(0.15):
        record["gpu_array"] = [[f" {name}" if chance(0.5) else name] for name in server.gpus]
    elif chance(0.1):
        del record["gpu_array"]
    elif chance(0.02):
        record["gpu_array"] = rng.choice((None, [], [None], [""], "RTX"))
    if chance(0.25):
        total = len(server.models)
        counts = {"total_gpus": total, "available_gpus": rng.randint(0, total)}
        record["partial_gpu_rental"] = True if chance(0.3) else counts
    if chance(0.04):
        specs[rng.choice(("mb", "cpu", "disk"))] = rng.choice(_ODD_TEXT)
    if chance(0.02):
        record["name"] = rng.choice(_ODD_TEXT)
    server.specs = copy.deepcopy(specs)
    for key in ("rating", "cuda_version", "gigaspot", "owner", "mrl"):
        if chance(0.02):
            record[key] = None
        elif chance(0.02):
            del record[key]
    for key in ("net", "ram", "gpuram", "cpus", "disk", "pl", "stock_pl", "mb", "pcie_rev"):
        if chance(0.015):
            specs[key] = None
        elif chance(0.015):
            del specs[key]
    if chance(0.015):
        record["reliability"] = None
    if chance(0.005):
        record["specs"] = None
    server.quirks = frozenset(quirks)
