#!/usr/bin/env bash
# Everything that has to pass: ruff, mypy and the tests. With arguments, only pytest, with these arguments.
#
#   scripts/test.sh
#   scripts/test.sh tests/engine -k greedy
#   scripts/test.sh -n 0 -s tests/engine     in one process, with its output
set -euo pipefail

# pytest puts tests of one model runner beside each other, and each process begins with its half of the row: so most of
# them share a process, and the engines in it. Who is done first takes tests over from the other.
pytest_flags=(-n "${TEST_PROCESSES:-2}" --dist worksteal)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# These are tests of the build for CPUs, where a GPU is at hand too: runner V1 as it is, V2 in Triton's interpreter.
export BUILD=cpu VENV=.venv
if nvidia-smi >/dev/null 2>&1; then
  VENV=.venv-cpu
fi
scripts/install.sh test
export PATH="$PWD/$VENV/bin:$PATH"

# What is compiled and measured here, beside other work, is kept from the user's own servers.
export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$PWD/$VENV/cache}
# Nothing is downloaded and nothing reported; engines side by side share the processors instead of pinning to the same.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ $# -eq 0 ]]; then
  ruff check .
  ruff format --check .
  mypy
fi
exec python -m pytest "${pytest_flags[@]}" "$@"
