"""Training a meta-SAE on decoders whose parts are known."""

import itertools

import torch

from transcoders import SAE, SAEConfig, SAESet
from transcoders.dictionaries import DictionaryProvenance, ReLU
from transcoders.evaluation import recovery
from transcoders.sites import Site
from transcoders.training.meta_sae import meta_config, train_meta_sae


def test_sums_of_pairs_are_taken_apart():
    """66 latents, each the sum of two of twelve random directions: the meta-latents are the twelve."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.nn.functional.normalize(torch.randn(12, 24, generator=generator), dim=1)
    decoders = torch.stack([parts[i] + parts[j] for i, j in itertools.combinations(range(12), 2)])
    sae = SAE(
        W_enc=decoders.T.clone(), b_enc=torch.zeros(66), W_dec=decoders, b_dec=torch.zeros(24), activation=ReLU(),
        site=Site(0, "resid_post"),
    ).requires_grad_(False)  # fmt: skip
    config = SAEConfig(features=12, activation="batchtopk", k=2, batch=66, tokens=66 * 400, lr=1e-2, bias_init="zero")
    meta, found = train_meta_sae(SAESet([sae], DictionaryProvenance(model="test")), 0, config=config)
    assert recovery(meta.W_dec, parts).matched >= 10 / 12
    assert found.fvu < 0.15
    assert found.l0 < 3
    assert found.atomic < 0.2


def test_settings_of_the_source_are_scaled():
    config = meta_config(49_152)
    assert (config.features, config.k, config.activation) == (2340, 4, "batchtopk")
    assert meta_config(20).features == 8
