"""accelerate(model): Hugging Face's own layers are the oracle, padded slots are nobody's."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle

import pytest
import torch
import transformers
from torch import nn

from lightseq_fairseq.huggingface import accelerate, restore
from lightseq_fairseq.huggingface import packed_stack as stacks
from tests.huggingface.models import DROPOUT, batch, gradients, pair
from tests.tolerances import GRADIENT, LAYER, OP

KINDS = ("BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification",
         "BertForQuestionAnswering", "RobertaForMaskedLM", "RobertaForSequenceClassification",
         "RobertaForTokenClassification", "BartModel", "BartForConditionalGeneration", "BartForSequenceClassification",
         "GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification",
         "XLMRobertaForTokenClassification", "CamembertForMaskedLM", "MBartForConditionalGeneration", "MarianMTModel",
         "M2M100ForConditionalGeneration")
LAYERS = {**dict.fromkeys(("Bert", "Robe", "XLMR", "Came", "GPT2"), 3),
          **dict.fromkeys(("Bart", "MBar", "Mari", "M2M1"), 2 + 2 * 2)}
"""Attentions of one forward pass."""


@pytest.fixture
def attentions(monkeypatch):
    """A list that grows with every call of our attention operator."""
    calls, attention_op = [], importlib.import_module("lightseq_fairseq.ops.attention")
    inner = attention_op._attention

    def counted(*args):
        calls.append(args)
        return inner(*args)

    monkeypatch.setattr(attention_op, "_attention", counted)
    return calls


@pytest.fixture(autouse=True)
def lines(caplog):
    """What was said, also if it had been said before."""
    stacks.say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def compute(model, given):
    """The outputs of ``model`` and, backwards from their loss or their sum over real tokens, its gradients."""
    model.zero_grad()
    out = model(**given)
    loss = out.loss if "loss" in out else (out[0] * real_slots(out[0], given)).square().mean()
    loss.backward()
    return out, loss, gradients(model)


def real_slots(hidden, given):
    if hidden.shape[:2] != given["attention_mask"].shape:
        return torch.ones_like(hidden[..., :1])
    return given["attention_mask"][..., None].to(hidden.dtype)


def assert_same_outputs(ours, theirs, given):
    for name, expected in theirs.items():
        if isinstance(expected, torch.Tensor) and name != "loss":
            shown = ours[name]
            if expected.dim() > 2 or "logits" in name and expected.shape == given["attention_mask"].shape:
                real = real_slots(expected, given) if expected.dim() > 2 else given["attention_mask"]
                shown, expected = shown * real, expected * real
            torch.testing.assert_close(shown, expected, **LAYER, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            torch.testing.assert_close(ours[name], expected, **GRADIENT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_hugging_face_s(kind, attention, device, attentions):
    stock, ours = pair(kind, device, attention)
    given = batch(kind, device)
    if kind.endswith("QuestionAnswering"):  # their softmax runs over padding too: what stands there must count nothing
        given = batch(kind, device, lengths=(9, 9, 9, 9))
    theirs, their_loss, their_gradients = compute(stock, given)
    assert attentions == []
    out, loss, our_gradients = compute(ours, given)
    assert len(attentions) == LAYERS[kind[:4]]
    torch.testing.assert_close(loss, their_loss, **LAYER)
    assert_same_outputs(out, theirs, given)
    assert_same_gradients(our_gradients, their_gradients)


@pytest.mark.parametrize("side", ["left", "right", "none", "no mask"])
@pytest.mark.parametrize("kind", ["BertForTokenClassification", "RobertaModel", "GPT2LMHeadModel", "BartModel",
                                  "MBartModel"])
def test_padding_on_either_side(kind, side, device, attentions):
    stock, ours = pair(kind, device)
    lengths = (7, 3, 9, 1) if side in ("left", "right") else (6, 6, 6)
    given = batch(kind, device, side if side == "left" else "right", lengths)
    mask = given["attention_mask"]
    if side == "no mask":
        del given["attention_mask"]
    theirs, out = stock(**given), ours(**given)
    assert {part.size(0) for call in attentions for part in call[0]} <= {int(mask.sum()), mask.numel()}
    assert attentions[0][0][0].size(0) == int(mask.sum())
    theirs = {name: value for name, value in theirs.items() if name != "pooler_output"}  # of a slot of padding
    assert_same_outputs(out, theirs, {"attention_mask": mask})


def test_holes_in_the_mask_are_padding_too(device):
    stock, ours = pair("GPT2LMHeadModel", device)
    given = batch("GPT2LMHeadModel", device, lengths=(9, 9))
    given["attention_mask"] = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0, 1, 1]], device=device)
    del given["labels"]
    assert_same_outputs(ours(**given), stock(**given), given)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2", "silu",
                                        "tanh", "linear"])
def test_activations(activation, device):
    stock, ours = pair("BertModel", device, hidden_act=activation)
    given = batch("BertModel", device)
    assert_same_outputs(compute(ours, given)[0], compute(stock, given)[0], given)
    assert_same_gradients(gradients(ours), gradients(stock))


@pytest.mark.parametrize("kind", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_a_decoder_of_bert_sees_no_later_token(kind, device, attentions):
    stock, ours = pair(kind, device, is_decoder=True)
    given = batch(kind, device)
    theirs, _, their_gradients = compute(stock, given)
    out, _, our_gradients = compute(ours, given)
    assert len(attentions) == 3
    assert all(call[5] for call in attentions)  # causal
    assert_same_outputs(out, theirs, given)
    assert_same_gradients(our_gradients, their_gradients)


@pytest.mark.parametrize("options", [dict(scale_attn_weights=False), dict(scale_attn_by_inverse_layer_idx=True),
                                     dict(reorder_and_upcast_attn=True)], ids=lambda options: next(iter(options)))
def test_scales_of_gpt2(options, device):
    stock, ours = pair("GPT2LMHeadModel", device, **options)
    given = batch("GPT2LMHeadModel", device)
    assert_same_outputs(compute(ours, given)[0], compute(stock, given)[0], given)
    assert_same_gradients(gradients(ours), gradients(stock))


def test_embeddings_and_positions_of_the_caller(device):
    stock, ours = pair("RobertaModel", device)
    given = batch("RobertaModel", device)
    ids = given.pop("input_ids")
    given |= {"inputs_embeds": stock.get_input_embeddings()(ids).detach().flip(0),
              "position_ids": torch.arange(ids.size(1), device=device).expand_as(ids) * 2}
    assert_same_outputs(ours(**given), stock(**given), given)


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_torch_s_generator_s(name, device):
    _, ours = pair("BertModel", device, **{name: 0.3})
    given = batch("BertModel", device, lengths=(9, 9))
    quiet = ours(**given)[0]
    ours.train()
    ours.embeddings.dropout.p = 0.0  # Hugging Face's own
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(ours(**given)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])
    assert not torch.allclose(draws[0], quiet)
    assert torch.equal(ours.eval()(**given)[0], quiet)


def test_dropped_share_is_the_probability(device):
    """A layer whose maps are 0 but for the last bias, 1, hands on 0 or 1 / (1 - p) of it."""
    _, ours = pair("GPT2Model", device, resid_pdrop=0.25, n_layer=1)
    block = ours.h[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.mlp.c_proj.bias.fill_(1)
    ours.train()
    x = torch.zeros(40, 30, 48, device=device)
    y = block(x)
    assert sorted(y.unique().tolist()) == pytest.approx([0, 1 / 0.75], abs=1e-4)
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_dropouts_switched_by_themselves(device, attentions, lines):
    """As for samples of a model's uncertainty: in evaluation, but for the dropouts."""
    stock, ours = pair("BertModel", device, **DROPOUT["bert"])
    given, results = batch("BertModel", device), []
    for model in (stock, ours):
        for module in model.modules():
            module.train(isinstance(module, nn.Dropout))
        torch.manual_seed(2)
        results.append(model(**given)[0])
    assert torch.equal(*results)
    assert attentions == []
    assert "Dropout is in training by itself" in lines.text


