"""Induction (Elhage et al. 2021; Olsson et al. 2022): random words, then the same again; the next word was said before.

"Mary map owl tea Mary map owl" → " tea".
"""

import random
from collections.abc import Sequence
from typing import Literal

from circuitsae.pocket.words import INDUCTION_WORDS
from circuitsae.tasks.task import COPY, Example, Task
from circuitsae.tasks.wording import Lexicon, pieces
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

Corruption = Literal["words", "query"]


def induction(
    model: LanguageModel,
    n: int = 200,
    seed: int = 0,
    *,
    corruption: Corruption = "words",
    length: tuple[int, int] = (9, 14),
    total: int = 16,
    words: Sequence[str] | None = None,
) -> Task:
    """`n` prompts of `total` words, the sequence being of `length` (lowest, highest) words and then begun again.

    The distance back to the right word varies, so that looking back by a fixed amount does not do. The wrong answer is
    another word of the sequence, said once as the right one is. corruption: `words` puts other words for the first
    copy; `query` ends on another word of the sequence, whose successor is the wrong answer. Roles: A1 (where the last
    word stood before), B1 (what followed it: the answer), copy (where the second copy begins), END.

    Raises `InputError` for words that are not one token each and for lengths that leave no second copy.
    """
    low, high = length
    if not 3 <= low <= high < total < 2 * low:
        raise InputError(
            f"Sequences of {low} to {high} words do not fit prompts of {total}: the lowest length must be at least 3 "
            "and more than half of the total, the highest less than the total."
        )
    lexicon, rng = Lexicon(model), random.Random(f"task induction:{seed}")
    vocabulary = lexicon.single("words", words, INDUCTION_WORDS, at_least=2 * high)
    # The first word is said without a space and with one.
    bare = [word for word, ids in zip(vocabulary, pieces(model, vocabulary), strict=True) if len(ids) == 1]
    first = lexicon.keep("words to begin with", bare, (), at_least=2)
    examples = tuple(_example(rng, first, vocabulary, rng.randint(low, high), total, corruption) for _ in range(n))
    measures = ("logit_diff", "accuracy", "top1", "log_prob", "first_copy_loss", "second_copy_loss")
    return Task("induction", examples, measures=measures, refused=tuple(lexicon.refused))


def _example(
    rng: random.Random,
    first: Sequence[str],
    vocabulary: Sequence[str],
    length: int,
    total: int,
    corruption: Corruption,
) -> Example:
    starts = rng.sample(first, 2)
    rest = [word for word in rng.sample(vocabulary, 2 * length) if word not in starts][: 2 * length - 2]
    sequence, others = [starts[0], *rest[: length - 1]], [starts[1], *rest[length - 1 :]]
    shown = total - length
    # A word with a successor in the sequence; neither is said again, unless all but one word is.
    query = rng.choice(range(shown, length - 1) or range(shown - 1))
    clean = [*sequence, *sequence[:shown]]
    corrupt = [*others, *sequence[:shown]] if corruption == "words" else [*clean[:-1], sequence[query]]
    spans = _spans(clean)
    return Example(
        clean=" ".join(clean),
        corrupt=" ".join(corrupt),
        answers=(" " + sequence[shown],),
        wrong=(" " + sequence[query + 1],),
        roles={"A1": spans[shown - 1], "B1": spans[shown], COPY: spans[length]},
        template=str(length),
    )


def _spans(words: Sequence[str]) -> list[tuple[int, int]]:
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return spans
