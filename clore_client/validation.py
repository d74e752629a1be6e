"""Check arguments. Each error names the argument, its value and the allowed values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from clore_client.errors import Secret, printable
from clore_client.log import logger
from clore_client.pricing import CURRENCIES, wire_currency

Timeout = float | tuple[float | None, float | None] | None

# With these characters in an env value, create_order returns code 1 (seen on the live API).
_REFUSED_CHARACTERS = "[&\u2018-\u201f\u2039\u203a\u00ab\u00bb\U0001f000-\U0001faff\u2600-\u27bf]"
_HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEADER_VALUE = r"(?!\s)[\t\x20-\x7e\x80-\xff]*"
LONGEST_INTERVAL = 86_400.0  # seconds
LONGEST_TIMEOUT = 1e9
MAX_PATH = 4095  # bytes of a local path
MAX_PATH_PART = 255  # bytes of one name in it
MAX_PASSWORD = 32
MAX_TOKEN = 32
MAX_SSH_KEY = 3072
MAX_ENV_NAME = 128
_ENV_NAME = rf"[A-Za-z_][A-Za-z0-9_]{{0,{MAX_ENV_NAME - 1}}}"
MAX_ENV_VALUE = 1536


def short_repr(value: Any) -> str:
    """Return a value on one short line, for an error."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or a class with a broken __repr__
        text = f"<{type(value).__name__} that can't be shown>"
    return printable(text, 80)


def check_type(name: str, value: Any, allowed: str, *kinds: type) -> Any:
    """Check the type of a value, and return it; a bool does not count as an int."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{name} must be {allowed}, not {short_repr(value)}")
    return value


def check_list(name: str, values: Any, allowed: str) -> None:
    """Check that a value is an iterable, and not a string or a dict."""
    if isinstance(values, (str, bytes, Mapping)):
        raise TypeError(f"{name} must be {allowed}, not {short_repr(values)}")
    check_type(name, values, allowed, Iterable)


def check_id(name: str, value: Any) -> int:
    """Check an id: a positive integer, or a string of digits."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value.strip()):
        value = int(value)
    if isinstance(value, Mapping):
        raise TypeError(f"{name} must be a positive integer, not the whole record: pass its .id")
    check_type(name, value, "a positive integer", int, str)
    if isinstance(value, str) or not 1 <= value < 10**18:
        raise ValueError(f"{name} must be a positive integer below 10**18, not {short_repr(value)}")
    return int(value)


def check_order_id(name: str, value: Any) -> int:
    """Return the id of an order, given as the id or as a record of the order."""
    if not isinstance(value, Mapping):
        return check_id(name, value)
    if value.get("order_id") is None:
        raise TypeError(
            f"{name} must be an order or its number, and this one has no order_id: "
            f"{short_repr(value)}"
        )
    return check_id(f"{name}['order_id']", value["order_id"])


def check_order_ids(name: str, values: Any) -> list[int]:
    """Check a list of orders or their ids; a single one or a string is an error."""
    check_list(name, values, "a list of order ids")
    return [check_order_id(f"{name}[{i}]", value) for i, value in enumerate(values)]


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = 0.0,
    above: bool = False,
    maximum: float = math.inf,
    infinite: bool = False,
    unit: str = "",
) -> float:
    """Check a number from ``minimum`` (or above it, with ``above``) to ``maximum``; never NaN."""
    number: float = check_type(name, value, f"a number{unit and ' of ' + unit}", int, float)
    low = number <= minimum if above else number < minimum
    huge = isinstance(number, int) and abs(number) > 10**300  # too large for a float
    if huge or number != number or low or number > maximum or (number == math.inf and not infinite):
        allowed = f"{'above' if above else 'at least'} {minimum:g}"
        allowed += "" if maximum == math.inf else f" and at most {maximum:g}"
        allowed += "" if infinite or maximum != math.inf else " and finite"
        raise ValueError(
            f"{name} must be {allowed}{unit and ' (' + unit + ')'}, not {short_repr(value)}"
        )
    return number


