"""``--arch ls_roberta_base | ls_roberta_large | ls_roberta_prenorm | ls_xlm``: fairseq's RoBERTa with our encoder.

Options, initialisation, heads, parameter names and checkpoints are those of fairseq's ``roberta``; train it with
``--task masked_lm --criterion ls_masked_lm`` or fine-tune it with fairseq's ``sentence_prediction``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from fairseq.models.roberta.model import RobertaEncoder, RobertaLMHead, RobertaModel
from fairseq.models.roberta.model import base_architecture as base_roberta
from fairseq.models.transformer import TransformerConfig as FairseqTransformerConfig
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from lightseq_fairseq import ops
from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.linear import linear
from lightseq_fairseq.plugin.ls_bart import initialise
from lightseq_fairseq.plugin.ls_transformer import (
    LSTransformerEncoder,
    layer_config,
    neighbours_of,
    refuse_unsupported,
)

_PRUNING = {"mha_reg_scale_factor": 0.0, "ffn_reg_scale_factor": 0.0, "mha_heads_to_keep": -1,
            "ffn_blocks_to_remove": -1}
"""Options of adaptive pruning, which needs fairseq's own layers, and their values when it is off."""


class LSRobertaLMHead(RobertaLMHead):
    """fairseq's head for masked tokens; bias and activation are one operator, and so is the norm."""

    def __init__(self, embed_dim: int, output_dim: int, activation_fn: str, weight: Tensor | None = None) -> None:
        super().__init__(embed_dim, output_dim, activation_fn, weight)
        self.activation_name = activation_fn

    def forward(self, features: Tensor, masked_tokens: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(..., C), of which only the rows that ``masked_tokens`` (...) marks where it is given -> (M or ..., V)."""
        if masked_tokens is not None:
            features = features[masked_tokens]
        x, norm = features.reshape(-1, features.size(-1)), self.layer_norm
        x = ops.bias_activation_dropout(linear(x, self.dense.weight), self.dense.bias, self.activation_name)
        x = ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
        return F.linear(x, self.weight, self.bias).view(*features.shape[:-1], -1)


class LSRobertaEncoder(RobertaEncoder):
    """fairseq's RobertaEncoder with our layers, in which only real tokens are computed."""

    sentence_encoder: LSTransformerEncoder

    def build_encoder(self, args: Any, dictionary: Any, embed_tokens: nn.Embedding) -> LSTransformerEncoder:
        """Our encoder of fairseq's arguments, with BERT's initial weights."""
        cfg = FairseqTransformerConfig.from_namespace(args)
        config = replace(layer_config(cfg, dictionary, dictionary), stacks="encoder")
        encoder = LSTransformerEncoder(cfg, config, dictionary, embed_tokens)
        encoder.apply(initialise)
        return encoder

    def build_lm_head(self, embed_dim: int, output_dim: int, activation_fn: str,
                      weight: Tensor | None) -> LSRobertaLMHead:
        """Our head over features of ``embed_dim``; ``weight`` (V, embed_dim) where it is tied to the embedding."""
        return LSRobertaLMHead(embed_dim, output_dim, activation_fn, weight)

    def forward(self, src_tokens: Tensor, features_only: bool = False, return_all_hiddens: bool = False,
                masked_tokens: Tensor | None = None, **unused: Any) -> tuple[Tensor, dict[str, Any]]:
        """(B, T) int64 -> logits (B, T, V), (M, V) of the M slots that ``masked_tokens`` (B, T) marks, or with
        ``features_only`` (B, T, C); and fairseq's extra dict."""
        if masked_tokens is None or features_only or return_all_hiddens:
            return super().forward(src_tokens, features_only, return_all_hiddens, masked_tokens, **unused)
        packing = Packing.of(src_tokens, self.sentence_encoder.padding_idx)
        x = self.sentence_encoder.encode(packing.pack(src_tokens), packing)
        return self.lm_head(x, packing.pack(masked_tokens.expand_as(src_tokens))), {"inner_states": None}


@register_model("ls_roberta")
class LSRobertaModel(RobertaModel):
    """fairseq's RobertaModel with our encoder."""

    gives_logits_away = True
    """Nothing but the criterion reads the logits of masked tokens, which it may overwrite."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> LSRobertaModel:
        """fairseq's entry point; ValueError names options that are not supported."""
        with open_dict(args) if OmegaConf.is_config(args) else nullcontext():
            return cls._build(args, task)

    @classmethod
    def _build(cls, args: Any, task: Any) -> LSRobertaModel:
        base_roberta(args)
        refuse_unsupported(args, "ls_roberta", "roberta")
        pruning = [name for name, off in _PRUNING.items() if getattr(args, name, off) not in (off, None)]
        if pruning:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in pruning)
            raise ValueError(f"ls_roberta does not support {options} (adaptive pruning); fairseq's own `roberta` does")
        if getattr(args, "max_positions", None) is None:
            if getattr(args, "tokens_per_sample", None) is None:
                args.tokens_per_sample = task.max_positions()
            args.max_positions = args.tokens_per_sample
        return cls(args, LSRobertaEncoder(args, task.source_dictionary))

    known_forward = RobertaModel.forward
    """What a subclass replaces that computes something of its own."""

    def forward_packed(self, source_tokens: Tensor, source_packing: Packing, masked_rows: Tensor,
                       packing: Packing) -> Tensor:
        """Packed tokens (N,) and rows (M,) of the masked ones, int64 -> logits (M, V)."""
        x = self.encoder.sentence_encoder.encode(source_tokens, source_packing)
        return self.encoder.lm_head(x.index_select(0, masked_rows))

    @property
    def stacks(self) -> list[Any]:
        """The encoder."""
        return [self.encoder.sentence_encoder]

    def neighbouring_parameters(self) -> list[list[Tensor]]:
        """Parameters that one GEMM uses together where they are adjacent in memory, in its order."""
        return neighbours_of(self.encoder.sentence_encoder.layers)

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """nn.Module's; BERT's initialisation knows our modules as it does fairseq's, so that one seed gives one
        model."""
        return super().apply(initialise if fn is init_bert_params else fn)


for _architecture in ("roberta", "roberta_base", "roberta_large", "roberta_prenorm", "xlm"):
    if _architecture in ARCH_CONFIG_REGISTRY:  # older versions lack some
        register_model_architecture("ls_roberta", f"ls_{_architecture}")(ARCH_CONFIG_REGISTRY[_architecture])
