"""The masks that ops draw, recomputed apart from them: Philox4x32-10 for CUDA, the reference's own draw elsewhere."""

from __future__ import annotations

import numpy as np
import torch

from lightseq_fairseq.ops import _dropout

WORD = np.uint64(0xFFFFFFFF)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Counters (N, 4) -> words (N, 4), 32 bits each in uint64 (Salmon et al. 2011, figure 3)."""
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    for step in range(10):
        k = [np.uint64((key[i] + step * bump) & 0xFFFFFFFF) for i, bump in enumerate((0x9E3779B9, 0xBB67AE85))]
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & WORD, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & WORD]
    return np.stack(c, 1)


def philox_numbers(count: int, seed: int) -> np.ndarray:
    """The 16-bit numbers of elements 0, 1, ... ``count`` - 1."""
    group = np.arange((count + 7) // 8, dtype=np.uint64)
    counter = np.stack([group & WORD, group >> np.uint64(32), group * 0, group * 0], 1)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], 2)  # (groups, 4, 2): low half first
    return halves.reshape(-1)[:count]


def multiplier(shape: tuple[int, ...], p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """What dropout multiplies by, in fp64 on the device of ``seed``; ones where ``p`` is 0."""
    if p == 0 or seed is None:
        return torch.ones(shape, dtype=torch.float64)
    if not seed.is_cuda:
        return _dropout.dropout(torch.ones(shape, dtype=torch.float64), p, seed)
    numbers = philox_numbers(int(np.prod(shape)), int(seed))
    kept = torch.from_numpy(numbers >= _dropout.threshold(p)).view(shape)
    return (kept.double() * _dropout.scale(p)).to(seed.device)


def new_seed(device: torch.device | str = "cpu") -> torch.Tensor:
    """A seed whose upper word is in use too."""
    return torch.randint(-(2**62), 2**62, (1,)).to(device)
