"""The pronoun of a name: "When Mary came home," → " she", against " he"."""

# ruff: noqa: SIM905 - lists of words read best as text
import random
from collections.abc import Sequence
from itertools import islice

from circuitsae.tasks.recall import Relation, recall
from circuitsae.tasks.task import Task
from circuitsae.tasks.wording import Lexicon
from transcoders.language_model import LanguageModel

MEN = "John James David Robert Michael Peter Paul Thomas William George Richard Edward Henry Daniel Kevin Brian".split()
WOMEN = "Mary Anna Sarah Emma Laura Lisa Linda Susan Karen Maria Nancy Rachel Jane Elizabeth Alice Jessica".split()
TEMPLATES = ("When {name} came home,", "After work, {name} went home because", "Last night {name} said that")
"""The name is never the first token, which models without a beginning-of-text token hardly read."""


def pronouns(model: LanguageModel, n: int = 200, seed: int = 0, *, templates: Sequence[str] = TEMPLATES) -> Task:
    """`n` examples, every name as often as the others; the corrupt prompt has a name of the other gender.

    That has as many tokens; names without such a counterpart are in `refused`. Roles: name, END.

    Raises `InputError` for templates without the slot `{name}`, and where the tokenizer leaves fewer than two names or
    splits a pronoun.
    """
    lexicon, rng = Lexicon(model), random.Random(f"task pronouns:{seed}")
    lexicon.single("pronouns", ("he", "she"), ())
    answers = {name: pronoun for names, pronoun in ((MEN, "he"), (WOMEN, "she")) for name in names}
    relation = Relation(slot="name", subjects="names", answers=answers, templates=templates)
    return Task("pronouns", tuple(islice(recall(lexicon, rng, relation), n)), refused=tuple(lexicon.refused))
