"""Small activation stores: of several shards, and of several blocks in each."""

from pathlib import Path

import numpy as np
import pytest
import torch

from transcoders import ActivationStore, LanguageModel, random_model, write_activations
from transcoders.data import store_writing
from transcoders.sites import Site

CONTEXT, D_MODEL, BLOCK = 17, 16, 600
DTYPES = ("float32", "bf16", "int8")
KINDS = ("resid_post", "mlp_in", "mlp_out")
SITES = tuple(Site(layer, kind) for layer in range(2) for kind in ("mlp_in", "mlp_out", "resid_post"))


def rows_of(n, seed=0):
    return torch.randint(0, 30, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))


ROWS = rows_of(400)
"""Of 16 tokens with activations: three shards of a megabyte, the last one smaller."""


def small_model(seed=1) -> LanguageModel:
    return random_model(n_layers=2, d_model=D_MODEL, n_heads=2, d_vocab=30, context=32, seed=seed)


def write(model, out, rows=ROWS, **options) -> ActivationStore | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writing, "_MOST_IN_BLOCK", BLOCK)
        return write_activations(model, rows, out, **{"sites": KINDS, "shard_mb": 1, "progress": False, **options})


def write_whole(model, out, rows=ROWS, **options) -> ActivationStore:
    store = write(model, out, rows, **options)
    assert store is not None
    return store


def everything(store, sites=SITES):
    """All that is stored, in the order in which it was written."""
    blocks = [
        store.read(shard, block, sites) for shard in range(len(store.shards)) for block in range(store.blocks(shard))
    ]
    return torch.cat(blocks)


def in_order(tokens):
    """Tokens in an order of their own."""
    return tokens[np.lexsort(tokens.flatten(1).double().numpy().T)]


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
