"""Every recipe of configs/train trains, by our command and by fairseq's: two updates of a narrow model on toy data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightseq_fairseq import fairseq_compat

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "train").glob("*.yaml"))
NARROW = [f"++model.{side}_{size}" for side in ("encoder", "decoder")
          for size in ("embed_dim=16", "ffn_embed_dim=16", "attention_heads=2", "layers=1")]
PROGRAMS = {"lightseq_fairseq.cli.hydra_train": [],
            "fairseq_cli.hydra_train": [f"common.user_dir={ROOT / 'lightseq_fairseq'}"]}


@pytest.mark.parametrize("recipe, program", [
    *((recipe, "lightseq_fairseq.cli.hydra_train") for recipe in RECIPES), ("multi30k", "fairseq_cli.hydra_train")])
def test_recipe_trains(recipe, program, joined_data_bin, tmp_path):
    subprocess.run(
        [sys.executable, "-m", program, "--config-dir", str(ROOT / "configs" / "train"),
         "--config-name", recipe, *PROGRAMS[program], f"task.data={joined_data_bin}",
         "task.source_lang=xx", "task.target_lang=yy", "common.cpu=true", "common.fp16=false", *NARROW,
         "optimization.max_update=2", "dataset.max_tokens=400", f"checkpoint.save_dir={tmp_path}/checkpoints",
         f"hydra.run.dir={tmp_path}"],
        check=True, stdout=subprocess.DEVNULL, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})
    fairseq_compat.apply()  # the meters of --eval-bleu are among what may be loaded
    checkpoint = torch.load(tmp_path / "checkpoints" / "checkpoint_last.pt", weights_only=True)
    assert checkpoint["cfg"]["model"]["_name"].startswith("ls_transformer")
    assert checkpoint["cfg"]["optimizer"]["_name"] == "ls_adam"
    assert checkpoint["optimizer_history"][-1]["num_updates"] == 2
