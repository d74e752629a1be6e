"""The filters that ``find_servers``, ``find_cheapest`` and ``rent`` share, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

from clore_client.market.countries import check_countries
from clore_client.models.record import part_of, whole_id
from clore_client.models.server import Server, cpu_cores, disk_size, version_parts
from clore_client.pricing import finite, positive
from clore_client.validation import (
    check_bool,
    check_callback,
    check_count,
    check_currency,
    check_id,
    check_number,
    short_repr,
)

SORTS = ("price", "price_per_gpu", "reliability", "vram", "download", "rating")
HIGHEST_RATING = 5.0
MAX_CUDA = "a version such as 12.4 or '12.4'"


class ServerFilters(TypedDict, total=False):
    """The filters of ``rent``; None is no filter. ``help(CloreClient.find_servers)`` has more."""

    gpu_count: int | None
    min_gpu_count: int | None
    exact_gpu: bool
    min_vram_gb: float | None
    min_total_vram_gb: float | None
    min_ram_gb: float | None
    min_cpu_cores: int | None
    min_disk_gb: float | None
    min_disk_mbps: float | None
    min_download_mbps: float | None
    min_upload_mbps: float | None
    min_cuda: float | str | None
    min_pcie_width: int | None
    countries: Iterable[str] | None
    exclude_countries: Iterable[str] | None
    min_rating: float | None
    min_ratings: int | None
    min_rental_hours: float | None
    exclude_servers: Iterable[int | Server] | None
    exclude_owners: Iterable[int] | None
    max_price_per_gpu_usd: float | None
    include_fees: bool
    sort: str | Callable[[Server], Any]
    limit: int | None
    where: Callable[[Server], object] | None


class SearchFilters(ServerFilters, total=False):
    """The filters of ``find_servers`` and ``find_cheapest``."""

    currency: str | None


# The filters that compare one number of a server with a minimum.
MINIMUMS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "min_ram_gb": lambda record: positive(part_of(record, "specs", "ram")),
    "min_cpu_cores": cpu_cores,
    "min_disk_gb": disk_size,
    "min_disk_mbps": lambda record: positive(part_of(record, "specs", "disk_speed")),
    "min_download_mbps": lambda record: positive(part_of(record, "specs", "net", "down")),
    "min_upload_mbps": lambda record: positive(part_of(record, "specs", "net", "up")),
    "min_pcie_width": lambda record: positive(part_of(record, "specs", "pcie_width")),
    "min_rating": lambda record: finite(part_of(record, "rating", "avg")),
    "min_ratings": lambda record: whole_id(part_of(record, "rating", "cnt")),
    "min_rental_hours": lambda record: positive(record.get("mrl")),
}


def check_filters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the filters, and return those that are set, in the form that a search uses.

    Raises:
        TypeError, ValueError: a filter is unknown, has an invalid value, or contradicts another.
    """
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _CHECKS:
            raise TypeError(f"there is no filter {short_repr(name)}{_suggestion(name)}")
        if value is None:
            continue
        checked[name] = _CHECKS[name](name, value)
        if name.startswith("min_") and checked[name] in (0, (0, 0)):
            del checked[name]  # no limit
    exactly, least = checked.get("gpu_count"), checked.get("min_gpu_count")
    if exactly is not None and least is not None and exactly < least:
        raise ValueError(
            f"gpu_count={exactly} contradicts min_gpu_count={least}: leave one of them out"
        )
    allowed = checked.get("countries")
    if allowed is not None and not allowed - checked.get("exclude_countries", frozenset()):
        raise ValueError("countries must have a country that exclude_countries does not name")
    return checked


def _suggestion(name: str) -> str:
    import difflib  # imported here, because it is slow and rarely needed

    close = difflib.get_close_matches(name, _CHECKS, 1)
    return f": did you mean {close[0]}?" if close else f"; there are {', '.join(_CHECKS)}"


def _at_least_zero(name: str, value: Any) -> float:
    return check_number(name, value)


def _at_least_one(name: str, value: Any) -> int:
    return check_count(name, value, minimum=1)


def _price(name: str, value: Any) -> float:
    return check_number(name, value, infinite=True, unit="USD per hour")


def _rating(name: str, value: Any) -> float:
    return check_number(name, value, maximum=HIGHEST_RATING)


def _cuda(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"{name} must be {MAX_CUDA}, not {short_repr(value)}")
    version = version_parts(value)
    if version is None:
        raise ValueError(f"{name} must be {MAX_CUDA}, not {short_repr(value)}")
    return version


def _ids(name: str, values: Any) -> frozenset[int]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of ids, not {short_repr(values)}")
    return frozenset(
        check_id(f"{name}[{number}]", value.id if isinstance(value, Server) else value)
        for number, value in enumerate(values)
    )


def _sort(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        if not callable(value):
            raise TypeError(
                f"{name} must be one of {', '.join(SORTS)} or a function, not {short_repr(value)}"
            )
        check_callback(name, value, 1)
    elif value not in SORTS:
        raise ValueError(
            f"{name} must be one of {', '.join(SORTS)} or a function, not {short_repr(value)}"
        )
    return value


def _where(name: str, value: Any) -> Any:
    check_callback(name, value, 1)
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "gpu_count": _at_least_one,
    "min_gpu_count": check_count,
    "exact_gpu": check_bool,
    "min_vram_gb": _at_least_zero,
    "min_total_vram_gb": _at_least_zero,
    "min_ram_gb": _at_least_zero,
    "min_cpu_cores": check_count,
    "min_disk_gb": _at_least_zero,
    "min_disk_mbps": _at_least_zero,
    "min_download_mbps": _at_least_zero,
    "min_upload_mbps": _at_least_zero,
    "min_cuda": _cuda,
    "min_pcie_width": check_count,
    "countries": check_countries,
    "exclude_countries": check_countries,
    "currency": check_currency,
    "min_rating": _rating,
    "min_ratings": check_count,
    "min_rental_hours": _at_least_zero,
    "exclude_servers": _ids,
    "exclude_owners": _ids,
    "max_price_per_gpu_usd": _price,
    "include_fees": check_bool,
    "sort": _sort,
    "limit": _at_least_one,
    "where": _where,
}
