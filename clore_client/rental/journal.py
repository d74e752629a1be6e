"""Keep the journal: one small file for each order, which survives the process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import stat
from pathlib import Path
from typing import Any

from clore_client.config import (
    SAFE_FLAGS,
    lock_file,
    make_private_folder,
    read_line,
    replace_file,
    warn_about_state,
)
from clore_client.models.record import whole_id
from clore_client.process import this_process

STATE_SUFFIX = ".json"
JOURNAL_SCHEMA = 1  # a later version adds fields, and keeps these
LONGEST_ENTRY = 65536  # bytes; a longer file is not an entry
KEPT_FOLDER = "kept"  # in the state folder; only cancel_overdue() ends the orders of its entries
_ID_LENGTH = 20  # characters for the order id, which is written later
_FIRST = '{"order_id": '


def this_machine() -> dict[str, str]:
    """Return the identity of this machine."""
    machine = read_line("/etc/machine-id") or read_line("/var/lib/dbus/machine-id")
    # machine-id(5) says to keep the id itself private.
    digest = hashlib.sha256(f"clore-client {machine}".encode()).hexdigest()[:16] if machine else ""
    return {"host": socket.gethostname(), "machine": digest}


class JournalEntry:
    """Keep one order in a small file.

    A living process keeps its entries locked. If a file is not locked, its process is dead; the
    process that finds it locks it until ``close()``.

    Attributes:
        data: the content of the file.
        of_this_machine: whether this machine wrote it.
        abandoned: whether no process will end its order, because its process, on this machine, is
            dead, or its rental gave up.
    """

    def __init__(
        self,
        path: Path,
        data: dict[str, Any],
        *,
        of_this_machine: bool = True,
        lock: int | None = None,
    ) -> None:
        self.path = path
        self.data = data
        self.of_this_machine = of_this_machine
        self.abandoned = lock is not None
        self._handle = lock
        self._written_here = False

    @property
    def order_id(self) -> int | None:
        """The id of the order; None if it is missing or not valid."""
        order_id = whole_id(self.data.get("order_id"))
        return order_id if order_id is not None and order_id > 0 else None

    def write(self) -> None:
        """Create the file, lock it, and sync it to the disk."""
        self._written_here = True
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
        handle = os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o600)
        self._handle = handle
        if not lock_file(handle, patience=1.0):  # another process may try the lock for a moment
            raise OSError("the file can't be locked")
        rest = json.dumps(self.data)[1:]
        text = f"{_FIRST}{'null':<{_ID_LENGTH}}, {rest}\n".encode()
        if os.write(handle, text) != len(text):
            raise OSError("the disk is full")
        os.fsync(handle)
        _sync_folder(self.path.parent)
        this_process.entries[str(self.path)] = self

    def write_order_id(self, order_id: int) -> None:
        """Write the order id into the file, in place, so that a crash can't damage the rest."""
        if self._handle is None:
            return
        self.data["order_id"] = order_id
        try:
            os.lseek(self._handle, len(_FIRST), os.SEEK_SET)
            os.write(self._handle, f"{order_id:<{_ID_LENGTH}}".encode())
            os.fsync(self._handle)
        except OSError as error:
            warn_about_state(f"{self.path.name} could not be updated", error)

    def remove(self) -> None:
        """Remove the file. Safe to repeat."""
        this_process.entries.pop(str(self.path), None)
        if self._handle is None and self._written_here:
            return
        if os.name == "nt":  # Windows can't remove an open file
            self.unlock()
        _remove_file(self.path)
        self.unlock()  # after the removal, so that no other process finds the file unlocked

    def close(self) -> None:
        """Release the lock, unless this process wrote the file."""
        if not self._written_here:
            self.unlock()

    def unlock(self) -> None:
        """Close the file, which releases its lock."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):
                os.close(handle)


def _remove_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warn_about_state(f"{path} can't be removed", error)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_entry(folder: Path | None, data: dict[str, Any]) -> JournalEntry | None:
    """Write an entry. If that fails, warn once and return None."""
    if folder is None:
        return None
    name = f"{random.SystemRandom().getrandbits(96):024x}{STATE_SUFFIX}"
    data = {"schema": JOURNAL_SCHEMA, **data, **this_machine(), "pid": os.getpid()}
    entry = JournalEntry(folder / name, data)
    try:
        entry.write()
    except OSError as error:
        entry.remove()
        warn_about_state(f"the journal in {folder} can't be written", error)
        return None
    return entry


def read_entries(folder: Path | None) -> list[JournalEntry]:
    """Return all entries of the folder. Skip a file that can't be read, and warn once."""
    if folder is None:
        return []
    try:
        names = sorted(n for n in os.listdir(folder) if n.endswith(STATE_SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        warn_about_state(f"{folder} could not be read", error)
        return []
    machine = this_machine()
    found = []
    for name in names:
        try:
            entry = _read_entry(folder / name, machine)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            warn_about_state(f"{folder / name} is not a readable journal entry", error)
            continue
        if entry is not None:
            found.append(entry)
    return found


def _read_entry(path: Path, machine: dict[str, str]) -> JournalEntry | None:
    if (written := this_process.entries.get(str(path))) is not None:
        return written
    # Some systems can lock only files that are open for writing.
    handle = os.open(path, SAFE_FLAGS | os.O_RDWR)
    keep = False
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LONGEST_ENTRY:
            raise ValueError("it is not a small regular file")
        try:
            free = lock_file(handle)
        except OSError as error:  # without locks, the process may still be alive
            warn_about_state(f"files in {path.parent} can't be locked", error)
            free = False
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, LONGEST_ENTRY)
        if not text:  # just created, or its process died before it sent anything
            return None
        if free and not path.exists():  # its owner has just removed it
            return None
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("it is not a JSON object")
        here = all(data.get(name) == value for name, value in machine.items())
        keep = free and here
        return JournalEntry(path, data, of_this_machine=here, lock=handle if keep else None)
    finally:
        if not keep:
            os.close(handle)


# --- orders that stay after their rental ---


def record_kept(folder: Path | None, data: dict[str, Any], until: float | None) -> bool:
    """Record an order that stays, in place of an earlier record. Return whether that worked.

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
    _remove_file(_kept_path(folder, account, order_id))


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
