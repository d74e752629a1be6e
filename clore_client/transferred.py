"""What a transfer gives back."""

from __future__ import annotations

from clore_client.errors import printable


class Transferred:
    """What was transferred.

    Attributes:
        path: where it is now, as text.
        files: how many files.
        size: bytes of all of them.
        duration: seconds.
        skipped: (name, why) of what was left out: symlinks, and what is no file.
    """

    __slots__ = ("duration", "files", "path", "size", "skipped")

    def __init__(
        self, path: str, files: int, size: int, duration: float, skipped: list[tuple[str, str]]
    ) -> None:
        self.path = path
        self.files = files
        self.size = size
        self.duration = duration
        self.skipped = skipped

    def __repr__(self) -> str:
        left_out = f", {len(self.skipped)} left out" if self.skipped else ""
        return (
            f"<Transferred {printable(self.path, 200)!r}: {self.files} files, {self.size} bytes, "
            f"{self.duration:.2f} s{left_out}>"
        )
