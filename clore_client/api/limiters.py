"""Choose who keeps the rate limit: this process, this machine, or Redis."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from clore_client.api.rate_limit import ProcessStore, ScheduledRateLimiter
from clore_client.api.shared_limit import LIMIT_PREFIX, FileStore
from clore_client.config import canonical_url

_limiters: dict[tuple[str, str], ScheduledRateLimiter] = {}

if hasattr(os, "register_at_fork"):
    # Another thread may have held a lock of theirs at the fork.
    os.register_at_fork(after_in_child=_limiters.clear)


def limiter_for(base_url: str, api_key: str, folder: Path | None) -> ScheduledRateLimiter:
    """Return the rate limiter that all requests with this key to this API share.

    Parameters:
        base_url, api_key: what the limit belongs to.
        folder: the state folder; None for a limit of this process alone.
    """
    # A digest, so that no key stands in a table of the process, nor in the name of a file.
    account = f"{canonical_url(base_url)}\n{api_key}"
    digest = hashlib.sha256(f"rate limit\n{account}".encode()).hexdigest()[:32]
    place = (digest, str(folder or ""))
    found = _limiters.get(place)
    if found is None:
        store = ProcessStore() if folder is None else FileStore(folder / f"{LIMIT_PREFIX}{digest}")
        # One step, and so without a lock: of two made at once, both callers get the first.
        found = _limiters.setdefault(place, ScheduledRateLimiter(store))
    return found
