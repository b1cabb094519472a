"""One step of beam search without the host: from logits to the tokens that the beams are fed next.

B sentences of K beams, R = B * K rows (row b * K + k); V types in tiles of 64: V' columns, a multiple of 64, of which
those past ``vocab`` mean nothing; T steps at most.

token_statistics: one pass over the logits, which is all of them that a step reads but for a few tiles.

    logits      (R, V')
    settings    (3,) fp32          temperature, unkpen, min_len: see GenerationOptions
    statistics  (R, V' / 64, 2)    fp32 of x = logits / temperature: log(sum(exp(x))) of each tile, and its largest x
                                   that is neither pad, eos nor unk

beam_step_: fairseq's rules, see generator/beam_search.py. Of the continuations of a sentence (of beam 0 alone at step
0) it takes the 2K best,

    score(k, v) = x - log(sum(exp(x))) + scores[k] - (unkpen where v is unk)

where pad is impossible, and eos before step min_len. Equals come in the order of beams, within one in that of types. A
score that is not a number counts as -inf. Complete hypotheses are those of eos among the K best; the first K others go
on. A sentence is finished with K hypotheses or at its limit.

    limits     (B,) int32          the step at which each sentence ends
    forced     (B, T) int32        what it must say at each step, pad where free; exempt from min_len. eos before the
                                   limit makes all its candidates the first one
    steps      (B,) int32          of each sentence so far
    complete   (B,) int32          hypotheses so far; K for a finished one, of which all stays as it is
    scores     (B, K) fp32         of the beams
    ancestors  (B, K, T) uint8     see decode_attention
    record     (T, B, K, 6) int32  of each step: ended, totals, beams, tokens, parents, scores as in hypotheses.Step;
                                   totals and scores are the bits of fp32
    x          (R, E)              what is fed next: scale * embeddings[token] + positions[first_position + steps], with
                                   embeddings (V, E) and positions (P, E) or None, all in the dtype of the logits

A step that finishes a sentence leaves its ``steps`` and ``x`` as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import check, register, shape

TILE = 64
"""Columns of a tile."""
MAX_BEAM = 16
"""Beams whose candidates fit one warp."""
MAX_TILES = 36864
"""Tiles of all beams of a sentence, whose maxima lie in shared memory."""


def _statistics(logits: Tensor, settings: Tensor, vocab: int, pad: int, eos: int, unk: int) -> Tensor:
    x = logits.float() / settings[0]
    x[:, vocab:] = -torch.inf
    tiles = x.view(x.size(0), -1, TILE)
    sums = tiles.logsumexp(-1)
    ordinary = x.clone()
    ordinary[:, [pad, eos, unk]] = -torch.inf
    return torch.stack((sums, ordinary.view_as(tiles).amax(-1)), -1)


def _step(logits: Tensor, statistics: Tensor, settings: Tensor, limits: Tensor, forced: Tensor, steps: Tensor,
          complete: Tensor, scores: Tensor, ancestors: Tensor, record: Tensor, x: Tensor, embeddings: Tensor,
          positions: Tensor | None, scale: float, first_position: int, vocab: int, pad: int, eos: int,
          unk: int) -> None:
    batch, beam = scores.shape
    temperature, unkpen, min_len = settings.tolist()
    lprobs = logits[:, :vocab].float() / temperature - statistics[..., 0].logsumexp(-1, keepdim=True)
    lprobs = lprobs.view(batch, beam, vocab)
    lprobs[..., pad] = -torch.inf
    lprobs[..., unk] -= unkpen
    for b in (complete < beam).nonzero()[:, 0].tolist():
        step, limit = int(steps[b]), int(limits[b])
        must = int(forced[b, step])
        table = lprobs[b] + scores[b, :, None]  # (K, V)
        if must != pad:
            only = table[:, must].clone()
            table[:] = -torch.inf
            table[:, must] = only
        elif step < min_len:
            table[:, eos] = -torch.inf
        if step == 0:
            table[1:] = -torch.inf
        table = table.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        places = table.flatten().sort(descending=True, stable=True)[1]
        first = places[:1].expand(2 * beam) if must == eos and step < limit else places[:2 * beam]
        totals = table.flatten()[first]
        words, beams = first % vocab, first // vocab
        stops = (words == eos) & (totals != -torch.inf)
        chosen = stops.to(torch.uint8).sort(stable=True)[1][:beam]
        record[step, b] = torch.stack((stops[:beam].int(), _bits(totals[:beam]), beams[:beam].int(),
                                       words[chosen].int(), beams[chosen].int(), _bits(totals[chosen])), -1)
        scores[b] = totals[chosen]
        complete[b] = beam if step >= limit else complete[b] + stops[:beam].sum()
        if complete[b] < beam:
            ancestors[b, :, :step] = ancestors[b, beams[chosen], :step]
            ancestors[b, :, step] = beams[chosen].to(torch.uint8)
            steps[b] = step + 1
            fed = embeddings[words[chosen]].float() * scale
            if positions is not None:
                fed += positions[first_position + step + 1].float()
            x[b * beam:(b + 1) * beam] = fed.to(x.dtype)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


_token_statistics = register(
    "token_statistics(Tensor logits, Tensor settings, int vocab, int pad, int eos, int unk) -> Tensor", _statistics,
    lambda logits, *rest: logits.new_empty(logits.size(0), logits.size(1) // TILE, 2, dtype=torch.float32))
_beam_step = register(
    "beam_step_(Tensor logits, Tensor statistics, Tensor settings, Tensor limits, Tensor forced, Tensor(a!) steps,"
    " Tensor(b!) complete, Tensor(c!) scores, Tensor(d!) ancestors, Tensor(e!) record, Tensor(f!) x, Tensor embeddings,"
    " Tensor? positions, float scale, int first_position, int vocab, int pad, int eos, int unk) -> ()", _step, None)


def token_statistics(logits: Tensor, settings: Tensor, vocab: int, pad: int, eos: int, unk: int) -> Tensor:
    """Log-sum-exp and best ordinary token of each tile, (R, V' / 64, 2) fp32; see the head of this file."""
    check("token_statistics",
          (logits.dim() == 2 and logits.size(1) % TILE == 0,
           lambda: f"logits must be (R, V') with V' a multiple of {TILE}, got {shape(logits)}"),
          (0 < vocab <= logits.size(1), lambda: f"vocab must lie within {logits.size(1)} columns, got {vocab}"),
          (settings.shape == (3,) and settings.dtype == torch.float32,
           lambda: f"settings must be (3,) float32, got {shape(settings)} {settings.dtype}"))
    if logits.is_cuda:
        _extension.loaded()
    return _token_statistics(logits.contiguous(), settings, vocab, pad, eos, unk)


def beam_step_(logits: Tensor, statistics: Tensor, settings: Tensor, limits: Tensor, forced: Tensor, *,
               steps: Tensor, complete: Tensor, scores: Tensor, ancestors: Tensor, record: Tensor, x: Tensor,
               embeddings: Tensor, positions: Tensor | None, scale: float, first_position: int, vocab: int, pad: int,
               eos: int, unk: int) -> None:
    """Choose what each beam says next, in place; see the head of this file.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    batch, beam = scores.shape
    most, width, kind = forced.size(1), x.size(1), logits.dtype
    tiles = beam * statistics.size(1)
    tables = {"logits": (logits, (batch * beam, logits.size(1)), kind),
              "statistics": (statistics, (batch * beam, logits.size(1) // TILE, 2), torch.float32),
              "limits": (limits, (batch,), torch.int32), "forced": (forced, (batch, most), torch.int32),
              "steps": (steps, (batch,), torch.int32), "complete": (complete, (batch,), torch.int32),
              "scores": (scores, (batch, beam), torch.float32),
              "ancestors": (ancestors, (batch, beam, most), torch.uint8),
              "record": (record, (most, batch, beam, 6), torch.int32), "x": (x, (batch * beam, width), kind),
              "embeddings": (embeddings, (vocab, width), kind)}
    if positions is not None:
        tables["positions"] = (positions, (positions.size(0), width), kind)
    check("beam_step_",
          (beam <= MAX_BEAM, lambda: f"at most {MAX_BEAM} beams, got {beam}"),
          (tiles <= MAX_TILES, lambda: f"at most {MAX_TILES} tiles a sentence, got {tiles}"),
          (vocab - 3 >= 2 * beam, lambda: f"vocab must hold 2 * {beam} ordinary types, got {vocab}"),
          *((t.shape == size and t.dtype == dtype and t.is_contiguous(),
             lambda n=name, t=t, s=size, d=dtype: f"{n} must be {s} {d}, contiguous, got {shape(t)} {t.dtype}")
            for name, (t, size, dtype) in tables.items()))
    if logits.is_cuda:
        _extension.loaded()
    _beam_step(logits, statistics, settings, limits, forced, steps, complete, scores, ancestors, record, x, embeddings,
               positions, scale, first_position, vocab, pad, eos, unk)
