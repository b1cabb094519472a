"""Search on the device over any number of sentences: who is finished makes room for the next one.

A fixed number of slots are decoded together, each at its own step and with its own options. The host looks every few
steps which are finished, reads those off and lets waiting sentences in, while further steps are under way. Sources are
encoded in batches ahead of time, into pages of one pool of keys and values; a page is free again when the last of its
sentences is finished. Hypotheses are those of :meth:`DeviceSearch.decode`, whoever shares the slots.

Memory is taken once, for :class:`Slots`, and does not grow.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightseq_fairseq.generator.device_state import (
    DeviceState,
    Kind,
    Snapshot,
    Table,
    columns_of,
    forced_tokens,
    hides_eos,
    settings_of,
)
from lightseq_fairseq.generator.hypotheses import Array, Hypothesis, Ranking, read, without_forced
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.capture import captured
from lightseq_fairseq.layers.decode_step import DecodeStep

_STEPS_A_LOOK = 2
"""Steps between two looks of the host at what is finished,"""
_LOOKS_AHEAD = 1
"""and looks under way while it acts on an earlier one, so that the device need not wait."""
_READ_TOGETHER = 64
"""Sentences whose hypotheses are read off together, where nobody waits for them: a millisecond of the host's."""
_PAGE_TOKENS = 4096
"""Source tokens that are encoded together, where the longest source is no longer."""
_LEAST_PAGE = 256
"""Pages are encoded as a graph of this many tokens, or twice, four times... as many."""


