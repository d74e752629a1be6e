"""Find the API key, the base URL and the state folder, and keep files in that folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import random
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clore_client.errors import AuthenticationError, ConfigurationError, Secret, printable
from clore_client.log import warn_once
from clore_client.validation import check_local_path, check_type

__version__ = "0.1.0"

KEY_VARIABLE = "CLORE_API_KEY"
URL_VARIABLE = "CLORE_BASE_URL"
CONFIG_FILE = "~/.clore/config.json"  # the file of the official tools; never written

# Without the variable, it is ``~/.local/state/clore-client``.
DEFAULT_STATE_DIR = "$XDG_STATE_HOME/clore-client"
LOCK_AT = 1 << 30  # the locked byte on Windows; the content before it stays readable
# With O_NONBLOCK, a pipe in place of the file is an error, and does not block forever.
SAFE_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
SAFE_FLAGS |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
FIRST_LOCK_PAUSE, LONGEST_LOCK_PAUSE = 0.0002, 0.01  # seconds between two tries to lock a file
LONGEST_STATE_FILE = 1_000_000  # bytes; this package never writes a longer file


def clean_key(key: object, source: str) -> str:
    """Check an API key, and return it without a trailing newline.

    No error shows the key.
    """
    if not isinstance(key, str):
        raise ConfigurationError(
            f"the API key from {source} must be a string, not {type(key).__name__}"
        )
    key = key.rstrip("\r\n")
    problem = None
    if key.lower().startswith(("bearer ", "auth:", "auth ")):
        problem = f"starts with {key.split()[0]!r}"
    elif not re.fullmatch("[!-~]*", key):
        problem = "has a blank, or a character that is not allowed in a key"
    if problem:
        raise ConfigurationError(f"the API key from {source} {problem}: give only the key")
    return Secret(key)


def find_key(argument: str | None) -> tuple[str | None, str]:
    """Return the key and its source: the argument, the environment, or the official tools' file."""
    if argument:
        return clean_key(argument, "the argument api_key"), "argument"
    if from_environment := os.environ.get(KEY_VARIABLE):
        source = f"environment variable {KEY_VARIABLE}"
        return clean_key(from_environment, f"the {source}"), source
    from_file = _key_in_file()
    return (from_file, f"file {CONFIG_FILE}") if from_file else (None, "nowhere")


def require_key() -> None:
    """Raise an error if neither the environment nor the official tools' file has a key."""
    if find_key(None)[0] is None:
        raise ConfigurationError(
            f"there is no API key: the environment variable {KEY_VARIABLE} is not set or empty, "
            f"and the file {CONFIG_FILE} does not exist or has none; set {KEY_VARIABLE}"
        )


