"""``--arch ls_transformer_lm*``: fairseq's Transformer language model with our decoder inside.

Options, architectures, parameter names and checkpoints are those of fairseq's ``transformer_lm``: its GPT, GPT-2 and
GPT-3 sizes. Adaptive and character inputs, and adaptive softmax, are refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from fairseq.models.transformer import TransformerConfig as FairseqTransformerConfig
from fairseq.models.transformer_lm import (
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)
from torch import Tensor

from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.embedding import token_embedding
from lightseq_fairseq.plugin.ls_transformer import (
    LSTransformerDecoder,
    layer_config,
    neighbours_of,
    refuse_unsupported,
)


@register_model("ls_transformer_lm", dataclass=TransformerLanguageModelConfig)
class LSTransformerLanguageModel(TransformerLanguageModel):
    """fairseq's TransformerLanguageModel with our decoder.

    ``forward(..., packed_output=True)`` computes real tokens alone, which ``ls_cross_entropy`` asks for.
    """

    supports_packed_output = True

    @classmethod
    def build_model(cls, args: Any, task: Any) -> LSTransformerLanguageModel:
        """fairseq's entry point; ValueError names options that are not supported."""
        refuse_unsupported(args)
        if args.character_embeddings:
            raise ValueError("ls_transformer_lm does not support --character-embeddings (use subword units); fairseq's "
                             "own `transformer_lm` does")
        if args.decoder_layers_to_keep:
            args.decoder_layers = len(args.decoder_layers_to_keep.split(","))
        if getattr(args, "max_target_positions", None) is None:
            args.max_target_positions = getattr(args, "tokens_per_sample", DEFAULT_MAX_TARGET_POSITIONS)
        cfg = FairseqTransformerConfig.from_namespace(args)
        cfg.no_cross_attention = True
        dictionary = task.target_dictionary
        config = replace(layer_config(cfg, dictionary, dictionary), decoder_input_dim=args.decoder_input_dim)
        embed_tokens = token_embedding(len(task.source_dictionary), config.input_dim, dictionary.pad())
        return cls(LSTransformerDecoder(cfg, config, dictionary, embed_tokens))

    def forward(self, src_tokens: Tensor, packed_output: bool = False, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """(B, T) int64 -> logits (B, T, V) of the tokens that follow, and fairseq's extra dict.

        ``packed_output``: logits (N, V) of the N tokens that are not padding, row by row, and an empty dict.
        """
        if not packed_output:
            return super().forward(src_tokens, **kwargs)
        packing = Packing.of(src_tokens, self.decoder.padding_idx)
        return self.forward_packed(None, None, packing.pack(src_tokens), packing), {}

    known_forward = forward
    """What a subclass replaces that computes something of its own."""

    def forward_packed(self, source_tokens: Tensor | None, source_packing: Packing | None, previous_tokens: Tensor,
                       packing: Packing) -> Tensor:
        """Packed previous tokens (N,) int64 -> logits (N, V); a language model has no source."""
        x, _ = self.decoder.decode(previous_tokens, packing)
        return self.decoder.output_layer(x)

    @property
    def stacks(self) -> list[Any]:
        """The decoder."""
        return [self.decoder]

    def neighbouring_parameters(self) -> list[list[Tensor]]:
        """Parameters that one GEMM uses together where they are adjacent in memory, in its order."""
        return neighbours_of(self.decoder.layers)


for _architecture in ("_big", "_gpt", *(f"_gpt2_{size}" for size in
                                        ("small", "tiny", "medium", "big", "big_wide", "bigger")),
                      *(f"_gpt3_{size}" for size in ("small", "medium", "large", "xl", "2_7", "6_7", "13", "175"))):
    if f"transformer_lm{_architecture}" in ARCH_CONFIG_REGISTRY:  # 0.12.2 lacks some
        register_model_architecture("ls_transformer_lm", f"ls_transformer_lm{_architecture}")(
            ARCH_CONFIG_REGISTRY[f"transformer_lm{_architecture}"])
