#!/usr/bin/env bash
# What this project says of GPUs, checked and measured on this machine's: one JSON and one table, in under ten minutes.
#
#   scripts/gpu_check.sh [OPTION...]     see python scripts/gpu_check.py --help
#
# With vLLM in `python3` (or PYTHON) that one is used, else an environment is made as for the demo.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! nvidia-smi >/dev/null 2>&1; then
  echo "[gpu_check] no GPU here: nothing to check" >&2
  exit 1
fi
python=${PYTHON:-python3}
if ! "$python" -c 'import vllm' 2>/dev/null; then
  BUILD=cuda VENV=.venv scripts/install.sh demo test
  python=$PWD/.venv/bin/python
elif ! "$python" -c 'import pytest, pytest_timeout, hypothesis' 2>/dev/null; then
  "$python" -m pip install --quiet pytest pytest-timeout hypothesis
fi
# Here this folder's own package comes before one installed elsewhere, and has its kernels in an editable install only.
if ! "$python" -c 'import vllm_del.kernels.exit_head' 2>/dev/null; then
  "$python" -m pip install --quiet --no-deps --no-build-isolation -e .
fi
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false
exec "$python" scripts/gpu_check.py "$@"
