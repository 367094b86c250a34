#!/usr/bin/env bash
# What CI and `make check` run: lint, types, layers, tests with branch coverage, notebooks against their references.
# Two lanes at a time, for the two cores that CI has. Prints the time of each part; the first lane that fails ends it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$apr_root"
export OMP_NUM_THREADS=1
logs="$(mktemp -d)"
trap 'kill -- -$(jobs -p) 2>/dev/null || true; rm -rf "$logs"' EXIT

part() {
    local name="$1" start="$SECONDS"
    shift
    echo "== $name"
    "$@"
    echo "== $name: $((SECONDS - start)) s"
}

# Run two functions beside each other, the first in the background; its output is shown whole when both are done.
lanes() {
    local failed=0 other
    set -m  # a process group of its own, so that it ends with this script
    "$1" >"$logs/$1" 2>&1 &
    other=$!
    set +m
    "$2"
    wait "$other" || failed=$?
    cat "$logs/$1"
    return "$failed"
}

gpu_check() {  # 9 is NOT_RUN: no triton
    python ci/gpu_check.py || [ "$?" -eq 9 ]
}

static() {
    part ruff ruff check .
    part format ruff format --check .
    part mypy mypy
    part layers lint-imports
    part gpu-check gpu_check
}

# These compile every kernel; two workers would each compile the same for itself.
compiled=(tests/kernels tests/engines/test_cpu.py)
kernels() {
    part kernels pytest -q "${compiled[@]}" --cov --cov-report= --cov-fail-under=0
}

nbval() {
    part nbval pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout 240 -p no:cacheprovider notebooks
}

zoo() {
    part zoo python -m apr_core zoo matrix --quick --out "$logs/zoo" pygmy
}

lanes kernels static
part pytest pytest -q -n logical --maxprocesses 4 --dist loadfile -m "not slow and not browser" \
    "${compiled[@]/#/--ignore=}" --cov --cov-append --cov-report=term:skip-covered --durations=15
lanes nbval zoo
