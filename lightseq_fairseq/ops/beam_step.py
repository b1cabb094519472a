"""One step of a search without the host: from logits to the tokens that the beams are fed next.

B sentences of K beams, R = B * K rows (row b * K + k); V types in tiles of 64: V' columns, a multiple of 64, of which
those past ``vocab`` mean nothing; T steps at most. A sentence may be at any step, and have options of its own:

    settings    (B, 9) fp32        see :class:`Settings`; a sentence of fewer beams than K uses the first of its rows

token_statistics: one pass over the logits, which is all of them that a step reads but for a few tiles.

    logits      (R, V')
    statistics  (R, V' / 64, 2)    fp32 of x = logits / temperature: log(sum(exp(x))) of each tile, and its largest x
                                   that is neither pad, eos nor unk

beam_step_: fairseq's rules, see generator/search.py and beam_search.py. A continuation of a sentence (of beam 0 alone
at step 0) has

    score(k, v) = x - log(sum(exp(x))) + scores[k] - (unkpen where v is unk)

where pad is impossible, and eos before step min_len. Equals come in the order of beams, within one in that of types. A
score that is not a number counts as -inf. The candidates of a step are, best first,

    by default       the 2K best
    siblings         the 2K best, once the r-th best of each beam has lost r * diversity_rate, from step 1 on
    with overlap     K: those of G groups in turns, beam k being of group k mod G. One after another groups choose their
                     K / G best, once tokens have lost diverse_beam_strength * (1 + overlap[g, h]) for each use that an
                     earlier group h has made of them at this step
    with drawn       K: those of ops/draw_tokens.py, one of each beam

Complete hypotheses are those of eos among the first K; the first K others go on, and where candidates are K alone,
those of eos behind them, idle: what becomes of an idle beam counts no more. A sentence is finished with K hypotheses or
at its limit.

    limits     (B,) int32          the step at which each sentence ends
    forced     (B, T) int32        what it must say at each step, pad where free; exempt from min_len. eos before the
                                   limit makes all its candidates the first one
    drawn      (R, 2) int32        token, and the bits of its log-probability
    steps      (B,) int32          of each sentence so far
    complete   (B,) int32          hypotheses so far; K for a finished one, of which all stays as it is
    scores     (B, K) fp32         of the beams
    idle       (B,) int32          bit k for each beam that is
    overlap    (B, G, G) int32     tokens, place by place, that each two groups have had in common
    ancestors  (B, K, T) uint8     see decode_attention
    record     (T, B, K, 6) int32  of each step: ended, totals, beams, tokens, parents, scores as in hypotheses.Step;
                                   totals and scores are the bits of fp32
    x          (R, E)              what is fed next: scale * embeddings[token] + positions[first_position + steps], with
                                   embeddings (V, E) and positions (P, E) or None, all in the dtype of the logits or,
                                   of fp32 logits, any

A step that finishes a sentence leaves its ``steps`` and ``x`` as they are.
"""

from __future__ import annotations

from typing import NamedTuple

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


class Settings(NamedTuple):
    """The options of one sentence, by the names of GenerationOptions; a row of ``settings``."""

    temperature: float = 1.0
    unkpen: float = 0.0
    min_len: float = 1.0
    beam: float = 1.0
    diversity_rate: float = 0.0
    diverse_beam_strength: float = 0.0
    sampling_topk: float = 0.0
    sampling_topp: float = 0.0
    no_repeat_ngram_size: float = 0.0


SETTINGS = len(Settings._fields)


