"""Our attention in the place of one of Hugging Face's."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.attention import PackedAttention


class CachingAttention(PackedAttention, nn.Module):
    """Our attention over the modules of one of Hugging Face's, ``original``, whose own forward stays at hand."""

    original: ClassVar[type[nn.Module]]
    layer_idx: int
    filling: tuple[Packing, Any] | None = None
    """The layout of the keys of this call and the cache that they go to."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's, or ours where a Packing comes second."""
        if args and isinstance(args[0], Packing):
            return PackedAttention.forward(self, x, *args, **kwargs)
        return self.original.forward(self, x, *args, **kwargs)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As our attention has it, and keys and values into the cache of this call if there is one."""
        qkv, x = self.project_uncached(x)
        self._fill(qkv[:, 1:])
        return qkv, x

    def project_uncached(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> (N, 3, H, D) and ``x``."""
        return super().project(x)

    def project_keys_values(self, source: Tensor) -> Tensor:
        """As our attention has it, and into the cache of this call if there is one."""
        keys_values = super().project_keys_values(source)
        self._fill(keys_values)
        return keys_values

    def _fill(self, keys_values: Tensor) -> None:
        """(N, 2, H, D) into the cache, (B, H, T, D) each with 0 in empty slots."""
        if self.filling is not None:
            packing, cache = self.filling
            keys, values = packing.unpack(keys_values).permute(2, 0, 3, 1, 4)  # (B, T, 2, H, D) -> 2 x (B, H, T, D)
            cache.update(keys, values, self.layer_idx)
