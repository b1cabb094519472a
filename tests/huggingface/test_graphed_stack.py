"""A stack whose passes are replayed: outputs and gradients of the layers called one by one.

On the CPU the two passes run without graphs, everything else being the same; --device cuda replays graphs.
"""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch

from lightseq_fairseq.huggingface import accelerate, graphed_stack
from lightseq_fairseq.huggingface.graphed_stack import GraphedStack, rounded
from lightseq_fairseq.huggingface.packed_layer import PackedLayer
from tests.huggingface.models import DROPOUT, batch, gradients, pair
from tests.huggingface.test_accelerate import assert_same_gradients, assert_same_outputs, compute
from tests.tolerances import LAYER

KINDS = ("BertForMaskedLM", "BertForSequenceClassification", "RobertaForTokenClassification",
         "BartForConditionalGeneration", "MBartForConditionalGeneration", "GPT2LMHeadModel")


@pytest.fixture(autouse=True)
def graphs_everywhere(monkeypatch, caplog):
    monkeypatch.setattr(GraphedStack, "devices", ("cpu", "cuda"))
    caplog.set_level(logging.INFO)


def graphs(model) -> list[GraphedStack]:
    """Of each stack of ``model``."""
    stacks = {id(module.stack): module.stack for module in model.modules() if isinstance(module, PackedLayer)}
    return [stack.graphs for stack in stacks.values()]


def sizes(model) -> int:
    return sum(len(stack.passes) for stack in graphs(model))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_hugging_face_s(kind, device):
    stock, ours = pair(kind, device, graphs=True)
    for lengths in ((7, 3, 9, 1), (7, 3, 9, 1), (5, 9, 2, 8), (9, 9), (7, 3, 9, 1)):
        given = batch(kind, device, lengths=lengths)
        theirs, _, their_gradients = compute(stock, given)
        out, _, our_gradients = compute(ours, given)
        assert_same_outputs(out, theirs, given)
        assert_same_gradients(our_gradients, their_gradients)
    assert sizes(ours) == len(graphs(ours)) * 2  # of four sentences and of two


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_layers_called_one_by_one(kind, device, monkeypatch):
    if device.type == "cpu":  # the masks of the references depend on shapes
        monkeypatch.setattr(graphed_stack, "rounded", lambda count: count)
    family = next(family for family in DROPOUT if kind.lower().startswith(family))
    _, ours = pair(kind, device, graphs=True, **DROPOUT[family])
    plain = accelerate(copy.deepcopy(ours), graphs=False)[0]
    given, rounds = batch(kind, device), []
    for model in (ours, plain):
        model.train()
        for seed in (1, 2, 2, 3):
            torch.manual_seed(seed)
            _, loss, grads = compute(model, given)
            rounds.append((loss, copy.deepcopy(grads)))
    for (loss, grads), (plain_loss, plain_grads) in zip(rounds[:4], rounds[4:], strict=True):
        torch.testing.assert_close(loss, plain_loss)
        assert_same_gradients(grads, plain_grads)
    assert sizes(ours) == len(graphs(ours))
    assert not torch.allclose(rounds[2][0], rounds[3][0])
    ours.eval()
    plain.eval()
    torch.testing.assert_close(compute(ours, given)[1], compute(plain, given)[1])


def test_gradients_add_up_over_batches(device):
    stock, ours = pair("BertForMaskedLM", device, graphs=True)
    compute(ours, batch("BertForMaskedLM", device))
    for model in (stock, ours):
        model.zero_grad()
        for lengths in ((7, 3, 9), (4, 4, 9), (2, 8, 8)):
            model(**batch("BertForMaskedLM", device, lengths=lengths)).loss.backward()
    assert sizes(ours) == 1
    assert_same_gradients(gradients(ours), gradients(stock))


