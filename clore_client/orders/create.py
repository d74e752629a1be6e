"""Making an order: the body that is sent, and finding the order that the API made of it."""

from __future__ import annotations

import math
import random
import string
import time
from collections.abc import Callable, Sized
from typing import Any

from clore_client.api.retry import Envelope
from clore_client.errors import CloreError, OrderFateUnknownError
from clore_client.models.order import Order
from clore_client.orders.claims import Claims, Wanted
from clore_client.validation import (
    MAX_PASSWORD,
    MAX_TOKEN,
    check_currency,
    check_env,
    check_id,
    check_order_type,
    check_ports,
    check_public_key,
    check_secret,
    check_text,
)

DEFAULT_PORTS = {"22": "tcp"}
DEFAULT_ENV = {"NVIDIA_VISIBLE_DEVICES": "all"}
PASSWORD_LENGTH = 24
# A new order shows up 2 to 20 seconds after it was made (seen on the live API).
FIRST_LOOK = 0.2
LONGEST_PAUSE = 2.0


class Draft:
    """An order that is to be made: what is sent, and what is kept."""

    def __init__(
        self,
        wanted: Wanted,
        body: dict[str, Any],
        made_up_password: str | None,
        credentials: dict[str, str],
    ) -> None:
        self.wanted = wanted
        self.body = body
        self.made_up_password = made_up_password
        self.credentials = credentials


class Search:
    """A purchase that was sent: what is needed to find its order.

    Attributes:
        draft: what was sent.
        before: ids of orders that were there before it was sent, and so are not its own.
        complete: whether ``before`` comes from a list that was read for this purchase.
        answer: of ``create_order``; empty where none came.
    """

    def __init__(self, draft: Draft, before: frozenset[int], complete: bool) -> None:
        self.draft = draft
        self.before = before
        self.complete = complete
        self.answer: dict[str, Any] = {}
        self._sent_at = time.monotonic()

    @property
    def sent_at(self) -> float:
        """When it left, by ``time.monotonic()``; before its answer came, at the earliest."""
        return getattr(self.answer, "sent_at", self._sent_at)

    @sent_at.setter
    def sent_at(self, moment: float) -> None:
        self._sent_at = moment


def make_password() -> str:
    """A password that nobody guesses, of characters that need no quoting anywhere."""
    alphabet = string.ascii_letters + string.digits
    source = random.SystemRandom()  # the system's source, as the module secrets uses it
    return "".join(source.choice(alphabet) for _ in range(PASSWORD_LENGTH))


def _given(value: Any) -> Any:
    """An argument, or None for what is empty; 0 and False are no empty ones, but slips."""
    return None if isinstance(value, Sized) and len(value) == 0 else value


def check_login(ssh_password: Any, ssh_key: Any, jupyter_token: Any) -> dict[str, str]:
    """What was given to get into the machine, checked; an empty password or key is none."""
    ssh_password, ssh_key = _given(ssh_password), _given(ssh_key)
    if ssh_password is not None and ssh_key is not None:
        raise ValueError("ssh_password and ssh_key exclude each other: give one of them")
    credentials: dict[str, str] = {}
    if ssh_key is not None:
        credentials["ssh_key"] = check_public_key("ssh_key", ssh_key)
    if ssh_password is not None:
        credentials["ssh_password"] = check_secret("ssh_password", ssh_password, MAX_PASSWORD)
    if jupyter_token is not None:
        credentials["jupyter_token"] = check_secret("jupyter_token", jupyter_token, MAX_TOKEN)
    return credentials


def order_ports(ports: Any) -> dict[str, str]:
    """The ports that are sent; empty ones mean the default."""
    return dict(DEFAULT_PORTS) if _given(ports) is None else check_ports("ports", ports)


def order_env(env: Any) -> dict[str, str]:
    """The environment that is sent; an empty one means the default."""
    return dict(DEFAULT_ENV) if _given(env) is None else check_env("env", env)


