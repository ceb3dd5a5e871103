"""What features and error nodes add to a classifier's margin, and runs of the model without some features."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitsae.attribution.effects import STEPS, Method, node_effects
from circuitsae.benchmark.baselines import like
from circuitsae.benchmark.layers import BenchmarkLayer, rows_of
from circuitsae.interventions import Error, Feature
from circuitsae.replacement import ReplacementModel
from circuitsae.shift.classifier import Classifier, Edits, rows_and_exempt
from circuitsae.validation.circuits import Circuit, CircuitNode
from transcoders.dictionaries import SAE, DictionarySet, ReLU, SAESet
from transcoders.edits import Hook, after
from transcoders.errors import InputError
from transcoders.sites import Site

Ablation = Literal["zero", "mean"]
Means = Mapping[int, Float[Tensor, "feature"]]
"""Of the features of a layer."""


def margin_effects(
    model: ReplacementModel,
    classifier: Classifier,
    texts: Sequence[str],
    y: Bool[np.ndarray, "text"],
    *,
    method: Method = "integrated",
    steps: int = STEPS,
) -> Circuit:
    """`E_i = mean over texts of s Σ_p E_i(p)`, s = ±1 the text's label and E_i(p) a node's effect on the score.

    What a feature, or the error nodes of a layer, adds at all positions of a text to the margin s · score, by
    `node_effects` against 0. The largest |effect| first, and none of 0.

    Source: Marks et al. 2024, *Sparse Feature Circuits*, section 4 and appendix, where the metric is −log p(label).
    """
    total: dict[CircuitNode, float] = defaultdict(float)
    for tokens, sign in zip(_one_by_one(model, texts), np.where(y, 1.0, -1.0).tolist(), strict=True):
        trace = model.trace(tokens)
        found = node_effects(model, trace, classifier.readout(trace), method=method, steps=steps)
        for (layer, _, index), effect in zip(found.nodes.index.tolist(), found.features.tolist(), strict=True):
            total[Feature(layer, index)] += sign * effect / len(texts)
        for layer, effect in enumerate(found.errors.sum(1).tolist()):
            total[Error(layer)] += sign * effect / len(texts)
    order = sorted((node for node, effect in total.items() if effect), key=lambda node: -abs(total[node]))
    return Circuit(tuple(order), tuple(total[node] for node in order))


def features_of(circuit: Circuit) -> list[Feature]:
    """Without its error nodes."""
    return [node for node in circuit.nodes if isinstance(node, Feature)]


def _one_by_one(model: ReplacementModel, texts: Sequence[str]) -> list[Int[Tensor, "pos"]]:
    """The tokens of each text, as all runs read them."""
    groups = rows_of(model.model, texts)
    return [row[:length] for rows in groups for row, length in zip(rows.tokens, rows.lengths.tolist(), strict=True)]


def ablated(dictionaries: DictionarySet, features: Sequence[Feature], means: Means | None = None) -> Edits:
    """Hooks that take features out wherever they are on, or set them to their `means` wherever features can be.

    Later layers see it, and what their features write changes with it; errors are what they become in this run.
    Raises `InputError` for a feature that is not there.
    """
    by_layer: dict[int, list[int]] = {}
    for feature in features:
        by_layer.setdefault(feature.layer, []).append(feature.index)
    for layer, chosen in by_layer.items():
        width = dictionaries.n_features(layer) if 0 <= layer < dictionaries.n_layers else 0
        if beyond := [index for index in chosen if not 0 <= index < width]:
            raise InputError(f"There is no feature {layer}.{beyond[0]}; layer {layer} has {width} features.")

    def edits(without: Bool[Tensor, "row pos"]) -> dict[Site, Hook]:
        made: dict[Site, Hook] = {}
        for layer, chosen in sorted(by_layer.items()):
            index = torch.tensor(sorted(set(chosen)), device=without.device)
            to = torch.zeros(len(index)) if means is None else means[layer].cpu()[index.cpu()]

            def change(a: Tensor, index: Tensor = index, to: Tensor = to) -> Tensor:
                return a.index_copy(-1, index, to.to(a).expand(*a.shape[:-1], -1))

            for site, hook in BenchmarkLayer(dictionaries, layer).edits(change, without).items():
                made[site] = after(made[site], hook) if site in made else hook
        return made

    return edits


@torch.no_grad()
def mean_activations(model: ReplacementModel, layers: Sequence[int], texts: Sequence[str]) -> Means:
    """Of every feature of some layers, over all tokens with features."""
    total: dict[int, Tensor] = {}
    count = 0
    dictionaries = model.dictionaries
    for rows, without in rows_and_exempt(model, texts):
        at = model.model.activations(rows.tokens, {dictionaries.reads[layer] for layer in layers})
        count += int((~without).sum())
        for layer in layers:
            a = BenchmarkLayer(dictionaries, layer).activations(at[dictionaries.reads[layer]])
            here = a.masked_fill(without[..., None], 0).double().sum((0, 1))
            total[layer] = total[layer] + here if layer in total else here
    return {layer: value / max(1, count) for layer, value in total.items()}


@torch.no_grad()
def coordinates(model: ReplacementModel, layers: Sequence[int], texts: Sequence[str]) -> ReplacementModel:
    """The model with the coordinates of what is written at each layer in the place of features: what neurons are there.

    Each coordinate twice, with either sign, from its mean over the texts on: `x − x̄ = Σ_j relu(x_j − x̄_j) e_j −
    relu(x̄_j − x_j) e_j`. To take one out is to set that side of it to its mean; nothing is left to error nodes.
    """
    sites = {layer: model.dictionaries.writes[layer] for layer in layers}
    total, count = dict.fromkeys(layers, torch.zeros(())), 0
    for rows, without in rows_and_exempt(model, texts):
        at = model.model.activations(rows.tokens, sites.values())
        count += int((~without).sum())
        for layer, site in sites.items():
            total[layer] = total[layer].to(at[site].device) + at[site].masked_fill(without[..., None], 0).sum((0, 1))
    lm = model.model
    kind = model.dictionaries.writes[0].kind
    both = torch.cat([eye := torch.eye(lm.d_model, dtype=lm.dtype, device=lm.device), -eye])
    saes = [
        SAE(
            W_enc=both.T.contiguous(), b_enc=both.new_zeros(len(both)), W_dec=both.clone(),
            b_dec=(total[layer] / max(1, count)).to(both), activation=ReLU(), site=sites[layer], centred=True,
        ).requires_grad_(False)
        if layer in sites
        else SAE.absent(layer, lm.d_model, kind, lm.dtype).to(lm.device)
        for layer in range(lm.n_layers)
    ]  # fmt: skip
    return ReplacementModel(lm, SAESet(saes, like(model.dictionaries, None)), bos=lm.adds_bos)
