"""A stack of Hugging Face's layers over packed tokens: the first layer packs, the last one unpacks.

The module that owns the layers (BertEncoder, BartEncoder, GPT2Model, ...) and its loop stay Hugging Face's. Hooks
around it open and close a :class:`Pass`; the first layer called in it turns the mask into a :class:`Packing`, and
layers hand each other packed tokens (N, C). Wherever somebody looks between the layers (hooks,
``output_hidden_states``, layerdrop, wrappers), each layer takes and gives padded ones. What our layers do not compute
runs in Hugging Face's own layer, on the same parameters.
"""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.utils import output_capturing

from lightseq_fairseq.huggingface.graphed_stack import GraphedStack, Slot
from lightseq_fairseq.huggingface.packed_layer import LayerInputs, PackedLayer, Run
from lightseq_fairseq.huggingface.padding import padding_of
from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.decoder import TransformerDecoderLayer
from lightseq_fairseq.layers.residual import draw_seeds

logger = logging.getLogger(__name__)
_under_way = threading.local()
"""``passes``: by id of its stack, the pass that each thread is in."""

_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3")
"""Ways of Hugging Face's to compute the attention that ours computes, too."""


@dataclass
class Pass:
    """A stack between its owner's call and its return."""

    layers: list[nn.Module]
    layerdrop: bool
    attention: str | None = None
    """Hugging Face's name of its attention."""
    run: Run | None = None
    original: bool = False
    """Whether Hugging Face's own layers do this one."""


