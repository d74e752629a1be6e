"""Record the orders that stay after their rental, and end those past their deadline."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from clore_client.config import warn_about_state
from clore_client.files import make_private_folder, replace_file
from clore_client.orders.account import AccountOrders
from clore_client.pricing import finite
from clore_client.rental.journal import (
    JOURNAL_SCHEMA,
    JournalEntry,
    read_entries,
    this_machine,
)

# In the state folder. Older versions don't read it, so they don't cancel a kept order.
KEPT_FOLDER = "kept"


def record_kept(folder: Path | None, data: dict[str, Any], until: float | None) -> bool:
    """Record an order that stays, instead of an earlier record. Return whether that worked.

    Parameters:
        folder: the state folder.
        data: the fields of its journal entry, with the order id.
        until: Unix time of its deadline, or None.
    """
    if folder is None:
        return False
    path = _kept_path(folder, data["account"], data["order_id"])
    try:
        make_private_folder(path.parent)
        record = {"schema": JOURNAL_SCHEMA, **data, **this_machine(), "kept_until": until}
        replace_file(path, json.dumps(record))
    except OSError as error:
        warn_about_state(f"{path} can't be written", error)
        return False
    return True


def forget_kept(folder: Path | None, account: str, order_id: int) -> None:
    """Forget that an order is kept, because a rental ends it again."""
    if folder is None:
        return
    path = _kept_path(folder, account, order_id)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warn_about_state(f"{path} can't be removed", error)


def _kept_path(folder: Path, account: str, order_id: int) -> Path:
    return folder / KEPT_FOLDER / f"{account[:12]}-{order_id}.json"


def kept_entries(folder: Path | None, account: str) -> list[JournalEntry]:
    """Return the records of kept orders, locked where no other process holds them."""
    found = []
    for entry in read_entries(None if folder is None else folder / KEPT_FOLDER):
        if entry.data.get("account") == account and entry.order_id is not None:
            found.append(entry)
        else:
            entry.close()
    return found


def overdue_entries(orders: AccountOrders, folder: Path | None) -> list[JournalEntry]:
    """Return the records of this machine's kept orders that are past their deadline.

    They are locked, and the caller closes them. Records of orders that have ended are removed.
    """
    overdue, now = [], time.time()
    for entry in kept_entries(folder, orders.account):
        until = finite(entry.data.get("kept_until"))
        mine = entry.abandoned and entry.of_this_machine
        if mine and until is not None and until <= now and not _remove_if_ended(orders, entry):
            overdue.append(entry)
        else:
            entry.close()
    return overdue


def _remove_if_ended(orders: AccountOrders, entry: JournalEntry) -> bool:
    ended = orders.state(entry.order_id or 0) == "ended"
    if ended:
        entry.remove()
    return ended