def test_a_second_forward_pass_before_backward_leaves_the_first_alone(device, caplog):
    stock, ours = pair("BertForMaskedLM", device, graphs=True)
    given, other = batch("BertForMaskedLM", device), batch("BertForMaskedLM", device, lengths=(2, 9, 9, 4))
    compute(ours, given)
    for model in (stock, ours):
        model.zero_grad()
        (model(**given).loss + 2 * model(**other).loss).backward()
    assert "an earlier forward pass still awaits its backward pass" in caplog.text
    assert_same_gradients(gradients(ours), gradients(stock))


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BartForConditionalGeneration"])
def test_a_forward_pass_without_backward_is_forgotten(kind, device, caplog):
    _, ours = pair(kind, device, graphs=True)
    given = batch(kind, device)
    gc.disable()
    try:
        for _ in range(3):
            ours(**given)
    finally:
        gc.enable()
    assert "still awaits" not in caplog.text
    assert sizes(ours) == len(graphs(ours))


def test_a_second_backward_pass_is_refused(device):
    _, ours = pair("BertForMaskedLM", device, graphs=True)
    given = batch("BertForMaskedLM", device)
    compute(ours, given)
    loss = ours(**given).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"accelerate\(model, graphs=False\)"):
        loss.backward()


def test_parameters_that_move_or_freeze_are_seen(device):
    stock, ours = pair("BertForMaskedLM", device, graphs=True)
    given = batch("BertForMaskedLM", device)

    def check():
        for model in (stock, ours):
            compute(model, given)
        assert_same_gradients(gradients(ours), gradients(stock))

    check(), check()
    first = graphs(ours)[0].addresses
    for model in (stock, ours):
        weight = model.bert.encoder.layer[1].intermediate.dense.weight
        weight.data = weight.data * 2
    check(), check()
    assert graphs(ours)[0].addresses != first
    for model in (stock, ours):
        norm = model.bert.encoder.layer[1].output.LayerNorm
        norm.weight = torch.nn.Parameter(norm.weight.data)  # another parameter, the same memory
    check(), check()
    for model in (stock, ours):
        model.bert.encoder.layer[0].requires_grad_(False)
        model.bert.embeddings.requires_grad_(False)
    check(), check()
    assert all(parameter.grad is None for parameter in ours.bert.encoder.layer[0].parameters())
    for model in (stock, ours):
        with torch.no_grad():
            model.bert.encoder.layer[2].output.dense.bias.add_(1)  # in place: graphs read it
    check()
    for model in (stock, ours):
        model.bert.requires_grad_(False)
    out = ours(**given)
    torch.testing.assert_close(out.loss, stock(**given).loss)


def test_a_map_that_two_layers_share(device):
    stock, ours = pair("BertForMaskedLM", device, graphs=True)
    for model in (stock, ours):
        model.bert.encoder.layer[2].intermediate.dense.weight = model.bert.encoder.layer[0].intermediate.dense.weight
    given = batch("BertForMaskedLM", device)
    for _ in range(2):
        compute(stock, given), compute(ours, given)
        assert_same_gradients(gradients(ours), gradients(stock))
    assert sizes(ours) == 1


def test_a_hook_on_a_parameter_runs_once(device):
    stock, ours = pair("BertForMaskedLM", device, graphs=True)
    given = batch("BertForMaskedLM", device)
    for model in (stock, ours):
        model.bert.encoder.layer[1].output.dense.weight.register_hook(lambda grad: 3 * grad)
    for _ in range(2):
        compute(stock, given), compute(ours, given)
        assert_same_gradients(gradients(ours), gradients(stock))
    assert sizes(ours) == 1


def test_an_output_of_an_earlier_step_may_live_on(device):
    stock, ours = pair("BertForMaskedLM", device, graphs=True)
    kept = []
    for lengths in ((7, 3, 9), (2, 9, 9), (9, 9, 9)):
        given = batch("BertForMaskedLM", device, lengths=lengths)
        kept.append(compute(ours, given))
        assert_same_gradients(kept[-1][2], compute(stock, given)[2])
    assert sizes(ours) == 1
    again = [ours(**batch("BertForMaskedLM", device, lengths=(7, 3, 9))).logits, kept[0][0].logits]
    torch.testing.assert_close(*again)


