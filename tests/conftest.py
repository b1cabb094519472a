"""Options and fixtures of the whole suite: the device, toy data in fairseq's binary form, stock models."""

from __future__ import annotations

import argparse
import contextlib
import io
import random
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the tests that compute")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where tests compute; on CUDA they insist on the compiled operators, as the reference would pass for them."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda":
        from lightseq_fairseq.ops import _extension

        assert _extension.loaded(), "the compiled CUDA operators do not load; see the warning above"
    return device


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)
    random.seed(1)


def write_parallel_text(folder: Path, split: str, count: int, seed: int) -> None:
    """A toy language pair: the target is the source reversed and renamed, so that it can be learnt."""
    rng = random.Random(seed)
    with open(folder / f"{split}.xx", "w") as src, open(folder / f"{split}.yy", "w") as tgt:
        for _ in range(count):
            words = [rng.randrange(40) for _ in range(rng.randint(1, 14))]
            print(*(f"w{w}" for w in words), file=src)
            print(*(f"v{w}" for w in reversed(words)), file=tgt)


def preprocess(text: Path, destdir: Path, *extra: str) -> Path:
    """Run fairseq-preprocess on train/valid/test.{xx,yy} of ``text``."""
    from fairseq import options
    from fairseq_cli import preprocess as fairseq_preprocess

    args = options.get_preprocessing_parser().parse_args(
        ["-s", "xx", "-t", "yy", "--trainpref", str(text / "train"), "--validpref", str(text / "valid"),
         "--testpref", str(text / "test"), "--destdir", str(destdir), *extra])
    with contextlib.redirect_stdout(io.StringIO()):
        fairseq_preprocess.main(args)
    return destdir


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy-text")
    for split, count in (("train", 400), ("valid", 40), ("test", 60)):
        write_parallel_text(folder, split, count, seed=len(split) * 1000 + count)
    return folder


@pytest.fixture(scope="session")
def data_bin(toy_text, tmp_path_factory) -> Path:
    """Separate dictionaries (44 source, 44 target types)."""
    return preprocess(toy_text, tmp_path_factory.mktemp("data-bin"))


@pytest.fixture(scope="session")
def joined_data_bin(toy_text, tmp_path_factory) -> Path:
    """One joined dictionary, for --share-all-embeddings."""
    return preprocess(toy_text, tmp_path_factory.mktemp("joined-data-bin"), "--joined-dictionary")


def training_args(data: Path, *flags: str) -> argparse.Namespace:
    """Parsed fairseq-train arguments on the CPU; ``flags`` must name an --arch."""
    from fairseq import options

    import lightseq_fairseq.plugin  # noqa: F401  registers ls_* before the choices are built

    return options.parse_args_and_arch(
        options.get_training_parser(),
        input_args=[str(data), "--task", "translation", "-s", "xx", "-t", "yy", "--cpu", *flags])


def build_model(data: Path, *flags: str, seed: int = 1):
    """(task, model) built as fairseq-train would build them, after seeding."""
    from fairseq import tasks, utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    cfg = convert_namespace_to_omegaconf(training_args(data, *flags))
    task = tasks.setup_task(cfg.task)
    utils.set_torch_seed(seed)
    return task, task.build_model(cfg.model)


def scramble(model: torch.nn.Module, seed: int = 3, scale: float = 0.1) -> torch.nn.Module:
    """Move every parameter off its initial value: biases non-zero, norm weights away from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter[1].zero_()
    return model


@pytest.fixture(scope="session")
def text_bin(toy_text, tmp_path_factory):
    """One language, binarised."""
    from fairseq import options
    from fairseq_cli import preprocess as command

    folder = tmp_path_factory.mktemp("text-bin")
    args = options.get_preprocessing_parser().parse_args(
        ["--only-source", "--trainpref", str(toy_text / "train.xx"), "--validpref", str(toy_text / "valid.xx"),
         "--destdir", str(folder)])
    with contextlib.redirect_stdout(io.StringIO()):
        command.main(args)
    return folder
