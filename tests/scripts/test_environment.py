"""Set-up on a machine that lacks something: one sentence that says what to do, nothing half made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE_PYTHON = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def clone(tmp_path):
    """What set-up needs of the repository, elsewhere, so that this environment stays as it is."""
    (tmp_path / "scripts").mkdir()
    for name in ("setup.py", "pyproject.toml", "scripts/environment.sh", "scripts/test.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def set_up(clone: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "scripts/test.sh"], cwd=clone, env={**os.environ, **environment}, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python-fake"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("script", "advice"), [
    ("echo 3.9", "3.10 to 3.13 is needed: name such a one in PYTHON="),
    ("exit 1", "does not run: name a Python 3.10 to 3.13 in PYTHON="),
    ('case "$2" in *ensurepip*) exit 1;; *) echo 3.11;; esac', "apt install python3.11-venv"),
    ('case "$2" in *sysconfig*) exit 1;; *) echo 3.11;; esac', "apt install python3.11-dev"),
])
def test_unfit_python(clone, script, advice):
    result = set_up(clone, PYTHON=fake_python(clone, script))
    assert result.returncode == 1
    assert result.stderr.startswith("test.sh: ") and result.stderr.count("\n") == 1 and advice in result.stderr
    assert not (clone / ".venv").exists()


def test_no_python_at_all(clone):
    result = set_up(clone, PYTHON="no-such-python")
    assert result.returncode == 1
    assert result.stderr.startswith("test.sh: no no-such-python here: install Python 3.10 to 3.13")


@pytest.mark.skipif(not BASE_PYTHON.exists(), reason=f"no {BASE_PYTHON}")
def test_no_compiler(clone):
    result = set_up(clone, PYTHON=str(BASE_PYTHON), CXX="no-such-compiler")
    assert result.returncode == 1 and "apt install g++" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.skipif(not BASE_PYTHON.exists(), reason=f"no {BASE_PYTHON}")
def test_no_network(clone):
    """Says so, and what to do; a later run goes on from there."""
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull,
               "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    result = set_up(clone, PYTHON=str(BASE_PYTHON), **nowhere)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("test.sh: pip cannot reach its package index")
    assert not (clone / ".venv" / "set-up.stamp").exists()
