"""Where the key and the base URL come from, and what makes them usable."""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from clore_client.errors import ConfigurationError, Secret, printable
from clore_client.log import logger
from clore_client.validation import check_local_path

KEY_VARIABLE = "CLORE_API_KEY"
URL_VARIABLE = "CLORE_BASE_URL"
CONFIG_FILE = "~/.clore/config.json"  # the file of the official tools; read, never written

# Where the user has not said; without that variable ``~/.local/state/clore-client``.
DEFAULT_STATE_DIR = "$XDG_STATE_HOME/clore-client"

_told: set[str] = set()  # what has been warned of


def clean_key(key: object, source: str) -> str:
    """A key that can stand in a header; its trailing newline, as files have it, is cut.

    The key itself is in none of the errors.
    """
    if not isinstance(key, str):
        raise ConfigurationError(
            f"the API key from {source} must be a string, not {type(key).__name__}"
        )
    key = key.rstrip("\r\n")
    if key.lower().startswith(("bearer ", "auth:", "auth ")):
        raise ConfigurationError(
            f"the API key from {source} starts with {key.split()[0]!r}: give the bare key"
        )
    if any(c.isspace() for c in key):
        raise ConfigurationError(
            f"the API key from {source} has a blank or a newline in it: give the bare key"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(
            f"the API key from {source} has a character that no key has: was it copied whole?"
        )
    return Secret(key)


def find_key(argument: str | None) -> tuple[str | None, str]:
    """The key and where it comes from: argument, environment, the official tools' file."""
    if argument:
        return clean_key(argument, "the argument api_key"), "argument"
    if from_environment := os.environ.get(KEY_VARIABLE):
        source = f"environment variable {KEY_VARIABLE}"
        return clean_key(from_environment, f"the {source}"), source
    from_file = _key_in_file()
    return (from_file, f"file {CONFIG_FILE}") if from_file else (None, "nowhere")


def need_key() -> None:
    """Raise an error that says where it looked, when neither environment nor file has a key."""
    if find_key(None)[0] is None:
        variable = "is empty" if KEY_VARIABLE in os.environ else "is not set"
        there = os.path.isfile(os.path.expanduser(CONFIG_FILE))
        raise ConfigurationError(
            f"there is no API key: the environment variable {KEY_VARIABLE} {variable}, "
            f"and the file {CONFIG_FILE} {'has none in it' if there else 'is not there'}"
        )


def ending_of(key: object) -> str:
    """What may be shown of a key: its last four characters, and of a short one a quarter."""
    text = str(key)
    return printable(text[len(text) - min(4, len(text) // 4) :])


def _key_in_file() -> str | None:
    try:
        path = Path(CONFIG_FILE).expanduser()
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: there is no home
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{CONFIG_FILE} can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
        ) from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        # The parser's error holds the text, and so the key.
        raise ConfigurationError(f"{CONFIG_FILE} is not JSON") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{CONFIG_FILE} must hold a JSON object with an 'api_key'")
    if not config.get("api_key"):
        return None
    key = clean_key(config["api_key"], CONFIG_FILE)
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        _warn_readable(str(path))
    return key or None


@functools.cache
def _warn_readable(path: str) -> None:
    logger.warning("%s holds your API key and others may read it: chmod 600 %s", path, path)


def check_base_url(url: object, name: str) -> str:
    """Return an http(s) URL without its trailing slash.

    Parameters:
        url: as it was given.
        name: where it comes from, for the error.
    """
    if not isinstance(url, str):
        raise TypeError(
            f"{name} must be a string like 'https://api.clore.ai', not {type(url).__name__}"
        )
    return _usable_url(url, name)


@functools.lru_cache(maxsize=64)
def _usable_url(url: str, name: str) -> str:
    if problem := _url_problem(url):
        # The URL itself is not shown: a key may stand in it.
        raise ConfigurationError(
            f"{name} must be a URL like https://api.clore.ai: this one {problem}"
        )
    return url.rstrip("/")


def _url_problem(url: str) -> str | None:
    if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
        return "has a blank or a character that no URL has"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "can't be parsed"
    if parts.scheme not in ("http", "https"):
        return "does not start with http:// or https://"
    if not host:
        return "has no host"
    if "@" in parts.netloc or parts.query or parts.fragment:
        return "has a user, a query or a fragment in it"
    return None


@functools.lru_cache(maxsize=64)
def is_loopback(base_url: str) -> bool:
    """Whether the URL's host is this machine."""
    return is_loopback_host(urlsplit(base_url).hostname or "")


def check_key_may_go_to(base_url: str) -> None:
    """A key goes out over https only, or to this machine."""
    if not base_url.lower().startswith("https://") and not is_loopback(base_url):
        host = printable(urlsplit(base_url).hostname or "", 100)
        raise ConfigurationError(
            f"base_url is not https (its host is {host}), and the API key would be readable on the "
            "way; nothing was sent"
        )


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


def read_line(path: str) -> str:
    """Return the first line of a file, or an empty string."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readline(200).strip()
    except OSError:
        return ""


@functools.cache
def boot_id() -> str:
    """Return what tells the boots of this machine apart; an empty string where it is not known."""
    return read_line("/proc/sys/kernel/random/boot_id")


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


def check_state_dir(name: str, value: Any) -> str | os.PathLike[str] | None:
    """A folder, or None for no notes at all."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a folder or None, not {type(value).__name__}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name} must not be empty: None turns the notes off")
    if value is not None:
        check_local_path(name, value)
    return value


def state_folder(state_dir: str | os.PathLike[str] | None) -> Path | None:
    """The folder of the entries, from what the user gave; None where they are turned off."""
    if state_dir is None:
        return None
    if state_dir == DEFAULT_STATE_DIR:
        base = os.environ.get("XDG_STATE_HOME") or ""
        if not os.path.isabs(base):  # the specification says to ignore such a one
            base = os.path.join("~", ".local", "state")
        folder = os.path.expanduser(os.path.join(base, "clore-client"))
    else:
        folder = os.path.expanduser(os.fspath(state_dir))
    if folder.startswith("~"):  # there is no home: the name would be taken for a folder's
        warn_of_state(f"{folder} has no place", "this user has no home directory")
        return None
    return Path(os.path.abspath(folder))


def account_digest(base_url: str, api_key: str | None) -> str:
    """What stands for an account in an entry, from which nobody can tell the key."""
    account = f"clore-client\n{canonical_url(base_url)}\n{api_key or ''}"
    return hashlib.sha256(account.encode()).hexdigest()[:32]


def warn_of_state(what: str, error: object) -> None:
    """One warning for each trouble: it must not stop a rental."""
    if what not in _told:
        _told.add(what)
        logger.warning(
            "%s: %s; should this process be killed, leftovers() can't know of its rentals",
            what,
            error,
        )
