"""Drawing tokens instead of searching for the best; the random numbers are uniforms that a test can supply."""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.generator.search import Candidates
from lightseq_fairseq.generator.top_k import top_k


def trim_top_p(probs: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The most probable entries of each row whose sum first reaches ``p`` (Holtzman et al., arXiv:1904.09751).

    (..., V) -> probabilities in descending order, those outside set to 0, (..., N), and their columns, (..., N).
    """
    values, columns = probs.sort(dim=-1, descending=True)
    before = (values.cumsum(-1) < p).sum(-1, keepdim=True)  # entries in front of the one that reaches p
    width = min(int(before.max()) + 1, values.size(-1))
    values, columns = values[..., :width], columns[..., :width]
    outside = torch.arange(width, device=probs.device) > before
    return values.masked_fill(outside, 0), columns


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Columns drawn in proportion to ``probs`` (..., N), one for each uniform in [0, 1): (..., M) -> (..., M) int64.

    Column i is drawn if u * sum(probs) falls between the sums before and after it: never one of probability 0.
    """
    sums = probs.cumsum(-1)
    total = sums[..., -1:]
    points = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, points, right=True).clamp_(max=probs.size(-1) - 1)


class Sampling:
    """Each beam draws its next token, from all of them, the ``top_k`` best or the top-p set; K independent samples.

    A token's score is the logarithm of its probability before trimming, as in fairseq.
    """

    def __init__(self, beam: int, top_k: int = 0, top_p: float = 0.0, generator: torch.Generator | None = None) -> None:
        self.beam, self.top_k, self.top_p, self.generator = beam, top_k, top_p, generator

    def __call__(self, step: int, lprobs: Tensor, scores: Tensor | None) -> Candidates:
        """As :class:`~lightseq_fairseq.generator.search.SearchStrategy`; K candidates, one of each beam."""
        batch, rows, vocab = lprobs.shape
        lprobs.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        columns = None
        if self.top_k > 0:
            lprobs, columns = top_k(lprobs, min(self.top_k, vocab))
        probs = lprobs.exp_()
        if self.top_p > 0:
            probs, columns = trim_top_p(probs, self.top_p)
        uniforms = torch.rand(batch, self.beam, device=probs.device, generator=self.generator)
        drawn = draw(probs, uniforms.view(batch, rows, -1))  # (B, 1, K) at step 0, then (B, K, 1)
        token_scores = probs.gather(2, drawn).log_().view(batch, self.beam)
        tokens = (drawn if columns is None else columns.gather(2, drawn)).view(batch, self.beam)
        if scores is None:
            return Candidates(token_scores, tokens, torch.zeros_like(tokens))
        own = torch.arange(self.beam, device=tokens.device).expand_as(tokens)
        return Candidates(token_scores + scores, tokens, own)

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Nothing is remembered."""

    def keep(self, sentences: Tensor) -> None:
        """Nothing is remembered."""
