"""The layout of the package: imports in one direction, files and functions of a size that can be read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hft_cli

PACKAGE = Path(hft_cli.__file__).parent
# A package imports only from itself and from those before it; `root` is the files of hft_cli/ itself.
ORDER = (
    "root", "config", "checkpoint", "data", "method", "launch", "plan", "training", "evaluation", "runner", "report",
    "cli",
)  # fmt: skip
LONGEST_FILE, LONGEST_FUNCTION = 500, 60  # lines
ENTRY = PACKAGE / "__main__.py"


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != ENTRY)


def module(path: Path) -> str:
    return ".".join(("hft_cli", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def package_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "root"


def imports(path: Path) -> Iterator[str]:
    """Modules of hft_cli that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("hft_cli"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hft_cli"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if (PACKAGE.parent / inner.replace(".", "/")).with_suffix(".py").exists() else node.module


def test_every_package_is_listed_once():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} - {"assets"}
    assert folders == set(ORDER) - {"root"}


def test_a_package_imports_only_from_those_before_it():
    upwards = [
        f"{module(path)} imports {target}"
        for path in sources()
        for target in imports(path)
        if ORDER.index(package_of(target)) > ORDER.index(package_of(module(path)))
    ]
    assert not upwards


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {module(path): set(imports(path)) for path in sources()}
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys() - {name}}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph


def test_no_file_is_longer_than_can_be_read():
    lines = {module(path): len(path.read_text().splitlines()) for path in sources()}
    assert not {name: count for name, count in lines.items() if count > LONGEST_FILE}


def test_no_function_is_longer_than_a_page():
    functions = {
        f"{module(path)}.{node.name}": node.end_lineno - node.lineno + 1
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: count for name, count in functions.items() if count > LONGEST_FUNCTION}


def test_no_name_with_an_underscore_crosses_a_file():
    private = [
        f"{module(path)} imports {alias.name}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hft_cli")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not private
