"""Compare files on a host with files here, by SHA-256."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from clore_client.ssh.transfer.entry import BLOCK, FileEntry, file_digest
from clore_client.ssh.transfer.remote_script import RemoteScript
from clore_client.ssh.transfer.scripts import encoded_name, parse_digests

DIFFERS = "SHA-256 differs: what had arrived is removed"
MAX_ANSWER = 256 * 1024 * 1024  # bytes of a listing, or of digests


def different_chunks(
    script: RemoteScript,
    chunks: list[tuple[FileEntry, int, int]],
    place: Callable[[FileEntry], str | Path],
) -> Iterator[FileEntry]:
    """Yield the files of which a chunk (file, start, size) differs.

    ``script`` runs CHUNK_DIGESTS, ``place`` returns local paths.
    """
    asked = [b"%d %d " % (start // BLOCK, size) + encoded_name(e.name) for e, start, size in chunks]
    script.send(b"\n".join([*asked, b""]))
    script.end()
    for entry, start, size in chunks:
        (digest,) = parse_digests(script.line() + b"\n", 1)
        if digest != file_digest(place(entry), start, size):
            yield entry


def different_files(
    script: RemoteScript, files: list[FileEntry], place: Callable[[FileEntry], str | Path]
) -> Iterator[FileEntry]:
    """Yield the files that differ; ``script`` runs FILE_DIGESTS, ``place`` returns local paths."""
    script.send(b"".join(b"./" + entry.name + b"\0" for entry in files))
    script.end()
    digests = parse_digests(script.rest(MAX_ANSWER), len(files))
    for entry, digest in zip(files, digests, strict=True):
        if digest != file_digest(place(entry), 0, entry.size):
            yield entry
