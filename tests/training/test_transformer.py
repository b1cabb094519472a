"""LSTransformer against a model put together of torch's layers, step by step, trained, exported and generating."""

from __future__ import annotations

import functools
import math

import h5py
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightseq_fairseq.export import (
    ExportError,
    export_fs_weights,
    export_ls_config,
    export_ls_decoder,
    export_ls_embedding,
    export_ls_encoder,
    from_ls_transformer,
)
from lightseq_fairseq.generator import GenerationOptions, Generator
from lightseq_fairseq.inference import Transformer
from lightseq_fairseq.model_file import load, save
from lightseq_fairseq.model_file.protobuf import message_class
from lightseq_fairseq.training import LSAdam, LSCrossEntropyLayer, LSTransformer
from tests import tolerances
from tests.training import oracles
from tests.training.test_layers import (
    DECODER_NAMES,
    ENCODER_ORDER,
    keys_values_apart,
    same_weights,
)

EXACT = tolerances.OP[torch.float64]
V, PAD, START, END, C = 29, 1, 5, 2, oracles.SIZES["hidden_size"]


def build(pre=True, activation="relu", **changes):
    return LSTransformer(LSTransformer.get_config(
        vocab_size=V, padding_idx=PAD, num_encoder_layer=2, num_decoder_layer=3,
        **oracles.values(pre, activation, **changes)))


def batch(dtype=torch.int64):
    source = torch.tensor([[7, 8, 9, 10, END], [PAD, PAD, 11, 6, END], [12, END, PAD, PAD, PAD]], dtype=dtype)
    target = torch.tensor([[START, 20, 21, 22], [START, 23, PAD, PAD], [START, 24, 25, PAD]], dtype=dtype)
    return source, target


class Torchs(nn.Module):
    """The definition: sqrt(C) * embedding + sinusoids from 0, torch's layers, norms behind pre-LN stacks."""

    def __init__(self, ours, pre, activation):
        super().__init__()
        config = ours.config
        self.embeddings = nn.ParameterList(stack.embed_tokens.embeddings.detach().clone()
                                           for stack in (ours.encoder, ours.decoder))
        self.encoder = nn.ModuleList(oracles.torch_layer(nn.TransformerEncoderLayer, pre, activation)
                                     for _ in range(config.num_encoder_layer))
        self.decoder = nn.ModuleList(oracles.torch_layer(nn.TransformerDecoderLayer, pre, activation)
                                     for _ in range(config.num_decoder_layer))
        for theirs, layer in zip(self.encoder, ours.encoder.layers, strict=True):
            same_weights(layer, ENCODER_ORDER, *oracles.lightseq_lists(theirs))
        for theirs, layer in zip(self.decoder, ours.decoder.layers, strict=True):
            same_weights(layer, DECODER_NAMES, *keys_values_apart(*oracles.lightseq_lists(theirs)))
        self.pre = pre

    def embed(self, tokens, index):
        real = tokens.ne(PAD)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        exponents = torch.arange(C // 2, dtype=torch.float64) * (-math.log(10000) / (C // 2 - 1))
        angles = positions[..., None] * exponents.exp()
        x = F.embedding(tokens, self.embeddings[index], PAD) * C**0.5 + torch.cat((angles.sin(), angles.cos()), -1)
        return x * real[..., None]

    def norm(self, x):
        return F.layer_norm(x, (C,)) if self.pre else x

    def forward(self, source, target):
        mask = source.eq(PAD)
        x = self.embed(source, 0)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=mask)
        x, y = self.norm(x), self.embed(target, 1)
        causal = nn.Transformer.generate_square_subsequent_mask(target.size(1), dtype=torch.float64)
        for layer in self.decoder:
            y = layer(y, x, tgt_mask=causal, memory_key_padding_mask=mask)
        return self.norm(y) @ self.embeddings[1].t()


