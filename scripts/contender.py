"""A contender of a benchmark in a process of its own.

Engines disturb one another in one process: once kernels have run in a third CUDA stream, those of every CUDA graph
begin 0.35 us later each (H200; see lightseq_fairseq/layers/capture.py), and CTranslate2 and torch.compile have streams
of their own. Nobody serves with two engines in one process.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class Failed(RuntimeError):
    """What the other process said."""


class Contender:
    """What ``make(*arguments)`` returns, made and called elsewhere."""

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, *arguments: Any) -> tuple[float, Any]:
        """Seconds of one call, until the device has nothing left to do, and what it returned. Failed if it failed."""
        self._connection.send(arguments)
        try:
            seconds, value = self._connection.recv()
        except EOFError:
            raise Failed("its process ended") from None
        if seconds is None:
            raise Failed(value)
        return seconds, value

    def close(self) -> None:
        """End the process, which frees what it holds."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    run, reason = None, ""
    try:
        run = make(*arguments)
    except Exception as error:
        reason = _words(error)
    while True:
        try:
            given = connection.recv()
        except EOFError:
            return
        try:
            if run is None:
                raise Failed(reason)
            synchronize()
            start = time.perf_counter()
            value = run(*given)
            synchronize()
            connection.send((time.perf_counter() - start, value))
        except Exception as error:
            connection.send((None, _words(error)))


def synchronize() -> None:
    """Until the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _words(error: Exception) -> str:
    if isinstance(error, Failed):
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
