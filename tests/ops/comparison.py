"""An op against its formula: outputs and gradients, in fp64, and in 16 bits beside plain PyTorch's own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests import tolerances

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def run(function: Function, inputs: Sequence[Tensor], probes: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Outputs of ``function`` and the gradients in ``inputs`` of a projection of them on ``probes``."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    probes = probes if probes is not None else new_probes(outputs)
    assert len(probes) == len(outputs)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, tuple(
        probe.to(out) for probe, out in zip(probes, outputs, strict=True)))]


def new_probes(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


def compare(op: Function, formula: Function, inputs: Sequence[Tensor], dtype: torch.dtype,
            device: torch.device) -> None:
    """``formula`` is plain PyTorch that computes in the dtype of its inputs; it judges in fp64."""
    inputs = [tensor.to(device, dtype) for tensor in inputs]
    probes = new_probes(_tuple(op(*inputs)))
    got = run(op, inputs, probes)
    exact = run(formula, [tensor.double() for tensor in inputs], probes)
    plain = run(formula, inputs, probes)
    for i, (mine, want, other) in enumerate(zip(got, exact, plain, strict=True)):
        assert mine.dtype == dtype and mine.shape == want.shape
        if mine.numel() == 0:
            continue
        largest = want.abs().max().item()
        error, plain_error = ((x.double() - want).abs().max().item() for x in (mine, other))
        if dtype in (torch.float16, torch.bfloat16):
            rounding = torch.finfo(dtype).eps / 2 * largest  # which no result of this dtype can do without
            assert error <= max(2 * plain_error, rounding) * 1.001, f"result {i}: {error} beside {plain_error}"
        else:
            assert error <= tolerances.OP[dtype]["rtol"] * max(1, largest), f"result {i}: {error} of {largest}"


def misaligned(tensor: Tensor) -> Tensor:
    """A contiguous copy that begins one element into its memory, so that no 16-byte access may touch it."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


def check_misaligned(op: Function, inputs: Sequence[Tensor], device: torch.device) -> None:
    """The results do not depend on where the inputs lie."""
    inputs = [tensor.to(device, torch.float32) for tensor in inputs]
    want, got = run(op, inputs), run(op, [misaligned(tensor) for tensor in inputs])
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * max(1, other.abs().max().item()))


def check_graph(op: Function, inputs: Sequence[Tensor], seed: Tensor | None, device: torch.device) -> None:
    """Forward and backward captured once and replayed with new inputs and seeds are, bit for bit, those run at once."""
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    held = [tensor.to(device, torch.bfloat16) for tensor in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        probes = new_probes(_tuple(op(*held)))
        run(op, held, probes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, held, probes)
    for _ in range(2):
        for tensor in held:
            tensor.copy_(torch.randn_like(tensor))
        if seed is not None:
            seed.random_()
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        assert any(tensor.any() for tensor in replayed)
        for mine, other in zip(replayed, run(op, held, probes), strict=True):
            assert torch.equal(mine, other)


def saved_bytes(function: Callable[[], object]) -> int:
    """What ``function`` keeps for backward, each memory counted once."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    return sum(saved.values())


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
