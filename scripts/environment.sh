#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv in the repository's root, once, and activates it.
#   PYTHON  interpreter of a new .venv (default: python3; 3.10 to 3.13)
#   TORCH   pip requirement of torch (default: what .venv holds, else torch==2.13.0)
# What pip says goes to .venv/set-up.log.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
log=$venv/set-up.log

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# progress MESSAGE COMMAND...: the command's output goes to the log; on a terminal the seconds are counted.
progress() {
  local message=$1 start=$SECONDS status=0 pid
  shift
  "$@" >>"$log" 2>&1 </dev/null &
  pid=$!
  while [ -t 2 ] && kill -0 $pid 2>/dev/null; do
    printf '\r%s: %d s' "$message" $((SECONDS - start)) >&2
    sleep 1
  done
  wait $pid || status=$?
  [ ! -t 2 ] || printf '\r' >&2
  if [ $status = 0 ]; then
    printf '%s: %d s\n' "$message" $((SECONDS - start)) >&2
    return
  fi
  printf '%s: failed\n' "$message" >&2
  tail -n 15 "$log" >&2
  if tail -n 40 "$log" |  # the last: pip gave up on the first package that is not there, which depends on the Python
    grep -qE 'NewConnection|NameResolution|Timeout|ProxyError|(setuptools|wheel) \(from versions: none'; then
    fail "pip cannot reach its package index: check the network, or name a mirror in PIP_INDEX_URL, and run this again"
  fi
  fail "the step above failed (all of its output: $log); mend the cause and run this again, it goes on from here"
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

check_machine() {
  local python=$1 version
  command -v "$python" >/dev/null ||
    fail "no $python here: install Python 3.10 to 3.13 (Debian: apt install python3-venv python3-dev) or set PYTHON="
  version=$(python_version "$python") || fail "$python does not run: name a Python 3.10 to 3.13 in PYTHON="
  case $version in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) fail "$python is Python $version, but 3.10 to 3.13 is needed: name such a one in PYTHON=" ;;
  esac
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make a virtual environment: install its venv module (Debian: apt install python$version-venv)"
  "$python" -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
    fail "$python has no C headers, and fairseq needs them: install them (Debian: apt install python$version-dev)"
  command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler ${CXX:-c++}, and fairseq needs one: install it (Debian: apt install g++) or name one in CXX="
}

# The CPU build of torch is a fraction of the CUDA one's size: taken where there is no NVIDIA GPU and its index answers.
install_torch() {
  local index=() cpu_index=https://download.pytorch.org/whl/cpu
  if ! nvidia-smi -L && "$venv/bin/python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=4)' \
    "$cpu_index/torch/" 2>/dev/null; then
    index=(--extra-index-url "$cpu_index")
  fi
  "$venv/bin/python" -m pip install --upgrade pip setuptools wheel cython &&
    "$venv/bin/python" -m pip install "${index[@]}" "$1" numpy
}

# fairseq compiles against the torch of .venv: without build isolation, which would fetch a torch of its own. Less
# optimisation halves the time it takes; its hot loops ask for -O3 themselves. Its CUDA extensions, which CUDA_HOME
# would ask for, are not used (ours find nvcc on the PATH). The torchaudio it names is often of another build than torch:
# one that cannot be loaded goes, because transformers would load it.
install_packages() {
  local extras=test
  "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("fairseq"))' ||
    extras=test,fairseq
  env -u CUDA_HOME PATH="${CUDA_HOME:+$CUDA_HOME/bin:}$PATH" CFLAGS="${CFLAGS:-} -O1 -g0" \
    "$venv/bin/python" -m pip install --no-build-isolation --editable "${root}[$extras]" &&
    { "$venv/bin/python" -c 'import torchaudio' || "$venv/bin/python" -m pip uninstall --yes torchaudio; }
}

set_up() {
  local stamp=$venv/set-up.stamp torch wanted
  if [ -n "${PYTHON:-}" ] && [ -e "$venv/bin/python" ]; then
    check_machine "$PYTHON"
    if [ "$(python_version "$PYTHON")" != "$(python_version "$venv/bin/python")" ]; then
      printf '.venv holds another Python than %s: making it anew\n' "$PYTHON" >&2
      rm -rf "$venv"
    fi
  fi
  wanted=$(cat "$root"/{pyproject.toml,setup.py,scripts/environment.sh} - <<<"$root ${TORCH:-}" | cksum)
  [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0

  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    check_machine "${PYTHON:-python3}"
    mkdir -p "$venv"
    progress "[1/3] Python environment in .venv" "${PYTHON:-python3}" -m venv "$venv"
  fi
  torch=${TORCH:-$("$venv/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' \
    2>/dev/null || echo torch==2.13.0)}
  progress "[2/3] $torch" install_torch "$torch"
  progress "[3/3] fairseq and this package (minutes the first time: fairseq is compiled)" install_packages
  echo "$wanted" >"$stamp"
}

set_up
# shellcheck disable=SC1091
. "$venv/bin/activate"
