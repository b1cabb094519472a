"""ops.decode_block against formulas in fp64, beside the error of the operators that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq.ops.decode_attention import decode_cross_attention, decode_self_attention
from lightseq_fairseq.ops.decode_block import decode_cross_block, decode_self_block, serves
from lightseq_fairseq.ops.decode_linear import decode_linear, fold, moments_of

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Given:
    """A sentence without tokens, one of one, long ones; rows far from 0, gains far from 1."""

    def __init__(self, lengths, beam, heads, dim, dtype, device, apart=False):
        draw = torch.Generator().manual_seed(sum(lengths) + beam)
        rows, width, self.beam = len(lengths) * beam, heads * dim, beam

        def normal(*size):
            return torch.randn(*size, generator=draw)

        room = 3 if apart else 0
        ends = torch.tensor([n + room for n in lengths]).cumsum(0)
        begins = ends - torch.tensor(lengths) - room
        bounds = torch.stack((begins, begins + torch.tensor(lengths)), 1)
        self.cu_seqlens = (bounds if apart else torch.cat((begins[:1], ends))).int().to(device)
        self.lengths, self.bounds = lengths, bounds.tolist()
        tensors = dict(x=normal(rows, width) + torch.linspace(-3, 3, rows)[:, None],
                       query_weight=normal(width, width) / width, query_bias=normal(width) / 4,
                       keys_values=normal(int(ends[-1]) + 2, 2, heads, dim),
                       weight=normal(width, width) * width**-0.5, bias=normal(width),
                       gain=1 + normal(width) / 4, shift=normal(width) / 4)
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(device, dtype))

    def formula(self, post):
        """In fp64."""
        names = "x", "query_weight", "query_bias", "keys_values", "weight", "bias", "gain", "shift"
        x, query_weight, query_bias, keys_values, weight, bias, gain, shift = (
            getattr(self, name).double() for name in names)
        normed = F.layer_norm(x, x.shape[1:], gain, shift, EPS)
        heads, dim = keys_values.shape[2:]
        q = F.linear(normed, query_weight, query_bias).view(-1, self.beam, heads, dim)
        context = torch.zeros_like(q)
        for b, (first, last) in enumerate(self.bounds):
            if last > first:
                keys, values = keys_values[first:last].unbind(1)
                weights = torch.einsum("khd,shd->khs", q[b], keys).softmax(-1)
                context[b] = torch.einsum("khs,shd->khd", weights, values)
        return F.linear(context.flatten(2).flatten(0, 1), weight, bias) + (normed if post else x)

    def compute(self, post, joined=True, x=None, moments=None):
        x = self.x if x is None else x
        moments = moments_of(x) if moments is None else moments
        folded = fold(self.query_weight, self.query_bias, self.gain, self.shift)
        norm = dict(gain=self.gain, shift=self.shift) if post else {}
        if joined:
            return decode_cross_block(x, moments, *folded[:2], folded.sums, self.keys_values, self.cu_seqlens,
                                      self.beam, self.weight, self.bias, eps=EPS, collect=True, **norm)
        q, _ = decode_linear(x, *folded[:2], sums=folded.sums, moments=moments, eps=EPS)
        context = decode_cross_attention(q, self.keys_values, self.cu_seqlens, self.beam)
        return decode_linear(context, self.weight, self.bias, residual=x, moments=moments if post else None, eps=EPS,
                             collect=True, **norm)


@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("heads, dim", [(8, 64), (4, 64), (8, 32), (4, 32), (5, 64), (7, 32)])
@pytest.mark.parametrize("beam", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_the_three_operators(dtype, beam, heads, dim, post, device):
    if device.type == "cuda" and dtype == torch.float32:
        return  # the compiled operator is for 16 bits
    for lengths, apart in (([30], False), ([1, 0, 77, 150], True), ([12, 64, 31, 9], False)):
        given = Given(lengths, beam, heads, dim, dtype, device, apart)
        (out, moments), (other, _) = given.compute(post), given.compute(post, joined=False)
        exact = given.formula(post)
        error, allowed = ((y.double() - exact).abs().max().item() for y in (out, other))
        largest = exact.abs().max().item()
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * largest
        torch.testing.assert_close(moments, moments_of(out), rtol=1e-4, atol=1e-4)


def test_a_sentence_knows_nothing_of_others(device):
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    given = Given([30, 5, 61], 4, 8, 64, dtype, device)
    together, _ = given.compute(True)
    for b, (first, last) in enumerate(given.bounds):
        alone = Given([last - first], 4, 8, 64, dtype, device)
        vars(alone).update({name: value for name, value in vars(given).items() if name not in (
            "x", "keys_values", "cu_seqlens", "bounds", "lengths")})
        alone.x, alone.keys_values = given.x[4 * b:4 * b + 4], given.keys_values[first:last].contiguous()
        assert torch.equal(alone.compute(True)[0], together[4 * b:4 * b + 4])


def test_in_a_chain(device):
    """Each reads what the one before has written, many times over: with launches that overlap an error would show."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    given = Given([30, 7, 55, 19], 4, 8, 64, dtype, device)

    def run():
        x, moments = given.x, moments_of(given.x)
        for _ in range(20):
            x, moments = given.compute(True, x=x, moments=moments)
        return x

    first = run()
    assert all(torch.equal(first, run()) for _ in range(5))
    x = given.x
    for _ in range(20):
        given.x = x.to(dtype)
        x = given.formula(True)
    assert (first.double() - x).abs().max() <= 0.02 * x.abs().max()


