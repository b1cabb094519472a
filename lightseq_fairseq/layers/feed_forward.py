"""What every layer of the encoder and the decoder is made of: sublayers joined by residuals and layer norms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightseq_fairseq import ops


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, computed by :func:`ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class ResidualBlock(nn.Module):
    """Common part of encoder and decoder layers: the feed-forward sublayer and the residual rule.

    pre-LN   x + dropout(f(norm(x)))      post-LN   norm(x + dropout(f(x)))
    """

    fc1: nn.Linear
    fc2: nn.Linear
    final_layer_norm: LayerNorm

    def __init__(self, activation: str, normalize_before: bool, dropout: float, activation_dropout: float) -> None:
        super().__init__()
        self.activation, self.normalize_before = activation, normalize_before
        self.dropout, self.activation_dropout = dropout, activation_dropout

    def add_feed_forward(self, embed_dim: int, ffn_dim: int, eps: float) -> None:
        """Create fc1, fc2 and final_layer_norm; called last, in fairseq's order of parameters."""
        self.fc1 = nn.Linear(embed_dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, embed_dim)
        self.final_layer_norm = LayerNorm(embed_dim, eps=eps)

    def residual(self, sublayer: Callable[[Tensor], Tensor], norm: LayerNorm, x: Tensor) -> Tensor:
        """Apply ``sublayer`` around the residual stream ``x`` (N, C)."""
        y = sublayer(norm(x) if self.normalize_before else x)
        x = ops.dropout_residual(y, x, self.dropout if self.training else 0.0)
        return x if self.normalize_before else norm(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, I) -> (N, C)."""
        p = self.activation_dropout if self.training else 0.0
        return self.fc2(ops.activation_dropout(self.fc1(x), self.activation, p))
