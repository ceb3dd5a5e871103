"""From text to activations: `corpora` opens texts, `tokens` packs them into rows, `outliers` says which tokens to leave
out, `activations` runs the model.

Everything is a deterministic function of the corpus and a seed, so that a position in the data is a number and a
resumed run sees exactly what the unbroken one would have seen.
"""

from transcoders.data.activations import ActivationBatch, ActivationStream, sites_of
from transcoders.data.outliers import TokenOutliers, find_outliers, massive_tokens
from transcoders.data.tokens import Corpus, held_out_rows, open_corpus, pack_rows, take_rows

__all__ = [
    "ActivationBatch",
    "ActivationStream",
    "Corpus",
    "TokenOutliers",
    "find_outliers",
    "held_out_rows",
    "massive_tokens",
    "open_corpus",
    "pack_rows",
    "sites_of",
    "take_rows",
]
