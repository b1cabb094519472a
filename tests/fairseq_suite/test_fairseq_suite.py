"""The parts of fairseq's own test-suite that say something about us, with ours substituted (substitution.py).

Each case is a test, a class or a file of upstream's; all run in one process, in a folder that holds nothing but the
tests of the distribution. What is left out of a file is named with its reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.fairseq_suite import distribution, substitution

ROOT = Path(__file__).parents[2]
CASES = [
    # architecture
    "test_transformer.py",
    "test_binaries.py::TestTranslation::test_transformer",
    "test_binaries.py::TestTranslation::test_transformer_cross_self_attention",
    "test_binaries.py::TestTranslation::test_transformer_layerdrop",
    "test_binaries.py::TestTranslation::test_raw",
    "test_binaries.py::TestTranslation::test_update_freq",
    "test_binaries.py::TestTranslation::test_max_positions",
    "test_binaries.py::TestTranslation::test_generation",
    "test_binaries.py::TestTranslation::test_eval_bleu",
    "test_binaries.py::TestActivationCheckpointing",
    "test_checkpoint_utils.py",
    # criterion and optimizer
    "test_label_smoothing.py",
    "test_binaries.py::TestOptimizers",
    "test_memory_efficient_fp16.py",
    "test_fp16_optimizer.py",
    # generator
    "test_sequence_generator.py",
    # what fairseq_compat mends: resuming, batches
    "test_reproducibility.py",
    "test_iterators.py",
    "test_train.py",
    "test_token_block_dataset.py",
]
DESELECTED = {
    "test_sequence_generator.py::TestJitSequenceGenerator": "compiles fairseq's model and generator with TorchScript",
    "test_sequence_generator.py::TestExportSearch": "compiles fairseq's search classes with TorchScript",
    "test_sequence_generator.py::TestRepeatNgramBlocking": "compares a CUDA extension of fairseq's with fairseq's loop",
}
"""Upstream tests inside the cases that do not run, and why."""


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> list[ElementTree.Element]:
    """One junit <testcase> for each upstream test that ran."""
    try:
        folder = distribution.upstream_tests(tmp_path_factory.mktemp("fairseq"))
    except distribution.NotAvailable as reason:
        pytest.skip(str(reason))
    inherited = filter(None, [os.environ.get("PYTHONPATH")])  # fairseq may be there
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), *inherited])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "substitution", "--assert=plain", "-p", "no:cacheprovider",
         "-p", "no:warnings", "-q", "--rootdir=.", "-c", os.devnull, "--junitxml=results.xml",
         *(flag for test in DESELECTED for flag in ("--deselect", f"tests/{test}")),
         *(f"tests/{case}" for case in CASES)],
        cwd=folder, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if not (folder / "results.xml").exists():
        pytest.fail(run.stdout[-4000:] + run.stderr[-4000:])
    return list(ElementTree.parse(folder / "results.xml").iter("testcase"))


def name_of(result: ElementTree.Element) -> str:
    """``test_file.py::Class::test``, as CASES have it."""
    _, file, *classes = result.get("classname").split(".")
    return "::".join([f"{file}.py", *classes, result.get("name")])


@pytest.mark.parametrize("case", [
    *CASES, *(pytest.param(test, marks=pytest.mark.skip(reason=reason)) for test, reason in DESELECTED.items())])
def test_upstream(results, case):
    of_case = [result for result in results if f"{name_of(result)}::".startswith(f"{case}::")]
    assert of_case, "no such test: has upstream renamed it?"
    wrong = [f"{name_of(result)}\n{part.text}" for result in of_case for part in result
             if part.tag in ("failure", "error")]
    assert not wrong, "\n\n".join(wrong)
    skipped = {name_of(result): part.get("message") for result in of_case for part in result if part.tag == "skipped"}
    if len(skipped) == len(of_case):
        pytest.skip("; ".join(sorted(set(skipped.values()))))
    for name, reason in skipped.items():
        warnings.warn(f"{name} skipped: {reason}", stacklevel=1)


def test_every_substitution_finds_something(results, tmp_path):
    """A rule that no longer matches would leave fairseq's own class under test."""
    folder = distribution.upstream_tests(tmp_path) / "tests"
    sources = [(folder / case.split("::")[0]).read_text() for case in CASES]
    unused = [rule for rule in substitution.RULES if not any(re.search(rule, source) for source in sources)]
    assert not unused
