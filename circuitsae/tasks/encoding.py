"""Texts as a model's own tokenizer cuts them: ids, and which token a character is in."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from transcoders.errors import ModelError
from transcoders.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one text, BOS included where the model takes one."""

    ids: list[int]
    ends: list[int]
    """For each token, the first character after it."""

    def position(self, character: int) -> int:
        """The position of the token that holds a character."""
        return min(bisect_right(self.ends, character), len(self.ids) - 1)


def encode(model: LanguageModel, texts: Sequence[str]) -> list[Encoded]:
    """Every text as `model.to_tokens` would give it, all in one call of the tokenizer.

    Raises `ModelError` for a tokenizer that does not say which characters a token stands for, and `PromptError` for
    texts the model cannot take.
    """
    if not texts:
        return []
    tokenizer = model.tokenizer
    if model.has_tokenizer and not tokenizer.is_fast:
        raise ModelError(f"The tokenizer of {model.name} gives no character offsets; use its `fast` version.")
    model.to_tokens(texts[0])  # a model without a tokenizer says so
    model = model.with_bos(model.adds_bos)  # asks the tokenizer once
    batch = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    found = zip(map(model.begun, batch["input_ids"]), batch["offset_mapping"], strict=True)
    return [Encoded(ids, [0] * (len(ids) - len(ends)) + [end for _, end in ends]) for ids, ends in found]


def pieces(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text alone, without BOS."""
    if not texts:
        return []
    model.to_tokens(texts[0])  # a model without a tokenizer says so
    tokenizer = model.tokenizer
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
