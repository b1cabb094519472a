"""``lightseq-hydra-train``: fairseq-hydra-train whose updates are whole steps, as in ``lightseq-train``, on every rank.

All overrides are fairseq-hydra-train's; common.user_dir may be left out or name a package of the user's own.
"""

from __future__ import annotations

from unittest import mock

from lightseq_fairseq import fairseq_compat

fairseq_hydra_train = fairseq_compat.import_fairseq("fairseq_cli.hydra_train")

from lightseq_fairseq.cli.train import train_rank  # noqa: E402


def main() -> None:
    """Entry point; overrides come from the command line."""
    with mock.patch.object(fairseq_hydra_train, "pre_main", train_rank):
        fairseq_hydra_train.cli_main()


if __name__ == "__main__":
    main()
