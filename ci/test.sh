#!/usr/bin/env bash
# What CI and `make check` run: lint, types, layers, tests with branch coverage, notebooks against their references.
# Prints the time of each part and stops at the first that fails.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$apr_root"

part() {
    local name="$1" start="$SECONDS"
    shift
    echo "== $name"
    "$@"
    echo "== $name: $((SECONDS - start)) s"
}

part ruff ruff check .
part format ruff format --check .
part mypy mypy
part layers lint-imports
part pytest pytest -q -m "not slow and not browser" --ignore=tests/attacks --cov --cov-report=term:skip-covered
part attacks pytest -q tests/attacks
part zoo python -m apr_core zoo matrix --quick --out "$(mktemp -d)" pygmy
part nbval pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout 240 -p no:cacheprovider notebooks
