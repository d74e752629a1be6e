"""Helpers of the attacks: clients with short timeouts, a watchdog, and a check of the orders."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from clore_client import CloreClient
from tests.attack.fault_server import FaultServer

LAG = 0.2  # seconds; the longest lag of the order lists of a fault server
QUICK: dict[str, Any] = {
    "rate_limit": 0.01,
    "create_order_interval": 0.01,
    "backoff": 0.01,
    "timeout": 0.5,
    "order_lag": LAG,
}


def client_for(server: FaultServer, state_dir: Path | None = None, **options: Any) -> CloreClient:
    """Make a client with limits that suit a fault server."""
    return CloreClient(
        server.key, **{"base_url": server.url, "state_dir": state_dir, **QUICK, **options}
    )


class Watchdog:
    """Stop a server that blocks its client for too long; a context manager.

    The block then ends with an error, which the failure of the watchdog replaces.

    Attributes:
        barked: whether the time limit was reached.
    """

    def __init__(self, server: FaultServer, seconds: float) -> None:
        self.barked = False
        self._server = server
        self._seconds = seconds
        self._timer = threading.Timer(seconds, self._bark)
        self._timer.daemon = True

    def _bark(self) -> None:
        self.barked = True
        self._server.stop()

    def __enter__(self) -> Watchdog:
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        self._timer.join(10)
        assert not self.barked, f"not back after {self._seconds:g} s"


def told(error: BaseException | None) -> Iterator[str]:
    """Yield the text, the notes and the order ids of an error and of its causes."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield str(one)
        yield from getattr(one, "__notes__", ())
        yield str(getattr(one, "order_ids", ""))
        waiting += [one.__cause__, one.__context__]


def unaccounted(
    server: FaultServer,
    client: CloreClient,
    error: BaseException | None,
    *,
    since: float = 0.0,
    recorded: bool = False,
) -> list[str]:
    """Describe the orders that still run, but that no error or journal entry names.

    Parameters:
        server: has the true state of the orders.
        client: its ``leftovers()`` must find the orders.
        error: the exception that was raised, or None.
        since: monotonic time; orders that were made before it do not count.
        recorded: whether an order must have a journal entry.
    """
    left = [order for order in server.orders if order.active and order.made_at >= since]
    if not left:
        return []
    text = "\n".join(told(error))
    wrong = [
        f"order {order.id} of server {order.server_id} runs on, and {error!r} does not say so"
        for order in left
        if str(order.id) not in text and str(order.server_id) not in text
    ]
    server.calm()
    client.close()  # an extra response may be on its way
    listed = max(server.ledger.visible_at(order) for order in left)
    time.sleep(max(0.0, listed - time.monotonic()))
    found = client.leftovers(wait=0)
    known = {leftover.order_id for leftover in found.abandoned}
    if not recorded:
        known |= {order.id for order in found.unrecorded}
    # A late cancel may have ended some of them.
    lost = [order.id for order in left if order.id not in known and order.active]
    return wrong + [f"leftovers() does not find order {order_id}" for order_id in lost]
