"""Two hops: "The capital of the state containing Dallas is" → " Austin", through Texas, which is not said."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from circuitsae.pocket.facts import CAPITALS, CITIES, HELD_OUT_CITIES, STATE_OF
from circuitsae.pocket.families import TWO_HOP_TEMPLATES
from circuitsae.tasks.recall import Relation, recall
from circuitsae.tasks.task import Example, Task
from circuitsae.tasks.wording import Lexicon, is_pocket, listed
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

_STATES = {" " + state.capital: state.name for state in STATE_OF.values()}


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
    chosen = cities or (sorted(HELD_OUT_CITIES) if is_pocket(model) else CITIES)
    if unknown := [city for city in chosen if city not in STATE_OF]:
        raise InputError(f"No state is known for {listed(unknown)}; cities: {', '.join(CITIES[:5])} …")
    capitals = set(lexicon.single("capitals", None, CAPITALS, at_least=2))
    answers = {city: STATE_OF[city].capital for city in chosen if STATE_OF[city].capital in capitals}
    relation = Relation(slot="city", subjects="cities", answers=answers, templates=templates)
    examples = map(_with_states, islice(recall(lexicon, rng, relation), n))
    return Task("two-hop", tuple(examples), refused=tuple(lexicon.refused))


def _with_states(example: Example) -> Example:
    (answer,), (wrong,) = example.answers, example.wrong
    return replace(example, facts={"state": _STATES[str(answer)], "corrupt_state": _STATES[str(wrong)]})
