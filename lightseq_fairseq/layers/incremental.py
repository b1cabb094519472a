"""Decoding token by token: a decoder with its weights fixed and fused, and the state of one batch.

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
from lightseq_fairseq.layers.inference import InferenceNorm, fused_qkv, scaled_query
from lightseq_fairseq.layers.packing import Packing
from lightseq_fairseq.ops import InferenceLinear

_FIRST_CAPACITY = 32
"""Steps a cache has room for at first; it doubles when full."""


class _DecoderLayer:
    """One decoder layer with q, k, v as one GEMM and bias and activation inside the GEMMs."""

    def __init__(self, layer: TransformerDecoderLayer) -> None:
        attention = layer.self_attn
        self.heads, self.head_dim, self.width = attention.num_heads, attention.head_dim, attention.embed_dim
        self.normalize_before = layer.normalize_before
        self.qkv, self.out = fused_qkv(attention), InferenceLinear(attention.out_proj.weight, attention.out_proj.bias)
        self.self_norm = InferenceNorm(layer.self_attn_layer_norm)
        self.cross_q: InferenceLinear | None = None
        if layer.encoder_attn is not None and layer.encoder_attn_layer_norm is not None:
            self.cross_q = InferenceLinear(*scaled_query(layer.encoder_attn))
            self.cross_out = InferenceLinear(layer.encoder_attn.out_proj.weight, layer.encoder_attn.out_proj.bias)
            self.cross_norm = InferenceNorm(layer.encoder_attn_layer_norm)
        self.fc1 = InferenceLinear(layer.fc1.weight, layer.fc1.bias, layer.activation)
        self.fc2 = InferenceLinear(layer.fc2.weight, layer.fc2.bias)
        self.final_norm = InferenceNorm(layer.final_layer_norm)

    def step(self, x: Tensor, state: IncrementalState, index: int) -> Tensor:
        """(B * K', C) -> (B * K', C), writing this token's keys and values into ``state``."""
        pre = self.normalize_before
        qkv = self.qkv(self.self_norm(x) if pre else x)
        q, k, v = qkv.view(state.batch, -1, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)  # (B, H, K', D) each
        keys, values = state.append(index, k, v)
        x = x + self.out(self._attend(q, keys, values, state.self_mask))
        x = x if pre else self.self_norm(x)
        if self.cross_q is not None and state.cross_keys:
            q = self._heads(self.cross_q(self.cross_norm(x) if pre else x), state.batch)
            if state.attention_layer == index:
                state.note_attention(q)
            x = x + self.cross_out(self._attend(q, state.cross_keys[index], state.cross_values[index],
                                                state.source_mask))
            x = x if pre else self.cross_norm(x)
        x = x + self.fc2(self.fc1(self.final_norm(x) if pre else x))
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
    def __init__(self, decoder: TransformerDecoder) -> None:
        self.config = decoder.config
        layers: list[TransformerDecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
        self.layers = [_DecoderLayer(layer) for layer in layers]
        self.decoder = decoder
        cross = [layer.encoder_attn for layer in layers if layer.encoder_attn is not None]
        self.cross_kv = InferenceLinear(
            torch.cat([p.weight for a in cross for p in (a.k_proj, a.v_proj)]),
            torch.cat([p.bias for a in cross for p in (a.k_proj, a.v_proj)])) if cross else None
        self.prefix_kv = InferenceLinear(
            torch.cat([p.weight for layer in layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]),
            torch.cat([p.bias for layer in layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]),
        ) if self.config.cross_self_attention else None
        projection = decoder.output_projection
        self.output = InferenceLinear(projection.weight, projection.bias)
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
        x = self._embed(tokens.reshape(-1), state.steps - 1)
        for index, layer in enumerate(self.layers):
            x = layer.step(x, state, index)
        return self.decoder.finish(x)

    def logits(self, features: Tensor) -> Tensor:
        """(R, output_dim) -> (R, V)."""
        return self.output(features)

    def _embed(self, tokens: Tensor, position: int) -> Tensor:
        decoder = self.decoder
        x = self.embeddings[tokens]
        x = x if decoder.project_in_dim is None else decoder.project_in_dim(x)
        if decoder.embed_positions is not None:
            table = decoder.embed_positions.upto(position + 1, self.embeddings)
            x = x + table[decoder.embed_positions.pad + 1 + position]
        return x if decoder.layernorm_embedding is None else decoder.layernorm_embedding(x)


class IncrementalState:
    """Keys, values and ancestry of one batch of B sentences with up to K beams each."""

    def __init__(self, model: IncrementalDecoder, batch: int, beam: int) -> None:
        self.model, self.batch, self.beam, self.steps = model, batch, beam, 0
        self.fed = 0
        self.capacity = 0
        self.prefix = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.cross_keys: list[Tensor] = []
        self.cross_values: list[Tensor] = []
        self.source_mask: Tensor | None = None
        self.prefix_mask: Tensor | None = None
        self.self_mask: Tensor | None = None
        self.ancestors: Tensor | None = None
        self.attention: Tensor | None = None
        self.attention_layer: int | None = None
        weight = model.embeddings
        self.options = {"dtype": weight.dtype, "device": weight.device}

    def attend_to(self, source: Tensor, packing: Packing) -> None:
        """Project the encoder's output (M, K) once, for all layers and all beams."""
        if packing.rows is not None:
            real = torch.arange(packing.width, device=source.device) < packing.cu_seqlens.diff()[:, None]
            self.source_mask = torch.zeros(real.shape, **self.options).masked_fill_(~real, float("-inf"))
            self.source_mask = self.source_mask[:, None, None, :]  # (B, 1, 1, S)
            right = torch.arange(packing.width, device=source.device).expand_as(real)[real]
            sentence = torch.arange(packing.batch, device=source.device)[:, None].expand_as(real)[real]
            packing = Packing(sentence * packing.width + right, packing.cu_seqlens, right, packing.batch, packing.width)
        if self.model.cross_kv is not None:
            self.cross_keys, self.cross_values = self._project(self.model.cross_kv, source, packing)
        if self.model.prefix_kv is not None:
            self.keys, self.values = self._project(self.model.prefix_kv, source, packing)
            self.prefix = self.capacity = packing.width
            self.prefix_mask = self.source_mask

    def _project(self, projection: InferenceLinear, source: Tensor, packing: Packing
                 ) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer, each (B, H, S, D)."""
        layers = self.model.layers
        padded = packing.unpack(projection(source))  # (B, S, layers * 2 * C)
        padded = padded.view(*padded.shape[:2], len(layers), 2, layers[0].heads, layers[0].head_dim)
        both = padded.permute(2, 3, 0, 4, 1, 5).contiguous()
        return list(both[:, 0]), list(both[:, 1])

    def advance(self, fed: int, attention_layer: int | None) -> None:
        """Make room for one more token of ``fed`` beams and bring the masks up to date."""
        if self.prefix + (self.steps + 1) * self.beam > self.capacity:
            self._grow()
        self.fed, self.attention_layer, self.attention = fed, attention_layer, None
        own = torch.arange(fed, device=self.options["device"]).expand(self.batch, fed)[:, :, None]
        if self.ancestors is None:
            self.ancestors = own
        else:
            self.ancestors = torch.cat((self.ancestors, own), dim=2)
        self.steps += 1
        if self.beam > 1:
            self.self_mask = self._ancestry_mask()
        elif self.prefix_mask is not None:
            own_mask = self.prefix_mask.new_zeros(1).expand(self.batch, 1, 1, self.steps)
            self.self_mask = torch.cat((self.prefix_mask, own_mask), dim=3)

    def _ancestry_mask(self) -> Tensor:
        """(B, 1, K', prefix + steps * K): 0 on a beam's own path, -inf elsewhere."""
        assert self.ancestors is not None
        slots = torch.arange(self.beam, device=self.ancestors.device)
        off_path = (self.ancestors[..., None] != slots).view(self.batch, 1, self.fed, -1)
        mask = torch.zeros(off_path.shape, **self.options).masked_fill_(off_path, float("-inf"))
        if self.prefix:
            seen = self.prefix_mask if self.prefix_mask is not None else mask.new_zeros(1)
            mask = torch.cat((seen.expand(self.batch, 1, self.fed, self.prefix), mask), dim=3)
        return mask

    def _grow(self) -> None:
        used = self.prefix + self.steps * self.beam
        self.capacity = self.prefix + max(_FIRST_CAPACITY, 2 * self.steps) * self.beam
        layer = self.model.layers[0]
        grown: list[list[Tensor]] = []
        for slabs in (self.keys, self.values):
            fresh = [torch.zeros(self.batch, layer.heads, self.capacity, layer.head_dim, **self.options)
                     for _ in self.model.layers]
            for old, new in zip(slabs, fresh, strict=False):
                new[:, :, :used] = old[:, :, :used]
            grown.append(fresh)
        self.keys, self.values = grown

    def append(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H, K', D) keys and values of layer ``index``; returns all so far, (B, H, L, D)."""
        start = self.prefix + (self.steps - 1) * self.beam
        used = start + self.beam
        keys, values = self.keys[index], self.values[index]
        keys[:, :, start:start + self.fed] = k
        values[:, :, start:start + self.fed] = v
        return keys[:, :, :used], values[:, :, :used]

    def note_attention(self, q: Tensor) -> None:
        """Keep the mean over heads of this layer's cross-attention, (B, K', S)."""
        scores = (q @ self.cross_keys[self.attention_layer or 0].transpose(2, 3)).float()
        if self.source_mask is not None:
            scores = scores + self.source_mask
        self.attention = scores.softmax(-1).mean(1)

    def reorder(self, parents: Tensor) -> None:
        """Beam k of sentence b continues its beam ``parents[b, k]``, (B, K) int64."""
        assert self.ancestors is not None
        steps = self.ancestors.size(2)
        self.ancestors = self.ancestors.gather(1, parents[:, :, None].expand(-1, -1, steps))

    def keep(self, sentences: Tensor) -> None:
        """Only these sentences go on, in this order, (B',) int64; repeating one is allowed."""
        self.batch = sentences.numel()
        used = self.prefix + self.steps * self.beam
        self.keys, self.values = ([self._chosen(slab, sentences, used) for slab in slabs]
                                  for slabs in (self.keys, self.values))
        self.cross_keys, self.cross_values = ([slab.index_select(0, sentences) for slab in slabs]
                                              for slabs in (self.cross_keys, self.cross_values))
        if self.source_mask is not None:
            self.source_mask = self.source_mask.index_select(0, sentences)
        if self.prefix_mask is not None:
            self.prefix_mask = self.source_mask
        if self.ancestors is not None:
            self.ancestors = self.ancestors.index_select(0, sentences)

    @staticmethod
    def _chosen(slab: Tensor, sentences: Tensor, used: int) -> Tensor:
        """Sentences of one slab (B, H, capacity, D); room beyond ``used`` stays zero."""
        chosen = slab.new_zeros(sentences.numel(), *slab.shape[1:])
        chosen[:, :, :used] = slab[:, :, :used].index_select(0, sentences)
        return chosen
