"""draw_tokens: what each beam of a sampled sentence says next, before :func:`beam_step_` takes note of it.

Shapes and rules are those of ops/beam_step.py. With lprob the log-probabilities of a beam after those rules (at step 0
of beam 0, for all), in fp32, and p = exp(lprob), a token is drawn among

    all of them, in their order; or, most probable first, equals in their order,
    the sampling_topk first; or the fewest whose p add up to sampling_topp

so that, with c the running sum of p over these, c just exceeds u * (sum of all p of these): never one of p = 0. What
must be said is said.

    uniforms  (B, T, K) fp32   u of each step and beam, in [0, 1)
    drawn     (R, 2) int32     token, and the bits of its lprob; -inf where there is nothing to draw. Rows of finished
                               sentences and of beams that a sentence does not have mean nothing

The kernel adds up p in units of 2 ** -44, so that sums have no order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import check, register, shape
from lightseq_fairseq.ops.beam_step import SETTINGS, TILE, Settings


def _forward(logits: Tensor, statistics: Tensor, settings: Tensor, forced: Tensor, steps: Tensor, complete: Tensor,
             uniforms: Tensor, vocab: int, pad: int, eos: int, unk: int) -> Tensor:
    batch, _, beams = uniforms.shape
    drawn = torch.zeros(batch, beams, 2, dtype=torch.int32, device=logits.device)
    sums = statistics[..., 0].logsumexp(-1).view(batch, beams, 1)
    for b in (complete < beams).nonzero()[:, 0].tolist():
        own, step = Settings(*settings[b].tolist()), int(steps[b])
        beam, must = int(own.beam), int(forced[b, step])
        rows = torch.arange(beam, device=logits.device) * (step > 0)
        lprobs = logits[b * beams + rows, :vocab].float() / own.temperature - sums[b, rows]
        lprobs[:, unk] -= own.unkpen
        if must != pad:
            tokens = torch.full_like(rows, must)
        else:
            lprobs[:, pad] = -torch.inf
            if step < own.min_len:
                lprobs[:, eos] = -torch.inf
            lprobs.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            columns = torch.arange(vocab, device=logits.device).expand_as(lprobs)
            probs = lprobs.exp().double()
            if own.sampling_topk or own.sampling_topp:
                columns = lprobs.sort(dim=1, descending=True, stable=True)[1]
                probs = probs.gather(1, columns)
            if own.sampling_topk:
                probs[:, int(own.sampling_topk):] = 0
            if own.sampling_topp:
                probs *= probs.cumsum(1) - probs < own.sampling_topp
            running = probs.cumsum(1)
            points = uniforms[b, step, :beam, None] * running[:, -1:]
            places = torch.searchsorted(running, points, right=True).clamp_(max=vocab - 1)
            tokens = columns.gather(1, places)[:, 0]
        scores = lprobs.gather(1, tokens[:, None])[:, 0].nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        drawn[b, :beam] = torch.stack((tokens.int(), scores.contiguous().view(torch.int32)), 1)
    return drawn.view(-1, 2)


_draw_tokens = register(
    "draw_tokens(Tensor logits, Tensor statistics, Tensor settings, Tensor forced, Tensor steps, Tensor complete,"
    " Tensor uniforms, int vocab, int pad, int eos, int unk) -> Tensor", _forward,
    lambda logits, *rest: logits.new_empty(logits.size(0), 2, dtype=torch.int32))


def draw_tokens(logits: Tensor, statistics: Tensor, settings: Tensor, forced: Tensor, steps: Tensor, complete: Tensor,
                uniforms: Tensor, vocab: int, pad: int, eos: int, unk: int) -> Tensor:
    """Token and log-probability of each beam, (R, 2) int32; see the head of this file.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    batch, most, beam = uniforms.shape
    tables = {"statistics": (statistics, (batch * beam, logits.size(1) // TILE, 2), torch.float32),
              "logits": (logits, (batch * beam, logits.size(1)), logits.dtype),
              "settings": (settings, (batch, SETTINGS), torch.float32), "forced": (forced, (batch, most), torch.int32),
              "steps": (steps, (batch,), torch.int32), "complete": (complete, (batch,), torch.int32),
              "uniforms": (uniforms, (batch, most, beam), torch.float32)}
    check("draw_tokens", *(
        (t.shape == size and t.dtype == dtype and t.is_contiguous(),
         lambda n=name, t=t, s=size, d=dtype: f"{n} must be {s} {d}, contiguous, got {shape(t)} {t.dtype}")
        for name, (t, size, dtype) in tables.items()))
    if logits.is_cuda:
        _extension.loaded()
    return _draw_tokens(logits, statistics, settings, forced, steps, complete, uniforms, vocab, pad, eos, unk)
