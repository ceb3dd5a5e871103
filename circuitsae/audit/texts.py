"""Plain text as a task: the next token after the beginning of a text, where no task is asked about."""

import random
from itertools import pairwise

from circuitsae.pocket import families
from circuitsae.pocket.corpus import row_text
from circuitsae.tasks import Example, Task
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

TOKENS = 24
"""Of each beginning."""
_WORDS = 40
_PLAIN = {families.story: 0.5, families.sentences: 0.5}


def plain_text(model: LanguageModel, n: int, seed: int) -> Task:
    """`n` beginnings of little stories and unrelated sentences, each with the token that follows: m = log p(next).

    The corrupt prompt is the beginning of another text. Raises `InputError` for a model without a tokenizer, and where
    its tokenizer reads a text's beginning otherwise than within the text.
    """
    rng = random.Random(f"plain text:{seed}")
    found: list[tuple[str, int]] = []
    for _ in range(10 * (n + 1)):
        ids = model.to_tokens(row_text(rng, _WORDS, _PLAIN)).tolist()
        own = ids[int(model.adds_bos) : TOKENS]
        text = str(model.tokenizer.decode(own))
        if len(ids) > TOKENS and model.to_tokens(text).tolist() == ids[:TOKENS]:
            found.append((text, ids[TOKENS]))
        if len(found) > n:
            break
    else:
        raise InputError(
            f"Of {10 * (n + 1)} beginnings of texts {model.name} reads {len(found)} as it reads them within the text; "
            f"{n + 1} are needed, so audit the circuit without plain text."
        )
    examples = tuple(
        Example(clean=text, corrupt=other, answers=(token,)) for (text, token), (other, _) in pairwise(found)
    )
    return Task("text", examples, metric="log_prob", measures=("log_prob", "top1"))
