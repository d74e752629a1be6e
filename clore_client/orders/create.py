"""Create an order: check the arguments, send them once, and find the new order."""

from __future__ import annotations

import contextlib
import math
import random
import string
import time
from collections.abc import Sized
from typing import Any

from clore_client.api.call import Envelope
from clore_client.api.request import is_request_replaced, limited
from clore_client.errors import (
    CloreAPIError,
    CloreError,
    CurrencyNotAllowedError,
    DatabaseError,
    InsufficientBalanceError,
    InvalidInputError,
    OrderOutcomeUnknownError,
    Secret,
    ServerAlreadyRentedError,
)
from clore_client.log import logger
from clore_client.models.order import Order, created_id, to_orders
from clore_client.models.server import on_demand_usd
from clore_client.orders.account import SHORTEST_LIMIT, AccountOrders, Claims
from clore_client.orders.credentials import SavedLogin, purchase_fields, same_purchase
from clore_client.orders.funds import explain_balance
from clore_client.validation import (
    MAX_PASSWORD,
    MAX_TOKEN,
    check_currency,
    check_env,
    check_id,
    check_number,
    check_order_type,
    check_ports,
    check_public_key,
    check_secret,
    check_text,
    shortened,
)

DEFAULT_PORTS = {"22": "tcp"}
DEFAULT_ENV = {"NVIDIA_VISIBLE_DEVICES": "all"}
PASSWORD_LENGTH = 24
LOGIN = ("ssh_password", "ssh_key", "jupyter_token")
ALL_SERVERS = 0  # no server has this id
# A new order shows up after 2 to 20 seconds (seen on the live API). All in seconds.
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 2.0


def make_password() -> str:
    """Make a random password of letters and digits, which need no quoting."""
    alphabet = string.ascii_letters + string.digits
    source = random.SystemRandom()  # as safe as the module secrets, and imported already
    return Secret("".join(source.choice(alphabet) for _ in range(PASSWORD_LENGTH)))


def _none_if_empty(value: Any) -> Any:
    """Return None for an empty argument. 0 and False stay, so that the checks refuse them."""
    return None if isinstance(value, Sized) and len(value) == 0 else value


def _login(ssh_password: Any, ssh_key: Any, jupyter_token: Any) -> dict[str, str]:
    """Check the password, key and token of an order. An empty password or key counts as None."""
    ssh_password, ssh_key = _none_if_empty(ssh_password), _none_if_empty(ssh_key)
    if ssh_password is not None and ssh_key is not None:
        raise ValueError("ssh_password and ssh_key can't be used together: pass one of them")
    credentials: dict[str, str] = {}
    if ssh_key is not None:
        credentials["ssh_key"] = check_public_key("ssh_key", ssh_key)
    if ssh_password is not None:
        credentials["ssh_password"] = check_secret("ssh_password", ssh_password, MAX_PASSWORD)
    if jupyter_token is not None:
        credentials["jupyter_token"] = check_secret("jupyter_token", jupyter_token, MAX_TOKEN)
    return credentials


