# Every command of the project; `make` alone lists them.
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo-out

.DEFAULT_GOAL := help
.PHONY: help demo test lint format fuzz bench bench-smoke shootout readme kernel-report gpu-test gpu-pack gpu-session tune native native-report wheel sdist-check compatibility clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/ready: requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; run make PYTHON=python3.12, say"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PIP_FLAGS) -r requirements.txt
	AMSKV_CUDA=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(VENV)/ready  ## digits and avatars from one seed under every policy: tables and pictures (3 minutes)
	$(BIN)/python -m examples.demo

shootout: $(VENV)/ready  ## every cache policy at equal bytes, 100 digits and 40 avatars each: tables and plots (half an hour; goes on where it was cut off)
	$(BIN)/python -m examples.shootout digits --out $(OUT)/digits
	$(BIN)/python -m examples.shootout avatars --images 40 --out $(OUT)/avatars

test: lint  ## everything that needs no GPU
	$(BIN)/python -m pytest

lint: $(VENV)/ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready  ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: $(VENV)/ready  ## 100,000 random calls per backend of the CPU, 10,000 random plans; goes on where it stopped (hours)
	$(BIN)/python -W ignore -m tools.fuzz --calls 100000 --plans 10000 --out tools/reports/fuzz.json

bench: $(VENV)/ready  ## every benchmark this machine can run, the CPU's on one thread too: results, tables, plots (5 to 10 minutes)
	$(BIN)/python -m benchmarks cpu --device cpu --threads 1 --no-docs
	$(BIN)/python -m benchmarks

bench-smoke: $(VENV)/ready  ## a few benchmark calls, to see that they run
	$(BIN)/python -m pytest benchmarks/suites/smoke.py

readme: $(VENV)/ready  ## write the tables of README and docs from committed results
	$(BIN)/python -m benchmarks.report.readme

kernel-report: $(VENV)/ready  ## compile every Triton kernel offline, four architectures, two Tritons; fails on spills
	$(BIN)/python -W ignore -m tools.kernel_report
	$(BIN)/python -W ignore -m tools.kernel_report --triton 3.6.0

gpu-test: $(VENV)/ready  ## everything that needs a GPU; writes tests/gpu-reports
	$(BIN)/python -m pytest -m gpu

gpu-pack: $(VENV)/ready  ## what a GPU machine without a network lacks (needs nvcc); writes build/gpu-pack
	$(BIN)/python -m tools.gpu_pack

gpu-session: gpu-pack  ## on a GPU: tests, benchmarks, profile, tiles, checkers (an hour); writes build/gpu-session
	$(BIN)/python -m tools.gpu_session

tune: $(VENV)/ready  ## measure tile candidates on the GPU at hand
	$(BIN)/python -m tools.tune

native: $(VENV)/ready  ## build the CUDA library into this checkout (needs nvcc)
	AMSKV_CUDA=1 $(BIN)/pip install --quiet --no-deps --no-build-isolation -e .

native-report: native  ## registers, spills and instructions of the CUDA library
	$(BIN)/python tools/native_report.py

wheel: $(VENV)/ready  ## one wheel for every Python and torch, tested in a clean environment (CUDA=pip fetches nvcc)
	AMSKV_CUDA=$(CUDA) $(BIN)/python tools/make_wheel.py

sdist-check: $(VENV)/ready  ## the source archive, tried in empty environments (PYTHONS="python3.10 python3.12")
	$(BIN)/python -m tools.make_sdist --try $(or $(PYTHONS),$(PYTHON))

compatibility: $(VENV)/ready  ## the wheel on every Python and torch, tests on an old stack (20 GB of download; goes on where it stopped)
	AMSKV_CUDA=1 $(BIN)/python -m tools.compatibility --suite

clean:  ## remove what was built, the virtual environment too
	rm -rf $(VENV) build dist demo-out *.egg-info
