"""Change the bid of a spot order."""

from __future__ import annotations

import time
from typing import Any

from clore_client.errors import (
    CloreConnectionError,
    DatabaseError,
    InvalidResponseError,
    OrderNotFoundError,
    RateUnknownError,
    SpotPriceStepError,
    SpotPriceTooSoonError,
    api_error,
)
from clore_client.models.order import Order, in_documented_form
from clore_client.orders.account import AccountOrders
from clore_client.pricing import bid_per_hour, finite, wire_currency
from clore_client.validation import check_currency

LOWERING_INTERVAL = 600.0  # seconds between two lower bids, if the API does not say
STEP_SHARE = 1 - 1e-6  # the fraction of the largest step to use, because of rounding errors


def set_spot_price(
    orders: AccountOrders, order_id: int, usd_per_hour: float, allow_above: bool
) -> bool:
    """Change the bid of an order; see ``CloreClient.set_spot_price``."""
    return _accepted(_send_bid(orders, orders.find_active(order_id), usd_per_hour, allow_above))


def lower_spot_price(orders: AccountOrders, order_id: int, target: float, wait: bool) -> float:
    """Lower the bid of an order step by step; see ``CloreClient.lower_spot_price``."""
    bid = target
    while True:
        order = orders.find_active(order_id)
        current = _current_bid(orders, order)
        if current is not None and bid >= current:
            return current
        if current is None and in_documented_form(order) and not order.has_ended:
            raise _unknown_bid(order)  # the target could be above it
        try:
            response = _send_bid(orders, order, bid, allow_above=False)
            if not _accepted(response):  # the documented form refuses with code 0
                refusal = {**response, "code": 6}
                raise api_error(refusal, http_status=200, endpoint="/v1/set_spot_price")
        except SpotPriceStepError as error:
            step = _step_below(orders, order, current, error)
            if bid != target or step is None or step <= target:
                raise
            bid = step
            continue
        except SpotPriceTooSoonError as error:
            if not wait:
                raise
            time.sleep(error.retry_after or LOWERING_INTERVAL)
        else:
            if bid == target or not wait:
                return bid
        bid = target  # the exchange rate can have changed, so compute the next step again


def _current_bid(orders: AccountOrders, order: Order) -> float | None:
    """Return the bid of an order in USD per hour, by a fresh exchange rate."""
    currency = wire_currency(str(order.get("currency")))
    if order.server_id is not None and currency is not None and not in_documented_form(order):
        orders.market.ensure_rates(order.server_id, currency)
    return order.usd_per_hour


def _unknown_bid(order: Order) -> RateUnknownError:
    error = RateUnknownError(
        f"the bid of order {order.id} in USD is not known, because the API shows it in "
        f"{order.currency} and lists no exchange rate, so nothing was bid: call set_spot_price() "
        "with a price below your bid, which needs no exchange rate, or pay spot orders in USD"
    )
    error.retryable = False
    return error


def _step_below(
    orders: AccountOrders, order: Order, current: float | None, error: SpotPriceStepError
) -> float | None:
    """Return the lowest bid in USD per hour that the step of a refusal allows, or None."""
    if current is None or error.max_step is None:
        return None
    step = error.max_step
    if not in_documented_form(order):
        rate = orders.market.data.rates.rate(order.get("currency"))
        step = bid_per_hour(step, rate or 0.0)
    return current - step * STEP_SHARE if step > 0 else None


def _accepted(response: dict[str, Any]) -> bool:
    return response.get("error") in (None, "")


def _send_bid(
    orders: AccountOrders, order: Order, usd_per_hour: float, allow_above: bool
) -> dict[str, Any]:
    """Check a bid, send it, and report it to the order's budget. Return the response."""
    order_id = order.id or 0
    bid = _wire_bid(orders, order, usd_per_hour, allow_above)
    response: dict[str, Any] = {}
    try:
        body = {"order_id": order_id, "desired_price": bid}
        response = orders.client._request("POST", "/v1/set_spot_price", json=body)
    except SpotPriceTooSoonError as error:
        # After a lost response, the API refuses the retry because the first request took effect.
        if error.sends <= 1 or not _shows_bid(orders, order, bid):
            raise
    except (CloreConnectionError, DatabaseError, InvalidResponseError):
        # The bid may have taken effect, so a budget counts the higher price.
        orders.notify_bid(order_id, max(usd_per_hour, order.usd_per_hour or 0.0))
        raise
    if _accepted(response):
        orders.notify_bid(order_id, usd_per_hour)
    return response


def _wire_bid(orders: AccountOrders, order: Order, usd_per_hour: float, allow_above: bool) -> float:
    """Check a bid, and return it in the unit of the API."""
    if order.is_spot is False:
        raise ValueError(
            f"order_id {order.id} is not a spot order, so nothing was bid: only spot orders have a "
            "bid"
        )
    orders.check_price(usd_per_hour, f"the bid for order {order.id}")
    if in_documented_form(order):
        orders.market.data.check_bid_price("new_price", usd_per_hour, order.server_id, allow_above)
        return usd_per_hour
    currency, server_id = order.get("currency"), order.server_id
    if server_id is None or not isinstance(currency, str):
        raise OrderNotFoundError(
            f"order {order.id} shows no server or currency, so nothing was bid: try again later",
            order_id=order.id,
        )
    currency = check_currency("the order's currency", currency)
    return orders.market.wire_bid("new_price", usd_per_hour, server_id, currency, allow_above)


def _shows_bid(orders: AccountOrders, before: Order, bid: float) -> bool:
    """Return whether an order now has the bid that was sent."""
    after = orders.find(before.id or 0)
    shown = finite(after.wire.get("price")) if after is not None else None
    if shown is None:
        return False
    if in_documented_form(before):
        # The price is in the order's currency and the bid in USD: only a change can be seen.
        return shown != finite(before.wire.get("price"))
    return abs(shown - bid) <= max(1e-6 * bid, 1e-8)  # bitcoin has eight decimals
