"""Our attention in the place of one of Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.attention import PackedAttention


class CachingAttention(PackedAttention, nn.Module):
    """Our attention over the modules of one of Hugging Face's, ``original``, whose own forward stays at hand."""

    original: ClassVar[type[nn.Module]]
    layer_idx: int
    keep: Callable[[Tensor], object] | None = None
    """Is handed keys and values of this call, (N, 2, H, D)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's, or ours where a Packing comes second."""
        ours = len(args) > 1 and isinstance(args[1], Packing)
        forward: Callable[..., Any] = PackedAttention.forward if ours else self.original.forward
        return forward(self, *args, **kwargs)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As our attention has it, which keeps keys and values where asked to."""
        qkv, x = self.project_uncached(x)
        if self.keep is not None:
            self.keep(qkv[:, 1:])
        return qkv, x

    def project_uncached(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> (N, 3, H, D) and ``x``."""
        return super().project(x)

    def project_keys_values(self, source: Tensor) -> Tensor:
        """As our attention has it, and kept where asked to."""
        keys_values = super().project_keys_values(source)
        if self.keep is not None:
            self.keep(keys_values)
        return keys_values


def fill_cache(packing: Packing, cache: Any, layer_idx: int, keys_values: Tensor) -> None:
    """Packed (N, 2, H, D) into Hugging Face's ``cache``, (B, H, T, D) each with 0 in empty slots."""
    keys, values = packing.unpack(keys_values).permute(2, 0, 3, 1, 4)  # (B, T, 2, H, D) -> 2 x (B, H, T, D)
    cache.update(keys, values, layer_idx)
