"""Files moved by the client and by OpenSSH's scp: the same sshd, the same way, in one run.

The login shell's start-up files are left out of it by the sshd of the tests, which sets HOME to an
empty folder: they can take longer than a command, and cost both sides other amounts.
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

FILE_SIZE = 64 * 1024 * 1024
FILES, SMALL_SIZE = 300, 4096
DELAY = 0.05  # seconds each way: 100 ms for a round trip
ROUNDS = 3


class Sides:
    """Both sides of a comparison, over one port."""

    def __init__(self, server: Sshd, port: int) -> None:
        self._client = CloreClient(state_dir=None)
        self._server = server
        self._port = port
        self.order = {"connection": {"ssh": f"ssh {server.user}@127.0.0.1 -p {port}"}}

    def ours_up(self, source: Path, target: Path) -> None:
        self._client.upload(self.order, source, target, key_path=self._server.key)

    def ours_down(self, source: Path, target: Path) -> None:
        self._client.download(self.order, source, target, key_path=self._server.key)

    def scp_up(self, source: Path, target: Path) -> None:
        self._scp(str(source), f"{self._server.user}@127.0.0.1:{target}")

    def scp_down(self, source: Path, target: Path) -> None:
        self._scp(f"{self._server.user}@127.0.0.1:{source}", str(target))

    def _scp(self, source: str, target: str) -> None:
        quiet = ["-q", "-r", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        # No settings of the user's: compression, or a connection kept open, would be measured.
        key = ["-F", "none", "-i", str(self._server.key), "-o", "IdentitiesOnly=yes"]
        command = ["scp", *quiet, *key, "-P", str(self._port), source, target]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


Move = Callable[[Path, Path], None]


def rows() -> Iterator[Row]:
    """A file on loopback and at 100 ms, and a directory at 100 ms, in both directions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large, many = folder / "large", folder / "many"
        large.write_bytes(random.Random(1).randbytes(FILE_SIZE))
        many.mkdir()
        for number in range(FILES):
            (many / f"{number}.bin").write_bytes(random.Random(number).randbytes(SMALL_SIZE))
        with (
            running_sshd(folder / "sshd") as server,
            child("distance", str(server.port), str(DELAY)) as relay,
        ):
            near, far = Sides(server, server.port), Sides(server, relay.read())
            for sides, where, up, down in (
                (near, "on loopback", 0.9, 0.9), (far, "at 100 ms", 4.0, 6.0),
            ):  # fmt: skip
                yield _row(f"64 MB up {where}", sides.ours_up, sides.scp_up, large, up)
                yield _row(f"64 MB down {where}", sides.ours_down, sides.scp_down, large, down)
            what = f"{FILES} files of 4 KB"
            yield _row(f"{what} up at 100 ms", far.ours_up, far.scp_up, many, 4.0, 1)
            yield _row(f"{what} down at 100 ms", far.ours_down, far.scp_down, many, 4.0, 1)


def _row(
    what: str, ours: Move, peer: Move, source: Path, limit: float, rounds: int = ROUNDS
) -> Row:
    """How many times scp's throughput ours is, logins included; the sides take turns."""
    pairs = [(_seconds(ours, source), _seconds(peer, source)) for _ in range(rounds)]
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    detail = f"{mine:.2f} against {other:.2f} s, median of {rounds}"
    return Row(f"{what}, x scp", other / mine, limit, at_least=True, detail=detail)


def _seconds(move: Move, source: Path) -> float:
    # A fresh name: to replace 64 MB costs a tenth of a second of its own.
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
