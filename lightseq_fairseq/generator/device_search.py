"""Beam search that stays on the device: steps follow one another without the host, which reads the record at the end.

Same rules and hypotheses as :func:`lightseq_fairseq.generator.beam_search.decode`, for the options that
:meth:`DeviceSearch.takes`. On CUDA a step is a graph, captured once for each :class:`_Shape`; without CUDA the
same operators run one by one. A sentence that is finished stays in the batch until all are.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.generator.beam_search import check, check_found
from lightseq_fairseq.generator.device_state import (
    DeviceState,
    Kind,
    Snapshot,
    Table,
    columns_of,
    hides_eos,
    settings_of,
)
from lightseq_fairseq.generator.hypotheses import Array, Hypothesis, Ranking, read, without_forced
from lightseq_fairseq.generator.model import Transformer
from lightseq_fairseq.generator.options import GenerationOptions
from lightseq_fairseq.generator.refill import Refill, Slots
from lightseq_fairseq.layers import Packing, decode_step
from lightseq_fairseq.layers.capture import captured
from lightseq_fairseq.layers.decode_step import DecodeStep
from lightseq_fairseq.layers.incremental import IncrementalDecoder
from lightseq_fairseq.layers.packing import round_up
from lightseq_fairseq.ops.beam_step import MAX_BEAM, MAX_TILES, TILE

_STEPS_AHEAD = 2
"""Steps under way while the host waits for the flag of an earlier one; the device never waits for the host. A graph of
2 or of 4 steps was no faster than one of each (H200)."""
_MOST_PLANS = 16
"""Shapes remembered; the one that was used longest ago is forgotten."""
_MOST_CACHE_BYTES = 16 << 30
"""Keys and values of all shapes remembered, on a GPU at most a quarter of its memory; what alone needs more is decoded
step by step, where the cache grows with the sentences."""
_FEW_TOKENS = 8192
"""Source tokens up to which one shape serves twice as many: its graphs need not be captured anew, and 4 096 tokens take
the encoder of a base model 0.6 ms (H200)."""
_LEAST_SLOTS, _MOST_SLOTS = 8, 767
"""Sentences decoded together by :class:`Refill`: one more makes up the batch. More gain little (10 000 sentences, base,
on an H200: 11 400 a second in 511 slots, 15 000 in 767, 15 300 in 1023)."""


class _Shape(NamedTuple):
    """Sizes that a plan is made for, each rounded up."""

    batch: int
    beam: int
    steps: int
    source_tokens: int
    source_width: int
    kind: Kind = Kind()

    @classmethod
    def around(cls, lengths: Sequence[int], beam: int, steps: int, kind: Kind) -> _Shape:
        """Batches of 1, 2, 3, 4, 6, 8, 12...; powers of two of the others, and sixteenths between them of many
        tokens, whose number is the encoder's work. ``lengths`` are those of the sources."""
        power, tokens = _power_of_two(len(lengths), 1), sum(lengths)
        batch = power * 3 // 4 if len(lengths) <= power * 3 // 4 else power
        tokens = _power_of_two(tokens, 64) if tokens <= _FEW_TOKENS else round_up(tokens, 64, steps=16)
        return cls(batch, beam, _power_of_two(steps, 32), tokens, _power_of_two(max(lengths), 32), kind)


def _most_positions(config: TransformerConfig) -> int:
    """Tokens of a source, for which there are positions: in a language model those of its decoder."""
    return config.max_source_positions if config.has_encoder else config.max_target_positions


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


