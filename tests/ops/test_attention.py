"""Packed attention is softmax(q k^T / sqrt(D)) v sentence by sentence, whatever else is in the batch."""

from __future__ import annotations

import math

import pytest
import torch

from lightseq_fairseq import ops
from lightseq_fairseq.ops.attention import attention, cross_attention, self_attention
from tests import tolerances

CASES = [  # query lengths, key lengths, heads, head size
    ([1], [1], 1, 1),
    ([5, 1, 7], [5, 1, 7], 2, 8),
    ([3, 3], [3, 3], 4, 16),
    ([1, 1, 1, 1], [9, 2, 33, 5], 3, 7),
    ([4, 6, 1], [6, 6, 13], 2, 65),
]
CASES_16_BIT = [  # lengths at and just past the tiles of the kernels: 16, 32, 64 rows, and past what one block holds
    ([27, 1, 32, 16], [27, 1, 32, 16], 2, 64),
    ([33, 17, 5], [31, 32, 19], 2, 32),
    ([50, 64, 41], [65, 64, 7], 3, 64),
    ([19, 35], [33, 12], 1, 128),
    ([9, 40], [21, 40], 2, 40),
    ([9, 34], [21, 40], 1, 256),
    ([129, 3], [127, 150], 2, 64),
    ([300, 20], [270, 1], 1, 64),
    ([200, 1, 65], [200, 130, 0], 2, 128),
    ([257, 100, 33], [300, 64, 190], 2, 72),
    ([40, 64], [129, 65], 3, 48),
    ([12, 3], [11, 4], 2, 7),
]
IDS = dict(ids=lambda value: "x".join(map(str, value)) if isinstance(value, list) else None)


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def sample(q_lens, k_lens, heads, dim, dtype, device):
    generator = torch.Generator().manual_seed(sum(q_lens) + dim)
    return [torch.randn(sum(n), heads, dim, generator=generator).to(device, dtype).requires_grad_()
            for n in (q_lens, k_lens, k_lens)]


def one_by_one(q, k, v, q_lens, k_lens, causal, factors=None, dtype=torch.float64):
    """The definition, a sentence at a time; ``factors`` holds each sentence's dropout mask (H, Tq, Tk), scaled."""
    outs = []
    sentences = zip(q.to(dtype).split(q_lens), k.to(dtype).split(k_lens), v.to(dtype).split(k_lens), strict=True)
    for index, (qs, ks, vs) in enumerate(sentences):
        scores = torch.einsum("ihd,jhd->hij", qs, ks) / math.sqrt(q.size(-1))
        if causal:
            ahead = ks.size(0) - qs.size(0)
            hidden = torch.ones(qs.size(0), ks.size(0), device=q.device).triu(1 + ahead).bool()
            scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0)  # a query that sees no key gets nothing
        outs.append(torch.einsum("hij,jhd->ihd", weights if factors is None else weights * factors[index], vs))
    return torch.cat(outs)


def run(q, k, v, q_lens, k_lens, causal=False, **options):
    return attention(q, k, v, cumulative(q_lens, q.device), cumulative(k_lens, q.device), max(q_lens), max(k_lens) + 2,
                     causal, **options)


