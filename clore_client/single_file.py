"""Write the package as one file, clore_client.py, to copy into a project."""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "clore_client"
FOLDER = Path(__file__).parent
# The order of the sections; a module comes after those that it imports.
SECTIONS = ("log", "errors", "pricing", "validation", "progress", "config",
          "models", "api", "market", "orders", "rental", "ssh", "client")  # fmt: skip
LEFT_OUT = frozenset({"__init__", "__main__", "single_file", "simulator"})
THIRD_PARTY = frozenset({"paramiko", "requests", "scp", "typing_extensions", "urllib3"})
WIDTH = 100
BANNER = "# " + "=" * (WIDTH - 2)

HEADER = '''\
"""clore-client {version} in one file: a client for the Clore.ai GPU marketplace.

    from clore_client import CloreClient

It needs requests; connect_ssh and other SSH methods also need paramiko.

This file is generated from the package clore-client {version}. Do not edit it. To update it,
in a checkout:
    pip install .
    python -I -m clore_client.single_file > clore_client.py
To check if it is current, run
    python -I -m clore_client.single_file --check clore_client.py
Without -I, Python would import the clore_client.py of the current folder, not the package.

MIT License, Copyright (c) 2026 The clore-client authors; the full text is at the end.

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
    """The package can't be written as one file."""


Import = tuple[str, str, str]  # module, name or "" for the module itself, alias or ""


@dataclass
class _Module:
    """The parts of one module of the package."""

    name: str  # "api.request"
    about: str = ""  # its docstring
    text: str = ""  # without its docstring and its imports
    defines: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)  # modules of the package that it imports
    uses: dict[str, str] = field(default_factory=dict)  # name -> module of the package
    imports: set[Import] = field(default_factory=set)
    typing_imports: set[Import] = field(default_factory=set)


def write(folder: Path = FOLDER) -> str:
    """Return the package in ``folder`` as the text of one file.

    Raises:
        MergeError: a module can't be merged.
    """
    modules = _in_order([_parse(folder, path) for path in _files(folder)])
    exported = _exported(folder, modules)
    version = re.search(r'__version__ = "(.+)"', (folder / "config.py").read_text("utf-8"))
    if version is None:
        raise MergeError("config.py has no __version__")
    contents = "\n".join(
        textwrap.fill(
            module.about.split("\n")[0],
            WIDTH,
            initial_indent=f"    {module.name:<28}",
            subsequent_indent=" " * 32,
        )
        for module in modules
    )
    parts = [
        HEADER.format(version=version[1], contents=contents),
        "",
        *_imports(modules),
        "",
        exported,
    ]
    for module in modules:
        parts += ["", "", *_banner(f"{module.name}\n\n{module.about}"), "", "", module.text]
    parts += ["", "", *_banner(f"license\n\n{LICENSE}")]
    return "\n".join(parts) + "\n"


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*.py"))
        if not LEFT_OUT & {path.stem, *path.relative_to(folder).parts}
    ]


def _in_order(modules: list[_Module]) -> list[_Module]:
    """Sort modules by section, and each one after the modules that it imports."""
    _check_names(modules)
    by_name = {module.name: module for module in modules}
    ordered: list[_Module] = []

    def place(module: _Module, path: tuple[str, ...]) -> None:
        if module.name in path:
            raise MergeError(f"modules import each other: {' -> '.join((*path, module.name))}")
        if module not in ordered:
            for name in sorted(module.needs & by_name.keys()):
                place(by_name[name], (*path, module.name))
            ordered.append(module)

    for module in sorted(modules, key=_section):
        place(module, ())
    return ordered


def _section(module: _Module) -> tuple[int, str]:
    top = module.name.split(".")[0]
    return (SECTIONS.index(top) if top in SECTIONS else len(SECTIONS), module.name)


def _check_names(modules: list[_Module]) -> None:
    """Check that each name is defined in one module only, and that imported names exist."""
    owners: dict[str, str] = {}
    for module in modules:
        for name in sorted(module.defines):
            if name in owners:
                raise MergeError(f"{name} is defined in {owners[name]} and in {module.name}")
            owners[name] = module.name
    for module in modules:
        for name, source in module.uses.items():
            if owners.get(name) != source:
                raise MergeError(f"{module.name} imports {name}, which {source} does not define")
        for source, name, alias in module.imports | module.typing_imports:
            bound = alias or name or source.split(".")[0]
            if bound in owners:
                raise MergeError(
                    f"{bound} is an import of {module.name}, and defined in {owners[bound]}"
                )


# --- one module ---


def _parse(folder: Path, path: Path) -> _Module:
    module = _Module(".".join(path.relative_to(folder).with_suffix("").parts))
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    module.about = ast.get_docstring(tree) or ""
    if not module.about:
        raise MergeError(f"{module.name} has no docstring for the contents")
    moved: list[ast.stmt] = [tree.body[0]]
    for node in tree.body[1:]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _take(module, node, module.imports)
            module.needs.update(_package_imports(node))
            moved.append(node)
        elif _is_type_checking(node):
            for part in ast.walk(node):
                if isinstance(part, (ast.Import, ast.ImportFrom)):
                    _take(module, part, module.typing_imports)
            moved.append(node)
        else:
            module.defines.update(_defined(node))
    for part in ast.walk(tree):
        if (
            isinstance(part, (ast.Import, ast.ImportFrom))
            and part not in moved
            and _is_package_import(part)
        ):
            _take(module, part, module.imports)  # within a function
            moved.append(part)
    module.text = _without(source, moved)
    return module


def _package_imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and _is_package_import(node):
        yield (node.module or "").removeprefix(f"{PACKAGE}.")


def _is_package_import(node: ast.Import | ast.ImportFrom) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return any(name.split(".")[0] == PACKAGE for name in names) or bool(getattr(node, "level", 0))


def _is_type_checking(node: ast.stmt) -> bool:
    test = node.test if isinstance(node, ast.If) and not node.orelse else None
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _take(module: _Module, node: ast.Import | ast.ImportFrom, into: set[Import]) -> None:
    """Record the names of an import.

    An import of the package must have the form ``from clore_client.module import name``.
    """
    source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        if source == "__future__":
            continue
        if not _is_package_import(node):
            into.add((source, alias.name, alias.asname or "") if source else
                     (alias.name, "", alias.asname or ""))  # fmt: skip
        elif source.startswith(f"{PACKAGE}.") and not alias.asname and alias.name != "*":
            module.uses[alias.name] = source.removeprefix(f"{PACKAGE}.")
        else:
            raise MergeError(
                f"{module.name}, line {node.lineno}: import names of the package as "
                f"`from {PACKAGE}.module import name`"
            )


def _defined(node: ast.AST) -> Iterator[str]:
    """Yield the module-level names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
        return
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _defined(child)


def _without(source: str, nodes: list[ast.stmt]) -> str:
    """Return a module's text without some statements and the empty lines after them."""
    lines = source.split("\n")
    gone: set[int] = set()
    for node in nodes:
        end = node.end_lineno or node.lineno
        gone.update(range(node.lineno, end + 1))
        if end < len(lines) and not lines[end].strip():
            gone.add(end + 1)
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in gone).strip("\n")


# --- the head of the file ---


def _banner(text: str) -> list[str]:
    lines: list[str] = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, WIDTH - 2) or [""]
    return [BANNER, *(f"# {line}".rstrip() for line in lines), BANNER]


def _imports(modules: list[_Module]) -> list[str]:
    """Return the lines of all imports, merged, in the order that ruff expects."""
    now: set[Import] = set().union(*(module.imports for module in modules))
    later: set[Import] = set().union(*(module.typing_imports for module in modules)) - now
    lines = ["from __future__ import annotations"]
    for third in (False, True):
        lines += ["", *_rendered(now, third)]
    typed = [line for third in (False, True) for line in _rendered(later, third)]
    return [*lines, *(["", "if TYPE_CHECKING:", *(f"    {t}" for t in typed)] if typed else [])]


def _rendered(imports: set[Import], third: bool) -> Iterator[str]:
    def rank(name: str) -> tuple[int, str]:  # constants, classes, then the others
        kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
        return (kind, name.lower())

    wanted = [part for part in imports if (part[0].split(".")[0] in THIRD_PARTY) is third]
    for module, _, alias in sorted(part for part in wanted if not part[1]):
        yield f"import {module}{f' as {alias}' if alias else ''}"
    for module in sorted({part[0] for part in wanted if part[1]}):
        found = sorted(
            (part for part in wanted if part[0] == module and part[1]), key=lambda p: rank(p[1])
        )
        names = [f"{name} as {alias}" if alias else name for _, name, alias in found]
        line = f"from {module} import {', '.join(names)}"
        if len(line) > WIDTH:
            line = "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
        yield line


def _exported(folder: Path, modules: list[_Module]) -> str:
    """Return the source of the package's ``__all__``."""
    source = (folder / "__init__.py").read_text("utf-8")
    there = {name for module in modules for name in module.defines}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and list(_defined(node)) == ["__all__"]:
            if missing := set(ast.literal_eval(node.value)) - there:
                raise MergeError(f"__init__.py exports {sorted(missing)}, which no module defines")
            return "\n".join(source.split("\n")[node.lineno - 1 : node.end_lineno])
    raise MergeError("__init__.py has no __all__")


# --- the command ---


def check(text: str, current: str) -> tuple[bool, str]:
    """Return whether a copy is current, and a text with the result and its version."""
    version, ours = (
        match[1] if (match := re.search(r'"""clore-client (\S+) in one file', part)) else "unknown"
        for part in (text, current)
    )
    if text == current:
        return True, f"current, version {version}"
    if version == ours:
        return False, f"not current: it has the package's version {version}, but other content"
    return False, f"not current: its version is {version}, the package's {ours}"


def main(arguments: list[str] | None = None) -> int:
    """Write the file to standard output, or check a copy. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clore_client.single_file",
        description="Write the client as one file to standard output.",
    )
    parser.add_argument("--check", metavar="FILE", help="check if FILE is current")
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
        copy = Path(options.check).read_text("utf-8", "replace")
    except OSError as error:
        print(f"{options.check}: {error.strerror}", file=sys.stderr)
        return 2
    same, verdict = check(copy, text)
    print(f"{options.check}: {verdict}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
