"""Find and cancel the orders that rentals of dead processes left running."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from clore_client.errors import CancelUnconfirmedError, CloreError
from clore_client.log import logger
from clore_client.models.order import Order
from clore_client.models.record import whole_id
from clore_client.orders.account import AccountOrders
from clore_client.orders.cancel import Cancellation, confirm_until
from clore_client.orders.credentials import CLOCKS_APART, LATEST_ORDER, matches_entry
from clore_client.pricing import finite
from clore_client.rental.journal import JournalEntry, kept_entries, read_entries

LEFTOVER_READ_INTERVAL = 1.0  # between two reads, while an order may not be listed yet


class Leftover:
    """An order that a rental left running, with the data of its journal entry.

    Attributes:
        order: the order as it is listed now. None if it is in no list, which does not mean that it
            has ended.
        order_id, server_id: the ids; ``order_id`` can be None if ``order`` is None.
        started: Unix time of the purchase.
        host, pid: the machine and the process that ordered it.
        kept_until: Unix time of the deadline of a kept order, or None.
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
        self.kept_until = finite(data.get("kept_until"))

    def __repr__(self) -> str:
        until = ""
        if self.kept_until is not None:
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.kept_until))
            until = f", kept until {moment}"
        by = "" if self.pid is None else f", by process {self.pid} on {self.host!r}"
        return f"<Leftover order {self.order_id} of server {self.server_id}{by}{until}>"


class Leftovers:
    """Hold the result of ``CloreClient.leftovers``. It is false if all lists are empty.

    Attributes:
        abandoned: orders that may still run, of dead processes of this machine.
        elsewhere: journal entries of other machines; their processes may be alive.
        unrecorded: active orders of the account without a journal entry.
        kept: orders that rentals of this machine kept with ``keep()``.
    """

    def __init__(
        self,
        abandoned: list[Leftover],
        elsewhere: list[Leftover],
        unrecorded: list[Order],
        kept: list[Leftover],
    ) -> None:
        self.abandoned, self.elsewhere = abandoned, elsewhere
        self.unrecorded, self.kept = unrecorded, kept

    def __bool__(self) -> bool:
        """Return whether any of the lists has an item."""
        return bool(self.abandoned or self.elsewhere or self.unrecorded or self.kept)

    def __repr__(self) -> str:
        return (
            f"<Leftovers: {self.abandoned}, {len(self.elsewhere)} of other machines, "
            f"{len(self.unrecorded)} orders without an entry, kept: {self.kept}>"
        )


