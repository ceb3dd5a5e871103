"""Documents → rows of tokens of equal length."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from transcoders.data.corpora import CorpusSource, open_corpus
from transcoders.errors import InputError, PromptError
from transcoders.language_model import LanguageModel

_DOCUMENTS_AT_ONCE = 256


def pack_rows(
    model: LanguageModel, documents: Iterable[str], *, context: int, separator: str | None = None
) -> Iterator[list[int]]:
    """Rows of exactly `context` token ids cut from the documents end to end; a last, shorter row is dropped.

    Every row begins with BOS where the model `adds_bos`. Between documents stands `separator`, or the tokenizer's
    end-of-text token where that is None.
    """
    if not 2 <= context <= model.context:
        raise InputError(
            f"Rows of {context} tokens do not suit {model.name}; give a context from 2 to {model.context}."
        )
    model = model.with_bos(model.adds_bos)  # asks the tokenizer once
    pending: list[int] = []
    for ids in _tokenised(model, documents, separator):
        pending += ids
        start = 0
        while len(row := model.begun(pending[start : start + context])) >= context:
            yield row[:context]
            start += 2 * context - len(row)
        pending = pending[start:]


def take_rows(
    model: LanguageModel, documents: Iterable[str], *, rows: int, context: int, separator: str | None = None
) -> Int[Tensor, "row pos"]:
    """At most `rows` packed rows as one tensor on the model's device; `InputError` where there is not a single one."""
    packed = list(islice(pack_rows(model, documents, context=context, separator=separator), rows))
    if not packed:
        raise InputError(f"The documents do not fill a single row of {context} tokens; give more text.")
    return torch.tensor(packed, device=model.device)


def held_out_rows(
    model: LanguageModel, corpus: CorpusSource, *, tokens: int, context: int, separator: str | None = None
) -> Int[Tensor, "row pos"]:
    """Rows of about `tokens` tokens from the documents of `corpus` that `train` leaves out; no row for no token."""
    if tokens < 1:
        return torch.empty(0, context, dtype=torch.int64, device=model.device)
    context = min(context, model.context)
    opened = open_corpus(corpus)
    rows, separator = -(-tokens // context), opened.separator_or(separator)
    return take_rows(model, opened.held_out(), rows=rows, context=context, separator=separator)


def _tokenised(model: LanguageModel, documents: Iterable[str], separator: str | None) -> Iterator[list[int]]:
    """The tokens of each document with what separates it from the next."""
    if not model.has_tokenizer:
        raise PromptError(f"{model.name} has no tokenizer; give rows of token ids instead of text.")
    tokenizer = model.tokenizer
    end = [tokenizer.eos_token_id] if separator is None and tokenizer.eos_token_id is not None else []
    stream = iter(documents)
    while batch := list(islice(stream, _DOCUMENTS_AT_ONCE)):
        texts = [text + (separator or "") for text in batch]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            yield ids + end
