"""Multi-head attention with fairseq's parameters: k_proj, v_proj, q_proj, out_proj, in this order."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lightseq_fairseq import ops
from lightseq_fairseq.layers.linear import forked_linear, joint_projection, linear
from lightseq_fairseq.layers.packing import Packing


class PackedAttention:
    """Attention of packed queries (N, C) over packed keys (M, K), Vaswani et al. 2017 section 3.2.

    A mixin for modules that own the projections, under whatever names: it asks for the four of them, each with weight
    (C, C) and bias (C,). What comes out lacks ``out_proj``'s bias, which the operator that adds the residual adds too.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    num_heads: int
    head_dim: int
    dropout: float
    training: bool
    scaling: float | None = None
    """What scores are multiplied by; D ** -0.5 where None."""

    def forward(self, x: Tensor, packing: Packing, causal: bool = False,
                seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Self-attention, (N, C) -> (N, C), by one GEMM for q, k and v; and ``x`` for a residual around it."""
        qkv, x = self.project(x)
        return self._out(ops.self_attention(qkv, packing.cu_seqlens, packing.width, causal, self._p, self.scaling,
                                            seed)), x

    def over(self, x: Tensor, packing: Packing, keys_values: Tensor, keys_packing: Packing, causal: bool = False,
             seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, C) queries over projected ``keys_values`` (M, 2, H, D) -> (N, C); and ``x`` for a residual around it."""
        q, x = forked_linear(x, self.q_proj.weight, self.q_proj.bias)
        context = ops.cross_attention(self._heads(q), keys_values, packing.cu_seqlens, keys_packing.cu_seqlens,
                                      packing.width, keys_packing.width, causal, self._p, self.scaling, seed)
        return self._out(context), x

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, keys and values of ``x`` (N, C) together, (N, 3, H, D); and ``x`` for a residual around it."""
        return joint_projection(x, (self.q_proj, self.k_proj, self.v_proj), self.num_heads)

    def project_keys_values(self, source: Tensor) -> Tensor:
        """(M, K) -> (M, 2, H, D)."""
        return joint_projection(source, (self.k_proj, self.v_proj), self.num_heads)[0]

    def weights(self, x: Tensor, packing: Packing, keys_values: Tensor, keys_packing: Packing) -> Tensor:
        """The attention probabilities that :meth:`over` uses, (B, H, Tq, Tk) in fp32, without dropout."""
        return ops.attention_weights(self._heads(self.q_proj(x)), keys_values[:, 0], packing.cu_seqlens,
                                     keys_packing.cu_seqlens, packing.width, keys_packing.width)

    @property
    def _p(self) -> float:
        return self.dropout if self.training else 0.0

    def _out(self, context: Tensor) -> Tensor:
        """(N, H, D) -> (N, C), the bias still to be added."""
        return linear(context.flatten(1), self.out_proj.weight)

    def _heads(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, H, D)."""
        return x.view(-1, self.num_heads, self.head_dim)


class MultiheadAttention(PackedAttention, nn.Module):
    """:class:`PackedAttention` with fairseq's parameters.

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
