"""Checkpoints in, model files out."""

from lightseq_fairseq.export.checkpoint import ExportError
from lightseq_fairseq.export.fairseq import from_checkpoints
from lightseq_fairseq.export.lightseq_api import (
    export_fs_weights,
    export_ls_config,
    export_ls_decoder,
    export_ls_embedding,
    export_ls_encoder,
    unpack_ls_layers,
)
from lightseq_fairseq.export.ls_transformer import from_ls_transformer

__all__ = ["ExportError", "export_fs_weights", "export_ls_config", "export_ls_decoder", "export_ls_embedding",
           "export_ls_encoder", "from_checkpoints", "from_ls_transformer", "unpack_ls_layers"]
