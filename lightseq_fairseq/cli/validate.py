"""``lightseq-validate``: fairseq-validate that knows ``ls_*`` models, criterion and optimizer, on every rank.

All arguments are fairseq-validate's. A ``--user-dir`` of the user's own works beside ours, which needs none.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from lightseq_fairseq import fairseq_compat

fairseq_validate = fairseq_compat.import_fairseq("fairseq_cli.validate")  # before the plugin, as in train.py
stock_main = fairseq_validate.main

import lightseq_fairseq.plugin  # noqa: E402, F401


def validate_rank(cfg: Any, **kwargs: Any) -> None:
    """Validate as one rank; see :func:`lightseq_fairseq.cli.train.train_rank`."""
    stock_main(cfg, **kwargs)


def main() -> None:
    """Entry point; arguments come from the command line."""
    with mock.patch.object(fairseq_validate, "main", validate_rank):
        fairseq_validate.cli_main()


if __name__ == "__main__":
    main()
