"""Downloads that leave the usual path: links, copies of them, and what lies there already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from clore_client import CloreClient
from tests.ssh.test_transfer import Far
from tests.sshd import running_sshd

pytestmark = pytest.mark.internal


@pytest.fixture(scope="module")
def client() -> CloreClient:
    return CloreClient(state_dir=None)


@pytest.fixture(params=["a shell", "SFTP"])
def far(request: pytest.FixtureRequest, client: CloreClient, tmp_path: Path) -> Iterator[Far]:
    """A folder of a machine, which is this one, with a shell or without."""
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
