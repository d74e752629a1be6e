"""What the README, the examples and the errors tell a reader to install and to run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.internal  # these texts are the same for the one file

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def extras() -> set[str]:
    """Return the names of the extras in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([a-z]+) = \[", section, re.MULTILINE))


def test_every_extra_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"extras? `([a-z]+)`", README))
    for group in re.findall(r"\.\[([a-z,]+)\]", README):
        named |= set(group.split(","))
    assert {"ssh", "files", "cli", "redis", "simulator"} <= named
    assert named <= extras()


def test_every_file_of_the_shell_blocks_exists() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    paths = re.findall(r"(?<=\s)(?:examples|tests)/\S+", "\n".join(f" {b}" for b in blocks))
    assert {"examples/demo.sh", "tests/run.sh"} <= set(paths)
    linked = re.findall(r"(?<=[(`])examples/[^)`\s]+", README)
    for path in [*paths, *linked]:
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("pattern", ["README.md", "clore_client/**/*.py", "examples/*.ipynb"])
def test_nothing_is_installed_by_a_name_that_is_not_on_pypi(pattern: str) -> None:
    files = list(ROOT.glob(pattern))
    assert files
    for file in files:
        found = re.findall(
            r"pip install[^\n]*\bclore-client[^\n]*", file.read_text(encoding="utf-8")
        )
        assert found == [], file


def test_a_sentence_of_the_readme_fits_the_width_of_an_editor() -> None:
    prose = [line for line in README.splitlines() if not line.startswith("|")]
    assert [line for line in prose if len(line) > 120] == []