class Past:
    """Sentences at steps of their own, with histories that cross."""

    def __init__(self, steps, beam, heads, dim, dtype, device, most=40, before=()):
        draw = torch.Generator().manual_seed(sum(steps) + beam)
        batch, width = len(steps), heads * dim
        rows = batch * beam

        def normal(*size):
            return torch.randn(*size, generator=draw)

        tensors = dict(qkv=normal(rows, 3, heads, dim), cache=normal(2, batch, heads, most * beam, dim),
                       residual=normal(rows, width) + torch.linspace(-3, 3, rows)[:, None],
                       weight=normal(width, width) * width**-0.5, bias=normal(width),
                       gain=1 + normal(width) / 4, shift=normal(width) / 4)
        if before:
            tensors["before"] = normal(sum(before) + 3, 2, heads, dim)
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(device, dtype))
        self.qkv[:, 0] *= dim**-0.5
        self.ancestors = torch.randint(beam, (batch, beam, most), generator=draw, dtype=torch.uint8).to(device)
        self.steps = torch.tensor(steps, dtype=torch.int32, device=device)
        self.texts = {}
        if before:
            ends = torch.tensor([0, *before]).cumsum(0).int()
            self.texts = dict(before=self.before, cu_seqlens=ends.to(device))

    def compute(self, post, joined=True, wide=False):
        """The output, its moments and the cache behind it; ``wide`` in fp64 on the CPU, by the formulas."""
        def take(tensor):
            tensor = tensor.cpu() if wide else tensor
            return tensor.double() if wide and tensor.is_floating_point() else tensor.clone()

        own = {name: take(value) for name, value in vars(self).items() if torch.is_tensor(value)}
        texts = {name: take(value) for name, value in self.texts.items()}
        norm = dict(gain=own["gain"], shift=own["shift"], moments=moments_of(own["residual"]), eps=EPS) if post else {}
        past = own["qkv"], own["cache"], own["ancestors"], own["steps"]
        if joined:
            out = decode_self_block(*past, own["weight"], own["bias"], own["residual"], collect=True, **norm, **texts)
        else:
            context = decode_self_attention(*past, *texts.values())
            out = decode_linear(context, own["weight"], own["bias"], residual=own["residual"], collect=True, **norm)
        return *out, own["cache"]


@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("heads, dim", [(8, 64), (4, 64), (8, 32), (5, 32)])
@pytest.mark.parametrize("beam", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_self_attention(dtype, beam, heads, dim, post, device):
    if device.type == "cuda" and dtype == torch.float32:
        return
    for steps, before in (([0], ()), ([1, 39, 7], ()), ([3, 12, 0, 30], ()), ([2, 9], (14, 1))):
        past = Past(steps, beam, heads, dim, dtype, device, before=before)
        (out, moments, cache), (other, _, other_cache) = past.compute(post), past.compute(post, joined=False)
        assert torch.equal(cache, other_cache)
        exact = past.compute(post, joined=False, wide=True)[0].to(device)
        error, allowed = ((y.double() - exact).abs().max().item() for y in (out, other))
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * exact.abs().max().item()
        torch.testing.assert_close(moments, moments_of(out), rtol=1e-4, atol=1e-4)


def test_runs_repeat_each_other(device):
    past = Past([3, 30, 11], 4, 8, 64, torch.float16 if device.type == "cuda" else torch.float32, device)
    first = past.compute(True)
    assert all(torch.equal(one, other) for _ in range(20) for one, other in zip(first, past.compute(True), strict=True))


def test_what_is_not_served_is_refused(device):
    for lengths, beam, heads, dim in (([3], 6, 8, 64), ([3] * 17, 1, 8, 64), ([3], 2, 16, 64), ([3], 2, 3, 64),
                                      ([3], 2, 8, 16)):
        given = Given(lengths, beam, heads, dim, torch.float16, device)
        assert not serves(given.x, heads, dim, beam)
        with pytest.raises(ValueError, match="4 to 8 heads of size 32 or 64"):
            given.compute(True)
    with pytest.raises(ValueError, match="256 steps"):
        Past([3], 2, 4, 32, torch.float16, device, most=257).compute(True)
