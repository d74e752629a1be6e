"""Whether an order has ended: what the order lists say after a refusal or a doubt."""

from __future__ import annotations

import time
from collections.abc import Callable

from clore_client.errors import CloreError, OrderNotFoundError

# A cancelled order can stand among the active ones for 2 to 20 seconds (seen on the live API).
LINGER = 30.0
LOOK_EVERY = 1.0

# True: ended. False: active. None: the account has no such order.
Look = Callable[[], bool | None]


def settle_cancel(
    look: Look, order_id: int, error: CloreError, patience: float | None = None
) -> None:
    """Return when the order has ended after all; else raise.

    Parameters:
        look: asks the two order lists.
        order_id: which order.
        error: what cancelling it ended with.
        patience: seconds for which an order that was cancelled before may still look active;
            None for as long as the API is known to take.

    Raises:
        OrderNotFoundError: the account has no such order.
        CloreError: ``error``, when the order is still active or the lists can't be read.
    """
    deadline = time.monotonic() + (LINGER if patience is None else patience)
    pause = LOOK_EVERY / 16
    while True:
        try:
            ended = look()
        except OrderNotFoundError as not_found:
            raise not_found from error
        except CloreError:
            ended = False
        if ended:
            return
        remaining = deadline - time.monotonic()
        if remaining <= 0 and ended is None:
            raise OrderNotFoundError(
                f"there is no order {order_id} in this account", order_id=order_id
            ) from error
        if remaining <= 0:
            raise error
        time.sleep(min(pause, remaining))
        pause = min(pause * 2, LOOK_EVERY)
