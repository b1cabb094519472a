"""``lightseq-deepspeed``: lightseq-train whose optimizer is sharded over the ranks by DeepSpeed (ZeRO stage 1).

All arguments are fairseq-train's; processes are started as for it, by itself or by torchrun.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any
from unittest import mock

from lightseq_fairseq.cli.train import fairseq_train, stock_main
from lightseq_fairseq.plugin.deepspeed_trainer import DeepSpeedTrainer


def train_rank(cfg: Any, **kwargs: Any) -> None:
    """Train as one rank; see :func:`lightseq_fairseq.cli.train.train_rank`."""
    with mock.patch.object(fairseq_train, "Trainer", DeepSpeedTrainer):
        stock_main(cfg, **kwargs)


def main() -> None:
    """Entry point; arguments come from the command line."""
    if importlib.util.find_spec("deepspeed") is None:
        sys.exit("lightseq-deepspeed: DeepSpeed is not installed (pip install 'deepspeed==0.19.*')")
    with mock.patch.object(fairseq_train, "main", train_rank):
        fairseq_train.cli_main()


if __name__ == "__main__":
    main()
