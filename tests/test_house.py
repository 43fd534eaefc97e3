"""The layout of the package: imports in one direction, sizes that can be read, upstream internals in compat.py."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import hft_cli

TESTS = Path(__file__).parent
PACKAGE = Path(hft_cli.__file__).parent
PROJECT = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])]
DEPENDENCIES_OF_EXTRAS = {"submitit"}  # not declared, because another package brings them
# A package imports only from itself and from those before it; `root` is the files of hft_cli/ itself.
ORDER = (
    "root", "config", "checkpoint", "data", "method", "launch", "plan", "live", "training", "evaluation", "runner",
    "report", "integrations", "cli",
)  # fmt: skip
LONGEST_FILE, MEDIAN_FILE, LONGEST_FUNCTION, LONGEST_README = 500, 200, 60, 260  # lines
LONGEST_TEST_NAME = 60  # characters
ENTRY = PACKAGE / "__main__.py"
FACE = PACKAGE / "__init__.py"  # names what other packages offer, and imports it when it is used


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path not in (ENTRY, FACE))


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


def test_half_of_the_files_are_short():
    assert median(len(path.read_text().splitlines()) for path in sources() if path.name != "__init__.py") <= MEDIAN_FILE


def test_the_readme_is_read_in_a_few_minutes():
    assert len((TESTS.parent / "README.md").read_text().splitlines()) <= LONGEST_README


@pytest.mark.parametrize("package", ORDER[1:])
def test_the_readme_of_a_package_names_its_files(package):
    folder = PACKAGE / package
    entries = {path.name for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    text = (folder / "README.md").read_text()
    assert {name for name in entries if not re.search(rf"\b{re.escape(name)}", text)} <= {"__init__.py", "__main__.py"}


def test_the_name_of_a_test_is_short():
    names = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert not {name for name in names if len(name) > LONGEST_TEST_NAME}


def test_tests_are_where_their_module_is():
    folders = {path.name for path in TESTS.iterdir() if any(path.rglob("test_*.py"))} - {"end_to_end"}
    assert folders <= set(ORDER)
    strays = [
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("test_*.py")
        if not (PACKAGE / path.relative_to(TESTS).with_name(path.name.removeprefix("test_"))).exists()
        and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not strays


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


def names_no_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the locale."""
    words = {word.arg: word.value for word in call.keywords}
    name = ast.unparse(call.func)
    if name == "os.open" or "encoding" in words:
        return False
    if name.rpartition(".")[2] in ("open", "fdopen"):
        constants = [value.value for value in (*call.args, *words.values()) if isinstance(value, ast.Constant)]
        return not any(isinstance(value, str) and re.fullmatch(r"[rwax+]*b[rwax+]*", value) for value in constants)
    return bool(re.search(r"\.(read|write)_text$", name)) or ("text" in words and name.startswith("subprocess."))


def test_text_is_read_and_written_in_utf8():
    found = [
        f"{module(path)} line {node.lineno}: {ast.unparse(node)}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and names_no_encoding(node)
    ]
    assert not found


# --------------------------------------------------------------------------------------------------- upstream internals

COMPAT = sorted(PACKAGE.rglob("compat.py"))
TAG = re.compile(r"UPSTREAM: ([\w-]+) (\d[\d.]*\d)(?: with ([\w-]+) (\d[\d.]*\d))?: \S")
UPSTREAM = {"torch", "transformers", "trl", "deepspeed", "accelerate", "peft", "lm_eval", "submitit", "hydra"}


def test_upstream_tags_stand_in_compat_files_only():
    assert [path for path in sources() if "UPSTREAM:" in path.read_text() and path not in COMPAT] == []


def is_admitted(package: str, version: str) -> bool:
    """Whether pyproject.toml admits that version of a package."""
    if package == "Python":
        return SpecifierSet(PROJECT["requires-python"]).contains(version)
    name = canonicalize_name(package)
    ranges = [r.specifier for r in REQUIREMENTS if canonicalize_name(r.name) == name]
    return all(r.contains(version) for r in ranges) and bool(ranges or name in DEPENDENCIES_OF_EXTRAS)


@pytest.mark.parametrize("path", COMPAT, ids=module)
def test_every_compat_function_has_a_tag_and_a_test(path):
    text = path.read_text()
    untagged = [
        node.name
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not TAG.search(" ".join((ast.get_source_segment(text, node) or "").split()))
    ]
    assert not untagged
    assert text.count("UPSTREAM:") == len(TAG.findall(" ".join(text.split())))
    for first, first_version, second, second_version in TAG.findall(" ".join(text.split())):
        assert is_admitted(first, first_version)
        assert not second or is_admitted(second, second_version)
    assert (TESTS / path.parent.name / "test_compat.py").exists()


def test_only_compat_files_import_private_names_of_upstream():
    private = [
        f"{module(path)} imports {name}"
        for path in sources()
        if path not in COMPAT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UPSTREAM
        for name in (f"{node.module}.{alias.name}" for alias in node.names)
        if re.search(r"\._(?!_)", name)
    ]
    assert not private


def test_only_compat_files_use_private_attributes_of_others():
    private = [
        f"{module(path)} line {node.lineno}: {ast.unparse(node)}"
        for path in sources()
        if path not in COMPAT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[^_].*[^_]", node.attr)
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        if ast.unparse(node) != "os._exit"  # documented
    ]
    assert not private


def test_few_lines_are_exempt_from_lint():
    lines = [line for path in sources() for line in path.read_text().splitlines()]
    exempt = [line.strip() for line in lines if "# noqa" in line]
    assert len(exempt) <= 3
