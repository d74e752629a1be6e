"""scp() with hostile hosts, also under ``python -O``, and with correct ones."""

from __future__ import annotations

import asyncio
import json
import os
import pkgutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paramiko
import pytest
import scp as plain_scp

from clore_client import CloreClient
from tests import hostile
from tests.conftest import MakeSim, client_for
from tests.hostile import ATTACKS, ESCAPES, Attack, HostileServer, scp_sink, scp_source
from tests.sshd import Sshd
from tests.variant import inside

pytestmark = pytest.mark.internal  # takes long, and is the same in the one file

if TYPE_CHECKING:
    from clore_client.errors import TransferError
    from clore_client.ssh.scp import guarded_scp
else:
    guarded_scp = pkgutil.resolve_name(inside("ssh.scp.guarded_scp"))
    TransferError = pkgutil.resolve_name(inside("errors.TransferError"))

Make = Callable[[paramiko.SSHClient, Attack], Any]


def connect(server: HostileServer) -> paramiko.SSHClient:
    # Nothing is pinned: a fixture of the whole module comes before a test's own home folder.
    order = server.order()
    return CloreClient().connect_ssh(order, password="x", wait=5, host_key="accept")


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        yield running


@pytest.fixture(scope="module")
def ssh(server: HostileServer) -> Iterator[paramiko.SSHClient]:
    with connect(server) as client:
        yield client


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return an empty folder; the home of the test is in tmp_path."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


# --- attacks on get() ---


def hardened(ssh: paramiko.SSHClient, attack: Attack) -> Any:
    return guarded_scp(ssh, socket_timeout=attack.timeout, max_bytes=attack.max_bytes)


def unprotected(ssh: paramiko.SSHClient, attack: Attack) -> Any:
    transport = ssh.get_transport()
    assert transport is not None
    return plain_scp.SCPClient(transport, socket_timeout=attack.timeout)


def violations(
    server: HostileServer, ssh: paramiko.SSHClient, attack: Attack, make: Make = hardened
) -> list[str]:
    """Return what an attack has achieved, without asserts, so that it works under -O."""
    with tempfile.TemporaryDirectory() as folder:
        around = Path(os.path.realpath(folder))
        target = furnish(around)
        before = snapshot(around)
        # An absolute path must lead where we can see it.
        server.run = scp_source(*(for_here(step, around) for step in attack.steps))
        into = {"folder": target, "new": target / "new", "file": target / "file"}[attack.into]
        here = os.getcwd()
        os.chdir(around / "work")
        try:
            make(ssh, attack).get(attack.ask, str(into), **attack.more)
        except TransferError as error:
            found = unfit(error)
        except Exception as error:
            found = [f"raised {error!r}"]
        else:
            found = ["raised nothing"]
        finally:
            os.chdir(here)
        return found + changes(before, snapshot(around), attack)


def furnish(around: Path) -> Path:
    """A target with all kinds of entries, and entries around it that must not change."""
    for name in ("work", "beside", "target/inner"):
        (around / name).mkdir(parents=True)
    target = around / "target"
    for path in (around / "secret", around / "beside/f", target / "old", target / "file"):
        path.write_bytes(b"before")
        path.chmod(0o640)
    for name, leads in (("link", "../secret"), ("dangling", "../made"), ("way", "../beside")):
        (target / name).symlink_to(leads)
    (target / "inner/way").symlink_to("../../beside")
    os.mkfifo(target / "pipe")
    return target


def for_here(step: hostile.Step, around: Path) -> hostile.Step:
    if isinstance(step, bytes):
        return step.replace(b" /tmp/x", b" " + os.fsencode(around / "made"))
    return step


