"""``--arch ls_bart_base | ls_bart_large | ls_mbart_base | ls_mbart_large``: fairseq's BART with our layers inside.

A BART is a Transformer of other settings (learned positions, a norm behind the embedding, gelu) with BERT's
initialisation and classification heads; checkpoints of fairseq's own ``bart`` load and fine-tune.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from fairseq.models.bart import BARTModel
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from torch import Tensor, nn

from lightseq_fairseq.layers import MultiheadAttention
from lightseq_fairseq.layers.embedding import PositionalEmbedding
from lightseq_fairseq.plugin.ls_transformer import PackedTransformer


@register_model("ls_bart")
class LSBARTModel(PackedTransformer, BARTModel):
    """fairseq's BARTModel with our encoder and decoder."""

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """nn.Module's; BERT's initialisation knows our modules as it does fairseq's, so that one seed gives one
        model."""
        return super().apply(initialise if fn is init_bert_params else fn)

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None, prev_output_tokens: Tensor,
                features_only: bool = False, classification_head_name: str | None = None,
                packed_output: bool = False, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """fairseq's (B, T, V) or, with ``classification_head_name``, that head's (B, classes); and its extra dict.

        ``packed_output``: logits (N, V) of the N target slots that are not padding, row by row, and an empty dict.
        """
        if packed_output and classification_head_name is None:
            return self.forward_packed_rows(src_tokens, prev_output_tokens, features_only), {}
        self.refuse_fp8()
        return super().forward(src_tokens, src_lengths, prev_output_tokens, features_only, classification_head_name,
                               **kwargs)

    known_forward = forward


def initialise(module: nn.Module) -> None:
    """BERT's initialisation of a module of fairseq's or ours, draw for draw."""
    init_bert_params(module)
    if isinstance(module, PositionalEmbedding) and module.learned:
        module.weight.data.normal_(std=0.02)
        module.weight.data[module.pad] = 0
    if isinstance(module, MultiheadAttention):  # whose projections fairseq draws twice
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            projection.weight.data.normal_(std=0.02)


for _architecture in ("bart_base", "bart_large", "mbart_base", "mbart_large", "mbart_base_wmt20"):
    register_model_architecture("ls_bart", f"ls_{_architecture}")(ARCH_CONFIG_REGISTRY[_architecture])
