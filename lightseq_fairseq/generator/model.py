"""A model file made ready to generate: packed encoder, incremental decoder, weights fused for this device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.layers import Packing, TransformerDecoder, TransformerEncoder
from lightseq_fairseq.layers.compiled import CompiledDecoder, CompiledEncoder
from lightseq_fairseq.layers.embedding import token_embedding
from lightseq_fairseq.layers.incremental import IncrementalDecoder
from lightseq_fairseq.layers.inference import InferenceEncoder
from lightseq_fairseq.model_file import ModelFile


class Transformer:
    """An encoder-decoder on one device, in one dtype; what the search drives."""

    def __init__(self, model: ModelFile, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device, self.dtype = model.config, torch.device(device), dtype
        encoder, decoder = load_layers(model, self.device, dtype)
        self.encoder: InferenceEncoder | CompiledEncoder
        self.encoder = CompiledEncoder(encoder) if CompiledEncoder.serves(encoder) else InferenceEncoder(encoder)
        self.decoder: IncrementalDecoder | CompiledDecoder
        self.decoder = CompiledDecoder(decoder) if CompiledDecoder.serves(decoder) else IncrementalDecoder(decoder)
        for stack in (encoder, decoder):  # fused copies have taken their place
            stack.layers = torch.nn.ModuleList()

    @torch.no_grad()
    def encode(self, src_tokens: Sequence[Tensor], beam: int, max_steps: int) -> DecodeState:
        """Sentences, each 1-D int64 with eos and without padding -> the state before the first target token.

        ``max_steps`` is an upper bound of the steps to come, for implementations that reserve memory.
        """
        packing = Packing.of_lengths([len(sentence) for sentence in src_tokens], self.device)
        source = self.encoder(torch.cat(list(src_tokens)).to(self.device), packing)
        return DecodeState(self.decoder, source, packing, len(src_tokens), beam)


class DecodeState:
    """One batch being decoded: B live sentences of K beams."""

    def __init__(self, decoder: IncrementalDecoder | CompiledDecoder, source: Tensor, packing: Packing, batch: int,
                 beam: int) -> None:
        self.decoder = decoder
        self.state: Any = decoder.start(source, packing, batch, beam)  # the decoder's own kind

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


def load_layers(model: ModelFile, device: torch.device,
                 dtype: torch.dtype) -> tuple[TransformerEncoder, TransformerDecoder]:
    """The packed encoder and decoder of a model file, without gradients."""
    config: TransformerConfig = model.config
    with torch.device("meta"):
        source = token_embedding(config.src_vocab_size, config.encoder_embed_dim, config.pad)
        target = token_embedding(config.tgt_vocab_size, config.input_dim, config.pad)
        encoder, decoder = TransformerEncoder(config, source), TransformerDecoder(config, target)
    moved: dict[int, Tensor] = {}  # tied names share one tensor, on the device too
    for name, stack in (("encoder.", encoder), ("decoder.", decoder)):
        state = {key.removeprefix(name): moved.setdefault(id(tensor), tensor.to(device, dtype))
                 for key, tensor in model.tensors.items() if key.startswith(name)}
        stack.load_state_dict(state, assign=True)
        stack.requires_grad_(False).eval()
    return encoder, decoder
