"""Used by several modules of unit tests: the embedded model, tokenizers (GPT-2's, one of digits), activation stores."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import circuitsae
from tests.small_stores import DTYPES, small_model, write_whole
from transcoders import ActivationStore
from transcoders.language_model import LanguageModel
from transcoders.loading import random_model


@pytest.fixture(scope="session")
def pocket() -> LanguageModel:
    return circuitsae.load_model("pocket")


@pytest.fixture(scope="session")
def gpt2_tokens(shared: Path) -> LanguageModel:
    """A random model of one layer behind GPT-2's own tokenizer."""
    from transformers import GPT2Tokenizer

    folder = shared / "data" / "tokenizers" / "gpt2"
    if not folder.is_dir():
        pytest.skip(f"needs GPT-2's tokenizer in {folder}, which is absent")
    model = random_model("gpt2", n_layers=1, d_model=8, n_heads=2, d_vocab=50257, context=128)
    model.tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    return model


@pytest.fixture(scope="session")
def digit_model() -> LanguageModel:
    """A random model behind a tokenizer of whole words, with their space, and of single digits.

    It has the words of the tasks that ask about one subject, and of greater-than.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from circuitsae.pocket.words import SPANS
    from circuitsae.tasks import antonyms, facts, greater_than, pronouns

    relations = [(*r.templates, *r.answers, *r.answers.values()) for r in facts.RELATIONS.values()]
    texts = (*sum(relations, ()), *sum(antonyms.PAIRS, ()), antonyms.TEMPLATE, *pronouns.MEN, *pronouns.WOMEN)
    texts += (*pronouns.TEMPLATES, "he", "she", *SPANS, *greater_than.SPAN_TEMPLATES, "0 1 2 3 4 5 6 7 8 9")
    cut = r"\s?[^\W\d]+|\d|\s|\s?[^\w\s]"
    found = dict.fromkeys(piece for text in texts for begun in (text, f" {text}") for piece in re.findall(cut, begun))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<unk>", *found))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cut), "isolated")
    tokenizer.decoder = decoders.Fuse()
    model = random_model("gpt2", n_layers=1, d_model=8, n_heads=2, d_vocab=len(found) + 1)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    return model


WORDS = ("<s>", "</s>", *(f" w{i}" for i in range(20)), "w0", "a")


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[..., Any]:
    """Makes tokenizers of 24 tokens, a word with its space each; with the rule for BOS that is wanted."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(*, bos: str | None = "<s>", adds_bos: bool = False) -> Any:
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s?\S+"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, WORDS.index(bos))]
            )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="a")

    return make


@pytest.fixture(scope="session")
def store_model() -> LanguageModel:
    """The model whose activations are in `stores`."""
    return small_model()


@pytest.fixture(scope="session")
def stores(store_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ActivationStore]:
    """The same activations in each type of storage, to be read and not changed."""
    folder = tmp_path_factory.mktemp("stores")
    return {dtype: write_whole(store_model, folder / dtype, dtype=dtype) for dtype in DTYPES}


@pytest.fixture
def copied_store(stores: dict[str, ActivationStore], tmp_path: Path) -> Path:
    """The folder of the store in int8, to be changed."""
    return shutil.copytree(stores["int8"].folder, tmp_path / "copied")
