"""The trainer behind lightseq-train: fairseq's, with each update a single graph on the GPU where that is possible.

Results of an update are looked at while the next one runs. Whenever fairseq is about to act on them (a log line,
validation, a checkpoint, the end of an epoch or of training) the trainer waits first, so that what is printed and
saved is exact. Where a whole step cannot be captured, fairseq's own loop runs and one line says why.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
from typing import Any, NamedTuple

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from lightseq_fairseq.layers.fp8 import DelayedScaling
from lightseq_fairseq.plugin.balanced_shards import BalancedShards
from lightseq_fairseq.plugin.flat_storage import FlatStorage
from lightseq_fairseq.plugin.ls_cross_entropy import LSCrossEntropyCriterion
from lightseq_fairseq.plugin.ls_label_smoothed_cross_entropy import LSLabelSmoothedCrossEntropyCriterion
from lightseq_fairseq.plugin.ls_masked_lm import LSMaskedLmLoss
from lightseq_fairseq.plugin.ls_roberta import LSRobertaModel
from lightseq_fairseq.plugin.ls_transformer import PackedTransformer
from lightseq_fairseq.plugin.ls_transformer_lm import LSTransformerLanguageModel
from lightseq_fairseq.plugin.packed_batch import PACKED, PackedBatch, PackingCollater
from lightseq_fairseq.plugin.pair_collater import PairCollater
from lightseq_fairseq.plugin.whole_step import Rates, Result, StepConfig, WholeStep

logger = logging.getLogger(__name__)

_EVERY_TOKEN = {"ls_label_smoothed_cross_entropy": LSLabelSmoothedCrossEntropyCriterion,
                "ls_cross_entropy": LSCrossEntropyCriterion}
_SERVED: dict[type, dict[str, type]] = {PackedTransformer: _EVERY_TOKEN, LSTransformerLanguageModel: _EVERY_TOKEN,
                                        LSRobertaModel: {"ls_masked_lm": LSMaskedLmLoss}}
"""Models whose updates can be one graph, and the criteria with which they can."""


class _Loop(NamedTuple):
    """Options that fairseq's loop, or ours, heeds after every update; to read one from the config takes 25 us."""

    seed: int
    intervals: tuple[int, ...]
    """Updates between log lines, checkpoints and validations, where there are such."""
    max_update: float
    always_looks: bool
    """Every update is waited for."""
    skip_remainder_batch: bool
    fp16: bool
    store_ema: bool
    shares_time: bool
    """--stop-time-hours ends several ranks."""


