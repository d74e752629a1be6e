"""Write records in either of the two forms of the API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .catalog import RATES, Server, in_currency
from .settings import CURRENCIES
from .state import FEE_RATES

if TYPE_CHECKING:
    from .state import Account, Order

PUBLIC_HOST = "127.0.0.1"


def encode(value: object) -> bytes:
    """Encode JSON as the API does: without spaces, and with non-ASCII characters as UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def server(server: Server, form: str) -> dict[str, Any]:
    """Return a server as the marketplace lists it."""
    if form == "live":
        return {**server.record, "rented": server.rented, "price": _live_price(server)}
    return {
        "id": server.id,
        "gpu_array": server.gpus,
        "price": {
            "usd": {
                "on_demand_clore": round(server.usd_on_demand["CLORE-Blockchain"] / 24, 6),
                "spot": round(server.usd_spot.get("CLORE-Blockchain", 0.0) / 24, 6),
            }
        },
        "reliability": round(server.reliability * 100, 2),
        "rented": server.rented,
        "allowed_coins": list(server.allowed_coins),
        "specs": server.specs,
    }


def _live_price(server: Server) -> dict[str, Any] | None:
    quirks = server.quirks
    coins = server.allowed_coins if "allowed_prices_only" in quirks else CURRENCIES
    on_demand, spot = server.usd_on_demand, server.usd_spot
    price: dict[str, Any] = {
        "on_demand": {coin: server.on_demand(coin) for coin in coins},
        "spot": {coin: server.min_bid(coin) or 0 for coin in coins},
        "usd": {
            "on_demand_btc": on_demand["bitcoin"],
            "on_demand_clore": on_demand["CLORE-Blockchain"],
            "on_demand_usd": on_demand["USD-Blockchain"],
            "spot": spot.get("CLORE-Blockchain", 0) if "spot_in_usd" in quirks else 0,
        },
        "original_usd": {
            coin: {"on_demand": on_demand[coin], "spot": spot.get(coin, 0)}
            for coin in ("CLORE-Blockchain", "bitcoin")
        },
    }
    if "no_usd" in quirks:
        del price["usd"]
    if "null_usd" in quirks:
        price["usd"]["on_demand_clore"] = None
    if "null_spot" in quirks:
        price["usd"]["spot"] = price["spot"] = None
    if "no_original" in quirks:
        del price["original_usd"]
    if "null_original" in quirks:
        price["original_usd"] = None
    return price


def wallets(account: Account, form: str) -> list[dict[str, Any]]:
    """Return the wallets of an account."""
    deposit = "deposit" if form == "live" else "deposit_address"
    fees = {"bitcoin": 0.00005, "CLORE-Blockchain": 1, "USD-Blockchain": 1}
    records = []
    for name in CURRENCIES:
        record: dict[str, Any] = {"name": name, deposit: account.deposits[name]}
        balance = account.balances[name]
        record["balance"] = balance if form == "live" else balance or 0.0
        if form == "live":
            record["withdrawal_fee"] = fees[name]
        records.append(record)
    return records


def renter_fees(creation_fee: float) -> dict[str, Any]:
    """Return the envelope of renter_fees: percents, and the creation fee in each currency."""
    kinds = {"on_demand": FEE_RATES["on-demand"], "spot": FEE_RATES["spot"]}
    amounts = {coin: in_currency(creation_fee, coin) for coin in CURRENCIES}
    return {
        "renter_fees": {
            kind: {"base": dict.fromkeys(CURRENCIES, rate * 100), "extra": {}}
            for kind, rate in kinds.items()
        },
        "creation_fees": dict.fromkeys(kinds, amounts),
        "poh_config": {"max_reduction_percent": 50, "max_poh_amount": 100_000},
        "poh_balance": 0,
        "code": 0,
    }


def order(order: Order, server: Server, form: str, now: float) -> dict[str, Any]:
    """Return an order as my_orders lists it."""
    return _live_order(order, server, now) if form == "live" else _documented_order(order, now)


