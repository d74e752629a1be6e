"""Keep a rate limit in Redis, so that many machines share it."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from typing import Any, NamedTuple, Protocol

from clore_client.api.rate_limit import (
    PACE,
    PollResult,
    StoreUnavailableError,
    Turn,
    entry_lifetime,
    random_gap,
)
from clore_client.errors import ConfigurationError, Secret, printable, redact

REDIS_TIMEOUT = 0.5  # seconds to connect, and for one reply
REDIS_EXPIRY = 86_400  # seconds after which Redis forgets a key that nobody uses
FOREVER = 1e9  # seconds; JSON has no infinity

# The steps of the class Schedule, by the clock of the Redis server. Times in ``turn`` are relative
# to now. A missing schedule may just have been lost, so the first request waits for one interval.
REDIS_SCRIPT = """
local step, turn, rules = ARGV[1], cjson.decode(ARGV[2]), cjson.decode(ARGV[3])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local text = redis.call('GET', KEYS[1])
local s = {last = now, interval = turn.interval, surplus = 0, gap = 0, paused_until = 0,
           spaced = {}, waiting = {}}
if text then s = cjson.decode(text) end
s.last = math.min(s.last, now + s.interval)
s.paused_until = math.min(s.paused_until, now + rules.longest_pause)
for _, entry in pairs(s.spaced) do entry[1] = math.min(entry[1], now + entry[2]) end
local granted, at, paused, too_late = 0, now, 0, 0

local function record(moment)
  s.last, s.interval = moment, turn.interval
  if turn.name then s.spaced[turn.name] = {moment, turn.spacing} end
end

