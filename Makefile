# make demo, make test and make gpu do all their own set-up. PYTHON is the interpreter that makes the environment.
PYTHON ?= python3
GPU_PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test files run in as many processes, a thread each: torch's threads would wait for each other, busily.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*) setup.py
STAGES ?=
MINUTES ?= 10
OUT ?= out/gpu
DIGITS ?= out/digits32

.PHONY: demo test test-full train-digits lint docs gpu clean

demo: $(READY)
	$(BIN)/admfast sample digits32 --classes 0-9 --per-class 8 --steps 50 --guidance 2 --out out/demo --overwrite

test: $(READY) lint
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-full: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/accelerate/requirements.txt
	$(PYTEST) $(PYTEST_FLAGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests build the site too. It stops at a broken link; the variable silences an advertisement.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The three networks that ship, from nothing: hours. Interrupted, it goes on where it was.
train-digits: $(READY)
	for kind in diffusion classifier upsampler; do \
	  $(BIN)/admfast train $$kind --preset digits32 --out $(DIGITS)/$$kind --save-every 200 && \
	  $(BIN)/admfast train export $(DIGITS)/$$kind --out $(DIGITS)/$$kind.safetensors --dtype float16 || exit 1; \
	done

# Needs a python whose torch has CUDA; installs nothing and needs no network.
gpu:
	$(GPU_PYTHON) -m bench.gpu --stages "$(STAGES)" --minutes $(MINUTES) --out "$(OUT)"

# The versions are those that were tested; torch is pinned so that the same build comes everywhere.
$(READY): constraints.txt pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy "setuptools>=80" wheel ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[demo,dev,docs]"
	touch $(READY)

clean:
	rm -rf build admfast/*.so admfast/_build_info.json $(VENV)
