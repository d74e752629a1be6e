"""Machines that lie: nothing outside of the target is touched, and every wait has an end."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, SSHError, TransferError
from tests.hostile import ESCAPES, HostileServer

pytestmark = pytest.mark.internal  # is the same in the one file

MARK = b"clore-transfer-1\n"
FILE, FOLDER, LINK = b"81a4", b"41ed", b"a1ff"  # modes, as stat prints them
Says = Callable[[str, Any], Any]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def verb_of(command: str) -> str:
    found = re.search(r"' clore (\w+)", command)
    return found[1] if found else ""


def says(answers: dict[str, bytes], status: int = 0, hang: bool = False) -> Says:
    """Answers each verb with those bytes; others with nothing."""

    async def run(command: str, process: Any) -> None:
        process.stdout.write(MARK + answers.get(verb_of(command), b""))
        await process.stdout.drain()
        if hang:
            await asyncio.Event().wait()
        process.exit(status)

    return run


def listing(*entries: tuple[bytes, int, bytes]) -> dict[str, bytes]:
    lines = [b"%s %d 1700000000 %s\n" % entry for entry in entries]
    return {"look": b"d\n" + b"41ed 4096 1700000000 .\n" + b"".join(lines)}


def name(text: bytes) -> dict[str, bytes]:
    return listing((FILE, 5, b"./" + text))


def endless(first: bytes, piece: bytes) -> Says:
    async def run(command: str, process: Any) -> None:
        process.stdout.write(first)
        while True:
            process.stdout.write(piece)
            await process.stdout.drain()

    return run


async def noisy(command: str, process: Any) -> None:
    process.stdout.write(MARK + b"f 5 0 644\n")
    while True:
        process.stderr.write(b"x" * 65536)
        await process.stderr.drain()


DOWNLOADS: dict[str, Says] = {
    **{
        f"a file named {text!r}": says({**name(text), "many": b"12345"})
        for text in (b"../x", b"a/../../x", b"/x", b"..", b".", b"a//x", b"a/", b"a\0b", b"a/./b")
    },
    "an absolute name": says({"look": b"d\n" + FILE + b" 5 0 /tmp/x\n", "many": b"12345"}),
    "a name twice": says({**listing((FILE, 5, b"./x"), (FILE, 5, b"./x")), "many": b"1234512345"}),
    "a file as a folder": says(
        {**listing((FILE, 5, b"./x"), (FILE, 5, b"./x/y")), "many": b"1234512345"}
    ),
    "a file below a symlink": says(
        {**listing((LINK, 5, b"./x"), (FILE, 5, b"./x/y")), "many": b"12345"}
    ),
    "a folder that is not listed": says({**name(b"a/b"), "many": b"12345"}),
    "a negative size": says({"look": b"d\n" + FILE + b" -5 0 ./x\n"}),
    "an absurd size": says({"look": b"f 1000000000000000000 0 644\n12345"}),
    "no size": says({"look": b"f\n"}),
    "no mode": says({"look": b"f 5 0 9\n12345"}),
    "more than announced": says({"look": b"f 5 0 644\n123456"}),
    "fewer than announced": says({"look": b"f 5 0 644\n1234"}),
    "an exit status of 1": says({"look": b"f 5 0 644\n12345"}, status=1),
    "a bundle too long": says({**listing((FILE, 5, b"./x")), "many": b"123456"}),
    "a bundle too short": says({**listing((FILE, 5, b"./x")), "many": b"1234"}),
    "a listing that fails": says(listing((FILE, 5, b"./x")), status=1),
    "nothing": says({}),
    "what nobody understands": says({"look": b"\xff\xfe" + ESCAPES}),
    "escapes": says({"look": b"x " + ESCAPES * 100 + b"\n"}),
    "an endless line": endless(MARK, b"x" * 65536),
    "no end of noise": endless(b"", b"welcome\n" * 8192),
    "an endless file": endless(MARK + b"f 5 0 644\n", b"x" * 65536),
    "endless errors": noisy,
    "silence": says({}, hang=True),
    "silence in the file": says({"look": b"f 5 0 644\n123"}, hang=True),
    "silence after the file": says({"look": b"f 5 0 644\n12345"}, hang=True),
    "silence in the bundle": says({**listing((FILE, 5, b"./x")), "many": b"123"}, hang=True),
}


async def cut(command: str, process: Any) -> None:
    process.stdout.write(MARK + b"f 5 0 644\n12")
    await process.stdout.drain()
    process.channel.get_connection().abort()


DOWNLOADS["a cut connection"] = cut

UPLOADS: dict[str, Says] = {
    "a wrong hash": says({"put": b"ok " + b"0" * 64 + b"\n", "finish": b"ok x\n"}),
    "a refusal": says({"put": b"no " + ESCAPES + b"\n", "untar": b"no " + ESCAPES + b"\n"}),
    "nothing": says({}),
    "garbage": says({"put": b"\xff" * 1000, "untar": b"\xff" * 1000}),
    "an endless answer": endless(MARK, b"ok " * 20000),
    "silence": says({}, hang=True),
    "success and no end": says({"put": b"ok -\n", "untar": b"ok\n"}, hang=True),
    "sizes that differ": says({"put": b"ok -\n", "untar": b"ok\n", "sizes": b"4\n"}),
    "no sizes": says({"put": b"ok -\n", "untar": b"ok\n", "sizes": b""}),
    "no finish": says({"put": b"ok -\n", "untar": b"ok\n", "sizes": b"5\n"}),
    "a cut connection": cut,
}


def snapshot(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, folders, files in os.walk(folder):
        for entry in [*folders, *files]:
            path = os.path.join(place, entry)
            facts = os.lstat(path)
            kind = stat.S_IFMT(facts.st_mode)
            text = Path(path).read_bytes() if stat.S_ISREG(facts.st_mode) else b""
            found[path] = (kind, facts.st_mode, facts.st_size, text)
    return found


def surroundings(root: Path) -> Path:
    """A folder in which the target is to be, with things around it to be left alone."""
    for place in ("x", "inner/x", "inner/target/x"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text("mine")
    return root / "inner"


def violations() -> list[str]:
    """Run every attack; what any of them achieved."""
    wrong = []
    for kind, attacks in (("download", DOWNLOADS), ("upload", UPLOADS)):
        for what, attack in attacks.items():
            for target in ("target", "new"):
                with tempfile.TemporaryDirectory() as root, HostileServer(attack) as server:
                    inner = surroundings(Path(root))
                    before = snapshot(Path(root))
                    problem = _attacked(kind, server, inner, target)
                    if problem:
                        wrong.append(f"{kind}, {what}, {target}: {problem}")
                    if snapshot(Path(root)) != before:
                        changed = set(snapshot(Path(root))) ^ set(before)
                        wrong.append(f"{kind}, {what}, {target}: changed {sorted(changed)}")
    return wrong


def _attacked(kind: str, server: HostileServer, inner: Path, target: str) -> str:
    client = CloreClient(state_dir=None)
    options: dict[str, Any] = {"password": "x", "wait": 5, "timeout": 0.5}
    start = time.monotonic()
    try:
        if kind == "download":
            client.download(server.order(), "far", inner / target, max_bytes=10**12, **options)
        elif target == "target":
            client.upload(server.order(), inner / "target", "far", **options)
        else:
            client.upload(server.order(), inner / "x", "far", **options)
    except SSHError as error:
        text = f"{error} {error!r} {error.__cause__}"
        if any(char in text for char in "\x1b\x07\x9b"):
            return f"escapes come through: {text!r}"
        if not isinstance(error, TransferError):
            return f"not a TransferError: {error!r}"
        took = time.monotonic() - start
        return f"took {took:.1f} s" if took > 30 else ""
    except Exception as error:
        return f"raised {error!r}"
    return "succeeded"


@pytest.mark.parametrize("what", sorted(DOWNLOADS))
@pytest.mark.parametrize("target", ["target", "new"])
def test_downloads_from_a_hostile_machine(tmp_path: Path, what: str, target: str) -> None:
    inner = surroundings(tmp_path)
    before = snapshot(tmp_path)
    with HostileServer(DOWNLOADS[what]) as server:
        assert _attacked("download", server, inner, target) == ""
    assert snapshot(tmp_path) == before
    assert not [t for t in threading.enumerate() if t.name == "clore-transfer"]


@pytest.mark.parametrize("what", sorted(UPLOADS))
@pytest.mark.parametrize("target", ["target", "new"])
def test_uploads_to_a_hostile_machine(tmp_path: Path, what: str, target: str) -> None:
    inner = surroundings(tmp_path)
    before = snapshot(tmp_path)
    with HostileServer(UPLOADS[what]) as server:
        assert _attacked("upload", server, inner, target) == ""
    assert snapshot(tmp_path) == before


def test_all_of_it_without_asserts() -> None:
    code = "from tests.test_hostile_transfer import *; print(violations())"
    command = [sys.executable, "-O", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("hang_at", ["auth", "open", "exec"])
def test_a_machine_that_hangs(here: Path, hang_at: str) -> None:
    (here / "x").write_text("x")
    client = CloreClient(state_dir=None)
    options: dict[str, Any] = {"password": "x", "wait": 0, "timeout": 0.5}
    with HostileServer(hang_at=hang_at) as server:
        with pytest.raises(SSHError):
            client.download(server.order(), "far", here / "y", **options)
        with pytest.raises(SSHError):
            client.upload(server.order(), here / "x", "far", **options)
    assert os.listdir(here) == ["x"]


def test_names_are_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Control characters may stand in a name; where it is shown, they are escaped."""
    odd = b"a" + ESCAPES + b"\nb"
    answers = {**listing((FILE, 5, b"./" + odd), (LINK, 1, b"./l" + odd)), "many": b"12345"}
    caplog.set_level(logging.DEBUG, "clore_client")
    with HostileServer(says(answers)) as server:
        client = CloreClient(state_dir=None)
        got = client.download(server.order(), "far", tmp_path / "new", password="x", wait=5)
    assert os.listdir(os.fsencode(tmp_path / "new")) == [odd]
    assert [len(got.skipped), got.files] == [1, 1]
    ours = [r.getMessage() for r in caplog.records if r.name == "clore_client"]
    assert any("left out" in line for line in ours)
    for text in (*ours, repr(got)):
        assert not set(text) & set("\x1b\x07\x9b\n")


