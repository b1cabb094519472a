"""Steps with fixed shapes of a decoder that continues texts find what the loop that asks the host finds."""

from __future__ import annotations

import pytest
import torch

from lightseq_fairseq.config import TransformerConfig
from lightseq_fairseq.generator.beam_search import decode
from lightseq_fairseq.generator.device_search import DeviceSearch
from lightseq_fairseq.generator.generator import Generator
from lightseq_fairseq.generator.model import LanguageModel
from lightseq_fairseq.generator.options import GenerationError, GenerationOptions
from lightseq_fairseq.generator.refill import Slots
from lightseq_fairseq.layers import decode_step
from lightseq_fairseq.model_file import ModelFile
from lightseq_fairseq.model_file.spec import tensor_shapes, tied_tensors
from tests.generator.test_device_search import assert_same, raw_weights  # noqa: F401  an automatic fixture

PRE = dict(decoder_normalize_before=True)
MODELS = {
    "pre-LN": PRE,
    "post-LN": {},
    "learned positions from row 0": PRE | dict(decoder_positions="learned", position_offset=0, activation_fn="gelu"),
    "embedding norm, tied": dict(layernorm_embedding=True, share_decoder_input_output_embed=True),
    "projections": PRE | dict(decoder_input_dim=32, decoder_output_dim=48),
    "no positions, output bias": PRE | dict(decoder_positions="none", output_bias=True, tgt_vocab_size=131,
                                            src_vocab_size=131, activation_fn="gelu_accurate"),
}


def random_model(seed=0, **changes) -> ModelFile:
    config = TransformerConfig(**{**dict(
        stacks="decoder", no_cross_attention=True, src_vocab_size=29, tgt_vocab_size=29, decoder_layers=2,
        decoder_embed_dim=16, decoder_ffn_embed_dim=24, decoder_attention_heads=2, max_target_positions=40), **changes})
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in tensor_shapes(config).items()}
    tensors |= {alias: tensors[name] for alias, name in tied_tensors(config).items()}
    return ModelFile(config, tensors)


def texts(lengths, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 29, (n,), generator=generator) for n in lengths]


def compare(model, contexts, limits, **options):
    options = GenerationOptions(nbest=options["beam"], **options)
    search = DeviceSearch(model)
    assert search.takes(options, [len(text) for text in contexts], limits)
    for _ in range(2):  # what one batch leaves behind must not reach the next
        found = search.decode(contexts, options, None, limits)
        assert_same(found, decode([model], contexts, options, None, limits))
    return found


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_texts_of_different_lengths(name, beam, device):
    compare(LanguageModel(random_model(**MODELS[name]), device), texts([5, 1, 11, 3, 1, 8]), [17, 9, 12, 3, 17, 1],
            beam=beam)


@pytest.mark.parametrize("beam", [1, 3])
def test_single_tokens_alone(beam, device):
    """Nothing is read in front of any first step."""
    compare(LanguageModel(random_model(), device), texts([1, 1]), [12, 12], beam=beam)


def test_up_to_the_last_position(device):
    model = LanguageModel(random_model(**MODELS["learned positions from row 0"]), device)
    compare(model, texts([30, 2]), [10, 38], beam=2, min_len=9)
    compare(model, texts([33, 2]), [7, 38], beam=2)  # a power of two above 33 is more than there are


def test_which_models_are_taken():
    assert decode_step.fits(random_model().config)
    assert not decode_step.fits(random_model(decoder_attention_heads=4).config), "heads of 4 elements"
    both = TransformerConfig(src_vocab_size=9, tgt_vocab_size=9)
    assert decode_step.fits(both)
    assert not decode_step.fits(TransformerConfig(src_vocab_size=9, tgt_vocab_size=9, no_cross_attention=True))


def test_a_generator_uses_it_on_a_gpu(device):
    generator = Generator([random_model()], device)
    assert (generator.device_search is not None) == (device.type == "cuda")
    found = generator.generate(texts([4, 7]), GenerationOptions(beam=3, max_len_b=6))
    assert_same(found, decode(generator.models, texts([4, 7]), GenerationOptions(beam=3, max_len_b=6)))
    if generator.device_search is not None:
        assert generator.device_search.plans
    with pytest.raises(GenerationError, match="slots are for one encoder-decoder model"):
        generator.reserve(Slots(4, 2, 32, 32))
    many = [text.tolist() for text in texts([3] * 200)]
    assert len(generator.infer(many, GenerationOptions(beam=1, max_len_b=3))) == 200, "no slots of its own"


@pytest.mark.parametrize("options", [
    dict(beam=1), dict(beam=1, lenpen=0.0, max_len_b=1), dict(beam=1, min_len=0, normalize_scores=False),
    dict(beam=2), dict(beam=2, early_stopping=False), dict(beam=1, no_repeat_ngram_size=1),
    dict(beam=1, include_context=True),
], ids=str)
def test_what_the_device_does_not_know_is_found_all_the_same(options, device):
    """Hypotheses without eos at their limit, and texts whose tokens count."""
    generator = Generator([random_model()], device)
    contexts = texts([4, 7, 1, 9])
    options = GenerationOptions(**{"max_len_b": 12, "force_eos": False, **options})
    generator.device_search = DeviceSearch(generator.models[0])
    assert_same(generator.generate(contexts, options), decode(generator.models, contexts, options))
    served = options.beam == 1 and not options.no_repeat_ngram_size and not options.include_context
    assert bool(generator.device_search.plans) == served