def order_body(order: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of an order, and return the body of its request, without a server.

    Parameters:
        order: the arguments of ``CloreClient.create_order`` that ``rent()`` takes, too, and the
            ``order_type``. Empty ``ports``, ``env``, password and key mean the default.
    """
    ports, env = _none_if_empty(order.get("ports")), _none_if_empty(order.get("env"))
    return {
        "type": check_order_type("order_type", order["order_type"]),
        "currency": check_currency("currency", order["currency"]),
        "image": check_text("image", order["image"]),
        "ports": dict(DEFAULT_PORTS) if ports is None else check_ports("ports", ports),
        "env": dict(DEFAULT_ENV) if env is None else check_env("env", env),
        **_login(*(order.get(name) for name in LOGIN)),
    }


class Purchase:
    """Make one purchase, from its arguments to the new order.

    Parameters:
        orders: the orders of the account.
        server_id: the server.
        order: what :func:`order_body` takes.

    Attributes:
        server_id, spot, currency, image: the fields by which the new order is found.
        body: the body of the request.
        credentials: the password, key and token in it.
        generated_password: the password, if the client generated it, or None.
        before: ids of older orders, which can't be the new one.
        baseline_read: whether ``before`` comes from a list that was read for this purchase.
        response: the response to ``create_order``; empty if none arrived.
    """

    def __init__(self, orders: AccountOrders, server_id: Any, order: dict[str, Any]) -> None:
        self._orders = orders
        self.server_id = check_id("server_id", server_id)
        self.body = {"renting_server": self.server_id, **order_body(order)}
        self.spot = self.body["type"] == "spot"
        self.currency: str = self.body["currency"]
        self.image: str = self.body["image"]
        self.generated_password: str | None = None
        if not self.body.keys() & {"ssh_key", "ssh_password"}:
            self.body["ssh_password"] = self.generated_password = make_password()
        self.credentials = {name: self.body[name] for name in LOGIN if name in self.body}
        self.before: frozenset[int] = frozenset()
        self.baseline_read = False
        self.response: dict[str, Any] = {}
        self._bid: float | None = None  # USD per hour
        self._saved: SavedLogin | None = None
        self._sent_at = time.monotonic()

    @property
    def sent_at(self) -> float:
        """The monotonic time at which the request was sent; after an error, of its first send."""
        return getattr(self.response, "sent_at", self._sent_at)

    def matches(self, order: Order) -> bool:
        """Return whether an order can be the result of this purchase. Missing fields are ignored.

        The live API has no idempotency key and returns no order id, so the fields must decide.
        """
        return (
            order.id is not None
            and order.id not in self.before
            and order.server_id == self.server_id
            and same_purchase(order, self.image, self.currency, self.spot)
            # Another process may just have ordered the same server.
            and not self._orders.credentials.has_other_login(
                self._orders.account, order.id, self.credentials
            )
        )

    # --- price and limits ---

    def set_bid(self, spot_price: float | None, allow_above: bool) -> None:
        """Add the bid of a spot order.

        Parameters:
            spot_price: the bid, in USD per hour.
            allow_above: whether to allow a bid far above the on-demand price.
        """
        if not self.spot:
            if spot_price is not None:
                logger.warning("spot_price is not sent: it needs order_type='spot'")
            return
        if spot_price is None:
            raise ValueError("spot_price is required for order_type='spot', in USD per hour")
        self._bid = check_number("spot_price", spot_price, above=True, unit="USD per hour")
        self.body["spotprice"] = self._orders.market.wire_bid(
            "spot_price", spot_price, self.server_id, self.currency, allow_above
        )

    def usd_per_hour(self) -> float | None:
        """Return the listed price or the bid in USD per hour, without fees; None if not known."""
        if self.spot:
            return self._bid
        server = self._orders.market.find_server(self.server_id)
        return None if server is None else on_demand_usd(server, self.currency)

    def learn_rate(self) -> None:
        """Try to read the exchange rate for the price of the order in USD, if it is not known.

        This is called before the purchase: an interrupt after the purchase would lose the order.
        """
        data = self._orders.market.data
        if data.rates.rate(self.currency) is None and not data.documented:
            self._orders.market.learn_rates(self.server_id)

    def preview(self) -> Order:
        """Return the body that would be sent, and its price."""
        return Order(body=self.body, usd_per_hour=self.usd_per_hour())

    def _check_limits(self) -> None:
        if self._orders.client.max_usd_per_hour is not None:
            self._orders.check_price(self.usd_per_hour(), f"an order of server {self.server_id}")
        self._orders.check_count()

    # --- send and reconcile ---

    def place(self, find_timeout: float) -> Order:
        """Send the purchase once, and return its order.

        Parameters:
            find_timeout: seconds to wait for the order to show up.

        Raises:
            OrderOutcomeUnknownError: the order may or may not exist.
            CloreError: the API refused, or nothing was sent.
        """
        claims = self._orders.claims
        # With a limit on active orders, two purchases at once could exceed it together.
        no_limit = self._orders.client.max_active_orders is None
        one = contextlib.nullcontext() if no_limit else claims.lock(ALL_SERVERS)
        try:
            with one, claims.lock(self.server_id):
                self._check_limits()
                self._read_baseline(find_timeout)
                order, purchase = self._submit_and_save(find_timeout)
        except CurrencyNotAllowedError as error:
            error.add_hint(
                f"the host does not accept {self.currency}: choose a server found with "
                f"currency={self.currency!r}, or pay with another currency="
            )
            raise
        except InsufficientBalanceError as error:
            with contextlib.suppress(Exception):  # the refusal matters more than its explanation
                price = self.usd_per_hour()
                explain_balance(self._orders, error, self.currency, price, self.spot)
            raise
        if order.id is not None:
            self._orders.made[order.id] = order.copy()
        logger.info("order %s of server %d was made", order.id, self.server_id)
        with contextlib.suppress(CloreError):
            self._orders.tidy_credentials({*self.before, order.id or 0})
        order["code"] = 0
        if purchase.generated_password:
            order["ssh_password"] = str(purchase.generated_password)
        return order

    def _read_baseline(self, find_timeout: float) -> None:
        """Record the existing orders before the purchase is sent."""
        orders, data = self._orders, self._orders.market.data
        self.before = frozenset(orders.known)
        if not data.live and (is_request_replaced(orders.client) or data.documented):
            return  # the response will have the order id
        # The live API returns no order id, so record which orders can't be the new one.
        patience = orders.client.rate_limit + max(find_timeout / 2, SHORTEST_LIMIT)
        with contextlib.suppress(CloreError):
            listed, response = limited(
                lambda: orders.read(completed=False), deadline=time.monotonic() + patience
            )
            if isinstance(response, Envelope):  # a fake client in a test may have a fixed list
                self.before |= {order.id for order in listed if order.id is not None}
                self.baseline_read = True

    def _submit_and_save(self, find_timeout: float) -> tuple[Order, Purchase]:
        """Save the credentials, and send the purchase."""
        orders = self._orders
        fields = purchase_fields(self.server_id, self, self.before, orders.client.server_clock)
        saved = self._saved = orders.credentials.save(orders.account, self.credentials, fields)
        try:
            order, purchase = self._submit(find_timeout)
        except (OrderOutcomeUnknownError, DatabaseError):  # the order may exist
            raise
        except Exception as error:
            saved.drop()
            if isinstance(error, InvalidInputError):
                self._explain(error)
            raise
        except BaseException:
            logger.warning(
                "interrupted while server %d was ordered: an order may exist, so check "
                "get_orders()",
                self.server_id,
            )
            raise
        if purchase is not self:
            saved.drop()
        if order.id is not None and purchase._saved is not None:
            orders.credentials.assign(orders.account, order.id, purchase._saved)
        return order, purchase

    def _explain(self, error: InvalidInputError) -> None:
        """Add a hint if the API refused an order because it has no such server."""
        with contextlib.suppress(CloreError):
            if self._orders.market.find_server(self.server_id) is None:
                error.add_hint(
                    f"there is no server {self.server_id} on the marketplace, so nothing was "
                    "ordered: choose one of find_servers()"
                )

    def _submit(self, find_timeout: float) -> tuple[Order, Purchase]:
        """Send the purchase, and return the order and its purchase, which can be an earlier one."""
        claims, server_id = self._orders.claims, self.server_id
        earlier = claims.unresolved.get(server_id)
        claims.unresolved[server_id] = self  # set before the request, which can be interrupted
        self._sent_at = time.monotonic()
        send_error: CloreError | None = None
        try:
            self.response = self._orders.client._request("POST", "/v1/create_order", json=self.body)
        except (OrderOutcomeUnknownError, DatabaseError) as error:
            send_error, self._sent_at = error, error.sent_at or self._sent_at
        except Exception as error:  # the API refused, or the request was not sent
            if earlier is None:
                claims.unresolved.pop(server_id, None)
                raise
            claims.unresolved[server_id] = earlier
            if not isinstance(error, ServerAlreadyRentedError):
                raise
            # An earlier purchase, whose response was lost, may have rented the server.
            return earlier._find(find_timeout, error), earlier
        if (order_id := created_id(self.response)) is None:
            return self._find(find_timeout, send_error), self
        claims.take(order_id, self)
        claims.unresolved.pop(server_id, None)
        return self._named_order(order_id), self

    def _named_order(self, order_id: int) -> Order:
        """Return the order of a response that has an order id."""
        response = {**self.response, "order_id": order_id}
        made = to_orders({"orders": [response]}, (), self._orders.market.data.rates)[0]
        if made.server_id is None:
            made["renting_server"] = self.server_id
        made.setdefault("currency", self.currency)
        made.setdefault("status", "creating")
        made.setdefault("connection", {"ssh": "", "http_ports": {}})
        return made

    # --- find the order, when the response had no order id or was lost ---

    def _find(self, timeout: float, send_error: CloreError | None) -> Order:
        """Read the active orders until the order of this purchase shows up, and claim it.

        Parameters:
            timeout: seconds.
            send_error: the error of the request, after which the order may exist; or None.

        Raises:
            OrderOutcomeUnknownError: no order showed up in time, or several match. Its cause is the
                error of the last read, if that failed, else ``send_error``.
            CloreAPIError: ``send_error`` itself, if the API refused and complete lists do not have
                the order.
        """
        claims, pause = self._orders.claims, FIRST_PAUSE
        deadline = time.monotonic() + timeout
        while True:
            cause: CloreError | None = None
            possible: list[Order] = []
            created_after = None
            try:
                listed, created_after = self._read_active(timeout, deadline)
                possible = claims.free([o for o in listed if self.matches(o)], self)
            except CloreError as error:
                cause = error
            found = [o for o in possible if _is_new(o, created_after, claims.clock_offset)]
            remaining = deadline - time.monotonic()
            if remaining <= 0 and not found and self.baseline_read:
                # The clocks may differ, but an order that is not in the baseline must be new.
                found = [order for order in possible if not order.has_ended]
            if len(found) == 1 and claims.take(found[0].id or 0, self):
                _learn_offset(claims, found[0], created_after)
                claims.unresolved.pop(self.server_id, None)
                return found[0]
            if len(found) > 1 or remaining <= 0:
                if isinstance(send_error, CloreAPIError) and not possible and cause is None:
                    raise send_error  # complete lists without the order confirm the refusal
                raise self._not_found(found or possible, timeout, send_error) from (
                    cause or send_error
                )
            time.sleep(min(pause, remaining))
            pause = min(pause * 1.5, LONGEST_PAUSE)

    def _read_active(self, timeout: float, deadline: float) -> tuple[list[Order], float | None]:
        """Read the active orders, and compute the send time by the server's clock."""
        client = self._orders.client
        # One slow response must not use all the time.
        patience = shortened(client.timeout, max(timeout / 2, SHORTEST_LIMIT))
        until = client.rate_limit + max(deadline, time.monotonic() + SHORTEST_LIMIT)
        listed, listing = limited(
            lambda: self._orders.read(completed=False, timeout=patience), deadline=until
        )
        # The Date of each response gives a lower bound, and the largest one is the closest.
        clocks = [
            clock
            for response in (self.response, listing)
            if isinstance(response, Envelope)
            and (clock := response.server_time_at(self.sent_at)) is not None
        ]
        return listed, max(clocks, default=None)

    def _not_found(
        self, orders: list[Order], timeout: float, send_error: CloreError | None
    ) -> OrderOutcomeUnknownError:
        ids = tuple(order.id for order in orders if order.id is not None)
        made = "was made" if send_error is None else "may have been made"
        which = f"it is not clear if it is one of {', '.join(map(str, ids))}: check get_orders()"
        if not ids:
            which = (
                f"it did not show up in the order lists within {timeout:g}s. It was not sent "
                "again: check get_orders() now and again in a minute,"
            )
        return OrderOutcomeUnknownError(
            f"an order for server {self.server_id} {made}, but {which} before you order again",
            server_id=self.server_id,
            order_ids=ids,
            credentials=self.credentials,
        )


def _is_new(order: Order, created_after: float | None, offset: float) -> bool:
    """Return whether an order was made after ``created_after``, if that is known."""
    if created_after is None:
        return not order.has_ended
    return order.started_at is not None and order.started_at >= created_after + offset


def _learn_offset(claims: Claims, order: Order, created_after: float | None) -> None:
    """Record how far the creation time of an order is behind the server's clock."""
    if created_after is not None and order.started_at is not None:
        behind = math.floor(order.started_at - created_after)
        claims.clock_offset = min(claims.clock_offset, behind)
