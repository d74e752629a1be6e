"""Write the package as one file, clore_client.py, to copy into a project."""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "clore_client"
FOLDER = Path(__file__).parent
# The order of the sections; a module comes after those that it imports.
SECTIONS = ("log", "errors", "pricing", "validation", "progress", "config", "process",
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


class _Module:
    """Split one module of the package into its parts.

    Attributes:
        name: such as ``"api.request"``.
        about: its docstring.
        text: the rest, without its imports.
        needs: the modules of the package that it imports.
        imports, typing_imports: what else it imports: (module, name), or (module, "") for a module.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        self.name = ".".join(path.relative_to(folder).with_suffix("").parts)
        self.about = ast.get_docstring(tree) or ""
        self.defines = {name for node in tree.body for name in _defined(node)}
        self.needs: set[str] = set()
        self.imports: set[tuple[str, str]] = set()
        self.typing_imports: set[tuple[str, str]] = set()
        typing = [node for node in tree.body if _is_type_checking(node)]
        typing_lines = {line for node in typing for line in _lines(node)}
        moved = [tree.body[0], *typing]
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            at_top = node in tree.body
            for_typing = node.lineno in typing_lines
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if module.startswith(f"{PACKAGE}."):
                moved.append(node)  # also in a function
                if at_top:
                    self.needs.add(module.removeprefix(f"{PACKAGE}."))
            elif at_top or for_typing:
                moved.append(node)
                imported = self.typing_imports if for_typing else self.imports
                for alias in node.names:
                    imported.add((module, alias.name) if module else (alias.name, ""))
        self.text = _without(source, moved)


def write(folder: Path = FOLDER) -> str:
    """Return the package in ``folder`` as the text of one file.

    Raises:
        ValueError: two modules define the same name.
    """
    paths = sorted(folder.rglob("*.py"))
    kept = (p for p in paths if LEFT_OUT.isdisjoint({p.stem, *p.relative_to(folder).parts}))
    modules = _in_order([_Module(folder, path) for path in kept])
    _check_names(modules)
    version = re.findall(r'__version__ = "(.+)"', (folder / "config.py").read_text("utf-8"))[0]
    contents = "\n".join(
        textwrap.fill(
            module.about.split("\n")[0],
            WIDTH,
            initial_indent=f"    {module.name:<28}",
            subsequent_indent=" " * 32,
        )
        for module in modules
    )
    parts = [HEADER.format(version=version, contents=contents), "", *_imports(modules), ""]
    parts.append(_exported((folder / "__init__.py").read_text("utf-8")))
    for module in modules:
        parts += ["", "", *_banner(f"{module.name}\n\n{module.about}"), "", "", module.text]
    parts += ["", "", *_banner(f"license\n\n{LICENSE}")]
    return "\n".join(parts) + "\n"


def _in_order(modules: list[_Module]) -> list[_Module]:
    """Sort modules by section, and each one after the modules that it imports."""
    by_name = {module.name: module for module in modules}
    ordered: dict[str, _Module] = {}

    def place(name: str) -> None:
        for needed in sorted(by_name[name].needs - ordered.keys()):
            place(needed)
        ordered[name] = by_name[name]

    for name in sorted(by_name, key=lambda name: (SECTIONS.index(name.split(".")[0]), name)):
        if name not in ordered:
            place(name)
    return list(ordered.values())


def _check_names(modules: list[_Module]) -> None:
    """Check that each name is defined in one module only, and hides no import."""
    imports = set().union(*(part.imports | part.typing_imports for part in modules))
    owners = {name or module: "an import" for module, name in imports}
    for module in modules:
        for name in sorted(module.defines):
            if name in owners:
                raise ValueError(f"{name} is defined in {module.name} and in {owners[name]}")
            owners[name] = module.name


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _defined(node: ast.AST) -> Iterator[str]:
    """Yield the module-level names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
                               ast.GeneratorExp)):  # fmt: skip
        for child in ast.iter_child_nodes(node):
            yield from _defined(child)


def _without(source: str, nodes: list[ast.stmt]) -> str:
    """Return a module's text without some statements and the empty lines after them."""
    lines = ["", *source.split("\n"), ""]
    gone = {line for node in nodes for line in _lines(node)}
    gone |= {line + 1 for line in gone if not lines[line + 1].strip()}
    return "\n".join(line for number, line in enumerate(lines) if number not in gone).strip("\n")


def _banner(text: str) -> list[str]:
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH - 2) or [""]]
    return [BANNER, *(f"# {line}".rstrip() for line in lines), BANNER]


def _imports(modules: list[_Module]) -> list[str]:
    """Return the lines of all imports, merged, in the order that ruff expects."""
    now = set().union(*(module.imports for module in modules)) - {("__future__", "annotations")}
    later = set().union(*(module.typing_imports for module in modules)) - now
    lines = ["from __future__ import annotations"]
    for third in (False, True):
        lines += ["", *_rendered(now, third)]
    typed = [f"    {line}" for third in (False, True) for line in _rendered(later, third)]
    return [*lines, "", "if TYPE_CHECKING:", *typed] if typed else lines


def _rendered(imports: set[tuple[str, str]], third: bool) -> Iterator[str]:
    """Yield the imports of the standard library, or those of third parties."""

    def rank(name: str) -> tuple[bool, bool, str]:  # constants, classes, then the others
        return (not name.isupper(), not name[0].isupper(), name.lower())

    wanted = [part for part in imports if (part[0].split(".")[0] in THIRD_PARTY) is third]
    yield from (f"import {module}" for module, name in sorted(wanted) if not name)
    for module in sorted({module for module, name in wanted if name}):
        names = sorted((name for source, name in wanted if source == module and name), key=rank)
        line = f"from {module} import {', '.join(names)}"
        if len(line) > WIDTH:
            line = "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
        yield line


def _exported(source: str) -> str:
    """Return the source of the package's ``__all__``."""
    nodes = [node for node in ast.parse(source).body if list(_defined(node)) == ["__all__"]]
    return ast.get_source_segment(source, nodes[0]) or ""


def main(arguments: list[str] | None = None) -> int:
    """Write the file to standard output, or check a copy. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clore_client.single_file",
        description="Write the client as one file to standard output.",
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help="check if FILE is current")
    options = parser.parse_args(arguments)
    text = write()
    if options.check is None:
        sys.stdout.buffer.write(text.encode("utf-8"))
        return 0
    try:
        current = options.check.read_text("utf-8", "replace") == text
    except OSError as error:
        parser.error(f"{options.check}: {error.strerror}")
    print(f"{options.check}: {'current' if current else 'not current'}")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