def test_copies_have_graphs_of_their_own(device):
    _, ours = pair("BertForMaskedLM", device, graphs=True)
    given = batch("BertForMaskedLM", device)
    for _ in range(2):
        expected = compute(ours, given)
    copied = copy.deepcopy(ours)
    assert (sizes(ours), sizes(copied)) == (1, 0)
    with torch.no_grad():
        ours.bert.encoder.layer[0].output.dense.weight.zero_()
    for _ in range(2):
        _, loss, grads = compute(copied, given)
        torch.testing.assert_close(loss, expected[1])
    assert sizes(copied) == 1
    assert grads["bert.encoder.layer.0.output.dense.weight"].any()


def test_optimizer_steps_follow_hugging_face_s(device):
    stock, ours = pair("GPT2LMHeadModel", device, graphs=True)
    losses = []
    for model in (stock, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for step in range(8):
            given = batch("GPT2LMHeadModel", device, lengths=(3 + step % 3, 9, 5))
            out = model(**given, use_cache=False)
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses[-1].append(out.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    assert losses[1][-1] < losses[1][0]
    assert sizes(ours) == 1


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BartForConditionalGeneration"])
def test_autocast(kind, device):
    """Casts that autocast keeps from one use to the next are not those of a graph."""
    _, ours = pair(kind, device, graphs=True)
    plain, given = accelerate(copy.deepcopy(ours), graphs=False)[0], batch(kind, device)
    for _ in range(3):
        results = []
        for model in (ours, plain):
            with torch.autocast(device.type, torch.bfloat16):
                results.append(compute(model, given))
        torch.testing.assert_close(results[0][0].logits, results[1][0].logits, rtol=2e-2, atol=2e-2)
        for name, grad in results[1][2].items():
            if grad is not None:
                assert results[0][2][name].dtype == torch.float32
                error = (results[0][2][name] - grad).norm()
                assert error <= 2e-2 * grad.norm() + 1e-4, name
    assert sizes(ours) == len(graphs(ours))
    exact = compute(ours, given)[1]  # without autocast, after it
    torch.testing.assert_close(exact, compute(plain, given)[1])


def test_keys_and_values_come_out_of_a_graph(device):
    stock, ours = pair("GPT2LMHeadModel", device, graphs=True)
    given = batch("GPT2LMHeadModel", device, "left")
    compute(ours, given)
    assert sizes(ours) == 0
    caches = [compute(model, given)[0].past_key_values for model in (stock, ours)]
    assert sizes(ours) == 1
    real = given["attention_mask"][:, None, :, None]
    for theirs, filled in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(filled, name) * real, getattr(theirs, name) * real, **LAYER)
    cache = ours(**given).past_key_values
    with pytest.raises(RuntimeError, match="gradients through past_key_values"):
        cache.layers[1].keys.sum().backward()


def test_checkpointing_runs_layer_by_layer(device):
    _, ours = pair("GPT2LMHeadModel", device, graphs=True)
    given = batch("GPT2LMHeadModel", device)
    ours.train().gradient_checkpointing_enable()
    for _ in range(3):
        compute(ours, given)
    assert sizes(ours) == 0


@pytest.mark.parametrize("without_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation(kind, without_grad, device):
    """Whose graphs stand beside those of training, in one memory."""
    stock, ours = pair(kind, device, graphs=True)
    given = batch(kind, device)
    for _ in range(3):
        with without_grad():
            theirs, out = stock(**given, use_cache=False), ours(**given, use_cache=False)
        assert_same_outputs(out, theirs, given)
        compute(stock, given), compute(ours, given)
        assert_same_gradients(gradients(ours), gradients(stock))
    assert sizes(ours) == 2 * len(graphs(ours))


def test_evaluation_between_the_passes_of_training(device):
    stock, ours = pair("BertForMaskedLM", device, graphs=True)
    given, other = batch("BertForMaskedLM", device), batch("BertForMaskedLM", device, lengths=(2, 9, 9, 4))
    for model in (stock, ours):
        for _ in range(3):
            model.zero_grad()
            loss = model(**given).loss
            with torch.no_grad():
                model(**other)
            loss.backward()
    assert_same_gradients(gradients(ours), gradients(stock))


def test_sizes():
    assert [rounded(count) for count in (1, 64, 65, 500, 513, 1024, 1025, 4000)] == [
        64, 64, 128, 512, 576, 1024, 1152, 4096]
