"""ops.cross_entropy against fairseq's label_smoothed_nll_loss in fp64."""

from __future__ import annotations

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from lightseq_fairseq.ops.cross_entropy import label_smoothed_cross_entropy
from tests import tolerances

PAD = 1
SHAPES = [(1, 2), (7, 5), (13, 101), (64, 1000)]


def sample(shape, dtype=torch.float64, device="cpu"):
    """Logits of some spread and targets of which every third is PAD."""
    n, v = shape
    generator = torch.Generator().manual_seed(n * v)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(device, dtype)
    targets = torch.randint(0, v, (n,), generator=generator).to(device)
    targets[::3] = PAD
    return logits.requires_grad_(), targets


def fairseq_loss(logits, targets, epsilon):
    return label_smoothed_nll_loss(torch.log_softmax(logits, -1), targets, epsilon, ignore_index=PAD)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradient_are_fairseqs(shape, epsilon, dtype, device):
    logits, targets = sample(shape, dtype, device)
    loss, nll = label_smoothed_cross_entropy(logits, targets, epsilon, PAD)
    loss.backward(torch.tensor(0.7, dtype=loss.dtype, device=device))

    exact = logits.detach().double().requires_grad_()
    want_loss, want_nll = fairseq_loss(exact, targets, epsilon)
    want_loss.backward(torch.tensor(0.7, dtype=torch.float64, device=device))
    assert loss.dtype == nll.dtype == dtype and not nll.requires_grad
    torch.testing.assert_close(loss.double(), want_loss, **tolerances.OP[dtype])
    torch.testing.assert_close(nll.double(), want_nll, **tolerances.OP[dtype])
    torch.testing.assert_close(logits.grad.double(), exact.grad, **tolerances.OP[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_error_is_at_most_that_of_fairseq(dtype, device):
    """fairseq takes log_softmax in fp32 and the rest too; only the gradient is rounded to 16 bits."""
    logits, targets = sample((64, 1000), dtype, device)
    plain, exact = (logits.detach().to(kind).requires_grad_() for kind in (dtype, torch.float64))
    loss, nll = label_smoothed_cross_entropy(logits, targets, 0.1, PAD)
    plain_loss, _ = label_smoothed_nll_loss(torch.log_softmax(plain, -1, dtype=torch.float32), targets, 0.1, PAD)
    want_loss, want_nll = fairseq_loss(exact, targets, 0.1)
    for each in (loss, plain_loss, want_loss):
        each.backward()
    assert loss.dtype == nll.dtype == torch.float32 and logits.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), want_loss, **tolerances.OP[torch.float32])
    torch.testing.assert_close(nll.double(), want_nll, **tolerances.OP[torch.float32])
    error = (logits.grad - exact.grad).abs().max()
    assert error <= 2 * (plain.grad - exact.grad).abs().max()


def test_gradient_is_the_derivative(device):
    logits, targets = sample((4, 6), device=device)
    assert torch.autograd.gradcheck(
        lambda z: label_smoothed_cross_entropy(z, targets, 0.2, PAD)[0], logits, raise_exception=True)


def test_ignored_rows_count_nothing_whatever_their_index(device):
    logits, targets = sample((9, 5), device=device)
    want, _ = label_smoothed_cross_entropy(logits, targets, 0.1, PAD)
    loss, _ = label_smoothed_cross_entropy(logits, targets.where(targets != PAD, -100), 0.1, -100)
    assert loss == want
    loss.backward()
    assert (logits.grad[::3] == 0).all() and (logits.grad[1] != 0).all()


def test_nothing_to_count(device):
    for n in (0, 3):
        logits = torch.randn(n, 5, device=device, requires_grad=True)
        loss, nll = label_smoothed_cross_entropy(logits, torch.full((n,), PAD, device=device), 0.1, PAD)
        loss.backward()
        assert loss == 0 and nll == 0 and not logits.grad.any()


def test_extreme_and_strided_logits(device):
    logits, targets = sample((6, 8), torch.float32, device)
    strided = (logits.detach() * 1e4).t().contiguous().t().requires_grad_()
    loss, _ = label_smoothed_cross_entropy(strided, targets, 0.1, PAD)
    loss.backward()
    want, _ = fairseq_loss(strided.detach().double(), targets, 0.1)
    torch.testing.assert_close(loss.double(), want, **tolerances.OP[torch.float32])
    assert strided.grad.isfinite().all()


def test_no_log_probabilities_are_saved(device):
    """fairseq's loss keeps fp32 log-probabilities beside bf16 logits."""
    logits, targets = sample((16, 50), torch.bfloat16, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        label_smoothed_cross_entropy(logits, targets, 0.1, PAD)
    one_float_a_row = 4 * len(targets)
    assert sum(t.nbytes for t in saved) == logits.nbytes + targets.nbytes + one_float_a_row


def test_everything_wrong_is_reported_together():
    with pytest.raises(ValueError) as error:
        label_smoothed_cross_entropy(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int32), 1.5, PAD)
    message = str(error.value)
    for part in ("targets must have shape (4,), got (5,)", "targets must be int64", "epsilon must lie in [0, 1]"):
        assert part in message
    with pytest.raises(ValueError, match=r"logits must have shape \(N, V\) with V of 2 or more, got \(4, 1\)"):
        label_smoothed_cross_entropy(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), 0.1, PAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_overwriting_the_logits_gives_the_same_gradient(dtype, device):
    logits, targets = sample((13, 104), dtype, device)
    apart = logits.detach().clone().requires_grad_()
    grads = []
    for tensor, overwrite in ((apart, False), (logits, True)):
        hidden = tensor * 1  # the logits of a model are no leaf
        loss, _ = label_smoothed_cross_entropy(hidden, targets, 0.1, PAD, overwrite_logits=overwrite)
        loss.backward(torch.tensor(3.0, device=device))
        grads.append(tensor.grad)
        assert torch.equal(hidden.detach(), tensor.grad) == overwrite
    assert torch.equal(*grads)


def test_contract_of_the_op(device):
    logits, targets = sample((7, 10), torch.float32, device)
    torch.library.opcheck(torch.ops.lightseq.label_smoothed_cross_entropy.default, (logits, targets, 0.1, PAD))
    lse = logits.detach().logsumexp(-1)
    dloss = torch.tensor(0.5, device=device)
    torch.library.opcheck(torch.ops.lightseq.label_smoothed_cross_entropy_backward.default,
                          (dloss, logits.detach(), targets, lse, 0.1, PAD))
    torch.library.opcheck(torch.ops.lightseq.label_smoothed_cross_entropy_backward_.default,
                          (logits.detach().clone(), dloss, targets, lse, 0.1, PAD))
