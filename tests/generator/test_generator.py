"""Generator and LightSeq's class over it: batches, text, ensembles, and what they say when something is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import lightseq_fairseq.inference as lsi
from lightseq_fairseq import model_file
from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.layers import TransformerDecoder, TransformerEncoder
from lightseq_fairseq.layers.compiled import CompiledDecoder, CompiledEncoder
from lightseq_fairseq.layers.embedding import token_embedding
from lightseq_fairseq.layers.incremental import IncrementalDecoder
from lightseq_fairseq.model_file import ModelFile, ModelFileError
from lightseq_fairseq.ops.linear import has_int8
from tests import tolerances
from tests.conftest import scramble

CONFIG = TransformerConfig(
    src_vocab_size=23, tgt_vocab_size=29, encoder_layers=2, decoder_layers=2, encoder_embed_dim=16,
    decoder_embed_dim=16, encoder_ffn_embed_dim=24, decoder_ffn_embed_dim=24, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_normalize_before=True, decoder_normalize_before=True)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def random_model(seed: int = 0, **changes) -> ModelFile:
    """A model of random weights whose source types are s4, s5, ... and target types t4, t5, ..."""
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, **changes)
    stacks = {
        "encoder": TransformerEncoder(config, token_embedding(config.src_vocab_size, config.encoder_embed_dim, 1)),
        "decoder": TransformerDecoder(config, token_embedding(config.tgt_vocab_size, config.input_dim, 1)),
    }
    tensors = {f"{side}.{name}": value for side, stack in stacks.items()
               for name, value in scramble(stack, seed=seed + 1, scale=0.5).state_dict().items()}
    symbols = [(*SPECIAL, *(f"{letter}{i}" for i in range(4, size)))
               for letter, size in (("s", config.src_vocab_size), ("t", config.tgt_vocab_size))]
    return ModelFile(config, tensors, symbols[0], symbols[1])


@pytest.fixture
def ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [[*torch.randint(4, 23, (n,), generator=generator).tolist(), 2] for n in (5, 1, 9, 3, 9, 0, 14)]


OPTIONS = GenerationOptions(beam=3, nbest=2, max_len_b=12)


def assert_same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert [h.tokens.tolist() for h in mine] == [h.tokens.tolist() for h in theirs]
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.positional_scores, b.positional_scores, **tolerances.SCORE)


def test_results_do_not_depend_on_the_batch(ids):
    generator = Generator([random_model()], "cpu")
    alone = [generator.infer([sentence], OPTIONS)[0] for sentence in ids]
    assert_same(generator.infer(ids, OPTIONS), alone)
    assert_same(generator.infer(ids, OPTIONS, max_sentences=2), alone)
    assert_same(generator.infer(ids, OPTIONS, max_tokens=10), alone)
    assert_same(generator.infer(ids[::-1], OPTIONS), alone[::-1])


@pytest.mark.parametrize("options", [OPTIONS, dataclasses.replace(OPTIONS, no_repeat_ngram_size=2, temperature=0.7),
                                     dataclasses.replace(OPTIONS, return_alignment=True, min_len=4)])
def test_compiled_operators_change_nothing(ids, options, monkeypatch):
    model = random_model(encoder_embed_dim=32, decoder_embed_dim=32, encoder_ffn_embed_dim=48, decoder_ffn_embed_dim=48)
    compiled = Generator([model], "cpu")
    assert isinstance(compiled.models[0].decoder, CompiledDecoder), "see the warning above"
    found = compiled.infer(ids, options)
    for module in ("layers.compiled", "generator.search", "generator.logits"):
        monkeypatch.setattr(f"lightseq_fairseq.{module}.compiled_operators", lambda: None)
    plain = Generator([model], "cpu")
    assert isinstance(plain.models[0].decoder, IncrementalDecoder)
    expected = plain.infer(ids, options)
    assert_same(found, expected)
    assert [h.alignment for h in sum(found, [])] == [h.alignment for h in sum(expected, [])]


def test_progress_counts_every_sentence_once(ids):
    counts = []
    Generator([random_model()], "cpu").infer(ids, OPTIONS, max_sentences=3, progress=counts.append)
    assert sum(counts) == len(ids) and len(counts) == 3


@pytest.mark.parametrize("suffix", ["pb", "hdf5"])
def test_a_file_generates_what_its_model_does(ids, tmp_path, suffix):
    model = random_model()
    model_file.save(model, tmp_path / f"model.{suffix}")
    loaded = Generator.load(tmp_path / f"model.{suffix}", "cpu")
    assert_same(loaded.infer(ids, OPTIONS), Generator([model], "cpu").infer(ids, OPTIONS))


def test_an_ensemble_of_one_model_twice_is_that_model(ids):
    model = random_model()
    assert_same(Generator([model, model], "cpu").infer(ids, OPTIONS), Generator([model], "cpu").infer(ids, OPTIONS))
    mixed = Generator([model, random_model(seed=9)], "cpu").infer(ids, OPTIONS)
    assert [h[0].tokens.tolist() for h in mixed] != \
        [h[0].tokens.tolist() for h in Generator([model], "cpu").infer(ids, OPTIONS)]


@pytest.mark.parametrize("kind", ["ordered", "unordered"])
def test_constraints_follow_their_sentences(ids, kind):
    constraints = [[[7, 8], [9]], [], [[10]], [[11], [11]], [], [[12, 13, 14]], [[4]]]
    generator = Generator([random_model()], "cpu")
    options = dataclasses.replace(OPTIONS, constraints=kind)
    found = generator.infer(ids, options, constraints=constraints, max_sentences=3)
    for hypotheses, phrases in zip(found, constraints, strict=True):
        assert hypotheses
        for hypothesis in hypotheses:
            said = hypothesis.tokens.tolist()
            assert all(phrase in [said[i:i + len(phrase)] for i in range(len(said))] for phrase in phrases)
    free = generator.infer(ids, OPTIONS)
    assert_same([found[1], found[4]], [free[1], free[4]])


def test_a_line_to_translate_has_no_constraints():
    with pytest.raises(GenerationError, match="constraints of sentences and options.constraints"):
        Generator([random_model()], "cpu").translate(["s4 s5"], GenerationOptions(constraints="ordered"))


def test_prefixes_are_forced(ids):
    prefixes = [[7], [8, 9], [], [10], [11, 12, 13], [4], [5]]
    found = Generator([random_model()], "cpu").infer(ids, OPTIONS, prefix_ids=prefixes)
    for prefix, hypotheses in zip(prefixes, found, strict=True):
        assert hypotheses[0].tokens.tolist()[:len(prefix)] == prefix


def test_a_seed_serves_all_batches_and_repeats(ids):
    generator = Generator([random_model()], "cpu")
    options = GenerationOptions(beam=1, sampling=True, seed=3, max_len_b=12)
    same = [[4, 5, 6, 2]] * 6
    first, second = ([h[0].tokens.tolist() for h in generator.infer(same, options, max_sentences=1)] for _ in range(2))
    assert first == second
    assert len({tuple(tokens) for tokens in first}) > 1, "batches must not all draw alike"


def test_text_in_text_out():
    generator = Generator([random_model()], "cpu")
    assert generator.encode_line("s4 s22 nobody") == [4, 22, 3, 2]
    assert generator.encode_line("") == [2]
    assert generator.decode_ids([4, 28, 2]) == "t4 t28"
    assert generator.translate(["s4 s5 s6", ""], OPTIONS)[0] == \
        generator.decode_ids(generator.infer([[4, 5, 6, 2]], OPTIONS)[0][0].tokens)


@pytest.mark.parametrize("remove_bpe,symbols,expected", [
    ("@@ ", ("ha@@", "us", "tür"), "haus tür"), ("sentencepiece", ("\u2581ha", "us", "\u2581tür"), "haus tür"),
    (None, ("ha@@", "us", "tür"), "ha@@ us tür")])
def test_subwords_are_joined(remove_bpe, symbols, expected):
    model = dataclasses.replace(random_model(tgt_vocab_size=7), tgt_symbols=(*SPECIAL, *symbols))
    generator = Generator([model], "cpu")
    assert generator.decode_ids([4, 5, 6, 2], remove_bpe) == expected


def test_what_is_wrong_is_said_in_a_sentence(ids):
    model = random_model()
    generator = Generator([dataclasses.replace(model, src_symbols=None)], "cpu")
    with pytest.raises(GenerationError, match="holds no source vocabulary"):
        generator.translate(["s4"])
    with pytest.raises(GenerationError, match="sentence 1 has a token id 23 outside of the source vocabulary of 23"):
        generator.infer([[4, 2], [23, 2]])
    with pytest.raises(GenerationError, match="sentence 0 is empty"):
        generator.infer([[]])
    with pytest.raises(GenerationError, match=r"target vocabularies differ \(29 and 31 types\)"):
        Generator([model, random_model(tgt_vocab_size=31)], "cpu")
    with pytest.raises(GenerationError, match="at least one model"):
        Generator([])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_give_scores_near_those_of_fp32(ids, dtype, device):
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("half precision is for GPUs; run with --device cuda")
    model = random_model()
    options = GenerationOptions(beam=1, max_len_b=4, min_len=4)
    exact, rough = (Generator([model], device, kind).infer(ids, options) for kind in (torch.float32, dtype))
    for one, other in zip(exact, rough, strict=True):
        torch.testing.assert_close(other[0].positional_scores[:1], one[0].positional_scores[:1], rtol=0, atol=0.1)


def test_lightseqs_class(ids, tmp_path):
    path = tmp_path / "transformer.pb"
    model_file.save(random_model(), path)
    tokens, scores = lsi.Transformer(path, 8, beam=3, nbest=3).infer([[4, 5, 6], [7, 8, 9]])
    assert tokens.dtype == np.int32 and scores.dtype == np.float32
    assert tokens.shape[:2] == scores.shape == (2, 3)
    assert (np.diff(scores, axis=1) <= 0).all(), "best first"
    assert (tokens[:, :, -1] == 2).all()

    padded = np.array([[4, 5, 6, 1, 1], [7, 8, 9, 10, 11]], dtype=np.int32)
    ragged = [[4, 5, 6], [7, 8, 9, 10, 11]]
    one_by_one = lsi.Transformer(str(path), 1, beam=3, nbest=3)
    for mine, theirs in zip(one_by_one.infer(padded), lsi.Transformer(path, 8, beam=3, nbest=3).infer(ragged),
                            strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_lightseqs_class_says_what_is_wrong(tmp_path):
    model_file.save(random_model(), tmp_path / "m.pb")
    with pytest.raises(ValueError, match="max_batch_size must be at least 1, got 0"):
        lsi.Transformer(tmp_path / "m.pb", 0)
    with pytest.raises(GenerationError, match="unknown option 'beem', did you mean 'beam'"):
        lsi.Transformer(tmp_path / "m.pb", 8, beem=3)
    with pytest.raises(ModelFileError):
        lsi.Transformer(tmp_path / "absent.pb", 8)


@pytest.mark.skipif(not has_int8(), reason="this build of torch lacks oneDNN's 8-bit operators")
def test_8_bits_translate_alike(ids, monkeypatch):
    """Scores of the same tokens, not of what each would choose; without compiled operators, which stay fp32."""
    for stack in (CompiledDecoder, CompiledEncoder):
        monkeypatch.setattr(stack, "serves", staticmethod(lambda *_: False))
    model = random_model()
    exact, rough = Generator([model], "cpu"), Generator([model], "cpu", torch.int8)
    assert rough.models[0].decoder.output.int8 is not None and exact.models[0].decoder.output.int8 is None
    sources = [torch.tensor(sentence) for sentence in ids]
    found = exact.generate(sources, dataclasses.replace(OPTIONS, nbest=1))
    prefixes = torch.full((len(ids), max(len(h[0].tokens) for h in found)), 1)
    for row, hypotheses in enumerate(found):
        prefixes[row, :len(hypotheses[0].tokens)] = hypotheses[0].tokens
    for mine, theirs in zip(rough.generate(sources, OPTIONS, prefixes), found, strict=True):
        assert mine[0].tokens.tolist() == theirs[0].tokens.tolist()
        torch.testing.assert_close(mine[0].positional_scores, theirs[0].positional_scores, rtol=0.1, atol=0.3)


def test_8_bits_are_for_the_cpu():
    with pytest.raises(GenerationError, match="8-bit weights are for the CPU; on a GPU use float16"):
        Generator([random_model()], "cuda", torch.int8)