@pytest.mark.parametrize("pre, activation", oracles.KINDS)
def test_model_is_torchs(pre, activation):
    ours = build(pre, activation).double()
    theirs = Torchs(ours, pre, activation)
    source, target = batch()
    real = target.ne(PAD)
    out = theirs(source, target), ours(source, target)
    tolerance = dict(rtol=1e-6, atol=1e-6)  # the table of sinusoids is made in fp32
    torch.testing.assert_close(out[1][real], out[0][real], **tolerance)
    dout = torch.randn_like(out[0])[real]
    for logits in out:
        (logits[real] * dout).sum().backward()
    for index, stack in enumerate((ours.encoder, ours.decoder)):
        torch.testing.assert_close(stack.embed_tokens.embeddings.grad, theirs.embeddings[index].grad,
                                   rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours.encoder.layers, theirs.encoder, strict=True):
        for name, (dweight, _) in zip(ENCODER_ORDER, zip(*oracles.gradients(other), strict=True), strict=True):
            torch.testing.assert_close(mine.get_submodule(name).weight.grad, dweight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole_prefix", [False, True], ids=["newest token", "whole prefix"])
def test_steps_give_what_the_whole_gives(whole_prefix, device):
    model, (source, target) = build().eval().to(device), (tokens.to(device) for tokens in batch())
    target[target == PAD] = 6
    cache, steps = {}, []
    encoder_out, mask = model.encoder(source)
    for step in range(target.size(1)):
        new = target[:, :step + 1] if whole_prefix else target[:, step:step + 1]
        steps.append(model.decoder(new, encoder_out, mask, cache))
    torch.testing.assert_close(torch.cat(steps, 1), model(source, target), **tolerances.LAYER)
    with pytest.raises(ValueError, match="the newest token or more than the 4 of the cache, got 3"):
        model.decoder(target[:, :3], encoder_out, mask, cache)


def test_a_prefix_at_once_and_hypotheses_of_a_sentence():
    model, (source, _) = build().eval(), batch()
    encoder_out, mask = model.encoder(source)
    target = torch.randint(6, V, (6, 5))  # two hypotheses a sentence
    cache = {}
    first = model.decoder(target[:, :3], encoder_out, mask, cache)
    rest = model.decoder(target, encoder_out, mask, cache)
    whole = model(source.repeat_interleave(2, 0), target)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, **tolerances.LAYER)


