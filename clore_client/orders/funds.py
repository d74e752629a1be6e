"""Compare the wallets of an account with what its orders cost."""

from __future__ import annotations

import math
from typing import Any

from clore_client.errors import InsufficientBalanceError, OrderNotFoundError
from clore_client.models.order import Order, set_listed_price
from clore_client.models.record import Wallet, to_wallets
from clore_client.models.server import Server, amount_per_hour, on_demand_usd
from clore_client.orders.account import AccountOrders
from clore_client.pricing import finite, positive, published_fee, wire_currency, with_fee
from clore_client.validation import check_order_id, short_repr


def read_balances(orders: AccountOrders) -> list[Wallet]:
    """Read the wallets, and the exchange rates that their balances in USD need."""
    rates = orders.market.data.rates
    wallets = to_wallets(orders.client._request("GET", "/v1/wallets"), rates)
    if any(wallet.balance and wallet.balance_usd is None for wallet in wallets):
        orders.market.learn_rates(None)
    return wallets


def wallet_of(wallets: list[Wallet], currency: str) -> Wallet | None:
    """Return the first wallet whose name is, or contains, a currency; None if there is none."""
    wanted = {currency.strip().lower(), (wire_currency(currency) or currency).strip().lower()}
    for wallet in wallets:
        if any(part in (wallet.name or "").lower() for part in wanted):
            return wallet
    return None


def balance_of(wallets: list[Wallet], currency: str) -> float:
    """Return the balance of a wallet; see ``CloreClient.get_balance``."""
    wallet = wallet_of(wallets, currency)
    if wallet is None and wire_currency(currency) is None:
        names = ", ".join(short_repr(wallet.name) for wallet in wallets if wallet.name)
        raise ValueError(
            f"currency {short_repr(currency)} is neither a currency nor part of a wallet's name: "
            f"choose one of {names or 'BTC, CLORE and USD'}"
        )
    return _balance(wallet)


def _balance(wallet: Wallet | None) -> float:
    return (wallet.balance if wallet is not None else None) or 0.0


def hours_left(orders: AccountOrders, rented: Any, currency: str) -> float | None:
    """Return how long a wallet lasts; see ``CloreClient.hours_left``."""
    order_id = None if isinstance(rented, Server) else check_order_id("server_or_order", rented)
    active = orders.active()
    hourly: float | None = 0.0
    if isinstance(rented, Server):
        hourly = _hourly_cost(orders, rented, currency)
    else:
        currency = _paid_with(active, order_id)
    if hourly is None:
        return None
    for order in active:
        price = positive(order.get("price"))
        if price is not None and order.get("currency") == currency:
            hourly += with_fee(price, order.fee_rate)
    wallets = to_wallets(orders.client._request("GET", "/v1/wallets"))
    return _balance(wallet_of(wallets, currency)) / hourly if hourly else math.inf


def _paid_with(active: list[Order], order_id: int | None) -> str:
    """Return the currency of an active order."""
    for order in active:
        if order.id == order_id and isinstance(order.get("currency"), str):
            return str(order["currency"])
    raise OrderNotFoundError(
        f"there is no active order {order_id} with a currency in this account: check get_orders()",
        order_id=order_id,
    )


def _hourly_cost(orders: AccountOrders, server: Server, currency: str) -> float | None:
    """Return the on-demand price with the account's fees, in ``currency`` per hour."""
    from clore_client.market.summary import account_fees

    amount = amount_per_hour(server, currency)
    if amount is None:
        usd = on_demand_usd(server, currency)
        rate = orders.market.data.rates.rate(currency)
        if usd is not None and rate is None:
            orders.market.learn_rates(None)
            rate = orders.market.data.rates.rate(currency)
        amount = usd / rate if usd is not None and rate else None
    fraction, _ = account_fees(orders.market.fees(), False, currency, None)
    return None if amount is None else with_fee(amount, fraction)


def explain_balance(
    orders: AccountOrders,
    error: InsufficientBalanceError,
    currency: str,
    usd_per_hour: float | None,
    spot: bool,
) -> None:
    """Add the wallet, its balance and the cost of one hour to an error.

    Parameters:
        orders: the orders of the account.
        error: the refusal of the API.
        currency: the API's name of the currency of the order.
        usd_per_hour: the price of the order, without fees; None if it is not known.
        spot: whether it is a spot order.
    """
    wallets = read_balances(orders)
    wallet = wallet_of(wallets, currency)
    error.wallet, error.usd_per_hour = currency, usd_per_hour
    error.balance = finite(wallet.balance) if wallet is not None else None
    has = f"wallet {currency} has {error.balance or 0.0:.8g}"
    if wallet is not None and wallet.balance_usd is not None and currency != "USD-Blockchain":
        has += f" ({wallet.balance_usd:.4g} USD)"
    if usd_per_hour is not None:
        hourly = with_fee(usd_per_hour, published_fee(spot))
        has += f", and an hour of this order costs {hourly:.4g} USD with fees"
    others = [
        f"{other.name} has {other.balance:.8g}"
        for other in wallets
        if other.balance and other.name != currency and wire_currency(other.name or "")
    ]
    pay = f"pay with another currency= ({', '.join(others)})" if others else "use another currency="
    error.add_hint(f"{has}: add money, or {pay}")


def learn_order_rates(orders: AccountOrders, read: list[Order]) -> None:
    """Read the exchange rates if an order of the live form can't be priced without them.

    The documented form has no rates: the listed price of the server gives the rate of its order.
    """
    for order in read:
        known = wire_currency(str(order.get("currency"))) and finite(order.get("price")) is not None
        if order.usd_per_hour is not None or not known or order.server_id is None:
            continue
        if order.is_live:
            orders.market.learn_rates(order.server_id)
            return
        listed = orders.market.data.listed.get(order.server_id)
        if listed is not None and not order.is_spot:
            set_listed_price(order, listed)
