"""block_ngrams_: no beam says a sequence of n tokens, n = no_repeat_ngram_size of its sentence, for a second time.

Between token_statistics and what chooses the next tokens; shapes are those of ops/beam_step.py. What followed an
earlier occurrence of a beam's last n - 1 tokens gets the logit -inf, and ``statistics`` the largest ordinary x that is
left in its tile; the sums, of which probabilities are made, stay. Sentences that must say something, and those whose n
is 0, are left alone. Where beams come from is read off ``ancestors``, what they have said off ``record``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightseq_fairseq.ops import _extension
from lightseq_fairseq.ops._library import check, register, shape
from lightseq_fairseq.ops.beam_step import SETTINGS, TILE, Settings


def _block(logits: Tensor, statistics: Tensor, settings: Tensor, forced: Tensor, steps: Tensor, complete: Tensor,
           ancestors: Tensor, record: Tensor, vocab: int, pad: int, eos: int, unk: int) -> None:
    _, beams, _ = ancestors.shape
    for b in (complete < beams).nonzero()[:, 0].tolist():
        own, step = Settings(*settings[b].tolist()), int(steps[b])
        size = int(own.no_repeat_ngram_size)
        if size == 0 or step < size or int(forced[b, step]) != pad:
            continue
        for k in range(int(own.beam)):
            places = [*ancestors[b, k, 1:step].tolist(), k]
            said = record[torch.arange(step), b, torch.tensor(places, dtype=torch.int64), 3].tolist()
            last = said[step - size + 1:]
            banned = [said[i + size - 1] for i in range(step - size + 1) if said[i:i + size - 1] == last]
            row = logits[b * beams + k]
            row[banned] = -torch.inf
            for tile in {token // TILE for token in banned}:
                columns = torch.arange(tile * TILE, min(vocab, (tile + 1) * TILE), device=logits.device)
                columns = columns[(columns != pad) & (columns != eos) & (columns != unk)]
                left = row[columns].float() / own.temperature
                statistics[b * beams + k, tile, 1] = left.max() if len(left) else -torch.inf


_block_ngrams = register(
    "block_ngrams_(Tensor(a!) logits, Tensor(b!) statistics, Tensor settings, Tensor forced, Tensor steps,"
    " Tensor complete, Tensor ancestors, Tensor record, int vocab, int pad, int eos, int unk) -> ()", _block, None)


def block_ngrams_(logits: Tensor, statistics: Tensor, settings: Tensor, forced: Tensor, steps: Tensor, complete: Tensor,
                  ancestors: Tensor, record: Tensor, vocab: int, pad: int, eos: int, unk: int) -> None:
    """Forbid repetitions, in place; see the head of this file. Raises ValueError for shapes or dtypes that do not fit.
    """
    batch, beam, most = ancestors.shape
    tables = {"statistics": (statistics, (batch * beam, logits.size(1) // TILE, 2), torch.float32),
              "logits": (logits, (batch * beam, logits.size(1)), logits.dtype),
              "settings": (settings, (batch, SETTINGS), torch.float32), "forced": (forced, (batch, most), torch.int32),
              "steps": (steps, (batch,), torch.int32), "complete": (complete, (batch,), torch.int32),
              "ancestors": (ancestors, (batch, beam, most), torch.uint8),
              "record": (record, (most, batch, beam, 6), torch.int32)}
    check("block_ngrams_", *(
        (t.shape == size and t.dtype == dtype and t.is_contiguous(),
         lambda n=name, t=t, s=size, d=dtype: f"{n} must be {s} {d}, contiguous, got {shape(t)} {t.dtype}")
        for name, (t, size, dtype) in tables.items()))
    if logits.is_cuda:
        _extension.loaded()
    _block_ngrams(logits, statistics, settings, forced, steps, complete, ancestors, record, vocab, pad, eos, unk)
