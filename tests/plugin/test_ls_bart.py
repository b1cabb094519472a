"""ls_bart is fairseq's bart: same start, outputs, gradients, heads and checkpoints; whole steps train it."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from fairseq.trainer import Trainer

from lightseq_fairseq.export import from_checkpoints
from lightseq_fairseq.generator import GenerationOptions, Generator
from lightseq_fairseq.plugin.ls_trainer import LSTrainer
from tests import tolerances
from tests.conftest import build_model, scramble
from tests.plugin.test_ls_trainer import Run, assert_same_curve

SMALL = ["--share-all-embeddings", "--encoder-layers", "2", "--decoder-layers", "2", "--encoder-embed-dim", "24",
         "--decoder-embed-dim", "24", "--encoder-ffn-embed-dim", "40", "--decoder-ffn-embed-dim", "40",
         "--encoder-attention-heads", "4", "--decoder-attention-heads", "4", "--dropout", "0",
         "--max-source-positions", "60", "--max-target-positions", "60"]
ARCHITECTURES = ["bart_base", "bart_large", "mbart_base", "mbart_large", "mbart_base_wmt20"]


def pair(data, arch, *flags):
    """Stock, ours of the same seed, and a padded batch of unequal sentences."""
    models = []
    for name in (arch, f"ls_{arch}"):
        torch.manual_seed(3)
        task, model = build_model(data, "--arch", name, *SMALL, *flags)
        models.append(model)
    task.load_dataset("train")
    dataset = task.dataset("train")
    return task, *models, dataset.collater([dataset[i] for i in (3, 50, 7, 120, 33)])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_seed_gives_one_model(joined_data_bin, arch):
    _, stock, ours, _ = pair(joined_data_bin, arch)
    expected, actual = stock.state_dict(), ours.state_dict()
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_gradients_are_fairseqs(joined_data_bin, arch, packed):
    _, stock, ours, batch = pair(joined_data_bin, arch)
    scramble(stock)
    ours.load_state_dict(stock.state_dict())
    real = batch["target"].ne(1)
    outputs = []
    for model in (stock, ours):
        logits = model.train()(**batch["net_input"], **({"packed_output": True} if packed and model is ours else {}))[0]
        logits = logits if logits.dim() == 2 else logits[real]
        probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
        (logits * probe).sum().backward()
        outputs.append(logits)
    torch.testing.assert_close(outputs[1], outputs[0], **tolerances.LAYER)
    for (name, expected), actual in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, **tolerances.GRADIENT, msg=lambda m, n=name: f"{n}: {m}")


def test_classification_heads(joined_data_bin):
    _, stock, ours, _ = pair(joined_data_bin, "bart_base")
    for model in (stock, ours):
        torch.manual_seed(1)
        model.eval().register_classification_head("topic", num_classes=3)
    ours.load_state_dict(stock.state_dict())
    tokens = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])  # both sides read the same, padded on the right
    expected, actual = (model(tokens, torch.tensor([5, 3]), tokens, classification_head_name="topic")[0]
                        for model in (stock, ours))
    assert actual.shape == (2, 3)
    torch.testing.assert_close(actual, expected, **tolerances.LAYER)


def test_a_mask_at_the_end_of_a_pretrained_vocabulary_is_cut_off(joined_data_bin):
    _, stock, ours, batch = pair(joined_data_bin, "bart_base")
    state = stock.state_dict()
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        state[name] = torch.cat((state[name], torch.full_like(state[name][:1], 9)))
    ours.load_state_dict(state)
    expected, actual = (model.eval()(**batch["net_input"])[0] for model in (stock, ours))
    torch.testing.assert_close(actual[batch["target"].ne(1)], expected[batch["target"].ne(1)], **tolerances.LAYER)


class BartRun(Run):
    recipe = [*Run.recipe, *SMALL]


def fine_tune(name, data, tmp_path, monkeypatch, device):
    trainer, prefix = {"stock": (Trainer, ""), "ours": (LSTrainer, "ls_")}[name]
    return BartRun(data, tmp_path / name, monkeypatch, device, trainer, "--arch", prefix + "bart_base", "--criterion",
                   prefix + "label_smoothed_cross_entropy", "--optimizer", prefix + "adam")


def test_fine_tuning_by_whole_steps_is_fairseqs(joined_data_bin, tmp_path, monkeypatch, device):
    stock, ours = (fine_tune(name, joined_data_bin, tmp_path, monkeypatch, device) for name in ("stock", "ours"))
    assert ours.trainer._step is not None, ours.trainer.obstacle
    assert_same_curve(ours, stock)


@pytest.mark.parametrize("name", ["stock", "ours"])
def test_what_was_fine_tuned_translates_as_in_fairseq(name, joined_data_bin, tmp_path, monkeypatch, device):
    fine_tune(name, joined_data_bin, tmp_path, monkeypatch, device)
    task, model, _, _ = pair(joined_data_bin, "bart_base")
    model.eval().load_state_dict(torch.load(tmp_path / name / "checkpoint_last.pt", map_location="cpu")["model"])
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    sample = dataset.collater([dataset[i] for i in range(6)])
    theirs = task.build_generator([model], Namespace(beam=4, max_len_b=20)).generate([model], sample)
    generator = Generator([from_checkpoints([tmp_path / name / "checkpoint_last.pt"], joined_data_bin)], "cpu")
    sentences = [row[row != 1] for row in sample["net_input"]["src_tokens"]]
    found = generator.generate(sentences, GenerationOptions(beam=4, max_len_b=20))
    for ours, expected in zip(found, theirs, strict=True):
        assert ours[0].tokens.tolist() == expected[0]["tokens"].tolist()
        torch.testing.assert_close(ours[0].positional_scores, expected[0]["positional_scores"], rtol=1e-4, atol=1e-4)
