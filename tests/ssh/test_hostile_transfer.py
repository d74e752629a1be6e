"""Hostile hosts: nothing outside of the target is changed, and every wait ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import io
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from clore_client import CloreClient, SSHError, TransferError
from clore_client.ssh.transfer import download, remote_script, scripts, transfer, upload
from clore_client.ssh.transfer.entry import BLOCK
from tests.hostile import ESCAPES, HostileServer
from tests.sshd import Sshd

FILE, FOLDER, LINK = b"81a4", b"41ed", b"a1ff"  # modes, as stat prints them
TOKEN = b"{the token}"  # a placeholder for the mark that a script prints
Says = Callable[[str, Any], Any]


class Asked:
    """The script of a client, as it is read from its channel."""

    def __init__(self, command: str) -> None:
        found = re.search(r"(?:= |echo )([0-9a-f]{16})\b", command)
        self.mark = found[1].encode() if found else b"?"
        self.verb, self.token = "", b""
        self.inline = command.rpartition("' sh '")[2] if "' sh '" in command else ""

    async def read(self, process: Any) -> None:
        lines, marks = [], 0
        while marks < 2 and not self.inline:
            line = await process.stdin.readline()
            if not line:
                return
            marks += line == self.mark + b"\n"
            lines.append(line)
        text = b"".join(lines)
        if self.inline:
            text = b"\n" + self.inline.replace("@", "\n").replace("'\"'\"'", "'").encode()
        verb = re.search(rb"\n: (\w+)\n", text)
        token = re.search(rb"\ntoken='(\w+)'\n", text)
        self.verb = verb[1].decode() if verb else ""
        self.token = token[1] if token else b""


def a_file(status: bytes, content: bytes = b"12345") -> dict[str, bytes]:
    return {"look": b"f " + status + b"\n" + content + status + b"\n"}


WHOLE = a_file(b"5 0 644")


def says(
    answers: dict[str, bytes], status: int = 0, hang: bool = False, reads: bool = True
) -> Says:
    """Respond to each verb with these bytes, and to others with nothing."""

    async def run(command: str, process: Any) -> None:
        asked = Asked(command)
        await asked.read(process)
        answer = answers.get(asked.verb, b"").replace(TOKEN, asked.token)
        marked = (b"%-511s" % asked.token) + b"\n"
        process.stdout.write(asked.mark + b"\n" + answer.replace(b"{the mark}", marked))
        await process.stdout.drain()
        if hang:
            await asyncio.Event().wait()
        if reads and asked.verb in ("put", "untar"):
            await process.stdin.read()
        if reads and asked.verb == "upload" and status == 0 and b"ok " in answer:
            await process.stdin.read(3)
        process.exit(status)

    return run


def entries(*found: tuple[bytes, int, bytes], times: int = 1700000000) -> bytes:
    lines = [b"%s %d %d %s\n" % (mode, size, times, name) for mode, size, name in found]
    return b"41ed 4096 1700000000 .\n" + b"".join(lines) + TOKEN + b"\n"


def archive(*members: tuple[str, bytes], kind: bytes = b"0", link: str = "") -> bytes:
    """Return a tar archive with these names and contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size, info.type, info.linkname = len(content), kind, link
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def listing(
    *found: tuple[bytes, int, bytes], tar: bytes | None = None, then: bytes | None = None
) -> dict[str, bytes]:
    """A directory, and the archive of the requested files."""
    if tar is None:
        tar = archive(
            *[(os.fsdecode(name), b"12345"[:size]) for kind, size, name in found if kind == FILE]
        )
    again = entries(*found) if then is None else then
    return {"look": b"d\n" + entries(*found), "tree": tar + b"{the mark}" + again}


def name(text: bytes) -> dict[str, bytes]:
    return listing((FILE, 5, b"./" + text), tar=archive(("./" + os.fsdecode(text), b"12345")))


def endless(first: bytes, piece: bytes) -> Says:
    async def run(command: str, process: Any) -> None:
        asked = Asked(command)
        process.stdout.write(first.replace(b"{mark}", asked.mark))
        while True:
            process.stdout.write(piece)
            await process.stdout.drain()

    return run


def leaves(text: bytes, abort: bool = False) -> Says:
    """Send these bytes, and close the channel or the connection without an exit status."""

    async def run(command: str, process: Any) -> None:
        asked = Asked(command)
        process.stdout.write(text.replace(b"{mark}", asked.mark))
        await process.stdout.drain()
        if abort:
            process.channel.get_connection().abort()

    return run