def check_optional_number(name: str, value: Any, **limits: Any) -> float | None:
    """Check a number with the limits of :func:`check_number`; None is allowed."""
    return None if value is None else check_number(name, value, **limits)


def check_count(name: str, value: Any, *, minimum: int = 0, maximum: float = math.inf) -> int:
    """Check a whole number, at least ``minimum``."""
    check_type(name, value, "a whole number", int)
    return int(check_number(name, value, minimum=minimum, maximum=maximum))


def check_interval(name: str, value: Any) -> float:
    """Check a number of seconds, at most a day, as ``time.sleep()`` has a limit."""
    return check_number(name, value, maximum=LONGEST_INTERVAL, unit="seconds")


def check_bool(name: str, value: Any) -> bool:
    """Check that a value is True or False; a string such as ``"false"`` would count as true."""
    checked: bool = check_type(name, value, "True or False", bool)
    return checked


def check_local_path(name: str, path: str | bytes | os.PathLike[Any]) -> None:
    """Check the characters and the length of a local path."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a character that is not allowed in a path") from None
    if b"\0" in encoded:
        raise ValueError(f"{name} must not contain a NUL character")
    longest_part = max(map(len, encoded.split(b"/")))
    if len(encoded) > MAX_PATH or longest_part > MAX_PATH_PART:
        raise ValueError(
            f"{name} is too long: it has {len(encoded)} bytes, {longest_part} of them in one name; "
            f"{MAX_PATH} and {MAX_PATH_PART} are allowed"
        )


def check_callback(name: str, value: Any, arguments: int = 1) -> Any:
    """Check a callback that will get this number of arguments; None is allowed."""
    if value is None:
        return value
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {short_repr(value)}")
    import inspect  # imported here, because it is slow and rarely needed

    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):  # a builtin function without a signature
        return value
    try:
        signature.bind(*[None] * arguments)
    except TypeError:
        one = "one argument" if arguments == 1 else f"{arguments} arguments"
        raise TypeError(f"{name} must be callable with {one}, not {short_repr(value)}") from None
    return value


def check_string(name: str, value: Any) -> str:
    """Check a string, which may be empty."""
    text: str = check_type(name, value, "a string", str)
    return text


def check_text(name: str, value: Any, *, secret: bool = False) -> str:
    """Check a string that must not be empty. The error does not show it if it is ``secret``."""
    if not isinstance(value, str):
        shown = type(value).__name__ if secret else short_repr(value)
        raise TypeError(f"{name} must be a string, not {shown}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty")
    return value


def check_headers(name: str, value: Any) -> dict[str, Any]:
    """Check HTTP headers; None as a value leaves a header out. Values are never shown."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of strings, not {type(value).__name__}")
    for header, text in value.items():
        if not isinstance(header, str):
            raise TypeError(f"{name}: a header's name must be a string, not {short_repr(header)}")
        if not re.fullmatch(_HEADER_NAME, header):
            raise ValueError(f"{name}: {short_repr(header)} is not a valid header name")
        if text is None or header.lower() == "auth":  # the key is checked where it is used
            continue
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"{name}[{header!r}] must be a string, not {type(text).__name__}")
        shape = text if isinstance(text, str) else text.decode("latin-1")
        if not re.fullmatch(_HEADER_VALUE, shape):
            raise ValueError(f"{name}[{header!r}] has a character that is not allowed in a header")
    return dict(value)


def check_timeout(name: str, value: Any) -> Timeout:
    """Check a timeout: seconds, a ``(connect, read)`` pair, or None to wait forever."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(
                f"{name} must be seconds or a (connect, read) pair, not {short_repr(value)}"
            )
        connect, read = (_check_seconds(f"{name}[{i}]", part) for i, part in enumerate(value))
        return connect, read
    return _check_seconds(name, value)


def shortened(timeout: Timeout, longest: float) -> Timeout:
    """Return a timeout with all parts cut to ``longest`` seconds."""
    if isinstance(timeout, tuple):
        connect, read = (longest if part is None else min(part, longest) for part in timeout)
        return connect, read
    return longest if timeout is None else min(timeout, longest)


def longest_part(timeout: Timeout) -> float | None:
    """Return the longer of the connect and the read timeout; None if one waits forever."""
    parts = timeout if isinstance(timeout, tuple) else (timeout, timeout)
    return None if None in parts else max(part for part in parts if part is not None)


def _check_seconds(name: str, value: Any) -> float | None:
    # A socket refuses a longer timeout.
    return check_optional_number(name, value, above=True, maximum=LONGEST_TIMEOUT, unit="seconds")


def check_currency(name: str, value: Any) -> str:
    """Return the API's name of a currency, given that name or ``BTC``, ``CLORE``, ``USD``."""
    found = wire_currency(check_text(name, value))
    if found is None:
        allowed = ", ".join(sorted({*CURRENCIES.values()})) + ", BTC, CLORE or USD"
        raise ValueError(f"{name} must be one of {allowed}, not {short_repr(value)}")
    return found


