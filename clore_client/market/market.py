"""Read the marketplace: prices, exchange rates, fees, and which hosts worked."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from clore_client.api.request import limited
from clore_client.config import canonical_url, locked_path, read_state_file, replace_file
from clore_client.errors import CloreError, RateUnknownError
from clore_client.log import logger
from clore_client.models.record import is_live, part_of
from clore_client.models.server import Marketplace, Server
from clore_client.pricing import RATE_MAX_AGE, ExchangeRates, bid_per_day, finite, positive

# A bid above this is probably a price per day, which is 24 times too high.
MAX_TIMES_ON_DEMAND = 10.0
ROUNDING = 1e-9  # the rounding error between prices per day and per hour
RATES_PATIENCE = 10.0  # seconds to try to read exchange rates that are only for display
HOST_HISTORY_FILE = "host_history"  # in the state folder
HISTORY_LASTS = 86_400.0  # seconds
HISTORY_PATIENCE = 1.0  # seconds to wait for another process that writes the file

WORKED = "worked"
NOT_DEPLOYED = "not deployed"
# ``SSHError.reason`` -> the outcome
LOGIN_OUTCOMES = {"unreachable": "no sshd", "refused": "login refused"}


class Requester(Protocol):
    """List the parts of ``CloreClient`` that the marketplace uses."""

    @property
    def base_url(self) -> str: ...

    @property
    def api_key(self) -> str | None: ...

    def _read_marketplace(self) -> dict[str, Any]: ...

    def _request(self, method: str, endpoint: str, **options: Any) -> dict[str, Any]: ...


class MarketData:
    """Remember the form, the exchange rates and the listed prices of one API.

    Attributes:
        kept: the last list of servers, and the monotonic time at which it was read, if a search
            may use it again.
    """

    def __init__(self) -> None:
        self.kept: tuple[Marketplace, float] | None = None
        self.rates = ExchangeRates()
        self.listed: dict[int, float] = {}  # server id -> on-demand USD per hour
        self.live = False  # whether a response was certainly in the live form
        self.rates_tried_at = -math.inf  # monotonic time of the last try to read them for display
        self._documented_at = -math.inf

    @property
    def documented(self) -> bool:
        """True if a response of the last minutes was certainly in the documented form."""
        return time.monotonic() - self._documented_at <= RATE_MAX_AGE

    def observe(self, live: bool) -> None:
        """Record that the API uses the live form, if a response shows it."""
        if live:
            self.live = True
            self._documented_at = -math.inf

    def observe_spot(self, response: dict[str, Any]) -> None:
        """Record the form and the exchange rates of a response to ``spot_marketplace``."""
        live = is_live(response)
        self.observe(live)
        if live:
            self.rates.update(part_of(response, "market", "currency_rates_in_usd"))
        elif isinstance(response.get("market"), dict) and response["market"]:
            # An empty market shows nothing about the form.
            self.rates = ExchangeRates()
            self._documented_at = time.monotonic()

    def check_bid_price(
        self, name: str, usd_per_hour: float, server_id: int | None, allow_any: bool
    ) -> None:
        """Warn about a bid above the server's on-demand price, and refuse one far above it.

        Does nothing if that price is not known.

        Parameters:
            name: the name of the argument, for the error.
            usd_per_hour: the bid.
            server_id: the server.
            allow_any: whether to allow any bid.

        Raises:
            ValueError: the bid is more than ten times the on-demand price.
        """
        listed = None if server_id is None else self.listed.get(server_id)
        if listed is None or usd_per_hour <= listed * (1 + ROUNDING):
            return
        highest = MAX_TIMES_ON_DEMAND * listed
        if usd_per_hour > highest * (1 + ROUNDING) and not allow_any:
            raise ValueError(
                f"{name} must be at most {highest:g} USD per hour, {MAX_TIMES_ON_DEMAND:g} times "
                f"the on-demand price of server {server_id} ({listed:g}), not {usd_per_hour!r}: "
                "give the price per hour and not per day, or pass allow_above_on_demand=True"
            )
        logger.warning(
            "%s=%r USD per hour is above the on-demand price of server %s, %g USD per hour",
            name, usd_per_hour, server_id, listed,
        )  # fmt: skip


class Market:
    """Read the marketplace of a client's API, and convert bids."""

    def __init__(self, client: Requester) -> None:
        self._client = client
        self._by_url: dict[str, MarketData] = {}  # by base URL, which can change
        self._fees: dict[tuple[str, str], dict[str, Any]] = {}  # by base URL and key

    @property
    def data(self) -> MarketData:
        """The market data of the current base URL."""
        return self._by_url.setdefault(self._client.base_url, MarketData())

    def read(self) -> Marketplace:
        """Read the list of servers."""
        marketplace = Marketplace(self._client._read_marketplace())
        data = self.data
        data.observe(marketplace.live)
        data.listed = marketplace.prices
        data.rates.update(marketplace.rates, display_only=True)
        return marketplace

    def listing(self, max_age: float) -> Marketplace:
        """Return the list of servers, which may have been read up to ``max_age`` seconds ago."""
        data = self.data
        if data.kept is not None and time.monotonic() - data.kept[1] <= max_age:
            return data.kept[0]
        marketplace = self.read()
        if max_age > 0:
            data.kept = (marketplace, time.monotonic())
        return marketplace

    def read_spot(self, server_id: int) -> dict[str, Any]:
        """Read the spot market of a server."""
        query = {"market": server_id}
        response = self._client._request("GET", "/v1/spot_marketplace", params=query)
        self.data.observe_spot(response)
        return response

    def find_server(self, server_id: int) -> Server | None:
        """Return a server, rented or not, or None if it is not listed."""
        marketplace = self.read()
        places = (n for n, number in enumerate(marketplace.ids) if number == server_id)
        return next(map(marketplace.__getitem__, places), None)

    def get_server(self, server_id: int) -> Server:
        """Return a server, rented or not.

        Raises:
            CloreError: the marketplace does not list it.
        """
        server = self.find_server(server_id)
        if server is None:
            raise CloreError(f"server {server_id} is not on the marketplace: choose another")
        return server

    def learn_rates(self, server_id: int | None) -> None:
        """Try to read the exchange rates for display, at most once in five minutes.

        Parameters:
            server_id: a server whose spot market has them; None reads the list of servers.
        """
        data = self.data
        if time.monotonic() - data.rates_tried_at <= RATE_MAX_AGE:
            return
        now = data.rates_tried_at = time.monotonic()
        try:
            limited(
                lambda: self.read() if server_id is None else self.read_spot(server_id),
                deadline=now + RATES_PATIENCE,
            )
        except Exception as error:  # prices in USD are extra: they must not break another call
            logger.debug("the exchange rates can't be read: %s", error)

    def fees(self) -> dict[str, Any]:
        """Return the response with the account's fees, which is read once; empty without a key."""
        key = self._client.api_key
        if not key:
            return {}
        account = (self._client.base_url, key)
        if account not in self._fees:
            try:
                self._fees[account] = self._client._request("GET", "/v1/renter_fees")
            except CloreError as error:
                logger.debug("the account's fees can't be read: %s", error)
                if error.retryable:
                    return {}
                self._fees[account] = {}
        return self._fees[account]

    def ensure_rates(self, server_id: int, currency: str) -> None:
        """Read the exchange rate for a bid, if it is not known or too old."""
        data = self.data
        if not data.documented and currency not in data.rates.fresh():
            self.read_spot(server_id)

    def wire_bid(
        self, name: str, usd_per_hour: float, server_id: int, currency: str, allow_above: bool
    ) -> float:
        """Check a bid, and return it in the unit of the API.

        That is ``currency`` per day in the live form, and USD per hour in the documented form.

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
        data = self.data
        data.check_bid_price(name, usd_per_hour, server_id, allow_above)
        self.ensure_rates(server_id, currency)
        if data.documented:
            logger.info("bid for server %d: %g USD per hour", server_id, usd_per_hour)
            return usd_per_hour
        rate = positive(data.rates.fresh().get(currency))
        if rate is None:
            raise RateUnknownError(
                f"the spot market of server {server_id} has no exchange rate for {currency}, so "
                "nothing was bid: try again later, or use another currency"
            )
        bid = bid_per_day(usd_per_hour, rate)
        logger.info(
            "bid for server %d: %g USD per hour = %.8g %s per day (1 %s = %g USD)",
            server_id, usd_per_hour, bid, currency, currency, rate,
        )  # fmt: skip
        return bid


# --- which hosts worked ---


class HostHistory:
    """Remember which servers worked, in memory and in the state folder.

    Parameters:
        folder: the state folder, or None if none is used.
        base_url: returns the base URL, because each API has its own servers.
    """

    def __init__(self, folder: Path | None, base_url: Callable[[], str]) -> None:
        self._path = folder and folder / HOST_HISTORY_FILE
        self._base_url = base_url
        self._here: dict[str, dict[str, Any]] = {}  # what this process has seen

    def record(self, server_id: int | None, outcome: str | None) -> None:
        """Record what happened on a host; nothing if one of the two is not known."""
        if not server_id or outcome is None:
            return
        name = f"{canonical_url(self._base_url())} {server_id}"
        self._here[name] = {"outcome": outcome, "time": time.time()}
        if self._path is None:
            return
        try:
            with locked_path(self._path, HISTORY_PATIENCE):
                hosts = {**self._read(), name: self._here[name]}
                replace_file(self._path, json.dumps({"hosts": hosts}))
        except OSError as error:
            logger.debug("%s can't be written: %s", self._path, error)

    def outcomes(self) -> dict[int, dict[str, Any]]:
        """Return ``outcome`` and ``time`` of each host of the last day, by server id."""
        hosts = [*self._here.items(), *self._read().items()]
        found: dict[int, dict[str, Any]] = {}
        for name, seen in sorted(hosts, key=lambda host: host[1]["time"]):  # the newest counts
            url, _, server_id = name.rpartition(" ")
            if url == canonical_url(self._base_url()) and server_id.isdecimal() and _is_fresh(seen):
                found[int(server_id)] = dict(seen)
        return found

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the valid entries of the file of the last day."""
        if self._path is None:
            return {}
        try:
            hosts = read_state_file(self._path).get("hosts")
        except (OSError, ValueError, RecursionError) as error:
            logger.debug("%s can't be read: %s", self._path, error)
            return {}
        return {n: s for n, s in hosts.items() if _is_fresh(s)} if isinstance(hosts, dict) else {}


def _is_fresh(seen: Any) -> bool:
    if not isinstance(seen, dict) or not isinstance(seen.get("outcome"), str):
        return False
    at = finite(seen.get("time"))
    return at is not None and abs(time.time() - at) < HISTORY_LASTS
