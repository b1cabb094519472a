"""fairseq_compat: each symptom is there in stock fairseq and gone after apply().

The probes run in a process of their own, once before apply() and once after it, because a repair cannot be undone.
A symptom that stock fairseq no longer shows fails its test: then the repair should go.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from lightseq_fairseq import fairseq_compat

ROOT = Path(__file__).parents[1]


def trained_state() -> dict:
    """What Trainer.state_dict() makes of an argparse-configured model trained with --eval-bleu."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    args = options.parse_args_and_arch(options.get_training_parser(), ["data", "--arch", "transformer_tiny"])
    cfg = convert_namespace_to_omegaconf(args)
    return {"args": None, "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
            "model": {"weight": torch.arange(3.0)}, "task_state": {},
            "optimizer_history": [{"num_updates": 1, "lr_scheduler_state": {}}],
            "extra_state": {"train_iterator": {"epoch": 1}, "metrics": {"_bleu_counts": np.array([3, 1])}}}


def load_a_checkpoint() -> str:
    import tempfile

    from fairseq import checkpoint_utils

    with tempfile.NamedTemporaryFile() as file:
        torch.save(trained_state(), file.name)
        state = checkpoint_utils.load_checkpoint_to_cpu(file.name)
    return f"{state['cfg'].model.arch} {state['extra_state']['metrics']['_bleu_counts'].tolist()}"


def load_a_checkpoint_of_fairseq_0_8() -> str:
    from fairseq.logging.meters import AverageMeter

    meter = AverageMeter()
    meter.update(5.0)
    file = io.BytesIO()
    torch.save({"args": argparse.Namespace(arch="transformer"), "extra_state": {"train_meters": {"loss": meter}}}, file)
    file.seek(0)
    return str(torch.load(file)["extra_state"]["train_meters"]["loss"].avg)


def broadcast_a_checkpoint() -> str:
    """distributed.utils.broadcast_object, rank 0 and then rank 1 in one process."""
    from unittest import mock

    from fairseq.distributed import utils
    from omegaconf import OmegaConf

    state = trained_state()
    state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    wire: list[torch.Tensor] = []

    def rank(index, broadcast):
        with mock.patch.multiple(utils, get_rank=lambda group: index, broadcast=broadcast):
            return utils.broadcast_object(state if index == 0 else None, 0, None, torch.device("cpu"))

    rank(0, lambda tensor, src, group: wire.append(tensor.clone()))
    received = rank(1, lambda tensor, src, group: tensor.copy_(wire.pop(0)))
    return f"{received['cfg'].model.arch} {received['model']['weight'].tolist()}"


def blocks_by_sentence() -> str:
    from fairseq.data import TokenBlockDataset

    lines = [torch.arange(4, 4 + length) for length in (3, 2, 5)]
    blocks = TokenBlockDataset(lines, [3, 2, 5], None, pad=1, eos=2, break_mode="eos")
    return str([len(block) for block in blocks])


def numpy_names_of_the_speech_code() -> str:
    return str((np.zeros(1, dtype=np.int).dtype.kind, np.float("inf")))


def length_buckets() -> str:
    from fairseq.data import BucketPadLengthDataset, ListDataset

    lines = [torch.full((length,), 4) for length in (1, 2, 3, 9)]
    dataset = BucketPadLengthDataset(ListDataset(lines), np.array([1, 2, 3, 9]), 2, pad_idx=1, left_pad=False)
    return str([len(line) for line in dataset])


def tpu_of(*flags: str) -> str:
    from fairseq import options

    parser = options.get_training_parser()
    return str(options.parse_args_and_arch(parser, ["data", "--arch", "transformer_tiny", *flags]).tpu)


def tpu_under_bf16() -> str:
    return tpu_of("--bf16")


def tpu_under_memory_efficient_bf16() -> str:
    return tpu_of("--memory-efficient-bf16")


