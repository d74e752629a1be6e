"""Remember for a day which hosts worked, and which disappointed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clore_client.config import canonical_url
from clore_client.files import locked_path, read_state_file, replace_file
from clore_client.log import logger
from clore_client.pricing import finite

HOST_HISTORY_FILE = "host_history"  # in the state folder
HISTORY_SCHEMA = 1
HISTORY_LASTS = 86_400.0  # seconds
MOST_HOSTS = 1000
HISTORY_PATIENCE = 1.0  # seconds to wait for another process that writes the file

WORKED = "worked"
NOT_DEPLOYED = "not deployed"
# ``SSHError.reason`` -> the outcome
LOGIN_OUTCOMES = {"unreachable": "no sshd", "refused": "login refused"}


class HostHistory:
    """What happened on each host, in memory and in the state folder.

    Parameters:
        folder: returns the state folder, or None if none is used.
        base_url: returns the base URL, because each API has its own servers.
    """

    def __init__(self, folder: Callable[[], Path | None], base_url: Callable[[], str]) -> None:
        self._folder = folder
        self._base_url = base_url
        self._here: dict[str, dict[str, Any]] = {}  # what this process has seen

    def record(self, server_id: int | None, outcome: str | None) -> None:
        """Record what happened on a host; nothing if one of the two is not known."""
        if not server_id or outcome is None:
            return
        name = f"{canonical_url(self._base_url())} {server_id}"
        self._here[name] = {"outcome": outcome, "time": time.time()}
        if (folder := self._folder()) is None:
            return
        path = folder / HOST_HISTORY_FILE
        try:
            with locked_path(path, HISTORY_PATIENCE):
                hosts = {**self._read(path), name: self._here[name]}
                newest = sorted(hosts.items(), key=lambda item: -item[1]["time"])[:MOST_HOSTS]
                text = json.dumps({"schema": HISTORY_SCHEMA, "hosts": dict(newest)})
                replace_file(path, text)
        except OSError as error:
            logger.debug("%s can't be written: %s", path, error)

    def outcomes(self) -> dict[int, dict[str, Any]]:
        """Return ``outcome`` and ``time`` of each host of the last day, by server id."""
        hosts = dict(self._here)
        if (folder := self._folder()) is not None:
            for name, seen in self._read(folder / HOST_HISTORY_FILE).items():
                if name not in hosts or seen["time"] > hosts[name]["time"]:
                    hosts[name] = seen
        start = f"{canonical_url(self._base_url())} "
        return {
            int(name.removeprefix(start)): dict(seen)
            for name, seen in hosts.items()
            if name.startswith(start) and name.removeprefix(start).isdecimal() and _is_fresh(seen)
        }

    @staticmethod
    def _read(path: Path) -> dict[str, dict[str, Any]]:
        """Return the valid entries of the file of the last day."""
        try:
            hosts = read_state_file(path).get("hosts")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.debug("%s can't be read: %s", path, error)
            return {}
        return {n: s for n, s in hosts.items() if _is_fresh(s)} if isinstance(hosts, dict) else {}


def _is_fresh(seen: Any) -> bool:
    if not isinstance(seen, dict) or not isinstance(seen.get("outcome"), str):
        return False
    at = finite(seen.get("time"))
    return at is not None and abs(time.time() - at) < HISTORY_LASTS
