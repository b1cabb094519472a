"""The operators that lie between the GEMMs. Each file opens with its formula and shapes; the plain PyTorch
reference is the definition, which any faster implementation must match."""

from lightseq_fairseq.ops.activation import activation_dropout
from lightseq_fairseq.ops.attention import attention, attention_weights
from lightseq_fairseq.ops.dropout import dropout_residual
from lightseq_fairseq.ops.embedding import embedding
from lightseq_fairseq.ops.layer_norm import layer_norm
from lightseq_fairseq.ops.linear import InferenceLinear

__all__ = ["InferenceLinear", "activation_dropout", "attention", "attention_weights", "dropout_residual", "embedding",
           "layer_norm"]