def draft_order(
    server_id: Any,
    image: Any,
    order_type: Any,
    currency: Any,
    ports: Any,
    env: Any,
    ssh_password: Any,
    ssh_key: Any,
    jupyter_token: Any,
) -> Draft:
    """Check the arguments of ``create_order`` and make its body, all but a spot price."""
    wanted = Wanted(
        server_id=check_id("server_id", server_id),
        spot=check_order_type("order_type", order_type) == "spot",
        currency=check_currency("currency", currency),
        image=check_text("image", image),
    )
    credentials = check_login(ssh_password, ssh_key, jupyter_token)
    made_up = None
    if not credentials.keys() & {"ssh_key", "ssh_password"}:
        credentials["ssh_password"] = made_up = make_password()
    body = {
        "renting_server": wanted.server_id,
        "type": order_type,
        "currency": wanted.currency,
        "image": wanted.image,
        "ports": order_ports(ports),
        "env": order_env(env),
        **credentials,
    }
    return Draft(wanted, body, made_up, credentials)


def sent_by_server_clock(sent_at: float, *answers: dict[str, Any]) -> float | None:
    """The moment of sending in Unix time by the server's clock, rounded down.

    Each answer's ``Date`` bounds it from below, the quickest answer most closely.

    Parameters:
        sent_at: by ``time.monotonic()``.
        answers: what came back since.
    """
    clocks = [answer.server_time_at(sent_at) for answer in answers if isinstance(answer, Envelope)]
    return max((clock for clock in clocks if clock is not None), default=None)


def find_order(
    look: Callable[[], tuple[list[Order], float | None]],
    search: Search,
    claims: Claims,
    timeout: float,
    doubt: CloreError | None = None,
) -> Order:
    """Look until the order that was just made shows up, and claim it.

    Parameters:
        look: gives the orders of the account, and the moment of sending by the server's clock.
        search: the purchase.
        claims: what other calls of this process have taken for theirs.
        timeout: seconds.
        doubt: why it is not sure that an order was made, where that is so.

    Raises:
        OrderFateUnknownError: none showed up in time, or two fit. Its cause is the failure of the
            last look, where that failed; else the doubt.
    """
    deadline, pause = time.monotonic() + timeout, FIRST_LOOK
    while True:
        cause: CloreError | None = None
        possible: list[Order] = []
        created_after = None
        try:
            orders, created_after = look()
            possible = candidates_of(search, claims, orders)
        except CloreError as error:
            cause = error
        found = [o for o in possible if _is_new(o, created_after, claims.clock_offset)]
        remaining = deadline - time.monotonic()
        if remaining <= 0 and not found and search.complete:
            # The clocks may be apart: nothing else can be the one order that was not there before.
            found = [order for order in possible if not order.has_ended]
        if len(found) == 1 and claims.take(found[0].id or 0, search):
            learn_offset(claims, found[0], created_after)
            return found[0]
        if len(found) > 1 or remaining <= 0:
            raise _not_found(search.draft, found or possible, timeout, doubt) from (cause or doubt)
        time.sleep(min(pause, remaining))
        pause = min(pause * 1.5, LONGEST_PAUSE)


def candidates_of(search: Search, claims: Claims, orders: list[Order]) -> list[Order]:
    """Return the orders that can come of a purchase, whatever the clocks say."""
    fitting = [o for o in orders if o.id not in search.before and search.draft.wanted.fits(o)]
    return claims.free(fitting, search)


def _is_new(order: Order, created_after: float | None, offset: float) -> bool:
    """Whether an order was made after ``created_after``, as far as that is known."""
    if created_after is None:
        return not order.has_ended
    return order.started_at is not None and order.started_at >= created_after + offset


def learn_offset(claims: Claims, order: Order, created_after: float | None) -> None:
    """Remember by how much the orders' clock lies behind the server's, from an order of ours."""
    if created_after is not None and order.started_at is not None:
        behind = math.floor(order.started_at - created_after)
        claims.clock_offset = min(claims.clock_offset, behind)


def _not_found(
    draft: Draft, orders: list[Order], timeout: float, doubt: CloreError | None
) -> OrderFateUnknownError:
    server_id = draft.wanted.server_id
    ids = tuple(order.id for order in orders if order.id is not None)
    made = "was made" if doubt is None else "may have been made"
    return OrderFateUnknownError(
        f"an order for server {server_id} {made}, and it can't be told which of "
        f"{', '.join(map(str, ids))} it is, if any: look at get_orders()"
        if ids
        else f"an order for server {server_id} {made}, but did not show up in my_orders within "
        f"{timeout:g}s. It was not sent again: look at get_orders(), also a minute from now, "
        "before you order again",
        server_id=server_id,
        order_ids=ids,
        credentials=draft.credentials,
    )
