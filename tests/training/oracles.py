"""torch's own Transformer layers as LightSeq's, and small configurations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES: dict[str, Any] = dict(max_seq_len=17, hidden_size=24, intermediate_size=41, nhead=3)
NO_DROPOUT: dict[str, Any] = dict(attn_prob_dropout_ratio=0.0, activation_dropout_ratio=0.0, hidden_dropout_ratio=0.0)
KINDS = [(pre, activation) for pre in (True, False) for activation in ("relu", "gelu")]


def values(pre: bool = True, activation: str = "relu", **changes: Any) -> dict[str, Any]:
    return SIZES | NO_DROPOUT | dict(pre_layer_norm=pre, activation_fn=activation) | changes


def torch_layer(kind: type, pre: bool, activation: str, dtype: torch.dtype = torch.float64) -> Any:
    """Of the same sizes, every parameter off its initial value."""
    function = F.relu if activation == "relu" else lambda x: F.gelu(x, approximate="tanh")
    layer = kind(SIZES["hidden_size"], SIZES["nhead"], SIZES["intermediate_size"], dropout=0.0, activation=function,
                 batch_first=True, norm_first=pre, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer


def lightseq_lists(layer: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of a torch layer in LightSeq's order; the keys and values of a decoder's last."""
    weights, biases = [], []

    def add(module: Any) -> None:
        weights.append(module.weight)
        biases.append(module.bias)

    attention: Any = layer.self_attn
    weights += attention.in_proj_weight.chunk(3)
    biases += attention.in_proj_bias.chunk(3)
    add(attention.out_proj)
    add(layer.norm1)
    last = []
    if hasattr(layer, "multihead_attn"):
        cross: Any = layer.multihead_attn
        size = cross.embed_dim
        last = [(cross.in_proj_weight[size:], cross.in_proj_bias[size:])]
        weights.append(cross.in_proj_weight[:size])
        biases.append(cross.in_proj_bias[:size])
        add(cross.out_proj)
        add(layer.norm2)
    add(layer.linear1)
    add(layer.linear2)
    add(layer.norm3 if hasattr(layer, "norm3") else layer.norm2)
    for weight, bias in last:
        weights.append(weight)
        biases.append(bias)
    return weights, biases


def gradients(layer: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`lightseq_lists` of the gradients of a torch layer."""
    kept = {name: parameter.grad for name, parameter in layer.named_parameters()}
    copy = type(layer)(SIZES["hidden_size"], SIZES["nhead"], SIZES["intermediate_size"], dtype=torch.float64)
    copy.load_state_dict(kept)
    return lightseq_lists(copy)


def padded_mask(lengths: list[int], width: int, left: bool = False) -> Tensor:
    """(B, width), True where there is padding."""
    mask = torch.arange(width) >= torch.tensor(lengths)[:, None]
    return mask.flip(1) if left else mask
