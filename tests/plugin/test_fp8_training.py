"""Training with --ls-fp8 is 16-bit training but for the roundings of 8 bits; what is in its way is said.

As in test_ls_trainer.py the steps run without graphs on the CPU, where the products are computed from what was cast.
The vocabularies are padded to 48 types, so that every product is in 8 bits.
"""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.layers.fp8 import DelayedScaling, multiply
from lightseq_fairseq.ops.fp8_cast import FORWARD, GRADIENT
from lightseq_fairseq.plugin.ls_trainer import LSTrainer
from lightseq_fairseq.plugin.whole_step import WholeStep
from tests.conftest import build_model, preprocess, training_args
from tests.plugin.test_ls_trainer import OURS, RECIPE, SIZES, STOCK, Run

FP16 = ["--fp16", "--fp16-init-scale", "4"]
FP8 = [*FP16, "--ls-fp8"]
MAPS = 2 * 4 + 2 * 6 + 1 + 1  # of two encoder and two decoder layers, keys and values of the source, output
CURVE = 0.015
"""Relative; of losses. Roundings of 8 bits take them apart by 0.4 %."""


@pytest.fixture(scope="session")
def data_16(toy_text, tmp_path_factory):
    return preprocess(toy_text, tmp_path_factory.mktemp("data-16"), "--padding-factor", "16")


@pytest.fixture
def train(data_16, tmp_path, monkeypatch, device):
    """train(folder, *flags) -> Run; on the CPU fairseq's flat fp16 runs too."""
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)

    def run(folder, *flags, data=data_16):
        done = Run(data, tmp_path / folder, monkeypatch, device, LSTrainer, *OURS, *flags)
        assert done.trainer._step is not None and (done.trainer._step.fp8 is not None) == ("--ls-fp8" in flags)
        return done

    return run


def assert_near(ours: Run, other: Run, updates: int) -> None:
    assert len(ours.logs) == len(other.logs) == updates
    for mine, theirs in zip(ours.losses, other.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=CURVE)
    assert ours.losses[-1] < 0.95 * ours.losses[0] and ours.losses != other.losses


@pytest.mark.parametrize("flags", [
    FP16, ["--bf16"], [*FP16, "--update-freq", "2"], [*FP16, "--share-decoder-input-output-embed"],
    [*FP16, "--encoder-normalize-before", "--decoder-normalize-before", "--dropout", "0.1"],
    [*FP16, "--fp16-scale-window", "3"],  # the loss scale, and the gradients with it, doubles every third update
], ids=" ".join)
def test_losses_are_near_those_of_16_bits(flags, train):
    updates = 40 if flags == FP16 else 20
    flags = [*flags, "--max-update", str(updates)]
    ours, other = train("fp8", *flags, "--ls-fp8"), train("16", *flags)
    fp8 = ours.trainer._step.fp8
    assert len(fp8.maps) == MAPS and not fp8.amax.any() and (fp8.history[:, :MAPS, :2] > 0).all()
    assert_near(ours, other, updates)


def test_bart_takes_part(train, toy_text, tmp_path):
    joined = preprocess(toy_text, tmp_path / "joined", "--padding-factor", "16", "--joined-dictionary")
    flags = ["--arch", "ls_bart_base", "--max-source-positions", "64", "--max-target-positions", "64", *FP16,
             "--activation-dropout", "0", "--attention-dropout", "0", "--lr", "1e-3"]
    ours, other = train("fp8", *flags, "--ls-fp8", data=joined), train("16", *flags, data=joined)
    assert len(ours.trainer._step.fp8.maps) == MAPS
    for mine, theirs in zip(ours.losses, other.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=CURVE)


def test_the_output_projection_can_stay_in_16_bits_and_so_does_what_is_no_multiple_of_16(train):
    ours = train("kept", *FP8, "--ls-fp8-keep-output", "--max-update", "3")
    assert len(ours.trainer._step.fp8.maps) == MAPS - 1
    ours = train("odd", *FP8, "--decoder-ffn-embed-dim", "40", "--max-update", "3")
    assert len(ours.trainer._step.fp8.maps) == MAPS - 4


