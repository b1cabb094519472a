"""The one way in which this package captures CUDA graphs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """What is launched inside becomes ``graph``, whose memory comes from ``pool`` or else is its own.

    Nothing may disturb a capture. Other threads may go on using CUDA: fairseq's data loader pins memory in one of its
    own. And Python does not look for garbage meanwhile: to free what a graph or a pinned tensor held, in the middle of
    whatever line of ours, is among the calls that end a capture.
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
