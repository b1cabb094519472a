"""The blocks of ops/functional.py against the same written out in fp64, whole and step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq.ops import functional
from lightseq_fairseq.ops.functional import (
    KeyValueCache,
    MemoryCache,
    cross_multi_head_attention,
    ffn,
    layernorm,
    masked_multi_head_attention,
    multi_head_attention,
)
from tests import tolerances

FORMS = [(pre, residual) for pre in (True, False) for residual in (True, False)]
FORM_NAMES = ["pre-LN", "pre-LN, no residual", "post-LN", "plain"]
HEADS_AND_SIZES = [(2, 8), (3, 5), (1, 13)]
PADDING = torch.tensor([0, 3, 1, 6])


@pytest.fixture
def one_kernel_a_step(monkeypatch):
    """Decoding steps as on CUDA, by the operator that writes the cache itself; its reference, on the CPU."""
    monkeypatch.setattr(functional, "_is_one_step", lambda input, dim: input.size(1) == 1 and dim % 8 == 0)


def randn(*size, dtype=torch.float64, device="cpu"):
    return torch.randn(*size, dtype=torch.float64).to(device, dtype)


def weights(hidden, inner, joint, source=None, **options):
    """weight and bias of one input projection of ``joint * inner`` rows, of the output, of the norm."""
    return [randn(joint * inner, source or hidden, **options) * 0.3, randn(joint * inner, **options),
            randn(hidden, inner, **options) * 0.3, randn(hidden, **options), 1 + 0.2 * randn(hidden, **options),
            randn(hidden, **options)]


def attend(q, k, v, heads, seen):
    """(B, T, E) over (B, S, E) where ``seen`` (B, 1, T, S), 0 where nothing is."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(2, 3) * q.size(-1) ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2).flatten(2)


def around(x, f, gain, shift, pre, residual):
    norm = lambda y: F.layer_norm(y, (x.size(-1),), gain, shift)  # noqa: E731
    y = f(norm(x) if pre else x)
    y = x + y if residual else y
    return norm(y) if residual and not pre else y


def self_attention(x, real, w, heads, pre, residual, causal):
    """The definition; ``real`` (B, T)."""
    columns = torch.arange(x.size(1))
    seen = (real[:, None, :] & ((columns <= columns[:, None]) if causal else True))[:, None]

    def f(y):
        q, k, v = F.linear(y, w[0], w[1]).chunk(3, -1)
        return F.linear(attend(q, k, v, heads, seen), w[2], w[3])

    return around(x, f, w[4], w[5], pre, residual) * real[..., None]


def left_padded(width=7):
    return torch.arange(width) >= PADDING[:, None]


def assert_gradients(out, expected, leaves):
    dout = torch.randn_like(expected)
    found = torch.autograd.grad((out * dout).sum(), leaves)
    wanted = torch.autograd.grad((expected * dout).sum(), leaves)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerances.OP[torch.float64])


