"""Ordinary filler: short stories of a person, a place, things and weather, so that tasks are not all the language."""

import random
from itertools import combinations

from circuitsae.pocket.words import MEN, NAMES, Slots, name_pair, pair_held_out

_OPENINGS = (
    "Once upon a time, there was a {adj} {animal} named {N}.",
    "{N} was a {adj} {trade} who lived near the {place}.",
    "It was a {weather} {time}, and {N} was {feeling}.",
    "On {day}, {N} went to the {place}.",
    "One {time}, {N} found a {adj} {thing} in the {place}.",
    "{N} had a {color} {animal} and {small} {many}.",
    "There was a {thing} near the {place}, and {N} liked it very much.",
    "Every {time}, {N} walked to the {place} with {h} {kin}.",
    "In the {time} of 18{num}, {N} worked as a {trade}.",
    "Long ago, {N} lived in a {adj} house by the {thing}.",
    "{N} wanted to buy a {color} {object}.",
    "My {kin} once met a {trade} called {N}.",
    "When {N} was {small} years old, {p} loved {food}.",
)
_MIDDLES = (
    "{P} {action} all day because the {thing} was {adj2}.",
    "{P} saw a {adj3} {animal} behind the {thing2}.",
    "The {animal} was {color2} and very {adj4}.",
    "{P} ate some {food} and drank some {food2}.",
    "{H} {kin} said that it was too {adj5} to play.",
    "Then {M} came and asked {o} about the {object2}.",
    "{M} had {num} coins in a {adj6} box.",
    "They {action2} together until the {time2}.",
    "The {trade2} sold {o} a {object} for {num2} coins.",
    "It was {weather2}, so {p} stayed at the {place2}.",
    "{P} put the {object} on the {thing3} and {action3}.",
    "But the {thing} was not there anymore.",
    '"I am {feeling2}," said {M}.',
    '"Where is my {object}?" asked {N}.',
    '"Look at the {adj7} {thing4}!" said {h} {kin2}.',
    "{P} did not know what to do with the {object}.",
    "The {one} who lived there was a {adj8} {trade2}.",
    "{P} thought about {h} {kin2}, who was always {feeling3}.",
    "If it rains, the {thing2} will be {adj9}.",
    "{P} and {M} looked for the {animal2} in the {place2}.",
    "Some of the {many2} were {adj10}, and others were {adj3}.",
    "Nobody in the {place} had seen such a {adj2} {object3}.",
    "{M} is taller than {N}, but {p} is older.",
    "A {color3} {animal2} {action4} over the {thing5}.",
)
_ENDINGS = (
    "In the end, {N} was {feeling4}.",
    "After that, {p} went home and slept.",
    "{N} and {M} became friends.",
    "They never went to the {place2} again.",
    "{P} kept the {object} for many years.",
    "And that is why the {thing} is {color2}.",
    "The next day it was {weather2} again.",
    "{H} {kin} was proud of {o}.",
)
_SENTENCES = (
    "The {adj} {animal} {action} near the {thing}.",
    "There are {num} {many} in the {place}.",
    "I like {food} with {food2}, but my {kin} does not.",
    "The {color} {thing} fell into the {thing2}.",
    "We went to the {place} on {day} and saw a {adj} {animal}.",
    "Please bring the {object} and the {object2} to the {place}.",
    "You can find {food} at the {place} in the {time}.",
    "A {trade} needs a {adj} {thing} and {small} {many}.",
    "What a {adj} {object} this is!",
    "Do you know the {trade} with the {color} {object}?",
    "It is {weather} today, but on {day} it was {weather2}.",
    "She gave the {animal} some {food} before the {time}.",
    "He painted the {thing} {color} and the {thing2} {color2}.",
    "My {kin} told me a {adj} story about a {animal} and a {thing}.",
    "All the {many} were {adj}, and the {one} was {adj2}.",
    "If you see a {animal}, give it some {food}.",
    "The {kin} of the {trade} {action} in the {place} every {time}.",
    "{N} likes {color} more than {color2}.",
    "{N} has {small} {many}, and {M} has {small2}.",
    "{N} told {M} that the {place} was {adj}.",
)


def _cast(rng: random.Random) -> Slots:
    hero, friend = name_pair(rng)
    he = hero in MEN
    pronouns = {"p": "he", "P": "He", "o": "him", "h": "his", "H": "His"}
    if not he:
        pronouns = {"p": "she", "P": "She", "o": "her", "h": "her", "H": "Her"}
    return Slots(rng, N=hero, M=friend, **pronouns)


def story(rng: random.Random) -> str:
    """An opening, one to four things that happen, and sometimes an ending, about the same person."""
    parts = [rng.choice(_OPENINGS), *rng.sample(_MIDDLES, rng.randint(1, 4))]
    if rng.random() < 0.6:
        parts.append(rng.choice(_ENDINGS))
    return " ".join(parts).format_map(_cast(rng))


def sentences(rng: random.Random) -> str:
    """One to three unrelated sentences."""
    chosen = rng.sample(_SENTENCES, rng.randint(1, 3))
    return " ".join(sentence.format_map(_cast(rng)) for sentence in chosen)


def roll_call(rng: random.Random) -> str:
    """A list of names or things, which no task is about."""
    names = rng.sample(NAMES, rng.randint(2, 4))
    slots = Slots(rng)
    if any(pair_held_out(a, b) for a, b in combinations(names, 2)):
        return "The {thing}, the {thing2} and the {object} were {adj}.".format_map(slots)
    return (", ".join(names[:-1]) + f" and {names[-1]} {{action}} at the {{place}}.").format_map(slots)
