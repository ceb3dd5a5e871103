"""The endless seeded corpus: the families in fixed proportions, as documents, as rows of text, and as token batches.

Everything is a function of a seed alone, and a training batch of `(seed, step)` alone, so a resumed run needs no
stream position and no generator state.
"""

import random
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from circuitsae.pocket import MODEL_DIR, families
from transcoders.data import Corpus

Family = Callable[[random.Random], str]

# How often a document of each family is drawn. Documents differ in length: filler is about four tokens in ten.
MIXTURE: dict[Family, float] = {
    families.story: 0.115,
    families.sentences: 0.125,
    families.roll_call: 0.03,
    families.ioi: 0.18,
    families.one_hop: 0.19,
    families.two_hop: 0.14,
    families.greater_than: 0.08,
    families.agreement: 0.06,
    families.induction: 0.08,
}
# What the model sees first, in this order: copying heads are slow to emerge from the mixture alone. The fifth of
# ordinary documents keeps the tokens that copying does not use from drifting together.
_ORDINARY = {family: 0.2 * share for family, share in MIXTURE.items()}
PERIODIC: dict[Family, float] = {**_ORDINARY, families.periodic: 0.48, families.ioi: 0.32}
REPEATS: dict[Family, float] = {**_ORDINARY, families.repeats: 0.48, families.ioi: 0.32}
_LONG_EVERY = 12  # one batch in twelve has long rows
CONTEXT = 96
"""Tokens of the rows that the model and its dictionaries were mostly trained on."""
SEPARATOR = "\n"
"""Between two texts in a row."""
_SEPARATORS = ("\n", "\n", " ")


def document(rng: random.Random, mixture: dict[Family, float] = MIXTURE) -> str:
    """One document of a family drawn from the mixture."""
    return rng.choices(tuple(mixture), tuple(mixture.values()))[0](rng)


def documents(seed: int | str) -> Iterator[str]:
    """Single documents (a sentence, or a few), without end."""
    rng = random.Random(f"documents:{seed}")
    while True:
        yield document(rng)


def row_text(rng: random.Random, n_words: int, mixture: dict[Family, float] = MIXTURE) -> str:
    """Documents joined by a newline or a space until there are `n_words` words and stops."""
    text = document(rng, mixture)
    while text.count(" ") + text.count(".") + text.count("\n") < n_words:
        text += rng.choice(_SEPARATORS) + document(rng, mixture)
    return text


def text_stream(seed: int | str) -> Iterator[str]:
    """Texts as the model was trained on them: several documents each, about 100 tokens, one in twelve about 500."""
    rng = random.Random(f"text:{seed}")
    while True:
        yield row_text(rng, 450 if rng.randrange(_LONG_EVERY) == 0 else 90)


TRAINING = Corpus("pocket", lambda: text_stream(0), SEPARATOR, place={})
"""What dictionaries of the pocket model are trained on."""
UNSEEN = Corpus("pocket", lambda: text_stream("cards"), SEPARATOR)
"""Text from a seed that no training uses: what the embedded feature cards were collected over."""


def held_out_text(n_tokens: int, seed: int = 0, *, tokenizer: Tokenizer | None = None) -> list[str]:
    """Texts of at least `n_tokens` tokens together, from a seed that no training uses."""
    tokenizer = tokenizer or Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    texts: list[str] = []
    count = 0
    for text in text_stream(f"held-out:{seed}"):
        texts.append(text)
        count += len(tokenizer.encode(text, add_special_tokens=False).ids)
        if count >= n_tokens:
            return texts
    raise AssertionError("the text stream has no end")


def batch_shape(step: int, rows: int = 64, length: int = 96, long_length: int = 512) -> tuple[int, int]:
    """Rows and row length at a step: long rows, as many tokens in all, at one step in twelve."""
    if step % _LONG_EVERY == _LONG_EVERY - 1:
        return max(1, rows * length // long_length), long_length
    return rows, length


def batch(
    tokenizer: Tokenizer, seed: int, step: int, rows: int, length: int, mixture: dict[Family, float] = MIXTURE
) -> Int[Tensor, "rows length"]:
    """The token rows of one training step, each beginning with `<|endoftext|>` and then with a fresh document."""
    rng = random.Random(f"train:{seed}:{step}")
    encoded = tokenizer.encode_batch_fast([row_text(rng, int(length * 1.02), mixture) for _ in range(rows)])
    ids = [[0, *_extend(tokenizer, rng, encoding.ids, length - 1, mixture)] for encoding in encoded]
    return torch.tensor(ids)


def _extend(
    tokenizer: Tokenizer, rng: random.Random, ids: list[int], length: int, mixture: dict[Family, float]
) -> list[int]:
    while len(ids) < length:
        ids = ids + tokenizer.encode("\n" + row_text(rng, length - len(ids), mixture)).ids
    return ids[:length]
