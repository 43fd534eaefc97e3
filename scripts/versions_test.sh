#!/usr/bin/env bash
# Install the lowest or the newest versions that pyproject.toml admits into an environment of their own, and run the
# tests marked `versions` there: every module is imported, every use of upstream internals is pinned, a run of two steps
# trains on one process and on two ranks with ZeRO-2, and the draws are the same bytes.
#
#   scripts/versions_test.sh lowest|newest [PYTHON [ENVIRONMENT]]
#
# PYTHON defaults to python3.11. ENVIRONMENT is a folder that is made and kept; by default it is removed at the end.
# PyPI's torch for Linux brings several GB of CUDA packages. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# takes the build for CPUs.
set -euo pipefail
bound=${1:?usage: scripts/versions_test.sh lowest|newest [PYTHON [ENVIRONMENT]]}
python=${2:-python3.11}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
environment=${3:-$work/environment}

"$python" - "$bound" >"$work/constraints.txt" <<'PYTHON'
import re
import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
if sys.argv[1] == "lowest":
    print(*(re.sub(r">=([^,]+),<.*", r"==\1", line) for line in requirements if ">=" in line), sep="\n")
elif sys.argv[1] != "newest":
    sys.exit(f"{sys.argv[1]} is neither lowest nor newest")
PYTHON

"$python" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
    --constraint "$work/constraints.txt" --editable ".[dev]"
if ! "$environment/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # The CUDA builds of torch bring triton, which DeepSpeed imports; triton 3.2 fails on that without a GPU.
    "$environment/bin/python" -m pip uninstall --quiet --yes triton
fi
"$environment/bin/python" -m pip list --disable-pip-version-check |
    grep -iE '^(torch|transformers|trl|deepspeed|accelerate|datasets|peft|hydra-core|omegaconf|lm_eval|pydantic) '
"$environment/bin/python" -m pytest -m versions
