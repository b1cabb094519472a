#!/usr/bin/env python3
"""Train a small translation model from the layers alone, without fairseq, export it and translate with it.

    python scripts/examples/train_from_layers.py [--updates 200] [--output model.pb] [--device cuda]

The task is made on the spot: numbers in English words and in German ones, which turn tens and units round ("forty two"
is "zwei und vierzig"). Training takes some seconds on a CPU; the last line says how many unseen numbers came out right.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightseq_fairseq.export import from_ls_transformer
from lightseq_fairseq.inference import GenerationOptions, Generator
from lightseq_fairseq.model_file import save
from lightseq_fairseq.training import LSAdam, LSCrossEntropyLayer, LSTransformer

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNK = range(4)
HELD_OUT = 50
ENGLISH = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
           "eighteen nineteen").split()
GERMAN = ("eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
          "achtzehn neunzehn").split()
TENS = dict(zip(range(2, 10), zip(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(),
    "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split(), strict=True), strict=True))
Pair = tuple[list[int], list[int]]


def in_words(number: int) -> tuple[list[str], list[str]]:
    """1 to 999999 in English and in German words."""
    for size, english, german in ((1000, "thousand", "tausend"), (100, "hundred", "hundert")):
        if number >= size:
            (many, viele), (rest, übrige) = in_words(number // size), in_words(number % size)
            viele = [*viele[:-1], "ein"] if viele[-1] == "eins" else viele
            return [*many, english, *rest], [*viele, german, *übrige]
    if number < 20:
        return ([ENGLISH[number - 1]], [GERMAN[number - 1]]) if number else ([], [])
    (ten, zehner), unit = TENS[number // 10], number % 10
    if unit == 0:
        return [ten], [zehner]
    return [ten, ENGLISH[unit - 1]], ["ein" if unit == 1 else GERMAN[unit - 1], "und", zehner]


def vocabulary(pairs: Sequence[tuple[list[str], list[str]]]) -> tuple[str, ...]:
    """One for both languages, special symbols first."""
    return (*SPECIAL, *sorted({word for pair in pairs for side in pair for word in side}))


def padded(sentences: Sequence[list[int]]) -> Tensor:
    """(B, T) int64, PAD behind the shorter ones."""
    width = max(map(len, sentences))
    return torch.tensor([[*sentence, *[PAD] * (width - len(sentence))] for sentence in sentences])


def batches(pairs: list[Pair], size: int, updates: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Source, previous target tokens and target, drawn at random."""
    rng = random.Random(1)
    for _ in range(updates):
        sources, targets = zip(*rng.sample(pairs, size), strict=True)
        yield (padded([[*source, EOS] for source in sources]), padded([[BOS, *target] for target in targets]),
               padded([[*target, EOS] for target in targets]))


def train(model: LSTransformer, pairs: list[Pair], updates: int, device: torch.device) -> None:
    """Adam with a learning rate that rises and falls; a line of progress now and then."""
    criterion = LSCrossEntropyLayer(LSCrossEntropyLayer.get_config(padding_idx=PAD, epsilon=0.1))
    optimizer = LSAdam(model.parameters(), betas=(0.9, 0.98), max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=updates + 1)
    for update, (source, previous, target) in enumerate(batches(pairs, 128, updates), 1):
        loss, nll = criterion(model(source.to(device), previous.to(device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        tokens = int(target.ne(PAD).sum())
        optimizer.step(scale=tokens)  # of the sum over tokens the mean
        schedule.step()
        if update % 50 == 0 or update == updates:
            print(f"update {update:4}  loss {float(loss.detach()) / tokens:.3f}  nll {float(nll) / tokens:.3f}",
                  flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train from layers, export, translate.")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--output", type=Path, help="where the model file goes, .pb or .hdf5 (default: not kept)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.manual_seed(1)
    start, device = time.perf_counter(), torch.device(args.device)

    pairs = [in_words(number) for number in random.Random(1).sample(range(1, 1_000_000), 5000)]
    symbols = vocabulary(pairs)
    index = {symbol: number for number, symbol in enumerate(symbols)}
    ids = [([index[word] for word in english], [index[word] for word in german]) for english, german in pairs]
    config = LSTransformer.get_config(
        model="transformer-base", hidden_size=64, intermediate_size=128, nhead=4, num_encoder_layer=2,
        num_decoder_layer=2, vocab_size=len(symbols), padding_idx=PAD, max_seq_len=32,
        fp16=args.device == "cuda", local_rank=0 if args.device == "cuda" else -1)
    model = LSTransformer(config)
    print(f"{len(pairs) - HELD_OUT} pairs, {len(symbols)} types, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, ids[:-HELD_OUT], args.updates, device)

    with tempfile.TemporaryDirectory() as folder:
        path = args.output or Path(folder) / "model.pb"
        exported = from_ls_transformer(model.state_dict(), config, start_id=BOS, end_id=EOS, unk_id=UNK)
        save(replace(exported, src_symbols=symbols, tgt_symbols=symbols, source_lang="en", target_lang="de"), path)
        generator = Generator.load(path)
        unseen = [(" ".join(english), " ".join(german)) for english, german in pairs[-HELD_OUT:]]
        translations = generator.translate([english for english, _ in unseen], GenerationOptions(beam=4))
    for (english, _), translation in list(zip(unseen, translations, strict=True))[:4]:
        print(f"  {english}\n    {translation}")
    right = sum(german == translation for (_, german), translation in zip(unseen, translations, strict=True))
    print(f"{right} of {HELD_OUT} unseen numbers right, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
