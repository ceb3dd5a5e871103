"""Greater-than (Hanna et al. 2023, "How does GPT-2 compute greater-than?", §2).

"The war lasted from the year 1732 to the year 17" → any of "33" to "99", against "00" to "32". Where the tokenizer
reads years digit by digit the answer is the tens digit: any of "3" to "9", against "0" to "2", since 1733 has a 3.
"""

import random
from collections.abc import Sequence

from circuitsae.pocket.families import SPAN_TEMPLATES
from circuitsae.pocket.words import CENTURIES, SPANS, Slots, held_out
from circuitsae.tasks.task import Example, Task
from circuitsae.tasks.wording import Lexicon, fill, is_pocket, listed, pieces
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

FIRST, LAST = 2, 98
YEARS = tuple(f"{year:02d}" for year in range(100))
"""The two-digit tokens."""
_DIGITS = tuple("0123456789")


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

    Where the tokenizer reads years digit by digit, the starts are 10 to 98, XX1 is the century's last digit and YY the
    tens digit. Right are the tens digits of all later years of the century: the start's own too, but for starts in 9.

    Raises `InputError` where the tokenizer has no tokens of two digits or of one, or splits every year differently.
    """
    lexicon, rng = Lexicon(model), random.Random(f"task greater-than:{seed}")
    spans = lexicon.single("nouns", nouns, SPANS)
    endings = _endings(lexicon)
    years = _years(lexicon, centuries, endings)
    starts = [start for start in years if years[start]]
    held_out_only = is_pocket(model) and nouns is None and set(centuries) <= set(CENTURIES)
    pools = {start: _pool(spans, years[start], start, held_out_only=held_out_only) for start in starts}
    examples, order = [], []
    for i in range(n):
        if i % len(starts) == 0:
            order = rng.sample(starts, len(starts))
        start = order[i % len(starts)]
        noun, century = rng.choice(pools[start])
        number = rng.randrange(len(templates))
        examples.append(_example(rng, templates[number], str(number), noun, century, start, endings))
    measures = ("prob_diff", "sharpness", "accuracy", "top1")
    return Task("greater-than", tuple(examples), "prob_diff", measures, tuple(lexicon.refused))


def _endings(lexicon: Lexicon) -> tuple[str, ...]:
    """What follows a bare century as one token: two digits, or one."""
    for endings in (YEARS, _DIGITS):
        found = pieces(lexicon.model, endings)
        if all(len(ids) == 1 for ids in found):
            return endings
    split = [ending for ending, ids in zip(endings, found, strict=True) if len(ids) != 1]
    raise InputError(
        f"Greater-than needs all two-digit years, or all digits, as one token each, but {lexicon.model.name} splits "
        f"{listed(split)}; choose another model."
    )


def _years(lexicon: Lexicon, centuries: Sequence[int], endings: Sequence[str]) -> dict[int, list[int]]:
    """The centuries in which each start is read as the century and then by `endings`."""
    model, width = lexicon.model, len(endings[0])
    token = {ending: ids[0] for ending, ids in zip(endings, pieces(model, endings), strict=True)}
    # Starts have an ending below their own, and another than 01.
    years: dict[int, list[int]] = {start: [] for start in range(max(FIRST, _per(endings)), LAST + 1)}
    split: list[str] = []
    for century in centuries:
        (prefix,) = pieces(model, [f" {century}"])
        found = pieces(model, [f" {century}{year}" for year in YEARS])
        whole = [
            ids == [*prefix, *(token[year[i : i + width]] for i in range(0, 2, width))]
            and (len(prefix) == 1 or width == 1)
            for ids, year in zip(found, YEARS, strict=True)
        ]
        # Without its year 01 a century has no corrupt prompt.
        usable = [start for start in years if whole[start] and whole[1]]
        split += [f"{century}{start:02d}" for start in years if start not in usable]
        for start in usable:
            years[start].append(century)
    left = [f"{century}{start:02d}" for start, some in years.items() for century in some]
    lexicon.keep("years", left, split, at_least=1)
    return years


def _per(endings: Sequence[str]) -> int:
    """How many years of a century share an ending."""
    return len(YEARS) // len(endings)


def _pool(nouns: Sequence[str], centuries: Sequence[int], start: int, *, held_out_only: bool) -> list[tuple[str, int]]:
    pairs = [(noun, century) for noun in nouns for century in centuries]
    chosen = [pair for pair in pairs if held_out("span", *pair, start)] if held_out_only else pairs
    if not chosen:
        raise InputError(f"Every prompt of these centuries that starts in {start:02d} was trained on; give more.")
    return chosen


def _example(
    rng: random.Random, template: str, number: str, noun: str, century: int, start: int, endings: tuple[str, ...]
) -> Example:
    values = Slots(rng, span=noun, start=f"{century}{start:02d}", century=str(century))
    clean, spans = fill(template, values)
    if not {"span", "start", "century"} <= spans.keys() or spans["century"][-1][1] != len(clean):
        raise InputError(
            f"The greater-than template {template!r} needs {{span}}, {{start}} and, at its end, {{century}}."
        )
    values["start"] = f"{century}01"
    corrupt, _ = fill(template, values)
    begin, end = spans["start"][0]
    year, width = end - 2, len(endings[0])
    # The first ending of a later year, and the first whose years are not all earlier.
    later, own = (start + 1) // _per(endings), start // _per(endings)
    return Example(
        clean=clean,
        corrupt=corrupt,
        answers=endings[later:],
        wrong=endings[:later],
        roles={"noun": spans["span"][0], "XX1": (max(begin, year - width), year), "YY": (year, year + width)},
        template=number,
        boundary=(endings[later], endings[own - 1]),
    )
