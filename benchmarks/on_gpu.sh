#!/usr/bin/env bash
# Checks and times the kernels on this machine's GPU: python -m on_gpu --help says how.
# PYTHON names the interpreter that has torch; default: the environment's, else python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$PYTHON" -m on_gpu "$@"
