"""Share a rate limit: by a file on this machine, or through Redis among many machines."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clore_client.api.rate_limit import (
    ProcessStore,
    RateLimiter,
    Schedule,
    Store,
    StoreUnavailableError,
    Turn,
)
from clore_client.config import account_digest, lock_file, open_private, read_line, set_lock
from clore_client.errors import Secret
from clore_client.log import logger
from clore_client.process import this_process

if TYPE_CHECKING:
    from clore_client.api.redis_limit import RedisServer

DECODER = json.JSONDecoder()
LIMIT_PREFIX = "rate-limit-"
SCHEDULE_FORMAT = "json-1"
LONGEST_SCHEDULE = 100_000  # bytes
LIMIT_LOCK_PATIENCE = 0.5  # seconds; other processes lock the file for microseconds
NUMBERS = ("last", "interval", "surplus", "gap", "paused_until")
LIMITER_VARIABLE = "CLORE_RATE_LIMITER"
TRY_AGAIN = 5.0  # seconds after which a store that failed is tried again


class FileStore:
    """Keep a schedule in a file, which is locked for one step, never while waiting or sending.

    Parameters:
        path: the file. Its name must not contain the key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # so that threads do not wait for the lock of the file

    @property
    def level(self) -> str:
        """Describe who shares the schedule."""
        return f"among all processes on this machine, by {self._path}"

    def apply(self, step: str, turn: Turn) -> Any:
        """Run one step of the schedule."""
        try:
            with self._lock:
                handle = open_private(self._path)
                try:
                    return self._apply(handle, step, turn)
                finally:
                    os.close(handle)
        except OSError as error:
            raise StoreUnavailableError(f"{self._path} can't be used: {error}") from error

    def _apply(self, handle: int, step: str, turn: Turn) -> Any:
        if not lock_file(handle, LIMIT_LOCK_PATIENCE):
            raise OSError("another process keeps it locked")
        try:
            now = time.monotonic()
            schedule = load(os.read(handle, LONGEST_SCHEDULE), now)
            result = getattr(schedule, step)(turn, now)
            text = dump(schedule)
            os.lseek(handle, 0, os.SEEK_SET)
            if os.write(handle, text) != len(text):
                raise OSError("the disk is full")
            return result
        finally:
            set_lock(handle, locked=False)  # a forked child may still have it open


def limit_name(account: str) -> str:
    """Return the name of the file for an account.

    It differs by machine and boot, because the clocks differ and machines may share the folder. It
    also differs by format, because a version of this client treats another format as damaged.
    """
    boot = read_line("/proc/sys/kernel/random/boot_id") or socket.gethostname()
    digest = hashlib.sha256(f"{account}\n{boot}\n{SCHEDULE_FORMAT}".encode())
    return LIMIT_PREFIX + digest.hexdigest()[:32]


def dump(schedule: Schedule) -> bytes:
    """Return a schedule as a line of JSON. The rest of a longer, earlier text may follow it."""
    return json.dumps(vars(schedule)).encode() + b"\n"


def load(text: bytes, now: float) -> Schedule:
    """Parse a schedule.

    If the text is damaged, return a new schedule, in which the first request waits for one
    interval, because another request may just have been sent.
    """
    schedule = Schedule()
    if not text:
        return schedule
    try:
        fields, _ = DECODER.raw_decode(text.decode())
        numbers = [float(fields[name]) for name in NUMBERS]
        if not math.isfinite(sum(numbers)):
            raise ValueError
        vars(schedule).update(zip(NUMBERS, numbers, strict=True))
        schedule.spaced = _table(fields["spaced"], 2)
        schedule.waiting = _table(fields["waiting"], 4)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        schedule = Schedule()
        schedule.last = now
    return schedule


def _table(rows: dict[str, list[float]], columns: int) -> dict[str, list[float]]:
    if any(len(row) != columns for row in rows.values()):
        raise ValueError
    return {name: list(map(float, row)) for name, row in rows.items()}


class FallbackStore:
    """Use another store while the first one is not available.

    Parameters:
        first: the store to use.
        second: the store to use while the first one fails.
    """

    def __init__(self, first: Store, second: Store) -> None:
        self._first = first
        self._second = second
        self._failure = ""
        self._failed_at: float | None = None
        self._next_try = 0.0

    @property
    def level(self) -> str:
        """Describe who shares the schedule now, and for how long the first store has failed."""
        failed_at = self._failed_at
        if failed_at is None:
            return self._first.level
        seconds = time.monotonic() - failed_at
        return f"{self._second.level} (for {seconds:.0f} s, because {self._failure})"

    def apply(self, step: str, turn: Turn) -> Any:
        """Run one step of the schedule."""
        if self._failed_at is not None and time.monotonic() < self._next_try:
            return self._second.apply(step, turn)
        # Set before the try, which can be slow: other threads then use the second store.
        self._next_try = time.monotonic() + TRY_AGAIN
        try:
            result = self._first.apply(step, turn)
        except StoreUnavailableError as error:
            now = time.monotonic()
            self._next_try = now + TRY_AGAIN  # after a try that was slow
            if self._failed_at is None:
                self._failed_at, self._failure = now, str(error)
                text = "the rate limit is only shared %s, because %s"
                logger.warning(text, self._second.level, self._failure)
            return self._second.apply(step, turn)
        if self._failed_at is not None:
            self._failed_at = None
            logger.info("the rate limit is shared again %s", self._first.level)
        return result


def redis_server_for(rate_limiter: Any) -> RedisServer | None:
    """Return the Redis server for the argument ``rate_limiter``; None if there is none.

    Parameters:
        rate_limiter: a URL, a client like ``redis.Redis``, or None for the environment variable.
    """
    source = "rate_limiter"
    if rate_limiter is None:
        source, rate_limiter = LIMITER_VARIABLE, Secret.of(os.environ.get(LIMITER_VARIABLE))
        if not rate_limiter:
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
