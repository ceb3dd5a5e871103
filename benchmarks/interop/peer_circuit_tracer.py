# pyright: reportMissingImports=false
"""circuit-tracer writes sets of transcoders and cross-layer transcoders, and reads any. Run by `run.py`.

The package writes weights and no configuration, so config.yaml is by hand, with the keys its loader asks for. Files
that a `transcoders` list names in other repositories lie in `others/<owner>--<name>@<revision>/` beside `files`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peer_truth import D_MODEL, FEATURES, TOKENS, Computed, command, fresh, inputs, weights, write_truth
from safetensors.torch import save_file

PACKAGE, LAYERS = "circuit-tracer", 3
LISTED = {"alice/first": "main", "bob/second": "v1.5"}


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features and reconstruction [layer, position, …] by its loaders; entries with `hf://` come from `others`."""
    dictionaries = load(files, torch.float64).double()  # it leaves a skip term of Gemma Scope 2 as it is
    with torch.no_grad():
        encoded = dictionaries.encode(x)
        return encoded, dictionaries.decode(encoded, x)


def load(files: Path, dtype: torch.dtype) -> Any:
    """What `load_transcoders` does, but from a folder instead of from a repository."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt, load_gemma_scope_2_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    config = yaml.safe_load((files / "config.yaml").read_text())
    hooks = {key: config[key] for key in ("feature_input_hook", "feature_output_hook")}
    options: dict[str, Any] = {**hooks, "scan": config.get("scan"), "device": torch.device("cpu"), "dtype": dtype}
    layout = _layout(config)
    if config["model_kind"] == "cross_layer_transcoder":
        if layout == "gemma-scope-2":
            paths = _paths(files, config)
            return load_gemma_scope_2_clt({**paths, len(paths): ""}, **options)  # this version drops the last of them
        return load_clt(str(files), **options, lazy_decoder=False)
    lazy = {"lazy_encoder": False, "lazy_decoder": False}
    return load_transcoder_set(_paths(files, config), **options, **lazy, special_load_fn=layout)


def _layout(config: dict[str, Any]) -> str | None:
    """Whose files a list names; circuit-tracer asks that of the name of the repository that holds the list."""
    first = config.get("transcoders", [""])[0]
    return next((name for name in ("gemma-scope-2", "gemma-scope") if f"google/{name}-" in first), None)


def _paths(files: Path, config: dict[str, Any]) -> dict[int, str]:
    from circuit_tracer.utils.hf_utils import parse_hf_uri

    if "transcoders" not in config:
        n_layers = len(list(files.glob("layer_*.safetensors")))
        return {layer: str(files / f"layer_{layer}.safetensors") for layer in range(n_layers)}
    paths = {}
    for layer, entry in enumerate(config["transcoders"]):
        if not entry.startswith("hf://"):
            paths[layer] = str(files / entry)
            continue
        uri = parse_hf_uri(entry)
        repository = f"{uri.repo_id.replace('/', '--')}@{uri.revision or 'main'}"
        paths[layer] = str(files.parent / "others" / repository / str(uri.file_path))
    return paths


def single(
    name: str, layer: int, *, jump: bool = False, skip: bool = False, d: int = D_MODEL, n: int = FEATURES
) -> Any:
    """One transcoder of circuit-tracer's class with our numbers."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder
    from torch.nn.functional import relu

    given = weights(f"{name}/{layer}", d, d, n)
    activation = JumpReLU(given["threshold"]) if jump else relu
    cpu = torch.device("cpu")
    made = SingleLayerTranscoder(d, n, activation, layer, skip_connection=skip, device=cpu, dtype=torch.float32)
    made.W_enc.data = given["W_enc"].T.contiguous()
    made.W_dec.data, made.b_enc.data, made.b_dec.data = given["W_dec"], given["b_enc"], given["b_dec"]
    if skip:
        made.W_skip.data = given["W_skip"]
    return made


def cross_layer(name: str, *, jump: bool = False, d: int = D_MODEL, n: int = FEATURES) -> Any:
    """A cross-layer transcoder of circuit-tracer's class with our numbers."""
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder

    kind = "jump_relu" if jump else "relu"
    options: dict[str, Any] = {"lazy_decoder": False, "device": torch.device("cpu"), "dtype": torch.float32}
    made = CrossLayerTranscoder(LAYERS, n, d, activation_function=kind, **options)
    for layer in range(LAYERS):
        given = weights(f"{name}/{layer}", d, d, n)
        made.W_enc.data[layer] = given["W_enc"].T
        made.b_enc.data[layer], made.b_dec.data[layer] = given["b_enc"], given["b_dec"]
        to = [weights(f"{name}/{layer}>{target}", d, d, n)["W_dec"] for target in range(layer, LAYERS)]
        made.W_dec[layer].data = torch.stack(to, dim=1)
        if jump:
            made.activation_function.threshold.data[layer, 0] = given["threshold"]
    return made


