"""Run-time repairs that let fairseq work on today's Python, numpy and torch.

:func:`apply` is called once, before anything of ours is registered. Each repair is one function whose docstring
names the symptom it removes; a repair that finds nothing to mend changes nothing, so fairseq-fixed, a checkout of
fairseq main and 0.12.2 are served alike. Nothing is written to site-packages, and ``torch.load`` stays on
``weights_only``: the types that fairseq's checkpoints hold are allowed by name.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import dataclasses
import functools
import importlib
import inspect
import queue
import sys
import threading
import time
import types
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def hashable_dataclasses() -> Iterator[None]:
    """``ValueError: mutable default <class ...CommonConfig> for field common is not allowed: use default_factory``.

    fairseq main and 0.12.2 use dataclass instances as field defaults, which Python 3.11 and later take for mutable
    because ``@dataclass`` sets ``__hash__`` to None. Inside this context it does not.
    """
    actions = dataclasses._hash_action  # type: ignore[attr-defined]
    plain = (False, True, False, False)  # unsafe_hash, eq, frozen, has an explicit __hash__
    stock = actions[plain]
    actions[plain] = None
    try:
        yield
    finally:
        actions[plain] = stock


class _Later:
    """A module, or what it holds, that is imported when it is first used."""

    def __init__(self, module: str, attribute: str | None = None) -> None:
        self._place = module, attribute

    def _found(self) -> Any:
        name, attribute = self._place
        module = importlib.import_module(name)
        return module if attribute is None else getattr(module, attribute)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)


@contextlib.contextmanager
def imports_put_off() -> Iterator[None]:
    """A second of every command's start goes into scikit-learn and scipy.stats, for the scores of two speech and GLUE
    tasks. Inside this context they seem to be there; they are imported when one of those scores is computed."""
    held = {"sklearn": ("metrics",), "sklearn.metrics": ("f1_score", "matthews_corrcoef"),
            "scipy.stats": ("pearsonr", "spearmanr")}
    put_off = {name: types.ModuleType(name) for name in held if name not in sys.modules}

    def restore() -> None:
        for name, module in put_off.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def unforeseen(name: str, attribute: str) -> Any:
        """What somebody else wants of them meanwhile comes from the real ones."""
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        restore()
        return getattr(importlib.import_module(name), attribute)

    for name, module in put_off.items():
        module.__getattr__ = functools.partial(unforeseen, name)  # type: ignore[method-assign]
        for attribute in held[name]:
            path = f"{name}.{attribute}"
            setattr(module, attribute, _Later(path) if path in held else _Later(name, attribute))
    sys.modules.update(put_off)
    try:
        yield
    finally:
        restore()


def import_fairseq(name: str = "fairseq") -> types.ModuleType:
    """Import ``fairseq``, or a module of it or of ``fairseq_cli``, on every Python that we support."""
    with hashable_dataclasses(), imports_put_off():
        return importlib.import_module(name)


def allow_checkpoint_types() -> None:
    """``UnpicklingError: Weights only load failed ... Unsupported global: GLOBAL argparse.Namespace``.

    Raised by every command that reads a checkpoint of an argparse-configured model, by checkpoints written with
    ``--eval-bleu`` (numpy arrays in their meters) and, on ranks above 0, by a multi-GPU resume, where rank 0
    broadcasts the pickled configuration (omegaconf). The names below are all that such files hold.
    """
    import omegaconf
    from fairseq.distributed.utils import _TensorPlaceholder
    from fairseq.logging import meters

    allowed: list[Any] = [argparse.Namespace, _TensorPlaceholder, collections.defaultdict, typing.Any,
                          dict, list, tuple, int, float, str, bool,
                          omegaconf.DictConfig, omegaconf.ListConfig,
                          omegaconf.base.ContainerMetadata, omegaconf.base.Metadata]
    allowed += [getattr(omegaconf, kind + "Node") for kind in ("Any", "String", "Integer", "Float", "Boolean", "Enum")]
    allowed += [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("i8", "i4", "f8", "f4", "?"))]
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    for function in (multiarray._reconstruct, multiarray.scalar):
        for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # written by numpy 2, by numpy 1
            allowed.append((function, f"{module}.{function.__name__}"))
    for meter in (meters.AverageMeter, meters.TimeMeter, meters.StopwatchMeter):
        for module in ("fairseq.meters", "fairseq.logging.meters"):  # pickled whole before fairseq 0.9
            allowed.append((meter, f"{module}.{meter.__name__}"))
    torch.serialization.add_safe_globals(allowed)


def restore_numpy_names() -> None:
    """``AttributeError: module 'numpy' has no attribute 'compat'`` (and ``'int'``, ``'float'``).

    Raised by ``--sample-break-mode eos``, ``--num-batch-buckets`` and the speech and CRF code.
    """
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)
    for name, builtin in (("int", int), ("float", float)):
        if name not in vars(np):
            setattr(np, name, builtin)


def restore_get_buckets() -> None:
    """``TypeError: percentile() got an unexpected keyword argument 'interpolation'`` (``--num-batch-buckets``)."""
    from fairseq.data import bucket_pad_length_dataset, data_utils

    def get_buckets(sizes: Any, num_buckets: int) -> np.ndarray:
        bounds = np.percentile(sizes, np.linspace(0, 100, num_buckets + 1), method="lower")
        return np.unique(bounds[1:])

    for module in (data_utils, bucket_pad_length_dataset):
        module.get_buckets = get_buckets


def keep_bf16_off_the_tpu() -> None:
    """``AttributeError: 'NoneType' object has no attribute 'xla_device'`` under ``--bf16`` on a CPU or a GPU.

    fairseq sets ``args.tpu`` wherever ``--bf16`` is given; here it is set only where ``--tpu`` is. For the same reason
    it says ``Cannot combine --fp16 and --tpu`` to who never named a TPU but ``--fp16`` and ``--bf16``.
    """
    from fairseq import options

    stock = options.parse_args_and_arch

    @functools.wraps(stock)
    def parse_args_and_arch(parser, input_args=None, *rest, **kwargs):
        given = sys.argv[1:] if input_args is None else input_args
        try:
            result = stock(parser, input_args, *rest, **kwargs)
        except ValueError as error:
            if "--fp16 and --tpu" not in str(error) or "--tpu" in given:
                raise
            raise ValueError("--fp16 and --bf16 exclude each other: give one of them") from error
        args = result[0] if isinstance(result, tuple) else result
        if getattr(args, "bf16", False) and "--tpu" not in given:
            args.tpu = False
        return result

    options.parse_args_and_arch = parse_args_and_arch


def reset_multiply_factor() -> None:
    """``--bf16`` with an optimizer that takes ``step(scale=...)``: gnorm falls towards 0 from the second update on.

    FP16Optimizer collects what the gradients must be multiplied with, and begins again in ``zero_grad`` only when
    there is a loss scaler, which bf16 has not.
    """
    from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin

    stock = _FP16OptimizerMixin.zero_grad

    @functools.wraps(stock)
    def zero_grad(self):
        stock(self)
        if self.scaler is None:
            self._multiply_factor = 1.0

    _FP16OptimizerMixin.zero_grad = zero_grad


def keep_norms_beside_their_gradients() -> None:
    """``RuntimeError: scalar tensor is expected to be on cpu but is on cuda:0`` under ``--cpu`` where there is a GPU.

    fairseq gathers the gradients' norms on a GPU if there is one, wherever the gradients are.
    """
    from fairseq import utils

    stock = utils.clip_grad_norm_

    @functools.wraps(stock)
    def clip_grad_norm_(params, max_norm, aggregate_norm_fn=None):
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        devices = [param.grad.device for param in params if getattr(param, "grad", None) is not None]

        def aggregate(norm):
            norm = norm.to(devices[0])
            return norm if aggregate_norm_fn is None else aggregate_norm_fn(norm)

        return stock(params, max_norm, aggregate)

    utils.clip_grad_norm_ = clip_grad_norm_


def keep_encoder_layers_off_the_fast_path() -> None:
    """``RuntimeError: Mask Type should be defined`` in every evaluation under fairseq 0.12.2.

    Its encoder layers call a private torch function whose signature has changed since; later fairseq does not.
    """
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase as Layer

    if "in_proj_weight" not in Layer.forward.__code__.co_names:
        return
    stock = Layer.__init__

    @functools.wraps(stock)
    def __init__(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        self.BT_version = self.can_use_fastpath = False

    Layer.__init__ = __init__


def end_prefetching_before_exit() -> None:
    """``terminate called without an active exception``, exit status 134, after a run that stopped within an epoch.

    fairseq's thread that prepares batches is still at it when the interpreter goes away under it. Here it is told
    that its batch is the last one, and waited for.
    """
    from fairseq.data.iterators import BackgroundConsumer

    def end_prefetching(patience: float = 10.0) -> None:
        deadline = time.monotonic() + patience
        for thread in threading.enumerate():
            if isinstance(thread, BackgroundConsumer):
                thread._max_len = 0
                while thread.is_alive() and time.monotonic() < deadline:
                    with contextlib.suppress(queue.Empty):  # room for what it holds
                        thread._queue.get(timeout=0.02)

    atexit.register(end_prefetching)


def resume_with_the_batches_of_the_first_epoch() -> None:
    """A run resumed in epoch 2 or later leaves the loss curve of the run that was never interrupted.

    fairseq draws the batches with seed + epoch when it first needs them, and keeps them: an uninterrupted run
    trains on the batches of epoch 1 throughout, in a new order each epoch, but a resumed one draws new ones. The
    uninterrupted run is taken to be right, since no run should depend on where it was stopped, and its curve stays
    as it is: where batches are kept (not with --update-epoch-batch-itr, sharded data or a dataset that changes by
    epoch), they are drawn as in epoch 1.
    """
    from fairseq.tasks.fairseq_task import FairseqTask

    stock = FairseqTask.get_batch_iterator
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def get_batch_iterator(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        dataset, epoch = given["dataset"], given.get("epoch", 1)
        batches_are_kept = (
            not given.get("disable_iterator_cache") and not given.get("update_epoch_batch_itr")
            and not getattr(self.cfg, "rebuild_batches", False) and self.can_reuse_epoch_itr(dataset))
        if epoch <= 1 or not batches_are_kept or dataset in self.dataset_to_epoch_iter:
            return stock(*call.args, **call.kwargs)
        given["epoch"] = 1
        iterator = stock(*call.args, **call.kwargs)
        dataset.set_epoch(epoch)
        iterator.epoch = epoch
        return iterator

    FairseqTask.get_batch_iterator = get_batch_iterator


def resume_at_the_scale_of_amp() -> None:
    """A run with ``--amp`` that is resumed skips updates again, which it had skipped when it began.

    fairseq's checkpoints hold the loss scale of ``--fp16``, but not that of ``--amp``, which begins anew. Stock fairseq
    reads such checkpoints as it reads its own.
    """
    from fairseq.optim.amp_optimizer import AMPOptimizer

    stock_save, stock_load = AMPOptimizer.state_dict, AMPOptimizer.load_state_dict

    @functools.wraps(stock_save)
    def state_dict(self):
        return {**stock_save(self), "grad_scaler": self.scaler.state_dict()}

    @functools.wraps(stock_load)
    def load_state_dict(self, state_dict, optimizer_overrides=None):
        scaler = state_dict.get("grad_scaler")
        if scaler:  # empty where nothing is scaled
            self.scaler.load_state_dict(scaler)
        stock_load(self, state_dict, optimizer_overrides)

    AMPOptimizer.state_dict, AMPOptimizer.load_state_dict = state_dict, load_state_dict


REPAIRS = (
    allow_checkpoint_types,
    restore_numpy_names,
    restore_get_buckets,
    keep_bf16_off_the_tpu,
    reset_multiply_factor,
    keep_norms_beside_their_gradients,
    keep_encoder_layers_off_the_fast_path,
    end_prefetching_before_exit,
    resume_with_the_batches_of_the_first_epoch,
    resume_at_the_scale_of_amp,
)


def recorded_as(stock: type) -> typing.Callable[[type], type]:
    """``AssertionError: Optimizer does not match; please reset the optimizer``, for ours as much as for the criterion.

    fairseq writes the ``__name__`` of both classes into a checkpoint and compares it on resume. A class with this
    decorator is written as ``stock``, whose state it shares, so that runs move between the two in both directions;
    put it outside the registering decorator.
    """
    def rename(ours: type) -> type:
        ours.__name__ = stock.__name__
        return ours

    return rename


@functools.cache
def apply() -> None:
    """Import fairseq and make every repair; calling it again changes nothing."""
    import_fairseq()
    for repair in REPAIRS:
        repair()