def snapshot(around: Path) -> dict[str, tuple[Any, ...]]:
    """Names, kinds, permissions, times and contents of everything."""
    found = {}
    for path in [around, *around.rglob("*")]:
        info = path.lstat()
        content = b""
        if stat.S_ISREG(info.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(info.st_mode):
            content = os.fsencode(os.readlink(path))
        found[str(path.relative_to(around))] = (info.st_mode, info.st_mtime_ns, content)
    return found


def changes(
    before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]], attack: Attack
) -> list[str]:
    """Return what changed, except a partial file in the target with a requested name."""
    asked = attack.ask if isinstance(attack.ask, list) else [attack.ask]
    found = [f"{name!r} is gone" for name in before if name not in after]
    for name, (mode, changed, content) in after.items():
        inner = name.removeprefix("target/")
        within = inner != name
        may_come = within and inner.split("/")[0] in (*asked, *attack.received, attack.into)
        if name not in before:
            if not may_come or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                found.append(f"{name!r} was made")
            elif mode & 0o7022:
                found.append(f"{name!r} has the permissions {mode:o}")
            continue
        old_mode, old_changed, old_content = before[name]
        if within and stat.S_ISREG(old_mode) and may_come:
            found += [f"{name!r} has other permissions"] if mode != old_mode else []
            continue
        passing = name == "target" or (within and stat.S_ISDIR(mode))  # files came and went
        if (mode, content) != (old_mode, old_content) or (changed != old_changed and not passing):
            found.append(f"{name!r} was changed")
    return found


def unfit(error: TransferError) -> list[str]:
    text = str(error)
    found = [] if text.isprintable() else [f"a terminal would obey {text!r}"]
    found += [] if 10 < len(text) < 1000 else [f"{len(text)} characters of error"]
    found += [] if error.__cause__ is not None else ["the error has no cause"]
    return found + ([] if error.name and error.name.isprintable() else [f"name {error.name!r}"])


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_get(server: HostileServer, ssh: paramiko.SSHClient, name: str) -> None:
    assert violations(server, ssh, ATTACKS[name]) == []


PARTS = 4


def attack_all(part: int) -> dict[str, list[str]]:
    """The attacks of one part that achieved something, and what."""
    names = list(ATTACKS)[part::PARTS]
    with HostileServer() as server, connect(server) as ssh:
        found = {name: violations(server, ssh, ATTACKS[name]) for name in names}
    return {name: what for name, what in found.items() if what}


@pytest.mark.parametrize("part", range(PARTS))
def test_all_attacks_under_python_o(part: int) -> None:
    script = (
        "import json, sys; from tests.ssh.test_scp import attack_all\n"
        f"print(json.dumps([sys.flags.optimize, attack_all({part})]))"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(done.stdout) == [1, {}]


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("a folder named b'..' in a folder", "was made"),
        ("a file named b'y' for a folder", "was made"),
        ("a symlink entered as a folder", "was changed"),
    ],
)
def test_these_attacks_work_on_plain_scp(
    server: HostileServer, ssh: paramiko.SSHClient, name: str, outcome: str
) -> None:
    """Check that the tests above can fail."""
    found = violations(server, ssh, ATTACKS[name], unprotected)
    assert any(outcome in what for what in found), found


def test_permissions_and_times_from_a_host(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path
) -> None:
    """No file is setuid, and each folder stays writable for its owner during the transfer."""
    server.run = scp_source(
        b"T1000 0 2000 0\n", b"D7000 0 x\n", b"T1 0 2 0\n", b"C7777 5 f\n", b"owned\0", b"E\n"
    )
    guarded_scp(ssh).get("x", str(place), recursive=True, preserve_times=True)
    folder, file = (place / "x").stat(), (place / "x/f").stat()
    assert stat.S_IMODE(folder.st_mode) == 0o700
    assert stat.S_IMODE(file.st_mode) == 0o777
    assert (folder.st_mtime, file.st_mtime, file.st_atime) == (1000, 1, 2)


def test_the_folder_that_was_named_keeps_its_permissions(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path
) -> None:
    target = place / "target"
    target.mkdir(mode=0o750)
    for asked, preserve in ((".", True), ("x", False)):
        server.run = scp_source(
            b"D0777 0 " + asked.encode() + b"\n", b"C0666 1 f\n", b"z\0", b"E\n"
        )
        guarded_scp(ssh).get(asked, str(target), recursive=True, preserve_times=preserve)
        assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert (target / "f").read_bytes() == (target / "x/f").read_bytes() == b"z"


