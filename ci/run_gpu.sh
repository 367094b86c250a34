#!/usr/bin/env bash
# Parity on a CUDA device, from a bare checkout: nothing is installed, python3 and what it has (torch, triton, numpy,
# safetensors, tokenizers) are enough. One archive of evidence in $OUT (default: reports), whole after every part.
#   bash ci/run_gpu.sh [--bench] [--device cuda|cpu] [--shapes NAMES] [--formats NAMES] [--budget-s N] [--commit HASH]
# Exit code by the evidence: 0 nothing refuted, 5 something refuted, 9 no device, 11 inconclusive, 1 a part broke.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python3 "$root/ci/gpu.py" --out "${OUT:-$root/reports}" "$@"
