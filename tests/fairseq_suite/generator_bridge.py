"""Our decoding loop under the name and calls of fairseq's SequenceGenerator, for any fairseq encoder-decoder."""

from __future__ import annotations

from typing import Any

import torch
from fairseq import search
from torch import Tensor

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.generator.beam_search import decode
from lightseq_fairseq.generator.options import GenerationOptions

OPTIONS = {"normalize_scores": "normalize_scores", "len_penalty": "lenpen", "unk_penalty": "unkpen",
           "temperature": "temperature", "min_len": "min_len", "match_source_len": "match_source_len",
           "no_repeat_ngram_size": "no_repeat_ngram_size"}
"""fairseq's constructor arguments and our options."""


class SequenceGenerator:
    """fairseq's constructor and ``generate``; hypotheses come from :func:`decode`."""

    symbols_to_strip_from_output = None

    def __init__(self, models: list[Any], tgt_dict: Any, beam_size: int = 1, max_len_a: float = 0.0,
                 max_len_b: int = 200, search_strategy: Any = None, align: bool = False, **arguments: Any) -> None:
        self.models, self.dictionary, self.eos = models, tgt_dict, tgt_dict.eos()
        self.max_len_a, self.max_len_b = max_len_a, max_len_b
        beam = min(beam_size, len(tgt_dict) - 1)
        self.options = GenerationOptions(
            beam=beam, nbest=beam, return_attention=True, return_alignment=align, **strategy_options(search_strategy),
            **{ours: arguments[theirs] for theirs, ours in OPTIONS.items() if theirs in arguments})

    def forward(self, sample: dict[str, Any], prefix_tokens: Tensor | None = None) -> list[list[dict[str, Any]]]:
        return self.generate(self.models, sample, prefix_tokens)

    def generate(self, models: list[Any], sample: dict[str, Any], prefix_tokens: Tensor | None = None,
                 constraints: None = None) -> list[list[dict[str, Any]]]:
        """fairseq's dicts, best first; lengths are limited by the longest source of the batch, as fairseq has it."""
        source = sample["net_input"]["src_tokens"]
        sentences = [line[line != self.dictionary.pad()] for line in source]
        limit = min(int(self.max_len_a * source.size(1) + self.max_len_b),
                    *(model.max_decoder_positions() - 1 for model in models))
        lengths = [len(sentence) if self.options.match_source_len else limit for sentence in sentences]
        for model in models:
            model.eval()
        found = decode([Bridge(model, sample["net_input"], self.dictionary) for model in models], sentences,
                       self.options, prefix_tokens, lengths)
        return [[{"tokens": h.tokens, "score": torch.tensor(h.score), "positional_scores": h.positional_scores,
                  "attention": h.attention.t(), "alignment": h.alignment} for h in each] for each in found]


def strategy_options(strategy: Any) -> dict[str, Any]:
    """What a fairseq search object asks for, in our options."""
    if isinstance(strategy, search.Sampling):
        return {"sampling": True, "sampling_topk": max(strategy.sampling_topk, 0),
                "sampling_topp": max(strategy.sampling_topp, 0.0)}
    if isinstance(strategy, search.DiverseBeamSearch):
        return {"diverse_beam_groups": strategy.num_groups, "diverse_beam_strength": -strategy.diversity_strength}
    if isinstance(strategy, search.DiverseSiblingsSearch):
        return {"diversity_rate": strategy.diversity_rate}
    if isinstance(strategy, (search.BeamSearch, search.LengthConstrainedBeamSearch, type(None))):
        return {}
    raise ValueError(f"no option of ours stands for {type(strategy).__name__}")


class Bridge:
    """A SequenceModel: the fairseq model on one batch, asked for everything again at each step."""

    def __init__(self, model: Any, net_input: dict[str, Tensor], dictionary: Any) -> None:
        self.model, self.device = model, net_input["src_tokens"].device
        self.net_input = {name: value for name, value in net_input.items() if name != "prev_output_tokens"}
        self.config = TransformerConfig(
            src_vocab_size=1, tgt_vocab_size=len(dictionary), max_target_positions=model.max_decoder_positions(),
            pad=dictionary.pad(), eos=dictionary.eos(), unk=dictionary.unk(), bos=dictionary.bos())

    def encode(self, src_tokens: list[Tensor], beam: int, max_steps: int) -> BridgeState:
        encoded = self.model.encoder.forward(**self.net_input)
        each_beam = torch.arange(len(src_tokens), device=self.device).repeat_interleave(beam)
        return BridgeState(self.model, self.model.encoder.reorder_encoder_out(encoded, each_beam), beam,
                           self.net_input["src_tokens"].size(1))


class BridgeState:
    """A DecodeState; ``history`` (B, K, T) holds what each beam has said."""

    def __init__(self, model: Any, encoded: Any, beam: int, source_length: int) -> None:
        self.model, self.encoded, self.beam, self.source_length = model, encoded, beam, source_length
        self.history: Tensor | None = None

    def step(self, tokens: Tensor, need_attention: bool) -> tuple[Tensor, Tensor]:
        newest = tokens.expand(-1, self.beam)[..., None]  # (B, 1) or (B, K) -> (B, K, 1)
        self.history = newest if self.history is None else torch.cat((self.history, newest), 2)
        output = self.model.decoder.forward(self.history.flatten(0, 1), encoder_out=self.encoded)
        lprobs = self.model.get_normalized_probs(output, log_probs=True, sample=None)[:, -1]  # (B * K, V)
        attention = output[1]
        while isinstance(attention, (dict, list)):  # an LSTM's comes as it is, a Transformer's in a list in a dict
            attention = attention["attn" if isinstance(attention, dict) else 0]
        if attention is None:  # no cross-attention
            attention = lprobs.new_zeros(len(lprobs), 1, self.source_length)
        rows = slice(tokens.size(1))
        return (lprobs.float().unflatten(0, newest.shape[:2])[:, rows],
                attention[:, -1].unflatten(0, newest.shape[:2])[:, rows])

    def reorder(self, parents: Tensor) -> None:
        self.history = self.history.gather(1, parents[..., None].expand_as(self.history))

    def keep(self, sentences: Tensor) -> None:
        beams = torch.arange(self.beam, device=sentences.device)
        rows = (sentences[:, None] * self.beam + beams).flatten()
        self.history, self.encoded = self.history[sentences], self.model.encoder.reorder_encoder_out(self.encoded, rows)
