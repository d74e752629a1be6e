"""What servers, orders and wallets have in common, and which form an answer is in."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from clore_client.errors import masked, printable

R = TypeVar("R", bound="Record")

# A record with one of these fields makes the whole answer one of the live form.
LIVE_PRICE_MARKERS = ("on_demand", "original_usd")
LIVE_ORDER_MARKERS = ("si", "ct", "mon_container", "pub_cluster")
LIVE_MARKET_MARKERS = ("currency_rates_in_usd", "server")


def dicts(value: Any) -> list[dict[str, Any]]:
    """The dicts of a list, or nothing: what an answer has in place of records is no record."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def part_of(record: Any, *path: str) -> Any:
    """What stands at ``path`` in nested dicts, or None."""
    for key in path:
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def is_live(answer: Mapping[str, Any]) -> bool:
    """Whether an answer of the API is in the live form; decided once for the whole answer."""
    servers = answer.get("servers")
    for server in servers if isinstance(servers, list) else ():  # without a copy of thousands
        price = server.get("price") if isinstance(server, dict) else None
        if isinstance(price, dict) and any(marker in price for marker in LIVE_PRICE_MARKERS):
            return True
    for order in dicts(answer.get("orders")):
        if any(marker in order for marker in LIVE_ORDER_MARKERS):
            return True
    if "exists" in answer:
        return True
    market = answer.get("market")
    if not isinstance(market, dict):
        return False
    if any(marker in market for marker in LIVE_MARKET_MARKERS):
        return True
    return any("bid" in offer for offer in dicts(market.get("offers")))


def whole_id(value: Any) -> int | None:
    """Return an id that came as an integer, or as a string of digits; else None."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if abs(value) < 10**18 else None


class Record(dict[str, Any]):
    """A dict in the documented form that remembers what the API sent.

    ``.wire`` gives the record as it came. Records built by hand are taken to be in the
    documented form already, and are their own ``.wire``.
    """

    __slots__ = ("_wire",)
    _wire: dict[str, Any]

    @property
    def wire(self) -> dict[str, Any]:
        """A copy of the whole record as the API sent it."""
        try:
            return copy.deepcopy(self._wire)
        except AttributeError:
            return dict(self)

    def _like(self: R, items: Mapping[str, Any]) -> R:
        twin = type(self)(items)
        for cls in type(self).__mro__:
            for slot in getattr(cls, "__slots__", ()):
                if hasattr(self, slot):
                    setattr(twin, slot, getattr(self, slot))
        return twin

    def copy(self: R) -> R:
        """A shallow copy of the same type, with the same ``.wire``."""
        return self._like(self)

    __copy__ = copy

    def __or__(self: R, other: Any) -> R:  # type: ignore[override]
        return self._like({**self, **other}) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self: R, other: Any) -> R:  # type: ignore[override]
        return self._like({**other, **self}) if isinstance(other, Mapping) else NotImplemented

    def _summary(self) -> dict[str, Any]:
        """What the repr shows."""
        return self

    def __repr__(self) -> str:
        # repr() of the parts escapes control characters: text in a record comes from strangers.
        shown = masked({k: v for k, v in self._summary().items() if v is not None})
        fields = ", ".join(f"{printable(str(k))}={v!r}" for k, v in shown.items())
        return f"<{type(self).__name__} {fields}>"

    __str__ = __repr__
