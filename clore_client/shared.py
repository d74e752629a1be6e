"""What all clients of a process share for one key and base URL."""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import os
from collections.abc import Callable
from typing import Generic, TypeVar
from urllib.parse import urlsplit

V = TypeVar("V")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_loopback_host(host: str) -> bool:
    """Whether a host, as a URL names it, is this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@functools.lru_cache(maxsize=64)
def canonical_url(base_url: str) -> str:
    """Return one spelling for all URLs of an API: ``HTTP://127.0.0.1`` is ``http://localhost``."""
    parts = urlsplit(base_url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    host = "localhost" if is_loopback_host(host) else host
    port = parts.port or _DEFAULT_PORTS.get(scheme)
    return f"{scheme}://{host}:{port}{parts.path.rstrip('/')}"


class PerAccount(Generic[V]):
    """One ``V`` for each base URL and key, made when it is first asked for.

    A forked child starts with none: another thread may have held a lock of theirs at the fork.
    """

    def __init__(self, make: Callable[[], V]) -> None:
        self._make = make
        self._of: dict[tuple[str, bytes], V] = {}
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._of.clear)

    def of(self, base_url: str, api_key: str) -> V:
        """Return the one of this account."""
        # A digest, so that no key stands in a table of the process.
        account = (canonical_url(base_url), hashlib.sha256(api_key.encode()).digest())
        found = self._of.get(account)
        # One step, and so without a lock: of two that are made at once, both callers get the first.
        return self._of.setdefault(account, self._make()) if found is None else found
