"""Check the arguments of an upload, and find the files to send."""

from __future__ import annotations

import os
import re
from typing import Any

from clore_client.models.result import TransferResult
from clore_client.ssh.transfer.local_tree import LocalTree
from clore_client.ssh.transfer.options import TransferOptions
from clore_client.validation import check_bool, short_repr

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
