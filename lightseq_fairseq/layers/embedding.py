"""Token and position embeddings with fairseq's parameter names and tables."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightseq_fairseq import ops
from lightseq_fairseq.config import TransformerConfig


def token_embedding(num_embeddings: int, embed_dim: int, pad: int) -> nn.Embedding:
    """Normal(0, embed_dim ** -0.5) rows, the padding row zero (fairseq's initialisation)."""
    embedding = nn.Embedding(num_embeddings, embed_dim, padding_idx=pad)
    nn.init.normal_(embedding.weight, mean=0, std=embed_dim**-0.5)
    nn.init.zeros_(embedding.weight[pad])
    return embedding


def sinusoidal_table(num_embeddings: int, embed_dim: int, pad: int | None = None) -> Tensor:
    """(num_embeddings, embed_dim) fp32: sines in the first half, cosines in the second, row ``pad`` zero if given.

    Frequencies 10000 ** (-i / (half - 1)), as tensor2tensor has them: a slight departure from Vaswani et al. 2017
    section 3.5. An odd width ends in a zero column.
    """
    half = embed_dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / (half - 1)))
    angles = torch.arange(num_embeddings, dtype=torch.float)[:, None] * frequencies
    table = torch.cat((angles.sin(), angles.cos()), dim=1)
    if embed_dim % 2:
        table = torch.cat((table, torch.zeros(num_embeddings, 1)), dim=1)
    if pad is not None:
        table[pad] = 0
    return table


class PositionalEmbedding(nn.Module):
    """A table whose row ``offset + i`` belongs to the i-th token of a sentence; ``offset`` is ``pad + 1`` unless given.

    ``learned`` tables are the parameter ``weight`` (max_positions + offset, C); sinusoidal ones are made when first
    needed, grow when a longer sentence comes, and leave nothing in a checkpoint.
    """

    table: Tensor | None

    def __init__(self, max_positions: int, embed_dim: int, pad: int, learned: bool, offset: int | None = None) -> None:
        super().__init__()
        self.pad, self.learned, self.embed_dim = pad, learned, embed_dim
        self.offset = pad + 1 if offset is None else offset
        self.initial_rows = max_positions + self.offset
        self.max_positions = max_positions if learned else 100_000
        if learned:
            self.weight = nn.Parameter(torch.empty(self.initial_rows, embed_dim).normal_())  # nn.Embedding's own draw
            nn.init.normal_(self.weight, mean=0, std=embed_dim**-0.5)
            if pad < self.offset:
                nn.init.zeros_(self.weight[pad])
        else:
            self.register_buffer("table", None, persistent=False)
        self.outgrown: list[Tensor] = []
        """Shorter tables, which CUDA graphs that were captured with them go on reading."""

    def rows(self, positions: Tensor) -> Tensor:
        """Row numbers of ``positions`` (N,) counted from 0."""
        return positions + self.offset

    def upto(self, length: int, like: Tensor) -> Tensor:
        """The table (P, C) on the device and in the dtype of ``like``, long enough for sentences of ``length`` tokens.

        ValueError past the end of a learned one.
        """
        if self.learned:
            if length > self.max_positions:
                raise ValueError(f"positions: a sentence of {length} tokens is longer than the {self.max_positions} "
                                 "learned positions of this model; shorten it or split it")
            return self.weight
        table, needed = self.table, self.offset + length
        if table is None or table.size(0) < needed or table.dtype != like.dtype or table.device != like.device:
            if table is not None and table.dtype == like.dtype and table.device == like.device:
                self.outgrown.append(table)
            rows = self.initial_rows if needed <= self.initial_rows else 2 * needed
            pad = self.pad if self.pad < self.offset else None  # else the row is a token's
            table = self.table = sinusoidal_table(rows, self.embed_dim, pad).to(like)
        return table

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weights", "_float_tensor"):  # older fairseq checkpoints: a sinusoidal table, a device marker
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class EmbeddingStack(nn.Module):
    """What encoder and decoder do before their first layer; a mixin that creates no parameters of its own.

    Uses embed_tokens, embed_scale, project_in_dim (decoder), embed_positions, embed_token_types (encoder) and
    layernorm_embedding.
    """

    config: TransformerConfig
    embed_tokens: nn.Embedding
    embed_scale: float
    embed_positions: PositionalEmbedding | None
    embed_token_types: nn.Embedding | None
    layernorm_embedding: nn.Module | None
    project_in_dim: nn.Module | None

    def embed(self, tokens: Tensor, positions: Tensor, width: int, token_embeddings: Tensor | None = None,
              seed: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """(N,) tokens at ``positions`` (N,) in sentences of at most ``width`` tokens -> (N, C).

        ``token_embeddings`` (N, C) takes the place of the table look-up; ``seed`` (1,) that of the dropout.
        ``token_types`` (N,) int64 are all 0 where None; only models that have such a table look at them.
        """
        p = self.config.dropout if self.training else 0.0
        table = rows = None
        if self.embed_positions is not None:
            table = self.embed_positions.upto(width, self.embed_tokens.weight)
            rows = self.embed_positions.rows(positions)
        if token_embeddings is None and self.project_in_dim is None:
            pad = self.embed_tokens.padding_idx
            assert pad is not None
            fused = self.layernorm_embedding is None and self.embed_token_types is None
            x = ops.embedding(tokens, self.embed_tokens.weight, self.embed_scale, pad, rows, table,
                              p if fused else 0.0, seed if fused else None)
            if fused:
                return x
        else:
            x = (self.embed_tokens(tokens) if token_embeddings is None else token_embeddings) * self.embed_scale
            x = x if self.project_in_dim is None else self.project_in_dim(x)
            x = x if table is None else x + table[rows].type_as(x)
        if self.embed_token_types is not None:
            x = x + (self.embed_token_types.weight[0] if token_types is None else self.embed_token_types(token_types))
        x = x if self.layernorm_embedding is None else self.layernorm_embedding(x)
        return F.dropout(x, p) if p > 0 else x
