"""Real kinds of hosts: each login shell, busybox, dropbear, SFTP only."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, CommandTimeoutError, JobError, TransferError
from clore_client.ssh.transfer.remote_script import BOOTSTRAP, INLINE, inlined
from tests.conftest import until
from tests.relay import Relay
from tests.ssh.test_command import sleeping, unique
from tests.ssh.test_transfer import ODD, Far, content, inside, make_tree, snapshot, through
from tests.sshd import Dropbear, running_sshd

pytestmark = pytest.mark.internal

MB = 1024 * 1024
KEYS_ONLY = "PasswordAuthentication no"
SHELLS = ("bash", "dash", "zsh", "fish", "tcsh")
START_UP = {"bash": ".bashrc", "zsh": ".zshenv", "fish": ".config/fish/config.fish",
            "tcsh": ".tcshrc"}  # fmt: skip
# It prints, changes the directory, reads, waits, and sets aliases for the tools of the scripts.
TROUBLE = {
    "tcsh": 'echo hi\ncd /\nset x = "$<"\nsleep 0.2\nalias tar false\nalias sh false\n',
    "fish": "echo hi\necho more >&2\ncd /\nread x\nsleep 0.2\nalias tar false\nalias sh false\n",
}
POSIX_TROUBLE = "echo hi\necho more >&2\ncd /\nread x\nsleep 0.2\nalias tar=false sh=false\n"


def forced(command: str) -> str:
    return f'{KEYS_ONLY}\nForceCommand {command} -c "$SSH_ORIGINAL_COMMAND"'


@pytest.fixture
def client() -> CloreClient:
    return CloreClient(state_dir=None)


@contextlib.contextmanager
def host(client: CloreClient, folder: Path, kind: str) -> Iterator[Far]:
    """A host of a kind, and a folder that both sides can see; ``root`` is its path on the host."""
    folder.mkdir(exist_ok=True)
    place = folder / "far"
    place.mkdir()
    more = ""
    if kind in SHELLS:
        options = forced(shutil.which(kind) or kind)
        if kind == "tcsh":  # which takes the rest for arguments
            options = f'{KEYS_ONLY}\nForceCommand {shutil.which(kind)} -c "$SSH_ORIGINAL_COMMAND"'
    elif kind == "sftp":
        options = f"{KEYS_ONLY}\nForceCommand internal-sftp"
    elif kind == "no tar":
        tools = folder / "tools"
        tools.mkdir()
        for tool in ("dd", "stat", "find", "head", "chmod", "mv", "rm", "mkdir", "touch", "xargs"):
            (tools / tool).symlink_to(shutil.which(tool) or "")
        options, more = KEYS_ONLY, f" PATH={tools}"
    elif kind == "dropbear":
        with Dropbear(folder / "dropbear") as dropbear:
            yield Far(client, dropbear.order(), place, key_path=dropbear.key)
        return
    else:
        raise AssertionError(kind)
    home = f"{folder}/sshd/home"
    with running_sshd(folder / "sshd", options, home + more) as server:
        far = Far(client, server.order(), place, key_path=server.key)
        far.home = server.folder / "home"
        yield far


@contextlib.contextmanager
def busybox(client: CloreClient) -> Iterator[Far]:
    """All tools of busybox, as in an Alpine image."""
    root = Path(f"/run/clore-busybox-{secrets.token_hex(4)}")  # a chroot is not below /tmp
    for name in ("bin", "dev", "home", "far", "tmp"):
        (root / name).mkdir(parents=True)
    program = root / "bin" / "busybox"
    shutil.copy(shutil.which("busybox") or "", program)
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
    for name in {*listed.stdout.split()} - {"busybox"}:
        (root / "bin" / name).symlink_to("busybox")
    (root / "bin" / "bash").write_text('#!/bin/sh\nexec /bin/sh "$@"\n')  # the login shell
    (root / "bin" / "bash").chmod(0o755)
    os.mknod(root / "dev" / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (root / "dev" / "null").chmod(0o666)
    keys = Path(f"{root}-sshd")
    try:
        with running_sshd(keys, f"{KEYS_ONLY}\nChrootDirectory {root}", home="/home") as server:
            far = Far(client, server.order(), root / "far", key_path=server.key)
            far.root = Path("/far")
            yield far
    finally:
        shutil.rmtree(root)
        shutil.rmtree(keys)


def check_all(far: Far, here: Path, slow: bool = False) -> None:
    """Files and trees, both ways: places, names, permissions, times, resume."""
    there = far.root or far.folder
    (here / "one").write_bytes(content(9 * MB + 5))
    (here / "one").chmod(0o600)
    for options in ({}, {"verify": True}, {"resume": True}):
        sent = far.up(here / "one", there / "copy", **options)
        assert (sent.files, sent.path) == (1, f"{there}/copy")
        assert (far.folder / "copy").read_bytes() == (here / "one").read_bytes()
        assert stat.S_IMODE((far.folder / "copy").stat().st_mode) == 0o600
        far.down(there / "copy", here / "back", **options)
        assert (here / "back").read_bytes() == (here / "one").read_bytes()
        assert stat.S_IMODE((here / "back").stat().st_mode) == 0o600
    odd = "my model.bin"
    (here / odd).write_bytes(b"x")
    far.up(here / odd, there)
    assert (far.folder / odd).read_bytes() == b"x"
    source = make_tree(here / "source")
    if slow:  # paramiko's SFTP can't list names that are not UTF-8
        bad = [os.path.join(os.fsencode(source), b"sub", n) for n in ODD if b"\xff" in n]
        for path in bad:
            os.remove(path)
        os.rmdir(os.path.join(os.fsencode(source), b"dir \xff\n'x'"))
    for place, bits in ((source / "empty", 0o700), (source / "sub" / "plain", 0o600)):
        place.chmod(bits)
        os.utime(place, (1_500_000_000, 1_500_000_000))
    for options in ({}, {"verify": True, "preserve": True}, {"resume": True}):
        far.up(inside(source), there / "tree", **options)
        assert snapshot(far.folder / "tree") == snapshot(source)
        far.down(inside(there / "tree"), here / "tree", **options)
        assert snapshot(here / "tree") == snapshot(source)
        for copy in (far.folder / "tree", here / "tree"):
            assert stat.S_IMODE((copy / "empty").stat().st_mode) == 0o700
            assert stat.S_IMODE((copy / "sub" / "plain").stat().st_mode) == 0o600
            if "preserve" in options:
                assert (copy / "sub" / "plain").stat().st_mtime == 1_500_000_000
                assert (copy / "empty").stat().st_mtime == 1_500_000_000
            shutil.rmtree(copy)
    assert sorted(os.listdir(far.folder)) == ["copy", odd]


@pytest.mark.parametrize("kind", [*SHELLS, "dropbear"])
def test_hosts_with_a_shell(
    client: CloreClient, tmp_path: Path, here: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with host(client, tmp_path / "host", kind) as far:
        check_all(far, here)
    assert "SFTP" not in caplog.text


def test_a_command_that_ends_while_another_one_starts(
    client: CloreClient, tmp_path: Path, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """dropbear then closes all channels whose command has not started yet."""
    # Each shell ends in the middle of the time that it takes to start the next.
    slow_end = 'sh -c "$SSH_ORIGINAL_COMMAND"; code=$?; sleep 0.09; exit $code'
    tree = make_tree(here / "tree")
    os.truncate(tree / "sub" / "deeper" / "large", 4 * MB + 1)
    (tmp_path / "far").mkdir()
    with Dropbear(tmp_path / "dropbear", slow_end) as dropbear:
        with Relay(dropbear.port, delay=0.03) as relay:
            far = Far(client, dropbear.order(), tmp_path / "far", key_path=dropbear.key)
            far = through(relay, far)
            far.up(inside(tree), far.folder / "tree", verify=True)
            far.down(inside(far.folder / "tree"), here / "back", verify=True)
    assert snapshot(here / "back") == snapshot(far.folder / "tree") == snapshot(tree)
    assert "SFTP" not in caplog.text


def test_a_range_that_ends_while_the_small_files_start(
    client: CloreClient, tmp_path: Path, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The script of a range ends by itself, so dropbear must not get another one meanwhile."""
    tree, place = here / "tree", tmp_path / "far"
    tree.mkdir()
    place.mkdir()
    for name in ("a\\b", "small"):  # a name with a backslash is not received with the small files
        (tree / name).write_bytes(b"x")
    slow_end = 'sh -c "$SSH_ORIGINAL_COMMAND"; code=$?; sleep 0.03; exit $code'
    with Dropbear(tmp_path / "dropbear", slow_end) as dropbear:
        with Relay(dropbear.port, delay=0.1) as relay:
            far = through(relay, Far(client, dropbear.order(), place, key_path=dropbear.key))
            shutil.copytree(tree, place / "tree")
            far.down(inside(place / "tree"), here / "back")
    assert snapshot(here / "back") == snapshot(tree)
    assert "SFTP" not in caplog.text


