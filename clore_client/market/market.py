"""Read the marketplace, and remember the prices and exchange rates that it tells."""

from __future__ import annotations

from typing import Any, Protocol

from clore_client.market.spot import MarketData
from clore_client.models.server import Server, listed_prices, to_servers


class Requester(Protocol):
    """What reading the marketplace needs of a client."""

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
    """The marketplace of the API that a client uses."""

    def __init__(self, client: Requester) -> None:
        self._client = client
        self._by_url: dict[str, MarketData] = {}  # base URL -> what its answers told

    @property
    def data(self) -> MarketData:
        """What is known of the API behind the base URL of this moment."""
        return self._by_url.setdefault(self._client.base_url, MarketData())

    def read(self) -> dict[str, Any]:
        """Read the listing."""
        answer = self._client._request("GET", "/v1/marketplace")
        data = self.data
        data.observe(answer)
        data.listed = listed_prices(answer, data.rates)
        return answer

    def read_spot(self, server_id: int) -> dict[str, Any]:
        """Read the spot market of a server."""
        answer = self._client._request("GET", "/v1/spot_marketplace", params={"market": server_id})
        self.data.observe_spot(answer)
        return answer

    def find_server(self, server_id: int) -> Server | None:
        """Return a server as it is listed now, rented or not."""
        listed = to_servers(self.read(), include_rented=True, server_id=server_id)
        return listed[0] if listed else None

    def ensure_rates(self, server_id: int, currency: str) -> None:
        """Read the rate by which a bid is converted, where it is not known or too old."""
        data = self.data
        if not data.documented and currency not in data.rates.fresh():
            self.read_spot(server_id)

    def wire_bid(
        self, name: str, usd_per_hour: float, server_id: int, currency: str, allow_above: bool
    ) -> float:
        """Return a bid as the API takes it.

        Parameters:
            name: of the argument, for the error.
            usd_per_hour: the bid.
            server_id, currency: what is bid for, and what is paid with.
            allow_above: whether it may be above the on-demand price.

        Raises:
            ValueError: it is above the on-demand price.
            RateUnknownError: neither the form nor a rate is known for sure.
        """
        self.data.check_bid_price(name, usd_per_hour, server_id, allow_above)
        self.ensure_rates(server_id, currency)
        return self.data.wire_bid(usd_per_hour, currency, server_id)
