"""Transformer decoder over packed tokens; parameters are named and ordered as fairseq's TransformerDecoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.layers.attention import MultiheadAttention
from lightseq_fairseq.layers.embedding import EmbeddingStack, PositionalEmbedding
from lightseq_fairseq.layers.encoder import WrapLayer, drop_layers
from lightseq_fairseq.layers.linear import joint_projection
from lightseq_fairseq.layers.packing import Packing
from lightseq_fairseq.layers.residual import LayerNorm, ResidualBlock, Seeds


class TransformerDecoderLayer(ResidualBlock):
    """Self-attention, cross-attention (unless ``no_cross_attention``) and feed-forward, each in a residual."""

    SEEDS = 6

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.activation_fn, config.decoder_normalize_before, config.dropout,
                         config.activation_dropout)
        dim, heads, eps = config.decoder_embed_dim, config.decoder_attention_heads, config.layer_norm_eps
        self.cross_self_attention = config.cross_self_attention
        self.self_attn = MultiheadAttention(dim, heads, dropout=config.attention_dropout)
        self.self_attn_layer_norm = LayerNorm(dim, eps=eps)
        if config.no_cross_attention:
            self.encoder_attn: MultiheadAttention | None = None
            self.encoder_attn_layer_norm: LayerNorm | None = None
        else:
            self.encoder_attn = MultiheadAttention(dim, heads, config.encoder_embed_dim, config.attention_dropout)
            self.encoder_attn_layer_norm = LayerNorm(dim, eps=eps)
        self.add_feed_forward(dim, config.decoder_ffn_embed_dim, eps)

    def forward(self, x: Tensor, packing: Packing, source: Tensor | None = None,
                source_packing: Packing | None = None, keys_values: Tensor | None = None, causal: bool = True,
                need_weights: bool = False, seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Packed targets (N, C) over the encoder's packed output ``source`` (M, K).

        ``keys_values`` (M, 2, H, D) is what cross-attention makes of the source, where that was computed for all layers
        together; ``seeds`` (SEEDS, 1) of the dropouts, None outside training. Returns (N, C) and, if ``need_weights``,
        the cross-attention probabilities (B, H, T, S) in fp32.
        """
        seed = [None] * self.SEEDS if seeds is None else seeds
        cross = self.encoder_attn if source is not None else None
        cross_norm = self.encoder_attn_layer_norm if cross is not None else None
        y = self.enter(x, self.self_attn_layer_norm)
        y, forked = self._attend_self(y, packing, source, source_packing, causal, seed[0])
        x = self.residual(x, forked)
        x, y = self.join(y, self.self_attn.out_proj, x, self.self_attn_layer_norm,
                         cross_norm or self.final_layer_norm, seed[1])
        weights = None
        if cross is not None and cross_norm is not None:
            assert source is not None and source_packing is not None
            kv = cross.project_keys_values(source) if keys_values is None else keys_values
            if need_weights:
                weights = cross.weights(y, packing, kv, source_packing)
            y, forked = cross.over(y, packing, kv, source_packing, seed=seed[2])
            x = self.residual(x, forked)
            x, y = self.join(y, cross.out_proj, x, cross_norm, self.final_layer_norm, seed[3])
        return self.feed_forward(y, x, None if seeds is None else seeds[4:]), weights

    def _attend_self(self, x: Tensor, packing: Packing, source: Tensor | None, source_packing: Packing | None,
                     causal: bool, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.cross_self_attention or source is None:
            return self.self_attn(x, packing, causal, seed)
        assert source_packing is not None
        joint, order = source_packing.followed_by(packing)  # Peitz et al. 2019: the source stands in front
        keys_values = self.self_attn.project_keys_values(torch.cat((source, x)).index_select(0, order))
        return self.self_attn.over(x, packing, keys_values, joint, causal, seed)


class TransformerDecoder(EmbeddingStack):
    """Embedding, ``config.decoder_layers`` layers, final norm where they are pre-LN, output projection."""

    def __init__(self, config: TransformerConfig, embed_tokens: nn.Embedding, wrap_layer: WrapLayer | None = None,
                 **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.config = config
        dim, eps = config.decoder_embed_dim, config.layer_norm_eps
        self.embed_tokens = embed_tokens
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(dim)
        self.project_in_dim = _projection(config.input_dim, dim)
        self.embed_positions = (
            None if config.decoder_positions == "none" else
            PositionalEmbedding(config.max_target_positions, dim, config.pad, config.decoder_positions == "learned",
                                config.position_offset))
        self.embed_token_types = None
        self.layernorm_embedding = LayerNorm(dim, eps=eps) if config.layernorm_embedding else None
        wrap = wrap_layer or (lambda layer: layer)
        self.layers = nn.ModuleList(wrap(TransformerDecoderLayer(config)) for _ in range(config.decoder_layers))
        final_norm = config.decoder_normalize_before and not config.no_decoder_final_norm
        self.layer_norm = LayerNorm(dim, eps=eps) if final_norm else None
        self.project_out_dim = _projection(dim, config.output_dim)
        self.output_projection = nn.Linear(config.output_dim, config.tgt_vocab_size, bias=config.output_bias)
        if config.tied_output:
            self.output_projection.weight = embed_tokens.weight
        else:
            nn.init.normal_(self.output_projection.weight, mean=0, std=config.output_dim**-0.5)

    def decode(self, tokens: Tensor, packing: Packing, source: Tensor | None = None,
               source_packing: Packing | None = None, causal: bool = True, weights_of_layer: int | None = None,
               states: list[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """Packed previous ``tokens`` (N,) int64 -> features (N, output_dim) in front of the output projection,
        and the cross-attention probabilities (B, H, T, S) of one layer if asked for."""
        seeds = Seeds(self, TransformerDecoderLayer.SEEDS)
        x = self.embed(tokens, packing.positions, packing.width, seed=seeds.first)
        weights = None
        if states is not None:
            states.append(x)
        layers = drop_layers(self.layers, self.config.decoder_layerdrop, self.training)
        keys_values = self._project_source(layers, source)
        for index, layer in enumerate(layers):
            x, layer_weights = layer(x, packing, source, source_packing, keys_values[index], causal,
                                     index == weights_of_layer, seeds.of_layer(index))
            weights = layer_weights if index == weights_of_layer else weights
            if states is not None:
                states.append(x)
        return self.finish(x), weights

    def _project_source(self, layers: Sequence[nn.Module], source: Tensor | None) -> list[Tensor | None]:
        """Keys and values of every layer's cross-attention by one GEMM, each (M, 2, H, D).

        None for all where there is nothing to project, or where layers are wrapped and their weights their own affair.
        """
        attentions = [layer.encoder_attn for layer in layers if type(layer) is TransformerDecoderLayer]
        if source is None or len(attentions) < len(layers) or not all(attentions) or self._any_checkpointed(layers):
            return [None] * len(layers)
        projections = [p for a in attentions if a is not None for p in (a.k_proj, a.v_proj)]
        joint, _ = joint_projection(source, projections, self.config.decoder_attention_heads)
        return list(joint.split(2, dim=1))

    @staticmethod
    def _any_checkpointed(layers: Sequence[nn.Module]) -> bool:
        """fairseq checkpoints activations by replacing a layer's own ``forward``."""
        return any("forward" in vars(layer) for layer in layers)

    def finish(self, x: Tensor) -> Tensor:
        """What follows the last layer: (N, C) -> (N, output_dim)."""
        x = x if self.layer_norm is None else self.layer_norm(x)
        return x if self.project_out_dim is None else self.project_out_dim(x)


def _projection(in_features: int, out_features: int) -> nn.Linear | None:
    """A linear map without bias between two widths, none where they agree; fairseq's initialisation."""
    if in_features == out_features:
        return None
    projection = nn.Linear(in_features, out_features, bias=False)
    nn.init.xavier_uniform_(projection.weight)
    return projection