def test_dropouts_that_come_to_differ_are_refused(device):
    _, ours = pair("GPT2Model", device)
    ours.train().h[1].mlp.dropout.p = 0.3
    with pytest.raises(ValueError, match="two dropout probabilities, 0.0 behind attention and 0.3 at the end"):
        ours(**batch("GPT2Model", device))


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BartForConditionalGeneration", "GPT2LMHeadModel",
                                  "MBartForConditionalGeneration"])
def test_hidden_states_between_the_layers(kind, device, attentions):
    stock, ours = pair(kind, device)
    given = batch(kind, device)
    plain = ours(**given)
    theirs, out = stock(**given, output_hidden_states=True), ours(**given, output_hidden_states=True)
    assert len(attentions) == 2 * LAYERS[kind[:4]]
    for name in [name for name in theirs if name.endswith("hidden_states")]:
        assert len(out[name]) == len(theirs[name])
        for shown, expected in zip(out[name], theirs[name], strict=True):
            real = real_slots(expected, given)
            torch.testing.assert_close(shown * real, expected * real, **LAYER)
    between = sum(call[0][0].size(0) for call in attentions)
    again = ours(**given)
    torch.testing.assert_close(again.logits, plain.logits)
    assert sum(call[0][0].size(0) for call in attentions) - between == between // 2


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BartForConditionalGeneration", "GPT2LMHeadModel",
                                  "MBartForConditionalGeneration"])
