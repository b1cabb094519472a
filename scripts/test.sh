#!/usr/bin/env bash
# Sets up .venv (see environment.sh), then lint, types, tests. Arguments go to pytest: scripts/test.sh tests/generator
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
export OMP_WAIT_POLICY=passive  # several processes share the cores: threads that spin while they wait would starve them

ruff check .
mypy lightseq_fairseq/{config.py,model_file,export,generator,huggingface,inference.py,ops/functional.py,training}
exec python -m pytest "$@"
