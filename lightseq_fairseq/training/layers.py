"""LightSeq's layers over this package's: another signature, the same parameters and operators.

Shapes: B sentences, S source and T target tokens, C = hidden_size, H = nhead heads of D, V types, R rows of a decoding
step, which are B sentences or B * beam hypotheses. A mask holds 1 (or True) where there is padding; padded slots are
not computed and come out as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightseq_fairseq import ops
from lightseq_fairseq.layers.decoder import TransformerDecoderLayer
from lightseq_fairseq.layers.embedding import sinusoidal_table
from lightseq_fairseq.layers.encoder import TransformerEncoderLayer
from lightseq_fairseq.layers.packing import Packing
from lightseq_fairseq.layers.residual import LayerNorm, draw_seeds
from lightseq_fairseq.ops.cross_entropy import label_smoothed_cross_entropy
from lightseq_fairseq.training import config as configs

Parameters = Sequence[Tensor | None]

OFFSET = 2
"""Unused rows in front of BART's positions."""

_SELF = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "self_attn_layer_norm")
_FEED_FORWARD = ("fc1", "fc2", "final_layer_norm")
ENCODER_ORDER = (*_SELF, *_FEED_FORWARD)
DECODER_ORDER = (*_SELF, "encoder_attn.q_proj", "encoder_attn.out_proj", "encoder_attn_layer_norm", *_FEED_FORWARD)
"""Of ``initial_weights`` and ``initial_biases``. A decoder layer's end in the cross-attention's keys and values."""


def packing_of(mask: Tensor | None, states: Tensor) -> Packing:
    """The layout of ``states`` (B, S, C), whose padding ``mask`` (B, S) or (S,) marks, None where there is none."""
    batch, width = states.shape[:2]
    if mask is None:
        mask = torch.zeros(batch, width, dtype=torch.bool, device=states.device)
    elif mask.dim() == 1:
        mask = mask.expand(batch, -1)
    configs.check("encoder_padding_mask", (mask.shape == (batch, width),
                                           f"must have shape ({batch}, {width}), got {tuple(mask.shape)}"))
    return Packing.of(mask.ne(0).long(), pad=1)


def place(module: nn.Module, config: Any) -> None:
    """Move ``module`` to the GPU that ``config.local_rank`` names, if it names one."""
    if config.local_rank >= 0:
        configs.check(type(module).__name__, (
            torch.cuda.is_available(), f"local_rank={config.local_rank} names a GPU and CUDA is not available; use "
                                       "local_rank=-1 to compute on the CPU"))
        module.to(torch.device("cuda", config.local_rank))


