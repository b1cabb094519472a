"""What decoding needs of a model: encode a batch, then turn the newest tokens into logits step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightseq_fairseq.config import TransformerConfig


class DecodeState(Protocol):
    """One batch being decoded: B live sentences with K beams each."""

    def step(self, tokens: Tensor, need_attention: bool) -> tuple[Tensor, Tensor | None]:
        """The newest token of each beam, (B, K) int64; K is 1 at the first step, when all beams are still one.

        Returns logits (B, K, V) in fp32, which the caller may overwrite, and, if needed, the attention (B, K, S)
        of the last decoder layer over source positions, averaged over heads.
        """

    def reorder(self, parents: Tensor) -> None:
        """(B, K) int64: beam k of sentence b continues its beam ``parents[b, k]``."""

    def keep(self, sentences: Tensor) -> None:
        """(B',) int64, ascending: only these sentences go on."""


class SequenceModel(Protocol):
    """A model that can be decoded."""

    @property
    def config(self) -> TransformerConfig:
        """Vocabulary sizes, special tokens and length limits."""

    @property
    def device(self) -> torch.device:
        """Where the state's tensors live."""

    def encode(self, src_tokens: Sequence[Tensor], beam: int, max_steps: int) -> DecodeState:
        """1-D int64 sentences, eos included, without pads; at most ``max_steps`` steps will follow."""
