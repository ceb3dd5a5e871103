"""Greater-than (Hanna et al. 2023, "How does GPT-2 compute greater-than?", §2).

"The war lasted from the year 1732 to the year 17" → any of "33" to "99", against "00" to "32".
"""

import random
from collections.abc import Sequence

from circuitsae.pocket.families import SPAN_TEMPLATES
from circuitsae.pocket.words import CENTURIES, SPANS, Slots, held_out
from circuitsae.tasks.task import Example, Task
from circuitsae.tasks.wording import Lexicon, fill, is_pocket, pieces
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

FIRST, LAST = 2, 98
YEARS = tuple(f"{year:02d}" for year in range(100))
"""The two-digit tokens."""
_LATER = {start: YEARS[start + 1 :] for start in range(FIRST, LAST + 1)}
_EARLIER = {start: YEARS[: start + 1] for start in range(FIRST, LAST + 1)}
_BOUNDARY = {start: (YEARS[start + 1], YEARS[start - 1]) for start in range(FIRST, LAST + 1)}


def greater_than(
    model: LanguageModel,
    n: int = 200,
    seed: int = 0,
    *,
    nouns: Sequence[str] | None = None,
    centuries: Sequence[int] = CENTURIES,
    templates: Sequence[str] = SPAN_TEMPLATES[:1],
) -> Task:
    """`n` examples with the starting years 02 to 98 in equal parts; the corrupt prompt starts in 01.

    Only years that the tokenizer cuts into century and year are used; the others, and nouns that are not one token,
    are in `refused`. For pocket, the triples of noun, century and year are held-out ones. Roles: noun, XX1 and YY
    (the two halves of the start), END (the bare century). The metric is the probability difference.

    Raises `InputError` where the tokenizer has no two-digit tokens, or splits every year differently.
    """
    lexicon, rng = Lexicon(model), random.Random(f"task greater-than:{seed}")
    spans = lexicon.single("nouns", nouns, SPANS)
    years = _years(lexicon, centuries)
    starts = [start for start in range(FIRST, LAST + 1) if years[start]]
    held_out_only = is_pocket(model) and nouns is None and set(centuries) <= set(CENTURIES)
    pools = {start: _pool(spans, years[start], start, held_out_only=held_out_only) for start in starts}
    examples, order = [], []
    for i in range(n):
        if i % len(starts) == 0:
            order = rng.sample(starts, len(starts))
        start = order[i % len(starts)]
        noun, century = rng.choice(pools[start])
        number = rng.randrange(len(templates))
        examples.append(_example(rng, templates[number], str(number), noun, century, start))
    measures = ("prob_diff", "sharpness", "accuracy", "top1")
    return Task("greater-than", tuple(examples), "prob_diff", measures, tuple(lexicon.refused))


def _years(lexicon: Lexicon, centuries: Sequence[int]) -> dict[int, list[int]]:
    """The centuries in which each two-digit start is the second of two tokens."""
    lexicon.single("two-digit years", YEARS, (), before=("",))
    model = lexicon.model
    digits = [ids[0] for ids in pieces(model, YEARS)]
    years: dict[int, list[int]] = {start: [] for start in range(FIRST, LAST + 1)}
    split: list[str] = []
    for century in centuries:
        (prefix,) = pieces(model, [f" {century}"])
        found = pieces(model, [f" {century}{year}" for year in YEARS])
        whole = [ids == [*prefix, digit] and len(prefix) == 1 for ids, digit in zip(found, digits, strict=True)]
        # Without its year 01 a century has no corrupt prompt.
        usable = [start for start in years if whole[start] and whole[1]]
        split += [f"{century}{start:02d}" for start in years if start not in usable]
        for start in usable:
            years[start].append(century)
    left = [f"{century}{start:02d}" for start, some in years.items() for century in some]
    lexicon.keep("years", left, split, at_least=1)
    return years


def _pool(nouns: Sequence[str], centuries: Sequence[int], start: int, *, held_out_only: bool) -> list[tuple[str, int]]:
    pairs = [(noun, century) for noun in nouns for century in centuries]
    chosen = [pair for pair in pairs if held_out("span", *pair, start)] if held_out_only else pairs
    if not chosen:
        raise InputError(f"Every prompt of these centuries that starts in {start:02d} was trained on; give more.")
    return chosen


def _example(rng: random.Random, template: str, number: str, noun: str, century: int, start: int) -> Example:
    values = Slots(rng, span=noun, start=f"{century}{start:02d}", century=str(century))
    clean, spans = fill(template, values)
    if not {"span", "start", "century"} <= spans.keys() or spans["century"][-1][1] != len(clean):
        raise InputError(
            f"The greater-than template {template!r} needs {{span}}, {{start}} and, at its end, {{century}}."
        )
    values["start"] = f"{century}01"
    corrupt, _ = fill(template, values)
    begin, end = spans["start"][0]
    return Example(
        clean=clean,
        corrupt=corrupt,
        answers=_LATER[start],
        wrong=_EARLIER[start],
        roles={"noun": spans["span"][0], "XX1": (begin, end - 2), "YY": (end - 2, end)},
        template=number,
        boundary=_BOUNDARY[start],
    )
