#!/usr/bin/env bash
# See `del` work: a small model, served by vLLM with and without it. Options: scripts/demo.sh --help
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/install.sh demo
exec .venv/bin/python scripts/demo.py "$@"