class _Survey:
    """Read the journal entries and the active orders once, and match them.

    Attributes:
        entries: the journal entries of the account.
        listed: order id -> the active order.
        unrecorded: the active orders without an entry.
        missing: entries with an order id that no list has.
    """

    def __init__(self, orders: AccountOrders, folder: Path | None) -> None:
        self._orders = orders
        account = orders.account
        self.entries: list[JournalEntry] = []
        self.missing: list[JournalEntry] = []
        self._kept: list[JournalEntry] = []
        self._matched: dict[Path, Order] = {}  # path of an entry -> its order
        self._read(folder, account)
        try:
            self.listed = {o.id: o for o in orders.active() if o.id is not None}
            # Read the entries again, because another process may have ordered between the reads.
            self._read(folder, account)
            # After the journal, because keep() records an order before it removes the entry.
            self._kept = kept_entries(folder, account)
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
        """Release the locks of the entries."""
        for entry in [*self.entries, *self._kept]:
            entry.close()

    def _match(self) -> None:
        kept = {entry.order_id or 0 for entry in self._kept}
        for entry in list(self.entries):
            if entry.order_id in kept and entry.abandoned:  # its process died within keep()
                entry.remove()
                self.entries.remove(entry)
        named = kept | {entry.order_id for entry in self.entries}
        living: set[int] = set()  # orders that may belong to living processes
        for entry in self.entries:
            fitting = self._fitting(entry, named)
            if entry.of_this_machine and not entry.abandoned:
                living.update(order.id or 0 for order in fitting)
            elif len(fitting) > 1:
                logger.warning(
                    "several orders match %s, so none is assigned to it: check get_orders()",
                    entry.path,
                )
            elif fitting:
                self._matched[entry.path] = fitting[0]
        recorded = kept | living | {order.id for order in self._matched.values()}
        self.unrecorded = [
            o for i, o in self.listed.items() if i not in recorded and not o.has_ended
        ]
        self._settle_conflicts(living)

    def _fitting(self, entry: JournalEntry, named: Collection[int | None]) -> list[Order]:
        """Return the active orders that can belong to an entry."""
        if entry.order_id is not None:
            return [self.listed[entry.order_id]] if entry.order_id in self.listed else []
        unnamed = (order for number, order in self.listed.items() if number not in named)
        return [order for order in unnamed if matches_entry(entry.data, order)]

    def _settle_conflicts(self, living: set[int]) -> None:
        """Assign at most one entry to each order."""
        entries_of: dict[int, list[JournalEntry]] = {}
        for entry in self.entries:
            if (order := self._matched.get(entry.path)) is not None:
                entries_of.setdefault(order.id or 0, []).append(entry)
        for order_id, entries in entries_of.items():
            all_dead = all(entry.abandoned for entry in entries)
            if order_id in living or (len(entries) > 1 and not all_dead):
                logger.warning(
                    "order %d may belong to another process, so it is not touched", order_id
                )
                losers = entries
            else:
                # All processes are dead, and the last one most likely made the order.
                entries.sort(key=lambda entry: finite(entry.data.get("started")) or 0.0)
                losers = entries[:-1]
            for entry in losers:
                del self._matched[entry.path]

    def order_of(self, entry: JournalEntry) -> Order | None:
        """Return the active order of an entry, or None."""
        order = self._matched.get(entry.path)
        return None if order is None or order.has_ended else order

    def undecided(self, wait: float) -> bool:
        """Return whether the order of a dead process could still be missing from the lists."""
        return any(
            entry.abandoned and self.order_of(entry) is None and _is_recent(entry.data, wait)
            for entry in self.entries
        )

    def tidy(self, wait: float) -> None:
        """Remove the entries of orders that have ended or do not exist."""
        intents: list[JournalEntry] = []
        for entry in self.entries:
            if not entry.abandoned or self.order_of(entry) is not None:
                continue
            if entry.order_id is None:
                if not _is_recent(entry.data, LATEST_ORDER + CLOCKS_APART):
                    intents.append(entry)
            elif not _is_recent(entry.data, wait):
                if _has_ended(self._orders, entry.order_id):
                    logger.info("the order of %s has ended: the entry is removed", entry.path)
                    entry.remove()
                else:
                    self.missing.append(entry)
        if intents:
            self._tidy_intents(intents)
        for entry in list(self._kept):
            order_id = entry.order_id or 0
            if order_id not in self.listed and _has_ended(self._orders, order_id):
                entry.remove()
                self._kept.remove(entry)
        with contextlib.suppress(CloreError):
            self._orders.tidy_credentials(set(self.listed))

    def _tidy_intents(self, entries: list[JournalEntry]) -> None:
        # One list is not enough, because it can be empty for a moment.
        time.sleep(self._orders.client.order_lag)
        orders = self._orders.active()
        for entry in entries:
            if not any(matches_entry(entry.data, order) for order in orders):
                logger.info("%s has no order: the entry is removed", entry.path)
                entry.remove()

    def abandoned(self) -> list[tuple[JournalEntry, Order | None]]:
        """Return the entries of dead processes of this machine with orders that may run."""
        return [
            (entry, order)
            for entry in self.entries
            if entry.abandoned
            and ((order := self.order_of(entry)) is not None or entry in self.missing)
        ]

    def result(self) -> Leftovers:
        """Return the leftovers for the user."""
        abandoned = [Leftover(entry, order) for entry, order in self.abandoned()]
        found = [(e, self.order_of(e)) for e in self.entries if not e.of_this_machine]
        kept = [(e, self.listed.get(e.order_id or 0)) for e in self._kept]
        found += [(e, order) for e, order in kept if not e.of_this_machine]
        elsewhere = [Leftover(entry, order) for entry, order in found]
        here = [Leftover(e, order) for e, order in kept if e.of_this_machine]
        return Leftovers(abandoned, elsewhere, self.unrecorded, here)