def factor_of_the_second_update() -> str:
    """What FP16Optimizer divides gradients by in its second bf16 update, each update asking for 1/2."""
    from fairseq.optim import FairseqOptimizer
    from fairseq.optim.fp16_optimizer import FP16Optimizer
    from omegaconf import OmegaConf

    class Scaled(torch.optim.SGD):
        supports_step_with_scale = True

        def step(self, closure=None, scale=1.0):
            scales.append(scale)

    class Wrapper(FairseqOptimizer):
        def __init__(self, params):
            super().__init__(None)
            self._optimizer = Scaled(params, lr=0.1)

    scales: list[float] = []
    params = [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    masters = FP16Optimizer.build_fp32_params(None, params, flatten=False)
    cfg = OmegaConf.create({"optimizer": None, "common": {"bf16": True, "fp16_scale_window": 1}})
    optimizer = FP16Optimizer(cfg, params, Wrapper(masters), masters)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(params[0].sum())
        optimizer.multiply_grads(0.5)
        optimizer.step()
    return str(scales)


def scale_of_a_resumed_amp_run() -> str:
    """It was 4096 at first and 512 when the run was saved."""
    from fairseq.optim import FairseqOptimizer
    from fairseq.optim.amp_optimizer import AMPOptimizer
    from omegaconf import OmegaConf

    class Wrapper(FairseqOptimizer):
        def __init__(self, params):
            super().__init__(None)
            self._optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def begin():
        params = [torch.nn.Parameter(torch.ones(2))]
        cfg = OmegaConf.create({"optimizer": None, "common": {"fp16_init_scale": 4096, "min_loss_scale": 1e-4}})
        optimizer = AMPOptimizer(cfg, params, Wrapper(params))
        optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=4096)  # fairseq's is off where there is no GPU
        optimizer.backward(params[0].sum())
        optimizer.step()
        return optimizer

    saved, resumed = begin(), begin()
    saved.scaler.update(512.0)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    assert len(resumed.optimizer.state) == 1
    return str(resumed.scaler.get_scale())


def batches_of(*, epoch: int, **flags: bool) -> list[list[int]]:
    """The batches that a process starting in ``epoch`` trains on."""
    from fairseq.data import Dictionary, LanguagePairDataset, ListDataset
    from fairseq.tasks import FairseqTask

    lengths = np.arange(200) % 7 + 1
    lines = ListDataset([torch.full((length,), 4) for length in lengths], lengths)
    dataset = LanguagePairDataset(lines, lengths, Dictionary(), lines, lengths, Dictionary())
    task = FairseqTask(None)
    batches = task.get_batch_iterator(dataset, max_sentences=8, seed=1, epoch=epoch, **flags)
    assert batches.next_epoch_idx == epoch
    return [list(map(int, batch)) for batch in batches.frozen_batches]


def resumed_batches() -> str:
    return str(batches_of(epoch=1) == batches_of(epoch=2) == batches_of(epoch=5))


def batches_that_change_by_epoch() -> str:
    return str(batches_of(epoch=1) == batches_of(epoch=2, update_epoch_batch_itr=True))


SYMPTOMS = {
    load_a_checkpoint: ("Unsupported global: GLOBAL argparse.Namespace", "transformer_tiny [3, 1]"),
    load_a_checkpoint_of_fairseq_0_8: ("Unsupported global", "5.0"),
    broadcast_a_checkpoint: ("Unsupported global: GLOBAL omegaconf.dictconfig.DictConfig",
                             "transformer_tiny [0.0, 1.0, 2.0]"),
    blocks_by_sentence: ("compat", "[3, 2, 5]"),  # numpy 2.2: `np.compat` was removed; later: no attribute 'compat'
    numpy_names_of_the_speech_code: ("module 'numpy' has no attribute 'int'", "('i', inf)"),
    length_buckets: ("unexpected keyword argument 'interpolation'", "[2, 2, 9, 9]"),
    tpu_under_bf16: ("True", "False"),
    tpu_under_memory_efficient_bf16: ("True", "False"),
    factor_of_the_second_update: ("[2.0, 4.0]", "[2.0, 2.0]"),
    resumed_batches: ("False", "True"),
    scale_of_a_resumed_amp_run: ("4096.0", "512.0"),
}
UNCHANGED = {
    batches_that_change_by_epoch: "False",
}