def configure(files: Path, kind: str, reads: str, writes: str, **more: Any) -> None:
    """config.yaml as repositories on the hub have it."""
    said = {"model_name": "openai-community/gpt2", "model_kind": kind, "feature_input_hook": reads}
    (files / "config.yaml").write_text(yaml.safe_dump({**said, "feature_output_hook": writes, **more}, sort_keys=False))


def _finish(root: Path, variant: str) -> None:
    files = root / variant / "files"
    config = yaml.safe_load((files / "config.yaml").read_text())
    x = inputs(variant, LAYERS)
    hooks = {key: config[key] for key in ("feature_input_hook", "feature_output_hook")}
    write_truth(root, variant, x, read(files, x.double()), PACKAGE, layers=LAYERS, tokens=TOKENS, **hooks)


def _set(root: Path, variant: str, reads: str, writes: str, *, jump: bool = False, skip: bool = False) -> None:
    from circuit_tracer.transcoder import TranscoderSet

    files = fresh(root, variant)
    made = {layer: single(variant, layer, jump=jump, skip=skip) for layer in range(LAYERS)}
    TranscoderSet(made, reads, writes).to_safetensors(str(files))
    configure(files, "transcoder_set", reads, writes)
    _finish(root, variant)


def _listed(root: Path, variant: str) -> None:
    """One file beside config.yaml, the others in two other repositories, one of them at a revision."""
    files = fresh(root, variant)
    entries = ["layer_0.safetensors"]
    single(variant, 0, jump=True).to_safetensors(str(files / entries[0]))
    for layer, (repository, revision) in enumerate(LISTED.items(), start=1):
        folder = root / variant / "others" / f"{repository.replace('/', '--')}@{revision}" / "deep"
        folder.mkdir(parents=True)
        single(variant, layer, jump=True).to_safetensors(str(folder / f"number_{layer}.safetensors"))
        at = "" if revision == "main" else f"?revision={revision}"
        entries.append(f"hf://{repository}/deep/number_{layer}.safetensors{at}")
    configure(files, "transcoder_set", "ln2.hook_normalized", "hook_mlp_out", transcoders=entries)
    _finish(root, variant)


def _gemma_scope(root: Path, variant: str, repository: str, name: str, *, affine: bool = False) -> None:
    """A list of Google's files, which have the names and shapes of Gemma Scope 1 (npz) and 2."""
    across = "clt" in variant
    files = fresh(root, variant)
    entries = [f"hf://google/{repository}/{name.format(layer)}" for layer in range(LAYERS)]
    for layer in range(LAYERS):
        given = weights(f"{variant}/{layer}")
        skip = given.pop("W_skip").T.contiguous()
        if across:
            to = [weights(f"{variant}/{layer}>{target}")["W_dec"] for target in range(LAYERS)]
            given["W_dec"] = torch.stack(to, dim=1)
        place = root / variant / "others" / f"google--{repository}@main" / name.format(layer)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".npz":
            arrays: dict[str, Any] = {key: value.numpy() for key, value in given.items()}
            np.savez(place, **arrays)
        else:
            lower = {key.lower(): value for key, value in given.items()}
            save_file(lower | ({"affine_skip_connection": skip} if affine else {}), place)
    reads = "ln2.hook_normalized" if repository.startswith("gemma-scope-2b") else "mlp.hook_in"
    kind = "cross_layer_transcoder" if across else "transcoder_set"
    configure(files, kind, reads, "hook_mlp_out", transcoders=entries)
    _finish(root, variant)


def _cross(root: Path, variant: str, reads: str, writes: str, *, jump: bool) -> None:
    files = fresh(root, variant)
    cross_layer(variant, jump=jump).to_safetensors(str(files))
    configure(files, "cross_layer_transcoder", reads, writes)
    _finish(root, variant)


def write(root: Path) -> None:
    """Every variant; the hooks go round, each of them occurs with transcoders and across layers."""
    _set(root, "plt_relu", "mlp.hook_in", "mlp.hook_out")
    _set(root, "plt_jumprelu", "ln2.hook_normalized", "hook_mlp_out", jump=True)
    _set(root, "plt_skip", "mlp.hook_in", "mlp.hook_out", skip=True)
    _set(root, "plt_jumprelu_skip", "hook_resid_mid", "hook_mlp_out", jump=True, skip=True)
    _listed(root, "plt_listed")
    _gemma_scope(
        root, "gemma_scope_plt", "gemma-scope-2b-pt-transcoders", "layer_{}/width_16k/average_l0_76/params.npz"
    )
    name = "transcoder_all/layer_{}_width_16k_l0_small_affine/params.safetensors"
    _gemma_scope(root, "gemma_scope_2_plt", "gemma-scope-2-1b-pt", name, affine=True)
    name = "clt/width_262k_l0_big_affine/params_layer_{}.safetensors"
    _gemma_scope(root, "gemma_scope_2_clt", "gemma-scope-2-1b-pt", name, affine=True)
    _cross(root, "clt_relu", "hook_resid_mid", "hook_mlp_out", jump=False)
    _cross(root, "clt_jumprelu", "ln2.hook_normalized", "mlp.hook_out", jump=True)


if __name__ == "__main__":
    command(write, read)
