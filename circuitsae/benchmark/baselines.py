"""What dictionaries are compared with: random directions, principal components, and the same dictionary untrained."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitsae.benchmark.layers import BenchmarkLayer
from transcoders.dictionaries import SAE, DictionaryProvenance, DictionarySet, ReLU, SAESet, TopK
from transcoders.training import CLTConfig, SAEConfig, TrainConfig, TranscoderConfig
from transcoders.training.export import export
from transcoders.training.initialise import initial_parameters, measure_scales

_CONFIGS: dict[str, type[TrainConfig]] = {"sae": SAEConfig, "plt": TranscoderConfig, "clt": CLTConfig}


def random_directions(
    layer: BenchmarkLayer, writes: Float[Tensor, "token d_model"], l0: float, seed: int
) -> BenchmarkLayer:
    """As many directions as the layer has features, from a Gaussian, that read and write; the largest L0 of them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(layer.n_features, writes.shape[1], generator=generator).to(writes)
    directions = drawn / drawn.norm(dim=1, keepdim=True)
    return _at(layer, directions, writes, TopK(max(1, min(round(l0), layer.n_features))))


def principal_components(layer: BenchmarkLayer, writes: Float[Tensor, "token d_model"]) -> BenchmarkLayer:
    """Each principal component of the writes twice, with either sign: `x − x̄ = Σ_v relu(v·x) v − relu(−v·x) v`.

    It reconstructs exactly with as many active features as the layer is wide. The first come first.
    """
    _, _, components = torch.linalg.svd(writes.double() - writes.double().mean(dim=0), full_matrices=False)
    both = torch.stack([components, -components], dim=1).flatten(0, 1).to(writes)
    return _at(layer, both, writes, ReLU())


def untrained(
    layer: BenchmarkLayer,
    reads: Float[Tensor, "token layer d_model"],
    writes: Float[Tensor, "token layer d_model"],
    l0: float,
    seed: int,
) -> BenchmarkLayer | None:
    """The dictionaries as training begins them: of the same kind and width, ReLU with biases for the same L0.

    None for sets of several kinds, which training does not begin.
    """
    dictionaries = layer.dictionaries
    if dictionaries.kind not in _CONFIGS:
        return None
    start = max(1.0, min(l0, layer.n_features / 2))
    config = _CONFIGS[dictionaries.kind](features=layer.n_features, activation="relu", start_l0=start, seed=seed)
    scales = measure_scales(reads, writes, config)
    normed = reads * scales.read[:, None], writes * scales.write[:, None]
    weights = initial_parameters(config, *normed)
    built = export(
        weights, dictionaries.kind, scales, dictionaries.reads, dictionaries.writes, like(dictionaries, seed)
    )
    return BenchmarkLayer(built, layer.layer)


def _at(
    layer: BenchmarkLayer, directions: Float[Tensor, "feature d_model"], writes: Tensor, activation: ReLU | TopK
) -> BenchmarkLayer:
    """An autoencoder of centred writes that reads and writes directions, at the layer's own write."""
    n_layers, d_model, write = layer.dictionaries.n_layers, writes.shape[1], layer.write
    saes: Sequence[SAE] = [
        SAE(
            W_enc=directions.T.contiguous(), b_enc=torch.zeros(len(directions)).to(writes), W_dec=directions.clone(),
            b_dec=writes.mean(dim=0), activation=activation, site=write, centred=True,
        ).requires_grad_(False)
        if i == layer.layer
        else SAE.absent(i, d_model, write.kind, writes.dtype).to(writes.device)
        for i in range(n_layers)
    ]  # fmt: skip
    return BenchmarkLayer(SAESet(saes, like(layer.dictionaries, None)), layer.layer)


def like(dictionaries: DictionarySet, seed: int | None) -> DictionaryProvenance:
    """Of the same model and text, so that the same tokens have features."""
    known = dictionaries.provenance
    return DictionaryProvenance(
        model=known.model, frame=known.frame, bos=known.bos, corpus=known.corpus, config=known.config,
        first=known.first, limits=known.limits, seed=seed,
    )  # fmt: skip
