# Every target is one command that also works by itself.
.DEFAULT_GOAL := help
PY := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)/bin/

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:  ## make the environment
	bash -c 'source ci/env.sh'

fmt:  ## format
	$(PY)ruff format . && $(PY)ruff check --fix .

lint:  ## ruff
	$(PY)ruff check . && $(PY)ruff format --check .

types:  ## mypy, strict
	$(PY)mypy

layers:  ## import-linter
	$(PY)lint-imports

test:  ## unit tests with branch coverage
	$(PY)pytest -q -m "not slow and not browser" --cov

gpu-check:  ## kernels for the device: references in the interpreter, machine code ahead of time; 9 is NOT_RUN
	$(PY)python ci/gpu_check.py
	$(PY)pytest -q tests/kernels/gpu tests/kernels/test_registry.py -k "gpu or cuda"

test-gpu:  ## parity on a CUDA device; one archive of evidence in $OUT
	bash ci/run_gpu.sh

attacks:  ## hostile files, and 2,000 damaged ones
	$(PY)pytest -q tests/attacks

attacks-long:  ## 200,000 damaged files (minutes)
	$(PY)python -m tests.attacks.mutants 200000

notebooks:  ## run the committed notebooks again and keep their outputs
	$(PY)python ci/refresh_notebooks.py

report:  ## the suite on the bundled model
	bash ci/run_papermill.sh

size:  ## lines of code against the budget
	$(PY)python ci/size.py

check:  ## what CI runs
	bash ci/test.sh

slow:  ## minutes of work that CI has no time for
	$(PY)pytest -q -m slow

bench:  ## MODEL (pygmy) against its ceiling, with intervals; PEERS="--peer llama.cpp"; evidence in reports/
	$(PY)python -m apr_core bench $(or $(MODEL),pygmy) --context 128,1024 $(PEERS) \
	  --out reports/bench-$$(date +%Y%m%d-%H%M%S)

bench-formats:  ## opening, encoding and decoding against the field's own, in ratios
	$(PY)python benchmarks/bench_formats.py

bench-gate:  ## the gate's one pass against the machine's read bandwidth, and its starts
	$(PY)python benchmarks/bench_gate.py

test-browser:  ## the last report and the notebooks in a real browser
	$(PY)pytest -q -m browser tests/browser

nbval-stability:  ## nbval 20 times at 1 thread, at 2, and on the portable kernels (hours; goes on where it stopped)
	$(PY)python ci/nbval_stability.py

clean:  ## caches
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage

.PHONY: help setup fmt lint types layers test test-gpu attacks attacks-long notebooks report size check slow gpu-check bench bench-formats bench-gate test-browser nbval-stability clean
