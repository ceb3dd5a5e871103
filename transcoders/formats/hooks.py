"""What others call our sites: hooks of TransformerLens 2 and 3 and of its Bridge, modules of transformers."""

import re
from typing import Literal

from transcoders.errors import DictionaryError, FileFormatError
from transcoders.sites import Site, SiteKind

_TRANSFORMER_LENS: dict[str, SiteKind] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_mlp_in": "resid_mid",
    "ln2.hook_normalized": "mlp_normed",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_neurons",
    "mlp.hook_out": "mlp_out",
    "hook_mlp_out": "mlp_added",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_added",
    # of the Bridge
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "ln2.hook_in": "resid_mid",
    "ln2.hook_out": "mlp_in",
    "ln2_post.hook_out": "mlp_added",
    "mlp.out.hook_in": "mlp_neurons",
    "attn.o.hook_in": "attn_z",
    "attn.hook_out": "attn_out",
    "ln1_post.hook_out": "attn_added",
}
_WRITTEN: dict[SiteKind, str] = {
    kind: next(name for name, other in _TRANSFORMER_LENS.items() if other == kind)
    for kind in dict.fromkeys(_TRANSFORMER_LENS.values())
}
_MODULES: dict[tuple[str, str], SiteKind] = {
    ("", "in"): "resid_pre",
    ("", "out"): "resid_post",
    ("mlp", "in"): "mlp_in",
    ("mlp", "out"): "mlp_out",
    ("attn", "out"): "attn_out",
    ("self_attn.o_proj", "in"): "attn_z",
    ("post_feedforward_layernorm", "out"): "mlp_added",
    ("pre_feedforward_layernorm", "out"): "mlp_in",
    ("pre_feedforward_layernorm", "in"): "resid_mid",
    ("ln_2", "in"): "resid_mid",
    ("ln_2", "out"): "mlp_in",
}
_BEFORE_MLP: dict[tuple[str, str], SiteKind] = {
    ("post_attention_layernorm", "in"): "resid_mid",
    ("post_attention_layernorm", "out"): "mlp_in",
}
"""In models without norms after attention, which give this name to those."""
_ATTENTION = {"self_attn": "attn", "attention": "attn", "self_attention": "attn"}
_NORMS_AFTER = re.compile(r"gemma-?[23](?!b)|olmo-?[23]|exaone-?4|glm-?4", re.IGNORECASE)
_BLOCKS = (
    ("neox|pythia", "layers"),
    ("gpt-?2|gpt-?j|gpt-?neo|bloom|codegen|falcon", "h"),
    ("opt-", "decoder.layers"),
)
_SELF_ATTENTION = "bloom|falcon"
_ATTENTIONS = (
    ("neox|pythia", "attention"),
    (_SELF_ATTENTION, "self_attention"),
    ("gpt-?2|gpt-?j|gpt-?neo|codegen", "attn"),
)
_RMS_NORMS = re.compile(
    "llama|gemma|mi[sx]tral|ministral|qwen|phi-?[34]|olmo-?[23]|smollm|yi-|deepseek|vicuna|granite|glm|gpt-oss|apertus|t5",
    re.IGNORECASE,
)


def site_of_hook(name: str, layer: int | None = None) -> Site:
    """The site of a TransformerLens hook such as `blocks.5.hook_resid_pre`; `layer` for a name without one.

    `hook_mlp_in` is the stream before the norm, `hook_mlp_out` what is added to it, after a norm of the MLP's output.
    Raises `FileFormatError` for places that carry none of our sites.
    """
    found = re.fullmatch(r"(?:blocks\.(\d{1,5})\.)?(.+)", name.strip(), re.DOTALL)
    place = name if found is None else found[2]
    number = layer if found is None or found[1] is None else int(found[1])
    kind = _TRANSFORMER_LENS.get(place)
    if kind is None or number is None:
        raise FileFormatError(
            f"The hook {name[:80]!r} is no place this package reads; it reads "
            f"blocks.LAYER.{', '.join(_TRANSFORMER_LENS)}."
        )
    return Site(number, kind)


