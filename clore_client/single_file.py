"""Writes the client's modules as one clore_client.py, for those who copy a file into a project."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "clore_client"
FOLDER = Path(__file__).parent
# In the order in which a reader wants to see them; what one needs to be defined comes before it.
MODULES = (
    "version",
    "client",
    "servers",
    "orders",
    "wallets",
    "errors",
    "bids",
    "purchase",
    "cancel",
    "ssh",
    "transport",
    "answers",
    "pacing",
    "departure",
    "money",
    "records",
    "checks",
    "settings",
    "log",
)
LEFT_OUT = frozenset({"__init__", "single_file"})
THIRD_PARTY = frozenset({"paramiko", "requests", "scp", "urllib3"})
LINE_LENGTH = 100
BANNER = "# " + "=" * 98

HEADER = '''"""clore-client {version} in one file: a synchronous client for the Clore.ai GPU marketplace.

    from clore_client import CloreClient

It needs requests; connect_ssh also paramiko.

Made from the package clore-client {version} by
    python -m clore_client.single_file > clore_client.py
which, after `pip install -U clore-client`, also brings a copy up to date;
    python -m clore_client.single_file --check clore_client.py
tells whether that is due. Change the package and not this file.

MIT License, Copyright (c) 2026 The clore-client authors; the whole text stands at the end.

Contents:
{contents}
"""'''

LICENSE = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


class MergeError(Exception):
    """The modules can't be written as one file."""


@dataclass
class _Module:
    """One module of the package, taken apart."""

    name: str
    title: str
    text: str  # without docstring and imports
    defines: set[str]
    needs_now: set[str]  # names that running the module looks up
    uses: dict[str, str] = field(default_factory=dict)  # name -> module of the package
    plain: set[tuple[str, str]] = field(default_factory=set)  # import module as name
    named: set[tuple[str, str]] = field(default_factory=set)  # from module import name
    typed: set[str] = field(default_factory=set)  # imports for type checkers only


def write(folder: Path = FOLDER, modules: tuple[str, ...] = MODULES) -> str:
    """The package in ``folder`` as the text of one file.

    Raises:
        MergeError: something in it can't be merged.
    """
    present = {path.stem for path in folder.glob("*.py")} - LEFT_OUT
    if present != set(modules):
        raise MergeError(f"modules without a place, or gone: {sorted(present ^ set(modules))}")
    parsed = {name: _parse(name, (folder / f"{name}.py").read_text("utf-8")) for name in modules}
    _check_names(parsed)
    ordered = [parsed[name] for name in _in_order(parsed, modules)]
    version = _version((folder / "version.py").read_text("utf-8"))
    contents = "\n".join(f"    {m.name:<10} {m.title}" for m in ordered)
    parts = [HEADER.format(version=version, contents=contents), "", *_imports(ordered), ""]
    parts += [*_exported((folder / "__init__.py").read_text("utf-8")), "", ""]
    for module in ordered:
        parts += [BANNER, f"# {module.name}: {module.title}", BANNER, "", module.text, "", ""]
    parts += [BANNER, "# license", BANNER]
    parts += [f"# {line}".rstrip() for line in LICENSE.splitlines()]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(parts)) + "\n"


def _version(source: str) -> str:
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise MergeError("version.py does not tell the version")
    return match[1]


def _parse(name: str, source: str) -> _Module:
    tree = ast.parse(source)
    title = (ast.get_docstring(tree) or "").strip()
    if not title or "\n" in title:
        raise MergeError(f"{name}.py must start with a docstring of one line")
    module = _Module(name, title, "", set(), set())
    lines = source.splitlines()
    dropped: set[int] = set()
    for position, node in enumerate(tree.body):
        if position == 0 or isinstance(node, (ast.Import, ast.ImportFrom)) or _is_typing(node):
            dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _take_import(module, node)
        elif _is_typing(node):
            module.typed.update(ast.unparse(n) for n in node.body)  # type: ignore[attr-defined]
        elif position:
            module.defines.update(_defined(node))
            module.needs_now.update(_looked_up(node))
    for node in ast.walk(tree):
        inner = isinstance(node, (ast.Import, ast.ImportFrom)) and node not in tree.body
        if inner and PACKAGE in ast.unparse(node):
            raise MergeError(f"{name}.py:{node.lineno}: an import of the package in a function")
    kept = [line for number, line in enumerate(lines, 1) if number not in dropped]
    module.text = "\n".join(kept).strip("\n")
    return module


def _is_typing(node: ast.stmt) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _take_import(module: _Module, node: ast.Import | ast.ImportFrom) -> None:
    where = f"{module.name}.py:{node.lineno}"
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == PACKAGE:
                raise MergeError(f"{where}: import the package's modules by name: from ... import")
            module.plain.add((alias.name, alias.asname or ""))
        return
    source = node.module or ""
    for alias in node.names:
        if node.level or alias.name == "*" or source == PACKAGE:
            raise MergeError(f"{where}: not an import by name from a module of the package")
        if not source.startswith(f"{PACKAGE}."):
            if alias.asname:
                raise MergeError(f"{where}: {alias.name} is imported under another name")
            module.named.add((source, alias.name))
        elif alias.asname:
            raise MergeError(f"{where}: {alias.name} is imported under another name")
        else:
            module.uses[alias.name] = source.removeprefix(f"{PACKAGE}.")


