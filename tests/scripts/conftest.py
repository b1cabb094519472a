"""Scripts are run as a user runs them: bash, in the .venv that they make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_script():
    """run_script("prepare_multi30k.sh", *arguments, **environment) -> (exit status, stdout, stderr)."""
    if not (ROOT / ".venv" / "set-up.stamp").exists() or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("scripts would make a .venv of their own: run these tests by scripts/test.sh")

    def run(name: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
        result = subprocess.run(["bash", str(ROOT / "scripts" / name), *arguments], capture_output=True, text=True,
                                env={**os.environ, **environment}, stdin=subprocess.DEVNULL)
        return result.returncode, result.stdout, result.stderr

    return run
