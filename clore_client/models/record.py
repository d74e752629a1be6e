"""Define records and wallets, and read the fields of API responses."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from clore_client.errors import masked, printable
from clore_client.pricing import ExchangeRates, finite

R = TypeVar("R", bound="Record")

# One record with one of these fields means that the whole response is in the live form.
LIVE_ORDER_MARKERS = ("si", "ct", "mon_container", "pub_cluster")
LIVE_MARKET_MARKERS = ("currency_rates_in_usd", "server")


class RawRecords:
    """Keep records as JSON, and decode each one whenever it is read."""

    def __init__(self, raw: list[Any], decode: Callable[[Any], Any]) -> None:
        self._raw = raw
        self._decode = decode

    def __getitem__(self, index: int) -> Any:
        return self._decode(self._raw[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self._decode, self._raw)


def dicts(value: Any) -> list[dict[str, Any]]:
    """Return the dicts in a list, without anything that is not a record."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def part_of(record: Any, *path: str) -> Any:
    """Return the value at ``path`` in nested dicts, or None."""
    for key in path:
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def text_of(record: Any, *path: str) -> str | None:
    """Return the text at ``path`` in nested dicts; None if there is none, or it is empty."""
    text = part_of(record, *path)
    return text if isinstance(text, str) and text else None


def is_live(response: Mapping[str, Any]) -> bool:
    """Return whether a response with orders or a spot market is in the live form."""
    orders, market = dicts(response.get("orders")), response.get("market")
    if "exists" in response or any(m in order for order in orders for m in LIVE_ORDER_MARKERS):
        return True
    if not isinstance(market, dict):
        return False
    offers = dicts(market.get("offers"))
    return any(m in market for m in LIVE_MARKET_MARKERS) or any("bid" in offer for offer in offers)


def whole_id(value: Any) -> int | None:
    """Return an id, given as an integer or as a string of digits, or None."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if abs(value) < 10**18 else None


class Record(dict[str, Any]):
    """A dict in the documented form, with the original from the API in ``.wire``.

    A record that did not come from the API counts as documented, and is its own ``.wire``.
    """

    _wire: dict[str, Any] | None = None
    _rates = ExchangeRates()  # empty; that of the client replaces it
    # The properties in a card and in a row of to_dicts(): numbers, text and bools.
    FIELDS: ClassVar[tuple[str, ...]] = ()
    SHOWN: ClassVar[tuple[str, ...]] = ()  # the properties in the repr; if empty, the FIELDS

    @property
    def wire(self) -> dict[str, Any]:
        """A copy of the record as the API sent it."""
        return dict(self) if self._wire is None else copy.deepcopy(self._wire)

    def _like(self: R, items: Mapping[str, Any]) -> R:
        twin = type(self)(items)
        twin.__dict__.update(self.__dict__)
        return twin

    def copy(self: R) -> R:
        """Return a shallow copy of the same type, with the same ``.wire``."""
        return self._like(self)

    __copy__ = copy

    def __or__(self: R, other: Any) -> R:  # type: ignore[override]
        return self._like({**self, **other}) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self: R, other: Any) -> R:  # type: ignore[override]
        return self._like({**other, **self}) if isinstance(other, Mapping) else NotImplemented

    def _summary(self) -> dict[str, Any]:
        """Return what the repr shows: names of properties, and their values."""
        shown = {name: getattr(self, name) for name in self.SHOWN or self.FIELDS}
        usd = {k: round(v, 6) for k, v in shown.items() if "usd" in k and isinstance(v, float)}
        return {**shown, **usd} or self

    def _card(self) -> dict[str, Any]:
        """Return what a notebook shows: properties by name; the first one is in the heading."""
        return {name: getattr(self, name) for name in self.FIELDS} or masked(self)

    def _repr_html_(self) -> str:
        from clore_client.models.listing import html_card  # only notebooks need it

        values = list(self._card().items())
        number = f" {values.pop(0)[1]}" if self.FIELDS and values[0][1] is not None else ""
        return html_card(f"{type(self).__name__}{number}", values)

    def __dir__(self) -> list[str]:
        """Return the properties, and the methods that read a dict."""
        names = super().__dir__()
        properties = [n for n in names if isinstance(getattr(type(self), n, None), property)]
        return sorted({*properties, "copy", "get", "items", "keys", "values"})

    def __repr__(self) -> str:
        # Text in a record comes from strangers: repr() of the parts escapes control characters.
        shown = masked({k: v for k, v in self._summary().items() if v is not None})
        fields = ", ".join(f"{printable(str(k))}={v!r}" for k, v in shown.items())
        return f"<{type(self).__name__} {fields}>"

    __str__ = __repr__


class Wallet(Record):
    """One wallet: a dict with ``name``, ``balance`` and ``deposit_address``.

    The live API calls the address ``deposit``; that field is kept too.
    """

    FIELDS = ("name", "balance", "balance_usd", "deposit_address")

    @property
    def name(self) -> str | None:
        """The currency, for example ``"CLORE-Blockchain"``."""
        return text_of(self, "name")

    @property
    def balance(self) -> float | None:
        """The balance, in its currency."""
        return finite(self.get("balance"))

    @property
    def balance_usd(self) -> float | None:
        """The balance in USD; None if the balance or the exchange rate is not known."""
        return self._rates.usd(self.balance, self.name)

    @property
    def deposit_address(self) -> str | None:
        """The address for deposits."""
        return text_of(self, "deposit_address")


def to_wallets(response: dict[str, Any], rates: ExchangeRates | None = None) -> list[Wallet]:
    """Convert the wallets of a response to the documented form.

    Parameters:
        response: the response with the list of wallets.
        rates: the exchange rates for ``balance_usd``.
    """
    wallets = []
    for record in dicts(response.get("wallets")):
        wallet = Wallet(record)
        wallet._wire = record
        if rates is not None:
            wallet._rates = rates
        if "deposit" in record:
            wallet.setdefault("deposit_address", record["deposit"])
        wallets.append(wallet)
    return wallets
