"""Seeded evaluation prompts, from exactly the combinations that training skips.

Held out are: one pair of names in ten (John and Mary among them), one span-century-year triple in ten, one pair of
subject and distractor in ten, and for two hops a fifth of the cities. A prompt follows `<|endoftext|>`; its answer
begins with a space unless it is the second half of a year.
"""

import random
from typing import NamedTuple

from circuitsae.pocket.facts import CAPITALS, HELD_OUT_CITIES, STATE_OF, TRAINED_CITIES
from circuitsae.pocket.families import IOI_TEMPLATES, SPAN_TEMPLATES, TWO_HOP_TEMPLATES
from circuitsae.pocket.words import (
    CENTURIES,
    INDUCTION_WORDS,
    NAMES,
    PLURAL,
    PREPOSITIONS,
    SINGULAR,
    SPANS,
    Slots,
    held_out,
    name_pair,
)

DEMONSTRATION = "When John and Mary went to the store, John gave a drink to"


class Prompt(NamedTuple):
    """A prompt, the token that should follow, and the one it competes with."""

    text: str
    answer: str
    wrong: str


class YearPrompt(NamedTuple):
    """A prompt that ends in a century, and the two-digit year that the next token should exceed."""

    text: str
    start: int


class TwoHopPrompt(NamedTuple):
    """A prompt about a city, its state's capital, another capital, the city, and the phrasing's index."""

    text: str
    answer: str
    wrong: str
    city: str
    template: int


def ioi_prompts(n: int, seed: int = 0, *, template: int | None = None) -> list[Prompt]:
    """IOI prompts on held-out name pairs, in equal parts ABBA and BABA; `template` fixes the phrasing."""
    rng = random.Random(f"ioi:{seed}")
    prompts = []
    for index in range(n):
        a, b = name_pair(rng, evaluation=True)
        subject, indirect = (a, b) if index % 2 else (b, a)
        phrase = rng.choice(IOI_TEMPLATES) if template is None else IOI_TEMPLATES[template]
        text = phrase.format_map(Slots(rng, A=a, B=b, S=subject, IO=""))
        prompts.append(Prompt(text, " " + indirect, " " + subject))
    return prompts


def greater_than_prompts(n: int, seed: int = 0, *, template: int | None = 0) -> list[YearPrompt]:
    """Greater-than prompts on held-out triples of noun, century and year; the published phrasing unless told."""
    rng = random.Random(f"greater-than:{seed}")
    prompts: list[YearPrompt] = []
    while len(prompts) < n:
        span, century, start = rng.choice(SPANS), rng.choice(CENTURIES), rng.randint(2, 98)
        if held_out("span", span, century, start):
            phrase = rng.choice(SPAN_TEMPLATES) if template is None else SPAN_TEMPLATES[template]
            slots = Slots(rng, span=span, start=f"{century}{start:02d}", century=str(century))
            prompts.append(YearPrompt(phrase.format_map(slots), start))
    return prompts


def agreement_prompts(n: int, seed: int = 0) -> list[Prompt]:
    """Held-out pairs of a subject and a distractor of the other number, before is/are or was/were."""
    rng = random.Random(f"agreement:{seed}")
    prompts: list[Prompt] = []
    while len(prompts) < n:
        subject, distractor = rng.sample(range(len(SINGULAR)), 2)
        if held_out("nouns", subject, distractor):
            number = len(prompts) % 2
            forms = (SINGULAR, PLURAL)
            text = f"The {forms[number][subject]} {rng.choice(PREPOSITIONS)} the {forms[1 - number][distractor]}"
            verbs = rng.choice(((" is", " are"), (" was", " were")))
            prompts.append(Prompt(text, verbs[number], verbs[1 - number]))
    return prompts


def two_hop_prompts(*, held_out_cities: bool, seed: int = 0, templates: int | None = None) -> list[TwoHopPrompt]:
    """Every trained, or every held-out, city in every phrasing (or the first `templates`), the first being the main."""
    rng = random.Random(f"two-hop:{seed}")
    cities = sorted(HELD_OUT_CITIES) if held_out_cities else TRAINED_CITIES
    prompts = []
    for city in cities:
        capital = STATE_OF[city].capital
        wrong = rng.choice([other for other in CAPITALS if other != capital])
        for index, phrase in enumerate(TWO_HOP_TEMPLATES[:templates]):
            prompts.append(TwoHopPrompt(phrase.format(city=city), " " + capital, " " + wrong, city, index))
    return prompts


def induction_prompts(n: int, seed: int = 0, *, length: int = 24) -> list[str]:
    """`length` random words said twice, each one token; the first is a name, a token with and without its space."""
    rng = random.Random(f"induction:{seed}")
    prompts = []
    for _ in range(n):
        first = rng.choice(NAMES)
        words = [first, *rng.sample([word for word in INDUCTION_WORDS if word != first], length - 1)]
        prompts.append(" ".join(words * 2))
    return prompts
