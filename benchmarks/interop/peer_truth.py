# pyright: reportMissingImports=false
"""What every script of a peer shares: seeded weights, inputs, and how files with their truth are laid down.

It runs in the peers' environments, so it imports torch and safetensors only.

    <community>/<variant>/files/…            exactly what the peer wrote
    <community>/<variant>/truth.safetensors  x, and the peer's own `encoded` and `decoded`, in float64
    <community>/<variant>/truth.json         what is said of it: site, layer, peer, version, seed
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D_MODEL, FEATURES, TOKENS, SEED = 8, 12, 5, 18
NORMS = (0.3, 1.0, 2.8, 5.0, 9.0)
"""Of the five inputs; √8 ≈ 2.8 is what normalised activations have."""

Computed = tuple[torch.Tensor, torch.Tensor]
Reader = Callable[[Path, torch.Tensor], Computed]


def generator(name: str) -> torch.Generator:
    """One stream of numbers per variant, the same in every environment."""
    return torch.Generator().manual_seed(SEED + sum(ord(c) * (i + 1) for i, c in enumerate(name)))


def normal(source: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers in float32."""
    return torch.randn(*shape, generator=source) * scale


def weights(name: str, d_in: int = D_MODEL, d_out: int = D_MODEL, features: int = FEATURES) -> dict[str, torch.Tensor]:
    """W_enc [d_in, n], b_enc [n], W_dec [n, d_out] of unequal norms, b_dec, threshold [n], W_skip [d_out, d_in]."""
    source = generator(name)
    return {
        "W_enc": normal(source, d_in, features, scale=d_in**-0.5),
        "b_enc": normal(source, features, scale=0.4),
        "W_dec": normal(source, features, d_out, scale=0.4) * torch.linspace(0.5, 2.0, features)[:, None],
        "b_dec": normal(source, d_out, scale=0.3),
        "threshold": 0.05 + normal(source, features, scale=0.3).abs(),
        "W_skip": normal(source, d_out, d_in, scale=0.2),
    }


def inputs(name: str, *lead: int, d_in: int = D_MODEL) -> torch.Tensor:
    """x [*lead, 5, d_in]: norms far from √d_in, and means far from zero."""
    x = normal(generator(name + "/x"), *lead, TOKENS, d_in) + 0.5
    return x / x.norm(dim=-1, keepdim=True) * torch.tensor(NORMS)[:, None]


def fresh(root: Path, variant: str) -> Path:
    """An empty `files` folder of a variant."""
    shutil.rmtree(root / variant, ignore_errors=True)
    files = root / variant / "files"
    files.mkdir(parents=True)
    return files


def write_truth(root: Path, variant: str, x: torch.Tensor, computed: Computed, package: str, **facts: Any) -> None:
    """truth.safetensors and truth.json beside the files; facts that are tensors go to the first.

    Refuses a truth in which nothing or everything is active.
    """
    tensors = {key: facts.pop(key).double() for key in list(facts) if isinstance(facts[key], torch.Tensor)}
    encoded, decoded = (tensor.detach().double().contiguous() for tensor in computed)
    active = float((encoded != 0).double().mean())
    if not (0.05 < active < 0.95 and torch.isfinite(decoded).all()):
        raise ValueError(f"{variant}: {active:.0%} of the features are active; this truth would test little.")
    save_file(
        {"x": x.double(), "encoded": encoded, "decoded": decoded, **tensors}, root / variant / "truth.safetensors"
    )
    said = {
        "peer": package,
        "version": os.environ.get("PEER_VERSION") or version(package),
        "seed": SEED,
        "active": round(active, 3),
        **facts,
    }
    (root / variant / "truth.json").write_text(json.dumps(said, indent=1) + "\n")


def only(files: Path, marker: str) -> Path:
    """The folder that holds `marker`: `files`, or the one folder below it that does."""
    found = sorted(files.rglob(marker))
    if len(found) != 1:
        raise ValueError(f"{files} holds {len(found)} files {marker}; expected one.")
    return found[0].parent


def answer(root: Path, read: Reader) -> None:
    """Writes answer.safetensors beside each `<variant>/files` and x.safetensors, or error.txt with what was raised."""
    for place in sorted(path.parent for path in root.glob("*/x.safetensors")):
        x = load_file(place / "x.safetensors")["x"].double()
        try:
            encoded, decoded = (tensor.detach().double().contiguous() for tensor in read(place / "files", x))
        except Exception as error:  # a peer may raise anything at files it does not know
            (place / "error.txt").write_text(f"{type(error).__name__}: {error}")
        else:
            save_file({"encoded": encoded, "decoded": decoded}, place / "answer.safetensors")


def command(write: Callable[[Path], None], read: Reader) -> None:
    """`SCRIPT write ROOT` writes every variant; `SCRIPT answer ROOT` encodes and decodes with files of anybody."""
    match sys.argv[1:]:
        case ["write", root]:
            write(Path(root))
        case ["answer", root]:
            answer(Path(root), read)
        case other:
            raise SystemExit(f"write ROOT, or answer ROOT; got {other}.")
