"""Choose who shares a rate limit: this process, this machine, or many machines through Redis."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clore_client.api.file_limit import FileStore, limit_name
from clore_client.api.rate_limit import (
    ProcessStore,
    RateLimiter,
    Store,
    StoreUnavailableError,
    Turn,
)
from clore_client.config import account_digest
from clore_client.log import logger
from clore_client.process import this_process

if TYPE_CHECKING:
    from clore_client.api.redis_limit import RedisServer

LIMITER_VARIABLE = "CLORE_RATE_LIMITER"
TRY_AGAIN = 5.0  # seconds after which a store that failed is tried again


class FallbackStore:
    """A store that uses another one while the first is not available.

    Parameters:
        first: the store to use.
        second: the store for the time in which the first one fails.
    """

    def __init__(self, first: Store, second: Store) -> None:
        self._first = first
        self._second = second
        self._failure = ""
        self._failed_at: float | None = None
        self._next_try = 0.0
        self._warned = False

    @property
    def level(self) -> str:
        """Who shares the schedule now, and since when it is not the first store."""
        failed_at = self._failed_at
        if failed_at is None:
            return self._first.level
        seconds = time.monotonic() - failed_at
        return f"{self._second.level} (since {seconds:.0f} s, because {self._failure})"

    def apply(self, step: str, turn: Turn) -> Any:
        """Make one step."""
        if self._failed_at is not None and time.monotonic() < self._next_try:
            return self._second.apply(step, turn)
        # If it takes time to fail again, other threads do not wait for it.
        self._next_try = time.monotonic() + TRY_AGAIN
        try:
            result = self._first.apply(step, turn)
        except StoreUnavailableError as error:
            self._fall_back(str(error))
            return self._second.apply(step, turn)
        if self._failed_at is not None:
            self._failed_at = None
            logger.info("the rate limit is shared again %s", self._first.level)
        return result

    def _fall_back(self, failure: str) -> None:
        now = time.monotonic()
        self._next_try = now + TRY_AGAIN
        if self._failed_at is not None:
            return
        self._failed_at, self._failure = now, failure
        logger.log(
            logging.INFO if self._warned else logging.WARNING,
            "the rate limit is only shared %s, because %s",
            self._second.level,
            failure,
        )
        self._warned = True


def redis_server_for(rate_limiter: Any) -> RedisServer | None:
    """Return the Redis server for the argument ``rate_limiter``; None if there is none.

    Parameters:
        rate_limiter: a URL, a client like ``redis.Redis``, or None for the environment variable.
    """
    source = "rate_limiter"
    if rate_limiter is None:
        source, rate_limiter = LIMITER_VARIABLE, os.environ.get(LIMITER_VARIABLE) or None
    if rate_limiter is None:
        return None
    from clore_client.api.redis_limit import redis_server

    return redis_server(rate_limiter, source)


def limiter_for(
    base_url: str, api_key: str, folder: Path | None, server: RedisServer | None = None
) -> RateLimiter:
    """Return the rate limiter that all requests with a key to an API share.

    Parameters:
        base_url, api_key: what the limit belongs to.
        folder: the state folder; None to share the limit within this process only.
        server: the Redis server; None to share the limit on this machine only.
    """
    account = account_digest(base_url, api_key)  # in place of the key

    def make() -> RateLimiter:
        store: Store = ProcessStore()
        if folder is not None:
            store = FallbackStore(FileStore(folder / limit_name(account)), store)
        if server is not None:
            from clore_client.api.redis_limit import RedisStore

            store = FallbackStore(RedisStore(server, account), store)
        return RateLimiter(store)

    name = server.name if server else ""
    return this_process.of_account(make, account, str(folder or ""), name)
