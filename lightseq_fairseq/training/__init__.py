"""LightSeq's training layers: the names, arguments and shapes of ``lightseq.training``, as ordinary torch modules.

::

    config = LSTransformer.get_config(model="transformer-base", max_seq_len=300, vocab_size=32000, padding_idx=1,
                                      num_encoder_layer=6, num_decoder_layer=6, fp16=True, local_rank=0)
    model = LSTransformer(config)

They are this package's layers behind another signature: parameters are separate and named as fairseq names them, memory
is torch's, and nothing is kept outside the module. README.md in this folder says where that differs from LightSeq.
"""

from typing import Any

from lightseq_fairseq.training.adam import LSAdam
from lightseq_fairseq.training.layers import (
    LSCrossEntropyLayer,
    LSTransformerDecoderLayer,
    LSTransformerEmbeddingLayer,
    LSTransformerEncoderLayer,
)
from lightseq_fairseq.training.transformer import LSTransformer, LSTransformerDecoder, LSTransformerEncoder

__all__ = ["LSAdam", "LSCrossEntropyLayer", "LSTransformer", "LSTransformerDecoder", "LSTransformerDecoderLayer",
           "LSTransformerEmbeddingLayer", "LSTransformerEncoder", "LSTransformerEncoderLayer"]

_EXPORT = ("export_fs_weights", "export_ls_config", "export_ls_decoder", "export_ls_embedding", "export_ls_encoder")
"""What LightSeq's module of this name has, too; imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name in _EXPORT:
        from lightseq_fairseq import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
