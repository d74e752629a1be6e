"""Summarize the marketplace by GPU model, and estimate what a rental costs."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from clore_client.market.filters import common_spellings, fold_name
from clore_client.models.record import part_of
from clore_client.models.server import Marketplace, Server, listed_rate, price_in
from clore_client.pricing import (
    CREATION_FEE,
    creation_fee_after,
    finite,
    per_gpu,
    published_fee,
    with_fee,
)

if TYPE_CHECKING:
    from clore_client.market.market import Market

Prices = tuple[float | None, float | None]  # USD per hour for one GPU: on demand, spot
Listed = tuple[int, bool, Prices]  # a server: its GPUs of a model, whether it is free, its prices
NO_PRICES: Prices = (None, None)
HIGHEST_PERCENT = 100.0  # a higher fee is not valid


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


def summarize(
    marketplace: Marketplace, *, include_rented: bool = False, include_fees: bool = False
) -> list[ModelSummary]:
    """Return a summary of each GPU model, the one with the most GPUs first.

    Parameters:
        marketplace: the list of servers.
        include_rented: include the prices of rented servers; the counts always have them.
        include_fees: add the published fees to the prices.
    """
    models, spellings = dict[str, list[Listed]](), Counter[str]()
    for names, server in zip(marketplace.gpus, marketplace, strict=True):
        spellings.update(set(names))
        free = not server.rented
        folded = [fold_name(name) for name in names]
        for name in set(folded):
            count, prices = folded.count(name), NO_PRICES
            if count == len(folded):  # all GPUs are of this model
                count = server.gpu_count or count
                if free or include_rented:
                    usd = (server.usd_per_hour, server.spot_usd_per_hour)
                    prices = (per_gpu(usd[0], count), per_gpu(usd[1], count))
            models.setdefault(name, []).append((count, free, prices))
    shown = common_spellings(spellings)
    rows = [_row(shown[model], listed, include_fees) for model, listed in models.items()]
    return sorted(rows, key=lambda row: (-row.gpus, row.gpu))


def _row(gpu: str, listed: list[Listed], include_fees: bool) -> ModelSummary:
    numbers: list[float | None] = []
    for spot in (False, True):
        fee = published_fee(spot) if include_fees else 0.0
        found = [price for _, _, prices in listed if (price := prices[spot]) is not None]
        prices = sorted(with_fee(price, fee) for price in found)
        numbers += [quantile(prices, share) for share in (0.0, 0.5, 0.9)]
    gpus, free = [n for n, _, _ in listed], [n for n, is_free, _ in listed if is_free]
    return ModelSummary(gpu, len(gpus), len(free), sum(gpus), sum(free), *numbers)


def quantile(ordered: list[float], share: float) -> float | None:
    """Return a quantile of sorted numbers, with linear interpolation; None if there are none."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place % 1)


class CostEstimate(NamedTuple):
    """The cost of a rental. An amount is None if a price or an exchange rate is not known.

    Attributes:
        server_id, hours, currency: as for ``CloreClient.estimate_cost``.
        usd_per_hour: the price or bid in USD per hour, without fees.
        base_usd, renter_fee_usd, creation_fee_usd, total_usd: the amounts in USD.
        base, renter_fee, creation_fee, total: the same amounts in ``currency``.
    """

    server_id: int | None
    hours: float
    currency: str
    usd_per_hour: float | None
    base_usd: float | None
    renter_fee_usd: float | None
    creation_fee_usd: float
    total_usd: float | None
    base: float | None
    renter_fee: float | None
    creation_fee: float | None
    total: float | None


def estimate(
    market: Market,
    server: Server,
    hours: float,
    *,
    currency: str,
    spot: bool,
    spot_price: float | None,
) -> CostEstimate:
    """Estimate the cost of a rental; see ``CloreClient.estimate_cost``."""
    rate = listed_rate(server, currency) or market.data.rates.rate(currency)
    price = spot_price if spot_price is not None else price_in(server, spot, currency)
    fraction, creation_usd = account_fees(market.fees(), spot, currency, rate)
    base = None if price is None else price * hours
    fee = None if base is None else base * fraction
    creation = creation_fee_after(hours * 3600.0, creation_usd)
    total = None if base is None or fee is None else base + fee + creation

    def in_currency(usd: float | None) -> float | None:
        return usd / rate if usd is not None and rate else None

    return CostEstimate(
        server.id, hours, currency, price, base, fee, creation, total,
        in_currency(base), in_currency(fee), in_currency(creation), in_currency(total),
    )  # fmt: skip


def account_fees(
    response: dict[str, Any], spot: bool, currency: str, rate: float | None
) -> tuple[float, float]:
    """Return the renter's fee as a fraction of the price, and the creation fee in USD.

    Parameters:
        response: the response to ``renter_fees``; published fees replace missing ones.
        spot, currency: the kind of the order.
        rate: USD for one unit of the currency.
    """
    kind = "spot" if spot else "on_demand"
    percent = finite(part_of(response, "renter_fees", kind, "base", currency))
    fraction = published_fee(spot)
    if percent is not None and 0 <= percent <= HIGHEST_PERCENT:
        fraction = percent / 100
    amount = finite(part_of(response, "creation_fees", kind, currency))
    if amount is None or amount < 0 or rate is None:
        return fraction, CREATION_FEE
    return fraction, amount * rate
