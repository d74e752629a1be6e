"""Summarize a listing: servers, GPUs and prices of each GPU model."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from clore_client.market.gpu_names import common_spellings, fold_name
from clore_client.models.server import Marketplace, count_gpus, gpu_names, server_price
from clore_client.pricing import published_fee, with_fee


class ModelSummary(NamedTuple):
    """One GPU model on the marketplace. Prices are in USD per hour for one GPU."""

    gpu: str
    servers: int
    servers_free: int
    gpus: int
    gpus_free: int
    lowest_usd: float | None
    median_usd: float | None
    p90_usd: float | None
    spot_lowest_usd: float | None
    spot_median_usd: float | None
    spot_p90_usd: float | None


class _Model:
    """The numbers of one model while they are counted."""

    def __init__(self) -> None:
        self.servers = self.servers_free = self.gpus = self.gpus_free = 0
        self.prices: tuple[list[float], list[float]] = ([], [])  # on demand and spot

    def add(self, count: int, free: bool) -> None:
        self.servers += 1
        self.gpus += count
        self.servers_free += free
        self.gpus_free += count * free


def summarize(
    marketplace: Marketplace, *, include_rented: bool = False, include_fees: bool = False
) -> list[ModelSummary]:
    """Return a summary of each GPU model, the one with the most GPUs first.

    Parameters:
        marketplace: the list of servers.
        include_rented: include the prices of rented servers; the counts always have them.
        include_fees: add the published fees to the prices.
    """
    models, spellings = dict[str, _Model](), Counter[str]()
    for record in marketplace:
        names = gpu_names(record)
        spellings.update(set(names))
        free = not record.get("rented")
        folded = {fold_name(name) for name in names}
        for model in folded:
            count = sum(fold_name(name) == model for name in names)
            if len(folded) == 1:
                count = count_gpus(record) or count
                if free or include_rented:
                    _add_prices(models.setdefault(model, _Model()), record, marketplace.live, count)
            models.setdefault(model, _Model()).add(count, free)
    shown = common_spellings(spellings)
    rows = [_row(shown[model], found, include_fees) for model, found in models.items()]
    return sorted(rows, key=lambda row: (-row.gpus, row.gpu))


def _add_prices(model: _Model, record: dict[str, Any], live: bool, count: int) -> None:
    for spot in (False, True):
        price = server_price(record, live, spot)
        if price is not None:
            model.prices[spot].append(price / count)


def _row(gpu: str, model: _Model, include_fees: bool) -> ModelSummary:
    numbers: list[float | None] = []
    for spot in (False, True):
        prices = sorted(model.prices[spot])
        fee = published_fee(spot) if include_fees else 0.0
        for share in (0.0, 0.5, 0.9):
            price = quantile(prices, share)
            numbers.append(None if price is None else with_fee(price, fee))
    counts = (model.servers, model.servers_free, model.gpus, model.gpus_free)
    return ModelSummary(gpu, *counts, *numbers)


def quantile(ordered: list[float], share: float) -> float | None:
    """Return a quantile of sorted numbers, with linear interpolation; None if there are none."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