def test_attention_weights_are_hugging_face_s_own(kind, device, attentions, lines):
    stock, ours = pair(kind, device, "eager")
    given = batch(kind, device)
    theirs, out = stock(**given, output_attentions=True), ours(**given, output_attentions=True)
    assert attentions == []
    assert "output_attentions" in lines.text
    for name in [name for name in theirs if name.endswith("attentions")]:
        for shown, expected in zip(out[name], theirs[name], strict=True):
            assert torch.equal(shown, expected)
    ours(**given)
    assert len(attentions) == LAYERS[kind[:4]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["BertModel", "GPT2Model"])
def test_other_masks_than_padding_go_to_hugging_face_s_layers(kind, attention, device, attentions, lines):
    stock, ours = pair(kind, device, attention)
    given = batch(kind, device, lengths=(5, 5))
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().to(device).expand(2, 1, 5, 5)
    given["attention_mask"] = (1 - blocks) * torch.finfo(torch.float).min if attention == "eager" else blocks.bool()
    assert torch.equal(ours(**given)[0], stock(**given)[0])
    assert attentions == []
    assert lines.text.count("more than padding is masked") == 1
    bias = torch.randn(2, 1, 5, 5, device=device)
    given["attention_mask"] = bias
    assert torch.equal(ours(**given)[0], stock(**given)[0])


@pytest.mark.parametrize("kind", ["BertModel", "BartModel", "GPT2Model"])
def test_sentences_without_tokens(kind, device, lines):
    stock, ours = pair(kind, device)
    given = batch(kind, device, lengths=(5, 5))
    given["attention_mask"][0] = 0
    out = ours(**given)[0]
    out.sum().backward()
    assert out.isfinite().all()
    alone = {name: tensor[1:] for name, tensor in given.items()}
    torch.testing.assert_close(ours(**alone)[0], out[1:], **LAYER)
    assert not lines.text
    given["attention_mask"][1] = 0
    torch.testing.assert_close(ours(**given)[0], stock(**given)[0], equal_nan=True)
    assert "a batch without a single token" in lines.text


def test_a_mask_of_four_dimensions_that_is_padding_runs_here(device, attentions):
    stock, ours = pair("BertModel", device)
    given = batch("BertModel", device)
    given["attention_mask"] = given["attention_mask"][:, None, None].bool().expand(-1, -1, 9, -1).contiguous()
    ours(**given)
    assert len(attentions) == 3


