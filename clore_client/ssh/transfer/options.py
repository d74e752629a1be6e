"""Check the arguments of a transfer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from clore_client.progress import ProgressOptions
from clore_client.ssh.transfer.scripts import remote_path
from clore_client.validation import (
    check_bool,
    check_callback,
    check_count,
    check_local_path,
    check_number,
    short_repr,
)

MAX_STREAMS = 16
SYMLINK_WAYS = ("skip", "copy", "follow")


class TransferOptions:
    """The arguments of a transfer, checked."""

    def __init__(
        self, local: Any, remote: Any, *, preserve: Any = False, verify: Any = False,
        resume: Any = False, symlinks: Any = "skip", streams: Any = None, max_bytes: Any = None,
        progress: Any = None, on_progress: Any = None, timeout: Any = 30.0, deadline: Any = None,
    ) -> None:  # fmt: skip
        self.local = check_path("local", local)
        self.remote = check_path("remote", remote)
        self.source = remote_path(self.remote)
        self.preserve = check_bool("preserve", preserve)
        self.verify = check_bool("verify", verify)
        self.resume = check_bool("resume", resume)
        if symlinks not in SYMLINK_WAYS:
            raise ValueError(
                f"symlinks must be 'skip', 'copy' or 'follow', not {short_repr(symlinks)}"
            )
        self.symlinks: str = symlinks
        self.streams = self.max_bytes = None
        if streams is not None:
            self.streams = check_count("streams", streams, minimum=1, maximum=MAX_STREAMS)
        if max_bytes is not None:
            self.max_bytes = check_count("max_bytes", max_bytes)
        shown = progress if isinstance(progress, bool) else False
        self.events = ProgressOptions(on_progress, shown)
        self.progress: Callable[[str, int, int], object] | None = None
        if not isinstance(progress, bool):
            check_callback("progress", progress, 3)
            self.progress = progress
        self.timeout = check_number("timeout", timeout, above=True, unit="seconds")
        self.deadline: float | None = deadline
        if deadline is not None:
            check_number("deadline", deadline, above=True, unit="seconds")


def check_path(name: str, value: Any) -> bytes:
    """Check a path, and return it as bytes."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {short_repr(value)}")
    try:
        path = os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a character that no path may have") from None
    if not path or b"\0" in path:
        raise ValueError(f"{name} must not be empty or hold a NUL: {short_repr(path)}")
    check_local_path(name, path)  # no host allows longer ones
    return path