def key_ending(key: object) -> str:
    """Return the end of a key, for display: four characters, or a quarter of a short key."""
    text = str(key)
    return printable(text[len(text) - min(4, len(text) // 4) :])


def _key_in_file() -> str | None:
    try:
        path = Path(CONFIG_FILE).expanduser()
        text, mode = path.read_bytes(), path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: no home directory
        return None
    except OSError as error:
        raise ConfigurationError(f"{CONFIG_FILE} can't be read: {error.strerror}") from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        # The error of the parser contains the text, and so the key.
        raise ConfigurationError(f"{CONFIG_FILE} is not valid JSON: correct or remove it") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{CONFIG_FILE} must contain a JSON object with an 'api_key'")
    if not config.get("api_key"):
        return None
    key = clean_key(config["api_key"], CONFIG_FILE)
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        warn_once(f"{path} has your API key, and other users can read it: run chmod 600 {path}")
    return key or None


def check_base_url(url: object, name: str) -> str:
    """Check an http(s) URL, and return it without a trailing slash.

    Parameters:
        url: the URL.
        name: the argument or variable that has it, for the error.
    """
    if not isinstance(url, str):
        raise TypeError(f"{name} must be a string, not {type(url).__name__}")
    if problem := _url_problem(url):
        # The URL is not shown, as it may contain a key.
        raise ConfigurationError(f"{name} must be a URL like https://api.clore.ai: it {problem}")
    return url.rstrip("/")


@functools.lru_cache(maxsize=64)
def _url_problem(url: str) -> str | None:
    if not re.fullmatch("[!-~]*", url) or "\\" in url:
        return "has a blank or a character that is not allowed in a URL"
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
    """Return whether the host of a URL is this machine."""
    host = urlsplit(base_url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key_header(headers: Any, base_url: str, endpoint: str, needed: bool) -> str:
    """Return the key of a request, after a check that it is set and the URL is safe for it."""
    key: str = headers.get("auth") or ""
    if key:
        key = headers["auth"] = clean_key(key, "the headers")
        if not base_url.lower().startswith("https://") and not is_loopback(base_url):
            host = printable(urlsplit(base_url).hostname or "", 100)
            raise ConfigurationError(
                f"base_url is not https (its host is {host}), so others could read the API key, "
                "and nothing was sent: use an https URL"
            )
    elif needed:
        raise AuthenticationError(
            3,
            endpoint=endpoint,
            hint=f"there is no API key, so nothing was sent: pass api_key=..., set {KEY_VARIABLE}, "
            f"or put the key into {CONFIG_FILE}",
        )
    return key


@functools.lru_cache(maxsize=64)
def canonical_url(base_url: str) -> str:
    """Return one spelling for all URLs of an API: ``HTTP://127.0.0.1`` is ``http://localhost``."""
    parts = urlsplit(base_url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    host = "localhost" if is_loopback(base_url) else host
    port = parts.port or (443 if scheme == "https" else 80)
    return f"{scheme}://{host}:{port}{parts.path.rstrip('/')}"


def read_line(path: str) -> str:
    """Return the first line of a file, or an empty string."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readline(200).strip()
    except OSError:
        return ""


def state_folder(state_dir: Any) -> Path | None:
    """Check the argument ``state_dir``, and return its absolute path; None if it is turned off."""
    if state_dir is None:
        return None
    check_type("state_dir", state_dir, "a folder or None", str, os.PathLike)
    if isinstance(state_dir, str) and not state_dir.strip():
        raise ValueError("state_dir must not be empty: None turns the journal off")
    check_local_path("state_dir", state_dir)
    if state_dir == DEFAULT_STATE_DIR:
        base = os.environ.get("XDG_STATE_HOME") or ""
        if not os.path.isabs(base):  # the XDG specification ignores relative paths
            base = os.path.join("~", ".local", "state")
        folder = os.path.expanduser(os.path.join(base, "clore-client"))
    else:
        folder = os.path.expanduser(os.fspath(state_dir))
    if folder.startswith("~"):  # "~" would become the name of a folder
        warn_about_state(f"{folder} can't be used", "this user has no home directory")
        return None
    return Path(os.path.abspath(folder))


@functools.lru_cache(maxsize=16)
def account_digest(base_url: str, api_key: str | None) -> str:
    """Return a digest that identifies an account in the journal without its key."""
    account = f"clore-client\n{canonical_url(base_url)}\n{api_key or ''}"
    return hashlib.sha256(account.encode()).hexdigest()[:32]


def warn_about_state(what: str, error: object) -> None:
    """Warn once about a problem of the state folder, which must not stop a rental."""
    reason = getattr(error, "strerror", None) or error
    warn_once(f"{what}: {reason}; if this process is killed, leftovers() can't find its rentals")


# --- files that only this user may see ---


def lock_file(handle: int, patience: float = 0.0) -> bool:
    """Lock an open file until it is unlocked or closed, and return whether that worked.

    Parameters:
        handle: a file that is open for writing, as some systems require.
        patience: seconds to wait for another process that has locked it.

    Raises:
        OSError: the file system does not support locks.
    """
    deadline = time.monotonic() + patience
    pause = FIRST_LOCK_PAUSE
    while True:
        try:
            set_lock(handle, locked=True)
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_LOCK_PAUSE)


def set_lock(handle: int, locked: bool) -> None:
    """Lock an open file at once, or unlock it."""
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, LOCK_AT, os.SEEK_SET)
        mode = msvcrt.LK_NBLCK if locked else msvcrt.LK_UNLCK  # type: ignore[attr-defined,unused-ignore]
        msvcrt.locking(handle, mode, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if locked else fcntl.LOCK_UN)


def open_private(path: Path) -> int:
    """Open a file for reading and writing, and return its descriptor.

    The file and its folder are created if they are missing, for this user only.

    Raises:
        OSError: that is not possible, or it is a symlink.
    """
    flags = SAFE_FLAGS | os.O_RDWR | os.O_CREAT
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)


@contextlib.contextmanager
def locked_path(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock file beside ``path``, so that no other process changes it.

    Raises:
        OSError: another process holds it, or it can't be created.
    """
    handle = open_private(Path(f"{path}.lock"))
    try:
        if not lock_file(handle, patience):
            raise OSError(f"{path}.lock is held by another process")
        yield
    finally:
        os.close(handle)


def replace_file(path: Path, text: str) -> None:
    """Replace a file in one step by one with this text, which only this user may read."""
    new = path.with_name(f"{path.name}.{random.SystemRandom().getrandbits(48):012x}")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(new, flags, 0o600)
    try:
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def make_private_folder(folder: Path) -> None:
    """Create a folder that only this user may enter, or remove the access of other users to it.

    Raises:
        OSError: it can't be created, is not a folder, or belongs to another user.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = os.lstat(folder)
    if not stat.S_ISDIR(about.st_mode):
        raise OSError("it is not a folder")
    if os.name == "nt":
        return
    if about.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if about.st_mode & 0o077:
        folder.chmod(0o700)


def read_state_file(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file of this user.

    Raises:
        OSError, ValueError, RecursionError: the file can't be read, or is not valid.
    """
    handle = os.open(path, SAFE_FLAGS | os.O_RDONLY)
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LONGEST_STATE_FILE:
            raise ValueError("it is not a small regular file")
        if os.name != "nt" and about.st_uid != os.geteuid():
            raise ValueError("it belongs to another user")
        data = json.loads(os.read(handle, LONGEST_STATE_FILE + 1))
    finally:
        os.close(handle)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data
