# Every target sets itself up: `make demo` works on a machine with only Python >= 3.11, make and a C compiler.
PYTHON ?= python3
VENV ?= .venv
DATA ?= ../shared/data
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0
LIBTPU := libtpu==0.0.42.1
WORKERS ?= 2

# Compiled steps are kept between runs and shared by the subprocesses of the tests.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1

.DEFAULT_GOAL := help
.PHONY: help install demo demo-compare demo-images real test test-all test-beam parity parity-golden lint format bench tpu-aot compile-ahead clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the project with pinned dependencies

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is too old: Python >= 3.11 is needed; name one with PYTHON=..., e.g. make install PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "python venv is missing; on Debian: apt install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train on the scene world, evaluate, caption four scenes: runs/demo
	$(PY) -m experiments.demo --workdir=runs/demo

demo-images: $(STAMP) ## train until scenes are drawn from captions, and read what was drawn: runs/demo-images
	$(PY) -m experiments.demo_images --workdir=runs/demo-images

demo-compare: $(STAMP) ## the demo, with and without a visual loss at equal budget
	$(PY) -m experiments.demo --workdir=runs/demo --compare

real: $(STAMP) ## real data from DATA=folder (default ../shared/data): convert, train, evaluate
	@test -d '$(DATA)' || { echo "make real: there is no folder $(DATA); name the one with the raw data: make real DATA=/path/to/data"; exit 1; }
	$(PY) -m data_pipelines.real --data='$(DATA)' --output=data/real
	$(PY) -m unihetero_jax train --config=experiments/real_small.py --workdir=runs/real

test: $(STAMP) ## the default test suite
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal

test-all: $(STAMP) ## with the slow tests: random kills, several processes, collapse training, further variants
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m ''

test-beam: ## preparations on Apache Beam against local ones, in an environment of their own: .venv-beam
	test -x .venv-beam/bin/python || $(PYTHON) -m venv .venv-beam
	.venv-beam/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,beam]'
	.venv-beam/bin/python -m pytest -q tests/test_preparation.py

parity: .venv-parity/.installed ## imported models against torch, in an environment of its own: .venv-parity
	.venv-parity/bin/python -m pytest -q tests/parity

parity-golden: .venv-parity/.installed ## write anew what torch computes of tiny models: tests/parity/golden
	cd tests && ../.venv-parity/bin/python -m parity.models

.venv-parity/.installed: pyproject.toml constraints.txt
	test -x .venv-parity/bin/python || $(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' '$(TORCH)'
	@touch $@

lint: $(STAMP) ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

format: $(STAMP) ## let ruff fix and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(STAMP) ## loader, attention, memory, checkpoints, option scoring, train step against PyTorch: benchmarks/results (installs torch, webdataset)
	@$(PY) -c 'import torch, webdataset' 2>/dev/null || \
	  $(PY) -m pip install --disable-pip-version-check -c constraints.txt '$(TORCH)' webdataset
	$(PY) -m benchmarks.loader --full
	$(PY) -m benchmarks.mixture_scale
	$(PY) -m benchmarks.decode
	$(PY) -m benchmarks.attention
	$(PY) -m benchmarks.memory
	$(PY) -m benchmarks.checkpoint
	$(PY) -m benchmarks.packed_scoring
	$(PY) -m benchmarks.objective_cost
	$(PY) -m benchmarks.train_step

tpu-aot: .tpu-aot/.installed ## the compiler for TPUs, for `compile` on a machine without any: .tpu-aot

.tpu-aot/.installed: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target=.tpu-aot '$(LIBTPU)'
	@touch $@

compile-ahead: $(STAMP) tpu-aot ## every size of experiments/pretrain.py for TPU slices and GPU servers: benchmarks/results (hours)
	$(PY) -m benchmarks.compile_ahead

clean: ## remove what was installed and compiled; runs and data stay
	rm -rf $(VENV) .tpu-aot .jax_cache .pytest_cache .ruff_cache
