"""The examples run as their first lines say, on the CPU and offline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "scripts" / "examples"


def run(name: str, *arguments: object, **environment: str) -> str:
    """What the example printed; a failure shows it all."""
    result = subprocess.run([sys.executable, str(EXAMPLES / name), *map(str, arguments)], capture_output=True,
                            text=True, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_train_from_layers(tmp_path):
    from lightseq_fairseq.inference import Generator

    printed = run("train_from_layers.py", "--updates", 100, "--output", tmp_path / "numbers.pb")
    likelihoods = [float(value) for value in re.findall(r"nll (\d\.\d+)", printed)]
    assert len(likelihoods) == 2 and likelihoods[1] < 0.6
    assert int(re.search(r"(\d+) of 50 unseen numbers right", printed)[1]) > 5
    generator = Generator.load(tmp_path / "numbers.pb")
    translation = generator.translate(["three hundred twenty four thousand one hundred nine"])[0].split()
    assert {"hundert", "tausend"} <= set(translation)


@pytest.mark.parametrize("name", ["huggingface_classify.py", "huggingface_tag.py"])
def test_fine_tuning_bert(name, request):
    printed = run(name, "--device", request.config.getoption("--device"), HF_HUB_OFFLINE="1")
    assert "bert.encoder.layer: 2 BertLayer" in printed
    accuracy, chance = (float(value) for value in re.search(r"accuracy (\S+) of .*: (\d\.\d+)\)", printed).groups())
    assert chance < 0.7 < 0.9 < accuracy