def test_modes_and_times_of_a_hostile_machine(here: Path) -> None:
    """No setuid, and no time beyond the year 9999."""
    client = CloreClient(state_dir=None)
    options: dict[str, Any] = {"password": "x", "wait": 5, "preserve": True}
    with HostileServer(says({"look": b"f 5 1700000000 6755\n12345"})) as server:
        client.download(server.order(), "far", here / "suid", **options)
    assert stat.S_IMODE((here / "suid").stat().st_mode) == 0o755
    with HostileServer(says({"look": b"f 5 999999999999999999 644\n12345"})) as server:
        client.download(server.order(8), "far", here / "time", **options)
    assert (here / "time").stat().st_mtime <= 253_402_300_799


def test_a_symlink_of_ones_own_is_not_written_through(here: Path) -> None:
    (here / "elsewhere").mkdir()
    (here / "far").mkdir()
    (here / "far" / "sub").symlink_to(here / "elsewhere")
    answers = {**listing((FOLDER, 1, b"./sub"), (FILE, 5, b"./sub/x")), "many": b"12345"}
    with HostileServer(says(answers)) as server:
        with pytest.raises(TransferError, match="symlink"):
            CloreClient(state_dir=None).download(server.order(), "far", here, password="x", wait=5)
    assert os.listdir(here / "elsewhere") == []
    assert sorted(os.listdir(here)) == ["elsewhere", "far"]


def test_noise_of_start_up_files_is_skipped(tmp_path: Path) -> None:
    async def chatty(command: str, process: Any) -> None:
        process.stdout.write(b"Welcome!\nclore-transfer\n")
        process.stderr.write(b"motd\n")
        await says({"look": b"f 5 0 644\n12345"})(command, process)

    with HostileServer(chatty) as server:
        CloreClient(state_dir=None).download(
            server.order(), "far", tmp_path / "x", password="x", wait=5
        )
    assert (tmp_path / "x").read_bytes() == b"12345"
