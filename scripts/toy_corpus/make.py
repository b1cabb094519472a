#!/usr/bin/env python3
"""Write a small English-German parallel corpus made by a grammar: train, valid and test, in .en and .de.

Both sides come from one plan of the sentence, and each language orders and inflects it by its own rules: German
has three genders and three cases, weak, mixed and strong adjectives, the verb second in main clauses and last in
subordinate ones, separable prefixes, the perfect for the English past, "kein" for a negated indefinite object.
No sentence occurs twice, within a split or across them. The same seed gives the same corpus.

The word lists beside this file and every corpus made from them are in the public domain (CC0 1.0).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# ---------------------------------------------------------------- words

MODALS = {"can": "können", "must": "müssen", "should": "sollen", "may": "dürfen", "want to": "wollen"}
NUMBERS = {"two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs", "seven": "sieben",
           "eight": "acht", "nine": "neun", "ten": "zehn", "eleven": "elf", "twelve": "zwölf", "twenty": "zwanzig",
           "thirty": "dreißig", "a hundred": "hundert"}
TIMES = {
    "present": {"today": "heute", "now": "jetzt", "every day": "jeden Tag", "this morning": "heute Morgen",
                "in the evening": "am Abend", "at night": "nachts", "every year": "jedes Jahr"},
    "past": {"yesterday": "gestern", "last week": "letzte Woche", "last year": "letztes Jahr", "on Monday": "am Montag",
             "on Sunday": "am Sonntag", "two days ago": "vor zwei Tagen", "a month ago": "vor einem Monat",
             "in winter": "im Winter", "in the morning": "am Morgen"},
    "future": {"tomorrow": "morgen", "next week": "nächste Woche", "soon": "bald", "next year": "nächstes Jahr",
               "on Friday": "am Freitag", "in summer": "im Sommer", "tonight": "heute Abend"},
}
FREQUENCIES = {"often": "oft", "always": "immer", "sometimes": "manchmal", "rarely": "selten"}
MANNERS = {"slowly": "langsam", "quickly": "schnell", "quietly": "leise", "with pleasure": "gern", "alone": "allein",
           "carefully": "vorsichtig"}
PLACES = {"in": "in", "behind": "hinter", "next to": "neben", "in front of": "vor"}
CONJUNCTIONS = {"because": "weil", "although": "obwohl", "if": "wenn", "before": "bevor", "while": "während"}
QUESTION_WORDS = {"where": "wo", "when": "wann", "why": "warum", "how": "wie"}
POSSESSIVES = {"my": "mein", "your": "dein", "his": "sein", "her": "ihr", "our": "unser"}
PRONOUNS = {  # English object; German nominative, accusative, dative; person and number
    "I": "me ich mich mir 1s", "you": "you du dich dir 2s", "he": "him er ihn ihm 3s",
    "she": "her sie sie ihr 3s", "we": "us wir uns uns 1p", "they": "them sie sie ihnen 3p"}

PARTICLES = (" up", " along", " away")  # a pronoun stands before them: "picks her up"

CASES = ("nom", "acc", "dat")
Endings = dict[str, tuple[str, str, str, str]]  # by case; masculine, feminine, neuter, plural
ARTICLE: Endings = {"nom": ("der", "die", "das", "die"), "acc": ("den", "die", "das", "die"),
                    "dat": ("dem", "der", "dem", "den")}
EIN: Endings = {"nom": ("", "e", "", "e"), "acc": ("en", "e", "", "e"), "dat": ("em", "er", "em", "en")}
STRONG: Endings = {"nom": ("er", "e", "es", "e"), "acc": ("en", "e", "es", "e"), "dat": ("em", "er", "em", "en")}
WEAK: Endings = {"nom": ("e", "e", "e", "en"), "acc": ("en", "e", "e", "en"), "dat": ("en", "en", "en", "en")}
MIXED: Endings = {"nom": ("er", "e", "es", "en"), "acc": ("en", "e", "es", "en"), "dat": ("en", "en", "en", "en")}
CONTRACTIONS = {("in", "dem"): "im", ("an", "dem"): "am", ("von", "dem"): "vom"}
PERSONS = ("1s", "2s", "3s", "1p", "3p")
IRREGULAR = {
    "sein": "bin bist ist sind sind", "war": "war warst war waren waren", "haben": "habe hast hat haben haben",
    "werden": "werde wirst wird werden werden", "wissen": "weiß weißt weiß wissen wissen",
    "können": "kann kannst kann können können", "müssen": "muss musst muss müssen müssen",
    "sollen": "soll sollst soll sollen sollen", "dürfen": "darf darfst darf dürfen dürfen",
    "wollen": "will willst will wollen wollen"}


class Noun(NamedTuple):
    english: tuple[str, str]  # singular, plural
    german: tuple[str, str]
    gender: int
    kind: str
    weak: bool


class Adjective(NamedTuple):
    english: str
    english_comparative: str
    german: str
    stem: str
    german_comparative: str
    kinds: str


class Verb(NamedTuple):
    frame: str
    base: str
    past: str
    prefix: str
    infinitive: str
    third: str
    participle: str
    auxiliary: str
    preposition: str
    case: str
    subjects: str
    objects: str


def entries(table: str) -> Iterator[list[list[str]]]:
    """The lines of a word list, each as its fields, each as its words."""
    for line in (Path(__file__).parent / f"{table}.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield [[word.replace("~", " ") for word in part.split()] for part in line.split("|")]


def read_nouns() -> list[Noun]:
    return [Noun((singular, plural), (de_singular, de_plural), "mfn".index(gender), kind[0], kind.endswith("w"))
            for (singular, plural), (de_singular, de_plural, gender), (kind,) in entries("nouns")]


def read_adjectives() -> list[Adjective]:
    return [Adjective(*english, *german, kinds) for english, german, (kinds,) in entries("adjectives")]


def read_verbs() -> list[Verb]:
    verbs = []
    for (frame, base, past), (infinitive, third, participle), *government, kinds in entries("verbs"):
        preposition, case = government[0] if government else ("", "")
        subjects, objects = kinds if len(kinds) == 2 else (kinds[0], "")
        prefix, _, infinitive = infinitive.rpartition("+")
        auxiliary = "sein" if participle.endswith("*") else "haben"
        verbs.append(Verb(frame, base, past, prefix, infinitive, third, participle.rstrip("*"), auxiliary,
                          preposition, case, subjects, objects))
    return verbs


# ---------------------------------------------------------------- inflection


def third_singular(verb: str) -> str:
    """English: "go" -> "goes", "cry" -> "cries", "get up" -> "gets up"."""
    first, space, rest = verb.partition(" ")
    if first.endswith("y") and first[-2] not in "aeiou":
        first = first[:-1] + "ie"
    elif first.endswith(("s", "sh", "ch", "x", "o")):
        first += "e"
    return first + "s" + space + rest


def conjugate(infinitive: str, third: str, person: str) -> str:
    """German present tense. English "you" is "du" throughout."""
    if infinitive in IRREGULAR:
        return IRREGULAR[infinitive].split()[PERSONS.index(person)]
    if person == "1s":
        if infinitive.endswith("eln"):
            return infinitive[:-3] + "le"
        return infinitive.removesuffix("n").removesuffix("e") + "e"
    if person == "2s":
        stem = third.removesuffix("t")
        return third if stem[-1] in "sßz" else stem + "st"
    return third if person == "3s" else infinitive


# ---------------------------------------------------------------- noun phrases


@dataclass(frozen=True)
class Pronoun:
    word: str

    @property
    def person(self) -> str:
        return PRONOUNS[self.word].split()[-1]

    def english(self, case: str = "nom") -> list[str]:
        return [self.word if case == "nom" else PRONOUNS[self.word].split()[0]]

    def german(self, case: str) -> list[str]:
        return [PRONOUNS[self.word].split()[1 + CASES.index(case)]]


@dataclass(frozen=True)
class Pair:
    """Two phrases joined by "and"."""

    first: Phrase
    second: Phrase
    person = "3p"

    def english(self, case: str = "nom") -> list[str]:
        return [*self.first.english(case), "and", *self.second.english(case)]

    def german(self, case: str) -> list[str]:
        return [*self.first.german(case), "und", *self.second.german(case)]


@dataclass(frozen=True)
class NounPhrase:
    """Determiner, adjective, noun and relative clause; ``relative_case`` is the pronoun's case in that clause."""

    noun: Noun
    plural: bool = False
    determiner: str = "the"
    adjective: Adjective | None = None
    relative: Clause | None = None
    relative_case: str = "nom"

    @property
    def person(self) -> str:
        return "3p" if self.plural else "3s"

    def english(self, case: str = "nom") -> list[str]:
        words = [self.adjective.english] if self.adjective else []
        words.append(self.noun.english[self.plural])
        if self.determiner == "a" and words[0][0] in "aeiou":
            words.insert(0, "an")
        elif self.determiner:
            words.insert(0, "these" if self.determiner == "this" and self.plural else self.determiner)
        if self.relative:
            pronoun = "that" if self.noun.kind != "p" else "who" if self.relative_case == "nom" else "whom"
            words += [pronoun, *self.relative.english(relative=self.relative_case)]
        return words

    def german(self, case: str, negated: bool = False) -> list[str]:
        form = 3 if self.plural else self.noun.gender
        determiner, endings = self.german_determiner(case, form, negated)
        words = [determiner] if determiner else []
        if self.adjective:
            words.append(self.adjective.stem + endings[case][form])
        words.append(self.german_noun(case))
        if self.relative:
            dative_plural = self.plural and self.relative_case == "dat"
            pronoun = "denen" if dative_plural else ARTICLE[self.relative_case][form]
            words += [",", pronoun, *self.relative.german_last(relative=self.relative_case), ","]
        return words

    def german_determiner(self, case: str, form: int, negated: bool) -> tuple[str, Endings]:
        """The determiner, "" for none, and the endings that an adjective takes behind it."""
        if self.determiner == "the":
            return ARTICLE[case][form], WEAK
        if self.determiner in ("this", "every"):
            return {"this": "dies", "every": "jed"}[self.determiner] + STRONG[case][form], WEAK
        stem = "kein" if negated or self.determiner == "no" else {"a": "ein", **POSSESSIVES}.get(self.determiner)
        if stem:
            return stem + EIN[case][form], MIXED
        return NUMBERS.get(self.determiner, ""), STRONG

    def german_noun(self, case: str) -> str:
        singular, plural = self.noun.german
        if self.plural:
            return plural + "n" if case == "dat" and plural[-1] not in "ns" else plural
        return plural if self.noun.weak and case != "nom" else singular


