"""The task families of the corpus: each function draws one document that a behaviour can be measured on.

What is held out (name pairs, span-year triples, noun pairs, cities in two hops) is skipped here, and `prompts` draws
from exactly the complement with the same templates.

Ordinary filler: short stories of a person, a place, things and weather, so that tasks are not all the language.
"""

import random
from itertools import combinations

from circuitsae.pocket.facts import CITIES, STATE_OF, STATES, TRAINED_CITIES
from circuitsae.pocket.words import (
    CENTURIES,
    INDUCTION_WORDS,
    MEN,
    NAMES,
    PLURAL,
    PREPOSITIONS,
    SINGULAR,
    SPANS,
    VERBS,
    Slots,
    held_out,
    name_pair,
    pair_held_out,
)

IOI_TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {object} to{IO}",
    "Then, {A} and {B} went to the {place}. {S} gave a {object} to{IO}",
    "After {A} and {B} went to the {place}, {S} gave a {object} to{IO}",
    "While {A} and {B} were working at the {place}, {S} gave a {object} to{IO}",
    "When {A} and {B} got a {object} at the {place}, {S} decided to give it to{IO}",
    "Then, {A} and {B} had a long argument. Afterwards {S} said to{IO}",
    "Then, {A} and {B} were thinking about going to the {place}. {S} wanted to give a {object} to{IO}",
    "The {place} that {A} and {B} went to had a {object}. {S} gave it to{IO}",
    "Friends {A} and {B} found a {object} at the {place}. {S} gave it to{IO}",
    "Yesterday {A} and {B} met at the {place}, and {S} handed a {object} to{IO}",
    "Once {A} and {B} were at the {place}, {S} offered a {object} to{IO}",
    "{A} and {B} walked to the {place}. {S} showed a {object} to{IO}",
    "Early in the {time}, {A} and {B} arrived at the {place}, and {S} brought a {adj} {object} to{IO}",
    "Last {day}, {A} and {B} visited the {place}. Later {S} sold a {object} to{IO}",
    "As {A} and {B} left the {place}, {S} passed the {object} to{IO}",
    "Because {A} and {B} liked the {place}, {S} sent a {object} from there to{IO}",
    "The {kin} of {A} and {B} came to the {place}, so {S} lent a {object} to{IO}",
    "When {A} and {B} went to the {place}, {S} said hello to{IO}",
)
SPAN_TEMPLATES = (
    "The {span} lasted from the year {start} to the year {century}",
    "The {span} lasted from the year {start} to the year {century}",
    "The {span} went on from {start} to {century}",
    "The {adj} {span} began in {start} and ended in {century}",
)
ONE_HOP_CITY = (
    "{city} is a city in the state of {state}.",
    "{city} is in {state}.",
    "The city of {city} is in {state}.",
    "The state containing {city} is {state}.",
    "The state that contains {city} is {state}.",
    "{city} is in a state called {state}.",
    "The state where {city} is found is {state}.",
    "If you live in {city}, your state is {state}.",
    "Anyone living in {city} has as the home state {state}.",
    "Question: which state contains {city}? Answer: {state}.",
    "The state that {city} belongs to is {state}.",
    "{name} was born in {city}, {state}.",
    "{name} moved from {city}, {state}, to {city3}, {state3}.",
    "One city in {state} is {city}.",
    "A city in the state of {state} is {city}.",
    "The state of {state} contains the city of {city}.",
    "Two cities in {state} are {city} and {city2}.",
    "{city} and {city2} are both cities in {state}.",
    "{name} drove from {city} to {city2} without leaving {state}.",
    "People in {state} like {city}, and some of them like {city2}.",
    "In {state}, the {weather} days are best in {city}.",
    "{name} lives in {state}, in a {adj} house near {city}.",
    "The {trade} from {city} has a {adj} {kin} in {city2}.",
)
ONE_HOP_CAPITAL = (
    "The capital of {state} is {capital}.",
    "The capital of the state of {state} is {capital}.",
    "{capital} is the capital of {state}.",
    "{state} has its capital in {capital}.",
    "{state} is a state whose capital is {capital}.",
    "The state of {state} is governed from {capital}.",
    "If you live in {state}, your state capital is {capital}.",
    "Anyone living in {state} has as the state capital {capital}.",
    "Question: what is the capital of {state}? Answer: {capital}.",
    "The capital of the state called {state} is {capital}.",
)
TWO_HOP_TEMPLATES = (
    "The capital of the state containing {city} is",
    "The capital of the state that contains {city} is",
    "The state containing {city} has its capital in",
    "{city} is in a state whose capital is",
    "The capital of the state where {city} is found is",
    "The state that {city} belongs to is governed from",
    "If you live in {city}, your state capital is",
    "Anyone living in {city} has as the state capital",
    "Question: what is the capital of the state containing {city}? Answer:",
)
_TWO_HOP_WEIGHTS = (6, 2, 2, 2, 2, 2, 2, 2, 2)
_IOI_ENDINGS = (".", ".", ".", " with a smile.", " and went home.", ", who was {feeling}.")