def first_gradients(train, monkeypatch, folder, *flags):
    """Of each parameter in the first update, divided by the loss scale."""
    found = {}
    update = WholeStep._update

    def record(step, lr, loss_scale):
        names = {p.data_ptr(): name for name, p in step.model.named_parameters()}
        if not found:
            found.update({names[p.data_ptr()]: g.double() / loss_scale.double()
                          for p, g in zip(step.storage.params, step.storage.grads, strict=True)})
        update(step, lr, loss_scale)

    with monkeypatch.context() as patch:
        patch.setattr(WholeStep, "_update", record)
        train(folder, *flags, "--max-update", "1")
    return found


@pytest.mark.parametrize("flags", [FP16, [*FP16, "--update-freq", "2"],
                                   ["--fp16", "--fp16-init-scale", "512"]], ids=" ".join)
def test_gradients_are_those_of_16_bits_but_for_rounding(flags, train, monkeypatch):
    """A gradient that is transposed or scaled wrongly has an error of the size of its norm.

    One rounding to e5m2, which has 2 bits of fraction, is at most 1/8 off; those of all elements are independent.
    """
    want = first_gradients(train, monkeypatch, "16", *flags)
    got = first_gradients(train, monkeypatch, "fp8", *flags, "--ls-fp8")
    assert got.keys() == want.keys()
    whole = [torch.cat([gradients[name].flatten() for name in want]) for gradients in (got, want)]
    assert (whole[0] - whole[1]).norm() < whole[1].norm() / 8
    for name, gradient in want.items():
        if not name.endswith("k_proj.bias"):  # 0 but for rounding
            error = ((got[name] - gradient).norm() / gradient.norm()).item()
            assert error < 0.3, (name, error)


@pytest.mark.parametrize("flags", [
    ["--fp16-init-scale", str(2**40)],  # two dozen overflows in front of the first update
    ["--fp16-init-scale", str(2**16), "--fp16-scale-window", "2"],  # and again every other update
], ids=" ".join)
def test_overflows_are_skipped_and_leave_no_trace(flags, train):
    ours, other = (train(folder, "--fp16", *flags, *more, "--max-update", "20")
                   for folder, more in (("fp8", ["--ls-fp8"]), ("16", [])))
    scaler = ours.trainer.optimizer.scaler
    assert scaler._last_overflow_iter >= 0
    assert scaler.loss_scale / other.trainer.optimizer.scaler.loss_scale in (0.25, 0.5, 1, 2, 4)
    fp8 = ours.trainer._step.fp8
    assert all(tensor.isfinite().all() for tensor in (fp8.amax, fp8.history, fp8.scale, fp8.inverse))
    assert (fp8.scale[2, :MAPS] != 1).any()
    assert_near(ours, other, 20)


@pytest.mark.parametrize("flags", [FP8, ["--bf16", "--ls-fp8"], [*FP8, "--update-freq", "2"]], ids=" ".join)
def test_resuming_changes_nothing(flags, train, tmp_path):
    """Up to the first update, before which fairseq's 16-bit checkpoints round the fp32 masters."""
    flags = [*flags, "--dropout", "0.1", "--max-update"]
    whole = train("whole", *flags, "8")
    train("parts", *flags, "7")
    rest = train("parts", *flags, "8")
    assert rest.logs == whole.logs[7:]
    saved = torch.load(tmp_path / "parts" / "checkpoint_last.pt")["extra_state"]["ls_fp8"]
    for name, value in whole.trainer._step.fp8.state_dict().items():
        assert torch.equal(saved[name], value), name


def test_reset_optimizer_forgets_what_was_seen(train, tmp_path):
    train("run", *FP8, "--max-update", "4")
    rest = train("run", *FP8, "--max-update", "1", "--reset-optimizer", "--reset-lr-scheduler", "--reset-dataloader",
                 "--reset-meters")
    assert (rest.trainer._step.fp8.history[:, :MAPS] > 0).sum(-1).max() <= 2


def test_a_checkpoint_of_16_bits_goes_on_in_8_and_back(train):
    whole = train("whole", *FP16, "--max-update", "15")
    legs = [train("legs", *FP16, *flags, "--max-update", updates).losses
            for flags, updates in (([], "5"), (["--ls-fp8"], "10"), ([], "15"))]
    assert [len(leg) for leg in legs] == [5, 5, 5]
    assert [loss for leg in legs for loss in leg] == pytest.approx(whole.losses, rel=CURVE)


def test_weights_are_cast_once_an_update(train, monkeypatch):
    calls = []
    begin = DelayedScaling.begin
    monkeypatch.setattr(DelayedScaling, "begin", lambda fp8, first: (calls.append(first), begin(fp8, first)))
    ours = train("fp8", *FP8, "--update-freq", "3", "--max-update", "2")
    assert ours.trainer._step.fp8._weights.keys() == set(range(MAPS))
    assert calls[:3] == [True, False, False]


