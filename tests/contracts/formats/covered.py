"""What the tests of this folder hold of each layout, for the table of `docs/write_formats.py`.

A row says which tests read files written by the published definition, write them, and attribute with them, and which
files the community's own package wrote. `tests/unit/test_docs.py` looks each of them up.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Covered:
    """One layout of a community."""

    format: str
    layout: str
    """What is in the files, in the community's words."""
    reads: str
    """MODULE::TEST that compares with the definition in dense float64."""
    writes: str | None = None
    """MODULE::TEST that reads what was written again, or None where this layout is not the one written."""
    attributes: str | None = None
    """MODULE::TEST that holds conservation, or, of autoencoders, derivatives."""
    peer: str | None = None
    """Folders below tests/golden/dictionaries that the package itself wrote, as a pattern."""


_CT, _LENS, _SPARSIFY, _SCOPE = "test_circuit_tracer", "test_saelens", "test_sparsify", "test_gemma_scope"
_SCOPE_2 = "test_gemma_scope_2"
_LEARNING, _OPENAI, _FORGE = "test_dictionary_learning", "test_openai", "test_clt_forge"
_TRAINING, _CROSS = "test_clt_training", "test_crosslayer_transcoder"
_SAES = "test_autoencoder_graphs::test_what_peers_wrote_is_attributed"

