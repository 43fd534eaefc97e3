"""Documents, comments and docstrings name only files and modules that exist."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SKIPPED = re.compile(r"\.venv|\.git|runs|multirun|build|dist|__pycache__|\..*_cache|\.hypothesis|.*\.egg-info")
WHOLE = {".md", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".jinja", ""}  # read whole; of Python: comments and strings
FOLDERS = ("hft_cli/", "conf/", "tests/", "scripts/", ".github/")
# Files of Allen AI's open-instruct, whose settings conf/suite/general.yaml cites.
ELSEWHERE = ("scripts/eval/",)
UPSTREAM = {
    "torch",
    "transformers",
    "trl",
    "deepspeed",
    "peft",
    "accelerate",
    "datasets",
    "lm_eval",
    "hydra",
    "submitit",
}

# A name that ends like a file of the project. Data files (.json, .jsonl, …) are mostly a run's or a user's: they count
# only below one of the project's folders.
NAMED = re.compile(r"(?<![\w./\-{<$=:~])((?:[\w.*-]+/)*[\w*-]+\.(?:py|sh|sbatch|md|jinja|toml|yml))\b(?![/(])")
BELOW = re.compile(rf"(?<![\w./-])((?:{'|'.join(map(re.escape, FOLDERS))})[\w./*-]*[\w*])")
MODULE = re.compile(r"\bhft_cli((?:\.\w+)+)")
STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}  # Python 3.12 takes f-strings apart
LINK = re.compile(r"\]\(([^)#\s]+)")
WRITTEN = {"report.md", "runs.md", "program.py"}  # files that hft writes


@cache
def files() -> tuple[Path, ...]:
    """The files of the checkout, without what tools and runs leave in it."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not SKIPPED.fullmatch(name)]
        found += [Path(folder) / name for name in names]
    return tuple(sorted(found))


def documents() -> list[Path]:
    texts = [path for path in files() if path.suffix in WHOLE | {".py"} and not path.name.startswith(".git")]
    return [
        path for path in texts if not any(part.endswith("_cache") for part in path.parts) and path.name != "LICENSE"
    ]


def prose(path: Path) -> str:
    """The text of a document; of a Python file its comments and docstrings, and of the package its messages too."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    kept = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        string = token.type in STRINGS
        docstring = string and token.string.startswith('"""')
        message = string and " " in token.string and path.is_relative_to(ROOT / "hft_cli")
        if token.type == tokenize.COMMENT or docstring or message:
            kept.append(token.string)
    return "\n".join(kept)


def exists(name: str, document: Path) -> bool:
    """Whether there is such a file: from the root, the package, the document's folder, or anywhere by name alone."""
    if name.startswith(ELSEWHERE) or name in WRITTEN:
        return True
    name = name.replace("hft_cli/conf", "conf")  # where the wheel has it
    if (first := name.partition("/")[0]) in UPSTREAM and "/" in name:
        spec = importlib.util.find_spec(first)
        return spec is not None and (Path(str(spec.origin)).parents[1] / name).exists()
    pattern = re.sub(r"\b[A-Z]{2,}\b", "*", name) if not (ROOT / name).exists() else name  # NAME stands for any name
    for folder in (ROOT, ROOT / "hft_cli", document.parent):
        if any(folder.glob(pattern)) if "*" in pattern else (folder / pattern).exists():
            return True
    return "/" not in name and any(fnmatch(path.name, pattern) for path in files())


def missing_files(text: str, document: Path) -> Iterator[str]:
    names = {*NAMED.findall(text), *BELOW.findall(text)}
    yield from sorted(name for name in names if not exists(name.rstrip("."), document))


def missing_modules(text: str) -> Iterator[str]:
    for match in MODULE.finditer(text):
        folder, parts = ROOT / "hft_cli", match[1].strip(".").split(".")
        while parts and (folder / parts[0]).is_dir():
            folder, parts = folder / parts[0], parts[1:]
        if not parts or parts[0].startswith("__"):
            continue
        module = folder / f"{parts[0]}.py"
        attribute = parts[1] if module.exists() and len(parts) > 1 else parts[0] if not module.exists() else None
        source = module if module.exists() else folder / "__init__.py"
        if attribute and not re.search(rf"\b{attribute}\b", source.read_text()):
            yield match[0]


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_only_what_exists(document):
    text = prose(document)
    missing = [*missing_files(text, document), *missing_modules(text)]
    if document.suffix == ".md":
        links = [target for target in LINK.findall(text) if "://" not in target and not target.startswith("mailto:")]
        missing += [target for target in links if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("text", ["see nothing.py", "conf/nothing/x.json", "`hft_cli.nothing`", "hft_cli.text.nothing"])
def test_a_name_of_nothing_is_noticed(text):
    assert [*missing_files(text, ROOT / "README.md"), *missing_modules(text)]


def test_names_of_a_run_and_of_a_user_are_not_ours():
    text = "RUN/draws.json chats.jsonl rounds/01-order/delta.safetensors /models/x/config.json conf/suite/*.yaml"
    assert not [*missing_files(text, ROOT / "README.md"), *missing_modules(text)]
