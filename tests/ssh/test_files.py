"""Transfers: slashes, parents, unchanged files, patterns, previews, and rsync_command()."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, TransferError
from clore_client.ssh.transfer.entry import excluder
from clore_client.ssh.transfer.transfer import is_content
from tests.ssh.test_hosts import busybox, host
from tests.ssh.test_transfer import MB, Far, content, inside, make_tree, snapshot
from tests.sshd import Sshd, running_sshd

pytestmark = pytest.mark.internal

OLD = 1_500_000_000


@pytest.fixture
def client() -> CloreClient:
    return CloreClient(state_dir=None)


@pytest.fixture(params=["shell", "sftp"])
def far(
    request: pytest.FixtureRequest, client: CloreClient, sshd: Sshd, tmp_path: Path
) -> Iterator[Far]:
    """Yield a host with a shell, and one with SFTP only."""
    if request.param == "sftp":
        with host(client, tmp_path / "host", "sftp") as only_sftp:
            yield only_sftp
        return
    (tmp_path / "far").mkdir()
    yield Far(client, sshd.order(), tmp_path / "far", key_path=sshd.key)


def tree(folder: Path, *names: str, text: str = "") -> Path:
    """Make files, or directories whose names end with a slash."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        place = folder / name
        if name.endswith("/"):
            place.mkdir(parents=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text or name)
    return folder


def names(folder: Path) -> list[str]:
    """Return what is below a folder, with a slash after directories."""
    return sorted(f"{path.relative_to(folder)}{'/' * path.is_dir()}" for path in folder.rglob("*"))


# --- slashes and parents ---


def test_a_slash_means_the_content_and_twice_is_as_once(far: Far, here: Path) -> None:
    data = tree(here / "data", "a", "sub/b")
    for _ in range(2):
        assert far.up(inside(data), far.folder / "work").path == str(far.folder / "work")
        assert names(far.folder) == ["work/", "work/a", "work/sub/", "work/sub/b"]
        assert far.up(data, far.folder / "other").path == str(far.folder / "other" / "data")
        assert names(far.folder / "other") == ["data/", "data/a", "data/sub/", "data/sub/b"]
        shutil.rmtree(far.folder / "other")
        far.up(str(data), inside(far.folder / "work2"))
        far.up(str(data), inside(far.folder / "work2"))
        assert names(far.folder / "work2") == ["data/", "data/a", "data/sub/", "data/sub/b"]
        shutil.rmtree(far.folder / "work2")
    for _ in range(2):
        far.down(inside(far.folder / "work"), here / "back")
        assert names(here / "back") == ["a", "sub/", "sub/b"]
        got = far.down(far.folder / "work", here / "in")
        assert got.path == str(here / "in" / "work")
        assert names(here / "in") == ["work/", "work/a", "work/sub/", "work/sub/b"]


def test_as_rsync_does(far: Far, here: Path) -> None:
    """The results are those of rsync with the same arguments, where rsync supports them."""
    tree(here / "data", "a", "sub/b")
    for source in ("data", "data/", "data/sub", "data/sub/", "data/.", "data/a"):
        for target in ("new", "new/", "old", "old/"):
            tree(far.folder / "ours" / "old", "x")
            tree(far.folder / "theirs" / "old", "x")
            far.up(f"{here}/{source}", f"{far.folder}/ours/{target}")
            command = ["rsync", "-a", f"{here}/{source}", f"{far.folder}/theirs/{target}"]
            subprocess.run(command, check=True)
            ours, theirs = names(far.folder / "ours"), names(far.folder / "theirs")
            assert ours == theirs, (source, target)
            shutil.rmtree(far.folder / "ours")
            far.down(f"{far.folder}/theirs/{target}", here / "back")
            shutil.rmtree(here / "back") if (here / "back").is_dir() else (here / "back").unlink()
            shutil.rmtree(far.folder / "theirs")


