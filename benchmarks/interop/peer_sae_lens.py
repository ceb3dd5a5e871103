# pyright: reportMissingImports=false
"""SAELens writes every kind it knows, and reads any folder of its layout. Run by `run.py`."""

import json
from pathlib import Path
from typing import Any

import torch
from peer_truth import D_MODEL, FEATURES, Computed, command, fresh, inputs, only, weights, write_truth
from safetensors.torch import save_file

PACKAGE, LAYER = "sae-lens", 1
RESID, MLP_IN, MLP_OUT = "blocks.1.hook_resid_pre", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
K = 5


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features and reconstruction by SAELens' own loader, computed in float64."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(only(files, "cfg.json"), dtype="float64")
    with torch.no_grad():
        return sae.encode(x), sae(x)


def _metadata(hook: str, out: str | None = None) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    said = {"model_name": "gpt2", "hook_name": hook, "context_size": 16, "prepend_bos": True}
    return SAEMetadata(**said, **({"hook_name_out": out} if out else {}))


def _fill(sae: Any, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in sae.named_parameters():
        parameter.data.copy_(tensors[name])


def _gated(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """b_gate and b_mag differ, so that a feature can pass one and not the other."""
    r_mag = 0.5 * tensors["threshold"] - 0.2
    return {**tensors, "b_gate": tensors["b_enc"], "b_mag": tensors["b_enc"].flip(0), "r_mag": r_mag}


def _finish(root: Path, variant: str, hook: str, out: str | None = None) -> None:
    x = inputs(variant)
    if hook.endswith("hook_z"):
        x = x.unflatten(-1, (2, D_MODEL // 2))
    said = {"hook_name": hook, "layer": LAYER, **({"hook_name_out": out} if out else {})}
    write_truth(root, variant, x, read(root / variant / "files", x.double()), PACKAGE, **said)


def _inference(root: Path, variant: str, architecture: str, hook: str, out: str | None = None, **options: Any) -> None:
    """One dictionary of a class that infers, as `save_model` leaves it."""
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(architecture)
    sizes = {"d_in": D_MODEL, "d_sae": FEATURES, **({"d_out": D_MODEL, "apply_b_dec_to_input": False} if out else {})}
    sae = kind(config(**sizes, metadata=_metadata(hook, out), **options))
    _fill(sae, _gated(weights(variant)))
    sae.save_model(fresh(root, variant))
    _finish(root, variant, hook, out)


def _trained(root: Path, variant: str, architecture: str, **options: Any) -> None:
    """One dictionary of a class that trains, as `save_inference_model` leaves it: BatchTopK becomes JumpReLU."""
    from sae_lens.registry import get_sae_training_class

    kind, config = get_sae_training_class(architecture)
    sae = kind(config(d_in=D_MODEL, d_sae=FEATURES, k=K, metadata=_metadata(RESID), **options))
    _fill(sae, weights(variant))
    if architecture != "topk":
        sae.topk_threshold.fill_(0.35)
    sae.save_inference_model(fresh(root, variant))
    _finish(root, variant, RESID)


def _older(root: Path, variant: str, names: list[str], hook: str, extra: dict[str, Any], *, ones: bool = False) -> None:
    """A folder with the keys of versions 2 to 5, by hand; the present version reads it, and its answer is the truth."""
    tensors = {name: _gated(weights(variant))[name].contiguous() for name in names}
    if ones:  # versions 2 and 3 saved one even where nothing was fine-tuned
        tensors["scaling_factor"] = torch.ones(FEATURES)
    files = fresh(root, variant)
    save_file(tensors, files / "sae_weights.safetensors")
    base = {"model_name": "gpt2", "d_in": D_MODEL, "d_sae": FEATURES, "dtype": "torch.float32", "device": "cpu"}
    base |= {"dataset_path": "Skylion007/openwebtext", "context_size": 128, "prepend_bos": True}
    (files / "cfg.json").write_text(json.dumps({**base, **extra}))
    _finish(root, variant, hook)


def write(root: Path) -> None:
    """Every variant."""
    for given, name in ((True, "input_b_dec"), (False, "no_input_b_dec")):
        for kind in ("standard", "gated", "jumprelu"):
            _inference(root, f"{kind}_{name}", kind, RESID, apply_b_dec_to_input=given)
        _inference(root, f"topk_{name}", "topk", "blocks.1.hook_out", apply_b_dec_to_input=given, k=K)
    _inference(root, "standard_expected_average", "standard", RESID, normalize_activations="expected_average_only_in")
    for normalised in ("constant_norm_rescale", "layer_norm"):
        for kind in ("standard", "gated", "jumprelu"):
            _inference(root, f"{kind}_{normalised}", kind, RESID, normalize_activations=normalised)
        _inference(root, f"topk_{normalised}", "topk", RESID, normalize_activations=normalised, k=K)
        for kind in ("transcoder", "jumprelu_skip_transcoder"):
            _inference(root, f"{kind}_{normalised}", kind, MLP_IN, MLP_OUT, normalize_activations=normalised)
    _inference(root, "topk_decoder_norm", "topk", RESID, k=K, rescale_acts_by_decoder_norm=True)
    heads: dict[str, dict[str, Any]] = {"standard": {}, "jumprelu": {}, "topk": {"k": K}}
    for kind, options in heads.items():
        _inference(root, f"{kind}_hook_z", kind, "blocks.1.attn.hook_z", reshape_activations="hook_z", **options)
    for kind in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        _inference(root, kind, kind, MLP_IN, MLP_OUT)
    bridge = "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"
    _inference(root, "jumprelu_transcoder_bridge", "jumprelu_transcoder", *bridge)
    _inference(root, "standard_bfloat16", "standard", "blocks.1.hook_resid_post", dtype="bfloat16")
    _inference(root, "abstopk", "abstopk", RESID, k=K)
    for given in (True, False):
        name = "decoder_norm" if given else "plain"
        _trained(root, f"trained_topk_{name}", "topk", rescale_acts_by_decoder_norm=given)
        _trained(root, f"trained_batchtopk_{name}", "batchtopk", rescale_acts_by_decoder_norm=given)
        widths = {"matryoshka_widths": [4, 8, FEATURES]}
        _trained(
            root, f"trained_matryoshka_{name}", "matryoshka_batchtopk", rescale_acts_by_decoder_norm=given, **widths
        )
    _write_older(root)


def _write_older(root: Path) -> None:
    plain = ["W_enc", "b_enc", "W_dec", "b_dec"]
    gated = ["W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"]
    point = {"hook_point": RESID, "hook_point_layer": LAYER, "hook_point_head_index": None}
    name = {"hook_name": RESID, "hook_layer": LAYER, "hook_head_index": None}
    z_name = {**name, "hook_name": "blocks.1.attn.hook_z"}
    relu = {"activation_fn_str": "relu", "finetuning_scaling_factor": False, "sae_lens_training_version": "3.20.0"}
    _older(root, "older_hook_point", plain, RESID, {**point, "normalize_activations": False}, ones=True)
    _older(root, "older_normalise_true", plain, RESID, {**point, "normalize_activations": True})
    _older(
        root, "older_relu", plain, RESID, {**name, **relu, "architecture": "standard", "normalize_activations": "none"}
    )
    _older(root, "older_no_input_b_dec", plain, RESID, {**name, **relu, "apply_b_dec_to_input": False})
    _older(root, "older_layer_norm", plain, RESID, {**name, **relu, "normalize_activations": "layer_norm"})
    _older(root, "older_hook_z", plain, "blocks.1.attn.hook_z", {**z_name, **relu})
    _older(root, "older_gated", gated, RESID, {**name, **relu, "architecture": "gated"})
    _older(root, "older_jumprelu", [*plain, "threshold"], RESID, {**name, **relu, "architecture": "jumprelu"})
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"}
    _older(root, "older_topk", plain, RESID, {**name, **topk})


if __name__ == "__main__":
    command(write, read)