def check_order_type(name: str, value: Any) -> str:
    """Check an order type: ``"on-demand"`` or ``"spot"``."""
    if value not in ("on-demand", "spot"):
        raise ValueError(f"{name} must be 'on-demand' or 'spot', not {short_repr(value)}")
    return str(value)


def check_ports(name: str, value: Any) -> dict[str, str]:
    """Check a dict of container ports with ``"tcp"`` or ``"http"``; return it with string keys."""
    check_type(name, value, "a dict like {'22': 'tcp'}", Mapping)
    ports: dict[str, str] = {}
    for port, protocol in value.items():
        digits = port if isinstance(port, str) else ""
        if isinstance(port, int) and not isinstance(port, bool) and 1 <= port <= 65535:
            digits = str(port)
        if not re.fullmatch(r"[0-9]{1,5}", digits) or not 1 <= int(digits) <= 65535:
            raise ValueError(f"{name}: a port must be 1 to 65535, not {short_repr(port)}")
        if protocol not in ("tcp", "http"):
            raise ValueError(f"{name}[{port!r}] must be tcp or http, not {short_repr(protocol)}")
        ports[str(int(digits))] = protocol
    return ports


def check_env(name: str, value: Any) -> dict[str, str]:
    """Check environment variables. Errors never show the values, which may be secrets."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of strings, not {type(value).__name__}")
    for variable, text in value.items():
        if not isinstance(variable, str) or not re.fullmatch(_ENV_NAME, variable):
            raise ValueError(
                f"{name}: a variable name must have at most {MAX_ENV_NAME} characters, only "
                f"letters, digits and _, and not begin with a digit, unlike {short_repr(variable)}"
            )
        if not isinstance(text, str):
            raise TypeError(f"{name}[{variable!r}] must be a string, not {type(text).__name__}")
        if len(text) > MAX_ENV_VALUE:
            size = f"{len(text)} characters, and {MAX_ENV_VALUE} are allowed"
            raise ValueError(f"{name}[{variable!r}] has {size}")
        if re.search(_REFUSED_CHARACTERS, text):
            logger.warning(
                "%s[%r] contains '&', a typographic quote or an emoji, which the live API can "
                "refuse with code 1", name, variable,
            )  # fmt: skip
    return {variable: Secret(text) for variable, text in value.items()}


def check_secret(name: str, value: Any, longest: int) -> str:
    """Check a password or token of at most ``longest`` characters."""
    text = check_text(name, value, secret=True)
    if len(text) > longest:
        raise ValueError(f"{name} must have at most {longest} characters, not {len(text)}")
    return Secret(text)


def check_public_key(name: str, value: Any) -> str:
    """Check an SSH public key: one line of text, not a private key and not a path."""
    text = check_text(name, value, secret=True).strip()
    if "PRIVATE KEY" in text:
        raise ValueError(
            f"{name} is a private key, which must never leave your machine: "
            "pass the public key, which is the content of the .pub file"
        )
    if not re.fullmatch(r"(ssh|ecdsa|sk)-\S+ +\S.*", text):
        raise ValueError(
            f"{name} must be one line such as 'ssh-ed25519 AAAA... me@home', the content of a .pub "
            "file and not its path: read it with pathlib.Path(...).read_text()"
        )
    return check_secret(name, text, MAX_SSH_KEY)
