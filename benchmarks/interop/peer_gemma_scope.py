# pyright: reportMissingImports=false
"""Gemma Scope 1 and 2: files with the names and shapes that Google published, read by SAELens.

No package writes these; SAELens has a loader for each. It downloads, so the download is answered from the folder.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_truth import D_MODEL, FEATURES, Computed, command, fresh, inputs, weights, write_truth
from safetensors.torch import load_file, save_file

PACKAGE = "sae-lens"
ONE = {
    "one_residual": ("google/gemma-scope-2b-pt-res", "layer_1/width_16k/average_l0_102"),
    "one_mlp": ("google/gemma-scope-2b-pt-mlp", "layer_2/width_16k/average_l0_83"),
    "one_attention": ("google/gemma-scope-2b-pt-att", "layer_0/width_16k/average_l0_29"),
    "one_embedding": ("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_21"),
    "one_transcoder": ("google/gemma-scope-2b-pt-transcoders", "layer_1/width_16k/average_l0_65"),
}
TWO = {
    "two_residual": ("google/gemma-scope-2-1b-pt", "resid_post/layer_7_width_16k_l0_medium"),
    "two_attention": ("google/gemma-scope-2-1b-it", "attn_out_all/layer_3_width_16k_l0_small"),
    "two_mlp": ("google/gemma-scope-2-270m-pt", "mlp_out/layer_5_width_16k_l0_big"),
    "two_transcoder": ("google/gemma-scope-2-1b-pt", "transcoder_all/layer_2_width_16k_l0_small"),
    "two_transcoder_affine": ("google/gemma-scope-2-1b-it", "transcoder/layer_2_width_16k_l0_big_affine"),
}
HOOKS = {"resid": "{}.output", "attn": "{}.self_attn.o_proj.input", "mlp": "{}.post_feedforward_layernorm.output"}
HOOKS["trans"] = "{}.pre_feedforward_layernorm.output"


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features and reconstruction by SAELens' loader of the repository that truth.json names beside the files."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.registry import get_sae_class

    (path,) = files.rglob("params.*")
    said = json.loads((files.parent / "truth.json").read_text())
    repository, inside = said["repository"], said["folder"]

    def local(repo_id: str, filename: str, **_: Any) -> str:
        return str(path.parent / Path(filename).name)

    loaders.hf_hub_download = local
    loaders.get_safetensors_tensor_shapes = lambda *_: {
        key: list(value.shape) for key, value in load_file(path).items()
    }
    sizes: dict[str, Any] = {"dtype": "float32"}
    if path.suffix == ".npz":  # its widths are those of the real Gemma 2
        sizes |= {"d_in": D_MODEL, "d_sae": FEATURES}
        load = loaders.gemma_2_transcoder_huggingface_loader if "transcoder" in repository else None
        load = load or loaders.gemma_2_sae_huggingface_loader
        sizes |= {"d_out": D_MODEL} if "transcoder" in repository else {}
    else:
        load = loaders.gemma_3_sae_huggingface_loader
    config, state, _ = load(repository, inside, cfg_overrides=sizes)
    config = loaders.handle_config_defaulting(config)
    kind, settings = get_sae_class(config["architecture"])
    made = kind(settings.from_dict(config))
    made.load_state_dict(state)
    made = made.to(dtype=torch.float64)
    heads = x.unflatten(-1, (2, -1)) if made.cfg.reshape_activations == "hook_z" else x
    with torch.no_grad():
        return made.encode(heads), made(heads).reshape(x.shape)


def _one(root: Path, variant: str) -> None:
    repository, folder = ONE[variant]
    files = fresh(root, variant)
    given: dict[str, Any] = {key: value.numpy() for key, value in weights(variant).items() if key != "W_skip"}
    (files / repository / folder).mkdir(parents=True)
    np.savez(files / repository / folder / "params.npz", **given)
    _finish(root, variant, repository, folder)


def _two(root: Path, variant: str) -> None:
    repository, folder = TWO[variant]
    files = fresh(root, variant)
    place = files / repository / folder
    place.mkdir(parents=True)
    given = weights(variant)
    named = {"w_enc": given["W_enc"], "w_dec": given["W_dec"]}
    named |= {key: given[key] for key in ("b_enc", "b_dec", "threshold")}
    affine = folder.endswith("_affine")
    if affine:
        named["affine_skip_connection"] = given["W_skip"].T.contiguous()
    save_file(named, place / "params.safetensors")
    layer = folder.split("layer_")[1].split("_")[0]
    hook = next(text for start, text in HOOKS.items() if folder.startswith(start))
    said: dict[str, Any] = {"architecture": "jump_relu", "width": FEATURES, "l0": 5}
    said |= {"model_name": repository.replace("gemma-scope-2", "gemma-3").removeprefix("google/")}
    said |= {"hf_hook_point_in": hook.format(f"model.layers.{layer}")}
    if folder.startswith("trans"):
        out = f"model.layers.{layer}.post_feedforward_layernorm.output"
        said |= {"hf_hook_point_out": out, "affine_connection": affine}
    (place / "config.json").write_text(json.dumps(said, indent=2))
    _finish(root, variant, repository, folder)


def _finish(root: Path, variant: str, repository: str, folder: str) -> None:
    x = inputs(variant)
    names = {"repository": repository, "folder": folder}
    if variant == "one_embedding":
        names["departs"] = "SAELens multiplies W_dec by √d, as the embedding is, but not b_dec; here both are"
    (root / variant / "truth.json").write_text(json.dumps(names))
    write_truth(root, variant, x, read(root / variant / "files", x.double()), PACKAGE, **names)


def write(root: Path) -> None:
    """An autoencoder of each site and transcoders, of both generations."""
    for variant in ONE:
        _one(root, variant)
    for variant in TWO:
        _two(root, variant)


if __name__ == "__main__":
    command(write, read)