def test_somebody_s_attention_is_used(device, attentions, lines):
    calls = []

    def flat(module, query, key, value, attention_mask, **kwargs):
        calls.append(query.shape)
        return value.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("flat", flat)
    stock, ours = pair("BertModel", device, "flat")
    given = batch("BertModel", device)
    assert torch.equal(ours(**given)[0], stock(**given)[0])
    assert len(calls) == 6 and attentions == []
    assert "attn_implementation 'flat'" in lines.text


def test_sentences_told_apart_by_position_go_to_hugging_face_s_layers(device, attentions):
    stock, ours = pair("GPT2LMHeadModel", device)
    given = {"input_ids": torch.arange(5, 13, device=device)[None], "use_cache": False,
             "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=device)}
    assert torch.equal(ours(**given).logits, stock(**given).logits)
    assert attentions == []


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3), dict(do_sample=True, top_k=7)],
                         ids=["greedy", "beam", "sampling"])
@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BartForConditionalGeneration", "BertLMHeadModel",
                                  "M2M100ForConditionalGeneration", "MarianMTModel"])
def test_generate(kind, options, device, attentions):
    stock, ours = pair(kind, device, **(dict(is_decoder=True) if kind.startswith("Bert") else {}))
    given = batch(kind, device, side="left" if "LMHead" in kind else "right")
    given = {name: given[name] for name in ("input_ids", "attention_mask")}
    ids = []
    for model in (stock, ours):
        torch.manual_seed(3)
        ids.append(model.generate(**given, max_new_tokens=8, min_new_tokens=4, **options))
    assert torch.equal(*ids)
    assert attentions  # the prompt


def test_a_first_call_fills_the_cache(device, attentions):
    stock, ours = pair("GPT2LMHeadModel", device)
    given = batch("GPT2LMHeadModel", device, "left")
    caches = [model(given["input_ids"], attention_mask=given["attention_mask"], use_cache=True).past_key_values
              for model in (stock, ours)]
    assert len(attentions) == 3
    real = given["attention_mask"][:, None, :, None]
    for theirs, filled in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(filled, name) * real, getattr(theirs, name) * real, **LAYER)


def test_names_values_and_ties_of_parameters_stay(device, tmp_path):
    stock, _ = pair("GPT2LMHeadModel", device)
    parameters, state = dict(stock.named_parameters()), stock.state_dict()
    ours, report = accelerate(stock)
    assert ours is stock
    assert report.layers == 3
    assert str(report) == "transformer.h: 3 GPT2Block"
    assert {name: id(parameter) for name, parameter in ours.named_parameters()} == {
        name: id(parameter) for name, parameter in parameters.items()}
    assert list(ours.state_dict()) == list(state)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    ours.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).to(device)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in state.items())
    assert type(loaded.transformer.h[0]) is transformers.models.gpt2.modeling_gpt2.GPT2Block


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BartForConditionalGeneration", "GPT2LMHeadModel"])
def test_restore(kind, device, attentions):
    stock, ours = pair(kind, device)
    given = batch(kind, device)
    ours(**given)
    count = len(attentions)
    assert restore(ours) is ours
    assert [type(module) for module in ours.modules()] == [type(module) for module in stock.modules()]
    assert torch.equal(ours(**given).logits, stock(**given).logits)
    assert len(attentions) == count
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in ours.modules())
    accelerate(accelerate(ours, graphs=False)[0], graphs=False)  # a second time is no harm
    ours(**given)
    assert len(attentions) == 2 * count


