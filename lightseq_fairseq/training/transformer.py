"""LightSeq's LSTransformer: embedding, encoder and decoder of its layers, the output tied to the target embedding."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightseq_fairseq.layers.packing import Packing
from lightseq_fairseq.layers.residual import LayerNorm
from lightseq_fairseq.training import config as configs
from lightseq_fairseq.training.layers import (
    LSTransformerDecoderLayer,
    LSTransformerEmbeddingLayer,
    LSTransformerEncoderLayer,
    computing,
    incoming,
    packing_of,
    padded_source,
    place,
)


def _layer_values(config: configs.TransformerModelConfig, kind: type) -> dict[str, Any]:
    """The fields of ``config`` that ``kind`` has, too."""
    return {field.name: getattr(config, field.name) for field in fields(kind) if hasattr(config, field.name)}


class LSTransformerEncoder(nn.Module):
    """``num_encoder_layer`` layers over an embedding; a norm behind them where they are pre-LN."""

    def __init__(self, config: configs.TransformerModelConfig, embed_tokens: LSTransformerEmbeddingLayer) -> None:
        super().__init__()
        self.config, self.padding_idx, self.embed_tokens = config, config.padding_idx, embed_tokens
        kind = configs.EncoderLayerConfig
        self.layers = nn.ModuleList(LSTransformerEncoderLayer(kind(**_layer_values(config, kind)))
                                    for _ in range(config.num_encoder_layer))
        self.layer_norm = LayerNorm(config.hidden_size) if config.pre_layer_norm else None
        place(self, config)

    def forward(self, src_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) padded on either side -> states (S, B, C) and the padding mask (B, S), True where there is padding."""
        _check_tokens("LSTransformerEncoder", src_tokens, self.config, self.training)
        packing = Packing.of(src_tokens, self.padding_idx)
        x = self.embed_tokens(packing.pack(src_tokens), packing=packing)
        for layer in self.layers:
            x = layer(x, packing=packing)
        x = x if self.layer_norm is None else self.layer_norm(x)
        return packing.unpack(x).transpose(0, 1), src_tokens.eq(self.padding_idx)


class LSTransformerDecoder(nn.Module):
    """``num_decoder_layer`` layers over an embedding, which is the output projection, too."""

    def __init__(self, config: configs.TransformerModelConfig, embed_tokens: LSTransformerEmbeddingLayer) -> None:
        super().__init__()
        self.config, self.padding_idx, self.embed_tokens = config, config.padding_idx, embed_tokens
        kind = configs.DecoderLayerConfig
        values = _layer_values(config, kind) | {"nlayer": config.num_decoder_layer}
        self.layers = nn.ModuleList(LSTransformerDecoderLayer(kind(**values))
                                    for _ in range(config.num_decoder_layer))
        self.layer_norm = LayerNorm(config.hidden_size) if config.pre_layer_norm else None
        place(self, config)

    def forward(self, trg_tokens: Tensor, encoder_out: Tensor, encoder_padding_mask: Tensor | None,
                cache: dict[Any, Any] | None = None) -> Tensor:
        """(B, T) previous tokens over the encoder's (S, B, C) and mask (B, S) -> logits (B, T, V).

        With ``cache``, a dict that is empty at first and afterwards holds one of
        :class:`LSTransformerDecoderLayer`'s for each layer, ``trg_tokens`` (R, t) are the newest tokens alone, or all
        so far, of which those in the cache are not computed again; the logits (R, n, V) are those of the n new ones.
        R may be a multiple of B, the hypotheses of a sentence being adjacent.
        """
        if cache is None:
            return self._logits(self._states(trg_tokens, encoder_out, encoder_padding_mask))
        done = cache[0]["dec_self_k"].size(2) if cache else 0
        length = trg_tokens.size(1)
        new = length - done if length > done else length
        configs.check("LSTransformerDecoder", (
            length > done or length == 1,
            f"expected the newest token or more than the {done} of the cache, got {length} tokens"))
        trg_tokens = trg_tokens[:, length - new:]
        configs.check("LSTransformerDecoder", (
            new == 1 or not bool(trg_tokens.eq(self.padding_idx).any()),
            "several tokens at once must be without padding; feed ragged prefixes token by token"))
        x = self.embed_tokens(trg_tokens, done)
        for index, layer in enumerate(self.layers):
            x = layer(x, encoder_out, encoder_padding_mask, cache.setdefault(index, {}))
        return self._logits(x)

    def _states(self, trg_tokens: Tensor, encoder_out: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T) -> (B, T, C) in front of the final norm, 0 where there is padding."""
        _check_tokens("LSTransformerDecoder", trg_tokens, self.config, self.training)
        packing, source = Packing.of(trg_tokens, self.padding_idx), padded_source(encoder_out, self.config)
        source_packing = packing_of(mask, source)
        x, source = self.embed_tokens(packing.pack(trg_tokens), packing=packing), source_packing.pack(source)
        for layer in self.layers:
            x = layer(x, source, packing=packing, source_packing=source_packing)
        return packing.unpack(x)

    def _logits(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V)."""
        x, weight = x if self.layer_norm is None else self.layer_norm(x), self.embed_tokens.embeddings
        with computing(self.config, x.device):
            return F.linear(incoming(x, weight, self.config), weight)


class LSTransformer(nn.Module):
    """An encoder-decoder Transformer (Vaswani et al. 2017) of LightSeq's shape; ``get_config`` makes its configuration.

    Source and target have embeddings of their own, the output projection is the target's, positions are sinusoids that
    start at 0. A pre-LN model has a norm behind each stack; a post-LN model has none, LightSeq's has it too.
    """

    def __init__(self, config: configs.TransformerModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = LSTransformerEncoder(config, self._embedding(config))
        self.decoder = LSTransformerDecoder(config, self._embedding(config))
        place(self, config)

    @staticmethod
    def get_config(model: str | None = None, **values: Any) -> configs.TransformerModelConfig:
        """Fields of :class:`~lightseq_fairseq.training.config.TransformerModelConfig`, over those of a preset."""
        return configs.build(configs.TransformerModelConfig, model, values)

    @staticmethod
    def _embedding(config: configs.TransformerModelConfig) -> LSTransformerEmbeddingLayer:
        return LSTransformerEmbeddingLayer(LSTransformerEmbeddingLayer.get_config(
            vocab_size=config.vocab_size, embedding_dim=config.hidden_size, max_batch_tokens=config.max_batch_tokens,
            max_seq_len=config.max_seq_len, padding_idx=config.padding_idx, dropout=config.hidden_dropout_ratio,
            fp16=config.fp16, local_rank=config.local_rank))

    def forward(self, src_tokens: Tensor, trg_tokens: Tensor) -> Tensor:
        """Source (B, S) and previous target tokens (B, T) -> logits (B, T, V)."""
        logits: Tensor = self.decoder(trg_tokens, *self.encoder(src_tokens))
        return logits


def _check_tokens(name: str, tokens: Tensor, config: configs.TransformerModelConfig, training: bool) -> None:
    batch, length = tokens.shape
    configs.check(
        name,
        (tokens.dtype == torch.int64, f"tokens must be int64, got {tokens.dtype}"),
        (length <= config.max_seq_len, f"sequence length {length} exceeds max_seq_len={config.max_seq_len}"),
        (not training or config.max_batch_tokens is None or batch * length <= config.max_batch_tokens,
         f"{batch} * {length} tokens exceed max_batch_tokens={config.max_batch_tokens}"))