class DeviceSearch:
    """Beam search with one model whose steps need no host."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        served = isinstance(model.decoder, IncrementalDecoder) and decode_step.fits(model.config)
        self.step = DecodeStep(model.decoder) if served else None  # type: ignore[arg-type]
        self.plans: OrderedDict[_Shape, _Plan] = OrderedDict()
        self.most_bytes = _MOST_CACHE_BYTES
        if model.device.type == "cuda":
            self.most_bytes = min(self.most_bytes, torch.cuda.get_device_properties(model.device).total_memory // 4)

    def serves(self, options: GenerationOptions) -> bool:
        """Whether this is a model and a search of the device's; what is not is for beam_search.decode."""
        config = self.model.config
        beam = min(options.beam, config.tgt_vocab_size - 1)
        if (self.step is None or options.match_source_len or options.constraints
                or options.return_attention or options.return_alignment or hides_eos(options)):
            return False
        tiles = -(-config.tgt_vocab_size // TILE)
        return beam <= MAX_BEAM and beam * tiles <= MAX_TILES and 2 * beam <= config.tgt_vocab_size - 3

    def takes(self, options: GenerationOptions, lengths: Sequence[int], max_lens: Sequence[int]) -> bool:
        """Whether :meth:`decode` serves such sources and options; what it does not is for beam_search.decode."""
        if not lengths or not self.serves(options):
            return False
        config = self.model.config
        beam, longest = min(options.beam, config.tgt_vocab_size - 1), max(max_lens) + 1
        return (longest <= config.max_target_positions
                and self._cache_bytes(_Shape.around(lengths, beam, longest, Kind.of(options)))
                <= self.most_bytes)

    def _cache_bytes(self, shape: _Shape) -> int:
        """Keys and values of self-attention, and what cross-attention reads."""
        config, tokens = self.model.config, shape.batch * shape.beam * shape.steps
        assert self.step is not None
        source = math.prod(self.step.source_shape(shape.beam, shape.source_tokens))
        return (tokens * config.decoder_layers * 2 * config.decoder_embed_dim + source) * self.model.dtype.itemsize

    @torch.no_grad()
    def decode(self, src_tokens: Sequence[Tensor], options: GenerationOptions, prefix_tokens: Tensor | None,
               max_lens: Sequence[int], draws: torch.Generator | None = None) -> list[list[Hypothesis]]:
        """As beam_search.decode, save that samples draw other uniforms."""
        config = self.model.config
        check([self.model], src_tokens, options, prefix_tokens, max_lens)
        lengths, beam = [sentence.numel() for sentence in src_tokens], min(options.beam, config.tgt_vocab_size - 1)
        shape = _Shape.around(lengths, beam, max(max_lens) + 1, Kind.of(options))
        if options.sampling and draws is None and options.seed is not None:
            draws = torch.Generator(self.model.device).manual_seed(options.seed)
        record = self._plan(shape).run(src_tokens, options, prefix_tokens, max_lens, draws)
        uncounted = None if options.score_prefix or prefix_tokens is None else prefix_tokens != config.pad
        record = without_forced(record, None if uncounted is None else uncounted.sum(1).tolist(),
                                None if options.score_forced_eos else max_lens)
        found = read(record, max_lens, Ranking(options.lenpen, options.normalize_scores), options.nbest, config.eos)
        check_found(found)
        return found

    def refill(self, slots: Slots, kind: Kind | None = None) -> Refill:
        """Slots for any number of sentences of options that :meth:`serves` serves and ``kind`` covers."""
        assert self.step is not None
        return Refill(self.model.encoder, self.step, slots, kind or Kind())

    def slots_for(self, sentences: int, beam: int, steps: int, width: int) -> Slots | None:
        """Slots for so many sentences of such sizes, the latter rounded up; None where memory has no room for a few."""
        assert self.step is not None
        config = self.model.config
        beam, count = min(beam, config.tgt_vocab_size - 1), min(_MOST_SLOTS, max(_LEAST_SLOTS, sentences // 4))
        steps, width = (-(-size // 32) * 32 for size in (steps, width))
        steps, width = min(steps, config.max_target_positions), min(width, _most_positions(config))
        while count >= _LEAST_SLOTS:
            slots = Slots(count, beam, steps, width)
            if self.refill_memory(slots) <= self.most_bytes:
                return slots
            count //= 2
        return None

    def refill_memory(self, slots: Slots) -> int:
        """About the bytes that such slots take."""
        assert self.step is not None
        return Refill.memory_of(slots, self.step)

    def _plan(self, shape: _Shape) -> _Plan:
        assert self.step is not None
        if shape in self.plans:
            self.plans.move_to_end(shape)
        else:
            spare = self.most_bytes - self._cache_bytes(shape)
            while self.plans and (len(self.plans) >= _MOST_PLANS or sum(map(self._cache_bytes, self.plans)) > spare):
                self.plans.popitem(last=False)
            self.plans[shape] = _Plan(self.model.encoder, self.step, shape)
        return self.plans[shape]


class _Plan:
    """Memory for batches of one shape, and what encodes one and takes its next steps.

    All that the host sets at the start of a batch lies in two tables, of 32 and of 64 bits; each has an image on the
    host, which is copied whole.
    """

    def __init__(self, encoder: Callable[[Tensor, Packing], Tensor], step: DecodeStep, shape: _Shape) -> None:
        self.encoder, self.step, self.shape = encoder, step, shape
        batch, beam, steps, source_tokens, width, kind = shape
        device = step.device
        narrow = Table(torch.int32, device, cu_seqlens=(batch + 1,), **DeviceState.shapes(batch, beam, steps, kind))
        wide = Table(torch.int64, device, tokens=(source_tokens,), positions=(source_tokens,))
        self.tables, self.source = (narrow, wide), wide.tensors["tokens"]
        self.packing = Packing(None, narrow.tensors["cu_seqlens"], wide.tensors["positions"], batch,
                               min(width, _most_positions(step.config)))
        self.state = DeviceState.of(step, kind, narrow.tensors, source_tokens, self.packing.cu_seqlens)
        on_gpu = device.type == "cuda"
        self.host_record = torch.empty_like(self.state.record, device="cpu", pin_memory=on_gpu)
        self.snapshots = [Snapshot(self.state.complete) for _ in range(_STEPS_AHEAD + 1)]
        self.begin, self.advance = self._begin, self.state.advance
        if on_gpu:  # tried first: finished sentences change nothing
            self._fill([torch.full((1,), step.config.eos)], GenerationOptions(), None, [0])
            self.state.complete.fill_(beam)
            self.begin, self.advance = captured(self._begin, self.state.advance,
                                                pool=torch.cuda.graph_pool_handle())

    def run(self, src_tokens: Sequence[Tensor], options: GenerationOptions, prefix_tokens: Tensor | None,
            max_lens: Sequence[int], draws: torch.Generator | None = None) -> list[Array]:
        """The columns of hypotheses.Step, (T, B, K) each."""
        self._fill(src_tokens, options, prefix_tokens, max_lens)
        if self.state.uniforms is not None:
            self.state.uniforms.copy_(torch.rand(
                self.state.uniforms.shape, generator=draws, device=self.state.uniforms.device))
        self.begin()
        steps, snapshots = max(max_lens) + 1, self.snapshots
        sure = 0 if prefix_tokens is not None else options.min_len  # steps at which no sentence can end
        done = 0
        while done < steps:
            self.advance()
            done += 1
            if done > sure:
                snapshots.append(snapshots.pop(0).take())
                if not (snapshots[0].wait() < self.shape.beam).any():
                    break
        self.host_record[:done].copy_(self.state.record[:done], non_blocking=True)
        taken = int(self.state.buffers.steps.max()) + 1  # which waits for the record and the snapshots, too
        for snapshot in snapshots:
            snapshot.host.zero_()
        return columns_of(self.host_record[:taken, :len(src_tokens)].numpy())

    def _fill(self, src_tokens: Sequence[Tensor], options: GenerationOptions, prefix_tokens: Tensor | None,
              max_lens: Sequence[int]) -> None:
        """The state before the first step; sentences that only fill up the batch are finished."""
        config, count, steps = self.step.config, len(src_tokens), self.shape.steps
        lengths = np.array([sentence.numel() for sentence in src_tokens])
        narrow, wide = (table.image for table in self.tables)
        narrow["limits"][:count] = max_lens
        for name in {"steps", "idle", "scores", "overlap"} & narrow.keys():
            narrow[name][:] = 0
        narrow["complete"][:count], narrow["complete"][count:] = 0, self.shape.beam
        narrow["cu_seqlens"][1:count + 1] = ends = np.cumsum(lengths)
        narrow["cu_seqlens"][count + 1:] = total = ends[-1]
        narrow["settings"].view(np.float32)[:] = settings_of(options, self.shape.beam)
        forced = narrow["forced"]
        forced[:] = config.pad
        if prefix_tokens is not None:
            width = min(prefix_tokens.size(1), steps)
            forced[:count, :width] = prefix_tokens[:, :width].cpu().numpy()
        forced[:count][np.arange(steps) >= np.asarray(max_lens)[:, None]] = config.eos
        wide["tokens"][:total], wide["tokens"][total:] = torch.cat(list(src_tokens)).cpu().numpy(), config.pad
        wide["positions"][:total] = np.arange(total) - np.repeat(ends - lengths, lengths)
        for table in self.tables:
            table.upload()

    def _begin(self) -> None:
        """Encode the sources, those of the rest of the batch being empty."""
        self.step.start(self.encoder(self.source, self.packing), self.state.buffers)
