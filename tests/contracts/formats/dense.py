"""What the tests of formats share: sets against dense float64 truths, on a model, on the hub, and of files of peers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import NodeKind
from circuitsae.replacement import ReplacementModel
from transcoders import list_dictionaries, load_dictionaries
from transcoders.dictionaries import DictionarySet, SAESet, SparseDictionary, TranscoderSet
from transcoders.random_models import Family, random_model

GOLDEN = Path(__file__).resolve().parents[2] / "golden/dictionaries"


class Draw:
    """Seeded float32 tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator)


def load64(path, **choice) -> DictionarySet:
    return load_dictionaries(path, dtype=torch.float64, **choice)


def inputs(n_layers: int, d_model: int) -> Tensor:
    return Draw(99)(n_layers, 6, d_model).double()


def dense(dictionaries: DictionarySet, reads: Tensor) -> list[Tensor]:
    """Activations of each layer."""
    features = dictionaries.encode(reads)
    made = [reads.new_zeros(reads.shape[1], dictionaries.n_features(i)) for i in range(dictionaries.n_layers)]
    for (layer, pos, feature), value in zip(features.index.tolist(), features.value, strict=True):
        made[layer][pos, feature] = value
    return made


def assert_is(dictionaries: DictionarySet, reads: Tensor, encoded, decoded, tolerance: float = 1e-12) -> None:
    """The set has these activations and reconstructions, `[layer][pos, …]`, of which some are on."""
    active = torch.cat([layer.flatten() for layer in encoded]) > 0
    assert 0.05 < active.double().mean() < 0.95
    for found, expected in zip(dense(dictionaries, reads), encoded, strict=True):
        torch.testing.assert_close(found, expected.double(), atol=tolerance, rtol=0)
    written = dictionaries.reconstruct(dictionaries.encode(reads), reads)
    torch.testing.assert_close(written, torch.stack(list(decoded)).double(), atol=tolerance, rtol=0)


def assert_equal(found: DictionarySet, expected: DictionarySet, tolerance: float = 1e-12) -> None:
    """Both sets read, write, encode and reconstruct the same."""
    assert (found.kind, found.reads, found.writes) == (expected.kind, expected.reads, expected.writes)
    reads = inputs(expected.n_layers, expected.d_model)
    written = expected.reconstruct(expected.encode(reads), reads)
    assert_is(found, reads, dense(expected, reads), written, tolerance)


def assert_attributes(dictionaries: DictionarySet, family: Family) -> None:
    """The graph of a matching random model sums up to the pre-activations."""
    model = random_model(
        family, n_layers=dictionaries.n_layers, d_model=dictionaries.d_model, n_heads=2, d_vocab=40, dtype=torch.float64
    )
    replacement = ReplacementModel(model, dictionaries)
    graph = attribute(replacement, torch.tensor([0, 11, 22, 33, 11]), targets=LogitTargets([3, 5]))
    assert sum(str(node.kind).lower().endswith("feature") for node in graph.nodes) > 3
    size = max(abs(node.pre_activation) for node in graph.nodes if node.is_target)
    assert abs(graph.residual()).max() <= 1e-9 * size


def assert_derivatives(dictionaries: DictionarySet, family: Family) -> None:
    """What all nodes of a site give a logit is what scaling the site does to it, with later sites held."""
    tokens, n_layers = torch.tensor([0, 11, 22, 33, 11]), dictionaries.n_layers
    sizes = {"n_layers": n_layers, "d_model": dictionaries.d_model, "n_heads": 2, "d_vocab": 40}
    model = ReplacementModel(random_model(family, **sizes, dtype=torch.float64), dictionaries)
    graph, clean = attribute(model, tokens, targets=LogitTargets([3])), model.trace(tokens).frozen.writes.mlp_out
    row = graph.weights.toarray()[[node.kind is NodeKind.LOGIT for node in graph.nodes]][0]
    assert graph.mask(NodeKind.FEATURE).sum() > 3

    @torch.no_grad()
    def logit(scaled: int, factor: float) -> float:
        edits = {}
        for layer in model.written:
            value = clean[layer] * (factor if layer == scaled else 1.0)
            edits |= model.model.writing(dictionaries.writes[layer], lambda _, value=value: value[None])
        logits = model.model.run_hooked(tokens[None], write=edits)[0][0, -1]
        return float(logits[3] - logits.mean())

    for layer in model.written:
        there = [node.layer == layer for node in graph.nodes]
        expected = (logit(layer, 1 + 1e-5) - logit(layer, 1 - 1e-5)) / 2e-5
        assert abs(row[there].sum() - expected) <= 1e-6 * abs(row).max()


def golden(community: str, pattern: str = "*") -> list[Path]:
    """The folders of variants that a peer wrote."""
    return [path.parent for path in sorted((GOLDEN / community).glob(f"{pattern}/truth.json"))]


def assert_golden(variant: Path, files: Path | None = None, **choice) -> DictionarySet:
    """The peer's files have the activations and reconstructions that it says, of all layers or of the last alone.

    Where the files do not say what they read, nothing hangs on it.
    """
    truth, folder = load_file(variant / "truth.safetensors"), files or variant / "files"
    _, offers = list_dictionaries(folder)
    unsaid = {"site": ("site", "resid_post"), "layer": ("layers", 0)}
    loaded = load64(folder, **(dict(unsaid[name] for name in offers[0].asks) | choice))
    if truth["encoded"].ndim == 3:
        assert_is(loaded, *(truth[name].double() for name in ("x", "encoded", "decoded")), tolerance=1e-5)
    else:
        assert isinstance(loaded, SAESet | TranscoderSet)
        assert_maps(loaded.layers[-1], truth)
    return loaded


def assert_maps(dictionary: SparseDictionary, truth: dict[str, Tensor], decoded: Tensor | None = None) -> None:
    """One dictionary has the activations and reconstructions that a peer says; `decoded`: in place of the latter."""
    x, encoded, said = (truth[name].double().flatten(1) for name in ("x", "encoded", "decoded"))
    torch.testing.assert_close(dictionary.encode(x), encoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary(x), said if decoded is None else decoded, atol=1e-5, rtol=1e-5)


def golden_settings(variant: Path) -> dict:
    return json.loads((variant / "truth.json").read_text())