@pytest.mark.parametrize("heads, dim", HEADS_AND_SIZES)
@pytest.mark.parametrize("pre, residual", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(heads, dim, pre, residual, causal):
    hidden, inner = 12, heads * dim
    x, w = randn(4, 7, hidden).requires_grad_(), [p.requires_grad_() for p in weights(hidden, inner, 3)]
    real = left_padded()
    options = dict(num_heads=heads, pre_layernorm=pre, add_residual=residual)
    if causal:
        out = masked_multi_head_attention(x, *w, pre_padding_len=PADDING, **options)
    else:
        out = multi_head_attention(x, *w, padding_mask=(~real).float(), **options)
        again = multi_head_attention(x, *w, pre_padding_len=PADDING, **options)
        assert torch.equal(again, out)
    expected = self_attention(x, real, w, heads, pre, residual, causal)
    torch.testing.assert_close(out, expected, **tolerances.OP[torch.float64])
    used = [x, *w] if pre or residual else [x, *w[:4]]
    assert_gradients(out, expected, used)


@pytest.mark.parametrize("heads, dim", HEADS_AND_SIZES)
@pytest.mark.parametrize("pre, residual", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("ragged", [False, True])
def test_steps_give_what_the_whole_gives(heads, dim, pre, residual, ragged, device):
    hidden = 12
    options = dict(dtype=torch.float32, device=device)
    x, w = randn(4, 11, hidden, **options), weights(hidden, heads * dim, 3, **options)
    padding = PADDING.to(device) if ragged else None
    settings = dict(num_heads=heads, pre_layernorm=pre, add_residual=residual)
    whole = masked_multi_head_attention(x, *w, pre_padding_len=padding, **settings)
    cache = KeyValueCache(4, heads, dim, 11, device=device)
    parts = x.split([7, 1, 2, 1], 1)
    steps = [masked_multi_head_attention(parts[0], *w, pre_padding_len=padding, cache=cache, **settings)]
    steps += [masked_multi_head_attention(part, *w, cache=cache, **settings) for part in parts[1:]]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **tolerances.LAYER)
    assert cache.columns == 11
    with pytest.raises(ValueError, match="the cache has room for 11 columns, got 11 and 1 more"):
        masked_multi_head_attention(parts[1], *w, cache=cache, **settings)


def test_steps_by_one_kernel(one_kernel_a_step):
    test_steps_give_what_the_whole_gives(2, 8, True, True, True, torch.device("cpu"))
    test_rows_part_leave_and_are_permuted(torch.device("cpu"))


def test_rows_part_leave_and_are_permuted(device):
    options = dict(dtype=torch.float32, device=device)
    hidden, heads = 16, 2
    x, w = randn(4, 6, hidden, **options), weights(hidden, hidden, 3, **options)
    settings = dict(num_heads=heads, pre_layernorm=True)
    padding = torch.tensor([0, 3, 1, 2], device=device)
    cache = KeyValueCache(4, heads, 8, 6, device=device)
    masked_multi_head_attention(x[:, :4], *w, pre_padding_len=padding, cache=cache, **settings)
    first, second = torch.tensor([2, 2, 0], device=device), torch.tensor([1, 0], device=device)
    after = masked_multi_head_attention(x[:3, 4:5], *w, cache=cache, reorder_state=first, **settings)
    last = masked_multi_head_attention(x[2:4, 5:], *w, cache=cache, reorder_state=second, **settings)
    history = torch.cat((x[first, :4], x[:3, 4:5]), 1)
    expected = masked_multi_head_attention(history, *w, pre_padding_len=padding[first], **settings)
    torch.testing.assert_close(after, expected[:, 4:], **tolerances.LAYER)
    history = torch.cat((history[second], x[2:4, 5:]), 1)
    expected = masked_multi_head_attention(history, *w, pre_padding_len=padding[first][second], **settings)
    torch.testing.assert_close(last, expected[:, 5:], **tolerances.LAYER)


@pytest.mark.parametrize("heads, dim", HEADS_AND_SIZES)
@pytest.mark.parametrize("pre, residual", FORMS, ids=FORM_NAMES)
def test_cross_attention(heads, dim, pre, residual):
    hidden, source, inner = 12, 10, heads * dim
    x, memory = randn(4, 3, hidden).requires_grad_(), randn(4, 7, source).requires_grad_()
    q_weight, q_bias, *rest = (p.requires_grad_() for p in weights(hidden, inner, 1))
    kv_weight, kv_bias = (randn(2 * inner, source) * 0.3).requires_grad_(), randn(2 * inner).requires_grad_()
    w = [q_weight, q_bias, kv_weight, kv_bias, *rest]
    lengths = torch.tensor([7, 2, 5, 0])
    column = torch.arange(7)
    real = (column >= PADDING[:, None]) & (column < PADDING[:, None] + lengths[:, None])
    out = cross_multi_head_attention(x, memory, *w, num_heads=heads, pre_padding_len=PADDING, length_per_sample=lengths,
                                     pre_layernorm=pre, add_residual=residual)

    def f(y):
        k, v = F.linear(memory, kv_weight, kv_bias).chunk(2, -1)
        return F.linear(attend(F.linear(y, q_weight, q_bias), k, v, heads, real[:, None, None]), rest[0], rest[1])

    expected = around(x, f, rest[2], rest[3], pre, residual)
    torch.testing.assert_close(out, expected, **tolerances.OP[torch.float64])
    assert_gradients(out, expected, [x, memory, *(w if pre or residual else w[:6])])


def test_cross_attention_of_hypotheses_over_a_cached_memory(device):
    options = dict(dtype=torch.float32, device=device)
    x, memory = randn(6, 2, 12, **options), randn(2, 5, 12, **options)
    q_weight, q_bias, *rest = weights(12, 12, 1, **options)
    kv = [randn(24, 12, **options), randn(24, **options)]
    settings = dict(num_heads=3, length_per_sample=torch.tensor([5, 3], device=device))
    cache = MemoryCache()
    first = cross_multi_head_attention(x[:, :1], memory, q_weight, q_bias, *kv, *rest, cache=cache, **settings)
    second = cross_multi_head_attention(x[:, 1:], None, q_weight, q_bias, *kv, *rest, cache=cache, num_heads=3)
    settings["length_per_sample"] = settings["length_per_sample"].repeat_interleave(3)
    expected = cross_multi_head_attention(x, memory.repeat_interleave(3, 0), q_weight, q_bias, *kv, *rest, **settings)
    torch.testing.assert_close(torch.cat((first, second), 1), expected, **tolerances.LAYER)


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
               "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("pre, residual", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("biases", [True, False])
def test_ffn(name, pre, residual, biases):
    x, w = randn(3, 5, 12).requires_grad_(), [p.requires_grad_() for p in weights(12, 19, 1)]
    if not biases:
        w[1] = w[3] = None
    out = ffn(x, *w, activation_fn=name, pre_layernorm=pre, add_residual=residual)
    expected = around(x, lambda y: F.linear(ACTIVATIONS[name](F.linear(y, w[0], w[1])), w[2], w[3]), w[4], w[5], pre,
                      residual)
    torch.testing.assert_close(out, expected, **tolerances.OP[torch.float64])
    assert_gradients(out, expected, [x, *(p for p in (w if pre or residual else w[:4]) if p is not None)])


def test_embedding_sums_what_it_is_given():
    ids = torch.tensor([[1, 1, 5, 6], [7, 8, 9, 5]])
    weight, positions, types, gain, shift = (randn(*size).requires_grad_() for size in ((11, 6), (9, 6), (2, 6), (6,),
                                                                                       (6,)))
    kinds = torch.tensor([[0, 0, 1, 1]])
    out = functional.embedding(ids, weight, positions, types, gain, shift, token_type_ids=kinds, padding_idx=1,
                               pre_padding_len=torch.tensor([2, 0]), position_offset=2, no_scale_embedding=False)
    rows = torch.tensor([[2, 2, 2, 3], [2, 3, 4, 5]])
    expected = F.embedding(ids, weight, padding_idx=1) * 6**0.5 + positions[rows] + types[kinds]
    expected = F.layer_norm(expected, (6,), gain, shift)
    torch.testing.assert_close(out, expected, **tolerances.OP[torch.float64])
    assert_gradients(out, expected, [weight, positions, types, gain, shift])
    given = functional.embedding(ids, weight, positions, position_ids=rows)
    torch.testing.assert_close(given, F.embedding(ids, weight) + positions[rows], **tolerances.OP[torch.float64])
    step = functional.embedding(ids[:, 3:], weight, positions, pre_padding_len=torch.tensor([2, 0]), step=3)
    torch.testing.assert_close(step[:, 0], weight[ids[:, 3]] + positions[torch.tensor([1, 3])],
                               **tolerances.OP[torch.float64])
    assert torch.equal(functional.embedding(ids, weight), weight[ids])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype, device):
    x, w = randn(2, 6, 16, device=device), weights(16, 16, 3, device=device)
    fw = weights(16, 32, 1, device=device)

    def blocks(cast):
        y = masked_multi_head_attention(x.to(cast), *(p.to(cast) for p in w), num_heads=2, pre_layernorm=True)
        return ffn(y, *(p.to(cast) for p in fw))

    exact = blocks(torch.float32 if device.type == "cuda" else torch.float64)
    out = blocks(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out.to(exact.dtype), exact, rtol=0.05, atol=0.1)