COVERED = (
    Covered(
        format="circuit-tracer",
        layout="one transcoder a layer: ReLU, JumpReLU, TopK, skip; listed (`hf://` too) or by their numbers",
        reads=f"{_CT}::test_a_local_folder_computes_what_its_definition_says",
        writes=f"{_CT}::test_what_is_written_is_read_again",
        attributes=f"{_CT}::test_graphs_are_conserved",
        peer="circuit_tracer/plt_*",
    ),
    Covered(
        format="circuit-tracer",
        layout="cross-layer transcoders: `W_enc_L`, `W_dec_L`",
        reads=f"{_CT}::test_a_local_folder_computes_what_its_definition_says",
        writes=f"{_CT}::test_what_is_written_is_read_again",
        attributes=f"{_CT}::test_the_adjacency_of_a_clt_before_the_norm_is_that_of_a_frozen_gpt2_written_out",
        peer="circuit_tracer/clt_*",
    ),
    Covered(
        format="circuit-tracer",
        layout="lists of Gemma Scope's and Gemma Scope 2's files",
        reads=f"{_CT}::test_a_repository_does_so_too",
        attributes=f"{_CT}::test_graphs_are_conserved",
        peer="circuit_tracer/gemma_*",
    ),
    Covered(
        format="saelens",
        layout="autoencoders: standard, gated, JumpReLU, TopK, and as trained by BatchTopK and Matryoshka; all norms",
        reads=f"{_LENS}::test_every_architecture_is_what_is_published",
        writes=f"{_LENS}::test_round_trip",
        attributes=_SAES,
        peer="sae_lens/{standard,gated,jumprelu_[!st],jumprelu_s[!k],topk,trained}*",
    ),
    Covered(
        format="saelens",
        layout="transcoders, skip transcoders and those with JumpReLU",
        reads=f"{_LENS}::test_every_architecture_is_what_is_published",
        writes=f"{_LENS}::test_round_trip",
        attributes=f"{_LENS}::test_transcoders_conserve_what_they_attribute",
        peer="sae_lens/{transcoder,skip,jumprelu_transcoder,jumprelu_skip}*",
    ),
    Covered(
        format="saelens",
        layout="settings of older versions, and releases by name",
        reads=f"{_LENS}::test_older_settings_have_their_own_names_and_defaults",
        attributes=_SAES,
        peer="sae_lens/older_*",
    ),
    Covered(
        format="gemma-scope",
        layout="`params.npz` of residual stream, MLP and attention",
        reads=f"{_SCOPE}::test_the_repository_says_where_they_read",
        writes=f"{_SCOPE}::test_autoencoders_come_back",
        attributes=_SAES,
        peer="gemma_scope/one_[!t]*",
    ),
    Covered(
        format="gemma-scope",
        layout="`params.npz` of transcoders",
        reads=f"{_SCOPE}::test_the_repository_says_where_they_read",
        writes=f"{_SCOPE}::test_published_dictionaries_come_back",
        attributes=f"{_SCOPE}::test_edges_add_up_to_what_is_read",
        peer="gemma_scope/one_t*",
    ),
    Covered(
        format="gemma-scope-2",
        layout="`params.safetensors` of autoencoders",
        reads=f"{_SCOPE_2}::test_the_folder_and_the_settings_say_where_they_read",
        writes=f"{_SCOPE_2}::test_what_is_saved_comes_back",
        attributes=_SAES,
        peer="gemma_scope/two_[!t]*",
    ),
    Covered(
        format="gemma-scope-2",
        layout="transcoders, affine ones, cross-layer ones",
        reads=f"{_SCOPE_2}::test_a_cross_layer_transcoder",
        writes=f"{_SCOPE_2}::test_what_is_saved_comes_back",
        attributes=f"{_SCOPE_2}::test_edges_add_up_to_what_is_read",
        peer="gemma_scope/two_t*",
    ),
    Covered(
        format="sparsify",
        layout="autoencoders: TopK, GroupMax, skip",
        reads=f"{_SPARSIFY}::test_every_kind",
        writes=f"{_SPARSIFY}::test_every_kind",
        attributes=_SAES,
        peer="sparsify/{sae,skip_sae,layers_sae}*",
    ),
    Covered(
        format="sparsify",
        layout="transcoders: TopK, GroupMax, skip",
        reads=f"{_SPARSIFY}::test_every_kind",
        writes=f"{_SPARSIFY}::test_every_kind",
        attributes=f"{_SPARSIFY}::test_every_kind",
        peer="sparsify/{transcoder,skip_transcoder,layers_skip,layers_transcoder}*",
    ),
    Covered(
        format="clt-training",
        layout="cross-layer transcoders of the fork of sparsify: decoders of their own or tied, scaled, raised alike "
        "for all targets, skip terms of a layer's own",
        reads=f"{_TRAINING}::test_every_kind_of_tie",
        writes=f"{_TRAINING}::test_what_it_writes_is_whole",
        attributes=f"{_TRAINING}::test_they_attribute",
        peer="clt_training/{cross_layer,tied,tied_skip}",
    ),
    Covered(
        format="dictionary-learning",
        layout="`ae.pt` of every class: standard, p-annealed, new, gated, JumpReLU, TopK, BatchTopK, Matryoshka",
        reads=f"{_LEARNING}::test_every_class",
        writes=f"{_LEARNING}::test_what_is_saved_comes_back",
        attributes=f"{_LEARNING}::test_edges_add_up_to_what_is_read",
        peer="dictionary_learning/*",
    ),
    Covered(
        format="openai",
        layout="GPT-2's autoencoders: ReLU and TopK, of all places",
        reads=f"{_OPENAI}::test_every_version_and_place",
        writes=f"{_OPENAI}::test_what_is_saved_comes_back",
        attributes=_SAES,
        peer="openai/*",
    ),
    Covered(
        format="clt-forge",
        layout="checkpoints, whole and in shards: cross-layer and per layer",
        reads=f"{_FORGE}::test_both_kinds_whole_and_in_shards",
        writes=f"{_FORGE}::test_what_it_writes",
        attributes=f"{_FORGE}::test_both_kinds_whole_and_in_shards",
        peer="clt_forge/*",
    ),
    Covered(
        format="crosslayer-transcoder",
        layout="folders and Lightning's checkpoints: ReLU, JumpReLU, TopK, BatchTopK; standardised",
        reads=f"{_CROSS}::test_every_kind",
        writes=f"{_CROSS}::test_what_it_writes",
        attributes=f"{_CROSS}::test_they_attribute",
        peer="crosslayer_transcoder/{batch,jump,layer,per,relu_l,topk}*",
    ),
)
