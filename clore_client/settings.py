"""Where the key and the base URL come from, and what makes them usable."""

from __future__ import annotations

import functools
import ipaddress
import json
import os
import stat
from pathlib import Path
from urllib.parse import urlsplit

from clore_client.errors import ConfigurationError, printable
from clore_client.log import logger

KEY_VARIABLE = "CLORE_API_KEY"
URL_VARIABLE = "CLORE_BASE_URL"
CONFIG_FILE = "~/.clore/config.json"  # the file of the official tools; read, never written


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
    return key


def find_key(argument: str | None) -> tuple[str | None, str]:
    """The key and where it comes from: argument, environment, the official tools' file."""
    if argument:
        return clean_key(argument, "the argument api_key"), "argument"
    if from_environment := os.environ.get(KEY_VARIABLE):
        source = f"environment variable {KEY_VARIABLE}"
        return clean_key(from_environment, f"the {source}"), source
    from_file = _key_in_file()
    return (from_file, f"file {CONFIG_FILE}") if from_file else (None, "nowhere")


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


@functools.lru_cache(maxsize=64)
def check_base_url(url: str, name: str) -> str:
    """An http(s) URL without its trailing slash.

    Parameters:
        url: as it was given.
        name: where it comes from, for the error.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    good = parts.scheme in ("http", "https") and host and url.isascii() and url.isprintable()
    if (
        not good
        or " " in url
        or "\\" in url
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise ConfigurationError(
            f"{name} must be a URL like https://api.clore.ai, not {printable(repr(url), 100)}"
        )
    return url.rstrip("/")


@functools.lru_cache(maxsize=64)
def is_loopback(base_url: str) -> bool:
    """Whether the URL's host is this machine."""
    host = urlsplit(base_url).hostname or ""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key_may_go_to(base_url: str) -> None:
    """A key goes out over https only, or to this machine."""
    if not base_url.lower().startswith("https://") and not is_loopback(base_url):
        raise ConfigurationError(
            f"base_url {printable(base_url, 100)} is not https, and the API key would be readable "
            "on the way; nothing was sent"
        )
