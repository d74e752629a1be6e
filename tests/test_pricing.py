"""Units of money: hours and days, currencies, fees, prices for one GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clore_client.pricing import (
    ExchangeRates,
    bid_per_day,
    bid_per_hour,
    creation_fee_after,
    per_gpu,
    per_hour,
    published_fee,
    with_fee,
)

prices = st.floats(min_value=1e-6, max_value=1e6)
rates = st.floats(min_value=1e-6, max_value=1e6)


@pytest.mark.parametrize(
    ("usd_per_hour", "rate", "per_day"),
    [(0.125, 1.0, 3.0), (0.125, 0.5, 6.0), (0.125, 64000.0, 3 / 64000), (1.0, 0.25, 96.0)],
)
def test_usd_per_hour_and_currency_per_day(
    usd_per_hour: float, rate: float, per_day: float
) -> None:
    assert bid_per_day(usd_per_hour, rate) == per_day
    assert bid_per_hour(per_day, rate) == usd_per_hour


def test_exact_fees_and_shares() -> None:
    assert (published_fee(spot=False), published_fee(spot=True)) == (0.05, 0.0125)
    assert with_fee(2.0, 0.05) == 2.1
    assert with_fee(1.0, 0.0125) == 1.0125
    assert per_gpu(0.5, 4) == 0.125
    assert (per_gpu(None, 4), per_gpu(0.5, None), per_gpu(0.5, 0)) == (None, None, None)
    assert per_hour(3) == 0.125
    assert (creation_fee_after(599.9), creation_fee_after(600)) == (0.0, 0.1)
    assert creation_fee_after(600, 0.3) == 0.3


@given(prices, rates)
def test_a_converted_price_converts_back(usd_per_hour: float, rate: float) -> None:
    back = bid_per_hour(bid_per_day(usd_per_hour, rate), rate)
    assert back == pytest.approx(usd_per_hour, rel=1e-14)


@given(prices, prices, rates)
def test_conversion_keeps_the_order_of_prices(one: float, other: float, rate: float) -> None:
    if one < other:
        assert bid_per_day(one, rate) <= bid_per_day(other, rate)


@given(prices, st.floats(0, 1))
def test_a_fee_is_on_top_of_a_price(price: float, fee: float) -> None:
    assert with_fee(price, fee) - price == pytest.approx(price * fee, rel=1e-6, abs=1e-12 * price)


@given(prices, st.integers(1, 16))
def test_the_shares_of_all_gpus_are_the_price(price: float, count: int) -> None:
    share = per_gpu(price, count)
    assert share is not None
    assert share * count == pytest.approx(price, rel=1e-14)


@given(prices, rates)
def test_one_rate_for_all_conversions(amount: float, rate: float) -> None:
    known = ExchangeRates()
    assert (known.rate("BTC"), known.rate("usd"), known.rate(5)) == (None, 1.0, None)
    known.update({"bitcoin": rate})
    assert known.rate("BTC") == known.rate("bitcoin") == rate
    usd = known.usd(amount, "btc")
    assert usd is not None
    assert bid_per_hour(amount, rate) == pytest.approx(usd / 24, rel=1e-14)
