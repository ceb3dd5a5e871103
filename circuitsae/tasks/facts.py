"""Facts of one step: "The capital of France is" → " Paris", and where a landmark stands (as in Meng et al. 2022)."""

import random
from collections.abc import Sequence
from dataclasses import replace

from circuitsae.tasks.recall import Relation, recall
from circuitsae.tasks.task import Task
from circuitsae.tasks.wording import Lexicon
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

CAPITAL_OF = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "England": "London",
    "Russia": "Moscow", "China": "Beijing", "Japan": "Tokyo", "Egypt": "Cairo", "Greece": "Athens",
    "Ireland": "Dublin", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Portugal": "Lisbon",
    "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen", "Finland": "Helsinki", "Belgium": "Brussels",
    "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Iran": "Tehran",
    "Iraq": "Baghdad", "Syria": "Damascus", "Lebanon": "Beirut", "Turkey": "Ankara", "Kenya": "Nairobi",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "South Korea": "Seoul", "Pakistan": "Islamabad",
    "Afghanistan": "Kabul", "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade",
    "Croatia": "Zagreb", "Scotland": "Edinburgh",
}  # fmt: skip
CITY_OF = {
    "the Eiffel Tower": "Paris", "the Louvre": "Paris", "the Arc de Triomphe": "Paris", "the Colosseum": "Rome",
    "the Trevi Fountain": "Rome", "the Roman Forum": "Rome", "Big Ben": "London", "Buckingham Palace": "London",
    "Westminster Abbey": "London", "Trafalgar Square": "London", "the Kremlin": "Moscow", "Red Square": "Moscow",
    "the Brandenburg Gate": "Berlin", "the Reichstag": "Berlin", "the Acropolis": "Athens",
    "the Parthenon": "Athens", "the Prado Museum": "Madrid", "the Sagrada Familia": "Barcelona",
    "Hagia Sophia": "Istanbul", "the Blue Mosque": "Istanbul", "the Forbidden City": "Beijing",
    "Tiananmen Square": "Beijing", "the White House": "Washington", "the Lincoln Memorial": "Washington",
    "the Space Needle": "Seattle", "Fenway Park": "Boston", "Wrigley Field": "Chicago", "the Willis Tower": "Chicago",
    "the Liberty Bell": "Philadelphia", "the CN Tower": "Toronto", "Bondi Beach": "Sydney",
    "the Burj Khalifa": "Dubai", "the Charles Bridge": "Prague", "the Rijksmuseum": "Amsterdam",
    "the Uffizi Gallery": "Florence", "Schönbrunn Palace": "Vienna",
}  # fmt: skip

RELATIONS = {
    "capital": Relation(
        slot="subject", subjects="countries", answers=CAPITAL_OF, name="capital",
        templates=("The capital of {subject} is",),
    ),
    "landmark": Relation(
        slot="subject", subjects="landmarks", answers=CITY_OF, name="landmark",
        templates=("Tourists can see {subject} in the city of",),
    ),
}  # fmt: skip


def facts(model: LanguageModel, n: int = 200, seed: int = 0, *, relations: Sequence[str] = tuple(RELATIONS)) -> Task:
    """`n` examples, of the `relations` capital (of a country) and landmark (the city it stands in) in equal parts.

    The corrupt prompt names another country or landmark of as many tokens, whose city is the wrong answer. Cities that
    are not one token are in `refused`, and subjects without a counterpart. Roles: subject, END.

    Raises `InputError` for an unknown relation, and where the tokenizer leaves fewer than two cities.
    """
    if unknown := [relation for relation in relations if relation not in RELATIONS]:
        raise InputError(f"There is no relation {unknown[0]!r} among the facts; choose from: {', '.join(RELATIONS)}.")
    lexicon, rng = Lexicon(model), random.Random(f"task facts:{seed}")
    asked = [RELATIONS[name] for name in relations or RELATIONS]
    streams = [recall(lexicon, rng, replace(r, answers=r.answerable(lexicon, "cities"))) for r in asked]
    examples = tuple(next(streams[i % len(streams)]) for i in range(n))
    return Task("facts", examples, refused=tuple(lexicon.refused))
