"""Forward and backward of a whole stack as CUDA graphs for each size of batch, inside any loop.

A thousand launches from the host become two. What replays is what the layers do one by one, on copies of its inputs:
packed tokens, filled up with rows that belong to no sentence, where sentences begin, and the seeds of the dropouts.
Gradients come out as those of any autograd function. A forward pass whose backward pass is still to come keeps its
graph's memory, so that until then others run layer by layer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable
from transformers.cache_utils import EncoderDecoderCache

from lightseq_fairseq.huggingface.caching_attention import CachingAttention, fill_cache
from lightseq_fairseq.huggingface.packed_layer import LayerInputs, PackedLayer, Run
from lightseq_fairseq.layers import Packing
from lightseq_fairseq.layers.capture import captured

logger = logging.getLogger(__name__)

_STEPS = 8
"""Sizes for which graphs are made between a number of tokens and its double: at most 1 / 8 of a batch is filling."""
_LEAST = 64
_MOST_GRAPHS = 48
"""Of one stack; batches of yet other sizes run layer by layer."""


Slot = tuple[dict[str, Any], str]
"""A module's parameters by name, and one of the names."""


class Size(NamedTuple):
    """What a graph is made for."""

    rows: int
    sentences: int
    width: int
    source_rows: int
    """0 where there is no source, as ``source_width``."""
    source_width: int
    dtype: torch.dtype
    source_dtype: torch.dtype | None
    grad: bool
    """Whether a backward pass may follow."""
    inputs_need_grad: tuple[bool, bool]
    autocast: torch.dtype | None
    dropouts: tuple[tuple[float, ...], ...]
    """Of each layer; all 0 outside training."""
    layers: tuple[int, ...]
    """Their ids, in their order."""
    keeps: bool
    """Whether keys and values of self-attention come out too."""


