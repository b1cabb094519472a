"""ops.embedding against look-up, scale, sum and mask one by one, and its gradients, which repeat bit for bit."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq import ops
from tests.ops.comparison import check_graph, check_misaligned, compare, run, saved_bytes
from tests.ops.dropout_masks import multiplier, new_seed

PAD = 1
SCALE = 3.5
CASES = [  # tokens, rows of the table, columns
    (1, 2, 1), (5, 3, 7), (16, 40, 8), (17, 5, 16), (100, 7, 31), (1000, 50, 264), (346, 1000, 512), (5000, 4, 24),
    (9000, 3000, 40),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sample(count, vocab, columns, device):
    """Indices of which some are frequent, and the two tables."""
    tokens = (torch.rand(count) ** 3 * vocab).long()
    rows = torch.randint(0, 9, (count,))
    tables = [torch.randn(vocab, columns, dtype=torch.float64), torch.randn(9, columns, dtype=torch.float64)]
    return tokens.to(device), rows.to(device), tables


def op(tokens, rows, p=0.0, seed=None, padding_idx=PAD):
    return lambda weight, position_weight: ops.embedding(tokens, weight, SCALE, padding_idx, rows, position_weight, p,
                                                         seed)


def formula(tokens, rows, mask):
    def steps(weight, position_weight):
        kept = (tokens != PAD).unsqueeze(-1)
        x = weight[tokens]
        x = torch.where(kept, x, x.detach())  # the padding row receives no gradient
        return (x * SCALE + position_weight[rows]) * mask.to(x)
    return steps


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients(case, p, dtype, device):
    tokens, rows, tables = sample(*case, device)
    seed = new_seed(device)
    mask = multiplier((case[0], case[2]), p, seed)
    compare(op(tokens, rows, p, seed), formula(tokens, rows, mask), tables, dtype, device)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 4096, 4100])
@pytest.mark.parametrize("kind", ["all the same", "all different", "descending", "alternating"])
def test_runs_that_end_anywhere(count, kind, device):
    """Backward adds up sorted indices in chunks: runs within, at the edge of, and across them."""
    tokens = {"all the same": torch.full((count,), 3), "all different": torch.randperm(count),
              "descending": torch.arange(count, 0, -1) // 5, "alternating": torch.arange(count) % 2 * 2}[kind]
    tokens = tokens.to(device)
    weight = torch.zeros(count + 5, 8, device=device, requires_grad=True)
    dout = torch.randint(-8, 9, (count, 8), device=device).float()  # sums of small integers are exact
    ops.embedding(tokens, weight, 1.0, -1).backward(dout)
    assert torch.equal(weight.grad, torch.zeros_like(weight).index_add_(0, tokens, dout))


def test_without_positions_and_without_padding(device):
    tokens, _, (weight, _) = sample(40, 11, 16, device)
    weight = weight.to(device, torch.float32).requires_grad_()
    y = ops.embedding(tokens, weight, 2.0, -1)
    torch.testing.assert_close(y, 2 * weight[tokens])
    y.sum().backward()
    torch.testing.assert_close(weight.grad[:, 0], 2.0 * tokens.bincount(minlength=11).float())


def test_the_padding_row_is_read_but_takes_no_gradient(device):
    tokens = torch.tensor([PAD, 2, PAD], device=device)
    weight = torch.randn(4, 8, device=device, requires_grad=True)
    y = ops.embedding(tokens, weight, 1.0, PAD)
    assert torch.equal(y[0], weight[PAD])
    y.sum().backward()
    assert not weight.grad[[0, PAD, 3]].any() and weight.grad[2].eq(1).all()


def test_a_constant_position_table_in_another_dtype(device):
    tokens, rows, (weight, table) = sample(20, 11, 16, device)
    weight = weight.to(device, torch.bfloat16).requires_grad_()
    y = ops.embedding(tokens, weight, 1.0, PAD, rows, table.float().to(device))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype == torch.bfloat16


def test_gradient_is_the_derivative():
    tokens, rows, tables = sample(12, 5, 6, "cpu")
    assert torch.autograd.gradcheck(op(tokens, rows, 0.3, new_seed(), -1), [table.requires_grad_() for table in tables])


def test_gradients_repeat_bit_for_bit(device):
    tokens, rows, tables = sample(3000, 20, 64, device)
    tables = [table.to(device, torch.float32) for table in tables]
    once, again = (run(op(tokens, rows), tables) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(once, again, strict=True))


def test_misaligned_memory(device):
    tokens, rows, tables = sample(50, 11, 16, device)
    check_misaligned(op(tokens, rows), tables, device)


def test_replayed_in_a_graph_with_new_tokens(device):
    tokens, rows, tables = sample(3000, 300, 72, device)
    seed = new_seed(device)
    check_graph(op(tokens, rows, 0.2, seed), tables, seed, device)


def test_indices_alone_are_saved(device):
    tokens, rows, tables = sample(64, 40, 32, device)
    tables = [table.to(device, torch.float32).requires_grad_() for table in tables]
    seed = new_seed(device)
    assert (saved_bytes(lambda: op(tokens, rows, 0.1, seed)(*tables))
            == tokens.nbytes + rows.nbytes + seed.nbytes)


def test_no_tokens(device):
    weight = torch.ones(5, 16, device=device, requires_grad=True)
    y = ops.embedding(torch.zeros(0, dtype=torch.int64, device=device), weight, 1.0, PAD)
    y.sum().backward()
    assert y.shape == (0, 16) and weight.grad.shape == (5, 16) and not weight.grad.any()


def test_everything_wrong_is_reported_together():
    tokens, weight = torch.zeros(3, dtype=torch.int32), torch.zeros(4, 8)
    with pytest.raises(ValueError) as error:
        ops.embedding(tokens, weight, 1.0, 9, tokens[:2], torch.zeros(4, 7))
    message = str(error.value)
    for part in ("tokens must be (N,) int64, got (3,) torch.int32", "padding_idx must be a row of weight or -1, got 9",
                 "position_rows must be (3,) int64, got (2,)", "position_weight must have shape (P, 8), got (4, 7)"):
        assert part in message
    with pytest.raises(ValueError, match="position_rows and position_weight must be given together"):
        ops.embedding(tokens.long(), weight, 1.0, 1, tokens.long())


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_contract_of_the_op(p, device):
    tokens, rows, tables = sample(20, 11, 16, device)
    weight, table = (tensor.to(device, torch.float32).requires_grad_() for tensor in tables)
    seed = new_seed(device) if p else None
    forward = torch.ops.lightseq.embedding.default
    torch.library.opcheck(forward, (tokens, weight, SCALE, PAD, rows, table, p, seed))
    torch.library.opcheck(forward, (tokens, weight, SCALE, PAD, None, None, p, seed))
    dout = torch.randn(20, 16, device=device)
    torch.library.opcheck(torch.ops.lightseq.embedding_backward.default, (dout, tokens, 11, PAD, SCALE, p, seed))