def test_records_in_pieces_and_together(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path
) -> None:
    """A packet is not a record: a line may arrive byte by byte, or with other lines."""

    async def drip(command: str, process: Any) -> None:
        for piece in (b"D07", b"55 0 ", b"x\nC0644 3", b" f\nab", b"c", b"\0C0644 0 g\n\0E", b"\n"):
            process.stdout.write(piece)
            await process.stdout.drain()
            await asyncio.sleep(0.01)
        await process.stdin.readexactly(7)
        process.exit(0)

    async def several(command: str, process: Any) -> None:
        process.stdout.write(b"D0755 0 x\nC0644 3 f\nabc\0C0644 0 g\n\0E\n")
        await process.stdin.readexactly(7)
        process.exit(0)

    for number, run in enumerate((drip, several)):
        server.run = run
        guarded_scp(ssh).get("x", str(place / f"{number}"), recursive=True)
        assert (place / f"{number}/f").read_bytes() == b"abc"
        assert (place / f"{number}/g").read_bytes() == b""


def test_a_path_after_the_folder_without_a_name(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path
) -> None:
    (place / "target").mkdir()
    server.run = scp_source(b"D0755 0 .\n", b"C0644 1 f\n", b"z\0", b"E\n", b"C0644 1 x\n", b"z\0")
    guarded_scp(ssh).get([".", "x"], str(place / "target"), recursive=True)
    assert contents(place) == {b"target": None, b"target/f": b"z", b"target/x": b"z"}


def test_a_home_folder(server: HostileServer, ssh: paramiko.SSHClient, place: Path) -> None:
    server.run = scp_source(b"D0755 0 root\n", b"C0644 1 .f\n", b"z\0", b"E\n")
    guarded_scp(ssh).get("~", str(place), recursive=True)
    assert contents(place) == {b"root": None, b"root/.f": b"z"}


def test_a_shell_that_prints_a_welcome(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path
) -> None:
    """Each transfer ends at once, and the error shows what was printed."""
    client = guarded_scp(ssh)
    server.run = scp_source(b"Welcome!\n")
    with pytest.raises(TransferError, match=r"Welcome!.*start-up files"):
        client.get("x", str(place))
    server.run = scp_sink(b"Welcome!\n")
    with pytest.raises(TransferError, match=r"Welcome!.*start-up files"):
        client.put(__file__, "there")


def test_a_transfer_after_one_that_failed(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path
) -> None:
    """No state of the first transfer is left: no time, and no folder whose time is to be set."""
    client = guarded_scp(ssh)
    server.run = scp_source(b"T1 0 1 0\n", b"D0755 0 x\n", b"T1 0 1 0\n", b"\1no\n")
    with pytest.raises(TransferError):
        client.get("x", str(place), recursive=True, preserve_times=True)
    (place / "x").rename(place / "elsewhere")
    server.run = scp_source(b"T2 0 2 0\n", b"C0644 1 x\n", b"z\0")
    client.get("x", str(place), preserve_times=True)
    assert (place / "x").stat().st_mtime == 2


def test_how_far_it_came(server: HostileServer, ssh: paramiko.SSHClient, place: Path) -> None:
    server.run = scp_source(b"D0755 0 x\n", b"C0644 50 f\n", hostile.then(b"owned", hostile.leave))
    with pytest.raises(TransferError, match=r"x/f was not received \(5 of 50 bytes\)") as caught:
        guarded_scp(ssh).get("x", str(place), recursive=True)
    error = caught.value
    assert (error.name, error.done, error.total) == ("x/f", 5, 50)


def test_what_the_callback_raises_is_the_callers(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path
) -> None:
    def progress(name: bytes, size: int, done: int) -> None:
        if done:
            raise OSError("of the callback")

    server.run = scp_source(b"C0644 5 x\n", b"owned\0")
    with pytest.raises(OSError, match="of the callback"):
        guarded_scp(ssh, progress=progress).get("x", str(place))