async def dripping(command: str, process: Any) -> None:
    while True:
        process.stdout.write(b"w")
        await asyncio.sleep(0.1)


async def noisy(command: str, process: Any) -> None:
    process.stdout.write(Asked(command).mark + b"\nf 5 0 644\n")
    while True:
        process.stderr.write(b"x" * 65536)
        await process.stderr.drain()


MARK = b"{mark}\n"
# Options of those whose names begin so.
OPTIONS: dict[str, dict[str, Any]] = {
    "a size beyond": {"max_bytes": None},
    "sizes beyond": {"max_bytes": None},
    "more than max_bytes": {"max_bytes": 4},
    "a wrong hash of a range": {"streams": 2},
    "no hash of a range": {"streams": 2},
    "a range": {"streams": 2},
    "more after a range": {"streams": 2},
    "another file after a range": {"streams": 2},
    "copied": {"symlinks": "copy"},
    "followed": {"symlinks": "follow"},
}
ZEROS = b"0" * 64 + b"  -\n"
FIVE = hashlib.sha256(b"12345").hexdigest().encode() + b"  -\n"
X = (FILE, 5, b"./x")
FIVE_AND_FACTS = b"12345" + FIVE + b"5 0 644\n"

DOWNLOADS: dict[str, Says] = {
    **{
        f"a file named {text!r}": says(name(text))
        for text in (b"../x", b"a/../../x", b"/x", b"..", b".", b"a//x", b"a/", b"a/./b")
    },
    **{
        f"an archive of {member!r}": says(listing(X, tar=archive((member, b"12345"))))
        for member in ("../x", "/tmp/x", "./y", "x/..", ".", "./x/y")
    },
    "an absolute name": says({"look": b"d\n" + FILE + b" 5 0 /tmp/x\n" + TOKEN + b"\n"}),
    "a name twice": says(listing(X, X)),
    "a member twice": says(listing(X, tar=archive(("./x", b"12345"), ("./x", b"12345")))),
    "a file as a folder": says(listing(X, (FILE, 5, b"./x/y"))),
    "a file below a symlink": says(listing((LINK, 5, b"./x"), (FILE, 5, b"./x/y"))),
    "copied: a file below a symlink": says(listing((LINK, 5, b"./x"), (FILE, 5, b"./x/y"))),
    "copied: a file that comes as a symlink": says(
        listing(X, tar=archive(("./x", b""), kind=b"2", link="/etc/passwd"))
    ),
    "a hard link out of it": says(
        listing(X, tar=archive(("./x", b""), kind=b"1", link="../../x"))
    ),
    "a hard link to what was not asked for": says(
        listing(X, tar=archive(("./x", b""), kind=b"1", link="./y"))
    ),
    "a device": says(listing(X, tar=archive(("./x", b""), kind=b"3"))),
    "an endless name of a member": says(
        listing(X, tar=archive(("./" + "x" * 300000, b"12345")))
    ),
    "a folder that is not listed": says(name(b"a/b")),
    "a negative size": says({"look": b"d\n" + FILE + b" -5 0 ./x\n" + TOKEN + b"\n"}),
    "an absurd size": says({"look": b"f 1000000000000000000 0 644\n12345"}),
    "a size beyond all memory": says({"look": b"f 999999999999999999 0 644\n12345"}),
    "sizes beyond all memory": says(
        {**listing(*[(FILE, 10**17, b"./%d" % n) for n in range(50)]), "get": b"12345"}
    ),
    "more than max_bytes": says(WHOLE),
    "more than max_bytes in a folder": says(listing((FILE, 3, b"./x"), (FILE, 3, b"./y"))),
    "more than max_bytes, in the archive": says(listing((FILE, 1, b"./x"), tar=archive(
        ("./x", b"12345")))),
    "a size that no file has": says(listing((FILE, 10**18 * 9, b"./x"))),
    "too many levels": says(
        listing(*[(FOLDER, 1, b"./" + b"/".join([b"a"] * n)) for n in range(1, 1200)])
    ),
    "too many files": says(listing(*[(FILE, 0, b"./%d" % n) for n in range(2000)])),
    "an endless listing": endless(MARK + b"d\n", b"81a4 0 0 ./x\n" * 5000),
    "an endless name": endless(MARK + b"d\n81a4 0 0 ./x", b"x" * 65536),
    "a folder that is a device": says({"look": b"no it is no file\n"}),
    "a wrong hash of a range": says({"look": b"f 5 0 644\n", "get": b"12345" + ZEROS}),
    "no hash of a range": says({"look": b"f 5 0 644\n", "get": b"12345"}),
    "a range that is too long": says({"look": b"f 5 0 644\n", "get": b"6" + FIVE_AND_FACTS}),
    "more after a range": says({"look": b"f 5 0 644\n", "get": FIVE_AND_FACTS + b"x"}),
    "another file after a range": says(
        {"look": b"f 5 0 644\n", "get": b"12345" + FIVE + b"5 1 644\n"}
    ),
    "another file after the file": says({"look": b"f 5 0 644\n123455 1 644\n"}),
    "a smaller file after the file": says({"look": b"f 5 0 644\n123454 0 644\n"}),
    "nothing after the file": says({"look": b"f 5 0 644\n12345"}),
    "other files after the archive": says(listing(X, then=entries(X, times=5))),
    "smaller files after the archive": says(listing(X, then=entries((FILE, 4, b"./x")))),
    "no files after the archive": says(listing(X, then=entries())),
    "a wrong hash of a file, verified": says({"look": b"f 5 0 644\n12345" + ZEROS + b"5 0 644\n"}),
    "no hash of a file, verified": says(WHOLE),
    "wrong hashes, verified": says({**listing(X), "digests": ZEROS}),
    "too few hashes, verified": says(listing(X)),
    "too many hashes, verified": says({**listing(X), "digests": FIVE + FIVE}),
    "garbage for hashes, verified": says({**listing(X), "digests": b"\xff\n" * 9 + ESCAPES}),
    "a trickle before the mark": dripping,
    **{
        f"leaving after {text[-9:]!r}{' for good' * abort}": leaves(text, abort)
        for text in (
            b"",
            b"wel",
            MARK,
            MARK + b"f 5",
            MARK + b"f 5 0 644\n12",
            MARK + b"f 5 0 644\n12345",
            MARK + b"d\n41ed",
            MARK + b"d\n" + FILE + b" 5 0 ./x\n",
        )
        for abort in (False, True)
    },
    "no size": says({"look": b"f\n"}),
    "no mode": says({"look": b"f 5 0 9\n12345"}),
    "more than announced": says({"look": b"f 5 0 644\n123456"}),
    "fewer than announced": says({"look": b"f 5 0 644\n1234"}),
    "an exit status of 1": says(WHOLE, status=1),
    "an archive too long": says(listing(X, tar=archive(("./x", b"123456")) + b"z" * 10240)),
    "an archive too short": says(listing(X, tar=archive(("./x", b"1234")))),
    "an archive that breaks off": says({"look": b"d\n" + entries(X), "tree": archive(
        ("./x", b"12345"))[:514]}),
    "garbage for an archive": says(listing(X, tar=b"\xff" * 10240)),
    "nothing in the archive": says(listing(X, tar=bytes(10240))),
    "nothing": says({}),
    "what nobody understands": says({"look": b"\xff\xfe" + ESCAPES}),
    "escapes": says({"look": b"x " + ESCAPES * 100 + b"\n"}),
    "an endless line": endless(MARK, b"x" * 65536),
    "no end of noise": endless(b"", b"welcome\n" * 8192),
    "an endless file": endless(MARK + b"f 5 0 644\n", b"x" * 65536),
    "endless errors": noisy,
    "silence": says({}, hang=True),
    "silence in the file": says({"look": b"f 5 0 644\n123"}, hang=True),
    "silence in the archive": says({"look": b"d\n" + entries(X)}, hang=True),
}  # fmt: skip

