"""The benchmarks run, on the CPU at sizes that take a moment, and what they make of measurements is right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import benchmark_commands  # noqa: E402
import benchmark_ops  # noqa: E402
import step_profile  # noqa: E402
from step_profile import Kernel  # noqa: E402

from tests.cli.conftest import TINY, train_stock  # noqa: E402

PLOTS = importlib.util.find_spec("matplotlib") is not None


def benchmark(script: str, *arguments: object) -> str:
    result = subprocess.run([sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)],
                            capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_every_operator_and_layer_is_timed(tmp_path):
    benchmark("benchmark_ops.py", "--device", "cpu", "--contenders", "lightseq,eager", "--replays", 3,
              "--out", tmp_path)
    report = json.loads((tmp_path / "ops.json").read_text())
    assert report["ceiling"]["gb_per_s"] > 0 and report["ceiling"]["tflop_per_s"] > 0 and report["commit"]
    rows = {(row["case"], row["pass"], row["contender"]): row for row in report["rows"]}
    assert not [row for row in rows.values() if "failed" in row]
    cases = {case for case, _, _ in rows}
    assert len(cases) == 13 and {(case, "step", "lightseq") for case in cases} <= rows.keys()
    for row in rows.values():
        assert 0 < row["us_20"] <= row["us"] <= row["us_80"] and row["bound_us"] > 0, row
    assert (tmp_path / "ops.png").exists() == PLOTS


def test_a_contender_that_fails_leaves_its_reason(monkeypatch):
    clock = benchmark_ops.Clock(benchmark_ops.torch.device("cpu"), replays=2)
    ours = benchmark_ops.Contender(lambda: None)

    def broken():
        raise RuntimeError("does not compile\nat all")

    case = benchmark_ops.Case("adam", ours, benchmark_ops.Contender(broken), (1.0, 0.0))
    good, bad = benchmark_ops.rows_of(case, "tiny", ("lightseq", "eager"), clock, {"gb_per_s": 1.0, "tflop_per_s": 1.0})
    assert good["us"] > 0 and good["bound_us"] == 1e6 and bad["failed"] == "RuntimeError: does not compile"


@pytest.mark.parametrize("name, kind", [
    ("void lightseq::attention::forward_tiles<__half, 64, 1, false>(...)", "attention"),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, cutlass::half_t> >(...)", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64_4x1x1", "attention"),
    ("void softmax_warp_forward<c10::Half, c10::Half, float, 6, false, false>(...)", "attention"),
    ("nvjet_hsh_128x192_64x5_1x2_h_bz_coopA_NTN", "GEMM"),
    ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off", "GEMM"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_64x2_tn_align8>(...)", "GEMM"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __half>(...)", "GEMM"),
    ("void lightseq::bias_dropout_residual_layer_norm::forward_warps<__half>(...)", "norm"),
    ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<c10::Half, float>(...)", "norm"),
    ("void lightseq::cross_entropy::backward_rows<__half>(...)", "loss"),
    ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, c10::Half, float, float, "
     "at::native::(anonymous namespace)::LogSoftMaxForwardEpilogue>(...)", "loss"),
    ("void at::native::_scatter_gather_elementwise_kernel<128, 8, at::native::_cuda_scatter_gather(...)", "loss"),
    ("void lightseq::flat_adam::update<__half>(...)", "optimizer"),
    ("void lightseq::fp8_cast::cast_many<__half>(...)", "casts to 8 bits"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4>>",
     "optimizer"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float>>>", "optimizer"),
    ("void lightseq::embedding::add_runs<__half>(...)", "embedding"),
    ("void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::Half, long, unsigned int>(...)", "embedding"),
    ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>", "copies"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>>(...)", "copies"),
    ("ncclDevKernel_AllReduce_Sum_f16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ("void lightseq::bias_activation_dropout::forward<__half>(...)", "bias, activation, dropout, residual"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>",
     "bias, activation, dropout, residual"),
    ("void lightseq::column_sum::walk<__half>(...)", "bias, activation, dropout, residual"),
    ("void lightseq::bias_dropout_residual::forward<__half>(...)", "bias, activation, dropout, residual"),
    ("void lightseq::layer_norm::backward_warps<__half>(...)", "norm"),
    ("something_new", "other"),
])
def test_kernels_are_classed_by_name(name, kind):
    assert step_profile.kernel_class(name) == kind


def test_gaps_are_what_no_kernel_fills():
    kernels = [Kernel("nvjet_gemm", 0, 400), Kernel("lightseq::column_sum::walk", 300, 600),  # on two streams
               Kernel("nvjet_gemm", 1000, 1400), Kernel("lightseq::flat_adam::update", 1400, 2000)]
    row = step_profile.profile_row(kernels, steps=2, ms=1.5)
    assert row == {"ms": 1.5, "kernels": 2.0, "classes": {
        "GEMM": 0.4, "optimizer": 0.3, "bias, activation, dropout, residual": 0.15, step_profile.GAPS: 0.7}}
    lines = step_profile.table([{"case": "base-512", "contender": "lightseq", **row}]).splitlines()
    assert lines[0] == "| ms a step | base-512 lightseq |" and "| GEMM | 0.400 |" in lines
    assert lines[-2:] == ["| step | 1.500 |", "| kernels | 2 |"]


def test_training_benchmark_measures_both(joined_data_bin, tmp_path):
    out = benchmark("benchmark_train.py", joined_data_bin, "--cases", "base-60", "--dtype", "fp32", "--steps", 1,
                    "--repeats", 1, "--out", tmp_path)
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["fairseq", "lightseq"] and all(row["ms"] > 0 for row in rows)
    assert rows[0]["target_tokens"] == rows[1]["target_tokens"] and "times as fast" in out
    refused = subprocess.run([sys.executable, str(ROOT / "scripts" / "benchmark_train.py"), "data", "--profile"],
                             capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert refused.returncode == 2 and "--profile reads the kernels of a GPU" in refused.stderr


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_what_was_measured():
    readme, results = (ROOT / "README.md").read_text(), ROOT / "scripts" / "results"
    report = json.loads((results / "train.json").read_text())
    assert set(report) == {"gpu", "torch", "commit", "rows"}
    assert script("benchmark_train").table(report["rows"]) in readme
    for name, unit in (("generate", "ms"), ("generate_cpu", "ms_per_step")):
        rows = json.loads((results / f"{name}.json").read_text())["rows"]
        assert script("benchmark_generate").table(rows, unit) in readme, name
    rows = json.loads((results / "generate_commands.json").read_text())["rows"]
    assert script("benchmark_generate_commands").table(rows) in readme
    plain, fp8 = (row["ms"] for row in json.loads((results / "train_fp8.json").read_text())["rows"])
    assert (f"{fp8:.1f} instead of {plain:.1f} ms an update at big 16384, {plain / fp8:.2f} times"
            in " ".join(readme.split()))
    for name in ("models", "gpt3_shapes"):
        rows = json.loads((results / f"{name}.json").read_text())["rows"]
        assert script(f"benchmark_{name}").table(rows) in readme, name
    rows = json.loads((results / "corpus.json").read_text())["rows"]
    for ours in (False, True):
        best = max(row["sentences_per_s"] for row in rows if row["contender"].startswith("refill") == ours)
        assert f"{round(best, -1):,.0f}".replace(",", " ") in " ".join(readme.split())
    for row in json.loads((results / "commands.json").read_text())["rows"]:
        assert f"{round(row['words_per_s'], -3):,}".replace(",", " ") in " ".join(readme.split()), row
    for dtype in ("fp16", "bf16"):
        rows = json.loads((results / "quality.json").read_text())["rows"]
        bleu = [row["bleu"] for row in rows if row["dtype"] == dtype]
        assert len(bleu) == 3 and f"{sum(bleu) / 3:.2f} in {dtype}" in " ".join(readme.split())


def test_quality_benchmark_trains_averages_and_scores(joined_data_bin, tmp_path):
    """Both contenders, two at a time; 18 updates are more than an epoch of the toy corpus."""
    narrow = [f"model.{side}_{size}" for side in ("encoder", "decoder")
              for size in ("embed_dim=16", "ffn_embed_dim=16", "layers=1")]
    out = benchmark("benchmark_quality.py", joined_data_bin, "--seeds", 5, "--dtypes", "fp32", "--max-update", 18,
                    "--contenders", "lightseq,fairseq", "--parallel", 2, "--out", tmp_path, "--work", tmp_path / "work",
                    "task.source_lang=xx", "task.target_lang=yy", "dataset.max_tokens=400", *narrow)
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert {(row["contender"], row["dtype"], row["seed"]) for row in rows} == {
        ("lightseq", "fp32", 5), ("fairseq", "fp32", 5)}
    for row in rows:
        assert 0 <= row["bleu"] <= 100 and row["averaged"] >= 1 and row["train_seconds"] > 0
        log = (tmp_path / "work" / f"{row['contender']}-fp32-seed-5" / "train.log").read_text()
        assert f"model: {'LSTransformerModel' if row['contender'] == 'lightseq' else 'TransformerModel'}" in log
        assert "num_updates: 18 >= max_update: 18" in log
    assert "| lightseq fp32 |" in out and "| fairseq fp32 |" in out


def test_commands_are_measured_by_what_they_print(joined_data_bin, tmp_path):
    narrow = [flag for side in ("encoder", "decoder") for flag in (
        f"--{side}-layers", 1, f"--{side}-embed-dim", 16, f"--{side}-ffn-embed-dim", 16,
        f"--{side}-attention-heads", 2)]
    out = benchmark("benchmark_commands.py", joined_data_bin, "--cases", "base-300", "--epochs", 2, "--log-interval", 2,
                    "--num-workers", 0, "--out", tmp_path, *narrow)
    rows = json.loads((tmp_path / "commands.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["fairseq", "lightseq"]
    assert all(row["words_per_s"] > row["updates_per_s"] > 0 for row in rows)
    assert out.splitlines()[-1].startswith("| base-300 fp32 | 1 | ")


def test_commands_of_generation_are_measured_by_what_they_print_and_when(data_bin, tmp_path):
    checkpoint = train_stock(data_bin, tmp_path / "stock", *TINY, "--max-update", "3")
    out = benchmark("benchmark_generate_commands.py", data_bin, checkpoint, "--repeats", 1, "--max-len-b", 9,
                    "--out", tmp_path)
    rows = json.loads((tmp_path / "generate_commands.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["fairseq", "lightseq"]
    for row in rows:
        assert 0 < row["to_imports_s"] <= row["to_first_s"] <= row["to_last_s"] <= row["seconds"]
        assert row["sentences"] == 60 and row["sentences_per_s"] > 0
    assert "| lightseq-generate fp32 | " in out


def test_words_a_second_are_those_of_the_last_epoch():
    lines = [{"epoch": 1, "wps": "9", "ups": "9"}, {"epoch": 2, "wps": "1", "ups": "1"},
             {"epoch": 2, "wps": "100", "ups": "2"}, {"epoch": 2, "wps": "300", "ups": "4"}]
    log = "\n".join(f"2026-01-01 | INFO | train_inner | {json.dumps(line)}" for line in lines)
    words, updates = benchmark_commands.words_per_second(log, epoch=2)
    assert words == pytest.approx((50 + 75) / (0.5 + 0.25)) and updates == pytest.approx(2 / 0.75)
    with pytest.raises(ValueError, match="no line of epoch 3"):
        benchmark_commands.words_per_second(log, epoch=3)


def test_ratios_are_to_fairseq_and_to_the_fewest_gpus():
    rows = [{"case": "base-512", "dtype": "fp16", "gpus": gpus, "contender": contender, "words_per_s": words}
            for gpus, contender, words in ((1, "fairseq", 10), (1, "lightseq", 200), (4, "lightseq", 760))]
    assert benchmark_commands.table(rows).splitlines()[2:] == [
        "| base-512 fp16 | 1 | 10 | 200 | 20.0 | 1.00 |", "| base-512 fp16 | 4 |  | 760 |  | 3.80 |"]


def test_shapes_of_gpt3_are_timed_beside_what_eet_published(tmp_path):
    out = benchmark("benchmark_gpt3_shapes.py", "--shapes", "tiny", "--context", 5, "--new", 4, "--repeats", 1, "--out",
                    tmp_path)
    rows = json.loads((tmp_path / "gpt3_shapes.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["tiny-b4", "tiny-b16"] and all(row["ms"] > 0 for row in rows)
    assert out.splitlines()[-2:] == ["| EET on an A100, batch 16 |  |", f"| ours, batch 16 | {rows[1]['ms']:.2f} |"]


def test_a_corpus_is_the_same_work_for_all(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a dog\n\nan extraordinarily long sentence about dogs , cats and birds\n" + "a b c d\n" * 5)
    benchmark("benchmark_corpus.py", corpus, "--size", "tiny", "--vocabulary", 40, "--beam", 2, "--repeats", 1,
              "--out", tmp_path)
    report, = (json.loads(path.read_text()) for path in tmp_path.glob("corpus*.json"))
    assert report["sentences"] == 7 and report["commit"] and report["tokens"] > 7
    assert any(row["contender"].startswith(("batches", "refill")) for row in report["rows"])
    assert all(row["sentences_per_s"] > 0 for row in report["rows"])


def test_models_benchmark_measures_hugging_face_and_ours(tmp_path):
    cases = ["gpt2-b2", "bart-base-beam4-b2", "bart-large-greedy-b2", "bert-base-3x16"]
    benchmark("benchmark_models.py", "--tiny", "--cases", ",".join(cases), "--contenders", "hf-eager,lightseq",
              "--dtype", "fp32", "--warm", 1, "--repeats", 1, "--out", tmp_path)
    report = json.loads((tmp_path / "models.json").read_text())
    assert set(report) == {"gpu", "torch", "commit", "rows"}
    assert {(row["case"], row["contender"]) for row in report["rows"]} == {
        (case, contender) for case in cases for contender in ("hf-eager", "lightseq")}
    assert all(row["ms"] > 0 for row in report["rows"])
    assert (tmp_path / "models.png").exists() == PLOTS
    refused = subprocess.run([sys.executable, str(ROOT / "scripts" / "benchmark_models.py"), "--cases", "opt-b1"],
                             capture_output=True, text=True)
    assert refused.returncode == 2 and "unknown opt-b1" in refused.stderr