local function poll()
  local own = now + turn.not_before
  local before = turn.name and s.spaced[turn.name]
  if before then
    own = math.max(own, before[1] + math.max(turn.spacing, before[2]))
  end
  if turn.rank > 0 then
    own = math.max(own, s.paused_until)
    paused = s.paused_until - now
  end
  local ready = s.last + math.max(s.interval, turn.interval) + turn.rank * s.gap
  ready = math.max(own, ready)
  s.waiting[turn.id] = nil
  if paused > turn.patience or math.max(ready - now, 0) > turn.deadline then
    too_late = 1
    return
  end
  local arrived, ahead = now - turn.age, {}
  for id, entry in pairs(s.waiting) do
    if entry[4] <= now then
      s.waiting[id] = nil
    elseif (entry[1] < turn.rank or (entry[1] == turn.rank and entry[2] < arrived))
        and entry[3] <= ready then
      table.insert(ahead, id)
    end
  end
  local grace = math.min(rules.grace * #ahead, rules.longest_grace) * turn.interval
  at = ready - rules.lead * turn.interval + grace
  if at > now then
    s.waiting[turn.id] = {turn.rank, arrived, own, now + turn.expiry}
    return
  end
  for _, id in ipairs(ahead) do s.waiting[id] = nil end
  granted, at = 1, math.max(ready, now)
  record(at + rules.late * turn.interval)
  s.gap = s.surplus * turn.gap
end

if step == 'poll' then
  poll()
elseif step == 'sent' then
  record(math.max(s.last, now - turn.sent))
elseif step == 'refused' then
  local wider = s.surplus + rules.slow_down * turn.interval
  s.surplus = math.min(wider, rules.widest * turn.interval)
  s.gap = rules.jitter * turn.interval * turn.random
  if turn.retry_after > 0 then
    local pause = math.min(turn.retry_after + s.gap, rules.longest_pause)
    s.paused_until = math.max(s.paused_until, now + pause)
  end
elseif step == 'accepted' then
  s.surplus = s.surplus * (1 - rules.speed_up)
  if s.surplus < 0.01 * turn.interval then s.surplus = 0 end
end
redis.call('SET', KEYS[1], cjson.encode(s), 'EX', rules.expiry)
return {granted, tostring(at - now), tostring(paused), s.surplus > 0 and 1 or 0, too_late}
"""

REDIS_RULES = json.dumps({**PACE, "expiry": REDIS_EXPIRY})


class RedisClient(Protocol):
    """List the methods of a client such as ``redis.Redis`` that are used."""

    def eval(self, script: str, numkeys: int, /, *keys_and_args: Any) -> Any:
        """Run a Lua script on the server."""


class RedisServer(NamedTuple):
    """A Redis client, the name of its server for messages, and the secrets to mask in them."""

    client: RedisClient
    name: str
    secrets: tuple[str, ...] = ()


def redis_server(rate_limiter: Any, source: str) -> RedisServer:
    """Return the Redis server for the argument ``rate_limiter``.

    Parameters:
        rate_limiter: a URL, or a client like ``redis.Redis``.
        source: the argument or variable that has it, for the error.
    """
    if not isinstance(rate_limiter, str):
        if not callable(getattr(rate_limiter, "eval", None)):
            raise TypeError(
                "rate_limiter must be a URL like 'redis://host:6379/0' or a redis.Redis client, "
                f"not {type(rate_limiter).__name__}"
            )
        return RedisServer(rate_limiter, f"{type(rate_limiter).__name__} {id(rate_limiter):x}")
    try:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        raise ConfigurationError(f"{source} needs redis-py: pip install redis") from None
    client: Any = None  # it connects on first use
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        client = Redis.from_url(
            Secret(rate_limiter), socket_timeout=REDIS_TIMEOUT,
            socket_connect_timeout=REDIS_TIMEOUT, retry=Retry(NoBackoff(), 0),
        )  # fmt: skip
    if client is None:
        # The URL is not shown, as it may contain a password.
        raise ConfigurationError(
            f"{source} is not a usable URL: it must be like 'redis://host:6379/0', "
            "'rediss://:password@host:6379/0' or 'unix:///path'"
        )
    options = client.connection_pool.connection_kwargs
    place = options.get("path") or f"{options.get('host')}:{options.get('port', 6379)}"
    password = options.get("password")
    secrets = (Secret(password),) if password else ()
    return RedisServer(client, printable(f"{place}/{options.get('db') or 0}", 200), secrets)


class RedisStore:
    """Keep a schedule in Redis.

    Parameters:
        server: the Redis server.
        account: a digest of the key.
    """

    def __init__(self, server: RedisServer, account: str) -> None:
        self._server = server
        self._key = f"clore-client:rate-limit:{account}"

    @property
    def level(self) -> str:
        """Describe who shares the schedule."""
        return f"among all machines, by Redis at {self._server.name}"

    def apply(self, step: str, turn: Turn) -> PollResult:
        """Run one step in Redis. Only the result of ``poll`` is used."""
        numbers = _numbers(turn, time.monotonic())
        try:
            reply = self._server.client.eval(REDIS_SCRIPT, 1, self._key, step, numbers, REDIS_RULES)
            granted, seconds, paused, slowed, too_late = map(float, reply)
            if not math.isfinite(seconds) or (granted and seconds > turn.interval):
                raise ValueError("the reply is not valid")
        except Exception as error:  # a client that the user passed may raise any class
            text = redact(f"{type(error).__name__}: {error}", self._server.secrets)
            raise StoreUnavailableError(
                f"Redis at {self._server.name} can't be used: {printable(text, 200)}"
            ) from None
        at = time.monotonic() + seconds
        return PollResult(bool(granted), at, paused, bool(slowed), bool(too_late))


def _numbers(turn: Turn, now: float) -> str:
    """Return the fields of a turn that the script needs, as JSON."""
    numbers: dict[str, Any] = {
        "id": turn.id,
        "rank": turn.rank,
        "age": now - turn.arrived,
        "interval": turn.interval,
        "not_before": max(turn.not_before - now, -FOREVER),
        "deadline": min(turn.deadline - now, FOREVER),
        "patience": min(turn.patience, FOREVER),
        "expiry": entry_lifetime(turn),
        "sent": min(now - turn.sent_at, FOREVER),
        "retry_after": turn.retry_after,
        "random": random.random(),
        "gap": random_gap(),
    }
    if turn.spacing is not None:
        numbers["name"], numbers["spacing"] = turn.spacing
    return json.dumps(numbers)
