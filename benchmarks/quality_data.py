"""What `quality.py` trains on: activations in files, made once, that all libraries read in the same order.

`synthetic`: sums of a few of 4 d known directions, firing by Zipf's law, plus a little noise. A transcoder's writes are
the same features in directions of their own, a cross-layer one's what the features of its and all earlier layers write.
`tinystories`: a small Llama on English text, without the first position of a row. All have mean square one.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

HELD_OUT = 8192
LAYERS = 2
"""Of a cross-layer transcoder's data: as many as the small Llama has."""
_CHUNK = 8192


def files(folder: Path, data: str, kind: str, d: int, *, model: Path, corpus: Path) -> tuple[Path, Path | None]:
    """Reads, and writes where they are something else; made where they are not there yet."""
    side = {"transcoder": "mlp", "skip": "mlp", "clt": "layers"}.get(kind, "sae")
    names = [folder / f"{data}-{side}-{d}-{way}.npy" for way in (("reads",) if side == "sae" else ("reads", "writes"))]
    if not all(name.exists() for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        make: Callable[[], list[np.ndarray]] = {
            "synthetic": lambda: synthetic(d, side),
            "tinystories": lambda: activations(model, corpus, side),
        }[data]
        for name, array in zip(names, make(), strict=True):
            part = name.with_suffix(".part.npy")
            np.save(part, array)
            part.rename(name)
    return names[0], names[1] if len(names) > 1 else None


def synthetic(d: int, side: str, n: int = 262_144) -> list[np.ndarray]:
    """`[n, d]`, or of layers `[n, layer, d]`."""
    generator = np.random.default_rng(0)
    layers = LAYERS if side == "layers" else 1
    read = [_directions(generator, d) for _ in range(layers)]
    spans = [[_directions(generator, d) for _ in range(layers - layer)] for layer in range(layers)]
    reads, writes = (np.zeros((n, layers, d), dtype=np.float32) for _ in range(2))
    for start in range(0, n, _CHUNK):
        rows = slice(start, start + _CHUNK)
        for layer in range(layers):
            fired = _features(generator, len(reads[rows]), d)
            reads[rows, layer] = fired @ read[layer] + _noise(generator, len(fired), d)
            for offset, directions in enumerate(spans[layer]):
                writes[rows, layer + offset] += fired @ directions
        writes[rows] += _noise(generator, len(reads[rows]) * layers, d).reshape(-1, layers, d)
    sides = [reads] if side == "sae" else [reads, writes]
    return _scaled(sides, side)


def _scaled(sides: list[np.ndarray], side: str) -> list[np.ndarray]:
    """To mean square one, each layer by a factor: not every library does it, and no FVU changes by it."""
    scaled = [
        x / np.sqrt(np.square(x).mean(axis=(0, 2), dtype=np.float64, keepdims=True)).astype(np.float32) for x in sides
    ]
    return scaled if side == "layers" else [x[:, 0] for x in scaled]


def _directions(generator: np.random.Generator, d: int) -> np.ndarray:
    drawn = generator.standard_normal((4 * d, d)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def _features(generator: np.random.Generator, n: int, d: int) -> np.ndarray:
    """About 2 √d / 3 active of 4 d."""
    share = 1 / np.arange(1, 4 * d + 1)
    share *= 2 * np.sqrt(d) / 3 / share.sum()
    fires = generator.random((n, 4 * d), dtype=np.float32) < np.minimum(share, 0.5).astype(np.float32)
    features = np.zeros(fires.shape, dtype=np.float32)
    features[fires] = generator.gamma(4, 0.25, int(fires.sum()))
    return features


def _noise(generator: np.random.Generator, n: int, d: int) -> np.ndarray:
    return 0.05 * generator.standard_normal((n, d), dtype=np.float32) / np.float32(np.sqrt(d))


@torch.no_grad()
def activations(model: Path, corpus: Path, side: str, n: int = 262_144, context: int = 128) -> list[np.ndarray]:
    """`resid_post`, or the MLP's input and output, at the tokens of a text: of the first layer, or of all."""
    from transcoders import load_model
    from transcoders.data.activations import sites_of
    from transcoders.data.tokens import take_rows
    from transcoders.sites import Site

    loaded = load_model(str(model))
    documents = corpus.read_text(encoding="utf-8").split("\n\n")
    rows = take_rows(loaded, documents, rows=-(-n // (context - 1)), context=context)
    layers = range(loaded.n_layers) if side == "layers" else [0]
    kinds = ("resid_post",) if side == "sae" else ("mlp_in", "mlp_out")
    found = []
    for kind in kinds:
        batch = sites_of(loaded, rows, [Site(layer, kind) for layer in layers], [])
        found.append(batch.reads[:n].float().numpy())
    order = np.random.default_rng(0).permutation(len(found[0]))  # so that held-out rows are of all texts
    return _scaled([x[order] for x in found], side)