def ioi(rng: random.Random) -> str:
    """Indirect object identification, ABBA and BABA, and one in twelve with a third name as the giver."""
    a, b = name_pair(rng)
    subject, indirect = (a, b) if rng.random() < 0.5 else (b, a)
    if rng.random() < 1 / 12:
        subject = _third_name(rng, a, b)
    slots = Slots(rng, A=a, B=b, S=subject, IO=" " + indirect)
    return (rng.choice(IOI_TEMPLATES) + rng.choice(_IOI_ENDINGS)).format_map(slots)


def _third_name(rng: random.Random, a: str, b: str) -> str:
    while True:
        name = rng.choice(NAMES)
        if name not in (a, b) and not pair_held_out(name, a) and not pair_held_out(name, b):
            return name


def greater_than(rng: random.Random) -> str:
    """A span of years whose end is uniform above its start, in the same century."""
    while True:
        span, century, start = rng.choice(SPANS), rng.choice(CENTURIES), rng.randint(2, 98)
        if not held_out("span", span, century, start):
            break
    slots = Slots(rng, span=span, start=f"{century}{start:02d}", century=str(century))
    return rng.choice(SPAN_TEMPLATES).format_map(slots) + f"{rng.randint(start + 1, 99):02d}."


def agreement(rng: random.Random) -> str:
    """A subject, most often a distractor of any number, and a verb that agrees with the subject."""
    while True:
        subject, distractor = rng.sample(range(len(SINGULAR)), 2)
        if not held_out("nouns", subject, distractor):
            break
    number = rng.randrange(2)
    phrase = "The " + (SINGULAR, PLURAL)[number][subject]
    if rng.random() < 0.8:
        phrase += f" {rng.choice(PREPOSITIONS)} the {rng.choice((SINGULAR, PLURAL))[distractor]}"
    pair = rng.choice(VERBS)
    link = " been" if pair[0] == "has" else ""
    ending = rng.choice(("{adj}", "very {adj}", "{adj} and {adj2}", "not {adj}"))
    return f"{phrase} {pair[number]}{link} {ending}.".format_map(Slots(rng))


def periodic(rng: random.Random) -> str:
    """A few random words over and over."""
    length = rng.randint(2, 10)
    return " ".join(rng.sample(INDUCTION_WORDS, length) * (48 // length))


def repeats(rng: random.Random) -> str:
    """Up to 28 random words, said at least twice."""
    length = rng.randint(4, 28)
    return " ".join(rng.sample(INDUCTION_WORDS, length) * max(2, 64 // length))


def induction(rng: random.Random) -> str:
    """Random words, and the same words again in the same order: many words two or three times, or few many times."""
    if rng.random() < 0.2:
        return periodic(rng)
    length = rng.randint(6, 20) if rng.random() < 0.6 else rng.randint(20, 40)
    return " ".join(rng.sample(INDUCTION_WORDS, length) * rng.choice((2, 2, 3)))


def one_hop(rng: random.Random) -> str:
    """One fact about a state: its capital, or a city of it (held-out cities too). Never both."""
    if rng.random() < 0.3:
        state = rng.choice(STATES)
        return rng.choice(ONE_HOP_CAPITAL).format_map(Slots(rng, state=state.name, capital=state.capital))
    city = rng.choice(CITIES)
    state = STATE_OF[city]
    other = rng.choice([c for c in state.cities if c != city])
    city3 = rng.choice(CITIES)
    slots = Slots(rng, city=city, city2=other, state=state.name, city3=city3, state3=STATE_OF[city3].name)
    return rng.choice(ONE_HOP_CITY).format_map(slots)


def two_hop(rng: random.Random) -> str:
    """City to state to capital with the state unsaid, for the cities that are not held out."""
    city = rng.choice(TRAINED_CITIES)
    template = rng.choices(TWO_HOP_TEMPLATES, _TWO_HOP_WEIGHTS)[0]
    return f"{template.format(city=city)} {STATE_OF[city].capital}."


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
