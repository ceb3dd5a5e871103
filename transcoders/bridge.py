"""Making TransformerLens' bridges: built, made to mean the same in every family, and compared with the model inside.

What here and in `model_parts` rests on how TransformerLens, transformers and torch are made inside, no other module
touches; tests/unit/test_bridge_assumptions.py has a test for each of these assumptions.
"""

import inspect
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge, NormalizationBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module, native
from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
from transformer_lens.utilities.attn_implementation import force_eager_attention
from transformer_lens.utilities.hf_utils import autotokenizer_with_special_token_compat
from transformers.utils import logging as logging_of_transformers

from transcoders.errors import ModelError
from transcoders.hf_models import Loading

_EDITABLE = "editable-pattern"
_PROBE = 8
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}
"""Share of the largest logit by which two runs may differ; rounding is far below, another architecture above."""
_COARSE = 0.25
"""The same in less precision, where a token may also go to another expert."""


# built


def boot(
    source: str, device: str | torch.device | None, dtype: torch.dtype, how: Loading = Loading()
) -> tuple[TransformerBridge, Any]:
    """The model of a folder or of the hub, and its tokenizer as it was saved.

    The bridge's own tokenizer adds BOS, and has EOS in its place where there is none.
    """
    placed: Any = {"device": device} if how.device_map is None else {"device_map": how.device_map}
    code = how.trust_remote_code
    with no_bars():
        bridge = TransformerBridge.boot_transformers(
            source, dtype=dtype, revision=how.revision, trust_remote_code=code, **placed
        )
    changed: Any = bridge.tokenizer
    revision = how.revision if changed.name_or_path == source else None
    return bridge, saved_tokenizer(
        changed.name_or_path, revision=revision, use_fast=changed.is_fast, trust_remote_code=code
    )


def saved_tokenizer(source: str, **how: Any) -> Any:
    """The tokenizer of a folder or of the hub, as it was saved."""
    return autotokenizer_with_special_token_compat(source, **how)


def has_bridge(architecture: str) -> bool:
    """Whether TransformerLens knows a class of transformers by its name."""
    return architecture in SUPPORTED_ARCHITECTURES


def unsupported_architecture(message: str) -> str | None:
    """The architecture that `boot` says in an error it has no bridge for."""
    found = re.search(r"Config architectures: \['(.*?)'\]", message)
    return found and found[1]


def around(module: Any, architecture: str, name: str) -> TransformerBridge:
    """A bridge around a model of transformers' class `architecture`."""
    return build_bridge_from_module(module, architecture, hf_config=module.config, model_name=name)


def around_any(module: Any, name: str) -> TransformerBridge:
    """A bridge around a model of any class of transformers that has one, or of a class derived from such."""
    known = (kind.__name__ for kind in type(module).__mro__ if has_bridge(kind.__name__))
    architecture = next(known, None) or determine_architecture_from_hf_config(module.config)
    force_eager_attention(module)  # others have no patterns to read and edit
    return around(module, architecture, name)


def native_bridge(
    tensors: Mapping[str, Tensor], *, n_layers: int, n_heads: int, d_model: int, d_head: int, d_mlp: int, n_ctx: int,
    d_vocab: int, d_out: int, causal: bool, dtype: torch.dtype,
) -> Any:  # fmt: skip
    """TransformerLens' own small transformer without norms, ReLU, with these weights; absent ones are zero."""
    config = TransformerBridgeConfig(
        n_layers=n_layers, d_model=d_model, d_head=d_head, n_heads=n_heads, n_ctx=n_ctx, d_vocab=d_vocab,
        d_vocab_out=d_out, d_mlp=d_mlp, act_fn="relu", attention_dir="causal" if causal else "bidirectional",
        normalization_type=None,
    )  # fmt: skip
    bridge = native.boot(config, dtype=dtype)
    state = {name: torch.zeros_like(value) for name, value in bridge.state_dict().items()}
    given = {"embed.weight": tensors["W_E"], "pos_embed.weight": tensors["W_pos"], "unembed.weight": tensors["W_U"].mT}
    for layer in range(n_layers):
        here, block = f"blocks.{layer}.", f"blocks.{layer}.attn."
        for kind in "qkv":
            given[f"{block}{kind}.weight"] = tensors[f"{here}W_{kind.upper()}"].mT.reshape(-1, d_model)
            given[f"{block}{kind}.bias"] = tensors.get(f"{here}b_{kind.upper()}", torch.zeros(n_heads, d_head)).reshape(
                -1
            )
        given[f"{block}o.weight"] = tensors[f"{here}W_O"].reshape(-1, d_model).mT
        for name in ("in", "out"):
            given[f"{here}mlp.{name}.weight"] = tensors[f"{here}W_{name}"].mT
        for name, bias in (("attn.o", "b_O"), ("mlp.in", "b_in"), ("mlp.out", "b_out")):
            if here + bias in tensors:
                given[f"{here}{name}.bias"] = tensors[here + bias]
    bridge.load_state_dict(state | {name: value.contiguous().to(dtype) for name, value in given.items()}, strict=True)
    return bridge