def hook_in(text: str) -> str | None:
    """The first TransformerLens hook that a name such as `gpt2_blocks.5.hook_resid_pre_768` speaks of, if any."""
    for found in re.finditer(r"blocks\.\d{1,5}\.([a-z][a-z0-9_]*\.)*hook_[a-z]+(_[a-z]+)*", text):
        if found[0].split(".", 2)[2] in _TRANSFORMER_LENS:
            return found[0]
    return None


def hook_of_site(site: Site | SiteKind) -> str:
    """TransformerLens' name of a site, with its block, or of a kind of site, without."""
    return _WRITTEN[site] if isinstance(site, str) else f"blocks.{site.layer}.{_WRITTEN[site.kind]}"


def has_layer_norm(model: str) -> bool:
    """Whether a model of this name has LayerNorms, and no RMSNorms."""
    return _RMS_NORMS.search(model) is None


def normalised_site(model: str) -> SiteKind:
    """What `ln2.hook_normalized` of TransformerLens 2 carries in a model of this name whose weights are not folded.

    Its LayerNorm calls the hook after weight and bias, which is what the MLP reads; its RMSNorm calls it before.
    Source: TransformerLens 2, components/layer_norm.py and components/rms_norm.py.
    """
    return "mlp_in" if has_layer_norm(model) else "mlp_normed"


def added_site(model: str) -> SiteKind:
    """What `hook_mlp_out` of TransformerLens carries: the MLP's output, or what a norm after it makes of it."""
    return "mlp_added" if _NORMS_AFTER.search(model) else "mlp_out"


def site_of_module(name: str, side: Literal["in", "out"] = "out", layer: int | None = None, model: str = "") -> Site:
    """The site that transformers' module such as `model.layers.5.mlp` reads (`in`) or writes (`out`).

    `model`: its name, where it is known: families differ in what they call a module.
    Raises `FileFormatError` for modules that carry none of our sites.
    """
    found = re.fullmatch(r"(?:.*?(?:layers|h|blocks|block)\.(\d{1,5})(?:\.|$))?(.*)", name.strip(), re.DOTALL)
    part = name if found is None else found[2]
    number = layer if found is None or found[1] is None else int(found[1])
    modules = _MODULES if _NORMS_AFTER.search(model) else _MODULES | _BEFORE_MLP
    kind = modules.get((_ATTENTION.get(part, part), side))
    if kind is None or number is None:
        raise FileFormatError(
            f"The {side}put of the module {name[:80]!r} is no place this package reads; it reads blocks, their mlp and "
            "their attention, such as 'model.layers.5.mlp'."
        )
    return Site(number, kind)


def module_of_site(site: Site, model: str, side: Literal["in", "out"] = "out") -> str:
    """The module of transformers' base model, of this name, that reads (`in`) or writes (`out`) a site.

    Raises `DictionaryError` for sites that no module of a block reads or writes.
    """
    blocks = next((path for names, path in _BLOCKS if re.search(names, model, re.IGNORECASE)), "layers")
    block = f"{blocks}.{site.layer}"
    if (site.kind, side) in (("resid_pre", "in"), ("resid_post", "out")):
        return block
    if (site.kind, side) in (("mlp_in", "in"), ("mlp_out", "out")):
        return f"{block}.mlp"
    if site.kind == "attn_out" and side == "out":
        named = next((name for names, name in _ATTENTIONS if re.search(names, model, re.IGNORECASE)), "self_attn")
        return f"{block}.{named}"
    if _NORMS_AFTER.search(model) and (site.kind, side) in (("resid_mid", "in"), ("mlp_added", "out")):
        return f"{block}.{'pre' if side == 'in' else 'post'}_feedforward_layernorm"
    if (site.kind, side) == ("resid_mid", "in"):
        has_ln_2 = blocks == "h" and not re.search(_SELF_ATTENTION, model, re.IGNORECASE)
        return f"{block}.{'ln_2' if has_ln_2 else 'post_attention_layernorm'}"
    raise DictionaryError(
        f"No module of transformers' {model} {'reads' if side == 'in' else 'writes'} {site}; use the native format."
    )