@pytest.mark.parametrize("flags, reason", [
    ([], "it multiplies the tensors of 16-bit training: add --fp16 or --bf16"),
    (["--bf16", "--encoder-layerdrop", "0.2"], "not, because layers are dropped at random"),
    (["--encoder-layerdrop", "0.2"], "add --fp16 or --bf16; it needs updates that are one graph"),
])
def test_what_is_in_the_way_is_said(flags, reason, data_16, monkeypatch):
    monkeypatch.setattr(LSTrainer, "whole_step_devices", ("cpu",))
    task, model = build_model(data_16, *OURS, *SIZES, *flags, "--ls-fp8")
    args = training_args(data_16, *RECIPE, *OURS, *flags, "--ls-fp8")
    with pytest.raises(ValueError, match=f"--ls-fp8: .*{reason}"):
        LSTrainer(args, task, model, task.build_criterion(args))


def test_without_a_gpu_it_is_refused(data_16):
    task, model = build_model(data_16, *OURS, *SIZES, "--ls-fp8")
    args = training_args(data_16, *RECIPE, *OURS, "--bf16", "--ls-fp8")
    with pytest.raises(ValueError, match="not, because the device is cpu. Without --ls-fp8 this trains in bf16"):
        LSTrainer(args, task, model, task.build_criterion(args))


def test_an_early_gpu_is_refused(data_16, monkeypatch):
    monkeypatch.setattr(LSTrainer, "whole_step_devices", ("cpu", "cuda"))
    args = training_args(data_16, *RECIPE, *OURS, "--bf16")
    task, model = build_model(data_16, *OURS, *SIZES)
    trainer = LSTrainer(args, task, model, task.build_criterion(args))
    trainer.cfg.model.ls_fp8, trainer.device = True, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match="8.9 or later .* and A100 is of an earlier one"):
        trainer._refuse_fp8()


def test_other_ways_to_train_refuse_it_and_validation_does_not(data_16, tmp_path, monkeypatch, device):
    from fairseq.trainer import Trainer

    flags = ["--arch", "ls_transformer", *STOCK[2:], "--ls-fp8"]
    with pytest.raises(ValueError, match="lightseq-train and lightseq-hydra-train alone"):
        Run(data_16, tmp_path, monkeypatch, device, Trainer, *flags)
    _, model = build_model(data_16, *OURS, *SIZES, "--ls-fp8")
    tokens = torch.tensor([[4, 5, 2]])
    assert model.eval()(tokens, torch.tensor([3]), tokens)[0].shape == (1, 3, 48)


def test_one_option_without_the_other_is_refused(data_16):
    task, model = build_model(data_16, *OURS, *SIZES)
    args = training_args(data_16, *RECIPE, *OURS, "--ls-fp8-keep-output")
    with pytest.raises(ValueError, match="--ls-fp8-keep-output says how --ls-fp8 multiplies"):
        LSTrainer(args, task, model, task.build_criterion(args))


@pytest.mark.parametrize("kinds", [(FORWARD, FORWARD), (GRADIENT, FORWARD)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(16, 32, 48), (192, 48, 4096), (128, 256, 12288)], ids=str)
def test_a_product_is_that_of_what_was_cast(size, dtype, kinds, device):
    """However long the sum is; beside it nothing but the rounding of the result, and of fast accumulation on a GPU."""
    rows, columns, inner = size
    a, b = ((torch.randn(size, inner, device=device) + 0.3).to(kind)
            for size, kind in zip((rows, columns), kinds, strict=True))
    inverses = [torch.tensor([value], device=device) for value in (0.25, 0.125)]
    bias = torch.randn(columns, device=device).to(dtype)
    want = a.double() @ b.double().t() / 32
    error = 4e-3 if device.type == "cuda" else torch.finfo(dtype).eps / 2 + 1e-6
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    assert multiply(a, b, *inverses, dtype, out=out).data_ptr() == out.data_ptr()
    largest = (a.double().abs() @ b.double().abs().t() / 32).max().item()
    for got, exact in ((multiply(a, b, *inverses, dtype), want), (out, want),
                       (multiply(a, b, *inverses, dtype, bias=bias), want + bias.double())):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=error * largest)
