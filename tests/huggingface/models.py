"""Small Hugging Face models of random weights, and batches with padding for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightseq_fairseq.huggingface import accelerate
from tests.conftest import scramble

VOCAB = 61
BERTS = ("bert", "roberta", "xlmroberta", "camembert")
BARTS = ("bart", "mbart", "marian", "m2m100")
NO_DROPOUT = {
    **dict.fromkeys(BERTS, dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    **dict.fromkeys(BARTS, dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)),
    "gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0),
}
_CONFIGS = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig, "bart": transformers.BartConfig,
            "xlmroberta": transformers.XLMRobertaConfig, "camembert": transformers.CamembertConfig,
            "mbart": transformers.MBartConfig, "marian": transformers.MarianConfig,
            "m2m100": transformers.M2M100Config, "gpt2": transformers.GPT2Config}
DROPOUT = {family: dict.fromkeys(options, 0.2) for family, options in NO_DROPOUT.items()}


def config(family: str, **options: Any) -> transformers.PreTrainedConfig:
    """Three layers (BART's like two and two) of width 48 with 4 heads, no dropout unless ``options`` say so."""
    sizes: dict[str, dict[str, Any]] = {
        "bert": dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
                     max_position_embeddings=40),
        "bart": dict(d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=40,
                     decoder_start_token_id=2, forced_eos_token_id=None),
        "gpt2": dict(n_embd=48, n_layer=3, n_head=4, n_inner=80, n_positions=40)}
    sizes |= dict.fromkeys(BERTS[1:], sizes["bert"] | dict(type_vocab_size=2))
    sizes |= dict.fromkeys(BARTS[1:], sizes["bart"] | dict(encoder_layerdrop=0.0, decoder_layerdrop=0.0))
    tokens = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return _CONFIGS[family](**tokens | sizes[family] | NO_DROPOUT[family] | options)


def pair(kind: str, device: torch.device | str = "cpu", attention: str = "sdpa", graphs: bool = False,
         **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model of class ``kind`` with every parameter off its initial value, and a copy of it with our layers."""
    family = next(family for family in NO_DROPOUT if kind.lower().startswith(family))
    stock = getattr(transformers, kind)._from_config(config(family, **options), attn_implementation=attention)
    scramble(stock, scale=0.05)
    stock.to(device).eval()
    return stock, accelerate(copy.deepcopy(stock), graphs)[0]


def batch(kind: str, device: torch.device | str = "cpu", side: str = "right", lengths: tuple[int, ...] = (7, 3, 9, 1),
          ) -> dict[str, Tensor]:
    """input_ids (B, T) padded on ``side``, attention_mask, and labels for the class ``kind``; BART's targets too."""
    generator = torch.Generator().manual_seed(5)
    width = max(lengths)
    places = torch.arange(width).expand(len(lengths), width)
    count = torch.tensor(lengths)[:, None]
    real = places < count if side == "right" else places >= width - count
    ids = torch.randint(4, VOCAB, real.shape, generator=generator).where(real, 0)
    given = {"input_ids": ids, "attention_mask": real.long()}
    if kind.startswith("Bert"):
        given["token_type_ids"] = torch.randint(2, real.shape, generator=generator).where(real, 0)
    ignored = torch.full_like(ids, -100)
    if kind.endswith(("LM", "LMHeadModel")):
        given["labels"] = torch.randint(4, VOCAB, real.shape, generator=generator).where(real, ignored)
    elif kind.endswith("TokenClassification"):
        given["labels"] = torch.randint(2, real.shape, generator=generator).where(real, ignored)
    elif kind.endswith("SequenceClassification"):
        given["labels"] = torch.arange(len(lengths)) % 2
        if kind.startswith("Bart"):
            last = real.long().cumsum(1).argmax(1)
            given["input_ids"] = ids.scatter(1, last[:, None], 2)  # its head reads the one </s>
    elif kind.endswith("QuestionAnswering"):
        start = real.long().argmax(1)
        given |= {"start_positions": start, "end_positions": start + torch.tensor(lengths) // 2}
    elif kind.endswith(("ConditionalGeneration", "MTModel")):
        given["labels"] = torch.randint(4, VOCAB, (len(lengths), 5), generator=generator)
        given["labels"][1, 3:] = -100
    return {name: tensor.to(device) for name, tensor in given.items()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """By name, as backward has left them."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}
