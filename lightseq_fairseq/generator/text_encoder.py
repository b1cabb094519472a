"""Texts into vectors: a model that is an encoder alone, over padded batches of which only the tokens are computed.

On CUDA the layers are one graph, captured once for each :class:`_Bucket` of sizes; what fills a bucket up are rows
that belong to no text. Elsewhere the same operators run one by one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightseq_fairseq.generator.device_state import Table
from lightseq_fairseq.generator.hypotheses import Array
from lightseq_fairseq.generator.model import arithmetic, load_layers
from lightseq_fairseq.generator.options import GenerationError
from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.capture import captured
from lightseq_fairseq.layers.compiled import CompiledEncoder
from lightseq_fairseq.layers.inference import InferenceEncoder
from lightseq_fairseq.layers.packing import round_up
from lightseq_fairseq.model_file import ModelFile
from lightseq_fairseq.ops import InferenceLinear, _extension

_MOST_GRAPHS = 32
"""Buckets remembered; the one that was used longest ago is forgotten."""
_LEAST_TOKENS, _LEAST_WIDTH = 32, 32


class Encoded(NamedTuple):
    """What a batch of B texts became, on the model's device and in its dtype."""

    hidden: Tensor
    """(B, T, C): the last layer's output, 0 where there is no token."""
    pooled: Tensor | None
    """(B, C): the pooler's output, see ``TransformerConfig.pooler``; None for models that have none."""


