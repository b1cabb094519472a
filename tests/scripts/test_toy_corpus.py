"""The toy corpus: German that a teacher would accept, splits that do not overlap, the same text everywhere."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "toy_corpus" / "make.py"


@pytest.fixture(scope="module")
def grammar():
    spec = importlib.util.spec_from_file_location("toy_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def noun(grammar):
    return {noun.english[0]: noun for noun in grammar.read_nouns()}.__getitem__


@pytest.fixture(scope="module")
def adjective(grammar):
    return {adjective.english: adjective for adjective in grammar.read_adjectives()}.__getitem__


@pytest.fixture(scope="module")
def verb(grammar):
    return {verb.base + " " + verb.frame: verb for verb in grammar.read_verbs()}.__getitem__


@pytest.mark.parametrize(("words", "plural", "case", "english", "german"), [
    ("the old man", False, "nom", "the old man", "der alte Mann"),
    ("the old man", True, "dat", "the old men", "den alten Männern"),
    ("a small girl", False, "nom", "a small girl", "ein kleines Mädchen"),
    ("a old student", False, "acc", "an old student", "einen alten Studenten"),
    ("this dark house", False, "dat", "this dark house", "diesem dunklen Haus"),
    ("my expensive car", True, "nom", "my expensive cars", "meine teuren Autos"),
    ("two tired bear", True, "acc", "two tired bears", "zwei müde Bären"),
    ("our new cup", False, "dat", "our new cup", "unserer neuen Tasse"),
    ("every brave queen", False, "nom", "every brave queen", "jede mutige Königin"),
    ("no hungry lion", False, "acc", "no hungry lion", "keinen hungrigen Löwen"),
])
def test_noun_phrases_are_inflected(grammar, noun, adjective, words, plural, case, english, german):
    determiner, attribute, head = words.split()
    phrase = grammar.NounPhrase(noun(head), plural, determiner, adjective(attribute))
    assert " ".join(phrase.english(case)) == english
    assert " ".join(phrase.german(case)) == german


@pytest.mark.parametrize(("infinitive", "third", "forms"), [
    ("schlafen", "schläft", "schlafe schläfst schläft schlafen schlafen"),
    ("lesen", "liest", "lese liest liest lesen lesen"),
    ("arbeiten", "arbeitet", "arbeite arbeitest arbeitet arbeiten arbeiten"),
    ("lächeln", "lächelt", "lächle lächelst lächelt lächeln lächeln"),
    ("füttern", "füttert", "füttere fütterst füttert füttern füttern"),
    ("grüßen", "grüßt", "grüße grüßt grüßt grüßen grüßen"),
    ("wissen", "weiß", "weiß weißt weiß wissen wissen"),
])
def test_verbs_are_conjugated(grammar, infinitive, third, forms):
    assert [grammar.conjugate(infinitive, third, person) for person in grammar.PERSONS] == forms.split()


def test_word_order(grammar, noun, verb):
    """Verb second, inversion, verb last, separable prefix, perfect, "kein", pronouns first: by hand."""
    child, dog, letter = (grammar.NounPhrase(noun(word)) for word in ("child", "dog", "letter"))
    a_letter = grammar.NounPhrase(noun("letter"), determiner="a")
    her = grammar.Pronoun("she")

    def say(clause, conjunction="", **how):
        english = grammar.spell(clause.english(question=how.get("inverted", False)), ".")
        if conjunction:
            return english, grammar.spell([conjunction, *clause.german_last()], ".")
        return english, grammar.spell(clause.german_first(**how), ".")

    clause = grammar.Clause
    today = ("today", "heute")
    assert say(clause(child, verb("pick up a"), direct=her)) == ("The child picks her up.", "Das Kind holt sie ab.")
    assert say(clause(child, verb("pick up a"), "past", direct=dog, time=today, front="time")) == (
        "Today the child picked up the dog.", "Heute hat das Kind den Hund abgeholt.")
    assert say(clause(child, verb("fall asleep i")), "weil") == ("The child falls asleep.", "Weil das Kind einschläft.")
    assert say(clause(dog, verb("run after d"), "past", indirect=child), "dass") == (
        "The dog ran after the child.", "Dass der Hund dem Kind nachgelaufen ist.")
    assert say(clause(child, verb("give b"), "can", direct=letter, indirect=dog)) == (
        "The child can give the letter to the dog.", "Das Kind kann dem Hund den Brief geben.")
    assert say(clause(child, verb("read a"), negated=True, direct=a_letter)) == (
        "The child does not read a letter.", "Das Kind liest keinen Brief.")
    assert say(clause(child, verb("wait for p"), "want to", negated=True, governed=dog)) == (
        "The child does not want to wait for the dog.", "Das Kind will nicht auf den Hund warten.")
    assert say(clause(child, verb("love a"), direct=dog), inverted=True) == (
        "Does the child love the dog.", "Liebt das Kind den Hund.")
    helped = clause(her, verb("help d"), indirect=dog)
    dogs = grammar.NounPhrase(noun("dog"), True, relative=helped, relative_case="dat")
    assert say(clause(dogs, verb("sleep i"))) == (
        "The dogs that she helps sleep.", "Die Hunde, denen sie hilft, schlafen.")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy-corpus")
    subprocess.run([sys.executable, SCRIPT, folder, "--train", "2000", "--valid", "100", "--test", "100"], check=True)
    return folder


def test_splits_are_parallel_and_disjoint(corpus):
    for language in ("en", "de"):
        sentences = [line for split in ("train", "valid", "test")
                     for line in (corpus / f"{split}.{language}").read_text(encoding="utf-8").splitlines()]
        assert len(sentences) == len(set(sentences)) == 2200
        assert all(line[0].isupper() and line[-1] in ".?" and ",," not in line for line in sentences)


def test_the_seed_decides_the_text(corpus):
    """On every Python: the text of the demo is the same everywhere, so that its BLEU can be compared."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(corpus.iterdir()))).hexdigest()
    assert digest == "1a004c6e80b779695f13a42a972bb1a4b8f4a1e9fff7a68fb9acee87b603dbb1"
