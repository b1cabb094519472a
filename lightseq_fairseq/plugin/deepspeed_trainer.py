"""The trainer behind lightseq-deepspeed: fairseq's, whose updates a DeepSpeed engine makes with ZeRO stage 1.

Each rank keeps fp32 parameters and moments of its share of the model alone. Arguments, log lines and checkpoints are
those of lightseq-train and of stock fairseq, in both directions; updates are not captured as graphs.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from fairseq import optim
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.optim import FairseqOptimizer, lr_scheduler
from fairseq.optim.adam import FairseqAdam
from fairseq.optim.fp16_optimizer import FP16Optimizer
from fairseq.trainer import Trainer
from torch import Tensor

from lightseq_fairseq.fairseq_compat import recorded_as
from lightseq_fairseq.optim import MOMENTS

logger = logging.getLogger(__name__)

_LOSSES_TO_ONE = 9
"""log2 of how many times larger the loss scale is than --fp16-init-scale: losses are divided by the number of tokens
before they are scaled, not after, and that is some hundreds at the least."""


class ZeroOptimizer(FairseqOptimizer):
    """fairseq's view of a DeepSpeed engine around ls_adam, whose state it reads and writes in fairseq's form.

    ``params`` are the model's, in fairseq's order; ``flat`` says that fairseq would keep them in one tensor.
    """

    def __init__(self, cfg: Any, engine: Any, inner: FairseqOptimizer, params: list[Tensor], flat: bool) -> None:
        super().__init__(cfg)
        self.engine, self.inner, self.model_params, self.flat = engine, inner, params, flat
        self.loss_factor = 1.0
        (self.partition,) = engine.optimizer.single_partition_of_fp32_groups
        (ordered,), (offsets,) = engine.optimizer.round_robin_bit16_groups, engine.optimizer.round_robin_bit16_offsets
        places = {id(param): offset for param, offset in zip(ordered, offsets, strict=True)}
        self.offsets = [places[id(param)] for param in params]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over this rank's share."""
        return self.inner.optimizer

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """That of the optimizer inside."""
        return self.inner.optimizer_config

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss_factor`` times the loss; the engine reduces them in the last batch of an update."""
        self.engine.backward(loss * self.loss_factor)

    def state_dict(self) -> dict[str, Any]:
        """fairseq's, gathered from all ranks, each of which must call."""
        own = self.optimizer.state.get(self.partition, {})
        whole = {name: self._gathered(own[name]) for name in MOMENTS if name in own}
        state: dict[int, Any] = {}
        if whole:
            states = [{"step": own["step"], **{name: self._cut(whole[name], i) for name in MOMENTS}}
                      for i in range(len(self.model_params))]
            state = {0: _joined(states)} if self.flat else dict(enumerate(states))
        group = {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}
        count = 1 if self.flat else len(self.model_params)
        scale = {"loss_scale": self.engine.optimizer.loss_scale} if self.flat else {}
        return {"state": state, "param_groups": [{**group, "params": list(range(count))}], **scale}

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        """Take this rank's share of a state in fairseq's form, flat or not."""
        states = list(state_dict["state"].values())
        if states:
            self.optimizer.state[self.partition] = {
                "step": int(states[0]["step"]), **{name: self._share(states, name) for name in MOMENTS}}
        for group in self.optimizer.param_groups:
            group.update({**self.optimizer_config, **(optimizer_overrides or {})})

    def _gathered(self, share: Tensor) -> Tensor:
        if dist.get_world_size() == 1:
            return share
        whole = share.new_empty(share.numel() * dist.get_world_size())
        dist.all_gather_into_tensor(whole, share)
        return whole

    def _cut(self, whole: Tensor, index: int) -> Tensor:
        param, offset = self.model_params[index], self.offsets[index]
        return whole[offset:offset + param.numel()].view(param.shape).clone()

    def _share(self, states: list[dict[str, Any]], name: str) -> Tensor:
        moments = [state[name].flatten() for state in states]
        if len(moments) == 1 and len(self.model_params) > 1:
            moments = list(moments[0].split([param.numel() for param in self.model_params]))
        whole = torch.zeros(self.partition.numel() * dist.get_world_size())
        for moment, offset in zip(moments, self.offsets, strict=True):
            whole[offset:offset + moment.numel()] = moment
        return whole.chunk(dist.get_world_size())[dist.get_rank()].to(self.partition)


def _joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    return {"step": states[0]["step"], **{name: torch.cat([s[name].flatten() for s in states]) for name in MOMENTS}}


RECORDED = {stock: recorded_as(stock)(type("ZeroOptimizer", (ZeroOptimizer,), {}))
            for stock in (FP16Optimizer, FairseqAdam)}
"""By the class that stock fairseq would use, whose name goes into checkpoints."""


