#!/usr/bin/env bash
# Measures everything that needs a GPU in one call of at most nine minutes (docs/gpu_day.md).
#
#     benchmarks/gpu_day.sh [WHEELS] [options of gpu_day.py]
#
# WHEELS: a folder of wheels to install first, without network: what the machine's python3 lacks.
# Results go to the folder $OUT, or to gpu_day/ if it is not set.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ -d "${1:-}" ]; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$1"/*.whl || echo "wheels of $1: not installed"
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    shift
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
mkdir -p "${OUT:=gpu_day}"
python3 benchmarks/gpu_day.py --out="$OUT" "$@" 2>&1 | tee "$OUT/log.txt"
