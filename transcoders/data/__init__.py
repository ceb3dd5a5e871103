"""From text to activations: `corpora` opens texts, `tokens` packs them into rows, `outliers` says which tokens to leave
out, `activations` runs the model.

`store_writing` puts activations on disk, in `shards`; `store` reads them, and `store_stream` makes batches of them.

Everything is a deterministic function of the corpus and a seed, and every pass can say where it is (`places`), so that
a resumed run sees exactly what the unbroken one would have seen, without reading again what came before.
"""

from transcoders.data.activations import ActivationBatch, ActivationStream, sites_of
from transcoders.data.corpora import Corpus, open_corpus
from transcoders.data.outliers import TokenOutliers, find_outliers, massive_tokens
from transcoders.data.store import ActivationStore
from transcoders.data.store_stream import StoreStream
from transcoders.data.store_writing import write_activations
from transcoders.data.tokens import held_out_rows, pack_rows, take_rows

__all__ = [
    "ActivationBatch",
    "ActivationStore",
    "ActivationStream",
    "Corpus",
    "StoreStream",
    "TokenOutliers",
    "find_outliers",
    "held_out_rows",
    "massive_tokens",
    "open_corpus",
    "pack_rows",
    "sites_of",
    "take_rows",
    "write_activations",
]
