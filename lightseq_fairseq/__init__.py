"""LightSeq for fairseq: fused training and fast generation of sequence models.

Importing this package registers ``ls_transformer``, ``ls_label_smoothed_cross_entropy`` and ``ls_adam`` with
fairseq if fairseq is already loaded, as it is when ``--user-dir`` brings us in; otherwise nothing heavy is
imported, so that generation and serving need no fairseq. :func:`register` does it by hand.
"""

from __future__ import annotations

import sys

__version__ = "0.1.0"


def register() -> None:
    """Make the ``ls_*`` names known to fairseq, importing it if need be. Calling it again changes nothing."""
    import lightseq_fairseq.plugin  # noqa: F401


if "fairseq" in sys.modules:
    register()
