"""Continuations of texts are those of Hugging Face's generate and of fairseq's language models, however batched."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightseq_fairseq.export.huggingface import from_huggingface
from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from tests import tolerances
from tests.export.hugging_face_models import VOCAB, folder_of, random_model
from tests.export.test_huggingface import NAMES, texts

CONTEXTS = [5, 1, 9, 3, 9]
CUT = GenerationOptions(beam=1, max_len_b=12, min_len=0, force_eos=False)
"""What generate(max_new_tokens=12) does."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Stock model and exported model by name."""
    made = {}
    for name in NAMES["decoder"]:
        stock = random_model(name)
        made[name] = stock, from_huggingface(folder_of(stock, tmp_path_factory.mktemp("gpt2"))).model
    return made


def hugging_face(stock, context, **options):
    """Ids that follow one text; a pad, which random weights would say, is not said."""
    pad = stock.config.pad_token_id
    if pad is not None:
        options["suppress_tokens"] = [pad]
    pad = stock.config.eos_token_id if pad is None else pad
    with torch.no_grad():
        found = stock.generate(context[None], attention_mask=torch.ones_like(context[None]), pad_token_id=pad,
                               do_sample=False, **options)
    return [row[len(context):].tolist() for row in found]


def until_eos(ids, eos):
    """Without what follows the first eos."""
    return ids[:ids.index(eos) + 1] if eos in ids else ids


@pytest.mark.parametrize("name", NAMES["decoder"])
def test_greedy(name, models, device):
    stock, exported = models[name]
    contexts = texts(CONTEXTS)
    found = Generator([exported], device).generate(contexts, CUT)
    for context, hypotheses in zip(contexts, found, strict=True):
        expected = hugging_face(stock, context, max_new_tokens=12)[0]
        assert hypotheses[0].tokens.tolist() == expected