def _statistics(logits: Tensor, settings: Tensor, vocab: int, pad: int, eos: int, unk: int) -> Tensor:
    x = logits.float() / settings[:, :1].repeat_interleave(logits.size(0) // settings.size(0), 0)
    x[:, vocab:] = -torch.inf
    tiles = x.view(x.size(0), -1, TILE)
    sums = tiles.logsumexp(-1)
    ordinary = x.clone()
    ordinary[:, [pad, eos, unk]] = -torch.inf
    return torch.stack((sums, ordinary.view_as(tiles).amax(-1)), -1)


def _step(logits: Tensor, statistics: Tensor, settings: Tensor, limits: Tensor, forced: Tensor, drawn: Tensor | None,
          steps: Tensor, complete: Tensor, scores: Tensor, idle: Tensor, overlap: Tensor | None, ancestors: Tensor,
          record: Tensor, x: Tensor, embeddings: Tensor, positions: Tensor | None, scale: float, first_position: int,
          vocab: int, pad: int, eos: int, unk: int, siblings: bool) -> None:
    batch, beams = scores.shape
    sums = statistics[..., 0].logsumexp(-1).view(batch, beams, 1)
    for b in (complete < beams).nonzero()[:, 0].tolist():
        own = Settings(*settings[b].tolist())
        beam, step, limit = int(own.beam), int(steps[b]), int(limits[b])
        must, before = int(forced[b, step]), scores[b, :beam].clone()
        if drawn is not None:
            words = drawn[b * beams:b * beams + beam, 0].long()
            totals = drawn[b * beams:b * beams + beam, 1].contiguous().view(torch.float32) + before
            parents = torch.arange(beam, device=words.device) if step else torch.zeros_like(words)
        else:
            table = logits[b * beams:b * beams + beam, :vocab].float() / own.temperature - sums[b, :beam]
            table[:, pad] = -torch.inf
            table[:, unk] -= own.unkpen
            table += before[:, None]
            if must != pad:
                only = table[:, must].clone()
                table[:] = -torch.inf
                table[:, must] = only
            elif step < own.min_len:
                table[:, eos] = -torch.inf
            table = table[:beam if step else 1].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            if overlap is not None:
                totals, words, parents = _best_of_groups(table, overlap[b], beam, own.diverse_beam_strength)
            else:
                if siblings and step:
                    table = _less_by_rank(table, 2 * beam, own.diversity_rate)
                totals, words, parents = _best(table, 2 * beam)
        if must == eos and step < limit:
            totals, words, parents = (column[:1].expand_as(column) for column in (totals, words, parents))
        stops = (words == eos) & (totals != -torch.inf)
        if len(words) == beam:
            was_idle = (int(idle[b]) >> torch.arange(beam, device=words.device) & 1).bool()
            ended, stops = stops & ~was_idle, stops | was_idle
        else:
            ended = stops[:beam]
        stopped, chosen = (column[:beam] for column in stops.to(torch.uint8).sort(stable=True))
        record[step, b, :beam] = torch.stack((
            ended.int(), _bits(totals[:beam]), parents[:beam].int(), words[chosen].int(), parents[chosen].int(),
            _bits(totals[chosen])), -1)
        record[step, b, beam:, 0] = 0
        scores[b, :beam] = totals[chosen]
        if len(words) == beam:
            idle[b] = (stopped.int() << torch.arange(beam, device=words.device)).sum()
        found = int(complete[b]) + int(ended.sum())
        complete[b] = beams if step >= limit or found >= beam else found
        if complete[b] < beams:
            ancestors[b, :beam, :step] = ancestors[b, parents[chosen], :step]
            ancestors[b, :beam, step] = parents[chosen].to(torch.uint8)
            steps[b] = step + 1
            fed = embeddings[words[chosen]].float() * scale
            if positions is not None:
                fed += positions[first_position + step + 1].float()
            x[b * beams:b * beams + beam] = fed.to(x.dtype)


def _best(table: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, types and rows of the ``count`` best of (rows, V)."""
    places = table.flatten().sort(descending=True, stable=True)[1][:count]
    return table.flatten()[places], places % table.size(1), places // table.size(1)


def _less_by_rank(table: Tensor, count: int, rate: float) -> Tensor:
    """The ``count`` best of each row, less what they lose by their rank; the rest is out."""
    places = table.sort(dim=1, descending=True, stable=True)[1][:, :count]
    kept = table.gather(1, places) - rate * torch.arange(1, count + 1, device=table.device)
    return torch.full_like(table, -torch.inf).scatter_(1, places, kept)


def _best_of_groups(table: Tensor, overlap: Tensor, beam: int, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_best`, the candidates of the groups in turns; notes in ``overlap`` (G, G) what they have in common."""
    groups, first = overlap.size(0), table.size(0) == 1
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in range(groups):
        rows = table if first else table[group::groups]
        penalty = torch.zeros_like(table[0])
        for earlier, (_, words, _) in enumerate(found):
            penalty.index_add_(0, words, (1.0 + overlap[group, earlier]).expand(len(words)))
        totals, words, parents = _best(rows - strength * penalty, beam // groups)
        found.append((totals, words, parents if first else parents * groups + group))
    totals, words, parents = (torch.stack(column, 1) for column in zip(*found, strict=True))  # (K / G, G) each
    overlap += (words[:, None] == words[:, :, None]).sum(0)
    return totals.flatten(), words.flatten(), parents.flatten()


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


_token_statistics = register(
    "token_statistics(Tensor logits, Tensor settings, int vocab, int pad, int eos, int unk) -> Tensor", _statistics,
    lambda logits, *rest: logits.new_empty(logits.size(0), logits.size(1) // TILE, 2, dtype=torch.float32))
_beam_step = register(
    "beam_step_(Tensor logits, Tensor statistics, Tensor settings, Tensor limits, Tensor forced, Tensor? drawn,"
    " Tensor(a!) steps, Tensor(b!) complete, Tensor(c!) scores, Tensor(d!) idle, Tensor(e!)? overlap,"
    " Tensor(f!) ancestors, Tensor(g!) record, Tensor(h!) x, Tensor embeddings, Tensor? positions, float scale,"
    " int first_position, int vocab, int pad, int eos, int unk, bool siblings) -> ()", _step, None)


def token_statistics(logits: Tensor, settings: Tensor, vocab: int, pad: int, eos: int, unk: int) -> Tensor:
    """Log-sum-exp and best ordinary token of each tile, (R, V' / 64, 2) fp32; see the head of this file."""
    check("token_statistics",
          (logits.dim() == 2 and logits.size(1) % TILE == 0,
           lambda: f"logits must be (R, V') with V' a multiple of {TILE}, got {shape(logits)}"),
          (0 < vocab <= logits.size(1), lambda: f"vocab must lie within {logits.size(1)} columns, got {vocab}"),
          (settings.dim() == 2 and settings.size(1) == SETTINGS and settings.dtype == torch.float32
           and logits.size(0) % max(1, settings.size(0)) == 0 and settings.is_contiguous(),
           lambda: f"settings must be (B, {SETTINGS}) float32, contiguous, for sentences of {logits.size(0)} rows, got "
                   f"{shape(settings)} {settings.dtype}"))
    if logits.is_cuda:
        _extension.loaded()
    return _token_statistics(logits.contiguous(), settings, vocab, pad, eos, unk)


def beam_step_(logits: Tensor, statistics: Tensor, settings: Tensor, limits: Tensor, forced: Tensor, *,
               steps: Tensor, complete: Tensor, scores: Tensor, idle: Tensor, ancestors: Tensor, record: Tensor,
               x: Tensor, embeddings: Tensor, positions: Tensor | None, scale: float, first_position: int, vocab: int,
               pad: int, eos: int, unk: int, drawn: Tensor | None = None, overlap: Tensor | None = None,
               siblings: bool = False) -> None:
    """Choose what each beam says next, in place; see the head of this file.

    Raises ValueError for shapes, dtypes or searches that do not fit.
    """
    batch, beam = scores.shape
    most, width, kind = forced.size(1), x.size(1), x.dtype
    tiles = beam * statistics.size(1)
    tables = {"logits": (logits, (batch * beam, logits.size(1)),
                         logits.dtype if logits.dtype == torch.float32 else kind),
              "statistics": (statistics, (batch * beam, logits.size(1) // TILE, 2), torch.float32),
              "limits": (limits, (batch,), torch.int32), "forced": (forced, (batch, most), torch.int32),
              "settings": (settings, (batch, SETTINGS), torch.float32), "idle": (idle, (batch,), torch.int32),
              "steps": (steps, (batch,), torch.int32), "complete": (complete, (batch,), torch.int32),
              "scores": (scores, (batch, beam), torch.float32),
              "ancestors": (ancestors, (batch, beam, most), torch.uint8),
              "record": (record, (most, batch, beam, 6), torch.int32), "x": (x, (batch * beam, width), kind),
              "embeddings": (embeddings, (vocab, width), kind)}
    if drawn is not None:
        tables["drawn"] = (drawn, (batch * beam, 2), torch.int32)
    if overlap is not None:
        groups = overlap.size(-1)
        tables["overlap"] = (overlap, (batch, groups, groups), torch.int32)
    if positions is not None:
        tables["positions"] = (positions, (positions.size(0), width), kind)
    check("beam_step_",
          (beam <= MAX_BEAM, lambda: f"at most {MAX_BEAM} beams, got {beam}"),
          ((drawn is not None) + (overlap is not None) + siblings <= 1,
           lambda: "drawn, overlap and siblings exclude each other"),
          (overlap is None or beam % overlap.size(-1) == 0,
           lambda: f"as many groups as overlap has, {overlap.size(-1)}, must divide {beam} beams"),
          (tiles <= MAX_TILES, lambda: f"at most {MAX_TILES} tiles a sentence, got {tiles}"),
          (vocab - 3 >= 2 * beam, lambda: f"vocab must hold 2 * {beam} ordinary types, got {vocab}"),
          *((t.shape == size and t.dtype == dtype and t.is_contiguous(),
             lambda n=name, t=t, s=size, d=dtype: f"{n} must be {s} {d}, contiguous, got {shape(t)} {t.dtype}")
            for name, (t, size, dtype) in tables.items()))
    if logits.is_cuda:
        _extension.loaded()
    _beam_step(logits, statistics, settings, limits, forced, drawn, steps, complete, scores, idle, overlap, ancestors,
               record, x, embeddings, positions, scale, first_position, vocab, pad, eos, unk, siblings)
