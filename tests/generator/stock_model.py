"""fairseq's Transformer behind our DecodeState, recomputed from scratch at each step: slow, and nothing of ours in it.

The model runs in fp64, so that batching and padding cannot change a token; logits are rounded to fp32, as fairseq's
log_softmax does.
"""

from __future__ import annotations

import argparse
import functools

import torch
from fairseq.data import Dictionary, data_utils
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq.token_generation_constraints import pack_constraints

from lightseq_fairseq.config import TransformerConfig


def dictionary(types: int) -> Dictionary:
    """``types`` entries, the four special ones included."""
    words = Dictionary()
    for i in range(types - len(words)):
        words.add_symbol(f"w{i}")
    return words


@functools.cache
def stock_transformer(types: int = 40, seed: int = 1, updates: int = 60) -> TransformerModel:
    """A tiny Transformer in fp64, trained for a moment to reverse its source: good enough that sentences differ and
    end, bad enough that hypotheses compete. (A random one says one word for ever.)"""
    torch.manual_seed(seed)
    args = argparse.Namespace(
        encoder_embed_dim=32, encoder_ffn_embed_dim=32, encoder_layers=1, encoder_attention_heads=2,
        decoder_layers=2, decoder_attention_heads=2, dropout=0.0, max_source_positions=64, max_target_positions=64)
    base_architecture(args)
    task = TranslationTask(TranslationConfig(), dictionary(types), dictionary(types))
    model = TransformerModel.build_model(args, task)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for update in range(updates):
        source = sentences(32, types, seed=1000 * seed + update)
        target = data_utils.collate_tokens([torch.cat((s[:-1].flip(0), s[-1:])) for s in source], 1)
        previous = torch.cat((torch.full((32, 1), 2), target[:, :-1]), 1)
        logits = model(data_utils.collate_tokens(source, 1), torch.tensor([len(s) for s in source]), previous)[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.double().eval()


class StockModel:
    """A SequenceModel around a stock fairseq Transformer."""

    device = torch.device("cpu")

    def __init__(self, model: TransformerModel) -> None:
        words = model.decoder.dictionary
        self.model = model
        self.config = TransformerConfig(
            src_vocab_size=len(words), tgt_vocab_size=len(words), max_target_positions=model.max_decoder_positions(),
            pad=words.pad(), eos=words.eos(), unk=words.unk(), bos=words.bos())

    def encode(self, src_tokens, beam, max_steps):
        return StockState(self.model, src_tokens, beam)


class StockState:
    def __init__(self, model, src_tokens, beam):
        self.model, self.beam, self.history = model, beam, None
        source = data_utils.collate_tokens(list(src_tokens), model.decoder.dictionary.pad())
        lengths = torch.tensor([len(s) for s in src_tokens])
        self.encoded = model.encoder(source, lengths)

    def step(self, tokens, need_attention):
        self.history = tokens[:, :, None] if self.history is None else torch.cat((self.history, tokens[..., None]), 2)
        batch, rows, length = self.history.shape
        encoded = self.model.encoder.reorder_encoder_out(self.encoded, torch.arange(batch).repeat_interleave(rows))
        logits, extra = self.model.decoder(self.history.view(-1, length), encoded)
        attention = extra["attn"][0][:, -1].view(batch, rows, -1) if need_attention else None
        return logits[:, -1].float().view(batch, rows, -1), attention

    def reorder(self, parents):
        assert parents.shape == (len(self.history), self.beam)
        self.history = self.history.gather(1, parents[..., None].expand(-1, -1, self.history.size(2)))

    def keep(self, sentences):
        self.history = self.history[sentences]
        self.encoded = self.model.encoder.reorder_encoder_out(self.encoded, sentences)


def fairseq_hypotheses(models, src_tokens, prefix_tokens=None, generator=SequenceGenerator, constraints=None,
                       **options):
    """What fairseq's SequenceGenerator finds for a left-padded batch."""
    words = models[0].decoder.dictionary
    sample = {"net_input": {
        "src_tokens": data_utils.collate_tokens(list(src_tokens), words.pad(), left_pad=True),
        "src_lengths": torch.tensor([len(s) for s in src_tokens])}}
    packed = None if constraints is None else pack_constraints(constraints)
    return generator(models, words, **options).generate(models, sample, prefix_tokens=prefix_tokens,
                                                        constraints=packed)


def sentences(count: int, types: int = 40, seed: int = 5, longest: int = 9) -> list[torch.Tensor]:
    """Random source sentences of different lengths, eos (2) last."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.cat((torch.randint(4, types, (n,), generator=draw), torch.tensor([2]))) for n in lengths]
