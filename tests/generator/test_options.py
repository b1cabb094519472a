"""GenerationOptions says no in words, all at once."""

import dataclasses

import pytest

from lightseq_fairseq.generator.options import GenerationError, GenerationOptions, refused_options


def test_defaults_are_fairseqs():
    from fairseq.dataclass.configs import GenerationConfig

    ours, theirs = GenerationOptions(), GenerationConfig()
    for name in ("beam", "nbest", "lenpen", "min_len", "max_len_a", "max_len_b", "match_source_len", "unkpen",
                 "temperature", "no_repeat_ngram_size", "sampling", "diverse_beam_strength"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.normalize_scores is not theirs.unnormalized


@pytest.mark.parametrize("name, value, message", [
    ("beam", 0, "beam must be at least 1, got 0"),
    ("beam", "five", "beam must be an integer, got 'five'"),
    ("beam", 2.5, "beam must be an integer, got 2.5"),
    ("lenpen", float("inf"), "lenpen must be a finite number, got inf"),
    ("sampling", 1, "sampling must be True or False, got 1"),
    ("seed", "x", "seed must be an integer or None, got 'x'"),
    ("temperature", 0.0, "temperature must be greater than 0"),
    ("min_len", -1, "min_len must not be negative"),
    ("max_len_b", -1, "max_len_b must not be negative"),
    ("diversity_rate", -0.5, "diversity_rate must not be negative"),
    ("sampling_topp", 1.5, "sampling_topp must lie between 0 and 1"),
    ("sampling_topk", 3, "sampling_topk needs sampling"),
    ("nbest", 6, "nbest must not exceed beam, got 6 of 5"),
    ("diverse_beam_groups", 2, "diverse_beam_groups must divide beam, got 2 and 5"),
    ("constraints", "any", "constraints must be 'ordered', 'unordered' or None, got 'any'"),
    ("constraints", True, "constraints must be 'ordered', 'unordered' or None, got True"),
])
def test_a_wrong_value_is_named(name, value, message):
    with pytest.raises(GenerationError, match=message):
        GenerationOptions(**{name: value})


@pytest.mark.parametrize("options, message", [
    (dict(sampling=True, diverse_beam_groups=5), "sampling and diverse_beam_groups exclude each other"),
    (dict(match_source_len=True, diversity_rate=0.5), "match_source_len and diversity_rate exclude each other"),
    (dict(constraints="ordered", sampling=True), "sampling and constraints exclude each other"),
    (dict(constraints="unordered", beam=4, diverse_beam_groups=2), "diverse_beam_groups and constraints exclude"),
    (dict(constraints="ordered", match_source_len=True), "match_source_len and constraints exclude each other"),
    (dict(constraints="ordered", diversity_rate=0.5), "diversity_rate and constraints exclude each other"),
    (dict(sampling=True, sampling_topk=5, sampling_topp=0.5), "sampling_topk and sampling_topp exclude each other"),
])
def test_contradictions_are_named(options, message):
    with pytest.raises(GenerationError, match=message):
        GenerationOptions(**options)


def test_everything_wrong_comes_in_one_sentence():
    with pytest.raises(GenerationError) as error:
        GenerationOptions(beam=0, temperature=-1.0, sampling_topk=2)
    assert str(error.value).count(";") == 2 and "\n" not in str(error.value)


def test_from_dict_knows_what_is_refused_and_what_is_misspelt():
    assert GenerationOptions.from_dict({"beam": 3, "lenpen": 1}).beam == 3
    with pytest.raises(GenerationError, match="lm_path .fusion with a language model. is not supported"):
        GenerationOptions.from_dict({"lm_path": "lm.pt"})
    with pytest.raises(GenerationError, match="unknown option 'lenpem', did you mean 'lenpen'?"):
        GenerationOptions.from_dict({"lenpem": 1.0})


def test_options_of_fairseq_are_refused_only_when_set():
    defaults = {"lm_weight": 0.0, "retain_dropout": False}
    assert refused_options(defaults, defaults) == []
    assert refused_options({**defaults, "retain_dropout": True}, defaults) == [
        "--retain-dropout (dropout at inference)"]


def test_options_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationOptions().beam = 3