def test_hidden_sizes_to_16384(device):
    hidden, options = 16384, dict(dtype=torch.float32, device=device)
    x = randn(1, 2, hidden, **options)
    norm = [1 + randn(hidden, **options), randn(hidden, **options)]
    torch.testing.assert_close(layernorm(x, *norm), F.layer_norm(x, (hidden,), *norm), rtol=1e-4, atol=1e-4)
    w = weights(hidden, 8, 1, **options)
    expected = F.layer_norm(x + F.linear(F.gelu(F.linear(x, *w[:2])), *w[2:4]), (hidden,), *w[4:])
    torch.testing.assert_close(ffn(x, *w), expected, rtol=1e-3, atol=1e-3)
    w = weights(hidden, 16, 3, **options)
    out = masked_multi_head_attention(x, *w, num_heads=2)
    double = [p.double().cpu() for p in w]
    expected = self_attention(x.double().cpu(), torch.ones(1, 2, dtype=torch.bool), double, 2, False, True, True)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-3, atol=1e-3)


def test_contexts_to_16384(device):
    """One column over 16383 in the cache."""
    length, options = 16384, dict(dtype=torch.float32, device=device)
    w = weights(8, 8, 3, **options)
    past, x = randn(2, length - 1, 8, **options), randn(2, 1, 8, **options)
    cache = KeyValueCache(2, 1, 8, length, device=device)
    keys_values = F.linear(past, w[0][8:], w[1][8:]).view(-1, 2, 1, 8)
    cache.append(keys_values, functional._layout("test", past))
    out = masked_multi_head_attention(x, *w, num_heads=1, cache=cache)
    q, k, v = F.linear(torch.cat((past, x), 1), w[0], w[1]).chunk(3, -1)
    seen = torch.ones(2, 1, 1, length, dtype=torch.bool, device=device)
    expected = F.layer_norm(x + F.linear(attend(q[:, -1:], k, v, 1, seen), *w[2:4]), (8,), *w[4:])
    torch.testing.assert_close(out, expected, **tolerances.LAYER)


