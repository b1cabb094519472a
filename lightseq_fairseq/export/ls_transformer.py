"""From an ``LSTransformer`` (``lightseq_fairseq.training``) to a ModelFile, whatever its norms, activation and ids.

The ``export_ls_*`` functions write such a model, too, as far as LightSeq's format goes: pre-LN models alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.export.checkpoint import ExportError
from lightseq_fairseq.model_file import ModelFile, ModelFileError
from lightseq_fairseq.model_file.lightseq import sinusoids
from lightseq_fairseq.model_file.spec import tied_tensors, validate

ACTIVATIONS = {"relu": "relu", "gelu": "gelu_accurate"}
"""LightSeq's gelu is the tanh form."""


def from_ls_transformer(state_dict: Mapping[str, Tensor], config: Any, start_id: int, end_id: int,
                        unk_id: int | None = None) -> ModelFile:
    """The model of ``LSTransformer(config)`` with the weights ``state_dict``.

    ``start_id`` is the first token that the decoder is fed, ``end_id`` ends a sentence. ExportError names weights that
    are missing, left over or of another shape.
    """
    tensors = {re.sub(r"embed_tokens\.embeddings$", "embed_tokens.weight", name): tensor.detach()
               for name, tensor in state_dict.items()}
    width, vocab, positions = config.hidden_size, config.vocab_size, config.max_seq_len
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_positions.weight"] = sinusoids(0, positions, width)
    description = TransformerConfig(
        src_vocab_size=vocab, tgt_vocab_size=vocab,
        encoder_layers=config.num_encoder_layer, decoder_layers=config.num_decoder_layer,
        encoder_embed_dim=width, decoder_embed_dim=width,
        encoder_ffn_embed_dim=config.intermediate_size, decoder_ffn_embed_dim=config.intermediate_size,
        encoder_attention_heads=config.nhead, decoder_attention_heads=config.nhead,
        activation_fn=ACTIVATIONS[config.activation_fn],
        encoder_normalize_before=config.pre_layer_norm, decoder_normalize_before=config.pre_layer_norm,
        encoder_positions="learned", decoder_positions="learned", position_offset=0,
        max_source_positions=positions, max_target_positions=positions, share_decoder_input_output_embed=True,
        bos=start_id, pad=config.padding_idx, eos=end_id, unk=min(3, vocab - 1) if unk_id is None else unk_id,
        decoder_start=start_id)
    model = ModelFile(description, tensors)
    try:
        validate(model)
    except ModelFileError as error:
        raise ExportError(f"from_ls_transformer: {error}") from None
    tensors |= {alias: tensors[name] for alias, name in tied_tensors(description).items()}
    return model