@pytest.mark.parametrize("lenpen", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("beam", [2, 4])
@pytest.mark.parametrize("name", NAMES["decoder"])
def test_beam_search(name, beam, lenpen, models, device):
    stock, exported = models[name]
    contexts = texts(CONTEXTS, seed=beam)
    options = dataclasses.replace(CUT, beam=beam, lenpen=lenpen, nbest=2)
    found = Generator([exported], device).generate(contexts, options)
    for context, hypotheses in zip(contexts, found, strict=True):
        expected = hugging_face(stock, context, max_new_tokens=12, num_beams=beam, early_stopping=True,
                                length_penalty=lenpen, num_return_sequences=2)
        eos = exported.config.eos
        assert [h.tokens.tolist() for h in hypotheses] == [until_eos(ids, eos) for ids in expected]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("beam", [1, 3, 4])
def test_where_many_hypotheses_end_early(beam, early, models, device):
    """eos is made likely, so that hypotheses of different lengths compete."""
    stock, exported = models["gpt2, untied, erf"]
    weight = stock.lm_head.weight.detach().clone()
    eos = exported.config.eos
    tensors = {key: tensor.clone() for key, tensor in exported.tensors.items()}
    tensors["decoder.output_projection.weight"][eos] *= 2.5
    likely = dataclasses.replace(exported, tensors=tensors)
    try:
        stock.lm_head.weight.data[eos] *= 2.5
        contexts = texts([4, 7, 2, 6, 3, 8], seed=11)
        options = dataclasses.replace(CUT, beam=beam, nbest=beam, early_stopping=early)
        found = Generator([likely], device).generate(contexts, options)
        ended = 0
        for context, hypotheses in zip(contexts, found, strict=True):
            theirs = dict(num_beams=beam, early_stopping=early, num_return_sequences=beam) if beam > 1 else {}
            expected = hugging_face(stock, context, max_new_tokens=12, **theirs)
            ids = [h.tokens.tolist() for h in hypotheses]
            assert ids == [until_eos(row, eos) for row in expected]
            ended += ids[0][-1] == eos
        assert 0 < ended, "a test of early ends needs some"
    finally:
        stock.lm_head.weight.data.copy_(weight)


@pytest.mark.parametrize("options", [dict(min_length=8), dict(repetition=2), dict(repetition=3), dict(temperature=0.5)],
                         ids=str)
def test_options(options, models, device):
    stock, exported = models["gpt2"]
    contexts = texts(CONTEXTS, seed=4)
    ours, theirs = {}, {}
    if "repetition" in options:  # the text in front counts
        ours, theirs = {"no_repeat_ngram_size": options["repetition"]}, {"no_repeat_ngram_size": options["repetition"]}
    elif "min_length" in options:
        ours, theirs = {"min_len": 8}, {"min_new_tokens": 8}
    else:
        ours = options
    found = Generator([exported], device).generate(contexts, dataclasses.replace(CUT, **ours))
    for context, hypotheses in zip(contexts, found, strict=True):
        expected = hugging_face(stock, context, max_new_tokens=12, **theirs)[0]
        assert hypotheses[0].tokens.tolist() == expected


@pytest.mark.parametrize("options", [dict(beam=1), dict(beam=4, nbest=4), dict(beam=3, no_repeat_ngram_size=2)],
                         ids=str)
def test_results_do_not_depend_on_the_batch(options, models, device):
    generator = Generator([models["gpt2"][1]], device)
    options = GenerationOptions(max_len_b=10, **options)
    contexts = [text.tolist() for text in texts(CONTEXTS)]
    together = generator.infer(contexts, options)
    for context, hypotheses in zip(contexts, together, strict=True):
        alone = generator.infer([context], options)[0]
        assert [h.tokens.tolist() for h in hypotheses] == [h.tokens.tolist() for h in alone]
        for one, other in zip(hypotheses, alone, strict=True):
            torch.testing.assert_close(one.positional_scores, other.positional_scores, **tolerances.SCORE)
    assert all(h[0].tokens[-1] == generator.config.eos for h in together), "eos is forced at the limit"


def test_scores_are_the_model_s(models, device):
    stock, exported = models["gpt2"]
    contexts = texts(CONTEXTS, seed=8)
    for context, hypotheses in zip(contexts, Generator([exported], device).generate(
            contexts, dataclasses.replace(CUT, beam=3, include_context=True, max_len_b=20)), strict=True):
        whole = torch.cat((context[:1], hypotheses[0].tokens))
        assert whole[:len(context)].tolist() == context.tolist()
        with torch.no_grad():
            lprobs = stock(whole[None]).logits[0].log_softmax(-1)
        expected = lprobs[:-1].gather(1, whole[1:, None])[:, 0]
        torch.testing.assert_close(hypotheses[0].positional_scores, expected, **tolerances.SCORE)
        assert hypotheses[0].score == pytest.approx(float(expected.mean()), abs=1e-4)


def test_samples_follow_the_probabilities(models, device):
    """Of 4000 draws of one token, those that top-k and top-p allow, as often as they should come."""
    stock, exported = models["gpt2"]
    context = texts([6])[0]
    with torch.no_grad():
        probs = stock(context[None]).logits[0, -1].div(4.0).softmax(-1)
    generator = Generator([exported], device)
    for trim in (dict(sampling_topk=5), dict(sampling_topp=0.6)):
        options = dataclasses.replace(CUT, sampling=True, seed=3, max_len_b=1, temperature=4.0, **trim)
        found = generator.generate([context] * 4000, options)
        counts = torch.bincount(torch.tensor([h[0].tokens[0] for h in found]), minlength=VOCAB) / 4000
        order = probs.argsort(descending=True)
        kept = order[:5] if "sampling_topk" in trim else order[:int((probs[order].cumsum(0) < 0.6).sum()) + 1]
        expected = torch.zeros(VOCAB).index_put_((kept,), probs[kept] / probs[kept].sum())
        assert counts[VOCAB - 1:].sum() == 0 or (VOCAB - 1) in kept
        torch.testing.assert_close(counts[:VOCAB], expected, rtol=0, atol=0.035)


def test_what_is_wrong_is_said(models, device):
    generator = Generator([models["gpt2"][1]], device)
    long = torch.arange(8, 8 + 20)
    with pytest.raises(GenerationError, match=r"texts \[0\] and their continuations are longer than the model's 31"):
        generator.generate([long], GenerationOptions(), max_lens=[12])
    assert len(generator.generate([long], dataclasses.replace(CUT, max_len_b=200))[0][0].tokens) <= 11
    with pytest.raises(GenerationError, match=r"texts \[1\] have no tokens"):
        generator.generate([long, long[:0]], dataclasses.replace(CUT, max_len_b=3))
    with pytest.raises(GenerationError, match="return_alignment needs a source"):
        generator.generate([long], GenerationOptions(return_alignment=True, max_len_b=3))
