"""Define orders, and convert them from the live form to the documented form."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Collection
from typing import Any

from clore_client.errors import masked
from clore_client.models.record import dicts, is_live, part_of, text_of, whole_id
from clore_client.models.server import GPURecord
from clore_client.pricing import (
    CREATION_FEE,
    ExchangeRates,
    creation_fee_after,
    finite,
    per_hour,
    positive,
    published_fee,
    wire_currency,
    with_fee,
)

# The live form has only the first two; the others are known from other sources.
ENDED_STATUSES = frozenset(
    {"cancelled", "expired", "completed", "error", "failed", "finished", "stopped", "terminated"}
)

# Compiled on first use, which makes the import faster.
_HOST_NAME = r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?"
_USER_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"


def plain_host(text: str) -> bool:
    """Return whether ``text`` is a host name or address that is safe for a shell and ssh."""
    if re.fullmatch(_HOST_NAME, text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # an IPv6 zone can hold any character


def plain_user(text: str) -> bool:
    """Return whether ``text`` is a user name that is safe for a shell and ssh."""
    return bool(re.fullmatch(_USER_NAME, text))


def _port(text: Any) -> int | None:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,5}", text):
        return None
    return int(text) if 1 <= int(text) <= 65535 else None


class Order(GPURecord):
    """One order, in the documented form.

    A dict with ``order_id``, ``renting_server``, ``status``, ``connection`` (``ssh`` and
    ``http_ports``), ``price`` (per hour, in the order's currency), ``started`` (Unix time), and
    all other fields that the API sent. A property is None if its field is missing or has an
    unexpected type.
    """

    _live: bool | None = None
    FIELDS = ("id", "server_id", "status", "gpu_name", "gpu_count", "price", "currency",
              "usd_per_hour", "cost_usd", "is_spot", "started_at", "image",
              "ssh_command")  # fmt: skip
    SHOWN = ("id", "server_id", "status", "gpu", "price", "currency", "usd_per_hour", "image",
             "started_at", "ssh_command", "ssh_password")  # fmt: skip

    @property
    def id(self) -> int | None:
        """The number of the order."""
        return whole_id(self.get("order_id"))

    @property
    def server_id(self) -> int | None:
        """The number of the rented server."""
        return whole_id(self.get("renting_server"))

    @property
    def status(self) -> str | None:
        """``"creating"``, ``"running"``, ``"cancelled"`` or ``"expired"``."""
        return text_of(self, "status")

    @property
    def price(self) -> float | None:
        """The price per hour, in its currency."""
        return finite(self.get("price"))

    @property
    def currency(self) -> str | None:
        """The currency that it is paid in, as the API names it."""
        return text_of(self, "currency")

    @property
    def image(self) -> str | None:
        """The Docker image."""
        return text_of(self, "image")

    @property
    def is_running(self) -> bool:
        """True if the order is deployed and has an address."""
        return self.status == "running"

    @property
    def is_spot(self) -> bool | None:
        """True if it is a spot order; None if the record does not say."""
        spot = self.get("spot")
        if isinstance(spot, bool):
            return spot
        return False if self.is_live else None  # the live form leaves out a false value

    @property
    def has_ended(self) -> bool:
        """True if the order has ended, and costs nothing any more."""
        return self.status in ENDED_STATUSES

    @property
    def ssh_command(self) -> str | None:
        """``"ssh root@<host> -p <port>"``, or None before the order runs."""
        return text_of(self, "connection", "ssh")

    @property
    def ssh_password(self) -> str | None:
        """The password that this client sent with the order, or None if it does not have it."""
        return text_of(self, "ssh_password")

    @property
    def http_urls(self) -> dict[str, str]:
        """A dict with the URL of each container port."""
        urls = part_of(self, "connection", "http_ports")
        if not isinstance(urls, dict):
            return {}
        return {str(k): v for k, v in urls.items() if isinstance(v, str)}

    @property
    def started_at(self) -> float | None:
        """The Unix time of its start; on the live API, of its creation."""
        return finite(self.get("started"))

    @property
    def usd_per_hour(self) -> float | None:
        """The price in USD per hour, without fees; None if no exchange rate is known.

        It uses the latest exchange rate that the client has read.
        """
        if "body" in self:  # a preview
            return finite(self.get("usd_per_hour"))
        return self._rates.usd(self.get("price"), self.get("currency"))

    @property
    def cost_usd(self) -> float | None:
        """The cost in USD until the order was read, with fees; None if it is not known.

        The live API says what was spent. Without that, it is the price for the time since the
        start, and only known while the order is active.
        """
        hourly, rate = finite(self.get("price")), self._rates.rate(self.get("currency"))
        spent = finite(self.get("spend"))
        if rate is None or hourly is None or hourly <= 0:
            return None
        hourly = with_fee(hourly, self.fee_rate)
        if spent is None:
            if self.started_at is None or self.has_ended:
                return None
            spent = hourly * max(0.0, time.time() - self.started_at) / 3600.0
        creation = finite(self.get("creation_fee"))
        creation_usd = CREATION_FEE if creation is None else creation * rate
        return spent * rate + creation_fee_after(spent / hourly * 3600.0, creation_usd)

    @property
    def fee_rate(self) -> float:
        """The renter's fee as a fraction of the price; the published one if it is not stated."""
        stated = finite(self.get("fee"))
        if stated is not None and 0 <= stated <= 1:
            return stated
        return published_fee(self.is_spot is True)

    @property
    def body(self) -> dict[str, Any] | None:
        """What a preview would send; None for an order."""
        body = self.get("body")
        return body if isinstance(body, dict) else None

    @property
    def is_live(self) -> bool | None:
        """True if it came in the live form; None if it did not come from the API."""
        return self._live

    def _summary(self) -> dict[str, Any]:
        if self.body is None:
            return super()._summary()
        return {"usd_per_hour": self.usd_per_hour, "body": self.body}

    def _card(self) -> dict[str, Any]:
        from clore_client.models.listing import utc_time  # only notebooks need it

        started = utc_time(self.started_at)
        own = {"started_at": started and f"{started} UTC", "body": masked(self.body)}
        return {**super()._card(), **own}


def _live_host(record: dict[str, Any]) -> str:
    cluster = record.get("pub_cluster")
    host = cluster[0] if isinstance(cluster, list) and cluster else cluster
    return host if isinstance(host, str) and plain_host(host) else ""


def _live_ports(record: dict[str, Any]) -> dict[int, int]:
    """Return the public port of each container port."""
    mapped: dict[int, int] = {}
    entries = record.get("tcp_ports")
    for entry in entries if isinstance(entries, list) else ():
        inner, _, outer = entry.partition(":") if isinstance(entry, str) else ("", "", "")
        container, public = _port(inner), _port(outer)
        if container and public:
            mapped.setdefault(container, public)
    return mapped


def _live_status(record: dict[str, Any], cancelled: bool, host: str, ports: bool) -> str:
    if record.get("expired") is True:
        return "cancelled" if cancelled else "expired"
    deployed = record.get("mon_container") in (2, None)
    if deployed and host and ports and record.get("online") is not False:
        return "running"
    return "creating"


def _either(record: dict[str, Any], name: str, other: str) -> Any:
    """Return the documented field, or the live one if that is missing."""
    value = record.get(name)
    return record.get(other) if value is None else value


def _live_fields(record: dict[str, Any], cancelled: Collection[int]) -> dict[str, Any]:
    """Return the documented fields of an order in the live form."""
    order_id = _either(record, "order_id", "id")
    by_this_client = whole_id(order_id) in cancelled
    host, ports = _live_host(record), _live_ports(record)
    status = _live_status(record, by_this_client, host, bool(ports))
    # The API can send host and ports before the container runs (seen on the live API).
    reachable = status == "running" and 22 in ports
    pub, http_port = record.get("http_pub"), record.get("http_port")
    urls = {}
    if isinstance(pub, str) and plain_host(pub) and (port := _port(str(http_port))):
        urls[str(port)] = f"https://{pub}"
    return {
        "order_id": order_id,
        "renting_server": _either(record, "renting_server", "si"),
        "status": status,
        "connection": {
            "ssh": f"ssh root@{host} -p {ports[22]}" if reachable else "",
            "http_ports": urls,
        },
        "price": per_hour(record.get("price")),
        "started": _either(record, "started", "ct"),
    }


def set_listed_price(order: Order, usd_per_hour: float) -> None:
    """Set the exchange rate of an order from the listed on-demand price of its server."""
    if (price := positive(order.get("price"))) is not None:
        rates = ExchangeRates()
        rates.update({wire_currency(order["currency"]): usd_per_hour / price}, display_only=True)
        order._rates = rates


def to_orders(
    response: dict[str, Any], cancelled: Collection[int], rates: ExchangeRates
) -> list[Order]:
    """Convert the orders of a response to the documented form.

    Parameters:
        response: the response with the list of orders.
        cancelled: ids of the orders that this client cancelled.
        rates: the exchange rates for ``usd_per_hour``.
    """
    live, orders = is_live(response), []
    for record in dicts(response.get("orders")):
        order = Order({**record, **_live_fields(record, cancelled)} if live else record)
        order._wire, order._live, order._rates = record, live, rates
        orders.append(order)
    return orders


def in_documented_form(order: Order) -> bool:
    """Return whether an order has a field that only the documented form has."""
    names = {"status", "connection", "renting_server"}
    return order.is_live is False and not names.isdisjoint(order.wire)


def created_id(response: dict[str, Any]) -> int | None:
    """Return the order id in a response to ``create_order``.

    The live API sends none any more; older responses and the documented form have one.
    """
    nested = response.get("order")
    for holder in (response, nested if isinstance(nested, dict) else {}):
        for name in ("order_id", "id"):
            if (order_id := whole_id(holder.get(name))) is not None and order_id > 0:
                return order_id
    return None
