"""The embedded default: a small GPT-2, its tokenizer, dictionaries, feature cards, and the text it was trained on.

Nothing is downloaded: `facts`, `words` and `families` hold what the corpus says, `corpus` mixes it into an endless
seeded stream, and `prompts` are what training skipped. The recipe that rebuilds the files is `examples/pocket`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuitsae.features.cards import FeatureCards

POCKET_DIR = Path(__file__).resolve().parent
MODEL_DIR = POCKET_DIR / "model"
DICTIONARY_DIR = POCKET_DIR / "dictionaries"
POCKET_DICTIONARIES = {"pocket": "clt", "pocket-clt": "clt", "pocket-plt": "plt", "pocket-sae": "sae"}


def dictionary_folder(name: str | Path) -> Path:
    """Where dictionaries lie: the package for the pocket's names, and otherwise the folder that `name` is."""
    return DICTIONARY_DIR / POCKET_DICTIONARIES[str(name)] if str(name) in POCKET_DICTIONARIES else Path(name)


def load_cards(name: str | Path = "pocket") -> "FeatureCards":
    """The feature cards of dictionaries, by the names that `circuitsae.load_dictionaries` takes; imports no torch.

    Raises `FileFormatError` where there are none.
    """
    from circuitsae.features.cards import FeatureCards

    return FeatureCards.load(dictionary_folder(name))


__all__ = ["DICTIONARY_DIR", "MODEL_DIR", "POCKET_DICTIONARIES", "POCKET_DIR", "dictionary_folder", "load_cards"]
