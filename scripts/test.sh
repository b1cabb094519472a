#!/usr/bin/env bash
# Sets up .venv (see environment.sh), then lint, types, tests: all of them, on up to 8 cores. Arguments go to pytest
# instead: scripts/test.sh tests/generator
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
export OMP_WAIT_POLICY=passive  # several processes share the cores: threads that spin while they wait would starve them

ruff check .
mypy lightseq_fairseq/{config.py,model_file,export,generator,huggingface,inference.py,ops/functional.py,training}
if [ $# = 0 ]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=1
  set -- -n $((cores < 8 ? cores : 8)) --dist worksteal --durations 10
fi
exec python -m pytest "$@"