def call(f=multi_head_attention, joint=3, **options):
    return f(randn(2, 3, 12), *weights(12, 12, joint), **({"num_heads": 3} | options))


@pytest.mark.parametrize("wrong, message", [
    (lambda: call(num_heads=5), "weights of 36 rows do not hold 3 projections of 5 heads"),
    (lambda: multi_head_attention(randn(2, 12), *weights(12, 12, 3), num_heads=3), r"input must have shape \(B, T, C"),
    (lambda: multi_head_attention(randn(2, 3, 9), *weights(12, 12, 3), num_heads=3), "qkv_weight must have 9 columns"),
    (lambda: multi_head_attention(randn(2, 3, 12), *weights(12, 12, 3)[:4], num_heads=3), "needs layernorm_weight"),
    (lambda: multi_head_attention(randn(2, 3, 12), *weights(12, 12, 3)[:4], num_heads=3, pre_layernorm=True,
                                  add_residual=False), "pre_layernorm needs layernorm_weight"),
    (lambda: call(padding_mask=torch.zeros(2, 4)), r"padding_mask must have shape \(2, 3\), got \(2, 4\)"),
    (lambda: call(masked_multi_head_attention, reorder_state=torch.zeros(2)), "reorder_state goes with a cache"),
    (lambda: call(masked_multi_head_attention, cache=KeyValueCache(3, 3, 4, 9, torch.float64)),
     r"the cache must be for \(2, B, H, D\) = \(2, 2, 3, 4\), got \(2, 3, 3, 4\)"),
    (lambda: call(masked_multi_head_attention, cache=KeyValueCache(2, 3, 4, 9)), "the cache must be torch.float64"),
    (lambda: call(masked_multi_head_attention, cache=KeyValueCache(2, 3, 4, 2, torch.float64)), "room for 2 columns"),
    (lambda: cross_multi_head_attention(randn(2, 3, 12), None, randn(12, 12), None, randn(24, 12), None, randn(12, 12),
                                        None, num_heads=3), "memory must be given to the first call"),
    (lambda: cross_multi_head_attention(randn(3, 3, 12), randn(2, 4, 12), randn(12, 12), None, randn(24, 12), None,
                                        randn(12, 12), None, randn(12), randn(12), num_heads=3),
     "3 rows of input do not fit 2 sentences"),
    (lambda: ffn(randn(2, 3, 12), *weights(12, 7, 1), activation_fn="mish"), "activation_fn must be one of relu"),
    (lambda: ffn(randn(2, 3, 11), *weights(12, 7, 1)), r"weights must be \(I, 11\) and \(11, I\)"),
    (lambda: functional.embedding(torch.zeros(2, 3, dtype=torch.long), randn(4, 5), randn(4, 5), step=1,
                                  position_ids=torch.zeros(1, 3, dtype=torch.long)), "position_ids stand for them"),
], ids=range(15))
def test_errors_name_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_the_padding_of_the_prompts_is_said_once():
    w, cache = weights(12, 12, 3), KeyValueCache(4, 3, 4, 9, torch.float64)
    masked_multi_head_attention(randn(4, 7, 12), *w, num_heads=3, pre_padding_len=PADDING, cache=cache)
    with pytest.raises(ValueError, match="pre_padding_len goes with the first call"):
        masked_multi_head_attention(randn(4, 1, 12), *w, num_heads=3, pre_padding_len=PADDING, cache=cache)
