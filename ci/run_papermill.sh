#!/usr/bin/env bash
# One command from a model file to four executed falsification notebooks and an HTML report.
#   bash ci/run_papermill.sh [--model PATH] [--reference PATH] [--device auto|cpu|cuda] [--only 00,20]
#                            [--out DIR] [--timeout-s N] [-p NAME VALUE]
# Exit code by the evidence: 0 nothing refuted, 5 something refuted, 11 inconclusive (README has the table).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" -m apr_core suite "$@"
