"""The byte-level BPE of the pocket model: every name, place name, two-digit number and corpus word is one token.

A single regular expression cuts the text, with names of several words (" Salt Lake City") kept whole; the model then
looks a piece up in the vocabulary before it applies merges (`ignore_merges`), so listed words are single tokens by
construction and anything else falls back on merges and bytes. Every text decodes to itself.
"""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from circuitsae.pocket import MODEL_DIR
from circuitsae.pocket.facts import ENTITIES
from circuitsae.pocket.words import NAMES
from transcoders.files import write_file

EOT = "<|endoftext|>"
VOCAB_SIZE = 2176
_MERGES = 160
_SAMPLE_DOCUMENTS = 40_000


def _pattern() -> str:
    phrases = sorted((e for e in ENTITIES if " " in e), key=len, reverse=True)
    listed = "|".join(re.escape(phrase).replace(r"\ ", " ") for phrase in phrases)
    return (
        rf" ?(?:{listed})(?!\p{{L}})|'(?:s|t|re|ve|m|ll|d)| ?\p{{N}}{{1,2}}| ?\p{{L}}+"
        r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pattern()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _required() -> list[str]:
    words = [*NAMES, *ENTITIES, *(f"{number:02d}" for number in range(100))]
    return [prefix + word for word in dict.fromkeys(words) for prefix in (" ", "")]


def _pieces(pre_tokenizer: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


def _train_merges(texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1 + len(alphabet) + _MERGES, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def build_tokenizer(seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Merges learned from a sample of the corpus, then the required words, then its most frequent other pieces."""
    from circuitsae.pocket.corpus import documents

    texts = list(islice(documents(f"tokenizer:{seed}"), _SAMPLE_DOCUMENTS))
    vocab, merges = _train_merges(texts)
    pre_tokenizer = _pre_tokenizer()
    counts = Counter(piece for text in texts for piece in _pieces(pre_tokenizer, text))
    required = [piece for word in _required() for piece in _pieces(pre_tokenizer, word)]
    frequent = sorted(counts, key=lambda piece: (-counts[piece], piece))
    for piece in [*required, *frequent]:
        if piece not in vocab and len(vocab) < vocab_size:
            vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` reads without a network.

    As saved it puts `EOT` before every text, as the model's rows of training text begin.
    """
    saved = Tokenizer.from_str(tokenizer.to_str())
    saved.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A", pair=f"{EOT} $A $B", special_tokens=[(EOT, saved.token_to_id(EOT))]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "unk_token": EOT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    for name, text in (
        ("tokenizer.json", saved.to_str(pretty=False)),
        ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
    ):
        write_file(directory / name, text)


def load_tokenizer(directory: Path = MODEL_DIR) -> Tokenizer:
    """The saved tokenizer, without transformers, and with texts alone: nothing is put before them."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}: run `python -m examples.pocket.recipe` to build the model")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = None
    return tokenizer
