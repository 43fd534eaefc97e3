"""pyproject.toml and constraints.txt: every import is declared, every range has two ends, both admit what was tried."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for line in sum(EXTRAS.values(), PROJECT["dependencies"])]
THIRD_PARTY = [requirement for requirement in REQUIREMENTS if requirement.name != PROJECT["name"]]
PINNED = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
# Modules whose distribution has another name.
DISTRIBUTIONS = {"hydra": "hydra-core", "yaml": "pyyaml", "sklearn": "scikit-learn"}
PROGRAMS = {"axolotl", "swift", "vllm"}  # that load a plugin of ours; nothing else imports it
BROUGHT_ALONG = {"evaluate": "lm-eval", "submitit": "hydra-submitit-launcher"}  # imported only beside that package


@pytest.mark.parametrize("requirement", THIRD_PARTY, ids=lambda r: r.name)
def test_every_range_has_a_tried_lower_and_upper_end(requirement):
    assert sorted(spec.operator for spec in requirement.specifier) == ["<", ">="]


@pytest.mark.parametrize("requirement", THIRD_PARTY, ids=lambda r: r.name)
def test_the_constraints_lie_within_the_ranges(requirement):
    name = canonicalize_name(requirement.name)
    if name not in PINNED:
        assert any(name in map(canonicalize_name, EXTRAS.get(extra, ())) or extra == name for extra in EXTRAS)
        return
    assert requirement.specifier.contains(PINNED[name], prereleases=True)


def test_every_imported_package_is_declared():
    imported = {
        name.partition(".")[0]
        for path in (ROOT / "hft_cli").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    } - {*sys.stdlib_module_names, "hft_cli"}
    declared = {canonicalize_name(requirement.name) for requirement in THIRD_PARTY}
    names = {canonicalize_name(DISTRIBUTIONS.get(name, BROUGHT_ALONG.get(name, name))) for name in imported}
    assert not names - declared - PROGRAMS


def test_every_declared_package_is_imported_or_started():
    source = "\n".join(path.read_text() for path in (ROOT / "hft_cli").rglob("*.py"))
    modules = {distribution: module for module, distribution in DISTRIBUTIONS.items()}
    unused = [
        name
        for name in (Requirement(line).name for line in PROJECT["dependencies"])
        if not re.search(rf"(import|from) {modules.get(name, name.replace('-', '_'))}\b", source)
    ]
    assert unused == ["ninja"]  # torch starts it to build DeepSpeed's extensions


@pytest.mark.xdist_group("a_group")
def test_groups_of_tests_stay_on_one_worker(request):
    """Tests of a group share runs of a minute. `--dist loadgroup` knows a group by the end of the id of its tests."""
    if request.config.getoption("loadgroup", None):
        assert request.node.nodeid.endswith("@a_group")
