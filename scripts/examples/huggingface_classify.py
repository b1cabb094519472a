#!/usr/bin/env python3
"""Teach a small BERT of Hugging Face to tell good reviews from bad ones, its layers run by our operators.

    python scripts/examples/huggingface_classify.py [--steps 150] [--device cuda]

Sentences are made on the spot: adjectives that a "not" turns round, and clauses of which the one behind "but" decides,
so that counting words does not suffice. Hugging Face's Trainer trains; training takes some seconds on a CPU, and the
last line says how many unseen sentences came out right.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lightseq_fairseq.huggingface import accelerate

NOUNS = "film story acting music ending dialogue cast pace".split()
GOOD = "good great moving funny clever gripping".split()
BAD = "bad poor dull silly weak boring".split()
HEDGES = ["", "", "really ", "quite ", "rather "]
UNSEEN = 500


def clause(rng: random.Random) -> tuple[str, bool]:
    """A subject and what is said of it, and whether that is praise."""
    good, turned = rng.random() < 0.5, rng.random() < 0.4
    words = f"{'not ' if turned else ''}{rng.choice(HEDGES)}{rng.choice(GOOD if good else BAD)}"
    return f"the {rng.choice(NOUNS)} is {words}", good != turned


def review(rng: random.Random) -> tuple[str, int]:
    """One clause, or two of which the one behind "but" counts; 1 for praise."""
    text, good = clause(rng)
    if rng.random() < 0.6:
        other, other_good = clause(rng)
        text, good = rng.choice([(f"{text} but {other}", other_good), (f"although {other} , {text}", good)])
    return f"{text} .", int(good)


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Words as types, between BERT's [CLS] and [SEP]."""
    types = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in texts for word in text.split()})]
    words = Tokenizer(WordLevel({name: number for number, name in enumerate(types)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]")


def share_right(prediction: Any) -> dict[str, float]:
    """What Trainer reports of its evaluation."""
    return {"accuracy": float((np.argmax(prediction.predictions, 1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune BERT as a classifier of sentences.")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    start, rng = time.perf_counter(), random.Random(1)
    set_seed(1)

    reviews = list(dict.fromkeys(review(rng) for _ in range(6000)))
    tokenizer = word_tokenizer([text for text, _ in reviews])
    rows = [{"input_ids": tokenizer(text)["input_ids"], "label": label} for text, label in reviews]
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, pad_token_id=0))
    model, report = accelerate(model)
    print(report)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, TrainingArguments(folder, per_device_train_batch_size=64, max_steps=args.steps, learning_rate=2e-3,
                                     warmup_steps=20, logging_steps=50, save_strategy="no", report_to="none",
                                     disable_tqdm=True, use_cpu=args.device == "cpu", fp16=args.device == "cuda"),
            train_dataset=rows[UNSEEN:], eval_dataset=rows[:UNSEEN], data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=share_right)
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    praise = sum(row["label"] for row in rows[:UNSEEN]) / UNSEEN
    print(f"accuracy {accuracy:.3f} of {UNSEEN} unseen sentences (always the commoner answer: "
          f"{max(praise, 1 - praise):.3f}), {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