def outcome(probe) -> str:
    try:
        return probe()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def report() -> None:
    """Print {probe: [outcome before apply(), outcome after]} as the last line."""
    probes = [*SYMPTOMS, *UNCHANGED]
    fairseq_compat.import_fairseq()
    before = [outcome(probe) for probe in probes]
    fairseq_compat.apply()
    fairseq_compat.apply()
    after = [outcome(probe) for probe in probes]
    print(json.dumps({probe.__name__: pair for probe, *pair in zip(probes, before, after, strict=True)}))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    result = subprocess.run([sys.executable, "-c", f"from {__name__} import report; report()"],
                            cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("probe", SYMPTOMS, ids=lambda probe: probe.__name__)
def test_symptom_is_removed(outcomes, probe):
    before, after = outcomes[probe.__name__]
    symptom, mended = SYMPTOMS[probe]
    if probe is length_buckets and tuple(map(int, np.__version__.split(".")[:2])) < (2, 4):
        symptom = mended  # that numpy still knew the argument
    assert symptom in before
    assert after == mended


@pytest.mark.parametrize("probe", UNCHANGED, ids=lambda probe: probe.__name__)
def test_stock_behaviour_stays(outcomes, probe):
    assert outcomes[probe.__name__] == [UNCHANGED[probe]] * 2


LEAVE_WHILE_BATCHES_ARE_PREPARED = """
import torch
from lightseq_fairseq import fairseq_compat
from fairseq.data.iterators import BufferedIterator

class Batches:
    def __len__(self):
        return 10**6

    def __iter__(self):
        while True:
            yield [torch.stack([torch.ones(3)] * 20) for _ in range(50)]

{repair}
next(BufferedIterator(10**{size}, Batches()))
"""


def leave(repair: str, size: int) -> subprocess.CompletedProcess:
    script = LEAVE_WHILE_BATCHES_ARE_PREPARED.format(repair=repair, size=size)
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("size", [0, 5], ids=["full queue", "queue with room"])
def test_a_run_can_end_while_batches_are_prepared(size):
    result = leave("fairseq_compat.apply()", size)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 lets such threads hang instead")
def test_which_stock_fairseq_cannot():
    result = leave("", 5)
    assert result.returncode != 0 and "terminate called" in result.stderr


def test_every_repair_names_its_symptom():
    for repair in (*fairseq_compat.REPAIRS, fairseq_compat.hashable_dataclasses):
        assert repair.__doc__


def test_foreign_types_are_still_refused():
    fairseq_compat.apply()
    file = io.BytesIO()
    torch.save({"model": Path("x")}, file)
    file.seek(0)
    with pytest.raises(Exception, match="Unsupported global"):
        torch.load(file)


def test_tpu_can_still_be_asked_for():
    fairseq_compat.apply()
    assert tpu_of("--bf16", "--tpu") == "True"


def test_mutable_dataclass_defaults_import(tmp_path, monkeypatch):
    """The pattern of fairseq main's configs.py; Python 3.10 never refused it."""
    (tmp_path / "configs_of_fairseq_main.py").write_text(textwrap.dedent("""
        from dataclasses import dataclass, fields
        @dataclass
        class Common:
            seed: int = 1
        @dataclass
        class Config:
            common: Common = Common()
    """))
    monkeypatch.syspath_prepend(tmp_path)
    if sys.version_info >= (3, 11):
        with pytest.raises(ValueError, match="mutable default"):
            __import__("configs_of_fairseq_main")
    module = fairseq_compat.import_fairseq("configs_of_fairseq_main")
    assert module.Config().common == module.Common()
    assert [field.default for field in dataclasses.fields(module.Config)] == [module.Common()]

    @dataclasses.dataclass
    class Outside:
        seed: int = 1

    assert Outside.__hash__ is None, "the shim must not outlive the import"


def test_scores_of_other_tasks_are_imported_when_they_are_computed():
    """In a process of its own, as others may have imported scikit-learn by now."""
    subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import sys
        from lightseq_fairseq import fairseq_compat
        fairseq_compat.apply()
        assert not {"sklearn", "sklearn.metrics", "scipy.stats"} & sys.modules.keys()
        from fairseq.criterions import sentence_prediction
        from fairseq.tasks import audio_classification
        assert "sklearn" not in sys.modules
        assert sentence_prediction.f1_score([1, 0, 1], [1, 0, 0]) == 2 / 3
        assert abs(sentence_prediction.pearsonr([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])[0] - 1) < 1e-9
        assert audio_classification.sklearn_metrics.roc_curve([0, 1], [0.1, 0.9])[0][0] == 0
        import sklearn
        assert sklearn.__version__
        del sys.modules["scipy.stats"]
        with fairseq_compat.imports_put_off():
            from scipy.stats import kendalltau
        assert kendalltau([1, 2, 3], [1, 2, 3])[0] == 1
    """)], check=True)


def test_encoder_layers_leave_the_fast_path_of_0_12_2(monkeypatch):
    from fairseq.modules import transformer_layer

    class Layer:
        def __init__(self):
            self.in_proj_weight = self.can_use_fastpath = self.BT_version = True

        def forward(self):
            return self.in_proj_weight

    monkeypatch.setattr(transformer_layer, "TransformerEncoderLayerBase", Layer)
    fairseq_compat.keep_encoder_layers_off_the_fast_path()
    layer = Layer()
    assert not layer.can_use_fastpath and not layer.BT_version


def test_gradients_on_the_cpu_are_clipped_beside_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("only where there is a GPU does fairseq take norms to it; run with --device cuda")
    from fairseq import utils

    fairseq_compat.apply()
    params = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    assert utils.clip_grad_norm_(params, 1.0).item() == pytest.approx(20**0.5)
    torch.testing.assert_close(params[1].grad, torch.full((3,), 2 / 20**0.5))
