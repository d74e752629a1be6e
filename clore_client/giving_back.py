"""Ending a rental's order: kept up, whatever the network does, and confirmed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from clore_client.errors import (
    CancelUnconfirmedError,
    CloreError,
    ConfigurationError,
    OrderNotFoundError,
)
from clore_client.log import logger

LONGEST_CANCEL_PAUSE = 5.0  # seconds between two tries to cancel
LONGEST_TOLD_PAUSE = 60.0  # where the API asks for more time
CONFIRM_AT_LEAST = 30.0  # seconds: an ended order lingers that long (seen on the live API)
CANCEL_AGAIN_AFTER = 30.0  # seconds after which one that still looks active is cancelled again
LONGEST_LOOK_PAUSE = 1.0


def keep_cancelling(
    client: Any,
    order_id: int,
    deadline: float,
    noted: Callable[[BaseException], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> BaseException | None:
    """Cancel an order until that is accepted; None then, else the last failure.

    Parameters:
        client: whose ``cancel_order`` is called, before anything is read.
        order_id: which order.
        deadline: by ``time.monotonic()``, when to stop trying.
        noted: takes an interrupt, which does not end this.
        stop: whether somebody else has done it.
    """
    pause = max(0.001, min(float(client.backoff), LONGEST_CANCEL_PAUSE))
    tries = 0
    while True:
        tries += 1
        try:
            # One look at the lists, and then the cancel again: that is what ends it.
            client.cancel_order(order_id, settle_timeout=0.0)
            return None
        except (KeyboardInterrupt, SystemExit) as interrupt:
            if noted is None:
                raise
            logger.warning("interrupted while order %d is cancelled: that goes on", order_id)
            noted(interrupt)
            failure: BaseException = interrupt
        except Exception as error:
            failure = error
        if stop():
            return None
        remaining = deadline - time.monotonic()
        if remaining <= 0 or isinstance(failure, ConfigurationError):
            return failure
        if tries == 1 or tries % 10 == 0:
            how_long = "until it is" if remaining == math.inf else f"for another {remaining:.0f} s"
            logger.warning(
                "order %d could not be cancelled yet, which is tried %s: %s",
                order_id,
                how_long,
                failure,
            )
        told = getattr(failure, "retry_after", None)
        try:
            time.sleep(min(max(pause, told or 0.0), remaining, LONGEST_TOLD_PAUSE))
        except (KeyboardInterrupt, SystemExit) as interrupt:
            if noted is None:
                raise
            noted(interrupt)
        pause = min(pause * 2, LONGEST_CANCEL_PAUSE)


def confirm_gone(client: Any, order_id: int, deadline: float) -> CloreError | None:
    """Look until an order that was cancelled has ended; None then, else what to raise.

    It is cancelled again when it goes on looking active.
    """
    pause, cancelled_at = 0.02, time.monotonic()
    while True:
        cause: CloreError | None = None
        try:
            if client._has_ended(order_id):
                return None
        except OrderNotFoundError as error:
            return error
        except CloreError as error:
            cause = error
        now = time.monotonic()
        if now >= deadline:
            unconfirmed = CancelUnconfirmedError(
                f"order {order_id} was cancelled, but it is not confirmed that it has ended: it "
                f"may still be running, and cost money; cancel_order({order_id}) is safe to repeat",
                order_ids=(order_id,),
            )
            unconfirmed.__cause__ = cause
            return unconfirmed
        if now - cancelled_at > CANCEL_AGAIN_AFTER:
            cancelled_at = now
            try:
                client.cancel_order(order_id, settle_timeout=0.0)
            except CloreError as error:
                logger.debug("order %d could not be cancelled again: %s", order_id, error)
        time.sleep(min(pause, max(deadline - now, 0.02)))
        pause = min(pause * 2, LONGEST_LOOK_PAUSE)


def not_cancelled(order_id: int, failure: BaseException, seconds: float) -> CancelUnconfirmedError:
    """What to raise for an order that could not be cancelled."""
    error = CancelUnconfirmedError(
        f"order {order_id} could not be cancelled within {seconds:g}s: it may still be running, "
        f"and cost money; cancel_order({order_id}) is safe to repeat ({failure})",
        order_ids=(order_id,),
    )
    error.__cause__ = failure
    return error


def confirm_until(started: float, timeout: float) -> float:
    """When to stop confirming what was begun at ``started`` (monotonic time)."""
    return max(started + timeout, time.monotonic() + min(CONFIRM_AT_LEAST, timeout))


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
