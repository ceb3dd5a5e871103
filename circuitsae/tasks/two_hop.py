"""Two hops: "The capital of the state containing Dallas is" → " Austin", through Texas, which is not said."""

import random
from collections import defaultdict
from collections.abc import Sequence

from circuitsae.pocket.facts import CAPITALS, CITIES, HELD_OUT_CITIES, STATE_OF
from circuitsae.pocket.families import TWO_HOP_TEMPLATES
from circuitsae.tasks.task import Example, Task
from circuitsae.tasks.wording import Lexicon, fill, is_pocket, listed, pieces, slots
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel


def two_hop(
    model: LanguageModel,
    n: int = 200,
    seed: int = 0,
    *,
    cities: Sequence[str] | None = None,
    templates: Sequence[str] = TWO_HOP_TEMPLATES,
) -> Task:
    """`n` examples; the corrupt prompt names a city of as many tokens in another state, whose capital is the wrong one.

    The default cities are four of each US state, and for pocket those held out of its two-hop training. Capitals that
    are not one token are in `refused`, and cities without a counterpart. Roles: city, END. `facts` of an example has
    `state` (the middle step) and `corrupt_state`.

    Raises `InputError` for a city that is not among the 200, and where the tokenizer leaves fewer than two states.
    """
    lexicon, rng = Lexicon(model), random.Random(f"task two-hop:{seed}")
    if bad := [template for template in templates if slots(template) != ["city"]]:
        raise InputError(f"The two-hop template {bad[0]!r} does not have the slot {{city}} exactly once.")
    chosen = cities or (sorted(HELD_OUT_CITIES) if is_pocket(model) else CITIES)
    if unknown := [city for city in chosen if city not in STATE_OF]:
        raise InputError(f"No state is known for {listed(unknown)}; cities: {', '.join(CITIES[:5])} …")
    capitals = set(lexicon.single("capitals", None, CAPITALS, at_least=2))
    partners = _partners(lexicon, [city for city in chosen if STATE_OF[city].capital in capitals])
    order = sorted(partners)
    examples = []
    for i in range(n):
        if i % len(order) == 0:
            rng.shuffle(order)
        city = order[i % len(order)]
        number = rng.randrange(len(templates))
        examples.append(_example(templates[number], str(number), city, rng.choice(partners[city])))
    return Task("two-hop", tuple(examples), refused=tuple(lexicon.refused))


def _partners(lexicon: Lexicon, cities: Sequence[str]) -> dict[str, list[str]]:
    """For each city those of another state and of the same number of tokens, within a text and at its start."""
    inside = pieces(lexicon.model, [" " + city for city in cities])
    first = pieces(lexicon.model, list(cities))
    by_length: dict[tuple[int, int], list[str]] = defaultdict(list)
    length = {city: (len(a), len(b)) for city, a, b in zip(cities, inside, first, strict=True)}
    for city in cities:
        by_length[length[city]].append(city)
    partners = {c: [o for o in by_length[length[c]] if STATE_OF[o] is not STATE_OF[c]] for c in cities}
    alone = [city for city in cities if not partners[city]]
    kept = lexicon.keep("cities", [city for city in cities if partners[city]], alone, at_least=2)
    return {city: partners[city] for city in kept}


def _example(template: str, number: str, city: str, other: str) -> Example:
    clean, spans = fill(template, {"city": city})
    corrupt, _ = fill(template, {"city": other})
    return Example(
        clean=clean,
        corrupt=corrupt,
        answers=(" " + STATE_OF[city].capital,),
        wrong=(" " + STATE_OF[other].capital,),
        roles={"city": spans["city"][0]},
        template=number,
        facts={"state": STATE_OF[city].name, "corrupt_state": STATE_OF[other].name},
    )