class DeepSpeedTrainer(Trainer):
    """fairseq's Trainer over a DeepSpeed engine; ValueError names what it does not do."""

    def __init__(self, cfg: Any, task: Any, model: Any, criterion: Any, quantizer: Any = None) -> None:
        refused = {
            "--amp (use --fp16 or --bf16)": cfg.common.amp,
            "--memory-efficient-fp16 and -bf16 (ZeRO shards what they save)":
                cfg.common.memory_efficient_fp16 or cfg.common.memory_efficient_bf16,
            f"--ddp-backend {cfg.distributed_training.ddp_backend}":
                cfg.distributed_training.ddp_backend in ("fully_sharded", "slowmo"),
            "--use-bmuf": cfg.optimization.use_bmuf,
            f"--optimizer {cfg.optimizer._name} (use ls_adam)": cfg.optimizer._name != "ls_adam",
            f"--criterion {cfg.criterion._name} (one that counts by --sentence-avg)":
                not hasattr(criterion, "sentence_avg"),
        }
        asked = [words for words, holds in refused.items() if holds]
        if asked:
            raise ValueError(f"lightseq-deepspeed does not support {'; '.join(asked)}")
        super().__init__(cfg, task, model, criterion, quantizer)

    @property
    def use_distributed_wrapper(self) -> bool:
        """The engine reduces gradients."""
        return False

    @property
    def always_call_state_dict_during_save_checkpoint(self) -> bool:
        """All ranks meet before that, in ``consolidate_optimizer``."""
        return False

    def _build_optimizer(self) -> None:
        import deepspeed

        params = [param for param in self._model.parameters() if param.requires_grad]
        self._join_process_group()
        inner = optim.build_optimizer(self.cfg.optimizer, params)
        engine, *_ = deepspeed.initialize(model=self._model, optimizer=inner.optimizer, config=self._engine_config())
        common = self.cfg.common
        flat = common.fp16 and not common.fp16_no_flatten_grads
        kind = RECORDED[FP16Optimizer if common.fp16 or common.bf16 else FairseqAdam]
        self.engine = engine
        self._optimizer = kind(self.cfg.optimizer, engine, inner, params, flat)
        self._lr_scheduler = lr_scheduler.build_lr_scheduler(self.cfg.lr_scheduler, self._optimizer)
        self._lr_scheduler.step_update(0)

    def _join_process_group(self) -> None:
        """DeepSpeed wants a process group and torchrun's variables, of a single process too."""
        if not dist.is_initialized():
            backend = "nccl" if self.cuda else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", str(self.cfg.distributed_training.device_id))
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(dist.get_rank()), str(dist.get_world_size())

    def _engine_config(self) -> dict[str, Any]:
        common, optimization = self.cfg.common, self.cfg.optimization
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # batches are made and counted by fairseq
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optimization.clip_norm,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        if common.fp16:
            updates = dist.get_world_size() * optimization.update_freq[0]
            config["fp16"] = {
                "enabled": True, "hysteresis": 1, "min_loss_scale": max(common.min_loss_scale, 1),
                "initial_scale_power": int(math.log2(common.fp16_init_scale)) + _LOSSES_TO_ONE,
                "loss_scale_window": common.fp16_scale_window or max(1, 2**14 // updates)}
        elif common.bf16:
            config["bf16"] = {"enabled": True}
        return config

    @metrics.aggregate("train")
    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        """One update; None where its gradient overflowed."""
        optimizer = self.optimizer
        self._set_seed()
        self.model.train()
        self.criterion.train()
        metrics.log_start_time("train_wall", priority=800, round=0)
        optimizer.loss_factor = self.data_parallel_world_size / max(self._sample_size(samples), 1.0)
        outputs, sample_size = [], 0.0
        for i, sample in enumerate(samples):
            prepared, is_dummy = self._prepare_sample(sample)
            self.engine.set_gradient_accumulation_boundary(i == len(samples) - 1)
            _, size, output = self.task.train_step(prepared, self.engine, self.criterion, optimizer,
                                                   self.get_num_updates(), ignore_grad=is_dummy)
            outputs.append(output)
            sample_size += 0.0 if is_dummy else float(size)
        if self.data_parallel_world_size > 1:
            outputs, (sample_size, seconds) = self._aggregate_logging_outputs(
                outputs, sample_size, self._local_cumulative_training_time(), ignore=is_dummy)
            self._cumulative_training_time = seconds / self.data_parallel_world_size
        self.engine.step()
        logging_output = None
        if self.engine.was_step_applied():
            self.set_num_updates(self.get_num_updates() + 1)
            if self.cfg.ema.store_ema:
                self.ema.step(self.get_model(), self.get_num_updates())
                metrics.log_scalar("ema_decay", self.ema.get_decay(), priority=10000, round=5, weight=0)
            norm = torch.as_tensor(float(self.engine.get_global_grad_norm() or 0.0))
            if not torch.isfinite(norm):
                raise FloatingPointError("gradients are Nan/Inf")
            logging_output = self._reduce_and_log_stats(outputs, sample_size, norm)
        else:
            logger.info("NOTE: gradient overflow detected, ignoring gradient, setting loss scale to: %s",
                        self.engine.optimizer.loss_scale)
        if self.cfg.common.fp16:
            metrics.log_scalar("loss_scale", self.engine.optimizer.loss_scale, priority=700, round=4, weight=0)
        metrics.log_stop_time("train_wall")
        return logging_output

    def _sample_size(self, samples: list[Any]) -> float:
        """Tokens, or sentences with --sentence-avg, of one update on all ranks."""
        by_sentence = self.get_criterion().sentence_avg
        counts = [sample["target"].size(0) if by_sentence else sample["ntokens"] for sample in samples if sample]
        count = torch.tensor([float(sum(counts))], device=self.device)
        if self.data_parallel_world_size > 1:
            distributed_utils.all_reduce(count, group=self.data_parallel_process_group)
        return count.item()

    def consolidate_optimizer(self) -> None:
        """All ranks gather what the one that writes a checkpoint needs."""
        self._gathered_optim_state = None
        if not self.cfg.checkpoint.no_save_optimizer_state:
            self._gathered_optim_state = self.optimizer.state_dict()