def test_missing_parents_are_made(far: Far, here: Path) -> None:
    data = tree(here / "data", "a")
    far.up(data / "a", far.folder / "one" / "two" / "file")
    far.up(data / "a", inside(far.folder / "three" / "four"))
    far.up(inside(data), far.folder / "five" / "six")
    assert names(far.folder) == [
        "five/", "five/six/", "five/six/a", "one/", "one/two/", "one/two/file",
        "three/", "three/four/", "three/four/a",
    ]  # fmt: skip
    assert (far.folder / "one").stat().st_mode & 0o777 == 0o755
    for resume in (False, True):
        far.down(far.folder / "one" / "two" / "file", here / "x" / "y" / "file", resume=resume)
        far.down(far.folder / "one" / "two" / "file", inside(here / "x" / "z"), resume=resume)
        far.down(inside(far.folder / "five"), here / "x" / "v" / "w", resume=resume)
        far.down(far.folder / "five", here / "x" / "u", resume=resume)
        assert names(here / "x") == [
            "u/", "u/five/", "u/five/six/", "u/five/six/a", "v/", "v/w/", "v/w/six/",
            "v/w/six/a", "y/", "y/file", "z/", "z/file",
        ]  # fmt: skip
        shutil.rmtree(here / "x")


def test_parents_that_can_not_be_made(far: Far, here: Path) -> None:
    data = tree(here / "data", "a")
    (far.folder / "file").write_text("stays")
    (here / "file").write_text("stays")
    for target in ("file/x", "file/x/y", "file/"):
        with pytest.raises(TransferError, match="directory"):
            far.up(data / "a", f"{far.folder}/{target}")
        with pytest.raises((TransferError, OSError), match=r"irectory|exists"):
            far.down(f"{far.folder}/file", f"{here}/{target}")
    assert (far.folder / "file").read_text() == (here / "file").read_text() == "stays"


def test_the_home_directory(client: CloreClient, here: Path, tmp_path: Path) -> None:
    data = tree(here / "data", "a")
    with running_sshd(tmp_path / "sshd") as server:
        far = Far(client, server.order(), tmp_path, key_path=server.key)
        home = server.folder / "home"
        for target in ("~", "~/", ".", "./"):
            assert far.up(inside(data), target).path == str(home)
            assert names(home) == ["a"]
            assert far.up(data, target).path == str(home / "data")
            assert far.up(data / "a", target).path == str(home / "a")
            shutil.rmtree(home / "data")
            far.down(target, here / "back")
            assert names(here / "back") == ["a"]
            (home / "a").unlink()
        far.up(inside(data), "new/deep")
        assert names(home) == ["new/", "new/deep/", "new/deep/a"]


def test_what_is_a_content() -> None:
    for path in (b"x/", b"x/.", b".", b"..", b"x/..", b"/", b"./"):
        assert is_content(path)
    for path in (b"x", b"/x", b"~", b".x", b"x.", b"..."):
        assert not is_content(path)


# --- what is unchanged ---


