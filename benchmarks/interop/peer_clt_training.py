# pyright: reportMissingImports=false
"""EleutherAI's clt-training writes cross-layer transcoders, own and tied decoders, and reads any.

It is a fork of sparsify under the same name, on no package index: PYTHONPATH has to hold a checkout that the user has
made, before the package of sparsify.
"""

import os
from pathlib import Path
from typing import Any

import torch
from peer_truth import D_MODEL, FEATURES, Computed, command, fresh, inputs, weights, write_truth
from safetensors.torch import save_file

os.environ.update(SPARSIFY_DISABLE_TRITON="1", SPARSIFY_NO_COMPILE="1", TORCHDYNAMO_DISABLE="1")

PACKAGE, LAYERS, K = "clt-training", 3, 4
HOOKS = [f"h.{layer}.mlp" for layer in range(LAYERS)]


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features and the outputs that its runner adds up, layer by layer; its decoder is float32 on a CPU."""
    from sparsify import CrossLayerRunner, SparseCoder, sparse_coder

    output = sparse_coder.ForwardOutput  # one of the two places that make it still gives losses it no longer holds
    sparse_coder.ForwardOutput = lambda *given: output(*given[:4], given[-1])
    runner, encoded, decoded = CrossLayerRunner(), [], []
    folders = sorted(folder.name for folder in files.iterdir() if folder.is_dir())
    for layer, hook in enumerate(folders):
        coder = SparseCoder.load_from_disk(files / hook)
        with torch.no_grad():
            middle = runner.encode(x[layer].float(), coder)
            values, indices = middle.latent_acts, middle.latent_indices
            features = torch.zeros(len(values), coder.num_latents)
            encoded.append(features.scatter(-1, indices, values))
            decoded.append(runner.decode(middle, x[layer].float(), hook).sae_out)
    sparse_coder.ForwardOutput = output
    return torch.stack(encoded), torch.stack(decoded)


def _set(given: dict[str, torch.Tensor], state: dict[str, torch.Tensor], name: str) -> None:
    """Our numbers under their names; `W_decs.2` is the decoder for the layer after the next."""
    plain = {"encoder.weight": given["W_enc"].T, "encoder.bias": given["b_enc"]}
    scales = {"in_norm": torch.tensor([4.0]), "out_norm": torch.tensor([1.7])}
    for key, value in state.items():
        stem, _, target = key.partition(".")
        to = weights(f"{name}>{target}") if target.isdigit() else given
        if stem in ("W_decs", "b_decs", "W_skips"):
            value.copy_(to[stem.removesuffix("s")])
        elif stem.startswith("post_enc"):
            value.copy_(to["threshold"] if "scale" in stem else to["b_enc"].abs())
        else:
            value.copy_({**plain, **scales, **given}[key])


def _write(root: Path, variant: str, *, post: bool = False, **options: Any) -> None:
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, utils

    files = fresh(root, variant)
    utils.save_file = lambda state, path: save_file({key: value.clone() for key, value in state.items()}, path)
    for layer, hook in enumerate(HOOKS):
        config = SparseCoderConfig(num_latents=FEATURES, k=K, transcode=True, **options)
        config.n_targets, config.n_sources = LAYERS - layer, layer + 1
        coder = SparseCoder(D_MODEL, config)
        state = {key: value for key, value in coder.state_dict().items() if post or not key.startswith("post_enc")}
        _set(weights(f"{variant}/{layer}"), state, f"{variant}/{layer}")
        coder.save_to_disk(files / hook)
    trained = SparseCoderConfig(num_latents=FEATURES, k=K, transcode=True, **options)
    TrainConfig(trained, hookpoints=HOOKS, cross_layer=LAYERS).save_json(files / "config.json")
    x = inputs(variant, LAYERS)
    write_truth(root, variant, x, read(files, x.double()), PACKAGE, folders=HOOKS, layers=LAYERS)


def write(root: Path) -> None:
    """Own decoders (with skip terms, scales, an affine step after the encoder) and decoders tied per target."""
    _write(root, "cross_layer")
    _write(root, "cross_layer_skip", skip_connection=True, normalize_io=True)
    _write(root, "cross_layer_affine", post=True, post_encoder_scale=True)
    _write(root, "tied", coalesce_topk="concat")
    _write(root, "tied_skip", coalesce_topk="concat", skip_connection=True)


if __name__ == "__main__":
    command(write, read)