@contextmanager
def no_bars() -> Iterator[None]:
    """Weights are read from the disk without a progress bar; downloads, the hub client's, keep theirs."""
    earlier = logging_of_transformers.set_tqdm_hook(
        lambda make, args, settings: make(*args, **{**settings, "disable": True})
    )
    try:
        yield
    finally:
        logging_of_transformers.set_tqdm_hook(earlier)


# the same in every family


def prepare(bridge: TransformerBridge) -> None:
    """Let every hook be read and edited alike, whatever the family."""
    for module in bridge.modules():
        if isinstance(module, NormalizationBridge):
            _compute_in_the_open(module)
    for block in bridge.blocks:
        block.original_component.register_forward_hook(_no_list)
        for part in (getattr(block, "attn", None), getattr(block, "mlp", None)):
            _add_the_stream_outside(part)
        attention = getattr(block, "attn", None)
        if attention is not None and hasattr(attention, "_pattern"):
            attention.register_forward_hook(_forget_pattern)
    _make_patterns_editable(bridge)
    fit_precision(bridge)


def fit_precision(bridge: TransformerBridge) -> None:
    """Run experts one by one in float64, which Hugging Face's grouped products do not take."""
    model: Any = bridge.original_model
    has_experts = hasattr(model, "_can_set_experts_implementation") and model._can_set_experts_implementation()
    if has_experts and next(model.parameters()).dtype == torch.float64:
        model.set_experts_implementation("eager")


def _compute_in_the_open(norm: NormalizationBridge) -> None:
    """Hugging Face's own RMSNorm rounds to float32 whatever the dtype; the bridge's keeps float64 and takes edits.

    The bridge's multiplies by a weight, which OLMo's norm does not have.
    """
    norm.use_native_layernorm_autograd = False
    inside: Any = norm.original_component
    if not hasattr(inside, "weight") and hasattr(inside, "normalized_shape"):
        inside.register_buffer("weight", torch.ones(inside.normalized_shape), persistent=False)


def _add_the_stream_outside(part: Any) -> None:
    """Some classes (Bloom, MPT) add the residual stream inside attention or MLP; hooks should see their part alone."""
    inside = getattr(part, "original_component", None)
    if inside is not None and "residual" in inspect.signature(inside.forward).parameters:
        part.__dict__["forward"] = _without_stream(part.forward)  # set as an attribute, it would go to what is inside


def _forget_pattern(attention: Any, inputs: Any, output: Any) -> None:
    """The bridge keeps the pattern of the last run in each block of GPT-2's families, and never reads it."""
    attention._pattern = None


def _no_list(module: Any, inputs: Any, output: Any) -> tuple[Any, ...] | None:
    """GPT-1's blocks return a list, whose first value the bridge's `hook_out` would not see."""
    return tuple(output) if isinstance(output, list) else None


def _without_stream(forward: Callable[..., Any]) -> Callable[..., Any]:
    def outside(read: Tensor, residual: Tensor | float = 0.0, *args: Any, **kwargs: Any) -> Any:
        out = forward(read, torch.zeros_like(read), *args, **kwargs)
        return (out[0] + residual, *out[1:]) if isinstance(out, tuple) else out + residual

    return outside


def _make_patterns_editable(bridge: TransformerBridge) -> None:
    """Let edits of `hook_pattern` take effect in every block that runs Hugging Face's own attention (OPT and others).

    There the bridge's `hook_pattern` fires after the fact, or never, and edits of it are lost. Both libraries have a
    seam: the bridge hands its hook as `pattern_fn` to an attention module that `accepts_pattern_fn`, and Hugging Face
    passes what it does not know on to the attention function that the configuration names. Classes without such a
    function (GPT-Neo, GPT-J) send the pattern through a dropout of their own, where the hook can stand.
    """
    attentions = [block.attn for block in bridge.blocks if _is_hugging_faces(getattr(block, "attn", None))]
    for attention in attentions:
        if isinstance(dropout := getattr(attention.original_component, "attn_dropout", None), torch.nn.Module):
            _fire_after(dropout, attention)
    modules = [attention.original_component for attention in attentions if _chooses_function(attention)]
    if not modules:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_EDITABLE, _attention_with_pattern_hook)
    AttentionMaskInterface.register(_EDITABLE, eager_mask)
    config: Any = bridge.original_model.config
    config._attn_implementation = _EDITABLE
    for module in modules:
        module.accepts_pattern_fn = True


