"""The benchmark of Hugging Face's fine-tuning runs at a size that takes a moment, and keeps others' rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_both_are_measured_and_other_rows_stay(tmp_path):
    path = tmp_path / "models.json"
    other = {"case": "bert-base-encode", "contender": "lightseq", "ms": 1.0}
    stale = {"case": "bert-base-finetune-fp32-b3x8", "contender": "lightseq", "ms": -1.0}
    path.write_text(json.dumps({"threads": 4, "rows": [other, stale]}))
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmark_huggingface_training.py"), "--device", "cpu", "--dtype", "fp32",
         "--batches", "3", "--tokens", "8", "--layers", "1", "--steps", "1", "--repeats", "1", "--output", str(path)],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    assert report["rows"][0] == other
    assert [(row["case"], row["contender"]) for row in report["rows"][1:]] == [
        ("bert-base-finetune-fp32-b3x8", "huggingface"), ("bert-base-finetune-fp32-b3x8", "lightseq")]
    assert all(row["ms"] > 0 for row in report["rows"])
    assert report["threads"] == 4 and {"gpu", "torch", "commit"} <= report.keys()


def test_half_of_a_batch_is_padding():
    sys.path.insert(0, str(SCRIPTS))
    import benchmark_huggingface_training
    import torch

    for batch in benchmark_huggingface_training.batches_of(8, 128, 1000, torch.device("cpu")):
        assert 0.45 < batch["attention_mask"].float().mean() < 0.55
        assert batch["attention_mask"].sum(1).max() == 128