class Stack:
    """The layers that one module owns in the list ``name``, as they were when they were replaced."""

    def __init__(self, owner: nn.Module, name: str, graphs: bool) -> None:
        self.name, self.graphs = name, GraphedStack() if graphs else None
        self.layer_parts = [[(module, dict(module._modules)) for module in layer.modules()]
                            for layer in getattr(owner, name)]
        self.handles = [owner.register_forward_pre_hook(self._open),
                        owner.register_forward_hook(self._close, always_call=True)]

    def release(self) -> None:
        """Take the hooks off the owner again."""
        for handle in self.handles:
            handle.remove()

    def _open(self, owner: Any, args: Any) -> None:
        layerdrop = owner.training and float(getattr(owner, "layerdrop", 0.0)) > 0
        _passes()[id(self)] = Pass(list(getattr(owner, self.name)), layerdrop, owner.config._attn_implementation)

    def _close(self, owner: nn.Module, args: Any, output: Any) -> None:
        _passes().pop(id(self), None)

    def run_for(self, layer: PackedLayer, hidden_states: Tensor, inputs: LayerInputs) -> tuple[Run | None, bool]:
        """The run that a call of ``layer`` belongs to, None where Hugging Face's layer must do it; and whether the
        layer is the last."""
        now = _passes().get(id(self)) or Pass([layer], layerdrop=True)
        if now.run is None and not now.original:
            reason = self._obstacle(now, layer, hidden_states, inputs)
            if isinstance(reason, str):
                now.original = True
                if reason:
                    say_once(reason)
            else:
                packing, source_packing = reason
                now.run = self._begin(now, layer, hidden_states, inputs, packing, source_packing)
        return now.run, now.layers[-1] is layer

    def _begin(self, now: Pass, layer: PackedLayer, hidden_states: Tensor, inputs: LayerInputs, packing: Packing,
               source_packing: Packing | None) -> Run:
        between = (not now.layerdrop and now.layers[0] is layer and "hidden_states" not in _wanted_outputs()
                   and all(isinstance(each, PackedLayer) and not _is_watched(each) for each in now.layers))
        run = Run(packing, source_packing, layer.causal, None, between, inputs)
        if between and source_packing is not None and inputs.encoder_hidden_states is not None:
            run.source = source_packing.pack(inputs.encoder_hidden_states)
        layers = [each for each in now.layers if isinstance(each, PackedLayer)]
        if any(p > 0 for each in layers for p in each.dropouts()):
            run.seeds = draw_seeds(len(now.layers) * TransformerDecoderLayer.SEEDS, hidden_states.device)
        if between and self.graphs is not None:
            run.replay = self.graphs.replay_for(layers, run, hidden_states, self._parameter_slots())
        return run

    def _parameter_slots(self) -> list[Slot]:
        """Where the parameters of all layers are kept."""
        return [(module._parameters, name) for parts in self.layer_parts for module, _ in parts
                for name, parameter in module._parameters.items() if parameter is not None]

    def _obstacle(self, now: Pass, layer: PackedLayer, hidden_states: Tensor,
                  inputs: LayerInputs) -> str | tuple[Packing, Packing | None]:
        """Why our layers cannot do this call, in words, "" where that is no news; else where its tokens lie."""
        if hidden_states.dim() != 3:
            return f"hidden states of shape {tuple(hidden_states.shape)}, not (B, T, C)"
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return ""
        if inputs.past_key_values is not None and not _is_fresh(inputs.past_key_values):
            return ""
        if _wanted_outputs() & {"attentions", "cross_attentions"}:
            return "output_attentions: attention weights exist in Hugging Face's layers alone"
        if now.attention not in _ATTENTIONS:
            return f"attn_implementation {now.attention!r} is somebody's choice (choose sdpa to have ours)"
        changed = self._changed()
        if changed:
            return changed
        if inputs.encoder_hidden_states is not None and layer.encoder_attn is None:
            return ""  # Hugging Face's layer says what is wrong
        batch, length = hidden_states.shape[:2]
        packing = padding_of(inputs.attention_mask, batch, length, length, layer.causal, hidden_states.device)
        if packing is None:
            return ("attention_mask: more than padding is masked (give a 2-D mask, or none, to have it run by "
                    "lightseq_fairseq)")
        if packing.count == 0:
            return "attention_mask: a batch without a single token"
        if inputs.encoder_hidden_states is None:
            return packing, None
        source_length = inputs.encoder_hidden_states.size(1)
        source = padding_of(inputs.encoder_attention_mask, batch, length, source_length, False, hidden_states.device)
        if source is None:
            return "encoder_attention_mask: more than padding is masked (give a 2-D mask, or none)"
        if source.count == 0:
            return "encoder_attention_mask: sources without a single token"
        return packing, source

    def _changed(self) -> str | None:
        """What has come between our layers and their modules since they were replaced, in words."""
        for parts in self.layer_parts:
            for index, (module, children) in enumerate(parts):
                if module._modules != children:
                    return f"{type(module).__name__} has other modules than when it was replaced: accelerate again"
                if module.training != parts[0][0].training:
                    return (f"{type(module).__name__} is in {'training' if module.training else 'evaluation'} by "
                            "itself inside a layer")
                if "forward" in module.__dict__:
                    return f"somebody has given {type(module).__name__} a forward of its own (a device map does)"
                if index and (module._forward_hooks or module._forward_pre_hooks) and _is_watched(module):
                    return f"somebody hooks into {type(module).__name__} inside a layer"
        return None


def _is_fresh(cache: Any) -> bool:
    """Whether it is a cache that grows, without anything in it."""
    if type(cache) is EncoderDecoderCache:
        return _is_fresh(cache.self_attention_cache) and _is_fresh(cache.cross_attention_cache)
    return type(cache) is DynamicCache and cache.get_seq_length() == 0


def _passes() -> dict[int, Pass]:
    passes: dict[int, Pass] | None = getattr(_under_way, "passes", None)
    if passes is None:
        passes = _under_way.passes = {}
    return passes


def _wanted_outputs() -> set[str]:
    """What Hugging Face collects from inside the model that is called."""
    collected = output_capturing._active_collector.get()
    return set(collected or ())


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook other than Hugging Face's collector of outputs is on ``module``."""
    return any(getattr(hook, "__module__", None) != output_capturing.__name__
               for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values())


@functools.cache
def say_once(reason: str) -> None:
    """One line of the log for each reason."""
    logger.warning("Hugging Face's own layers run, not those of lightseq_fairseq: %s", reason)
