"""Packing: which slots of a padded (B, T) batch hold tokens, so that only those are computed.

A packed tensor (N, ...) holds the N real tokens of a batch row by row; ``cu_seqlens`` (B + 1,) says where each
sentence begins. Padding may stand on either side, as fairseq pads sources left and targets right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def round_up(count: int, least: int, steps: int = 8) -> int:
    """The next size of at most a ``steps``-th more, a multiple of ``least``."""
    step = max(least, 1 << max(count.bit_length() - steps.bit_length(), 0))
    return -(-count // step) * step


@dataclass(frozen=True)
class Packing:
    """The layout of one packed batch."""

    rows: Tensor | None
    """(N,) int64 slots b * T + t that hold tokens; None when all do."""
    cu_seqlens: Tensor
    """(B + 1,) int32 first packed row of each sentence, and N."""
    positions: Tensor
    """(N,) int64 place of each token in its own sentence, from 0."""
    batch: int
    width: int
    """T, also an upper bound of the lengths."""

    @classmethod
    def of(cls, tokens: Tensor, pad: int) -> Packing:
        """Packing of ``tokens`` (B, T) int64, in which ``pad`` marks empty slots."""
        real = tokens.ne(pad)
        batch, width = tokens.shape
        ordinal = real.cumsum(1)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=tokens.device)
        if width:
            cu_seqlens[1:] = ordinal[:, -1].cumsum(0)
        rows = real.flatten().nonzero().squeeze(1)
        positions = (ordinal.flatten() - 1)[rows]
        return cls(None if rows.numel() == tokens.numel() else rows, cu_seqlens, positions, batch, width)

    @classmethod
    def full(cls, batch: int, width: int, device: torch.device | str = "cpu") -> Packing:
        """Packing of ``batch`` sentences of ``width`` tokens each, without padding."""
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * width
        positions = torch.arange(width, device=device).repeat(batch)
        return cls(None, cu_seqlens, positions, batch, width)

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        """Packing of right-padded sentences of these lengths, already laid one after the other."""
        counts = torch.tensor(lengths, dtype=torch.int64)
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = counts.cumsum(0)
        width = max(lengths, default=0)
        real = torch.arange(width) < counts[:, None]
        rows = real.flatten().nonzero().squeeze(1)
        positions = rows % max(width, 1)
        full = rows.numel() == real.numel()
        return cls(None if full else rows.to(device), cu_seqlens.to(device), positions.to(device), len(lengths), width)

    @property
    def count(self) -> int:
        """N, the tokens."""
        return self.positions.numel()

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...)."""
        flat = padded.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """(N, ...) -> (B, T, ...), empty slots holding ``fill``."""
        shape = (self.batch, self.width, *packed.shape[1:])
        if self.rows is None:
            return packed.reshape(shape)
        padded = packed.new_full((self.batch * self.width, *packed.shape[1:]), fill)
        return padded.index_copy(0, self.rows, packed).view(shape)

    def flush_left(self) -> Packing:
        """The same sentences with the padding of every one behind it."""
        if self.rows is None:
            return self
        sentence = self.rows // self.width
        return Packing(sentence * self.width + self.positions, self.cu_seqlens, self.positions, self.batch, self.width)

    def place(self, flush_left: Tensor) -> Tensor:
        """(B, T, ...) with every sentence at the left edge -> (B, T, ...) with tokens where the batch has them."""
        if self.rows is None:
            return flush_left
        return self.unpack(flush_left[self.rows // self.width, self.positions])

    def followed_by(self, other: Packing) -> tuple[Packing, Tensor]:
        """Each sentence of ``self`` with the same sentence of ``other`` behind it.

        Returns the joint packing and an order (N1 + N2,) int64, such that
        ``torch.cat((a, b)).index_select(0, order)`` joins packed ``a`` and ``b``.
        """
        first, second = self.cu_seqlens.diff().long(), other.cu_seqlens.diff().long()
        sentence = torch.cat((torch.repeat_interleave(first, output_size=self.count),  # nothing is asked of a GPU
                              torch.repeat_interleave(second, output_size=other.count)))
        place = torch.cat((self.positions, other.positions + first[sentence[self.count:]]))
        width = self.width + other.width
        order = torch.argsort(sentence * (width + 1) + place)
        slots = (sentence * width + place)[order]
        joint = Packing(slots, self.cu_seqlens + other.cu_seqlens, place[order], self.batch, width)
        return joint, order
