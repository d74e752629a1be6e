"""Ending an order: cancelling until that is accepted, and confirming that it has ended.

An order has ended when the list of completed orders says so, or when its cancel was accepted and it
is gone from both lists for longer than they lag behind. Nothing else is taken for an end: a list
can be empty for a moment.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable
from typing import Any

from clore_client.api.request import LONGEST_CANCEL_PAUSE, limited
from clore_client.api.retry import Envelope
from clore_client.errors import (
    CancelUnconfirmedError,
    CloreAPIError,
    CloreError,
    ConfigurationError,
    OrderNotFoundError,
)
from clore_client.log import logger

# A cancelled order can stand among the active ones for 2 to 20 seconds (seen on the live API).
LINGER = 30.0
MAX_CANCELS = 64  # ids that the API takes in one ``cancel_orders``
LONGEST_LOOK_PAUSE = 1.0  # seconds between two looks at the lists
CANCEL_AGAIN_AFTER = 30.0  # seconds after which one that still looks active is cancelled again
CONFIRM_AT_LEAST = 30.0
SHORTEST_TRY = 1.0  # seconds that one try to cancel has at least


class OrderState(enum.Enum):
    """What the two order lists say of an order."""

    ACTIVE = "active"
    ENDED = "ended"
    ABSENT = "absent"


class Evidence:
    """What has been seen of an order in the lists, one look after the other."""

    def __init__(self, client: Any, order_id: int) -> None:
        self._client = client
        self._order_id = order_id
        self._absent_since: float | None = None
        self.state: OrderState | None = None  # None where the last look failed
        self.failure: CloreError | None = None

    def look(self) -> None:
        """Look once at the lists.

        Raises:
            OrderNotFoundError: the number is that of a server.
        """
        asked_at = time.monotonic()
        self.state = self.failure = None
        try:
            self.state = self._client._order_state(self._order_id)
        except OrderNotFoundError:
            raise
        except CloreError as error:
            self.failure = error
        if self.state is OrderState.ABSENT:
            self._absent_since = self._absent_since or asked_at
        elif self.state is not None:
            self._absent_since = None

    @property
    def gone(self) -> bool:
        """Whether the order is in neither list for longer than the lists lag behind."""
        since = self._absent_since
        return (
            self.state is OrderState.ABSENT
            and since is not None
            and time.monotonic() - since >= self._client.order_lag
        )


def settle_cancel(client: Any, order_id: int, error: CloreError, patience: float | None) -> None:
    """Return when an order has ended, or a cancel was accepted after all.

    Parameters:
        client: whose order it is.
        order_id: which order.
        error: what cancelling it ended with.
        patience: seconds for which the lists are asked, and the cancel is sent again; None for as
            long as a cancelled order may linger.

    Raises:
        OrderNotFoundError: the account has no such order.
        CancelUnconfirmedError: it may still be running.
    """
    accepted = order_id in client._cancelled
    refused = isinstance(error, CloreAPIError) and error.sends <= 1
    evidence = Evidence(client, order_id)
    deadline = time.monotonic() + (LINGER if patience is None else patience)
    pause = LONGEST_LOOK_PAUSE / 16
    while True:
        try:
            evidence.look()
        except OrderNotFoundError as not_found:
            raise not_found from error
        if evidence.state is OrderState.ENDED or (evidence.gone and accepted):
            return
        if evidence.gone and order_id not in client._known():
            raise OrderNotFoundError(
                f"there is no order {order_id} in this account", order_id=order_id
            ) from error
        remaining = deadline - time.monotonic()
        # An active order whose cancel was refused: asking again for longer changes nothing.
        if remaining <= 0 or (refused and evidence.state is OrderState.ACTIVE and not accepted):
            raise not_cancelled(order_id, error)
        time.sleep(min(pause, remaining))
        pause = min(pause * 2, LONGEST_LOOK_PAUSE)
        if evidence.state is not None and pause >= LONGEST_LOOK_PAUSE:
            try:
                client._send_cancel(order_id)
            except CloreError as again:
                logger.debug("order %d could not be cancelled again: %s", order_id, again)
            else:
                return


def keep_cancelling(
    client: Any,
    order_id: int,
    deadline: Callable[[], float],
    stop: Callable[[], bool] = lambda: False,
) -> Exception | None:
    """Cancel an order until that is accepted; None then, else the last failure.

    Parameters:
        client: whose ``cancel_order`` is called, before anything is read.
        order_id: which order.
        deadline: gives the monotonic time at which to stop trying.
        stop: whether to give up at once.
    """
    pause, tries = max(0.001, 2 * float(client.backoff)), 0
    while True:
        tries += 1
        try:
            # Another cancel is worth more than a long look at the lists: that is what ends it.
            limited(
                lambda: client.cancel_order(order_id, settle_timeout=0.0),
                deadline=_end_of_try(client, deadline()),
                urgent=True,
            )
            return None
        except Exception as error:
            failure = error
        remaining = deadline() - time.monotonic()
        if remaining <= 0 or stop() or isinstance(failure, ConfigurationError):
            return failure
        if tries == 1 or tries % 10 == 0:
            how_long = "until it is" if remaining == math.inf else f"for another {remaining:.0f} s"
            logger.warning(
                "order %d could not be cancelled yet, which is tried %s: %s",
                order_id,
                how_long,
                failure,
            )
        _sleep_until(time.monotonic() + pause, lambda: stop() or time.monotonic() >= deadline())
        pause = min(pause * 2, LONGEST_CANCEL_PAUSE)


def _end_of_try(client: Any, deadline: float) -> float:
    """Until when one try may take: one that hangs is given up, and sent again."""
    now = time.monotonic()
    left = deadline - now
    return deadline if left == math.inf else now + max(SHORTEST_TRY, left / 3)


def _sleep_until(moment: float, stop: Callable[[], bool]) -> None:
    while (left := moment - time.monotonic()) > 0 and not stop():
        time.sleep(min(left, 0.1))


def confirm_ended(
    client: Any,
    order_id: int,
    deadline: float,
    *,
    stop: Callable[[], bool] = lambda: False,
    accepted: bool = True,
) -> CloreError | None:
    """Look until a cancelled order has ended; None then, else what to raise.

    Parameters:
        client: whose order it is.
        order_id: which order.
        deadline: monotonic time at which to give up.
        stop: whether to give up at once.
        accepted: whether its cancel was. Then it has ended when it is gone for longer than the
            lists lag, and is cancelled again when it goes on looking active.
    """
    evidence, pause, cancelled_at = Evidence(client, order_id), 0.02, time.monotonic()
    while True:
        try:
            limited(evidence.look, deadline=deadline + SHORTEST_TRY, urgent=True)
        except OrderNotFoundError as error:
            return error
        if evidence.state is OrderState.ENDED or (evidence.gone and accepted):
            return None
        now = time.monotonic()
        if now >= deadline or stop():
            unconfirmed = CancelUnconfirmedError(
                f"order {order_id} was cancelled, but it is not confirmed that it has ended: it "
                f"may still be running, and cost money; cancel_order({order_id}) is safe to repeat",
                order_ids=(order_id,),
            )
            unconfirmed.__cause__ = evidence.failure
            return unconfirmed
        if accepted and now - cancelled_at > CANCEL_AGAIN_AFTER:
            cancelled_at = now
            try:
                client.cancel_order(order_id, settle_timeout=0.0)
            except CloreError as error:
                logger.debug("order %d could not be cancelled again: %s", order_id, error)
        _sleep_until(now + min(pause, max(deadline - now, 0.02)), stop)
        pause = min(pause * 2, LONGEST_LOOK_PAUSE)


def send_in_batches(
    send: Callable[[list[int]], tuple[dict[str, Any], list[int]]], order_ids: list[int]
) -> tuple[dict[str, Any], list[int]]:
    """Send as many ``cancel_orders`` as the ids need, and merge their answers.

    Goes on after a batch that failed, because every order left running costs money.

    Parameters:
        send: sends one batch, and returns its envelope and those of its ids that failed.
        order_ids: which orders.

    Raises:
        CloreError: the first failure of a batch; it names the orders of every failed one.
    """
    batches = [order_ids[i : i + MAX_CANCELS] for i in range(0, len(order_ids), MAX_CANCELS)]
    if len(batches) == 1:
        return send(order_ids)
    answer: dict[str, Any] = {}
    failed: list[int] = []
    listed: list[Any] = []
    unsent: list[int] = []
    failure: CloreError | None = None
    sends = 1
    for batch in batches:
        try:
            answer, batch_failed = send(batch)
        except CloreError as error:
            failure = failure or error
            unsent += batch
            continue
        failed += batch_failed
        names = answer.get("failed_to_cancel")
        listed += names if isinstance(names, list) else []
        sends = max(sends, getattr(answer, "sends", 1))
    if failure is not None:
        left = ", ".join(map(str, unsent + failed))
        failure.args = (f"{failure}\norders {left} may still be running, and cost money",)
        raise failure
    answer["failed_to_cancel"] = listed
    if isinstance(answer, Envelope):
        answer.sends = sends
    return answer, failed


def ended_among(client: Any, order_ids: list[int], patience: float = math.inf) -> set[int]:
    """Return those whose cancel failed and that are listed as ended, once they have lingered.

    Parameters:
        client: whose orders they are.
        order_ids: which orders.
        patience: seconds for all of them, at most as many as a cancelled order may linger.
    """
    until = time.monotonic() + min(patience, LINGER)
    return {i for i in order_ids if confirm_ended(client, i, until, accepted=False) is None}


def confirm_until(started: float, timeout: float) -> float:
    """When to stop confirming what was begun at ``started`` (monotonic time)."""
    return max(started + timeout, time.monotonic() + min(CONFIRM_AT_LEAST, timeout))


def not_cancelled(
    order_id: int, failure: BaseException, seconds: float | None = None
) -> CancelUnconfirmedError:
    """Make the error for an order that could not be cancelled."""
    within = "" if seconds is None else f" within {seconds:g}s"
    error = CancelUnconfirmedError(
        f"order {order_id} could not be cancelled{within}: it may still be running, and cost "
        f"money; cancel_order({order_id}) is safe to repeat ({failure})",
        order_ids=(order_id,),
    )
    error.__cause__ = failure
    return error


def add_note_to(error: BaseException, note: str) -> None:
    """``error.add_note(note)``, which Python has from 3.11 on."""
    notes = getattr(error, "__notes__", None)
    try:
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:
            error.__notes__ = [*notes, note] if isinstance(notes, list) else [note]  # type: ignore[attr-defined,unused-ignore]
    except (TypeError, AttributeError):  # an exception that takes none
        logger.error("%s", note)