@pytest.mark.parametrize("how", [True, "checksum"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_only_what_differs_is_sent(far: Far, here: Path, direction: str, how: Any) -> None:
    source, target = here / "a", far.folder / "b"
    move: Any = far.up
    if direction == "down":
        source, target, move = far.folder / "a", here / "b", far.down
    tree(source, "one", "sub/two", "three")
    (source / "large").write_bytes(content(5 * MB))
    first = move(inside(source), target, skip_unchanged=how)
    assert (first.files, first.unchanged) == (4, 0)
    again = move(inside(source), target, skip_unchanged=how)
    assert (again.files, again.size, again.unchanged) == (0, 0, 4)
    assert "4 unchanged" in repr(again)
    (source / "sub" / "two").write_text("TWO")
    os.utime(source / "sub" / "two", (OLD, OLD))
    (source / "new").write_text("new")
    (target / "three").write_text("other")  # of the same size
    os.utime(target / "three", (OLD, OLD))
    events: list[Any] = []
    third = move(inside(source), target, skip_unchanged=how, on_progress=events.append)
    assert (third.files, third.unchanged) == (3, 2)
    assert third.size == events[-1].number == events[-1].total == 3 + 3 + 5
    assert snapshot(target) == snapshot(source)
    if how is True:
        for name in ("one", "sub/two", "three", "large"):
            assert int((target / name).stat().st_mtime) == int((source / name).stat().st_mtime)
    else:
        assert (target / "sub" / "two").stat().st_mtime > OLD + 1000


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_change_that_only_a_checksum_sees(far: Far, here: Path, direction: str) -> None:
    source, target = here / "a", far.folder / "b"
    move: Any = far.up
    if direction == "down":
        source, target, move = far.folder / "a", here / "b", far.down
    for number, folder in enumerate((source, target)):
        tree(folder, "x", text=str(number))
        os.utime(folder / "x", (OLD, OLD))
    assert move(inside(source), target, skip_unchanged=True).files == 0
    assert move(inside(source), target, skip_unchanged="checksum").files == 1
    assert (target / "x").read_text() == "0"


@pytest.mark.parametrize("how", [True, "checksum"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_single_file_that_is_unchanged(far: Far, here: Path, direction: str, how: Any) -> None:
    source, target = here / "a", far.folder / "b"
    move: Any = far.up
    if direction == "down":
        source, target, move = far.folder / "a", here / "b", far.down
    source.write_bytes(content(3 * MB))
    for seed, options in enumerate(({}, {"resume": True}), 1):
        assert move(source, target, skip_unchanged=how, **options).files == 1
        again = move(source, target, skip_unchanged=how, **options)
        assert (again.files, again.unchanged, again.path) == (0, 1, str(target))
        assert move(source, target.parent, skip_unchanged=how, **options).files == 1
        assert move(source, target.parent, skip_unchanged=how, **options).files == 0
        (target.parent / "a").unlink()
        source.write_bytes(content(3 * MB, seed))
        os.utime(source, (OLD + seed, OLD + seed))
        assert move(source, target, skip_unchanged=how, **options).files == 1
        assert target.read_bytes() == source.read_bytes()
        target.unlink()
    assert os.listdir(target.parent) == []


def test_links_and_unchanged_files(far: Far, here: Path) -> None:
    tree(far.folder / "a", "x")
    (far.folder / "a" / "link").symlink_to("x")
    for _ in range(2):
        far.down(inside(far.folder / "a"), here / "b", symlinks="follow", skip_unchanged=True)
        assert (here / "b" / "link").read_text() == "x"
    for _ in range(2):
        far.down(inside(far.folder / "a"), here / "c", symlinks="copy", skip_unchanged=True)
        assert os.readlink(here / "c" / "link") == "x"
    for _ in range(2):
        far.up(inside(here / "c"), far.folder / "d", symlinks="copy", skip_unchanged=True)
        assert os.readlink(far.folder / "d" / "link") == "x"


def test_odd_names_that_are_unchanged(client: CloreClient, sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    far = Far(client, sshd.order(), tmp_path / "far", key_path=sshd.key)
    source = make_tree(tmp_path / "source")
    count = far.up(inside(source), far.folder / "copy", skip_unchanged=True).files
    assert count > 20
    for how in (True, "checksum"):
        sent = far.up(inside(source), far.folder / "copy", skip_unchanged=how)
        assert (sent.files, sent.unchanged) == (0, count)
        far.down(inside(far.folder / "copy"), tmp_path / "back", skip_unchanged=True)
        got = far.down(inside(far.folder / "copy"), tmp_path / "back", skip_unchanged=how)
        assert (got.files, got.unchanged) == (0, count)
    assert snapshot(tmp_path / "back") == snapshot(source)


def test_max_bytes_counts_what_comes(far: Far, here: Path) -> None:
    tree(far.folder / "a", "x" * 200, "y")
    far.down(inside(far.folder / "a"), here / "b", skip_unchanged=True)
    (far.folder / "a" / "y").write_text("Y!")
    got = far.down(inside(far.folder / "a"), here / "b", skip_unchanged=True, max_bytes=300)
    assert (got.files, got.size) == (1, 2)


# --- patterns ---


@pytest.mark.parametrize("direction", ["up", "down"])
def test_patterns_leave_out(far: Far, here: Path, direction: str) -> None:
    source, target = here / "a", far.folder / "b"
    move: Any = far.up
    if direction == "down":
        source, target, move = far.folder / "a", here / "b", far.down
    tree(source, "x.py", "x.pyc", "sub/y.pyc", "sub/y.py", ".git/config", "build/deep/z",
         "sub/build/z", "logs/keep.log", "logs/old.log", "empty/")  # fmt: skip
    sent = move(
        inside(source),
        target,
        exclude=["*.pyc", ".git", "/build/", "*.log", "!keep.log", "# comment", ""],
    )
    assert names(target) == [
        "empty/", "logs/", "logs/keep.log", "sub/", "sub/build/", "sub/build/z", "sub/y.py", "x.py",
    ]  # fmt: skip
    assert (sent.files, sent.skipped) == (4, [])


def test_a_directory_that_is_left_out_is_not_read(far: Far, here: Path) -> None:
    source = tree(here / "a", "x", "cache/y")
    (source / "cache" / "link").symlink_to("/nowhere")
    os.mkfifo(source / "pipe")
    sent = far.up(inside(source), far.folder / "b", exclude=["cache", "pipe"])
    assert (sent.files, sent.skipped) == (1, [])


@pytest.mark.parametrize("value", ["*.pyc", b"x", 5, [5], [None]])
def test_patterns_that_can_not_be_right(client: CloreClient, here: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="exclude"):
        client.upload({}, here, "x", exclude=value)
    with pytest.raises(TypeError, match="exclude"):
        client.download({}, "x", here, exclude=value)


def test_without_pathspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pathspec", None)
    assert not excluder([])(b"a", False)
    with pytest.raises(ImportError, match="pip install pathspec"):
        excluder(["*.pyc"])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="exclude"):
        excluder(["a", "!"])


# --- previews, and what only the target has ---


def test_a_preview_changes_nothing(far: Far, here: Path) -> None:
    source = tree(here / "a", "x", "sub/y", "z")
    target = tree(far.folder / "b", "z", "old", "gone/deep/w")
    before = snapshot(far.folder, times=True)
    would = far.up(inside(source), target, preview=True, delete=True)
    assert sorted(would.sent) == ["sub/y", "x", "z"]
    assert would.files == 3
    assert sorted(would.deleted) == ["gone", "gone/deep", "gone/deep/w", "old"]
    assert would.path == str(target)
    assert "would send " in repr(would)
    assert "would delete 4" in repr(would)
    assert far.up(source, far.folder / "n" / "m", preview=True).path == f"{far.folder}/n/m/a"
    assert far.up(source / "x", far.folder / "n", preview=True).sent == ["x"]
    assert snapshot(far.folder, times=True) == before


def test_what_was_listed_is_deleted_and_nothing_else(far: Far, here: Path) -> None:
    source = tree(here / "a", "x", "sub/y", "came-back")
    (source / "came-back").unlink()
    target = tree(far.folder / "b", "old", "gone/deep/w", "gone2/v", "came-back", "sub/old")
    (target / "link").symlink_to(here)
    would = far.up(inside(source), target, preview=True, delete=True)
    (source / "came-back").write_text("mine")
    (target / "later").write_text("later")
    (target / "gone2" / "later").write_text("later")
    done = far.up(inside(source), target, delete=would)
    assert names(target) == ["came-back", "gone2/", "gone2/later", "later", "sub/", "sub/y", "x"]
    assert "came-back" not in done.deleted
    assert f"{len(done.deleted)} deleted" in repr(done)
    assert "would" not in repr(done)
    assert sorted(done.deleted)[:2] == ["gone", "gone/deep"]
    assert names(source) == ["came-back", "sub/", "sub/y", "x"]
    again = far.up(inside(source), target, preview=True, delete=True, skip_unchanged="checksum")
    assert sorted(again.deleted) == ["gone2", "gone2/later", "later"]
    assert (again.sent, again.unchanged) == ([], 3)


def test_what_is_excluded_or_left_out_is_not_deleted(far: Far, here: Path) -> None:
    source = tree(here / "a", "x")
    (source / "link").symlink_to("/nowhere")
    target = tree(far.folder / "b", "x", "cache/y", "keep/z.log", "keep/w", "link/inner", "old")
    would = far.up(inside(source), target, preview=True, delete=True, exclude=["cache", "*.log"])
    assert sorted(would.deleted) == ["keep/w", "old"]
    far.up(inside(source), target, delete=would, exclude=["cache", "*.log"])
    assert names(target) == ["cache/", "cache/y", "keep/", "keep/z.log", "link/", "link/inner", "x"]


def test_a_deletion_that_nobody_saw(far: Far, here: Path) -> None:
    source = tree(here / "a", "x")
    sent = far.up(inside(source), far.folder / "b")
    for value in (True, sent, ["x"], "yes", None, 1):
        with pytest.raises(ValueError, match="delete must be the result of a call with preview"):
            far.up(inside(source), far.folder / "b", delete=value)
    with pytest.raises(ValueError, match="upload of a directory"):
        far.up(source / "x", far.folder / "b", delete=True, preview=True)
    with pytest.raises(TypeError, match="preview must be"):
        far.up(source, far.folder / "b", preview="yes")
    with pytest.raises(ValueError, match="skip_unchanged must be"):
        far.up(source, far.folder / "b", skip_unchanged="time")


def test_a_userland_of_busybox(client: CloreClient, here: Path) -> None:
    source = tree(here / "a", "x", "sub/y")
    with busybox(client) as far:
        target = far.folder / "deep" / "b"
        for count in (2, 0):
            sent = far.up(inside(source), "/far/deep/b", skip_unchanged=True)
            assert sent.files == count
        assert far.up(inside(source), "/far/deep/b", skip_unchanged="checksum").files == 0
        tree(target, "old/z")
        would = far.up(inside(source), "/far/deep/b", preview=True, delete=True)
        assert sorted(would.deleted) == ["old", "old/z"]
        far.up(inside(source), "/far/deep/b", delete=would)
        assert snapshot(target) == snapshot(source)


def test_a_resumed_tree_of_many_files(far: Far, here: Path) -> None:
    source = tree(here / "a", *map(str, range(250)))
    assert far.up(inside(source), far.folder / "b", resume=True, timeout=20).files == 250
    assert far.down(inside(far.folder / "b"), here / "c", resume=True, timeout=20).files == 250
    assert snapshot(far.folder / "b") == snapshot(here / "c") == snapshot(source)


# --- the table of the docstring ---


def test_the_table(far: Far, here: Path) -> None:
    source = tree(here / "a", "x", "set-uid")
    os.link(source / "x", source / "hard")
    (source / "set-uid").chmod(0o4755)
    os.mkfifo(source / "pipe")
    if os.geteuid() == 0:
        os.mknod(source / "device", 0o600 | 0o020000, os.makedev(1, 3))
    (here / "named").symlink_to(source)
    for sent, copy in (
        (far.up(inside(here / "named"), far.folder / "b"), far.folder / "b"),
        (far.down(inside(here / "named"), here / "c"), here / "c"),
    ):
        odd = {"pipe", "device"} if os.geteuid() == 0 else {"pipe"}
        assert {name for name, _ in sent.skipped} == odd
        assert names(copy) == ["hard", "set-uid", "x"]
        assert (copy / "hard").stat().st_ino != (copy / "x").stat().st_ino
        assert (copy / "set-uid").stat().st_mode & 0o7777 == 0o755


# --- rsync itself ---


def test_the_line_for_rsync(client: CloreClient, sshd: Sshd, tmp_path: Path) -> None:
    source = tree(tmp_path / "a b'c", "x", 'it\'s "odd" $HOME/y')
    order = sshd.order(77)
    remembering = CloreClient(state_dir=tmp_path / "it's a state")
    with remembering.connect_ssh(order, key_path=sshd.key):
        pass  # the host key is pinned
    key = tmp_path / "a key"
    shutil.copy(sshd.key, key)
    for target in (tmp_path / "copy 1", tmp_path / "copy '2' $HOME"):
        line = remembering.rsync_command(order, inside(source), target, key_path=key)
        assert line.startswith("rsync -az -s -e ")
        assert "StrictHostKeyChecking=yes" in line
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        assert snapshot(target) == snapshot(source)
    line = client.rsync_command(order, source, "~/sub/x")
    assert line.endswith(f"{sshd.user}@127.0.0.1:sub/x")
    assert client.rsync_command(order, "a:b", "~").endswith(f" ./a:b {sshd.user}@127.0.0.1:.")
    assert " ./-rf " in client.rsync_command(order, "-rf", "x")
    order["connection"]["ssh"] = "ssh root@::1 -p 5"
    assert client.rsync_command(order, "a", "/x").endswith(" a 'root@[::1]:/x'")
    with pytest.raises(ValueError, match="~/ or an absolute path"):
        client.rsync_command(order, "a", "~other/x")
