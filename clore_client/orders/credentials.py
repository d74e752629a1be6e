"""Save how to log in to orders, and find the order of a saved purchase."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from clore_client.config import make_private_folder, read_state_file, replace_file
from clore_client.errors import Secret
from clore_client.log import warn_once
from clore_client.models.order import Order
from clore_client.models.record import whole_id
from clore_client.pricing import finite

CREDENTIALS_FOLDER = "credentials"  # in the state folder
CREDENTIALS_SCHEMA = 1  # a later version adds fields, and keeps these
_SAVED_FIELDS = ("ssh_password", "jupyter_token", "key_fingerprint")
PURCHASE_OVER = 3600.0  # seconds; a purchase without an order after this time has failed
ORDER_OVER = 86_400.0  # seconds; an order that is missing from the lists for so long has ended
# The allowed difference between the creation time of an order, by the server's clock, and the time
# of its entry, by this machine's clock. All in seconds.
CLOCKS_APART = 300.0
CLOCKS_COMPARED = 5.0  # if the entry has the difference between the clocks
LATEST_ORDER = 180.0  # a proxy can delay a request


def public_key_fingerprint(public_key: str) -> str | None:
    """Return the fingerprint of a line of a ``.pub`` file, as ``ssh-keygen -l`` prints it."""
    try:
        blob = base64.b64decode(public_key.split()[1], validate=True)
    except (ValueError, IndexError):
        return None
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def login_fields(sent: dict[str, str]) -> dict[str, str]:
    """Return what to remember of the password, key and token that were sent with an order."""
    names = ("ssh_password", "jupyter_token")
    fields: dict[str, str] = {name: Secret(sent[name]) for name in names if name in sent}
    if found := public_key_fingerprint(sent.get("ssh_key", "")):
        fields["key_fingerprint"] = found
    return fields


def same_purchase(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Return whether an order can be the result of a purchase. Missing fields are ignored."""
    fields = (
        (order.get("image"), str, image),
        (order.get("currency"), str, currency),
        (order.get("spot"), bool, spot),
    )
    return all(not isinstance(value, kind) or value == wanted for value, kind, wanted in fields)


def can_be_order_of(order: Order, image: Any, currency: Any, spot: Any) -> bool:
    """Return whether an order still runs and can be the result of a purchase."""
    return not order.has_ended and same_purchase(order, image, currency, spot)


def purchase_fields(
    server_id: int, wanted: Any, before: Collection[int], server_clock: float | None
) -> dict[str, Any]:
    """Return the fields by which :func:`matches_entry` finds the order of a purchase.

    Parameters:
        server_id: the server.
        wanted: has the ``image``, the ``currency``, and whether the order is ``spot``.
        before: ids of older orders.
        server_clock: seconds by which the server's clock is ahead, or None.
    """
    return {
        "server_id": server_id,
        "started": time.time(),
        "server_clock": server_clock,
        "image": wanted.image,
        "currency": wanted.currency,
        "spot": wanted.spot,
        "before": sorted(before),
    }


def matches_entry(data: dict[str, Any], order: Order) -> bool:
    """Return whether an order can be the result of an entry without an order id."""
    before = data.get("before")
    if order.server_id != whole_id(data.get("server_id")):
        return False
    if isinstance(before, list) and order.id in before:
        return False
    if not can_be_order_of(order, data.get("image"), data.get("currency"), data.get("spot")):
        return False
    started, made = finite(data.get("started")), order.started_at
    if started is None or made is None:
        return False
    ahead = finite(data.get("server_clock"))
    apart = CLOCKS_APART if ahead is None else CLOCKS_COMPARED
    return -apart <= made - started - (ahead or 0.0) <= LATEST_ORDER + apart


class SavedLogin:
    """Keep the credentials of one purchase until its order has an id."""

    def __init__(self, fields: dict[str, str]) -> None:
        self.fields = fields
        self.path: Path | None = None

    def drop(self) -> None:
        """Forget the purchase, which has no order. Safe to repeat."""
        if self.path is not None:
            remove_file(self.path)
            self.path = None


