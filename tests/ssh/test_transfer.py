"""Transfers are complete or fail, for all names, sizes and network faults."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, SSHError, TransferError
from clore_client.ssh.transfer import download, transfer
from tests.conftest import MakeSim, client_for, until
from tests.relay import Relay
from tests.ssh.test_connect import rent
from tests.sshd import Sshd, running_sshd

pytestmark = pytest.mark.internal  # takes long, and is the same in the one file

MB = 1024 * 1024
ODD = [
    b"plain", b"with space", b"quo'te", b'dou"ble', b"new\nline", b"-rf", b"$(touch x)", b"`x`",
    b"\xff\xfe no utf-8", "déjà €".encode(), b"back\\slash", b"%s%n\\045", b"*?[x]", b"~",
    b"a;b&c|d", b"\x1b[31mred", b"trailing ", b".hidden", b"x" * 200,
]  # fmt: skip


@pytest.fixture(scope="module")
def client() -> CloreClient:
    return CloreClient(state_dir=None)


class Far:
    """A host to copy to and from, and a folder that both sides can see."""

    def __init__(self, client: CloreClient, order: Any, folder: Path, **login: Any) -> None:
        self.client, self.order, self.folder, self.login = client, order, folder, login
        self.home = Path()
        self.root: Path | None = None  # the path of the folder on the host, if it differs

    def up(self, local: Any, remote: Any, **options: Any) -> Any:
        return self.client.upload(self.order, local, remote, **self.login, **options)

    def down(self, remote: Any, local: Any, **options: Any) -> Any:
        return self.client.download(self.order, remote, local, **self.login, **options)


@pytest.fixture
def far(client: CloreClient, sshd: Sshd, tmp_path: Path) -> Far:
    """A folder on the host of the real sshd, which is this machine."""
    folder = tmp_path / "far"
    folder.mkdir()
    return Far(client, sshd.order(), folder, key_path=sshd.key)


def inside(path: Path) -> str:
    """Return the path that means the content of a directory."""
    return f"{path}/"


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def make_tree(folder: Path) -> Path:
    (folder / "empty").mkdir(parents=True)
    (folder / "sub" / "deeper").mkdir(parents=True)
    (folder / "nothing").write_bytes(b"")
    (folder / "sub" / "script.sh").write_bytes(b"#!/bin/sh\necho hi\n")
    (folder / "sub" / "script.sh").chmod(0o755)
    (folder / "sub" / "deeper" / "large").write_bytes(content(9 * MB))
    for number, name in enumerate(ODD):
        place = os.path.join(os.fsencode(folder), b"sub", name)
        with open(place, "wb") as file:
            # Some are sent in chunks if the upload may be resumed, the others as archives.
            file.write(content(150_000 if number % 6 == 4 else number * 100, number))
    os.mkdir(os.path.join(os.fsencode(folder), b"dir \xff\n'x'"))
    return folder


def snapshot(folder: Path, times: bool = False) -> dict[bytes, Any]:
    found: dict[bytes, Any] = {}
    root = os.fsencode(folder)
    for place, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(place, name)
            status = os.lstat(path)
            entry: list[Any] = [stat.S_IFMT(status.st_mode)]
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    entry.append(file.read())
            if times:
                entry += [stat.S_IMODE(status.st_mode), int(status.st_mtime)]
            found[os.path.relpath(path, root)] = entry
    return found


# --- files ---


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 5 * MB + 3])
@pytest.mark.parametrize("options", [{}, {"verify": True}, {"resume": True}, {"streams": 3}])
def test_a_file_there_and_back(far: Far, here: Path, size: int, options: Any) -> None:
    source = here / "source"
    source.write_bytes(content(size))
    sent = far.up(source, far.folder / "copy", **options)
    assert (sent.files, sent.size, sent.skipped) == (1, size, [])
    assert sent.path == str(far.folder / "copy")
    assert (far.folder / "copy").read_bytes() == content(size)
    got = far.down(far.folder / "copy", here / "back", **options)
    assert (got.files, got.size) == (1, size)
    assert (here / "back").read_bytes() == content(size)
    assert sorted(os.listdir(far.folder)) == ["copy"]
    assert sorted(os.listdir(here)) == ["back", "source"]


def test_odd_names_of_files(far: Far, here: Path) -> None:
    for number, name in enumerate(ODD[::3]):
        local = os.path.join(os.fsencode(here), name)
        with open(local, "wb") as file:
            file.write(content(100, number))
        remote = os.path.join(os.fsencode(far.folder), name)
        far.up(local, remote)
        with open(remote, "rb") as file:
            assert file.read() == content(100, number)
        os.remove(local)
        far.down(remote, here)
        with open(local, "rb") as file:
            assert file.read() == content(100, number)


def test_into_a_directory_and_over_a_file(far: Far, here: Path) -> None:
    (here / "a").write_bytes(b"new")
    (far.folder / "a").write_bytes(b"old")
    assert far.up(here / "a", far.folder).path == str(far.folder / "a")
    assert (far.folder / "a").read_bytes() == b"new"
    far.up(here / "a", f"{far.folder}/")
    (here / "a").write_bytes(b"old here")
    assert far.down(far.folder / "a", here).path == str(here / "a")
    assert (here / "a").read_bytes() == b"new"


@pytest.mark.parametrize("remote", ["~/clore-test-{0}", "clore-test-{0}", "./clore-test-{0}"])
def test_paths_from_the_home_directory(far: Far, here: Path, remote: str) -> None:
    name = remote.format(os.urandom(4).hex())
    (here / "a").write_bytes(b"at home")
    try:
        far.up(here / "a", name)
        assert far.down(name, here / "back").files == 1
        assert (here / "back").read_bytes() == b"at home"
    finally:
        far.client.run(far.order, ["rm", "-f", name.removeprefix("~/")], **far.login)


def test_progress_tells_of_every_byte(far: Far, here: Path) -> None:
    (here / "a").write_bytes(content(9 * MB))
    told: list[tuple[str, int, int]] = []
    thread = threading.get_ident()

    def progress(name: str, done: int, total: int) -> None:
        assert threading.get_ident() == thread
        told.append((name, done, total))

    moves: list[Callable[[], Any]] = [
        lambda: far.up(here / "a", far.folder, progress=progress),
        lambda: far.down(far.folder / "a", here / "b", progress=progress),
        lambda: far.down(far.folder / "a", here / "c", progress=progress, resume=True),
    ]
    for move in moves:
        move()
        assert told[-1][1:] == (9 * MB, 9 * MB)
        assert all(total == 9 * MB for _, _, total in told)
        assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
        told.clear()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_events_count_the_bytes_of_all_files(far: Far, here: Path, direction: str) -> None:
    total = 0
    folder = here if direction == "up" else far.folder
    for name, size in (("a", 5 * MB), ("b", 100), ("c", 0), ("d", 4 * MB)):
        (folder / "tree").mkdir(exist_ok=True)
        (folder / "tree" / name).write_bytes(content(size))
        total += size
    events: list[Any] = []
    if direction == "up":
        far.up(here / "tree", far.folder / "copy", on_progress=events.append)
    else:
        far.down(far.folder / "tree", here / "copy", on_progress=events.append)
    assert {event.name for event in events} == {"upload" if direction == "up" else "download"}
    assert {event.total for event in events} == {total}
    numbers = [event.number for event in events]
    assert numbers == sorted(numbers)
    assert numbers[-1] == total
    assert events[-1].text.endswith("9.4 MB of 9.4 MB")
    assert " left" in events[0].text
    move = far.up if direction == "up" else far.down
    with pytest.raises(ValueError, match="mine"):
        move(*(folder / "tree", far.folder / "x" if direction == "up" else here / "x"),
             on_progress=lambda event: int("mine"))  # fmt: skip


def test_a_refused_target_names_the_size_of_the_source(far: Far, here: Path) -> None:
    (far.folder / "one").write_bytes(b"x" * 5)
    (here / "link").symlink_to("nowhere")
    with pytest.raises(TransferError, match="after 0 of 5 bytes: local is a symlink") as caught:
        far.down(far.folder / "one", here / "link")
    assert caught.value.total == 5


def test_a_transfer_error_of_the_callback_comes_through(far: Far, here: Path) -> None:
    (here / "one").write_bytes(b"x")
    own = TransferError("of another transfer", name="other", done=0, total=1)

    def fail(*_: object) -> None:
        raise own

    with pytest.raises(TransferError) as caught:
        far.up(here / "one", far.folder / "one", progress=fail)
    assert caught.value is own


def test_an_error_of_the_callback_comes_through(far: Far, here: Path) -> None:
    (here / "a").write_bytes(content(9 * MB))
    (far.folder / "far").write_bytes(content(9 * MB))

    def progress(*_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        far.up(here / "a", far.folder / "b", progress=progress)
    with pytest.raises(KeyError, match="mine"):
        far.down(far.folder / "far", here / "b", progress=progress)
    assert os.listdir(far.folder) == ["far"]
    assert os.listdir(here) == ["a"]


# --- directories ---


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"resume": True}, {"streams": 2}])
def test_a_directory_there_and_back(far: Far, here: Path, options: Any) -> None:
    source = make_tree(here / "source")
    sent = far.up(inside(source), far.folder / "copy", **options)
    assert sent.files == len(ODD) + 3
    assert snapshot(far.folder / "copy") == snapshot(source)
    assert os.access(far.folder / "copy" / "sub" / "script.sh", os.X_OK)
    got = far.down(inside(far.folder / "copy"), here / "back", **options)
    assert (got.files, got.size) == (sent.files, sent.size)
    assert snapshot(here / "back") == snapshot(source)
    assert os.access(here / "back" / "sub" / "script.sh", os.X_OK)
    assert sorted(os.listdir(far.folder)) == ["copy"]
    assert sorted(os.listdir(here)) == ["back", "source"]


def test_permissions_and_times_on_request(far: Far, here: Path) -> None:
    source = make_tree(here / "source")
    for number, (place, folders, files) in enumerate(os.walk(source, topdown=False)):
        for name in folders + files:
            path = os.path.join(place, name)
            os.chmod(path, 0o750 if os.path.isdir(path) else (0o640, 0o755, 0o400)[number % 3])
            os.utime(path, (1_500_000_000 + number, 1_500_000_000 + number))
    far.up(inside(source), far.folder / "copy", preserve=True)
    assert snapshot(far.folder / "copy", times=True) == snapshot(source, times=True)
    far.down(inside(far.folder / "copy"), here / "back", preserve=True)
    assert snapshot(here / "back", times=True) == snapshot(source, times=True)
    (here / "one").write_bytes(b"1")
    (here / "one").chmod(0o600)
    os.utime(here / "one", (1_400_000_000, 1_400_000_000))
    far.up(here / "one", far.folder / "one", preserve=True)
    far.down(far.folder / "one", here / "two", preserve=True)
    for copy in (far.folder / "one", here / "two"):
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert copy.stat().st_mtime == 1_400_000_000
    far.down(far.folder / "one", here / "three")
    assert (here / "three").stat().st_mtime > 1_600_000_000


@pytest.mark.parametrize("preserve", [False, True])
def test_permissions_in_a_directory_that_exists(far: Far, here: Path, preserve: bool) -> None:
    """A replaced file keeps its permissions, unless those of the source are to be preserved."""
    for folder, bits in ((here / "data", 0o640), (far.folder / "data", 0o600)):
        folder.mkdir()
        for name in ("1", "a b", "c"):
            (folder / name).write_text(folder.name)
            (folder / name).chmod(bits)
    (here / "data" / "new").write_text("new")
    (here / "data" / "new").chmod(0o640)
    far.up(here / "data", far.folder, preserve=preserve)
    far.down(inside(far.folder / "data"), here / "back", preserve=preserve)
    for folder in (far.folder / "data", here / "back"):
        modes = [stat.S_IMODE((folder / name).stat().st_mode) for name in ("1", "a b", "c", "new")]
        replaced = 0o640 if preserve else 0o600
        assert modes == [replaced, replaced, replaced, 0o640]


def test_into_a_directory_that_exists(far: Far, here: Path) -> None:
    """As with cp -r, the directory is put into the target; other entries stay."""
    make_tree(here / "data")
    (far.folder / "data" / "sub").mkdir(parents=True)
    (far.folder / "data" / "sub" / "plain").write_bytes(b"old")
    (far.folder / "data" / "other").write_bytes(b"stays")
    assert far.up(here / "data", far.folder).path == str(far.folder / "data")
    assert (far.folder / "data" / "other").read_bytes() == b"stays"
    (far.folder / "data" / "other").unlink()
    assert snapshot(far.folder / "data") == snapshot(here / "data")
    (here / "data" / "mine").write_bytes(b"mine")
    (here / "data" / "sub" / "plain").write_bytes(b"changed")
    far.down(far.folder / "data", here)
    assert (here / "data" / "mine").read_bytes() == b"mine"
    (here / "data" / "mine").unlink()
    assert snapshot(far.folder / "data") == snapshot(here / "data")
    assert os.listdir(here) == ["data"]


def test_empty_directories(far: Far, here: Path) -> None:
    (here / "empty").mkdir()
    far.up(inside(here / "empty"), far.folder / "copy")
    assert os.listdir(far.folder / "copy") == []
    far.down(inside(far.folder / "copy"), here / "back")
    assert os.listdir(here / "back") == []


def test_symlinks_are_told_of(far: Far, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "secret").write_bytes(b"outside")
    source = here / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    (source / "out").symlink_to(here / "secret")
    (source / "folder").symlink_to(here)
    os.mkfifo(source / "pipe")
    sent = far.up(inside(source), far.folder / "copy")
    assert sorted(name for name, _ in sent.skipped) == ["folder", "out", "pipe"]
    assert "left out: out, a symlink to" in caplog.text
    assert os.listdir(far.folder / "copy") == ["file"]
    (far.folder / "copy" / "link").symlink_to("file")
    got = far.down(inside(far.folder / "copy"), here / "back")
    assert [name for name, _ in got.skipped] == ["link"]
    assert caplog.text.count("left out: link") == 1
    assert os.listdir(here / "back") == ["file"]
    (here / "named").symlink_to(source)  # the one that is named is followed
    assert far.up(here / "named", far.folder / "again").files == 1


# --- what can't be ---


def test_what_is_not_there(far: Far, here: Path) -> None:
    (here / "file").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"local: there is nothing at '.*missing'"):
        far.up(here / "missing", far.folder)
    with pytest.raises(TransferError, match="no such file"):
        far.down(far.folder / "missing", here / "x")
    with pytest.raises(NotADirectoryError):
        far.up(f"{here}/file/", far.folder)
    (far.folder / "single").write_bytes(b"x")
    with pytest.raises(TransferError, match="no such file"):
        far.down(f"{far.folder}/single/", here)
    (far.folder / "file").mkdir()
    with pytest.raises(TransferError, match="is a directory"):
        far.up(here / "file", far.folder)
    (far.folder / "plain").write_bytes(b"stays")
    with pytest.raises(TransferError, match="no directory"):
        far.up(here, far.folder / "plain")
    (here / "plain").mkdir()
    with pytest.raises(TransferError, match="is a directory"):
        far.down(far.folder / "plain", here)
    (here / "file").write_bytes(b"stays")
    with pytest.raises(TransferError, match="not a directory"):
        far.down(far.folder / "file", here)
    assert (here / "file").read_bytes() == b"stays"
    assert (far.folder / "plain").read_bytes() == b"stays"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"streams": 0}, ValueError),
        ({"streams": True}, TypeError),
        ({"verify": "yes"}, TypeError),
        ({"resume": 1}, TypeError),
        ({"preserve": None}, TypeError),
        ({"progress": 5}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"host_key": "x"}, ValueError),
        ({"passwort": "x"}, TypeError),
        ({"local": ""}, ValueError),
        ({"local": 5}, TypeError),
        ({"remote": "a\0b"}, ValueError),
        ({"remote": "~root/x"}, ValueError),
        ({"remote": None}, TypeError),
        ({"local": "x" * 5000}, ValueError),
        ({"local": "y" * 300}, ValueError),
        ({"symlinks": "all"}, ValueError),
        ({"deadline": 0}, ValueError),
        ({"ssh": "no connection"}, TypeError),
        ({"use_ssh_config": 1}, TypeError),
    ],
)
def test_arguments_that_cannot_be_right(
    client: CloreClient, here: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    """Refused before any connection: port 1 refuses."""
    order = {"connection": {"ssh": "ssh root@127.0.0.1 -p 1"}}
    (here / "f").write_bytes(b"")
    given = {"local": here / "f", "remote": "x", **options}
    with pytest.raises(error, match=next(iter(options))):
        client.upload(order, **{"wait": 0, **given})
    given = {"local": here / "g", "remote": "x", **options}
    with pytest.raises(error, match=next(iter(options))):
        client.download(order, **{"wait": 0, **given})


@pytest.mark.parametrize("value", [-1, True, 1.5])
def test_max_bytes_that_cannot_be_right(client: CloreClient, here: Path, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        client.download(Sshd(here, 1, "").order(), "x", here / "x", max_bytes=value, wait=0)


def test_max_bytes(far: Far, here: Path) -> None:
    (far.folder / "file").write_bytes(b"12345")
    (far.folder / "tree").mkdir()
    (far.folder / "tree" / "a").write_bytes(b"12345")
    (far.folder / "tree" / "b").write_bytes(b"12345")
    far.down(far.folder / "file", here / "file", max_bytes=5)
    for name, most in (("file", 4), ("tree", 9)):
        with pytest.raises(TransferError, match=f"max_bytes is {most}") as caught:
            far.down(far.folder / name, here / "x", max_bytes=most)
        assert caught.value.total == most + 1
    assert os.listdir(here) == ["file"]


def test_zeros_that_several_channels_write(client: CloreClient, sshd: Sshd, tmp_path: Path) -> None:
    """A dd that leaves a hole sets the size of the file, which others write at the same time."""
    (tmp_path / "zeros").write_bytes(bytes(8 * MB))
    with Relay(sshd.port, 0.011) as relay:
        slow = through(relay, Far(client, sshd.order(), tmp_path, key_path=sshd.key))
        for number in range(6):
            target = tmp_path / f"copy{number}"
            slow.up(tmp_path / "zeros", target, resume=True)
            assert target.stat().st_size == 8 * MB


def test_a_full_disk(far: Far, here: Path) -> None:
    """A limit on the file size simulates it, on this machine and for the host's shell."""
    (here / "a").write_bytes(content(3 * MB))
    (far.folder / "far").write_bytes(content(3 * MB))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB, limits[1]))
    try:
        with pytest.raises(TransferError, match=r"after [0-9]+ of 3145728 bytes") as caught:
            far.down(far.folder / "far", here / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert 0 < caught.value.done <= MB
    assert caught.value.total == 3 * MB
    assert os.listdir(here) == ["a"]


def test_a_source_that_changes_meanwhile(far: Far, here: Path) -> None:
    source = here / "a"
    source.write_bytes(content(9 * MB))

    def shrink(*_: Any) -> None:
        os.truncate(source, 100)

    with pytest.raises(TransferError, match="changed during the transfer"):
        far.up(source, far.folder / "b", progress=shrink)
    until(lambda: os.listdir(far.folder) == [])


# --- connections that break ---


@pytest.fixture
def relay(sshd: Sshd) -> Iterator[Relay]:
    with Relay(sshd.port) as between:
        yield between


def through(relay: Relay, far: Far) -> Far:
    line = far.order["connection"]["ssh"].rsplit(" ", 1)[0]
    order = {**far.order, "connection": {"ssh": f"{line} {relay.port}"}}
    return Far(far.client, order, far.folder, **far.login)


def cut_after(relay: Relay, size: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if done >= size:
            relay.cut()

    return progress


def test_a_lost_connection_leaves_nothing(far: Far, here: Path, relay: Relay) -> None:
    (here / "a").write_bytes(content(12 * MB))
    (far.folder / "far").write_bytes(content(40 * MB))  # more than can be on its way
    slow = through(relay, far)
    with pytest.raises(TransferError, match="a was not transferred") as caught:
        slow.up(here / "a", far.folder / "b", progress=cut_after(relay, 5 * MB))
    assert caught.value.name == "a"
    assert 5 * MB <= caught.value.done <= 12 * MB
    relay.mend()
    with pytest.raises(TransferError, match="was not transferred"):
        slow.down(far.folder / "far", here / "b", progress=cut_after(relay, 5 * MB))
    assert os.listdir(here) == ["a"]
    assert "b" not in os.listdir(far.folder)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little data is in flight: the counted bytes have nearly all arrived."""
    monkeypatch.setattr(download, "DATA_WINDOW", 2**18)


LOGIN_AND_SCRIPTS = 150_000  # bytes of two calls, besides the data


def growing_tree(folder: Path, size: int) -> Path:
    """Make files of a few bytes to a few megabytes."""
    folder.mkdir()
    number, left = 0, size
    while left > 0:
        part = min(left, (100, 5000, 60_000, 700_000, 3_000_000)[number % 5])
        (folder / f"{number}").write_bytes(content(part, number))
        number, left = number + 1, left - part
    return folder


@pytest.mark.parametrize("protocol", ["shell", "sftp"])
@pytest.mark.parametrize("what", ["file", "tree"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_little_is_sent_again(
    client: CloreClient, sshd: Sshd, tmp_path: Path, here: Path, direction: str, what: str,
    protocol: str,
) -> None:  # fmt: skip
    """At most 5 % of the received data is sent again, or the data sent ahead; at random points."""
    size = 24 * MB
    (tmp_path / "far").mkdir()
    with contextlib.ExitStack() as stack:
        server = sshd
        if protocol == "sftp":
            options = "PasswordAuthentication no\nForceCommand internal-sftp"
            server = stack.enter_context(running_sshd(tmp_path / "sftp", options))
        relay = stack.enter_context(Relay(server.port))
        order = server.order(secrets.randbelow(10**6) + 1000)
        far = Far(client, order, tmp_path / "far", key_path=server.key)
        slow = through(relay, far)
        source, target = here / "a", far.folder / "b"
        if direction == "down":
            source, target = far.folder / "a", here / "b"
        if what == "tree":
            growing_tree(source, size)
        else:
            source.write_bytes(content(size))
        move = slow.up if direction == "up" else slow.down
        name = inside(source) if what == "tree" else str(source)
        move(name, target, resume=True)
        whole = relay.carried
        points = random.Random(f"{direction} {what} {protocol}")
        for _ in range(6):
            shutil.rmtree(target) if what == "tree" else target.unlink()
            relay.carried, relay.cut_at = 0, points.randrange(MB, whole)
            with pytest.raises(TransferError):
                move(name, target, resume=True)
            assert not target.exists()
            arrived, relay.cut_at = relay.carried, 2**62
            relay.mend()
            move(name, target, resume=True)
            again = relay.carried - whole
            assert again <= max(0.05 * arrived, transfer.LEAST_AHEAD) + LOGIN_AND_SCRIPTS, arrived
            if what == "tree":
                assert snapshot(target) == snapshot(source)
            else:
                assert target.read_bytes() == source.read_bytes()
            assert os.listdir(target.parent) == [target.name]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_changed_source_starts_over(far: Far, here: Path, relay: Relay, direction: str) -> None:
    source, target = here / "a", far.folder / "b"
    if direction == "down":
        source, target = far.folder / "a", here / "b"
    source.write_bytes(content(24 * MB))
    slow = through(relay, far)
    move = slow.up if direction == "up" else slow.down
    with pytest.raises(TransferError):
        move(source, target, resume=True, progress=cut_after(relay, 18 * MB))
    relay.mend()
    source.write_bytes(content(20 * MB, seed=1))
    os.utime(source, (1_700_000_000, 1_700_000_000))
    move(source, target, resume=True)
    assert target.read_bytes() == content(20 * MB, seed=1)
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_resumed_directory(far: Far, here: Path, relay: Relay, direction: str) -> None:
    source, target = here / "a", far.folder / "b"
    if direction == "down":
        source, target = far.folder / "a", here / "b"
    make_tree(source)
    for number in range(3):
        (source / f"big{number}").write_bytes(content(9 * MB, number))
    slow = through(relay, far)
    move = slow.up if direction == "up" else slow.down
    with pytest.raises(TransferError):
        move(inside(source), target, resume=True, progress=cut_after(relay, 7 * MB))
    relay.mend()
    move(inside(source), target, resume=True)
    assert snapshot(target) == snapshot(source)
    assert os.listdir(target.parent) == [target.name]


def test_what_was_tampered_with_is_noticed(far: Far, here: Path, relay: Relay) -> None:
    (here / "a").write_bytes(content(24 * MB))
    slow = through(relay, far)
    with pytest.raises(TransferError):
        slow.up(here / "a", far.folder / "b", resume=True, progress=cut_after(relay, 20 * MB))
    relay.mend()
    deadline = time.monotonic() + 10
    while not (records := list(far.folder.glob("*.done"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    (part,) = (path for path in far.folder.glob(".clore-part-*") if not path.suffix)
    assert records
    with open(part, "r+b") as file:
        for place in range(0, 24 * MB, 65536):
            file.seek(place)
            file.write(b"tampered")
    with pytest.raises(TransferError, match="SHA-256 differs"):
        slow.up(here / "a", far.folder / "b", resume=True)
    assert os.listdir(far.folder) == []
    slow.up(here / "a", far.folder / "b", resume=True)
    assert (far.folder / "b").read_bytes() == content(24 * MB)


def test_two_processes_do_not_resume_the_same(far: Far, here: Path) -> None:
    (far.folder / "a").write_bytes(content(9 * MB))
    errors: list[BaseException] = []

    def again(*_: Any) -> None:
        if not errors:
            try:
                far.down(far.folder / "a", here / "b", resume=True)
            except BaseException as error:
                errors.append(error)

    far.down(far.folder / "a", here / "b", resume=True, progress=again)
    assert "another process" in str(errors[0])
    assert (here / "b").read_bytes() == content(9 * MB)


def test_a_machine_that_takes_few_connections(far: Far, here: Path, relay: Relay) -> None:
    """Further channels are refused: it continues with the first."""
    relay.most = 1
    (here / "a").write_bytes(content(20 * MB))
    through(relay, far).up(here / "a", far.folder / "b", streams=4)
    assert (far.folder / "b").read_bytes() == content(20 * MB)


@pytest.mark.parametrize("most", [1, 2, 10])
def test_a_machine_that_takes_few_channels(
    client: CloreClient, tmp_path: Path, here: Path, most: int
) -> None:
    (here / "a").write_bytes(content(20 * MB))
    make_tree(here / "tree")
    (tmp_path / "far").mkdir()
    with running_sshd(tmp_path / "few", f"MaxSessions {most}") as few:
        far = Far(client, few.order(most + 100), tmp_path / "far", key_path=few.key)
        for resume in (False, True):
            far.up(here / "a", far.folder, resume=resume)
            far.up(inside(here / "tree"), far.folder / "tree", resume=resume)
            far.down(far.folder / "a", here / "b", resume=resume)
            far.down(inside(far.folder / "tree"), here / "back", resume=resume)
            assert (here / "b").read_bytes() == content(20 * MB)
            assert snapshot(here / "back") == snapshot(here / "tree")
            for folder in (far.folder / "tree", here / "back"):
                shutil.rmtree(folder)


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_ctrl_c_leaves_nothing(far: Far, here: Path, sshd: Sshd, direction: str) -> None:
    (here / "a").write_bytes(content(20 * MB))
    (far.folder / "a").write_bytes(content(20 * MB))
    script = f"""
import sys, threading, time
from clore_client import CloreClient
order = {far.order!r}

def progress(*_):
    print("moving", flush=True)
    time.sleep(0.2)

paths = ({str(here / "a")!r}, {str(far.folder / "b")!r})
if {direction!r} == "download":
    paths = ({str(far.folder / "a")!r}, {str(here / "b")!r})
try:
    CloreClient(state_dir=None).{direction}(
        order, *paths, key_path={str(sshd.key)!r}, progress=progress, streams=2
    )
except KeyboardInterrupt:
    print([t.name for t in threading.enumerate() if t.name.startswith("clore-")])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "moving\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0].splitlines()[-1] == "[]"
    assert os.listdir(here) == os.listdir(far.folder) == ["a"]


# --- the whole way, and over a connection of the caller's ---


def test_from_the_order_to_the_file(make_sim: MakeSim, here: Path) -> None:
    sim = make_sim(ssh=True)
    client = client_for(sim)
    order = rent(client)
    make_tree(here / "data")
    client.upload(order, inside(here / "data"), "work")
    assert client.run(order, ["ls", "work/sub"]).stdout.count("\n") >= len(ODD) - 1
    client.run(order, "cp -r work results && echo done > results/log")
    client.download(order, "~/results/", here / "results", verify=True)
    (here / "data" / "log").write_bytes(b"done\n")
    assert snapshot(here / "results") == snapshot(here / "data")


def test_over_one_connection_of_the_callers(far: Far, here: Path, sshd: Sshd) -> None:
    (here / "a").write_bytes(content(9 * MB))
    with far.client.connect_ssh(far.order, key_path=sshd.key) as ssh:
        for _ in range(2):
            far.client.upload(far.order, here / "a", far.folder / "b", ssh=ssh, streams=4)
            far.client.download(far.order, far.folder / "b", here / "c", ssh=ssh)
        assert far.client.run(far.order, "echo open", ssh=ssh).stdout == "open\n"
    assert (here / "c").read_bytes() == content(9 * MB)
    with pytest.raises(SSHError):
        far.client.upload(far.order, here / "a", far.folder / "b", ssh=ssh)


def test_rentals_move_data_too(make_sim: MakeSim, here: Path) -> None:
    sim = make_sim(ssh=True)
    (here / "a").write_bytes(b"mine")
    with client_for(sim).rent(poll_interval=0.02, find_timeout=5) as rental:
        rental.upload(here / "a", "b")
        assert rental.run("cat b").stdout == "mine"
        rental.download("b", here / "c")
    assert (here / "c").read_bytes() == b"mine"
