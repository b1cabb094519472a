"""What of a layer of Hugging Face's ours do not know, in words."""

from __future__ import annotations

from typing import Any

from torch import nn

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_fast": "gelu_accurate",
    "gelu_accurate": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu_python_tanh": "gelu_accurate",
    "linear": "linear",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "swish",
    "swish": "swish",
    "tanh": "tanh",
}
"""Hugging Face's names of the activations of our layers, and fairseq's, which are ours."""


def type_problems(owner: nn.Module, expected: type[nn.Module], *paths: str) -> list[str]:
    """What is wrong with those of the ``paths`` below ``owner`` that are not of the ``expected`` type with a bias."""
    problems = []
    for path in paths:
        module = owner.get_submodule(path)
        if type(module) is not expected:
            problems.append(f"{path} is a {type(module).__name__}, not a plain {expected.__name__} (merge or remove "
                            "what wraps it)")
        elif module.bias is None:
            problems.append(f"{path} has no bias")
    return problems


def activation_problems(name: Any) -> list[str]:
    """Whether our layers lack Hugging Face's activation ``name``, in words."""
    if isinstance(name, str) and name in ACTIVATIONS:
        return []
    return [f"activation {name!r} (use one of {', '.join(ACTIVATIONS)})"]


def agreement_problems(behind_attention: float, at_end: float) -> list[str]:
    """Whether the two dropouts in front of a layer's residuals have different probabilities, in words."""
    if behind_attention == at_end:
        return []
    return [f"two dropout probabilities, {behind_attention} behind attention and {at_end} at the end"]


def agreed(behind_attention: float, at_end: float) -> float:
    """The probability of both dropouts in front of a layer's residuals; ValueError where they have come to differ."""
    problems = agreement_problems(behind_attention, at_end)
    if problems:
        raise ValueError(f"lightseq_fairseq.huggingface: {problems[0]} (set both, or restore(model))")
    return at_end