Phrase = NounPhrase | Pronoun | Pair


def takes_kein(phrase: Phrase | None) -> bool:
    """Whether German negates this object, not the verb."""
    return isinstance(phrase, NounPhrase) and phrase.determiner in ("a", "")


# ---------------------------------------------------------------- clauses


@dataclass(frozen=True)
class Clause:
    """What is said, before either language puts it in order.

    A clause may be asked to leave out the phrase in one case (``relative``), whose place a relative pronoun took.
    """

    subject: Phrase
    verb: Verb | None  # None: to be
    tense: str = "present"  # or past, future, one of MODALS
    negated: bool = False
    direct: Phrase | None = None  # accusative
    indirect: Phrase | None = None  # dative
    governed: Phrase | None = None  # behind the verb's preposition
    predicate: Adjective | None = None
    compared: Phrase | None = None  # "... than the dog"
    said: Clause | None = None  # "... that the dog sleeps"
    frequency: str = ""
    manner: str = ""
    time: tuple[str, str] | None = None  # English, German
    place: tuple[str, NounPhrase] | None = None
    front: str = ""  # "time" or "place" where that comes first

    def english(self, question: bool = False, relative: str = "") -> list[str]:
        """[front] subject verb objects manner place time [that ...]; a question has the finite verb first."""
        finite, rest = self.english_verb(question)
        subject = [] if relative == "nom" else self.subject.english()
        frequency = [self.frequency] if self.frequency else []
        if question:
            words = [finite, *subject, *frequency, *rest]
        elif self.verb and not rest:
            words = [*subject, *frequency, finite]
        else:
            words = [*subject, finite, *frequency, *rest]
        if isinstance(self.direct, Pronoun) and words[-1].endswith(PARTICLES):
            verb, _, particle = words.pop().rpartition(" ")
            words += [verb, *self.direct.english("acc"), particle]
        elif self.direct and relative != "acc":
            words += self.direct.english("acc")
        if self.governed:
            words += self.governed.english("acc")
        if self.indirect and relative != "dat":
            words += [*(["to"] if self.direct else []), *self.indirect.english("acc")]
        if self.predicate and self.compared:
            words += [self.predicate.english_comparative, "than", *self.compared.english()]
        elif self.predicate:
            words.append(self.predicate.english)
        if self.manner:
            words.append(self.manner)
        adverbials = {"place": [self.place[0], *self.place[1].english()] if self.place else [],
                      "time": [self.time[0]] if self.time else []}
        words = [*adverbials.pop(self.front, []), *words, *(word for part in adverbials.values() for word in part)]
        return [*words, "that", *self.said.english()] if self.said else words

    def english_verb(self, question: bool) -> tuple[str, list[str]]:
        """The finite verb, and what follows it (after the subject, in a question)."""
        negation = ["not"] if self.negated else []
        person = self.subject.person
        base = self.verb.base if self.verb else "be"
        if self.tense == "future" or self.tense in MODALS and self.tense != "want to":
            return "will" if self.tense == "future" else self.tense, [*negation, base]
        if self.verb is None:
            now, then = {"1s": ("am", "was"), "3s": ("is", "was")}.get(person, ("are", "were"))
            return then if self.tense == "past" else now, negation
        if self.tense == "want to":
            base = "want to " + base
        if self.negated or question:
            return "did" if self.tense == "past" else "does" if person == "3s" else "do", [*negation, base]
        if self.tense == "past":
            return self.verb.past, []
        return third_singular(base) if person == "3s" else base, []

    def german_first(self, inverted: bool = False) -> list[str]:
        """Main clause: the finite verb second, or before the subject where something else came first (``inverted``)."""
        finite, closing, _ = self.german_verb()
        front = {"time": self.german_time(), "place": self.german_place()}.get(self.front, [])
        subject = self.subject.german("nom")
        opening = [*front, finite, *subject] if front or inverted else [*subject, finite]
        return [*opening, *self.german_field(), *closing, *self.german_said()]

    def german_last(self, relative: str = "") -> list[str]:
        """Subordinate clause: the finite verb behind everything, joined with its prefix."""
        _, _, closing = self.german_verb()
        subject = [] if relative == "nom" else self.subject.german("nom")
        return [*subject, *self.german_field(relative), *closing, *self.german_said()]

    def german_verb(self) -> tuple[str, list[str], list[str]]:
        """The finite verb; what ends a main clause; what ends a subordinate clause, the finite verb included."""
        person, verb = self.subject.person, self.verb
        if verb is None and self.tense in ("present", "past"):
            finite = conjugate("war" if self.tense == "past" else "sein", "", person)
            return finite, [], [finite]
        if verb and self.tense == "present":
            finite = conjugate(verb.infinitive, verb.third, person)
            return finite, [verb.prefix] if verb.prefix else [], [verb.prefix + finite]
        if verb and self.tense == "past":
            finite, closing = conjugate(verb.auxiliary, "", person), verb.participle
        else:
            finite = conjugate(MODALS.get(self.tense, "werden"), "", person)
            closing = verb.prefix + verb.infinitive if verb else "sein"
        return finite, [closing], [closing, finite]

    def german_field(self, relative: str = "") -> list[str]:
        """Pronouns, time, dative, accusative, "nicht", manner, place, prepositional object, predicate."""
        kein = next((phrase for phrase in (self.direct, self.governed, self.indirect) if takes_kein(phrase)), None)
        objects = [(phrase, case) for phrase, case in ((self.direct, "acc"), (self.indirect, "dat"))
                   if phrase and case != relative]
        pronouns = [word for phrase, case in objects if isinstance(phrase, Pronoun) for word in phrase.german(case)]
        nouns = [word for phrase, case in reversed(objects) if not isinstance(phrase, Pronoun)
                 for word in self.german_object(phrase, case, kein)]
        words = [*pronouns, *(self.german_time() if self.front != "time" else [])]
        words += [FREQUENCIES[self.frequency]] if self.frequency else []
        words += nouns
        words += ["nicht"] if self.negated and kein is None else []
        words += [MANNERS[self.manner]] if self.manner else []
        words += self.german_place() if self.front != "place" else []
        if self.verb and self.governed:
            words += [self.verb.preposition, *self.german_object(self.governed, self.verb.case, kein)]
        if self.predicate and self.compared:
            words += [self.predicate.german_comparative, "als", *self.compared.german("nom")]
        elif self.predicate:
            words.append(self.predicate.german)
        return words

    def german_object(self, phrase: Phrase, case: str, kein: Phrase | None) -> list[str]:
        if isinstance(phrase, NounPhrase):
            return phrase.german(case, negated=self.negated and phrase is kein)
        return phrase.german(case)

    def german_time(self) -> list[str]:
        return [self.time[1]] if self.time else []

    def german_place(self) -> list[str]:
        return [PLACES[self.place[0]], *self.place[1].german("dat")] if self.place else []

    def german_said(self) -> list[str]:
        return [",", "dass", *self.said.german_last()] if self.said else []


