"""Captures go on whatever Python and other threads do meanwhile."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import torch.nn.functional as F

from lightseq_fairseq.layers.capture import capture, captured


@pytest.fixture
def stream(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU: run with --device cuda")
    return torch.cuda.Stream()


def doubled(x, stream, meanwhile):
    graph = torch.cuda.CUDAGraph()
    with capture(graph, stream):
        meanwhile()
        y = x * 2
    graph.replay()
    return y


def test_garbage_waits(stream, device):
    """A trainer's graphs and pinned tensors lie in cycles, which are freed whenever Python happens to look for them."""
    found = []

    class Cycle:
        def __init__(self, *kept):
            self.kept, self.itself = kept, self

        def __del__(self):
            found.append(torch.cuda.is_current_stream_capturing())

    x = torch.arange(5.0, device=device)
    graph = torch.cuda.CUDAGraph()
    with capture(graph, stream):
        x + 1
    Cycle(graph, torch.empty(1000, pin_memory=True))
    del graph
    assert doubled(x, stream, lambda: [[] for _ in range(200_000)]).tolist() == [0, 2, 4, 6, 8]
    assert gc.isenabled()
    gc.collect()
    assert found == [False]


def test_other_threads_pin_memory(stream, device):
    def pin():
        thread = threading.Thread(target=lambda: torch.empty(1 << 22, pin_memory=True))
        thread.start()
        thread.join()

    assert doubled(torch.ones(3, device=device), stream, pin).tolist() == [2, 2, 2]


def test_an_error_ends_the_capture(stream, device):
    with pytest.raises(ZeroDivisionError):
        doubled(torch.ones(3, device=device), stream, lambda: 1 // 0)
    assert gc.isenabled() and not torch.cuda.is_current_stream_capturing()
    assert doubled(torch.ones(3, device=device), stream, lambda: None).tolist() == [2, 2, 2]


def test_each_work_is_replayed_by_itself(stream, device):
    """The second needs what the first has left behind; a trial inside fork_rng draws nothing that counts."""
    weight, found, left = torch.ones(4, device=device, requires_grad=True), torch.zeros(4, device=device), []

    def forward():
        left.append((weight * torch.rand(4, device=device)).sum())

    def backward():
        found.copy_(*torch.autograd.grad(left.pop(), weight))

    torch.manual_seed(5)
    with torch.enable_grad():
        replays = captured(forward, backward, pool=torch.cuda.graph_pool_handle(),
                           trial=torch.random.fork_rng([device]))
    torch.manual_seed(5)
    expected = [torch.rand(4, device=device) for _ in range(2)]
    torch.manual_seed(5)
    for factors in expected:
        for replay in replays:
            replay()
        assert torch.equal(found, factors)


def test_nobody_frees_what_a_graph_multiplies_in(stream, device):
    """As torch.compile(mode="reduce-overhead") does, of which a generator beside it died with an illegal access."""
    x, weight = (torch.randn(*size, device=device, dtype=torch.float16) / 64 for size in ((64, 4096), (1024, 4096)))
    found = torch.empty(64, 1024, device=device, dtype=torch.float16)
    bias = torch.zeros(1024, device=device, dtype=torch.float16)
    replay, = captured(lambda: found.copy_(x @ weight.t() + F.linear(x, weight, bias)))
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.zeros(1 << 22, device=device) for _ in range(64)]
    replay()
    torch.testing.assert_close(found, 2 * (x.double() @ weight.double().t()).half(), rtol=2e-3, atol=2e-3)
    assert not any(other.any() for other in others)
