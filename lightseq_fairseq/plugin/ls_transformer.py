"""``--arch ls_transformer*``: fairseq's Transformer with our layers inside.

Options, defaults, architectures, parameter names and order, initialisation and checkpoints are those of fairseq's
``transformer``; whatever our layers do not do is refused by name when the model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    FairseqEncoder,
    FairseqIncrementalDecoder,
    register_model,
    register_model_architecture,
)
from fairseq.models.transformer import TransformerConfig as FairseqTransformerConfig
from fairseq.models.transformer import TransformerModel
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.layers import Packing, TransformerDecoder, TransformerEncoder
from lightseq_fairseq.layers.incremental import IncrementalDecoder, IncrementalState
from lightseq_fairseq.layers.linear import linear

_REFUSED = {
    "adaptive_input": "use an ordinary embedding",
    "adaptive_softmax_cutoff": "use an ordinary softmax with ls_label_smoothed_cross_entropy",
    "tie_adaptive_weights": "use --share-decoder-input-output-embed",
    "tie_adaptive_proj": "use --share-decoder-input-output-embed",
    "quant_noise_pq": "train without quantization noise",
    "quant_noise_scalar": "train without quantization noise",
    "char_inputs": "use subword units",
    "base_layers": "use ordinary feed-forward layers",
    "encoder_xformers_att_config": "leave it out: attention is our own",
    "decoder_xformers_att_config": "leave it out: attention is our own",
    "scale_attn": "train without NormFormer scaling",
    "scale_heads": "train without NormFormer scaling",
    "scale_fc": "train without NormFormer scaling",
    "scale_resids": "train without NormFormer scaling",
}
"""Options of fairseq's transformer that change what is computed and that our layers do not compute."""


def refuse_unsupported(args: Any, ours: str = "ls_transformer", theirs: str = "transformer") -> None:
    """ValueError naming every option set in ``args`` (a namespace or config) that our layers would have to ignore."""
    asked = [name for name in _REFUSED if getattr(args, name, None)]
    if asked:
        wishes = "; ".join(f"--{name.replace('_', '-')} ({_REFUSED[name]})" for name in asked)
        raise ValueError(f"{ours} does not support {wishes}; fairseq's own `{theirs}` does")


def layer_config(cfg: Any, src_dict: Any, tgt_dict: Any) -> TransformerConfig:
    """Our TransformerConfig for fairseq's nested one; decoder input and output widths as fairseq reads them."""
    positions = [
        "none" if cfg.no_token_positional_embeddings else "learned" if side.learned_pos else "sinusoidal"
        for side in (cfg.encoder, cfg.decoder)
    ]
    return TransformerConfig(
        src_vocab_size=len(src_dict), tgt_vocab_size=len(tgt_dict),
        encoder_layers=cfg.encoder.layers, encoder_embed_dim=cfg.encoder.embed_dim,
        encoder_ffn_embed_dim=cfg.encoder.ffn_embed_dim, encoder_attention_heads=cfg.encoder.attention_heads,
        decoder_layers=cfg.decoder.layers, decoder_embed_dim=cfg.decoder.embed_dim,
        decoder_ffn_embed_dim=cfg.decoder.ffn_embed_dim, decoder_attention_heads=cfg.decoder.attention_heads,
        # fairseq's embedding is decoder.embed_dim wide whatever --decoder-input-dim says
        decoder_output_dim=int(cfg.decoder.output_dim),
        activation_fn=str(cfg.activation_fn),
        encoder_normalize_before=cfg.encoder.normalize_before,
        decoder_normalize_before=cfg.decoder.normalize_before,
        no_decoder_final_norm=cfg.no_decoder_final_norm, layernorm_embedding=cfg.layernorm_embedding,
        encoder_positions=positions[0], decoder_positions=positions[1],
        max_source_positions=cfg.max_source_positions, max_target_positions=cfg.max_target_positions,
        no_scale_embedding=cfg.no_scale_embedding,
        share_decoder_input_output_embed=cfg.share_decoder_input_output_embed,
        share_all_embeddings=cfg.share_all_embeddings or getattr(cfg, "merge_src_tgt_embed", False),  # absent in 0.12.2
        cross_self_attention=cfg.cross_self_attention, no_cross_attention=cfg.no_cross_attention,
        bos=tgt_dict.bos(), pad=tgt_dict.pad(), eos=tgt_dict.eos(), unk=tgt_dict.unk(),
        dropout=cfg.dropout, attention_dropout=cfg.attention_dropout,
        activation_dropout=cfg.activation_dropout or cfg.relu_dropout or 0.0,
        encoder_layerdrop=cfg.encoder.layerdrop, decoder_layerdrop=cfg.decoder.layerdrop)


