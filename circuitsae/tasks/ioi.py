"""Indirect object identification (Wang et al. 2022, "Interpretability in the Wild", §2 and appendix A).

"When Mary and John went to the store, John gave a drink to" → " Mary", against " John".
"""

import random
from collections.abc import Sequence
from typing import Literal

from circuitsae.pocket.families import IOI_TEMPLATES
from circuitsae.pocket.words import NAMES, OBJECTS, PLACES, Slots, pair_held_out
from circuitsae.tasks.task import Example, Task
from circuitsae.tasks.wording import Lexicon, fill, is_pocket, pieces, slots
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

PUBLISHED_TEMPLATES = (
    "Then, {A} and {B} went to the {place}. {S} gave a {object} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {S} gave a {object} to",
    "Then, {A} and {B} were working at the {place}. {S} decided to give a {object} to",
    "Then, {A} and {B} were thinking about going to the {place}. {S} wanted to give a {object} to",
    "Then, {A} and {B} had a long argument, and afterwards {S} said to",
    "After {A} and {B} went to the {place}, {S} gave a {object} to",
    "When {A} and {B} got a {object} at the {place}, {S} decided to give it to",
    "When {A} and {B} got a {object} at the {place}, {S} decided to give the {object} to",
    "While {A} and {B} were working at the {place}, {S} gave a {object} to",
    "While {A} and {B} were commuting to the {place}, {S} gave a {object} to",
    "After the lunch, {A} and {B} went to the {place}. {S} gave a {object} to",
    "Afterwards, {A} and {B} went to the {place}. {S} gave a {object} to",
    "Then, {A} and {B} had a long argument. Afterwards {S} said to",
    "The {place} {A} and {B} went to had a {object}. {S} gave it to",
    "Friends {A} and {B} found a {object} at the {place}. {S} gave it to",
)
"""The fifteen of the paper."""

Corruption = Literal["abc", "flip"]
_ALIASES = {"{name_A}": "{A}", "{name_B}": "{B}", "{name_C}": "{S}", "{IO}": ""}
_ORDERS = ("ABBA", "BABA")


def ioi(
    model: LanguageModel,
    n: int = 200,
    seed: int = 0,
    *,
    corruption: Corruption = "abc",
    templates: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    places: Sequence[str] | None = None,
    objects: Sequence[str] | None = None,
) -> Task:
    """`n` examples, ABBA and BABA in equal parts, every template as often as the others.

    corruption: `abc` puts three other names for IO, S1 and S2, all distinct from each other and from the originals;
    `flip` puts IO for S2, which turns the answer round. Templates have the slots `{A}` and `{B}` (the two names in
    order), `{S}` (the giver), `{place}`, `{object}`; the default is the paper's fifteen, and for pocket the eighteen
    it was trained on, with held-out pairs of names. Roles: IO, S1, S1+1, S2, END.

    Raises `InputError` for names, places or objects that are not one token each, and for templates without the slots.
    """
    lexicon, rng = Lexicon(model), random.Random(f"task ioi:{seed}")
    phrases = _templates(templates or (IOI_TEMPLATES if is_pocket(model) else PUBLISHED_TEMPLATES))
    people = _people(lexicon, phrases, names)
    words = {
        "place": lexicon.single("places", places, PLACES),
        "object": lexicon.single("objects", objects, OBJECTS),
    }
    held_out = is_pocket(model) and names is None
    examples = []
    for i in range(n):
        number = (i // 2) % len(phrases)
        pair = _pair(rng, people[number], held_out=held_out)
        examples.append(_example(rng, phrases[number], str(number), i % 2, pair, people[number], words, corruption))
    return Task("ioi", tuple(examples), refused=tuple(lexicon.refused))


def _templates(templates: Sequence[str]) -> list[str]:
    phrases = []
    for template in templates:
        phrase = template
        for alias, slot in _ALIASES.items():
            phrase = phrase.replace(alias, slot)
        if missing := [slot for slot in ("A", "B", "S") if slots(phrase).count(slot) != 1]:
            raise InputError(
                f"The IOI template {template!r} does not have the slot {{{missing[0]}}} exactly once; "
                "write {A} and {B} for the two names and {S} for the giver."
            )
        phrases.append(phrase)
    return phrases


def _people(lexicon: Lexicon, phrases: Sequence[str], names: Sequence[str] | None) -> list[list[str]]:
    """The names for each template; where it begins with one, those that are one token without a space too."""
    people = lexicon.single("names", names, NAMES, at_least=5)
    if not any(phrase.startswith("{") for phrase in phrases):
        return [people] * len(phrases)
    bare = [name for name, ids in zip(people, pieces(lexicon.model, people), strict=True) if len(ids) == 1]
    split = [f"{name} without its space" for name in people if name not in bare]
    first = lexicon.keep("names", bare, split, at_least=5)
    return [first if phrase.startswith("{") else people for phrase in phrases]


def _pair(rng: random.Random, names: Sequence[str], *, held_out: bool) -> tuple[str, str]:
    while True:
        a, b = rng.sample(names, 2)
        if not held_out or pair_held_out(a, b):
            return a, b


def _example(
    rng: random.Random,
    phrase: str,
    number: str,
    order: int,
    pair: tuple[str, str],
    names: Sequence[str],
    words: dict[str, list[str]],
    corruption: Corruption,
) -> Example:
    """ABBA has the indirect object first, BABA the subject."""
    indirect, subject = pair if order == 0 else pair[::-1]
    first, second = pair
    given = {"place": rng.choice(words["place"]), "object": rng.choice(_fitting(phrase, words["object"]))}
    values = Slots(rng, A=first, B=second, S=subject, **given)
    clean, spans = fill(phrase, values)
    if corruption == "flip":
        values["S"] = indirect
    else:
        others = rng.sample(names, 5)
        values["A"], values["B"], values["S"] = [name for name in others if name not in pair][:3]
    corrupt, _ = fill(phrase, values)
    (io,), (s1,) = (spans["A"], spans["B"]) if order == 0 else (spans["B"], spans["A"])
    return Example(
        clean=clean,
        corrupt=corrupt,
        answers=(" " + indirect,),
        wrong=(" " + subject,),
        roles={"IO": io, "S1": s1, "S1+1": (s1[1], s1[1] + 1), "S2": spans["S"][0]},
        template=f"{number} {_ORDERS[order]}",
    )


def _fitting(phrase: str, objects: list[str]) -> list[str]:
    """The objects that go with the template's article."""
    if "{object}" not in phrase:
        return objects
    an = "an {object}" in phrase
    found = [word for word in objects if (word[0] in "aeiou") == an or not ("a {object}" in phrase or an)]
    if not found:
        raise InputError(f"No object goes with the article of {phrase!r}; give one that does, or leave it out.")
    return found
