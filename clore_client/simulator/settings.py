"""Check the arguments of `Simulator`."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

Seconds = float | tuple[float, float]
Balance = float | Mapping[str, float | None]

CURRENCIES = ("bitcoin", "CLORE-Blockchain", "USD-Blockchain")


def draw(rng: Random, seconds: Seconds) -> float:
    """Return a number of seconds, drawn at random if given a (low, high) pair."""
    if isinstance(seconds, tuple):
        return rng.uniform(*seconds)
    return seconds


@dataclass(frozen=True)
class Settings:
    """Hold the arguments of `Simulator`; see there."""

    servers: int
    seed: int
    form: str
    rate_limit: float
    create_order_interval: float
    visible_after: Seconds
    deploy_after: Seconds
    cancel_lingers: Seconds
    balance: Balance
    ssh: bool
    tls: bool
    host: str
    port: int
    create_answer: str
    cancel_ended: str
    clock_offset: float
    retry_after: bool
    creation_fee: float
    creation_fee_after: float
    max_step: float
    lowering_interval: float
    sshd_after: Seconds
    reuse_ports: bool
    chaos: float
    chaos_seed: int | None
    chaos_kinds: Sequence[str] | None

    def __post_init__(self) -> None:
        _check_int("servers", self.servers, 0, 100_000)
        _check_int("seed", self.seed)
        if self.chaos_seed is not None:
            _check_int("chaos_seed", self.chaos_seed)
        _check_int("port", self.port, 0, 65535)
        _check_choice("form", self.form, ("live", "documented"))
        _check_choice("create_answer", self.create_answer, ("none", "order_id", "id", "order"))
        _check_choice("cancel_ended", self.cancel_ended, ("accept", "refuse"))
        for name in (
            "rate_limit",
            "create_order_interval",
            "creation_fee",
            "creation_fee_after",
            "max_step",
            "lowering_interval",
        ):
            _check_number(name, getattr(self, name))
        for name in ("visible_after", "deploy_after", "cancel_lingers", "sshd_after"):
            check_seconds(name, getattr(self, name))
        _check_number("clock_offset", self.clock_offset, low=-math.inf, infinite=False)
        _check_number("chaos", self.chaos, high=1.0)
        for name in ("ssh", "tls", "retry_after", "reuse_ports"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        check_balance(self.balance)
        _check_loopback(self.host)


def check_seconds(name: str, value: object) -> None:
    """Check a number of seconds, or a (low, high) pair of them."""
    if not isinstance(value, tuple):
        _check_number(name, value)
        return
    if len(value) != 2:
        raise ValueError(f"{name} must be a number or a (low, high) pair, not {value!r}")
    for part in value:
        _check_number(name, part, infinite=False)
    if value[0] > value[1]:
        raise ValueError(f"{name} must be a (low, high) pair, not {value!r}")


def check_balance(value: object) -> None:
    """Check an amount in USD, or a dict of amounts by currency."""
    if not isinstance(value, Mapping):
        _check_number("balance", value, infinite=False)
        return
    for currency, amount in value.items():
        _check_choice("balance", currency, CURRENCIES)
        if amount is not None:
            _check_number("balance", amount, infinite=False)


def _check_number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = math.inf,
    infinite: bool = True,
) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= high or (not infinite and math.isinf(value)):  # type: ignore[operator,arg-type]
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise ValueError(f"{name} must be a number {limits}, not {value!r}")


def _check_int(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    good = isinstance(value, int) and not isinstance(value, bool)
    if good and low is not None and high is not None:
        good = low <= value <= high  # type: ignore[operator]
    if not good:
        limits = "" if low is None else f" from {low} to {high}"
        raise ValueError(f"{name} must be a whole number{limits}, not {value!r}")


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _check_loopback(host: object) -> None:
    # Anybody who can reach the SSH hosts can run commands as this user.
    try:
        good = host == "localhost" or ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"host must be a loopback address, not {host!r}")