READY = b"ready 0022\n" + TOKEN + b"\n"
DONE = {"put": b"done -\nend\n", "untar": b"done -\nend\n"}
SIZES = entries((FILE, 4, b"./x"))

UPLOADS: dict[str, Says] = {
    "a wrong hash": says({"upload": READY, "put": b"done " + b"0" * 64 + b"\nend\n"}),
    "a refusal": says({"upload": b"no " + ESCAPES + b"\n"}),
    "a refusal of the data": says(
        {"upload": READY, "put": b"no " + ESCAPES + b"\n", "untar": b"no " + ESCAPES + b"\n"}
    ),
    "nothing": says({}),
    "garbage": says({"upload": b"\xff" * 1000}),
    "garbage for an umask": says({"upload": b"ready \xff\n" + TOKEN + b"\n", **DONE}),
    "garbage of the data": says({"upload": READY, "put": b"\xff" * 1000, "untar": b"\xff" * 1000}),
    "an endless answer": endless(MARK, b"ready " * 20000),
    "silence": says({}, hang=True),
    "success and no end": says({"upload": READY, **DONE}, hang=True),
    "sizes that differ": says({"upload": READY + entries((FILE, 5, b"./x")) + b"no\n", **DONE}),
    "no sizes": says({"upload": READY, **DONE}),
    "no word of the end": says({"upload": READY + SIZES, **DONE}),
    "a refusal at the end": says({"upload": READY + SIZES + b"no " + ESCAPES + b"\n", **DONE}),
    "half an answer": says({"upload": b"ready", "put": b"done", "untar": b"done"}),
    "sizes that are none": says({"upload": READY + ESCAPES, **DONE}),
    "no hash, verified": says({"upload": READY + SIZES + b"ok /x\n", **DONE}),
    "a wrong hash, verified": says(
        {"upload": READY + SIZES + b"ok /x\n", "put": b"done " + ZEROS + b"end\n",
         "untar": DONE["untar"], "digests": ZEROS}
    ),
    "a trickle before the mark": dripping,
    **{
        f"leaving after {text!r}{' for good' * abort}": leaves(text, abort)
        for text in (b"", MARK, MARK + b"r", MARK + b"ready 0022\n")
        for abort in (False, True)
    },
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, folders, files in os.walk(folder):
        for entry in [*folders, *files]:
            path = os.path.join(place, entry)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            text = Path(path).read_bytes() if stat.S_ISREG(status.st_mode) else b""
            # These folders contained a temporary name, which was removed.
            times = 0 if entry in ("inner", "target") else status.st_mtime_ns
            found[path] = (kind, status.st_mode, status.st_size, times, text)
    return found


def surroundings(root: Path) -> Path:
    """A folder for the target, with entries around it that must not change."""
    for place in ("x", "inner/x", "inner/target/x", "inner/sub/x"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text("mine")
    return root / "inner"


@contextlib.contextmanager
def small_limits() -> Iterator[None]:
    """Data that is too large is refused early, so the test is fast."""
    with contextlib.ExitStack() as stack:
        for module, limit, value in (
            (download, "MAX_ANSWER", 10**6),
            (download, "MAX_FILES", 1500),
            (upload, "MAX_ANSWER", 10**6),
        ):
            stack.enter_context(unittest.mock.patch.object(module, limit, value))
        yield


def violations() -> list[str]:
    """Run every attack, and return what any of them achieved."""
    cases = [
        (kind, what, target)
        for kind, attacks in (("download", DOWNLOADS), ("upload", UPLOADS))
        for what in attacks
        for target in ("target", "new")
    ]
    with small_limits(), concurrent.futures.ThreadPoolExecutor(8) as pool:
        return [found for found in pool.map(lambda case: violation(*case), cases) if found]


def violation(kind: str, what: str, target: str) -> str:
    """Run one attack; the result is empty if it achieved nothing."""
    attack = (DOWNLOADS if kind == "download" else UPLOADS)[what]
    with tempfile.TemporaryDirectory() as root, HostileServer(attack) as server:
        inner = surroundings(Path(root))
        before = snapshot(Path(root))
        problem = _attacked(kind, what, server, inner, target)
        after = snapshot(Path(root))
        if after != before:
            changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
            problem += f" changed {sorted(changed)}"
        return f"{kind}, {what}, {target}: {problem}" if problem else ""


def _attacked(kind: str, what: str, server: HostileServer, inner: Path, target: str) -> str:
    client = CloreClient(state_dir=None)
    options: dict[str, Any] = {"password": "x", "wait": 5, "timeout": 0.5}
    options["verify"] = "verified" in what
    if kind == "download":
        options["max_bytes"] = 10**12
        for named, more in OPTIONS.items():
            options.update(more if what.startswith(named) else {})
    start = time.monotonic()
    try:
        if kind == "download":
            client.download(server.order(), "far", inner / target, **options)
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
    except BaseException as error:
        return f"raised {error!r}"
    return "succeeded"


@pytest.mark.parametrize("what", sorted(DOWNLOADS))
@pytest.mark.parametrize("target", ["target", "new"])
def test_downloads_from_a_hostile_machine(what: str, target: str) -> None:
    with small_limits():
        assert violation("download", what, target) == ""
    assert not [t for t in threading.enumerate() if t.name == "clore-transfer"]


@pytest.mark.parametrize("what", sorted(UPLOADS))
@pytest.mark.parametrize("target", ["target", "new"])
def test_uploads_to_a_hostile_machine(what: str, target: str) -> None:
    with small_limits():
        assert violation("upload", what, target) == ""
    assert not [t for t in threading.enumerate() if t.name == "clore-transfer"]


def test_all_of_it_without_asserts() -> None:
    code = "from tests.ssh.test_hostile_transfer import *; print(violations())"
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


def test_a_server_without_the_extension_to_replace_files(tmp_path: Path, here: Path) -> None:
    (tmp_path / "far").mkdir()
    (here / "tree").mkdir()

    class PlainRename(asyncssh.SFTPServer):
        def __init__(self, chan: Any) -> None:
            super().__init__(chan, chroot=os.fsencode(tmp_path / "far"))

        def posix_rename(self, old: bytes, new: bytes) -> None:
            raise asyncssh.SFTPOpUnsupported("not here")

    client = CloreClient(state_dir=None)
    options: dict[str, Any] = {"password": "x", "wait": 5}
    with HostileServer(says({"upload": b"no lacks tar\n"}), sftp=PlainRename) as server:
        for text in ("first", "second"):
            (here / "file").write_text(text)
            (here / "tree" / "file").write_text(text)
            client.upload(server.order(), here / "file", "/file", **options)
            client.upload(server.order(), here / "tree", "/", **options)
            assert (tmp_path / "far" / "file").read_text() == text
            assert (tmp_path / "far" / "tree" / "file").read_text() == text


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("short", ""),
        ("empty", "261120 bytes are missing"),
        ("never", "sent no data for 0.5s"),
        ("flood", "sends a packet of"),
    ],
)
def test_odd_answers_of_sftp(tmp_path: Path, here: Path, how: str, said: str) -> None:
    """A host may answer with less than was requested; everything else is an error, and soon."""
    data = os.urandom(300_000)
    (tmp_path / "far").write_bytes(data)

    class OddReads(asyncssh.SFTPServer):
        def __init__(self, chan: Any) -> None:
            super().__init__(chan, chroot=os.fsencode(tmp_path))

        async def read(self, file_obj: object, offset: int, size: int) -> bytes:
            if how == "never":
                await asyncio.Event().wait()
            return {"short": data[offset : offset + min(size, 1000)], "flood": bytes(2**21)}.get(
                how, b""
            )

    options: dict[str, Any] = {"password": "x", "wait": 5, "timeout": 0.5}
    with HostileServer(says({"look": b"no lacks tar\n"}), sftp=OddReads) as server:
        start = time.monotonic()
        expected = pytest.raises(TransferError, match=said) if said else contextlib.nullcontext()
        with expected:
            CloreClient(state_dir=None).download(server.order(), "/far", here / "x", **options)
        assert time.monotonic() - start < 30
    assert os.listdir(here) == ([] if said else ["x"])
    if not said:
        assert (here / "x").read_bytes() == data


