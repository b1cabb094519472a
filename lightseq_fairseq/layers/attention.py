"""Multi-head attention with fairseq's parameters: k_proj, v_proj, q_proj, out_proj, in this order."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lightseq_fairseq import ops
from lightseq_fairseq.layers.packing import Packing


class MultiheadAttention(nn.Module):
    """Attention of packed queries (N, C) over packed keys (M, K), Vaswani et al. 2017 section 3.2.

    ``kdim`` is the width of the keys' source where it differs from ``embed_dim`` (another encoder width).
    Initialised draw for draw as fairseq's MultiheadAttention, so that one seed gives one model in both.
    """

    def __init__(self, embed_dim: int, num_heads: int, kdim: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.k_proj = nn.Linear(self.kdim, embed_dim)
        self.v_proj = nn.Linear(self.kdim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        gain = 1 / math.sqrt(2) if self.kdim == embed_dim else 1.0
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=gain)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, packing: Packing, source: Tensor | None = None,
                source_packing: Packing | None = None, causal: bool = False) -> Tensor:
        """(N, C) queries over ``source`` (M, K), or over ``x`` itself -> (N, C)."""
        q, k, keys = self._queries_and_keys(x, packing, source, source_packing)
        v = self._heads(self.v_proj(x if source is None else source))
        context = ops.attention(q, k, v, packing.cu_seqlens, keys.cu_seqlens, packing.width, keys.width,
                                causal, self.dropout if self.training else 0.0)
        return self.out_proj(context.flatten(1))

    def weights(self, x: Tensor, packing: Packing, source: Tensor | None = None,
                source_packing: Packing | None = None, causal: bool = False) -> Tensor:
        """The attention probabilities themselves, (B, H, Tq, Tk) in fp32, without dropout."""
        q, k, keys = self._queries_and_keys(x, packing, source, source_packing)
        return ops.attention_weights(q, k, packing.cu_seqlens, keys.cu_seqlens, packing.width, keys.width, causal)

    def _queries_and_keys(self, x: Tensor, packing: Packing, source: Tensor | None,
                          source_packing: Packing | None) -> tuple[Tensor, Tensor, Packing]:
        if source is None:
            return self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), packing
        assert source_packing is not None
        return self._heads(self.q_proj(x)), self._heads(self.k_proj(source)), source_packing

    def _heads(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, H, D)."""
        return x.view(-1, self.num_heads, self.head_dim)
