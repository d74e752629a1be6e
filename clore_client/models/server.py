"""Define servers, and convert them from the live form to the documented form."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from clore_client.models.record import RawRecords, Record, part_of, text_of, whole_id
from clore_client.pricing import HOURS_PER_DAY, finite, per_gpu, per_hour, positive

# The text comes from strangers, so no pattern can backtrack for long. Compiled on first use, which
# makes the import faster.
LONGEST_TEXT = 200  # characters of a description that count
_COUNTED_GPU = r"(?s)([0-9]{1,3})x\s+(.+)"
_VENDOR = r"(?i)(?:NVIDIA\s+)?(?:GeForce\s+)?"
_DISK_SIZE = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s?GB"
# The field of the live form's ``price.usd`` with the on-demand price, for each currency.
_USD_FIELDS = {
    "CLORE-Blockchain": "on_demand_clore",
    "bitcoin": "on_demand_btc",
    "USD-Blockchain": "on_demand_usd",
}


def _counted(specs: Any) -> tuple[int, str] | None:
    """Return the count and name in ``specs.gpu`` (``"2x NVIDIA GeForce RTX 4070 Ti"``), or None."""
    text = specs.get("gpu") if isinstance(specs, dict) else None
    return _parse_counted(text[:LONGEST_TEXT]) if isinstance(text, str) else None


@functools.lru_cache(maxsize=1024)  # there are few different texts on thousands of servers
def _parse_counted(text: str) -> tuple[int, str] | None:
    match = re.fullmatch(_COUNTED_GPU, text.strip())
    if not match:
        return None
    return int(match[1]), match[2][re.match(_VENDOR, match[2]).end() :]  # type: ignore[union-attr]


def gpu_names(record: dict[str, Any]) -> list[str]:
    """Return the GPU names of a server in either form, as a flat list."""
    array = record.get("gpu_array")
    if isinstance(array, list):
        names: list[str] = []
        for entry in array:
            if isinstance(entry, str):  # the usual case, kept fast
                if name := entry.strip():
                    names.append(name)
            elif isinstance(entry, list):
                names += [n for item in entry if isinstance(item, str) and (n := item.strip())]
        if names:
            return names
    counted = _counted(record.get("specs"))
    return [counted[1]] * counted[0] if counted else []


def count_gpus(record: dict[str, Any]) -> int | None:
    """Return the number of GPUs of a server in either form, or None."""
    counted = _counted(record.get("specs"))
    return counted[0] if counted else len(gpu_names(record)) or None


def is_mixed(record: dict[str, Any]) -> bool:
    """Return whether a server has GPUs of several models."""
    return len(set(gpu_names(record))) > 1


def _exchange_rate(price: Any, currency: str) -> float | None:
    """Return USD for one unit of ``currency``, by an on-demand price in both; None if unknown."""
    amount = positive(part_of(price, "on_demand", currency))
    in_usd = positive(part_of(price, "usd", _USD_FIELDS.get(currency, "")))
    return in_usd / amount if amount and in_usd else None


def _live_spot_per_day(price: dict[str, Any]) -> float | None:
    """Return the lowest spot bid in USD per day, or None.

    ``price.usd.spot`` is often 0, which means that it is in another field (seen on the live API).
    """
    if stated := positive(part_of(price, "usd", "spot")):
        return stated
    original = price.get("original_usd")
    if isinstance(original, dict):
        clore = positive(part_of(original, "CLORE-Blockchain", "spot"))
        others = [p for c in original if (p := positive(part_of(original, c, "spot")))]
        if clore or others:
            return clore or min(others)
    if stated := positive(part_of(price, "spot", "USD-Blockchain")):
        return stated
    for currency in _USD_FIELDS:
        amount, rate = positive(part_of(price, "spot", currency)), _exchange_rate(price, currency)
        if amount and rate:
            return amount * rate
    return None


def price_in(server: Server, spot: bool, currency: str | None) -> float | None:
    """Return the price in USD per hour when paid in ``currency``, or None if there is none.

    Parameters:
        server: the server.
        spot: return the lowest spot bid that the host accepts.
        currency: the API's name; None takes the price of the documented form.
    """
    # The documented form has one price for all currencies.
    if spot:
        # Always per day: only the live form has this field.
        per_day = positive(part_of(server, "price", "original_usd", currency or "", "spot"))
        return per_day / HOURS_PER_DAY if per_day else server.spot_usd_per_hour
    usd_field = _USD_FIELDS.get(currency or "", "on_demand_clore")
    return positive(part_of(server, "price", "usd", usd_field)) or server.usd_per_hour


def on_demand_usd(server: Server, currency: str) -> float | None:
    """Return the on-demand price in USD per hour when paid in ``currency`` (the API's name)."""
    return price_in(server, spot=False, currency=currency)


def amount_per_hour(server: Server, currency: str) -> float | None:
    """Return the on-demand price per hour in ``currency`` itself, or None if it is not listed."""
    listed = positive(part_of(server, "price", "on_demand", currency))
    return None if listed is None else listed / HOURS_PER_DAY


def listed_rate(server: Server, currency: str) -> float | None:
    """Return USD for one unit of ``currency``, by the prices of one server; None if unknown."""
    if currency == "USD-Blockchain":
        return 1.0
    rate = _exchange_rate(server.price, currency)
    return rate and rate * HOURS_PER_DAY  # the price in USD is per hour, the other one per day


def accepts(record: dict[str, Any], live: bool, currency: str) -> bool:
    """Return whether the host accepts a currency.

    A server that does not list its currencies accepts those in which it has a price; in the
    documented form, which has one price for all, it accepts each.
    """
    coins = record.get("allowed_coins")
    if isinstance(coins, list) and coins:
        return currency in coins
    return not live or positive(part_of(record, "price", "on_demand", currency)) is not None


def version_parts(version: Any) -> tuple[int, int] | None:
    """Return a version such as ``"12.4"`` or 12.4 as two integers, or None."""
    text = version[:40].strip() if isinstance(version, str) else str(finite(version))
    match = re.fullmatch(r"([0-9]{1,4})(?:\.([0-9]{1,4}))?(?:\.[0-9.]*)?", text)
    return (int(match[1]), int(match[2] or 0)) if match else None


def nominal_vram(record: dict[str, Any]) -> float | None:
    """Return the memory of one GPU in GB, as the maker states it, or None.

    The live API rounds down, so that a card with 24 GB shows 23. Of the recent cards, only the
    1080 Ti and the 2080 Ti have an odd size, 11 GB.
    """
    size = positive(part_of(record, "specs", "gpuram"))
    if size is None or size < 6 or size % 2 != 1:
        return size
    eleven = size == 11 and any("80 ti" in name.lower() for name in gpu_names(record))
    return size if eleven else size + 1


class GPURecord(Record):
    """A record that names the GPUs of a server."""

    @property
    def gpu(self) -> str | None:
        """The count and name of its GPUs, such as ``"2x RTX 4090"``; of several models, all."""
        names = gpu_names(self)
        if is_mixed(self):
            return " + ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))
        return f"{count_gpus(self)}x {names[0]}" if names else None

    @property
    def gpu_name(self) -> str | None:
        """The name of its (first) GPU, for example ``"RTX 4090"``."""
        return next(iter(gpu_names(self)), None)

    @property
    def gpu_count(self) -> int | None:
        """The number of GPUs."""
        return count_gpus(self)


class Server(GPURecord):
    """One server of the marketplace, in the documented form.

    A dict with ``id``, ``gpu_array`` (a flat list of names), ``price`` (under ``usd`` in USD per
    hour), ``reliability`` (0 to 100), ``rented``, ``specs``, and all other fields that the API
    sent. A property is None if its field is missing or has an unexpected type.
    """

    SHOWN = ("id", "gpu", "usd_per_hour", "spot_usd_per_hour", "reliability", "country", "rented")
    FIELDS = ("id", "gpu_name", "gpu_count", "vram_gb", "total_vram_gb", "usd_per_hour",
              "usd_per_gpu_hour", "spot_usd_per_hour", "spot_usd_per_gpu_hour", "reliability",
              "rating", "rating_count", "country", "rented", "cpu_cores", "ram_gb", "disk_gb",
              "disk_mbps", "download_mbps", "upload_mbps", "pcie_width", "cuda_version",
              "max_rental_hours", "owner_id")  # fmt: skip

    @property
    def id(self) -> int | None:
        """The number of the server, for :meth:`CloreClient.create_order`."""
        return whole_id(self.get("id"))

    @property
    def price(self) -> dict[str, Any]:
        """The prices in all currencies; the numbers under ``"usd"`` are USD per hour."""
        prices = self.get("price")
        return prices if isinstance(prices, dict) else {}

    @property
    def vram_gb(self) -> float | None:
        """The memory of one GPU in GB, which the live API rounds down."""
        return positive(part_of(self, "specs", "gpuram"))

    @property
    def total_vram_gb(self) -> float | None:
        """The memory of all GPUs in GB, ``vram_gb`` times ``gpu_count``; None if they differ."""
        if self.vram_gb is None or is_mixed(self):  # the API lists the memory of one model
            return None
        return self.vram_gb * (self.gpu_count or 1)

    @property
    def usd_per_hour(self) -> float | None:
        """The on-demand price in USD per hour, without fees."""
        return positive(part_of(self, "price", "usd", "on_demand_clore"))

    @property
    def spot_usd_per_hour(self) -> float | None:
        """The lowest spot bid that the host accepts, in USD per hour, without fees."""
        return positive(part_of(self, "price", "usd", "spot"))

    @property
    def usd_per_gpu_hour(self) -> float | None:
        """The on-demand price in USD per hour for one of its GPUs, without fees."""
        return per_gpu(self.usd_per_hour, self.gpu_count)

    @property
    def spot_usd_per_gpu_hour(self) -> float | None:
        """The lowest spot bid in USD per hour for one of its GPUs, without fees."""
        return per_gpu(self.spot_usd_per_hour, self.gpu_count)

    @property
    def reliability(self) -> float | None:
        """The reliability, 0 to 100."""
        return finite(self.get("reliability"))

    @property
    def rented(self) -> bool:
        """True if the server is rented now."""
        return bool(self.get("rented"))

    @property
    def country(self) -> str | None:
        """The two-letter country code of its network."""
        return text_of(self, "specs", "net", "cc")

    @property
    def ram_gb(self) -> float | None:
        """The main memory in GB."""
        return positive(part_of(self, "specs", "ram"))

    @property
    def disk_gb(self) -> float | None:
        """The size of the disk in GB, from the last number of its description."""
        sizes = re.findall(_DISK_SIZE, text_of(self, "specs", "disk") or "")
        return positive(float(sizes[-1])) if sizes else None

    @property
    def disk_mbps(self) -> float | None:
        """The speed of the disk in MB per second."""
        return positive(part_of(self, "specs", "disk_speed"))

    @property
    def download_mbps(self) -> float | None:
        """The download speed in Mbit per second."""
        return positive(part_of(self, "specs", "net", "down"))

    @property
    def upload_mbps(self) -> float | None:
        """The upload speed in Mbit per second."""
        return positive(part_of(self, "specs", "net", "up"))

    @property
    def cpu_cores(self) -> int | None:
        """The number of CPU cores; the number of threads is usually twice as high."""
        match = re.match(r"\s*([0-9]{1,6})(?![0-9])", text_of(self, "specs", "cpus") or "")
        return int(match[1]) or None if match else None

    @property
    def pcie_width(self) -> float | None:
        """The number of PCI Express lanes of a GPU."""
        return positive(part_of(self, "specs", "pcie_width"))

    @property
    def rating(self) -> float | None:
        """The average rating by renters, up to 5."""
        return positive(part_of(self, "rating", "avg"))

    @property
    def rating_count(self) -> int | None:
        """The number of ratings."""
        return whole_id(part_of(self, "rating", "cnt"))

    @property
    def max_rental_hours(self) -> float | None:
        """The longest rental in hours."""
        return positive(self.get("mrl"))

    @property
    def owner_id(self) -> int | None:
        """The number of the owner."""
        return whole_id(self.get("owner"))

    @property
    def cuda_version(self) -> str | None:
        """The highest CUDA version that its driver supports, for example ``"13.0"``."""
        return text_of(self, "cuda_version")


def to_server(record: dict[str, Any], live: bool) -> Server:
    """Convert a server from the API to a :class:`Server`.

    Parameters:
        record: the server, as the API sent it.
        live: whether the response is in the live form.
    """
    server = Server(record)
    server._wire = record
    server["gpu_array"] = gpu_names(record)
    if not live:
        return server
    if (fraction := finite(record.get("reliability"))) is not None:
        server["reliability"] = round(fraction * 100.0, 9)  # 0.9731 * 100 is not 97.31
    price = record.get("price")
    if isinstance(price, dict):
        usd = price.get("usd")
        hourly = {k: per_hour(v) for k, v in usd.items()} if isinstance(usd, dict) else {}
        hourly["spot"] = positive(per_hour(_live_spot_per_day(price)))
        server["price"] = {**price, "usd": hourly}
    return server


class Marketplace:
    """Read the list of servers in one response.

    With the extra ``fast``, a server is decoded each time it is read. This is faster than to keep
    thousands of decoded servers.

    Attributes:
        live: whether the response is in the live form.
        ids: the id of each server, or None.
        gpus: the GPU names of each server.
        rented: whether each server is rented.
        prices: the on-demand price in USD per hour by server id.
        rates: USD for one unit of each currency, as the prices of a server imply.
    """

    def __init__(self, response: Mapping[str, Any]) -> None:
        servers = response.get("servers")
        self._servers = servers if isinstance(servers, (list, RawRecords)) else []
        self.live = any(_is_live_server(record) for record in self._servers)
        self._places: list[int] = []  # the indexes of the servers; other items are skipped
        self.ids: list[int | None] = []
        self.gpus: list[tuple[str, ...]] = []
        self.rented: list[bool] = []
        self.prices: dict[int, float] = {}
        self.rates: dict[str, float] = {}
        same: dict[tuple[str, ...], tuple[str, ...]] = {}  # so that equal names are kept once
        for place, record in enumerate(self._servers):
            if isinstance(record, dict):
                self._places.append(place)
                self.ids.append(whole_id(record.get("id")))
                names = tuple(gpu_names(record))
                self.gpus.append(same.setdefault(names, names))
                self.rented.append(bool(record.get("rented")))
                self._add_price(record)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Server:
        return to_server(self._servers[self._places[index]], self.live)

    def __iter__(self) -> Iterator[Server]:
        return map(self.__getitem__, range(len(self)))

    def _add_price(self, record: dict[str, Any]) -> None:
        given, server_id = part_of(record, "price", "usd", "on_demand_clore"), self.ids[-1]
        usd = positive(per_hour(given) if self.live else given)
        if usd is None or server_id is None:
            return
        self.prices[server_id] = usd
        if self.live and len(self.rates) < len(_USD_FIELDS):
            for currency in _USD_FIELDS:
                if rate := _exchange_rate(record["price"], currency):
                    self.rates[currency] = rate

    def servers(self, *, include_rented: bool = False) -> list[Server]:
        """Return the servers in the documented form, in the API's order."""
        return [self[n] for n, rented in enumerate(self.rented) if include_rented or not rented]


def _is_live_server(record: Any) -> bool:
    price = record.get("price") if isinstance(record, dict) else None
    return isinstance(price, dict) and ("on_demand" in price or "original_usd" in price)
