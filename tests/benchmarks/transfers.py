"""Compare transfers by the client, by OpenSSH's scp and by rsync, with the same sshd.

The sshd of the tests sets HOME to an empty folder, so that no start-up files of the login shell
run: they can take longer than a command, and not the same time for both sides.
"""

from __future__ import annotations

import filecmp
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko  # noqa: F401 - loaded before anything is measured

from clore_client import CloreClient
from tests.sshd import Sshd, running_sshd

from .children import child
from .rows import Row

MB = 1024 * 1024
SMALL_SIZE = 4096  # bytes
# In memory, if there is such a folder: otherwise the speed of the disk would be measured.
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
DELAY = 0.05  # seconds each way: 100 ms for a round trip
ROUNDS = 5


class Sides:
    """Both sides of a comparison, over one port."""

    def __init__(self, server: Sshd, port: int) -> None:
        self._client = CloreClient(state_dir=None)
        self._server = server
        self._port = port
        self.order = {"connection": {"ssh": f"ssh {server.user}@127.0.0.1 -p {port}"}}

    def ours_up(self, source: Path, target: Path) -> None:
        self._client.upload(self.order, _content(source), target, key_path=self._server.key)

    def ours_down(self, source: Path, target: Path) -> None:
        self._client.download(self.order, _content(source), target, key_path=self._server.key)

    def scp_up(self, source: Path, target: Path) -> None:
        self._scp(str(source), f"{self._server.user}@127.0.0.1:{target}")

    def scp_down(self, source: Path, target: Path) -> None:
        self._scp(f"{self._server.user}@127.0.0.1:{source}", str(target))

    def rsync_up(self, source: Path, target: Path) -> None:
        self._rsync(f"{source}/", f"{self._server.user}@127.0.0.1:{target}")

    def rsync_down(self, source: Path, target: Path) -> None:
        self._rsync(f"{self._server.user}@127.0.0.1:{source}/", str(target))

    def _scp(self, source: str, target: str) -> None:
        command = ["scp", "-q", "-r", *self._options, "-P", str(self._port), source, target]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def _rsync(self, source: str, target: str) -> None:
        ssh = " ".join(["ssh", "-q", *self._options, "-p", str(self._port)])
        command = ["rsync", "-a", "-e", ssh, source, target]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    @property
    def _options(self) -> list[str]:
        # No settings of the user's: compression, or a connection kept open, would be measured.
        return ["-F", "none", "-i", str(self._server.key), "-o", "IdentitiesOnly=yes",
                "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]  # fmt: skip


Move = Callable[[Path, Path], None]


def rows() -> Iterator[Row]:
    """Yield large files and directories, on loopback and at 100 ms, in both directions."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        folder = Path(name)
        with (
            running_sshd(folder / "sshd") as server,
            child("distance", str(server.port), str(DELAY)) as relay,
        ):
            near, far = Sides(server, server.port), Sides(server, relay.read())
            middle, large = _file(folder, 64), _file(folder, 256)
            yield from _both_ways("64 MB on loopback", near, middle, "scp", 0.9, 0.9)
            yield from _both_ways("256 MB on loopback", near, large, "scp", 0.9, 0.9)
            yield from _both_ways("64 MB at 100 ms", far, middle, "scp", 4.0, 6.0)
            some, more, many = (_files(folder, count) for count in (100, 300, 5000))
            yield from _both_ways("5,000 files on loopback", near, many, "scp", 3.0, 3.0)
            yield from _both_ways("5,000 files on loopback", near, many, "rsync", 1.0, 1.0)
            yield from _both_ways("100 files at 100 ms", far, some, "rsync", 1.0, 1.0)
            yield from _both_ways("300 files at 100 ms", far, more, "scp", 90.0, 90.0, rounds=1)


def _content(source: Path) -> str:
    return f"{source}/" if source.is_dir() else str(source)


def _file(folder: Path, size: int) -> Path:
    path = folder / f"{size} MB"
    path.write_bytes(random.Random(size).randbytes(64 * MB) * (size // 64))
    return path


def _files(folder: Path, count: int) -> Path:
    path = folder / f"{count} files"
    path.mkdir()
    for number in range(count):
        (path / f"{number}.bin").write_bytes(random.Random(number).randbytes(SMALL_SIZE))
    return path


def _both_ways(
    what: str, sides: Sides, source: Path, peer: str, up: float, down: float, rounds: int = ROUNDS
) -> Iterator[Row]:
    for way, limit in (("up", up), ("down", down)):
        ours: Move = getattr(sides, f"ours_{way}")
        other: Move = getattr(sides, f"{peer}_{way}")
        yield _row(f"{what} {way}, x {peer}", ours, other, source, limit, rounds)


def _row(what: str, ours: Move, peer: Move, source: Path, limit: float, rounds: int) -> Row:
    """Measure how many times the throughput of the peer ours is, with logins, in turns."""
    pairs = [(_seconds(ours, source), _seconds(peer, source)) for _ in range(rounds)]
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    detail = f"{mine:.2f} against {other:.2f} s, median of {rounds}"
    return Row(what, other / mine, limit, at_least=True, detail=detail)


def _seconds(move: Move, source: Path) -> float:
    # A new name, because replacing a large file takes a tenth of a second.
    target = source.parent / f"target-{os.urandom(4).hex()}"
    start = time.perf_counter()
    move(source, target)
    took = time.perf_counter() - start
    if source.is_dir():
        names = sorted(os.listdir(source))
        _, wrong, missing = filecmp.cmpfiles(source, target, names, shallow=False)
        same = not wrong and not missing and sorted(os.listdir(target)) == names
        shutil.rmtree(target)
    else:
        same = filecmp.cmp(source, target, shallow=False)
        target.unlink()
    if not same:
        raise SystemExit(f"{move.__name__} did not copy {source.name} as it is")
    return took