@functools.cache
def trained(device="cpu", updates=30, **changes):
    """A model that learns to repeat the source, and its losses."""
    torch.manual_seed(3)
    model = build(**changes).to(device)
    loss_layer = LSCrossEntropyLayer(LSCrossEntropyLayer.get_config(padding_idx=PAD, epsilon=0.1))
    optimizer = LSAdam(model.parameters(), lr=6e-3, betas=(0.9, 0.98))
    losses = []
    for _ in range(updates):
        words = torch.randint(6, V, (24, 7))
        lengths = torch.randint(1, 7, (24,))
        words[torch.arange(24), lengths] = END
        words[torch.arange(7) > lengths[:, None]] = PAD
        words = words.to(device)
        previous = torch.cat((words.new_full((24, 1), START), words[:, :-1].masked_fill(words[:, :-1] == END, PAD)), 1)
        loss, _ = loss_layer(model(words, previous), words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(scale=float(words.ne(PAD).sum()))
        losses.append(float(loss.detach()) / int(words.ne(PAD).sum()))
    return model.eval(), losses


@pytest.mark.parametrize("changes", [{}, dict(pre=False), dict(fp16=True),
                                     dict(hidden_dropout_ratio=0.1, attn_prob_dropout_ratio=0.1)],
                         ids=["pre-LN", "post-LN", "fp16", "dropout"])
def test_it_learns(changes, device):
    _, losses = trained(device, **changes)
    assert losses[0] > 3 and losses[-1] < 0.85 * losses[0]


def greedy(model, source, steps=8):
    """By the model's own forward and its cache."""
    encoder_out, mask = model.encoder(source)
    tokens, cache = torch.full((source.size(0), 1), START), {}
    for _ in range(steps):
        logits = model.decoder(tokens[:, -1:], encoder_out, mask, cache)
        logits[..., PAD] = -math.inf  # as fairseq's search
        tokens = torch.cat((tokens, logits.argmax(-1)), 1)
    return [row[:row.index(END) + 1] if END in row else row for row in tokens[:, 1:].tolist()]


def export_as_scripts_do(model, file, save_pb):
    config, state = model.config, model.state_dict()
    sides = [{name: tensor for name, tensor in state.items() if name.startswith(side)}
             for side in ("encoder.", "decoder.")]
    for side, is_encoder in zip(sides, (True, False), strict=True):
        export_ls_embedding(file, side, config.max_seq_len, C, is_encoder, save_pb=save_pb)
    export_ls_encoder(file, sides[0], C, config.intermediate_size, save_pb=save_pb)
    export_ls_decoder(file, sides[1], C, config.intermediate_size, config.num_decoder_layer, save_pb=save_pb)
    export_fs_weights(file, state, save_pb=save_pb)
    export_ls_config(file, config.nhead, PAD, START, END, config.num_encoder_layer, config.num_decoder_layer,
                     use_gelu=config.activation_fn == "gelu", beam_size=1, extra_decode_length=50, save_pb=save_pb)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("suffix", [".pb", ".hdf5"])
def test_exported_by_lightseqs_functions_it_generates_the_same(suffix, activation, tmp_path, device):
    model, _ = trained(activation=activation, updates=120)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pb":
        message = message_class("Transformer")()
        export_as_scripts_do(model, message, True)
        path.write_bytes(message.SerializeToString())
    else:
        with h5py.File(path, "w") as file:
            export_as_scripts_do(model, file, False)
    source = torch.randint(6, V, (9, 6))
    found, _ = Transformer(path, 4, device, max_len_b=8, min_len=0).infer(source.tolist())
    own = greedy(model, source)
    assert len(set(map(tuple, own))) > 6
    for row, expected in zip(found[:, 0].tolist(), own, strict=True):
        assert row[:len(expected)] == expected


@pytest.mark.parametrize("pre, activation", oracles.KINDS)
@pytest.mark.parametrize("suffix", [".pb", ".hdf5"])
def test_any_model_is_exported_by_ours(pre, activation, suffix, tmp_path, device):
    model, _ = trained(pre=pre, activation=activation, updates=120)
    path = tmp_path / f"model{suffix}"
    save(from_ls_transformer(model.state_dict(), model.config, START, END), path)
    source = torch.randint(6, V, (9, 6))
    generator = Generator([load(path)], device)
    found = generator.infer(source.tolist(), GenerationOptions(beam=1, max_len_b=8, min_len=0))
    for hypotheses, expected in zip(found, greedy(model, source), strict=True):
        assert hypotheses[0].tokens.tolist()[:len(expected)] == expected


def test_what_cannot_be_exported_is_named(tmp_path):
    model = build(pre=False)
    with pytest.raises(ExportError, match="norm behind each stack"):
        export_fs_weights(message_class("Transformer")(), model.state_dict())
    state = model.state_dict()
    del state["encoder.layers.0.fc1.bias"]
    with pytest.raises(ExportError, match="encoder.layers.0.fc1.bias is missing"):
        from_ls_transformer(state, model.config, START, END)
    with pytest.raises(ValueError, match="tokens must be int64, got torch.int32"):
        model(*batch(torch.int32))


def test_the_functions_are_where_lightseq_has_them():
    from lightseq_fairseq import training

    assert training.export_ls_config is export_ls_config and training.export_fs_weights is export_fs_weights
    with pytest.raises(AttributeError, match="no attribute 'export_everything'"):
        _ = training.export_everything
