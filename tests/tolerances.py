"""The one table of tolerances: how far a result may lie from its reference.

fp64 and fp32 rows are absolute+relative bounds for torch.testing.assert_close; 16-bit results
are judged against plain PyTorch's own 16-bit error by the tests that need it.
"""

from __future__ import annotations

import torch

OP = {
    torch.float64: dict(rtol=1e-10, atol=1e-10),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
    torch.float16: dict(rtol=4e-3, atol=4e-3),
}
"""One operator against its fp64 reference."""

LAYER = dict(rtol=1e-4, atol=1e-5)
"""Hidden states of a few layers in fp32 against fairseq's own layers."""

GRADIENT = dict(rtol=2e-4, atol=2e-5)
"""Parameter gradients of a whole model in fp32."""

SCORE = dict(rtol=0, atol=1e-4)
"""Per-token log-probabilities of hypotheses in fp32 (the project's promise)."""

LOSS_CURVE = dict(rtol=1e-4, atol=0)
"""Loss of each of the first updates against stock fairseq."""
