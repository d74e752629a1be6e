"""Check request bodies; a wrong one is refused with code 2."""

from __future__ import annotations

import re
import sys
from typing import Any

from .market import RefusedError
from .settings import CURRENCIES

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Characters that make the live API answer with a database error: &, typographic quotes, emoji.
_BREAKS_DATABASE = re.compile(
    "[&\u00ab\u00bb\u2018-\u201f\u2039\u203a\u300c-\u300f\u2600-\u27bf\U0001f000-\U0001ffff]"
)
_ENV_NAME, _ENV_VALUE, _ENV_ALL = 128, 1536, 12288


def require(good: bool) -> None:
    """Refuse with code 2 unless `good`."""
    if not good:
        raise RefusedError(2)


def object_of(body: object) -> dict[str, Any]:
    """Return the body if it is a JSON object."""
    require(isinstance(body, dict))
    return body  # type: ignore[return-value]


def id_of(value: object) -> int:
    """Return a positive integer, given as a number or as a string of digits."""
    # int() fails for thousands of digits.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    require(isinstance(value, int) and not isinstance(value, bool) and value > 0)
    return value  # type: ignore[return-value]


def amount_of(value: object) -> float:
    """Return a positive finite number."""
    require(isinstance(value, (int, float)) and not isinstance(value, bool))
    # math.isfinite() fails for integers beyond the range of floats.
    require(0 < value <= sys.float_info.max)  # type: ignore[operator]
    return float(value)  # type: ignore[arg-type]


def order_body(body: object) -> dict[str, Any]:
    """Return a checked copy of the body of create_order, with defaults for missing fields."""
    order = {"ports": {}, "env": {}} | object_of(body)
    order["renting_server"] = id_of(order.get("renting_server"))
    require(order.get("type") in ("on-demand", "spot"))
    require(order.get("currency") in CURRENCIES)
    image = order.get("image")
    require(isinstance(image, str) and 0 < len(image.strip()) <= 512)
    _text(order, "ssh_password", 32)
    _text(order, "jupyter_token", 32)
    _text(order, "ssh_key", 3072)
    _text(order, "command", 65536)
    require(isinstance(order.get("remember_password", False), bool))
    entrypoint = order.get("autossh_entrypoint", False)
    require(isinstance(entrypoint, bool) or entrypoint == "ssh_autoinstall")
    require(isinstance(order.get("dockerhub_auth", {}), (dict, str)))
    _ports(order["ports"])
    _env(order["env"])
    if order["type"] == "spot":
        amount_of(order.get("spotprice"))
    if order.get("required_price") is not None:
        amount_of(order["required_price"])
    return order


def breaks_database(env: dict[str, str]) -> bool:
    """Return whether a value would make the API answer with a database error."""
    return any(_BREAKS_DATABASE.search(value) for value in env.values())


def _text(body: dict[str, Any], name: str, limit: int) -> None:
    value = body.get(name, "")
    require(isinstance(value, str) and len(value) <= limit)


def _ports(ports: object) -> None:
    require(isinstance(ports, dict))
    for port, kind in ports.items():  # type: ignore[attr-defined]
        require(port.isascii() and port.isdigit() and len(port) <= 5)
        require(1 <= int(port) <= 65535)
        require(kind in ("tcp", "http"))


def _env(env: object) -> None:
    require(isinstance(env, dict))
    total = 2
    for name, value in env.items():  # type: ignore[attr-defined]
        require(isinstance(value, str) and _NAME.fullmatch(name) is not None)
        require(len(name) <= _ENV_NAME and len(value) <= _ENV_VALUE)
        require("\0" not in value)
        total += len(name) + len(value) + 6
    require(total <= _ENV_ALL)
