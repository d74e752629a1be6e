"""Search a listing: apply all filters in one pass, sort, and explain what was left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

from clore_client.errors import add_note, printable
from clore_client.log import logger
from clore_client.market.filters import MINIMUMS, check_filters, matching_names, nearest_models
from clore_client.models.server import (
    Marketplace,
    Server,
    accepts,
    count_gpus,
    gpu_names,
    nominal_vram,
    price_in,
    version_parts,
)
from clore_client.pricing import per_gpu, published_fee
from clore_client.validation import check_bool, check_number, short_repr

Check = Callable[[Server], object]  # true if a server passes

RENTED = "being rented"  # the name of a filter that is always on
ROUNDING_UP = 1 + 1e-12  # 8.4 / 24 is slightly above 0.35


class SearchReport:
    """What a search left out, and why.

    Attributes:
        listed: the number of servers on the marketplace, rented ones included.
        found: the number of servers that fit, before ``limit``.
        left_out: (filter, number of servers) in the order in which the filters are applied; each
            server counts for the first filter that it does not pass.
        cheapest_usd_per_hour: if nothing was found, the lowest price among the servers that the
            last of these filters left out; None if it is not known.
        nearest_models: if no GPU has the name, the most similar names on the market.
    """

    def __init__(self, listed: int) -> None:
        self.listed = listed
        self.found = 0
        self.left_out: list[tuple[str, int]] = []
        self.cheapest_usd_per_hour: float | None = None
        self.nearest_models: list[str] = []

    def __repr__(self) -> str:
        return f"<SearchReport {self.explain()!r}>"

    def add(self, label: str, count: int) -> None:
        """Add the number of servers that a filter left out."""
        if count:
            self.left_out.append((label, count))

    def explain(self) -> str:
        """Return a text that names the filters, and the cheapest of the servers left out last."""
        if not self.listed:
            return "the marketplace lists no server"
        if self.found:
            return f"{self.found} of {self.listed} servers fit" + "".join(
                f"; {label} left out {count}" for label, count in self.left_out
            )
        *earlier, (label, count) = self.left_out
        text = "".join(f"{other} left out {number}, " for other, number in earlier)
        text = f"none of {self.listed} servers fits: {text}{label} left out the last {count}"
        if self.nearest_models:
            shown = ", ".join(repr(printable(name, 100)) for name in self.nearest_models)
            return f"{text}; the nearest GPU names are {shown}"
        if self.cheapest_usd_per_hour is None:
            return text
        return f"{text}, of which the cheapest costs {self.cheapest_usd_per_hour:.4g} USD per hour"

    __str__ = explain


class Search:
    """Search the servers of a listing.

    The arguments are checked when the search is created.

    Parameters:
        gpu_type, max_price_usd, min_reliability, use_spot: as for ``CloreClient.find_servers``.
        filters: the other filters of that method.
        currency: the filter of that name, if it is not among them.
        method: the method of the client that searches.

    Attributes:
        fee: the published fee as a fraction of the price.
        currency: the API's name of the currency whose price counts; None for the price of the
            documented form.
        server_id: if set, no other server fits.
        models: after :meth:`run`, the GPU names that count; None for all.
    """

    def __init__(
        self,
        gpu_type: Any = None,
        max_price_usd: Any = None,
        min_reliability: Any = 0.0,
        use_spot: Any = False,
        filters: Mapping[str, Any] | None = None,
        currency: Any = None,
        method: Callable[..., Any] | None = None,
    ) -> None:
        check_number("min_reliability", min_reliability, maximum=100.0)
        given = {
            "gpu_type": gpu_type, "max_price_usd": max_price_usd, "currency": currency,
            "min_reliability": min_reliability, **(filters or {}),
        }  # fmt: skip
        self._given = {name: value for name, value in given.items() if value is not None}
        self._filters = check_filters(self._given, method)
        self.gpu_type: str | None = self._filters.get("gpu_type")
        self.max_price_usd: float | None = self._filters.get("max_price_usd")
        if self._filters.get("min_reliability", 100.0) <= 1:
            logger.warning("min_reliability=%g is almost no limit: it goes to 100", min_reliability)
        self.spot = check_bool("use_spot", use_spot)
        self.fee = published_fee(self.spot)
        # What the price limits are compared with, as a multiple of the price.
        self._with_fees = 1 + self.fee if self._filters.get("include_fees") else 1.0
        self.currency: str | None = self._filters.get("currency")
        self.server_id: int | None = None
        self.models: frozenset[str] | None = None

    # --- prices ---

    def price(self, server: Server) -> float | None:
        """Return the price of a server in USD per hour, without fees; None if it has none."""
        return price_in(server, self.spot, self.currency)

    def price_limit(self, server: Server) -> float | None:
        """Return the highest price of a server in USD per hour, without fees; None for no limit."""
        limit, each = self.max_price_usd, self._filters.get("max_price_per_gpu_usd")
        if each is not None:
            limit = min(math.inf if limit is None else limit, each * self.gpu_count(server))
        return None if limit is None else limit / self._with_fees

    def gpu_count(self, server: Server) -> int:
        """Return the number of GPUs that match; of several models, only those count."""
        if self.models is None:
            return count_gpus(server) or 0
        names = gpu_names(server)
        matching = sum(name in self.models for name in names)
        return matching if matching < len(names) else count_gpus(server) or 0

    # --- the search ---

    def run(self, marketplace: Marketplace) -> tuple[list[Server], SearchReport]:
        """Return the servers that fit, sorted, and a report on the others."""
        report = SearchReport(len(marketplace))
        places = self._with_gpu(self._with_id(marketplace, report), marketplace, report)
        free = [place for place in places if not marketplace.rented[place]]
        report.add(RENTED, len(places) - len(free))
        checks = self._checks(marketplace.live)
        by_check: list[list[int]] = [[] for _ in range(len(checks) + 1)]  # the places it left out
        fitting = []
        for place in free:
            server = marketplace[place]
            failed = _first_failed(checks, server)
            by_check[failed].append(place)
            if failed == len(checks):
                fitting.append(server)
        for (label, _), left_out in zip(checks, by_check, strict=False):
            report.add(label, len(left_out))
        found = self._where(fitting)
        report.add("where", len(fitting) - len(found))
        report.found = len(found)
        if not found and places:
            last = next((group for group in reversed(by_check) if group), places)
            dropped = [marketplace[place] for place in last]
            if last is not by_check[-1]:
                dropped = self._where(dropped)
            report.cheapest_usd_per_hour = self._lowest(dropped)
        return self._sorted(found)[: self._filters.get("limit")], report

    def _with_id(self, marketplace: Marketplace, report: SearchReport) -> Sequence[int]:
        """Return the places of the servers with the wanted id."""
        if self.server_id is None:
            return range(len(marketplace))
        places = [n for n, number in enumerate(marketplace.ids) if number == self.server_id]
        report.add(f"server_id={self.server_id}", len(marketplace) - len(places))
        return places

    def _with_gpu(
        self, places: Sequence[int], marketplace: Marketplace, report: SearchReport
    ) -> Sequence[int]:
        """Return the places of the servers with a matching GPU."""
        if not self.gpu_type or not self.gpu_type.strip():
            return places
        names = set().union(*set(marketplace.gpus))
        exact = bool(self._filters.get("exact_gpu"))
        models = self.models = matching_names(self.gpu_type, names, exact=exact)
        if not models:
            report.nearest_models = nearest_models(self.gpu_type, names)
        fitting = [place for place in places if not models.isdisjoint(marketplace.gpus[place])]
        report.add(f"gpu_type={short_repr(self.gpu_type)}", len(places) - len(fitting))
        return fitting

    def _checks(self, live: bool) -> list[tuple[str, Check]]:
        """Return the filters that are set, cheap ones first and the price limits last."""
        tests: dict[str, Callable[[Any, Server], object]] = {
            "exclude_servers": lambda ids, s: s.id is not None and s.id not in ids,
            "exclude_owners": lambda ids, s: s.owner_id is not None and s.owner_id not in ids,
            "currency": lambda coin, s: accepts(s, live, coin),
            "countries": lambda codes, s: s.country and s.country.upper() in codes,
            "exclude_countries": lambda codes, s: s.country and s.country.upper() not in codes,
            "gpu_count": lambda count, s: self.gpu_count(s) == count,
            **{name: partial(_at_least, number) for name, number in self._numbers().items()},
            "max_price_per_gpu_usd": lambda usd, s: self._costs_at_most(usd * self.gpu_count(s), s),
            "max_price_usd": self._costs_at_most,
        }
        return [
            (f"{name}={short_repr(self._given[name])}", partial(test, self._filters[name]))
            for name, test in tests.items()
            if name in self._filters
        ]

    def _numbers(self) -> dict[str, Callable[[Server], Any]]:
        """Return what each filter for a minimum compares; None is less than any minimum."""
        return {
            **{name: attrgetter(field) for name, field in MINIMUMS.items()},
            "min_gpu_count": self.gpu_count,
            "min_vram_gb": nominal_vram,
            "min_total_vram_gb": lambda s: (nominal_vram(s) or 0.0) * self.gpu_count(s),
            "min_cuda": lambda s: version_parts(s.get("cuda_version")),
        }

    def _costs_at_most(self, limit: float, server: Server) -> bool:
        price = self.price(server)
        return price is not None and price * self._with_fees <= limit * ROUNDING_UP

    def _where(self, servers: list[Server]) -> list[Server]:
        where = self._filters.get("where")
        return servers if where is None else [s for s in servers if _call("where", where, s)]

    def _lowest(self, servers: Iterable[Server]) -> float | None:
        prices = [price for s in servers if (price := self.price(s)) is not None]
        return min(prices) * self._with_fees if prices else None

    def _sorted(self, servers: list[Server]) -> list[Server]:
        """Sort servers; equal ones by price, then in the API's order."""
        by_price = sorted(servers, key=lambda s: _last_if_none(self.price(s)))
        sort = self._filters.get("sort", "price")
        keys: dict[str, Callable[[Server], float]] = {
            "price": lambda s: 0.0,
            "price_per_gpu": lambda s: _last_if_none(per_gpu(self.price(s), self.gpu_count(s))),
            "reliability": lambda s: -(s.reliability or 0.0),
            "vram": lambda s: -(nominal_vram(s) or 0.0),
            "download": lambda s: -(s.download_mbps or 0.0),
            "rating": lambda s: -(s.rating or 0.0),
        }
        key = partial(_call, "sort", sort) if callable(sort) else keys[sort]
        return sorted(by_price, key=key)


def _at_least(number: Callable[[Server], Any], least: Any, server: Server) -> bool:
    value = number(server)
    return value is not None and bool(value >= least)


def _first_failed(checks: list[tuple[str, Check]], server: Server) -> int:
    """Return the index of the first check that a server does not pass, or their number."""
    for index, (_, check) in enumerate(checks):
        if not check(server):
            return index
    return len(checks)


def _call(name: str, function: Callable[[Server], Any], server: Server) -> Any:
    """Call a function of the user. Its exception names the server in a note."""
    try:
        return function(server)
    except Exception as error:
        add_note(error, f"{name}= was called with server {server.id}")
        raise


def _last_if_none(number: float | None) -> float:
    return math.inf if number is None else number