def test_a_full_disk(server: HostileServer, ssh: paramiko.SSHClient, place: Path) -> None:
    """In a process whose files have a limit, which is an OSError as a full disk is."""
    script = (
        "import resource, signal, sys; from tests.ssh.test_scp import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "steps = (b'C0644 5000000 x\\n', hostile.flood(b'z' * 8192))\n"
        "with HostileServer(scp_source(*steps)) as server, connect(server) as ssh:\n"
        "    try: guarded_scp(ssh).get('x', sys.argv[1])\n"
        "    except TransferError as error: print(error, error.done > 0)"
    )
    (place / "x").write_bytes(b"before")
    done = subprocess.run(
        [sys.executable, "-c", script, place],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "x was not received" in done.stdout
    assert "File too large" in done.stdout
    assert done.stdout.endswith("True\n")
    assert [path.name for path in place.iterdir()] == ["x"]


# --- attacks on put() ---

YES = b"\0"
SINKS: dict[str, tuple[Any, float]] = {
    "an error at the start": (scp_sink(b"\1" + ESCAPES + b"\n"), 20),
    "a last error at the record": (scp_sink(YES, b"\2" + ESCAPES + b"\n"), 20),
    "an error at the content": (scp_sink(YES, YES, b"\1" + ESCAPES + b"\n"), 20),
    "an endless error": (scp_sink(hostile.flood(b"\1" + ESCAPES)), 20),
    "garbage": (scp_sink(b"hello" + ESCAPES + b"\n"), 20),
    "stderr": (scp_sink(hostile.complaint(ESCAPES, 1)), 20),
    "an exit code after all": (
        scp_sink(YES, YES, hostile.then(YES, hostile.complaint(ESCAPES, 1))), 20
    ),
    "leaving at the start": (scp_sink(hostile.leave), 20),
    "leaving at the record": (scp_sink(YES, hostile.leave), 20),
    "leaving at the content": (scp_sink(YES, YES, hostile.leave), 20),
    "an error, and taking no more": (scp_sink(YES, YES + b"\1" + ESCAPES, hostile.leave), 20),
    "silence at the start": (scp_sink(hostile.stay_silent), 0.3),
    "silence at the record": (scp_sink(YES, hostile.stay_silent), 0.3),
    "silence in the content": (scp_sink(YES, hostile.then(YES, hostile.stay_silent)), 0.3),
    "silence at the content": (scp_sink(YES, YES, hostile.stay_silent), 0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", SINKS)
def test_an_attack_on_put(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path, name: str
) -> None:
    server.run, timeout = SINKS[name]
    (place / "x").write_bytes(b"z" * 5_000_000)
    for way in ("put", "putfo"):
        client = guarded_scp(ssh, socket_timeout=timeout)
        source: Any = place / "x" if way == "put" else BytesIO(b"z" * 5_000_000)
        with pytest.raises(TransferError) as caught:
            getattr(client, way)(source, "there")
        assert unfit(caught.value) == []


def test_a_file_that_changes_while_it_is_sent(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path
) -> None:
    path = place / "x"
    path.write_bytes(b"z" * 500_000)
    server.run = scp_sink(YES, YES, YES)
    with pytest.raises(TransferError, match="ended before"):
        guarded_scp(ssh, progress=lambda *_: os.truncate(path, 0)).put(path, "there")
    for size in (4, 6):
        server.run = scp_sink(YES, YES, YES)
        if size == 6:
            with pytest.raises(TransferError, match="ended before"):
                guarded_scp(ssh).putfo(BytesIO(b"12345"), "there", size=size)
        else:
            guarded_scp(ssh).putfo(BytesIO(b"12345"), "there", size=size)


@pytest.mark.parametrize("hang_at", ["open", "exec"])
def test_a_host_that_hangs_after_the_login(hang_at: str, place: Path) -> None:
    with HostileServer(hang_at=hang_at) as server, connect(server) as ssh:
        client = guarded_scp(ssh, socket_timeout=0.3)
        for method, path in ((client.get, "x"), (client.put, __file__)):
            with pytest.raises(TransferError, match=r"for 0\.3s|Timeout"):
                method(path, str(place))
        client.close()
    assert not list(place.iterdir())


def test_a_socket_that_takes_no_more(place: Path) -> None:
    """The window is open, but the server reads nothing: paramiko alone would wait forever."""

    async def deaf(command: str, process: Any) -> None:
        process.stdout.write(YES + YES)
        await process.stdin.read(1)
        process.channel.get_connection()._transport.pause_reading()
        await hostile.hang()

    (place / "x").write_bytes(b"z" * 30_000_000)
    with HostileServer(deaf, window=2**31 - 1) as server, connect(server) as ssh:
        with pytest.raises(TransferError, match=r"accepted no data for 0\.3s"):
            guarded_scp(ssh, socket_timeout=0.3).put(place / "x")


def test_a_flood_beyond_the_window(place: Path) -> None:
    """paramiko keeps all received data, here while nothing reads it."""

    async def flood(command: str, process: Any) -> None:
        process.stdout.write(YES)
        await process.stdin.readline()
        process.channel._send_window = 2**40
        process.stderr.write(b"z" * 6_000_000)
        await hostile.hang()

    (place / "x").write_bytes(b"z")
    with HostileServer(flood) as server, connect(server) as ssh:
        with pytest.raises(TransferError, match="was not sent"):
            guarded_scp(ssh).put(place / "x")


def test_a_connection_that_breaks(place: Path) -> None:
    async def cut(command: str, process: Any) -> None:
        process.stdout.write(b"C0644 50 x\nowned")
        await process.stdin.readexactly(2)
        process.channel.get_connection().abort()

    with HostileServer(cut) as server, connect(server) as ssh:
        with pytest.raises(TransferError, match=r"5 of 50 bytes.*the connection broke"):
            guarded_scp(ssh).get("x", str(place))
    assert [path.name for path in place.iterdir()] == ["x"]  # a part of it, in the target


# --- honest hosts ---


NAMES = [
    b" edges ", b"\\z", b"plain", b"with space", b"trailing ", b"'quotes\"", b"$(x) `y`",
    b"caf\xc3\xa9", b"-dash", b"*[a]?",
]  # fmt: skip


class Host:
    """A correct SSH server.

    Attributes:
        folder, far: an empty folder on this machine, and its path on the host.
        names: the names that its scp accepts. That of asyncssh refuses a backslash, drops spaces
            at the start, and treats every path as a pattern.
        several: whether its scp can send more than one path at once. That of asyncssh can't.
    """

    def __init__(
        self, ssh: paramiko.SSHClient, folder: Path, far: str, names: list[bytes], several: bool
    ) -> None:
        self.ssh = ssh
        self.folder = folder
        self.far = far
        self.names = names
        self.several = several


@pytest.fixture(params=["openssh", "simulator"])
def host(request: pytest.FixtureRequest, make_sim: MakeSim, tmp_path: Path) -> Iterator[Host]:
    if request.param == "openssh":
        sshd: Sshd = request.getfixturevalue("sshd")
        folder = tmp_path / "far"
        folder.mkdir()
        with CloreClient().connect_ssh(sshd.order(), key_path=str(sshd.key), wait=20) as ssh:
            yield Host(ssh, folder, str(folder), NAMES, True)
        return
    client = client_for(make_sim(ssh=True))
    server = client.find_servers("RTX 4090", min_reliability=96)[0]
    order = client.create_order(server["id"])
    order = client.wait_for_order(order["order_id"], timeout=20, poll_interval=0.02)
    with client.connect_ssh(order) as ssh:
        home = ssh.exec_command("mkdir far; pwd", timeout=20)[1].read().decode().strip()
        yield Host(ssh, Path(home) / "far", "far", NAMES[2:-1], False)


def fill(folder: Path, *names: bytes) -> None:
    for number, name in enumerate(names):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(name * 30_000 * number)  # the first one is empty


def contents(folder: Path) -> dict[bytes, bytes | None]:
    """Names and contents of everything in a folder."""
    found: dict[bytes, bytes | None] = {}
    root = os.fsencode(folder)
    for path, folders, files in os.walk(root):
        for name in folders:
            found[os.path.relpath(os.path.join(path, name), root)] = None
        for name in files:
            full = os.path.join(path, name)
            with open(full, "rb") as file:
                found[os.path.relpath(full, root)] = file.read()
    return found


def test_there_and_back_again(host: Host, place: Path) -> None:
    source, back = place / "source", place / "back"
    (source / "empty").mkdir(parents=True)
    (source / "sub/deeper").mkdir(parents=True)
    fill(source, *host.names, b"\xff\xfe")
    fill(source / "sub/deeper", *host.names)
    (source / "sub").chmod(0o750)
    (source / "plain").chmod(0o751)
    os.utime(source / "plain", (1000, 2000))
    os.utime(source / "sub", (3000, 4000))
    seen: list[tuple[bytes, int, int]] = []
    with guarded_scp(host.ssh, progress=lambda *call: seen.append(call)) as client:
        assert isinstance(client, plain_scp.SCPClient)
        client.put(source, host.far, recursive=True, preserve_times=True)
        assert contents(host.folder / "source") == contents(source)
        assert (host.names[0], 1, 1) in seen
        size = (source / "caf\u00e9").stat().st_size
        assert (b"caf\xc3\xa9", size, size) in seen
        client.get(host.far + "/source", str(back), recursive=True, preserve_times=True)
    assert contents(back) == contents(source)
    assert any(name.endswith(b"back/plain") for name, _, _ in seen)
    for path in (host.folder / "source", back):
        for name, mode, changed in (("plain", 0o751, 2000), ("sub", 0o750, 4000)):
            info = (path / name).stat()
            assert (stat.S_IMODE(info.st_mode), info.st_mtime) == (mode, changed), name


def test_one_file(host: Host, place: Path) -> None:
    client = guarded_scp(host.ssh)
    for name in map(os.fsdecode, host.names[::3]):
        (place / name).write_text("content of " + name)
        client.put(str(place / name), host.far)
    assert contents(host.folder) == contents(place)
    (place / "folder").mkdir()
    for name in map(os.fsdecode, host.names[::3]):
        client.get(f"{host.far}/{name}", str(place / "folder"))
    assert contents(place / "folder") == contents(host.folder)


def test_where_a_file_goes(host: Host, place: Path) -> None:
    client = guarded_scp(host.ssh)
    client.putfo(BytesIO(b"of an object"), f"{host.far}/x", mode="0600")
    (host.folder / "x").chmod(0o640)
    (place / "new").write_text("before")
    (place / "way").symlink_to("new")  # what the caller names is the caller's choice
    (place / "folder").mkdir()
    for target in ("folder", "way", "other"):
        client.get(f"{host.far}/x", str(place / target))
    for path in (place / "folder/x", place / "new", place / "other"):
        assert path.read_bytes() == b"of an object"
        # What was there keeps its permissions.
        assert stat.S_IMODE(path.stat().st_mode) == (0o644 if path.name == "new" else 0o640)
    assert (place / "way").is_symlink()


def test_several_files(host: Host, place: Path) -> None:
    fill(place, *host.names)
    paths = [place / os.fsdecode(name) for name in host.names]
    client = guarded_scp(host.ssh, max_bytes=10**8)
    client.put(paths, host.far.encode())
    assert contents(host.folder) == contents(place)
    with pytest.raises(ValueError, match="several"):
        client.get(["a", "b"], str(place / "no folder"))
    if not host.several:
        return
    back = place / "back"
    back.mkdir()
    client.get([f"{host.far}/{os.fsdecode(name)}" for name in host.names], os.fsencode(back))
    assert contents(back) == contents(host.folder)


def test_contents_without_the_folder(host: Host, place: Path) -> None:
    (place / "source/sub").mkdir(parents=True)
    fill(place / "source", b"a", b"b")
    client = guarded_scp(host.ssh)
    client.put(str(place / "source") + "/", host.far, recursive=True)
    assert contents(host.folder) == contents(place / "source")
    (place / "back").mkdir()
    client.get(host.far + "/.", str(place / "back"), recursive=True)
    assert contents(place / "back") == contents(host.folder)


def test_a_file_that_grows_while_it_is_sent(host: Host, place: Path) -> None:
    """A file grows as a log does: its first content is received."""
    path = place / "log"
    path.write_bytes(b"z" * 500_000)
    client = guarded_scp(host.ssh, progress=lambda *_: os.truncate(path, 900_000))
    client.put(path, host.far)
    assert contents(host.folder) == {b"log": b"z" * 500_000}


def test_symlinks_and_pipes_in_a_folder(host: Host, place: Path) -> None:
    source = place / "source"
    (source / "sub").mkdir(parents=True)
    (place / "beside").write_text("beside it")
    (source / "link").symlink_to("../beside")
    (source / "sub/up").symlink_to("..")
    client = guarded_scp(host.ssh)
    client.put(source, host.far, recursive=True)
    assert contents(host.folder / "source") == {b"sub": None, b"link": b"beside it"}
    (source / "sub/none").symlink_to("nothing")
    with pytest.raises(TransferError, match=r"No such file.*sub/none"):
        client.put(source, host.far, recursive=True)
    (source / "sub/none").unlink()
    os.mkfifo(source / "pipe")
    with pytest.raises(TransferError, match="pipe is not a file"):
        client.put(source, host.far, recursive=True)


def test_wildcards(sshd: Sshd, place: Path) -> None:
    (place / "source").mkdir()
    (place / "target").mkdir()
    fill(place / "source", b"a.txt", b"b.txt", b"c.bin", b".hidden.txt", b"*.txt")
    source = str(place / "source")
    with CloreClient().connect_ssh(sshd.order(), key_path=str(sshd.key), wait=20) as ssh:
        client = guarded_scp(ssh)
        client.get(source + "/*.txt", str(place / "target"))
        assert set(contents(place / "target")) == {b"*.txt"}  # quoted: one file's name
        client.sanitize = lambda path: path
        client.get(source + "/[!c*].t?t", str(place / "target"))
        assert set(contents(place / "target")) == {b"*.txt", b"a.txt", b"b.txt"}
        for path in ("{a,b}.txt", "$(ls)", "a.txt b.txt", "`x`"):
            with pytest.raises(TransferError):
                client.get(path, str(place / "target"))
        assert set(contents(place / "target")) == {b"*.txt", b"a.txt", b"b.txt"}


@pytest.mark.parametrize("name", [".bashrc", "y.bin", "../x.txt"])
def test_what_a_wildcard_does_not_mean(
    server: HostileServer, ssh: paramiko.SSHClient, place: Path, name: str
) -> None:
    server.run = scp_source(b"C0644 5 " + name.encode() + b"\n", b"owned\0")
    client = guarded_scp(ssh)
    client.sanitize = lambda path: path
    with pytest.raises(TransferError):
        client.get("*.txt" if name != ".bashrc" else "*", str(place))
    assert not list(place.iterdir())


def test_what_the_host_can_not_give_or_take(host: Host, place: Path) -> None:
    client = guarded_scp(host.ssh)
    with pytest.raises(TransferError, match=r"(?i)no such file"):
        client.get(host.far + "/nothing", str(place))
    with pytest.raises(TransferError, match="not received: the host says"):
        client.get(host.far, str(place))
    with pytest.raises(TransferError, match=r"(?i)no such file"):
        client.put(place / "nothing", host.far)
    with pytest.raises(TransferError, match="recursive=True"):
        client.put(place, host.far)
    with pytest.raises(TransferError):
        client.put(__file__, host.far + "/no/such/folder")
    for remote, mode in (("x", "9"), ("no folder/", "0644")):
        with pytest.raises(TransferError, match="the host says"):
            client.putfo(BytesIO(b"z"), f"{host.far}/{remote}", mode)
    with pytest.raises(TransferError, match="no folder here"):
        client.get(host.far, str(place / "no folder here/x"), recursive=True)
    assert contents(host.folder) == {}


def test_closing(sshd: Sshd) -> None:
    ssh = CloreClient().connect_ssh(sshd.order(), key_path=str(sshd.key), wait=20)
    with guarded_scp(ssh) as client:
        client.putfo(BytesIO(b"x"), "/dev/null")
    client.close()
    assert ssh.get_transport() is None
    with pytest.raises(Exception, match="closed"):
        guarded_scp(ssh)
    assert not [t for t in threading.enumerate() if t.name == "clore-watchdog"]


def test_bad_arguments(ssh: paramiko.SSHClient, place: Path) -> None:
    for options in ({"socket_timeout": 0}, {"max_bytes": -1}, {"max_bytes": "5"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            guarded_scp(ssh, **options)
    client = guarded_scp(ssh)
    for method, arguments in (
        (client.get, ([],)),
        (client.get, (5,)),
        (client.get, ("a\0b",)),
        (client.put, ([],)),
    ):
        with pytest.raises((ValueError, TypeError)):
            method(*arguments)


def test_the_inner_methods_of_scp() -> None:
    """The guard replaces these methods; checked with scp 0.15 and 0.16."""
    for name in ("_open", "_recv_file", "_recv_pushd", "_recv_popd", "_set_time", "_send_files",
                 "_send_file"):  # fmt: skip
        assert callable(getattr(plain_scp.SCPClient, name))


def test_without_scp() -> None:
    script = (
        "import pkgutil, sys; sys.modules['scp'] = None\n"
        f"make = pkgutil.resolve_name({inside('ssh.scp.guarded_scp')!r})\n"
        "try: make(None)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "pip install paramiko scp" in done.stdout