def test_names_are_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A name may have control characters; they are escaped where it is shown."""
    odd = b"a" + ESCAPES + b"\nb"
    answers = listing((FILE, 5, b"./" + odd), (LINK, 1, b"./l" + odd))
    caplog.set_level(logging.DEBUG, "clore_client")
    with HostileServer(says(answers)) as server:
        client = CloreClient(state_dir=None)
        got = client.download(server.order(), "far/", tmp_path / "new", password="x", wait=5)
    assert os.listdir(os.fsencode(tmp_path / "new")) == [odd]
    assert [len(got.skipped), got.files] == [1, 1]
    ours = [r.getMessage() for r in caplog.records if r.name == "clore_client"]
    assert any("left out" in line for line in ours)
    for text in (*ours, repr(got), got.path, *(part for pair in got.skipped for part in pair)):
        assert not set(text) & set("\x1b\x07\x9b\n")


def test_modes_and_times_of_a_hostile_machine(here: Path) -> None:
    """No setuid, and no time beyond the year 9999."""
    client = CloreClient(state_dir=None)
    options: dict[str, Any] = {"password": "x", "wait": 5, "preserve": True}
    with HostileServer(says(a_file(b"5 1700000000 6755"))) as server:
        client.download(server.order(), "far", here / "suid", **options)
    assert stat.S_IMODE((here / "suid").stat().st_mode) == 0o755
    with HostileServer(says(a_file(b"5 999999999999999999 644"))) as server:
        client.download(server.order(8), "far", here / "time", **options)
    assert (here / "time").stat().st_mtime <= 253_402_300_799


def test_a_symlink_of_ones_own_is_not_written_through(here: Path) -> None:
    (here / "elsewhere").mkdir()
    (here / "far").mkdir()
    (here / "far" / "sub").symlink_to(here / "elsewhere")
    answers = listing((FOLDER, 1, b"./sub"), (FILE, 5, b"./sub/x"))
    with HostileServer(says(answers)) as server:
        with pytest.raises(TransferError, match="symlink"):
            CloreClient(state_dir=None).download(server.order(), "far", here, password="x", wait=5)
    assert os.listdir(here / "elsewhere") == []
    assert sorted(os.listdir(here)) == ["elsewhere", "far"]


def test_noise_of_start_up_files_is_skipped(tmp_path: Path) -> None:
    async def chatty(command: str, process: Any) -> None:
        process.stdout.write(b"Welcome!\n" * 100)
        process.stderr.write(b"motd\n")
        await says(WHOLE)(command, process)

    with HostileServer(chatty) as server:
        CloreClient(state_dir=None).download(
            server.order(), "far", tmp_path / "x", password="x", wait=5
        )
    assert (tmp_path / "x").read_bytes() == b"12345"


def test_kinds_that_change_places(tmp_path: Path) -> None:
    """A folder in the place of a local file, and the reverse."""
    inner = surroundings(tmp_path)
    (inner / "target" / "far").mkdir()
    before = snapshot(tmp_path)
    client = CloreClient(state_dir=None)
    options: dict[str, Any] = {"password": "x", "wait": 5}
    with HostileServer(says(listing(X))) as server:
        with pytest.raises(TransferError, match="not a directory"):
            client.download(server.order(), "far", inner / "x", **options)
        (inner / "target" / "far" / "x").mkdir()
        with pytest.raises(TransferError, match="something else"):
            client.download(server.order(), "far", inner / "target", **options)
        (inner / "target" / "far" / "x").rmdir()
    with HostileServer(says(WHOLE)) as server:
        with pytest.raises(TransferError, match="is a directory"):
            client.download(server.order(8), "far", inner / "target", **options)
    assert snapshot(tmp_path).keys() == before.keys()


def test_what_is_kept_for_later_is_not_the_target(here: Path) -> None:
    """With resume=True, partial data may stay beside the target; nothing else does."""
    options: dict[str, Any] = {"password": "x", "wait": 5, "timeout": 0.5, "resume": True}
    client = CloreClient(state_dir=None)
    block = bytes(BLOCK)
    first = {"look": b"f 100000 0 644\n" + block}
    with HostileServer(says(first)) as server:
        with pytest.raises(TransferError, match="kept for resume"):
            client.download(server.order(), "f", here / "z", **options)
        assert [n[:12] for n in os.listdir(here)] == [".clore-part-"] * 2
        rest = bytes(100000 - BLOCK)
        digest = hashlib.sha256(rest).hexdigest().encode() + b"  -\n"
        server.run = says(
            {"look": b"f 100000 0 644\n", "get": rest + digest + b"100000 0 644\n",
             "digests": ZEROS}
        )  # fmt: skip
        # There is partial data to resume from, which differs from what the host says.
        with pytest.raises(TransferError, match="SHA-256"):
            client.download(server.order(), "f", here / "z", **options)
    assert os.listdir(here) == []


async def take_nothing(process: Any, how: str) -> None:
    """A host that starts, and then stops reading from the channel or the connection."""
    if how == "connection":
        process.channel.get_connection()._transport.pause_reading()


@pytest.mark.parametrize("how", ["channel", "connection"])
def test_a_machine_that_takes_nothing(here: Path, how: str) -> None:
    (here / "x").write_bytes(bytes(30_000_000))

    async def run(command: str, process: Any) -> None:
        await take_nothing(process, how)
        await asyncio.Event().wait()

    window = 2**31 - 1 if how == "connection" else 2**20
    with HostileServer(run, window=window) as server:
        with pytest.raises(TransferError):
            CloreClient(state_dir=None).upload(
                server.order(), here / "x", "far", password="x", wait=5, timeout=0.5
            )
    assert not [t for t in threading.enumerate() if t.name == "clore-transfer"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_more_than_the_window_allows(
    here: Path, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unread data has a limit, at which the connection ends."""
    monkeypatch.setattr(download, "DATA_WINDOW", 2**20)
    passed = threading.Event()

    async def run(command: str, process: Any) -> None:
        asked = Asked(command)
        process.stdout.write(asked.mark + b"\nf 90000000 0 644\n")
        for _ in range(90_000_000 // 65536):
            if process.channel.is_closing():
                return
            process.channel._send_window = 10**9
            getattr(process, stream).write(bytes(65536))
            await asyncio.sleep(0)
        passed.set()

    def slow(*_: Any) -> None:
        passed.wait(1)  # as a slow disk

    with HostileServer(run) as server, pytest.raises(TransferError) as caught:
        CloreClient(state_dir=None).download(
            server.order(), "far", here / "x", password="x", wait=5, timeout=5, progress=slow
        )
    assert not passed.is_set()
    assert "sent no data" not in str(caught.value)
    assert os.listdir(here) == []


def test_the_path_that_a_machine_tells_is_data(here: Path) -> None:
    (here / "x").write_bytes(b"12345")
    answers = {"upload": READY + b"ok /" + ESCAPES + b"\n", **DONE}
    with HostileServer(says(answers)) as server:
        sent = CloreClient(state_dir=None).upload(
            server.order(), here / "x", "far", password="x", wait=5
        )
    assert sent.path.startswith("/\\x1b[2J")
    assert sent.path.isprintable()


# --- a correct host, on which a file changes during the transfer ---


@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite", "remove"])
@pytest.mark.parametrize("how", ["at once", "ranges", "folder", "kept"])
def test_a_file_that_changes_there_meanwhile(
    sshd: Sshd, tmp_path: Path, here: Path, change: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "DATA_WINDOW", 2**18)  # so that most is still to come
    far = tmp_path / "far"
    far.mkdir()
    (far / "x").write_bytes(bytes(9_000_000))
    os.utime(far / "x", (1_600_000_000, 1_600_000_000))
    changed: list[bool] = []

    def progress(*_: Any) -> None:
        if changed:
            return
        changed.append(True)
        if change == "remove":
            (far / "x").unlink()
        elif change == "shrink":
            os.truncate(far / "x", 8_000_000)
        else:
            with open(far / "x", "ab" if change == "grow" else "r+b") as file:
                file.write(b"other")

    options: dict[str, Any] = {"streams": 2} if how == "ranges" else {"resume": how == "kept"}
    source = f"{far}/" if how == "folder" else str(far / "x")

    def get() -> None:
        CloreClient(state_dir=None).download(
            sshd.order(), source, here / "new", key_path=sshd.key, progress=progress, **options
        )

    if change == "grow":  # as a log does: it arrives as it was at the start
        get()
        place = here / "new" / "x" if how == "folder" else here / "new"
        assert place.read_bytes() == bytes(9_000_000)
        return
    with pytest.raises(TransferError):
        get()
    if how != "kept":
        assert os.listdir(here) == []
    assert not (here / "new").exists()


# --- correct hosts: regressions ---


def test_a_merge_leaves_the_modes_of_what_is_there(sshd: Sshd, tmp_path: Path, here: Path) -> None:
    """A private local folder stays private, unless preserve=True."""
    client = CloreClient(state_dir=None)
    far = tmp_path / "far"
    (far / "sub").mkdir(parents=True)
    (far / "sub" / "x").write_text("x")
    os.utime(far / "sub", (1_500_000_000, 1_500_000_000))
    (here / "far" / "sub").mkdir(parents=True)
    (here / "far" / "sub").chmod(0o700)
    client.download(sshd.order(), far, here, key_path=sshd.key)
    assert stat.S_IMODE((here / "far" / "sub").stat().st_mode) == 0o700
    client.download(sshd.order(), far, here, key_path=sshd.key, preserve=True)
    assert stat.S_IMODE((here / "far" / "sub").stat().st_mode) == 0o755
    assert (here / "far" / "sub").stat().st_mtime == 1_500_000_000


def test_new_folders_of_a_merge_keep_their_modes_there(
    sshd: Sshd, tmp_path: Path, here: Path
) -> None:
    (here / "data" / "new" / "deep").mkdir(parents=True)
    (here / "data" / "old").mkdir()
    for name in ("a", "new/b", "new/deep/c", "old/d"):
        (here / "data" / name).write_text(name)
    (here / "data" / "new").chmod(0o700)
    os.utime(here / "data" / "new", (1_500_000_000, 1_500_000_000))
    far = tmp_path / "far"
    (far / "data" / "old").mkdir(parents=True)
    (far / "data" / "old" / "mine").write_text("mine")
    CloreClient(state_dir=None).upload(
        sshd.order(), here / "data", far, key_path=sshd.key, preserve=True
    )
    assert stat.S_IMODE((far / "data" / "new").stat().st_mode) == 0o700
    assert (far / "data" / "new").stat().st_mtime == 1_500_000_000
    for name in ("a", "new/b", "new/deep/c", "old/d"):
        assert (far / "data" / name).read_text() == name
    assert os.listdir(far) == ["data"]
    assert sorted(os.listdir(far / "data" / "old")) == ["d", "mine"]


def test_more_names_than_fit_in_a_window(
    sshd: Sshd, tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has to read all of them before it fills the other direction."""
    monkeypatch.setattr(download, "DATA_WINDOW", 2**18)
    (tmp_path / "far").mkdir()
    for number in range(11_000):
        (tmp_path / "far" / f"{number:0230}").touch()
    for verify in (False, True):
        got = CloreClient(state_dir=None).download(
            sshd.order(), tmp_path / "far", here / f"{verify}", key_path=sshd.key, timeout=10,
            verify=verify,
        )  # fmt: skip
        assert got.files == 11_000


def test_a_folder_that_is_named_as_a_home(sshd: Sshd, tmp_path: Path, here: Path) -> None:
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "x").write_text("x")
    CloreClient(state_dir=None).download(sshd.order(), tmp_path / "~", here, key_path=sshd.key)
    assert os.listdir(here) == ["~"]


def test_what_cannot_be_read_there_is_named(tmp_path: Path, here: Path) -> None:
    """The message of tar if a file is missing."""

    async def run(command: str, process: Any) -> None:
        process.stderr.write(b"tar: ./x: Permission denied\n")
        await says(listing(X, tar=bytes(10240)))(command, process)

    said = r"x: .*Permission denied"
    with HostileServer(run) as server, pytest.raises(TransferError, match=said):
        CloreClient(state_dir=None).download(
            server.order(), "far", here / "new", password="x", wait=5
        )


def test_hashes_of_odd_names() -> None:
    """Not every sha256sum escapes newlines; no name can break the parser."""
    one, two = b"1" * 64, b"2" * 64
    text = one + b"  ./a\rb\nc\n\\" + two + b"  ./d\\ne\n"
    assert scripts.parse_digests(text, 2) == [one.decode(), two.decode()]
    with pytest.raises(SSHError, match="sent 1 SHA-256"):
        scripts.parse_digests(one + b"  ./a\n", 2)


@pytest.mark.parametrize("how", ["channel", "connection"])
def test_ctrl_c_does_not_wait_for_a_machine_that_hangs(
    here: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even to remove existing entries."""
    monkeypatch.setattr(transfer, "LAST_PATIENCE", 0.3)
    monkeypatch.setattr(remote_script, "LAST_PATIENCE", 0.3)
    pressed: list[bool] = []
    (here / "x").write_bytes(bytes(30_000_000))

    async def run(command: str, process: Any) -> None:
        await take_nothing(process, how)
        if not pressed:
            pressed.append(True)
            asyncio.get_running_loop().call_later(0.3, os.kill, os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    window = 2**31 - 1 if how == "connection" else 2**20
    with HostileServer(run, window=window) as server:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            CloreClient(state_dir=None).upload(
                server.order(), here / "x", "far", password="x", wait=5, timeout=60
            )
    assert time.monotonic() - start < 50
    assert not [t for t in threading.enumerate() if t.name == "clore-transfer"]
