"""A model file made ready to generate: packed encoder, incremental decoder, weights fused for this device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.generator.options import GenerationError
from lightseq_fairseq.layers import Packing, TransformerDecoder, TransformerEncoder
from lightseq_fairseq.layers.compiled import CompiledDecoder, CompiledEncoder
from lightseq_fairseq.layers.embedding import token_embedding
from lightseq_fairseq.layers.incremental import IncrementalDecoder
from lightseq_fairseq.layers.inference import InferenceEncoder
from lightseq_fairseq.model_file import ModelFile
from lightseq_fairseq.ops.linear import has_int8

_ROWS = 1024
"""Tokens whose log-probabilities over the vocabulary exist at one time."""


class Transformer:
    """An encoder-decoder on one device, in one dtype; what the search drives."""

    def __init__(self, model: ModelFile, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device = model.config, torch.device(device)
        self.dtype, int8 = arithmetic(dtype, self.device)
        encoder, decoder = load_layers(model, self.device, self.dtype)
        assert encoder is not None and decoder is not None, model.config.stacks
        self.encoder: InferenceEncoder | CompiledEncoder
        self.encoder = (CompiledEncoder(encoder) if CompiledEncoder.serves(encoder, int8)
                        else InferenceEncoder(encoder, int8))
        self.decoder: IncrementalDecoder | CompiledDecoder
        self.decoder = (CompiledDecoder(decoder) if CompiledDecoder.serves(decoder, int8)
                        else IncrementalDecoder(decoder, int8))
        for stack in (encoder, decoder):  # fused copies have taken their place
            stack.layers = torch.nn.ModuleList()

    @torch.no_grad()
    def encode(self, src_tokens: Sequence[Tensor], beam: int, max_steps: int) -> DecodeState:
        """Sentences, each 1-D int64 with eos and without padding -> the state before the first target token.

        ``max_steps`` is an upper bound of the steps to come, for implementations that reserve memory.
        """
        packing = Packing.of_lengths([len(sentence) for sentence in src_tokens], self.device)
        source = self.encoder(torch.cat(list(src_tokens)).to(self.device), packing)
        return DecodeState(self.decoder, self.decoder.start(source, packing, len(src_tokens), beam))


class DecodeState:
    """One batch being decoded: B live sentences of K beams."""

    def __init__(self, decoder: IncrementalDecoder | CompiledDecoder, state: Any) -> None:
        """``state`` is the decoder's own kind."""
        self.decoder, self.state = decoder, state

    @torch.no_grad()
    def step(self, tokens: Tensor, need_attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """The newest token of each beam, (B, K) int64, K = 1 at the first step -> fp32 logits (B, K, V), and the last
        layer's cross-attention (B, K, S), the mean over its heads, if asked for."""
        logits = self.decoder.next_logits(self.state, tokens, need_attention)
        return logits.view(*tokens.shape, -1).float(), self.state.attention

    def reorder(self, parents: Tensor) -> None:
        """Beam k of sentence b continues its beam ``parents[b, k]``, (B, K) int64."""
        self.state.reorder(parents)

    def keep(self, sentences: Tensor) -> None:
        """Only these sentences go on, (B',) int64 in ascending order."""
        self.state.keep(sentences)


class ContinuationState(DecodeState):
    """Texts being continued."""

    def __init__(self, decoder: IncrementalDecoder, features: Tensor | None, keys_values: list[Tensor],
                 packing: Packing, beam: int) -> None:
        super().__init__(decoder, decoder.resume(keys_values, packing, beam))
        self.reader, self.features = decoder, features

    @torch.no_grad()
    def context_log_probabilities(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Of each token of the texts but the first, (T - 1,) fp32 each; before any of them has left."""
        lengths = [len(text) - 1 for text in texts]
        if self.features is None:
            return [torch.zeros(0) for _ in texts]
        words = torch.cat([text[1:] for text in texts]).to(self.features.device)
        found = [-F.cross_entropy(self.reader.logits(rows).float(), some, reduction="none") for rows, some in
                 zip(torch.split(self.features, _ROWS), torch.split(words, _ROWS), strict=True)]
        return list(torch.split(torch.cat(found), lengths))


class LanguageModel:
    """A decoder without encoder on one device, in one dtype; its sources are the texts that it continues."""

    def __init__(self, model: ModelFile, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device = model.config, torch.device(device)
        self.dtype, int8 = arithmetic(dtype, self.device)
        decoder = load_layers(model, self.device, self.dtype)[1]
        assert decoder is not None, model.config.stacks
        self.decoder = IncrementalDecoder(decoder, int8)
        self.encoder = ContextReader(self.decoder)
        decoder.layers = torch.nn.ModuleList()  # fused copies have taken their place

    @torch.no_grad()
    def encode(self, src_tokens: Sequence[Tensor], beam: int, max_steps: int) -> ContinuationState:
        """Texts, each 1-D int64 of one token at least, without padding -> the state before their last token is fed."""
        lengths = [len(text) - 1 for text in src_tokens]
        if max(lengths) > self.config.max_target_positions:
            raise GenerationError(f"a text of {max(lengths) + 1} tokens is longer than the model's "
                                  f"{self.config.max_target_positions} positions")
        packing = Packing.of_lengths(lengths, self.device)
        tokens = torch.cat(list(src_tokens)).to(self.device)
        ends = torch.tensor([len(text) for text in src_tokens]).cumsum(0) - 1
        fed = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, ends, False).to(self.device)
        features, keys_values = self.decoder.read(tokens[fed], packing) if packing.width else (None, [])
        return ContinuationState(self.decoder, features, keys_values, packing, beam)

    @torch.no_grad()
    def log_probabilities(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Of each token of each text (T,) int64 but the first, (T - 1,) fp32 on the model's device."""
        state = self.encode(texts, 1, 0)
        return state.context_log_probabilities(texts)


class ContextReader:
    """What a search that stays on the device asks of a language model in place of an encoder."""

    def __init__(self, decoder: IncrementalDecoder) -> None:
        self.decoder = decoder

    @torch.no_grad()
    def __call__(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Packed texts (N,) int64 -> (N, E + 2 * L * C): the embedding of each token without position, and the keys and
        values of each layer, see DecodeStep.start."""
        _, keys_values = self.decoder.read(tokens, packing)
        return torch.cat([self.decoder.embeddings[tokens], *(each.flatten(1) for each in keys_values)], 1)


def load_model(model: ModelFile, device: torch.device | str, dtype: torch.dtype) -> Transformer | LanguageModel:
    """What generates; GenerationError for a model that has no decoder."""
    if not model.config.has_decoder:
        raise GenerationError("an encoder alone generates nothing; lightseq_fairseq.inference.Bert gives its outputs")
    return Transformer(model, device, dtype) if model.config.has_encoder else LanguageModel(model, device, dtype)


def arithmetic(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, bool]:
    """The type of weights and states that a generator's ``dtype`` means, and whether linear maps are of 8 bits."""
    if dtype != torch.int8:
        return dtype, False
    if device.type != "cpu":
        raise GenerationError("8-bit weights are for the CPU; on a GPU use float16 or bfloat16")
    if not has_int8():
        raise GenerationError(f"torch {torch.__version__} as built here lacks oneDNN's 8-bit operators; use float32")
    return torch.float32, True


class _Undrawn(TorchFunctionMode):
    """Parameters keep what they have instead of normal draws, for which, on the meta device, torch would import its
    compiler: a second or two."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_layers(model: ModelFile, device: torch.device,
                dtype: torch.dtype) -> tuple[TransformerEncoder | None, TransformerDecoder | None]:
    """The packed encoder and decoder of a model file, without gradients; None for what it has not."""
    config: TransformerConfig = model.config
    encoder = decoder = None
    with torch.device("meta"), _Undrawn():
        if config.has_encoder:
            encoder = TransformerEncoder(config, token_embedding(config.src_vocab_size, config.encoder_embed_dim,
                                                                 config.pad))
        if config.has_decoder:
            decoder = TransformerDecoder(config, token_embedding(config.tgt_vocab_size, config.input_dim, config.pad))
    moved: dict[int, Tensor] = {}  # tied names share one tensor, on the device too
    stacks: tuple[tuple[str, nn.Module | None], ...] = (("encoder.", encoder), ("decoder.", decoder))
    for name, stack in stacks:
        if stack is not None:
            state = {key.removeprefix(name): moved.setdefault(id(tensor), tensor.to(device, dtype))
                     for key, tensor in model.tensors.items() if key.startswith(name)}
            stack.load_state_dict(state, assign=True)
            stack.requires_grad_(False).eval()
    return encoder, decoder
