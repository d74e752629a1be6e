"""What rentals of processes that are dead have left running."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from clore_client.config import account_digest
from clore_client.errors import CancelUnconfirmedError, CloreError
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.models.record import whole_id
from clore_client.orders.account import AccountOrders, OrderState
from clore_client.orders.cancel import Cancellation, confirm_until
from clore_client.pricing import finite
from clore_client.rental.journal import JournalEntry, read_entries
from clore_client.rental.orders import fits_intent

# How far an order's time of creation, by the server's clock, may lie before and after the time of
# the intent, by this machine's. A proxy may hold a request for a while.
CLOCKS_APART = 300.0
CLOCKS_COMPARED = 5.0  # where the entry tells how far they were apart
LATEST_ORDER = 180.0
LEFTOVER_LOOK = 1.0  # seconds between two looks for orders that may not be listed yet


class Leftover:
    """An order that a rental left behind, and what its entry tells.

    Attributes:
        order: as it is listed now; None where it is in no list, which does not mean that it has
            ended, and for an entry of another machine without one.
        order_id, server_id: its numbers; ``order_id`` may be None where ``order`` is.
        started: Unix time at which it was to be ordered.
        host, pid: where.
    """

    def __init__(self, entry: JournalEntry, order: Order | None) -> None:
        data = entry.data
        self.order = order
        self.order_id = order.id if order is not None else entry.order_id
        self.server_id = whole_id(data.get("server_id"))
        self.started = finite(data.get("started"))
        host, pid = data.get("host"), data.get("pid")
        self.host = host if isinstance(host, str) else None
        self.pid = pid if isinstance(pid, int) else None
        self.path = entry.path

    def __repr__(self) -> str:
        return (
            f"<Leftover order {self.order_id} of server {self.server_id}, by process {self.pid} "
            f"on {self.host!r}>"
        )


class Leftovers:
    """What ``CloreClient.leftovers`` has found.

    Attributes:
        abandoned: orders that still run, of rentals of this machine whose process is dead.
        elsewhere: entries of other machines, whose processes can't be seen from here.
        unnoted: active orders of the account that no entry tells of.
    """

    def __init__(
        self, abandoned: list[Leftover], elsewhere: list[Leftover], unnoted: list[Order]
    ) -> None:
        self.abandoned = abandoned
        self.elsewhere = elsewhere
        self.unnoted = unnoted

    def __bool__(self) -> bool:
        """Whether there is anything of the three."""
        return bool(self.abandoned or self.elsewhere or self.unnoted)

    def __repr__(self) -> str:
        return (
            f"<Leftovers: {self.abandoned}, {len(self.elsewhere)} of other machines, "
            f"{len(self.unnoted)} orders without an entry>"
        )


class _Survey:
    """One look at the entries and at the orders."""

    def __init__(self, orders: AccountOrders, folder: Path | None) -> None:
        self._orders = orders
        account = account_digest(orders.client.base_url, orders.client.api_key)
        self.entries: list[JournalEntry] = []
        self._read(folder, account)
        try:
            self.listed = {o.id: o for o in orders.active() if o.id is not None}
            # Again: a living process may have noted and ordered one between the two.
            self._read(folder, account)
            self._match()
        except BaseException:
            self.close()
            raise

    def _read(self, folder: Path | None, account: str) -> None:
        known = {entry.path for entry in self.entries}
        for entry in read_entries(folder):
            if entry.path in known or entry.data.get("account") != account:
                entry.close()
            else:
                self.entries.append(entry)

    def close(self) -> None:
        for entry in self.entries:
            entry.close()

    def _match(self) -> None:
        named = {entry.order_id for entry in self.entries}
        self.of: dict[str, Order] = {}  # path of an entry -> its order
        held: set[int] = set()
        living: set[int] = set()  # orders that may be those of living processes
        for entry in self.entries:
            order_id = entry.order_id
            if order_id is not None:
                fitting = [self.listed[order_id]] if order_id in self.listed else []
            else:
                fitting = [
                    order
                    for number, order in self.listed.items()
                    if number not in named and intended(entry.data, order)
                ]
            if entry.abandoned or not entry.of_this_machine:
                if len(fitting) > 1:
                    logger.warning("several orders fit %s: none is taken for it", entry.path)
                elif fitting:
                    self.of[str(entry.path)] = fitting[0]
                    held.add(fitting[0].id or 0)
            else:
                living.update(order.id or 0 for order in fitting)
        held |= living
        self._settle_claims(living)
        self.unnoted = [o for i, o in self.listed.items() if i not in held and not o.has_ended]

    def _settle_claims(self, living: set[int]) -> None:
        """Leave each order at most one entry."""
        claims: dict[int, list[JournalEntry]] = {}
        for entry in self.entries:
            if (order := self.of.get(str(entry.path))) is not None:
                claims.setdefault(order.id or 0, []).append(entry)
        for order_id, entries in claims.items():
            if order_id in living or (
                len(entries) > 1
                and not all(entry.abandoned and entry.of_this_machine for entry in entries)
            ):
                logger.warning("order %d may be another process's: it is left alone", order_id)
                losers = entries
            else:
                # Dead ones of this machine, whichever it was: the last is the likeliest.
                entries.sort(key=lambda entry: finite(entry.data.get("started")) or 0.0)
                losers = entries[:-1]
            for entry in losers:
                self.of.pop(str(entry.path))

    def order_of(self, entry: JournalEntry) -> Order | None:
        order = self.of.get(str(entry.path))
        return None if order is None or order.has_ended else order

    def undecided(self, wait: float) -> bool:
        """Whether an order of a dead process may not be listed yet."""
        return any(
            entry.abandoned and self.order_of(entry) is None and _young(entry.data, wait)
            for entry in self.entries
        )

    def tidy(self, wait: float) -> None:
        """Remove the entries whose orders have ended, or were never made."""
        self.missing: list[JournalEntry] = []  # noted orders that no list has
        intents: list[JournalEntry] = []
        for entry in self.entries:
            if not entry.abandoned or self.order_of(entry) is not None:
                continue
            if entry.order_id is None:
                if not _young(entry.data, LATEST_ORDER + CLOCKS_APART):
                    intents.append(entry)
            elif not _young(entry.data, wait):
                self._tidy_order(entry, entry.order_id)
        if intents:
            self._tidy_intents(intents)

    def _tidy_order(self, entry: JournalEntry, order_id: int) -> None:
        try:
            state = self._orders.state(order_id)
        except CloreError:
            state = OrderState.ABSENT
        if state is OrderState.ENDED:
            logger.info("the order of %s has ended: the entry is removed", entry.path)
            entry.remove()
        else:
            self.missing.append(entry)

    def _tidy_intents(self, entries: list[JournalEntry]) -> None:
        # One look is not enough: a list can be empty for a moment.
        time.sleep(self._orders.client.order_lag)
        orders = self._orders.active()
        for entry in entries:
            if not any(intended(entry.data, order) for order in orders):
                logger.info("no order came of %s: the entry is removed", entry.path)
                entry.remove()

    def abandoned(self) -> list[tuple[JournalEntry, Order | None]]:
        """Return the entries of dead processes of this machine whose orders may run."""
        ours = [entry for entry in self.entries if entry.abandoned and entry.of_this_machine]
        return [
            (entry, order)
            for entry in ours
            if (order := self.order_of(entry)) is not None or entry in self.missing
        ]

    def result(self) -> Leftovers:
        elsewhere = [Leftover(e, self.order_of(e)) for e in self.entries if not e.of_this_machine]
        abandoned = [Leftover(entry, order) for entry, order in self.abandoned()]
        return Leftovers(abandoned, elsewhere, self.unnoted)


def intended(data: dict[str, Any], order: Order) -> bool:
    """Whether an order can come of the intent that an entry without an order's number tells."""
    before = data.get("before")
    if order.server_id != whole_id(data.get("server_id")):
        return False
    if isinstance(before, list) and order.id in before:
        return False
    if not fits_intent(order, data.get("image"), data.get("currency"), data.get("spot")):
        return False
    started, made = finite(data.get("started")), order.started_at
    if started is None or made is None:
        return False
    ahead = finite(data.get("server_clock"))
    apart = CLOCKS_APART if ahead is None else CLOCKS_COMPARED
    return -apart <= made - started - (ahead or 0.0) <= LATEST_ORDER + apart


