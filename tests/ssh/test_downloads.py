"""Downloads with symlinks, copies of their targets, and existing local files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clore_client import CloreClient, TransferError
from clore_client.ssh.transfer import entry, transfer
from tests.relay import Relay
from tests.ssh.test_transfer import MB, Far, content, cut_after, through
from tests.sshd import Sshd, running_sshd

pytestmark = pytest.mark.internal


@pytest.fixture
def client() -> CloreClient:
    return CloreClient(state_dir=None)


@pytest.fixture(params=["a shell", "SFTP"])
def far(request: pytest.FixtureRequest, client: CloreClient, tmp_path: Path) -> Iterator[Far]:
    """A folder of a host, which is this machine, with a shell or without."""
    folder = tmp_path / "far"
    folder.mkdir()
    options = "PasswordAuthentication no\n"
    if request.param == "SFTP":
        options += "ForceCommand internal-sftp\n"
    with running_sshd(tmp_path / "sshd", options) as sshd:
        yield Far(client, sshd.order(), folder, key_path=sshd.key)


# --- symlinks ---


def test_links_that_lead_out_by_way_of_another_link(far: Far, here: Path) -> None:
    deep = far.folder / "d1" / "d2" / "d3"
    deep.mkdir(parents=True)
    (far.folder / "d1" / "x").write_text("inside")
    (deep / "up").symlink_to("../..")
    (deep / "out").symlink_to("up/../../x")  # by its text it is d1/x
    (deep / "out2").symlink_to("out")
    (deep / "none").symlink_to("none2/../../../x")
    (deep / "in").symlink_to("../d3/../../x")
    got = far.down(f"{far.folder}/", here / "copy", symlinks="copy")
    target = here / "copy" / "d1" / "d2" / "d3"
    assert sorted(os.listdir(target)) == ["in", "up"]
    assert (target / "in").read_text() == "inside"
    assert sorted(name for name, _ in got.skipped) == [
        f"d1/d2/d3/{name}" for name in ("none", "out", "out2")
    ]


def test_max_bytes_counts_the_copies_of_links(far: Far, here: Path) -> None:
    source = far.folder / "source"
    (source / "a0").mkdir(parents=True)
    (source / "a0" / "file").write_bytes(b"x" * 1000)
    for level in range(1, 5):
        (source / f"a{level}").mkdir()
        for number in range(5):
            (source / f"a{level}" / f"{number}").symlink_to(f"../a{level - 1}")
    (source / "file").symlink_to("a0/file")
    with pytest.raises(TransferError, match="max_bytes is 1999"):
        far.down(source, here, symlinks="follow", max_bytes=1999)
    assert os.listdir(here) == []


@pytest.mark.parametrize("exists", [False, True])
def test_copies_of_linked_directories(far: Far, here: Path, exists: bool) -> None:
    source = far.folder / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "script").write_text("hello")
    (source / "a" / "b" / "script").chmod(0o755)
    (source / "link").symlink_to("a")
    if exists:
        (here / "source").mkdir()
    far.down(source, here, symlinks="follow")
    copied = here / "source" / "link" / "b" / "script"
    assert copied.read_text() == "hello"
    assert copied.stat().st_mode & 0o700 == 0o700


# --- resumed ---


@pytest.mark.parametrize("verify", [False, True])
def test_zeros_over_what_lies_there(far: Far, here: Path, verify: bool) -> None:
    data = content(20 * MB) + bytes(20 * MB)
    (far.folder / "a").write_bytes(data)
    port = int(far.order["connection"]["ssh"].rsplit(" ", 1)[1])
    with Relay(port) as relay:
        slow = through(relay, far)
        with pytest.raises(TransferError):
            slow.down(far.folder / "a", here / "b", resume=True, progress=cut_after(relay, 5 * MB))
        relay.mend()
        (part,) = (path for path in here.glob(".clore-part-*") if path.suffix != ".done")
        with open(part, "r+b") as file:
            file.seek(38 * MB)
            file.write(b"tampered")
        slow.down(far.folder / "a", here / "b", resume=True, verify=verify)
    assert (here / "b").read_bytes() == data
    assert (here / "b").stat().st_blocks * 512 < 25 * MB


# --- unchanged ---


@pytest.mark.parametrize("in_a_tree", [False, True])
def test_a_checksum_is_asked_for_in_pieces(
    client: CloreClient, sshd: Sshd, tmp_path: Path, here: Path,
    monkeypatch: pytest.MonkeyPatch, in_a_tree: bool,
) -> None:  # fmt: skip
    far = Far(client, sshd.order(), tmp_path / "far", key_path=sshd.key)
    monkeypatch.setattr(transfer, "RANGE", MB)
    asked: list[int] = []

    def file_digest(path: Any, start: int, length: int) -> str:
        asked.append(length)
        return entry.file_digest(path, start, length)

    monkeypatch.setattr(transfer, "file_digest", file_digest)
    source = far.folder / "source"
    source.mkdir(parents=True)
    (source / "a").write_bytes(content(20 * MB + 1))
    (source / "small").write_bytes(b"x")
    remote = source if in_a_tree else source / "a"
    far.down(remote, here)
    got = far.down(remote, here, skip_unchanged="checksum")
    assert (got.files, got.unchanged) == (0, 1 + in_a_tree)
    assert asked[in_a_tree:] == [MB] * 20 + [1]  # a small file is hashed as a whole
    with open(source / "a", "r+b") as file:
        file.seek(19 * MB)
        file.write(b"other")
    got = far.down(remote, here, skip_unchanged="checksum")
    assert (got.files, got.unchanged) == (1, in_a_tree)


def test_a_path_with_an_odd_character(client: CloreClient, here: Path) -> None:
    for remote, local in (("x", "a\ud800b"), ("a\ud800b", here)):
        with pytest.raises(ValueError, match="has a character that is not allowed in a path"):
            client.download({}, remote, local)
