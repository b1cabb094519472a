#!/usr/bin/env python3
"""Teach a small BERT of Hugging Face to find the names in a sentence, its layers run by our operators.

    python scripts/examples/huggingface_tag.py [--steps 150] [--device cuda]

Sentences are made on the spot, tagged B-PER, I-PER, B-LOC, B-ORG, I-ORG or O. The same names stand for people, places
and companies, so that only their neighbours tell which. A plain loop of PyTorch trains, for some seconds on a CPU; the
last line says how many tokens of names in unseen sentences came out right.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification

from lightseq_fairseq.huggingface import accelerate

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "B-ORG", "I-ORG")
NAMES = "Lincoln Jackson Austin Madison Houston Logan Chelsea Florence Sydney Paris Warren Clark".split()
FIRST = "Anna Ben Carla David Emma Felix".split()
BEHIND = "Inc Group Bank Motors".split()
PATTERNS = (
    "PER met PER in LOC .", "PER works for ORG .", "ORG moved from LOC to LOC last year .",
    "in LOC , PER bought shares of ORG .", "the mayor of LOC thanked PER .", "shares of ORG fell after PER left .",
    "PER , who was born in LOC , now leads ORG .", "yesterday ORG opened an office in LOC .",
    "nobody in LOC had heard of PER .", "PER flew to LOC .")
PAD, UNKNOWN = 0, 1
UNSEEN = 400
Tagged = list[tuple[str, str]]
"""A sentence's words and their tags."""


def name(kind: str, rng: random.Random) -> Tagged:
    """One name of a person, a place or a company, of one or two words."""
    last = rng.choice(NAMES)
    if kind == "PER" and rng.random() < 0.4:
        return [(rng.choice(FIRST), "B-PER"), (last, "I-PER")]
    if kind == "ORG" and rng.random() < 0.4:
        return [(last, "B-ORG"), (rng.choice(BEHIND), "I-ORG")]
    return [(last, f"B-{kind}")]


def sentence(rng: random.Random) -> Tagged:
    """A pattern with its gaps filled."""
    tagged: Tagged = []
    for word in rng.choice(PATTERNS).split():
        tagged += name(word, rng) if word in ("PER", "LOC", "ORG") else [(word, "O")]
    return tagged


def batch_of(sentences: Sequence[Tagged], types: dict[str, int], device: torch.device) -> dict[str, Tensor]:
    """What the model takes: (B, T) int64 each; -100 is the label of padding."""
    width = max(map(len, sentences))
    ids = [[types.get(word, UNKNOWN) for word, _ in each] + [PAD] * (width - len(each)) for each in sentences]
    labels = [[TAGS.index(tag) for _, tag in each] + [-100] * (width - len(each)) for each in sentences]
    tokens = torch.tensor(ids, device=device)
    return {"input_ids": tokens, "attention_mask": tokens.ne(PAD).long(), "labels": torch.tensor(labels, device=device)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune BERT as a tagger of names.")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    start, rng, device = time.perf_counter(), random.Random(1), torch.device(args.device)
    torch.manual_seed(1)

    sentences = [sentence(rng) for _ in range(4000)]
    unseen, seen = sentences[:UNSEEN], sentences[UNSEEN:]
    types = {word: number for number, word in enumerate(
        ["[PAD]", "[UNK]", *sorted({word for each in seen for word, _ in each})])}
    model, report = accelerate(BertForTokenClassification(BertConfig(
        vocab_size=len(types), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, pad_token_id=PAD, num_labels=len(TAGS))))
    print(report)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler(args.device, enabled=args.device == "cuda")
    for step in range(1, args.steps + 1):
        with torch.autocast(args.device, torch.float16, enabled=args.device == "cuda"):
            loss = model(**batch_of(rng.sample(seen, 64), types, device)).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step % 50 == 0 or step == args.steps:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)

    model.eval()
    given = batch_of(unseen, types, device)
    with torch.no_grad():
        found = model(given["input_ids"], attention_mask=given["attention_mask"]).logits.argmax(-1)
    labels = given["labels"]
    named = labels > 0  # neither padding nor O
    commonest = {word: Counter(tag for each in seen for other, tag in each if other == word).most_common(1)[0][0]
                 for word in types if word[0] != "["}
    guesses = [commonest.get(word, "O") == tag for each in unseen for word, tag in each if tag != "O"]
    print(f"accuracy {(found == labels)[named].float().mean():.3f} of {int(named.sum())} tokens of names (always a "
          f"word's commonest tag: {sum(guesses) / len(guesses):.3f}), {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
