"""Transformer encoder over packed tokens; parameters are named and ordered as fairseq's TransformerEncoder."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.layers.attention import MultiheadAttention
from lightseq_fairseq.layers.embedding import EmbeddingStack, PositionalEmbedding
from lightseq_fairseq.layers.packing import Packing
from lightseq_fairseq.layers.residual import LayerNorm, ResidualBlock, Seeds

WrapLayer = Callable[[nn.Module], nn.Module]


class TransformerEncoderLayer(ResidualBlock):
    """Self-attention and feed-forward, each in a residual."""

    SEEDS = 4

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.activation_fn, config.encoder_normalize_before, config.dropout,
                         config.activation_dropout)
        dim = config.encoder_embed_dim
        self.self_attn = MultiheadAttention(dim, config.encoder_attention_heads, dropout=config.attention_dropout)
        self.self_attn_layer_norm = LayerNorm(dim, eps=config.layer_norm_eps)
        self.add_feed_forward(dim, config.encoder_ffn_embed_dim, config.layer_norm_eps)

    def forward(self, x: Tensor, packing: Packing, seeds: Tensor | None = None) -> Tensor:
        """(N, C) -> (N, C); ``seeds`` (SEEDS, 1) of the dropouts, None outside training."""
        attention_seed, joint_seed = (None, None) if seeds is None else seeds[:2]
        y = self.enter(x, self.self_attn_layer_norm)
        y, forked = self.self_attn(y, packing, seed=attention_seed)
        x = self.residual(x, forked)
        x, y = self.join(y, self.self_attn.out_proj, x, self.self_attn_layer_norm, self.final_layer_norm, joint_seed)
        return self.feed_forward(y, x, None if seeds is None else seeds[2:])


def drop_layers(layers: nn.ModuleList, p: float, training: bool) -> list[nn.Module]:
    """The layers that run this time: all, or each with probability 1 - p in training (Fan et al. 2019).

    Draws what fairseq's LayerDropModuleList draws, so that one seed drops the same layers.
    """
    if p <= 0:
        return list(layers)
    draws = torch.empty(len(layers)).uniform_()
    return [layer for layer, draw in zip(layers, draws.tolist(), strict=True) if not training or draw > p]


class TransformerEncoder(EmbeddingStack):
    """Embedding, ``config.encoder_layers`` layers, final norm where the layers are pre-LN."""

    def __init__(self, config: TransformerConfig, embed_tokens: nn.Embedding, wrap_layer: WrapLayer | None = None,
                 **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.config = config
        dim = config.encoder_embed_dim
        self.embed_tokens = embed_tokens
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(dim)
        self.project_in_dim = None
        self.embed_positions = (
            None if config.encoder_positions == "none" else
            PositionalEmbedding(config.max_source_positions, dim, config.pad, config.encoder_positions == "learned",
                                config.position_offset))
        self.embed_token_types = nn.Embedding(config.type_vocab_size, dim) if config.type_vocab_size else None
        self.layernorm_embedding = LayerNorm(dim, eps=config.layer_norm_eps) if config.layernorm_embedding else None
        wrap = wrap_layer or (lambda layer: layer)
        self.layers = nn.ModuleList(wrap(TransformerEncoderLayer(config)) for _ in range(config.encoder_layers))
        self.layer_norm = LayerNorm(dim, eps=config.layer_norm_eps) if config.encoder_normalize_before else None
        self.pooler = nn.Linear(dim, dim) if config.pooler else None

    def encode(self, tokens: Tensor, packing: Packing, token_embeddings: Tensor | None = None,
               states: list[Tensor] | None = None, token_types: Tensor | None = None) -> Tensor:
        """Packed ``tokens`` (N,) int64 -> (N, C).

        ``token_embeddings`` (N, C) takes the place of the look-up. ``states`` collects the input of the first layer
        and the output of each, as fairseq's ``return_all_hiddens`` does. ``token_types`` (N,) int64 are 0 where None.
        """
        seeds = Seeds(self, TransformerEncoderLayer.SEEDS)
        x = self.embed(tokens, packing.positions, packing.width, token_embeddings, seeds.first, token_types)
        if states is not None:
            states.append(x)
        for index, layer in enumerate(drop_layers(self.layers, self.config.encoder_layerdrop, self.training)):
            x = layer(x, packing, seeds.of_layer(index))
            if states is not None:
                states.append(x)
        return x if self.layer_norm is None else self.layer_norm(x)
