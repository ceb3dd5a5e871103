"""Argument names in a docstring (Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer model").

After `def f(self, load, size, file, last)` and the lines `:param load:` and `:param size:`, `:param` → " file".
"""

import random
from collections.abc import Sequence
from typing import Literal

from circuitsae.pocket.words import INDUCTION_WORDS
from circuitsae.tasks.task import Example, Task
from circuitsae.tasks.wording import Lexicon, fill
from transcoders.language_model import LanguageModel

TEMPLATE = (
    "def {f}(self, {A}, {B}, {C}, {D}):\n"
    '    """Return {w1} {w2} {w3}\n\n'
    "    :param {A_doc}: {w4} {w5}\n"
    "    :param {B_doc}: {w6} {w7}\n"
    "    :param"
)
_ARGUMENTS = ("A", "B", "C", "D")
_OTHERS = ("f", "w1", "w2", "w3", "w4", "w5", "w6", "w7")
_WORDS = tuple(word for word in INDUCTION_WORDS if word.islower())

Corruption = Literal["random", "definition"]


def docstring(
    model: LanguageModel,
    n: int = 200,
    seed: int = 0,
    *,
    corruption: Corruption = "random",
    words: Sequence[str] | None = None,
) -> Task:
    """`n` examples of a method of four arguments, two of them documented; the wrong answers are the other three.

    corruption: `random` puts other words for the arguments in the definition and in the docstring (the paper's random
    answer and random docstring), `definition` in the definition alone. Roles: A_def, B_def, C_def (the answer),
    A_doc, B_doc, END. Raises `InputError` for words that are not one token each.
    """
    lexicon, rng = Lexicon(model), random.Random(f"task docstring:{seed}")
    # The function's name follows a space, its arguments too.
    vocabulary = lexicon.single("words", words, _WORDS, at_least=18)
    examples = tuple(_example(rng, vocabulary, corruption) for _ in range(n))
    return Task("docstring", examples, refused=tuple(lexicon.refused))


def _example(rng: random.Random, vocabulary: Sequence[str], corruption: Corruption) -> Example:
    drawn = rng.sample(vocabulary, 18)
    values = dict(zip((*_ARGUMENTS, *_OTHERS), drawn[:12], strict=True))
    values |= {"A_doc": values["A"], "B_doc": values["B"]}
    clean, spans = fill(TEMPLATE, values)
    changed = values | dict(zip(_ARGUMENTS, drawn[12:16], strict=True))
    if corruption == "random":
        changed |= dict(zip(("A_doc", "B_doc"), drawn[16:], strict=True))
    corrupt, _ = fill(TEMPLATE, changed)
    roles = {f"{name}_def": spans[name][0] for name in "ABC"}
    return Example(
        clean=clean,
        corrupt=corrupt,
        answers=(" " + values["C"],),
        wrong=tuple(" " + values[name] for name in "ABD"),
        roles=roles | {name: spans[name][0] for name in ("A_doc", "B_doc")},
        template="docstring",
    )