def _is_recent(data: dict[str, Any], seconds: float) -> bool:
    started = finite(data.get("started"))
    # A time in the future is recent too, as the clock may have been set back.
    return started is not None and time.time() - started < seconds


def _take_survey(orders: AccountOrders, folder: Path | None, wait: float) -> _Survey:
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
        time.sleep(min(LEFTOVER_READ_INTERVAL, max(0.01, wait / 10), remaining))


def find_leftovers(orders: AccountOrders, folder: Path | None, wait: float) -> Leftovers:
    """Find the orders that rentals left running; see ``CloreClient.leftovers``."""
    with contextlib.closing(_take_survey(orders, folder, wait)) as survey:
        return survey.result()


def end_leftovers(
    orders: AccountOrders, folder: Path | None, wait: float, timeout: float
) -> list[int]:
    """Cancel the orders that dead processes left; see ``CloreClient.cancel_leftovers``."""
    with contextlib.closing(_take_survey(orders, folder, wait)) as survey:
        # The entries are locked, so no other process cancels the same orders.
        return _end_entries(orders, survey.abandoned(), timeout, "cancel_leftovers()")


def end_overdue(orders: AccountOrders, folder: Path | None, timeout: float) -> list[int]:
    """Cancel the kept orders that are past their deadline; see ``CloreClient.cancel_overdue``."""
    overdue: list[JournalEntry] = []
    for entry in kept_entries(folder, orders.account):
        until = finite(entry.data.get("kept_until"))
        if entry.abandoned and until is not None and until <= time.time():
            overdue.append(entry)
        else:
            entry.close()
    try:
        listed = {order.id: order for order in orders.active()} if overdue else {}
        pairs = []
        for entry in overdue:
            if entry.order_id not in listed and _has_ended(orders, entry.order_id or 0):
                entry.remove()
            else:
                pairs.append((entry, listed.get(entry.order_id)))
        return _end_entries(orders, pairs, timeout, "cancel_overdue()")
    finally:
        for entry in overdue:
            entry.close()


def _has_ended(orders: AccountOrders, order_id: int) -> bool:
    """Return whether an order is known to have ended."""
    try:
        return orders.state(order_id) == "ended"
    except CloreError as error:  # it must not stop the cancels of the other orders
        logger.debug("the state of order %d can't be read: %s", order_id, error)
        return False


def _end_entries(
    orders: AccountOrders,
    entries: list[tuple[JournalEntry, Order | None]],
    timeout: float,
    again: str,
) -> list[int]:
    """Cancel the orders of journal entries, and remove the entries.

    Parameters:
        orders: the orders of the account.
        entries: locked entries, with their order if a list has it.
        timeout: seconds to keep sending each cancel.
        again: the method to call again, for the error text.
    """
    ended: list[int] = []
    failed: dict[int, BaseException] = {}
    for entry, order in entries:
        order_id = entry.order_id if order is None else order.id
        if order_id is None:
            continue
        failure = _end_order(orders, order_id, timeout, listed=order is not None)
        if failure is None:
            logger.info("order %d has ended", order_id)
            entry.remove()
            ended.append(order_id)
        else:
            failed[order_id] = failure
    if failed:
        ids = ", ".join(map(str, failed))
        raise CancelUnconfirmedError(
            f"orders not confirmed to have ended: {ids} (ended: {ended}); they may still be "
            f"running, and cost money, so call {again} again",
            order_ids=tuple(failed),
        ) from next(iter(failed.values()))
    return ended


def _end_order(
    orders: AccountOrders, order_id: int, timeout: float, listed: bool
) -> CloreError | None:
    """Cancel an order, and confirm that it has ended. Return None, or the error."""
    started = time.monotonic()
    # An order that no list has may have ended, and the API may refuse its cancel forever.
    until = started + (timeout if listed else min(timeout, orders.client.order_lag))
    cancellation = Cancellation(orders, order_id)
    failure = cancellation.run(lambda: until, confirm=False)
    if failure is None:
        confirmed_by = confirm_until(started, timeout)
        failure = cancellation.run(lambda: confirmed_by, confirm=True)
    return failure