def _is_hugging_faces(attention: Any) -> bool:
    """Whether the bridge calls Hugging Face's attention, which can be handed what it does not know."""
    if not isinstance(attention, AttentionBridge) or type(attention).forward is not AttentionBridge.forward:
        return False
    module: Any = attention.original_component
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _chooses_function(attention: Any) -> bool:
    """Whether Hugging Face's attention calls a function chosen by the configuration."""
    return hasattr(sys.modules[type(attention.original_component).__module__], "ALL_ATTENTION_FUNCTIONS")


def _fire_after(dropout: torch.nn.Module, attention: Any) -> None:
    dropout.register_forward_hook(lambda module, inputs, pattern: attention.hook_pattern(pattern))
    attention.original_component.accepts_pattern_fn = True  # the bridge shall not fire the hook once more


def _attention_with_pattern_hook(
    module: torch.nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_v"],
    attention_mask: Float[Tensor, "batch _ query _"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    pattern_fn: Callable[[Tensor], Tensor] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch query head d_v"], None]:
    """softmax(q kᵀ · scaling + mask) v, the softmax going through `pattern_fn`."""
    if softcap is not None or s_aux is not None or attention_mask is None:
        raise ModelError(
            f"{type(module).__name__} has a soft cap, sinks or no causal mask in its attention, "
            "which is not supported where TransformerLens leaves attention to Hugging Face."
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale + attention_mask[..., : key.shape[-2]]
    at_least_float32 = torch.promote_types(query.dtype, torch.float32)
    pattern = scores.softmax(-1, dtype=at_least_float32).to(query.dtype)
    pattern = torch.nn.functional.dropout(pattern, p=dropout, training=module.training)
    pattern = pattern if pattern_fn is None else pattern_fn(pattern)
    return (pattern @ value).transpose(1, 2).contiguous(), None


# the model inside


@torch.no_grad()
def move(model: Any, device: torch.device) -> None:
    """Put a language model on a device, in place."""
    model.bridge.to(device)


@contextmanager
def unhooked(model: Any) -> Iterator[None]:
    """While it lasts, no hook that is on a language model's bridge does anything."""
    hooked = [(point, point._forward_hooks) for point in set(model.bridge.hook_dict.values()) if point._forward_hooks]
    try:
        for point, _ in hooked:
            point._forward_hooks = OrderedDict()
        yield
    finally:
        for point, hooks in hooked:
            point._forward_hooks = hooks


def check_logits(bridge: TransformerBridge, name: str) -> None:
    """Raises `ModelError` where the bridge's logits of a few tokens are not those of Hugging Face's own modules."""
    count = min(_PROBE, int(bridge.cfg.d_vocab), int(bridge.cfg.n_ctx))
    # From the middle of the vocabulary: the ends hold padding and other special tokens, which models may mask.
    tokens = int(bridge.cfg.d_vocab) // 2 + torch.arange(count) - count // 2
    tokens = tokens[None].to(next(bridge.original_model.parameters()).device)
    try:
        ours = bridge(tokens, return_type="logits", prepend_bos=False)
        theirs = own_logits(bridge, tokens).to(ours.device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{name} does not run through TransformerLens' bridge ({reason}); its architecture is not supported."
        ) from error
    far = float((ours - theirs).abs().max() / theirs.abs().max())
    if not far <= _TOLERANCE.get(ours.dtype, _COARSE):
        raise ModelError(
            f"The logits of {name} through TransformerLens' bridge differ from transformers' own by {far:.1e} of the "
            "largest; this architecture is not supported."
        )


def own_logits(bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits by Hugging Face's modules alone."""
    with _own_modules(bridge.original_model) as model:
        return model(tokens).logits


@contextmanager
def _own_modules(model: Any) -> Iterator[Any]:
    """The model with what the bridge has put in its place taken out."""
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, GeneralizedComponent) and not name.startswith("_") and child.original_component is not None
    ]
    try:
        for parent, name, child in replaced:
            parent._modules[name] = child.original_component
        yield model
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child


_known: WeakKeyDictionary[Any, tuple[tuple[tuple[int, int, torch.dtype], ...], str]] = WeakKeyDictionary()


def remembered(owner: object, weights: Iterable[Tensor], fingerprint: Callable[[], str]) -> str:
    """`fingerprint()` of `owner`, its only one, called again once a weight was replaced or changed in place.

    Changes through `.data`, and of tensors made in inference mode, leave no trace.
    """
    state = tuple((w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype) for w in weights)
    if (known := _known.get(owner)) is None or known[0] != state:
        _known[owner] = known = (state, fingerprint())
    return known[1]
