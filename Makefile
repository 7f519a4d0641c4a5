# Everything works on a fresh machine: `make demo`, `make test`, `make check`, `make docs`.
# PYTHON (3.11 or newer) makes .venv; PYTHON_NEW (3.12 or newer) runs the kernels on the newest JAX.
# JOBS test files run side by side, in processes of some 4 GiB.

PYTHON ?= python3
PYTHON_NEW ?= $(shell for p in python3.12 python3.13 python3.14 \
	"$$HOME"/.pyenv/versions/3.12.*/bin/python; do \
	if "$$p" -c 'pass' 2>/dev/null; then echo "$$p"; break; fi; done)
JOBS ?= 2
BIN := .venv/bin
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15
KERNELS := tests/test_kernels_*.py -k "mosaic or lower or order or refus"
# Most of what tests compile runs once: LLVM's passes take longer than they save. Tests for which they
# do not, or that are about what the passes make, have them (`optimized` in tests/conftest.py).
QUICK := JAX_DISABLE_MOST_OPTIMIZATIONS=1
EIGHT := XLA_FLAGS="$$XLA_FLAGS --xla_force_host_platform_device_count=8"

# Most of what runs here are processes that import the same few hundred files.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint tests mesh-tests kernels-newest-jax check docs clients batch-on-ray report clean

demo: .venv/demo.stamp
	$(BIN)/python examples/demo.py

test: lint tests mesh-tests kernels-newest-jax

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

tests: .venv/test.stamp
	$(QUICK) $(BIN)/python -m pytest -m "not long" $(SPREAD) --ignore tests/mesh

# Several devices in one process: eight made of a CPU, which JAX does as it starts.
mesh-tests: .venv/test.stamp
	$(EIGHT) $(QUICK) $(BIN)/python -m pytest -m "not long" $(SPREAD) tests/mesh

kernels-newest-jax: $(if $(PYTHON_NEW),.venv-newest/stamp)
ifeq ($(PYTHON_NEW),)
	@echo "SKIPPED: the kernel suite on the newest JAX needs Python 3.12 (set PYTHON_NEW)"
else
	$(QUICK) .venv-newest/bin/python -m pytest -m "not long" $(SPREAD) $(KERNELS)
endif

# What takes longer than a change should wait for: documentation, notebooks, hundreds of seeded runs,
# and the cases of `make test` that say much the same as others.
check: .venv/check.stamp $(if $(PYTHON_NEW),.venv-newest/stamp)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean
	$(QUICK) $(BIN)/python -m pytest -m long $(SPREAD) --ignore tests/mesh
	$(EIGHT) $(QUICK) $(BIN)/python -m pytest -m long $(SPREAD) tests/mesh
	$(if $(PYTHON_NEW),$(QUICK) .venv-newest/bin/python -m pytest -m long $(SPREAD) $(KERNELS))

# Into site/; a broken link is an error.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

# Programs written for SGLang, each in an environment of its own (docs/from_sglang.md).
clients: .venv/demo.stamp
	$(BIN)/python -m tests.clients

# Batch jobs on Ray, in an environment that has it (docs/guide/batch_jobs.md).
batch-on-ray: .venv/demo.stamp
	$(BIN)/python -m tests.batch_on_ray

report: .venv/bench.stamp
	$(BIN)/python -m benchmarks.report

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	touch $@

.venv/bench.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

.venv/test.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/check.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test,check]'
	touch $@

.venv/docs.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

.venv-newest/stamp: pyproject.toml
	$(PYTHON_NEW) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet jax numpy pytest pytest-timeout pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache build dist site *.egg-info