def test_a_userland_of_busybox(
    client: CloreClient, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with busybox(client) as far:
        check_all(far, here)
        assert far.client.run(far.order, "echo in", **far.login).stdout == "in\n"
        number = unique()
        with pytest.raises(CommandTimeoutError):
            far.client.run(far.order, f"sleep {number} & sleep {number}", timeout=1, **far.login)
        until(lambda: not sleeping(number))
    assert "SFTP" not in caplog.text


@pytest.mark.parametrize("kind", ["sftp", "no tar"])
def test_hosts_without_one(
    client: CloreClient, tmp_path: Path, here: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with host(client, tmp_path / "host", kind) as far:
        check_all(far, here, slow=True)
        caplog.clear()
        (here / "x").write_bytes(b"x")
        far.up(here / "x", far.folder / "x")
        assert caplog.text.count("uses SFTP, which is slower") == 1


@pytest.mark.parametrize("kind", sorted(START_UP))
def test_start_up_files_make_no_difference(
    client: CloreClient, tmp_path: Path, here: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with host(client, tmp_path / "host", kind) as far:
        place = far.home / START_UP[kind]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(TROUBLE.get(kind, POSIX_TROUBLE))
        (here / "one").write_bytes(content(5 * MB))
        make_tree(here / "source")
        for remote in ("~/sub/one", "sub/one"):  # below the home, wherever that file goes
            (far.home / "sub").mkdir(exist_ok=True)
            assert far.up(here / "one", remote).path == f"{far.home}/sub/one"
            assert (far.home / "sub" / "one").read_bytes() == content(5 * MB)
            far.down(remote, here / "back")
            assert (here / "back").read_bytes() == content(5 * MB)
            shutil.rmtree(far.home / "sub")
        far.up(inside(here / "source"), far.folder / "tree")
        assert snapshot(far.folder / "tree") == snapshot(here / "source")
        far.down(inside(far.folder / "tree"), here / "tree")
        assert snapshot(here / "tree") == snapshot(here / "source")
    assert "SFTP" not in caplog.text


@pytest.mark.parametrize("reads", ["cat >/dev/null", "head -c 200 >/dev/null"])
def test_a_start_up_file_that_reads_everything(
    client: CloreClient, tmp_path: Path, here: Path, reads: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The shell reads no input then: the client detects that, and uses SFTP."""
    (here / "one").write_bytes(content(5 * MB))
    make_tree(here / "tree")
    for path in [*(here / "tree" / "sub").iterdir()]:  # what SFTP can't list, and what takes long
        path.unlink() if path.is_file() and not path.name.isalnum() else None
    shutil.rmtree(os.fsencode(here / "tree") + b"/dir \xff\n'x'")
    place = tmp_path / "far"
    place.mkdir()
    with running_sshd(tmp_path / "sshd") as server:
        (server.folder / "home" / ".bashrc").write_text(f"echo hi\n{reads}\n")
        far = Far(client, server.order(), place, key_path=server.key)
        # The client need not send anything to receive a file.
        (place / "two").write_bytes(content(3 * MB))
        far.down(place / "two", here / "two")
        assert (here / "two").read_bytes() == content(3 * MB)
        assert "SFTP" not in caplog.text
        far.up(here / "one", place / "one", timeout=4)
        assert (place / "one").read_bytes() == content(5 * MB)
        assert caplog.text.count("uses SFTP, which is slower: a start-up file") == 1
        for resume in (False, True):
            far.up(inside(here / "tree"), place / "tree", resume=resume, timeout=4)
            far.down(inside(place / "tree"), here / "back", resume=resume, timeout=4)
            assert snapshot(here / "back") == snapshot(here / "tree") == snapshot(place / "tree")
        assert sorted(os.listdir(place)) == ["one", "tree", "two"]
        with pytest.raises(JobError, match="start-up file"):
            client.start(server.order(), "true", name="x", key_path=server.key)
    assert sorted(os.listdir(here)) == ["back", "one", "tree", "two"]


def test_a_slow_start_up_file(
    client: CloreClient, tmp_path: Path, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes seconds, which is no reason to use SFTP."""
    (here / "one").write_bytes(content(MB))
    with host(client, tmp_path / "host", "bash") as far:
        (far.home / ".bashrc").write_text(
            "sleep 2; read x\n"
        )  # and a forced command starts two shells
        far.up(here / "one", far.folder / "one", timeout=20)
        assert (far.folder / "one").read_bytes() == content(MB)
    assert "SFTP" not in caplog.text


def test_nothing_in_what_a_shell_is_sent_can_be_read_otherwise() -> None:
    for line in (BOOTSTRAP, INLINE):
        line = line.format(mark="0" * 16, script="")
        assert not set(line) & set("\\!\n`")
    for odd in (b"back\\slash", b"bang!", b"at@", b"\xff", b"\x01"):
        assert inlined(odd) is None


# --- places and permissions ---


@pytest.fixture
def far(
    client: CloreClient, sshd: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Far]:
    """Return a host with a shell, or with the parameter "sftp" one without."""
    if getattr(request, "param", "shell") == "sftp":
        with host(client, tmp_path / "host", "sftp") as found:
            yield found
        return
    folder = tmp_path / "far"
    folder.mkdir()
    yield Far(client, sshd.order(), folder, key_path=sshd.key)


over_both = pytest.mark.parametrize("far", ["shell", "sftp"], indirect=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@over_both
def test_permissions_are_never_widened(far: Far, here: Path) -> None:
    (here / "tree").mkdir(mode=0o700)
    for name, bits in (("private", 0o600), ("group", 0o666), ("program", 0o777)):
        (here / "tree" / name).write_text(name)
        (here / "tree" / name).chmod(bits)
        far.up(here / "tree" / name, far.folder / name)
        far.down(far.folder / name, here / name)
    far.up(inside(here / "tree"), far.folder / "tree")
    far.down(inside(far.folder / "tree"), here / "back")
    for folder in (far.folder, here, far.folder / "tree", here / "back"):
        modes = [mode(folder / name) for name in ("private", "group", "program")]
        assert modes == [0o600, 0o644, 0o755], folder
    assert mode(far.folder / "tree") == mode(here / "back") == 0o700
    for number, bits in enumerate((0o777, 0o750, 0o555)):
        (here / "tree").chmod(bits)
        far.up(here / "tree", far.folder / f"new{number}")
        assert mode(far.folder / f"new{number}" / "tree") == bits & ~0o022
    os.utime(here / "tree", (1_500_000_000, 1_500_000_000))
    far.up(inside(here / "tree"), far.folder / "preserved", preserve=True)
    assert mode(far.folder / "preserved") == 0o555
    assert (far.folder / "preserved").stat().st_mtime == 1_500_000_000
    (here / "tree").chmod(0o700)
    for folder in (far.folder, here):  # what is replaced stays as private as it was
        (folder / "group").chmod(0o600)
    far.up(here / "tree" / "group", far.folder / "group")
    far.down(far.folder / "tree" / "group", here / "group")
    assert mode(far.folder / "group") == mode(here / "group") == 0o600


@pytest.mark.parametrize("wrong", ["link to a folder", "link to a file", "folder", "file"])
@over_both
def test_a_tree_stays_in_its_place(far: Far, here: Path, wrong: str) -> None:
    """An obstacle is an error before anything is moved, and nothing is written elsewhere."""
    (here / "tree" / "sub").mkdir(parents=True)
    for name in ("first", "name", "sub/inner"):
        (here / "tree" / name).write_text("new")
    target, other = far.folder / "tree", far.folder / "other"
    target.mkdir()
    other.mkdir()
    (other / "kept").write_text("old")
    if wrong == "link to a folder":
        (target / "sub").symlink_to(other)
    elif wrong == "link to a file":
        (target / "name").symlink_to(other / "kept")
    elif wrong == "folder":
        (target / "name").mkdir()
    else:
        (target / "sub").write_text("old")
    with pytest.raises(TransferError, match=r"a symlink|a directory"):
        far.up(inside(here / "tree"), target)
    assert os.listdir(other) == ["kept"]
    assert (other / "kept").read_text() == "old"
    assert not (target / "first").exists()
    assert sorted(os.listdir(far.folder)) == ["other", "tree"]
    if wrong.startswith("link"):
        far.up(inside(here / "tree"), target, symlinks="follow")
        assert (target / "name").read_text() == (target / "sub" / "inner").read_text() == "new"


def test_two_resumed_uploads_of_one_file_never_mix(far: Far, here: Path) -> None:
    data = content(9 * MB)
    (here / "one").write_bytes(data)
    for _ in range(5):
        (far.folder / "copy").unlink(missing_ok=True)
        results: list[object] = []

        def upload(results: list[object] = results) -> None:
            try:
                results.append(far.up(here / "one", far.folder / "copy", resume=True))
            except TransferError as error:
                results.append(error)

        threads = [threading.Thread(target=upload) for _ in range(2)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        far.up(here / "one", far.folder / "copy", resume=True)
        assert (far.folder / "copy").read_bytes() == data
        assert os.listdir(far.folder) == ["copy"]


@over_both
def test_what_is_no_place_for_a_file(far: Far, here: Path) -> None:
    (here / "x").write_text("new")
    for folder in (far.folder, here):
        (folder / "target").write_text("old")
        (folder / "link").symlink_to("target")
        os.mkfifo(folder / "pipe")
    for name, said in (("link", "symlink"), ("pipe", "neither a file nor a directory")):
        with pytest.raises(TransferError, match=said):
            far.up(here / "x", far.folder / name)
        with pytest.raises(TransferError, match=said):
            far.down(far.folder / "target", here / name)
    assert (far.folder / "target").read_text() == (here / "target").read_text() == "old"
    far.up(here / "x", far.folder / "link", symlinks="follow")
    far.down(far.folder / "target", here / "link", symlinks="follow")
    for folder in (far.folder, here):
        assert (folder / "link").is_symlink()
        assert (folder / "target").read_text() == "new"


@over_both
@pytest.mark.parametrize("how", ["skip", "copy", "follow"])
def test_symlinks_in_a_tree(far: Far, here: Path, how: str) -> None:
    """As in a virtual environment or a cache; symlinks that lead out of it are left out."""
    source = here / "source"
    (source / "lib" / "inner").mkdir(parents=True)
    (source / "lib" / "inner" / "file").write_text("text")
    (here / "secret").write_text("secret")
    links = {"lib64": "lib", "bin": "lib/inner/file", "lib/inner/up": "../../bin"}
    out = {"out": "../secret", "root": "/etc/passwd", "lib/loop": "..", "none": "nothing"}
    for name, leads in {**links, **out}.items():
        (source / name).symlink_to(leads)
    sent = far.up(inside(source), far.folder / "copy", symlinks=how)
    got = far.down(inside(far.folder / "copy"), here / "back", symlinks=how)
    left_out = set(out) if how != "skip" else {*out, *links}
    if how == "follow":
        left_out.add("lib64/loop")
    assert {name for name, _ in sent.skipped} == left_out
    assert got.skipped == ([] if how != "skip" else got.skipped)
    for copy in (far.folder / "copy", here / "back"):
        assert (copy / "lib" / "inner" / "file").read_text() == "text"
        for name, leads in links.items():
            path = copy / name
            assert path.is_symlink() == (how == "copy")
            assert os.path.lexists(path) == (how != "skip")
            if how == "copy":
                assert os.readlink(path) == leads
            elif how == "follow" and name != "lib64":
                assert path.read_text() == "text"
            elif how == "follow":
                assert (path / "inner" / "up").read_text() == "text"
        assert not (copy / "out").exists()


def test_a_growing_log_and_files_of_proc(far: Far, here: Path) -> None:
    got = far.down("/proc/cpuinfo", here / "cpuinfo")
    assert got.size == (here / "cpuinfo").stat().st_size > 0
    assert b"processor" in (here / "cpuinfo").read_bytes()
    log = far.folder / "log"
    log.write_bytes(b"line\n" * 1000)
    writer = subprocess.Popen(
        ["sh", "-c", 'while :; do echo line; sleep 0.01; done >>"$0"', str(log)]
    )
    try:
        for number in range(4):
            far.down(log, here / f"log{number}")
            far.down(inside(far.folder), here / f"all{number}")
            for copy in (here / f"log{number}", here / f"all{number}" / "log"):
                data = copy.read_bytes()
                assert data == b"line\n" * (len(data) // 5)
                assert len(data) >= 5000
    finally:
        writer.terminate()
        writer.wait()


def test_sparse_files_stay_sparse(far: Far, here: Path) -> None:
    with open(here / "sparse", "wb") as file:
        file.write(b"start")
        file.truncate(40 * MB)
        file.seek(20 * MB)
        file.write(b"middle")
    far.up(here / "sparse", far.folder / "sparse")
    far.down(far.folder / "sparse", here / "back")
    for copy in (far.folder / "sparse", here / "back"):
        assert copy.read_bytes() == (here / "sparse").read_bytes()
        assert copy.stat().st_blocks * 512 < 2 * MB


def test_a_deadline_for_all_of_it(far: Far, here: Path) -> None:
    (here / "a").write_bytes(content(30 * MB))
    (far.folder / "a").write_bytes(content(30 * MB))

    def slow(*_: Any) -> None:
        time.sleep(0.1)

    for move, source, target in (
        (far.up, here / "a", far.folder / "b"), (far.down, far.folder / "a", here / "b"),
    ):  # fmt: skip
        started = time.monotonic()
        with pytest.raises(TransferError, match=r"longer than deadline=1 seconds"):
            move(source, target, progress=slow, deadline=1)
        assert time.monotonic() - started < 30
    assert os.listdir(here) == ["a"]
    until(lambda: os.listdir(far.folder) == ["a"])