def rounded(count: int) -> int:
    """The least size for which there is a graph that holds ``count`` tokens."""
    step = max(_LEAST, (1 << max(count - 1, 1).bit_length()) // 2 // _STEPS)
    return -(-count // step) * step


class _Passes(NamedTuple):
    """The two passes of one size, and the buffers that they read and write."""

    forward: Callable[[], None]
    backward: Callable[[], None]
    x: Tensor
    """(rows, C)"""
    edge: Tensor
    """(rows, C): the output, then its gradient, then the gradient of ``x``."""
    source: Tensor | None
    dsource: Tensor | None
    cu_seqlens: Tensor
    source_cu_seqlens: Tensor | None
    seeds: Tensor | None
    keys_values: Tensor | None
    """(rows, layers, 2, H, D), where they are kept."""
    used: list[bool]
    """Which parameters get gradients; known when ``backward`` has run or been captured."""


class GraphedStack:
    """Graphs of one stack; ``devices`` are the device types on which they are used.

    On a device without graphs the same functions run one kernel after another, which is for tests. Copies and pickles
    begin without graphs.
    """

    devices = ("cuda",)

    def __init__(self) -> None:
        self.said: set[str] = set()
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedStack, ()

    def _forget(self) -> None:
        self.params: list[Tensor] = []
        self.slots: list[Slot] = []
        self.addresses: list[tuple[int, int, bool]] = []
        self.passes: dict[Size, _Passes] = {}
        self.seen: set[tuple[Any, ...]] = set()
        self.pool: Any = None
        self.awaiting: weakref.ref[_Turn] | None = None

    def replay_for(self, layers: Sequence[PackedLayer], run: Run, hidden_states: Tensor,
                   slots: list[Slot]) -> Callable[[Run, Tensor], Tensor] | None:
        """What computes ``run`` from the packed input of the first of ``layers`` to the output of the last; None where
        they have to be called. ``slots`` hold all of their parameters."""
        if hidden_states.device.type not in self.devices:
            return None
        source = run.source
        tensors = [hidden_states, *(owner[name] for owner, name in slots), *([] if source is None else [source])]
        grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        obstacle = self._obstacle(layers, run, hidden_states, grad)
        if obstacle is not None:
            self._say(obstacle)
            return None
        if not self._adopt(slots, hidden_states.device):
            self._say("parameters are on several devices, or made in inference mode")
            return None
        device = hidden_states.device.type
        size = Size(
            rows=rounded(run.packing.count), sentences=run.packing.batch, width=rounded(run.packing.width),
            source_rows=0 if source is None else rounded(source.size(0)),
            source_width=0 if run.source_packing is None else rounded(run.source_packing.width),
            dtype=hidden_states.dtype, source_dtype=None if source is None else source.dtype, grad=grad,
            inputs_need_grad=(grad and hidden_states.requires_grad,
                              grad and source is not None and source.requires_grad),
            autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            dropouts=tuple(layer.dropouts() for layer in layers), layers=tuple(map(id, layers)),
            keeps=run.inputs.past_key_values is not None)
        kind = size[5:]  # all but the numbers
        if kind not in self.seen:  # libraries set themselves up in the first step of a kind
            self.seen.add(kind)
            return None
        if size not in self.passes and len(self.passes) == _MOST_GRAPHS:
            self._say(f"there are {_MOST_GRAPHS} graphs of other sizes of batch")
            return None
        if size not in self.passes:
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                self.passes[size] = self._capture(size, layers, run, hidden_states)

        def replay(run: Run, x: Tensor) -> Tensor:
            y: Tensor
            if not grad:
                _load(self.passes[size], run, x)
                self.passes[size].forward()
                return self.passes[size].edge[:x.size(0)].clone()
            turn = _Turn(self, self.passes[size], run)
            self.awaiting = weakref.ref(turn)
            y, keys_values = _Replay.apply(turn, x, run.source, *self.params)  # type: ignore[no-untyped-call]
            if keys_values is not None:
                for index, layer in enumerate(layers):
                    fill_cache(run.packing, run.inputs.past_key_values, _attention(layer).layer_idx,
                               keys_values[:, index])
            return y

        return replay

    def _say(self, obstacle: str) -> None:
        """Each once."""
        if obstacle not in self.said:
            self.said.add(obstacle)
            logger.info("layers run one by one, not as a CUDA graph, because %s", obstacle)

    def _obstacle(self, layers: Sequence[PackedLayer], run: Run, hidden_states: Tensor, grad: bool) -> str | None:
        awaited = self.awaiting() if self.awaiting is not None else None
        obstacles = {
            "an earlier forward pass still awaits its backward pass": awaited is not None and not awaited.over,
            "keys and values are kept, for decoding or of a source": run.inputs.past_key_values is not None
                and (not grad or isinstance(run.inputs.past_key_values, EncoderDecoderCache)),
            "activations are checkpointed":
                any(getattr(layer, "gradient_checkpointing", False) and layer.training for layer in layers),
            "the model is a replica": any(getattr(layer, "_is_replica", False) for layer in layers),
            "the caller captures a graph": hidden_states.is_cuda and torch.cuda.is_current_stream_capturing(),
        }
        return next((words for words, holds in obstacles.items() if holds), None)

    def _adopt(self, slots: list[Slot], device: torch.device) -> bool:
        """Start anew where a parameter, or its memory, is another than that which graphs refer to; False where some
        are not on ``device``."""
        params = [owner[name] for owner, name in slots]
        addresses = [(id(param), param.data_ptr(), param.requires_grad) for param in params]
        if addresses == self.addresses:
            return True
        self._forget()
        if any(param.device != device or param.is_inference() for param in params):
            return False
        self.addresses, self.slots = addresses, slots
        self.params = [param for param in dict.fromkeys(params) if param.requires_grad]
        self.flat: dict[torch.dtype, Tensor] = {}
        return True

    @contextlib.contextmanager
    def _leaves(self) -> Iterator[list[Tensor]]:
        """New tensors of the same memory in the place of all parameters; yields those that are trained.

        Hooks on a parameter run once this way, outside, and nothing of the graph depends on the stream in which
        somebody used the parameter first.
        """
        params = [owner[name] for owner, name in self.slots]
        leaves = {param: param.detach().requires_grad_(param.requires_grad) for param in dict.fromkeys(params)}
        try:
            for (owner, name), param in zip(self.slots, params, strict=True):
                owner[name] = leaves[param]
            yield [leaves[param] for param in self.params]
        finally:
            for (owner, name), param in zip(self.slots, params, strict=True):
                owner[name] = param

    def views(self, flat: dict[torch.dtype, Tensor]) -> list[Tensor]:
        """The parts of ``flat``, one tensor for each type, that belong to the parameters."""
        parts = {dtype: iter(_unflatten_dense_tensors(  # type: ignore[no-untyped-call]
            tensor, [param for param in self.params if param.dtype == dtype])) for dtype, tensor in flat.items()}
        return [next(parts[param.dtype]) for param in self.params]

    def _capture(self, size: Size, layers: Sequence[PackedLayer], run: Run, hidden_states: Tensor) -> _Passes:
        """The passes of ``size``; on CUDA as graphs, which share their memory, as their turns do not overlap."""
        device, dim = hidden_states.device, hidden_states.size(-1)
        zeros: Callable[..., Tensor] = torch.zeros
        x = zeros(size.rows, dim, dtype=size.dtype, device=device)
        source = dsource = source_cu = None
        if run.source is not None:
            source = zeros(size.source_rows, run.source.size(-1), dtype=size.source_dtype, device=device)
            dsource = torch.zeros_like(source)
            source_cu = zeros(size.sentences + 1, dtype=torch.int32, device=device)
        passes = _Passes(lambda: None, lambda: None, x, torch.zeros_like(x), source, dsource,
                         zeros(size.sentences + 1, dtype=torch.int32, device=device), source_cu,
                         None if run.seeds is None else torch.zeros_like(run.seeds), None, [])
        if size.keeps:
            attention = _attention(layers[0])
            passes = passes._replace(keys_values=zeros(
                size.rows, len(layers), 2, attention.num_heads, attention.head_dim, device=device,
                dtype=size.dtype if size.autocast is None else size.autocast))
        if size.grad and not self.flat:
            self.flat = {dtype: torch.zeros(sum(param.numel() for param in self.params if param.dtype == dtype),
                                            dtype=dtype, device=device)
                         for dtype in {param.dtype for param in self.params}}
            self.grads = self.views(self.flat)
        functions = self._functions(size, passes, layers, run.causal)
        if not hidden_states.is_cuda:
            return passes._replace(forward=functions[0], backward=functions[1])
        with torch.cuda.device(device):
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            replays = captured(*(functions if size.grad else functions[:1]), pool=self.pool)
        return passes._replace(forward=replays[0], backward=replays[-1])

    def _functions(self, size: Size, passes: _Passes, layers: Sequence[PackedLayer],
                   causal: bool) -> tuple[Callable[[], None], Callable[[], None]]:
        """The two passes, the second of which needs what the first has left behind."""
        nobody = passes.cu_seqlens[:0].long()
        packing = Packing(None, passes.cu_seqlens, nobody, size.sentences, size.width)
        source_packing = None
        if passes.source_cu_seqlens is not None:
            source_packing = Packing(None, passes.source_cu_seqlens, nobody, size.sentences, size.source_width)
        device = passes.x.device.type
        left: list[tuple[Tensor, list[Tensor]]] = []  # the output, and what to differentiate it by

        def forward() -> None:
            x = passes.x.detach().requires_grad_(size.inputs_need_grad[0])
            source = None
            if passes.source is not None:
                source = passes.source.detach().requires_grad_(size.inputs_need_grad[1])
            inputs = [tensor for tensor in (x, source) if tensor is not None and tensor.requires_grad]
            run = Run(packing, source_packing, causal, passes.seeds, True, LayerInputs(), source)
            # casts that autocast keeps would be the graph's memory
            with self._leaves() as leaves, torch.autocast(device, size.autocast, enabled=size.autocast is not None,
                                                          cache_enabled=False):
                for index, layer in enumerate(layers):
                    if passes.keys_values is None:
                        x = layer.compute(x, source, run, run.next_seeds())
                        continue
                    _attention(layer).keep = functools.partial(_copy_values, passes.keys_values[:, index])
                    try:
                        x = layer.compute(x, source, run, run.next_seeds())
                    finally:
                        _attention(layer).keep = None
            passes.edge.copy_(x.detach())
            if size.grad:
                left.append((x, [*inputs, *leaves]))

        def backward() -> None:
            y, inputs = left.pop()
            grads = list(torch.autograd.grad(y, inputs, passes.edge.to(y.dtype), allow_unused=True))
            for place, needed in ((passes.edge, size.inputs_need_grad[0]), (passes.dsource, size.inputs_need_grad[1])):
                if needed and place is not None:
                    grad = grads.pop(0)
                    place.zero_() if grad is None else place.copy_(grad)
            passes.used[:] = [grad is not None for grad in grads]
            pairs = [(place, grad) for place, grad in zip(self.grads, grads, strict=True) if grad is not None]
            if pairs:
                torch._foreach_copy_([place for place, _ in pairs], [grad for _, grad in pairs])

        return forward, backward


class _Turn:
    """A forward pass and the backward pass that belongs to it."""

    def __init__(self, stack: GraphedStack, passes: _Passes, run: Run) -> None:
        self.stack, self.passes, self.run, self.over = stack, passes, run, False


class _Replay(torch.autograd.Function):
    """The output of a stack, and keys and values where kept, of its inputs (N, C) and (M, C) and its parameters."""

    @staticmethod
    def forward(ctx: Any, turn: _Turn, x: Tensor, source: Tensor | None,
                *params: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.turn, passes, run = turn, turn.passes, turn.run
        ctx.rows, ctx.source_rows = x.size(0), 0 if source is None else source.size(0)
        _load(passes, run, x)
        with torch.enable_grad():
            passes.forward()
        ctx.set_materialize_grads(False)
        return (passes.edge[:ctx.rows].clone(),
                None if passes.keys_values is None else passes.keys_values[:ctx.rows].clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dkeys_values: Tensor | None) -> tuple[Tensor | None, ...]:
        turn, passes, stack = ctx.turn, ctx.turn.passes, ctx.turn.stack
        if dkeys_values is not None:
            raise RuntimeError("gradients through past_key_values are not to be had from CUDA graphs; replace the "
                               "layers by accelerate(model, graphs=False)")
        if turn.over:
            raise RuntimeError("the layers of this forward pass, CUDA graphs, have had their backward pass; compute it "
                               "anew for another, or replace them by accelerate(model, graphs=False)")
        turn.over = True
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        _fill(passes.edge, dy)
        with torch.enable_grad():
            passes.backward()
        dx = passes.edge[:ctx.rows].clone() if ctx.needs_input_grad[1] else None
        dsource = passes.dsource[:ctx.source_rows].clone() if ctx.needs_input_grad[2] else None
        grads = stack.views({dtype: tensor.clone() for dtype, tensor in stack.flat.items()})  # autograd keeps them
        return None, dx, dsource, *(grad if used else None for grad, used in zip(grads, passes.used, strict=True))


def _load(passes: _Passes, run: Run, x: Tensor) -> None:
    """All that the passes read, into their buffers."""
    _fill(passes.x, x)
    passes.cu_seqlens.copy_(run.packing.cu_seqlens)
    if run.source is not None and run.source_packing is not None:
        assert passes.source is not None and passes.source_cu_seqlens is not None
        _fill(passes.source, run.source)
        passes.source_cu_seqlens.copy_(run.source_packing.cu_seqlens)
    if run.seeds is not None:
        assert passes.seeds is not None
        passes.seeds.copy_(run.seeds)


def _fill(place: Tensor, rows: Tensor) -> None:
    """``rows`` (N, ...) into ``place`` (N' >= N, ...), 0 behind them."""
    place[:rows.size(0)].copy_(rows)
    place[rows.size(0):].zero_()


def _copy_values(place: Tensor, values: Tensor) -> None:
    """Without their history."""
    place.copy_(values.detach())


def _attention(layer: PackedLayer) -> CachingAttention:
    attention = layer.self_attn
    assert isinstance(attention, CachingAttention)
    return attention