def _young(data: dict[str, Any], seconds: float) -> bool:
    started = finite(data.get("started"))
    # One in the future is young: the clock has been set back since.
    return started is not None and time.time() - started < seconds


def _settled(orders: AccountOrders, folder: Path | None, wait: float) -> _Survey:
    deadline = time.monotonic() + wait
    while True:
        survey = _Survey(orders, folder)
        try:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not survey.undecided(wait):
                survey.tidy(wait)
                return survey
        except BaseException:
            survey.close()
            raise
        survey.close()
        time.sleep(min(LEFTOVER_LOOK, max(0.01, wait / 10), remaining))


def find_leftovers(orders: AccountOrders, folder: Path | None, wait: float) -> Leftovers:
    """What is left behind; see ``CloreClient.leftovers``."""
    survey = _settled(orders, folder, wait)
    survey.close()
    return survey.result()


def end_leftovers(
    orders: AccountOrders, folder: Path | None, wait: float, timeout: float
) -> list[int]:
    """End what dead processes of this machine left; see ``CloreClient.cancel_leftovers``."""
    survey = _settled(orders, folder, wait)
    ended: list[int] = []
    failed: dict[int, BaseException] = {}
    try:
        # Their locks are held: no other process does the same meanwhile.
        for entry, order in survey.abandoned():
            order_id = entry.order_id if order is None else order.id
            if order_id is None:
                continue
            started = time.monotonic()
            # What no list has may be long gone, and its cancel be refused for ever.
            until = started + (
                timeout if order is not None else min(timeout, orders.client.order_lag)
            )
            cancellation = Cancellation(orders, order_id)
            failure = cancellation.keep_on(lambda: until, confirm=False)  # noqa: B023
            if failure is None:
                confirmed_by = confirm_until(started, timeout)
                failure = cancellation.keep_on(lambda: confirmed_by, confirm=True)  # noqa: B023
            if failure is None:
                logger.info("order %d, which a dead process left, was ended", order_id)
                entry.remove()
                ended.append(order_id)
            else:
                failed[order_id] = failure
    finally:
        survey.close()
    if failed:
        ids = ", ".join(map(str, failed))
        raise CancelUnconfirmedError(
            f"not confirmed to have ended: {ids} (ended: {ended})", order_ids=tuple(failed)
        ) from next(iter(failed.values()))
    return ended