def test_copies_and_pickles_stand_alone(device, attentions):
    _, ours = pair("BertForMaskedLM", device)
    given = batch("BertForMaskedLM", device)
    expected = ours(**given).logits
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        before = len(attentions)
        assert torch.equal(copied(**given).logits, expected)
        assert len(attentions) == before + 3
        with torch.no_grad():
            copied.bert.encoder.layer[1].output.dense.weight.zero_()
        assert not torch.allclose(copied(**given).logits, expected)
    assert torch.equal(ours(**given).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BartForConditionalGeneration", "GPT2LMHeadModel"])
def test_gradient_checkpointing(kind, reentrant, device, attentions):
    """The same gradients, dropout included, and twice the work."""
    _, ours = pair(kind, device, **DROPOUT[kind[:4].lower()])
    ours.train()
    given = batch(kind, device)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
            ours.enable_input_require_grads() if reentrant else None
        torch.manual_seed(4)
        results.append(compute(ours, given)[1:])
    assert len(attentions) == 3 * LAYERS[kind[:4]]
    torch.testing.assert_close(results[1][0], results[0][0])
    assert_same_gradients(results[1][1], results[0][1])


def test_layerdrop_skips_any_layer(device, attentions):
    stock, ours = pair("BartForConditionalGeneration", device, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    given = batch("BartForConditionalGeneration", device)
    for seed in range(6):
        results = []
        for model in (stock.train(), ours.train()):
            torch.manual_seed(seed)
            results.append(compute(model, given)[1:])
        torch.testing.assert_close(results[1][0], results[0][0], **LAYER)
        assert_same_gradients(results[1][1], results[0][1])
    assert 0 < len(attentions) < 6 * LAYERS["Bart"]


def test_a_hook_on_a_layer_sees_padded_states(device, attentions):
    stock, ours = pair("BertModel", device)
    given = batch("BertModel", device)
    seen = []
    for model in (stock, ours):
        model.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        model(**given)
    assert len(attentions) == 3
    for shown, expected in zip(*reversed(seen), strict=True):
        real = real_slots(expected, given)
        torch.testing.assert_close(shown * real, expected * real, **LAYER)


def test_a_layer_by_itself_takes_and_gives_padded_states(device, attentions):
    stock, ours = pair("BertModel", device)
    x = torch.randn(2, 5, 48, device=device)
    torch.testing.assert_close(ours.encoder.layer[1](x), stock.encoder.layer[1](x), **LAYER)
    assert len(attentions) == 1


def test_what_comes_inside_a_layer_later_is_not_passed_over(device, attentions, lines):
    """An adapter in the place of a map, or a hook on it, has its effect."""
    stock, ours = pair("BertModel", device)
    given = batch("BertModel", device)
    for model in (stock, ours):
        model.encoder.layer[0].attention.self.query.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(ours(**given)[0], stock(**given)[0])
    assert "somebody hooks into Linear" in lines.text
    for model in (stock, ours):
        model.encoder.layer[0].attention.self.query = nn.Sequential(model.encoder.layer[0].attention.self.query)
    assert torch.equal(ours(**given)[0], stock(**given)[0])
    assert "accelerate again" in lines.text
    assert attentions == []


def test_torch_compile_takes_hugging_face_s_layers(device, attentions):
    stock, ours = pair("BertModel", device, num_hidden_layers=2)
    given = batch("BertModel", device)
    compiled = torch.compile(ours, backend="eager")
    assert_same_outputs(compiled(**given), stock(**given), given)
    assert attentions == []
    ours(**given)
    assert len(attentions) == 2


def test_a_forward_given_to_a_layer_is_called(device, attentions, lines):
    stock, ours = pair("BertModel", device)
    given, called = batch("BertModel", device), []
    layer = ours.encoder.layer[1]
    inner = layer.forward

    def moving(*args, **kwargs):
        called.append(len(args))
        return inner(*args, **kwargs)

    layer.forward = moving
    assert torch.equal(ours(**given)[0], stock(**given)[0])
    assert len(called) == 1 and attentions == []
    assert "a forward of its own" in lines.text


def test_fewer_layers_later(device, attentions):
    stock, ours = pair("BertModel", device)
    given = batch("BertModel", device)
    for model in (stock, ours):
        model.encoder.layer = model.encoder.layer[:2]
    assert_same_outputs(ours(**given), stock(**given), given)
    assert len(attentions) == 2


def test_an_error_inside_leaves_no_trace(device, attentions):
    _, ours = pair("BertModel", device)
    given = batch("BertModel", device)
    expected = ours(**given)[0]
    handle = ours.encoder.layer[2].output.dense.bias.data
    ours.encoder.layer[2].output.dense.bias.data = handle[:5]
    with pytest.raises((RuntimeError, ValueError)):
        ours(**given)
    ours.encoder.layer[2].output.dense.bias.data = handle
    assert torch.equal(ours(**given)[0], expected)


@pytest.mark.parametrize(("kind", "options", "words"), [
    ("BertLMHeadModel", dict(is_decoder=True, add_cross_attention=True), "cross-attention"),
    ("BertModel", dict(hidden_act="quick_gelu"), "activation 'quick_gelu'"),
    ("BertModel", dict(position_embedding_type="relative_key"), "position_embedding_type 'relative_key'"),
    ("BertModel", dict(chunk_size_feed_forward=2), "chunk_size_feed_forward 2"),
    ("GPT2Model", dict(add_cross_attention=True), "cross-attention"),
    ("GPT2Model", dict(activation_function="mish"), "activation 'mish'"),
    ("BartModel", dict(activation_function="relu6"), "activation 'relu6'"),
])
def test_what_we_lack_is_refused_by_name(kind, options, words):
    with pytest.raises(ValueError, match="accelerate: .*layer.?.?0: .*|accelerate: .*h.0.*") as error:
        pair(kind, **options)
    assert words in str(error.value)


def test_refusal_changes_nothing():
    stock, _ = pair("BertModel")
    layer = stock.encoder.layer[1]
    layer.attention.self.query = nn.Sequential(layer.attention.self.query)
    layer.output.dropout.p = 0.5
    types = [type(module) for module in stock.modules()]
    with pytest.raises(ValueError, match=r"encoder.layer.1: attention.self.query is a Sequential.*; "
                                         r"encoder.layer.1: two dropout probabilities"):
        accelerate(stock)
    assert [type(module) for module in stock.modules()] == types


def test_pruned_heads_are_refused():
    stock, _ = pair("BertModel")
    inner = stock.encoder.layer[0].attention.self
    inner.num_attention_heads, inner.all_head_size = 3, 36
    with pytest.raises(ValueError, match="pruned heads"):
        accelerate(stock)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="DistilBertModel has no layers of BERT, .XLM-.RoBERTa, .* or GPT-2"):
        accelerate(transformers.DistilBertModel(transformers.DistilBertConfig(dim=48, n_layers=1, n_heads=4,
                                                                              hidden_dim=80, vocab_size=61)))


def sixteen_bit_types(device):
    return [torch.bfloat16] + ([torch.float16] if device.type == "cuda" else [])


@pytest.mark.parametrize("mode", ["autocast", "whole"])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BartForConditionalGeneration", "GPT2LMHeadModel"])
def test_sixteen_bits_are_as_good_as_hugging_face_s(kind, mode, device):
    """Errors of logits and of gradients against fp32, root mean squares."""
    given = batch(kind, device)
    stock, ours = pair(kind, device)
    exact = compute(stock, given)
    for dtype in sixteen_bit_types(device):
        errors = []
        for model in (copy.deepcopy(stock), copy.deepcopy(ours)):
            if mode == "whole":
                model.to(dtype)
            with torch.autocast(device.type, dtype, enabled=mode == "autocast"):
                out, _, grads = compute(model, given)
            real = real_slots(out.logits, given)
            errors.append([((out.logits - exact[0].logits) * real).float().square().mean().sqrt().item(),
                           torch.cat([(grads[name] - value).float().flatten() for name, value in exact[2].items()
                                      if value is not None]).square().mean().sqrt().item()])
        (their_logits, their_gradients), (our_logits, our_gradients) = errors
        assert our_logits <= 2 * their_logits + OP[torch.float32]["atol"]
        assert our_gradients <= 3 * their_gradients + OP[torch.float32]["atol"]
