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
# The oldest torch that pyproject.toml allows, with its triton, in an environment of its own.
OLDEST ?= .venv-oldest
OLDEST_PAIR := "torch==2.11.*" "triton==3.6.*; platform_system == 'Linux'"
SMOKE := tests/test_imports.py tests/test_elsewhere.py tests/ops tests/models tests/solvers tests/engine \
  tests/sampling tests/parity tests/training/test_train_run.py tests/cli/test_cli_sample.py
DIGITS ?= out/digits32

.PHONY: demo test test-full test-oldest train-digits lint docs sdist wheel gpu clean

demo: $(READY)
	$(BIN)/admfast sample digits32 --classes 0-9 --per-class 8 --steps 50 --guidance 2 --out out/demo --overwrite

test: $(READY) lint
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-full: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/accelerate/requirements.txt
	$(PYTEST) $(PYTEST_FLAGS)

# A smoke test. It downloads another torch, and runs in an unpacked sdist: the compiled ops of a checkout are
# those of one torch.
test-oldest: sdist
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	rm -rf build/oldest && mkdir -p build/oldest
	tar -xzf dist/admfast-*.tar.gz -C build/oldest --strip-components 1
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	  $(OLDEST_PAIR) numpy "setuptools>=80" wheel ninja
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  -e "build/oldest[demo,dev]" $(OLDEST_PAIR)
	cd build/oldest && OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(abspath $(OLDEST))/bin/python -m pytest \
	  -n $(WORKERS) --dist loadfile -m "not slow" $(SMOKE) $(PYTEST_FLAGS)

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
	  $(BIN)/admfast train export $(DIGITS)/$$kind --out $(DIGITS)/$$kind.safetensors --dtype float16 --overwrite || exit 1; \
	done

# Both into dist/. The wheel is made of the sdist, which shows that it is whole; it is for this Python, this
# torch and this kind of machine, or for any where nothing could be compiled (ADMFAST_BUILD=none).
sdist: $(READY)
	rm -rf dist/admfast-* admfast.egg-info
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

wheel: sdist
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps \
	  --wheel-dir dist dist/admfast-*.tar.gz

# Needs a python whose torch has CUDA; installs nothing and needs no network.
gpu:
	$(GPU_PYTHON) -m bench.gpu --stages "$(STAGES)" --minutes $(MINUTES) --out "$(OUT)"

# The versions are those that were tested; torch is pinned so that the same build comes everywhere.
$(READY): constraints.txt pyproject.toml $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy "setuptools>=80" wheel ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[app,demo,dev,docs,eval]"
	touch $(READY)

clean:
	rm -rf build dist admfast/*.so admfast/_build_info.json $(VENV)
