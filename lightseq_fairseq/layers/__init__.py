"""Transformer layers over packed tokens, with fairseq's parameter names: the same modules train and decode."""

from lightseq_fairseq.layers.attention import MultiheadAttention
from lightseq_fairseq.layers.decoder import TransformerDecoder
from lightseq_fairseq.layers.encoder import TransformerEncoder
from lightseq_fairseq.layers.packing import Packing

__all__ = ["MultiheadAttention", "Packing", "TransformerDecoder", "TransformerEncoder"]
