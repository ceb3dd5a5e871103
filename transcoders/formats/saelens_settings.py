"""What a `cfg.json` of SAELens says, of any of its versions.

Version 6 keeps what is known of the model under `metadata`; before, all keys lay side by side under other names and
with other defaults (`Settings.of`). Keys that do not bear on what a dictionary computes are left alone.

| key | what it does here |
|---|---|
| `architecture` | the encoder, and whether it is a transcoder; `ARCHITECTURES` |
| `apply_b_dec_to_input` | the encoder reads `x − b_dec` |
| `normalize_activations` | `constant_norm_rescale`, `layer_norm`: a norm of each token, for transcoders of x only |
| | `expected_average_only_in`: a factor of the training set; folded in where it is known, else it has been |
| `rescale_acts_by_decoder_norm` | features are ranked by, and have the value of, `h ‖W_dec‖` |
| `hook_name`, `hook_name_out` | what is read and, by a transcoder, written |
| `model_from_pretrained_kwargs` | how TransformerLens processed the model's weights |

SAELens loads models unprocessed, but for what `model_from_pretrained_kwargs` asks for. What that means for us, who use
models as they are published:

| processing | what it changes | here |
|---|---|---|
| `center_writing_weights` (LayerNorm models) | the stream and what is added to it lose their mean | norm `centre` |
| `fold_ln` | what the MLP reads lacks the norm's weight and bias | `mlp_in` is read as `mlp_normed` |
| `fold_value_biases` | `attn_z` lacks the value biases | the frame `folded` |
| `refactor_factored_attn_matrices` | `attn_z` has another basis | refused |
| `center_unembed` | logits | nothing |

An autoencoder with `centre` sees `x − mean(x)` and gives `mean(x)` back, so that its errors are those in the processed
model; a transcoder's encoder is centred, and its output, which the model's LayerNorms read, is left as it is.

`ln2.hook_normalized` is before the norm's weight, but after it for LayerNorm in TransformerLens 1 and 2.

Source: decoderesearch/SAELens, sae_lens/loading/pretrained_sae_loaders.py, sae_lens/saes/*.py and
sae_lens/load_model.py (6.54); TransformerLensOrg/TransformerLens, transformer_lens/components/*norm*.py (2.16, 3.9).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator

from transcoders.dictionaries.token_norm import TokenNormName
from transcoders.errors import FileFormatError
from transcoders.formats.files import MOST_LAYERS, require_settings
from transcoders.formats.hooks import has_layer_norm, site_of_hook, site_of_module
from transcoders.sites import Frame, Site


@dataclass(frozen=True)
class Architecture:
    """What tells one of SAELens' dictionaries from the others."""

    tensors: tuple[str, ...]
    """Of one number a feature, beside W_enc, W_dec and b_dec."""
    is_transcoder: bool = False
    has_skip: bool = False
    has_k: bool = False


ARCHITECTURES = {
    "standard": Architecture(("b_enc",)),
    "gated": Architecture(("b_gate", "b_mag", "r_mag")),
    "jumprelu": Architecture(("b_enc", "threshold")),
    "topk": Architecture(("b_enc",), has_k=True),
    "batchtopk": Architecture(("b_enc",)),
    "matryoshka_batchtopk": Architecture(("b_enc",)),
    "transcoder": Architecture(("b_enc",), is_transcoder=True),
    "skip_transcoder": Architecture(("b_enc",), is_transcoder=True, has_skip=True),
    "jumprelu_transcoder": Architecture(("b_enc", "threshold"), is_transcoder=True),
    "jumprelu_skip_transcoder": Architecture(("b_enc", "threshold"), is_transcoder=True, has_skip=True),
}
"""`batchtopk` and its matryoshka are checkpoints of training: their one threshold is `topk_threshold`."""


class UnsupportedError(FileFormatError):
    """Settings that are sound, but of something this package does not read."""


_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_NORMS: dict[str, TokenNormName | None] = {
    "none": None,
    "expected_average_only_in": None,
    "constant_norm_rescale": "rescale",
    "layer_norm": "layer_norm",
}
_IN_ONLY: dict[TokenNormName, TokenNormName] = {"rescale": "rescale_in", "layer_norm": "layer_norm_in"}
_IN_STREAM = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "mlp_added", "attn_out", "attn_added")
"""The kinds of site whose mean over the width `center_writing_weights` takes away."""
_NAMES = {
    "gpt2-small": "gpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
}
"""TransformerLens' names of models that another name on the hub ends with."""

