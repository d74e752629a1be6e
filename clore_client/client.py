"""CloreClient: a thin method for each thing that a renter does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from clore_client.api.request import HTTPClient, limited
from clore_client.config import (
    CONFIG_FILE,
    DEFAULT_STATE_DIR,
    KEY_VARIABLE,
    ending_of,
    need_key,
)
from clore_client.errors import ERROR_CODES, Secret, hidden_values, printable
from clore_client.log import logger
from clore_client.market.market import Market
from clore_client.market.spot import with_hourly_offers
from clore_client.models.order import Order
from clore_client.models.result import CommandResult, OutputLine, Transferred
from clore_client.models.server import Server, cheapest_first, to_servers
from clore_client.models.wallet import Wallet, to_wallets
from clore_client.orders.account import AccountOrders
from clore_client.orders.bid import set_spot_price
from clore_client.orders.cancel import cancel_all, cancel_order, cancel_orders, confirm_ended
from clore_client.orders.create import Purchase
from clore_client.orders.wait import wait_for_status
from clore_client.pricing import wire_currency
from clore_client.validation import (
    Timeout,
    check_bool,
    check_callback,
    check_count,
    check_id,
    check_ids,
    check_interval,
    check_number,
    check_string,
    check_text,
)

if TYPE_CHECKING:
    import paramiko

    from clore_client.rental.recovery import Leftovers
    from clore_client.rental.rental import Rental
    from clore_client.rental.signals import SignalHandling
    from clore_client.ssh.access import SSHAccess
    from clore_client.ssh.tunnel import Forward

C = TypeVar("C", bound="CloreClient")
PathArgument = str | os.PathLike[str]
Progress = Callable[[str, int, int], object]


class CloreClient(HTTPClient):
    """A client for the Clore.ai GPU marketplace.

    Every answer comes in the documented form, whatever the API sends: prices in USD per hour,
    reliability from 0 to 100, an ``order_id`` and a ``status`` for each order.

    Requests with the same key keep ``rate_limit`` seconds between them, in all threads and clients
    of the process, and ``create_order`` keeps ``create_order_interval`` besides. One exchange takes
    three times ``timeout`` at most, however slowly its answer drips. One call is sent
    ``max_retries`` times at most. Sent again after a lost or broken answer are reads,
    ``cancel_order``, ``cancel_orders`` and ``set_spot_price``; every other POST only when it never
    left this machine, or was refused for its pace. Between two sends lies an exponential backoff
    with full jitter, or what the API asks for in ``Retry-After``; over 60 seconds of that are a
    :class:`RateLimitError` and not a sleep. Cancels, and the reads that belong to them, leave
    whatever the API asks for, at pauses of 1, 2, 4 ... 30 seconds.

    Parameters:
        api_key: sent as the header ``auth``. None or ``""``: the environment variable
            ``CLORE_API_KEY``, then ``~/.clore/config.json``, else no key, with which only the
            marketplace can be read.
        timeout: seconds for one HTTP exchange, a number or a ``(connect, read)`` pair.
        rate_limit: smallest number of seconds between two requests with the same key in this
            process. The API allows one a second.
        max_retries: how many times one call is sent at most, the first included; at least 1.
        base_url: None: the environment variable ``CLORE_BASE_URL``, else the class attribute
            ``BASE_URL``. A key goes out over https only, or to a loopback address.
        create_order_interval: seconds between two ``create_order``; the API allows one in five.
        backoff: seconds that the first backoff has at most; it doubles with each send.
        max_backoff: seconds that any backoff has at most.
        user_agent: added to the User-Agent, as ``"my-tool/1.0"``.
        max_usd_per_hour: refuse every order and bid over this, before anything is sent.
        max_active_orders: refuse an order when so many are active.
        state_dir: where :meth:`rent` notes what it rents, for :meth:`leftovers`; None: nowhere.
        max_response_mb: megabytes, decoded, that an answer may have; a larger one is an error.
        order_lag: seconds for which the order lists may lag behind a change (up to 20, seen on the
            live API). Only after that long does an order count as gone because no list has it.

    Raises:
        ConfigurationError: a key, a base URL or a settings file that can't be used.

    Example:
        >>> with CloreClient() as client:
        ...     server = client.find_cheapest("RTX 4090", max_price_usd=0.5)
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
    ) -> None:
        api_key = Secret.of(api_key)  # what fails below shows its variables to error reporters
        super().__init__(
            api_key,
            timeout,
            rate_limit,
            max_retries,
            base_url=base_url,
            create_order_interval=create_order_interval,
            backoff=backoff,
            max_backoff=max_backoff,
            user_agent=user_agent,
            max_response_mb=max_response_mb,
            rate_limit_wait=rate_limit_wait,
            state_dir=state_dir,
        )
        if max_usd_per_hour is not None:
            check_number("max_usd_per_hour", max_usd_per_hour, unit="USD per hour")
        if max_active_orders is not None:
            check_count("max_active_orders", max_active_orders)
        self.max_usd_per_hour = max_usd_per_hour
        self.max_active_orders = max_active_orders
        self.order_lag = check_interval("order_lag", order_lag)
        self._market = Market(self)
        self._orders = AccountOrders(self, self._market)
        self._ssh_access: SSHAccess | None = None  # made when it is used, with paramiko

    def __copy__(self: C) -> C:
        """Return a client of its own with the same settings and key, that knows the same orders."""
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
        """A client whose key must come from the environment or the official tools' file.

        Parameters:
            **options: for the client, all but ``api_key``.

        Raises:
            ConfigurationError: there is no key, or one that can't be used; says where it looked.

        Example:
            >>> client = CloreClient.from_env(timeout=10)
        """
        if "api_key" in options:
            raise TypeError("from_env() takes no api_key: pass it to the class itself")
        need_key()
        return cls(**options)

    def describe(self) -> str:
        """Where the key and the base URL come from, of the key its last four characters at most.

        Example:
            >>> print(client.describe())
            a key that ends in '3f9a', from environment variable CLORE_API_KEY
            base URL https://api.clore.ai, from class attribute CloreClient.BASE_URL
        """
        key, url = self.api_key, self.BASE_URL
        found, source = self._key_source
        if not key:
            where = f"in {KEY_VARIABLE} or {CONFIG_FILE}" if key == found else "any more"
            key_line = f"no key {where}"
        else:
            source = source if key == found else "attribute"
            key_line = f"a key that ends in {ending_of(key)!r}, from {source}"
        url_found, url_source = self._url_source
        if url != url_found:
            own = "BASE_URL" in self.__dict__
            url_source = "attribute" if own else f"class attribute {type(self).__name__}.BASE_URL"
        return f"{key_line}\nbase URL {printable(str(url), 200)}, from {url_source}"

    # --- wallets ---

    def get_wallets(self) -> list[Wallet]:
        """The wallets of the account.

        Returns:
            A list of :class:`Wallet`: ``name``, ``balance`` (in its currency, may be None),
            ``deposit_address``.

        Raises:
            CloreAPIError, CloreConnectionError: see the README, "Errors".

        Example:
            >>> [wallet["name"] for wallet in client.get_wallets()]
            ['bitcoin', 'CLORE-Blockchain', 'USD-Blockchain']
        """
        return to_wallets(self._request("GET", "/v1/wallets"))

    def get_balance(self, currency: str = "CLORE-Blockchain") -> float:
        """The balance of one wallet, in its currency.

        Parameters:
            currency: part of the wallet's name, in any case, or ``BTC``, ``CLORE``, ``USD``.

        Returns:
            The balance of the first wallet that fits; 0.0 where there is none or it is null.

        Example:
            >>> client.get_balance("USD")
            12.5
        """
        text = check_text("currency", currency)
        wanted = {text.strip().lower(), (wire_currency(text) or text).strip().lower()}
        for wallet in self.get_wallets():
            if any(part in (wallet.name or "").lower() for part in wanted):
                return wallet.balance or 0.0
        return 0.0

    # --- the marketplace ---

    def get_marketplace(self, include_rented: bool = False) -> list[Server]:
        """The servers of the marketplace, as the API lists them. Needs no key.

        Parameters:
            include_rented: also those that somebody rents now.

        Returns:
            A list of :class:`Server`: ``id``, ``gpu_array``, ``price`` (under ``usd`` in USD per
            hour), ``reliability`` (0 to 100), ``rented``, ``specs``, ...

        Example:
            >>> len(client.get_marketplace())
            1873
        """
        check_bool("include_rented", include_rented)
        return to_servers(self._market.read(), include_rented=include_rented)

    def find_servers(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
    ) -> list[Server]:
        """Servers that can be rented now, the cheapest first, equal ones as the API lists them.

        A price that is missing, null or not above 0 is no price: such a server comes last, and
        never passes a price limit. Fees come on top of the prices: 5 % on demand, 1.25 % spot
        (seen on the live API).

        Parameters:
            gpu_type: part of a GPU's name, in any case: ``"4090"``, ``"rtx 3080"``.
            max_price_usd: USD per hour.
            min_reliability: 0 to 100.
            use_spot: filter and sort by the lowest spot bid that the host takes.

        Returns:
            A list of :class:`Server`, maybe empty.

        Raises:
            ValueError, TypeError: an argument can't be right; nothing was sent.

        Example:
            >>> client.find_servers("RTX 4090", max_price_usd=0.5, min_reliability=95)[0].gpu_name
            'RTX 4090'
        """
        if gpu_type is not None:
            check_string("gpu_type", gpu_type)
        if max_price_usd is not None:
            check_number("max_price_usd", max_price_usd, infinite=True, unit="USD per hour")
        check_number("min_reliability", min_reliability, maximum=100.0)
        if 0 < min_reliability <= 1:
            logger.warning(
                "min_reliability counts from 0 to 100: %g is next to none", min_reliability
            )
        check_bool("use_spot", use_spot)
        fitting = to_servers(
            self._market.read(),
            gpu_type=gpu_type,
            max_usd_per_hour=max_price_usd,
            min_reliability=min_reliability,
            spot=use_spot,
        )
        return cheapest_first(fitting, spot=use_spot)

    def find_cheapest(
        self,
        gpu_type: str | None = None,
        max_price_usd: float | None = None,
        min_reliability: float = 0.0,
        use_spot: bool = False,
    ) -> Server | None:
        """The first of :meth:`find_servers`, or None where none fits. Same parameters.

        Example:
            >>> client.find_cheapest("RTX 4090").usd_per_hour
            0.125
        """
        servers = self.find_servers(gpu_type, max_price_usd, min_reliability, use_spot)
        return servers[0] if servers else None

    # --- orders ---

    def get_orders(self, include_completed: bool = False) -> list[Order]:
        """The orders of the account.

        Parameters:
            include_completed: also those that have ended.

        Returns:
            A list of :class:`Order`: ``order_id``, ``renting_server``, ``status``,
            ``connection``, ``price`` (per hour, in the order's currency), ``started``, ...

        Example:
            >>> [(order.id, order.status) for order in client.get_orders()]
            [(1958009, 'running')]
        """
        orders, _ = self._orders.read(check_bool("include_completed", include_completed))
        return orders if include_completed else [o for o in orders if not o.has_ended]

    def get_order(self, order_id: int) -> Order | None:
        """One order, active or ended.

        The list of ended orders, which grows with the account's history, is read only when the
        order is not among the active ones.

        Parameters:
            order_id: its number.

        Returns:
            An :class:`Order`, or None where the account has none of that number (or the API does
            not show it yet: that takes up to 20 seconds after ``create_order``).

        Example:
            >>> client.get_order(1958009).ssh_command
            'ssh root@n1.us.clorecloud.net -p 2060'
        """
        return self._orders.find(check_id("order_id", order_id))

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
        """Rent a server. It costs money from here on, until :meth:`cancel_order`.

        Sent at most once, unless it surely had no effect. The live API answers without an order
        id, and sometimes an answer is lost: the order is then looked up in ``my_orders``.

        Parameters:
            server_id: the ``id`` of a server.
            image: a Docker image.
            order_type: ``"on-demand"`` or ``"spot"``.
            currency: what to pay with: the API's name, or ``BTC``, ``CLORE``, ``USD``.
            ports: container port -> ``"tcp"`` or ``"http"``; default ``{"22": "tcp"}``.
            env: environment variables; default ``{"NVIDIA_VISIBLE_DEVICES": "all"}``.
            ssh_password: at most 32 characters. With neither this nor ``ssh_key``, one is made up
                and stands in the result as ``ssh_password``.
            ssh_key: a public key, as the ``.pub`` file holds it; at most 3072 characters.
            spot_price: the bid for ``order_type="spot"``, in **USD per hour**.
            jupyter_token: at most 32 characters.
            find_timeout: seconds that the order may take to show up.
            allow_above_on_demand: send a bid of more than ten times the server's on-demand price.
            preview: send nothing, and return what would be sent: an :class:`Order` with only
                ``body`` and ``usd_per_hour`` (by today's listing, or of the bid; None if unknown).

        Returns:
            An :class:`Order` that also carries ``code`` (0).

        Raises:
            OrderOutcomeUnknownError: an order may or may not have been made, or it can't be told
                which one it is: look at :meth:`get_orders` before ordering again. What was sent
                to get in stands in its ``credentials``.
            ServerAlreadyRentedError, ServerOfflineError, InsufficientBalanceError,
            BidTooLowError, CurrencyNotAllowedError, DatabaseError: the API refused.
            SpendingLimitError: a ceiling of the client does not allow it; nothing was sent.
            RateUnknownError: a bid could not be converted; nothing was sent.
            ValueError, TypeError: an argument can't be right; nothing was sent.

        Example:
            >>> order = client.create_order(99173, currency="USD")
            >>> order["order_id"], order["ssh_password"]
            (1958009, 'q1nE0rNN7mBdmKyUHyKzXgLa')
        """
        ssh_password, jupyter_token = Secret.of(ssh_password), Secret.of(jupyter_token)
        env = hidden_values(env)
        purchase = Purchase(
            self._orders,
            server_id=server_id,
            image=image,
            order_type=order_type,
            currency=currency,
            ports=ports,
            env=env,
            ssh_password=ssh_password,
            ssh_key=ssh_key,
            jupyter_token=jupyter_token,
        )
        check_number("find_timeout", find_timeout, unit="seconds")
        check_bool("allow_above_on_demand", allow_above_on_demand)
        check_bool("preview", preview)
        purchase.set_bid(spot_price, allow_above_on_demand)
        return purchase.preview() if preview else purchase.place(find_timeout)

    def cancel_order(
        self,
        order_id: int,
        issue: str | None = None,
        *,
        confirm: bool = False,
        confirm_timeout: float = 60.0,
        settle_timeout: float | None = None,
    ) -> bool:
        """End an order: it costs nothing from here on. Safe to repeat.

        What the API answers for an order that has ended is not known: after a refusal or a doubt
        the order lists decide, and the cancel is sent again. That an order is in no list for a
        moment does not mean that it has ended.

        Parameters:
            order_id: its number.
            issue: what was wrong with the server; cut at 2048 characters.
            confirm: wait until it is listed as ended, or in no list for ``order_lag`` seconds.
            confirm_timeout: seconds for that.
            settle_timeout: seconds for which that is tried after a refusal or a doubt (30 by
                default); 0 looks once, for those who rather cancel again.

        Returns:
            True, also when it had ended before.

        Raises:
            OrderNotFoundError: the account has no such order.
            CancelUnconfirmedError: the order may still be running; ``order_ids`` has it.
            CloreError: so it may, too; nothing was sent, or the API refused key or pace.

        Example:
            >>> client.cancel_order(1958009)
            True
        """
        wanted = check_id("order_id", order_id)
        check_bool("confirm", confirm)
        check_number("confirm_timeout", confirm_timeout, infinite=True, unit="seconds")
        if settle_timeout is not None:
            check_number("settle_timeout", settle_timeout, unit="seconds")
        if issue is not None:
            check_string("issue", issue)
        cancellation = limited(
            lambda: cancel_order(self._orders, wanted, issue, settle_timeout), urgent=True
        )
        if confirm:
            confirm_ended([cancellation], confirm_timeout)
        return True

    def cancel_all(self, *, confirm: bool = True, confirm_timeout: float = 60.0) -> list[int]:
        """End every active order of the account, whoever made it.

        Parameters:
            confirm: wait until they have left the active ones, or are expired.
            confirm_timeout: seconds for that.

        Returns:
            The ids of the orders that were active.

        Raises:
            CancelUnconfirmedError: some may still be running; ``order_ids`` names them.

        Example:
            >>> client.cancel_all()
            [1958009, 1958010]
        """
        check_bool("confirm", confirm)
        check_number("confirm_timeout", confirm_timeout, infinite=True, unit="seconds")
        return limited(lambda: cancel_all(self._orders, confirm, confirm_timeout), urgent=True)

    def cancel_orders(self, order_ids: Iterable[int]) -> dict[str, Any]:
        """End several orders, with one API call for each 64 of them.

        Parameters:
            order_ids: their numbers; with none, nothing is sent.

        Returns:
            The envelope; the ids that failed stand under ``failed_to_cancel``.

        Example:
            >>> client.cancel_orders([1958009, 1958010])["failed_to_cancel"]
            []
        """
        return cancel_orders(self._orders, check_ids("order_ids", order_ids))

    def wait_for_order(
        self,
        order_id: int,
        timeout: float = 300,
        poll_interval: float = 5.0,
        target_status: str = "running",
        *,
        on_update: Callable[[Order | None], object] | None = None,
    ) -> Order:
        """Wait until an order has a status.

        A new order shows up 2 to 20 seconds after it was made and mostly runs after 30 to 120
        (seen on the live API). A poll that fails is borne. When the time is out the order is not
        cancelled: it may still be running, and cost money.

        Parameters:
            order_id: its number.
            timeout: seconds; ``float("inf")`` waits for ever.
            poll_interval: seconds between two looks.
            target_status: ``"running"``, ``"creating"``, ``"cancelled"`` or ``"expired"``; the
                last two meet each other.
            on_update: called after each look with the :class:`Order`, or None while it does not
                show; what it raises ends the wait.

        Returns:
            The :class:`Order`, with that status.

        Raises:
            OrderEndedError: it ended meanwhile.
            WaitTimeoutError: it did not get there in time; a ``TimeoutError``. ``reason`` tells
                whether it never showed up, or is still creating.

        Example:
            >>> client.wait_for_order(1958009, timeout=120).ssh_command
            'ssh root@n1.us.clorecloud.net -p 2060'
        """
        wanted = check_id("order_id", order_id)
        check_number("timeout", timeout, infinite=True, unit="seconds")
        check_interval("poll_interval", poll_interval)
        check_text("target_status", target_status)
        check_callback("on_update", on_update, 1)

        return wait_for_status(
            self._orders, wanted, timeout, poll_interval, target_status, on_update
        )

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
    ) -> Rental:
        """A server for the length of a ``with`` block: found, ordered, awaited, and given back.

        The cheapest server that fits is ordered. One that is rented away, offline, refuses the
        currency or is refused with code 1 gives way to the next, and so does an order that shows a
        price over the limit or does not run in time, once it is confirmed to have ended. However
        the block is left - also by Ctrl-C, by SIGTERM, SIGHUP or the interpreter's exit - the order
        is cancelled, and that it has ended is confirmed. A second Ctrl-C ends only the
        confirmation, three within two seconds end even the cancelling. What a killed process
        leaves, :meth:`leftovers` finds.

        A thread of the rental orders, cancels and confirms, as no signal interrupts it. After code
        1 it goes on looking for an order that was made all the same, and ends that one.

        ``max_hours`` and ``max_cost_usd`` are kept by a thread of this process: it cancels the
        order and closes the rental's SSH connections. Code of the block that is busy elsewhere is
        not interrupted, and nothing keeps them while the process is dead or the machine asleep.

        Parameters:
            gpu_type, min_reliability, use_spot: as for :meth:`find_servers`.
            max_price_usd: USD per hour when paid in ``currency``, without fees.
            server_id: only this server.
            image, currency, ports, env, ssh_password, ssh_key, jupyter_token, find_timeout: as for
                :meth:`create_order`.
            spot_price: the bid in USD per hour for ``use_spot``; default the lowest that the host
                takes.
            attempts: how many servers are tried at most.
            deploy_timeout: seconds that each may take to run.
            poll_interval: seconds between two looks.
            cancel_timeout: seconds for which the cancel is kept up, whatever ``max_retries`` is,
                and then again at most for its confirmation.
            max_hours: hours after which the rental is ended.
            max_cost_usd: USD of cost, fees included, at which it is ended.

        Returns:
            A :class:`Rental`, which orders when it is entered: ``order``, ``server``,
            ``cost_usd``, ``ssh()``, ``run()``, ``keep()``.

        Raises:
            RentalError: no server worked; ``tried`` tells why for each.
            CancelUnconfirmedError: an order may still be running.
            OrderOutcomeUnknownError: an order may have been made.
            BudgetExceededError: by calls of the rental, and when the block is left.

        Example:
            >>> with client.rent("RTX 4090", max_price_usd=0.40, max_hours=2) as rental:
            ...     print(rental.run("nvidia-smi -L").stdout)
        """
        from clore_client.rental.rental import Rental
        from clore_client.rental.selection import RentalSettings

        ssh_password, jupyter_token = Secret.of(ssh_password), Secret.of(jupyter_token)
        env = hidden_values(env)
        settings = RentalSettings(
            gpu_type=gpu_type,
            max_price_usd=max_price_usd,
            min_reliability=min_reliability,
            use_spot=use_spot,
            server_id=server_id,
            image=image,
            currency=currency,
            ports=ports,
            env=env,
            ssh_password=ssh_password,
            ssh_key=ssh_key,
            spot_price=spot_price,
            jupyter_token=jupyter_token,
            attempts=attempts,
            deploy_timeout=deploy_timeout,
            poll_interval=poll_interval,
            find_timeout=find_timeout,
            cancel_timeout=cancel_timeout,
            max_hours=max_hours,
            max_cost_usd=max_cost_usd,
        )
        return Rental(self, self._orders, settings, self._state_folder())

    def leftovers(self, *, wait: float = 30.0) -> Leftovers:
        """What rentals of dead processes have left running on this account.

        Parameters:
            wait: seconds for which an order that was sent a moment ago may not be listed yet.

        Returns:
            :class:`Leftovers`: ``abandoned`` (of this machine), and apart from them ``elsewhere``
            (entries of other machines) and ``unnoted`` (active orders without an entry).

        Example:
            >>> client.leftovers().abandoned
            [<Leftover order 1958009 of server 99173, by process 4711 on 'desk'>]
        """
        from clore_client.rental.recovery import find_leftovers

        check_number("wait", wait, unit="seconds")
        folder = self._state_folder()
        return limited(lambda: find_leftovers(self._orders, folder, wait), urgent=True)

    def cancel_leftovers(self, *, wait: float = 30.0, cancel_timeout: float = 300.0) -> list[int]:
        """End what :meth:`leftovers` lists as ``abandoned``, and nothing else.

        Parameters:
            wait: as for :meth:`leftovers`.
            cancel_timeout: seconds for which each cancel is kept up.

        Returns:
            The ids of the orders, which are confirmed to have ended.

        Raises:
            CancelUnconfirmedError: some may still be running; ``order_ids`` names them.

        Example:
            >>> client.cancel_leftovers()
            [1958009]
        """
        from clore_client.rental.recovery import end_leftovers

        check_number("wait", wait, unit="seconds")
        check_number("cancel_timeout", cancel_timeout, infinite=True, unit="seconds")
        folder = self._state_folder()
        return limited(
            lambda: end_leftovers(self._orders, folder, wait, cancel_timeout), urgent=True
        )

    @staticmethod
    def handle_signals() -> SignalHandling:
        """Let SIGTERM and SIGHUP end the rentals of all threads; to be called in the main thread.

        They then raise :class:`SignalExit`, a ``SystemExit``, in the main thread. The first rental
        does the same by itself, where it is entered in the main thread. A signal that has a handler
        or is ignored stays as it is.

        Returns:
            A context manager whose end, or ``close()``, restores what was before.

        Example:
            >>> with client.handle_signals():
            ...     work_with_threads()
        """
        from clore_client.rental.signals import SignalHandling

        return SignalHandling()

    # --- the spot market ---

    def get_spot_market(self, server_id: int) -> dict[str, Any]:
        """The offers for a server on the spot market.

        Parameters:
            server_id: the ``id`` of a server.

        Returns:
            The envelope, with ``market``. Each of its ``offers`` also carries ``usd_per_hour``
            (None where the rate is missing); its ``bid`` is per day in its ``currency``.

        Example:
            >>> client.get_spot_market(99173)["market"]["offers"][0]["usd_per_hour"]
            0.09016
        """
        return with_hourly_offers(self._market.read_spot(check_id("server_id", server_id)))

    def set_spot_price(
        self, order_id: int, new_price: float, *, allow_above_on_demand: bool = False
    ) -> bool:
        """Change the bid of a spot order.

        The API lets a bid be lowered once in 600 seconds, and by one step.

        Parameters:
            order_id: its number.
            new_price: **USD per hour**.
            allow_above_on_demand: send a bid of more than ten times the server's on-demand price.

        Returns:
            True when the answer carries no ``error``.

        Raises:
            OrderNotFoundError: the account has no such order; nothing was sent.
            SpotPriceTooSoonError: lowered too soon; ``retry_after`` says when again.
            SpotPriceStepError: lowered by too much; ``max_step`` says by how much at most, in the
                order's currency per day.
            BidTooLowError: under what the host takes.
            RateUnknownError: the bid could not be converted; nothing was sent.

        Example:
            >>> client.set_spot_price(1958009, 0.08)
            True
        """
        wanted = check_id("order_id", order_id)
        check_number("new_price", new_price, above=True, unit="USD per hour")
        check_bool("allow_above_on_demand", allow_above_on_demand)
        return set_spot_price(self._orders, wanted, new_price, allow_above_on_demand)

    # --- SSH ---

    @property
    def _ssh(self) -> SSHAccess:
        from clore_client.ssh.access import SSHAccess

        if self._ssh_access is None:
            self._ssh_access = SSHAccess(self, self._orders, self._state_folder())
        return self._ssh_access

    # --- getting in ---

    @staticmethod
    def parse_ssh_connection(order: Any) -> dict[str, Any]:
        """Where to log in, from an order's ``connection.ssh``. Never raises.

        Parameters:
            order: an order in the documented form.

        Returns:
            ``{"host", "port", "user", "raw"}``: ``""``, 22 and ``"root"`` where it does not say,
            and the string as it came. A host or user that is not a plain name or address counts
            as none.

        Example:
            >>> CloreClient.parse_ssh_connection({"connection": {"ssh": "ssh root@h.net -p 2060"}})
            {'host': 'h.net', 'port': 2060, 'user': 'root', 'raw': 'ssh root@h.net -p 2060'}
        """
        from clore_client.ssh.connect import parse_ssh_command

        return parse_ssh_command(order)

    def connect_ssh(
        self,
        order: Mapping[str, Any],
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 120.0,
        timeout: float = 30.0,
        host_key: str = "pin",
    ) -> paramiko.SSHClient:
        """Log in to the machine of a running order. Needs paramiko.

        A password wins over ``key_path``. With neither: the password that stands in the order, or
        that this client sent with it; else the SSH agent and the user's default keys. The agent
        is never forwarded, nor is X11.

        Parameters:
            order: a running order, as :meth:`wait_for_order` returns it.
            password: of the user in ``connection.ssh``.
            key_path: file of a private key: Ed25519, ECDSA or RSA.
            passphrase: of that key, where it is encrypted.
            wait: seconds that the machine's sshd may take to come up.
            timeout: seconds for each step of the login.
            host_key: ``"pin"`` keeps the key that the machine shows at the first login to this
                order, in the state folder too where that is in use, and insists on it from then
                on; a fingerprint (``"SHA256:..."``) insists on that one, and pins it;
                ``"accept"`` takes whatever is shown.

        Returns:
            A connected ``paramiko.SSHClient``, which the caller closes.

        Raises:
            SSHError: there is no address yet, nothing answered in time, or the login was refused.
            HostKeyChangedError: another key than before for this order; nothing was sent.
            ValueError: ``key_path`` or ``passphrase`` can't be used, among others.
            ImportError: paramiko is not installed.

        Example:
            >>> with client.connect_ssh(order) as ssh:
            ...     print(ssh.exec_command("nvidia-smi -L")[1].read().decode())
        """
        password, passphrase = Secret.of(password), Secret.of(passphrase)
        return self._ssh.login(
            order,
            password=password,
            key_path=key_path,
            passphrase=passphrase,
            wait=wait,
            timeout=timeout,
            host_key=host_key,
        ).open()

    def wait_for_ssh(
        self,
        order: Mapping[str, Any],
        password: str | None = None,
        key_path: PathArgument | None = None,
        *,
        passphrase: str | None = None,
        wait: float = 300.0,
        timeout: float = 30.0,
        host_key: str = "pin",
    ) -> None:
        """Return when a login works; parameters and errors are those of :meth:`connect_ssh`.

        Example:
            >>> client.wait_for_ssh(order, wait=600)
        """
        password, passphrase = Secret.of(password), Secret.of(passphrase)
        self.connect_ssh(
            order,
            password,
            key_path,
            passphrase=passphrase,
            wait=wait,
            timeout=timeout,
            host_key=host_key,
        ).close()

    def forget_host_key(self, order: Mapping[str, Any]) -> bool:
        """Forget the host key that is pinned for an order: the next login takes a new one.

        Parameters:
            order: whose container was started anew, which may make new keys.

        Returns:
            Whether there was one.

        Example:
            >>> client.forget_host_key(order)
            True
        """
        return self._ssh.forget_host_key(order)

    def ssh_command(self, order: Mapping[str, Any], *, key_path: PathArgument | None = None) -> str:
        """The line that logs in from a terminal, quoted for a shell.

        Where the host key is pinned in the state folder, OpenSSH is told to insist on it.

        Parameters:
            order: a running order.
            key_path: file of a private key, to be named in the line.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_command(order))
            ssh -p 2060 root@n1.us.clorecloud.net
        """
        return self._ssh.terminal_line(order, key_path)

    def ssh_config(
        self,
        order: Mapping[str, Any],
        *,
        name: str | None = None,
        key_path: PathArgument | None = None,
    ) -> str:
        """An entry for ``~/.ssh/config``, for rsync, VS Code and tmux.

        It insists on the pinned host key; without one yet, OpenSSH pins the first that it sees, in
        the same place.

        Parameters:
            order: a running order.
            name: of the entry, as in ``ssh <name>``; ``clore-<order id>`` by default.
            key_path: file of a private key.

        Raises:
            SSHError: the order has no address yet, or one that is not a plain name or address.

        Example:
            >>> print(client.ssh_config(order), file=open("gpu.conf", "w"))
        """
        return self._ssh.config_entry(order, name, key_path)

    # --- running work ---

    def run(
        self,
        order: Mapping[str, Any],
        command: str | Sequence[str],
        *,
        check: bool = True,
        timeout: float | None = None,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        on_output: Callable[[OutputLine], object] | None = None,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> CommandResult:
        """Run a command on the machine of an order, and wait for its end. Needs paramiko.

        Parameters:
            order: a running order.
            command: for the shell of the machine; a list of arguments is quoted.
            check: raise for another exit code than 0.
            timeout: seconds, after which the command is ended; None waits for ever. Ctrl-C ends
                it, too.
            input: what it reads from its standard input.
            env: environment variables.
            on_output: called with each line as it comes, without its line end; the line's
                ``stream`` is ``"stdout"`` or ``"stderr"``.
            ssh: a connection to use, as :meth:`connect_ssh` returns it; it stays open.
            **login: ``password``, ``key_path``, ``passphrase``, ``wait``, ``host_key``, as for
                :meth:`connect_ssh`.

        Returns:
            A :class:`CommandResult`: ``command``, ``exit_code``, ``stdout``, ``stderr`` (text;
            bytes that are no UTF-8 are replaced) and ``duration`` in seconds.

        Raises:
            CommandError: the exit code was not 0; ``result`` has it all.
            CommandTimeoutError: it did not end in time, and was ended.
            SSHError: the login failed, or the connection broke.

        Example:
            >>> print(client.run(order, "nvidia-smi -L").stdout)
            GPU 0: NVIDIA GeForce RTX 4090
        """
        from clore_client.ssh.command import check_run_arguments, run_command

        options: dict[str, Any] = {
            "check": check, "timeout": timeout, "input": input, "env": env, "on_output": on_output,
        }  # fmt: skip
        check_run_arguments(command, **options)
        with self._ssh.connected(order, ssh, login) as connected:
            return run_command(connected.ssh, command, **options)

    def forward(
        self,
        order: Mapping[str, Any],
        remote_port: int,
        local_port: int = 0,
        *,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Forward:
        """Forward a port of this machine, on loopback only, to one of an order's machine.

        Parameters:
            order: a running order.
            remote_port: on the machine, where something listens.
            local_port: here; 0 takes a free one.
            ssh, **login: as for :meth:`run`.

        Returns:
            A context manager that yields the local port, forwarded until the block is left.

        Example:
            >>> with client.forward(order, 8888) as port:
            ...     print(requests.get(f"http://127.0.0.1:{port}").status_code)
        """
        from clore_client.ssh.sessions import login_options
        from clore_client.ssh.tunnel import Forward, check_forward_arguments

        check_forward_arguments(remote_port, local_port)
        connection = (
            ssh if ssh is not None else self._ssh.login(order, **login_options(login)).open()
        )
        return Forward(connection, remote_port, local_port, owns=ssh is None)

    # --- moving data ---

    def upload(
        self,
        order: Mapping[str, Any],
        local: PathArgument,
        remote: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        streams: int | None = None,
        progress: Progress | None = None,
        timeout: float = 30.0,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Transferred:
        """Copy a file or a whole directory to the machine of an order. Needs paramiko.

        As with ``cp -r``, what is copied to a directory that exists is put into it. It is sent
        under a temporary name, and renamed when it is complete. Sizes are compared always, and
        SHA-256 where ``verify`` says so, the transfer was resumed, or a file went in several
        pieces. Symlinks within a directory are left out, and told of; so is what is neither file
        nor directory.

        Parameters:
            order: a running order.
            local: a file or directory here.
            remote: a path there; a relative one and ``~`` count from the home directory.
            preserve: keep permissions and times; else the usual permissions for new files, with
                the right to execute kept.
            verify: compare SHA-256 of every file.
            resume: keep what was transferred before an error, and go on from there. A source whose
                size or time has changed starts over.
            streams: connections at once, 1 to 16; None chooses by the size.
            progress: called as ``progress(name, done, total)``, in bytes, in this thread.
            timeout: seconds for each step of the login, and without any progress.
            ssh, **login: as for :meth:`run`.

        Returns:
            A :class:`Transferred`: ``path``, ``files``, ``size`` in bytes, ``duration`` in
            seconds, and ``skipped``.

        Raises:
            TransferError: it did not arrive whole: a full disk, a lost connection; ``name``,
                ``done`` and ``total`` tell how far it came.
            SSHError: the login failed.
            FileNotFoundError: there is nothing at ``local``.

        Example:
            >>> client.upload(order, "train.py", "~/work/")
        """
        from clore_client.ssh.upload import check_upload, upload_connections, upload_path

        options = check_upload(local, remote, preserve, verify, resume, streams, progress, timeout)
        ahead = upload_connections(*options) - 1
        with self._ssh.connected(order, ssh, login, timeout, ahead) as connected:
            return upload_path(connected.ssh, connected.another, options)

    def download(
        self,
        order: Mapping[str, Any],
        remote: PathArgument,
        local: PathArgument,
        *,
        preserve: bool = False,
        verify: bool = False,
        resume: bool = False,
        streams: int | None = None,
        max_bytes: int | None = None,
        progress: Progress | None = None,
        timeout: float = 30.0,
        ssh: paramiko.SSHClient | None = None,
        **login: Any,
    ) -> Transferred:
        """Copy a file or a whole directory from the machine of an order. Needs paramiko.

        The other way round as :meth:`upload`, and on the same terms. Nothing that the machine
        says makes this write outside of ``local``. Of a file that is still being written, as a log,
        make a copy there, and download that: what changes on the way is an error.

        Parameters:
            order: a running order.
            remote: a path there; a relative one and ``~`` count from the home directory.
            local: a path here.
            max_bytes: refuse what is larger.
            preserve, verify, resume, streams, progress, timeout, ssh, **login: as for
                :meth:`upload`.

        Returns:
            A :class:`Transferred`.

        Raises:
            TransferError: it did not arrive whole, is larger than ``max_bytes``, or the machine
                sent what can't be right.
            SSHError: the login failed.

        Example:
            >>> client.download(order, "~/work/model.safetensors", ".", resume=True).size
            4976698672
        """
        from clore_client.ssh.download import check_download, download_path

        options = check_download(
            remote, local, preserve, verify, resume, streams, max_bytes, progress, timeout
        )
        ahead = (options.streams or 1) - 1
        with self._ssh.connected(order, ssh, login, timeout, ahead) as connected:
            return download_path(connected.ssh, connected.another, options)

    def scp(
        self,
        order: Mapping[str, Any],
        *,
        max_bytes: int | None = None,
        progress: Callable[..., object] | None = None,
        timeout: float = 30.0,
        **login: Any,
    ) -> Any:
        """A client of the package scp that a hostile host can't abuse, for those who know it.

        Parameters:
            order: a running order.
            max_bytes: refuse to receive more in one ``get()``.
            progress: as for ``scp.SCPClient``.
            timeout: seconds for each step of the login, and without any progress.
            **login: as for :meth:`run`.

        Returns:
            An ``scp.SCPClient`` with a connection of its own, which ``close()``, or the end of
            its block, closes.

        Raises:
            ImportError: paramiko or scp is not installed.

        Example:
            >>> with client.scp(order) as copy:
            ...     copy.put("train.py", "/root/train.py")
        """
        from clore_client.ssh.scp import hardened_scp
        from clore_client.ssh.sessions import login_options

        connection = self._ssh.login(order, timeout=timeout, **login_options(login)).open()
        try:
            return hardened_scp(
                connection,
                socket_timeout=timeout,
                max_bytes=max_bytes,
                progress=progress,
                owns_ssh=True,
            )
        except BaseException:
            connection.close()
            raise
