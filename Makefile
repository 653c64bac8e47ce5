# make demo, make test and make gpu do all their own set-up. PYTHON is the interpreter that makes the environment.
PYTHON ?= python3
GPU_PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*) setup.py
STAGES ?=
MINUTES ?= 10
BUDGET ?=
OUT ?= out/gpu

.PHONY: demo test test-full lint gpu clean

demo: $(READY)
	$(BIN)/admfast sample digits32 --classes 0-9 --per-class 8 --steps 50 --guidance 2 --out out/demo --overwrite

test: $(READY) lint
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

test-full: $(READY)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Needs a python whose torch has CUDA; installs nothing and needs no network.
gpu:
	STAGES=$(STAGES) MINUTES=$(MINUTES) BUDGET=$(BUDGET) OUT=$(OUT) $(GPU_PYTHON) -m bench.gpu

# The versions are those that were tested; torch is pinned so that the same build comes everywhere.
$(READY): constraints.txt pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy "setuptools>=80" wheel ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[demo,dev]"
	touch $(READY)

clean:
	rm -rf build admfast/*.so admfast/_build_info.json $(VENV)
