"""The one way in which this package captures CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

_TURNS = threading.RLock()
"""Held by the thread that captures: the stream is one for all."""


@functools.cache
def side_stream(device: int) -> torch.cuda.Stream:
    """The one stream besides the default one that graphs are captured in, and tried first.

    Once kernels have run in a third stream, those of every graph begin 0.35 us later each (H200, CUDA 13.0): 130 steps
    of BART-large took 139 ms instead of 132.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """What is launched inside becomes ``graph``, whose memory comes from ``pool`` or else is its own.

    Nothing may disturb a capture. Other threads may go on using CUDA: fairseq's data loader pins memory in one of its
    own. And Python does not look for garbage meanwhile, in the middle of whatever line of ours: to free another graph
    ends a capture.
    """
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()


def captured(*works: Callable[[], None], pool: Any = None,
             trial: AbstractContextManager[object] | None = None) -> list[Callable[[], None]]:
    """What replays each of ``works``, to be called in their order, as they may need what those before leave behind.

    They run twice: as they are, inside ``trial`` if given, so that what a first call sets up is no part of a graph;
    and captured, on this thread, backward passes too, which autograd would run on one of its own.

    cuBLAS's workspace comes from the graphs' memory: that which torch keeps for a stream is freed by every capture of
    torch.compile(mode="reduce-overhead"), and graphs would go on writing to it.
    """
    graphs = []
    stream = side_stream(torch.cuda.current_device())
    with _TURNS, torch.autograd.set_multithreading_enabled(False):
        stream.wait_stream(torch.cuda.current_stream())
        with trial or contextlib.nullcontext(), torch.cuda.stream(stream):
            for work in works:
                work()
        torch.cuda.current_stream().wait_stream(stream)
        if pool is None:
            torch.cuda.empty_cache()  # the graphs' memory is their own
        for work in works:
            graphs.append(torch.cuda.CUDAGraph())
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with capture(graphs[-1], stream, pool):
                    work()
            finally:
                torch._C._cuda_clearCublasWorkspaces()
    return [graph.replay for graph in graphs]
