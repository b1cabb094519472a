"""One of Hugging Face's layers computed by ours, over packed tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from lightseq_fairseq.huggingface.caching_attention import fill_cache
from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.decoder import TransformerDecoderLayer

if TYPE_CHECKING:
    from lightseq_fairseq.huggingface.packed_stack import Stack


@dataclass(frozen=True)
class LayerInputs:
    """What Hugging Face hands to a layer beside the hidden states, by its own names."""

    attention_mask: Any = None
    encoder_hidden_states: Tensor | None = None
    encoder_attention_mask: Any = None
    past_key_values: Any = None


@dataclass
class Run:
    """One batch on its way through a stack."""

    packing: Packing
    source_packing: Packing | None
    causal: bool
    seeds: Tensor | None
    """(layers * SEEDS, 1), None where nothing is dropped."""
    packed_between: bool
    """Whether layers hand each other packed tokens."""
    inputs: LayerInputs
    source: Tensor | None = None
    """(M, C) packed once, where layers hand each other packed tokens."""
    replay: Callable[[Run, Tensor], Tensor] | None = None
    """All layers at once, where graphs are used: this run, the packed input of the first -> the output of the last."""
    calls: int = 0

    def next_seeds(self) -> Tensor | None:
        """(SEEDS, 1) of the layer that is called now."""
        count = TransformerDecoderLayer.SEEDS
        self.calls += 1
        return None if self.seeds is None else self.seeds[(self.calls - 1) * count:self.calls * count]


class PackedLayer(nn.Module):
    """What a replaced layer is beside our :class:`TransformerDecoderLayer` and Hugging Face's own class.

    ``original`` is that class; ``argument_names`` are the arguments of its ``forward`` behind the hidden states.
    """

    original: ClassVar[type[nn.Module]]
    argument_names: ClassVar[tuple[str, ...]]
    stack: Stack
    causal: bool
    encoder_attn: Any
    cross_self_attention = False
    activation_dropout = 0.0

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, C) -> (B, T, C) as Hugging Face calls it; packed (N, C) between the layers of a stack that runs so."""
        inputs = self._inputs(args, kwargs)
        run, is_last = self.stack.run_for(self, hidden_states, inputs)
        call: Callable[..., Tensor] = super().__call__
        if run is None:
            return call(hidden_states, *args, **kwargs)
        seeds = run.next_seeds()
        if not run.packed_between:
            return call(hidden_states, *args, run=run, seeds=seeds, **kwargs)
        x, is_first = hidden_states, hidden_states.dim() == 3
        if is_first:
            x = run.packing.pack(x)
        if run.replay is None:
            x = call(x, run.source, run=run, seeds=seeds, past_key_values=inputs.past_key_values)
        elif is_first:
            x = run.replay(run, x)
        return run.packing.unpack(x) if is_last else x

    def forward(self, hidden_states: Tensor, *args: Any, run: Run | None = None, seeds: Tensor | None = None,
                **kwargs: Any) -> Tensor:
        """Hugging Face's (B, T, C) -> (B, T, C), or packed (N, C) -> (N, C), which a ``run`` tells apart."""
        if run is None:
            original: Callable[..., Tensor] = self.original.forward
            return original(self, hidden_states, *args, **kwargs)
        if hidden_states.dim() == 2:
            return self.compute(hidden_states, args[0], run, seeds, kwargs.get("past_key_values"))
        inputs = self._inputs(args, kwargs)
        source = inputs.encoder_hidden_states
        if source is not None and run.source_packing is not None:
            source = run.source_packing.pack(source)
        y = self.compute(run.packing.pack(hidden_states), source, run, seeds, inputs.past_key_values)
        return run.packing.unpack(y)

    @classmethod
    def problems(cls, layer: Any) -> list[str]:
        """Why ``layer``, Hugging Face's, cannot be replaced."""
        raise NotImplementedError

    def compute(self, x: Tensor, source: Tensor | None, run: Run, seeds: Tensor | None, cache: Any = None) -> Tensor:
        """(N, C), over an encoder's (M, C) -> (N, C); keys and values go to ``cache``."""
        layer: Any = self
        if cache is None:
            forward: Callable[..., tuple[Tensor, Tensor | None]] = TransformerDecoderLayer.forward
            return forward(layer, x, run.packing, source, run.source_packing, causal=run.causal, seeds=seeds)[0]
        both = isinstance(cache, EncoderDecoderCache)
        keepers = [(layer.self_attn, run.packing, cache.self_attention_cache if both else cache)]
        if source is not None and run.source_packing is not None:
            keepers.append((self.encoder_attn, run.source_packing, cache.cross_attention_cache))
            cache.is_updated[self.encoder_attn.layer_idx] = True
        try:
            for attention, packing, part in keepers:
                attention.keep = functools.partial(fill_cache, packing, part, attention.layer_idx)
            return self.compute(x, source, run, seeds)
        finally:
            for attention, *_ in keepers:
                attention.keep = None

    def dropouts(self) -> tuple[float, ...]:
        """The probabilities of this layer's dropouts now."""
        layer: Any = self
        if not layer.training:
            return (0.0,)
        cross = () if self.encoder_attn is None else (self.encoder_attn.dropout,)
        return layer.dropout, layer.activation_dropout, layer.self_attn.dropout, *cross

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerInputs:
        given = dict(zip(self.argument_names, args, strict=False)) | kwargs
        return LayerInputs(*(given.get(name) for name in LayerInputs.__dataclass_fields__))


class SelfAttentionLayer(PackedLayer):
    """A :class:`PackedLayer` without cross-attention."""

    encoder_attn = None
    encoder_attn_layer_norm = None
