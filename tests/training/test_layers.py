"""LightSeq's layers against torch's, outputs and gradients, and what a torch module must be able to do."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightseq_fairseq.training import (
    LSCrossEntropyLayer,
    LSTransformerDecoderLayer,
    LSTransformerEmbeddingLayer,
    LSTransformerEncoderLayer,
)
from lightseq_fairseq.training.config import PRESETS
from lightseq_fairseq.training.layers import DECODER_ORDER, ENCODER_ORDER
from tests import tolerances
from tests.training import oracles
from tests.training.oracles import KINDS, values

EXACT = tolerances.OP[torch.float64]
C = oracles.SIZES["hidden_size"]


def same_weights(layer, order, weights, biases):
    """``layer`` in fp64 with exactly these."""
    layer = layer.double()
    with torch.no_grad():
        for name, weight, bias in zip(order, weights, biases, strict=True):
            module = layer.get_submodule(name)
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    return layer


def build_encoder(pre=True, activation="relu", **changes):
    theirs = oracles.torch_layer(nn.TransformerEncoderLayer, pre, activation)
    layer = LSTransformerEncoderLayer(LSTransformerEncoderLayer.get_config(**values(pre, activation, **changes)))
    return theirs, same_weights(layer, ENCODER_ORDER, *oracles.lightseq_lists(theirs))


DECODER_NAMES = (*DECODER_ORDER, "encoder_attn.k_proj", "encoder_attn.v_proj")


def keys_values_apart(weights, biases):
    return tuple([*given[:-1], *given[-1].chunk(2)] for given in (weights, biases))


def build_decoder(pre=True, activation="relu", **changes):
    theirs = oracles.torch_layer(nn.TransformerDecoderLayer, pre, activation)
    layer = LSTransformerDecoderLayer(LSTransformerDecoderLayer.get_config(**values(pre, activation, **changes)))
    return theirs, same_weights(layer, DECODER_NAMES, *keys_values_apart(*oracles.lightseq_lists(theirs)))


def assert_gradients(layer, order, expected):
    for name, dweight, dbias in zip(order, *expected, strict=True):
        module = layer.get_submodule(name)
        torch.testing.assert_close(module.weight.grad, dweight, **EXACT, msg=lambda m, n=name: f"{n}.weight: {m}")
        torch.testing.assert_close(module.bias.grad, dbias, **EXACT, msg=lambda m, n=name: f"{n}.bias: {m}")


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("pre, activation", KINDS)
def test_encoder_layer_is_torchs(pre, activation, left):
    theirs, ours = build_encoder(pre, activation)
    mask = oracles.padded_mask([7, 1, 4], 7, left)
    x = torch.randn(3, 7, C, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out = theirs(inputs[0], src_key_padding_mask=mask), ours(inputs[1], mask.half())
    torch.testing.assert_close(out[1][~mask], out[0][~mask], **EXACT)
    assert not out[1][mask].any()
    dout = torch.randn_like(x)
    for y in out:
        (y * dout)[~mask].sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **EXACT)
    assert_gradients(ours, ENCODER_ORDER, oracles.gradients(theirs))


@pytest.mark.parametrize("pre, activation", KINDS)
def test_decoder_layer_is_torchs(pre, activation):
    theirs, ours = build_decoder(pre, activation)
    mask = oracles.padded_mask([5, 2, 4], 5)
    x, source = (torch.randn(3, length, C, dtype=torch.float64) for length in (6, 5))
    inputs = [(x.clone().requires_grad_(), source.clone().requires_grad_()) for _ in range(2)]
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    out = (theirs(*inputs[0], tgt_mask=causal, memory_key_padding_mask=mask),
           ours(inputs[1][0], inputs[1][1].transpose(0, 1), mask))
    torch.testing.assert_close(*out, **EXACT)
    dout = torch.randn_like(x)
    for y in out:
        (y * dout).sum().backward()
    for mine, other in zip(inputs[1], inputs[0], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **EXACT)
    assert_gradients(ours, DECODER_NAMES, keys_values_apart(*oracles.gradients(theirs)))


@pytest.mark.parametrize("pre, activation", KINDS)
def test_in_fp32_on_the_device(pre, activation, device):
    """Where the operators are those of the device, outputs and gradients still are torch's in fp64."""
    mask, x, source = oracles.padded_mask([7, 1, 4], 7), torch.randn(3, 7, C), torch.randn(3, 5, C)
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    source_mask = oracles.padded_mask([5, 2, 4], 5)
    dout = torch.randn(3, 7, C).masked_fill(mask[..., None], 0)

    def encode(layer, x, source, mask, source_mask):
        return layer(x, mask)

    def decode(layer, x, source, mask, source_mask):
        return layer(x, source.transpose(0, 1), source_mask)

    expected = [lambda layer, x, source: layer(x, src_key_padding_mask=mask),
                lambda layer, x, source: layer(x, source, tgt_mask=causal, memory_key_padding_mask=source_mask)]
    for build, call, reference in zip((build_encoder, build_decoder), (encode, decode), expected, strict=True):
        theirs, ours = build(pre, activation)
        wanted = reference(theirs, x.double(), source.double())
        (wanted * dout).sum().backward()
        ours = ours.float().to(device)
        found = call(ours, *(t.to(device) for t in (x, source, mask, source_mask)))
        (found * dout.to(device)).sum().backward()
        real = ~mask if build is build_encoder else torch.ones_like(mask)
        torch.testing.assert_close(found.cpu()[real].double(), wanted[real], **tolerances.LAYER)
        lists = oracles.gradients(theirs)
        order, lists = (ENCODER_ORDER, lists) if build is build_encoder else (DECODER_NAMES, keys_values_apart(*lists))
        for name, dweight, dbias in zip(order, *lists, strict=True):
            module = ours.get_submodule(name)
            torch.testing.assert_close(module.weight.grad.cpu().double(), dweight, **tolerances.GRADIENT)
            torch.testing.assert_close(module.bias.grad.cpu().double(), dbias, **tolerances.GRADIENT)


