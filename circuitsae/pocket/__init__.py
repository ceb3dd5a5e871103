"""The embedded default: a small GPT-2 trained from scratch, its tokenizer, corpus, and the recipe that rebuilds them.

Nothing is downloaded: `facts`, `words`, `families` and `stories` hold what the corpus says, `corpus` mixes it into an
endless seeded stream, `train` fits the model, `measure` scores it on the held-out `prompts`, and `recipe` runs it all.
"""

from pathlib import Path

POCKET_DIR = Path(__file__).resolve().parent
MODEL_DIR = POCKET_DIR / "model"
DICTIONARY_DIR = POCKET_DIR / "dictionaries"

__all__ = ["DICTIONARY_DIR", "MODEL_DIR", "POCKET_DIR"]
