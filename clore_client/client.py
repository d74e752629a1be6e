"""CloreClient: a thin method for each thing that a renter does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from clore_client.api.request import limited
from clore_client.config import state_folder
from clore_client.errors import (
    ERROR_CODES,
    AuthenticationError,
    CancelUnconfirmedError,
    CloreConnectionError,
    CloreError,
    ConfigurationError,
    DatabaseError,
    InvalidResponseError,
    OrderNotFoundError,
    RateLimitError,
    SpotPriceTooSoonError,
)
from clore_client.log import logger
from clore_client.market.spot import with_hourly_offers
from clore_client.models.order import Order
from clore_client.models.server import Server, cheapest_first, to_servers
from clore_client.models.wallet import Wallet, to_wallets
from clore_client.orders.account import SHORTEST_LOOK
from clore_client.orders.cancel import ended_among, send_in_batches, settle_cancel
from clore_client.orders.create import draft_order
from clore_client.orders.wait import wait_for_status
from clore_client.pricing import wire_currency
from clore_client.rental.recovery import Leftovers, end_leftovers, find_leftovers
from clore_client.rental.rental import Rental
from clore_client.rental.selection import Wish
from clore_client.rental.signals import SignalHandling
from clore_client.ssh.machine import Machine
from clore_client.validation import (
    check_bool,
    check_callback,
    check_id,
    check_ids,
    check_interval,
    check_number,
    check_string,
    check_text,
)

C = TypeVar("C", bound="CloreClient")

MAX_ISSUE = 2048  # characters of ``issue`` that the API takes


class CloreClient(Machine):
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

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        key = "a key" if self.api_key else "no key"
        return f"<{type(self).__name__} of {self.BASE_URL} with {key}>"

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
        return to_servers(self._marketplace(), include_rented=include_rented)

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
            self._marketplace(),
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
        orders, _ = self._orders(check_bool("include_completed", include_completed))
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
        return self._order(check_id("order_id", order_id))

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
            OrderFateUnknownError: an order may or may not have been made, or it can't be told
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
        draft = draft_order(
            server_id, image, order_type, currency, ports, env, ssh_password, ssh_key, jupyter_token
        )
        check_number("find_timeout", find_timeout, unit="seconds")
        check_bool("allow_above_on_demand", allow_above_on_demand)
        if draft.wanted.spot:
            if spot_price is None:
                raise ValueError("spot_price is required for order_type='spot', in USD per hour")
            draft.body["spotprice"] = self._spot_bid(draft, spot_price, allow_above_on_demand)
        elif spot_price is not None:
            logger.warning("spot_price is only used with order_type='spot': it is not sent")
        if check_bool("preview", preview):
            usd_per_hour = self._usd_per_hour(draft.body)
            shown = Order(body=draft.body, usd_per_hour=usd_per_hour)
            shown._usd_per_hour = usd_per_hour
            return shown
        order, draft = self._place(draft, find_timeout)
        if order.id is not None:
            self._credentials[order.id] = draft.credentials
            self._made[order.id] = order.copy()
        logger.info("order %s of server %d was made", order.id, draft.wanted.server_id)
        order["code"] = 0
        if draft.made_up_password:
            order["ssh_password"] = draft.made_up_password
        return order

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
        limited(lambda: self._cancel(wanted, issue, settle_timeout), urgent=True)
        if confirm:
            self._confirm((wanted,), confirm_timeout)
        return True

    def _send_cancel(self, order_id: int, issue: str | None = None) -> None:
        body = {"id": order_id, **({"issue": issue[:MAX_ISSUE]} if issue else {})}
        self._request("POST", "/v1/cancel_order", json=body)
        self._cancelled.add(order_id)
        logger.info("order %d was cancelled", order_id)

    def _cancel(self, order_id: int, issue: str | None, patience: float | None) -> None:
        try:
            self._send_cancel(order_id, issue)
        except ConfigurationError:
            raise
        except CloreError as error:
            unsent = isinstance(error, CloreConnectionError) and error._sent_at is None
            if unsent or isinstance(error, (AuthenticationError, RateLimitError)):
                # The lists would say nothing new.
                error.args = (f"{error}\norder {order_id} may still be running, and cost money",)
                raise
            settle_cancel(self, order_id, error, patience)
            self._cancelled.add(order_id)

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
        return limited(lambda: self._cancel_all(confirm, confirm_timeout), urgent=True)

    def _cancel_all(self, confirm: bool, confirm_timeout: float) -> list[int]:
        ids = self._active_ids()
        failed = self._send_cancels(ids)[1] if ids else []
        ended = ended_among(self, failed, confirm_timeout)
        left = tuple(i for i in failed if i not in ended)
        if left:
            raise CancelUnconfirmedError(
                f"not cancelled: {', '.join(map(str, left))}", order_ids=left
            )
        if confirm and ids:
            self._confirm(tuple(ids), confirm_timeout)
        return ids

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
        ids = check_ids("order_ids", order_ids)
        if not ids:
            return {"code": 0, "failed_to_cancel": []}
        answer, failed = self._send_cancels(ids)
        if failed and getattr(answer, "sends", 1) > 1:
            # Sent again after a lost answer, it fails for those that the first one ended.
            ended = {str(i) for i in ended_among(self, failed)}
            answer["failed_to_cancel"] = [
                i for i in answer["failed_to_cancel"] if str(i) not in ended
            ]
        return answer

    def _send_cancels(self, ids: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Send ``cancel_orders``; also gives those of the ids that failed."""
        return send_in_batches(self._send_cancel_batch, ids)

    def _send_cancel_batch(self, ids: list[int]) -> tuple[dict[str, Any], list[int]]:
        answer = self._request("POST", "/v1/cancel_orders", json={"order_ids": ids})
        listed = answer.get("failed_to_cancel")
        names = {str(i) for i in listed} if isinstance(listed, list) else set()
        failed = [i for i in ids if str(i) in names]
        done = [i for i in ids if i not in failed]
        self._cancelled.update(done)
        logger.info("orders %s were cancelled, %s were not", done, failed)
        return answer, failed

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

        def look(deadline: float) -> Order | None:
            # The last look starts at the deadline, and gets its turn: two reads at most.
            last = time.monotonic() + 2 * self.rate_limit + SHORTEST_LOOK
            return limited(lambda: self.get_order(wanted), deadline=max(deadline, last))

        return wait_for_status(look, wanted, timeout, poll_interval, target_status, on_update)

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
            OrderFateUnknownError: an order may have been made.
            BudgetExceededError: by calls of the rental, and when the block is left.

        Example:
            >>> with client.rent("RTX 4090", max_price_usd=0.40, max_hours=2) as rental:
            ...     print(rental.run("nvidia-smi -L").stdout)
        """
        wish = Wish(
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
        return Rental(self, wish, state_folder(self._state_dir))

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
        check_number("wait", wait, unit="seconds")
        folder = state_folder(self._state_dir)
        return limited(lambda: find_leftovers(self, folder, wait), urgent=True)

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
        check_number("wait", wait, unit="seconds")
        check_number("cancel_timeout", cancel_timeout, infinite=True, unit="seconds")
        folder = state_folder(self._state_dir)
        return limited(lambda: end_leftovers(self, folder, wait, cancel_timeout), urgent=True)

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
        return with_hourly_offers(self._spot_market(check_id("server_id", server_id)))

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
        # One that was just made may not be listed yet.
        order = self.get_order(wanted) or self._made.get(wanted)
        if order is None:
            raise OrderNotFoundError(
                f"there is no order {wanted}: nothing was bid", order_id=wanted
            )
        bid = self._new_bid(order, new_price, allow_above_on_demand)
        body = {"order_id": wanted, "desired_price": bid}
        accepted = True
        try:
            answer = self._request("POST", "/v1/set_spot_price", json=body)
            accepted = answer.get("error") in (None, "")
        except SpotPriceTooSoonError as error:
            # Sent again after a lost answer, it is refused because the first one was carried out.
            if error.sends <= 1 or not self._bid_shows(order, bid):
                raise
        except (CloreConnectionError, DatabaseError, InvalidResponseError):
            # It may have been carried out: a budget counts the higher price.
            self._tell_bid(wanted, max(new_price, order.usd_per_hour or 0.0))
            raise
        if accepted:
            self._tell_bid(wanted, new_price)
        return accepted