def _layer_wrapper(cfg: Any):
    """Activation checkpointing and FSDP around each layer, as fairseq wraps its own."""

    def wrap(layer: nn.Module) -> nn.Module:
        if cfg.checkpoint_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
        return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)

    return wrap


class _UpgradesCheckpoints:
    """Names in checkpoints of other fairseq versions, for encoder and decoder alike."""

    layers: nn.ModuleList
    old_norms: tuple[str, ...]
    """Of a layer, before 0.6, in their order there."""
    unused: tuple[str, ...] = ()
    """Copies of weights that fairseq 0.12.2 stores beside a layer's own."""

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        for index in range(len(self.layers)):
            prefix = f"{name}.layers.{index}"
            for tensor in self.unused:
                state_dict.pop(f"{prefix}.{tensor}", None)
            for number, norm in enumerate(self.old_norms):
                for part in ("weight", "bias"):
                    old = f"{prefix}.layer_norms.{number}.{part}"
                    if old in state_dict:
                        state_dict[f"{prefix}.{norm}.{part}"] = state_dict.pop(old)
            for attention in ("self_attn", "encoder_attn"):
                for part in ("weight", "bias"):
                    joint = state_dict.pop(f"{prefix}.{attention}.in_proj_{part}", None)
                    if joint is not None:
                        for key, value in zip("qkv", joint.chunk(3), strict=True):
                            state_dict[f"{prefix}.{attention}.{key}_proj.{part}"] = value
        version = state_dict.get(f"{name}.version")
        if version is None or version[0] < 2:  # no norm stood behind the stack then
            self.layer_norm = None
            state_dict[f"{name}.version"] = torch.Tensor([1])
        return state_dict


class LSTransformerEncoder(_UpgradesCheckpoints, TransformerEncoder, FairseqEncoder):
    """Our encoder behind fairseq's encoder interface."""

    old_norms = ("self_attn_layer_norm", "final_layer_norm")
    unused = tuple(f"{name}_{part}" for name in ("in_proj", "out_proj", "fc1", "fc2") for part in ("weight", "bias"))

    def __init__(self, cfg: Any, config: TransformerConfig, dictionary: Any, embed_tokens: nn.Embedding) -> None:
        super().__init__(config, embed_tokens, _layer_wrapper(cfg), dictionary=dictionary)
        self.register_buffer("version", torch.Tensor([3]))
        self.padding_idx = embed_tokens.padding_idx

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None, return_all_hiddens: bool = False,
                token_embeddings: Tensor | None = None) -> dict[str, list[Any]]:
        """``src_tokens`` (B, S) int64 with pads on either side, ``token_embeddings`` (B, S, C) or None.

        Returns fairseq's dict of lists: encoder_out [S x B x C], encoder_padding_mask [B x S], encoder_states,
        src_lengths [B x 1]; encoder_embedding stays empty.
        """
        packing = Packing.of(src_tokens, self.padding_idx)
        states: list[Tensor] | None = [] if return_all_hiddens else None
        embeddings = None if token_embeddings is None else packing.pack(token_embeddings)
        x = self.encode(packing.pack(src_tokens), packing, embeddings, states)
        mask = src_tokens.eq(self.padding_idx)
        return {
            "encoder_out": [packing.unpack(x).transpose(0, 1)],
            "encoder_padding_mask": [mask],
            "encoder_embedding": [],
            "encoder_states": [packing.unpack(state).transpose(0, 1) for state in states or ()],
            "src_tokens": [],
            "src_lengths": [(~mask).sum(1, dtype=torch.int32, keepdim=True)],
        }

    def reorder_encoder_out(self, encoder_out: dict[str, list[Any]], new_order: Tensor) -> dict[str, list[Any]]:
        """Sentence (or beam) i of the result is ``new_order[i]``, (B',) int64, of ``encoder_out``."""
        batch_dim = {"encoder_out": 1, "encoder_states": 1}
        return {key: [value.index_select(batch_dim.get(key, 0), new_order) for value in values]
                for key, values in encoder_out.items()}

    def max_positions(self) -> int:
        """The longest sentence, in tokens."""
        limit = self.config.max_source_positions
        return limit if self.embed_positions is None else min(limit, self.embed_positions.max_positions)


