"""Wallet, the balance of one currency."""

from __future__ import annotations

from typing import Any

from clore_client.models.record import Record, dicts
from clore_client.pricing import ExchangeRates, finite


class Wallet(Record):
    """One wallet: a dict with ``name``, ``balance`` and ``deposit_address``.

    The live API calls the address ``deposit``; that field is kept too.
    """

    __slots__ = ("_rates",)
    _rates: ExchangeRates
    FIELDS = ("name", "balance", "balance_usd", "deposit_address")

    @property
    def name(self) -> str | None:
        """The currency, for example ``"CLORE-Blockchain"``."""
        name = self.get("name")
        return name if isinstance(name, str) else None

    @property
    def balance(self) -> float | None:
        """The balance, in its currency."""
        return finite(self.get("balance"))

    @property
    def balance_usd(self) -> float | None:
        """The balance in USD; None if the balance or the exchange rate is not known."""
        rates = getattr(self, "_rates", None) or ExchangeRates()
        return rates.usd(self.balance, self.name)

    @property
    def deposit_address(self) -> str | None:
        """The address for deposits."""
        address = self.get("deposit_address")
        return address if isinstance(address, str) else None


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