# ---------------------------------------------------------------- sentences


def spell(words: Sequence[str], end: str) -> str:
    """Words as text: contractions, commas joined and never doubled, a capital, the closing mark."""
    text: list[str] = []
    for word in " ".join(words).split():
        if text and (text[-1], word) in CONTRACTIONS:
            text[-1] = CONTRACTIONS[text[-1], word]
        elif word != ",":
            text.append(word)
        elif not text[-1].endswith(","):
            text[-1] += ","
    sentence = " ".join(text).rstrip(",") + end
    return sentence[0].upper() + sentence[1:]


class Speaker:
    """Draws sentences; ``rng`` alone decides which."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.nouns, self.adjectives, self.verbs = read_nouns(), read_adjectives(), read_verbs()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, words: Sequence[str] | dict[str, str]) -> str:
        return self.rng.choice(list(words))

    def phrase(self, kinds: str, tense: str = "present", depth: int = 1, subject: bool = False) -> Phrase:
        """A noun phrase of one of ``kinds``; ``depth`` bounds the clauses inside it."""
        if "p" in kinds and self.chance(0.3 if subject else 0.15):
            return Pronoun(self.pick(PRONOUNS))
        phrase = self.noun_phrase(kinds, tense, depth, subject)
        if subject and phrase.determiner not in ("no", "every") and not phrase.relative and self.chance(0.08):
            return Pair(phrase, self.noun_phrase(kinds, tense, 0))
        return phrase

    def noun_phrase(self, kinds: str, tense: str, depth: int, subject: bool = False) -> NounPhrase:
        noun = self.rng.choice([noun for noun in self.nouns if noun.kind in kinds])
        plural = self.chance(0.3)
        determiners = ["the", "the", "the", "the", "this", *POSSESSIVES]
        determiners += ["", *NUMBERS] if plural else ["a", "a", "a", "a"]
        if subject:
            determiners += ["no"] if plural else ["no", "every"]
        determiner = self.pick(determiners)
        adjective = self.rng.choice([a for a in self.adjectives if noun.kind in a.kinds]) if self.chance(0.35) else None
        phrase = NounPhrase(noun, plural, determiner, adjective)
        if depth == 0 or determiner in ("", "no") or tense not in ("present", "past") or not self.chance(0.12):
            return phrase
        return self.with_relative(phrase, tense)

    def with_relative(self, phrase: NounPhrase, tense: str) -> NounPhrase:
        """``phrase`` with a clause in which its pronoun is the subject, the direct or the dative object."""
        case = self.pick(CASES)
        frames = {"nom": "iadp", "acc": "a", "dat": "d"}[case]
        kind = phrase.noun.kind
        verbs = [verb for verb in self.verbs if verb.frame in frames
                 and kind in (verb.subjects if case == "nom" else verb.objects)]
        if not verbs:
            return phrase
        verb = self.rng.choice(verbs)
        bare = NounPhrase(phrase.noun, phrase.plural)
        subject = bare if case == "nom" else self.phrase(verb.subjects, tense, 0)
        clause = self.clause_of(verb, subject, tense, 0, taken=bare if case != "nom" else None)
        return NounPhrase(phrase.noun, phrase.plural, phrase.determiner, phrase.adjective, clause, case)

    def clause_of(self, verb: Verb, subject: Phrase, tense: str, depth: int, taken: Phrase | None = None,
                  **more: Any) -> Clause:
        """The verb with its objects; ``taken`` stands for the object that a relative pronoun replaces."""
        draw = self.noun_phrase if isinstance(subject, Pronoun) else self.phrase  # no "I see me"
        if verb.frame in "ab":
            more["direct"] = taken or draw(verb.objects, tense, depth)
        if verb.frame in "db":
            more["indirect"] = taken or draw(verb.objects if verb.frame == "d" else "p", tense, 0)
        if verb.frame == "p":
            more["governed"] = draw(verb.objects, tense, depth)
        if verb.frame == "c":
            more["said"] = self.clause(tense, 0, inner=True)
        return Clause(subject, verb, tense, **more)

    def clause(self, tense: str, depth: int = 1, inner: bool = False) -> Clause:
        """A main clause, or the inside of a subordinate one (``inner``: nothing in front, no clause of its own)."""
        if self.chance(0.15):
            return self.description(tense)
        verb = self.rng.choice([verb for verb in self.verbs if verb.frame != "c" or not inner])
        subject = self.phrase(verb.subjects, tense, depth, subject=True)
        more: dict[str, Any] = {}
        if verb.frame != "c":
            adverbial = self.rng.random()
            if adverbial < 0.25:
                times = TIMES[tense if tense in TIMES else "present"]
                time = self.pick(times)
                more["time"] = (time, times[time])
            elif adverbial < 0.37:
                more["frequency"] = self.pick(FREQUENCIES)
            if self.chance(0.2):
                place = self.rng.choice([noun for noun in self.nouns if noun.kind == "l"])
                more["place"] = (self.pick(PLACES), NounPhrase(place))
            if verb.frame in "ia" and self.chance(0.12):
                more["manner"] = self.pick(MANNERS)
            if not inner and self.chance(0.4):
                more["front"] = "time" if "time" in more else "place" if "place" in more else ""
        negatable = tense != "must" and not {"frequency", "manner"} & more.keys()
        if isinstance(subject, NounPhrase) and subject.determiner in ("no", "every"):
            negatable = False
        more["negated"] = negatable and self.chance(0.2)
        return self.clause_of(verb, subject, tense, depth, **more)

    def description(self, tense: str) -> Clause:
        """The house is old; the dog was bigger than the cat."""
        noun = self.noun_phrase("pavlrtf", tense, 0)
        adjective = self.rng.choice([a for a in self.adjectives if noun.noun.kind in a.kinds])
        subject = NounPhrase(noun.noun, noun.plural, noun.determiner)
        compared = None
        if adjective.german_comparative != "-" and self.chance(0.4):
            compared = self.noun_phrase(noun.noun.kind, tense, 0)
        negated = noun.determiner != "every" and self.chance(0.2)
        return Clause(subject, None, tense if tense == "past" else "present", negated, predicate=adjective,
                      compared=compared)

    def tense(self) -> str:
        return self.rng.choices(("present", "past", "future", self.pick(MODALS)), (4, 4, 1.5, 2.5))[0]

    def sentence(self) -> tuple[str, str]:
        """One sentence in English and German."""
        tense = self.tense()
        clause = self.clause(tense)
        form = self.rng.random()
        if form < 0.12:
            return self.question(clause)
        if form < 0.3:
            tense = "past" if tense == "past" else "present"
            conjunction = self.pick(("because", "although", "before") if tense == "past" else CONJUNCTIONS)
            return self.subordinated(self.clause(tense, inner=True), conjunction, self.clause(tense))
        if form < 0.38:
            word, german = self.rng.choice((("and", "und"), ("but", "aber")))
            other = self.clause(tense)
            return (spell([*clause.english(), ",", word, *other.english()], "."),
                    spell([*clause.german_first(), ",", german, *other.german_first()], "."))
        return spell(clause.english(), "."), spell(clause.german_first(), ".")

    def question(self, clause: Clause) -> tuple[str, str]:
        """Yes or no, or with a question word that asks for what the clause leaves open."""
        asked = Clause(**{**vars(clause), "front": "", "negated": False})
        if clause.verb is None or clause.time or clause.place or clause.manner or self.chance(0.4):
            return spell(asked.english(question=True), "?"), spell(asked.german_first(inverted=True), "?")
        word = self.pick(QUESTION_WORDS)
        return (spell([word, *asked.english(question=True)], "?"),
                spell([QUESTION_WORDS[word], *asked.german_first(inverted=True)], "?"))

    def subordinated(self, inner: Clause, conjunction: str, outer: Clause) -> tuple[str, str]:
        """``inner`` behind ``outer``, or before it, which turns German's subject and verb round."""
        english = [conjunction, *inner.english()]
        german = [CONJUNCTIONS[conjunction], *inner.german_last()]
        outer = Clause(**{**vars(outer), "front": ""})
        if self.chance(0.5):
            return (spell([*outer.english(), *english], "."), spell([*outer.german_first(), ",", *german], "."))
        return (spell([*english, ",", *outer.english()], "."),
                spell([*german, ",", *outer.german_first(inverted=True)], "."))


def corpus(count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` pairs, no English or German sentence twice, 3 to 30 English words each."""
    speaker = Speaker(seed)
    pairs: dict[str, str] = {}
    seen: set[str] = set()
    while len(pairs) < count:
        english, german = speaker.sentence()
        if english not in pairs and german not in seen and 3 <= len(english.split()) <= 30:
            pairs[english] = german
            seen.add(german)
    return list(pairs.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a grammar-made English-German corpus (CC0).")
    parser.add_argument("folder", type=Path, help="where {train,valid,test}.{en,de} go; made if need be")
    parser.add_argument("--train", type=int, default=8000, help="sentence pairs (default %(default)s)")
    parser.add_argument("--valid", type=int, default=300)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    pairs = corpus(args.train + args.valid + args.test, args.seed)
    for split, count in (("train", args.train), ("valid", args.valid), ("test", args.test)):
        part, pairs = pairs[:count], pairs[count:]
        for language, sentences in zip(("en", "de"), zip(*part, strict=True), strict=True):
            (args.folder / f"{split}.{language}").write_text("\n".join(sentences) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
