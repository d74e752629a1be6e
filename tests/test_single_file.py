"""The package as one file: what it must look like, when it is current, and what can't be merged."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import clore_client
from clore_client import single_file
from clore_client.single_file import FOLDER, main, write
from tests.conftest import INTERNAL, TESTS

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def written() -> str:
    return write()


@functools.cache
def header() -> str:
    return ast.get_docstring(ast.parse(written())) or ""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A current copy, in a folder of its own."""
    path = tmp_path / "clore_client.py"
    path.write_bytes(written().encode())
    return path


def python(folder: Path, code: str, *options: str) -> str:
    """What Python prints that finds the folder's clore_client.py first."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], env=environment, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tool(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# --- the file ---


def test_the_header_tells_what_it_is_and_how_to_update_it() -> None:
    made = "-m clore_client.single_file > clore_client.py"
    for part in (f"clore-client {clore_client.__version__} in one file", "MIT License", made):
        assert part in header()
    for part in ("--check clore_client.py", "To update it,\nin a checkout:\n    pip install .\n"):
        assert part in header()
    licence = (ROOT / "LICENSE").read_text().split()
    shown = written().rsplit("# license\n", 1)[1].replace("# ", " ").replace("#\n", "").split()
    start = licence.index("Permission")
    assert shown[shown.index("Permission") : -1] == licence[start:]
    assert " ".join(licence[2:start]).replace("(c)", "(c)") in header()


def test_every_module_is_a_section_of_the_contents_in_the_same_order() -> None:
    sections = re.findall(r"^# =+\n# ([a-z_.]+)\n#\n# ", written(), re.MULTILINE)
    listed = re.findall(r"^    ([a-z_.]+) {2,}\S", header().split("Contents:")[1], re.MULTILINE)
    assert sections == [*listed, "license"]
    assert [listed[0], listed[-1]] == ["log", "client"]
    files = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.py")}
    modules = {n.replace("/", ".") for n in files if not n.startswith("simulator/")}
    assert set(listed) == {n for n in modules if not n.endswith(("__init__", "single_file"))}


def test_comments_and_formatting_are_kept() -> None:
    kept = 0
    for path in FOLDER.glob("m*/[a-z]*.py"):
        source = path.read_text()
        if re.search(r"^ +from clore_client", source, re.MULTILINE):  # the merged imports go
            continue
        kept += 1
        first = next(n for n in ast.parse(source).body if isinstance(n, (ast.ClassDef, ast.Assign)))
        code = source.split("\n")[first.lineno - 1 :]
        assert "\n".join(code).strip("\n") in written(), path
    assert kept > 5
    assert "simulator" not in re.sub(r"(?s)\"\"\".*?\"\"\"|#.*", "", written().lower())


def test_ruff_and_mypy_find_nothing(copy: Path) -> None:
    tool("ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), copy.name,
         cwd=copy.parent)  # fmt: skip
    tool("ruff", "format", "--check", "--no-cache", "--config", str(ROOT / "pyproject.toml"),
         copy.name, cwd=copy.parent)  # fmt: skip
    tool("mypy", "--strict", copy.name, cwd=copy.parent)


def test_it_needs_only_requests(copy: Path) -> None:
    code = """
import sys
for name in ("paramiko", "scp", "aiohttp", "asyncssh"):
    sys.modules[name] = None
import clore_client
assert clore_client.__file__.endswith("clore_client.py"), clore_client.__file__
print("fine")
"""
    assert python(copy.parent, code) == "fine"
    tops = {
        name.split(".")[0]
        for node in ast.parse(written()).body
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert tops - sys.stdlib_module_names == {"requests", "urllib3"}  # requests brings urllib3


def test_it_does_not_know_which_form_it_is_in(copy: Path) -> None:
    code = """
import clore_client, inspect
names = sorted(clore_client.__all__)
client = clore_client.CloreClient("a-long-enough-key", base_url="http://127.0.0.1:9")
shown = [clore_client.__version__, repr(client), client.describe(), client._user_agent]
for name in names:
    thing = getattr(clore_client, name)
    shown.append(name)
    if inspect.isclass(thing):
        shown += [thing.__name__, thing.__doc__, [base.__name__ for base in thing.__mro__]]
        shown += [(n, inspect.getdoc(v)) for n, v in sorted(vars(thing).items()) if callable(v)]
import logging
shown.append(sorted(n for n in logging.root.manager.loggerDict if "clore" in n))
print(shown)
"""
    assert python(copy.parent, code) == python(ROOT, code)


def test_pickles_load_within_the_form_that_wrote_them(copy: Path) -> None:
    code = """
import pickle, clore_client
for thing in (clore_client.Order({"order_id": 1}), clore_client.CloreConnectionError("x")):
    twin = pickle.loads(pickle.dumps(thing))
    assert type(twin) is type(thing) and str(twin) == str(thing)
