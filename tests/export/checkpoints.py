"""Checkpoints as fairseq's trainer writes them, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.conftest import build_model, scramble, training_args
from tests.model_file.test_spec import SMALL

TINY = ("--arch", "transformer", *SMALL, "--share-decoder-input-output-embed")


def state_of(data: Path, *flags: str, seed: int = 3) -> tuple[dict[str, Any], torch.nn.Module]:
    """What the trainer would save of a scrambled model, and the model itself."""
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    task, model = build_model(data, *flags)
    scramble(model, seed)
    cfg = convert_namespace_to_omegaconf(training_args(data, *flags))
    cfg.task = task.cfg
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [{"criterion_name": "CrossEntropyCriterion", "num_updates": 3}],
        "extra_state": {"metrics": [], "val_loss": 1.5},
        "last_optimizer_state": {"state": {}, "param_groups": []},
    }
    return state, model


def write_checkpoint(path: Path, data: Path, *flags: str, seed: int = 3) -> torch.nn.Module:
    """Write a checkpoint and return its model."""
    state, model = state_of(data, *flags, seed=seed)
    torch.save(state, path)
    return model
