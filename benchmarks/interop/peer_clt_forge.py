# pyright: reportMissingImports=false
"""CLT-Forge writes cross-layer transcoders with their scales, whole and in shards, and reads any.

It is on no package index: PYTHONPATH has to hold the `src` of a checkout that the user has made.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peer_truth import D_MODEL, FEATURES, Computed, command, fresh, generator, inputs, weights, write_truth

PACKAGE, LAYERS, SHARDS = "clt-forge", 3, 2


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features and reconstruction in the units of the model: its scales are applied before and undone after."""
    from clt_forge.clt import CLT

    made = CLT.load_from_pretrained(files).double()
    scale_in, scale_out = (
        getattr(made, f"estimated_norm_scaling_factor_{way}").view(1, -1, 1) for way in ("in", "out")
    )
    with torch.no_grad():
        encoded, _ = made.encode(x.transpose(0, 1) * scale_in)
        decoded = made.decode(encoded) / scale_out
    return encoded.transpose(0, 1), decoded.transpose(0, 1)


def _made(name: str, *, across: bool, shards: bool = False, width: int = FEATURES) -> Any:
    from clt_forge.clt import CLT
    from clt_forge.config import CLTConfig

    sizes: dict[str, Any] = {"d_in": D_MODEL, "d_latent": FEATURES, "n_layers": LAYERS, "context_size": 16}
    training: dict[str, Any] = {"jumprelu_bandwidth": 1.0, "jumprelu_init_threshold": 0.03, "l0_coefficient": 1.0}
    training |= {"normalize_decoder": False, "dead_feature_window": 250, "seed": 1}
    common: dict[str, Any] = {"device": "cpu", "dtype": "float32", "model_name": "gpt2"}
    config = CLTConfig(**sizes, **training, **common, cross_layer_decoders=across, feature_sharding=shards)
    return CLT(config, rank=0, world_size=FEATURES // width)


def _numbers(name: str, *, across: bool) -> dict[str, torch.Tensor]:
    """Decoders in the order (0,0) (0,1) (0,2) (1,1) …: of a source layer to every target from it on."""
    layers = range(LAYERS)
    pairs = [(i, j) for i in layers for j in layers if (j >= i if across else j == i)]
    each = [weights(f"{name}/{i}") for i in layers]
    to = [weights(f"{name}/{i}>{j}") for i, j in pairs]
    source = generator(name + "/scales")
    return {
        "W_enc": torch.stack([given["W_enc"] for given in each]),
        "b_enc": torch.stack([given["b_enc"] for given in each]),
        "log_threshold": torch.stack([given["threshold"] for given in each]).log(),
        "W_dec": torch.stack([given["W_dec"] for given in to]),
        "b_dec": torch.stack([given["b_dec"] for given in to]),
        "estimated_norm_scaling_factor_in": 0.5 + torch.rand(LAYERS, generator=source),
        "estimated_norm_scaling_factor_out": 1.5 + torch.rand(LAYERS, generator=source),
    }


def _fill(made: Any, numbers: dict[str, torch.Tensor], columns: slice) -> None:
    state = dict(made.named_parameters()) | dict(made.named_buffers())
    features = {"W_enc": 2, "b_enc": 1, "log_threshold": 1, "W_dec": 1}
    for key, value in numbers.items():
        whole = value.movedim(features[key], 0)[columns].movedim(0, features[key]) if key in features else value
        state[key].data.copy_(whole)


def _whole(root: Path, variant: str, *, across: bool) -> None:
    files = fresh(root, variant)
    made = _made(variant, across=across)
    _fill(made, _numbers(variant, across=across), slice(None))
    made.save_model(str(files))
    _finish(root, variant, files)


def _sharded(root: Path, variant: str) -> None:
    """A file for each device that trained it.

    This version's loader refuses its own shards (`feature_count` is missing), so the truth is of the same numbers in
    one file.
    """
    files = fresh(root, variant)
    width = FEATURES // SHARDS
    for rank in range(SHARDS):
        made = _made(variant, across=True, shards=True, width=width)
        _fill(made, _numbers(variant, across=True), slice(rank * width, (rank + 1) * width))
        made.save_model(str(files), save_cfg=rank == 0, rank=rank)
    whole = _made(variant, across=True)
    _fill(whole, _numbers(variant, across=True), slice(None))
    with TemporaryDirectory() as one:
        whole.save_model(one)
        _finish(root, variant, Path(one), note="CLT-Forge's loader refuses its own shards; its truth is of one file.")


def _finish(root: Path, variant: str, files: Path, **more: str) -> None:
    x = inputs(variant, LAYERS)
    hooks = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    write_truth(root, variant, x, read(files, x.double()), PACKAGE, layers=LAYERS, **hooks, **more)


def write(root: Path) -> None:
    """Across layers, per layer, and across layers in two shards."""
    _whole(root, "cross_layer", across=True)
    _whole(root, "per_layer", across=False)
    _sharded(root, "sharded")


if __name__ == "__main__":
    command(write, read)
