"""What several modules of unit tests use: the embedded model, and GPT-2's tokenizer."""

from pathlib import Path

import pytest

import circuitsae
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