class Credentials:
    """Keep the credentials of orders, in one file for each order.

    The name of a file has the account and the id of the order. Before the id is known, it has the
    server instead, and the content has the fields by which the order can be found. So the
    credentials survive a process that is killed at any time.

    Parameters:
        folder: returns the state folder, or None to keep the credentials in memory only.
    """

    def __init__(self, folder: Callable[[], Path | None]) -> None:
        self._state_folder = folder
        self._known: dict[tuple[str, int], dict[str, str]] = {}

    @property
    def _folder(self) -> Path | None:
        folder = self._state_folder()
        return None if folder is None else folder / CREDENTIALS_FOLDER

    def save(self, account: str, sent: dict[str, str], fields: dict[str, Any]) -> SavedLogin:
        """Save the credentials of a purchase before it is sent.

        Parameters:
            account: the digest of the account.
            sent: the password, key and token of the order.
            fields: those by which :func:`matches_entry` finds the order.
        """
        saved = SavedLogin(login_fields(sent))
        if (folder := self._folder) is None or not saved.fields:
            return saved
        name = f"{random.SystemRandom().getrandbits(64):016x}"
        path = folder / f"{account[:12]}-server-{fields['server_id']}-{name}.json"
        data = {"schema": CREDENTIALS_SCHEMA, "account": account, **fields, **saved.fields}
        try:
            make_private_folder(folder)
            replace_file(path, json.dumps(data))
            saved.path = path
        except OSError as error:
            _warn(f"the login of an order can't be saved in {folder}", error)
        return saved

    def assign(self, account: str, order_id: int, saved: SavedLogin) -> None:
        """Record which order a purchase has made."""
        self._known[account, order_id] = saved.fields
        path, saved.path = saved.path, None
        if path is None:
            return
        try:
            path.replace(self._path(path.parent, account, order_id))
        except FileNotFoundError:  # another process has found the order, or ended it
            pass
        except OSError as error:
            _warn(f"{path} can't be renamed", error)

    def of(self, account: str, order_id: int | None, order: Order | None = None) -> dict[str, str]:
        """Return the known login data of an order; an empty dict if none is known.

        Parameters:
            account: the digest of the account.
            order_id: the order.
            order: its record, which can identify the purchase of a killed process.
        """
        if order_id is None:
            return {}
        if (known := self._known.get((account, order_id))) is not None:
            return known
        if (folder := self._folder) is None:
            return {}
        found = self._read(self._path(folder, account, order_id), account)
        if found is None and order is not None:
            found = self._of_lost_purchase(folder, account, order_id, order)
        if found is None:
            return {}
        return self._known.setdefault((account, order_id), _fields_of(found))

    def has_other_login(self, account: str, order_id: int, sent: dict[str, str]) -> bool:
        """Return whether an order is known to have a different login from the one in ``sent``."""
        known = self.of(account, order_id)
        return bool(known) and known != login_fields(sent)

    def forget(self, account: str, order_ids: Iterable[int]) -> None:
        """Forget orders that have ended."""
        ended = set(order_ids)
        for order_id in ended:
            self._known.pop((account, order_id), None)
        if (folder := self._folder) is not None:
            for order_id in ended & self._saved_orders(folder, account):
                remove_file(self._path(folder, account, order_id))

    def stale(self, account: str, active: Collection[int]) -> dict[int, float]:
        """Return the age in seconds of each saved order that is old and not active.

        Also remove the purchases that never had an order.
        """
        if (folder := self._folder) is None:
            return {}
        for path in self._files(folder, f"{account[:12]}-server-"):
            if _age(path) > PURCHASE_OVER:
                remove_file(path)
        saved = self._saved_orders(folder, account) - set(active)
        ages = {order_id: _age(self._path(folder, account, order_id)) for order_id in saved}
        return {order_id: age for order_id, age in ages.items() if age > PURCHASE_OVER}

    # --- the files ---

    @staticmethod
    def _path(folder: Path, account: str, order_id: int) -> Path:
        return folder / f"{account[:12]}-{order_id}.json"

    @staticmethod
    def _files(folder: Path, start: str) -> list[Path]:
        try:
            return [folder / name for name in os.listdir(folder) if name.startswith(start)]
        except FileNotFoundError:
            return []
        except OSError as error:
            _warn(f"{folder} can't be read", error)
            return []

    def _saved_orders(self, folder: Path, account: str) -> set[int]:
        shape = rf"{account[:12]}-([0-9]{{1,18}})\.json"
        names = (re.fullmatch(shape, p.name) for p in self._files(folder, account[:12]))
        return {int(name[1]) for name in names if name is not None}

    @staticmethod
    def _read(path: Path, account: str) -> dict[str, Any] | None:
        try:
            data = read_state_file(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            # The text of a JSON error contains no part of the file.
            _warn(f"{path} can't be read", error)
            return None
        return data if data.get("account") == account else None

    def _of_lost_purchase(
        self, folder: Path, account: str, order_id: int, order: Order
    ) -> dict[str, Any] | None:
        """Return the newest saved purchase that can have made this order, and assign it."""
        fitting = [
            (path, data)
            for path in self._files(folder, f"{account[:12]}-server-{order.server_id}-")
            if (data := self._read(path, account)) is not None and matches_entry(data, order)
        ]
        if not fitting:
            return None
        path, found = max(fitting, key=lambda purchase: finite(purchase[1].get("started")) or 0.0)
        try:
            path.replace(self._path(folder, account, order_id))
        except OSError as error:
            _warn(f"{path} can't be renamed", error)
        return found


def _fields_of(data: dict[str, Any]) -> dict[str, str]:
    return {n: Secret(data[n]) for n in _SAVED_FIELDS if isinstance(data.get(n), str)}


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def remove_file(path: Path) -> None:
    """Remove a file of the state folder; only warn if that fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        warn_once(f"{path} can't be removed: {reason}; it holds the login of an order: remove it")


def _warn(what: str, error: object) -> None:
    reason = getattr(error, "strerror", None) or error
    warn_once(f"{what}: {reason}; another process can't log in without the password or the key")
