"""Compare files on a host with files here, by SHA-256."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from clore_client.ssh.transfer.entry import BLOCK, FileEntry, file_digest
from clore_client.ssh.transfer.remote_script import RemoteScript
from clore_client.ssh.transfer.scripts import parse_digests

DIFFERS = "SHA-256 differs: what had arrived is removed"
MAX_ANSWER = 256 * 1024 * 1024  # bytes of a listing, or of digests


def same_chunks(script: RemoteScript, path: str | Path, chunks: list[tuple[int, int]]) -> bool:
    """Compare chunks (start, size) of a file; ``script`` runs CHUNK_DIGESTS."""
    for start, size in chunks:
        script.send(b"%d %d\n" % (start // BLOCK, size))
    script.end()
    for start, size in chunks:
        (digest,) = parse_digests(script.line() + b"\n", 1)
        if digest != file_digest(path, start, size):
            return False
    return True


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
