# pyright: reportMissingImports=false
"""sparsify writes SAEs and transcoders, one and in sets of layers, and reads any. Run by `run.py`."""

import os
from pathlib import Path
from typing import Any

import torch
from peer_truth import D_MODEL, FEATURES, Computed, command, fresh, inputs, only, weights, write_truth

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel wants a GPU

PACKAGE, LAYERS, K = "eai-sparsify", 3, 4


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features and reconstruction of one folder, or of a folder of `layers.N…` (then x has layers in front)."""
    from sparsify import SparseCoder

    if x.ndim == 2:
        return _compute(SparseCoder.load_from_disk(only(files, "cfg.json")), x)
    coders = SparseCoder.load_many(str(files), local=True)
    one_by_one = [_compute(coder, x[i]) for i, coder in enumerate(coders.values())]
    encoded, decoded = zip(*one_by_one, strict=True)
    return torch.stack(encoded), torch.stack(decoded)


def _compute(coder: Any, x: torch.Tensor) -> Computed:
    coder = coder.double()
    with torch.no_grad():
        values, indices, _ = coder.encode(x)
        decoded = coder(x).sae_out
    return torch.zeros(*x.shape[:-1], coder.num_latents, dtype=x.dtype).scatter(-1, indices, values), decoded


def _coder(name: str, **options: Any) -> Any:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D_MODEL, SparseCoderConfig(num_latents=FEATURES, k=K, **options))
    given = weights(name)
    coder.encoder.weight.data = given["W_enc"].T.contiguous()
    coder.encoder.bias.data = given["b_enc"]
    coder.W_dec.data, coder.b_dec.data = given["W_dec"], given["b_dec"]
    if coder.W_skip is not None:
        coder.W_skip.data = given["W_skip"]
    return coder


def _one(root: Path, variant: str, **options: Any) -> None:
    files = fresh(root, variant)
    _coder(variant, **options).save_to_disk(files)
    x = inputs(variant)
    site = "mlp_in" if options.get("transcode") else "resid_post"  # the folder's name would say it
    write_truth(root, variant, x, read(files, x.double()), PACKAGE, folders=["."], site=site, layer=0)


def _many(root: Path, variant: str, name: str, **options: Any) -> None:
    """The folder that its trainer leaves: one folder per hookpoint beside the configuration of the training."""
    from sparsify import SparseCoderConfig, TrainConfig

    files = fresh(root, variant)
    hooks = [name.format(layer) for layer in range(LAYERS)]
    for hook in hooks:
        _coder(f"{variant}/{hook}", **options).save_to_disk(files / hook)
    trained = SparseCoderConfig(num_latents=FEATURES, k=K, **options)
    TrainConfig(trained, hookpoints=hooks).save_json(files / "config.json")
    x = inputs(variant, LAYERS)
    write_truth(root, variant, x, read(files, x.double()), PACKAGE, folders=hooks)


def write(root: Path) -> None:
    """Every variant."""
    for activation in ("topk", "groupmax"):
        _one(root, f"sae_{activation}", activation=activation)
        _one(root, f"transcoder_{activation}", activation=activation, transcode=True)
        _one(root, f"skip_transcoder_{activation}", activation=activation, transcode=True, skip_connection=True)
    _one(root, "skip_sae", skip_connection=True)
    _many(root, "layers_sae", "layers.{}")
    _many(root, "layers_sae_gpt2", "h.{}")
    _many(root, "layers_transcoder", "layers.{}.mlp", transcode=True)
    _many(root, "layers_skip_transcoder", "layers.{}.mlp", transcode=True, skip_connection=True)


if __name__ == "__main__":
    command(write, read)
