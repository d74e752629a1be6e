"""What a client remembers of its account, and what its methods have in common."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from clore_client.api.request import Transport, limited
from clore_client.api.retry import Envelope
from clore_client.errors import (
    CancelUnconfirmedError,
    CloreAPIError,
    CloreError,
    DatabaseError,
    InvalidResponseError,
    OrderEndedError,
    OrderFateUnknownError,
    OrderNotFoundError,
    ServerAlreadyRentedError,
)
from clore_client.log import logger
from clore_client.market.spot import MarketMemory, surely_documented
from clore_client.models.order import Order, created_id, to_orders
from clore_client.models.record import whole_id
from clore_client.models.server import Server, listed_prices, to_servers
from clore_client.orders.cancel import OrderState, confirm_ended
from clore_client.orders.claims import Claims, claims_for
from clore_client.orders.create import Draft, Search, find_order, sent_by_server_clock
from clore_client.orders.limits import (
    check_order_ceiling,
    check_price_ceiling,
    purchase_usd_per_hour,
)
from clore_client.pricing import finite
from clore_client.validation import check_currency, check_number, shortened

ALL_SERVERS = 0  # no server has that id
SHORTEST_LOOK = 1.0  # seconds that an answer may take at least


class Account(Transport):
    """The part of the client between its methods and single API calls."""

    # --- what a client remembers ---

    @property
    def _market(self) -> MarketMemory:
        """What is known of the API behind the base URL of this moment."""
        # In __dict__ and not in __init__: a subclass may not call that.
        memories: dict[str, MarketMemory] = self.__dict__.setdefault("_memories", {})
        return memories.setdefault(self._base_url, MarketMemory())

    @property
    def _cancelled(self) -> set[int]:
        """Ids of the orders that this client cancelled."""
        ids: set[int] = self.__dict__.setdefault("_cancelled_ids", set())
        return ids

    @property
    def _seen(self) -> set[int]:
        """Ids of the orders that this client has seen active."""
        ids: set[int] = self.__dict__.setdefault("_seen_ids", set())
        return ids

    @property
    def _ended(self) -> set[int]:
        """Ids of the orders that are known to have ended."""
        ids: set[int] = self.__dict__.setdefault("_ended_ids", set())
        return ids

    @property
    def _claims(self) -> Claims:
        """Which orders of the account are taken; a fake without a key has them for itself."""
        if self.api_key:
            return claims_for(self._base_url, self.api_key)
        claims: Claims = self.__dict__.setdefault("_own_claims", Claims())
        return claims

    @property
    def _made(self) -> dict[int, Order]:
        """The orders that this client made, as they were then."""
        made: dict[int, Order] = self.__dict__.setdefault("_made_orders", {})
        return made

    @property
    def _on_bid(self) -> dict[int, Callable[[float], None]]:
        """Order id -> whom to tell of a new bid, in USD per hour."""
        watchers: dict[int, Callable[[float], None]]
        watchers = self.__dict__.setdefault("_bid_watchers", {})
        return watchers

    @property
    def _credentials(self) -> dict[int, dict[str, str]]:
        """Order id -> what was sent with it to get in."""
        sent: dict[int, dict[str, str]] = self.__dict__.setdefault("_sent_credentials", {})
        return sent

    # --- reads ---

    def _marketplace(self) -> dict[str, Any]:
        answer = self._request("GET", "/v1/marketplace")
        market = self._market
        market.saw(answer)
        market.listed = listed_prices(answer, market.rates)
        return answer

    def _spot_market(self, server_id: int) -> dict[str, Any]:
        answer = self._request("GET", "/v1/spot_marketplace", params={"market": server_id})
        self._market.saw_market(answer)
        return answer

    def _orders(self, completed: bool, **options: Any) -> tuple[list[Order], dict[str, Any]]:
        params = {"return_completed": "true"} if completed else None
        answer = self._request("GET", "/v1/my_orders", params=params, **options)
        if isinstance(answer, Envelope) and not isinstance(answer.get("orders"), list):
            # An answer to something else, perhaps: it does not say that there is no order.
            raise InvalidResponseError(-1, "no list of orders", answer, endpoint="/v1/my_orders")
        self._market.saw(answer)
        orders = to_orders(answer, self._cancelled, self._market.rates)
        self._seen.update(o.id for o in orders if o.id is not None and not o.has_ended)
        return orders, answer

    def _known(self) -> set[int]:
        """Ids of all orders that this client has made, seen active, or cancelled."""
        return {*self._made, *self._seen, *self._cancelled}

    def _active_ids(self) -> list[int]:
        """The orders that cost money, and those that may, though they are not listed now."""
        orders, _ = self._orders(completed=False)
        active = [order.id for order in orders if order.id is not None and not order.has_ended]
        missing = self._known() - set(active) - self._ended
        if missing - self._cancelled:
            ended, _ = self._orders(completed=True)
            self._ended.update(o.id for o in ended if o.id is not None and o.has_ended)
        return active + sorted(missing - self._cancelled - self._ended)

    def _order(self, order_id: int) -> Order | None:
        for completed in (False, True):
            for order in self._orders(completed)[0]:
                if order.id == order_id:
                    return order
        return None

    def _order_state(self, order_id: int) -> OrderState:
        """What the two order lists say of an order.

        Raises:
            OrderNotFoundError: it is the number of a server.
            CloreError: the lists can't be read, or are not whole.
        """
        for completed in (False, True):
            orders, answer = self._orders(completed)
            for order in orders:
                if order.id == order_id:
                    return OrderState.ENDED if order.has_ended else OrderState.ACTIVE
                if order.server_id == order_id and not order.has_ended:
                    raise OrderNotFoundError(
                        f"there is no order {order_id}: that is the server of order {order.id}",
                        order_id=order_id,
                    )
            listed = answer.get("orders")
            ids = [order.id for order in orders if order.id is not None]
            if not isinstance(listed, list) or len(ids) != len(listed):
                raise CloreError("the orders are not listed whole: that decides nothing")
        return OrderState.ABSENT

    def _confirm(self, order_ids: tuple[int, ...], timeout: float) -> None:
        """Wait until cancelled orders have ended in the lists as well."""
        deadline = time.monotonic() + timeout
        for at, order_id in enumerate(order_ids):
            failure = confirm_ended(self, order_id, deadline)
            if failure is not None:
                left = order_ids[at:]
                raise CancelUnconfirmedError(
                    f"cancelled, but still active after {timeout:g}s: {', '.join(map(str, left))}",
                    order_ids=left,
                ) from failure
            self._ended.add(order_id)

    # --- purchases ---

    def _place(self, draft: Draft, find_timeout: float) -> tuple[Order, Draft]:
        """Send an order, and find out what became of it; also gives the draft that it is of."""
        server_id, claims = draft.wanted.server_id, self._claims
        # One purchase at a time under a ceiling, else two could each be the last that is allowed.
        no_ceiling = self.max_active_orders is None
        one = contextlib.nullcontext() if no_ceiling else claims.turn(ALL_SERVERS)
        with one, claims.turn(server_id):
            search = self._new_search(draft, find_timeout)
            earlier = claims.unresolved.get(server_id)
            claims.unresolved[server_id] = search  # before it is sent: an interrupt can come then
            doubt: CloreError | None = None
            try:
                search.answer = self._request("POST", "/v1/create_order", json=draft.body)
            except (OrderFateUnknownError, DatabaseError) as error:
                doubt, search.sent_at = error, error._sent_at or search.sent_at
            except Exception as error:  # a refusal, or it was not sent
                if earlier is None:
                    claims.unresolved.pop(server_id, None)
                    raise
                claims.unresolved[server_id] = earlier
                if not isinstance(error, ServerAlreadyRentedError):
                    raise
                # Maybe it is us who rent it, by an order whose answer was lost.
                return self._find(earlier, find_timeout, error), earlier.draft
            if (order_id := created_id(search.answer)) is None:
                return self._find(search, find_timeout, doubt), draft
            claims.take(order_id, search)
            claims.unresolved.pop(server_id, None)
            return self._answered(search, order_id), draft

    def _new_search(self, draft: Draft, find_timeout: float) -> Search:
        """Note which orders are there before a purchase is sent."""
        before, complete = self._known(), False
        replaced = getattr(self._request, "__func__", None) is not Transport._request
        if self._market.live or not (replaced or self._market.documented):
            # The live API names no order in its answer: what is there now can't be the new one.
            patience = self.rate_limit + max(find_timeout / 2, SHORTEST_LOOK)
            with contextlib.suppress(CloreError):
                orders, answer = limited(
                    lambda: self._orders(completed=False), deadline=time.monotonic() + patience
                )
                if isinstance(answer, Envelope):  # a fake's list is the same before and after
                    before |= {order.id for order in orders if order.id is not None}
                    complete = True
        return Search(draft, frozenset(before), complete)

    def _answered(self, search: Search, order_id: int) -> Order:
        """The order of an answer that names it."""
        answer = {**search.answer, "order_id": order_id}
        made = to_orders({"orders": [answer]}, (), self._market.rates)[0]
        if made.server_id is None:
            made["renting_server"] = search.draft.wanted.server_id
        made.setdefault("currency", search.draft.wanted.currency)
        made.setdefault("status", "creating")
        made.setdefault("connection", {"ssh": "", "http_ports": {}})
        return made

    def _find(self, search: Search, timeout: float, doubt: CloreError | None) -> Order:
        """Search my_orders for an order that was sent, and may have been made."""
        claims, server_id = self._claims, search.draft.wanted.server_id
        deadline = time.monotonic() + timeout + self.rate_limit
        # One answer that does not come must not take all the time that there is.
        patience = shortened(self.timeout, max(timeout / 2, SHORTEST_LOOK))

        def look() -> tuple[list[Order], float | None]:
            orders, listing = limited(
                lambda: self._orders(completed=False, timeout=patience),
                deadline=max(deadline, time.monotonic() + self.rate_limit + SHORTEST_LOOK),
            )
            return orders, sent_by_server_clock(search.sent_at, search.answer, listing)

        try:
            order = find_order(look, search, claims, timeout, doubt)
        except OrderFateUnknownError as unknown:
            if unknown.order_ids or unknown.__cause__ is not doubt or doubt is None:
                raise
            if isinstance(doubt, CloreAPIError):  # whole lists without it: the refusal is true
                raise doubt from None
            raise
        except (KeyboardInterrupt, SystemExit):
            logger.warning(
                "interrupted while an order of server %d was looked up, which may have been "
                "made: see get_orders()",
                server_id,
            )
            raise
        claims.unresolved.pop(server_id, None)
        return order

    # --- ceilings ---

    def _check_purchase(self, body: Any) -> None:
        if self.max_usd_per_hour is None and self.max_active_orders is None:
            return
        if not isinstance(body, dict):
            raise TypeError("with a ceiling, json of create_order must be a dict")
        if self.max_usd_per_hour is not None:
            what = f"an order of server {body.get('renting_server')}"
            check_price_ceiling(self._usd_per_hour(body), self.max_usd_per_hour, what)
        if self.max_active_orders is not None:
            check_order_ceiling(self._active_ids(), self.max_active_orders)

    def _usd_per_hour(self, body: dict[str, Any]) -> float | None:
        """What an order with this body costs by today's listing, or by its bid."""
        server_id, currency = whole_id(body.get("renting_server")), body.get("currency")
        if body.get("type") == "spot" and server_id is not None and isinstance(currency, str):
            self._ensure_rates(server_id, currency)

        def find_server(wanted: int) -> Server | None:
            listed = to_servers(self._marketplace(), include_rented=True, server_id=wanted)
            return listed[0] if listed else None

        return purchase_usd_per_hour(body, find_server, self._market)

    # --- bids ---

    def _ensure_rates(self, server_id: int, currency: str) -> None:
        market = self._market
        if not market.documented and currency not in market.rates.fresh():
            self._spot_market(server_id)

    def _spot_bid(self, draft: Draft, spot_price: float, above: bool) -> float:
        wanted = draft.wanted
        check_number("spot_price", spot_price, above=True, unit="USD per hour")
        market = self._market
        market.check_bid_price("spot_price", spot_price, wanted.server_id, above)
        self._ensure_rates(wanted.server_id, wanted.currency)
        return market.wire_bid(spot_price, wanted.currency, wanted.server_id)

    def _new_bid(self, order: Order, new_price: float, above: bool) -> float:
        market = self._market
        if order.has_ended:
            raise OrderEndedError(
                f"Order {order.id} has ended, with status {order.status}: nothing was bid",
                order_id=order.id or 0,
                status=order.status or "",
                order=order,
            )
        if order.is_spot is False:
            raise ValueError(f"order {order.id} is no spot order: nothing was bid")
        check_price_ceiling(new_price, self.max_usd_per_hour, f"the bid for order {order.id}")
        market.check_bid_price("new_price", new_price, order.server_id, above)
        if surely_documented(order):
            return new_price
        currency, server_id = order.get("currency"), order.server_id
        if server_id is None or not isinstance(currency, str):
            raise OrderNotFoundError(
                f"order {order.id} does not tell its server and currency: nothing was bid",
                order_id=order.id,
            )
        currency = check_currency("the order's currency", currency)
        self._ensure_rates(server_id, currency)
        return market.wire_bid(new_price, currency, server_id)

    def _tell_bid(self, order_id: int, usd_per_hour: float) -> None:
        """Tell whoever counts the cost of an order of its new price."""
        if (tell := self._on_bid.get(order_id)) is not None:
            tell(usd_per_hour)

    def _bid_shows(self, before: Order, bid: float) -> bool:
        """Whether an order now shows a bid that was sent."""
        after = self._order(before.id or 0)
        shown = finite(after.wire.get("price")) if after is not None else None
        if shown is None:
            return False
        if surely_documented(before):
            # Its price is in the order's currency, the bid in USD: what tells is that it changed.
            return shown != finite(before.wire.get("price"))
        return abs(shown - bid) <= max(1e-6 * bid, 1e-8)  # bitcoin has eight digits
