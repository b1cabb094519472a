"""Trainings in this process, and what is compared of them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from lightseq_fairseq.plugin.ls_trainer import LSTrainer
from tests.conftest import training_args

SIZES = [flag for side in ("encoder", "decoder") for flag in (
    f"--{side}-layers", "2", f"--{side}-embed-dim", "32", f"--{side}-ffn-embed-dim", "48",
    f"--{side}-attention-heads", "4")]
RECIPE = ["--lr", "3e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "5", "--label-smoothing", "0.1",
          "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.01", "--clip-norm", "1.0", "--max-tokens", "250",
          "--max-update", "20", "--disable-validation", "--no-progress-bar", "--num-workers", "0"]


def recorded_logs(patch) -> list[dict]:
    """A list that, while ``patch`` lasts, grows by what the criterion says of each update."""
    from fairseq.tasks import FairseqTask

    logs: list[dict] = []
    reduce_metrics = FairseqTask.reduce_metrics

    def record(task, outputs, criterion):
        logs.append({key: float(sum(output[key] for output in outputs)) for key in outputs[0]})
        reduce_metrics(task, outputs, criterion)

    patch.setattr(FairseqTask, "reduce_metrics", record)
    return logs


class Run:
    """One training: ``logs`` of each update as the criterion reduced them, ``norms`` of its gradients where they were
    clipped by fairseq, the ``trainer`` as it ended and the ``state`` of its model on the CPU."""

    recipe = RECIPE
    parse = staticmethod(training_args)

    def __init__(self, data: Path, save_dir: Path, monkeypatch, device: torch.device, trainer_class: type,
                 *flags: str) -> None:
        from fairseq import checkpoint_utils
        from fairseq_cli import train

        self.save_dir = save_dir
        self.norms: list[float] = []
        run = self

        class Recorded(trainer_class):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                run.trainer = self

            def clip_grad_norm(self, clip_norm):
                norm = super().clip_grad_norm(clip_norm)
                run.norms.append(float(norm))
                return norm

        args = self.parse(data, *self.recipe, *flags, "--save-dir", str(save_dir))
        args.cpu, args.distributed_world_size = device.type == "cpu", 1
        with monkeypatch.context() as patch:
            patch.setattr(LSTrainer, "whole_step_devices", ("cpu", "cuda"))
            self.logs = recorded_logs(patch)
            patch.setattr(train, "Trainer", Recorded)
            patch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)
            logging.disable(logging.INFO)
            try:
                train.main(args)
            finally:
                logging.disable(logging.NOTSET)
        self.state = {name: value.detach().cpu().clone()
                      for name, value in self.trainer.get_model().state_dict().items()}

    @property
    def losses(self) -> list[float]:
        """Of each update, for a token."""
        return [log["loss"] / log["sample_size"] for log in self.logs]
