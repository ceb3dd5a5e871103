"""Graphs of autoencoders that peers wrote, format by format."""

import pytest

from tests.contracts.formats.dense import GOLDEN, assert_derivatives, load64
from transcoders import list_dictionaries
from transcoders.dictionaries import SAESet

WRITTEN = {
    "sae_lens": (
        "standard_no_input_b_dec", "gated_input_b_dec", "jumprelu_no_input_b_dec", "topk_input_b_dec",
        "trained_batchtopk_plain", "trained_matryoshka_plain", "older_relu",
    ),
    "gemma_scope": ("one_residual", "one_mlp", "two_residual", "two_mlp"),
    "sparsify": ("layers_sae", "sae_topk", "sae_groupmax"),
    "openai": ("relu",),
    "dictionary_learning": ("batch_top_k", "gated", "jumprelu"),
}  # fmt: skip
CASES = [(community, name) for community, names in WRITTEN.items() for name in names]


@pytest.mark.parametrize(("community", "name"), CASES)
def test_what_peers_wrote_is_attributed(community, name):
    variant = GOLDEN / community / name
    folder = variant / "files"
    if community == "gemma_scope":
        folder = next(folder.glob("*/*"))
    unsaid = {"site": ("site", "resid_post"), "layer": ("layers", 0)}
    loaded = load64(folder, **dict(unsaid[name] for name in list_dictionaries(folder)[1][0].asks))
    assert isinstance(loaded, SAESet)
    assert_derivatives(loaded, "gpt2")
