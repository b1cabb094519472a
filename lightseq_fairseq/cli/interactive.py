"""``lightseq-interactive``: fairseq-interactive with our model and our search inside; reads lines, prints S- W- H- D-
and P- lines. With ``--constraints`` tabs separate a line and the phrases of its translation, printed as C- lines."""

from __future__ import annotations

import logging
import sys
from typing import Any

from lightseq_fairseq.cli.generate import Search, run


def main() -> int:
    """Entry point; arguments come from the command line."""
    return run("lightseq-interactive", "fairseq_cli.interactive", _refused, _log_speed)


def _refused(cfg: Any) -> list[str]:
    """What fairseq-interactive accepts and then cannot do."""
    wrong = []
    if cfg.generation.score_reference:
        wrong.append("--score-reference (there are none; lightseq-generate has it)")
    if cfg.generation.print_alignment == "soft":
        wrong.append("--print-alignment soft (hard works)")
    if cfg.generation.replace_unk is not None and cfg.common_eval.post_process is not None:
        wrong.append("--replace-unk together with --remove-bpe")
    return wrong


def _log_speed(search: Search) -> None:
    seconds = max(search.seconds, 1e-9)
    logging.getLogger(__name__).info(
        f"Translated {search.sentences:,} sentences ({search.tokens:,} tokens) in {search.seconds:.1f}s "
        f"({search.sentences / seconds:.2f} sentences/s, {search.tokens / seconds:.2f} tokens/s)")


if __name__ == "__main__":
    sys.exit(main())
