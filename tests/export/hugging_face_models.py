"""Small Hugging Face models with random weights, no bias zero and no norm one, in folders as save_pretrained writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 53
_BERT = dict(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
             max_position_embeddings=31)
_BART = dict(vocab_size=VOCAB, d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=3,
             decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=36, max_position_embeddings=31)
_GPT2 = dict(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=31, bos_token_id=VOCAB - 1,
             eos_token_id=VOCAB - 1)

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _BERT),
    "bert, masked language model": ("BertForMaskedLM", "BertConfig", _BERT | dict(hidden_act="gelu_new")),
    "bert, classifier": ("BertForSequenceClassification", "BertConfig", _BERT | dict(type_vocab_size=3)),
    "roberta": ("RobertaModel", "RobertaConfig", _BERT | dict(type_vocab_size=1, hidden_act="relu")),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", _BERT | dict(type_vocab_size=1)),
    "camembert": ("CamembertModel", "CamembertConfig", _BERT | dict(type_vocab_size=1)),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "bart, scaled, tanh": ("BartForConditionalGeneration", "BartConfig",
                           _BART | dict(scale_embedding=True, activation_function="gelu_new")),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig",
              _BART | dict(scale_embedding=True, decoder_start_token_id=5)),
    "marian": ("MarianMTModel", "MarianConfig", _BART | dict(
        pad_token_id=VOCAB - 1, decoder_start_token_id=VOCAB - 1, eos_token_id=0, forced_eos_token_id=None,
        activation_function="swish", scale_embedding=True)),
    "marian, two vocabularies": ("MarianMTModel", "MarianConfig", _BART | dict(
        pad_token_id=VOCAB - 1, decoder_start_token_id=VOCAB - 1, eos_token_id=0, forced_eos_token_id=None,
        share_encoder_decoder_embeddings=False, decoder_vocab_size=VOCAB)),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", _BART),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2, untied, erf": ("GPT2LMHeadModel", "GPT2Config",
                          _GPT2 | dict(tie_word_embeddings=False, activation_function="gelu", n_inner=44)),
    "gpt2, with a pad": ("GPT2LMHeadModel", "GPT2Config", _GPT2 | dict(pad_token_id=7)),
}
"""Class, class of its configuration, and that configuration's arguments."""


def random_model(name: str, seed: int = 5, scale: float = 0.3) -> torch.nn.Module:
    """One of :data:`MODELS` in evaluation; its weights are normal(0, scale), so that outputs differ."""
    import transformers

    cls, config, arguments = MODELS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(getattr(transformers, config)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
        bias = dict(model.named_buffers()).get("final_logits_bias")
        if bias is not None and name.startswith("marian"):
            bias.normal_()
    return model


def folder_of(model: torch.nn.Module, folder: Path) -> Path:
    """``folder`` with the model in it."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder
