"""Hugging Face's Trainer and accelerate's loop around a replaced model: the curves and checkpoints of their own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from lightseq_fairseq.huggingface import accelerate
from lightseq_fairseq.huggingface.graphed_stack import GraphedStack
from lightseq_fairseq.huggingface.packed_layer import PackedLayer
from tests.huggingface.models import VOCAB, pair


@pytest.fixture(autouse=True)
def allowed_types():
    """Trainer, having read a checkpoint, takes back the types that it allowed, and with them what others had allowed:
    tests that read fairseq's checkpoints in the same process failed after it."""
    allowed = torch.serialization.get_safe_globals()
    yield
    torch.serialization.add_safe_globals(allowed)


@pytest.fixture(autouse=True, params=[False, True], ids=["one by one", "graphs"])
def with_graphs(request, monkeypatch):
    monkeypatch.setattr(GraphedStack, "devices", ("cpu", "cuda") if request.param else ())
    return request.param


def rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(4, VOCAB, (length,), generator=generator).tolist(), "labels": length % 2}
            for length in lengths]


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(example["input_ids"]) for example in examples)
    ids = torch.tensor([example["input_ids"] + [0] * (width - len(example["input_ids"])) for example in examples])
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(),
            "labels": torch.tensor([example["labels"] for example in examples])}


def trainer_of(model, folder, device, **options) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=10, learning_rate=1e-3, logging_steps=1, seed=1,
        report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu", gradient_accumulation_steps=2,
        **{"save_strategy": "no"} | options)
    return transformers.Trainer(model, arguments, train_dataset=rows(96), data_collator=collate)


def losses(trainer: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_trainer_s_curve_and_checkpoints(kind, device, tmp_path, with_graphs):
    stock, ours = pair(kind, device, graphs=True)
    trainers = [trainer_of(model, tmp_path / name, device, save_strategy="steps", save_steps=5)
                for name, model in (("stock", stock), ("ours", ours))]
    for trainer in trainers:
        trainer.train()
    expected = losses(trainers[0])
    assert losses(trainers[1]) == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert len(set(expected)) > 5
    (stack,) = {id(module.stack): module.stack for module in ours.modules() if isinstance(module, PackedLayer)}.values()
    assert bool(stack.graphs.passes) == with_graphs
    loaded = getattr(transformers, kind).from_pretrained(tmp_path / "ours" / "checkpoint-10").state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(loaded[name], value.cpu()), name
    resumed = trainer_of(accelerate(copy.deepcopy(stock))[0], tmp_path / "again", device)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-5"))
    assert losses(resumed)[5:] == pytest.approx(losses(trainers[1])[5:], rel=1e-4)


def test_accelerate_s_loop(device):
    AcceleratorState._reset_state(reset_partial_state=True)  # one of a process, of the precision of its first user
    curves = []
    for model in pair("BertForSequenceClassification", device, graphs=True):
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16", gradient_accumulation_steps=2)
        model, optimizer, loader = accelerator.prepare(
            model.train(), torch.optim.AdamW(model.parameters(), lr=1e-3),
            DataLoader(rows(64), batch_size=4, collate_fn=collate))
        curves.append([])
        for given in loader:
            with accelerator.accumulate(model):
                loss = model(**given).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            curves[-1].append(loss.item())
    assert curves[1] == pytest.approx(curves[0], rel=3e-2)
    assert len(curves[0]) == 16
    AcceleratorState._reset_state(reset_partial_state=True)