class LSTransformerDecoder(_UpgradesCheckpoints, TransformerDecoder, FairseqIncrementalDecoder):
    """Our decoder behind fairseq's incremental decoder interface."""

    old_norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")

    def __init__(self, cfg: Any, config: TransformerConfig, dictionary: Any, embed_tokens: nn.Embedding) -> None:
        super().__init__(config, embed_tokens, _layer_wrapper(cfg), dictionary=dictionary)
        self.register_buffer("version", torch.Tensor([3]))
        self.padding_idx = embed_tokens.padding_idx
        self.num_layers = len(self.layers)

    def forward(self, prev_output_tokens: Tensor, encoder_out: dict[str, list[Any]] | None = None,
                incremental_state: dict[str, Any] | None = None, features_only: bool = False,
                full_context_alignment: bool = False, alignment_layer: int | None = None,
                alignment_heads: int | None = None, src_lengths: Any = None,
                return_all_hiddens: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """``prev_output_tokens`` (B, T) int64 -> logits (B, T, V), or features (B, T, output_dim) with
        ``features_only``, and fairseq's extra dict.

        ``extra["attn"]`` holds [B x T x S] of ``alignment_layer``; in training only if that is given.
        """
        x, extra = self.extract_features(prev_output_tokens, encoder_out, incremental_state, full_context_alignment,
                                         alignment_layer, alignment_heads, return_all_hiddens)
        return (x if features_only else self.output_layer(x)), extra

    def extract_features(self, prev_output_tokens: Tensor, encoder_out: dict[str, list[Any]] | None = None,
                         incremental_state: dict[str, Any] | None = None, full_context_alignment: bool = False,
                         alignment_layer: int | None = None, alignment_heads: int | None = None,
                         return_all_hiddens: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """What :meth:`forward` returns with ``features_only``."""
        source, source_packing = self._packed_source(encoder_out)
        if incremental_state is not None:
            x, attention = self._step(prev_output_tokens, source, source_packing, incremental_state)
            return x, {"attn": [attention], "inner_states": []}
        packing = Packing.of(prev_output_tokens, self.padding_idx)
        if alignment_layer is None and not self.training:
            alignment_layer = self.num_layers - 1
        states: list[Tensor] | None = [] if return_all_hiddens else None
        x, weights = self.decode(packing.pack(prev_output_tokens), packing, source, source_packing,
                                 not full_context_alignment, alignment_layer, states)
        attention = None
        if weights is not None and source_packing is not None:
            attention = packing.place(weights[:, :alignment_heads].mean(1).to(x))
            attention = source_packing.place(attention.transpose(1, 2)).transpose(1, 2)
        inner = [packing.unpack(state).transpose(0, 1) for state in states or ()]
        return packing.unpack(x), {"attn": [attention], "inner_states": inner}

    def _packed_source(self, encoder_out: dict[str, list[Any]] | None) -> tuple[Tensor | None, Packing | None]:
        if not encoder_out or not encoder_out["encoder_out"]:
            return None, None
        states = encoder_out["encoder_out"][0].transpose(0, 1)
        if encoder_out["encoder_padding_mask"]:
            mask = encoder_out["encoder_padding_mask"][0]
        else:
            mask = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        packing = Packing.of(mask.long(), pad=1)
        return packing.pack(states), packing

    def _step(self, tokens: Tensor, source: Tensor | None, source_packing: Packing | None,
              incremental_state: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        state: IncrementalState | None = self.get_incremental_state(incremental_state, "decoding")
        if state is None:
            state = IncrementalDecoder(self).start(source, source_packing, tokens.size(0), beam=1)
            for position in range(tokens.size(1) - 1):
                state.model.step(state, tokens[:, position, None])
            self.set_incremental_state(incremental_state, "decoding", state)
        x = state.model.step(state, tokens[:, -1:], need_attention=True)
        attention = state.attention
        if attention is not None and source_packing is not None:
            attention = source_packing.place(attention.transpose(1, 2)).transpose(1, 2)
        return x[:, None], attention

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        """Sentence (or beam) i of the next step is ``new_order[i]`` of the last one."""
        state: IncrementalState | None = self.get_incremental_state(incremental_state, "decoding")
        if state is not None:
            state.keep(new_order)

    def output_layer(self, features: Tensor, **kwargs: Any) -> Tensor:
        """(..., output_dim) -> (..., V)."""
        projection = self.output_projection
        if features.dim() == 2:
            return linear(features, projection.weight, projection.bias)
        return projection(features)

    def max_positions(self) -> int:
        """The longest sentence, in tokens."""
        limit = self.config.max_target_positions
        return limit if self.embed_positions is None else min(limit, self.embed_positions.max_positions)

    def make_generation_fast_(self, retain_dropout: bool = False, **kwargs: Any) -> None:
        """Nothing is left to do; ValueError for ``retain_dropout``, as steps of generation have no dropout."""
        if retain_dropout:
            raise ValueError("ls_transformer does not generate with --retain-dropout; use fairseq's own `transformer`")

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """fairseq's, and the output projection of checkpoints before fairseq 0.9; in place."""
        key = f"{name}.output_projection.weight"
        if key not in state_dict:  # fairseq before 0.9
            tied = state_dict.get(f"{name}.embed_tokens.weight") if self.config.tied_output else None
            old = tied if tied is not None else state_dict.pop(f"{name}.embed_out", None)
            if old is not None:
                state_dict[key] = old
        return super().upgrade_state_dict_named(state_dict, name)


def neighbours_of(*stacks: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Parameters that one GEMM uses together where they are adjacent in memory, in its order: q, k and v of each layer
    of ``stacks``, and k and v of all cross-attention."""
    layers: list[Any] = [layer for stack in stacks for layer in stack]
    groups = [[layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj] for layer in layers]
    cross = [attention for layer in layers if (attention := getattr(layer, "encoder_attn", None)) is not None]
    groups.append([projection for a in cross for projection in (a.k_proj, a.v_proj)])
    return [[getattr(projection, part) for projection in group] for group in groups for part in ("weight", "bias")]


class PackedTransformer:
    """Our encoder and decoder in one of fairseq's encoder-decoder models, in front of it among the base classes."""

    supports_packed_output = True
    encoder: LSTransformerEncoder
    decoder: LSTransformerDecoder
    fp8 = False

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """fairseq's options and ours (--ls-*)."""
        super().add_args(parser)  # type: ignore[misc]
        parser.add_argument("--ls-fp8", action="store_true",
                            help="multiply matrices of training in 8 bits (FP8, delayed scaling), for lightseq-train "
                                 "with --fp16 or --bf16 on GPUs from Ada and Hopper on; where a dimension is no "
                                 "multiple of 16, a vocabulary's say, that product stays in 16 bits")
        parser.add_argument("--ls-fp8-keep-output", action="store_true",
                            help="with --ls-fp8: the output projection stays in 16 bits")

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        """fairseq's entry point; ValueError names options that are not supported."""
        refuse_unsupported(args)
        model = super().build_model(args, task)  # type: ignore[misc]
        model.fp8 = getattr(args, "ls_fp8", False)
        return model

    @classmethod
    def build_encoder(cls, args: Any, src_dict: Any, embed_tokens: nn.Embedding) -> LSTransformerEncoder:
        """Our encoder of fairseq's arguments."""
        cfg = FairseqTransformerConfig.from_namespace(args)
        dictionaries = src_dict, src_dict
        return LSTransformerEncoder(cfg, layer_config(cfg, *dictionaries), src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args: Any, tgt_dict: Any, embed_tokens: nn.Embedding) -> LSTransformerDecoder:
        """Our decoder of fairseq's arguments."""
        cfg = FairseqTransformerConfig.from_namespace(args)
        return LSTransformerDecoder(cfg, layer_config(cfg, tgt_dict, tgt_dict), tgt_dict, embed_tokens)

    def forward_packed_rows(self, src_tokens: Tensor, prev_output_tokens: Tensor,
                            features_only: bool = False) -> Tensor:
        """(B, S) and (B, T) int64 -> logits (N, V) of the N target slots that are not padding, row by row."""
        self.refuse_fp8()
        source_packing = Packing.of(src_tokens, self.encoder.padding_idx)
        packing = Packing.of(prev_output_tokens, self.decoder.padding_idx)
        return self.forward_packed(source_packing.pack(src_tokens), source_packing,
                                   packing.pack(prev_output_tokens), packing, features_only)

    def forward_packed(self, source_tokens: Tensor, source_packing: Packing, previous_tokens: Tensor,
                       packing: Packing, features_only: bool = False) -> Tensor:
        """Packed source (M,) and previous target tokens (N,) int64 -> logits (N, V)."""
        source = self.encoder.encode(source_tokens, source_packing)
        x, _ = self.decoder.decode(previous_tokens, packing, source, source_packing)
        return x if features_only else self.decoder.output_layer(x)

    def refuse_fp8(self) -> None:
        """ValueError where a training that is to multiply in 8 bits comes by another way than a whole step's."""
        if self.fp8 and self.training:  # type: ignore[attr-defined]
            raise ValueError("--ls-fp8 multiplies in 8 bits in lightseq-train and lightseq-hydra-train alone: train "
                             "with one of them, or leave it out")

    @property
    def stacks(self) -> list[Any]:
        """Encoder and decoder."""
        return [self.encoder, self.decoder]

    def neighbouring_parameters(self) -> list[list[Tensor]]:
        """Parameters that one GEMM uses together where they are adjacent in memory, in its order."""
        return neighbours_of(self.encoder.layers, self.decoder.layers)


@register_model("ls_transformer")
class LSTransformerModel(PackedTransformer, TransformerModel):
    """fairseq's TransformerModel with our encoder and decoder.

    ``forward(..., packed_output=True)`` computes from embedding to logits on real tokens alone, which
    ``ls_label_smoothed_cross_entropy`` asks for.
    """

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None, prev_output_tokens: Tensor,
                return_all_hiddens: bool = True, features_only: bool = False, alignment_layer: int | None = None,
                alignment_heads: int | None = None, packed_output: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """``src_tokens`` (B, S) and ``prev_output_tokens`` (B, T) int64 -> logits (B, T, V) and fairseq's extra dict.

        ``packed_output``: logits (N, V) of the N target slots that are not padding, row by row, and an empty dict.
        """
        if packed_output:
            return self.forward_packed_rows(src_tokens, prev_output_tokens, features_only), {}
        self.refuse_fp8()
        encoder_out = self.encoder(src_tokens, src_lengths=src_lengths, return_all_hiddens=return_all_hiddens)
        return self.decoder(prev_output_tokens, encoder_out=encoder_out, features_only=features_only,
                            alignment_layer=alignment_layer, alignment_heads=alignment_heads,
                            return_all_hiddens=return_all_hiddens)

    known_forward = forward
    """What a subclass replaces that computes something of its own."""


for _architecture in ("", "_tiny", "_iwslt_de_en", "_wmt_en_de", "_vaswani_wmt_en_de_big",
                      "_vaswani_wmt_en_fr_big", "_wmt_en_de_big", "_wmt_en_de_big_t2t"):
    register_model_architecture("ls_transformer", f"ls_transformer{_architecture}")(
        ARCH_CONFIG_REGISTRY[f"transformer{_architecture}"])
