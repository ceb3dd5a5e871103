"""A meta-SAE: a sparse autoencoder of the decoder directions of another dictionary."""

from pathlib import Path

from transcoders.dictionaries import SAE, DictionarySet, SAESet
from transcoders.errors import InputError
from transcoders.evaluation.matching import feature_vectors, unit
from transcoders.evaluation.meta_sae import Decomposition, decompose
from transcoders.training.config import SAEConfig
from transcoders.training.entry import train

_RATIO = 21
"""Latents for each meta-latent: 49,152 for 2,304 in the source."""

_PASSES = 2000
"""Times that each decoder is seen."""


def train_meta_sae(
    dictionaries: DictionarySet,
    layer: int,
    *,
    config: SAEConfig | None = None,
    progress: bool = False,
    out: Path | str | None = None,
) -> tuple[SAE, Decomposition]:
    """Train an SAE on the unit decoders of one layer, and decompose them with it.

    The default is the source's: BatchTopK with four meta-latents a latent, one meta-latent for 21 latents. Decoders of
    a cross-layer transcoder are those of all write layers side by side. `InputError` for fewer than two features.

    Source: Leask et al. 2025, *Sparse Autoencoders Do Not Find Canonical Units of Analysis*, section 5.
    """
    decoders, _ = feature_vectors(dictionaries, layer)
    if len(decoders) < 2:
        raise InputError(f"A meta-SAE needs at least two decoders to learn from; layer {layer} has {len(decoders)}.")
    trained = train(None, unit(decoders).float(), config or meta_config(len(decoders)), progress=progress, out=out)
    assert isinstance(trained, SAESet)
    return trained[0], decompose(decoders, trained[0])


def meta_config(latents: int) -> SAEConfig:
    """Settings of the source, scaled to the number of latents."""
    features, batch = max(8, latents // _RATIO), min(512, latents)
    return SAEConfig(
        features=features, activation="batchtopk", k=min(4, features), batch=batch, tokens=_PASSES * latents
    )