_TEXT = {"type": ["string", "null"], "maxLength": 300}
_SIZE = {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31}
_OBJECT = {"type": ["object", "null"]}
_SWITCH = {"type": ["boolean", "null"]}
_SCHEMA = Draft202012Validator(
    {
        "type": "object",
        "required": ["d_in", "hook_name"],
        "properties": {
            "architecture": {"type": "string", "maxLength": 100},
            "d_in": {**_SIZE, "type": "integer"},
            "d_sae": _SIZE,
            "d_out": _SIZE,
            "k": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 2**31},
            "apply_b_dec_to_input": _SWITCH,
            "normalize_activations": {"type": ["boolean", "string", "null"], "maxLength": 100},
            "rescale_acts_by_decoder_norm": _SWITCH,
            "reshape_activations": _TEXT,
            "activation_fn": _TEXT,
            "activation_fn_kwargs": _OBJECT,
            "hook_name": {"type": "string", "maxLength": 300},
            "hook_name_out": _TEXT,
            "hook_layer": {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_LAYERS},
            "hook_head_index": {"type": ["integer", "null"]},
            "hook_head_index_out": {"type": ["integer", "null"]},
            "model_name": _TEXT,
            "model_class_name": _TEXT,
            "model_from_pretrained_kwargs": _OBJECT,
            "prepend_bos": _SWITCH,
            "dataset_path": _TEXT,
            "sae_lens_version": _TEXT,
            "sae_lens_training_version": _TEXT,
            "norm_scaling_factor": {"type": "number", "exclusiveMinimum": 1e-10, "maximum": 1e10},
        },
    }
)
_NESTED = Draft202012Validator({"properties": {"metadata": {"type": "object"}}})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a dictionary computes, and of what."""

    architecture: str
    d_in: int
    d_sae: int | None
    d_out: int | None
    k: int | None
    centred: bool
    """The encoder reads `x − b_dec`."""
    norm: TokenNormName | None
    factor: float | None
    """Of the activations in training, where it is known and not folded into the weights."""
    lacks_factor: bool
    """There was one, and it is not known whether it is folded in."""
    by_decoder_norm: bool
    read: Site
    write: Site
    centre_encoder: bool
    """A transcoder of a stream without its mean."""
    frame: Frame
    model: str
    bos: bool | None
    corpus: str | None

    @property
    def kind(self) -> str:
        return "plt" if ARCHITECTURES[self.architecture].is_transcoder else "sae"

    @classmethod
    def of(cls, path: Path, written: Mapping[str, Any], stated: Mapping[str, Any]) -> "Settings":
        """The settings `written` in a file, with those that are `stated` elsewhere in their place.

        Raises `UnsupportedError` for what this package does not read, naming the key and its value, and
        `FileFormatError` for what is no settings.
        """
        require_settings(path, written, _NESTED)
        flat = _with_defaults({**written.get("metadata", {}), **written, **stated})
        require_settings(path, flat, _SCHEMA)
        flat = {key: value for key, value in flat.items() if value is not None}
        name = _architecture(path, flat)
        kind = ARCHITECTURES[name]
        _require_whole_heads(path, flat)
        read = _site(path, flat, "hook_name")
        write = _site(path, flat, "hook_name_out") if kind.is_transcoder else read
        if read.layer != write.layer:
            _refuse(path, "hook_name_out", flat["hook_name_out"], f"a site of layer {read.layer}, which is read")
        if kind.is_transcoder and flat.get("apply_b_dec_to_input"):
            _refuse(path, "apply_b_dec_to_input", True, "false for transcoders")
        has_factor = flat["normalize_activations"] == _FACTOR
        model = str(flat.get("model_name", "unknown"))
        centres = _loses_mean(flat) and read.kind in _IN_STREAM
        return cls(
            architecture=name,
            d_in=int(flat["d_in"]),
            d_sae=int(flat["d_sae"]) if "d_sae" in flat else None,
            d_out=int(flat["d_out"]) if "d_out" in flat else None,
            k=_k(path, flat) if kind.has_k else None,
            centred=not kind.is_transcoder and flat.get("apply_b_dec_to_input", True),
            norm=_norm(path, flat, centres, kind.is_transcoder),
            factor=flat.get("norm_scaling_factor") if has_factor else None,
            lacks_factor=has_factor and "norm_scaling_factor" not in flat,
            by_decoder_norm=flat.get("rescale_acts_by_decoder_norm", False),
            read=read,
            write=write,
            centre_encoder=centres and kind.is_transcoder,
            frame=_frame(path, flat, read, write),
            model=_NAMES.get(model, model),
            bos=flat.get("prepend_bos"),
            corpus=flat.get("dataset_path"),
        )


_FACTOR = "expected_average_only_in"


def _with_defaults(flat: dict[str, Any]) -> dict[str, Any]:
    """The settings under the names, and with the defaults, of version 6."""
    if _version(flat.get("sae_lens_version")) < (6,):
        flat = {_RENAMED.get(key, key): value for key, value in flat.items()}
        flat.setdefault("prepend_bos", True)
        if flat.get("activation_fn") == "topk" and isinstance(flat.get("activation_fn_kwargs"), Mapping):
            flat |= {"architecture": "topk", "k": flat["activation_fn_kwargs"].get("k")}
        if isinstance(flat.get("normalize_activations"), bool):
            flat["normalize_activations"] = _FACTOR if flat["normalize_activations"] else "none"
    if flat.get("architecture") is None:
        flat["architecture"] = "standard"
    if flat.get("normalize_activations") is None:
        flat["normalize_activations"] = "none"
    if isinstance(hook := flat.get("hook_name"), str) and "hook_layer" in flat:
        flat["hook_name"] = hook.replace("{layer}", str(flat["hook_layer"]))
    return flat


def _architecture(path: Path, flat: Mapping[str, Any]) -> str:
    name = flat["architecture"]
    if name not in ARCHITECTURES:
        _refuse(path, "architecture", name, ", ".join(ARCHITECTURES))
    if flat.get("activation_fn", "relu") not in ("relu", "topk"):
        _refuse(path, "activation_fn", flat["activation_fn"], "relu, topk")
    return name


def _k(path: Path, flat: Mapping[str, Any]) -> int:
    k = flat.get("k")
    if k is None or not float(k).is_integer():
        _refuse(path, "k", k, "a number of features")
    return int(k)


def _norm(path: Path, flat: Mapping[str, Any], centres: bool, is_transcoder: bool) -> TokenNormName | None:
    stated = flat["normalize_activations"]
    if stated not in _NORMS:
        _refuse(path, "normalize_activations", stated, ", ".join(_NORMS))
    norm = _NORMS[stated]
    if centres and norm == "rescale":
        _refuse(path, "normalize_activations", stated, "with center_writing_weights: none, layer_norm")
    if is_transcoder:
        return None if norm is None else _IN_ONLY[norm]
    return "centre" if centres and norm is None else norm  # a layer norm centres by itself


def _require_whole_heads(path: Path, flat: Mapping[str, Any]) -> None:
    for key in ("hook_head_index", "hook_head_index_out"):
        if key in flat:
            _refuse(path, key, flat[key], "null: all heads together")
    if flat.get("reshape_activations", "none") not in ("none", "hook_z"):
        _refuse(path, "reshape_activations", flat["reshape_activations"], "none, hook_z")


def _site(path: Path, flat: Mapping[str, Any], key: str) -> Site:
    """The site of a hook in a model as it is published; of a module it is the output, read or written."""
    hook, by = flat.get(key), flat.get("model_class_name", "HookedTransformer")
    if not isinstance(hook, str):
        _refuse(path, key, hook, "a hook's name")
    try:
        if by == "AutoModelForCausalLM":
            site = site_of_module(hook)
        elif by in ("HookedTransformer", "TransformerBridge"):
            site = site_of_hook(hook, flat.get("hook_layer"))
        else:
            _refuse(path, "model_class_name", by, "HookedTransformer, TransformerBridge, AutoModelForCausalLM")
    except FileFormatError as error:
        raise UnsupportedError(f"{path} has {key}={hook!r}: {error}") from error
    if site.layer >= MOST_LAYERS:
        _refuse(path, key, hook, f"a layer below {MOST_LAYERS}")
    folded = _processing(flat, "fold_ln")
    if site.kind == "mlp_in" and folded:
        return Site(site.layer, "mlp_normed")
    if site.kind == "mlp_normed" and not folded and by == "HookedTransformer" and _normalized_is_output(flat):
        return Site(site.layer, "mlp_in")
    return site


def _normalized_is_output(flat: Mapping[str, Any]) -> bool:
    """Whether `hook_normalized` was after the norm's weight: for LayerNorm in TransformerLens 1 and 2.

    SAELens allows TransformerLens 3, where it is before the weight, since its versions 6.31 to 6.35.
    """
    trained_by = flat.get("sae_lens_training_version", flat.get("sae_lens_version"))
    return has_layer_norm(flat.get("model_name", "")) and _version(trained_by) < (6, 31)


def _loses_mean(flat: Mapping[str, Any]) -> bool:
    return _processing(flat, "center_writing_weights") and has_layer_norm(flat.get("model_name", ""))


def _processing(flat: Mapping[str, Any], name: str) -> bool:
    return flat.get("model_from_pretrained_kwargs", {}).get(name) is True


def _frame(path: Path, flat: Mapping[str, Any], *sites: Site) -> Frame:
    if any(site.kind == "attn_z" for site in sites):
        if _processing(flat, name := "refactor_factored_attn_matrices"):
            _refuse(path, f"model_from_pretrained_kwargs.{name}", True, "false for hook_z")
        if _processing(flat, "fold_value_biases"):
            return Frame("folded")
    return Frame()


def _version(text: Any) -> tuple[int, ...]:
    """Major and minor; nothing where none is stated."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", text) if isinstance(text, str) else None
    return () if found is None else (int(found[1]), int(found[2]))


def _refuse(path: Path, key: str, value: Any, supported: str) -> NoReturn:
    raise UnsupportedError(
        f"{path} has {key}={str(value)[:80]!r}, which this package does not read; it reads {supported}."
    )
