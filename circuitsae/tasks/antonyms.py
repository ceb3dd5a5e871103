"""Antonyms: 'The opposite of "hot" is "' → "cold", and the other way round."""

import random
from collections.abc import Sequence
from itertools import islice

from circuitsae.tasks.recall import Relation, recall
from circuitsae.tasks.task import Task
from circuitsae.tasks.wording import Lexicon
from transcoders.language_model import LanguageModel

TEMPLATE = 'The opposite of "{word}" is "'
PAIRS = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("happy", "sad"), ("rich", "poor"), ("strong", "weak"),
    ("old", "young"), ("high", "low"), ("wet", "dry"), ("light", "dark"), ("hard", "soft"), ("long", "short"),
    ("good", "bad"), ("true", "false"), ("black", "white"), ("day", "night"), ("up", "down"), ("inside", "outside"),
    ("open", "closed"), ("full", "empty"),
)  # fmt: skip
"""No word is in two of them."""
_FEWEST = 20
"""Words of these that a tokenizer must leave."""


def antonyms(
    model: LanguageModel, n: int = 200, seed: int = 0, *, pairs: Sequence[tuple[str, str]] | None = None
) -> Task:
    """`n` examples, every word of the pairs as often as the others; the corrupt prompt names another word.

    That has as many tokens and another opposite, which is the wrong answer. After the quotation mark an answer begins
    without a space; words that are not one token there are in `refused`, and those without a counterpart.
    Roles: word, END.

    Raises `InputError` for given pairs with words that split, and where the tokenizer leaves fewer than twenty of ours.
    """
    lexicon, rng = Lexicon(model), random.Random(f"task antonyms:{seed}")
    answers = {word: other for a, b in pairs or PAIRS for word, other in ((a, b), (b, a))}
    given = list(answers) if pairs else None
    whole = set(lexicon.single("words", given, list(answers), before=("",), at_least=2 if pairs else _FEWEST))
    answers = {word: other for word, other in answers.items() if other in whole}
    relation = Relation(slot="word", subjects="words", answers=answers, templates=(TEMPLATE,), lead="")
    return Task("antonyms", tuple(islice(recall(lexicon, rng, relation), n)), refused=tuple(lexicon.refused))
