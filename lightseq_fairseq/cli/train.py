"""``lightseq-train``: fairseq-train that knows ``ls_*`` models, criterion and optimizer, on every rank.

All arguments are fairseq-train's. A ``--user-dir`` of the user's own works beside ours, which needs none.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from lightseq_fairseq import fairseq_compat

fairseq_train = fairseq_compat.import_fairseq("fairseq_cli.train")  # before the plugin: it sets up how logs look
stock_main = fairseq_train.main

import lightseq_fairseq.plugin  # noqa: E402, F401
from lightseq_fairseq.plugin.ls_trainer import LSTrainer  # noqa: E402


def train_rank(cfg: Any, **kwargs: Any) -> None:
    """Train as one rank. A spawned process finds this function by importing this module, which registers ours."""
    with mock.patch.object(fairseq_train, "Trainer", LSTrainer):
        stock_main(cfg, **kwargs)


def main() -> None:
    """Entry point; arguments come from the command line."""
    with mock.patch.object(fairseq_train, "main", train_rank):  # what cli_main starts on each rank
        fairseq_train.cli_main()


if __name__ == "__main__":
    main()
