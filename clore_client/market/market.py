"""Read the marketplace, and keep its prices and exchange rates."""

from __future__ import annotations

from typing import Any, Protocol

from clore_client.market.spot import MarketData
from clore_client.models.server import Server, listed_prices, to_servers


class Requester(Protocol):
    """The parts of ``CloreClient`` that the marketplace uses."""

    @property
    def base_url(self) -> str: ...

    def _request(
        self,
        method: str,
        endpoint: str,
        params: dict[str, Any] | None = None,
        json: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]: ...


class Market:
    """The marketplace of a client's API."""

    def __init__(self, client: Requester) -> None:
        self._client = client
        self._by_url: dict[str, MarketData] = {}  # by base URL, which can change

    @property
    def data(self) -> MarketData:
        """The market data of the current base URL."""
        return self._by_url.setdefault(self._client.base_url, MarketData())

    def read(self) -> dict[str, Any]:
        """Read the list of servers."""
        response = self._client._request("GET", "/v1/marketplace")
        data = self.data
        data.observe(response)
        data.listed = listed_prices(response, data.rates)
        return response

    def read_spot(self, server_id: int) -> dict[str, Any]:
        """Read the spot market of a server."""
        response = self._client._request(
            "GET", "/v1/spot_marketplace", params={"market": server_id}
        )
        self.data.observe_spot(response)
        return response

    def find_server(self, server_id: int) -> Server | None:
        """Return a server, rented or not, or None if it is not listed."""
        listed = to_servers(self.read(), include_rented=True, server_id=server_id)
        return listed[0] if listed else None

    def ensure_rates(self, server_id: int, currency: str) -> None:
        """Read the exchange rate for a bid, if it is not known or too old."""
        data = self.data
        if not data.documented and currency not in data.rates.fresh():
            self.read_spot(server_id)

    def wire_bid(
        self, name: str, usd_per_hour: float, server_id: int, currency: str, allow_above: bool
    ) -> float:
        """Check a bid, and return it in the unit of the API.

        Parameters:
            name: the name of the argument, for the error.
            usd_per_hour: the bid.
            server_id: the server.
            currency: the currency to pay with.
            allow_above: whether to allow a bid far above the on-demand price.

        Raises:
            ValueError: the bid is more than ten times the on-demand price.
            RateUnknownError: the exchange rate is not known.
        """
        self.data.check_bid_price(name, usd_per_hour, server_id, allow_above)
        self.ensure_rates(server_id, currency)
        return self.data.wire_bid(usd_per_hour, currency, server_id)
