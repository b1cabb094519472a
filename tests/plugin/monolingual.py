"""Models of fairseq's tasks over texts of one language."""

from __future__ import annotations

import torch
from fairseq import options as fairseq_options

from lightseq_fairseq import fairseq_compat


def build_of_task(name, data, arch, criterion, *flags):
    """Task, model of one seed, criterion."""
    from fairseq import tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    fairseq_compat.apply()
    import lightseq_fairseq.plugin  # noqa: F401

    args = fairseq_options.parse_args_and_arch(
        fairseq_options.get_training_parser(name),
        [str(data), "--task", name, "--arch", arch, "--criterion", criterion, "--sample-break-mode", "eos", "--cpu",
         *flags])
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(7)
    return task, task.build_model(cfg.model), task.build_criterion(cfg.criterion)
