"""Check the arguments of a transfer, and find the files to upload."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from clore_client.errors import printable
from clore_client.models.result import TransferResult
from clore_client.progress import ProgressOptions
from clore_client.ssh.transfer.entry import Excludes
from clore_client.ssh.transfer.local_tree import LocalTree
from clore_client.ssh.transfer.scripts import remote_path
from clore_client.validation import (
    check_bool,
    check_callback,
    check_count,
    check_local_path,
    check_number,
    check_optional_number,
    check_string,
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
        skip_unchanged: Any = False, exclude: Any = (),
    ) -> None:  # fmt: skip
        self.local = check_path("local", local)
        self.remote = check_path("remote", remote)
        self.source = remote_path(self.remote)
        if not isinstance(skip_unchanged, bool) and skip_unchanged != "checksum":
            raise ValueError(
                "skip_unchanged must be True, False or 'checksum', not "
                f"{short_repr(skip_unchanged)}"
            )
        self.skip_unchanged: bool | str = skip_unchanged
        self.excluded = excluder(exclude)
        # Times can only be compared later if they are kept now.
        self.preserve = check_bool("preserve", preserve) or skip_unchanged is True
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
        self.deadline = check_optional_number("deadline", deadline, above=True, unit="seconds")


class DownloadOptions(TransferOptions):
    """The arguments of a download, checked, and its target.

    Attributes:
        target: the path to write a file to: inside ``local`` if that is a directory or is named as
            one, else ``local``.
        folder_target: the path to write a directory to: inside ``local``, or ``local`` itself for
            the content of a directory.
    """

    def __init__(self, remote: Any, local: Any, **given: Any) -> None:
        super().__init__(local, remote, **given)
        here = os.fsdecode(os.path.expanduser(self.local))
        name = os.fsdecode(self.remote.rstrip(b"/").rpartition(b"/")[2])
        content = is_content(self.remote) or self.remote == b"~"
        inside = os.path.isdir(here) or here.endswith(("/", os.sep))
        self.target = os.path.join(here, name) if inside and not content else here
        self.folder_target = here if content else os.path.join(here, name)


def is_content(path: bytes) -> bool:
    """Return whether a source path means the content of a directory, as it does for rsync."""
    last = path.replace(os.fsencode(os.sep), b"/").rpartition(b"/")[2]
    return last in (b"", b".", b"..")


def excluder(patterns: Any) -> Excludes | None:
    """Return a function that checks a name and its kind against patterns as in .gitignore."""
    if isinstance(patterns, (str, bytes)) or not isinstance(patterns, Iterable):
        raise TypeError(f"exclude must be a list of patterns, not {short_repr(patterns)}")
    lines = [check_string(f"exclude[{n}]", line) for n, line in enumerate(patterns)]
    if not lines:
        return None
    try:
        pathspec: Any = importlib.import_module("pathspec")
    except ImportError as error:
        raise ImportError("exclude needs pathspec: pip install pathspec") from error
    try:
        spec = pathspec.GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise ValueError(f"exclude: {printable(str(error), 200)}") from error

    def excludes(name: bytes, folder: bool) -> bool:
        return bool(spec.match_file(os.fsdecode(name) + "/" * folder))

    return excludes


def check_path(name: str, value: Any) -> bytes:
    """Check a path, and return it as bytes."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {short_repr(value)}")
    try:
        path = os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a character that is not allowed in a path") from None
    if not path or b"\0" in path:
        raise ValueError(f"{name} must not be empty or hold a NUL: {short_repr(path)}")
    check_local_path(name, path)  # no host allows longer ones
    return path


# From so many bytes on, so many connections are worth their logins.
UPLOAD_CONNECTIONS = ((256 * 1024 * 1024, 4), (32 * 1024 * 1024, 2))


class UploadOptions(TransferOptions):
    """The arguments of an upload, checked."""

    def __init__(
        self, local: Any, remote: Any, *, preview: Any = False, delete: Any = False, **given: Any
    ) -> None:
        super().__init__(local, remote, **given)
        folder = re.sub(rb"(/+\.?)+$", b"", self.source)
        if folder != self.source:  # it ends with "/", "//" or "/."
            self.source = folder + b"/"
        self.preview = check_bool("preview", preview)
        self.delete: bool | frozenset[bytes] = False
        if isinstance(delete, TransferResult) and delete.deletes is not None and not preview:
            self.delete = frozenset(delete.deletes)
        elif delete is True and preview:
            self.delete = True
        elif delete is not False:
            raise ValueError(
                "delete must be the result of a call with preview=True and delete=True, so that "
                f"nothing is removed unseen, not {short_repr(delete)}"
            )
        self.compares = bool(preview or self.delete is not False or self.skip_unchanged)


def check_upload(local: Any, remote: Any, **given: Any) -> tuple[UploadOptions, LocalTree]:
    """Check the arguments of an upload, and find the files to send."""
    options = UploadOptions(local, remote, **given)
    tree = LocalTree(os.path.expanduser(options.local), options.symlinks, options.excluded)
    if options.delete is not False and not tree.is_folder:
        raise ValueError("delete is for the upload of a directory, and local is a file")
    return options, tree


def upload_connections(options: UploadOptions, tree: LocalTree) -> int:
    """Return how many connections an upload uses."""
    if options.streams is not None:
        return options.streams
    size = sum(entry.size for entry in tree.entries)
    return next((count for least, count in UPLOAD_CONNECTIONS if size >= least), 1)
