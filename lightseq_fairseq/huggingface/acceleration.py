"""accelerate(model) and restore(model): our layers in a Hugging Face model, and its own back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lightseq_fairseq.huggingface import bart, bert, gpt2
from lightseq_fairseq.huggingface.packed_layer import PackedLayer
from lightseq_fairseq.huggingface.packed_stack import Stack

Model = TypeVar("Model", bound=nn.Module)

_CLASSES = bert.CLASSES | bart.CLASSES | gpt2.CLASSES
_LAYERS = {original: ours for original, ours in _CLASSES.items() if issubclass(ours, PackedLayer)}
_ORIGINALS = {ours: original for original, ours in _CLASSES.items()}

FAMILIES = "BERT, (XLM-)RoBERTa, CamemBERT, (m)BART, Marian, M2M100 (NLLB) or GPT-2"
"""Those whose layers can be replaced, in words."""


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` replaced."""

    stacks: dict[str, tuple[str, int]]
    """By name of the list that holds them: class and number of the layers."""

    @property
    def layers(self) -> int:
        """How many layers run by our operators now."""
        return sum(count for _, count in self.stacks.values())

    def __str__(self) -> str:
        return "\n".join(f"{name}: {count} {kind}" for name, (kind, count) in self.stacks.items())


def accelerate(model: Model, graphs: bool = True) -> tuple[Model, Report]:
    """Let our operators compute the layers of ``model``, one of transformers whose family is among :data:`FAMILIES`, in
    place.

    Parameters stay where they are and keep their names, so that checkpoints, optimizers and tied weights do not notice.
    Layers run over the real tokens alone: outputs in padded slots are 0. With ``graphs``, on CUDA, all layers of a
    stack are one graph, and one of their backward pass, which can be had once for each forward pass.

    Returns ``model`` itself and a report. ValueError, with Hugging Face's own layers in the model, that lists every
    layer ours cannot take the place of. Layers that were replaced before are replaced anew.

    What the layers do in training: packed attention (Dao et al. 2022, arXiv:2205.14135, without padding), and one
    operator each for bias, activation and dropout, and for bias, dropout, residual and norm.
    """
    restore(model)
    lists = [(name, owner, child) for name, owner in model.named_modules() for child, layers in owner.named_children()
             if isinstance(layers, nn.ModuleList) and any(type(layer) in _LAYERS for layer in layers)]
    if not lists:
        raise ValueError(f"accelerate: {type(model).__name__} has no layers of {FAMILIES}")
    wrong: list[str] = []
    stacks: dict[str, tuple[str, int]] = {}
    for name, owner, child in lists:
        path, layers = f"{name}.{child}".lstrip("."), owner.get_submodule(child)
        assert isinstance(layers, nn.ModuleList)
        stacks[path] = type(layers[0]).__name__, len(layers)
        for index, layer in enumerate(layers):
            ours = _LAYERS.get(type(layer))
            problems = [f"{type(layer).__name__} is no layer we know"] if ours is None else ours.problems(layer)
            wrong += [f"{path}.{index}: {problem}" for problem in problems]
    if wrong:
        raise ValueError("accelerate: " + "; ".join(wrong))
    for _, owner, child in lists:
        layers = owner.get_submodule(child)
        for layer in layers.children():
            for module in layer.modules():
                if type(module) in _CLASSES:
                    module.__class__ = _CLASSES[type(module)]
        stack = Stack(owner, child, graphs)
        for layer in layers.children():
            layer.stack = stack
    return model, Report(stacks)


def restore(model: Model) -> Model:
    """Hugging Face's own layers back into ``model``, in place; nothing happens where they are there."""
    for module in model.modules():
        stack = module.__dict__.pop("stack", None) if isinstance(module, PackedLayer) else None
        if stack is not None:
            stack.release()
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
    return model