def _defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id


def _looked_up(node: ast.AST) -> Iterator[str]:
    """The names that running a statement looks up; the bodies of functions run later."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        now: list[ast.AST] = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        if isinstance(node, ast.FunctionDef):
            now += node.decorator_list
        for part in now:
            yield from _looked_up(part)
        return
    if isinstance(node, ast.Name):
        yield node.id
    for name, value in ast.iter_fields(node):
        if name == "annotation":  # a string, as all are from __future__ on
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _looked_up(child)


def _check_names(modules: dict[str, _Module]) -> None:
    """Every name means one thing in all modules, and what is imported is there."""
    owners: dict[str, str] = {}
    for module in modules.values():
        for name in module.defines:
            if name in owners:
                raise MergeError(f"{name} is defined in {owners[name]}.py and {module.name}.py")
            owners[name] = module.name
    imported: dict[str, str] = {}
    for module in modules.values():
        bound = {asname or name.split(".")[0]: name for name, asname in module.plain}
        bound |= {name: f"{source}.{name}" for source, name in module.named}
        for name, origin in bound.items():
            if imported.setdefault(name, origin).split(".")[0] != origin.split(".")[0]:
                raise MergeError(f"{name} is imported as {imported[name]} and as {origin}")
            if name in owners:
                raise MergeError(f"{name} is an import and defined in {owners[name]}.py")
        for name, source in module.uses.items():
            if source not in modules or name not in modules[source].defines:
                raise MergeError(
                    f"{module.name}.py imports {name}, which {source}.py does not define"
                )


def _in_order(modules: dict[str, _Module], wanted: tuple[str, ...]) -> list[str]:
    """``wanted``, but each module after those that it needs to be run."""
    placed: list[str] = []

    def place(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise MergeError(f"these need each other to be defined: {' -> '.join((*path, name))}")
        if name in placed:
            return
        module = modules[name]
        needed = {module.uses[n] for n in module.needs_now if n in module.uses}
        for other in sorted(needed, key=wanted.index):
            place(other, (*path, name))
        placed.append(name)

    for name in wanted:
        place(name, ())
    return placed


def _imports(modules: list[_Module]) -> list[str]:
    """All imports, merged, in the order that ruff and isort keep."""
    plain = {pair for module in modules for pair in module.plain}
    named: dict[str, set[str]] = {}
    for module in modules:
        for source, name in module.named:
            named.setdefault(source, set()).add(name)
    lines = ["from __future__ import annotations"]
    named.pop("__future__", None)
    for third in (False, True):
        lines.append("")
        lines += [
            f"import {name}{f' as {asname}' if asname else ''}"
            for name, asname in sorted(plain)
            if (name.split(".")[0] in THIRD_PARTY) is third
        ]
        for source in sorted(named):
            if (source.split(".")[0] in THIRD_PARTY) is third:
                lines += _from_import(source, named[source])
    typed = sorted({line for module in modules for line in module.typed})
    if typed:
        lines += ["", "if TYPE_CHECKING:", *(f"    {line}" for line in typed)]
    return lines


def _from_import(source: str, names: set[str]) -> list[str]:
    def rank(name: str) -> tuple[int, str]:  # constants, classes, then the others
        return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)

    ordered = sorted(names, key=rank)
    line = f"from {source} import {', '.join(ordered)}"
    if len(line) <= LINE_LENGTH:
        return [line]
    return [f"from {source} import (", *(f"    {name}," for name in ordered), ")"]


def _exported(source: str) -> list[str]:
    """The ``__all__`` of the package, as it stands there."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return source.splitlines()[node.lineno - 1 : node.end_lineno]
    raise MergeError("__init__.py has no __all__")


def check(text: str, current: str) -> tuple[bool, str]:
    """Whether a copy is current, and a sentence that says so and names its version."""
    match = re.match(r'"""clore-client (\S+) in one file', text)
    version = match[1] if match else "unknown"
    if text == current:
        return True, f"current, version {version}"
    package = _version((FOLDER / "version.py").read_text("utf-8"))
    return False, f"not current: its version is {version}, the package's {package}"


def main(arguments: list[str] | None = None) -> int:
    """Write the file to standard output, or check a copy; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clore_client.single_file",
        description="Write the client as one file to standard output.",
    )
    parser.add_argument("--check", metavar="FILE", help="tell whether FILE is current")
    options = parser.parse_args(arguments)
    try:
        text = write()
    except MergeError as error:
        print(f"single_file: {error}", file=sys.stderr)
        return 2
    if options.check is None:
        sys.stdout.buffer.write(text.encode("utf-8"))
        return 0
    try:
        copy = Path(options.check).read_bytes().decode("utf-8", "replace")
    except OSError as error:
        print(f"{options.check}: {error.strerror}", file=sys.stderr)
        return 2
    same, verdict = check(copy, text)
    print(f"{options.check}: {verdict}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