print("fine")
"""
    assert python(copy.parent, code) == "fine"


def test_every_python_writes_the_same_bytes() -> None:
    others = [p for n in (10, 11, 12, 13, 14) if (p := shutil.which(f"python3.{n}"))]
    for program in {sys.executable, *others}:
        probe = [program, "-I", "-c", "pass"]  # a launcher may stand for a Python that is not there
        if program != sys.executable and subprocess.run(probe, capture_output=True).returncode:
            continue
        for extra in ([], ["-O"], ["-X", "utf8=0"]):
            command = [program, "-I", *extra, str(FOLDER / "single_file.py")]
            done = subprocess.run(command, capture_output=True, check=True,
                                  env={**os.environ, "LC_ALL": "C"})  # fmt: skip
            assert done.stdout == written().encode(), program


# --- whether a copy is current ---


def test_check(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(copy)]) == 0
    copy.write_bytes(written().replace("\n", "\r\n").encode())  # as a checkout may have it
    assert main(["--check", str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy}: current\n" * 2
    copy.write_text(written().replace("max_retries: int = 3", "max_retries: int = 4"))
    assert main(["--check", str(copy)]) == 1
    assert capsys.readouterr().out == f"{copy}: not current\n"
    with pytest.raises(SystemExit, match="2"):
        main(["--check", str(copy.parent / "none.py")])
    assert "No such file" in capsys.readouterr().err


def test_the_command_writes_beside_a_copy(copy: Path) -> None:
    """In the folder of a project, as the README has it: the copy there is not the package."""
    if "site-packages" not in str(FOLDER) and not _is_installed():
        pytest.skip("the package is not installed here")
    command = f"'{sys.executable}' -I -m clore_client.single_file"
    for _ in range(2):  # the shell empties it first
        subprocess.run(f"{command} > clore_client.py", shell=True, cwd=copy.parent, check=True)
        assert copy.read_bytes() == written().encode()
    subprocess.run(f"{command} --check clore_client.py", shell=True, cwd=copy.parent, check=True)


def _is_installed() -> bool:
    probe = [sys.executable, "-I", "-c", "import clore_client"]
    return subprocess.run(probe, capture_output=True).returncode == 0


# --- what can't be merged ---

PACKAGE = {
    "__init__": '"""x"""\n\nfrom clore_client.one import A\n\n__all__ = ["A"]\n',
    "config": '"""The version."""\n\n__version__ = "1.2"\n',
    "one": '"""One.\n\nMore of it.\n"""\n\nimport os\n\nfrom clore_client.two import B\n\n\n'
    "class A(B):\n    x = os.sep\n",
    "two": '"""Two."""\n\nimport os\n\n\nclass B:\n    pass\n',
}
Package = Callable[..., str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    monkeypatch.setattr(single_file, "SECTIONS", ("config", "one", "two", "models"))

    def made(**changed: str) -> str:
        for name, source in {**PACKAGE, **changed}.items():
            (tmp_path / f"{name}.py").write_text(source)
        return write(tmp_path)

    return made


def test_what_is_needed_comes_first(package: Package) -> None:
    text = package()
    assert text.count("import os\n") == 1
    assert text.index("class B") < text.index("class A(B)")
    assert "# one\n#\n# One.\n#\n# More of it.\n# =" in text
    namespace: dict[str, object] = {}
    exec(text, namespace)
    assert namespace["__all__"] == ["A"]


TWO = '"""Two."""\n'
B = "\n\nclass B:\n    pass\n"


@pytest.mark.parametrize(
    ("two", "says"),
    [
        (B + "\n\nclass A:\n    pass\n", "A is defined in one and in two"),
        (B + "\n\nif 1:\n    A = 1\n", "A is defined in one and in two"),
        (B + "\n\nos = 1\n", "os is defined in two and in an import"),
    ],
)
def test_a_name_in_two_modules_is_refused(package: Package, two: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        package(two=TWO + two)


def test_folders_become_sections(package: Package, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "three.py").write_text(
        '"""Three."""\n\nfrom clore_client.one import A\n\n\nclass C(A):\n    pass\n'
    )
    text = package()
    assert "# models.three\n#\n# Three.\n" in text
    assert text.index("class A(B)") < text.index("class C(A)")


def test_an_import_for_type_checkers_only(package: Package) -> None:
    two = (TWO + "\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import paramiko\n\n"
           "    from clore_client.one import A\n\n\nclass B:\n    a: 'A'\n")  # fmt: skip
    text = package(two=two)
    assert "if TYPE_CHECKING:\n    import paramiko\n" in text
    assert "clore_client.one" not in text


# --- the tests themselves ---


def test_only_what_uses_modules_of_the_package_is_kept_from_the_one_file() -> None:
    for path in TESTS.rglob("test_*.py"):
        inside = re.search(
            r"^(from|import) (clore_client\.|\.test_api|clore_client import .*\bsingle_file\b)",
            path.read_text(),
            re.MULTILINE,
        )
        name = path.relative_to(TESTS).as_posix()
        assert (name in INTERNAL) is bool(inside), name
