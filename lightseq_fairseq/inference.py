"""LightSeq's inference classes: ``import lightseq_fairseq.inference as lsi``.

    lsi.Transformer("transformer.pb", 8).infer([[1, 2, 3], [4, 5, 6]])
    lsi.Bert.from_pretrained("bert-base-uncased").infer([[101, 7592, 102]])     # a Hugging Face folder, or a model file
    lsi.Gpt.from_pretrained("gpt2", sampling=True, sampling_topk=5).sample([[15496, 11]])

Scores and search are fairseq's (see generator/options.py), not LightSeq's; what a LightSeq file says of beam, lengths
and sampling, or a Hugging Face folder in generation_config.json, is taken as the default and may be changed by keyword.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lightseq_fairseq import model_file
from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.model import LanguageModel
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.generator.text_encoder import Encoded, TextEncoder
from lightseq_fairseq.model_file import ModelFile

__all__ = ["Bart", "Bert", "GenerationOptions", "Generator", "Gpt", "TextEncoder", "Transformer"]

Ids = Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]]
FilePath = str | os.PathLike[str]
Model = TypeVar("Model", bound="_Model")


class _Model:
    """What the classes share: a model file or a folder, a device, batches of at most ``max_batch_size``."""

    STACKS = ""

    def __init__(self, weight_path: FilePath, max_batch_size: int, device: torch.device | str | None = None,
                 dtype: torch.dtype = torch.float32, **options: Any) -> None:
        """``weight_path`` is a model file. ``device`` is the first GPU where there is one; ``dtype`` float32, float16
        or bfloat16. ``options`` are fields of GenerationOptions, for models that generate.

        ModelFileError if the file cannot be read, GenerationError for an option that does not exist or a model of
        another kind.
        """
        self._set_up(model_file.load(weight_path), max_batch_size, device, dtype, {}, options)

    @classmethod
    def from_pretrained(cls: type[Model], path: FilePath, max_batch_size: int = 128,
                        device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
                        **options: Any) -> Model:
        """``path`` is a folder as Hugging Face's ``save_pretrained`` writes it, or a model file; otherwise as the class
        itself. What generation_config.json suggests, in the folder or in the one that lightseq-export left beside the
        file, is the default of the options. What it forces, a target's first token or eos at the limit, does not count
        in the score, as with Hugging Face, unless ``score_prefix`` or ``score_forced_eos`` is given."""
        if Path(path).is_dir():
            from lightseq_fairseq.export.huggingface import from_huggingface

            model, beside = from_huggingface(path).model, Path(path)
        else:
            model, beside = model_file.load(path), Path(path).with_suffix(".tokenizer")
        return cls._of(model, max_batch_size, device, dtype, _generation_config(beside), options)

    @classmethod
    def from_torch(cls: type[Model], model: Any, max_batch_size: int = 128,
                   device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
                   **options: Any) -> Model:
        """``model`` is one of transformers in memory, whose weights are copied as they are now; otherwise as
        :meth:`from_pretrained`, its ``generation_config`` being what suggests options."""
        from lightseq_fairseq.export import huggingface

        suggested = getattr(model, "generation_config", None)
        return cls._of(huggingface.from_torch(model).model, max_batch_size, device, dtype,
                       {} if suggested is None else _suggested_by(suggested.to_dict()), options)

    @classmethod
    def from_fairseq_pretrained(cls: type[Model], checkpoint: FilePath, data_bin: FilePath | None = None,
                                max_batch_size: int = 128, device: torch.device | str | None = None,
                                dtype: torch.dtype = torch.float32, **options: Any) -> Model:
        """``checkpoint`` is fairseq's; ``data_bin`` holds its dictionaries, if not where it was trained. ExportError
        for what lightseq-export does not take either."""
        from lightseq_fairseq.export.fairseq import from_checkpoints

        return cls._of(from_checkpoints([checkpoint], data_bin), max_batch_size, device, dtype, {}, options)

    @classmethod
    def _of(cls: type[Model], model: ModelFile, max_batch_size: int, device: torch.device | str | None,
            dtype: torch.dtype, suggested: dict[str, Any], options: dict[str, Any]) -> Model:
        made = cls.__new__(cls)
        made._set_up(model, max_batch_size, device, dtype, suggested, options)
        return made

    def _set_up(self, model: ModelFile, max_batch_size: int, device: torch.device | str | None, dtype: torch.dtype,
                suggested: dict[str, Any], options: dict[str, Any]) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if model.config.stacks != self.STACKS:
            advice = {"encoder-decoder": "Transformer or Bart", "encoder": "Bert", "decoder": "Gpt"}
            raise GenerationError(f"{type(self).__name__} runs models of stacks {self.STACKS!r}, got "
                                  f"{model.config.stacks!r}; use {advice[model.config.stacks]}")
        self.config, self.max_batch_size = model.config, max_batch_size
        self._load(model, device, dtype, suggested, options)

    def _load(self, model: ModelFile, device: torch.device | str | None, dtype: torch.dtype, suggested: dict[str, Any],
              options: dict[str, Any]) -> None:
        raise NotImplementedError

    def _rows(self, input_seq: Ids, attention_mask: Ids | None = None) -> list[list[int]]:
        """The tokens of each row: those that the mask has, or that are not pad."""
        if attention_mask is None:
            return [[int(token) for token in row if token != self.config.pad] for row in input_seq]
        return [[int(token) for token, real in zip(row, mask, strict=True) if real]
                for row, mask in zip(input_seq, attention_mask, strict=True)]


class Transformer(_Model):
    """An encoder-decoder behind LightSeq's interface; ``Bart`` is the same."""

    STACKS = "encoder-decoder"

    def _load(self, model: ModelFile, device: torch.device | str | None, dtype: torch.dtype, suggested: dict[str, Any],
              options: dict[str, Any]) -> None:
        self.generator = Generator([model], device, dtype)
        self.extra_decode_length = int(model.decoding.get("extra_decode_length", 50))
        suggested = dict(suggested)
        self.first_tokens: list[int] = suggested.pop("first_tokens", [])
        limit = suggested.pop("max_length", None)
        chosen = {**_suggested(model.decoding), **suggested, **options}
        self.options = GenerationOptions.from_dict(chosen | {"nbest": options.get("nbest", chosen["beam"])})
        self.limited_by_source = not {"max_len_a", "max_len_b", "match_source_len"} & options.keys()
        if limit is not None and self.limited_by_source:  # which counts the start token and eos
            self.options = replace(self.options, max_len_b=max(limit - 2, 1))
            self.limited_by_source = False
        if self.first_tokens and "score_prefix" not in options:
            self.options = replace(self.options, score_prefix=False)

    def infer(self, input_seq: Ids, attention_mask: Ids | None = None
              ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Source ids (B, S), padded or ragged, -> target ids (B, K, L) int32 and scores (B, K) float32.

        Ids count where ``attention_mask`` (B, S) is not 0; without it, those that are not the model's ``pad``. K
        hypotheses a sentence, best first; ids behind the end are eos. Scores are log-probabilities divided by
        ``length ** lenpen``. At most source length + extra_decode_length ids are made unless ``max_len_*`` was given.
        """
        config = self.generator.config
        rows = self._rows(input_seq, attention_mask)
        options = self.options
        if self.limited_by_source:
            options = replace(options, max_len_a=1.0, max_len_b=self.extra_decode_length)
        first = [self.first_tokens] * len(rows) if self.first_tokens else None
        found = self.generator.infer(rows, options, first, max_sentences=self.max_batch_size)
        width = max((len(h.tokens) for hypotheses in found for h in hypotheses), default=0)
        tokens = np.full((len(rows), options.nbest, width), config.eos, dtype=np.int32)
        scores = np.full((len(rows), options.nbest), -np.inf, dtype=np.float32)
        for b, hypotheses in enumerate(found):
            for k, hypothesis in enumerate(hypotheses):
                tokens[b, k, :len(hypothesis.tokens)] = torch.as_tensor(hypothesis.tokens).numpy()
                scores[b, k] = float(hypothesis.score)
        return tokens, scores


class Bart(Transformer):
    """BART, mBART and their like."""


class Bert(_Model):
    """An encoder alone: BERT, RoBERTa and their like."""

    STACKS = "encoder"

    def _load(self, model: ModelFile, device: torch.device | str | None, dtype: torch.dtype, suggested: dict[str, Any],
              options: dict[str, Any]) -> None:
        if options:
            raise GenerationError(f"an encoder generates nothing and has no options, got {', '.join(options)}")
        self.encoder = TextEncoder(model, device, dtype)

    def infer(self, input_seq: Ids, attention_mask: Ids | None = None,
              token_type_ids: Ids | None = None) -> npt.NDArray[np.float32]:
        """Ids (B, S), padded or ragged, -> the last layer's output (B, S, H) float32, 0 where there is no token.

        Masks and types as :class:`TextEncoder` takes them.
        """
        hidden = [part.hidden.float().cpu().numpy() for part in self._parts(input_seq, attention_mask, token_type_ids)]
        if not hidden:
            return np.zeros((0, 0, self.config.encoder_embed_dim), np.float32)
        width = max(part.shape[1] for part in hidden)
        return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0))) for part in hidden])

    def pool(self, input_seq: Ids, attention_mask: Ids | None = None,
             token_type_ids: Ids | None = None) -> npt.NDArray[np.float32]:
        """Ids (B, S) -> the pooler's output (B, H) float32; GenerationError for a model without pooler."""
        if not self.config.pooler:
            raise GenerationError("the model has no pooler; take the first token's vector of infer()")
        parts = [part.pooled for part in self._parts(input_seq, attention_mask, token_type_ids)]
        return np.concatenate([np.zeros((0, self.config.encoder_embed_dim), np.float32),
                               *(part.float().cpu().numpy() for part in parts if part is not None)])

    def _parts(self, input_seq: Ids, attention_mask: Ids | None, token_type_ids: Ids | None) -> Iterator[Encoded]:
        for start in range(0, len(input_seq), self.max_batch_size):
            part = slice(start, start + self.max_batch_size)
            yield self.encoder(input_seq[part],
                               None if attention_mask is None else np.asarray(attention_mask[part]),
                               None if token_type_ids is None else token_type_ids[part])


class Gpt(_Model):
    """A decoder alone: GPT-2, and fairseq's language models."""

    STACKS = "decoder"

    def _load(self, model: ModelFile, device: torch.device | str | None, dtype: torch.dtype, suggested: dict[str, Any],
              options: dict[str, Any]) -> None:
        self.generator = Generator([model], device, dtype)
        suggested = {name: value for name, value in suggested.items()
                     if name not in ("first_tokens", "max_length", "min_len")}  # lengths there count the text
        if model.decoding.get("sampling_method") in ("topk", "topp", "beam_search"):  # not ppl: a file of LightSeq's
            suggested |= _suggested(model.decoding)
        if model.decoding.get("extra_decode_length"):
            suggested["max_len_b"] = int(model.decoding["extra_decode_length"])
        plain = {"beam": 1, "nbest": 1, "min_len": 0, "force_eos": False, "max_len_b": 50}
        self.options = GenerationOptions.from_dict({**plain, **suggested, "nbest": 1, **options})

    def sample(self, input_seq: Ids, attention_mask: Ids | None = None) -> npt.NDArray[np.int32]:
        """Texts (B, S), padded or ragged, -> each with its continuation, (B, L) int32; ids behind the end are eos.

        Ids count where ``attention_mask`` (B, S) is not 0; without it, those that are not the model's ``pad``. At most
        ``max_len_b`` ids follow (50 unless given); what follows is the best of a search, or drawn with ``sampling``.
        """
        rows = self._rows(input_seq, attention_mask)
        found = self.generator.infer(rows, self.options, max_sentences=self.max_batch_size)
        if not self.options.include_context:
            said = [[*row, *hypotheses[0].tokens.tolist()] for row, hypotheses in zip(rows, found, strict=True)]
        else:
            said = [[row[0], *hypotheses[0].tokens.tolist()] for row, hypotheses in zip(rows, found, strict=True)]
        tokens = np.full((len(rows), max(map(len, said), default=0)), self.config.eos, dtype=np.int32)
        for row, ids in zip(tokens, said, strict=True):
            row[:len(ids)] = ids
        return tokens

    def ppl(self, input_seq: Ids, attention_mask: Ids | None = None) -> npt.NDArray[np.float32]:
        """Texts (B, S), padded or ragged, of two tokens at least -> the mean negative log-likelihood of the tokens of
        each but its first, (B,) float32.

        LightSeq's name and number: the logarithm of the perplexity, which is what Hugging Face's loss is.
        """
        rows = [torch.tensor(row) for row in self._rows(input_seq, attention_mask)]
        short = [index for index, row in enumerate(rows) if len(row) < 2]
        if short:
            raise GenerationError(f"texts {short} have fewer than two tokens, so nothing of them is predicted")
        model = self.generator.models[0]
        assert isinstance(model, LanguageModel)
        most = self.config.max_target_positions
        long = [index for index, row in enumerate(rows) if len(row) - 1 > most]
        if long:
            raise GenerationError(f"texts {long} are longer than the model's {most} positions")
        means: list[float] = []
        for start in range(0, len(rows), self.max_batch_size):
            scores = model.log_probabilities(rows[start:start + self.max_batch_size])
            means += torch.stack([-each.mean() for each in scores]).tolist()
        return np.array(means, dtype=np.float32)


def _generation_config(folder: Path) -> dict[str, Any]:
    """What generation_config.json of ``folder`` suggests; nothing where there is no such file."""
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    return _suggested_by(found)


def _suggested_by(found: dict[str, Any]) -> dict[str, Any]:
    """GenerationOptions that a generation_config suggests by its num_beams, length_penalty, min_length,
    no_repeat_ngram_size, do_sample, temperature, top_k, top_p and forced_eos_token_id; "first_tokens", which every
    target begins with (forced_bos_token_id); "max_length"."""
    suggested: dict[str, Any] = {}
    for theirs, ours in (("length_penalty", "lenpen"), ("no_repeat_ngram_size", "no_repeat_ngram_size"),
                         ("max_length", "max_length")):
        if found.get(theirs) is not None:
            suggested[ours] = float(found[theirs]) if ours == "lenpen" else found[theirs]
    if found.get("min_length"):  # which counts the start token
        suggested["min_len"] = max(found["min_length"] - 1, 0)
    beam = found.get("num_beams") or 1
    suggested |= {"beam": beam, "nbest": beam}
    if found.get("do_sample") and beam == 1:
        suggested |= {"sampling": True, "temperature": float(found.get("temperature") or 1.0)}
        if (found.get("top_p") or 1.0) < 1:
            suggested["sampling_topp"] = float(found["top_p"])
        suggested["sampling_topk"] = found.get("top_k") or (0 if "sampling_topp" in suggested else 50)
    if found.get("forced_bos_token_id") is not None:
        suggested["first_tokens"] = [found["forced_bos_token_id"]]
    if found.get("forced_eos_token_id") is not None:
        suggested["score_forced_eos"] = False
    return suggested


def _suggested(decoding: dict[str, Any]) -> dict[str, Any]:
    """GenerationOptions for what a LightSeq file suggests: all hypotheses of a search, one of sampling."""
    method = decoding.get("sampling_method") or "beam_search"
    if method in ("topk", "topp"):
        chosen = {"sampling_topk": int(decoding.get("topk", 1))} if method == "topk" else \
            {"sampling_topp": float(decoding.get("topp", 0.75))}
        return {"beam": 1, "nbest": 1, "sampling": True, **chosen}
    beam = 1 if method == "greedy" else int(decoding.get("beam_size") or 4)
    suggested = {"beam": beam, "nbest": beam, "lenpen": float(decoding.get("length_penalty", 0.6))}
    if decoding.get("diverse_lambda"):
        suggested["diversity_rate"] = float(decoding["diverse_lambda"])
    return suggested
