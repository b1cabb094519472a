"""Sentences that are being searched on the device: their memory, and the step that takes all of them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightseq_fairseq.generator.hypotheses import Array, Step
from lightseq_fairseq.generator.options import GenerationOptions
from lightseq_fairseq.layers.decode_step import DecodeBuffers, DecodeStep
from lightseq_fairseq.ops.beam_step import SETTINGS, Settings, beam_step_, token_statistics
from lightseq_fairseq.ops.block_ngrams import block_ngrams_
from lightseq_fairseq.ops.draw_tokens import draw_tokens


def settings_of(options: GenerationOptions, beam: int) -> Settings:
    """Of a sentence of ``beam`` beams."""
    return Settings(**{name: getattr(options, name) for name in Settings._fields})._replace(beam=beam)


def hides_eos(options: GenerationOptions) -> bool:
    """Whether eos at the limit is not to count and the record of the steps does not say what it counted: scores of
    diverse beams hold penalties as well."""
    return not options.score_forced_eos and (options.diverse_beam_groups > 0 or options.diversity_rate > 0)


@dataclass(frozen=True)
class Kind:
    """What the kernels of a step are, as far as options choose them; the rest of the options are data."""

    groups: int = 0
    """Of diverse beam search."""
    sampling: bool = False
    siblings: bool = False
    """Diverse siblings, at a rate that may be 0."""
    ngrams: bool = False
    """n-grams are blocked, at a size that may be 0."""

    @classmethod
    def of(cls, options: GenerationOptions) -> Kind:
        """What ``options`` ask for."""
        return cls(options.diverse_beam_groups, options.sampling, options.diversity_rate > 0,
                   options.no_repeat_ngram_size > 0)

    def covers(self, other: Kind) -> bool:
        """Whether a step of this kind can take such options, too."""
        return (self.groups == other.groups and self.sampling == other.sampling and self.siblings >= other.siblings
                and self.ngrams >= other.ngrams)


@dataclass
class DeviceState:
    """B sentences of K beams, T steps at most; tensors as in ops/beam_step.py, each sentence being at its own step."""

    step: DecodeStep
    kind: Kind
    buffers: DecodeBuffers
    limits: Tensor
    complete: Tensor
    idle: Tensor
    settings: Tensor
    scores: Tensor
    forced: Tensor
    record: Tensor
    overlap: Tensor | None
    """None but for groups."""
    uniforms: Tensor | None
    """None but for sampling."""

    @staticmethod
    def shapes(batch: int, beam: int, steps: int, kind: Kind) -> dict[str, tuple[int, ...]]:
        """Of what the host sets at the start of a sentence, 32 bits each; ``steps`` there are those so far."""
        shapes: dict[str, tuple[int, ...]] = dict(
            limits=(batch,), steps=(batch,), complete=(batch,), idle=(batch,), settings=(batch, SETTINGS),
            scores=(batch, beam), forced=(batch, steps))
        return shapes | {"overlap": (batch, kind.groups, kind.groups)} if kind.groups else shapes

    @classmethod
    def of(cls, step: DecodeStep, kind: Kind, tensors: dict[str, Tensor], source_tokens: int,
           cu_seqlens: Tensor) -> DeviceState:
        """Over ``tensors`` (int32) of :meth:`shapes`; ``cu_seqlens`` as in ops/decode_attention.py."""
        (batch, beam), most = tensors["scores"].shape, tensors["forced"].size(1)
        buffers = step.buffers(batch, beam, most, source_tokens, cu_seqlens, tensors["steps"])
        record = torch.zeros(most, batch, beam, len(Step._fields), dtype=torch.int32, device=step.device)
        settings, scores = (tensors[name].view(torch.float32) for name in ("settings", "scores"))
        uniforms = torch.zeros(batch, most, beam, device=step.device) if kind.sampling else None
        return cls(step, kind, buffers, tensors["limits"], tensors["complete"], tensors["idle"], settings, scores,
                   tensors["forced"], record, tensors.get("overlap"), uniforms)

    def advance(self) -> None:
        """The next step of every sentence that is not finished."""
        config, step = self.step.config, self.step
        types: dict[str, Any] = dict(vocab=config.tgt_vocab_size, pad=config.pad, eos=config.eos, unk=config.unk)
        logits = step(self.buffers)
        statistics = token_statistics(logits, self.settings, **types)
        steps, ancestors, drawn = self.buffers.steps, self.buffers.ancestors, None
        if self.kind.ngrams:
            block_ngrams_(logits, statistics, self.settings, self.forced, steps, self.complete, ancestors, self.record,
                          **types)
        if self.uniforms is not None:
            drawn = draw_tokens(logits, statistics, self.settings, self.forced, steps, self.complete, self.uniforms,
                                **types)
        beam_step_(logits, statistics, self.settings, self.limits, self.forced, drawn=drawn, steps=steps,
                   complete=self.complete, scores=self.scores, idle=self.idle, overlap=self.overlap,
                   ancestors=ancestors, record=self.record, x=self.buffers.x, embeddings=step.embeddings,
                   positions=step.input_positions, scale=step.embed_scale, first_position=step.first_position,
                   siblings=self.kind.siblings, **types)


def forced_tokens(prefix: Array | None, limit: int, steps: int, pad: int, eos: int) -> Array:
    """(T,) int32: what a sentence must say at each step, ``pad`` where it is free."""
    forced = np.full(steps, pad, np.int32)
    if prefix is not None:
        forced[:len(prefix)] = prefix[:steps]
    forced[limit:] = eos
    return forced


def columns_of(record: Array) -> list[Array]:
    """(T, B, K, 6) int32 -> the columns of hypotheses.Step, (T, B, K) each, of which all but the first are views."""
    floats = record.view(np.float32)
    return [record[..., 0].astype(bool), floats[..., 1], *(record[..., i] for i in (2, 3, 4)), floats[..., 5]]


class Table:
    """Integers of one width by name, on the device in one piece, with an image of it on the host."""

    def __init__(self, dtype: torch.dtype, device: torch.device, **shapes: tuple[int, ...]) -> None:
        counts = {name: int(np.prod(size)) for name, size in shapes.items()}
        aligned = {name: -(-count // 32) * 32 for name, count in counts.items()}
        self.on_device = torch.zeros(sum(aligned.values()), dtype=dtype, device=device)
        self.on_host = torch.zeros_like(self.on_device, device="cpu", pin_memory=device.type == "cuda")
        self.image: dict[str, Array] = {}
        self.tensors: dict[str, Tensor] = {}
        start = 0
        for name, size in shapes.items():
            part = slice(start, start + counts[name])
            self.tensors[name] = self.on_device[part].view(size)
            self.image[name] = self.on_host[part].view(size).numpy()
            start += aligned[name]

    def upload(self) -> None:
        """Host to device, in the order of the stream."""
        self.on_device.copy_(self.on_host, non_blocking=True)


class Snapshot:
    """What a tensor was at one moment of the stream, on the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.host = torch.zeros_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self.event = torch.cuda.Event() if tensor.is_cuda else None  # type: ignore[no-untyped-call]

    def take(self) -> Snapshot:
        """The moment is when all work given so far is done."""
        self.host.copy_(self.tensor, non_blocking=True)
        if self.event is not None:
            self.event.record()
        return self

    def wait(self) -> Array:
        """Waits for that moment; the values, 0 where none was taken."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.numpy()