class TextEncoder:
    """An encoder on one device, in one dtype."""

    def __init__(self, model: ModelFile, device: torch.device | str | None = None,
                 dtype: torch.dtype = torch.float32) -> None:
        """``device`` is the first GPU where there is one; GenerationError for a model that is more than an encoder."""
        if model.config.stacks != "encoder":
            raise GenerationError(f"expected an encoder alone, got stacks {model.config.stacks!r}; "
                                  "lightseq_fairseq.inference.Generator runs models that have a decoder")
        self.config = model.config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype, int8 = arithmetic(dtype, self.device)
        encoder = load_layers(model, self.device, self.dtype)[0]
        assert encoder is not None
        self.encoder = (CompiledEncoder(encoder) if CompiledEncoder.serves(encoder, int8)
                        else InferenceEncoder(encoder, int8))
        self.pooler = None if encoder.pooler is None else InferenceLinear(encoder.pooler.weight, encoder.pooler.bias,
                                                                          "tanh")
        encoder.layers = torch.nn.ModuleList()  # fused copies have taken their place
        self.graphs: OrderedDict[_Bucket, _Graph] | None = None
        if self.device.type == "cuda" and _extension.loaded():
            self.graphs = OrderedDict()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor | Array | Sequence[Sequence[int]],
                 attention_mask: Tensor | Array | None = None,
                 token_type_ids: Tensor | Array | Sequence[Sequence[int]] | None = None) -> Encoded:
        """Texts (B, T), padded or ragged.

        Tokens count where ``attention_mask`` (B, T) is not 0; without it, those that are not the model's ``pad``.
        Positions count tokens: padding may stand on either side, and takes no position. ``token_type_ids``, shaped as
        the texts, are 0 where None. GenerationError for ids that the model has no row for, and for texts that are too
        long.
        """
        ids, real = self._rows(input_ids, attention_mask)
        types = None if token_type_ids is None else self._rows(token_type_ids, np.ones_like(ids))[0]
        self._check(ids, real, types)
        used = None if types is None or not self.config.type_vocab_size else types[real]
        if not real.any():
            hidden = torch.zeros(*ids.shape, self.config.encoder_embed_dim, dtype=self.dtype, device=self.device)
            return Encoded(hidden, None if self.pooler is None else hidden.new_zeros(len(ids), hidden.size(-1)))
        if self.graphs is None:
            return self._eager(ids, real, used)
        bucket = _Bucket.around(int(real.sum()), *ids.shape)
        if bucket in self.graphs:
            self.graphs.move_to_end(bucket)
        else:
            while len(self.graphs) >= _MOST_GRAPHS:
                self.graphs.popitem(last=False)
            self.graphs[bucket] = _Graph(self, bucket)
        return self.graphs[bucket].run(ids, real, used)

    def outputs(self, tokens: Tensor, packing: Packing, types: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Packed (N,) -> (N, C) and (B, C); a text without tokens has no meaningful second."""
        hidden = self.encoder(tokens, packing, types)
        if self.pooler is None:
            return hidden, None
        first = packing.cu_seqlens[:-1].long().clamp(max=hidden.size(0) - 1)
        return hidden, self.pooler(hidden.index_select(0, first))

    def _eager(self, ids: Array, real: Array, types: Array | None) -> Encoded:
        lengths = torch.from_numpy(real.sum(1))
        cu_seqlens = torch.zeros(len(ids) + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths.cumsum(0)
        positions = torch.from_numpy((real.cumsum(1) - 1)[real])
        packing = Packing(None, cu_seqlens.to(self.device), positions.to(self.device), len(ids), int(lengths.max()))
        hidden, pooled = self.outputs(torch.from_numpy(ids[real]).to(self.device), packing,
                                      None if types is None else torch.from_numpy(types).to(self.device))
        rows = torch.from_numpy(np.flatnonzero(real)).to(self.device)
        padded = hidden.new_zeros(ids.size, hidden.size(1)).index_copy_(0, rows, hidden)
        return Encoded(padded.view(*ids.shape, -1), pooled)

    def _rows(self, given: Tensor | Array | Sequence[Sequence[int]],
              mask: Tensor | Array | None) -> tuple[Array, Array]:
        """``given`` as (B, T) int64, and where its tokens are, (B, T) bool."""
        if not isinstance(given, (Tensor, np.ndarray)):
            width = max(map(len, given), default=0)
            pad = self.config.pad
            given = np.array([[*row, *[pad] * (width - len(row))] for row in given], dtype=np.int64).reshape(-1, width)
        ids = _on_host(given).astype(np.int64, copy=False)
        if ids.ndim != 2:
            raise GenerationError(f"texts must have shape (B, T), got {ids.shape}")
        real = ids != self.config.pad if mask is None else _on_host(mask) != 0
        if real.shape != ids.shape:
            raise GenerationError(f"attention_mask must have the texts' shape {ids.shape}, got {real.shape}")
        return ids, real

    def _check(self, ids: Array, real: Array, types: Array | None) -> None:
        config, wrong = self.config, []
        for name, values, rows in (("input_ids", ids, config.src_vocab_size),
                                   ("token_type_ids", types, max(config.type_vocab_size, 1))):
            if values is None:
                continue
            if values.shape != ids.shape:
                wrong.append(f"{name} must have the texts' shape {ids.shape}, got {values.shape}")
            elif values.size and (values.min() < 0 or values.max() >= rows):
                wrong.append(f"{name} must lie in [0, {rows}), got {int(values.min())} to {int(values.max())}")
        longest = int(real.sum(1).max()) if real.size else 0
        if config.encoder_positions == "learned" and longest > config.max_source_positions:
            wrong.append(f"a text of {longest} tokens is longer than the {config.max_source_positions} positions of "
                         "the model")
        if wrong:
            raise GenerationError("; ".join(wrong))


def _on_host(values: Tensor | Array) -> Array:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


class _Bucket(NamedTuple):
    """Sizes that a graph is made for, each rounded up."""

    tokens: int
    batch: int
    width: int

    @classmethod
    def around(cls, tokens: int, batch: int, width: int) -> _Bucket:
        """Powers of two; of tokens, whose number is the work, eighths between them too."""
        return cls(round_up(tokens, _LEAST_TOKENS), 1 << (batch - 1).bit_length(),
                   max(_LEAST_WIDTH, 1 << (width - 1).bit_length()))


class _Graph:
    """Memory for batches of one bucket, and what computes one: on CUDA a graph."""

    def __init__(self, model: TextEncoder, bucket: _Bucket) -> None:
        self.model, device = model, model.device
        self.narrow = Table(torch.int32, device, cu_seqlens=(bucket.batch + 1,))
        self.wide = Table(torch.int64, device, tokens=(bucket.tokens,), positions=(bucket.tokens,),
                          types=(bucket.tokens,), slots=(bucket.batch * bucket.width,))
        wide = self.wide.tensors
        config = model.config  # a padded batch may be wider than any text in it
        longest = bucket.width if config.encoder_positions != "learned" else min(bucket.width,
                                                                                 config.max_source_positions)
        self.packing = Packing(None, self.narrow.tensors["cu_seqlens"], wide["positions"], bucket.batch, longest)
        self.types = wide["types"] if model.config.type_vocab_size else None
        self.hidden = torch.zeros(bucket.tokens + 1, model.config.encoder_embed_dim, dtype=model.dtype, device=device)
        self.pooled: Tensor | None = None
        self.uploaded, self.compute = None, self._compute
        if device.type == "cuda":
            self.uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.compute, = captured(self._compute)

    def run(self, ids: Array, real: Array, types: Array | None) -> Encoded:
        """Texts (B, T), where their tokens are, and the types of these (N,)."""
        if self.uploaded is not None:  # the images may still be read for the batch before
            self.uploaded.synchronize()
        count, (batch, width) = int(real.sum()), ids.shape
        bounds, wide = self.narrow.image["cu_seqlens"], self.wide.image
        bounds[1:batch + 1] = real.sum(1).cumsum()
        bounds[batch + 1:] = count
        wide["tokens"][:count], wide["tokens"][count:] = ids[real], self.model.config.pad
        wide["positions"][:count], wide["positions"][count:] = (real.cumsum(1) - 1)[real], 0
        wide["types"][:count], wide["types"][count:] = 0 if types is None else types, 0
        slots = wide["slots"][:batch * width]
        slots[:] = len(self.hidden) - 1  # the row of zeros
        slots[real.ravel()] = np.arange(count)
        self.narrow.upload()
        self.wide.upload()
        if self.uploaded is not None:
            self.uploaded.record()
        self.compute()
        hidden = self.hidden.index_select(0, self.wide.tensors["slots"][:batch * width]).view(batch, width, -1)
        return Encoded(hidden, None if self.pooled is None else self.pooled[:batch].clone())

    def _compute(self) -> None:
        hidden, self.pooled = self.model.outputs(self.wide.tensors["tokens"], self.packing, self.types)
        self.hidden[:-1].copy_(hidden)
