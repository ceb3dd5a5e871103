# pyright: reportMissingImports=false
"""circuit-tracer writes sets of transcoders and cross-layer transcoders, and reads any. Run by `environments.py`.

The package writes weights and no configuration, so config.yaml is by hand, with the keys its loader asks for. Files
that a `transcoders` list names in other repositories lie in `others/<owner>--<name>@<revision>/` beside `files`.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from peer_truth import D_MODEL, FEATURES, TOKENS, Computed, command, fresh, inputs, weights, write_truth

PACKAGE, LAYERS = "circuit-tracer", 3
LISTED = {"alice/first": "main", "bob/second": "v1.5"}


def read(files: Path, x: torch.Tensor) -> Computed:
    """Features and reconstruction [layer, position, …] by its loaders; entries with `hf://` come from `others`."""
    dictionaries = load(files, torch.float64)
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
    layout = config.get("layout")
    if config["model_kind"] == "cross_layer_transcoder":
        if layout == "gemma-scope-2":
            return load_gemma_scope_2_clt(_paths(files, config), **options)
        return load_clt(str(files), **options, lazy_decoder=False)
    lazy = {"lazy_encoder": False, "lazy_decoder": False}
    return load_transcoder_set(_paths(files, config), **options, **lazy, special_load_fn=layout)


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
    _cross(root, "clt_relu", "hook_resid_mid", "hook_mlp_out", jump=False)
    _cross(root, "clt_jumprelu", "ln2.hook_normalized", "mlp.hook_out", jump=True)
    _cross(root, "clt_jumprelu_mlp_in", "mlp.hook_in", "hook_mlp_out", jump=True)


if __name__ == "__main__":
    command(write, read)