def test_layers_take_initial_weights_in_lightseqs_order():
    theirs = oracles.torch_layer(nn.TransformerEncoderLayer, True, "relu", torch.float32)
    config = LSTransformerEncoderLayer.get_config(**values())
    ours = LSTransformerEncoderLayer(config, *oracles.lightseq_lists(theirs))
    x = torch.randn(2, 5, C)
    torch.testing.assert_close(ours(x), theirs(x), **tolerances.LAYER)
    theirs = oracles.torch_layer(nn.TransformerDecoderLayer, False, "relu", torch.float32)
    ours = LSTransformerDecoderLayer(LSTransformerDecoderLayer.get_config(**values(False)),
                                     *oracles.lightseq_lists(theirs))
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(ours(x, x.transpose(0, 1)), theirs(x, x, tgt_mask=causal), **tolerances.LAYER)


def test_joint_keys_and_values_are_taken_apart_or_refused():
    theirs = [oracles.torch_layer(nn.TransformerDecoderLayer, True, "relu", torch.float32) for _ in range(2)]
    lists = [oracles.lightseq_lists(layer) for layer in theirs]
    joint = [torch.cat([given[part][-1] for given in lists]) for part in (0, 1)]
    config = LSTransformerDecoderLayer.get_config(**values(nlayer=2))
    split = [LSTransformerDecoderLayer.split_keys_values(values, 2) for values in joint]
    for index in range(2):
        assert torch.equal(split[0][index], lists[index][0][-1])
        LSTransformerDecoderLayer(config, *([*lists[index][part][:-1], split[part][index]] for part in (0, 1)))
    with pytest.raises(ValueError, match="split_keys_values"):
        LSTransformerDecoderLayer(config, *([*lists[0][part][:-1], joint[part]] for part in (0, 1)))
    with pytest.raises(ValueError, match="split_keys_values"):  # LightSeq's list of a layer behind the first
        LSTransformerDecoderLayer(config, lists[1][0][:-1], lists[1][1][:-1])


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("pre, activation", KINDS)
def test_steps_give_what_the_whole_gives(pre, activation, beam):
    _, layer = build_decoder(pre, activation)
    mask = oracles.padded_mask([5, 2], 5)
    source = torch.randn(5, 2, C, dtype=torch.float64)
    x = torch.randn(2 * beam, 6, C, dtype=torch.float64)
    whole = layer(x, source.repeat_interleave(beam, 1), mask.repeat_interleave(beam, 0))
    cache = {}
    steps = [layer(part, source, mask, cache) for part in x.split([1, 1, 3, 1], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **EXACT)
    assert cache["dec_self_k"].shape == (2 * beam, 3, 6, C // 3)


def test_a_reordered_cache_goes_on_with_other_hypotheses():
    _, layer = build_decoder()
    source = torch.randn(5, 2, C, dtype=torch.float64)
    x, order = torch.randn(4, 3, C, dtype=torch.float64), torch.tensor([1, 1, 2, 2])
    cache = {}
    layer(x[:, :2], source, None, cache)
    for name in ("dec_self_k", "dec_self_v"):
        cache[name] = cache[name].index_select(0, order)
    expected = layer(torch.cat((x[order, :2], x[:, 2:]), 1), source.repeat_interleave(2, 1), None)
    torch.testing.assert_close(layer(x[:, 2:], source, None, cache), expected[:, 2:], **EXACT)


def embedding(**changes):
    config = dict(vocab_size=13, embedding_dim=C, max_seq_len=9, padding_idx=1, dropout=0.0) | changes
    return LSTransformerEmbeddingLayer(LSTransformerEmbeddingLayer.get_config(**config)).double()


def test_embedding_counts_positions_from_the_first_token():
    layer = embedding()
    tokens = torch.tensor([[5, 6, 7, 1], [1, 1, 5, 6]])
    x = layer(tokens)
    torch.testing.assert_close(x[0, :2], x[1, 2:], **EXACT)
    assert not x[0, 3].any() and not x[1, :2].any()
    angle = torch.tensor(1.0)  # position 1, first frequency 1, last 1 / 10000
    expected = layer.embeddings[6] * C**0.5
    for column, value in ((0, angle.sin()), (C // 2, angle.cos()), (C - 1, (angle / 10000).cos())):
        torch.testing.assert_close(x[0, 1, column], expected[column] + value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(tokens[:1, 2:3], step=2), x[:1, 2:3], **EXACT)


@pytest.mark.parametrize("changes", [dict(trainable_pos=True), dict(trainable_pos=True, need_offset=True),
                                     dict(layernorm_embedding=True, trainable_pos=True),
                                     dict(no_scale_embedding=True)], ids=lambda c: "+".join(c))
def test_embedding_options_are_honoured(changes):
    layer = embedding(**changes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tokens = torch.tensor([[5, 6, 7], [8, 5, 1]])
    offset = 2 if changes.get("need_offset") else 0
    positions = layer.pos_embeddings.detach().clone().requires_grad_()
    table = layer.embeddings.detach().clone().requires_grad_()
    expected = F.embedding(tokens, table, padding_idx=1) * (1.0 if "no_scale_embedding" in changes else C**0.5)
    expected = expected + positions[offset:offset + 3]
    if layer.layer_norm is not None:
        expected = F.layer_norm(expected, (C,), layer.layer_norm.weight, layer.layer_norm.bias)
    real = tokens.ne(1)
    x = layer(tokens)
    torch.testing.assert_close(x[real], expected[real], **EXACT)
    dout = torch.randn_like(x)[real]
    (x[real] * dout).sum().backward()
    (expected[real] * dout).sum().backward()
    torch.testing.assert_close(layer.embeddings.grad, table.grad, **EXACT)
    if "trainable_pos" in changes:
        torch.testing.assert_close(layer.pos_embeddings.grad, positions.grad, **EXACT)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_cross_entropy_is_torchs(epsilon):
    config = LSCrossEntropyLayer.get_config(max_batch_tokens=None, padding_idx=1, epsilon=epsilon)
    layer = LSCrossEntropyLayer(config)
    logits = torch.randn(2, 4, 11, dtype=torch.float64)
    targets = torch.tensor([[3, 4, 1, 1], [0, 10, 5, 2]])
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    loss, nll = layer(inputs[0], targets)
    plain = F.cross_entropy(inputs[1].flatten(0, 1), targets.flatten(), ignore_index=1, reduction="sum")
    # torch spreads epsilon over all V types, LightSeq over the V - 1 others
    expected = F.cross_entropy(inputs[1].flatten(0, 1), targets.flatten(), ignore_index=1, reduction="sum",
                               label_smoothing=epsilon * 11 / 10)
    torch.testing.assert_close((loss, nll), (expected, plain), **EXACT)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **EXACT)


def dropping(**changes):
    return values(attn_prob_dropout_ratio=0.3, activation_dropout_ratio=0.2, hidden_dropout_ratio=0.25, **changes)


def decoder_call(layer, x):
    return layer(x, x.transpose(0, 1), None)


@pytest.mark.parametrize("kind, call", [(LSTransformerEncoderLayer, lambda layer, x: layer(x)),
                                        (LSTransformerDecoderLayer, decoder_call)], ids=["encoder", "decoder"])
class TestAsAnyTorchModule:
    def build(self, kind, device, **changes):
        return kind(kind.get_config(**dropping(**changes))).to(device)

    def test_two_instances_and_two_forwards_before_a_backward(self, kind, call, device):
        first, second = (self.build(kind, device).eval() for _ in range(2))
        second.load_state_dict(first.state_dict())
        x, y = (torch.randn(2, 5, C, device=device) for _ in range(2))
        (call(first, x).sum() + call(first, y).square().sum()).backward()
        call(second, x).sum().backward()
        call(second, y).square().sum().backward()
        for mine, other in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, **tolerances.GRADIENT)

    def test_checkpointing_repeats_the_dropout(self, kind, call, device):
        layer, x = self.build(kind, device), torch.randn(2, 5, C, device=device)
        grads = []
        for run in (lambda: call(layer, x), lambda: checkpoint(call, layer, x, use_reentrant=False)):
            torch.manual_seed(7)
            layer.zero_grad()
            run().square().sum().backward()
            grads.append([parameter.grad.clone() for parameter in layer.parameters()])
        assert all(map(torch.equal, *grads)) or device.type == "cuda"
        torch.testing.assert_close(grads[1], grads[0], **tolerances.GRADIENT)

    def test_dropout_is_drawn_in_training_alone(self, kind, call, device):
        layer, x = self.build(kind, device), torch.randn(2, 5, C, device=device)
        assert not torch.equal(call(layer, x), call(layer, x))
        assert torch.equal(call(layer.eval(), x), call(layer, x))

    def test_state_survives_saving_and_copying(self, kind, call, device):
        layer, x = self.build(kind, device).eval(), torch.randn(2, 5, C, device=device)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = self.build(kind, device).eval()
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(call(other, x), call(layer, x))
        assert torch.equal(call(copy.deepcopy(layer), x), call(layer, x))

    @pytest.mark.parametrize("way", ["fp16 of fp32 parameters", "fp16", "bf16", "autocast"])
    def test_sixteen_bits(self, kind, call, way, device):
        # not relu: a hidden unit that rounding moves across 0 changes gradients by more than rounding does
        exact = self.build(kind, device, activation="gelu").eval()
        layer = self.build(kind, device, activation="gelu", fp16=way.startswith("fp16 of")).eval()
        layer.load_state_dict(exact.state_dict())
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(way, torch.float32)
        layer.to(dtype)
        x = torch.randn(2, 5, C, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=way == "autocast"):
            y = call(layer, x.to(dtype))
        assert y.dtype == dtype
        tolerance = dict(rtol=0.05, atol=0.05) if way in ("bf16", "autocast") else dict(rtol=0.01, atol=0.01)
        torch.testing.assert_close(y.float(), call(exact, x), **tolerance)
        assert not torch.equal(y.float(), call(exact, x))  # or nothing was computed in 16 bits
        y.float().square().sum().backward()
        call(exact, x).square().sum().backward()
        whole = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()]).norm()
        for mine, other in zip(layer.parameters(), exact.parameters(), strict=True):
            assert mine.grad.dtype == dtype
            # some are nothing but rounding: keys' biases have none, as softmax heeds differences only
            difference = (mine.grad.float() - other.grad).norm() / (other.grad.norm() + 0.1 * whole)
            assert difference < (0.05 if way in ("bf16", "autocast") else 0.01)


def test_presets_are_lightseqs():
    config = LSTransformerEncoderLayer.get_config(model="bert-big", max_batch_tokens=8, max_seq_len=9, fp16=True,
                                                  local_rank=-1)
    assert (config.hidden_size, config.intermediate_size, config.nhead) == (1024, 4096, 16)
    assert (config.pre_layer_norm, config.activation_fn, config.attn_prob_dropout_ratio) == (False, "gelu", 0.1)
    config = LSTransformerDecoderLayer.get_config(model="transformer-base", max_seq_len=9, nhead=4)
    assert (config.hidden_size, config.nhead, config.attn_prob_dropout_ratio) == (512, 4, 0.0)
    assert set(PRESETS) == {"transformer-base", "transformer-big", "bert-base", "bert-big"}


def encoder(**changes):
    return LSTransformerEncoderLayer(LSTransformerEncoderLayer.get_config(**values(**changes)))


@pytest.mark.parametrize("call, error, message", [
    (lambda: encoder(nhead=5), ValueError, "hidden_size must be a multiple of nhead, got 24 and 5"),
    (lambda: encoder(activation="tanh"), ValueError, "activation_fn must be one of relu, gelu, got 'tanh'"),
    (lambda: encoder(hidden_dropout_ratio=1.5), ValueError, r"hidden_dropout_ratio must lie in \[0, 1\], got 1.5"),
    (lambda: encoder(head=3), TypeError, "head"),
    (lambda: LSTransformerEncoderLayer.get_config(max_seq_len=3), TypeError, "hidden_size"),
    (lambda: LSTransformerEncoderLayer.get_config(model="gpt"), ValueError, "model must be one of transformer-base"),
    (lambda: encoder()(torch.zeros(1, 18, C)), ValueError, "sequence length 18 exceeds max_seq_len=17"),
    (lambda: encoder(max_batch_tokens=9)(torch.zeros(2, 5, C)), ValueError, r"2 \* 5 tokens exceed max_batch_tokens=9"),
    (lambda: encoder()(torch.zeros(2, 5, C + 1)), ValueError, "states must be 24 wide"),
    (lambda: encoder()(torch.zeros(2, 5, C), torch.zeros(2, 4)), ValueError,
     r"encoder_padding_mask: must have shape \(2, 5\), got \(2, 4\)"),
    (lambda: LSTransformerEncoderLayer(LSTransformerEncoderLayer.get_config(**values()), [torch.zeros(1)] * 9, None),
     ValueError, "initial_weights must be those of self_attn.q_proj.*got 9"),
    (lambda: LSTransformerEncoderLayer(LSTransformerEncoderLayer.get_config(**values()), [torch.zeros(1)] * 8, None),
     ValueError, r"self_attn.q_proj.weight must have shape \(24, 24\), got \(1,\)"),
    (lambda: embedding(need_offset=True), ValueError, "need_offset is for trainable_pos"),
    (lambda: embedding()(torch.zeros(1, 3, dtype=torch.long), step=8), ValueError, "position 10 lies behind max_seq"),
    (lambda: embedding(padding_idx=13), ValueError, "padding_idx must lie in the vocabulary of 13 types, got 13"),
    (lambda: build_decoder()[1](torch.zeros(3, 1, C), torch.zeros(4, 2, C), None, {}), ValueError,
     "3 rows do not fit the 2 sentences"),
], ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_errors_name_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="local_rank=0 names a GPU.*local_rank=-1"):
        encoder(local_rank=0)


def test_batches_beyond_the_training_limit_are_generated():
    layer = encoder(max_batch_tokens=9).eval()
    assert layer(torch.zeros(2, 5, C)).shape == (2, 5, C)