class LSTrainer(Trainer):
    """fairseq's Trainer; ``whole_step_devices`` are the device types whose steps are taken over."""

    whole_step_devices = ("cuda",)

    _step: WholeStep | None = None
    _pending: dict[str, Any] | None = None
    _train_iterator: Any = None
    _fp8_state: dict[str, torch.Tensor] | None = None
    """Of a checkpoint, for the step that is yet to be built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_fp8()

    # What can be a whole step ----------------------------------------------------------------------------------

    @functools.cached_property
    def obstacle(self) -> str | None:
        """Why this run's steps cannot be captured, or None."""
        cfg, model, criterion, task = self.cfg, self.get_model(), self.get_criterion(), type(self.task)
        criteria = next((served for kind, served in _SERVED.items() if isinstance(model, kind)), {})
        ours = bool(criteria)
        configs = [stack.config for stack in model.stacks] if ours else []
        obstacles = {
            f"the device is {self.device.type}": self.device.type not in self.whole_step_devices,
            "the model is neither ls_transformer, ls_bart, ls_transformer_lm nor ls_roberta": not ours,
            "the model has a forward of its own": ours and type(model).forward is not type(model).known_forward,
            f"the criterion is not {' or '.join(criteria)}":
                getattr(type(criterion), "forward", None) not in [kind.forward for kind in criteria.values()],
            "the task makes steps of its own": (task.train_step is not FairseqTask.train_step
                                                or task.optimizer_step is not FairseqTask.optimizer_step),
            "the optimizer is not ls_adam": getattr(cfg.optimizer, "_name", None) != "ls_adam",
            "fp32 parameters are not kept (--memory-efficient-fp16 or -bf16)":
                cfg.common.memory_efficient_fp16 or cfg.common.memory_efficient_bf16,
            "--amp scales on the host": cfg.common.amp,
            f"--ddp-backend {cfg.distributed_training.ddp_backend} owns the gradients":
                self.is_fsdp or cfg.distributed_training.ddp_backend == "slowmo",
            "the optimizer is sharded (--zero-sharding)": cfg.distributed_training.zero_sharding == "os",
            "--use-bmuf averages models": cfg.optimization.use_bmuf,
            "layers are dropped at random":
                any(max(config.encoder_layerdrop, config.decoder_layerdrop) > 0 for config in configs),
            "activations are recomputed (--checkpoint-activations)":
                getattr(cfg.model, "checkpoint_activations", False),
            "the task wants the EMA model": getattr(self.task, "uses_ema", False),
            "weights are quantized (--quantization-config-path)": cfg.common.quantization_config_path is not None,
        }
        return next((words for words, holds in obstacles.items() if holds), None)

    def _refuse_fp8(self) -> None:
        """ValueError that names everything in the way of --ls-fp8, if it is asked for."""
        common, model = self.cfg.common, self.cfg.model
        if not getattr(model, "ls_fp8", False):
            if getattr(model, "ls_fp8_keep_output", False):
                raise ValueError("--ls-fp8-keep-output says how --ls-fp8 multiplies: add that")
            return
        wrong = []
        if not (common.fp16 or common.bf16):
            wrong.append("it multiplies the tensors of 16-bit training: add --fp16 or --bf16")
        if self.obstacle is not None:
            wrong.append(f"it needs updates that are one graph, and these are not, because {self.obstacle}")
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) < (8, 9):
            wrong.append("it needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), and "
                         f"{torch.cuda.get_device_name(self.device)} is of an earlier one")
        if wrong:
            raise ValueError(f"--ls-fp8: {'; '.join(wrong)}. Without --ls-fp8 this trains in "
                             f"{'fp16' if common.fp16 else 'bf16' if common.bf16 else 'fp32'}")

    @property
    def use_distributed_wrapper(self) -> bool:
        """A whole step reduces gradients itself."""
        return super().use_distributed_wrapper and self.obstacle is not None

    def _whole_step(self) -> WholeStep | None:
        if self._step is None and self.obstacle is None:
            self._step = self._build_step()
        return self._step

    def _build_step(self) -> WholeStep:
        criterion, group = self.get_criterion(), self.optimizer.optimizer.param_groups[0]
        world = self.data_parallel_world_size
        config = StepConfig(
            epsilon=getattr(criterion, "eps", 0.0), pad=criterion.padding_idx,
            max_norm=self.cfg.optimization.clip_norm, report_accuracy=getattr(criterion, "report_accuracy", False),
            beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"], weight_decay=group["weight_decay"],
            group=self.data_parallel_process_group if world > 1 else None, world_size=world)
        model = self.get_model()
        storage = FlatStorage(self.optimizer, model.neighbouring_parameters())
        return WholeStep(model, storage, config, self._fp8_scaling(model, storage.param, config.group))

    def _fp8_scaling(self, model: Any, param: torch.Tensor, group: Any) -> DelayedScaling | None:
        if not getattr(self.cfg.model, "ls_fp8", False):
            return None
        kept = set()
        if getattr(self.cfg.model, "ls_fp8_keep_output", False):
            kept.add(model.decoder.output_projection.weight.data_ptr())
        matrices = sum(parameter.dim() == 2 for parameter in model.parameters())
        fp8 = DelayedScaling(param, 2 * matrices, kept, group)  # of a weight alone, and with its neighbours
        if self._fp8_state is not None:
            fp8.load_state_dict(self._fp8_state)
        return fp8

    # Steps ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _loop(self) -> _Loop:
        cfg = self.cfg
        intervals = (cfg.common.log_interval, cfg.checkpoint.save_interval_updates,
                     cfg.dataset.validate_interval_updates)
        by_time, store_ema = cfg.optimization.stop_time_hours > 0, bool(cfg.ema.store_ema)
        return _Loop(
            seed=cfg.common.seed, intervals=tuple(interval for interval in intervals if interval > 0),
            max_update=cfg.optimization.max_update or math.inf, always_looks=by_time or (store_ema and cfg.common.fp16),
            skip_remainder_batch=cfg.optimization.skip_remainder_batch, fp16=bool(cfg.common.fp16),
            store_ema=store_ema, shares_time=by_time and self.data_parallel_world_size > 1)

    @metrics.aggregate("train")
    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        """One update; the values it logs are those of the update before, unless fairseq is about to look at them.

        Returns None, as fairseq's does after an overflow, where there is nothing to log.
        """
        step = self._whole_step()
        if step is None:
            return super().train_step(samples, raise_oom)
        self._seed_generators()
        if not self.model.training:
            self.model.train()
            self.criterion.train()
        metrics.log_start_time("train_wall", priority=800, round=0)
        self._launch(step, samples)
        launched = self._pending
        logging_output = self._finish_previous() if launched["previous"] is not None else None
        self.set_num_updates(self.get_num_updates() + 1)
        if self._about_to_be_looked_at(len(samples)):
            logging_output = self.finish_steps()
            self._log_free_memory()
        overflowed = self._pending is None and logging_output is None
        if self._loop.shares_time:
            self._cumulative_training_time = self._mean_training_time()
        if self._loop.store_ema and not overflowed:
            self.ema.step(self.get_model(), self.get_num_updates())
            metrics.log_scalar("ema_decay", self.ema.get_decay(), priority=10000, round=5, weight=0)
        if self._loop.fp16:
            metrics.log_scalar("loss_scale", self.optimizer.scaler.loss_scale, priority=700, round=4, weight=0)
        metrics.log_stop_time("train_wall")
        return logging_output

    def _seed_generators(self) -> None:
        """fairseq's seed for this update, in the generators that a step may draw from.

        torch.manual_seed would besides note a stack trace for each kind of device that is not there.
        """
        seed = self._loop.seed + self.get_num_updates()
        torch.default_generator.manual_seed(seed)
        if self.cuda:
            torch.cuda.manual_seed(seed)

    def _log_free_memory(self) -> None:
        """``gb_free`` of fairseq's log lines, here what neither tensors nor graphs have reserved."""
        if self.cuda_env is not None:
            reserved = torch.cuda.memory_reserved() / 2**30
            metrics.log_scalar("gb_free", self.cuda_env.total_memory_in_GB - reserved, priority=1500, round=1, weight=0)

    def _mean_training_time(self) -> float:
        """Seconds over all ranks, the same on each, so that all stop after the same update."""
        seconds = torch.tensor([self._local_cumulative_training_time()], device=self.device)
        distributed_utils.all_reduce(seconds, group=self.data_parallel_process_group)
        return seconds.item() / self.data_parallel_world_size

    def _launch(self, step: WholeStep, samples: list[Any]) -> None:
        lr, scaler = self.optimizer.get_lr(), getattr(self.optimizer, "scaler", None)
        previous = self._pending
        if_good = if_overflow = Rates(lr, 1.0 if scaler is None else scaler.loss_scale)
        if previous is not None and scaler is not None:
            if_good = Rates(lr, _scale_after(scaler, overflow=False))
            if_overflow = Rates(previous["lr"], _scale_after(scaler, overflow=True))
        for i, sample in enumerate(samples):
            batch, counts = self._packed(sample)
            step.launch(batch, counts, if_good, if_overflow, first=i == 0, last=i == len(samples) - 1)
        self._pending = {"lr": if_good.lr, "lr_if_overflow": if_overflow.lr, "previous": previous}

    def _packed(self, sample: Any) -> tuple[PackedBatch, tuple[float, float, float]]:
        """A batch for the device and its sample size, tokens and sentences.

        No sample at all, where this rank has run out of batches before others, is one that counts nothing.
        """
        dummy = sample is None or len(sample) == 0
        sample, criterion = self._dummy_batch if dummy else sample, self.get_criterion()
        packed = sample.get(PACKED)
        if packed is None:
            packed = self._packer()(sample)[PACKED]
        batch = PackedBatch(*packed)
        if dummy:
            return batch.uncounted(criterion.padding_idx), (0.0, 0.0, 0.0)
        ntokens, nsentences = float(sample["ntokens"]), float(sample["nsentences"])
        if self._masks:
            return batch, (float(batch.real.target), ntokens, nsentences)
        return batch, (nsentences if criterion.sentence_avg else ntokens, ntokens, nsentences)

    @property
    def _masks(self) -> bool:
        """Whether only masked tokens are predicted."""
        return isinstance(self.get_criterion(), LSMaskedLmLoss)

    def _packer(self, collate: Any = None) -> PackingCollater:
        criterion = self.get_criterion()
        return PackingCollater(collate, criterion.padding_idx, getattr(criterion, "ignore_prefix_size", 0), self._masks)

    def _finish_previous(self) -> Any:
        """Take note of the update before the one just launched."""
        assert self._step is not None and self._pending is not None
        self._pending["previous"] = None
        return self._take_note(self._step.wait_for_previous())

    def finish_steps(self) -> Any:
        """Wait for the update under way, if there is one, and take note of it; returns what it logged."""
        pending, self._pending = self._pending, None
        if pending is None or self._step is None:
            return None
        return self._take_note(self._step.wait())

    def _take_note(self, result: Result) -> Any:
        """Loss scale, number of updates and log of an update that has ended; None if it overflowed."""
        try:
            if not self._was_made(result.norm):
                return None
        except FloatingPointError:
            self._pending = None
            self.consolidate_optimizer()
            self.save_checkpoint(os.path.join(self.cfg.checkpoint.save_dir, "crash.pt"), {})
            raise
        output = {"loss": result.loss, "ntokens": int(result.ntokens), "nsentences": int(result.nsentences),
                  "sample_size": result.sample_size}
        criterion = self.get_criterion()
        if isinstance(criterion, LSLabelSmoothedCrossEntropyCriterion):
            output["nll_loss"] = result.nll_loss
        if getattr(criterion, "report_accuracy", False):
            output.update(n_correct=torch.tensor(result.correct), total=torch.tensor(result.total))
        return self._reduce_and_log_stats([output], result.sample_size, torch.tensor(result.norm))

    def _was_made(self, norm: float) -> bool:
        """Whether the update whose gradient had this norm took place; FloatingPointError where training must end."""
        scaler = getattr(self.optimizer, "scaler", None)
        if scaler is None:
            if not math.isfinite(norm):
                raise FloatingPointError("gradients are Nan/Inf")
            return True
        try:
            scaler.check_overflow(norm)
        except OverflowError as overflow:
            logger.info("NOTE: gradient overflow detected, ignoring gradient, %s", overflow)
            if self._pending is not None:  # the one under way took the rates for this outcome
                self._pending["lr"] = self._pending["lr_if_overflow"]
            self.set_num_updates(self.get_num_updates() - 1)
            return False
        scaler.update()
        return True

    def _about_to_be_looked_at(self, batches: int) -> bool:
        """Whether fairseq's loop, or an average of the models, reads what the update under way decides.

        ``batches`` were taken for one update.
        """
        loop, updates = self._loop, self.get_num_updates()
        return (loop.always_looks or updates >= loop.max_update
                or any(updates % interval == 0 for interval in loop.intervals) or self._epoch_ends(batches))

    def _epoch_ends(self, batches: int) -> bool:
        """Whether no further update follows in this epoch, the next one taking at most as many batches."""
        if self._train_iterator is None:
            return False
        if not self._loop.skip_remainder_batch:
            return self._train_iterator.end_of_epoch()
        iterator = self._train_iterator._cur_epoch_itr
        return iterator.total - iterator.n < batches

    # Where fairseq looks ----------------------------------------------------------------------------------------

    def get_train_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """fairseq's, whose workers pack the batches of whole steps."""
        first = self._train_iterator is None
        iterator = self._train_iterator = super().get_train_iterator(*args, **kwargs)
        if self.obstacle is None and not isinstance(iterator.collate_fn, PackingCollater):
            iterator.collate_fn = self._packer(PairCollater.instead_of(iterator.collate_fn))
            if BalancedShards.suit(iterator):
                iterator.ordered_batches = BalancedShards(iterator)
        elif first and self.obstacle is not None and self.device.type in self.whole_step_devices:
            logger.info("an update is not one graph, because %s", self.obstacle)
        return iterator

    def begin_epoch(self, epoch: int) -> None:
        """fairseq's, once the updates before it are in the log."""
        self.finish_steps()
        super().begin_epoch(epoch)

    def lr_step(self, epoch: int, val_loss: float | None = None) -> Any:
        """fairseq's, by what the updates before it came to."""
        self.finish_steps()
        return super().lr_step(epoch, val_loss)

    def begin_valid_epoch(self, epoch: int) -> None:
        """fairseq's, once the updates before it are in the log."""
        self.finish_steps()  # while its log still goes to the training's meters
        super().begin_valid_epoch(epoch)

    def valid_step(self, sample: Any, raise_oom: bool = False) -> Any:
        """fairseq's, with the parameters of the update before it."""
        self.finish_steps()
        return super().valid_step(sample, raise_oom)

    def state_dict(self) -> Any:
        """fairseq's, parameters and moments where fairseq has them; ``extra_state`` holds FP8's scales, if any."""
        self.finish_steps()
        if self._step is not None:
            self._step.storage.write_back()
            if self._step.fp8 is not None:
                self._fp8_state = self._step.fp8.state_dict()
        state = super().state_dict()
        if self._fp8_state is not None:
            state["extra_state"]["ls_fp8"] = self._fp8_state
        return state

    def load_checkpoint(self, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any) -> Any:
        """fairseq's; what was captured before refers to storage that is no longer the optimizer's."""
        self.finish_steps()
        self._step = None
        extra_state = super().load_checkpoint(filename, reset_optimizer, *args, **kwargs)
        kept = extra_state is not None and not reset_optimizer and getattr(self.cfg.model, "ls_fp8", False)
        self._fp8_state = extra_state.get("ls_fp8") if kept else None
        return extra_state

    def reinitialize(self) -> None:
        """fairseq's; what was captured is captured anew."""
        self._step = self._pending = None
        super().reinitialize()


def _scale_after(scaler: Any, overflow: bool) -> float:
    """The loss scale that fairseq's scaler will have once the update under way has ended."""
    future = copy.copy(scaler)
    if not overflow:
        future.update()
        return future.loss_scale
    try:
        future.check_overflow(float("inf"))
    except (OverflowError, FloatingPointError):
        pass
    return future.loss_scale
