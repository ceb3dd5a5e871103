"""Encode and decode with a peer and with this package, and say by how much they differ.

    python -m benchmarks.interop.compare PEER FOLDER

FOLDER holds dictionaries in the peer's layout, whoever wrote them; exit code 1 where a number differs by more than
1e-5, relative to the largest.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import huggingface_hub.constants as hub
import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from tyro.conf import Positional

from benchmarks.interop.environments import Peer, with_checkouts
from transcoders import load_dictionaries
from transcoders.dictionaries import DictionarySet

TOLERANCE = 1e-5


class Answer(NamedTuple):
    """Of one side: features and reconstruction, layer first where there are several."""

    encoded: Tensor
    decoded: Tensor

    def difference(self, other: "Answer") -> float:
        """The largest, relative to the largest number; infinite where shapes or active features differ."""
        parts = list(zip(self, other, strict=True))
        if any(a.shape != b.shape for a, b in parts):
            return float("inf")
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in parts)


def present(dictionaries: DictionarySet) -> list[int]:
    """The layers that have features."""
    return [layer for layer in range(dictionaries.n_layers) if dictionaries.n_features(layer)]


def ours(dictionaries: DictionarySet, x: Tensor, *, layered: bool) -> Answer:
    """What this package computes; x as the peer takes it, `[layer, token, d]`, or without layers for one dictionary."""
    layers = present(dictionaries)
    given = x if layered else x.flatten(1)[None]
    reads = given.new_zeros(dictionaries.n_layers, given.shape[1], given.shape[2])
    reads[layers] = given
    features = dictionaries.encode(reads)
    width = max(dictionaries.n_features(layer) for layer in layers)
    dense = given.new_zeros(dictionaries.n_layers, given.shape[1], width)
    dense[tuple(features.index.T)] = features.value
    decoded = dictionaries.reconstruct(features, reads)[layers]
    return Answer(dense[layers], decoded) if layered else Answer(dense[layers[0]], decoded[0].reshape(x.shape))


def theirs(peer: Peer, folders: dict[str, tuple[Path, Tensor]]) -> dict[str, Answer | str]:
    """What a peer computes from folders at inputs, by name; where it raises, what it said."""
    with TemporaryDirectory() as temporary:
        for name, (folder, x) in folders.items():
            place = Path(temporary) / name
            shutil.copytree(folder, place / "files")
            if (others := folder.parent / "others").is_dir():
                shutil.copytree(others, place / "others")
            if (said := folder.parent / "truth.json").is_file():
                shutil.copy(said, place)
            save_file({"x": x.contiguous()}, place / "x.safetensors")
        peer.run("answer", temporary)
        return {name: _answer(Path(temporary) / name) for name in folders}


def _answer(place: Path) -> Answer | str:
    if (place / "error.txt").exists():
        return (place / "error.txt").read_text()
    tensors = load_file(place / "answer.safetensors")
    return Answer(tensors["encoded"], tensors["decoded"])


@contextmanager
def hub_of(others: Path) -> Iterator[None]:
    """Repositories `<owner>--<name>@<revision>/` as the hub's own cache has them, and no network."""
    before: dict[str, Any] = {name: getattr(hub, name) for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE")}
    with TemporaryDirectory() as cache:
        for number, repository in enumerate(sorted(others.iterdir()) if others.is_dir() else ()):
            name, _, revision = repository.name.rpartition("@")
            commit = f"{number:040x}"
            place = Path(cache) / f"models--{name}"
            shutil.copytree(repository, place / "snapshots" / commit)
            (place / "refs").mkdir()
            (place / "refs" / revision).write_text(commit)
        hub.HF_HUB_CACHE, hub.HF_HUB_OFFLINE = cache, True
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(hub, name, value)


@dataclass
class Options:
    """What to compare."""

    peer: Positional[str]
    """A name of environments.PEERS or FROM_CHECKOUTS."""
    folder: Positional[Path]
    checkouts: list[str] = field(default_factory=list)
    """`NAME@VERSION=FOLDER` of peers that are on no package index."""
    site: str | None = None
    """Where the folder does not say which site is read."""
    layer: int | None = None
    """Where the folder does not say which layer is read."""


def main(options: Options) -> None:
    peers = with_checkouts(options.checkouts)
    if options.peer not in peers:
        raise SystemExit(f"There is no peer {options.peer!r} that can be run; there are {', '.join(peers)}.")
    dictionaries = load_dictionaries(options.folder, dtype="float64", site=options.site, layers=options.layer)
    layers = present(dictionaries)
    layered = len(layers) > 1
    shape = (len(layers), 5, dictionaries.d_model) if layered else (5, dictionaries.d_model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answer = theirs(peers[options.peer], {"it": (options.folder, x)})["it"]
    if isinstance(answer, str):
        raise SystemExit(f"{options.peer} does not read {options.folder}: {answer}")
    difference = ours(dictionaries, x, layered=layered).difference(answer)
    print(f"{options.peer} and circuitsae differ by {difference:.1e} at {options.folder}")
    sys.exit(difference > TOLERANCE)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
