"""Writes the client's modules as one clore_client.py, for those who copy a file into a project."""

from __future__ import annotations

import argparse
import ast
import builtins
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "clore_client"
FOLDER = Path(__file__).parent
# In the order in which a reader wants to see them; what one needs to be run is put before it. One
# that is not listed comes last.
MODULES = (
    "version",
    "client",
    "servers",
    "orders",
    "wallets",
    "errors",
    "bids",
    "purchase",
    "waiting",
    "cancel",
    "ceiling",
    "account",
    "state",
    "signals",
    "rental",
    "worker",
    "purchases",
    "budget",
    "candidates",
    "leftovers",
    "machine",
    "connected",
    "ssh",
    "ssh_wire",
    "hostkeys",
    "ssh_lines",
    "ssh_errors",
    "commands",
    "remote",
    "ending",
    "forwarding",
    "transferred",
    "upload",
    "download",
    "local_files",
    "transfer",
    "far_shell",
    "hardened_scp",
    "scp_receive",
    "scp_send",
    "scp_wire",
    "transport",
    "answers",
    "rate_limit",
    "shared",
    "connection",
    "money",
    "records",
    "checks",
    "settings",
    "log",
)
LEFT_OUT = frozenset({"__init__", "single_file", "simulator"})
THIRD_PARTY = frozenset({"paramiko", "requests", "scp", "urllib3"})
WIDTH = 100
BANNER = "# " + "=" * (WIDTH - 2)
# What tells a module which file it is: the client must not know.
ORIGINS = frozenset({"__name__", "__file__", "__package__", "__spec__", "__path__", "__doc__"})

