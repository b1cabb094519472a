"""The operators that lie between the GEMMs. Each file opens with its formula and shapes; the plain PyTorch
reference is the definition, which any faster implementation must match."""

from lightseq_fairseq.ops.attention import attention, attention_weights, cross_attention, self_attention
from lightseq_fairseq.ops.bias_activation_dropout import bias_activation_dropout
from lightseq_fairseq.ops.bias_dropout_residual import bias_dropout_residual
from lightseq_fairseq.ops.bias_dropout_residual_layer_norm import bias_dropout_residual_layer_norm
from lightseq_fairseq.ops.column_sum import column_sum_
from lightseq_fairseq.ops.embedding import embedding
from lightseq_fairseq.ops.layer_norm import layer_norm
from lightseq_fairseq.ops.linear import InferenceLinear, linear_to_logits
from lightseq_fairseq.ops.parts_residual_layer_norm import parts_residual_layer_norm

__all__ = ["InferenceLinear", "attention", "attention_weights", "bias_activation_dropout", "bias_dropout_residual",
           "bias_dropout_residual_layer_norm", "column_sum_", "cross_attention", "embedding", "layer_norm",
           "linear_to_logits", "parts_residual_layer_norm", "self_attention"]
