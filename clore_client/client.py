"""CloreClient, with one method for each task."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from clore_client.api.request import HTTPClient, limited
from clore_client.config import (
    CONFIG_FILE,
    DEFAULT_STATE_DIR,
    KEY_VARIABLE,
    require_key,
)
from clore_client.errors import (
    ERROR_CODES,
    SECRET_FIELDS,
    ConfigurationError,
    Secret,
    printable,
    secret_values,
)
from clore_client.market.market import HostHistory, Market
from clore_client.models.order import Order
from clore_client.models.record import to_wallets
from clore_client.models.server import Server
from clore_client.orders.account import AccountOrders
from clore_client.orders.bid import lower_spot_price, set_spot_price
from clore_client.orders.cancel import cancel_all, cancel_order, cancel_orders, confirm_ended
from clore_client.orders.create import Purchase
from clore_client.orders.credentials import Credentials
from clore_client.orders.funds import balance_of, hours_left, learn_order_rates, read_balances
from clore_client.orders.wait import wait_for_status
from clore_client.progress import ProgressOptions, Report
from clore_client.validation import (
    Timeout,
    check_bool,
    check_callback,
    check_count,
    check_currency,
    check_id,
    check_interval,
    check_number,
    check_optional_number,
    check_order_id,
    check_order_ids,
    check_string,
    check_text,
)

if TYPE_CHECKING:
    import paramiko
    from typing_extensions import Unpack

    from clore_client.api.redis_limit import RedisClient
    from clore_client.market.filters import SearchFilters, ServerFilters
    from clore_client.market.spot import SpotMarket
    from clore_client.market.summary import CostEstimate, ModelSummary
    from clore_client.models.listing import OrderList, ServerList, WalletList
    from clore_client.models.result import CommandResult, OutputLine, TransferResult
    from clore_client.rental.group import RentalGroup
    from clore_client.rental.recovery import Leftovers
    from clore_client.rental.rental import Rental
    from clore_client.rental.signals import SignalHandling
    from clore_client.ssh.access import SSHAccess
    from clore_client.ssh.jobs import Job
    from clore_client.ssh.tunnel import Forward

C = TypeVar("C", bound="CloreClient")
PathArgument = str | os.PathLike[str]
Progress = Callable[[str, int, int], object]
OrderArgument = Mapping[str, Any] | int  # a record of an order, or its number


class CloreClient(HTTPClient):
    """A client for the Clore.ai GPU marketplace.

    Records always have the documented form, for each form of the API: prices in USD per hour,
    reliability from 0 to 100, an ``order_id`` and a ``status`` for each order.

    Requests with the same key are at least ``rate_limit`` seconds apart, across all processes of
    this user on this machine, and orders at least ``create_order_interval`` seconds. With
    ``rate_limiter`` that holds across many machines. One request takes at most three times
    ``timeout``, even when its response arrives slowly.

    One call sends its request at most ``max_retries`` times. After a lost or broken response, only
    reads, ``cancel_order``, ``cancel_orders`` and ``set_spot_price`` are retried. Any other POST is
    retried only when it never left this machine, or when it hit the API's rate limit. The client
    waits between retries: an exponential backoff with full jitter. A request that hit the API's
    rate limit is retried for ``rate_limit_wait`` seconds instead, and slows the later ones down. If
    the API asks for a longer pause in ``Retry-After``, :class:`RateLimitError` is raised at once.
    Cancels, and the reads that confirm them, ignore that pause and wait 1, 2, 4 ... 30 seconds.

    Parameters:
        api_key: sent as the header ``auth``. With None or ``""``, the client takes the environment
            variable ``CLORE_API_KEY``, then ``~/.clore/config.json``. Without a key, only the
            marketplace can be read.
        timeout: seconds for one request, as a number or a ``(connect, read)`` pair.
        rate_limit: the smallest number of seconds between two requests with the same key. The API
            allows one request per second (seen on the live API).
        max_retries: how many times one request is sent at most, including the first; at least 1.
            Requests that hit the API's rate limit do not count.
        base_url: with None, the client takes the environment variable ``CLORE_BASE_URL``, then the
            class attribute ``BASE_URL``. A key is sent over https only, or to a loopback address.
        create_order_interval: seconds between two orders. The API allows one in five seconds (seen
            on the live API).
        backoff: the longest first backoff, in seconds; it doubles with each retry.
        max_backoff: the longest backoff, in seconds.
        user_agent: added to the User-Agent, for example ``"my-tool/1.0"``.
        max_usd_per_hour: refuse every order and bid above this price, before it is sent.
        max_active_orders: refuse a new order when this many are active.
        state_dir: the folder for the journal of :meth:`rent`, logins, host keys, the history of
            hosts, and the shared rate limit; None saves nothing.
        max_response_mb: the largest response in megabytes, decompressed; a larger one is an error.
        order_lag: seconds by which the order lists may lag behind a change (up to 20, seen on the
            live API). An order that is in no list counts as ended only after that time.
        rate_limit_wait: seconds for which a request that hit the API's rate limit is retried.
        rate_limiter: shares the rate limit with other machines: a URL such as
            ``"redis://host:6379/0"``, or a client such as ``redis.Redis``. With None, the client
            takes the environment variable ``CLORE_RATE_LIMITER``. While Redis fails, the rate limit
            is shared on this machine only.
        remember_credentials: save the password, the Jupyter token and the fingerprint of the key
            that were sent with an order in ``state_dir``, in a file for this user only, until the
            order has ended. Each process can then log in with the order's id. False keeps them
            in memory.

    Raises:
        ConfigurationError: a key, a base URL or a settings file can't be used.

    Example:
        >>> with CloreClient() as client:
        ...     server = client.find_cheapest("RTX 4090", 0.5, currency="CLORE")
        ...     order = client.create_order(server["id"])
        ...     order = client.wait_for_order(order["order_id"])
    """

    ERROR_CODES = ERROR_CODES

    def __init__(
        self,
        api_key: str | None = None,
        timeout: Timeout = 30,
        rate_limit: float = 1.1,
        max_retries: int = 3,
        *,
        base_url: str | None = None,
        create_order_interval: float = 5.0,
        backoff: float = 0.5,
        max_backoff: float = 30.0,
        user_agent: str | None = None,
        max_usd_per_hour: float | None = None,
        max_active_orders: int | None = None,
        state_dir: str | os.PathLike[str] | None = DEFAULT_STATE_DIR,
        max_response_mb: float = 64.0,
        order_lag: float = 20.0,
        rate_limit_wait: float = 60.0,
        rate_limiter: str | RedisClient | None = None,
        remember_credentials: bool = True,
    ) -> None:
        # Error reporters show local variables.
        api_key, rate_limiter = Secret.of(api_key), Secret.of(rate_limiter)
        super().__init__(
            api_key, timeout, rate_limit, max_retries, base_url=base_url,
            create_order_interval=create_order_interval, backoff=backoff, max_backoff=max_backoff,
            user_agent=user_agent, max_response_mb=max_response_mb,
            rate_limit_wait=rate_limit_wait, state_dir=state_dir, rate_limiter=rate_limiter,
        )  # fmt: skip
        self.max_usd_per_hour = check_optional_number(
            "max_usd_per_hour", max_usd_per_hour, unit="USD per hour"
        )
        if max_active_orders is not None:
            check_count("max_active_orders", max_active_orders)
        self.max_active_orders = max_active_orders
        self.order_lag = check_interval("order_lag", order_lag)
        self._market = Market(self)
        remembered = check_bool("remember_credentials", remember_credentials)
        credentials = Credentials(lambda: self._state_folder if remembered else None)
        self._orders = AccountOrders(self, self._market, credentials)
        self._host_history = HostHistory(self._state_folder, lambda: self.base_url)
        self._ssh_access: SSHAccess | None = None  # made on first use, as it imports paramiko

    def __copy__(self: C) -> C:
        """Return another client with the same settings and key, and the same known orders."""
        twin = super().__copy__()
        twin._market = Market(twin)
        twin._orders = self._orders.shared_with(twin, twin._market)
        twin._ssh_access = None
        return twin

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        key = "a key" if self.api_key else "no key"
        return f"<{type(self).__name__} of {self.BASE_URL} with {key}>"

    @classmethod
    def from_env(cls: type[C], **options: Any) -> C:
        """Return a client with the key from the environment or the official tools' file.

        Parameters:
            **options: arguments of the client, except ``api_key``.

        Raises:
            ConfigurationError: no key was found, or it can't be used. The error names the places.

        Example:
            >>> client = CloreClient.from_env(timeout=10)
        """
        if "api_key" in options:
            raise TypeError("from_env() takes no api_key: pass it to the class itself")
        require_key()
        return cls(**options)

    def describe(self) -> str:
        """Return a text about the key, the base URL and the rate limit.

        It shows at most the last four characters of the key.

        Returns:
            Three lines: where the key and the base URL come from, and who shares the rate limit. If
            that is not what the settings ask for, it says for how long, and why.

        Example:
            >>> print(client.describe())
            a key that ends in '3f9a', from environment variable CLORE_API_KEY
            base URL https://api.clore.ai, from class attribute CloreClient.BASE_URL
            rate limit 1.1 s, shared among all processes on this machine, by /home/me/.local/...
        """
        key, url = self.api_key, self.BASE_URL
        if key:
            key_line = self._described_key(key)
        else:
            found = self._key_source[0]
            where = f"in {KEY_VARIABLE} or {CONFIG_FILE}" if key == found else "any more"
            key_line = f"no key {where}"
        url_found, url_source = self._url_source
        if url != url_found:
            own = "BASE_URL" in self.__dict__
            url_source = "attribute" if own else f"class attribute {type(self).__name__}.BASE_URL"
        try:
            level = self._limiter(self.base_url, key or "").level
        except ConfigurationError:
            level = "with nobody, as the base URL can't be used"
        return (
            f"{key_line}\nbase URL {printable(str(url), 200)}, from {url_source}\n"
            f"rate limit {self.rate_limit:g} s, shared {printable(level, 500)}"
        )

    # --- wallets ---

    def get_wallets(self) -> WalletList:
        """Return the wallets of the account.

        Returns:
            A :class:`WalletList` of :class:`Wallet`: ``name``, ``balance`` (in its currency, may be
            None), ``deposit_address``.

        Raises:
            CloreAPIError, CloreConnectionError: the request failed; see the README, "Errors".

        Example:
            >>> [wallet["name"] for wallet in client.get_wallets()]
            ['bitcoin', 'CLORE-Blockchain', 'USD-Blockchain']
        """
        from clore_client.models.listing import WalletList

        return WalletList(to_wallets(self._request("GET", "/v1/wallets")))

    def get_balance(self, currency: str = "CLORE-Blockchain") -> float:
        """Return the balance of one wallet, in its currency.

        Parameters:
            currency: part of the wallet's name, in any case, or ``BTC``, ``CLORE``, ``USD``.

        Returns:
            The balance of the first wallet that matches; 0.0 if it has no balance, or the account
            has no wallet for this currency.

        Raises:
            ValueError: it is neither a currency nor part of a wallet's name; the error has names.

        Example:
            >>> client.get_balance("USD")
            12.5
        """
        check_text("currency", currency)
        return balance_of(self.get_wallets(), currency)

    def get_balances(self) -> WalletList:
        """Return the wallets of the account, with their balances in USD.

        The exchange rates come from the marketplace, which is read if they are not known yet.

        Returns:
            A :class:`WalletList`, as from :meth:`get_wallets`; ``balance_usd`` is None if the API
            has no exchange rate.

        Example:
            >>> [(wallet.name, wallet.balance_usd) for wallet in client.get_balances()]
            [('bitcoin', 0.0), ('CLORE-Blockchain', 3.25), ('USD-Blockchain', 12.5)]
        """
        from clore_client.models.listing import WalletList

        return WalletList(read_balances(self._orders))

    def hours_left(
        self,
        server_or_order: Server | Order | int,
        *,
        currency: str = "CLORE-Blockchain",
    ) -> float | None:
        """Return for how many hours a wallet pays its orders, with the renter's fees.

        All active orders of the account that are paid from the same wallet count.

        Parameters:
            server_or_order: an active order or its id; or a :class:`Server` that would be rented
                on demand in addition.
            currency: the currency to pay a server with. An order has its own.

        Returns:
            Hours; ``inf`` if nothing is paid from the wallet; None if the price is not known.

        Raises:
            OrderNotFoundError: the account has no such active order.

        Example:
            >>> client.hours_left(order)
            41.7
        """
        return hours_left(self._orders, server_or_order, check_currency("currency", currency))

    # --- the marketplace ---

    def get_marketplace(self, include_rented: bool = False) -> ServerList:
        """Return the servers of the marketplace, in the API's order. Needs no key.

        Parameters:
            include_rented: include the servers that are rented now.

        Returns:
            A :class:`ServerList` of :class:`Server`: ``id``, ``gpu_array``, ``price`` (``usd`` in
            it is in USD per hour), ``reliability`` (0 to 100), ``rented``, ``specs``, ...

        Example:
            >>> len(client.get_marketplace())
            1873
        """
        from clore_client.models.listing import ServerList

        check_bool("include_rented", include_rented)
        return ServerList(self._market.read().servers(include_rented=include_rented))

    def find_servers(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
        *,
        cache_seconds: float = 0.0,
        **filters: Unpack[SearchFilters],
    ) -> ServerList:
        """Return the servers that can be rented now and fit all filters, the cheapest first.

        A server without the field that a filter needs is left out. Servers with the same price
        keep the API's order. A server without a price, or with one that is not above 0, comes last
        and never passes a price limit. The API adds fees to the prices: 5 % on demand, 1.25 % spot
        (seen on the live API).

        Parameters:
            gpu_type: a GPU's name or a part of it, in any spelling: ``"4090"``, ``"RTX4090"``,
                ``"NVIDIA GeForce RTX 4090"``. Whole words win: ``"A10"`` is not A100.
            max_price_usd: the highest price, in USD per hour.
            min_reliability: the lowest reliability, 0 to 100.
            use_spot: filter and sort by the lowest spot bid that the host accepts.
            cache_seconds: use a list of servers that was read at most so many seconds ago with
                this argument; 0 always reads it.
            gpu_count, min_gpu_count: the number of GPUs. In a mixed rig, only those that match
                ``gpu_type`` count.
            exact_gpu: accept only GPUs with the same name: not the Ti or SUPER.
            min_vram_gb, min_total_vram_gb: the memory in GB of one GPU, and of all that match, by
                the nominal size: an RTX 4090 has 24 GB, although the API says 23.
            min_ram_gb, min_cpu_cores, min_disk_gb: the memory in GB, the CPU cores, the disk in GB.
            min_disk_mbps: the speed of the disk, in MB per second.
            min_download_mbps, min_upload_mbps: the speed of the network, in Mbit per second.
            min_cuda: the lowest CUDA version, such as 12.4 or ``"12.4"``.
            min_pcie_width: the lowest number of PCI Express lanes.
            countries, exclude_countries: lists of two-letter codes, continents (``"Asia"``),
                ``"EU"`` and ``"EEA"``.
            currency: a currency that the host accepts, and whose price counts.
            min_rating, min_ratings: the average rating, 0 to 5, and the number of ratings.
            min_rental_hours: how long the server can be rented, in hours.
            exclude_servers, exclude_owners: lists of ids.
            max_price_per_gpu_usd: the highest price for one matching GPU, in USD per hour.
            include_fees: compare the price limits with prices that include the published fee.
            sort: ``"price"``, ``"price_per_gpu"``, ``"reliability"``, ``"vram"``, ``"download"``,
                ``"rating"``, or a function of a :class:`Server`, as for ``sorted()``.
            limit: return at most so many servers.
            where: a function that gets a :class:`Server`, and returns whether it fits.

        Returns:
            A :class:`ServerList`, which may be empty; its ``explain()`` says what was left out. If
            no GPU has the name, a warning in the log has the nearest names.

        Raises:
            ValueError, TypeError: an argument is not valid; nothing was sent.

        Example:
            >>> found = client.find_servers("RTX 4090", max_price_usd=0.5, min_gpu_count=2,
            ...                             countries=["EU"], min_ram_gb=60)
            >>> found[0].gpu_name, found[0].usd_per_gpu_hour
            ('RTX 4090', 0.125)
        """
        from clore_client.market.search import Search
        from clore_client.models.listing import ServerList

        search = Search(
            gpu_type, max_price_usd, min_reliability, use_spot, filters, method=self.find_servers
        )
        check_number("cache_seconds", cache_seconds, unit="seconds")
        found, report = search.run(self._market.listing(cache_seconds))
        servers = ServerList(found)
        servers.report = report
        return servers

    def find_cheapest(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
        *,
        cache_seconds: float = 0.0,
        **filters: Unpack[SearchFilters],
    ) -> Server | None:
        """Return the first server of :meth:`find_servers`, which takes the same parameters.

        Returns:
            A :class:`Server`, or None if no server fits.

        Example:
            >>> client.find_cheapest("RTX 4090").usd_per_hour
            0.125
        """
        servers = self.find_servers(
            gpu_type, max_price_usd, min_reliability, use_spot, cache_seconds=cache_seconds,
            **filters,
        )  # fmt: skip
        return servers[0] if servers else None

    def plot_prices(
        self, servers: Sequence[Server] | None = None, path: PathArgument | None = None
    ) -> Any:
        """Plot prices per GPU hour by model against the reliability. Needs matplotlib.

        The ten most frequent models have a color each. The prices have a log scale.

        Parameters:
            servers: the servers, for example from :meth:`find_servers`; None takes all that can be
                rented now.
            path: a picture to write, a ``.png``, ``.svg`` or ``.pdf``; with None, a notebook shows
                the plot, and a script needs ``matplotlib.pyplot.show()``.

        Returns:
            The ``matplotlib.axes.Axes``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError, TypeError: an argument is not valid, or no server has a price and a
                reliability.

        Example:
            >>> client.plot_prices(client.find_servers("RTX"), "prices.png")
        """
        from clore_client.models.listing import check_plot, plot_server_prices

        check_plot(servers, path)
        return plot_server_prices(self.get_marketplace() if servers is None else servers, path)

    def gpu_models(self, *, cache_seconds: float = 0.0) -> list[str]:
        """Return the names of all GPU models on the marketplace, rented ones too. Needs no key.

        Parameters:
            cache_seconds: as for :meth:`find_servers`.

        Returns:
            A sorted list; a model that hosts spell in several ways is in it once.

        Example:
            >>> client.gpu_models()[:3]
            ['A100', 'GTX 1080', 'GTX 1080 Ti']
        """
        from clore_client.market.summary import summarize

        check_number("cache_seconds", cache_seconds, unit="seconds")
        summaries = summarize(self._market.listing(cache_seconds))
        return sorted((summary.gpu for summary in summaries), key=str.lower)

    def market_summary(
        self,
        *,
        include_rented: bool = False,
        include_fees: bool = False,
        cache_seconds: float = 0.0,
    ) -> list[ModelSummary]:
        """Return counts and prices for each GPU model on the marketplace. Needs no key.

        A mixed rig counts for each of its models, but not for the prices.

        Parameters:
            include_rented: take the prices of rented servers too, and not only of free ones.
            include_fees: add the published fees to the prices.
            cache_seconds: as for :meth:`find_servers`.

        Returns:
            A list of :class:`ModelSummary`, the model with the most GPUs first: ``gpu``,
            ``servers``, ``servers_free``, ``gpus``, ``gpus_free``; and in USD per hour for one GPU
            ``lowest_usd``, ``median_usd``, ``p90_usd`` (on demand), ``spot_lowest_usd``,
            ``spot_median_usd``, ``spot_p90_usd`` (None without a price). ``pandas.DataFrame()``
            takes the list.

        Example:
            >>> summary = client.market_summary()[0]
            >>> summary.gpu, summary.gpus_free, summary.median_usd
            ('RTX 4090', 412, 0.219)
        """
        from clore_client.market.summary import summarize

        check_bool("include_rented", include_rented)
        check_bool("include_fees", include_fees)
        check_number("cache_seconds", cache_seconds, unit="seconds")
        listing = self._market.listing(cache_seconds)
        return summarize(listing, include_rented=include_rented, include_fees=include_fees)

    def estimate_cost(
        self,
        server: Server | int,
        hours: float,
        *,
        currency: str = "CLORE-Blockchain",
        use_spot: bool = False,
        spot_price: float | None = None,
    ) -> CostEstimate:
        """Estimate the cost of a rental, with all fees.

        The fees of the account are read once. Without a key, the published fees are used: 5 % on
        demand, 1.25 % spot, and 0.10 USD after ten minutes.

        Parameters:
            server: a server or its id; with an id, the marketplace is read.
            hours: the length of the rental.
            currency: the currency to pay with.
            use_spot: estimate a spot order, at the lowest bid that the host accepts.
            spot_price: the bid for ``use_spot``, in USD per hour.

        Returns:
            A :class:`CostEstimate`: ``usd_per_hour``, ``base_usd``, ``renter_fee_usd``,
            ``creation_fee_usd``, ``total_usd``, and the same in ``currency`` as ``base``,
            ``renter_fee``, ``creation_fee``, ``total``. An amount is None if the API has no
            price or exchange rate.

        Raises:
            CloreError: the marketplace has no server with this id.

        Example:
            >>> client.estimate_cost(server, 24).total_usd
            3.25
        """
        from clore_client.market.summary import estimate

        number = None if isinstance(server, Server) else check_id("server", server)
        check_number("hours", hours, unit="hours")
        wanted = check_currency("currency", currency)
        check_bool("use_spot", use_spot)
        if spot_price is not None:
            check_number("spot_price", spot_price, above=True, unit="USD per hour")
            if not use_spot:
                raise ValueError(f"spot_price={spot_price!r} needs use_spot=True: add that")
        listed = server if isinstance(server, Server) else self._market.get_server(number or 0)
        return estimate(
            self._market, listed, hours, currency=wanted, spot=use_spot, spot_price=spot_price
        )

    # --- orders ---

    def get_orders(self, include_completed: bool = False) -> OrderList:
        """Return the orders of the account.

        Parameters:
            include_completed: include the orders that have ended.

        Returns:
            An :class:`OrderList` of :class:`Order`: ``order_id``, ``renting_server``, ``status``,
            ``connection``, ``price`` (per hour, in the order's currency), ``started``, ...; also
            ``ssh_password`` and ``jupyter_token``, where this client knows them.

        Example:
            >>> [(order.id, order.status) for order in client.get_orders()]
            [(1958009, 'running')]
        """
        from clore_client.models.listing import OrderList

        orders, _ = self._orders.read(check_bool("include_completed", include_completed))
        learn_order_rates(self._orders, orders)
        listed = (o for o in orders if include_completed or not o.has_ended)
        return OrderList(self._orders.with_login(order) for order in listed)

    def get_order(self, order_id: OrderArgument) -> Order | None:
        """Return one order, active or ended.

        The list of ended orders can be long, so it is read only if the order is not active.

        Parameters:
            order_id: the order or its number.

        Returns:
            An :class:`Order`, or None if the lists do not have it. A new order can take up to 20
            seconds to show up (seen on the live API).

        Example:
            >>> client.get_order(1958009).ssh_command
            'ssh root@n1.us.clorecloud.net -p 2060'
        """
        order = self._orders.find(check_order_id("order_id", order_id))
        if order is None:
            return None
        learn_order_rates(self._orders, [order])
        return self._orders.with_login(order)

    def create_order(
        self,
        server_id: int,
        image: str = "nvidia/cuda:12.1.0-base-ubuntu22.04",
        order_type: str = "on-demand",
        currency: str = "CLORE-Blockchain",
        ports: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        ssh_password: str | None = None,
        ssh_key: str | None = None,
        spot_price: float | None = None,
        jupyter_token: str | None = None,
        *,
        find_timeout: float = 30.0,
        allow_above_on_demand: bool = False,
        preview: bool = False,
    ) -> Order:
        """Rent a server. It costs money from now on, until :meth:`cancel_order`.

        The request is sent once, and again only if it cannot have had an effect. The live API
        returns no order id, and a response can be lost; the client then finds the order in the
        list of orders.

        Parameters:
            server_id: the ``id`` of a server.
            image: a Docker image.
            order_type: ``"on-demand"`` or ``"spot"``.
            currency: the currency to pay with: the API's name, or ``BTC``, ``CLORE``, ``USD``.
            ports: container port -> ``"tcp"`` or ``"http"``; default ``{"22": "tcp"}``.
            env: environment variables; default ``{"NVIDIA_VISIBLE_DEVICES": "all"}``.
            ssh_password: at most 32 characters. Without it and without ``ssh_key``, the client
                generates a password and returns it as ``ssh_password`` of the order.
            ssh_key: a public key, the content of a ``.pub`` file; at most 3072 characters.
            spot_price: the bid for ``order_type="spot"``, in **USD per hour**.
            jupyter_token: at most 32 characters.
            find_timeout: seconds to wait for the order to show up.
            allow_above_on_demand: send a bid of more than ten times the server's on-demand price.
            preview: send no order, and return what would be sent: an :class:`Order` with only
                ``body`` and ``usd_per_hour`` (the listed price or the bid; None if unknown).

        Returns:
            An :class:`Order` that also has ``code`` (0).

        Raises:
            OrderOutcomeUnknownError: the order may or may not exist, or several orders match.
                Check :meth:`get_orders` before you order again. ``credentials`` has the
                password, key and token that were sent.
            ServerAlreadyRentedError, ServerOfflineError, InsufficientBalanceError,
            BidTooLowError, CurrencyNotAllowedError, DatabaseError: the API refused the order.
            InvalidInputError: there is no such server, or the API found an argument invalid.
            SpendingLimitError: a limit of the client does not allow it; no order was sent.
            RateUnknownError: the bid could not be converted; no order was sent.
            ValueError, TypeError: an argument is not valid; no order was sent.

        Example:
            >>> order = client.create_order(99173, currency="USD")
            >>> order["order_id"], order["ssh_password"]
            (1958009, 'q1nE0rNN7mBdmKyUHyKzXgLa')
        """
        ssh_password, jupyter_token = Secret.of(ssh_password), Secret.of(jupyter_token)
        env = secret_values(env)
        order = {
            "image": image, "order_type": order_type, "currency": currency, "ports": ports,
            "env": env, "ssh_password": ssh_password, "ssh_key": ssh_key,
            "jupyter_token": jupyter_token,
        }  # fmt: skip
        purchase = Purchase(self._orders, server_id, order)
        check_number("find_timeout", find_timeout, unit="seconds")
        check_bool("allow_above_on_demand", allow_above_on_demand)
        check_bool("preview", preview)
        purchase.set_bid(spot_price, allow_above_on_demand)
        if preview:
            return purchase.preview()
        purchase.learn_rate()
        return purchase.place(find_timeout)

    def cancel_order(
        self,
        order_id: OrderArgument,
        issue: str | None = None,
        *,
        confirm: bool = False,
        confirm_timeout: float = 60.0,
        settle_timeout: float | None = None,
    ) -> bool:
        """Cancel an order, so that it costs nothing from now on. Safe to repeat.

        If the API refuses, or the response is lost, the client checks the order lists and sends the
        cancel again. An order that is missing from the lists only for a moment has not ended.

        Parameters:
            order_id: the order or its number.
            issue: a report of what was wrong with the server; cut at 2048 characters.
            confirm: wait until the order is listed as ended, or missing from all lists for
                ``order_lag`` seconds.
            confirm_timeout: seconds to wait for that.
            settle_timeout: seconds to keep trying after a refusal or a lost response (default 30);
                0 checks the lists once.

        Returns:
            True, also if the order had already ended.

        Raises:
            OrderNotFoundError: the account has no such order.
            CancelUnconfirmedError: the order may still be running; ``order_ids`` has its number.
            CloreError: the request was not sent, or the API refused the key or the rate. The order
                may still be running.

        Example:
            >>> client.cancel_order(1958009)
            True
        """
        wanted = check_order_id("order_id", order_id)
        check_bool("confirm", confirm)
        check_number("confirm_timeout", confirm_timeout, infinite=True, unit="seconds")
        check_optional_number("settle_timeout", settle_timeout, unit="seconds")
        if issue is not None:
            check_string("issue", issue)
        cancellation = limited(
            lambda: cancel_order(self._orders, wanted, issue, settle_timeout), urgent=True
        )
        if confirm:
            confirm_ended([cancellation], confirm_timeout)
        return True

    def cancel_all(self, *, confirm: bool = True, confirm_timeout: float = 60.0) -> list[int]:
        """Cancel every active order of the account, also those of other programs.

        Parameters:
            confirm: wait until the orders have ended, as in :meth:`cancel_order`.
            confirm_timeout: seconds to wait for that.

        Returns:
            The ids of the orders that were active.

        Raises:
            CancelUnconfirmedError: some orders may still be running; ``order_ids`` has them.

        Example:
            >>> client.cancel_all()
            [1958009, 1958010]
        """
        check_bool("confirm", confirm)
        check_number("confirm_timeout", confirm_timeout, infinite=True, unit="seconds")
        return limited(lambda: cancel_all(self._orders, confirm, confirm_timeout), urgent=True)

    def cancel_orders(self, order_ids: Iterable[OrderArgument]) -> dict[str, Any]:
        """Cancel several orders, with one API call for each 64 orders.

        Parameters:
            order_ids: the orders or their numbers; if empty, nothing is sent.

        Returns:
            The API's response as a dict, with the ids that failed in ``failed_to_cancel``.

        Example:
            >>> client.cancel_orders([1958009, 1958010])["failed_to_cancel"]
            []
        """
        return cancel_orders(self._orders, check_order_ids("order_ids", order_ids))

    def wait_for_order(
        self,
        order_id: OrderArgument,
        timeout: float = 300,
        poll_interval: float = 5.0,
        target_status: str = "running",
        *,
        on_update: Callable[[Order | None], object] | None = None,
        on_progress: Report | None = None,
        progress: bool = False,
    ) -> Order:
        """Wait until an order has a status.

        A new order shows up after 2 to 20 seconds and usually runs after 30 to 120 (seen on the
        live API). A poll that fails is repeated. The order is not cancelled after a timeout: it may
        still be running, and cost money.

        Parameters:
            order_id: the order or its number.
            timeout: seconds to wait; ``float("inf")`` waits forever.
            poll_interval: seconds between two polls.
            target_status: ``"running"``, ``"creating"``, ``"cancelled"`` or ``"expired"``; the
                last two count as the same.
            on_update: called after each poll with the :class:`Order`, or None while it is in no
                list. An exception that it raises ends the wait.
            on_progress: called with a :class:`ProgressEvent` at each step: it has a ``name``, a
                ``number``, and a ``text`` for people.
            progress: show these events in a terminal or notebook: with tqdm if it is installed,
                else as lines on stderr. In a pipe, nothing is shown.

        Returns:
            The :class:`Order` with that status.

        Raises:
            OrderEndedError: the order ended before it had the status.
            UnknownOrderError: the account has no such order, so the client does not wait; also an
                ``OrderNotFoundError`` and a ``WaitTimeoutError``. An order that was made elsewhere
                seconds ago may not be listed yet.
            WaitTimeoutError: it did not have the status in time; also a ``TimeoutError``.
                ``reason`` says if it never showed up or is still creating.

        Example:
            >>> client.wait_for_order(1958009, timeout=120).ssh_command
            'ssh root@n1.us.clorecloud.net -p 2060'
        """
        wanted = check_order_id("order_id", order_id)
        check_number("timeout", timeout, infinite=True, unit="seconds")
        check_interval("poll_interval", poll_interval)
        check_text("target_status", target_status)
        check_callback("on_update", on_update, 1)
        with ProgressOptions(on_progress, progress).reporting() as report:
            order = wait_for_status(
                self._orders, wanted, timeout, poll_interval, target_status, on_update, report
            )
        learn_order_rates(self._orders, [order])
        return self._orders.with_login(order)

    # --- rentals ---

    def rent(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
        *,
        server_id: int | None = None,
        image: str = "nvidia/cuda:12.1.0-base-ubuntu22.04",
        currency: str = "CLORE-Blockchain",
        ports: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        ssh_password: str | None = None,
        ssh_key: str | None = None,
        spot_price: float | None = None,
        jupyter_token: str | None = None,
        attempts: int = 5,
        deploy_timeout: float = 300.0,
        poll_interval: float = 5.0,
        find_timeout: float = 30.0,
        cancel_timeout: float = 300.0,
        max_hours: float | None = None,
        max_cost_usd: float | None = None,
        prefer_known: bool = False,
        on_progress: Report | None = None,
        progress: bool = False,
        **filters: Unpack[ServerFilters],
    ) -> Rental:
        """Rent a server for the length of a ``with`` block, and cancel the order at its end.

        The client orders the cheapest server that fits, and waits until it runs. It tries the next
        server if one has just been rented, is offline, does not accept the currency, or is refused
        with code 1. It also tries the next one if an order costs more than the limit or does not
        run in time; it first confirms that this order has ended.

        The order is cancelled, and its end confirmed, when the block ends in any way: also by
        Ctrl-C, SIGTERM, SIGHUP or the exit of the interpreter. A second Ctrl-C skips the
        confirmation. Three within two seconds stop the cancelling too. After a killed process,
        :meth:`leftovers` finds the orders that still run.

        A worker thread orders, cancels and confirms, because signals do not interrupt it. After
        code 1, an order may still exist: the worker looks for it, and cancels it.

        The worker also checks ``max_hours`` and ``max_cost_usd``: it cancels the order and closes
        the rental's SSH connections. It does not interrupt other code in the block, and it can do
        nothing while the process is dead or this machine is asleep.

        Parameters:
            gpu_type, min_reliability, use_spot: as for :meth:`find_servers`.
            max_price_usd: the highest price in USD per hour when paid in ``currency``; without
                fees, unless ``include_fees=True``.
            **filters: all other filters of :meth:`find_servers`: ``gpu_count``, ``countries``,
                ``where``, ... With ``sort``, the servers are tried in that order.
            server_id: try only this server.
            image, currency, ports, env, ssh_password, ssh_key, jupyter_token, find_timeout: as for
                :meth:`create_order`.
            spot_price: the bid for ``use_spot``, in USD per hour; default the lowest that the host
                accepts.
            attempts: how many servers to try at most.
            deploy_timeout: seconds to wait until an order runs.
            poll_interval: seconds between two polls.
            cancel_timeout: seconds to keep sending the cancel, independent of ``max_retries``, and
                at most as many seconds to confirm the end.
            max_hours: hours after which the rental ends.
            max_cost_usd: cost in USD, with fees, at which the rental ends.
            prefer_known: try the hosts first that worked in the last day. Those that did not
                deploy, had no sshd, or refused the login always come last; see
                :meth:`host_history`.
            on_progress, progress: as for :meth:`wait_for_order`.

        Returns:
            A :class:`Rental`, which orders when its block begins: ``order``, ``server``,
            ``status``, ``cost_usd``, ``ssh()``, ``run()``, ``forward()``, ``keep()``, ``cancel()``.
            Without a block, in a notebook, ``start()`` begins it and ``close()`` ends it.

        Raises:
            RentalError: no server worked; ``tried`` has the reason for each. If no server fits the
                filters, the text has the filter that left out the last ones, and their lowest
                price.
            CancelUnconfirmedError: an order may still be running.
            OrderOutcomeUnknownError: an order may or may not exist.
            BudgetExceededError: a limit is reached; raised by calls of the rental and at the end
                of the block.

        Example:
            >>> with client.rent("RTX 4090", max_price_usd=0.40, max_hours=2) as rental:
            ...     print(rental.run("nvidia-smi -L").stdout)
        """
        from clore_client.market.search import Search
        from clore_client.rental.rental import Rental
        from clore_client.rental.selection import RentalSettings

        ssh_password, jupyter_token = Secret.of(ssh_password), Secret.of(jupyter_token)
        env = secret_values(env)
        order = {
            "image": image, "currency": currency, "ports": ports, "env": env,
            "ssh_password": ssh_password, "ssh_key": ssh_key, "jupyter_token": jupyter_token,
        }  # fmt: skip
        settings = RentalSettings(
            search=Search(
                gpu_type, max_price_usd, min_reliability, use_spot, filters, currency, self.rent
            ),
            server_id=server_id, order=order, spot_price=spot_price, attempts=attempts,
            deploy_timeout=deploy_timeout, poll_interval=poll_interval, find_timeout=find_timeout,
            cancel_timeout=cancel_timeout, max_hours=max_hours, max_cost_usd=max_cost_usd,
            prefer_known=prefer_known,
        )  # fmt: skip
        shown = ProgressOptions(on_progress, progress)
        return Rental(self, self._orders, settings, self._state_folder, self._host_history, shown)

    def rent_many(
        self, count: int, *filters: Any, min_count: int | None = None, **options: Any
    ) -> RentalGroup:
        """Rent several servers for the length of a ``with`` block, and cancel all at its end.

        They deploy at the same time, each on a server of its own; the API allows one order in five
        seconds. If fewer than ``min_count`` run, all are cancelled. All rentals end together, each
        one in the same way as that of :meth:`rent`.

        Parameters:
            count: the number of servers.
            *filters, **options: as for :meth:`rent`; ``attempts``, ``max_hours`` and
                ``max_cost_usd`` count for each rental. ``on_progress`` is called in the threads of
                the rentals, one call at a time; the text of each event names the server or the
                order. An exception that it raises ends all rentals, and is raised.
            min_count: how many must run; default all.

        Returns:
            A :class:`RentalGroup`, a sequence of :class:`Rental` with ``run()``, ``map()`` and
            ``cost_usd``.

        Raises:
            RentalError: too few servers worked; none is rented.

        Example:
            >>> with client.rent_many(3, "RTX 4090", max_price_usd=0.40) as rentals:
            ...     for result in rentals.run("nvidia-smi -L"):
            ...         print(result.stdout)
        """
        from clore_client.rental.group import RentalGroup

        check_count("count", count, minimum=1, maximum=64)
        least = count if min_count is None else min_count
        check_count("min_count", least, minimum=1, maximum=count)
        if options.get("server_id") is not None:
            raise TypeError("rent_many() takes no server_id, because it rents several servers")
        options = {k: secret_values(Secret.of(v)) if k in SECRET_FIELDS else v
                   for k, v in options.items()}  # fmt: skip
        # All rentals share the rate limit, and the orders should not wait for the polls.
        options.setdefault("poll_interval", max(5.0, 2.0 * count))
        rentals = [self.rent(*filters, **options) for _ in range(count)]
        return RentalGroup(rentals, least)

    def attach(
        self,
        order: OrderArgument,
        *,
        end: bool = False,
        max_hours: float | None = None,
        max_cost_usd: float | None = None,
        cancel_timeout: float = 300.0,
    ) -> Rental:
        """Return a rental for an order that already exists; any process may have made it.

        Without ``end``, it can be used with and without a block, and never ends the order. With
        ``end``, it begins with its block or ``start()``, and ends the order as :meth:`rent` does.

        Parameters:
            order: the order or its number.
            end: whether the end of the block ends the order.
            max_hours, max_cost_usd, cancel_timeout: as for :meth:`rent`, with ``end`` only. They
                count from the start of the order.

        Returns:
            A :class:`Rental`.

        Raises:
            OrderEndedError, OrderNotFoundError: the order has ended, or does not exist.

        Example:
            1958009).run("nvidia-smi -L").stdout
            'GPU 0: NVIDIA GeForce RTX 4090'
        """
        from clore_client.rental.rental import AttachedRental
        from clore_client.rental.selection import RentalSettings

        wanted = check_order_id("order", order)
        if not check_bool("end", end) and (max_hours is not None or max_cost_usd is not None):
            raise ValueError(
                "max_hours and max_cost_usd need end=True: add that, or leave them out"
            )
        running = self._orders.with_login(self._orders.running(wanted))
        settings = RentalSettings.of_order(
            running, max_hours=max_hours, max_cost_usd=max_cost_usd, cancel_timeout=cancel_timeout
        )
        return AttachedRental(
            self, self._orders, settings, self._state_folder, self._host_history, running, end
        )

    def host_history(self) -> list[dict[str, Any]]:
        """Return what happened on the hosts that :meth:`rent` tried in the last day.

        Returns:
            A list of dicts, the newest first: ``server_id``, ``outcome`` (``"worked"``, ``"not
            deployed"``, ``"no sshd"`` or ``"login refused"``) and ``time`` (Unix time).

        Example:
            >>> client.host_history()
            [{'server_id': 99173, 'outcome': 'worked', 'time': 1784203200.5}]
        """
        seen = self._host_history.outcomes()
        hosts = [{"server_id": server_id, **host} for server_id, host in seen.items()]
        return sorted(hosts, key=lambda host: -host["time"])

    def leftovers(self, *, wait: float = 30.0) -> Leftovers:
        """Find the orders that rentals of dead processes left running on this account.

        Parameters:
            wait: seconds to wait for an order that was just sent and may not be listed yet.

        Returns:
            :class:`Leftovers`: ``abandoned`` (orders of this machine), ``elsewhere`` (orders of
            other machines), ``kept`` (orders of this machine that stayed with ``keep()``) and
            ``unrecorded`` (active orders that are not in the journal).

        Example:
            >>> client.leftovers().abandoned
            [<Leftover order 1958009 of server 99173, by process 4711 on 'desk'>]
        """
        from clore_client.rental.recovery import find_leftovers

        check_number("wait", wait, unit="seconds")
        folder = self._state_folder
        return limited(lambda: find_leftovers(self._orders, folder, wait), urgent=True)

    def cancel_leftovers(self, *, wait: float = 30.0, cancel_timeout: float = 300.0) -> list[int]:
        """Cancel the orders that :meth:`leftovers` lists as ``abandoned``, and no others.

        Parameters:
            wait: as for :meth:`leftovers`.
            cancel_timeout: seconds to keep sending each cancel.

        Returns:
            The ids of the orders, which are confirmed to have ended.

        Raises:
            CancelUnconfirmedError: some orders may still be running; ``order_ids`` has them.

        Example:
            >>> client.cancel_leftovers()
            [1958009]
        """
        from clore_client.rental.recovery import end_leftovers

        check_number("wait", wait, unit="seconds")
        check_number("cancel_timeout", cancel_timeout, infinite=True, unit="seconds")
        folder = self._state_folder
        return limited(
            lambda: end_leftovers(self._orders, folder, wait, cancel_timeout), urgent=True
        )

    def cancel_overdue(self, *, cancel_timeout: float = 300.0) -> list[int]:
        """Cancel the orders of this machine that were kept, and are past their deadline.

        Call it from cron, for orders that ``rental.keep(max_hours=...)`` left running.

        Parameters:
            cancel_timeout: seconds to keep sending each cancel.

        Returns:
            The ids of the orders, which are confirmed to have ended.

        Raises:
            CancelUnconfirmedError: some orders may still be running; ``order_ids`` has them.

        Example:
            >>> client.cancel_overdue()
            [1958009]
        """
        from clore_client.rental.recovery import end_overdue

        check_number("cancel_timeout", cancel_timeout, infinite=True, unit="seconds")
        folder = self._state_folder
        return limited(lambda: end_overdue(self._orders, folder, cancel_timeout), urgent=True)

    @staticmethod
    def handle_signals() -> SignalHandling:
        """Let SIGTERM and SIGHUP end the rentals of all threads. Call it in the main thread.

        The signals then raise :class:`SignalExit`, a ``SystemExit``, in the main thread. The first
        rental that begins in the main thread does the same, without this call. A signal that
        already has a handler, or is ignored, stays as it is.

        Returns:
            A context manager; its end, or ``close()``, restores the former handlers.

        Example:
            >>> with client.handle_signals():
            ...     work_with_threads()
        """
        from clore_client.rental.signals import SignalHandling

        return SignalHandling()

    # --- the spot market ---

    def get_spot_market(self, server_id: int) -> SpotMarket:
        """Return the offers for a server on the spot market.

        Parameters:
            server_id: the ``id`` of a server.

        Returns:
            The API's response as a :class:`SpotMarket`, a dict with ``market``. Each of its
            ``offers`` also has ``usd_per_hour`` (None if there is no exchange rate). Its ``bid`` is
            per day, in its ``currency`` (seen on the live API). Properties: ``offers``,
            ``lowest_winning_usd`` and ``minimum_usd``, both in USD per hour.

        Example:
            >>> market = client.get_spot_market(99173)
            >>> market.offers[0].usd_per_hour, market.lowest_winning_usd
            (0.09016, 0.09016)
        """
        from clore_client.market.spot import to_spot_market

        return to_spot_market(self._market.read_spot(check_id("server_id", server_id)))

    def suggest_spot_price(self, server: Server | int, margin: float = 0.05) -> float | None:
        """Return a bid that would rent a server now, in USD per hour.

        It is above the highest bid of others, or else above the lowest bid that the host accepts.
        It is at most the on-demand price, if the other bids are below that and ``server`` has it.

        Parameters:
            server: a server or its id.
            margin: how much to add, as a fraction of the bid; 0.05 is 5 %.

        Returns:
            The bid for ``spot_price`` of :meth:`create_order`; None if the API lists no bid.

        Example:
            >>> bid = client.suggest_spot_price(server)
            >>> order = client.create_order(server.id, order_type="spot", spot_price=bid)
        """
        from clore_client.market.spot import suggested_bid

        number = check_id("server", server.id if isinstance(server, Server) else server)
        check_number("margin", margin)
        market = self.get_spot_market(number)
        if market.minimum_usd is None and not isinstance(server, Server):
            server = self._market.find_server(number) or server
        return suggested_bid(market, server, margin)

    def set_spot_price(
        self, order_id: OrderArgument, new_price: float, *, allow_above_on_demand: bool = False
    ) -> bool:
        """Change the bid of a spot order.

        The live API lets you lower a bid once in 600 seconds, by a limited step.

        Parameters:
            order_id: the order or its number.
            new_price: the new bid, in **USD per hour**.
            allow_above_on_demand: send a bid of more than ten times the server's on-demand price.

        Returns:
            True if the response has no ``error``.

        Raises:
            OrderNotFoundError: the account has no such order; no bid was sent.
            SpotPriceTooSoonError: the bid was lowered too soon; ``retry_after`` has the seconds to
                wait.
            SpotPriceStepError: the bid was lowered by too much; ``max_step`` has the largest step,
                in the order's currency per day.
            BidTooLowError: the bid is lower than the host accepts.
            RateUnknownError: the bid could not be converted; no bid was sent.

        Example:
            >>> client.set_spot_price(1958009, 0.08)
            True
        """
        wanted = check_order_id("order_id", order_id)
        check_number("new_price", new_price, above=True, unit="USD per hour")
        check_bool("allow_above_on_demand", allow_above_on_demand)
        return set_spot_price(self._orders, wanted, new_price, allow_above_on_demand)

    def lower_spot_price(self, order: OrderArgument, target: float, wait: bool = True) -> float:
        """Lower the bid of a spot order to a target, in as many steps as the API asks for.

        The live API lets you lower a bid once in 600 seconds, by a limited step.

        Parameters:
            order: the order or its id.
            target: the bid to reach, in **USD per hour**. A bid that is lower already stays.
            wait: wait between the steps; if False, take one step.

        Returns:
            The bid that was reached, in USD per hour.

        Raises:
            SpotPriceTooSoonError: with ``wait=False``, the bid was lowered too soon before.
            BidTooLowError: the target is lower than the host accepts.
            RateUnknownError: the current bid is not known in USD; no bid was sent.
            OrderEndedError, OrderNotFoundError: there is no such active order.

        Example:
            >>> client.lower_spot_price(1958009, 0.05)
            0.05
        """
        wanted = check_order_id("order", order)
        check_number("target", target, above=True, unit="USD per hour")
        check_bool("wait", wait)
        return lower_spot_price(self._orders, wanted, target, wait)

    # --- SSH ---

    @property
    def _ssh(self) -> SSHAccess:
        from clore_client.ssh.access import SSHAccess

        if self._ssh_access is None:
            self._ssh_access = SSHAccess(self._orders, self._state_folder, self._host_history)
        return self._ssh_access

    @staticmethod
    def parse_ssh_connection(order: Any) -> dict[str, Any]:
        """Parse the host, port and user from an order's ``connection.ssh``. Never raises.

        Parameters:
            order: an order in the documented form.

        Returns:
            ``{"host", "port", "user", "raw"}``; ``raw`` is the unchanged string. Missing parts are
            ``""``, 22 and ``"root"``. A host or user that is not a plain name or address counts as
            missing.

        Example:
            >>> CloreClient.parse_ssh_connection({"connection": {"ssh": "ssh root@h.net -p 2060"}})
            {'host': 'h.net', 'port': 2060, 'user': 'root', 'raw': 'ssh root@h.net -p 2060'}
        """
        from clore_client.ssh.openssh import parse_ssh_command

        return parse_ssh_command(order)

    def connect_ssh(
        self,
        order: OrderArgument,
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 120.0,
        timeout: float = 30.0,
        host_key: str = "pin",
        use_ssh_config: bool = False,
    ) -> paramiko.SSHClient:
        """Log in to the host of a running order. Needs paramiko.

        A password takes precedence over ``key_path``. Without both, the client uses the password
        in the order, or what was sent with the order, in this process or another one: the
        password, or the private key of the public key, from the SSH agent or ``~/.ssh``. Else it
        tries the agent and the user's default keys. It never forwards the agent or X11.

        Parameters:
            order: a running order or its number.
            password: the password of the user in ``connection.ssh``.
            key_path: the file of a private key: Ed25519, ECDSA or RSA.
            passphrase: the passphrase of that key, if it is encrypted.
            wait: seconds to wait until the host's sshd responds.
            timeout: seconds for each login attempt.
            host_key: ``"pin"`` accepts any host key at the first login to this order, and only the
                same key later; ``state_dir`` keeps it for other processes. A fingerprint
                (``"SHA256:..."``) accepts and pins only that key. ``"accept"`` accepts any key.
            use_ssh_config: use ``ProxyJump`` and ``IdentityFile`` for the host from
                ``~/.ssh/config``. A jump host must be in ``~/.ssh/known_hosts``.

        Returns:
            A connected ``paramiko.SSHClient``, which the caller closes.

        Raises:
            SSHError: the order has no address yet, no host responded in time, or the host refused
                the login.
            HostKeyChangedError: the host key has changed; no login was sent.
            OrderEndedError: the order has ended. The client checks this when a login fails.
            OrderNotFoundError: the account has no order with this number.
            ValueError: an argument is not valid, such as a ``key_path`` that can't be read.
            ImportError: paramiko is not installed.

        Example:
            >>> with client.connect_ssh(order) as ssh:
            ...     print(ssh.exec_command("nvidia-smi -L")[1].read().decode())
        """
        password, passphrase = Secret.of(password), Secret.of(passphrase)
        login = {
            "password": password, "key_path": key_path, "passphrase": passphrase, "wait": wait,
            "host_key": host_key, "use_ssh_config": use_ssh_config,
        }  # fmt: skip
        return self._ssh.login(order, login, timeout).open()

    def wait_for_ssh(
        self,
        order: OrderArgument,
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 300.0,
        timeout: float = 30.0,
        host_key: str = "pin",
        use_ssh_config: bool = False,
        on_progress: Report | None = None,
        progress: bool = False,
    ) -> None:
        """Wait until a login works.

        Parameters:
            order, password, key_path, passphrase, wait, timeout, host_key, use_ssh_config: as for
                :meth:`connect_ssh`.
            on_progress, progress: as for :meth:`wait_for_order`.

        Raises:
            SSHError, HostKeyChangedError, ValueError, ImportError: as for :meth:`connect_ssh`.

        Example:
            >>> client.wait_for_ssh(order, wait=600)
        """
        password, passphrase = Secret.of(password), Secret.of(passphrase)
        login = {
            "password": password, "key_path": key_path, "passphrase": passphrase, "wait": wait,
            "host_key": host_key, "use_ssh_config": use_ssh_config,
        }  # fmt: skip
        with ProgressOptions(on_progress, progress).reporting() as report:
            self._ssh.login(order, login, timeout).open(report).close()

    def forget_host_key(self, order: OrderArgument) -> bool:
        """Forget the pinned host key of an order, so that the next login accepts a new one.

        Parameters:
            order: the order or its number, for example after its container was restarted.

        Returns:
            True if a key was pinned.

        Example:
            >>> client.forget_host_key(order)
            True
        """
        return self._ssh.forget_host_key(order)

    def ssh_command(self, order: OrderArgument, *, key_path: PathArgument | None = None) -> str:
        """Return the command that logs in from a terminal, quoted for a shell.

        If the host key is pinned in ``state_dir``, OpenSSH accepts only that key.

        Parameters:
            order: a running order or its number.
            key_path: the file of a private key, which the command names.

        Returns:
            The command, on one line.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_command(order))
            ssh -p 2060 root@n1.us.clorecloud.net
        """
        return self._ssh.openssh(order, key_path).terminal_line()

    def ssh_config(
        self,
        order: OrderArgument,
        *,
        name: str | None = None,
        key_path: PathArgument | None = None,
    ) -> str:
        """Return an entry for ``~/.ssh/config``, for rsync, VS Code and others.

        With this entry, OpenSSH accepts only the pinned host key. If there is none yet, OpenSSH
        pins the first one, in the same file.

        Parameters:
            order: a running order or its number.
            name: the name of the entry, as in ``ssh <name>``; ``clore-<order id>`` by default.
            key_path: the file of a private key.

        Returns:
            The lines of the entry.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_config(order), file=open("gpu.conf", "w"))
        """
        from clore_client.ssh.openssh import check_plain_name

        if name is not None:
            check_plain_name(name)
        return self._ssh.openssh(order, key_path).config_entry(name)

    def run(
        self,
        order: OrderArgument,
        command: str | Sequence[str],
        *,
        check: bool = True,
        timeout: float | None = None,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        on_output: Callable[[OutputLine], object] | None = None,
        max_output: int = 64 * 1024 * 1024,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> CommandResult:
        """Run a command on the host of an order, and wait for its end. Needs paramiko.

        Parameters:
            order: a running order or its number.
            command: a command for the host's shell; a list of arguments is quoted.
            check: raise an error if the exit code is not 0.
            timeout: seconds after the login; the command is then stopped. None waits forever. It
                also limits each login attempt. Ctrl-C stops the command too.
            input: the standard input of the command.
            env: environment variables.
            on_output: called with each line when it arrives, without its line end; the line's
                ``stream`` is ``"stdout"`` or ``"stderr"``.
            max_output: bytes of output to keep. Any more output only goes to ``on_output``, and is
                counted in the result's ``dropped``.
            ssh: a connection to use, as :meth:`connect_ssh` returns it; it stays open.
            **login: ``password``, ``key_path``, ``passphrase``, ``wait``, ``host_key``,
                ``use_ssh_config``, as for :meth:`connect_ssh`.

        Returns:
            A :class:`CommandResult`: ``command``, ``exit_code``, ``stdout``, ``stderr`` (text, in
            which bytes that are not UTF-8 are replaced), ``duration`` in seconds, and ``dropped``.

        Raises:
            CommandError: the exit code was not 0; ``result`` has the output.
            CommandTimeoutError: the command did not end in time, and was stopped.
            SSHError: the login failed; the host did not run the command, because its sshd has a
                ForceCommand; or the connection broke, and the command may still run.

        Example:
            >>> print(client.run(order, "nvidia-smi -L").stdout)
            GPU 0: NVIDIA GeForce RTX 4090
        """
        from clore_client.ssh.command import Command

        env, login = secret_values(env), secret_values(login)
        wanted = Command(
            command, check=check, timeout=timeout, input=input, env=env, on_output=on_output,
            max_output=max_output,
        )  # fmt: skip
        login_timeout = min(30.0, timeout or 30.0)
        with self._ssh.connected(order, ssh, login, login_timeout) as pool:
            return wanted.run(pool.ssh)

    def start(
        self,
        order: OrderArgument,
        command: str | Sequence[str],
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: PathArgument | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Job:
        """Start a job: a command that keeps running without a connection. Needs paramiko.

        It runs in a session of its own, with an empty standard input. Its output and its exit code
        are files on the host, in ``~/.clore/jobs/<name>``. So it continues after the end of this
        process, and :meth:`job` finds it from any other process. It ends with the order.

        Parameters:
            order: a running order or its number.
            command: a command for the host's shell; a list of arguments is quoted.
            name: letters, digits, ``_``, ``.`` and ``-``; by default a random one.
            env: environment variables, which no list of processes on the host shows.
            cwd: the directory to run in; a relative path and ``~`` start at the home directory.
            ssh, **login: as for :meth:`run`. With ``ssh``, the job's methods can't reconnect.

        Returns:
            A :class:`Job`: ``status``, ``exit_code``, ``tail()``, ``follow()``, ``wait()``,
            ``stop()``, ``remove()``.

        Raises:
            JobError: there is already a job with this name, or ``cwd`` does not exist. After a
                broken connection, :meth:`job` shows if it was started.
            SSHError: the login failed.

        Example:
            >>> job = client.start(order, "python train.py", name="train", cwd="~/work")
            >>> job.follow(on_output=print)
        """
        from clore_client.ssh.jobs import job_variables

        env, login = secret_values(env), secret_values(login)
        variables = job_variables(command, name, env, cwd)
        return self._ssh.jobs(order, ssh, login).start(variables)

    def jobs(
        self, order: OrderArgument, *, ssh: paramiko.SSHClient | None = None, **login: Any
    ) -> list[Job]:
        """Return the jobs on the host of an order, those that have ended too, by name.

        Parameters:
            order: a running order or its number.
            ssh, **login: as for :meth:`start`.

        Returns:
            A list of :class:`Job`.

        Raises:
            SSHError: the login failed.

        Example:
            >>> client.jobs(order)
            [<Job 'train': running>]
        """
        login = secret_values(login)
        return self._ssh.jobs(order, ssh, login).find()

    def job(
        self,
        order: OrderArgument,
        name: str,
        *,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Job:
        """Return the job with a name; any process may have started it.

        Parameters:
            order: a running order or its number.
            name: the ``name`` of :meth:`start`.
            ssh, **login: as for :meth:`start`.

        Returns:
            The :class:`Job`.

        Raises:
            JobError: the host has no job of that name.
            SSHError: the login failed.

        Example:
            >>> client.job(order, "train").tail(1)
            'step 100: loss 1.24\\n'
        """
        from clore_client.ssh.openssh import check_plain_name

        login = secret_values(login)
        wanted = check_plain_name(name)
        return self._ssh.jobs(order, ssh, login).get(wanted)

    def shell(
        self, order: OrderArgument, *, ssh: paramiko.SSHClient | None = None, **login: Any
    ) -> int:
        """Open the host's shell in this terminal, until it ends. Needs paramiko.

        Every key is sent to the host, Ctrl-C too. The terminal is restored, however the shell
        ends.

        Parameters:
            order: a running order or its number.
            ssh, **login: as for :meth:`run`.

        Returns:
            The exit code of the shell; -1 if a signal ended it.

        Raises:
            SSHError: this process has no terminal, the login failed, or the connection broke.

        Example:
            >>> client.shell(order)
            root@gpu:~# exit
            0
        """
        from clore_client.ssh.shell import check_terminal, run_shell

        login = secret_values(login)
        check_terminal()
        with self._ssh.connected(order, ssh, login) as pool:
            return run_shell(pool.ssh)

    def wait_for_http(
        self,
        order: OrderArgument,
        path: str = "/",
        port: int | None = None,
        timeout: float = 600.0,
        *,
        on_progress: Report | None = None,
        progress: bool = False,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> int:
        """Wait until a web service in the container of an order responds.

        The public address of an order responds with 502 until something in the container listens
        (seconds to minutes after ``running``, seen on the live API). The client waits while the
        status is 502, 503, 504 or 520 to 530; any other status ends the wait. Certificates are
        verified. Neither the API key nor any other credentials are sent.

        Parameters:
            order: a running order or its number.
            path: the path to request.
            port: the port in the container. If the order has no public address for it, the request
                goes over SSH, which needs paramiko. None: the order's public address.
            timeout: seconds to wait; ``float("inf")`` waits forever.
            on_progress, progress: as for :meth:`wait_for_order`.
            ssh, **login: as for :meth:`run`, where the request goes over SSH.

        Returns:
            The status of the response, for example 200, 302 or 401.

        Raises:
            WaitTimeoutError: the service did not respond in time; ``reason`` says why.
            CloreConnectionError: the certificate is not valid.
            SSHError: the login failed, or the connection broke.

        Example:
            >>> client.wait_for_http(order, "/api/status")
            200
        """
        from clore_client.ssh.tunnel import HTTPWait

        login = secret_values(login)
        options = ProgressOptions(on_progress, progress)
        wait = HTTPWait(order, self._orders.running, path, port, timeout, options)
        if wait.url is not None:
            return wait.at_public_address(self._user_agent)
        with self._ssh.connected(order, ssh, login) as pool:
            return wait.on_host(pool.ssh, self._user_agent)

    def forward(
        self,
        order: OrderArgument,
        remote_port: int,
        local_port: int = 0,
        *,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Forward:
        """Forward a local port, on loopback only, to a port of the host of an order.

        Parameters:
            order: a running order or its number.
            remote_port: the port on the host.
            local_port: the port on this machine; 0 chooses a free one.
            ssh, **login: as for :meth:`run`.

        Returns:
            A context manager that returns the local port, and forwards it until the block ends.

        Example:
            >>> with client.forward(order, 8888) as port:
            ...     print(requests.get(f"http://127.0.0.1:{port}").status_code)
        """
        from clore_client.ssh.access import check_connection
        from clore_client.ssh.tunnel import Forward, check_forward_arguments

        login = secret_values(login)
        check_forward_arguments(remote_port, local_port)
        if ssh is not None:
            return Forward(check_connection(ssh), remote_port, local_port)
        return Forward(self._ssh.login(order, login).open(), remote_port, local_port, owns=True)

    def upload(
        self,
        order: OrderArgument,
        local: PathArgument,
        remote: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        symlinks: str = "skip",
        exclude: Sequence[str] = (),
        skip_unchanged: bool | str = False,
        preview: bool = False,
        delete: bool | TransferResult = False,
        streams: int | None = None,
        progress: Progress | bool | None = None,
        on_progress: Report | None = None,
        timeout: float = 30.0,
        deadline: float | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> TransferResult:
        """Copy a file or a directory to the host of an order. Needs paramiko.

        As with rsync, a directory goes into ``remote``: ``"data"`` becomes ``remote/data``. With a
        slash at its end, its content does: ``"data/"`` becomes ``remote``. It makes no difference
        if ``remote`` exists. A file goes into ``remote`` if that is a directory or ends with a
        slash, and else gets that name. Missing parents of the target are created.

        Each file gets a temporary name, and is renamed when it is complete. The client always
        compares sizes. It also compares SHA-256 with ``verify``, after a resumed transfer, and for
        a file that was sent in several pieces. On a host without a POSIX shell, it uses SFTP, which
        is slower, and compares SHA-256 only with ``verify``, as it has to read the file again.

        ==================  ========================================================================
        in the source       in the copy
        ==================  ========================================================================
        file                a file; one that is replaced stays whole until then
        permissions         those of the source minus the umask of the other side; a replaced file
                            keeps its own; with ``preserve`` those of the source; never setuid
        owner, attributes   those of the user who logs in; not copied
        times               the time of the copy; with ``preserve`` that of the source, in seconds
        symlink             left out; ``symlinks="copy"``: the same symlink, ``"follow"``: what it
                            leads to; left out if that is outside of the directory
        ``local`` itself    a symlink in its place is followed
        hard link           a file of its own
        sparse file         a sparse file
        device, FIFO,       left out, and named in ``skipped``
        socket
        ==================  ========================================================================

        A symlink in the place of a file's target is an error, unless ``symlinks="follow"``.

        Parameters:
            order: a running order or its number.
            local: a file or directory on this machine.
            remote: a path on the host; a relative path and ``~`` start at the home
                directory.
            preserve: keep permissions and times.
            verify: compare the SHA-256 of every file.
            resume: continue an earlier transfer that failed. At most 5 % of the received data
                is sent again (or 256 KB). If the size or time of the source has changed, the
                transfer starts over.
            symlinks: ``"skip"``, ``"copy"`` or ``"follow"``, as in the table.
            exclude: patterns as in ``.gitignore``, of what to leave out. Needs pathspec.
            skip_unchanged: True leaves out the files whose size and time, in whole seconds, are the
                same there, and preserves times, so that the next call can compare them.
                ``"checksum"`` compares sizes and SHA-256; it also finds a change that keeps the
                size within the same second.
            preview: send nothing. The result has what would be sent in ``sent``.
            delete: remove what only the target has. First pass True with ``preview=True``; the
                result lists it in ``deleted``. Then pass that result: nothing else is removed.
                What ``exclude`` matches, or what was left out here, stays.
            streams: the number of connections, 1 to 16; None chooses it by the size.
            progress: True shows the progress, as for :meth:`wait_for_order`. A function is called
                for each file, as ``progress(name, done, total)``, in bytes, in this thread; control
                characters in the name are escaped.
            on_progress: called with a :class:`ProgressEvent`, in bytes of all files.
            timeout: seconds for each login attempt, and the longest time without any progress.
            deadline: seconds for the whole call with its login; None for no limit.
            ssh, **login: as for :meth:`run`.

        Returns:
            A :class:`TransferResult`: ``path``, ``files``, ``size`` in bytes, ``duration`` in
            seconds, ``skipped``, ``unchanged``, ``sent``, ``deleted``.

        Raises:
            TransferError: a file was not copied completely, because of a full disk or a lost
                connection; it has ``name``, ``done`` and ``total``.
            SSHError: the login failed.
            FileNotFoundError: ``local`` does not exist.
            ImportError: ``exclude`` needs pathspec.

        Example:
            >>> client.upload(order, "data/", "~/work", exclude=["*.pyc"], skip_unchanged=True)
            >>> would = client.upload(order, "data/", "~/work", preview=True, delete=True)
            >>> would.deleted
            ['old.bin']
            >>> client.upload(order, "data/", "~/work", delete=would)
        """
        from clore_client.ssh.transfer.transfer import check_upload, upload_connections
        from clore_client.ssh.transfer.upload import upload_path

        login = secret_values(login)
        checked = check_upload(
            local, remote, preserve=preserve, verify=verify, resume=resume, symlinks=symlinks,
            exclude=exclude, skip_unchanged=skip_unchanged, preview=preview, delete=delete,
            streams=streams, progress=progress, on_progress=on_progress, timeout=timeout,
            deadline=deadline,
        )  # fmt: skip
        size = upload_connections(*checked)
        with self._ssh.connected(order, ssh, login, timeout, size, deadline=deadline) as pool:
            return upload_path(pool, checked)

    def download(
        self,
        order: OrderArgument,
        remote: PathArgument,
        local: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        symlinks: str = "skip",
        exclude: Sequence[str] = (),
        skip_unchanged: bool | str = False,
        streams: int | None = None,
        max_bytes: int | None = None,
        progress: Progress | bool | None = None,
        on_progress: Report | None = None,
        timeout: float = 30.0,
        deadline: float | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> TransferResult:
        """Copy a file or a directory from the host of an order. Needs paramiko.

        It works like :meth:`upload` in the other direction, with the same table and the same
        meaning of a slash at the end of ``remote``. A hostile host can't make it write outside
        of ``local``. If a file grows during the copy, as a log does, the copy has its content from
        the start; any other change is an error.

        Parameters:
            order: a running order or its number.
            remote: a path on the host; a relative path and ``~`` start at the home
                directory.
            local: a path on this machine.
            max_bytes: refuse to copy more bytes than this.
            preserve, verify, resume, symlinks, exclude, skip_unchanged, streams, progress,
                on_progress, timeout, deadline, ssh, **login: as for :meth:`upload`.

        Returns:
            A :class:`TransferResult`.

        Raises:
            TransferError: a file was not copied completely, is larger than ``max_bytes``, or the
                host sent invalid data.
            SSHError: the login failed.
            ImportError: ``exclude`` needs pathspec.

        Example:
            >>> client.download(order, "~/work/model.safetensors", ".", resume=True).size
            4976698672
        """
        from clore_client.ssh.transfer.download import DOWNLOAD_CONNECTIONS, download_path
        from clore_client.ssh.transfer.transfer import DownloadOptions

        login = secret_values(login)
        options = DownloadOptions(
            remote, local, preserve=preserve, verify=verify, resume=resume, symlinks=symlinks,
            exclude=exclude, skip_unchanged=skip_unchanged, streams=streams, max_bytes=max_bytes,
            progress=progress, on_progress=on_progress, timeout=timeout, deadline=deadline,
        )  # fmt: skip
        size = streams or DOWNLOAD_CONNECTIONS
        with self._ssh.connected(
            order, ssh, login, timeout, size, streams is not None, deadline
        ) as pool:
            return download_path(pool, options)

    def rsync_command(
        self,
        order: OrderArgument,
        local: PathArgument,
        remote: PathArgument,
        *,
        key_path: PathArgument | None = None,
    ) -> str:
        """Return the command that copies to the host with rsync, quoted for a shell.

        It logs in as the command of :meth:`ssh_command` does, with the pinned host key.

        Parameters:
            order: a running order or its number.
            local: a file or directory on this machine; a slash at its end means its content.
            remote: a path on the host; a relative path and ``~`` start at the home
                directory.
            key_path: the file of a private key, which the command names.

        Returns:
            The command, on one line.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.rsync_command(order, "data/", "~/work"))
            rsync -az -s -e 'ssh -p 2060' data/ root@n1.us.clorecloud.net:work
        """
        from clore_client.ssh.transfer.transfer import check_path

        source, target = check_path("local", local), check_path("remote", remote)
        return self._ssh.openssh(order, key_path).rsync_line(source, target)

    def scp(
        self,
        order: OrderArgument,
        *,
        max_bytes: int | None = None,
        progress: Callable[..., object] | None = None,
        timeout: float = 30.0,
        **login: Any,
    ) -> Any:
        """Return an ``scp.SCPClient`` that is protected against hostile hosts.

        Parameters:
            order: a running order or its number.
            max_bytes: the largest number of bytes that one ``get()`` may receive.
            progress: as for ``scp.SCPClient``.
            timeout: seconds for each step of the login, and the longest time without progress.
            **login: as for :meth:`run`.

        Returns:
            An ``scp.SCPClient`` with its own connection; ``close()``, or the end of its block,
            closes it.

        Raises:
            ImportError: paramiko or scp is not installed.

        Example:
            >>> with client.scp(order) as copy:
            ...     copy.put("train.py", "/root/train.py")
        """
        from clore_client.ssh.scp import guarded_scp

        login = secret_values(login)
        connection = self._ssh.login(order, login, timeout).open()
        try:
            return guarded_scp(
                connection,
                socket_timeout=timeout,
                max_bytes=max_bytes,
                progress=progress,
            )
        except BaseException:
            connection.close()
            raise
