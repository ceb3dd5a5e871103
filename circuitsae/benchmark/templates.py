"""Templated texts, words and facts that ship: what the pocket model was trained to say, in plain English for any."""

import random
from collections import Counter

from circuitsae.benchmark.data import Fact, Facts, Labelled, Words
from circuitsae.pocket import families
from circuitsae.pocket.facts import CITIES, STATE_OF
from circuitsae.pocket.words import MEN, NAMES, WOMEN, WORDS, Slots
from circuitsae.tasks.wording import pieces
from transcoders.language_model import LanguageModel

FORGET = "one_hop"
"""Of `kinds_of_text`, what unlearning is to forget: cities, states and capitals."""
_CLASSES = (
    "place", "object", "span", "animal", "food", "weather", "day", "time", "thing", "kin", "feeling", "action", "color",
)  # fmt: skip
_TOPICS = {
    "food": (
        "{N} ate some {food} and drank some {food2}. {P} likes {food3} with {food4}.",
        "{N} wanted to buy {food} and {food2}. {H} {kin} gave {o} {food3} with {food4}.",
        "{P} likes {food} with {food2}, and {h} {kin} ate some {food3}, said {N}.",
    ),
    "weather": (
        "It was a {weather} {time}, and {N} was {feeling}. It was {weather2}, so {p} stayed at home.",
        "{N} said that it is {weather} today. {P} thought that on {day} it was {weather2}.",
        "On {day} it was {weather}, but {h} {kin} said to {N} that the next day it was {weather2}.",
    ),
    "animals": (
        "{N} saw a {adj} {animal} and a {animal2}. {P} gave the {animal} to {h} {kin}.",
        "{N} had a {color} {animal}. A {color2} {animal2} ran, and {p} saw the {animal3}.",
        "The {animal} and the {animal2} ran to {N}, and {h} {kin} gave {o} a {animal3}.",
    ),
    "coins": (
        "{N} had {num} coins in a {adj} box. {P} sold the {object} for {num2} coins.",
        "{N} sold {h} {kin} a {object} for {num} coins, and {p} has {num2} coins.",
        "The {trade} sold {o} a {object} for {num} coins, and {N} has {small} coins.",
    ),
}
_FAMILIES = (
    families.story,
    families.ioi,
    families.one_hop,
    families.two_hop,
    families.greater_than,
    families.agreement,
)
_AGES = "two three four five six seven eight nine ten".split()  # noqa: SIM905 - a list of words reads best as text
_FRIENDS = ("Tom", "Lisa")


def topics(per_cell: int, seed: int) -> Labelled:
    """A sentence or two about a person: four topics, and men and women with each alike.

    In the place of SAEBench's professions and gender (*Bias in Bios*, De-Arteaga et al. 2019) and its reviews.
    """
    rng = random.Random(f"topics:{seed}")
    texts, labels, others = [], [], []
    for topic, wordings in _TOPICS.items():
        for gender, names in (("man", MEN), ("woman", WOMEN)):
            he, him, his = ("he", "him", "his") if gender == "man" else ("she", "her", "her")
            said = {"p": he, "P": he.title(), "o": him, "h": his, "H": his.title()}
            for _ in range(per_cell):
                texts.append(rng.choice(wordings).format_map(Slots(rng, N=rng.choice(names), **said)))
                labels.append(topic)
                others.append(gender)
    return Labelled("topics", tuple(texts), tuple(labels), tuple(others))


def kinds_of_text(per_label: int, seed: int) -> Labelled:
    """Documents of six families of the pocket model's text: stories, facts, years, agreement and so on."""
    rng = random.Random(f"kinds of text:{seed}")
    drawn = [(family(rng), family.__name__) for family in _FAMILIES for _ in range(per_label)]
    return Labelled("kinds of text", tuple(text for text, _ in drawn), tuple(label for _, label in drawn))


def single_words(model: LanguageModel) -> list[tuple[str, str]]:
    """The words of the lists of `circuitsae.pocket.words` that are one token after a space, and the list of each.

    Words of two lists are left out, and so are lists that others repeat; names count as men's or women's.
    """
    lists = {"man": MEN, "woman": WOMEN, **{name: WORDS[name] for name in _CLASSES}}
    pairs = [(word, name) for name, words in lists.items() for word in words]
    often = Counter(word for word, _ in pairs)
    alone = [pair for pair in pairs if often[pair[0]] == 1]
    return [p for p, ids in zip(alone, pieces(model, [" " + word for word, _ in alone]), strict=True) if len(ids) == 1]


def word_classes(model: LanguageModel) -> Words:
    """What a word names: a man, a place, a food, a colour, …"""
    words, labels = zip(*single_words(model), strict=True)
    return Words("classes", words, labels)


def first_letters(model: LanguageModel) -> Words:
    """The first letter of each word, as of Chanin et al. 2024; of letters that begin at least eight of them."""
    words = [word for word, _ in single_words(model)]
    often = Counter(word[0].lower() for word in words)
    kept = [word for word in words if often[word[0].lower()] >= 8]
    return Words("letters", tuple(kept), tuple(word[0].lower() for word in kept))


def cities(per_attribute: int, seed: int) -> Facts:
    """Cities, the state of each and its capital, in two wordings each; facts that models know as well."""
    rng = random.Random(f"cities:{seed}")
    asked = {
        "state": ("{city} is a city in the state of", "The state containing {city} is"),
        "capital": ("The capital of the state containing {city} is", "If you live in {city}, your state capital is"),
    }
    facts = []
    for city in rng.sample(CITIES, min(per_attribute, len(CITIES))):
        for attribute, wordings in asked.items():
            answer = STATE_OF[city].name if attribute == "state" else STATE_OF[city].capital
            facts += [Fact(city, attribute, wording.format(city=city), f" {answer}") for wording in wordings]
    return Facts("cities", tuple(facts))


def names(per_attribute: int, seed: int) -> Facts:
    """First names: who is given something (the name itself), and the pronoun that stands for it."""
    rng = random.Random(f"names:{seed}")
    facts = []
    drawn = [name for name in NAMES if name not in _FRIENDS]
    for name in rng.sample(drawn, min(per_attribute, len(drawn))):
        other = rng.choice(_FRIENDS)
        for age in rng.sample(_AGES, 2):
            pronoun = " he" if name in MEN else " she"
            facts.append(Fact(name, "pronoun", f"When {name} was {age} years old,", pronoun))
        for friend in (other, *(each for each in _FRIENDS if each != other)):
            prompt = f"When {name} and {friend} went to the store, {friend} gave a drink to"
            facts.append(Fact(name, "name", prompt, f" {name}"))
    return Facts("names", tuple(facts))
