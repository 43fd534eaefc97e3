# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs, the first time.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := runs/demo

.PHONY: help demo demo-continual test test-slurm torture bench gpu-checks fuzz check lint types wheel-test versions clean

help:
	@echo "make demo        full and half fine-tuning and Half-Reset of the embedded model: a table and a figure, in minutes"
	@echo "make demo-continual  four skills one after the other, full against half fine-tuning: R, OP and BWT"
	@echo "make test        the tests"
	@echo "make test-slurm  the tests of scripts/slurm and of sweeps by submitit, on a SLURM set up for them (root, Debian)"
	@echo "make torture     kills and disk faults before each file operation of short runs, and at random moments (hours)"
	@echo "make gpu-checks  on a machine with GPUs: every engine, precision and optimizer, resume, and peak memory beside the plan"
	@echo "make fuzz        ten million random inputs for all that reads files, messages and arguments (an hour; installs atheris)"
	@echo "make check       lint, types and tests"
	@echo "make wheel-test  build the wheel, install it elsewhere, run it from an empty folder"
	@echo "make versions    quick tests with the lowest and with the newest versions that pyproject.toml admits (about 12 GB)"
	@echo "make clean       remove the environment and what was built"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "pip>=26.1"
	$(PIP) --no-compile --constraint constraints.txt --editable ".[dev]"
	@$(BIN)/python -m compileall -q -j 0 -x '/tests/' .venv >/dev/null || true # packages ship files for other versions of Python
	@touch $@

demo: .venv/installed
	$(BIN)/hft train -m experiment=demo output_dir=$(DEMO)
	$(BIN)/hft train +method=half_reset model.tuned="$(DEMO)/method=fft,train.learning_rate=0.001/model" model.base=pocket:model data=pocket_capitals \
		output_dir=$(DEMO)/half_reset
	$(BIN)/hft report $(DEMO) --out $(DEMO)/report

demo-continual: .venv/installed
	$(BIN)/hft train -m experiment=demo_continual output_dir=$(DEMO)-continual
	$(BIN)/hft report $(DEMO)-continual --out $(DEMO)-continual/report

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup

torture: .venv/installed
	$(BIN)/python scripts/torture.py --engine single --engine zero2

bench: .venv/installed
	mkdir -p runs
	$(BIN)/python scripts/bench/run.py --out runs/bench.json

gpu-checks: .venv/installed
	mkdir -p runs
	$(BIN)/python scripts/gpu_checks.py --out runs/gpu_checks.json

fuzz: .venv/installed
	$(PIP) "atheris>=3,<4"
	$(BIN)/python scripts/fuzz.py --runs 10000000

test-slurm: .venv/installed
	scripts/slurm_test.sh $(BIN)/python

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

check: lint types test

wheel-test: .venv/installed
	scripts/wheel_test.sh $(BIN)/python

versions:
	scripts/versions_test.sh lowest $(PYTHON)
	scripts/versions_test.sh newest $(PYTHON)

clean:
	rm -rf .venv build dist *.egg-info