def computing(config: Any, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which GEMMs are fp16 if the configuration says so, and as they were if not."""
    return torch.autocast(device.type, torch.float16) if config.fp16 else nullcontext()


def incoming(x: Tensor, weight: Tensor, config: Any) -> Tensor:
    """``x`` in the type that a module computes in whose parameters are like ``weight``."""
    if config.fp16:
        return x.half()
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def check_size(name: str, states: Tensor, config: Any, training: bool, width: int | None = None) -> None:
    """ValueError for states (B, T, ...) beyond the configured limits, or not of ``width``."""
    batch, length = states.shape[:2]
    configs.check(
        name,
        (length <= config.max_seq_len, f"sequence length {length} exceeds max_seq_len={config.max_seq_len}"),
        (not training or config.max_batch_tokens is None or batch * length <= config.max_batch_tokens,
         f"{batch} * {length} tokens exceed max_batch_tokens={config.max_batch_tokens}"),
        (width is None or states.size(-1) == width, f"states must be {width} wide, got {tuple(states.shape)}"))


def padded_source(encoder_out: Tensor, config: Any) -> Tensor:
    """(S, B, C) -> (B, S, C)."""
    configs.check("encoder_out", (encoder_out.dim() == 3 and encoder_out.size(2) == config.hidden_size,
                                  f"must be (S, B, {config.hidden_size}), got {tuple(encoder_out.shape)}"))
    return encoder_out.transpose(0, 1)


def _draw_seeds(layer: TransformerEncoderLayer | TransformerDecoderLayer, like: Tensor) -> Tensor | None:
    """One for each dropout of ``layer``, (SEEDS, 1); None where nothing is dropped."""
    if not layer.training or max(layer.dropout, layer.self_attn.dropout, layer.activation_dropout) == 0:
        return None
    return draw_seeds(layer.SEEDS, like.device)


@torch.no_grad()
def _take_over(layer: nn.Module, names: Sequence[str], weights: Parameters | None, biases: Parameters | None) -> None:
    """Copy initial weights and biases; a None among them leaves the layer's own."""
    if weights is None and biases is None:
        return
    owner = type(layer).__name__
    weights, biases = weights or [None] * len(names), biases or [None] * len(names)
    configs.check(owner, *((len(given) == len(names), f"initial_{kind} must be those of {', '.join(names)}, in this "
                            f"order, got {len(given)}; clipping limits of int8 training are not taken")
                           for kind, given in (("weights", weights), ("biases", biases))))
    pairs = [(f"{name}.{part}", value) for name, *values in zip(names, weights, biases, strict=True)
             for part, value in zip(("weight", "bias"), values, strict=True) if value is not None]
    configs.check(owner, *((layer.get_parameter(name).numel() == value.numel(),
                            f"{name} must have shape {tuple(layer.get_parameter(name).shape)}, got "
                            f"{tuple(value.shape)}") for name, value in pairs))
    for name, value in pairs:
        parameter = layer.get_parameter(name)
        parameter.copy_(value.detach().view(parameter.shape))


class LSTransformerEncoderLayer(TransformerEncoderLayer):
    """Self-attention and feed-forward; ``get_config`` makes its configuration.

    ``initial_weights`` and ``initial_biases`` are lists in the order of :data:`ENCODER_ORDER`.
    """

    def __init__(self, config: configs.EncoderLayerConfig, initial_weights: Parameters | None = None,
                 initial_biases: Parameters | None = None) -> None:
        super().__init__(configs.layer_config(config))
        self.config = config
        _take_over(self, ENCODER_ORDER, initial_weights, initial_biases)
        place(self, config)

    @staticmethod
    def get_config(model: str | None = None, **values: Any) -> configs.EncoderLayerConfig:
        """Fields of :class:`~lightseq_fairseq.training.config.EncoderLayerConfig`, over those of a preset ``model``."""
        return configs.build(configs.EncoderLayerConfig, model, values)

    def forward(self, hidden_states: Tensor, encoder_padding_mask: Tensor | None = None,  # type: ignore[override]
                packing: Packing | None = None) -> Tensor:
        """(B, S, C) and its mask (B, S) or (S,) -> (B, S, C) in the parameters' type.

        With ``packing`` states go in and out packed, (N, C), and the mask is not read.
        """
        weight, packed = self.fc1.weight, packing is not None
        if packing is None:
            check_size("LSTransformerEncoderLayer", hidden_states, self.config, self.training, self.config.hidden_size)
            packing = packing_of(encoder_padding_mask, hidden_states)
            hidden_states = packing.pack(hidden_states)
        with computing(self.config, weight.device):
            x = super().forward(incoming(hidden_states, weight, self.config), packing, _draw_seeds(self, weight))
        x = x.to(weight.dtype)
        return x if packed else packing.unpack(x)


@dataclass(frozen=True)
class _Step(Packing):
    """New tokens of several rows, as the cross-attention groups them: the rows of a sentence behind one another."""

    rows_apart: Packing
    """The same tokens row by row."""
    cache: dict[Any, Any]


class LSTransformerDecoderLayer(TransformerDecoderLayer):
    """Self-attention, cross-attention and feed-forward; ``get_config`` makes its configuration.

    ``initial_weights`` and ``initial_biases`` are lists in the order of :data:`DECODER_ORDER` and one more: the
    cross-attention's keys and values, (2C, C) and (2C,). LightSeq's lists hold those of all layers at the end of layer
    0's; :meth:`split_keys_values` takes them apart.
    """

    def __init__(self, config: configs.DecoderLayerConfig, initial_weights: Parameters | None = None,
                 initial_biases: Parameters | None = None) -> None:
        super().__init__(configs.layer_config(config))
        self.config = config
        self._initialise(initial_weights, initial_biases)
        place(self, config)

    def _initialise(self, weights: Parameters | None, biases: Parameters | None) -> None:
        order: tuple[str, ...] = ENCODER_ORDER
        if self.encoder_attn is not None:
            order = (*DECODER_ORDER, "encoder_attn.k_proj", "encoder_attn.v_proj")
            weights, biases = (self._apart(values) for values in (weights, biases))
        _take_over(self, order, weights, biases)

    def _apart(self, values: Parameters | None) -> Parameters | None:
        """Keys and values as two."""
        if values is None:
            return None
        last = values[-1]
        if len(values) != len(DECODER_ORDER) + 1 or last is None or last.size(0) != 2 * self.config.hidden_size:
            shape = None if last is None else tuple(last.shape)
            raise ValueError(
                f"LSTransformerDecoderLayer: expected {len(DECODER_ORDER) + 1} initial weights and biases, the last "
                f"being this layer's own keys and values of {2 * self.config.hidden_size} rows, got {len(values)} and "
                f"{shape} at the end; LightSeq keeps those of all layers in layer 0: split_keys_values(last, nlayer)")
        return [*values[:-1], *last.chunk(2)]

    @staticmethod
    def split_keys_values(joint: Tensor, nlayer: int) -> list[Tensor]:
        """LightSeq's keys and values of all layers, (2 * nlayer * C, ...) -> (2C, ...) for each."""
        if joint.size(0) % (2 * nlayer):
            raise ValueError(f"split_keys_values: expected a multiple of 2 * {nlayer} rows, got {tuple(joint.shape)}")
        return list(joint.chunk(nlayer))

    @staticmethod
    def get_config(model: str | None = None, **values: Any) -> configs.DecoderLayerConfig:
        """Fields of :class:`~lightseq_fairseq.training.config.DecoderLayerConfig`, over those of a preset ``model``."""
        return configs.build(configs.DecoderLayerConfig, model, values)

    def forward(self, decoder_states: Tensor, encoder_out: Tensor | None = None,  # type: ignore[override]
                encoder_padding_mask: Tensor | None = None, cache: dict[Any, Any] | None = None,
                packing: Packing | None = None, source_packing: Packing | None = None) -> Tensor:
        """(B, T, C) over ``encoder_out`` (S, B, C) and its mask (B, S) -> (B, T, C) in the parameters' type.

        With ``cache``, a dict that is empty at first, the states are those of new tokens alone, (R, T, C), usually of
        one; rows are then sentences or, R being a multiple of B, ``beam`` hypotheses for each. The cache holds
        ``dec_self_k`` and ``dec_self_v`` (R, H, tokens so far, D), which a search reorders along dimension 0, and
        ``encdec_kv`` and ``encdec_source``, the source as this layer reads it, taken from the first call.

        With ``packing`` states go in and out packed, (N, C); without they may be padded on the right only. With
        ``source_packing`` ``encoder_out`` is packed, (M, C), and the mask is not read.
        """
        name, weight = "LSTransformerDecoderLayer", self.fc1.weight
        configs.check(name, (cache is None or packing is None, "give a cache or a packing, not both"),
                      ((encoder_out is None) == (self.encoder_attn is None),
                       "encoder_out must be given to a layer with cross-attention and to no other"))
        packed = packing is not None
        if packing is None:
            check_size(name, decoder_states, self.config, self.training and cache is None, self.config.hidden_size)
            packing = packing_of(None, decoder_states)
            decoder_states = packing.pack(decoder_states)
        with computing(self.config, weight.device):
            source, source_packing, keys_values = self._source(encoder_out, encoder_padding_mask, source_packing, cache)
            if source_packing is not None:
                batch = source_packing.batch
                configs.check(name, (packing.batch == batch or (cache is not None and packing.batch % batch == 0),
                                     f"{packing.batch} rows do not fit the {batch} sentences of encoder_out"))
            if cache is not None:
                packing = self._step(packing, source_packing, cache)
            x, _ = super().forward(incoming(decoder_states, weight, self.config), packing, source, source_packing,
                                   keys_values, seeds=_draw_seeds(self, weight))
        x = x.to(weight.dtype)
        if packed:
            return x
        return packing.rows_apart.unpack(x) if isinstance(packing, _Step) else packing.unpack(x)

    def _source(self, encoder_out: Tensor | None, mask: Tensor | None, packing: Packing | None,
                cache: dict[Any, Any] | None) -> tuple[Tensor | None, Packing | None, Tensor | None]:
        """Packed source, its packing, and the keys and values that a cache has of it."""
        if encoder_out is None or self.encoder_attn is None:
            return None, None, None
        if cache is not None and "encdec_source" in cache:
            return *cache["encdec_source"], cache["encdec_kv"]
        if packing is None:
            encoder_out = padded_source(encoder_out, self.config)
            packing = packing_of(mask, encoder_out)
            encoder_out = packing.pack(encoder_out)
        source = incoming(encoder_out, self.fc1.weight, self.config)
        if cache is None:
            return source, packing, None
        cache["encdec_source"], cache["encdec_kv"] = (source, packing), self.encoder_attn.project_keys_values(source)
        return source, packing, cache["encdec_kv"]

    @staticmethod
    def _step(rows: Packing, source: Packing | None, cache: dict[Any, Any]) -> _Step:
        """``rows`` (R of T tokens, none padded) grouped by the sentences of ``source``."""
        batch = rows.batch if source is None else source.batch
        width = rows.batch * rows.width // max(batch, 1)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=rows.cu_seqlens.device) * width
        return _Step(None, starts, rows.positions, batch, width, rows, cache)

    def _attend_self(self, x: Tensor, packing: Packing, source: Tensor | None, source_packing: Packing | None,
                     causal: bool, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        if not isinstance(packing, _Step):
            return super()._attend_self(x, packing, source, source_packing, causal, seed)
        rows, cache = packing.rows_apart, packing.cache
        new = self.self_attn.project_keys_values(x)
        new = new.view(rows.batch, rows.width, *new.shape[1:])  # (R, T, 2, H, D)
        for name, part in (("dec_self_k", new[:, :, 0]), ("dec_self_v", new[:, :, 1])):
            part = part.transpose(1, 2)  # (R, T, H, D) -> (R, H, T, D)
            cache[name] = torch.cat((cache[name], part), 2) if name in cache else part
        keys, values = cache["dec_self_k"], cache["dec_self_v"]
        configs.check("cache", (keys.shape == values.shape and keys.size(0) == rows.batch,
                                f"holds keys {tuple(keys.shape)} and values {tuple(values.shape)} for {rows.batch} rows"
                                ))
        length = keys.size(2)
        joint = torch.stack((keys, values), 2).permute(0, 3, 2, 1, 4).flatten(0, 1)  # -> (R * length, 2, H, D)
        starts = torch.arange(rows.batch + 1, dtype=torch.int32, device=x.device) * length
        history = Packing(None, starts, rows.positions, rows.batch, length)
        return self.self_attn.over(x, rows, joint, history, causal, seed)


class LSTransformerEmbeddingLayer(nn.Module):
    """dropout(norm(scale * embedding(token) + position)), the norm only with ``layernorm_embedding``.

    ``embeddings`` (V, C) is the token table, ``pos_embeddings`` (max_seq_len, C) that of positions, a parameter with
    ``trainable_pos`` and else sinusoids. The first token of a sentence that is not padding has position 0.
    """

    pos_embeddings: Tensor

    def __init__(self, config: configs.EmbeddingConfig, initial_embeddings: Tensor | None = None,
                 initial_positions: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        dim, std = config.embedding_dim, config.embedding_dim**-0.5
        self.scale = 1.0 if config.no_scale_embedding else math.sqrt(dim)
        self.embeddings = nn.Parameter(torch.empty(config.vocab_size, dim))
        nn.init.normal_(self.embeddings, mean=0, std=std)
        nn.init.zeros_(self.embeddings[config.padding_idx])
        rows = config.max_seq_len + (OFFSET if config.need_offset else 0)
        if config.trainable_pos:
            self.pos_embeddings = nn.Parameter(nn.init.normal_(torch.empty(rows, dim), mean=0, std=std))
        else:
            self.register_buffer("pos_embeddings", sinusoidal_table(rows, dim), persistent=False)
        self.layer_norm = LayerNorm(dim) if config.layernorm_embedding else None
        for name, values in (("embeddings", initial_embeddings), ("pos_embeddings", initial_positions)):
            if values is not None:
                table = getattr(self, name)
                configs.check("LSTransformerEmbeddingLayer", (
                    table.shape == values.shape,
                    f"initial {name} must have shape {tuple(table.shape)}, got {tuple(values.shape)}"))
                table.data.copy_(values.detach())
        place(self, config)

    @staticmethod
    def get_config(**values: Any) -> configs.EmbeddingConfig:
        """Fields of :class:`~lightseq_fairseq.training.config.EmbeddingConfig`."""
        return configs.EmbeddingConfig(**values)

    def forward(self, input: Tensor, step: int = 0, packing: Packing | None = None) -> Tensor:
        """``input`` (B, S) of integers, its first token at position ``step`` -> (B, S, C); (N,) -> (N, C) with
        ``packing``."""
        config, packed = self.config, packing is not None
        if packing is None:
            configs.check("LSTransformerEmbeddingLayer",
                          (input.dim() == 2, f"input must have shape (B, S), got {tuple(input.shape)}"))
            check_size("LSTransformerEmbeddingLayer", input, config, self.training)
            input = input.long()
            packing = Packing.of(input, config.padding_idx)
            input = packing.pack(input)
        configs.check("LSTransformerEmbeddingLayer", (
            step + packing.width <= config.max_seq_len,
            f"position {step + packing.width - 1} lies behind max_seq_len={config.max_seq_len}"))
        rows = packing.positions + (step + (OFFSET if config.need_offset else 0))
        p = config.dropout if self.training else 0.0
        fused = self.layer_norm is None
        seed = draw_seeds(1, input.device)[0] if p > 0 and fused else None
        x = ops.embedding(input, self.embeddings, self.scale, config.padding_idx, rows, self.pos_embeddings,
                          p if fused else 0.0, seed)
        if self.layer_norm is not None:
            x = F.dropout(self.layer_norm(x), p, self.training)
        return x if packed else packing.unpack(x)


class LSCrossEntropyLayer(nn.Module):
    """Label-smoothed cross entropy, summed over the targets that are not padding."""

    def __init__(self, config: configs.CrossEntropyConfig) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def get_config(**values: Any) -> configs.CrossEntropyConfig:
        """Fields of :class:`~lightseq_fairseq.training.config.CrossEntropyConfig`."""
        return configs.CrossEntropyConfig(**values)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and targets (B, T) -> loss and negative log-likelihood, fp32 scalars (fp64 for fp64).

        The second carries no gradient.
        """
        config = self.config
        configs.check(
            "LSCrossEntropyLayer",
            (inputs.dim() == 3 and inputs.shape[:2] == targets.shape,
             f"expected logits (B, T, V) and targets (B, T), got {tuple(inputs.shape)} and {tuple(targets.shape)}"),
            (not self.training or config.max_batch_tokens is None or targets.numel() <= config.max_batch_tokens,
             f"{targets.numel()} tokens exceed max_batch_tokens={config.max_batch_tokens}"))
        return label_smoothed_cross_entropy(inputs.flatten(0, 1), targets.flatten().long(), config.epsilon,
                                            config.padding_idx)


