#!/bin/sh
# Builds, tests on CUDA and measures, in under nine minutes; bench/run_gpu.py has the flags. PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
if ! "${PYTHON:-python3}" -c "import torch" 2>/dev/null; then
  echo "bench/run_gpu.sh: ${PYTHON:-python3} has no torch; PYTHON=... chooses another interpreter" >&2
  exit 3
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m bench.run_gpu "$@"