def draw(q_lens, k_lens, heads, dim, dtype, device, p, seed):
    """The mask of each sentence, (H, Tq, Tk) of 0 and 1, read off values that are one-hot."""
    q, k = torch.zeros(sum(q_lens), heads, dim), torch.zeros(sum(k_lens), heads, dim)
    masks = [torch.zeros(heads, n, m) for n, m in zip(q_lens, k_lens, strict=True)]
    for first in range(0, max(k_lens), dim):
        v = torch.cat([torch.eye(m, max(m, first + dim))[:, first:first + dim] for m in k_lens])
        v = v.unsqueeze(1).expand(-1, heads, -1)
        out = run(*(x.to(device, dtype) for x in (q, k, v)), q_lens, k_lens, dropout_p=p, seed=seed)
        for mask, rows in zip(masks, out.cpu().split(q_lens), strict=True):
            width = mask.size(2) - first
            mask[:, :, first:first + dim] = (rows != 0).transpose(0, 1)[:, :, :max(width, 0)]
    return [mask.to(device) for mask in masks]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_lens,k_lens,heads,dim", CASES, **IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_backward(q_lens, k_lens, heads, dim, causal, dtype, device):
    q, k, v = sample(q_lens, k_lens, heads, dim, dtype, device)
    out = run(q, k, v, q_lens, k_lens, causal)
    expected = one_by_one(q, k, v, q_lens, k_lens, causal)
    torch.testing.assert_close(out.double(), expected, **tolerances.OP[dtype])
    probe = torch.randn_like(out)
    grads = torch.autograd.grad((out * probe).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * probe).sum(), (q, k, v))
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other.to(dtype), **tolerances.OP[dtype])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_lens,k_lens,heads,dim", CASES_16_BIT, **IDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_error_is_at_most_twice_that_of_plain_pytorch(q_lens, k_lens, heads, dim, causal, dtype, p, device):
    q, k, v = sample(q_lens, k_lens, heads, dim, dtype, device)
    seed = torch.tensor([5], device=device)
    factors = [m / (1 - p) for m in draw(q_lens, k_lens, heads, dim, dtype, device, p, seed)]
    out = run(q, k, v, q_lens, k_lens, causal, dropout_p=p, seed=seed)
    exact = one_by_one(q, k, v, q_lens, k_lens, causal, factors)
    plain = one_by_one(q, k, v, q_lens, k_lens, causal, [m.to(dtype) for m in factors], dtype)
    probe = torch.randn_like(out)
    results = [(x, *torch.autograd.grad(x, (q, k, v), probe.to(x.dtype))) for x in (out, plain)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = one_by_one(*wide, q_lens, k_lens, causal, factors)
    expected = (exact, *torch.autograd.grad(exact, wide, probe.double()))
    for name, ours, theirs, want in zip(("out", "dq", "dk", "dv"), *results, expected, strict=True):
        error, limit = (ours - want).norm(), (theirs - want).norm()
        rounding = want.norm() * torch.finfo(dtype).eps / 4  # what storing the exact result in 16 bits costs
        assert error <= 2 * max(limit, rounding), f"{name}: {error:.3g}, plain PyTorch {limit:.3g}"


@pytest.mark.parametrize("dtype,dim", [(torch.float32, 6), (torch.float16, 64), (torch.bfloat16, 24)])
@pytest.mark.parametrize("q_lens,k_lens", [([5, 31], [5, 31]), ([70, 2], [70, 2])], **IDS)
def test_fused_projections_are_taken_in_place(q_lens, k_lens, dtype, dim, device):
    heads, p, seed = 2, 0.2, torch.tensor([3], device=device)
    q, k, v = sample(q_lens, k_lens, heads, dim, dtype, device)
    lens, most = cumulative(q_lens, device), max(q_lens)
    apart = attention(q, k, v, lens, lens, most, most, True, p, seed=seed)
    grads = torch.autograd.grad(apart.square().sum(), (q, k, v))
    qkv, kv = torch.stack((q, k, v), 1), torch.stack((k, v), 1)
    out = self_attention(qkv, lens, most, True, p, seed=seed)
    assert torch.equal(out, apart)
    assert torch.equal(torch.autograd.grad(out.square().sum(), qkv)[0], torch.stack(grads, 1))
    out = cross_attention(q, kv, lens, lens, most, most, True, p, seed=seed)
    assert torch.equal(out, apart)
    dq, dkv = torch.autograd.grad(out.square().sum(), (q, kv))
    assert torch.equal(dq, grads[0]) and torch.equal(dkv, torch.stack(grads[1:], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_strides(dtype, device):
    """Heads outside tokens, a slice of a wider tensor that starts off any 16 bytes, and the innermost axis strided."""
    q, k, v = sample([9, 20], [9, 20], 2, 16, dtype, device)
    lens = cumulative([9, 20], device)
    want = attention(q, k, v, lens, lens, 20, 20)
    views = [q.transpose(0, 1).contiguous().transpose(0, 1), torch.nn.functional.pad(k, (3, 3))[:, :, 3:-3],
             v.transpose(1, 2).contiguous().transpose(1, 2)]
    out = attention(*views, lens, lens, 20, 20)
    torch.testing.assert_close(out, want, **tolerances.OP[dtype])
    grads, wanted = (torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (out, want))
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, **tolerances.OP[dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype,dim", [(torch.float32, 5), (torch.float16, 32)])
def test_what_belongs_to_no_sentence_is_zero_and_harms_nothing(dtype, dim, causal, device):
    """Sentences without tokens or without keys, padding rows behind the last sentence, queries that see no key."""
    q_lens, k_lens, tail = [3, 0, 9, 4, 0, 0], [5, 2, 2, 0, 0, 0], 7
    q, k, v = sample([*q_lens, tail], [*k_lens, tail], 2, dim, dtype, device)
    with torch.no_grad():
        for x in (q, k, v):
            x[-tail:] = float("nan")
    out = attention(q, k, v, cumulative(q_lens, device), cumulative(k_lens, device), 9, 5, causal)
    grads = torch.autograd.grad(out[:-tail].float().square().sum(), (q, k, v))
    exact = [x.detach()[:-tail].double().requires_grad_() for x in (q, k, v)]
    want = one_by_one(*exact, q_lens, k_lens, causal)
    wanted = torch.autograd.grad(want.square().sum(), exact)
    for x, other in zip((out, *grads), (want, *wanted), strict=True):
        assert not x[-tail:].any()
        torch.testing.assert_close(x[:-tail].double(), other.nan_to_num(0), **tolerances.OP[dtype])


@pytest.mark.parametrize("dtype,dim", [(torch.float32, 8), (torch.float16, 64)])
def test_no_tokens_at_all(dtype, dim, device):
    q, k, v = (torch.zeros(0, 2, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    lens = cumulative([0, 0], device)
    attention(q, k, v, lens, lens, 0, 0).sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("dtype,dim", [(torch.float64, 8), (torch.float32, 24), (torch.float16, 64),
                                       (torch.bfloat16, 32)])
def test_dropout_keeps_each_probability_by_a_draw_of_its_own(dtype, dim, device):
    lens, heads, p = [60, 33, 70], 3, 0.25
    first, again, other = (draw(lens, lens, heads, dim, dtype, device, p, torch.tensor([seed], device=device))
                           for seed in (7, 7, 8 + 2 ** 40))
    count = sum(m.numel() for m in first)
    share = sum(m.sum() for m in first) / count
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / count)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    columns = torch.cat([m.flatten() for m in first])
    for name, others in {"seeds": torch.cat([m.flatten() for m in other]),
                         "keys": torch.cat([m.roll(1, 2).flatten() for m in first]),
                         "keys 8 apart": torch.cat([m.roll(8, 2).flatten() for m in first]),
                         "queries": torch.cat([m.roll(1, 1).flatten() for m in first]),
                         "queries 8 apart": torch.cat([m.roll(8, 1).flatten() for m in first]),
                         "heads": torch.cat([m.roll(1, 0).flatten() for m in first])}.items():
        correlation = torch.corrcoef(torch.stack((columns, others)))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(count), name
    a, b = first[0][:, :33, :33].flatten(), first[1].flatten()
    assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 4 / math.sqrt(len(a)), "sentences"


def test_the_mask_depends_on_no_kernel(device):
    """Whichever kernel serves a type, a head size or a length, seed and position say what is dropped."""
    seed = torch.tensor([11], device=device)
    lens = [33, 70]
    want = draw(lens, lens, 2, 8, torch.float32, device, 0.4, seed)
    for dtype, dim in ((torch.float16, 32), (torch.bfloat16, 64), (torch.float16, 20), (torch.float64, 8)):
        masks = draw(lens, lens, 2, dim, dtype, device, 0.4, seed)
        assert all(torch.equal(a, b) for a, b in zip(masks, want, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_under_dropout(dtype, causal, device):
    q_lens, k_lens, heads, dim, p = [35, 3, 20], [40, 5, 11], 2, 9, 0.3
    q, k, v = sample(q_lens, k_lens, heads, dim, dtype, device)
    seed = torch.tensor([2 ** 50 + 1], device=device)
    scale = 65536 / (65536 - round(p * 65536)) if q.is_cuda else 1 / (1 - p)
    factors = [m.double() * scale for m in draw(q_lens, k_lens, heads, dim, dtype, device, p, seed)]
    out = run(q, k, v, q_lens, k_lens, causal, dropout_p=p, seed=seed)
    want = one_by_one(q, k, v, q_lens, k_lens, causal, factors)
    probe = torch.randn_like(out)
    close = tolerances.OP[torch.float32]  # 65536 / (65536 - threshold) is a float
    torch.testing.assert_close(out.double(), want, **close)
    for grad, other in zip(torch.autograd.grad(out, (q, k, v), probe),
                           torch.autograd.grad(want, (q, k, v), probe.double()), strict=True):
        torch.testing.assert_close(grad, other, **close)


def test_dropping_everything(device):
    q, k, v = sample([4], [4], 1, 8, torch.float16, device)
    out = run(q, k, v, [4], [4], dropout_p=1.0)
    assert not out.any() and not torch.autograd.grad(out.sum(), q)[0].any()


def test_without_a_seed_every_call_draws_anew(device):
    q, k, v = sample([30], [30], 2, 32, torch.float16, device)
    torch.manual_seed(4)
    first, second = (run(q, k, v, [30], [30], dropout_p=0.5) for _ in range(2))
    torch.manual_seed(4)
    assert not torch.equal(first, second)
    assert torch.equal(first, run(q, k, v, [30], [30], dropout_p=0.5))


@pytest.mark.parametrize("lens", [[27, 1, 32], [50, 64, 33], [200, 70]], **IDS)
def test_repeats_bit_for_bit(lens, device):
    seed = torch.tensor([1], device=device)
    q, k, v = sample(lens, lens, 4, 64, torch.float16, device)
    results = []
    for _ in range(3):
        out = run(q, k, v, lens, lens, True, dropout_p=0.1, seed=seed)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype,most", [(torch.float16, 32), (torch.bfloat16, 64), (torch.float16, 300),
                                        (torch.float32, 40)])
def test_in_a_cuda_graph(dtype, most, device):
    """Captured once, replayed with other inputs, lengths and seeds: equal to running without a graph."""
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    tokens, heads, dim = 2 * most, 2, 64
    qkv = torch.randn(tokens, 3, heads, dim, device=device, dtype=dtype, requires_grad=True)
    lens, seed = cumulative([most, 3, most // 2, 0, 0], device), torch.tensor([1], device=device)
    probe = torch.randn(tokens, heads, dim, device=device, dtype=dtype)

    def step():
        out = self_attention(qkv, lens, most, True, 0.2, seed=seed)
        return out.detach(), torch.autograd.grad(out, qkv, probe)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number, lengths in enumerate(([1, most, 5, most - 7, 0], [most // 3, 2, 2, most, 1])):
        with torch.no_grad():
            qkv.copy_(torch.randn_like(qkv))
        lens.copy_(cumulative(lengths, device))
        seed.fill_(100 + number)
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(a, b) and a.any() for a, b in zip(replayed, step(), strict=True))


def test_gradient_is_the_derivative():
    q_lens, k_lens = [3, 1, 0], [4, 2, 1]
    q, k, v = sample(q_lens, k_lens, 2, 3, torch.float64, "cpu")
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda *x, causal=causal: run(*x, q_lens, k_lens, causal, dropout_p=0.3, seed=torch.tensor([1])), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_are_the_operands_the_output_and_a_float_a_row(dtype, device):
    lens, heads, dim = [20, 13], 2, 16
    qkv = torch.randn(33, 3, heads, dim, device=device, dtype=dtype, requires_grad=True)
    seed, saved = torch.tensor([1], device=device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = self_attention(qkv, cumulative(lens, device), 20, dropout_p=0.1, seed=seed)
    small = 2 * 3 * 4 + 8  # cu_seqlens twice and the seed
    assert sum(t.nbytes for t in saved) <= qkv.nbytes + out.nbytes + 33 * heads * 4 + small


def test_weights_are_the_softmax_that_attention_uses(device):
    q_lens, k_lens, dim = [4, 6, 1], [6, 6, 13], 16
    q, k, _ = sample(q_lens, k_lens, 2, dim, torch.float32, device)
    one_hot = torch.cat([torch.eye(dim)[:n] for n in k_lens])[:, None].expand(-1, 2, -1).to(device)  # o: the weights
    lens = cumulative(q_lens, device), cumulative(k_lens, device)
    for causal in (False, True):
        weights = ops.attention_weights(q, k, *lens, 6, 13, causal)
        out = attention(q, k, one_hot, *lens, 6, 13, causal)
        for index, (n, rows) in enumerate(zip(q_lens, out.split(q_lens), strict=True)):
            torch.testing.assert_close(weights[index, :, :n].transpose(0, 1), rows[:, :, :13],
                                       **tolerances.OP[torch.float32])


def test_everything_wrong_is_reported_together(device):
    x = torch.zeros(4, 2, 8, device=device)
    with pytest.raises(ValueError) as error:
        attention(x, x[:, :, :4], x.half(), cumulative([4], device), cumulative([2, 2], device), 4, 4, dropout_p=1.5,
                  seed=torch.tensor([1.0]))
    message = str(error.value)
    for part in ("(Nq, H, D), (Nk, H, D) and (Nk, H, D) with the same H and D",
                 "got (4, 2, 8) and (4, 2, 4) and (4, 2, 8)",
                 "one floating-point type", r"cu_seqlens must both have shape (B + 1,), got (2,) and (3,)",
                 "dropout_p must lie in [0, 1], got 1.5", "seed must be one int64 on"):
        assert part in message
    with pytest.raises(ValueError, match=r"must have shapes \(N, 3, H, D\) .* got \(4, 2, 8\)"):
        self_attention(x, cumulative([4], device), 4)
    with pytest.raises(ValueError, match=r"\(Nq, H, D\) and \(Nk, 2, H, D\) .* got \(4, 2, 8\) and \(4, 3, 2, 8\)"):
        cross_attention(x, torch.zeros(4, 3, 2, 8), cumulative([4], device), cumulative([4], device), 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_contract_of_the_op(count, dtype, device):
    lens, seed = cumulative([3, 5], device), torch.tensor([1], device=device)
    q, k, v = sample([3, 5], [3, 5], 2, 8, dtype, device)
    parts = {1: [torch.stack((q, k, v), 1)], 2: [q, torch.stack((k, v), 1)], 3: [q, k, v]}[count]
    parts = [part.detach().requires_grad_() for part in parts]
    rest = (lens, lens, 5, 5, True, 0.1, 0.4, seed)
    operators = torch.ops.lightseq
    torch.library.opcheck(operators.attention.default, (parts, *rest))
    parts = [part.detach() for part in parts]
    out, lse = operators.attention(parts, *rest)
    torch.library.opcheck(operators.attention_backward.default, (torch.randn_like(out), parts, out, lse, *rest))


def test_rows_behind_the_last_sentence_may_fill_up_the_longest_lengths(device):
    """B sentences of unequal lengths in B * longest rows: every other case has equal lengths at that number of rows."""
    lens, heads, dim = [5, 3, 2], 2, 8
    q, k, v = sample([15], [15], heads, dim, torch.float32, device)
    out = attention(q, k, v, *2 * [cumulative(lens, device)], 5, 5)
    expected = one_by_one(q[:10], k[:10], v[:10], lens, lens, False)
    torch.testing.assert_close(out[:10].double(), expected, **tolerances.OP[torch.float32])
    assert out[10:].eq(0).all()
