"""Beam search that stays on the device: steps follow one another without the host, which reads the record at the end.

Same rules and hypotheses as :func:`lightseq_fairseq.generator.beam_search.decode`, for the options that
:meth:`DeviceSearch.takes`. On CUDA a step is a graph, captured once for each :class:`_Shape`; without CUDA the
same operators run one by one. A sentence that is finished stays in the batch until all are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightseq_fairseq.generator.beam_search import check, check_found
from lightseq_fairseq.generator.hypotheses import Array, Hypothesis, Ranking, Step, read
from lightseq_fairseq.generator.model import Transformer
from lightseq_fairseq.generator.options import GenerationOptions
from lightseq_fairseq.layers import Packing, decode_step
from lightseq_fairseq.layers.decode_step import DecodeStep
from lightseq_fairseq.layers.incremental import IncrementalDecoder
from lightseq_fairseq.ops.beam_step import MAX_BEAM, MAX_TILES, SETTINGS, TILE, Settings, beam_step_, token_statistics

_STEPS_AHEAD = 2
"""Steps under way while the host waits for the flag of an earlier one; the device never waits for the host. A graph of
2 or of 4 steps was no faster than one of each (H200)."""
_MOST_PLANS = 16
"""Shapes remembered; the one that was used longest ago is forgotten."""
_MOST_CACHE_BYTES = 16 << 30
"""Keys and values of all shapes remembered, on a GPU at most a quarter of its memory; what alone needs more is decoded
step by step, where the cache grows with the sentences."""


class _Shape(NamedTuple):
    """Sizes that a plan is made for, each rounded up."""

    batch: int
    beam: int
    steps: int
    source_tokens: int
    source_width: int

    @classmethod
    def around(cls, lengths: Sequence[int], beam: int, steps: int) -> _Shape:
        """Batches of 1, 2, 3, 4, 6, 8, 12...; powers of two of the others. ``lengths`` are those of the sources."""
        power = _power_of_two(len(lengths), 1)
        batch = power * 3 // 4 if len(lengths) <= power * 3 // 4 else power
        width = _power_of_two(max(lengths), 32)
        return cls(batch, beam, _power_of_two(steps, 32), _power_of_two(sum(lengths), 64), width)


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def settings_of(options: GenerationOptions, beam: int) -> Settings:
    """Of a sentence of ``beam`` beams."""
    return Settings(**{name: getattr(options, name) for name in Settings._fields})._replace(beam=beam)


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

    def takes(self, options: GenerationOptions, lengths: Sequence[int], max_lens: Sequence[int]) -> bool:
        """Whether :meth:`decode` serves such sources and options; what it does not is for beam_search.decode."""
        config = self.model.config
        beam = min(options.beam, config.tgt_vocab_size - 1)
        other_searches = (options.sampling or options.diverse_beam_groups or options.diversity_rate
                          or options.match_source_len or options.constraints)
        if (self.step is None or not lengths or other_searches or options.no_repeat_ngram_size
                or options.return_attention or options.return_alignment):
            return False
        tiles = -(-config.tgt_vocab_size // TILE)
        if beam > MAX_BEAM or beam * tiles > MAX_TILES or 2 * beam > config.tgt_vocab_size - 3:
            return False
        longest = max(max_lens) + 1
        return (longest <= config.max_target_positions
                and self._cache_bytes(_Shape.around(lengths, beam, longest)) <= self.most_bytes)

    def _cache_bytes(self, shape: _Shape) -> int:
        """Keys and values of self- and cross-attention."""
        config, tokens = self.model.config, shape.batch * shape.beam * shape.steps + shape.source_tokens
        return tokens * config.decoder_layers * 2 * config.decoder_embed_dim * self.model.dtype.itemsize

    @torch.no_grad()
    def decode(self, src_tokens: Sequence[Tensor], options: GenerationOptions, prefix_tokens: Tensor | None,
               max_lens: Sequence[int]) -> list[list[Hypothesis]]:
        """As beam_search.decode."""
        config = self.model.config
        check([self.model], src_tokens, options, prefix_tokens, max_lens)
        shape = _Shape.around([len(sentence) for sentence in src_tokens], min(options.beam, config.tgt_vocab_size - 1),
                              max(max_lens) + 1)
        record = self._plan(shape).run(src_tokens, options, prefix_tokens, max_lens)
        found = read(record, max_lens, Ranking(options.lenpen, options.normalize_scores), options.nbest, config.eos)
        check_found(found)
        return found

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
        batch, beam, steps, source_tokens, width = shape
        device = step.device
        narrow = _Table(torch.int32, device, limits=(batch,), steps=(batch,), complete=(batch,),
                        idle=(batch,), cu_seqlens=(batch + 1,), settings=(batch, SETTINGS), scores=(batch, beam),
                        forced=(batch, steps))
        wide = _Table(torch.int64, device, tokens=(source_tokens,), positions=(source_tokens,))
        self.tables = (narrow, wide)
        self.limits, self.taken, self.complete, self.idle = (
            narrow[name] for name in ("limits", "steps", "complete", "idle"))
        self.settings, self.scores = (narrow[name].view(torch.float32) for name in ("settings", "scores"))
        self.forced, self.source = narrow["forced"], wide["tokens"]
        self.packing = Packing(None, narrow["cu_seqlens"], wide["positions"], batch, width)
        self.buffers = step.buffers(batch, beam, steps, source_tokens, narrow["cu_seqlens"], self.taken)
        self.record = torch.zeros(steps, batch, beam, len(Step._fields), dtype=torch.int32, device=device)
        on_gpu = device.type == "cuda"
        self.host_record = torch.empty_like(self.record, device="cpu", pin_memory=on_gpu)
        self.flags = [_Flag(self.complete, beam) for _ in range(_STEPS_AHEAD + 1)]
        self.begin, self.advance = self._begin, self._advance
        if on_gpu:  # tried first: finished sentences change nothing
            self._fill([torch.full((1,), step.config.eos)], GenerationOptions(), None, [0])
            self.complete.fill_(beam)
            self.begin, self.advance = _captured(self._begin), _captured(self._advance)

    def run(self, src_tokens: Sequence[Tensor], options: GenerationOptions, prefix_tokens: Tensor | None,
            max_lens: Sequence[int]) -> list[Array]:
        """The columns of hypotheses.Step, (T, B, K) each."""
        self._fill(src_tokens, options, prefix_tokens, max_lens)
        self.begin()
        steps, flags = max(max_lens) + 1, self.flags
        sure = 0 if prefix_tokens is not None else options.min_len  # steps at which no sentence can end
        done = 0
        while done < steps:
            self.advance()
            done += 1
            if done > sure:
                flags.append(flags.pop(0).set())
                if not flags[0].live():
                    break
        self.host_record[:done].copy_(self.record[:done], non_blocking=True)
        taken = int(self.taken.max()) + 1  # which waits for the record and the flags, too
        for flag in flags:
            flag.clear()
        record = self.host_record[:taken, :len(src_tokens)].numpy()
        ended, totals, beams, tokens, parents, scores = np.ascontiguousarray(np.moveaxis(record, -1, 0))
        return [ended.astype(bool), totals.view(np.float32), beams, tokens, parents, scores.view(np.float32)]

    def _fill(self, src_tokens: Sequence[Tensor], options: GenerationOptions, prefix_tokens: Tensor | None,
              max_lens: Sequence[int]) -> None:
        """The state before the first step; sentences that only fill up the batch are finished."""
        config, count = self.step.config, len(src_tokens)
        lengths = np.array([len(sentence) for sentence in src_tokens])
        narrow, wide = (table.image for table in self.tables)
        narrow["limits"][:count] = max_lens
        narrow["steps"][:] = 0
        narrow["complete"][:count], narrow["complete"][count:] = 0, self.shape.beam
        narrow["cu_seqlens"][1:count + 1] = ends = np.cumsum(lengths)
        narrow["cu_seqlens"][count + 1:] = total = ends[-1]
        narrow["settings"].view(np.float32)[:] = settings_of(options, self.shape.beam)
        narrow["scores"][:] = 0
        forced = narrow["forced"]
        forced[:] = config.pad
        if prefix_tokens is not None:
            width = min(prefix_tokens.size(1), self.shape.steps)
            forced[:count, :width] = prefix_tokens[:, :width].cpu().numpy()
        forced[:count][np.arange(self.shape.steps) >= np.asarray(max_lens)[:, None]] = config.eos
        wide["tokens"][:total], wide["tokens"][total:] = torch.cat(list(src_tokens)).cpu().numpy(), config.pad
        wide["positions"][:total] = np.arange(total) - np.repeat(ends - lengths, lengths)
        for table in self.tables:
            table.upload()

    def _begin(self) -> None:
        """Encode the sources, those of the rest of the batch being empty."""
        self.step.start(self.encoder(self.source, self.packing), self.buffers)

    def _advance(self) -> None:
        """The next step."""
        config, step = self.step.config, self.step
        types: dict[str, Any] = dict(vocab=config.tgt_vocab_size, pad=config.pad, eos=config.eos, unk=config.unk)
        logits = step(self.buffers)
        statistics = token_statistics(logits, self.settings, **types)
        beam_step_(logits, statistics, self.settings, self.limits, self.forced, steps=self.taken,
                   complete=self.complete, scores=self.scores, idle=self.idle,
                   ancestors=self.buffers.ancestors, record=self.record, x=self.buffers.x,
                   embeddings=step.embeddings, positions=step.input_positions, scale=step.embed_scale,
                   first_position=step.first_position, **types)


def _captured(work: Callable[[], None]) -> Callable[[], None]:
    """``work`` as one graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class _Table:
    """Integers of one width by name, on the device in one piece, with an image of it on the host."""

    def __init__(self, dtype: torch.dtype, device: torch.device, **shapes: tuple[int, ...]) -> None:
        counts = {name: int(np.prod(size)) for name, size in shapes.items()}
        aligned = {name: -(-count // 32) * 32 for name, count in counts.items()}
        self.on_device = torch.zeros(sum(aligned.values()), dtype=dtype, device=device)
        self.on_host = torch.zeros_like(self.on_device, device="cpu", pin_memory=device.type == "cuda")
        self.image: dict[str, Array] = {}
        self._parts: dict[str, Tensor] = {}
        start = 0
        for name, size in shapes.items():
            part = slice(start, start + counts[name])
            self._parts[name] = self.on_device[part].view(size)
            self.image[name] = self.on_host[part].view(size).numpy()
            start += aligned[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]

    def upload(self) -> None:
        """Host to device, in the order of the stream."""
        self.on_device.copy_(self.on_host, non_blocking=True)


class _Flag:
    """Whether sentences were live at one moment of the stream."""

    def __init__(self, complete: Tensor, beam: int) -> None:
        self.complete, self.beam = complete, beam
        self.host = torch.zeros_like(complete, device="cpu", pin_memory=complete.is_cuda)
        self.event = torch.cuda.Event() if complete.is_cuda else None  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """As if no moment had been chosen; none may be under way."""
        self.host.zero_()

    def set(self) -> _Flag:
        """The moment is when all work given so far is done."""
        self.host.copy_(self.complete, non_blocking=True)
        if self.event is not None:
            self.event.record()
        return self

    def live(self) -> bool:
        """Waits for that moment."""
        if self.event is not None:
            self.event.synchronize()
        return bool((self.host.numpy() < self.beam).any())