@dataclass(frozen=True)
class Slots:
    """Sizes that memory is taken for."""

    count: int
    """Sentences decoded together."""
    beam: int
    """Beams of each, at most."""
    steps: int
    """Target tokens of each, eos included, at most."""
    width: int
    """Source tokens of each, eos included, at most."""

    @property
    def page(self) -> int:
        """Source tokens of a page."""
        return max(self.width, min(_PAGE_TOKENS, 32 * self.count))

    @property
    def pages(self) -> int:
        """Those that a slot's share of 64 tokens fills, and some for what is encoded ahead and for stragglers."""
        return -(-self.count * min(self.width, 64) // self.page) + 4


@dataclass
class _Request:
    """A sentence, from when it is submitted until it is read off."""

    ticket: int
    tokens: Array
    options: GenerationOptions
    beam: int
    limit: int
    prefix: Array | None
    page: _Page | None = None
    begin: int = 0
    """Of its source in the pool."""

    def unscored(self, pad: int) -> int:
        """Tokens in front that count nothing."""
        return 0 if self.prefix is None or self.options.score_prefix else int((self.prefix != pad).sum())


@dataclass
class _Page:
    """A part of the pool."""

    begin: int
    users: int = 0
    """Sentences that are not finished."""


class Refill:
    """Slots, and the sentences that wait for one."""

    @torch.no_grad()
    def __init__(self, encoder: Callable[[Tensor, Packing], Tensor], step: DecodeStep, slots: Slots,
                 kind: Kind) -> None:
        self.encoder, self.step, self.slots, self.kind = encoder, step, slots, kind
        self.draws: torch.Generator | None = None
        """Of samples, drawn when a sentence is let in; None takes torch's own random state."""
        device, on_gpu = step.device, step.device.type == "cuda"
        batch = slots.count + 1  # the last one takes what fills up an admission, and is always finished
        shapes = DeviceState.shapes(batch, slots.beam, slots.steps, kind)
        progress = torch.zeros(2, batch, dtype=torch.int32, device=device)
        tensors = {name: torch.zeros(shape, dtype=torch.int32, device=device) for name, shape in shapes.items()}
        tensors |= {"steps": progress[0], "complete": progress[1]}
        bounds = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self.state = DeviceState.of(step, kind, tensors, slots.pages * slots.page, bounds)
        self.state.complete.fill_(slots.beam)
        self.state.settings.fill_(1.0)
        self.admission = Table(torch.int32, device, slots=(batch,), bounds=(batch, 2), **shapes)
        self.targets = {**tensors, "bounds": bounds}
        pool = self.state.buffers.source
        self.page = pool.new_empty(pool.size(0), slots.page, *pool.shape[2:])
        self.first = torch.empty(1, step.config.input_dim, dtype=step.dtype, device=device)
        self.encodings: dict[int, _Encoding] = {}
        self.advance, self.scatter = self.state.advance, self._scatter
        if on_gpu:  # tried first: finished sentences change nothing
            self.admission.image["slots"][:] = slots.count
            self.admission.image["complete"][:] = slots.beam
            self.admission.upload()
            self.advance, self.scatter = captured(self.state.advance, self._scatter)
        self.uploaded = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self.snapshots = [Snapshot(progress) for _ in range(_LOOKS_AHEAD + 1)]
        self.looks: deque[tuple[int, Snapshot]] = deque()
        self.turn = 0
        self.tickets = 0
        self.waiting: deque[_Request] = deque()
        self.encoded: deque[_Request] = deque()
        self.free_pages = [_Page(i * slots.page) for i in reversed(range(slots.pages))]
        self.free_slots = list(reversed(range(slots.count)))
        self.live: dict[int, tuple[_Request, int]] = {}
        """By slot: who is there, and the first look that can show that it is finished."""
        self.finished: list[tuple[int, _Request, int]] = []
        """Slot, who was there, and how many steps it took; not read yet."""
        self.readings: list[_Reading] = []
        self.unread: set[int] = set()
        """Tickets of what is finished and was not collected yet."""

    @property
    def memory(self) -> int:
        """Bytes on the device, without the workspace of the encoder and the step."""
        state, buffers = self.state, self.state.buffers
        held = (buffers.cache, buffers.source, self.page, buffers.ancestors, buffers.x, state.record,
                self.admission.on_device, *self.targets.values())
        return sum(tensor.numel() * tensor.itemsize for tensor in held)

    @staticmethod
    def memory_of(slots: Slots, step: DecodeStep) -> int:
        """About what :attr:`memory` would be."""
        layer, layers = step.layers[0], len(step.layers)
        sentences, pool = slots.count + 1, math.prod(step.source_shape(slots.beam, slots.pages * slots.page))
        keys_values = 2 * layers * layer.heads * layer.head_dim * step.dtype.itemsize
        a_step = slots.beam * (keys_values + 25) + 8  # ancestors and record, forced tokens
        return sentences * slots.steps * a_step + pool // slots.pages * (slots.pages + 1) * step.dtype.itemsize

    def __str__(self) -> str:
        slots = self.slots
        return (f"{slots.count} slots of {slots.beam} beams, {slots.steps} target and {slots.width} source tokens: "
                f"{self.memory / 2**20:.0f} MiB on {self.step.device}")

    @property
    def idle(self) -> bool:
        """Nothing waits, nothing is under way, nothing is left to collect."""
        return not (self.waiting or self.encoded or self.live or self.finished or self.readings)

    def refusal(self, source_tokens: int, options: GenerationOptions, limit: int) -> str | None:
        """Why such a sentence has no place here, None if it has; ``limit`` as max_lens of beam_search.decode."""
        slots, beam = self.slots, _beam(options, self.step)
        if source_tokens > slots.width:
            return f"{source_tokens} source tokens exceed the {slots.width} of a slot"
        if limit + 1 > slots.steps:
            return f"{limit + 1} target tokens exceed the {slots.steps} of a slot"
        if beam > slots.beam:
            return f"{beam} beams exceed the {slots.beam} of a slot"
        if not self.kind.covers(Kind.of(options)):
            return f"slots that search by {self.kind} do not search by {Kind.of(options)}"
        if hides_eos(options):
            return "diverse beams have no score in which eos at the limit does not count"
        return None

    def submit(self, src_tokens: Tensor | Sequence[int], options: GenerationOptions, limit: int,
               prefix_tokens: Tensor | Sequence[int] | None = None) -> int:
        """A sentence (S,) of ids, eos included, that must end at step ``limit``; the ticket that :meth:`collect` names.

        Sentences are let in in this order. GenerationError if it does not fit a slot, see :meth:`refusal`.
        """
        tokens, config = np.asarray(src_tokens, np.int64), self.step.config
        prefix = None if prefix_tokens is None else np.asarray(prefix_tokens, np.int64)
        reason = self.refusal(len(tokens), options, limit)
        if not len(tokens):
            reason = "a sentence has no tokens, not even the eos that ends every source sentence"
        elif tokens.min() < 0 or tokens.max() >= config.src_vocab_size:
            reason = f"ids of a sentence must be among the {config.src_vocab_size} source types"
        elif prefix is not None and len(prefix) and (prefix.min() < 0 or prefix.max() >= config.tgt_vocab_size):
            reason = f"ids of a prefix must be among the {config.tgt_vocab_size} target types"
        elif options.min_len > limit:
            reason = f"min_len {options.min_len} exceeds the longest output allowed, {limit}"
        if reason is not None:
            raise GenerationError(reason)
        self.tickets += 1
        self.waiting.append(_Request(self.tickets, tokens, options, _beam(options, self.step), limit, prefix))
        return self.tickets

    def cancel(self, ticket: int) -> bool:
        """Forget a sentence; its slot is free at once. False if it is finished already, or was never submitted."""
        for queue in (self.waiting, self.encoded):
            for request in queue:
                if request.ticket == ticket:
                    queue.remove(request)
                    self._leave_page(request)
                    return True
        for slot, (request, _) in self.live.items():
            if request.ticket == ticket:
                self.state.complete[slot].fill_(self.slots.beam)
                del self.live[slot]
                self._leave_page(request)
                self.free_slots.append(slot)
                return True
        return False

    @torch.no_grad()
    def collect(self, tickets: Collection[int] = ()) -> dict[int, list[Hypothesis]]:
        """Goes on until something is finished, or all of ``tickets`` are; hypotheses by ticket of all that is, best
        first, none if the model's probabilities are no numbers. Empty only if nothing was under way."""
        missing = set(tickets)
        while self.waiting or self.encoded or self.live:
            missing -= self.unread
            if not missing if tickets else self.unread:
                break
            self._turn()
        self._read_off()
        return dict(self._readings_done())

    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, list[Hypothesis]]]:
        """All that was submitted, each some time after it is finished. Hypotheses are read in larger pieces than by
        :meth:`collect`, which costs the host less."""
        while self.waiting or self.encoded or self.live:
            self._turn()
            if sum(len(reading.requests) for reading in self.readings) >= _READ_TOGETHER:
                yield from self._readings_done()
        self._read_off()
        yield from self._readings_done()

    def _readings_done(self) -> Iterator[tuple[int, list[Hypothesis]]]:
        readings, self.readings = self.readings, []
        requests = [request for reading in readings for request in reading.requests]
        self.unread -= {request.ticket for request in requests}
        pieces = [reading.wait() for reading in readings]  # (T', B', K, 6) each
        record = np.zeros((max(map(len, pieces), default=0), len(requests), *self.state.record.shape[2:]), np.int32)
        start = 0
        for piece in pieces:
            record[:len(piece), start:start + piece.shape[1]] = piece
            start += piece.shape[1]
        alike: dict[tuple[Ranking, int, int], list[int]] = {}
        for place, request in enumerate(requests):
            options = request.options
            key = Ranking(options.lenpen, options.normalize_scores), options.nbest, request.beam
            alike.setdefault(key, []).append(place)
        for (ranking, nbest, beam), places in alike.items():
            limits = [requests[place].limit for place in places]
            columns = without_forced(
                columns_of(record[:, places, :beam]),
                [requests[place].unscored(self.step.config.pad) for place in places],
                [None if requests[place].options.score_forced_eos else requests[place].limit for place in places])
            found = read(columns, limits, ranking, nbest, self.step.config.eos)
            yield from ((requests[place].ticket, hypotheses)
                        for place, hypotheses in zip(places, found, strict=True))

    def _turn(self) -> None:
        """A few steps; then what an earlier look has shown is acted on."""
        self._encode_ahead()
        self._let_in()
        for _ in range(_STEPS_A_LOOK):
            self.advance()
        snapshot = self.snapshots.pop(0)
        self.looks.append((self.turn, snapshot.take()))
        self.snapshots.append(snapshot)
        self.turn += 1
        if len(self.looks) > _LOOKS_AHEAD:
            turn, snapshot = self.looks.popleft()
            steps, complete = snapshot.wait()
            for slot in (complete >= self.slots.beam).nonzero()[0].tolist():
                request, since = self.live.get(slot, (None, 0))
                if request is None or since > turn:
                    continue
                del self.live[slot]
                self.finished.append((slot, request, int(steps[slot]) + 1))
                self.unread.add(request.ticket)
                self._leave_page(request)

    def _encode_ahead(self) -> None:
        """A page of waiting sentences, if those that could be let in are getting few."""
        room = len(self.free_slots) + len(self.finished)
        while self.waiting and self.free_pages and len(self.encoded) < max(room, self.slots.count // 8):
            page, chosen, total = self.free_pages.pop(), list[_Request](), 0
            while (self.waiting and len(chosen) < self.slots.count
                   and total + len(self.waiting[0].tokens) <= self.slots.page):
                request = self.waiting.popleft()
                request.page, request.begin = page, page.begin + total
                total += len(request.tokens)
                chosen.append(request)
            page.users = len(chosen)
            size = min(self.slots.page, max(_LEAST_PAGE, 1 << (total - 1).bit_length()))
            if size not in self.encodings:
                self.encodings[size] = _Encoding(self, size)
            self.encodings[size].run([request.tokens for request in chosen], page.begin)
            self.encoded.extend(chosen)

    def _let_in(self) -> None:
        """Encoded sentences into free slots, unless so few that it is better to wait for more."""
        room = len(self.free_slots) + len(self.finished)
        few = room < min(self.slots.count // 16, len(self.encoded))
        if not self.encoded or not room or (few and self.live):
            return
        self._read_off()
        if self.uploaded is not None:
            self.uploaded.synchronize()  # the image may change once it has been read
        chosen = [self.encoded.popleft() for _ in range(min(room, len(self.encoded)))]
        image, count, config = self.admission.image, len(chosen), self.step.config
        image["complete"][:count], image["complete"][count:] = 0, self.slots.beam
        image["slots"][count:] = self.slots.count
        settings = image["settings"].view(np.float32)
        for row, request in enumerate(chosen):
            slot = self.free_slots.pop()
            self.live[slot] = request, self.turn
            image["slots"][row], image["limits"][row] = slot, request.limit
            image["bounds"][row] = request.begin, request.begin + len(request.tokens)
            settings[row] = settings_of(request.options, request.beam)
            image["forced"][row] = forced_tokens(request.prefix, request.limit, self.slots.steps, config.pad,
                                                 config.eos)
        self.admission.upload()
        if self.uploaded is not None:
            self.uploaded.record()
        self.scatter()
        uniforms = self.state.uniforms
        if uniforms is not None:
            drawn = torch.rand(uniforms.shape, generator=self.draws, device=uniforms.device)
            uniforms.index_copy_(0, self.admission.tensors["slots"].long(), drawn)

    def _scatter(self) -> None:
        """What was uploaded, to its slots; their beams are fed the first token."""
        tensors, buffers = self.admission.tensors, self.state.buffers
        slots = tensors["slots"].long()
        for name, target in self.targets.items():
            target.index_copy_(0, slots, tensors[name])
        first = self.first.expand(len(slots), self.slots.beam, -1)
        buffers.x.view(-1, *first.shape[1:]).index_copy_(0, slots, first)

    def _read_off(self) -> None:
        """The record of the slots that are finished, to the host; they are free then."""
        if self.finished:
            self.readings.append(_Reading(self, self.finished))
            self.free_slots.extend(slot for slot, _, _ in self.finished)
            self.finished = []

    def _leave_page(self, request: _Request) -> None:
        page = request.page
        if page is not None:
            page.users -= 1
            if page.users == 0:
                self.free_pages.append(page)


class _Encoding:
    """What encodes up to ``size`` source tokens into a page."""

    def __init__(self, refill: Refill, size: int) -> None:
        self.refill, self.size = refill, size
        slots, device = refill.slots, refill.step.device
        self.narrow = Table(torch.int32, device, cu_seqlens=(slots.count + 1,))
        self.wide = Table(torch.int64, device, tokens=(size,), positions=(size,))
        self.buffers = replace(refill.state.buffers, source=refill.page[:, :size], x=refill.first)
        self.packing = Packing(None, self.narrow.tensors["cu_seqlens"], self.wide.tensors["positions"], slots.count,
                               slots.width)
        self.work, self.uploaded = self._encode, None
        if device.type == "cuda":
            self._fill([np.full(1, refill.step.config.eos)])
            self.work, = captured(self._encode)
            self.uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def run(self, sentences: Sequence[Array], begin: int) -> None:
        """Keys and values of these, one after the other, to the pool from ``begin`` on."""
        if self.uploaded is not None:
            self.uploaded.synchronize()
        self._fill(sentences)
        if self.uploaded is not None:
            self.uploaded.record()
        self.work()
        self.refill.state.buffers.source[:, begin:begin + self.size].copy_(self.buffers.source)

    def _fill(self, sentences: Sequence[Array]) -> None:
        lengths = np.array([len(sentence) for sentence in sentences])
        narrow, wide = self.narrow.image, self.wide.image
        narrow["cu_seqlens"][1:len(lengths) + 1] = ends = np.cumsum(lengths)
        narrow["cu_seqlens"][len(lengths) + 1:] = total = ends[-1]
        wide["tokens"][:total], wide["tokens"][total:] = np.concatenate(sentences), self.refill.step.config.pad
        wide["positions"][:total] = np.arange(total) - np.repeat(ends - lengths, lengths)
        self.narrow.upload()
        self.wide.upload()

    def _encode(self) -> None:
        source = self.refill.encoder(self.wide.tensors["tokens"], self.packing)
        self.refill.step.start(source, self.buffers)


class _Reading:
    """The record of finished sentences on its way to the host."""

    def __init__(self, refill: Refill, finished: Sequence[tuple[int, _Request, int]]) -> None:
        self.requests = [request for _, request, _ in finished]
        record = refill.state.record
        on_gpu, slots = record.is_cuda, torch.tensor([slot for slot, _, _ in finished])
        slots = slots.pin_memory().to(record.device, non_blocking=True) if on_gpu else slots
        record = record[:max(steps for _, _, steps in finished)].index_select(1, slots)
        self.record = torch.empty_like(record, device="cpu", pin_memory=on_gpu)
        self.record.copy_(record, non_blocking=True)
        self.event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self.event is not None:
            self.event.record()

    def wait(self) -> Array:
        """(T', B', K, 6), once it is there."""
        if self.event is not None:
            self.event.synchronize()
        record: Array = self.record.numpy()
        return record


def _beam(options: GenerationOptions, step: DecodeStep) -> int:
    """As the other searches have it."""
    return min(options.beam, step.config.tgt_vocab_size - 1)