HEADER = '''\
"""clore-client {version} in one file: a client for the Clore.ai GPU marketplace.

    from clore_client import CloreClient

It needs requests; connect_ssh also needs paramiko.

Made from the package clore-client {version} by
    python -I -m clore_client.single_file > clore_client.py
which, after `pip install -U clore-client`, also brings a copy up to date;
    python -I -m clore_client.single_file --check clore_client.py
tells whether that is due. Without -I, a clore_client.py in the current folder would be taken for
the package. Change the package, and not this file.

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
class _Imports:
    """Imports from outside of the package."""

    plain: set[tuple[str, str]] = field(default_factory=set)  # import module as name
    named: set[tuple[str, str]] = field(default_factory=set)  # from module import name

    def bound(self) -> Iterator[tuple[str, str]]:
        """Each name that they define, and what it is."""
        for module, name in self.plain:
            yield (name, module) if name else (module.split(".")[0], module.split(".")[0])
        for module, name in self.named:
            yield name, f"{module}.{name}"


@dataclass
class _Module:
    """One module of the package, taken apart."""

    name: str
    about: str  # its docstring
    text: str = ""  # without docstring and imports
    defines: set[str] = field(default_factory=set)
    needs_now: set[str] = field(default_factory=set)  # names that running it looks up
    uses: dict[str, str] = field(default_factory=dict)  # name -> module of the package
    imports: _Imports = field(default_factory=_Imports)
    typed: _Imports = field(default_factory=_Imports)  # for type checkers only


def write(folder: Path = FOLDER, modules: tuple[str, ...] = MODULES) -> str:
    """The package in ``folder`` as the text of one file.

    Raises:
        MergeError: something in it can't be merged.
    """
    present = {path.stem for path in folder.glob("*.py")} - LEFT_OUT
    if odd := set(modules) - present | {p.parent.name for p in folder.glob("*/*.py")} - LEFT_OUT:
        raise MergeError(f"no modules of the package, or in a folder of their own: {sorted(odd)}")
    modules = (*modules, *sorted(present - set(modules)))
    parsed = {name: _parse(name, _read(folder, name)) for name in modules}
    exported = _exported(_read(folder, "__init__"), parsed)
    ordered = [parsed[name] for name in _in_order(parsed, modules)]
    version = _version(_read(folder, "version"))
    contents = "\n".join(_contents(module) for module in ordered)
    parts = [
        HEADER.format(version=version, contents=contents),
        "",
        *_imports(ordered),
        "",
        exported,
    ]
    for module in ordered:
        parts += ["", "", *_banner(f"{module.name}\n\n{module.about}"), "", "", module.text]
    parts += ["", "", *_banner(f"license\n\n{LICENSE}")]
    return "\n".join(parts) + "\n"


def _read(folder: Path, name: str) -> str:
    return (folder / f"{name}.py").read_text("utf-8")


def _version(source: str) -> str:
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise MergeError("version.py does not tell the version")
    return match[1]


def _contents(module: _Module) -> str:
    title = module.about.split("\n")[0]
    return textwrap.fill(title, WIDTH, initial_indent=f"    {module.name:<14}",
                         subsequent_indent=" " * 18)  # fmt: skip


def _banner(text: str) -> list[str]:
    lines: list[str] = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, WIDTH - 2) or [""]
    return [BANNER, *(f"# {line}".rstrip() for line in lines), BANNER]


def _parse(name: str, source: str) -> _Module:
    tree = ast.parse(source)
    module = _Module(name, about=ast.get_docstring(tree) or "")
    if not module.about:
        raise MergeError(f"{name}.py has no docstring for the contents")
    head = 0  # the last line of docstring and imports
    for position, node in enumerate(tree.body):
        typed = _is_typing(node)
        if position and not typed and not isinstance(node, (ast.Import, ast.ImportFrom)):
            module.defines.update(_defined(node))
            module.needs_now.update(_looked_up(node))
            if node.lineno <= head:
                raise MergeError(f"{name}.py:{head}: another statement on the line of an import")
            continue
        if module.needs_now or module.defines:
            raise MergeError(f"{name}.py:{node.lineno}: an import after other code")
        head = node.end_lineno or node.lineno
        for part in node.body if isinstance(node, ast.If) else [node] if position else []:
            _take_import(module, part, module.typed if typed else module.imports)
    late = list(_late_imports(tree))
    for node in late:
        _take_import(module, node, module.imports)
    _check_inside(name, tree, late)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.start[0] <= head:
            raise MergeError(f"{name}.py:{token.start[0]}: a comment among imports would be lost")
    module.text = "\n".join(_without(source.split("\n"), late)[head:]).strip("\n")
    return module


def _late_imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """Imports of the package at the beginning of functions, which spare an import their time."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            body = function.body[1:] if ast.get_docstring(function) else function.body
            for node in body[:-1]:
                if not isinstance(node, ast.ImportFrom) or not _is_ours(node):
                    break
                yield node


def _is_ours(node: ast.ImportFrom) -> bool:
    return not node.level and (node.module or "").startswith(f"{PACKAGE}.")


def _without(lines: list[str], nodes: list[ast.ImportFrom]) -> list[str]:
    """The lines without those of imports, and without an empty one after them."""
    gone: set[int] = set()
    for node in nodes:
        end = node.end_lineno or node.lineno
        gone.update(range(node.lineno, end + 1))
        if not lines[end].strip():
            gone.add(end + 1)
    return [line for number, line in enumerate(lines, 1) if number not in gone]


def _is_typing(node: ast.stmt) -> bool:
    test = node.test if isinstance(node, ast.If) and not node.orelse else None
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _take_import(module: _Module, node: ast.stmt, into: _Imports) -> None:
    where = f"{module.name}.py:{node.lineno}"
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == PACKAGE:
                raise MergeError(f"{where}: import the package's modules by name: from ... import")
            into.plain.add((alias.name, alias.asname or ""))
        return
    if not isinstance(node, ast.ImportFrom):
        raise MergeError(f"{where}: something else than an import, for type checkers only")
    source = node.module or ""
    for alias in node.names:
        if node.level or alias.name == "*" or source == PACKAGE:
            raise MergeError(f"{where}: not an import by name from a module of the package")
        if alias.asname:
            raise MergeError(f"{where}: {alias.name} is imported under another name")
        if source == "__future__" and alias.name != "annotations":
            raise MergeError(f"{where}: {alias.name} would hold for all modules")
        if source.startswith(f"{PACKAGE}."):
            module.uses[alias.name] = source.removeprefix(f"{PACKAGE}.")
        elif source != "__future__":
            into.named.add((source, alias.name))


def _check_inside(name: str, tree: ast.Module, late: list[ast.ImportFrom]) -> None:
    """Refuse what would not mean the same in the one file."""
    for node in ast.walk(tree):
        where = f"{name}.py:{getattr(node, 'lineno', 0)}"
        inside = node not in tree.body and node not in late
        if isinstance(node, (ast.Import, ast.ImportFrom)) and inside:
            sources = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            sources += [alias.name for alias in node.names]
            ours = any(source.split(".")[0] == PACKAGE for source in sources)
            relative = isinstance(node, ast.ImportFrom) and node.level
            if relative or (
                ours and not any(node in ast.walk(n) for n in tree.body if _is_typing(n))
            ):
                raise MergeError(f"{where}: an import of the package that is not at a top")
        elif isinstance(node, ast.Name) and node.id in ORIGINS:
            raise MergeError(f"{where}: {node.id} is another one in the one file")


def _defined(node: ast.AST) -> Iterator[str]:
    """The names that a statement of a module defines there."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
        return
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.alias):  # an import under a condition
        yield (node.asname or node.name).split(".")[0]
    for child in ast.iter_child_nodes(node):
        yield from _defined(child)


def _looked_up(node: ast.AST) -> Iterator[str]:
    """The names that running a statement looks up; the bodies of functions run later."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        now: list[ast.AST] = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        if not isinstance(node, ast.Lambda):
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
    imported: dict[str, str] = {}
    for module in modules.values():
        for name in sorted(module.defines):
            if name in owners:
                raise MergeError(f"{name} is defined in {owners[name]}.py and {module.name}.py")
            if hasattr(builtins, name) or (name.startswith("__") and name != "__version__"):
                raise MergeError(f"{name} of {module.name}.py would hold for all modules")
            owners[name] = module.name
    for module in modules.values():
        for name, origin in sorted([*module.imports.bound(), *module.typed.bound()]):
            if imported.setdefault(name, origin) != origin:
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
    now, typed = _Imports(), _Imports()
    for module in modules:
        now.plain |= module.imports.plain
        now.named |= module.imports.named
        typed.plain |= module.typed.plain
        typed.named |= module.typed.named
    typed.plain -= now.plain
    typed.named -= now.named
    lines = ["from __future__ import annotations"]
    for third in (False, True):
        lines += ["", *_rendered(now, third)]
    later = [line for third in (False, True) for line in _rendered(typed, third)]
    if later:
        lines += ["", "if TYPE_CHECKING:", *(f"    {line}" for line in later)]
    return lines


def _rendered(imports: _Imports, third: bool) -> Iterator[str]:
    def rank(name: str) -> tuple[int, str]:  # constants, classes, then the others
        return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)

    for name, asname in sorted(imports.plain):
        if (name.split(".")[0] in THIRD_PARTY) is third:
            yield f"import {name}{f' as {asname}' if asname else ''}"
    for source in sorted({source for source, _ in imports.named}):
        if (source.split(".")[0] in THIRD_PARTY) is not third:
            continue
        names = sorted((name for where, name in imports.named if where == source), key=rank)
        line = f"from {source} import {', '.join(names)}"
        if len(line) <= WIDTH:
            yield line
        else:
            yield from [f"from {source} import (", *(f"    {name}," for name in names), ")"]


def _exported(source: str, modules: dict[str, _Module]) -> str:
    """The ``__all__`` of the package, as it stands there; it has nothing else of its own."""
    tree = ast.parse(source)
    init = _Module("__init__", "")
    text = ""
    for node in tree.body[1:]:
        if isinstance(node, ast.ImportFrom):
            _take_import(init, node, init.imports)
        elif isinstance(node, ast.Assign) and list(_defined(node)) == ["__all__"]:
            text = "\n".join(source.split("\n")[node.lineno - 1 : node.end_lineno])
            init.defines.update(ast.literal_eval(node.value))
        else:
            raise MergeError(f"__init__.py:{node.lineno}: neither an import by name nor __all__")
    if not text:
        raise MergeError("__init__.py has no __all__")
    _check_names({**modules, "__init__": _Module("__init__", "", uses=init.uses)})
    if missing := init.defines - init.uses.keys():
        raise MergeError(f"__init__.py exports {sorted(missing)}, which it does not import")
    return text


def check(text: str, current: str) -> tuple[bool, str]:
    """Whether a copy is current, and a sentence that says so and names its version."""
    version, ours = (
        match[1] if (match := re.search(r'"""clore-client (\S+) in one file', part)) else "unknown"
        for part in (text, current)
    )
    if text == current:
        return True, f"current, version {version}"
    if version == ours:
        return False, f"not current: its version is {version}, as the package's, but it differs"
    return False, f"not current: its version is {version}, the package's {ours}"


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
        copy = Path(options.check).read_text("utf-8", "replace")
    except OSError as error:
        print(f"{options.check}: {error.strerror}", file=sys.stderr)
        return 2
    same, verdict = check(copy, text)
    print(f"{options.check}: {verdict}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
