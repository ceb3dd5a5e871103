"""Subject-verb agreement across a distractor (Linzen et al. 2016): "The keys to the cabinet" → " are", not " is"."""

import random
from collections.abc import Sequence

from circuitsae.pocket.words import PLURAL, PREPOSITIONS, SINGULAR, held_out
from circuitsae.tasks.task import Example, Task
from circuitsae.tasks.wording import Lexicon, fill, is_pocket
from transcoders.language_model import LanguageModel

TEMPLATE = "The {subject} {prep} the {distractor}"
VERBS = (("is", "are"), ("was", "were"))
_FORMS = (SINGULAR, PLURAL)
_NUMBERS = ("singular", "plural")


def agreement(model: LanguageModel, n: int = 200, seed: int = 0, *, prepositions: Sequence[str] = PREPOSITIONS) -> Task:
    """`n` examples, singular and plural subjects in equal parts, the distractor being of the other number.

    The corrupt prompt has the subject in the other number, which turns the answer round. Nouns of which a form is not
    one token are in `refused`; for pocket the pairs of nouns are held-out ones. Roles: subject, distractor, END.
    Raises `InputError` where fewer than two nouns are left.
    """
    lexicon, rng = Lexicon(model), random.Random(f"task agreement:{seed}")
    one = lexicon.single("nouns", None, SINGULAR)
    many = lexicon.single("nouns", None, PLURAL)
    verbs = [" " + verb for pair in VERBS for verb in pair]
    lexicon.single("verbs", [verb.strip() for verb in verbs], ())
    nouns = [i for i in range(len(SINGULAR)) if SINGULAR[i] in one and PLURAL[i] in many]
    lexicon.keep("nouns", [SINGULAR[i] for i in nouns], (), at_least=2)
    pairs = [(s, d) for s in nouns for d in nouns if s != d]
    if is_pocket(model):
        pairs = [pair for pair in pairs if held_out("nouns", *pair)]
    examples = (_example(*rng.choice(pairs), i % 2, rng.choice(prepositions), rng.choice(VERBS)) for i in range(n))
    return Task("agreement", tuple(examples), refused=tuple(lexicon.refused))


def _example(subject: int, distractor: int, number: int, preposition: str, verbs: tuple[str, str]) -> Example:
    values = {
        "subject": _FORMS[number][subject],
        "prep": preposition,
        "distractor": _FORMS[1 - number][distractor],
    }
    clean, spans = fill(TEMPLATE, values)
    corrupt, _ = fill(TEMPLATE, values | {"subject": _FORMS[1 - number][subject]})
    return Example(
        clean=clean,
        corrupt=corrupt,
        answers=(" " + verbs[number],),
        wrong=(" " + verbs[1 - number],),
        roles={"subject": spans["subject"][0], "distractor": spans["distractor"][0]},
        template=preposition,
        facts={"number": _NUMBERS[number]},
    )
