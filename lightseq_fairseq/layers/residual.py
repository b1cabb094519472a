"""What every layer of the encoder and the decoder is made of: sublayers joined by residuals and layer norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightseq_fairseq import ops
from lightseq_fairseq.layers.linear import forked_linear, linear


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Seeds (count, 1) int64 of as many dropouts, from torch's generator."""
    return torch.empty((count, 1), dtype=torch.int64, device=device).random_()


class Seeds:
    """The seeds of one forward pass of a stack, one for each dropout, drawn together from torch's generator.

    All are None where nothing is dropped.
    """

    def __init__(self, stack: nn.Module, per_layer: int) -> None:
        config, layers = stack.config, stack.layers
        self.per_layer, self.all = per_layer, None
        if stack.training and max(config.dropout, config.attention_dropout, config.activation_dropout) > 0:
            self.all = draw_seeds(1 + per_layer * len(layers), stack.embed_tokens.weight.device)

    @property
    def first(self) -> Tensor | None:
        """Of the embedding, (1,)."""
        return None if self.all is None else self.all[0]

    def of_layer(self, index: int) -> Tensor | None:
        """(per_layer, 1)."""
        return None if self.all is None else self.all[1 + index * self.per_layer:1 + (index + 1) * self.per_layer]


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, computed by :func:`ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class ResidualBlock(nn.Module):
    """Common part of encoder and decoder layers: the feed-forward sublayer and the residual rule.

        pre-LN   x + dropout(f(norm(x)))      post-LN   norm(x + dropout(f(x)))

    A sublayer's last linear map leaves its bias to the operator that adds the residual, which also makes what comes
    next: the layer norm that follows. So between sublayers travel the residual stream and the next sublayer's input,
    which are one tensor in a post-LN layer.
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

    def enter(self, x: Tensor, norm: LayerNorm) -> Tensor:
        """The first sublayer's input, whose norm is ``norm``."""
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps) if self.normalize_before else x

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to a sublayer's output: the stream ``x`` or, in a post-LN layer, the sublayer's input ``y``,
        the same numbers as the sublayer's first linear map hands them on (see :func:`forked_linear`)."""
        return x if self.normalize_before else y

    def join(self, y: Tensor, linear: nn.Linear, residual: Tensor, norm: LayerNorm, next_norm: LayerNorm | None,
             seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Close a sublayer with norm ``norm`` that ended in ``y`` = ``linear`` without its bias, (N, C).

        ``next_norm`` belongs to the sublayer that follows, None behind the last. Returns the residual stream and the
        next sublayer's input.
        """
        p = self.dropout if self.training else 0.0
        following = next_norm if self.normalize_before else norm
        if following is None:
            x = ops.bias_dropout_residual(y, linear.bias, residual, p, seed)
            return x, x
        x, y = ops.bias_dropout_residual_layer_norm(y, linear.bias, residual, following.weight, following.bias,
                                                    following.eps, p, seed)
        return (x, y) if self.normalize_before else (y, y)

    def feed_forward(self, y: Tensor, residual: Tensor, seeds: Tensor | None) -> Tensor:
        """The last sublayer, input and residual stream (N, C) -> (N, C); ``seeds`` (2, 1)."""
        p = self.activation_dropout if self.training else 0.0
        first, second = (None, None) if seeds is None else seeds
        h, y = forked_linear(y, self.fc1.weight)
        h = ops.bias_activation_dropout(h, self.fc1.bias, self.activation, p, first)
        return self.join(linear(h, self.fc2.weight), self.fc2, self.residual(residual, y), self.final_layer_norm, None,
                         second)[0]
