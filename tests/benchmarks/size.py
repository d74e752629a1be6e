"""Count the lines of the package; there are no limits."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import paramiko

import clore_client
from clore_client import CloreClient, single_file

_FOLDER = Path(clore_client.__file__).parent
_SKIPPED = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
)
_MUTABLE = (ast.Dict, ast.List, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


def modules() -> list[Path]:
    """Return the files of the package, without the simulator."""
    return [p for p in sorted(_FOLDER.rglob("*.py")) if "simulator" not in p.parts]


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            yield from range(first.lineno, (first.end_lineno or first.lineno) + 1)


def code_lines(path: Path) -> set[int]:
    """Return the numbers of the lines that are no blanks, comments or docstrings."""
    lines: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in _SKIPPED and token.string:
                lines.update(range(token.start[0], token.end[0] + 1))
    return lines - set(_docstring_lines(ast.parse(path.read_text("utf-8"))))


def _functions(path: Path, code: set[int]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            inside = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            yield len(code.intersection(inside)), f"{path.stem}.{node.name}"


def _mutable_globals(tree: ast.Module) -> Iterator[str]:
    """Yield names in lower case that hold something that can change."""
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            kinds = (*_MUTABLE, ast.Call, ast.Constant)
            if not isinstance(target, ast.Name) or not isinstance(node.value, kinds):
                continue
            if target.id.strip("_").islower() and not target.id.endswith("__"):
                yield target.id


def _private_parts_of_paramiko(tree: ast.Module) -> Iterator[str]:
    """Yield private names of paramiko's classes that are used on other objects than ``self``."""
    classes = (paramiko.Transport, paramiko.Channel, paramiko.SSHClient, paramiko.SFTPClient,
               paramiko.packet.Packetizer, paramiko.Message)  # fmt: skip
    private = {name for kind in classes for name in dir(kind) if re.match("_[a-z]", name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in private:
            if not isinstance(node.value, ast.Name) or node.value.id != "self":
                yield node.attr
        elif isinstance(node, ast.Constant) and node.value in private:  # of getattr()
            yield str(node.value)


def counts() -> dict[str, object]:
    """Return each count by its name."""
    files = modules()
    code = {path: code_lines(path) for path in files}
    functions = sorted((f for p in files for f in _functions(p, code[p])), reverse=True)
    trees = [ast.parse(path.read_text("utf-8")) for path in files]
    texts = [path.read_text("utf-8") for path in files]
    return {
        "modules, without the simulator": sum(p.name != "__init__.py" for p in files),
        "lines": sum(text.count("\n") for text in texts),
        "code lines": sum(map(len, code.values())),
        "lines of the one file": single_file.write().count("\n"),
        "package classes in CloreClient's MRO": len(CloreClient.__mro__) - 1,
        "places that create threads": sum(
            len(re.findall(r"(Thread|start_new_thread|ThreadPoolExecutor)\(", text))
            for text in texts
        ),
        "largest function": f"{functions[0][0]} ({functions[0][1]})",
        "functions over 40 code lines": [f"{name} {size}" for size, name in functions if size > 40],
        "files over 350 code lines": [
            f"{p.relative_to(_FOLDER)} {len(lines)}"
            for p, lines in code.items()
            if len(lines) > 350
        ],
        "private parts of paramiko": sorted(
            {
                name
                for path, tree in zip(files, trees, strict=True)
                if "ssh" in path.parts
                for name in _private_parts_of_paramiko(tree)
            }
        ),
        "mutable module globals": sorted(n for tree in trees for n in _mutable_globals(tree)),
    }


if __name__ == "__main__":
    for name, count in counts().items():
        print(f"{name}: {count}")
