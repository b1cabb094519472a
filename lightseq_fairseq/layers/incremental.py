"""Decoding token by token: a decoder with its weights fixed and fused, and the state of one batch.

A decoder without encoder reads the texts that it is to continue in one pass, which leaves their keys and values.

Keys and values are written once and never move. Beam k's history is a path through the slots of its sentence,
kept as a table of ancestors; the table becomes the mask of one attention over all slots of the sentence. With
K beams that computes K times the scores that are needed, which is far less than the projections around it, and
saves copying the cache at every step.

Shapes: B sentences, K beams, K' beams fed (1 at the first step, when all beams are still one), C width,
H heads, D head size, S source length, L = slots in use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_fairseq.layers.decoder import TransformerDecoder, TransformerDecoderLayer
from lightseq_fairseq.layers.inference import InferenceLayer, read_layers, scaled_query
from lightseq_fairseq.layers.packing import Packing
from lightseq_fairseq.layers.sublayers import InferenceNorm
from lightseq_fairseq.ops import InferenceLinear, linear_to_logits

_FIRST_CAPACITY = 32
"""Steps a cache has room for at first; it doubles when full."""


class _DecoderLayer(InferenceLayer):
    """One decoder layer with q, k, v as one GEMM and bias and activation inside the GEMMs."""

    def __init__(self, layer: TransformerDecoderLayer, int8: bool = False) -> None:
        super().__init__(layer, int8)
        self.cross_q: InferenceLinear | None = None
        if layer.encoder_attn is not None and layer.encoder_attn_layer_norm is not None:
            self.cross_q = InferenceLinear(*scaled_query(layer.encoder_attn), int8=int8)
            out = layer.encoder_attn.out_proj
            self.cross_out = InferenceLinear(out.weight, out.bias, int8=int8)
            self.cross_norm = InferenceNorm(layer.encoder_attn_layer_norm)

    def step(self, x: Tensor, state: IncrementalState, index: int) -> Tensor:
        """(B * K', C) -> (B * K', C), writing this token's keys and values into ``state``."""
        pre = self.normalize_before
        qkv = self.qkv(self.self_norm(x) if pre else x)
        qkv = qkv.view(state.batch, -1, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)  # (3, B, H, K', D)
        keys, values = state.append(index, qkv[1:])
        x = self.out.add(self._attend(qkv[0], keys, values, state.self_mask), x)
        x = x if pre else self.self_norm(x)
        if self.cross_q is not None and state.cross:
            q = self._heads(self.cross_q(self.cross_norm(x) if pre else x), state.batch)
            if state.attention_layer == index:
                state.note_attention(q)
            keys, values = state.cross[index]
            x = self.cross_out.add(self._attend(q, keys, values, state.source_mask), x)
            x = x if pre else self.cross_norm(x)
        x = self.fc2.add(self.fc1(self.final_norm(x) if pre else x), x)
        return x if pre else self.final_norm(x)

    def _heads(self, x: Tensor, batch: int) -> Tensor:
        """(B * K', C) -> (B, H, K', D)."""
        return x.view(batch, -1, self.heads, self.head_dim).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, K', D) over (B, H, L, D) -> (B * K', C)."""
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return context.transpose(1, 2).reshape(-1, self.width)


class IncrementalDecoder:
    """``decoder`` as it is now, ready to go token by token; later changes of its weights are not seen."""

    @torch.no_grad()
    def __init__(self, decoder: TransformerDecoder, int8: bool = False) -> None:
        """``int8``: see :class:`InferenceLinear`."""
        self.config = decoder.config
        layers: list[TransformerDecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
        self.layers = [_DecoderLayer(layer, int8) for layer in layers]
        self.decoder = decoder
        cross = [layer.encoder_attn for layer in layers if layer.encoder_attn is not None]
        self.cross_kv = InferenceLinear(
            torch.cat([p.weight for a in cross for p in (a.k_proj, a.v_proj)]),
            torch.cat([p.bias for a in cross for p in (a.k_proj, a.v_proj)]), int8=int8) if cross else None
        self.prefix_kv = InferenceLinear(
            torch.cat([p.weight for layer in layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]),
            torch.cat([p.bias for layer in layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]),
            int8=int8) if self.config.cross_self_attention else None
        projection = decoder.output_projection
        self.output = InferenceLinear(projection.weight, projection.bias, int8=int8)
        self.last_norm = None if decoder.layer_norm is None else InferenceNorm(decoder.layer_norm)
        weight = decoder.embed_tokens.weight
        self.embeddings = weight if decoder.embed_scale == 1.0 else weight * decoder.embed_scale

    def start(self, source: Tensor | None, packing: Packing | None, batch: int, beam: int) -> IncrementalState:
        """The state before the first token of ``batch`` sentences; ``source`` (M, K) is the encoder's packed output."""
        state = IncrementalState(self, batch, beam)
        if source is not None and packing is not None:
            state.attend_to(source, packing)
        return state

    def step(self, state: IncrementalState, tokens: Tensor, need_attention: bool = False) -> Tensor:
        """The newest token of each beam, (B, K') int64 -> features (B * K', output_dim).

        With ``need_attention`` the last layer's attention is left in ``state.attention``.
        """
        state.advance(tokens.size(1), len(self.layers) - 1 if need_attention else None)
        x = self._embed(tokens.reshape(-1), state)
        for index, layer in enumerate(self.layers):
            x = layer.step(x, state, index)
        return self.decoder.finish(x)

    def next_logits(self, state: IncrementalState, tokens: Tensor, need_attention: bool = False) -> Tensor:
        """As :meth:`step`, with what may follow: (B * K', V)."""
        return self.logits(self.step(state, tokens, need_attention))

    def logits(self, features: Tensor) -> Tensor:
        """(R, output_dim) -> (R, V)."""
        if features.is_cuda:
            return linear_to_logits(features, self.output.weight, self.output.bias)
        return self.output(features)

    @torch.no_grad()
    def read(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, list[Tensor]]:
        """Packed texts (N,) int64 in one pass, without cross-attention -> features (N, output_dim) of what follows each
        token, and keys and values of each layer, (N, 2, H, D). No text may be longer than the learned positions."""
        positions, longest = self.decoder.embed_positions, packing.width
        if positions is not None:  # the width may be rounded up
            longest = min(longest, positions.max_positions)
        x = self.decoder.embed(tokens, packing.positions, longest)
        keys_values: list[Tensor] = []
        x = read_layers(self.layers, x, packing, True, self.last_norm, keys_values)
        project = self.decoder.project_out_dim
        return x if project is None else project(x), keys_values

    def resume(self, keys_values: list[Tensor], packing: Packing, beam: int) -> IncrementalState:
        """The state behind texts that were read; each continues from its own position."""
        state = IncrementalState(self, packing.batch, beam)
        if packing.width:
            state.continue_from(keys_values, packing)
        return state

    def _embed(self, tokens: Tensor, state: IncrementalState) -> Tensor:
        """(B * K',) -> (B * K', C)."""
        decoder = self.decoder
        x = self.embeddings[tokens]
        x = x if decoder.project_in_dim is None else decoder.project_in_dim(x)
        if decoder.embed_positions is not None:
            positions = decoder.embed_positions
            table = positions.upto(min(state.longest + state.steps, positions.max_positions), self.embeddings)
            position = positions.offset + state.steps - 1
            if state.read_before is None:
                x = x + table[position]
            else:  # finished sentences may lie beyond the end
                rows = (position + state.read_before).clamp(max=table.size(0) - 1)
                x = x + table[rows.repeat_interleave(tokens.numel() // state.batch)]
        return x if decoder.layernorm_embedding is None else decoder.layernorm_embedding(x)


class IncrementalState:
    """Keys, values and ancestry of one batch of B sentences with up to K beams each.

    ``slabs`` hold self-attention keys and values, (2, B, H, capacity, D) a layer; slot ``prefix + t * K + k`` is the
    token that beam k was fed at step t. ``self_mask`` (B, 1, K', L) is 0 on the slots of a beam's own history and
    -inf elsewhere; following a parent means copying its row of the mask.
    """

    def __init__(self, model: IncrementalDecoder, batch: int, beam: int) -> None:
        self.model, self.batch, self.beam = model, batch, beam
        self.steps = self.fed = self.capacity = self.prefix = 0
        self.slabs: list[Tensor] = []
        self.cross: list[Tensor] = []  # (2, B, H, S, D) a layer
        self.source_mask: Tensor | None = None  # (B, 1, 1, S), None without padding
        self.self_mask: Tensor | None = None
        self.attention: Tensor | None = None
        self.attention_layer: int | None = None
        self.read_before: Tensor | None = None  # (B,) int64: tokens of each text that were read at once, None for none
        self.longest = 0  # of these
        weight = model.embeddings
        self.dtype, self.device = weight.dtype, weight.device
        own = torch.full((beam, beam), float("-inf"), dtype=self.dtype, device=self.device)
        self.own_slots = own.fill_diagonal_(0.0).view(1, 1, beam, beam)

    def attend_to(self, source: Tensor, packing: Packing) -> None:
        """Project the encoder's output (M, K) once, for all layers and all beams."""
        packing = packing.flush_left()
        if packing.rows is not None:
            mask = source.new_full((packing.batch * packing.width,), float("-inf"))
            self.source_mask = mask.index_fill_(0, packing.rows, 0.0).view(packing.batch, 1, 1, packing.width)
        if self.model.cross_kv is not None:
            self.cross = self._project(self.model.cross_kv, source, packing)
        if self.model.prefix_kv is not None:
            self.slabs = self._project(self.model.prefix_kv, source, packing)
            self.prefix = self.capacity = packing.width
            seen = source.new_zeros(1) if self.source_mask is None else self.source_mask
            self.self_mask = seen.expand(self.batch, 1, 1, self.prefix)

    def continue_from(self, keys_values: list[Tensor], packing: Packing) -> None:
        """Texts that were read come first in every history: keys and values (N, 2, H, D) of each layer."""
        packing = packing.flush_left()
        padded = [packing.unpack(each.flatten(1)).view(packing.batch, packing.width, *each.shape[1:])
                  for each in keys_values]  # (B, S, 2, H, D)
        self.slabs = [each.permute(2, 0, 3, 1, 4).contiguous() for each in padded]
        self.prefix = self.capacity = self.longest = packing.width
        self.read_before = packing.cu_seqlens.diff().long()
        if packing.rows is not None:
            unread = torch.arange(self.prefix, device=self.device) >= self.read_before[:, None]
            mask = torch.zeros(unread.shape, dtype=self.dtype, device=self.device)
            self.self_mask = mask.masked_fill_(unread, float("-inf")).view(self.batch, 1, 1, self.prefix)
        elif self.beam > 1:
            self.self_mask = torch.zeros(self.batch, 1, 1, self.prefix, dtype=self.dtype, device=self.device)

    def _project(self, projection: InferenceLinear, source: Tensor, packing: Packing) -> list[Tensor]:
        """Keys and values of every layer, each (2, B, H, S, D)."""
        layers = self.model.layers
        padded = packing.unpack(projection(source))  # (B, S, layers * 2 * C)
        padded = padded.view(*padded.shape[:2], len(layers), 2, layers[0].heads, layers[0].head_dim)
        return list(padded.permute(2, 3, 0, 4, 1, 5).contiguous())

    def advance(self, fed: int, attention_layer: int | None) -> None:
        """Make room for one more token of ``fed`` beams and let each see its own."""
        if self.prefix + (self.steps + 1) * self.beam > self.capacity:
            self._grow()
        self.fed, self.attention_layer, self.attention = fed, attention_layer, None
        self.steps += 1
        if self.beam > 1 or self.self_mask is not None:
            own = self.own_slots[:, :, :fed].expand(self.batch, -1, -1, -1)
            self.self_mask = own if self.self_mask is None else torch.cat((self.self_mask, own), dim=3)

    def _grow(self) -> None:
        used = self.prefix + self.steps * self.beam
        self.capacity = self.prefix + max(_FIRST_CAPACITY, 2 * self.steps) * self.beam
        layer = self.model.layers[0]
        shape = (2, self.batch, layer.heads, self.capacity, layer.head_dim)
        grown = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.model.layers]
        for old, new in zip(self.slabs, grown, strict=False):
            new[:, :, :, :used] = old[:, :, :, :used]
        self.slabs = grown

    def append(self, index: int, kv: Tensor) -> Tensor:
        """Write (2, B, H, K', D) keys and values of layer ``index``; returns all so far, (2, B, H, L, D)."""
        used = self.prefix + self.steps * self.beam
        slab = self.slabs[index]
        slab.narrow(3, used - self.beam, self.fed).copy_(kv)
        return slab.narrow(3, 0, used)

    def note_attention(self, q: Tensor) -> None:
        """Keep the mean over heads of this layer's cross-attention, (B, K', S)."""
        scores = (q @ self.cross[self.attention_layer or 0][0].transpose(2, 3)).float()
        if self.source_mask is not None:
            scores = scores + self.source_mask
        self.attention = scores.softmax(-1).mean(1)

    def reorder(self, parents: Tensor) -> None:
        """Beam k of sentence b continues its beam ``parents[b, k]``, (B, K) int64."""
        if self.self_mask is not None:
            rows = parents[:, None, :, None].expand(-1, -1, -1, self.self_mask.size(3))
            self.self_mask = self.self_mask.gather(2, rows)

    def keep(self, sentences: Tensor) -> None:
        """Only these sentences go on, in this order, (B',) int64; repeating one is allowed."""
        self.batch = sentences.numel()
        if self.read_before is not None:
            self.read_before = self.read_before.index_select(0, sentences)
        used = self.prefix + self.steps * self.beam
        self.slabs = [self._chosen(slab, sentences, used) for slab in self.slabs]
        self.cross = [kv.index_select(1, sentences) for kv in self.cross]
        if self.source_mask is not None:
            self.source_mask = self.source_mask.index_select(0, sentences)
        if self.self_mask is not None:
            self.self_mask = self.self_mask.index_select(0, sentences)

    @staticmethod
    def _chosen(slab: Tensor, sentences: Tensor, used: int) -> Tensor:
        """Sentences of one slab (2, B, H, capacity, D); room beyond ``used`` stays zero."""
        chosen = slab.new_zeros(2, sentences.numel(), *slab.shape[2:])
        chosen[:, :, :, :used] = slab[:, :, :, :used].index_select(1, sentences)
        return chosen