def _live_order(order: Order, server: Server, now: float) -> dict[str, Any]:
    gone = order.is_gone(now)
    record: dict[str, Any] = {
        "id": order.id,
        "si": order.server_id,
        "image": order.image,
        "currency": order.currency,
        "price": order.price,
        "fee": order.fee_rate,
        "creation_fee": in_currency(order.creation_fee_usd, order.currency),
        "spend": round(order.rent + order.fee, 10),
        "ct": order.created_at,
        "mrl": order.mrl * 3600,
        "spot": order.spot,
        "expired": gone,
        "online": order.online and not gone,
        **_live_connection(order, gone),
        "specs": _order_specs(server),
        "rating": server.record.get("rating"),
        "cuda_version": server.record.get("cuda_version"),
        "reliability": server.record["reliability"],
        "owner": server.record.get("owner"),
        "gpu_array": server.record.get("gpu_array"),
    }
    if "defaults_missing" in order.quirks and not gone:
        del record["fee"]
        for name in ("spot", "expired"):
            if record[name] is False:
                del record[name]
    if "newer_fields" in order.quirks:
        record["original_price_usd"] = round(order.price * RATES[order.currency], 6)
        record["my_past_rating"] = None
    return record


def _live_connection(order: Order, gone: bool) -> dict[str, Any]:
    quirks = order.quirks
    if gone:
        return {"mon_container": 2 if order.deployed else 1, "tcp_ports": []}
    early = order.deployed is None
    fields: dict[str, Any] = {"mon_container": int("mon_container_1" in quirks) if early else 2}
    if early and "filled_early" not in quirks:
        if "no_lists_early" not in quirks:
            fields |= {"pub_cluster": [], "tcp_ports": []}
        return fields
    fields |= {
        "pub_cluster": PUBLIC_HOST if "host_as_text" in quirks else [PUBLIC_HOST],
        "tcp_ports": [f"{inner}:{public}" for inner, public in order.tcp_ports.items()],
    }
    if order.http_port:
        fields |= {"http_port": order.http_port, "http_pub": order.http_pub}
        if order.body.get("jupyter_token") and not early:
            fields["auto_login"] = order.login_token
    return fields


def _order_specs(server: Server) -> dict[str, Any] | None:
    """Return the server's specs as orders show them, with more fields than the marketplace."""
    specs: dict[str, Any] | None = server.record["specs"]
    if specs is None:
        return None
    specs = {**specs, "backend_version": 21, "xfs": 1}
    if specs.get("net"):
        down, up = specs["net"]["down"], specs["net"]["up"]
        specs["net"] = {**specs["net"], "test_history": [f"S|1760764742|{down}|{up}"]}
    return specs


def _documented_order(order: Order, now: float) -> dict[str, Any]:
    status, ssh, http = "creating", "", {}
    if order.is_gone(now):
        status = "cancelled" if order.ended_by == "cancel" else "expired"
    elif order.deployed is not None:
        status = "running" if order.online else "creating"
        if order.ssh_port and order.online:
            ssh = f"ssh root@{PUBLIC_HOST} -p {order.ssh_port}"
        if order.http_port:
            http = {order.http_port: f"https://{order.http_pub}"}
    return {
        "order_id": order.id,
        "renting_server": order.server_id,
        "status": status,
        "type": "spot" if order.spot else "on-demand",
        "image": order.image,
        "currency": order.currency,
        "connection": {"ssh": ssh, "http_ports": http},
        "price": order.price / 24,
        "started": order.created_at,
    }


def spot_market(server: Server, offers: list[dict[str, Any]], form: str) -> dict[str, Any]:
    """Return the envelope of spot_marketplace; the bids in `offers` are per day."""
    bids = {coin: server.min_bid(coin) for coin in server.allowed_coins}
    if form == "live":
        return {
            "market": {
                "currency_rates_in_usd": RATES,
                "offers": offers,
                "server": {
                    "min_pricing": {coin: bid for coin, bid in bids.items() if bid},
                    "mrl": server.mrl * 3600,
                    "visibility": "public",
                    "online": server.online,
                },
            },
            "exists": True,
            "code": 0,
        }
    plain = []
    for offer in offers:
        usd = offer["bid"] * RATES[offer["currency"]] / 24
        plain.append({k: v for k, v in offer.items() if k != "bid"} | {"price": round(usd, 8)})
    minimum = round(server.usd_spot.get("CLORE-Blockchain", 0.0) / 24, 6)
    return {"code": 0, "market": {"offers": plain, "min_price": minimum}}


def offer(order: Order) -> dict[str, Any]:
    """Return the account's own offer from its order."""
    return {
        "offer_id": order.id,
        "bid": order.price,
        "active": order.active,
        "my": True,
        "currency": order.currency,
    }
